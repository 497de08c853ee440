"""Pairs with one tokenizer whose embeddings are padded to different sizes: 101 rows both have, and
19 more of the target or of the draft, which it would often choose. And pairs that are refused.
"""
import functools
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import transformers

import benchmark
import convert_hf_checkpoint
import eval as evaluate
import generate as G
import make_judge_data as M
import rules
import train_judge
from checkpoint import config_from
from common import UserError, read_json
from engine import Engine, generate
from families import FAMILIES
from graphs import warm_up
from helpers import edit_json, random_model, randomize, run_command, save_checkpoint, tiny_config
from judge import RULES, Verified
from judge_data import mining
from load import load_models, read_vocabulary
from model import Transformer
from test_compile import compiled
from test_generate import (  # noqa: F401
    ROOT,
    check_distribution,
    greedy,
    head,
    make,
    short_spans,
    small_pair,
    tokens,
)
from test_tp import DEMO, SHARED, script, torchrun

LARGER = "target", "draft"  # which of the two has more rows
PARAMETERS = {"topk": 3, "kl": 2.0, "fly": (0.0, 1), "thresholds": (0.0, 1.0)}
COMMON = 101


def with_rows(model, config: dict, rows: int) -> Transformer:
    """The model with the first `rows` of its embedding and LM head."""
    small = Transformer(config_from(config | {"vocab_size": rows})).requires_grad_(False)
    cut = lambda name, w: w[:rows] if name in ("embed.weight", "output.weight") else w
    small.load_state_dict({name: cut(name, w) for name, w in model.state_dict().items()})
    return small


@functools.cache
def pair(larger: str):
    """(target, draft): a draft that agrees now and then."""
    config = tiny_config(vocab_size=120)
    models = {}
    for name, noise in (("target", 0.0), ("draft", 0.03)):
        model = random_model(config, seed=1)
        for layer in model.layers:  # they agree now and then though the draft reads other ids
            layer.attn.wo.weight.mul_(0.1)
        for p in model.parameters():
            p.data += noise * p.data.std() * torch.randn_like(p)
        models[name] = model if name == larger else with_rows(model, config, COMMON)
    return models["target"], models["draft"]


def prompt_of(target, n=7):
    """A prompt that holds the target's last id."""
    return [*tokens(n), target.config.vocab_size - 1, 5, target.config.vocab_size - 1]


@functools.cache
def alone(larger: str, n=50):
    """The target's greedy text from nothing but full prefills."""
    target, _ = pair(larger)
    ids = prompt_of(target)
    with torch.inference_mode():
        for _ in range(n):
            ids = [*ids, greedy(target, ids)]
    return ids[-n:]


def spied(engine):
    """The engine, and what its drafter proposes from then on: [(drafted, logits), ...]."""
    seen, propose = [], engine.drafter.propose
    engine.drafter.propose = lambda *a: seen.append(propose(*a)) or seen[-1]
    return engine, seen


# ---------------------------------------------------------------- the target's text

@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("larger", LARGER)
def test_greedy_text_is_that_of_the_target_alone(larger, k):
    target, draft = pair(larger)
    engine, seen = spied(make(target, draft, speculate_k=k))
    r = generate(engine, prompt_of(target), 50)
    assert r.tokens == alone(larger) and r.mean_accepted > 0.3
    assert max(int(drafted.max()) for drafted, _ in seen) < COMMON
    beyond = sum(t >= COMMON for t in r.tokens)
    assert 5 < beyond < 45 if larger == "target" else beyond == 0
    if larger == "draft":  # by itself it would choose ids that the target does not have
        own = generate(Engine(draft), prompt_of(target), 50).tokens
        assert 5 < sum(t >= COMMON for t in own) < 45


@pytest.mark.parametrize("larger", LARGER)
@pytest.mark.parametrize("temperature, top_k, top_p, runs", [
    (1.0, None, None, 4_000),
    pytest.param(1.3, 6, 0.9, 4_000, marks=pytest.mark.slow)])
def test_sampled_text_has_the_targets_distribution(larger, temperature, top_k, top_p, runs):
    """Ids that only the target has included: they come from the residual or after it alone."""
    sizes = dict(zip(("target", "draft"), (9, 7) if larger == "target" else (7, 9)))
    target, draft = small_pair(sizes["target"])[0], small_pair(sizes["draft"])[1]
    engine, seen = spied(make(target, draft, speculate_k=2, temperature=temperature, top_k=top_k,
                              top_p=top_p, seed=1))
    outcomes = check_distribution(engine, runs)
    assert outcomes[0] > runs / 100 < outcomes[1]
    assert max(int(drafted.max()) for drafted, _ in seen) == 6 and seen[0][1].shape == (2, 7)


def test_the_sampled_target_does_choose_ids_of_its_own():
    """So the test above is about them: as its first new token, and in the joint distribution."""
    target = small_pair(9)[0]
    with torch.inference_mode():
        ids = [3, 1, 4, greedy(target, [3, 1, 4])]
        p = target(torch.tensor([ids]), torch.arange(4), target.new_cache(4))[0][0, -1].softmax(-1)
    assert p[7:].sum() > 0.05, p


# ---------------------------------------------------------------- rules

@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("larger", LARGER)
def test_every_rule_runs(larger, rule, temperature):
    target, draft = pair(larger)
    make_one = lambda name, parameter=None: make(target, draft, head(bias=1.0), name, parameter, 4,
                                                 temperature, seed=2)
    r = generate(make_one(rule, PARAMETERS.get(rule)), prompt_of(target), 60)
    assert len(r.tokens) == 60 and sum(r.accept_counts) == r.rounds
    plain = generate(make_one("standard"), prompt_of(target), 60)
    adds = rule != "standard" and (temperature or not RULES[rule].needs_coin)
    assert not adds or r.mean_accepted > plain.mean_accepted and rule in r.sources
    assert all(t < COMMON for t, s in zip(r.tokens, r.sources) if s != "target")


@pytest.mark.parametrize("larger", LARGER)
def test_a_judge_that_says_yes_gives_the_text_of_the_draft_over_the_common_columns(larger):
    """Every K tokens the draft's argmax among them, then the target's own token, from scratch."""
    target, draft = pair(larger)
    k, ids = 4, [*prompt_of(target), alone(larger)[0]]
    last = draft.config.vocab_size - 1
    with torch.inference_mode():
        for _ in range(6):
            for _ in range(k):
                read = torch.tensor([[min(t, last) for t in ids]])
                logits = draft(read, torch.arange(len(ids)), draft.new_cache(len(ids)))[0][0, -1]
                ids.append(int(logits[:COMMON].argmax()))
            ids.append(greedy(target, ids))
    r = generate(make(target, draft, head(bias=50.0), "judge", speculate_k=k), prompt_of(target),
                 1 + 6 * (k + 1))
    assert r.accept_counts == [0] * k + [6] and prompt_of(target) + r.tokens == ids
    assert larger == "draft" or max(ids[-20:]) >= COMMON


def test_kl_over_the_common_columns():
    """Against the generalised divergence in float64: sum p log(p/q) - p + q over common columns."""
    torch.manual_seed(0)
    p, q = torch.randn(200, 12), torch.randn(200, 9)
    p[::3, 9:] += 5  # the target expects what the draft cannot draft
    p[1::3, 9:] -= 30
    q[1::3] = p[1::3, :9] + 0.3 * torch.randn(67, 9)
    v = Verified(p, None, torch.zeros(200, dtype=torch.long), q)
    full, common = p.double().softmax(-1), q.double().softmax(-1)
    a = full[:, :9]
    want = (a * (a / common).log() - a + common).sum(-1)
    assert (want >= 0).all() and want.min() < 0.05 < 0.5 < want[::3].min()
    sure = full.amax(-1) > rules.SURE
    assert 0 < sure.sum() < 200
    for d in (0.05, 0.2, 0.7, 1.5):
        clear = (want - d).abs() > 1e-4
        got, expected = rules.kl(v, d), (want < d) & ~sure
        assert torch.equal(got[clear], expected[clear]) and 0 < got.sum() < 200, d


# ---------------------------------------------------------------- compiled, on several processes

@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("larger, temperature", [("target", 0.9), ("draft", 0.0)])
def test_compiled_rounds_give_the_eager_tokens(larger, temperature):
    target, draft = pair(larger)
    settings = dict(speculate_k=2, temperature=temperature, seed=3)
    want = generate(make(target, draft, **settings), prompt_of(target), 40)
    engine = compiled(target, draft, **settings)
    warm_up(engine, 10, 50)
    got = generate(engine, prompt_of(target), 40)
    assert (got.tokens, got.accept_counts) == (want.tokens, want.accept_counts)
    assert got.mean_accepted > 0


@pytest.mark.parametrize("sizes, clamps", [((101, 101), 0), ((101, 120), 0), ((120, 101), 1)])
def test_ids_are_clamped_only_where_the_draft_may_lack_them(sizes, clamps):
    """In the graph of the draft's steps, which runs every round."""
    target, draft = (random_model(tiny_config(vocab_size=n), seed=n) for n in sizes)
    engine, graphs = make(target, draft, speculate_k=2), []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    engine.drafter.steps = torch.compile(engine.drafter.steps, backend=backend, fullgraph=True)
    generate(engine, tokens(5), 6)
    assert graphs and all(code.count("clamp") == clamps for code in graphs)


@pytest.fixture(scope="module")
def demo_tokens(tmp_path_factory):
    """Checkpoints with the demo's tokenizer: `plain1` and `plain2` have one row for each token,
    `padded1` and `padded2` six more. Those with a 2 differ a little from those with a 1.
    """
    home = tmp_path_factory.mktemp("demo_tokens")
    _, tokenizer = read_vocabulary(DEMO / "target")
    big = tiny_config(vocab_size=tokenizer.vocab_size + 6, max_position_embeddings=512)
    for seed in (1, 2):
        model = random_model(big, seed=1)
        model.output.weight[tokenizer.vocab_size:] *= 2
        for p in model.parameters():
            p.data += 0.03 * (seed - 1) * torch.randn_like(p)
        for name, rows in (("padded", big["vocab_size"]), ("plain", tokenizer.vocab_size)):
            config = big | {"vocab_size": rows}
            d = save_checkpoint(home / f"{name}{seed}", with_rows(model, big, rows), config)
            (d / "tokenizer.model").write_bytes((DEMO / "target/tokenizer.model").read_bytes())
    return home


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("target, draft", [("padded1", "plain2"), ("plain1", "padded2")])
def test_two_processes_say_what_one_says(demo_tokens, tmp_path, target, draft):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    args = ("--target", demo_tokens / target, "--draft", demo_tokens / draft, "--prompt", "Mira",
            "--device", "cpu", "--speculate_k", "3", "--max_new_tokens", "30", "--json")
    done = subprocess.run([sys.executable, ROOT / "generate.py", *args, one], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    again = torchrun(script(tmp_path, SHARED), *args, two)
    assert again.returncode == 0, again.stderr
    one, two = json.loads(one.read_text()), json.loads(two.read_text())
    assert two["tokens"] == one["tokens"] and two["accept_counts"] == one["accept_counts"]
    common = read_json(demo_tokens / "plain1" / "config.json")["vocab_size"]
    assert (max(one["tokens"]) >= common) == (target == "padded1")


# ---------------------------------------------------------------- checkpoints and commands

@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Checkpoints converted from transformers': target and draft of one tokenizer and different
    padding, and `thinking`, whose tokenizer has tokens more.
    """
    home = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as m:
        for name, family, more in (("target", "qwen2.5", 64), ("draft", "qwen2.5", 3),
                                   ("thinking", "qwen3", 64)):
            hf = home / f"hf-{name}"
            hf.mkdir()
            FAMILIES[family](hf)
            rows = max(json.loads((hf / "tokenizer.json").read_text())["added_tokens"],
                       key=lambda t: t["id"])["id"] + 1 + more
            torch.manual_seed(1)
            config = transformers.LlamaConfig(**tiny_config(
                vocab_size=rows, max_position_embeddings=256, eos_token_id=1))
            randomize(transformers.LlamaForCausalLM(config)).save_pretrained(hf)
            run_command(m, convert_hf_checkpoint, "--checkpoint_dir", hf, "--out", home / name,
                        "--dtype", "float32")
    return home


@pytest.mark.parametrize("target, draft", [("target", "draft"), ("draft", "target")])
def test_generate_takes_a_pair_that_is_padded_differently(converted, tmp_path, monkeypatch, target,
                                                          draft):
    sizes = [read_json(converted / n / "config.json")["vocab_size"] for n in (target, draft)]
    assert abs(sizes[0] - sizes[1]) == 61
    made = []
    for flags in (), ("--draft", converted / draft), ("--draft", converted / draft, "--accept",
                                                      "kl:1"):
        out = tmp_path / f"{len(made)}.json"
        run_command(monkeypatch, G, "--target", converted / target, "--prompt", "the cat",
                    "--device", "cpu", "--max_new_tokens", 60, "--ignore_eos", "--json", out,
                    *flags)
        made.append(json.loads(out.read_text()))
    assert made[0]["tokens"] == made[1]["tokens"] and len(made[2]["tokens"]) == 60
    text = read_vocabulary(converted / target)[1].decode(made[1]["tokens"])
    assert made[1]["text"] == text  # padding is no text


def test_different_tokenizers_are_refused_by_the_first_difference(converted, monkeypatch, capsys):
    _, ours = read_vocabulary(converted / "target")
    with pytest.raises(SystemExit) as stop:
        run_command(monkeypatch, G, "--target", converted / "target", "--draft",
                    converted / "thinking", "--prompt", "x", "--device", "cpu")
    err = capsys.readouterr().err
    i = ours.vocab_size
    assert stop.value.code == 2 and err.count("\n") == 1 and err == (
        f"error: draft {converted}/thinking and target {converted}/target have different "
        f"tokenizers: '<tool_response>' is id {i} in one and absent in the other; speculation "
        "needs the same\n")


@pytest.mark.parametrize("short", ["target", "draft"])
def test_a_tokenizer_with_more_tokens_than_rows_is_refused_before_any_weight(demo_tokens, tmp_path,
                                                                             monkeypatch, short):
    sides = {}
    for name in ("target", "draft"):  # without weights
        (d := tmp_path / name).mkdir()
        for file in ("config.json", "tokenizer.model"):
            (d / file).write_bytes((demo_tokens / "plain1" / file).read_bytes())
        sides[name] = d
    rows = read_json(sides[short] / "config.json")["vocab_size"]
    edit_json(sides[short] / "config.json", vocab_size=rows - 1)
    with pytest.raises(UserError, match=f"{short}/tokenizer.model has {rows} tokens, .*"
                       f"{short}/config.json says vocab_size {rows - 1}: they do not"):
        load_models(*sides.values())
    data = tmp_path / "data.jsonl"
    data.write_text("".join(
        json.dumps({"prompt": f"{i} pens?", "answer": "4 pens", "error": e}) + "\n"
        for i in range(9) for e in (None, [0, 1])))
    with pytest.raises(UserError, match=f"has {rows} tokens, .* says vocab_size {rows - 1}"):
        monkeypatch.setattr(sys, "argv", list(map(str, (
            "train_judge.py", "--target", sides[short], "--data", data, "--device", "cpu", "--out",
            tmp_path / "judge.safetensors"))))
        train_judge.main()


def test_a_rule_that_needs_a_judge_needs_a_head():
    target, draft = pair("target")
    with pytest.raises(UserError, match="rule judge needs head=JudgeHead"):
        make(target, draft, accept="judge")
    assert Engine(target, accept="judge").accept == "target"  # alone, no rule is asked


# ---------------------------------------------------------------- the other commands

@pytest.mark.parametrize("sizes", [(120, 101), (101, 120)])
def test_benchmark_simulates_a_pair_that_padding_can_explain(tmp_path, sizes):
    flags = []
    for flag, rows in zip(LARGER, sizes):
        path = tmp_path / f"{flag}.json"
        path.write_text(json.dumps(tiny_config(vocab_size=rows, max_position_embeddings=512)))
        flags += [f"--{flag}", str(path)]
    r = benchmark.main([*flags, "--no_compile", "--device", "cpu", "--repeats", "1",
                        "--max_new_tokens", "12", "--speculate_k", "3", "--accepted", "2"])
    assert r["simulated"]["points"][0]["tokens_per_sec"] > 0
    edit_json(tmp_path / "draft.json", vocab_size=sizes[0] + 1024)
    with pytest.raises(UserError, match=f"{sizes[0] + 1024} tokens, target .* one of {sizes[0]}: "
                       "more than padding explains"):
        benchmark.main([*flags, "--device", "cpu"])


@pytest.mark.parametrize("target, draft", [("padded1", "plain2"), ("plain1", "padded2")])
def test_benchmark_and_replay_of_real_checkpoints(demo_tokens, tmp_path, target, draft):
    """Hugging Face beside ours, too: in every way it makes the target's text."""
    models = ["--target", str(demo_tokens / target), "--draft", str(demo_tokens / draft),
              "--device", "cpu"]
    r = benchmark.main([*models, "--prompts", str(DEMO / "problems.jsonl"), "--no_compile",
                        "--peer", "hf", "--repeats", "2", "--max_new_tokens", "30",
                        "--speculate_k", "3", "--accepted", "2"])
    variants = {v["variant"]: v for v in r["real"]["variants"]}
    assert list(variants) == ["target", "standard K=3", "hf target", "hf assisted K=3",
                              "hf standard K=3"]
    assert all(v["same_tokens_as_target"] == 2 for v in variants.values()), variants
    assert variants["standard K=3"]["mean_accepted"] > 0

    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"prompt": "Question: Mira has 5 pens.", "text": " She has 5."}))
    evaluate.main(["--replay", str(texts), *models, "--rules", "standard,kl:1e9,topk:2000",
                   "--out", str(tmp_path / "out")])
    rules = json.loads((tmp_path / "out" / "replay.json").read_text())["rules"]
    assert rules["topk:2000"]["rejected"] == 0 < rules["standard"]["rejected"]
    assert rules["kl:1000000000"]["rejected"] < rules["standard"]["rejected"]


@pytest.mark.parametrize("target, draft", [("padded1", "plain2"), ("plain1", "padded2")])
def test_autojudge_walks_a_pair_that_is_padded_differently(demo_tokens, tmp_path, monkeypatch,
                                                           target, draft):
    """Neither is given an id that it has no row for: the target's padding is clamped for the draft,
    the draft's own is passed over.
    """
    home, seen, greedy_token = {}, [], mining.greedy_token
    for name, source in ("target", target), ("draft", draft):  # every seventh token ends an answer
        home[name] = shutil.copytree(demo_tokens / source, tmp_path / name)
        edit_json(home[name] / "config.json", eos_token_id=[2, *range(6, 1000, 7)])

    def spied(model, prompt):
        ask = greedy_token(model, prompt)
        return lambda prefix: seen.append((prefix, ask(prefix))) or seen[-1][1]

    monkeypatch.setattr(mining, "greedy_token", spied)
    monkeypatch.setattr(mining, "characters", lambda *_: None)  # the walk alone
    monkeypatch.setattr(M.TASKS["demo"], "score", lambda *_: SimpleNamespace(right=True))
    lines = [{"prompt": f"Mira has {n} pens", "chat": False, "answer": "", "where": "", "id": n,
              "max_new_tokens": 60, "task": "demo", "example": {}} for n in range(6)]
    args = SimpleNamespace(**home, allow_code_execution=False, device="cpu", dtype=torch.float32,
                           speculate_k=3)
    miner = M.Miner(args, lines)
    for line in lines:
        miner.autojudge(line)
    common = read_vocabulary(DEMO / "target")[1].vocab_size
    read, said = (max(t for t in kind) for kind in ((t for p, _ in seen for t in p),
                                                    (t for _, t in seen)))
    assert (read >= common) == (target == "padded1") and (said >= common) == (draft == "padded2")
