"""The interpreter as a module: names, weights and types, what its graph looks like, where it puts tensors, what it
refuses."""

import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import build, conv_net, mlp, node, outputs, proto, shared_weights, transformer, weight
from onnx import helper, numpy_helper

torch = pytest.importorskip("torch")

from perwatt import interpreter_convolution, interpreter_linear, interpreter_quantize, interpreter_values  # noqa: E402
from perwatt.artifact import Step  # noqa: E402
from perwatt.errors import InputError  # noqa: E402
from perwatt.interpreter import Interpreter, Unsupported  # noqa: E402


def interpreter(made, **options):
    return Interpreter(ir.from_proto(made), **options)


def called(network):
    """The operators that the graph calls, in order."""
    found = [one.target for one in network.program.graph.nodes if one.op == "call_function"]
    return [target for target in found if target not in (interpreter_values.device_of, interpreter_values.as_tensor)]


def test_inputs_are_positional_and_run_takes_names():
    artifact = transformer()
    batch = {"mask": np.ones((2, 11), np.float32), "ids": np.arange(22).reshape(2, 11) % 11}
    network = Interpreter(artifact.model)
    assert (network.inputs, network.outputs) == (["ids", "mask"], ["y"])
    expected = outputs(artifact, batch)["y"]
    np.testing.assert_allclose(network.run(batch)["y"], expected, rtol=1e-5, atol=1e-6)
    found = network(*(torch.from_numpy(batch[name]) for name in network.inputs))
    assert isinstance(found, tuple)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_weights_have_their_onnx_names_and_are_parameters_of_the_module():
    network = Interpreter(conv_net().model)
    assert set(network.weights) == {
        "w1", "w2", "b2", "w3", "b3", *(f"bn{i}_{part}" for i in (1, 2) for part in ("gamma", "beta", "mean", "var")),
    }  # fmt: skip
    assert dict(network.named_parameters())["program.v_w1"] is network.weights["w1"]
    assert not any(weight.requires_grad for weight in network.weights.values())


def test_one_weight_that_two_nodes_use_is_one_parameter():
    network = Interpreter(shared_weights().model)
    assert len(list(network.parameters())) == len(network.weights)


def test_names_that_are_one_identifier_stay_two_weights():
    made = proto(
        [node("Add", "x a.b", "h"), node("Add", "h a_b", "y")], "x:float32[2]", "y:float32[2]",
        {"a.b": np.float32([1, 2]), "a_b": np.float32([10, 20])},
    )  # fmt: skip
    assert interpreter(made)(torch.zeros(2))[0].tolist() == [11, 22]


def branches():
    """Constants of one name in the two branches of an If."""
    graphs = []
    for number in (1.0, 2.0):
        constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float32([number, number])))
        result = helper.make_tensor_value_info(f"r{number:.0f}", onnx.TensorProto.FLOAT, [2])
        graphs.append(helper.make_graph([constant, node("Mul", "x c", f"r{number:.0f}")], "branch", [], [result]))
    choice = helper.make_node("If", ["which"], ["y"], then_branch=graphs[0], else_branch=graphs[1])
    return proto([choice], "which:bool x:float32[2]", "y:float32[2]")


def test_branches_have_constants_of_their_own_under_one_name():
    network = interpreter(branches())
    x = torch.tensor([3.0, 4.0])
    assert network(torch.tensor(True), x)[0].tolist() == [3, 4]
    assert network(torch.tensor(False), x)[0].tolist() == [6, 8]
    # onnx's helper writes attributes in the order of their names: else_branch is the first.
    assert {name: weight.tolist() for name, weight in network.weights.items()} == {"c": [2, 2], "c#2": [1, 1]}


def test_the_graph_has_the_functions_that_the_docstring_names():
    quantized = {
        "w": np.int8(np.arange(-6, 6).reshape(4, 3)), "s": np.float32([0.1, 0.2, 0.3]), "z": np.int8([0, 0, 0]),
        "xs": np.float32(0.05), "xz": np.uint8(128), "k": weight(2, 3, 1, 1), "b": weight(2),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", "x xs xz", "q"), node("DequantizeLinear", "q xs xz", "dq"),
        node("DequantizeLinear", "w s z", "dw", axis=1), node("MatMul", "dq dw", "m"),
        node("Gemm", "m dw", "g", transB=1), node("Gemm", "g dw", "h"), node("Reshape", "h shape", "image"),
        node("Conv", "image k b", "y"),
    ]  # fmt: skip
    made = proto(
        nodes, "x:float32[5,4]", "y:float32[5,2,1,1]", {**quantized, "shape": np.int64([-1, 3, 1, 1])}, opset=21
    )
    network = interpreter(made)
    q, lin = interpreter_quantize, interpreter_linear
    expected = [q.quantize_linear, q.dequantize_linear, q.dequantize_linear, lin.matmul, lin.gemm, lin.gemm]
    found = called(network)
    assert found[:6] == expected
    assert found[-1] is interpreter_convolution.conv
    of_weight = next(n for n in network.program.graph.nodes if n.name == "v_DequantizeLinear_dw")
    assert [one.target for one in of_weight.args] == ["v_w", "v_s", "v_z"]
    assert of_weight.kwargs == {"axis": 1}
    # Neither widened nor folded: a target finds eight bits.
    assert dict(network.named_buffers())["program.v_w"].dtype is torch.int8
    learning = interpreter(made, straight_through=True)
    assert q.fake_quantize in called(learning)
    assert q.quantize_linear not in called(learning)


def test_constant_arithmetic_of_shapes_is_done_once():
    """torch's exporter writes pads as pairs that it turns round: a tensor that would be read at run time."""
    nodes = [
        node("Reshape", "flat pairs", "grid"), node("Slice", "grid minus1 lowest zero minus1", "turned"),
        node("Transpose", "turned", "t", perm=[1, 0]), node("Reshape", "t all", "pads"), node("Pad", "x pads", "y"),
    ]  # fmt: skip
    numbers = {
        "flat": [1, 2, 0, 0], "pairs": [-1, 2], "minus1": [-1], "lowest": [-(2**63) + 1], "zero": [0], "all": [-1],
    }  # fmt: skip
    made = proto(nodes, "x:float32[2,2]", "y:float32[2,5]", {name: np.int64(n) for name, n in numbers.items()})
    network = interpreter(made)
    assert [target.__name__ for target in called(network)] == ["pad"]
    assert network(torch.ones(2, 2))[0].tolist() == [[0, 1, 1, 0, 0]] * 2


def test_limits_and_exponents_are_plain_numbers():
    made = proto(
        [node("Clip", "x low high", "c"), node("Pow", "c two", "y")], "x:float32[4]", "y:float32[4]",
        {"low": np.float32(0), "high": np.float32(6), "two": np.float32(2)},
    )  # fmt: skip
    network = interpreter(made)
    assert [one.args[1:] for one in network.program.graph.nodes if one.op == "call_function"] == [(0.0, 6.0), (2.0,)]
    assert network(torch.tensor([-1.0, 2.0, 6.0, 9.0]))[0].tolist() == [0, 4, 36, 36]
    assert network.weights == {}


SHAPES_ALONE = {
    "Range": ([node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Range", "zero0 n one", "r"),
               node("Cast", "r", "f", to=1), node("Add", "x f", "y")],
              {"zero": np.int64(0), "zero0": np.int64(0), "one": np.int64(1)}),
    "ConstantOfShape": ([node("Shape", "x", "s"), node("ConstantOfShape", "s", "c",
                              value=numpy_helper.from_array(np.float32([2]))), node("Add", "x c", "y")], {}),
    "Expand": ([node("Shape", "x", "s"), node("Expand", "one s", "e"),
                node("Cast", "e", "f", to=1), node("Add", "x f", "y")], {"one": np.int64(1)}),
    "RandomNormal": ([node("RandomNormal", "", "n", shape=[9]), node("Add", "x n", "y")], {}),
    "HannWindow": ([node("Shape", "x", "s"), node("Squeeze", "s", "n"), node("HannWindow", "n", "h"),
                    node("Add", "x h", "y")], {}),
    "a shape in data": ([node("Shape", "x", "s"), node("Cast", "s", "f", to=1), node("Mul", "x f", "y")], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES_ALONE)
def test_what_is_made_of_shapes_alone_is_made_where_the_inputs_are(name):
    """The meta device stands for an accelerator: torch refuses to add a row that lies on the CPU."""
    nodes, weights = SHAPES_ALONE[name]
    for one in nodes:
        if list(one.input) == [""]:
            del one.input[:]
    network = interpreter(proto(nodes, "x:float32[n]", "y:float32[n]", weights)).to("meta")
    x = torch.empty(9, device="meta")
    assert network(x)[0].device.type == "meta"
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=True)
    assert compiled(x)[0].shape == (9,)


@pytest.mark.parametrize("made", [conv_net, transformer, mlp])
def test_a_network_moves_to_another_device_whole(made):
    artifact = made()
    network = Interpreter(artifact.model).to("meta")
    feeds = [
        torch.empty(
            [3 if isinstance(d, str) else d for d in spec.shape], dtype=getattr(torch, spec.dtype), device="meta"
        )
        for spec in artifact.signature.inputs
    ]
    assert {found.device.type for found in network(*feeds)} == {"meta"}
    assert {weight.device.type for weight in network.weights.values()} == {"meta"}


def test_learnt_weights_go_back_into_a_new_artifact():
    artifact = mlp()
    before = artifact.digest()
    network = Interpreter(artifact.model)
    with torch.no_grad():
        network.weights["w1"].mul_(2)
        network.weights["b2"].add_(1)
    learnt = network.write_back(artifact, Step("learn", {"steps": 1}, ("2 weights",)))
    assert learnt.digest() != before == artifact.digest()
    assert learnt.steps[-1].name == "learn"
    old, new = artifact.model.graph.initializers, learnt.model.graph.initializers
    np.testing.assert_array_equal(new["w1"].const_value.numpy(), old["w1"].const_value.numpy() * 2)
    assert {name for name in old if new[name].const_value is not old[name].const_value} == {"w1", "b2"}
    batch = {"x": weight(4, 6)}
    np.testing.assert_allclose(outputs(learnt, batch)["y"], network.run(batch)["y"], rtol=1e-5, atol=1e-6)


def test_unchanged_weights_give_an_artifact_of_the_same_digest():
    artifact = conv_net()
    assert Interpreter(artifact.model).write_back(artifact, Step("learn")).digest() == artifact.digest()


def test_weights_that_learn_in_float32_go_back_as_the_halves_they_were():
    artifact = build([node("Mul", "x w", "y")], "x:float16[2]", "y:float16[2]", {"w": np.float16([1, 2])})
    network = Interpreter(artifact.model).float()
    with torch.no_grad():
        network.weights["w"].add_(0.5)
    learnt = network.write_back(artifact, Step("learn")).model.graph.initializers["w"].const_value
    assert learnt.numpy().dtype == np.float16
    assert learnt.numpy().tolist() == [1.5, 2.5]


def test_constants_of_branches_are_written_back_each_to_its_own():
    from perwatt.artifact import Artifact

    artifact = Artifact(model=ir.from_proto(branches()))
    network = Interpreter(artifact.model)
    with torch.no_grad():
        network.weights["c#2"].fill_(7)
    again = Interpreter(network.write_back(artifact, Step("learn")).model)
    assert {name: weight.tolist() for name, weight in again.weights.items()} == {"c": [2, 2], "c#2": [7, 7]}


def test_weights_of_another_model_are_refused_by_name():
    with pytest.raises(InputError, match="no weight b2"):
        Interpreter(conv_net().model).write_back(
            build([node("Gemm", "x w1", "y")], "x:float32[1,3]", "y:float32[1,3]", {"w1": weight(8, 3, 3, 3)}),
            Step("learn"),
        )


def test_missing_operators_are_refused_by_name_all_at_once():
    made = proto(
        [node("NonZero", "x", "n"), node("TfIdfVectorizer", "n", "t"), helper.make_node("Warp", ["t"], ["y"], domain="my")],
        "x:float32[2]", "y:float32[2]",
    )  # fmt: skip
    made.opset_import.append(helper.make_opsetid("my", 3))
    with pytest.raises(Unsupported) as caught:
        interpreter(made)
    assert caught.value.operators == ("TfIdfVectorizer (opset 23)", "my::Warp (opset 3)")
    assert str(caught.value) == "the interpreter has no TfIdfVectorizer (opset 23), my::Warp (opset 3)"


def test_nodes_may_stand_in_any_order():
    made = proto([node("Relu", "h", "y"), node("Neg", "x", "h")], "x:float32[2]", "y:float32[2]")
    assert interpreter(made)(torch.tensor([-1.0, 2.0]))[0].tolist() == [1, 0]


def test_importing_perwatt_loads_neither_torch_nor_the_interpreter():
    code = "import sys, perwatt; print(sorted({'torch', 'perwatt.interpreter'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
