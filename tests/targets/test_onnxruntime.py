"""ONNX Runtime: any number of items, any shape of model, what was asked for is what runs, what is saved runs alone."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from models import (
    build,
    control_flow,
    conv_net,
    feed,
    mlp,
    no_batch,
    node,
    outputs,
    proto,
    transformer,
    two_and_two,
    weight,
)

from perwatt.artifact import Artifact
from perwatt.bundle import program_json
from perwatt.contract import OperatingPoint
from perwatt.errors import BackendError, InputError
from perwatt.signature import Signature, TensorSpec
from perwatt.targets._cpu import counts, usable_cpus
from perwatt.targets._onnxruntime_providers import PROVIDERS, chain
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


# What it says of itself -----------------------------------------------------------------------------------------------


def test_nothing_is_missing_on_the_cpu_and_capabilities_are_plain_data():
    assert TARGET.missing() == [] and TARGET.device == "cpu" and TARGET.full_name == "onnxruntime"
    assert TARGET.versions() == {"onnxruntime": onnxruntime.__version__}
    found = TARGET.capabilities()
    assert found.floating_precisions == ("f32",) and found.half_types == ()
    assert {s.weight_type for s in found.quantization_styles if s.activation_type != "float"} == {"int8"}
    assert {s.weight_type for s in found.quantization_styles if s.activation_type == "float"} == {
        "int4",
        "uint4",
        "int8",
    }
    assert ONNXRuntime.serves == {"cpu": "", "gpu": "cuda"}


@pytest.mark.parametrize("variant", [v for v in PROVIDERS if v])
def test_a_variant_that_is_not_here_says_which_provider_and_the_command_that_gets_it(variant):
    target, provider = ONNXRuntime(variant), PROVIDERS[variant]
    assert target.full_name == f"onnxruntime:{variant}" and target.device == provider.device
    if provider.name in onnxruntime.get_available_providers():
        pytest.skip(f"{provider.name} is here")
    (reason,) = target.missing()
    assert provider.name in reason and f"pip install {provider.package}" in reason


def test_a_provider_that_does_not_start_is_refused_and_does_not_run_on_the_cpu(tmp_path):
    artifact = mlp()
    artifact.file(tmp_path)
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is here")
    with pytest.raises(BackendError, match=r"CUDAExecutionProvider.*would have run on CPUExecutionProvider"):
        ONNXRuntime("cuda").lower(artifact, OperatingPoint())


def test_knobs_stay_within_the_cpus_that_may_be_used():
    single = TARGET.knobs(OperatingPoint(scenario="single-stream"))
    assert list(single) == ["threads"]
    offline = TARGET.knobs(OperatingPoint(scenario="offline"))
    assert set(offline) == {"threads", "streams", "batch"} and offline["batch"][-1] == 64
    assert max(offline["threads"]) == max(offline["streams"]) == usable_cpus()
    assert "graphs" in ONNXRuntime("cuda").knobs(OperatingPoint(scenario="single-stream"))
    assert set(ONNXRuntime("dml").knobs(OperatingPoint(scenario="offline"))) == {"batch"}


def test_a_provider_is_told_what_the_point_asks_for_and_what_it_does_not_take_runs_behind_it():
    def told(variant, precision, **point):
        return chain(variant, precision, OperatingPoint(**point))

    assert told("", "f32", graphs=True) == [("CPUExecutionProvider", {})]
    (first, options), *behind = told("cuda", "f32", graphs=True, autotune=False)
    assert (first, behind) == ("CUDAExecutionProvider", [("CPUExecutionProvider", {})])
    assert (options["use_tf32"], options["enable_cuda_graph"]) == ("0", "1")
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert told("cuda", "tf32")[0][1]["cudnn_conv_algo_search"] == "EXHAUSTIVE"
    names = [name for name, _ in told("tensorrt", "f16")]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert told("tensorrt", "f16")[0][1]["trt_fp16_enable"] == "1"
    options = told("openvino", "f32", threads=4, streams=2)[0][1]
    assert (options["num_of_threads"], options["num_streams"]) == ("4", "2")


@pytest.mark.parametrize(("most", "found"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_counts_are_powers_of_two_and_all(most, found):
    assert counts(most) == found


# What it computes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [1, 3, 8, 33])
def test_any_number_of_items_gives_what_batch_one_gives(items, tmp_path):
    artifact = conv_net()
    batch = feed(artifact, items=items)
    same(outputs(artifact, batch), lowered(artifact, tmp_path, batch=8).run(batch))
    same(outputs(artifact, batch), lowered(artifact, tmp_path, batch=1).run(batch))


def test_a_fixed_batch_is_looped_whatever_the_point_says(tmp_path):
    program = lowered(conv_net(batch="4"), tmp_path, batch=32)
    assert program.batch_size == program.point.batch == 4
    batch = feed(conv_net(), items=10)
    same(outputs(conv_net(), batch), program.run(batch))


def test_a_model_without_a_batch_axis_is_called_once(tmp_path):
    artifact = no_batch()
    program = lowered(artifact, tmp_path, batch=8)
    assert program.batch_size is None
    same(outputs(artifact, feed(artifact)), program.run(feed(artifact)))


@pytest.mark.parametrize("words", [1, 5, 17])
def test_sequences_of_any_length_run_in_one_program(words, tmp_path):
    artifact = transformer()
    batch = feed(artifact, items=5, words=words)
    same(outputs(artifact, batch), lowered(artifact, tmp_path, batch=2).run(batch))


def test_outputs_whose_rank_or_size_nobody_knows_beforehand_may_change_from_call_to_call(tmp_path):
    nodes = [node("NonZero", "x", "places"), node("Reshape", "x shape", "free")]
    unchecked = proto(nodes, "x:float32[a,b] shape:int64[n]", "places:int64[2,c] free:float32")
    artifact = Artifact(model=ir.from_proto(unchecked))
    program = lowered(artifact, tmp_path)
    for x, shape in ((np.eye(2), [4]), (np.ones((2, 3)), [1, 3, 2]), (np.ones((1, 1)), [1])):
        batch = {"x": x.astype(np.float32), "shape": np.int64(shape)}
        same(outputs(artifact, batch), program.run(batch))


def test_inputs_and_outputs_go_by_position_and_bear_the_model_s_names(tmp_path):
    artifact = two_and_two()
    batch = feed(artifact, items=3)
    same(outputs(artifact, batch), lowered(artifact, tmp_path, batch=2).run(dict(reversed(batch.items()))))


def test_control_flow_runs(tmp_path):
    artifact = control_flow()
    batch = feed(artifact, items=2)
    same(outputs(artifact, batch), lowered(artifact, tmp_path, batch=2).run(batch))


def test_values_of_every_type_and_memory_are_taken_and_keep_their_types(tmp_path):
    nodes = [
        node("Cast", "half", "h", to=1), node("Cast", "brain", "b", to=1), node("Cast", "ids", "i", to=1),
        node("Cast", "truth", "t", to=1), node("Add", "h b", "s1"), node("Add", "i t", "s2"), node("Add", "s1 s2", "y"),
        node("Identity", "brain", "out"), node("Not", "truth", "lie"),
    ]  # fmt: skip
    inputs = "half:float16[batch,2] brain:bfloat16[batch,2] ids:int64[batch,2] truth:bool[batch,2]"
    artifact = build(nodes, inputs, "y:float32[batch,2] out:bfloat16[batch,2] lie:bool[batch,2]")
    call = {
        "half": np.float16([[1, 2]]), "brain": np.full((1, 2), 3, ml_dtypes.bfloat16),
        "ids": np.asfortranarray(np.int64([[3, 4], [5, 6]]))[:1], "truth": np.array([[True, False]]),
    }  # fmt: skip
    call["half"].flags.writeable = False
    program = lowered(artifact, tmp_path)
    assert program.drive([call], 0.0).inferences == 1
    found = program.run(call)
    assert np.array_equal(found["y"], [[8.0, 9.0]]) and np.array_equal(found["lie"], [[False, True]])
    assert found["out"].dtype == ml_dtypes.bfloat16 and np.array_equal(found["out"], call["brain"])


def test_what_comes_out_is_not_overwritten_by_the_next_call(tmp_path):
    artifact = mlp()
    program = lowered(artifact, tmp_path)
    first = program.run(feed(artifact, items=1))
    kept = first["y"].copy()
    program.run(feed(artifact, items=1, seed=1))
    assert np.array_equal(first["y"], kept)


# How it is run --------------------------------------------------------------------------------------------------------


def test_what_was_asked_for_is_set_and_recorded(tmp_path):
    facts = lowered(conv_net(), tmp_path, scenario="offline", batch=4, threads=4, streams=2).facts()
    point, settings = facts["operating_point"], facts["settings"]
    assert (point["threads"], point["streams"], point["batch"], point["floating_precision"]) == (4, 2, 4, "f32")
    assert settings["intra_op_num_threads"] == 3 and settings["free_dimensions"] == {"batch": 4}
    assert settings["graph_optimization_level"] == "ORT_ENABLE_ALL"
    assert [name for name, _ in settings["providers"]] == ["CPUExecutionProvider"]
    assert settings["session"]["session.intra_op.allow_spinning"] == "0"
    assert list(facts["nodes_by_provider"]) == ["CPUExecutionProvider"] and facts["device"]
    json.dumps(facts)


@pytest.mark.parametrize(
    ("threads", "streams", "taken"), [(1, 4, (1, 1)), (5, 2, (5, 2)), (2, None, (2, 2)), (8, None, (8, 4))]
)
def test_callers_and_the_pool_that_they_share_are_as_many_threads_as_were_asked_for(threads, streams, taken, tmp_path):
    program = lowered(mlp(), tmp_path, scenario="offline", threads=threads, streams=streams)
    assert (program.point.threads, program.point.streams) == taken
    # A caller works too: the pool has one thread less than the session is told.
    pool = program.settings["intra_op_num_threads"] - 1
    assert pool + program.point.streams == program.point.threads


def test_threads_spin_only_where_calls_follow_each_other(tmp_path):
    def spins(**point):
        return lowered(mlp(), tmp_path, **point).settings["session"]["session.intra_op.allow_spinning"]

    assert spins(scenario="single-stream", threads=2) == "1"
    assert spins(scenario="single-stream", threads=1) == spins(scenario="server", threads=2, streams=1) == "0"


@pytest.mark.parametrize("scenario", ["single-stream", "offline", "server"])
def test_a_point_that_leaves_all_open_is_filled_in_and_loads_again_as_it_is(scenario, tmp_path):
    first = lowered(mlp(), tmp_path, scenario=scenario, threads=None).point
    assert 1 <= first.streams <= first.threads <= usable_cpus()
    assert lowered(mlp(), tmp_path, **first.to_json()).point == first


def test_a_precision_nobody_knows_is_refused_with_those_known(tmp_path):
    with pytest.raises(BackendError, match="no floating precision 'bf16' here: known are f32"):
        lowered(conv_net(), tmp_path, floating_precision="bf16")


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{}, {"z": np.zeros((1, 6), np.float32)}, {"x": np.zeros((1, 6))}, {"x": np.zeros((1, 7), np.float32)}]
)
def test_wrong_names_types_and_shapes_are_refused_in_words(wrong, tmp_path):
    with pytest.raises(ValueError, match=r"the model's inputs are|was given"):
        lowered(mlp(), tmp_path).run(wrong)


def test_an_input_that_it_fails_on_is_an_error_in_words(tmp_path):
    with pytest.raises(BackendError, match="ONNX Runtime failed on this input") as error:
        picky(tmp_path).run({"x": np.zeros((1, 3), np.float32)})
    assert "ONNXRuntimeError" not in str(error.value) and ".cc:" not in str(error.value)


def test_a_refused_model_says_which_operator_it_was(tmp_path):
    model = conv_net().edit()
    model.opset_imports["com.example"] = 1
    relu = next(n for n in model.graph if n.op_type == "Relu")
    relu.domain, relu.op_type = "com.example", "Reloo"
    with pytest.raises(BackendError, match=r"^ONNX Runtime refused the model: .*Reloo") as error:
        lowered(Artifact(model=model), tmp_path)
    assert "\n" not in str(error.value)


def test_half_precision_without_a_kernel_is_an_error_in_its_words(tmp_path):
    artifact = build([node("MatMul", "x w", "y")], "x:bfloat16[batch,4]", "y:bfloat16[batch,2]",
                     {"w": weight(4, 2).astype(ml_dtypes.bfloat16)})  # fmt: skip
    with pytest.raises(BackendError, match=r"ONNX Runtime refused the model: .*MatMul"):
        lowered(artifact, tmp_path)


def test_a_broken_file_is_an_error_in_words_when_lowered_and_when_loaded(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"this is no model")
    broken = Artifact(path=tmp_path / "model.onnx", signature=mlp().signature)
    with pytest.raises(BackendError, match="ONNX Runtime refused the model"):
        TARGET.lower(broken, OperatingPoint())
    with pytest.raises(BackendError, match="ONNX Runtime refused the model"):
        TARGET.load(tmp_path, mlp().signature, OperatingPoint())


# What is saved --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [conv_net, transformer, two_and_two, no_batch])
def test_saved_and_loaded_it_gives_the_same_for_any_number_of_items(make, tmp_path):
    artifact = make()
    program = lowered(artifact, tmp_path, batch=4)
    (tmp_path / "saved").mkdir()
    assert [path.name for path in program.save(tmp_path / "saved")] == ["model.onnx"]
    loaded = TARGET.load(
        tmp_path / "saved", artifact.signature, OperatingPoint(**{**program.point.to_json(), "batch": 3})
    )
    batch = feed(artifact, items=7)
    same(program.run(batch), loaded.run(batch))


def test_weights_beside_the_model_are_saved_with_it(tmp_path):
    artifact = conv_net(width=64)
    plain = onnx.load(str(artifact.file(tmp_path)))
    (tmp_path / "beside").mkdir()
    where = tmp_path / "beside" / "m.onnx"
    onnx.save(plain, str(where), save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    program = TARGET.lower(Artifact(path=where, signature=artifact.signature), OperatingPoint(threads=1))
    (tmp_path / "saved").mkdir()
    assert sorted(path.name for path in program.save(tmp_path / "saved")) == ["m.onnx.data", "model.onnx"]
    batch = feed(artifact, items=2)
    loaded = TARGET.load(tmp_path / "saved", artifact.signature, OperatingPoint(threads=1))
    same(outputs(artifact, batch), loaded.run(batch))


def ort_file(artifact, folder):
    """The model in ONNX Runtime's own format."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "m.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(str(artifact.file(folder)), options, providers=["CPUExecutionProvider"])
    return folder / "m.ort"


@pytest.mark.parametrize("make", [conv_net, transformer, two_and_two, no_batch, lambda: conv_net(batch="4")])
def test_a_model_file_says_its_names_types_and_shapes_and_runs(make, tmp_path):
    artifact = make()
    path = ort_file(artifact, tmp_path)
    found = TARGET.file_signature(path)
    assert found == artifact.signature and TARGET.formats == (".ort",)
    opened = TARGET.open_file(path, found, OperatingPoint(batch=2, threads=1))
    batch = feed(artifact, items=5)
    same(outputs(artifact, batch) if found.batch != 4 else outputs(conv_net(), batch), opened.run(batch))
    (tmp_path / "saved").mkdir()
    assert [file.name for file in opened.save(tmp_path / "saved")] == ["model.ort"]
    same(opened.run(batch), TARGET.load(tmp_path / "saved", found, OperatingPoint(batch=2, threads=1)).run(batch))


def test_dimensions_without_a_name_are_named_after_their_place(tmp_path):
    artifact = build([node("Relu", "x", "y")], "x:float32[?,?,3]", "y:float32[?,?,3]")
    found = TARGET.file_signature(ort_file(artifact, tmp_path))
    assert found.inputs == (TensorSpec("x", "float32", ("batch", "axis1", 3)),) and found.batch == "batch"


def test_what_is_no_model_file_is_refused_in_words(tmp_path):
    (tmp_path / "bad.ort").write_text("nothing of the sort")
    with pytest.raises(InputError, match=r"bad\.ort is no ONNX Runtime model that can be read: "):
        TARGET.file_signature(tmp_path / "bad.ort")
    with pytest.raises(BackendError, match="ONNX Runtime refused the model"):
        TARGET.open_file(tmp_path / "bad.ort", Signature((), ()), OperatingPoint())


CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from run import Model
batch = dict(np.load(sys.argv[1] + "/in.npz"))
np.savez(sys.argv[1] + "/out.npz", **Model().run(batch))
foreign = {"perwatt", "torch", "onnx", "onnx_ir", "openvino"} & {name.split(".")[0] for name in sys.modules}
assert not foreign, foreign
"""


@pytest.mark.parametrize(("make", "items"), [(conv_net, 10), (transformer, 3), (two_and_two, 1), (no_batch, 1)])
def test_run_py_gives_the_same_with_onnxruntime_and_numpy_alone(make, items, tmp_path):
    artifact = make()
    program = lowered(artifact, tmp_path, scenario="offline", batch=4)
    (tmp_path / "onnxruntime").mkdir()
    program.save(tmp_path / "onnxruntime")
    (tmp_path / "program.json").write_text(json.dumps(program_json("onnxruntime", artifact.signature, program.facts())))
    (tmp_path / "run.py").write_text(TARGET.script())
    batch = feed(artifact, items=items)
    np.savez(tmp_path / "in.npz", **batch)
    done = subprocess.run([sys.executable, "-c", CHECK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as found:
        same(program.run(batch), dict(found))
    shown = subprocess.run([sys.executable, "run.py", "in.npz"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.startswith("output "), shown.stderr


@pytest.mark.parametrize("variant", PROVIDERS)
def test_the_script_names_what_has_to_be_installed_and_is_python(variant):
    text = ONNXRuntime(variant).script()
    assert f"pip install {PROVIDERS[variant].package} numpy" in text
    compile(text, "run.py", "exec")
