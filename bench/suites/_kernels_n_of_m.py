"""N:M masks of BERT-base's feed-forward and of a decoder's, and weights pruned by them.

The others: torch's and NumPy's selection of the largest of each group and a scatter, as pruning code usually has it; the
same by ranks, whose comparisons run over whole arrays; and for 2:4 the choice among the six patterns by one matrix product.
No scores are equal within a group, where the others' choice would be anybody's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from _kernel_case import Case, Run

from perwatt.kernels import n_of_m

SIZES = [(3072, 768, 2, 4), (4096, 4096, 2, 4), (3072, 768, 4, 8), (3072, 768, 8, 32)]


def cases() -> list[Case]:
    """Masks alone, then weights."""
    return [_case(*size, fused) for fused in (False, True) for size in SIZES]


def _case(rows: int, columns: int, n: int, m: int, fused: bool) -> Case:
    scores, weights = _arrays(rows, columns, m)
    out = np.empty_like(weights)
    others = _torch(scores, weights if fused else None, n, m, "cpu") | _numpy(scores, weights if fused else None, n, m)
    return Case(
        "n_of_m",
        f"{n}:{m} {'pruning' if fused else 'mask'} of {rows} × {columns}",
        (lambda: n_of_m.compute_pruned(weights, scores, n, m, out=out)) if fused else (lambda: n_of_m.compute(scores, n, m)),
        others,
        _same,
        moved_bytes=scores.nbytes * 3 if fused else scores.nbytes + scores.size,
        cuda=partial(_cuda, scores, weights, n, m, fused),
    )  # fmt: skip


def _arrays(rows: int, columns: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(0)
    drawn = chance.random((rows * columns // m, m), dtype=np.float32)
    # Well apart within a group, so that sums of them are, too.
    scores = np.argsort(drawn, axis=1) + 0.5 * drawn
    weights = chance.standard_normal((rows, columns), dtype=np.float32) + 10
    return scores.astype(np.float32).reshape(rows, columns), weights


def _same(ours: object, other: object) -> None:
    mine, theirs = (np.asarray(each if isinstance(each, np.ndarray) else each.cpu()) for each in (ours, other))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(mine, theirs.reshape(mine.shape))


def _numpy(scores: np.ndarray, weights: np.ndarray | None, n: int, m: int) -> dict[str, Run]:
    groups = scores.reshape(-1, m)

    def partition() -> np.ndarray:
        kept = np.zeros(groups.shape, bool)
        np.put_along_axis(kept, np.argpartition(groups, m - n, axis=1)[:, m - n :], True, axis=1)
        kept = kept.reshape(scores.shape)
        return kept if weights is None else weights * kept

    def limit() -> np.ndarray:
        least = np.partition(groups, m - n, axis=1)[:, m - n, None]
        kept = (groups >= least).reshape(scores.shape)
        return kept if weights is None else weights * kept

    return {"NumPy argpartition": partition, "NumPy partition, compare": limit}


def _torch(scores: Any, weights: Any, n: int, m: int, device: str) -> dict[str, Run]:
    import torch

    given = torch.from_numpy(scores).to(device)
    values = None if weights is None else torch.from_numpy(weights).to(device)
    groups = given.view(-1, m)
    chosen = list(combinations(range(m), n)) if m == 4 else []
    patterns = torch.zeros(len(chosen), m, device=device)
    for row, places in enumerate(chosen):
        patterns[row, list(places)] = 1

    def settled(make: Callable[[], Any]) -> Run:
        @torch.inference_mode()
        def run() -> Any:
            kept = make().view(given.shape)
            found = kept if values is None else values * kept
            if device == "cuda":
                torch.cuda.synchronize()
            return found

        return run

    def topk() -> Any:
        kept = torch.zeros_like(groups, dtype=torch.bool)
        return kept.scatter_(1, torch.topk(groups, n, dim=1, sorted=False).indices, True)

    def argsort() -> Any:
        kept = torch.zeros_like(groups, dtype=torch.bool)
        return kept.scatter_(1, torch.argsort(groups, dim=1, descending=True)[:, :n], True)

    def ranks() -> Any:
        columns = [groups[:, i].contiguous() for i in range(m)]
        found = [sum((columns[j] > columns[i]).byte() for j in range(m) if j != i) < n for i in range(m)]
        return torch.stack(found, dim=1)

    def product() -> Any:
        return patterns.bool()[torch.argmax(groups @ patterns.T, dim=1)]

    runs = {"torch topk, scatter": settled(topk), "torch argsort, scatter": settled(argsort)}
    runs |= {"torch ranks": settled(ranks)} if m <= 8 else {}
    return runs | ({"torch patterns": settled(product)} if chosen else {})


def _cuda(scores: np.ndarray, weights: np.ndarray, n: int, m: int, fused: bool) -> tuple[Run, dict[str, Run]]:
    from numba import cuda

    from perwatt.kernels import _n_of_m_cuda

    given, values = cuda.to_device(scores), cuda.to_device(weights) if fused else None

    def ours() -> Any:
        found = _n_of_m_cuda.run(values, given, n, m)
        cuda.synchronize()
        return _OnDevice(found)

    return ours, _torch(scores, weights if fused else None, n, m, "cuda")


class _OnDevice:
    """Copied back only where it is compared."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def cpu(self) -> np.ndarray:
        return np.asarray(self.array.copy_to_host())
