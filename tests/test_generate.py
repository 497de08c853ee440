"""The speculative loop against the target alone, brute force and statistics."""
import functools
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import generate as G
import judge
import rules
from checkpoint import fingerprint
from common import UserError, run
from drafters.llama import LlamaDrafter
from engine import Engine, Settings, State, generate, padded, verify_and_accept
from helpers import random_model, save_checkpoint, tiny_config
from judge import RULES, JudgeHead, Rule, Verified
from load import load_models
from tokenizer import Stream, Tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    """So that texts of these small models cross from one span to the next."""
    monkeypatch.setattr("engine.SPAN", 64)


def make(target, draft=None, *args, **settings) -> Engine:
    """An engine whose drafter is a Llama."""
    return Engine(target, LlamaDrafter(draft) if draft else None, *args, **settings)


def head(dim=64, weight=0.0, bias=0.0):
    return JudgeHead(torch.full((1, dim), weight), torch.tensor([bias]), 0.5, "test")


@functools.cache
def models():
    """A target, and drafts that are good, random and identical."""
    target = random_model(tiny_config(), seed=1)
    good = random_model(tiny_config(), seed=1)
    torch.manual_seed(5)
    for p in good.parameters():  # agrees with the target on some tokens, not on others
        p.data += 0.05 * p.data.std() * torch.randn_like(p)
    random = random_model(tiny_config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                      num_key_value_heads=1), seed=3)
    return {"target": target, "good": good, "random": random,
            "identical": random_model(tiny_config(), seed=1)}


def tokens(n, seed=0):
    return torch.randint(3, 101, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(model, ids):
    """The next token of a fresh prefill."""
    return int(model(torch.tensor([ids]), torch.arange(len(ids)),
                     model.new_cache(len(ids)))[0][0, -1].argmax())


def alone(prompt, n, eos=(), context=128):
    """Greedy continuation with nothing but full prefills: no cache, no speculative loop."""
    ids = greedy_text(tuple(prompt))[:min(n, context - len(prompt))]
    end = next((i for i, t in enumerate(ids, 1) if t in eos), None)
    return ids[:end]


@functools.cache
def greedy_text(prompt):
    target, ids = models()["target"], list(prompt)
    with torch.inference_mode():
        while len(ids) < min(128, len(prompt) + 60):
            ids.append(greedy(target, ids))
    return ids[len(prompt):]


@pytest.mark.parametrize("draft", ["good", "random", "identical"])
def test_greedy_standard_equals_target_alone_for_every_k(draft):
    prompt = tokens(7)
    want = alone(prompt, 50)
    accepted = []
    for k in range(1, 25):
        engine = make(models()["target"], models()[draft], speculate_k=k)
        r = generate(engine, prompt, 50)
        assert r.tokens == want, k
        accepted.append(r.mean_accepted / k)
        assert sum(r.accept_counts) == r.rounds and len(r.accept_counts) == k + 1
        assert len(r.tokens) == 1 + r.rounds + sum(i * c for i, c in enumerate(r.accept_counts))
        assert r.sources.count("draft") == sum(i * c for i,
                                               c in enumerate(
                                                   r.accept_counts)) and "judge" not in r.sources
        if draft == "identical":
            assert r.rounds == -(-49 // (k + 1))  # everything was accepted
    if draft == "good":
        assert 0.1 < accepted[3] < 0.95  # both outcomes were exercised


@pytest.mark.parametrize("k", [1, 4, 16, 24])
def test_every_prompt_length_at_the_edges(k):
    """Caches grow in powers of two and attention looks at a power of two of it: lengths around
    both, around K, and the context's end.
    """
    for n in (1, 2, 3, k, k + 1, k + 2, 30, 31, 32, 33, 62, 63, 64, 65, 66, 102, 103, 104, 110, 125,
              126, 127):
        prompt = tokens(n, seed=n)
        r = generate(make(models()["target"], models()["good"], speculate_k=k), prompt, 60)
        assert r.tokens == alone(prompt, 60), n
        assert len(r.tokens) == min(60, 128 - n)


@pytest.mark.parametrize("draft", ["good", "identical"])
@pytest.mark.parametrize("accept", ["standard", "all", "none"])
def test_caches_hold_what_a_fresh_prefill_would(draft, accept):
    target, small = models()["target"], models()[draft]
    judge_head = None if accept == "standard" else head(bias=9.0 if accept == "all" else -9.0)
    engine = make(target, small, judge_head, "standard" if accept == "standard" else "judge",
                    speculate_k=5)
    with torch.inference_mode():
        engine.prefill(tokens(9), 100)
        for _ in range(9):
            a, new, _ = engine.round()
            assert len(new) == a + 1
            assert torch.cat(engine.state[:2]).tolist() == [*engine.tokens[-2:], len(engine.tokens)]
            length = engine.read_len
            assert length >= len(engine.tokens) - 1 - (a == 5)
            for model, cache in ((target, engine.cache), (small, engine.drafter.cache)):
                fresh = model.new_cache(length)
                model(torch.tensor([engine.tokens[:length]]), torch.arange(length), fresh)
                torch.testing.assert_close(cache.first(length).kv, fresh.kv, atol=1e-5, rtol=1e-4)


def test_judge_that_says_no_equals_standard():
    prompt = tokens(8)
    for k in (1, 3, 8):
        want = generate(make(models()["target"], models()["good"], speculate_k=k), prompt, 60)
        for h, threshold in ((head(bias=-50.0), None), (head(bias=50.0), 1.0)):
            got = generate(make(models()["target"], models()["good"], h, "judge", threshold, k),
                           prompt, 60)
            assert (got.tokens, got.accept_counts, got.sources) == (want.tokens, want.accept_counts,
                                                                    want.sources)


def test_judge_that_says_yes_gives_the_drafts_text_with_a_target_token_after_every_k():
    target, small, prompt, k = models()["target"], models()["random"], tokens(8), 6
    ids = prompt + alone(prompt, 1)

    with torch.inference_mode():
        for _ in range(5):
            for _ in range(k):
                ids.append(greedy(small, ids))
            ids.append(greedy(target, ids))
    for h, threshold in ((head(bias=50.0), None), (head(bias=-50.0), 0.0)):
        r = generate(make(target, small, h, "judge", threshold, k), prompt, 1 + 5 * (k + 1))
        assert prompt + r.tokens == ids
        assert r.accept_counts == [0] * k + [5]
        assert r.sources[0] == r.sources[k + 1] == "target" and "judge" in r.sources


def test_judge_reads_the_hidden_state_at_the_drafted_tokens_own_position(monkeypatch):
    """A head that finds one token in the state at the position it reads: it must veto that token,
    not the one after it.
    """
    target = random_model(tiny_config(num_hidden_layers=1), seed=4)
    # The hidden state is the token's own embedding.
    target.layers[0].attn.wo.weight.zero_(), target.layers[0].ffn.w2.weight.zero_()
    banned, h, seen = 17, head(), []
    spy = Rule(lambda v, _: seen.append(v) or torch.ones_like(v.drafted).bool(), needs_judge=True)
    monkeypatch.setitem(RULES, "spy", spy)
    with torch.inference_mode():
        cache = target.new_cache(8)
        states = torch.cat([target.features(torch.tensor([[t]]), torch.zeros(1, dtype=torch.long),
                                            cache)[0] for t in range(101)])
        others = torch.arange(101) != banned
        line = torch.linalg.lstsq(states, torch.where(others, -1.0, 1.0)[:, None]).solution.T
        h.weight.copy_(-line)
        scores = h(states)
        h.bias.copy_(-(scores[banned] + scores[others].min())[None] / 2)
        assert h(states)[banned] < 0 < h(states)[others].min()
        state = State(torch.tensor([0, 5]), *torch.tensor([[1], [3], [0]]))
        drafted = torch.tensor([40, banned, 60])
        verify_and_accept(target, h, cache, Settings("spy", None, 0.0, None, None, 101), state,
                          drafted, None, None, None)
    assert (seen[0].scores > 0).tolist() == [True, False, True]
    torch.testing.assert_close(seen[0].hidden, states[drafted])


def test_end_token_in_the_middle_of_a_round():
    prompt = tokens(8)
    text = alone(prompt, 40)
    for end in (text[0], text[1], text[7], text[20]):
        want = text[:text.index(end) + 1]
        for k in (1, 4, 16):
            for draft in ("identical", "random"):
                r = generate(make(models()["target"], models()[draft], speculate_k=k), prompt, 40,
                             eos_ids=(end,))
                assert r.tokens == want and len(r.sources) == len(want)
                assert sum(r.accept_counts) == r.rounds and r.sources.count("draft") == sum(
                    i * c for i, c in enumerate(r.accept_counts))


def test_nothing_is_written_past_the_cache_and_the_context_is_filled_exactly():
    small = random_model(tiny_config(max_position_embeddings=50), seed=3)
    engine = make(models()["target"], small, speculate_k=16)
    r = generate(engine, tokens(20), 1000)
    assert len(r.tokens) == 30 and engine.capacity == 50 + 16 and engine.state.room == -1
    assert r.tokens == alone(tokens(20), 30)
    with pytest.raises(UserError, match="50 tokens and the context 50"):
        generate(engine, tokens(50), 10)


def test_next_turn_keeps_the_cache_and_changes_nothing(monkeypatch):
    engine = make(models()["target"], models()["good"], speculate_k=6)
    first = generate(engine, tokens(10), 20)
    read = []
    original = Engine.read
    monkeypatch.setattr(Engine, "read", lambda self, start: read.append(start)
                        or original(self, start))
    prompt = tokens(10) + first.tokens + tokens(5, seed=9)
    assert generate(engine, prompt, 20).tokens == alone(prompt, 20)
    assert min(read) >= 28  # only what was new
    other = tokens(10)[:6] + tokens(9, seed=11)
    # a turn that was edited: back to the common prefix
    assert generate(engine, other, 20).tokens == alone(other, 20)
    assert generate(engine, other, 20).tokens == alone(other, 20)  # the same again


def test_host_waits_once_a_round(monkeypatch):
    """Every read of a tensor's value on the host goes through one of these; a round may do it once.
    """
    counts = {"n": 0}
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, _f=original,
                            **k: (counts.__setitem__("n", counts["n"] + 1), _f(self, *a, **k))[1])
    for temperature in (0.0, 0.8):
        engine = make(models()["target"], models()["good"], head(), "judge", speculate_k=8,
                        temperature=temperature, top_p=0.9)
        with torch.inference_mode():
            engine.prefill(tokens(9), 100)
            counts["n"] = 0
            engine.round()
        assert counts["n"] == 1


# ---------------------------------------------------------------- distribution

def small_pair(vocab=7):
    config = tiny_config(vocab_size=vocab, hidden_size=16, num_attention_heads=2,
                         num_key_value_heads=1, intermediate_size=24, num_hidden_layers=1)
    return random_model(config, seed=1, scale=0.6), random_model(config, seed=2, scale=0.6)


def chi_square(counts, p):
    """Statistic and degrees of freedom, cells with fewer than 5 expected pooled."""
    expected = p * counts.sum()
    small = expected < 5
    observed = torch.cat((counts[~small], counts[small].sum()[None]))
    expected = torch.cat((expected[~small], expected[small].sum()[None]))
    observed, expected = observed[expected > 0], expected[expected > 0]
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


def check_distribution(engine, runs: int):
    """The two tokens after a prompt's first, over many rounds, have the target's distribution.

    Exactly computed, the joint distribution of both; K = 2, a vocabulary of some seven tokens.
    """
    target, prompt, s = engine.target, [3, 1, 4], engine.settings
    V = target.config.vocab_size
    with torch.inference_mode():
        def p_next(ids):
            logits = target(torch.tensor([ids]), torch.arange(len(ids)), target.new_cache(8))[0]
            return s.probabilities(logits[0, -1])

        first = int(p_next(prompt).argmax())
        joint = torch.zeros(V, V)
        for a in range(V):
            pa = p_next(prompt + [first])[a]
            if pa > 0:
                joint[a] = pa * p_next(prompt + [first, a])
        counts, outcomes = torch.zeros(V, V), [0, 0, 0]
        engine.prefill(prompt, 8)
        for i in range(runs):
            engine.tokens, engine.read_len = prompt + [first], 3
            # Half of the rounds may keep less than they draft, as at the end of a text.
            engine.set_state(1 + i % 2)
            made = []
            while len(made) < 2:
                a, new, _ = engine.round()
                made += new
                outcomes[a] += 1
            counts[made[0], made[1]] += 1
    assert counts[joint == 0].sum() == 0
    statistic, freedom = chi_square(counts.flatten(), joint.flatten())
    # About one in 100,000.
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5, (statistic, freedom)
    # The test has teeth: a uniform distribution would fail it by far.
    wrong, _ = chi_square(counts.flatten(), torch.full((V * V,), 1 / V ** 2))
    assert wrong > freedom + 10 * (2 * freedom) ** 0.5
    return outcomes


@pytest.mark.parametrize("temperature, top_k, top_p, runs", [
    (1.0, None, None, 3_000),
    *(pytest.param(*p, 4_000, marks=pytest.mark.slow)
      for p in ((0.5, None, None), (2.0, None, None), (1.0, 4, None), (1.3, None, 0.8)))])
def test_sampled_standard_speculation_has_the_targets_distribution(temperature, top_k, top_p,
                                                                   runs):
    target, small = small_pair()
    outcomes = check_distribution(make(target, small, speculate_k=2, temperature=temperature,
                                       top_k=top_k, top_p=top_p, seed=1), runs)
    assert outcomes[0] > runs / 100 < outcomes[2]


COLD = [5e-324, 1e-320, 1e-46, 1e-45, 1e-40, 1e-38, 1e-36, judge.COLDEST]


@pytest.mark.parametrize("more", [{}, {"top_k": 5, "top_p": 0.3}], ids=["plain", "top_k, top_p"])
@pytest.mark.parametrize("accept", ["standard", "judge", "target"])
def test_a_temperature_too_low_for_float32_is_greedy(accept, more):
    how = ("good", head(weight=0.05), accept) if accept == "judge" else ("good", None, "standard")
    text = lambda t: generate(make(models()["target"], models().get(how[0] * (accept != "target")),
                                   *how[1:], speculate_k=4, temperature=t, **more), tokens(8), 12)
    want, rng = text(0.0), random.Random(1)
    for t in (*COLD, *(10 ** rng.uniform(-320, -30) for _ in range(4))):
        got = text(t)
        assert (got.tokens, got.sources) == (want.tokens, want.sources), t
        assert make(models()["target"], temperature=t).noise(1) is None, t
    near = text(1.1 * judge.COLDEST)  # sampled, from distributions of one token each
    assert (near.tokens, near.accept_counts) == (want.tokens, want.accept_counts)


def test_every_temperature_gives_a_distribution():
    rng = random.Random(2)
    torch.manual_seed(0)
    for t in (*COLD, 1e300, 1.7e308, *(10 ** rng.uniform(-320, 308) for _ in range(100))):
        top_k, top_p = rng.choice((None, 1, 5)), rng.choice((None, 0.01, 0.9))
        s = Settings("standard", None, t, top_k, top_p, 50)
        for scale in (0.0, 1e-6, 1.0, 30.0, 1e4):
            p = s.probabilities(scale * torch.randn(3, 50))
            assert p.isfinite().all() and (p >= 0).all(), (t, scale)
            torch.testing.assert_close(p.sum(-1), torch.ones(3))


def test_seed_repeats_a_sampled_run():
    run = lambda seed: generate(make(models()["target"], models()["good"], speculate_k=4,
                                       temperature=1.0, seed=seed), tokens(6), 30).tokens
    assert run(1) == run(1) != run(2)


def test_sampled_judge_accepts_standard_or_judge():
    target, small = small_pair()
    yes = generate(make(target, small, head(16, bias=50.0), "judge", speculate_k=4,
                          temperature=1.0), [3, 1], 41)
    assert yes.accept_counts == [0, 0, 0, 0, 8] and {"draft", "judge", "target"} == set(yes.sources)
    no = generate(make(target, small, head(16, bias=-50.0), "judge", speculate_k=4,
                         temperature=1.0, seed=3), [3, 1], 41)
    assert no.tokens == generate(make(target, small, speculate_k=4, temperature=1.0, seed=3),
                                 [3, 1], 41).tokens


def test_what_runs_in_place_of_the_triton_kernels_is_said(monkeypatch):
    target = random_model(tiny_config() | {"quantization": {"mode": "int8", "group_size": None}})
    engine = make(target, models()["good"])
    products = ["target: slow products of few rows: PyTorch"]  # of the draft nothing: it is plain
    assert G.slower_paths(engine, compiled=False) == products
    said = G.slower_paths(engine, compiled=True)
    assert said == ["target: attention is PyTorch's: on a CPU", *products,
                    "draft: attention is PyTorch's: on a CPU"]
    monkeypatch.setattr("graphs.no_kernel", lambda model: None)
    monkeypatch.setattr(G, "product_path", lambda *args: "Triton")
    assert G.slower_paths(engine, compiled=True) == []


# ---------------------------------------------------------------- prompts in few shapes

def test_prompts_are_read_in_few_shapes():
    sizes = [padded(n) for n in range(1, 1025)]
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert all(size <= max(16, 1.25 * n + 7) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 23 and sizes[-1] == 1024 and set(map(padded, sizes)) == set(sizes)


@pytest.mark.parametrize("chunk", [16, 1024])
def test_a_padded_prompt_is_read_as_an_unpadded_one(chunk, monkeypatch):
    """To the context's end, from any prefix that is kept: caches and hidden state are those of one
    full pass, in target and draft.
    """
    monkeypatch.setattr("engine.PREFILL_CHUNK", chunk)
    target, draft = models()["target"], models()["random"]
    shapes, features = set(), type(target).features

    def seen(self, ids, pos, cache):
        shapes.add(ids.shape[1])
        return features(self, ids, pos, cache)

    monkeypatch.setattr(type(target), "features", seen)
    text, n_max = tokens(127), target.config.max_seq_len
    with torch.inference_mode():
        for n in (1, 2, 15, 16, 17, 40, 100, 126, 127):
            for kept in {0, 1, n // 2, n - 1} - {n}:
                e = make(target, draft, speculate_k=3)
                assert e.rows(n) == n  # eager on a CPU
                e.rows = padded
                e.reserve(n)
                e.tokens = text[:kept]
                if kept:
                    e.read(0)
                e.tokens = text[:n]
                got = e.read(kept)
                for model, cache in ((target, e.cache), (draft, e.drafter.cache)):
                    want = model.new_cache(n_max)
                    hidden = features(model, torch.tensor([text[:n]]), torch.arange(n), want)
                    for a, b in zip(cache.kv, want.kv):
                        torch.testing.assert_close(a[:n], b[:n], rtol=0, atol=1e-5)
                    if model is target:
                        torch.testing.assert_close(got, hidden[0, -1:], rtol=0, atol=1e-5)
    assert shapes == ({16} if chunk == 16 else {16, 24, 40, 56, 64, 112, 128})


# ---------------------------------------------------------------- rules, by hand

@pytest.mark.parametrize("vocabulary", [7, 128, 1280, 1300])
def test_argmax_in_parts_is_argmax(vocabulary):
    for logits in (torch.randn(5, vocabulary), torch.zeros(5, vocabulary),
                   torch.randint(3, (5, vocabulary)).float(),  # ties: the first of them
                   torch.full((2, 3, vocabulary), -math.inf)):
        assert torch.equal(judge.top1(logits), logits.argmax(-1))


def test_rules_by_hand():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 5.0, 1.0]])
    drafted = torch.tensor([1, 2, 3])
    assert (judge.top1(logits) == drafted).tolist() == [True, False, False]
    assert rules.topk(Verified(logits, None, drafted), 1).tolist() == [True, False, False]
    assert rules.topk(Verified(logits, None, drafted), 2).tolist() == [True, False, True]
    assert rules.topk(Verified(logits, None, drafted), 3).tolist() == [True, True, True]
    scores = torch.tensor([-1e30, -200.0, -1.0, 0.0, 1.0, 200.0, 1e30])
    assert judge.above_threshold(scores, 0.0).all() and not judge.above_threshold(scores, 1.0).any()
    assert judge.above_threshold(scores, 0.5).tolist() == [False] * 4 + [True] * 3
    assert judge.above_threshold(scores, 0.7310).tolist() == [False] * 4 + [True] * 3
    assert judge.above_threshold(scores, 0.7311).tolist() == [False] * 5 + [True] * 2
    p, q = torch.tensor([[0.5, 0.5, 0.0]] * 2), torch.tensor([[0.2, 0.8, 0.0]] * 2)
    assert judge.rejection_test(p, q, torch.tensor([0, 1]),
                                  torch.tensor([0.99, 0.7])).tolist() == [True, False]
    assert judge.rejection_test(p, q, torch.tensor([0, 1]),
                                  torch.tensor([0.99, 0.6])).tolist() == [True, True]
    assert torch.allclose(judge.residual(p[0], q[0]), torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(judge.residual(p[0], torch.zeros(3)),
                          p[0]) and torch.allclose(judge.residual(p[0], p[0]), p[0])
    probs = judge.probabilities(torch.tensor([2.0, 1.0, 0.0]).exp().log(), 1.0)
    assert torch.allclose(probs, torch.tensor([0.66524, 0.24473, 0.09003]), atol=1e-5)
    logp = torch.tensor([0.5, 0.3, 0.2]).log()
    assert torch.allclose(judge.probabilities(logp, 1.0, top_p=0.5), torch.tensor([1.0, 0, 0]))
    assert torch.allclose(judge.probabilities(logp, 1.0, top_p=0.6),
                          torch.tensor([0.625, 0.375, 0]))
    assert torch.allclose(judge.probabilities(logp, 1.0, top_k=2), torch.tensor([0.625, 0.375, 0]))
    assert torch.allclose(judge.probabilities(logp, 0.5), torch.tensor([0.25, 0.09, 0.04]) / 0.38)


def test_typical_and_kl_by_hand():
    # entropy ln 2 * 1.5: exp(-H) = 0.35355; 0.26: 0.7689
    rows = torch.tensor([[0.5, 0.25, 0.25]] * 2 + [[0.94, 0.03, 0.03]]).log() + 7.0
    accepts = lambda rows, drafted, epsilon: rules.typical(
        Verified(rows, None, torch.tensor(drafted)), epsilon).tolist()
    # min(0.64, 0.8 * 0.35355) = 0.283
    assert accepts(rows[:2], [0, 1], 0.64) == [True, False]
    # 0.7 * 0.35355 = 0.2475
    assert accepts(rows[:2], [0, 1], 0.49) == [True, True]
    # epsilon itself is the bound, and 0.03 is below it
    assert accepts(rows, [1, 2, 2], 0.04) == [True, True, False]
    target, draft = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.95, 0.05]]).log(), torch.tensor(
        [[0.25, 0.75], [0.5, 0.5], [0.95, 0.05]]).log() - 3.0
    v = Verified(target, None, torch.zeros(3, dtype=torch.long), draft)
    # 0.5 ln(2) + 0.5 ln(2/3) = 0.14384; the last is sure
    assert rules.kl(v, 0.1439).tolist() == [True, True, False]
    assert rules.kl(v, 0.1438).tolist() == [False, True, False]
    assert not rules.kl(v, 0.0).any()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_typical_and_kl_in_the_loop(temperature):
    target, small = models()["target"], models()["random"]
    text = lambda *rule: generate(make(target, small, None, *rule, speculate_k=4,
                                         temperature=temperature, seed=2), tokens(8), 31)
    want = text("standard")
    assert text("kl", 0.0).tokens == want.tokens
    for all_in in (text("kl", 1e9), text("typical", 1e-9)):
        assert all_in.mean_accepted > want.mean_accepted and all_in.accept in all_in.sources


def test_topk_rule_in_the_loop():
    want = generate(make(models()["target"], models()["random"], speculate_k=4), tokens(8), 30)
    one = generate(make(models()["target"], models()["random"], None, "topk", 1, 4), tokens(8),
                   30)
    every = generate(make(models()["target"], models()["random"], None, "topk", 101, 4),
                     tokens(8), 31)
    assert one.tokens == want.tokens and every.accept_counts == [0, 0, 0, 0,
                                                                 6] and "topk" in every.sources


def test_judge_file(tmp_path):
    path = tmp_path / "judge.safetensors"
    h = JudgeHead(torch.randn(1, 64), torch.randn(1), 0.37, "abc")
    h.save(path)
    back = JudgeHead.load(path, 64, "abc", "DIR")
    assert torch.equal(back.weight,
                       h.weight) and torch.equal(back.bias, h.bias) and back.threshold == 0.37
    with pytest.raises(UserError, match="width 64, but DIR has width 65"):
        JudgeHead.load(path, 65, "abc", "DIR")
    with pytest.raises(UserError, match="trained on target abc, but DIR is xyz"):
        JudgeHead.load(path, 64, "xyz", "DIR")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="judge.safetensors is damaged or truncated"):
        JudgeHead.load(path, 64, "abc", "DIR")
    save_checkpoint(tmp_path / "m", models()["random"], {})
    with pytest.raises(UserError, match="not a judge file"):
        JudgeHead.load(tmp_path / "m" / "model.safetensors", 64, "abc", "DIR")
    with pytest.raises(UserError, match="does not exist"):
        JudgeHead.load(tmp_path / "nothing", 64, "abc", "DIR")


# ---------------------------------------------------------------- command line

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A target and a draft directory with a tokenizer, and a judge for the target."""
    import sentencepiece
    home = tmp_path_factory.mktemp("pair")
    lines = [" ".join(words)
             for words in itertools.permutations("the cat sat on a mat today".split(), 4)]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines),
                                             model_prefix=str(home / "t"), vocab_size=300,
                                             model_type="bpe",
                                             byte_fallback=True, minloglevel=2,
                                             hard_vocab_limit=False)
    data = (home / "t.model").read_bytes()
    vocab = sentencepiece.SentencePieceProcessor(model_proto=data).vocab_size()
    for name, seed, layers in (("target", 1, 2), ("draft", 2, 1), ("other", 3, 2)):
        config = tiny_config(vocab_size=vocab, num_hidden_layers=layers)
        save_checkpoint(home / name, random_model(config, seed), config)
        (home / name / "tokenizer.model").write_bytes(data)
    JudgeHead(torch.zeros(1, 64), torch.tensor([9.0]), 0.5,
          fingerprint(home / "target")).save(home / "judge.safetensors")
    return home


def command(*args, stdin=""):
    return subprocess.run([sys.executable, ROOT / "generate.py", "--device", "cpu",
                           *map(str, args)], capture_output=True, text=True, input=stdin,
                          env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})


def here(monkeypatch, *args):
    """The command in this process, which is faster."""
    monkeypatch.setattr(sys, "argv", ["generate.py", "--device", "cpu", *map(str, args)])
    G.main()


def test_command_line_json(pair, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    base = ("--target", pair / "target", "--prompt", "the cat", "--max_new_tokens", 20,
            "--ignore_eos", "--json", out)
    done = command(*base)
    assert done.returncode == 0, done.stderr
    target = json.loads(out.read_text())
    assert target.keys() == {"accept", "prompt_tokens", "tokens", "text", "seconds",
                             "tokens_per_sec"} and target["accept"] == "target"
    assert len(target["tokens"]) == 20
    stream = Stream(Tokenizer.from_dir(pair / "target"), [1, 5])
    shown = "".join([*map(stream.put, target["tokens"]), stream.flush()])
    assert shown in done.stdout and "\033" not in done.stdout
    results = {}
    for name, extra in {"standard": (), "judge": ("--judge", pair / "judge.safetensors"),
                        "topk": ("--accept", "topk", "--threshold", "2"),
                        "typical": ("--accept", "typical"), "kl": ("--accept", "kl:0.5")}.items():
        here(monkeypatch, *base, "--draft", pair / "draft", "--speculate_k", 4, *extra)
        results[name] = r = json.loads(out.read_text())
        assert r["accept"] == name and len(r["accept_counts"]) == 5
        assert len(r["sources"]) == 20 == len(r["tokens"])
        assert r["rounds"] == sum(r["accept_counts"]) and r["mean_accepted"] == pytest.approx(
            sum(i * c for i, c in enumerate(r["accept_counts"])) / r["rounds"])
        assert r["tokens_per_round"] == pytest.approx(19 / r["rounds"])
    assert results["standard"]["tokens"] == target["tokens"]
    # 19 tokens after the first, 5 a round, the last one shortened
    assert results["judge"]["rounds"] == 4
    here(monkeypatch, *base, "--draft", pair / "draft", "--speculate_k", 4, "--accept", "topk:2")
    again = json.loads(out.read_text())
    assert again["tokens"] == results["topk"]["tokens"]  # the parameter, written either way


@pytest.mark.parametrize("rule", [("standard",), ("kl:0.5",), ("kl", "--threshold", "0.5"),
                                  ("standard", "--temperature", "1")], ids=" ".join)
def test_the_draft_may_have_a_dtype_of_its_own(pair, rule):
    """Here that of the target is the coarser one, and the text is still the target's."""
    args = G.parse_args(["--target", str(pair / "target"), "--draft", str(pair / "draft"),
                         "--prompt", "x", "--device", "cpu", "--dtype", "bfloat16",
                         "--draft_dtype", "float32", "--accept", *rule])
    target, draft, _, tokenizer, _ = load_models(args.target, args.draft, dtype=args.dtype,
                                                 draft_dtype=args.draft_dtype)
    engine = make(target, draft, None, args.accept, args.parameter, 4, args.temperature)
    assert target.norm.weight.dtype == torch.bfloat16 and draft.norm.weight.dtype == torch.float32
    prompt = tokenizer.encode("the cat")
    r = generate(engine, prompt, 20)
    assert len(r.tokens) == 20 and r.rounds == sum(r.accept_counts)
    if rule == ("standard",):
        assert r.tokens == generate(make(engine.target), prompt, 20).tokens


def test_interactive_keeps_going(pair, tmp_path):
    out = tmp_path / "out.json"
    done = command("--target", pair / "target", "--draft", pair / "draft", "--interactive",
                   "--max_new_tokens", 8, "--json", out,
                   stdin="the cat\n\nsat on\n")
    assert done.returncode == 0, done.stderr
    a, b = json.loads(out.read_text())
    assert b["prompt_tokens"] > a["prompt_tokens"] + len(a["tokens"])


# ---------------------------------------------------------------- chats

@pytest.fixture(scope="module")
def chatty(pair):
    """The pair, with a chat template in the target's directory."""
    shutil.copytree(pair / "target", pair / "chatty")
    (pair / "chatty" / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role[:1] }} {{ m.content }}\n{% endfor %}a")
    return pair


def chat(monkeypatch, lines: bytes, *args, code=None):
    """A chat in this process, at whose standard input stand `lines`; (prompt, tokens) a turn."""
    turns, call = [], generate

    def spy(engine, prompt, *more):
        turns.append((list(prompt), r := call(engine, prompt, *more)))
        return r

    monkeypatch.setattr(G, "generate", spy)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    monkeypatch.setattr(sys, "argv", ["generate.py", "--device", "cpu", "--interactive",
                                      "--ignore_eos", "--max_new_tokens", "8", *map(str, args)])
    if code is None:
        run(G.main)
    else:
        with pytest.raises(SystemExit, match=str(code)):
            run(G.main)
    return turns


@pytest.mark.parametrize("template, judged", [(False, True), (True, False), (True, True)])
def test_a_chat_that_outgrows_the_context_goes_on(chatty, tmp_path, monkeypatch, capsys, template,
                                                  judged):
    """30 turns in 128 tokens: each as a fresh engine answers the same prompt, which is the longest
    that leaves room for the answer.
    """
    home, rng = chatty / "chatty", random.Random(3)
    more = [*(["--chat"] if template else []), *(
        ["--draft", chatty / "draft", "--speculate_k", 3, "--judge", chatty / "judge.safetensors"]
        if judged else [])]
    said = [" ".join(rng.choices("the cat sat on a mat today".split(), k=rng.randrange(1, 9)))
            for _ in range(30)]
    turns = chat(monkeypatch, "\n".join(said).encode(), "--target", home, *more, "--json",
                 tmp_path / "o.json")
    assert [t["tokens"] for t in json.loads((tmp_path / "o.json").read_text())] == [
        r.tokens for _, r in turns]
    target, draft, judge_head, tokenizer, _ = load_models(
        home, chatty / "draft", chatty / "judge.safetensors", speculate_k=3)
    fresh = lambda p: generate(make(target, *(
        (draft, judge_head, "judge", None, 3) if judged else ())), p, 8)

    def whole(i, first):
        """The prompt of turn i with the turns from `first` on."""
        if template:
            return tokenizer.chat([m for j in range(first, i) for m in (
                {"role": "user", "content": said[j]},
                {"role": "assistant", "content": turns[j][1].text})]
                + [{"role": "user", "content": said[i]}])
        parts = [tokenizer.encode(said[j], continuation=j > 0)[j == 0:] + turns[j][1].tokens
                 for j in range(first, i)]
        return [tokenizer.bos[0], *sum(parts, []), *tokenizer.encode(
            said[i], bos=False, continuation=first < i)]

    first, left_out = 0, []
    for i, (prompt, r) in enumerate(turns):
        before = first
        while len(whole(i, first)) + 8 > 128:
            first += 1
        left_out += [first - before] if first > before else []
        assert prompt == whole(i, first), i
        assert r.tokens == fresh(prompt).tokens and len(r.tokens) == 8, i
    err = capsys.readouterr().err
    told = [int(n) for n in re.findall(r"context of 128 tokens; it goes on without its oldest "
                                       r"(\d+) turns?\n", err)]
    assert told == left_out and len(told) > 5 and len(turns) == 30


def test_lines_that_cannot_be_answered_are_said_and_left_out(chatty, tmp_path, monkeypatch, capsys):
    """The chat goes on as if they had not been typed; one after another in the same read."""
    lines = [b"the cat", b"\xff\xfe bad", b"x" * 1_000_000, b"", b"  ", b"\xed\xa0\x80", b"a\0b"]
    start = time.monotonic()
    turns = chat(monkeypatch, b"\n".join(lines), "--target", chatty / "target", "--json",
                 tmp_path / "o.json")
    assert time.monotonic() - start < 20
    prompts = [p for p, _ in turns]
    want = chat(monkeypatch, b"the cat\na\0b\n", "--target", chatty / "target")
    assert prompts == [p for p, _ in want] and len(prompts) == 2
    err = capsys.readouterr().err
    assert err.count("that line is not UTF-8 text, so it is left out\n") == 2
    assert re.search(r"that message has \d+ tokens and the context 128, so it is left out", err)
    assert len(json.loads((tmp_path / "o.json").read_text())) == 2


ENDS = {"interrupted": (signal.SIGINT, 130), "terminated": (signal.SIGTERM, 143),
        "hung up": (signal.SIGHUP, 129)}


@pytest.mark.parametrize("moment", ["while generating", "while reading the prompt", "while typing"])
@pytest.mark.parametrize("how", ENDS)
def test_what_was_said_is_kept_when_a_signal_ends_the_chat(chatty, tmp_path, monkeypatch, how,
                                                           moment):
    """The turn that it ends is kept as far as it was shown."""
    number, code = ENDS[how]
    out, shown, prefill = tmp_path / "o.json", [], Engine.prefill
    handler = signal.default_int_handler if code == 130 else lambda *_: sys.exit(code)
    before = signal.signal(number, handler)
    original = G.printer

    def printer(*args):
        show, finish = original(*args)

        def watched(tokens, sources):
            show(tokens, sources)
            shown.append(tokens)
            if moment == "while generating" and len(shown) == 11:
                signal.raise_signal(number)
        return watched, finish

    def read(engine, prompt, room):
        if moment == "while reading the prompt" and shown:
            signal.raise_signal(number)
        return prefill(engine, prompt, room)

    def typed(prompt, lines=iter(["the cat", "sat"])):  # noqa: B008
        if moment == "while typing" and shown:
            signal.raise_signal(number)
        return next(lines)

    monkeypatch.setattr(G, "printer", printer)
    monkeypatch.setattr(Engine, "prefill", read)
    monkeypatch.setattr("builtins.input", typed)
    try:
        chat(monkeypatch, b"", "--target", chatty / "target", "--json", out, code=code)
        assert signal.getsignal(number) != signal.SIG_DFL
    finally:
        signal.signal(number, before)
    kept = json.loads(out.read_text())
    kept = kept if isinstance(kept, list) else [kept]
    texts = [t for r in kept for t in r["tokens"]]
    assert texts == sum(shown, []) or texts[:-1] == sum(shown, [])
    assert [len(r["tokens"]) for r in kept] == ([8, 4] if moment == "while generating" else [8])


def test_a_turn_is_kept_before_the_line_about_it_is_written(chatty, tmp_path, monkeypatch):
    """Its reader may be gone."""
    def gone(line):
        raise BrokenPipeError
    monkeypatch.setattr(G, "tell", gone)
    with pytest.raises((BrokenPipeError, SystemExit)):
        chat(monkeypatch, b"the cat\nsat\n", "--target", chatty / "target", "--json",
             tmp_path / "o.json")
    assert len(json.loads((tmp_path / "o.json").read_text())["tokens"]) == 8


def test_a_second_signal_ends_a_turn_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), G.held_back_signals() as stop:
        assert not stop(1)
        signal.raise_signal(signal.SIGINT)
        assert stop(1)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")
    assert signal.getsignal(signal.SIGINT) == before


def test_what_was_said_is_kept_when_a_later_turn_fails(chatty, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o.json"
    monkeypatch.setattr(Tokenizer, "chat", lambda self, messages: [1, 5, 6] if len(messages) < 3
                        else judge.refuse((True, "the template fails")))
    chat(monkeypatch, b"a\nb\nc\n", "--target", chatty / "chatty", "--chat", "--json", out, code=2)
    assert "error: the template fails" in capsys.readouterr().err
    assert json.loads(out.read_text())["prompt_tokens"] == 3
    assert chat(monkeypatch, b"", "--target", chatty / "target", "--json", out) == []
    assert json.loads(out.read_text()) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["KILL", "PIPE"])
def test_what_was_said_is_kept_however_a_real_process_ends(tmp_path, how):
    """With the demo pair, which generates long enough to be met in the middle of a turn."""
    demo, out = ROOT / "checkpoints" / "demo", tmp_path / "o.json"
    p = subprocess.Popen(
        [sys.executable, ROOT / "generate.py", "--device", "cpu", "--target", demo / "target",
         "--interactive", "--max_new_tokens", "200", "--ignore_eos", "--json", out],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    p.stdin.write(b"Question: Mira has 3 eggs.\n"), p.stdin.flush()
    while not (out.exists() and isinstance(json.loads(out.read_text()), dict)):
        assert p.poll() is None
        time.sleep(0.02)
    os.read(p.stdout.fileno(), 1 << 16)
    p.stdin.write(b"Mira finds 4.\n"), p.stdin.flush()
    while len(os.read(p.stdout.fileno(), 1 << 16)) < 3:  # the prompt sign, then text
        pass
    p.stdout.close() if how == "PIPE" else p.send_signal(getattr(signal, f"SIG{how}"))
    p.stdin.close()
    code = p.wait(60)
    kept = json.loads(out.read_text())
    kept = kept if isinstance(kept, list) else [kept]
    if how != "PIPE":
        assert code == {"INT": 130}.get(how, -getattr(signal, f"SIG{how}"))
    assert len(kept[0]["tokens"]) == 200
    assert len(kept) == (1 if how in ("KILL", "PIPE") else 2) and kept[-1]["text"]
    assert len(kept) == 1 or 0 < len(kept[1]["tokens"]) < 200


# ---------------------------------------------------------------- bad input

BAD = [
    (("--target", "nowhere", "--prompt", "x"), "nowhere"),
    (("--target", "{}/empty", "--prompt", "x"), "empty holds no model.safetensors"),
    (("--target", "{}/truncated", "--prompt", "x"), "truncated/model.safetensors is damaged or "
     "truncated"),
    (("--target", "{}/keyless", "--prompt", "x"), "'num_hidden_layers' is missing"),
    (("--target", "{}/target", "--draft", "{}/vocabulary", "--prompt", "x"), "says vocab_size 99"),
    (("--target", "{}/target", "--draft", "{}/tokenizer", "--prompt", "x"), "different tokenizers"),
    (("--target", "{}/other", "--draft", "{}/draft", "--judge", "{}/judge.safetensors", "--prompt",
      "x"), "trained on target"),
    (("--target", "{}/target", "--draft", "{}/draft", "--judge", "{}/wide.safetensors", "--prompt",
      "x"), "width 65"),
    (("--target", "{}/target", "--draft", "{}/draft", "--judge", "{}/none.safetensors", "--prompt",
      "x"), "none.safetensors"),
    (("--target", "{}/target", "--prompt", "the cat " * 100), "the context 128"),
    (("--target", "{}/target", "--draft", "{}/draft", "--speculate_k", "0", "--prompt", "x"),
     "--speculate_k is 0"),
    (("--target", "{}/target", "--draft", "{}/draft", "--speculate_k", "128", "--prompt", "x"),
     "a round of 128 drafted tokens does not fit the context of 128; lower --speculate_k"),
    (("--target", "{}/target", "--prompt", "x", "--temperature", "-1"), "--temperature is -1"),
    (("--target", "{}/target", "--prompt", "x", "--temperature", "nan"), "--temperature is nan"),
    (("--target", "{}/target", "--prompt", "x", "--top_p", "0"), "--top_p is 0"),
    (("--target", "{}/target", "--prompt", "x", "--max_new_tokens", "0"), "--max_new_tokens is 0"),
    (("--target", "{}/target", "--prompt", "x", "--json", "{}/no/such/out.json"), "out.json"),
    (("--target", "{}/target", "--prompt", "x", "--json", "{}/target"), "it is a directory"),
    (("--target", "{}/target", "--prompt", "x", "--chat"), "no chat template"),
    (("--target", "{}/target", "--prompt", "x", "--judge", "{}/judge.safetensors"),
     "--judge needs --draft"),
    (("--target", "{}/target", "--prompt", "x", "--draft_dtype", "float32"), "--draft_dtype "
     "requires --draft"),
    (("--target", "{}/target", "--prompt", "x", "--draft", "{}/draft", "--accept", "judge"),
     "needs --judge FILE"),
    (("--target", "{}/target", "--prompt", "x", "--draft", "{}/draft", "--accept", "topk"),
     "'topk' is not a rule; use topk:K, K: one of the target's top K"),
    (("--target", "{}/target", "--prompt", "x", "--draft", "{}/draft", "--accept", "kl"),
     "'kl' is not a rule; use"),
    (("--target", "{}/target", "--prompt", "x", "--draft", "{}/draft", "--accept", "topk:0"),
     "'topk:0' is not a rule; use"),
    (("--target", "{}/target", "--prompt", "x", "--draft", "{}/draft", "--accept", "nonsense"),
     "'nonsense' is not a rule; use standard, topk:K, typical[:E], kl:D, relaxed[:K,D], "
     "margin[:R], fly[:E,W], thresholds:S,A, judge[:T], and any of them with @WORD"),
    (("--target", "{}/target", "--prompt", "x", "--draft", "{}/draft", "--accept", "topk:3",
      "--threshold", "3"), "'topk:3' with --threshold 3 is not a rule; use"),
    (("--target", "{}/target", "--prompt", "x", "--draft", "{}/draft", "--accept", "typical",
      "--threshold", "1"), "'typical' with --threshold 1 is not a rule; use"),
    (("--target", "{}/target"), "--prompt or --interactive"),
]
if not torch.cuda.is_available():
    BAD.append((("--target", "{}/target", "--prompt", "x", "--device", "cuda"), "no CUDA device"))


@pytest.fixture(scope="module")
def bad(pair):
    """The pair, with broken things beside it."""
    (pair / "empty").mkdir()
    shutil.copytree(pair / "target", pair / "truncated")
    weights = pair / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(pair / "target", pair / "keyless")
    config = json.loads((pair / "target" / "config.json").read_text())
    (pair / "keyless" / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "num_hidden_layers"}))
    shutil.copytree(pair / "draft", pair / "vocabulary")
    (pair / "vocabulary" / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    shutil.copytree(pair / "draft", pair / "tokenizer")
    data = (pair / "t.model").read_bytes()
    (pair / "tokenizer" / "tokenizer.model").write_bytes(data.replace("\u2581mat".encode(),
                                                                      "\u2581tam".encode()))
    JudgeHead(torch.zeros(1, 65), torch.zeros(1), 0.5,
          fingerprint(pair / "target")).save(pair / "wide.safetensors")
    return pair


@pytest.mark.parametrize("args,message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_line_and_exit_code_2(bad, args, message, monkeypatch, capsys):
    """In this process, which is faster; that the command ends so too is tested below."""
    before = sorted(bad.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["generate.py", *(a.replace("{}", str(bad)) for a in args)])
    with pytest.raises(SystemExit) as stop:
        run(G.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1 and err.startswith(
        "error: "), err
    assert sorted(bad.rglob("*")) == before


def test_bad_input_from_the_shell(pair):
    done = command("--target", pair / "nowhere", "--prompt", "x")
    assert done.returncode == 2 and done.stderr.count(
        "\n") == 1 and "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_colour_on_a_terminal_only(monkeypatch):
    class Terminal:
        isatty = lambda self: True
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert G.use_color(Terminal()) and not G.use_color(open("/dev/null"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not G.use_color(Terminal())


class Terminal(io.StringIO):
    isatty = lambda self: True


def test_control_characters_reach_a_file_but_no_terminal(pair, monkeypatch):
    tokenizer = Tokenizer.from_dir(pair / "target")
    text = "\x1b[2J\x9b1m\x00\x07\x7f\t\n\r\u2028"
    ids = [tokenizer.ids[f"<0x{b:02X}>"] for b in text.encode()]

    def shown(out):
        show, finish = G.printer(tokenizer, [1, 5], (), out)
        show(ids, ["target"] * len(ids))
        finish()
        return out.getvalue()

    assert shown(io.StringIO()) == text + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    escaped = r"\x1b[2J\x9b1m\x00\x07\x7f" + "\t\n\\r\u2028\n"
    assert shown(Terminal()) == escaped
    monkeypatch.delenv("NO_COLOR")
    assert re.sub("\x1b\\[(33|0)m", "", shown(Terminal())) == escaped
