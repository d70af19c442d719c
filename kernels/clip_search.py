"""Where to clip a tensor's values before they are quantized, found from histograms of them: one row for each tensor or channel.

`mse`: the range with the least mean squared error of quantization. A range is a step s between neighbouring levels and a
number of levels below zero, z: the levels stand at s · k for k = −z … levels − 1 − z, so zero is always one of them, as
QuantizeLinear needs. Candidates for s are fractions of the step that just covers the whole row. Symmetric ranges have
z = ⌊levels / 2⌋ (256 levels: −128 … 127; 255: −127 … 127), asymmetric ones the best z of all, whatever its value.

The values of a bin count as spread evenly over it, not as standing at its centre: at steps about as wide as a bin, centres
that happen to lie on levels would show no error at all, and the search would fall for that. The error is exact for this
density, within the range and beyond. A positive x is rounded to s · (number of e_k = (k + ½) s below it, levels permitting),
hence its squared error is x² − 2s Σ_k max(x − e_k, 0), and summed over all values

    error(s, z) = Σ x² − 2s (Σ_{k < z} V(e_k) + Σ_{k < levels − 1 − z} U(e_k)),
    U(e) = Σ_x max(x − e, 0),  V(e) = Σ_x max(−x − e, 0).

U and V are quadratic within a bin, by sums over the bins beyond it: a threshold costs one look-up, however many bins there
are. Both fall with k, so the best z for a step takes the levels − 1 largest terms of the two, and is known without trying.

`entropy`: the range with the least Kullback–Leibler divergence of the clipped distribution from its quantized version
(Migacz: "8-bit inference with TensorRT", GTC 2017). Bins are counted by distance from zero: bin j of n. For a candidate of i
bins, P is those bins with all that lies beyond added to the last; Q merges them into equal parts (bin j goes to part
⌊j · parts / i⌋; parts = ⌈levels / 2⌉ for symmetric ranges, levels for tensors that are never negative), without what lies
beyond, and spreads each part evenly over its bins where P isn't zero. Where Q then lacks what P has, because nothing but
what lies beyond is in the last part, Q has 1e-4 of a value there, as much as ONNX Runtime's smoothing gives: infinite
divergence would let a single outlier decide. All i from `parts` to n are tried; one with no value within is never taken.
Σ P log Q over a part depends on its first bin and length alone, and few lengths occur: each is calculated once and looked up.

Shapes and types: counts [rows, bins] of any integer type, low and high edges [rows], bins of equal width; results are
float64 [rows]. Of equally good candidates the first is taken. Rows without values give NaN, whatever their edges. Rows
with all values in one point (low = high) give the range from zero to it, or its mirror image as well, and no loss. NaN or
infinite edges of other rows are errors: leave such values out of the histogram. Counts times bins of a row: at most 2⁵².
Edges may be denormal or as large as float64 permits; what can't be held then becomes infinite or 0 (a loss is a square).

`reference_…` is plain NumPy. `compute_…` (Numba) equals it bit for bit: whole-numbered sums, the others in the same order,
logarithms by NumPy in both. `compute_…_cuda` uses fused multiplications and other logarithms: its loss, by the reference's
measure too, lies within 1e-9 of Σ x² (mse) or 1e-9 nats (entropy) of the best.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from perwatt.kernels._clip_search_cpu import compiled, gather, merge, search

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

CANDIDATES = tuple(float(2.0 ** (-m / 16)) for m in range(128))
"""Fractions of the whole range, 16 an octave, so that the best step is never missed by more than 2.2 %, whether it lies at
the whole range or, as with far outliers, at a 250th of it."""

LANES = 32
"""Value k of a sum is added to lane k mod 32, and the lanes by halves: one order for all, a warp's on a GPU."""

MISSING = 1e-4
"""Values that Q has in a bin where P has some and Q none."""


class Clip(NamedTuple):
    """For each row: clip below `low` and above `high`; `loss` is the mean squared error or the divergence (nats) then."""

    low: Floats
    high: Floats
    loss: Floats


def reference_mse(
    counts: npt.ArrayLike,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    levels: int,
    symmetric: bool = True,
    candidates: npt.ArrayLike = CANDIDATES,
) -> Clip:
    """The range with the least mean squared error for each row of `counts` [rows, bins] between `low` and `high` [rows].

    `levels`: how many the quantized type has, at most 65,536; `candidates`: fractions, in (0, 1], of the whole range's
    step. The range's step is (high − low) / (levels − 1), its zero point −low / step.

    Raises ValueError for shapes, types, counts, edges, levels or candidates that can't be searched."""
    given = _host(counts, low, high)
    steps, below = _steps(given, levels, symmetric, candidates)
    found = np.zeros((4, len(given.counts)))
    for row, (bins, negative, positive) in enumerate(zip(given.counts, given.negative, given.positive, strict=True)):
        lower, upper = _tables(bins), _tables(bins[::-1])
        gains, belows = np.empty(steps.shape[1]), np.empty(steps.shape[1], np.int64)
        for m, step in enumerate(steps[row]):
            thresholds = (np.arange(levels - 1) + 0.5) * step
            saved_below, saved_above = _beyond(lower, negative, thresholds), _beyond(upper, positive, thresholds)
            # Among the levels − 1 largest of both: fewer than that are at least as large.
            z = below if symmetric else np.count_nonzero(saved_below > saved_above[::-1])
            gains[m] = (2.0 * step) * (_lane_sum(saved_below[:z]) + _lane_sum(saved_above[: levels - 1 - z]))
            belows[m] = z
        best = gains.argmax()
        distance = np.arange(len(bins)) + 0.5 - negative
        moment = _lane_sum(bins * (distance * distance + 1 / 12))
        found[:, row] = steps[row, best], belows[best], gains[best], moment
    return _least_error(given, levels, symmetric, found)


def compute_mse(
    counts: npt.ArrayLike,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    levels: int,
    symmetric: bool = True,
    candidates: npt.ArrayLike = CANDIDATES,
) -> Clip:
    """What `reference_mse` returns, bit for bit, compiled by Numba."""
    given = _host(counts, low, high)
    steps, below = _steps(given, levels, symmetric, candidates)
    found = np.zeros((4, len(given.counts)))
    reaches = np.stack([given.negative, given.positive])
    compiled(search)(given.counts, reaches, steps, levels, below, found)
    return _least_error(given, levels, symmetric, found)


def compute_mse_cuda(
    counts: Any,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    levels: int,
    symmetric: bool = True,
    candidates: npt.ArrayLike = CANDIDATES,
) -> Clip:
    """What `reference_mse` returns, up to rounding, on a GPU. `counts` may be on the device (anything with a CUDA array
    interface) and is then read there; that none is negative isn't checked."""
    from perwatt.kernels import _clip_search_cuda as gpu

    given = _either(counts, low, high)
    steps, below = _steps(given, levels, symmetric, candidates)
    reaches = np.stack([given.negative, given.positive])
    found = gpu.search(gpu.on_device(given.counts), reaches, steps, levels, below)
    return _least_error(given, levels, symmetric, found)


def reference_entropy(
    counts: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike, levels: int, symmetric: bool = True
) -> Clip:
    """The range (−c, c), or (0, c) where not `symmetric`, with the least divergence for each row of `counts` [rows, bins]
    between `low` and `high` [rows]. Zero must lie between them, and not `symmetric` means that `low` is 0. Zero is taken to
    be at the nearest edge of a bin, so c is up to half a bin off where it isn't at one.

    `levels`: how many the quantized type has, 255 or 256 for symmetric int8 alike (128 parts), at most 65,536.

    Raises ValueError for shapes, types, counts, edges or levels that can't be searched."""
    given = _host(counts, low, high)
    parts, zeros = _parts(given, levels, symmetric)
    found = np.zeros((2, len(given.counts)))
    for row, (bins, zero) in enumerate(zip(given.counts, zeros, strict=True)):
        if given.total[row] > 0:  # the others have nothing to be divided by
            sums = _sums(_folded(bins, zero))
            trials = np.arange(min(parts, len(sums.folded)), len(sums.folded) + 1)
            merged = np.array([_merged(sums, parts, int(i)) for i in trials])
            divergence = _divergence(sums, trials, merged)
            found[:, row] = trials[divergence.argmin()], divergence.min()
    return _least_divergence(given, symmetric, found)


def compute_entropy(
    counts: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike, levels: int, symmetric: bool = True
) -> Clip:
    """What `reference_entropy` returns, bit for bit, with Numba for the sums."""
    given = _host(counts, low, high)
    parts, zeros = _parts(given, levels, symmetric)
    found = np.zeros((2, len(given.counts)))
    for row, (bins, zero) in enumerate(zip(given.counts, zeros, strict=True)):
        if given.total[row] > 0:
            sums = _sums(_folded(bins, zero))
            trials = np.arange(min(parts, len(sums.folded)), len(sums.folded) + 1)
            merged = np.empty(len(trials))
            compiled(gather)(_of_lengths(sums, parts), _last_part(sums, parts, trials), parts, trials, merged)
            divergence = _divergence(sums, trials, merged)
            found[:, row] = trials[divergence.argmin()], divergence.min()
    return _least_divergence(given, symmetric, found)


def compute_entropy_cuda(
    counts: Any, low: npt.ArrayLike, high: npt.ArrayLike, levels: int, symmetric: bool = True
) -> Clip:
    """What `reference_entropy` returns, up to rounding, on a GPU; `counts` as for `compute_mse_cuda`."""
    from perwatt.kernels import _clip_search_cuda as gpu

    given = _either(counts, low, high)
    parts, zeros = _parts(given, levels, symmetric)
    return _least_divergence(given, symmetric, gpu.divergences(gpu.on_device(given.counts), zeros, parts, MISSING))


class _Rows(NamedTuple):
    """Histograms, their edges as multiples of 2 ** exponent, so that no difference overflows or vanishes."""

    counts: Any
    total: Floats
    value: Floats  # the row's high edge: the only value where the width is 0
    exponent: npt.NDArray[np.int32]
    width: Floats  # of a bin
    negative: Floats  # the low edge's distance from zero, in bins
    positive: Floats


def _host(counts: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike) -> _Rows:
    given = _shaped(np.asarray(counts))
    if given.dtype.kind == "i" and given.size and given.min() < 0:
        raise ValueError(f"a count is {given.min()}; it must be at least 0")
    # Numba would compile once more for an array that can't be written.
    placed = _placed(given, given.sum(axis=1, dtype=np.float64), low, high)
    return placed._replace(counts=np.require(given, np.int64, ("C", "W")))


def _either(counts: Any, low: npt.ArrayLike, high: npt.ArrayLike) -> _Rows:
    from perwatt.kernels import _clip_search_cuda as gpu

    if not gpu.is_on_device(counts):
        return _host(counts, low, high)
    device = _shaped(gpu.on_device(counts))
    return _placed(device, gpu.totals(device), low, high)


def _shaped(counts: Any) -> Any:
    if len(counts.shape) != 2 or counts.shape[1] == 0 or counts.dtype.kind not in "iu":
        raise ValueError(f"counts are {counts.dtype} {list(counts.shape)}; integers [rows, bins] are needed")
    return counts


def _placed(counts: Any, total: Floats, low: npt.ArrayLike, high: npt.ArrayLike) -> _Rows:
    rows, bins = counts.shape
    edges = np.array([low, high], np.float64) if np.shape(low) == np.shape(high) else np.empty(0)
    if edges.shape != (2, rows):
        raise ValueError(f"edges have the shapes {np.shape(low)} and {np.shape(high)} for {rows} rows of counts")
    used = total > 0
    if (wrong := used & ~(np.isfinite(edges).all(axis=0) & (edges[0] <= edges[1]))).any():
        row = int(wrong.argmax())
        raise ValueError(
            f"row {row} reaches from {edges[0, row]} to {edges[1, row]}; edges must be finite and in order"
        )
    if (total * bins > 2.0**52).any():
        raise ValueError(
            f"a row has {total.max():.4g} values in {bins} bins; at most 2^52 / bins can be added up exactly"
        )
    edges[:, ~used] = 0.0
    exponent = np.frexp(np.abs(edges).max(axis=0))[1]
    lowest, highest = np.ldexp(edges, -exponent)
    width = (highest - lowest) / bins
    divisor = np.where(width > 0, width, 1.0)
    return _Rows(counts, total, edges[1], exponent, width, -lowest / divisor, highest / divisor)


def _checked(levels: int, fewest: int) -> None:
    if not fewest <= levels <= 65536:
        raise ValueError(f"{levels} levels; {fewest} to 65536 are possible")


def _steps(given: _Rows, levels: int, symmetric: bool, candidates: npt.ArrayLike) -> tuple[Floats, int]:
    """Candidates' steps [rows, candidates] in bins, and the number of levels below zero, −1 where it is searched."""
    _checked(levels, 3 if symmetric else 2)
    fractions = np.asarray(candidates, np.float64)
    if fractions.ndim != 1 or fractions.size == 0 or not ((fractions > 0) & (fractions <= 1)).all():
        raise ValueError("candidates must be one or more fractions above 0 and at most 1, on one axis")
    negative, positive = np.maximum(given.negative, 0), np.maximum(given.positive, 0)
    below = levels // 2
    if not symmetric:
        return ((negative + positive) / (levels - 1))[:, None] * fractions, -1
    return np.maximum(negative / below, positive / (levels - 1 - below))[:, None] * fractions, below


def _tables(counts: Counts) -> tuple[Floats, Floats, Floats]:
    """For the place at each edge i, counted from the array's start: what has to be known of the values before it.

    Σ of their distances from it, their number, and half the count of the bin behind it."""
    passed = np.concatenate([[0], np.cumsum(counts)])
    twice = np.concatenate([[0], np.cumsum(2 * passed[:-1] + counts)])
    return 0.5 * twice, passed.astype(np.float64), 0.5 * np.append(counts, 0)


def _beyond(tables: tuple[Floats, Floats, Floats], reach: float, thresholds: Floats) -> Floats:
    """Σ max(|x| − threshold, 0) over the values on one side of zero, whose bins end `reach` from it."""
    distances, number, half = tables
    place = np.maximum(reach - thresholds, 0.0)
    edge = np.minimum(place, len(number) - 1).astype(np.int64)
    rest = place - edge
    return np.asarray(distances[edge] + rest * (number[edge] + rest * half[edge]))


def _lane_sum(terms: Floats) -> float:
    padded = np.zeros((-(-len(terms) // LANES) + 1) * LANES)
    padded[: len(terms)] = terms
    lanes = padded.reshape(-1, LANES).cumsum(axis=0)[-1]
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return float(lanes[0])


def _least_error(given: _Rows, levels: int, symmetric: bool, found: Floats) -> Clip:
    """Ranges and losses from each row's best step, levels below zero, gain and Σ x², all in bins."""
    step, below, gain, moment = found
    point, used = given.value, given.total > 0
    above = levels - 1 - below
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        # Adding 0 makes a −0 a 0.
        low = np.ldexp(-below * (step * given.width), given.exponent) + 0.0
        high = np.ldexp(above * (step * given.width), given.exponent)
        error = np.maximum(moment - gain, 0.0) / given.total * given.width**2
        loss = np.ldexp(error, 2 * given.exponent)
        if symmetric:
            ends = -np.abs(point) * (below / above), np.abs(point)
        else:
            ends = np.minimum(point, 0.0), np.maximum(point, 0.0)
    alike = given.width == 0
    return Clip(
        *(np.where(used, np.where(alike, a, b), np.nan) for a, b in zip((*ends, 0.0), (low, high, loss), strict=True))
    )


class _Sums(NamedTuple):
    """Of bins by distance from zero: counts, and over the first i bins, i = 0 … n, how many values, how many bins that aren't
    empty, and Σ of count · log(count)."""

    folded: Counts
    values: Counts
    occupied: Counts
    logs: Floats


def _parts(given: _Rows, levels: int, symmetric: bool) -> tuple[int, Counts]:
    """How many parts a candidate's bins are merged into, and the number of bins below zero of each row."""
    _checked(levels, 3 if symmetric else 2)
    wide = (given.total > 0) & (given.width > 0)
    wrong = wide & ((given.negative < 0) | (given.positive < 0))
    if not symmetric:
        wrong |= (given.total > 0) & (given.negative > 0)
    if wrong.any():
        words = "hold" if symmetric else "begin at"
        raise ValueError(f"row {int(wrong.argmax())} doesn't {words} zero: collect its histogram so")
    return -(-levels // 2) if symmetric else levels, np.rint(np.where(wide, given.negative, 0)).astype(np.int64)


def _folded(counts: Counts, zero: int) -> Counts:
    folded = np.zeros(max(zero, len(counts) - zero), np.int64)
    folded[: len(counts) - zero] = counts[zero:]
    folded[:zero] += counts[:zero][::-1]
    return folded


def _sums(folded: Counts) -> _Sums:
    start = np.zeros(1, np.int64)
    return _Sums(
        folded,
        np.concatenate([start, folded.cumsum()]),
        np.concatenate([start, (folded > 0).cumsum()]),
        np.concatenate([start, _entropic(folded, np.ones_like(folded), folded).cumsum()]),
    )


def _entropic(weight: Counts, occupied: Counts, mass: Counts) -> Floats:
    """weight · log(mass / occupied); where there is no mass, weight · log(MISSING)."""
    mean = np.where(mass == 0, MISSING, mass / np.where(mass == 0, 1, occupied))
    return np.asarray(weight * np.log(mean))


def _last_part(sums: _Sums, parts: int, trials: Any) -> Any:
    """The last part's Σ P log Q of candidates of `trials` bins: all that lies beyond is weighed in, but not merged."""
    first = -(-(parts - 1) * trials // parts)
    mass = sums.values[trials] - sums.values[first]
    beyond = sums.values[-1] - sums.values[trials]
    occupied = sums.occupied[trials] - sums.occupied[first] + ((beyond > 0) & (sums.folded[trials - 1] == 0))
    return _entropic(mass + beyond, occupied, mass)


def _merged(sums: _Sums, parts: int, bins: int) -> float:
    """Σ P log Q over the first `bins` bins: counts, not yet shares."""
    edges = -(-np.arange(parts + 1) * bins // parts)
    mass = np.diff(sums.values[edges])
    terms = _entropic(mass, np.diff(sums.occupied[edges]), mass)
    terms[-1] = _last_part(sums, parts, bins)
    return _lane_sum(terms)


def _divergence(sums: _Sums, trials: Counts, merged: Floats) -> Floats:
    """Of shares, not counts: P's sum to 1 by all values, Q's by those within."""
    within, total = sums.values[trials], sums.values[-1]
    last = sums.folded[trials - 1] + (total - within)
    own = sums.logs[trials - 1] + _entropic(last, np.ones_like(last), last)
    divergence = (own - merged) / total + (np.log(np.maximum(within, 1)) - np.log(total))
    return np.where(within == 0, np.inf, divergence)


def _of_lengths(sums: _Sums, parts: int) -> Floats:
    """Σ Q log Q of a part of each length that occurs [length, first bin]."""
    bins = len(sums.folded)
    # One place more: where bins are fewer than parts, parts without any begin behind the last.
    mass = np.zeros((bins // parts + 2, bins + 1))
    mean = np.ones_like(mass)
    compiled(merge)(sums.values, sums.occupied, parts, mass, mean)
    return np.multiply(mass, np.log(mean, out=mean), out=mass)


def _least_divergence(given: _Rows, symmetric: bool, found: Floats) -> Clip:
    bins, divergence = found
    alike = given.width == 0
    with np.errstate(over="ignore", under="ignore"):
        high = np.where(alike, np.abs(given.value), np.ldexp(bins * given.width, given.exponent))
    low = -high if symmetric else np.zeros_like(high)
    loss = np.where(alike, 0.0, np.maximum(divergence, 0.0))
    return Clip(*(np.where(given.total > 0, found, np.nan) for found in (low, high, loss)))
