"""Fold a batch normalization that follows a convolution or matrix product into its weights and bias.

In inference a batch normalization is y = x · s + t with s = γ / √(σ² + ε) and t = β − μ · s for each channel (Ioffe and
Szegedy 2015, section 3.1), so it vanishes into the operator before it: W' = W · s, b' = b · s + t.

    Conv(x, W) → BatchNormalization(γ, β, μ, σ²)        becomes        Conv(x, W', b')

Every backend does this for what it recognises; doing it here gives calibration, quantization and pruning the weights
that will really run. The computation is in float64 and rounded once. Refused where the product's output is used by
somebody else, where weights are computed rather than stored, and in training mode.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, Stage, Tolerance

FOLDABLE = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class FoldBatchnorm(Pass):
    """No settings."""

    stage: ClassVar[Stage] = Stage.FUSE
    in_default: ClassVar[bool] = True
    # Rounding of the scaled weights adds up over the layers of a deep net; single layers stay within 1e-6.
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-3)

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        model = artifact.edit()
        folded, refused = 0, Counter[str]()
        for norm in [node for node in model.graph if node.op_type == "BatchNormalization" and node.domain == ""]:
            reason = refusal(norm)
            if reason:
                refused[reason] += 1
                continue
            fold(model.graph, norm)
            folded += 1
        notes = [f"{count} left: {reason}" for reason, count in refused.items()]
        if not folded:
            return artifact, notes
        changes = [f"{folded} batch normalizations folded into the weights before them", *notes]
        return artifact.after(model, self.step(changes)), changes

    def ensures(self, before: Artifact, after: Artifact) -> Any:
        if after.size_bytes() > before.size_bytes() * 1.01 + 4096:
            yield "folding made the weights larger"


def refusal(norm: Any) -> str | None:
    """Why this batch normalization can't be folded backwards; None where it can."""
    producer = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    if norm.attributes.get_int("training_mode", 0) or len([o for o in norm.outputs if o.name and o.uses()]) > 1:
        return "it is in training mode"
    if producer is None or producer.op_type not in FOLDABLE or producer.domain != "":
        return "no convolution or matrix product right before it"
    if len(list(norm.inputs[0].uses())) != 1 or norm.inputs[0].is_graph_output():
        return "what it normalizes is used elsewhere too"
    if any(value is None or value.const_value is None for value in [*norm.inputs[1:5], *producer.inputs[1:]]):
        return "weights are computed, not stored"
    if producer.op_type == "Gemm" and len(producer.inputs) > 2 and producer.inputs[2].const_value.size == 1:
        return "its matrix product has a scalar bias"
    return None


def fold(graph: Any, norm: Any) -> None:
    """Replace the product before `norm` by one with the normalization in its weights; both old nodes go."""
    import onnx_ir as ir

    product = norm.inputs[0].producer()
    gamma, beta, mean, variance = (value.const_value.numpy().astype(np.float64) for value in norm.inputs[1:5])
    scale = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    weight = product.inputs[1].const_value.numpy()
    bias = product.inputs[2].const_value.numpy().astype(np.float64) if len(product.inputs) > 2 else np.zeros_like(mean)
    # Gemm computes alpha·A·B + beta·C; the normalization scales the whole sum, so beta's bias is scaled as it stands.
    bias_factor = product.attributes.get_float("beta", 1.0) if product.op_type == "Gemm" else 1.0
    new_bias = bias * scale + (beta - mean * scale) / bias_factor
    new_weight = weight.astype(np.float64) * _along_output(product, weight, scale)
    name = product.outputs[0].name
    values = [
        ir.Value(name=f"{name}_{part}", const_value=ir.tensor(array.astype(weight.dtype), name=f"{name}_{part}"))
        for part, array in (("weight", new_weight), ("bias", new_bias))
    ]
    for value in values:
        value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
        graph.register_initializer(value)
    replaced = [*norm.inputs[1:5], *product.inputs[1:]]
    merged = ir.Node(
        "", product.op_type, [product.inputs[0], *values], list(product.attributes.values()), name=product.name
    )
    merged.outputs[0].name = f"{norm.outputs[0].name}"
    ir.convenience.replace_nodes_and_values(
        graph, norm, [norm, product], [merged], [norm.outputs[0]], [merged.outputs[0]]
    )
    _drop_unused(graph, replaced)


def _along_output(product: Any, weight: Any, scale: Any) -> Any:
    """`scale` shaped so that it multiplies the output channels of the weight."""
    if product.op_type == "Conv":
        return scale.reshape(-1, *[1] * (weight.ndim - 1))
    if product.op_type == "Gemm":
        return scale[:, None] if product.attributes.get_int("transB", 0) else scale[None, :]
    group = product.attributes.get_int("group", 1)
    per_group = scale.reshape(group, 1, -1)
    spread = np.broadcast_to(per_group, (group, weight.shape[0] // group, weight.shape[1]))
    return spread.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))


def _drop_unused(graph: Any, values: list[Any]) -> None:
    for value in values:
        if value is not None and value.name in graph.initializers and not value.uses() and not value.is_graph_output():
            del graph.initializers[value.name]
