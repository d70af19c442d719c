"""ONNX files: old opsets, weights listed as inputs, external data, awkward and bad files; never a torch import."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from perwatt.errors import InputError, PerwattError
from perwatt.reading import read
from perwatt.reading_onnx import convert_in_process
from perwatt.recipe import RawInput

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("PERWATT_DATA", ROOT.parent / "shared" / "data"))


def outputs(path, feed):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    return session.run(None, {i.name: feed[i.name] for i in session.get_inputs()})


def linear(opset=12, ir_version=7, listed=True, batch="n", name="w"):
    """y = relu(x·w + b), then a sum over axis 1 the way it was written before opset 13."""
    weight = np.arange(12, dtype=np.float32).reshape(4, 3) / 12
    bias = np.float32([0.1, -0.2, 0.3])
    nodes = [
        helper.make_node("MatMul", ["x", name], ["xw"]),
        helper.make_node("Add", ["xw", "b"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["y"]),
    ]
    if opset < 13:
        nodes.append(helper.make_node("ReduceSum", ["y"], ["total"], axes=[1], keepdims=1))
    else:
        nodes.append(helper.make_node("ReduceSum", ["y", "axes"], ["total"], keepdims=1))
    weights = [numpy_helper.from_array(weight, name), numpy_helper.from_array(bias, "b")]
    if opset >= 13:
        weights.append(numpy_helper.from_array(np.int64([1]), "axes"))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])]
    if listed:
        inputs += [helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in weights]
    results = [helper.make_tensor_value_info("total", TensorProto.FLOAT, [batch, 1])]
    graph = helper.make_graph(nodes, "g", inputs, results, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def written(model, path):
    onnx.save(model, str(path))
    return path


X = {"x": np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)}


@pytest.mark.parametrize(("opset", "ir_version"), [(7, 3), (9, 3), (12, 7), (13, 7), (17, 8), (22, 10)])
def test_old_opsets_are_brought_up_and_mean_the_same(opset, ir_version, tmp_path):
    path = written(linear(opset, ir_version), tmp_path / "m.bin")
    reading = read(path)
    artifact = reading.artifact
    assert reading.format == "onnx"
    assert artifact.model.opset_imports[""] == 23
    assert artifact.model.ir_version == 10
    assert [str(s) for s in artifact.signature.inputs] == ["x:float32[n,4]"]
    assert artifact.signature.batch == "n"
    assert any(f"opset {opset} brought to 23" in note for note in reading.notes)
    result = artifact.save(tmp_path / "result.onnx")
    np.testing.assert_allclose(outputs(result, X)[0], outputs(path, X)[0], rtol=1e-6)
    onnx.checker.check_model(onnx.load(str(result)))


def test_a_current_model_is_read_as_it_is(tmp_path):
    path = written(linear(23, 10, listed=False), tmp_path / "m.onnx")
    reading = read(path)
    assert reading.notes == ()
    assert reading.artifact.steps[0].changes == ()
    assert read(path).artifact.digest() == reading.artifact.digest()


def test_the_given_converter_is_used_and_its_failure_is_no_crash(tmp_path):
    calls = []

    def convert(source, opset, result):
        calls.append((source.name, opset))
        return convert_in_process(source, opset, result)

    def crash(source, opset, result):
        raise PerwattError("the worker died")

    read(written(linear(12), tmp_path / "m.onnx"), convert=convert)
    assert calls == [("source.onnx", 23)]
    kept = read(written(linear(17, 8), tmp_path / "m.onnx"), convert=crash)
    assert kept.artifact.model.opset_imports[""] == 17
    assert kept.notes == ("3 weights that were listed as inputs are inputs no more",
                          "opset 17 kept: it can't be brought to 23 (the worker died)")  # fmt: skip
    with pytest.raises(
        InputError, match=r"opset 12, which can't be brought to 23.*export it again with opset 13 to 26"
    ):
        read(written(linear(12), tmp_path / "m.onnx"), convert=crash)


def test_a_newer_ir_version_is_lowered(tmp_path):
    reading = read(written(linear(24, 12, listed=False), tmp_path / "m.onnx"))
    assert (reading.artifact.model.ir_version, reading.artifact.model.opset_imports[""]) == (10, 24)
    assert reading.notes == ("IR version 12 lowered to 10",)


def test_operators_of_other_domains_survive(tmp_path):
    model = linear(17, 8, listed=False)
    model.graph.node.append(helper.make_node("Gelu", ["total"], ["g"], domain="com.microsoft"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("g", TensorProto.FLOAT, ["n", 1]))
    reading = read(written(model, tmp_path / "m.onnx"))
    assert reading.artifact.operator_counts()["Gelu"] == 1
    result = reading.artifact.save(tmp_path / "result.onnx")
    assert outputs(result, X)[0].shape == (5, 1)


def test_nodes_out_of_order_are_put_in_order(tmp_path):
    model = linear(17, 8)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    reading = read(written(model, tmp_path / "m.onnx"))
    assert next(iter(reading.artifact.edit().graph)).op_type == "MatMul"


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_that_are_no_sizes_are_dynamic(size, tmp_path):
    model = linear(23, 10, listed=False, batch=1)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size
    signature = read(written(model, tmp_path / "m.onnx")).artifact.signature
    assert signature.inputs[0].shape == ("batch", 4)


def test_unnamed_dynamic_batch(tmp_path):
    model = linear(23, 10, listed=False)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
    assert read(written(model, tmp_path / "m.onnx")).artifact.signature.batch == "batch"


def test_outputs_without_a_shape_get_one(tmp_path):
    model = linear(23, 10, listed=False)
    model.graph.output[0].type.Clear()
    reading = read(written(model, tmp_path / "m.onnx"))
    assert str(reading.artifact.signature.outputs[0]).startswith("total:float32[")


def test_external_data_inside_the_folder(tmp_path):
    path = tmp_path / "m.onnx"
    model = linear(17, 8, listed=False)
    expected = outputs(written(model, path), X)[0]
    onnx.save(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    result = read(path).artifact.save(tmp_path / "result.onnx")
    np.testing.assert_allclose(outputs(result, X)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "inner/../../secret.bin", "link.bin"])
def test_external_data_outside_the_folder_is_refused(location, tmp_path):
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    home = tmp_path / "home"
    (home / "inner").mkdir(parents=True)
    (home / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = linear(23, 10, listed=False)
    onnx.save(model, str(home / "m.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load(str(home / "m.onnx"), load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = location
    (home / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="outside the model's folder"):
        read(home / "m.onnx")


@pytest.mark.parametrize(("change", "said"), [("remove", "missing"), ("cut", "truncated")])
def test_external_data_that_is_not_there(change, said, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(linear(23, 10, listed=False), str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
    data = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").unlink() if change == "remove" else (tmp_path / "w.bin").write_bytes(data[:10])
    with pytest.raises(InputError, match=said):
        read(path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_file(share, tmp_path):
    path = written(linear(23, 10), tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_an_arch_for_an_onnx_file_is_a_mistake(tmp_path):
    with pytest.raises(InputError, match="--arch is for weights alone"):
        read(written(linear(23, 10), tmp_path / "m.onnx"), arch="net.py:net")


def test_raw_inputs_of_one_row(tmp_path):
    path = written(linear(17, 8), tmp_path / "m.onnx")
    raw = {"x": RawInput(dtype="uint8", scale=0.5, mean=[1.0, 2.0, 3.0, 4.0], std=2.0)}
    artifact = read(path, raw_inputs=raw).artifact
    assert str(artifact.signature.inputs[0]) == "x:uint8[n,4]"
    rows = np.arange(8, dtype=np.uint8).reshape(2, 4)
    native = ((rows * 0.5 - np.float32([1, 2, 3, 4])) / 2).astype(np.float32)
    got = outputs(artifact.save(tmp_path / "result.onnx"), {"x": rows})[0]
    np.testing.assert_allclose(got, outputs(path, {"x": native})[0], rtol=1e-5)
    onnx.checker.check_model(onnx.load(str(tmp_path / "result.onnx")), full_check=True)


def test_onnx_is_read_without_torch(tmp_path):
    path = written(linear(12), tmp_path / "m.onnx")
    code = (
        "import sys; from perwatt.reading import read; a = read(sys.argv[1]).artifact; a.digest(); a.edit(); "
        "sys.exit(any(n == 'torch' or n.startswith('torch.') for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data: set PERWATT_DATA")
@pytest.mark.parametrize(
    "name",
    [
        "mnist/mnist_cntk_opset7.onnx", "face_rfb320/version-RFB-320.onnx", "mlperf_tiny_resnet8/resnet8.onnx",
        "cifar10_resnet/resnet20.onnx", "cifar10_resnet/resnet56.onnx",
    ],
)  # fmt: skip
def test_real_models_mean_the_same_after_reading(name, tmp_path):
    artifact = read(DATA / name).artifact
    rng = np.random.default_rng(0)
    feed = {
        spec.name: rng.standard_normal([d if isinstance(d, int) else 2 for d in spec.shape]).astype(np.float32)
        for spec in artifact.signature.inputs
    }
    before, after = outputs(DATA / name, feed), outputs(artifact.save(tmp_path / "m.onnx"), feed)
    assert artifact.signature.batch in (1, "n", "batch")
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)
