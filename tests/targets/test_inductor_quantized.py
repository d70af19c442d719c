"""Quantized products: what is rewritten gives what Q and DQ say, and integer kernels are really called.

The rewritten graph is compared as it is (torch runs its operators one by one), for the CPU and for CUDA, whose operators
for products of matrices torch has on the CPU too; what the compiler makes of it is looked for in the package."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from models import ASYMMETRIC, SYMMETRIC, build, context, conv_net, executed, feed, node, outputs, transformer, weight

from perwatt.contract import OperatingPoint
from perwatt.interpreter import Interpreter
from perwatt.passes.quantize_int8 import QuantizeInt8
from perwatt.targets import _inductor_compile as compiling
from perwatt.targets._inductor_quantized import float8_product, int8_product, matmul_with_bias, rewrite
from perwatt.targets.inductor import Inductor

TARGET = Inductor()
BATCH = 16


def quantized(artifact, **settings):
    """By the pass, on random samples."""
    samples = [feed(artifact, items=BATCH, seed=seed) for seed in range(4)]
    given = context(samples, styles=(SYMMETRIC, ASYMMETRIC), execute=executed)
    return QuantizeInt8(**settings).run(artifact, given)[0]


def residual():
    """Two convolutions and a sum with what came before them, then a linear layer: what a ResNet is made of."""
    nodes = [
        node("Conv", "x w0 b0", "c0", pads=[1] * 4), node("Relu", "c0", "r0"),
        node("Conv", "r0 w1 b0", "c1", pads=[1] * 4), node("Relu", "c1", "r1"),
        node("Conv", "r1 w2 b0", "c2", pads=[1] * 4), node("Add", "c2 r0", "s"), node("Relu", "s", "r2"),
        node("GlobalAveragePool", "r2", "p"), node("Flatten", "p", "f"), node("Gemm", "f w3 b3", "y", transB=1),
    ]  # fmt: skip
    weights = {
        "w0": weight(16, 3, 3, 3), "w1": weight(16, 16, 3, 3, scale=0.1), "w2": weight(16, 16, 3, 3, seed=1, scale=0.1),
        "b0": weight(16), "w3": weight(5, 16), "b3": weight(5),
    }  # fmt: skip
    return build(nodes, "x:float32[batch,3,8,8]", "y:float32[batch,5]", weights)


def block(width=32):
    """MatMul and bias, GELU, MatMul and bias, sum, on x:float32[batch,words,width]: a transformer's second half."""
    nodes = [
        node("MatMul", "x w1", "m1"), node("Add", "m1 b1", "a1"), node("Gelu", "a1", "g"), node("MatMul", "g w2", "m2"),
        node("Add", "b2 m2", "a2"), node("Add", "a2 x", "s"), node("LayerNormalization", "s gamma beta", "y"),
    ]  # fmt: skip
    weights = {
        "w1": weight(width, 2 * width), "b1": weight(2 * width), "w2": weight(2 * width, width), "b2": weight(width),
        "gamma": 1 + weight(width), "beta": weight(width, seed=1),
    }  # fmt: skip
    return build(nodes, f"x:float32[batch,words,{width}]", f"y:float32[batch,words,{width}]", weights)


def near(expected, found):
    """Equal but for values that lay halfway between two steps: a thousandth of what the outputs are, with few strays."""
    for name, old in expected.items():
        gap, rms = np.abs(old - found[name]), float(np.sqrt(np.mean(old**2)))
        assert np.median(gap) <= 2e-3 * rms and gap.max() <= 0.05 * max(rms, 1e-6), (gap.max(), rms)


def rewritten(artifact, device):
    """The interpreter with its products rewritten, how many, and what they became."""
    made = Interpreter(artifact.model)
    count = rewrite(made.program, device)
    return made, count, [str(getattr(n.target, "__name__", n.target)) for n in made.program.graph.nodes]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("make", [conv_net, residual, block, transformer])
@pytest.mark.parametrize("activations", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("quantizer", ["own", "nncf"])
def test_the_rewritten_graph_gives_what_q_and_dq_say(make, quantizer, activations, device):
    artifact = quantized(make(), quantizer=quantizer, activations=activations)
    made, count, targets = rewritten(artifact, device)
    assert count > 0
    batch = feed(artifact, items=3, seed=9)
    near(outputs(artifact, batch), made.run(batch))
    if device == "cuda":
        assert targets.count("int8_product") == count
    else:
        assert "quantize_per_tensor" in " ".join(targets) and "quantize_linear" not in targets


def test_all_products_of_a_residual_network_are_rewritten_on_the_cpu_and_matrices_alone_on_cuda():
    artifact = quantized(residual())
    assert rewritten(artifact, "cpu")[1] == 4
    _, count, targets = rewritten(artifact, "cuda")
    assert count == 1 and targets.count("conv") == 3


def test_a_bias_that_is_added_belongs_to_the_product():
    _, count, targets = rewritten(quantized(block()), "cpu")
    assert count == 2 and targets.count("linear") == 2
    assert targets.count("add") == 1  # the residual sum


def test_what_is_not_quantized_stays_as_it_is():
    made, count, targets = rewritten(block(), "cpu")
    assert count == 0 and targets.count("matmul") == 2 and targets.count("add") == 3
    batch = feed(block(), items=2)
    near(outputs(block(), batch), made.run(batch))


def explicit(weight_zero=0, weight_scale=(0.02,), x_scale=0.05, axis=1):
    """MatMul of a quantized x:float32[batch,6] and an int8 weight [6,4], everything said by hand."""
    held = np.random.default_rng(0).integers(-127, 128, (6, 4)).astype(np.int8)
    x_scale = np.asarray(x_scale, np.float32)
    scale = np.float32(weight_scale if len(weight_scale) > 1 else weight_scale[0])
    zero = np.full(scale.shape, weight_zero, np.int8)
    weights = {"xs": x_scale, "xz": np.zeros(x_scale.shape, np.int8), "w": held, "ws": scale, "wz": zero}
    nodes = [
        node("QuantizeLinear", "x xs xz", "xq"), node("DequantizeLinear", "xq xs xz", "xd"),
        node("DequantizeLinear", "w ws wz", "wd", axis=axis), node("MatMul", "xd wd", "y"),
    ]  # fmt: skip
    return build(nodes, "x:float32[batch,6]", "y:float32[batch,4]", weights)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("artifact", "count"),
    [
        (explicit(), 1), (explicit(weight_scale=(0.01, 0.02, 0.03, 0.04)), 1),
        (explicit(weight_zero=3), 0),  # an asymmetric weight
        (explicit(weight_scale=(0.01, 0.02, 0.03, 0.04, 0.05, 0.06), axis=0), 0),  # a scale for each row: no epilogue
        (explicit(x_scale=np.linspace(0.01, 0.06, 6, dtype=np.float32)), 0),  # a scale for each input feature
    ],
)  # fmt: skip
def test_only_what_fits_an_integer_product_is_rewritten_and_all_is_right(artifact, count, device):
    made, found, _ = rewritten(artifact, device)
    assert found == count
    batch = feed(artifact, items=5)
    near(outputs(artifact, batch), made.run(batch))


@given(some.integers(1, 40), some.integers(1, 40), some.integers(1, 20), some.booleans(), some.integers(-20, 20))
def test_the_product_of_int8_is_exact_at_any_size(rows, width, columns, signed, zero):
    random = np.random.default_rng([rows, width, columns])
    low, high = (-128, 128) if signed else (0, 256)
    zero = zero if signed else zero + 128
    x = random.integers(low, high, (rows, width))
    held = random.integers(-127, 128, (columns, width))
    padded = np.zeros((-(-columns // 8) * 8, -(-width // 8) * 8), np.int8)
    padded[:columns, :width] = held
    found = int8_product(
        torch.tensor(x, dtype=torch.int8 if signed else torch.uint8), torch.tensor(padded), torch.ones(columns), None,
        torch.tensor(held.sum(1), dtype=torch.int32), zero,
    )  # fmt: skip
    # float32 holds every such sum: 40 · 255 · 127 is below 2**24.
    assert np.array_equal(found.numpy(), ((x - zero) @ held.T).astype(np.float32))


@given(some.integers(1, 20), some.integers(1, 40), some.integers(1, 20), some.booleans())
def test_the_product_of_float8_is_that_of_the_numbers(rows, width, columns, biased):
    torch.manual_seed(rows)
    x = torch.randn(rows, width).to(torch.float8_e4m3fn)
    held = torch.randn(columns, width).to(torch.float8_e4m3fn)
    padded = torch.zeros(-(-columns // 16) * 16, -(-width // 16) * 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    padded.view(torch.uint8)[:columns, :width] = held.view(torch.uint8)
    scale, bias = torch.rand(columns) + 0.5, torch.randn(columns) if biased else None
    expected = x.double() @ held.double().T * scale + (0 if bias is None else bias)
    assert torch.allclose(float8_product(x, padded, scale, bias).double(), expected, rtol=1e-3, atol=1e-3)


def test_float8_in_the_model_becomes_a_scaled_product():
    import ml_dtypes

    artifact = explicit(weight_scale=(0.01, 0.02, 0.03, 0.04))
    model = artifact.edit()
    for name in ("xz", "w", "wz"):
        held = model.graph.initializers[name]
        array = held.const_value.numpy().astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        held.const_value = ir.Tensor(array, dtype=ir.DataType.FLOAT8E4M3FN, name=name)
        held.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    for one in model.graph:
        if one.op_type == "QuantizeLinear":
            one.outputs[0].type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    batch = feed(artifact, items=5)
    plain = Interpreter(model)
    made = Interpreter(model)
    assert rewrite(made.program, "cuda") == 1
    assert any(n.target is float8_product for n in made.program.graph.nodes)
    near(plain.run(batch), made.run(batch))


def test_a_product_with_its_bias_is_what_both_give():
    a, b, bias = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5)
    assert torch.equal(matmul_with_bias(a, b, bias), torch.matmul(a, b) + bias)


# Compiled -------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of packages of the tests' own; Inductor's, of compiled headers, is the user's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiling.cache_folder()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


needs_int8 = pytest.mark.skipif(
    bool(TARGET.missing()) or not TARGET.capabilities().quantization_styles, reason="no compiler or no int8 units"
)


@needs_int8
@pytest.mark.parametrize(
    ("make", "called"),
    [(residual, {"qconv": 3, "qlinear": 1}), pytest.param(block, {"qlinear": 2}, marks=pytest.mark.slow)],
)
def test_the_compiled_program_calls_integer_kernels_and_gives_what_q_and_dq_say(make, called):
    artifact = quantized(make())
    program = TARGET.lower(artifact, OperatingPoint(batch=2, threads=1))
    assert program.facts()["integer_products"] == called
    batch = feed(artifact, items=3, seed=9)
    near(outputs(artifact, batch), program.run(batch))


@needs_int8
@pytest.mark.slow
@pytest.mark.skipif("bf16" not in TARGET.capabilities().floating_precisions, reason="no bfloat16 here")
def test_integer_kernels_and_bfloat16_go_together():
    artifact = quantized(residual())
    program = TARGET.lower(artifact, OperatingPoint(batch=2, threads=1, floating_precision="bf16"))
    assert program.facts()["integer_products"] == {"qconv": 3, "qlinear": 1}
    batch = feed(artifact, items=3, seed=9)
    near(outputs(artifact, batch), program.run(batch))
