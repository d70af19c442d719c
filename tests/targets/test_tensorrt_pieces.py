"""What surrounds TensorRT's engine: refusals and their rewrites, 2:4 weights, capabilities, layer types, the run script
and the shell script. What wants a GPU runs against the scripted stand-in, and says so in its name."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, conv_net, feed, mlp, node, outputs, transformer, weight

sys.path.insert(0, str(Path(__file__).parent))

from tensorrt_standin import Machine

from perwatt.bundle import program_json
from perwatt.contract import OperatingPoint
from perwatt.errors import BackendError
from perwatt.registry import serving, target
from perwatt.signature import Signature, TensorSpec
from perwatt.targets import _tensorrt_build
from perwatt.targets._tensorrt_build import Bounds, profile_shapes
from perwatt.targets._tensorrt_refusal import ELSEWHERE, REWRITES, Refusal, refused
from perwatt.targets._tensorrt_sparsity import is_two_to_four, sparse_weights
from perwatt.targets._tensorrt_trtexec import trtexec_script
from perwatt.targets.tensorrt import TensorRT


@pytest.fixture
def machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _tensorrt_build._kept.clear()
    return Machine().install(monkeypatch)


def lowered(artifact, folder, **point):
    artifact.file(folder)
    return TensorRT().lower(artifact, OperatingPoint(**point))


# What is here ---------------------------------------------------------------------------------------------------------


def test_without_tensorrt_the_command_that_gets_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    (reason,) = TensorRT().missing()
    assert "tensorrt can't be imported" in reason and "pip install tensorrt" in reason


def test_an_old_tensorrt_and_a_missing_gpu_are_named_on_a_scripted_stand_in(machine, monkeypatch):
    assert TensorRT().missing() == []
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    (reason,) = TensorRT().missing()
    assert "neither cuda.bindings nor torch" in reason and "pip install cuda-python" in reason
    Machine(version="8.6.1").install(monkeypatch)
    assert TensorRT().missing() == ["TensorRT 8.6.1 is too old: pip install 'tensorrt>=10'"]


@pytest.mark.parametrize(
    ("capability", "styles", "half", "sparse", "precisions"),
    [
        ((7, 5), ["symmetric"], ("float16",), (), ("f32",)),
        ((8, 0), ["symmetric"], ("float16", "bfloat16"), ("float16", "bfloat16", "int8"), ("tf32", "f32")),
        ((8, 9), ["symmetric", "float8"], ("float16", "bfloat16"), ("float16", "bfloat16", "int8"), ("tf32", "f32")),
    ],
)
def test_capabilities_follow_the_gpu_on_a_scripted_stand_in(capability, styles, half, sparse, precisions, monkeypatch):
    Machine(capability=capability).install(monkeypatch)
    found = TensorRT().capabilities()
    assert [style.name for style in found.quantization_styles] == styles
    assert found.quantization_styles[0].activation_symmetric and found.quantization_styles[0].weight_per_channel
    assert (found.half_types, found.sparse_types, found.floating_precisions) == (half, sparse, precisions)
    assert found.isa == (f"sm_{capability[0]}{capability[1]}",)


def test_it_serves_the_gpu_and_tunes_what_it_has():
    assert "tensorrt" in serving("gpu")
    found = target("tensorrt")
    assert (found.device, found.slow_to_lower, found.full_name) == ("gpu", False, "tensorrt")
    assert set(found.knobs(OperatingPoint())) == {"graphs", "autotune"}
    offline = found.knobs(OperatingPoint("offline"))
    assert set(offline) == {"graphs", "autotune", "batch", "streams"} and all(offline.values())
    assert set(offline) <= {field.name for field in fields(OperatingPoint)} and None not in offline["batch"]


def test_versions_name_what_does_the_work_on_a_scripted_stand_in(machine):
    assert TensorRT().versions() == {"tensorrt": "11.4.0.106", "cuda": "13.2"}


# Refusals -------------------------------------------------------------------------------------------------------------


def asymmetric():
    nodes = [
        node("QuantizeLinear", "x scale zero", "q", name="/layer1/quantize"),
        node("DequantizeLinear", "q scale zero", "y", name="/layer1/dequantize"),
    ]
    constants = {"scale": np.float32(0.1), "zero": np.uint8(128)}
    return build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", constants)


def test_asymmetric_activations_are_refused_with_the_rewrite_on_a_scripted_stand_in(machine, tmp_path):
    with pytest.raises(BackendError) as caught:
        lowered(asymmetric(), tmp_path)
    assert caught.value.message == (
        "TensorRT's parser refused the model: node 0 '/layer1/quantize' (QuantizeLinear): INVALID_NODE: Assertion failed: "
        "shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported.; node 1 '/layer1/dequantize' "
        "(DequantizeLinear): INVALID_NODE: Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported."
    )
    assert (
        caught.value.fix.startswith("TensorRT's quantization is symmetric")
        and "activations: symmetric" in caught.value.fix
    )
    assert machine.builds == []


def test_a_build_that_fails_gives_the_builder_s_words_on_a_scripted_stand_in(machine, tmp_path):
    machine.fails_to_build = True
    with pytest.raises(
        BackendError, match="could not build the engine: Error Code 10: Could not find any implementation"
    ):
        lowered(mlp(), tmp_path)


def test_shapes_that_depend_on_data_are_refused_on_a_scripted_stand_in(machine, tmp_path):
    with pytest.raises(BackendError, match="the shape of output y depends on the data"):
        lowered(build([node("NonZero", "x", "y")], "x:float32[2,4]", "y:int64[2,many]"), tmp_path)
    nodes = [node("Reshape", "x to", "y")]
    with pytest.raises(BackendError, match="the values of input to decide shapes"):
        lowered(build(nodes, "x:float32[2,4] to:int64[2]", "y:float32[a,b]"), tmp_path)


def test_an_input_of_unknown_rank_is_refused():
    anything = TensorSpec("x", "float32", None)
    with pytest.raises(BackendError, match="wants the rank of every input, that of x is unknown"):
        profile_shapes(Signature((anything,), (anything,)), 1, Bounds())


@pytest.mark.parametrize(
    ("operator", "description", "words"),
    [
        ("DequantizeLinear", "TensorRT doesn't support UINT8 zero_point", "symmetric"),
        ("QuantizeLinear", "axis must be 0 for weights", "one scale for each output channel"),
        ("DynamicQuantizeLinear", "no importer registered", "QuantizeLinear and DequantizeLinear pairs"),
        ("Conv", "Found unsupported datatype (DOUBLE)", "float64"),
        ("", "Assertion failed: model opset 26 is newer than 25", "opset_version"),
        ("NonZero", "unsupported", "mask"),
        ("Loop", "scan output length cannot be dynamic", "unroll"),
        ("SequenceAt", "no importer", "plain tensors"),
        ("FancyNorm", "could not find plugin FancyNorm", "standard ones"),
        ("Conv", "something nobody has seen", None),
    ],
)
def test_the_rewrite_fits_the_refusal(operator, description, words):
    refusal = Refusal("UNSUPPORTED_NODE", 3, "/n", operator, description)
    assert (refusal.rewrite() is None) if words is None else (words in refusal.rewrite())
    error = refused([refusal], "")
    assert description in error.message and (error.fix == ELSEWHERE) == (words is None)


def test_many_refusals_are_cut_and_counted_and_none_falls_back_on_the_log():
    many = [Refusal("UNSUPPORTED_NODE", i, "", "NonZero", "no") for i in range(9)]
    error = refused(many, "")
    assert error.message.count("NonZero") == 5 and error.message.endswith("; and 4 more")
    assert error.fix.count("mask") == 1
    assert refused([], "could not open file").message == "TensorRT's parser refused the model: could not open file"
    assert all(advice and "\n" not in advice for _, _, advice in REWRITES)


# 2:4 weights ----------------------------------------------------------------------------------------------------------


def pruned(array, axis):
    """The two smallest of every four along `axis` set to zero."""
    moved = np.moveaxis(array.copy(), axis, -1)
    groups = moved.reshape(-1, 4)
    np.put_along_axis(groups, np.argsort(np.abs(groups), axis=1)[:, :2], 0, axis=1)
    return np.ascontiguousarray(np.moveaxis(groups.reshape(moved.shape), -1, axis))


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    groups=st.integers(1, 4),
    axis=st.integers(0, 3),
    data=st.data(),
)
def test_two_zeros_in_every_four_along_the_axis_and_not_one_less(shape, groups, axis, data):
    axis %= len(shape) + 1
    array = np.ones([*shape[:axis], 4 * groups, *shape[axis:]], np.float32)
    array *= np.random.default_rng(len(shape)).permutation(array.size).reshape(array.shape) + 1
    sparse = pruned(array, axis)
    assert not is_two_to_four(array, axis) and is_two_to_four(sparse, axis)
    flat = np.flatnonzero(sparse == 0)
    sparse.flat[data.draw(st.sampled_from(flat.tolist()))] = 1
    assert not is_two_to_four(sparse, axis)


def test_an_axis_that_four_does_not_divide_is_dense():
    assert not is_two_to_four(np.zeros((4, 6), np.float32), 1) and not is_two_to_four(np.zeros(8, np.float32), 0)


def products(prune):
    """A convolution, a product and a Gemm of each kind, some with 2:4 weights, one of them quantized."""
    nodes = [
        node("Conv", "x conv", "c"), node("Flatten", "c", "f"), node("MatMul", "f left", "l"),
        node("DequantizeLinear", "eight scale", "d"), node("MatMul", "l d", "m"),
        node("Gemm", "m turned", "y", transB=1),
    ]  # fmt: skip
    constants = {
        "conv": weight(4, 8, 1, 1), "left": weight(4, 8), "turned": weight(3, 8), "scale": np.float32(0.1),
        "eight": np.clip(np.round(weight(8, 8) * 40), 1, 127).astype(np.int8),
    }  # fmt: skip
    axes = {"conv": 1, "left": 0, "eight": 0, "turned": 1}
    for name in prune:
        constants[name] = pruned(constants[name], axes[name])
    return build(nodes, "x:float32[batch,8,1,1]", "y:float32[batch,3]", constants)


@pytest.mark.parametrize("names", [[], ["conv"], ["left", "eight"], ["conv", "left", "eight", "turned"]])
def test_sparse_weights_are_found_and_the_builder_told_on_a_scripted_stand_in(names, machine, tmp_path):
    artifact = products(names)
    assert sparse_weights(artifact) == names
    program = lowered(artifact, tmp_path, batch=2)
    assert ("SPARSE_WEIGHTS" in {flag.name for flag in machine.builds[0].config._flags}) == bool(names)
    assert program.facts()["settings"]["sparse_weights"] == len(names)


def test_weights_pruned_along_another_axis_are_dense():
    artifact = products([])
    model = artifact.edit()
    value = model.graph.initializers["left"]
    value.const_value = ir.Tensor(pruned(value.const_value.numpy(), 1), name="left")
    assert sparse_weights(type(artifact)(model=model)) == []


def test_older_gpus_have_no_sparse_kernels_on_a_scripted_stand_in(machine, monkeypatch, tmp_path):
    old = Machine(capability=(7, 5)).install(monkeypatch)
    program = lowered(products(["conv"]), tmp_path)
    assert {flag.name for flag in old.builds[0].config._flags} == set()
    assert program.facts()["settings"]["sparse_weights"] == 0 and program.point.floating_precision == "f32"


# Facts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["11.4.0.106", "10.16.1.11"])
def test_layers_tell_their_types_in_both_generations_on_a_scripted_stand_in(version, machine, monkeypatch, tmp_path):
    Machine(version=version).install(monkeypatch)
    facts = lowered(products([]), tmp_path, batch=2).facts()
    assert facts["layer_types"] == {"float32": 5, "int8": 1}
    assert facts["execution_precision"] == "tf32 + int8"
    assert (facts["backend"], facts["device"]) == ("tensorrt", "NVIDIA Scripted GPU")
    json.dumps(facts)


# Scripts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [conv_net, transformer])
def test_run_py_gives_what_the_model_gives_on_a_scripted_stand_in(make, machine, tmp_path):
    artifact = make()
    program = lowered(artifact, tmp_path, batch=4)
    (tmp_path / "tensorrt").mkdir()
    program.save(tmp_path / "tensorrt")
    (tmp_path / "program.json").write_text(json.dumps(program_json("tensorrt", artifact.signature, program.facts())))
    (tmp_path / "run.py").write_text(TensorRT().script())
    spec = importlib.util.spec_from_file_location("perwatt_run_of_tensorrt", tmp_path / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Model()
    for seed in range(2):
        batch = feed(artifact, items=7, seed=seed)
        found = model.run(batch)
        assert all(np.allclose(found[name], array, atol=1e-4) for name, array in outputs(artifact, batch).items())
    machine.version = "11.5.0.1"
    machine.install(pytest.MonkeyPatch())
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit, match=r"was built by TensorRT 11\.4\.0\.106, here is 11\.5\.0\.1"):
        module.Model()


SPEECH = Signature(
    (TensorSpec("ids", "int64", ("batch", "words")), TensorSpec("it's:odd", "float32", ("batch", 3))),
    (TensorSpec("y", "float32", ("batch", 2)),),
)
FAKE_TRTEXEC = """#!/bin/sh
if [ "$1" = --help ]; then echo '{help}'; exit 0; fi
for option in "$@"; do printf '%s\\n' "$option"; done >>calls.txt
case "$*" in *broken*) echo '[E] it broke'; exit 1;; esac
echo '[I] Throughput: 123 qps'
"""


def run_script(folder, text, help_text):
    """The script run by `sh` with a scripted trtexec; what it was given, call after call."""
    (folder / "trtexec.sh").write_text(text)
    program = folder / "fake trtexec"
    program.write_text(FAKE_TRTEXEC.format(help=help_text))
    program.chmod(0o755)
    environment = {**os.environ, "TRTEXEC": str(program)}
    done = subprocess.run(["sh", str(folder / "trtexec.sh")], capture_output=True, text=True, env=environment, cwd="/")
    return done, (folder / "calls.txt").read_text().split("\n")[:-1] if (folder / "calls.txt").exists() else []


FILES = ["model.onnx", "with space/it's $HOME.onnx"]


def test_the_shell_script_is_clean(tmp_path):
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    if not Path(shellcheck).exists():
        pytest.skip("shellcheck is not installed")
    for signature in (SPEECH, mlp().signature, mlp(batch="2").signature):
        (tmp_path / "trtexec.sh").write_text(trtexec_script(FILES, signature, batch=8))
        done = subprocess.run([shellcheck, str(tmp_path / "trtexec.sh")], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("help_text", "own"),
    [
        ("--stronglyTyped --useCudaGraph", ["--stronglyTyped", "--useCudaGraph"]),
        ("--stronglyTyped --includeDataTransfers", ["--includeDataTransfers"]),
    ],
)
def test_the_shell_script_asks_of_either_generation_the_same_with_a_scripted_trtexec(help_text, own, tmp_path):
    (tmp_path / "with space").mkdir()
    done, calls = run_script(tmp_path, trtexec_script(FILES, SPEECH, batch=8), help_text)
    assert done.returncode == 0, done.stderr
    expected = []
    for file in FILES:
        stem = file.removesuffix(".onnx")
        expected += [f"--onnx={file}", f"--saveEngine={stem}.engine", "--timingCacheFile=tensorrt.timing"]
        expected += ["--sparsity=enable", "--duration=10", f"--exportTimes={stem}.times.json", *own]
        expected += [
            "--minShapes=ids:8x1,'it's:odd':8x3", "--optShapes=ids:8x128,'it's:odd':8x3",
            "--maxShapes=ids:8x512,'it's:odd':8x3", "--shapes=ids:8x128,'it's:odd':8x3",
        ]  # fmt: skip
    assert calls == expected
    assert "Throughput: 123 qps" in done.stdout


def test_a_fixed_model_is_given_no_shapes_and_a_dynamic_batch_only_one():
    assert "hapes" not in trtexec_script(["m.onnx"], mlp(batch="2").signature)
    text = trtexec_script(["m.onnx"], mlp().signature, batch=16)
    assert "--shapes=x:16x6\n" in text and "--minShapes" not in text


def test_one_that_fails_does_not_keep_the_others_from_being_timed_with_a_scripted_trtexec(tmp_path):
    done, calls = run_script(tmp_path, trtexec_script(["broken.onnx", "fine.onnx"], mlp().signature), "")
    assert done.returncode == 1 and "it broke" in done.stderr and "failed on broken.onnx" in done.stderr
    assert "--onnx=fine.onnx" in calls and "123 qps" in done.stdout


def test_without_trtexec_the_shell_script_says_where_to_get_it(tmp_path):
    (tmp_path / "trtexec.sh").write_text(trtexec_script(["m.onnx"], mlp().signature))
    environment = {**os.environ, "TRTEXEC": "/nowhere/trtexec"}
    done = subprocess.run(["sh", str(tmp_path / "trtexec.sh")], capture_output=True, text=True, env=environment)
    assert done.returncode == 4 and "install TensorRT" in done.stderr
