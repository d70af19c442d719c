"""`move-transposes`: what meets and vanishes, what is moved as a whole, and what nothing is gained by."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node, outputs, run_twice, weight

from perwatt.artifact import Artifact
from perwatt.drift import drift
from perwatt.passes._minimum_cut import Network
from perwatt.passes.move_transposes import MoveTransposes

LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
"""To channels last, and back to channels first."""


def moved(artifact, sizes=(3, 1)):
    after, changes = run_twice(MoveTransposes(), artifact)
    for items in sizes:
        batch = feed(artifact, items=items)
        assert not drift([outputs(artifact, batch)], [outputs(after, batch)], MoveTransposes.tolerance).reasons
    return after, changes


def left(artifact):
    assert run_twice(MoveTransposes(), artifact) == (artifact, [])


def transposes(artifact):
    return artifact.operator_counts().get("Transpose", 0)


def between(nodes, x="batch,3,4,5", y=None, weights=None, inner="", there=LAST, back=FIRST):
    """x, turned to a, `nodes` from a to b, turned back to y."""
    shape = x.split(",")
    turned = ",".join(shape[axis] for axis in there)
    y = y or x
    out = ",".join(y.split(",")[list(back).index(axis)] for axis in range(len(back)))
    nodes = [
        node("Transpose", "x", "a", perm=there),
        *nodes,
        node("Transpose", "b", "t", perm=back),
        node("Neg", "t", "y"),
    ]
    inner = f"a:float32[{turned}] b:float32[{out}] t:float32[{y}] {inner}"
    return build(nodes, f"x:float32[{x}]", f"y:float32[{y}]", weights, inner=inner)


def convnext_block(name, source, out):
    """A residual branch that computes with channels last."""
    return [
        node("Conv", f"{source} w", f"{name}c", pads=[1] * 4), node("Transpose", f"{name}c", f"{name}t", perm=LAST),
        node("LayerNormalization", f"{name}t g", f"{name}n"), node("MatMul", f"{name}n m", f"{name}m"),
        node("Transpose", f"{name}m", f"{name}b", perm=FIRST), node("Add", f"{source} {name}b", out),
    ]  # fmt: skip


def convnext(blocks=3, batch="batch"):
    """Blocks on a tensor that comes out of a normalization with channels last, and another one behind them."""
    nodes = [node("Transpose", "x", "x1", perm=LAST), node("LayerNormalization", "x1 g", "x2"),
             node("Transpose", "x2", "r0", perm=FIRST)]  # fmt: skip
    for i in range(blocks):
        nodes += convnext_block(f"b{i}", f"r{i}", f"r{i + 1}")
    nodes += [node("Transpose", f"r{blocks}", "l", perm=LAST), node("LayerNormalization", "l g", "y")]
    inner = f"x1:float32[{batch},5,5,4] x2:float32[{batch},5,5,4] " + " ".join(
        f"r{i}:float32[{batch},4,5,5]" for i in range(blocks + 1)
    )
    for i in range(blocks):
        first, last = f":float32[{batch},4,5,5]", f":float32[{batch},5,5,4]"
        inner += f" b{i}c{first} b{i}t{last} b{i}n{last} b{i}m{last} b{i}b{first}"
    weights = {"w": weight(4, 4, 3, 3), "g": 1 + weight(4), "m": weight(4, 4)}
    return build(nodes, f"x:float32[{batch},4,5,5]", f"y:float32[{batch},5,5,4]", weights, inner=inner)


def test_elementwise(golden_pass):
    nodes = [node("Mul", "a c", "m"), node("Relu", "m", "r"), node("Softmax", "r", "b", axis=-1)]
    inner = "m:float32[batch,4,5,3] r:float32[batch,4,5,3]"
    before = between(nodes, weights={"c": weight(5, 3)}, inner=inner)
    after, changes = moved(before)
    golden_pass("move_transposes", before, after, changes)
    assert transposes(after) == 0


CASES = {
    "unary": ([node("Gelu", "a", "b")], {}),
    "one number": ([node("Sub", "c a", "b")], {"c": np.float32(2)}),
    "one number with axes": ([node("Sub", "c a", "b")], {"c": np.ones((1, 1, 1), np.float32)}),
    "a vector": ([node("Div", "a c", "b")], {"c": 2 + weight(3)}),
    "a plane": ([node("Where", "k a c", "b")], {"k": weight(4, 1, 3) > 0, "c": weight(1, 5, 1)}),
    "a whole tensor": ([node("Max", "a c", "b")], {"c": weight(1, 4, 5, 3)}),
    "itself": ([node("Sigmoid", "a", "s"), node("Mul", "a s", "b")], {}),
    "softmax": ([node("Softmax", "a", "b", axis=1)], {}),
    "softmax over channels": ([node("LogSoftmax", "a", "b")], {}),
    "sum with axes as input": ([node("ReduceSum", "a i", "s"), node("Sub", "a s", "b")], {"i": np.int64([1, -1])}),
    "sum over everything": ([node("ReduceMax", "a", "s"), node("Sub", "a s", "b")], {}),
    "concat and split": ([node("Split", "a", "p q", axis=2, num_outputs=2), node("Concat", "q p", "b", axis=2)], {}),
    "concat with a weight": (
        [node("Concat", "a c", "p", axis=1), node("Slice", "p zero four one", "b")],
        {"c": weight(1, 2, 5, 3), "zero": np.int64([2]), "four": np.int64([6]), "one": np.int64([1])},
    ),
    "slice and pad": (
        [node("Slice", "a two far ax", "p"), node("Pad", "p pads", "b")],
        {"two": np.int64([2]), "far": np.int64([99]), "ax": np.int64([-2]), "pads": np.int64([0, 0, 1, 0, 0, 0, 1, 0])},
    ),
    "clip": ([node("Clip", "a low", "b")], {"low": np.float32(0)}),
    "quantization of channels": (
        [node("QuantizeLinear", "a s z", "q", axis=-1), node("DequantizeLinear", "q s z", "b", axis=3)],
        {"s": np.float32([0.1, 0.2, 0.3]), "z": np.int8([1, 2, 3])},
    ),
    "quantization": (
        [node("QuantizeLinear", "a s z", "q"), node("DequantizeLinear", "q s z", "b")],
        {"s": np.float32(0.1), "z": np.int8(0)},
    ),
    "cast": ([node("Cast", "a", "p", to=11), node("Cast", "p", "b", to=1)], {}),
    "prelu": ([node("PRelu", "a c", "b")], {"c": weight(3)}),
}  # fmt: skip


INNER = {
    "sum with axes as input": "s:float32[batch,1,5,1]",
    "sum over everything": "s:float32[1,1,1,1]",
    "concat and split": "p:float32[batch,4,3,3] q:float32[batch,4,2,3]",
    "concat with a weight": "p:float32[1,6,5,3]",
    "slice and pad": "p:float32[batch,4,3,3]",
    "quantization of channels": "q:int8[batch,4,5,3]",
    "quantization": "q:int8[batch,4,5,3]",
    "cast": "p:float64[batch,4,5,3]",
}


@pytest.mark.parametrize("case", CASES)
def test_everything_that_does_not_care(case):
    nodes, weights = CASES[case]
    inner = INNER.get(case, "s:float32[batch,4,5,3]" if "s" in nodes[0].output else "")
    after, _ = moved(between(nodes, "1,3,4,5" if "weight" in case else "batch,3,4,5", weights=weights, inner=inner))
    assert transposes(after) == 0


@pytest.mark.parametrize(("order", "nodes", "weights"), [
    ([0, 2, 1, 3], [node("LayerNormalization", "a g", "b")], {"g": 1 + weight(5)}),
    ([0, 2, 1, 3], [node("MatMul", "a g", "b")], {"g": weight(5, 5)}),
    ([0, 1, 3, 2], [node("InstanceNormalization", "a g h", "b")], {"g": 1 + weight(3), "h": weight(3)}),
])  # fmt: skip
def test_operators_whose_own_axes_stay(order, nodes, weights):
    after, _ = moved(between(nodes, weights=weights, there=order, back=order))
    assert transposes(after) == 0


@pytest.mark.parametrize(("nodes", "weights"), [
    ([node("LayerNormalization", "a g", "b")], {"g": 1 + weight(3)}),
    ([node("LayerNormalization", "a g", "b", axis=2)], {"g": 1 + weight(5, 3)}),
    ([node("MatMul", "a g", "b")], {"g": weight(3, 3)}),
    ([node("CumSum", "a g", "b")], {"g": np.int64(1)}),
])  # fmt: skip
def test_operators_whose_own_axes_would_move_stay(nodes, weights):
    left(between(nodes, weights=weights))


@pytest.mark.parametrize(
    ("axes", "vanishes"), [([1, 2], True), ([3], True), ([1], False), ([0, 1, 2], True), ([2], False)]
)
@pytest.mark.parametrize("arg", [False, True])
def test_reductions_that_take_the_moved_axes_away(axes, vanishes, arg):
    """Channels last: of [batch, 4, 5, 3] over axes 1 and 2 there is no order left to differ in."""
    if arg and len(axes) > 1:
        return
    out = [n for i, n in enumerate(["batch", "4", "5", "3"]) if i not in axes]
    nodes = [node("Transpose", "x", "a", perm=LAST)]
    nodes += (
        [node("ArgMax", "a", "b", axis=axes[0], keepdims=0)] if arg else [node("ReduceMean", "a i", "b", keepdims=0)]
    )
    kind = "int64" if arg else "float32"
    before = build([*nodes, node("Neg", "b", "y")], "x:float32[batch,3,4,5]", f"y:{kind}[{','.join(out)}]",
                   {} if arg else {"i": np.int64(axes)}, inner="a:float32[batch,4,5,3]")  # fmt: skip
    after, _ = moved(before)
    assert transposes(after) == (not vanishes)


def test_reductions_with_axes_as_attribute():
    nodes = [node("Transpose", "x", "a", perm=LAST), node("ReduceMean", "a", "y", axes=[1, 2], keepdims=0)]
    after, _ = moved(
        build(nodes, "x:float32[batch,3,4,5]", "y:float32[batch,3]", inner="a:float32[batch,4,5,3]", opset=17)
    )
    assert transposes(after) == 0


# Choices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_residual_branches_are_moved_as_a_whole(blocks):
    before = convnext(blocks)
    after, changes = moved(before, sizes=(2,))
    assert transposes(before) == 2 * blocks + 3 and transposes(after) == 2 * blocks + 1
    assert changes == [f"2 transposes saved by computing {blocks} other operators on axes in another order"]


def test_two_that_are_added_become_one():
    nodes = [node("Transpose", "x", "a", perm=LAST), node("Transpose", "z", "c", perm=LAST), node("Add", "a c", "s"),
             node("MatMul", "s m", "y")]  # fmt: skip
    inner = " ".join(f"{name}:float32[batch,4,5,3]" for name in "acs")
    before = build(
        nodes,
        "x:float32[batch,3,4,5] z:float32[batch,3,4,5]",
        "y:float32[batch,4,5,3]",
        {"m": weight(3, 3)},
        inner=inner,
    )
    after, _ = moved(before)
    assert transposes(after) == 1


def test_one_wanted_in_both_orders_stays():
    nodes = [node("Transpose", "x", "a", perm=LAST), node("Relu", "a", "r"), node("MatMul", "r m", "y"),
             node("Transpose", "r", "b", perm=FIRST), node("Conv", "b w", "z")]  # fmt: skip
    inner = "a:float32[batch,4,5,3] r:float32[batch,4,5,3] b:float32[batch,3,4,5]"
    before = build(nodes, "x:float32[batch,3,4,5]", "y:float32[batch,4,5,3] z:float32[batch,2,4,5]",
                   {"m": weight(3, 3), "w": weight(2, 3, 1, 1)}, inner=inner)  # fmt: skip
    after, _ = moved(before)
    assert transposes(after) == 1


def test_nothing_to_gain_changes_nothing():
    nodes = [
        node("Transpose", "x", "a", perm=LAST),
        node("Relu", "a", "r"),
        node("Tanh", "r", "s"),
        node("MatMul", "s m", "y"),
    ]
    inner = " ".join(f"{name}:float32[batch,4,5,3]" for name in "ars")
    left(build(nodes, "x:float32[batch,3,4,5]", "y:float32[batch,4,5,3]", {"m": weight(3, 3)}, inner=inner))


def test_among_equal_choices_the_fewest_change():
    """Abs has to move; Relu and the two behind Exp could as well, for nothing."""
    nodes = [
        node("Transpose", "x", "a", perm=LAST), node("Abs", "a", "p"), node("Transpose", "p", "p1", perm=FIRST),
        node("Relu", "a", "r"), node("MatMul", "r m", "y"), node("Transpose", "r", "r1", perm=FIRST),
        node("Exp", "a", "e"), node("Tanh", "e", "f"), node("MatMul", "f m", "z"),
        node("Conv", "p1 w", "u"), node("Conv", "r1 w", "v"),
    ]  # fmt: skip
    inner = (
        " ".join(f"{name}:float32[batch,4,5,3]" for name in "apref")
        + " p1:float32[batch,3,4,5] r1:float32[batch,3,4,5]"
    )
    outs = "y:float32[batch,4,5,3] z:float32[batch,4,5,3] u:float32[batch,2,4,5] v:float32[batch,2,4,5]"
    weights = {"m": weight(3, 3), "w": weight(2, 3, 1, 1)}
    after, changes = moved(build(nodes, "x:float32[batch,3,4,5]", outs, weights, inner=inner))
    assert transposes(after) == 2
    assert changes == ["1 transposes saved by computing 1 other operators on axes in another order"]


def test_operators_with_more_outputs_stay():
    nodes = [
        node("Transpose", "x", "a", perm=[0, 2, 1, 3]), node("LayerNormalization", "a g", "b mean"),
        node("Transpose", "b", "y", perm=[0, 2, 1, 3]), node("Exp", "mean", "z"),
    ]  # fmt: skip
    inner = "a:float32[batch,4,3,5] b:float32[batch,4,3,5] mean:float32[batch,4,3,1]"
    outs = "y:float32[batch,3,4,5] z:float32[batch,4,3,1]"
    left(build(nodes, "x:float32[batch,3,4,5]", outs, {"g": 1 + weight(5)}, inner=inner))


def test_the_same_twice_is_done_once():
    nodes = [node("Transpose", "x", "a", perm=[1, 0]), node("Transpose", "x", "b", perm=[1, 0]),
             node("MatMul", "a m", "y"), node("MatMul", "b n", "z")]  # fmt: skip
    before = build(nodes, "x:float32[batch,4]", "y:float32[4,5] z:float32[4,5]", {"m": weight(3, 5), "n": weight(3, 5)})
    after, changes = run_twice(MoveTransposes(), before)
    assert transposes(after) == 1 and changes == ["1 transposes saved"]


def test_a_tensor_added_to_its_own_transpose():
    nodes = [node("Transpose", "x", "a", perm=[0, 2, 1]), node("Add", "x a", "s"), node("Transpose", "s", "t", perm=[0, 2, 1]),
             node("Neg", "t", "y")]  # fmt: skip
    inner = " ".join(f"{name}:float32[batch,4,4]" for name in "ast")
    after, _ = moved(build(nodes, "x:float32[batch,4,4]", "y:float32[batch,4,4]", inner=inner))
    assert transposes(after) >= 1


def test_a_constant_that_others_use_stays_for_them():
    nodes = [node("Mul", "a c", "m"), node("Add", "m c", "b")]
    before = between(nodes, weights={"c": weight(5, 3)}, inner="m:float32[batch,4,5,3]")
    after, _ = moved(before)
    assert transposes(after) == 0


@pytest.mark.parametrize("z", ["5,3", "n"])
def test_operands_of_smaller_or_unknown_rank_stay(z):
    nodes = [node("Transpose", "x", "a", perm=LAST), node("Reshape", "w shape", "z"), node("Add", "a z", "b"),
             node("Transpose", "b", "y", perm=FIRST)]  # fmt: skip
    inner = "a:float32[batch,4,5,3] b:float32[batch,4,5,3]" + (" z:float32[5,3]" if z == "5,3" else "")
    inputs = "x:float32[batch,3,4,5] w:float32[15] shape:int64[n]"
    left(build(nodes, inputs, "y:float32[batch,3,4,5]", inner=inner))


def test_a_computed_number_is_no_obstacle():
    after, _ = moved(between([node("ReduceMax", "x", "k", keepdims=0), node("Mul", "a k", "b")], inner="k:float32[]"))
    assert transposes(after) == 0


def test_the_form_of_tensorflow():
    """Channels last, with a transpose around every convolution, a residual branch, an upsampled one and a mean."""
    nodes = [
        *tensorflow_conv("x", "w1", "c1"), node("Add", "c1 bias", "b1"), node("Clip", "b1 low high", "r1"),
        *tensorflow_conv("r1", "w2", "c2"), node("Add", "c2 r1", "s"), node("Mul", "s scale", "n"), node("Relu", "n", "r2"),
        node("Concat", "r1 r2", "k", axis=3), node("Pad", "k pads", "p"), *tensorflow_conv("p", "w3", "c3"),
        node("ReduceMean", "c3 plane", "m", keepdims=0), node("MatMul", "m w4", "y"),
    ]  # fmt: skip
    weights = {
        "w1": weight(4, 3, 3, 3), "w2": weight(4, 4, 3, 3), "w3": weight(2, 8, 3, 3), "w4": weight(2, 5), "bias": weight(4),
        "low": np.float32(0), "high": np.float32(6), "scale": weight(4, seed=1), "plane": np.int64([1, 2]),
        "pads": np.int64([0, 1, 0, 0, 0, 0, 1, 0]),
    }  # fmt: skip
    inner = " ".join(f"{name}:float32[batch,6,6,4]" for name in ("c1", "b1", "r1", "c2", "s", "n", "r2"))
    inner += " k:float32[batch,6,6,8] p:float32[batch,7,7,8] c3:float32[batch,7,7,2] m:float32[batch,2]"
    before = build(nodes, "x:float32[batch,6,6,3]", "y:float32[batch,5]", weights, inner=inner)
    after, _ = moved(before)
    assert transposes(before) == 6 and transposes(after) == 1


def tensorflow_conv(source, weights, out):
    """A convolution of a tensor with channels last, as its converters write it."""
    return [
        node("Transpose", source, f"{out}f", perm=FIRST), node("Conv", f"{out}f {weights}", f"{out}o", pads=[1] * 4),
        node("Transpose", f"{out}o", out, perm=LAST),
    ]  # fmt: skip


def test_a_long_net_is_quick():
    after, _ = run_twice(MoveTransposes(), convnext(60))
    assert transposes(after) == 121


# Outputs and subgraphs ------------------------------------------------------------------------------------------------


def test_outputs_keep_names_and_shapes():
    nodes = [node("Transpose", "x", "a", perm=LAST), node("Relu", "a", "r"), node("Transpose", "r", "y", perm=FIRST)]
    before = build(
        nodes, "x:float32[batch,3,4,5]", "y:float32[batch,3,4,5]", inner="a:float32[batch,4,5,3] r:float32[batch,4,5,3]"
    )
    after, _ = moved(before)
    assert after.operator_counts() == {"Relu": 1} and after.signature == before.signature


def test_an_output_that_is_an_input():
    nodes = [node("Transpose", "x", "a", perm=LAST), node("Transpose", "a", "y", perm=FIRST)]
    before = build(nodes, "x:float32[batch,3,4,5]", "y:float32[batch,3,4,5]", inner="a:float32[batch,4,5,3]")
    after, _ = moved(before)
    assert after.operator_counts() == {"Identity": 1} and after.signature == before.signature


def test_an_output_in_the_middle():
    nodes = [node("Relu", "a", "r"), node("Tanh", "r", "b")]
    made = between(nodes, inner="r:float32[batch,4,5,3]").edit()
    made.graph.outputs.append(next(v for n in made.graph for v in n.outputs if v.name == "r"))
    before = Artifact(model=made)
    after, _ = moved(before)
    assert transposes(after) == 1 and after.signature == before.signature


def test_what_a_subgraph_uses_stays():
    from models import value
    from onnx import helper

    branches = {
        name: helper.make_graph([node(kind, "r", "out")], name, [], [value("out:float32[batch,4,5,3]")])
        for name, kind in (("then_branch", "Neg"), ("else_branch", "Abs"))
    }
    nodes = [
        node("Transpose", "x", "a", perm=LAST), node("Relu", "a", "r"), node("Transpose", "r", "y", perm=FIRST),
        node("ReduceSum", "x", "k", keepdims=0), node("Greater", "k zero", "c"), node("If", "c", "z", **branches),
    ]  # fmt: skip
    inner = "a:float32[batch,4,5,3] r:float32[batch,4,5,3] k:float32[] c:bool[]"
    outs = "y:float32[batch,3,4,5] z:float32[batch,4,5,3]"
    left(build(nodes, "x:float32[batch,3,4,5]", outs, {"zero": np.float32(0)}, inner=inner))


# Random graphs --------------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_random_graphs_never_get_more(data):
    """Element-wise operators, transposes and products that want their layout, on one tensor with equal axes."""
    made, nodes = ["x"], []
    for i in range(data.draw(st.integers(2, 12))):
        kind = data.draw(
            st.sampled_from(["Transpose", "Transpose", "Tanh", "Add", "Mul c", "Softmax", "MatMul", "Split"])
        )
        source = data.draw(st.sampled_from(made[-3:]))
        out = f"v{i}"
        if kind == "Transpose":
            nodes.append(node(kind, source, out, perm=data.draw(st.permutations(range(3)))))
        elif kind == "Split":
            nodes.append(node("Split", source, f"{out}a {out}b", axis=data.draw(st.integers(0, 2)), num_outputs=2))
            nodes.append(node("Concat", f"{out}b {out}a", out, axis=nodes[-1].attribute[0].i))
        else:
            other = {"Add": data.draw(st.sampled_from(made)), "Mul c": "c", "MatMul": "m"}.get(kind, "")
            more = {"axis": data.draw(st.integers(-3, 2))} if kind == "Softmax" else {}
            nodes.append(node(kind.split()[0], f"{source} {other}", out, **more))
        made.append(out)
    ends = data.draw(st.sets(st.sampled_from(made[1:]), max_size=2)) | {made[-1]}
    inner = " ".join(f"{n}:float32[4,4,4]" for n in made[1:] if n not in ends)
    inner += "".join(
        f" {n}:float32[{','.join('2' if axis == each.attribute[0].i else '4' for axis in range(3))}]"
        for each in nodes if each.op_type == "Split" for n in each.output
    )  # fmt: skip
    outs = " ".join(f"{n}:float32[4,4,4]" for n in sorted(ends))
    weights = {"c": weight(4, 1, 4), "m": weight(4, 4)}
    before = build(
        nodes,
        "x:float32[4,4,4]",
        outs,
        {n: w for n, w in weights.items() if any(n in e.input for e in nodes)},
        inner=inner,
    )
    after, changes = moved(before, sizes=(1,))
    assert transposes(after) < transposes(before) if changes else after is before
    assert after.signature == before.signature


@given(data=st.data())
def test_a_minimum_cut_is_the_cheapest_of_all(data):
    names = ["s", *"abcd", "t"]
    pairs = data.draw(
        st.lists(st.tuples(st.sampled_from(names), st.sampled_from(names), st.integers(1, 5)), max_size=14)
    )
    network = Network()
    network.edge("s", "t", 0)
    for start, end, capacity in pairs:
        network.edge(start, end, capacity)

    def cost(side):
        return sum(capacity for start, end, capacity in pairs if start in side and end not in side)

    least = min(cost({"s", *inner}) for count in range(5) for inner in itertools.combinations("abcd", count))
    total, side = network.cut("s", "t")
    assert total == least == cost(side)


def test_a_cut_takes_back_what_it_sent_the_shortest_way():
    """s-a-b-t is the shortest, and blocks both of the two others that together carry more."""
    network = Network()
    for pair in ("sa", "ab", "bt", "sx", "xy", "yb", "az", "zw", "wt"):
        network.edge(pair[0], pair[1], 1)
    assert network.cut("s", "t")[0] == 2
