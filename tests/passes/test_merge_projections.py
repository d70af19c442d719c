"""`merge-projections`: queries, keys and values of any widths, gates, Gemm, and what stays apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, context, feed, node, outputs, run_twice, value, weight
from onnx import helper

from perwatt.drift import drift
from perwatt.passes.merge_projections import MergeProjections


def merged(artifact, made_by=None):
    """The result of the pass, with outputs proved to be within its tolerance."""
    after, changes = run_twice(made_by or MergeProjections(), artifact)
    batch = feed(artifact)
    assert not drift([outputs(artifact, batch)], [outputs(after, batch)], MergeProjections.tolerance).reasons
    return after, changes


def left(artifact, made_by=None):
    """The reason given for the only group, or None where there is none; nothing was changed."""
    after, changes = run_twice(made_by or MergeProjections(), artifact)
    assert after is artifact and len(changes) <= 1
    return changes[0].removeprefix("1 left: ") if changes else None


def projections(widths, biases=(), leading="batch,3", flip=False):
    """MatMul (and Add) from x:float32[…,4] to y0, y1 and so on, as wide as `widths`; `biases` says which have one."""
    nodes, weights = [], {}
    for place, width in enumerate(widths):
        weights[f"w{place}"] = weight(4, width, seed=place)
        biased = place in biases
        nodes.append(node("MatMul", f"x w{place}", f"p{place}" if biased else f"y{place}"))
        if biased:
            weights[f"b{place}"] = weight(width, seed=place)
            nodes.append(node("Add", f"b{place} p{place}" if flip else f"p{place} b{place}", f"y{place}"))
    results = " ".join(f"y{place}:float32[{leading},{width}]" for place, width in enumerate(widths))
    return nodes, f"x:float32[{leading},4]", results, weights


def test_queries_keys_and_values_of_grouped_heads(golden_pass):
    """Keys without a bias, as Whisper has them; narrower than queries, as Llama has them."""
    before = build(*projections((6, 2, 2), biases=(0, 2)))
    after, changes = merged(before)
    golden_pass("merge_projections", before, after, changes)
    assert after.operator_counts() == {"MatMul": 1, "Add": 1, "Split": 1}


@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4), chosen=st.sets(st.integers(0, 3)), flip=st.booleans(),
    leading=st.sampled_from(["batch,3", "batch", "batch,2,3"]),
)  # fmt: skip
def test_any_widths_and_biases(widths, chosen, flip, leading):
    after, changes = merged(build(*projections(widths, chosen, leading, flip)))
    biased = any(place in chosen for place in range(len(widths)))
    assert after.operator_counts() == {"MatMul": 1, "Split": 1, **({"Add": 1} if biased else {})}
    assert changes == ["1 groups of projections merged"]
    assert [spec.name for spec in after.signature.outputs] == [f"y{place}" for place in range(len(widths))]


gemms = st.lists(
    st.tuples(
        st.integers(1, 4), st.booleans(), st.sampled_from([1.0, 0.5, -2.0]), st.sampled_from([1.0, 3.0]),
        st.sampled_from([None, (), (1,), "row", "matrix"]),
    ), min_size=2, max_size=3,
)  # fmt: skip


@given(layers=gemms, turned=st.booleans())
def test_any_gemm(layers, turned):
    nodes, weights = [], {}
    for place, (width, transposed, alpha, beta, bias) in enumerate(layers):
        weights[f"w{place}"] = weight(width, 4, seed=place) if transposed else weight(4, width, seed=place)
        shape = {"row": (width,), "matrix": (1, width)}.get(bias, bias)
        if shape is not None:
            weights[f"b{place}"] = weight(*shape, seed=place)
        inputs = f"x w{place} b{place}" if shape is not None else f"x w{place}"
        options = {"alpha": alpha, "beta": beta, "transA": int(turned), "transB": int(transposed)}
        nodes.append(node("Gemm", inputs, f"y{place}", **options))
    results = " ".join(f"y{place}:float32[3,{width}]" for place, (width, *_) in enumerate(layers))
    after, _ = merged(build(nodes, "x:float32[4,3]" if turned else "x:float32[3,4]", results, weights))
    assert after.operator_counts() == {"Gemm": 1, "Split": 1}


def test_a_gate_and_what_it_opens():
    nodes = [
        node("MatMul", "x w1", "g"), node("Sigmoid", "g", "s"), node("MatMul", "x w2", "u"), node("Mul", "s u", "y"),
    ]  # fmt: skip
    before = build(
        nodes, "x:float32[batch,3,4]", "y:float32[batch,3,6]", {"w1": weight(4, 6), "w2": weight(4, 6, seed=1)}
    )
    after, _ = merged(before)
    assert after.operator_counts() == {"MatMul": 1, "Split": 1, "Sigmoid": 1, "Mul": 1}


def test_the_whole_has_a_known_shape():
    after, _ = merged(build(*projections((6, 2), biases=(0,))))
    whole = {each.op_type: list(each.outputs[0].shape) for each in after.model.graph if each.op_type != "Split"}
    assert [dims[-1] for dims in whole.values()] == [8, 8] and {len(dims) for dims in whole.values()} == {3}


def test_the_least_number_is_a_setting():
    pair, three = build(*projections((6, 2))), build(*projections((6, 2, 2)))
    assert left(pair, MergeProjections(least=3)) is None
    assert merged(three, MergeProjections(least=3))[1] == ["1 groups of projections merged"]


def test_turned_and_unturned_data_do_not_merge():
    nodes = [node("Gemm", "x w1", "y0"), node("Gemm", "x w2", "y1", transA=1)]
    weights = {"w1": weight(4, 2), "w2": weight(4, 3)}
    assert left(build(nodes, "x:float32[4,4]", "y0:float32[4,2] y1:float32[4,3]", weights)) is None


def test_an_addend_that_is_no_row_stays_behind_the_split():
    nodes, x, results, weights = projections((6, 2))
    nodes[1:] = [node("MatMul", "x w1", "p1"), node("Add", "p1 m", "y1")]
    after, _ = merged(build(nodes, x, results, weights | {"m": weight(3, 2)}))
    assert after.operator_counts() == {"MatMul": 1, "Split": 1, "Add": 1}


def test_a_product_read_before_and_after_its_bias_is_split_before_it():
    nodes, x, results, weights = projections((6, 2), biases=(1,))
    after, _ = merged(build(nodes, x, f"{results} p1:float32[batch,3,2]", weights))
    assert after.operator_counts() == {"MatMul": 1, "Split": 1, "Add": 1}


def test_shared_weights_stay_apart():
    nodes, x, results, weights = projections((4, 4))
    nodes.append(node("MatMul", "y1 w1", "y2"))
    before = build(nodes, x, f"{results} y2:float32[batch,3,4]", weights)
    assert left(before) == "its product shares weights with another one"


def test_the_others_merge_without_the_one_that_can_not():
    nodes, x, results, weights = projections((4, 4, 4))
    nodes.append(node("MatMul", "y1 w1", "y3"))
    after, changes = merged(build(nodes, x, f"{results} y3:float32[batch,3,4]", weights))
    assert after.operator_counts() == {"MatMul": 3, "Split": 1}
    assert changes == ["1 groups of projections merged", "1 left: its product shares weights with another one"]


def test_quantized_weights_stay_apart():
    nodes = [node("DequantizeLinear", "q s", "w0"), node("MatMul", "x w0", "y0"), node("MatMul", "x w1", "y1")]
    weights = {"q": np.ones((4, 6), np.int8), "s": np.float32(0.1), "w1": weight(4, 2)}
    before = build(nodes, "x:float32[batch,3,4]", "y0:float32[batch,3,6] y1:float32[batch,3,2]", weights)
    assert left(before) == "they are quantized"


def test_computed_weights_are_no_projection():
    nodes = [node("Exp", "x", "e"), node("MatMul", "x e", "y0"), node("MatMul", "x w1", "y1")]
    before = build(nodes, "x:float32[4,4]", "y0:float32[4,4] y1:float32[4,2]", {"w1": weight(4, 2)})
    assert left(before) is None


def test_weights_of_three_axes_stay_apart():
    nodes = [node("MatMul", "x w0", "y0"), node("MatMul", "x w1", "y1")]
    weights = {"w0": weight(2, 4, 6), "w1": weight(2, 4, 3)}
    before = build(nodes, "x:float32[2,3,4]", "y0:float32[2,3,6] y1:float32[2,3,3]", weights)
    assert left(before) == "its weights are no floating-point matrix or kernel"


@pytest.mark.parametrize(
    ("bias", "reason"),
    [("b", "its bias is not one number for each channel"), ("c", "weights are computed, not stored")],
)
def test_gemm_with_a_bias_for_each_row_or_a_computed_one_stays_apart(bias, reason):
    nodes = [node("Gemm", f"x w0 {bias}", "y0"), node("Gemm", "x w1", "y1"), node("Exp", "x", "c")]
    nodes = [nodes[2], *nodes[:2]] if bias == "c" else nodes[:2]
    weights = {"w0": weight(4, 4), "w1": weight(4, 3), **({"b": weight(3, 1)} if bias == "b" else {})}
    before = build(nodes, "x:float32[3,4]", "y0:float32[3,4] y1:float32[3,3]", weights)
    assert left(before) == reason


def choosing(yes, before=(), no=()):
    """An If on the sign of Σx; its branches have these nodes, of which the last gives what their names say; y is it."""

    def branch(name, nodes):
        return helper.make_graph(list(nodes), name, [], [value(f"{name}:float32[batch,4]")])

    nodes = [
        *before, node("ReduceSum", "x", "sum", keepdims=0), node("Greater", "sum zero", "positive"),
        node("If", "positive", "y", then_branch=branch("yes", yes), else_branch=branch("no", no)),
    ]  # fmt: skip
    weights = {"w0": weight(4, 4), "w1": weight(4, 4, seed=1), "zero": np.float32(0)}
    return build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", weights)


def test_what_a_branch_may_never_ask_for_stays_apart():
    products = [node("MatMul", "x w0", "p"), node("MatMul", "x w1", "q")]
    before = choosing([node("Relu", "p", "yes")], products, [node("Relu", "q", "no")])
    assert left(before) == "a result is used in another graph"


def test_products_of_different_graphs_stay_apart():
    outside = [node("MatMul", "x w0", "p"), node("Relu", "p", "r")]
    inside = [node("MatMul", "x w1", "q"), node("Add", "r q", "yes")]
    assert left(choosing(inside, outside, [node("Relu", "x", "no")])) is None


def test_a_branch_of_its_own_is_merged_inside():
    inside = [node("MatMul", "x w0", "p"), node("MatMul", "x w1", "q"), node("Add", "p q", "yes")]
    after, _ = merged(choosing(inside, no=[node("Relu", "x", "no")]))
    counts = after.operator_counts()
    assert counts["MatMul"] == 1 and counts["Split"] == 1


def test_settings_reach_the_step():
    after, _ = MergeProjections(least=2).run(build(*projections((6, 2))), context())
    assert after.steps[-1].settings == {"least": 2}
