"""What Numba compiles for `perwatt.kernels.channel_statistics` on a GPU, and how the work is split there."""

from __future__ import annotations

import functools
import math
from typing import Any

THREADS = 128
"""Threads of a block on a GPU."""


def split(outer: int, channels: int, inner: int) -> tuple[int, int]:
    """How many results stand side by side, and in how many pieces each is made: enough to fill a GPU, 64 values or more."""
    if inner < THREADS:
        beside = channels * inner
        return beside, max(1, min(outer // 64, 2**19 // beside, 65535))
    return channels, max(1, min(outer * inner // (64 * THREADS), 2**12 // channels, 65535))


@functools.cache
def compiled() -> Any:
    # Global, because the simulator puts its own module in the place of a kernel's global `cuda`.
    global cuda
    from numba import cuda, float64, int64

    from perwatt.kernels._cuda_functions import larger, smaller

    def columns(x: Any, outer: int, parts: Any, lost: Any) -> None:
        """A thread a column, neighbours beside each other: a warp reads 32 values side by side, row after row."""
        column = cuda.grid(1)
        piece = cuda.blockIdx.y
        width = parts.shape[2]
        if column < width:
            low, high, total, squares = math.inf, -math.inf, 0.0, 0.0
            nan = infinite = 0
            for row in range(piece, outer, cuda.gridDim.y):
                value = float64(x[row * width + column])
                if math.isnan(value):
                    nan += 1
                elif math.isinf(value):
                    infinite += 1
                else:
                    low = smaller(low, value)
                    high = larger(high, value)
                    total += value
                    squares += value * value
            parts[0, piece, column] = low
            parts[1, piece, column] = high
            parts[2, piece, column] = total
            parts[3, piece, column] = squares
            lost[0, piece, column] = nan
            lost[1, piece, column] = infinite

    def runs(x: Any, outer: int, inner: int, parts: Any, lost: Any) -> None:
        """A block a channel and piece: its threads read values side by side, then halve what they found in shared memory."""
        found = cuda.shared.array((4, THREADS), float64)
        left_out = cuda.shared.array((2, THREADS), int64)
        channel, piece, thread = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
        channels = parts.shape[2]
        low, high, total, squares = math.inf, -math.inf, 0.0, 0.0
        nan = infinite = 0
        for i in range(piece * THREADS + thread, outer * inner, cuda.gridDim.y * THREADS):
            value = float64(x[(i // inner * channels + channel) * inner + i % inner])
            if math.isnan(value):
                nan += 1
            elif math.isinf(value):
                infinite += 1
            else:
                low = smaller(low, value)
                high = larger(high, value)
                total += value
                squares += value * value
        found[0, thread], found[1, thread], found[2, thread], found[3, thread] = low, high, total, squares
        left_out[0, thread], left_out[1, thread] = nan, infinite
        half = THREADS // 2
        while half:
            cuda.syncthreads()
            if thread < half:
                found[0, thread] = smaller(found[0, thread], found[0, thread + half])
                found[1, thread] = larger(found[1, thread], found[1, thread + half])
                found[2, thread] += found[2, thread + half]
                found[3, thread] += found[3, thread + half]
                left_out[0, thread] += left_out[0, thread + half]
                left_out[1, thread] += left_out[1, thread + half]
            half //= 2
        if thread == 0:
            for row in range(4):
                parts[row, piece, channel] = found[row, 0]
            lost[0, piece, channel] = left_out[0, 0]
            lost[1, piece, channel] = left_out[1, 0]

    return tuple(cuda.jit(kernel) for kernel in (columns, runs))
