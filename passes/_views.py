"""Which nodes only look at a tensor in another way, or in no other way at all: used by `fold-shapes`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from perwatt.analysis_content import Affine, as_affine
from perwatt.analysis_expressions import Number, equal, product
from perwatt.analysis_shapes import Facts, Shape, same
from perwatt.patterns import given, made_by

VIEWS = "Reshape|Flatten|Squeeze|Unsqueeze|Identity"
"""Operators that keep the elements and their order."""


def views(value: Any) -> Iterator[Any]:
    """The values with the same elements in the same order that `value` was made from, the nearest first."""
    while (node := made_by(value, VIEWS)) is not None:
        value = node.inputs[0]
        yield value


def unchanged(facts: Facts, node: Any) -> Any:
    """The value that the output of `node` always equals; None where there is none, or that can't be proved."""
    rule = _UNCHANGED.get(node.op_type)
    if rule is None or len(node.outputs) != 1:
        return None
    shape = facts.shape(node.outputs[0])
    if node.op_type in VIEWS:
        return next((value for value in views(node.outputs[0]) if same(facts.shape(value), shape)), None)
    return node.inputs[0] if rule(facts, node) and same(facts.shape(node.inputs[0]), shape) else None


def _always(facts: Facts, node: Any) -> bool:
    return True


def _forwards(facts: Facts, node: Any) -> bool:
    """A slice as long as the axis may still go backwards."""
    inputs = given(node)
    steps = facts.array(inputs[4]) if len(inputs) > 4 else np.ones(1)
    return steps is not None and bool(np.all(steps == 1))


def _once(facts: Facts, node: Any) -> bool:
    """An axis of size 0 has the same size after any number of times, but then there is nothing to repeat."""
    times = facts.array(node.inputs[1])
    return times is not None and bool(np.all(times == 1))


def _nothing_added(facts: Facts, node: Any) -> bool:
    """What is added at one end may be taken away at the other."""
    pads = facts.array(node.inputs[1]) if len(given(node)) > 1 else None
    return pads is not None and bool(np.all(pads == 0))


def _same_order(facts: Facts, node: Any) -> bool:
    perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else ()
    return len(perm) > 0 and list(perm) == sorted(perm)


_UNCHANGED = {
    "Reshape": _always, "Flatten": _always, "Squeeze": _always, "Unsqueeze": _always, "Expand": _always,
    "Slice": _forwards, "Tile": _once, "Pad": _nothing_added, "Transpose": _same_order,
}  # fmt: skip


def inserted_axes(before: Shape | None, after: Shape | None) -> list[int] | None:
    """The axes of size 1 by which `after` is longer than `before`; None where they differ in more."""
    if before is None or after is None:
        return None
    rest, axes = list(before), []
    for axis, size in enumerate(after):
        if rest and rest[0] == size:
            rest.pop(0)
        elif size == 1:
            axes.append(axis)
        else:
            return None
    return None if rest else axes


def shape_input(before: Shape | None, after: Shape | None, asked: Any = None) -> list[int] | None:
    """What Reshape has to be given to turn `before` into `after`, with allowzero 0; None where more than one size is
    neither known nor the one that the axis has, or where -1 might have to make up for a rest of 0. `asked`: what the
    Reshape is given now; where it says -1 already, that can't be worse."""
    if before is None or after is None:
        return None
    target: list[int] = []
    for axis, size in enumerate(after):
        stays = axis < len(before) and before[axis] == size
        if isinstance(size, int) and size != 0:
            target.append(size)
        else:
            target.append(0 if stays else -1)
    missing = [axis for axis, size in enumerate(target) if size == -1]
    if not missing:
        return target
    rest = [size for axis, size in enumerate(after) if axis != missing[0]]
    safe = all(equal(size, 0) is False for size in rest) or _says(asked, missing[0])
    return target if len(missing) == 1 and after[missing[0]] != 0 and safe else None


def _says(asked: Any, axis: int) -> bool:
    return isinstance(asked, np.ndarray) and asked.ndim == 1 and axis < asked.size and asked[axis] == -1


def reordered(facts: Facts, node: Any) -> Any:
    """The tensor whose elements a Gather or GatherND takes all, once, and in their order; None where it may not."""
    data, shape = node.inputs[0], facts.shape(node.inputs[0])
    counted = _counted(facts, node)
    if shape is None or counted is None:
        return None
    indices, sizes, taken = counted
    return data if indices.base == 0 and _in_order(indices, sizes) and product(sizes) == product(taken) else None


def _counted(facts: Facts, node: Any) -> tuple[Affine, Shape, Shape] | None:
    """The place that each index names when the axes that are indexed are laid out in a row, the shape of the indices, and
    those axes."""
    shape, sizes = facts.shape(node.inputs[0]), facts.shape(node.inputs[1])
    if shape is None or sizes is None:
        return None
    if node.op_type == "Gather":
        axis = node.attributes.get_int("axis", 0) % len(shape)
        found = as_affine(facts.content(node.inputs[1]), sizes)
        return None if found is None else (found, sizes, (shape[axis],))
    parts = _coordinates(facts, node.inputs[1])
    if parts is None or node.attributes.get_int("batch_dims", 0) or len(parts) > len(shape):
        return None
    total, step = Affine(0, (0,) * (len(sizes) - 1)), product(())
    for axis in range(len(parts) - 1, -1, -1):
        part = parts[axis]
        if part.base != 0:
            return None
        total = Affine(0, tuple(a + b * step for a, b in zip(total.strides, part.strides[:-1], strict=True)))
        step = step * shape[axis]
    return total, sizes[:-1], shape[: len(parts)]


def _coordinates(facts: Facts, value: Any) -> list[Affine] | None:
    """The coordinates that GatherND's indices hold along their last axis, where they are put together one by one."""
    node = made_by(value, "Concat")
    rank = len(facts.shape(value) or ())
    if node is None or node.attributes["axis"].as_int() not in (-1, rank - 1):
        return None
    parts = [as_affine(facts.content(one), facts.shape(one)) for one in node.inputs]
    single = all((facts.shape(one) or (0,))[-1] == 1 for one in node.inputs)
    return [part for part in parts if part is not None] if single and None not in parts else None


def _in_order(indices: Affine, sizes: Sequence[Number]) -> bool:
    """Whether the places count 0, 1, 2, … through the indices."""
    step: Number = 1
    for stride, size in zip(indices.strides[::-1], tuple(sizes)[::-1], strict=True):
        if size != 1 and stride != step:
            return False
        step = step * size
    return True
