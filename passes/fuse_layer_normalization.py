"""Put layer normalization back together: one LayerNormalization where exporters left six to ten nodes.

y = (x − μ) / √(σ² + ε) · γ + β with mean μ and variance σ² of every row over its last axes (Ba, Kiros and Hinton 2016;
ONNX's LayerNormalization-17). In pieces, every step reads and writes the whole tensor; as one operator it is read once
or twice and written once. OpenVINO finds most of these forms itself, ONNX Runtime the commonest; the passes behind this one
find none, and as one operator quantization and half precision know what they are dealing with.

    d = Sub(x, ReduceMean(x))
    Add(Mul(Div(d, Sqrt(Add(ReduceMean(Pow(d, 2)), ε))), γ), β)        becomes        LayerNormalization(x, γ, β)

Found with the square as a power or a product, the root as a division, a reciprocal or a power, the variance also as
mean(x²) − μ², the scale multiplied in at any place, as TensorFlow's x·f + (β − μ·f) with f = γ/√(σ² + ε), and between casts
to float32 and back, which the operator does itself (its stash_type). A LayerNormalization that is followed by products and
sums with stored tensors takes them into its own scale and shift.

It stays where the arithmetic is not in float32, where scale or shift vary along other axes than those normalized, and
what spans all axes behind batch or channels belongs to the passes for group and instance normalization.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._normalization import (
    epsilon_of,
    is_channels_business,
    last_axes_refusals,
    last_lengths,
    merged_weights,
    own_arrays,
    stash_type_of,
)
from perwatt.passes._normalization_forms import bare, behind, standardized, whole, x_or_cast
from perwatt.patterns import Match, Op


@dataclass(frozen=True)
class FuseLayerNormalization(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    roots: ClassVar[tuple[str, ...]] = ("Add", "Sub", "Mul", "Div", "Cast")
    what: ClassVar[str] = "layer normalizations put together"
    opset: ClassVar[int] = 17
    # Reshaped into groups, a group normalization holds what looks like one of these.
    after: ClassVar[tuple[str, ...]] = ("fuse-group-normalization",)

    def patterns(self) -> Sequence[Op]:
        return _patterns()

    def find(self, node: Any) -> Iterator[Match]:
        yield from (match for match in super().find(node) if not is_channels_business(match))

    def check(self, match: Match) -> Iterator[str]:
        yield from last_axes_refusals(match, "LayerNormalization")

    def rewrite(self, match: Match, build: Builder) -> Any:
        lengths = last_lengths(match) or []
        scale, shift = merged_weights(match, build, lengths, own_arrays(match))
        weights = (scale,) if shift is None else (scale, shift)
        epsilon, stash_type = epsilon_of(match), stash_type_of(match)
        return build.op(
            "LayerNormalization", match["x"], *weights, axis=-len(lengths), epsilon=epsilon, stash_type=stash_type
        )


@cache
def _patterns() -> tuple[Op, ...]:
    pieces = standardized(x_or_cast)
    return (*behind(whole("LayerNormalization")), *behind(pieces, casts=True), *bare(pieces, casts=True))
