"""What Numba compiles for `perwatt.kernels.importance` on a GPU: columns, of which a thread adds up each, where few weights of a
unit follow each other; else runs, of which a block of threads does each. Pieces are added on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, float64

from perwatt.kernels._importance_cpu import NORMS, PRODUCTS

THREADS = 128


@cuda.jit(device=True)  # type: ignore[untyped-decorator]
def term(weight: Any, gradient: Any, kind: Any, factor: Any) -> Any:
    if kind == NORMS:
        return abs(float64(weight)) * factor
    value = float64(weight)
    if kind == PRODUCTS:
        value *= float64(gradient)
    return value * value


@cuda.jit  # type: ignore[untyped-decorator]
def columns(weights: Any, gradients: Any, kind: Any, outer: Any, inner: Any, parts: Any) -> None:
    """`parts` [pieces, units · inner]; neighbouring threads read neighbouring weights."""
    column, piece = cuda.grid(1), cuda.blockIdx.y
    width = parts.shape[1]
    if column >= width:
        return
    total, beside = 0.0, inner[column % len(inner)]
    for row in range(piece, len(outer), parts.shape[0]):
        at = row * width + column
        total += term(weights[at], gradients[at], kind, outer[row] * beside)
    parts[piece, column] = total


@cuda.jit  # type: ignore[untyped-decorator]
def runs(weights: Any, gradients: Any, kind: Any, outer: Any, inner: Any, parts: Any) -> None:
    """`parts` [pieces, units]; a block of threads adds a piece of a unit, and halves what they found in shared memory."""
    found = cuda.shared.array(THREADS, float64)
    unit, piece, thread = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    pieces, units = parts.shape
    length = len(inner)
    total = 0.0
    for i in range(piece * THREADS + thread, len(outer) * length, pieces * THREADS):
        row, place = i // length, i % length
        at = (row * units + unit) * length + place
        total += term(weights[at], gradients[at], kind, outer[row] * inner[place])
    found[thread] = total
    half = THREADS // 2
    while half:
        cuda.syncthreads()
        if thread < half:
            found[thread] += found[thread + half]
        half //= 2
    if thread == 0:
        parts[piece, unit] = found[0]


def checked(array: Any) -> Any:
    """An array that lies on the GPU. Raises ValueError for one that isn't contiguous float32."""
    there = cuda.as_cuda_array(array)
    if there.dtype != np.float32 or not there.is_c_contiguous():
        raise ValueError(f"{there.dtype} {there.shape} on the GPU; contiguous float32 is needed")
    return there


def run(kind: int, weights: Any, gradients: Any, shape: tuple[int, int, int], outer: Any, inner: Any) -> Any:
    """Sums of the units, float64 [units]: of `shape` [outer, units, inner], none of which is 0."""
    rows, units, length = shape
    there = cuda.to_device(weights)
    beside = there if gradients is weights else cuda.to_device(gradients)
    factors = cuda.to_device(outer), cuda.to_device(inner)
    if length < THREADS:
        width = units * length
        # Enough pieces to fill a GPU, of 64 rows or more.
        pieces = max(1, min(rows // 64, 2**19 // width, 65535))
        parts = cuda.device_array((pieces, width), np.float64)
        columns[(-(-width // THREADS), pieces), THREADS](there, beside, kind, *factors, parts)
    else:
        pieces = max(1, min(rows * length // (64 * THREADS), 2**12 // units, 65535))
        parts = cuda.device_array((pieces, units), np.float64)
        runs[(units, pieces), THREADS](there, beside, kind, *factors, parts)
    return parts.copy_to_host().reshape(pieces, units, -1).sum(axis=(0, 2))
