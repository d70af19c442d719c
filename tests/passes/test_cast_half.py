"""`cast-half`: everything between inputs and outputs in bfloat16, valid, close, and refused where ONNX has no half."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import (
    ask,
    build,
    context,
    control_flow,
    conv_net,
    feed,
    mlp,
    node,
    outputs,
    run_twice,
    shared_weights,
    transformer,
    weight,
)

from perwatt.contract import OperatingPoint
from perwatt.passes.cast_half import CastHalf
from perwatt.targets.openvino import OpenVINO


def halved(artifact):
    """The result: valid, with the types of inputs and outputs kept and no float32 left inside."""
    after, changes = run_twice(CastHalf(), artifact)
    assert after.signature == artifact.signature
    made = ir.to_proto(after.model)
    onnx.checker.check_model(made, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True)
    edge = {v.name for v in (*made.graph.input, *made.graph.output)}
    inside = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info if v.name not in edge}
    assert [name for name, kind in inside.items() if kind == onnx.TensorProto.FLOAT] == []
    assert onnx.TensorProto.FLOAT not in {tensor.data_type for tensor in made.graph.initializer}
    return after, changes


def relative_error(old, new):
    """The largest max|Δ| ÷ RMS over all outputs."""
    return max(np.abs(old[name] - new[name]).max() / np.sqrt((old[name] ** 2).mean()) for name in old)


def by_openvino(artifact, folder, batch):
    """Outputs on the CPU, floating precision that of the graph; skips where the processor has no bfloat16."""
    target = OpenVINO()
    if "bfloat16" not in target.capabilities().half_types:
        pytest.skip("this processor has no bfloat16 arithmetic")
    artifact.file(folder)
    return target.lower(artifact, OperatingPoint(batch=len(next(iter(batch.values()))), floating_precision="bf16")).run(
        batch
    )


def test_a_convolutional_net_is_carried_in_bfloat16(golden_pass):
    before = conv_net(width=4)
    after, changes = halved(before)
    golden_pass("cast_half", before, after, changes)
    assert after.size_bytes() * 2 == before.size_bytes()


@pytest.mark.parametrize("make", [conv_net, mlp, transformer, shared_weights])
def test_the_cpu_gives_the_same_but_for_rounding(make, tmp_path):
    before = make()
    after, _ = halved(before)
    batch = feed(before, items=4)
    assert relative_error(outputs(before, batch), by_openvino(after, tmp_path, batch)) < 0.05


def test_a_mask_of_the_largest_float_stays_finite():
    after, _ = halved(transformer())
    lowest = after.model.graph.initializers["lowest"].const_value.numpy()
    assert np.isfinite(lowest.astype(np.float32)) and lowest < -3e38


def test_infinities_and_nan_among_the_weights_stay():
    weights = {"w": np.float32([np.inf, -np.inf, np.nan, 3.4e38])}
    after, _ = halved(build([node("Mul", "x w", "y")], "x:float32[batch,4]", "y:float32[batch,4]", weights))
    kept = after.model.graph.initializers["w"].const_value.numpy().astype(np.float32)
    assert kept[0] == np.inf and kept[1] == -np.inf and np.isnan(kept[2]) and np.isfinite(kept[3])


def test_whole_numbers_and_their_arithmetic_stay_whole():
    nodes = [node("Shape", "x", "s"), node("Gather", "s first", "n"), node("Concat", "n rest", "to", axis=0),
             node("Mul", "x w", "m"), node("Reshape", "m to", "y")]  # fmt: skip
    weights = {"first": np.int64([0]), "rest": np.int64([-1]), "w": weight(4)}
    after, _ = halved(build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", weights))
    kinds = {name: v.const_value.dtype.name for name, v in after.model.graph.initializers.items()}
    assert kinds == {"first": "INT64", "rest": "INT64", "w": "BFLOAT16"}


@pytest.mark.parametrize(
    "constant",
    [
        node("Constant", "", "c", value=onnx.numpy_helper.from_array(np.float32([2]))),
        node("Constant", "", "c", value_float=2.0),
        node("Constant", "", "c", value_floats=[2.0]),
        node("ConstantOfShape", "one", "c", value=onnx.numpy_helper.from_array(np.float32([2]))),
        node("ConstantOfShape", "one", "c"),
    ],
)
def test_constants_in_nodes_are_cast_too(constant):
    nodes = [constant, node("Mul", "x w", "m"), node("Add", "m c", "y")]
    weights = {"w": weight(4), **({"one": np.int64([1])} if constant.op_type == "ConstantOfShape" else {})}
    halved(build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", weights))


def test_casts_to_float_go_to_half_and_those_that_make_an_output_still_give_float():
    nodes = [
        node("Cast", "ids", "f", to=1),
        node("Mul", "f w", "m"),
        node("Cast", "ids", "y2", to=1),
        node("Add", "m y2", "y"),
    ]
    weights = {"w": weight(4)}
    halved(
        build(
            nodes, "ids:int64[batch,4]", "y:float32[batch,4] y2:float32[batch,4]", weights, inner="f:float32[batch,4]"
        )
    )


def test_an_input_that_is_an_output_too_keeps_its_type():
    before = build(
        [node("Mul", "x w", "y")], "x:float32[batch,4]", "y:float32[batch,4] x:float32[batch,4]", {"w": weight(4)}
    )
    halved(before)


def test_an_output_used_inside_is_cast_at_the_edge_only():
    nodes = [node("Mul", "x w", "a"), node("Relu", "a", "b")]
    after, _ = halved(build(nodes, "x:float32[batch,4]", "a:float32[batch,4] b:float32[batch,4]", {"w": weight(4)}))
    assert after.operator_counts() == {"Cast": 3, "Mul": 1, "Relu": 1}


def test_a_model_without_float_weights_comes_back_as_it_is():
    before = build([node("Relu", "x", "y")], "x:float32[batch,4]", "y:float32[batch,4]")
    after, changes = run_twice(CastHalf(), before)
    assert after is before and changes == ["no float32 weights to store in half"]


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 99))
def test_any_linear_layer_stays_close(rows, columns, seed):
    inner = f"m:float32[batch,{columns}]"
    before = build(
        [node("MatMul", "x w", "m"), node("Add", "m b", "y")],
        f"x:float32[batch,{rows}]", f"y:float32[batch,{columns}]",
        {"w": weight(rows, columns, seed=seed), "b": weight(columns, seed=seed)}, inner=inner,
    )  # fmt: skip
    after, _ = halved(before)
    for name in ("w", "b"):
        old = before.model.graph.initializers[name].const_value.numpy()
        new = after.model.graph.initializers[name].const_value.numpy()
        assert new.dtype == ml_dtypes.bfloat16
        assert np.all(np.abs(old - new.astype(np.float32)) <= 2**-8 * np.abs(old))


def test_agrees_to_whoever_can_run_it():
    assert ask(CastHalf(), conv_net()) == []
    assert ask(CastHalf(), transformer()) == []


def test_refuses_hardware_without_bfloat16():
    assert ask(CastHalf(), conv_net(), context(half=())) == ["this backend has no bfloat16 arithmetic here"]


def test_refuses_opsets_without_bfloat16_convolutions():
    before = build([node("Relu", "x", "y")], "x:float32[batch,4]", "y:float32[batch,4]", opset=17)
    assert ask(CastHalf(), before) == ["bfloat16 convolutions need opset 22, this model is opset 17"]


def test_refuses_quantized_models():
    nodes = [node("DequantizeLinear", "w s", "d"), node("MatMul", "x d", "y")]
    weights = {"w": np.ones((4, 2), np.int8), "s": np.float32(0.1)}
    assert ask(CastHalf(), build(nodes, "x:float32[batch,4]", "y:float32[batch,2]", weights)) == [
        "the model is quantized already"
    ]


def test_refuses_control_flow():
    assert ask(CastHalf(), control_flow()) == [
        "the model has control flow, whose branches would need casts of their own"
    ]


def test_refuses_operators_that_onnx_defines_for_float_only_and_names_them():
    nodes = [node("Resize", "x - scales", "r"), node("Einsum", "r w", "y", equation="bchw,cd->bdhw")]
    weights = {"scales": np.float32([1, 1, 2, 2]), "w": weight(3, 3)}
    before = build(nodes, "x:float32[batch,3,4,4]", "y:float32[batch,3,8,8]", weights, inner="r:float32[batch,3,8,8]")
    assert ask(CastHalf(), before) == ["ONNX has no bfloat16 for Einsum, Resize"]


def test_takes_operators_that_have_no_half_but_carry_whole_numbers_here():
    nodes = [node("Shape", "x", "s"), node("Gather", "s first", "n"), node("Range", "zero n one", "r"),
             node("Gather", "w r", "g"), node("Mul", "x g", "y")]  # fmt: skip
    weights = {"first": np.int64(0), "zero": np.int64(0), "one": np.int64(1), "w": weight(64, 4)}
    before = build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", weights, inner="r:int64[batch]")
    assert ask(CastHalf(), before) == []
    halved(before)


def test_refuses_foreign_operators():
    before = conv_net()
    model = before.edit()
    model.graph[2].domain = "com.example"
    after = before.after(model, before.steps[-1] if before.steps else CastHalf().step(()))
    assert ask(CastHalf(), after) == ["operators of the domain com.example can't be told to give half"]
