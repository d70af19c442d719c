"""The interval that a value lies in, read off the graph: whether scores may be −∞, and whether they may be NaN.

Interval arithmetic (Moore 1966), from a value backwards to what is stored and to what is computed from activations.
Products and normalizations are taken to give ordinary numbers: finite, and within ±10⁴. A model in which they overflow is
broken with and without a mask. Of inputs nothing is taken for granted, but that integers are finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from perwatt.passes._rearranging import dtype_of
from perwatt.patterns import given, is_stored, stored

ORDINARY = 1e4
LONGEST_AXIS = 2.0**31
_DEEPEST = 100

COMPUTED = frozenset({
    "MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "Attention", "RotaryEmbedding", "DequantizeLinear",
    "LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization",
    "Gelu", "Swish", "HardSwish", "Mish", "Softplus",
})  # fmt: skip
"""Operators of which ordinary numbers are expected, whatever goes in."""

FIXED = MappingProxyType({
    "Softmax": (0, 1), "Sigmoid": (0, 1), "HardSigmoid": (0, 1), "Tanh": (-1, 1), "Erf": (-1, 1),
    "Shape": (1, LONGEST_AXIS), "Size": (1, LONGEST_AXIS),
})  # fmt: skip
"""Operators whose results lie in one interval. Nothing is computed where an axis is empty."""

MOVES = frozenset({
    "Identity", "Reshape", "Flatten", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Tile", "Split", "Slice", "Gather",
    "GatherElements", "GatherND",
})  # fmt: skip
"""Operators that take elements of their first input as they are."""


@dataclass(frozen=True)
class Interval:
    """All elements lie within, none is NaN; `low` may be −∞, `high` is finite."""

    low: float
    high: float


Known = Interval | str
"""An interval, or in words why there is none."""


class Bounds:
    """What is known of the values of a graph. Whoever changes the graph makes a new one."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}
        self._depth = 0

    def of(self, value: Any) -> Known:
        """The interval that `value` lies in."""
        if id(value) not in self._known:
            self._depth += 1
            found = self._found(value) if self._depth < _DEEPEST else "the way back to its mask is too long"
            self._depth -= 1
            self._known[id(value)] = found if isinstance(found, str) else _rounded(found, dtype_of(value))
        return self._known[id(value)]

    def low(self, value: Any) -> float:
        found = self.of(value)
        return -math.inf if isinstance(found, str) else found.low

    def high(self, value: Any) -> float:
        found = self.of(value)
        return math.inf if isinstance(found, str) else found.high

    def _found(self, value: Any) -> Known:
        if is_stored(value):
            return _of_array(stored(value))
        found = self._computed(value, value.producer())
        return (_any_of_type(dtype_of(value)) or found) if isinstance(found, str) else found

    def _computed(self, value: Any, node: Any) -> Known:
        if node is None:
            return "an input reaches it that may hold −∞ or NaN"
        kind = node.op_type
        if node.domain == "" and kind in FIXED:
            return Interval(*FIXED[kind])
        if node.domain == "" and kind in COMPUTED and value is node.outputs[0]:
            return Interval(-ORDINARY, ORDINARY)
        if node.domain != "" or (kind not in RULES and kind not in MOVES):
            return f"{kind} may give −∞ or NaN"
        taken = given(node)[ELEMENTS.get(kind, slice(0, 1) if kind in MOVES else slice(None))]
        known = [Interval(0, 0) if one is None else self.of(one) for one in taken]
        unknown = next((one for one in known if isinstance(one, str)), None)
        return unknown or (known[0] if kind in MOVES else RULES[kind](node, *known))


def lowest(value: Any) -> float:
    """The lowest number that the type of `value` has; of a type that isn't known that of the narrowest."""
    import onnx_ir as ir

    name = dtype_of(value) or "FLOAT16"
    return 0.0 if name == "BOOL" else float(ir.DataType[name].min)


def _of_array(array: Any) -> Known:
    if array is None or not array.size or array.dtype.kind in "cOSU":
        return "what is stored is not a number"
    return _interval(float(array.min()), float(array.max()))


def _any_of_type(name: str | None) -> Interval | None:
    """What an integer or a truth value may be; None for others."""
    import onnx_ir as ir

    if name is None or name == "BOOL" or not ir.DataType[name].is_integer():
        return Interval(0, 1) if name == "BOOL" else None
    return Interval(float(ir.DataType[name].min), float(ir.DataType[name].max))


def _rounded(found: Interval, name: str | None) -> Known:
    """What becomes of an interval in numbers of a type; one that isn't known is taken for the narrowest."""
    import onnx_ir as ir

    whole = _any_of_type(name)
    if whole is not None:
        # What overflows wraps around.
        return found if whole.low <= found.low and found.high <= whole.high else whole
    dtype = ir.DataType[name or "FLOAT16"]
    low = found.low if found.low >= float(dtype.min) else -math.inf
    return _interval(low, found.high if found.high <= float(dtype.max) else math.inf)


def _interval(low: float, high: float) -> Known:
    if math.isnan(low) or math.isnan(high):
        return "what is added up may be NaN"
    return "what is added up may reach +∞" if high == math.inf else Interval(low, high)


# Rules ----------------------------------------------------------------------------------------------------------------

Rule = Callable[..., Known]
"""From a node and the intervals of its inputs, as far as elements come from them, to that of its output."""

ELEMENTS: Mapping[str, slice] = MappingProxyType({"Where": slice(1, 3), "ConstantOfShape": slice(0), "Trilu": slice(1)})
"""The inputs that elements come from, where those aren't all."""


def _corners(combine: Callable[[Any, Any], Any]) -> Rule:
    """Of an operator that is monotone in each operand."""

    def rule(node: Any, a: Interval, b: Interval) -> Known:
        with np.errstate(all="ignore"):
            found = combine(np.array([[a.low], [a.high]]), np.array([b.low, b.high]))
        return _interval(float(found.min()), float(found.max()))

    return rule


def _divided(node: Any, a: Interval, b: Interval) -> Known:
    return "a division may be by zero" if b.low <= 0 <= b.high else _corners(np.divide)(node, a, b)


def _root(node: Any, a: Interval) -> Known:
    return _interval(math.sqrt(a.low) if a.low >= 0 else math.nan, math.sqrt(max(a.high, 0)))


def _negative(node: Any, a: Interval) -> Known:
    return _interval(-a.high, -a.low)


def _positive(node: Any, a: Interval) -> Known:
    return Interval(max(a.low, 0), max(a.high, 0))


def _any_of_them(node: Any, *of: Interval) -> Known:
    return Interval(min(one.low for one in of), max(one.high for one in of))


def _or_zero(node: Any, a: Interval) -> Known:
    return _any_of_them(node, a, Interval(0, 0))


def _largest(node: Any, *of: Interval) -> Known:
    return Interval(max(one.low for one in of), max(one.high for one in of))


def _smallest(node: Any, *of: Interval) -> Known:
    return Interval(min(one.low for one in of), min(one.high for one in of))


def _clipped(node: Any, *of: Interval) -> Known:
    inputs = given(node)
    low = of[1].low if len(inputs) > 1 and inputs[1] is not None else -math.inf
    high = of[2].high if len(inputs) > 2 else math.inf
    return _interval(min(max(of[0].low, low), high), min(max(of[0].high, low), high))


def _cast(node: Any, a: Interval) -> Known:
    if dtype_of(node.outputs[0]) != "BOOL":
        return a
    return Interval(0 if a.low <= 0 <= a.high else 1, 0 if a.low == a.high == 0 else 1)


def _filled(node: Any) -> Known:
    return _of_array(node.attributes["value"].as_tensor().numpy()) if "value" in node.attributes else Interval(0, 0)


def _inverse(node: Any, a: Interval) -> Known:
    return Interval(1 - a.high, 1 - a.low)


def ordered(node: Any) -> tuple[Any, Any, bool] | None:
    """Of a comparison: the operand that it asks to be the smaller, the other, and whether they may be equal."""
    if node.op_type not in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
        return None
    a, b = node.inputs if node.op_type.startswith("Less") else reversed(node.inputs)
    return a, b, node.op_type.endswith("OrEqual")


def _compared(node: Any, a: Interval, b: Interval) -> Known:
    small, large = (a, b) if node.op_type.startswith("Less") else (b, a)
    if small.high < large.low or (node.op_type.endswith("OrEqual") and small.high == large.low):
        return Interval(1, 1)
    never = small.low > large.high or (not node.op_type.endswith("OrEqual") and small.low == large.high)
    return Interval(0, 0) if never else Interval(0, 1)


RULES: Mapping[str, Rule] = MappingProxyType({
    "Add": _corners(np.add), "Sub": _corners(np.subtract), "Mul": _corners(np.multiply), "Div": _divided,
    "Neg": _negative, "Sqrt": _root, "Relu": _positive, "Where": _any_of_them, "Concat": _any_of_them, "Trilu": _or_zero,
    "Range": lambda node, start, limit, delta: _any_of_them(node, start, limit), "ConstantOfShape": _filled,
    "Max": _largest, "Min": _smallest, "Clip": _clipped, "Cast": _cast, "Not": _inverse, "And": _smallest, "Or": _largest,
    "Less": _compared, "LessOrEqual": _compared, "Greater": _compared, "GreaterOrEqual": _compared,
})  # fmt: skip
