"""`fuse-hardswish`: every grouping, every way to clip, hard sigmoids by themselves, and what only looks like one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node, outputs, run_twice

from perwatt.drift import drift
from perwatt.passes.fuse_hardswish import FuseHardswish

CLIPS = {
    "clip": lambda a, b, top: [node("Clip", f"{a} zero {top}", b)],
    "clip after relu": lambda a, b, top: [node("Relu", a, "r"), node("Clip", f"r zero {top}", b)],
    "upper bound after relu": lambda a, b, top: [node("Relu", a, "r"), node("Clip", f"r - {top}", b)],
    "upper bound after max": lambda a, b, top: [node("Max", f"zero {a}", "r"), node("Clip", f"r - {top}", b)],
    "min of max": lambda a, b, top: [node("Max", f"{a} zero", "r"), node("Min", f"r {top}", b)],
    "max of min": lambda a, b, top: [node("Min", f"{top} {a}", "r"), node("Max", "zero r", b)],
    "min of relu": lambda a, b, top: [node("Relu", a, "r"), node("Min", f"{top} r", b)],
    "relu of min": lambda a, b, top: [node("Min", f"{a} {top}", "r"), node("Relu", "r", b)],
}
GROUPINGS = [
    "product by six", "product by sixth", "gate by six", "gate by sixth", "x by six", "x by sixth", "unit", "whole",
]  # fmt: skip
CONSTANTS = {"zero": 0.0, "three": 3.0, "six": 6.0, "sixth": 1 / 6, "half": 0.5, "one": 1.0, "fifth": 0.2}


def net(nodes, shape="batch,5", dtype="float32", ends=("y",), **numbers):
    used = {name for each in nodes for name in each.input}
    held = {**CONSTANTS, **numbers}
    weights = {name: np.array(number, dtype) for name, number in held.items() if name in used}
    specs = " ".join(f"{name}:{dtype}[{shape}]" for name in ends)
    return build(nodes, f"x:{dtype}[{shape}]", specs, weights)


def hardswish(grouping="product by six", clip="clip", flip=False, inner="Mul", alpha=1 / 6):
    """x · max(0, min(6, x + 3)) / 6, grouped in one of eight ways."""

    def product(a, b, out):
        return node("Mul", f"{b} {a}" if flip else f"{a} {b}", out)

    ramp = [node("Add", "three x" if flip else "x three", "a"), *CLIPS[clip]("a", "c", "six")]
    sixth = [node("Mul", "x sixth", "t") if inner == "Mul" else node("Div", "x six", "t")]
    unit = [*sixth, node("Add", "half t" if flip else "t half", "a"), *CLIPS[clip]("a", "c", "one")]
    return {
        "product by six": [*ramp, product("x", "c", "p"), node("Div", "p six", "y")],
        "product by sixth": [*ramp, product("x", "c", "p"), product("p", "sixth", "y")],
        "gate by six": [*ramp, node("Div", "c six", "g"), product("x", "g", "y")],
        "gate by sixth": [*ramp, product("c", "sixth", "g"), product("x", "g", "y")],
        "x by six": [*ramp, node("Div", "x six", "t"), product("t", "c", "y")],
        "x by sixth": [*ramp, product("sixth", "x", "t"), product("t", "c", "y")],
        "unit": [*unit, product("x", "c", "y")],
        "whole": [node("HardSigmoid", "x", "g", alpha=alpha, beta=0.5), product("x", "g", "y")],
    }[grouping]


def fused(artifact):
    after, changes = run_twice(FuseHardswish(), artifact)
    for spread in (1, 4):
        batch = {name: array * spread for name, array in feed(artifact).items()}
        assert not drift([outputs(artifact, batch)], [outputs(after, batch)], FuseHardswish.tolerance).reasons
    return after, changes


def slope_of(artifact):
    (found,) = [each for each in artifact.model.graph if each.op_type == "HardSigmoid"]
    assert found.attributes.get_float("beta", 0.5) == 0.5
    return found.attributes.get_float("alpha", 0.2)


def test_the_form_of_mobilenet(golden_pass):
    before = net(hardswish(), "batch,3,4,4")
    after, changes = fused(before)
    golden_pass("fuse_hardswish", before, after, changes)
    assert after.operator_counts() == {"HardSwish": 1}


@given(
    grouping=st.sampled_from(GROUPINGS), clip=st.sampled_from(list(CLIPS)), flip=st.booleans(),
    inner=st.sampled_from(["Mul", "Div"]), shape=st.sampled_from(["batch", "batch,5", "batch,2,3,4", "3,batch"]),
)  # fmt: skip
def test_every_grouping(grouping, clip, flip, inner, shape):
    after, changes = fused(net(hardswish(grouping, clip, flip, inner), shape))
    assert after.operator_counts() == {"HardSwish": 1}
    assert changes == ["1 HardSwish and HardSigmoid put together"]


@pytest.mark.parametrize("grouping", [name for name in GROUPINGS if name != "whole"])
@pytest.mark.parametrize("clip", CLIPS)
def test_every_clip_in_every_grouping(grouping, clip):
    after, _ = run_twice(FuseHardswish(), net(hardswish(grouping, clip)))
    assert after.operator_counts() == {"HardSwish": 1}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("last", [("Div", "six"), ("Mul", "sixth")])
def test_a_hard_sigmoid_from_its_ramp(clip, last):
    nodes = [node("Add", "x three", "a"), *CLIPS[clip]("a", "c", "six"), node(last[0], f"c {last[1]}", "y")]
    after, _ = fused(net(nodes))
    assert after.operator_counts() == {"HardSigmoid": 1} and slope_of(after) == pytest.approx(1 / 6)


@given(
    clip=st.sampled_from(list(CLIPS)), slope=st.sampled_from([0.2, 1 / 6, 0.5, -0.3]), divides=st.booleans(),
    flip=st.booleans(),
)  # fmt: skip
def test_a_hard_sigmoid_of_any_slope(clip, slope, divides, flip):
    """Keras takes 1/5; x may stand on either side of the product."""
    factor = 1 / slope if divides else slope
    first = node("Div", "x factor", "t") if divides else node("Mul", "factor x" if flip else "x factor", "t")
    after, _ = fused(net([first, node("Add", "t half", "a"), *CLIPS[clip]("a", "y", "one")], factor=factor))
    assert after.operator_counts() == {"HardSigmoid": 1} and slope_of(after) == pytest.approx(slope)


def test_keras_keeps_its_factor_x():
    """x · hardsigmoid(x) with a slope of 1/5 is no HardSwish, but half of it has a name."""
    nodes = [
        node("Mul", "x fifth", "t"), node("Add", "t half", "a"), node("Clip", "a zero one", "g"), node("Mul", "x g", "y"),
    ]  # fmt: skip
    after, _ = fused(net(nodes))
    assert after.operator_counts() == {"HardSigmoid": 1, "Mul": 1} and slope_of(after) == pytest.approx(0.2)


@pytest.mark.parametrize("grouping", [name for name in GROUPINGS if name not in ("whole", "unit")])
@pytest.mark.parametrize("wrong", [{"three": 2.9}, {"six": 6.1}, {"zero": 0.1}])
def test_wrong_numbers_in_the_ramp(grouping, wrong):
    if wrong == {"six": 6.1} and "sixth" not in grouping:
        wrong = {**wrong, "sixth": 1 / 6.1}
    before = net(hardswish(grouping), **wrong)
    assert run_twice(FuseHardswish(), before) == (before, [])


@pytest.mark.parametrize("clip", ["clip", "clip after relu", "min of max", "max of min", "upper bound after max"])
def test_another_lower_bound(clip):
    before = net(hardswish("product by six", clip), zero=0.1)
    assert run_twice(FuseHardswish(), before) == (before, [])


@pytest.mark.parametrize("clip", CLIPS)
def test_another_upper_bound(clip):
    nodes = [
        node("Add", "x three", "a"),
        *CLIPS[clip]("a", "c", "five"),
        node("Mul", "x c", "p"),
        node("Div", "p six", "y"),
    ]
    before = net(nodes, five=5.0)
    assert run_twice(FuseHardswish(), before) == (before, [])


@pytest.mark.parametrize("grouping", ["product by sixth", "gate by sixth", "x by sixth"])
def test_a_wrong_sixth(grouping):
    before = net(hardswish(grouping), sixth=0.17)
    assert run_twice(FuseHardswish(), before) == (before, [])


@pytest.mark.parametrize("wrong", [{"half": 0.4}, {"one": 0.9}, {"zero": -0.1}])
@pytest.mark.parametrize("clip", ["clip", "max of min", "min of max"])
def test_wrong_numbers_in_the_unit(wrong, clip):
    before = net(hardswish("unit", clip), **wrong)
    assert run_twice(FuseHardswish(), before) == (before, [])


def test_a_hard_sigmoid_of_another_slope_stays_beside_x():
    before = net(hardswish("whole", alpha=0.2))
    assert run_twice(FuseHardswish(), before) == (before, [])


def test_relu6_stays():
    """MobileNetV2 has 35 of them."""
    before = net([node("Clip", "x zero six", "y")])
    assert run_twice(FuseHardswish(), before) == (before, [])


def test_two_different_inputs():
    """a · hardsigmoid(b): the gate of squeeze-and-excitation."""
    nodes = [
        node("Relu", "x", "z"),
        node("Add", "z three", "a"),
        *CLIPS["clip"]("a", "c", "six"),
        node("Div", "c six", "g"),
    ]
    after, _ = fused(net([*nodes, node("Mul", "x g", "y")]))
    assert after.operator_counts() == {"Relu": 1, "HardSigmoid": 1, "Mul": 1}


def test_integers_stay():
    """Where 7 · 6 / 6 is rounded down in between."""
    before = net(hardswish(), dtype="int32")
    assert run_twice(FuseHardswish(), before) == (before, ["1 left: it is computed in integers"])


@pytest.mark.parametrize(("ends", "more", "reason"), [
    (("y", "c"), [], "a value inside it is an output"),
    (("y", "z"), [node("Relu", "c", "z")], "a value inside it is used elsewhere too"),
])  # fmt: skip
@pytest.mark.parametrize("grouping", ["product by six", "gate by six", "x by sixth"])
def test_a_value_inside_that_others_use(ends, more, reason, grouping):
    after, changes = run_twice(FuseHardswish(), before := net([*hardswish(grouping), *more], ends=ends))
    assert after is before and set(changes) <= {f"1 left: {reason}", f"2 left: {reason}"} and changes


def test_a_gate_that_others_use_is_still_a_hard_sigmoid():
    nodes = [*hardswish("gate by six"), node("Relu", "g", "z")]
    after, changes = fused(net(nodes, ends=("y", "z")))
    assert after.operator_counts() == {"HardSigmoid": 1, "Mul": 1, "Relu": 1}
    assert changes == ["1 HardSwish and HardSigmoid put together", "1 left: a value inside it is used elsewhere too"]


def test_bounds_that_are_computed_stay():
    nodes = [
        node("Add", "x three", "a"),
        *CLIPS["clip"]("a", "c", "top"),
        node("Mul", "x c", "p"),
        node("Div", "p six", "y"),
    ]
    weights = {name: np.float32(CONSTANTS[name]) for name in ("three", "zero", "six")}
    before = build(nodes, "x:float32[batch,5] top:float32[]", "y:float32[batch,5]", weights)
    assert run_twice(FuseHardswish(), before) == (before, [])


def test_a_constant_that_adds_an_axis():
    nodes = [node("Add", "x wide", "a"), node("Clip", "a zero six", "c"), node("Div", "c six", "y")]
    weights = {"wide": np.float32([[3]]), "zero": np.float32(0), "six": np.float32(6)}
    before = build(nodes, "x:float32[5]", "y:float32[1,5]", weights)
    assert run_twice(FuseHardswish(), before) == (before, ["1 left: a constant in it may add an axis"])


def test_half_precision():
    before = net(hardswish("product by sixth"), dtype="float16")
    after, _ = run_twice(FuseHardswish(), before)
    batch = feed(before)
    np.testing.assert_allclose(outputs(after, batch)["y"], outputs(before, batch)["y"], rtol=4e-3, atol=1e-3)
    assert after.operator_counts() == {"HardSwish": 1}


def test_an_infinite_slope():
    nodes = [node("Mul", "x factor", "t"), node("Add", "t half", "a"), node("Clip", "a zero one", "y")]
    before = net(nodes, factor=np.inf)
    assert run_twice(FuseHardswish(), before) == (before, ["1 left: its slope is not finite"])
