"""Llama in plain PyTorch: config, transformer, static KV cache. Nothing here knows of drafts.

Covers dense Llama (SmolLM2, TinyLlama, Yi and the like too), Mistral, Qwen2/2.5 and Qwen3;
formats/config.py makes the config from a `config.json` and refuses by name what is not there.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from linear import Quantization, linear, lm_head

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class ModelConfig:
    vocab_size: int
    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    rope_freqs: tuple[float, ...]  # radians per position of each pair of dimensions, head_dim / 2
    rope_scale: float  # of cosines and sines: YaRN's attention factor, else 1
    max_seq_len: int
    sliding_window: int | None  # not implemented: max_seq_len ends where it would begin to matter
    tied: bool
    qkv_bias: bool
    wo_bias: bool
    mlp_bias: bool
    qk_norm: bool  # Qwen3: RMSNorm of each head's queries and keys
    quantization: Quantization | None = None  # of the linear layers, see linear.py


def rope_table(c: ModelConfig, length: int, device=None) -> Tensor:
    """Cosines and sines of every position, float32 [length, 2, head_dim / 2]."""
    freqs = torch.tensor(c.rope_freqs, dtype=torch.float32, device=device)
    angle = torch.outer(torch.arange(length, device=device).float(), freqs)
    return torch.stack((angle.cos(), angle.sin()), dim=1) * c.rope_scale


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate x [B, S, H, head_dim] by rope [S, 2, head_dim / 2].

    Hugging Face's layout: dimension i is paired with i + head_dim / 2.
    """
    cos, sin = rope[:, None].unbind(2)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


@dataclass
class Cache:
    """Keys and values of the positions read so far, allocated once; it belongs to who generates.
    Position by position, so its first positions look the same to a compiled pass at any length.
    """
    kv: list[Tensor]  # a layer's: [length, 2, B, n_kv_head, head_dim]
    rope: Tensor  # float32 [length, 2, head_dim / 2]

    def first(self, span: int) -> "Cache":
        """The first `span` positions, as a view: a pass attends to these and pays for no more."""
        return Cache([kv[:span] for kv in self.kv], self.rope[:span])


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.head_dim
        self.wqkv = linear(c.quantization, c.dim, (c.n_head + 2 * c.n_kv_head) * c.head_dim,
                           bias=c.qkv_bias)
        self.wo = linear(c.quantization, c.n_head * c.head_dim, c.dim, bias=c.wo_bias)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else nn.Identity() for _ in "qk")

    def forward(self, x: Tensor, pos: Tensor, kv: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
        B, S, _ = x.shape
        qkv = self.wqkv(x).view(B, S, -1, self.head_dim)
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        q, k = apply_rope(self.q_norm(q), rope), apply_rope(self.k_norm(k), rope)
        kv.index_copy_(0, pos, torch.stack((k, v)).permute(2, 0, 1, 3, 4))
        if mask is None:
            return self.wo(torch.ops.judge.attention(q, kv, pos))  # gpu_kernels/attention.py
        k, v = kv.permute(1, 2, 3, 0, 4)
        # Query heads that share a KV head become rows of one head: the cache is never repeated.
        q = q.transpose(1, 2).reshape(B, self.n_kv_head, -1, self.head_dim)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.reshape(B, self.n_head, S, self.head_dim).transpose(1, 2)
        return self.wo(y.reshape(B, S, -1))


class FeedForward(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.w13 = linear(c.quantization, c.dim, 2 * c.ffn_dim, bias=c.mlp_bias)  # gate, up
        self.w2 = linear(c.quantization, c.ffn_dim, c.dim, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.attn_norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.attn = Attention(c)
        self.ffn_norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.ffn = FeedForward(c)

    def forward(self, x, pos, kv, rope, mask):
        x = x + self.attn(self.attn_norm(x), pos, kv, rope, mask)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """`features` then `output`; `forward` is both. All state is in the cache they are given."""
    agree = staticmethod(lambda t: t)  # of several ranks (tp.py): rank 0's t for all, in place
    run = staticmethod(lambda layer, *args: layer(*args))  # graphs.py: a compiled Block
    kernel_rows = 0  # graphs.py: up to so many, attention is a Triton kernel's and needs no mask
    taps = ()  # layers whose inputs `features` appends to its own states, for EAGLE-3

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.output = lm_head(None if c.tied else c.quantization, c.dim, c.vocab_size)
        if c.tied:
            self.output.weight = self.embed.weight

    def new_cache(self, length: int, batch: int = 1, grown_from: Cache | None = None) -> Cache:
        """A cache of `length` positions in the weights' dtype, with what `grown_from` holds."""
        c, w = self.config, self.norm.weight
        shape = length, 2, batch, c.n_kv_head, c.head_dim
        kv = [torch.zeros(shape, dtype=w.dtype, device=w.device) for _ in range(c.n_layer)]
        for new, old in zip(kv, grown_from.kv if grown_from else ()):
            new[:len(old)] = old
        return Cache(kv, rope_table(c, length, w.device))

    def features(self, tokens: Tensor, pos: Tensor, cache: Cache, at: Tensor | None = None,
                 mask: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, [B, S, D]: what the LM head and the judge read.

        tokens [B, S] are written to the cache's positions pos [S]; a pass costs as much as it is
        long, so give it `cache.first(span)`. In a tree, RoPE takes the positions `at` [S] and rows
        attend as mask, bool [S, span], says.
        """
        x, rope, tapped = self.embed(tokens), cache.rope[pos if at is None else at], []
        if mask is None and len(pos) > self.kernel_rows:
            mask = torch.arange(len(cache.rope), device=pos.device) <= pos[:, None]
        if mask is not None:
            mask = mask.repeat(self.config.n_head // self.config.n_kv_head, 1)
        for i, (layer, kv) in enumerate(zip(self.layers, cache.kv)):
            tapped += [x] if i in self.taps else []
            x = self.run(layer, x, pos, kv, rope, mask)
        return torch.cat((self.norm(x), *tapped), -1) if tapped else self.norm(x)

    def forward(self, tokens: Tensor, pos: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """(logits [B, S, V], hidden [B, S, D]); row i's logits predict the token after it."""
        hidden = self.features(tokens, pos, cache)[..., :self.config.dim]  # without the taps
        return self.output(hidden), hidden
