"""What README promises to those who extend: a rule is one function and one row of RULES, a drafter
is one object. Both are registered here, at run time, and no other code changes.
"""
import json
import sys

import pytest
import torch

import benchmark
import eval as evaluate
import generate as G
from common import UserError
from demo.pair import HOME
from drafters.drafter import Drafter
from engine import Engine, generate
from judge import RULES, Rule, Verified
from load import parse_rule, rule_help
from test_generate import alone, check_distribution, models, small_pair, tokens

PAIR = ["--target", str(HOME / "target"), "--draft", str(HOME / "draft"), "--device", "cpu"]
DATA = str(HOME / "problems.jsonl")


def gap(v: Verified, m: float):
    """Accept where the target's top-1 and top-2 logits are closer than m."""
    top = v.logits.topk(2).values
    return top[:, 0] - top[:, 1] < m


@pytest.fixture
def new_rule(monkeypatch):
    row = Rule(gap, "M", "top-1 and top-2 logits closer than M, from 0", valid=lambda m: m >= 0)
    monkeypatch.setitem(RULES, "gap", row)


def test_help_and_errors_know_the_new_rule(new_rule, capsys):
    assert "gap:M, top-1 and top-2 logits closer than M" in rule_help()
    with pytest.raises(SystemExit):
        G.parse_args(["--help"])
    assert "gap:M" in capsys.readouterr().out
    for bad, use in (("gap", "gap:M, M: top-1"), ("gap:-1", "gap:M, M"), ("gaps:2", ".*, gap:M,")):
        with pytest.raises(UserError, match=f"not a rule; use {use}"):
            parse_rule(bad)


def test_a_new_rule_runs_in_generate(new_rule, tmp_path, monkeypatch, capsys):
    out, made = tmp_path / "out.json", {}
    prompt = json.loads(open(DATA).readline())["prompt"]
    for rule in ("standard", "gap:0", "gap:3", "gap:1e9"):
        monkeypatch.setattr(sys, "argv", ["generate.py", *PAIR, "--prompt", prompt, "--accept",
                                          rule, "--max_new_tokens", "60", "--json", str(out)])
        G.main()
        made[rule] = json.loads(out.read_text())
    assert made["gap:3"]["accept"] == "gap" and "gap" in made["gap:3"]["sources"]
    assert made["gap:0"]["tokens"] == made["standard"]["tokens"]
    accepted = [r["mean_accepted"] for r in made.values()]
    assert accepted[0] == accepted[1] < accepted[2] < accepted[3]
    assert made["gap:1e9"]["accept_counts"][16] == made["gap:1e9"]["rounds"] - 1
    assert "gap: 60 tokens" in capsys.readouterr().err


def test_a_new_rule_runs_in_eval_and_its_report(new_rule, tmp_path, capsys):
    evaluate.main(["--task", "demo", "--data", DATA, *PAIR, "--rules", "target,standard,gap:3",
                   "--limit", "1", "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())["rules"]
    assert results["gap:3"]["mean_accepted"] > results["standard"]["mean_accepted"]
    assert "| gap:3 " in capsys.readouterr().out
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 10_000


def test_a_new_rule_runs_in_replay(new_rule, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"prompt": "Question: Mira has 5 pens.", "text": " She has 5."}))
    evaluate.main(["--replay", str(texts), *PAIR, "--rules", "standard,gap:0,gap:1e9",
                   "--out", str(tmp_path / "out")])
    rules = json.loads((tmp_path / "out" / "replay.json").read_text())["rules"]
    assert rules["gap:0"] == rules["standard"] and rules["gap:1000000000"]["rejected"] == 0
    assert rules["standard"]["rejected"] > 0


def test_a_new_rule_runs_in_benchmark(new_rule, tmp_path, capsys):
    out = tmp_path / "out.json"
    benchmark.main([*PAIR, "--prompts", DATA, "--rules", "standard,gap:3", "--no_compile",
                    "--speculate_k", "4", "--accepted", "2", "--repeats", "1",
                    "--max_new_tokens", "20", "--json", str(out)])
    variants = [v["variant"] for v in json.loads(out.read_text())["real"]["variants"]]
    assert variants == ["target", "standard K=4", "gap:3 K=4"]


class Echo(Drafter):
    """Proposes the last two tokens again and again: nonsense."""

    def propose(self, state, k, span, s, noise):
        drafted = state.last.repeat(k)[:k]
        certain = torch.full((k, self.vocab_size), -torch.inf)
        return drafted, certain.scatter(1, drafted[:, None], 0.0)


class Listener(Echo):
    """Keeps the target's states at what it reads, as a drafter that builds on them would."""
    wants_hidden = True

    def __init__(self):
        self.tokens, self.hidden = {}, {}

    def read(self, tokens, pos, hidden, span):
        for t, i, h in zip(tokens.tolist(), pos.tolist(), hidden):
            self.tokens[i], self.hidden[i] = t, h


@pytest.mark.parametrize("k", [1, 4, 9])
def test_standard_speculation_is_lossless_whatever_is_drafted(k):
    drafter, prompt = Echo(), tokens(7)
    drafter.vocab_size = 101
    r = generate(Engine(models()["target"], drafter, speculate_k=k), prompt, 50)
    assert r.tokens == alone(prompt, 50) and r.rounds == sum(r.accept_counts)


def test_sampled_speculation_is_lossless_whatever_is_drafted():
    drafter = Echo()
    drafter.vocab_size = 7
    outcomes = check_distribution(Engine(small_pair()[0], drafter, speculate_k=2, temperature=1.0,
                                         seed=1), 3_000)
    assert outcomes[0] > 30 < outcomes[1]


def test_the_targets_states_reach_a_drafter_that_wants_them():
    """After any number of rounds it has read each token of the text but the last, where it stands,
    with the state that a fresh pass of the target has there.
    """
    target, drafter, prompt = models()["target"], Listener(), tokens(9)
    drafter.vocab_size = 101
    engine = Engine(target, drafter, speculate_k=5, accept="topk", parameter=40)
    with torch.inference_mode():
        engine.prefill(prompt, 100)
        seen = set()
        for _ in range(8):
            seen.add(engine.round()[0])
            n = len(engine.tokens) - 1
            fresh = target.features(torch.tensor([engine.tokens[:n]]), torch.arange(n),
                                    target.new_cache(n))[0]
            assert [drafter.tokens[i] for i in range(n)] == engine.tokens[:n]
            states = torch.stack([drafter.hidden[i] for i in range(n)])
            torch.testing.assert_close(states, fresh, atol=1e-5, rtol=1e-4)
    assert len(seen) > 2
