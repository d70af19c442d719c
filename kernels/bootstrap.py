"""Bootstrap distribution of a mean or trimmed mean: what it could have been, had other values been drawn.

A resample draws n of the n values with replacement; int(trim · n) of what was drawn is cut off each end, and the rest is
averaged. `reference` is plain NumPy, `compute` Numba on threads, `best` whichever costs less. Both draw the same positions
and add in the same order, so they agree bit for bit, whatever the number of threads. Negated values give the negated
distribution (up to rounding where something is cut), because positions are drawn before anything is sorted.

Position j of resample r comes from a SplitMix64 sequence (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014, figure 17, with the constants of its reference code) that starts at word r of the seed's own
sequence. Either half of a word is brought into range by multiply and shift without rejection (Lemire: "Fast random integer
generation in an interval", ACM TOMACS 29, 2019): a position's chance differs from 1/n by less than n / 2³² of it.

Limits: fewer than 2³¹ values. No values: every mean is NaN. A NaN among them: every mean is NaN, because a sorted NaN
would pass for the largest value and be cut. Infinite values are values.
"""

from __future__ import annotations

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]

# All of them uint64: Numba makes a float of a uint64 and a plain integer.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST = np.uint64(0xBF58476D1CE4E5B9)
SECOND = np.uint64(0x94D049BB133111EB)
S27, S30, S31, S32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
LOW = np.uint64(0xFFFFFFFF)

LANES = 8
"""Value i of a sum is added to lane i mod 8, and the lanes pairwise: one order for all, and no chain of waiting adders."""

CHUNK_DRAWS = 1 << 18
"""Draws that `reference` holds at once (at least one resample): about 20 MB."""

THREAD_DRAWS = 1 << 24
"""Draws that pay for another thread, 8 ms of work: sooner, it saves no time that anybody notices, and costs a tenth more CPU
seconds."""

LOAD_DRAWS = 20_000_000
"""Draws that cost `reference` as much as importing Numba and loading the compiled kernel: about 0.5 CPU seconds."""


def reference(values: npt.ArrayLike, resamples: int, seed: int, trim: float = 0.0) -> Floats:
    """Means of `resamples` resamples of `values` (one axis); `trim` is the share that is cut off each end.

    Raises ValueError for values of more than one axis, fewer than 0 resamples, or a trim outside [0, 0.5)."""
    given = _checked(values, resamples, trim)
    found = np.full(resamples, np.nan)
    n = len(given)
    if n == 0 or np.isnan(given).any():
        return found
    cut = int(trim * n)
    order = np.argsort(given, kind="stable")
    keys = _words(_key(seed), resamples)
    step = max(1, CHUNK_DRAWS // n)
    for start in range(0, resamples, step):
        positions = _positions(keys[start : start + step], n)
        with np.errstate(over="ignore", invalid="ignore"):
            drawn = _trimmed(positions, given[order], order, cut) if cut else given[positions]
            found[start : start + step] = _lane_sums(drawn) / (n - 2 * cut)
    return found


def compute(
    values: npt.ArrayLike, resamples: int, seed: int, trim: float = 0.0, *, threads: int | None = None
) -> Floats:
    """What `reference` returns, bit for bit, compiled by Numba; on as many threads as pay, or on `threads`."""
    given = _checked(values, resamples, trim)
    found = np.full(resamples, np.nan)
    n = len(given)
    if n == 0 or resamples == 0 or np.isnan(given).any():
        return found
    cut = int(trim * n)
    order = np.argsort(given, kind="stable").astype(np.uint32)
    padded = np.zeros(-(-n // LANES) * LANES)
    padded[:n] = given[order] if cut else given
    keys = _words(_key(seed), resamples)
    kernel = _compiled()
    parts = min(threads or min(_cores(), n * resamples // THREAD_DRAWS + 1), resamples)
    if parts == 1:
        kernel(padded, order, n, cut, keys, found)
        return found
    edges = [resamples * part // parts for part in range(parts + 1)]
    # Threads of our own rather than Numba's pool, whose OpenMP threads outlive the call and don't survive a fork.
    with ThreadPoolExecutor(parts) as pool:
        for future in [
            pool.submit(kernel, padded, order, n, cut, keys[low:high], found[low:high])
            for low, high in itertools.pairwise(edges)
        ]:
            future.result()
    return found


_drawn = 0


def best(values: npt.ArrayLike, resamples: int, seed: int, trim: float = 0.0) -> Floats:
    """`reference` until this process has drawn as much as loading the kernel costs, then `compute`: never more than twice
    the work of whichever would have been right. The result is the same."""
    global _drawn
    _drawn += np.size(values) * resamples
    return (reference if _drawn < LOAD_DRAWS else compute)(values, resamples, seed, trim)


def _checked(values: npt.ArrayLike, resamples: int, trim: float) -> Floats:
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1:
        raise ValueError(f"values have {given.ndim} axes; resampling needs one")
    if resamples < 0:
        raise ValueError(f"{resamples} resamples; 0 or more are possible")
    if not 0 <= trim < 0.5:
        raise ValueError(f"a trim of {trim}; it must be at least 0 and below 0.5")
    return given


def _key(seed: int) -> Any:
    return np.uint64(seed & (2**64 - 1))


def _words(key: Any, count: int) -> Words:
    """The first words of the SplitMix64 sequence of `key`; a column of keys gives rows of words."""
    z = key + GOLDEN * np.arange(1, count + 1, dtype=np.uint64)
    z = (z ^ (z >> S30)) * FIRST
    z = (z ^ (z >> S27)) * SECOND
    return np.asarray(z ^ (z >> S31))


def _positions(keys: Words, n: int) -> npt.NDArray[np.intp]:
    """What is drawn: a row of n positions for each key, first from the low halves of its words, then the high ones."""
    words = _words(keys[:, None], (n + 1) // 2)
    halves = np.concatenate([words & LOW, words >> S32], axis=1)[:, :n]
    return (halves * np.uint64(n) >> S32).astype(np.intp)


def _trimmed(positions: npt.NDArray[np.intp], ordered: Floats, order: npt.NDArray[np.intp], cut: int) -> Floats:
    """Each value in sorted order times how often it is drawn between the cuts: no resample has to be sorted."""
    rows, n = positions.shape
    cells = positions + n * np.arange(rows)[:, None]
    counts = np.bincount(cells.ravel(), minlength=rows * n).reshape(rows, n)
    passed = np.clip(np.cumsum(counts[:, order], axis=1), cut, n - cut)
    kept = np.diff(passed, axis=1, prepend=cut)
    return np.where(kept > 0, kept * ordered, 0.0)


def _lane_sums(terms: Floats) -> Floats:
    lanes = np.zeros((LANES, len(terms)))
    for first in range(0, terms.shape[1], LANES):
        part = terms[:, first : first + LANES].T
        lanes[: len(part)] += part
    while len(lanes) > 1:
        lanes = lanes[0::2] + lanes[1::2]
    return lanes.ravel()


def _resample(values: Floats, order: Any, n: int, cut: int, keys: Words, found: Floats) -> None:
    """What Numba compiles. `values`: in sorted order where something is cut, with zeros up to whole lanes."""
    words = (n + 1) // 2
    # From a length, not from n: the compiler then knows it for positive, and drops a check of every index.
    whole = len(values) // 8 * 8
    positions = np.full(2 * words + 8, n, np.uint32)
    counts = np.zeros(n, np.int32)
    passed = np.zeros(n + 1, np.int32)
    terms = np.zeros(whole)
    bound = np.uint64(n)
    for row in range(len(found)):
        state = keys[row]
        for j in range(words):
            state += GOLDEN
            z = (state ^ (state >> S30)) * FIRST
            z = (z ^ (z >> S27)) * SECOND
            z ^= z >> S31
            # Masked on both sides, so that a 32-bit multiplication will do: one instruction instead of three.
            positions[j] = np.uint32(((z & LOW) * (bound & LOW)) >> S32)
            positions[words + j] = np.uint32(((z >> S32) * (bound & LOW)) >> S32)
        positions[n] = n  # an odd n has a half left over: it draws the zero behind the values
        a = b = c = d = e = f = g = h = 0.0
        if cut == 0:
            for j in range(0, whole, 8):
                a += values[positions[j]]
                b += values[positions[j + 1]]
                c += values[positions[j + 2]]
                d += values[positions[j + 3]]
                e += values[positions[j + 4]]
                f += values[positions[j + 5]]
                g += values[positions[j + 6]]
                h += values[positions[j + 7]]
        else:
            counts[:] = 0
            for j in range(n):
                counts[positions[j]] += 1
            seen = 0
            for j in range(n):
                seen += counts[order[j]]
                passed[j + 1] = seen
            for j in range(n):
                kept = min(max(passed[j + 1], cut), n - cut) - min(max(passed[j], cut), n - cut)
                terms[j] = kept * values[j] if kept > 0 else 0.0
            for j in range(0, whole, 8):
                a += terms[j]
                b += terms[j + 1]
                c += terms[j + 2]
                d += terms[j + 3]
                e += terms[j + 4]
                f += terms[j + 5]
                g += terms[j + 6]
                h += terms[j + 7]
        found[row] = (((a + b) + (c + d)) + ((e + f) + (g + h))) / (n - 2 * cut)


@functools.cache
def _compiled() -> Any:
    import numba

    try:
        return numba.njit(nogil=True, cache=True)(_resample)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(nogil=True)(_resample)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
