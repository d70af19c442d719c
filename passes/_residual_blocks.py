"""Residual blocks in a graph: additions of which one side is calculated from the other, and how to take them out.

    s ─┬─→ Conv → Relu → Conv ─→ Add ─→        becomes        s ─→
       └───────────────────────────┘

A block is an addition s + f(s) whose branch f does some work that leads nowhere else, so that nothing of it is left once s
stands for the sum; a normalization that other branches read too stays with them. What stands in front of f or behind the sum
doesn't matter: a post-norm layer's normalization stays, and reads s. A Relu behind goes too where s comes from another, since
the second changes nothing. The side that stays may also be s reshaped, or a sum that s is a part of: x + a(x) + b(x) are two
blocks, either of which can go alone.

No blocks: additions whose shortcut calculates something or changes the shape (downsampling), whose branch changes the
resolution and back (U-Nets: what is skipped there is the rest of the net), or holds no more than elementwise operators (the
tanh in GELU). Blocks within blocks are blocks of their own. Bodies of loops and branches aren't looked into.

Every value knows as a set of bits which of the values that a branch might begin at it was calculated from, and a branch is walked
from its end until it has a use outside: linear in the nodes, but for nested blocks, which are walked once a level.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from perwatt.analysis_facts import Facts
from perwatt.analysis_shapes import analyse, same
from perwatt.artifact import Artifact, Step
from perwatt.fusion import Builder, names_in, remove_unused
from perwatt.fusion import replace as put_in
from perwatt.patterns import Match, dims, given, is_stored, made_by

WORK = frozenset({
    "Attention", "AveragePool", "Conv", "ConvTranspose", "DFT", "DeformConv", "Einsum", "GRU", "Gemm", "If", "LSTM", "Loop",
    "MatMul", "MaxPool", "RNN", "Scan",
})  # fmt: skip
"""Operators worth saving. Those of other domains count too."""
RESIZING = frozenset({"ConvTranspose", "DepthToSpace", "MaxUnpool", "Resize", "Upsample"})
ATTENDING = frozenset({"Attention", "MultiHeadAttention", "Softmax"})
RELABELLING = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that keep all elements of their first input."""
SHORTCUTS = frozenset({
    *RELABELLING, "AveragePool", "BatchNormalization", "Concat", "Conv", "Gemm", "MatMul", "MaxPool", "Pad", "Slice",
})  # fmt: skip
"""Operators that shortcuts of downsampling blocks are made of."""
MEASURING = frozenset({"Shape", "Size"})
"""What is calculated from a shape is the same whatever was dropped."""
FLOATS = frozenset({"BFLOAT16", "DOUBLE", "FLOAT", "FLOAT16"})
FLOAT32 = 1
"""ONNX's number for it."""
FARTHEST = 8
"""Nodes of a shortcut at most."""
BETWEEN = 24
"""Nodes between two blocks of a layer at most: a normalization, written out, and what moves values."""


@dataclass(frozen=True)
class Block:
    """One block. `name`: of its addition; `side`: which input of it stays; `nodes`: names of all that is not needed any
    more without it, but for the addition itself; `dtype`: of the sum, by ONNX's number, and its `rank`; `attention`: whether the
    branch attends; `follows`: names of the blocks whose sum it reads, perhaps normalized."""

    name: str
    side: int
    nodes: frozenset[str]
    dtype: int
    rank: int
    attention: bool
    follows: tuple[str, ...] = ()

    def contains(self, other: Block) -> bool:
        """Whether `other` goes with this one."""
        return other.name in self.nodes


@dataclass(frozen=True)
class Blocks:
    """Blocks in order of the graph, and (name, reason) of additions that are none."""

    found: tuple[Block, ...]
    left: tuple[tuple[str, str], ...]


# Finding ----------------------------------------------------------------------------------------------------------------


def residual_blocks(artifact: Artifact) -> Blocks:
    """All residual blocks of a model whose nodes have names of their own (`_naming.with_names`)."""
    search = _Search(artifact)
    found: list[Block] = []
    left: list[tuple[str, str]] = []
    for node in search.additions:
        block, reason = search.judged(node)
        if block is not None:
            found.append(block)
        else:
            left.append((str(node.name), reason))
    return Blocks(tuple(search.linked(found)), tuple(left))


class _Search:
    """What is known of the graph while blocks are looked for."""

    def __init__(self, artifact: Artifact) -> None:
        self.graph = artifact.model.graph
        self.facts: Facts = analyse(artifact)
        self.order = {node: place for place, node in enumerate(self.graph)}
        self.additions = [node for node in self.graph if _is_addition(node)]
        starts = (value for node in self.additions for side in node.inputs for value in _behind(side, SHORTCUTS))
        self.bit = {value: 1 << place for place, value in enumerate(dict.fromkeys(starts))}
        self.made_from = self._made_from()

    def _made_from(self) -> dict[Any, int]:
        """For each value the bits of what it was calculated from, itself not among them."""
        known: dict[Any, int] = {}
        for node in self.graph:
            bits = 0
            if node.op_type not in MEASURING:
                for value in _reads(node):
                    bits |= known.get(value, 0) | self.bit.get(value, 0)
            known.update(dict.fromkeys(node.outputs, bits))
        return known

    def _comes_from(self, value: Any, start: Any) -> bool:
        return bool(self.made_from.get(value, 0) & self.bit[start])

    def judged(self, node: Any) -> tuple[Block | None, str]:
        """The block that this addition ends, or why it ends none."""
        reason = ""
        for side in (0, 1):
            stays, goes = node.inputs[side], node.inputs[1 - side]
            start = next((v for v in _behind(stays, RELABELLING) if self._comes_from(goes, v)), None)
            if start is None:
                continue
            inside = self._branch(node, goes, start)
            refused = self._refusal(node, stays, inside)
            if refused is None:
                names = frozenset(each.name for each in inside or ())
                shape, dtype = self.facts.shape(stays) or (), self.facts.dtype(stays) or FLOAT32
                attends = any(each.op_type in ATTENDING for each in inside or ())
                return Block(node.name, side, names, dtype, len(shape), attends), ""
            reason = reason or refused
        return None, reason or self._no_shortcut(node)

    def _refusal(self, node: Any, stays: Any, inside: set[Any] | None) -> str | None:
        """Why an addition with this branch is no block all the same; None where it is one."""
        kinds = {each.op_type for each in inside or ()}
        if resizing := sorted(kinds & RESIZING):
            return f"its branch changes the resolution ({', '.join(resizing)})"
        have, wanted = self.facts.shape(stays), self.facts.shape(node.outputs[0])
        if not same(have, wanted) and not _declared_alike(stays, node.outputs[0]):
            return f"its input and output have, or may have, different shapes: {_words(have)} and {_words(wanted)}"
        if inside is None:
            return "a value inside its branch is used elsewhere"
        works = kinds & WORK or any(each.domain != "" for each in inside)
        return None if works else "its branch is elementwise, or hardly more"

    def _no_shortcut(self, node: Any) -> str:
        """Why neither side is calculated from the other: a shortcut that is more than that, or there is none."""
        told: list[tuple[int, str]] = []
        for side in (0, 1):
            stays, goes = node.inputs[side], node.inputs[1 - side]
            passed: list[str] = []
            for value in _behind(stays, SHORTCUTS, passed):
                if value is not stays and self._comes_from(goes, value):
                    shapes = [self.facts.shape(value), self.facts.shape(node.outputs[0])]
                    changed = "" if same(*shapes) else f" that changes the shape, {' to '.join(map(_words, shapes))}"
                    told.append((len(passed), f"its shortcut has a {' and a '.join(dict.fromkeys(passed))}{changed}"))
                    break
        if told:
            # The shorter of two ways is the shortcut.
            return min(told)[1]
        return "neither of its inputs is calculated from the other"

    def _branch(self, node: Any, goes: Any, start: Any) -> set[Any] | None:
        """All nodes that only this addition needs, by way of `goes`; None where work done on `start` has other uses."""
        inside: set[Any] = set()
        waiting = _Latest(self.order)
        waiting.add([goes], start)
        for each in waiting:
            if not _leads_elsewhere(each, inside, node):
                inside.add(each)
                waiting.add(_reads(each), start)
            elif self._works_on(each, start):
                return None
        return inside

    def _works_on(self, node: Any, start: Any) -> bool:
        """Whether what `node` makes of `start` takes work; a normalization that several branches read doesn't."""
        near, waiting = [node], [node]
        while waiting:
            one = waiting.pop()
            if one.op_type in MEASURING:
                continue
            for value in _reads(one):
                if value is not start and not self._comes_from(value, start):
                    continue
                if one.op_type in WORK or one.domain != "" or len(near) > BETWEEN:
                    return True
                maker = None if value is start else value.producer()
                if maker is not None and maker not in near:
                    near.append(maker)
                    waiting.append(maker)
        return False

    def linked(self, blocks: Sequence[Block]) -> Iterator[Block]:
        """The blocks, each with those that it follows."""
        sums = {block.name for block in blocks}
        nodes = {node.name: node for node in self.additions}
        for block in blocks:
            yield replace(block, follows=tuple(self._before(nodes[block.name].inputs[block.side], sums)))

    def _before(self, value: Any, sums: Collection[str]) -> Iterator[str]:
        """Blocks that end in front of `value`, with no work between."""
        waiting, seen = [value], 0
        while waiting and seen < BETWEEN:
            node = waiting.pop(0).producer()
            if node is None or node.op_type in WORK:
                continue
            seen += 1
            if node.name in sums:
                yield node.name
                return
            waiting += [each for each in _reads(node) if each not in waiting]


class _Latest:
    """Nodes, the last in the graph first, each once."""

    def __init__(self, order: Mapping[Any, int]) -> None:
        self.order = order
        self.waiting: list[tuple[int, Any]] = []
        self.seen: set[Any] = set()

    def add(self, values: Any, start: Any) -> None:
        """Those that make `values`, unless that is `start`."""
        for value in values:
            node = None if value is start else value.producer()
            if node in self.order and node not in self.seen:
                self.seen.add(node)
                heapq.heappush(self.waiting, (-self.order[node], node))

    def __iter__(self) -> Iterator[Any]:
        while self.waiting:
            yield heapq.heappop(self.waiting)[1]


def _is_addition(node: Any) -> bool:
    """Of two floating-point values that both depend on the input."""
    if node.domain != "" or node.op_type not in ("Add", "Sum") or len(given(node)) != 2:
        return False
    kinds = [value.dtype.name for value in node.inputs if value is not None and value.dtype is not None]
    return all(kind in FLOATS for kind in kinds) and not any(map(is_stored, node.inputs))


def _behind(value: Any, through: Collection[str], passed: list[str] | None = None) -> Iterator[Any]:
    """`value` and what it is made of by no more than these operators and additions, nearest first. `passed`: gets the
    operators that were gone through so far, additions left out."""
    waiting = [(value, 0)]
    seen = set()
    while waiting:
        one, steps = waiting.pop(0)
        if one in seen or is_stored(one):
            continue
        seen.add(one)
        yield one
        node = one.producer()
        if node is None or node.domain != "" or steps == FARTHEST:
            continue
        if _is_addition(node):
            waiting += [(each, steps + 1) for each in node.inputs]
        elif node.op_type in through:
            if passed is not None:
                passed.append(node.op_type)
            waiting.append((node.inputs[0], steps + 1))


def _reads(node: Any) -> Iterator[Any]:
    """Values that a node reads, those of its subgraphs included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        graphs = {"GRAPH": [attribute.value], "GRAPHS": attribute.value}.get(attribute.type.name, ())
        for graph in graphs:
            yield from (value for inner in graph.all_nodes() for value in inner.inputs if value is not None)
            yield from graph.outputs


def _leads_elsewhere(node: Any, inside: Collection[Any], end: Any) -> bool:
    uses = [use.node for value in node.outputs for use in value.uses()]
    return any(value.is_graph_output() for value in node.outputs) or any(
        user is not end and user not in inside for user in uses
    )


def _declared_alike(one: Any, other: Any) -> bool:
    """Whether the model itself declares the same shape for both, every axis of it. What can't be worked out, such as how much of
    a table of positions a Slice leaves, whoever exported the model knew; that it runs without a block is proved all the same."""
    shape = dims(one)
    return shape is not None and None not in shape and shape == dims(other)


def _words(shape: Sequence[Any] | None) -> str:
    return "unknown" if shape is None else f"[{', '.join('?' if n is None else str(n) for n in shape)}]"


# Units ------------------------------------------------------------------------------------------------------------------


def layers(blocks: Sequence[Block]) -> list[tuple[Block, ...]]:
    """The blocks in order, those of a transformer's layer together: attention, and what follows it up to the next that comes
    behind something else. All others by themselves."""
    nests = {block.name for block in blocks if any(block.contains(other) for other in blocks)}
    units: list[list[Block]] = []
    for block in blocks:
        last = units[-1] if units else []
        opened = bool(last) and last[0].attention and last[-1].name in block.follows
        begun = block.attention and bool(last) and not last[-1].attention
        if opened and not begun and not nests & {block.name, last[-1].name}:
            last.append(block)
        else:
            units.append([block])
    return [tuple(unit) for unit in units]


# Taking out -------------------------------------------------------------------------------------------------------------


def without(artifact: Artifact, blocks: Sequence[Block], step: Step) -> Artifact:
    """The model without these blocks, and all that only they needed; what is left keeps its names."""
    model = artifact.edit()
    nodes, taken = {node.name: node for node in model.graph}, names_in(model)
    for block in blocks:
        root = nodes[block.name]
        stays = root.inputs[block.side]
        gone = [root]
        behind = _second_relu(root, stays)
        if behind is not None:
            gone.append(behind)
        match = Match(gone[-1], tuple(gone), (gone[-1].outputs[0],))
        put_in(model.graph, match, Builder(model.graph, gone[-1], taken), (stays,))
    remove_unused(model)
    return artifact.after(model, step)


def _second_relu(root: Any, stays: Any) -> Any:
    """The Relu that alone reads the sum, where what stays comes from one already."""
    uses = list(root.outputs[0].uses())
    alone = len(uses) == 1 and not root.outputs[0].is_graph_output()
    relu = made_by(uses[0].node.outputs[0], "Relu") if alone else None
    return relu if relu is not None and relu.graph is root.graph and made_by(stays, "Relu") else None
