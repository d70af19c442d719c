"""Shapes that ONNX's own inference leaves open, because it doesn't know what a sum or product of symbols is.

Each rule gives the sizes of a node's first output, None for each that it can't say; or None for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from perwatt.analysis_content import Shape
from perwatt.analysis_expressions import Number, at_least, capped, equal, maximum, minimum, product, quotient
from perwatt.analysis_facts import Facts, axes_named, listed
from perwatt.patterns import given

_TO_THE_END = 2**31 - 1
"""What exporters write for the end of an axis, or more."""

Rule = Callable[[Facts, Any], "Sequence[Number | None] | None"]


def broadcast(shapes: Sequence[Sequence[Number]]) -> Shape | None:
    """The shape that tensors of these shapes have together; None where that depends on what is fed."""
    rank = max(map(len, shapes))
    result: list[Number] = []
    for axis in range(-rank, 0):
        sizes = {shape[axis] for shape in shapes if len(shape) >= -axis} - {1}
        sizes -= {size for size in sizes if any(_no_longer(size, other) for other in sizes)}
        fixed = {size for size in sizes if isinstance(size, int)}
        # Beside a size above 1 a symbol is that size or 1.
        if len(fixed) > 1 or (not fixed and len(sizes) > 1):
            return None
        result.append(next(iter(fixed or sizes), 1))
    return tuple(result)


def _no_longer(size: Number, other: Number) -> bool:
    """Whether `size` is `other`, cut off at something above 0: beside `other`, a valid program has the same or 1 there."""
    caps = capped(size)
    return other in caps and all(cap == other or at_least(cap, 1) for cap in caps)


def _reshape(facts: Facts, node: Any) -> Sequence[Number | None] | None:
    asked, shape = listed(facts, node, 1), facts.shape(node.inputs[0])
    if asked is None:
        return None
    sizes = [_asked_size(node, shape, axis, size) for axis, size in enumerate(asked)]
    if sizes.count(None) != 1 or shape is None:
        return sizes
    # The one that is left makes up for the rest. Where it was written as -1, the rest can't be 0; otherwise that takes proof.
    missing, rest = sizes.index(None), [size for size in sizes if size is not None]
    if asked[missing] == -1 or all(_not_zero(size) for size in rest):
        sizes[missing] = _ratio(shape, rest)
    return sizes


def _asked_size(node: Any, shape: Shape | None, axis: int, size: Number | None) -> Number | None:
    """What one element of Reshape's second input stands for; None where that isn't known by itself."""
    if size is None or not at_least(size, 0):
        return None
    if node.attributes.get_int("allowzero", 0) or at_least(size, 1):
        return size
    # 0 takes over the input's axis. Where a symbol may be 0, that must be what the input has there then.
    before = shape[axis] if shape is not None and axis < len(shape) else None
    if size == 0:
        return before
    return size if before is not None and quotient(before, size) is not None else None


def _not_zero(size: Number) -> bool:
    return equal(size, 0) is False


def _ratio(whole: Sequence[Number], parts: Sequence[Number]) -> Number | None:
    """The product of `whole` over the product of `parts`; None where that is no expression."""
    above, below = list(whole), []
    for size in parts:
        if size in above:
            above.remove(size)
        else:
            below.append(size)
    return quotient(product(above), product(below))


def _flatten(facts: Facts, node: Any) -> Sequence[Number | None] | None:
    shape = facts.shape(node.inputs[0])
    if shape is None:
        return None
    axis = node.attributes.get_int("axis", 1)
    # slice() would take axis 0 of -0 for the start; -rank … rank are allowed.
    axis += len(shape) if axis < 0 else 0
    return product(shape[:axis]), product(shape[axis:])


def _concat(facts: Facts, node: Any) -> Sequence[Number | None] | None:
    shapes = [facts.shape(value) for value in node.inputs]
    first = shapes[0]
    if first is None or any(shape is None or len(shape) != len(first) for shape in shapes):
        return None
    axis = node.attributes["axis"].as_int() % len(first)
    total: Number = 0
    for shape in shapes:
        total = total + shape[axis] if shape is not None else total
    # The other axes agree; one that is a number says most.
    rest = [next((s[i] for s in shapes if s and isinstance(s[i], int)), first[i]) for i in range(len(first))]
    return [total if i == axis else rest[i] for i in range(len(first))]


def _expand(facts: Facts, node: Any) -> Sequence[Number | None] | None:
    shape, asked = facts.shape(node.inputs[0]), listed(facts, node, 1)
    if shape is None or asked is None:
        return None
    rank = max(len(shape), len(asked))
    have, want = (1,) * (rank - len(shape)) + shape, [1] * (rank - len(asked)) + asked
    pairs = zip(have, want, strict=True)
    return [None if two is None or (both := broadcast([[one], [two]])) is None else both[0] for one, two in pairs]


def _constant_of_shape(facts: Facts, node: Any) -> Sequence[Number | None] | None:
    asked = listed(facts, node, 0)
    return asked and [size if size is not None and at_least(size, 0) else None for size in asked]


def _range(facts: Facts, node: Any) -> Sequence[Number | None] | None:
    ends = [listed(facts, node, position) for position in range(3)]
    if any(end is None or len(end) != 1 or end[0] is None for end in ends):
        return None
    start, stop, step = (end[0] for end in ends if end is not None)
    if start is None or stop is None or step != 1:
        return None
    return (maximum(stop - start, 0),)


def _tile(facts: Facts, node: Any) -> Sequence[Number | None] | None:
    shape, times = facts.shape(node.inputs[0]), listed(facts, node, 1)
    if shape is None or times is None or len(shape) != len(times):
        return None
    return [None if many is None else size * many for size, many in zip(shape, times, strict=True)]


def _pad(facts: Facts, node: Any) -> Sequence[Number | None] | None:
    shape, pads, axes = facts.shape(node.inputs[0]), listed(facts, node, 1), axes_named(facts, node, 3)
    if shape is None or pads is None or axes is None or len(pads) != 2 * len(axes) or any(pad is None for pad in pads):
        return None
    sizes = list(shape)
    for position, axis in enumerate(axes):
        before, after = pads[position], pads[position + len(axes)]
        assert before is not None and after is not None
        sizes[axis] = sizes[axis] + before + after
    return sizes


def _slice(facts: Facts, node: Any) -> Sequence[Number | None] | None:
    shape, axes = facts.shape(node.inputs[0]), axes_named(facts, node, 3)
    if shape is None or axes is None:
        return None
    starts, ends = listed(facts, node, 1), listed(facts, node, 2)
    steps = listed(facts, node, 4) if len(given(node)) > 4 else [1] * len(axes)
    sizes: list[Number | None] = list(shape)
    for position, axis in enumerate(axes):
        cut = [many[position] if many is not None and position < len(many) else None for many in (starts, ends, steps)]
        sizes[axis] = _cut(shape[axis], *cut)
    return sizes


def _cut(size: Number, start: Number | None, end: Number | None, step: Number | None) -> Number | None:
    """How much of an axis lies between two ends, in steps of 1."""
    if start is None or end is None or step != 1:
        return None
    first, last = _position(size, start), _position(size, end)
    return None if first is None or last is None else maximum(last - first, 0)


def _position(size: Number, end: Number) -> Number | None:
    """The place on an axis of `size` that an end of a slice names; None where that can't be said."""
    if at_least(end, 0):
        return size if isinstance(end, int) and end >= _TO_THE_END else minimum(end, size)
    if not isinstance(end, int):
        return None
    return 0 if end <= -_TO_THE_END else maximum(size + end, 0)


RULES: dict[str, Rule] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Concat": _concat,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Tile": _tile,
    "Pad": _pad,
    "Slice": _slice,
}
