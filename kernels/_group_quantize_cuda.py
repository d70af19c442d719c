"""What Numba compiles of `group_quantize` for a GPU: one thread a group, so that errors are added in the reference's order.

Where groups lie along the last axis, neighbouring threads' weights are a group apart: a block of 32 threads then reads and
writes 32 groups through shared memory, 32 neighbouring values at a time. Otherwise neighbouring threads' weights are neighbours.
No product is added to anything but squares that are exact in float64: a fused multiply-add rounds as the reference does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, float32, float64, int64

from perwatt.kernels._cuda_functions import larger, smaller
from perwatt.kernels._group_quantize_cpu import ASYMMETRIC, LEAST_SCALE, SIGNED

WIDTH = 32
"""Threads of a block that quantizes, and values of each thread's group that are in shared memory at a time."""

TILE = (WIDTH, WIDTH + 1)
"""Their room in shared memory: rows of 33, so that the threads of a warp use different banks."""

THREADS, EACH = 256, 4
"""Threads of a block of the other kernels, and columns for each of them where they have rows and columns."""

ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)


def _device(function: Callable[..., Any]) -> Any:
    return cuda.jit(device=True)(function)


def _kernel(function: Callable[..., Any]) -> Any:
    return cuda.jit(function)


@_device
def _load(weights: Any, tile: Any, starts: Any, lengths: Any, first: Any, stride: Any) -> None:
    x = cuda.threadIdx.x
    if stride == 1:
        for group in range(WIDTH):
            if first + x < lengths[group]:
                tile[group, x] = weights[starts[group] + first + x]
    else:
        for i in range(smaller(WIDTH, lengths[x] - first)):
            tile[x, i] = weights[starts[x] + (first + i) * stride]
    cuda.syncthreads()


@_device
def _store(codes: Any, tile: Any, starts: Any, lengths: Any, first: Any, stride: Any) -> None:
    cuda.syncthreads()
    x = cuda.threadIdx.x
    if stride == 1:
        for group in range(WIDTH):
            if first + x < lengths[group]:
                codes[starts[group] + first + x] = int(tile[group, x])
    else:
        for i in range(smaller(WIDTH, lengths[x] - first)):
            codes[starts[x] + (first + i) * stride] = int(tile[x, i])
    cuda.syncthreads()


@_device
def _rounded(step: Any, low: Any, high: Any, zero: Any) -> Any:
    """Clipped, then rounded half to even: the same as the other way round, because the bounds are integers."""
    return np.float32(round(smaller(larger(step, low - zero), high - zero)))


@_kernel
def _quantize(
    weights: Any,
    outer: Any,
    length: Any,
    stride: Any,
    group: Any,
    low: Any,
    high: Any,
    mode: Any,
    factors: Any,
    tried: Any,
    codes: Any,
    scales: Any,
    zeros: Any,
    infinite: Any,
) -> None:
    tile = cuda.shared.array(TILE, float32)
    starts = cuda.shared.array(WIDTH, int64)
    lengths = cuda.shared.array(WIDTH, int64)
    errors = cuda.local.array(16, float64)
    x = cuda.threadIdx.x
    groups = (length + group - 1) // group
    if stride == 1:
        at = cuda.blockIdx.x * WIDTH + x
        before, g, column = at // groups, at % groups, 0
        inside = before < outer
    else:
        across = (stride + WIDTH - 1) // WIDTH
        row = cuda.blockIdx.x // across
        column = cuda.blockIdx.x % across * WIDTH + x
        before, g = row // groups, row % groups
        at = row * stride + column
        inside = column < stride
    starts[x] = (before * length + g * group) * stride + column
    lengths[x] = smaller(group, length - g * group) if inside else 0
    cuda.syncthreads()
    longest = smaller(group, length)

    smallest, largest = np.float32(math.inf), np.float32(-math.inf)
    finite = inside
    for first in range(0, longest, WIDTH):
        _load(weights, tile, starts, lengths, first, stride)
        for i in range(smaller(WIDTH, lengths[x] - first)):
            value = tile[x, i]
            finite = finite and not (math.isnan(value) or math.isinf(value))
            smallest, largest = smaller(smallest, value), larger(largest, value)
        cuda.syncthreads()
    if inside and not finite:
        cuda.atomic.max(infinite, 0, 1)
        lengths[x] = 0
    cuda.syncthreads()

    scale, zero = ONE, ZERO
    if finite:
        half = (high - low + ONE) / TWO
        zero = low + half
        if mode == ASYMMETRIC:
            smallest, largest = smaller(smallest, ZERO), larger(largest, ZERO)
            scale = np.float32((np.float64(largest) - np.float64(smallest)) / np.float64(high - low))
        elif mode == SIGNED:
            scale = (largest if largest > -smallest else smallest) / -half
        else:
            scale = larger(largest / (half - ONE), smallest / -half)
        if abs(scale) < LEAST_SCALE:
            scale = ONE
        if mode == ASYMMETRIC:
            zero = _rounded(-smallest / scale, ZERO, high - low, ZERO) + low

    if tried > 0:
        for k in range(tried):
            errors[k] = 0.0
        for first in range(0, longest, WIDTH):
            _load(weights, tile, starts, lengths, first, stride)
            for i in range(smaller(WIDTH, lengths[x] - first)):
                step = tile[x, i] / scale
                for k in range(tried):
                    shrunk = step / factors[k]
                    missed = np.float64(shrunk - _rounded(shrunk, low, high, zero))
                    errors[k] += missed * missed
            cuda.syncthreads()
        least, chosen = np.float64(math.inf), ONE
        for k in range(tried):
            error = errors[k] * (np.float64(factors[k]) * np.float64(factors[k]))
            if error < least:
                least, chosen = error, factors[k]
        scale = scale * chosen

    if inside:
        scales[at] = scale
        zeros[at] = int(zero)
    for first in range(0, longest, WIDTH):
        _load(weights, tile, starts, lengths, first, stride)
        for i in range(smaller(WIDTH, lengths[x] - first)):
            tile[x, i] = _rounded(tile[x, i] / scale, low, high, zero) + zero
        _store(codes, tile, starts, lengths, first, stride)


@_kernel
def _dequantize(
    codes: Any, scales: Any, zeros: Any, shifted: Any, length: Any, stride: Any, group: Any, found: Any
) -> None:
    """A block has part of a row: of the last axis, or where groups lie along it, of that."""
    width = length if stride == 1 else stride
    groups = (length + group - 1) // group
    # One dimension of blocks for both: the others end at 65,535.
    parts = (width + THREADS * EACH - 1) // (THREADS * EACH)
    row, first = cuda.blockIdx.x // parts, cuda.blockIdx.x % parts * EACH
    before = row if stride == 1 else row // length
    g = 0 if stride == 1 else row % length // group
    for part in range(first, first + EACH):
        column = part * THREADS + cuda.threadIdx.x
        if column < width:
            at = before * groups + column // group if stride == 1 else (before * groups + g) * stride + column
            zero = int(zeros[at]) if shifted else 0
            found[row * width + column] = np.float32(int(codes[row * width + column]) - zero) * scales[at]


@_kernel
def _pack(codes: Any, packed: Any) -> None:
    i = cuda.grid(1)
    if i < len(packed):
        high = int(codes[2 * i + 1]) & 0xF if 2 * i + 1 < len(codes) else 0
        packed[i] = int(codes[2 * i]) & 0xF | high << 4


@_kernel
def _unpack(packed: Any, signed: Any, codes: Any) -> None:
    i = cuda.grid(1)
    if i < len(codes):
        code = int(packed[i // 2]) >> 4 * (i % 2) & 0xF
        codes[i] = code - 16 if signed and code > 7 else code


def quantize(
    weights: Any, blocks: tuple[int, int, int], group: int, bounds: tuple[int, int], mode: int, factors: Any, dtype: Any
) -> tuple[Any, Any, Any, bool]:
    """Codes, scales and zero points on the GPU, of one axis each, and whether the weights were finite.

    `weights`: one axis, on the GPU; `blocks`: what lies before the axis of the groups, its length, and what lies behind it."""
    outer, length, stride = blocks
    groups = -(-length // group)
    codes = cuda.device_array(len(weights), dtype)
    scales = cuda.device_array(outer * groups * stride, np.float32)
    zeros = cuda.device_array(outer * groups * stride, dtype)
    infinite = cuda.to_device(np.zeros(1, np.int32))
    count = -(-outer * groups // WIDTH) if stride == 1 else outer * groups * -(-stride // WIDTH)
    low, high = (np.float32(bound) for bound in bounds)
    tried = cuda.to_device(np.append(factors, ONE))  # never empty, which not every version of Numba takes
    _quantize[count, WIDTH](
        weights, outer, length, stride, group, low, high, mode, tried, len(factors), codes, scales, zeros, infinite
    )
    return codes, scales, zeros, not infinite.copy_to_host()[0]


def dequantize(codes: Any, scales: Any, zeros: Any, blocks: tuple[int, int, int], group: int) -> Any:
    """Weights on the GPU, from arrays of one axis on the GPU; zero points may be None."""
    outer, length, stride = blocks
    found = cuda.device_array(len(codes), np.float32)
    rows, width = (outer, length) if stride == 1 else (outer * length, stride)
    _dequantize[rows * -(-width // (THREADS * EACH)), THREADS](
        codes, scales, codes if zeros is None else zeros, zeros is not None, length, stride, group, found
    )
    return found


def pack(codes: Any) -> Any:
    """Packed codes on the GPU, from codes of one axis on the GPU."""
    packed = cuda.device_array(-(-len(codes) // 2), np.uint8)
    _pack[-(-len(packed) // THREADS), THREADS](codes, packed)
    return packed


def unpack(packed: Any, count: int, dtype: Any) -> Any:
    """`count` codes on the GPU, from packed ones on the GPU."""
    codes = cuda.device_array(count, dtype)
    _unpack[-(-count // THREADS), THREADS](packed, dtype == np.int8, codes)
    return codes
