"""SparseGPT: a layer's weights with zeros, of which the weights that are left make up for those that went.

A layer gives X·Wᵀ with weights W, [out, in], for inputs X, [n, in]; weights V in their place change that by a squared error of
½·n·trace((W − V) H (W − V)ᵀ), H = 2·XᵀX/n. SparseGPT (Frantar and Alistarh: "SparseGPT: massive language models can be accurately
pruned in one-shot", ICML 2023, algorithm 1) goes through the columns as GPTQ does (`perwatt.kernels.gptq`, whose factorization
this shares): with H⁻¹ = UᵀU, U upper triangular, and w the column i as it has been moved,

    v = 0 where the weight goes, else w        e = (w − v) / U[i, i]        W[:, j] −= e·U[i, j], j > i

A weight costs (w / U[i, i])², and those that cost least go, of equal ones the first:

- unstructured (`ratio`): of each block of 128 columns, when its first column is reached, the nearest whole number to
  ratio × weights in the block, from whichever rows;
- N:M (`n`, `m`): of every m neighbours in a row all but n, when the first of them is reached.

`reference` says just that, in float64. `compute` carries D = W − V on, as `gptq.compute` does: with R = U⁻¹ the columns B of a
block are moved by all columns before it to W[:, B] + D[:, :b] @ (R[:b, B]·U[B, B]), by one matrix product in float32.

H is used with `damping` × the mean of its live diagonal added to its diagonal. An input that was always 0 (diagonal 0) is dead:
its weights become 0, whatever else is asked for, and cost nothing.

`compute` and `compute_cuda` agree with `reference` up to rounding: each choice is right for costs that differ from the exact
ones by about n·2⁻²⁴. Where that swaps two weights of nearly equal cost, later choices of their rows may differ as well, to an
equally good solution. Weights that are kept may happen to be 0.

Limits: as those of `gptq`: NaN, infinity and weights beyond ±1e30 are ValueErrors, and so is a Hessian that isn't positive
definite with its damping. 0 ≤ ratio < 1; 1 ≤ N < M ≤ 32, with M a divisor of the columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from perwatt.kernels import _sparse_gpt_cpu as cpu
from perwatt.kernels import gptq
from perwatt.kernels.gptq import Factor
from perwatt.kernels.n_of_m import LARGEST_M

Floats = npt.NDArray[np.float32]

BLOCK = 128


class Pattern(NamedTuple):
    """What goes: a share of each block (`ratio`), or all but `n` of every `m`; one of the two."""

    ratio: float | None = None
    n: int = 0
    m: int = 0


def reference(
    weights: npt.ArrayLike, hessian: npt.ArrayLike, pattern: Pattern, *, damping: float = 0.01
) -> npt.NDArray[np.float64]:
    """The weights that are left, moved, float64 [out, in], of `weights` [out, in] for inputs with `hessian` [in, in].

    Raises ValueError for shapes, numbers and settings that the module's limits exclude."""
    given = _checked(weights, pattern)
    whole, diagonal, damped = gptq._checked_hessian(hessian, damping, given.shape[1])
    if not np.isfinite(whole).all():
        raise ValueError(gptq._refusal(whole))
    dead = diagonal == 0
    moved = np.where(dead, 0.0, given.astype(np.float64))
    added = damped + np.where(dead, gptq._live_mean(diagonal), 0.0)
    try:
        inverse = np.linalg.inv(whole.astype(np.float64) + np.diag(added))
        upper = np.linalg.cholesky(inverse, upper=True)
    except np.linalg.LinAlgError:
        raise ValueError(gptq.INDEFINITE) from None
    goes = np.zeros(given.shape, bool)
    for i in range(len(upper)):
        if pattern.ratio is None and i % pattern.m == 0:
            group = slice(i, i + pattern.m)
            cost = np.abs(moved[:, group] / upper.diagonal()[group])
            order = np.argsort(-cost, axis=1, kind="stable")
            np.put_along_axis(goes[:, group], order[:, pattern.n :], True, axis=1)
        elif pattern.ratio is not None and i % BLOCK == 0:
            group = slice(i, i + BLOCK)
            cost = np.abs(moved[:, group] / upper.diagonal()[group])
            order = np.argsort(cost, axis=None, kind="stable")[: _count(pattern.ratio, cost.size)]
            chosen = np.zeros(cost.size, bool)
            chosen[order] = True
            goes[:, group] = chosen.reshape(cost.shape)
        error = np.where(goes[:, i], moved[:, i], 0.0) / upper[i, i]
        moved[:, i] = np.where(goes[:, i], 0.0, moved[:, i])
        moved[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
    return np.where(dead, 0.0, moved)


def compute(weights: npt.ArrayLike, hessian: npt.ArrayLike, pattern: Pattern, *, damping: float = 0.01) -> Floats:
    """What `reference` returns, up to rounding, float32 [out, in]: blocks of columns by Numba, products between them by BLAS."""
    given = _checked(weights, pattern)
    return compute_columns(given, gptq.factorize(hessian, damping=damping, width=given.shape[1]), pattern)


def compute_columns(weights: npt.ArrayLike, factor: Factor, pattern: Pattern) -> Floats:
    """The rest of `compute`, with what `gptq.factorize` returned for columns as they stand (not `ordered`)."""
    given = _checked(weights, pattern)
    rows, width = given.shape
    if len(factor.order) != width or factor.ordered:
        raise ValueError(f"{width} columns of weights, a factor of {len(factor.order)}, ordered: {factor.ordered}")
    result = np.empty_like(given)
    if not rows:
        return result
    tiles = -(-rows // cpu.TILE)
    # [tiles, columns, TILE]: what belongs to a tile of rows lies together; the columns as those of the factor, last to first.
    errors = np.empty((tiles, width, cpu.TILE), np.float32)
    shift = np.zeros((tiles, min(BLOCK, width), cpu.TILE), np.float32)
    goes = np.zeros(shift.shape if pattern.m == 0 else (tiles, 0, 0), np.uint8)
    dead = (factor.importance == 0).view(np.uint8)
    for first, last in _blocks(width, pattern):
        low, high, size = width - last, width - first, last - first
        coefficients, before = gptq._within(factor.triangle, low, high)
        price = np.ascontiguousarray(factor.triangle.diagonal()[low:high][::-1])
        if first:
            np.matmul(before, errors[:, high:], out=shift[:, :size])
        if pattern.ratio is not None:
            costs = np.empty((tiles, size, cpu.TILE), np.float32)
            cpu.compiled(cpu._costs)(given, first, dead, price, shift, costs)
            goes[:, :size] = _cheapest(costs, _count(pattern.ratio, rows * size))
        cpu.compiled(cpu._block)(
            given, first, dead, price, coefficients, shift, errors, pattern.n, pattern.m, goes, result
        )
    return result


def compute_cuda(weights: npt.ArrayLike, hessian: npt.ArrayLike, pattern: Pattern, *, damping: float = 0.01) -> Floats:
    """What `compute` returns, up to rounding, by a GPU with CUDA: needs torch, which factorizes and multiplies there."""
    import torch

    from perwatt.kernels import _gptq_cuda, _sparse_gpt_cuda

    given = _checked(weights, pattern)
    inputs = gptq._inputs(hessian, damping, False, given.shape[1])
    # Numba's simulator, which runs the kernels where there is no GPU, takes what lies in the host's memory.
    place = "cuda" if torch.cuda.is_available() else "cpu"
    order, ridge = (torch.from_numpy(part).to(place) for part in (inputs.order, inputs.ridge))
    single = damping >= gptq.EASY * len(order)
    triangle = _gptq_cuda.factorize(torch.tensor(inputs.hessian).to(place), order, ridge, 1 / inputs.mean, single)
    if triangle is None:
        raise ValueError(gptq._refusal(inputs.hessian))
    alive = torch.from_numpy(inputs.importance > 0).to(place)
    counted = None if pattern.ratio is None else lambda size: _count(pattern.ratio or 0.0, size)
    blocks = _blocks(given.shape[1], pattern)
    found = _sparse_gpt_cuda.compute_columns(
        torch.tensor(given).to(place), triangle, alive, pattern.n, pattern.m, counted, blocks
    )
    return np.ascontiguousarray(found.cpu().numpy())


def _count(ratio: float, size: int) -> int:
    """How many of `size` weights go."""
    return round(ratio * size)


def _cheapest(costs: Floats, count: int) -> npt.NDArray[np.bool_]:
    """Which weights [tiles, columns, TILE] go: those that cost least, of equal ones the first by row and column."""
    if not count:
        return np.zeros(costs.shape, np.bool_)
    limit = np.partition(costs, count - 1, axis=None)[count - 1]
    goes = np.asarray(costs <= limit)
    if spare := int(np.count_nonzero(goes)) - count:
        by_row = goes.transpose(0, 2, 1)
        equal = np.flatnonzero((costs == limit).transpose(0, 2, 1))
        by_row[np.unravel_index(equal[-spare:], by_row.shape)] = False
    return goes


def _blocks(width: int, pattern: Pattern) -> list[tuple[int, int]]:
    """Ranges of columns done between two matrix products: whole groups."""
    step = BLOCK if pattern.ratio is not None else BLOCK // pattern.m * pattern.m
    return [(first, min(first + step, width)) for first in range(0, width, step)]


def _checked(weights: npt.ArrayLike, pattern: Pattern) -> Floats:
    given = np.ascontiguousarray(weights, np.float32)
    if given.ndim != 2 or not given.shape[1]:
        raise ValueError(f"weights of shape {np.shape(weights)}; [out, in] is needed, with at least one column")
    if len(given) and not max(-given.min(), given.max()) <= gptq.LARGEST:
        raise ValueError(f"weights hold NaN, infinity, or something beyond ±{gptq.LARGEST:g}")
    ratio, n, m = pattern
    if (ratio is None) == (n == m == 0):
        raise ValueError("either a ratio or N and M are needed")
    if ratio is not None and (n or m or not 0 <= ratio < 1):
        raise ValueError(f"a ratio of {ratio} with {n}:{m}; at least 0 and below 1 is needed, without N and M")
    if ratio is None and not 1 <= n < m <= LARGEST_M:
        raise ValueError(f"{n} of every {m}: 1 ≤ N < M ≤ {LARGEST_M} is needed")
    if ratio is None and given.shape[1] % m:
        raise ValueError(f"{given.shape[1]} columns are no multiple of {m}")
    return given
