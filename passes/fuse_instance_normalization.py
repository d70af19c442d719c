"""Put instance normalization back together: one InstanceNormalization where exporters left six to ten nodes.

y = (x − μ) / √(σ² + ε) · γ + β on [N, C, …], with mean μ and variance σ² of every channel of every item over all axes
behind it, and γ and β by channel (Ulyanov, Vedaldi and Lempitsky 2016; ONNX's InstanceNormalization): in nets for style
transfer, image translation and segmentation, on their largest tensors, which every piece reads and writes anew.

    d = Sub(x, ReduceMean(x, axes=[2, 3]))
    Add(Mul(Div(d, Sqrt(Add(ReduceMean(Mul(d, d)), ε))), γ[C, 1, 1]), β[C, 1, 1])
                                                                       becomes        InstanceNormalization(x, γ, β)

Found in all forms that layer normalization is found in, with means by GlobalAveragePool too. An InstanceNormalization
that is followed by a scale or shift by channel takes them into its own. Without scale and shift, over a single axis, it
is left to layer normalization, which is the same there. It stays where channels come last, where the arithmetic is not in
float32, and where the number of channels isn't known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._normalization import (
    axes_refusal,
    channel_refusals,
    channels_of,
    epsilon_of,
    is_channels_business,
    merged_weights,
    no_shift,
    normalized_axes,
    own_arrays,
    rank_within,
    type_refusal,
    weights_refusal,
)
from perwatt.passes._normalization_forms import bare, behind, standardized, whole
from perwatt.patterns import Match, Op


@dataclass(frozen=True)
class FuseInstanceNormalization(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    roots: ClassVar[tuple[str, ...]] = ("Add", "Sub", "Mul", "Div")
    what: ClassVar[str] = "instance normalizations put together"
    opset: ClassVar[int] = 6
    after: ClassVar[tuple[str, ...]] = ("fuse-layer-normalization", "fuse-group-normalization")

    def patterns(self) -> Sequence[Op]:
        return _patterns()

    def find(self, node: Any) -> Iterator[Match]:
        yield from (match for match in super().find(node) if _is_one(match))

    def check(self, match: Match) -> Iterator[str]:
        yield from type_refusal(match, "InstanceNormalization")
        yield from weights_refusal(match)
        yield from channel_refusals(match, rank_within(match), channels_of(match))
        if "whole" not in match.named:
            yield from axes_refusal(match)

    def rewrite(self, match: Match, build: Builder) -> Any:
        channels = channels_of(match) or 0
        scale, shift = merged_weights(match, build, [channels], own_arrays(match))
        shift = no_shift(match, build, channels) if shift is None else shift
        return build.op("InstanceNormalization", match["x"], scale, shift, epsilon=epsilon_of(match))


def _is_one(match: Match) -> bool:
    """Whether mean and variance are taken over all axes behind the channels, as far as is known."""
    of = rank_within(match)
    if "whole" in match.named or of is None:
        return True
    return normalized_axes(match) == list(range(2 - of, 0)) and is_channels_business(match)


@cache
def _patterns() -> tuple[Op, ...]:
    pieces = standardized(means="ReduceMean|GlobalAveragePool")
    return (*behind(whole("InstanceNormalization")), *behind(pieces), *bare(pieces))
