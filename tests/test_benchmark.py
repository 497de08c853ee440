"""benchmark.py: what it reports, forced acceptance, refusals before anything is allocated, Hugging
Face beside ours.
"""
import importlib.util
import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch

import benchmark as B
import graphs
from common import UserError
from engine import Engine, generate
from evaluation import dummy as D
from evaluation import hf_peer, timing
from evaluation import real as R
from evaluation import simulated as S
from evaluation.passes import attention_name, first_token
from evaluation.timing import engine_on
from helpers import random_model, save_checkpoint, tiny_config
from judge import JudgeHead
from ranks.memory import RESERVED, needed

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "checkpoints" / "demo"
CONFIG = tiny_config(max_position_embeddings=512)
SMALL = tiny_config(max_position_embeddings=512, hidden_size=32, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
REAL = ["--target", str(DEMO / "target"), "--draft", str(DEMO / "draft"), "--prompts",
        str(DEMO / "problems.jsonl")]


@pytest.fixture
def dummy(tmp_path):
    """Flags for two small dummy models."""
    for name, config in (("target", CONFIG), ("draft", SMALL)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    return ["--target", str(tmp_path / "target.json"), "--draft", str(tmp_path / "draft.json"),
            "--no_compile", "--device", "cpu"]


def test_dummy_weights_give_tables_json_and_a_plot(dummy, tmp_path, capsys):
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    B.main([*dummy, "--repeats", "2", "--max_new_tokens", "24", "--speculate_k", "2,6",
            "--accepted", "1,3,6", "--rows", "3,70", "--prompt_tokens", "9,300", "--json", str(out),
            "--plot", str(png)])
    r, text = json.loads(out.read_text()), capsys.readouterr().out
    assert r["target"]["weights"] == r["draft"]["weights"] == "dummy" and r[
        "real"] is None and "real acceptance" not in text
    assert r["target"]["bytes"] == 4 * r["target"]["parameters"] and r["draft"]["parameters"] < r[
        "target"]["parameters"]
    assert 0 < r["bandwidth_gb_per_sec"] < 5000
    passes = r["passes"]
    assert [v["rows"] for v in passes["verify"]] == [1, 3, 7, 70]  # 1 and K + 1 in any case
    for e in [*passes["verify"], *passes["decode"].values()]:
        assert e["ms"] > 0 and 0 < e["fraction_of_bandwidth"] < 10
        assert e["fraction_of_bandwidth"] == pytest.approx(e["bytes"] / (e["ms"] / 1e3)
                                                           / (r["bandwidth_gb_per_sec"] * 1e9))
    assert passes["decode"]["target"] == {k: v for k, v in passes["verify"][0].items()
                                          if k != "rows"}
    assert [d["speculate_k"] for d in passes["draft"]] == [2, 6] and all(d["ms_per_token"] > 0
                                                                         for d in passes["draft"])
    assert passes["judge"]["rows"] == 7 and {"ms_with", "ms_without",
                                             "ms_cost"} < passes["judge"].keys()

    assert [f["prompt_tokens"] for f in r["first_token"]] == [9, 300]
    for name in ("target_ms", "with_draft_ms"):  # 300 tokens, read in full each time
        assert 0 < r["first_token"][0][name] < r["first_token"][1][name]

    s = r["simulated"]
    assert s["label"] == "simulated acceptance" and len(s["points"]) == 6 and s[
        "target_tokens_per_sec"] > 0
    for p in s["points"]:
        assert p["tokens"] == pytest.approx(p["rounds"] * (p["mean_accepted"] + 1))
        assert p["tokens_per_sec"] == pytest.approx(p["tokens"]
                                                    / (p["rounds"] * p["round_ms"] / 1e3))
        assert p["speed_up"] == pytest.approx(p["tokens_per_sec"] / s["target_tokens_per_sec"])
        assert p["mean_accepted"] == pytest.approx(S.mean_run(p["rate"], p["speculate_k"]), abs=0.5)
    assert s["points"][-1]["mean_accepted"] == 6  # all of K
    for best in s["best"]:
        assert best["tokens_per_sec"] == max(p["tokens_per_sec"] for p in s["points"] if p["rate"]
                                             == best["rate"])
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and png.stat().st_size > 10_000
    assert all("simulated acceptance" in line for line in text.splitlines() if "tokens/s" in line)
    for shown in ("target, verify 70 rows", "judge, in a pass of 7 rows", "read bandwidth",
                  "\nattention: PyTorch's (eager)\n", "\nprompt of 300 tokens  "):
        assert shown in text


def test_rates_and_runs():
    rng = random.Random(0)
    for k, rate in ((1, 0.5), (4, 0.9), (16, 0.7)):
        runs = [next((i for i in range(k) if rng.random() >= rate), k) for _ in range(20_000)]
        assert S.mean_run(rate, k) == pytest.approx(mean(runs), rel=0.03)
        assert S.rate_for(S.mean_run(rate, k), k) == pytest.approx(rate)
        drawn = S.draw_runs(rate, k, 2_000)
        assert mean(drawn) == pytest.approx(S.mean_run(rate, k), rel=0.01)
        # the distribution, not only its mean
        assert drawn.count(k) / 2_000 == pytest.approx(runs.count(k) / 20_000, abs=0.02)
    assert S.rate_for(19.7, 32) == pytest.approx(0.9685, abs=1e-3) and S.draw_runs(1.0, 5, 3) == [
        5, 5, 5]


class Recording:
    """`graphs.record` on a CPU: two calls that are undone; each replay is a call."""
    spans = 0

    def __call__(self, call, changes=(), rng=None):
        self.spans += 1
        before = [t.clone() for t in changes]
        for _ in range(2):
            call()
            for t, value in zip(changes, before):
                t.copy_(value)
        return SimpleNamespace(replay=call)


@pytest.mark.parametrize("played", ["eager", "recorded"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_forced_rounds_leave_the_state_and_the_caches_of_real_ones(k, played, monkeypatch):
    target, draft = random_model(CONFIG, seed=1), random_model(SMALL, seed=2)
    caches = {m: m.new_cache(256) for m in (target, draft)}
    head = JudgeHead(torch.randn(1, 64), torch.zeros(1), 0.5, "")
    engine = engine_on(caches, target, draft, head, k, accept="judge")
    counts = [0, k, 1, k, 0, 0, k - 1, k]
    prompt, tell = list(range(3, 23)), S.simulate(engine)
    if played == "recorded":
        monkeypatch.setattr(graphs, "record", recording := Recording())
        engine.play = graphs.RecordedRounds(engine.play)
        S.play(engine, prompt, counts[::-1], tell)  # its first round is recorded, after two more
        graphs.warm_up(engine, 1, 2)
    assert S.play(engine, prompt, counts, tell) > 0
    assert played == "eager" or recording.spans > 0
    assert len(engine.tokens) == len(prompt) + 1 + sum(counts) + len(counts)
    # and not one token more was left to keep
    assert torch.cat(engine.state).tolist() == [*engine.tokens[-2:], len(engine.tokens), -1, 0]
    length = engine.read_len
    with torch.inference_mode():
        for model in (target, draft):
            fresh = model.new_cache(length)
            model(torch.tensor([engine.tokens[:length]]), torch.arange(length), fresh)
            torch.testing.assert_close(caches[model].first(length).kv, fresh.kv, atol=1e-5,
                                       rtol=1e-4)


def test_the_first_token_is_timed_from_the_start_of_a_prompt_that_is_read_in_full(monkeypatch):
    model, clock, read = random_model(CONFIG), [0.0], []
    e = engine_on({model: model.new_cache(256)}, model)
    prefill, play_round, read_all = e.prefill, e.round, e.read
    later = lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    monkeypatch.setattr(R, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    e.read = lambda start: (read.append(len(e.tokens) - start), read_all(start))[1]
    e.prefill = lambda *args: (later(3), prefill(*args))[1]
    e.round = lambda: (later(1), play_round())[1]
    prompt = list(range(3, 40))
    runs = [R.ours(e, prompt, 5, ()) for _ in range(2)]
    assert [run.first_token_ms for run in runs] == [3000, 3000] and clock == [2 * (3 + 4)]
    first = first_token(e, 100)
    with torch.inference_mode():
        assert first() == first()
    assert read == [37, 37, 100, 100]


def test_nobody_pays_on_a_prompt_for_what_the_others_reuse(monkeypatch):
    """The first call that meets a prompt is slow, whoever makes it, as with cuDNN's plans."""
    clock, met = [0.0], []
    fake = SimpleNamespace(perf_counter=lambda: clock[0])
    for module in (R, timing):
        monkeypatch.setattr(module, "time", fake)

    def call(prompt, seconds):
        clock[0] += seconds if prompt in met else 100
        met.append(prompt)
        return R.Run([1] * 10, first_token_ms=seconds)

    calls = {"target": lambda prompt: call(prompt, 2), "judge K=4": lambda prompt: call(prompt, 1)}
    rows = R.in_turns(calls, ["a", "b", "c"], "cpu")
    assert [[seconds for seconds, _ in row] for row in rows.values()] == [[2, 2, 2], [1, 1, 1]]
    assert met == [p for p in "abc" for _ in range(4)]
    v = R.variant("judge K=4", rows["judge K=4"], rows["target"])
    assert (v["speed_up"], v["tokens_per_sec"], v["first_token_ms"]) == (2, 10, 1)


def test_the_peer_runs_without_cudnns_attention(monkeypatch):
    """cuDNN plans for each length, and the peer's cache grows by a token a pass."""
    seen, enabled = [], torch.backends.cuda.cudnn_sdp_enabled
    models = random_model(CONFIG), random_model(SMALL)
    calls = hf_peer.calls(*models, [CONFIG, SMALL], [2], 4, (), {
        "topk:3": {"accept": "topk", "parameter": 3.0, "span": None}})
    forward = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **more: (
        seen.append(enabled()), forward(*a, **more))[1])
    before = enabled()
    try:
        for setting in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(setting)
            for call in calls.values():
                assert len(call([5, 6, 7])[0]) == 4
                assert enabled() == setting
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert len(seen) > 20 and not any(seen)


def test_the_memory_of_a_prompt_that_widens_int8_weights_is_counted(tmp_path, monkeypatch):
    """On a GPU, where up to 64 rows are read without widening: 70B's w13 takes 0.9 GB."""
    def check(models, positions, rows, device, caches, advice, **reading):
        parts.update(needed(models, positions, rows, 1, "cuda", caches, **reading))
        raise UserError("enough")

    parts, w13 = {}, 2 * 28672 * 8192 * 2  # bytes in bfloat16
    monkeypatch.setattr(B, "check_memory", check)
    flags = ["--target_quant", "int8", "--device", "cpu", "--dtype", "bfloat16"]
    for flag, size in (("target", "70b"), ("draft", "8b")):  # loading 128256 rows would take more
        path = tmp_path / f"{flag}.json"
        path.write_text(json.dumps(D.PRESETS[f"llama-3.1-{size}"] | {"vocab_size": 4096}))
        flags += [f"--{flag}", str(path)]
    with pytest.raises(UserError, match="^enough$"):
        B.main(flags)
    assert w13 < parts["workspace"] - RESERVED < 1.3 * w13
    assert parts["caches"] == pytest.approx(1024 * 4 * (80 * 8 + 32 * 8) * 128, rel=1e-2)


def test_the_kernels_that_run_are_said(dummy, monkeypatch, capsys):
    few = [*dummy, "--repeats", "1", "--max_new_tokens", "4", "--speculate_k", "1", "--rows", "1"]
    r = B.main([*few, "--target_quant", "int8"])
    text = capsys.readouterr().out
    assert r["attention"] == "PyTorch's (eager)" and "\nattention: PyTorch's (eager)\n" in text
    assert "\nproducts of target: 1 row: PyTorch; 2 rows: PyTorch\n" in text
    assert "products of draft" not in text  # plain weights
    assert [f["prompt_tokens"] for f in r["first_token"]] == [64]  # 512 would not fit the context
    compiled, model = SimpleNamespace(compile=True), random_model(CONFIG)
    assert attention_name(compiled, model) == "PyTorch's (on a CPU)"
    for why, said in (("the card is old", "PyTorch's (the card is old)"),
                      (None, "Triton split-KV up to 64 rows, above PyTorch's")):
        monkeypatch.setattr("graphs.no_kernel", lambda model, why=why: why)
        assert attention_name(compiled, model) == said


@pytest.mark.parametrize("name, parameters",
                         [("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248),
                          ("llama-3.1-70b", 70_553_706_496),
                                              ("llama-3.1-405b", 405_853_388_800)])
def test_presets_have_the_published_sizes(name, parameters):
    m = D.describe(D.find(name, None, "target"), torch.bfloat16)
    assert m["parameters"] == parameters and m["bytes"] == 2 * parameters
    assert m["bytes_read"] == m["bytes"] - (0 if "3.2" in name else 2 * 128256
                                            * D.PRESETS[name]["hidden_size"])


def test_what_is_built_has_the_size_that_was_counted():
    source = D.Source("tiny", SMALL, None)
    model = D.build(source, "cpu", torch.bfloat16)
    assert D.size(*model.parameters()) == D.describe(source, torch.bfloat16)["bytes"]
    assert model.output.weight is model.embed.weight
    assert model.norm.weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    assert all(t.isfinite().all() and not t.requires_grad for t in model.parameters())


def test_too_large_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(B, "build", lambda *a: pytest.fail("it was built"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"does not fit: target 811\.7 GB, draft [23]\.\d GB, "
                       r"caches .* cpu has .* GB free; take smaller"):
        B.main(["--target", "llama-3.1-405b", "--draft", "llama-3.2-1b", "--device", "cpu",
                "--dtype", "bfloat16"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


@pytest.mark.parametrize("target, draft", [
    (CONFIG, SMALL),
    (tiny_config(architectures=["Qwen2ForCausalLM"], max_position_embeddings=512), CONFIG),
    (CONFIG | dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                     high_freq_factor=4.0, original_max_position_embeddings=32)),
     CONFIG),
], ids=["tied draft", "biases", "scaled rope"])
def test_hugging_face_makes_the_same_tokens(tmp_path, target, draft):
    models = []
    for i, config in enumerate((target, draft)):
        save_checkpoint(tmp_path / str(i), random_model(config, seed=i), config)
        models.append(D.build(D.find(str(tmp_path / str(i)), None, "target"), "cpu", torch.float32))
    theirs = hf_peer.to_hf(models[0], target)
    # shared, not copied
    assert theirs.model.layers[1].mlp.up_proj.weight.data_ptr() == models[0].layers[
        1].ffn.w13.weight[96:].data_ptr()
    args = SimpleNamespace(speculate_k=[1, 5], ks={"llama": [1, 5]}, max_new_tokens=24,
                           device="cpu", compile=False, peer="hf",
                           rules={rule: dict(accept=rule, parameter=None, span=None)
                                  for rule in ("standard", "judge")},
                           target=SimpleNamespace(config=target),
                           draft=SimpleNamespace(config=draft))
    prompts = [list(range(3, 20)), list(range(40, 50))]
    yes = JudgeHead(torch.zeros(1, 64), torch.tensor([9.0]), 0.5, "")
    caches = {m: m.new_cache(256) for m in models}
    measure = lambda eos_ids: R.measure_real(args, *models, yes, caches, prompts, eos_ids)
    r = {v["variant"]: v for v in measure(())["variants"]}
    ours = ["standard K=1", "judge K=1", "standard K=5", "judge K=5"]
    assert list(r) == ["target", *ours, "hf target", "hf assisted K=1", "hf assisted K=5",
                       *(f"hf {name}" for name in ours)]
    for name in ours:
        assert r[name]["mean_accepted"] == r[f"hf {name}"]["mean_accepted"] and r[name][
            "tokens"] == r[f"hf {name}"]["tokens"]
    want = [generate(Engine(models[0]), p, 24).tokens for p in prompts]
    for name, v in r.items():
        assert v["tokens_per_sec"] > 0 and v["speed_up"] > 0 and [len(t) for t in v["tokens"]] == [
            24, 24]
        assert "judge" in name or (v["tokens"] == want and v["same_tokens_as_target"] == 2), name
    assert r["target"]["speed_up"] == r["hf target"]["speed_up_over_hf"] == 1
    assert r["target"]["mean_accepted"] is None and r["judge K=5"]["mean_accepted"] > 4
    end = want[0][10]
    short = [w[:w.index(end) + 1] if end in w else w for w in want]
    for v in measure((end,))["variants"]:
        assert "judge" in v["variant"] or v["tokens"] == short, v["variant"]


def test_the_demo_pair_with_real_acceptance(monkeypatch, capsys):
    built, build = [], B.build
    monkeypatch.setattr(B, "build", lambda *args: built.append(build(*args)) or built[-1])
    r = B.main([*REAL, "--judge", str(DEMO / "judge.safetensors"), "--peer", "hf", "--no_compile",
                "--repeats", "1", "--max_new_tokens", "12",
                "--speculate_k", "3", "--accepted", "2", "--device", "cpu", "--dtype", "float32",
                "--draft_dtype", "bfloat16"])
    assert (r["target"]["dtype"], r["draft"]["dtype"]) == ("float32", "bfloat16") and [
        m.norm.weight.dtype for m in built] == [torch.float32, torch.bfloat16]
    assert r["draft"]["bytes"] == 2 * r["draft"]["parameters"]
    variants = {v["variant"]: v for v in r["real"]["variants"]}
    assert list(variants) == ["target", "standard K=3", "judge K=3", "hf target", "hf assisted K=3",
                              "hf standard K=3", "hf judge K=3"]
    assert all(v["same_tokens_as_target"] == 1 for name, v in variants.items()
               if "judge" not in name)
    assert [v["first_token_ms"] is None for v in variants.values()] == [False] * 3 + [True] * 4
    for v in r["real"]["variants"][:3]:  # less than the whole text took
        assert 0 < v["first_token_ms"] < 1e3 * len(v["tokens"][0]) / v["tokens_per_sec"]
    assert r["target"]["weights"] == "real"
    text = capsys.readouterr().out
    assert "real acceptance, 1 prompts" in text and "simulated acceptance" in text
    assert "over hf target" in text


@pytest.mark.parametrize("flags, message", [
    (["--target", "llama-9"], r"--target llama-9 is no preset \(llama-3.2-1b, .*no checkpoint "
     r"directory and no config.json"),
    (["--draft", "llama-3.2-1b"], "vocabulary of 128256 tokens, target .* one of 101"),
    (["--speculate_k", "4,x"], "--speculate_k 4,x: give numbers"),
    (["--speculate_k", "0,4"], "--speculate_k 0"),
    (["--rows", "0,4"], "--rows 0: it must be at least 1"),
    (["--rows", "2,"], "--rows 2,: give numbers"),
    (["--rows", "400"], "context of 512 tokens is too short for 528; lower .*--rows"),
    (["--prompt_tokens", "-3"], "--prompt_tokens -3: it must be at least 1"),
    (["--prompt_tokens", "64,511"], "context of 512 tokens is too short for 513; lower .*or "
     "--prompt_tokens"),
    (["--accepted", "2,40"], "at most the largest K, 32"),
    (["--max_new_tokens", "600"], "context of 512 tokens is too short"),
    (["--repeats", "0"], "--repeats is 0"),
    (["--peer", "hf"], "--peer hf needs real checkpoints"),
    (["--prompts", str(DEMO / "problems.jsonl")], "--prompts needs checkpoint directories"),
    (["--judge", str(DEMO / "judge.safetensors")], "--judge is used with --prompts"),
    (["--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
    ([*REAL, "--target_quant", "int8"], "--target_quant is for dummy weights; quantize .* with "
     "quantize.py"),
    ([*REAL[:4], "--peer", "hf"], "--peer hf needs --prompts"),
    ([*REAL, "--prompts", str(ROOT / "README.md")], 'README.md, line 1: not JSON'),
    ([*REAL, "--prompts", str(DEMO / "target" / "config.json")], "config.json, line 1: not JSON"),
    ([*REAL, "--rules", "judge"], "rule judge needs --judge FILE"),
    ([*REAL, "--rules", "standard,topk"], "'topk' is not a rule; use topk:K, K: one"),
    ([*REAL, "--prompts", "missing.jsonl"], "cannot read missing.jsonl"),
])
def test_bad_input_is_one_clear_line(dummy, monkeypatch, flags, message):
    monkeypatch.setattr(B, "build", lambda *a: pytest.fail("it was built"))
    with pytest.raises(UserError, match=message) as e:
        B.main([*dummy, *flags])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("module, flags", [("matplotlib", ["--plot", "x.png"]),
                                           ("transformers", [*REAL, "--peer", "hf"])])
def test_a_missing_optional_package_is_named_at_once(dummy, monkeypatch, module, flags):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"needs {module}; pip install {module}"):
        B.main([*dummy, *flags])


def test_exit_code_and_line():
    done = subprocess.run([sys.executable, ROOT / "benchmark.py", "--target", "llama-9", "--draft",
                           "llama-3.2-1b"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(
        "error: --target llama-9 is no preset") and done.stderr.count("\n") == 1 and not done.stdout
