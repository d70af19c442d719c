"""Whole runs on a tiny network: scripted time on the null target, one in earnest on OpenVINO."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest

import perwatt
from perwatt import recipe as recipes
from perwatt.bundle import LOCK, Bundle, digest_of
from perwatt.errors import InputError, TargetError
from perwatt.report import schema

sys.path.insert(0, str(Path(__file__).parent))
from runs import files_in, images, optimize, outputs, package, put_net

SIDE = (
    "cpu_s_per_inference", "throughput_per_s", "latency_p50_ms", "latency_p99_ms", "size_bytes", "peak_memory_bytes",
    "accuracy", "power_w", "energy_j_per_inference", "throughput_per_watt",
)  # fmt: skip

FILES = {"model.onnx", "program.json", "recipe.yaml", "report.json", "report.html", LOCK}


def assert_complete(bundle: Bundle) -> dict:
    """Whole, documented, and true to its lock; returns the report."""
    report = bundle.report
    jsonschema.validate(report, schema())
    for part in ("original", "optimized", "ratio", "ratio_graph"):
        assert set(SIDE) <= set(report[part])
    for part in ("original", "optimized"):
        for name in ("power_w", "energy_j_per_inference", "throughput_per_watt"):
            assert set(report[part][name]) == {"value", "method", "boundary"}
            assert report[part][name]["method"] in ("modelled", "counter", "metered", "unavailable")
    for ratio in report["ratio"].values():
        assert set(ratio) == {"value", "low", "high"}
    assert set(bundle.lock["outputs"]) == files_in(bundle.path) - {LOCK}
    for name, digest in bundle.lock["outputs"].items():
        assert digest_of(bundle.path / name) == digest
    assert "{{" not in (bundle.path / "report.html").read_text(encoding="utf-8")
    return report


def row(report: dict, name: str) -> dict:
    return next(row for row in report["passes"] if row["name"] == name)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `net.onnx` and `samples.npz`."""
    folder = tmp_path_factory.mktemp("runs")
    put_net(folder)
    return folder


@pytest.fixture(scope="module")
def made(here: Path) -> tuple[Bundle, list[tuple[str, float]]]:
    """A run of the default passes with data, and the progress that it told."""
    told: list[tuple[str, float]] = []
    bundle = perwatt.optimize(
        here / "net.onnx", target="null", data=here / "samples.npz", out=here / "made", min_gain="1%", max_drop=100,
        progress=lambda stage, share: told.append((stage, share)),
    )  # fmt: skip
    return bundle, told


def test_a_run_with_data_ships_the_fastest_graph_within_the_budget(made) -> None:
    report = assert_complete(made[0])
    assert report["outcome"] == made[0].outcome == "optimized"
    # Scripted: Conv, BatchNormalization, three small ones and Gemm; int8 halves what folding leaves.
    assert report["original"]["latency_p50_ms"] == pytest.approx(1.9)
    assert report["optimized"]["latency_p50_ms"] < 1.2
    assert report["ratio"]["cpu_s_per_inference"]["value"] < 0.65
    assert report["accuracy"]["metric"] == "top1" and report["accuracy"]["original"] == pytest.approx(0.9, abs=0.02)
    assert report["model"]["name"] == "net" and report["model"]["format"] == "onnx"
    assert report["data"]["samples"].keys() >= {"calibrate", "select", "evaluation"}
    assert report["torch_eager"] is None


def test_the_ledger_has_a_row_for_every_pass_with_drift_time_size_and_operators(made) -> None:
    report = made[0].report
    names = [entry["name"] for entry in report["passes"]]
    repeated = {name for name in names if names.count(name) > 1}
    assert names[0] == "read" and repeated <= {
        "cancel-reshapes",
        "common-subexpression",
        "remove-dead",
        "quantize-int8",
    }
    assert {
        "fold-constants",
        "common-subexpression",
        "remove-dead",
        "fold-batchnorm",
        "cast-half",
        "quantize-int8",
    } <= set(names)
    folded = row(report, "fold-batchnorm")
    assert folded["status"] == "applied" and folded["changes"]
    assert folded["drift"]["max_abs"] < 1e-4 and folded["seconds"] >= 0
    assert "BatchNormalization" in folded["operators"]["before"]
    assert "BatchNormalization" not in folded["operators"]["after"]
    quantized = row(report, "quantize-int8")
    assert quantized["status"] == "applied"
    assert quantized["measured"]["inferences_per_cpu_s_ratio"]["value"] > 1.5
    assert row(report, "cast-half")["status"] == "refused" and row(report, "cast-half")["reason"]


def test_every_candidate_is_told_with_its_verdict_and_exactly_one_is_shipped(made) -> None:
    candidates = made[0].report["candidates"]
    assert [c["verdict"] for c in candidates].count("shipped") == 1
    assert {"original graph, floating point in f32", "quantize-int8, floating point in f32"} <= {
        c["name"] for c in candidates
    }


def test_the_bundle_holds_all_that_is_needed_to_deploy_and_to_judge(made) -> None:
    assert files_in(made[0].path) == FILES | {"null/model.onnx"}
    lock = made[0].lock
    assert lock["model"]["name"] == "net" and len(lock["model"]["sha256"]) == 64
    assert lock["data"] and lock["seeds"] == {"seed": 0} and lock["versions"]["perwatt"] == perwatt.__version__
    assert next(step["name"] for step in lock["decisions"]["passes"]) == "read"
    assert lock["decisions"]["passes"][-1]["name"] == "quantize-int8"


def test_the_recipe_in_the_bundle_gives_the_same_recipe_back(made, here: Path) -> None:
    path = made[0].path / "recipe.yaml"
    parsed = recipes.parse(recipes.load(path))
    assert recipes.dump(parsed) == path.read_text()
    assert parsed.model_dump(mode="json") == made[0].lock["recipe"]
    assert parsed.data.metric == "top1" and parsed.budget.max_drop == 100 and parsed.passes != "default"
    shown = optimize("--config", path, "--dry-run", "--json", "--out", here / "again", cwd=here)
    assert json.loads(shown.stdout)["recipe"] == made[0].lock["recipe"]


def test_a_precision_that_is_asked_for_is_the_only_one_tried(here: Path) -> None:
    bundle = perwatt.optimize(
        here / "net.onnx", target="openvino", data=here / "samples.npz", out=here / "f32", precision="f32",
        passes="fold-batchnorm,cast-half", time="20s",
    )  # fmt: skip
    report = assert_complete(bundle)
    assert row(report, "cast-half")["status"] == "refused"
    assert {candidate["floating_precision"] for candidate in report["candidates"]} == {"f32"}
    assert bundle.program["operating_point"]["floating_precision"] == "f32"
    with pytest.raises(TargetError, match="null can't be used here: it calculates in f32 here, and not in bf16"):
        perwatt.optimize(here / "net.onnx", target="null", precision="bf16", out=here / "none")
    # No GPU could finish a bundle in a precision that its backend doesn't have.
    with pytest.raises(TargetError, match="target tensorrt can't be used here"):
        perwatt.optimize(here / "net.onnx", target="tensorrt", precision="bf16", out=here / "none")
    assert not (here / "none").exists()
    with pytest.raises(TargetError, match="null can't be used here: it calculates in f32 here, and not in bf16"):
        perwatt.benchmark(here / "net.onnx", target="null", precision="bf16")


def test_a_precision_without_labelled_samples_is_warned_of(here: Path) -> None:
    from perwatt.targets.openvino import OpenVINO

    if "bf16" not in OpenVINO().capabilities().floating_precisions:
        pytest.skip("this processor has no bfloat16 arithmetic")
    bundle = perwatt.optimize(
        here / "net.onnx", target="openvino", out=here / "half", precision="bf16", passes="fold-batchnorm", time="15s",
        tune=False,
    )  # fmt: skip
    assert {candidate["floating_precision"] for candidate in bundle.report["candidates"]} == {"bf16"}
    assert any(note.startswith("warning: accuracy in bf16 was not judged") for note in bundle.report["notes"])


def test_an_order_that_hides_work_and_a_batch_that_is_fixed_are_noted(here: Path) -> None:
    model = onnx.load(here / "net.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, here / "fixed.onnx")
    notes = perwatt.optimize(
        here / "fixed.onnx", target="null", out=here / "fixed", scenario="offline", passes="fold-batchnorm,fold-shapes"
    ).report["notes"]
    assert "fold-batchnorm stands before fold-shapes, after which it finds more" in notes
    assert any(
        note.startswith("the model fixes its batch at 1, so no other number of items in a call") for note in notes
    )
    freed = perwatt.optimize(
        here / "fixed.onnx", target="null", out=here / "freed", scenario="offline", passes="free-batch"
    )
    assert [row["changes"] for row in freed.report["passes"]][1:] == [["calls of any size, where they had to be of 1"]]
    assert not any("fixes its batch" in note for note in freed.report["notes"])


@pytest.mark.parametrize("count", [1, 2, 7, 33])
def test_a_loaded_bundle_runs_any_batch_size_and_equals_its_model(made, count: int) -> None:
    x = images(count, seed=5)
    found = perwatt.load(made[0]).run(x)
    np.testing.assert_allclose(found["y"], outputs(made[0].path / "model.onnx", x), rtol=1e-3, atol=1e-3)
    by_name = perwatt.load(made[0].path).run({"x": x.astype(np.float64)})
    np.testing.assert_array_equal(by_name["y"], found["y"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"picture": images(1)}, "x"),
        (images(1)[:, :, :4], "shape"),
        (np.array([["a"]]), "x"),
        (np.float32(1), "shape"),
        (images(0), "no items"),
    ],
)
def test_a_loaded_bundle_says_what_it_wants_where_inputs_do_not_fit(made, given, words: str) -> None:
    with pytest.raises(InputError, match=words):
        perwatt.load(made[0]).run(given)


def test_progress_names_its_stages_and_stays_between_nothing_and_all(made) -> None:
    stages = [stage for stage, _ in made[1]]
    assert "looking at the target null" in stages and stages[-1] == "writing the bundle"
    assert all(0 <= share <= 1 for _, share in made[1])


def test_a_bundle_is_an_input_like_any_model(made, here: Path) -> None:
    again = perwatt.optimize(
        made[0].path, target="null", data=here / "samples.npz", out=here / "again", passes="fold-constants"
    )
    report = assert_complete(again)
    assert report["outcome"] == "unchanged"
    x = images(3, seed=6)
    np.testing.assert_allclose(perwatt.load(again).run(x)["y"], perwatt.load(made[0]).run(x)["y"], rtol=1e-4, atol=1e-4)


def test_what_does_not_clear_the_least_gain_is_not_shipped(here: Path) -> None:
    bundle = perwatt.optimize(
        here / "net.onnx", target="null", data=here / "samples.npz", out=here / "kept", passes="fold-batchnorm",
        min_gain="99%",
    )  # fmt: skip
    report = assert_complete(bundle)
    assert report["outcome"] == "unchanged"
    assert "99%" in report["reason"]
    assert row(report, "fold-batchnorm")["status"] == "not-chosen"
    assert report["ratio"]["cpu_s_per_inference"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert report["original"]["latency_p50_ms"] == report["optimized"]["latency_p50_ms"]
    assert bundle.lock["decisions"]["artifact"] == bundle.lock["model"]["artifact"]
    x = images(3)
    np.testing.assert_allclose(perwatt.load(bundle).run(x)["y"], outputs(here / "net.onnx", x), rtol=1e-4, atol=1e-5)


def test_a_latency_that_nothing_reaches_ends_with_exit_code_3_and_keeps_the_bundle(here: Path) -> None:
    done = optimize(
        "net.onnx", "--target", "null", "--data", "samples.npz", "--passes", "fold-batchnorm", "--p99", "0.001ms",
        "--out", "slow", "--json", cwd=here,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    report = assert_complete(Bundle(here / "slow"))
    assert report == json.loads(done.stdout)
    assert report["outcome"] == "budget_not_met"
    assert "p99 latency" in report["reason"] and "0.001 ms" in report["reason"]


def test_without_data_nothing_lossy_is_shipped_and_the_last_word_says_what_it_would_bring(here: Path) -> None:
    bundle = perwatt.optimize(here / "net.onnx", target="null", out=here / "blind")
    report = assert_complete(bundle)
    assert report["outcome"] == "optimized"
    assert report["accuracy"] is None and report["original"]["accuracy"] is None
    assert report["data"]["synthetic"] is True
    assert row(report, "fold-batchnorm")["status"] == "applied"
    assert row(report, "quantize-int8")["status"] == "not-chosen"
    assert (
        "--data" in report["last_word"]
        and "quantize-int8" in report["last_word"]
        and "accuracy unknown" in report["last_word"]
    )
    assert [step["name"] for step in bundle.lock["decisions"]["passes"]][-1] == "fold-batchnorm"


DESTROY = '''
    """Drop everything between the picture and the last layer: fast, and worthless."""
    from dataclasses import dataclass
    from typing import ClassVar
    import numpy as np
    import onnx_ir as ir
    from perwatt.contract import Pass, Stage

    @dataclass(frozen=True)
    class Destroy(Pass):
        stage: ClassVar = Stage.PRECISION
        tolerance: ClassVar = None
        level: int = 1

        def run(self, artifact, context):
            model = artifact.edit()
            value = model.graph.initializers["fc.weight"]
            value.const_value = ir.tensor(np.zeros((4, 8), np.float32), name="fc.weight")
            relu = next(node for node in model.graph if node.op_type == "Relu")
            ir.convenience.replace_all_uses_with(relu.outputs[0], relu.inputs[0])
            model.graph.remove(relu, safe=True)
            return artifact.after(model, self.step(["zeros"])), ["zeros"]
'''

LIE = '''
    """Says that it keeps every number, and doubles the last layer."""
    from dataclasses import dataclass
    from typing import ClassVar
    import onnx_ir as ir
    from perwatt.contract import Pass, Stage

    @dataclass(frozen=True)
    class Lie(Pass):
        stage: ClassVar = Stage.CLEAN

        def run(self, artifact, context):
            model = artifact.edit()
            value = model.graph.initializers["fc.weight"]
            value.const_value = ir.tensor(value.const_value.numpy() * 2, name="fc.weight")
            return artifact.after(model, self.step(["nothing much"])), ["nothing much"]
'''


def test_third_party_passes_that_lie_or_destroy_accuracy_are_named_and_never_shipped(
    here: Path, tmp_path: Path
) -> None:
    package(tmp_path, "passes", "destroy", DESTROY)
    package(tmp_path, "passes", "lie", LIE)
    (here / "bad.yaml").write_text(
        "model: {path: net.onnx}\ndata: {all: samples.npz}\ntarget: {name: 'null'}\n"
        "passes: [lie, fold-batchnorm, destroy: {level: 2}]\n"
    )
    done = optimize("--config", "bad.yaml", "--out", "bad", "--json", cwd=here, path=tmp_path)
    assert done.returncode == 0, done.stderr
    report = assert_complete(Bundle(here / "bad"))
    assert row(report, "lie")["status"] == "rolled-back" and "output y moved by" in row(report, "lie")["reason"]
    assert row(report, "fold-batchnorm")["status"] == "applied"
    destroyed = row(report, "destroy")
    assert destroyed["status"] == "not-chosen" and destroyed["settings"] == {"level": 2}
    assert "points" in destroyed["reason"] and "of 1 allowed" in destroyed["reason"]
    assert destroyed["measured"]["accuracy_drop"] > 20
    assert report["outcome"] == "optimized" and report["accuracy"]["drop"] == 0
    assert "destroy would be" in report["last_word"] and "--max-drop" in report["last_word"]


def test_openvino_in_earnest(here: Path) -> None:
    """Real lowering, real time, whatever the verdict: figures are there, the bundle runs with and without perwatt."""
    bundle = perwatt.optimize(
        here / "net.onnx", target="openvino", data=here / "samples.npz", out=here / "real", passes="fold-batchnorm",
        time="8s", batch=4, threads=1,
    )  # fmt: skip
    report = assert_complete(bundle)
    assert report["outcome"] in ("optimized", "unchanged")
    assert report["target"]["backend"] == "openvino" and report["target"]["batch"] == 4
    assert report["original"]["execution_precision"] and report["original"]["operating_point"]["threads"] == 1
    assert report["original"]["throughput_per_s"] > 0 and report["original"]["size_bytes"] > 0
    assert files_in(bundle.path) == FILES | {"run.py", "openvino/model.xml", "openvino/model.bin"}
    x = images(11, seed=7)
    expected = outputs(here / "net.onnx", x)
    loaded = perwatt.load(bundle).run(x)["y"]
    np.testing.assert_allclose(loaded, expected, rtol=0.05, atol=0.05)
    np.savez(here / "x.npz", x=x)
    alone = subprocess.run(
        [sys.executable, "-I", "run.py", "../x.npz", "../y.npz"], cwd=bundle.path, capture_output=True, text=True
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    np.testing.assert_allclose(np.load(here / "y.npz")["y"], loaded, rtol=1e-5, atol=1e-6)


def test_backends_that_crash_hang_or_refuse_cost_themselves_and_not_the_run(tmp_path: Path) -> None:
    """The alias finds four of somebody else's beside ours; each ends in its own way, and a real one is the answer."""
    put_net(tmp_path)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    head = """
        import ctypes, time
        from perwatt.contract import Capabilities, Target
        from perwatt.errors import BackendError

        class {cls}(Target):
            serves = {{"cpu": ""}}
            preference = 9

            def missing(self):
                {missing}
                return []

            def capabilities(self):
                return Capabilities()

            def lower(self, artifact, point):
                {lower}

            def versions(self):
                return {{}}
        """
    package(theirs, "targets", "asked-dies", head.format(cls="AskedDies", missing="ctypes.string_at(0)", lower="pass"))
    package(theirs, "targets", "lower-dies", head.format(cls="LowerDies", missing="pass", lower="ctypes.string_at(0)"))
    refusal = 'raise BackendError("no kernel for your model")'
    package(theirs, "targets", "refuses", head.format(cls="Refuses", missing="pass", lower=refusal))
    eats = "print('allocating'); self.held = bytearray(10**15)"
    package(theirs, "targets", "eats-memory", head.format(cls="EatsMemory", missing="pass", lower=eats))
    done = optimize(
        "net.onnx", "--target", "cpu", "--data", "samples.npz", "--passes", "fold-batchnorm", "--no-tune", "--json",
        "--max-drop", "9", cwd=tmp_path, path=theirs,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["target"]["backend"] in ("openvino", "onnxruntime")
    notes = "\n".join(report["notes"])
    assert "asked-dies can't be used here: checks: the worker was ended by SIGSEGV" in notes
    assert "lower-dies does not take this model: original: the worker was ended by SIGSEGV" in notes
    assert "refuses does not take this model: no kernel for your model" in notes
    assert "eats-memory does not take this model: out of memory during open" in notes
