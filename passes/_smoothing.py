"""Outliers moved from activations into weights before both are quantized.

A few channels of a transformer's activations are a hundred times as large as the others, and with one scale for all these
lose their precision. Dividing channel j of a product's input by s[j] and multiplying row j of its weight by it changes nothing
but makes the input even:

    x @ W        is        (x / s) @ (s · W),        s[j] = peak of x[:, j] ^ α / peak of W[j] ^ (1 − α)

(Xiao et al.: "SmoothQuant: accurate and efficient post-training quantization for large language models", ICML 2023). All
products on one value share its s. The division is a Mul in front of the QuantizeLinear, which backends take in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from perwatt.fusion import Builder
from perwatt.passes._weights import Product
from perwatt.patterns import stored

FLOOR = 1e-5
"""The least peak of a channel, relative to the largest: what is never used needs no care."""


def smooth(model: Any, products: Sequence[Product], peaks: dict[str, Any], strength: float, taken: set[str]) -> int:
    """Even out the inputs of these matrix products, each with a stored weight of two axes; returns how many inputs.
    `peaks`: the largest magnitude in each channel of each input; `strength`: α."""
    by_input: dict[str, list[Product]] = {}
    for product in products:
        if product.kind == "MatMul":
            by_input.setdefault(product.data.name, []).append(product)
    done = 0
    for name, group in by_input.items():
        weights = [stored(product.weight) for product in group]
        factors = _factors(peaks[name], weights, strength) if np.shape(peaks[name]) == weights[0].shape[:1] else None
        if factors is None:
            continue
        _divide(model.graph, group, factors, taken)
        done += 1
    return done


def _factors(peak: Any, weights: Sequence[Any], strength: float) -> Any:
    """s by channel; None where nothing is there."""
    weight_peak = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0).astype(np.float64)
    peak = np.asarray(peak, np.float64)
    if not (peak.max(initial=0) > 0 and weight_peak.max(initial=0) > 0 and np.isfinite(peak).all()):
        return None
    peak, weight_peak = (np.maximum(each, FLOOR * each.max()) for each in (peak, weight_peak))
    return peak**strength / weight_peak ** (1 - strength)


def _divide(graph: Any, group: Sequence[Product], factors: Any, taken: set[str]) -> None:
    value = group[0].data
    build = Builder(graph, value.producer() or group[0].node, taken)
    even = build.op("Mul", value, build.constant((1 / factors).astype(np.float32), f"{value.name}_evened"))
    even.shape, even.type = value.shape, value.type
    if value.producer() is None:
        graph.insert_before(group[0].node, build.nodes)
    else:
        graph.insert_after(value.producer(), build.nodes)
    for product in group:
        weight = stored(product.weight)
        scaled = (weight.astype(np.float64) * factors[:, None]).astype(weight.dtype)
        fresh = Builder(graph, product.node, taken).constant(scaled, f"{product.weight.name}_evened")
        fresh.shape, fresh.type = product.weight.shape or fresh.shape, product.weight.type or fresh.type
        product.node.replace_input_with(0, even)
        product.node.replace_input_with(1, fresh)
