"""`fold-constants`: what does not depend on the input is computed, what would only grow the file is not."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from models import build, control_flow, conv_net, feed, node, outputs, run_twice, transformer, weight

from perwatt.drift import drift
from perwatt.passes.fold_constants import FoldConstants


def folded(artifact, **settings):
    """The result, with outputs within the pass's tolerance under equal names."""
    after, changes = run_twice(FoldConstants(**settings), artifact)
    batch = feed(artifact)
    moved = drift([outputs(artifact, batch)], [outputs(after, batch)], FoldConstants.tolerance)
    assert not moved.reasons
    assert after.signature.inputs == artifact.signature.inputs
    return after, changes


def computed_weights(side=4):
    """A weight that is transposed, cast and scaled before it is used."""
    nodes = [
        node("Transpose", "w", "t", perm=[1, 0]), node("Cast", "t", "f", to=1), node("Mul", "f two", "v"),
        node("MatMul", "x v", "y"),
    ]  # fmt: skip
    weights = {"w": weight(3, side).astype(np.float64), "two": np.float32(2)}
    return build(nodes, f"x:float32[batch,{side}]", "y:float32[batch,3]", weights)


def test_arithmetic_on_weights_is_done_once(golden_pass):
    before = computed_weights()
    after, changes = folded(before)
    golden_pass("fold_constants", before, after, changes)
    assert after.operator_counts() == {"MatMul": 1}


def test_the_shape_of_a_fixed_input_is_a_constant():
    nodes = [node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Unsqueeze", "n front", "u"),
             node("Concat", "u rest", "to", axis=0), node("Reshape", "x to", "y")]  # fmt: skip
    weights = {"zero": np.int64(0), "front": np.int64([0]), "rest": np.int64([-1])}
    after, _ = folded(build(nodes, "x:float32[2,3,4]", "y:float32[2,12]", weights))
    assert after.operator_counts() == {"Reshape": 1}


def test_the_shape_of_a_dynamic_batch_stays_computed():
    nodes = [node("Shape", "x", "s", end=1), node("Concat", "s rest", "to", axis=0), node("Reshape", "x to", "y")]
    before = build(nodes, "x:float32[batch,3,4]", "y:float32[batch,12]", {"rest": np.int64([-1])})
    after, _ = folded(before)
    assert after.signature.batch == "batch"
    assert outputs(after, feed(before, items=7))["y"].shape == (7, 12)


def test_inputs_with_dynamic_axes_that_have_no_names_keep_their_common_batch():
    nodes = [node("Identity", "a", "c"), node("Identity", "b", "d"), node("Add", "c d", "y")]
    before = build(nodes, "a:float32[?,4] b:float32[?,4]", "y:float32[?,4]", inner="c:float32[one,4] d:float32[two,4]")
    after, _ = folded(before)
    assert after.operator_counts() == {"Add": 1}
    assert after.signature.batch == before.signature.batch == "batch"


def test_results_above_the_limit_stay_computed():
    nodes = [node("ConstantOfShape", "size", "big"), node("Add", "x big", "y")]
    before = build(nodes, "x:float32[batch,100]", "y:float32[batch,100]", {"size": np.int64([100])})
    assert "ConstantOfShape" in folded(before, output_size_limit=50)[0].operator_counts()


def test_random_numbers_stay_random():
    nodes = [node("RandomNormal", "", "r", shape=[4]), node("Add", "x r", "y")]
    before = build([nodes[0], nodes[1]], "x:float32[batch,4]", "y:float32[batch,4]")
    after, _ = run_twice(FoldConstants(), before)
    assert after.operator_counts()["RandomNormal"] == 1


def test_a_clean_model_comes_back_as_it_is():
    before = conv_net()
    assert folded(before)[0] is before


def test_weights_stay_shared_and_read_only():
    after, _ = folded(computed_weights())
    assert all(not v.const_value.numpy().flags.writeable for v in after.model.graph.initializers.values())


def test_control_flow_and_lookups_stay_right():
    for before in (control_flow(), transformer()):
        folded(before)


@given(
    st.lists(
        st.tuples(st.sampled_from(["Add", "Mul", "Sub"]), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=10
    )
)
def test_outputs_stay_on_random_graphs(steps):
    names, nodes = ["x", "w", "v"], []
    for operator, first, second in steps:
        name = f"n{len(nodes)}"
        nodes.append(node(operator, f"{names[first % len(names)]} {names[second % len(names)]}", name))
        names.append(name)
    nodes.append(node("Add", f"x {names[-1]}", "y"))
    folded(build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", {"w": weight(4), "v": weight(4, seed=1)}))
