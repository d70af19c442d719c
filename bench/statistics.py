"""How sure a figure is: bootstrap intervals of paired log-ratios, figures and percentiles.

Two programs are compared by the ratio of their figures in neighbouring windows, so that what disturbs both cancels. The
logarithm makes a ratio and its inverse equally far from one. Windows on a shared machine have outliers in both
directions, so the mean is trimmed by a fifth at each end.

Intervals are percentiles of the bootstrap distribution. Those of few values are too narrow, as resampling knows only the
values' own spread, divided by n: their distances from the centre are stretched by √(n/(n−1)) · t / z, with the quantiles of
Student's t for n − 1 degrees of freedom and of the normal distribution (the factor of T. Hesterberg, "What Teachers Should
Know About the Bootstrap", The American Statistician 69, 2015, 371-386). Hesterberg moves the percentiles
outwards instead, which is the same where the distribution is normal, but rests on a handful of extreme resamples for few
values, and can't leave their range: fewer than six values can't cover 95 % that way.

Limits: by simulation they cover 93 to 97 % of normal values and at least 92 % of heavy-tailed and lopsided ones, from six
values on. With fewer than five, a fifth is less than one, nothing is trimmed, and an outlier shows. One side's percentile
far in the tail (p99) of few windows covers less, 70 to 95 %: no resample has seen the slower windows that were never
measured. Both sides miss them alike, so ratios of such percentiles cover what they say.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

from perwatt.kernels import bootstrap
from perwatt.measurement import Ratio
from perwatt.metrics_paired import t_quantile

Floats = npt.NDArray[np.float64]
Interval = tuple[float | None, float | None, float | None]
"""A figure with the bounds of its 95 % interval. None where there is nothing to tell it from."""

TRIM = 0.2


def bootstrap_interval(
    values: Sequence[float],
    *,
    trim: float = TRIM,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """(centre, low, high): the trimmed mean with its bootstrap interval, infinite bounds for a single value.

    Raises ValueError without values."""
    given = np.asarray(values, dtype=np.float64)
    if not given.size:
        raise ValueError("no values: there is no interval of nothing")
    centre = float(np.mean(given[kept_in_the_middle(given.tolist(), trim)]))
    if given.size < 2:
        return centre, -math.inf, math.inf
    # Resampling distances instead of values: equal values then have no width at all, not one of rounding.
    low, high = _stretched(bootstrap.best(given - centre, resamples, seed, trim), given.size, confidence)
    return centre, centre + low, centre + high


def paired_ratio(optimized: Sequence[float | None], original: Sequence[float | None], resamples: int = 10_000) -> Ratio:
    """Optimized ÷ original over paired windows, with its 95 % interval. Pairs with a side that is missing, infinite or not
    positive don't count; None where none is left."""
    pairs = [(a, b) for a, b in zip(optimized, original, strict=True) if _counts(a) and _counts(b)]
    return Ratio(*_on_the_log_scale([math.log(a) - math.log(b) for a, b in pairs], resamples))


def figure_interval(values: Sequence[float | None], resamples: int = 10_000) -> Interval:
    """One side's figure over all windows, with its 95 % interval: the geometric mean of the windows in the middle. Windows
    where it is missing, infinite or not positive don't count; no bounds for a single one."""
    return _on_the_log_scale([math.log(value) for value in values if _counts(value)], resamples)


def kept_in_the_middle(values: Sequence[float], trim: float = TRIM) -> list[int]:
    """Positions of the values that the trimmed mean keeps."""
    order = np.argsort(np.asarray(values, dtype=np.float64), kind="stable")
    cut = int(trim * len(order))
    return [int(position) for position in order[cut : len(order) - cut]]


def paired_figures(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """One figure for each side, so that their quotient is exactly the value of `paired_ratio`: geometric means over the
    rounds that it keeps. All figures must be positive."""
    kept = kept_in_the_middle([math.log(a) - math.log(b) for a, b in zip(ours, theirs, strict=True)])
    mine, other = (math.exp(float(np.mean([math.log(side[i]) for i in kept]))) for side in (ours, theirs))
    return mine, other


def costs_by_round(found: Sequence[Sequence[float]]) -> list[float]:
    """One cost for each of several sides that were measured round by round: the first's median times each side's
    `paired_ratio` to it, so that a round that was disturbed makes no side look dear. All costs must be positive."""
    first = found[0]
    one = float(np.median(first))
    return [one * (paired_ratio(side, first, resamples=2).value or math.inf) for side in found]


def percentile_ratio(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], share: float, resamples: int = 1000
) -> Ratio:
    """Quotient of a percentile over all calls of all rounds, with a 95 % interval by resampling whole rounds, the same ones
    for both sides. None where a side has no calls; no bounds where fewer than two rounds have calls on both."""
    a, b = percentile(_pooled(ours), share), percentile(_pooled(theirs), share)
    if not a or not b:
        return Ratio(None)
    rounds = [(mine, other) for mine, other in zip(ours, theirs, strict=False) if len(mine) and len(other)]
    if len(rounds) < 2:
        return Ratio(a / b)
    counts = _resampled_windows(len(rounds), resamples, seed=0)
    tops = [_resampled_percentiles([pair[side] for pair in rounds], share, counts) for side in (0, 1)]
    low, high = _stretched(np.log(tops[0] / tops[1]) - math.log(a / b), len(rounds))
    return Ratio(a / b, a / b * math.exp(low), a / b * math.exp(high))


def quantile_interval(parts: Sequence[Sequence[float]], share: float, resamples: int = 1000, seed: int = 0) -> Interval:
    """A percentile over all calls of all windows (nearest rank), with its 95 % interval by resampling whole windows, since
    the calls of one window share its luck. Latencies are positive. No bounds for a single window with calls."""
    known = [part for part in parts if len(part)]
    centre = percentile(_pooled(known), share)
    if centre is None or len(known) < 2:
        return centre, None, None
    found = _resampled_percentiles(known, share, _resampled_windows(len(known), resamples, seed))
    low, high = _stretched(np.log(found / centre), len(known))
    return centre, centre * math.exp(low), centre * math.exp(high)


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


def _counts(value: float | None) -> TypeGuard[float]:
    return value is not None and 0 < value < math.inf


def _pooled(parts: Sequence[Sequence[float]]) -> list[float]:
    return [call for part in parts for call in part]


def _on_the_log_scale(logs: Sequence[float], resamples: int) -> Interval:
    if not logs:
        return None, None, None
    centre, low, high = bootstrap_interval(logs, resamples=resamples)
    if len(logs) < 2:
        return math.exp(centre), None, None
    return math.exp(centre), math.exp(low), math.exp(high)


@functools.cache
def _stretch(n: int, confidence: float) -> float:
    """By how much the interval of n values must be wider than the percentiles of their bootstrap distribution."""
    share = (1 + confidence) / 2
    return math.sqrt(n / (n - 1)) * t_quantile(n - 1, share) / NormalDist().inv_cdf(share)


def _stretched(distances: Floats, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of what n values say, as distances from the centre, which lies within."""
    low, high = np.quantile(distances, [(1 - confidence) / 2, (1 + confidence) / 2]) * _stretch(n, confidence)
    return min(float(low), 0.0), max(float(high), 0.0)


def _resampled_windows(windows: int, resamples: int, seed: int) -> Floats:
    """How often each window is in each resample: a row of counts for each."""
    drawn = np.random.default_rng(seed).integers(0, windows, (resamples, windows))
    cells = drawn + windows * np.arange(resamples)[:, None]
    counts = np.bincount(cells.ravel(), minlength=windows * resamples)
    return counts.reshape(resamples, windows).astype(np.float64)


def _resampled_percentiles(parts: Sequence[Sequence[float]], share: float, counts: Floats) -> Floats:
    """The percentile of the calls in each resample. A call weighs what its window counts, so all calls are sorted once; the
    block of calls that holds the percentile is found first, then the call in it."""
    windows, total = len(parts), sum(len(part) for part in parts)
    calls = np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])
    order = np.argsort(calls, kind="stable")
    window = np.repeat(np.arange(windows), [len(part) for part in parts])[order]
    length = math.isqrt(total) + 1
    blocks = -(-total // length)
    cells = np.arange(total) // length * windows + window
    held = np.bincount(cells, minlength=blocks * windows).reshape(blocks, windows)
    weights = counts @ held.T.astype(np.float64)
    reached = np.cumsum(weights, axis=1)
    rank = np.maximum(np.ceil(share * reached[:, -1:]), 1)
    block = np.argmax(reached >= rank, axis=1)
    rows = np.arange(len(counts))
    inside = np.minimum(block[:, None] * length + np.arange(length), total - 1)
    passed = (reached - weights)[rows, block, None] + np.cumsum(counts[rows[:, None], window[inside]], axis=1)
    return np.asarray(calls[order][inside[rows, np.argmax(passed >= rank, axis=1)]])
