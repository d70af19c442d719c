"""`fuse-gelu`: both forms however they are grouped, and what only looks like one."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, feed, node, outputs, run_twice

from perwatt.drift import drift
from perwatt.passes.fuse_gelu import FuseGelu

ROOT, CUBIC = math.sqrt(2), 0.044715


def fused(artifact):
    after, changes = run_twice(FuseGelu(), artifact)
    batch = feed(artifact)
    assert not drift([outputs(artifact, batch)], [outputs(after, batch)], FuseGelu.tolerance).reasons
    return after, changes


def net(nodes, constants, opset=23, shape="batch,5", dtype="float32", rank=0, ends=("y",), out=None):
    """x through `nodes` to y; constants are single numbers."""
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    used = {name for each in nodes for name in each.input}
    weights = {name: np.full([1] * rank, value, kind) for name, value in constants.items() if name in used}
    specs = " ".join(f"{end}:{dtype}[{out or shape}]" for end in ends)
    return build(nodes, f"x:{dtype}[{shape}]", specs, weights, opset=opset)


def exact(grouping="half last", inner="Div", flip=False, one=1.0, half=0.5, root=ROOT, more=(), **options):
    """x/2 · (1 + erf(x/√2)), grouped in one of several ways."""
    nodes = [node(inner, "root x" if flip and inner == "Mul" else "x root", "a"), node("Erf", "a", "e")]
    nodes += [*halved(grouping, "e", flip), *more]
    constants = {"root": root if inner == "Div" else 1 / root, "one": one, "half": half, "two": 1 / half}
    return net(nodes, constants, **options)


GROUPINGS = ["half last", "half on the gate", "half first", "by two", "gate by two", "x by two", "half inside"]


def halved(grouping, curve, flip):
    """x · (1 + curve) / 2"""
    gate = node("Add", f"one {curve}" if flip else f"{curve} one", "g")
    return {
        "half last": [gate, node("Mul", "g x" if flip else "x g", "p"), node("Mul", "p half", "y")],
        "half on the gate": [gate, node("Mul", "half g", "p"), node("Mul", "p x" if flip else "x p", "y")],
        "half first": [gate, node("Mul", "x half", "p"), node("Mul", "g p" if flip else "p g", "y")],
        "by two": [gate, node("Mul", "x g", "p"), node("Div", "p two", "y")],
        "gate by two": [gate, node("Div", "g two", "p"), node("Mul", "p x" if flip else "x p", "y")],
        "x by two": [gate, node("Div", "x two", "p"), node("Mul", "p g", "y")],
        "half inside": [
            node("Mul", f"{curve} half", "p"), node("Add", "half p" if flip else "p half", "g"),
            node("Mul", "g x" if flip else "x g", "y"),
        ],
    }[grouping]  # fmt: skip


def square(how, factor, out):
    """factor · x²"""
    return {
        "product": [node("Mul", "x x", "q"), node("Mul", f"q {factor}", out)],
        "power": [node("Pow", "x two", "q"), node("Mul", f"{factor} q", out)],
        "factor first": [node("Mul", f"{factor} x", "q"), node("Mul", "q x", out)],
    }[how]


def cube(how, factor, out):
    """factor · x³"""
    return {
        "power": [node("Pow", "x three", "c"), node("Mul", f"c {factor}", out)],
        "products": [node("Mul", "x x", "q"), node("Mul", "q x", "c"), node("Mul", f"{factor} c", out)],
        "power and product": [node("Pow", "x two", "q"), node("Mul", "x q", "c"), node("Mul", f"{factor} c", out)],
        "factor first": [node("Mul", "x x", "q"), node("Mul", f"x {factor}", "c"), node("Mul", "c q", out)],
        "factor second": [node("Mul", "x x", "q"), node("Mul", f"q {factor}", "c"), node("Mul", "c x", out)],
        "factor first in a row": [node("Mul", f"{factor} x", "q"), node("Mul", "q x", "c"), node("Mul", "c x", out)],
    }[how]


SQUARES = ["product", "power", "factor first"]
CUBES = ["power", "products", "power and product", "factor first", "factor second", "factor first in a row"]
INNERS = ["sum", "sum by quotient", "factored", "scale on x", "scale on the sum", "scale inside", "scale on both"]


def cubic(inner, squared, cubed, flip):
    """√(2/π) · (x + 0.044715 x³), as `z`."""
    one_more = [*square(squared, "cubic", "s"), node("Add", "s one" if flip else "one s", "f")]
    powers = [*cube(cubed, "cubic", "k"), node("Add", "k x" if flip else "x k", "f")]
    return {
        "sum": [*powers, node("Mul", "f scale" if flip else "scale f", "z")],
        "sum by quotient": [*powers, node("Div", "f inverse", "z")],
        "factored": [*one_more, node("Mul", "x f", "v"), node("Mul", "v scale", "z")],
        "scale on x": [*one_more, node("Mul", "x scale", "v"), node("Mul", "v f", "z")],
        "scale on the sum": [*one_more, node("Mul", "f scale", "v"), node("Mul", "v x", "z")],
        "scale inside": [*square(squared, "both", "s"), node("Add", "s scale", "f"), node("Mul", "x f", "z")],
        "scale on both": [*cube(cubed, "both", "k"), node("Mul", "x scale", "v"), node("Add", "k v", "z")],
    }[inner]


def tanh(grouping="half first", inner="sum", squared="product", cubed="power", flip=False, more=(), **options):
    """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))); numbers may be changed by name."""
    numbers = {"one": 1.0, "half": 0.5, "two": 2.0, "three": 3.0, "cubic": CUBIC, "scale": math.sqrt(2 / math.pi)}
    numbers.update({name: options.pop(name) for name in list(options) if name in numbers})
    numbers.update(both=numbers["cubic"] * numbers["scale"], inverse=1 / numbers["scale"])
    nodes = [*cubic(inner, squared, cubed, flip), node("Tanh", "z", "t"), *halved(grouping, "t", flip), *more]
    return net(nodes, numbers, **options)


def approximates(artifact):
    (found,) = [each for each in artifact.model.graph if each.op_type == "Gelu"]
    return found.attributes.get_string("approximate", "none")


def test_the_form_of_transformers(golden_pass):
    before = exact()
    after, changes = fused(before)
    golden_pass("fuse_gelu", before, after, changes)
    assert after.operator_counts() == {"Gelu": 1}


@given(
    grouping=st.sampled_from(GROUPINGS), inner=st.sampled_from(["Div", "Mul"]), flip=st.booleans(), rank=st.integers(0, 2),
    shape=st.sampled_from(["batch,5", "batch,2,3", "2,batch,1,3"]),
)  # fmt: skip
def test_every_grouping_of_the_exact_form(grouping, inner, flip, rank, shape):
    after, changes = fused(exact(grouping, inner, flip, rank=rank, shape=shape))
    assert after.operator_counts() == {"Gelu": 1} and changes == ["1 Gelu put together"]
    assert approximates(after) == "none"


@settings(max_examples=60)
@given(
    grouping=st.sampled_from(GROUPINGS), inner=st.sampled_from(INNERS), squared=st.sampled_from(SQUARES),
    cubed=st.sampled_from(CUBES), flip=st.booleans(), rank=st.integers(0, 1),
)  # fmt: skip
def test_every_grouping_of_the_approximation(grouping, inner, squared, cubed, flip, rank):
    after, _ = fused(tanh(grouping, inner, squared, cubed, flip, rank=rank))
    assert after.operator_counts() == {"Gelu": 1} and approximates(after) == "tanh"


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("squared", SQUARES)
def test_every_square_in_every_sum(inner, squared):
    assert run_twice(FuseGelu(), tanh(inner=inner, squared=squared))[0].operator_counts() == {"Gelu": 1}


@pytest.mark.parametrize("cubed", CUBES)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_every_cube_in_every_grouping(cubed, grouping):
    assert run_twice(FuseGelu(), tanh(grouping, cubed=cubed))[0].operator_counts() == {"Gelu": 1}


def test_the_form_of_gpt2(golden_pass):
    before = tanh(shape="batch,16,8")
    after, changes = fused(before)
    golden_pass("fuse_gelu_tanh", before, after, changes)


@pytest.mark.parametrize("inner", INNERS)
def test_the_approximation_by_the_logistic_function(inner):
    """(1 + tanh z) / 2 = σ(2z), with the 2 in the scale."""
    scale = 2 * math.sqrt(2 / math.pi)
    numbers = {"one": 1, "two": 2, "three": 3, "cubic": CUBIC, "scale": scale}
    numbers |= {"both": CUBIC * scale, "inverse": 1 / scale}
    nodes = [*cubic(inner, "product", "power", False), node("Sigmoid", "z", "t"), node("Mul", "x t", "y")]
    after, _ = fused(net(nodes, numbers))
    assert after.operator_counts() == {"Gelu": 1} and approximates(after) == "tanh"


@pytest.mark.parametrize("wrong", [{"one": 1.001}, {"half": 0.51}, {"root": 1.4}, {"root": -ROOT}])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_near_misses_of_the_exact_form_stay(grouping, wrong):
    if (grouping, wrong) == ("half inside", {"one": 1.001}):
        wrong = {"half": 0.499}
    before = exact(grouping, **wrong)
    assert run_twice(FuseGelu(), before) == (before, [])


@pytest.mark.parametrize(
    "wrong", [{"one": 1.001}, {"half": 0.51}, {"cubic": 0.0447}, {"cubic": -CUBIC}, {"scale": 0.797}]
)
@pytest.mark.parametrize("inner", INNERS)
def test_near_misses_of_the_approximation_stay(inner, wrong):
    before = tanh(inner=inner, **wrong)
    assert run_twice(FuseGelu(), before) == (before, [])


def test_a_curve_that_is_not_one_half_at_zero_stays():
    nodes = [
        node("Div", "x root", "a"), node("Erf", "a", "e"), node("Mul", "e half", "p"), node("Add", "p other", "g"),
        node("Mul", "x g", "y"),
    ]  # fmt: skip
    before = net(nodes, {"root": ROOT, "half": 0.5, "other": 0.4})
    assert run_twice(FuseGelu(), before) == (before, [])


@pytest.mark.parametrize("wrong", [{"three": 2.0}, {"three": 4.0}])
def test_another_power_stays(wrong):
    before = tanh(**wrong)
    assert run_twice(FuseGelu(), before) == (before, [])


@pytest.mark.parametrize("which", ["in the curve", "as the factor"])
@pytest.mark.parametrize("form", ["exact", "tanh"])
def test_two_different_inputs_stay(which, form):
    """gelu's gate of one value, times another."""
    made = (exact() if form == "exact" else tanh()).model
    first, last = {"exact": ("Div", "Mul"), "tanh": ("Pow", "Mul")}[form]
    nodes = [each for each in made.graph if each.op_type != "Constant"]
    changed = next(n for n in nodes if n.op_type == first) if which == "in the curve" else None
    changed = changed or next(n for n in nodes if n.op_type == last and n.inputs[0].name == "x")
    other = node("Relu", "x", "r")
    protos = [helper_node(each, "r" if each is changed else None) for each in nodes]
    numbers = {name: float(value.const_value.numpy()) for name, value in made.graph.initializers.items()}
    before = net([other, *protos], numbers)
    assert run_twice(FuseGelu(), before) == (before, [])


def helper_node(each, first=None):
    """A node of a model as one to build with, its first input another one."""
    names = [value.name for value in each.inputs]
    return node(each.op_type, " ".join([first or names[0], *names[1:]]), each.outputs[0].name)


@pytest.mark.parametrize(("ends", "more", "reason"), [
    (("y", "g"), [], "a value inside it is an output"),
    (("y", "more"), [node("Relu", "g", "more")], "a value inside it is used elsewhere too"),
    (("y", "more"), [node("Add", "p x", "more")], "a value inside it is used elsewhere too"),
])  # fmt: skip
@pytest.mark.parametrize("form", [exact, tanh])
def test_a_value_inside_that_others_use(form, ends, more, reason):
    after, changes = run_twice(FuseGelu(), before := form(ends=ends, more=more))
    assert after is before and changes == [f"1 left: {reason}"]


@pytest.mark.parametrize("form", [exact, tanh])
def test_constants_that_add_an_axis(form):
    before = form(rank=2, shape="5", out="1,5")
    assert run_twice(FuseGelu(), before) == (before, ["1 left: a constant in it may add an axis"])


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
@pytest.mark.parametrize("form", [exact, tanh])
def test_other_types(form, dtype):
    """In half precision each piece rounds by itself, and so do the constants."""
    before = form(dtype=dtype)
    after, _ = run_twice(FuseGelu(), before)
    assert after.operator_counts() == {"Gelu": 1}
    if dtype == "float16":
        batch = feed(before)
        np.testing.assert_allclose(outputs(after, batch)["y"], outputs(before, batch)["y"], rtol=5e-3, atol=2e-3)


def test_two_in_a_row():
    nodes = []
    for x, y in (("x", "m"), ("m", "y")):
        nodes += [node("Div", f"{x} root", f"a{y}"), node("Erf", f"a{y}", f"e{y}"), node("Add", f"e{y} one", f"g{y}")]
        nodes += [node("Mul", f"{x} g{y}", f"p{y}"), node("Mul", f"p{y} half", y)]
    after, changes = fused(net(nodes, {"root": ROOT, "one": 1, "half": 0.5}))
    assert after.operator_counts() == {"Gelu": 2} and changes == ["2 Gelu put together"]
