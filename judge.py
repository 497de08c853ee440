"""The judge: its rule and its head, the table of rules, the mathematics of sampling. No model.

A verification reads K drafted tokens d_1..d_K. Row i of the target's logits predicts d_i: it comes
from the position *before* d_i. The judge's score of d_i comes from the hidden state at d_i's *own*
position, after the target has read it. The standard test keeps the target's output; a rule gives a
mask bool [K] of tokens to accept all the same. The longest accepted prefix is kept.

A new rule is a function of (Verified, parameter), here or as those in rules.py, and a row of RULES.
"""
import json
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

import rules
from common import is_finite, json_values, list_of, number, open_weights, refuse, write_tensors

FORMAT = "1"
SAID = {"threshold": number(0, 1)._replace(needed=True),
        "curve": list_of(list_of(number(0, 1), "numbers"), "rows")}
COLDEST = 1e-30  # temperature; logits over a lower one overflow float32, so from here on greedy


# ---------------------------------------------------------------- rules

class Verified(NamedTuple):
    """What one verification tells a rule about K drafted tokens."""
    logits: Tensor  # [K, V]: the target's, at the position before each drafted token
    hidden: Tensor  # [K, D]: the target's last hidden state at each drafted token's own position
    drafted: Tensor  # int64 [K]
    draft_logits: Tensor | None = None  # [K, V or fewer], if needs_draft_logits or when sampling
    scores: Tensor | None = None  # [K]: the head's, where the rule needs_judge
    passed: Tensor | None = None  # bool [K]: passed the standard test
    p: Tensor | None = None  # [K]: the drafted tokens' probability as sampled; None when greedy
    coin: Tensor | None = None  # [K], uniform in [0, 1), below p only where `passed`; as p


def above_threshold(scores: Tensor, threshold: float) -> Tensor:
    """Judge Decoding (arXiv 2501.19309): sigmoid(scores) > threshold, bool in the shape of scores;
    compared as score > logit(threshold), so that 0 accepts and 1 rejects every finite score.
    """
    if threshold <= 0 or threshold >= 1:
        return torch.full_like(scores, threshold <= 0, dtype=torch.bool)
    return scores > math.log(threshold / (1 - threshold))


class Rule(NamedTuple):
    """A row of RULES. `accept(v, parameter)` -> bool [K], OR-ed with the standard test."""
    accept: Callable = lambda v, _: torch.zeros_like(v.drafted, dtype=torch.bool)
    parameter: str = ""  # letters for help and errors; "" without one, "K,D": a tuple of two
    about: str = ""  # what is accepted and which parameters are valid
    valid: Callable[..., bool] = lambda *x: True
    default: float | tuple | None = None  # None: must be given, or is the judge file's
    needs_draft_logits: bool = False
    needs_judge: bool = False
    needs_chain: bool = False  # it looks at the tokens that follow, or at chances: no trees
    needs_coin: bool = False
    ahead: Callable = lambda x: 0  # of a parameter: the drafted tokens after it that it looks at

    def parameter_for(self, given, head: "JudgeHead | None") -> float | tuple | None:
        """The parameter given, else the head's threshold, else the row's default."""
        return given if given is not None else head.threshold if self.needs_judge else self.default


RULES = {
    "standard": Rule(about="the target's argmax; when sampling, rejection sampling"),
    "topk": Rule(rules.topk, "K", "one of the target's top K, a whole number from 1",
                 valid=lambda k: k >= 1 and k % 1 == 0),
    "typical": Rule(rules.typical, "E", "typical acceptance with epsilon E, 0 < E < 1, default "
                    "0.09", valid=lambda e: 0 < e < 1, default=0.09),
    "kl": Rule(rules.kl, "D", "KL divergence of target and draft below D, from 0",
               valid=lambda d: d >= 0, needs_draft_logits=True),
    "relaxed": Rule(rules.relaxed, "K,D", "one of the target's top K, by at most D less probable "
                    "than the first: K a whole number from 1, 0 <= D <= 1, default 10,0.6",
                    valid=lambda k, d: k >= 1 and k % 1 == 0 and 0 <= d <= 1, default=(10, 0.6)),
    "margin": Rule(rules.margin, "R", "the target's second choice, its logit above R times the "
                   "first's, 0 < R < 1, default 0.9", valid=lambda r: 0 < r < 1, default=0.9),
    "fly": Rule(rules.fly, "E,W", "where the target's entropy is at least E and the next W tokens "
                "pass: E from 0, W a whole number from 1, default 0.3,6", default=(0.3, 6),
                valid=lambda e, w: e >= 0 and w >= 1 and w % 1 == 0, needs_chain=True,
                ahead=lambda x: x[1]),
    "thresholds": Rule(rules.thresholds, "S,A", "when sampling, a token of probability p >= S, any "
                       "other with probability p / A: 0 <= S <= 1, 0 < A <= 1",
                       valid=lambda s, a: 0 <= s <= 1 and 0 < a <= 1, needs_chain=True,
                       needs_coin=True),
    "judge": Rule(lambda v, t: above_threshold(v.scores, t), "T",
                  "judge's probability above T, 0 <= T <= 1, default the judge file's",
                  valid=lambda t: 0 <= t <= 1, needs_judge=True),
}


def accept_mask(v: Verified, accept: str, parameter, inside: Tensor | bool = True) -> Tensor:
    """bool [K]: tokens that passed the standard test or that the rule `accept` lets in, `inside`
    the span that it is bound to.
    """
    return v.passed | RULES[accept].accept(v, parameter) & inside


# ---------------------------------------------------------------- the standard test, sampling

def top1(logits: Tensor) -> Tensor:
    """argmax of [..., V]; in parts of 128, since a compiled argmax is one block of a GPU a row."""
    if logits.shape[-1] % 128:
        return logits.argmax(-1)
    best, at = logits.unflatten(-1, (-1, 128)).max(-1)
    part = best.argmax(-1, keepdim=True)
    return (128 * part + at.gather(-1, part))[..., 0]


def rejection_test(p: Tensor, q: Tensor, drafted: Tensor, u: Tensor) -> Tensor:
    """The sampled standard test (arXiv 2211.17192): accept with probability min(1, p/q). bool [K].
    p [K, V], q [K, V or fewer]: probabilities of target and draft; u [K] uniform in [0, 1). With
    `residual` for the token after the first rejection, the output has the target's distribution.
    """
    at = drafted[:, None]
    return u * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Next-token distribution after a rejection: max(p - q, 0), normalised. [..., V]."""
    rest = (p - q).clamp(min=0)
    mass = rest.sum(-1, keepdim=True)
    return torch.where(mass > 0, rest / mass, p)  # no mass: p equals q, so nothing was rejected


def probabilities(logits: Tensor, temperature: float, top_k=None, top_p=None) -> Tensor:
    """Next-token distribution after temperature, top-k and top-p: float32 [..., V]."""
    logits = logits.float() / max(temperature, COLDEST)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, index = p.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays
        p = p.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), 0)
        p = p / p.sum(-1, keepdim=True)
    return p


def sample(p: Tensor, noise: Tensor) -> Tensor:
    """One index per row: p [..., V], noise [..., V or more], exponential, -> int64 [...]. Such a
    race never synchronises, unlike multinomial, and the same noise gives the same token.
    """
    return (p / noise[..., :p.shape[-1]]).argmax(-1)


# ---------------------------------------------------------------- the head

class JudgeHead(nn.Module):
    """A linear head on the target's last hidden state. threshold: the rule's default. target:
    checkpoint.fingerprint of its target. curve: rows (threshold, share of errors accepted, share of
    correct tokens rejected) on validation data.
    """

    def __init__(self, weight: Tensor, bias: Tensor, threshold: float, target: str, curve=()):
        super().__init__()
        self.weight = nn.Parameter(weight.float(), requires_grad=False)  # [1, D]
        self.bias = nn.Parameter(bias.float(), requires_grad=False)  # [1]
        self.threshold, self.target, self.curve = threshold, target, curve

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> float32 [...]: log-odds that the token here is correct in context."""
        # A product and a sum: compiled, they join a loop that is there anyway.
        return (hidden.to(self.weight.dtype) * self.weight[0]).sum(-1) + self.bias[0]

    def save(self, path):
        """Write the judge file; the same head gives the same bytes."""
        metadata = {"format": FORMAT, "dim": str(self.weight.shape[1]), "target": self.target,
                    "threshold": repr(self.threshold), "curve": json.dumps(self.curve)}
        write_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path, dim: int, target: str, target_name: str, parent: str | None = None):
        """The head in a judge file, for a target of width `dim` and fingerprint `target`, or of
        the `parent` it was quantized from; raises UserError for any other, or a damaged one.
        """
        with open_weights(path) as f:
            meta = f.metadata() or {}
            refuse((meta.get("format") != FORMAT or sorted(f.keys()) != ["bias", "weight"],
                    f"{path} is not a judge file of format {FORMAT}; make one with train_judge.py"))
            said = json_values(meta, SAID, path)
            head = cls(f.get_tensor("weight"), f.get_tensor("bias"), said["threshold"],
                       meta.get("target", ""), tuple(map(tuple, said.get("curve", ()))))
        advice = "train one for this target with train_judge.py"
        refuse((head.weight.shape[-1:] != (dim,), f"judge {path} is for a target of width "
                f"{head.weight.numel()}, but {target_name} has width {dim}; {advice}"),
               (head.target not in (target, parent), f"judge {path} was trained on target "
                f"{head.target}, but {target_name} is {target}; {advice}"),
               ((head.weight.shape, head.bias.shape) != ((1, dim), (1,))
                or not all(map(is_finite, head.parameters())), f"{path} is damaged; {advice}"))
        return head
