"""The null target: real outputs, scripted time, so that everything above it can be tested without hardware."""

import json
import math

import numpy as np
import pytest
from models import build, conv_net, feed, no_batch, node, outputs, two_and_two
from queues import latency_percentile, mean_wait

from perwatt.artifact import Artifact
from perwatt.bench.statistics import percentile
from perwatt.bench.traffic import poisson_arrivals
from perwatt.contract import OperatingPoint, as_calls
from perwatt.errors import BackendError
from perwatt.passes.fold_batchnorm import FoldBatchnorm
from perwatt.targets.null import Null, ScriptedClock


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


# Server load --------------------------------------------------------------------------------------------------------


def one_operator(folder):
    """A program that takes 0.05 ms by the script, and its sample."""
    artifact = build([node("Relu", "x", "y")], "x:float32[batch,4]", "y:float32[batch,4]")
    return lowered(artifact, folder, scenario="server"), [feed(artifact, items=1)]


def test_requests_wait_their_turn_and_time_stands_still_otherwise(tmp_path):
    program, samples = one_operator(tmp_path)
    cost = program.cost_ms / 1e3
    # Three at once, one a little later, one after an idle hour.
    window = program.serve(samples, [0.0, 0.0, 0.0, 2.5 * cost, 3600.0])
    assert window.latencies_ms == pytest.approx([program.cost_ms * n for n in (1, 2, 3, 1.5, 1)])
    assert window.wall_s == pytest.approx(3600.0 + cost) and window.cpu_s == pytest.approx(5 * cost)
    assert window.inferences == 5
    assert program.serve(samples, [0.0, 0.0, 0.0, 2.5 * cost, 3600.0]) == window


def test_load_without_requests_is_an_empty_window(tmp_path):
    program, samples = one_operator(tmp_path)
    window = program.serve(samples, [])
    assert (window.inferences, window.wall_s, window.cpu_s, window.latencies_ms) == (0, 0.0, 0.0, [])


def test_the_clock_that_is_given_is_the_one_that_passes(tmp_path):
    program, samples = one_operator(tmp_path)
    clock = ScriptedClock()
    clock.wait_until(100.0)
    window = program.serve(samples, [1.0], clock)
    assert clock.now() == pytest.approx(101.0 + program.cost_ms / 1e3) and window.wall_s == pytest.approx(
        clock.now() - 100.0
    )
    clock.wait_until(0.0)
    assert clock.now() > 101.0


def batch_error(values, batches=30):
    """Standard error of a mean of correlated values: that of the means of batches far longer than the correlation."""
    means = np.mean(np.reshape(values[: len(values) // batches * batches], (batches, -1)), axis=1)
    return float(means.std(ddof=1) / math.sqrt(batches))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8, 0.9])
def test_latencies_on_a_scripted_device_are_those_of_an_m_d_1_queue(load, tmp_path):
    program, samples = one_operator(tmp_path)
    window = program.serve(samples, poisson_arrivals(load * 1e3 / program.cost_ms, seed=7, count=120_000))
    # In units of the service time. Every tolerance is four standard errors of this very run, by batch means: of the mean
    # latency, and of the share of requests beyond the analytic percentile.
    latencies = np.array(window.latencies_ms) / program.cost_ms
    assert latencies.min() >= 1 - 1e-9
    assert latencies.mean() == pytest.approx(1 + mean_wait(load), abs=4 * batch_error(latencies))
    for share in (0.5, 0.9, 0.99):
        error = 4 * batch_error(latencies <= latency_percentile(share, load))
        low, high = latency_percentile(share - error, load), latency_percentile(min(share + error, 0.9999), load)
        assert low - 1e-6 <= percentile(list(latencies), share) <= high + 1e-6
        # Sharp enough to tell the load from one that is 6 % higher.
        assert share != 0.9 or high < latency_percentile(share, 1.06 * load)
    # Utilisation: the variance of n gaps is n/λ².
    assert window.cpu_s / window.wall_s == pytest.approx(load, rel=4 / math.sqrt(120_000))
