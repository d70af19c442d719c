"""Which stored numbers of a graph are learnt: what training would have made, and not what somebody wrote down.

Operands of products, scales and shifts of normalizations, biases, slopes. Left as they are: statistics of batch normalization,
which are measured; tables that rows are looked up in, of which a few thousand samples ask for a few rows; what else is stored and
varies along several axes (tables of positions, anchors, masks), or is no operand at all (limits, scales of Resize).
"""

from __future__ import annotations

from typing import Any

from perwatt.artifact import graphs_of
from perwatt.interpreter_weights import weight_names

LEARNT: dict[str, tuple[int, ...]] = {
    "Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (0, 1, 2), "MatMul": (0, 1), "Einsum": (0, 1, 2),
    "BatchNormalization": (1, 2), "InstanceNormalization": (1, 2), "GroupNormalization": (1, 2),
    "LayerNormalization": (1, 2), "RMSNormalization": (1,), "PRelu": (1,), "LSTM": (1, 2, 3), "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
}  # fmt: skip
"""Operator → which of its inputs training makes."""
FLAT = ("Add", "Sub", "Mul", "Div")
"""What is stored for these is a bias or a scale where it varies along one axis at most."""
THROUGH = (
    "Cast", "Concat", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
"""What a weight may go through on its way to its operator."""


def learnt_names(model: Any) -> set[str]:
    """Names, as the interpreter has them, of the constants of `model` that are learnt."""
    names = weight_names(model)
    found = set()
    for graph in graphs_of(model):
        stored = [*graph.initializers.values(), *(node.outputs[0] for node in graph if node.op_type == "Constant")]
        found |= {names[id(value)] for value in stored if id(value) in names and _is_learnt(value, _is_flat(value))}
    return found


def _is_learnt(value: Any, flat: bool) -> bool:
    """Whether any operator has a value, or what it goes through, where training puts something."""
    for use in value.uses():
        kind = use.node.op_type
        if use.idx in LEARNT.get(kind, ()) or (kind in FLAT and flat):
            return True
        if kind in THROUGH and use.idx == 0 and any(_is_learnt(out, flat) for out in use.node.outputs):
            return True
    return False


def _is_flat(value: Any) -> bool:
    return value.shape is None or sum(not isinstance(size, int) or size > 1 for size in value.shape) <= 1
