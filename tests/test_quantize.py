"""linear.py, gpu_kernels and quantize.py: each mode against float64, and quantized checkpoints
wherever a plain one goes.
"""
import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE

import checkpoint
import linear
import quantize
from checkpoint import config_from, fingerprint, load, read_config, shapes
from common import UserError
from drafters.llama import LlamaDrafter
from engine import Engine, generate
from helpers import (
    LINUX,
    ROOT,
    edit_json,
    edit_weights,
    peak_memory,
    put,
    random_model,
    run_command,
    save_checkpoint,
    shard,
    tiny_config,
)
from judge import JudgeHead
from linear import MODES, Fp8Linear, Int4Linear, Int8Linear, Quantization

LAYERS = {"int8": (Int8Linear, None), **{f"int4 {g}": (Int4Linear, g) for g in linear.GROUP_SIZES},
          "fp8": (Fp8Linear, None)}
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # of an error relative to the whole product
# multiples of 16 for fp8, 64 for int4
CONFIG = tiny_config(hidden_size=128, intermediate_size=192, head_dim=32, vocab_size=112)


def layer_of(name, n_in, n_out, bias=False, device="cpu"):
    """A layer with random weights, quantized, and the weight it was made from."""
    kind, group_size = LAYERS[name]
    layer = kind(n_in, n_out, bias, group_size)
    weight = torch.randn(n_out, n_in) * torch.rand(n_out, 1)
    layer.load_state_dict(layer.quantize(weight) | ({"bias": torch.randn(n_out)} if bias else {}))
    return layer.to(device).requires_grad_(False), weight


def dense(layer):
    """W in float64, from the tensors' definition alone."""
    w, scale = layer.weight.cpu(), layer.scale.cpu().double()
    if not isinstance(layer, Int4Linear):
        return w.double() * scale[:, None]
    group = w.shape[1] * 2 // scale.shape[1]
    columns = [(c // group, c % group) for c in range(w.shape[1] * 2)]
    byte = w[:, [g * group // 2 + i % (group // 2) for g, i in columns]]
    low = torch.tensor([i < group // 2 for _, i in columns])
    q = torch.where(low, byte % 16, byte // 16).double()
    scale, zero = (t.repeat_interleave(group, 1) for t in (scale, layer.zero.cpu().double()))
    return (q - 8) * scale + zero


def error(got, want):
    return float((got.cpu().double() - want).norm() / want.norm())


# ---------------------------------------------------------------- layers

@pytest.mark.parametrize("name,bound", [("int8", 0.01), ("int4 32", 0.09), ("int4 64", 0.1),
                                        ("int4 128", 0.11), ("int4 256", 0.12), ("fp8", 0.03)])
def test_rounding_error_of_a_normal_weight(name, bound):
    torch.manual_seed(0)
    layer, weight = layer_of(name, 512, 64)
    assert bound / 3 < error(dense(layer), weight.double()) < bound
    if name == "int4 32":
        # the layout in the docstring
        assert torch.equal(layer.unpack().flatten(1)[:, 16], layer.weight[:, 0] >> 4)


def skip_without_fp8(mode, device="cpu"):
    if mode == "fp8" and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9 or better")
    if mode == "fp8" and device == "cpu" and not linear.scales_rows("cpu"):
        pytest.skip("this PyTorch does not imitate fp8 with a scale for each row on a CPU; 2.13 "
                    "does")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("name", LAYERS)
def test_product_against_float64(name, dtype, device):
    skip_without_fp8(name, device)
    for n_in, n_out, bias in ((512, 192, True), (256, 101 if name == "int8" else 48, False)):
        torch.manual_seed(1)
        layer, _ = layer_of(name, n_in, n_out, bias, device)
        W, b = dense(layer), layer.bias.cpu().to(dtype).double() if bias else 0
        if bias:
            layer.bias.data = layer.bias.to(dtype)
        layer.prepare(dtype)
        for rows in (1, 17, 26, 64, 65):
            x = torch.randn(1, rows, n_in).to(dtype)
            read = x.double()
            # fp8 rounds activations too: that part of the error is the mode's, not the product's
            rounds = name == "fp8" and (device == "cpu" or rows > linear.FEW)
            if rounds:
                r = layer.quantize(x[0])
                read = (r["weight"].double() * r["scale"].double()[:, None])[None]
            y = layer(x.to(device))
            assert y.shape == (1, rows, n_out) and y.dtype == dtype
            bound = BOUND[torch.bfloat16 if rounds else dtype]
            assert error(y, read @ W.T + b) < bound, (n_in, n_out, rows)


@pytest.mark.parametrize("name", ["int8", "int4 32"])
@pytest.mark.parametrize("n_in", [32, 96, 160, 72, 100])
def test_widths_that_a_kernel_might_not_take(name, n_in):
    if name != "int8" and n_in % 32:
        with pytest.raises(UserError, match=f"group size 32 does not divide the {n_in} inputs"):
            layer_of(name, n_in, 24)
        return
    for n_out in (24, 33):
        layer, _ = layer_of(name, n_in, n_out)
        W, x = dense(layer), torch.randn(3, n_in).bfloat16()
        layer.prepare(torch.bfloat16)
        assert error(layer(x), x.double() @ W.T) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_weight_that_is_widened_in_blocks(monkeypatch, compiled):
    monkeypatch.setattr(linear, "BLOCK", 1000)
    for dtype, bound in BOUND.items():
        layer, _ = layer_of("int8", 96, 101)
        run = torch.compile(layer, fullgraph=True, dynamic=False) if compiled else layer
        x = torch.randn(26, 96).to(dtype)
        assert error(run(x), x.double() @ dense(layer).T) < bound


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_zeros_and_of_one_value(name):
    skip_without_fp8(name)
    layer, _ = layer_of(name, 256, 16)
    weight = torch.cat((torch.zeros(8, 256), torch.full((8, 256), 0.5)))
    layer.load_state_dict(layer.quantize(weight))
    assert error(dense(layer), weight.double()) < 1e-6
    assert layer(torch.zeros(2, 256)).abs().max() == 0


@pytest.mark.parametrize("name", ["int8", "int4 32", "fp8"])
def test_tensors_can_be_sliced_along_both_dimensions(name):
    """As tensor parallelism does: rows of every tensor, or columns at multiples of the group size.
    """
    layer, _ = layer_of(name, 128, 32)
    W, tensors = dense(layer), layer.state_dict()
    rows, _ = layer_of(name, 128, 16)
    rows.load_state_dict({k: t[16:] for k, t in tensors.items()})
    assert torch.equal(dense(rows), W[16:])
    columns, _ = layer_of(name, 64, 32)
    columns.load_state_dict({k: t if t.dim() == 1 else t[:, t.shape[1] // 2:]
                             for k, t in tensors.items()})
    assert torch.equal(dense(columns), W[:, 64:])


INTERPRETER = """
import torch
from test_quantize import BOUND, dense, error, layer_of
from gpu_kernels import quantized_matmul as Q

gpu = torch.cuda.is_available()
bounds = {torch.bfloat16: BOUND[torch.bfloat16]} if gpu else {torch.float16: 1e-3}
# No tl.dot is in the kernel for one row; the interpreter cuts bits off where a GPU rounds.
one_row = bounds | {torch.bfloat16: BOUND[torch.bfloat16] if gpu else 1e-2}
shapes = {"int8": ((72, 101), (520, 40), (1040, 33)), "fp8": ((80, 112), (1040, 48)),
          "int4 32": ((128, 72), (640, 40), (2592, 9)), "int4 128": ((128, 72), (640, 40)),
          "int4 256": ((256, 33), (2560, 9))}
if gpu and torch.cuda.get_device_capability() < (8, 9):
    del shapes["fp8"]
for name in shapes:
    for n_in, n_out in shapes[name]:
        layer, _ = layer_of(name, n_in, n_out, device="cuda" if gpu else "cpu")
        W, tensors, int4 = dense(layer).T, [*layer.buffers()], "int4" in name
        if int4:
            tensors.append(torch.stack((layer.scale.T, layer.zero.T)))
            Q.row_outputs = lambda _, outputs={72: 2, 40: 4}.get(n_out, 8): outputs
        for rows in (1, 2, 16, 17, 26, 33, 64):
            for dtype, bound in (one_row if rows == 1 and int4 else bounds).items():
                x = torch.randn(rows, n_in).to(dtype)
                want, x = x.double() @ W, x.to(layer.weight.device)
                y = (Q.int4_matmul if int4 else Q.bytes_matmul)(x, *tensors)
                where = name, dtype, n_in, n_out, rows
                assert y.dtype == dtype and y.shape == (rows, n_out), where
                assert error(y, want) < bound, (where, error(y, want))
                if int4:
                    sums = x.unflatten(1, (layer.scale.shape[1], -1)).sum(2, dtype=torch.float32)
                    parts = Q.int4_parts(x, sums, layer.weight, *tensors[-1])
                else:
                    parts = Q.bytes_parts(x, *tensors)
                # Before it is rounded: float32's own error, where int4 adds up 1024 + q.
                if dtype == torch.float16:
                    off = error(parts.sum(0), want)
                    assert off < (3e-4 if int4 else 1e-6), (where, off)
print("right")
"""


def test_triton_kernels_against_float64():
    """Compiled on a GPU, else in Triton's interpreter, in float16: its tl.dot in bfloat16 is wrong.
    """
    pytest.importorskip(
        "triton", reason="neither a GPU nor Triton (pip install triton: its interpreter will do)")
    env = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", INTERPRETER], env=env, capture_output=True,
                          text=True)
    if "only 0-dimensional arrays" in done.stderr:
        pytest.skip("this Triton's interpreter does not work with this numpy; Triton 3.6 needs "
                    "numpy below 2.4")
    assert done.stdout == "right\n", done.stderr


# Shared memory that a program can have, by card; a launch of more fails.
CARDS = {"H100": 227, "A100": 163, "Ada, RTX 30 and 50": 99}


@pytest.mark.parametrize("card", CARDS)
def test_launches_fit_the_card_and_inductor_adds_up_their_parts(card):
    pytest.importorskip("triton")
    from evaluation.dummy import PRESETS
    from gpu_kernels import quantized_matmul as Q
    from tp import skeleton
    outputs = {n for name in PRESETS for m in skeleton(
        config_from(PRESETS[name] | {"num_hidden_layers": 1}), torch.bfloat16).modules()
        if isinstance(m, linear.Linear) for n in (len(m.weight), len(m.weight) // 8)}
    assert {128256, 106496, 28672, 6144, 4096, 256} < outputs
    for rows in (1, 16, 17, 32, 33, 64):
        for n_out in (9, *outputs):
            for group in (None, *linear.GROUP_SIZES):
                s = Q.settings(rows, n_out, CARDS[card] << 10, group)
                assert rows <= s.rows and s.inputs == group or not group
                assert Q.shared_bytes(s, bool(group)) <= CARDS[card] << 10, s
                assert 1 <= s.splits <= 4
                assert linear.kernel_workspace(rows, n_out, 2) >= (
                    rows * n_out * (4 * s.splits + 4 + 2))
    assert Q.MAX_ROWS == linear.FEW
    # An H100 gets what was measured there.
    assert Q.settings(26, 57344, CARDS["H100"] << 10) == (32, 128, 256, 4, 3, 1)
    assert Q.settings(1, 6144, CARDS["H100"] << 10) == (16, 64, 128, 4, 3, 4)


def test_int4_counts_the_copies_that_it_makes_on_a_gpu():
    layer, _ = layer_of("int4 64", 128, 32)
    layer.to("meta").prepare(torch.bfloat16)
    assert layer.by_group.shape == (2, 2, 32)
    assert layer.added(torch.bfloat16, "cuda") == layer.by_group.nbytes
    assert layer.added(torch.bfloat16, "cpu") == 0


def test_few_rows_on_a_gpu_go_to_the_kernels(monkeypatch):
    """Which path a layer takes, by its rows, with kernels that only say that they were called."""
    called = []
    kernels = type("Kernels", (), {
        name: staticmethod(lambda x, weight, *rest, name=name: (
            called.append((name, len(rest))), x.new_zeros(len(x), len(weight)))[1])
        for name in ("bytes_matmul", "int4_matmul")})
    monkeypatch.setattr(linear, "quantized_matmul", kernels)
    monkeypatch.setattr(linear, "few_rows_on_gpu", lambda x: len(x) <= linear.FEW)
    for name, want in (("int8", ("bytes_matmul", 1)), ("fp8", ("bytes_matmul", 1)),
                       ("int4 64", ("int4_matmul", 3))):
        layer, _ = layer_of(name, 128, 32)
        paths = {rows: linear.product_path(torch.nn.Sequential(torch.nn.Linear(1, 1), layer), rows,
                                   torch.bfloat16) for rows in (1, 2, 64)}
        assert paths == {1: "Triton, GEMV" if name == "int4 64" else "Triton", 2: "Triton",
                         64: "Triton"}
        for rows in (1, 64):
            layer(torch.randn(rows, 128))
        assert called == [want] * 2
        skip_without_fp8(name)
        layer(torch.randn(65, 128))
        assert called == [want] * 2
        called.clear()


def test_fp8_widens_its_weights_where_pytorch_does_not_scale_rows(monkeypatch):
    def fail(*args, **settings):
        raise RuntimeError("not on this card")

    layer, _ = layer_of("fp8", 128, 32)
    monkeypatch.setattr(torch, "_scaled_mm", fail)
    linear.scales_rows.cache_clear()
    try:
        layer.prepare(torch.float32)
        assert linear.product_path(torch.nn.Sequential(torch.nn.Linear(1, 1), layer), 65,
                           torch.float32) == "PyTorch"
        x = torch.randn(65, 128)
        assert error(layer(x), x.double() @ dense(layer).T) < BOUND[torch.float32]
        assert layer.workspace(65, torch.bfloat16, "cpu") >= 2 * 128 * 32
    finally:
        linear.scales_rows.cache_clear()


@pytest.mark.slow
def test_prompts_of_few_rows_are_traced_once_for_each_tile():
    """Not for each number of rows: what the op says of its result must not fix them."""
    pytest.importorskip("triton")
    from gpu_kernels.quantized_matmul import bytes_parts, int4_parts
    graphs, (k, n) = [], (64, 48)
    int8 = torch.ones(n, k, dtype=torch.int8), torch.ones(n)
    int4 = torch.ones(n, k // 2, dtype=torch.uint8), *2 * [torch.ones(2, n, dtype=torch.bfloat16)]

    def backend(graph, _):
        graphs.append(graph)
        return lambda *args: (torch.zeros(1),)

    for product in (lambda x: bytes_parts(x, *int8).sum(0),
                    lambda x: int4_parts(x, x[:, :2].float(), *int4).sum(0)):
        graphs.clear()
        torch._dynamo.reset()
        product = torch.compile(product, backend=backend, fullgraph=True, dynamic=False)
        for rows in range(2, 65):
            x = torch.ones(rows, k, dtype=torch.bfloat16)
            torch._dynamo.maybe_mark_dynamic(x, 0)
            product(x)
        assert len(graphs) == 3  # up to 16, 32 and 64 rows


# ---------------------------------------------------------------- checkpoints

def run_main(monkeypatch, source, out, *args):
    run_command(monkeypatch, quantize, "--checkpoint_dir", source, "--out", out, *args)
    return out


QWEN2, QWEN3 = (CONFIG | dict(architectures=[f"Qwen{i}ForCausalLM"]) for i in (2, 3))
BIASES = dict(attention_bias=True, mlp_bias=True)  # the second means nothing to Qwen3
CASES = [*(pytest.param(CONFIG, mode, id=mode) for mode in MODES),
         pytest.param(QWEN2, "int8", id="qwen2"),
         pytest.param(CONFIG | BIASES, "int8", id="biases"),
         pytest.param(QWEN3, "int8", id="qwen3"),
         pytest.param(QWEN3 | BIASES, "int4", id="qwen3, biases"),
         pytest.param(CONFIG | dict(tie_word_embeddings=True), "int4", id="tied")]


@pytest.fixture
def fp8_anywhere(monkeypatch):
    """Lets fp8 run on the CPU, where PyTorch emulates it: right, and of no use but here."""
    monkeypatch.setattr(Quantization, "check_device", lambda *args: None)


def text(model, draft=None, k=5):
    """40 tokens of greedy decoding, with standard speculation if there is a draft."""
    engine = Engine(model, draft and LlamaDrafter(draft), speculate_k=k)
    return generate(engine, [5, 9, 17, 3], 40).tokens


@pytest.mark.parametrize("config,mode", CASES)
def test_roundtrip(tmp_path, monkeypatch, fp8_anywhere, config, mode):
    skip_without_fp8(mode)
    plain = random_model(config, seed=1, scale=0.1)
    source = save_checkpoint(tmp_path / "m", plain, config)
    tokenizer = Tokenizer(BPE({"a": 0, "b": 1}, []))
    tokenizer.decoder = Fuse()
    tokenizer.save(str(source / "tokenizer.json"))
    group = ["--group_size", "64"] if mode == "int4" else []
    out = run_main(monkeypatch, source, tmp_path / "q", "--mode", mode, *group)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors",
                                                     "tokenizer.json"]
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    written = json.loads((out / "config.json").read_text())
    assert written == config | {"quantization": {"mode": mode, "group_size": 64 if group else None,
                                                 "parent": fingerprint(source)}}

    shard(source)
    write_weights = functools.partial(checkpoint.write_weights, shard_bytes=30_000)
    monkeypatch.setattr(checkpoint, "write_weights", write_weights)
    monkeypatch.setattr(checkpoint, "CHUNK", 1000)  # a few rows at a time
    sharded = run_main(monkeypatch, source, tmp_path / "s", "--mode", mode, *group)
    held = {name: w for f in sharded.glob("*.safetensors") for name, w in load_file(f).items()}
    whole = load_file(out / "model.safetensors")
    assert len(list(sharded.glob("*.safetensors"))) > 3 and held.keys() == whole.keys()
    assert all(torch.equal(w.view(torch.uint8), held[name].view(torch.uint8))
               for name, w in whole.items())
    assert fingerprint(out) == fingerprint(sharded) != fingerprint(source)

    model = load(sharded, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 17, 3, 60, 7]])
    read = lambda m: m(ids, torch.arange(6), m.new_cache(6))[0]
    bound = {"int8": 0.03, "int4": 0.4, "fp8": 0.15}[mode]
    assert 1e-4 < error(read(model), read(plain).double()) < bound
    if mode != "fp8":  # the same as plain layers that hold the rounded weights
        for name, module in model.named_modules():
            if isinstance(module, linear.QuantizedLinear):
                plain.get_submodule(name).weight.data = dense(module).float()
        assert error(read(model), read(plain).double()) < 1e-5
    draft = random_model(config, seed=1, scale=0.1)
    assert text(model) == text(model, draft) == text(model, random_model(config, seed=4))


def test_a_tokenizer_that_cannot_be_read_is_not_copied(tmp_path, monkeypatch, capsys):
    source = save_checkpoint(tmp_path / "m", random_model(tiny_config()), tiny_config())
    for name, data in (("tokenizer.model", b"no tokenizer"), ("tokenizer.json", b"{}"),
                       ("added_tokens.json", b"\xff"), ("tokenizer_config.json", b"[" * 10_000),
                       ("chat_template.jinja", b"\xff")):
        (source / name).write_bytes(data)
        with pytest.raises(SystemExit, match="2"):
            run_main(monkeypatch, source, tmp_path / "q", "--mode", "int8")
        assert f"{source / name}" in capsys.readouterr().err.splitlines()[-1]
        assert [p.name for p in tmp_path.iterdir()] == ["m"]
        (source / name).unlink()
    run_main(monkeypatch, source, tmp_path / "q", "--mode", "int8")


def verify(model, head, tokens, pos, cache):
    """A verification's logits and the judge's scores, in one pass."""
    logits, hidden = model(tokens[None], pos, cache)
    return logits, head(hidden[0, 1:])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("mode,dtype", [("int8", torch.float32), ("int8", torch.bfloat16),
                                        ("int4", torch.float32), ("int4", torch.bfloat16),
                                        ("fp8", torch.float32)])
def test_compiled_verification_equals_eager(tmp_path, monkeypatch, fp8_anywhere, mode, dtype):
    skip_without_fp8(mode)
    config = CONFIG | dict(num_hidden_layers=1)
    source = save_checkpoint(tmp_path / "m", random_model(config), config)
    group = ["--group_size", "32"] if mode == "int4" else []
    out = run_main(monkeypatch, source, tmp_path / "q", "--mode", mode, *group)
    model = load(out, dtype=dtype)
    assert model.norm.weight.dtype == dtype and model.layers[0].attn.wo.bias is None
    torch._dynamo.reset()
    compiled = torch.compile(verify, fullgraph=True, dynamic=False)
    head = JudgeHead(torch.randn(1, 128), torch.zeros(1), 0.5, "test")
    monkeypatch.setattr(linear, "SMALL", 0)  # this model's matrices are smaller
    # fp8 rounds some activations the other way
    bound = 1e-5 if dtype == torch.float32 and mode != "fp8" else 0.02
    for rows in (5, 26):
        args = model, head, torch.arange(rows), torch.arange(rows), model.new_cache(64)
        with torch.inference_mode():
            for got, want in zip(compiled(*args), verify(*args)):
                assert error(got, want.double()) < bound


def test_the_judge_of_the_parent_and_of_the_child(tmp_path, monkeypatch):
    source = save_checkpoint(tmp_path / "m", random_model(CONFIG), CONFIG)
    child = run_main(monkeypatch, source, tmp_path / "int8", "--mode", "int8")
    other = run_main(monkeypatch, source, tmp_path / "int4", *INT4)
    stranger = save_checkpoint(tmp_path / "x", random_model(CONFIG, seed=9), CONFIG)
    for trained_on, used_with, taken in ((source, source, True), (source, child, True),
                                         (source, other, True), (child, child, True),
                                         (child, source, False), (other, child, False),
                                         (stranger, child, False), (stranger, source, False)):
        judge = tmp_path / "j.safetensors"
        JudgeHead(torch.zeros(1, 128), torch.zeros(1), 0.5, fingerprint(trained_on)).save(judge)
        q = read_config(used_with).quantization
        args = judge, 128, fingerprint(used_with), "the target", q and q.parent
        if taken:
            JudgeHead.load(*args)
        else:
            with pytest.raises(UserError, match="was trained on target"):
                JudgeHead.load(*args)


@pytest.mark.slow
def test_generate_takes_the_demo_quantized_with_the_judge_of_its_parent(tmp_path, monkeypatch):
    demo = ROOT / "checkpoints" / "demo"
    out = run_main(monkeypatch, demo / "target", tmp_path / "q", "--mode", "int8")
    command = [sys.executable, ROOT / "generate.py", "--target", out, "--draft", demo / "draft",
               "--prompt", "def", "--max_new_tokens", "5", "--device", "cpu"]
    go = lambda judge: subprocess.run([*command, "--judge", judge], capture_output=True, text=True)
    done = go(demo / "judge.safetensors")
    assert done.returncode == 0 and "judge: 5 tokens" in done.stderr, done.stderr
    other = tmp_path / "j.safetensors"
    JudgeHead(torch.zeros(1, 384), torch.zeros(1), 0.5, "0123456789abcdef").save(other)
    done = go(other)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "trained on target 0123456789abcdef" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="needs Linux's /proc")
@pytest.mark.parametrize("mode,group_size", [("int8", None), ("int4", 128)])
def test_memory_does_not_grow_with_the_model(tmp_path, mode, group_size):
    hf = tiny_config(vocab_size=16, hidden_size=512, num_hidden_layers=6, num_attention_heads=8,
                     num_key_value_heads=8, intermediate_size=4096)
    config = config_from(hf)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    save_file({name: torch.ones(shape, dtype=torch.bfloat16)
               for name, shape in shapes(config).items()}, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    (tmp_path / "q").mkdir()
    quantization = {"mode": mode, "group_size": group_size}
    peak = peak_memory(f"""
import checkpoint
from quantize import plan
checkpoint.CHUNK //= 16  # 1 MB as float32
hf, source = {hf!r}, Path({str(tmp_path)!r})
child = config_from(hf | {{"quantization": {quantization!r}}})
planned = plan(source, config_from(hf), child)  # loads torch's Python for the meta device
measure(lambda: write_weights(planned, source / "q"))
""")
    shutil.rmtree(tmp_path)
    # some copies of a chunk; the largest tensor is 16.8 MB in float32
    assert size > 8e7 and peak < 1.2e7, (size, peak)


# ---------------------------------------------------------------- bad input

INT4 = ("--mode", "int4", "--group_size", "32")


def edit_config(d, **changes):
    edit_json(d / "config.json", **changes)


def cut_vocabulary(d):
    edit_config(d, vocab_size=111)
    edit_weights(d, lambda w: w.update(
        {n: w[n][:111].clone() for n in ("output.weight", "embed.weight")}))


@pytest.mark.parametrize("damage,args,message", [
    (lambda d: None, ("--mode", "int3"), "invalid choice: 'int3'"),
    (lambda d: None, ("--mode", "int4", "--group_size", "48"), "invalid choice: 48"),
    (lambda d: None, ("--mode", "int4", "--group_size", "128"),
     "group size 128 does not divide the 192 inputs"),
    (lambda d: None, ("--mode", "int8", "--group_size", "64"),
     "--group_size has no meaning for --mode int8"),
    (lambda d: None, (), "--mode"),
    (lambda d: edit_config(d, quantization={"mode": "int8", "group_size": None, "parent": "x"}),
     INT4, "is quantized to int8 already"),
    (lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}), INT4,
     "quantization_config"),
    (put({"output.weight": torch.zeros(112, 128, dtype=torch.int8)}), INT4,
     "output.weight is I8; take the checkpoint that is not quantized"),
    (cut_vocabulary, ("--mode", "fp8"), "128 inputs and 111 outputs does not fit its kernel"),
    (lambda d: edit_weights(d, lambda w: w.pop("norm.weight")), INT4,
     "weight norm.weight is missing"),
    (lambda d: edit_weights(d, lambda w: w.update({"model.norm.weight": w.pop("norm.weight")})),
     INT4, "convert it first"),
    (put({"norm.weight": torch.zeros(5)}), INT4, "norm.weight has shape [5]"),
    (put({"strange": torch.zeros(5)}), INT4, "strange has no place"),
    (lambda d: (d / "model.safetensors").write_bytes(b""), INT4, "it is empty"),
    (lambda d: (d / "config.json").unlink(), INT4, "config.json does not exist"),
    (lambda d: ((d / "config.json").unlink(), (d / "model.safetensors").rename(d / "m.gguf")), INT4,
     "llama.cpp's format"),
    (lambda d: shutil.rmtree(d), INT4, "is not a directory"),
    (lambda d: (d.parent / "q").mkdir(), INT4, "exists; remove it or choose another"),
])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, damage, args,
                                                  message):
    source = save_checkpoint(tmp_path / "m", random_model(CONFIG), CONFIG)
    damage(source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, source, tmp_path / "q", *args)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and "Traceback" not in err, err
    assert err.startswith("usage: ") or err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("mode,damage,message", [
    ("int8", lambda d: edit_config(d, quantization={"mode": "nf4"}),
     "quantization mode 'nf4' is not known"),
    ("int8", lambda d: edit_config(d, quantization="int8"), "quantization is .int8.; it must be"),
    ("int8", lambda d: edit_config(d, quantization={"mode": "int4", "group_size": 48}),
     "group size 48"),
    ("int8", lambda d: edit_config(d, quantization=None), "scale has no place"),
    ("int8", lambda d: edit_config(d, quantization={"mode": "int4", "group_size": 32}),
     "has shape|is missing"),
    ("int8", lambda d: edit_weights(d, lambda w: w.pop("layers.1.ffn.w2.scale")),
     "layers.1.ffn.w2.scale is missing"),
    ("int8", put({"output.weight": torch.zeros(112, 128)}),
     "output.weight is F32, config.json says I8"),
    ("fp8", lambda d: None, "fp8, which needs a GPU of compute capability 8.9 or better, not cpu"),
])
def test_damaged_quantized_checkpoints_are_named(tmp_path, monkeypatch, mode, damage, message):
    source = save_checkpoint(tmp_path / "m", random_model(CONFIG), CONFIG)
    out = run_main(monkeypatch, source, tmp_path / "q", "--mode", mode)
    damage(out)
    with pytest.raises(UserError, match=message):
        load(out)


def test_fp8_names_the_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(UserError, match="m is quantized to fp8, .*8.9 or better, this one has 8.6"):
        Quantization("fp8", None, "x").check_device("cuda", "m")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    Quantization("fp8", None, "x").check_device("cuda", "m")
