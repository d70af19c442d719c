"""Put root mean square normalization back together: one RMSNormalization where exporters left five to eight nodes.

y = x / √(mean(x²) + ε) · γ over the last axes of every row (Zhang and Sennrich 2019; ONNX's RMSNormalization-23): layer
normalization without its mean, as Llama, T5, Gemma, Qwen and most decoders since have it, twice a layer.

    Mul(γ, Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), ε)))))        becomes        RMSNormalization(x, γ)

Found with the square as a power or a product, the root as a division, a reciprocal or a power, the scale in either order
and at any place or missing, Gemma's 1 + γ, and between casts to float32 and back, which the operator does itself (its
stash_type).

Only for backends that run the operator as one. ONNX Runtime's kernel takes 0.68 times the CPU time of the pieces; OpenVINO
makes the same kernel of either, and there one operator is easier to read. Left where the arithmetic is not in float32 and
where the scale varies along other axes than those normalized.
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
    last_axes_refusals,
    last_lengths,
    merged_weights,
    own_arrays,
    stash_type_of,
)
from perwatt.passes._normalization_forms import SCALE, bare, behind, by_root_mean_square, whole, x_or_cast
from perwatt.patterns import Either, Match, Number, Op, made_by


@dataclass(frozen=True)
class FuseRmsNormalization(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    roots: ClassVar[tuple[str, ...]] = ("Mul", "Div", "Cast")
    what: ClassVar[str] = "RMS normalizations put together"
    opset: ClassVar[int] = 23
    operator: ClassVar[str | None] = "RMSNormalization"
    depends_on_target: ClassVar[bool] = True

    def patterns(self) -> Sequence[Op]:
        return _patterns()

    def find(self, node: Any) -> Iterator[Match]:
        yield from (match for match in super().find(node) if not _is_centered(match["x"]))

    def check(self, match: Match) -> Iterator[str]:
        yield from last_axes_refusals(match, "RMSNormalization")

    def rewrite(self, match: Match, build: Builder) -> Any:
        lengths = last_lengths(match) or []
        scale, _ = merged_weights(match, build, lengths, own_arrays(match))
        epsilon, stash_type = epsilon_of(match), stash_type_of(match)
        return build.op(
            "RMSNormalization", match["x"], scale, axis=-len(lengths), epsilon=epsilon, stash_type=stash_type
        )


def _is_centered(x: Any) -> bool:
    """Whether that is x − μ: every layer normalization holds the pattern, on what it has centered."""
    difference = made_by(x, "Sub")
    mean = made_by(difference.inputs[1], "ReduceMean") if difference is not None else None
    return mean is not None and mean.inputs[0] is difference.inputs[0]


@cache
def _patterns() -> tuple[Op, ...]:
    pieces = by_root_mean_square(x_or_cast)
    scale = Either(Op("Add", Number(1), SCALE, name="plus one", shared=True), SCALE)
    there = behind(whole("RMSNormalization"), scale=scale, shift=False)
    return (*there, *behind(pieces, scale=scale, shift=False, casts=True), *bare(pieces, casts=True))
