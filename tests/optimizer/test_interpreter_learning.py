"""Learning through the interpreter: gradients of the operators that networks are made of against finite differences, in
double precision; gradients that pass quantization; an ONNX model that learns."""

import zlib

import numpy as np
import onnx_ir as ir
import pytest
from models import build, node, outputs, proto, weight

torch = pytest.importorskip("torch")

from perwatt.artifact import Step  # noqa: E402
from perwatt.interpreter import Interpreter  # noqa: E402

ELEMENTWISE = [
    "Abs", "Atan", "Celu", "Cos", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg",
    "Reciprocal", "Relu", "Selu", "Sigmoid", "Sin", "Softplus", "Softsign", "Tanh", "ThresholdedRelu",
]  # fmt: skip
IMAGE = (2, 4, 4, 5)
ROI = {"roi": np.float64([]), "scales": np.float32([1, 1, 2, 2])}
# Operator, shapes of the inputs that are learnt through, other inputs, attributes.
CASES = {
    **{name: (name, [(3, 4)], {}, {}) for name in ELEMENTWISE},
    "Gelu tanh": ("Gelu", [(3, 4)], {}, {"approximate": "tanh"}),
    "Swish": ("Swish", [(3, 4)], {}, {}),
    "PRelu": ("PRelu", [(2, 3, 2), (3, 1)], {}, {}),
    "Clip": ("Clip", [(3, 4)], {"low": np.float64(-0.5), "high": np.float64(0.5)}, {}),
    "Add": ("Add", [(3, 4), (4,)], {}, {}),
    "Sub": ("Sub", [(3, 4), (3, 1)], {}, {}),
    "Mul": ("Mul", [(3, 4), (4,)], {}, {}),
    "Div": ("Div", [(3, 4), (3, 4)], {}, {}),
    "Pow": ("Pow", [(3, 4)], {"two": np.float64(2)}, {}),
    "Max": ("Max", [(3, 4), (3, 4)], {}, {}),
    "Min": ("Min", [(3, 4), (3, 4)], {}, {}),
    "Where": ("Where", [(3, 4), (3, 4)], {"which": np.eye(3, 4, dtype=bool)}, {}),
    "MatMul": ("MatMul", [(2, 3, 4), (4, 2)], {}, {}),
    "Gemm": ("Gemm", [(4, 3), (2, 4), (2,)], {}, {"transA": 1, "transB": 1, "alpha": 0.5}),
    "Einsum": ("Einsum", [(2, 3, 4), (2, 4, 2)], {}, {"equation": "bij,bjk->bik"}),
    "Conv": ("Conv", [IMAGE, (6, 2, 3, 3), (6,)], {}, {"group": 2, "pads": [1, 0, 2, 1], "strides": [2, 1]}),
    "Conv depthwise": ("Conv", [IMAGE, (4, 1, 3, 3)], {}, {"group": 4, "auto_pad": "SAME_UPPER"}),
    "Conv of one axis": ("Conv", [(2, 3, 7), (2, 3, 3)], {}, {"dilations": [2]}),
    "ConvTranspose": ("ConvTranspose", [(1, 3, 4, 4), (3, 2, 3, 3), (2,)], {}, {"strides": [2, 2], "pads": [1] * 4}),
    "BatchNormalization": ("BatchNormalization", [IMAGE, (4,), (4,)], {"m": weight(4), "v": 1 + weight(4) ** 2}, {}),
    "LayerNormalization": ("LayerNormalization", [(2, 3, 4), (4,), (4,)], {}, {"stash_type": 11}),
    "RMSNormalization": ("RMSNormalization", [(2, 3, 4), (4,)], {}, {"stash_type": 11}),
    "InstanceNormalization": ("InstanceNormalization", [IMAGE, (4,), (4,)], {}, {}),
    "GroupNormalization": ("GroupNormalization", [IMAGE, (4,), (4,)], {}, {"num_groups": 2}),
    "Softmax": ("Softmax", [(2, 3, 4)], {}, {"axis": 1}),
    "LogSoftmax": ("LogSoftmax", [(2, 3, 4)], {}, {}),
    "Attention": ("Attention", [(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4)], {}, {}),
    "Attention causal": ("Attention", [(1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)], {}, {"is_causal": 1}),
    "Attention of shared keys": ("Attention", [(1, 4, 3, 2), (1, 2, 3, 2), (1, 2, 3, 2)], {}, {}),
    "MaxPool": ("MaxPool", [IMAGE], {}, {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2]}),
    "AveragePool": ("AveragePool", [IMAGE], {}, {"kernel_shape": [3, 2], "pads": [1, 0, 1, 0]}),
    "AveragePool uneven": ("AveragePool", [IMAGE], {}, {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}),
    "LpPool": ("LpPool", [IMAGE], {}, {"kernel_shape": [2, 2]}),
    "GlobalAveragePool": ("GlobalAveragePool", [IMAGE], {}, {}),
    "GlobalMaxPool": ("GlobalMaxPool", [IMAGE], {}, {}),
    "Resize": ("Resize", [(1, 2, 3, 3)], ROI, {"mode": "linear"}),
    "Resize cubic": ("Resize", [(1, 2, 3, 3)], ROI, {"mode": "cubic", "coordinate_transformation_mode": "align_corners"}),
    "Resize nearest": ("Resize", [(1, 2, 3, 3)], ROI, {"mode": "nearest"}),
    "ReduceMean": ("ReduceMean", [(2, 3, 4)], {"axes": np.int64([1])}, {}),
    "ReduceSum": ("ReduceSum", [(2, 3, 4)], {"axes": np.int64([0, 2])}, {"keepdims": 0}),
    "ReduceMax": ("ReduceMax", [(2, 3, 4)], {"axes": np.int64([2])}, {}),
    "ReduceL2": ("ReduceL2", [(2, 3, 4)], {"axes": np.int64([2])}, {}),
    "ReduceLogSumExp": ("ReduceLogSumExp", [(2, 3, 4)], {"axes": np.int64([2])}, {}),
    "ReduceProd": ("ReduceProd", [(2, 3)], {"axes": np.int64([1])}, {}),
    "CumSum": ("CumSum", [(3, 4)], {"axis": np.int64(1)}, {"exclusive": 1}),
    "Gather": ("Gather", [(5, 3)], {"at": np.int64([[0, 4], [-1, 2]])}, {}),
    "GatherElements": ("GatherElements", [(3, 4)], {"at": np.int64([[0, 3], [1, 1]])}, {"axis": 1}),
    "ScatterND": ("ScatterND", [(4, 3), (2, 3)], {"at": np.int64([[0], [2]])}, {}),
    "Concat": ("Concat", [(2, 3), (2, 2)], {}, {"axis": 1}),
    "Slice": ("Slice", [(5, 4)], {n: np.int64([v]) for n, v in zip("seax", (4, 0, 0, -2), strict=True)}, {}),
    "Split": ("Split", [(5, 4)], {"sizes": np.int64([2, 3])}, {"axis": 0}),
    "Pad": ("Pad", [(3, 4)], {"pads": np.int64([1, -1, 0, 2])}, {}),
    "Pad reflected": ("Pad", [(3, 4)], {"pads": np.int64([1, 2, 0, 1])}, {"mode": "reflect"}),
    "Reshape": ("Reshape", [(3, 4)], {"shape": np.int64([2, -1])}, {}),
    "Transpose": ("Transpose", [(2, 3, 4)], {}, {"perm": [1, 2, 0]}),
    "Expand": ("Expand", [(3, 1)], {"shape": np.int64([2, 3, 4])}, {}),
    "Tile": ("Tile", [(2, 3)], {"repeats": np.int64([2, 1])}, {}),
    "DepthToSpace": ("DepthToSpace", [(1, 4, 2, 3)], {}, {"blocksize": 2}),
    "RNN": ("RNN", [(3, 2, 4), (1, 3, 4), (1, 3, 3), (1, 6)], {}, {"hidden_size": 3}),
    "GRU": ("GRU", [(3, 2, 4), (1, 9, 4), (1, 9, 3), (1, 18)], {}, {"hidden_size": 3, "linear_before_reset": 1}),
    "LSTM": ("LSTM", [(3, 2, 4), (2, 12, 4), (2, 12, 3), (2, 24)], {}, {"hidden_size": 3, "direction": "bidirectional"}),
    "GridSample": ("GridSample", [(1, 2, 3, 3), (1, 2, 2, 2)], {}, {}),
    "LRN": ("LRN", [IMAGE], {}, {"size": 3}),
}  # fmt: skip
FIRST = {"Where", "ScatterND"}
"""Where the constant is not the last input."""


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name):
    operator, shapes, constants, attributes = CASES[name]
    learnt = [f"x{position}" for position in range(len(shapes))]
    names = [*learnt, *constants]
    if operator in FIRST:
        names.insert(0 if operator == "Where" else 1, names.pop())
    results = {"Split": "y z", "LSTM": "y h c", "GRU": "y h", "RNN": "y h"}.get(operator, "y")
    inputs = " ".join(f"{n}:float64[{','.join(map(str, s))}]" for n, s in zip(learnt, shapes, strict=True))
    kept = {
        n: np.float64(a) if np.asarray(a).dtype == np.float32 and n != "scales" else a for n, a in constants.items()
    }
    made = proto(
        [node(operator, " ".join(names), results, **attributes)], inputs,
        " ".join(f"{result}:float64" for result in results.split()), kept, opset=24,
    )  # fmt: skip
    network = Interpreter(ir.from_proto(made))
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    feeds = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *given: network(*given), feeds, fast_mode=True)


def quantizer(dtype, scale, zero, axis=1):
    """x quantized and back: the model and its limits in real numbers."""
    nodes = [node("QuantizeLinear", "x s z", "q", axis=axis), node("DequantizeLinear", "q s z", "y", axis=axis)]
    constants = {"s": np.float32(scale), "z": np.asarray(zero, dtype)}
    limits = np.iinfo(dtype)
    low, high = ((np.float32(limit) - np.float32(zero)) * np.float32(scale) for limit in (limits.min, limits.max))
    return build(nodes, "x:float32[n,2]", "y:float32[n,2]", constants, opset=21), low, high


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize(("scale", "zero"), [(0.02, 3), ([0.02, 0.05], [3, 0])])
def test_gradients_pass_quantization_inside_its_range_and_stop_outside(dtype, scale, zero):
    artifact, low, high = quantizer(dtype, scale, zero)
    network = Interpreter(artifact.model, straight_through=True)
    rows = [low - 1, low + 0.001, (low + high) / 2 + 0.007, high - 0.001, high + 1]
    x = torch.tensor(np.stack([np.broadcast_to(row, 2) for row in rows]).astype(np.float32), requires_grad=True)
    (found,) = network(x)
    np.testing.assert_allclose(
        found.detach().numpy(), outputs(artifact, {"x": x.detach().numpy()})["y"], rtol=1e-6, atol=1e-6
    )
    found.sum().backward()
    assert x.grad.tolist() == [[0, 0], [1, 1], [1, 1], [1, 1], [0, 0]]


def test_without_straight_through_rounding_has_no_gradient():
    artifact, _, _ = quantizer("int8", 0.02, 0)
    x = torch.zeros(1, 2, requires_grad=True)
    assert not Interpreter(artifact.model)(x)[0].requires_grad


def test_the_step_size_learns_too():
    """Learned Step Size Quantization: inside, the rounding error in steps; outside, the outermost level."""
    artifact, _, _ = quantizer("int8", 0.5, 0)
    network = Interpreter(artifact.model, straight_through=True)
    scale = network.weights["s"].requires_grad_()
    network(torch.tensor([[0.6, 1000.0]]))[0].sum().backward()
    assert scale.grad.item() == pytest.approx((1 - 1.2) + 127)


def learner():
    """Quantized inputs and weights: x:float32[n,6] to y:float32[n,3]."""
    nodes = [
        node("QuantizeLinear", "x xs xz", "xq"), node("DequantizeLinear", "xq xs xz", "xd"),
        node("QuantizeLinear", "w1 ws wz", "wq", axis=1), node("DequantizeLinear", "wq ws wz", "wd", axis=1),
        node("Gemm", "xd wd b1", "h"), node("Relu", "h", "r"), node("MatMul", "r w2", "y"),
    ]  # fmt: skip
    weights = {
        "w1": weight(6, 8), "b1": weight(8), "w2": weight(8, 3), "xs": np.float32(0.03), "xz": np.int8(0),
        "ws": np.full(8, 0.01, np.float32), "wz": np.zeros(8, np.int8),
    }  # fmt: skip
    return build(nodes, "x:float32[n,6]", "y:float32[n,3]", weights, opset=21)


def test_an_onnx_model_learns_and_the_artifact_computes_what_was_learnt():
    artifact = learner()
    network = Interpreter(artifact.model, straight_through=True)
    taught = [network.weights[name].requires_grad_() for name in ("w1", "b1", "w2")]
    x, target = torch.from_numpy(weight(32, 6, scale=1.0)), torch.from_numpy(weight(32, 3, seed=7, scale=1.0))
    step = torch.optim.SGD(taught, lr=0.3)
    losses = []
    for _ in range(30):
        step.zero_grad()
        loss = torch.nn.functional.mse_loss(network(x)[0], target)
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    learnt = network.write_back(artifact, Step("distill"))
    assert learnt.model.graph.initializers["ws"].const_value is artifact.model.graph.initializers["ws"].const_value
    found = outputs(learnt, {"x": x.numpy()})["y"]
    np.testing.assert_allclose(found, network(x)[0].detach().numpy(), rtol=1e-4, atol=1e-5)
    assert float(np.mean((found - target.numpy()) ** 2)) < 0.8 * losses[0]
