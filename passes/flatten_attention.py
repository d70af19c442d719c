"""Give an Attention its queries, keys and values as the projections leave them, on three axes.

ONNX's Attention-23 takes [batch, length, heads · depth] as well as [batch, heads, length, depth], so the four transpositions
around it, and the Reshapes that go with them, need not be there; a RotaryEmbedding on the way takes both forms too.

    Reshape → Transpose (each of q, k, v) → Attention → Transpose → Reshape
                becomes        Attention(q, k, v) with q_num_heads and kv_num_heads

Each transposition copies a whole tensor between two products. ONNX Runtime's kernel reads heads where they lie: 0.72 to
0.80 times the CPU time of the pieces, and no gain without this (8 × 128 and 8 × 197 × 768, 12 heads). It doesn't pay where a
backend puts the transpositions back, as OpenVINO does. Left where queries, keys or values have another origin than a
transposition, because one would have to be put in for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._attention import follows
from perwatt.passes._reusing import kept_once
from perwatt.patterns import Match, dims, given, made_by, numbers, only_user, same_dims

HEADS_FIRST = (0, 2, 1, 3)


@dataclass(frozen=True)
class FlattenAttention(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    roots: ClassVar[tuple[str, ...]] = ("Reshape",)
    what: ClassVar[str] = "attentions without their transpositions"
    opset: ClassVar[int] = 23
    operator: ClassVar[str | None] = "Attention"
    depends_on_target: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = (
        "fuse-attention",
        "fuse-rotary-embedding",
        "cancel-transposes",
        "cancel-reshapes",
    )

    def find(self, node: Any) -> Iterator[Match]:
        turn = _heads_exchanged(node.inputs[0])
        attention = made_by(turn.inputs[0], "Attention") if turn is not None else None
        if attention is None or "q_num_heads" in attention.attributes or len(given(attention)) > 4:
            return
        named = {"attention": attention}
        yield Match(node, (node, turn, attention), (node.outputs[0],), {}, named)

    def check(self, match: Match) -> Iterator[str]:
        attention = match.named["attention"]
        found = dims(attention.inputs[0]), dims(attention.inputs[1]), dims(attention.inputs[2])
        if any(shape is None or not isinstance(shape[1], int) or not isinstance(shape[3], int) for shape in found):
            yield "the heads of its queries, keys and values aren't known"
        if any(_flat(value) is None for value in attention.inputs[:3]):
            yield "its queries, keys and values don't all come from a transposition"
        asked = numbers(match.root.inputs[1])
        if not _merges_heads(match.root) and (asked is None or 0 in asked[2:]):
            yield "what becomes of its result isn't known"

    def rewrite(self, match: Match, build: Builder) -> Any:
        attention = match.named["attention"]
        inputs = [_built(value, build) for value in attention.inputs[:3]]
        heads: list[Any] = [(dims(value) or [])[1] for value in attention.inputs[:2]]
        kept: dict[str, Any] = {name: attribute.value for name, attribute in attention.attributes.items()}
        kept |= {"q_num_heads": heads[0], "kv_num_heads": heads[1]}
        out = build.op("Attention", *inputs, *given(attention)[3:], **kept)
        return out if _merges_heads(match.root) else build.op("Reshape", out, match.root.inputs[1])


def _heads_exchanged(value: Any) -> Any:
    """The Transpose that exchanges heads and positions, where it makes `value`."""
    turn = made_by(value, "Transpose")
    return turn if turn is not None and tuple(turn.attributes.get_ints("perm", ())) == HEADS_FIRST else None


def _merges_heads(reshape: Any) -> bool:
    """[batch, length, heads, depth] → [batch, length, heads · depth]"""
    before, after = dims(reshape.inputs[0]), dims(reshape.outputs[0])
    if before is None or after is None or len(before) != 4:
        return False
    heads, depth = before[2:]
    known = isinstance(heads, int) and isinstance(depth, int)
    return known and follows(list(after), [*before[:2], heads * depth]) and after[2] == heads * depth  # type: ignore[operator]


def _flat(value: Any) -> Any:
    """The Transpose or RotaryEmbedding that a flat operand can be made from; None where it can't."""
    turn = _heads_exchanged(value)
    if turn is not None:
        return turn
    rotary = made_by(value, "RotaryEmbedding")
    if rotary is None or "num_heads" in rotary.attributes or only_user(value) is None:
        return None
    return rotary if _heads_exchanged(rotary.inputs[0]) is not None else None


def _built(value: Any, build: Builder) -> Any:
    """`value` as [batch, length, heads · depth]."""
    origin = _flat(value)
    found: list[Any] = dims(value) or []
    heads, depth = found[1], found[3]
    if origin.op_type == "RotaryEmbedding":
        kept: dict[str, Any] = {name: attribute.value for name, attribute in origin.attributes.items()}
        return build.op("RotaryEmbedding", _built(origin.inputs[0], build), *given(origin)[1:], **kept, num_heads=heads)
    split = made_by(origin.inputs[0], "Reshape")
    before, after = (dims(split.inputs[0]), dims(split.outputs[0])) if split is not None else (None, None)
    if before is not None and after is not None and same_dims(before, [*after[:2], heads * depth]):
        return split.inputs[0]
    return build.op("Reshape", origin.inputs[0], kept_once(build, np.array([0, 0, heads * depth], np.int64)))
