"""What Numba compiles for `perwatt.kernels.histogram` on a GPU."""

from __future__ import annotations

import functools
import math
from typing import Any

RUN_AT_LEAST = 32
"""Values side by side of one channel that fill a warp; with fewer, a warp reads several channels."""

THREADS = 256
"""Threads of a block on a GPU."""


@functools.cache
def compiled(bins: int) -> Any:
    # Global, because the simulator puts its own module in the place of a kernel's global `cuda`.
    global cuda
    from numba import cuda, float32, int32, int64

    from perwatt.kernels._cuda_functions import larger

    half = bins // 2

    def survey_runs(x: Any, outer: int, inner: int, largest: Any, lost: Any) -> None:
        """A block a channel and piece: its threads read values side by side, and their findings meet in shared memory."""
        found = cuda.shared.array(1, float32)
        left_out = cuda.shared.array(2, int32)
        channel, channels = cuda.blockIdx.x, largest.shape[0]
        if cuda.threadIdx.x == 0:
            found[0] = 0
            left_out[0] = 0
            left_out[1] = 0
        cuda.syncthreads()
        high, nan, infinite = float32(0), int32(0), int32(0)
        for i in range(cuda.blockIdx.y * THREADS + cuda.threadIdx.x, outer * inner, cuda.gridDim.y * THREADS):
            value = abs(x[(i // inner * channels + channel) * inner + i % inner])
            if math.isnan(value):
                nan += int32(1)
            elif math.isinf(value):
                infinite += int32(1)
            else:
                high = larger(high, value)
        cuda.atomic.max(found, 0, high)
        cuda.atomic.add(left_out, 0, nan)
        cuda.atomic.add(left_out, 1, infinite)
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            cuda.atomic.max(largest, channel, found[0])
            cuda.atomic.add(lost, (0, channel), int64(left_out[0]))
            cuda.atomic.add(lost, (1, channel), int64(left_out[1]))

    def survey_columns(x: Any, outer: int, inner: int, largest: Any, lost: Any) -> None:
        """A thread a column, neighbours beside each other: a warp reads 32 values side by side, row after row."""
        column, width = cuda.grid(1), largest.shape[0] * inner
        if column < width:
            high, nan, infinite = float32(0), int64(0), int64(0)
            for row in range(cuda.blockIdx.y, outer, cuda.gridDim.y):
                value = abs(x[row * width + column])
                if math.isnan(value):
                    nan += 1
                elif math.isinf(value):
                    infinite += 1
                else:
                    high = larger(high, value)
            channel = column // inner
            cuda.atomic.max(largest, channel, high)
            cuda.atomic.add(lost, (0, channel), nan)
            cuda.atomic.add(lost, (1, channel), infinite)

    def count_runs(x: Any, outer: int, inner: int, scales: Any, counts: Any) -> None:
        """A block's counts meet in shared memory, and only then in the channel's."""
        table = cuda.shared.array(bins, int32)
        channel, channels = cuda.blockIdx.x, counts.shape[0]
        for b in range(cuda.threadIdx.x, bins, THREADS):
            table[b] = 0
        cuda.syncthreads()
        for i in range(cuda.blockIdx.y * THREADS + cuda.threadIdx.x, outer * inner, cuda.gridDim.y * THREADS):
            value = x[(i // inner * channels + channel) * inner + i % inner]
            if math.isfinite(value):
                place = larger(int32(math.ceil(abs(value) * scales[channel])), 1)
                cuda.atomic.add(table, half - place if value < 0 else half - 1 + place, int32(1))
        cuda.syncthreads()
        for b in range(cuda.threadIdx.x, bins, THREADS):
            if table[b]:
                cuda.atomic.add(counts, (channel, b), int64(table[b]))

    def count_columns(x: Any, outer: int, inner: int, scales: Any, counts: Any) -> None:
        """Neighbouring threads count for neighbouring channels: they seldom meet in one counter."""
        column, width = cuda.grid(1), counts.shape[0] * inner
        if column < width:
            channel = column // inner
            for row in range(cuda.blockIdx.y, outer, cuda.gridDim.y):
                value = x[row * width + column]
                if math.isfinite(value):
                    place = larger(int32(math.ceil(abs(value) * scales[channel])), 1)
                    cuda.atomic.add(counts, (channel, half - place if value < 0 else half - 1 + place), int64(1))

    return tuple(cuda.jit(kernel) for kernel in (survey_runs, survey_columns, count_runs, count_columns))
