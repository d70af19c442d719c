"""`cast-half`: everything between inputs and outputs in bfloat16, valid, close, and refused where ONNX has no half."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    ask,
    build,
    context,
    control_flow,
    conv_net,
    executed,
    feed,
    mlp,
    node,
    outputs,
    run_twice,
    shared_weights,
    transformer,
    weight,
)

from perwatt.artifact import Artifact
from perwatt.contract import OperatingPoint
from perwatt.errors import BackendError
from perwatt.passes.cast_half import CastHalf
from perwatt.passes.quantize_int8 import QuantizeInt8
from perwatt.targets.openvino import OpenVINO


def halved(artifact, given=None):
    """The result: valid, with the types of inputs and outputs kept and no float32 left inside."""
    after, changes = run_twice(CastHalf(), artifact, given)
    assert after.signature == artifact.signature
    made = ir.to_proto(after.model)
    onnx.checker.check_model(made, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True)
    edge = {v.name for v in (*made.graph.input, *made.graph.output)}
    inside = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info if v.name not in edge}
    assert [name for name, kind in inside.items() if kind == onnx.TensorProto.FLOAT] == []
    assert onnx.TensorProto.FLOAT not in {tensor.data_type for tensor in made.graph.initializer}
    return after, changes


def looked_at(artifact, batch=None, **settings):
    """A context with samples, on which the pass may run the model; `batch`: those samples."""
    return context([batch or feed(artifact, items=8)], execute=executed, **settings)


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
    after, changes = halved(before, looked_at(before))
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
    assert ask(CastHalf(), conv_net(), context(half=())) == ["this backend has no half-precision arithmetic here"]


def test_refuses_opsets_without_bfloat16_convolutions():
    before = build([node("Relu", "x", "y")], "x:float32[batch,4]", "y:float32[batch,4]", opset=17)
    assert ask(CastHalf(), before) == ["bfloat16 convolutions need opset 22, this model is opset 17"]


def test_refuses_quantized_models():
    nodes = [node("DequantizeLinear", "w s", "d"), node("MatMul", "x d", "y")]
    weights = {"w": np.ones((4, 2), np.int8), "s": np.float32(0.1)}
    assert ask(CastHalf(), build(nodes, "x:float32[batch,4]", "y:float32[batch,2]", weights)) == [
        "the model is quantized already: 1 DequantizeLinear"
    ]


def test_refuses_control_flow():
    assert ask(CastHalf(), control_flow()) == [
        "the model has control flow, whose branches would need casts of their own"
    ]


def test_operators_that_onnx_defines_for_float_only_stay():
    nodes = [node("Resize", "x - scales", "r"), node("Einsum", "r w", "e", equation="bchw,cd->bdhw"),
             node("Mul", "e v", "y")]  # fmt: skip
    weights = {"scales": np.float32([1, 1, 2, 2]), "w": weight(3, 3), "v": weight(8)}
    before = build(nodes, "x:float32[batch,3,4,4]", "y:float32[batch,3,8,8]", weights, inner="r:float32[batch,3,8,8]")
    assert ask(CastHalf(), before) == []
    after, changes = run_twice(CastHalf(), before)
    assert kinds(after) == {"Resize": "FLOAT", "Einsum": "FLOAT", "Mul": "BFLOAT16"}
    assert changes[:2] == [
        "1 weights and other arithmetic between inputs and outputs in bfloat16",
        "2 operators stay in float32 (Einsum, Resize): ONNX has no bfloat16 for it",
    ]


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


# Operators that stay in float32 ---------------------------------------------------------------------------------------


def kinds(artifact):
    """What type each operator gives, casts aside."""
    return {n.op_type: n.outputs[0].dtype.name for n in artifact.model.graph if n.op_type != "Cast"}


def carried(artifact, batch, half="float16", **settings):
    """(result, changes) of the pass that looked at that batch."""
    given = looked_at(artifact, batch, half=(half,))
    return run_twice(CastHalf(**settings), artifact, given)


def by_reference(artifact, batch):
    """Outputs: of ONNX Runtime, or of the interpreter where it has no kernels for the type."""
    return next(executed(artifact, [batch]))


ROOT_MEAN_SQUARE = [
    node("Mul", "x x", "squares"), node("ReduceMean", "squares axes", "mean"), node("Sqrt", "mean", "root"),
    node("Div", "x root", "even"), node("MatMul", "even w", "y"),
]  # fmt: skip


def root_mean_square():
    """A normalization written out, whose squares leave float16 where x has values beyond 255."""
    inner = "squares:float32[batch,8] mean:float32[batch,1] root:float32[batch,1] even:float32[batch,8]"
    weights = {"axes": np.int64([-1]), "w": weight(8, 4)}
    return build(ROOT_MEAN_SQUARE, "x:float32[batch,8]", "y:float32[batch,4]", weights, inner=inner)


def test_what_overflows_stays_in_float32_and_is_close(golden_pass):
    before, batch = root_mean_square(), {"x": weight(6, 8, scale=300)}
    after, changes = carried(before, batch)
    golden_pass("cast_half_overflow", before, after, changes)
    assert kinds(after) == {
        "Mul": "FLOAT", "ReduceMean": "FLOAT", "Sqrt": "FLOAT", "Div": "FLOAT16", "MatMul": "FLOAT16"
    }  # fmt: skip
    assert relative_error(outputs(before, batch), outputs(after, batch)) < 0.01


def test_the_margin_says_how_much_of_the_type_is_trusted():
    before, batch = root_mean_square(), {"x": np.full((2, 8), 160, np.float32)}
    assert kinds(carried(before, batch)[0])["Mul"] == "FLOAT16", "25600 is less than half of 65504"
    assert kinds(carried(before, batch, margin=4.0)[0])["Mul"] == "FLOAT"
    assert kinds(carried(before, {"x": np.full((2, 8), 1e18, np.float32)}, "bfloat16")[0])["Mul"] == "BFLOAT16"


def test_sums_that_overflow_before_they_are_averaged_stay():
    nodes = [node("GlobalAveragePool", "x", "p"), node("Mul", "p w", "y")]
    before = build(nodes, "x:float32[batch,2,64,64]", "y:float32[batch,2,1,1]", {"w": weight(2, 1, 1)},
                   inner="p:float32[batch,2,1,1]")  # fmt: skip
    after, changes = carried(before, {"x": np.full((2, 2, 64, 64), 20, np.float32)})
    assert kinds(after) == {"GlobalAveragePool": "FLOAT", "Mul": "FLOAT16"}
    assert changes[1] == "1 operator stays in float32 (GlobalAveragePool): sums up to 8.2e+04"
    small, _ = carried(before, {"x": np.full((2, 2, 64, 64), 2, np.float32)})
    assert kinds(small)["GlobalAveragePool"] == "FLOAT16"


@pytest.mark.parametrize("kind", ["LayerNormalization", "InstanceNormalization", "GroupNormalization"])
def test_squares_inside_normalizations_are_summed_up(kind):
    attributes = {"num_groups": 2} if kind == "GroupNormalization" else {}
    nodes = [node(kind, "x s b", "n", **attributes), node("Mul", "n w", "y")]
    size = 16 if kind == "LayerNormalization" else 4
    weights = {"s": weight(size), "b": weight(size), "w": weight(16)}
    before = build(nodes, "x:float32[batch,4,16]", "y:float32[batch,4,16]", weights, inner="n:float32[batch,4,16]")
    assert kinds(carried(before, {"x": weight(2, 4, 16, scale=200)})[0])[kind] == "FLOAT"
    assert kinds(carried(before, {"x": weight(2, 4, 16, scale=5)})[0])[kind] == "FLOAT16"


def positions():
    """Angles of positions, as embeddings have them: bfloat16 tells no odd ones beyond 256 apart."""
    nodes = [node("Cast", "ids", "p", to=1), node("Mul", "p f", "angle"), node("Sin", "angle", "s"),
             node("MatMul", "s w", "y")]  # fmt: skip
    inner = " ".join(f"{name}:float32[batch,8]" for name in ("p", "angle", "s"))
    weights = {"f": np.linspace(0.1, 1, 8, dtype=np.float32), "w": weight(8, 4)}
    return build(nodes, "ids:int64[batch,8]", "y:float32[batch,4]", weights, inner=inner)


def test_angles_stay_in_float32_from_the_positions_on():
    before, batch = positions(), {"ids": np.random.default_rng(0).integers(300, 4000, (16, 8))}
    after, changes = carried(before, batch, "bfloat16")
    assert kinds(after) == {"Mul": "FLOAT", "Sin": "FLOAT", "MatMul": "BFLOAT16"}
    assert changes[1] == (
        "3 operators stay in float32 (Cast, Mul, Sin): rounding what they read would move what they give"
    )
    whole, _ = carried(before, batch, "bfloat16", bearable=1e9)
    wanted = by_reference(before, batch)
    assert relative_error(wanted, by_reference(after, batch)) < 0.05
    assert relative_error(wanted, by_reference(whole, batch)) > 0.5, "that is what it is for"


def test_small_positions_are_left_in_half():
    after, changes = carried(positions(), {"ids": np.arange(16).reshape(2, 8) % 3}, "bfloat16")
    assert kinds(after)["Sin"] == "BFLOAT16" and len(changes) == 1


def test_sizes_calculated_in_floating_point_stay_exact():
    nodes = [node("Cast", "n", "f", to=1), node("Mul", "f half", "h"), node("Floor", "h", "l"), node("Cast", "l", "i", to=7),
             node("Mul", "x w", "m"), node("Expand", "m i", "y")]  # fmt: skip
    before = build(nodes, "x:float32[batch,1] n:int64[2]", "y:float32[a,b]", {"half": np.float32(0.5), "w": weight(1)},
                   inner="f:float32[2] h:float32[2] l:float32[2] i:int64[2] m:float32[batch,1]")  # fmt: skip
    batch = {"x": weight(1, 1), "n": np.int64([602, 1222])}
    after, changes = carried(before, batch, "bfloat16")
    assert by_reference(after, batch)["y"].shape == (301, 611)
    assert "(2 Cast, Floor, Mul)" in changes[1]


def test_a_number_too_small_for_the_type_keeps_its_operator():
    nodes = [
        node("Mul", "x zero", "m"),
        node("Add", "m tiny", "e"),
        node("Div", "x e", "d"),
        node("Mul", "d tiny", "y"),
    ]
    inner = " ".join(f"{name}:float32[batch,4]" for name in ("m", "e", "d"))
    weights = {"zero": np.zeros(4, np.float32), "tiny": np.float32([1e-12])}
    before = build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", weights, inner=inner)
    batch = {"x": weight(3, 4)}
    after, changes = carried(before, batch)
    assert np.allclose(outputs(after, batch)["y"], batch["x"], rtol=0.01)
    assert any("values too small for float16" in line or "values up to" in line for line in changes)


def test_a_weight_that_both_need_is_there_in_both():
    nodes = [node("Mul", "x w", "a"), node("Mul", "big w", "b"), node("Mul", "b down", "c"), node("Add", "a c", "y")]
    inner = " ".join(f"{name}:float32[batch,4]" for name in ("a", "b", "c"))
    weights = {"w": np.float32([3, 1, 2, 5]), "down": np.float32([1e-6])}
    inputs = "x:float32[batch,4] big:float32[batch,4]"
    before = build(nodes, inputs, "y:float32[batch,4]", weights, inner=inner)
    batch = {"x": weight(3, 4), "big": weight(3, 4, scale=1e6)}
    after, _ = carried(before, batch)
    held = {name: v.const_value.dtype.name for name, v in after.model.graph.initializers.items()}
    assert held["w"] == "FLOAT" and held["w_float16"] == "FLOAT16"
    assert relative_error(outputs(before, batch), outputs(after, batch)) < 0.01


def test_where_float32_would_not_help_it_is_said():
    nodes = [node("MatMul", "x w", "m"), node("Softmax", "m", "s"), node("MatMul", "s v", "y")]
    before = build(nodes, "x:float32[batch,8]", "y:float32[batch,4]", {"w": 100 + weight(8, 8), "v": weight(8, 4)},
                   inner="m:float32[batch,8] s:float32[batch,8]")  # fmt: skip
    batch = {"x": np.random.default_rng(0).uniform(0.9, 1.1, (64, 8)).astype(np.float32)}
    after, changes = carried(before, batch, "bfloat16")
    assert kinds(after)["Softmax"] == "BFLOAT16"
    assert "what it reads comes rounded from products" in changes[1]


# Masks ----------------------------------------------------------------------------------------------------------------


def masked(lowest):
    """Scores with a mask that is given, or made from one that is."""
    nodes = [
        node("MatMul", "x k", "s"),
        node("Add", "s mask", "m"),
        node("Softmax", "m", "p"),
        node("MatMul", "p v", "y"),
    ]
    weights = {"k": weight(4, 6, scale=30), "v": weight(6, 3)}
    inner = " ".join(f"{name}:float32[batch,6]" for name in ("s", "m", "p"))
    before = build(nodes, "x:float32[batch,4] mask:float32[batch,6]", "y:float32[batch,3]", weights, inner=inner)
    mask = np.where(weight(8, 6) > 0.3, lowest, 0).astype(np.float32)
    mask[0] = lowest
    return before, {"x": weight(8, 4), "mask": mask}


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("lowest", [np.finfo(np.float32).min, -1e9])
def test_masks_that_are_given_end_where_the_type_ends(half, lowest):
    before, batch = masked(lowest)
    after, changes = carried(before, batch, half)
    assert "FLOAT" not in {kind for op, kind in kinds(after).items() if op != "Max"}, "nothing stays for a mask"
    found, wanted = by_reference(after, batch)["y"], by_reference(before, batch)["y"]
    assert np.isfinite(found).all()
    assert np.abs(found[1:] - wanted[1:]).max() < 0.1
    assert ("masks end at -32752" in changes) == (half == "float16")


def test_masks_that_are_stored_end_there_too_and_rows_of_nothing_else_stay_finite():
    before = transformer()
    batch = feed(before, words=6)
    batch["mask"][0] = 0
    after, changes = carried(before, batch)
    lowest = after.model.graph.initializers["lowest"].const_value.numpy()
    assert lowest.dtype == np.float16 and lowest == -32752 and "masks end at -32752" in changes
    assert np.isfinite(outputs(after, batch)["y"]).all()
    # What the first row gives, which sees nothing at all, means nothing in float32 either.
    wanted, found = (outputs(each, batch)["y"][1:] for each in (before, after))
    assert np.abs(wanted - found).max() < 0.05


def test_infinite_masks_stay_infinite():
    before, batch = masked(-np.inf)
    batch["mask"][0] = 0
    after, _ = carried(before, batch)
    assert "Max" not in after.operator_counts()
    assert relative_error(outputs(before, batch), outputs(after, batch)) < 0.05


def test_large_negative_values_that_are_no_mask_keep_their_operators():
    nodes = [node("Mul", "x w", "m"), node("Add", "m b", "a"), node("Relu", "a", "y")]
    before = build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", {"w": weight(4), "b": np.float32([1e5])},
                   inner="m:float32[batch,4] a:float32[batch,4]")  # fmt: skip
    after, changes = carried(before, {"x": weight(2, 4)})
    assert kinds(after) == {"Mul": "FLOAT16", "Add": "FLOAT", "Relu": "FLOAT"}
    assert changes[1] == "2 operators stay in float32 (Add, Relu): values up to 1e+05"


# Types and samples ----------------------------------------------------------------------------------------------------


@given(scale=st.floats(1e-3, 1e5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_any_net_stays_finite_and_close_in_float16(scale, seed):
    inner = "h:float32[batch,8] r:float32[batch,8] q:float32[batch,8]"
    nodes = [
        node("Gemm", "x w1 b1", "h"),
        node("Relu", "h", "r"),
        node("Mul", "r r", "q"),
        node("Gemm", "q w2 b2", "y"),
    ]
    weights = {"w1": weight(6, 8, seed=seed), "b1": weight(8), "w2": weight(8, 3, seed=seed), "b2": weight(3)}
    before = build(nodes, "x:float32[batch,6]", "y:float32[batch,3]", weights, inner=inner)
    batch = {"x": weight(8, 6, seed=seed, scale=scale)}
    after, _ = carried(before, batch)
    assert relative_error(outputs(before, batch), outputs(after, batch)) < 0.05


@pytest.mark.parametrize(
    ("offered", "wanted", "chosen"),
    [
        (("bfloat16", "float16"), "auto", "BFLOAT16"),
        (("float16", "bfloat16"), "auto", "FLOAT16"),
        (("bfloat16", "float16"), "float16", "FLOAT16"),
        (("float16",), "auto", "FLOAT16"),
    ],
)
def test_the_type_is_the_first_that_the_backend_names_or_the_one_asked_for(offered, wanted, chosen):
    before = mlp()
    after, changes = run_twice(CastHalf(type=wanted), before, looked_at(before, half=offered))
    assert kinds(after)["Gemm"] == chosen and chosen.lower() in changes[0]


def test_a_type_that_is_not_there_is_refused_and_so_is_an_old_opset():
    assert ask(CastHalf(type="float16"), mlp()) == ["this backend has no float16 arithmetic here"]
    old = build([node("Relu", "x", "y")], "x:float32[batch,4]", "y:float32[batch,4]", opset=12)
    assert ask(CastHalf(), old, context(half=("float16",))) == ["float16 needs opset 13, this model is opset 12"]


def test_without_samples_or_where_it_can_t_be_run_that_is_said():
    assert CastHalf().run(mlp(), context())[1][1:] == ["there were no samples to look for overflow on"]

    def broken(*_):
        raise BackendError("no kernel for it")

    given = context([feed(mlp())], execute=broken)
    assert CastHalf().run(mlp(), given)[1][1:] == ["not looked at for overflow: no kernel for it"]


def test_the_model_is_run_once():
    calls = []

    def counted(*asked):
        calls.append(asked)
        return executed(*asked)

    before = conv_net()
    CastHalf(subset_size=10).run(before, context([feed(before, items=99)], execute=counted))
    assert len(calls) == 1 and sum(len(b["x"]) for b in calls[0][1]) == 10


# After quantizing -----------------------------------------------------------------------------------------------------


def test_the_rest_of_what_a_pass_has_quantized_is_carried_in_half():
    before = mlp()
    given = context([feed(before, items=16)], half=("float16",), execute=executed)
    quantized, _ = QuantizeInt8(rest="float32").run(before, given)
    assert "FLOAT16" not in kinds_of(quantized)
    direct, changes = QuantizeInt8(rest="half").run(before, given)
    assert any(word.startswith("the rest: ") for word in changes)
    assert {"INT8", "FLOAT16"} <= kinds_of(direct)
    integers = [node for node in direct.model.graph if node.op_type == "DequantizeLinear"]
    assert integers and {node.outputs[0].dtype.name for node in integers} == {"FLOAT16"}
    chained, _ = CastHalf().run(quantized, given)
    batch = feed(before, items=8)
    old, new, other = (outputs(one, batch) for one in (quantized, direct, chained))
    for name in old:
        assert 0 < np.abs(old[name] - new[name]).max() < 0.05 * np.abs(old[name]).max()
        assert np.array_equal(new[name], other[name])


def test_what_others_have_quantized_is_left():
    before = mlp()
    given = context([feed(before, items=16)], half=("float16",), execute=executed)
    quantized, _ = QuantizeInt8(rest="float32").run(before, given)
    assert list(CastHalf().requires(quantized, given)) == []
    stranger = Artifact(model=quantized.model)
    assert any("quantized" in reason for reason in CastHalf().requires(stranger, given))


def kinds_of(artifact):
    values = [value for node in artifact.model.graph for value in node.outputs]
    return {
        value.dtype.name for value in [*values, *artifact.model.graph.initializers.values()] if value.dtype is not None
    }
