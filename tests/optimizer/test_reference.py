"""The numeric reference: what the file says is what is computed, for any number of items, with any value tapped."""

import numpy as np
import onnx_ir as ir
import pytest
from models import build, context, conv_net, feed, mlp, no_batch, node, outputs, proto, transformer, weight

from perwatt.artifact import Artifact
from perwatt.errors import BackendError
from perwatt.passes.cast_half import CastHalf
from perwatt.reference import Reference


def ran(artifact, folder, batches, taps=(), **options):
    return list(Reference(artifact, folder, taps, **options).run(batches))


def test_gives_the_outputs_of_every_batch(tmp_path):
    artifact = transformer()
    batches = [feed(artifact, items=2, words=3), feed(artifact, items=1, words=9)]
    found = ran(artifact, tmp_path, batches)
    assert [
        np.array_equal(out["y"], outputs(artifact, batch)["y"]) for out, batch in zip(found, batches, strict=True)
    ] == [True] * 2


def test_a_fixed_batch_is_looped_and_its_remainder_cut(tmp_path):
    batch = feed(conv_net(), items=10)
    (found,) = ran(conv_net(batch="4"), tmp_path, [batch])
    assert np.allclose(found["y"], outputs(conv_net(), batch)["y"], atol=1e-5)


def test_a_model_without_a_batch_axis_is_called_once(tmp_path):
    (found,) = ran(no_batch(), tmp_path, [feed(no_batch())])
    assert found["y"].shape == (3,)


def test_tapped_values_come_beside_the_outputs(tmp_path):
    artifact = conv_net()
    batch = feed(artifact)
    (found,) = ran(artifact, tmp_path, [batch], taps=["r1", "p", "p", "y"])
    assert list(found) == ["y", "r1", "p"]
    assert found["r1"].shape == (3, 8, 8, 8) and (found["r1"] >= 0).all()
    assert np.allclose(found["y"], outputs(artifact, batch)["y"])
    assert [spec.name for spec in artifact.signature.outputs] == ["y"]


def test_values_without_a_recorded_type_can_be_tapped(tmp_path):
    artifact = build(
        [node("MatMul", "x w", "m"), node("Relu", "m", "y")], "x:float32[b,4]", "y:float32[b,3]", {"w": weight(4, 3)}
    )
    (found,) = ran(artifact, tmp_path, [feed(artifact)], taps=["m"])
    assert np.array_equal(np.maximum(found["m"], 0), found["y"])


def test_a_tap_that_is_no_value_of_the_graph_is_an_error_in_words(tmp_path):
    with pytest.raises(BackendError, match="computes no value 'nope' to look at"):
        Reference(conv_net(), tmp_path, ["nope"])


def test_letting_the_runtime_fuse_changes_next_to_nothing(tmp_path):
    artifact = conv_net()
    batch = feed(artifact)
    (found,) = ran(artifact, tmp_path, [batch], optimized=True)
    assert np.allclose(found["y"], outputs(artifact, batch)["y"], atol=1e-4)


def test_a_type_that_onnx_runtime_has_no_kernels_for_is_run_by_the_interpreter(tmp_path):
    half, _ = CastHalf().run(conv_net(), context())
    batch = feed(conv_net())
    runner = Reference(half, tmp_path)
    assert runner.interpreter is not None
    (found,) = runner.run([batch])
    exact = outputs(conv_net(), batch)["y"]
    assert found["y"].dtype == np.float32 and not np.array_equal(found["y"], exact)
    assert np.allclose(found["y"], exact, atol=0.05 * np.abs(exact).max()), "bfloat16 keeps two to three digits"


def test_a_model_that_neither_can_run_is_an_error_in_the_words_of_both(tmp_path):
    made = proto([node("Odd", "x", "y", domain="nobodys")], "x:float32[2,4]", "y:float32[2,4]")
    odd = Artifact(model=ir.from_proto(made))
    with pytest.raises(BackendError, match=r"ONNX Runtime can't run this model: .*the interpreter has no") as error:
        Reference(odd, tmp_path)
    assert "\n" not in str(error.value) and "[ONNXRuntimeError]" not in str(error.value)


def test_an_input_that_it_fails_on_is_an_error_in_words(tmp_path):
    with pytest.raises(BackendError, match="ONNX Runtime failed on 2 samples: "):
        ran(mlp(), tmp_path, [{"x": np.zeros((2, 5), np.float32)}])
