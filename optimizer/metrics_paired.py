"""The statistics behind paired figures: Tango's interval and McNemar's test for flips, Student's t, the binomial tail."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np

Z95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


def tango_interval(lost: int, gained: int, n: int, z: float = Z95) -> tuple[float, float]:
    """95 % score interval for (lost − gained) / n, as fractions; (-1, 1) where n is 0."""
    if n == 0:
        return -1.0, 1.0

    def statistic(difference: float) -> float:
        b = -lost - gained + (2 * n - lost + gained) * difference
        c = -gained * difference * (1 - difference)
        share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        distance = lost - gained - n * difference
        if variance > 0:
            return distance / math.sqrt(variance)
        return math.copysign(math.inf, distance) if distance else 0.0

    def bound(outside: float, wanted: float) -> float:
        # The statistic falls steadily with the difference; the estimate itself scores 0.
        inside = (lost - gained) / n
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if abs(statistic(middle)) < wanted else (inside, middle)
        return (inside + outside) / 2

    return bound(-1.0, z), bound(1.0, z)


def binomial_tail(successes: int, n: int, share: float) -> float:
    """P(X ≥ successes) for X ~ Binomial(n, share)."""
    if share >= 1:
        return 1.0
    terms = np.arange(successes, n + 1)
    log_choose = math.lgamma(n + 1) - np.array([math.lgamma(k + 1) + math.lgamma(n - k + 1) for k in terms])
    return float(min(np.exp(log_choose + terms * math.log(share) + (n - terms) * math.log1p(-share)).sum(), 1.0))


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value of McNemar's test (Psychometrika 12, 1947, 153-157): how likely flips would fall at least this
    unevenly if each were a fair coin. 1 where nothing flipped."""
    return min(1.0, 2 * binomial_tail(max(lost, gained), lost + gained, 0.5))


@functools.cache
def t_quantile(freedom: int, share: float = 0.975) -> float:
    """The quantile of Student's t below which `share` (0.5 to 1, exclusive) lies; infinite without degrees of freedom.

    With t = √ν · tan θ the probability within ±t is a finite sum of powers of cos θ (Abramowitz and Stegun 26.7.3 and
    26.7.4). Beyond 200 degrees the expansion about the normal quantile (26.7.5) is right to 8 digits."""
    if freedom < 1:
        return math.inf
    if freedom > 200:
        return _t_near_normal(freedom, NormalDist().inv_cdf(share))
    odd = freedom % 2
    steps = np.arange(1, (freedom - odd) // 2)
    factors = np.concatenate([[1.0], np.cumprod((2 * steps - 1 + odd) / (2 * steps + odd))])
    powers = 2 * np.arange(len(factors)) + odd

    def within(angle: float) -> float:
        total = math.sin(angle) * float((factors * math.cos(angle) ** powers).sum()) if freedom > 1 else 0.0
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 2 * share - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _t_near_normal(freedom: int, z: float) -> float:
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
