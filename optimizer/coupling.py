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
from perwatt.coupling_places import Coupling, Place, Product, matched
from perwatt.errors import PassError
from perwatt.patterns import axes_of, given, is_stored, made_by, numbers, stored

Rule = Callable[[Any, Coupling], None]
RULES: dict[str, Rule] = {}

ELEMENTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
    "BitwiseXor", "Cast", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Dropout", "Elu", "Equal", "Erf",
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
    """What of `artifact` can be cut, and what can't. Raises PassError where two products have one name, or one has none."""
    coupling = Coupling(analyse(artifact))
    graph = artifact.model.graph
    for value in graph.inputs:
        stays = "it is a weight that may be fed as an input" if value.name in graph.initializers else "it is an input"
        coupling.freeze_all(value, f"{stays} of the model")
    for value in graph.outputs:
        coupling.freeze_all(value, "it is an output of the model")
    for node in graph:
        apply_rule(node, coupling)
    names = [product.node for product in coupling.products]
    if "" in names or len(set(names)) < len(names):
        raise PassError("products are told apart by their nodes' names, and some have none or the same")
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
    known = [value for value in (*node.inputs, *node.outputs) if value is not None and value.name]
    for value in known:
        for axis in range(coupling.rank(value) or 0):
            coupling.place(value, axis)
    found = RULES.get(node.op_type) if node.domain == "" else None
    if found is not None and all(coupling.rank(value) is not None for value in known):
        found(node, coupling)
        return
    why = "has shapes that can't be told" if found else "is an operator that there is no rule for"
    for value in (*known, *_captured(node)):
        coupling.freeze_all(value, _frozen_by(node, why))


def _captured(node: Any) -> Iterator[Any]:
    """Values of outside that a node's graphs use."""
    for attribute in node.attributes.values():
        if attribute.type.name not in ("GRAPH", "GRAPHS"):
            continue
        for graph in [attribute.value] if attribute.type.name == "GRAPH" else attribute.value:
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
    if "broadcast" in node.attributes:
        _stays(node, c, "repeats in a way that opset 7 has done away with")
        return
    for value in (*given(node), *node.outputs[1:]):
        if value is not None and value.name:
            _aligned(value, out, c)


@rule("CastLike")
def cast_like(node: Any, c: Coupling) -> None:
    """Of the second nothing but the type counts."""
    _aligned(node.inputs[0], node.outputs[0], c)


def _stays(node: Any, c: Coupling, what: str) -> None:
    """Freeze all that a node reads and makes."""
    for value in (*node.inputs, *node.outputs):
        if value is not None:
            c.freeze_all(value, _frozen_by(node, what))


def _aligned(value: Any, out: Any, c: Coupling) -> None:
    """Axes from the last on are the same, where the value isn't repeated along them."""
    ranks = c.rank(value), c.rank(out)
    assert ranks[0] is not None and ranks[1] is not None
    for axis in range(1, min(ranks[0], ranks[1]) + 1):
        c.same(value, -axis, out, -axis)


@rule(*POOLING)
def channelwise(node: Any, c: Coupling) -> None:
    """Channels stay what they are; space is mixed."""
    x, y = node.inputs[0], node.outputs[0]
    mode = node.attributes.get("coordinate_transformation_mode")
    if mode is not None and mode.value == "tf_crop_and_resize":
        _stays(node, c, "cuts a part out of every axis")
        return
    for axis in (0, 1):
        c.same(x, axis, y, axis)
    for value in (x, y):
        for axis in range(2, c.rank(value) or 0):
            c.freeze(value, axis, _frozen_by(node))
    if node.op_type.endswith("Normalization"):
        # Running statistics, which are outputs in training, go by channels as well.
        for parameter in (*given(node)[1:], *node.outputs[1:]):
            if parameter.name:
                c.same(x, 1, parameter, 0)
        if node.attributes.get_int("training_mode", 0):
            c.freeze(x, 0, _frozen_by(node))
    elif any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        _stays(node, c, "counts positions through all channels")


@rule("LayerNormalization", "RMSNormalization", "GroupNormalization", "MeanVarianceNormalization", "LRN")
def normalized(node: Any, c: Coupling) -> None:
    """Means go over what is normalised: with fewer positions they would be others."""
    x, y = node.inputs[0], node.outputs[0]
    _aligned(x, y, c)
    rank = c.rank(x) or 0
    first = 0 if node.op_type == "MeanVarianceNormalization" else 1
    if node.op_type in ("LayerNormalization", "RMSNormalization"):
        first = node.attributes.get_int("axis", -1) % rank
    for axis in range(first, rank):
        c.freeze(x, axis, _frozen_by(node, "normalises over it"))
    for value in (*given(node)[1:], *node.outputs[1:]):
        c.freeze_all(value, _frozen_by(node, "normalises over it"))


@rule(*ALONG)
def along_one_axis(node: Any, c: Coupling) -> None:
    """One axis is mixed; before opset 13, softmaxes took all from that one on for one."""
    x = node.inputs[0]
    rank = c.rank(x) or 0
    flat = node.op_type in ("Hardmax", "LogSoftmax", "Softmax") and c.facts.opset < 13
    axes = numbers(node.inputs[1]) if node.op_type == "CumSum" else None
    axis: int | None = node.attributes.get_int("axis", 1 if flat else -1) % rank
    if node.op_type == "CumSum":
        axis = axes[0] % rank if axes else None
    for value in node.outputs:
        for place in range(rank):
            if axis is None or place == axis or (flat and place > axis):
                c.freeze(x, place, _frozen_by(node))
                c.freeze(value, place, _frozen_by(node))
            else:
                c.same(x, place, value, place)


@rule(*REDUCING)
def reduced(node: Any, c: Coupling) -> None:
    """What is reduced over is frozen."""
    x, y = node.inputs[0], node.outputs[0]
    rank = c.rank(x) or 0
    axes = [node.attributes.get_int("axis", 0)] if node.op_type in ("ArgMax", "ArgMin") else axes_of(node)
    if axes is None:
        _stays(node, c, "reduces axes that can't be told")
        return
    if not axes and not node.attributes.get_int("noop_with_empty_axes", 0):
        axes = list(range(rank))
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
        _stays(node, c, "has channels whose number can't be told")
    elif group == 1:
        c.same(x, 1, w, 1)
        _product(node, w, 0, 1, c)
    elif each == 1:
        at = np.arange(outs)
        c.link(c.place(w, 0), at, c.place(x, 1), at // (outs // ins))
    else:
        at = np.arange(ins)
        c.link(c.place(x, 1), at, c.place(w, 1), at % each)
        per = c.virtual(node, "out", outs // group)
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
    if ins is None or each is None:
        _stays(node, c, "has channels whose number can't be told")
    elif group == 1:
        c.same(w, 1, y, 1)
        _product(node, w, 1, 0, c)
    elif group == ins:
        at = np.arange(group * each)
        c.link(c.place(y, 1), at, c.place(x, 1), at // each)
        c.freeze(w, 1, _frozen_by(node, "has several filters for a channel"))
    else:
        per = c.virtual(node, "in", ins // group)
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
    """Note a product, the only thing that may sum over units. Sums with anything but a weight freeze them: nothing would tell
    what units are worth there."""
    data, out = (node.inputs[0], 1), (node.outputs[0], 1)
    if node.op_type in ("MatMul", "Gemm"):
        turned = node.op_type == "Gemm" and node.attributes.get_int("transA", 0)
        data, out = (node.inputs[0], 0 if turned else -1), (node.outputs[0], -1)
    origin, sides = _origin(weight, (made, read), c)
    if not is_stored(origin) or (node.op_type == "MatMul" and c.rank(weight) != 2):
        c.freeze(*data, _frozen_by(node, "sums over it what isn't multiplied by a plain weight"))
        return
    places = [(str(value.name), axis % (c.rank(value) or 1)) for value, axis in (data, out)]
    name = str(origin.name)
    c.products.append(Product(node.name or "", node.op_type, name, (name, sides[0]), (name, sides[1]), *places))


def _origin(weight: Any, axes: tuple[int, int], c: Coupling) -> tuple[Any, tuple[int, int]]:
    """The stored tensor that a weight is, behind casts and transpositions, and where those axes are there."""
    while (node := made_by(weight, "Transpose|Cast|Identity")) is not None:
        if node.op_type == "Transpose":
            order = _order(node, c)
            axes = order[axes[0]], order[axes[1]]
        weight = node.inputs[0]
    return weight, axes


def _order(node: Any, c: Coupling) -> list[int]:
    """Axes of what a Transpose reads, in the order of what it makes."""
    turned = list(range(c.rank(node.inputs[0]) or 0))[::-1]
    return list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else turned


@rule("MatMul")
def matmul(node: Any, c: Coupling) -> None:
    """The last axis of the first meets the last but one of the second; those before are a batch."""
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    ranks = c.rank(a) or 0, c.rank(b) or 0
    # What a vector lacks, the result lacks as well.
    rows, columns = int(ranks[0] > 1), int(ranks[1] > 1)
    read = -1 - columns
    c.same(a, -1, b, read)
    if rows:
        c.same(a, -2, y, -1 - columns)
    if columns:
        c.same(b, -1, y, -1)
    for value, rank in ((a, ranks[0]), (b, ranks[1])):
        for axis in range(3, rank + 1):
            c.same(value, -axis, y, -axis + 2 - rows - columns)
    _product(node, b, ranks[1] - 1, read % ranks[1], c)


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
    if "." in equation or "->" not in equation:
        _stays(node, c, "is written so that axes can't be told")
        return
    first: dict[str, tuple[Any, int]] = {}
    for term, value in zip(terms, values, strict=True):
        for axis, letter in enumerate(term):
            other = first.setdefault(letter, (value, axis))
            if other != (value, axis):
                c.same(*other, value, axis)
            if letter not in made:
                c.freeze(value, axis, _frozen_by(node, "sums over it what isn't multiplied by a plain weight"))


# Attention ------------------------------------------------------------------------------------------------------------


@rule("Attention")
def attention(node: Any, c: Coupling) -> None:
    """Heads go whole: those of keys and values with all heads of queries that share them. One that all share stays."""
    inputs = given(node)
    q, k, v, y = *inputs[:3], node.outputs[0]
    extra = [value for value in (*inputs[4:], *node.outputs[1:]) if value is not None and value.name]
    ranks = {c.rank(value) for value in (q, k, v, y)}
    heads = _heads(node, c) if len(ranks) == 1 and not extra else None
    if heads is None:
        _stays(node, c, "has heads that can't be told")
        return
    many, shared = heads
    whole = c.virtual(node, "heads", many)
    for value, of in ((q, many), (k, shared), (v, shared), (y, many)):
        axis = 1 if c.rank(value) == 4 else 2
        for other in range(1, c.rank(value) or 0):
            if other != axis:
                c.freeze(value, other, _frozen_by(node))
        c.same(q, 0, value, 0)
        if of == 1 < many:
            c.freeze(value, axis, _frozen_by(node, "shares it among all heads"))
        else:
            _in_heads(value, axis, of, whole, many, c)
    if len(inputs) > 3 and inputs[3] is not None:
        mask = inputs[3]
        for axis in range(c.rank(mask) or 0):
            if (c.rank(mask) or 0) - axis == 3 and c.length(mask, axis) == many:
                c.link(c.place(mask, axis), np.arange(many), whole, np.arange(many))
            else:
                c.freeze(mask, axis, _frozen_by(node))


def _in_heads(value: Any, axis: int, of: int, whole: Place, many: int, c: Coupling) -> None:
    """An axis holds `of` heads, one after the other, each of which as many of `whole` share."""
    at = np.arange(c.length(value, axis) or 0)
    head = at // max(1, len(at) // of)
    for turn in range(many // of):
        c.link(c.place(value, axis), at, whole, head * (many // of) + turn)


def _heads(node: Any, c: Coupling) -> tuple[int, int] | None:
    """Heads of queries, and of keys and values."""
    joined = c.rank(node.inputs[0]) == 3
    lengths = [c.length(value, 2 if joined else 1) for value in node.inputs[:3]]
    named = [node.attributes.get_int(f"{side}_num_heads", 0) for side in ("q", "kv", "kv")]
    heads = [many or 0 for many in (named if joined else lengths)]
    whole = all(many and size and size % many == 0 for many, size in zip(heads, lengths, strict=True))
    return (heads[0], heads[1]) if whole and heads[0] % heads[1] == 0 else None


@rule("RotaryEmbedding")
def rotary_embedding(node: Any, c: Coupling) -> None:
    """Heads go whole; what is inside of them is turned in pairs."""
    x, y = node.inputs[0], node.outputs[0]
    _aligned(x, y, c)
    heads, axis = node.attributes.get_int("num_heads", 0), 1 if c.rank(x) == 4 else 2
    length = c.length(x, axis)
    if c.rank(x) == 4:
        c.freeze(x, 3, _frozen_by(node))
    if heads and length is not None and length % heads == 0:
        _in_heads(x, axis, heads, c.virtual(node, "heads", heads), heads, c)
    elif c.rank(x) != 4:
        c.freeze(x, 2, _frozen_by(node, "has heads that can't be told"))
    c.freeze(x, 3 - axis, _frozen_by(node))
    for value in given(node)[1:]:
        if value is not None:
            c.freeze_all(value, _frozen_by(node, "turns by it"))


# Moving ---------------------------------------------------------------------------------------------------------------


@rule("Transpose")
def transpose(node: Any, c: Coupling) -> None:
    """Axes in another order."""
    x, y = node.inputs[0], node.outputs[0]
    for there, axis in enumerate(_order(node, c)):
        c.same(x, axis, y, there)


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: Any, c: Coupling) -> None:
    """Axes of the same elements in runs: one to one, one split up, several joined."""
    x, y = node.inputs[0], node.outputs[0]
    old, new = c.facts.shape(x), c.facts.shape(y)
    assert old is not None and new is not None
    runs = matched(old, new)
    if runs is None or not _can_be_told(node, c):
        _stays(node, c, "regroups positions in a way that can't be told")
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
    if all(value.name for value in node.outputs):
        _in_a_row(node, node.inputs[0], list(node.outputs), c)
    else:
        _stays(node, c, "leaves parts out")


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


def _can_be_told(node: Any, c: Coupling) -> bool:
    """Whether the shape that a node is given can be written anew: one that is calculated takes Where, of opset 9."""
    return len(given(node)) < 2 or is_stored(node.inputs[1]) or c.facts.opset >= 9


@rule("Slice")
def slice_(node: Any, c: Coupling) -> None:
    """Some positions of some axes, in order."""
    x, y = node.inputs[0], node.outputs[0]
    rank = c.rank(x) or 0
    taken = sliced(node, rank)
    if taken is None:
        _stays(node, c, "takes positions that can't be told")
        return
    for axis in range(rank):
        start, end, step = taken.get(axis, (0, None, 1))
        length, left = c.length(x, axis), c.length(y, axis)
        if step != 1:
            c.freeze(x, axis, _frozen_by(node, "takes positions in steps"))
            c.freeze(y, axis, _frozen_by(node, "takes positions in steps"))
        elif length is None or length == left:
            c.same(x, axis, y, axis)
        else:
            at = np.arange(length)[slice(start, end)]
            c.link(c.place(x, axis), at, c.place(y, axis), np.arange(len(at)))


def sliced(node: Any, rank: int) -> dict[int, tuple[int, int, int]] | None:
    """(start, end, step) by axis; None where they aren't stored."""
    found = [_listed(node, word, number) for number, word in enumerate(("starts", "ends", "axes", "steps"), 1)]
    starts, ends, axes, steps = found
    if starts is None or ends is None or axes is None or steps is None:
        return None
    axes, steps = axes or list(range(len(starts))), steps or [1] * len(starts)
    return {axis % rank: (a, b, s) for axis, a, b, s in zip(axes, starts, ends, steps, strict=True)}


def _listed(node: Any, word: str, position: int) -> list[int] | None:
    """Whole numbers that are an attribute in old opsets, and a stored input since; empty where they are left out, None where
    they are calculated."""
    if word in node.attributes:
        return list(node.attributes[word].as_ints())
    inputs = given(node)
    return numbers(inputs[position]) if position < len(inputs) and inputs[position] is not None else []


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
    if amounts is None:
        _stays(node, c, "pads by what can't be told")
        return
    for axis in range(rank):
        before, after = amounts[axis]
        length = c.length(x, axis)
        if not before and not after:
            c.same(x, axis, y, axis)
        elif length is None or not constant:
            c.freeze(x, axis, _frozen_by(node, "pads it by what lies in it"))
            c.freeze(y, axis, _frozen_by(node, "pads it by what lies in it"))
        else:
            at = np.arange(max(0, -before), length - max(0, -after))
            c.link(c.place(x, axis), at, c.place(y, axis), at + before)


def padded(node: Any, rank: int) -> list[tuple[int, int]] | None:
    """(in front, behind) of each axis; None where it isn't stored."""
    amounts, axes = _listed(node, "pads", 1), _listed(node, "axes", 3)
    if not amounts or axes is None:
        return None
    found = [(0, 0)] * rank
    axes = axes or list(range(rank))
    for number, axis in enumerate(axes):
        found[axis % rank] = amounts[number], amounts[number + len(axes)]
    return found


@rule("Expand", "Tile")
def repeated(node: Any, c: Coupling) -> None:
    """Expand repeats axes of length 1; Tile repeats others as well."""
    x, y = node.inputs[0], node.outputs[0]
    rank, more = c.rank(x) or 0, c.rank(y) or 0
    for axis in range(1, min(rank, more) + 1):
        if node.op_type == "Expand" or c.length(x, -axis) == c.length(y, -axis) is not None:
            c.same(x, -axis, y, -axis)
        else:
            c.freeze(x, -axis, _frozen_by(node, "repeats it"))
            c.freeze(y, -axis, _frozen_by(node, "repeats it"))
    if node.op_type == "Expand" and not _can_be_told(node, c):
        _stays(node, c, "has a shape that can't be told")


@rule("Shape")
def shape(node: Any, c: Coupling) -> None:
    """Sizes are read: those of axes that are cut would be others."""
    x, rank = node.inputs[0], c.rank(node.inputs[0]) or 0
    # An end beyond the last axis is the last; Python has it so, too.
    told = range(rank)[node.attributes.get_int("start", 0) : node.attributes.get_int("end", rank)]
    read: set[int] = set(told if node.outputs[0].is_graph_output() else ())
    for use in node.outputs[0].uses():
        if use.node.op_type == "Gather" and use.idx == 0 and (picked := numbers(use.node.inputs[1])) is not None:
            read.update(told[one] for one in picked)
        elif use.node.op_type == "Slice" and use.idx == 0 and (ranges := sliced(use.node, 1)) and 0 in ranges:
            start, end, step = ranges[0]
            read.update(told[start:end:step])
        else:
            read.update(told)
    for axis in read:
        c.freeze(x, axis, _frozen_by(node, "reads how long it is"))
