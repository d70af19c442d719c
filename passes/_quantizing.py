"""QuantizeLinear and DequantizeLinear put into a graph: scales from ranges, weights stored as integers.

A range always holds zero, which must be representable: it pads convolutions and is what ReLU leaves. Symmetric ranges have
a zero point of 0; weights use −127 … 127, so that a product of two can't be beyond what pairs of them add up to in 16 bits.
Weights that lie on a grid already keep its step, so that rounding a second time changes nothing. Float8 (E4M3) has no zero
point but 0, and its scale is the peak ÷ 448.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from perwatt.contract import QuantizationStyle
from perwatt.fusion import Builder
from perwatt.passes._placement import Placement, Site, out_axis
from perwatt.passes._quantized import grid_steps
from perwatt.passes._weights import Product, product_from, unfit
from perwatt.patterns import stored

TINY = float(np.finfo(np.float32).tiny)
FLOAT8 = "float8_e4m3fn"
LARGEST_FLOAT8 = 448.0


@dataclass(frozen=True)
class Scale:
    """One scale and zero point: x is about (q − zero_point) · scale."""

    scale: np.float32
    zero_point: Any


def scale_for(low: float, high: float, style: QuantizationStyle) -> Scale:
    """Scale and zero point of an activation that lies between `low` and `high`, in the style's type."""
    low, high = min(low, 0.0), max(high, 0.0)
    if style.activation_type == FLOAT8:
        return Scale(_least(max(-low, high) / LARGEST_FLOAT8), np.zeros((), _float8()))
    if low == 0.0 and style.unsigned_activations:
        return Scale(_least(high / 255), np.uint8(0))
    if style.activation_symmetric:
        return Scale(_least(max(-low, high) / 127), np.int8(0))
    scale = _least((high - low) / 255)
    zero = int(np.clip(np.rint(-low / float(scale)), 0, 255))
    if style.unsigned_activations:
        return Scale(scale, np.uint8(zero))
    return Scale(scale, np.int8(zero - 128))


def _least(scale: float) -> np.float32:
    """A scale that can be divided by."""
    return np.float32(max(scale, TINY))


def _float8() -> Any:
    import ml_dtypes

    return ml_dtypes.float8_e4m3fn


def quantized_weight(weight: Any, axis: int | None, kind: str = "int8") -> tuple[Any, Any]:
    """(codes of the weight's shape, int8 or float8 as `kind` says; float32 scales: one for each channel along `axis`, or
    one)."""
    over = None if axis is None else tuple(a for a in range(weight.ndim) if a != axis % weight.ndim)
    peak = np.abs(weight.astype(np.float64)).max(axis=over, keepdims=over is not None, initial=0.0)
    if kind == FLOAT8:
        scales = np.maximum(peak / LARGEST_FLOAT8, TINY).astype(np.float32)
        codes = np.clip(weight / scales, -LARGEST_FLOAT8, LARGEST_FLOAT8).astype(_float8())
    else:
        steps = grid_steps(weight, axis)
        scales = np.maximum(peak / 127 if steps is None else steps.reshape(peak.shape), TINY).astype(np.float32)
        codes = np.clip(np.rint(weight / scales), -127, 127).astype(np.int8)
    return codes, scales.reshape(-1) if axis is not None else scales.reshape(())


def weight_axis(product: Product, style: QuantizationStyle) -> int | None:
    """The axis along which a product's weight has a scale for each channel; None for one scale."""
    axis = out_axis(product) if style.weight_per_channel else None
    return None if axis is None else axis % stored(product.weight).ndim


def rounded_weight(product: Product, style: QuantizationStyle) -> Any:
    """The stored weight there and back through the integers, in its own type."""
    weight, axis = stored(product.weight), weight_axis(product, style)
    codes, scales = quantized_weight(weight, axis, style.weight_type)
    return (codes.astype(np.float32) * _aligned(scales, weight, axis)).astype(weight.dtype)


def _aligned(scales: Any, weight: Any, axis: int | None) -> Any:
    """Scales shaped so that they multiply the weight."""
    return scales if axis is None else scales.reshape([-1 if a == axis else 1 for a in range(weight.ndim)])


def put_pairs(model: Any, placement: Placement, ranges: dict[str, tuple[float, float]], style: QuantizationStyle,
              taken: set[str]) -> None:  # fmt: skip
    """Quantize what `placement` names: `ranges` has low and high of every site's value. What isn't finite stays as it is, and
    so does what would share its scale: no 8-bit type has a mask's infinity."""
    for group in placement.groups():
        lows, highs = zip(*(ranges[site.value.name] for site in group), strict=True)
        if not np.isfinite((*lows, *highs)).all():
            continue
        for site in group:
            _put_pair(model.graph, site, scale_for(min(lows), max(highs), style), taken)
    stored_once: dict[tuple[str, int | None], Any] = {}
    for product in placement.weights:
        key = product.weight.name, weight_axis(product, style)
        if key not in stored_once:
            stored_once[key] = _store_weight(model.graph, product, style, taken)
        product.node.replace_input_with(1, stored_once[key])


def correct_biases(
    model: Any, placement: Placement, means: dict[str, Any], style: QuantizationStyle, taken: set[str]
) -> None:
    """Take back in the bias what rounded weights shift a product's outputs by on average: Σ (Wq − W) · mean of the input.

    `means`: of a product's data by input channel; without them nothing is corrected. A product without a bias keeps the shift.
    """
    for product in placement.weights:
        product = product_from(product.node)
        bias = None if product.bias is None else product.bias_numbers()
        if product.data.name not in means:
            continue
        mean = np.asarray(means[product.data.name])
        if bias is None or unfit(product, keeps_weight=True) or not _beta(product):
            continue
        if mean.shape != (product.ins,) or not np.isfinite(mean).all():
            continue
        weight = stored(product.weight).astype(np.float64)
        codes, scales = quantized_weight(weight, weight_axis(product, style), style.weight_type)
        error = codes.astype(np.float64) * _aligned(scales, weight, weight_axis(product, style)) - weight
        shift = _by_output(product, error * product.spread(mean, 1 - product.out_axis))
        _set_bias(model.graph, product, bias - product.alpha * shift, taken)


def _by_output(product: Product, terms: Any) -> Any:
    """Terms of the weight's shape, summed up for each output channel."""
    if product.kind != "ConvTranspose":
        return terms.sum(axis=tuple(axis for axis in range(terms.ndim) if axis != product.out_axis))
    # Its inputs lie `strides` apart, so that of the kernel's terms each output sees one in that many; and groups have the
    # same places on the second axis.
    strides = product.node.attributes["strides"].as_ints() if "strides" in product.node.attributes else ()
    grouped = terms.reshape(product.group, -1, terms.shape[1], math.prod(terms.shape[2:]))
    return grouped.sum(axis=(1, 3)).reshape(-1) / math.prod(strides)


def _beta(product: Product) -> float:
    return float(product.node.attributes.get_float("beta", 1.0)) if product.kind == "Gemm" else 1.0


def _set_bias(graph: Any, product: Product, bias: Any, taken: set[str]) -> None:
    build = Builder(graph, product.node, taken)
    old = product.bias
    numbers = (bias / _beta(product)).astype(stored(old).dtype)
    shape = stored(old).shape if stored(old).size == numbers.size else numbers.shape
    fresh = build.constant(numbers.reshape(shape), f"{old.name}_corrected")
    holder = product.add or product.node
    holder.replace_input_with(next(i for i, value in enumerate(holder.inputs) if value is old), fresh)


def _put_pair(graph: Any, site: Site, scale: Scale, taken: set[str]) -> None:
    value = site.value
    producer = value.producer()
    build = Builder(graph, producer or site.uses[0][0], taken)
    name = value.name
    parameters = (
        build.constant(np.asarray(scale.scale), f"{name}_scale"),
        build.constant(np.asarray(scale.zero_point), f"{name}_zero_point"),
    )
    codes = build.op("QuantizeLinear", value, *parameters)
    back = build.op("DequantizeLinear", codes, *parameters)
    # Called after who reads it: what a backend tells of its costs is told by names.
    for word, made in (("quantize", codes), ("dequantize", back)):
        made.producer().name = build.unused(f"{site.uses[0][0].name}/{word}")
    codes.shape = back.shape = value.shape
    back.type = value.type
    if producer is None:
        graph.insert_before(graph[0], build.nodes)
    else:
        graph.insert_after(producer, build.nodes)
    for node, position in site.uses:
        node.replace_input_with(position, back)


def _store_weight(graph: Any, product: Product, style: QuantizationStyle, taken: set[str]) -> Any:
    """The weight of `product` made from integers, right in front of it."""
    weight, axis = stored(product.weight), weight_axis(product, style)
    codes, scales = quantized_weight(weight, axis, style.weight_type)
    build, name = Builder(graph, product.node, taken), product.weight.name
    inputs = [
        build.constant(codes, f"{name}_{codes.dtype.name}"),
        build.constant(scales, f"{name}_scale"),
        build.constant(np.zeros(scales.shape, codes.dtype), f"{name}_zero_point"),
    ]
    back = build.op("DequantizeLinear", *inputs, axis=axis)
    back.shape, back.type = product.weight.shape, product.weight.type
    graph.insert_before(product.node, build.nodes)
    return back
