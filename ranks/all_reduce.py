"""The sum over ranks that follows every attention and feed-forward: the standard all-reduce, or
PyTorch's one-shot kernel where GPUs can read each other's memory and it measures faster.

A pass of few rows makes two small sums a layer, so their latency counts, not their bytes.
"""
import os
import sys
import time
from datetime import timedelta
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from ranks import job
from ranks.job import PASS, broadcast, of_all_ranks, world

SET_UP = timedelta(minutes=1)  # to wait for a rank that failed to set up shared memory
CALLS, TURNS = {"cuda": 50, "cpu": 10}, 5  # collectives timed in one go, and how many times


class OneShot(NamedTuple):
    """Memory in which each GPU reads the others' summands itself: one kernel, no ring of copies."""
    buffer: Tensor
    dtype: torch.dtype
    room: int  # elements up to which this is the faster way


one_shot: OneShot | None = None  # `choose` sets it
ops = torch.library.Library("judge", "FRAGMENT")
ops.define("one_shot_sum(Tensor x) -> Tensor")


def one_shot_sum(x: Tensor) -> Tensor:
    """The sum over ranks of x [...], which must not be larger than the buffer.

    An op of our own, because Inductor's lowering of PyTorch's copies the buffer before each call.
    One buffer serves all calls: the kernel waits for all ranks before it reads, and after. The copy
    comes before it, not inside as PyTorch's one_shot_all_reduce_copy has it: there a block tells
    the other ranks to read when its first warp has written, not all of them.
    """
    buffer = one_shot.buffer[:x.numel()].view(x.shape)
    buffer.copy_(x)
    return torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", job.passes.group_name)


ops.impl("one_shot_sum", one_shot_sum, "CUDA")


@torch.library.register_fake("judge::one_shot_sum")
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def standard_sum(t: Tensor) -> Tensor:
    # Waited for here: an eager embedding's sum goes on into a compiled Block.
    return collectives.wait_tensor(collectives.all_reduce(t, "sum", job.passes))


def in_one_shot(t: Tensor) -> bool:
    return one_shot is not None and t.dtype == one_shot.dtype and t.numel() <= one_shot.room


def sum_over_ranks(t: Tensor) -> Tensor:
    return torch.ops.judge.one_shot_sum(t) if in_one_shot(t) else standard_sum(t)


def seconds_of(collective, device, recorded=True) -> float:
    """Median seconds of a call of `collective()`; all ranks time it together.

    recorded: on a GPU in a CUDA graph of many, as compiled rounds run it.
    """
    kind = torch.device(device).type
    calls = CALLS[kind]

    def run():
        for _ in range(calls):
            collectives.wait_tensor(collective())

    many, finish, seconds = run, torch.cuda.synchronize if kind == "cuda" else lambda: None, []
    if kind == "cuda" and recorded:
        run()  # libraries allocate now, which a recording must not do
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        many = graph.replay
    for _ in range(TURNS):
        many()  # which all ranks leave at the same time
        finish()
        start = time.perf_counter()
        many()
        finish()
        seconds.append((time.perf_counter() - start) / calls)
    return median(seconds)


# ---------------------------------------------------------------- the faster all-reduce

def choose(rows: int, dim: int, dtype: torch.dtype, device):
    """Take the one-shot sum where the GPUs offer it and it is faster; says so.

    It is tried on [rows, dim], then on half the rows, and so on, until it wins: the ring of copies
    catches up as sums grow. Both are timed as recorded graphs. All ranks do as rank 0 measured.
    ONE_SHOT=0 in the environment leaves it out.
    """
    global one_shot
    one_shot = None
    if world() == 1 or not all(of_all_ranks(one_shot_offered(device))):
        return
    other = dist.get_backend(job.passes).upper()
    try:
        buffer = shared_buffer(rows * dim, dtype, device)
    except RuntimeError as e:
        print(f"all-reduce: {other}; one-shot failed: {e}", file=sys.stderr)
        return
    one_shot = OneShot(buffer, dtype, rows * dim)
    # What fails from here on is not caught: the others may be in a kernel that waits for this rank,
    # whose end ends them.
    while True:
        x = (torch.arange(rows * dim, device=device) % 7).to(dtype).view(rows, dim)  # exact sums
        if not all(of_all_ranks(torch.equal(torch.ops.judge.one_shot_sum(x), standard_sum(x)))):
            one_shot = None
            print(f"all-reduce: {other}; one-shot gives wrong sums here", file=sys.stderr)
            return
        ours, theirs = time_both(x)
        if ours < theirs or rows == 1:
            break
        rows //= 2
    one_shot = one_shot._replace(room=rows * dim) if ours < theirs else None
    print(f"all-reduce: {f'one-shot up to {rows} rows' if one_shot else other}; of [{rows}, {dim}] "
          f"one-shot takes {1e3 * ours:.3f} ms, {other} {1e3 * theirs:.3f} ms (ONE_SHOT=0 leaves "
          "it out)", file=sys.stderr)


def one_shot_offered(device) -> bool:
    """Whether all ranks are GPUs of this machine that can read each other's memory."""
    n = world()
    return (torch.device(device).type == "cuda" and int(os.environ["LOCAL_WORLD_SIZE"]) == n
            and os.environ.get("ONE_SHOT") != "0"
            and hasattr(torch.ops.symm_mem, "one_shot_all_reduce")
            and all(torch.cuda.can_device_access_peer(a, b)
                    for a in range(n) for b in range(n) if a != b))


def shared_buffer(count: int, dtype: torch.dtype, device) -> Tensor:
    """Memory [count] on every rank that all ranks have mapped.

    Raises RuntimeError on all ranks where PyTorch does on one, unless it waits in the driver.
    """
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not needed, and can block
    from torch.distributed import _symmetric_memory as symmetric
    buffer = together(lambda: symmetric.empty(count, dtype=dtype, device=device))
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(SET_UP)  # the ranks meet there
    try:
        together(lambda: symmetric.rendezvous(buffer, job.passes))
    finally:
        store.set_timeout(PASS)
    return buffer


def time_both(x: Tensor) -> tuple[float, float]:
    """Seconds of summing x, in one shot and the standard way: rank 0's, on every rank."""
    ways = torch.ops.judge.one_shot_sum, standard_sum
    return broadcast(tuple(seconds_of(lambda way=way: way(x), x.device) for way in ways))


def together(step):
    """step(), on every rank; raises RuntimeError on all of them if it did on one."""
    made, why = None, None
    try:
        made = step()
    except RuntimeError as e:
        why = str(e).partition("\n")[0] or type(e).__name__
    if failed := [w for w in of_all_ranks(why) if w]:
        raise RuntimeError(failed[0])
    return made
