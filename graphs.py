"""torch.compile and CUDA graphs, wrapped around an engine from outside, and the warm-up after which
nothing is left to compile.
"""
import functools
import os
import shutil

import torch

from common import UserError
from engine import Engine, LlamaDrafter

UNROLL = 64  # draft steps times draft layers up to which all K steps are compiled as one graph
RECOMPILE_LIMIT = 512  # spans, numbers of rows and engines share the code of one function


def check_compiler(device: str):
    """Refuse --compile where Inductor would find no C++ compiler."""
    names = (*os.environ.get("CXX", "g++").split()[:1], "clang++", "c++", "cl")
    if device == "cpu" and not any(map(shutil.which, names)):
        raise UserError("--compile on a CPU needs a C++ compiler, and none is on the PATH; install "
                        "g++ or leave --compile out")


def compile_engine(e: Engine):
    """Compile what a round consists of; on a GPU record whole rounds as CUDA graphs as well.

    Without those, a Llama draft that is small enough is compiled with all its K steps in one graph,
    which saves their start; the time to compile it grows with K times its layers.
    """
    on_cpu = e.device.type == "cpu"
    # On a CPU the calls between kernels become C++ too: in Python they take a good part of a small
    # model's pass. Collectives cannot be called from there.
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    build = functools.partial(torch.compile, fullgraph=True, dynamic=False,
                              options={"cpp_wrapper": on_cpu and alone})
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    e.verify_and_accept = build(e.verify_and_accept)
    if isinstance(d := e.drafter, LlamaDrafter):
        if on_cpu and e.speculate_k * d.model.config.n_layer <= UNROLL:
            d.steps = build(d.steps)
        else:
            d.step = build(d.step)
    if not on_cpu:
        e.play = RecordedRounds(e.play)


class RecordedRounds:
    """`play_round` as a CUDA graph for each span, recorded when the span first occurs."""

    def __init__(self, play):
        self.play, self.cache, self.graphs = play, None, {}

    def __call__(self, e: Engine, span: int):
        if e.cache is not self.cache:  # the caches grew: the graphs point into the old ones
            self.cache, self.graphs = e.cache, {}
        if span not in self.graphs:
            self.graphs[span] = record(lambda: self.play(e, span), [e.outcome], e.rng)
        self.graphs[span].replay()


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """One for all recordings: the libraries keep a workspace for each stream that they met."""
    return torch.cuda.Stream()


def record(call, changes=(), rng: torch.Generator | None = None) -> torch.cuda.CUDAGraph:
    """The CUDA graph of `call()`, which may change the tensors `changes` and draw from `rng`."""
    before, side = [t.clone() for t in changes], side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compile, and let libraries allocate, which a recording must not do
            call()
            for t, value in zip(changes, before):
                t.copy_(value)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if rng:
        graph.register_generator_state(rng)
    with torch.cuda.graph(graph):
        call()
    return graph


@torch.inference_mode()
def warm_up(e: Engine, shortest: int, longest: int):
    """Run rounds at every span that texts of these lengths meet: all is compiled and recorded then.

    What the caches held is lost, so this comes before the first prompt.
    """
    e.reserve(min(longest, e.context))
    random, k = e.rng.get_state(), e.speculate_k
    e.tokens, e.read_len = [0, 0], 0
    e.read(0)  # the first calls of a process are slow
    for span in sorted({e.span(n + k) for n in range(shortest, min(longest, e.context) + 1)}):
        for _ in range(2):
            e.set_state(k)
            e.play(e, span)
    e.tokens = []
    e.rng.set_state(random)
