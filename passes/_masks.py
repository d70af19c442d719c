"""What is sure of every row of a mask, where each of its elements alone might be −∞.

Rows lie along the last axis, as masks are laid over scores. A causal mask hides some elements of most rows, but never the
first: that is seen from how it is made, by comparing positions that start at 0 with positions that aren't negative, or by
keeping a triangle.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from perwatt.passes._bounds import MOVES, Bounds, lowest, ordered
from perwatt.passes._rearranging import axes_given, dims_after, dtype_of
from perwatt.patterns import dims, equal, from_the_end, is_stored, number, rank, stored


class Rows(Bounds):
    """`Bounds`, and what holds for at least one element of every row."""

    def __init__(self) -> None:
        super().__init__()
        self._peaks: dict[int, float] = {}

    def peak(self, value: Any) -> float:
        """Every row has an element at least this high; −∞ where that can't be said, or where one may be NaN."""
        if id(value) not in self._peaks:
            found = -math.inf if isinstance(self.of(value), str) else max(self.low(value), self._peak(value))
            self._peaks[id(value)] = found if found >= lowest(value) else -math.inf
        return self._peaks[id(value)]

    def dip(self, value: Any) -> float:
        """Every row has an element at most this low; +∞ where that can't be said."""
        node = value.producer()
        if is_stored(value):
            found = float(np.atleast_1d(stored(value)).min(axis=-1).max())
        elif node is None or node.domain != "":
            found = math.inf
        elif node.op_type == "Cast" or _keeps_rows(node):
            found = self.dip(node.inputs[0])
        else:
            found = self.high(node.inputs[0]) if node.op_type == "Range" else math.inf
        return min(found, self.high(value))

    def has(self, mask: Any, truth: bool) -> bool:
        """Whether every row of a mask of truth values has an element that is `truth`."""
        if self._is(mask, truth):
            return True
        if is_stored(mask):
            return bool((np.atleast_1d(stored(mask)) == truth).any(axis=-1).all())
        node = mask.producer()
        return node is not None and node.domain == "" and self._has(node, truth)

    def _peak(self, value: Any) -> float:
        if is_stored(value):
            return float(np.atleast_1d(stored(value)).max(axis=-1).min())
        node = value.producer()
        if node is None or node.domain != "":
            return -math.inf
        kind, inputs = node.op_type, node.inputs
        if kind == "Cast" or _keeps_rows(node):
            return self.peak(inputs[0])
        if kind == "Add":
            return max(self.peak(a) + self.low(b) for a, b in (inputs, inputs[::-1]))
        if kind == "Sub":
            return self.peak(inputs[0]) - self.high(inputs[1])
        if kind == "Where":
            chosen = [self.low(inputs[1])] if self.has(inputs[0], True) else []
            chosen += [self.low(inputs[2])] if self.has(inputs[0], False) else []
            return max(chosen, default=-math.inf)
        first = _first_of_triangle(node)
        return -math.inf if first is None else 0.0 if first == "zero" else self.low(inputs[0])

    def _is(self, mask: Any, truth: bool) -> bool:
        """Whether all of a mask is `truth`."""
        return self.low(mask) == self.high(mask) == truth

    def _has(self, node: Any, truth: bool) -> bool:
        kind, inputs = node.op_type, node.inputs
        if kind == "Not":
            return self.has(inputs[0], not truth)
        if kind == "Cast" and dtype_of(inputs[0]) != "BOOL":
            return truth and self.peak(inputs[0]) > 0
        if kind == "Cast" or _keeps_rows(node):
            return self.has(inputs[0], truth)
        if kind in ("And", "Or"):
            # One false operand makes a conjunction false; for a true one both must be true in the same place.
            alone = truth == (kind == "Or")
            return any(self.has(a, truth) and (alone or self._is(b, truth)) for a, b in (inputs, inputs[::-1]))
        if kind == "Equal":
            return not truth and any(self.peak(a) > self.high(b) for a, b in (inputs, inputs[::-1]))
        if first := _first_of_triangle(node):
            return not truth if first == "zero" else self._is(inputs[0], truth)
        return self._has_by_comparison(node, truth)

    def _has_by_comparison(self, node: Any, truth: bool) -> bool:
        if (comparison := ordered(node)) is None:
            return False
        small, large, may_be_equal = comparison
        if not truth:
            small, large, may_be_equal = large, small, not may_be_equal
        dip, low = self.dip(small), self.low(large)
        return dip < low or (may_be_equal and dip == low)


def _keeps_rows(node: Any) -> bool:
    """Whether the rows of the node's output are those of its first input, each at least once, or longer by repetition."""
    kind = node.op_type
    if kind not in MOVES:
        return False
    if kind == "Unsqueeze":
        added = from_the_end(axes_given(node), _rank(node.outputs[0]))
        return added is not None and -1 not in added
    if kind == "Transpose":
        perm = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else [0]
        return perm[-1] == len(perm) - 1
    if kind == "Reshape":
        before, after = dims(node.inputs[0]), dims_after(node)
        return equal(before[-1] if before else None, after[-1] if after else None)
    return kind in ("Identity", "Expand", "Tile")


def _rank(value: Any) -> int | None:
    """How many axes, also where only the operators before say so."""
    node = value.producer() if value is not None else None
    known = rank(value)
    if known is not None or node is None:
        return known
    if node.op_type == "Range":
        return 1
    if node.op_type == "Cast":
        return _rank(node.inputs[0])
    before, axes = (_rank(node.inputs[0]), axes_given(node)) if node.op_type == "Unsqueeze" else (None, None)
    return None if before is None or axes is None else before + len(axes)


def _first_of_triangle(node: Any) -> str | None:
    """Of a Trilu, what the first element of every row is: `zero`, or `kept` as it was; None where that depends."""
    if node.op_type != "Trilu":
        return None
    offset = number(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else 0.0
    if offset is None:
        return None
    if node.attributes.get_int("upper", 1):
        return "zero" if offset > 0 else None
    return "kept" if offset >= 0 else None
