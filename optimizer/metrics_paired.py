"""The statistics behind paired accuracy: Tango's interval for flips, Student's t, the binomial tail. Plain floats."""

from __future__ import annotations

import math

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


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t: with t = √ν·tan θ its density is proportional to cos^(ν−1) θ."""
    if freedom > 2000:
        return Z95
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(0.95 * mass[-1], mass, angles)))
