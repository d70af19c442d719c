"""Operators that can compute in any order of axes, and what has to change in them for that.

`flexible(node)` says whether a node is one; `turn` makes it compute on axes in another order. An order is a permutation as
Transpose has it: axis i of what is turned is axis `order[i]` of what was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perwatt.fusion import Builder
from perwatt.passes._rearranging import BROADCASTING, UNARY
from perwatt.patterns import axes_of, given, is_stored, number, numbers, rank, stored

Order = Sequence[int]


@dataclass(frozen=True)
class Flexible:
    """`follows`: the inputs that have to come in the new order. `gives`: whether the outputs are in that order too (they
    aren't where the axes that moved are reduced away). `allows`: the orders that the node can take on. `change`: what
    else has to change in it, done in place."""

    follows: tuple[int, ...]
    allows: Callable[[Order], bool] = lambda order: True
    change: Callable[[Any, Order, Builder], None] = lambda node, order, build: None
    gives: bool = True


def flexible(node: Any) -> Flexible | None:
    """How a node can compute on axes in another order; None where it can't, or where that isn't known."""
    if node.domain != "" or any(output.uses() or output.is_graph_output() for output in _side_outputs(node)):
        return None
    kind = node.op_type
    if kind in UNARY or kind == "Dropout":
        return Flexible((0,))
    if kind in BROADCASTING:
        return _broadcasting(node)
    maker = _MAKERS.get(kind)
    return maker(node, axes) if maker and (axes := rank(node.inputs[0])) else None


def turn(node: Any, order: Order, build: Builder, how: Flexible) -> None:
    """Change a node whose following inputs are in the new order already; shapes of its outputs included."""
    import onnx_ir as ir

    how.change(node, order, build)
    for output in node.outputs if how.gives else ():
        if output.shape is not None:
            output.shape = ir.Shape([output.shape[axis] for axis in order])


def _side_outputs(node: Any) -> Sequence[Any]:
    return () if node.op_type == "Split" else node.outputs[1:]


# Kinds of operators ---------------------------------------------------------------------------------------------------


def _broadcasting(node: Any) -> Flexible | None:
    values = given(node)
    computed = [index for index, value in enumerate(values) if not is_stored(value)]
    ranks = {rank(values[index]) for index in computed}
    follows = tuple(index for index in computed if rank(values[index]) != 0)
    axes = ranks - {0}
    if None in axes or len(axes) != 1 or any((rank(v) or 0) > max(a or 0 for a in axes) for v in values):
        return None
    return Flexible(follows, change=_turn_stored)


def _turn_stored(node: Any, order: Order, build: Builder) -> None:
    """Stored operands in the new order; one number stays as it is, and so does everything that lies along no axis."""
    for index, value in enumerate(node.inputs):
        if value is not None and is_stored(value) and number(value) is None:
            array = stored(value)
            whole = array.reshape([1] * (len(order) - array.ndim) + list(array.shape)).transpose(order)
            while whole.shape[:1] == (1,):
                whole = whole[0]
            node.replace_input_with(index, build.constant(np.ascontiguousarray(whole), value.name))


def _along_one_axis(default: int) -> Callable[[Any, int], Flexible]:
    """Softmax and its like: an attribute names the axis."""
    return lambda node, axes: Flexible((0,), change=lambda n, order, build: _turn_axis(n, order, default))


def _turn_axis(node: Any, order: Order, default: int) -> None:
    import onnx_ir as ir

    axis = node.attributes.get_int("axis", default) % len(order)
    node.attributes["axis"] = ir.AttrInt64("axis", list(order).index(axis))


def _concat(node: Any, axes: int) -> Flexible | None:
    computed = tuple(index for index, value in enumerate(node.inputs) if not is_stored(value))

    def change(node: Any, order: Order, build: Builder) -> None:
        for index, value in enumerate(node.inputs):
            if index not in computed:
                turned = np.ascontiguousarray(stored(value).transpose(order))
                node.replace_input_with(index, build.constant(turned, value.name))
        _turn_axis(node, order, 0)

    return Flexible(computed, change=change) if computed else None


def _reduction(node: Any, axes: int) -> Flexible | None:
    reduced = [node.attributes.get_int("axis", 0)] if node.op_type in ("ArgMax", "ArgMin") else axes_of(node)
    if reduced is None or (not reduced and node.attributes.get_int("noop_with_empty_axes", 0)):
        return None
    gone = {axis % axes for axis in reduced} or set(range(axes))
    keeps = bool(node.attributes.get_int("keepdims", 1))

    def allows(order: Order) -> bool:
        left = [axis for axis in order if axis not in gone]
        return keeps or left == sorted(left)

    def change(node: Any, order: Order, build: Builder) -> None:
        _write_axes(node, [list(order).index(axis % axes) for axis in reduced], build)

    return Flexible((0,), allows, change, gives=keeps)


def _write_axes(node: Any, axes: list[int], build: Builder) -> None:
    import onnx_ir as ir

    if "axis" in node.attributes or node.op_type in ("ArgMax", "ArgMin"):
        node.attributes["axis"] = ir.AttrInt64("axis", axes[0])
    elif "axes" in node.attributes:
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)
    elif axes:
        node.replace_input_with(1, build.constant(np.array(axes, np.int64), f"{node.outputs[0].name}_axes"))


def _slice(node: Any, axes: int) -> Flexible | None:
    inputs = given(node)
    starts = numbers(inputs[1]) if len(inputs) > 1 else None
    named = numbers(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts or ()))) or None
    # An axes input that is missing can't be added in place where nothing follows it.
    if named is None or len(node.inputs) < 4:
        return None

    def change(node: Any, order: Order, build: Builder) -> None:
        turned = [list(order).index(axis % axes) for axis in named]
        node.replace_input_with(3, build.constant(np.array(turned, np.int64), f"{node.outputs[0].name}_axes"))

    return Flexible((0,), change=change)


def _pad(node: Any, axes: int) -> Flexible | None:
    inputs = given(node)
    pads = numbers(inputs[1]) if len(inputs) > 1 else None
    if pads is None or len(inputs) > 3 or len(pads) != 2 * axes:
        return None

    def change(node: Any, order: Order, build: Builder) -> None:
        turned = [pads[axis] for axis in order] + [pads[axes + axis] for axis in order]
        node.replace_input_with(1, build.constant(np.array(turned, np.int64), f"{node.outputs[0].name}_pads"))

    return Flexible((0,), change=change)


def _quantization(node: Any, axes: int) -> Flexible | None:
    if node.attributes.get_int("block_size", 0):
        return None
    if rank(node.inputs[1]) == 0:
        return Flexible((0,))
    one_axis = rank(node.inputs[1]) == 1
    return Flexible((0,), change=lambda n, order, build: _turn_axis(n, order, 1)) if one_axis else None


def _last_axes_stay(node: Any, axes: int) -> Flexible:
    """Normalizations over the last axes: those before may change places."""
    first = node.attributes.get_int("axis", -1) % axes
    return Flexible((0,), lambda order: list(order[first:]) == list(range(first, axes)))


def _first_axes_stay(node: Any, axes: int) -> Flexible:
    """Normalizations of channels, which are axis 1: the others may change places."""
    return Flexible((0,), lambda order: list(order[:2]) == [0, 1])


def _product(node: Any, axes: int) -> Flexible | None:
    """A product with a stored matrix works along the last axis."""
    matrix = is_stored(node.inputs[1]) and rank(node.inputs[1]) == 2
    return Flexible((0,), lambda order: order[-1] == axes - 1) if matrix and axes > 2 else None


_MAKERS: dict[str, Callable[[Any, int], Flexible | None]] = {
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "LpNormalization"), _along_one_axis(-1)),
    "Split": _along_one_axis(0),
    "Concat": _concat,
    **dict.fromkeys(
        ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
         "ReduceLogSum", "ReduceLogSumExp", "ArgMax", "ArgMin"), _reduction
    ),
    "Slice": _slice,
    "Pad": _pad,
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantization),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _last_axes_stay),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization", "GroupNormalization"), _first_axes_stay),
    "MatMul": _product,
}  # fmt: skip
