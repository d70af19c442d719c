"""What can be known of every value before a model is fed: type, shape, and for arithmetic on shapes the elements.

    facts = analyse(artifact)
    facts.shape(value)                    # (batch, 16, 64): ints and expressions, None without a known rank
    facts.content(value)                  # array([batch, 16, -1, 16], dtype=object), or an array like any other

Shapes come from ONNX's own inference, node by node, and from rules here where it doesn't know what a product or a sum of
symbols is; elements from `perwatt.analysis_elements`. Nothing is believed but the declared shapes of the model's inputs:
that is what a signature promises. The same symbol is the same size; an axis without a name is like no other. The batch is
at least 1, since no program takes fewer items; any other symbol may be 0. Subgraphs and functions aren't looked into.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from perwatt.analysis_content import Shape
from perwatt.analysis_elements import elements
from perwatt.analysis_expressions import UNNAMED, Number, symbol
from perwatt.analysis_facts import LIMIT, Fact, Facts, as_written
from perwatt.analysis_shape_rules import RULES, broadcast
from perwatt.artifact import Artifact

_MOST_DATA = 64
"""Elements that ONNX's inference is shown of an input: shapes, axes, pads, scales."""


def analyse(artifact: Artifact, model: Any = None, limit: int = LIMIT) -> Facts:
    """What is known of the values of `artifact`, or of `model` in its place, which has the same inputs."""
    model = model or artifact.model
    facts = Facts(limit, model.opset_imports.get("", 0))
    batch = artifact.signature.batch
    for value in model.graph.inputs:
        _declare(facts, value, batch if isinstance(batch, str) else None)
    for node in model.graph:
        if node.op_type != "Constant" or node.domain:
            _visit(facts, node)
    return facts


def same(a: Sequence[Number] | None, b: Sequence[Number] | None) -> bool:
    """Whether two shapes are provably the same."""
    return a is not None and b is not None and tuple(a) == tuple(b)


# Where facts come from ------------------------------------------------------------------------------------------------


def _declare(facts: Facts, value: Any, batch: str | None) -> None:
    shape = None
    if value.shape is not None:
        shape = tuple(_declared(value, axis, dim, batch) for axis, dim in enumerate(value.shape))
        for axis, size in enumerate(shape):
            if not isinstance(size, int):
                facts.origins.setdefault(size, (value, axis))
    facts.known[value] = Fact(value.dtype.value if value.dtype is not None else None, shape)


def _declared(value: Any, axis: int, dim: Any, batch: str | None) -> Number:
    name = dim if isinstance(dim, int) else dim.value
    if isinstance(name, int) and name >= 0:
        return name
    if isinstance(name, int) or name is None:
        # The signature calls every first axis without a name the batch, and a program feeds as many items to each input.
        return symbol(batch, 1) if axis == 0 and batch == "batch" else _fresh(value, axis)
    return symbol(str(name), 1 if name == batch else 0)


def _fresh(value: Any, axis: int) -> Number:
    return symbol(f"{UNNAMED}{value.name}:{axis}")


def _visit(facts: Facts, node: Any) -> None:
    for value, fact in zip(node.outputs, _inferred(facts, node), strict=True):
        facts.known[value] = fact
    if node.domain != "":
        return
    rule = RULES.get(node.op_type)
    first = node.outputs[0]
    shape = rule(facts, node) if rule else None
    if shape is not None:
        facts.known[first].shape = _merged(first, facts.known[first].shape, shape)
    for value, content in zip(node.outputs, elements(facts, node), strict=False):
        facts.known[value].content = content


def _merged(value: Any, inferred: Shape | None, ruled: Sequence[Number | None]) -> Shape:
    """What a rule says, and where that leaves a size open or isn't a number, what ONNX's inference says."""
    other = inferred if inferred is not None and len(inferred) == len(ruled) else (None,) * len(ruled)
    pairs = [(two, one) if isinstance(two, int) else (one, two) for one, two in zip(ruled, other, strict=True)]
    return tuple(
        next((size for size in pair if size is not None), _fresh(value, axis)) for axis, pair in enumerate(pairs)
    )


# ONNX's own inference -------------------------------------------------------------------------------------------------


def _inferred(facts: Facts, node: Any) -> list[Fact]:
    """Types and shapes of a node's outputs as ONNX infers them from those of its inputs."""
    written = [as_written(value) for value in node.outputs]
    inputs = [value for value in node.inputs if value is not None]
    plain = all(attribute.type.name not in ("GRAPH", "GRAPHS") for attribute in node.attributes.values())
    if node.domain not in ("", "ai.onnx.ml") or not plain or any(facts.dtype(value) is None for value in inputs):
        return written
    codes: dict[str, Number] = {}
    types = {value.name: _encoded(facts, value, codes) for value in inputs}
    data = {value.name: array for value in inputs if (array := _data(facts, value)) is not None}
    found = _asked(facts, node, types, data)
    return [
        _decoded(found[value.name], value, codes) if value.name in found else fact
        for value, fact in zip(node.outputs, written, strict=True)
    ]


def _asked(facts: Facts, node: Any, types: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    import onnx
    import onnx_ir as ir

    versions = {"": facts.opset, "ai.onnx.ml": 3}
    try:
        schema = onnx.defs.get_schema(node.op_type, versions[node.domain], node.domain)
        asked = ir.serde.serialize_node(node)
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]
        return dict(onnx.shape_inference.infer_node_outputs(schema, asked, types, data, opset_imports=opsets))
    except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return {}


def _encoded(facts: Facts, value: Any, codes: dict[str, Number]) -> Any:
    """A type as ONNX writes it; every size that is no number gets a name, the same one for the same expression."""
    import onnx

    names = {number: name for name, number in codes.items()}
    dims: list[int | str] = []
    for size in facts.shape(value) or ():
        if not isinstance(size, int):
            name = names.setdefault(size, f"d{len(names)}")
            codes[name] = size
            dims.append(name)
        else:
            dims.append(size)
    return onnx.helper.make_tensor_type_proto(facts.dtype(value), None if facts.shape(value) is None else dims)


def _decoded(found: Any, value: Any, codes: dict[str, Number]) -> Fact:
    if not found.HasField("tensor_type") or not found.tensor_type.elem_type:
        return as_written(value)
    kind = found.tensor_type
    if not kind.HasField("shape"):
        return Fact(kind.elem_type)
    dims = [dim.dim_value if dim.HasField("dim_value") else codes.get(dim.dim_param) for dim in kind.shape.dim]
    return Fact(kind.elem_type, _merged(value, None, dims))


def _data(facts: Facts, value: Any) -> Any:
    """The elements of a small value that are all known, as ONNX's inference wants them."""
    import onnx

    size = facts.size(value)
    if not isinstance(size, int) or size > _MOST_DATA:
        return None
    array = facts.array(value)
    return None if array is None else onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape))


__all__ = ["LIMIT", "Fact", "Facts", "Shape", "analyse", "broadcast", "same"]
