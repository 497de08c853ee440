"""Tensor parallelism under torchrun, from outside a model: each rank has a share of every matrix.

Attention is split by heads, the feed-forward by hidden units (Shoeybi et al., arXiv 1909.08053),
with one all-reduce after each. Embedding and LM head are split by vocabulary; with more ranks than
KV heads, several ranks hold the same one. A rank reads only its own slices of the files.
"""
import contextlib
from dataclasses import replace

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import UserError
from model import ModelConfig, Transformer
from ranks import job
from ranks.all_reduce import sum_over_ranks
from ranks.job import rank, world

# Bytes of a layer from which sharing a draft pays: what is read during two all-reduces, of some
# 15 microseconds each with NCCL (an estimate), 1.3 milliseconds with gloo on two cores (measured).
WORTH_SHARING = {"cuda": 100e6, "cpu": 40e6}
# The newer name, and the older.
gather_rows = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor


# ---------------------------------------------------------------- which worlds a model fits

def check(config: ModelConfig, checkpoint_dir):
    """Refuse a model that cannot be split among the ranks, before any weight is read."""
    if world() > 1 and (what := not_divisible(config, world())):
        fitting = ", ".join(str(n) for n in range(1, config.n_head + 1)
                            if not not_divisible(config, n))
        raise UserError(f"{checkpoint_dir} has {what}, which {world()} processes cannot share; "
                        f"these numbers can: {fitting}")


def not_divisible(config: ModelConfig, n: int) -> str | None:
    """What of the model n ranks cannot divide, in words, or None."""
    heads, kv_heads, q = config.n_head, config.n_kv_head, config.quantization
    if kv_heads % n and n % kv_heads:
        return f"{kv_heads} key-value heads"
    for what, count in (("attention heads", heads), ("feed-forward units", config.ffn_dim),
                        ("vocabulary entries", config.vocab_size)):
        if count % n:
            return f"{count} {what}"
    # int4 groups lie along the inputs that are split; fp8's kernel takes blocks.
    unit = {"int4": q.group_size, "fp8": 16}.get(q.mode, 1) if q else 1
    for what, count in (("attention outputs", heads * config.head_dim),
                        ("feed-forward units", config.ffn_dim),
                        ("vocabulary entries", config.vocab_size if unit == 16 else 0)):
        if count // n % unit:
            return f"{count} {what} in {q.mode} blocks of {unit}"


def better_whole(config: ModelConfig, device: str, dtype: torch.dtype, n: int) -> bool:
    """Whether each of n ranks had better run the whole of a draft, or cannot share it."""
    return bool(not_divisible(config, n)) or (
        layer_bytes(config, dtype) < WORTH_SHARING[torch.device(device).type])


def layer_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one layer's weights."""
    layer = skeleton(replace(config, n_layer=1), dtype).layers[0]
    return size(*layer.parameters(), *layer.buffers())


# ---------------------------------------------------------------- a rank's share

def columns_of_all_ranks(t: Tensor) -> Tensor:
    """t [..., V / n] of every rank -> [..., V]."""
    # Gathered as rows: PyTorch 2.11 cannot compile columns.
    return gather_rows(t.movedim(-1, 0).contiguous(), 0, job.passes).movedim(0, -1)


class VocabEmbedding(nn.Module):
    """A rank's rows of the embedding; other ranks' tokens give zero before the sum."""

    def __init__(self, rows: int, dim: int):
        super().__init__()
        self.first = rank() * rows
        self.weight = nn.Parameter(torch.empty(rows, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.first
        mine = (local >= 0) & (local < len(self.weight))
        return sum_over_ranks(F.embedding(torch.where(mine, local, 0), self.weight)
                              * mine[..., None])


def kv_heads(config: ModelConfig, n: int, r: int) -> tuple[int, int]:
    """The KV heads of rank r of n: the first, and how many. Ranks beyond their number share them.
    """
    return r * config.n_kv_head // n, max(1, config.n_kv_head // n)


def share(config: ModelConfig, n: int | None = None) -> Transformer:
    """A rank's share of a model among n, weights not filled: a model of 1/n of the heads, hidden
    units and vocabulary, joined by sums. n: default all ranks of this run.
    """
    n = n or world()
    model = Transformer(replace(config, n_head=config.n_head // n,
                                n_kv_head=kv_heads(config, n, 0)[1], ffn_dim=config.ffn_dim // n,
                                vocab_size=config.vocab_size // n))
    model.config.vocab_size = config.vocab_size  # of the logits that come out
    model.embed = VocabEmbedding(config.vocab_size // n, config.dim)
    if config.tied:
        model.output.weight = model.embed.weight
    for layer in model.layers:
        for last in (layer.attn.wo, layer.ffn.w2):
            last.register_forward_hook(lambda module, args, out: sum_over_ranks(out))
    model.output.register_forward_hook(lambda module, args, out: columns_of_all_ranks(out))
    return model


def read_share(config: ModelConfig):
    """A function that reads this rank's part of a tensor, and no other bytes, from an open file."""
    n, r, d = world(), rank(), config.head_dim
    first, count = kv_heads(config, n, r)
    even = lambda size: (size, r * size // n, size // n)  # rows in all, this rank's first, its rows
    kv = config.n_kv_head * d, first * d, count * d
    rows = {"wqkv": [even(config.n_head * d), kv, kv], "w13": 2 * [even(config.ffn_dim)],
            "embed": [even(config.vocab_size)], "output": [even(config.vocab_size)]}

    def read(file, name: str) -> Tensor:
        tensor, owner = file.get_slice(name), name.split(".")[-2]
        if owner in rows:  # stacked matrices, each split by its outputs
            parts, start = [], 0
            for size, begin, own in rows[owner]:
                parts.append(tensor[start + begin:start + begin + own])
                start += size
            return torch.cat(parts)
        # These are split by their inputs; every rank needs the scales of all rows.
        if owner in ("wo", "w2") and len(shape := tensor.get_shape()) == 2:
            return tensor[:, r * shape[1] // n:(r + 1) * shape[1] // n].contiguous()
        if owner in ("wo", "w2") and name.endswith(".bias") and r:  # the sum has it once
            return torch.zeros_like(file.get_tensor(name))
        return file.get_tensor(name)

    return read


# ---------------------------------------------------------------- models to count with

def size(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


@contextlib.contextmanager
def made_on(device, dtype: torch.dtype):
    """Modules made inside are on `device`, in `dtype` where they do not choose one themselves."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def skeleton(config: ModelConfig, dtype: torch.dtype, device="meta", n=1) -> Transformer:
    """A model, or a rank's share of it among n, with weights not filled.

    On "meta" it needs no memory for them: to count with.
    """
    with made_on(device, dtype):
        return Transformer(config) if n == 1 else share(config, n)
