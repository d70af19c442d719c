"""Put group normalization back together: one GroupNormalization where exporters left three to twelve nodes.

y = (x − μ) / √(σ² + ε) · γ + β on [N, C, …], with mean μ and variance σ² over a group of neighbouring channels and all axes
behind them, and γ and β by channel (Wu and He 2018; ONNX's GroupNormalization-21): in diffusion nets and detectors.

    g = Reshape(x, [0, groups, -1])
    Add(Mul(Reshape(InstanceNormalization(g, ones, zeros), Shape(x)), γ[C, 1, 1]), β[C, 1, 1])
                                                                       becomes        GroupNormalization(x, γ, β)

Found with an InstanceNormalization inside, as torch exports it, or with its pieces, and with a single group without any
Reshape. A GroupNormalization that is followed by a scale or shift by channel takes them into its own.

Backends that know the operator win what the passes over x in between cost. OpenVINO takes it apart, and computes the shape
of the groups with every inference where batch or image are not fixed: it pays there with fixed shapes only. It stays where
channels come last, where the arithmetic is not in float32, and where the shapes don't prove that the groups are ones of
channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, ClassVar

import numpy as np

from perwatt.artifact import Artifact
from perwatt.contract import Context, Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._normalization import (
    axes_refusal,
    becomes,
    channel_refusals,
    channels_of,
    epsilon_of,
    is_channels_business,
    merged_weights,
    no_shift,
    normalized_axes,
    own_arrays,
    rank_within,
    stash_type_of,
    type_refusal,
    weights_refusal,
)
from perwatt.passes._normalization_forms import Forms, bare, behind, standardized, whole
from perwatt.patterns import Either, Match, Op, Var, dims, made_by, numbers, rank


@dataclass(frozen=True)
class FuseGroupNormalization(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    roots: ClassVar[tuple[str, ...]] = ("Add", "Sub", "Mul", "Div", "Reshape")
    what: ClassVar[str] = "group normalizations put together"
    opset: ClassVar[int] = 21
    operator: ClassVar[str | None] = "GroupNormalization"
    depends_on_target: ClassVar[bool] = True

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        yield from super().requires(artifact, context)
        if artifact.model.opset_imports.get("", 0) < self.opset and "GroupNormalization" in artifact.operator_counts():
            yield "its GroupNormalization is that of opset 18, with a scale for each group"

    def patterns(self) -> Sequence[Op]:
        return _patterns()

    def find(self, node: Any) -> Iterator[Match]:
        yield from (match for match in super().find(node) if _is_one(match))

    def check(self, match: Match) -> Iterator[str]:
        yield from type_refusal(match, "GroupNormalization")
        yield from weights_refusal(match)
        yield from channel_refusals(match, rank(match["x"]), channels_of(match))
        if not {"whole", "instance"} & set(match.named):
            yield from axes_refusal(match)
        if "group" in match.named:
            yield from _group_refusals(match)

    def rewrite(self, match: Match, build: Builder) -> Any:
        channels, groups = channels_of(match) or 0, _groups(match) or 1
        first = own_arrays(match)
        if "instance" in match.named:
            first = [np.repeat(array, channels // groups) for array in first]
        scale, shift = merged_weights(match, build, [channels], first)
        shift = no_shift(match, build, channels) if shift is None else shift
        epsilon, stash_type = epsilon_of(match), stash_type_of(match)
        return build.op(
            "GroupNormalization", match["x"], scale, shift, num_groups=groups, epsilon=epsilon, stash_type=stash_type
        )


def _is_one(match: Match) -> bool:
    """Whether it is one of groups, or of all axes behind the batch."""
    if any(name in match.named for name in ("whole", "group")):
        return True
    of = rank_within(match)
    return of is not None and normalized_axes(match) == list(range(1 - of, 0)) and is_channels_business(match)


def _group_refusals(match: Match) -> Iterator[str]:
    """Why Reshape → normalization → Reshape is none of groups of channels."""
    groups, channels = _groups(match), channels_of(match)
    if "instance" not in match.named:
        of = rank_within(match)
        if of is None or normalized_axes(match) != list(range(2 - of, 0)):
            yield "not all axes of a group are normalized"
    if groups is None or channels is None or channels % groups:
        yield "the shapes don't prove that it is reshaped into groups of channels"
    elif not _comes_back(match):
        yield "it is not reshaped back to where it came from"


def _groups(match: Match) -> int | None:
    """How many groups [N, C, …] is reshaped into, where the result is [N, groups, …]."""
    if "whole" in match.named:
        return int(match.named["whole"].attributes.get_int("num_groups"))
    if "group" not in match.named:
        return 1
    node, source = match.named["group"], dims(match["x"]) or [None]
    noted = dims(node.outputs[0]) or [None, None]
    asked: list[Any] = numbers(match["groups"]) or [None] * len(noted)
    if len(asked) < 3:
        return None
    copied = asked[0] == 0 and not node.attributes.get_int("allowzero", 0)
    same = source[0] is not None and source[0] in (asked[0], noted[0])
    groups = next((n for n in (asked[1], noted[1]) if isinstance(n, int) and n > 0), None)
    return groups if copied or same or (asked[0] == -1 and _as_many(asked[1:], source[1:])) else None


def _as_many(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether both lists of lengths are known, and make the same number of elements."""
    known = all(isinstance(length, int) and length > 0 for length in (*some, *others))
    return known and prod(some) == prod(others)


def _comes_back(match: Match) -> bool:
    """Whether the last Reshape has the shape of x again."""
    shape = made_by(match["shape"], "Shape")
    if shape is not None and shape.inputs[0] is match["x"] and _is_whole_shape(shape):
        return True
    source = dims(match["x"])
    return source is not None and becomes(match.named["back"], source)


def _is_whole_shape(node: Any) -> bool:
    return node.attributes.get_int("start", 0) == 0 and "end" not in node.attributes


@cache
def _patterns() -> tuple[Op, ...]:
    group = Op("Reshape", Var("x"), Var("groups"), name="group")
    inside = (
        Op("InstanceNormalization", group, ..., name="instance"),
        *standardized(lambda: group).plain,
    )
    grouped = Forms((Op("Reshape", Either(*inside), Var("shape"), name="back"),))
    single = standardized()
    return (
        *behind(whole("GroupNormalization")),
        *(form for forms in (grouped, single) for form in (*behind(forms), *bare(forms))),
    )
