"""Every rule of judge.RULES against brute force, token by token in plain Python; rules bound to a
span, in chains and trees; sampled thresholds against their closed form; spellings.
"""
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch

import benchmark
import eval as evaluate
import generate as G
import judge
import rules
from common import UserError
from demo.pair import HOME
from drafters.choice import check_rules
from drafters.length import Auto
from drafters.tree import Tree
from engine import Engine, Settings, State, decide, generate, unpack
from graphs import compile_engine
from judge import RULES, Verified, accept_mask
from load import engine_rule, parse_rule, rule_list, span_ids, spell_rule
from rules import inside_after, within
from test_generate import alone, chi_square, greedy, make, models, short_spans, tokens  # noqa: F401
from test_trees import Scripted, path_to, random_parents

OPEN, CLOSE = 7, 8


def softmax(row):
    top = max(row)
    e = [math.exp(x - top) for x in row]
    return [x / sum(e) for x in e]


def ranked(row):
    return sorted(range(len(row)), key=lambda t: -row[t])


# ---------------------------------------------------------------- the rules, one token at a time

def topk(k, row, d, **_):
    return sum(x > row[d] for x in row) < k


def typical(epsilon, row, d, **_):
    p = softmax(row)
    entropy = -sum(x * math.log(x) for x in p if x)
    return p[d] > min(epsilon, math.sqrt(epsilon) * math.exp(-entropy))


def kl(bound, row, d, draft, **_):
    p, q = softmax(row), softmax(draft)
    return max(p) <= 0.9 and sum(x * math.log(x / y) for x, y in zip(p, q) if x) < bound


def relaxed(parameter, row, d, **_):
    k, delta = parameter
    p = softmax(row)
    return d in ranked(row)[:k] and p[d] >= max(p) - delta


def margin(ratio, row, d, **_):
    first, second = ranked(row)[:2]
    return d in (first, second) and row[first] > 0 and row[second] / row[first] > ratio


def fly(parameter, row, d, i, passed, **_):
    entropy, window = parameter
    top3 = sorted(softmax(row))[-3:]
    later = passed[i + 1:i + 1 + window]
    return -sum(x * math.log(x) for x in top3) >= entropy and len(later) == window and all(later)


def thresholds(parameter, row, d, p, coin, **_):
    single, acc = parameter
    return p > 0 and (p >= single or coin < p / acc)


def above(threshold, row, d, score, **_):
    return threshold == 0 or threshold < 1 and 1 / (1 + math.exp(-score)) > threshold


BRUTE = {"standard": lambda *_, **__: False, "topk": topk, "typical": typical, "kl": kl,
         "relaxed": relaxed, "margin": margin, "fly": fly, "thresholds": thresholds, "judge": above}
PARAMETERS = {
    "standard": [None], "topk": [1, 2, 5, 11], "typical": [0.001, 0.09, 0.3, 0.999],
    "kl": [0.0, 0.3, 1.0, 1e9], "judge": [0.0, 0.2, 0.5, 0.9, 1.0],
    "relaxed": [(1, 0.0), (1, 1.0), (2, 0.1), (3, 0.02), (11, 0.0), (11, 0.3), (11, 1.0)],
    "margin": [0.01, 0.5, 0.9, 0.99],
    "fly": [(0.0, 1), (0.3, 1), (0.3, 2), (0.7, 1), (0.0, 6), (0.0, 8), (1.2, 1)],
    "thresholds": [(0.0, 1.0), (0.3, 0.5), (1.0, 1.0), (1.0, 0.1), (0.05, 0.9)]}


def verified(g, scale=2.0, shift=0.0) -> Verified:
    """8 drafted tokens of 11, so that they pass, follow closely or are far off."""
    logits = scale * torch.randn(8, 11, generator=g, dtype=torch.float64) + shift
    rank = torch.tensor([0, 0, 1, 0, 2, 0, 0, 7])[torch.randperm(8, generator=g)]
    drafted = logits.argsort(-1, descending=True).gather(1, rank[:, None])[:, 0]
    p = logits.softmax(-1).gather(1, drafted[:, None])[:, 0]
    return Verified(logits.float(), torch.zeros(8, 4), drafted, logits.float() + 0.5 * torch.randn(
        8, 11, generator=g), torch.randn(8, generator=g), logits.argmax(-1) == drafted, p.float(),
        torch.rand(8, generator=g))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_by_brute_force(name):
    g, let_in, refused = torch.Generator().manual_seed(0), 0, 0
    assert PARAMETERS.keys() == BRUTE.keys() == RULES.keys()
    for trial in range(60):
        v = verified(g, scale=(0.3, 2.0, 6.0)[trial % 3], shift=(0.0, 8.0, -9.0)[trial // 3 % 3])
        for parameter in PARAMETERS[name]:
            want = [bool(BRUTE[name](parameter, v.logits[i].tolist(), int(v.drafted[i]), i=i,
                                     draft=v.draft_logits[i].tolist(), passed=v.passed.tolist(),
                                     p=float(v.p[i]), coin=float(v.coin[i]),
                                     score=float(v.scores[i]))) for i in range(8)]
            got = RULES[name].accept(v, parameter)
            assert got.dtype == torch.bool and got.tolist() == want, (trial, parameter)
            mask = accept_mask(v, name, parameter)
            assert mask.tolist() == [a or b for a, b in zip(want, v.passed.tolist())]
            let_in += sum(want)
            refused += 8 - sum(want)
    assert refused > 100 and (let_in > 100 or name == "standard")


def test_rules_at_their_edges_and_ties():
    two = torch.tensor([[2.0, 2.0, 1.0, -9.0]] * 3)
    v = Verified(two, None, torch.tensor([1, 2, 3]), passed=torch.tensor([False, True, True]))
    p = two[0].softmax(-1)
    gap = float(p[0] - p[2])
    assert rules.topk(v, 1).tolist() == [True, False, False]  # as probable as the first
    assert rules.relaxed(v, (3, gap * 1.0001)).tolist() == [True, True, False]
    assert rules.relaxed(v, (3, gap * 0.9999)).tolist() == [True, False, False]
    assert rules.relaxed(v, (4, 1.0)).all() and rules.relaxed(v, (2, 1.0)).tolist() == [
        True, False, False]
    assert rules.margin(v, 0.9999).tolist() == [True, False, False]
    assert not rules.margin(v._replace(logits=two - 2), 0.01).any()  # the first logit is 0
    assert not rules.margin(v._replace(logits=two - 9), 0.01).any()
    wide = Verified(torch.zeros(3, 2), None, torch.tensor([0, 1, 1]), passed=v.passed)
    half = math.log(2)  # of two tokens, all that a top 3 can hold
    assert rules.fly(wide, (half * 0.9999, 2)).tolist() == [True, False, False]
    assert not rules.fly(wide, (half * 1.0001, 2)).any() and not rules.fly(wide, (0.0, 3)).any()
    nothing = v._replace(p=None, coin=None)
    assert not rules.thresholds(nothing, (0.0, 0.1)).any()
    never = v._replace(p=torch.zeros(3), coin=torch.zeros(3))
    assert not rules.thresholds(never, (0.0, 0.1)).any()  # a token of probability 0


# ---------------------------------------------------------------- in rounds

def settings(accept, parameter, **more):
    return Settings(accept, parameter, more.pop("temperature", 0.0), None, None, 101, **more)


def walked(ids, start, span=(OPEN, CLOSE)) -> list[int]:
    """Whether a text is inside the span, before the ids and after each, told one by one."""
    inside = [start]
    for t in ids:
        inside.append(1 if t == span[0] else 0 if t == span[1] else inside[-1])
    return inside


def test_inside_after_by_brute_force():
    rng = random.Random(1)
    for _ in range(200):
        n, start = rng.randint(0, 12), rng.randint(0, 1)
        ids = [rng.choice((1, 2, OPEN, CLOSE)) for _ in range(n)]
        got = inside_after(torch.tensor([start]), torch.tensor(ids, dtype=torch.long),
                           (OPEN, CLOSE))
        assert got.tolist() == walked(ids, start)
        if n:
            parents = random_parents(rng, n, 4)
            got = inside_after(torch.tensor([start]), torch.tensor(ids), (OPEN, CLOSE),
                               Tree.of(torch.tensor(parents), 4))
            paths = [path_to(parents, row) for row in range(n + 1)]
            assert got.tolist() == [walked([ids[r - 1] for r in p[1:]], start)[-1] for p in paths]


def spanned(target, text, drafts, start, room, parents=None, span=(OPEN, CLOSE)):
    """One round that accepts everything inside a span: (accepted, new tokens, inside after it)."""
    e = Engine(target, Scripted(lambda text, k: (drafts, parents), parents and len(drafts)),
               accept="topk", parameter=101, speculate_k=4 if parents else len(drafts), span=span)
    e.reserve(40)
    e.tokens = list(text)
    e.read(0)
    e.set_state(room)
    assert int(e.state.inside) == start
    a, new, _ = e.round()
    return a, new, int(e.state.inside)


def test_a_rule_holds_between_two_tokens_only():
    """All is accepted inside, the target's own tokens outside; the closing token is no longer
    inside, and what the round leaves is what a walk over the new text gives.
    """
    target, rng, counts = models()["target"], random.Random(2), {}
    for trial in range(60):
        text = [rng.randrange(10, 100) for _ in range(4)]
        marks = [[], [OPEN], [CLOSE], [OPEN, CLOSE], [CLOSE, OPEN]][trial % 5]
        text[1:1 + len(marks)] = marks
        start, drafts, room = walked(text, 0)[-1], [], 6 - trial % 2
        for _ in range(6):  # the target's own now and then, so that it goes on outside
            own = greedy(target, text + drafts)
            drafts.append(rng.choice((own, own, OPEN, CLOSE, rng.randrange(10, 100))))
        span = [OPEN, CLOSE]
        if trial % 3 and not marks[trial % 3 - 1:]:  # the target says one of the two itself
            drafts[0] = greedy(target, text)
            span[trial % 3 - 1] = drafts[1] = greedy(target, text + drafts[:1])
        want, inside = [], walked(drafts, start, span)
        for i, t in enumerate(drafts[:room]):
            own = greedy(target, text + want)
            if t != own and not (inside[i] and t != span[1]):
                break
            want.append(t)
        want.append(greedy(target, text + want))
        a, new, left = spanned(target, text, drafts, start, room, span=tuple(span))
        assert new == want and a == len(want) - 1
        assert left == walked(want, start, span)[-1]
        counts[start, left] = counts.get((start, left), 0) + 1
        assert spanned(target, text, drafts, 0, room, span=None)[0] == room  # unbound: everything
    assert len(counts) == 4, counts


def test_a_span_in_a_tree():
    target, rng, lengths = models()["target"], random.Random(3), set()
    for trial in range(40):
        text = [rng.randrange(10, 100) for _ in range(4)] + [OPEN] * (trial % 2)
        parents = random_parents(rng, 9, 4)
        ids = [rng.choice((OPEN, CLOSE, rng.randrange(10, 100))) for _ in parents]
        ok = []
        for row in range(1, len(ids) + 1):
            before = [ids[r - 1] for r in path_to(parents, row)[1:-1]]
            inside = walked(before, trial % 2)[-1] and ids[row - 1] != CLOSE
            ok.append(bool(inside) or greedy(target, text + before) == ids[row - 1])
        paths = [path_to(parents, row)[1:] for row in range(len(ids) + 1)]
        longest = max(len(p) for p in paths if all(ok[r - 1] for r in p))
        a, new, left = spanned(target, text, ids, trial % 2, 4, parents)
        assert a == longest and left == walked(new, trial % 2)[-1]
        lengths.add(a)
    assert len(lengths) > 2


def test_a_span_through_whole_texts():
    """Bound to a span that never opens, a rule is the standard one; what opens in the prompt stays
    open through rounds; compiled rounds are tests/test_compile.py's.
    """
    target, draft = models()["target"], models()["random"]
    prompt = [t for t in tokens(9) if t not in (OPEN, CLOSE)]
    run = lambda prompt, span, **more: generate(make(
        target, draft, accept="topk", parameter=101, speculate_k=5, span=span, **more), prompt, 30)
    assert run(prompt, (OPEN, CLOSE)).tokens == alone(prompt, 30)
    opened = prompt[:4] + [OPEN] + prompt[4:]
    free, bound = run(opened, None), run(opened, (OPEN, CLOSE))
    assert bound.sources.count("topk") > 5
    closed = next((i for i, t in enumerate(free.tokens) if t == CLOSE), 30)
    assert bound.tokens[:closed] == free.tokens[:closed]
    assert run(opened[:5] + [CLOSE] + prompt[4:], (OPEN, CLOSE)).sources.count("topk") == 0


def test_the_replay_binds_rules_as_rounds_do():
    prompt, text = [1, OPEN, 2], [3, CLOSE, 4, OPEN, 5, CLOSE]
    assert within((OPEN, CLOSE), prompt, torch.tensor(text)).tolist() == [
        True, False, False, False, True, False]
    assert within(None, prompt, torch.tensor(text)).all()


@pytest.mark.parametrize("certain", (True, False))
@pytest.mark.parametrize("parameter", ((1.0, 1.0), (1.0, 0.4), (0.3, 1.0)))
def test_sampled_thresholds_have_sglangs_chances(certain, parameter):
    """Of one drafted token d: accepted with max(P(standard), min(1, p / acc), p >= single); after a
    rejection the standard test's next token. Exact chances beside 2,500 rounds.
    """
    g = torch.Generator().manual_seed(5)
    single, acc = parameter
    logits, draft = torch.randn(2, 5, generator=g), torch.randn(1, 5, generator=g)
    p, q = logits[0].softmax(-1).tolist(), draft[0].softmax(-1).tolist()
    model = type("Model", (), {"config": type("C", (), {"dim": 5}), "output": lambda self, x: x})()
    s = settings("thresholds", parameter, temperature=1.0, certain=certain)
    want, runs = [0.0] * 10, 2500  # [accepted, rejected] x token after
    drawn = [2] if certain else range(5)
    for d in drawn:
        of_draft = 1.0 if certain else q[d]
        base = p[d] if certain else min(1.0, p[d] / q[d])
        chance = 1.0 if p[d] >= single else max(base, min(1.0, p[d] / acc))
        after = [x * (t != d) for t, x in enumerate(p)] if certain else [
            max(a - b, 0.0) for a, b in zip(p, q)]
        for t in range(5):
            want[t] += of_draft * chance * float(logits[1].softmax(-1)[t])
            want[5 + t] += of_draft * (1 - chance) * after[t] / (sum(after) or 1.0)
    assert sum(want) == pytest.approx(1)
    state, counts = State(torch.tensor([0, 0]), *torch.tensor([[9], [1], [0]])), [0] * 10
    for _ in range(runs):
        d = 2 if certain else int(torch.multinomial(torch.tensor(q), 1, generator=g))
        noise = torch.empty(1 + certain, 5).exponential_(generator=g)
        packed, _ = decide(model, None, s, state, logits, torch.tensor([d]), draft,
                           torch.rand(1, generator=g), noise)
        o = unpack(packed.tolist(), 1)
        counts[5 * (1 - o.accepted[0]) + o.own[0]] += 1
    kept = [i for i, x in enumerate(want) if x > 1e-9]
    assert sum(counts[i] for i in range(10) if i not in kept) == 0
    statistic, freedom = chi_square(torch.tensor([counts[i] for i in kept]).float(),
                                    torch.tensor([want[i] for i in kept]))
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5, (statistic, freedom)
    if parameter == (1.0, 1.0):  # the standard test's own
        free = sum(p) if certain else 0
        assert sum(want[:5]) == pytest.approx(p[2] if free else sum(map(min, p, q)))


def test_thresholds_draw_their_coin_in_whole_rounds():
    """With acc near 0 every token that the target can say passes; greedy it is the standard rule.
    """
    target, draft, prompt = models()["target"], models()["random"], tokens(9)
    loose = make(target, draft, accept="thresholds", parameter=(1.0, 1e-9), speculate_k=4,
                 temperature=1.0)
    assert generate(loose, prompt, 40).mean_accepted > 3.5
    strict = make(target, draft, accept="thresholds", parameter=(1.0, 1.0), speculate_k=4,
                  temperature=1.0)
    assert generate(strict, prompt, 40).mean_accepted < 2
    once = make(target, draft, accept="thresholds", parameter=(0.5, 0.001), speculate_k=4)
    assert generate(once, prompt, 40).tokens == alone(prompt, 40)
    certain = Engine(target, Scripted(lambda text, k: ([20] * k, None)), accept="thresholds",
                     parameter=(1.0, 1e-9), speculate_k=4, temperature=1.0)
    assert generate(certain, prompt, 30).mean_accepted > 3.5


def test_rules_that_can_accept_nothing_are_refused():
    check = lambda rule, ks=(25,), greedy=False, drafter="llama": check_rules(
        {rule: parse_rule(rule)}, [drafter], list(ks), greedy)
    check("thresholds:1,1"), check("fly"), check("fly:0.3,6", [7]), check("fly", [Auto()])
    for rule, settings, message in (
            ("thresholds:0.5,0.5", dict(greedy=True), "thresholds:0.5,0.5 is for sampling: greedy"),
            ("fly", dict(ks=[4, 16]), "rule fly looks at more drafted tokens than a round of 4"),
            ("fly:0,6", dict(ks=[6]), "rule fly:0,6 looks at more drafted tokens"),
            ("fly", dict(drafter="eagle-tree"), "rule fly needs a chain of drafts"),
            ("kl:1@think", dict(drafter="ngram"), "rule kl:1@think compares the draft's")):
        with pytest.raises(UserError, match=message):
            check(rule, **settings)


@pytest.mark.parametrize("command", [
    "generate.py --prompt x --accept thresholds:0.5,0.5", "generate.py --prompt x --accept fly "
    "--speculate_k 6", "eval.py --task demo --data {demo}/problems.jsonl --out {tmp}/o --rules "
    "target,thresholds:0.5,0.5", "eval.py --replay {demo}/problems.jsonl --rules standard,fly "
    "--speculate_k 5", "eval.py --replay {demo}/problems.jsonl --rules thresholds:0.5,0.5",
    "benchmark.py --prompts {demo}/problems.jsonl --rules thresholds:0.5,0.5",
    "benchmark.py --prompts {demo}/problems.jsonl --rules fly --speculate_k 4,16"])
def test_commands_refuse_rules_that_can_accept_nothing(command, tmp_path):
    name, *flags = command.format(demo=HOME, tmp=tmp_path).split()
    parse = {"generate.py": G, "eval.py": evaluate, "benchmark.py": benchmark}[name].parse_args
    pair = ["--target", str(HOME / "target"), "--draft", str(HOME / "draft"), "--device", "cpu"]
    with pytest.raises(UserError, match="^rule (thresholds:0.5,0.5 is for sampling|fly looks at)"):
        parse([*flags, *pair])


@pytest.mark.slow
def test_a_compiled_round_draws_coins_and_follows_spans():
    """The rule that uses all of it: sampled chances within a span that opens in the prompt."""
    prompt = tokens(6) + [OPEN] + tokens(3, 1)
    first, again = (make(models()["target"], models()["good"], accept="thresholds",
                         parameter=(0.5, 0.01), speculate_k=4, temperature=1.0,
                         span=(OPEN, 56)) for _ in range(2))
    compile_engine(again)
    want, got = (generate(e, prompt, 50) for e in (first, again))
    assert (got.tokens, got.sources) == (want.tokens, want.sources)
    assert want.sources.count("thresholds") >= 2
    assert want.tokens != generate(make(models()["target"], models()["good"], accept="thresholds",
                                        parameter=(0.5, 0.01), speculate_k=4, temperature=1.0),
                                   prompt, 50).tokens


def test_rules_that_need_a_chain_refuse_trees():
    for name, parameter in (("fly", (0.3, 6)), ("thresholds", (0.5, 0.5))):
        with pytest.raises(UserError, match=f"rule {name} needs a chain of drafts; leave out"):
            Engine(models()["target"], Scripted(None, nodes=9), accept=name, parameter=parameter,
                   speculate_k=4)


# ---------------------------------------------------------------- spellings

def test_spellings_go_both_ways():
    for text, want in {
            "standard": ("standard", None, None), "topk:3": ("topk", 3, None),
            "relaxed": ("relaxed", None, None), "relaxed:10,0.6": ("relaxed", (10, 0.6), None),
            "relaxed:10,0.6@think": ("relaxed", (10, 0.6), "think"),
            "relaxed@think": ("relaxed", None, "think"), "judge@think": ("judge", None, "think"),
            "judge:0.5@tool-call_2": ("judge", 0.5, "tool-call_2"), "fly:0.3,6": ("fly", (0.3, 6),
                                                                                  None)}.items():
        assert parse_rule(text) == want and spell_rule(*parse_rule(text)) == text
    assert rule_list("relaxed:10,0.6@think,judge, fly:.3, 6 ,topk:3.0,target", ("target",)) == [
        "relaxed:10,0.6@think", "judge", "fly:0.3,6", "topk:3", "target"]
    rows = {name: rule.parameter_for(None, SimpleNamespace(threshold=0.7))
            for name, rule in RULES.items()}
    assert rows["relaxed"] == (10, 0.6) and rows["fly"] == (0.3, 6) and rows["judge"] == 0.7
    for name, rule in RULES.items():
        x = rule.default if isinstance(rule.default, tuple) else (rule.default,)
        assert rule.default is None or rule.valid(*x), name


@pytest.mark.parametrize("text, says", [
    ("relaxed:0.6,10", r"use relaxed\[:K,D\], K,D: one of the target's top K.*0 <= D <= 1"),
    ("relaxed:10", r"use relaxed\[:K,D\]"), ("relaxed:10,0.6,1", "use relaxed"),
    ("relaxed:10,1.1", "use relaxed"), ("relaxed:2.5,0.5", "use relaxed"),
    ("relaxed:10,nan", "use relaxed"), ("fly:6,0.3", r"use fly\[:E,W\], .*W a whole number"),
    ("fly:0.3,0", "use fly"), ("fly:-1,6", "use fly"), ("margin:1", r"use margin\[:R\]"),
    ("margin:0", "use margin"), ("margin:", "use margin"),
    ("thresholds", r"use thresholds:S,A, S,A: when sampling"), ("thresholds:0.5", "use thresholds"),
    ("thresholds:0.5,0", "use thresholds"), ("thresholds:1.5,1", "use thresholds"),
    ("standard:1", "use standard, which has no parameter"), ("topk", "use topk:K"),
    ("standard@think", "@ binds one that accepts more than standard"),
    ("relaxed:10,0.6@", "@ binds"), ("relaxed@<think>", "@ binds"), ("relaxed@a b", "@ binds"),
    ("target@think", "@ binds"), ("relax:10,0.6", "use target, standard, topk:K, .*@WORD")])
def test_a_wrong_rule_is_named_in_one_line(text, says):
    with pytest.raises(UserError, match=f"^{re.escape(repr(text))} is not a rule; .*{says}") as e:
        parse_rule(text, ("target",))
    assert "\n" not in str(e.value)


def test_a_span_needs_tokens_of_its_own():
    tokenizer = SimpleNamespace(ids={"<think>": 5, "</think>": 6, "<tool>": 9}, path="T")
    assert span_ids("think", tokenizer) == (5, 6) and span_ids(None, tokenizer) is None
    assert engine_rule("fly@think", tokenizer) == {"accept": "fly", "parameter": None,
                                                   "span": (5, 6)}
    with pytest.raises(UserError, match="@tool: <tool> and </tool> are no tokens of T"):
        span_ids("tool", tokenizer)


def test_the_mask_is_an_or():
    v = verified(torch.Generator().manual_seed(3))
    inside = torch.tensor([True, False] * 4)
    want = v.passed | rules.topk(v, 11) & inside
    assert torch.equal(judge.accept_mask(v, "topk", 11, inside), want)
    assert not want.all() and judge.accept_mask(v, "topk", 11).all()
