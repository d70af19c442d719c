"""Fold a batch normalization that follows a convolution or matrix product into its weights and bias.

In inference a batch normalization is y = x · s + t with s = γ / √(σ² + ε) and t = β − μ · s for each channel (Ioffe and
Szegedy 2015, section 3.1), so it vanishes into the operator before it: W' = W · s, b' = b · s + t.

    Conv(x, W) → BatchNormalization(γ, β, μ, σ²)        becomes        Conv(x, W', b')

Every backend does this for what it recognises; doing it here gives calibration, quantization and pruning the weights
that will really run. The computation is in float64 and rounded once. Refused where the product's output or its weights
are used by somebody else, where weights are computed rather than stored, and in training mode.
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
    if norm.attributes.get_int("training_mode", 0) or any(o.uses() or o.is_graph_output() for o in norm.outputs[1:]):
        return "it is in training mode"
    if producer is None or producer.op_type not in FOLDABLE or producer.domain != "":
        return "no convolution or matrix product right before it"
    if len(list(norm.inputs[0].uses())) != 1 or norm.inputs[0].is_graph_output():
        return "what it normalizes is used elsewhere too"
    weights = [*norm.inputs[1:5], *producer.inputs[1:2], *_given(producer.inputs[2:])]
    if any(value is None or value.const_value is None for value in weights):
        return "weights are computed, not stored"
    if len(list(producer.inputs[1].uses())) != 1:
        return "its product shares weights with another one"
    if any(value.const_value.size != norm.inputs[1].const_value.shape[0] for value in norm.inputs[1:5]):
        return "it has more than one scale a channel"
    return None


def fold(graph: Any, norm: Any) -> None:
    """Replace the product before `norm` by one with the normalization in its weights; both old nodes go."""
    import onnx_ir as ir

    product = norm.inputs[0].producer()
    gamma, beta, mean, variance = (value.const_value.numpy().astype(np.float64) for value in norm.inputs[1:5])
    scale = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    weight = product.inputs[1].const_value.numpy()
    new_weight = weight.astype(np.float64) * _along_output(product, weight, scale)
    new_bias = _bias(product) * scale + beta - mean * scale
    values = []
    for part, array in (("weight", new_weight), ("bias", new_bias)):
        name = _unused_name(graph, f"{product.outputs[0].name}_{part}")
        value: Any = ir.Value(name=name, const_value=ir.tensor(array.astype(weight.dtype), name=name))
        value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
        graph.register_initializer(value)
        values.append(value)
    replaced = [*norm.inputs[1:5], *product.inputs[1:]]
    attributes = [attribute for name, attribute in product.attributes.items() if name != "beta"]
    merged = ir.Node("", product.op_type, [product.inputs[0], *values], attributes, name=product.name)
    merged.outputs[0].name = f"{norm.outputs[0].name}"
    ir.convenience.replace_nodes_and_values(
        graph, norm, [norm, product], [merged], [norm.outputs[0]], [merged.outputs[0]]
    )
    _drop_unused(graph, replaced)


def _given(inputs: Any) -> list[Any]:
    """Optional inputs that are there."""
    return [value for value in inputs if value is not None]


def _bias(product: Any) -> Any:
    """What the product adds, in float64: Gemm computes alpha · A · B + beta · C, and beta's part is taken in here."""
    given = _given(product.inputs[2:])
    if not given:
        return np.zeros(1)
    return given[0].const_value.numpy().astype(np.float64) * product.attributes.get_float("beta", 1.0)


def _unused_name(graph: Any, wanted: str) -> str:
    taken = {*graph.initializers, *(v.name for v in graph.inputs), *(v.name for node in graph for v in node.outputs)}
    return next(n for n in (wanted, *(f"{wanted}_{i}" for i in range(len(taken) + 1))) if n not in taken)


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
        if value is None or value.name not in graph.initializers or value.uses():
            continue
        # Old files list weights as inputs too: without the weight, the caller would have to feed it.
        if not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[value.name]
