"""`cancel-transposes`: compositions, identities, weights, and axes of length 1."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node, outputs, run_twice, weight

from perwatt.drift import drift
from perwatt.passes.cancel_transposes import CancelTransposes


def cancelled(artifact, sizes=(3, 1)):
    after, changes = run_twice(CancelTransposes(), artifact)
    for items in sizes:
        batch = feed(artifact, items=items)
        assert not drift([outputs(artifact, batch)], [outputs(after, batch)], CancelTransposes.tolerance).reasons
    return after, changes


def left(artifact, *notes):
    after, changes = run_twice(CancelTransposes(), artifact)
    assert after is artifact and changes == list(notes)


def net(nodes, x, y, weights=None, inner=""):
    """`nodes` from a to b."""
    nodes = [node("Sin", "x", "a"), *nodes, node("Neg", "b", "y")]
    return build(nodes, f"x:float32[{x}]", f"y:float32[{y}]", weights, inner=f"a:float32[{x}] {inner}")


def kinds(artifact):
    return {kind: n for kind, n in artifact.operator_counts().items() if kind not in ("Sin", "Neg")}


def permutation(artifact):
    (found,) = [n for n in artifact.model.graph if n.op_type == "Transpose"]
    return list(found.attributes["perm"].as_ints())


def test_keys_of_an_attention(golden_pass):
    nodes = [
        node("Transpose", "x", "t", perm=[0, 2, 1, 3], name="/heads"), node("Transpose", "t", "k", perm=[0, 1, 3, 2]),
        node("Transpose", "w", "v", perm=[1, 0]), node("MatMul", "k v", "m"), node("Transpose", "m", "i", perm=[0, 1, 2, 3]),
        node("Transpose", "x", "u", perm=[0, 2, 3, 1]), node("Transpose", "u", "back", perm=[0, 3, 1, 2]),
        node("Neg", "i", "y"), node("Flatten", "back", "z"),
    ]  # fmt: skip
    before = build(nodes, "x:float32[batch,3,6,4]", "y:float32[batch,6,4,5] z:float32[batch,72]", {"w": weight(5, 3)})
    after, changes = cancelled(before)
    golden_pass("cancel_transposes", before, after, changes)
    assert after.operator_counts() == {"Transpose": 1, "MatMul": 1, "Neg": 1, "Flatten": 1}


@given(data=st.data())
def test_any_number_in_a_row(data):
    rank = data.draw(st.integers(1, 5))
    orders = data.draw(st.lists(st.permutations(range(rank)), min_size=1, max_size=4))
    whole = list(range(rank))
    for order in orders:
        whole = [whole[axis] for axis in order]
    nodes = [node("Transpose", "a" if i == 0 else f"t{i - 1}", f"t{i}", perm=order) for i, order in enumerate(orders)]
    nodes[-1].output[0] = "b"
    shape = ["batch", "2", "3", "4", "5"][:rank]
    before = net(nodes, ",".join(shape), ",".join(shape[axis] for axis in whole))
    after, _ = cancelled(before, sizes=(2,))
    assert kinds(after) == ({} if whole == sorted(whole) else {"Transpose": 1})
    if kinds(after):
        assert permutation(after) == whole


def test_without_a_permutation_all_axes_turn_round():
    nodes = [node("Transpose", "a", "t", perm=[1, 0, 2]), node("Transpose", "t", "b")]
    after, _ = cancelled(net(nodes, "batch,2,3", "3,batch,2"))
    assert permutation(after) == [2, 0, 1]
    nodes = [node("Transpose", "a", "t"), node("Transpose", "t", "b")]
    after, _ = cancelled(net(nodes, "batch,2,3", "batch,2,3"))
    assert kinds(after) == {}


def test_one_of_unknown_rank_stays():
    nodes = [
        node("Reshape", "x shape", "a"),
        node("Transpose", "a", "t"),
        node("Transpose", "t", "b"),
        node("Neg", "b", "y"),
    ]
    left(
        build(nodes, "x:float32[batch,6] shape:int64[2]", "y:float32[p,q]"),
        "1 left: the rank of what it transposes isn't known",
    )


def test_a_first_one_that_others_use_stays_for_them():
    nodes = [
        node("Transpose", "x", "t", perm=[0, 2, 1]),
        node("Transpose", "t", "b", perm=[2, 1, 0]),
        node("Neg", "b", "y"),
    ]
    before = build([*nodes, node("Exp", "t", "z")], "x:float32[batch,2,3]", "y:float32[2,3,batch] z:float32[batch,3,2]")
    after, _ = cancelled(before)
    assert after.operator_counts()["Transpose"] == 2
    assert all(n.inputs[0].name == "x" for n in after.model.graph if n.op_type == "Transpose")


def test_one_that_moves_something_stays():
    left(net([node("Transpose", "a", "b", perm=[0, 2, 1])], "batch,2,3", "batch,3,2"))


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@given(order=st.permutations(range(3)))
def test_weights_are_transposed_now(order, dtype):
    array = (weight(2, 3, 4, scale=9)).astype(dtype)
    nodes = [node("Transpose", "w", "t", perm=order), node("Gather", "t i", "b"), node("Abs", "b", "y")]
    shape = [array.shape[axis] for axis in order]
    before = build(nodes, "i:int64[batch]", f"y:{dtype}[batch,{shape[1]},{shape[2]}]", {"w": array})
    after, _ = run_twice(CancelTransposes(), before)
    batch = {"i": np.int64([0, shape[0] - 1])}
    np.testing.assert_array_equal(outputs(before, batch)["y"], outputs(after, batch)["y"])
    assert after.operator_counts() == {"Gather": 1, "Abs": 1}


def test_a_large_weight_too():
    nodes = [node("Transpose", "w", "t"), node("MatMul", "a t", "b")]
    before = net(nodes, "batch,128", "batch,200", {"w": weight(200, 128)})
    after, _ = cancelled(before)
    assert kinds(after) == {"MatMul": 1} and after.size_bytes() == before.size_bytes()


def test_a_weight_that_others_use_stays():
    nodes = [node("Gather", "w i", "e"), node("Transpose", "w", "t"), node("MatMul", "e t", "y")]
    before = build(nodes, "i:int64[batch]", "y:float32[batch,9]", {"w": weight(9, 4)})
    left(before, "1 left: its weight is used elsewhere too, and a second copy would make the model larger")


def test_a_weight_that_can_be_fed_stays():
    nodes = [node("Transpose", "w", "t"), node("MatMul", "x t", "y")]
    left(build(nodes, "x:float32[batch,4] w:float32[9,4]", "y:float32[batch,9]", {"w": weight(9, 4)}))


# Axes of length 1 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [True, False])
def test_axes_of_length_one_beside_a_reshape(behind):
    if behind:
        nodes = [node("Transpose", "a", "t", perm=[0, 2, 3, 1]), node("Flatten", "t", "b")]
        before = net(nodes, "batch,6,1,1", "batch,6", inner="t:float32[batch,1,1,6]")
    else:
        nodes = [node("Unsqueeze", "a ax", "t"), node("Transpose", "t", "b", perm=[0, 2, 1])]
        before = net(nodes, "batch,6", "batch,6,1", {"ax": np.int64([1])}, inner="t:float32[batch,1,6]")
    after, _ = cancelled(before)
    assert kinds(after) == {"Reshape": 1, "Flatten" if behind else "Unsqueeze": 1}


@pytest.mark.parametrize(("x", "y"), [("batch,6,1,1", "batch,1,1,6"), ("batch,6,2,1", "batch,2,1,6")])
def test_elsewhere_and_of_other_lengths_it_stays(x, y):
    nodes = [node("Transpose", "a", "b", perm=[0, 2, 3, 1])]
    left(net(nodes, x, y))
    flat = [*nodes, node("Flatten", "b", "c"), node("Relu", "c", "d")]
    if ",2," in x:
        flat[-1].output[0] = "y"
        left(
            build(
                [node("Sin", "x", "a"), *flat],
                f"x:float32[{x}]",
                "y:float32[batch,12]",
                inner=f"a:float32[{x}] b:float32[{y}]",
            )
        )


def test_two_open_axes_stay():
    nodes = [node("Transpose", "a", "t", perm=[1, 2, 0]), node("Flatten", "t", "b", axis=2)]
    before = net(nodes, "1,p,q", "pq,1", inner="t:float32[p,q,1]")
    left(before, "1 left: more than one axis of what it transposes has no known length")
