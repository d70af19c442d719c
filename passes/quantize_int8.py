"""Quantize convolutions and matrix products to 8-bit integers, with scales found on calibration samples.

Weights get one symmetric scale a channel, activations one a tensor; both stand in the graph as QuantizeLinear and
DequantizeLinear pairs, so what the file says is what runs. A quarter of the weight bytes, and integer matrix units
where the hardware has them. It doesn't pay on small layers, where the conversions at the borders cost more than the
product saves: that is why it is measured before it is shipped.

    Conv(x, W)        becomes        Conv(DQ(Q(x)), DQ(W:int8))

Placement, scales and bias correction are NNCF's post-training quantization. Lossy: accuracy decides. Needs calibration
samples; synthetic ones serve to learn the speed, and the result is not shipped then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, Stage, Tolerance
from perwatt.errors import PassError
from perwatt.fusion import remove_unused
from perwatt.signature import split

TRANSFORMER_MARKS = ("Attention", "LayerNormalization")


@dataclass(frozen=True)
class QuantizeInt8(Pass):
    """`exclude`: shell patterns of node names that stay in floating point, as `/layer1/*`.
    `subset_size`: calibration samples used (search: 64 … 1000).
    `preset`: `performance` has symmetric activations, `mixed` asymmetric ones where that serves; `auto` takes what the
    backend's first quantization style asks for (search: both).
    `fast_bias_correction`: the quick form; the thorough one runs the model again for every layer.
    `model_type`: `auto` looks for attention and layer normalization, and applies the transformer's scheme there."""

    stage: ClassVar[Stage] = Stage.PRECISION
    in_default: ClassVar[bool] = True
    tolerance: ClassVar[Tolerance | None] = None
    depends_on_target: ClassVar[bool] = True
    isolated: ClassVar[bool] = True

    exclude: tuple[str, ...] = ()
    subset_size: int = 300
    preset: Literal["auto", "performance", "mixed"] = "auto"
    fast_bias_correction: bool = True
    model_type: Literal["auto", "plain", "transformer"] = "auto"

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        if not any("int8" in style.weight_type for style in context.capabilities.quantization_styles):
            yield "this backend has no int8 arithmetic"
        counts = artifact.operator_counts()
        if any(op in counts for op in ("DequantizeLinear", "QLinearConv", "QLinearMatMul")):
            yield "the model is quantized already"
        if not any(op in counts for op in ("Conv", "Gemm", "MatMul", "ConvTranspose")):
            yield "no convolution or matrix product to quantize"

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        import nncf
        import onnx
        import onnx_ir as ir

        samples = context.samples("calibrate").take(self.subset_size, context.seed)
        calls = _calls(artifact, samples)
        model = artifact.edit()
        _name_nodes(model.graph)
        ignored = _scope(nncf, self.exclude, model.graph)
        source = ir.to_proto(model)
        kind, preset = self._kind(artifact), self._preset(context)
        try:
            quantized = nncf.quantize(
                source,
                nncf.Dataset(calls),
                preset=nncf.QuantizationPreset(preset),
                subset_size=len(calls),
                fast_bias_correction=self.fast_bias_correction,
                model_type=nncf.ModelType.TRANSFORMER if kind == "transformer" else None,
                ignored_scope=ignored,
            )
        except Exception as error:
            raise PassError(f"NNCF could not quantize this model: {_first_line(error)}") from error
        # NNCF leaves names and value types of its own; a round trip through bytes makes it a model like any other.
        model = ir.from_proto(onnx.load_from_string(quantized.SerializeToString()))
        model.metadata_props.clear()
        if not context.capabilities.quantization_styles[0].unsigned_activations:
            _sign(model.graph)
            remove_unused(model)
        pairs = sum(1 for node in model.graph if node.op_type == "DequantizeLinear")
        if not pairs:
            return artifact, ["nothing was found worth quantizing"]
        changes = [f"{pairs} tensors quantized to int8 on {len(samples)} samples ({kind} scheme, {preset} preset)"]
        return artifact.after(model, self.step(changes)), changes

    def _preset(self, context: Context) -> str:
        if self.preset != "auto":
            return self.preset
        return "performance" if context.capabilities.quantization_styles[0].activation_symmetric else "mixed"

    def _kind(self, artifact: Artifact) -> str:
        if self.model_type != "auto":
            return self.model_type
        counts = artifact.operator_counts()
        return "transformer" if any(mark in counts for mark in TRANSFORMER_MARKS) else "plain"


def _calls(artifact: Artifact, samples: Any) -> list[dict[str, Any]]:
    """One entry for each call: single items where the batch is dynamic, as many as it wants where it is fixed."""
    batch = artifact.signature.batch
    if batch is None:
        return list(samples)
    size = batch if isinstance(batch, int) else 1
    return [piece for chunk in samples for piece, _ in split(chunk, size)]


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


def _name_nodes(graph: Any) -> None:
    """Give every node a name of its own: NNCF refuses graphs where two share one."""
    taken: set[str] = set()
    for number, node in enumerate(graph):
        wanted = node.name or f"{node.op_type}_{number}"
        node.name = wanted if wanted not in taken else f"{wanted}_{number}"
        taken.add(node.name)


def _scope(nncf: Any, exclude: tuple[str, ...], graph: Any) -> Any:
    if not exclude:
        return None
    import fnmatch

    names = [node.name for node in graph]
    for pattern in exclude:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise PassError(f"exclude {pattern!r} matches no node; names look like {', '.join(names[:3])}")
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)]
    return nncf.IgnoredScope(names=chosen)


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__
