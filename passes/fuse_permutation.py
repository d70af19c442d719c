"""Put reshapes, transposes, slices and concatenations that only move tokens about into one Gather.

    Reshape(Transpose(Reshape(Concat(Slice(x), Slice(x)), …)), …)        becomes        Reshape(Gather(Reshape(x), order, axis=1))

Swin shifts its pictures by half a window (two slices and a concatenation for each axis: torch's roll), cuts them into windows (a
reshape, a transpose, a reshape), and does all that backwards behind the attention; between its stages it picks every second
row and column (four strided slices and a concatenation). Each step copies everything; put together they are a
permutation of whole vectors [C], known beforehand, and one copy. Shift and windows of Swin-tiny's first stage take 0.62
times the CPU time, the product behind them included, in OpenVINO and ONNX Runtime (docs/fusion.md).

It pays from two copies on; a single transpose is as good as a Gather. Left where lengths behind the first axis aren't
known, where vectors are shorter than 16 or are taken apart, and where items of a batch would mix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._reusing import kept_once
from perwatt.patterns import Match, dims, given, numbers

COPYING = ("Transpose", "Concat", "Gather")
KINDS = (*COPYING, "Reshape", "Slice")
LEAST_COPIES = 2
MOST_NODES = 64
SHORTEST = 16
"""Elements of a vector that is worth a copy of its own."""
MOST_ELEMENTS = 1 << 24
"""Elements on which the order is worked out."""


@dataclass(frozen=True)
class FusePermutation(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=0.0, rtol=0.0)
    roots: ClassVar[tuple[str, ...]] = ("Reshape", "Transpose", "Concat")
    what: ClassVar[str] = "permutations put into one Gather"

    def find(self, node: Any) -> Iterator[Match]:
        inside, source = _chain(node)
        if source is None or _copies(inside) < LEAST_COPIES:
            return
        order = _order(inside, source, node)
        if order is not None:
            yield Match(node, tuple(inside), (node.outputs[0],), {"x": source}, {"order": order})

    def rewrite(self, match: Match, build: Builder) -> Any:
        x, order = match["x"], match.named["order"]
        _, *inner = dims(match.outputs[0]) or []
        width: Any = (dims(x) or [])[-1]
        if np.array_equal(order, np.arange(len(order))):
            return _shaped(x, tuple(inner), build)
        tokens = _shaped(x, (len(order), width), build)
        moved = build.op("Gather", tokens, kept_once(build, order), axis=1)
        _note(moved, (len(order), width))
        return _shaped(moved, tuple(inner), build)


# What belongs to it ---------------------------------------------------------------------------------------------------


def _chain(root: Any) -> tuple[list[Any], Any]:
    """The nodes that lead to `root` and whose results nobody else uses, and the one value that they begin with; None where
    there are several, or too many nodes."""
    inside = [root]
    while True:
        begins = {id(value): value for node in inside for value in _moved(node) if value.producer() not in inside}
        more = {
            id(node): node
            for value in begins.values()
            if (node := value.producer()) is not None and _joins(node, inside)
        }
        if not more or len(inside) + len(more) > MOST_NODES:
            return inside, next(iter(begins.values())) if len(begins) == 1 else None
        inside += more.values()


def _copies(inside: list[Any]) -> int:
    """How often everything is copied; slices together make one copy."""
    kinds = [node.op_type for node in inside]
    return sum(kind in COPYING for kind in kinds) + ("Slice" in kinds)


def _moved(node: Any) -> list[Any]:
    """What a node moves: all that Concat is given, of others the first."""
    return given(node) if node.op_type == "Concat" else given(node)[:1]


def _joins(node: Any, inside: list[Any]) -> bool:
    """Whether a node is of a kind that moves data, in a way that is known, and all users are inside."""
    output = node.outputs[0]
    known = node.domain == "" and node.op_type in KINDS and (node.op_type == "Concat" or _told(node) is not None)
    return known and not output.is_graph_output() and all(use.node in inside for use in output.uses())


def _told(node: Any) -> list[list[int]] | None:
    """The stored lists of integers that a node is given besides its data; None where one is computed."""
    found = [[] if value is None else numbers(value) for value in given(node)[1:]]
    return [each for each in found if each is not None] if None not in found else None


# Where everything goes ------------------------------------------------------------------------------------------------


def _order(inside: list[Any], source: Any, root: Any) -> Any:
    """Which vector of a group of them comes at each place, int64; None where it is no such permutation. A group is what
    belongs to one item, on whichever side has it whole."""
    ends = [dims(value) for value in (source, root.outputs[0])]
    if any(
        shape is None or len(shape) < 2 or not all(isinstance(n, int) and n > 0 for n in shape[1:]) for shape in ends
    ):
        return None
    first, last = (shape or [] for shape in ends)
    width: Any = first[-1]
    inner = [prod(n for n in shape[1:] if isinstance(n, int)) for shape in (first, last)]
    group = max(inner)
    if width < SHORTEST or any(size % width or group % size for size in inner):
        return None
    items = _items(first[0], last[0], inner, group)
    if items is None or items * group > MOST_ELEMENTS:
        return None
    given_at = np.arange(items * group).reshape(items * group // inner[0], *first[1:])
    found = _run(root.outputs[0], {id(source): given_at}, inside)
    if found is None or found.size != items * group:
        return None
    vectors = found.reshape(items, group // width, width)
    starts = vectors[0, :, 0]
    whole = np.arange(items)[:, None, None] * group + starts[:, None] + np.arange(width)
    order = starts // width
    is_permutation = np.array_equal(vectors, whole) and np.array_equal(np.sort(order), np.arange(group // width))
    return order.astype(np.int64) if is_permutation else None


def _items(first: Any, last: Any, inner: list[int], group: int) -> int | None:
    """How many groups to try it on: as many as there are where that is fixed, else two."""
    fixed = [length * size for length, size in zip((first, last), inner, strict=True) if isinstance(length, int)]
    if not fixed:
        return 2
    return fixed[0] // group if fixed[0] % group == 0 and fixed[0] > 0 else None


def _run(value: Any, known: dict[int, Any], inside: list[Any]) -> Any:
    """What becomes of the arrays `known` at `value`; None where a node can't do it with these lengths."""
    if id(value) not in known:
        node = value.producer()
        arrays = [_run(each, known, inside) for each in _moved(node)]
        try:
            known[id(value)] = None if any(a is None for a in arrays) else _applied(node, arrays)
        except (ValueError, IndexError):
            known[id(value)] = None
    return known[id(value)]


def _applied(node: Any, arrays: list[Any]) -> Any:
    x, attributes = arrays[0], node.attributes
    if node.op_type == "Concat":
        return np.concatenate(arrays, attributes["axis"].as_int())
    if node.op_type == "Transpose":
        return x.transpose(attributes["perm"].as_ints() if "perm" in attributes else None)
    told = _told(node) or []
    if node.op_type == "Gather":
        # A single index, which would take the axis away, is given with no axes of its own.
        return np.take(x, told[0], attributes.get_int("axis", 0)) if dims(node.inputs[1]) else None
    if node.op_type == "Slice":
        return _sliced(x, told)
    copied = not attributes.get_int("allowzero", 0)
    return x.reshape([x.shape[axis] if n == 0 and copied else n for axis, n in enumerate(told[0])])


def _sliced(x: Any, told: list[list[int]]) -> Any:
    starts, ends = told[0], told[1]
    axes = told[2] if len(told) > 2 and told[2] else list(range(len(starts)))
    steps = told[3] if len(told) > 3 else [1] * len(starts)
    if any(step <= 0 for step in steps):
        return None
    cut = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut[axis] = slice(start, end, step)
    return x[tuple(cut)]


# What is put there ----------------------------------------------------------------------------------------------------


def _shaped(value: Any, inner: tuple[Any, ...], build: Builder) -> Any:
    """The value with these lengths behind the first axis."""
    if dims(value) and (dims(value) or [])[1:] == list(inner):
        return value
    out = build.op("Reshape", value, kept_once(build, np.array([-1, *inner], np.int64)))
    _note(out, inner)
    return out


def _note(value: Any, inner: tuple[Any, ...]) -> None:
    import onnx_ir as ir

    value.shape = ir.Shape([None, *inner])
