"""`common-subexpression`: equal things are computed once, and nothing that only looks equal is merged."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
from hypothesis import given
from hypothesis import strategies as st
from models import build, control_flow, feed, node, outputs, run_twice, shared_weights, weight

from perwatt.artifact import Step
from perwatt.passes.common_subexpression import CommonSubexpression
from perwatt.passes.remove_dead import RemoveDead


def merged(artifact):
    """The result, with equal outputs under equal names."""
    after, changes = run_twice(CommonSubexpression(), artifact)
    batch = feed(artifact)
    old, new = outputs(artifact, batch), outputs(after, batch)
    assert list(old) == list(new)
    assert all(np.array_equal(old[name], new[name]) for name in old)
    return after, changes


def test_equal_nodes_and_equal_weights_become_one(golden_pass):
    nodes = [
        node("Mul", "x w1", "a"), node("Mul", "x w2", "b"), node("Relu", "a", "ra"), node("Relu", "b", "rb"),
        node("Add", "ra rb", "y"),
    ]  # fmt: skip
    before = build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", {"w1": weight(4), "w2": weight(4)})
    after, changes = merged(before)
    golden_pass("common_subexpression", before, after, changes)
    assert after.operator_counts() == {"Mul": 1, "Relu": 1, "Add": 1}
    assert after.size_bytes() == before.size_bytes() // 2


def test_other_attributes_shapes_or_types_are_not_equal():
    nodes = [
        node("Softmax", "x", "a", axis=0), node("Softmax", "x", "b", axis=1), node("Add", "a b", "c"),
        node("Reshape", "c s1", "d"), node("Reshape", "d s2", "y"),
    ]  # fmt: skip
    weights = {"s1": np.int64([0, 2, 2]), "s2": np.int64([0, 4])}
    before = build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", weights)
    assert merged(before)[0] is before


def test_random_numbers_are_drawn_as_often_as_before():
    nodes = [node("RandomNormalLike", "x", "a"), node("RandomNormalLike", "x", "b"), node("Sub", "a b", "y")]
    before = build(nodes, "x:float32[batch,4]", "y:float32[batch,4]")
    assert run_twice(CommonSubexpression(), before)[0] is before


def test_two_equal_outputs_keep_both_names_and_survive_the_pass_that_follows():
    nodes = [node("Relu", "x", "a"), node("Relu", "x", "b")]
    before = build(nodes, "x:float32[batch,4]", "a:float32[batch,4] b:float32[batch,4]")
    after, _ = merged(before)
    assert after.operator_counts() == {"Relu": 1, "Identity": 1}
    assert run_twice(RemoveDead(), after)[0] is after


def test_three_equal_outputs_copy_one_value_however_often_it_runs():
    nodes = [node("Relu", "x", name) for name in "abc"]
    after, _ = merged(build(nodes, "x:float32[batch,4]", " ".join(f"{name}:float32[batch,4]" for name in "abc")))
    assert after.operator_counts() == {"Identity": 2, "Relu": 1}


def test_weights_in_any_layout_and_in_bfloat16_are_compared():
    nodes = [node("Mul", "x w1", "a"), node("Add", "a w2", "b"), node("Cast", "h1", "f1", to=1),
             node("Cast", "h2", "f2", to=1), node("Add", "b f1", "c"), node("Add", "c f2", "y")]  # fmt: skip
    halves = weight(4, 4).astype(ml_dtypes.bfloat16)
    weights = {"w1": weight(4, 4), "w2": weight(4, 4), "h1": halves, "h2": halves}
    before = build(nodes, "x:float32[batch,4,4]", "y:float32[batch,4,4]", weights)
    model = before.edit()
    for name in ("w1", "w2"):
        model.graph.initializers[name].const_value = ir.Tensor(weight(4, 4).T, name=name)
    after, changes = run_twice(CommonSubexpression(), before.after(model, Step("transposed")))
    assert changes[0] == "2 duplicate weights merged"
    assert after.operator_counts()["Cast"] == 1


def test_what_is_shared_already_is_left():
    before = shared_weights()
    assert merged(before)[0] is before


def test_control_flow_is_left():
    before = control_flow()
    assert merged(before)[0] is before


@given(
    st.lists(st.tuples(st.sampled_from(["Add", "Mul"]), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=10)
)
def test_outputs_stay_on_random_graphs(steps):
    names, nodes = ["x", "w", "v"], []
    for operator, first, second in steps:
        name = f"n{len(nodes)}"
        nodes.append(node(operator, f"{names[first % len(names)]} {names[second % len(names)]}", name))
        names.append(name)
    nodes.append(node("Add", f"x {names[-1]}", "y"))
    merged(build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", {"w": weight(4), "v": weight(4)}))
