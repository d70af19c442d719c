"""Per-channel minimum, maximum, sum and sum of squares of an array in one pass, with NaN and infinity counted apart.

For channel c with finite values x: min x, max x, Σ x, Σ x², how many x there are, and how many NaN and infinite values stood
beside them; NaN and infinity enter nothing but their own counts. From two batches' `Statistics`, `merged` makes those of
both, so a stream is never held in memory. The mean is total / finite, the variance squares / finite − mean² (which cancels
where the mean is large beside the deviation).

Arrays of float16, float32 or float64, of any rank and shape; one axis holds the channels, or none does: then the whole
array is one channel. Results have shape [channels] ([1] without an axis). A channel without finite values has minimum +∞,
maximum −∞ and sums 0, which leave a merger unchanged. Zeros count as +0.

Exact and equal in all versions: minimum, maximum and the counts. `reference` and `compute_cuda` add in float64, to first
order off by at most n · 2⁻⁵³ · Σ |x| (and Σ x²). `compute` adds runs of at most 1024 values in the values' own type, float16 in
float32, and these sums in float64: off by at most (80 u + n · 2⁻⁵³) · Σ |x| (and Σ x²), where u = 2⁻²⁴ for float16 and float32
and 2⁻⁵³ for float64; 10⁻⁷ is usual for float32. Where squares could overflow or vanish in float32, it takes float64. Sums of
float64 values beyond about 10¹⁵⁴ may exceed float64: they are infinite then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from perwatt.kernels import _channel_statistics_cpu as on_cpu
from perwatt.kernels import _channel_statistics_cuda as on_gpu

OWN_ROUNDINGS = 80
"""Roundings in the values' own type that a value passes through at most: 1024 / 16 + 16 where they follow each other, 256 / 8
+ 7 + 4 in a tile, and 5 more where its columns are one channel's."""


@dataclass(frozen=True)
class Statistics:
    """What is known of each channel: float64 [channels] and int64 [channels] arrays."""

    minimum: npt.NDArray[np.float64]
    maximum: npt.NDArray[np.float64]
    total: npt.NDArray[np.float64]
    """Σ x of the finite values."""
    squares: npt.NDArray[np.float64]
    """Σ x² of the finite values."""
    finite: npt.NDArray[np.int64]
    nan: npt.NDArray[np.int64]
    infinite: npt.NDArray[np.int64]


def merged(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of both, as if their values had come in one array. Raises ValueError for other numbers of channels."""
    if a.minimum.shape != b.minimum.shape:
        raise ValueError(f"statistics of {a.minimum.size} and of {b.minimum.size} channels don't merge")
    with np.errstate(over="ignore"):
        return Statistics(
            np.minimum(a.minimum, b.minimum),
            np.maximum(a.maximum, b.maximum),
            a.total + b.total,
            a.squares + b.squares,
            a.finite + b.finite,
            a.nan + b.nan,
            a.infinite + b.infinite,
        )


def reference(values: npt.ArrayLike, axis: int | None = None) -> Statistics:
    """The statistics of each channel along `axis`, or of the whole array where it is None.

    Raises ValueError for another type than float16, float32 or float64, or an axis that the array doesn't have."""
    given, (outer, channels, inner) = _checked(values, axis)
    rows = given.reshape(1, -1) if axis is None else np.moveaxis(given, axis, 0).reshape(channels, outer * inner)
    nan, infinite = np.isnan(rows), np.isinf(rows)
    left_out = nan | infinite
    x = np.where(left_out, 0.0, rows.astype(np.float64))
    with np.errstate(over="ignore"):
        return Statistics(
            np.where(left_out, np.inf, x).min(axis=1, initial=np.inf) + 0.0,
            np.where(left_out, -np.inf, x).max(axis=1, initial=-np.inf) + 0.0,
            x.sum(axis=1),
            np.square(x).sum(axis=1),
            (~left_out).sum(axis=1, dtype=np.int64),
            nan.sum(axis=1, dtype=np.int64),
            infinite.sum(axis=1, dtype=np.int64),
        )


def compute(values: npt.ArrayLike, axis: int | None = None) -> Statistics:
    """What `reference` returns, compiled by Numba, on one thread; sums within the bound that the module states.

    An array that is not contiguous, and a float16, is copied first."""
    given, (outer, channels, inner) = _checked(values, axis)
    kind = np.float64 if given.dtype == np.float64 else np.float32
    flat = np.ascontiguousarray(given, dtype=kind).reshape(-1)
    figures, counts = _nothing(channels)
    if flat.size:
        signed, unsigned = (np.int64, np.uint64) if kind == np.float64 else (np.int32, np.uint32)
        bits = flat.view(signed), flat.view(unsigned)
        on_cpu.compiled()(flat, *bits, outer, channels, inner, on_cpu.TINY[flat.dtype.name], figures, counts)
    return _statistics(figures, counts, outer * inner)


def _checked(values: npt.ArrayLike, axis: int | None) -> tuple[npt.NDArray[Any], tuple[int, int, int]]:
    """The array, and its shape as [values before the channel axis, channels, values behind it]."""
    given = np.asarray(values)
    if given.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"values of type {given.dtype}; float16, float32 and float64 are possible")
    return given, _layout(given.shape, axis)


def _layout(shape: tuple[int, ...], axis: int | None) -> tuple[int, int, int]:
    if axis is None:
        return 1, 1, int(np.prod(shape, dtype=np.int64))
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"no axis {axis} in an array of {len(shape)} axes")
    axis %= len(shape)
    before, behind = np.prod(shape[:axis], dtype=np.int64), np.prod(shape[axis + 1 :], dtype=np.int64)
    return int(before), int(shape[axis]), int(behind)


def _nothing(channels: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Figures [minimum, maximum, total, squares][channels] and counts [NaN, infinite][channels] of no values."""
    figures = np.zeros((4, channels))
    figures[0], figures[1] = np.inf, -np.inf
    return figures, np.zeros((2, channels), np.int64)


def _statistics(figures: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], each: int) -> Statistics:
    nan, infinite = counts
    return Statistics(figures[0] + 0.0, figures[1] + 0.0, figures[2], figures[3], each - nan - infinite, nan, infinite)


def compute_cuda(values: Any, axis: int | None = None) -> Statistics:
    """What `reference` returns, calculated on a GPU: sums in float64, in a fixed order. `values` may be on the GPU already
    (float32 or float64, contiguous); a float16 on the host is sent as float32."""
    from numba import cuda

    if hasattr(values, "__cuda_array_interface__"):
        given = cuda.as_cuda_array(values).reshape(-1)
        if given.dtype not in (np.float32, np.float64):
            raise ValueError(f"values of type {given.dtype} on the GPU; float32 and float64 are possible")
        outer, channels, inner = _layout(tuple(values.shape), axis)
    else:
        host, (outer, channels, inner) = _checked(values, axis)
        kind = np.float64 if host.dtype == np.float64 else np.float32
        given = np.ascontiguousarray(host, dtype=kind).reshape(-1)
    figures, counts = _nothing(channels)
    if outer * channels * inner:
        beside, pieces = on_gpu.split(outer, channels, inner)
        shape = (pieces, beside)
        parts, lost = cuda.device_array((4, *shape), np.float64), cuda.device_array((2, *shape), np.int64)
        columns, runs = on_gpu.compiled()
        if inner < on_gpu.THREADS:
            columns[(-(-beside // on_gpu.THREADS), pieces), on_gpu.THREADS](cuda.to_device(given), outer, parts, lost)
        else:
            runs[(channels, pieces), on_gpu.THREADS](cuda.to_device(given), outer, inner, parts, lost)
        found, left_out = parts.copy_to_host(), lost.copy_to_host()
        each = found.reshape(4, pieces, channels, -1)
        figures[0], figures[1] = each[0].min(axis=(0, 2)), each[1].max(axis=(0, 2))
        figures[2:] = each[2:].sum(axis=(1, 3))
        counts[:] = left_out.reshape(2, pieces, channels, -1).sum(axis=(1, 3))
    return _statistics(figures, counts, outer * inner)
