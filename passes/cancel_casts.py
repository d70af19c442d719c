"""Cancel casts: to the type that is there already, there and back again, and two that meet once a Reshape is out of the way.

    Cast(x: float → float)                               becomes        x
    Cast(Cast(m: bool → int64) → bool)                   becomes        m
    Cast(Cast(x: float16 → float) → double)              becomes        Cast(x: float16 → double)
    Cast(Transpose(Cast(m: bool → float)) → bool)        becomes        Transpose(m)

Exporters cast for safety, most of all masks and what was computed in half precision. Of two in a row the first may go where
it loses nothing, that is where every number of its source exists in its target; a cast to a narrower type is rounding
that the program wants, and stays. Through operators that only move elements (Reshape, Transpose, Slice, Gather, …) a
cast is carried where it meets another, never else: carried alone it would only make the tensors that are moved larger.

What an integer type makes of a number that it can't hold is left open by the specification: pairs that could show a
difference there stay. Types come from the file or from the operators before; where neither tells them, nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from perwatt.contract import Stage, Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._rearranging import dtype_of
from perwatt.patterns import Match, made_by, only_user

_INTEGERS = {
    "BOOL": {"INT8", "UINT8", "FLOAT16", "BFLOAT16"},
    "INT8": {"INT16", "FLOAT16", "BFLOAT16"},
    "UINT8": {"INT16", "UINT16", "FLOAT16", "BFLOAT16"},
    "INT16": {"INT32", "FLOAT"},
    "UINT16": {"INT32", "UINT32", "FLOAT"},
    "INT32": {"INT64", "DOUBLE"},
    "UINT32": {"INT64", "UINT64", "DOUBLE"},
    "INT64": set(),
    "UINT64": set(),
}
_FLOATS = {"FLOAT16": {"FLOAT"}, "BFLOAT16": {"FLOAT"}, "FLOAT": {"DOUBLE"}, "DOUBLE": set()}
WIDER: dict[str, set[str]] = {**_INTEGERS, **_FLOATS}
"""Types that hold every number of this one, by one step; those of them too, and so on."""

MOVERS = "Reshape|Transpose|Squeeze|Unsqueeze|Flatten|Expand|Slice|Gather|GatherND|GatherElements|Tile|Identity"
"""Operators that move or repeat elements of their first input, and ask nothing of their type."""
_MOST_MOVERS = 16


@dataclass(frozen=True)
class CancelCasts(Fusion):
    """No settings."""

    stage: ClassVar[Stage] = Stage.CLEAN
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=0.0, rtol=0.0)
    after: ClassVar[tuple[str, ...]] = ("simplify-arithmetic",)
    roots: ClassVar[tuple[str, ...]] = ("Cast", "CastLike")
    what: ClassVar[str] = "casts cancelled"

    def find(self, node: Any) -> Iterator[Match]:
        if target(node) is not None and target(node) == dtype_of(node.inputs[0]):
            yield Match(node, (node,), (node.outputs[0],), {"x": node.inputs[0]})
            return
        movers, first = _before(node)
        if first is not None:
            named = {f"mover{i}": mover for i, mover in enumerate(movers)}
            yield Match(node, (node, *movers), (node.outputs[0],), {"x": first.inputs[0]}, {"first": first, **named})

    def check(self, match: Match) -> Iterator[str]:
        first = match.named.get("first")
        if first is None:
            return
        source, between, last = dtype_of(match["x"]), target(first), target(match.root)
        if source is None or between is None or last is None:
            yield "the types of its values aren't known"
        elif not may_skip(source, between, last):
            yield "the first of two casts loses something"

    def rewrite(self, match: Match, build: Builder) -> Any:
        import onnx_ir as ir

        value = match["x"]
        movers = [mover for name, mover in match.named.items() if name != "first"]
        for mover in reversed(movers):
            shape = mover.outputs[0].shape
            value = build.op(mover.op_type, value, *mover.inputs[1:], **_plain(mover))
            value.shape = shape
        last = target(match.root)
        if last is None or last == dtype_of(match["x"]):
            return value
        kept = {name: given for name, given in _plain(match.root).items() if name != "to"}
        value = build.op("Cast", value, to=ir.DataType[last].value, **kept)
        value.type = ir.TensorType(ir.DataType[last])
        return value


def target(node: Any) -> str | None:
    """The type that a Cast or CastLike gives."""
    return dtype_of(node.inputs[1]) if node.op_type == "CastLike" else dtype_of(node.outputs[0])


def _before(node: Any) -> tuple[list[Any], Any]:
    """Movers between `node` and the cast before it, last first, each used by the next alone; and that cast, or None."""
    movers: list[Any] = []
    value = node.inputs[0]
    while len(movers) <= _MOST_MOVERS:
        first = made_by(value, "Cast|CastLike")
        if first is not None:
            return movers, first
        mover = made_by(value, MOVERS)
        if mover is None or only_user(value) is None:
            return [], None
        movers.append(mover)
        value = mover.inputs[0]
    return [], None


def lossless(source: str, to: str) -> bool:
    """Whether every number of one type exists in the other."""
    return source == to or any(lossless(wider, to) for wider in WIDER.get(source, ()))


def may_skip(source: str, between: str, last: str) -> bool:
    """Whether going from `source` to `last` directly gives what going through `between` does, for every number."""
    if not lossless(source, between):
        return False
    if last in ("FLOAT16", "BFLOAT16"):
        # Backends go there through float, which would round a second time what it doesn't hold.
        return lossless(source, "FLOAT")
    through_float = source in _FLOATS or between in _FLOATS
    to_integer = last in _INTEGERS and last != "BOOL"
    return lossless(source, last) if through_float and to_integer else last in WIDER


def _plain(node: Any) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}
