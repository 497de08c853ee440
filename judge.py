"""The judge head, its file, and the acceptance rules: pure functions on the tensors of one
verification, no model inside.

A verification reads K drafted tokens d_1..d_K. Row i of the target's logits is what it expected
where d_i stands (the position *before* d_i); the judge's score of d_i comes from the hidden state
at d_i's *own* position, after the target has read it. A rule gives a mask [K]; the longest run of
True from the front is accepted. Rules that let in more than the standard test are used as `standard
| rule`.
"""
import json
import math
from dataclasses import dataclass, replace

import torch
from safetensors.torch import save
from torch import Tensor

from cli import UserError, replacing
from model import open_weights

FORMAT = "1"
SURE = 0.9  # kl: above this probability of its likeliest token the target is not to be argued with


# ---------------------------------------------------------------- rules

# what follows a rule's name where rules are listed
FORMS = {"standard": "", "topk": ":K", "typical": "[:E]", "kl": ":D", "judge": "[:T]"}
VALID = {"topk": lambda x: x >= 1 and x % 1 == 0, "judge": lambda x: 0 <= x <= 1,
         "typical": lambda x: 0 < x < 1, "kl": lambda x: x >= 0}


RULES = tuple(FORMS)


def parse_rule(text: str, plain=()) -> tuple[str, float | None]:
    """(name, parameter or None) of a rule in writing, such as standard, topk:3 or judge:0.9;
    `plain` are more names, without a parameter.
    """
    forms = dict.fromkeys(plain, "") | FORMS
    name, colon, value = text.partition(":")
    form = forms.get(name)
    try:
        value = float(value) if colon else None
        if form is None or (not form if colon else form.startswith(":")) or colon and not (
                math.isfinite(value) and VALID[name](value)):
            raise ValueError
    except ValueError:
        raise UserError(f"{text!r} is not a rule; use "
                        f"{', '.join(rule + form for rule, form in forms.items())}") from None
    return name, value


def standard(logits: Tensor, drafted: Tensor) -> Tensor:
    """Greedy test: the drafted token is the target's likeliest. logits [K, V], drafted [K] -> bool
    [K].
    """
    return logits.argmax(-1) == drafted


def standard_sampled(p: Tensor, q: Tensor, drafted: Tensor, u: Tensor) -> Tensor:
    """Rejection sampling (Leviathan et al., arXiv 2211.17192): accept with probability min(1, p/q).

    p, q [K, V]: the target's and the draft's probabilities; u [K] uniform in [0, 1). With
    `residual` for the token after the first rejection, the output has exactly the target's
    distribution.
    """
    at = drafted[:, None]
    return u * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The distribution to sample from after a rejection: max(p - q, 0), normalised. p, q [..., V]
    -> [..., V].
    """
    rest = (p - q).clamp(min=0)
    mass = rest.sum(-1, keepdim=True)
    # no mass: p equals q, where the standard test rejects nothing
    return torch.where(mass > 0, rest / mass, p)


def topk(logits: Tensor, drafted: Tensor, k: int) -> Tensor:
    """Accept a token among the target's k likeliest (the paper's naive baseline). logits [K, V],
    drafted [K] -> bool [K].
    """
    return (logits > logits.gather(1, drafted[:, None])).sum(-1) < k


def typical(logits: Tensor, drafted: Tensor, epsilon: float) -> Tensor:
    """Typical acceptance (Medusa, arXiv 2401.10774): p(token) > min(epsilon, sqrt(epsilon)
    exp(-H)), H the entropy of p.

    The less sure the target is, the less likely a token may be. p at temperature 1. logits [K, V],
    drafted [K] -> bool [K].
    """
    logp = logits.float().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    bound = (math.sqrt(epsilon) * (-entropy).exp()).clamp(max=epsilon)
    return logp.gather(1, drafted[:, None])[:, 0].exp() > bound


def kl(logits: Tensor, draft_logits: Tensor, divergence: float) -> Tensor:
    """Training-free (arXiv 2601.04766): accept where KL(target || draft) is below `divergence`,
    unless the target is SURE.

    Then the standard test alone decides. Both distributions at temperature 1; 0 is the standard
    rule. logits, draft_logits [K, V] -> bool [K].
    """
    logp, logq = logits.float().log_softmax(-1), draft_logits.float().log_softmax(-1)
    p = logp.exp()
    return ((p * (logp - logq)).sum(-1) < divergence) & (p.amax(-1) <= SURE)


def judge(scores: Tensor, threshold: float) -> Tensor:
    """Accept iff sigmoid(score) > threshold. scores [K] -> bool [K].

    Compared as score > logit(threshold), so that 0 accepts and 1 rejects every finite score,
    without rounding.
    """
    if threshold <= 0 or threshold >= 1:
        return torch.full_like(scores, threshold <= 0, dtype=torch.bool)
    return scores > math.log(threshold / (1 - threshold))


def accepted(mask: Tensor) -> Tensor:
    """Length of the run of True from the front: bool [K] -> int64 scalar."""
    return mask.long().cumprod(0).sum()


def probabilities(logits: Tensor, temperature: float, top_k: int | None = None,
                  top_p: float | None = None) -> Tensor:
    """What is sampled from, float32 [..., V]: temperature > 0, then the top_k likeliest, then the
    smallest set of mass top_p.
    """
    logits = logits.float() / temperature
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
    """One index per row: p [..., V], noise [..., V] drawn from the exponential distribution ->
    int64 [...].

    An exponential race: unlike multinomial it never synchronises, and the same noise gives the same
    token compiled or not.
    """
    return (p / noise).argmax(-1)


# ---------------------------------------------------------------- the head

@dataclass
class Judge:
    """A linear head on the target's last hidden state, and which target it belongs to."""
    weight: Tensor  # float32 [1, dim]
    bias: Tensor  # float32 [1]
    threshold: float
    target: str  # model.fingerprint of the target's checkpoint
    # (threshold, share of the errors accepted, share of the correct rejected) on validation data,
    # if it was measured
    curve: tuple = ()

    def scores(self, hidden: Tensor) -> Tensor:
        """hidden [..., dim] -> float32 [...]: the log-odds that the token at this position is
        correct in context.
        """
        # compiled, part of a loop that is there anyway
        return (hidden.to(self.weight.dtype) * self.weight[0]).sum(-1) + self.bias[0]

    def to(self, device):
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def save(self, path):
        metadata = {"format": FORMAT, "dim": str(self.weight.shape[1]), "target": self.target,
                    "threshold": repr(self.threshold)}
        if self.curve:
            metadata["curve"] = json.dumps(self.curve)
        data = save({"weight": self.weight.float().contiguous(),
                     "bias": self.bias.float().contiguous()}, metadata)
        end = 8 + int.from_bytes(data[:8], "little")
        # else its order is random, and so are the bytes
        header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":"))
        with replacing(path) as tmp:
            tmp.write_bytes(data[:8] + header.encode().ljust(end - 8) + data[end:])

    @classmethod
    def load(cls, path, dim: int, target: str, target_name: str, parent: str | None = None):
        """Read a judge file for the target of width `dim` and fingerprint `target`; anything else
        is refused by name.

        `parent` is the fingerprint of the checkpoint that the target was quantized from, if it was:
        that one's judge is taken as well, for the hidden states differ by rounding only. One
        trained on the quantized target itself fits closer; it is not taken for the parent, nor for
        another quantization of it.
        """
        with open_weights(path) as f:
            meta = f.metadata() or {}
            if meta.get("format") != FORMAT or sorted(f.keys()) != ["bias", "weight"]:
                raise UserError(f"{path} is not a judge file of format {FORMAT}; make one with "
                                "train_judge.py")
            curve = tuple(map(tuple, json.loads(meta.get("curve", "[]"))))
            judge = cls(f.get_tensor("weight").float(), f.get_tensor("bias").float(),
                        float(meta["threshold"]), meta["target"], curve)
        if judge.weight.shape != (1, dim):
            raise UserError(f"judge {path} is for a target of width {judge.weight.shape[-1]}, but "
                            f"{target_name} has width {dim}; "
                            "train one for this target with train_judge.py")
        if judge.target not in (target, parent):
            raise UserError(f"judge {path} was trained on target {judge.target}, but "
                            f"{target_name} is {target}; "
                            "train one for this target with train_judge.py")
        return judge
