"""How the elements of a value are written down where some of them are expressions, or their number isn't known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perwatt.analysis_expressions import Number

Shape = tuple[Number, ...]
EXACT = "biuf"
"""Kinds of NumPy types that are computed with; others (bfloat16, 8-bit floats, strings) are left alone."""


@dataclass(frozen=True, eq=False)
class Affine:
    """An integer or boolean tensor whose element at [i, j, …] is base + strides[0]·i + strides[1]·j + …"""

    base: Number
    strides: tuple[Number, ...]

    @property
    def uniform(self) -> bool:
        """Whether all elements are the same."""
        return all(stride == 0 for stride in self.strides)


Content = np.ndarray[Any, Any] | Affine


def as_affine(content: Content | None, shape: Shape | None) -> Affine | None:
    """The content as base and strides; None where it has no such form."""
    if isinstance(content, Affine) or content is None or shape is None:
        return content if isinstance(content, Affine) else None
    if content.dtype.kind not in "biuO" or content.dtype == np.uint64 or content.size == 0:
        return None
    if content.dtype == object:
        one = content.reshape(-1)[0]
        return Affine(one, (0,) * content.ndim) if content.size == 1 and one is not None else None
    base = int(content.flat[0])
    steps = [np.take(content, 1, axis) if size > 1 else content for axis, size in enumerate(content.shape)]
    strides = tuple(int(step.flat[0]) - base for step in steps)
    found = Affine(base, strides)
    return found if np.array_equal(spread(found, content.shape), content) else None


def spread(content: Affine, shape: Any) -> Any:
    """The elements of a tensor whose shape, base and strides are known, as 64-bit integers."""
    grid = np.full(shape, content.base, np.int64)
    strides: Any = content.strides
    for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        grid += (np.arange(size) * stride).reshape(-1, *[1] * (len(shape) - axis - 1))
    return grid


def numpy_dtype(dtype: int | None) -> Any:
    """NumPy's type for ONNX's number of one; None where it isn't computed with."""
    import onnx_ir as ir

    if dtype is None or dtype == ir.DataType.STRING:
        return None
    try:
        found = np.dtype(ir.DataType(dtype).numpy())
    except TypeError:
        return None
    return found if found.kind in EXACT else None


def objects(items: Sequence[Any]) -> Any:
    """A list as an array of objects."""
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def stretched(content: Affine | None, before: Shape, shape: Shape) -> Affine | None:
    """`content` broadcast from one shape to another."""
    if content is None:
        return None
    strides: list[Number] = [0] * (len(shape) - len(before))
    for size, stride, target in zip(before, content.strides, shape[len(strides) :], strict=True):
        if stride != 0 and size != 1 and size != target:
            return None
        strides.append(0 if size == 1 else stride)
    return Affine(content.base, tuple(strides))


def as_array(content: Content | None, shape: Shape | None) -> Any:
    """The content as an array, also where it is affine with one element."""
    if isinstance(content, Affine) and shape is not None and all(size == 1 for size in shape):
        return objects([content.base]).reshape([1] * len(shape))
    return content if isinstance(content, np.ndarray) else None


def whole(shape: Shape | None) -> tuple[int, ...] | None:
    """The shape where every size in it is known; else None."""
    sizes = tuple(size for size in shape or () if isinstance(size, int))
    return sizes if shape is not None and len(sizes) == len(shape) else None
