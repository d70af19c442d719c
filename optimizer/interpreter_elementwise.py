"""Operators of the interpreter that work element by element, and that occur in the arithmetic of shapes.

Those of one value only are in `interpreter_elementwise_math`, types and bits in `interpreter_elementwise_types`.
"""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable
from typing import Any

import torch

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import (
    UNSIGNED,
    alike,
    all_host,
    as_tensor,
    is_host,
    mapped,
    narrow,
    ordered,
    tensors,
    unordered,
    wide,
)

FLOAT32_MAX = torch.finfo(torch.float32).max


def _exactly(function: Callable[..., Any], *found: torch.Tensor) -> torch.Tensor:
    """`function`, for which the bits of int64 do as well as those of an unsigned type."""
    if found[0].dtype not in UNSIGNED:
        return function(*found)
    made: torch.Tensor = function(*(wide(x) for x in found))
    return narrow(made, found[0].dtype)


@operator("Add", since=7, host=True)
def add(a: Any, b: Any) -> Any:
    if all_host(a, b):
        return mapped(python.add, a, b)
    return _exactly(torch.add, *alike(a, b))


@operator("Sub", since=7, host=True)
def sub(a: Any, b: Any) -> Any:
    if all_host(a, b):
        return mapped(python.sub, a, b)
    return _exactly(torch.sub, *alike(a, b))


@operator("Mul", since=7, host=True)
def mul(a: Any, b: Any) -> Any:
    if all_host(a, b):
        return mapped(python.mul, a, b)
    return _exactly(torch.mul, *alike(a, b))


@operator("Div", since=7, host=True)
def div(a: Any, b: Any) -> Any:
    """Of integers: truncated toward zero."""
    if all_host(a, b):
        return mapped(_quotient, a, b)
    a, b = alike(a, b)
    if a.is_floating_point() or a.is_complex():
        return torch.div(a, b)
    if a.dtype is torch.uint64:
        return _unsigned_quotient(wide(a), wide(b)).view(torch.uint64)
    return _exactly(_truncated, a, b)


def _truncated(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.div(a, b, rounding_mode="trunc")


def _quotient(a: Any, b: Any) -> Any:
    if _is_float(a) or _is_float(b):
        return a / b
    return a // b if (a >= 0) == (b > 0) else -(-a // b)


def _is_float(value: Any) -> bool:
    return isinstance(value, (float, torch.SymFloat))


def _unsigned_quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a / b of uint64 that int64 holds bit by bit (Hacker's Delight, 9-3: divide half of a, then put right by one)."""
    lowest = torch.iinfo(torch.int64).min
    not_less = (a ^ lowest) >= (b ^ lowest)
    small = torch.where(b > 0, b, 1)
    half = torch.div((a >> 1) & torch.iinfo(torch.int64).max, small, rounding_mode="trunc") << 1
    rest = a - half * small
    found = half + ((rest ^ lowest) >= (small ^ lowest)).to(torch.int64)
    return torch.where(b > 0, found, not_less.to(torch.int64))


@operator("Mod", since=10, host=True)
def mod(a: Any, b: Any, *, fmod: int = 0) -> Any:
    """The sign is the divisor's; with `fmod` the dividend's."""
    if all_host(a, b):
        return mapped(_remainder if fmod else python.mod, a, b)
    a, b = alike(a, b)
    if a.dtype is torch.uint64:
        wide_a, wide_b = wide(a), wide(b)
        return (wide_a - _unsigned_quotient(wide_a, wide_b) * wide_b).view(torch.uint64)
    return _exactly(torch.fmod if fmod else torch.remainder, a, b)


def _remainder(a: Any, b: Any) -> Any:
    return math.fmod(a, b) if _is_float(a) or _is_float(b) else a - b * _quotient(a, b)


@operator("Pow", since=7, host=True, numbers=(1,))
def power(x: Any, y: Any) -> Any:
    """The exponent may be of another type than the base, which is that of the output."""
    if all_host(x, y):
        return mapped(lambda base, exponent: base**exponent, x, y)
    if is_host(y) and not isinstance(y, (tuple, list)) and (x.is_floating_point() or not _is_float(y)):
        return torch.pow(x, y)
    x, y = tensors(x, y)
    # NumPy, and so the node tests, raises integers to floats in double precision.
    base = x.to(torch.float64) if y.is_floating_point() and not x.is_floating_point() else x
    return torch.pow(base, wide(y)).to(x.dtype)


@operator("Neg", since=6, host=True)
def neg(x: Any) -> Any:
    return mapped(python.neg, x) if all_host(x) else torch.neg(x)


@operator("Abs", since=6, host=True)
def absolute(x: Any) -> Any:
    if all_host(x):
        return mapped(lambda one: one if one >= 0 else -one, x)
    return x if not x.dtype.is_signed else torch.abs(x)


@operator("Sign", since=9)
def sign(x: Any) -> Any:
    x = as_tensor(x)
    return torch.sign(x) if x.dtype.is_signed else narrow(torch.ne(wide(x), 0), x.dtype)


@operator("Floor", since=6, host=True)
def floor(x: Any) -> Any:
    return mapped(lambda one: torch.sym_float(math.floor(one)), x) if all_host(x) else torch.floor(x)


@operator("Ceil", since=6, host=True)
def ceil(x: Any) -> Any:
    return mapped(lambda one: torch.sym_float(math.ceil(one)), x) if all_host(x) else torch.ceil(x)


@operator("Round", since=11, host=True)
def nearest(x: Any) -> Any:
    """Halves to even, as Python and torch do."""
    return mapped(lambda one: torch.sym_float(round(one)), x) if all_host(x) else torch.round(x)


@operator("Sqrt", since=6, host=True)
def sqrt(x: Any) -> Any:
    # Where attention is scaled by a size.
    return mapped(lambda one: one**0.5, x) if all_host(x) else torch.sqrt(x)


@operator("Reciprocal", since=6, host=True)
def reciprocal(x: Any) -> Any:
    return mapped(lambda one: 1.0 / one, x) if all_host(x) else torch.reciprocal(x)


def _ordered_pair(function: Callable[..., Any], a: Any, b: Any) -> Any:
    return unordered(function(ordered(a), ordered(b)), a.dtype)


@operator("Max", since=6, host=True)
def maximum(*found: Any) -> Any:
    if all_host(*found):
        return _folded(lambda a, b: mapped(torch.sym_max, a, b), found)
    return _folded(lambda a, b: _ordered_pair(torch.maximum, a, b), alike(*found))


@operator("Min", since=6, host=True)
def minimum(*found: Any) -> Any:
    if all_host(*found):
        return _folded(lambda a, b: mapped(torch.sym_min, a, b), found)
    return _folded(lambda a, b: _ordered_pair(torch.minimum, a, b), alike(*found))


@operator("Sum", since=6, host=True)
def total(*found: Any) -> Any:
    return _folded(add, found)


@operator("Mean", since=6)
def mean(*found: Any) -> Any:
    return torch.div(_folded(torch.add, alike(*found)), len(found))


def _folded(function: Callable[[Any, Any], Any], found: tuple[Any, ...]) -> Any:
    result = found[0]
    for one in found[1:]:
        result = function(result, one)
    return result


@operator("Clip", since=6)
def clip_by_attributes(x: Any, *, min: float = -FLOAT32_MAX, max: float = FLOAT32_MAX) -> Any:
    # The defaults stand for no limit, and are out of the range of half a float.
    low, high = (None if min <= -FLOAT32_MAX else min), (None if max >= FLOAT32_MAX else max)
    x = as_tensor(x)
    return x if low is None and high is None else torch.clamp(x, low, high)


@operator("Clip", since=11, host=True, numbers=(1, 2))
def clip(x: Any, low: Any = None, high: Any = None) -> Any:
    """The upper limit wins where they cross."""
    if low is None and high is None:
        return x
    if all_host(x, low, high):
        x = x if low is None else maximum(x, low)
        return x if high is None else minimum(x, high)
    if isinstance(x, torch.Tensor) and x.dtype not in UNSIGNED and not _any_tensor_or_row(low, high):
        # As numbers: a compiler sees the limits of ReLU6.
        return torch.clamp(x, low, high)
    x, low, high = alike(x, low, high)
    limits = [None if limit is None else ordered(limit) for limit in (low, high)]
    return unordered(torch.clamp(ordered(x), *limits), x.dtype)


def _any_tensor_or_row(*found: Any) -> bool:
    return any(isinstance(one, (torch.Tensor, tuple, list)) for one in found)


def _truths(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], bool]:
    """A comparison of host values that is decided at once: a symbolic truth could be neither branched on nor stored."""
    return lambda a, b: bool(function(a, b))


@operator("Equal", since=7, host=True)
def equal(a: Any, b: Any) -> Any:
    if all_host(a, b):
        return mapped(_truths(python.eq), a, b)
    a, b = alike(a, b)
    return torch.eq(wide(a), wide(b))


def _compared(host: Callable[[Any, Any], Any], function: Callable[..., Any], a: Any, b: Any) -> Any:
    if all_host(a, b):
        return mapped(_truths(host), a, b)
    a, b = alike(a, b)
    return function(ordered(a), ordered(b))


@operator("Greater", since=7, host=True)
def greater(a: Any, b: Any) -> Any:
    return _compared(python.gt, torch.gt, a, b)


@operator("GreaterOrEqual", since=12, host=True)
def greater_or_equal(a: Any, b: Any) -> Any:
    return _compared(python.ge, torch.ge, a, b)


@operator("Less", since=7, host=True)
def less(a: Any, b: Any) -> Any:
    return _compared(python.lt, torch.lt, a, b)


@operator("LessOrEqual", since=12, host=True)
def less_or_equal(a: Any, b: Any) -> Any:
    return _compared(python.le, torch.le, a, b)


@operator("And", since=7, host=True)
def both(a: Any, b: Any) -> Any:
    if all_host(a, b):
        return mapped(_truths(lambda one, other: one and other), a, b)
    return torch.logical_and(*alike(a, b))


@operator("Or", since=7, host=True)
def either(a: Any, b: Any) -> Any:
    if all_host(a, b):
        return mapped(_truths(lambda one, other: one or other), a, b)
    return torch.logical_or(*alike(a, b))


@operator("Xor", since=7, host=True)
def one_of_both(a: Any, b: Any) -> Any:
    if all_host(a, b):
        return mapped(_truths(python.ne), a, b)
    return torch.logical_xor(*alike(a, b))


@operator("Not", since=1, host=True)
def negation(x: Any) -> Any:
    return mapped(lambda one: not one, x) if all_host(x) else torch.logical_not(x)


@operator("Where", since=9, host=True)
def where(condition: Any, x: Any, y: Any) -> Any:
    if all_host(condition, x, y):
        return mapped(lambda which, one, other: one if which else other, condition, x, y)
    x, y = tensors(x, y, condition)[:2] if all_host(x, y) else alike(x, y)
    return _exactly(lambda one, other: torch.where(as_tensor(condition, x), one, other), x, y)


@operator("Identity", since=1, host=True)
def identity(x: Any) -> Any:
    return x


@operator("Dropout", since=7)
def dropout_of_inference(data: Any, *, ratio: float = 0.5, outputs: int = 1) -> tuple[Any, ...]:
    """Before opset 12 there is no training."""
    return data, (torch.ones_like(data, dtype=torch.bool) if outputs > 1 else None)


@operator("Dropout", since=12, host=(1, 2))
def dropout(
    data: Any, ratio: Any = 0.5, training_mode: Any = False, *, seed: int = 0, outputs: int = 1
) -> tuple[Any, ...]:
    """In training, random numbers are torch's: a seed of the model's means nothing to them."""
    data = as_tensor(data)
    if training_mode is None or training_mode is False:
        return data, (torch.ones_like(data, dtype=torch.bool) if outputs > 1 else None)
    # No branch: whether the model trains is known only at run time where an input says it.
    rate, trains = as_tensor(0.5 if ratio is None else ratio, data), as_tensor(training_mode, data)
    kept = (torch.rand_like(data) >= rate) | ~trains
    scale = torch.where(trains, 1 / (1 - rate), 1.0)
    return torch.where(kept, data * scale, 0.0).to(data.dtype), kept
