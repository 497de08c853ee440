"""Compiled rounds: the same tokens as eager ones, and nothing left to compile after the warm-up."""
import re
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from demo.pair import load_pair, make_engine, read_problems
from engine import generate
from evaluation.timing import recorded
from graphs import RecordedRounds, builder, by_block, compile_engine, no_kernel, warm_up
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
    target, draft, judge_head, tokenizer, _ = load_pair()
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


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("whole", [8, 0])
def test_compiled_sampling_draws_what_eager_draws(whole, monkeypatch):
    """The noise is drawn outside of what is compiled, so that the same seed gives the same text,
    warm-up or not, compiled as whole passes, the draft's a loop, or by blocks.
    """
    monkeypatch.setattr("graphs.WHOLE", whole)
    settings = dict(accept="judge", speculate_k=6, temperature=0.9, top_p=0.9, seed=3)
    want = generate(make(models()["target"], models()["good"], head(), **settings), tokens(6), 40)
    engine = compiled(models()["target"], models()["good"], head(), **settings)
    warm_up(engine, 6, 46)
    got = generate(engine, tokens(6), 40)
    assert (got.tokens, got.sources) == (want.tokens, want.sources)


@pytest.fixture
def counter(monkeypatch):
    """A backend that only counts graphs and their operations, instead of Inductor."""
    counter, compile = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options,
                        **more: compile(f, backend=counter, **more))
    return counter


@pytest.mark.slow
@pytest.mark.parametrize("whole", [8, 0])
@pytest.mark.parametrize("draft", [None, "good"])
def test_nothing_is_compiled_after_the_warm_up(draft, whole, counter, monkeypatch):
    """Whatever the length of the prompt or of the text, and whatever was accepted."""
    monkeypatch.setattr("graphs.WHOLE", whole)
    config = tiny_config(max_position_embeddings=300)
    target, small = random_model(config, seed=1), random_model(config, seed=1 if draft else 2)
    for p in small.parameters():
        p.data += 0.05 * p.data.std() * torch.randn(p.shape,
                                                    generator=torch.Generator().manual_seed(0))
    engine = compiled(target, small if draft else None, speculate_k=5)
    warm_up(engine, 1, 300)
    warm = counter.frame_count
    # At any span: a Block for prompts; and as whole passes the verification and the drafting, or by
    # blocks those of 6, 2 and 1 rows, what follows in the target, and the LM head at one row (the
    # draft has the target's shape).
    assert warm == ({8: 3, 0: 6} if draft else {8: 2, 0: 4})[whole]
    accepted = set()
    for n, new in ((1, 10), (7, 100), (63, 70), (64, 1), (130, 200), (3, 297), (299, 5), (2, 40)):
        r = generate(engine, tokens(n, seed=n), new)
        accepted |= {i for i, c in enumerate(r.accept_counts) if c}
    assert counter.frame_count == warm
    assert not draft or len(accepted) > 3
    generate(make(target, None), tokens(5), 5)
    assert counter.frame_count == warm  # eager engines compile nothing


@pytest.mark.long
@pytest.mark.slow
def test_many_layers_compile_no_more_than_two(counter, monkeypatch):
    """By blocks; as whole passes they do."""
    def graphs_and_operations(n_layer, whole):
        monkeypatch.setattr("graphs.WHOLE", whole)
        config = tiny_config(num_hidden_layers=n_layer)
        counter.clear()
        engine = compiled(random_model(config, seed=1), models()["random"], head(), "judge",
                          speculate_k=3)
        warm_up(engine, 1, 100)
        return counter.frame_count, counter.op_count

    assert graphs_and_operations(2, 0) == graphs_and_operations(20, 0)
    (few, operations), (also, more) = graphs_and_operations(2, 20), graphs_and_operations(20, 20)
    assert few == also and more > 3 * operations


def test_options_of_a_gpu_and_of_a_cpu(monkeypatch):
    """Without coordinate descent Inductor leaves products of one row to cuBLAS; in a group of
    ranks the calls between kernels are not C++.
    """
    seen = []
    monkeypatch.setattr(torch, "compile", lambda f, **settings: seen.append(settings["options"]))
    for device in ("cuda", "cpu"):
        builder(torch.device(device))(None)
    assert seen == [{"coordinate_descent_tuning": True}, {"cpp_wrapper": True}]


def test_without_the_kernel_a_gpus_attention_is_pytorchs_and_the_reason_is_said(monkeypatch):
    model = random_model(tiny_config())
    assert no_kernel(model) == "on a CPU" and by_block(model, lambda f: f, {1}).kernel_rows == 0
    monkeypatch.setattr("graphs.no_kernel", lambda model: None)
    blocks = by_block(model, lambda f: f, {1})
    assert blocks.kernel_rows == 64 and model.kernel_rows == 0  # the engine's, not the model's


def test_where_attention_reads_what_is_there_one_recording_serves_every_span(monkeypatch):
    recorded, played = [], []
    replay = SimpleNamespace(replay=lambda: played.append(1))
    monkeypatch.setattr("graphs.record", lambda call, *args: (call(), replay)[1])
    for one, spans in ((True, [256]), (False, [64, 128])):
        recorded.clear(), played.clear()
        play = RecordedRounds(lambda e, span, k: recorded.append(span) or k - 1, one)
        engine = SimpleNamespace(cache="cache", capacity=256, outcome=None, rng=None)
        for span in (64, 128, 64):
            assert play(engine, span, 5) == 4  # the K that the round had
        assert recorded == spans and len(played) == 3
        play(engine, 64, 2)  # another K is another recording
        assert len(recorded) == len(spans) + 1


@pytest.mark.parametrize("k, kernel, one", [(63, True, True), (64, True, False), (5, False, False)])
def test_when_one_recording_serves_every_span(k, kernel, one, monkeypatch):
    """Up to 64 rows, which the kernel takes; more would attend to the whole cache by a mask."""
    monkeypatch.setattr("graphs.no_kernel", lambda model: None if kernel else "no card")
    engine = make(models()["target"], models()["good"], speculate_k=k)
    engine.device = torch.device("cuda")
    compile_engine(engine)
    assert engine.play.one == one


def test_a_recording_keeps_the_tensors_that_it_reads(monkeypatch):
    monkeypatch.setattr("graphs.record", lambda call: SimpleNamespace(replay=lambda: None))
    read = torch.zeros(3)
    alive = weakref.ref(read)
    call = recorded(SimpleNamespace(compile=True, device="cuda"), lambda t=read: t)
    del read
    call()
    assert alive() is not None


@pytest.mark.long
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
