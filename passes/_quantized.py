"""Whether a model is quantized already, by what its graph shows; quantizing or casting it once more would round twice.

Looked for, in this order:

- QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear and their like, on activations or on weights alone: what tf2onnx makes
  of TFLite, what torch.ao's FakeQuantize is exported as, what quantizers write.
- Operators that calculate on integers with scales (QLinearConv, MatMulInteger, MatMulNBits …).
- Integer weights that are made floating point in the graph: Cast, Sub and Mul in front of a product.
- Fake quantization written out in floating point: Round, clipped and scaled again, in front of a product.

Float weights that lie on a grid of a few hundred steps, while activations are not quantized, are no such evidence
(`on_grid` finds them by their values). Somebody rounded weights and folded them back; a model like this runs in floating
point as any other does, and has as much to gain. Quantized again it loses nothing: a grid of at most 127 steps to either
side of zero is taken over with its own step (`grid_steps`), so that the codes are the old ones. Beside quantized activations
such weights need no second witness.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from perwatt.artifact import Artifact, graphs_of
from perwatt.patterns import given, is_stored

PAIRS = (
    "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "FakeQuantize", "Quant", "BipolarQuant",
    "TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear", "TRT_INT4DequantizeLinear",
)  # fmt: skip
"""Pairs of every dialect: ONNX's and Microsoft's, OpenVINO's, QONNX's, TensorRT's."""
INTEGER_OPERATORS = (
    "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "MatMulInteger16", "MulInteger", "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM", "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "GatherBlockQuantized", "QAttention", "QGemm", "QMoE",
    "QEmbedLayerNormalization", "QuantizeBFP", "DequantizeBFP",
)  # fmt: skip
INTEGER_PREFIXES = ("QLinear", "QOrdered")
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SMALL = ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")
SCALING = ("Cast", "CastLike", "Sub", "Add", "Mul", "Div")
MOVING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Expand", "Slice", "Concat")
"""What stands between integer codes and the product that they are the weight of."""
CLIPPING = ("Clip", "Min", "Max")
FARTHEST = 16
"""Nodes between a product and what it is looked back at for."""

MOST_STEPS = 255
"""To either side of zero: a grid of 256 values wherever its zero point lies."""
NEAR = 1e-3
"""How far from a whole number of steps a weight may lie, in steps; float32 leaves 255 · 2⁻²³."""
TELLING = 8
"""Different magnitudes that a channel needs before it says anything: fewer lie on some grid by chance, as ±1 do."""
TELLING_TOGETHER = 32
"""Different magnitudes that all channels looked at need together."""
CHANNELS, VALUES = 16, 64
"""How much of a weight is looked at: its first channels, and some values of each."""


def quantized_already(artifact: Artifact) -> str | None:
    """The reason why `artifact` counts as quantized, with the evidence; None where nothing says so."""
    nodes = [node for graph in graphs_of(artifact.model) for node in graph]
    counts = Counter(node.op_type for node in nodes)
    integer = [op for op in counts if op in INTEGER_OPERATORS or op.startswith(INTEGER_PREFIXES)]
    found = {op: counts[op] for op in (*PAIRS, *sorted(integer)) if counts[op]}
    if found:
        return _words(", ".join(f"{count} {op}" for op, count in found.items()))
    products = [node for node in nodes if node.op_type in PRODUCTS and node.domain == "" and len(given(node)) > 1]
    if weights := sum(_from_integers(node.inputs[1]) for node in products):
        return _words(f"{weights} {'weight is' if weights == 1 else 'weights are'} stored as integers and scaled")
    if rounded := sum(any(map(_rounded, node.inputs[:2])) for node in products):
        return _words(f"Round in front of {rounded} {'product' if rounded == 1 else 'products'}")
    return None


def _words(evidence: str) -> str:
    return f"the model is quantized already: {evidence}"


def _from_integers(weight: Any) -> bool:
    """Whether a weight is calculated, from stored tensors alone, of which one holds small integers."""
    leaves = [] if is_stored(weight) else list(_leaves(weight, FARTHEST))
    fixed = bool(leaves) and all(leaf is not None and is_stored(leaf) for leaf in leaves)
    return fixed and any(_is_small(leaf) for leaf in leaves)


def _leaves(value: Any, left: int) -> Iterator[Any]:
    """Where a scaled weight comes from; None for what is no part of that picture. Shapes and axes are not followed."""
    node = value.producer()
    if is_stored(value):
        yield value
    elif node is None or node.domain != "" or not left:
        yield None
    elif node.op_type in (*SCALING, "Concat"):
        for part in given(node)[: 1 if node.op_type == "CastLike" else None]:
            yield from _leaves(part, left - 1)
    elif node.op_type in MOVING:
        yield from _leaves(node.inputs[0], left - 1)
    else:
        yield None


def _is_small(value: Any) -> bool:
    node = value.producer()
    held = value.const_value if node is None else getattr(node.attributes.get("value"), "value", None)
    kind = getattr(held, "dtype", None) or value.dtype
    return kind is not None and kind.name in SMALL


def _rounded(value: Any) -> bool:
    """Whether a value is rounded, scaled again and perhaps clipped, right in front of a product."""
    for _ in range(FARTHEST):
        node = None if value is None or is_stored(value) else value.producer()
        if node is None or node.domain != "":
            return False
        if node.op_type == "Round":
            return True
        if node.op_type not in (*SCALING, *MOVING, *CLIPPING):
            return False
        # Of what is scaled and what it is scaled by, the first that is computed.
        value = next((part for part in given(node) if part is not None and not is_stored(part)), None)
    return False


# Weights on a grid ----------------------------------------------------------------------------------------------------


def on_grid(weight: Any, axis: int | None) -> bool:
    """Whether the channels of a weight along `axis` (all of it for None) lie on grids of 256 steps at most, one for each.

    Told from a sample of its values; False for a weight too small to tell."""
    told = [found for found in map(_sampled_magnitudes, _channels(weight, axis, CHANNELS)) if len(found) > TELLING]
    enough = sum(map(len, told)) > TELLING_TOGETHER
    return enough and all(_step(magnitudes, MOST_STEPS) is not None for magnitudes in told)


def grid_steps(weight: Any, axis: int | None, most: int = 127) -> Any:
    """The step of each channel's grid (one number for `axis` None), where the weight lies on grids of at most `most`
    steps to either side of zero with every single value; else None."""
    if not on_grid(weight, axis):
        return None
    steps = [_whole_step(channel, most) for channel in _channels(weight, axis)]
    return None if any(step is None for step in steps) else np.array(steps, np.float64)


def _whole_step(channel: Any, most: int) -> float | None:
    """A step that every value of `channel` is a multiple of; a channel of zeros has any."""
    magnitudes = _magnitudes(channel)
    step = _step(_thinned(magnitudes), most) if len(magnitudes) else 1.0
    # The sample may be even more regular than the whole is.
    if step is not None and len(magnitudes) > VALUES and not _fits(magnitudes, np.array([step]))[0]:
        step = _step(magnitudes, most)
    return step


def _step(magnitudes: Any, most: int) -> float | None:
    """The largest step that all of these (sorted, the peak last) are multiples of, the peak `most` at most."""
    candidates = magnitudes[-1] / np.arange(1, most + 1)
    fits = _fits(magnitudes, candidates)
    return float(candidates[fits.argmax()]) if fits.any() else None


def _fits(magnitudes: Any, steps: Any) -> Any:
    """For each step, whether all magnitudes are near a multiple of it; one that is none at all is no multiple."""
    multiples = magnitudes[None, :] / steps[:, None]
    whole = np.rint(multiples)
    return ((np.abs(multiples - whole) < NEAR) & (whole > 0)).all(axis=1)


def _sampled_magnitudes(channel: Any) -> Any:
    return _thinned(_magnitudes(channel[:: max(1, len(channel) // (4 * VALUES))]))


def _magnitudes(channel: Any) -> Any:
    """Different magnitudes above zero, sorted; none of a channel that isn't finite. Those that float32's rounding of codes
    times scale sets apart count once."""
    found = np.unique(np.abs(channel.astype(np.float64)))
    found = found[found > 0]
    if not len(found) or not np.isfinite(found[-1]):
        return found[:0]
    apart = np.diff(found, append=np.inf) > found[-1] * NEAR / MOST_STEPS
    return found[apart]


def _thinned(magnitudes: Any) -> Any:
    """Some of them, the peak always."""
    return magnitudes[np.unique(np.linspace(0, len(magnitudes) - 1, min(len(magnitudes), VALUES)).round().astype(int))]


def _channels(weight: Any, axis: int | None, most: int | None = None) -> Iterator[Any]:
    """Each channel's values in a row."""
    if axis is None:
        yield weight.reshape(-1)
        return
    for channel in range(min(weight.shape[axis], most or weight.shape[axis])):
        yield weight.take(channel, axis=axis).reshape(-1)
