"""What Numba compiles for `perwatt.kernels.n_of_m` on a GPU: a thread does one element, and reads its group to rank it.
Neighbouring threads write neighbouring addresses, and the group is in the nearest cache after the first of them read it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

THREADS = 256


@cuda.jit(device=True)  # type: ignore[untyped-decorator]
def beaten_by(scores: Any, at: Any, m: Any, lost: Any) -> Any:
    """How many of its group beat the element; notes NaN."""
    first = at // m * m
    own = scores[at]
    if own != own:
        lost[0] = 1
    rank = 0
    for other in range(first, at):
        if scores[other] >= own:
            rank += 1
    for other in range(at + 1, first + m):
        if scores[other] > own:
            rank += 1
    return rank


@cuda.jit  # type: ignore[untyped-decorator]
def mask(scores: Any, n: Any, m: Any, kept: Any, lost: Any) -> None:
    at = cuda.grid(1)
    if at < len(kept):
        kept[at] = 1 if beaten_by(scores, at, m, lost) < n else 0


@cuda.jit  # type: ignore[untyped-decorator]
def prune(weights: Any, scores: Any, n: Any, m: Any, found: Any, lost: Any) -> None:
    at = cuda.grid(1)
    if at < len(found):
        found[at] = weights[at] if beaten_by(scores, at, m, lost) < n else np.float32(0)


def flat_on_device(array: Any) -> Any:
    """The array on the GPU, as one axis. Raises ValueError for one there that isn't contiguous float32."""
    if not hasattr(array, "__cuda_array_interface__"):
        return cuda.to_device(np.ascontiguousarray(array).reshape(-1))
    there = cuda.as_cuda_array(array)
    if there.dtype != np.float32 or not there.is_c_contiguous():
        raise ValueError(f"{there.dtype} {there.shape} on the GPU; contiguous float32 is needed")
    return there.reshape(-1)


def run(weights: Any, scores: Any, n: int, m: int) -> Any:
    """The mask (uint8), or with `weights` these with zeros (float32), flat, on the GPU; None where scores are NaN."""
    given = flat_on_device(scores)
    count = given.shape[0]
    found = cuda.device_array(count, np.uint8 if weights is None else np.float32)
    lost = cuda.to_device(np.zeros(1, np.int32))
    if count:
        grid = -(-count // THREADS)
        if weights is None:
            mask[grid, THREADS](given, n, m, found, lost)
        else:
            prune[grid, THREADS](flat_on_device(weights), given, n, m, found, lost)
    return None if lost.copy_to_host()[0] else found
