"""What a model needs is computed before it is loaded: the bytes that it then holds, a little above
the peak of its work; and what does not fit is refused in one line, with what would.
"""
import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

import benchmark
import checkpoint
import eval as evaluate
import generate
import make_judge_data
import tp
import train_judge
from checkpoint import config_from
from common import UserError
from drafters.llama import LlamaDrafter
from engine import Engine
from evaluation.dummy import PRESETS
from helpers import ROOT, run_command, save_checkpoint, tiny_config
from linear import prepare
from model import Transformer
from ranks import memory as M
from ranks.memory import check_memory, gpus_needed, memory
from test_tp import in_rank
from tp import size, skeleton

DEMO = ROOT / "checkpoints" / "demo"
K = 16
SHAPES = {  # what is at its peak: positions, rows of a pass, and the model's shape
    "feed-forward": (1024, 512, dict(intermediate_size=3072)),
    "widening": (512, 128, dict(intermediate_size=3072)),
    "attention": (2048, 512, dict(num_attention_heads=16, num_key_value_heads=4)),
    "tied": (2048, 512, dict(tie_word_embeddings=True, vocab_size=8192)),
    "logits": (256, 256, dict(vocab_size=8192, hidden_size=64, num_attention_heads=2,
                              intermediate_size=64)),
}


def config_of(mode=None, **overrides):
    config = tiny_config(hidden_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
                         intermediate_size=1536, num_hidden_layers=2, vocab_size=1024,
                         max_position_embeddings=8192) | overrides
    group = 64 if mode == "int4" else None
    return config | ({"quantization": {"mode": mode, "group_size": group}} if mode else {})


def filled(model):
    """A model with weights to multiply with, where they are not packed."""
    for t in [*model.parameters(), *model.buffers()]:
        t.data.zero_() if t.is_floating_point() else t.data.fill_(1)
    return model.requires_grad_(False).eval()


def bytes_held(model) -> int:
    """Of all tensors that a model's modules hold, packed ones too."""
    found = {}
    for module in model.modules():
        for t in [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]:
            if isinstance(t, torch.Tensor):  # a packed parameter is a new object of the same bytes
                key = t.data_ptr() if not t.is_mkldnn else id(module)
                found[key] = torch.ops.mkldnn._nbytes(t) if t.is_mkldnn else size(t)
    return sum(found.values())


def peak(work) -> int:
    """The most bytes that `work()` had allocated at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        work()
    now = most = 0
    for _, number in sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events()
                            if e.name() == "[memory]"):
        now += number
        most = max(most, now)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_peak_of_a_prompt_and_a_verification_is_just_below_what_is_computed(shape, mode, dtype):
    if shape == "widening" and (not mode or (mode, dtype) == ("int4", torch.bfloat16)):
        pytest.skip("nothing is widened, so that loading takes more")
    positions, rows, overrides = SHAPES[shape]
    hf = config_of(mode, **overrides)
    model = filled(skeleton(config_from(hf), dtype, "cpu"))
    prepare(model, dtype)
    e = Engine(model, LlamaDrafter(model), speculate_k=K, temperature=0.8, top_p=0.9)
    e.reserve(positions - K)
    e.tokens = [1] * (positions - K)

    @torch.inference_mode()
    def read():
        e.read(max(0, len(e.tokens) - rows))

    @torch.inference_mode()
    def verify():
        e.tokens = e.tokens[:-20]
        e.set_state(K)
        e.round()

    found = max(peak(read), peak(verify))
    m = memory(config_from(hf), dtype, positions, K + 1, at_once=rows)
    assert m.weights == bytes_held(model)
    assert m.cache == size(*e.cache.kv, e.cache.rope)
    assert found <= m.workspace <= 1.3 * found + M.THREAD, (found, m)


def test_answers_side_by_side_as_train_judge_reads_them():
    config = config_from(config_of())
    model = filled(skeleton(config, torch.float32, "cpu"))
    prepare(model, torch.float32)
    ids, cache = torch.ones(4, 512, dtype=torch.long), model.new_cache(512, 4)

    @torch.inference_mode()
    def read():
        model.features(ids, torch.arange(512), cache)

    m, found = memory(config, torch.float32, 512, 0, at_once=512, batch=4), peak(read)
    assert m.cache == size(*cache.kv, cache.rope)
    assert found <= m.workspace <= 1.3 * found + M.THREAD


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_loaded_share_holds_what_was_computed(n, mode, tmp_path, monkeypatch):
    hf = config_of(mode, tie_word_embeddings=n == 2)
    config = config_from(hf)
    model = filled(skeleton(config, torch.bfloat16, "cpu"))
    directory = save_checkpoint(tmp_path / "m", model, hf)
    save_file(dict([*model.named_parameters(), *model.named_buffers()]),
              directory / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        in_rank(monkeypatch, n - 1, n)
        share = {"build": tp.share, "read": tp.read_share(config)} if n > 1 else {}
        shared = checkpoint.load(directory, "cpu", dtype, **share)
        cache, m = shared.new_cache(512), memory(config, dtype, 512, K + 1, n)
        assert (m.weights, m.cache) == (bytes_held(shared), size(*cache.kv, cache.rope))
        assert len(cache.kv) == 2 and cache.kv[0].shape[3] == max(1, 2 // n)


def test_loading_takes_a_tensor_more_at_most(tmp_path):
    hf = config_of(vocab_size=16384)
    model = filled(skeleton(config_from(hf), torch.bfloat16, "cpu"))
    directory = save_checkpoint(tmp_path / "m", model, hf)
    m = memory(config_from(hf), torch.float32, 256, 1)
    found = peak(lambda: checkpoint.load(directory, "cpu", torch.float32))
    assert found <= m.total <= 1.1 * found


# ---------------------------------------------------------------- refusals

def cards(name: str, mode: str | None):
    hf = dict(PRESETS[name])
    if mode:
        hf["quantization"] = {"mode": mode, "group_size": 128 if mode == "int4" else None}
    return config_from(hf), torch.bfloat16, False


def refusal(models, free: float, monkeypatch, device="cuda", **more) -> str:
    monkeypatch.setattr(M, "free_memory", lambda device: free)
    with pytest.raises(UserError) as e:
        check_memory(models, 8192, K + 1, device, **more)
    return str(e.value)


def test_a_refusal_gives_the_figures_and_what_would_do(monkeypatch):
    large = {"target": cards("llama-3.1-70b", None), "draft": cards("llama-3.1-8b", None)}
    said = refusal(large, 80e9, monkeypatch)
    pattern = (r"this does not fit: target 141\.1 GB, draft 16\.1 GB, caches 3\.8 GB and workspace "
               r"(\d\.\d) GB need (\d+\.\d) GB, cuda has 80\.0 GB free; 4 processes would do, "
               r"with (\d+\.\d) GB each; or take smaller models, quantize.py --mode int8")
    workspace, total, each = map(float, re.fullmatch(pattern, said).groups())
    assert abs(141.1 + 16.1 + 3.8 + workspace - total) < 0.2 and 40 < each < 80
    # More processes do not help on a CPU; a mode is not advised twice.
    small = {"target": (cards("llama-3.1-8b", "int4")[0], torch.float32, False)}
    said = refusal(small, 6e9, monkeypatch, "cpu")
    assert said.endswith("cpu has 6.0 GB free; take smaller models, --dtype bfloat16")
    said = refusal(small, 1e6, monkeypatch)
    assert said.endswith("cuda has 1 MB free; take smaller models, --dtype bfloat16")
    assert refusal(small, 6e9, monkeypatch, advice="sell it").endswith("each; or sell it")


def test_what_fits_is_not_refused_and_the_poorest_rank_decides(monkeypatch):
    models = {"target": cards("llama-3.1-8b", None)}
    monkeypatch.setattr(M, "free_memory", lambda device: 20e9)
    check_memory(models, 8192, K + 1, "cuda")
    monkeypatch.setattr(M, "of_all_ranks", lambda value: [value, 8e9])
    in_rank(monkeypatch, 0)
    assert "GB on each of 2 ranks, cuda has 8.0 GB free; 4 processes would do" in refusal(
        models, 20e9, monkeypatch)


def test_where_free_memory_cannot_be_told_nothing_is_refused(monkeypatch):
    all_of_it = M.free_memory("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0.2 < M.free_memory("cpu") / all_of_it < 0.3 or all_of_it == math.inf
    monkeypatch.setattr(M.Path, "read_text", lambda self: open("/no/such/file"))
    assert M.free_memory("cpu") == math.inf


DEMO_PAIR = "--target", DEMO / "target", "--draft", DEMO / "draft"
PROBLEM = json.loads((DEMO / "problems.jsonl").read_text().splitlines()[0])


def judge_data(path):
    rows = [{"prompt": f"{PROBLEM['prompt']} {i}", "answer": "one two three", "error": error}
            for i in range(20) for error in (None, [4, 7])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path):
    path.write_text(json.dumps({
        "prompt": PROBLEM["prompt"], "answer": "no", "source_model": "m", "chat": False,
        "ended": True, "right": False, "max_new_tokens": 220, "task": "demo",
        "example": PROBLEM}) + "\n")
    return path


COMMANDS = {
    "generate": lambda tmp: (generate, *DEMO_PAIR, "--prompt", "one",
                             "--max_new_tokens", "245"),
    "interactive": lambda tmp: (generate, *DEMO_PAIR, "--interactive"),
    "eval": lambda tmp: (evaluate, *DEMO_PAIR, "--task", "demo", "--data", DEMO / "problems.jsonl",
                         "--limit", "1", "--rules", "target,standard", "--out", tmp / "out"),
    "replay": lambda tmp: (evaluate, *DEMO_PAIR, "--rules", "topk:3", "--replay",
                           texts(tmp / "texts.jsonl")),
    "train": lambda tmp: (train_judge, "--target", DEMO / "target", "--data",
                          judge_data(tmp / "data.jsonl"), "--out", tmp / "judge"),
    "answers": lambda tmp: (make_judge_data, "generate", "--prompts", DEMO / "problems.jsonl",
                            "--models", DEMO / "target", "--limit", "1", "--temperatures", "0",
                            "--max_new_tokens", "300", "--out", tmp / "answers.jsonl"),
    "mine": lambda tmp: (make_judge_data, "mine", *DEMO_PAIR, "--method", "first_error", "--data",
                         answers(tmp / "answers.jsonl"), "--out", tmp / "mined.jsonl"),
    "benchmark": lambda tmp: (benchmark, *DEMO_PAIR, "--speculate_k", "4", "--no_compile",
                              "--max_new_tokens", "16"),
}


def texts(path):
    path.write_text(json.dumps({"prompt": PROBLEM["prompt"], "text": "one two three"}) + "\n")
    return path


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_in_one_line_before_it_loads(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(M, "free_memory", lambda device: 30e6)
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(SystemExit) as e:
        run_command(monkeypatch, *COMMANDS[name](tmp_path), "--device", "cpu")
    out, err = capsys.readouterr()
    assert e.value.code == 2 and err.count("\n") == 1 and not out
    assert re.fullmatch(r"error: this does not fit: \w+ \d+ MB, .*caches \d+ MB and workspace "
                        r"\d+ MB need \d+ MB, cpu has 30 MB free; take .*--dtype bfloat16\n", err)


@pytest.mark.parametrize("name", ["generate", "eval", "answers", "mine"])
def test_what_is_counted_is_what_the_engines_reserve(name, tmp_path, monkeypatch):
    counted, reserved, real, reserve = [], [], M.memory, Engine.reserve
    monkeypatch.setattr(M, "memory", lambda config, dtype, positions, *rest, **more: (
        counted.append(positions), real(config, dtype, positions, *rest, **more))[1])
    monkeypatch.setattr(Engine, "reserve", lambda self, length: (
        reserve(self, length), reserved.append(self.capacity)))
    run_command(monkeypatch, *COMMANDS[name](tmp_path), "--device", "cpu")
    assert max(counted) == max(reserved) >= 256, (counted, reserved)


def test_a_replay_reads_whole_texts(tmp_path, monkeypatch):
    counted, made, real, new_cache = [], [], M.memory, Transformer.new_cache
    monkeypatch.setattr(M, "memory", lambda config, dtype, positions, rows, *rest, **more: (
        counted.append((positions, min(rows, positions))),
        real(config, dtype, positions, rows, *rest, **more))[1])
    monkeypatch.setattr(Transformer, "new_cache", lambda self, length, *rest: (
        self.norm.weight.is_meta or made.append((length, length)),
        new_cache(self, length, *rest))[1])
    run_command(monkeypatch, *COMMANDS["replay"](tmp_path), "--device", "cpu")
    assert made and {*counted} == {*made}


# ---------------------------------------------------------------- README's table

def test_readmes_table_is_what_the_function_gives():
    readme = (ROOT / "README.md").read_text()
    header, *rows = (line.strip("| ").split(" | ") for line in re.findall(
        r"^\| (?:mode|bf16|int8, fp8|int4) \|.*$", readme, re.M))
    assert header[1:] == ["8B", "70B", "70B + 8B", "405B", "405B + 8B"] and len(rows) == 3
    for names, *cells in rows:
        for mode in names.split(", "):
            for models, cell in zip(header[1:], cells, strict=True):
                loaded = {b: cards(f"llama-3.1-{b.lower()}", mode if mode != "bf16" else None)
                          for b in models.split(" + ")}
                found = [gpus_needed(loaded, 8192, free << 30) for free in (78, 139)]
                assert " / ".join(map(str, found)) == cell, (models, mode)


def test_seventy_billion_in_a_byte_each_fit_one_h200_with_their_draft():
    for mode in ("int8", "fp8"):
        pair = {"target": cards("llama-3.1-70b", mode), "draft": cards("llama-3.1-8b", mode)}
        assert gpus_needed(pair, 8192, 139 * (1 << 30)) == 1
        # RESULTS.md: on an H200 the int8 pair reserved 81 GB with a short cache.
        parts = M.needed(pair, 512, K + 1, 1, "cuda", 1.0)
        assert 80e9 < sum(parts.values()) < 1.15 * 81e9
