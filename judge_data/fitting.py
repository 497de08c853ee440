"""Logistic regression on hidden states, for every setting of a grid at once, and the threshold that
lets through a given share of the errors.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from judge import above_threshold
from judge_data import report

PATIENCE = 10  # epochs without a better one


class Fit(NamedTuple):
    """The best epoch of a setting, by the AUC on the validation tokens."""
    negative_weight: float
    weight_decay: float
    epochs: int
    auc: float
    weight: Tensor  # [1, D]
    bias: Tensor  # [1]


def grid(y: Tensor, negative_weight: float | None,
         weight_decay: float | None) -> list[tuple[float, float]]:
    """(negative_weight, weight_decay) of every setting to try, where they are not given.

    An error token weighs as much as a correct one, or both classes weigh the same, or between.
    """
    balance = float((y == 1).sum() / (y == 0).sum())
    weights, decays = [negative_weight], [weight_decay]
    if negative_weight is None:
        weights = sorted({1.0, math.sqrt(balance), balance})
    if weight_decay is None:
        decays = [0.01, 0.1, 1.0]
    return [(w, d) for w in weights for d in decays]


def fit(x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, settings: list[tuple[float, float]],
        lr: float, epochs: int, seed: int) -> list[Fit]:
    """Logistic regression with AdamW for every (negative_weight, weight_decay).

    Each is stopped at its best validation AUC; losses cannot be compared between weights, and the
    threshold is found afterwards. All settings train at once, as columns of one matrix: Adam is
    elementwise, so no column depends on another.
    """
    # Dimensions differ widely in size; the scaling is folded into the weights below.
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, x_val = (x - mean) / std, (x_val - mean) / std
    n = len(settings)
    negative_weight, weight_decay = torch.tensor(settings).T
    weight = torch.zeros(x.shape[1], n, requires_grad=True)
    bias = torch.zeros(n, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    best = [Fit(*s, 0, -1.0, None, None) for s in settings]
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(x), generator=generator).split(1024):
            optimizer.zero_grad()
            labels = y[batch, None].float()
            cost = torch.where(labels == 0, negative_weight, 1.0)
            loss = F.binary_cross_entropy_with_logits(
                x[batch] @ weight + bias, labels.expand(-1, n), cost, reduction="none")
            (loss.sum(0) / cost.sum(0)).sum().backward()
            with torch.no_grad():
                weight.mul_(1 - lr * weight_decay)
            optimizer.step()
        with torch.no_grad():
            for i, column in enumerate((x_val @ weight + bias).T):
                area = report.auc(column, y_val)
                if area > best[i].auc:
                    w = weight[None, :, i] / std
                    best[i] = best[i]._replace(epochs=epoch, auc=area, weight=w,
                                               bias=bias[i:i + 1] - w @ mean)
        if epoch - max(b.epochs for b in best) == PATIENCE:
            break
    return best


def calibrate(scores: Tensor, labels: Tensor, max_false_accept: float) -> float:
    """The lowest threshold at which at most this share of the error tokens is accepted."""
    errors = scores[labels == 0].sort(descending=True).values
    allowed = next(k for k in range(len(errors), -1, -1) if k / len(errors) <= max_false_accept)
    if allowed == len(errors):
        return 0.0
    # The rule accepts what is above the threshold, so this score and its equals are rejected.
    threshold = report.probability(float(errors[allowed]))
    while int(above_threshold(errors, threshold).sum()) > allowed:  # rounding
        threshold = math.nextafter(threshold, 1.0)
    return threshold
