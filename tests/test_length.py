"""--speculate_k auto: its choices against exhaustive computation, its rounds against fixed ones."""
import itertools
import json
import pickle
import random
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

import benchmark as B
import drafters.length as L
import eval as E
import generate as G
from common import UserError
from drafters.drafter import Drafter
from drafters.length import (
    BINS,
    Auto,
    BestK,
    EarlyStop,
    StoppingLlama,
    automatic,
    draft_length,
    mean_run,
)
from drafters.llama import LlamaDrafter, draft_steps
from engine import Engine, generate
from graphs import compile_engine, warm_up
from helpers import random_model, run_command, tiny_config
from test_choice import (  # noqa: F401 (fixtures)
    BASE,
    filled,
    flags_of,
    home,
    short,
    written,
)
from test_compile import counter  # noqa: F401 (a fixture)
from test_generate import (  # noqa: F401 (a fixture)
    ROOT,
    alone,
    check_distribution,
    head,
    models,
    short_spans,
    small_pair,
    tokens,
)
from test_tp import torchrun

CHEAP = {k: 6.0 + 0.9 * k for k in range(1, 65)}  # a round of the demo pair, in milliseconds


@pytest.fixture(autouse=True)
def fixed_times(request, monkeypatch):
    """No test but that of measuring depends on this machine's times."""
    if "measure" not in request.node.name:
        monkeypatch.setattr(L, "seconds_of_rounds", lambda e, ks, span: [CHEAP[k] for k in ks])


class ByHand(EarlyStop):
    """A draft that stops at random lengths, so that all outcomes of a round follow one another."""

    def choose(self, e):
        super().choose(e)
        self.wanted = getattr(self, "wanted", random.Random(0))
        stop = self.wanted.choice(self.ks)
        self.drafter.bounds = [2.0 if k == stop else 0.0 for k in range(1, self.ks[-1] + 1)]
        return self.ks[-1]


def stopping(target, draft, *args, ks=(1, 2, 3, 5, 8), chooser=EarlyStop, **settings) -> Engine:
    drafter = StoppingLlama(draft)
    return Engine(target, drafter, *args, speculate_k=max(ks), chooser=chooser(drafter, ks),
                  **settings)


# ---------------------------------------------------------------- the rules

@pytest.mark.parametrize("rate", [0.0, 0.3, 0.75, 0.98, 1.0])
def test_expected_run_is_that_of_all_outcomes(rate):
    for k in (1, 2, 5, 9):
        mean = 0.0
        for accepted in itertools.product((True, False), repeat=k):
            p = 1.0
            for ok in accepted:
                p *= rate if ok else 1 - rate
            mean += p * next((i for i, ok in enumerate(accepted) if not ok), k)
        assert mean_run(rate, k) == pytest.approx(mean, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("rate, times", [(0.2, CHEAP), (0.6, CHEAP), (0.8, CHEAP), (0.97, CHEAP), (
    0.8, {2: 1, 4: 5, 8: 6, 16: 6.1, 32: 20})])
def test_the_chosen_k_converges_to_the_best_one(rate, times):
    """Rounds of a draft that is right at this rate, whatever K was: by the outcomes of each K, the
    chosen ones make 97% of the tokens a second that the best makes.
    """
    speed = {k: sum((n + 1) * rate ** n * (1 - rate if n < k else 1)
                    for n in range(k + 1)) / times[k] for k in L.FEW}
    assert min(speed.values()) < 0.9 * max(speed.values())
    coin, chosen = random.Random(1), []
    chooser = BestK()
    chooser.begin(SimpleNamespace(span=lambda n: 64, tokens=[], drafted=32))
    chooser.seconds = times
    for _ in range(400):
        k = chooser.choose(None)
        chosen.append(k)
        chooser.saw(next((i for i in range(k) if coin.random() >= rate), k), k)
    mean = sum(speed[k] for k in chosen[100:]) / 300
    assert 0.97 * max(speed.values()) < mean, (speed, chosen)


WORLD = (4, 0.97, 0.75), (1, 0.4, 0.25)  # bins of confidence, their acceptance, how often they come


@pytest.mark.parametrize("world", [WORLD, ((4, 0.97, 0.75), (1, 0.9, 0.25)),
                                   ((4, 0.6, 0.5), (2, 0.5, 0.5))])
def test_an_early_stop_is_nearly_as_good_as_any_rule_for_stopping(world):
    """Tokens of two confidences, at random. No rule that knows the past of a round makes more
    tokens a second than backward induction finds; the learnt bounds make 97% of them.
    """
    ks, times = tuple(range(1, 13)), CHEAP

    @lru_cache(maxsize=None)
    def best_of_rest(k, chance, worth):  # of the tokens to come less the time they take
        if k == ks[-1]:
            return 0.0
        return max(0.0, sum(share * (chance * p + best_of_rest(k + 1, chance * p, worth))
                            for _, p, share in world) - worth * (times[k + 1] - times[k]))

    low, high = 0.0, 10.0
    for _ in range(40):
        worth = (low + high) / 2
        first = sum(share * (p + best_of_rest(1, p, worth)) for _, p, share in world)
        low, high = (worth, high) if 1 + first > worth * times[1] else (low, worth)

    def rate(drafter):  # of the drafter's own bounds
        made, spent = 1.0, 0.0

        def walk(k, p, accepted, chance):
            nonlocal made, spent
            for at, q, share in world:
                reached, now = p * share, chance * drafter.chances[at]
                made += reached * accepted * q
                if k == ks[-1] or now < drafter.bounds[k - 1]:
                    spent += reached * times[k]
                else:
                    walk(k + 1, reached, accepted * q, now)

        walk(1, 1.0, 1.0, 1.0)
        return made / spent

    drafter, coin = SimpleNamespace(), random.Random(2)
    chooser = EarlyStop(drafter, ks)
    chooser.begin(SimpleNamespace(span=lambda n: 64, tokens=[], drafted=12))
    reached = []
    for i in range(300):
        chooser.choose(None)
        drafter.bins, accepted, refused, chance = [], 0, False, 1.0
        for k in ks:
            at, p, _ = coin.choices(world, [share for *_, share in world])[0]
            drafter.bins.append(at)
            refused = refused or coin.random() >= p
            accepted += not refused
            chance *= drafter.chances[at]
            if chance < drafter.bounds[k - 1]:
                break
        chooser.saw(accepted, k)
        reached += [rate(drafter)] * (i >= 100 and i % 10 == 0)
    assert max(reached) < high * (1 + 1e-9)
    assert sum(reached) / len(reached) > 0.97 * high, (sum(reached) / len(reached), high)


def test_the_past_is_forgotten():
    """After any number of rounds that accepted all, forty that accepted nothing count for more."""
    chooser = BestK()
    chooser.seconds = CHEAP
    for _ in range(500):
        chooser.saw(32, 32)
    assert chooser.choose(None) == 32
    for _ in range(40):
        chooser.saw(0, 32)
    assert chooser.choose(None) == 2 and chooser.rate < 0.5
    before = chooser.accepted, chooser.refused
    chooser.saw(0, 0)  # a round that drafted nothing tells nothing
    assert (chooser.accepted, chooser.refused) == before

    drafter = SimpleNamespace(bins=[4] * 8)
    early = EarlyStop(drafter, (1, 2, 4, 8))
    early.begin(SimpleNamespace(span=lambda n: 64, tokens=[], drafted=8))
    for accepted in [8] * 200 + [0] * 80:
        early.saw(accepted, 8)
    early.choose(None)
    assert drafter.chances[4] < 0.1 and drafter.chances[1] == 0.3
    for _ in range(25_000):  # until float64 knows of no share that was accepted
        early.saw(0, 8)
    early.choose(None)
    assert early.accepted < 1e-300 and drafter.bounds[0] > 1


@pytest.mark.parametrize("ks", [(), (0, 4), (-1,)])
def test_lengths_that_no_round_can_have_are_refused(ks):
    for make in (BestK, lambda ks: EarlyStop(SimpleNamespace(), ks)):
        with pytest.raises(UserError, match="whole numbers from 1"):
            make(ks)


# ---------------------------------------------------------------- rounds

class Told(Drafter):
    """Drafts the text that it is told, wrong where `wrong` says so of a position."""
    has_logits, certain = False, True

    def __init__(self, text, wrong):
        self.text, self.wrong = text, wrong

    def propose(self, state, k, span, s, noise):
        n = int(state.length)
        right = (self.text + [0] * k)[n:n + k]
        return torch.tensor([(t + self.wrong(i)) % 101 for i, t in enumerate(right, n)]), None


def right(i):
    return False


def by_region(i):
    return i // 16 % 2


@pytest.mark.parametrize("wrong", [right, by_region, lambda i: True, lambda i: i % 2],
                         ids=["right", "by region", "wrong", "every other"])
def test_any_acceptance_gives_the_targets_text(wrong):
    prompt = tokens(7)
    chooser = BestK()
    e = Engine(models()["target"], Told(prompt + alone(prompt, 60), wrong), speculate_k=32,
               chooser=chooser)
    chosen, choose = [], chooser.choose
    chooser.choose = lambda e: chosen.append(choose(e)) or chosen[-1]
    for _ in range(3):
        assert generate(e, prompt, 60).tokens == alone(prompt, 60)
    assert chosen[-1] == (32 if wrong is right else 2) or wrong is by_region


@pytest.mark.parametrize("draft", ["good", "random", "identical"])
@pytest.mark.parametrize("chooser", [EarlyStop, ByHand])
def test_a_draft_that_stops_early_gives_the_targets_text(draft, chooser):
    e = stopping(models()["target"], models()[draft], chooser=chooser)
    drafted, saw = set(), e.chooser.saw
    e.chooser.saw = lambda a, k: (drafted.add(k), saw(a, k))
    for n in (1, 7, 62, 64, 104, 126):
        assert generate(e, tokens(n, seed=n), 60).tokens == alone(tokens(n, seed=n), 60)
    assert drafted <= set(e.ks) and (chooser is EarlyStop or drafted == set(e.ks))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_where_a_draft_stops(temperature):
    """It has drafted what it would without stopping, to the first of ks at which the product of
    its bins' chances is below the bound; the bins from fresh prefills.
    """
    target, draft, ks = models()["target"], models()["good"], (1, 3, 4, 8)
    e = stopping(target, draft, ks=ks, temperature=temperature)
    d, lengths = e.drafter, set()
    with torch.inference_mode():
        for seed in range(12):
            e.tokens, rng = [], random.Random(seed)
            e.prefill(tokens(9, seed), 40)
            noise, s = e.noise(8), e.settings
            want, rows = draft_steps(draft, d.cache, e.state.last, e.state.length, 8, s, noise)
            d.chances = [rng.uniform(0.3, 1) for _ in range(BINS)]
            d.bounds = [rng.uniform(0, 0.9) if k in ks else 0.0 for k in range(1, 9)]
            got, logits = d.propose(e.state, 8, 64, s, noise)
            n, chance, bins = len(got), 1.0, []
            for i in range(n):
                ids = torch.tensor([*e.tokens, *want[:i].tolist()])
                row = draft(ids[None], torch.arange(len(ids)), draft.new_cache(32))[0][0, -1]
                bins.append(min(BINS - 1, int(row.double().softmax(-1).max() * BINS)))
                chance *= d.chances[bins[-1]]
                assert (i + 1 == n) == (i + 1 == 8 or chance < d.bounds[i]), (i, n, chance)
            assert got.tolist() == want[:n].tolist() and d.bins == bins and n in ks
            if temperature:
                torch.testing.assert_close(logits, rows[:n])
            lengths.add(n)
            d.bounds = [0.0] * 8
            for k in ks:  # told to end, it does
                assert d.propose(e.state, k, 64, s, noise[:k] if temperature else None)[
                    0].tolist() == want[:k].tolist()
    assert len(lengths) > 2


@pytest.mark.parametrize("accept", ["standard", "all", "none"])
def test_caches_hold_what_a_fresh_prefill_would(accept):
    target, small = models()["target"], models()["good"]
    judge_head = None if accept == "standard" else head(bias=9.0 if accept == "all" else -9.0)
    e = stopping(target, small, judge_head, "standard" if accept == "standard" else "judge",
                 ks=(1, 2, 5), chooser=ByHand)
    with torch.inference_mode():
        e.prefill(tokens(9), 100)
        for _ in range(12):
            a, new, _ = e.round()
            assert torch.cat(e.state[:2]).tolist() == [*e.tokens[-2:], len(e.tokens)]
            assert int(e.state.room) == 98 + 10 - len(e.tokens) and len(new) == a + 1
            length = e.read_len
            for model, cache in ((target, e.cache), (small, e.drafter.cache)):
                fresh = model.new_cache(length)
                model(torch.tensor([e.tokens[:length]]), torch.arange(length), fresh)
                torch.testing.assert_close(cache.first(length).kv, fresh.kv, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("early", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sampling_keeps_the_targets_distribution(early):
    """Where a draft ends depends on what it drew, and K on what was accepted."""
    target, small = small_pair()
    if early:
        e = stopping(target, small, ks=(1, 2), temperature=1.0, seed=1)
        # Each bin on its own side of the bound, whatever is accepted: often sure draws are long.
        e.chooser.choose = lambda _: (e.drafter.__dict__.update(
            bounds=[0.5, 0.0], chances=[0.0, 0.2, 1.0, 1.0, 1.0]), 2)[1]
    else:
        e = Engine(target, LlamaDrafter(small), speculate_k=2, temperature=1.0, seed=1,
                   chooser=BestK((1, 2)))
        turns = itertools.cycle((1, 2, 2))
        e.chooser.choose = lambda _: next(turns)
    drafted, saw = [], e.chooser.saw
    e.chooser.saw = lambda a, k: (drafted.append(k), saw(a, k))
    check_distribution(e, 1_000)
    assert min(drafted.count(1), drafted.count(2)) > 200


# ---------------------------------------------------------------- times

def test_times_are_measured_and_nothing_else_changes(monkeypatch):
    """The least of a few rounds, and never more than of a larger K; once for each span."""
    clock, plays = [0.0], []
    monkeypatch.setattr(L, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    e = stopping(models()["target"], models()["good"], ks=(1, 2, 4, 8), temperature=0.8, seed=3)
    real = e.play

    def play(e, span, k):
        plays.append((span, real(e, span, k)))
        slow = {1: 3.0, 2: 5.0, 4: 4.0, 8: 9.0}[k] + (len(plays) % 4 == 1) * 50
        clock[0] += slow / 1000
        return k

    e.play = play
    plain = Engine(e.target, LlamaDrafter(models()["good"]), speculate_k=8, temperature=0.8, seed=3)
    with torch.inference_mode():
        assert e.prefill(tokens(9), 50) == plain.prefill(tokens(9), 50)
        assert [k for _, k in plays] == [1, 2, 4, 8] * L.PLAYS  # as told, although it may stop
        seconds = e.chooser.seconds
        # The first K of each turn was slow every time: no more than the next one's.
        assert [round(1000 * t, 6) for t in e.chooser.costs[64]] == [4.0, 4.0, 4.0, 9.0]
        line = torch.linalg.lstsq(torch.tensor([[1.0, k] for k in (1, 2, 4, 8)]).double(),
                                  torch.tensor([[4.0], [4], [4], [9]]).double()).solution
        assert 1000 * seconds[4] == pytest.approx(float(line[0] + 4 * line[1]))
        assert e.outcome[-5:].tolist() == plain.outcome[-5:].tolist()
        assert torch.equal(e.rng.get_state(), plain.rng.get_state())
        e.prefill(tokens(9), 50)
        assert len(plays) == 4 * L.PLAYS
        e.drafter.bounds = [2.0] * 8  # as a round left them
        e.prefill(tokens(70), 50)
        assert [k for _, k in plays[4 * L.PLAYS:]] == [1, 2, 4, 8] * L.PLAYS
        assert len(plays) == 8 * L.PLAYS and plays[-1][0] == 128 and plays[0][0] == 64
        monkeypatch.setattr(L, "ENOUGH", 0.05)  # the first turn took longer
        e.chooser.costs = {}
        e.prefill(tokens(9), 50)
        assert len(plays) == 8 * L.PLAYS + 4


def test_which_rule_a_drafter_gets_and_whose_times_count(monkeypatch):
    llama = LlamaDrafter(models()["good"])
    drafter, chooser = automatic(llama, Auto())
    assert type(drafter) is StoppingLlama and type(chooser) is EarlyStop
    assert drafter.model is llama.model and chooser.drafter is drafter
    assert automatic(llama, 32) == (llama, None) and automatic(None, 0) == (None, None)
    told = Told([], None)
    assert automatic(told, Auto())[0] is told and type(automatic(told, Auto())[1]) is BestK
    monkeypatch.setattr("ranks.job.world", lambda: 2)  # ranks might stop at different tokens
    drafter, chooser = automatic(llama, Auto())
    assert drafter is llama and type(chooser) is BestK
    monkeypatch.setattr("ranks.job.broadcast", lambda value: [5, 4, 3, 2, 1])
    chooser.begin(SimpleNamespace(span=lambda n: 64, tokens=[], drafted=32))
    assert chooser.choose(None) == 32


# ---------------------------------------------------------------- compiled

@pytest.mark.slow
@pytest.mark.parametrize("whole, temperature", [(8, 0.0), (8, 0.9), (0, 0.9)])
def test_nothing_is_compiled_after_the_warm_up_and_the_text_is_the_eager_one(
        whole, temperature, counter, monkeypatch):  # noqa: F811
    monkeypatch.setattr("graphs.WHOLE", whole)
    config = tiny_config(max_position_embeddings=300)
    target, small = random_model(config, seed=1), random_model(config, seed=1)
    for p in small.parameters():
        p.data += 0.05 * p.data.std() * torch.randn(p.shape,
                                                    generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    eager, fast = (stopping(target, small, head(weight=0.05), "judge", ks=(1, 3),
                            chooser=ByHand, temperature=temperature, seed=4) for _ in range(2))
    compile_engine(fast)
    warm_up(fast, 1, 300)
    warm = counter.frame_count
    # One for prompts, one draft loop, two verifications; by blocks see test_compile.
    assert warm == 4 or not whole
    for n, new in ((1, 10), (63, 70), (230, 50), (299, 5), (2, 40)):
        want, got = (generate(e, tokens(n, seed=n), new) for e in (eager, fast))
        assert (got.tokens, got.accept_counts) == (want.tokens, want.accept_counts)
    assert counter.frame_count == warm


# ---------------------------------------------------------------- commands

@pytest.mark.parametrize("draft", [["{}/draft"], ["{}/eagle"], ["ngram"]], ids=" ".join)
def test_generate_with_auto(home, tmp_path, monkeypatch, draft):  # noqa: F811
    auto = written(monkeypatch, home, tmp_path, "--draft", *draft, "--speculate_k", "auto")
    assert auto["tokens"] == written(monkeypatch, home, tmp_path)["tokens"]
    assert len(auto["accept_counts"]) == 33
    one = written(monkeypatch, home, tmp_path, "--draft", *draft, "--speculate_k", "auto",
                  "--max_new_tokens", "1")  # no room for a round, which is timed all the same
    assert one["tokens"] == auto["tokens"][:1] and one["rounds"] == 0


def test_auto_without_a_draft_is_the_target_alone(home, tmp_path, monkeypatch):  # noqa: F811
    alone = written(monkeypatch, home, tmp_path, "--speculate_k", "auto")
    assert alone["accept"] == "target" and len(alone["tokens"]) == 24


def test_eval_with_auto(home, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Its answers are not those of a number, and its K is said."""
    flags = flags_of(home, "--rules", "target,standard", "--drafters", "llama,eagle-tree,ngram",
                     "--tree", "3,2", "--out", tmp_path)
    E.main([*flags, "--speculate_k", "auto"])
    said = capsys.readouterr().out
    assert "K = auto" in said and "on 9 of 9 answers" in said
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["speculate_k"] == "auto"
    E.main([*flags, "--speculate_k", "auto", "--rescore"])
    with pytest.raises(UserError, match="speculate_k was auto, now 32"):
        E.main([*flags, "--speculate_k", "32"])
    session = E.Session(E.parse_args([*flags, "--speculate_k", "auto"]), [
        {"id": "1", "domain": "code", "prompt": "x", "answer": "y"}])
    kinds = {row: type(e.chooser) for row, e in session.engines.items()}
    assert kinds == {"target": type(None), "standard": EarlyStop, "standard/ngram": BestK,
                     "standard/eagle-tree": type(None)}


@pytest.mark.parametrize("command, flags, message", [
    (G, ["--target", "t", "--draft", "ngram", "--prompt", "x", "--speculate_k", "soon"], "soon"),
    (E, ["--replay", "f", "--target", "t", "--rules", "standard", "--speculate_k", "auto"],
     "--replay drafts nothing"),
    (B, ["--target", "llama-3.1-8b", "--draft", "llama-3.1-8b", "--speculate_k", "4,auto"],
     "--speculate_k auto is used with --prompts")])
def test_what_auto_does_not_fit_is_refused(command, flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        run_command(monkeypatch, command, *flags, "--device", "cpu")
    error = capsys.readouterr().err
    assert e.value.code == 2 and message in error and error.count("\n") == 1


def test_auto_is_a_number_equal_to_none():
    """It reaches worker processes and ranks, and beside another rank's 32 it is refused."""
    auto = draft_length("auto")
    assert f"K={auto}" == "K=auto" and auto + 1 == 33 and auto != 32 and 32 != auto
    assert pickle.loads(pickle.dumps(auto)) == auto == draft_length("auto")
    given = B.numbers(draft_length, "speculate_k")("auto,32,4,auto")
    assert given[0] == 4 and {*given[1:]} == {32, auto} and len(given) == 3


@pytest.mark.slow
def test_ranks_choose_alike(home, tmp_path, monkeypatch):  # noqa: F811
    draft = ["--draft", "{}/draft", "--speculate_k", "auto"]
    want = written(monkeypatch, home, tmp_path, *draft)["tokens"]
    args = filled(home, [*BASE, *draft, "--json", tmp_path / "2.json"])
    done = torchrun(ROOT / "generate.py", *args)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "2.json").read_text())["tokens"] == want
