"""Write group normalization out around an InstanceNormalization, for backends that have no kernel for it.

GroupNormalization is of opset 21, and a backend that doesn't know it runs the function that stands for it in the standard:
casts, a mean, a variance, a division, each a pass over x. InstanceNormalization is of opset 1 and has a kernel everywhere, and
over channels that are put side by side it does the same:

    GroupNormalization(x, γ, β)
        becomes    Add(Mul(Reshape(InstanceNormalization(Reshape(x, [0, groups, -1]), 1, 0), Shape(x)), γ[C, 1, 1]), β[C, 1, 1])

0.4 times the CPU time in ONNX Runtime (8 × 64 × 56 × 56, docs/fusion.md). Only for backends that say which operators they take
whole, and not GroupNormalization. Left: types other than float32, a scale or shift that is computed, and the operator of opset
18, which has a scale for each group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from perwatt.artifact import Artifact
from perwatt.contract import Context, Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._reusing import kept_once
from perwatt.patterns import Match, dims, is_stored, rank, stored

FIRST_BY_CHANNEL = 21


@dataclass(frozen=True)
class DecomposeGroupNormalization(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    roots: ClassVar[tuple[str, ...]] = ("GroupNormalization",)
    what: ClassVar[str] = "group normalizations written out"
    takes_apart: ClassVar[str | None] = "GroupNormalization"
    depends_on_target: ClassVar[bool] = True

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        yield from super().requires(artifact, context)
        older = artifact.model.opset_imports.get("", 0) < FIRST_BY_CHANNEL
        if older and "GroupNormalization" in artifact.operator_counts():
            yield "its GroupNormalization is that of opset 18, with a scale for each group"

    def find(self, node: Any) -> Iterator[Match]:
        yield Match(node, (node,), (node.outputs[0],))

    def check(self, match: Match) -> Iterator[str]:
        x, scale, shift = match.root.inputs
        if x.dtype is None or x.dtype.name != "FLOAT":
            yield "its type isn't float32, or not known"
        if rank(x) is None:
            yield "how many axes it has isn't known"
        if not (is_stored(scale) and is_stored(shift)):
            yield "its scale or shift is computed"

    def rewrite(self, match: Match, build: Builder) -> Any:
        x, scale, shift = match.root.inputs
        attributes = match.root.attributes
        groups = attributes.get_int("num_groups", 1)
        ones, zeros = (kept_once(build, np.full(groups, value, np.float32)) for value in (1, 0))
        side_by_side = build.op("Reshape", x, kept_once(build, np.array([0, groups, -1], np.int64)))
        normal = build.op(
            "InstanceNormalization", side_by_side, ones, zeros, epsilon=attributes.get_float("epsilon", 1e-5)
        )
        back = build.op("Reshape", normal, _shape_of(x, build))
        by_channel = [-1, *[1] * ((rank(x) or 2) - 2)]
        factors, summands = (
            kept_once(build, np.asarray(stored(value)).reshape(by_channel)) for value in (scale, shift)
        )
        return build.op("Add", build.op("Mul", back, factors), summands)


def _shape_of(x: Any, build: Builder) -> Any:
    """Its shape for a Reshape from [N, groups, -1]: stored where at most one axis behind the batch is open, else computed."""
    _, *lengths = dims(x) or []
    known = [length if isinstance(length, int) else -1 for length in lengths]
    if known.count(-1) > 1 or 0 in known:
        return build.op("Shape", x)
    return kept_once(build, np.array([0, *known], np.int64))
