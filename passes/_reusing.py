"""Nodes and stored tensors that several rewrites of one pass need alike, each made once.

What a rewrite needs beside its main operator (a mask in the right form, a shape, half of a table) is often the same in every
layer. Here the node that an earlier rewrite made is found again, by operator, inputs and attributes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def once(build: Any, kind: str, *inputs: Any, **attributes: Any) -> Any:
    """The output of such a node: of one that is there already, else of a new one."""
    for use in inputs[0].uses():
        node = use.node
        there = node.graph is build.graph or node in build.nodes
        if there and node.op_type == kind and node.domain == "" and _equal(node, inputs, attributes):
            return node.outputs[0]
    return build.op(kind, *inputs, **attributes)


def _equal(node: Any, inputs: Sequence[Any], attributes: dict[str, Any]) -> bool:
    if len(node.outputs) != 1 or len(node.inputs) != len(inputs):
        return False
    if any(a is not b for a, b in zip(node.inputs, inputs, strict=True)):
        return False
    return {name: attribute.value for name, attribute in node.attributes.items()} == attributes


def kept_once(build: Any, array: Any) -> Any:
    """A stored tensor of this content: one that an earlier rewrite made, else a new one."""
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()[:12]
    known = build.graph.initializers.get(f"stored_{digest}")
    if known is not None and known.const_value is not None and _same_array(known.const_value.numpy(), array):
        return known
    return build.constant(array, f"stored_{digest}")


def _same_array(first: Any, second: Any) -> bool:
    return bool(first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes())


def sizes(build: Any, lengths: Sequence[int | str], otherwise: tuple[Any, int] | None = None) -> Any:
    """A shape of these lengths. A symbol is read from an input that has it, `otherwise` from that axis of that value."""
    if all(isinstance(length, int) for length in lengths):
        return kept_once(build, np.array(lengths, np.int64))
    return once(build, "Concat", *(_length(build, length, otherwise) for length in lengths), axis=0)


def _length(build: Any, length: int | str, otherwise: tuple[Any, int] | None) -> Any:
    import onnx_ir as ir

    if isinstance(length, int):
        return kept_once(build, np.array([length], np.int64))
    source = source_of(length, build.graph) or otherwise
    if source is None:
        raise ValueError(f"no input has an axis {length}")
    out = once(build, "Shape", source[0], start=source[1], end=source[1] + 1)
    out.type, out.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    return out


def source_of(symbol: str, graph: Any) -> tuple[Any, int] | None:
    """An input of the graph that has an axis of this name, and which."""
    for value in graph.inputs:
        for axis, length in enumerate(value.shape or ()):
            if not isinstance(length, int) and length.value == symbol:
                return value, axis
    return None
