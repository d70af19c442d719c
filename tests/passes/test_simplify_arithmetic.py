"""`simplify-arithmetic`: what changes nothing goes, what stretches or rounds stays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node, outputs, run_twice

from perwatt.drift import drift
from perwatt.passes.simplify_arithmetic import SimplifyArithmetic

NEUTRAL = {"Add": 0, "Mul": 1, "Sub": 0, "Div": 1, "Pow": 1}


def simplified(artifact, items=3):
    after, changes = run_twice(SimplifyArithmetic(), artifact)
    for count in (items, 1):
        batch = feed(artifact, items=count)
        assert not drift([outputs(artifact, batch)], [outputs(after, batch)], SimplifyArithmetic.tolerance).reasons
    return after, changes


def between(nodes, weights=None, x="x:float32[batch,5]", y="y:float32[batch,5]", inner=""):
    """`nodes` from a to b, an Exp before and an Abs after, so that neither is an input or output."""
    nodes = [node("Exp", "x", "a"), *nodes, node("Sqrt", "b", "y")]
    shape = x[x.index("[") :]
    return build(nodes, x, y, weights or {}, inner=f"a:float32{shape} {inner}")


def test_all_at_once(golden_pass):
    nodes = [
        node("Mul", "a one", "a1"), node("Add", "none a1", "a2"), node("Neg", "a2", "a3"), node("Neg", "a3", "a4"),
        node("Div", "a4 ones", "a5"), node("Clip", "a5", "a6"), node("Where", "c a6 a6", "a7"), node("Max", "a7", "b"),
    ]  # fmt: skip
    weights = {"one": np.float32(1), "none": np.zeros((1, 5), np.float32), "ones": np.ones(5, np.float32),
               "c": np.array([True, False, True, False, True])}  # fmt: skip
    inner = " ".join(f"a{i}:float32[batch,5]" for i in range(1, 8))
    before = between(nodes, weights, inner=inner)
    after, changes = simplified(before)
    golden_pass("simplify_arithmetic", before, after, changes)
    assert after.operator_counts() == {"Exp": 1, "Sqrt": 1}


@given(
    kind=st.sampled_from(sorted(NEUTRAL)), shape=st.sampled_from([(), (1,), (5,), (1, 1), (1, 5)]),
    dtype=st.sampled_from(["float32", "float16", "float64", "int32"]),
)  # fmt: skip
def test_neutral_operands_of_any_rank(kind, shape, dtype):
    constant = np.full(shape, NEUTRAL[kind], dtype)
    artifact = build(
        [node("Abs", "x", "a"), node(kind, "a c", "b"), node("Neg", "b", "y")],
        f"x:{dtype}[batch,5]", f"y:{dtype}[batch,5]", {"c": constant}, inner=f"a:{dtype}[batch,5]",
    )  # fmt: skip
    after, _ = run_twice(SimplifyArithmetic(), artifact)
    batch = {"x": (np.arange(10) - 5).reshape(2, 5).astype(dtype)}
    np.testing.assert_array_equal(outputs(artifact, batch)["y"], outputs(after, batch)["y"])
    assert after.operator_counts() == {"Abs": 1, "Neg": 1}


@pytest.mark.parametrize("kind", ["Sub", "Div", "Pow"])
def test_the_first_operand_counts(kind):
    before = between([node(kind, "c a", "b")], {"c": np.float32(NEUTRAL[kind])})
    after, changes = run_twice(SimplifyArithmetic(), before)
    assert after is before and changes == []


@pytest.mark.parametrize("constant", [np.float32(1e-9), np.float32([[0] * 5, [1e-3] * 5])])
def test_near_misses_stay(constant):
    before = between(
        [node("Add", "a c", "b")], {"c": constant.astype(np.float32)}, x="x:float32[2,5]", y="y:float32[2,5]"
    )
    after, changes = run_twice(SimplifyArithmetic(), before)
    assert after is before and changes == []


def test_zeros_that_stretch_stay():
    before = between([node("Add", "a c", "b")], {"c": np.zeros((4, 1, 1), np.float32)}, y="y:float32[4,batch,5]")
    after, changes = simplified(before)
    assert after is before and changes == ["1 left: it may stretch its operand to a larger shape"]


def test_zeros_that_may_stretch_stay():
    """An axis of unknown length may be 1."""
    before = between(
        [node("Add", "a c", "b")], {"c": np.zeros((5,), np.float32)}, x="x:float32[batch,n]", y="y:float32[batch,m]"
    )
    after, changes = run_twice(SimplifyArithmetic(), before)
    assert after is before and changes == ["1 left: it may stretch its operand to a larger shape"]


def test_zeros_against_an_unknown_rank_stay():
    nodes = [node("Reshape", "x shape", "a"), node("Add", "a c", "b"), node("Neg", "b", "y")]
    weights = {"c": np.zeros((5,), np.float32)}
    before = build(nodes, "x:float32[batch,5] shape:int64[2]", "y:float32[p,q]", weights)
    after, changes = run_twice(SimplifyArithmetic(), before)
    assert after is before and changes == ["1 left: the shapes of its operands aren't known"]


def test_one_number_needs_no_shape():
    nodes = [node("Reshape", "x shape", "a"), node("Add", "c a", "b"), node("Neg", "b", "y")]
    before = build(nodes, "x:float32[batch,5] shape:int64[2]", "y:float32[p,q]", {"c": np.float32(0)})
    after, _ = run_twice(SimplifyArithmetic(), before)
    assert after.operator_counts() == {"Reshape": 1, "Neg": 1}


@pytest.mark.parametrize("kind", ["Relu", "Abs", "Floor", "Ceil", "Round", "Sign"])
def test_twice_is_once(kind):
    after, _ = simplified(between([node(kind, "a", "m"), node(kind, "m", "b")]))
    assert after.operator_counts() == {"Exp": 1, kind: 1, "Sqrt": 1}


def test_twice_something_else_stays():
    before = between([node("Reciprocal", "a", "m"), node("Reciprocal", "m", "b")])
    assert run_twice(SimplifyArithmetic(), before) == (before, [])


def test_what_undoes_itself_though_used_in_between():
    nodes = [node("Neg", "x", "m"), node("Neg", "m", "b"), node("Add", "b m", "y")]
    after, _ = simplified(build(nodes, "x:float32[batch,5]", "y:float32[batch,5]"))
    assert after.operator_counts() == {"Neg": 1, "Add": 1}


def logic(nodes, weights):
    nodes = [node("Less", "x half", "a"), *nodes, node("Cast", "b", "y", to=1)]
    inner = "a:bool[batch,5]"
    return build(nodes, "x:float32[batch,5]", "y:float32[batch,5]", {"half": np.float32(0.5), **weights}, inner=inner)


@pytest.mark.parametrize(("kind", "neutral"), [("And", True), ("Or", False), ("Xor", False)])
def test_logic(kind, neutral):
    after, _ = simplified(logic([node(kind, "c a", "b")], {"c": np.array(neutral)}))
    assert after.operator_counts() == {"Less": 1, "Cast": 1}
    before = logic([node(kind, "c a", "b")], {"c": np.array(not neutral)})
    assert run_twice(SimplifyArithmetic(), before) == (before, [])


def test_double_negation():
    after, _ = simplified(logic([node("Not", "a", "m"), node("Not", "m", "b")], {}))
    assert after.operator_counts() == {"Less": 1, "Cast": 1}


@pytest.mark.parametrize(
    ("condition", "kept"), [([True] * 5, "Exp"), ([False] * 5, "Sin"), ([True, False] * 2 + [True], None)]
)
def test_choices_that_are_none(condition, kept):
    nodes = [node("Exp", "x", "p"), node("Sin", "x", "q"), node("Where", "c p q", "b"), node("Neg", "b", "y")]
    inner = "p:float32[batch,5] q:float32[batch,5]"
    before = build(nodes, "x:float32[batch,5]", "y:float32[batch,5]", {"c": np.array(condition)}, inner=inner)
    after, _ = simplified(before)
    assert after.operator_counts() == ({kept: 1, "Neg": 1} if kept else before.operator_counts())


def test_a_condition_that_stretches_stays():
    nodes = [node("Less", "z x", "c"), node("Where", "c z z", "b"), node("Neg", "b", "y")]
    before = build(nodes, "x:float32[batch,5] z:float32[batch,1]", "y:float32[batch,5]", inner="c:bool[batch,5]")
    after, changes = simplified(before)
    assert after is before and changes == ["1 left: it may stretch its operand to a larger shape"]


def test_bounds_stay():
    before = between([node("Clip", "a - high", "b")], {"high": np.float32(2)})
    assert run_twice(SimplifyArithmetic(), before) == (before, [])


def test_an_output_keeps_its_name():
    before = build([node("Exp", "x", "a"), node("Mul", "a one", "y")], "x:float32[batch,5]", "y:float32[batch,5]",
                   {"one": np.float32(1)})  # fmt: skip
    after, _ = simplified(before)
    assert [value.name for value in after.model.graph.outputs] == ["y"] and "Mul" not in after.operator_counts()
