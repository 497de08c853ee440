"""Intervals and p-values of eval.py's tables. None says anything of problems unlike these."""
import math

import torch

Z = 1.959963984540054  # of a two-sided 95% interval
DRAWS = 2000  # of a bootstrap


def wilson(right: float, n: float, z=Z) -> tuple[float, float]:
    """The 95% interval of a share `right` of `n` (Wilson 1927).

    Unlike the normal one it stays in [0, 1] and has a width at 0 and 1.
    """
    p, z2 = right / n, z * z
    middle, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)
    return min(p, max(0.0, low)), max(p, min(1.0, high))  # p is inside, but for rounding


def of_problems(shares: list[float], answers: int) -> tuple[float, float]:
    """The 95% interval of the mean share of right answers, `shares` one for each problem.

    Samples of one problem are not independent. So Wilson's interval is taken with the effective
    number of answers (Kish 1965; Korn and Graubard 1998): those that, if independent, would vary as
    the problems' mean does; `answers` at most. With one answer a problem it is Wilson's own. Where
    all are right, or all wrong, nothing tells how alike a problem's samples are: then a problem
    counts once.
    """
    n, p = len(shares), sum(shares) / len(shares)
    variance = sum((share - p) ** 2 for share in shares) / n
    once = n if p in (0, 1) else answers
    return wilson(p * (m := min(answers, n * p * (1 - p) / variance) if variance else once), m)


def pass_at(k: int, right: int, n: int) -> float:
    """The chance that one of k answers is right, estimated without bias from n >= k answers, of
    which `right` are: 1 - C(n - right, k) / C(n, k) (Chen et al., arXiv 2107.03374).
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p-value of McNemar's test.

    The probability that a fair coin splits the won + lost problems at least as unevenly as this.
    """
    n = won + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(won, lost) + 1)) / 2**n)


def sign_flip(differences: list[int]) -> float:
    """Exact two-sided p-value of the paired permutation test (Fisher's; Good 2005).

    differences: of each problem, how many more of its samples one side got right. If the sides were
    alike, each might as well have the other sign: the probability that with random signs their sum
    is at least as far from 0. With one sample a problem it is McNemar's test.
    """
    sizes = [abs(d) for d in differences if d]
    most = sum(sizes)
    p = torch.zeros(2 * most + 1, dtype=torch.float64)  # of each sum, from -most
    p[most] = 1
    for size in sizes:
        p = (p.roll(size) + p.roll(-size)) / 2  # nothing has reached the ends yet, so none wraps
    far = (torch.arange(-most, most + 1)).abs() >= abs(sum(differences))
    return min(1.0, float(p[far].sum()))


def of_ratio(parts: list[tuple[float, float]]) -> tuple[float, float] | None:
    """The 95% interval of sum(a) / sum(b) over texts with (a, b): percentiles of the bootstrap
    (Efron 1979), which draws whole texts, as tokens of one text are alike. None for a single text.
    """
    if len(parts) < 2:
        return None
    a, b = torch.tensor(parts, dtype=torch.float64).T
    rng = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(parts), (DRAWS, len(parts)), generator=rng)
    ratios = a[chosen].sum(1) / b[chosen].sum(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
