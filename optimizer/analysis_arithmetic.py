"""Arithmetic on elements that may be expressions: operators that work element by element, and reductions.

Only what comes out the same to the last bit wherever it is computed: integers and booleans, and of floating point what
IEEE 754 rounds correctly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from perwatt.analysis_content import Affine, Content, Shape, as_affine, as_array, numpy_dtype, objects, stretched
from perwatt.analysis_expressions import Number, at_least, equal, less, maximum, minimum, product, remainder, truncated
from perwatt.analysis_facts import Facts
from perwatt.patterns import axes_of

MOST_SYMBOLIC = 4096
"""Elements of an array with expressions in it: each costs a call."""

Rule = Callable[[Facts, Any], Any]
"""From a node to the elements of its first output."""


def _cast(facts: Facts, node: Any) -> Any:
    content, before = facts.content(node.inputs[0]), numpy_dtype(facts.dtype(node.inputs[0]))
    dtype = numpy_dtype(facts.dtype(node.outputs[0]))
    if content is None or before is None or dtype is None:
        return None
    if before.kind == "f" and dtype.kind == "f":
        # Weights in another precision are a matter of accuracy and size, not of shapes.
        return content if before == dtype else None
    if isinstance(content, np.ndarray) and content.dtype != object:
        return _cast_array(content, dtype)
    if dtype.kind != "b":
        # Narrower types than these are no place for sizes.
        return content if dtype.kind in "iu" and dtype.itemsize >= 4 else None
    if isinstance(content, Affine):
        unlike = _unlike_zero(content.base) if content.uniform else None
        return None if unlike is None else Affine(int(unlike), content.strides)
    return _each(_unlike_zero, content)


def _cast_array(content: Any, dtype: Any) -> Any:
    """`content` in another type, where every element fits; what happens to the others is up to the machine."""
    if content.dtype.kind == "f" and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        whole = np.trunc(content.astype(np.float64))
        # 2.0**63 is no int64, though it compares equal to the largest as a float.
        if not np.all((whole >= float(limits.min)) & (whole < float(limits.max))):
            return None
    if content.dtype.kind in "iu" and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if content.size and not (limits.min <= int(content.min()) and int(content.max()) <= limits.max):
            return None
    return content.astype(dtype)


def _unlike_zero(number: Any) -> Any:
    found = equal(number, 0)
    return None if found is None else not found


def _each(function: Callable[..., Any], *arrays: Any) -> Any:
    """An array of objects: `function` of the elements, None where one of them isn't known."""

    def careful(*items: Any) -> Any:
        return None if any(item is None for item in items) else function(*items)

    if np.broadcast(*arrays).size > MOST_SYMBOLIC:
        return None
    return np.asarray(np.frompyfunc(careful, len(arrays), 1)(*arrays), dtype=object)


def _binary(exact: Callable[..., Any], symbolic: Callable[..., Any], affine: Callable[..., Any] | None = None) -> Rule:
    def rule(facts: Facts, node: Any) -> Any:
        contents = [facts.content(value) for value in node.inputs]
        shapes = [facts.shape(value) for value in node.inputs]
        if any(content is None or shape is None for content, shape in zip(contents, shapes, strict=True)):
            return None
        arrays = [as_array(content, shape) for content, shape in zip(contents, shapes, strict=True)]
        if any(array is None for array in arrays):
            shape = facts.shape(node.outputs[0])
            wide = [_widened(content, before, shape) for content, before in zip(contents, shapes, strict=True)]
            if affine is None or shape is None or any(one is None for one in wide):
                return None
            return affine(*wide, shape)
        if any(array.dtype == object for array in arrays):
            return None if any(array.dtype.kind == "f" for array in arrays) else _folded(_each, symbolic, arrays)
        with np.errstate(all="ignore"):
            return _folded(lambda function, *pair: function(*pair), exact, arrays)

    return rule


def _folded(apply: Callable[..., Any], function: Callable[..., Any], arrays: Sequence[Any]) -> Any:
    """`function` of two arrays, or of more from left to right."""
    total = arrays[0]
    for array in arrays[1:]:
        total = apply(function, total, array) if total is not None else None
    return total


def _widened(content: Content | None, before: Shape | None, shape: Shape | None) -> Affine | None:
    affine = as_affine(content, before)
    return None if before is None or shape is None else stretched(affine, before, shape)


def _added(sign: int) -> Callable[..., Affine]:
    def add(a: Affine, b: Affine, shape: Shape) -> Affine:
        return Affine(a.base + b.base * sign, tuple(x + y * sign for x, y in zip(a.strides, b.strides, strict=True)))

    return add


def _multiplied(a: Affine, b: Affine, shape: Shape) -> Affine | None:
    if not b.uniform:
        a, b = b, a
    return Affine(a.base * b.base, tuple(stride * b.base for stride in a.strides)) if b.uniform else None


def _compared(decide: Callable[[Number, Number], bool | None]) -> Callable[..., Affine | None]:
    """A comparison that comes out the same for all elements."""

    def compare(a: Affine, b: Affine, shape: Shape) -> Affine | None:
        gap = _added(-1)(a, b, shape)
        ends = _lowest(gap, shape), _lowest(Affine(-gap.base, tuple(-stride for stride in gap.strides)), shape)
        found = {
            decide(end if sign > 0 else -end, 0) for end, sign in zip(ends, (1, -1), strict=True) if end is not None
        }
        # The gap lies between its ends, and each of the five comparisons with 0 that comes out the same at both holds
        # between them, but for an equality that is false on both sides of 0.
        if None in ends or len(found) != 1 or None in found:
            return None
        if decide is equal and found == {False} and not any(end is not None and at_least(end, 1) for end in ends):
            return None
        return Affine(int(bool(found.pop())), (0,) * len(shape))

    return compare


def _lowest(content: Affine, shape: Shape) -> Number | None:
    """The smallest element; None where the sign of a stride isn't known."""
    lowest = content.base
    for stride, size in zip(content.strides, shape, strict=True):
        if at_least(-stride, 0):
            lowest = lowest + stride * (size - 1)
        elif not at_least(stride, 0):
            return None
    return lowest


def _logical(when: bool) -> Callable[..., Affine | None]:
    """And, Or: decided where all elements of one side are `when`, else where those of both sides are known."""

    def combine(a: Affine, b: Affine, shape: Shape) -> Affine | None:
        if not (a.uniform and b.uniform):
            return None
        either = (bool(a.base) == when) or (bool(b.base) == when)
        return Affine(int(either == when), (0,) * len(shape))

    return combine


def _divide(a: Any, b: Any) -> Any:
    if a.dtype.kind == "f":
        return a / b
    return np.sign(a) * np.sign(b) * (abs(a) // abs(b)) if np.all(b != 0) else None


def _modulo(a: Any, b: Any) -> Any:
    return np.mod(a, b) if a.dtype.kind in "iu" and np.all(b != 0) else None


def _mod(facts: Facts, node: Any) -> Any:
    return None if node.attributes.get_int("fmod", 0) else _binary(_modulo, remainder)(facts, node)


def _unary(exact: Callable[..., Any], symbolic: Callable[..., Any]) -> Rule:
    def rule(facts: Facts, node: Any) -> Any:
        content = as_array(facts.content(node.inputs[0]), facts.shape(node.inputs[0]))
        if content is None:
            return None
        return _each(symbolic, content) if content.dtype == object else exact(content)

    return rule


def _absolute(number: Number) -> Number | None:
    return number if at_least(number, 0) else -number if at_least(-number, 0) else None


def _where(facts: Facts, node: Any) -> Any:
    if all(facts.array(value) is not None for value in node.inputs):
        return np.where(*(facts.array(value) for value in node.inputs))
    arrays = [as_array(facts.content(value), facts.shape(value)) for value in node.inputs]
    if any(array is None or array.dtype.kind == "f" for array in arrays):
        return None

    def choose(condition: Any, yes: Any, no: Any) -> Any:
        if condition is None:
            return yes if yes is not None and yes == no else None
        return yes if condition else no

    if np.broadcast(*arrays).size > MOST_SYMBOLIC:
        return None
    return np.asarray(np.frompyfunc(choose, 3, 1)(*arrays), dtype=object)


def _reduce(exact: Callable[..., Any], symbolic: Callable[[Sequence[Number]], Number]) -> Rule:
    def rule(facts: Facts, node: Any) -> Any:
        content, shape = facts.content(node.inputs[0]), facts.shape(node.outputs[0])
        axes = axes_of(node)
        if not isinstance(content, np.ndarray) or content.dtype.kind not in "iuO" or shape is None or axes is None:
            return None
        if not axes and node.attributes.get_int("noop_with_empty_axes", 0):
            return content
        if content.dtype != object:
            return exact(content, axis=tuple(axes) or None).astype(content.dtype).reshape(shape)
        whole = not axes or len({axis % content.ndim for axis in axes}) == content.ndim
        return objects([symbolic(list(content.flat))]).reshape(shape) if whole and None not in content.flat else None

    return rule


def _highest_of(numbers: Sequence[Number]) -> Number:
    return _folded(lambda function, *pair: function(*pair), maximum, numbers)  # type: ignore[no-any-return]


def _lowest_of(numbers: Sequence[Number]) -> Number:
    return _folded(lambda function, *pair: function(*pair), minimum, numbers)  # type: ignore[no-any-return]


def _total(numbers: Sequence[Number]) -> Number:
    total: Number = 0
    for number in numbers:
        total = total + number
    return total


def _not_less(a: Number, b: Number) -> bool | None:
    found = less(a, b)
    return None if found is None else not found


def _swapped(decide: Callable[[Number, Number], bool | None]) -> Callable[[Number, Number], bool | None]:
    return lambda a, b: decide(b, a)


def _comparison(exact: Callable[..., Any], decide: Callable[[Number, Number], bool | None]) -> Rule:
    return _binary(exact, decide, _compared(decide))


ARITHMETIC: dict[str, Rule] = {
    "Cast": _cast, "CastLike": _cast,
    "Add": _binary(np.add, lambda a, b: a + b, _added(1)), "Sub": _binary(np.subtract, lambda a, b: a - b, _added(-1)),
    "Mul": _binary(np.multiply, lambda a, b: a * b, _multiplied), "Div": _binary(_divide, truncated), "Mod": _mod,
    "Min": _binary(np.minimum, minimum), "Max": _binary(np.maximum, maximum),
    "Equal": _comparison(np.equal, equal),
    "Less": _comparison(np.less, less), "GreaterOrEqual": _comparison(np.greater_equal, _not_less),
    "Greater": _comparison(np.greater, _swapped(less)),
    "LessOrEqual": _comparison(np.less_equal, _swapped(_not_less)),
    "And": _binary(np.logical_and, lambda a, b: a and b, _logical(False)),
    "Or": _binary(np.logical_or, lambda a, b: a or b, _logical(True)),
    "Xor": _binary(np.logical_xor, lambda a, b: a != b),
    "Not": _unary(np.logical_not, lambda a: not a), "Neg": _unary(np.negative, lambda a: -a),
    "Abs": _unary(np.abs, _absolute), "Floor": _unary(np.floor, lambda a: a), "Ceil": _unary(np.ceil, lambda a: a),
    "Where": _where,
    "ReduceProd": _reduce(np.prod, product), "ReduceSum": _reduce(np.sum, _total),
    "ReduceMax": _reduce(np.max, _highest_of), "ReduceMin": _reduce(np.min, _lowest_of),
}  # fmt: skip
