"""Pairs and stored integers: scales hold their range and zero, weights keep half a step, biases take back what was shifted."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import ASYMMETRIC, SYMMETRIC, build, node, outputs, weight

from perwatt.artifact import Artifact, Step
from perwatt.contract import QuantizationStyle
from perwatt.fusion import names_in, remove_unused
from perwatt.passes._placement import place, products
from perwatt.passes._quantizing import correct_biases, put_pairs, quantized_weight, scale_for

SIGNED = QuantizationStyle("signed", "int8", "int8", False, True, unsigned_activations=False)
SIGNED_SYMMETRIC = QuantizationStyle("signed", "int8", "int8", True, True, unsigned_activations=False)
ONE_SCALE = QuantizationStyle("one", "int8", "int8", True, False)
STYLES = (SYMMETRIC, ASYMMETRIC, SIGNED, SIGNED_SYMMETRIC, ONE_SCALE)
NOT_FINITE = (np.nan, np.nan)


# Scales ---------------------------------------------------------------------------------------------------------------


@given(
    ends=st.tuples(*[st.floats(-(2.0**99), 2.0**99, width=32) | st.floats(-4, 4, width=32)] * 2).map(sorted),
    style=st.sampled_from(STYLES),
)
def test_a_range_and_zero_are_held_to_half_a_step(ends, style):
    found = scale_for(*ends, style)
    scale, zero = float(found.scale), int(found.zero_point)
    kind = np.iinfo(found.zero_point.dtype)
    assert scale > 0 and np.isfinite(scale) and kind.min <= zero <= kind.max
    # Zero has a code of its own, whatever the range.
    for x in (0.0, *ends):
        code = np.clip(np.rint(x / scale) + zero, kind.min, kind.max)
        # The zero point is a whole number: it may push the ends out by as much as it is rounded by.
        assert abs((code - zero) * scale - x) <= scale * (0.5 if x == 0 else 0.51) + 1e-37
    assert found.zero_point.dtype == (np.int8 if kind.min else np.uint8)
    if not style.unsigned_activations:
        assert found.zero_point.dtype == np.int8
    if style.activation_symmetric:
        assert zero == 0


def test_values_that_are_never_negative_have_an_unsigned_type_where_there_is_one():
    assert scale_for(0.0, 2.55, SYMMETRIC) == scale_for(0.5, 2.55, SYMMETRIC)
    assert scale_for(0.0, 2.55, SYMMETRIC).zero_point.dtype == np.uint8
    assert np.isclose(scale_for(0.0, 2.55, SYMMETRIC).scale, 0.01)
    assert np.isclose(scale_for(0.0, 2.54, SIGNED_SYMMETRIC).scale, 0.02)
    found = scale_for(0.0, 2.55, SIGNED)
    assert np.isclose(found.scale, 0.01) and found.zero_point == -128
    assert scale_for(-2.55, 0.0, ASYMMETRIC).zero_point == 255


# Weights --------------------------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4), axis=st.sampled_from([None, 0, 1, -1]), seed=st.integers(0, 99),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e20]),
)  # fmt: skip
def test_weights_keep_half_a_step_and_each_channel_s_peak_is_used_up(shape, axis, seed, scale):
    weights = weight(*shape, seed=seed, scale=scale)
    weights[0] = 0 if seed % 3 == 0 else weights[0]
    codes, scales = quantized_weight(weights, axis)
    assert codes.dtype == np.int8 and codes.shape == weights.shape and codes.min() >= -127
    assert scales.dtype == np.float32 and (scales > 0).all()
    assert scales.shape == (() if axis is None else (shape[axis],))
    spread = (
        scales if axis is None else scales.reshape([-1 if a == axis % len(shape) else 1 for a in range(len(shape))])
    )
    assert (np.abs(codes * spread.astype(np.float64) - weights) <= spread * 0.50001).all()
    over = tuple(a for a in range(len(shape)) if axis is None or a != axis % len(shape))
    peaks, used = np.abs(weights).max(axis=over), np.abs(codes).max(axis=over)
    assert (np.where(peaks > 0, used, 127) == 127).all()


IMAGE, ROWS = "x:float32[batch,4,9,9]", "x:float32[batch,8]"
KINDS = {
    "conv": (node("Conv", "x w b", "y", pads=[1] * 4), (6, 4, 3, 3), 6, IMAGE),
    "strided": (node("Conv", "x w b", "y", strides=[2, 2]), (6, 4, 3, 3), 6, IMAGE),
    "grouped": (node("Conv", "x w b", "y", group=2), (6, 2, 3, 3), 6, IMAGE),
    "depthwise": (node("Conv", "x w b", "y", group=4), (4, 1, 3, 3), 4, IMAGE),
    "transposed": (node("ConvTranspose", "x w b", "y"), (4, 6, 3, 3), 6, IMAGE),
    "transposed-strided": (node("ConvTranspose", "x w b", "y", strides=[2, 2]), (4, 6, 2, 2), 6, IMAGE),
    "transposed-grouped": (node("ConvTranspose", "x w b", "y", group=2, strides=[3, 2]), (4, 3, 3, 2), 6, IMAGE),
    "gemm": (node("Gemm", "x w b", "y", alpha=0.5, beta=2.0), (8, 5), 5, ROWS),
    "gemm-turned": (node("Gemm", "x w b", "y", transB=1, alpha=-3.0), (5, 8), 5, ROWS),
    "gemm-data-turned": (node("Gemm", "x w b", "y", transA=1), (8, 5), 5, "x:float32[8,7]"),
}


def product_net(kind, opset=23):
    made, shape, outs, spec = KINDS[kind]
    out = "float32[batch,?,?,?]" if len(shape) == 4 else "float32[batch,5]" if spec == ROWS else "float32[7,5]"
    weights = {"w": weight(*shape), "b": weight(outs, seed=2)}
    return build([made], spec, f"y:{out}", weights, opset=opset)


def quantized(artifact, ranges=NOT_FINITE, style=SYMMETRIC, means=None, others=()):
    """The artifact with pairs, checked; every site has `ranges`, or what it has there by name."""
    digest = artifact.digest()
    model = artifact.edit()
    placement = place(model.graph, products(model.graph), others)
    taken = names_in(model)
    if means is not None:
        correct_biases(model, placement, means, style, taken)
    held = ranges if isinstance(ranges, dict) else dict.fromkeys(placement.sites, ranges)
    put_pairs(model, placement, held, style, taken)
    remove_unused(model)
    after = artifact.after(model, Step("quantize"))
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    assert Artifact(model=artifact.model).digest() == digest
    return after


def fed(artifact, items=16, mean=0.0, seed=5):
    shape = [d if isinstance(d, int) else items for d in artifact.signature.inputs[0].shape]
    random = np.random.default_rng(seed)
    channels = random.standard_normal(shape[1]) if len(shape) > 1 else 0
    along = channels.reshape([-1 if axis == 1 else 1 for axis in range(len(shape))])
    if artifact.signature.inputs[0].shape[0] == 8:
        along = random.standard_normal((8, 1))
    return {"x": (random.standard_normal(shape) + mean * (1 + along)).astype(np.float32)}


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_every_kind_calculate_what_they_did_to_their_roundings(kind, style):
    before = product_net(kind)
    batch = fed(before)
    peak = float(np.abs(batch["x"]).max())
    after = quantized(before, (-peak, peak), style)
    old, new = outputs(before, batch)["y"], outputs(after, batch)["y"]
    assert np.abs(old - new).max() > 0 and np.sqrt(np.mean((old - new) ** 2)) < 0.03 * old.std()
    counts = after.operator_counts()
    assert counts["QuantizeLinear"] == 1 and counts["DequantizeLinear"] == 2
    codes = [t for t in after.model.graph.initializers.values() if t.const_value.size == np.prod(KINDS[kind][1])]
    assert [t.const_value.dtype.name for t in codes] == ["INT8"]


@pytest.mark.parametrize("opset", [13, 17, 19, 21, 24])
@pytest.mark.parametrize("kind", ["conv", "transposed-grouped", "gemm-turned"])
def test_every_opset_from_thirteen_on_has_such_pairs(kind, opset):
    before = product_net(kind, opset)
    batch = fed(before)
    peak = float(np.abs(batch["x"]).max())
    new = outputs(quantized(before, (-peak, peak)), batch)["y"]
    assert np.array_equal(new, outputs(quantized(product_net(kind), (-peak, peak)), batch)["y"])


def test_a_weight_of_two_products_is_stored_once_for_both():
    nodes = [node("Conv", "x w", "a", pads=[1] * 4), node("Conv", "a w", "y", pads=[1] * 4)]
    before = build(nodes, IMAGE, "y:float32[batch,4,9,9]", {"w": weight(4, 4, 3, 3)}, inner="a:float32[batch,4,9,9]")
    after = quantized(before, (-9.0, 9.0))
    assert after.operator_counts()["DequantizeLinear"] == 3
    assert (
        sum(
            t.const_value.dtype.name == "INT8" and t.const_value.size > 9
            for t in after.model.graph.initializers.values()
        )
        == 1
    )
    batch = fed(before)
    old, new = outputs(before, batch)["y"], outputs(after, batch)["y"]
    assert np.sqrt(np.mean((old - new) ** 2)) < 0.1 * old.std()


def test_a_weight_that_somebody_else_reads_stays_as_it_is_for_him():
    nodes = [node("Gather", "w ids", "e"), node("MatMul", "e w", "y")]
    before = build(nodes, "ids:int64[batch]", "y:float32[batch,6]", {"w": weight(6, 6)}, inner="e:float32[batch,6]")
    after = quantized(before, (-1.0, 1.0))
    gather = next(n for n in after.model.graph if n.op_type == "Gather")
    assert np.array_equal(gather.inputs[0].const_value.numpy(), weight(6, 6))


# Pairs ----------------------------------------------------------------------------------------------------------------


def joined():
    nodes = [
        node("Relu", "x", "a"), node("Neg", "x", "b"), node("Concat", "a b", "c", axis=1), node("MatMul", "c w", "m"),
        node("MatMul", "z v", "n"), node("Add", "m n", "y"),
    ]  # fmt: skip
    inner = "a:float32[batch,4] b:float32[batch,4] c:float32[batch,8] m:float32[batch,3] n:float32[batch,3]"
    weights = {"w": weight(8, 3), "v": weight(4, 3)}
    return build(nodes, "x:float32[batch,4] z:float32[batch,4]", "y:float32[batch,3]", weights, inner=inner)


def scales(artifact):
    return {
        n.inputs[0].name: (float(n.inputs[1].const_value.numpy()), int(n.inputs[2].const_value.numpy()))
        for n in artifact.model.graph if n.op_type == "QuantizeLinear"
    }  # fmt: skip


def test_what_is_concatenated_shares_the_scale_of_the_whole():
    found = scales(quantized(joined(), {"a": (0.0, 2.0), "b": (-5.08, 1.0), "z": (-1.27, 1.0)}))
    assert found == {"a": found["b"], "b": (np.float32(0.04), 0), "z": (np.float32(0.01), 0)}


@pytest.mark.parametrize("bad", [NOT_FINITE, (-np.inf, 1.0), (0.0, np.inf)])
def test_what_is_not_finite_stays_with_all_that_would_share_its_scale(bad):
    assert set(scales(quantized(joined(), {"a": bad, "b": (-1.0, 1.0), "z": (-1.0, 1.0)}))) == {"z"}
    assert set(scales(quantized(joined(), {"a": (0.0, 1.0), "b": bad, "z": (-1.0, 1.0)}))) == {"z"}


def test_constants_and_zeros_can_be_quantized():
    before = joined()
    for value in (0.0, 1e-42, -3.0):
        after = quantized(before, {"a": (value, value), "b": (value, value), "z": (value, value)})
        batch = {"x": np.zeros((2, 4), np.float32), "z": np.full((2, 4), value, np.float32)}
        assert np.allclose(outputs(after, batch)["y"], outputs(before, batch)["y"], atol=0.02 * abs(value) + 1e-6)


def test_types_and_shapes_of_what_is_put_in_are_noted():
    after = quantized(joined(), (-1.0, 1.0))
    made = [v for n in after.model.graph if n.op_type in ("QuantizeLinear", "DequantizeLinear") for v in n.outputs]
    assert made and all(v.dtype is not None and v.shape is not None for v in made)
    assert {v.dtype.name for v in made} == {"FLOAT", "INT8"}


# Biases ---------------------------------------------------------------------------------------------------------------


def means_of(artifact, batch):
    (product,) = products(artifact.model.graph)
    axis = 1 if product.kind in ("Conv", "ConvTranspose") else 0 if product.data_turned else -1
    x = batch["x"]
    return {"x": x.mean(axis=tuple(a for a in range(x.ndim) if a != axis % x.ndim))}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "conv"])
@pytest.mark.parametrize("style", [SYMMETRIC, ONE_SCALE], ids=["per-channel", "per-tensor"])
def test_the_mean_of_outputs_comes_back_to_what_it_was(kind, style):
    before = product_net(kind)
    batch = fed(before, mean=20.0, items=40)
    axes = (0, 2, 3) if KINDS[kind][3] == IMAGE else (0,)
    wanted = outputs(before, batch)["y"].mean(axis=axes)
    # Activations stay as they are: what is seen is the weights' rounding alone.
    plain, corrected = (quantized(before, means=means, style=style) for means in (None, means_of(before, batch)))
    off = [np.abs(outputs(after, batch)["y"].mean(axis=axes) - wanted).max() for after in (plain, corrected)]
    # A transposed convolution's borders see fewer terms than its middle.
    assert off[1] < (0.5 if kind == "transposed" else 0.2) * off[0]


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1,)])
def test_the_bias_added_behind_a_matrix_product_is_corrected_too(shape):
    nodes = [node("MatMul", "x w", "m"), node("Add", "b m", "y")]
    spec = "float32[batch,5]"
    before = build(nodes, ROWS, f"y:{spec}", {"w": weight(8, 5), "b": weight(*shape)}, inner=f"m:{spec}")
    batch = fed(before, mean=20.0, items=40)
    wanted = outputs(before, batch)["y"].mean(axis=0)
    plain, corrected = (quantized(before, means=means) for means in (None, {"x": batch["x"].mean(axis=0)}))
    off = [np.abs(outputs(after, batch)["y"].mean(axis=0) - wanted).max() for after in (plain, corrected)]
    assert off[1] < 0.05 * off[0]


@pytest.mark.parametrize("means", [np.full(8, np.nan), np.array(3.0), np.ones(7), np.ones(1)])
def test_means_that_say_nothing_correct_nothing(means):
    before = product_net("gemm")
    assert quantized(before, means={"x": means}).digest() == quantized(before).digest()


def test_a_bias_that_counts_for_nothing_stays():
    before = build(
        [node("Gemm", "x w b", "y", beta=0.0)], ROWS, "y:float32[batch,5]", {"w": weight(8, 5), "b": weight(5)}
    )
    assert quantized(before, means={"x": np.ones(8)}).digest() == quantized(before).digest()


def test_products_without_bias_and_biases_that_are_computed_stay():
    bare = build([node("Gemm", "x w", "y")], ROWS, "y:float32[batch,5]", {"w": weight(8, 5)})
    asked = build([node("Gemm", "x w b", "y")], f"{ROWS} b:float32[5]", "y:float32[batch,5]", {"w": weight(8, 5)})
    for before in (bare, asked):
        assert quantized(before, means={"x": np.ones(8)}).digest() == quantized(before).digest()


def test_a_bias_of_two_products_is_corrected_for_each():
    nodes = [node("Gemm", "x w b", "p"), node("Gemm", "x v b", "q"), node("Sub", "p q", "y")]
    spec = "float32[batch,5]"
    weights = {"w": weight(8, 5), "v": weight(8, 5, seed=1), "b": weight(5)}
    before = build(nodes, ROWS, f"y:{spec}", weights, inner=f"p:{spec} q:{spec}")
    batch = fed(before, mean=20.0, items=40)
    after = quantized(before, means={"x": batch["x"].mean(axis=0)})
    off = [
        np.abs((outputs(each, batch)["y"] - outputs(before, batch)["y"]).mean(axis=0)).max()
        for each in (quantized(before), after)
    ]
    assert off[1] < 0.05 * off[0]
