"""The null target: real outputs, scripted time, so that everything above it can be tested without hardware."""

import json

import numpy as np
import pytest
from models import build, conv_net, feed, no_batch, outputs, two_and_two

from perwatt.artifact import Artifact
from perwatt.contract import OperatingPoint, as_calls
from perwatt.errors import BackendError
from perwatt.passes.fold_batchnorm import FoldBatchnorm
from perwatt.targets.null import Null


def lowered(artifact, folder, **point):
    artifact.file(folder)
    return Null().lower(artifact, OperatingPoint(**point))


@pytest.mark.parametrize("make", [conv_net, two_and_two, no_batch])
def test_outputs_are_real(make, tmp_path):
    artifact = make()
    batch = feed(artifact, items=7)
    found = lowered(artifact, tmp_path, batch=4).run(batch)
    wanted = outputs(artifact, batch)
    assert list(found) == list(wanted)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_fixed_batch_is_looped(tmp_path):
    batch = feed(conv_net(), items=10)
    found = lowered(conv_net(batch="4"), tmp_path).run(batch)
    assert np.allclose(found["y"], outputs(conv_net(), batch)["y"], atol=1e-5)


def test_time_is_the_sum_of_the_operators_whatever_the_clock_says(tmp_path):
    artifact = conv_net()
    program = lowered(artifact, tmp_path)
    # Two Conv, two BatchNormalization, one Gemm, four others.
    assert program.cost_ms == pytest.approx(2 * 1.0 + 2 * 0.25 + 0.5 + 4 * 0.05)
    calls = as_calls(artifact.signature, [feed(artifact, items=4)], 2)
    window = program.drive(calls, 1.0)
    assert len(window.latencies_ms) == int(1000 / program.cost_ms)
    assert window.inferences == 2 * len(window.latencies_ms)
    assert window.cpu_s == window.wall_s == pytest.approx(len(window.latencies_ms) * program.cost_ms / 1e3)
    assert program.drive(calls, 1.0) == window
    assert len(program.drive(calls, 0.0).latencies_ms) == 1


def test_a_better_graph_costs_less(tmp_path):
    before = conv_net()
    after, _ = FoldBatchnorm().run(before, None)
    assert lowered(after, tmp_path).cost_ms == pytest.approx(lowered(before, tmp_path).cost_ms - 0.5)


def test_a_model_without_operators_still_costs_something(tmp_path):
    program = lowered(build([], "x:float32[batch,4]", "x:float32[batch,4]"), tmp_path)
    assert program.drive([{"x": np.zeros((1, 4), np.float32)}], 0.1).wall_s > 0


def test_saved_and_loaded_it_gives_the_same(tmp_path):
    artifact = conv_net()
    program = lowered(artifact, tmp_path)
    (tmp_path / "bundle").mkdir()
    assert [path.name for path in program.save(tmp_path / "bundle")] == ["model.onnx"]
    loaded = Null().load(tmp_path / "bundle", artifact.signature, OperatingPoint())
    batch = feed(artifact)
    assert np.array_equal(loaded.run(batch)["y"], program.run(batch)["y"])
    assert loaded.cost_ms == program.cost_ms


def test_says_what_it_is_and_that_it_is_always_there(tmp_path):
    target = Null()
    assert target.missing() == [] and target.name() == "null" and target.script() is None
    assert target.capabilities().floating_precisions == ("f32",)
    facts = lowered(conv_net(), tmp_path).facts()
    assert facts["backend"] == "null" and json.dumps(facts)


def test_a_broken_file_is_an_error_in_words(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"this is no model")
    broken = Artifact(path=tmp_path / "m.onnx", signature=conv_net().signature)
    with pytest.raises(BackendError, match="ONNX Runtime refused the model"):
        Null().lower(broken, OperatingPoint())
