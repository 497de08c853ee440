"""Triton kernels for a few rows times a quantized weight, as in drafting and verifying on a GPU.

A weight crosses the memory bus once, as bytes, however many rows there are, and is widened in
registers:

    bytes_kernel     int8 and fp8, up to MAX_ROWS rows
    int4_kernel      int4, up to MAX_ROWS rows, group by group
    int4_row_kernel  int4, one row: a GEMV without tensor cores

Rows are of 16 bits; tensor cores take no float32. The first two kernels read all rows in one tile.
Where the outputs alone would leave processors idle, the inputs are split among programs too: they
give float32 [splits, rows, out], whose sum is the product, and a compiled model adds them up where
it reads them. More rows are bound by arithmetic and belong in a plain matrix product.

Instructions count as much as bytes: at full speed an H200 reads 19 bytes per clock and processor,
which issues 128 instructions of a thread meanwhile. Compiled for it (Triton 3.6), a weight takes
bytes_kernel 4.6 instructions, 68% of what can be issued, so that memory is the bound. In int4, two
weights a byte in groups of 128, it takes int4_kernel 6 to 9 and int4_row_kernel 4.7, which bounds
the latter at 72% of the bandwidth before any stall. A GEMV of int8 takes 5.1 and would gain nothing
on bytes_kernel.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64
MAX_SPLITS = 4  # Inductor unrolls a sum of fewer than 8; of more it makes a kernel of its own


@triton.jit
def bytes_kernel(x_ptr, w_ptr, scale_ptr, y_ptr, M, N, K, SPLITS: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    split, m, k = tl.program_id(1), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows, w_rows = x_ptr + m[:, None] * K, w_ptr + n[:, None].to(tl.int64) * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(split * BLOCK_K, K, SPLITS * BLOCK_K):
        at = (start + k)[None, :]
        x = tl.load(x_rows + at, mask=(m[:, None] < M) & (at < K), other=0)
        w = tl.load(w_rows + at, mask=(n[:, None] < N) & (at < K), other=0.0)
        if w.dtype == tl.float8e4nv:  # straight to bfloat16 takes a slow instruction a weight
            w = w.to(tl.float16).to(tl.float32)
        acc = tl.dot(x, w.to(x.dtype).T, acc)
    acc *= tl.load(scale_ptr + n, mask=n < N, other=0)[None, :]
    tl.store(y_ptr + (split * M + m[:, None]) * N + n[None, :], acc,
             mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def int4_kernel(x_ptr, w_ptr, scale_ptr, zero_ptr, sums_ptr, y_ptr, M, N, K, SPLITS: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr):
    """scale, zero [groups, out], so that a block's are side by side; sums [M, groups], of x."""
    split, m, k = tl.program_id(1), tl.arange(0, BLOCK_M), tl.arange(0, HALF)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    BFLOAT16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    OFFSET: tl.constexpr = 128 if BFLOAT16 else 1024
    BITS: tl.constexpr = 0x4300 if BFLOAT16 else 0x6400  # of OFFSET, as bfloat16 or float16
    groups = K // (2 * HALF)
    x_rows = x_ptr + m[:, None] * K + k[None, :]
    w_rows = w_ptr + n[:, None].to(tl.int64) * (groups * HALF) + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for g in range(split, groups, SPLITS):
        first = tl.load(x_rows + 2 * HALF * g, mask=m[:, None] < M, other=0)
        second = tl.load(x_rows + 2 * HALF * g + HALF, mask=m[:, None] < M, other=0)
        w = tl.load(w_rows + HALF * g, mask=n[:, None] < N, other=0)
        scale = tl.load(scale_ptr + g * N + n, mask=n < N, other=0).to(tl.float32)
        zero = tl.load(zero_ptr + g * N + n, mask=n < N, other=0).to(tl.float32)
        sums = tl.load(sums_ptr + m * groups + g, mask=m < M, other=0)
        # Small integers are exact in 16 bits, so scaling the group's sum instead of each weight is
        # more exact, and cheaper. OFFSET + q takes no conversion: q is the last bits of OFFSET.
        low = (w.to(tl.int16) & 15 | BITS).to(first.dtype, bitcast=True)
        high = (w.to(tl.int16) >> 4 | BITS).to(first.dtype, bitcast=True)
        part = tl.dot(second, high.T, tl.dot(first, low.T))
        acc += part * scale[None, :] + sums[:, None] * (zero - (8 + OFFSET) * scale)[None, :]
    tl.store(y_ptr + (split * M + m[:, None]) * N + n[None, :], acc,
             mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def int4_row_kernel(x_ptr, w_ptr, scale_ptr, zero_ptr, y_ptr, N, K, TWO_23, DTYPE: tl.constexpr,
                    HALF: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr):
    """x int64 [K / 4], four DTYPE each; w int32 [N, K / 8]; scale, zero [N, groups].

    A thread takes two words of BLOCK_N outputs at a time, as many as of x it loads at once. The
    tile begins with the threads, so that neighbours read what is side by side.
    TWO_23: the bits of 2 ** 23 as a float32. An argument, as a second constant would cost each
    weight an instruction.
    """
    n, t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, THREADS)
    pairs, rows = K // 16, n[None, :].to(tl.int64)
    acc = tl.zeros((THREADS, BLOCK_N), tl.float32)
    for start in range(0, pairs, THREADS):
        pair = start + t
        there = (pair < pairs)[:, None]
        ok = there & (n < N)[None, :]
        word, group = pair[:, None] * 2 + tl.arange(0, 2)[None, :], pair // (HALF // 8)
        w = tl.load(w_ptr + (rows * (pairs * 2))[:, :, None] + word[:, None, :],
                    mask=ok[:, :, None], other=0)
        part = tl.zeros((THREADS, BLOCK_N, 2), tl.float32)
        total, extra = tl.zeros((THREADS, 2), tl.float32), tl.zeros((THREADS, 2), tl.float32)
        for high in tl.static_range(2):
            four = tl.load(x_ptr + word + (group * (HALF // 4))[:, None] + high * (HALF // 4),
                           mask=there, other=0)
            # Half a byte, moved to these bits of a float32 between 2 ** 23 and 2 ** 24, is q times
            # `place` more than 2 ** 23. Dividing x by a power of two is exact; what is too much
            # goes once for all weights of the words. It costs float32 11 of its 24 bits at most.
            place = 4096 if high else 65536
            for byte in tl.static_range(4):
                x = (four >> 16 * byte).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
                total += x
                extra += x * (8388608 / place + 8)
                down = 8 * (byte + high - 2)
                q = (w >> down if down > 0 else w << -down) & (15 * place) | TWO_23
                part += q.to(tl.float32, bitcast=True) * (x * (1 / place))[:, None, :]
        param = rows * (K // (2 * HALF)) + group[:, None]
        scale = tl.load(scale_ptr + param, mask=ok, other=0).to(tl.float32)
        zero = tl.load(zero_ptr + param, mask=ok, other=0).to(tl.float32)
        acc += (tl.sum(part, axis=2) - tl.sum(extra, axis=1)[:, None]) * scale
        acc += tl.sum(total, axis=1)[:, None] * zero
    tl.store(y_ptr + n, tl.sum(acc, axis=0), mask=n < N)


class Settings(NamedTuple):
    """A launch of bytes_kernel or int4_kernel: the tile of a program, and how many share a product.
    """
    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    splits: int


# Outputs and inputs of a tile, warps, stages and the programs aimed at, by its rows. 16 and 32 are
# what a sweep on an H200 found best for 8B's shapes at one row and 70B's at 26. 64 is reasoned: a
# warpgroup's product takes the widened weight from shared memory, one step after another. 64
# outputs at 4 warps leave room for 8 warps a processor, too few to hide that (measured: 1.6 TB/s);
# these make it 16, and read x from the L2 cache half as often.
TILES = {16: (64, 128, 4, 3, 512), 32: (128, 256, 4, 3, 256), 64: (128, 128, 8, 3, 256)}


def shared_bytes(s: Settings, int4=False) -> int:
    """Bytes of shared memory that a launch takes, at most."""
    weights = s.outputs * s.inputs
    widened = 2 * weights + 4 * s.rows * s.outputs if s.rows == 64 else 0
    return s.stages * (2 * s.rows * s.inputs + weights // (1 + int4)) + widened


def settings(rows: int, n_out: int, limit: int, group: int | None = None) -> Settings:
    """For a product of `rows` rows on a card with `limit` bytes of shared memory a program.

    group: of int4, whose groups are a tile's inputs.
    """
    assert 0 < rows <= MAX_ROWS
    block = 16 if rows <= 16 else 32 if rows <= 32 else 64  # 16 is the least that tl.dot takes
    outputs, inputs, warps, stages, programs = TILES[block]
    # Narrower where too few programs would be left: two for each of a large GPU's processors.
    while outputs > (32 if block == 16 else 64) and triton.cdiv(n_out, outputs) * MAX_SPLITS < 256:
        outputs //= 2
    s = Settings(block, outputs, group or inputs, warps, stages, 1)
    while shared_bytes(s, bool(group)) > limit and s.stages > 1:
        if s.stages == 2 and s.inputs > 64 and not group:
            s = s._replace(inputs=s.inputs // 2)
        elif s.stages == 2 and s.outputs > 64:
            s = s._replace(outputs=s.outputs // 2)
        else:
            s = s._replace(stages=s.stages - 1)
    splits = min(MAX_SPLITS, programs // triton.cdiv(n_out, s.outputs))
    return s._replace(splits=max(1, splits))


def chosen(x: Tensor, n_out: int, group: int | None = None) -> Settings:
    """`settings` for x on its card; the interpreter has no limit."""
    limit = 1 << 30
    if x.is_cuda:
        limit = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    return settings(x.shape[0], n_out, limit, group)  # not len(), which fixes a dynamic shape


@torch.library.custom_op("judge::bytes_parts", mutates_args=())
def bytes_parts(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [M, in], weight int8 or float8_e4m3fn [out, in], scale float32 [out]
    -> float32 [splits, M, out].

    The sum over the splits is x @ (weight * scale).T.
    """
    (M, K), N, s = x.shape, len(weight), chosen(x, len(weight))
    y = x.new_empty(s.splits, M, N, dtype=torch.float32)
    bytes_kernel[(triton.cdiv(N, s.outputs), s.splits)](
        x.contiguous(), weight, scale, y, M, N, K, s.splits, s.rows, s.outputs, s.inputs,
        num_warps=s.warps, num_stages=s.stages)
    return y


@bytes_parts.register_fake
def _(x, weight, scale):
    return x.new_empty(chosen(x, len(weight)).splits, x.shape[0], len(weight), dtype=torch.float32)


@torch.library.custom_op("judge::int4_parts", mutates_args=())
def int4_parts(x: Tensor, sums: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x [M, in], its groups' sums float32 [M, groups], weight uint8 [out, in / 2], scale and zero
    [groups, out] -> float32 [splits, M, out].

    The sum over the splits is the product.
    """
    (M, K), (groups, N) = x.shape, scale.shape
    s = chosen(x, N, K // groups)
    y = x.new_empty(s.splits, M, N, dtype=torch.float32)
    int4_kernel[(triton.cdiv(N, s.outputs), s.splits)](
        x.contiguous(), weight, scale, zero, sums, y, M, N, K, s.splits, s.rows, s.outputs,
        s.inputs // 2, num_warps=s.warps, num_stages=s.stages)
    return y


@int4_parts.register_fake
def _(x, sums, weight, scale, zero):
    s = chosen(x, len(weight), x.shape[1] // len(scale))
    return x.new_empty(s.splits, x.shape[0], len(weight), dtype=torch.float32)


def row_outputs(n_out: int) -> int:
    """Outputs of a program of int4_row_kernel, which share what is done to x: 8 make four programs
    for each of a large GPU's processors of 4096.
    """
    return 8 if n_out >= 4096 else 4 if n_out >= 2048 else 2


@torch.library.custom_op("judge::int4_row", mutates_args=())
def int4_row(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x [1, in], the tensors of linear.Int4Linear -> [1, out] in x's dtype."""
    K, (N, groups) = x.shape[1], scale.shape
    outputs = row_outputs(N)
    threads = min(128, triton.next_power_of_2(K // 16))
    y = x.new_empty(1, N)
    int4_row_kernel[(triton.cdiv(N, outputs),)](
        x.contiguous().view(torch.int64), weight.view(torch.int32), scale, zero, y, N, K,
        0x4B000000, tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16, K // groups // 2,
        outputs, threads, num_warps=max(1, threads // 32))
    return y


@int4_row.register_fake
def _(x, weight, scale, zero):
    return x.new_empty(1, len(weight))


def bytes_matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [M, in] times int8 or fp8 [out, in] with scales [out], M <= MAX_ROWS -> [M, out] in x's
    dtype.
    """
    return bytes_parts(x, weight, scale).sum(0).to(x.dtype)


def int4_matmul(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, by_group: Tensor) -> Tensor:
    """x [M, in] times the tensors of linear.Int4Linear, M <= MAX_ROWS -> [M, out] in x's dtype.

    by_group [2, groups, out]: scale and zero, transposed.
    """
    if len(x) == 1:
        return int4_row(x, weight, scale, zero)
    sums = x.unflatten(1, (scale.shape[1], -1)).sum(2, dtype=torch.float32)
    return int4_parts(x, sums, weight, *by_group).sum(0).to(x.dtype)
