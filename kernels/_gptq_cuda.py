"""`perwatt.kernels.gptq` on a GPU: torch holds the arrays, factorizes and multiplies; Numba's kernels do the columns of a block.

A thread does one row of weights, so that neighbouring threads read neighbouring addresses of arrays stored [columns, rows], and
what all rows share (the coefficients) is one address for all of them. Everything is a torch tensor on one device; "cpu" serves
Numba's simulator, whose kernels take NumPy arrays. Imported only where this is called, because Numba takes a while."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from perwatt.kernels._cuda_functions import larger, smaller
from perwatt.kernels._gptq_cpu import ASYMMETRIC, LEAST_SCALE, ONE, ROUND, SIGNED, TWO, ZERO

Tensor = Any
THREADS = 32
"""A warp a block: a layer has a few thousand rows, and each block gets a multiprocessor of its own while there are any left."""


@cuda.jit(device=True)  # type: ignore[untyped-decorator]
def search(
    values: Any, weight: Any, first: Any, last: Any, row: Any, scale: Any, low: Any, high: Any, factors: Any
) -> Any:
    best, factor = np.float32(np.inf), ONE
    for f in range(len(factors)):
        inverse = ONE / (scale * factors[f])
        error = ZERO
        for i in range(first, last):
            step = values[i, row] * inverse
            missed = step - ((smaller(larger(step, low), high) + ROUND) - ROUND)
            error += weight[i] * missed * missed
        error *= factors[f] * factors[f]
        if error < best:
            best = error
            factor = factors[f]
    return scale * factor


@cuda.jit(device=True)  # type: ignore[untyped-decorator]
def find_scale(
    values: Any,
    weight: Any,
    first: Any,
    last: Any,
    row: Any,
    half: Any,
    mode: Any,
    factors: Any,
    scales: Any,
    zeros: Any,
) -> None:
    least, most = ZERO, ZERO
    for i in range(first, last):
        least = smaller(least, values[i, row])
        most = larger(most, values[i, row])
    low = ZERO if mode == ASYMMETRIC else -half
    high = low + TWO * half - ONE
    if mode == ASYMMETRIC:
        scale = np.float32((np.float64(most) - np.float64(least)) / np.float64(high))
    elif mode == SIGNED:
        scale = (most if most > -least else least) / -half
    else:
        scale = larger(most / (half - ONE), -least / half)
    if abs(scale) < LEAST_SCALE:
        scale = ONE
    zero = smaller((-least / scale + ROUND) - ROUND, high) if mode == ASYMMETRIC else ZERO
    if len(factors) > 0:
        scale = search(values, weight, first, last, row, scale, low - zero, high - zero, factors)
    scales[row] = scale
    zeros[row] = zero


@cuda.jit  # type: ignore[untyped-decorator]
def find_scales(
    values: Any, weight: Any, group_size: Any, half: Any, mode: Any, factors: Any, scales: Any, zeros: Any
) -> None:
    row = cuda.grid(1)
    if row >= values.shape[1]:
        return
    for group in range(cuda.blockIdx.y, scales.shape[0], cuda.gridDim.y):
        first = group * group_size
        last = smaller(first + group_size, values.shape[0])
        find_scale(values, weight, first, last, row, half, mode, factors, scales[group], zeros[group])


@cuda.jit  # type: ignore[untyped-decorator]
def block(
    given: Any, columns: Any, weight: Any, coefficients: Any, shift: Any, missed: Any, ahead: Any, group_size: Any,
    static: Any, half: Any, mode: Any, factors: Any, scales: Any, zeros: Any, errors: Any, codes: Any,
) -> None:  # fmt: skip
    row = cuda.grid(1)
    if row >= given.shape[1]:
        return
    size = given.shape[0]
    low = ZERO if mode == ASYMMETRIC else -half
    high = low + TWO * half - ONE
    group = -1
    for i in range(size):
        if columns[i] // group_size != group:
            group = columns[i] // group_size
            if not static:
                last = smaller(size, i + group_size)
                for j in range(i, last):
                    moved = given[j, row] + shift[j, row]
                    for k in range(i):
                        moved -= coefficients[j, k] * missed[k, row]
                    ahead[j, row] = moved
                find_scale(ahead, weight, i, last, row, half, mode, factors, scales[group], zeros[group])
        scale, zero = scales[group, row], zeros[group, row]
        moved = given[i, row] + shift[i, row]
        for k in range(i):
            moved -= coefficients[i, k] * missed[k, row]
        step = (smaller(larger(moved * (ONE / scale), low - zero), high - zero) + ROUND) - ROUND
        missed[i, row] = moved - step * scale
        errors[i, row] = step * scale - given[i, row]
        codes[i, row] = np.int16(step + zero)


def factorize(hessian: Tensor, order: Tensor, ridge: Tensor, factor: float, single: bool) -> Tensor:
    """The upper half T with T·Tᵀ = H · `factor` with the diagonal `ridge`, columns and rows in `order`, which is the order
    of doing: U⁻¹ itself. None where that isn't positive definite. All on the device of `hessian`."""
    import torch

    for kind in (torch.float32, torch.float64) if single else (torch.float64,):
        chosen = (hessian.double() * factor).to(kind)
        chosen.diagonal().copy_(ridge)
        backwards = order.flip(0)
        lower, failed = torch.linalg.cholesky_ex(chosen[backwards][:, backwards])
        if not failed.item() and bool(torch.isfinite(lower.diagonal()).all()):
            return lower.float().flip(0, 1).contiguous()
    return None


def compute_columns(
    weights: Tensor, triangle: Tensor, order: Tensor, importance: Tensor, bits: int, size: int, static: bool, mode: int,
    factors: Tensor, blocks: list[tuple[int, int]],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes (int16, [out, in]), scales and zero points (float32, [out, groups]). `blocks`: ranges of `order`, in this order."""
    import torch

    rows, width = weights.shape
    half = np.float32(2.0 ** (bits - 1))
    given = torch.where(importance > 0, weights, 0).T.contiguous()
    scales, zeros = given.new_zeros((2, -(-width // size), rows))
    if not rows:  # a GPU refuses a grid without blocks, which the simulator takes
        return torch.empty((0, width), dtype=torch.int16), scales.T, zeros.T
    grid = -(-rows // THREADS)
    if static:
        find_scales[(grid, min(len(scales), 65535)), THREADS](
            *shared(given, importance), size, half, mode, *shared(factors, scales, zeros)
        )
    given, weight = given[order].contiguous(), importance[order]
    errors, codes = torch.empty_like(given), torch.empty_like(given, dtype=torch.int16)
    missed, ahead = given.new_empty((2, max(high - low for low, high in blocks), rows))
    for low, high in blocks:
        # U[B, B] is the inverse of U⁻¹[B, B]; a row of its transpose over its diagonal is what a column takes of the others.
        inner = triangle[low:high, low:high]
        within = torch.linalg.solve_triangular(inner, torch.eye(high - low, device=inner.device), upper=True).T
        shift = -(within @ (triangle[:low, low:high].T @ errors[:low]))
        coefficients = (within / within.diagonal()).contiguous()
        block[grid, THREADS](
            *shared(given[low:high], order[low:high], weight[low:high], coefficients, shift, missed, ahead), size, static,
            half, mode, *shared(factors, scales, zeros, errors[low:high], codes[low:high]),
        )  # fmt: skip
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.T, scales.T, zeros.T


def shared(*tensors: Tensor) -> tuple[Any, ...]:
    """The same memory, as Numba takes it."""
    return tuple(cuda.as_cuda_array(tensor) if tensor.is_cuda else tensor.numpy() for tensor in tensors)
