"""torch.compile and CUDA graphs, wrapped around an engine from outside, and the warm-up after which
nothing is left to compile.
"""
import copy
import functools
import os
import shutil

import torch
from torch import Tensor

from common import UserError
from engine import PREFILL_CHUNK, Engine, decide, next_token, padded, verify_and_accept
from linear import FEW
from model import Cache, Transformer

WHOLE = 8  # layers up to which a pass on a CPU is one graph; see compile_engine
PROMPTS = 16, 80  # prompt lengths below and above FEW rows
RECOMPILE_LIMIT = 512  # numbers of rows, models and engines share the code of one function


def check_compiler(device: str):
    """Refuse --compile where Inductor would find no C++ compiler."""
    names = (*os.environ.get("CXX", "g++").split()[:1], "clang++", "c++", "cl")
    if device == "cpu" and not any(map(shutil.which, names)):
        raise UserError("--compile on a CPU needs a C++ compiler, and none is on the PATH; install "
                        "g++ or leave --compile out")


def alone() -> bool:
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def builder(device: torch.device):
    """torch.compile with the options of a device."""
    # On a CPU the calls between kernels become C++ too: in Python they take a good part of a small
    # model's pass. Collectives cannot be called from there.
    options = {"cpp_wrapper": alone()} if device.type == "cpu" else {
        # Without it Inductor leaves products of one row, all draft steps but the first, to cuBLAS.
        "coordinate_descent_tuning": True}
    return functools.partial(torch.compile, fullgraph=True, dynamic=False, options=options)


def compile_engine(e: Engine):
    """Compile what rounds and prompts consist of; on a GPU record whole rounds as CUDA graphs too.

    One Block is compiled for all layers of a model, whatever their number, and the LM head with
    what follows it. Python's call of each takes about 0.1 ms: nothing in a recording, little beside
    a large model's layer on a CPU. A small model's rounds there would take twice as long, so they
    are compiled as whole passes, a draft's as a loop; of prompts, only the target's Block is.
    """
    build, on_cpu = builder(e.device), e.device.type == "cpu"
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT
    e.rows = padded
    target, rows = e.target, {1, 2, *(1 + (k and e.drafter.size(k)) for k in e.ks)}
    e.target = by_block(target, build, rows)

    def whole(model, call):
        if on_cpu and alone() and model.config.n_layer <= WHOLE:
            call = any_span(build(call))
            return lambda _, *args, **more: call(model, *args, **more)  # compiled with the model

    if call := whole(target, verify_and_accept):
        e.verify_and_accept = call
    else:
        e.verify_and_accept = functools.partial(verify_and_accept, decided=build(decide))
        e.next_token = build(next_token)
    if e.drafter:
        e.drafter.compile(lambda call: any_span(build(call)),
                          lambda model: by_block(model, build, rows), whole)
    if not on_cpu:
        models = [e.target, *filter(None, [getattr(e.drafter, "model", None)])]
        e.play = RecordedRounds(e.play, len(models) > bool(e.drafter) and all(
            e.speculate_k < m.kernel_rows for m in models))


def no_kernel(model: Transformer) -> str | None:
    """Why a compiled pass of few rows has PyTorch's attention; None if the Triton kernel runs."""
    w = model.norm.weight
    if w.device.type != "cuda":
        return f"on a {w.device.type.upper()}"
    try:
        from gpu_kernels.attention import unavailable
    except ImportError:
        return "Triton is not installed"
    return unavailable(w.device, model.config.head_dim, w.dtype)


def by_block(model: Transformer, build, rows: set[int]) -> Transformer:
    """The model, sharing all weights, with one compiled Block for all of its layers.

    rows: of the passes that rounds make, each compiled by itself; the passes that read prompts are
    compiled once for any number of rows.
    """
    def fixed(layer, *args):
        return layer(*args)

    def any_rows(layer, *args):
        return layer(*args)

    fixed, any_rows = build(fixed), build(any_rows)

    def run(layer, x, pos, kv, rope, mask):
        any_size(kv, 0)  # any span
        any_size(mask, 1)
        if x.shape[1] in rows:
            return fixed(layer, x, pos, kv, rope, mask)
        for t, dim in (x, 1), (pos, 0), (rope, 0), (mask, 0):
            any_size(t, dim)
        return any_rows(layer, x, pos, kv, rope, mask)

    model = copy.copy(model)
    model.run, model.kernel_rows = run, 0 if no_kernel(model) else FEW
    return model


def any_size(t: Tensor | None, dim: int):
    """Let compiled code take any size of a dimension. Where it cannot, it is compiled for each."""
    if t is not None:
        torch._dynamo.maybe_mark_dynamic(t, dim)


def any_span(call):
    """A compiled call that takes caches of any length."""
    def marked(*args, **more):
        for cache in args:
            if isinstance(cache, Cache):
                for t in *cache.kv, cache.rope:
                    any_size(t, 0)
        return call(*args, **more)
    return marked


class RecordedRounds:
    """`play_round` as a CUDA graph for each span and K, recorded when they first occur.

    one: attention reads only the keys that there are, so a graph of the whole cache is enough.
    """

    def __init__(self, play, one=False):
        self.play, self.one, self.cache, self.graphs = play, one, None, {}

    def __call__(self, e: Engine, span: int, k: int) -> int:
        span = e.capacity if self.one else span
        if e.cache is not self.cache:  # the caches grew: the graphs point into the old ones
            self.cache, self.graphs = e.cache, {}
        if (span, k) not in self.graphs:
            made = []
            graph = record(lambda: made.append(self.play(e, span, k)), [e.outcome], e.rng)
            self.graphs[span, k] = graph, made[-1]
        graph, drafted = self.graphs[span, k]
        graph.replay()
        return drafted


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
    random = e.rng.get_state()
    e.read_len = 0
    # One size of a prompt would do for what is compiled; cuDNN makes a plan for each.
    sizes = PROMPTS if e.device.type == "cpu" else {
        *map(padded, range(1, min(longest, PREFILL_CHUNK) + 1))}
    for rows in sorted(sizes):
        e.tokens = [0] * min(rows, longest, e.context)
        e.next_token(e.target, e.read(0), e.settings, e.noise(1))
    e.tokens = [0, 0]
    for k in e.ks:
        # A chooser times every K at the span of the largest.
        drafted = {k and e.drafter.size(k), *([e.drafted] if e.chooser else [])}
        for span in sorted({e.span(n + more) for more in drafted
                            for n in range(shortest, min(longest, e.context) + 1)}):
            for _ in range(2):
                e.set_state(k)
                e.play(e, span, k)
    e.tokens = []
    e.rng.set_state(random)
