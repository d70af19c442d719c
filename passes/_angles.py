"""Cosines and sines of a rotary embedding in the form that ONNX's operator takes: one number for each pair.

Exporters write them out for both numbers of a pair, [.., depth] long; the operator wants [batch, positions, depth/2], or a table
[positions, depth/2] with position ids. Halving is only right where both numbers of a pair do have the same angle: read from what
is stored, or proved by where it comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perwatt.passes._reusing import kept_once, once
from perwatt.patterns import dims, given, made_by, number, numbers, rank, size, stored

_ELEMENTWISE = frozenset({"Cos", "Sin", "Cast", "Identity"})
_SHAPES = frozenset({"Unsqueeze", "Squeeze", "Reshape", "Expand", "Flatten"})


@dataclass(frozen=True)
class Angles:
    """`batch`: its first axis, 1 where all items share it. `last`: heads come after positions. `array`: what is stored,
    halved. `value`: what is computed, with all axes it has; `step`: every how many numbers one is taken, 0 where all are;
    `depth`: how many numbers are looked at. `table` and `ids`: rows of a stored table, halved, and which are taken."""

    batch: int | str | None
    last: bool
    array: Any = None
    value: Any = None
    step: int = 0
    depth: int = 0
    table: Any = None
    ids: Any = None

    def built(self, build: Any) -> Any:
        """[batch, positions, depth/2]"""
        if self.array is not None:
            return kept_once(build, self.array)
        flat = _without_heads(self, build)
        if not self.step:
            return flat
        end = self.depth if self.step == 2 else self.depth // 2
        bounds = (kept_once(build, np.array([n], np.int64)) for n in (0, end, -1, self.step))
        return once(build, "Slice", flat, *bounds)


def _without_heads(angles: Angles, build: Any) -> Any:
    """[batch, positions, ..]"""
    value, axis = angles.value, 2 if angles.last else 1
    axes = rank(value)
    if axes == 3:
        return value
    if axes == 2:
        return once(build, "Unsqueeze", value, kept_once(build, np.array([0], np.int64)))
    added = made_by(value, "Unsqueeze")
    if added is not None and numbers(added.inputs[1]) in ([axis], [axis - 4]):
        return added.inputs[0]
    return once(build, "Squeeze", value, kept_once(build, np.array([axis], np.int64)))


def angles_of(value: Any, turned: Sequence[Any], full: bool, interleaved: bool) -> Angles | str:
    """The angles in `value`, which turn something of the shape `turned`; `full`: both numbers of a pair have theirs."""
    found, depth = dims(value), turned[-1]
    if found is None or len(found) > 4 or not found:
        return "the shape of its cosines or sines isn't known"
    whole = [1] * (4 - len(found)) + found
    first = whole[1] == 1 and whole[2] is not None and whole[2] == turned[2]
    last = whole[2] == 1 and whole[1] is not None and whole[1] == turned[1]
    shared = whole[0] == 1 or (whole[0] is not None and whole[0] == turned[0])
    if whole[-1] != (depth if full else depth // 2) or not (first or last) or not shared:
        return "its cosines or sines do not have one angle for each position"
    last = not first
    array = stored(value)
    if array is not None:
        array = array.reshape([1] * (4 - array.ndim) + list(array.shape))
        array = array[:, :, 0] if last else array[:, 0]
        if full and not _pairs_agree(array, interleaved):
            return "the two numbers of a pair are turned by different angles"
        return Angles(whole[0], last, array=_halved(array, interleaved) if full else array)
    if full and not paired(value, interleaved, depth):
        return "the two numbers of a pair aren't known to be turned by the same angle"
    if last and len(found) < 4:
        return "its cosines or sines have their positions on an unusual axis"
    table, ids = _looked_up(value, last, turned) or (None, None)
    if table is not None and full:
        table = _halved(table, interleaved)
    step = (2 if interleaved else 1) if full else 0
    return Angles(whole[0], last, value=value, step=step, depth=depth, table=table, ids=ids)


def _looked_up(value: Any, last: bool, turned: Sequence[Any]) -> tuple[Any, Any] | None:
    """(table, position ids) where the angles are rows of a stored table, one for each item and position."""
    added = made_by(value, "Unsqueeze")
    axis = 2 if last else 1
    if added is None or numbers(added.inputs[1]) not in ([axis], [axis - 4]):
        return None
    look = made_by(added.inputs[0], "Gather")
    if look is None or look.attributes.get_int("axis", 0) != 0:
        return None
    table, ids = stored(look.inputs[0]), look.inputs[1]
    fits = dims(ids) == [turned[0], turned[1 if last else 2]] and None not in (dims(ids) or [None])
    whole_numbers = ids.dtype is not None and ids.dtype.name == "INT64"
    return (table, ids) if table is not None and table.ndim == 2 and fits and whole_numbers else None


def _halved(array: Any, interleaved: bool) -> Any:
    return array[..., ::2] if interleaved else array[..., : array.shape[-1] // 2]


def _pairs_agree(array: Any, interleaved: bool) -> bool:
    half = array.shape[-1] // 2
    other = array[..., 1::2] if interleaved else array[..., half:]
    return bool(np.array_equal(_halved(array, interleaved), other))


def paired(value: Any, interleaved: bool, depth: int) -> bool:
    """Whether both numbers of every pair along the last axis are the same, whatever the input."""
    array = stored(value)
    if array is not None:
        return bool(array.ndim and array.shape[-1] == depth and _pairs_agree(array, interleaved))
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or node.outputs[0] is not value:
        return False
    inputs = given(node)
    if node.op_type in _ELEMENTWISE:
        return paired(inputs[0], interleaved, depth)
    if node.op_type in ("Mul", "Div"):
        plain = [each for each in inputs if number(each) is None]
        return len(plain) == 1 and paired(plain[0], interleaved, depth)
    if node.op_type == "Concat" and not interleaved:
        ends = node.attributes.get_int("axis") in (-1, (rank(value) or rank(inputs[0]) or 0) - 1)
        return ends and len(inputs) == 2 and inputs[0] is inputs[1]
    if node.op_type == "Gather":
        rows = node.attributes.get_int("axis", 0) == 0 and (rank(inputs[0]) or 0) > 1
        return rows and paired(inputs[0], interleaved, depth)
    if node.op_type == "Slice":
        axes = numbers(inputs[3]) if len(inputs) > 3 else None
        elsewhere = axes is not None and not {-1, (rank(inputs[0]) or 0) - 1} & set(axes)
        return elsewhere and paired(inputs[0], interleaved, depth)
    if node.op_type not in _SHAPES:
        return False
    if interleaved and _repeats_each(node):
        return True
    return size(inputs[0], -1) == size(value, -1) == depth and paired(inputs[0], interleaved, depth)


def _repeats_each(node: Any) -> bool:
    """[.., n] → [.., n, 1] → [.., n, 2] → [.., 2n]"""
    stack = made_by(node.inputs[0], "Expand|Tile|Concat") if node.op_type == "Reshape" else None
    if stack is None or (stack.op_type == "Concat" and any(each is not stack.inputs[0] for each in stack.inputs)):
        return False
    single, double, merged = dims(stack.inputs[0]), dims(stack.outputs[0]), dims(node.outputs[0])
    if (
        single is None
        or double is None
        or merged is None
        or len(single) != len(double)
        or len(double) != len(merged) + 1
    ):
        return False
    times = isinstance(double[-2], int) and merged[-1] == 2 * double[-2]
    return times and single[-1] == 1 and double[-1] == 2 and single[-2] == double[-2]
