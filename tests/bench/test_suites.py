"""Parts of the benchmark suites that decide what they say: counting operations, ratios, verdicts, quantized files.

What they measure is not checked here. The suites are scripts with a `models` module of their own, which is not the tests'.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import feed, mlp, outputs, transformer

from perwatt.data import Samples
from perwatt.measurement import Ratio

SUITES = Path(__file__).resolve().parents[2] / "bench" / "suites"


def saved(artifact_or_model, folder, name="model.onnx"):
    path = folder / name
    artifact_or_model.save(path) if hasattr(artifact_or_model, "save") else onnx.save(artifact_or_model, path)
    return path


# Operations -----------------------------------------------------------------------------------------------------------


def one_node(kind, shape, weights, **attributes):
    """x → node(x, weights), with a dynamic batch."""
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    made = helper.make_node(kind, ["x", "w"], ["y"], **attributes)
    x = helper.make_tensor_value_info("x", floats, shape)
    y = helper.make_tensor_value_info("y", floats, None)
    w = onnx.numpy_helper.from_array(np.ones(weights, np.float32), "w")
    graph = helper.make_graph([made], "one", [x], [y], [w])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("kind", "shape", "weights", "attributes", "multiply_adds"),
    [
        # 8 outputs of 6×6 places, each from 3 channels under a 3×3 kernel.
        ("Conv", ["batch", 3, 8, 8], (8, 3, 3, 3), {}, 8 * 6 * 6 * 3 * 9),
        ("Conv", ["batch", 8, 8, 8], (8, 1, 3, 3), {"group": 8}, 8 * 6 * 6 * 9),
        ("Conv", ["batch", 4, 8, 8], (6, 2, 1, 1), {"group": 2, "strides": [2, 2]}, 6 * 4 * 4 * 2),
        ("Gemm", ["batch", 20], (7, 20), {"transB": 1}, 7 * 20),
        ("MatMul", ["batch", 5, 20], (20, 7), {}, 5 * 7 * 20),
    ],
)
def test_operations_are_two_for_each_multiplication_and_scale_with_the_batch(
    suite, tmp_path, kind, shape, weights, attributes, multiply_adds
):
    path = saved(one_node(kind, shape, weights, **attributes), tmp_path)
    count = suite("_operations").count_operations
    assert sum(count(path).values()) == 2 * multiply_adds
    assert sum(count(path, batch=3).values()) == 6 * multiply_adds


def test_quantizing_does_not_change_the_count(suite, tmp_path):
    path = saved(mlp(), tmp_path)
    model = onnx.load(path)
    gpu_models, count = suite("_gpu_models"), suite("_operations").count_operations
    kinds = ("MatMul", "Gemm")
    largest = {product.input[0]: 4.0 for product in gpu_models.products(model, kinds)}
    made = gpu_models.quantized(path, largest, "int8", kinds, tmp_path / "int8.onnx")
    assert largest
    assert sum(count(made).values()) == sum(count(path).values()) > 0


def test_an_open_size_or_an_unknown_operator_is_refused(suite, tmp_path):
    count = suite("_operations").count_operations
    with pytest.raises(ValueError, match="can't be inferred"):
        count(saved(one_node("MatMul", ["batch", "length", 20], (20, 7)), tmp_path))
    across = one_node("ConvTranspose", ["batch", 3, 8, 8], (3, 4, 2, 2))
    with pytest.raises(ValueError, match="not counted"):
        count(saved(across, tmp_path, "transposed.onnx"))


def test_peaks_are_known_for_amx_only(suite):
    theoretical = suite("_operations").theoretical_tops
    assert theoretical(2.0, ["avx512f"]) == {}
    # A tile product of 16×16×64 in 16 cycles, two operations each.
    assert theoretical(2.0, ["amx_int8", "amx_bf16"]) == {"int8": 4.096, "bf16": 2.048}


def test_operators_are_told_by_their_share_of_the_time(suite, tmp_path):
    path = saved(one_node("Conv", ["batch", 16, 32, 32], (16, 16, 3, 3)), tmp_path)
    told = suite("_operations").operators_by_time(path, {"batch": 4, "threads": 1, "streams": 1}, calls=3)
    shares = [entry["share"] for entry in told]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=0.01)
    assert "Convolution" in {entry["layer"] for entry in told}


# The other side -------------------------------------------------------------------------------------------------------


def test_benchmark_app_measures_with_the_stopwatch_around_its_loop(suite, tmp_path):
    path = saved(one_node("MatMul", ["batch", 64], (64, 8)), tmp_path)
    window = suite("_app").app_window(path, "latency", ["-shape", "x[1,64]", "-iop", "x:f32"], 1)
    assert window["inferences"] > 0
    assert window["inferences"] / window["throughput_per_s"] == pytest.approx(1, rel=0.5)  # seconds, as asked
    assert 0 < window["latency_p50_ms"] < 1000
    assert window["cpu_s_per_inference"] > 0


def test_benchmark_app_that_fails_ends_the_suite_with_its_words(suite, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(SystemExit, match="did not measure"):
        suite("_app").app_window(tmp_path / "bad.onnx", "latency", [], 1)


# points ---------------------------------------------------------------------------------------------------------------


def point_result(cost, p50, arithmetic="int8"):
    ratios = {
        "cpu_s_per_inference": {"value": cost, "low": cost * 0.9, "high": cost * 1.1},
        "throughput_per_s": {"value": 1 / cost, "low": None, "high": None},
        "latency_p50_ms": {"value": p50, "low": None, "high": None},
    }
    figures = {"cpu_s_per_inference": 0.001, "throughput_per_s": 1000.0, "latency_p50_ms": 1.0}
    point = {"batch": 8, "streams": 2, "threads": 2, "floating_precision": "bf16"}
    return {
        "ratios": ratios, "figures": figures, "operating_point": point, "target": "openvino", "shipped": ["original"],
        "outcome": "optimized", "arithmetic": arithmetic, "operators": None, "operations_per_inference": 10**9,
    }  # fmt: skip


def measured(cost, p50, tool="int8"):
    app = {"cpu_s_per_inference": 0.002, "throughput_per_s": 500.0, "latency_p50_ms": 2.0}
    return {
        "offline": {"app": app, "point": point_result(cost, p50), "tool": point_result(cost, p50, tool)},
        "single-stream": {"app": app, "point": point_result(cost, p50)},
    }


def test_bars_are_cpu_seconds_offline_and_the_median_in_single_stream(suite):
    verdicts = suite("points").verdicts
    held = verdicts({"resnet20": measured(0.5, 1.0)})
    assert len(held) == 3
    assert all(holds for _, holds in held)
    missed = dict(verdicts({"resnet20": measured(1.03, 1.03)}))
    assert [holds for line, holds in missed.items() if "cpu_s_per_inference" in line] == [False]
    assert [holds for line, holds in missed.items() if "latency_p50_ms" in line] == [False]


def test_the_geometric_mean_is_over_the_models_measured(suite):
    points = suite("points")
    both = {"resnet20": measured(0.5, 1.0), "resnet50": measured(1.0, 1.0)}
    assert points.gain({name: found["offline"]["point"] for name, found in both.items()}) == pytest.approx(math.sqrt(2))
    (line,) = [line for line, _ in points.verdicts(both) if "geometric mean" in line]
    assert line.startswith("offline, 2 models: 1.41")


@pytest.mark.parametrize(
    ("arithmetic", "to_half", "holds"), [("bf16", 1.1, True), ("int8", 0.9, True), ("int8", 1.1, False)]
)
def test_mobilenetv2_may_not_lose_to_bf16(suite, arithmetic, to_half, holds):
    results = measured(0.5, 1.0, arithmetic)
    results["offline"]["half"] = {**point_result(0.5, 1.0), "tool_to_half": {"value": to_half}}
    told = dict(suite("points").verdicts({"mobilenetv2": results}))
    assert [value for line, value in told.items() if "what bf16 takes" in line] == [holds]


def test_shares_of_the_peak_go_by_cpu_seconds_and_by_type(suite):
    results = measured(0.5, 1.0, "bf16")
    known = {"probe_tops": {"int8": 4.0, "bf16": 2.0}, "theoretical_tops": {"int8": 8.0}}
    suite("points").add_shares(results, known)
    # 10⁹ operations in a CPU millisecond: one Tera-operation a second.
    assert results["offline"]["point"]["reached"]["of_probe"] == pytest.approx(0.25)
    assert results["offline"]["point"]["reached"]["of_theoretical"] == pytest.approx(0.125)
    assert results["offline"]["tool"]["reached"]["of_probe"] == pytest.approx(0.5)
    assert results["offline"]["tool"]["reached"]["of_theoretical"] is None


def test_every_side_is_measured_once_a_round_and_compared_with_the_app(suite):
    rounds = []

    def window(cost):
        return lambda: {"cpu_s_per_inference": cost, "throughput_per_s": 1 / cost, "latency_p50_ms": cost}

    found = suite("points").interleaved(
        {"app": window(2.0), "point": window(1.0)}, 4, lambda: rounds.append(1), "a model"
    )
    assert len(rounds) == 4
    assert found["point"]["ratios"]["cpu_s_per_inference"]["value"] == pytest.approx(0.5)
    assert found["app"]["ratios"]["latency_p50_ms"]["value"] == pytest.approx(1.0)
    assert found["point"]["figures"]["throughput_per_s"] == pytest.approx(1.0)


@pytest.mark.parametrize(("batch", "count"), [(1, 4), (8, 16)])
def test_calls_are_fed_two_calls_worth_of_the_samples(suite, tmp_path, batch, count):
    np.savez(tmp_path / "few.npz", x=np.arange(6, dtype=np.float32).reshape(3, 2))
    fed = Samples.load(suite("points").feed(tmp_path / "few.npz", batch, tmp_path / "fed"))
    assert len(fed) == count
    np.testing.assert_array_equal(fed.chunks[0]["x"][:4], [[0, 1], [2, 3], [4, 5], [0, 1]])


def test_the_table_has_a_row_for_each_side(suite):
    lines = suite("points").table({"resnet20": measured(0.5, 1.0)}).split("\n")
    assert len(lines) == 2 + 3 + 2
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "0.500 [0.450, 0.550]" in lines[3]


# alias ----------------------------------------------------------------------------------------------------------------


def test_the_alias_is_held_against_the_best_of_the_others(suite):
    alias = suite("alias")
    # Others ÷ the alias's: one takes twice as long, one 5 % less.
    ratios = {"slow": alias.turned(Ratio(2.0, 1.9, 2.1)), "fast": alias.turned(Ratio(0.95, 0.9, 0.99))}
    told = alias.judged(ratios)
    assert told["best"] == "fast"
    assert told["alias_to_best"]["value"] == pytest.approx(1 / 0.95)
    assert told["alias_to_best"]["low"] == pytest.approx(1 / 0.99)
    assert told["verdict"] == "missed"
    assert alias.judged({"slow": ratios["slow"]})["verdict"] == "holds"
    assert alias.judged({"slow": ratios["slow"]})["best"] == "cpu"
    assert alias.judged({})["verdict"] == "not measured"
    # Two processes of one program differ by noise; what another backend does still decides.
    assert alias.judged({"fast": ratios["fast"]})["verdict"] == "missed"
    told = alias.judged({"fast": ratios["fast"], "slow": ratios["slow"]}, ["fast"])
    assert told["verdict"] == "holds" and told["best"] == "fast" and told["same_program"] == ["fast"]
    assert alias.judged({"fast": ratios["fast"], "other": ratios["fast"]}, ["fast"])["verdict"] == "missed"


def test_a_backend_that_failed_shows_in_the_table(suite):
    chose = {"target": "openvino", "shipped": ["quantize-int8"]}
    its = {
        "failed": {"inductor": "refused"}, "bundles": {"cpu": chose}, "figures": {"cpu": 0.001, "onnxruntime": 0.002},
        "alias_to": {"onnxruntime": {}, "inductor": {}}, "alias_to_best": {"value": 0.5, "low": 0.4, "high": 0.6},
        "verdict": "holds",
    }  # fmt: skip
    row = suite("alias").table({"mnist": {"offline": its}}).split("\n")[-1]
    assert (
        row == "| mnist | offline | openvino, quantize-int8 | 1.0000 | failed | 2.0000 | 0.500 [0.400, 0.600] | holds |"
    )


# gpu ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "drift"), [("int8", 0.03), ("fp8", 0.12)])
def test_quantized_files_stay_near_the_float_ones(suite, tmp_path, kind, drift):
    gpu_models = suite("_gpu_models")
    artifact = transformer()
    path = saved(artifact, tmp_path)
    kinds = ("MatMul", "Gemm")
    products = gpu_models.products(onnx.load(path), kinds)
    inside = {product.input[0] for product in products}
    batch = feed(artifact)
    largest = dict.fromkeys(inside, 6.0)
    out = gpu_models.quantized(path, largest, kind, kinds, tmp_path / "q.onnx")
    onnx.checker.check_model(onnx.load(out), full_check=True)
    before, after = outputs(artifact, batch), outputs(type(artifact).load(out), batch)
    assert products
    for name, expected in before.items():
        moved = np.sqrt(np.mean((after[name] - expected) ** 2) / np.mean(expected**2))
        assert 0 < moved < drift


def test_without_a_gpu_the_suite_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        [sys.executable, str(SUITES / "gpu.py"), "--out", str(tmp_path / "gpu.json")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "gpu.json").exists()


# architectures --------------------------------------------------------------------------------------------------------


def test_made_up_pictures_are_the_same_every_time_and_differ_from_each_other(suite):
    pictures = suite("architectures").pictures
    first = pictures(3, side=32)
    assert first.shape == (3, 3, 32, 32)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, pictures(3, side=32))
    assert np.abs(first[0] - first[1]).mean() > 0.5
    assert first.std() == pytest.approx(1, abs=0.15)


def test_an_unknown_architecture_names_the_known_ones():
    done = subprocess.run([sys.executable, str(SUITES / "architectures.py"), "vgg"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "known are resnet20" in done.stderr
