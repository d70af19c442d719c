"""`fuse-instance-normalization`: every way to write it, by channel, and what belongs to layer or group normalization."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node, outputs, run_twice, weight
from normal_forms import GROUPINGS, TAKEN_APART, UNPROVEN, Form, forms, possible, varied

from perwatt.drift import drift
from perwatt.passes.fuse_instance_normalization import FuseInstanceNormalization

WHOLE = {"InstanceNormalization": 1}
γ, β = 1 + weight(3, 1, 1), weight(3, 1, 1, seed=1)


def fused(artifact, kinds=None):
    after, changes = run_twice(FuseInstanceNormalization(), artifact)
    batch = feed(artifact)
    moved = drift([outputs(artifact, batch)], [outputs(after, batch)], FuseInstanceNormalization.tolerance)
    assert not moved.reasons
    if kinds is not None:
        assert after.operator_counts() == kinds
    return after, changes


def left(artifact, reason):
    """It stays, and says why."""
    after, changes = run_twice(FuseInstanceNormalization(), artifact)
    assert after is artifact
    assert {change.split(": ", 1)[-1] for change in changes} == ({reason} if reason else set())


def the_node(artifact):
    return next(n for n in artifact.model.graph if n.op_type == "InstanceNormalization")


def test_the_form_of_an_image_net(golden_pass):
    before = Form(square="Mul", scale=γ, shift=β).net([2, 3], "batch,3,4,5")
    after, changes = fused(before, kinds=WHOLE)
    golden_pass("fuse_instance_normalization", before, after, changes)


@given(options=forms(), data=st.data())
def test_every_way_to_write_it(options, data):
    written, scaled, shifted = options
    channels = data.draw(st.integers(1, 4))
    spatial = data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=3))
    shape = ["batch", channels, *spatial]
    axes = data.draw(st.permutations(range(2, len(shape))))
    axes = [axis - len(shape) * data.draw(st.booleans()) for axis in axes]

    def along(seed):
        leading = [1] * data.draw(st.integers(0, 1))
        return weight(*leading, channels, *[1] * len(spatial), seed=seed)

    form = Form(**written, scale=1 + along(0) if scaled else None, shift=along(1) if shifted else None)
    before = form.net(axes, ",".join(map(str, shape)))
    if len(spatial) == 1 and (channels == 1 or not (scaled or shifted)):
        left(before, None)
        return
    after, changes = fused(before, kinds=WHOLE)
    assert changes == ["1 instance normalizations put together"]
    assert the_node(after).inputs[1].shape == the_node(after).inputs[2].shape == (channels,)


@pytest.mark.parametrize("root, grouping", [
    (root, grouping)
    for root in ("Div", "Reciprocal", "1/√", "Pow")
    for grouping in GROUPINGS + TAKEN_APART
    if possible(root, grouping, True)
])  # fmt: skip
def test_root_and_grouping(root, grouping):
    fused(Form(root=root, grouping=grouping, scale=γ, shift=β).net([2, 3], "batch,3,4,5"), kinds=WHOLE)


@pytest.mark.parametrize("scale, shift", [(None, None), (γ, None), (None, β), (np.float32(2), np.float32([0.5]))])
def test_global_average_pools_as_means(scale, shift):
    fused(Form(means="GlobalAveragePool", scale=scale, shift=shift).net([2, 3], "batch,3,4,5"), kinds=WHOLE)


def test_axes_as_attribute():
    fused(Form(scale=γ, shift=β, axes_input=False).net([2, 3], "batch,3,4,5", opset=17), kinds=WHOLE)


@pytest.mark.parametrize("axes", [[1, 2], [3], [1, 2, 3]])
def test_other_axes_stay(axes):
    left(Form(scale=γ, shift=β).net(axes, "batch,3,4,5"), None)


@pytest.mark.parametrize("scale", [weight(5), weight(4, 5), weight(3, 4, 5), weight(3, 1, 5)])
def test_a_scale_that_is_not_by_channel_stays(scale):
    left(Form(scale=scale).net([2, 3], "batch,3,4,5"), None)


@pytest.mark.parametrize("scale, of", [(weight(4, 1), "batch,3,4,5"), (weight(2, 3, 1, 1), "2,3,4,5")])
def test_a_scale_along_another_axis_too_stays_outside(scale, of):
    _, changes = fused(Form(scale=scale, shift=β).net([2, 3], of))
    assert changes[-1].endswith("left: its scale or shift varies along other axes than the channels")


def test_a_scale_that_would_widen_the_channels_stays_outside():
    nodes, weights = Form(scale=weight(5, 1, 1)).written([2, 3])
    before = build(nodes, "x:float32[batch,1,4,5]", "y:float32[batch,5,4,5]", weights)
    _, changes = fused(before)
    assert changes[-1].endswith("left: its scale or shift varies along other axes than the channels")


def test_a_single_axis_without_scale_is_a_layer_normalization():
    left(Form().net([2], "batch,3,8"), None)
    left(Form(scale=weight(8)).net([2], "batch,3,8"), None)
    fused(Form(scale=weight(3, 1)).net([2], "batch,3,8"), kinds=WHOLE)


@pytest.mark.parametrize("dtype, words", [(np.float64, "double"), (np.float16, "float16")])
def test_arithmetic_in_other_types_stays(dtype, words):
    before = Form(scale=γ.astype(dtype), shift=β.astype(dtype), dtype=dtype).net([2, 3], "batch,3,4,5")
    left(before, f"it is computed in {words}, InstanceNormalization computes in float")


def test_the_number_of_channels_is_not_known():
    reason = "the rank or number of channels of what it normalizes is not known"
    left(Form(scale=γ, shift=β).net([2, 3], "batch,many,4,5"), reason)


def test_the_rank_is_not_known():
    before = build(*_with_unknown_rank())
    left(before, "the rank or number of channels of what it normalizes is not known")


def _with_unknown_rank():
    nodes, weights = Form(scale=γ, shift=β, source="h").written([-2, -1])
    return (
        [node("Reshape", "x shape", "h"), *nodes],
        "x:float32[batch,60] shape:int64[rank]",
        "y:float32[?,?,?,?]",
        weights,
    )


@pytest.mark.parametrize("inside", ["μ", "c", "d"])
def test_a_value_inside_that_others_use(inside):
    before = Form(scale=γ, shift=β).net(
        [2, 3], "batch,3,4,5", more=[node("Relu", inside, "z")], outputs="z:float32[batch,3,?,?]"
    )
    left(before, "a value inside it is used elsewhere too")


def test_epsilon_outside_the_root_stays():
    nodes, weights = Form(scale=γ, shift=β).written([2, 3])
    nodes = [n for n in nodes if n.output[0] not in ("e", "d")]
    at = [n.output[0] for n in nodes].index("v") + 1
    nodes[at:at] = [node("Sqrt", "v", "e"), node("Add", "e epsilon", "d")]
    left(build(nodes, "x:float32[batch,3,4,5]", "y:float32[batch,3,4,5]", weights), None)


@pytest.mark.parametrize("into, proven", [((0, 3, 1, 1), True), ((-1, 3, 1, 1), True), ((3, 1, 1, 3), False)])
def test_a_variance_that_loses_its_axes_and_gets_them_back(into, proven):
    before = varied([-2, -1], [node("Reshape", "v0 into", "v")], {"into": np.int64(into)}, "", "3,3,3,3")
    fused(before, kinds=WHOLE) if proven else left(before, UNPROVEN)


# InstanceNormalization that is there ----------------------------------------------------------------------------------


@given(
    kinds=st.sampled_from([("Mul", "Add"), ("Mul",), ("Add",), ("Add", "Mul")]),
    scale=st.sampled_from([np.ones(3), weight(3, seed=2)]), shift=st.sampled_from([np.zeros(3), weight(3, seed=3)]),
)  # fmt: skip
def test_what_follows_one_is_taken_in(kinds, scale, shift):
    nodes = [node("InstanceNormalization", "x s b", "h0", epsilon=1e-3)]
    nodes += [
        node(kind, f"h{at} {'γ' if kind == 'Mul' else 'β'}", f"h{at + 1}" if at + 1 < len(kinds) else "y")
        for at, kind in enumerate(kinds)
    ]
    used = {name for n in nodes for name in n.input}
    weights = {"s": np.float32(scale), "b": np.float32(shift), "γ": γ, "β": β}
    kept = {name: array for name, array in weights.items() if name in used}
    after, _ = fused(build(nodes, "x:float32[batch,3,4,5]", "y:float32[batch,3,4,5]", kept), kinds=WHOLE)
    assert the_node(after).attributes.get_float("epsilon") == pytest.approx(1e-3)


def test_what_follows_one_but_not_by_channel_stays():
    nodes = [node("InstanceNormalization", "x s b", "h"), node("Mul", "h γ", "y")]
    weights = {"s": weight(3), "b": weight(3, seed=1), "γ": weight(4, 5)}
    before = build(nodes, "x:float32[batch,3,4,5]", "y:float32[batch,3,4,5]", weights)
    left(before, "its scale or shift varies along other axes than the channels")
