"""The weights of an ONNX graph by name, and a graph with other weights.

A weight is an initializer or a Constant of floats, of the main graph or of a subgraph. Its name is that of its value; the
second of a name, which only sibling subgraphs can have, is `name#2`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from perwatt.errors import InputError
from perwatt.interpreter_values import array_of, from_numpy, to_numpy

if TYPE_CHECKING:
    import onnx_ir as ir

    from perwatt.artifact import Artifact, Step


def is_constant(node: Any) -> bool:
    """Whether a node is ONNX's Constant."""
    return bool(node.op_type == "Constant" and node.domain in ("", "ai.onnx"))


def constant_value(node: Any) -> Any:
    """What a Constant node holds, whichever attribute says it."""
    (attribute,) = node.attributes.values()
    return attribute.value if attribute.name in ("value", "sparse_value") else attribute


def weight_names(model: ir.Model) -> dict[int, str]:
    """A name for each value that is constant, by `id(value)`."""
    return {id(value): name for name, value, _ in _constants(model)}


def with_weights(artifact: Artifact, weights: Mapping[str, torch.Tensor], step: Step) -> Artifact:
    """The artifact that `step` made of `artifact` by giving `weights` other numbers, in the types that they have there.
    Tensors whose numbers are the same are shared. Raises InputError for a name or a shape that is not there."""
    import onnx_ir as ir

    model = artifact.edit()
    left = dict(weights)
    for name, value, node in _constants(model):
        if name not in left:
            continue
        learnt = left.pop(name)
        held = value.const_value if node is None else constant_value(node)
        old = array_of(held)
        if tuple(learnt.shape) != tuple(old.shape):
            raise InputError(f"weight {name} is {list(old.shape)} in the model and {list(learnt.shape)} as learnt")
        kind = from_numpy(old[:0] if old.ndim else old, torch.device("cpu")).dtype
        new = to_numpy(learnt.to(kind).contiguous())
        if np.array_equal(new.view(np.uint8), np.ascontiguousarray(old).view(np.uint8)) if new.ndim else new == old:
            continue
        tensor = ir.Tensor(new, name=value.name)
        if node is None:
            value.const_value = tensor
        else:
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", tensor)
            value.const_value = None
    if left:
        raise InputError(
            f"the model has no weight {sorted(left)[0]}", fix="write back to what the module was made from"
        )
    return artifact.after(model, step)


def _constants(model: ir.Model) -> Iterator[tuple[str, Any, Any]]:
    """Name, value, and the Constant node where it is none of the initializers; in an order that depends on the graph
    alone."""
    seen: Counter[str] = Counter()
    for graph in _graphs(model.graph):
        found: list[tuple[Any, Any]] = [(value, None) for value in graph.initializers.values()]
        found += [(node.outputs[0], node) for node in graph if is_constant(node)]
        for value, node in found:
            name = str(value.name)
            seen[name] += 1
            yield (name if seen[name] == 1 else f"{name}#{seen[name]}"), value, node


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and all graphs in it, in the order of nodes and attributes."""
    yield graph
    for node in graph:
        for attribute in node.attributes.values():
            if str(attribute.type.name) == "GRAPH":
                yield from _graphs(attribute.value)


__all__ = ["constant_value", "is_constant", "weight_names", "with_weights"]
