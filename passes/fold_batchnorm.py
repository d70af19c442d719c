"""Fold a batch normalization into the weights and bias of the convolution or matrix product before it, or after it.

In inference a batch normalization is y = x · s + t with s = γ / √(σ² + ε) and t = β − μ · s for each channel (Ioffe and
Szegedy 2015, section 3.1), so it vanishes into the operator before it: W' = W · s, b' = b · s + t.

    Conv(x, W) → BatchNormalization(γ, β, μ, σ²)        becomes        Conv(x, W', b')

Where nothing stands before that could take it, as in networks that normalize first, it vanishes into all that it feeds:
W' = W · s along the input channels, and b' = b + Σ W · t.

    BatchNormalization(x, γ, β, μ, σ²) → Gemm(·, W, b)        becomes        Gemm(x, W', b')

Every backend does the first for what it recognises; doing it here gives calibration, quantization and pruning the weights
that will really run. The computation is in float64 and rounded once.

Refused where the product's output or its weights are used by somebody else, where weights are computed rather than stored,
and in training mode. A convolution that pads takes no shift from before it: the border's zeros are put in after the
normalization, and nothing was added to those. A matrix product has its channels on the last axis and a batch
normalization has them on axis 1: they meet at rank 2 only. One that finds no place is left as it is: multiplying and adding
by two operators costs two passes over memory where it costs one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from perwatt.artifact import Artifact
from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._weights import (
    Product,
    folded_after,
    folded_before,
    nodes_of,
    out_of_range,
    product_at,
    products_on,
    put_in,
    unfit,
)
from perwatt.patterns import Match, is_stored, only_user, stored


@dataclass(frozen=True)
class FoldBatchnorm(Fusion):
    """No settings."""

    # Rounding of the scaled weights adds up over the layers of a deep net; single layers stay within 1e-6.
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-3)
    after: ClassVar[tuple[str, ...]] = ("cancel-transposes", "fold-shapes", "unflatten-gemm")
    roots: ClassVar[tuple[str, ...]] = ("BatchNormalization",)
    what: ClassVar[str] = "batch normalizations folded into weights"

    def find(self, node: Any) -> Iterator[Match]:
        before = product_at(node.inputs[0], node.graph)
        after = products_on(node.outputs[0], node.graph)
        if before is not None:
            inside = before.nodes if only_user(before.output) is node else ()
            yield Match(node, (*inside, node), _outputs(node), named={"before": before})
        if after:
            results = tuple(product.output for product in after)
            yield Match(node, (node, *nodes_of(after)), results, named={"after": after})
        if before is None and not after:
            yield Match(node, (node,), _outputs(node))

    def check(self, match: Match) -> Iterator[str]:
        norm = match.root
        if norm.attributes.get_int("training_mode", 0) or len(_outputs(norm)) > 1:
            yield "it is in training mode"
        elif "before" in match.named:
            yield from _refused(norm, match.named["before"], only_user(norm.inputs[0]) is norm)
        elif "after" in match.named:
            for product in match.named["after"]:
                yield from _refused_by(norm, product)
        else:
            yield "no convolution or matrix product right before it"

    def rewrite(self, match: Match, build: Builder) -> Any:
        norm = match.root
        scale, shift = _scale_and_shift(norm)
        if product := match.named.get("before"):
            return put_in(build, product, product.data, *folded_after(product, scale, shift))
        after = match.named["after"]
        return tuple(put_in(build, one, norm.inputs[0], *folded_before(one, scale, shift)) for one in after)

    def ensures(self, before: Artifact, after: Artifact) -> Iterator[str]:
        if after.size_bytes() > before.size_bytes() * 1.01 + 4096:
            yield "folding made the weights larger"
        else:
            yield from super().ensures(before, after)


def _outputs(norm: Any) -> tuple[Any, ...]:
    """Its result, and statistics that somebody wants: those are given in training only."""
    return tuple(o for place, o in enumerate(norm.outputs) if not place or o.uses() or o.is_graph_output())


def _scale_and_shift(norm: Any) -> tuple[Any, Any]:
    """s and t of y = x · s + t, in float64."""
    gamma, beta, mean, variance = (stored(value).astype(np.float64) for value in norm.inputs[1:5])
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
        return scale, beta - mean * scale


def _refused(norm: Any, product: Product, exclusive: bool) -> Iterator[str]:
    """Why `norm` can't go into the product before it."""
    if not exclusive:
        yield "what it normalizes is used elsewhere too"
    elif reason := _unfit(norm, product):
        yield reason
    elif product.kind == "MatMul" and product.rank != 2:
        yield "it normalizes another axis than the channels of the product before it"
    elif reason := _sizes(norm, product.outs) or out_of_range(product, *_scale_and_shift(norm)):
        yield reason


def _refused_by(norm: Any, product: Product) -> Iterator[str]:
    """Why `norm` can't go into a product after it."""
    if reason := _unfit(norm, product):
        yield reason
    elif product.data_turned or (product.kind == "MatMul" and product.rank != 2):
        yield "it normalizes another axis than the channels of the product after it"
    elif reason := _sizes(norm, product.ins) or out_of_range(product, *_scale_and_shift(norm)):
        yield reason
    elif product.padded and _scale_and_shift(norm)[1].any():
        yield "what it adds would be missing in the padding of the convolution after it"


def _unfit(norm: Any, product: Product) -> str | None:
    if not all(is_stored(value) for value in norm.inputs[1:5]):
        return "weights are computed, not stored"
    return unfit(product)


def _sizes(norm: Any, channels: int) -> str | None:
    one_each = all(stored(value).shape == (channels,) for value in norm.inputs[1:5])
    return None if one_each else "it has more than one scale a channel"
