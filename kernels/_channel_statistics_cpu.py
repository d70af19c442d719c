"""What Numba compiles for `perwatt.kernels.channel_statistics` on the CPU; all that the cached kernel calls stands here."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

LANES = 512
"""Columns that are summed side by side: their accumulators, 8 KB, stay in the first-level cache."""

ROWS = 256
"""Rows between two looks at whether all was finite; what was not is added again, slowly."""

LONG = 16 * LANES
"""Values side by side of one channel that are worth a tile."""

STRETCH = 1024
"""Values that are added in their own type where they follow each other, in as many lanes as LLVM takes: 16 at least."""

RUN_AT_LEAST = 96
"""Values side by side of one channel that are worth a loop of their own; fewer are columns beside other channels'."""

TINY = {"float32": 2.0**-50, "float64": 0.0}
"""Below this, squares may vanish in the type: 2⁻⁵⁰ leaves a float32's square its 24 bits, and its neighbours' next to it."""


def _one_by_one(x: Any, first: int, step: int, count: int, channel: int, figures: Any, counts: Any) -> None:
    """What adds values that may be anything: exactly what `reference` does, and as slow as that is value by value."""
    for i in range(count):
        value = np.float64(x[first + i * step])
        if np.isnan(value):
            counts[0, channel] += 1
        elif np.isinf(value):
            counts[1, channel] += 1
        else:
            figures[0, channel] = min(figures[0, channel], value)
            figures[1, channel] = max(figures[1, channel], value)
            figures[2, channel] += value
            figures[3, channel] += value * value


def _tile(x: Any, first: int, stride: int, rows: int, width: int, lanes: Any) -> None:
    """Columns' statistics of `rows` rows of `width` values: 8 rows at a time, so that accumulators are touched seldom.

    All four figures stand in one array at fixed distances, and none is a reduction across columns: so LLVM may use vectors
    without reordering a sum, and a NaN spoils its own column only."""
    lanes[:width] = np.inf
    lanes[LANES : LANES + width] = -np.inf
    lanes[2 * LANES : 2 * LANES + width] = 0.0
    lanes[3 * LANES : 3 * LANES + width] = 0.0
    whole = rows // 8 * 8
    for r in range(0, whole, 8):
        at = first + r * stride
        row0 = x[at : at + width]
        row1 = x[at + stride : at + stride + width]
        row2 = x[at + 2 * stride : at + 2 * stride + width]
        row3 = x[at + 3 * stride : at + 3 * stride + width]
        row4 = x[at + 4 * stride : at + 4 * stride + width]
        row5 = x[at + 5 * stride : at + 5 * stride + width]
        row6 = x[at + 6 * stride : at + 6 * stride + width]
        row7 = x[at + 7 * stride : at + 7 * stride + width]
        for j in range(width):
            a, b, c, d, e, f, g, h = row0[j], row1[j], row2[j], row3[j], row4[j], row5[j], row6[j], row7[j]
            ab, cd, ef, gh = a if a < b else b, c if c < d else d, e if e < f else f, g if g < h else h
            abcd, efgh = ab if ab < cd else cd, ef if ef < gh else gh
            low = abcd if abcd < efgh else efgh
            ab, cd, ef, gh = a if a > b else b, c if c > d else d, e if e > f else f, g if g > h else h
            abcd, efgh = ab if ab > cd else cd, ef if ef > gh else gh
            high = abcd if abcd > efgh else efgh
            lanes[j] = low if low < lanes[j] else lanes[j]
            lanes[LANES + j] = high if high > lanes[LANES + j] else lanes[LANES + j]
            lanes[2 * LANES + j] += ((a + b) + (c + d)) + ((e + f) + (g + h))
            lanes[3 * LANES + j] += ((a * a + b * b) + (c * c + d * d)) + ((e * e + f * f) + (g * g + h * h))
    for r in range(whole, rows):
        row0 = x[first + r * stride : first + r * stride + width]
        for j in range(width):
            value = row0[j]
            lanes[j] = value if value < lanes[j] else lanes[j]
            lanes[LANES + j] = value if value > lanes[LANES + j] else lanes[LANES + j]
            lanes[2 * LANES + j] += value
            lanes[3 * LANES + j] += value * value


def _in_doubt(lanes: Any, j: int, tiny: Any) -> Any:
    """Whether a figure may be spoilt: NaN and infinity leave no finite square, and small squares may have vanished."""
    squares = lanes[3 * LANES + j]
    largest = lanes[LANES + j] if lanes[LANES + j] > -lanes[j] else -lanes[j]
    return (squares - squares != 0.0) | ((largest > 0.0) & (largest < tiny))


def _any_in_doubt(lanes: Any, width: int, tiny: Any) -> bool:
    found = 0
    for j in range(width):
        found |= int(_in_doubt(lanes, j, tiny))
    return found != 0


def _add(low: Any, high: Any, total: Any, squares: Any, channel: int, figures: Any) -> None:
    figures[0, channel] = low if low < figures[0, channel] else figures[0, channel]
    figures[1, channel] = high if high > figures[1, channel] else figures[1, channel]
    figures[2, channel] += total
    figures[3, channel] += squares


def _add_columns(lanes: Any, first: int, width: int, channel: int, figures: Any) -> None:
    """Adds neighbouring columns, all of one channel, to its figures."""
    low, high, total, squares = np.float64(np.inf), np.float64(-np.inf), 0.0, 0.0
    lows, highs = lanes[first : first + width], lanes[LANES + first : LANES + first + width]
    totals, squared = lanes[2 * LANES + first :][:width], lanes[3 * LANES + first :][:width]
    for j in range(width):
        low = lows[j] if lows[j] < low else low
        high = highs[j] if highs[j] > high else high
        total += totals[j]
        squares += squared[j]
    _add(low, high, total, squares, channel, figures)


def _halve(lanes: Any, half: int) -> None:
    for j in range(half):
        k = half + j
        lanes[j] = lanes[k] if lanes[k] < lanes[j] else lanes[j]
        lanes[LANES + j] = lanes[LANES + k] if lanes[LANES + k] > lanes[LANES + j] else lanes[LANES + j]
        lanes[2 * LANES + j] += lanes[2 * LANES + k]
        lanes[3 * LANES + j] += lanes[3 * LANES + k]


def _add_all(lanes: Any, channel: int, figures: Any) -> None:
    """Adds LANES columns of one channel: halves upon halves, whose sizes the compiler knows when it takes vectors."""
    _halve(lanes, LANES // 2)
    _halve(lanes, LANES // 4)
    _halve(lanes, LANES // 8)
    _halve(lanes, LANES // 16)
    _halve(lanes, LANES // 32)
    _add_columns(lanes, 0, LANES // 32, channel, figures)


def _add_each(lanes: Any, first: int, width: int, channel: int, figures: Any) -> None:
    """Adds neighbouring columns of neighbouring channels; in four loops, since LLVM compares few arrays for overlap in one."""
    for row in range(4):
        found = figures[row, channel : channel + width]
        given = lanes[row * LANES + first : row * LANES + first + width]
        if row == 0:
            for j in range(width):
                found[j] = given[j] if given[j] < found[j] else found[j]
        elif row == 1:
            for j in range(width):
                found[j] = given[j] if given[j] > found[j] else found[j]
        else:
            for j in range(width):
                found[j] += given[j]


def _side_by_side(
    x: Any,
    first: int,
    stride: int,
    rows: int,
    width: int,
    channels: int,
    inner: int,
    tiny: Any,
    lanes: Any,
    figures: Any,
    counts: Any,
) -> None:
    """Adds rows of `width` values, in which `inner` values of each channel follow each other, channel after channel."""
    whole = LANES // inner * inner
    for top in range(0, rows, ROWS):
        high = min(ROWS, rows - top)
        for left in range(0, width, whole):
            across = min(whole, width - left)
            start = first + top * stride + left
            _tile(x, start, stride, high, across, lanes)
            doubtful = _any_in_doubt(lanes, across, tiny)
            j, channel = 0, left // inner % channels
            while j < across:
                done = 1
                if doubtful:
                    for k in range(j, j + inner):
                        if _in_doubt(lanes, k, tiny):
                            _one_by_one(x, start + k, stride, high, channel, figures, counts)
                        else:
                            _add_columns(lanes, k, 1, channel, figures)
                elif inner > 1:
                    _add_columns(lanes, j, inner, channel, figures)
                else:
                    done = min(channels - channel, across - j)
                    _add_each(lanes, j, done, channel, figures)
                j += done * inner
                channel = channel + done if channel + done < channels else 0


def _reduced(x: Any, signed: Any, unsigned: Any) -> Any:
    """Smallest and largest signed and largest unsigned of the bits of `x`, its sum and sum of squares.

    Whole numbers, unlike floats, LLVM compares in several lanes without a promise that none is NaN."""
    least, most, top = signed[0], signed[0], unsigned[0]
    total, squares = x.dtype.type(0), x.dtype.type(0)
    for i in range(len(x)):
        least = signed[i] if signed[i] < least else least
        most = signed[i] if signed[i] > most else most
        top = unsigned[i] if unsigned[i] > top else top
        total += x[i]
        squares += x[i] * x[i]
    return least, most, top, total, squares


def _long(x: Any, start: int, count: int, channel: int, tiny: Any, lanes: Any, figures: Any, counts: Any) -> int:
    """Adds whole rows of a tile, all of one channel; returns where it stopped."""
    end = start + count
    while end - start >= LONG:
        rows = min(ROWS, (end - start) // LANES // 8 * 8)
        _tile(x, start, LANES, rows, LANES, lanes)
        if _any_in_doubt(lanes, LANES, tiny):
            _one_by_one(x, start, 1, rows * LANES, channel, figures, counts)
        else:
            _add_all(lanes, channel, figures)
        start += rows * LANES
    return start


def _runs(
    x: Any,
    signed: Any,
    unsigned: Any,
    runs: int,
    channels: int,
    inner: int,
    tiny: Any,
    lanes: Any,
    figures: Any,
    counts: Any,
) -> None:
    """Adds runs of `inner` values of one channel each: long stretches as rows of a tile, the others directly."""
    bits, unsigned_bits = lanes.view(signed.dtype), lanes.view(unsigned.dtype)
    for run in range(runs):
        start, end, channel = run * inner, (run + 1) * inner, run % channels
        if inner >= LONG:
            start = _long(x, start, inner, channel, tiny, lanes, figures, counts)
        while start < end:
            stop = min(start + STRETCH, end)
            least, most, top, total, squares = _reduced(x[start:stop], signed[start:stop], unsigned[start:stop])
            # Floats' bits rise with the value from zero on, and with the sign bit set, above all others, as it falls.
            bits[0] = bits[1] = least
            if least < 0:
                unsigned_bits[0] = top
            if most >= 0:
                bits[1] = most
            low, high = lanes[0], lanes[1]
            largest = high if high > -low else -low
            if squares - squares != 0.0 or 0.0 < largest < tiny:
                _one_by_one(x, start, 1, stop - start, channel, figures, counts)
            else:
                _add(low, high, total, squares, channel, figures)
            start = stop


def _accumulate(
    x: Any, signed: Any, unsigned: Any, outer: int, channels: int, inner: int, tiny: Any, figures: Any, counts: Any
) -> None:
    """Adds a whole array of [outer, channels, inner] values."""
    lanes = np.empty(4 * LANES, x.dtype)
    period = channels * inner
    if inner >= RUN_AT_LEAST:
        _runs(x, signed, unsigned, outer * channels, channels, inner, tiny, lanes, figures, counts)
        return
    # Short rows side by side in one, so that columns fill the accumulators; as long as there are eight of them below.
    times = max(1, min(LANES // period, outer // 8))
    rows, width = outer // times, times * period
    rest = rows * width
    if times == 1:
        _side_by_side(x, 0, period, outer, period, channels, inner, tiny, lanes, figures, counts)
        return
    wide, wide_counts = np.zeros((4, width)), np.zeros((2, width), np.int64)
    wide[0], wide[1] = np.inf, -np.inf
    _side_by_side(x, 0, width, rows, width, width, 1, tiny, lanes, wide, wide_counts)
    for j in range(width):
        channel = j // inner % channels
        _add(wide[0, j], wide[1, j], wide[2, j], wide[3, j], channel, figures)
        counts[0, channel] += wide_counts[0, j]
        counts[1, channel] += wide_counts[1, j]
    _side_by_side(x, rest, period, outer - rows * times, period, channels, inner, tiny, lanes, figures, counts)


@functools.cache
def compiled() -> Any:
    import numba
    from numba.extending import register_jitable

    # Contraction alone: a product and a sum become one fused multiply-add; nothing else may be rearranged.
    settings: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}}
    parts = (
        _one_by_one,
        _tile,
        _in_doubt,
        _any_in_doubt,
        _add,
        _add_columns,
        _halve,
        _add_all,
        _add_each,
        _side_by_side,
        _long,
        _runs,
    )
    for part in parts:
        register_jitable(**settings)(part)
    # A run's sum may be taken in any order; the order of whole numbers' minimum is free anyway.
    register_jitable(nogil=True, fastmath={"contract", "reassoc"})(_reduced)
    try:
        return numba.njit(cache=True, **settings)(_accumulate)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(**settings)(_accumulate)
