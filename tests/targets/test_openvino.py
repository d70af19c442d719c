"""OpenVINO: any number of items, any shape of model, what was asked for is what runs, what is saved runs alone."""

import json
import subprocess
import sys

import numpy as np
import openvino
import pytest
from models import (
    build,
    context,
    control_flow,
    conv_net,
    executed,
    feed,
    mlp,
    no_batch,
    node,
    outputs,
    transformer,
    two_and_two,
    weight,
)  # fmt: skip
from openvino import opset13 as opset

from perwatt.artifact import Artifact
from perwatt.bundle import program_json
from perwatt.contract import OperatingPoint
from perwatt.errors import BackendError, InputError
from perwatt.passes.quantize_int8 import QuantizeInt8
from perwatt.signature import Signature, TensorSpec
from perwatt.targets._cpu import channel_multiples, usable_cpus
from perwatt.targets.openvino import OpenVINO, has_asymmetric_signed_values

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


def test_nothing_is_missing_and_capabilities_are_plain_data():
    assert TARGET.missing() == []
    found = TARGET.capabilities()
    assert "f32" in found.floating_precisions
    assert ("bf16" in found.floating_precisions) == ("bfloat16" in found.half_types)
    assert [style.name for style in found.quantization_styles][:1] == ["symmetric"]
    assert TARGET.name() == "openvino" and set(TARGET.versions()) == {"openvino"}


def test_multiples_of_channels_follow_the_instruction_set():
    assert channel_multiples(("avx512f", "amx_int8", "amx_bf16")) == {"int8": 64, "bfloat16": 32, "float32": 16}
    assert channel_multiples(("avx2", "avx512f", "avx512_vnni")) == {"int8": 16, "bfloat16": 16, "float32": 16}
    assert set(channel_multiples(("avx2",)).values()) == {8}


@pytest.mark.parametrize("items", [1, 3, 8, 33])
def test_any_number_of_items_gives_what_batch_one_gives(items, tmp_path):
    artifact = conv_net()
    batch = feed(artifact, items=items)
    same(outputs(artifact, batch), lowered(artifact, tmp_path, batch=8).run(batch))
    same(outputs(artifact, batch), lowered(artifact, tmp_path, batch=1).run(batch))


def test_quantized_products_one_after_the_other_give_what_the_graph_says(tmp_path):
    # Two of them with a static batch and no bias between are one kernel to OpenVINO 2026.4, which is wrong by far.
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "a v", "y")]
    artifact = build(nodes, "x:float32[batch,8]", "y:float32[batch,8]", {"w": weight(8, 8), "v": weight(8, 8, seed=1)})
    batch = feed(artifact, items=4)
    given = context([batch], execute=executed)
    quantized, _ = QuantizeInt8(smooth=0.0, bias_correction=False).run(artifact, given)
    program = lowered(quantized, tmp_path, batch=4)
    same(outputs(quantized, batch), program.run(batch), atol=1e-3)
    assert program.settings["SNIPPETS_MODE"] == "DISABLE"
    assert "SNIPPETS_MODE" not in lowered(artifact, tmp_path, batch=4).settings


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


def test_inputs_and_outputs_go_by_position_and_bear_the_model_s_names(tmp_path):
    artifact = two_and_two()
    batch = feed(artifact, items=3)
    backwards = dict(reversed(batch.items()))
    same(outputs(artifact, batch), lowered(artifact, tmp_path, batch=2).run(backwards))


def test_outputs_that_are_inputs_or_the_same_value_keep_their_places(tmp_path):
    nodes = [node("Relu", "x", "a"), node("Identity", "a", "b"), node("Identity", "x", "c")]
    artifact = build(nodes, "x:float32[batch,4]", " ".join(f"{n}:float32[batch,4]" for n in "bca"))
    batch = feed(artifact)
    same(outputs(artifact, batch), lowered(artifact, tmp_path, batch=2).run(batch))


def test_whole_numbers_and_truth_values_keep_their_types(tmp_path):
    nodes = [
        node("ArgMax", "x", "top", axis=1, keepdims=0),
        node("Greater", "x zero", "more"),
        node("Add", "ids ids", "twice"),
    ]
    artifact = build(
        nodes, "x:float32[batch,4] ids:int64[batch,2]", "top:int64[batch] more:bool[batch,4] twice:int64[batch,2]",
        {"zero": np.float32(0)},
    )  # fmt: skip
    batch = feed(artifact)
    same(outputs(artifact, batch), lowered(artifact, tmp_path, batch=2).run(batch))


def test_control_flow_runs(tmp_path):
    artifact = control_flow()
    batch = feed(artifact, items=2)
    same(outputs(artifact, batch), lowered(artifact, tmp_path, batch=2).run(batch))


def test_arrays_in_any_layout_and_read_only_ones_are_taken(tmp_path):
    artifact = mlp()
    batch = {"x": np.asfortranarray(feed(artifact, items=4)["x"])}
    batch["x"].flags.writeable = False
    same(outputs(artifact, batch), lowered(artifact, tmp_path, batch=4).run(batch))


def test_what_comes_out_is_not_overwritten_by_the_next_call(tmp_path):
    artifact = mlp()
    program = lowered(artifact, tmp_path)
    first = program.run(feed(artifact, items=1))
    kept = first["y"].copy()
    program.run(feed(artifact, items=1, seed=1))
    assert np.array_equal(first["y"], kept)


@pytest.mark.parametrize(
    "wrong", [{}, {"z": np.zeros((1, 6), np.float32)}, {"x": np.zeros((1, 6))}, {"x": np.zeros((1, 7), np.float32)}]
)
def test_wrong_names_types_and_shapes_are_refused_in_words(wrong, tmp_path):
    with pytest.raises(ValueError, match=r"the model's inputs are|was given"):
        lowered(mlp(), tmp_path).run(wrong)


@pytest.mark.parametrize("precision", [None, *TARGET.capabilities().floating_precisions])
def test_the_execution_precision_is_set_and_read_back(precision, tmp_path):
    facts = lowered(conv_net(), tmp_path, floating_precision=precision).facts()
    expected = precision or TARGET.capabilities().floating_precisions[0]
    assert facts["execution_precision"] == facts["operating_point"]["floating_precision"] == expected
    assert facts["settings"]["INFERENCE_PRECISION_HINT"] == expected
    json.dumps(facts)


def test_threads_and_streams_are_as_asked_and_otherwise_read_back(tmp_path):
    point = lowered(conv_net(), tmp_path, scenario="offline", threads=2, streams=2).facts()["operating_point"]
    assert (point["threads"], point["streams"], point["scenario"]) == (2, 2, "offline")
    free = lowered(conv_net(), tmp_path, threads=None).facts()["operating_point"]
    assert free["threads"] >= 1 and free["streams"] >= 1


def test_a_precision_nobody_knows_is_refused_with_those_known(tmp_path):
    with pytest.raises(BackendError, match="no floating precision 'int4': known are bf16, f32, f16"):
        lowered(conv_net(), tmp_path, floating_precision="int4")


@pytest.mark.parametrize("make", [conv_net, transformer, two_and_two, no_batch])
def test_saved_and_loaded_it_gives_the_same_for_any_number_of_items(make, tmp_path):
    artifact = make()
    program = lowered(artifact, tmp_path, batch=4)
    assert all(path.is_file() for path in program.save(tmp_path))
    loaded = TARGET.load(tmp_path, artifact.signature, OperatingPoint(**{**program.point.to_json(), "batch": 3}))
    batch = feed(artifact, items=7)
    same(program.run(batch), loaded.run(batch), atol=1e-5)


def test_saving_leaves_weights_as_they_are(tmp_path):
    artifact = conv_net(width=64)
    lowered(artifact, tmp_path).save(tmp_path)
    assert (tmp_path / "model.bin").stat().st_size > 0.9 * artifact.size_bytes()


# Devices and what can be tuned ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "plugin"), [("gpu", "GPU"), ("npu", "NPU")])
def test_a_device_that_is_not_here_says_what_it_takes(variant, plugin):
    target = OpenVINO(variant)
    assert target.full_name == f"openvino:{variant}" and target.device == "gpu" and variant in OpenVINO.variants
    if any(device.startswith(plugin) for device in openvino.Core().available_devices):
        pytest.skip(f"{plugin} is here")
    (reason,) = target.missing()
    assert f"openvino finds no {plugin} here, only CPU" in reason and "driver" in reason


def test_knobs_are_those_of_the_scenario_within_the_cpus_that_may_be_used():
    single = TARGET.knobs(OperatingPoint(scenario="single-stream"))
    assert set(single) == {"threads", "pinned"} and max(single["threads"]) == usable_cpus()
    offline = TARGET.knobs(OperatingPoint(scenario="offline", streams=3))
    assert set(offline) == {"threads", "streams", "batch", "pinned", "requests"}
    assert offline["requests"] == (None, 6) and None in offline["pinned"] and offline["batch"][-1] == 64


@pytest.mark.parametrize("pinned", [True, False])
def test_pinning_is_as_asked_and_otherwise_read_back(pinned, tmp_path):
    program = lowered(mlp(), tmp_path, pinned=pinned)
    assert program.point.pinned is pinned and program.settings["ENABLE_CPU_PINNING"] is pinned
    free = lowered(mlp(), tmp_path)
    assert isinstance(free.point.pinned, bool) and "ENABLE_CPU_PINNING" not in free.settings


# Model files of OpenVINO's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [conv_net, transformer, two_and_two, no_batch, lambda: conv_net(batch="4")])
def test_a_model_file_says_its_names_types_and_shapes_and_runs(make, tmp_path):
    artifact = make()
    program = lowered(artifact, tmp_path, batch=4)
    program.save(tmp_path)
    found = TARGET.file_signature(tmp_path / "model.xml")
    for old, new in zip(
        (*artifact.signature.inputs, *artifact.signature.outputs), (*found.inputs, *found.outputs), strict=True
    ):
        assert (new.name, new.dtype) == (old.name, old.dtype)
        assert [d if isinstance(d, int) else "?" for d in new.shape] == [
            d if isinstance(d, int) else "?" for d in old.shape
        ]
    assert isinstance(found.batch, str) == isinstance(artifact.signature.batch, str)
    opened = TARGET.open_file(
        tmp_path / "model.xml", found, OperatingPoint(batch=2, floating_precision="f32", threads=2)
    )
    batch = feed(artifact, items=5)
    same(program.run(batch), opened.run(batch), atol=1e-5)


def ir_file(folder, *parameters, named=True):
    """An IR whose outputs are its inputs, doubled; inputs are (name, OpenVINO type, shape)."""
    inputs = []
    for name, kind, shape in parameters:
        made = opset.parameter(openvino.PartialShape(shape), getattr(openvino.Type, kind))
        made.set_friendly_name(name)
        if named:
            made.output(0).set_names({name})
        inputs.append(made)
    results = [opset.result(opset.add(made, made)) for made in inputs]
    openvino.save_model(openvino.Model(results, inputs), str(folder / "m.xml"), compress_to_fp16=False)
    return folder / "m.xml"


def test_dynamic_dimensions_are_named_after_their_place_and_the_first_is_the_batch(tmp_path):
    found = TARGET.file_signature(ir_file(tmp_path, ("ids", "i64", "[?,?]"), ("mask", "bf16", "[1..8,?,1..5]")))
    assert found.inputs == (
        TensorSpec("ids", "int64", ("batch", "axis1")), TensorSpec("mask", "bfloat16", ("batch", "axis1", "axis2")),
    )  # fmt: skip
    assert found.batch == "batch" and found.other_dynamic == {"axis1", "axis2"}


@pytest.mark.parametrize(
    ("kind", "dtype"), [("f32", "float32"), ("f16", "float16"), ("u8", "uint8"), ("i32", "int32"), ("f64", "float64")]
)
def test_types_are_those_of_numpy(kind, dtype, tmp_path):
    assert TARGET.file_signature(ir_file(tmp_path, ("x", kind, "[2,3]"))).inputs == (TensorSpec("x", dtype, (2, 3)),)


def test_a_port_without_a_name_and_one_without_a_rank_are_known_all_the_same(tmp_path):
    nameless = TARGET.file_signature(ir_file(tmp_path, ("x", "f32", "[2]"), named=False))
    assert nameless.inputs == (TensorSpec("x", "float32", (2,)),) and nameless.outputs[0].name
    anything = TARGET.file_signature(ir_file(tmp_path, ("x", "f32", "...")))
    assert anything.inputs[0].shape is None and anything.batch is None


def test_what_is_no_model_file_is_refused_in_words(tmp_path):
    assert TARGET.formats == (".xml",)
    (tmp_path / "bad.xml").write_text("<html/>")
    with pytest.raises(InputError, match=r"bad\.xml is no OpenVINO model that can be read: Unable to read the model"):
        TARGET.file_signature(tmp_path / "bad.xml")
    lowered(conv_net(), tmp_path).save(tmp_path)
    (tmp_path / "model.bin").unlink()
    with pytest.raises(InputError, match=r"it needs its model\.bin beside it"):
        TARGET.file_signature(tmp_path / "model.xml")
    with pytest.raises(BackendError, match="OpenVINO refused the model: Empty weights"):
        TARGET.open_file(tmp_path / "model.xml", Signature((), ()), OperatingPoint())


def test_a_refused_model_says_which_operator_it_was(tmp_path):
    artifact = conv_net()
    model = artifact.edit()
    model.opset_imports["com.example"] = 1
    relu = next(n for n in model.graph if n.op_type == "Relu")
    relu.domain, relu.op_type = "com.example", "Reloo"
    with pytest.raises(BackendError) as error:
        lowered(Artifact(model=model), tmp_path)
    words = str(error.value)
    assert words.startswith("OpenVINO refused the model: ") and "Reloo" in words and "\n" not in words
    assert "src/" not in words


def test_a_broken_file_is_an_error_in_words_when_lowered_and_when_loaded(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"this is no model")
    broken = Artifact(path=tmp_path / "m.onnx", signature=mlp().signature)
    with pytest.raises(BackendError, match="OpenVINO refused the model"):
        TARGET.lower(broken, OperatingPoint())
    with pytest.raises(BackendError, match="OpenVINO refused the model"):
        TARGET.load(tmp_path, mlp().signature, OperatingPoint())


def quantized(zero_point, dtype):
    """A convolution between Q/DQ, then a batch normalization, which OpenVINO runs in the chosen floating precision."""
    scale = np.linspace(1e-3, 2e-3, 8).astype(np.float32)
    nodes = [
        node("QuantizeLinear", "x s z", "q1"), node("DequantizeLinear", "q1 s z", "d1"),
        node("DequantizeLinear", "w ws wz", "wd", axis=0), node("Conv", "d1 wd", "c", pads=[1, 1, 1, 1]),
        node("QuantizeLinear", "c s z", "q2"), node("DequantizeLinear", "q2 s z", "d2"),
        node("BatchNormalization", "d2 ws ws ws ws", "y"),
    ]  # fmt: skip
    weights = {
        "s": np.float32(0.05), "z": dtype(zero_point), "w": weight(8, 4, 3, 3, scale=40).astype(np.int8), "ws": scale,
        "wz": np.zeros(8, np.int8),
    }  # fmt: skip
    return build(nodes, "x:float32[batch,4,8,8]", "y:float32[batch,8,8,8]", weights)


@pytest.mark.parametrize(
    ("zero_point", "dtype", "found"), [(5, np.int8, True), (0, np.int8, False), (5, np.uint8, False)]
)
def test_signed_values_with_a_zero_point_are_told_from_others(zero_point, dtype, found, tmp_path):
    path = quantized(zero_point, dtype).file(tmp_path)
    assert has_asymmetric_signed_values(openvino.Core().read_model(str(path))) is found


@pytest.mark.skipif("bf16" not in TARGET.capabilities().floating_precisions, reason="needs bfloat16")
def test_signed_activations_with_a_zero_point_that_do_not_compile_say_what_to_do_instead(tmp_path):
    with pytest.raises(BackendError, match="OpenVINO refused the model: ") as error:
        lowered(quantized(5, np.int8), tmp_path, floating_precision="bf16")
    assert "quantize them symmetrically, or as uint8" in error.value.fix
    lowered(quantized(5, np.uint8), tmp_path, floating_precision="bf16")
    lowered(quantized(0, np.int8), tmp_path, floating_precision="bf16")


def test_an_input_that_openvino_fails_on_is_an_error_in_words(tmp_path):
    artifact = build(
        [node("Reshape", "x to", "r"), node("MatMul", "r w", "y")], "x:float32[a,b]", "y:float32[a,2]",
        {"to": np.int64([-1, 4]), "w": weight(4, 2)},
    )  # fmt: skip
    program = lowered(artifact, tmp_path)
    with pytest.raises(BackendError, match="OpenVINO failed on this input"):
        program.run({"x": np.zeros((1, 3), np.float32)})


# What is deployed ---------------------------------------------------------------------------------------------------

CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from run import Model
batch = dict(np.load(sys.argv[1] + "/in.npz"))
np.savez(sys.argv[1] + "/out.npz", **Model().run(batch))
foreign = {"perwatt", "torch", "onnx", "onnx_ir", "onnxruntime"} & {name.split(".")[0] for name in sys.modules}
assert not foreign, foreign
"""


def deployed(artifact, folder, **point):
    """A folder as a bundle holds it: `run.py`, `program.json` and the model."""
    program = lowered(artifact, folder, **point)
    (folder / "openvino").mkdir()
    program.save(folder / "openvino")
    (folder / "program.json").write_text(json.dumps(program_json("openvino", artifact.signature, program.facts())))
    (folder / "run.py").write_text(TARGET.script())
    return program


@pytest.mark.parametrize(("make", "items"), [(conv_net, 10), (transformer, 3), (two_and_two, 1), (no_batch, 1)])
def test_run_py_gives_the_same_with_openvino_and_numpy_alone(make, items, tmp_path):
    artifact = make()
    program = deployed(artifact, tmp_path, batch=4)
    batch = feed(artifact, items=items)
    np.savez(tmp_path / "in.npz", **batch)
    done = subprocess.run([sys.executable, "-c", CHECK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as found:
        same(program.run(batch), dict(found), atol=1e-6)


def test_run_py_is_a_command_too(tmp_path):
    artifact = conv_net()
    deployed(artifact, tmp_path, batch=2)
    np.savez(tmp_path / "samples.npz", pictures=feed(artifact, items=5)["x"], labels=np.arange(5))
    command = [sys.executable, "run.py", "samples.npz", "out.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "output y: float32[5, 5]\n"
    with np.load(tmp_path / "out.npz") as found:
        assert found["y"].shape == (5, 5)
    np.savez(tmp_path / "other.npz", one=np.zeros(1), two=np.zeros(1))
    failed = subprocess.run([*command[:2], "other.npz"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1 and "the model's inputs are ['x']" in failed.stderr


def test_run_py_ends_in_one_line_where_its_arguments_do_not_fit(tmp_path):
    deployed(conv_net(), tmp_path, batch=2)
    np.savez(tmp_path / "flat.npz", x=np.zeros((4, 7), np.float32))
    for arguments, words in ((["nofile.npz"], "nofile.npz is no .npz file"), (["flat.npz"], "input x takes float32")):
        failed = subprocess.run([sys.executable, "run.py", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert failed.returncode == 1 and words in failed.stderr and len(failed.stderr.strip().split("\n")) == 1
    shown = subprocess.run([sys.executable, "run.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and "python run.py samples.npz" in shown.stdout


def test_run_py_prepares_uint8_pictures_as_they_were_for_optimizing(tmp_path):
    artifact = conv_net()
    deployed(artifact, tmp_path, batch=2)
    program = json.loads((tmp_path / "program.json").read_text())
    program["preprocessing"] = {"normalize": "0.5/0.25", "mean": [0.5], "std": [0.25]}
    (tmp_path / "program.json").write_text(json.dumps(program))
    _, channels, height, width = artifact.signature.inputs[0].shape
    pictures = np.random.default_rng(0).integers(0, 256, (3, height, width, channels), dtype=np.uint8)
    ready = np.ascontiguousarray(
        ((pictures / np.float32(255) - np.float32(0.5)) / np.float32(0.25)).transpose(0, 3, 1, 2)
    )
    for name, array in (("raw", pictures), ("ready", ready)):
        np.savez(tmp_path / f"{name}.npz", x=array)
        subprocess.run([sys.executable, "run.py", f"{name}.npz", f"{name}-out.npz"], cwd=tmp_path, check=True)
    with np.load(tmp_path / "raw-out.npz") as raw, np.load(tmp_path / "ready-out.npz") as prepared:
        np.testing.assert_allclose(raw["y"], prepared["y"], rtol=1e-5, atol=1e-6)
