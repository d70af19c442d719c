"""Couplings: what is left, and why; which axes of two shapes hold the same."""

from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest
from couplings import Net, described, left_whole, proven, reasons
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, control_flow, node, proto, value, weight
from onnx import helper

from perwatt.analysis_expressions import symbol
from perwatt.artifact import Artifact
from perwatt.coupling import couple
from perwatt.coupling_places import matched

# What is left, and why ------------------------------------------------------------------------------------------------


def test_sizes_that_are_read():
    def built(read):
        net = Net()
        h = net.linear("a", net.feed("x", "batch", 5, 6), 6, 8)
        size = net.put("Cast", read(net, h), to=1)
        return net.built(f"{net.linear('b', net.put('Div', h, size), 8, 4)}:float32[batch,5,4]")

    def at(net, shape, number):
        return net.put("Gather", shape, net.keep(np.int64(number)))

    def part(net, shape, start, end):
        return net.put("Slice", shape, net.keep(np.int64([start])), net.keep(np.int64([end])))

    for read in (
        lambda net, h: at(net, net.put("Shape", h), -1),
        lambda net, h: at(net, net.put("Shape", h), [2]),
        lambda net, h: at(net, net.put("Shape", h, start=1), 1),
        lambda net, h: at(net, net.put("Shape", h, start=-2, end=2**62), -1),
        lambda net, h: part(net, net.put("Shape", h), 2, 2**63 - 1),
        lambda net, h: part(net, net.put("Shape", h, start=1), -1, 5),
        lambda net, h: net.put("ReduceMax", net.put("Shape", h)),
    ):
        left_whole(built(read), "reads how long it is")
    for read in (
        lambda net, h: at(net, net.put("Shape", h), 1),
        lambda net, h: at(net, net.put("Shape", h, start=1), 0),
        lambda net, h: at(net, net.put("Shape", h, end=-1), -1),
        lambda net, h: part(net, net.put("Shape", h, end=2), -1, 9),
        lambda net, h: net.put("ReduceMax", net.put("Shape", h, start=1, end=2)),
    ):
        assert described(proven(built(read))[0]) == {"a": (8, "a", "b")}


def test_a_shape_that_is_an_output():
    net = Net()
    h = net.linear("a", net.feed("x", "batch", 5, 6), 6, 8)
    left_whole(net.built(net.linear("b", h, 8, 4), f"{net.put('Shape', h)}:int64"), "reads how long it is")


def test_what_nobody_reads_but_the_caller():
    net = Net()
    h = net.linear("a", net.feed("x", "batch", 6), 6, 8)
    coupling = left_whole(net.built(net.put("Relu", h)), "it is an output of the model")
    assert [(left.name, left.size) for left in coupling.left] == [("a", 8)]


def test_what_no_product_reads():
    net = Net()
    x = net.feed("x", "batch", 6)
    h = net.put("Gather", net.linear("a", x, 6, 8), net.keep(np.int64([0, 1, 2])), axis=1)
    coupling, _ = proven(net.built(net.linear("b", h, 3, 4)))
    assert described(coupling) == {"a": (3, "a", "b")} and reasons(coupling)["a"] == "no product reads it"


def test_one_channel_among_others_stays_alone():
    """A map of depths beside eight channels doesn't keep those."""
    net = Net()
    x = net.feed("x", "batch", 3, 6, 6)
    h = net.put("Concat", net.conv("a", x, 3, 8), net.conv("depth", x, 3, 1), axis=1)
    coupling, _ = proven(net.built(net.conv("b", h, 9, 4)))
    assert described(coupling) == {"a": (8, "a", "b")}


def test_a_channel_that_is_used_by_itself_stays():
    net = Net()
    h = net.conv("a", net.feed("x", "batch", 3, 6, 6), 3, 8)
    gate = net.put("Slice", h, *(net.keep(np.int64([number])) for number in (2, 3, 1)))
    coupling, _ = proven(net.built(net.conv("b", net.put("Mul", h, net.put("Sigmoid", gate)), 8, 4)))
    assert described(coupling) == {"a": (7, "a", "b")}
    assert "has a single position" in reasons(coupling)["a"]


def test_channels_that_are_scaled():
    net = Net()
    h = net.conv("a", net.feed("x", "batch", 3, 6, 6), 3, 8)
    h = net.put("Resize", h, None, net.keep(np.float32([1, 2, 1, 1])), mode="nearest")
    left_whole(net.built(net.conv("b", h, 16, 4)), "8 positions meet 16")


def test_what_meets_an_axis_of_unknown_length():
    """Of one position or of eight: that is only seen when the model runs."""
    net = Net()
    h = net.linear("a", net.feed("x", "batch", 6), 6, 8)
    built = net.built(net.linear("b", net.put("Mul", h, net.feed("scale", 1, "n")), 8, 4))
    left_whole(built, "nobody knows how long scale is", n=8)


def test_regrouping_that_crosses_channels():
    net = Net()
    h = net.linear("a", net.feed("x", 4, 6), 6, 9)
    h = net.put("Reshape", h, net.keep(np.int64([6, 6])))
    coupling = left_whole(net.built(net.linear("b", h, 6, 4)))
    assert reasons(coupling)["a"].endswith("(Reshape) regroups positions")


def quantized(net, h):
    parameters = net.keep(np.float32(0.1)), net.keep(np.int8(0))
    return net.put("DequantizeLinear", net.put("QuantizeLinear", h, *parameters), *parameters)


OPERATORS = {
    "LSTM": (lambda net, h: net.put("LSTM", h, net.noise(1, 16, 8), net.noise(1, 16, 4), hidden_size=4), 4),
    "GRU": (lambda net, h: net.put("GRU", h, net.noise(1, 12, 8), net.noise(1, 12, 4), hidden_size=4), 4),
    "Trilu": (lambda net, h: net.put("Trilu", h), 8),
    "QuantizeLinear": (quantized, 8),
    "GatherElements": (lambda net, h: net.put("GatherElements", h, net.keep(np.zeros((5, 2, 3), int)), axis=2), 3),
    "ScatterND": (lambda net, h: net.put("ScatterND", h, net.keep(np.int64([[0]])), net.noise(1, 2, 8)), 8),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_without_a_rule(operator):
    put, width = OPERATORS[operator]
    net = Net()
    h = put(net, net.linear("a", net.feed("x", 5, 2, 6), 6, 8))
    coupling = left_whole(net.built(net.linear("b", h, width, 4)))
    assert reasons(coupling)["a"].endswith(f"({operator}) is an operator that there is no rule for")


def test_operators_of_others_and_functions_of_the_model():
    nodes = [
        node("MatMul", "x w", "h", name="a"), node("Twice", "h", "t", domain="mine", name="/twice"),
        node("MatMul", "t v", "y", name="b"),
    ]  # fmt: skip
    made = proto(nodes, "x:float32[batch,6]", "y:float32[batch,4]", {"w": weight(6, 8), "v": weight(8, 4)})
    made.opset_import.append(helper.make_opsetid("mine", 1))
    for known in (False, True):
        if known:
            body = [node("Add", "i i", "o")]
            made.functions.append(
                helper.make_function("mine", "Twice", ["i"], ["o"], body, [helper.make_opsetid("", 23)])
            )
        coupling = couple(Artifact(model=ir.from_proto(made)))
        assert coupling.groups == []
        assert reasons(coupling)["a"] == "/twice (Twice) is an operator that there is no rule for"


@pytest.mark.parametrize(
    "operator", ["Split", "Slice", "Pad", "Gather", "Resize", "Reshape", "Expand", "Conv", "ConvTranspose"]
)
def test_shapes_that_nobody_knows_are_no_trouble_elsewhere(operator):
    """`If` gives a shape that isn't looked for; what is cut lies beside it."""
    net = Net()
    x = net.feed("x", "batch", 3, 6, 6)
    same = [branch(name, node("Identity", "x", "out"), rank=None) for name in ("yes", "no")]
    odd = net.put("If", net.keep(np.bool_(True)), then_branch=same[0], else_branch=same[1])
    more = {
        "Split": lambda: net.put("Split", odd, axis=1, num_outputs=3, outputs=3)[0],
        "Slice": lambda: net.put(
            "Slice", odd, net.keep(np.int64([1])), net.keep(np.int64([2])), net.keep(np.int64([1]))
        ),
        "Pad": lambda: net.put("Pad", odd, net.keep(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))),
        "Gather": lambda: net.put("Gather", odd, net.keep(np.int64([0])), axis=1),
        "Resize": lambda: net.put("Resize", odd, None, None, net.keep(np.int64([2, 3, 9, 9]))),
        "Reshape": lambda: net.put("Reshape", odd, net.keep(np.int64([0, 3, -1]))),
        "Expand": lambda: net.put("Expand", odd, net.keep(np.int64([1]))),
        "Conv": lambda: net.put("Conv", odd, net.noise(4, 3, 1, 1), name="c"),
        "ConvTranspose": lambda: net.put("ConvTranspose", odd, net.noise(3, 1, 1, 1), group=3, name="c"),
    }[operator]()
    h = net.conv("b", net.put("Relu", net.conv("a", x, 3, 8)), 8, 4)
    total = net.put("ReduceSum", more, keepdims=0)
    coupling, _ = proven(net.built(f"{net.put('Add', h, total)}:float32[batch,4,6,6]"))
    assert described(coupling) == {"a": (8, "a", "b")}


def branch(name, *nodes, rank=2):
    return helper.make_graph(list(nodes), name, [], [value("out:float32[batch,8]" if rank == 2 else "out:float32")])


def test_what_the_graphs_inside_of_a_node_use():
    nodes = [
        node("MatMul", "x w", "h", name="a"), node("Relu", "h", "r"), node("MatMul", "x u", "g", name="c"),
        node("ReduceSum", "x", "sum", keepdims=0), node("Greater", "sum zero", "positive"),
        node("If", "positive", "o", name="/if", then_branch=branch("yes", node("Neg", "r", "out")),
             else_branch=branch("no", node("Identity", "r", "out"))),
        node("Mul", "o scale", "m"), node("MatMul", "m v", "y1", name="b"), node("MatMul", "g t", "y2", name="d"),
        node("Add", "y1 y2", "y"),
    ]  # fmt: skip
    weights = {
        "w": weight(6, 8),
        "u": weight(6, 8),
        "v": weight(8, 4),
        "t": weight(8, 4),
        "zero": np.float32(0),
        "scale": weight(8),
    }
    coupling, _ = proven(build(nodes, "x:float32[batch,6]", "y:float32[batch,4]", weights))
    assert described(coupling) == {"c": (8, "c", "d")}
    assert reasons(coupling)["a"] == "/if (If) is an operator that there is no rule for"


def test_weights_that_a_loop_reads():
    body = helper.make_graph(
        [node("Identity", "go", "on"), node("Add", "state b", "next"), node("MatMul", "next v", "row")], "body",
        [value("i:int64[]"), value("go:bool[]"), value("state:float32[2,8]")],
        [value("on:bool[]"), value("next:float32[2,8]"), value("row:float32[2,4]")],
    )  # fmt: skip
    nodes = [
        node("MatMul", "x w", "h", name="a"), node("Add", "h b", "s"),
        node("Loop", "times - s", "last rows", name="/loop", body=body), node("MatMul", "last v", "y", name="c"),
    ]  # fmt: skip
    weights = {"w": weight(6, 8), "b": weight(8), "v": weight(8, 4), "times": np.int64(3)}
    artifact = build(nodes, "x:float32[2,6]", "y:float32[2,4] rows:float32[3,2,4]", weights)
    left_whole(artifact, "/loop (Loop)")


def test_nothing_to_cut():
    coupling = couple(control_flow())
    assert coupling.groups == coupling.left == []


# Shapes ---------------------------------------------------------------------------------------------------------------


def runs(old, new):
    found = matched(old, new)
    return None if found is None else list(found)


def test_axes_of_two_shapes_of_the_same_elements():
    batch, words = symbol("batch", 1), symbol("words", 0)
    assert runs((batch, words, 12), (batch, words, 4, 3)) == [([0], [0]), ([1], [1]), ([2], [2, 3])]
    assert runs((batch, words, 12), (batch * words, 12)) == [([0, 1], [0]), ([2], [1])]
    assert runs((batch, 1, 12, 1), (1, batch, 12)) == [([0], [1]), ([2], [2])]
    assert runs((6, 4), (4, 6)) == [([0, 1], [0, 1])]
    assert runs((batch, 4), (words, 4)) is None
    assert runs((), (1, 1)) == []


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_runs_hold_as_many_elements_and_leave_nothing_out(data):
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, symbol("n", 1), symbol("m", 0)]), max_size=6))

    def regrouped():
        cuts = [0, *sorted(data.draw(st.sets(st.integers(0, len(sizes))))), len(sizes)]
        parts = [sizes[a:b] for a, b in pairwise(cuts)]
        joined = []
        for part in parts:
            total = 1
            for size in part:
                total = size * total
            joined.append(total)
        return joined

    old, new = regrouped(), regrouped()
    found = runs(old, new)
    assert found is not None
    for side, shape in ((0, old), (1, new)):
        assert [axis for run in found for axis in run[side]] == [axis for axis, size in enumerate(shape) if size != 1]
