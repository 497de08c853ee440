"""How benchmark.py measures: engines on caches that they share, calls that take turns, the read
bandwidth. Under torchrun the ranks start every measurement together; times are this rank's.
"""
import sys
import time
from statistics import median

import torch

import graphs
from drafters.llama import LlamaDrafter
from engine import Engine
from model import Transformer
from ranks import job
from tp import size

LOOPS = 4  # calls that are timed together


def on_gpu(device) -> bool:
    return torch.device(device).type == "cuda"


def sync(device):
    if on_gpu(device):
        torch.cuda.synchronize()


def start_together(device) -> float:
    """The time, once every rank is here and its device idle: none waits for another's last pass."""
    sync(device)
    job.wait_for_all()
    return time.perf_counter()


def interleaved(cases: dict, repeats: int, device, loops=LOOPS) -> dict[str, list[float]]:
    """Seconds a call of each case, [repeats] each; the cases take turns, so a slow moment hits all.
    """
    seconds = {name: [] for name in cases}
    for i in range(repeats + 1):
        for name, call in cases.items():
            start = start_together(device)
            for _ in range(loops):
                call()
            sync(device)
            if i:  # the first turn is the warm-up
                seconds[name].append((time.perf_counter() - start) / loops)
    return seconds


def bandwidth(device, repeats: int) -> float:
    """Bytes a second that sums over arrays far larger than the caches read, on all ranks at once.
    """
    data = torch.ones((1 << 31 if on_gpu(device) else 1 << 28) // 4, device=device)
    own = size(data) / median(interleaved({"sum": data.sum}, repeats, device)["sum"])
    return sum(job.of_all_ranks(own))


# ---------------------------------------------------------------- engines

def engine_on(caches: dict, target, draft=None, head=None, k=0, chooser=None, **rule) -> Engine:
    """An engine on caches that others use too: each overwrites them, so none relies on them.

    draft: a Llama, or a drafter, which gets caches of its own where it is none. rule: as Engine
    takes it.
    """
    drafter = LlamaDrafter(draft) if isinstance(draft, Transformer) else draft
    e = Engine(target, drafter, head, speculate_k=k, chooser=chooser, **rule)
    e.cache, e.capacity = caches[target], len(caches[target].rope)
    if isinstance(drafter, LlamaDrafter):
        drafter.cache = caches[drafter.model]
    elif drafter:
        drafter.new_cache(e.capacity)
    return e


def compiled(args, e: Engine, what: str) -> Engine:
    if args.compile:
        print(f"compiling {what}", file=sys.stderr)
        graphs.compile_engine(e)
    return e


def recorded(args, call):
    """`call`, on a GPU as the CUDA graph that compiled rounds are made of."""
    call()
    if not (args.compile and on_gpu(args.device)):
        return call
    graph = graphs.record(call)
    return lambda: (graph.replay(), call)[0]  # `call` keeps the tensors that the graph reads


def random_prompt(n: int, vocab_size: int) -> list[int]:
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(0)).tolist()
