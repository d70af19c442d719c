"""Weights that can have zeros: which products read them, and how new ones are put in their place.

A weight is seen as [out, in·k·k], an output channel a row; of a convolution the input channels are neighbours and the
kernel's places lie outside of them, since that is the order in which hardware multiplies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from perwatt.fusion import Builder, names_in, remove_unused
from perwatt.kernels import gptq
from perwatt.passes import _weight_quantizers as matrices
from perwatt.passes._weight_quantizers import Input
from perwatt.patterns import is_stored, stored


@dataclass
class Layer(matrices.Layer):
    """A stored weight and the products of it. `weight`: float32 [out, in·k·k]; `value`: what holds it in the graph; `turned`: a
    matrix that counts outputs on its first axis; `twins`: for convolutions, data → the same with channels last."""

    value: Any = None
    turned: bool = False
    twins: Mapping[str, str] = field(default_factory=dict)

    @property
    def convolves(self) -> bool:
        return bool(self.nodes[0].op_type == "Conv")

    @property
    def inputs(self) -> tuple[Input, ...]:
        if not self.convolves:
            return super().inputs
        return tuple(sorted({Input(self.twins[node.inputs[0].name], False) for node in self.nodes}))

    @property
    def has_moments(self) -> bool:
        """Whether products are of matrices, convolutions with a kernel of one place among them."""
        return all(length == 1 for length in stored(self.value).shape[2:])

    def restored(self, weight: Any) -> Any:
        """[out, in·k·k] as the graph holds it."""
        if not self.convolves:
            return weight if self.turned else np.ascontiguousarray(weight.T)
        outs, ins, *kernel = stored(self.value).shape
        return np.ascontiguousarray(np.moveaxis(weight.reshape(outs, *kernel, ins), -1, 1))


def has_products(graph: Any) -> bool:
    """Whether there is a matrix product or convolution with stored weights."""
    return bool(matrices.products(graph)) or any(_is_convolution(node) for node in graph)


def layers(graph: Any, m: int, left_out: Collection[str]) -> tuple[list[Layer], Counter[str]]:
    """Layers of `graph` whose weights can have zeros (in groups of `m` inputs, where that isn't 0), and why others can't, counted
    by reason. `left_out`: names of nodes."""
    found: dict[tuple[int, bool], Layer] = {}
    refused: Counter[str] = Counter()
    of_matrices = set(matrices.products(graph))
    for node in graph:
        if node not in of_matrices and not _is_convolution(node):
            continue
        value, turned = matrices._source(node) if node in of_matrices else (node.inputs[1], True)
        if node.name in left_out:
            refused["excluded"] += 1
        elif (id(value), turned) in found:
            found[id(value), turned].nodes.append(node)
        elif reason := _unfit(node, value, turned, m):
            refused[reason] += 1
        else:
            found[id(value), turned] = Layer(value.name, _as_rows(node, value, turned), 0, [node], value, turned)
    alone = []
    for layer in found.values():
        if _owns(layer):
            alone.append(layer)
        else:
            refused["others read its weights, too"] += len(layer.nodes)
    return alone, refused


def _is_convolution(node: Any) -> bool:
    plain = node.op_type == "Conv" and node.domain == ""
    return plain and is_stored(node.inputs[1]) and not is_stored(node.inputs[0])


def _as_rows(node: Any, value: Any, turned: bool) -> Any:
    weight = stored(value)
    if node.op_type == "Conv":
        weight = np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
    return np.ascontiguousarray(weight if turned else weight.T)


def _unfit(node: Any, value: Any, turned: bool, m: int) -> str | None:
    weight = stored(value)
    if weight is None or not weight.size or (weight.ndim < 3 if node.op_type == "Conv" else weight.ndim != 2):
        return "its weights are no matrix or kernel"
    if weight.dtype != np.float32:
        return "its weights are not float32"
    if node.attributes.get_int("group", 1) != 1:
        return "a convolution in groups"
    # A comparison with NaN is false.
    if not np.abs(weight).max() <= gptq.LARGEST:
        return "its weights hold NaN, infinity, or something near it"
    if m and weight.shape[1 if turned else 0] % m:
        return f"its input channels are no multiple of {m}"
    return None


def _owns(layer: Layer) -> bool:
    """Whether nobody else reads the weights, with a Transpose between or without."""
    ours = set(layer.nodes)

    def read_by_us(value: Any, place: int | None) -> bool:
        uses = list(value.uses())
        return not value.is_graph_output() and all(
            (use.node in ours and use.idx == 1)
            or (place is None and use.node.op_type == "Transpose" and read_by_us(use.node.outputs[0], 1))
            for use in uses
        )

    return read_by_us(layer.value, None)


def count(found: Sequence[Layer]) -> int:
    """How many products read them."""
    return sum(len(layer.nodes) for layer in found)


def put_weights(model: Any, found: Sequence[Layer], weights: Mapping[str, Any]) -> bool:
    """Let the products read these; whether any differ from what they read."""
    taken, changed = names_in(model), False
    for layer in found:
        weight = weights[layer.name]
        if np.array_equal(weight, layer.weight):
            continue
        changed = True
        new = Builder(model.graph, layer.nodes[0], taken).constant(layer.restored(weight), f"{layer.name}_sparse")
        for use in list(layer.value.uses()):
            use.node.replace_input_with(use.idx, new)
    remove_unused(model)
    return changed
