"""What Numba compiles for `perwatt.kernels.histogram` on the CPU; all that the cached kernel calls stands in this file."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

CHUNK = 2048
"""Values between two looks at the range: with their bins and four tables of 2048 they stay in the first-level cache."""

TABLES_FROM = 8
"""Values a bin from which on four private tables pay for being added up."""

ZEROS = 16
"""Further counters for zeros, half of what leaves a ReLU: spread, so that none waits for the one before."""

RUN_AT_LEAST = 32
"""Values side by side of one channel that are worth a loop of their own; fewer are columns beside other channels'."""

COLUMNS, ROWS = 128, 128
"""A tile of columns: as many channels' counts as the second-level cache holds, as many rows as pay for fetching them."""

UNCOUNTED = 2**30
"""Values after which the private tables are added up, before one of their counters could overflow."""

INFINITE = np.int32(0x7F800000)
"""An infinity's bits without sign; larger ones are NaN."""

MAGNITUDE = np.int32(0x7FFFFFFF)
"""All bits but the sign."""


def _grow_row(row: Any, exponents: Any, channel: int, largest: Any) -> None:
    """Widens a channel's range until `largest`, a float's bits without sign, lies within; in place, the middle first."""
    # The smallest k with 2ᵏ ≥ largest: its exponent, or one more where there is a fraction behind it.
    exponent = ((np.int64(largest) + 0x7FFFFF) >> 23) - 127
    doublings = min(exponent - exponents[channel], 31)
    if doublings <= 0:
        return
    half = len(row) // 2
    for m in range(1, half):
        above, below = row[half + m], row[half - 1 - m]
        if above | below:
            row[half + m] = 0
            row[half - 1 - m] = 0
            row[half + (m >> doublings)] += above
            row[half - 1 - (m >> doublings)] += below
    exponents[channel] = exponent


def _scale(half: Any, exponent: Any) -> Any:
    """1 / width: a power of two, so that nothing is rounded."""
    return np.float32(math.ldexp(np.float64(half), int(-exponent)))


def _one_by_one(
    x: Any,
    bits: Any,
    first: int,
    step: int,
    count: int,
    channel: int,
    counts: Any,
    exponents: Any,
    nan: Any,
    infinite: Any,
) -> None:
    """Counts values that may be anything."""
    row = counts[channel]
    half = len(row) // 2
    for i in range(first, first + count * step, step):
        largest = bits[i] & MAGNITUDE
        if largest > INFINITE:
            nan[channel] += 1
        elif largest == INFINITE:
            infinite[channel] += 1
        else:
            _grow_row(row, exponents, channel, largest)
            place = max(int(np.ceil(abs(x[i]) * _scale(half, exponents[channel]))), 1)
            row[half - place if x[i] < 0 else half - 1 + place] += 1


def _largest(bits: Any) -> Any:
    found = np.int32(0)
    for i in range(len(bits)):
        magnitude = np.int32(bits[i] & MAGNITUDE)
        found = magnitude if magnitude > found else found
    return found


def _places(x: Any, scale: Any, half: Any, zeros: Any, spread: Any, places: Any) -> None:
    """Each value's bin: no branch in it, so that LLVM takes vectors. Zeros in turn to counters from `zeros` on."""
    for i in range(len(x)):
        place = np.int32(np.ceil(abs(x[i]) * scale))
        place = place if place > np.int32(1) else np.int32(1)
        place = half - place if x[i] < np.float32(0) else half - np.int32(1) + place
        places[i] = zeros + np.int32(i & spread) if x[i] == np.float32(0) else place


def _count(places: Any, tables: Any) -> None:
    """Four tables in turn: an increment needn't wait for the one before where neighbours fall in the same bin."""
    bins = len(tables) // 4
    first, second, third, fourth = (
        tables[:bins],
        tables[bins : 2 * bins],
        tables[2 * bins : 3 * bins],
        tables[3 * bins :],
    )
    whole = len(places) // 4 * 4
    for i in range(0, whole, 4):
        first[places[i]] += np.uint32(1)
        second[places[i + 1]] += np.uint32(1)
        third[places[i + 2]] += np.uint32(1)
        fourth[places[i + 3]] += np.uint32(1)
    for i in range(whole, len(places)):
        first[places[i]] += np.uint32(1)


def _flush(tables: Any, row: Any) -> None:
    bins, size = len(row), len(tables) // 4
    for table in range(4):
        part = tables[table * size : (table + 1) * size]
        for b in range(bins):
            row[b] += part[b]
        row[bins // 2] += part[bins:].sum()
    tables[:] = 0


def _runs(
    x: Any, bits: Any, outer: int, channels: int, inner: int, counts: Any, exponents: Any, nan: Any, infinite: Any
) -> None:
    """Channel by channel, so that its private tables are added up once."""
    bins = counts.shape[1]
    half = np.int32(bins // 2)
    private = outer * inner >= TABLES_FROM * bins
    tables, buffer = np.zeros(4 * (bins + ZEROS), np.uint32), np.empty(CHUNK, np.uint16)
    zeros, spread = (bins, ZEROS - 1) if private else (bins // 2, 0)
    for channel in range(channels):
        row = counts[channel]
        uncounted = 0
        scale = _scale(half, exponents[channel])
        for o in range(outer):
            begin = (o * channels + channel) * inner
            for first in range(begin, begin + inner, CHUNK):
                end = min(first + CHUNK, begin + inner)
                largest = _largest(bits[first:end])
                if largest >= INFINITE or (np.int64(largest) + 0x7FFFFF) >> 23 > exponents[channel] + 127:
                    if uncounted:
                        _flush(tables, row)
                        uncounted = 0
                    if largest >= INFINITE:
                        _one_by_one(x, bits, first, 1, end - first, channel, counts, exponents, nan, infinite)
                    else:
                        _grow_row(row, exponents, channel, largest)
                    scale = _scale(half, exponents[channel])
                if largest < INFINITE:
                    places = buffer[: end - first]
                    _places(x[first:end], scale, half, np.int32(zeros), spread, places)
                    if private:
                        _count(places, tables)
                        uncounted += end - first
                    else:
                        for i in range(len(places)):
                            row[places[i]] += 1
                if uncounted >= UNCOUNTED:
                    _flush(tables, row)
                    uncounted = 0
        if uncounted:
            _flush(tables, row)


def _columns(
    x: Any,
    bits: Any,
    start: int,
    rows: int,
    width: int,
    channels: int,
    inner: int,
    counts: Any,
    exponents: Any,
    nan: Any,
    infinite: Any,
) -> None:
    """Counts rows of `width` values, in which `inner` values of each channel follow each other, channel after channel."""
    bins = counts.shape[1]
    half = np.int32(bins // 2)
    largest, scales = np.empty(COLUMNS, np.int32), np.empty(COLUMNS, np.float32)
    places = np.empty((ROWS, COLUMNS), np.uint16)
    for left in range(0, width, COLUMNS):
        across = min(COLUMNS, width - left)
        changed = True
        for top in range(0, rows, ROWS):
            first, high = start + top * width + left, min(ROWS, rows - top)
            _largest_each(bits, first, width, high, across, largest)
            most = np.int32(0)
            for j in range(across):
                most = max(most, largest[j])
                if largest[j] < INFINITE:
                    channel = (left + j) // inner % channels
                    if (np.int64(largest[j]) + 0x7FFFFF) >> 23 > exponents[channel] + 127:
                        _grow_row(counts[channel], exponents, channel, largest[j])
                        changed = True
            if most >= INFINITE:
                for j in range(across):
                    channel = (left + j) // inner % channels
                    _one_by_one(x, bits, first + j, width, high, channel, counts, exponents, nan, infinite)
                changed = True
                continue
            if changed:
                for j in range(across):
                    scales[j] = _scale(half, exponents[(left + j) // inner % channels])
                changed = False
            for r in range(high):
                at = first + r * width
                _places_each(x[at : at + across], scales, half, places[r])
            # Down a column, not along a row: neighbouring channels' counters of one bin are a multiple of 4 KB apart, and a
            # load that agrees with an earlier store in its last 12 bits waits for it.
            for j in range(across):
                row = counts[(left + j) // inner % channels]
                for r in range(high):
                    row[places[r, j]] += 1


def _largest_each(bits: Any, first: int, width: int, rows: int, across: int, largest: Any) -> None:
    largest[:] = 0
    for r in range(rows):
        row = bits[first + r * width : first + r * width + across]
        for j in range(across):
            magnitude = np.int32(row[j] & MAGNITUDE)
            largest[j] = magnitude if magnitude > largest[j] else largest[j]


def _places_each(x: Any, scales: Any, half: Any, places: Any) -> None:
    for j in range(len(x)):
        place = np.int32(np.ceil(abs(x[j]) * scales[j]))
        place = place if place > np.int32(1) else np.int32(1)
        places[j] = half - place if x[j] < np.float32(0) else half - np.int32(1) + place


def _update(
    x: Any, bits: Any, outer: int, channels: int, inner: int, counts: Any, exponents: Any, nan: Any, infinite: Any
) -> None:
    """Counts a whole array of [outer, channels, inner] values."""
    if inner >= RUN_AT_LEAST:
        _runs(x, bits, outer, channels, inner, counts, exponents, nan, infinite)
        return
    # Short rows side by side in one, so that there are columns to fill vectors.
    period = channels * inner
    times = max(1, min(COLUMNS // period, outer))
    rows = outer // times
    rest = rows * times * period
    _columns(x, bits, 0, rows, times * period, channels, inner, counts, exponents, nan, infinite)
    _columns(x, bits, rest, outer - rows * times, period, channels, inner, counts, exponents, nan, infinite)


@functools.cache
def compiled() -> Any:
    import numba
    from numba.extending import register_jitable

    parts = (
        _grow_row,
        _scale,
        _one_by_one,
        _largest,
        _places,
        _count,
        _flush,
        _runs,
        _columns,
        _largest_each,
        _places_each,
    )
    for part in parts:
        register_jitable(part)
    try:
        return numba.njit(cache=True, nogil=True)(_update)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(nogil=True)(_update)
