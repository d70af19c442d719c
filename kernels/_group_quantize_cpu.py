"""What Numba compiles of `group_quantize` for the CPU. All of it stands in this file, so that its cache notices every change.

Smallest and largest values are found on integers: the bits of a float32, with all but the sign turned over where it is
negative, are in the order of the values, NaN and infinity lie outside all finite ones, and smallest and largest of integers
depend on no order, so that LLVM vectorises them without being told to disregard NaN.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

ASYMMETRIC, SIGNED, POSITIVE = range(3)
LEAST_SCALE = np.float32(2.0**-125)  # shrunk by any factor that is tried it is still a normal number
MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY = np.int32(0x7F800000)
SIGN_SHIFT = np.int32(31)
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
TILE_ROWS, SEARCH_COLUMNS = 16, 64
TILE_VALUES = 1 << 17
"""Values that are read twice: 512 KB stay in the second level cache, and their rows are runs of whole pages."""


def _ordered(bits: Any) -> Any:
    """From the bits of a float32 to an integer in the values' order, and back."""
    return bits ^ ((bits >> SIGN_SHIFT) & MAGNITUDE)


def _scale(lows: Any, highs: Any, low: Any, high: Any, mode: int, scales: Any, zeros: Any) -> bool:
    """Scales and zero points of groups from their ordered smallest and largest values; whether all of these are finite."""
    least, most = MAGNITUDE, -MAGNITUDE
    for j in range(len(lows)):
        least, most = min(least, lows[j]), max(most, highs[j])
        lows[j], highs[j] = _ordered(lows[j]), _ordered(highs[j])
    if most >= INFINITY or least < -INFINITY:
        return False
    half = (high - low + ONE) / TWO
    levels = np.float64(high - low)
    small, large = lows.view(np.float32), highs.view(np.float32)
    for j in range(len(lows)):
        a, b = small[j], large[j]
        if mode == ASYMMETRIC:
            a, b = min(a, ZERO), max(b, ZERO)
            scale = np.float32((np.float64(b) - np.float64(a)) / levels)
        elif mode == SIGNED:
            scale = (b if b > -a else a) / -half
        else:
            scale = max(b / (half - ONE), a / -half)
        scale = ONE if abs(scale) < LEAST_SCALE else scale
        scales[j] = scale
        zeros[j] = min(max(np.rint(-a / scale) + low, low), high) if mode == ASYMMETRIC else low + half
    return True


def _search(steps: Any, scales: Any, zeros: Any, low: Any, high: Any, factors: Any, errors: Any, best: Any) -> None:
    """Shrinks scales; `steps` are weights over scales, a column for each group. `errors`, `best`: room to work in."""
    count = len(scales)
    least, error, chosen = errors[0, :count], errors[1, :count], best[:count]
    least[:] = np.inf
    for factor in factors:
        error[:] = 0.0
        for i in range(len(steps)):
            row = steps[i, :count]
            for j in range(count):
                step = row[j] / factor
                code = min(max(np.rint(step), low - zeros[j]), high - zeros[j])
                missed = np.float64(step - code)
                error[j] += missed * missed
        square = np.float64(factor) * np.float64(factor)
        for j in range(count):
            whole = error[j] * square
            chosen[j] = factor if whole < least[j] else chosen[j]
            least[j] = min(whole, least[j])
    for j in range(count):
        scales[j] *= chosen[j]


def _code(weight: Any, scale: Any, zero: Any, low: Any, high: Any) -> Any:
    return np.uint8(np.int32(min(max(np.rint(weight / scale), low - zero), high - zero) + zero))


def _pack(pairs: Any, packed: Any) -> None:
    """Two codes a byte, from codes read two at a time as little-endian 16-bit integers."""
    for i in range(len(pairs)):
        pair = np.int32(pairs[i])
        packed[i] = np.uint8(pair & 0xF | (pair >> 4) & 0xF0)


def _quantize_last(
    weights: Any,
    group: int,
    low: Any,
    high: Any,
    mode: int,
    factors: Any,
    codes: Any,
    packed: Any,
    scales: Any,
    zeros: Any,
) -> bool:
    """Groups along the last of two axes. Codes go to `packed` where that isn't empty; `codes` is then one row of room."""
    rows, length = weights.shape
    groups = scales.shape[1]
    bits = weights.view(np.int32)
    lows, highs = np.empty(groups, np.int32), np.empty(groups, np.int32)
    zero = np.empty((TILE_ROWS, groups), np.float32)
    steps = np.empty((min(group, length) if len(factors) else 0, TILE_ROWS), np.float32)
    errors, best = np.empty((2, TILE_ROWS)), np.empty(TILE_ROWS, np.float32)
    column, zero_column = np.empty(TILE_ROWS, np.float32), np.empty(TILE_ROWS, np.float32)
    for top in range(0, rows, TILE_ROWS):
        count = min(TILE_ROWS, rows - top)
        for r in range(count):
            for g in range(groups):
                part = bits[top + r, g * group : min(g * group + group, length)]
                a, b = MAGNITUDE, -MAGNITUDE
                for i in range(len(part)):
                    value = _ordered(part[i])
                    a, b = min(a, value), max(b, value)
                lows[g], highs[g] = a, b
            if not _scale(lows, highs, low, high, mode, scales[top + r], zero[r]):
                return False
        if len(factors):
            for g in range(groups):
                start, end = g * group, min(g * group + group, length)
                for r in range(count):
                    column[r], zero_column[r] = scales[top + r, g], zero[r, g]
                    for i in range(start, end):
                        steps[i - start, r] = weights[top + r, i] / column[r]
                _search(steps[: end - start], column[:count], zero_column, low, high, factors, errors, best)
                for r in range(count):
                    scales[top + r, g] = column[r]
        for r in range(count):
            found = codes[0 if packed.size else top + r]
            for g in range(groups):
                start, end = g * group, min(g * group + group, length)
                part, into = weights[top + r, start:end], found[start:end]
                scale, z = scales[top + r, g], zero[r, g]
                zeros[top + r, g] = np.uint8(np.int32(z))
                for i in range(len(part)):
                    into[i] = _code(part[i], scale, z, low, high)
            if packed.size:
                _pack(found.view(np.uint16), packed[top + r])
    return True


def _quantize_inner(
    weights: Any,
    group: int,
    low: Any,
    high: Any,
    mode: int,
    factors: Any,
    codes: Any,
    packed: Any,
    scales: Any,
    zeros: Any,
) -> bool:
    """Groups along the middle one of three axes; `codes` and `packed` as in `_quantize_last`."""
    outer, length, width = weights.shape
    bits = weights.view(np.int32)
    tile = min(width, max(256, TILE_VALUES // group // 64 * 64))
    lows, highs, zero = np.empty(tile, np.int32), np.empty(tile, np.int32), np.empty(tile, np.float32)
    steps = np.empty((min(group, length) if len(factors) else 0, SEARCH_COLUMNS), np.float32)
    errors, best = np.empty((2, SEARCH_COLUMNS)), np.empty(SEARCH_COLUMNS, np.float32)
    for o in range(outer):
        for left in range(0, width, tile):
            right = min(left + tile, width)
            a, b, z = lows[: right - left], highs[: right - left], zero[: right - left]
            for g in range(scales.shape[1]):
                start, end = g * group, min(g * group + group, length)
                a[:], b[:] = MAGNITUDE, -MAGNITUDE
                # Four rows at a time, the last one again where there are fewer: a and b are read and written less often.
                for i in range(start, end, 4):
                    first, second = bits[o, i, left:right], bits[o, min(i + 1, end - 1), left:right]
                    third, fourth = bits[o, min(i + 2, end - 1), left:right], bits[o, min(i + 3, end - 1), left:right]
                    for j in range(len(a)):
                        c, d = _ordered(first[j]), _ordered(second[j])
                        e, f = _ordered(third[j]), _ordered(fourth[j])
                        a[j] = min(min(min(c, d), min(e, f)), a[j])
                        b[j] = max(max(max(c, d), max(e, f)), b[j])
                scale = scales[o, g, left:right]
                if not _scale(a, b, low, high, mode, scale, z):
                    return False
                if len(factors):
                    for some in range(0, right - left, SEARCH_COLUMNS):
                        count = min(SEARCH_COLUMNS, right - left - some)
                        part = scale[some : some + count]
                        for i in range(start, end):
                            row = weights[o, i, left + some : left + some + count]
                            for j in range(count):
                                steps[i - start, j] = row[j] / part[j]
                        _search(steps[: end - start], part, z[some : some + count], low, high, factors, errors, best)
                stored = zeros[o, g, left:right]
                for j in range(len(z)):
                    stored[j] = np.uint8(np.int32(z[j]))
                for i in range(start, end):
                    row = weights[o, i, left:right]
                    found = codes[0, 0, : right - left] if packed.size else codes[o, i, left:right]
                    for j in range(len(z)):
                        found[j] = _code(row[j], scale[j], z[j], low, high)
                    if packed.size:
                        _pack(found.view(np.uint16), packed[o, i, left // 2 : right // 2])
    return True


def _dequantize_last(codes: Any, scales: Any, zeros: Any, signed: bool, group: int, found: Any) -> None:
    """Groups along the last of two axes; `zeros` may be empty. Signed codes come as they are: as bytes."""
    length = codes.shape[1]
    turn = np.int32(128 if signed else 0)
    for r in range(codes.shape[0]):
        for g in range(scales.shape[1]):
            start, end = g * group, min(g * group + group, length)
            part, into = codes[r, start:end], found[r, start:end]
            scale = scales[r, g]
            zero = (np.int32(zeros[r, g]) ^ turn) if zeros.size else turn
            for i in range(len(part)):
                into[i] = np.float32((np.int32(part[i]) ^ turn) - zero) * scale


def _dequantize_inner(codes: Any, scales: Any, zeros: Any, signed: bool, group: int, found: Any) -> None:
    """Groups along the middle one of three axes; the rest as in `_dequantize_last`."""
    outer, length, width = codes.shape
    turn = np.int32(128 if signed else 0)
    zero = np.empty(width, np.int32)
    zero[:] = turn
    for o in range(outer):
        for g in range(scales.shape[1]):
            scale = scales[o, g]
            if zeros.size:
                stored = zeros[o, g]
                for j in range(len(zero)):
                    zero[j] = np.int32(stored[j]) ^ turn
            for i in range(g * group, min(g * group + group, length)):
                row, into = codes[o, i], found[o, i]
                for j in range(len(zero)):
                    into[j] = np.float32((np.int32(row[j]) ^ turn) - zero[j]) * scale[j]


def _unpack(packed: Any, signed: bool, pairs: Any) -> None:
    """Two codes a byte to codes written two at a time as little-endian 16-bit integers."""
    fill = np.int32(30 if signed else 0)
    for i in range(len(packed)):
        byte = np.int32(packed[i])
        pair = byte & 0xF | (byte & 0xF0) << 4
        # A code's highest bit, repeated above it: 8 · 30 = 0xF0 stays within the code's own byte.
        pairs[i] = np.uint16(pair | (pair & 0x0808) * fill)


@functools.cache
def compiled(name: str) -> Any:
    """The kernel of this name, for arrays in C order, which may be read-only where they are only read."""
    import numba
    from numba import types as t

    _helpers()
    f, b, i = t.float32, t.uint8, t.int64

    def array(dtype: Any, axes: int, readonly: bool = False) -> Any:
        return t.Array(dtype, axes, "C", readonly=readonly)

    def quantizing(n: int) -> Any:
        written = [array(dtype, n) for dtype in (b, b, f, b)]
        return t.boolean(array(f, n, True), i, f, f, i, array(f, 1), *written)

    def dequantizing(n: int) -> Any:
        return t.void(array(b, n, True), array(f, n, True), array(b, n, True), t.boolean, i, array(f, n))

    function, signature = {
        "quantize_last": (_quantize_last, quantizing(2)),
        "quantize_inner": (_quantize_inner, quantizing(3)),
        "dequantize_last": (_dequantize_last, dequantizing(2)),
        "dequantize_inner": (_dequantize_inner, dequantizing(3)),
        "pack": (_pack, t.void(array(t.uint16, 1, True), array(b, 1))),
        "unpack": (_unpack, t.void(array(b, 1, True), t.boolean, array(t.uint16, 1))),
    }[name]
    settings = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(signature, cache=True, **settings)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(signature, **settings)(function)


@functools.cache
def _helpers() -> None:
    """Lets kernels call these: plain functions, so that a kernel and all that it calls are one thing in the cache."""
    from numba.extending import register_jitable

    for helper in (_ordered, _scale, _search, _code, _pack):
        register_jitable(helper)
