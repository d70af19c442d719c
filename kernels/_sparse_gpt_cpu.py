"""What Numba compiles for `perwatt.kernels.sparse_gpt` on the CPU: one block of columns, for all rows. Everything that a cached
kernel calls stands in this file.

Rows are taken TILE at a time and transposed, so that the innermost loops walk TILE neighbouring rows of one column, and what a
block needs of them stays in the second level cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

TILE, LINE = 128, 16
STEP = 4
"""Columns that earlier ones of the block are taken off at once."""
ZERO = np.float32(0)


def _load(weights: Array, row: int, count: int, first: int, dead: Array, tile: Array) -> None:
    """`count` rows of `tile`'s columns, from column `first`, transposed; 0 for dead columns, and beyond the last row."""
    # LINE rows at a time keep few lines of the cache in use.
    size = len(tile)
    whole = count - count % LINE
    for start in range(0, whole, LINE):
        part = weights[row + start : row + start + LINE, first : first + size]
        for i in range(size):
            target = tile[i, start : start + LINE]
            for t in range(LINE):
                target[t] = part[t, i]
    for t in range(whole, count):
        for i in range(size):
            tile[i, t] = weights[row + t, first + i]
    for i in range(size):
        tile[i, count:] = ZERO
        if dead[first + i]:
            tile[i, :] = ZERO


def _take_off(shift: Array, i: int, coefficients: Array, missed: Array, first: int, last: int) -> None:
    """shift[i] −= Σ coefficients[i, k] · missed[k], first ≤ k < last."""
    target = shift[i]
    for k in range(first, last):
        a, row = coefficients[i, k], missed[k]
        for t in range(TILE):
            target[t] -= a * row[t]


def _take_off_four(shift: Array, i: int, coefficients: Array, missed: Array, last: int) -> None:
    """The same for columns i to i + 3 and k < `last`, a multiple of four: 16 products for 4 columns read."""
    p, q, r, s = shift[i], shift[i + 1], shift[i + 2], shift[i + 3]
    for k in range(0, last, STEP):
        c0, c1 = coefficients[i, k : k + STEP], coefficients[i + 1, k : k + STEP]
        c2, c3 = coefficients[i + 2, k : k + STEP], coefficients[i + 3, k : k + STEP]
        a0, a1, a2, a3 = c0[0], c0[1], c0[2], c0[3]
        b0, b1, b2, b3 = c1[0], c1[1], c1[2], c1[3]
        d0, d1, d2, d3 = c2[0], c2[1], c2[2], c2[3]
        e0, e1, e2, e3 = c3[0], c3[1], c3[2], c3[3]
        w, x, y, z = missed[k], missed[k + 1], missed[k + 2], missed[k + 3]
        for t in range(TILE):
            p[t] = (((p[t] - a0 * w[t]) - a1 * x[t]) - a2 * y[t]) - a3 * z[t]
            q[t] = (((q[t] - b0 * w[t]) - b1 * x[t]) - b2 * y[t]) - b3 * z[t]
            r[t] = (((r[t] - d0 * w[t]) - d1 * x[t]) - d2 * y[t]) - d3 * z[t]
            s[t] = (((s[t] - e0 * w[t]) - e1 * x[t]) - e2 * y[t]) - e3 * z[t]


def _choose(tile: Array, shift: Array, price: Array, first: int, n: int, m: int, cost: Array, goes: Array) -> None:
    """Which of the m columns from `first` go from each row: all that n others of them cost more than (or as much, before)."""
    for i in range(m):
        for t in range(TILE):
            cost[i, t] = abs(tile[first + i, t] + shift[first + i, t]) * price[first + i]
            goes[first + i, t] = 0
    for i in range(m):
        for j in range(i + 1, m):
            for t in range(TILE):
                later = np.uint8(cost[j, t] > cost[i, t])
                goes[first + i, t] += later
                goes[first + j, t] += np.uint8(1) - later
    for i in range(first, first + m):
        for t in range(TILE):
            goes[i, t] = goes[i, t] >= n


def _costs(weights: Array, start: int, dead: Array, price: Array, shift: Array, costs: Array) -> None:
    """What each weight of a block's columns, as moved so far, costs: `costs` and `shift` are [tiles, columns, TILE]. Infinite
    beyond the last row."""
    rows, size = len(weights), len(price)
    tile = np.empty((size, TILE), np.float32)
    for number in range(len(costs)):
        count = min(TILE, rows - number * TILE)
        _load(weights, number * TILE, count, start, dead, tile)
        for i in range(size):
            moving, found = shift[number, i], costs[number, i]
            for t in range(TILE):
                found[t] = abs(tile[i, t] + moving[t]) * price[i]
            found[count:] = np.inf


def _block(
    weights: Array,
    start: int,
    dead: Array,
    price: Array,
    coefficients: Array,
    shift: Array,
    errors: Array,
    n: int,
    m: int,
    chosen: Array,
    result: Array,
) -> None:
    """The columns from `start`, for all rows, into `result`, and how far they are off into `errors` [tiles, in, TILE], whose
    columns are counted from the last. `shift` [tiles, columns, TILE]: how far errors of earlier blocks move them; `chosen`, of
    that shape: which go, where m is 0."""
    rows, size, width = len(weights), len(price), weights.shape[1]
    tile, missed = np.empty((size, TILE), np.float32), np.empty((size, TILE), np.float32)
    ranked, cost = np.empty((size, TILE), np.uint8), np.empty((max(m, 1), TILE), np.float32)
    step = m if m else STEP
    for number in range(len(errors)):
        row = number * TILE
        count = min(TILE, rows - row)
        _load(weights, row, count, start, dead, tile)
        moving = shift[number]
        goes = ranked if m else chosen[number]
        for first in range(0, size, step):
            last = min(first + step, size)
            even = first // STEP * STEP
            at = first
            while at + STEP <= last:
                _take_off_four(moving, at, coefficients, missed, even)
                for i in range(at, at + STEP):
                    _take_off(moving, i, coefficients, missed, even, first)
                at += STEP
            for i in range(at, last):
                _take_off(moving, i, coefficients, missed, 0, first)
            if m:
                _choose(tile, moving, price, first, n, m, cost, goes)
            for i in range(first, last):
                _take_off(moving, i, coefficients, missed, first, i)
                error = errors[number, width - 1 - start - i]
                for t in range(TILE):
                    moved = tile[i, t] + moving[i, t]
                    kept = ZERO if goes[i, t] else moved
                    missed[i, t] = moved - kept
                    error[t] = kept - tile[i, t]
                    tile[i, t] = kept
        for i in range(size):
            if dead[start + i]:
                tile[i, :] = ZERO
        for t in range(count):
            for i in range(size):
                result[row + t, start + i] = tile[i, t]


HELPERS = (_load, _take_off, _take_off_four, _choose)


@functools.cache
def compiled(function: Callable[..., None]) -> Any:
    """`function` and what it calls, compiled or loaded."""
    import numba
    from numba.extending import register_jitable

    for helper in HELPERS:
        register_jitable(helper)
    # A product and a sum may become one instruction; nothing else is given away.
    settings: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(**settings)(function)
