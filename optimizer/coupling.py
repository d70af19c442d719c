"""Which positions along which axes live and die together: what can be cut out of a network whole.

Taking one channel out of a convolution takes it out of its bias, of the normalization behind it, of everything that is added to
its output, and of the weights of all that read the sum. Here this is found out for any graph: every axis of every value has
positions; each operator says which positions of its inputs are which of its outputs; positions that are
thus the same, directly or through others, form a unit. A unit that an input or output of the model, a softmax, a
normalization or an operator nobody knows depends on is frozen, and remembers why.

    coupling = couple(artifact)
    for group in coupling.groups:              # units that lie along the same axes: the channels of a stage, the heads of a layer
        group.size                             # how many units
        group.positions("conv1.weight", 0)     # [units, positions of each]
    coupling.left                              # what would have made a group, and why it isn't one
    cut(artifact, coupling, {group: [3, 5]})   # perwatt.slicing

After the dependency graph of Fang et al., "DepGraph: Towards any structural pruning" (CVPR 2023), on ONNX instead of autograd,
and with positions instead of layers, so that concatenations, splits and grouped heads need no case of their own.

One function below an operator (or kind of operator), by its ONNX name. What is not here freezes all that it reads and makes. How
a node is rewritten once something was cut stands in `slicing`, by the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from perwatt.analysis_shapes import analyse
from perwatt.artifact import Artifact
from perwatt.coupling_places import Coupling, Product, matched
from perwatt.patterns import given, is_stored, numbers, stored

Rule = Callable[[Any, Coupling], None]
RULES: dict[str, Rule] = {}

ELEMENTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
    "BitwiseXor", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Dropout", "Elu", "Equal", "Erf",
    "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
    "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or",
    "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus",
    "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
)  # fmt: skip
POOLING = (
    "AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool", "Resize", "Upsample",
    "InstanceNormalization", "BatchNormalization",
)  # fmt: skip
REDUCING = (
    "ArgMax", "ArgMin", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
ALONG = (
    "CumSum", "Hardmax", "LogSoftmax", "LpNormalization", "Softmax", "TopK",
)  # fmt: skip
"""What mixes the positions of one axis, and no others."""
MIXED = "mixes the positions along it"


def couple(artifact: Artifact) -> Coupling:
    """What of `artifact` can be cut, and what can't. Values need names of their own; nodes, too."""
    coupling = Coupling(analyse(artifact))
    graph = artifact.model.graph
    for value in graph.inputs:
        if value.name not in graph.initializers:
            coupling.freeze_all(value, "it is an input of the model")
    for value in graph.outputs:
        coupling.freeze_all(value, "it is an output of the model")
    for node in graph:
        apply_rule(node, coupling)
    coupling.settle()
    return coupling


def rule(*kinds: str) -> Callable[[Rule], Rule]:
    """Registers a function for these operators."""

    def register(made: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, made))
        return made

    return register


def apply_rule(node: Any, coupling: Coupling) -> None:
    """Ask the rule of a node's operator."""
    if node.op_type == "Constant" and not node.domain:
        return
    known = [value for value in (*node.inputs, *node.outputs) if value is not None]
    for value in known:
        for axis in range(coupling.rank(value) or 0):
            coupling.place(value, axis)
    found = RULES.get(node.op_type) if node.domain == "" else None
    if found is None or any(coupling.rank(value) is None for value in known):
        why = "nobody knows the shapes of" if found else "nobody knows what is done by"
        for value in (*known, *_captured(node)):
            coupling.freeze_all(value, f"{why} {_words(node)}")
        return
    found(node, coupling)


def _captured(node: Any) -> Iterator[Any]:
    """Values of outside that a node's graphs use."""
    for attribute in node.attributes.values():
        graphs = (
            [attribute.value]
            if attribute.type.name == "GRAPH"
            else attribute.value
            if attribute.type.name == "GRAPHS"
            else []
        )
        for graph in graphs:
            for inner in graph.all_nodes():
                yield from (value for value in inner.inputs if value is not None)
            yield from graph.outputs


def _words(node: Any) -> str:
    return f"{node.name or node.outputs[0].name} ({node.op_type})"


def _frozen_by(node: Any, what: str = MIXED) -> str:
    return f"{_words(node)} {what}"


# One by one -----------------------------------------------------------------------------------------------------------


@rule(*ELEMENTWISE)
def elementwise(node: Any, c: Coupling) -> None:
    """Every output position comes of those at its place; shorter inputs are repeated."""
    out = node.outputs[0]
    for other in node.outputs[1:]:
        _aligned(out, other, c)
    for value in given(node):
        if value is not None:
            _aligned(value, out, c)


def _aligned(value: Any, out: Any, c: Coupling) -> None:
    """Axes from the last on are the same, where the value isn't repeated along them."""
    ranks = c.rank(value), c.rank(out)
    assert ranks[0] is not None and ranks[1] is not None
    for axis in range(1, min(ranks[0], ranks[1]) + 1):
        if c.length(value, -axis) != 1:
            c.same(value, -axis, out, -axis)


@rule(*POOLING)
def channelwise(node: Any, c: Coupling) -> None:
    """Channels stay what they are; space is mixed."""
    x, y = node.inputs[0], node.outputs[0]
    for value in (y, *node.outputs[1:]):
        if c.rank(value) == c.rank(x):
            for axis in (0, 1):
                c.same(x, axis, value, axis)
    for value in (x, *node.outputs):
        for axis in range(2, c.rank(value) or 0):
            c.freeze(value, axis, _frozen_by(node))
    if node.op_type.endswith("Normalization"):
        for parameter in given(node)[1:]:
            c.same(x, 1, parameter, 0)
        for value in node.outputs[1:]:
            c.freeze_all(value, _frozen_by(node, "gives statistics"))


@rule("LayerNormalization", "RMSNormalization", "GroupNormalization", "MeanVarianceNormalization", "LRN")
def normalized(node: Any, c: Coupling) -> None:
    """Means go over what is normalised: with fewer positions they would be others."""
    x, y = node.inputs[0], node.outputs[0]
    _aligned(x, y, c)
    rank = c.rank(x) or 0
    first = (
        node.attributes.get_int("axis", -1) % rank if node.op_type in ("LayerNormalization", "RMSNormalization") else 1
    )
    for axis in range(first, rank):
        c.freeze(x, axis, _frozen_by(node, "normalises over it"))
    for value in (*given(node)[1:], *node.outputs[1:]):
        c.freeze_all(value, _frozen_by(node, "normalises over it"))


@rule(*ALONG)
def along_one_axis(node: Any, c: Coupling) -> None:
    """One axis is mixed."""
    x = node.inputs[0]
    rank = c.rank(x) or 0
    if node.op_type == "CumSum":
        axes = numbers(node.inputs[1])
        axis = axes[0] if axes else None
    else:
        axis = node.attributes.get_int("axis", -1)
    for value in node.outputs:
        for place in range(rank):
            if axis is None or place == axis % rank:
                c.freeze(x, place, _frozen_by(node))
                c.freeze(value, place, _frozen_by(node))
            else:
                c.same(x, place, value, place)


@rule(*REDUCING)
def reduced(node: Any, c: Coupling) -> None:
    """What is reduced over is frozen."""
    x, y = node.inputs[0], node.outputs[0]
    rank = c.rank(x) or 0
    if node.op_type in ("ArgMax", "ArgMin"):
        axes: list[int] | None = [node.attributes.get_int("axis", 0)]
    elif len(given(node)) > 1:
        axes = numbers(node.inputs[1])
    else:
        axes = list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else []
        if not axes and not node.attributes.get_int("noop_with_empty_axes", 0):
            axes = list(range(rank))
    if axes is None:
        c.freeze_all(x, _frozen_by(node, "reduces axes that nobody knows"))
        c.freeze_all(y, _frozen_by(node, "reduces axes that nobody knows"))
        return
    gone = {axis % rank for axis in axes}
    keeps = bool(node.attributes.get_int("keepdims", 1))
    there = 0
    for axis in range(rank):
        if axis in gone:
            c.freeze(x, axis, _frozen_by(node))
            there += keeps
        else:
            c.same(x, axis, y, there)
            there += 1


# Products -------------------------------------------------------------------------------------------------------------


@rule("Conv")
def conv(node: Any, c: Coupling) -> None:
    """Weight [out, in / group, …]. In groups, the same channel of each is cut, so that they stay alike; depthwise, a channel
    goes with its filters."""
    x, w, y = node.inputs[0], node.inputs[1], node.outputs[0]
    group, ins = node.attributes.get_int("group", 1), c.length(x, 1)
    outs, each = c.length(w, 0), c.length(w, 1)
    _space(node, c)
    c.same(x, 0, y, 0)
    c.same(w, 0, y, 1)
    _bias(node, y, 1, c)
    if ins is None or outs is None or each is None:
        c.freeze(x, 1, _frozen_by(node, "has weights of unknown shape"))
        return
    if group == 1:
        c.same(x, 1, w, 1)
        _product(node, w, 0, 1, c)
    elif each == 1:
        at = np.arange(outs)
        c.link(c.place(w, 0), at, c.place(x, 1), at // (outs // ins))
    else:
        at = np.arange(ins)
        c.link(c.place(x, 1), at, c.place(w, 1), at % each)
        per = c.virtual(f"{node.name}#out", outs // group)
        at = np.arange(outs)
        c.link(c.place(w, 0), at, per, at % (outs // group))
        _product(node, w, 0, 1, c)


@rule("ConvTranspose")
def conv_transpose(node: Any, c: Coupling) -> None:
    """Weight [in, out / group, …]."""
    x, w, y = node.inputs[0], node.inputs[1], node.outputs[0]
    group, ins, each = node.attributes.get_int("group", 1), c.length(x, 1), c.length(w, 1)
    _space(node, c)
    c.same(x, 0, y, 0)
    c.same(x, 1, w, 0)
    _bias(node, y, 1, c)
    if group == 1:
        c.same(w, 1, y, 1)
        _product(node, w, 1, 0, c)
    elif ins is None or each is None:
        c.freeze(x, 1, _frozen_by(node, "has weights of unknown shape"))
        c.freeze(y, 1, _frozen_by(node, "has weights of unknown shape"))
    elif group == ins:
        at = np.arange(group * each)
        c.link(c.place(y, 1), at, c.place(x, 1), at // each)
        c.freeze(w, 1, _frozen_by(node, "has several filters for a channel"))
    else:
        per = c.virtual(f"{node.name}#in", ins // group)
        c.link(c.place(x, 1), np.arange(ins), per, np.arange(ins) % (ins // group))
        at = np.arange(group * each)
        c.link(c.place(y, 1), at, c.place(w, 1), at % each)
        _product(node, w, 1, 0, c)


def _space(node: Any, c: Coupling) -> None:
    for value in (node.inputs[0], node.outputs[0]):
        for axis in range(2, c.rank(value) or 0):
            c.freeze(value, axis, _frozen_by(node))


def _bias(node: Any, out: Any, axis: int, c: Coupling) -> None:
    if len(given(node)) > 2:
        c.same(node.inputs[2], 0, out, axis)


def _product(node: Any, weight: Any, made: int, read: int, c: Coupling) -> None:
    if is_stored(weight):
        data, out = (node.inputs[0], 1), (node.outputs[0], 1)
        if node.op_type in ("MatMul", "Gemm"):
            turned = node.op_type == "Gemm" and node.attributes.get_int("transA", 0)
            data, out = (node.inputs[0], 0 if turned else -1), (node.outputs[0], -1)
        places = [(str(value.name), axis % (c.rank(value) or 1)) for value, axis in (data, out)]
        name = str(weight.name)
        c.products.append(Product(node.name, node.op_type, name, (name, made), (name, read), places[0], places[1]))


@rule("MatMul")
def matmul(node: Any, c: Coupling) -> None:
    """The last axis of the first meets the last but one of the second."""
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    ranks = c.rank(a) or 0, c.rank(b) or 0
    flat = ranks[1] == 1
    c.same(a, -1, b, -1 if flat else -2)
    if ranks[0] > 1:
        c.same(a, -2, y, -1 if flat else -2)
    if not flat:
        c.same(b, -1, y, -1)
    rank = c.rank(y) or 0
    if min(ranks) > 1:
        for axis in range(3, rank + 1):
            for value, of in ((a, ranks[0]), (b, ranks[1])):
                if axis <= of and c.length(value, -axis) != 1:
                    c.same(value, -axis, y, -axis)
    if ranks[1] == 2:
        _product(node, b, 1, 0, c)


@rule("Gemm")
def gemm(node: Any, c: Coupling) -> None:
    """A matrix product, either side turned or not."""
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    turned = node.attributes.get_int("transA", 0), node.attributes.get_int("transB", 0)
    c.same(a, 0 if turned[0] else 1, b, 1 if turned[1] else 0)
    c.same(a, 1 if turned[0] else 0, y, 0)
    c.same(b, 0 if turned[1] else 1, y, 1)
    if len(given(node)) > 2:
        _aligned(node.inputs[2], y, c)
    _product(node, b, *((0, 1) if turned[1] else (1, 0)), c)


@rule("Einsum")
def einsum(node: Any, c: Coupling) -> None:
    """The same letter is the same axis."""
    equation = node.attributes["equation"].value.replace(" ", "")
    read, _, made = equation.partition("->")
    terms = [*read.split(","), made]
    values = [*given(node), node.outputs[0]]
    if "." in equation or "->" not in equation or any(len(t) != c.rank(v) for t, v in zip(terms, values, strict=True)):
        for value in values:
            c.freeze_all(value, _frozen_by(node, "is written so that axes can't be told"))
        return
    first: dict[str, tuple[Any, int]] = {}
    for term, value in zip(terms, values, strict=True):
        for axis, letter in enumerate(term):
            other = first.setdefault(letter, (value, axis))
            if other != (value, axis):
                c.same(*other, value, axis)
            if letter not in made and read.count(letter) == 1:
                c.freeze(value, axis, _frozen_by(node))


# Attention ------------------------------------------------------------------------------------------------------------


@rule("Attention")
def attention(node: Any, c: Coupling) -> None:
    """Heads go whole: those of keys and values with all heads of queries that share them."""
    inputs = given(node)
    q, k, v, y = *inputs[:3], node.outputs[0]
    extra = [value for value in (*inputs[4:], *node.outputs[1:]) if value is not None and (value.name or value.uses())]
    ranks = {c.rank(value) for value in (q, k, v, y)}
    heads = _heads(node, c) if len(ranks) == 1 and not extra else None
    if heads is None:
        for value in (*(value for value in inputs if value is not None), *node.outputs):
            c.freeze_all(value, _frozen_by(node, "has heads that can't be told"))
        return
    many, shared = heads
    each = many // shared
    whole = c.virtual(f"{node.name}#heads", many)
    for value, of in ((q, many), (k, shared), (v, shared), (y, many)):
        axis = 1 if c.rank(value) == 4 else 2
        length = c.length(value, axis)
        place = c.place(value, axis)
        if length is None or length % of:
            c.freeze(value, axis, _frozen_by(node, "has heads that can't be told"))
            continue
        at = np.arange(length)
        for turn in range(each if of == shared else 1):
            head = at // (length // of)
            c.link(place, at, whole, head * each + turn if of == shared else head)
        for other in range(1, c.rank(value) or 0):
            if other != axis:
                c.freeze(value, other, _frozen_by(node))
        c.same(q, 0, value, 0)
    if len(inputs) > 3 and inputs[3] is not None:
        mask = inputs[3]
        for axis in range(c.rank(mask) or 0):
            if (c.rank(mask) or 0) - axis == 3 and c.length(mask, axis) == many:
                c.link(c.place(mask, axis), np.arange(many), whole, np.arange(many))
            else:
                c.freeze(mask, axis, _frozen_by(node))


def _heads(node: Any, c: Coupling) -> tuple[int, int] | None:
    """Heads of queries, and of keys and values."""
    if c.rank(node.inputs[0]) == 4:
        many, shared = c.length(node.inputs[0], 1), c.length(node.inputs[1], 1)
    else:
        many, shared = (node.attributes.get_int(f"{side}_num_heads", 0) for side in ("q", "kv"))
    return (many, shared) if many and shared and many % shared == 0 else None


@rule("RotaryEmbedding")
def rotary_embedding(node: Any, c: Coupling) -> None:
    """Heads go whole; what is inside of them is turned in pairs."""
    x, y = node.inputs[0], node.outputs[0]
    _aligned(x, y, c)
    if c.rank(x) == 4:
        c.freeze(x, 3, _frozen_by(node))
    else:
        heads, length = node.attributes.get_int("num_heads", 0), c.length(x, 2)
        if not heads or length is None or length % heads:
            c.freeze(x, 2, _frozen_by(node, "has heads that can't be told"))
        else:
            whole = c.virtual(f"{node.name}#heads", heads)
            c.link(c.place(x, 2), np.arange(length), whole, np.arange(length) // (length // heads))
    c.freeze(x, c.rank(x) - 2 if c.rank(x) == 4 else 1, _frozen_by(node))  # type: ignore[operator]
    for value in given(node)[1:]:
        if value is not None:
            c.freeze_all(value, _frozen_by(node, "turns by it"))


# Moving ---------------------------------------------------------------------------------------------------------------


@rule("Transpose")
def transpose(node: Any, c: Coupling) -> None:
    """Axes in another order."""
    x, y = node.inputs[0], node.outputs[0]
    rank = c.rank(x) or 0
    order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(rank)[::-1]
    for there, axis in enumerate(order):
        c.same(x, axis, y, there)


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: Any, c: Coupling) -> None:
    """Axes of the same elements in runs: one to one, one split up, several joined."""
    x, y = node.inputs[0], node.outputs[0]
    old, new = c.facts.shape(x), c.facts.shape(y)
    assert old is not None and new is not None
    runs = matched(old, new)
    if runs is None:
        for value in (x, y):
            c.freeze_all(value, _frozen_by(node, "regroups positions in a way that can't be told"))
        return
    for mine, theirs in runs:
        if len(mine) == 1 and len(theirs) == 1:
            c.same(x, mine[0], y, theirs[0])
        elif len(mine) == 1:
            c.split((x, mine[0]), [(y, axis) for axis in theirs])
        elif len(theirs) == 1:
            c.split((y, theirs[0]), [(x, axis) for axis in mine])
        else:
            for value, axes in ((x, mine), (y, theirs)):
                for axis in axes:
                    c.freeze(value, axis, _frozen_by(node, "regroups positions"))


@rule("Concat")
def concat(node: Any, c: Coupling) -> None:
    """One after the other along an axis."""
    y = node.outputs[0]
    _in_a_row(node, y, given(node), c)


@rule("Split")
def split(node: Any, c: Coupling) -> None:
    """The reverse."""
    _in_a_row(node, node.inputs[0], list(node.outputs), c)


def _in_a_row(node: Any, whole: Any, parts: list[Any], c: Coupling) -> None:
    rank = c.rank(whole) or 0
    axis = node.attributes.get_int("axis", 0) % rank
    start: int | None = 0
    for part in parts:
        for other in range(rank):
            if other != axis:
                c.same(whole, other, part, other)
        length = c.length(part, axis)
        if length is None or start is None:
            start = None
            c.freeze(part, axis, _frozen_by(node, "has parts whose length nobody knows"))
            c.freeze(whole, axis, _frozen_by(node, "has parts whose length nobody knows"))
        else:
            c.link(c.place(whole, axis), np.arange(start, start + length), c.place(part, axis), np.arange(length))
            start += length


@rule("Slice")
def slice_(node: Any, c: Coupling) -> None:
    """Some positions of some axes, in order."""
    x, y = node.inputs[0], node.outputs[0]
    rank = c.rank(x) or 0
    taken = sliced(node, rank)
    for axis in range(rank):
        start, end, step = (0, None, 1) if taken is None else taken.get(axis, (0, None, 1))
        length = c.length(x, axis)
        if taken is None or (step != 1 and length != c.length(y, axis)):
            c.freeze(x, axis, _frozen_by(node, "takes positions that can't be told"))
            c.freeze(y, axis, _frozen_by(node, "takes positions that can't be told"))
        elif length is None or (length == c.length(y, axis) and step == 1):
            c.same(x, axis, y, axis)
        elif step != 1:
            c.freeze(x, axis, _frozen_by(node, "takes positions in steps"))
            c.freeze(y, axis, _frozen_by(node, "takes positions in steps"))
        else:
            at = np.arange(length)[slice(start, end)]
            c.link(c.place(x, axis), at, c.place(y, axis), np.arange(len(at)))


def sliced(node: Any, rank: int) -> dict[int, tuple[int, int, int]] | None:
    """(start, end, step) by axis; None where they aren't stored."""
    if len(given(node)) < 3:
        return None
    found = [numbers(value) if value is not None else None for value in given(node)[1:]]
    starts, ends = found[0], found[1]
    if starts is None or ends is None:
        return None
    axes = found[2] if len(found) > 2 and given(node)[3] is not None else list(range(len(starts)))
    steps = found[3] if len(found) > 3 and given(node)[4] is not None else [1] * len(starts)
    if axes is None or steps is None:
        return None
    return {axis % rank: (a, b, s) for axis, a, b, s in zip(axes, starts, ends, steps, strict=True)}


@rule("Gather")
def gather(node: Any, c: Coupling) -> None:
    """What stored indices name; a table that is looked up in keeps its rows."""
    x, indices, y = node.inputs[0], node.inputs[1], node.outputs[0]
    rank, among = c.rank(x) or 0, c.rank(indices) or 0
    axis = node.attributes.get_int("axis", 0) % rank
    for other in range(rank):
        if other != axis:
            c.same(x, other, y, other if other < axis else other + among - 1)
    length = c.length(x, axis)
    if is_stored(indices) and among == 1 and length is not None:
        at = stored(indices).astype(np.int64) % length
        c.link(c.place(x, axis), at, c.place(y, axis), np.arange(len(at)))
        return
    c.freeze(x, axis, _frozen_by(node, "looks positions up"))
    for number in range(among):
        c.same(indices, number, y, axis + number)


@rule("Pad")
def pad(node: Any, c: Coupling) -> None:
    """Positions put in front and behind, or taken away there."""
    x, y = node.inputs[0], node.outputs[0]
    rank = c.rank(x) or 0
    amounts = padded(node, rank)
    constant = (node.attributes["mode"].value if "mode" in node.attributes else "constant") == "constant"
    for axis in range(rank):
        before, after = (0, 0) if amounts is None else amounts[axis]
        length = c.length(x, axis)
        if amounts is None or ((before or after) and (length is None or not constant)):
            c.freeze(x, axis, _frozen_by(node, "pads by what can't be told"))
            c.freeze(y, axis, _frozen_by(node, "pads by what can't be told"))
        elif not before and not after:
            c.same(x, axis, y, axis)
        else:
            at = np.arange(max(0, -before), (length or 0) - max(0, -after))
            c.link(c.place(x, axis), at, c.place(y, axis), at + before)


def padded(node: Any, rank: int) -> list[tuple[int, int]] | None:
    """(in front, behind) of each axis; None where it isn't stored."""
    if len(given(node)) < 2:
        return None
    amounts = numbers(node.inputs[1])
    axes = numbers(node.inputs[3]) if len(given(node)) > 3 and node.inputs[3] is not None else list(range(rank))
    if amounts is None or axes is None:
        return None
    found = [(0, 0)] * rank
    for number, axis in enumerate(axes):
        found[axis % rank] = amounts[number], amounts[number + len(axes)]
    return found


@rule("Expand", "Tile")
def repeated(node: Any, c: Coupling) -> None:
    """Axes of length 1 are repeated; Tile repeats others as well."""
    x, y = node.inputs[0], node.outputs[0]
    rank, more = c.rank(x) or 0, c.rank(y) or 0
    for axis in range(1, min(rank, more) + 1):
        if c.length(x, -axis) != 1 and node.op_type == "Tile" and c.length(x, -axis) != c.length(y, -axis):
            c.freeze(x, -axis, _frozen_by(node, "repeats it"))
            c.freeze(y, -axis, _frozen_by(node, "repeats it"))
        elif c.length(x, -axis) != 1:
            c.same(x, -axis, y, -axis)
        elif node.op_type == "Tile":
            c.freeze(y, -axis, _frozen_by(node, "repeats it"))
    if node.op_type == "Expand" and not _told(node.inputs[1], c):
        c.freeze_all(y, _frozen_by(node, "has a shape that can't be told"))


def _told(value: Any, c: Coupling) -> bool:
    return c.facts.content(value) is not None


@rule("Shape")
def shape(node: Any, c: Coupling) -> None:
    """Sizes are read: those of axes that are cut would be others."""
    x, rank = node.inputs[0], c.rank(node.inputs[0]) or 0
    read: set[int] = set()
    for use in node.outputs[0].uses():
        if use.node.op_type == "Gather" and use.idx == 0 and (picked := numbers(use.node.inputs[1])) is not None:
            read.update(one % rank for one in picked)
        elif use.node.op_type == "Slice" and (ranges := sliced(use.node, 1)) and 0 in ranges:
            start, end, step = ranges[0]
            read.update(range(rank)[start:end:step])
        else:
            read.update(range(rank))
    if node.outputs[0].is_graph_output():
        read.update(range(rank))
    for axis in read:
        c.freeze(x, axis, _frozen_by(node, "reads how long it is"))
