"""gpu_kernels/attention.py against float64, compiled on a GPU, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so each check_* runs in a process of its
own, for the test of its name.
"""
import os
import re
import subprocess
import sys
import tempfile
import types

import pytest
import torch

from helpers import ROOT

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BITS16 = torch.float16, torch.bfloat16


def run_check(name, interpret=not GPU):
    pytest.importorskip(
        "triton", reason="neither a GPU nor Triton (pip install triton: its interpreter will do)")
    env = os.environ | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if interpret else {})
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", f"import test_attention as t; t.check_{name}()"],
                          env=env, capture_output=True, text=True)
    if "only 0-dimensional arrays" in done.stderr:
        pytest.skip("this Triton's interpreter does not work with this numpy; Triton 3.6 needs "
                    "numpy below 2.4")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows_and_heads", "edges", "strides", "compiled"])
def test_attention(name):
    run_check(name)


@pytest.mark.slow
def test_reads_each_key_once_and_none_beyond_the_position():
    run_check("loads", interpret=True)


@pytest.mark.long
@pytest.mark.slow
def test_compiled_rounds_with_the_kernel_give_the_eager_tokens():
    run_check("engine", interpret=True)


@pytest.mark.skipif(not GPU, reason="records a CUDA graph")
def test_one_recorded_graph_serves_every_length():
    run_check("recorded")


# ---------------------------------------------------------------- what the checks stand on

def kernels():
    """The kernels' module, for which the interpreter's bfloat16 is put right.

    It keeps bfloat16 as 16-bit integers, which tl.dot multiplies as such, and it cuts float32 off
    where a GPU rounds to nearest.
    """
    from gpu_kernels import attention
    if os.environ.get("TRITON_INTERPRET") and not hasattr(attention, "repaired"):
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
        cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

        def rounding_cast(self, x, to):
            if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
                return cast(self, x, to)
            bits = torch.tensor(x.data).bfloat16().view(torch.uint16)
            return TensorHandle(bits.numpy(), tl.bfloat16)

        def widening_dot(self, a, b, *rest):
            a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
                    for x in (a, b))
            return dot(self, a, b, *rest)

        InterpreterBuilder.cast_impl = rounding_cast
        InterpreterBuilder.create_dot = widening_dot
        attention.repaired = True
    return attention


def case(rows, G, D, keys, dtype, B=1, H=1, length=None):
    """Queries of the last `rows` of `keys` positions, a cache with NaN beyond them, positions."""
    q = 2 * torch.randn(B, rows, H * G, D)
    kv = torch.randn(length or keys + 70, 2, B, H, D)
    kv[keys:] = torch.nan
    return q.to(DEVICE, dtype), kv.to(DEVICE, dtype), torch.arange(keys - rows, keys, device=DEVICE)


def attend(q, kv, pos, splits):
    """The op, its keys split among so many programs."""
    k = kernels()
    (B, S, n_head, D), H = q.shape, kv.shape[3]
    k.PROGRAMS = splits * B * H * -(-S * n_head // H // k.block(D, q.dtype))
    return k.attention(q, kv, pos)


def reference(q, kv, pos, dtype=torch.float64):
    B, S, n_head, D = q.shape
    keys = int(pos[-1]) + 1
    k, v = kv[:keys].to(dtype).permute(1, 2, 3, 0, 4).repeat_interleave(n_head // kv.shape[3], 2)
    score = q.to(dtype).transpose(1, 2) @ k.mT / D ** 0.5
    score.masked_fill_(torch.arange(keys, device=DEVICE) > pos[:, None], -torch.inf)
    return (score.softmax(-1) @ v).transpose(1, 2).reshape(B, S, -1)


def check(q, kv, pos, splits):
    """In 16 bits no element may be further off than a float32 reference that is rounded once.

    But for 1e-5 of the row's largest element, 0.3% of a rounding to bfloat16: what tips a near tie.
    """
    y, want = attend(q, kv, pos, splits), reference(q, kv, pos)
    assert y.dtype == q.dtype and y.shape == want.shape and y.is_contiguous()
    off, allowed = (y.double() - want).abs(), 0
    if q.dtype in BITS16:
        once = reference(q, kv, pos, torch.float32).to(q.dtype)
        allowed = (once.double() - want).abs()
    bound = (1e-5 if q.dtype in BITS16 else 2e-6) * want.abs().amax(-1, keepdim=True)
    assert (off <= allowed + bound).all(), (q.shape, kv.shape, q.dtype, len(pos), int(pos[-1]) + 1,
                                            splits, float(((off - allowed) / bound).max()))
    return y


# ---------------------------------------------------------------- the checks

def check_rows_and_heads():
    """Each number of rows with each G; head_dim, dtype, batch, keys and splits take turns."""
    torch.manual_seed(0)
    for i, rows in enumerate((1, 2, 17, 26, 64)):
        for j, G in enumerate((1, 3, 4, 8, 16)):
            dtype = (*BITS16, torch.float32)[(i + j) % 3]
            B, H = (1, 2) if rows * G < 50 else (1 + (i + j) % 2, 1)
            check(*case(rows, G, (64, 128)[(i + 2 * j) // 2 % 2], 100 + 37 * i + 11 * j, dtype, B,
                        H), splits=1 if rows * G > 70 else 1 + (i + 2 * j) % 4)
    for D in (16, 32, 256):
        check(*case(3, 2, D, 150, torch.bfloat16), splits=2)
    check(*case(26, 3, 128, 500, torch.bfloat16), splits=7)
    q, kv, pos = case(5, 2, 64, 200, torch.float16)
    check(30 * q, kv, pos, splits=3)  # exp2 of scores this large would be infinite
    kernels().PROGRAMS = PROGRAMS = 264  # as on a GPU
    q, kv, pos = case(1, 4, 128, 300, torch.bfloat16, H=8)
    check(q, kv, pos, splits=PROGRAMS // 8)


def check_edges():
    """Keys that end around every edge of a block, a split and the cache, in caches of any length.

    The same bits from each: the positions decide how keys are split, not the cache's length.
    """
    torch.manual_seed(1)
    block = kernels().block(64, torch.float32)
    for splits in (1, 3):
        for keys in {2, *(n * block + e for n in range(1, 7) for e in (-1, 0, 1))}:
            q, kv, pos = case(2, 1, 64, keys, torch.float32, length=keys)
            y, longer = check(q, kv, pos, splits), torch.cat([kv, torch.full_like(kv, torch.nan)])
            assert torch.equal(y, attend(q, longer, pos, splits))
    block = kernels().block(64, torch.bfloat16)
    for keys in (17, *(n * block + e for n in (1, 2, 3) for e in (-1, 0, 1, 16))):
        check(*case(17, 1, 64, keys, torch.bfloat16), splits=2)
    for keys in (1, block - 1, block, block + 1):
        check(*case(1, 1, 64, keys, torch.bfloat16, length=keys), splits=4)


def check_strides():
    """Queries cut out of other tensors, and a cache of more than 2 ** 31 elements."""
    torch.manual_seed(2)
    q, kv, pos = case(3, 2, 64, 140, torch.float16, B=2, H=2)
    want = attend(q, kv, pos, 3)
    views = (torch.cat([q, q], 1)[:, :3], torch.cat([q, q], 2)[:, :, :4],
             q.transpose(1, 2).contiguous().transpose(1, 2), q.mT.contiguous().mT)
    for view in views:
        assert not view.is_contiguous() and torch.equal(attend(view, kv, pos, 3), want)
    assert torch.equal(attend(q, torch.cat([kv] * 2, 3)[:, :, :, :2], pos, 3), want)

    step = 1 << 24  # elements from a position to the next: a sparse file, few of its pages used
    q, kv, pos = case(2, 2, 64, 140, torch.float16, length=140)
    with tempfile.NamedTemporaryFile() as f:
        huge = (torch.empty(140 * step, dtype=q.dtype, device=DEVICE) if GPU else
                torch.from_file(f.name, shared=True, size=140 * step, dtype=q.dtype))
        huge = huge.as_strided(kv.shape, (step, 64, 64, 64, 1)).copy_(kv)
        for splits in (1, 3):
            assert torch.equal(attend(q, huge, pos, splits), attend(q, kv, pos, splits))


def layer(qkv, kv, pos):
    """What a layer does around the op: writes its keys and values, then attends to them."""
    q, k, v = qkv.split([4, 2, 2], 2)
    kv.index_copy_(0, pos, torch.stack((k, v)).permute(2, 0, 1, 3, 4))
    return kernels().attention(2 * q, kv, pos) + 1


def check_compiled():
    """Without a graph break, and with the cache written in place."""
    torch.manual_seed(3)
    kernels().PROGRAMS = 4
    q, kv, pos = case(3, 2, 64, 70, torch.float32, H=2)
    torch.library.opcheck(kernels().attention, (q, kv, pos))
    qkv = torch.randn(1, 3, 8, 64, device=DEVICE)
    for backend in ("eager", "aot_eager"):
        caches = kv.clone(), kv.clone()
        step = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend)
        with torch.inference_mode():
            assert torch.equal(step(qkv, caches[0], pos), layer(qkv, caches[1], pos))
        assert torch.equal(caches[0][:70], caches[1][:70])
        assert not torch.equal(caches[0][:70], kv[:70])
    step = torch.compile(layer, fullgraph=True, dynamic=False, backend="eager")
    y = step(qkv.to("meta", torch.bfloat16), kv.to("meta", torch.bfloat16), pos.to("meta"))
    assert y.shape == (1, 3, 4 * 64) and y.dtype == torch.bfloat16


def check_loads():
    """Each row block reads every key and value that exists once, and splits without any do nothing.
    """
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    read, written = [], []

    def recording_load(self, ptrs, mask, *rest, **options):
        read.append(ptrs.data[mask.data])
        return load(self, ptrs, mask, *rest, **options)

    def counting_store(self, ptrs, value, mask, *rest):
        written.append(int(mask.data.sum()))
        return store(self, ptrs, value, mask, *rest)

    InterpreterBuilder.create_masked_load = recording_load
    InterpreterBuilder.create_masked_store = counting_store
    for rows, G, keys, splits in ((1, 4, 1, 3), (1, 4, 63, 3), (2, 3, 64, 2), (2, 3, 65, 2),
                                  (26, 3, 129, 1), (22, 3, 200, 3), (1, 1, 300, 10)):
        q, kv, pos = case(rows, G, 64, keys, torch.float16, H=2, length=1000)
        read.clear(), written.clear()
        attend(q, kv, pos, splits)
        at = np.concatenate([a.ravel() for a in read]).astype(np.int64) - kv.data_ptr()
        at, times = np.unique(at[(at >= 0) & (at < kv.nbytes)], return_counts=True)
        assert np.array_equal(at, 2 * np.arange(kv[:keys].numel())), (rows, keys, splits)
        assert (times == -(-rows * G // 64)).all(), (rows, keys, splits, times)
        blocks = -(-keys // 64)  # of keys; the splits with any share them as evenly as they can
        used = -(-blocks // -(-blocks // splits))
        parts = used * (64 + 2) if splits > 1 else 0
        assert sum(written) == rows * G * 2 * (parts + 64), (rows, keys, splits)


def check_recorded():
    q, kv, pos = case(26, 8, 128, 5000, torch.bfloat16, H=8, length=5000)
    call, graph = lambda: kernels().attention(q, kv, pos), torch.cuda.CUDAGraph()
    call()  # compiles the kernels
    with torch.cuda.graph(graph):
        y = call()
    for keys in (26, 64, 65, 1000, 5000):
        pos.copy_(torch.arange(keys - 26, keys))
        graph.replay()
        assert torch.equal(y, call()), keys


def check_engine():
    """Rounds and prompts compiled by blocks with the kernel: the tokens of eager ones without."""
    import graphs
    from drafters.llama import LlamaDrafter
    from engine import Engine, generate
    from helpers import random_model, tiny_config
    graphs.no_kernel, graphs.WHOLE = lambda model: None, 0
    compile = torch.compile
    torch.compile = lambda f, options, **more: compile(f, backend="aot_eager", **more)
    config = tiny_config(head_dim=16)
    target, draft = random_model(config, seed=1), random_model(config, seed=1)
    for p in draft.parameters():  # agrees with the target on some tokens, not on others
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        p.data += 0.05 * p.data.std() * noise
    eager, fast = (Engine(target, LlamaDrafter(draft), speculate_k=2) for _ in range(2))
    graphs.compile_engine(fast)
    assert fast.target.kernel_rows == fast.drafter.model.kernel_rows == 64
    kernels().PROGRAMS = 8  # the interpreter runs one after the other
    for prompt in (list(range(5, 15)), list(range(3, 80))):  # above 64 rows by PyTorch's attention
        want, got = generate(eager, prompt, 6), generate(fast, prompt, 6)
        assert (got.tokens, got.accept_counts) == (want.tokens, want.accept_counts)


# ---------------------------------------------------------------- where it cannot run

@pytest.mark.parametrize("capability,shared_kb,head_dim,dtype,reason", [
    ((9, 0), 227, 128, torch.bfloat16, None),
    ((8, 9), 99, 128, torch.bfloat16, None),
    ((8, 9), 99, 64, torch.float32, None),
    ((7, 5), 64, 128, torch.bfloat16, "capability 8.0 or better, this one has 7.5"),
    ((8, 0), 64, 128, torch.bfloat16, "needs 97 KB .* head_dim of 128 in torch.bfloat16.* has 64"),
    ((9, 0), 227, 96, torch.bfloat16, "a power of two from 16, not 96"),
    ((9, 0), 227, 8, torch.bfloat16, "a power of two from 16, not 8"),
])
def test_says_why_it_cannot_run(monkeypatch, capability, shared_kb, head_dim, dtype, reason):
    pytest.importorskip("triton")
    unavailable = kernels().unavailable
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(
        shared_memory_per_block_optin=shared_kb * 1024))
    said = unavailable("cuda", head_dim, dtype)
    assert said is None if reason is None else re.search(reason, said), said
    assert "needs a CUDA device, not cpu" in unavailable("cpu", head_dim, dtype)
