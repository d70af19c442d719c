"""Which weights have the 2:4 pattern that NVIDIA's sparse tensor cores skip: two zeros in every four along the reduction.

TensorRT uses its sparse kernels only where the weights have the pattern already and `SPARSE_WEIGHTS` is set, and trying
them lengthens the build. So the flag is set where at least one weight of a convolution or matrix product has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perwatt.artifact import Artifact
from perwatt.signature import Array

TRANSPARENT = ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity")
"""What may stand between a weight and its product without moving its zeros."""


def sparse_weights(artifact: Artifact) -> list[str]:
    """Names of the weights that are 2:4 sparse, in the order of the graph."""
    found: dict[str, None] = {}
    for node in artifact.model.graph:
        axis = _reduction_axis(node)
        if axis is None:
            continue
        weight, tensor = _weight_behind(node.inputs[1])
        if tensor is not None and is_two_to_four(np.asarray(tensor.numpy()), axis):
            found[weight] = None
    return list(found)


def is_two_to_four(weight: Array, axis: int) -> bool:
    """True where every four values along `axis` have at least two zeros; its length is a multiple of four."""
    if weight.ndim < 2 or weight.shape[axis] % 4 or not weight.size:
        return False
    kept = weight != 0
    # Dense weights, nearly all there are, are told without moving them about.
    if 2 * np.count_nonzero(kept) > weight.size:
        return False
    groups = np.moveaxis(kept, axis, -1).reshape(-1, 4)
    return bool((groups.sum(axis=1) <= 2).all())


def _reduction_axis(node: Any) -> int | None:
    """The axis of the second input along which products are summed up; None for other operators."""
    if node.op_type == "Conv":
        return 1
    if node.op_type == "MatMul":
        return -2
    if node.op_type == "Gemm":
        transposed = node.attributes.get("transB")
        return 1 if transposed is not None and transposed.as_int() else 0
    return None


def _weight_behind(value: Any) -> tuple[str, Any]:
    """Name and tensor of the constant that `value` comes from, through quantization and casts; ("", None) for none."""
    while value is not None:
        if value.const_value is not None:
            return str(value.name), value.const_value
        node = value.producer()
        if node is None or node.op_type not in TRANSPARENT:
            break
        value = node.inputs[0]
    return "", None
