"""`fuse-group-normalization`: torch's three operators and a scale, pieces over groups, one group, and what isn't one."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import ask, build, feed, node, outputs, proto, run_twice, weight
from normal_forms import UNPROVEN, Form, forms, varied

from perwatt.artifact import Artifact
from perwatt.drift import drift
from perwatt.passes.fuse_group_normalization import FuseGroupNormalization

WHOLE = {"GroupNormalization": 1}
γ, β = 1 + weight(6, 1, 1), weight(6, 1, 1, seed=1)
NOT_PROVEN = "the shapes don't prove that it is reshaped into groups of channels"


def fused(artifact, kinds=None, **sizes):
    after, changes = run_twice(FuseGroupNormalization(), artifact)
    batch = feed(artifact, **sizes)
    moved = drift([outputs(artifact, batch)], [outputs(after, batch)], FuseGroupNormalization.tolerance)
    assert not moved.reasons
    if kinds is not None:
        assert after.operator_counts() == kinds
    return after, changes


def left(artifact, reason):
    """It stays, and says why."""
    after, changes = run_twice(FuseGroupNormalization(), artifact)
    assert after is artifact
    assert {change.split(": ", 1)[-1] for change in changes} == ({reason} if reason else set())


def the_node(artifact):
    return next(n for n in artifact.model.graph if n.op_type == "GroupNormalization")


def torch_form(
    groups=2, into=(0, 2, -1), back="Shape", scale=γ, shift=β, own=None, of="batch,6,4,5", inner="", **attributes
):
    """Reshape → InstanceNormalization → Reshape → Mul → Add, as torch exports it."""
    nodes = [
        node("Reshape", "x into", "g", **attributes),
        node("InstanceNormalization", "g s b", "i", epsilon=1e-4),
        *([node("Shape", "x", "back")] if back == "Shape" else []),
        node("Reshape", "i back", "n"),
        *([node("Mul", "n γ", "m")] if scale is not None else []),
        *([node("Add", "m β" if scale is not None else "n β", "a")] if shift is not None else []),
    ]
    nodes[-1].output[0] = "y"
    own = own or (np.ones(groups, np.float32), np.zeros(groups, np.float32))
    weights = {"into": np.int64(into), "s": own[0], "b": own[1], "γ": scale, "β": shift}
    weights |= {} if back == "Shape" else {"back": np.int64(back)}
    kept = {name: array for name, array in weights.items() if array is not None}
    return build(nodes, f"x:float32[{of}]", f"y:float32[{of}]", kept, inner=inner)


def test_the_form_of_torch(golden_pass):
    before = torch_form()
    after, changes = fused(before, kinds=WHOLE)
    golden_pass("fuse_group_normalization", before, after, changes)
    attributes = the_node(after).attributes
    assert attributes.get_int("num_groups") == 2 and attributes.get_float("epsilon") == pytest.approx(1e-4)


@given(
    groups=st.integers(1, 3), each=st.integers(1, 3), spatial=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    scaled=st.booleans(), shifted=st.booleans(), plain=st.booleans(), leading=st.integers(0, 1), data=st.data(),
)  # fmt: skip
def test_any_groups_and_shapes(groups, each, spatial, scaled, shifted, plain, leading, data):
    channels = groups * each
    per_channel = (*[1] * leading, channels, *[1] * len(spatial))
    rest = each * int(np.prod(spatial))
    into = data.draw(st.sampled_from([(0, groups, -1), (0, groups, rest), (-1, groups, rest), (0, groups, each, -1)]))
    back = data.draw(
        st.sampled_from(["Shape", (0, channels, *spatial), (-1, channels, *spatial), (0, channels, *spatial[:-1], -1)])
    )
    own = None if plain else (1 + weight(groups, seed=5), weight(groups, seed=6))
    before = torch_form(
        groups, into, back, 1 + weight(*per_channel) if scaled else None, weight(*per_channel, seed=1) if shifted else None,
        own, ",".join(map(str, ["batch", channels, *spatial])),
    )  # fmt: skip
    after, changes = fused(before, kinds=WHOLE)
    assert changes == ["1 group normalizations put together"]
    assert the_node(after).inputs[1].shape == the_node(after).inputs[2].shape == (channels,)


def test_shapes_that_are_computed_but_noted():
    """What inference found out counts as much as what is stored."""
    nodes = [
        node("Shape", "x", "all"), node("Gather", "all zero", "n"), node("Concat", "n tail", "into", axis=0),
        node("Reshape", "x into", "g"), node("InstanceNormalization", "g s b", "i"),
        node("Concat", "n home", "back", axis=0), node("Reshape", "i back", "y"),
    ]  # fmt: skip
    weights = {"zero": np.int64([0]), "tail": np.int64([2, -1]), "home": np.int64([6, 4, 5])}
    weights |= {"s": np.ones(2, np.float32), "b": np.zeros(2, np.float32)}
    spec = ("x:float32[batch,6,4,5]", "y:float32[batch,6,4,5]", weights)
    fused(build(nodes, *spec, inner="g:float32[batch,2,60]"), kinds=WHOLE)
    left(build(nodes, *spec), NOT_PROVEN)


def pieces(form, into, axes, of="batch,6,4,5", more=()):
    """Reshape → pieces of a normalization → Reshape."""
    nodes, weights = Form(**form, source="g", target="i").written(axes)
    nodes = [
        node("Reshape", "x into", "g"),
        *nodes,
        node("Shape", "x", "back"),
        node("Reshape", "i back", "n" if more else "y"),
        *more,
    ]
    weights |= {"into": np.int64(into)} | ({"scale": γ, "shift": β} if more else {})
    return build(nodes, f"x:float32[{of}]", f"y:float32[{of}]", weights)


@given(
    options=forms(groupings=("behind",), shifted=False), deep=st.booleans(), affine=st.booleans(), noted=st.booleans()
)
def test_pieces_over_groups(options, deep, affine, noted):
    written, _, _ = options
    more = [node("Mul", "scale n", "m"), node("Add", "shift m", "y")] if affine else []
    into, axes = ((0, 2, 3, 4, 5), [2, 3, 4]) if deep else ((0, 2, -1), [-1])
    before = pieces(written, into, axes, more=more)
    if noted:
        before.model.graph[0].outputs[0].shape = _shape("batch", 2, *((3, 4, 5) if deep else (60,)))
    after, _ = fused(before, kinds=WHOLE)
    assert the_node(after).attributes.get_int("num_groups") == 2


def _shape(*lengths):
    return ir.Shape(lengths)


@given(options=forms(), data=st.data())
def test_a_single_group(options, data):
    written, scaled, shifted = options
    spatial = data.draw(st.lists(st.integers(2, 4), min_size=1, max_size=2))
    per_channel = (6, *[1] * len(spatial))
    scale, shift = (1 + weight(*per_channel) if scaled else None), (weight(*per_channel, seed=1) if shifted else None)
    before = Form(**written, scale=scale, shift=shift).net(
        range(1, len(spatial) + 2), ",".join(map(str, ["batch", 6, *spatial]))
    )
    after, _ = fused(before, kinds=WHOLE)
    assert the_node(after).attributes.get_int("num_groups") == 1


@pytest.mark.parametrize("into, proven", [((0, 1, 1), True), ((1, 1, 3), False)])
def test_a_variance_that_loses_its_axes_and_gets_them_back(into, proven):
    before = varied([-2, -1], [node("Reshape", "v0 into", "v")], {"into": np.int64(into)}, "", "3,3,3")
    fused(before, kinds=WHOLE) if proven else left(before, UNPROVEN)


# Near misses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "into, of", [((2, 2, -1), "batch,6,4,5"), ((-1, 2, 30), "batch,6,4,5"), ((0, 4, -1), "batch,6,4,5")]
)
def test_reshaped_into_something_else_stays(into, of):
    left(torch_form(groups=into[1], into=into, of=of), NOT_PROVEN)


def test_zeros_that_are_meant():
    """With allowzero, 0 is a length of 0, not a copy."""
    left(torch_form(into=(0, 2, 60), of="batch,6,4,5", allowzero=1), NOT_PROVEN)
    before = torch_form(back=(0, 6, 4, 5), scale=None, shift=None)
    list(before.model.graph)[-1].attributes["allowzero"] = ir.AttrInt64("allowzero", 1)
    left(before, "it is not reshaped back to where it came from")


def test_reshaped_back_to_another_shape_stays():
    left(torch_form(back=(-1, 6, 5, 4), scale=None, shift=None), "it is not reshaped back to where it came from")


def reshaped_by(shape_nodes, of, back, inputs=""):
    """x through groups and back to the shape that those nodes make."""
    nodes = [node("Reshape", "x into", "g"), node("InstanceNormalization", "g s b", "i"), *shape_nodes]
    nodes.append(node("Reshape", "i back", "y"))
    weights = {"into": np.int64([0, 2, -1]), "s": np.ones(2, np.float32), "b": np.zeros(2, np.float32)}
    return build(nodes, f"x:float32[{of}] {inputs}", f"y:float32[{back}]", weights)


def test_reshaped_back_to_the_shape_of_x():
    fused(reshaped_by([node("Shape", "x", "back", start=0)], "batch,6,4,5", "batch,6,4,5"), kinds=WHOLE)


def test_reshaped_back_to_a_part_of_the_shape_of_x():
    reason = "it is not reshaped back to where it came from"
    left(reshaped_by([node("Shape", "x", "back", end=3)], "batch,6,4,1", "batch,6,4"), reason)


def test_reshaped_back_to_the_shape_of_something_else():
    other = [node("Shape", "z", "back")]
    left(
        reshaped_by(other, "batch,6,4,5", "batch,6,5,4", "z:float32[batch,6,5,4]"),
        "it is not reshaped back to where it came from",
    )


@pytest.mark.parametrize("axes", [[3, 4], [-2, -1]])
@pytest.mark.parametrize("noted", [True, False])
def test_only_a_part_of_a_group_is_normalized(axes, noted):
    before = pieces({}, (0, 2, 3, 4, 5), axes)
    if noted:
        before.model.graph[0].outputs[0].shape = _shape("batch", 2, 3, 4, 5)
    left(before, "not all axes of a group are normalized")


@pytest.mark.parametrize("scale", [weight(4, 5), weight(6, 4, 5), weight(5)])
def test_a_scale_that_is_not_by_channel_stays_outside(scale):
    _, changes = fused(torch_form(scale=scale, shift=None), kinds={"GroupNormalization": 1, "Mul": 1})
    assert changes[-1].endswith("left: its scale or shift varies along other axes than the channels")


@pytest.mark.parametrize("scale", [weight(4, 5), weight(6, 4, 5), weight(5)])
def test_all_axes_with_a_scale_of_their_own_are_a_layer_normalization(scale):
    left(Form(scale=scale).net([1, 2, 3], "batch,6,4,5"), None)


def test_a_single_axis_is_no_group():
    left(Form().net([1], "batch,8"), None)
    left(Form().net([2], "batch,3,8"), None)


def test_unknown_channels():
    left(torch_form(of="batch,many,4,5"), "the rank or number of channels of what it normalizes is not known")


def test_no_axis_behind_the_channels():
    left(torch_form(scale=weight(6), shift=None, of="batch,6"), "there is no axis behind the channels")


def test_weights_of_the_instance_that_are_computed():
    nodes = [
        node("Exp", "e", "s"), node("Reshape", "x into", "g"), node("InstanceNormalization", "g s b", "i"),
        node("Shape", "x", "back"), node("Reshape", "i back", "y"),
    ]  # fmt: skip
    weights = {"into": np.int64([0, 2, -1]), "b": np.zeros(2, np.float32)}
    before = build(nodes, "x:float32[batch,6,4,5] e:float32[2]", "y:float32[batch,6,4,5]", weights)
    left(before, "the operator's own scale or shift is computed, not stored")


@pytest.mark.parametrize("dtype, words", [(np.float64, "double"), (np.float16, "float16")])
def test_arithmetic_in_other_types_stays(dtype, words):
    before = Form(dtype=dtype).net([1, 2, 3], "batch,6,4,5")
    left(before, f"it is computed in {words}, GroupNormalization computes in float")


@pytest.mark.parametrize("inside", ["g", "i", "n", "m"])
def test_a_value_inside_that_others_use(inside):
    before = torch_form()
    graph = before.model.graph
    value = next(v for n in graph for v in n.outputs if v.name == inside)
    graph.outputs.append(value)
    value.type = graph.outputs[0].type
    value.shape = _shape("batch", 6, 4, 5) if inside in ("n", "m") else _shape("batch", 2, 60)
    after, changes = run_twice(FuseGroupNormalization(), before)
    assert changes[-1].endswith("a value inside it is an output")
    assert (after is before) == (inside in ("g", "i"))


def test_the_older_operator_with_a_scale_for_each_group():
    nodes = [node("GroupNormalization", "x s b", "y", num_groups=2)]
    weights = {"s": weight(2), "b": weight(2, seed=1)}
    # A model that the checker refuses: the operator is deprecated.
    made = proto(nodes, "x:float32[batch,6,4,5]", "y:float32[batch,6,4,5]", weights, opset=18)
    before = Artifact(model=ir.from_proto(made))
    assert "its GroupNormalization is that of opset 18, with a scale for each group" in ask(
        FuseGroupNormalization(), before
    )


@given(
    kinds=st.sampled_from([("Mul", "Add"), ("Mul",), ("Add",), ("Add", "Mul")]),
    scale=st.sampled_from([np.ones(6), weight(6, seed=2)]), shift=st.sampled_from([np.zeros(6), weight(6, seed=3)]),
)  # fmt: skip
def test_what_follows_one_is_taken_in(kinds, scale, shift):
    nodes = [node("GroupNormalization", "x s b", "h0", epsilon=1e-3, num_groups=3)]
    nodes += [
        node(kind, f"h{at} {'γ' if kind == 'Mul' else 'β'}", f"h{at + 1}" if at + 1 < len(kinds) else "y")
        for at, kind in enumerate(kinds)
    ]
    used = {name for n in nodes for name in n.input}
    weights = {"s": np.float32(scale), "b": np.float32(shift), "γ": γ, "β": β}
    kept = {name: array for name, array in weights.items() if name in used}
    after, _ = fused(build(nodes, "x:float32[batch,6,4,5]", "y:float32[batch,6,4,5]", kept), kinds=WHOLE)
    attributes = the_node(after).attributes
    assert attributes.get_int("num_groups") == 3 and attributes.get_float("epsilon") == pytest.approx(1e-3)
