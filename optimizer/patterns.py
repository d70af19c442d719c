"""A small language for patterns in a graph, and the search for them.

A pattern is written the way the graph computes, from inputs to output, and matched from its last node backwards:

    x = Var("x")
    gate = Op("Sigmoid", x)
    pattern = Op("Mul", x, gate)               # x · sigmoid(x), in either order

`occurrences(pattern, node)` yields every way in which the pattern ends at `node`: inputs of commutative operators are tried
in both orders, alternatives in turn, and one that goes wrong later is taken back. The same `Var` name stands for the same
value everywhere, the same `Op` object for the same node.

onnxscript's matcher was tried first: it wants scalars of rank 0 where exporters also write them as [1], expands commutative
operators into 2ⁿ patterns, and can't tell a graph that only looks different from one that was refused for a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

COMMUTATIVE = frozenset({"Add", "Mul", "Max", "Min", "And", "Or", "Xor", "Equal", "Sum"})
NEAR = {"FLOAT16": 2e-3, "BFLOAT16": 1e-2}
"""How far a stored constant may be from the one that a formula names, relatively: rounding of its type, and of whoever
typed it in."""
NEAR_OTHERWISE = 1e-5


class Pattern:
    """One of the classes below."""


@dataclass(frozen=True, eq=False)
class Var(Pattern):
    """Any value that `where` accepts; the same name is the same value throughout a pattern."""

    name: str
    where: Callable[[Any], bool] | None = None


@dataclass(frozen=True, eq=False)
class Number(Pattern):
    """A stored tensor that holds one number, whatever its rank: near `value`, or any where that is None."""

    value: float | None = None
    name: str | None = None


@dataclass(frozen=True, eq=False)
class Either(Pattern):
    """The first of several patterns that leads to a match."""

    of: tuple[Pattern, ...]

    def __init__(self, *of: Pattern) -> None:
        object.__setattr__(self, "of", of)


@dataclass(frozen=True, eq=False)
class Op(Pattern):
    """The first output of a node. `kinds`: operators of ONNX's own domain, separated by `|`. `inputs` stand for the node's
    inputs in order, none left over; None for one that is left out, `...` at the end for any that follow. `name`: what
    to find the node by in the match. `where`: what else must be true of the node. `shared`: the node may have other
    users, and stays then."""

    kinds: frozenset[str]
    inputs: tuple[Any, ...]
    name: str | None = None
    where: Callable[[Any], bool] | None = None
    shared: bool = False

    def __init__(
        self,
        kinds: str,
        *inputs: Any,
        name: str | None = None,
        where: Callable[[Any], bool] | None = None,
        shared: bool = False,
    ) -> None:
        given = {"kinds": frozenset(kinds.split("|")), "inputs": inputs, "name": name, "where": where, "shared": shared}
        for key, value in given.items():
            object.__setattr__(self, key, value)


def maybe(kinds: str, inner: Pattern, *inputs: Any, **options: Any) -> Either:
    """`inner`, or an operator of these `kinds` on it."""
    return Either(Op(kinds, inner, *inputs, **options), inner)


@dataclass(frozen=True)
class Match:
    """One occurrence. `root`: its last node. `nodes`: those that a rewrite makes superfluous, `root` among them.
    `outputs`: the values that a rewrite gives anew, in order. `values` and `named`: what names were bound to.
    `shared`: nodes that belong to it and may have users elsewhere."""

    root: Any
    nodes: tuple[Any, ...]
    outputs: tuple[Any, ...]
    values: Mapping[str, Any] = field(default_factory=dict)
    named: Mapping[str, Any] = field(default_factory=dict)
    shared: tuple[Any, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str) -> Any:
        """The value of that name, None where this alternative has none."""
        return self.values.get(name)

    def used_elsewhere(self) -> Any:
        """A value inside that somebody outside uses, or None."""
        inside = {*self.nodes, *self.shared}
        for node in self.nodes:
            for value in node.outputs:
                if any(value is output for output in self.outputs):
                    continue
                if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
                    return value
        return None


# Matching -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bound:
    """What is settled so far; extended by copying, so that an alternative can be taken back."""

    values: dict[str, Any] = field(default_factory=dict)
    nodes: dict[Op, Any] = field(default_factory=dict)


def occurrences(pattern: Op, node: Any) -> Iterator[Match]:
    """Every way in which `pattern` ends at the first output of `node`."""
    for bound in _match(pattern, node.outputs[0], _Bound()):
        # dict.fromkeys: two patterns may stand for one node, which is there once.
        kept = tuple(dict.fromkeys(bound.nodes[op] for op in bound.nodes if not op.shared))
        shared = tuple(dict.fromkeys(bound.nodes[op] for op in bound.nodes if op.shared))
        named = {op.name: found for op, found in bound.nodes.items() if op.name}
        yield Match(node, kept, (node.outputs[0],), bound.values, named, shared)


def _match(pattern: Any, value: Any, bound: _Bound) -> Iterator[_Bound]:
    if isinstance(pattern, Either):
        for one in pattern.of:
            yield from _match(one, value, bound)
    elif isinstance(pattern, Op):
        yield from _match_op(pattern, value, bound)
    elif pattern is None:
        yield from [bound] if value is None else []
    elif value is not None and _fits(pattern, value):
        known = bound.values.get(pattern.name) if pattern.name else None
        if known is None or known is value:
            values = {**bound.values, pattern.name: value} if pattern.name else bound.values
            yield _Bound(values, bound.nodes)


def _fits(pattern: Any, value: Any) -> bool:
    if isinstance(pattern, Var):
        return pattern.where is None or pattern.where(value)
    return is_number(value) if pattern.value is None else is_number(value, pattern.value)


def _match_op(pattern: Op, value: Any, bound: _Bound) -> Iterator[_Bound]:
    node = value.producer() if value is not None else None
    if node is None or value is not node.outputs[0]:
        return
    known = bound.nodes.get(pattern)
    if known is not None:
        if known is node:
            yield bound
        return
    if node.domain != "" or node.op_type not in pattern.kinds or (pattern.where and not pattern.where(node)):
        return
    inputs = given(node)
    wanted = pattern.inputs
    open_end = bool(wanted) and wanted[-1] is ...
    wanted = wanted[:-1] if open_end else wanted
    if len(inputs) < len(wanted) or (len(inputs) > len(wanted) and not open_end):
        return
    bound = _Bound(bound.values, {**bound.nodes, pattern: node})
    orders = [inputs, inputs[::-1]] if node.op_type in COMMUTATIVE and len(inputs) == 2 else [inputs]
    for order in orders:
        yield from _match_all(wanted, order[: len(wanted)], bound)


def _match_all(patterns: Sequence[Any], values: Sequence[Any], bound: _Bound) -> Iterator[_Bound]:
    if not patterns:
        yield bound
        return
    for first in _match(patterns[0], values[0], bound):
        yield from _match_all(patterns[1:], values[1:], first)


# Asking about values --------------------------------------------------------------------------------------------------


def given(node: Any) -> list[Any]:
    """Inputs of a node, without those left out at the end; one left out before others is None."""
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def made_by(value: Any, kinds: str) -> Any:
    """The node whose first output `value` is, where it is one of these operators (separated by `|`); else None."""
    node = value.producer() if value is not None else None
    ours = node is not None and node.domain == "" and node.op_type in kinds.split("|") and node.outputs[0] is value
    return node if ours else None


def stored(value: Any) -> Any:
    """The array that a value always is (an initializer, a Constant node); None where it depends on the input."""
    import onnx_ir as ir

    if value is None or value.is_graph_input():
        return None
    try:
        tensor = ir.convenience.get_const_tensor(value)
    except ValueError:
        return None
    return None if tensor is None or tensor.dtype.name == "STRING" else tensor.numpy()


def is_stored(value: Any) -> bool:
    """Whether `value` doesn't depend on the input; nothing large is read for that."""
    if value is None or value.is_graph_input():
        return False
    return value.const_value is not None or made_by(value, "Constant") is not None


def number(value: Any) -> float | None:
    """The one number that a stored tensor of size 1 holds, whatever its rank; None for everything else."""
    if not is_stored(value) or (value.const_value is not None and value.const_value.size != 1):
        return None
    array = stored(value)
    return float(array.item()) if array is not None and array.size == 1 and array.dtype.kind not in "cOSU" else None


def is_number(value: Any, wanted: float | None = None) -> bool:
    """Whether `value` is a stored single number, near `wanted` where that is given."""
    found = number(value)
    if found is None or wanted is None:
        return found is not None
    near = NEAR.get(stored(value).dtype.name.upper(), NEAR_OTHERWISE)
    return bool(np.isclose(found, wanted, rtol=near, atol=0))


def numbers(value: Any) -> list[int] | None:
    """A stored list of integers, as axes and shapes are; None for everything else."""
    array = stored(value)
    return [int(n) for n in array.reshape(-1)] if array is not None and array.dtype.kind in "iu" else None


def dims(value: Any) -> list[int | str | None] | None:
    """The axes of `value`: an int where the size is known, a symbol's name, None for one nobody knows; None without a
    known rank."""
    if value is None or value.shape is None:
        array = value.const_value if value is not None else None
        return None if array is None else [int(n) for n in array.shape]
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def rank(value: Any) -> int | None:
    """How many axes `value` has, where that is known."""
    found = dims(value)
    return None if found is None else len(found)


def size(value: Any, axis: int) -> int | None:
    """How long one axis of `value` is, where that is known."""
    found = dims(value)
    if found is None or not -len(found) <= axis < len(found):
        return None
    length = found[axis]
    return length if isinstance(length, int) else None


def equal(one: int | str | None, other: int | str | None) -> bool:
    """Whether two axes are provably of one length: the same number, or the same symbol."""
    return one is not None and one == other


def same_dims(one: Sequence[int | str | None] | None, other: Sequence[int | str | None] | None) -> bool:
    """Whether two shapes are provably the same."""
    return one is not None and other is not None and len(one) == len(other) and all(map(equal, one, other))


def axes_of(node: Any) -> list[int] | None:
    """The axes of a reduction, from its attribute or its second input, as they are written; None where they are computed,
    [] where there are none."""
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    inputs = given(node)
    return numbers(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else [] if len(inputs) < 2 else None


def from_the_end(axes: Sequence[int] | None, of: int | None) -> list[int] | None:
    """Axes counted from the end (-1 is the last), sorted; None where that takes a rank that isn't known."""
    if axes is None or (of is None and any(axis >= 0 for axis in axes)):
        return None
    return sorted(axis if axis < 0 else axis - (of or 0) for axis in axes)


def only_user(value: Any) -> Any:
    """The one node that uses `value`, once; None where there are several, none, or where it is an output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
