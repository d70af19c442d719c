"""`remove-dead`: nothing that an output depends on goes, no name that a caller knows changes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from models import build, control_flow, conv_net, feed, node, outputs, run_twice, value, weight
from onnx import helper

from perwatt.passes.remove_dead import RemoveDead


def cleaned(artifact):
    """The result, with equal outputs under equal names."""
    after, changes = run_twice(RemoveDead(), artifact)
    batch = feed(artifact)
    old, new = outputs(artifact, batch), outputs(after, batch)
    assert list(old) == list(new)
    assert all(np.array_equal(old[name], new[name]) for name in old)
    assert after.signature.inputs == artifact.signature.inputs
    return after, changes


def test_dead_nodes_weights_and_identities_go(golden_pass):
    nodes = [
        node("Identity", "x", "same"), node("Relu", "same", "r"), node("Exp", "r", "dead"),
        node("Mul", "dead w", "deader"), node("Identity", "r", "y"),
    ]  # fmt: skip
    before = build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", {"w": weight(4), "never": weight(2, 3)})
    after, changes = cleaned(before)
    golden_pass("remove_dead", before, after, changes)
    assert after.operator_counts() == {"Relu": 1} and not after.size_bytes()
    assert changes[0] == "2 unused weights removed"


def test_a_clean_model_comes_back_as_it_is():
    before = conv_net()
    after, changes = cleaned(before)
    assert after is before and changes == []


def test_two_names_for_one_value_stay_two_outputs():
    nodes = [node("Relu", "x", "t"), node("Identity", "t", "a"), node("Identity", "t", "b")]
    after, _ = cleaned(build(nodes, "x:float32[batch,4]", "a:float32[batch,4] b:float32[batch,4]"))
    assert after.operator_counts() == {"Relu": 1, "Identity": 1}


def test_an_output_and_its_copy_stay_two_outputs():
    nodes = [node("Relu", "x", "t"), node("Identity", "t", "a")]
    before = build(nodes, "x:float32[batch,4]", "t:float32[batch,4] a:float32[batch,4]")
    assert cleaned(before)[0] is before


def test_an_input_or_weight_given_back_under_another_name_stays():
    nodes = [node("Identity", "x", "y"), node("Identity", "w", "z")]
    before = build(nodes, "x:float32[batch,4]", "y:float32[batch,4] z:float32[4]", {"w": weight(4)})
    assert cleaned(before)[0] is before


def test_a_branch_that_gives_an_outer_value_keeps_its_identity():
    branches = {
        f"{name}_branch": helper.make_graph(
            [node("Identity", source, "out")], name, [], [value("out:float32[batch,4]")]
        )
        for name, source in (("then", "r"), ("else", "x"))
    }
    nodes = [
        node("Relu", "x", "r"), node("ReduceSum", "x", "sum", keepdims=0), node("Greater", "sum zero", "more"),
        node("If", "more", "y", **branches),
    ]  # fmt: skip
    cleaned(build(nodes, "x:float32[batch,4]", "y:float32[batch,4] r:float32[batch,4]", {"zero": np.float32(0)}))


def test_control_flow_keeps_what_its_branches_use():
    before = control_flow()
    assert cleaned(before)[0] is before


def test_unused_inputs_stay_inputs():
    cleaned(build([node("Relu", "x", "y")], "x:float32[batch,4] unused:float32[batch,2]", "y:float32[batch,4]"))


@given(st.lists(st.tuples(st.sampled_from(["Identity", "Relu", "Neg"]), st.integers(0, 7)), min_size=1, max_size=8),
       st.sets(st.integers(0, 7), min_size=1, max_size=3))  # fmt: skip
def test_outputs_stay_on_random_graphs(steps, wanted):
    names, nodes = ["x"], []
    for operator, source in steps:
        nodes.append(node(operator, names[source % len(names)], f"v{len(names)}"))
        names.append(f"v{len(names)}")
    chosen = sorted({names[1 + w % len(steps)] for w in wanted})
    cleaned(build(nodes, "x:float32[batch,4]", " ".join(f"{name}:float32[batch,4]" for name in chosen)))
