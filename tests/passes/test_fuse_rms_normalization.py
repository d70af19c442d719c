"""`fuse-rms-normalization`: Llama's, T5's and Gemma's forms, every other way to write it, and what only looks like one."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import ask, build, context, feed, node, outputs, run_twice, weight
from normal_forms import GROUPINGS, ROOTS, Form, forms, possible

from perwatt.contract import Capabilities, Tolerance
from perwatt.drift import drift
from perwatt.passes.fuse_rms_normalization import FuseRmsNormalization

HALF = Tolerance(atol=2e-3, rtol=2e-3)
"""Of float16: pieces and operator round at different places."""
WHOLE = {"RMSNormalization": 1}
γ = 1 + weight(8)


def llama(**options):
    return Form(**{"centered": False, "root": "Reciprocal", "scale": γ, "epsilon": 1e-6, **options})


def fused(artifact, tolerance=FuseRmsNormalization.tolerance, kinds=None):
    after, changes = run_twice(FuseRmsNormalization(), artifact)
    batch = feed(artifact)
    assert not drift([outputs(artifact, batch)], [outputs(after, batch)], tolerance).reasons
    if kinds is not None:
        assert after.operator_counts() == kinds
    return after, changes


def left(artifact, reason):
    """It stays, and says why."""
    after, changes = run_twice(FuseRmsNormalization(), artifact)
    assert after is artifact
    assert {change.split(": ", 1)[-1] for change in changes} == ({reason} if reason else set())


def the_node(artifact):
    return next(n for n in artifact.model.graph if n.op_type == "RMSNormalization")


def test_the_form_of_llama(golden_pass):
    before = llama().net([-1], "batch,4,8")
    after, changes = fused(before, kinds=WHOLE)
    golden_pass("fuse_rms_normalization", before, after, changes)
    assert the_node(after).attributes.get_float("epsilon") == pytest.approx(1e-6)
    assert [value.name for value in the_node(after).inputs] == ["x", "γ"]


def test_only_for_targets_that_run_it_as_one():
    before, runs_it = llama().net([-1], "batch,4,8"), Capabilities(operators=("RMSNormalization",))
    assert ask(FuseRmsNormalization(), before) == ["this backend does not run RMSNormalization as one operator"]
    assert ask(FuseRmsNormalization(), before, replace(context(), capabilities=runs_it)) == []


@given(options=forms(groupings=GROUPINGS, centered=False, shifted=False), data=st.data())
def test_every_way_to_write_it(options, data):
    written, scaled, _ = options
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    outer = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    shape = ["batch", *outer, *lengths]
    axes = data.draw(st.permutations(range(-len(lengths), 0)))
    axes = [axis + len(shape) * data.draw(st.booleans()) for axis in axes]
    cut = [n if data.draw(st.booleans()) else 1 for n in lengths]
    scale = 1 + weight(*[1] * data.draw(st.integers(0, len(outer) + 1)), *cut) if scaled else None
    after, changes = fused(Form(**written, scale=scale).net(axes, ",".join(map(str, shape))), kinds=WHOLE)
    assert changes == ["1 RMS normalizations put together"]
    assert the_node(after).attributes.get_int("axis") == -len(lengths)


@pytest.mark.parametrize("root, grouping", [(r, g) for r in ROOTS for g in GROUPINGS if possible(r, g, True)])
def test_root_and_grouping(root, grouping):
    fused(llama(root=root, grouping=grouping).net([-1], "batch,3,8"), kinds=WHOLE)


# Casts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_llama_in_float16(flip):
    """γ · (x32 · inv) cast back, as transformers write it."""
    before = llama(scale=γ.astype(np.float16), casts=True, dtype=np.float16, flip=flip).net([-1], "batch,3,8")
    after, _ = fused(before, HALF, kinds=WHOLE)
    assert the_node(after).inputs[0].name == "x"


def test_casts_that_change_nothing():
    fused(llama(casts=True).net([-1], "batch,3,8"), kinds=WHOLE)


def test_t5_casts_x_twice():
    """Once for the variance; once where x in half is multiplied by what is in float32."""
    nodes, weights = llama(scale=γ.astype(np.float16), casts=True, dtype=np.float16).written([-1])
    nodes.insert(1, node("Cast", "x", "again", to=1))
    product = next(n for n in nodes if n.output[0] == "n")
    product.input[:] = ["again" if name == "x32" else name for name in product.input]
    fused(build(nodes, "x:float16[batch,3,8]", "y:float16[batch,3,8]", weights), HALF, kinds=WHOLE)


def test_t5_in_float32_casts_only_under_the_square():
    nodes, weights = llama(casts=True).written([-1])
    product = next(n for n in nodes if n.output[0] == "n")
    product.input[:] = ["x" if name == "x32" else name for name in product.input]
    nodes = [n for n in nodes if n.output[0] != "n16"]
    nodes[-1].input[:] = ["n" if name == "n16" else name for name in nodes[-1].input]
    fused(build(nodes, "x:float32[batch,3,8]", "y:float32[batch,3,8]", weights), kinds=WHOLE)


def test_a_type_that_nobody_noted():
    """TorchScript casts what is in float32 already, and notes no types: the casts that may do something stay."""
    nodes, weights = llama(casts=True, source="h").written([-1])
    nodes = [node("Gather", "table x", "h"), *nodes]
    before = build(nodes, "x:int64[batch,3]", "y:float32[batch,3,8]", weights | {"table": weight(9, 8)})
    fused(before, kinds={"Gather": 1, "Cast": 1, "RMSNormalization": 1})


def test_the_cast_stays_where_the_residual_uses_it():
    before = llama(casts=True).net(
        [-1], "batch,3,8", more=[node("Add", "x32 y", "z")], outputs="only z:float32[batch,3,8]"
    )
    fused(before, kinds={"Cast": 1, "RMSNormalization": 1, "Add": 1})


@pytest.mark.parametrize("dtype, words", [(np.float64, "double"), (np.float16, "float16")])
def test_arithmetic_in_other_types_stays(dtype, words):
    before = llama(scale=γ.astype(dtype), dtype=dtype).net([-1], "batch,3,8")
    left(before, f"it is computed in {words}, RMSNormalization computes in float")


# Gemma ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_gemma_adds_one_to_the_scale(flip):
    nodes, weights = llama(grouping="behind").written([-1])
    nodes.insert(0, node("Add", "one w" if flip else "w one", "γ"))
    weights |= {"w": weight(8), "one": np.float32(1)}
    del weights["γ"]
    fused(build(nodes, "x:float32[batch,3,8]", "y:float32[batch,3,8]", weights), kinds=WHOLE)


def test_another_number_than_one_is_a_scale_that_is_computed():
    nodes, weights = llama().written([-1])
    nodes.insert(0, node("Add", "w two2", "γ"))
    weights |= {"w": weight(8), "two2": np.float32(2)}
    del weights["γ"]
    before = build(nodes, "x:float32[batch,3,8]", "y:float32[batch,3,8]", weights)
    fused(before, kinds={"Add": 1, "RMSNormalization": 1, "Mul": 1})


# Near misses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"two": 2.001}, {"two": 3.0}, {"half": 0.51, "root": "Div by Pow"},
                                   {"exponent": 0.5, "root": "Pow"}])  # fmt: skip
def test_wrong_constants_stay(wrong):
    left(llama(**wrong).net([-1], "batch,3,8"), None)


def test_the_sum_of_squares_stays():
    nodes, weights = llama().written([-1])
    mean = next(n for n in nodes if n.op_type == "ReduceMean")
    mean.op_type = "ReduceSum"
    left(build(nodes, "x:float32[batch,3,8]", "y:float32[batch,3,8]", weights), None)


def test_something_else_divided_stays():
    nodes, weights = llama().written([-1])
    product = next(n for n in nodes if n.output[0] == "n")
    product.input[:] = ["g" if name == "x" else name for name in product.input]
    left(build(nodes, "x:float32[batch,3,8] g:float32[batch,3,8]", "y:float32[batch,3,8]", weights), None)


def test_axes_that_are_not_the_last_stay():
    left(llama(scale=None).net([1], "batch,3,8"), "the axes that it normalizes are not the last ones")


def test_what_is_centered_is_a_layer_normalization():
    left(Form(scale=γ).net([-1], "batch,3,8"), None)


def test_something_subtracted_that_is_no_mean():
    nodes, weights = llama(source="h").written([-1])
    before = build(
        [node("Sub", "x g", "h"), *nodes], "x:float32[batch,3,8] g:float32[8]", "y:float32[batch,3,8]", weights
    )
    fused(before, kinds={"Sub": 1, "RMSNormalization": 1})


@pytest.mark.parametrize("into", [[0, 0, 2, 4], None])
def test_heads_whose_length_the_reshape_tells(into):
    """As Qwen 3 normalizes queries and keys, exported without shapes inside."""
    nodes, weights = llama(source="h", scale=weight(4)).written([-1])
    made = [node("MatMul", "x w", "m"), node("Reshape", "m into", "h")]
    made[1:1] = [] if into else [node("Shape", "x", "all", end=2), node("Concat", "all heads", "into", axis=0)]
    weights |= {"w": weight(8, 8)} | ({"into": np.int64(into)} if into else {"heads": np.int64([2, 4])})
    after, _ = fused(build([*made, *nodes], "x:float32[batch,3,8]", "y:float32[batch,3,2,4]", weights))
    assert after.operator_counts()["RMSNormalization"] == 1 and "Pow" not in after.operator_counts()


def test_lengths_that_nobody_knows_stay():
    left(llama().net([-1], "batch,3,wide"), "how long the axes are that it normalizes is not known")


def test_a_scale_with_more_rows_stays_outside():
    _, changes = fused(llama(scale=weight(3, 8)).net([-1], "batch,3,8"), kinds={"RMSNormalization": 1, "Mul": 1})
    assert changes[1] == "1 left: its scale or shift varies along other axes than those normalized"


@pytest.mark.parametrize("inside", ["v", "d", "inv"])
def test_a_value_inside_that_others_use(inside):
    before = llama().net([-1], "batch,3,8", more=[node("Relu", inside, "z")], outputs="z:float32[batch,3,?]")
    left(before, "a value inside it is used elsewhere too")


def test_what_is_normalized_is_an_output_too():
    before = llama(source="h").written([-1])
    nodes, weights = before
    made = build(
        [node("Relu", "x", "h"), *nodes], "x:float32[batch,3,8]", "y:float32[batch,3,8] h:float32[batch,3,8]", weights
    )
    fused(made, kinds={"Relu": 1, "RMSNormalization": 1})


def test_one_that_is_there_takes_the_scale_behind_it():
    nodes = [node("RMSNormalization", "x s", "h", epsilon=1e-3), node("Mul", "γ h", "y")]
    before = build(nodes, "x:float32[batch,3,8]", "y:float32[batch,3,8]", {"s": weight(8, seed=3), "γ": γ})
    after, _ = fused(before, kinds=WHOLE)
    assert the_node(after).attributes.get_float("epsilon") == pytest.approx(1e-3)


def test_its_own_scale_that_is_computed():
    nodes = [node("Exp", "g", "s"), node("RMSNormalization", "x s", "h"), node("Mul", "h γ", "y")]
    before = build(nodes, "x:float32[batch,3,8] g:float32[8]", "y:float32[batch,3,8]", {"γ": γ})
    left(before, "the operator's own scale or shift is computed, not stored")
