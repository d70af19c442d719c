"""Remove quantizations that change nothing: done twice, done to what is quantized already, or only to be moved around.

Quantizers put a QuantizeLinear and a DequantizeLinear (Q and DQ) around every operator, and graphs that were quantized in
pieces carry several of the same. Q rounds x/s to an integer and DQ multiplies it by s again (ONNX's operator
specification), so what comes from a DQ lies on its grid, and the same Q finds the same integer:

    Q(DQ(q))                      becomes        q
    DQ(Q(Transpose(DQ(q))))       becomes        Transpose(DQ(q))
    Q(Concat(DQ(p), DQ(q)))       becomes        Concat(p, q)
    two equal Q, or DQ, of x      become         one

The second holds for operators of one tensor that only move its entries or pick some, and spares OpenVINO a rounding that it
would do (3 to 10% of two convolutions with one of them in between); backends move the pair that is left through them by
themselves. Through Concat they don't (ONNX Runtime would compute a convolution behind it in floating point, four times
slower), so there it is the integers that are joined. Done to a Transpose, in turn, that would cost OpenVINO the integer
convolution before it.

Every integer stays what it was: a Q on its own grid is exact while the steps of its floating type are finer than half a
step of the grid, which is asked of every scale. What stays: pairs whose scales or zero points differ or are computed; a
pair that stands alone, which rounds; and a DQ of a stored weight, even if only floating-point operators use it, since int8
in the file and in memory is a quarter of the traffic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.patterns import Match, given, made_by, rank, stored

MOVERS = "Reshape|Transpose|Squeeze|Unsqueeze|Slice|MaxPool"
"""Operators whose every entry is one of their first input's, and that backends move a Q or DQ through."""
FINEST_STEP = {"FLOAT16": 2.0**-10, "BFLOAT16": 2.0**-7, "FLOAT": 2.0**-23, "DOUBLE": 2.0**-52}
"""Distance from 1 to the next larger number."""
SMALLEST = {"FLOAT16": 2.0**-14, "BFLOAT16": 2.0**-126, "FLOAT": 2.0**-126, "DOUBLE": 2.0**-1022}
LARGEST = {"FLOAT16": 65504.0, "BFLOAT16": 3e38, "FLOAT": 3e38, "DOUBLE": 1e308}


@dataclass(frozen=True)
class RemoveRedundantQuantization(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=0.0, rtol=0.0)
    roots: ClassVar[tuple[str, ...]] = ("QuantizeLinear", "DequantizeLinear")
    what: ClassVar[str] = "quantizations that changed nothing removed"

    def find(self, node: Any) -> Iterator[Match]:
        source, outputs = node.inputs[0], (node.outputs[0],)
        twin, concat, quantize = first_alike(node), made_by(source, "Concat"), made_by(source, "QuantizeLinear")
        if twin is not node:
            yield Match(node, (node,), outputs, named={"twin": twin})
        elif node.op_type == "QuantizeLinear" and made_by(source, "DequantizeLinear"):
            yield Match(node, (node,), outputs, {"moved": source, "result": source.producer().inputs[0]})
        elif node.op_type == "QuantizeLinear" and concat and all(made_by(v, "DequantizeLinear") for v in concat.inputs):
            yield Match(node, (node, concat), outputs, named={"concat": concat})
        elif node.op_type == "DequantizeLinear" and quantize and made_by(quantize.inputs[0], MOVERS):
            moved = quantize.inputs[0]
            if scheme_of(moved) is not NOT_QUANTIZED:
                yield Match(node, (node,), outputs, {"moved": moved, "result": moved}, shared=(quantize,))

    def check(self, match: Match) -> Iterator[str]:
        if "twin" in match.named:
            return
        concat, last = match.named.get("concat"), scheme(match.root)
        there = scheme_of(match["moved"]) if concat is None else _common([scheme(v.producer()) for v in concat.inputs])
        wanted = [last, *(scheme(node) for node in match.shared)]
        if there is None or last is None or None in wanted:
            yield "its scales are computed, differ, or move to other axes"
        elif any(one != there for one in wanted):
            yield "it is quantized anew with other parameters"
        elif match.root.op_type == "DequantizeLinear" and last.gives != there.gives:
            yield "it changes the floating type"
        elif reason := inexact(replace(there, floats=there.floats.union(*(one.floats for one in wanted if one)))):
            yield reason

    def rewrite(self, match: Match, build: Builder) -> Any:
        if "twin" in match.named:
            return match.named["twin"].outputs[0]
        if match.get("result") is not None:
            return match["result"]
        concat = match.named["concat"]
        integers = [value.producer().inputs[0] for value in concat.inputs]
        return build.op("Concat", *integers, axis=concat.attributes.get_int("axis"))


def first_alike(node: Any) -> Any:
    """The first node of its graph that does the same to the same value; `node` itself where no other does."""
    users = (use.node for use in node.inputs[0].uses() if use.idx == 0 and use.node.graph is node.graph)
    same_kind = (user for user in users if user.op_identifier() == node.op_identifier())
    return next((user for user in same_kind if user is node or _alike(user, node)), node)


def _alike(one: Any, other: Any) -> bool:
    if any(_attribute(one, name) != _attribute(other, name) for name in (*one.attributes, *other.attributes)):
        return False
    if given(one)[1:] == given(other)[1:]:
        return True
    first, second = scheme(one), scheme(other)
    return first is not None and second is not None and first == second and first.floats == second.floats


def _attribute(node: Any, name: str) -> Any:
    return node.attributes[name].value if name in node.attributes else None


# What is quantized how ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """How integers stand for numbers. `kind`: their type. `axis`: along which scales differ, None for one of all.
    `block` and `shape`: of scales that hold for blocks. `floats`: types that the arithmetic goes through. `gives`: the one
    that a DequantizeLinear makes."""

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    kind: str
    axis: int | None
    block: int = 0
    shape: tuple[int, ...] = ()
    floats: frozenset[str] = field(default=frozenset(), compare=False)
    gives: str = field(default="", compare=False)


NOT_QUANTIZED = Scheme((), (), "", None)


def scheme(node: Any) -> Scheme | None:
    """What a QuantizeLinear or DequantizeLinear does; None where it depends on the input or isn't known."""
    inputs = given(node)
    scale, zero = stored(inputs[1]), stored(inputs[2]) if len(inputs) > 2 else None
    kind = _kind(node)
    if scale is None or kind is None or inputs[1].dtype is None or (len(inputs) > 2 and zero is None):
        return None
    import onnx_ir as ir

    # 0 stands for the default of both attributes.
    chosen = [node.attributes.get_int(name, 0) or inputs[1].dtype for name in ("output_dtype", "precision")]
    named = [inputs[1].dtype.name, *(ir.DataType(one).name for one in chosen)]
    # What a QuantizeLinear gives is no floating type.
    floats = frozenset(name for name in named if name in FINEST_STEP or node.op_type == "DequantizeLinear")
    gives = named[1]
    zeros = np.zeros(1) if zero is None else zero
    if scale.size == 1:
        return Scheme((float(scale.item()),), (int(zeros.item()),), kind, None, floats=floats, gives=gives)
    axis, axes = node.attributes.get_int("axis", 1), rank(node.inputs[0]) or rank(node.outputs[0])
    spread = np.broadcast_to(zeros, scale.shape) if zeros.size == 1 else zeros
    return Scheme(
        tuple(scale.astype(np.float64).reshape(-1).tolist()),
        tuple(spread.astype(np.int64).reshape(-1).tolist()),
        kind,
        axis + axes if axis < 0 and axes is not None else axis,
        node.attributes.get_int("block_size", 0),
        tuple(scale.shape),
        floats,
        gives,
    )


def _kind(node: Any) -> str | None:
    """The type of the integers."""
    inputs = given(node)
    if len(inputs) > 2:
        return None if inputs[2].dtype is None else str(inputs[2].dtype.name)
    if node.op_type == "DequantizeLinear":
        return None if inputs[0].dtype is None else str(inputs[0].dtype.name)
    import onnx_ir as ir

    return str(ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8).name)


def inexact(wanted: Scheme) -> str | None:
    """Why a Q might not find the integer again that a DQ began with; None where it must."""
    width = {"INT8": 8, "UINT8": 8, "INT16": 16, "UINT16": 16, "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}.get(
        wanted.kind
    )
    if width is None or not wanted.floats <= set(FINEST_STEP):
        return f"{wanted.kind.lower()} has no grid of equal steps"
    most = 2**width - 1
    # Two roundings, each of half a step at most, must not add up to half a step of the grid.
    if any(most * FINEST_STEP[name] >= 0.5 for name in wanted.floats):
        return "its floating type is too coarse for its integers"
    if any(not SMALLEST[n] <= s <= LARGEST[n] / most for s in wanted.scales for n in wanted.floats):
        return "its scale is not positive, or too small or large for its type"
    return None


def scheme_of(value: Any) -> Scheme | None:
    """How integers stand for what only moved since it came from a DequantizeLinear; None where that isn't known,
    `NOT_QUANTIZED` where it came from elsewhere."""
    node = value.producer()
    if node is None or node.domain != "":
        return NOT_QUANTIZED
    if node.op_type == "DequantizeLinear":
        return scheme(node)
    if node.op_type not in MOVERS.split("|"):
        return NOT_QUANTIZED
    before = scheme_of(node.inputs[0])
    if before is None or before is NOT_QUANTIZED or before.axis is None:
        return before
    if node.op_type != "Transpose" or before.block or before.axis < 0 or "perm" not in node.attributes:
        return None
    return replace(before, axis=list(node.attributes["perm"].as_ints()).index(before.axis))


def _common(parts: Sequence[Scheme | None]) -> Scheme | None:
    """The scheme of all parts joined; channels' scales would have to be joined too."""
    if parts[0] is None or parts[0].axis is not None or any(part != parts[0] for part in parts):
        return None
    return replace(parts[0], floats=frozenset().union(*(part.floats for part in parts if part)))
