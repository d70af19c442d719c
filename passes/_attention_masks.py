"""The mask of an attention, from everything that was done to its scores: one boolean or additive tensor, `is_causal`, or none.

What must come out the same is the softmax, also of rows in which everything is masked. Where masked scores were -inf such a
row was NaN before; Attention makes it zero, as the guards do that exporters put around the softmax. Where they were the lowest
finite number the row was the mean of all values, because score + lowest rounds to lowest; a boolean mask would make it zero,
and so does ONNX Runtime with an additive one that is exactly the lowest number. So these masks stay additive, with an eighth
of it: still far beyond every score, and several of them can be added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isinf, prod
from typing import Any

import numpy as np

from perwatt.passes._attention import Reading, Term
from perwatt.patterns import dims, equal, made_by, stored

HIDDEN = -1e4
"""Scores that are set to this or less count as masked: e^-10000 is 0 in every type."""
BEYOND = -1e30
"""A score of usual size is lost in rounding when this, or anything lower, is added to it."""
MOST_STORED = 1 << 20
"""Masks of more elements are not looked into, and broadcast when they are needed."""
_SEARCHED = 64
"""Values that are looked at for where a mask comes from."""


@dataclass(frozen=True)
class Frame:
    """What a mask must fit: batch, heads and lengths of queries and keys, as the new operator has them. `axes`: how many
    axes the scores have. `parts`: into what batch and heads were split where masks were put on, the batch left out; None
    where they were not. `split`: for each level of the reading, whether it is split so."""

    batch: int | str | None
    heads: int
    lengths: tuple[int | str | None, int | str | None]
    axes: int
    dtype: str
    parts: tuple[int, ...] | None = None
    split: tuple[bool, ...] = ()

    def whole(self) -> list[int | str | None]:
        """The shape of the scores as the operator has them."""
        return [self.batch, self.heads, *self.lengths]


@dataclass(frozen=True)
class Keep:
    """A computed condition under which scores count; `negated`: under which they don't."""

    value: Any
    negated: bool
    unsqueezed: bool


@dataclass(frozen=True)
class Addend:
    """A computed value that is added to scores; `negated`: taken away. `floored`: it may be the lowest finite number."""

    value: Any
    negated: bool
    unsqueezed: bool
    floored: bool


@dataclass(frozen=True)
class Plan:
    """What the mask is made of. `kept`: a stored condition; `total`: stored numbers that are added. `low`: what masked
    scores get in an additive mask; None where the mask is boolean. `spread`: lengths to which it must be broadcast."""

    causal: bool = False
    kept: Any = None
    total: Any = None
    keeps: tuple[Keep, ...] = ()
    addends: tuple[Addend, ...] = ()
    low: float | None = None
    spread: tuple[int | str, int | str] | None = None


def planned(reading: Reading, frame: Frame) -> Plan | str:
    """How the mask is made, or why it can't be."""
    plan, lows = Plan(), []
    for term in (simple for each in reading.terms if (simple := simplified(each)) is not None):
        if (reason := next(_objections(term, frame), None)) is not None:
            return reason
        array = _array(term.value)
        lows += [term.low] if term.kind == "keep" else []
        if array is not None:
            plan = _with_stored(plan, term, _aligned(array, term, frame))
        elif term.kind == "keep":
            keep = Keep(term.value, term.negated, _lacks_heads(term, frame))
            plan = replace(plan, keeps=(*plan.keeps, keep))
        else:
            floored = not reading.guarded and may_be_lowest(term.value)
            addend = Addend(term.value, term.kind == "subtract", _lacks_heads(term, frame), floored)
            plan = replace(plan, addends=(*plan.addends, addend))
    return _settled(plan, lows, frame)


def _with_stored(plan: Plan, term: Term, array: Any) -> Plan:
    if term.kind == "keep":
        array = ~array if term.negated else array
        return replace(plan, kept=array if plan.kept is None else plan.kept & array)
    array = -array if term.kind == "subtract" else array
    return replace(plan, total=array if plan.total is None else plan.total + array)


def _settled(plan: Plan, lows: Sequence[float], frame: Frame) -> Plan | str:
    """With what is stored put into one array, of the right size and kind."""
    kept, total = plan.kept, plan.total
    if is_causal(kept, frame) and total is None and not plan.keeps and not plan.addends:
        return Plan(causal=True)
    hidden_for_good = all(isinf(low) for low in lows)
    alive = not plan.keeps and (kept is None or bool(kept.any(-1).all()))
    low = None
    if total is not None or plan.addends or not (hidden_for_good or alive):
        low = -np.inf if hidden_for_good else lowest(frame.dtype) / 8
    if low is not None and kept is not None and not plan.keeps:
        hidden: Any = np.where(kept, 0.0, low)
        kept, total = None, hidden if total is None else hidden + total
    if total is not None:
        total = np.where(np.isinf(total), total, np.maximum(total, lowest(frame.dtype) / 8))
    return _spread(replace(plan, kept=kept, total=total, low=low), frame)


def _spread(plan: Plan, frame: Frame) -> Plan | str:
    """With the axes of both lengths in full: the specification lets a mask be broadcast, ONNX Runtime only batch and heads."""
    shapes = [list(array.shape) for array in (plan.kept, plan.total) if array is not None]
    shapes += [dims(keep.value) or [] for keep in plan.keeps]
    shapes += [dims(addend.value) or [] for addend in plan.addends]
    wide = any(len(shape) >= 2 for shape in shapes)
    lacking = [
        axis for axis in (-2, -1)
        if not any(len(shape) >= -axis and equal(shape[axis], frame.lengths[axis]) for shape in shapes)
        and (frame.lengths[axis] != 1 or not wide)
    ]  # fmt: skip
    if not shapes or not lacking:
        return plan
    queries, keys = (frame.lengths[axis] if axis in lacking else 1 for axis in (-2, -1))
    if queries is None or keys is None:
        return "the lengths of its queries and keys aren't known"
    array = plan.total if plan.total is not None else plan.kept
    if array is not None and isinstance(queries, int) and isinstance(keys, int):
        full = np.broadcast_shapes(array.shape, (queries, keys))
        if prod(full) <= MOST_STORED:
            wider = np.broadcast_to(array, full)
            return replace(plan, total=wider) if plan.total is not None else replace(plan, kept=wider)
    return replace(plan, spread=(queries, keys))


def is_causal(kept: Any, frame: Frame) -> bool:
    """Whether a boolean array lets each query see itself and what comes before, and nothing else."""
    queries, keys = frame.lengths
    if kept is None or not isinstance(queries, int) or queries != keys or kept.shape[-2:] != (queries, keys):
        return False
    return bool((kept == np.tril(np.ones((queries, queries), bool))).all())


def lowest(dtype: str) -> float:
    """The lowest finite number of a floating type of ONNX."""
    return {"FLOAT16": -65504.0, "DOUBLE": float(np.finfo(np.float64).min)}.get(dtype, float(np.finfo(np.float32).min))


# Terms ----------------------------------------------------------------------------------------------------------------


def simplified(term: Term) -> Term | None:
    """The same term said more simply; None where it does nothing."""
    if term.kind == "keep":
        turned = made_by(term.value, "Not") if not isinstance(term.value, np.ndarray) else None
        if turned is not None:
            return simplified(replace(term, value=turned.inputs[0], negated=not term.negated))
        known = uniform(term.value)
        return None if known is not None and bool(known) is not term.negated else term
    if uniform(term.value) == 0:
        return None
    if term.kind == "add" and (keep := _as_keep(term)) is not None:
        return simplified(keep)
    return term


def _as_keep(term: Term) -> Term | None:
    """What adds nothing here and a number beyond all scores there, as a condition."""
    choice = made_by(term.value, "Where")
    if choice is not None:
        keep, first, second = choice.inputs
        for zero, other, negated in ((first, second, False), (second, first, True)):
            low = uniform(other)
            if uniform(zero) == 0 and low is not None and low <= BEYOND and same_rank(keep, term.value):
                return replace(term, kind="keep", value=keep, low=low, negated=negated)
    array = _array(term.value)
    if array is None or array.size > MOST_STORED or array.dtype.kind != "f":
        return None
    hidden = array <= BEYOND
    if not hidden.any() or array[~hidden].any():
        return None
    return replace(term, kind="keep", value=~hidden, low=float(array[hidden].max()))


def same_rank(keep: Any, chosen: Any) -> bool:
    """Whether a condition has all the axes of what is chosen by it."""
    first, second = dims(keep), dims(chosen)
    return first is not None and (second is None or len(first) == len(second))


def _objections(term: Term, frame: Frame) -> Iterator[str]:
    """Why this term can't go into a mask."""
    if term.factor != 1:
        yield "its mask is scaled, or bounded, together with its scores"
    if term.kind == "keep" and term.low > HIDDEN:
        yield f"scores that its mask hides become {term.low:g}, which still counts"
    array = _array(term.value)
    found = list(array.shape) if array is not None else dims(term.value)
    if found is None:
        yield "the shape of its mask isn't known"
        return
    if array is None and term.kind != "keep" and _type_of(term.value) != frame.dtype:
        yield "its mask has another type than its queries"
    if not _fits(found, term, frame, array is not None):
        yield f"its mask, {_words(found)}, does not fit its scores, {_words(frame.whole())}"


def _fits(found: list[Any], term: Term, frame: Frame, is_stored: bool) -> bool:
    """Whether every axis is 1 or as long as that of the scores."""
    whole: list[Any] = frame.whole() if frame.axes == 4 else [frame.batch, *frame.lengths]
    if frame.parts is not None:
        if frame.split[term.level]:
            whole = [frame.batch, *frame.parts, *frame.lengths]
            if len(frame.parts) > 1 and not is_stored:
                return False
        else:
            # What batch and heads were together has no axis of its own in the new operator.
            whole = [1, *([frame.parts[-1]] if frame.axes == 4 else []), *frame.lengths]
            if frame.axes == 4 and not is_stored:
                return False
    if len(found) > len(whole):
        return False
    return all(length == 1 or equal(length, wanted) for length, wanted in zip(found[::-1], whole[::-1], strict=False))


def _lacks_heads(term: Term, frame: Frame) -> bool:
    """Whether the first axis of a computed mask is the batch and no axis of heads follows."""
    found = dims(term.value) or []
    return frame.axes == 3 and frame.parts is None and len(found) == 3 and found[0] != 1


def _aligned(array: Any, term: Term, frame: Frame) -> Any:
    """A stored array with the axes of the new operator."""
    if frame.parts is None:
        return array[:, None] if frame.axes == 3 and array.ndim == 3 else array
    parts = frame.parts
    if frame.split[term.level]:
        array = array.reshape((1,) * (len(parts) + 3 - array.ndim) + array.shape)
    else:
        array = array.reshape((1,) * (frame.axes - array.ndim) + array.shape)
        lacking = len(parts) + 3 - frame.axes
        array = array.reshape((1,) * lacking + array.shape)
    wide = np.broadcast_to(array, (array.shape[0], *parts, *array.shape[-2:]))
    return wide.reshape(array.shape[0], prod(parts), *array.shape[-2:])


def _array(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) else stored(value)


def _type_of(value: Any) -> str | None:
    return value.dtype.name if value.dtype is not None else None


def _words(found: Sequence[Any]) -> str:
    return "[" + ", ".join("?" if length is None else str(length) for length in found) + "]"


# What is known of a value ---------------------------------------------------------------------------------------------

_MOVES = frozenset({"Expand", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity", "Tile", "Slice", "Flatten"})
_COMPUTES = _MOVES | {"Add", "Sub", "Mul", "Div", "Where", "Cast", "Concat", "Gather", "Max", "Min", "Neg"}


def uniform(value: Any, depth: int = 12) -> float | None:
    """The number that every element of `value` is, whatever the input; None where they differ or depend on it."""
    array = _array(value)
    if array is not None:
        small = 0 < array.size <= MOST_STORED and array.dtype.kind in "fiub"
        return float(array.flat[0]) if small and bool((array == array.flat[0]).all()) else None
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or depth == 0:
        return None
    if node.op_type in _MOVES:
        return uniform(node.inputs[0], depth - 1)
    if node.op_type == "ConstantOfShape":
        filled = node.attributes.get_tensor("value", None)
        return 0.0 if filled is None else float(filled.numpy().flat[0])
    if node.op_type == "Where":
        keep = uniform(node.inputs[0], depth - 1)
        return None if keep is None else uniform(node.inputs[1 if keep else 2], depth - 1)
    if node.op_type not in ("And", "Or", "Not", "Cast"):
        return None
    parts = [uniform(each, depth - 1) for each in node.inputs]
    if node.op_type == "Cast":
        # Of other numbers a cast may make something else.
        return parts[0] if parts[0] in (0.0, 1.0) else None
    if node.op_type == "Not":
        return None if parts[0] is None else float(not parts[0])
    decisive = 0.0 if node.op_type == "And" else 1.0
    if decisive in parts:
        return decisive
    return None if None in parts else 1.0 - decisive


def may_be_lowest(value: Any) -> bool:
    """Whether elements of `value` may be the lowest finite number: it is fed, or made with a number as large as that."""
    seen: set[int] = set()
    waiting = [value]
    while waiting and len(seen) < _SEARCHED:
        each = waiting.pop()
        if (
            each is None
            or id(each) in seen
            or (each.dtype is not None and each.dtype.name in ("BOOL", "INT64", "INT32"))
        ):
            continue
        seen.add(id(each))
        if each.is_graph_input():
            return True
        array = stored(each)
        if array is not None:
            if array.dtype.kind == "f" and array.size <= MOST_STORED and bool((np.abs(array) >= -BEYOND).any()):
                return True
            continue
        node = each.producer()
        if node is not None and node.domain == "" and node.op_type in _COMPUTES:
            waiting += list(node.inputs)
    return bool(waiting)
