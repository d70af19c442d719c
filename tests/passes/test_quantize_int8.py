"""`quantize-int8`: real NNCF on tiny nets; pairs where they belong, exclusions kept, equal seeds give equal models."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import (
    ASYMMETRIC,
    SYMMETRIC,
    ask,
    build,
    context,
    conv_net,
    feed,
    inner_types,
    node,
    outputs,
    transformer,
    weight,
)

from perwatt.artifact import Artifact
from perwatt.data import Samples
from perwatt.errors import PassError
from perwatt.passes.quantize_int8 import QuantizeInt8


def samples(artifact, items=24):
    """Calibration data for `artifact`."""
    return Samples([feed(artifact, items=items)])


def quantized(artifact, given=None, **settings):
    """(result, changes): valid, with the caller's names and types kept, the input untouched."""
    given = given or context(samples(artifact))
    digest, types = artifact.digest(), inner_types(artifact)
    after, changes = QuantizeInt8(**settings).run(artifact, given)
    assert Artifact(model=artifact.model).digest() == digest and inner_types(artifact) == types
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    assert after.signature == artifact.signature
    return after, changes


def producers(artifact, operator):
    """For each node of `operator`: what gives its first two inputs ('' where nothing computes them)."""
    nodes = [n for n in artifact.model.graph if n.op_type == operator]
    return [[v.producer().op_type if v is not None and v.producer() else "" for v in n.inputs[:2]] for n in nodes]


def test_convolutions_and_products_get_pairs_on_inputs_and_weights(golden_pass):
    before = conv_net(width=4)
    after, changes = quantized(before)
    golden_pass("quantize_int8", before, after, changes)
    assert producers(after, "Conv") == [["DequantizeLinear"] * 2] * 2
    # What feeds the product is quantized before the pooling, which takes it as it comes.
    assert producers(after, "Gemm") == [["Flatten", "DequantizeLinear"]]
    assert producers(after, "GlobalAveragePool") == [["DequantizeLinear"]]
    assert after.size_bytes() < before.size_bytes() / 2


def test_outputs_stay_near():
    before = conv_net()
    after, _ = quantized(before)
    batch = feed(before, items=16)
    old, new = outputs(before, batch)["y"], outputs(after, batch)["y"]
    assert np.corrcoef(old.ravel(), new.ravel())[0, 1] > 0.97


def test_backends_without_unsigned_types_get_signed_ones_over_the_same_range():
    before = conv_net(width=4)
    data = samples(before)
    unsigned, _ = quantized(before, context(data, styles=(SYMMETRIC,)))
    signed, _ = quantized(before, context(data, styles=(replace(SYMMETRIC, unsigned_activations=False),)))
    kinds = [{v.const_value.dtype.name for v in zero_points(a)} for a in (unsigned, signed)]
    assert kinds == [{"INT8", "UINT8"}, {"INT8"}]
    batch = feed(before, items=16)
    exact, coarse, fine = (outputs(a, batch)["y"].ravel() for a in (before, signed, unsigned))
    assert np.corrcoef(exact, coarse)[0, 1] > 0.97 and not np.array_equal(coarse, fine)


def zero_points(artifact):
    """The zero points of all quantized activations."""
    return [n.inputs[2] for n in artifact.model.graph if n.op_type == "QuantizeLinear"]


def test_weights_have_a_scale_for_each_channel():
    after, _ = quantized(conv_net(width=4))
    first = next(n for n in after.model.graph if n.op_type == "Conv")
    assert list(first.inputs[1].producer().inputs[1].const_value.shape) == [4]


def test_the_same_seed_gives_the_same_model_and_another_subset_another():
    before = conv_net(width=4)
    given = context(samples(before))
    digests = [quantized(before, given, subset_size=10)[0].digest() for _ in range(2)]
    assert digests[0] == digests[1]
    other = context(given.samples("calibrate"), seed=1)
    assert quantized(before, other, subset_size=10)[0].digest() != digests[0]


def test_the_subset_is_what_is_used():
    assert "on 10 samples" in quantized(conv_net(width=4), subset_size=10)[1][0]
    assert "on 24 samples" in quantized(conv_net(width=4), subset_size=1000)[1][0]


def test_saved_and_loaded_it_is_the_same_model(tmp_path):
    after, _ = quantized(conv_net(width=4))
    after.save(tmp_path / "m.onnx")
    assert Artifact(path=tmp_path / "m.onnx").digest() == after.digest()


def test_excluded_nodes_stay_in_floating_point():
    after, _ = quantized(conv_net(width=4), exclude=("/layer1/*", "/head"))
    assert producers(after, "Conv") == [["", ""], ["DequantizeLinear"] * 2]
    assert producers(after, "Gemm")[0][1] == ""


def test_everything_excluded_leaves_the_model_as_it_was():
    before = conv_net(width=4)
    after, changes = quantized(before, exclude=("*",))
    assert after is before and changes == ["nothing was found worth quantizing"]


@pytest.mark.parametrize("exclude", [("/layr1/*",), ("/layer1/*", "/layr1/*")])
def test_a_pattern_that_matches_nothing_is_an_error_that_shows_names(exclude):
    with pytest.raises(PassError) as error:
        quantized(conv_net(width=4), exclude=exclude)
    assert str(error.value) == "exclude '/layr1/*' matches no node; names look like /layer1/conv, /n1, /layer1/relu"


def test_nodes_without_names_can_be_quantized_and_excluded():
    nodes = [node("Conv", "x w", "c"), node("Conv", "c v", "y")]
    weights = {"w": weight(8, 3, 3, 3), "v": weight(8, 8, 3, 3)}
    before = build(nodes, "x:float32[batch,3,8,8]", "y:float32[batch,8,4,4]", weights)
    after, _ = quantized(before, exclude=("Conv_0",))
    assert producers(after, "Conv") == [["", ""], ["DequantizeLinear"] * 2]


def test_presets_decide_whether_activations_are_symmetric():
    before = conv_net(width=4)
    held = samples(before)
    made = {preset: quantized(before, context(held), preset=preset)[0] for preset in ("performance", "mixed")}
    zero = {
        preset: model.model.graph.initializers["zero_point_x_1"].const_value.numpy() for preset, model in made.items()
    }
    assert zero["performance"] == 0 != zero["mixed"]
    assert quantized(before, context(held))[0].digest() == made["performance"].digest()
    assert quantized(before, context(held, styles=(ASYMMETRIC,)))[0].digest() == made["mixed"].digest()


def test_transformers_are_recognised_and_calibrated_on_sentences_of_any_length():
    before = transformer()
    held = Samples([feed(before, items=4, words=length, seed=length) for length in (3, 7)])
    after, changes = quantized(before, context(held))
    assert "transformer scheme" in changes[0] and "on 8 samples" in changes[0]
    assert "plain scheme" in quantized(before, context(held), model_type="plain")[1][0]
    assert np.isfinite(outputs(after, feed(before))["y"]).all()


def test_a_fixed_batch_is_calibrated_in_calls_of_its_size():
    before = conv_net(batch="4", width=4)
    after, _ = quantized(before, context(samples(before, items=10)))
    assert after.signature.batch == 4


def test_no_samples_are_an_error_in_words():
    with pytest.raises(PassError, match="NNCF could not quantize this model"):
        quantized(conv_net(width=4), context(Samples([])))


def test_asks_for_int8_for_something_to_quantize_and_for_a_model_that_is_not_quantized_yet():
    made_by = QuantizeInt8()
    before = conv_net(width=4)
    assert ask(made_by, before) == []
    assert ask(made_by, before, context(styles=())) == ["this backend has no int8 arithmetic"]
    assert ask(made_by, quantized(before)[0]) == ["the model is quantized already"]
    plain = build([node("Relu", "x", "y")], "x:float32[batch,4]", "y:float32[batch,4]")
    assert ask(made_by, plain) == ["no convolution or matrix product to quantize"]
