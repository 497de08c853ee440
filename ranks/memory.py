"""What memory models need on one rank, for any config, quantization and number of ranks: computed
before anything is allocated, and refused where it is not there.
"""
import contextlib
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

import tp
from common import UserError
from engine import PREFILL_CHUNK, power_of_two
from linear import Linear, QuantizedLinear
from model import ModelConfig, Transformer
from ranks.job import of_all_ranks, world
from tp import size, skeleton

# Estimates, on a GPU: what the allocator rounds up or cannot use again, the libraries' workspaces
# and recorded graphs; and what NCCL sets up between ranks. The CUDA context is there before free
# memory is asked for. On a CPU, a thread's buffers in attention.
RESERVED, NCCL, THREAD = 1.0e9, 1.0e9, 1 << 20
LOGIT = 32  # bytes for each logit of a verification beside target's and draft's: top-p sorts


class Memory(NamedTuple):
    """Bytes on one rank."""
    weights: int
    cache: int
    workspace: int  # the most that is in use beside the two, at any time from loading on

    @property
    def total(self) -> int:
        return sum(self)


def memory(config: ModelConfig, dtype: torch.dtype, positions: int, rows: int, n=1, device="cpu",
           at_once=PREFILL_CHUNK, batch=1) -> Memory:
    """What a model needs on one rank of n: the workspace is an upper bound, the others are exact.

    positions: of its cache. rows: of a verification (0: hidden states are read only). at_once:
    positions of a text that one pass reads. batch: texts side by side.
    """
    device, more = torch.device(device).type, config.n_layer - 1  # all layers are alike
    model = skeleton(replace(config, n_layer=1), dtype, n=n)
    weights = held(model, dtype, device) + more * held(model.layers[0], dtype, device)
    if config.tied:
        head = model.output
        weights += head.added(dtype, device, tied=True) - head.added(dtype, device)
    one = model.new_cache(positions, batch)
    cache = (1 + more) * size(*one.kv) + size(one.rope)
    # Loading joins a share of its parts, or widens or packs a tensor: from a file of 16 bits or of
    # `dtype` that is a tensor more. int4 is unpacked on a CPU, a stored byte to two and two int32.
    loading = max(size(t) * (10 if t.dtype == torch.uint8 and device == "cpu" else 1)
                  for t in (*model.parameters(), *model.buffers()))
    running = workspace(model, dtype, positions, rows, n, device, at_once, batch)
    constant = torch.get_num_threads() * THREAD if device == "cpu" else RESERVED + NCCL * (n > 1)
    return Memory(weights, cache, max(loading - cache, running) + int(constant))


def held(module: nn.Module, dtype: torch.dtype, device: str) -> int:
    """Bytes of a skeleton's weights as `linear.prepare` leaves them."""
    layers = (m for m in module.modules() if isinstance(m, (Linear, QuantizedLinear)))
    return size(*module.parameters(), *module.buffers()) + sum(
        m.added(dtype, device) for m in layers)


def workspace(model: Transformer, dtype: torch.dtype, positions: int, rows: int, n: int,
              device: str, at_once: int, batch: int) -> int:
    """Bytes of activations and temporaries at the peak of a prompt's pass or of a verification.

    Counted in model.py's lines, eager; compiled passes hold less. model: a skeleton, one of n.
    """
    c, e, layer, rows = model.config, dtype.itemsize, model.layers[0], min(rows, positions)
    chunk = max(min(at_once, positions), rows)
    s = batch * chunk
    product = lambda linear: linear.workspace(s, dtype, device)
    q, kv, x, hidden = (s * size for size in (c.n_head * c.head_dim, c.n_kv_head * c.head_dim,
                                              c.dim, c.ffn_dim))
    mask = chunk * c.n_head // c.n_kv_head * positions  # bool; SDPA makes a bias of it
    attention = max(product(layer.attn.wqkv), (3 * q + 2 * kv) * e + product(layer.attn.wo),
                    (q + 2 * kv) * e + max(q * (12 + e), (2 * q + mask) * e))  # RoPE, SDPA
    ffn = max(product(layer.ffn.w13), 4 * hidden * e, 3 * hidden * e + product(layer.ffn.w2))
    # Beside them: a layer's input, the sum with attention, its norm, and the target's hidden states
    # while the draft reads; all-reduces copy. float32: RMSNorm's temporaries, and RoPE's table.
    stream = x * e * (4 if n == 1 else 6) + 4 * chunk * c.head_dim
    prompt = mask + stream + max(attention, ffn, 12 * x)
    return max(prompt, rows * c.vocab_size * (2 * e + LOGIT),
               model.output.workspace(max(rows, 1), dtype, device))


def reserved(length: int, context: int, k=0) -> int:
    """Positions of the caches that Engine.reserve makes for `length` tokens."""
    return min(context + k, power_of_two(min(length, context) + k))


def free_memory(device: str) -> float:
    """Bytes that a model on `device` can take: on a CPU this rank's part; inf where unknown."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable:"))
        return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return math.inf


def needed(models: dict, positions: int, rows: int, n: int, device: str, caches: float,
           **reading) -> dict[str, float]:
    """{what: bytes on each of n ranks}, the arguments as `check_memory` takes them."""
    found = {}
    for i, (name, model) in enumerate(models.items()):
        if isinstance(model, Memory):
            found[name] = model
            continue
        config, dtype, whole = model
        if n != world():
            whole = i > 0 and tp.better_whole(config, device, dtype, n)
        found[name] = memory(config, dtype, positions, rows, 1 if whole else n, device, **reading)
    return {name: m.weights for name, m in found.items()} | {
        "caches": caches * sum(m.cache for m in found.values()),
        "workspace": max(m.workspace for m in found.values())}  # the models take turns


def gpus_needed(models: dict, positions: int, free: float, rows=17, more_than=0, caches=1.0,
                **reading) -> int | None:
    """The fewest GPUs with `free` bytes each that do; None: no number does."""
    config = next(iter(models.values()))[0]
    return next((n for n in range(more_than + 1, config.n_head + 1)
                 if not tp.not_divisible(config, n) and free >= sum(
                     needed(models, positions, rows, n, "cuda", caches, **reading).values())), None)


def check_memory(models: dict, positions: int, rows: int, device: str, caches=1.0, advice="",
                 **reading):
    """Refuse models that do not fit, with the figures, before anything is allocated.

    models: {"target": (config, dtype, whether each rank runs the whole), "draft": ...}, the target
    first; of what is no Llama its Memory. caches: of each model at a time; 1.5 where one grows. The
    others, and `reading`: as `memory` takes them.
    """
    n, free = world(), min(of_all_ranks(free_memory(device)))
    need = lambda ranks: needed(models, positions, rows, ranks, device, caches, **reading)
    gb = lambda size: f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
    parts = need(n)
    if (total := sum(parts.values())) <= free:
        return
    (config, dtype, _), kind = next(iter(models.values())), torch.device(device).type
    mode = config.quantization and config.quantization.mode
    if not advice:
        advice = "take smaller models" + (
            "" if mode == "int4" else f", quantize.py --mode {'int4' if mode else 'int8'}") + (
            ", --dtype bfloat16" if dtype == torch.float32 else "")
    if kind == "cuda" and (m := gpus_needed(models, positions, free, rows, n, caches, **reading)):
        advice = f"{m} processes would do, with {gb(sum(need(m).values()))} each; or {advice}"
    *first, last = (f"{name} {gb(size)}" for name, size in parts.items())
    each = f" on each of {n} ranks" * (n > 1)
    raise UserError(f"this does not fit: {', '.join(first)} and {last} need {gb(total)}{each}, "
                    f"{kind} has {gb(free)} free; {advice}")
