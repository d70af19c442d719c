"""Reading an attention backwards: from the product of weights with values, through the softmax, to that of queries with keys.

`readings` yields what it finds on the way, without judging whether it can be one operator: factors on either operand or on the
scores, masks of all kinds, a soft cap, regrouped axes (windows, batch and heads in one), a guard around the softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite, nan
from typing import Any

from perwatt.patterns import dims, equal, given, is_stored, made_by, number, numbers, rank, same_dims

MOST_NODES = 24
"""A chain from weights to scores that is longer is none: the search follows both operands of every Add."""


@dataclass(frozen=True)
class Operand:
    """A value, its axes in another order where `order` says so: axis i is axis order[i] of the value."""

    value: Any
    order: tuple[int, ...] | None = None

    def dims(self) -> list[int | str | None] | None:
        """As `patterns.dims`, of the reordered value."""
        found = dims(self.value)
        return found if found is None or self.order is None else [found[axis] for axis in self.order]

    def built(self, build: Any) -> Any:
        """The value itself, or a Transpose of it."""
        if self.order is None:
            return self.value
        out = build.op("Transpose", self.value, perm=list(self.order))
        out.shape = _shape(self.dims())
        return out


@dataclass(frozen=True)
class Term:
    """What happens to the scores before the softmax. `add` and `subtract`: `value` is added or taken away. `keep`: where
    `value` holds (`negated`: where it doesn't) a score stays, elsewhere it becomes `low`. `level`: how many Reshapes lie
    between it and the weights. `factor`: what scores and term are both multiplied by after it, NaN where that is no number."""

    kind: str
    value: Any
    low: float = float("-inf")
    negated: bool = False
    level: int = 0
    factor: float = 1.0


@dataclass(frozen=True)
class Reading:
    """One attention as it was found. `nodes` are superfluous once it is one operator, `shared` may have other users.
    `levels`: the shapes that the scores have on their way, from the weights to the first product. `types`: what they are
    cast to. `factors`: (operator, value) that scale each row of the scores, computed or one for each head."""

    nodes: tuple[Any, ...] = ()
    shared: tuple[Any, ...] = ()
    query: Operand | None = None
    key: Operand | None = None
    value: Operand | None = None
    mask: Any = None
    causal: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    guarded: bool = False
    terms: tuple[Term, ...] = ()
    levels: tuple[Any, ...] = ()
    types: tuple[str, ...] = ()
    factors: tuple[tuple[str, Any], ...] = ()

    def through(self, *nodes: Any) -> Reading:
        """With these nodes on the way."""
        return replace(self, nodes=(*self.nodes, *nodes))

    def with_term(self, kind: str, value: Any, **options: Any) -> Reading:
        """With one more term, inside of those found so far."""
        level = max(len(self.levels) - 1, 0)
        factor = nan if self.softcap or self.factors else self.scale
        return replace(self, terms=(*self.terms, Term(kind, value, level=level, factor=factor, **options)))


def readings(root: Any) -> Iterator[Reading]:
    """All ways to see the product `root` as the end of an attention."""
    inputs = given(root)
    if root.op_type == "MatMul" and len(inputs) == 2:
        yield from _weights(inputs[0], Reading(nodes=(root,), value=Operand(inputs[1])))


def existing(node: Any) -> Reading | None:
    """An Attention that is there already, without cache and with heads on an axis of their own."""
    inputs = given(node)
    if not 3 <= len(inputs) <= 4 or "q_num_heads" in node.attributes or any(o.uses() for o in node.outputs[1:]):
        return None
    found = dims(inputs[0])
    if found is None or len(found) != 4 or node.attributes.get_int("qk_matmul_output_mode", 0):
        return None
    depth = found[-1]
    default = depth**-0.5 if isinstance(depth, int) else 0.0
    scale = node.attributes.get_float("scale", default)
    if not scale or "softmax_precision" in node.attributes or any(o.is_graph_output() for o in node.outputs[1:]):
        return None
    query, key = unscaled(inputs[0]), unscaled(inputs[1])
    reading = Reading(
        nodes=(node,), shared=(*query[2], *key[2]), query=Operand(query[0]), key=Operand(key[0]),
        value=Operand(inputs[2]), mask=inputs[3] if len(inputs) > 3 else None, scale=scale * query[1] * key[1],
        causal=bool(node.attributes.get_int("is_causal", 0)), softcap=node.attributes.get_float("softcap", 0.0),
    )  # fmt: skip
    return without_copies(reading)


# From the weights to the scores ---------------------------------------------------------------------------------------


def _weights(value: Any, reading: Reading) -> Iterator[Reading]:
    node = made_by(value, "Softmax|Where|Cast|Dropout|Reshape")
    if node is None or len(reading.nodes) > MOST_NODES:
        return
    inner = reading.through(node)
    if node.op_type == "Softmax":
        if _on_last_axis(node):
            yield from _scores(node.inputs[0], inner)
    elif node.op_type == "Where":
        guard = made_by(node.inputs[0], "IsNaN")
        if guard is not None and guard.inputs[0] is node.inputs[2] and number(node.inputs[1]) == 0:
            yield from _weights(node.inputs[2], replace(inner.through(guard), guarded=True))
    elif node.op_type == "Reshape":
        yield from _weights(node.inputs[0], _regrouped(inner, node))
    elif node.op_type == "Cast":
        yield from _weights(node.inputs[0], _cast(inner, node))
    elif _does_nothing(node):
        yield from _weights(node.inputs[0], inner)


def _scores(value: Any, reading: Reading) -> Iterator[Reading]:
    node = made_by(value, "|".join(_STEPS))
    if node is not None and len(reading.nodes) <= MOST_NODES:
        yield from _STEPS[node.op_type](node, reading if node.op_type == "MatMul" else reading.through(node))


def _added(node: Any, reading: Reading) -> Iterator[Reading]:
    first, second = node.inputs
    yield from _scores(first, reading.with_term("add", second))
    yield from _scores(second, reading.with_term("add", first))


def _taken_away(node: Any, reading: Reading) -> Iterator[Reading]:
    yield from _scores(node.inputs[0], reading.with_term("subtract", node.inputs[1]))


def _chosen(node: Any, reading: Reading) -> Iterator[Reading]:
    keep, first, second = node.inputs
    for scores, other, negated in ((first, second, False), (second, first, True)):
        low = number(other)
        if low is not None:
            yield from _scores(scores, reading.with_term("keep", keep, low=low, negated=negated))


def _scaled(node: Any, reading: Reading) -> Iterator[Reading]:
    if known := factor_of(node):
        inner, factor = known
        capped = made_by(inner, "Tanh") if factor > 0 else None
        outermost = not reading.softcap and not reading.factors and reading.scale == 1.0
        if capped is not None and outermost and node.op_type == "Mul":
            # c · tanh(s/c): what is inside the tanh is s/c.
            below = replace(reading.through(capped), softcap=factor, scale=factor)
            yield from _scores(capped.inputs[0], below)
            return
        yield from _scores(inner, replace(reading, scale=reading.scale * factor))
        return
    ways = (node.inputs, reversed(node.inputs)) if node.op_type == "Mul" else (node.inputs,)
    for scores, factor in ways:
        yield from _scores(scores, replace(reading, factors=(*reading.factors, (node.op_type, factor))))


def _reshaped(node: Any, reading: Reading) -> Iterator[Reading]:
    yield from _scores(node.inputs[0], _regrouped(reading, node))


def _converted(node: Any, reading: Reading) -> Iterator[Reading]:
    yield from _scores(node.inputs[0], _cast(reading, node))


def _regrouped(reading: Reading, node: Any) -> Reading:
    outer = reading.levels or (dims(node.outputs[0]),)
    return replace(reading, levels=(*outer, dims(node.inputs[0])))


def _cast(reading: Reading, node: Any) -> Reading:
    import onnx_ir as ir

    return replace(reading, types=(*reading.types, ir.DataType(node.attributes.get_int("to")).name))


def _does_nothing(node: Any) -> bool:
    """Whether a Dropout is one of inference."""
    inputs = given(node)
    return len(inputs) < 3 or bool(number(inputs[2]) == 0)


def _on_last_axis(softmax: Any) -> bool:
    axis, axes = softmax.attributes.get_int("axis", -1), rank(softmax.inputs[0])
    return axis == -1 or (axes is not None and axis == axes - 1)


# From the scores to queries and keys ----------------------------------------------------------------------------------


def _product(node: Any, reading: Reading) -> Iterator[Reading]:
    left, right = node.inputs
    # A product with a stored matrix is a layer, whatever comes after it.
    if is_stored(right) or rank(left) == 2 or rank(right) == 2:
        return
    query, factor, passed = unscaled(left)
    key, key_factor, key_passed = untransposed(right)
    found = replace(
        reading.through(node), query=Operand(query), key=key, scale=reading.scale * factor * key_factor,
        shared=(*passed, *key_passed),
    )  # fmt: skip
    yield without_copies(found)


_STEPS: dict[str, Any] = {
    "Add": _added, "Sub": _taken_away, "Where": _chosen, "Mul": _scaled, "Div": _scaled, "Reshape": _reshaped,
    "Cast": _converted, "MatMul": _product,
}  # fmt: skip


def factor_of(node: Any) -> tuple[Any, float] | None:
    """(what is multiplied, by which stored number) of a Mul or Div; None where there is no such number."""
    first, second = node.inputs
    ways = ((first, second), (second, first)) if node.op_type == "Mul" else ((first, second),)
    for inner, other in ways:
        factor = number(other)
        if factor and isfinite(factor) and (rank(other) or 0) <= (rank(inner) or 1):
            return inner, factor if node.op_type == "Mul" else 1 / factor
    return None


def unscaled(value: Any) -> tuple[Any, float, tuple[Any, ...]]:
    """`value` before it was multiplied by stored numbers, their product, and the nodes that did it."""
    passed: tuple[Any, ...] = ()
    factor = 1.0
    while (node := made_by(value, "Mul|Div")) is not None and (known := factor_of(node)) is not None:
        value, factor, passed = known[0], factor * known[1], (*passed, node)
    return value, factor, passed


def untransposed(value: Any) -> tuple[Operand, float, tuple[Any, ...]]:
    """The keys of which `value` is the transpose: the last two axes exchanged, by whatever Transposes and factors there are."""
    factor = 1.0
    passed: tuple[Any, ...] = ()
    order: tuple[int, ...] | None = None
    while True:
        value, more, nodes = unscaled(value)
        factor, passed = factor * more, (*passed, *nodes)
        # One Transpose was undone: what is left is the keys themselves.
        if order is not None and _swapped(order) == tuple(range(len(order))):
            return Operand(value), factor, passed
        node = made_by(value, "Transpose")
        perm = node.attributes.get_ints("perm") if node is not None else None
        if perm is None:
            break
        order = tuple(perm) if order is None else tuple(perm[axis] for axis in order)
        value, passed = node.inputs[0], (*passed, node)
    axes = rank(value)
    if order is None and axes is not None:
        order = tuple(range(axes))
    return Operand(value, _swapped(order) if order is not None else None), factor, passed


def _swapped(order: tuple[int, ...]) -> tuple[int, ...]:
    return (*order[:-2], order[-1], order[-2])


# Grouped queries ------------------------------------------------------------------------------------------------------


def without_copies(reading: Reading) -> Reading:
    """With the keys and values that were there before each head was repeated for the queries of its group, where both were."""
    assert reading.key is not None and reading.value is not None
    key, value = _unrepeated(reading.key), _unrepeated(reading.value)
    if key is None or value is None:
        return reading
    heads = [(operand.dims() or [None, None])[1] for operand in (key[0], value[0])]
    if heads[0] != heads[1]:
        return reading
    return replace(reading, key=key[0], value=value[0], shared=(*reading.shared, *key[1], *value[1]))


def _unrepeated(operand: Operand) -> tuple[Operand, tuple[Any, ...]] | None:
    """The operand before its heads were repeated one by one, and the nodes that did it."""
    value, order = operand.value, operand.order
    passed: tuple[Any, ...] = ()
    if order is None and (turn := made_by(value, "Transpose")) is not None:
        perm = tuple(turn.attributes.get_ints("perm", ()))
        if len(perm) == 4:
            value, order, passed = turn.inputs[0], perm, (turn,)
    found = dims(value)
    if found is None or len(found) != 4:
        return None
    axis = order[1] if order is not None else 1
    for way in (_by_expand, _by_gather, _from_one):
        if (inner := way(value, found, axis)) is not None:
            return Operand(inner[0], order), (*passed, *inner[1])
    return None


def _by_expand(value: Any, found: list[Any], axis: int) -> tuple[Any, tuple[Any, ...]] | None:
    """[…, heads, …] → […, heads, 1, …] → […, heads, n, …] → […, heads·n, …]"""
    merge = made_by(value, "Reshape")
    copy = made_by(merge.inputs[0], "Expand|Tile") if merge is not None else None
    split = made_by(copy.inputs[0], "Unsqueeze|Reshape") if copy is not None else None
    if split is None:
        return None
    before: list[Any] | None = dims(split.inputs[0])
    single = dims(split.outputs[0])
    if before is None or single is None or len(before) != 4 or not isinstance(before[axis], int):
        return None
    head, tail, times = before[: axis + 1], before[axis + 1 :], _copies(copy, axis + 1)
    if (
        times is None
        or not same_dims(single, [*head, 1, *tail])
        or not follows(found, [*head[:-1], head[-1] * times, *tail])
    ):
        return None
    return split.inputs[0], (merge, copy, split)


def _copies(node: Any, axis: int) -> int | None:
    """How often an Expand or Tile repeats this axis of length 1; None where it does anything else."""
    asked, before, after = numbers(node.inputs[1]), dims(node.inputs[0]), dims(node.outputs[0])
    if node.op_type == "Tile":
        ones = asked is not None and len(asked) == 5 and all(n == 1 for place, n in enumerate(asked) if place != axis)
        return asked[axis] if ones and asked is not None else None
    times = after[axis] if after is not None and len(after) == 5 else None
    if before is None or after is None or not isinstance(times, int):
        return None
    return times if same_dims(after, [*before[:axis], times, *before[axis + 1 :]]) else None


def _by_gather(value: Any, found: list[Any], axis: int) -> tuple[Any, tuple[Any, ...]] | None:
    """Gather with indices 0, 0, 1, 1, …"""
    node = made_by(value, "Gather")
    if node is None or node.attributes.get_int("axis", 0) not in (axis, axis - 4) or rank(node.inputs[1]) != 1:
        return None
    before, picks = dims(node.inputs[0]), numbers(node.inputs[1])
    heads = before[axis] if before is not None else None
    if not picks or not isinstance(heads, int) or len(picks) % heads:
        return None
    times = len(picks) // heads
    return (node.inputs[0], (node,)) if picks == [pick // times for pick in range(len(picks))] else None


def _from_one(value: Any, found: list[Any], axis: int) -> tuple[Any, tuple[Any, ...]] | None:
    """One head, expanded to all."""
    node = made_by(value, "Expand")
    before = dims(node.inputs[0]) if node is not None else None
    if before is None or len(before) != 4 or before[axis] != 1 or found[axis] == 1:
        return None
    return (node.inputs[0], (node,)) if same_dims(found, [*before[:axis], found[axis], *before[axis + 1 :]]) else None


# Shapes ---------------------------------------------------------------------------------------------------------------


def follows(found: list[Any], wanted: list[Any]) -> bool:
    """Whether what a Reshape gives has this shape: all axes but one are known to, and the last follows from the number of
    elements."""
    return len(found) == len(wanted) and sum(not equal(a, b) for a, b in zip(found, wanted, strict=True)) <= 1


def _shape(found: list[Any] | None) -> Any:
    import onnx_ir as ir

    return None if found is None else ir.Shape(found)
