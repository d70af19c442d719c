"""Cancel reshapes: several in a row become one, those that change nothing go, and so do all copies that copy everything.

    Reshape(Reshape(x, s), t), Flatten(Unsqueeze(x)), …        becomes        Reshape(x, t)
    Unsqueeze(Unsqueeze(x, 1), 2)                              becomes        Unsqueeze(x, [1, 2])
    Squeeze(Unsqueeze(x)), Reshape(x: [b, 8], [-1, 8])         becomes        x
    Reshape(Relu(Reshape(x, s)) + 1, shape of x)               becomes        Relu(x) + 1
    Expand, Slice, Tile, Pad, Split, Concat, Dropout that
    change nothing                                             becomes        x

A reshape moves no data in most backends, but it stands between operators that would otherwise be fused, and hides from
other passes that two values are one. Shapes are compared axis by axis, as numbers or as the symbols of the file; of two
with the same number of elements one axis may stay open. Where the shape is computed while the model runs, only what is
right for every outcome is done. Elements at the boundary of a stretch are never copied to make a stretch fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from perwatt.contract import Stage, Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._rearranging import (
    all_of,
    axes_given,
    dims_after,
    fits_into,
    same_dims_by_volume,
    target_for,
)
from perwatt.passes._reshapes import RESHAPES, enclosed, rebuilt
from perwatt.patterns import Match, dims, given, made_by, numbers, only_user, rank, same_dims, size

COPIES = ("Expand", "Slice", "Tile", "Pad", "Split", "Concat", "Dropout")
"""Operators that may turn out to copy their first input as it is."""
_TO_THE_END = 2**31 - 1
"""Ends of a Slice from here on mean the end of the axis, by custom and because no axis is longer."""


@dataclass(frozen=True)
class CancelReshapes(Fusion):
    """No settings."""

    stage: ClassVar[Stage] = Stage.CLEAN
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=0.0, rtol=0.0)
    after: ClassVar[tuple[str, ...]] = ("unflatten-gemm",)
    also_after: ClassVar[Stage | None] = Stage.FUSE
    roots: ClassVar[tuple[str, ...]] = (*RESHAPES.split("|"), *COPIES)
    what: ClassVar[str] = "reshapes and copies cancelled"

    def find(self, node: Any) -> Iterator[Match]:
        if node.op_type in COPIES:
            if _copies_everything(node):
                yield Match(node, (node,), (node.outputs[0],), {"same": node.inputs[0]})
            return
        if same_dims_by_volume(dims(node.inputs[0]), dims_after(node)):
            yield Match(node, (node,), (node.outputs[0],), {"same": node.inputs[0]})
        first = made_by(node.inputs[0], RESHAPES)
        if first is not None:
            yield from _in_a_row(first, node)
        elif (match := enclosed(node, products=False)) is not None:
            yield match

    def check(self, match: Match) -> Iterator[str]:
        if "first" in match.named and _joined(match) is None:
            yield "the shape that two in a row would have as one is computed, or has more than one open axis"

    def rewrite(self, match: Match, build: Builder) -> Any:
        if "piece" in match.named:
            return rebuilt(match.named["piece"], build, {})
        if match.get("same") is not None:
            return match["same"]
        kind, how = _joined(match) or ("", None)
        allowzero = (
            match.root.attributes.get_int("allowzero", 0) if kind == "Reshape" and not isinstance(how, list) else 0
        )
        if isinstance(how, list):
            how = build.constant(np.array(how, np.int64), f"{match.root.outputs[0].name}_shape")
        return build.op(kind, match["x"], how, allowzero=allowzero or None)


def _in_a_row(first: Any, second: Any) -> Iterator[Match]:
    x = first.inputs[0]
    undone = (first.op_type, second.op_type) in (("Squeeze", "Unsqueeze"), ("Unsqueeze", "Squeeze"))
    axes = [axes_given(node) for node in (first, second)]
    same_axes = None not in axes and sorted(axes[0] or ()) == sorted(axes[1] or ())
    if (undone and same_axes) or same_dims_by_volume(dims(x), dims_after(second)):
        yield Match(second, (second,), (second.outputs[0],), {"same": x})
    elif second.op_type == "Reshape" or only_user(first.outputs[0]) is second:
        yield Match(second, (second,), (second.outputs[0],), {"x": x}, {"first": first})


def _joined(match: Match) -> tuple[str, Any] | None:
    """The one operator that does what two in a row do, and its second input: a value, or the numbers that it holds."""
    first, second = match.named["first"], match.root
    if first.op_type == second.op_type != "Reshape" and (axes := _axes_of_both(first, second)) is not None:
        return second.op_type, axes
    if second.op_type == "Reshape":
        target = numbers(second.inputs[1])
        copies = not second.attributes.get_int("allowzero", 0)
        if not copies or (target is not None and 0 not in target):
            return "Reshape", second.inputs[1]
    target = target_for(dims_after(second), dims(match["x"]))
    return ("Reshape", target) if target is not None else None


def _axes_of_both(first: Any, second: Any) -> list[int] | None:
    """Axes of one Squeeze or Unsqueeze that stands for two; None where that isn't known, and for Flatten."""
    one, two = axes_given(first), axes_given(second)
    if first.op_type == "Flatten" or one is None or two is None:
        return None
    before, after = rank(first.inputs[0]), rank(second.outputs[0])
    sign = 1 if first.op_type == "Unsqueeze" else -1
    if before is None and after is not None:
        before = after - sign * (len(one) + len(two))
    if before is None and min([*one, *two], default=0) >= 0:
        # Counted from the front, axes mean the same in any tensor that is long enough.
        before = max([*one, *two], default=0) + len(one) + len(two) + 1
    if before is None:
        return None
    between, last = before + sign * len(one), before + sign * (len(one) + len(two))
    # Squeeze is read backwards: what it takes away, an Unsqueeze would put in.
    early, late, middle, final = (one, two, between, last) if sign > 0 else (two, one, between, before)
    early, late = [axis % middle for axis in early], [axis % final for axis in late]
    left = [axis for axis in range(final) if axis not in late]
    return sorted([*late, *(left[axis] for axis in early)])


# Copies that copy everything ------------------------------------------------------------------------------------------


def _copies_everything(node: Any) -> bool:
    inputs, x = given(node), dims(node.inputs[0])
    if node.op_type == "Concat":
        return len(inputs) == 1
    if node.op_type == "Split":
        return len(node.outputs) == 1
    if node.op_type == "Dropout":
        return len(inputs) < 3 or all_of(inputs[2], False)
    if len(inputs) < 2:
        return False
    if node.op_type == "Expand":
        return same_dims(x, dims(node.outputs[0])) or fits_into(numbers(inputs[1]), x)
    if node.op_type == "Slice":
        return _takes_all(node, inputs)
    return all_of(inputs[1], 1 if node.op_type == "Tile" else 0)


def _takes_all(node: Any, inputs: list[Any]) -> bool:
    if len(inputs) > 4 and not all_of(inputs[4], 1):
        return False
    if same_dims(dims(inputs[0]), dims(node.outputs[0])):
        return True
    starts, ends = numbers(inputs[1]), numbers(inputs[2]) if len(inputs) > 2 else None
    axes = numbers(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts or ())))
    if starts is None or ends is None or axes is None or any(starts):
        return False
    lengths = [size(inputs[0], axis) for axis in axes]
    return all(end >= (_TO_THE_END if length is None else length) for end, length in zip(ends, lengths, strict=True))
