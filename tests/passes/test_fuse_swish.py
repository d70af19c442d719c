"""`fuse-swish`: the ways in which a logistic gate is written, with and without a factor, and what only looks like one."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import ask, build, context, feed, node, outputs, printed, run_twice

from perwatt.contract import Capabilities
from perwatt.drift import drift
from perwatt.passes.fuse_swish import FuseSwish

GATES = ["sigmoid", "reciprocal", "one by", "divided"]
FACTORS = ["none", "times", "by", "minus first", "negative"]
SHAPES = ["batch", "batch,5", "batch,3,2,2", "2,batch,3"]


def fused(artifact):
    after, changes = run_twice(FuseSwish(), artifact)
    batch = feed(artifact)
    assert not drift([outputs(artifact, batch)], [outputs(after, batch)], FuseSwish.tolerance).reasons
    return after, changes


def alpha_of(artifact):
    (swish,) = [each for each in artifact.model.graph if each.op_type == "Swish"]
    return swish.attributes.get_float("alpha", 1.0)


def gated(gate="sigmoid", factor="none", alpha=1.702, flip=False, shape="batch,5", rank=0, dtype="float32", **other):
    """x · σ(αx), written in one of many ways; `other` may change the 1 of the denominator, add nodes and outputs."""
    exponential = gate != "sigmoid"
    factor = factor if exponential or factor != "minus first" else "times"
    nodes = {
        "none": [node("Neg", "x", "s")] if exponential else [],
        "times": [node("Mul", "alpha x" if flip else "x alpha", "t"), node("Neg", "t", "s")],
        "by": [node("Div", "x inverse", "t"), node("Neg", "t", "s")],
        "minus first": [node("Neg", "x", "t"), node("Mul", "t alpha", "s")],
        "negative": [node("Mul", "x minus", "s")],
    }[factor]
    if not exponential:
        scaled = {"none": "x", "negative": "s"}.get(factor, "t")
        nodes = [each for each in nodes if each.op_type != "Neg"] + [node("Sigmoid", scaled, "g")]
    else:
        nodes += [node("Exp", "s", "e"), node("Add", "one e" if flip else "e one", "d")]
        nodes += {"reciprocal": [node("Reciprocal", "d", "g")], "one by": [node("Div", "one d", "g")]}.get(gate, [])
    last = node("Div", "x d", "y") if gate == "divided" else node("Mul", "g x" if flip else "x g", "y")
    nodes += [last, *other.get("more", [])]
    numbers = {"alpha": alpha, "inverse": 1 / alpha, "minus": -alpha, "one": other.get("one", 1)}
    used = {name for each in nodes for name in each.input}
    weights = {name: np.full([1] * rank, number, dtype) for name, number in numbers.items() if name in used}
    ends = " ".join(f"{name}:{dtype}[{shape}]" for name in ("y", *other.get("ends", ())))
    return build(nodes, f"x:{dtype}[{shape}]", ends, weights, inner=other.get("inner", ""))


def test_silu_of_torch(golden_pass):
    before = gated(shape="batch,3,4,4")
    after, changes = fused(before)
    golden_pass("fuse_swish", before, after, changes)
    assert after.operator_counts() == {"Swish": 1} and after.model.opset_imports[""] == 24


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("factor", FACTORS)
def test_every_factor_in_every_gate(gate, factor):
    after, _ = fused(gated(gate, factor, alpha=1.702))
    wanted = {"none": 1.0, "negative": -1.702 if gate == "sigmoid" else 1.702}.get(factor, 1.702)
    assert after.operator_counts() == {"Swish": 1} and alpha_of(after) == pytest.approx(wanted, rel=1e-6)


@given(
    gate=st.sampled_from(GATES), factor=st.sampled_from(FACTORS), alpha=st.sampled_from([1.702, 1.0, -0.7, 3.0]),
    flip=st.booleans(), shape=st.sampled_from(SHAPES), rank=st.integers(0, 1),
)  # fmt: skip
def test_every_way_to_write_it(gate, factor, alpha, flip, shape, rank):
    after, changes = fused(gated(gate, factor, alpha, flip, shape, rank))
    assert after.operator_counts() == {"Swish": 1} and changes == ["1 Swish put together"]


@pytest.mark.parametrize("gate", ["reciprocal", "one by", "divided"])
def test_a_wrong_one_in_the_denominator(gate):
    after, changes = run_twice(FuseSwish(), before := gated(gate, one=1.001))
    assert after is before and changes == []


def test_the_gate_of_squeeze_and_excitation_stays():
    nodes = [node("Sigmoid", "z", "g"), node("Mul", "x g", "y")]
    before = build(nodes, "x:float32[batch,3,4,4] z:float32[batch,3,1,1]", "y:float32[batch,3,4,4]")
    assert run_twice(FuseSwish(), before) == (before, [])


def test_a_computed_factor_stays():
    nodes = [node("Mul", "x w", "t"), node("Sigmoid", "t", "g"), node("Mul", "x g", "y")]
    before = build(nodes, "x:float32[batch,5] w:float32[1]", "y:float32[batch,5]")
    assert run_twice(FuseSwish(), before) == (before, [])


@pytest.mark.parametrize("factor", [np.float32([1, 2, 3, 4, 5]), np.float32([np.inf])])
@pytest.mark.parametrize("kind", ["Mul", "Div"])
def test_a_factor_that_is_not_one_finite_number(factor, kind):
    factor = factor if kind == "Mul" else 1 / factor
    nodes = [node(kind, "x w", "t"), node("Sigmoid", "t", "g"), node("Mul", "x g", "y")]
    before = build(nodes, "x:float32[batch,5]", "y:float32[batch,5]", {"w": factor})
    after, changes = run_twice(FuseSwish(), before)
    assert after is before and changes == ["1 left: its factor is not one finite number"]


@pytest.mark.parametrize(("ends", "more", "reason"), [
    (["g"], [], "a value inside it is an output"),
    (["z"], [node("Relu", "g", "z")], "a value inside it is used elsewhere too"),
])  # fmt: skip
def test_a_gate_that_others_use(ends, more, reason):
    after, changes = run_twice(FuseSwish(), before := gated(ends=ends, more=more))
    assert after is before and changes == [f"1 left: {reason}"]


@pytest.mark.parametrize(("shape", "rank"), [("5", 2), ("batch,5", 3)])
def test_a_factor_that_adds_an_axis(shape, rank):
    nodes = [node("Mul", "x w", "t"), node("Sigmoid", "t", "g"), node("Mul", "x g", "y")]
    before = build(nodes, f"x:float32[{shape}]", f"y:float32[{'1,' * (rank - len(shape.split(',')))}{shape}]",
                   {"w": np.full([1] * rank, 2, np.float32)})  # fmt: skip
    after, changes = run_twice(FuseSwish(), before)
    assert after is before and changes == ["1 left: a constant in it may add an axis"]


def test_one_of_unknown_rank():
    """A single number without axes can't add any; one with an axis might."""
    nodes = [
        node("Reshape", "r shape", "x"), node("Mul", "x w", "t"), node("Sigmoid", "t", "g"), node("Mul", "x g", "z"),
        node("Flatten", "z", "y"),
    ]  # fmt: skip
    ends = "r:float32[batch,5] shape:int64[axes]", "y:float32[?,?]"
    after, _ = run_twice(FuseSwish(), build(nodes, *ends, {"w": np.float32(2)}))
    assert after.operator_counts() == {"Reshape": 1, "Swish": 1, "Flatten": 1}
    before = build(nodes, *ends, {"w": np.float32([2])})
    assert run_twice(FuseSwish(), before) == (before, ["1 left: a constant in it may add an axis"])


def test_half_precision():
    """In float16 each piece rounds by itself: a few units in the last place."""
    before = gated(factor="times", dtype="float16")
    after, _ = run_twice(FuseSwish(), before)
    batch = feed(before)
    np.testing.assert_allclose(outputs(after, batch)["y"], outputs(before, batch)["y"], rtol=4e-3, atol=1e-3)
    assert after.operator_counts() == {"Swish": 1}
    # float16's 1.702 is off by 1/5000, and stays so.
    assert alpha_of(after) == float(np.float16(1.702))


def test_two_in_a_row_and_a_gate_beside():
    nodes = [
        node("Sigmoid", "x", "a"), node("Mul", "x a", "b"), node("Sigmoid", "b", "c"), node("Mul", "c b", "d"),
        node("Mul", "d x", "y"),
    ]  # fmt: skip
    after, changes = fused(build(nodes, "x:float32[batch,4]", "y:float32[batch,4]"))
    assert after.operator_counts() == {"Swish": 2, "Mul": 1} and changes == ["2 Swish put together"]


def test_only_for_targets_that_take_it():
    before = gated()
    assert ask(FuseSwish(), before) == ["this backend does not run Swish as one operator"]
    takes_it = replace(context(), capabilities=Capabilities(operators=("Swish",)))
    assert ask(FuseSwish(), before, takes_it) == [] and FuseSwish.depends_on_target


def test_names_and_types_stay():
    after, _ = run_twice(FuseSwish(), gated(shape="batch,5"))
    assert "y:float[batch,5] = Swish(x)" in printed(after)
