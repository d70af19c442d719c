"""`clip_search` on a GPU, by Numba CUDA: what it calculates stands there.

A block is one warp: it makes a row's tables, or tries one candidate of a row, its threads looking up neighbouring bins. Only
one or two numbers a candidate go back to the host, which picks the best."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

cuda: Any
"""Global once `_kernels` has imported it: the simulator puts its own module in the place of a kernel's global `cuda`."""

LANES = 32
"""Threads of a block. The kernels' shared arrays have as many places, and their sums this many lanes."""


def is_on_device(counts: Any) -> bool:
    """Whether it has a CUDA array interface."""
    return hasattr(counts, "__cuda_array_interface__")


def on_device(counts: Any) -> Any:
    """A device array of what lies on the device already, or of a copy."""
    from numba import cuda

    return cuda.as_cuda_array(counts) if is_on_device(counts) else cuda.to_device(counts)


def totals(device: Any) -> Floats:
    """How many values each row has."""
    return np.asarray(_moments(device, np.zeros(device.shape[0]))[0])


def _moments(device: Any, origins: Floats) -> Floats:
    """Each row's number of values and Σ x², x from its origin in bins."""
    from numba import cuda

    rows = device.shape[0]
    found = cuda.device_array((2, rows))
    if rows:
        _kernels()["moments"][rows, LANES](device, cuda.to_device(origins), found)
    return np.asarray(found.copy_to_host())


def search(device: Any, reaches: Floats, steps: Floats, levels: int, fixed: int) -> Floats:
    """Each row's best step, levels below zero, gain and Σ x²; `fixed` is −1 where levels below zero are searched."""
    from numba import cuda

    rows, bins = device.shape
    if rows == 0:
        return np.zeros((4, 0))
    tables = cuda.device_array((3, rows, 2, bins + 1))
    _kernels()["tables"][(rows, 2), LANES](device, tables)
    gains, belows = cuda.device_array(steps.shape), cuda.device_array(steps.shape, np.int64)
    _kernels()["search"][steps.size, LANES](
        tables, cuda.to_device(reaches), cuda.to_device(steps), levels, fixed, gains, belows
    )
    gained = gains.copy_to_host()
    best = (np.arange(rows), gained.argmax(axis=1))
    return np.stack([steps[best], belows.copy_to_host()[best], gained[best], _moments(device, reaches[0])[1]])


def divergences(device: Any, zeros: npt.NDArray[np.int64], parts: int, missing: float) -> Floats:
    """Each row's best number of bins, and its divergence."""
    from numba import cuda

    rows, bins = device.shape
    if rows == 0:
        return np.zeros((2, 0))
    sizes = np.maximum(zeros, bins - zeros)
    firsts = np.minimum(parts, sizes)
    most, trials = int(sizes.max()), int((sizes - firsts).max()) + 1
    whole, logs = cuda.device_array((2, rows, most + 1), np.int64), cuda.device_array((rows, most + 1))
    _kernels()["sums"][rows, LANES](device, cuda.to_device(zeros), whole, logs)
    found = cuda.device_array((rows, trials))
    _kernels()["divergences"][rows * trials, LANES](
        whole, logs, cuda.to_device(sizes), cuda.to_device(firsts), parts, math.log(missing), found
    )
    divergence = found.copy_to_host()
    return np.stack([firsts + divergence.argmin(axis=1), divergence.min(axis=1)])


@functools.cache
def _kernels() -> dict[str, Any]:
    global cuda
    from numba import cuda, float64, int64

    from perwatt.kernels._cuda_functions import larger, smaller

    @cuda.jit(device=True)  # type: ignore[untyped-decorator]
    def beyond(tables: Any, row: int, side: int, reach: float, threshold: float) -> Any:
        place = larger(reach - threshold, 0.0)
        edge = int(smaller(place, float(tables.shape[3] - 1)))
        rest = place - edge
        return tables[0, row, side, edge] + rest * (tables[1, row, side, edge] + rest * tables[2, row, side, edge])

    @cuda.jit(device=True)  # type: ignore[untyped-decorator]
    def lane_sum(lanes: Any, lane: int) -> Any:
        size = 16
        while size > 0:
            cuda.syncthreads()
            if lane < size:
                lanes[lane] += lanes[lane + size]
            size //= 2
        cuda.syncthreads()
        return lanes[0]

    @cuda.jit  # type: ignore[untyped-decorator]
    def tables(counts: Any, found: Any) -> None:
        row, side, thread = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
        before = cuda.shared.array(32, int64)
        twice_before = cuda.shared.array(32, int64)
        bins = counts.shape[1]
        each = (bins + 31) // 32
        start, stop = smaller(thread * each, bins), smaller((thread + 1) * each, bins)
        passed = twice = 0
        for edge in range(start, stop):
            count = counts[row, edge if side == 0 else bins - 1 - edge]
            twice += 2 * passed + count
            passed += count
        before[thread], twice_before[thread] = passed, twice
        cuda.syncthreads()
        if thread == 0:
            passed = twice = 0
            for other in range(32):
                its, its_twice = before[other], twice_before[other]
                before[other], twice_before[other] = passed, twice
                width = smaller((other + 1) * each, bins) - smaller(other * each, bins)
                twice += its_twice + 2 * passed * width
                passed += its
        cuda.syncthreads()
        passed, twice = before[thread], twice_before[thread]
        for edge in range(start, stop):
            count = counts[row, edge if side == 0 else bins - 1 - edge]
            found[0, row, side, edge], found[1, row, side, edge] = 0.5 * twice, passed
            found[2, row, side, edge] = 0.5 * count
            twice += 2 * passed + count
            passed += count
        if thread == 31:
            found[0, row, side, bins], found[1, row, side, bins], found[2, row, side, bins] = 0.5 * twice, passed, 0.0

    @cuda.jit  # type: ignore[untyped-decorator]
    def moments(counts: Any, origin: Any, found: Any) -> None:
        row, lane = cuda.blockIdx.x, cuda.threadIdx.x
        number = cuda.shared.array(32, float64)
        squares = cuda.shared.array(32, float64)
        total = square = 0.0
        for place in range(lane, counts.shape[1], 32):
            distance = place + 0.5 - origin[row]
            total += counts[row, place]
            square += counts[row, place] * (distance * distance + 1 / 12)
        number[lane], squares[lane] = total, square
        total, square = lane_sum(number, lane), lane_sum(squares, lane)
        if lane == 0:
            found[0, row], found[1, row] = total, square

    @cuda.jit  # type: ignore[untyped-decorator]
    def search(tables: Any, reaches: Any, steps: Any, levels: int, fixed: int, gains: Any, belows: Any) -> None:
        # One dimension of blocks for rows and candidates: the others end at 65,535.
        row, m, lane = cuda.blockIdx.x // steps.shape[1], cuda.blockIdx.x % steps.shape[1], cuda.threadIdx.x
        lanes = cuda.shared.array(32, float64)
        step, negative, positive = steps[row, m], reaches[0, row], reaches[1, row]
        z, stop = fixed, fixed
        if fixed < 0:
            z, stop = 0, levels - 1
        while z < stop:
            middle = (z + stop) // 2
            displaced = beyond(tables, row, 1, positive, (levels - 2 - middle + 0.5) * step)
            if beyond(tables, row, 0, negative, (middle + 0.5) * step) > displaced:
                z = middle + 1
            else:
                stop = middle
        saved = 0.0
        for k in range(lane, z, 32):
            saved += beyond(tables, row, 0, negative, (k + 0.5) * step)
        for k in range(lane, levels - 1 - z, 32):
            saved += beyond(tables, row, 1, positive, (k + 0.5) * step)
        lanes[lane] = saved
        saved = lane_sum(lanes, lane)
        if lane == 0:
            gains[row, m], belows[row, m] = 2.0 * step * saved, z

    @cuda.jit  # type: ignore[untyped-decorator]
    def sums(counts: Any, zeros: Any, whole: Any, logs: Any) -> None:
        row, thread = cuda.blockIdx.x, cuda.threadIdx.x
        values = cuda.shared.array(32, int64)
        occupied = cuda.shared.array(32, int64)
        entropic = cuda.shared.array(32, float64)
        bins, zero, size = counts.shape[1], zeros[row], logs.shape[1] - 1
        each = (size + 31) // 32
        start, stop = smaller(thread * each, size), smaller((thread + 1) * each, size)
        # First each thread's own sums, then with those of all threads before it.
        for turn in range(2):
            passed = filled = 0
            log = 0.0
            if turn == 1:
                for other in range(thread):
                    passed += values[other]
                    filled += occupied[other]
                    log += entropic[other]
            for place in range(start, stop):
                if turn == 1:
                    whole[0, row, place], whole[1, row, place], logs[row, place] = passed, filled, log
                count = 0
                if zero + place < bins:
                    count += counts[row, zero + place]
                if zero - 1 - place >= 0:
                    count += counts[row, zero - 1 - place]
                if count > 0:
                    passed += count
                    filled += 1
                    log += count * math.log(float(count))
            if turn == 0:
                values[thread], occupied[thread], entropic[thread] = passed, filled, log
                cuda.syncthreads()
            elif thread == 31:
                whole[0, row, size], whole[1, row, size], logs[row, size] = passed, filled, log

    @cuda.jit  # type: ignore[untyped-decorator]
    def divergences(whole: Any, logs: Any, sizes: Any, firsts: Any, parts: int, missing: float, found: Any) -> None:
        row, trial, lane = cuda.blockIdx.x // found.shape[1], cuda.blockIdx.x % found.shape[1], cuda.threadIdx.x
        lanes = cuda.shared.array(32, float64)
        # Rows with fewer trials repeat their last one, which comes first and so changes nothing.
        bins = smaller(firsts[row] + trial, sizes[row])
        total, within = whole[0, row, logs.shape[1] - 1], whole[0, row, bins]
        last = within - whole[0, row, bins - 1]
        merged = 0.0
        for part in range(lane, parts, 32):
            start, stop = (part * bins + parts - 1) // parts, ((part + 1) * bins + parts - 1) // parts
            mass = whole[0, row, stop] - whole[0, row, start]
            occupied = whole[1, row, stop] - whole[1, row, start]
            weight = mass
            if part == parts - 1 and within < total:
                weight += total - within
                occupied += 1 if last == 0 else 0
            if mass > 0:
                merged += weight * math.log(mass / occupied)
            else:
                merged += weight * missing
        lanes[lane] = merged
        merged = lane_sum(lanes, lane)
        if lane == 0:
            found[row, trial] = math.inf
            if within > 0:
                last += total - within
                own = logs[row, bins - 1] + (last * math.log(float(last)) if last > 0 else 0.0)
                scale = math.log(float(within)) - math.log(float(total))
                found[row, trial] = (own - merged) / total + scale

    return {
        "tables": tables, "moments": moments, "search": search, "sums": sums, "divergences": divergences,
    }  # fmt: skip
