"""The processes that torchrun starts as one command: how they meet, agree, speak and end.

All run the same program on the same input. Rank 0 alone reads data, speaks and writes files; what
the others need of it is broadcast. NCCL joins GPUs, gloo CPUs; several machines are one group.
"""
import contextlib
import os
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

import common
from common import refuse

IDLE = timedelta(days=30)  # a rank may wait for rank 0's words: a chat idles for hours
PASS = timedelta(hours=1)  # ... and for the others in a pass, if one still compiles (not recorded)
FIRST = f"first to fail, start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}"  # key of the store
host = None  # the group for what is said between passes, gloo also beside NCCL
passes = None  # the group for the collectives of a pass


def world() -> int:
    """How many processes torchrun started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def run(main):
    """`common.run`, under torchrun as one of several ranks: rank 0 speaks, all end together.

    The first rank that fails says why; the others, which mostly lost the connection to it, do not.
    One that a signal kills says nothing: torchrun's report names it.
    """
    try:
        alone = not common.by_torchrun()
    except common.UserError:
        alone = True  # common.run says why
    if alone:
        return common.run(main)
    code, errors = 1, sys.stderr
    say = lambda text: first_to_fail() and print(text, file=errors, flush=True)
    try:
        with contextlib.ExitStack() as stack:
            if rank():
                nothing = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nothing))
                stack.enter_context(contextlib.redirect_stderr(nothing))
            common.run(lambda: (join(), main()), say)
            wait_for_all()
        code = 0
    except SystemExit as e:
        code = e.code or 0
        if code == 1:  # it has said why itself
            first_to_fail()
    except BaseException:
        say(traceback.format_exc().rstrip())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        # No destructors: NCCL's wait for recorded graphs that hold the communicator, one of gloo's
        # sometimes aborts ("terminate called without an active exception").
        os._exit(code)


def first_to_fail() -> bool:
    """Whether no other rank has failed yet; if one has, after the time it takes to say why."""
    try:
        first = store_of_torchrun().compare_set(FIRST, "", str(rank())).decode()
    except (KeyError, RuntimeError):  # no store, or not any more: then the whole run has ended
        return host is None or rank() == 0
    if first == str(rank()):
        return True
    time.sleep(1)  # here torchrun ends this rank, if that one is on the same machine
    if rank() == 0:
        print(f"rank {first}, on another machine, failed and says why there", file=sys.stderr)
    return False


def store_of_torchrun() -> dist.TCPStore:
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                         is_master=False, timeout=timedelta(seconds=10))


def end_with_others():
    """End this process soon after a rank has failed or torchrun's store has gone.

    For a rank that waits for another machine inside a recorded round, where NCCL has no time limit;
    on its own machine torchrun ends it.
    """
    store = store_of_torchrun()
    with contextlib.suppress(RuntimeError):
        while not store.check([FIRST]):
            time.sleep(1)
    time.sleep(5)  # for what can end by itself, and say so
    os._exit(1)


def join():
    """Meet the other ranks, before anything can fail: then whoever is refused ends all at once.

    Several machines meet at torchrun's --master_addr; GLOO_SOCKET_IFNAME chooses their network.
    """
    global host
    if host is None:
        refuse((not dist.is_gloo_available(), "this PyTorch lacks gloo, which joins processes; "
                "install one with it, or start one process with python"))
        dist.init_process_group("gloo", timeout=PASS)
        host = dist.new_group(backend="gloo", timeout=IDLE)
        if int(os.environ["LOCAL_WORLD_SIZE"]) < world():
            threading.Thread(target=end_with_others, daemon=True).start()


def start(device: str) -> str:
    """Be ready for passes on a device, cpu or cuda; returns this rank's own: cpu, or its GPU.

    Raises UserError for what this machine or PyTorch lacks.
    """
    global passes
    if world() == 1:
        return device
    gpu, here = device != "cpu", int(os.environ["LOCAL_WORLD_SIZE"])
    if gpu:
        refuse((here > (count := torch.cuda.device_count()), f"torchrun started {here} processes "
                f"on a machine with {count} GPUs; give --nproc_per_node {count} at most"),
               (not dist.is_nccl_available(), "this PyTorch lacks NCCL, which joins GPUs; install "
                "one with it, or start one process with python"))
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    join()
    if passes is None:
        passes = dist.group.WORLD
        if gpu:
            wait_for_all()  # NCCL would wait for a rank that was refused
            passes = dist.new_group(backend="nccl", timeout=PASS, device_id=torch.device(device))
        print(f"{world()} processes on {'GPUs, joined by NCCL' if gpu else 'CPUs, joined by gloo'}",
              file=sys.stderr)
    return device


def wait_for_all():
    """Return when every rank has come here, its GPU idle."""
    if host is not None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        dist.barrier(group=host)


def broadcast(value=None):
    """Rank 0's value, on every rank."""
    said = [value]
    if world() > 1:
        join()
        dist.broadcast_object_list(said, group=host)
    return said[0]


def from_rank_0(call):
    """What call() gives, made by rank 0 alone, on every rank."""
    return broadcast(None if rank() else call())


def of_all_ranks(value) -> list:
    """Every rank's value, on every rank."""
    if world() == 1:
        return [value]
    join()
    values = [None] * world()
    dist.all_gather_object(values, value, group=host)
    return values


def check_same(values: dict):
    """Refuse a rank with another value than rank 0's: the ranks would wait for each other."""
    first = broadcast(values)
    for what in values | first:
        mine, theirs = values.get(what), first.get(what)
        refuse((mine != theirs, f"{what} is {mine} on rank {rank()}, {theirs} on rank 0; start the "
                "same command on the same files on every machine"))


def same_everywhere(t: Tensor) -> Tensor:
    """Rank 0's t on every rank, in place.

    Every rank computes the drafted tokens and what to accept. If two ranks differed in a last bit
    (another kernel, another GPU), they would accept different prefixes and wait for each other in
    different collectives forever. So all ranks take rank 0's tokens and decisions.
    """
    dist.broadcast(t, 0, group=passes)
    return t
