"""Write attention out in the pieces that a compiler knows best, for backends that do worse with it as one operator.

OpenVINO's plugin for CPUs makes one kernel of two products with a softmax between, the MHA pattern, where keys are transposed
like queries and then once more, which the product reads without a copy, and where factors and masks are put on the scores. What
becomes of its ScaledDotProductAttention, and of other ways to write the pieces, is slower: keys get a transposition of their own,
and behind every mask stands a search for NaN. So an Attention is taken apart, and pieces are put in that order:

    Attention(q, k, v, mask)          becomes    MatMul(q, Transpose(k)) → Mul(scale) → Add(mask) → Softmax → MatMul(v)
    MatMul(q · s, Transpose(x, (0, 2, 3, 1)) · s)
                becomes    MatMul(q, Transpose(Transpose(x, (0, 2, 1, 3)), (0, 1, 3, 2))) · s²

0.85 to 0.9 times the CPU time of Attention with a mask, 0.92 to 0.97 without one and for pieces in another order (8 × 128 and
8 × 197 × 768, 12 heads, f32 and bf16). Only for backends that say which operators they take whole, and not Attention: the
others see the pieces as more work. Rows in which everything is masked become the mean of all values, where Attention makes them
zero. Left: grouped queries, soft caps and caches, whose pieces no compiler puts together again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._attention import Operand, readings, unscaled, untransposed
from perwatt.passes._attention_masks import MOST_STORED, lowest, may_be_lowest
from perwatt.passes._reusing import kept_once, once
from perwatt.patterns import Match, dims, equal, given


@dataclass(frozen=True)
class DecomposeAttention(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    roots: ClassVar[tuple[str, ...]] = ("MatMul", "Attention")
    what: ClassVar[str] = "attentions written out"
    takes_apart: ClassVar[str | None] = "Attention"
    depends_on_target: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("fuse-attention", "cancel-transposes", "fold-scales", "remove-softmax-guards")

    def find(self, node: Any) -> Iterator[Match]:
        if node.op_type == "Attention":
            yield Match(node, (node,), (node.outputs[0],))
            return
        for reading in readings(node):
            scores = reading.nodes[-1]
            if (better := _better_order(scores)) is not None:
                yield Match(scores, (scores,), (scores.outputs[0],), {}, {"better": better}, better.passed)

    def check(self, match: Match) -> Iterator[str]:
        if match.root.op_type == "Attention":
            yield from _refusals(match.root)

    def rewrite(self, match: Match, build: Builder) -> Any:
        if match.root.op_type == "Attention":
            return _written_out(match.root, build)
        better: Better = match.named["better"]
        keys = build.op("Transpose", better.key.built(build), perm=[0, 1, 3, 2])
        scores = build.op("MatMul", better.query, keys)
        return scores if better.factor == 1 else build.op("Mul", scores, _number(better.factor, better.query, build))


# Pieces in another order ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Better:
    """The operands of a product of queries and keys before they were scaled by `factor` in all, and by which nodes."""

    query: Any
    key: Operand
    factor: float
    passed: tuple[Any, ...]


def _better_order(scores: Any) -> Better | None:
    """The same scores with keys transposed twice and factors behind the product; None where they are so, or can't be."""
    query, factor, passed = unscaled(scores.inputs[0])
    key, key_factor, key_passed = untransposed(scores.inputs[1])
    at_once = key.order == (0, 2, 1, 3)
    if len(key.dims() or []) != 4 or not (at_once or factor * key_factor != 1) or query.dtype is None:
        return None
    # Keys that were never transposed are best as they are.
    if not at_once and key.order is not None:
        return None
    return Better(query, key, factor * key_factor, (*passed, *key_passed))


# One operator ---------------------------------------------------------------------------------------------------------


def _refusals(attention: Any) -> Iterator[str]:
    inputs, attributes = given(attention), attention.attributes
    shapes = [dims(value) for value in inputs[:3]]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        yield "the shapes of its queries, keys or values aren't known, or have other than four axes"
        return
    query, key, value = (shape or [] for shape in shapes)
    others = attributes.get_float("softcap", 0.0) or attributes.get_int("qk_matmul_output_mode", 0)
    used = any(each.uses() or each.is_graph_output() for each in attention.outputs[1:])
    if len(inputs) > 4 or others or used or "softmax_precision" in attributes or "q_num_heads" in attributes:
        yield "it has a soft cap, a cache, or another result"
    if not equal(query[1], key[1]) or not equal(query[1], value[1]):
        yield "its keys and values are shared by groups of queries"
    if inputs[0].dtype is None or not isinstance(query[3], int):
        yield "the type or depth of its queries isn't known"
    square = isinstance(query[2], int) and query[2] == key[2] and query[2] ** 2 <= MOST_STORED
    if attributes.get_int("is_causal", 0) and not square:
        yield "its triangle would be of unknown size, or too large to store"


def _written_out(attention: Any, build: Builder) -> Any:
    query, keys, values = attention.inputs[:3]
    depth: Any = (dims(query) or [])[3]
    scale = attention.attributes.get_float("scale", 0.0) or float(depth) ** -0.5
    scores = build.op("MatMul", query, build.op("Transpose", keys, perm=[0, 1, 3, 2]))
    if scale != 1:
        scores = build.op("Mul", scores, _number(scale, query, build))
    mask = _mask(attention, build)
    if mask is not None:
        scores = build.op("Add", scores, mask)
    return build.op("MatMul", build.op("Softmax", scores, axis=-1), values)


def _mask(attention: Any, build: Builder) -> Any:
    """What is added to the scores; None where nothing is."""
    query, inputs = attention.inputs[0], given(attention)
    low = lowest(query.dtype.name) / 8
    mask = inputs[3] if len(inputs) > 3 else None
    if mask is not None and mask.dtype is not None and mask.dtype.name == "BOOL":
        kept, hidden = (_number(each, query, build) for each in (0.0, low))
        mask = once(build, "Where", mask, kept, hidden)
        mask.type = kept.type
    elif mask is not None and may_be_lowest(mask):
        mask = once(build, "Max", mask, _number(low, query, build))
    if not attention.attributes.get_int("is_causal", 0):
        return mask
    length: Any = (dims(query) or [])[2]
    triangle = _number(np.where(np.tril(np.ones((length, length), bool)), 0.0, low), query, build)
    return triangle if mask is None else once(build, "Add", mask, triangle)


def _number(array: Any, like: Any, build: Builder) -> Any:
    return kept_once(build, np.asarray(array, np.float64).astype(like.dtype.numpy()))
