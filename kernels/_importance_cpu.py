"""What Numba compiles for `perwatt.kernels.importance` on the CPU: units whose weights follow each other in runs, and columns,
of which each has its own sum. A value is read once and lives in float64 from then on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

SQUARES, PRODUCTS, NORMS = range(3)
RUN_AT_LEAST, FEW_ROWS = 512, 8
"""Neighbours of one unit from which on a run of them is added by itself; fewer are columns, added up last, unless there are so
few rows that the columns' sums would be much beside the weights."""
COLUMNS = 2048
"""Columns done at once, whose sums stay in the first level cache."""


def _run_squares(x: Any) -> Any:
    total = 0.0
    for i in range(len(x)):
        value = np.float64(x[i])
        total += value * value
    return total


def _run_products(x: Any, y: Any) -> Any:
    total = 0.0
    for i in range(len(x)):
        value = np.float64(x[i]) * np.float64(y[i])
        total += value * value
    return total


def _run_norms(x: Any, factors: Any) -> Any:
    total = 0.0
    for i in range(len(x)):
        total += abs(np.float64(x[i])) * factors[i]
    return total


def _four_runs(a: Any, b: Any, c: Any, d: Any, factors: Any) -> Any:
    """`_run_norms` of four runs at once, which reads the factors once."""
    p, q, r, s = 0.0, 0.0, 0.0, 0.0
    for i in range(len(factors)):
        factor = factors[i]
        p += abs(np.float64(a[i])) * factor
        q += abs(np.float64(b[i])) * factor
        r += abs(np.float64(c[i])) * factor
        s += abs(np.float64(d[i])) * factor
    return p, q, r, s


def _runs(weights: Any, gradients: Any, kind: int, outer: Any, inner: Any, units: int, found: Any) -> None:
    """Adds [outer, units, inner] weights to `found`."""
    length, runs, begin = len(inner), len(outer) * units, 0
    if kind == NORMS:
        begin = runs - runs % 4
        for run in range(0, begin, 4):
            part = weights[run * length : (run + 4) * length]
            sums = _four_runs(
                part[:length], part[length : 2 * length], part[2 * length : 3 * length], part[3 * length :], inner
            )
            for k in range(4):
                found[(run + k) % units] += outer[(run + k) // units] * sums[k]
    for run in range(begin, runs):
        first, unit = run * length, run % units
        part = weights[first : first + length]
        if kind == SQUARES:
            found[unit] += _run_squares(part)
        elif kind == PRODUCTS:
            found[unit] += _run_products(part, gradients[first : first + length])
        else:
            found[unit] += outer[run // units] * _run_norms(part, inner)


def _add_squares(total: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    for j in range(len(total)):
        p, q, r, s = np.float64(a[j]), np.float64(b[j]), np.float64(c[j]), np.float64(d[j])
        total[j] += (p * p + q * q) + (r * r + s * s)


def _add_products(total: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> None:
    for j in range(len(total)):
        p, q = np.float64(a[j]) * np.float64(e[j]), np.float64(b[j]) * np.float64(f[j])
        r, s = np.float64(c[j]) * np.float64(g[j]), np.float64(d[j]) * np.float64(h[j])
        total[j] += (p * p + q * q) + (r * r + s * s)


def _add_norms(total: Any, a: Any, b: Any, c: Any, d: Any, by: Any) -> None:
    p, q, r, s = by[0], by[1], by[2], by[3]
    for j in range(len(total)):
        total[j] += (abs(np.float64(a[j])) * p + abs(np.float64(b[j])) * q) + (
            abs(np.float64(c[j])) * r + abs(np.float64(d[j])) * s
        )


def _add_row(kind: int, total: Any, row: Any, beside: Any, by: Any) -> None:
    if kind == SQUARES:
        for j in range(len(total)):
            value = np.float64(row[j])
            total[j] += value * value
    elif kind == PRODUCTS:
        for j in range(len(total)):
            value = np.float64(row[j]) * np.float64(beside[j])
            total[j] += value * value
    else:
        for j in range(len(total)):
            total[j] += abs(np.float64(row[j])) * by


def _columns(weights: Any, gradients: Any, kind: int, outer: Any, found: Any) -> None:
    """Adds rows of as many weights as `found` has sums, four rows at a time."""
    width, rows = len(found), len(outer)
    for left in range(0, width, COLUMNS):
        across = min(COLUMNS, width - left)
        total = found[left : left + across]
        row = 0
        while row < rows:
            at = row * width + left
            if row + 4 > rows:
                _add_row(kind, total, weights[at : at + across], gradients[at : at + across], outer[row])
                row += 1
                continue
            a, b = weights[at : at + across], weights[at + width : at + width + across]
            c, d = weights[at + 2 * width :][:across], weights[at + 3 * width :][:across]
            if kind == SQUARES:
                _add_squares(total, a, b, c, d)
            elif kind == PRODUCTS:
                e, f = gradients[at : at + across], gradients[at + width : at + width + across]
                g, h = gradients[at + 2 * width :][:across], gradients[at + 3 * width :][:across]
                _add_products(total, a, b, c, d, e, f, g, h)
            else:
                _add_norms(total, a, b, c, d, outer[row : row + 4])
            row += 4


@functools.cache
def compiled(function: Callable[..., None]) -> Any:
    """`function` and what it calls, compiled or loaded."""
    import numba
    from numba.extending import register_jitable

    # A run's sum may be taken in any order, so that it is taken in several lanes.
    settings: dict[str, Any] = {"nogil": True, "fastmath": {"contract", "reassoc"}}
    helpers: tuple[Callable[..., Any], ...] = (
        _run_squares, _run_products, _run_norms, _four_runs, _add_squares, _add_products, _add_norms, _add_row,
    )  # fmt: skip
    for helper in helpers:
        register_jitable(**settings)(helper)
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(**settings)(function)
