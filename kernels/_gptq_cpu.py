"""What Numba compiles for `perwatt.kernels.gptq` on the CPU: one block of columns, for all rows; the scales of whole groups;
the half of the Hessian that is factorized. Everything that a cached kernel calls stands in this file.

Rows are taken TILE at a time, so that what a block needs of them (four times 128 × TILE floats: 256 KB) stays in the second
level cache, and the innermost loops walk TILE neighbouring rows of one column."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ASYMMETRIC, SIGNED, POSITIVE = range(3)
TILE, LINE = 128, 16
ONE, ZERO, TWO = np.float32(1), np.float32(0), np.float32(2)
LEAST_SCALE = np.float32(2.0**-125)  # shrunk by any factor of the search it is still a normal number
ROUND = np.float32(3 << 22)
"""Added and taken away again, it leaves a float32 below 2²² rounded half to even: the last bit of such a sum is worth 1."""


def _gather(hessian: Array, order: Array, factor: float, chosen: Array) -> None:
    """The upper half of `hessian` in another order, times `factor`."""
    for i in range(len(order)):
        row = hessian[order[i]]
        for j in range(i, len(order)):
            chosen[i, j] = row[order[j]] * factor


def _subtract(targets: Array, i: int, coefficients: Array, rows: Array, first: int, last: int) -> None:
    """targets[i] −= Σ coefficients[i, k] · rows[k], first ≤ k < last."""
    target = targets[i]
    k = first
    while k + 4 <= last:
        a, b, c, d = coefficients[i, k], coefficients[i, k + 1], coefficients[i, k + 2], coefficients[i, k + 3]
        for t in range(TILE):
            target[t] = (((target[t] - a * rows[k, t]) - b * rows[k + 1, t]) - c * rows[k + 2, t]) - d * rows[k + 3, t]
        k += 4
    while k < last:
        a = coefficients[i, k]
        for t in range(TILE):
            target[t] -= a * rows[k, t]
        k += 1


def _subtract_four(targets: Array, i: int, coefficients: Array, rows: Array, first: int, last: int) -> None:
    """`_subtract` for i to i + 3: twice the arithmetic for what is read."""
    p, q, r, s = targets[i], targets[i + 1], targets[i + 2], targets[i + 3]
    k = first
    while k + 4 <= last:
        a, b, c, d = coefficients[i, k], coefficients[i, k + 1], coefficients[i, k + 2], coefficients[i, k + 3]
        e, f, g, h = (
            coefficients[i + 1, k],
            coefficients[i + 1, k + 1],
            coefficients[i + 1, k + 2],
            coefficients[i + 1, k + 3],
        )
        j, m, n, o = (
            coefficients[i + 2, k],
            coefficients[i + 2, k + 1],
            coefficients[i + 2, k + 2],
            coefficients[i + 2, k + 3],
        )
        u, v, w, x = (
            coefficients[i + 3, k],
            coefficients[i + 3, k + 1],
            coefficients[i + 3, k + 2],
            coefficients[i + 3, k + 3],
        )
        for t in range(TILE):
            y0, y1, y2, y3 = rows[k, t], rows[k + 1, t], rows[k + 2, t], rows[k + 3, t]
            p[t] = (((p[t] - a * y0) - b * y1) - c * y2) - d * y3
            q[t] = (((q[t] - e * y0) - f * y1) - g * y2) - h * y3
            r[t] = (((r[t] - j * y0) - m * y1) - n * y2) - o * y3
            s[t] = (((s[t] - u * y0) - v * y1) - w * y2) - x * y3
        k += 4
    while k < last:
        a, e, j, u = coefficients[i, k], coefficients[i + 1, k], coefficients[i + 2, k], coefficients[i + 3, k]
        for t in range(TILE):
            y0 = rows[k, t]
            p[t] -= a * y0
            q[t] -= e * y0
            r[t] -= j * y0
            s[t] -= u * y0
        k += 1


def _bounds(bits: int, mode: int) -> Any:
    """The lowest and the highest code."""
    levels = np.float32(1 << bits)
    low = ZERO if mode == ASYMMETRIC else -levels / TWO
    return low, low + levels - ONE


def _find_scales(
    group: Array, weight: Array, first: int, last: int, bits: int, mode: int, factors: Array, scale: Array, zero: Array
) -> None:
    """Scales and zero points of TILE groups, whose values are the rows from `first` to `last` of `group`."""
    low, high = _bounds(bits, mode)
    half = (high - low + ONE) / TWO
    least = np.zeros(TILE, np.float32)
    most = np.zeros(TILE, np.float32)
    for i in range(first, last):
        for t in range(TILE):
            least[t] = min(least[t], group[i, t])
            most[t] = max(most[t], group[i, t])
    for t in range(TILE):
        if mode == ASYMMETRIC:
            s = np.float32((np.float64(most[t]) - np.float64(least[t])) / np.float64(high))
        elif mode == SIGNED:
            s = (most[t] if most[t] > -least[t] else least[t]) / -half
        else:
            s = max(most[t] / (half - ONE), -least[t] / half)
        scale[t] = s if abs(s) >= LEAST_SCALE else ONE
        zero[t] = min((-least[t] / scale[t] + ROUND) - ROUND, high) if mode == ASYMMETRIC else ZERO
    if len(factors):
        _search(group, weight, first, last, low, high, factors, scale, zero)


def _search(
    group: Array, weight: Array, first: int, last: int, low: Any, high: Any, factors: Array, scale: Array, zero: Array
) -> None:
    """Shrinks each scale by the factor that leaves the least weighted squared error; the first of equal ones."""
    best = np.full(TILE, np.float32(np.inf))
    error = np.empty(TILE, np.float32)
    inverse = np.empty(TILE, np.float32)
    factor = np.ones(TILE, np.float32)
    for candidate in factors:
        error[:] = ZERO
        for t in range(TILE):
            inverse[t] = ONE / (scale[t] * candidate)
        for i in range(first, last):
            for t in range(TILE):
                step = group[i, t] * inverse[t]
                missed = step - ((min(max(step, low - zero[t]), high - zero[t]) + ROUND) - ROUND)
                error[t] += weight[i] * missed * missed
        for t in range(TILE):
            found = error[t] * candidate * candidate
            if found < best[t]:
                best[t] = found
                factor[t] = candidate
    for t in range(TILE):
        scale[t] *= factor[t]


def _load(weights: Array, importance: Array, columns: Array, row: int, count: int, tile: Array) -> None:
    """`count` rows of the chosen columns, transposed; 0 for dead columns, and beyond the last row."""
    # Unsigned positions can't count from the end, which the compiler would otherwise check; LINE rows at a time keep few
    # lines of the cache in use.
    places = columns.astype(np.uint64)
    whole = count - count % LINE
    for start in range(0, whole, LINE):
        part = weights[row + start : row + start + LINE]
        for i in range(len(places)):
            place, target = places[i], tile[i, start : start + LINE]
            for t in range(LINE):
                target[t] = part[t, place]
    for t in range(whole, count):
        for i in range(len(places)):
            tile[i, t] = weights[row + t, places[i]]
    for i in range(len(places)):
        tile[i, count:] = ZERO
        if importance[i] == ZERO:
            tile[i, :] = ZERO


def _scales(
    weights: Array,
    importance: Array,
    group_size: int,
    bits: int,
    mode: int,
    factors: Array,
    scales: Array,
    zeros: Array,
) -> None:
    """Scales and zero points of all groups, each from the weights as they are. `scales`, `zeros`: [groups, out]."""
    rows, width = weights.shape
    tile = np.empty((min(group_size, width), TILE), np.float32)
    scale, zero = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for row in range(0, rows, TILE):
        count = min(TILE, rows - row)
        for group in range(len(scales)):
            columns = np.arange(group * group_size, min((group + 1) * group_size, width))
            _load(weights, importance[columns], columns, row, count, tile)
            _find_scales(tile, importance[columns], 0, len(columns), bits, mode, factors, scale, zero)
            for t in range(count):
                scales[group, row + t] = scale[t]
                zeros[group, row + t] = zero[t]


def _feed(targets: Array, i: int, coefficients: Array, rows: Array, first: int, last: int) -> None:
    """targets[i] −= Σ coefficients[i, k] · rows[k], first ≤ k < i; to be called for i = first … last − 1 in turn, because
    every fourth call does the share of all that stands for the next four."""
    fourth = i - (i - first) % 4
    if fourth + 4 > last:
        _subtract(targets, i, coefficients, rows, first, i)
        return
    if i == fourth:
        _subtract_four(targets, i, coefficients, rows, first, i)
    _subtract(targets, i, coefficients, rows, fourth, i)


def _begin(tile: Array, shift: Array, ahead: Array, coefficients: Array, missed: Array, first: int, last: int) -> None:
    """A group begins: `shift` takes up what the block's columns have missed so far, `ahead` gets the columns as moved by it."""
    for i in range(first, last - 3, 4):
        _subtract_four(shift, i, coefficients, missed, 0, first)
    for i in range(last - (last - first) % 4, last):
        _subtract(shift, i, coefficients, missed, 0, first)
    for i in range(first, last):
        for t in range(TILE):
            ahead[i, t] = tile[i, t] + shift[i, t]


def _column(
    i: int, work: Array, scale: Array, zero: Array, inverse: Array, bits: int, mode: int, error: Array, code: Array
) -> None:
    """Codes of TILE weights of one column, what they miss of the moved weights, and their errors against the given ones."""
    least, most = _bounds(bits, mode)
    column, shift, missed = work[0, i], work[1, i], work[2, i]
    for t in range(TILE):
        moved = (column[t] + shift[t]) * inverse[t]
        step = (min(max(moved, least - zero[t]), most - zero[t]) + ROUND) - ROUND
        error[t] = step * scale[t] - column[t]
        code[t] = np.uint8(np.int32(step + zero[t]))
    for t in range(TILE):
        missed[t] = shift[t] - error[t]


def _block(
    weights: Array,
    row: int,
    importance: Array,
    columns: Array,
    coefficients: Array,
    errors: Array,
    group_size: int,
    static: bool,
    bits: int,
    mode: int,
    factors: Array,
    scales: Array,
    zeros: Array,
    codes: Array,
    work: Array,
) -> None:
    """Codes of TILE rows from `row` in neighbouring columns of `Factor.order`, `columns`, which are done last to first.

    `errors` [columns, TILE] gets code times scale minus weight. `work` is four arrays of that shape, in the order of doing:
    weights, how far errors of earlier blocks move them (given), what codes miss, and a group as it begins."""
    size, count = len(columns), min(TILE, len(weights) - row)
    tile, shift, missed, ahead = work[0], work[1], work[2], work[3]
    taken = columns[::-1].copy()
    weight = importance[taken]
    coded = np.empty((size, TILE), np.uint8)
    scale, zero, inverse = np.ones(TILE, np.float32), np.zeros(TILE, np.float32), np.ones(TILE, np.float32)
    _load(weights, weight, taken, row, count, tile)
    first, last, group = 0, size if static else 0, -1
    for i in range(size):
        if taken[i] // group_size != group:
            group = taken[i] // group_size
            if not static:
                first, last = i, min(size, i + group_size)
                _begin(tile, shift, ahead, coefficients, missed, first, last)
                _find_scales(ahead, weight, first, last, bits, mode, factors, scale, zero)
                scales[group, row : row + count] = scale[:count]
                zeros[group, row : row + count] = zero[:count]
            scale[:count] = scales[group, row : row + count]
            zero[:count] = zeros[group, row : row + count]
            for t in range(TILE):
                inverse[t] = ONE / scale[t]
        _feed(shift, i, coefficients, missed, first, last)
        _column(i, work, scale, zero, inverse, bits, mode, errors[size - 1 - i], coded[i])
    places = taken.astype(np.uint64)
    for t in range(count):
        target = codes[row + t]
        for i in range(size):
            target[places[i]] = coded[i, t]


HELPERS = (_subtract, _subtract_four, _bounds, _search, _find_scales, _load, _feed, _begin, _column)


def _signatures() -> dict[Callable[..., None], list[tuple[Any, ...]]]:
    """What arrays are: one program serves those that may be written to and those that may not."""
    from numba import types

    def array(kind: Any, axes: int, readonly: bool = False) -> Any:
        return types.Array(kind, axes, "C", readonly=readonly)

    single, double, integer = types.float32, types.float64, types.int64
    weights, vector, places = array(single, 2, True), array(single, 1, True), array(integer, 1, True)
    table, codes, work = array(single, 2), array(types.uint8, 2), array(single, 3)
    settings = (integer, integer, vector, table, table)
    whole = [
        (array(kind, 2, True), places, double, array(to, 2)) for kind in (single, double) for to in (single, double)
    ]
    block = (weights, integer, vector, places, weights, table, integer, types.boolean, *settings, codes, work)
    return {_gather: whole, _scales: [(weights, vector, integer, *settings)], _block: [block]}


@functools.cache
def compiled(function: Callable[..., None]) -> Any:
    """`function` and what it calls, compiled or loaded."""
    import numba
    from numba.extending import register_jitable

    for helper in HELPERS:
        register_jitable(helper)
    signatures = _signatures()[function]
    # A product and a sum may become one instruction; nothing else is given away, above all not the rounding by ROUND.
    settings: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return numba.njit(signatures, cache=True, **settings)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(signatures, **settings)(function)
