"""Tensor parallelism under torchrun, from outside a model: each rank has a share of every matrix.

Attention is split by heads, the feed-forward by hidden units (Shoeybi et al., arXiv 1909.08053),
with one all-reduce after each. Embedding and LM head are split by vocabulary. A rank reads only its
own slices of the files. NCCL on GPUs, gloo on CPUs; several machines form one group.
"""
import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import UserError
from model import ModelConfig, Transformer

# The newer name, and the older.
gather_rows = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor


def world() -> int:
    """How many processes torchrun started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def start(device: str) -> str:
    """Join the other ranks; returns this rank's own device."""
    if device == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"torchrun started {local + 1} processes or more on a machine with "
                            f"{count} GPUs; give --nproc_per_node {count} at most")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    gpu = device != "cpu"
    dist.init_process_group("nccl" if gpu else "gloo",
                            device_id=torch.device(device) if gpu else None)
    return device


def leave():
    """End this rank after all ranks have finished, and without C++'s destructors.

    One of those sometimes aborts after gloo was used ("terminate called without an active
    exception"; 2 of some 25 runs on busy cores, torch 2.13), which torchrun reports as a failure.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def from_rank_0(text: str | None) -> str | None:
    """Rank 0's text, or None, on every rank."""
    said = [text]
    dist.broadcast_object_list(said)
    return said[0]


def same_everywhere(t: Tensor) -> Tensor:
    """Rank 0's t on every rank, in place.

    Every rank computes the drafted tokens and what to accept. If two ranks differed in a last bit
    (another kernel, another GPU), they would accept different prefixes and wait for each other in
    different collectives forever. So all ranks take rank 0's tokens and decisions.
    """
    dist.broadcast(t, 0)
    return t


def check(config: ModelConfig, checkpoint_dir):
    """Refuse a model that cannot be split among the ranks, before any weight is read."""
    if what := not_divisible(config, world()):
        raise UserError(f"{checkpoint_dir} has {what}, not divisible by {world()} processes; "
                        "choose another --nproc_per_node")


def not_divisible(config: ModelConfig, n: int) -> str | None:
    """What of the model n ranks cannot divide, in words, or None."""
    for what, count in (("key-value heads", config.n_kv_head), ("attention heads", config.n_head),
                        ("feed-forward units", config.ffn_dim),
                        ("vocabulary entries", config.vocab_size)):
        if count % n:
            return f"{count} {what}"
    return None


def sum_over_ranks(t: Tensor) -> Tensor:
    return collectives.all_reduce(t, "sum", dist.group.WORLD)


def columns_of_all_ranks(t: Tensor) -> Tensor:
    """t [..., V / n] of every rank -> [..., V]."""
    # Gathered as rows: PyTorch 2.11 cannot compile columns.
    return gather_rows(t.movedim(-1, 0).contiguous(), 0, dist.group.WORLD).movedim(0, -1)


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


def share(config: ModelConfig) -> Transformer:
    """This rank's share of a model, weights not filled: a model of 1/n of the heads, hidden units
    and vocabulary, joined by sums.
    """
    n = world()
    model = Transformer(replace(config, n_head=config.n_head // n, n_kv_head=config.n_kv_head // n,
                                ffn_dim=config.ffn_dim // n,
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
    n, r = world(), rank()
    heads = [config.n_head * config.head_dim] + 2 * [config.n_kv_head * config.head_dim]
    rows = {"wqkv": heads, "w13": 2 * [config.ffn_dim], "embed": [config.vocab_size],
            "output": [config.vocab_size]}

    def read(file, name: str) -> Tensor:
        tensor, owner = file.get_slice(name), name.split(".")[-2]
        if owner in rows:  # stacked matrices, each split by its outputs
            starts = [sum(rows[owner][:i]) for i in range(len(rows[owner]))]
            return torch.cat([tensor[start + r * size // n:start + (r + 1) * size // n]
                              for start, size in zip(starts, rows[owner])])
        # These are split by their inputs; every rank needs the scales of all rows.
        if owner in ("wo", "w2") and len(shape := tensor.get_shape()) == 2:
            return tensor[:, r * shape[1] // n:(r + 1) * shape[1] // n].contiguous()
        if owner in ("wo", "w2") and name.endswith(".bias") and r:  # the sum has it once
            return torch.zeros_like(file.get_tensor(name))
        return file.get_tensor(name)

    return read
