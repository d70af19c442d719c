"""Every target that can be used here against the reference: operators of onnx's specification, a model of each family.

The whole of onnx's node tests on every target is `bench/suites/operators.py`; here is what stays cheap."""

from __future__ import annotations

import json
from functools import cache
from importlib import util
from pathlib import Path

import numpy as np
import pytest
from models import build, conv_net, feed, mlp, node, outputs, transformer, weight

from perwatt import registry
from perwatt.contract import OperatingPoint

ROOT = Path(__file__).resolve().parents[2]
RTOL, ATOL = 1e-3, 1e-4


def names() -> list[object]:
    """Every target with every variant; those that compile for seconds only with the slow tests."""
    found = []
    for plain in registry.names("targets"):
        cls = registry.target_class(plain)
        marks = [pytest.mark.slow] if cls.slow_to_lower else []
        found += [pytest.param(cls(variant).full_name, marks=marks) for variant in cls.variants]
    return found


@cache
def missing(name: str) -> list[str]:
    return registry.target(name).missing()


def quantized_net(batch: str = "batch"):
    """A convolution and a linear layer with explicit int8 quantization, symmetric: x:float32[batch,3,8,8]."""
    weights = {
        "xs": np.float32(0.03), "rs": np.float32(0.05), "z": np.int8(0),
        "w1": np.random.default_rng(0).integers(-127, 128, (8, 3, 3, 3)).astype(np.int8),
        "w1s": np.linspace(0.002, 0.006, 8, dtype=np.float32), "w1z": np.zeros(8, np.int8),
        "w2": np.random.default_rng(1).integers(-127, 128, (8, 5)).astype(np.int8),
        "w2s": np.float32(0.004),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", "x xs z", "xq"), node("DequantizeLinear", "xq xs z", "xd"),
        node("DequantizeLinear", "w1 w1s w1z", "w1d", axis=0),
        node("Conv", "xd w1d", "c", pads=[1] * 4), node("Relu", "c", "r"),
        node("GlobalAveragePool", "r", "p"), node("Flatten", "p", "f"),
        node("QuantizeLinear", "f rs z", "fq"), node("DequantizeLinear", "fq rs z", "fd"),
        node("DequantizeLinear", "w2 w2s z", "w2d"), node("MatMul", "fd w2d", "y"),
    ]  # fmt: skip
    return build(nodes, f"x:float32[{batch},3,8,8]", f"y:float32[{batch},5]", weights)


MODELS = {"cnn": conv_net, "mlp": mlp, "transformer": transformer, "int8": quantized_net}
X = "x:float32[2,3,6,6]"
OPERATORS = {
    "ConvTranspose": (X, "y:float32[2,4,8,8]", "x w", {}, {"w": weight(3, 4, 3, 3)}),
    "AveragePool": (X, "y:float32[2,3,3,3]", "x", {"kernel_shape": [2, 2], "strides": [2, 2]}, {}),
    "MaxPool": (X, "y:float32[2,3,6,6]", "x", {"kernel_shape": [3, 3], "pads": [1] * 4}, {}),
    "InstanceNormalization": (X, "y:float32[2,3,6,6]", "x s b", {}, {"s": weight(3), "b": weight(3, seed=1)}),
    "Gelu": (X, "y:float32[2,3,6,6]", "x", {"approximate": "tanh"}, {}),
    "HardSwish": (X, "y:float32[2,3,6,6]", "x", {}, {}),
    "ReduceMean": (X, "y:float32[2,6]", "x axes", {"keepdims": 0}, {"axes": np.int64([1, 2])}),
    "Softmax": (X, "y:float32[2,3,6,6]", "x", {"axis": 1}, {}),
    "ArgMax": (X, "y:int64[2,3,6]", "x", {"axis": 2, "keepdims": 0}, {}),
    "Resize": (X, "y:float32[2,3,12,12]", "x - scales", {"mode": "linear"}, {"scales": np.float32([1, 1, 2, 2])}),
    "Pad": (X, "y:float32[2,3,8,7]", "x pads", {"mode": "reflect"}, {"pads": np.int64([0, 0, 1, 0, 0, 0, 1, 1])}),
    "Einsum": (X, "y:float32[2,3,6,4]", "x w", {"equation": "bchw,wo->bcho"}, {"w": weight(6, 4)}),
}


def agrees(name: str, artifact, batch, folder: Path) -> None:
    """What the target gives is what the reference gives: names, types and shapes, integers equal."""
    if reasons := missing(name):
        pytest.skip("; ".join(reasons))
    artifact.file(folder)
    point = OperatingPoint(floating_precision="f32", threads=1, batch=len(next(iter(batch.values()))))
    found, wanted = registry.target(name).lower(artifact, point).run(batch), outputs(artifact, batch)
    assert list(found) == list(wanted)
    for output, expected in wanted.items():
        assert found[output].dtype == expected.dtype and found[output].shape == expected.shape
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(found[output], expected, rtol=RTOL, atol=ATOL)
        else:
            np.testing.assert_array_equal(found[output], expected)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", names())
def test_a_small_model_of_each_family_gives_what_the_reference_gives(name: str, model: str, tmp_path: Path) -> None:
    artifact = MODELS[model]()
    agrees(name, artifact, feed(artifact, items=4, words=11), tmp_path)


@pytest.mark.parametrize("name", names())
def test_operators_give_what_the_reference_gives(name: str, tmp_path: Path) -> None:
    """A dozen in one graph: compiling is what costs, and a wrong one is named by its output."""
    nodes, results, weights = [], [], {}
    for operator, (_, result, inputs, attributes, held) in OPERATORS.items():
        words = [word if word in ("x", "-") else f"{operator}_{word}" for word in inputs.split()]
        nodes.append(node(operator, " ".join(words), f"{operator}_y", **attributes))
        results.append(result.replace("y:", f"{operator}_y:"))
        weights |= {f"{operator}_{key}": array for key, array in held.items()}
    artifact = build(nodes, X, " ".join(results), weights)
    agrees(name, artifact, feed(artifact, items=2), tmp_path)


# The suite that runs all of onnx's node tests ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suite():
    spec = util.spec_from_file_location("operators_suite", ROOT / "bench/suites/operators.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_operators_is_the_one_made_from_the_results(suite) -> None:
    found = json.loads(suite.RESULTS.read_text())
    assert suite.TABLE.read_text() == suite.table(found)
    for name in ("openvino", "onnxruntime", "interpreter"):
        assert found["targets"][name]["counts"]["passed"] > 1000


SCRIPTED = """
import os, sys, time
for line in sys.stdin:
    case = line.strip()
    if case == "crash":
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 11)
    if case == "hang":
        time.sleep(60)
    print('["passed", ""]', flush=True)
"""


def test_a_scripted_backend_that_crashes_or_hangs_is_a_result_and_the_next_case_is_tried(
    suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "scripted.py"
    script.write_text(SCRIPTED)
    monkeypatch.setattr(suite, "__file__", str(script))
    child = suite.Child("anything", timeout_s=5.0)
    assert child.ask(Path("fine")) == ("passed", "")
    assert child.ask(Path("crash")) == ("crashed", "ended by SIGSEGV: last words")
    assert child.ask(Path("fine")) == ("passed", "")
    child.timeout_s = 0.2
    assert child.ask(Path("hang"))[0] == "hung"
    child.timeout_s = 5.0
    assert child.ask(Path("fine")) == ("passed", "")
    child.close()


@pytest.mark.parametrize(
    ("ours", "theirs", "right"),
    [
        (np.int64([1, 2]), np.int64([1, 2]), True),
        (np.int64([1, 2]), np.int64([1, 3]), False),
        (np.int32([1, 2]), np.int64([1, 2]), False),
        (np.float32([1.0]), np.float32([1.0005]), True),
        (np.float32([1.0]), np.float32([1.01]), False),
        (np.float16([1.0]), np.float16([1.0019]), True),
        (np.float32([np.nan, np.inf]), np.float32([np.nan, np.inf]), True),
        (np.float32([np.nan]), np.float32([0.0]), False),
        (np.float32([[1.0]]), np.float32([1.0]), False),
    ],
)
def test_outputs_are_compared_within_tolerance_and_integers_exactly(suite, ours, theirs, right: bool) -> None:
    if right:
        suite.compare(ours, theirs, 1e-3, 1e-7)
    else:
        with pytest.raises(AssertionError):
            suite.compare(ours, theirs, 1e-3, 1e-7)


def test_of_a_slow_target_the_smallest_float_case_of_each_operator_is_chosen(suite) -> None:
    def case(operator: str | None, float32: bool, size: int, expanded: bool = False) -> dict[str, object]:
        return {"operator": operator, "float32": float32, "size": size, "expanded": expanded}

    cases = {
        "a_int": case("A", False, 1), "a_large": case("A", True, 9), "a_small": case("A", True, 5),
        "a_expanded": case("A", True, 1, expanded=True), "b_int": case("B", False, 3), "many": case(None, True, 1),
    }  # fmt: skip
    assert suite.one_each(cases, list(cases)) == ["a_small", "b_int"]
    assert suite.one_each(cases, ["a_int", "a_large"]) == ["a_large"]
