"""`perwatt.kernels.sparse_gpt` on a GPU: torch holds the arrays, factorizes and multiplies; Numba's kernels do the columns of a
block, a thread a row of weights, as those of `perwatt.kernels.gptq` do. Everything is a torch tensor on one device; "cpu" serves
Numba's simulator. Imported only where this is called, because Numba takes a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from perwatt.kernels._gptq_cuda import THREADS, shared

Tensor = Any
ZERO = np.float32(0)


@cuda.jit  # type: ignore[untyped-decorator]
def block(
    given: Any, price: Any, coefficients: Any, shift: Any, missed: Any, cost: Any, n: Any, m: Any, goes: Any, errors: Any
) -> None:  # fmt: skip
    row = cuda.grid(1)
    if row >= given.shape[1]:
        return
    for i in range(given.shape[0]):
        if m > 0 and i % m == 0:
            for j in range(i, i + m):
                moved = given[j, row] + shift[j, row]
                for k in range(i):
                    moved -= coefficients[j, k] * missed[k, row]
                cost[j, row] = abs(moved) * price[j]
            for j in range(i, i + m):
                own = cost[j, row]
                rank = 0
                for k in range(i, j):
                    if cost[k, row] >= own:
                        rank += 1
                for k in range(j + 1, i + m):
                    if cost[k, row] > own:
                        rank += 1
                goes[j, row] = 1 if rank >= n else 0
        moved = given[i, row] + shift[i, row]
        for k in range(i):
            moved -= coefficients[i, k] * missed[k, row]
        kept = ZERO if goes[i, row] != 0 else moved
        missed[i, row] = moved - kept
        errors[i, row] = kept - given[i, row]


def compute_columns(
    weights: Tensor, triangle: Tensor, alive: Tensor, n: int, m: int, counted: Callable[[int], int] | None,
    blocks: list[tuple[int, int]],
) -> Tensor:  # fmt: skip
    """The weights left, float32 [out, in]. `triangle`: U⁻¹, upper; `alive`: bool [in]; `counted`: how many of so many weights
    of a block go, None for N:M; `blocks`: ranges of columns."""
    import torch

    given = torch.where(alive, weights, 0).T.contiguous()
    rows = given.shape[1]
    if not rows:  # a GPU refuses a grid without blocks, which the simulator takes
        return weights
    errors = torch.empty_like(given)
    widest = max(high - low for low, high in blocks)
    missed, cost = given.new_empty((2, widest, rows))
    goes = torch.zeros((widest, rows), dtype=torch.int8, device=given.device)
    for low, high in blocks:
        inner = triangle[low:high, low:high]
        within = torch.linalg.solve_triangular(inner, torch.eye(high - low, device=inner.device), upper=True).T
        shift = -(within @ (triangle[:low, low:high].T @ errors[:low]))
        coefficients = (within / within.diagonal()).contiguous()
        price = inner.diagonal().contiguous()
        if counted is not None:
            goes[: high - low] = cheapest((given[low:high] + shift).abs() * price[:, None], counted)
        block[-(-rows // THREADS), THREADS](
            *shared(given[low:high], price, coefficients, shift, missed, cost), n, m, *shared(goes, errors[low:high])
        )
    # What goes is off by all of it: exactly 0 is left. So it is of what is dead, whose weights were 0 before.
    return torch.where(alive, (given + errors).T, 0)


def cheapest(costs: Tensor, counted: Callable[[int], int]) -> Tensor:
    """Which weights [columns, out] go: those that cost least, of equal ones the first by row and column."""
    import torch

    by_row = costs.T.reshape(-1)
    goes = torch.zeros_like(by_row, dtype=torch.int8)
    goes[torch.argsort(by_row, stable=True)[: counted(by_row.numel())]] = 1
    return goes.reshape(costs.T.shape).T
