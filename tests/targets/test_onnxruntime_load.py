"""Load beside ONNX Runtime: all calls are counted, requests wait their turn, failures are errors in words."""

import numpy as np
import pytest
from models import build, conv_net, feed, mlp, no_batch, node, outputs, transformer, two_and_two, weight

from perwatt.contract import OperatingPoint, as_calls
from perwatt.errors import BackendError
from perwatt.targets._onnxruntime_load import Replayed
from perwatt.targets.null import ScriptedClock
from perwatt.targets.onnxruntime import ONNXRuntime

TARGET = ONNXRuntime()


def lowered(artifact, folder, **point):
    """The program, in one thread for each stream unless the test says otherwise."""
    artifact.file(folder)
    return TARGET.lower(artifact, OperatingPoint(**{"threads": point.get("streams") or 2, **point}))


def same(old, new, atol=1e-5):
    """Equal names in order, equal types and shapes, values within `atol`."""
    assert list(old) == list(new)
    for name in old:
        assert old[name].dtype == new[name].dtype and old[name].shape == new[name].shape
        assert np.allclose(old[name], new[name], atol=atol)


def picky(folder, **point):
    """A program that takes rows whose length is a multiple of four, and fails on all others."""
    artifact = build(
        [node("Reshape", "x to", "r"), node("MatMul", "r w", "y")], "x:float32[a,b]", "y:float32[c,2]",
        {"to": np.int64([-1, 4]), "w": weight(4, 2)},
    )  # fmt: skip
    return lowered(artifact, folder, **point)


@pytest.mark.parametrize("scenario", ["single-stream", "offline", "server"])
@pytest.mark.parametrize("streams", [1, 3])
def test_load_completes_all_its_calls_and_counts_them(scenario, streams, tmp_path):
    artifact = conv_net()
    program = lowered(artifact, tmp_path, scenario=scenario, batch=4, streams=streams)
    calls = as_calls(artifact.signature, [feed(artifact, items=10)], 4)
    for seconds in (0.0, 0.05):
        window = program.drive(calls, seconds)
        assert window.inferences == 4 * len(window.latencies_ms) > 0
        assert window.wall_s >= seconds and window.cpu_s >= 0 and window.energy_j is None
        assert all(latency > 0 for latency in window.latencies_ms)


def test_a_call_is_one_inference_where_there_is_no_batch_axis(tmp_path):
    artifact = no_batch()
    window = lowered(artifact, tmp_path, scenario="offline", streams=1).drive([feed(artifact)], 0.0)
    assert window.inferences == len(window.latencies_ms) == 1


def test_inferences_are_those_of_the_samples_that_were_fed(tmp_path):
    artifact = transformer()
    calls = [feed(artifact, items=2, words=words) for words in (3, 9, 5)]
    program = lowered(artifact, tmp_path, scenario="offline", batch=2, streams=2)
    window = program.serve(calls, [0.0] * 30)
    assert window.inferences == 60 and len(window.latencies_ms) == 30
    same(outputs(artifact, calls[1]), program.run(calls[1]))


def test_requests_are_served_when_due_and_wait_their_turn(tmp_path):
    artifact = conv_net()
    program = lowered(artifact, tmp_path, scenario="server", batch=2, streams=1)
    calls = as_calls(artifact.signature, [feed(artifact, items=6)], 2)
    window = program.serve(calls, [0.0] * 20 + [0.05])
    together = window.latencies_ms[:20]
    assert together == sorted(together) and together[0] > 0
    assert window.inferences == 42 and len(window.latencies_ms) == 21
    assert window.wall_s >= 0.05 and max(window.latencies_ms) <= 1e3 * window.wall_s and window.cpu_s > 0


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_the_clock_that_is_given_says_when_a_request_is_due(streams, tmp_path):
    program = lowered(mlp(), tmp_path, scenario="server", streams=streams)
    window = program.serve([feed(mlp(), items=1)], [0.0, 3600.0, 7200.0], ScriptedClock())
    # Hours pass at once; a stream that is late by the others' jumps in time waited as long as they were.
    assert window.wall_s == 7200.0 and len(window.latencies_ms) == 3
    assert all(0 <= latency <= 7.2e6 for latency in window.latencies_ms)
    assert streams > 1 or window.latencies_ms == [0.0, 0.0, 0.0]


class Delays(ScriptedClock):
    """Time in which each request is waited for, and its answer read half a second after it was due."""

    def now(self):
        return self.moment + 0.5


def test_latency_counts_from_when_a_request_was_due_in_the_order_of_arrival_in_scripted_time(tmp_path):
    program = lowered(mlp(), tmp_path, scenario="server", streams=1)
    # Reading the clock adds half a second to any moment waited for; the start was read so too.
    window = program.serve([feed(mlp(), items=1)], [0.0, 1.0, 1.0, 5.0], Delays())
    assert window.latencies_ms == [500.0] * 4


def test_load_without_requests_is_an_empty_window(tmp_path):
    window = lowered(mlp(), tmp_path, scenario="server", streams=2).serve([feed(mlp(), items=1)], [])
    assert window.inferences == 0 and window.latencies_ms == []


@pytest.mark.parametrize("scenario", ["single-stream", "offline", "server"])
@pytest.mark.parametrize("streams", [1, 3])
def test_a_failure_under_load_is_an_error_in_words_and_not_the_end(scenario, streams, tmp_path):
    program = picky(tmp_path, scenario=scenario, streams=streams)
    good, bad = {"x": np.zeros((1, 8), np.float32)}, {"x": np.zeros((1, 3), np.float32)}
    for _ in range(2):
        with pytest.raises(BackendError, match=r"ONNX Runtime failed on this input: .*Reshape"):
            program.drive([good, bad], 5.0)
        with pytest.raises(BackendError, match=r"ONNX Runtime failed on this input: .*Reshape"):
            program.serve([good, good, bad], [0.0] * 9)
        assert program.drive([good], 0.0).inferences >= 1
        assert len(program.serve([good], [0.0] * 9).latencies_ms) == 9


def test_calls_in_fixed_memory_give_the_same_by_a_session_on_the_cpu_in_place_of_a_gpu(tmp_path):
    artifact = two_and_two()
    program = lowered(artifact, tmp_path, batch=2)
    program.caller = Replayed(program.session, "cpu")
    for seed in (0, 1):
        batch = feed(artifact, items=5, seed=seed)
        same(outputs(artifact, batch), program.run(batch))


def test_calls_of_dynamic_shape_can_t_be_recorded(tmp_path):
    program = lowered(transformer(), tmp_path, batch=2)
    with pytest.raises(BackendError, match=r"can't be recorded: ids .*leave `graphs` off"):
        Replayed(program.session, "cpu")
