"""Where a tensor need not be repeated, because everybody who uses it would repeat it anyway: used by `fold-shapes`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from perwatt.analysis_content import Affine
from perwatt.analysis_shapes import Facts, Shape, broadcast, same
from perwatt.patterns import given

BROADCASTING = frozenset((
    "Add", "Sub", "Mul", "Div", "Mod", "Pow", "Min", "Max", "Sum", "And", "Or", "Xor", "Where",
    "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual",
))  # fmt: skip
"""Operators that work element by element and repeat axes of size 1 themselves."""
ONE_BY_ONE = frozenset((
    "Cast", "Not", "Neg", "Abs", "Sign", "Floor", "Ceil", "Sqrt", "Reciprocal", "Identity", "IsNaN", "Exp", "Log",
    "Sigmoid", "Tanh", "Relu",
))  # fmt: skip
_FARTHEST = 6
"""Operators between where a tensor is repeated and where that is done anyway."""


def unrepeated(facts: Facts, node: Any) -> tuple[Any, Shape, dict[Any, Shape]] | None:
    """What `node` only repeats along axes of size 1, the shape that is enough instead of the one it makes, and the shapes
    that values have then; None where that isn't all that it does, or where somebody needs all of it."""
    source, out = _repeated(facts, node), node.outputs[0]
    before, after = facts.shape(source) if source is not None else None, facts.shape(out)
    if before is None or after is None or len(before) != len(after):
        return None
    if same(before, after):
        return source, before, {}
    # Not at all, or else only as often as is known.
    some = tuple(two if isinstance(two, int) else one for one, two in zip(before, after, strict=True))
    for shape in (before, some):
        changed: dict[Any, Shape] = {}
        if not same(shape, after) and _bears(facts, out, shape, changed, _FARTHEST):
            return source, shape, changed
    return None


def _repeated(facts: Facts, node: Any) -> Any:
    """The input that a node repeats without changing it."""
    if node.op_type == "Expand":
        return node.inputs[0]
    for source, other in (node.inputs, tuple(node.inputs)[::-1]):
        if _is_all(facts, other, node.op_type == "And"):
            return source
    return None


def _is_all(facts: Facts, value: Any, truth: bool) -> bool:
    """Whether every element of a tensor of booleans is `truth`."""
    content = facts.content(value)
    if isinstance(content, Affine):
        return content.uniform and bool(content.base) == truth
    return content is not None and content.dtype == bool and bool(np.all(content == truth))


def _bears(facts: Facts, value: Any, shape: Shape, changed: dict[Any, Shape], far: int) -> bool:
    """Whether everything stays the same, as far as anybody can see, when `value` has this shape; notes in `changed` which
    values get another one by that."""
    if value.is_graph_output() or not far:
        return False
    changed[value] = shape
    graph = value.producer().graph
    return all(
        use.node.graph is graph and _use_bears(facts, use.node, use.idx, changed, far - 1) for use in value.uses()
    )


def _use_bears(facts: Facts, node: Any, position: int, changed: dict[Any, Shape], far: int) -> bool:
    if node.domain != "":
        return False
    if node.op_type == "Attention" and position == 3:
        return _mask_bears(facts, node, changed[node.inputs[3]])
    shape = _shape_then(facts, node, position, changed)
    out = node.outputs[0]
    now = facts.shape(out)
    if shape is None or now is None or len(shape) != len(now):
        return False
    if same(shape, now):
        return True
    return _bears(facts, out, shape, changed, far)


def _mask_bears(facts: Facts, node: Any, shape: Shape) -> bool:
    """ONNX lets Attention repeat its mask along every axis; ONNX Runtime 1.31 does it for batch and heads alone."""
    now = facts.shape(node.inputs[3])
    return len(shape) == 4 and now is not None and same(shape[2:], now[2:])


def _shape_then(facts: Facts, node: Any, position: int, changed: Mapping[Any, Shape]) -> Shape | None:
    """The shape of a node's output with the changed shapes of its inputs; None where it would do something else."""
    shapes = [changed.get(value, facts.shape(value)) for value in given(node) if value is not None]
    if any(shape is None for shape in shapes):
        return None
    known = [shape for shape in shapes if shape is not None]
    if node.op_type in ONE_BY_ONE:
        return known[0]
    if node.op_type in BROADCASTING:
        return broadcast(known)
    if node.op_type == "Gather" and position == 1 and node.inputs[0] not in changed:
        axis = node.attributes.get_int("axis", 0) % len(known[0])
        return (*known[0][:axis], *known[1], *known[0][axis + 1 :])
    return None
