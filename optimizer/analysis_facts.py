"""What is known of the values of a graph: the notebook that the analysis of shapes fills, and others read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from perwatt.analysis_content import EXACT, Affine, Content, Shape
from perwatt.analysis_expressions import Number, product
from perwatt.patterns import given, is_stored, stored

LIMIT = 2**20
"""Elements; larger results aren't computed."""


@dataclass
class Fact:
    """What is known of one value; `dtype` is ONNX's number for it."""

    dtype: int | None = None
    shape: Shape | None = None
    content: Content | None = None


@dataclass
class Facts:
    """What is known of all values of a graph. `origins`: where a symbol can be read off, an input and its axis."""

    limit: int = LIMIT
    opset: int = 0
    known: dict[Any, Fact] = field(default_factory=dict)
    origins: dict[Number, tuple[Any, int]] = field(default_factory=dict)

    def shape(self, value: Any) -> Shape | None:
        """The axes of a value; None without a known rank."""
        return self._of(value).shape

    def dtype(self, value: Any) -> int | None:
        """ONNX's number for the type of a value's elements."""
        return self._of(value).dtype

    def content(self, value: Any) -> Content | None:
        """The elements of a value: an array of them, with expressions where its dtype is object; an `Affine`; None."""
        if value is None:
            return None
        fact = self._of(value)
        if fact.content is None and is_stored(value):
            array = stored(value)
            return array if array is not None and array.dtype.kind in EXACT else None
        return fact.content

    def array(self, value: Any) -> Any:
        """The elements of a value where every one is known, as an array that isn't of objects; else None."""
        content = self.content(value)
        return content if isinstance(content, np.ndarray) and content.dtype != object else None

    def size(self, value: Any) -> Number | None:
        """How many elements a value has."""
        shape = self.shape(value)
        return None if shape is None else product(shape)

    def _of(self, value: Any) -> Fact:
        if value not in self.known:
            self.known[value] = _of_stored(value) if is_stored(value) else as_written(value)
        return self.known[value]


def _of_stored(value: Any) -> Fact:
    import onnx_ir as ir

    tensor = ir.convenience.get_const_tensor(value)
    return Fact() if tensor is None else Fact(tensor.dtype.value, tuple(tensor.shape.numpy()))


def as_written(value: Any) -> Fact:
    """Of a value that nothing else is known of, the type is believed and the shape isn't."""
    return Fact(value.dtype.value if value is not None and value.dtype is not None else None)


# Inputs that are lists of numbers --------------------------------------------------------------------------------------


def listed(facts: Facts, node: Any, position: int) -> list[Number | None] | None:
    """An input that is a list of numbers, None for each that isn't known; None where the list isn't."""
    inputs = given(node)
    content = facts.content(inputs[position]) if position < len(inputs) else None
    if isinstance(content, Affine) and facts.shape(inputs[position]) == (1,):
        return [content.base]
    if not isinstance(content, np.ndarray) or content.ndim > 1 or content.dtype.kind not in "iuO":
        return None
    return list(content.reshape(-1).tolist())


def axes_named(facts: Facts, node: Any, position: int) -> list[int] | None:
    """The axes that an optional input names, counted from the start; all of them where it is left out."""
    shape, inputs = facts.shape(node.inputs[0]), given(node)
    if shape is None:
        return None
    if position >= len(inputs) or inputs[position] is None:
        return list(range(len(shape)))
    axes = listed(facts, node, position)
    if axes is None or any(not isinstance(axis, int) for axis in axes):
        return None
    return [axis % len(shape) for axis in axes if isinstance(axis, int)]
