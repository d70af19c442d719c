"""Put rotary position embeddings back together: one RotaryEmbedding where exporters left seven to nine nodes.

Each pair of a head's numbers is turned by an angle that grows with the position (Su and others 2021, section 3.2.2):
(a, b) → (a·cos − b·sin, b·cos + a·sin). Pairs are the i-th numbers of both halves, or neighbours (`interleaved`).

    Add(Mul(x, cos), Mul(Concat(Neg(x[h:]), x[:h]), sin))        becomes        RotaryEmbedding(x, cos[:h], sin[:h])

Found with x as [batch, heads, positions, depth] or [batch, positions, heads, depth]; cosines and sines stored, looked up by
position ids in a stored table, or computed, in full where both numbers of a pair are known to share an angle; the explicit
form on both halves; and only a part of each head turned. In pieces x is read and written seven times. The operator wants
the angles of every item of the batch: where all items share them they are broadcast, once for all layers.

One operator takes 0.17 times the CPU time of the pieces on ONNX Runtime. It doesn't pay on OpenVINO (1.4 to 1.7), which makes
an operator of its own of the pieces and takes this one apart. Types other than float32 and its halves are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._angles import Angles, angles_of
from perwatt.passes._reusing import kept_once, once, sizes
from perwatt.patterns import (
    Either,
    Match,
    Number,
    Op,
    Pattern,
    Var,
    dims,
    given,
    made_by,
    numbers,
    occurrences,
    rank,
    size,
)

TYPES = ("FLOAT", "FLOAT16", "BFLOAT16")


@dataclass(frozen=True)
class FuseRotaryEmbedding(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    roots: ClassVar[tuple[str, ...]] = ("Add", "Concat", "Reshape")
    what: ClassVar[str] = "rotary embeddings put together"
    opset: ClassVar[int] = 23
    operator: ClassVar[str | None] = "RotaryEmbedding"
    depends_on_target: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("fold-shapes",)

    def patterns(self) -> Sequence[Op]:
        return _patterns()

    def find(self, node: Any) -> Iterator[Match]:
        for pattern in self.patterns():
            for match in occurrences(pattern, node):
                if (source := _source(match)) is not None:
                    yield Match(node, match.nodes, match.outputs, {**match.values, "x": source}, match.named)
        partial = _partial(node)
        if partial is not None:
            yield partial

    def check(self, match: Match) -> Iterator[str]:
        if "whole" in match.values:
            return
        found, x = dims(match["x"]), match["x"]
        if found is None or len(found) != 4 or not isinstance(found[-1], int) or x.dtype is None:
            yield "the shape of what it turns isn't known, or has other than four axes"
            return
        if x.dtype.name not in TYPES:
            yield f"RotaryEmbedding does not take {x.dtype.name.lower()}"
        cos, sin = _angles(match)
        reason = next((each for each in (cos, sin) if isinstance(each, str)), None)
        if reason is not None:
            yield reason
            return
        assert isinstance(cos, Angles) and isinstance(sin, Angles)
        if (cos.last, cos.batch) != (sin.last, sin.batch):
            yield "its cosines and sines have different shapes"
        if cos.last and not isinstance(found[2], int):
            yield "its number of heads isn't known"
        if cos.batch == 1 and found[0] is None:
            yield "the batch of what it turns isn't known"

    def rewrite(self, match: Match, build: Builder) -> Any:
        if "whole" in match.values:
            return _of_the_whole(match, build)
        x, (cos, sin) = match["x"], _angles(match)
        found = dims(x)
        assert found is not None and isinstance(cos, Angles) and isinstance(sin, Angles), "check lets nothing else pass"
        interleaved = 1 if _interleaved(match) else None
        inputs = _caches(x, cos, sin, build)
        if not cos.last:
            return build.op("RotaryEmbedding", x, *inputs, interleaved=interleaved)
        heads, depth = found[2:]
        flat = build.op("Reshape", x, kept_once(build, np.array([0, 0, -1], np.int64)))
        turned = build.op("RotaryEmbedding", flat, *inputs, num_heads=heads, interleaved=interleaved)
        return build.op("Reshape", turned, kept_once(build, np.array([0, 0, heads, depth], np.int64)))


# Pictures -------------------------------------------------------------------------------------------------------------


@cache
def _patterns() -> tuple[Op, ...]:
    x, cos, sin = Var("turned"), Var("cos"), Var("sin")
    first, second = Var("first", _is_piece), Var("second", _is_piece)
    minus = Either(Op("Neg", second), Op("Mul", second, Number(-1)))
    halves = Op("Concat", minus, first, where=_on_last_axis)
    real = Op("Sub", Op("Mul", first, cos), Op("Mul", second, sin))
    imaginary = Op("Add", Op("Mul", second, cos), Op("Mul", first, sin))
    return (
        Op("Add", Op("Mul", x, cos), Op("Mul", halves, sin), name="halves"),
        Op("Add", Op("Mul", x, cos), Op("Mul", _interleave(minus, first), sin), name="pairs"),
        Op("Concat", real, imaginary, name="explicit halves", where=_on_last_axis),
        _interleave(real, imaginary, "explicit pairs"),
    )


def _interleave(even: Pattern, odd: Pattern, name: str | None = None) -> Op:
    """Two tensors stacked on a new last axis, which is then merged into the one before."""
    stack = Op("Concat", Op("Unsqueeze", even, ..., where=_adds_last_axis), Op("Unsqueeze", odd, ..., where=_adds_last_axis),
               where=_on_last_axis)  # fmt: skip
    return Op("Reshape", stack, ..., name=name, where=_merges_last_axes)


def _interleaved(match: Match) -> bool:
    return any("pairs" in name for name in match.named)


def _source(match: Match) -> Any:
    """What is turned, where the two pieces are those that go together; else None."""
    first, second = _piece(match["first"]), _piece(match["second"])
    if first is None or second is None or first[0] is not second[0] or match.get("turned") not in (None, first[0]):
        return None
    depth = size(first[0], -1)
    if depth is None or depth % 2:
        return None
    half = depth // 2
    expected = ((0, depth, 2), (1, depth, 2)) if _interleaved(match) else ((0, half, 1), (half, depth, 1))
    return first[0] if (first[1:], second[1:]) == expected else None


def _partial(node: Any) -> Match | None:
    """The end of each head left as it is, behind a RotaryEmbedding of its beginning."""
    inputs = given(node)
    turn = made_by(inputs[0], "RotaryEmbedding") if node.op_type == "Concat" and _on_last_axis(node) else None
    if turn is None or rank(turn.inputs[0]) != 4 or turn.attributes.get_int("rotary_embedding_dim", 0):
        return None
    start, rest = _piece(turn.inputs[0]), _piece(inputs[1])
    if start is None or rest is None or start[0] is not rest[0]:
        return None
    depth, end = size(start[0], -1), start[2]
    if depth is None or start[1:] != (0, end, 1) or rest[1:] != (end, depth, 1):
        return None
    return Match(node, (node, turn), (node.outputs[0],), {"whole": start[0]}, {"turn": turn})


def _of_the_whole(match: Match, build: Builder) -> Any:
    turn = match.named["turn"]
    interleaved = turn.attributes.get_int("interleaved", 0) or None
    turned, inputs = size(turn.inputs[0], -1), given(turn)[1:]
    return build.op(
        "RotaryEmbedding", match["whole"], *inputs, rotary_embedding_dim=turned, interleaved=interleaved
    )  # fmt: skip


def _is_piece(value: Any) -> bool:
    return _piece(value) is not None


def _piece(value: Any) -> tuple[Any, int, int, int] | None:
    """(whole, start, end, step) along the last axis, where `value` is such a piece of another."""
    node = value.producer() if value is not None else None
    if node is None or node.domain != "":
        return None
    if node.op_type == "Slice":
        return _sliced(node)
    if node.op_type == "Split":
        return _split(node, value)
    if node.op_type == "Gather":
        return _picked(node)
    return None


def _sliced(node: Any) -> tuple[Any, int, int, int] | None:
    inputs = given(node)
    depth, axes = size(inputs[0], -1), rank(inputs[0])
    parts = [numbers(each) for each in inputs[1:]]
    if depth is None or axes is None or len(parts) < 3 or any(part is None or len(part) != 1 for part in parts):
        return None
    (start,), (end,), (axis,), (step,) = (
        *(part or [] for part in parts[:3]),
        (parts[3] if len(parts) > 3 else [1]) or [1],
    )
    if axis not in (-1, axes - 1) or step < 1:
        return None
    start, end = (min(max(n + depth if n < 0 else n, 0), depth) for n in (start, end))
    return inputs[0], start, end, step


def _split(node: Any, value: Any) -> tuple[Any, int, int, int] | None:
    whole = node.inputs[0]
    lengths, axes = [size(each, -1) for each in node.outputs], rank(whole)
    axis, place = node.attributes.get_int("axis", 0), value.index()
    if axes is None or axis not in (-1, axes - 1) or any(length is None for length in lengths):
        return None
    start = sum(length or 0 for length in lengths[:place])
    return whole, start, start + (lengths[place] or 0), 1


def _picked(node: Any) -> tuple[Any, int, int, int] | None:
    """One of each pair: [.., depth] → [.., depth/2, 2] → [.., depth/2]"""
    pairs, pick = node.inputs[0], numbers(node.inputs[1])
    whole, axes = made_by(pairs, "Reshape"), rank(pairs)
    if whole is None or axes is None or rank(node.inputs[1]) != 0 or pick is None or pick[0] not in (0, 1, -1):
        return None
    found, depth = dims(pairs) or [], size(whole.inputs[0], -1)
    if node.attributes.get_int("axis", 0) not in (-1, axes - 1) or depth is None or found[-2:] != [depth // 2, 2]:
        return None
    return whole.inputs[0], pick[0] % 2, depth, 2


def _on_last_axis(node: Any) -> bool:
    axes = rank(node.inputs[0]) or rank(node.outputs[0])
    return len(node.inputs) == 2 and node.attributes.get_int("axis", 0) in (-1, (axes or 0) - 1)


def _adds_last_axis(node: Any) -> bool:
    axes, added = rank(node.inputs[0]), numbers(node.inputs[1])
    return added is not None and added in ([-1], [axes])


def _merges_last_axes(node: Any) -> bool:
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    if before is None or after is None or len(before) != len(after) + 1 or not isinstance(before[-2], int):
        return False
    return before[-1] == 2 and after[-1] == 2 * before[-2]


# Angles ---------------------------------------------------------------------------------------------------------------


def _angles(match: Match) -> tuple[Angles | str, Angles | str]:
    """Cosines and sines as the operator takes them, or why they can't be had."""
    full = match.get("turned") is not None
    found = dims(match["x"]) or []
    cos, sin = (angles_of(match[name], found, full, _interleaved(match)) for name in ("cos", "sin"))
    return cos, sin


def _caches(x: Any, cos: Angles, sin: Angles, build: Builder) -> tuple[Any, ...]:
    """The inputs of the operator after x: both tables and the position ids, or cosines and sines of every item."""
    if cos.ids is not None and cos.ids is sin.ids:
        return kept_once(build, cos.table), kept_once(build, sin.table), cos.ids
    batch = (dims(x) or [])[0]
    both = (angles.built(build) for angles in (cos, sin))
    if cos.batch == batch:
        return tuple(both)
    shape = sizes(build, (batch, 1, 1), otherwise=(x, 0))  # type: ignore[arg-type]
    return tuple(once(build, "Expand", each, shape) for each in both)
