"""`fuse-mish`: softplus in its many forms, thresholds that matter and those that don't, and what only looks like one."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node, outputs, run_twice

from perwatt.drift import drift
from perwatt.passes.fuse_mish import FuseMish

PLUS = {
    "softplus": [node("Softplus", "x", "s")],
    "log": [node("Exp", "x", "e"), node("Add", "e one", "p"), node("Log", "p", "s")],
    "log flipped": [node("Exp", "x", "e"), node("Add", "one e", "p"), node("Log", "p", "s")],
    "careful": [
        node("Max", "x zero", "m"), node("Abs", "x", "a"), node("Neg", "a", "n"), node("Exp", "n", "e"),
        node("Add", "e one", "p"), node("Log", "p", "l"), node("Add", "m l", "s"),
    ],
    "careful with relu": [
        node("Relu", "x", "m"), node("Abs", "x", "a"), node("Neg", "a", "n"), node("Exp", "n", "e"),
        node("Add", "one e", "p"), node("Log", "p", "l"), node("Add", "l m", "s"),
    ],
    "torch": [node("Mul", "x one", "b"), node("Softplus", "b", "c"), node("Div", "c one", "s")],
}  # fmt: skip
CUTS = {
    "none": [],
    "greater": [node("Greater", "x limit", "q"), node("Where", "q x s", "t")],
    "at least": [node("GreaterOrEqual", "x limit", "q"), node("Where", "q x s", "t")],
    "limit below": [node("Less", "limit x", "q"), node("Where", "q x s", "t")],
    "less": [node("Less", "x limit", "q"), node("Where", "q s x", "t")],
    "limit above": [node("GreaterOrEqual", "limit x", "q"), node("Where", "q s x", "t")],
}
CONSTANTS = {"one": 1.0, "zero": 0.0, "limit": 20.0}


def mish(plus="softplus", cut="none", flip=False, shape="batch,5", dtype="float32", **options):
    more, ends, opset = options.pop("more", ()), options.pop("ends", ("y",)), options.pop("opset", 23)
    inside = "s" if cut == "none" else "t"
    nodes = [*PLUS[plus], *CUTS[cut], node("Tanh", inside, "h"), node("Mul", "h x" if flip else "x h", "y"), *more]
    used = {name for each in nodes for name in each.input}
    weights = {name: np.array(number, dtype) for name, number in {**CONSTANTS, **options}.items() if name in used}
    specs = " ".join(f"{name}:{dtype}[{shape}]" for name in ends)
    return build(nodes, f"x:{dtype}[{shape}]", specs, weights, opset=opset)


def fused(artifact):
    after, changes = run_twice(FuseMish(), artifact)
    for spread in (1, 8, 60):
        batch = {name: array * spread for name, array in feed(artifact).items()}
        assert not drift([outputs(artifact, batch)], [outputs(after, batch)], FuseMish.tolerance).reasons
    return after, changes


def test_the_form_of_darknet(golden_pass):
    before = mish()
    after, changes = fused(before)
    golden_pass("fuse_mish", before, after, changes)
    assert after.operator_counts() == {"Mish": 1}


@pytest.mark.parametrize("plus", PLUS)
@pytest.mark.parametrize("cut", CUTS)
def test_every_softplus_and_every_way_to_cut_it(plus, cut):
    after, changes = fused(mish(plus, cut))
    assert after.operator_counts() == {"Mish": 1} and changes == ["1 Mish put together"]


@given(
    plus=st.sampled_from(list(PLUS)), cut=st.sampled_from(list(CUTS)), flip=st.booleans(),
    shape=st.sampled_from(["batch,5", "batch,2,3,1", "7,batch"]), limit=st.floats(2, 40),
)  # fmt: skip
def test_thresholds_that_matter_stay(plus, cut, flip, shape, limit):
    before = mish(plus, cut, flip, shape, limit=limit)
    after, changes = fused(before)
    if cut == "none" or np.float32(limit) >= 10:
        assert after.operator_counts() == {"Mish": 1}
    else:
        assert after is before and changes == ["1 left: the threshold of its softplus is below 10"]


@pytest.mark.parametrize("plus", ["log", "careful"])
def test_a_wrong_one(plus):
    after, changes = run_twice(FuseMish(), before := mish(plus, one=1.01))
    assert after is before and changes == []


def test_a_softplus_of_another_slope_stays():
    before = mish("torch", one=2.0)
    assert run_twice(FuseMish(), before) == (before, [])


def test_the_wrong_way_round_stays():
    """Softplus above the threshold and x below it is something else."""
    nodes = [
        node("Softplus", "x", "s"), node("Greater", "x limit", "q"), node("Where", "q s x", "t"), node("Tanh", "t", "h"),
        node("Mul", "x h", "y"),
    ]  # fmt: skip
    before = build(nodes, "x:float32[batch,5]", "y:float32[batch,5]", {"limit": np.float32(20)})
    assert run_twice(FuseMish(), before) == (before, [])


@pytest.mark.parametrize("source", ["Softplus", "Mul"])
def test_two_different_inputs_stay(source):
    nodes = [node("Softplus", "z" if source == "Softplus" else "x", "s"), node("Tanh", "s", "h")]
    nodes += [node("Mul", "x h" if source == "Softplus" else "z h", "y")]
    before = build(nodes, "x:float32[batch,5] z:float32[batch,5]", "y:float32[batch,5]")
    assert run_twice(FuseMish(), before) == (before, [])


@pytest.mark.parametrize("where", ["Max", "Abs"])
def test_two_different_inputs_of_the_softplus_stay(where):
    nodes = [each for each in PLUS["careful"] if each.op_type != where]
    nodes += [node(where, "z zero" if where == "Max" else "z", "m" if where == "Max" else "a")]
    nodes = [nodes[-1], *nodes[:-1], node("Tanh", "s", "h"), node("Mul", "x h", "y")]
    weights = {"zero": np.float32(0), "one": np.float32(1)}
    before = build(nodes, "x:float32[batch,5] z:float32[batch,5]", "y:float32[batch,5]", weights)
    assert run_twice(FuseMish(), before) == (before, [])


@pytest.mark.parametrize(("ends", "more", "reason"), [
    (("y", "h"), [], "a value inside it is an output"),
    (("y", "z"), [node("Relu", "s", "z")], "a value inside it is used elsewhere too"),
])  # fmt: skip
def test_a_value_inside_that_others_use(ends, more, reason):
    after, changes = run_twice(FuseMish(), before := mish(ends=ends, more=more))
    assert after is before and changes == [f"1 left: {reason}"]


def test_half_precision():
    before = mish("log", dtype="float16")
    after, _ = run_twice(FuseMish(), before)
    batch = feed(before)
    np.testing.assert_allclose(outputs(after, batch)["y"], outputs(before, batch)["y"], rtol=4e-3, atol=2e-3)


def test_bfloat16_is_newer_than_the_operator():
    nodes = [*PLUS["log"], node("Tanh", "s", "h"), node("Mul", "x h", "y")]
    weights = {"one": np.array(1, ml_dtypes.bfloat16)}
    before = build(nodes, "x:bfloat16[batch,5]", "y:bfloat16[batch,5]", weights, opset=20)
    assert run_twice(FuseMish(), before) == (before, ["1 left: bfloat16 takes opset 22"])
    before = build(nodes, "x:bfloat16[batch,5]", "y:bfloat16[batch,5]", weights, opset=22)
    assert run_twice(FuseMish(), before)[0].operator_counts() == {"Mish": 1}


def test_a_constant_that_adds_an_axis():
    before = build(
        [*PLUS["log"], node("Tanh", "s", "h"), node("Mul", "x h", "y")], "x:float32[5]", "y:float32[1,5]",
        {"one": np.float32([[1]])},
    )  # fmt: skip
    assert run_twice(FuseMish(), before) == (before, ["1 left: a constant in it may add an axis"])


def test_an_older_model_is_raised():
    after, _ = fused(mish(opset=17))
    assert after.operator_counts() == {"Mish": 1} and after.model.opset_imports[""] == 18
