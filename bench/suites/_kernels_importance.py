"""Importance of output and input channels of the weights that pruning meets most, by each of its three measures.

The others add in float32, as anybody would: NumPy's einsum and BLAS where they can, torch's norms, einsum and products; none of
them does Σ (w · g)² or Σ |w| · a without an array in between but einsum. What they make is within 10⁻⁴ of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from _kernel_case import Case, Run

from perwatt.kernels import importance as kernel

SIZES: list[tuple[str, tuple[int, ...], int]] = [
    ("BERT-base feed-forward, neurons", (3072, 768), 0),
    ("BERT-base feed-forward, inputs", (3072, 768), 1),
    ("decoder's 4096 × 4096, inputs", (4096, 4096), 1),
    ("ResNet-50 3 × 3, out", (512, 512, 3, 3), 0),
    ("ResNet-50 3 × 3, in", (512, 512, 3, 3), 1),
    ("attention heads", (12, 64, 12, 64), 2),
]
KINDS = ("squares", "products", "norms")


def cases() -> list[Case]:
    """Every measure of every size."""
    return [_case(title, shape, axis, kind) for title, shape, axis in SIZES for kind in KINDS]


def _case(title: str, shape: tuple[int, ...], axis: int, kind: str) -> Case:
    chance = np.random.default_rng(0)
    weights, gradients = (chance.standard_normal(shape, dtype=np.float32) for _ in range(2))
    along = 1 if axis == 0 else 0
    norms = chance.random(shape[along]).astype(np.float32) + 0.1
    chosen: dict[str, Any] = {
        "squares": {}, "products": {"gradients": gradients}, "norms": {"norms": norms, "norms_axis": along},
    }[kind]  # fmt: skip
    return Case(
        "importance",
        f"importance, {kind}: {title}",
        lambda: kernel.compute(weights, axis, **chosen),
        _numpy(weights, gradients, norms, axis, along, kind) | _torch(weights, gradients, norms, axis, along, kind, "cpu"),
        _same,
        moved_bytes=weights.nbytes * (2 if kind == "products" else 1),
        cuda=partial(_cuda, weights, gradients, norms, axis, along, kind, chosen),
    )  # fmt: skip


def _same(ours: object, other: object) -> None:
    theirs = np.asarray(other if isinstance(other, np.ndarray) else other.cpu(), np.float64)  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.asarray(ours), theirs.reshape(-1), rtol=1e-4)


def _rule(dims: int, axis: int, along: int, kind: str) -> str:
    """einsum's: `ab,ab->b`, with the norms' letter behind for norms."""
    letters = "abcd"[:dims]
    operands = {"squares": [letters] * 2, "products": [letters] * 4, "norms": [letters, letters[along]]}[kind]
    return f"{','.join(operands)}->{letters[axis]}"


def _numpy(weights: Any, gradients: Any, norms: Any, axis: int, along: int, kind: str) -> dict[str, Run]:
    rest = tuple(place for place in range(weights.ndim) if place != axis)
    rule = _rule(weights.ndim, axis, along, "norms" if kind == "norms" else "squares")
    shape = [1] * weights.ndim
    shape[along] = -1

    def by_einsum() -> np.ndarray:
        if kind == "squares":
            return np.asarray(np.einsum(rule, weights, weights))
        if kind == "products":
            both = weights * gradients
            return np.asarray(np.einsum(rule, both, both))
        return np.asarray(np.einsum(rule, np.abs(weights), norms))

    def by_sum() -> np.ndarray:
        terms = {"squares": lambda: weights * weights, "products": lambda: (weights * gradients) ** 2}.get(
            kind, lambda: np.abs(weights) * norms.reshape(shape)
        )()
        return np.asarray(terms.sum(axis=rest))

    found: dict[str, Run] = {"NumPy einsum": by_einsum, "NumPy sum": by_sum}
    if kind == "norms" and weights.ndim == 2:
        found["NumPy abs, BLAS"] = lambda: np.abs(weights) @ norms if axis == 0 else norms @ np.abs(weights)
    return found


def _torch(weights: Any, gradients: Any, norms: Any, axis: int, along: int, kind: str, device: str) -> dict[str, Run]:
    import torch

    w, g, a = (torch.from_numpy(each).to(device) for each in (weights, gradients, norms))
    rest = tuple(place for place in range(w.ndim) if place != axis)
    rule = _rule(w.ndim, axis, along, "norms" if kind == "norms" else "squares")
    beside = a.view([-1 if place == along else 1 for place in range(w.ndim)])

    def settled(make: Callable[[], Any]) -> Run:
        @torch.inference_mode()
        def run() -> Any:
            found = make()
            if device == "cuda":
                torch.cuda.synchronize()
            return found

        return run

    if kind == "squares":
        made = {
            "torch norm": lambda: torch.linalg.vector_norm(w, dim=rest).square_(),
            "torch sum": lambda: (w * w).sum(rest),
            "torch einsum": lambda: torch.einsum(rule, w, w),
        }
    elif kind == "products":
        made = {
            "torch norm": lambda: torch.linalg.vector_norm(w * g, dim=rest).square_(),
            "torch sum": lambda: (w * g).square_().sum(rest),
        }
    else:
        made = {
            "torch sum": lambda: (w.abs() * beside).sum(rest),
            "torch einsum": lambda: torch.einsum(rule, w.abs(), a),
        }
    return {name: settled(make) for name, make in made.items()}


def _cuda(
    weights: Any, gradients: Any, norms: Any, axis: int, along: int, kind: str, chosen: dict[str, Any]
) -> tuple[Run, dict[str, Run]]:
    from numba import cuda

    there = cuda.to_device(weights)
    given = {name: cuda.to_device(each) if name == "gradients" else each for name, each in chosen.items()}
    return lambda: kernel.compute_cuda(there, axis, **given), _torch(
        weights, gradients, norms, axis, along, kind, "cuda"
    )
