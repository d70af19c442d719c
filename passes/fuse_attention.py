"""Put scaled dot-product attention back together: one Attention where exporters left up to a dozen nodes.

softmax(scale · Q·Kᵀ + mask) · V (Vaswani and others 2017, section 3.2.1), in the form of ONNX's Attention-23. In pieces the
scores are written and read four to seven times, [batch, heads, queries, keys] each time; as one operator a backend can work
on blocks that stay in its caches (Dao and others 2022).

    MatMul(q, kᵀ) → Mul(scale) → Add(mask) → Softmax → MatMul(v)        becomes        Attention(q, k, v, mask)

Found by walking outwards from the softmax: factors on queries, keys, both or the scores; keys transposed at once or twice;
masks that are added, or chosen by Where; several of them; a stored triangle becomes `is_causal`, a mask that masks nothing
goes. Keys and values whose heads were repeated for groups of queries are taken before that (Ainslie and others 2023), also
under an Attention that the exporter has made already. A soft cap, a guard against NaN and windows or heads folded into the
batch are understood.

Rows in which everything is masked come out as before where masks are finite, and as zero where they were NaN. Masks get
their two last axes in full, because ONNX Runtime broadcasts only batch and heads.

By itself it is no faster on ONNX Runtime's CPU kernel (1.02 to 1.08 times the pieces); with `flatten-attention` behind it,
which it makes room for, 0.72 to 0.80; grouped queries 0.89. OpenVINO is slower with it and gets `decompose-attention`. Left
where the scores are wanted too, and where the shapes don't show that no mask or key enlarges the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import Any, ClassVar

import numpy as np

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._attention import Operand, Reading, existing, readings
from perwatt.passes._attention_building import mask_of
from perwatt.passes._attention_masks import Frame, Plan, is_causal, planned, uniform
from perwatt.passes._reusing import kept_once, source_of
from perwatt.patterns import Match, dims, equal, same_dims, stored

FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
CAUSAL = "causal"


@dataclass(frozen=True)
class FuseAttention(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    roots: ClassVar[tuple[str, ...]] = ("MatMul", "Attention")
    what: ClassVar[str] = "attentions put together"
    opset: ClassVar[int] = 23
    operator: ClassVar[str | None] = "Attention"
    depends_on_target: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("fold-scales", "fuse-rotary-embedding", "remove-softmax-guards")

    def find(self, node: Any) -> Iterator[Match]:
        if node.op_type == "MatMul":
            found = readings(node)
        else:
            there = existing(node)
            found = iter([there] if there is not None and _can_be_better(there, node) else [])
        for reading in found:
            named = {"reading": reading}
            yield Match(node, reading.nodes, (node.outputs[0],), {}, named, reading.shared)

    def check(self, match: Match) -> Iterator[str]:
        reading: Reading = match.named["reading"]
        frame = _frame(reading)
        if isinstance(frame, str):
            yield frame
            return
        plan = planned(reading, frame)
        if isinstance(plan, str):
            yield plan
            return
        symbols = [length for length in plan.spread or () if isinstance(length, str)]
        if any(source_of(symbol, match.root.graph) is None for symbol in symbols):
            yield "its mask must be broadcast to a length that no input has"

    def rewrite(self, match: Match, build: Builder) -> Any:
        reading: Reading = match.named["reading"]
        frame = _frame(reading)
        plan = planned(reading, frame) if isinstance(frame, Frame) else ""
        assert isinstance(frame, Frame) and isinstance(plan, Plan), "check lets nothing else pass"
        query, key, value = (operand.built(build) for operand in _operands(reading))
        for kind, factor in reading.factors:
            query = build.op(kind, query, factor)
        if frame.parts is not None:
            found = zip((query, key, value), _operands(reading), strict=True)
            query, key, value = (_grouped_anew(each, operand, frame.heads, build) for each, operand in found)
        mask = mask_of(plan, frame, build) if reading.mask is None else _own_mask(reading, frame)
        causal = plan.causal or reading.causal or mask is CAUSAL
        inputs = [query, key, value, *([mask] if mask is not None and mask is not CAUSAL else [])]
        folded = frame.axes == 3 and frame.parts is None
        out = build.op(
            "Attention", *inputs, scale=reading.scale, is_causal=int(causal) or None, softcap=reading.softcap or None,
            softmax_precision=1 if set(reading.types) - {frame.dtype} else None,
            q_num_heads=1 if folded else None, kv_num_heads=1 if folded else None,
        )  # fmt: skip
        if frame.parts is None:
            return out
        ends = [operand.dims() or [] for operand in _operands(reading)]
        shape = np.array([-1, *ends[0][1:-1], ends[2][-1]], np.int64)
        return build.op("Reshape", out, kept_once(build, shape))


def _operands(reading: Reading) -> tuple[Operand, Operand, Operand]:
    assert reading.query is not None and reading.key is not None and reading.value is not None
    return reading.query, reading.key, reading.value


# An Attention that is there already -----------------------------------------------------------------------------------


def _can_be_better(there: Reading, node: Any) -> bool:
    """Whether anything around an Attention can be taken into it."""
    taken = any(operand.value is not value for operand, value in zip(_operands(there), node.inputs, strict=False))
    frame = _frame(there)
    return taken or (
        there.mask is not None and not isinstance(frame, str) and _own_mask(there, frame) is not there.mask
    )


def _own_mask(there: Reading, frame: Frame) -> Any:
    """The mask of an Attention as it is; None where it masks nothing, CAUSAL where it is a triangle."""
    if uniform(there.mask) == (1.0 if there.mask.dtype.name == "BOOL" else 0.0):
        return None
    kept = stored(there.mask)
    triangle = kept is not None and kept.dtype.kind == "b" and not there.causal and is_causal(kept, frame)
    return CAUSAL if triangle else there.mask


# Shapes ---------------------------------------------------------------------------------------------------------------


def _frame(reading: Reading) -> Frame | str:
    """The shapes of the new operator, or why there can be none."""
    shapes = [operand.dims() for operand in _operands(reading)]
    query, key, value = (shape or [] for shape in shapes)
    types = {operand.value.dtype.name if operand.value.dtype is not None else "?" for operand in _operands(reading)}
    if not query or not key or not value or "?" in types:
        return "the shapes of its queries, keys or values aren't known"
    if {len(query), len(key), len(value)} not in ({3}, {4}):
        return f"its queries have {len(query)} axes, its keys {len(key)}, its values {len(value)}"
    dtype = next(iter(types))
    if len(types) > 1 or dtype not in FLOATS or not _computed_alike(reading, dtype):
        return "its types differ"
    if not (equal(query[0], key[0]) and equal(query[0], value[0])):
        return "its queries, keys and values may differ in their batch"
    if not isfinite(reading.scale) or reading.scale <= 0:
        return f"its scores are scaled by {reading.scale:g}"
    if reason := _misfit_of_factors(reading, query):
        return reason
    heads: list[Any] = [shape[1] if len(query) == 4 else 1 for shape in (query, key, value)]
    if not all(isinstance(each, int) and each > 0 for each in heads):
        return "its number of heads isn't known"
    if heads[1] != heads[2] or heads[0] % heads[1]:
        return f"its heads are {heads[0]} of queries, {heads[1]} of keys, {heads[2]} of values"
    frame = Frame(query[0], heads[0], (query[-2], key[-2]), len(query), dtype)
    return _regrouped(reading, frame, [*query[:-1], key[-2]]) if reading.levels else frame


def _computed_alike(reading: Reading, dtype: str) -> bool:
    """Whether scores are nowhere cast to anything but float32 from less."""
    casts = set(reading.types) - {dtype}
    return not casts or (casts == {"FLOAT"} and dtype in ("FLOAT16", "BFLOAT16"))


def _misfit_of_factors(reading: Reading, query: Sequence[Any]) -> str | None:
    """Why what scales the scores can't scale the queries; None where it can."""
    for _, factor in reading.factors:
        found = dims(factor)
        if found is None or reading.levels or len(found) > len(query) or (found and found[-1] != 1):
            return "its scores are scaled by something that queries can't be scaled by"
        if not all(n == 1 or equal(n, m) for n, m in zip(found[::-1], query[::-1], strict=False)):
            return "its scores are scaled by something that queries can't be scaled by"
    return None


def _regrouped(reading: Reading, frame: Frame, scores: Sequence[Any]) -> Frame | str:
    """The frame where scores were reshaped on the way, for masks on windows or on heads that are folded into the batch."""
    if any(level is None or len(level) < 3 for level in reading.levels):
        return "the shapes that its scores are given aren't known"
    # The first axis follows from the number of elements.
    split = tuple(not same_dims(level[1:], list(scores[1:])) for level in reading.levels)
    others = [level for level, differs in zip(reading.levels, split, strict=True) if differs]
    if split[0] or split[-1] or any(not same_dims(level[1:], others[0][1:]) for level in others):
        return "its scores are reshaped in more than one way"
    if not any(split[term.level] for term in reading.terms):
        return frame
    batch, *parts = others[0][:-2]
    lengths = others[0][-2:]
    whole = [*parts, *lengths, *scores[-2:]]
    kept_heads = frame.axes == 3 or (len(parts) > 1 and parts[-1] == frame.heads)
    depths = [(operand.dims() or [None])[-1] for operand in _operands(reading)]
    if not all(isinstance(length, int) for length in (*whole, *depths)) or not same_dims(lengths, list(scores[-2:])):
        return "its scores are reshaped to lengths that aren't known"
    if not kept_heads or not parts or _heads_of_keys(reading) != frame.heads:
        return "its scores are reshaped in a way that mixes heads"
    return replace(frame, batch=batch, heads=prod(parts), parts=tuple(parts), split=split)


def _heads_of_keys(reading: Reading) -> Any:
    shape = _operands(reading)[1].dims() or []
    return shape[1] if len(shape) == 4 else 1


def _grouped_anew(value: Any, operand: Operand, heads: int, build: Builder) -> Any:
    """[batch · …, length, depth] as [batch, heads, length, depth]."""
    shape = np.array([-1, heads, *(operand.dims() or [])[-2:]], np.int64)
    return build.op("Reshape", value, kept_once(build, shape))
