"""NNCF's post-training quantization of an ONNX model: placement, scales and bias correction are its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from perwatt.artifact import Artifact
from perwatt.errors import PassError
from perwatt.fusion import remove_unused
from perwatt.signature import Batch

TRANSFORMER_MARKS = ("Attention", "LayerNormalization")


def quantize(
    artifact: Artifact,
    calls: Sequence[Batch],
    excluded: Sequence[str],
    symmetric: bool,
    transformer: bool,
    signed: bool,
) -> Any:
    """The quantized onnx_ir model. `excluded`: names of nodes; `signed`: activations have signed types alone."""
    import nncf
    import onnx
    import onnx_ir as ir

    model = artifact.edit()
    try:
        quantized = nncf.quantize(
            ir.to_proto(model),
            nncf.Dataset(calls),
            preset=nncf.QuantizationPreset("performance" if symmetric else "mixed"),
            subset_size=len(calls),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            ignored_scope=nncf.IgnoredScope(names=list(excluded)) if excluded else None,
        )
    except Exception as error:
        raise PassError(f"NNCF could not quantize this model: {_first_line(error)}") from error
    # NNCF leaves names and value types of its own; a round trip through bytes makes it a model like any other.
    model = ir.from_proto(onnx.load_from_string(quantized.SerializeToString()))
    model.metadata_props.clear()
    if signed:
        _sign(model.graph)
        remove_unused(model)
    return model


def is_transformer(artifact: Artifact) -> bool:
    """Whether NNCF's scheme for transformers fits: by operators that only they have."""
    counts = artifact.operator_counts()
    return any(mark in counts for mark in TRANSFORMER_MARKS)


def _sign(graph: Any) -> None:
    """Give unsigned activations a signed type and twice the scale: NNCF can't be told to, and some backends take no other.
    Their zero point is 0, so the range stays and half of the new type's is left empty."""
    import onnx_ir as ir

    signed: dict[str, Any] = {}
    for node in graph:
        zero = (
            node.inputs[2] if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.inputs) > 2 else None
        )
        if zero is None or zero.const_value is None or zero.const_value.dtype.name != "UINT8":
            continue
        if zero.const_value.numpy().any():
            raise PassError("this backend takes no unsigned activations, and these have zero points")
        scale = node.inputs[1].const_value.numpy()
        arrays = (node.inputs[1], scale * np.asarray(255 / 127, scale.dtype)), (zero, np.zeros(zero.shape, np.int8))
        for position, (value, array) in enumerate(arrays, start=1):
            name = f"{value.name}_signed"
            if name not in signed:
                signed[name] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
                signed[name].shape, signed[name].dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
                graph.register_initializer(signed[name])
            node.replace_input_with(position, signed[name])
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = ir.DataType.INT8


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__


Kind = Literal["auto", "plain", "transformer"]
