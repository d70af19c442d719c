"""Carry floating point in bfloat16: weights are stored and arithmetic is done in half the bits.

bfloat16 keeps the exponent of float32 and 8 bits of the mantissa, so its range is the same (the last 0.4 % below the
largest float32 is cut off, where masks like to live); what it loses is precision, two to three decimal digits remain.
It pays where the hardware has bfloat16 matrix units (`Capabilities.half_types`), and halves the file everywhere. It
doesn't pay where the backend converts back.

    x:f32 → Conv(W:f32) → y:f32      becomes      x:f32 → Cast(bf16) → Conv(W:bf16) → Cast(f32) → y:f32

Inputs and outputs keep their types. Lossy: accuracy on the lowered program decides, not a tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from perwatt.artifact import Artifact, graphs_of
from perwatt.contract import Context, Pass, Stage, Tolerance

LARGEST = (2 - 2**-7) * 2.0**127
"""The largest bfloat16: eight bits of ones."""


@dataclass(frozen=True)
class CastHalf(Pass):
    """No settings."""

    stage: ClassVar[Stage] = Stage.PRECISION
    in_default: ClassVar[bool] = True
    tolerance: ClassVar[Tolerance | None] = None
    depends_on_target: ClassVar[bool] = True

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        if "bfloat16" not in context.capabilities.half_types:
            yield "this backend has no bfloat16 arithmetic here"
        if artifact.model.opset_imports.get("", 0) < 22:
            yield f"bfloat16 convolutions need opset 22, this model is opset {artifact.model.opset_imports.get('', 0)}"
        counts = artifact.operator_counts()
        if "DequantizeLinear" in counts or "QLinearConv" in counts:
            yield "the model is quantized already"
        if artifact.model.functions:
            yield "the model has functions of its own, whose types can't be changed"
        if len(list(graphs_of(artifact.model))) > 1 + len(artifact.model.functions):
            yield "the model has control flow, whose branches would need casts of their own"
        foreign = sorted({node.domain for node in artifact.model.graph} - {""})
        if foreign:
            yield f"operators of the domain {foreign[0]} can't be told to give half"
        names = sorted({node.op_type for node in artifact.model.graph if node.domain == "" and _without_half(node)})
        if names:
            yield f"ONNX has no bfloat16 for {', '.join(names)}"

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        model = artifact.edit()
        weights = _weights_to_half(model.graph)
        if not weights:
            return artifact, ["no float32 weights to store in half"]
        _cast_inputs(model.graph)
        _retarget_casts(model.graph)
        _retype_inner_values(model.graph)
        _cast_outputs(model.graph)
        changes = [f"{weights} weights and all arithmetic between inputs and outputs in bfloat16"]
        return artifact.after(model, self.step(changes)), changes


def _without_half(node: Any) -> bool:
    """Whether ONNX defines `node` for float32, which flows through it here, and not for bfloat16."""
    import onnx

    version = node.graph.opset_imports[""] if node.version is None else node.version
    try:
        schema = onnx.defs.get_schema(node.op_type, version)
    except onnx.defs.SchemaError:
        return False
    return any(
        _is_float(value.dtype) and "tensor(float)" in port.types and "tensor(bfloat16)" not in port.types
        for values, ports in ((node.inputs, schema.inputs), (node.outputs, schema.outputs))
        for value, port in zip(values, _repeated(ports, len(values)), strict=False)
        if value is not None
    )


def _repeated(ports: Any, count: int) -> list[Any]:
    """A variadic last port stands for all that follow."""
    return [*ports, *[ports[-1]] * (count - len(ports))] if ports else []


def _half(tensor: Any) -> Any:
    import ml_dtypes
    import numpy as np
    import onnx_ir as ir

    array = tensor.numpy()
    # Beyond the largest bfloat16 rounding gives infinity, and a mask's 0 · (−largest float32) would become NaN.
    array = np.where(np.isfinite(array), np.clip(array, -LARGEST, LARGEST), array)
    return ir.Tensor(array.astype(ml_dtypes.bfloat16), dtype=ir.DataType.BFLOAT16, name=tensor.name)


def _is_float(dtype: Any) -> bool:
    return dtype is not None and dtype.name == "FLOAT"


def _weights_to_half(graph: Any) -> int:
    """Store every float32 weight, and every float32 tensor in an attribute, in bfloat16; returns how many."""
    import onnx_ir as ir

    count = 0
    for value in graph.initializers.values():
        if value.is_graph_output():
            continue
        if value.const_value is not None and _is_float(value.const_value.dtype):
            value.const_value = _half(value.const_value)
            value.type = ir.TensorType(ir.DataType.BFLOAT16)
            count += 1
    for node in graph:
        attribute = node.attributes.get("value")
        holds = node.op_type in ("Constant", "ConstantOfShape")
        if holds and attribute is not None and attribute.type.name == "TENSOR":
            if _is_float(attribute.value.dtype):
                node.attributes["value"] = ir.AttrTensor("value", _half(attribute.value))
                count += node.op_type == "Constant"
        elif node.op_type == "ConstantOfShape" and attribute is None:
            # Without a value it makes float32 zeros.
            node.attributes["value"] = ir.AttrTensor("value", _half(ir.tensor([0.0], dtype=ir.DataType.FLOAT)))
        for name in ("value_float", "value_floats"):
            if node.op_type == "Constant" and name in node.attributes:
                node.attributes["value"] = ir.AttrTensor(
                    "value", _half(ir.tensor(node.attributes.pop(name).value, dtype=ir.DataType.FLOAT))
                )
                count += 1
    return count


def _cast(graph: Any, value: Any, dtype: Any, name: str) -> Any:
    import onnx_ir as ir

    node = ir.node("Cast", [value], {"to": dtype.value})
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, ir.TensorType(dtype), value.shape
    return node


def _cast_inputs(graph: Any) -> None:
    import onnx_ir as ir

    for value in graph.inputs:
        if _is_float(value.dtype) and value.uses():
            users = list(value.uses())
            node = _cast(graph, value, ir.DataType.BFLOAT16, f"{value.name}_bfloat16")
            for use in users:
                use.node.replace_input_with(use.idx, node.outputs[0])
            graph.insert_before(graph[0], node)


def _retarget_casts(graph: Any) -> None:
    """Casts to float32, and other operators that name float32 in an attribute, go to bfloat16."""
    import onnx_ir as ir

    for node in graph:
        for key in ("to", "dtype"):
            attribute = node.attributes.get(key)
            if attribute is not None and attribute.value == ir.DataType.FLOAT.value:
                node.attributes[key] = ir.AttrInt64(key, ir.DataType.BFLOAT16.value)


def _retype_inner_values(graph: Any) -> None:
    """Types recorded between nodes were float32; where an operator can't give half, the checker will say so."""
    import onnx_ir as ir

    for node in graph:
        for value in node.outputs:
            if _is_float(value.dtype) and not value.is_graph_output():
                value.type = ir.TensorType(ir.DataType.BFLOAT16)


def _cast_outputs(graph: Any) -> None:
    import onnx_ir as ir

    for position, value in enumerate(list(graph.outputs)):
        if not _is_float(value.dtype) or value.is_graph_input():
            continue
        name, shape = value.name, value.shape
        value.name = f"{name}_bfloat16"
        value.type = ir.TensorType(ir.DataType.BFLOAT16)
        node = _cast(graph, value, ir.DataType.FLOAT, name)
        node.outputs[0].shape = shape
        graph.append(node)
        graph.outputs[position] = node.outputs[0]
