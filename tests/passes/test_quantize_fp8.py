"""`quantize-fp8`: E4M3 pairs on what products read and on weights; saturating, close, refused where it isn't wanted."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SYMMETRIC, ask, build, context, conv_net, executed, feed, mlp, node, outputs, transformer, weight

from perwatt.artifact import Artifact
from perwatt.contract import QuantizationStyle
from perwatt.data import Samples
from perwatt.errors import PassError
from perwatt.passes._quantizing import quantized_weight, scale_for
from perwatt.passes.quantize_fp8 import QuantizeFp8

FLOAT8 = QuantizationStyle("float8", "float8_e4m3fn", "float8_e4m3fn", True, weight_per_channel=True)
PER_TENSOR = replace(FLOAT8, weight_per_channel=False)


def asked(artifact, style=FLOAT8, items=24):
    """A context of a backend with that style, with samples."""
    return context(Samples([feed(artifact, items=items)]), styles=(SYMMETRIC, style), execute=executed)


def quantized(artifact, style=FLOAT8, **options):
    """(result, changes), valid and with the signature kept."""
    after, changes = QuantizeFp8(**options).run(artifact, asked(artifact, style))
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    assert after.signature == artifact.signature
    return after, changes


def pairs(artifact):
    """DequantizeLinear in front of each product's first two inputs, or nothing."""
    products = [n for n in artifact.model.graph if n.op_type in ("Conv", "Gemm", "MatMul")]
    return [[v.producer().op_type if v.producer() else "" for v in n.inputs[:2]] for n in products]


def test_products_get_pairs_on_inputs_and_weights(golden_pass):
    before = conv_net(width=4)
    after, changes = quantized(before)
    golden_pass("quantize_fp8", before, after, changes)
    assert pairs(after) == [["DequantizeLinear"] * 2, ["DequantizeLinear"] * 2, ["Flatten", "DequantizeLinear"]]
    held = [v.const_value.dtype.name for v in after.model.graph.initializers.values()]
    assert held.count("FLOAT8E4M3FN") == 3 + 3 + 3, "weights, and the zero points of both"


@pytest.mark.parametrize("style", [FLOAT8, PER_TENSOR])
@pytest.mark.parametrize("make", [conv_net, mlp, transformer])
def test_outputs_stay_near(make, style):
    before = make()
    after, _ = quantized(before, style)
    batch = feed(before, items=16)
    old, new = outputs(before, batch)["y"], outputs(after, batch)["y"]
    assert not np.array_equal(old, new) and np.corrcoef(old.ravel(), new.ravel())[0, 1] > 0.99


def test_the_style_decides_whether_weights_have_a_scale_for_each_channel():
    for style, shape in ((FLOAT8, [4]), (PER_TENSOR, [])):
        after, _ = quantized(conv_net(width=4), style)
        first = next(n for n in after.model.graph if n.op_type == "Conv")
        assert list(first.inputs[1].producer().inputs[1].const_value.shape) == shape


def test_what_lies_beyond_the_samples_saturates():
    before = mlp()
    after, _ = quantized(before)
    batch = feed(before)
    far = {name: array * 1e6 for name, array in batch.items()}
    assert np.isfinite(outputs(after, far)["y"]).all()


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), per_channel=st.booleans()
)  # fmt: skip
@settings(deadline=None)
def test_a_weight_comes_back_within_half_a_step_of_three_bits(values, per_channel):
    held = np.float32([values, values[::-1]])
    codes, scales = quantized_weight(held, 0 if per_channel else None, "float8_e4m3fn")
    assert codes.dtype == ml_dtypes.float8_e4m3fn and scales.shape == ((2,) if per_channel else ())
    back = codes.astype(np.float64) * scales.reshape(-1, 1)
    least = 2.0**-10 * float(scales.max())
    assert np.all(np.abs(back - held) <= np.maximum(np.abs(held) * 2.0**-4 * (1 + 1e-6), least))
    assert np.abs(codes.astype(np.float32)).max() in (0.0, 448.0) or np.abs(held).max() < 1e-35


@given(low=st.floats(-1e6, 0, width=32), high=st.floats(0, 1e6, width=32))
def test_an_activation_s_peak_is_the_largest_code(low, high):
    found = scale_for(low, high, FLOAT8)
    assert float(found.zero_point) == 0.0 and found.zero_point.dtype == ml_dtypes.float8_e4m3fn
    assert max(-low, high) <= 448 * float(found.scale) * (1 + 1e-6)
    assert found.scale > 0


def test_excluded_nodes_stay_and_a_wrong_pattern_is_an_error():
    after, _ = quantized(conv_net(width=4), exclude=("/layer1/*", "/head"))
    assert pairs(after) == [["", ""], ["DequantizeLinear"] * 2, ["Flatten", ""]]
    with pytest.raises(PassError, match="exclude '/layr/\\*' matches no node; names look like /layer1/conv"):
        quantized(conv_net(width=4), exclude=("/layr/*",))


def test_everything_excluded_leaves_the_model_as_it_was():
    before = conv_net(width=4)
    after, changes = quantized(before, exclude=("*",))
    assert after is before and changes == ["nothing was found worth quantizing"]


def test_the_input_stays_as_it_was_and_the_same_seed_gives_the_same_model():
    before = conv_net(width=4)
    digest = before.digest()
    assert quantized(before)[0].digest() == quantized(before)[0].digest()
    assert Artifact(model=before.model).digest() == digest


def test_no_samples_are_an_error_in_words():
    with pytest.raises(PassError, match="there are no samples to calibrate on"):
        QuantizeFp8().run(conv_net(width=4), context(styles=(FLOAT8,)))


def test_an_old_opset_is_raised_to_the_first_with_float8():
    nodes = [node("MatMul", "x w", "y")]
    before = build(nodes, "x:float32[batch,4]", "y:float32[batch,3]", {"w": weight(4, 3)}, opset=17)
    after, _ = quantized(before)
    assert after.model.opset_imports[""] == 19


def test_refuses_with_reasons():
    here = context(styles=(FLOAT8,))
    assert ask(QuantizeFp8(), conv_net(), here) == []
    assert ask(QuantizeFp8(), conv_net(), context()) == ["this backend has no float8 arithmetic here"]
    assert ask(QuantizeFp8(), quantized(conv_net(width=4))[0], here) == [
        "the model is quantized already: 6 DequantizeLinear, 3 QuantizeLinear"
    ]
    plain = build([node("Relu", "x", "y")], "x:float32[batch,4]", "y:float32[batch,4]")
    assert ask(QuantizeFp8(), plain, here) == ["no convolution or matrix product to quantize"]
    old = [node("Upsample", "x scales", "u"), node("Conv", "u w", "y")]
    weights = {"scales": np.float32([1, 1, 2, 2]), "w": weight(2, 3, 3, 3)}
    before = build(old, "x:float32[batch,3,4,4]", "y:float32[batch,2,6,6]", weights, opset=9)
    assert ask(QuantizeFp8(), before, here) == [
        "this needs opset 19, the model is opset 9, and Upsample means something else there"
    ]
