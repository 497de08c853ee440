"""Triton kernels for a few rows times a quantized weight, as in verifying K + 1 tokens on a GPU.

Up to MAX_ROWS rows are read in one tile: a weight crosses the memory bus once, as bytes, however
many rows there are, and is widened in registers. Where the outputs alone would leave processors
idle, the inputs are split among programs too: the ops return float32 [splits, rows, out], and the
sum over the splits, which a compiled model fuses into what follows, is the product. More rows are
bound by arithmetic and belong in a plain matrix product.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64
# Outputs of a program. Not fewer than rows: reading x again and again from L2 would cost more than
# the weight.
BLOCK_N = 64
BLOCK_K = 128  # inputs read at a time by the int8 kernel; int4 reads a group at a time
# About four for each of a large GPU's processors: enough loads in flight to fill its memory bus.
PROGRAMS = 512


@triton.jit
def int8_kernel(x_ptr, w_ptr, scale_ptr, y_ptr, M, N, K, SPLITS: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    split, m, k = tl.program_id(1), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows, w_rows = x_ptr + m[:, None] * K, w_ptr + n[:, None].to(tl.int64) * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(split * BLOCK_K, K, SPLITS * BLOCK_K):
        at = (start + k)[None, :]
        x = tl.load(x_rows + at, mask=(m[:, None] < M) & (at < K), other=0)
        w = tl.load(w_rows + at, mask=(n[:, None] < N) & (at < K), other=0)
        acc += tl.dot(x, w.to(x.dtype).T, input_precision="ieee")
    acc *= tl.load(scale_ptr + n, mask=n < N, other=0)[None, :]
    tl.store(y_ptr + (split * M + m[:, None]) * N + n[None, :], acc,
             mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def int4_kernel(x_ptr, w_ptr, scale_ptr, zero_ptr, y_ptr, M, N, K, SPLITS: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr):
    split, m, k = tl.program_id(1), tl.arange(0, BLOCK_M), tl.arange(0, HALF)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    groups = K // (2 * HALF)
    n_rows = n.to(tl.int64)
    x_rows = x_ptr + m[:, None] * K + k[None, :]
    w_rows = w_ptr + n_rows[:, None] * (K // 2) + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for g in range(split, groups, SPLITS):
        first = tl.load(x_rows + 2 * HALF * g, mask=m[:, None] < M, other=0)
        second = tl.load(x_rows + 2 * HALF * g + HALF, mask=m[:, None] < M, other=0)
        w = tl.load(w_rows + HALF * g, mask=n[:, None] < N, other=0)
        low, high = (w & 15).to(tl.int8) - 8, (w >> 4).to(tl.int8) - 8
        scale = tl.load(scale_ptr + n_rows * groups + g, mask=n < N, other=0).to(tl.float32)
        zero = tl.load(zero_ptr + n_rows * groups + g, mask=n < N, other=0).to(tl.float32)
        # Small integers are exact in bfloat16, so scaling the group's sum instead of each weight is
        # more exact, and cheaper.
        part = tl.dot(first, low.to(first.dtype).T, input_precision="ieee")
        part = tl.dot(second, high.to(first.dtype).T, part, input_precision="ieee")
        total = tl.sum(first.to(tl.float32) + second.to(tl.float32), axis=1)
        acc += part * scale[None, :] + total[:, None] * zero[None, :]
    tl.store(y_ptr + (split * M + m[:, None]) * N + n[None, :], acc,
             mask=(m[:, None] < M) & (n[None, :] < N))


def splits(n_out: int, steps: int) -> int:
    """How many programs share the `steps` along the inputs."""
    return max(1, min(steps, PROGRAMS // triton.cdiv(n_out, BLOCK_N)))


def block_rows(rows: int) -> int:
    assert 0 < rows <= MAX_ROWS
    return max(16, triton.next_power_of_2(rows))  # 16 is the least that tl.dot takes


@torch.library.custom_op("judge::int8_parts", mutates_args=())
def int8_parts(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [M, in], weight int8 [out, in], scale float32 [out] -> float32 [splits, M, out].

    The sum over the splits is x @ (weight * scale).T.
    """
    (M, K), N = x.shape, len(weight)
    s = splits(N, triton.cdiv(K, BLOCK_K))
    y = x.new_empty(s, M, N, dtype=torch.float32)
    int8_kernel[(triton.cdiv(N, BLOCK_N), s)](x.contiguous(), weight, scale, y, M, N, K, s,
                                              block_rows(M), BLOCK_N, BLOCK_K, num_warps=4,
                                              num_stages=3)
    return y


@int8_parts.register_fake
def _(x, weight, scale):
    return x.new_empty(splits(len(weight), triton.cdiv(x.shape[1], BLOCK_K)), len(x), len(weight),
                       dtype=torch.float32)


@torch.library.custom_op("judge::int4_parts", mutates_args=())
def int4_parts(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x [M, in], the tensors of linear.Int4Linear -> float32 [splits, M, out].

    The sum over the splits is the product.
    """
    (M, K), (N, groups) = x.shape, scale.shape
    s = splits(N, groups)
    y = x.new_empty(s, M, N, dtype=torch.float32)
    int4_kernel[(triton.cdiv(N, BLOCK_N), s)](x.contiguous(), weight, scale, zero, y, M, N, K, s,
                                              block_rows(M), BLOCK_N, K // groups // 2, num_warps=4,
                                              num_stages=3)
    return y


@int4_parts.register_fake
def _(x, weight, scale, zero):
    return x.new_empty(splits(*scale.shape), len(x), len(weight), dtype=torch.float32)


def int8_matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [M, in] times int8 [out, in] with scales [out], M <= MAX_ROWS -> [M, out] in x's dtype."""
    return int8_parts(x, weight, scale).sum(0).to(x.dtype)


def int4_matmul(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x [M, in] times the tensors of linear.Int4Linear, M <= MAX_ROWS -> [M, out] in x's dtype."""
    return int4_parts(x, weight, scale, zero).sum(0).to(x.dtype)
