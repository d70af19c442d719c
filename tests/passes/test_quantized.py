"""`quantized_already`: every way in which a graph shows that it is quantized, and nothing that only looks like it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, conv_net, mlp, node, shared_weights, transformer, two_and_two, weight
from onnx import helper, numpy_helper

from perwatt.artifact import Artifact
from perwatt.passes._quantized import grid_steps, on_grid, quantized_already
from perwatt.passes._quantizing import quantized_weight

X, Y = "x:float32[batch,4]", "y:float32[batch,3]"
CODES = np.random.default_rng(0).integers(-127, 128, (4, 3), np.int8)


def said(*args, **options):
    """What it says of that model."""
    return quantized_already(build(*args, **options))


@pytest.mark.parametrize("make", [conv_net, mlp, transformer, shared_weights, two_and_two])
def test_ordinary_models_are_not_quantized(make):
    assert quantized_already(make()) is None


def test_pairs_on_weights_are_counted():
    nodes = [node("DequantizeLinear", "q s", "w"), node("MatMul", "x w", "y")]
    assert said(nodes, X, Y, {"q": CODES, "s": np.float32(0.1)}) == "the model is quantized already: 1 DequantizeLinear"


def test_pairs_on_activations_are_counted_first():
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d"), node("MatMul", "d w", "y")]
    weights = {"s": np.float32(0.1), "z": np.int8(0), "w": weight(4, 3)}
    assert said(nodes, X, Y, weights) == "the model is quantized already: 1 DequantizeLinear, 1 QuantizeLinear"


def test_a_dynamically_quantized_product_is_named_with_its_operators():
    nodes = [node("DynamicQuantizeLinear", "x", "q s z"), node("MatMulInteger", "q w z", "i"),
             node("Cast", "i", "f", to=1), node("Mul", "f s", "y")]  # fmt: skip
    weights = {"w": CODES}
    assert said(nodes, X, Y, weights) == "the model is quantized already: 1 DynamicQuantizeLinear, 1 MatMulInteger"


@pytest.mark.parametrize(
    ("operator", "domain"),
    [
        ("QLinearConv", ""), ("QLinearAdd", "com.microsoft"), ("QGemm", "com.microsoft"), ("QAttention", "com.microsoft"),
        ("MatMulNBits", "com.microsoft"), ("DynamicQuantizeMatMul", "com.microsoft"), ("ConvInteger", ""),
        ("FakeQuantize", "org.openvinotoolkit"), ("Quant", "qonnx.custom_op.general"),
        ("TRT_FP8QuantizeLinear", "trt"), ("QOrderedMatMul", "com.microsoft"),
    ],
)  # fmt: skip
def test_operators_on_integers_and_pairs_of_every_dialect_are_named(operator, domain):
    assert quantized_already(renamed(conv_net(), operator, domain)) == f"the model is quantized already: 1 {operator}"


def renamed(artifact, operator, domain):
    """The model with another operator in the place of its first Relu; never run."""
    model = artifact.edit()
    found = next(each for each in model.graph if each.op_type == "Relu")
    found.op_type, found.domain = operator, domain
    return Artifact(model=model)


@pytest.mark.parametrize("operator", ["Quantile", "QuickGelu", "Query", "LinearQ"])
def test_other_operators_with_a_similar_name_are_not(operator):
    assert quantized_already(renamed(conv_net(), operator, "com.example")) is None


SCALED = [node("Cast", "q", "f", to=1), node("Sub", "f z", "c"), node("Mul", "c s", "w"), node("MatMul", "x w", "y")]
CONSTANTS = {"q": (CODES.astype(np.int16) + 128).astype(np.uint8), "z": np.float32(128), "s": np.float32(0.01)}


def test_integer_weights_that_are_cast_and_scaled_count():
    assert said(SCALED, X, Y, CONSTANTS) == "the model is quantized already: 1 weight is stored as integers and scaled"


def test_integer_weights_in_constant_nodes_that_are_moved_about_count_too():
    held = numpy_helper.from_array(CODES.T.copy())
    nodes = [node("Constant", "", "q", value=held), node("Cast", "q", "f", to=1), node("Transpose", "f", "t"),
             node("Mul", "t s", "w"), node("MatMul", "x w", "y")]  # fmt: skip
    assert said(nodes, X, Y, {"s": np.float32([1, 2, 3])}).endswith("1 weight is stored as integers and scaled")


def test_integers_scaled_by_something_computed_or_of_wide_types_or_used_elsewhere_do_not():
    computed = [*SCALED[:2], node("ReduceMax", "x", "s", keepdims=0), *SCALED[2:]]
    assert said(computed, X, Y, {k: v for k, v in CONSTANTS.items() if k != "s"}) is None
    assert said(SCALED, X, Y, CONSTANTS | {"q": CODES.astype(np.int64)}) is None
    added = [node("Cast", "q", "f", to=1), node("Add", "x f", "y")]
    assert said(added, X, "y:float32[batch,4]", {"q": np.ones(4, np.uint8)}) is None


def test_rounding_in_front_of_a_product_counts():
    nodes = [node("Div", "x s", "d"), node("Round", "d", "r"), node("Clip", "r low high", "c"), node("Mul", "c s", "f"),
             node("MatMul", "f w", "y")]  # fmt: skip
    weights = {"s": np.float32(0.1), "low": np.float32(-128), "high": np.float32(127), "w": weight(4, 3)}
    assert said(nodes, X, Y, weights) == "the model is quantized already: Round in front of 1 product"


def test_rounding_elsewhere_does_not():
    behind = [node("MatMul", "x w", "m"), node("Round", "m", "y")]
    assert said(behind, X, Y, {"w": weight(4, 3)}) is None
    activated = [node("Round", "x", "r"), node("Relu", "r", "a"), node("MatMul", "a w", "y")]
    assert said(activated, X, Y, {"w": weight(4, 3)}) is None


def test_rounding_inside_a_branch_counts():
    inner = [node("Round", "x", "r"), node("MatMul", "r w", "out")]
    branch = helper.make_graph(inner, "b", [], [helper.make_tensor_value_info("out", 1, ["batch", 3])])
    nodes = [node("If", "yes", "y", then_branch=branch, else_branch=branch)]
    assert said(nodes, X, Y, {"yes": np.bool_(True), "w": weight(4, 3)}).endswith("Round in front of 2 products")


# Weights on a grid ----------------------------------------------------------------------------------------------------


def gridded(rows, columns, seed, levels=127):
    """(codes, scales, codes times scales as float32): one scale a row."""
    random = np.random.default_rng(seed)
    codes = random.integers(-levels, levels + 1, (rows, columns))
    scales = random.uniform(1e-4, 10, (rows, 1)).astype(np.float32)
    return codes, scales, codes.astype(np.float32) * scales


def test_weights_on_a_grid_alone_may_be_quantized():
    _, _, held = gridded(64, 32, 0)
    assert on_grid(held, 0)
    nodes = [node("MatMul", "x w", "y")]
    assert said(nodes, "x:float32[batch,32]", "y:float32[batch,64]", {"w": held.T.copy()}) is None


@given(
    rows=st.integers(4, 40),
    columns=st.integers(24, 200),
    seed=st.integers(0, 999),
    levels=st.sampled_from([31, 100, 127]),
)
@settings(deadline=None, max_examples=40)
def test_a_second_time_they_are_quantized_to_what_they_were(rows, columns, seed, levels):
    _, _, held = gridded(rows, columns, seed, levels)
    codes, scales = quantized_weight(held, 0)
    assert np.allclose(codes * scales[:, None], held, rtol=1e-6, atol=0)
    assert np.array_equal(codes == 0, held == 0)


@given(
    shape=st.lists(st.integers(1, 24), min_size=2, max_size=4), seed=st.integers(0, 999), scale=st.floats(1e-6, 1e3),
    kind=st.sampled_from(["normal", "uniform", "float16", "bfloat16"]),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_ordinary_float_weights_are_on_none(shape, seed, scale, kind):
    import ml_dtypes

    random = np.random.default_rng(seed)
    held = (random.uniform(-1, 1, shape) if kind == "uniform" else random.standard_normal(shape)).astype(np.float32)
    held = (held * np.float32(scale if kind != "float16" else 1)).astype(np.float32)
    if kind in ("float16", "bfloat16"):
        held = held.astype(np.float16 if kind == "float16" else ml_dtypes.bfloat16).astype(np.float32)
    assert not on_grid(held, 0) and not on_grid(held, 1) and not on_grid(held, None)
    assert grid_steps(held, 0) is None


@pytest.mark.parametrize(
    "held",
    [
        np.zeros((8, 64), np.float32),
        np.ones((64, 1), np.float32),
        np.where(weight(16, 64) > 0, 1, -1).astype(np.float32),
        np.sign(weight(16, 64)).astype(np.float32) * np.round(np.abs(weight(16, 64))),
        np.random.default_rng(0).integers(1, 5, (64, 64)).astype(np.float32),
        np.full((4, 64), np.inf, np.float32),
        np.full((4, 64), np.nan, np.float32),
        np.zeros((0, 4), np.float32),
    ],
)
def test_what_is_too_plain_to_tell_is_on_none(held):
    assert not on_grid(held, 0) and not on_grid(held, None)


def test_one_value_off_the_grid_is_enough_to_choose_scales_anew():
    _, _, held = gridded(32, 4096, 3)
    assert grid_steps(held, 0) is not None
    held[7, 1001] += held[7].max() / 300
    assert grid_steps(held, 0) is None


def test_a_wider_grid_than_int8_has_is_found_but_not_kept():
    random = np.random.default_rng(1)
    codes = random.integers(-20, 236, (32, 200))
    codes[:, :2] = 235, 234
    held = codes.astype(np.float32) * np.float32(0.013)
    assert on_grid(held, 0) and grid_steps(held, 0) is None
