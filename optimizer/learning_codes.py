"""Quantized weights made learnable: float copies behind fake quantization in place of stored codes, and codes again.

    DQ(codes, scale, zero point)   becomes, to learn,   DQ(Q(copy, scale, zero point), scale, zero point)

A copy starts as what its codes stand for, so the graph computes what it did. Only codes that DequantizeLinear alone reads, with
one scale and zero point wherever it does, have one; int32 biases, which are stored in products of other scales, keep theirs, and
where there are any, scales do so as well. Activations' scales that are equal belong together (a concatenation in integers wants
one for all its inputs, and some exporters write those of Q and of DQ down separately), so they are learnt as one and stay equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from perwatt.artifact import Artifact, Step
from perwatt.fusion import Builder, names_in
from perwatt.interpreter_quantize import RANGES, dequantize_linear, quantize_linear
from perwatt.interpreter_values import array_of, from_numpy, to_numpy
from perwatt.patterns import is_stored, stored

FLOAT, INT32 = 1, 6
"""ONNX's numbers of these types."""


@dataclass(frozen=True)
class Codes:
    """An initializer of codes, the float copy that it is learnt by, and how one becomes the other.

    `scale`: the name of its scales; `zero`: its zero point as stored, None for 0; `low` and `high`: the codes that it may
    have, a type's lowest only where the codes as they came had it: −128 is left out for the sake of sums in 16 bits."""

    name: str
    copy: str
    scale: str
    zero: torch.Tensor | None
    settings: dict[str, Any]
    low: int
    high: int

    def rounded(self, copy: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The codes of `copy`: those by which fake quantization computed."""
        return quantize_linear(copy, scale, self.zero, **self.settings)

    def limits(self, scale: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Least and greatest of what a copy with the shape of `like` may hold."""
        settings = {key: value for key, value in self.settings.items() if key != "output_dtype"}
        ends = [torch.full_like(like, end, dtype=torch.int32) for end in (self.low, self.high)]
        low, high = (dequantize_linear(end, scale, self.zero, **settings) for end in ends)
        return low, high


@dataclass(frozen=True)
class Learnable:
    """`artifact`: the graph to learn on. `activations`: scales of activations that may be learnt; `tied`: others that are
    equal to one of these, and which. `fixed`: whether all scales have to stay."""

    artifact: Artifact
    codes: tuple[Codes, ...]
    activations: tuple[str, ...]
    tied: dict[str, str]
    fixed: bool


def learnable(artifact: Artifact) -> Learnable:
    """The artifact with copies for its codes."""
    model = artifact.edit()
    graph, taken = model.graph, names_in(model)
    codes = []
    for value in list(graph.initializers.values()):
        if (nodes := _readers(graph, value)) is not None:
            codes.append(_copied(graph, value, nodes, taken))
    activations, tied = _tie(graph)
    fixed = any(
        node.op_type == "DequantizeLinear" and is_stored(node.inputs[0]) and _kind(node.inputs[0]) == INT32
        for node in graph
    )
    return Learnable(artifact.after(model, Step("copies")), tuple(codes), activations, tied, fixed)


def with_codes(artifact: Artifact, codes: Mapping[str, torch.Tensor], step: Step) -> Artifact:
    """The artifact that `step` made of `artifact` by giving initializers other codes, in the types that they have."""
    import onnx_ir as ir

    model = artifact.edit()
    for name, learnt in codes.items():
        value: Any = model.graph.initializers[name]
        old = value.const_value.numpy()
        new = to_numpy(learnt).astype(old.dtype)
        if not np.array_equal(new, old):
            value.const_value = ir.Tensor(new, dtype=value.const_value.dtype, name=name)
    return artifact.after(model, step)


def _readers(graph: Any, value: Any) -> list[Any] | None:
    """The DequantizeLinear nodes that read codes; None for what are none, or can't be learnt."""
    if value.is_graph_input() or value.is_graph_output() or _kind(value) not in RANGES:
        return None
    nodes = [node for node, position in value.uses() if position == 0 and node.op_type == "DequantizeLinear"]
    if not nodes or len(nodes) != len(list(value.uses())) or any(node.graph is not graph for node in nodes):
        return None
    ways = {(*(id(one) for one in node.inputs[1:]), *sorted(_settings(node).items())) for node in nodes}
    parameters = nodes[0].inputs[1:]
    plain = all(one is None or is_stored(one) for one in parameters) and _kind(parameters[0]) == FLOAT
    return nodes if len(ways) == 1 and plain else None


def _copied(graph: Any, value: Any, nodes: list[Any], taken: set[str]) -> Codes:
    """A copy for `value`, quantized in front of the nodes that read its codes."""
    first = nodes[0]
    held, settings = _tensor(value), _settings(first)
    scale, zero = first.inputs[1], first.inputs[2] if len(first.inputs) > 2 else None
    numbers = None if zero is None else _tensor(zero)
    build = Builder(graph, first, taken)
    copy = build.constant(to_numpy(dequantize_linear(held, _tensor(scale), numbers, **settings)), f"{value.name}_copy")
    made: dict[str, Any] = {**settings, "output_dtype": _kind(value)}
    inputs = [copy, scale, *([zero] if zero is not None else [])]
    quantized = build.op("QuantizeLinear", *inputs, **made)
    graph.insert_before(first, build.nodes)
    for node in nodes:
        node.replace_input_with(0, quantized)
    low, high = RANGES[_kind(value)]
    low += int(low < 0 and not bool((held == low).any()))
    return Codes(str(value.name), str(copy.name), str(scale.name), numbers, made, low, high)


def _tie(graph: Any) -> tuple[tuple[str, ...], dict[str, str]]:
    """Make one of activations' scales that are equal; names of those, and which stand for which others."""
    scales: dict[bytes, Any] = {}
    zeros: dict[Any, Any] = {}
    tied: dict[str, str] = {}
    pairs = [node for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    free = {id(node.inputs[1]) for node in pairs if _free(node.inputs[1])}
    for node in pairs:
        scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        if id(scale) not in free:
            continue
        one = scales.setdefault(stored(scale).tobytes(), scale)
        if one is not scale:
            tied[str(scale.name)] = str(one.name)
            node.replace_input_with(1, one)
        if zero is not None and is_stored(zero):
            # A pair counts as one only where zero points are the same value, too.
            node.replace_input_with(2, zeros.setdefault((_kind(zero), stored(zero).tobytes()), zero))
    return tuple(str(scale.name) for scale in scales.values()), tied


def _free(scale: Any) -> bool:
    """Whether a scale is one number, and activations' alone."""
    if not is_stored(scale) or _kind(scale) != FLOAT or stored(scale).size != 1:
        return False
    return all(_scales_activation(*use) for use in scale.uses())


def _scales_activation(node: Any, position: int) -> bool:
    pairs = node.op_type in ("QuantizeLinear", "DequantizeLinear")
    return pairs and position == 1 and not is_stored(node.inputs[0])


def _settings(node: Any) -> dict[str, int]:
    """How DequantizeLinear lays its scales along a tensor."""
    wanted = {"axis": node.attributes.get_int("axis", 1), "block_size": node.attributes.get_int("block_size", 0)}
    return {key: value for key, value in wanted.items() if value or key == "axis"}


def _tensor(value: Any) -> torch.Tensor:
    return from_numpy(array_of(value.const_value), torch.device("cpu"))


def _kind(value: Any) -> int:
    return 0 if value is None or value.dtype is None else int(value.dtype)


__all__ = ["Codes", "Learnable", "learnable", "with_codes"]
