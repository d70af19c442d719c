"""What Numba compiles for `clip_search` on the CPU; what it calculates stands there. Sums keep the reference's order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np


@functools.cache
def compiled(function: Callable[..., None]) -> Any:
    import numba

    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(nogil=True)(function)


def search(counts: Any, reaches: Any, steps: Any, levels: int, fixed: int, found: Any) -> None:
    """What Numba compiles for `compute_mse`. `fixed`: levels below zero, −1 where they are searched."""
    bins = counts.shape[1]
    distances, number, half = np.empty((2, bins + 1)), np.empty((2, bins + 1)), np.zeros((2, bins + 1))
    terms = np.zeros((max(levels, bins) // 32 + 1) * 32)
    lanes = np.zeros(32)

    def beyond(side: int, reach: float, threshold: float) -> Any:
        place = max(reach - threshold, 0.0)
        edge = np.uint32(min(place, float(bins)))
        rest = place - edge
        return distances[side, edge] + rest * (number[side, edge] + rest * half[side, edge])

    def lane_sum(count: int) -> Any:
        whole = (count + 31) // 32 * 32
        terms[count:whole] = 0.0
        lanes[:] = 0.0
        for k in range(0, whole, 32):
            for lane in range(32):
                lanes[lane] += terms[k + lane]
        size = 16
        while size > 0:
            for lane in range(size):
                lanes[lane] += lanes[lane + size]
            size //= 2
        return lanes[0]

    for row in range(len(counts)):
        for side in range(2):
            passed = twice = 0
            for edge in range(bins):
                count = counts[row, edge] if side == 0 else counts[row, bins - 1 - edge]
                distances[side, edge], number[side, edge], half[side, edge] = 0.5 * twice, passed, 0.5 * count
                twice += 2 * passed + count
                passed += count
            distances[side, bins], number[side, bins] = 0.5 * twice, passed
        for edge in range(bins):
            distance = edge + 0.5 - reaches[0, row]
            terms[edge] = counts[row, edge] * (distance * distance + 1 / 12)
        moment = lane_sum(bins)
        best = -1.0
        for m in range(steps.shape[1]):
            step = steps[row, m]
            z = fixed
            if fixed < 0:
                # How many terms below zero are larger than those that they displace: terms fall on both sides.
                z, stop = 0, levels - 1
                while z < stop:
                    middle = (z + stop) // 2
                    displaced = beyond(1, reaches[1, row], (levels - 2 - middle + 0.5) * step)
                    if beyond(0, reaches[0, row], (middle + 0.5) * step) > displaced:
                        z = middle + 1
                    else:
                        stop = middle
            # What is cut off costs at least (Σ |x| − c)² / (how many), by Cauchy and Schwarz; where this alone is more than
            # the best candidate's whole error, by more than rounding could be to blame for, the rest needn't be known.
            cut = 0.0
            for side in range(2):
                end = (z if side == 0 else levels - 1 - z) * step
                excess = beyond(side, reaches[side, row], end)
                if excess > 0:
                    last = np.uint32(min(reaches[side, row] - end, bins - 1.0))
                    cut += excess * excess / number[side, last + 1]
            if cut > moment - best + 1e-9 * moment:
                continue
            gain = 0.0
            for side in range(2):
                limit = z if side == 0 else levels - 1 - z
                reach = reaches[side, row]
                # Thresholds beyond the histogram's end save nothing; one more, for rounding.
                count = 0 if step <= 0 else int(min(max(reach / step + 1.5, 0.0), float(limit)))
                table0, table1, table2 = distances[side], number[side], half[side]
                for k in range(count):
                    place = max(reach - (k + 0.5) * step, 0.0)
                    start = np.uint32(min(place, float(bins)))
                    rest = place - start
                    terms[k] = table0[start] + rest * (table1[start] + rest * table2[start])
                gain += lane_sum(count)
            gain *= 2.0 * step
            if gain > best:
                best = gain
                found[0, row], found[1, row] = step, z
        found[2, row], found[3, row] = best, moment


def merge(values: Any, occupied: Any, parts: int, mass: Any, mean: Any) -> None:
    """What Numba compiles for `_of_lengths`: parts' values and their mean over bins that aren't empty."""
    bins = len(values) - 1
    for length in range(1, len(mass)):
        # Parts of this length occur in candidates of fewer than (length + 1) · parts bins.
        for first in range(min(bins, (length + 1) * parts) - length + 1):
            its = values[first + length] - values[first]
            if its > 0:
                mass[length, first] = its
                mean[length, first] = its / (occupied[first + length] - occupied[first])


def gather(table: Any, last: Any, parts: int, trials: Any, merged: Any) -> None:
    """What Numba compiles for `compute_entropy`."""
    flat, stride = table.ravel(), table.shape[1]
    terms = np.zeros((parts + 31) // 32 * 32)
    edges = np.zeros(parts + 1, np.uint32)
    lanes = np.zeros(32)
    inverse = 1.0 / parts
    for trial in range(len(trials)):
        bins = float(trials[trial])
        for k in range(parts):
            # ⌈k · bins / parts⌉: half a part's distance from any whole number, rounding can't change it.
            edges[k] = np.uint32((k * bins + (parts - 0.5)) * inverse)
        for k in range(parts - 1):
            terms[k] = flat[(edges[k + 1] - edges[k]) * stride + edges[k]]
        terms[parts - 1] = last[trial]
        lanes[:] = 0.0
        for k in range(0, len(terms), 32):
            for lane in range(32):
                lanes[lane] += terms[k + lane]
        size = 16
        while size > 0:
            for lane in range(size):
                lanes[lane] += lanes[lane + size]
            size //= 2
        merged[trial] = lanes[0]
