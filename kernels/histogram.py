"""Histograms of a stream, per tensor or per channel, whose range grows while the stream runs: each value is read once.

A channel's range is (−r, r), r = 2ᵏ, cut into `bins` equally wide bins, half of them on either side of zero. A magnitude
|x| falls in bin m = max(⌈|x| / width⌉ − 1, 0) of its side, width = 2 r / bins: bins are closed at the end that is farther
from zero, a zero of either sign counts with the positive values, and the sign of every other value stays known. Where a value
lies outside, r is doubled until it doesn't, and neighbouring bins are merged in pairs, 2 m and 2 m + 1 into m: every new edge
is an old one, so nothing is lost but resolution. Hence a histogram depends on its values alone, not on how they were cut into
batches, nor on their order, and negated values (other than 0) give the mirrored one.

r is the smallest power of two that no value exceeds, and 2⁻¹⁰⁰ at least; so between half of the bins and all of them are in
use. Both `bins` and r are powers of two, so that |x| / width is exact in float32. NaN and infinity are counted apart and enter
nothing else; no values change nothing. Memory: 8 · channels · bins bytes, however long the stream is.

Values of float16 or float32, of any rank and shape; one axis holds the channels, or none does: then the array is one channel.
`reference`, `compute` and `compute_cuda` give the same counts, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from perwatt.kernels import _histogram_cpu as on_cpu
from perwatt.kernels import _histogram_cuda as on_gpu

LOWEST = -100
"""The smallest range's exponent: data of zeros alone needs one, and 2⁻¹⁰⁰ is nearer zero than any use."""

MOST_BINS = 8192
"""More wouldn't fit in a GPU's shared memory; 2048 resolve any 8-bit type's clipping."""


@dataclass(frozen=True)
class Histogram:
    """Counts of each channel, which `compute` and its like change in place."""

    counts: npt.NDArray[np.int64]
    """[channels, bins]: the most negative values first."""
    exponents: npt.NDArray[np.int32]
    """[channels]: values reach from −2**exponent to 2**exponent."""
    nan: npt.NDArray[np.int64]
    infinite: npt.NDArray[np.int64]

    @property
    def limits(self) -> npt.NDArray[np.float64]:
        """[channels]: r, the ranges' ends."""
        return np.ldexp(1.0, self.exponents)

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """[channels, bins + 1]: where the bins begin and end."""
        half = self.counts.shape[1] // 2
        edges: npt.NDArray[np.float64] = np.ldexp(np.arange(-half, half + 1) / half, self.exponents[:, None])
        return edges


def empty(bins: int = 2048, channels: int = 1) -> Histogram:
    """A histogram of no values. Raises ValueError for bins that are no power of two from 4 to 8192, or fewer than 0 channels."""
    if not 4 <= bins <= MOST_BINS or bins & (bins - 1):
        raise ValueError(f"{bins} bins; powers of two from 4 to {MOST_BINS} are possible")
    if not 0 <= channels < 2**31 // bins:
        raise ValueError(f"{channels} channels of {bins} bins; 0 to {2**31 // bins - 1} are possible")
    exponents = np.full(channels, LOWEST, np.int32)
    return Histogram(
        np.zeros((channels, bins), np.int64), exponents, np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    )


def merged(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of both streams. Raises ValueError for other numbers of channels or bins."""
    if a.counts.shape != b.counts.shape:
        raise ValueError(f"histograms of [channels, bins] {a.counts.shape} and {b.counts.shape} don't merge")
    exponents = np.maximum(a.exponents, b.exponents)
    counts = _widened(a.counts, exponents - a.exponents) + _widened(b.counts, exponents - b.exponents)
    return Histogram(counts, exponents, a.nan + b.nan, a.infinite + b.infinite)


def reference(histogram: Histogram, values: npt.ArrayLike, axis: int | None = None) -> Histogram:
    """`histogram` with `values` counted in it, channel by channel along `axis`, or all as one where it is None.

    Raises ValueError for values of another type than float16 or float32, an axis that they don't have, or another number
    of channels than the histogram's; it is unchanged then."""
    given, (outer, channels, inner) = _checked(histogram, values, axis)
    rows = given.reshape(1, -1) if axis is None else np.moveaxis(given, axis, 0).reshape(channels, outer * inner)
    half = histogram.counts.shape[1] // 2
    histogram.nan[:] += np.isnan(rows).sum(axis=1)
    histogram.infinite[:] += np.isinf(rows).sum(axis=1)
    for channel, row in enumerate(rows):
        x = row[np.isfinite(row)].astype(np.float64)
        _grow(histogram, channel, _exponent(np.abs(x).max(initial=0.0)))
        places = np.maximum(np.ceil(np.ldexp(np.abs(x), -int(histogram.exponents[channel])) * half), 1).astype(np.int64)
        histogram.counts[channel] += np.bincount(np.where(x < 0, half - places, half - 1 + places), minlength=2 * half)
    return histogram


def compute(histogram: Histogram, values: npt.ArrayLike, axis: int | None = None) -> Histogram:
    """What `reference` does, compiled by Numba, on one thread.

    An array that is not contiguous, and a float16, is copied first."""
    given, (outer, channels, inner) = _checked(histogram, values, axis)
    flat = np.ascontiguousarray(given, dtype=np.float32).reshape(-1)
    if flat.size:
        state = histogram.counts, histogram.exponents, histogram.nan, histogram.infinite
        on_cpu.compiled()(flat, flat.view(np.int32), outer, channels, inner, *state)
    return histogram


def _checked(
    histogram: Histogram, values: npt.ArrayLike, axis: int | None
) -> tuple[npt.NDArray[Any], tuple[int, int, int]]:
    """The array, and its shape as [values before the channel axis, channels, values behind it]."""
    given = np.asarray(values)
    if given.dtype not in (np.float16, np.float32):
        raise ValueError(f"values of type {given.dtype}; float16 and float32 are possible")
    return given, _layout(histogram, given.shape, axis)


def _layout(histogram: Histogram, shape: tuple[int, ...], axis: int | None) -> tuple[int, int, int]:
    if axis is None:
        found = 1, 1, int(np.prod(shape, dtype=np.int64))
    elif -len(shape) <= axis < len(shape):
        axis %= len(shape)
        before, behind = np.prod(shape[:axis], dtype=np.int64), np.prod(shape[axis + 1 :], dtype=np.int64)
        found = int(before), int(shape[axis]), int(behind)
    else:
        raise ValueError(f"no axis {axis} in an array of {len(shape)} axes")
    if found[1] != len(histogram.counts):
        raise ValueError(f"values of {found[1]} channels for a histogram of {len(histogram.counts)}")
    return found


def _widened(counts: npt.NDArray[np.int64], doublings: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Counts over a range that is 2**doublings as wide, channel by channel."""
    half = counts.shape[1] // 2
    found = np.zeros_like(counts)
    channel = np.arange(len(counts))[:, None]
    place = np.arange(half) >> np.minimum(doublings, 31)[:, None]
    np.add.at(found, (channel, half + place), counts[:, half:])
    np.add.at(found, (channel, half - 1 - place), counts[:, half - 1 :: -1])
    return found


def _exponent(largest: np.floating[Any]) -> int:
    """The smallest k with 2ᵏ ≥ largest, LOWEST at least."""
    mantissa, exponent = np.frexp(largest)  # largest = mantissa · 2**exponent, 0.5 ≤ mantissa < 1
    return max(int(exponent) - int(mantissa == 0.5), LOWEST) if largest else LOWEST


def _grow(histogram: Histogram, channel: int, exponent: int) -> None:
    doublings = exponent - int(histogram.exponents[channel])
    if doublings > 0:
        row = slice(channel, channel + 1)
        histogram.counts[row] = _widened(histogram.counts[row], np.array([doublings], np.int32))
        histogram.exponents[channel] = exponent


def compute_cuda(histogram: Histogram, values: Any, axis: int | None = None) -> Histogram:
    """What `reference` does, counted on a GPU: `histogram` stays on the host. `values` may be on the GPU already (float32,
    contiguous); others are sent as float32."""
    from numba import cuda

    if hasattr(values, "__cuda_array_interface__"):
        given = cuda.as_cuda_array(values).reshape(-1)
        if given.dtype != np.float32:
            raise ValueError(f"values of type {given.dtype} on the GPU; float32 is possible")
        outer, channels, inner = _layout(histogram, tuple(values.shape), axis)
    else:
        host, (outer, channels, inner) = _checked(histogram, values, axis)
        given = np.ascontiguousarray(host, dtype=np.float32).reshape(-1)
    each = outer * inner
    if not each * channels:
        return histogram
    sent, bins = cuda.to_device(given), histogram.counts.shape[1]
    survey_runs, survey_columns, count_runs, count_columns = on_gpu.compiled(bins)
    if inner >= on_gpu.RUN_AT_LEAST:
        survey, count = survey_runs, count_runs
        grid = channels, max(1, min(each // (16 * on_gpu.THREADS), 2048 // channels, 65535))
    else:
        survey, count = survey_columns, count_columns
        grid = -(-channels * inner // on_gpu.THREADS), max(1, min(outer // 16, 2**20 // (channels * inner), 65535))
    largest, lost = cuda.to_device(np.zeros(channels, np.float32)), cuda.to_device(np.zeros((2, channels), np.int64))
    survey[grid, on_gpu.THREADS](sent, outer, inner, largest, lost)
    nan, infinite = lost.copy_to_host()
    histogram.nan[:] += nan
    histogram.infinite[:] += infinite
    for channel, value in enumerate(largest.copy_to_host()):
        _grow(histogram, channel, _exponent(value))
    scales = np.ldexp(np.float32(bins // 2), -histogram.exponents)
    counts = cuda.to_device(np.zeros((channels, bins), np.int64))
    count[grid, on_gpu.THREADS](sent, outer, inner, cuda.to_device(scales), counts)
    histogram.counts[:] += counts.copy_to_host()
    return histogram
