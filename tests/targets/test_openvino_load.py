"""Load beside OpenVINO: all calls are counted, requests wait their turn, failures are errors in words."""

import ml_dtypes
import numpy as np
import pytest
from models import build, conv_net, feed, mlp, no_batch, node, outputs, transformer, weight

from perwatt.contract import Clock, OperatingPoint, as_calls
from perwatt.errors import BackendError
from perwatt.targets.null import ScriptedClock
from perwatt.targets.openvino import OpenVINO

TARGET = OpenVINO()


def lowered(artifact, folder, **point):
    """The program, in float32 unless the test says otherwise, in two threads at most."""
    artifact.file(folder)
    return TARGET.lower(artifact, OperatingPoint(**{"floating_precision": "f32", "threads": 2, **point}))


def same(old, new, atol=1e-4):
    """Equal names in order, equal types and shapes, values within `atol`."""
    assert list(old) == list(new)
    for name in old:
        assert old[name].dtype == new[name].dtype and old[name].shape == new[name].shape
        assert np.allclose(old[name], new[name], atol=atol)


@pytest.mark.parametrize("scenario", ["single-stream", "offline", "server"])
def test_load_completes_all_its_calls_and_counts_them(scenario, tmp_path):
    artifact = conv_net()
    program = lowered(artifact, tmp_path, scenario=scenario, batch=4, streams=1)
    calls = as_calls(artifact.signature, [feed(artifact, items=10)], 4)
    for seconds in (0.0, 0.05):
        window = program.drive(calls, seconds)
        assert window.inferences == 4 * len(window.latencies_ms) > 0
        assert window.wall_s >= seconds and window.cpu_s >= 0
        assert all(latency > 0 for latency in window.latencies_ms)
        assert window.energy_j is None


def test_a_call_is_one_inference_where_there_is_no_batch_axis(tmp_path):
    artifact = no_batch()
    window = lowered(artifact, tmp_path, scenario="offline").drive([feed(artifact)], 0.0)
    assert window.inferences == len(window.latencies_ms) >= 1


@pytest.mark.parametrize("scenario", ["single-stream", "offline"])
def test_load_takes_inputs_of_every_type_and_memory(scenario, tmp_path):
    nodes = [
        node("Cast", "half", "h", to=1), node("Cast", "brain", "b", to=1), node("Cast", "ids", "i", to=1),
        node("Cast", "truth", "t", to=1), node("Add", "h b", "s1"), node("Add", "i t", "s2"), node("Add", "s1 s2", "y"),
    ]  # fmt: skip
    inputs = "half:float16[batch,2] brain:bfloat16[batch,2] ids:int64[batch,2] truth:bool[batch,2]"
    artifact = build(nodes, inputs, "y:float32[batch,2]")
    program = lowered(artifact, tmp_path, scenario=scenario)
    call = {
        "half": np.float16([[1, 2]]), "brain": np.ones((1, 2), ml_dtypes.bfloat16),
        "ids": np.asfortranarray(np.int64([[3, 4], [5, 6]]))[:1], "truth": np.array([[True, False]]),
    }  # fmt: skip
    call["half"].flags.writeable = False
    kept = {name: array.copy() for name, array in call.items()}
    assert program.drive([call], 0.0).inferences >= 1
    assert np.array_equal(program.run(call)["y"], [[6.0, 7.0]])
    assert all(np.array_equal(call[name], kept[name]) for name in kept)


def test_sequences_of_any_length_follow_each_other_under_load(tmp_path):
    artifact = transformer()
    calls = [feed(artifact, items=1, words=words) for words in (3, 9, 5)]
    program = lowered(artifact, tmp_path, scenario="offline", streams=2)
    assert len(program.serve(calls, [0.0] * 30).latencies_ms) == 30
    same(outputs(artifact, calls[1]), program.run(calls[1]))


@pytest.mark.parametrize("scenario", ["single-stream", "offline", "server"])
@pytest.mark.parametrize("requests", [1, 5])
def test_as_many_requests_are_under_way_as_asked_and_all_are_counted(scenario, requests, tmp_path):
    artifact = conv_net()
    program = lowered(artifact, tmp_path, scenario=scenario, batch=4, streams=1, requests=requests)
    assert program.point.requests == requests
    calls = as_calls(artifact.signature, [feed(artifact, items=10)], 4)
    window = program.drive(calls, 0.02)
    assert window.inferences == 4 * len(window.latencies_ms) > 0
    served = program.serve(calls, [0.0] * 17)
    assert served.inferences == 68 and len(served.latencies_ms) == 17 and min(served.latencies_ms) > 0
    with program.generator._requests(calls) as under_way:
        assert len(under_way.slots) == requests


def test_requests_are_read_back_where_nothing_was_asked_for(tmp_path):
    found = lowered(mlp(), tmp_path, scenario="offline", streams=2).point
    assert found.requests is not None and found.requests >= found.streams
    again = lowered(mlp(), tmp_path, **found.to_json()).point
    assert again == found


# Requests that come by themselves -------------------------------------------------------------------------------------


def test_requests_are_served_when_due_and_wait_their_turn(tmp_path):
    artifact = conv_net()
    program = lowered(artifact, tmp_path, scenario="server", batch=2, streams=1)
    calls = as_calls(artifact.signature, [feed(artifact, items=6)], 2)
    window = program.serve(calls, [0.0] * 20 + [0.05])
    # On one stream, requests that are due together are answered one after the other; the last one comes later.
    together = window.latencies_ms[:20]
    assert together == sorted(together) and together[0] > 0
    assert window.inferences == 42 and len(window.latencies_ms) == 21
    assert window.wall_s >= 0.05 and max(window.latencies_ms) <= 1e3 * window.wall_s
    assert window.cpu_s > 0


def test_load_without_requests_is_an_empty_window(tmp_path):
    window = lowered(mlp(), tmp_path, scenario="server").serve([feed(mlp(), items=1)], [])
    assert window.inferences == 0 and window.latencies_ms == []


def test_the_clock_that_is_given_says_when_a_request_is_due(tmp_path):
    program = lowered(mlp(), tmp_path, scenario="server")
    window = program.serve([feed(mlp(), items=1)], [0.0, 3600.0, 7200.0], ScriptedClock())
    # Two hours pass at once, and nobody waited in them: what is left is OpenVINO's own time.
    assert window.wall_s == 7200.0 and all(0 < latency < 3.6e6 for latency in window.latencies_ms)


def test_the_clock_is_never_early_and_the_past_is_not_waited_for():
    clock = Clock()
    for _ in range(5):
        moment = clock.now() + 2e-3
        clock.wait_until(moment)
        assert clock.now() >= moment
    clock.wait_until(clock.now() - 1e6)


def test_server_load_gets_several_streams_unless_the_point_says_otherwise(tmp_path):
    settings = lowered(conv_net(), tmp_path, scenario="server", streams=1).facts()["settings"]
    assert (settings["PERFORMANCE_HINT"], settings["NUM_STREAMS"]) == ("THROUGHPUT", 1)
    assert "NUM_STREAMS" not in lowered(conv_net(), tmp_path, scenario="server").facts()["settings"]


def picky(folder, scenario):
    """A program that takes rows whose length is a multiple of four, and fails on all others."""
    artifact = build(
        [node("Reshape", "x to", "r"), node("MatMul", "r w", "y")], "x:float32[a,b]", "y:float32[a,2]",
        {"to": np.int64([-1, 4]), "w": weight(4, 2)},
    )  # fmt: skip
    return lowered(artifact, folder, scenario=scenario)


@pytest.mark.parametrize("scenario", ["single-stream", "offline", "server"])
def test_a_failure_under_load_is_an_error_in_words_and_not_the_end(scenario, tmp_path):
    program = picky(tmp_path, scenario)
    good, bad = {"x": np.zeros((1, 8), np.float32)}, {"x": np.zeros((1, 3), np.float32)}
    for _ in range(2):
        with pytest.raises(BackendError, match=r"OpenVINO failed on this input: .*Reshape"):
            program.drive([good, bad], 0.2)
        with pytest.raises(BackendError, match=r"OpenVINO failed on this input: .*Reshape"):
            program.serve([good, good, bad], [0.0] * 9)
        assert program.drive([good], 0.0).inferences >= 1
        assert len(program.serve([good], [0.0] * 9).latencies_ms) == 9
