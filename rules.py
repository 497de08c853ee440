"""Acceptance rules of papers and serving systems, beside the judge's. judge.RULES names them.

Each takes a judge.Verified of K drafted tokens and its parameter, and gives a mask bool [K] of
tokens that are accepted beside those that pass the standard test. Pure functions of the target's
logits; probabilities are at temperature 1 where nothing else is said. And what binds a rule to a
span of the text.
"""
import math

import torch
from torch import Tensor

SURE = 0.9  # kl: above this top-1 probability of the target only the standard test applies


def at_drafted(v, rows: Tensor) -> Tensor:
    """Of rows [K, V], the drafted tokens' entries [K]."""
    return rows.gather(1, v.drafted[:, None])[:, 0]


def topk(v, k: float) -> Tensor:
    """Accept a token among the target's top k: the naive baseline of Judge Decoding's paper."""
    return (v.logits > at_drafted(v, v.logits)[:, None]).sum(-1) < k


def typical(v, epsilon: float) -> Tensor:
    """Typical acceptance (Medusa, arXiv 2401.10774): p(token) > min(epsilon, sqrt(epsilon) e^-H), H
    the entropy of p.
    """
    logp = v.logits.float().log_softmax(-1)
    bound = (math.sqrt(epsilon) * (logp.exp() * logp).sum(-1).exp()).clamp(max=epsilon)
    return at_drafted(v, logp).exp() > bound


def kl(v, divergence: float) -> Tensor:
    """Accept where KL(target || draft) < divergence and the target is not SURE (arXiv 2601.04766).
    The target's mass on tokens that the draft cannot draft is added.
    """
    logp, logq = v.logits.float().log_softmax(-1), v.draft_logits.float().log_softmax(-1)
    p, n = logp.exp(), logq.shape[-1]
    logq = logq.where(logq > -math.inf, logp[:, :n] - 1)  # so that p (logp - logq) is p
    total = (p[:, :n] * (logp[:, :n] - logq)).sum(-1) + p[:, n:].sum(-1)
    return (total < divergence) & (p.amax(-1) <= SURE)


def relaxed(v, k_delta: tuple[float, float]) -> Tensor:
    """TensorRT-LLM's relaxed acceptance: one of the target's top k whose p(token) is at least
    p(top 1) - delta. There it holds for the thinking span only: relaxed:10,0.6@think.
    """
    k, delta = k_delta
    p = v.logits.float().softmax(-1)
    return topk(v, k) & (at_drafted(v, p) >= p.amax(-1) - delta)


def margin(v, ratio: float) -> Tensor:
    """MARS (arXiv 2601.15498): the target's second choice, where its logit is above `ratio` times
    the first one's: of logits, not of probabilities, so never where the first is not positive.
    """
    first, second = v.logits.float().topk(2).values.unbind(-1)
    return topk(v, 2) & (second > ratio * first)


def fly(v, entropy_window: tuple[float, float]) -> Tensor:
    """FLy (arXiv 2511.22972): a mismatch where the target is unsure, and which the next W drafted
    tokens show to be harmless: all of them pass the standard test. Unsure: -sum p ln p over the top
    3 is at least E, as in the published code. Of the last W drafted tokens none is let in.
    """
    entropy, window = entropy_window[0], int(entropy_window[1])
    logp = v.logits.float().log_softmax(-1).topk(min(3, v.logits.shape[-1])).values
    ahead = torch.cat((v.passed, v.passed.new_zeros(window))).unfold(0, window, 1)[1:].all(-1)
    return (-(logp.exp() * logp).sum(-1) >= entropy) & ahead


def thresholds(v, single_acc: tuple[float, float]) -> Tensor:
    """SGLang's two thresholds for sampled acceptance: a token with p >= single, any other with
    probability p / acc, at the sampling's temperature, top-k and top-p. What the standard test lets
    in counts towards that share, so 1,1 adds nothing. Greedy, p is 0 or 1: it adds nothing either.
    """
    single, acc = single_acc
    if v.p is None:
        return torch.zeros_like(v.passed)
    return (v.p > 0) & ((v.p >= single) | (v.coin * acc < v.p))


# ---------------------------------------------------------------- spans

def inside_after(inside: Tensor, tokens: Tensor, span: tuple[int, int], tree=None) -> Tensor:
    """int64 [N + 1], 1 where a text is between the two ids of `span`: as it stands, `inside` [1],
    and after each of the tokens [N] that follow it, one after another or as a drafters.tree.Tree.
    """
    mark = torch.cat((2 * inside - 1, (tokens == span[0]).long() - (tokens == span[1]).long()))
    if tree:
        latest = torch.where(tree.upto & (mark != 0), tree.depth + 1, 0).argmax(-1)
    else:
        latest = (torch.arange(len(mark), device=mark.device) * (mark != 0)).cummax(0).values
    return (mark.index_select(0, latest) + 1) // 2


def within(span: tuple[int, int] | None, prompt: list[int], text: Tensor) -> Tensor:
    """bool [M]: the tokens of text [M] between the two ids of `span`; all, where there is none."""
    if not span:
        return torch.ones_like(text, dtype=torch.bool)
    after = inside_after(text.new_zeros(1), torch.cat((text.new_tensor(prompt), text)), span)
    return after[len(prompt):-1].bool() & (text != span[1])
