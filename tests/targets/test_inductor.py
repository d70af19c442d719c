"""Inductor: what is compiled gives what the model says, at any number of items, saved and loaded, with torch alone.

Compiling costs seconds, so that programs are shared by the tests that only ask them something."""

import json
import os
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
from models import build, conv_net, feed, mlp, node, outputs, proto, transformer, two_and_two, weight

from perwatt.artifact import Artifact
from perwatt.bundle import program_json
from perwatt.contract import OperatingPoint, as_calls
from perwatt.errors import BackendError
from perwatt.targets import _inductor_compile as compiling
from perwatt.targets.inductor import Inductor
from perwatt.targets.null import ScriptedClock

TARGET = Inductor()
pytestmark = pytest.mark.skipif(bool(TARGET.missing()), reason="; ".join(TARGET.missing()))


def lowered(artifact, **point):
    """The program, in float32 and one thread unless the test says otherwise."""
    return TARGET.lower(artifact, OperatingPoint(**{"threads": 1, "floating_precision": "f32", **point}))


def same(old, new, atol=1e-4):
    """Equal names in order, equal types and shapes, values within `atol`."""
    assert list(old) == list(new)
    for name in old:
        assert old[name].dtype == new[name].dtype and old[name].shape == new[name].shape
        assert np.allclose(old[name], new[name], atol=atol)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of packages of the tests' own. Inductor's, of compiled headers, is the user's: they take half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiling.cache_folder()))
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "perwatt" / "inductor"


@pytest.fixture(scope="module")
def net(cache):
    return lowered(conv_net(), batch=4, scenario="offline")


@pytest.fixture(scope="module")
def sequences(cache):
    return lowered(transformer(), batch=2)


def test_nothing_is_missing_and_capabilities_are_plain_data():
    found = TARGET.capabilities()
    assert found.floating_precisions[0] == "f32"
    assert ("bf16" in found.floating_precisions) == ("bfloat16" in found.half_types)
    assert TARGET.full_name == "inductor" and set(TARGET.versions()) == {"torch"}
    assert (Inductor("cuda").full_name, Inductor("cuda").device, TARGET.device) == ("inductor:cuda", "gpu", "cpu")


def test_a_machine_without_cuda_says_so_with_what_mends_it():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert any("CUDA" in reason or "NVIDIA" in reason for reason in Inductor("cuda").missing())
    assert Inductor("cuda").capabilities().quantization_styles == ()


def test_a_machine_without_a_compiler_says_so_with_what_mends_it(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert TARGET.missing() == [
        "there is no C++ compiler no-such-compiler, which Inductor needs (Debian, Ubuntu: apt-get install g++)"
    ]


def test_knobs_are_fields_of_an_operating_point_and_start_with_what_is_asked_for():
    for scenario in ("single-stream", "offline", "server"):
        for target in (TARGET, Inductor("cuda")):
            knobs = target.knobs(OperatingPoint(scenario=scenario))
            assert ("batch" in knobs) == (scenario != "single-stream")
            for name, values in knobs.items():
                assert len(set(values)) == len(values)
                OperatingPoint(**{name: values[0]} if values else {})


@pytest.mark.parametrize("items", [1, 4, 7])
def test_any_number_of_items_gives_what_the_model_says(items, net):
    batch = feed(conv_net(), items=items)
    same(outputs(conv_net(), batch), net.run(batch))


@pytest.mark.parametrize("words", [1, 5, 17])
def test_sequences_of_any_length_run_in_one_program(words, sequences):
    batch = feed(transformer(), items=5, words=words)
    same(outputs(transformer(), batch), sequences.run(batch))


def test_inputs_whose_sizes_do_not_fit_are_refused_before_native_code_sees_them(sequences, net):
    batch = feed(transformer(), items=2, words=5)
    with pytest.raises(BackendError, match=r"mask.* has size 4 where 5 is wanted for words"):
        sequences.call({**batch, "mask": batch["mask"][:, :4]})
    with pytest.raises(BackendError, match="has size 3 where 4 is wanted for batch"):
        net.call(feed(conv_net(), items=3))


def test_an_index_out_of_range_is_an_error_in_words_and_not_the_end(sequences):
    batch = feed(transformer(), items=2, words=5)
    with pytest.raises(BackendError, match="Inductor's program failed on this input: "):
        sequences.drive([{**batch, "ids": batch["ids"] + 1000}], 0.0)
    same(outputs(transformer(), batch), sequences.run(batch))


def test_what_comes_out_is_not_overwritten_by_the_next_call(net):
    first = net.run(feed(conv_net(), items=4))
    kept = first["y"].copy()
    net.run(feed(conv_net(), items=4, seed=1))
    assert np.array_equal(first["y"], kept)


def test_arrays_in_any_layout_and_read_only_ones_are_taken(net):
    batch = {"x": np.asfortranarray(feed(conv_net(), items=4)["x"])}
    batch["x"].flags.writeable = False
    same(outputs(conv_net(), batch), net.run(batch))


def test_what_was_set_is_told_and_is_plain_data(net):
    facts = net.facts()
    assert facts["execution_precision"] == facts["operating_point"]["floating_precision"] == "f32"
    assert (facts["operating_point"]["threads"], facts["operating_point"]["batch"]) == (1, 4)
    assert facts["compile_s"] > 0 and not facts["from_cache"] and facts["settings"]["freezing"]
    assert facts["integer_products"] == {}
    json.dumps(facts)


def test_the_same_model_at_the_same_point_comes_from_the_cache(net, cache):
    again = lowered(conv_net(), batch=4)
    assert again.facts()["from_cache"] and again.facts()["compile_s"] < net.facts()["compile_s"]
    batch = feed(conv_net(), items=4)
    same(net.run(batch), again.run(batch), atol=0)
    assert list((cache / "packages").glob("*.new")) == []


def test_what_decides_the_package_decides_its_name_in_the_cache():
    artifact = conv_net()
    points = [{}, {"batch": 2}, {"threads": 2}, {"floating_precision": "bf16"}, {"autotune": True}]
    plans = [compiling.plan_for(artifact, OperatingPoint(**point), "cpu", 1) for point in points]
    keys = {compiling._key(artifact, plan) for plan in plans}
    assert len(keys) == len(points) and compiling._key(conv_net(seed=1), plans[0]) not in keys
    assert compiling.plan_for(artifact, OperatingPoint(scenario="offline", streams=2), "cpu", 1) == plans[0]


def test_the_cache_drops_what_was_used_longest_ago(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "CACHE_BYTES", 25)
    made = tmp_path / "made"
    for turn, name in enumerate("abc"):
        made.write_bytes(b"0123456789")
        compiling._keep(made, tmp_path / "packages" / f"{name}.pt2")
        os.utime(tmp_path / "packages" / f"{name}.pt2", (turn, turn))
    compiling._keep(made, tmp_path / "packages" / "d.pt2")
    assert sorted(path.name for path in (tmp_path / "packages").iterdir()) == ["c.pt2", "d.pt2"]


def test_saved_and_loaded_it_keeps_the_batch_that_it_was_compiled_for(net, tmp_path):
    assert net.save(tmp_path) == [tmp_path / "model.pt2"]
    loaded = TARGET.load(tmp_path, net.signature, OperatingPoint(batch=3, threads=2, floating_precision="bf16"))
    assert (loaded.batch_size, loaded.point.threads, loaded.point.floating_precision) == (4, 1, "f32")
    assert loaded.facts()["compile_s"] is None
    batch = feed(conv_net(), items=7)
    same(net.run(batch), loaded.run(batch), atol=0)


def test_a_file_that_is_no_package_of_ours_is_refused_in_words(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"nothing")
    with pytest.raises(BackendError, match="torch can't load the package"):
        TARGET.load(tmp_path, conv_net().signature, OperatingPoint())


def test_a_package_for_another_processor_is_refused_with_what_it_lacks(net, tmp_path, monkeypatch):
    from perwatt.targets import _inductor_runner

    net.save(tmp_path)
    monkeypatch.setattr(_inductor_runner, "cpu_isa", lambda: ())
    with pytest.raises(BackendError, match=r"compiled for a processor with .*, which this one lacks — compile"):
        TARGET.load(tmp_path, net.signature, OperatingPoint())


ALONE = """
import json, sys
import numpy as np
from run import Model
outputs = Model().run({"x": np.load("x.npy")})
np.savez("out.npz", **outputs)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules} & {"perwatt", "onnx", "onnxruntime", "openvino"})))
"""


def test_what_is_saved_runs_with_torch_and_numpy_alone(net, tmp_path):
    (tmp_path / "inductor").mkdir()
    net.save(tmp_path / "inductor")
    (tmp_path / "program.json").write_text(json.dumps(program_json("inductor", net.signature, net.facts())))
    (tmp_path / "run.py").write_text(TARGET.script())
    batch = feed(conv_net(), items=6)
    np.save(tmp_path / "x.npy", batch["x"])
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    with np.load(tmp_path / "out.npz") as found:
        same(net.run(batch), dict(found), atol=1e-6)


def test_load_completes_all_its_calls_and_counts_them(net):
    calls = as_calls(net.signature, [feed(conv_net(), items=10)], 4)
    for seconds in (0.0, 0.02):
        window = net.drive(calls, seconds)
        assert window.inferences == 4 * len(window.latencies_ms) > 0
        assert window.wall_s >= seconds and window.cpu_s >= 0 and window.energy_j is None
        assert all(latency > 0 for latency in window.latencies_ms)


def test_requests_are_served_when_due_and_wait_their_turn(net):
    window = net.serve([feed(conv_net(), items=4)], [0.0] * 20 + [0.05])
    assert window.latencies_ms[:20] == sorted(window.latencies_ms[:20])
    assert window.inferences == 84 and window.wall_s >= 0.05
    assert net.serve([feed(conv_net(), items=4)], []).latencies_ms == []
    scripted = net.serve([feed(conv_net(), items=4)], [0.0, 3600.0], ScriptedClock())
    assert scripted.wall_s == 3600.0


# What is refused ------------------------------------------------------------------------------------------------------


def test_an_operator_that_the_interpreter_lacks_is_named():
    artifact = build([node("ImageDecoder", "x", "y")], "x:uint8[bytes]", "y:uint8[height,width,3]")
    with pytest.raises(BackendError, match=r"Inductor can't take this model: the interpreter has no ImageDecoder"):
        lowered(artifact)


def test_a_shape_that_depends_on_data_is_refused_in_one_line():
    artifact = build([node("NonZero", "x", "i"), node("Shape", "i", "s"), node("ReduceSum", "s", "n", keepdims=0),
                      node("Expand", "one n1", "y")], "x:float32[batch,4] n1:int64[1]", "y:float32[k] n:int64[]",
                     {"one": np.float32([1])})  # fmt: skip
    with pytest.raises(BackendError, match="Inductor refused the model: ") as caught:
        lowered(artifact)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_precision_nobody_knows_is_refused_with_those_known():
    with pytest.raises(BackendError, match="no floating precision 'int4' here: known are f32"):
        lowered(conv_net(), floating_precision="int4")


def test_inputs_of_unknown_rank_are_refused():
    model = ir.from_proto(proto([node("Relu", "x", "y")], "x:float32", "y:float32"))
    with pytest.raises(BackendError, match="inputs of known rank, which x is not"):
        lowered(Artifact(model=model))


# Dearer ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif("bf16" not in TARGET.capabilities().floating_precisions, reason="no bfloat16 here")
@pytest.mark.parametrize("make", [conv_net, transformer])
def test_in_bfloat16_outputs_stay_float32_and_near(make):
    program = lowered(make(), batch=2, floating_precision="bf16")
    batch = feed(make(), items=3)
    same(outputs(make(), batch), program.run(batch), atol=0.05)
    assert not np.array_equal(outputs(make(), batch)["y"], program.run(batch)["y"])
    assert program.facts()["execution_precision"] == "bf16"


@pytest.mark.slow
def test_inputs_and_outputs_go_by_position_and_aliases_have_memory_of_their_own():
    artifact = two_and_two()
    batch = feed(artifact, items=3)
    same(outputs(artifact, batch), lowered(artifact, batch=2).run(dict(reversed(batch.items()))))
    nodes = [node("Relu", "x", "a"), node("Identity", "a", "b"), node("Identity", "x", "c")]
    artifact = build(nodes, "x:float32[batch,4]", " ".join(f"{n}:float32[batch,4]" for n in "bca"))
    batch = feed(artifact, items=2)
    found = lowered(artifact, batch=2).run(batch)
    same(outputs(artifact, batch), found)
    assert not np.shares_memory(found["c"], batch["x"])


@pytest.mark.slow
def test_whole_numbers_truth_values_fixed_batches_and_no_batch_keep_their_types():
    nodes = [
        node("ArgMax", "x", "top", axis=1, keepdims=0), node("Greater", "x zero", "more"), node("Add", "ids ids", "twice"),
    ]  # fmt: skip
    artifact = build(
        nodes, "x:float32[4,4] ids:int64[4,2]", "top:int64[4] more:bool[4,4] twice:int64[4,2]", {"zero": np.float32(0)},
    )  # fmt: skip
    program = lowered(artifact, batch=32)
    assert program.batch_size == program.point.batch == 4
    batch = {"x": weight(8, 4), "ids": np.arange(16).reshape(8, 2)}
    halves = [outputs(artifact, {name: array[at : at + 4] for name, array in batch.items()}) for at in (0, 4)]
    same({name: np.concatenate([half[name] for half in halves]) for name in halves[0]}, program.run(batch))
    alone = build([node("MatMul", "x w", "y")], "x:float32[6]", "y:float32[3]", {"w": weight(6, 3)})
    program = lowered(alone)
    assert program.batch_size is None
    same(outputs(alone, feed(alone)), program.run(feed(alone)))


@pytest.mark.slow
def test_autotuned_products_give_the_same():
    program = lowered(mlp(), batch=4, autotune=True)
    assert program.facts()["settings"]["max_autotune_gemm_backends"] == "CPP,ATEN"
    batch = feed(mlp(), items=4)
    same(outputs(mlp(), batch), program.run(batch))
