"""Trees of drafted tokens against brute force, and rounds with drafters that want to mislead."""
import itertools
import random

import pytest
import torch

import judge
from demo.pair import load_pair, read_problems
from drafters.drafter import Drafter
from drafters.tree import Tree
from engine import Engine, Settings, State, decide, generate, unpack
from judge import RULES, JudgeHead, Rule, Verified
from model import Cache
from test_generate import (  # noqa: F401 (a fixture)
    alone,
    chi_square,
    greedy,
    head,
    make,
    models,
    short_spans,
    tokens,
)

V = 101


# ---------------------------------------------------------------- brute force

def path_to(parents, row) -> list[int]:
    """The rows from the root to `row`."""
    return [*path_to(parents, parents[row - 1]), row] if row else [0]


def random_parents(rng, n, height) -> list[int]:
    """The row that each of n tokens follows, no path longer than `height`, children before their
    parents too.
    """
    depth, parents = [0], []
    for _ in range(n):
        parents.append(rng.choice([r for r, d in enumerate(depth) if d < height]))
        depth.append(depth[parents[-1]] + 1)
    rows = [0, *rng.sample(range(1, n + 1), n)]  # the new row of each old one
    shuffled = [0] * n
    for row, parent in enumerate(parents, 1):
        shuffled[rows[row] - 1] = rows[parent]
    return shuffled


def best_path(parents, mask, passed, room) -> list[int]:
    """The rows of the longest path of tokens in mask, at most `room`; of several one with the most
    that passed, then the first.
    """
    paths = [path_to(parents, row) for row in range(1, len(parents) + 1)]
    whole = [p for p in paths if all(mask[r - 1] for r in p[1:]) and len(p) - 1 <= room]
    return max([[0], *whole], key=lambda p: (len(p), sum(passed[r - 1] for r in p[1:]), -p[-1]))


def test_trees_by_brute_force():
    rng, ties = random.Random(0), 0
    for _ in range(150):
        n, height, start = rng.randint(1, 12), rng.randint(1, 5), rng.randint(0, 4)
        parents = random_parents(rng, n, height)
        tree = Tree.of(torch.tensor(parents), height)
        paths = [path_to(parents, row) for row in range(n + 1)]
        assert [row.nonzero()[:, 0].tolist() for row in tree.upto] == [sorted(p) for p in paths]
        assert tree.depth.tolist() == [len(p) - 1 for p in paths]
        assert tree.before(torch.arange(n + 1) * 10).tolist() == [10 * p for p in parents]

        span = start + n + 1 + rng.randint(0, 5)
        cache = Cache([torch.randn(span, 2, 1, 2, 3) for _ in range(2)], torch.zeros(span, 2, 1))
        pos = start + torch.arange(n + 1)
        at, seen = tree.where(pos, cache)
        assert at.tolist() == [start + len(p) - 1 for p in paths]
        assert seen.tolist() == [[j < start or j - start in p for j in range(span)] for p in paths]

        passed = [rng.random() < 0.4 for _ in range(n)]
        mask = [p or rng.random() < 0.5 for p in passed]
        room = rng.randint(0, height + 1)
        want = best_path(parents, mask, passed, room)
        ties += best_path(parents, mask, mask, room) != want
        length, end, path = tree.longest(torch.tensor(mask), torch.tensor(passed),
                                         torch.tensor([room]))
        assert (length.tolist(), end.tolist()) == ([len(want) - 1], [want[-1]])
        assert path.shape == (tree.height + 1,) and path[:len(want)].tolist() == want

        before, hidden = [kv.clone() for kv in cache.kv], torch.randn(n + 1, 3)
        read, chain, states = tree.keep(cache, path, torch.arange(n + 1), pos, hidden)
        assert read[:len(want)].tolist() == want and torch.equal(states, hidden[path])
        assert chain.tolist() == pos[:tree.height + 1].tolist()
        for kv, old in zip(cache.kv, before):
            for i, row in enumerate(want):
                assert torch.equal(kv[start + i], old[start + row])
            outside = [*range(start), *range(start + tree.height + 1, span)]
            assert torch.equal(kv[outside], old[outside])
    assert ties > 5


# ---------------------------------------------------------------- rounds

class Scripted(Drafter):
    """Drafts what `script(text, k)` says: tokens, and the rows that they follow, None for a chain.
    """
    certain = skips = True

    def __init__(self, script, nodes=None, plan=lambda text, k: k):
        self.script, self.nodes, self.said = script, nodes, plan

    def size(self, k):
        return k if self.nodes is None else self.nodes

    def plan(self, text, k):
        self.text = list(text)
        return self.said(text, k)

    def propose(self, state, k, span, s, noise):
        ids, parents = self.script(self.text, k)
        assert len(ids) <= self.size(k) and state.last.tolist() == self.text[-2:]
        drafted = torch.tensor(ids)
        one_hot = torch.full((len(ids), s.vocab_size), -torch.inf).scatter(1, drafted[:, None], 0.0)
        tree = [] if parents is None else [Tree.of(torch.tensor(parents), k)]
        return drafted, one_hot, *tree


def continuation(target, text, n) -> list[int]:
    """The target's next n tokens, whatever text it is."""
    ids = list(text)
    for _ in range(n):
        ids.append(greedy(target, ids))
    return ids[len(text):]


def knows(prompt):
    """A function like `future`, for one prompt."""
    ids = alone(prompt, 60)
    return lambda text: ids[len(text) - len(prompt):]


CHAINS = {
    "right": lambda right, text, k: right,
    "wrong": lambda right, text, k: [(t + 1) % V for t in right],
    "right, then wrong": lambda right, text, k: [*right[:k // 2], *((t + 7) % V
                                                                   for t in right[k // 2:])],
    "repeats": lambda right, text, k: [text[-1]] * k,
    "the last of the vocabulary": lambda right, text, k: [V - 1] * k,
}


@pytest.mark.parametrize("as_tree", [False, True])
@pytest.mark.parametrize("case", CHAINS)
def test_no_chain_changes_the_targets_text(case, as_tree):
    for n, k, new in ((1, 3, 12), (9, 1, 9), (9, 8, 30), (60, 5, 10), (125, 4, 9), (127, 4, 9)):
        prompt, rows = tokens(n, seed=n), list(range(k)) if as_tree else None
        right = knows(prompt)
        script = lambda text, k: (  # noqa: B023
            (CHAINS[case]([*right(text), *[0] * k][:k], text, k) + [0] * k)[:k], rows)  # noqa: B023
        r = generate(Engine(models()["target"], Scripted(script), speculate_k=k), prompt, new)
        assert r.tokens == alone(prompt, new), (n, k)
        if case == "right":  # every round but the last keeps all
            assert r.rounds == -(-(len(r.tokens) - 1) // (k + 1))
        elif "wrong" in case and len(r.tokens) > 2 * k:
            assert r.mean_accepted <= k // 2


class Forest:
    """Random trees in any order, with the right path, or a part, somewhere among distractors, of
    which some are siblings with the same token.
    """

    def __init__(self, right, nodes, seed=0):
        self.right, self.nodes, self.rng, self.longest = right, nodes, random.Random(seed), []

    def __call__(self, text, k):
        rng, right = self.rng, [*self.right(text), *[0] * k][:k]
        parents = random_parents(rng, self.nodes, k)
        ids = [rng.randrange(V) for _ in parents]
        deepest = path_to(parents, rng.randint(1, self.nodes))[1:]
        for row, token in zip(deepest, right):
            ids[row - 1] = token
        for row in rng.sample(range(1, self.nodes + 1), self.nodes // 3):
            twin = rng.choice([r for r, p in enumerate(parents, 1) if p == parents[row - 1]])
            ids[row - 1] = ids[twin - 1]
        self.longest.append(len(best_path(
            parents, [ids[r - 1] == right[len(path_to(parents, r)) - 2]
                      for r in range(1, self.nodes + 1)], [False] * self.nodes, k)) - 1)
        return ids, parents


@pytest.mark.parametrize("nodes, k", [(1, 1), (7, 1), (9, 4), (26, 6)])
def test_the_right_path_is_found_and_nothing_else(nodes, k):
    target, kept = models()["target"], set()
    for n, new in ((1, 20), (9, 45), (61, 20), (121, 60)):
        prompt = tokens(n, seed=n)
        forest = Forest(knows(prompt), nodes, seed=n)
        e, got = Engine(target, Scripted(forest, nodes), speculate_k=k), []
        r = generate(e, prompt, new, on_tokens=lambda new, sources: got.append(len(new) - 1))  # noqa: B023
        assert r.tokens == alone(prompt, new), n
        assert got[1:-1] == forest.longest[:-1]  # in the last there may be no room for it
        assert got[-1] == min(forest.longest[-1], len(r.tokens) - sum(got[:-1]) - len(got))
        assert r.sources.count("draft") == sum(got[1:])
        kept.update(got[1:])
    assert len(kept) > (1 if k == 1 else 3)


@pytest.mark.parametrize("judged", [None, "judge", "topk"])
def test_the_targets_cache_holds_what_a_fresh_prefill_would(judged):
    """After rounds of chains, trees and plain decode steps in turn, whatever path was kept."""
    target = models()["target"]
    torch.manual_seed(0)
    some = JudgeHead(torch.randn(1, 64), torch.zeros(1), 0.5, "") if judged == "judge" else None
    forest = Forest(lambda text: continuation(target, text, 2), 12, seed=3)
    rng, kept = random.Random(1), []
    drafter = Scripted(lambda text, k: forest(text, k) if k == 5 else ([0] * k, None), 12,
                       lambda text, k: rng.choice((0, 2, k, k, k)))
    e = Engine(target, drafter, some, judged or "standard", 30 if judged == "topk" else None, 5)
    with torch.inference_mode():
        e.prefill(tokens(9), 100)
        for _ in range(16):
            a, new, sources = e.round()
            kept.append((a, *sources))
            assert len(new) == a + 1
            assert torch.cat(e.state[:2]).tolist() == [*e.tokens[-2:], len(e.tokens)]
            n = len(e.tokens) - 1
            assert n - 1 <= e.read_len <= n
            fresh = target.new_cache(n)
            target(torch.tensor([e.tokens[:n]]), torch.arange(n), fresh)
            for kv, want in zip(e.cache.kv, fresh.kv):
                torch.testing.assert_close(kv[:n], want, atol=1e-5, rtol=1e-4)
    assert len({a for a, *_ in kept}) > 2 and (not judged or any(judged in k for k in kept))


def test_a_next_turn_and_an_edited_one():
    e = Engine(models()["target"], Scripted(lambda text, k: forest(text, k), 9), speculate_k=4)
    forest = Forest(knows(tokens(10)), 9)
    first = generate(e, tokens(10), 20).tokens
    assert first == alone(tokens(10), 20)
    for prompt in (tokens(10) + first + tokens(5, seed=9), tokens(10)[:6] + tokens(9, seed=11),
                   tokens(4)):
        for _ in range(2):
            forest.right = knows(prompt)
            assert generate(e, prompt, 20).tokens == alone(prompt, 20)


def test_trees_on_the_demo_pair():
    target, _, _, tokenizer, _ = load_pair()
    prompt = tokenizer.encode(read_problems(1)[1]["prompt"])
    ids = generate(Engine(target), prompt, 40).tokens
    forest = Forest(lambda text: ids[len(text) - len(prompt):], 26)
    r = generate(Engine(target, Scripted(forest, 26), speculate_k=6), prompt, 40)
    assert r.tokens == ids and len(set(forest.longest)) > 2


@pytest.mark.parametrize("certain", [True, False])
def test_sampled_tokens_may_be_drafted_by_chance_too(certain):
    """A tree is tested by what the target draws, whatever its drafter says of itself. At this
    temperature it can draw its argmax only.
    """
    drafter = Scripted(Forest(knows(tokens(9)), 12), 12)
    drafter.certain = certain
    e = Engine(models()["target"], drafter, speculate_k=4, temperature=2 * judge.COLDEST)
    r = generate(e, tokens(9), 20)
    assert not e.settings.greedy and r.tokens == alone(tokens(9), 20) and r.mean_accepted > 0.5


def test_a_chain_as_a_tree_makes_the_same_rounds():
    prompt, want = tokens(8), None
    for rows in (None, list(range(4))):
        for some in (None, head(weight=0.05)):
            script = lambda text, k: ([*tokens(3, len(text)), 5], rows)  # noqa: B023
            e = lambda: Engine(models()["target"], Scripted(script), some,  # noqa: B023
                               "judge" if some else "standard", speculate_k=4)  # noqa: B023
            got = [(r.tokens, r.accept_counts, r.sources) for r in [generate(e(), prompt, 30)]]
            want = (want or []) + got
    assert want[:2] == want[2:]


# ---------------------------------------------------------------- rules and the judge

def fresh(target, text, parents, ids):
    """Logits [N, V] before and hidden states [N, D] at each token, by a full pass over its path."""
    logits, hidden = [], []
    for row in range(1, len(parents) + 1):
        whole = text + [ids[r - 1] for r in path_to(parents, row)[1:]]
        out = target(torch.tensor([whole]), torch.arange(len(whole)), target.new_cache(len(whole)))
        logits.append(out[0][0, -2])
        hidden.append(out[1][0, -1])
    return torch.stack(logits), torch.stack(hidden)


PARAMETERS = {"standard": None, "topk": 25, "typical": 0.02, "kl": 3.0, "judge": 0.4,
              "relaxed": (40, 0.01), "margin": 0.5}


@torch.inference_mode()
def test_every_rule_judges_a_tree_token_by_token(monkeypatch):
    """Each token with the logits before it and the hidden state at it that its own path gives."""
    target, text, rng = models()["target"], tokens(9), random.Random(4)
    assert PARAMETERS.keys() == {name for name, rule in RULES.items() if not rule.needs_chain}
    torch.manual_seed(1)
    some = JudgeHead(0.3 * torch.randn(1, 64), torch.zeros(1), 0.5, "")
    for trial, (name, parameter) in itertools.product(range(2), PARAMETERS.items()):
        parents = random_parents(rng, 14, 4)
        ids = [rng.randrange(V) for _ in parents]
        draft_logits = torch.randn(14, 90)
        logits, hidden = fresh(target, text, parents, ids)
        alone = [Verified(logits[i:i + 1], hidden[i:i + 1], torch.tensor(ids[i:i + 1]),
                          draft_logits[i:i + 1], some(hidden[i:i + 1])) for i in range(14)]
        for i in rng.sample(range(14), 4):  # so that some pass the standard test
            ids[i] = int(logits[i].argmax()) if i + 1 not in parents else ids[i]
            alone[i] = alone[i]._replace(drafted=torch.tensor(ids[i:i + 1]))
        hidden = fresh(target, text, parents, ids)[1]
        alone = [v._replace(hidden=hidden[i:i + 1], scores=some(hidden[i:i + 1]))
                 for i, v in enumerate(alone)]
        passed = [bool(v.logits.argmax() == v.drafted) for v in alone]
        mask = [p or bool(RULES[name].accept(v, parameter)) for v, p in zip(alone, passed)]
        seen = []
        monkeypatch.setattr("judge.accept_mask", lambda v, *rule: (
            seen.append(v) or v.passed | RULES[name].accept(v, parameter)))  # noqa: B023
        drafter = Scripted(lambda text, k: (ids, parents), 14)  # noqa: B023
        drafter.propose = lambda *_: (torch.tensor(ids), draft_logits,  # noqa: B023
                                      Tree.of(torch.tensor(parents), 4))  # noqa: B023
        e = Engine(target, drafter, some, name, parameter, 4)
        e.reserve(20)
        e.tokens = list(text)
        e.read(0)
        e.set_state(room := 4 - trial % 2)
        a, new, sources = e.round()
        want = best_path(parents, mask, passed, room)
        assert new[:-1] == [ids[r - 1] for r in want[1:]] and a == len(want) - 1
        assert sources == [*("draft" if passed[r - 1] else name for r in want[1:]), "target"]
        assert new[-1] == greedy(target, text + new[:-1])
        [v] = seen
        assert v.passed.tolist() == passed and torch.equal(v.draft_logits, draft_logits)
        torch.testing.assert_close(v.logits, logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(v.hidden, hidden, atol=1e-4, rtol=1e-4)
        assert (RULES[name].accept(v, parameter) | v.passed).tolist() == mask


def test_judges_that_say_yes_no_and_yes_to_one_token(monkeypatch):
    target, prompt = models()["target"], tokens(8)
    right = knows(prompt)
    #      0 -> 1 right -> 2 right;  0 -> 3 -> 4 -> 5;  0 -> 6 right -> 7 -> 8
    parents = [0, 1, 0, 3, 4, 0, 6, 7]

    def script(text, k):
        a, b = [*right(text), 0, 0][:2]
        return [a, b, (a + 1) % V, 50, 50, a, (b + 1) % V, 60], parents

    def outcome(*rule, room=3):
        e = Engine(target, Scripted(script, 8), *rule, speculate_k=3)
        with torch.inference_mode():
            e.prefill(prompt, 20)
            e.set_state(room)
            a, new, sources = e.round()
        return new[:-1], sources[:-1]

    a, b = right(prompt + [*right(prompt)[:1]])[:2]
    yes, no = (head(), "judge", 0.0), (head(), "judge", 1.0)
    standard = ([a, b], ["draft"] * 2)
    assert outcome() == outcome(*no) == standard
    # Of two paths of three tokens the one of which a token passed.
    assert outcome(*yes) == ([a, (b + 1) % V, 60], ["draft", "judge", "judge"])
    # With room for two both judged paths are no longer than the standard one, which then wins.
    assert outcome(*yes, room=2) == standard
    assert outcome(*yes, room=1) == ([a], ["draft"])
    assert outcome(*yes, room=0) == ([], [])
    for token, want in (((b + 1) % V, standard), ((a + 1) % V, standard), (60, standard)):
        monkeypatch.setitem(RULES, "one", Rule(lambda v, _, t=token: v.drafted == t))
        assert outcome(None, "one") == want


# ---------------------------------------------------------------- sampling

def recursive_rejection(p, siblings):
    """Probabilities [V + 1]: of each token when siblings, each drafted for certain, are tried one
    after another and the residual is what remains (arXiv 2401.15077); in the last place nothing.
    """
    total, left, rest = torch.zeros_like(p), 1.0, p.clone()
    for token in siblings:
        accept = rest[token]  # min(1, p / q) with q = 1
        total[token] += left * accept
        left = left * (1 - accept)
        rest = rest.clone()
        rest[token] = 0
        rest = rest / rest.sum() if rest.sum() > 0 else rest
    return total + left * rest


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.7, 4, None), (0.8, None, 0.9)])
@torch.inference_mode()
def test_a_sampled_tree_round_is_recursive_rejection(temperature, top_k, top_p):
    """All that a round can make of a tree, with twins among siblings, by chi-square."""
    parents, ids, height = [0, 0, 0, 1, 1, 3, 2, 4], [1, 2, 1, 0, 3, 0, 2, 4], 3
    s = Settings("standard", None, temperature, top_k, top_p, 5, certain=True)
    tree, g = Tree.of(torch.tensor(parents), height), torch.Generator().manual_seed(1)
    logits = 1.5 * torch.randn(9, 5, generator=g)
    logits[3] = logits[1]  # what follows the twins is one text
    logits[6] = logits[4]
    p = s.probabilities(logits).double()
    want = {}

    def walk(rows, text, chance, room):
        """rows: those with the text so far; of the next token all that is possible."""
        children = [r for r in range(1, 9) if parents[r - 1] in rows]
        tokens = [ids[r - 1] for r in children] if room else []
        for t, q in enumerate(recursive_rejection(p[rows[0]], tokens)):
            if t in tokens:
                walk([r for r in children if ids[r - 1] == t], (*text, t), chance * q, room - 1)
            elif q > 0:
                want[(*text, t)] = want.get((*text, t), 0) + float(chance * q)

    room = 2 if top_k else 3
    walk([0], (), 1.0, room)
    assert abs(sum(want.values()) - 1) < 1e-6
    model = type("Model", (), {"config": type("C", (), {"dim": 5}), "output": lambda self, x: x})()
    state = State(torch.tensor([0, 0]), *torch.tensor([[9], [room], [0]]))
    counts, runs = dict.fromkeys(want, 0), 1500
    noise = torch.empty(runs, 9, 5).exponential_(generator=g)
    for i in range(runs):
        packed, _ = decide(model, None, s, state, logits, torch.tensor(ids), None, None, noise[i],
                           tree)
        o = unpack(packed.tolist(), height)
        counts[(*o.drafted[:o.accepted[0]], *o.own)] += 1  # a KeyError: what cannot be
        assert o.state.length == [10 + o.accepted[0]] and o.state.last[-1:] == o.own
    statistic, freedom = chi_square(torch.tensor([*counts.values()]).float(),
                                    torch.tensor([*want.values()]))
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5, (statistic, freedom)
    flat, _ = chi_square(torch.tensor([*counts.values()]).float(),
                         torch.full((len(want),), 1 / len(want)))
    assert flat > freedom + 10 * (2 * freedom) ** 0.5  # the test has teeth
