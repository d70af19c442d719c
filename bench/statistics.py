"""How sure a figure is: intervals of paired log-ratios, percentiles, agreement of blocks.

Two programs are compared by the ratio of their figures in neighbouring windows, so that what disturbs both cancels. The
logarithm makes a ratio and its inverse equally far from one. Windows on a shared machine have outliers in both
directions, so the mean is trimmed by a fifth at each end, with Yuen's interval (Biometrika 61, 1974, 165-170):
Student's t with the winsorized variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from perwatt.measurement import Ratio

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond that Cornish-Fisher about the normal.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5 beyond 30 degrees of freedom)."""
    if degrees < 1:
        return math.inf
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def trimmed_interval(values: Sequence[float], trim: float = 0.2) -> tuple[float, float, float]:
    """(mean, low, high) of the trimmed mean with its 95 % interval; infinite bounds for a single value."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    cut = int(trim * n)
    kept = ordered[cut : n - cut]
    mean = float(kept.mean())
    if n < 2:
        return mean, -math.inf, math.inf
    winsorized = np.clip(ordered, kept[0], kept[-1])
    # Yuen: the squared deviations of the winsorized sample over h (h − 1), h values kept.
    h = len(kept)
    error = math.sqrt(float(((winsorized - winsorized.mean()) ** 2).sum()) / (h * (h - 1))) if h > 1 else math.inf
    half = t_quantile(h - 1) * error
    return mean, mean - half, mean + half


def paired_ratio(optimized: Sequence[float | None], original: Sequence[float | None]) -> Ratio:
    """Optimized ÷ original over paired windows, with its 95 % interval. Pairs with a side that is missing or not
    positive don't count; None where none is left."""
    pairs = [(a, b) for a, b in zip(optimized, original, strict=True) if a and b and a > 0 and b > 0]
    if not pairs:
        return Ratio(None)
    mean, low, high = trimmed_interval([math.log(a / b) for a, b in pairs])
    if len(pairs) < 2:
        return Ratio(math.exp(mean))
    return Ratio(math.exp(mean), math.exp(low), math.exp(high))


def kept_in_the_middle(values: Sequence[float], trim: float = 0.2) -> list[int]:
    """Positions of the values that the trimmed mean keeps."""
    order = np.argsort(np.asarray(values, dtype=np.float64), kind="stable")
    cut = int(trim * len(order))
    return [int(position) for position in order[cut : len(order) - cut]]


def paired_figures(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """One figure for each side, so that their quotient is exactly the value of `paired_ratio`: geometric means over the
    rounds that it keeps. All figures must be positive."""
    kept = kept_in_the_middle([math.log(a / b) for a, b in zip(ours, theirs, strict=True)])
    ours_mean = math.exp(float(np.mean([math.log(ours[i]) for i in kept])))
    return ours_mean, math.exp(float(np.mean([math.log(theirs[i]) for i in kept])))


def percentile_ratio(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], share: float, resamples: int = 200
) -> Ratio:
    """Quotient of a percentile over all calls of all rounds, with a 95 % interval by resampling whole rounds (Efron's
    percentile bootstrap, seed fixed). None where a side has no calls."""
    a, b = (
        percentile([x for part in ours for x in part], share),
        percentile([x for part in theirs for x in part], share),
    )
    if not a or not b:
        return Ratio(None)
    rounds = min(len(ours), len(theirs))
    if rounds < 2:
        return Ratio(a / b)
    mine, other = ([np.asarray(part) for part in parts] for parts in (ours, theirs))
    found = []
    for draw in np.random.default_rng(0).integers(0, rounds, (resamples, rounds)):
        tops = [
            np.quantile(np.concatenate([parts[i] for i in draw]), share, method="inverted_cdf")
            for parts in (mine, other)
        ]
        found.append(float(tops[0] / tops[1]))
    low, high = np.quantile(found, [0.025, 0.975])
    return Ratio(a / b, min(float(low), a / b), max(float(high), a / b))


def half_width(ratio: Ratio) -> float:
    """Half the interval's width relative to the ratio, on the log scale; infinite where it is not known."""
    if ratio.low is None or ratio.high is None or ratio.low <= 0:
        return math.inf
    return (math.log(ratio.high) - math.log(ratio.low)) / 2


def percentile(latencies_ms: Sequence[float], share: float) -> float | None:
    """The smallest latency that `share` of all calls do not exceed (nearest rank); None without calls."""
    if not latencies_ms:
        return None
    ordered = sorted(latencies_ms)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]
