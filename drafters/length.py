"""`--speculate_k auto`: how many tokens a round drafts, from past acceptance and measured times.

`BestK` chooses a K before each round; it serves every drafter. `EarlyStop` lets a Llama draft on
until another token is not worth its time. It reads the draft's confidence on the host after each
token, which is free on a CPU; on a GPU that would be a synchronisation a token and a length that no
recording can have, and ranks could disagree by a last bit, so there it is `BestK`.

Greedy standard output and the sampled distribution do not depend on K. Other rules' texts, and
which samples are drawn, depend on where rounds end, so here on times measured.
"""
import functools
import time
from itertools import pairwise
from statistics import linear_regression

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError, refuse
from drafters.drafter import Drafter
from drafters.llama import LlamaDrafter
from engine import Engine, Settings, choose
from model import Cache, Transformer
from ranks import job

FEW = 2, 4, 8, 16, 32  # BestK's
KS = 2, 4, 6, 9, 14, 22  # where a draft may stop; each is a verification to compile
MOST = max(*FEW, *KS)
BINS = 5  # of confidence
MEMORY = 0.97  # what an outcome counts once there is another
PLAYS, ENOUGH = 4, 1.0  # rounds of each K that are timed; after so many seconds no further turn


class Auto(int):
    """`--speculate_k auto`: as a number, the most that a round drafts, but equal to no number."""
    def __new__(cls, most=MOST):
        return super().__new__(cls, most)

    def __repr__(self):
        return "auto"

    def __eq__(self, other):
        return isinstance(other, Auto)

    def __ne__(self, other):
        return not self == other

    __str__, __hash__ = __repr__, int.__hash__


def draft_length(text: str) -> int:
    """What --speculate_k spells: a number, or auto. Raises UserError."""
    try:
        return Auto() if text == "auto" else int(text)
    except ValueError:
        raise UserError(f"--speculate_k {text}: give a whole number from 1, or auto") from None


def mean_run(rate: float, k: int) -> float:
    """Drafted tokens accepted of k, each with probability `rate` up to the first refusal; with the
    target's own it is one more, (1 - rate^(k + 1)) / (1 - rate): arXiv 2211.17192, eq. 1.
    """
    return sum(rate ** i for i in range(1, k + 1))


def seconds_of_rounds(e: Engine, ks: list[int], span: int) -> list[float]:
    """What a round of each K takes, never more than one of a larger K; nothing of e changes."""
    outcome, random, start = e.outcome.clone(), e.rng.get_state(), time.perf_counter()
    least = dict.fromkeys(ks, float("inf"))
    for _ in range(PLAYS):
        for k in ks:
            began = time.perf_counter()
            e.play(e, span, k)
            e.outcome.tolist()  # waits for the device
            least[k] = min(least[k], time.perf_counter() - began)
            e.outcome.copy_(outcome)
        if job.broadcast(time.perf_counter() - start > ENOUGH):  # ranks play the same rounds
            break
    e.rng.set_state(random)
    return [min(least[j] for j in ks[i:]) for i in range(len(ks))]


class BestK:
    """The K of `ks` with most tokens per second: under a geometric run of acceptances, whose rate
    the rounds so far tell, in the time that a round of this K takes here (arXiv 2211.17192).
    """

    def __init__(self, ks=FEW):
        self.ks = sorted({*ks})
        refuse((not ks or self.ks[0] < 1, f"draft lengths {ks}: they must be whole numbers from 1"))
        self.accepted, self.refused = 3.0, 1.0  # a guess that counts as a round
        self.costs = {}  # of each span, what `seconds_of_rounds` gives

    @property
    def rate(self) -> float:
        """The probability that a token is accepted; never 0, so that it can be divided by."""
        return max(1e-6, self.accepted / (self.accepted + self.refused))

    def begin(self, e: Engine):
        """Before a text's first round: measure, if its span of attention is a new one."""
        span = e.span(len(e.tokens) + e.drafted)
        if span not in self.costs:  # every rank must choose alike, so all take rank 0's times
            self.costs[span] = job.broadcast(seconds_of_rounds(e, self.ks, span))
        self.seconds = dict(zip(self.ks, self.costs[span]))

    def choose(self, e: Engine) -> int:
        """K of the next round."""
        return max(self.ks, key=lambda k: (1 + mean_run(self.rate, k)) / self.seconds[k])

    def saw(self, accepted: int, k: int):
        """Learn of a round that accepted so many of k; all of k is no refusal."""
        refused = accepted < k
        fade = MEMORY ** (accepted + refused)
        self.accepted = fade * self.accepted + accepted
        self.refused = fade * self.refused + refused


class EarlyStop(BestK):
    """Draft on while the tokens that this adds are worth more than the same time spent as so far.

    After k tokens they are P (a + a^2 + ...), up to the next k of `ks`: P the probability that all
    k are accepted, a the rate of acceptance. Their time is the difference of the two rounds', and
    time is worth the tokens per second made so far. P is a product over tokens as in EAGLE-2 (arXiv
    2406.16858), but not of the draft's confidences: of the acceptance seen at each, in BINS. A
    judge accepts tokens that a draft is unsure of; the standard test seldom does.

    An unsure token is drafted and tested all the same, only what follows it is not: so its
    acceptance stays known, and sampling stays exact, as the target's draws decide nothing of it.
    """

    def __init__(self, drafter: "StoppingLlama", ks=KS):
        super().__init__(ks)
        self.drafter = drafter
        # Of each bin, as if half a token had been seen: accepted as often as the draft is sure.
        self.tested = [0.5] * BINS
        self.right = [0.5 * (i + 0.5) / BINS for i in range(BINS)]
        self.tokens = self.spent = 0.0
        drafter.bounds = [0.0] * self.ks[-1]

    def begin(self, e: Engine):
        self.drafter.bounds = [0.0] * self.ks[-1]  # what is timed stops nowhere
        super().begin(e)
        # A few rounds are timed with noise, and bounds rest on differences; a line has less of it.
        step, first = linear_regression(self.ks, self.seconds.values())
        self.seconds = {k: first + step * k for k in self.ks}
        if not self.spent:
            k = super().choose(e)
            self.tokens, self.spent = 1 + mean_run(self.rate, k), self.seconds[k]

    def choose(self, e: Engine) -> int:
        """The longest of ks; the drafter is told the bounds at which it stops earlier."""
        worth = self.tokens / self.spent
        self.drafter.chances = [r / n for r, n in zip(self.right, self.tested)]
        for k, longer in pairwise(self.ks):
            more = self.seconds[longer] - self.seconds[k]
            self.drafter.bounds[k - 1] = worth * more / mean_run(self.rate, longer - k)
        return self.ks[-1]

    def saw(self, accepted: int, k: int):
        super().saw(accepted, k)
        self.tokens = MEMORY * self.tokens + accepted + 1
        self.spent = MEMORY * self.spent + self.seconds[k]
        for i, at in enumerate(self.drafter.bins[:min(accepted + 1, k)]):
            self.tested[at] = MEMORY * self.tested[at] + 1
            self.right[at] = MEMORY * self.right[at] + (i < accepted)


# ---------------------------------------------------------------- a draft that may stop

def sure_token(model: Transformer, hidden: Tensor, s: Settings, noise: Tensor | None):
    """`engine.next_token`, and the probability [1] that the draft gives its argmax."""
    logits = model.output(hidden[:, :model.config.dim])[:, :s.vocab_size]
    sure = logits.float().softmax(-1).amax(-1)
    return choose(logits, s, noise), logits if s.needs_draft_logits else None, sure


def first_step(model: Transformer, cache: Cache, last: Tensor, length: Tensor) -> Tensor:
    """The draft's hidden state [1, D] after the last two tokens of a text, as `draft_steps`."""
    tokens, pos = last, length + torch.arange(-2, 0, device=last.device)
    return model.features(tokens.clamp(max=model.config.vocab_size - 1)[None], pos, cache)[0, -1:]


def stopping_steps(model: Transformer, cache: Cache, last: Tensor, length: Tensor, s: Settings,
                   noise: Tensor | None, chances: Tensor, bounds: Tensor, sure_token=sure_token):
    """`draft_steps` up to len(bounds), until the product of the tokens' chances is below the bound
    of their number. Tokens [K], logits [K, V or fewer] or None, bins [K], and how many count [1].
    """
    hidden, chance, made = first_step(model, cache, last, length), 1.0, []
    chances, bounds = chances.tolist(), bounds.tolist()  # on the host: fewer small operations
    for i in range(len(bounds)):
        token, row, sure = sure_token(model, hidden, s, None if noise is None else noise[i:i + 1])
        at = min(BINS - 1, int(BINS * sure.item()))
        made.append((token, row, at))
        chance *= chances[at]
        if chance < bounds[i]:
            break
        if i < len(bounds) - 1:
            hidden = model.features(token[None], length + i, cache)[0]
    drafted, logits, bins = zip(*made)
    return (torch.cat(drafted), torch.cat(logits) if s.needs_draft_logits else None,
            torch.tensor(bins), torch.tensor([len(made)]))


def stopping_loop(model: Transformer, cache: Cache, last: Tensor, length: Tensor, s: Settings,
                  noise: Tensor | None, chances: Tensor, bounds: Tensor):
    """`stopping_steps` as the compiler sees it, a first step and a loop; rows beyond are zero."""
    in_bins = lambda sure: (sure * BINS).long().clamp(max=BINS - 1)
    token, row, sure = sure_token(model, first_step(model, cache, last, length), s,
                                  None if noise is None else noise[:1])
    more, at = len(bounds) - 1, in_bins(sure)

    def step(i, token, chance, drafted, bins, *logits):
        hidden = model.features(token[None], length + i - 1, cache)[0]
        token, row, sure = sure_token(model, hidden, s,
                                      None if noise is None else noise.index_select(0, i))
        at = in_bins(sure)
        return (i + 1, token, chance * chances[at], drafted.index_copy(0, i, token),
                bins.index_copy(0, i, at), *(rows.index_copy(0, i, row) for rows in logits))

    from torch._higher_order_ops import while_loop
    start = (torch.ones_like(length), token, chances[at], F.pad(token, (0, more)),
             F.pad(at, (0, more)), *(() if row is None else (F.pad(row, (0, 0, 0, more)),)))
    n, _, _, drafted, bins, *logits = while_loop(
        lambda i, token, chance, *_: (chance >= bounds.index_select(0, i - 1)).all(), step, start)
    return drafted, logits[0] if logits else None, bins, n


class StoppingLlama(LlamaDrafter):
    """A Llama draft on a CPU that stops where its chances fall below a bound."""

    def __init__(self, model: Transformer):
        super().__init__(model)
        self.steps, self.bins = stopping_steps, []
        self.chances, self.bounds = [1.0] * BINS, []  # of a bin; after each number of tokens

    def propose(self, state, k, span, s, noise):
        # Whatever k is, one shape: the bound ends it.
        bounds = torch.tensor([*self.bounds[:k - 1], torch.inf, *self.bounds[k:]])
        if noise is not None:
            noise = F.pad(noise, (0, 0, 0, len(bounds) - k), value=1.0)
        drafted, logits, bins, n = self.steps(
            self.model, self.cache.first(span), state.last, state.length, s, noise,
            torch.tensor(self.chances), bounds)
        n = int(n)
        self.bins = bins[:n].tolist()
        return drafted[:n], None if logits is None else logits[:n]

    def compile(self, build, by_block, whole):
        self.steps = whole(self.model, stopping_loop)
        if not self.steps:
            self.model = by_block(self.model)
            self.steps = functools.partial(stopping_steps, sure_token=build(sure_token))


def automatic(drafter: Drafter | None, k: int) -> tuple[Drafter | None, BestK | None]:
    """The drafter and the chooser of an engine with speculate_k = k, a number or Auto."""
    if not drafter or not isinstance(k, Auto):
        return drafter, None
    if type(drafter) is LlamaDrafter and job.world() == 1 and (
            drafter.model.norm.weight.device.type == "cpu"):
        drafter = StoppingLlama(drafter.model)
        return drafter, EarlyStop(drafter)
    return drafter, BestK()
