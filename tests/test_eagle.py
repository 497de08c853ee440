"""EagleDrafter: its drafts against float64 without a cache, its trees, and the target's text."""
import copy
import functools
import math
import random
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import drafters.eagle
from common import UserError
from drafters.eagle import EagleDrafter, chain_loop, chain_steps, grow
from drafters.eagle_head import EagleHead
from drafters.tree import Tree
from engine import Engine, Settings, generate
from graphs import compile_engine, warm_up
from helpers import random_model, randomize, tiny_config
from judge import Verified
from rules import kl
from test_generate import (  # noqa: F401 (a fixture)
    check_distribution,
    head,
    short_spans,
    tokens,
)

V, D = 101, 64
TREES = {"chain": (None, 4), "4,2,1": ((4, 2, 1), 3), "2,2,2,1": ((2, 2, 2, 1), 4), "7": ((7,), 1),
         "1,1,1": ((1, 1, 1), 3), "dynamic 1": (1, 1), "dynamic 5": (5, 8), "dynamic 12": (12, 3),
         "dynamic 26": (26, 5)}


@functools.cache
def eagle(version=1, vocab=V):
    """A target in which the last token says much about the next, and a head that knows some of it.
    """
    config = tiny_config(vocab_size=vocab, num_hidden_layers=3)
    target = random_model(config, seed=1)
    target.norm.weight.fill_(1), target.embed.weight.mul_(10)
    for layer in target.layers:
        layer.attn.wo.weight.mul_(0.4), layer.ffn.w2.weight.mul_(0.25)
    torch.manual_seed(0)
    h = randomize(EagleHead(replace(target.config, n_layer=1), version,
                            columns=40 if version == 3 else 0))
    h.block.attn.wo.weight.mul_(0.1), h.block.ffn.w2.weight.mul_(0.03)
    if version == 1:
        h.fc.weight.mul_(0.05)[:, :D] += torch.eye(D)  # of a token's embedding
    else:
        h.taps = 0, 1, 2
        h.ids = torch.randperm(vocab)[:40].sort().values
        h.fc.weight.mul_(0.3)
        h.output.weight.copy_(target.output.weight[h.ids])
        h.fc.weight[:, 2 * D:] += torch.eye(D)
        h.block.ffn.w2.weight.mul_(0.3)
    return h, target


def engine(case="chain", version=1, judge_head=None, accept="standard", parameter=None, **settings):
    tree, k = TREES[case]
    return Engine(*eagle(version)[1:], EagleDrafter(*eagle(version), tree), judge_head, accept,
                  parameter, k, **settings)


@functools.cache
def alone(prompt, n):
    return generate(Engine(eagle()[1]), list(prompt), n).tokens


# ---------------------------------------------------------------- the target's text

@pytest.mark.parametrize("case, version", [*((case, 1) for case in TREES), ("chain", 3),
                                           ("4,2,1", 3), ("dynamic 12", 3)])
def test_the_text_is_the_targets(case, version):
    """From prompts of one token to the context's end, across spans and into a cache that grew."""
    e, accepted = engine(case, version), set()
    for n, new in ((1, 12), (2, 3), (61, 8), (9, 20), (122, 20), (127, 5)):
        prompt = tokens(n, seed=n)
        r = generate(e, prompt, new)
        assert r.tokens == alone(tuple(prompt), new) and len(r.tokens) == min(new, 128 - n)
        accepted |= {i for i, c in enumerate(r.accept_counts) if c}
    assert version == 3 or len(accepted) > min(2, e.speculate_k)


def test_a_chat_and_edited_turns():
    for case in ("chain", "dynamic 12"):
        e = engine(case)
        first = generate(e, tokens(10), 12).tokens
        for prompt in (tokens(10) + first + tokens(5, seed=9), tokens(10)[:6] + tokens(9, seed=11),
                       tokens(10)[:6] + tokens(9, seed=11), tokens(1), tokens(40, seed=2)):
            assert generate(e, prompt, 8).tokens == alone(tuple(prompt), 8)


def test_a_tree_of_width_one_is_the_chain():
    r, want = (generate(Engine(eagle()[1], EagleDrafter(*eagle(), tree), speculate_k=3),
                        tokens(9), 40) for tree in ((1, 1, 1), None))
    assert (r.tokens, r.accept_counts, r.sources) == (want.tokens, want.accept_counts, want.sources)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("version", [1, 3])
def test_a_head_may_have_a_dtype_of_its_own(version, dtype):
    h, target = eagle(version)
    for tree in (None, (4, 2, 1)):
        e = Engine(target, EagleDrafter(copy.deepcopy(h).to(dtype), target, tree), None, "kl", 0.0,
                   3)
        r = generate(e, tokens(9), 20)
        assert r.tokens == alone(tuple(tokens(9)), 20) and r.mean_accepted > 0


def test_heads_of_both_kinds_draft_for_one_target_in_turn():
    """EAGLE-3 has the target append three layers' states to its own."""
    makes = [lambda: engine("chain", 3), lambda: engine("4,2,1"), lambda: Engine(eagle(3)[1])]
    target = eagle(3)[1]
    mixed = Engine(target, EagleDrafter(eagle(1)[0], target), speculate_k=3)
    want = generate(Engine(target), tokens(9), 20).tokens
    for e in (mixed, makes[0](), mixed, makes[2](), mixed):
        for n in (9, 12):
            r = generate(e, (tokens(9) + want)[:n], 29 - n)
            assert r.tokens == want[n - 9:]


# ---------------------------------------------------------------- caches

@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize("case, accept", [("chain", "judge"), ("chain", "standard"),
                                          ("4,2,1", "topk"), ("dynamic 12", "judge")])
def test_caches_hold_what_a_fresh_read_of_the_text_gives(case, accept, version, monkeypatch):
    """The target's, and the drafter's keys and values and states, after every round."""
    monkeypatch.setattr("engine.PREFILL_CHUNK", 3)  # the prompt comes in parts
    some = head(weight=0.05) if accept == "judge" else None
    e, kept = engine(case, version, some, accept, 4 if accept == "topk" else None), set()
    with torch.inference_mode():
        e.prefill(tokens(9)[:4], 3)
        short = e.capacity
        e.prefill(tokens(9), 100)  # what was read is kept, in longer caches
        assert e.capacity > short
        for _ in range(9):
            a, _, _ = e.round()
            kept.add(a)
            n = len(e.tokens) - 1  # all but the last are read
            ids, pos = torch.tensor(e.tokens[:n]), torch.arange(n)
            cache, fresh = e.target.new_cache(n), EagleDrafter(*eagle(version))
            fresh.new_cache(n)
            fresh.read(ids, pos, e.target.features(ids[None], pos, cache)[0], n)
            close = functools.partial(torch.testing.assert_close, atol=2e-4, rtol=1e-3)
            for kv, want in zip(e.cache.kv, cache.kv):
                close(kv[:n], want)
            d = e.drafter
            close(d.hidden[:n], fresh.hidden)
            close(d.cache.kv[0][:n - 1], fresh.cache.kv[0][:n - 1])
    assert len(kept) > 1 or (version, accept) == (3, "standard")


# ---------------------------------------------------------------- drafts against float64

class Reference:
    """What a head drafts after a text, each time from the whole text and in float64."""

    def __init__(self, version, text, columns=V):
        (h, target), n = eagle(version), len(text)
        self.head, self.target = EagleHead(h.config, version, columns=40 if h.ids is not None else (
            0)).double(), random_model(tiny_config(num_hidden_layers=3)).double()
        self.head.load_state_dict(h.state_dict()), self.target.load_state_dict(target.state_dict())
        self.head.ids, self.target.taps = h.ids, h.taps
        hidden = self.target.features(torch.tensor([text]), torch.arange(n),
                                      self.target.new_cache(n))[0]
        self.tokens, self.states = text[1:], [*self.head.fuse(hidden[:-1])]

    def after(self, path, states):
        """The state and the logits after the tokens of a path, states: those before them."""
        ids, n = self.tokens + path, len(self.tokens) + len(path)
        hidden = torch.stack([*self.states, *states])[None]
        out = self.head.features(self.head.embed(torch.tensor([ids]), self.target), hidden,
                                 torch.arange(n), self.head.new_cache(n))[0, -1]
        return out, self.head.logits(out[None], self.target)[0]


def proposal(case, version, text, k, s):
    """What the drafter of an engine that has read the text proposes."""
    e = engine(case, version)
    e.prefill(text[:-1], 40)
    e.tokens = list(text)
    e.set_state(20)
    return e.drafter.propose(e.state, k, e.span(len(text) + e.drafter.size(k)), s, None)


KL = Settings("kl", 1.0, 0.0, None, None, V)  # a rule that needs the draft's logits


@torch.inference_mode()
@pytest.mark.parametrize("version", [1, 3])
def test_a_chain_of_drafts(version):
    for n in (2, 30):
        text = tokens(n, seed=n)
        reference, path, states = Reference(version, text), [], []
        drafted, rows = proposal("chain", version, text, 4, KL)
        for row in rows:
            state, logits = reference.after(path, states)
            torch.testing.assert_close(row.double(), logits, atol=1e-3, rtol=1e-3)
            states.append(state), path.append(int(logits.argmax()))
        assert drafted.tolist() == path


def reference_tree(reference, tree, k):
    """Nodes as (path, log-probability, logits before), the best first; by plain loops."""
    state, logits = reference.after([], [])
    open_, all_ = [((), 0.0, (), state, logits)], []
    for level in range(k if isinstance(tree, int) else len(tree)):
        found = []
        for path, score, states, state, logits in open_:
            width = 10 if isinstance(tree, int) else tree[level]
            p = logits.log_softmax(-1)
            for token in p.argsort(descending=True)[:width].tolist():
                found.append(((*path, token), score + float(p[token]), (*states, state), logits))
        all_ += found
        found.sort(key=lambda node: -node[1])
        wide = found[:10] if isinstance(tree, int) else found
        open_ = [] if level + 1 == (k if isinstance(tree, int) else len(tree)) else [
            (path, score, states, *reference.after([*path], states))
            for path, score, states, _ in wide]
    return sorted(all_, key=lambda node: -node[1])[:tree if isinstance(tree, int) else None]


@torch.inference_mode()
@pytest.mark.parametrize("case, k, version", [
    ("4,2,1", 3, 1), ("2,2,2,1", 4, 3), ("7", 1, 1), ("dynamic 12", 3, 1), ("dynamic 26", 4, 3),
    ("dynamic 5", 8, 1)])
def test_a_tree_of_drafts(case, k, version):
    """Its nodes are the best that plain loops find, with their parents and the logits before."""
    for n in (2, 30):
        text = tokens(n, seed=n)
        want = {path: logits for path, _, _, logits in reference_tree(
            Reference(version, text), TREES[case][0], k)}
        drafted, rows, tree = proposal(case, version, text, k, KL)
        assert len(drafted) == len(tree.parent) == len(want) == len(rows)
        paths = [()]
        for token, parent in zip(drafted.tolist(), tree.parent.tolist()):
            paths.append((*paths[parent], token))  # a node comes after its parent
        assert set(paths[1:]) == want.keys() and tree.height == min(k, len(want))
        for path, row in zip(paths[1:], rows):
            torch.testing.assert_close(row.double(), want[path], atol=1e-3, rtol=1e-3)


def test_the_nodes_that_a_dynamic_tree_keeps():
    """With ties, of which many are a node and its only child: the parent is kept."""
    rng = random.Random(0)
    for _ in range(100):
        scores, parents = [0.0], [0]
        for row in range(1, 40):
            parents.append(rng.randrange(row))
            scores.append(scores[parents[row]] + rng.choice((0.0, 0.0, -1.0, -math.inf)))
        n = rng.randrange(1, 39)
        kept = drafters.eagle.best_nodes(torch.tensor(scores[1:]), n).tolist()
        assert kept == sorted(kept) and len(set(kept)) == n
        assert {parents[i + 1] for i in kept} <= {0, *(i + 1 for i in kept)}
        assert sorted(scores[i + 1] for i in kept) == sorted(scores[1:])[-n:]


# ---------------------------------------------------------------- sampling, rules, synchronisation

@pytest.mark.slow
@pytest.mark.parametrize("tree, settings", [(None, dict(top_k=4)), ((3, 2), {}),
                                            (6, dict(temperature=1.3, top_p=0.8))])
def test_sampled_rounds_have_the_targets_distribution(tree, settings, monkeypatch):
    monkeypatch.setattr("drafters.eagle.EXPAND", 3)
    h, target = eagle(1, 7)
    e = Engine(target, EagleDrafter(h, target, tree), speculate_k=2, seed=1,
               **dict(temperature=1.0) | settings)
    outcomes = check_distribution(e, 600)
    assert min(outcomes) > 10


@pytest.mark.parametrize("case", ["chain", "4,2,1", "dynamic 12"])
def test_a_rule_that_compares_distributions(case):
    want = generate(engine(case), tokens(9), 20)
    assert generate(engine(case, accept="kl", parameter=0.0), tokens(9), 20).tokens == want.tokens
    loose = generate(engine(case, accept="kl", parameter=1e9), tokens(9), 20)
    assert loose.mean_accepted > want.mean_accepted and "kl" in loose.sources

    # With a head that drafts a part of the vocabulary, the target's mass on the rest counts.
    assert "kl" in generate(engine(case, 3, accept="kl", parameter=30.0), tokens(9), 20).sources


def test_the_columns_that_a_head_cannot_draft_count_as_those_that_a_draft_lacks():
    p, q = torch.randn(2, 6, 9).unbind()
    v = Verified(p, None, torch.zeros(6, dtype=torch.long), q[:, :5])
    cut = v._replace(draft_logits=torch.cat((q[:, :5], torch.full((6, 4), -math.inf)), 1))
    bounds = torch.linspace(0, 4, 30)
    assert [kl(v, b).tolist() for b in bounds] == [kl(cut, b).tolist() for b in bounds]
    assert kl(cut, 4.0).any() and not kl(cut, 0.1).all()


@pytest.mark.parametrize("case", ["chain", "4,2,1", "dynamic 12"])
def test_the_host_waits_once_a_round(case, monkeypatch):
    counts = {"n": 0}
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, _f=original,
                            **k: (counts.__setitem__("n", counts["n"] + 1), _f(self, *a, **k))[1])
    for temperature in (0.0, 0.8):
        e = engine(case, 1, head(), "judge", temperature=temperature, top_p=0.9)
        with torch.inference_mode():
            e.prefill(tokens(9), 100)
            counts["n"] = 0
            e.round(), e.round()
        assert counts["n"] == 2


@pytest.mark.parametrize("tree, k, message", [
    ((4, 2, 1), 4, r"tree \(4, 2, 1\) has 3 levels, but speculate_k is 4"),
    ((4, 2, 1), 2, r"tree \(4, 2, 1\) has 3 levels, but speculate_k is 2"),
    (60, 33, "tree 60 would have 33 levels, but 32 is the most")])
def test_a_tree_that_does_not_fit_is_refused(tree, k, message):
    with pytest.raises(UserError, match=message):
        Engine(eagle()[1], EagleDrafter(*eagle(), tree), speculate_k=k)


def test_the_highest_tree_has_room():
    e = Engine(eagle()[1], EagleDrafter(*eagle(), 40), speculate_k=32)
    assert generate(e, tokens(90), 38).tokens == alone(tuple(tokens(90)), 38)


# ---------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.parametrize("case, whole, settings", [
    ("chain", 8, dict(temperature=0.9, seed=3)), ("dynamic 12", 8, {}),
    ("4,2,1", 0, dict(temperature=0.9, top_p=0.9))])
def test_nothing_is_compiled_after_the_warm_up(case, whole, settings, monkeypatch):
    """At any length of prompt and text; and the rounds are the eager ones."""
    monkeypatch.setattr("graphs.WHOLE", whole)
    counter, compile = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **more: compile(
        f, backend=counter, **more))
    torch._dynamo.reset()
    plain, fast = engine(case, **settings), engine(case, **settings)
    compile_engine(fast)
    warm_up(fast, 1, 128)
    warm, accepted = counter.frame_count, set()
    for n, new in ((1, 5), (9, 20), (50, 30), (3, 10), (120, 8)):
        want, got = (generate(e, tokens(n, seed=n), new) for e in (plain, fast))
        assert (got.tokens, got.accept_counts, got.sources) == (want.tokens, want.accept_counts,
                                                                want.sources)
        accepted |= {i for i, count in enumerate(got.accept_counts) if count}
    assert counter.frame_count == warm and len(accepted) > 2
    # A Block for prompts, the verification, the drafting and the reading.
    assert whole == 0 or warm == 4


@torch.inference_mode()
def test_a_loop_of_one_step():
    for rule, settings in (("kl", dict(parameter=1.0)), ("standard", dict(temperature=0.9))):
        e = engine(accept=rule, **settings)
        e.prefill(tokens(9), 40)
        noise, drafted = torch.rand(1, V) + 0.1, []
        for e.drafter.chain in (chain_steps, chain_loop):
            drafted.append(e.drafter.propose(e.state, 1, 64, e.settings, noise))
        torch.testing.assert_close(*drafted)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("tree", [None, (3, 2)])
def test_compiled_drafts_are_the_eager_ones(tree):
    """By Inductor; the rest of a round is compiled as for a Llama draft."""
    h, target = eagle()
    drafted = []
    for compiled in (False, True):
        e = Engine(target, EagleDrafter(h, target, tree), speculate_k=2, accept="kl", parameter=1.0)
        if compiled:
            torch._dynamo.reset()
            call = torch.compile(grow if tree else chain_loop, fullgraph=True, dynamic=False)
            e.drafter.compile(None, None, lambda head, f, call=call: call)
        e.prefill(tokens(9), 40)
        ids, logits, *tree_of = e.drafter.propose(e.state, 2, 64, e.settings, None)
        drafted.append([ids, logits, *((t.parent, t.upto, t.depth) for t in tree_of)])
    torch.testing.assert_close(*drafted)


def test_the_path_that_a_cache_keeps_is_rank_0s(monkeypatch):
    """Another rank's may differ where its scores do in the last bit."""
    (h, target), said, kept, keep = eagle(), [], [], Tree.keep
    target = copy.copy(target)
    target.agree = lambda t: said.append(t.clone()) or said[-1]
    monkeypatch.setattr(Tree, "keep", lambda tree, cache, path, *read: kept.append(path) or keep(
        tree, cache, path, *read))
    generate(Engine(target, EagleDrafter(h, target, (2, 2)), speculate_k=2), [3, 1, 4], 12)
    assert kept and all(any(path is t for t in said) for path in kept)
