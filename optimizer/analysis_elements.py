"""The elements of values that arithmetic on shapes computes, where the shapes themselves hold symbols.

`elements(facts, node)` works out what a node's outputs hold from what its inputs hold. An array whose elements are all
known is a NumPy array of its own type; one with expressions in it has dtype object, and None for what isn't known.
`Affine` stands for tensors whose size isn't known: what Range, Expand and sums of them make.

Only operators whose result is the same to the last bit wherever it is computed are here: moving elements, integers and
booleans, and of floating point what IEEE 754 rounds correctly.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from perwatt.analysis_arithmetic import ARITHMETIC, MOST_SYMBOLIC, Rule
from perwatt.analysis_content import (
    Affine,
    Content,
    Shape,
    as_affine,
    as_array,
    numpy_dtype,
    objects,
    spread,
    stretched,
    whole,
)
from perwatt.analysis_facts import Facts
from perwatt.patterns import given


def elements(facts: Facts, node: Any) -> list[Content | None]:
    """What the outputs of a node hold, as far as that is known."""
    if node.op_type == "Split":
        return _split(facts, node)
    rule = _RULES.get(node.op_type)
    if rule is None or _too_large(facts, node.outputs[0]):
        return []
    try:
        return [_settled(facts, node.outputs[0], rule(facts, node))]
    except (IndexError, ValueError, TypeError, OverflowError):
        # What no valid program does (an index out of bounds, shapes that don't fit), or an element that isn't known.
        return []


def _too_large(facts: Facts, value: Any) -> bool:
    size = facts.size(value)
    return isinstance(size, int) and size > facts.limit


def _settled(facts: Facts, value: Any, content: Any) -> Content | None:
    """`content` in the type of `value`: without expressions where all elements are known, an array where it is affine and
    its size is known; None where an element does not fit the type."""
    shape = facts.shape(value)
    dtype = numpy_dtype(facts.dtype(value))
    if content is None or shape is None or dtype is None:
        return None
    if isinstance(content, Affine):
        return spread(content, shape).astype(dtype) if _all_known(content, shape) else content
    content = np.asarray(content)
    if any(isinstance(size, int) and size != real for size, real in zip(shape, content.shape, strict=True)):
        return None
    if content.dtype != object:
        return content if content.dtype == dtype else None
    known = all(isinstance(one, int) for one in content.flat)
    if not known:
        return content if content.size <= MOST_SYMBOLIC else None
    return _in_type(content, dtype)


def _in_type(content: Any, dtype: Any) -> Content | None:
    if dtype.kind == "b":
        return np.asarray(content.astype(bool))
    limits = np.iinfo(dtype)
    return np.asarray(content.astype(dtype)) if all(limits.min <= one <= limits.max for one in content.flat) else None


def _all_known(content: Affine, shape: Shape) -> bool:
    return all(isinstance(number, int) for number in (content.base, *content.strides, *shape))


# Making and moving elements -------------------------------------------------------------------------------------------


def _shape(facts: Facts, node: Any) -> Any:
    shape = facts.shape(node.inputs[0])
    if shape is None:
        return None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
    return objects(shape[slice(start, end)])


def _size(facts: Facts, node: Any) -> Any:
    size = facts.size(node.inputs[0])
    return None if size is None else objects([size]).reshape(())


def _view(facts: Facts, node: Any) -> Any:
    """Reshape and its like: the elements in the same order."""
    content, shape = facts.content(node.inputs[0]), facts.shape(node.outputs[0])
    if isinstance(content, np.ndarray) and (sizes := whole(shape)) is not None:
        return content.reshape(sizes)
    before = facts.shape(node.inputs[0])
    if not isinstance(content, Affine) or shape is None or before is None:
        return None
    if content.uniform:
        return Affine(content.base, (0,) * len(shape))
    long = [(size, stride) for size, stride in zip(before, content.strides, strict=True) if size != 1]
    if [size for size, _ in long] != [size for size in shape if size != 1]:
        return None
    strides = iter(stride for _, stride in long)
    return Affine(content.base, tuple(0 if size == 1 else next(strides) for size in shape))


def _same(facts: Facts, node: Any) -> Any:
    return facts.content(node.inputs[0])


def _transpose(facts: Facts, node: Any) -> Any:
    content, shape = facts.content(node.inputs[0]), facts.shape(node.inputs[0])
    if content is None or shape is None:
        return None
    perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(shape))[::-1]
    if isinstance(content, Affine):
        return Affine(content.base, tuple(content.strides[axis] for axis in perm))
    return np.transpose(content, tuple(perm))


def _expand(facts: Facts, node: Any) -> Any:
    content, shape = facts.content(node.inputs[0]), facts.shape(node.outputs[0])
    before = facts.shape(node.inputs[0])
    if shape is None or before is None or content is None:
        return None
    if isinstance(content, np.ndarray) and (sizes := whole(shape)) is not None:
        return np.broadcast_to(content, sizes)
    return stretched(as_affine(content, before), before, shape)


def _tile(facts: Facts, node: Any) -> Any:
    content, times = facts.content(node.inputs[0]), facts.array(node.inputs[1])
    return np.tile(content, times) if isinstance(content, np.ndarray) and times is not None else None


def _concat(facts: Facts, node: Any) -> Any:
    contents = [facts.content(value) for value in node.inputs]
    parts = [as_array(content, facts.shape(value)) for content, value in zip(contents, node.inputs, strict=True)]
    if all(part is None for part in parts):
        return None
    parts = [_unknown(facts, value) if part is None else part for part, value in zip(parts, node.inputs, strict=True)]
    if any(part is None for part in parts):
        return None
    mixed = any(part.dtype == object for part in parts)
    return np.concatenate([part.astype(object) if mixed else part for part in parts], node.attributes["axis"].as_int())


def _unknown(facts: Facts, value: Any) -> Any:
    """An array of integers that aren't known, as one between others that are; None for other types and sizes."""
    dtype, sizes = numpy_dtype(facts.dtype(value)), whole(facts.shape(value))
    few = sizes is not None and dtype is not None and dtype.kind in "iu" and prod(sizes) <= MOST_SYMBOLIC
    return np.full(sizes, None, dtype=object) if few and sizes is not None else None


def _slice(facts: Facts, node: Any) -> Any:
    content = facts.content(node.inputs[0])
    inputs = given(node)
    lists = [None if value is None else facts.array(value) for value in inputs[1:]]
    if not isinstance(content, np.ndarray) or len(lists) < 2 or any(one is None for one in lists):
        return None
    starts, ends, *rest = (one.reshape(-1).tolist() for one in lists if one is not None)
    axes = rest[0] if rest else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    cuts = [slice(None)] * content.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # Before the first element, going backwards: Python has no number for that.
        backwards = step < 0 and end < -content.shape[axis]
        cuts[axis] = slice(start, None if backwards else end, step)
    return content[tuple(cuts)]


def _split(facts: Facts, node: Any) -> list[Content | None]:
    content = facts.content(node.inputs[0])
    shapes = [facts.shape(value) for value in node.outputs]
    if (
        not isinstance(content, np.ndarray)
        or _too_large(facts, node.inputs[0])
        or any(shape is None for shape in shapes)
    ):
        return []
    axis = node.attributes.get_int("axis", 0)
    sizes = [shape[axis] for shape in shapes if shape is not None]
    if any(not isinstance(size, int) for size in sizes):
        return []
    parts = np.split(content, np.cumsum([int(size) for size in sizes[:-1]]), axis)
    return [_settled(facts, value, part) for value, part in zip(node.outputs, parts, strict=True)]


def _gather(facts: Facts, node: Any) -> Any:
    indices = facts.array(node.inputs[1])
    content = facts.content(node.inputs[0]) if indices is not None else None
    return content.take(indices, node.attributes.get_int("axis", 0)) if isinstance(content, np.ndarray) else None


def _gather_elements(facts: Facts, node: Any) -> Any:
    content, indices = facts.content(node.inputs[0]), facts.array(node.inputs[1])
    axis = node.attributes.get_int("axis", 0)
    if indices is None:
        return None
    if isinstance(content, Affine):
        return Affine(content.base, (0,) * indices.ndim) if content.uniform else None
    if not isinstance(content, np.ndarray):
        return None
    where = list(np.indices(indices.shape))
    where[axis] = indices
    return content[tuple(where)]


def _gather_nd(facts: Facts, node: Any) -> Any:
    content, indices = facts.content(node.inputs[0]), facts.array(node.inputs[1])
    if not isinstance(content, np.ndarray) or indices is None or node.attributes.get_int("batch_dims", 0):
        return None
    return content[tuple(np.moveaxis(indices, -1, 0))]


def _constant_of_shape(facts: Facts, node: Any) -> Any:
    shape = facts.shape(node.outputs[0])
    if shape is None:
        return None
    one = node.attributes["value"].value.numpy() if "value" in node.attributes else np.zeros(1, np.float32)
    if (sizes := whole(shape)) is not None:
        return np.broadcast_to(one.reshape(()), sizes)
    return Affine(int(one.item()), (0,) * len(shape)) if one.dtype.kind in "biu" else None


def _range(facts: Facts, node: Any) -> Any:
    ends = [as_array(facts.content(value), facts.shape(value)) for value in node.inputs]
    if any(end is None or end.dtype.kind not in "iuO" for end in ends):
        return None
    start, stop, step = (end.reshape(-1).tolist()[0] for end in ends)
    if all(isinstance(end, int) for end in (start, stop, step)):
        return np.arange(start, stop, step).astype(numpy_dtype(facts.dtype(node.outputs[0])))
    return None if start is None or step is None else Affine(start, (step,))


def _trilu(facts: Facts, node: Any) -> Any:
    content, inputs = facts.array(node.inputs[0]), given(node)
    offset = facts.array(inputs[1]) if len(inputs) > 1 else np.zeros(1, np.int64)
    if content is None or offset is None:
        return None
    cut = np.triu if node.attributes.get_int("upper", 1) else np.tril
    return cut(content, int(offset.item()))


def _nonzero(facts: Facts, node: Any) -> Any:
    content = facts.array(node.inputs[0])
    return None if content is None or content.ndim == 0 else np.array(np.nonzero(content), dtype=np.int64)


_RULES: dict[str, Rule] = {
    "Shape": _shape, "Size": _size, "Identity": _same, "Transpose": _transpose,
    "Reshape": _view, "Flatten": _view, "Squeeze": _view, "Unsqueeze": _view,
    "Expand": _expand, "Tile": _tile, "Concat": _concat, "Slice": _slice,
    "Gather": _gather, "GatherElements": _gather_elements, "GatherND": _gather_nd,
    "ConstantOfShape": _constant_of_shape, "Range": _range, "Trilu": _trilu, "NonZero": _nonzero,
    **ARITHMETIC,
}  # fmt: skip

__all__ = ["elements"]
