"""What the passes that cancel and move things share: types and shapes that can be proved, and operators by what they do to
the shape of their input."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from perwatt.patterns import dims, equal, numbers, stored

Dims = Sequence[int | str | None]

UNARY = frozenset({
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip", "Cos",
    "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
    "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign",
    "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
})  # fmt: skip
"""Each element of the output comes from the same one of the first input; further inputs are single numbers."""

BROADCASTING = frozenset({
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual",
    "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "PRelu", "Sub", "Sum", "Where", "Xor",
})  # fmt: skip
"""Element by element, once the inputs are stretched to one shape."""

_MOST_STEPS = 10_000


# Types ----------------------------------------------------------------------------------------------------------------


def dtype_of(value: Any) -> str | None:
    """The element type (`FLOAT`, `BOOL`), as it is declared or follows from the operators before; None where neither says."""
    for _ in range(_MOST_STEPS):
        if value is None:
            return None
        known = value.const_value.dtype if value.const_value is not None else value.dtype
        if known is not None and known.name != "UNDEFINED":
            return str(known.name)
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type in ("Cast", "ConstantOfShape", "Constant"):
            return _dtype_from_attribute(node)
        source = _same_type_as(node, value.index())
        if not isinstance(source, int):
            return source
        value = node.inputs[source] if source < len(node.inputs) else None
    return None


def _dtype_from_attribute(node: Any) -> str | None:
    import onnx_ir as ir

    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int()).name if "to" in node.attributes else None
    if "value" in node.attributes:
        return str(node.attributes["value"].as_tensor().dtype.name)
    return "FLOAT" if node.op_type == "ConstantOfShape" else None


def _same_type_as(node: Any, output: int) -> int | str | None:
    """What type an output has: that of the input with this index, or always the one of this name."""
    outputs = _typing(node.op_type)
    # The last formal output stands for all that follow, as in Split.
    return outputs[min(output, len(outputs) - 1)] if outputs else None


@cache
def _typing(kind: str) -> tuple[int | str | None, ...]:
    import onnx

    try:
        schema = onnx.defs.get_schema(kind)
    except onnx.defs.SchemaError:
        return ()
    allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
    letters = [given.type_str if given.is_homogeneous else "" for given in schema.inputs]
    found: list[int | str | None] = []
    for port in schema.outputs:
        types = allowed.get(port.type_str, [port.type_str])
        if len(types) == 1 and types[0].startswith("tensor("):
            found.append(types[0][len("tensor(") : -1].upper())
        elif port.is_homogeneous and port.type_str in letters:
            found.append(letters.index(port.type_str))
        else:
            found.append(None)
    return tuple(found)


# Shapes ---------------------------------------------------------------------------------------------------------------


def same_dims_by_volume(one: Dims | None, other: Dims | None) -> bool:
    """Whether two shapes of the same number of elements are provably the same: then one axis may be left open."""
    if one is None or other is None or len(one) != len(other):
        return False
    rest = [a for a, b in zip(one, other, strict=True) if equal(a, b)]
    return len(rest) >= len(one) - 1 and 0 not in rest


def fits_into(small: Dims | None, large: Dims | None) -> bool:
    """Whether broadcasting a shape against `large` provably gives `large`."""
    if small is None or (small and large is None) or len(small) > len(large or ()):
        return False
    return all(a == 1 or equal(a, b) for a, b in zip(reversed(small), reversed(large or ()), strict=False))


def dims_after(node: Any) -> list[int | str | None] | None:
    """The shape that a Reshape, Flatten, Squeeze or Unsqueeze gives, as it is declared or follows; None without a rank."""
    declared, follows = dims(node.outputs[0]), _dims_that_follow(node)
    if declared is None or follows is None or len(declared) != len(follows):
        return declared or follows
    return [b if a is None else a for a, b in zip(declared, follows, strict=True)]


def _dims_that_follow(node: Any) -> list[int | str | None] | None:
    before = dims(node.inputs[0])
    if node.op_type == "Reshape":
        return _dims_of_target(node, before)
    if before is None:
        return None
    if node.op_type == "Flatten":
        axis = node.attributes.get_int("axis", 1)
        axis = axis + len(before) if axis < 0 else axis
        return [_product(before[:axis]), _product(before[axis:])]
    axes = axes_given(node)
    if axes is None:
        return None
    if node.op_type == "Squeeze":
        gone = {axis % len(before) for axis in axes}
        return [dim for axis, dim in enumerate(before) if axis not in gone]
    added = {axis % (len(before) + len(axes)) for axis in axes}
    left = iter(before)
    return [1 if axis in added else next(left) for axis in range(len(before) + len(axes))]


def _dims_of_target(node: Any, before: Dims | None) -> list[int | str | None] | None:
    target = numbers(node.inputs[1]) if len(node.inputs) > 1 else None
    if target is None:
        return None
    copies = not node.attributes.get_int("allowzero", 0)
    found: list[int | str | None] = []
    for axis, length in enumerate(target):
        copied = before[axis] if before is not None and axis < len(before) else None
        found.append(None if length < 0 else copied if length == 0 and copies else length)
    if before is not None and target.count(-1) == 1:
        found[target.index(-1)] = _left_over(
            before, [dim for dim, length in zip(found, target, strict=True) if length >= 0]
        )
    return found


def _left_over(whole: Dims, taken: Dims) -> int | str | None:
    """The axis that is left of `whole` when `taken` are divided out, where that is one number or one symbol."""
    symbols = [dim for dim in whole if not isinstance(dim, int)]
    for dim in taken:
        if not isinstance(dim, int):
            if dim is None or dim not in symbols:
                return None
            symbols.remove(dim)
    number, by = _int_product(whole), _int_product(taken)
    if by == 0 or number % by:
        return None
    if not symbols:
        return number // by
    return symbols[0] if len(symbols) == 1 and number == by else None


def _int_product(found: Dims) -> int:
    product = 1
    for dim in found:
        product *= dim if isinstance(dim, int) else 1
    return product


def _product(found: Dims) -> int | str | None:
    symbols = [dim for dim in found if not isinstance(dim, int)]
    number = _int_product(found)
    return number if not symbols else symbols[0] if len(symbols) == 1 and number == 1 else None


def axes_given(node: Any) -> list[int] | None:
    """Axes of a Squeeze or Unsqueeze as they are written; None where they are computed, or left to the shape."""
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    return numbers(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None


def target_for(wanted: Dims | None, before: Dims | None) -> list[int] | None:
    """The stored shape with which a Reshape of something of shape `before` gives `wanted`: -1 for one axis that isn't
    known, 0 for those that stay where they are. None where that can't be written, or not without a doubt."""
    if wanted is None or 0 in wanted:
        return None
    stays = [before is not None and axis < len(before) and equal(before[axis], dim) for axis, dim in enumerate(wanted)]
    unknown = [axis for axis, dim in enumerate(wanted) if not isinstance(dim, int)]
    if len(unknown) == 1:
        return [dim if isinstance(dim, int) else -1 for dim in wanted]
    if sum(not stays[axis] for axis in unknown) > 1:
        return None
    return [dim if isinstance(dim, int) else 0 if stays[axis] else -1 for axis, dim in enumerate(wanted)]


def all_of(value: Any, number: float) -> bool:
    """Whether `value` is stored and holds this number everywhere."""
    array = stored(value) if value is not None and _small(value) else None
    return array is not None and array.dtype.kind not in "OSUc" and bool((array == number).all())


def _small(value: Any) -> bool:
    return value.const_value is None or value.const_value.size <= 1 << 20
