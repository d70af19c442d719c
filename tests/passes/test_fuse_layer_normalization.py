"""`fuse-layer-normalization`: every way to write it, what may follow one, and what only looks like one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import ask, build, feed, node, outputs, run_twice, value, weight
from normal_forms import GROUPINGS, TAKEN_APART, UNPROVEN, Form, forms, possible, varied
from onnx import helper

from perwatt.contract import Tolerance
from perwatt.drift import drift
from perwatt.passes.fuse_layer_normalization import FuseLayerNormalization

HALF = Tolerance(atol=2e-3, rtol=2e-3)
"""Of float16: pieces and operator round at different places."""


def fused(artifact, tolerance=FuseLayerNormalization.tolerance, kinds=None):
    after, changes = run_twice(FuseLayerNormalization(), artifact)
    batch = feed(artifact)
    moved = drift([outputs(artifact, batch)], [outputs(after, batch)], tolerance)
    assert not moved.reasons
    if kinds is not None:
        assert after.operator_counts() == kinds
    return after, changes


def left(artifact, reason):
    """It stays, and says why."""
    after, changes = run_twice(FuseLayerNormalization(), artifact)
    assert after is artifact
    assert {change.split(": ", 1)[-1] for change in changes} == ({reason} if reason else set())


def the_node(artifact):
    return next(n for n in artifact.model.graph if n.op_type == "LayerNormalization")


def scale_and_shift(lengths=(8,)):
    return 1 + weight(*lengths), weight(*lengths, seed=1)


WHOLE = {"LayerNormalization": 1}
γ, β = scale_and_shift()


def test_the_form_of_older_torch(golden_pass):
    before = Form(scale=γ, shift=β).net([-1], "batch,4,8")
    after, changes = fused(before, kinds=WHOLE)
    golden_pass("fuse_layer_normalization", before, after, changes)
    attributes = the_node(after).attributes
    assert attributes.get_int("axis") == -1 and attributes.get_float("epsilon") == pytest.approx(1e-5)


@given(options=forms(), data=st.data())
def test_every_way_to_write_it(options, data):
    written, scaled, shifted = options
    lengths = data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=2))
    outer = data.draw(st.lists(st.integers(1, 3), min_size=3 - len(lengths), max_size=3 - len(lengths)))
    shape = ["batch", *outer, *lengths]
    axes = data.draw(st.permutations(range(len(shape) - len(lengths), len(shape))))
    axes = [axis - len(shape) * data.draw(st.booleans()) for axis in axes]

    def along(seed):
        """Of the lengths, some of them 1, with axes of length 1 before or axes left out."""
        cut = [n if data.draw(st.booleans()) else 1 for n in lengths[:-1]] + lengths[-1:]
        return weight(*[1] * data.draw(st.integers(0, len(outer) + 1)), *cut, seed=seed)

    # With two axes of [batch, …, A, B] that are neither all behind the batch nor all behind the channels.
    shape = ["batch", 2, *shape[1:]] if len(lengths) == 2 else shape
    axes = [axis + (len(lengths) == 2 and axis >= 0) for axis in axes]
    form = Form(**written, scale=1 + along(0) if scaled else None, shift=along(1) if shifted else None)
    after, changes = fused(form.net(axes, ",".join(map(str, shape))), kinds=WHOLE)
    assert changes == ["1 layer normalizations put together"]
    assert the_node(after).attributes.get_int("axis") == -len(lengths)


@pytest.mark.parametrize("root, grouping", [
    (root, grouping)
    for root in ("Div", "Div by Pow", "Reciprocal", "1/√", "Pow", "√ of Reciprocal", "√ of 1/")
    for grouping in GROUPINGS + TAKEN_APART
    if possible(root, grouping, True)
])  # fmt: skip
def test_root_and_grouping(root, grouping):
    after, _ = fused(Form(root=root, grouping=grouping, scale=γ, shift=β).net([-1], "batch,3,8"), kinds=WHOLE)
    names = list(the_node(after).inputs)
    assert [value.name for value in names] == ["x", "γ", "β"], "weights that fit are used as they are"


@pytest.mark.parametrize("opset", [17, 18, 23])
def test_axes_as_attribute_and_as_input(opset):
    before = Form(scale=γ, shift=β, axes_input=opset >= 18).net([-1], "batch,3,8", opset=opset)
    assert ask(FuseLayerNormalization(), before) == []
    fused(before, kinds=WHOLE)


def test_an_opset_that_cannot_be_raised():
    before = Form(scale=γ, shift=β, axes_input=False).net([-1], "batch,3,8", opset=12)
    assert ask(FuseLayerNormalization(), before) == [] or "opset" in ask(FuseLayerNormalization(), before)[0]


def test_two_layers_with_weights_of_their_own():
    first, one = Form(scale=γ, shift=β, target="h").written([-1])
    second, _ = Form(scale=γ, shift=β, source="h").written([-1])
    renamed = [rename(n, {"x", "h", "y", *one}) for n in second]
    before = build(
        [*first, *renamed], "x:float32[batch,3,8]", "y:float32[batch,3,8]", one, inner="h:float32[batch,3,8]"
    )
    _, changes = fused(before, kinds={"LayerNormalization": 2})
    assert changes == ["2 layer normalizations put together"]


def rename(made, kept):
    """The node with other names for all values but the `kept` ones."""
    made.input[:] = [name if name in kept else f"{name}_2" for name in made.input]
    made.output[:] = [name if name in kept else f"{name}_2" for name in made.output]
    return made


# Casts and types ------------------------------------------------------------------------------------------------------


def test_casts_to_float32_and_back_are_the_operators_own():
    half = [array.astype(np.float16) for array in (γ, β)]
    before = Form(scale=half[0], shift=half[1], casts=True, dtype=np.float16).net([-1], "batch,3,8")
    after, _ = fused(before, HALF, kinds=WHOLE)
    assert the_node(after).inputs[0].name == "x"


def test_casts_that_change_nothing():
    fused(Form(scale=γ, shift=β, casts=True).net([-1], "batch,3,8"), kinds=WHOLE)


def test_casts_without_scale():
    fused(Form(casts=True, dtype=np.float16).net([-1], "batch,3,8"), HALF, kinds=WHOLE)


def test_the_cast_stays_where_others_use_it():
    before = Form(scale=γ, shift=β, casts=True).net(
        [-1],
        "batch,3,8",
        more=[node("Add", "x32 s2", "z"), node("Relu", "x32", "s2")][::-1],
        outputs="z:float32[batch,3,8]",
    )
    fused(before, kinds={"LayerNormalization": 1, "Cast": 1, "Relu": 1, "Add": 1})


def test_a_cast_that_others_use_is_still_the_operators_own():
    half = [array.astype(np.float16) for array in (γ, β)]
    form = Form(scale=half[0], shift=half[1], casts=True, dtype=np.float16)
    before = form.net([-1], "batch,3,8", more=[node("Relu", "x32", "z")], outputs="z:float32[batch,3,8]")
    after, _ = fused(before, HALF, kinds={"LayerNormalization": 1, "Cast": 1, "Relu": 1})
    assert the_node(after).inputs[0].name == "x"


def test_scale_in_float32_on_a_float16_input_keeps_the_casts():
    nodes, weights = Form(scale=γ, shift=β, source="h").written([-1])
    nodes = [node("Cast", "x", "h", to=1), *nodes[:-1], node("Add", "s β", "z"), node("Cast", "z", "y", to=10)]
    before = build(nodes, "x:float16[batch,3,8]", "y:float16[batch,3,8]", weights)
    fused(before, HALF, kinds={"LayerNormalization": 1, "Cast": 2})


@pytest.mark.parametrize("dtype, words", [(np.float64, "double"), (np.float16, "float16")])
def test_arithmetic_in_other_types_stays(dtype, words):
    before = Form(scale=γ.astype(dtype), shift=β.astype(dtype), dtype=dtype).net([-1], "batch,3,8")
    left(before, f"it is computed in {words}, LayerNormalization computes in float")


# Near misses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"two": 2.001}, {"two": 3.0}, {"half": 0.51, "root": "Div by Pow"},
                                   {"exponent": -0.49, "root": "Pow"}])  # fmt: skip
def test_wrong_constants_stay(wrong):
    left(Form(scale=γ, shift=β, **wrong).net([-1], "batch,3,8"), None)


def test_epsilon_outside_the_root_stays():
    nodes, weights = Form(scale=γ, shift=β).written([-1])
    nodes = [n for n in nodes if n.output[0] not in ("e", "d")]
    at = [n.output[0] for n in nodes].index("v") + 1
    nodes[at:at] = [node("Sqrt", "v", "e"), node("Add", "e epsilon", "d")]
    left(build(nodes, "x:float32[batch,3,8]", "y:float32[batch,3,8]", weights), None)


def test_the_variance_of_a_sample_stays():
    """Divided by n − 1: scaled by n/(n − 1) behind the mean."""
    nodes, weights = Form(scale=γ, shift=β).written([-1])
    at = [n.output[0] for n in nodes].index("v") + 1
    nodes[at:at] = [node("Mul", "v bessel", "v1")]
    nodes[at + 1].input[0] = "v1"
    left(build(nodes, "x:float32[batch,3,8]", "y:float32[batch,3,8]", {**weights, "bessel": np.float32(8 / 7)}), None)


def test_the_mean_of_something_else_stays():
    nodes, weights = Form(scale=γ, shift=β).written([-1])
    nodes[0].input[0] = "x2"
    nodes.insert(0, node("Relu", "x", "x2"))
    left(build(nodes, "x:float32[batch,3,8]", "y:float32[batch,3,8]", weights), None)


def test_squares_of_something_else_stay():
    nodes, weights = Form(square="Mul", scale=γ, shift=β).written([-1])
    square = next(n for n in nodes if n.output[0] == "sq")
    square.input[1] = "x"
    left(build(nodes, "x:float32[batch,3,8]", "y:float32[batch,3,8]", weights), None)


@pytest.mark.parametrize("which, fast", [(0, False), (1, False), (0, True)])
def test_means_that_drop_their_axis_stay(which, fast):
    nodes, weights = Form(scale=γ, shift=β, fast=fast).written([-1])
    mean = [n for n in nodes if n.op_type == "ReduceMean"][which]
    mean.attribute[0].i = 0
    left(build(nodes, "x:float32[8,8]", "y:float32[8,8]", weights), None)


def test_another_number_than_one_over_the_root():
    """Over σ, it is a scale; over σ², the operator has no place for it."""
    nodes, weights = Form(root="1/√", scale=γ, shift=β).written([-1])
    two = {**weights, "one": np.float32(2)}
    fused(build(nodes, "x:float32[batch,3,8]", "y:float32[batch,3,8]", two), kinds=WHOLE)
    nodes, _ = Form(root="√ of 1/", scale=γ, shift=β).written([-1])
    left(build(nodes, "x:float32[batch,3,8]", "y:float32[batch,3,8]", two), None)


@pytest.mark.parametrize("grouping, shift", [("−μ·f + β", None), ("−μ·f + β", β), ("−(μ·f) + β", β), ("β − μ·f", None)])
def test_signs_count_where_it_is_taken_apart(grouping, shift):
    form = Form(root="Reciprocal", grouping=grouping, scale=γ, shift=shift)
    fused(form.net([-1], "batch,3,8"), kinds=WHOLE)
    nodes, weights = form.written([-1])
    at = next(i for i, n in enumerate(nodes) if n.op_type in ("Neg", "Sub") and n.output[0] != "c")
    nodes[at].CopyFrom(
        node("Abs" if nodes[at].op_type == "Neg" else "Add", " ".join(nodes[at].input), nodes[at].output[0])
    )
    left(build(nodes, "x:float32[batch,3,8]", "y:float32[batch,3,8]", weights), None)


def test_taken_apart_with_two_different_factors_stays():
    nodes, weights = Form(root="Reciprocal", grouping="β − μ·f", scale=γ, shift=β).written([-1])
    moved = next(n for n in nodes if n.output[0] == "μf")
    moved.input[1] = "inv"
    left(build(nodes, "x:float32[batch,3,8]", "y:float32[batch,3,8]", weights), None)


def test_axes_that_are_not_the_last_stay():
    left(Form().net([1], "batch,3,8"), "the axes that it normalizes are not the last ones")


def test_different_axes_of_mean_and_variance_stay():
    before = Form(variance_axes=[-2]).net([-1], "batch,3,8")
    left(before, "its mean and variance are taken over different axes")


def test_axes_that_are_computed_stay():
    before = Form().net([-1], "batch,3,8")
    before.model.graph.initializers["axes"].const_value = None
    after, changes = FuseLayerNormalization().run(before, None)
    assert after is before and changes == ["1 left: which axes it normalizes is not known"]


def test_lengths_that_nobody_knows_stay():
    left(Form(scale=γ).net([-1], "batch,3,wide"), "how long the axes are that it normalizes is not known")


@pytest.mark.parametrize("shape, wider", [((3, 8), "2,3,8"), ((2, 1, 1, 8), "2,2,3,8"), ((1, 1, 1, 8), "1,2,3,8")])
def test_a_scale_with_more_rows_stays_outside(shape, wider):
    """The rest is put together: the scale stays behind it."""
    nodes, weights = Form(scale=weight(*shape), shift=β).written([-1])
    before = build(nodes, "x:float32[2,3,8]", f"y:float32[{wider}]", weights)
    _, changes = fused(before, kinds={"LayerNormalization": 1, "Mul": 1, "Add": 1})
    assert changes[0] == "1 layer normalizations put together"
    assert changes[1].endswith("its scale or shift varies along other axes than those normalized")


def test_a_scale_that_would_widen_the_axis_stays_outside():
    nodes, weights = Form(scale=γ).written([-1])
    before = build(nodes, "x:float32[batch,3,1]", "y:float32[batch,3,8]", weights)
    fused(before, kinds={"LayerNormalization": 1, "Mul": 1})


def test_a_scale_that_is_computed_stays_outside():
    nodes, weights = Form(scale=γ, shift=β).written([-1])
    nodes.insert(0, node("Exp", "g", "γ"))
    del weights["γ"]
    before = build(nodes, "x:float32[batch,3,8] g:float32[batch,1,8]", "y:float32[batch,3,8]", weights)
    fused(before, kinds={"LayerNormalization": 1, "Mul": 1, "Add": 1, "Exp": 1})


@pytest.mark.parametrize("inside", ["μ", "c", "v", "d", "n"])
def test_a_value_inside_that_others_use(inside):
    before = Form(scale=γ, shift=β).net(
        [-1], "batch,3,8", more=[node("Relu", inside, "z")], outputs="z:float32[batch,3,?]"
    )
    after, changes = run_twice(FuseLayerNormalization(), before)
    assert changes[-1].endswith("a value inside it is used elsewhere too")
    # What is used elsewhere may be the result of a smaller one.
    assert (after is before) == (inside != "n")


@pytest.mark.parametrize("inside", ["μ", "c", "d"])
def test_a_value_inside_that_is_an_output(inside):
    before = Form(scale=γ, shift=β).net([-1], "batch,3,8", outputs=f"{inside}:float32[batch,3,?]")
    left(before, "a value inside it is an output")


@pytest.mark.parametrize("axes, of", [([2, 3], "batch,3,4,5"), ([1, 2, 3], "batch,3,4,5"), ([1, 2], "batch,3,8")])
def test_all_behind_batch_or_channels_is_left_to_other_passes(axes, of):
    left(Form().net(axes, of), None)
    left(Form(scale=weight(3, *[1] * (of.count(",") - 1))).net(axes, of), None)


def test_images_normalized_as_a_whole_with_a_scale_of_their_size():
    before = Form(scale=weight(3, 4, 5), shift=weight(3, 4, 5, seed=1)).net([1, 2, 3], "batch,3,4,5")
    after, _ = fused(before, kinds=WHOLE)
    assert the_node(after).attributes.get_int("axis") == -3


# The variance apart ---------------------------------------------------------------------------------------------------


UNSQUEEZED = [node("Unsqueeze", "v0 at", "v")]
RESHAPED = [node("Reshape", "v0 into", "v")]
EXPANDED = [node("Reshape", "v0 into", "v1"), node("Expand", "v1 over", "v")]


@pytest.mark.parametrize("restore, stored, noted", [
    (UNSQUEEZED, {"at": np.int64([-1])}, ""), (UNSQUEEZED, {"at": np.int64([2])}, ""),
    (RESHAPED, {"into": np.int64([-1, 3, 1])}, ""), (RESHAPED, {"into": np.int64([0, 3, 1])}, ""),
    (EXPANDED, {"into": np.int64([0, 3, 1]), "over": np.int64([1, 3, 1])}, "v:float32[batch,3,1]"),
])  # fmt: skip
def test_a_variance_that_loses_its_axis_and_gets_it_back(restore, stored, noted):
    fused(varied([-1], restore, stored, noted, scale=γ), kinds=WHOLE)


@pytest.mark.parametrize("restore, stored, noted, shape", [
    (UNSQUEEZED, {"at": np.int64([1])}, "", "8,8,8"), (RESHAPED, {"into": np.int64([0, 1, 8])}, "", "8,8,8"),
    (EXPANDED, {"into": np.int64([0, 3, 1]), "over": np.int64([1, 3, 1])}, "", "batch,3,8"),
    (EXPANDED, {"into": np.int64([0, 3, 1]), "over": np.int64([1, 3, 8])}, "v:float32[batch,3,8]", "batch,3,8"),
])  # fmt: skip
def test_a_variance_that_may_get_other_axes_stays(restore, stored, noted, shape):
    left(varied([-1], restore, stored, noted, shape, scale=γ), UNPROVEN)


def test_a_mean_within_the_variance_over_other_axes_stays():
    before = varied([-1], UNSQUEEZED, {"at": np.int64([-1]), "inner": np.int64([-2])}, "", "8,8,8")
    left(before, "its mean and variance are taken over different axes")


# Unknown shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 8])
def test_the_length_follows_from_the_operators_before(width):
    """As TorchScript exports: no shapes inside. Lengths come from the table and the matrices."""
    nodes, weights = Form(scale=γ, shift=β, source="h").written([-1])
    before = [
        node("Gather", "table x", "t"), node("MatMul", "q w", "m"), node("Add", "t m", "a"), node("Cast", "a", "h", to=1),
    ]  # fmt: skip
    weights |= {"table": weight(7, width), "w": weight(4, 8)}
    made = build([*before, *nodes], "x:int64[batch,3] q:float32[batch,3,4]", "y:float32[batch,3,8]", weights)
    fused(made, kinds={"Gather": 1, "MatMul": 1, "Add": 1, "Cast": 1, "LayerNormalization": 1})


@pytest.mark.parametrize("maker, inputs", [
    (node("Gather", "table x", "h", axis=1), "x:int64[wide]"), (node("Gather", "table x", "h", axis=-1), "x:int64[wide]"),
    (node("Reshape", "x into", "h"), "x:float32[3,wide]"), (node("Exp", "x", "h"), "x:float32[3,wide]"),
])  # fmt: skip
def test_the_length_does_not_follow(maker, inputs):
    nodes, weights = Form(source="h").written([-1])
    weights |= {"table": weight(3, 8), "into": np.int64([3, -1])}
    kept = {name: array for name, array in weights.items() if any(name in n.input for n in [maker, *nodes])}
    left(
        build([maker, *nodes], inputs, "y:float32[3,wide]", kept),
        "how long the axes are that it normalizes is not known",
    )


# LayerNormalization that is there -------------------------------------------------------------------------------------


def layer(scale, shift=None, kinds=("Mul", "Add"), flip=False, dtype=np.float32, **attributes):
    """LayerNormalization of that scale and shift, then products and sums with γ and β of those `kinds`."""
    names = {"Mul": "γ", "Add": "β"}
    nodes = [node("LayerNormalization", "x s b" if shift is not None else "x s", "h0", **attributes)]
    for position, kind in enumerate(kinds):
        pair = [f"h{position}", names[kind]]
        nodes.append(node(kind, " ".join(pair[::-1] if flip else pair), f"h{position + 1}"))
    nodes[-1].output[0] = "y"
    weights = {"s": scale, "b": shift, "γ": γ, "β": β}
    used = {name for n in nodes for name in n.input}
    kept = {name: np.asarray(array, dtype) for name, array in weights.items() if name in used}
    kind = np.dtype(dtype).name
    return build(nodes, f"x:{kind}[batch,3,8]", f"y:{kind}[batch,3,8]", kept)


@given(
    kinds=st.sampled_from([("Mul", "Add"), ("Mul",), ("Add",), ("Add", "Mul")]),
    scale=st.sampled_from([np.ones(8), weight(8, seed=2)]),
    shift=st.sampled_from([None, np.zeros(8), weight(8, seed=3)]), flip=st.booleans(),
)  # fmt: skip
def test_what_follows_one_is_taken_in(kinds, scale, shift, flip):
    after, _ = fused(layer(scale, shift, kinds, flip, epsilon=1e-3), kinds=WHOLE)
    assert the_node(after).attributes.get_float("epsilon") == pytest.approx(1e-3)


def test_ones_and_nothing_take_the_tensors_as_they_are():
    after, _ = fused(layer(np.ones(8)), kinds=WHOLE)
    assert [value.name for value in the_node(after).inputs] == ["x", "γ", "β"]


def test_one_over_two_axes():
    nodes = [node("LayerNormalization", "x s", "h", axis=2), node("Mul", "h γ", "y")]
    weights = {"s": weight(3, 8), "γ": weight(1, 8, seed=4)}
    fused(build(nodes, "x:float32[batch,2,3,8]", "y:float32[batch,2,3,8]", weights), kinds=WHOLE)


def test_half_types_are_merged_only_where_nothing_is_rounded():
    fused(layer(np.ones(8), np.zeros(8), dtype=np.float16), HALF, kinds=WHOLE)
    left(layer(weight(8), dtype=np.float16), "a scale of type float16 would be rounded once more")


def test_the_type_that_it_computes_in_is_kept():
    after, _ = run_twice(FuseLayerNormalization(), layer(np.ones(8), stash_type=16))
    assert the_node(after).attributes.get_int("stash_type") == 16


def test_its_own_scale_that_is_computed():
    nodes = [node("Exp", "g", "s"), node("LayerNormalization", "x s", "h"), node("Mul", "h γ", "y")]
    before = build(nodes, "x:float32[batch,3,8] g:float32[8]", "y:float32[batch,3,8]", {"γ": γ})
    left(before, "the operator's own scale or shift is computed, not stored")


def test_its_mean_is_used():
    nodes = [node("LayerNormalization", "x s", "h mean"), node("Mul", "h γ", "y")]
    before = build(
        nodes,
        "x:float32[batch,3,8]",
        "y:float32[batch,3,8] mean:float32[batch,3,1]",
        {"s": np.ones(8, np.float32), "γ": γ},
    )
    left(before, "a value inside it is an output")


def test_inside_an_if():
    nodes, weights = Form(scale=γ, shift=β, target="out").written([-1])
    out = [value("out:float32[batch,3,8]")]
    yes = helper.make_graph(nodes, "yes", [], out)
    no = helper.make_graph([node("Relu", "x", "out")], "no", [], out)
    branching = node("If", "which", "y", then_branch=yes, else_branch=no)
    before = build([branching], "x:float32[batch,3,8] which:bool[]", "y:float32[batch,3,8]", weights)
    after, changes = run_twice(FuseLayerNormalization(), before)
    assert changes == ["1 layer normalizations put together"]
    assert after.operator_counts() == {"If": 1, "LayerNormalization": 1, "Relu": 1}
