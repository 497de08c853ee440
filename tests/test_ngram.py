"""The n-gram drafter: what it finds against brute force, its rounds, and what a round costs."""
import random
import time

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from common import UserError
from demo.pair import load_pair, read_problems
from drafters.ngram import LEAST, NgramDrafter, SuffixIndex
from engine import Engine, generate
from graphs import compile_engine, warm_up
from model import Transformer
from test_eagle import eagle
from test_generate import (  # noqa: F401 (a fixture)
    alone,
    check_distribution,
    head,
    models,
    short_spans,
    small_pair,
    tokens,
)


def found(text) -> tuple[int, int]:
    """The longest suffix that ends earlier too: its length, and where it first ends."""
    for length in range(len(text) - 1, 0, -1):
        for end in range(length - 1, len(text) - 1):
            if text[end - length + 1:end + 1] == text[len(text) - length:]:
                return length, end
    return 0, -1


def continued(text, k) -> list[int]:
    """k tokens, each the one that came a period earlier; [] where nothing recurs."""
    length, end = found(text)
    whole = list(text)
    for _ in range(k if length >= LEAST else 0):
        whole.append(whole[len(whole) - (len(text) - 1 - end)])
    return whole[len(text):]


def texts():
    rng = random.Random(0)
    for alphabet in (1, 2, 3, 8):
        for _ in range(12):
            yield [rng.randrange(alphabet) for _ in range(rng.randrange(1, 40))]
    for period in (1, 2, 5):
        yield [rng.randrange(9) for _ in range(4)] + [rng.randrange(3) for _ in range(period)] * 8
    a, b = [rng.randrange(4) for _ in range(12)], [rng.randrange(4) for _ in range(12)]
    yield a + [7] + b + [8] + a + b


def test_the_longest_suffix_that_recurs():
    for text in texts():
        index = SuffixIndex()
        for i, token in enumerate(text, 1):
            index.add(token)
            assert index.recurring() == found(text[:i])


def test_what_is_drafted(monkeypatch):
    """As a text grows by a round's tokens, from one text to a longer, an edited, or another one."""
    rng, drafter, kept = random.Random(1), NgramDrafter(), []
    drafter.new_cache(64)
    for text in texts():
        for change in (text, text + [rng.randrange(3)] * 2, text[:-3], text[:-5] + [1, 2, 1]):
            prompt = list(change) or [0]
            for _ in range(3):
                k = rng.randrange(1, 12)
                want, known = continued(prompt, k), len(drafter.index.tokens)
                n = drafter.plan(prompt, k)
                assert n == (k if want else 0)
                kept.append(len(drafter.index.tokens) > known > 0)
                drafted, logits = drafter.propose(None, k, 64, None, None)
                assert not n or drafted.tolist() == want and logits is None
                prompt += [rng.randrange(3) for _ in range(rng.randrange(1, 5))]
    assert sum(kept) > len(kept) / 2  # what was known of a text is not read again


def test_a_longer_prompt_keeps_what_is_known(monkeypatch):
    drafter, added = NgramDrafter(), []
    drafter.new_cache(99)
    add = SuffixIndex.add
    monkeypatch.setattr(SuffixIndex, "add", lambda self, t: (added.append(t), add(self, t)))
    for text, reads in ((tokens(30), 30), (tokens(30) + [1, 2], 2), (tokens(30) + [1, 3], 32)):
        added.clear()
        drafter.plan(text, 4)
        assert len(added) == reads and drafter.index.tokens == text


def test_a_round_at_32k_tokens_takes_less_than_a_millisecond():
    """About 20 us on a desktop's core; the index of the prompt is made once."""
    rng, times = random.Random(0), []
    text = [rng.randrange(50) for _ in range(100)] * 20
    text += [rng.randrange(30_000) for _ in range(30_000)]
    drafter = NgramDrafter()
    drafter.new_cache(64)
    drafter.plan(text, 16)
    for i in range(200):
        text += text[i:i + 5]
        start = time.perf_counter()
        assert drafter.plan(text, 16) == 16
        drafter.propose(None, 16, 64, None, None)
        times.append(time.perf_counter() - start)
    assert sorted(times)[100] < 1e-4


# ---------------------------------------------------------------- rounds

def engine(target=None, *args, k=5, **settings):
    return Engine(target or models()["target"], NgramDrafter(), *args, speculate_k=k, **settings)


def test_the_text_is_the_targets():
    for k in (1, 7):
        e = engine(k=k)
        for prompt, new in ((tokens(1), 30), (tokens(9) * 3, 20), ([5] * 40, 30),
                            (tokens(40) * 3, 8), ((tokens(40) * 4)[:127], 9)):
            r = generate(e, prompt, new)
            assert r.tokens == alone(prompt, new)
            follow = prompt + r.tokens + tokens(2)
            if len(follow) < 128:  # the next turn
                assert generate(e, follow, 5).tokens == alone(follow, 5)


def test_with_nothing_found_the_round_is_a_plain_decode_step(monkeypatch):
    rows, features = [], Transformer.features
    monkeypatch.setattr(Transformer, "features", lambda self, ids, *more, **how: (
        rows.append(ids.shape[1]) or features(self, ids, *more, **how)))
    e, seen = engine(eagle()[1]), []
    with torch.inference_mode():
        e.prefill(tokens(9), 100)
        for _ in range(30):
            text = list(e.tokens)
            rows.clear()
            a, new, sources = e.round()
            k = 5 if found(text)[0] >= LEAST else 0
            assert rows == [k + 1] and len(new) == a + 1 and a <= k
            assert new[:-1] == continued(text, 5)[:a]
            seen.append((k, a))
    assert len({k for k, _ in seen}) == 2 and {a for _, a in seen} >= {0, 5}


def test_on_the_demo_pair():
    target, _, judge_head, tokenizer, _ = load_pair()
    prompt = tokenizer.encode(read_problems(1)[0]["prompt"])
    want = generate(Engine(target), prompt, 35)
    got = generate(engine(target, k=4), prompt, 35)
    assert got.tokens == want.tokens and got.rounds < want.rounds
    judged = generate(engine(target, judge_head, "judge", k=4), prompt, 35)
    assert judged.rounds < got.rounds and "judge" in judged.sources


def test_the_host_waits_once_a_round(monkeypatch):
    counts = {"n": 0}
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, _f=original,
                            **k: (counts.__setitem__("n", counts["n"] + 1), _f(self, *a, **k))[1])
    for temperature, prompt in ((0.0, tokens(9) * 3), (0.8, tokens(9) * 3), (0.0, tokens(9))):
        e = engine(None, head(), "judge", temperature=temperature, top_p=0.9)
        with torch.inference_mode():
            e.prefill(prompt, 100)
            counts["n"] = 0
            e.round(), e.round()
        assert counts["n"] == 2


def test_a_rule_that_needs_a_drafts_logits_is_refused():
    with pytest.raises(UserError, match="rule kl needs a draft's logits; NgramDrafter has none"):
        engine(None, None, "kl", 0.5)


@pytest.mark.slow
def test_sampled_rounds_have_the_targets_distribution(monkeypatch):
    monkeypatch.setattr("drafters.ngram.LEAST", 1)
    outcomes = check_distribution(engine(small_pair()[0], k=2, temperature=1.0, seed=1), 900)
    assert min(outcomes[:2]) > 100 and outcomes[2]


@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up(monkeypatch):
    """Rounds that draft and rounds that only decode, at any length."""
    counter, compile = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **more: compile(
        f, backend=counter, **more))
    torch._dynamo.reset()
    e = engine(eagle()[1])
    compile_engine(e)
    warm_up(e, 1, 128)
    warm, counts = counter.frame_count, torch.zeros(6)
    for prompt, new in ((tokens(1), 20), (tokens(9), 40), (tokens(40) * 2, 20)):
        r = generate(e, prompt, new)
        assert r.tokens == generate(Engine(eagle()[1]), prompt, new).tokens
        counts += torch.tensor(r.accept_counts)
    assert counter.frame_count == warm == 3  # a Block for prompts, and passes of 1 and of 6 rows
    assert counts[0] and counts[5]
