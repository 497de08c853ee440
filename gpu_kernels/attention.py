"""Attention of a verification pass as Triton kernels: a few rows against a long cache.

The keys are split among programs (split-KV, as in Flash-Decoding), so that even one row keeps a
whole GPU reading, and the G query heads that share a KV head are packed with the S rows into one
tile, so that a key is read once for all of them. The position is read on the device: only the keys
that exist are read, however long the cache, and one recorded graph serves every length. A second
kernel adds up what the splits found, always in the same order.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

# Two for each of an H100's 132 processors: one computes while the other waits for its keys.
PROGRAMS = 264
# A tile of rows, keys or values is 128 bytes of positions (64 in bfloat16) and at most TILE_BYTES.
# 64 rows are the least that Hopper's wgmma takes; 208 rows (26 of 8 heads) fill 81% of 4 such
# tiles. Blocks of 64 keys make 4 splits of 256 positions, each of one step. Of three stages one is
# computed while the next comes: 2 x 32 KB a processor, twice what hides the memory's latency. That
# takes 112 KB with wgmma, so that two programs fit an H100's 228, and 90 KB without, of 99 on
# consumer GPUs.
POSITION_BYTES, TILE_BYTES, STAGES, WARPS = 128, 16384, 3, 4
CHUNK = 16  # splits added up at a time by the second kernel
LEAST = tl.constexpr(-1e38)  # instead of -inf for the maximum of no keys: -inf - -inf is NaN


@triton.jit
def spans(pos_ptr, S, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first row's position, how many keys there are, and how many of them a split reads."""
    first = tl.load(pos_ptr).to(tl.int32)
    return first, first + S, tl.cdiv(tl.cdiv(first + S, BLOCK_N), SPLITS) * BLOCK_N


@triton.jit
def split_kernel(q_ptr, kv_ptr, pos_ptr, y_ptr, top_ptr, total_ptr, S, scale, q_b, q_s, q_h,
                 kv_n, kv_v, kv_b, kv_h, B, H, G: tl.constexpr, D: tl.constexpr,
                 SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y [SPLITS, B, S, H * G, D] of a split's keys, with the maximum and the sum of its softmax."""
    split, b, h = tl.program_id(1), tl.program_id(2) // H, tl.program_id(2) % H
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    s, head, n, d = row // G, h * G + row % G, tl.arange(0, BLOCK_N), tl.arange(0, D)
    real = s[:, None] < S
    q = tl.load(q_ptr + b * q_b + s[:, None] * q_s + head[:, None] * q_h + d[None, :], mask=real,
                other=0)
    first, keys, each = spans(pos_ptr, S, SPLITS, BLOCK_N)
    if split * each >= keys:  # after q is loaded: its latency and the position's are one
        return
    top = tl.full((BLOCK_M,), LEAST, tl.float32)
    total, y = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, D), tl.float32)
    # 64 bits: a million positions of 8 heads of 128 are 2 ** 31 elements.
    start = split * each
    block = kv_ptr + start.to(tl.int64) * kv_n + b * kv_b + h * kv_h
    inside = n[:, None] * kv_n + d[None, :]
    for key in range(start, tl.minimum(start + each, keys), BLOCK_N):
        exists = key + n < keys
        k = tl.load(block + inside, mask=exists[:, None], other=0)
        v = tl.load(block + kv_v + inside, mask=exists[:, None], other=0)
        block += BLOCK_N * kv_n
        score = tl.dot(q, k.T, input_precision="ieee")
        score = tl.where((key + n)[None, :] <= first + s[:, None], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1) * scale)
        p, keep = tl.exp2(score * scale - higher[:, None]), tl.exp2(top - higher)
        total, top = total * keep + tl.sum(p, 1), higher
        rounded = p.to(v.dtype)
        y = tl.dot(rounded, v, y * keep[:, None], input_precision="ieee")
        if v.dtype != tl.float32:  # what rounding p took: y is then as exact as in float32
            y = tl.dot((p - rounded.to(tl.float32)).to(v.dtype), v, y)
    if SPLITS == 1:
        y /= total[:, None]
    at = ((split * B + b) * S + s) * (H * G) + head
    tl.store(y_ptr + at[:, None] * D + d[None, :], y.to(y_ptr.dtype.element_ty), mask=real)
    if SPLITS > 1:
        tl.store(top_ptr + at, top, mask=s < S)
        tl.store(total_ptr + at, total, mask=s < S)


@triton.jit
def combine_kernel(parts_ptr, top_ptr, total_ptr, pos_ptr, y_ptr, S, D: tl.constexpr,
                   SPLITS: tl.constexpr, MOST: tl.constexpr, CHUNK: tl.constexpr,
                   BLOCK_N: tl.constexpr):
    row, rows, d = tl.program_id(0), tl.num_programs(0), tl.arange(0, D)
    first, keys, each = spans(pos_ptr, S, SPLITS, BLOCK_N)
    used, every = tl.cdiv(keys, each), tl.arange(0, MOST)
    top = tl.max(tl.load(top_ptr + every * rows + row, mask=every < used, other=LEAST))
    total, y = 0.0, tl.zeros((D,), tl.float32)
    for start in range(0, used, CHUNK):
        split = start + tl.arange(0, CHUNK)
        at, there = split * rows + row, split < used
        weight = tl.exp2(tl.load(top_ptr + at, mask=there, other=LEAST) - top)
        total += tl.sum(weight * tl.load(total_ptr + at, mask=there, other=0))
        part = tl.load(parts_ptr + at[:, None] * D + d[None, :], mask=there[:, None], other=0)
        y += tl.sum(weight[:, None] * part, 0)
    tl.store(y_ptr + row * D + d, (y / total).to(y_ptr.dtype.element_ty))


def block(head_dim: int, dtype: torch.dtype) -> int:
    """Positions of a full tile, rows or keys; 16 is the least that tl.dot takes."""
    return max(16, min(POSITION_BYTES, TILE_BYTES // head_dim) // dtype.itemsize)


def unavailable(device, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run there, in words; None where they can."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return f"Triton attention needs a CUDA device, not {device}"
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"Triton attention needs a head_dim that is a power of two from 16, not {head_dim}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return ("Triton attention needs a GPU of compute capability 8.0 or better, this one has "
                f"{major}.{minor}")
    n = block(head_dim, dtype)
    # Keys and values of each stage, of which one is in registers where there is no wgmma or its
    # like; queries; scores that change from one layout to another; sums across warps.
    tiles = 2 * (STAGES if major in (9, 10) else STAGES - 1) + 1
    need = tiles * n * head_dim * dtype.itemsize + 4 * n * n + 1024
    has = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if need > has:
        return (f"Triton attention needs {-(-need // 1024)} KB of shared memory a block for a "
                f"head_dim of {head_dim} in {dtype}, this GPU has {has // 1024}")


@torch.library.custom_op("judge::attention", mutates_args=())
def attention(q: Tensor, kv: Tensor, pos: Tensor) -> Tensor:
    """Causal attention of rows that stand in the cache already -> [B, S, n_head * head_dim].

    q [B, S, n_head, head_dim] and kv [length, 2, B, n_kv_head, head_dim], both of one dtype. Row i
    attends to positions 0 to pos[i]; pos is int64 [S], consecutive, on the device. What the cache
    holds beyond the last of them is never read.
    """
    (B, S, n_head, D), H = q.shape, kv.shape[3]
    q, G, tile = (q if q.stride(3) == 1 else q.contiguous()), n_head // H, block(D, q.dtype)
    block_m = max(16, min(tile, triton.next_power_of_2(S * G)))
    blocks = triton.cdiv(S * G, block_m)
    splits = max(1, PROGRAMS // (blocks * B * H))  # from shapes alone: a recorded grid is fixed
    y = parts = q.new_empty(B, S, n_head * D)
    top = total = y  # not used by one split
    if splits > 1:
        parts = q.new_empty(splits, B, S, n_head, D, dtype=torch.float32)
        top, total = q.new_empty(2, splits, B, S, n_head, dtype=torch.float32)
    split_kernel[(blocks, splits, B * H)](
        q, kv, pos, parts, top, total, S, D ** -0.5 * 1.4426950408889634, *q.stride()[:3],
        *kv.stride()[:4], B, H, G, D, splits, block_m, tile, num_warps=WARPS, num_stages=STAGES)
    if splits > 1:
        combine_kernel[(B * S * n_head,)](
            parts, top, total, pos, y, S, D, splits, triton.next_power_of_2(splits), CHUNK, tile,
            num_warps=WARPS)
    return y


@attention.register_fake
def _(q, kv, pos):
    B, S, n_head, D = q.shape
    return q.new_empty(B, S, n_head * D)
