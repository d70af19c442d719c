"""SparseGPT, half of the weights and 2:4, on the layers that GPTQ's cases have, whole and the columns alone.

The others: the algorithm as it is usually written in torch and in NumPy (the inverse Hessian's factor by two factorizations and
an inversion; blocks of 128 columns, rank-one updates within, a sort of a block's costs or the least of each group), in float32,
with the working copy transposed so that a column is contiguous. What counts as the same is the squared error over the layer's
outputs, within 2 %, and as many zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from _kernel_case import Case, Run
from _kernels_gptq import DAMPING, SIZES, factor_in_numpy, factor_in_torch, layer

from perwatt.kernels import gptq, sparse_gpt
from perwatt.kernels.sparse_gpt import Pattern

BLOCK = sparse_gpt.BLOCK
PATTERNS = {"half": Pattern(ratio=0.5), "2:4": Pattern(n=2, m=4)}


def in_torch(weights: Any, hessian: Any, pattern: Pattern, upper: Any = None) -> Run:
    """SparseGPT in torch; with `upper`, the factor of the inverse, the columns alone."""
    import torch

    @torch.inference_mode()
    def run() -> Any:
        factor = factor_in_torch(hessian) if upper is None else upper
        moved = weights.T.contiguous()
        width, rows = moved.shape
        price = factor.diagonal()[:, None]
        errors = moved.new_empty((BLOCK, rows))
        goes = torch.zeros((BLOCK, rows), dtype=torch.bool, device=moved.device)
        for start in range(0, width, BLOCK):
            stop = start + BLOCK
            block, part = moved[start:stop], factor[start:stop, start:stop]
            if pattern.ratio is not None:
                cost = (block / price[start:stop]).square_()
                limit = torch.sort(cost.flatten()).values[round(pattern.ratio * cost.numel()) - 1]
                goes = cost <= limit
            inverse = (1 / part.diagonal()).tolist()
            for i in range(BLOCK):
                if pattern.m and i % pattern.m == 0:
                    cost = (block[i : i + pattern.m] / price[start + i : start + i + pattern.m]).square_()
                    least = torch.topk(cost, pattern.m - pattern.n, dim=0, largest=False).indices
                    goes[i : i + pattern.m] = False
                    goes[i : i + pattern.m].scatter_(0, least, True)
                torch.mul(block[i], goes[i], out=errors[i])
                block[i] -= errors[i]
                errors[i] *= inverse[i]
                block[i + 1 :].addr_(part[i, i + 1 :], errors[i], alpha=-1)
            moved[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        found = moved.T.contiguous()
        if weights.is_cuda:
            torch.cuda.synchronize()
        return found

    return run


def in_numpy(weights: np.ndarray, hessian: np.ndarray, pattern: Pattern, upper: np.ndarray | None = None) -> Run:
    """The same in NumPy, with SciPy's factorizations in place."""

    def run() -> np.ndarray:
        factor = factor_in_numpy(hessian) if upper is None else upper
        moved = np.ascontiguousarray(weights.T)
        width, rows = moved.shape
        price = factor.diagonal()[:, None]
        errors = np.empty((BLOCK, rows), np.float32)
        goes = np.zeros((BLOCK, rows), bool)
        for start in range(0, width, BLOCK):
            stop = start + BLOCK
            block, part = moved[start:stop], factor[start:stop, start:stop]
            if pattern.ratio is not None:
                cost = (block / price[start:stop]) ** 2
                place = round(pattern.ratio * cost.size) - 1
                goes = cost <= np.partition(cost, place, axis=None)[place]
            for i in range(BLOCK):
                if pattern.m and i % pattern.m == 0:
                    cost = (block[i : i + pattern.m] / price[start + i : start + i + pattern.m]) ** 2
                    least = np.argpartition(cost, pattern.m - pattern.n - 1, axis=0)[: pattern.m - pattern.n]
                    goes[i : i + pattern.m] = False
                    np.put_along_axis(goes[i : i + pattern.m], least, True, axis=0)
                np.multiply(block[i], goes[i], out=errors[i])
                block[i] -= errors[i]
                errors[i] /= part[i, i]
                block[i + 1 :] -= part[i, i + 1 :, None] * errors[i]
            moved[stop:] -= factor[start:stop, stop:].T @ errors
        return np.ascontiguousarray(moved.T)

    return run


def same_for(weights: np.ndarray, hessian: np.ndarray) -> Callable[[object, object], None]:
    """Both leave the same squared error over the outputs, and as many zeros."""

    def figures(found: Any) -> tuple[float, float]:
        array = np.asarray(found if isinstance(found, np.ndarray) else found.cpu())
        missed = weights - array
        return float(np.vdot(missed @ hessian, missed)), float((array == 0).mean())

    def same(mine: Any, other: Any) -> None:
        (ours, zeros), (theirs, others_zeros) = figures(mine), figures(other)
        assert abs(theirs / ours - 1) <= 0.02, f"an error of {theirs:g} over the outputs, ours is {ours:g}"
        assert abs(zeros - others_zeros) <= 1e-3, f"a share of {others_zeros:g} zeros, ours is {zeros:g}"

    return same


def _case(rows: int, width: int, called: str, columns_alone: bool) -> Case:
    import torch

    weights, hessian = layer(rows, width)
    pattern = PATTERNS[called]
    factor = gptq.factorize(hessian, damping=DAMPING)
    given, inputs = torch.from_numpy(weights), torch.from_numpy(hessian)
    upper = factor_in_torch(inputs).contiguous() if columns_alone else None
    others = {
        "torch": in_torch(given, inputs, pattern, upper),
        "NumPy": in_numpy(weights, hessian, pattern, None if upper is None else upper.numpy()),
    }
    ours: Run = lambda: sparse_gpt.compute(weights, hessian, pattern, damping=DAMPING)  # noqa: E731
    if columns_alone:
        ours = lambda: sparse_gpt.compute_columns(weights, factor, pattern)  # noqa: E731
    title = "SparseGPT's columns" if columns_alone else "SparseGPT"
    return Case(
        "sparse_gpt", f"{title} of {rows} × {width}, {called}", ours, others, same_for(weights, hessian),
        cuda=lambda: on_gpu(weights, hessian, pattern, columns_alone),
    )  # fmt: skip


def on_gpu(given: np.ndarray, inputs: np.ndarray, pattern: Pattern, columns_alone: bool) -> tuple[Run, dict[str, Run]]:
    """Both on arrays that lie on the GPU, to results that stay there."""
    import torch

    from perwatt.kernels import _gptq_cuda, _sparse_gpt_cuda

    weights, hessian = torch.from_numpy(given).cuda(), torch.from_numpy(inputs).cuda()
    width = len(hessian)
    order, alive = torch.arange(width).cuda(), torch.ones(width, dtype=torch.bool).cuda()
    counted = None if pattern.ratio is None else lambda size: round((pattern.ratio or 0.0) * size)
    blocks = sparse_gpt._blocks(width, pattern)

    def factorized() -> Any:
        diagonal = hessian.diagonal().double()
        mean = diagonal.mean()
        return _gptq_cuda.factorize(hessian, order, diagonal / mean + DAMPING, 1 / mean.item(), True)

    kept = factorized()

    def ours() -> Any:
        triangle = kept if columns_alone else factorized()
        found = _sparse_gpt_cuda.compute_columns(weights, triangle, alive, pattern.n, pattern.m, counted, blocks)
        torch.cuda.synchronize()
        return found

    upper = factor_in_torch(hessian).contiguous() if columns_alone else None
    return ours, {"torch": in_torch(weights, hessian, pattern, upper)}


def cases() -> list[Case]:
    """Whole layers, then the columns alone."""
    return [_case(*size, called, alone) for alone in (False, True) for size in SIZES for called in PATTERNS]
