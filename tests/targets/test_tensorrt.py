"""The TensorRT target, run against a scripted stand-in: see `tensorrt_standin.py`, and the contract test for what keeps
the stand-in honest. Nothing here ran on a GPU."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from models import build, conv_net, feed, mlp, no_batch, node, outputs, transformer, two_and_two, weight

sys.path.insert(0, str(Path(__file__).parent))

from tensorrt_standin import STEP_MS, Machine

from perwatt.contract import OperatingPoint, as_calls
from perwatt.errors import BackendError, TargetError
from perwatt.targets import _tensorrt_build
from perwatt.targets._tensorrt_build import Bounds, Range
from perwatt.targets.null import ScriptedClock
from perwatt.targets.tensorrt import TensorRT


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A scripted GPU with TensorRT 11, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _tensorrt_build._kept.clear()
    return Machine().install(monkeypatch)


@pytest.fixture
def old_machine(machine, monkeypatch):
    """The same with TensorRT 10."""
    return Machine(version="10.16.1.11").install(monkeypatch)


def lowered(artifact, folder, target=None, **point):
    artifact.file(folder)
    return (target or TensorRT()).lower(artifact, OperatingPoint(**point))


def same(old, new):
    assert list(old) == list(new)
    for name in old:
        assert old[name].dtype == new[name].dtype and old[name].shape == new[name].shape
        assert np.allclose(old[name], new[name], atol=1e-4)


def quantized(zero=0, kind=np.int8):
    """x:float32[batch,4] quantized, dequantized, times a weight: y:float32[batch,4]."""
    nodes = [
        node("QuantizeLinear", "x scale zero", "q", name="/q"),
        node("DequantizeLinear", "q scale zero", "d", name="/d"),
        node("MatMul", "d w", "y", name="/product"),
    ]
    constants = {"scale": np.float32(0.1), "zero": np.array(zero, kind), "w": weight(4, 4)}
    return build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", constants)


# Calls ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [conv_net, mlp, two_and_two, no_batch, quantized, transformer])
@pytest.mark.parametrize("graphs", [None, False])
def test_outputs_are_the_model_s_on_a_scripted_stand_in(make, graphs, machine, tmp_path):
    artifact = make()
    program = lowered(artifact, tmp_path, batch=4, graphs=graphs)
    for seed in range(3):
        batch = feed(artifact, items=7, seed=seed)
        same(outputs(artifact, batch), program.run(batch))
    assert (machine.count("replay") > 0) == (graphs is None)


def test_sequences_of_any_length_in_the_range_run_on_a_scripted_stand_in(machine, tmp_path):
    artifact = transformer()
    program = lowered(artifact, tmp_path, batch=2)
    for words in (5, 5, 5, 1, 17, 512):
        batch = feed(artifact, items=3, words=words)
        same(outputs(artifact, batch), program.run(batch))
    with pytest.raises(
        BackendError, match=r"was given shape \[2, 513\], this engine takes \[2, 1\] to \[2, 512\].*profile"
    ):
        program.run(feed(artifact, items=2, words=513))
    same(outputs(artifact, batch), program.run(batch))


def test_what_comes_out_is_not_overwritten_by_the_next_call_on_a_scripted_stand_in(machine, tmp_path):
    artifact = mlp()
    program = lowered(artifact, tmp_path)
    first = program.run(feed(artifact, items=1))
    kept = first["y"].copy()
    program.run(feed(artifact, items=1, seed=1))
    assert np.array_equal(first["y"], kept)


def test_types_keep_what_the_model_declares_on_a_scripted_stand_in(machine, tmp_path):
    nodes = [node("Greater", "x zero", "more"), node("Add", "ids ids", "twice"), node("Cast", "x", "half", to=10)]
    declared = "more:bool[batch,4] twice:int64[batch,2] half:float16[batch,4]"
    artifact = build(nodes, "x:float32[batch,4] ids:int64[batch,2]", declared, {"zero": np.float32(0)})
    batch = feed(artifact)
    batch["x"] = np.asfortranarray(batch["x"])
    same(outputs(artifact, batch), lowered(artifact, tmp_path, batch=2).run(batch))


# Building -------------------------------------------------------------------------------------------------------------


def test_batch_is_fixed_and_other_dimensions_get_ranges_on_a_scripted_stand_in(machine, tmp_path):
    lowered(transformer(), tmp_path, batch=8)
    ids = machine.builds[0].profile["ids"]
    assert ids == [[8, 1], [8, 128], [8, 512]]


def test_ranges_can_be_set_by_name_on_a_scripted_stand_in(machine, tmp_path):
    target = TensorRT()
    target.bounds = Bounds(named={"words": Range(16, 16, 32)})
    program = lowered(transformer(), tmp_path, target, batch=2)
    assert machine.builds[0].profile["ids"] == [[2, 16], [2, 16], [2, 32]]
    assert program.facts()["settings"]["profile"]["ids"] == [[2, 16], [2, 16], [2, 32]]


def test_a_picture_s_sides_get_a_picture_s_range_on_a_scripted_stand_in(machine, tmp_path):
    nodes = [node("Conv", "x w", "c"), node("GlobalAveragePool", "c", "y")]
    artifact = build(nodes, "x:float32[batch,3,high,wide]", "y:float32[batch,4,1,1]", {"w": weight(4, 3, 3, 3)})
    lowered(artifact, tmp_path, batch=2)
    assert machine.builds[0].profile["x"] == [[2, 3, 32, 32], [2, 3, 224, 224], [2, 3, 1024, 1024]]


def test_a_model_of_fixed_shapes_needs_no_profile_on_a_scripted_stand_in(machine, tmp_path):
    program = lowered(conv_net(batch="4"), tmp_path, batch=32)
    assert machine.builds[0].profile == {} and program.batch_size == program.point.batch == 4
    same(outputs(conv_net(), feed(conv_net(), items=10)), program.run(feed(conv_net(), items=10)))


def test_networks_are_strongly_typed_in_both_generations_on_a_scripted_stand_in(old_machine, monkeypatch, tmp_path):
    lowered(mlp(), tmp_path)
    # TensorRT 10 has to be told (its second flag); 11 knows nothing else, and may drop the flag.
    assert old_machine.builds[0].network.flags == 1 << 1
    new = Machine().install(monkeypatch)
    lowered(mlp(), tmp_path)
    assert new.builds[0].network.flags == 0


@pytest.mark.parametrize(("wanted", "flag"), [(None, True), ("tf32", True), ("f32", False)])
def test_float32_products_run_as_the_point_says_on_a_scripted_stand_in(wanted, flag, machine, tmp_path):
    program = lowered(mlp(), tmp_path, floating_precision=wanted)
    config = machine.builds[0].config
    assert ("TF32" in {f.name for f in config._flags}) == flag
    assert program.point.floating_precision == program.facts()["execution_precision"] == (wanted or "tf32")
    assert config.profiling_verbosity.name == "DETAILED"
    assert [(pool.name, size) for pool, size in config._pools.items()] == [("WORKSPACE", 8_000_000_000)]


def test_a_precision_that_the_graph_would_have_to_say_is_refused_on_a_scripted_stand_in(machine, tmp_path):
    with pytest.raises(
        BackendError, match=r"no floating precision 'bf16' on this GPU: known are tf32, f32 — .*cast-half"
    ):
        lowered(mlp(), tmp_path, floating_precision="bf16")


@pytest.mark.parametrize(("autotune", "level"), [(None, 3), (False, 3), (True, 5)])
def test_autotuning_compares_more_kernels_on_a_scripted_stand_in(autotune, level, machine, tmp_path):
    program = lowered(mlp(), tmp_path, autotune=autotune)
    assert machine.builds[0].config.builder_optimization_level == level
    assert program.point.autotune is autotune and program.facts()["settings"]["optimization_level"] == level


def test_other_streams_and_graphs_take_the_engine_that_is_there_on_a_scripted_stand_in(machine, tmp_path):
    artifact = conv_net()
    for streams in (1, 3):
        for graphs in (None, False):
            lowered(artifact, tmp_path, scenario="offline", batch=2, streams=streams, graphs=graphs)
    assert len(machine.builds) == 1
    lowered(artifact, tmp_path, scenario="offline", batch=4)
    assert len(machine.builds) == 2


# The timing cache -----------------------------------------------------------------------------------------------------


def cache_file(tmp_path):
    return tmp_path / "cache/perwatt/tensorrt/nvidia-scripted-gpu-11.4.0.106.timing"


def test_kernel_timings_are_kept_and_used_again_on_a_scripted_stand_in(machine, tmp_path):
    lowered(conv_net(), tmp_path)
    first, kept = len(machine.measured), cache_file(tmp_path).read_bytes()
    assert first > 0
    facts = lowered(conv_net(), tmp_path, batch=2).facts()
    assert len(machine.measured) == first, "nothing was measured twice"
    assert facts["timing_cache"] == f"{len(kept)} bytes known, {len(kept)} bytes kept"
    lowered(mlp(), tmp_path)
    assert len(machine.measured) > first
    assert [file.name for file in cache_file(tmp_path).parent.iterdir()] == [cache_file(tmp_path).name]


@pytest.mark.parametrize("content", [b"\xff broken", json.dumps({"gpu": "another", "layers": ["x"]}).encode()])
def test_timings_that_tensorrt_refuses_are_begun_anew_on_a_scripted_stand_in(content, machine, tmp_path):
    cache_file(tmp_path).parent.mkdir(parents=True)
    cache_file(tmp_path).write_bytes(content)
    assert lowered(mlp(), tmp_path).facts()["timing_cache"].startswith("0 bytes known, ")
    assert json.loads(cache_file(tmp_path).read_bytes())["gpu"] == machine.gpu


def test_a_cache_that_cannot_be_written_costs_nothing_but_time_on_a_scripted_stand_in(machine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "not kept (Not a directory)" in lowered(mlp(), tmp_path).facts()["timing_cache"]


# CUDA graphs ----------------------------------------------------------------------------------------------------------


def test_the_second_call_is_recorded_and_the_others_replayed_on_a_scripted_stand_in(machine, tmp_path):
    artifact = mlp()
    program = lowered(artifact, tmp_path, batch=2)
    # Warming up: once plainly, once for the record, which does not compute, and its first replay.
    assert [machine.count(word) for word in ("execute", "capture", "replay")] == [2, 1, 1]
    for seed in range(3):
        batch = feed(artifact, items=2, seed=seed)
        same(outputs(artifact, batch), program.run(batch))
    assert [machine.count(word) for word in ("execute", "capture", "replay")] == [2, 1, 4]
    assert program.point.graphs is True


def test_another_shape_makes_the_record_void_on_a_scripted_stand_in(machine, tmp_path):
    artifact = transformer()
    program = lowered(artifact, tmp_path)
    before = machine.count("capture")
    for words in (3, 9, 9, 9, 3):
        batch = feed(artifact, items=1, words=words)
        same(outputs(artifact, batch), program.run(batch))
    assert machine.count("capture") == before + 1


def test_what_cannot_be_recorded_runs_as_before_and_says_so_on_a_scripted_stand_in(machine, tmp_path):
    machine.refuses_capture = True
    artifact = mlp()
    program = lowered(artifact, tmp_path)
    same(outputs(artifact, feed(artifact)), program.run(feed(artifact)))
    facts = program.facts()
    assert facts["operating_point"]["graphs"] is False and machine.count("replay") == 0
    assert "not permitted when stream is capturing" in facts["no_graphs_because"]


def test_without_graphs_nothing_is_captured_on_a_scripted_stand_in(machine, tmp_path):
    program = lowered(mlp(), tmp_path, graphs=False)
    program.run(feed(mlp()))
    assert machine.count("capture") == 0 and program.point.graphs is False


# Load -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["single-stream", "offline", "server"])
def test_load_completes_all_its_calls_and_counts_them_on_a_scripted_stand_in(scenario, machine, tmp_path):
    artifact = conv_net()
    program = lowered(artifact, tmp_path, scenario=scenario, batch=4)
    calls = as_calls(artifact.signature, [feed(artifact, items=10)], 4)
    for seconds in (0.0, 0.05):
        window = program.drive(calls, seconds)
        assert window.inferences == 4 * len(window.latencies_ms) > 0
        assert window.wall_s >= seconds and window.cpu_s >= 0 and window.energy_j is None
        assert all(latency > 0 for latency in window.latencies_ms)
    assert all(not stream.waiting for stream in machine.streams.values()), "nothing is left under way"


def test_every_stream_has_a_call_under_way_on_a_scripted_stand_in(machine, tmp_path):
    artifact = mlp()
    program = lowered(artifact, tmp_path, scenario="offline", streams=3)
    machine.said.clear()
    window = program.serve([feed(artifact, items=1)], [0.0] * 7, ScriptedClock())
    words = [said for said in machine.said if said[0] in ("replay", "wait")]
    streams = sorted(machine.streams)
    assert [said[1] for said in words[:3]] == streams and {said[0] for said in words[:3]} == {"replay"}
    # From then on a call begins when the one that has been under way longest is done.
    assert words[3:5] == [("wait", streams[0]), ("replay", streams[0])]
    assert window.inferences == len(window.latencies_ms) == 7
    assert machine.count("synchronize") == 0, "a generator that spins would cost what is to be saved"
    assert program.point.streams == program.point.requests == 3


def test_a_latency_is_the_wait_and_the_gpu_s_own_time_on_a_scripted_stand_in(machine, tmp_path):
    artifact = mlp()
    program = lowered(artifact, tmp_path, scenario="server", streams=1)
    window = program.serve([feed(artifact, items=1)], [0.0, 3600.0], ScriptedClock())
    # An input up, the execution, an output down; two hours that pass at once are no latency.
    assert window.latencies_ms == pytest.approx([1.2 * STEP_MS] * 2)


def test_copies_are_part_of_every_inference_and_come_from_pinned_memory_on_a_scripted_stand_in(machine, tmp_path):
    artifact = two_and_two()
    program = lowered(artifact, tmp_path, scenario="offline")
    calls = [feed(artifact, items=1, seed=seed) for seed in range(2)]
    machine.said.clear()
    held = len(machine.pinned)
    window = program.drive(calls, 0.0)
    ports = len(artifact.signature.inputs), len(artifact.signature.outputs)
    assert machine.count("upload") == ports[0] * len(window.latencies_ms)
    assert machine.count("download") == ports[1] * len(window.latencies_ms)
    assert len(machine.pinned) == held + 2 * ports[0]
    program.drive(calls, 0.0)
    assert len(machine.pinned) == held + 2 * ports[0], "the same samples stay where they are"
    program.drive([feed(artifact, items=1, seed=9)], 0.0)
    assert len(machine.pinned) == held + ports[0]


def test_sequences_of_any_length_follow_each_other_under_load_on_a_scripted_stand_in(machine, tmp_path):
    artifact = transformer()
    calls = [feed(artifact, items=1, words=words) for words in (3, 9, 5)]
    program = lowered(artifact, tmp_path, scenario="offline", streams=2)
    assert len(program.serve(calls, [0.0] * 30).latencies_ms) == 30
    same(outputs(artifact, calls[1]), program.run(calls[1]))


@pytest.mark.parametrize("scenario", ["single-stream", "offline", "server"])
def test_a_failure_under_load_is_an_error_in_words_and_not_the_end_on_a_scripted_stand_in(scenario, machine, tmp_path):
    artifact = transformer()
    program = lowered(artifact, tmp_path, scenario=scenario)
    calls = [feed(artifact, items=1, words=words) for words in (3, 5, 600)]
    with pytest.raises(BackendError, match=r"given shape \[1, 600\], this engine takes"):
        program.drive(calls, 10.0)
    with pytest.raises(BackendError, match=r"given shape \[1, 600\], this engine takes"):
        program.serve(calls, [0.0] * 5)
    assert len(program.serve(calls[:2], [0.0] * 5).latencies_ms) == 5
    same(outputs(artifact, calls[1]), program.run(calls[1]))


def test_memory_is_given_back_with_the_program_on_a_scripted_stand_in(machine, tmp_path):
    artifact = conv_net()
    program = lowered(artifact, tmp_path, scenario="offline", batch=4, streams=3)
    program.drive(as_calls(artifact.signature, [feed(artifact, items=8)], 4), 0.0)
    assert machine.device and machine.pinned
    del program
    import gc

    gc.collect()
    assert not machine.device and not machine.pinned


# Saved and loaded -----------------------------------------------------------------------------------------------------


def saved(artifact, folder, **point):
    program = lowered(artifact, folder, **point)
    files = program.save(folder)
    assert [file.name for file in files] == ["model.engine", "engine.json"] and all(file.is_file() for file in files)
    return program


def test_what_was_saved_runs_alike_when_loaded_on_a_scripted_stand_in(machine, tmp_path):
    artifact = transformer()
    program = saved(artifact, tmp_path, batch=4)
    built = len(machine.builds)
    loaded = TensorRT().load(tmp_path, artifact.signature, program.point)
    same(program.run(feed(artifact, items=7)), loaded.run(feed(artifact, items=7)))
    assert len(machine.builds) == built and loaded.point == program.point


def test_the_engine_says_for_what_it_is_on_a_scripted_stand_in(machine, tmp_path):
    artifact = quantized()
    saved(artifact, tmp_path, batch=4)
    facts = json.loads((tmp_path / "engine.json").read_text())
    assert (facts["tensorrt"], facts["gpu"], facts["compute_capability"]) == ("11.4.0.106", machine.gpu, "9.0")
    assert (facts["batch"], facts["floating_precision"]) == (4, "tf32")
    assert facts["profile"] == {"x": [[4, 4]] * 3} and facts["model_digest"] == artifact.digest()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"version": "11.5.0.1"}, "was built by TensorRT 11.4.0.106, here is 11.5.0.1"),
        ({"gpu": "NVIDIA L4", "capability": (8, 9)}, "was built for NVIDIA Scripted GPU .* here is NVIDIA L4"),
    ],
)  # fmt: skip
def test_an_engine_of_elsewhere_is_refused_with_the_way_out_on_a_scripted_stand_in(
    other, words, machine, monkeypatch, tmp_path
):
    program = saved(mlp(), tmp_path)
    Machine(**other).install(monkeypatch)
    with pytest.raises(TargetError, match=words) as caught:
        TensorRT().load(tmp_path, mlp().signature, program.point)
    assert "optimize BUNDLE --target tensorrt" in caught.value.fix and caught.value.exit_code == 4


def test_an_engine_that_is_not_whole_or_of_another_batch_is_refused_on_a_scripted_stand_in(machine, tmp_path):
    artifact = mlp()
    program = saved(artifact, tmp_path, batch=2)
    with pytest.raises(TargetError, match="was built for calls of 2 items, not 3"):
        TensorRT().load(tmp_path, artifact.signature, OperatingPoint(batch=3))
    (tmp_path / "model.engine").write_bytes(b"half")
    with pytest.raises(TargetError, match=r"is not the one that engine.json describes"):
        TensorRT().load(tmp_path, artifact.signature, program.point)
    (tmp_path / "engine.json").write_text("{}")
    with pytest.raises(TargetError, match="holds no engine that can be read"):
        TensorRT().load(tmp_path, artifact.signature, program.point)
