"""Drift: how far outputs moved between two models on the same samples, and whether a pass may move them that far.

Per output: max|Δ| ≤ atol + rtol · RMS(before). Integers and booleans must be equal; NaN and infinities must stand in
the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perwatt.contract import Tolerance
from perwatt.signature import Array, Batch


@dataclass(frozen=True)
class Drift:
    """`max_abs`: the largest |Δ| of any output; `relative`: the largest max|Δ| ÷ RMS of an output.
    Both are infinite where outputs can't be compared: other names, shapes or types, or NaN in other places.
    `reasons`: what breaks the tolerance; empty where it holds or where there is none."""

    max_abs: float
    relative: float
    reasons: tuple[str, ...] = ()


def drift(before: Sequence[Batch], after: Sequence[Batch], tolerance: Tolerance | None) -> Drift:
    """Compare outputs batch by batch. `tolerance` None records the drift and judges only names and shapes."""
    worst_abs = worst_relative = 0.0
    reasons: list[str] = []
    names = list(before[0]) if before else []
    if any(set(a) != set(b) for a, b in zip(before, after, strict=True)):
        return Drift(float("inf"), float("inf"), ("the outputs have other names",))
    for name in names:
        pairs = [(a[name], b[name]) for a, b in zip(before, after, strict=True)]
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
            reasons.append(f"output {name} changed its shape or type")
            worst_abs = worst_relative = float("inf")
            continue
        old = np.concatenate([a.ravel() for a, _ in pairs])
        new = np.concatenate([b.ravel() for _, b in pairs])
        moved, scale, problem = _output_drift(old, new)
        worst_abs = max(worst_abs, moved)
        worst_relative = max(worst_relative, moved / scale if scale else (0.0 if moved == 0 else float("inf")))
        if tolerance is None:
            continue
        if problem:
            reasons.append(f"output {name}: {problem}")
        elif moved > tolerance.atol + tolerance.rtol * scale:
            allowed = tolerance.atol + tolerance.rtol * scale
            reasons.append(f"output {name} moved by {moved:.3g}, {allowed:.3g} is allowed")
    return Drift(worst_abs, worst_relative, tuple(reasons))


def _output_drift(old: Array, new: Array) -> tuple[float, float, str | None]:
    """(max|Δ|, RMS of old, what is wrong beyond size) over flat arrays."""
    if not old.size:
        return 0.0, 0.0, None
    if old.dtype.kind in "biuOSU":
        different = int(np.count_nonzero(old != new))
        return float(different > 0), 1.0, f"{different} of {old.size} entries differ" if different else None
    old, new = old.astype(np.float64), new.astype(np.float64)
    finite = np.isfinite(old)
    same = np.array_equal(finite, np.isfinite(new)) and np.array_equal(old[~finite], new[~finite], equal_nan=True)
    scale = float(np.sqrt(np.mean(old[finite] ** 2))) if finite.any() else 0.0
    if not same:
        return float("inf"), scale, "NaN or infinity in other places"
    return float(np.abs(old[finite] - new[finite]).max(initial=0.0)), scale, None
