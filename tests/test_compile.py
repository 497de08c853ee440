"""Compiled rounds: the same tokens as eager ones, and nothing left to compile after the warm-up."""
import re
import subprocess
import sys

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from demo.pair import load_pair, make_engine, read_problems
from engine import generate
from graphs import compile_engine, warm_up
from helpers import random_model, tiny_config
from linear import DOT_ROWS, Linear, dense, packs, prepare
from test_generate import ROOT, head, make, models, short_spans, tokens  # noqa: F401 (a fixture)


def compiled(*args, **settings):
    torch._dynamo.reset()
    engine = make(*args, **settings)
    compile_engine(engine)
    return engine


@pytest.mark.slow
def test_compiled_demo_pair_gives_the_eager_tokens(monkeypatch):
    """Greedy, float32: the shipped pair decides nothing by so little that the order of a sum would
    turn it on these problems.
    """
    # as it is: this takes long to compile, and other tests change spans
    monkeypatch.setattr("engine.SPAN", 256)
    target, draft, judge_head, tokenizer = load_pair()
    prompts = [tokenizer.encode(p["prompt"]) for p in read_problems(2)]
    for rule in ("target", "judge"):
        # more steps compile longer
        eager, fast = (make_engine(rule, target, draft, judge_head, speculate_k=6)
                       for _ in range(2))
        torch._dynamo.reset()
        compile_engine(fast)
        for prompt in prompts:
            want, got = (generate(e, prompt, 60, tokenizer.eos_ids) for e in (eager, fast))
            assert (got.tokens, got.accept_counts, got.sources) == (want.tokens, want.accept_counts,
                                                                    want.sources)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, size", [(torch.float32, "small"), (torch.float32, "large"),
                                         (torch.bfloat16, "small")])
def test_linear_layers_on_a_cpu(dtype, size, monkeypatch):
    """Eager and compiled, every number of rows against float64; few float32 rows are loops that
    load each input and weight once.
    """
    if size == "large":
        monkeypatch.setattr("linear.LARGE", 2**17)
    layer, norm = Linear(512, 300, bias=True).to(dtype).requires_grad_(False), torch.nn.RMSNorm(
        512, dtype=dtype).requires_grad_(False)
    weight = layer.weight.clone()
    prepare(layer, dtype)
    packed = layer.packed is not None
    assert packed == packs(weight) and layer.weight.is_mkldnn == (
        packed and not (dtype == torch.float32 and size == "small"))
    assert layer.weight.shape == weight.shape and torch.equal(dense(layer.weight), weight)
    for rows in (1, 8, 9, 26, 70):
        torch._dynamo.reset()
        x = torch.randn(1, rows, 512, generator=torch.Generator().manual_seed(rows)).to(dtype)
        want = F.linear(norm(x).double(), weight.double(), layer.bias.double())
        got, [code] = run_and_get_code(torch.compile(lambda x: layer(norm(x)), fullgraph=True,
                                                     dynamic=False), x)
        for y in (got, layer(norm(x))):
            torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-5 if dtype == torch.float32
                                       else 0.02)
        dots = packed and rows <= DOT_ROWS and dtype == torch.float32 and size == "small"
        assert ("judge.packed_linear" in code) == (packed and not dots)
        loops = re.findall(r"_acc\w*_vec = .*?vec_reduce", code, re.DOTALL)
        loads = [loop.count("loadu") for loop in loops]
        # the norm's own sum, then of an input and its weight
        assert loads == ([1, 2] if dots else [1])


def test_small_layers_are_left_as_they_are():
    layer = Linear(64, 64)
    prepare(layer, torch.float32)
    assert layer.packed is None and not layer.weight.is_mkldnn


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [True, False])
def test_compiled_sampling_draws_what_eager_draws(unroll, monkeypatch):
    """The noise is drawn outside of what is compiled, so that the same seed gives the same text,
    warm-up or not.
    """
    monkeypatch.setattr("graphs.UNROLL", 64 if unroll else 0)
    settings = dict(accept="judge", speculate_k=4, temperature=0.9, top_p=0.9, seed=3)
    want = generate(make(models()["target"], models()["good"], head(), **settings), tokens(6), 40)
    engine = compiled(models()["target"], models()["good"], head(), **settings)
    warm_up(engine, 6, 46)
    got = generate(engine, tokens(6), 40)
    assert (got.tokens, got.sources) == (want.tokens, want.sources)


@pytest.mark.slow
@pytest.mark.parametrize("draft", [None, "good"])
def test_nothing_is_compiled_after_the_warm_up(draft, monkeypatch):
    """Whatever the length of the prompt or of the text, and whatever was accepted.

    A backend that only counts stands in for Inductor.
    """
    counter = CompileCounterWithBackend("eager")
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options,
                        **more: compile(f, backend=counter, **more))
    config = tiny_config(max_position_embeddings=300)
    target, small = random_model(config, seed=1), random_model(config, seed=1 if draft else 2)
    for p in small.parameters():
        p.data += 0.05 * p.data.std() * torch.randn(p.shape,
                                                    generator=torch.Generator().manual_seed(0))
    engine = compiled(target, small if draft else None, speculate_k=5)
    warm_up(engine, 1, 300)
    warm = counter.frame_count
    # the draft and the verification at 64, 128, 256 and the context's end
    assert warm == (2 if draft else 1) * 4
    accepted = set()
    for n, new in ((1, 10), (7, 100), (63, 70), (64, 1), (130, 200), (3, 297), (299, 5), (2, 40)):
        r = generate(engine, tokens(n, seed=n), new)
        accepted |= {i for i, c in enumerate(r.accept_counts) if c}
    assert counter.frame_count == warm
    assert not draft or len(accepted) > 3
    generate(make(target, None), tokens(5), 5)
    assert counter.frame_count == warm  # eager engines compile nothing


@pytest.mark.slow
def test_a_longer_text_than_was_warmed_for_still_comes_out_right():
    engine = compiled(models()["target"], models()["good"], speculate_k=3)
    warm_up(engine, 4, 20)
    assert engine.capacity == 64
    want = generate(make(models()["target"]), tokens(60), 60)
    assert generate(engine, tokens(60), 60).tokens == want.tokens


@pytest.mark.slow
def test_command_line():
    done = subprocess.run([sys.executable, ROOT / "generate.py", "--target",
                           ROOT / "checkpoints/demo/draft", "--device", "cpu", "--compile",
                           "--prompt",
                           "Question: Mira has 5 pens.", "--max_new_tokens", "20"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.index("warm-up: ") < done.stderr.index("tokens/s")


def test_without_a_compiler_one_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "generate.py", "--target",
                           ROOT / "checkpoints/demo/draft", "--device", "cpu", "--compile",
                           "--prompt", "x"],
                          capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert done.returncode == 2 and done.stderr.startswith("error: --compile on a CPU needs a C++ "
                                                           "compiler") and done.stderr.count(
                                                               "\n") == 1
