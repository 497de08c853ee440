"""Any rule in Hugging Face's forward: our engine's text, and what it accepts a round; quantized
checkpoints widened for it.
"""
import json
from pathlib import Path

import pytest
import torch

import benchmark as B
import linear
import quantize
from checkpoint import config_from
from common import UserError
from drafters.llama import LlamaDrafter
from engine import Engine, generate
from evaluation import hf_peer
from evaluation.benchmark_report import real_rows
from evaluation.dummy import build, find
from evaluation.real import Run, variant
from helpers import random_model, run_command, tiny_config
from judge import JudgeHead
from linear import MODES, QuantizedLinear, prepare
from load import load_judge, parse_rule, read_vocabulary
from model import Transformer

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"
CONFIG = tiny_config()
QWEN = tiny_config(architectures=["Qwen3ForCausalLM"], head_dim=16, tie_word_embeddings=True)
RULES = "standard", "topk:3", "typical:0.5", "kl:1", "judge", "fly:0,1", "topk:60@x"
SPAN = 60, 41  # x's: it is open in a prompt


def compare(models, configs, head, prompts, k, max_new_tokens, eos_ids=()):
    """The accepted per round of each rule and prompt, after the comparison with our engine."""
    target, draft = models
    spelled, means = {rule: parse_rule(rule) for rule in RULES}, {}
    rules = {rule: {"accept": name, "parameter": parameter, "span": span and SPAN}
             for rule, (name, parameter, span) in spelled.items()}
    calls = hf_peer.calls(*models, configs, [k], max_new_tokens, eos_ids, rules, head)
    assert list(calls) == ["hf target", f"hf assisted K={k}", *(f"hf {r} K={k}" for r in rules)]
    for name, rule in rules.items():
        engine = Engine(target, LlamaDrafter(draft), head, speculate_k=k, **rule)
        for prompt in prompts:
            tokens, mean = calls[f"hf {name} K={k}"](prompt)
            ours = generate(engine, prompt, max_new_tokens, eos_ids)
            assert (tokens, mean) == (ours.tokens, pytest.approx(ours.mean_accepted)), name
            assert name != "standard" or tokens == calls["hf target"](prompt)[0]
            means.setdefault(name, []).append(mean)
    return means


def near(model, config: dict, noise: float) -> Transformer:
    """A draft that often agrees: the model's weights and noise, of the vocabulary it has rows for.
    """
    draft = random_model(config, seed=9, scale=noise)
    for name, p in draft.named_parameters():
        like = model.state_dict()[name]
        if "norm" in name:
            p.data.copy_(like)
        else:
            p.data[:len(like)] += like[:len(p)]
    return draft


@pytest.mark.parametrize("target, draft_rows, k", [
    (CONFIG, 101, 1), (QWEN, 96, 5), (CONFIG, 128, 4),
], ids=["one token", "qwen3, draft with fewer rows", "draft with more rows"])
def test_every_rule_makes_our_text(monkeypatch, target, draft_rows, k):
    rows, accept_mask = set(), hf_peer.accept_mask
    monkeypatch.setattr(hf_peer, "accept_mask", lambda v, *rule: (
        v.draft_logits is not None and rows.add(v.draft_logits.shape), accept_mask(v, *rule))[1])
    small = target | {"vocab_size": draft_rows}
    model = random_model(target, seed=3)
    models = model, near(model, small, 0.015)
    torch.manual_seed(0)
    head = JudgeHead(torch.randn(1, 64) / 8, torch.zeros(1), 0.5, "")
    text = generate(Engine(model), [98, 7], 14).tokens
    prompts = [[98, 7], list(range(60, 99))]
    means = compare(models, [target, small], head, prompts, k, 14, eos_ids=(text[9],))
    assert 0 < sum(means["standard"]) < 2 * k and len(set(map(tuple, means.values()))) > 2, means
    assert rows == {(k, min(draft_rows, 101))}  # kl's: without the rows that pad the draft


@pytest.fixture(scope="module")
def int4_draft(tmp_path_factory):
    out = tmp_path_factory.mktemp("int4") / "draft"
    with pytest.MonkeyPatch.context() as m:
        run_command(m, quantize, "--checkpoint_dir", DEMO / "draft", "--mode", "int4",
                    "--group_size", "32", "--out", out)
    return out


def test_the_shipped_judge_and_a_quantized_draft(int4_draft):
    sources = [find(str(path), None, "model") for path in (DEMO / "target", int4_draft)]
    models = [build(source, "cpu", torch.float32) for source in sources]
    _, tokenizer = read_vocabulary(DEMO / "target")
    line = (DEMO / "problems.jsonl").read_text().partition("\n")[0]
    prompts = [tokenizer.encode(json.loads(line)["prompt"])]
    head = load_judge(DEMO / "judge.safetensors", DEMO / "target")
    means = compare(models, [s.config for s in sources], head, prompts, 8, 30, tokenizer.eos_ids)
    assert sum(means["judge"]) > 1.5 * sum(means["standard"])


def test_the_memory_of_widened_weights_is_counted(int4_draft, monkeypatch):
    def check(models, *more):
        seen.update(models)
        raise UserError("enough")

    seen = {}
    monkeypatch.setattr(B, "check_memory", check)
    flags = ["--target", str(DEMO / "target"), "--draft", str(int4_draft), "--device", "cpu",
             "--draft_dtype", "bfloat16", "--prompts", str(DEMO / "problems.jsonl")]
    for peer, names in ([], []), (["--peer", "hf"], ["draft in Hugging Face"]):
        with pytest.raises(UserError, match="^enough$"):
            B.main([*flags, *peer])
        assert list(seen) == ["target", "draft", *names]
    draft = find(str(DEMO / "draft"), None, "draft").model_config
    count = sum(p.numel() for p in Transformer(draft).parameters())
    assert seen["draft in Hugging Face"] == (2 * count, 0, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_weights_are_widened(mode, dtype, monkeypatch):
    """bfloat16 int4 is packed for the CPU: there is no weight to read."""
    monkeypatch.setattr(linear, "scales_rows", lambda device: False)
    quantization = {"mode": mode, "group_size": 32 if mode == "int4" else None, "parent": ""}
    config = tiny_config(num_hidden_layers=1, vocab_size=112, quantization=quantization)
    torch.manual_seed(0)
    model, wide = Transformer(config_from(config)), {}
    for p in model.parameters():
        p.data = torch.rand_like(p).to(dtype)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            n_in = 96 if name.endswith("w2") else 64
            tensors = layer.quantize(torch.randn(len(layer.weight), n_in))
            for key, value in tensors.items():
                setattr(layer, key, value)
            wide[name] = widen(**tensors)
    prepare(model.requires_grad_(False), dtype)
    theirs = hf_peer.to_hf(model, config).state_dict()
    assert len(wide) == 5
    for ours, parts in (("layers.0.attn.wqkv", ("self_attn.q_proj", "self_attn.k_proj",
                                                "self_attn.v_proj")),
                        ("layers.0.attn.wo", ("self_attn.o_proj",)),
                        ("layers.0.ffn.w13", ("mlp.gate_proj", "mlp.up_proj")),
                        ("layers.0.ffn.w2", ("mlp.down_proj",))):
        got = torch.cat([theirs[f"model.layers.0.{part}.weight"] for part in parts])
        assert got.dtype == dtype and got.is_contiguous()
        torch.testing.assert_close(got.double(), wide[ours], rtol=2**-7 if dtype == torch.bfloat16
                                   else 1e-6, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(theirs["model.norm.weight"], model.norm.weight)


def widen(weight, scale, zero=None):
    """The weights that linear.py says the tensors stand for, in float64."""
    if zero is None:  # so is an int4 checkpoint's LM head
        return weight.double() * scale.double()[:, None]
    pairs = weight.unflatten(1, (-1, 16))
    q = torch.cat((pairs & 15, pairs >> 4), dim=2).double()
    return ((q - 8) * scale.double()[..., None] + zero.double()[..., None]).flatten(1)


def test_the_table_says_the_speed_up_over_both_targets():
    rows = {name: [(seconds, Run([1] * 10, mean))] for name, seconds, mean in (
        ("target", 2, None), ("judge K=4", 1, 3.5), ("hf target", 5, None), ("hf judge K=4", 4, 2))}
    of = lambda hf: real_rows({"prompts": 1, "variants": [
        variant(name, row, rows["target"], hf) for name, row in rows.items()]})
    with_hf, without = of(rows["hf target"]), of(None)
    assert [row[2:4] for row in with_hf] == [["speed-up", "over hf target"], ["1.00x", "2.50x"], [
        "2.00x", "5.00x"], ["0.40x", "1.00x"], ["0.50x", "1.25x"]]
    assert with_hf[4][6] == "2.00" and [row[:3] + row[4:] for row in with_hf] == without


@pytest.mark.parametrize("drafters", ["eagle", "eagle-tree", "ngram"])
def test_a_drafter_that_hugging_face_has_not_is_refused(drafters):
    with pytest.raises(UserError, match="^--peer hf drafts with --draft alone, no head, no tree; "
                       "add llama to --drafters$"):
        B.parse_args(["--target", str(DEMO / "target"), "--draft", str(DEMO / "draft"),
                      "--eagle", str(DEMO / "eagle"), "--drafters", drafters, "--peer", "hf",
                      "--prompts", str(DEMO / "problems.jsonl")])
