"""`cancel-reshapes`: several in a row, around element-wise operators, and copies of everything."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node, outputs, run_twice, weight

from perwatt.drift import drift
from perwatt.passes.cancel_reshapes import CancelReshapes

NOT_ONE = "1 left: the shape that two in a row would have as one is computed, or has more than one open axis"


def cancelled(artifact, sizes=(3, 1, 4)):
    """The result, which gives the same for several sizes of the batch."""
    after, changes = run_twice(CancelReshapes(), artifact)
    for items in sizes:
        batch = feed(artifact, items=items)
        assert not drift([outputs(artifact, batch)], [outputs(after, batch)], CancelReshapes.tolerance).reasons
    return after, changes


def left(artifact, *notes):
    after, changes = run_twice(CancelReshapes(), artifact)
    assert after is artifact and changes == list(notes)


def between(nodes, weights, x, y, inner=""):
    """`nodes` from a to b, a Sin before and a Neg after, so that neither is an input or an output."""
    nodes = [node("Sin", "x", "a"), *nodes, node("Neg", "b", "y")]
    return build(nodes, f"x:float32[{x}]", f"y:float32[{y}]", weights, inner=f"a:float32[{x}] b:float32[{y}] {inner}")


def kinds(artifact):
    return {kind: n for kind, n in artifact.operator_counts().items() if kind not in ("Sin", "Neg")}


def target(artifact):
    (reshape,) = [n for n in artifact.model.graph if n.op_type == "Reshape"]
    return reshape.inputs[1].const_value.numpy().tolist()


def test_a_bit_of_everything(golden_pass):
    nodes = [
        node("Reshape", "x flat", "f"), node("Relu", "f", "r"), node("Add", "r bias", "s"),
        node("Reshape", "s whole", "w", name="/back"), node("Unsqueeze", "w one", "u1"), node("Unsqueeze", "u1 two", "u2"),
        node("Slice", "u2 zero far one", "all"), node("Concat", "all", "c", axis=0), node("Squeeze", "c ones", "q"),
        node("Flatten", "q", "y"),
    ]  # fmt: skip
    weights = {
        "flat": np.int64([-1, 8]), "bias": weight(8), "whole": np.int64([-1, 4, 8]), "one": np.int64([1]),
        "two": np.int64([2]), "zero": np.int64([0]), "far": np.int64([2**63 - 1]), "ones": np.int64([1, 2]),
    }  # fmt: skip
    inner = "f:float32[rows,8] r:float32[rows,8] s:float32[rows,8] w:float32[batch,4,8]"
    before = build(nodes, "x:float32[batch,4,8]", "y:float32[batch,32]", weights, inner=inner)
    after, changes = cancelled(before)
    golden_pass("cancel_reshapes", before, after, changes)
    assert after.operator_counts() == {"Relu": 1, "Add": 1, "Reshape": 1}


@given(data=st.data())
def test_chains_of_reshapes_become_one_or_none(data):
    """Random factorizations of the same number of elements, in a row, written with a number, -1 or 0."""
    factors = data.draw(st.permutations([2, 2, 3, 5]))
    shapes = []
    for _ in range(data.draw(st.integers(2, 4))):
        cuts = sorted(data.draw(st.sets(st.sampled_from([1, 2, 3]))))
        shapes.append([int(np.prod(part)) for part in np.split(np.array(factors), cuts)])
    nodes, weights, value, x = [], {}, "a", f"batch,{','.join(map(str, shapes[0]))}"
    for position, shape in enumerate(shapes[1:]):
        out = "b" if position == len(shapes) - 2 else f"v{position}"
        style = data.draw(st.sampled_from(["-1", "0"]))
        weights[f"s{position}"] = np.int64([-1 if style == "-1" else 0, *shape])
        nodes.append(node("Reshape", f"{value} s{position}", out))
        value = out
    y = f"batch,{','.join(map(str, shapes[-1]))}"
    after, _ = cancelled(between(nodes, weights, x, y), sizes=(2,))
    assert kinds(after) == ({} if shapes[0] == shapes[-1] else {"Reshape": 1})


@pytest.mark.parametrize(("kind", "first", "second", "x", "y", "both"), [
    ("Unsqueeze", [1], [2], "batch,5", "batch,1,1,5", [1, 2]),
    ("Unsqueeze", [2], [0], "batch,5", "1,batch,5,1", [0, 3]),
    ("Unsqueeze", [-1], [1, -1], "batch,5", "batch,1,5,1,1", [1, 3, 4]),
    ("Squeeze", [1], [1], "batch,1,1,5", "batch,5", [1, 2]),
    ("Squeeze", [3], [0], "1,batch,5,1", "batch,5", [0, 3]),
    ("Squeeze", [-1], [1, -1], "batch,1,5,1,1", "batch,5", [1, 3, 4]),
])  # fmt: skip
def test_axes_of_two_become_axes_of_one(kind, first, second, x, y, both):
    weights = {"first": np.int64(first), "second": np.int64(second)}
    after, _ = cancelled(between([node(kind, "a first", "m"), node(kind, "m second", "b")], weights, x, y))
    assert kinds(after) == {kind: 1}
    (made,) = [n for n in after.model.graph if n.op_type == kind]
    assert made.inputs[1].const_value.numpy().tolist() == both


@pytest.mark.parametrize("kind", ["Unsqueeze", "Squeeze"])
def test_axes_from_the_front_need_no_rank(kind):
    nodes = [node("Reshape", "x shape", "a"), node(kind, "a two", "m"), node(kind, "m one", "b"), node("Neg", "b", "y")]
    weights = {"one": np.int64([1]), "two": np.int64([2])}
    before = build(
        nodes, "x:float32[batch,6] shape:int64[n]", f"y:float32[{'p,q' if kind == 'Squeeze' else 'p,a,b,q'}]", weights
    )
    after, _ = run_twice(CancelReshapes(), before)
    batch = {"x": np.ones((2, 6), np.float32), "shape": np.int64([3, 1, 1, 4] if kind == "Squeeze" else [3, 4])}
    np.testing.assert_array_equal(outputs(before, batch)["y"], outputs(after, batch)["y"])
    assert after.operator_counts()[kind] == 1


@pytest.mark.parametrize("kinds_", [("Squeeze", "Unsqueeze"), ("Unsqueeze", "Squeeze")])
def test_there_and_back_needs_no_shape(kinds_):
    nodes = [
        node("Reshape", "x shape", "a"),
        node(kinds_[0], "a axis", "m"),
        node(kinds_[1], "m axis", "b"),
        node("Neg", "b", "y"),
    ]
    before = build(nodes, "x:float32[batch,6] shape:int64[n]", "y:float32[p,q,r]", {"axis": np.int64([1])})
    after, _ = run_twice(CancelReshapes(), before)
    assert after.operator_counts() == {"Reshape": 1, "Neg": 1}


def test_mixed_kinds_become_a_reshape():
    nodes = [node("Flatten", "a", "m"), node("Unsqueeze", "m one", "b")]
    after, _ = cancelled(between(nodes, {"one": np.int64([1])}, "batch,2,3", "batch,1,6", "m:float32[batch,6]"))
    assert kinds(after) == {"Reshape": 1} and target(after) == [-1, 1, 6]


def test_two_open_axes_are_written_where_one_stays():
    nodes = [node("Unsqueeze", "a one", "m"), node("Flatten", "m", "b", axis=3)]
    before = between(nodes, {"one": np.int64([1])}, "batch,words,6", "rows,6", "m:float32[batch,1,words,6]")
    after, _ = cancelled(before)
    assert target(after) == [-1, 6]
    nodes = [node("Flatten", "a", "m"), node("Reshape", "m shape", "b")]
    before = between(nodes, {"shape": np.int64([0, -1, 2])}, "batch,words,6", "batch,many,2", "m:float32[batch,all]")
    after, _ = cancelled(before)
    assert target(after) == [0, -1, 2]


def test_two_open_axes_that_both_move_stay():
    nodes = [node("Squeeze", "a zero", "m"), node("Unsqueeze", "m two", "b")]
    weights = {"zero": np.int64([0]), "two": np.int64([2])}
    left(between(nodes, weights, "1,p,q", "p,q,1", "m:float32[p,q]"), NOT_ONE)


def test_a_copied_axis_means_the_first_one():
    """0 stands for the axis of what comes in: another one, once the first reshape is gone."""
    nodes = [node("Reshape", "a first", "m"), node("Reshape", "m second", "b")]
    weights = {"first": np.int64([0, 2, 6]), "second": np.int64([0, 0, 3, -1])}
    after, _ = cancelled(between(nodes, weights, "batch,12", "batch,2,3,2"))
    assert target(after) == [-1, 2, 3, 2]


def test_computed_shapes():
    """With `allowzero` a computed shape says all; without it a 0 may copy an axis."""
    nodes = [node("Flatten", "x", "m"), node("Reshape", "m shape", "b", allowzero=1), node("Neg", "b", "y")]
    before = build(nodes, "x:float32[batch,2,3] shape:int64[2]", "y:float32[p,q]")
    after, _ = run_twice(CancelReshapes(), before)
    assert after.operator_counts() == {"Reshape": 1, "Neg": 1}
    nodes[1] = node("Reshape", "m shape", "b")
    left(build(nodes, "x:float32[batch,2,3] shape:int64[2]", "y:float32[p,q]"), NOT_ONE)


def test_one_that_others_use_stays():
    nodes = [node("Unsqueeze", "x one", "m"), node("Flatten", "m", "y"), node("Sin", "m", "z")]
    weights = {"one": np.int64([1])}
    before = build(nodes, "x:float32[batch,2,3]", "y:float32[batch,6] z:float32[batch,1,2,3]", weights)
    left(before)


def test_identities_by_symbol_and_by_number_of_elements():
    nodes = [node("Reshape", "a shape", "b")]
    after, _ = cancelled(between(nodes, {"shape": np.int64([-1, 8])}, "batch,8", "batch,8"))
    assert kinds(after) == {}
    before = build([node("Sin", "x", "a"), node("Reshape", "a shape", "b"), node("Neg", "b", "y")], "x:float32[batch,8]",
                   "y:float32[p,8]", {"shape": np.int64([-1, 8])}, inner="a:float32[batch,8]")  # fmt: skip
    assert kinds(cancelled(before)[0]) == {}
    assert kinds(cancelled(between([node("Flatten", "a", "b")], {}, "batch,8", "batch,8"))[0]) == {}


@pytest.mark.parametrize(("x", "shape", "y"), [("batch,8", [-1, 4], "rows,4"), ("4,batch", [-1, 4], "batch,4")])
def test_reshapes_that_do_something_stay(x, shape, y):
    left(between([node("Reshape", "a shape", "b")], {"shape": np.int64(shape)}, x, y))


# Around element-wise operators ----------------------------------------------------------------------------------------


def enclosed(nodes, weights, inside="rows,8", outside="batch,4,8", extra=""):
    """x, `nodes` from r to s between a reshape to `inside` and one back, y."""
    nodes = [node("Sin", "x", "a"), node("Reshape", "a there", "r"), *nodes, node("Reshape", "s back", "b"),
             node("Neg", "b", "y")]  # fmt: skip
    shapes = [np.int64([n if n.isdigit() else -1 for n in shape.split(",")]) for shape in (inside, outside)]
    inner = f"a:float32[{outside}] r:float32[{inside}] s:float32[{inside}] b:float32[{outside}]"
    weights = {**weights, "there": shapes[0].astype(np.int64), "back": shapes[1].astype(np.int64)}
    return build(nodes, f"x:float32[{outside}]{extra}", f"y:float32[{outside}]", weights, inner=inner)


@pytest.mark.parametrize("c", [np.float32(3), weight(8), weight(1, 8), weight(1, 1)])
@pytest.mark.parametrize("kind", ["Mul", "Sub", "Max"])
def test_around_elementwise_operators(c, kind):
    after, _ = cancelled(enclosed([node(kind, "c r", "m"), node("Clip", "m low", "s")], {"c": c, "low": np.float32(0)}))
    assert kinds(after) == {kind: 1, "Clip": 1}


def test_a_value_used_twice_inside():
    after, _ = cancelled(enclosed([node("Sigmoid", "r", "m"), node("Mul", "r m", "s")], {}))
    assert kinds(after) == {"Sigmoid": 1, "Mul": 1}


def test_two_reshaped_operands():
    nodes = [node("Reshape", "z there", "q"), node("Add", "r q", "s")]
    after, _ = cancelled(enclosed(nodes, {}, extra=" z:float32[batch,4,8]"))
    assert kinds(after) == {"Add": 1}


def test_two_operands_with_open_axes_stay():
    """One of them might be stretched by the other."""
    nodes = [node("Reshape", "x there", "r"), node("Reshape", "z there", "q"), node("Add", "r q", "s"),
             node("Reshape", "s back", "y")]  # fmt: skip
    weights = {"there": np.int64([-1, 8]), "back": np.int64([-1, 4, 8])}
    inner = "r:float32[rows,8] q:float32[rows,8] s:float32[rows,8]"
    inputs = "x:float32[batch,?,8] z:float32[batch,?,8]"
    left(build(nodes, inputs, "y:float32[batch,4,8]", weights, inner=inner))
    one = [nodes[0], node("Relu", "r", "s"), nodes[3]]
    after, _ = run_twice(
        CancelReshapes(), build(one, "x:float32[batch,?,8]", "y:float32[batch,4,8]", weights, inner=inner)
    )
    assert after.operator_counts() == {"Relu": 1}


def test_a_constant_of_more_axes_than_outside():
    after, _ = cancelled(enclosed([node("Add", "r c", "s")], {"c": weight(1, 1, 8)}, "1,4,8", "4,8"))
    assert kinds(after) == {"Add": 1}


@pytest.mark.parametrize("nodes", [
    [node("Add", "r c", "s")],
    [node("Softmax", "r", "s", axis=0)],
    [node("Add", "r z", "s")],
])  # fmt: skip
def test_what_looks_at_the_shape_stays(nodes):
    """A bias along an axis that was split, a Softmax, and an operand that comes in the shape inside."""
    before = enclosed(nodes, {"c": weight(16)}, "batch,2,16", "batch,4,8", extra=" z:float32[batch,2,16]")
    left(before)


def test_another_shape_behind_stays():
    nodes = [node("Reshape", "x there", "r"), node("Relu", "r", "s"), node("Reshape", "s back", "y")]
    weights = {"there": np.int64([-1, 8]), "back": np.int64([-1, 2, 16])}
    left(build(nodes, "x:float32[batch,4,8]", "y:float32[batch,2,16]", weights, inner="s:float32[rows,8]"))


def test_a_value_inside_used_elsewhere_stays():
    nodes = [
        node("Relu", "r", "m"),
        node("Exp", "m", "s"),
        node("ReduceSum", "m", "n", keepdims=0),
        node("Add", "b n", "t"),
    ]
    before = enclosed(nodes[:3], {})
    model = before.edit()
    model.graph.outputs.append(next(v for n in model.graph for v in n.outputs if v.name == "n"))
    from perwatt.artifact import Artifact

    left(Artifact(model=model), "1 left: a value inside it is used elsewhere too")


# Copies ---------------------------------------------------------------------------------------------------------------

INTS = {"zero": [0], "one": [1], "far": [2**63 - 1], "five": [5], "six": [6], "zeros": [0] * 4, "ones": [1, 1],
        "wide": [1, 5], "four": [4], "pad": [0, 0, 0, 1], "double": [1, 2], "three": [3, 1, 1],
        "origin": [0, 0], "ends": [2**31 - 1, 5]}  # fmt: skip
NOTHINGS = [
    ("Expand", "ones", {}), ("Expand", "wide", {}), ("Expand", "five", {}), ("Slice", "zero far one", {}),
    ("Slice", "zero five one one", {}), ("Slice", "origin ends", {}), ("Tile", "ones", {}), ("Pad", "zeros", {}),
    ("Concat", "", {"axis": 1}), ("Dropout", "", {}), ("Split", "five", {"axis": 1}), ("Slice", "zero six one", {}),
]  # fmt: skip
SOMETHINGS = [
    ("Slice", "zero four one", {}, "batch,4"), ("Slice", "one far one", {}, "batch,4"), ("Tile", "double", {}, "batch,10"),
    ("Pad", "pad", {}, "batch,6"), ("Expand", "three", {}, "3,batch,5"),
]  # fmt: skip


def copied(kind, extra, attributes, y="batch,5"):
    weights = {name: np.int64(INTS[name]) for name in extra.split()}
    nodes = [node("Sin", "x", "a"), node(kind, f"a {extra}", "b", **attributes), node("Neg", "b", "y")]
    return build(nodes, "x:float32[batch,5]", f"y:float32[{y}]", weights, inner="a:float32[batch,5]")


@pytest.mark.parametrize(("kind", "extra", "attributes"), NOTHINGS)
def test_copies_of_everything_go(kind, extra, attributes):
    after, _ = cancelled(copied(kind, extra, attributes))
    assert kinds(after) == {}


@pytest.mark.parametrize(("kind", "extra", "attributes", "y"), SOMETHINGS)
def test_copies_of_something_else_stay(kind, extra, attributes, y):
    left(copied(kind, extra, attributes, y))


def test_an_expand_to_the_shape_that_is_there():
    nodes = [node("Expand", "a shape", "b"), node("Neg", "b", "y"), node("Sin", "x", "a")]
    nodes = [nodes[2], *nodes[:2]]
    inner = "a:float32[batch,5] b:float32[batch,5]"
    before = build(nodes, "x:float32[batch,5] shape:int64[2]", "y:float32[batch,5]", inner=inner)
    after, _ = run_twice(CancelReshapes(), before)
    assert kinds(after) == {}


def test_a_dropout_in_training_stays():
    nodes = [node("Sin", "x", "a"), node("Dropout", "a ratio on", "b"), node("Neg", "b", "y")]
    weights = {"ratio": np.float32(0.5), "on": np.array(True)}
    left(build(nodes, "x:float32[batch,5]", "y:float32[batch,5]", weights))


def test_a_dropout_whose_mask_is_used_stays():
    nodes = [node("Sin", "x", "a"), node("Dropout", "a", "b m"), node("Neg", "b", "y"), node("Not", "m", "z")]
    left(
        build(nodes, "x:float32[batch,5]", "y:float32[batch,5] z:bool[batch,5]"),
        "1 left: a value inside it is used elsewhere too",
    )
