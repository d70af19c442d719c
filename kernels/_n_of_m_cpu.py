"""What Numba compiles for `perwatt.kernels.n_of_m` on the CPU. Each kernel returns whether the scores were free of NaN.

Groups of four, by far the most usual, stay in registers: an element's rank is how many of its group beat it. Of others LANES
groups are taken at once, transposed, so that a sorting network, whose comparisons are the same for all groups, finds the N-th
largest score of each side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

LANES = 64


@functools.cache
def network(n: int, m: int) -> Any:
    """Pairs of places, int64 [pairs, 2], that swapped where the first is smaller bring the n-th largest of m to place n − 1:
    Batcher's merge exchange (Knuth, "The art of computer programming", volume 3, algorithm 5.2.2M) less what that place
    doesn't depend on."""
    pairs = []
    p = most = 1 << (m - 1).bit_length() - 1
    while p:
        q, r, d = most, 0, p
        while True:
            pairs += [(i, i + d) for i in range(m - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1
    needed, kept = {n - 1}, []
    for pair in reversed(pairs):
        if needed.intersection(pair):
            needed.update(pair)
            kept.append(pair)
    return np.array(kept[::-1], np.int64).reshape(-1, 2)


def _choose(
    scores: Any, first: int, count: int, n: int, m: int, pairs: Any, tile: Any, sorted_: Any, chosen: Any, kept: Any
) -> bool:
    """Which elements of `count` groups are kept: `kept` [count · m]; whether none is NaN. `tile`, `sorted_` and `chosen`: [m,
    LANES]."""
    limit, spare = sorted_[n - 1], np.empty(LANES, np.int32)
    for i in range(m):
        for t in range(count):
            tile[i, t] = scores[(first + t) * m + i]
    lost = 0
    for i in range(m):
        for t in range(LANES):
            value = tile[i, t]
            lost |= int(value != value)
            sorted_[i, t] = value
    for pair in range(len(pairs)):
        above, below = sorted_[pairs[pair, 0]], sorted_[pairs[pair, 1]]
        for t in range(LANES):
            a, b = above[t], below[t]
            above[t] = a if a > b else b
            below[t] = b if a > b else a
    for t in range(LANES):
        spare[t] = n
    for i in range(m):
        for t in range(LANES):
            spare[t] -= np.int32(tile[i, t] > limit[t])
    # What equals the limit is kept as long as there is room.
    for i in range(m):
        for t in range(LANES):
            equal = np.int32(tile[i, t] == limit[t]) & np.int32(spare[t] > 0)
            spare[t] -= equal
            chosen[i, t] = np.uint8(np.int32(tile[i, t] > limit[t]) | equal)
    for t in range(count):
        for i in range(m):
            kept[t * m + i] = chosen[i, t]
    return lost == 0


def _mask(scores: Any, n: int, m: int, pairs: Any, kept: Any) -> bool:
    groups = len(scores) // m
    tile, sorted_ = np.zeros((m, LANES), np.float32), np.empty((m, LANES), np.float32)
    chosen, whole = np.empty((m, LANES), np.uint8), True
    for first in range(0, groups, LANES):
        count = min(LANES, groups - first)
        part = kept[first * m : (first + count) * m]
        whole &= _choose(scores, first, count, n, m, pairs, tile, sorted_, chosen, part)
    return whole


def _prune(weights: Any, scores: Any, n: int, m: int, pairs: Any, out: Any) -> bool:
    groups = len(scores) // m
    tile, sorted_ = np.zeros((m, LANES), np.float32), np.empty((m, LANES), np.float32)
    chosen, kept, whole = np.empty((m, LANES), np.uint8), np.empty(m * LANES, np.uint8), True
    for first in range(0, groups, LANES):
        count = min(LANES, groups - first)
        whole &= _choose(scores, first, count, n, m, pairs, tile, sorted_, chosen, kept)
        given, part = weights[first * m : (first + count) * m], out[first * m : (first + count) * m]
        for at in range(len(part)):
            part[at] = given[at] if kept[at] else np.float32(0)
    return whole


def _ranks_of_four(a: Any, b: Any, c: Any, d: Any) -> Any:
    """How many of the others beat each."""
    ba, ca, da = np.int32(b > a), np.int32(c > a), np.int32(d > a)
    cb, db, dc = np.int32(c > b), np.int32(d > b), np.int32(d > c)
    one, two, three = np.int32(1), np.int32(2), np.int32(3)
    return ba + ca + da, one - ba + cb + db, two - ca - cb + dc, three - da - db - dc


def _mask_of_four(scores: Any, n: int, kept: Any) -> bool:
    most = np.int32(n)
    lost = 0
    for first in range(0, len(scores) // 4):
        a, b, c, d = scores[4 * first], scores[4 * first + 1], scores[4 * first + 2], scores[4 * first + 3]
        lost |= int((a != a) | (b != b) | (c != c) | (d != d))
        p, q, r, s = _ranks_of_four(a, b, c, d)
        kept[4 * first] = np.uint8(p < most)
        kept[4 * first + 1] = np.uint8(q < most)
        kept[4 * first + 2] = np.uint8(r < most)
        kept[4 * first + 3] = np.uint8(s < most)
    return lost == 0


def _prune_four(weights: Any, scores: Any, n: int, out: Any) -> bool:
    most, zero = np.int32(n), np.float32(0)
    lost = 0
    for first in range(0, len(scores) // 4):
        a, b, c, d = scores[4 * first], scores[4 * first + 1], scores[4 * first + 2], scores[4 * first + 3]
        w, x, y, z = weights[4 * first], weights[4 * first + 1], weights[4 * first + 2], weights[4 * first + 3]
        lost |= int((a != a) | (b != b) | (c != c) | (d != d))
        p, q, r, s = _ranks_of_four(a, b, c, d)
        out[4 * first] = w if p < most else zero
        out[4 * first + 1] = x if q < most else zero
        out[4 * first + 2] = y if r < most else zero
        out[4 * first + 3] = z if s < most else zero
    return lost == 0


@functools.cache
def compiled(function: Callable[..., bool]) -> Any:
    """`function` and what it calls, compiled or loaded."""
    import numba
    from numba.extending import register_jitable

    helpers: tuple[Callable[..., Any], ...] = (_choose, _ranks_of_four)
    for helper in helpers:
        register_jitable(helper)
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(nogil=True)(function)
