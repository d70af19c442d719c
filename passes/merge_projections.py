"""Merge matrix products that share their input into one with all their columns, split afterwards.

Attention projects one input to queries, keys and values (Vaswani et al. 2017, section 3.2.2), of equal widths or, where
several query heads share keys and values, of unequal ones (Ainslie et al. 2023); a gated feed-forward layer projects one
to gate and values (Shazeer 2020). Side by side in one matrix they are one product, which reads the input once, is started
once and fills a machine that narrow products leave half idle:

    MatMul(x, Wq) → Add(bq),  MatMul(x, Wk) → Add(bk),  MatMul(x, Wv)
    becomes        Split(Add(MatMul(x, [Wq Wk Wv]), [bq bk 0]), axis=-1)

It is there for machines that narrow products leave idle, and not in the default pipeline: on CPUs Split along the last
axis is a copy. Measured there on one thread, with 8 × 128 rows of 768, queries, keys and values together took 0.99 to
1.09 times the CPU time of three products in OpenVINO and 1.00 to 1.06 in ONNX Runtime, gate and values 1.03 to 1.51.
Products with and without a bias merge, the bias that is missing being zeros; MatMul and Gemm don't merge with each
other. What stays apart, and is told: quantized and computed weights, weights that others use too (they would be stored
twice), biases that are more than a row, and products of which a result is used in another graph (a branch of If, a
Loop's body), which may never ask for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._weights import Product, nodes_of, product_from, unfit
from perwatt.patterns import Match, dims, is_stored, made_by, stored


@dataclass(frozen=True)
class MergeProjections(Fusion):
    """Settings: the `least` number of products worth a Split (search: 2, 3)."""

    in_default: ClassVar[bool] = False
    # The sums are the same, in an order that depends on the width of the whole.
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    after: ClassVar[tuple[str, ...]] = (
        "cancel-reshapes", "cancel-transposes", "fold-batchnorm", "fold-scales", "fuse-attention",
        "fuse-rotary-embedding", "unflatten-gemm",
    )  # fmt: skip
    roots: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm")
    what: ClassVar[str] = "groups of projections merged"
    # From there on Split takes its sizes as an input.
    opset: ClassVar[int] = 13

    least: int = 2

    def find(self, node: Any) -> Iterator[Match]:
        siblings = _siblings(node)
        ready = [one for one in siblings if _refused(one) is None]
        group = ready if len(ready) >= self.least else siblings
        # Each group is named once, by its first.
        if len(group) >= max(self.least, 2) and group[0].node is node:
            results = tuple(one.output for one in group)
            yield Match(node, nodes_of(group), results, named={"group": group})

    def check(self, match: Match) -> Iterator[str]:
        for one in match.named["group"]:
            if reason := _refused(one):
                yield reason

    def rewrite(self, match: Match, build: Builder) -> Any:
        import onnx_ir as ir

        group: list[Product] = match.named["group"]
        first, columns = group[0], [one.outs for one in group]
        flat = dims(first.output) or dims(first.node.outputs[0])
        shape = None if flat is None else ir.Shape([*flat[:-1], sum(columns)])
        name = f"{first.node.outputs[0].name}_merged"
        weight, turned = _weights(group)
        operands = [first.data, build.constant(weight, f"{name}_weight")]
        biased = any(one.bias is not None for one in group)
        bias = build.constant(_biases(group, weight.dtype), f"{name}_bias") if biased else None
        if bias is not None and first.kind == "Gemm":
            operands.append(bias)
        whole = build.op(first.kind, *operands, transA=1 if first.data_turned else None, transB=1 if turned else None)
        whole.shape = shape
        if bias is not None and first.kind == "MatMul":
            whole = build.op("Add", whole, bias)
            whole.shape = shape
        sizes = build.constant(np.array(columns, np.int64), f"{name}_widths")
        return build.op("Split", whole, sizes, outputs=len(group), axis=-1)


def _siblings(node: Any) -> list[Product]:
    """The products in the graph of `node` that take its input in the same way, and have weights of some kind."""
    data, uses = node.inputs[0], list(node.inputs[0].uses())
    if is_stored(data):
        return []
    alike = [use.node for use in uses if use.idx == 0 and use.node.graph is node.graph and use.node.domain == ""]
    products = [product_from(one) for one in alike if one.op_type == node.op_type and _has_weights(one)]
    return [one for one in products if one.data_turned == Product(node).data_turned]


def _has_weights(node: Any) -> bool:
    return is_stored(node.inputs[1]) or made_by(node.inputs[1], "DequantizeLinear") is not None


def _refused(product: Product) -> str | None:
    if made_by(product.weight, "DequantizeLinear"):
        return "they are quantized"
    if any(use.node.graph is not product.node.graph for use in product.output.uses()):
        return "a result is used in another graph"
    return unfit(product)


def _weights(group: Sequence[Product]) -> tuple[Any, bool]:
    """All columns side by side, and whether they lie as rows (Gemm's transB)."""
    turned = all(one.out_axis == 0 for one in group)
    parts = [_scaled(one) if turned or one.out_axis == 1 else _scaled(one).T for one in group]
    return np.concatenate(parts, axis=0 if turned else 1), turned


def _scaled(product: Product) -> Any:
    """The weight with Gemm's alpha in it."""
    weight = stored(product.weight)
    return weight if product.alpha == 1 else (weight.astype(np.float64) * product.alpha).astype(weight.dtype)


def _biases(group: Sequence[Product], dtype: Any) -> Any:
    return np.concatenate([one.bias_numbers() for one in group]).astype(dtype)
