"""The report's statistics against brute force, the bootstrap by prompt, and the page's HTML."""
import math
import random
from html.parser import HTMLParser

import pytest
import torch

from judge import above_threshold
from judge_data.report import (
    Judged,
    auc,
    auc_and_ap,
    clean,
    measure,
    mistakes,
    page,
    pieces,
    probability,
    ranks,
    shaded,
    text,
)


def made(n=40, seed=0, prompts=10, tokens=12):
    """Random answers with ties among the scores and a few errors."""
    rng, answers = random.Random(seed), []
    for i in range(n):
        words = [rng.choice(["the", "cat", "<b>", "&amp;", "日"]) for _ in range(tokens)]
        spans, at = [], 0
        for w in words:
            spans.append((at, at + len(w)))
            at += len(w)
        labels = [1] * (tokens - 1) + [int(rng.random() < 0.5)]
        scores = [round(rng.gauss(2 if y else -1, 1.5), 1) for y in labels]
        answers.append(Judged({"prompt": f"p {i % prompts}", "answer": "".join(words) + " rest",
                               "line": i + 1, "domain": "ab"[i % 2]}, spans, labels, scores))
    return answers


def flat(answers):
    return [s for a in answers for s in a.scores], [y for a in answers for y in a.labels]


def brute(scores, labels):
    """Over all pairs, and over all distinct thresholds."""
    errors, correct = ([s for s, y in zip(scores, labels) if y == kind] for kind in (0, 1))
    pairs = [(c, e) for c in correct for e in errors]
    area = sum((c > e) + (c == e) / 2 for c, e in pairs) / len(pairs)
    precision = 0.0
    for t in sorted(set(scores)):
        found, seen = sum(e <= t for e in errors), sum(s <= t for s in scores)
        precision += errors.count(t) / len(errors) * found / seen
    return area, precision


def test_auc_and_average_precision_by_brute_force():
    for seed in range(5):
        scores, labels = flat(made(10, seed))
        weight = torch.ones(len(scores), dtype=torch.float64)
        got = auc_and_ap(ranks(torch.tensor(scores)), torch.tensor(labels), weight)
        assert got == pytest.approx(brute(scores, labels))
        assert auc(torch.tensor(scores), torch.tensor(labels)) == got[0]
        # Weights are repetitions.
        times = [random.Random(seed + i).randrange(3) for i in range(len(scores))]
        repeated = [[x for x, n in zip(xs, times) for _ in range(n)] for xs in (scores, labels)]
        assert auc_and_ap(ranks(torch.tensor(scores)), torch.tensor(labels),
                          torch.tensor(times).double()) == pytest.approx(brute(*repeated))
    assert auc(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1, 0, 1])) == 1.0
    assert math.isnan(auc(torch.tensor([3.0, 1.0]), torch.tensor([1, 1])))


def test_bootstrap_draws_prompts_and_is_seeded():
    answers = made()
    found, again, other = (measure(answers, 0.5, seed, samples=200) for seed in (1, 1, 2))
    assert found == again != other
    scores, labels = flat(answers)
    assert (found["auc"][0], found["ap"][0]) == pytest.approx(brute(scores, labels))
    accepted = sum(s > 0 and not y for s, y in zip(scores, labels))
    rejected = sum(s <= 0 and y for s, y in zip(scores, labels))
    assert found["false_accept"][0] == pytest.approx(accepted / labels.count(0))
    assert found["false_reject"][0] == pytest.approx(rejected / labels.count(1))
    for value, low, high in found.values():
        assert 0 <= low <= value <= high <= 1 and low < high
    # By brute force: answers repeated as their prompts are drawn.
    generator, draws = torch.Generator().manual_seed(1), []
    for _ in range(200):
        drawn = torch.randint(10, (10,), generator=generator).tolist()
        same = [a for p in drawn for a in answers if a.example["prompt"] == f"p {p}"]
        draws.append(brute(*flat(same))[0])
    bounds = torch.tensor(draws).double().quantile(torch.tensor([0.025, 0.975]).double())
    assert found["auc"][1:] == pytest.approx(bounds.tolist())
    # One answer asked a hundred times over is one prompt, and tells no more than that: no width.
    one = [a._replace(example=a.example | {"prompt": "the same"}) for a in made(4)]
    value, low, high = measure(one * 25, 0.5, seed=0, samples=50)["auc"]
    assert low == high == pytest.approx(value)


def test_worst_mistakes():
    a = Judged({"prompt": "p", "answer": "abcd", "line": 7}, [(0, 1), (1, 2), (2, 3), (3, 4)],
               [1, 1, 1, 0], [-1.0, -3.0, 2.0, 4.0])
    assert mistakes([a], 0.5) == [(4.0, 0, 3), (3.0, 0, 1)]
    assert mistakes([a], 0.99) == [(pytest.approx(math.log(99) + 3), 0, 1)]  # 4 is below its logit
    many = made(60)
    found = mistakes(many, 0.5)
    assert len(found) == 10 and [many[i].labels[j] for _, i, j in found] == [0] * 5 + [1] * 5
    assert all((many[i].scores[j] > 0) != many[i].labels[j] for _, i, j in found)
    accepts = [max(s for s, y in zip(b.scores, b.labels) if not y) for b in many if 0 in b.labels]
    assert [m for m, _, _ in found[:5]] == sorted(accepts, reverse=True)[:5]
    right = [b._replace(scores=[9.0 if y else -9.0 for y in b.labels]) for b in many]
    assert mistakes(right, 0.5) == []
    assert "no mistakes" in text(right, measure(right, 0.5, 0, 20), 0.5, ())
    rejected = [b._replace(scores=[-9.0] * 12) for b in many]
    assert len(mistakes(rejected, 0.5)) == 10  # false rejects only
    accepted = mistakes(many, 0.0)
    assert len(accepted) == 10 and not any(many[i].labels[j] for _, i, j in accepted)


def test_tokens_that_share_a_character_are_one_piece():
    a = Judged({"answer": "a🎉b"}, [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], [1, 1, 1, 0, 1],
               [3.0, 2.0, -1.0, 5.0, 1.5])
    assert pieces(a) == [(0, 1, 1, 3.0), (1, 2, 0, -1.0), (2, 3, 1, 1.5)]
    assert pieces(a._replace(spans=[(0, 2), (1, 3)], labels=[1, 1], scores=[1.0, 2.0])) == [
        (0, 3, 1, 1.0)]
    assert pieces(a._replace(spans=[(0, 3), (1, 2)], labels=[1, 1], scores=[1.0, 2.0])) == [
        (0, 3, 1, 1.0)]


def test_a_threshold_that_is_a_score_is_the_same_for_rule_list_and_page():
    """As calibrated thresholds are: the token is rejected everywhere, however its logit rounds."""
    for score in torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist():
        t = probability(score)
        a = Judged({"prompt": "p", "answer": "a", "line": 1}, [(0, 1)], [0], [score])
        yes = above_threshold(torch.tensor([score]), t).item()
        assert bool(mistakes([a], t)) == yes == ('class="b' in shaded(a, t))


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""
    def __init__(self):
        super().__init__()
        self.tags, self.names, self.open, self.answer, self.depth = [], set(), [], [], None

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in ("meta", "br") else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.answer.append(data)


HOSTILE = ['</div><script>alert(1)</script>', '<img src=x onerror="alert(1)">',
           "\"' onmouseover='x' ", "&lt;b&gt; &amp;", "</style><style>*{display:none}",
           "a\n\n  b\t<!-- ", "日本\u202e👩‍👩‍👧]]>"]
TAGS = "html head meta title style body h1 h2 p div span table tr td th".split()
ATTRIBUTES = "lang charset name content http-equiv class title".split()


def test_hostile_answers_are_text():
    answers, rng = [], random.Random(0)
    for i, h in enumerate(HOSTILE * 3):  # 7 texts, so each meets each of 3 ways to cut it
        # What is hostile is the unjudged rest, one token, or many.
        spans = ([(0, 1)], [(0, len(h))], [(j, j + 1) for j in range(len(h) - 2)])[i % 3]
        labels = [1] * (len(spans) - 1) + [0]
        scores = [9.0] if i % 3 == 1 else [rng.gauss(0, 2) for _ in spans]
        answers.append(Judged({"prompt": f"{i} {h}", "answer": h, "line": i + 1, "domain": h},
                              spans, labels, scores))
    make = lambda: page(HOSTILE[0], HOSTILE[1], answers, measure(answers, 0.5, 0, 20), 0.5,
                        ((0.5, 0.1, 0.2),))
    reader, source = Reader(), make()
    reader.feed(source)
    assert not reader.open
    assert {tag for tag, _ in reader.tags} <= set(TAGS)
    assert {name for _, attrs in reader.tags for name in attrs} <= set(ATTRIBUTES)
    assert not any(outside in source for outside in ("http:", "https:", "url(", "@import"))
    for a in answers:  # and nothing of it is lost
        single = Reader()
        single.feed(shaded(a, 0.5))
        assert "".join(single.answer) == a.example["answer"]
    assert source == make()
    colored = [a._replace(example=a.example | {"answer": "\x1b[31m" + a.example["answer"]})
               for a in answers]
    assert "\x1b" not in text(colored, measure(answers, 0.5, 0, 20), 0.5, ())
    assert clean("a\x1b\n") == "a\\x1b\\n"


def test_shades_say_the_verdict():
    a = Judged({"prompt": "p", "answer": "abcdef rest", "line": 1}, [(i, i + 1) for i in range(6)],
               [1, 1, 1, 1, 1, 0], [5.0, 4.0, 0.5, -1.0, -9.0, 6.0])
    assert shaded(a, 0.5) == (
        '<span class="y">ab</span><span class="b" title="p = 0.622">c</span>'
        '<span class="n1" title="p = 0.269">d</span><span class="n3" title="p = 0.000">e</span>'
        '<span class="y e" title="p = 0.998">f</span><span class="rest"> rest</span>')
    assert 'class="n' not in shaded(a, 0.0) and 'class="y' not in shaded(a, 1.0)
