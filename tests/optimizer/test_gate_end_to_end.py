"""`optimize bench`, `gate` and `history` whole: real workers and real outputs, costs scripted by the null target."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import perwatt
from perwatt import bench_report, gate_junit, gate_markdown, gate_report, gate_words
from perwatt.errors import InputError, TargetError
from perwatt.limits import GateFile

sys.path.insert(0, str(Path(__file__).parent))
from queues import highest_load
from runs import (
    assert_one_line_error,
    command,
    conv_net,
    environment,
    files_in,
    gone,
    optimize,
    put_net,
    until,
    workers_of,
)

pytestmark = pytest.mark.slow

COST_MS = 1.9
"""Of the tiny network, by the null target's script; another convolution costs 1 ms more."""
BY_CPU = {"limits": {"cpu_s_per_inference": {"max_increase": 0.05}}}
NULL = {"target": "null", "time_s": 0.3}


def with_one_more_convolution(folder: Path) -> Path:
    """The network with a second convolution: slower, by the script."""
    model = onnx.load(str(folder / "net.onnx"))
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1), "more.weight")
    more = helper.make_node("Conv", ["relu", "more.weight"], ["more"], name="/more")
    model.graph.initializer.append(weight)
    model.graph.node[3].input[0] = "more"
    model.graph.node.insert(3, more)
    path = folder / "slower.onnx"
    onnx.save(model, str(path))
    return path


def with_noise(folder: Path, scale: float, name: str) -> Path:
    """The network with its last layer disturbed: as fast, but less accurate."""
    model = onnx.load(str(folder / "net.onnx"))
    weight = next(w for w in model.graph.initializer if w.name == "fc.weight")
    values = numpy_helper.to_array(weight)
    noise = np.random.default_rng(5).standard_normal(values.shape).astype(np.float32)
    weight.CopyFrom(numpy_helper.from_array(values + scale * noise, "fc.weight"))
    onnx.save(model, str(folder / name))
    return folder / name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `net.onnx`, `slower.onnx` and `samples.npz`, to work in; history stays in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERWATT_HISTORY", str(tmp_path / "history.sqlite"))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    put_net(tmp_path)
    with_one_more_convolution(tmp_path)
    return tmp_path


def gated(base: str, head: str, limits=BY_CPU, **options) -> gate_report.GateReport:
    return perwatt.gate(base, head, limits=GateFile.model_validate(limits), **{**NULL, **options})


def test_a_slower_head_fails_with_everything_written_scripted_costs(here: Path, monkeypatch) -> None:
    (here / "gate.yaml").write_text(json.dumps(BY_CPU))
    (here / "summary.md").write_text("another step's\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(here / "summary.md"))
    done = optimize(
        "gate", "--base", "net.onnx", "--head", "slower.onnx", "--target", "null", "--limits", "gate.yaml", "--time", "0.3s",
        "--json", "--markdown", "gate.md", "--junit", "gate.xml", "--out", "gate.json", cwd=here,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    jsonschema.validate(report, gate_report.schema())
    assert report == json.loads((here / "gate.json").read_text())
    assert (report["verdict"], report["exit_code"], report["name"]) == ("fail", 1, "slower")
    figure = report["figures"]["cpu_s_per_inference"]
    assert figure["base"] == pytest.approx(COST_MS / 1e3)
    assert figure["ratio"]["value"] == pytest.approx((COST_MS + 1) / COST_MS)
    assert figure["floor"] == pytest.approx(0, abs=1e-9)
    assert len(report["samples"]["base"]["cpu_s_per_inference"]) == 2 * report["measuring"]["blocks"]
    assert "FAIL" in (here / "gate.md").read_text()
    assert (here / "summary.md").read_text().startswith("another step's\n")
    assert (here / "gate.md").read_text() in (here / "summary.md").read_text()
    suite = ET.parse(here / "gate.xml").getroot()[0]
    assert (suite.get("failures"), suite.get("tests")) == ("1", "1")
    assert not [name for name in files_in(here) if "partial" in name]
    shown = optimize("history", "--json", cwd=here)
    assert shown.returncode == 0 and "slower" in shown.stdout


def test_the_same_model_passes_and_tells_how_it_was_measured_scripted_costs(here: Path) -> None:
    report = gated("net.onnx", "net.onnx")
    assert (report.verdict, report.exit_code, report.reason) == ("pass", 0, "every limit holds")
    assert report.measuring["processes_per_side"] == 2
    assert report.measuring["inputs"] == "made-up inputs"
    assert report.base.digest == report.head.digest is not None
    assert report.identical and gate_words.headline(report) == "both sides are the same files, run in the same way"
    assert report.machine["digest"] and report.machine["fingerprint"]
    assert report.figures["size_bytes"].ratio.value == 1.0
    assert not (here / "history.sqlite").exists(), "a library call records nothing by itself"


def test_accuracy_is_judged_on_the_flips_scripted_costs(here: Path) -> None:
    with_noise(here, 3.0, "worse.onnx")
    asked = {"limits": {"accuracy": {"max_drop": 0.5}}}
    worse = gated("net.onnx", "worse.onnx", asked, eval="samples.npz")
    assert worse.verdict == "fail"
    assert worse.accuracy is not None and worse.accuracy.p_value < 0.001
    assert worse.accuracy.flips_lost - worse.accuracy.flips_gained == round(
        worse.accuracy.drop * worse.accuracy.n / 100
    )
    same = gated("net.onnx", "net.onnx", asked, eval="samples.npz")
    assert (same.verdict, same.accuracy.drop, same.accuracy.p_value) == ("pass", 0.0, 1.0)
    blind = gated("net.onnx", "net.onnx", {**asked, "on_inconclusive": "pass"})
    assert (blind.verdict, blind.exit_code, blind.accuracy) == ("inconclusive", 0, None)
    assert "--eval" in blind.reason
    assert gated("net.onnx", "net.onnx", asked).exit_code == 3


def test_two_models_that_guess_are_no_pass_scripted_costs(here: Path) -> None:
    """Pictures that were not normalised as in training make guessers of both sides, which then lose nothing."""
    with np.load("samples.npz") as archive:
        labels = np.random.default_rng(1).permutation(archive["labels"])
        np.savez("shuffled.npz", x=archive["x"], labels=labels)
    asked = {"limits": {"accuracy": {"max_drop": 0.5}}}
    report = gated("net.onnx", "net.onnx", asked, eval="shuffled.npz")
    assert (report.verdict, report.accuracy.drop) == ("inconclusive", 0.0)
    assert "normalisation" in report.reason and report.accuracy.chance in report.reason


def pictures(folder: Path, count: int = 24) -> Path:
    """Bytes, and fewer of them than anything is said about chance."""
    x = np.random.default_rng(3).integers(0, 256, (count, 1, 8, 8), np.uint8)
    np.savez(folder / "pictures.npz", x=x, labels=np.arange(count) % 4)
    return folder / "pictures.npz"


@pytest.mark.parametrize("sides", [("bundle", "net.onnx"), ("net.onnx", "bundle")])
def test_a_model_file_is_fed_as_the_bundle_beside_it_scripted_costs(here: Path, sides) -> None:
    pictures(here)
    perwatt.optimize(
        "net.onnx", target="null", eval="pictures.npz", normalize="0.5/0.5", out="bundle", passes="fold-batchnorm"
    )
    report = gated(*sides, {"limits": {"accuracy": {"max_drop": 0.5}}}, eval="pictures.npz")
    assert report.accuracy is not None and report.accuracy.base == report.accuracy.head
    file = report.base if sides[0] == "net.onnx" else report.head
    assert any("read as for" in note and "normalize 0.5/0.5" in note for note in file.notes)
    assert "normalize 0.5/0.5" in report.measuring["inputs"]
    assert not report.identical


def test_a_reading_that_contradicts_the_bundle_is_a_warning_scripted_costs(here: Path) -> None:
    pictures(here)
    perwatt.optimize(
        "net.onnx", target="null", eval="pictures.npz", normalize="0.5/0.5", out="bundle", passes="fold-batchnorm"
    )
    report = gated("bundle", "bundle", target=None, normalize="unit")
    assert report.identical
    [said] = gate_words.warnings(report)
    assert said.startswith("base and head: the bundle's own recipe says normalize 0.5/0.5")
    assert said in gate_markdown.render(report).replace("\\", "") and said in gate_junit.render(report)
    assert not gate_words.warnings(gated("bundle", "bundle", target=None))


def test_data_that_would_calibrate_is_said_to_be_unused_scripted_costs(here: Path) -> None:
    (here / "other.npz").write_bytes((here / "samples.npz").read_bytes())
    report = gated("net.onnx", "net.onnx", eval="samples.npz", data="other.npz")
    assert any("other.npz is not used" in note for note in report.head.notes)
    assert not any("not used" in note for note in gated("net.onnx", "net.onnx", data="samples.npz").head.notes)


@pytest.mark.parametrize("named", ["nothing.npz", "nothing.py:given"])
def test_samples_that_the_command_names_must_be_there(here: Path, named: str) -> None:
    for call in (lambda: gated("net.onnx", "net.onnx", eval=named), lambda: perwatt.benchmark("net.onnx", data=named)):
        with pytest.raises(InputError, match="no such data set"):
            call()


def test_memory_is_that_of_the_model_and_not_of_its_samples_scripted_costs(here: Path) -> None:
    """One side has thousands of samples, the other made-up ones."""
    perwatt.optimize("net.onnx", target="null", data="samples.npz", out="few", passes="fold-batchnorm")
    np.savez("many.npz", x=np.zeros((60_000, 1, 8, 8), np.float32), labels=np.arange(60_000) % 4)
    recipe = here / "few" / "recipe.yaml"
    (here / "many").mkdir()
    for path in sorted((here / "few").rglob("*")):
        there = here / "many" / path.relative_to(here / "few")
        there.mkdir(exist_ok=True) if path.is_dir() else there.write_bytes(path.read_bytes())
    (here / "many" / "recipe.yaml").write_text(recipe.read_text().replace("samples.npz", "many.npz"))
    report = gated("few", "many", {"limits": {"peak_memory_bytes": {"max_increase": 0.02}}}, target=None)
    assert report.verdict == "pass", report.reason


def test_default_limits_leave_accuracy_out_where_there_are_no_samples_scripted_costs(here: Path) -> None:
    report = perwatt.gate("net.onnx", "net.onnx", **NULL)
    assert report.verdict == "pass"
    assert {check.figure for check in report.checks} == {"cpu_s_per_inference", "throughput_per_watt"}
    assert any("accuracy is not judged" in note for note in report.notes)


def test_agreement_with_the_base_is_no_accuracy_scripted_costs(here: Path) -> None:
    """A head that answers otherwise may answer better: without labels that is nobody's fault."""
    with_noise(here, 3.0, "other.onnx")
    with np.load("samples.npz") as archive:
        np.savez("unlabelled.npz", x=archive["x"])
    report = perwatt.gate("net.onnx", "other.onnx", data="unlabelled.npz", **NULL)
    assert (report.verdict, report.accuracy) == ("pass", None)
    asked = perwatt.gate("net.onnx", "other.onnx", data="unlabelled.npz", metric="agreement", **NULL)
    assert asked.accuracy is not None and asked.accuracy.drop > 0


def test_outputs_that_are_no_numbers_fail_scripted_costs(here: Path) -> None:
    with_noise(here, float("nan"), "broken.onnx")
    with np.load("samples.npz") as archive:
        np.savez(
            "targets.npz", x=archive["x"], labels=np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
        )
    asked = {"limits": {"accuracy": {"max_drop": 0.5}}}
    report = gated("net.onnx", "broken.onnx", asked, eval="targets.npz", metric="mse")
    assert report.verdict == "fail" and "not finite" in report.reason
    json.loads(report.model_dump_json())


def test_data_that_a_bundle_names_and_that_is_gone_is_no_pass_scripted_costs(here: Path) -> None:
    perwatt.optimize("net.onnx", target="null", data="samples.npz", out="bundle", passes="fold-batchnorm")
    (here / "samples.npz").rename(here / "elsewhere.npz")
    report = perwatt.gate("bundle", "bundle", time_s=0.3)
    assert report.verdict == "inconclusive"
    assert any("samples.npz" in note for note in report.base.notes)
    found = perwatt.gate("bundle", "bundle", time_s=0.3, eval="elsewhere.npz", seed=4)
    assert found.verdict == "pass"
    assert found.accuracy is not None and found.accuracy.n == 200, "all of --eval judges: nothing is calibrated here"


def test_python_that_a_bundle_names_is_not_run_unasked(here: Path) -> None:
    (here / "samples.py").write_text(
        "from pathlib import Path\nimport numpy as np\n"
        "def given():\n    Path('ran').touch()\n    yield np.zeros((8, 1, 8, 8), np.float32), np.zeros(8, np.int64)\n"
    )
    perwatt.optimize("net.onnx", target="null", out="bundle", passes="fold-batchnorm")
    recipe = here / "bundle" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("eval: null", "eval: samples.py:given"))
    report = gated("bundle", "bundle", target=None)
    assert not (here / "ran").exists()
    assert any("samples.py" in note for note in report.head.notes)
    gated("bundle", "bundle", target=None, trust=True)
    assert (here / "ran").exists()


@pytest.mark.parametrize("flags", [(), ("--json",), ("--verbose",)])
def test_a_reader_that_leaves_changes_no_verdict_scripted_costs(here: Path, flags) -> None:
    """`optimize gate … | true`, with the exit code of the gate."""
    line = ["gate", "--base", "net.onnx", "--target", "null", "--time", "0.2s", "--no-history", *flags]
    (here / "gate.yaml").write_text(json.dumps(BY_CPU))
    for head, code in (("slower.onnx", 1), ("net.onnx", 0)):
        process = subprocess.Popen(
            command(*line, "--head", head, "--limits", "gate.yaml"), cwd=here, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=environment(),
        )  # fmt: skip
        process.stdout.close()
        assert process.wait(timeout=120) == code


def test_a_gate_that_is_cancelled_leaves_no_worker(here: Path) -> None:
    line = command("gate", "--base", "net.onnx", "--head", "net.onnx", "--target", "null", "--time", "60s")
    process = subprocess.Popen(line, cwd=here, stderr=subprocess.PIPE, env={**environment(), "MARK": str(here)})
    workers = until(lambda: len(found := workers_of(str(here))) >= 5 and found)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert gone(workers)


def test_bundles_are_measured_on_the_data_that_their_recipes_name_scripted_costs(here: Path) -> None:
    perwatt.optimize("net.onnx", target="null", data="samples.npz", out="bundle", passes="fold-batchnorm")
    report = gated("bundle", "bundle", {"limits": {"accuracy": {"max_drop": 1}, **BY_CPU["limits"]}}, target=None)
    assert report.verdict == "pass"
    assert report.accuracy is not None and report.accuracy.n > 100
    assert "samples.npz" in report.measuring["inputs"]
    assert (report.name, report.head.kind) == ("net", "bundle")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--base", "nowhere", "--head", "net.onnx"), 2, "nowhere"),
        (("--base", "net.onnx"), 2, "--config"),
        (("--base", "git:main", "--head", "net.onnx"), 2, "--config"),
        (("--base", "net.onnx", "--head", "net.onnx", "--limits", "missing.yaml"), 2, "missing.yaml"),
        (("--base", "net.onnx", "--head", "net.onnx", "--markdown", "no/such/folder/x.md"), 2, "can't write"),
        (("--base", "net.onnx", "--head", "net.onnx", "--time", "soon"), 2, "--time"),
        (("--base", "net.onnx", "--head", "net.onnx", "--meter", "rapple"), 2, "did you mean"),
        (("--base", "net.onnx", "--head", "samples.npz"), 2, "samples.npz"),
    ],
)
def test_bad_input_is_one_line_and_never_exit_code_1(here: Path, arguments, code, said) -> None:
    before = files_in(here)
    done = optimize("gate", "--target", "null", *arguments, cwd=here)
    assert_one_line_error(done, code, said)
    assert files_in(here) == before


def test_a_meter_that_is_not_here_is_exit_code_4(here: Path) -> None:
    with pytest.raises(TargetError, match="nvml"):
        gated("net.onnx", "net.onnx", meter="nvml:63")


def test_sides_that_run_differently_are_refused(here: Path) -> None:
    perwatt.optimize("net.onnx", target="null", out="offline", scenario="offline", passes="fold-batchnorm")
    with pytest.raises(InputError, match="base runs offline"):
        gated("offline", "net.onnx", target=None)
    assert (
        gated("offline", "net.onnx", scenario="single-stream", batch=1, target=None).base.operating_point["batch"] == 1
    )


# bench ----------------------------------------------------------------------------------------------------------


def test_several_are_compared_with_the_first_scripted_costs(here: Path) -> None:
    done = optimize("bench", "net.onnx", "slower.onnx", "--target", "null", "--time", "0.3s", "--json", cwd=here)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    jsonschema.validate(report, bench_report.schema())
    first, second = report["subjects"]
    assert (first["label"], second["label"]) == ("net.onnx", "slower.onnx")
    assert first["figures"]["throughput_per_s"]["value"] == pytest.approx(1e3 / COST_MS)
    assert first["figures"]["latency_p99_ms"]["value"] == pytest.approx(COST_MS)
    assert first["ratio_to_first"] == {}
    assert second["ratio_to_first"]["throughput_per_s"]["value"] == pytest.approx(COST_MS / (COST_MS + 1))
    assert report["noise_floor"]["cpu_s_per_inference"] == pytest.approx(0, abs=1e-9)
    assert report["energy"]["idle_state"]
    assert (here / "history.sqlite").exists()


def test_at_my_traffic_idle_time_counts_scripted_costs(here: Path) -> None:
    done = optimize("bench", "net.onnx", "--target", "null", "--time", "0.2s", "--rate", "40/s", "--price", "0.20EUR/kWh",
                    "--meter", "modelled", "--json", cwd=here)  # fmt: skip
    if done.returncode == 4:
        pytest.skip("the power table does not know this processor")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    traffic, figures = report["subjects"][0]["traffic"], report["subjects"][0]["figures"]
    assert traffic["requests"] == pytest.approx(traffic["seconds"] * 40, rel=0.02)
    joules = traffic["energy_j_per_request"]["value"]
    # Idle power over the rate, and what a request takes itself.
    wanted = traffic["idle_power_w"]["value"] / 40 + figures["energy_above_idle_j_per_inference"]["value"]
    assert joules == pytest.approx(wanted, rel=0.02)
    assert traffic["kwh_per_million"] == pytest.approx(joules * 1e6 / 3.6e6)
    assert (traffic["cost_per_million"], traffic["currency"]) == (
        pytest.approx(0.2 * traffic["kwh_per_million"]),
        "EUR",
    )
    assert traffic["sustained"] is True


def test_rare_requests_bear_their_idle_time_scripted_costs(here: Path, monkeypatch) -> None:
    monkeypatch.setattr("perwatt.benching.TRAFFIC_MOST_S", 1.0)
    report = perwatt.benchmark("net.onnx", rate_per_s=1 / 3600, meter="modelled", **NULL)
    traffic = report.subjects[0].traffic
    if traffic.idle_power_w.value is None:
        pytest.skip("the power table does not know this processor")
    assert traffic.energy_j_per_request.value == pytest.approx(3600 * traffic.idle_power_w.value, rel=0.01)
    assert traffic.power_w.value == pytest.approx(traffic.idle_power_w.value, rel=0.01)


def test_a_request_is_a_call_scripted_costs(here: Path) -> None:
    """The null target takes any batch; a call of a fixed batch is one request all the same."""
    model = onnx.load("net.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, "four.onnx")
    report = perwatt.benchmark("four.onnx", rate_per_s=40.0, **NULL).subjects[0]
    assert report.figures["throughput_per_s"].value == pytest.approx(4 * 1e3 / COST_MS)
    assert report.traffic.requests == pytest.approx(40 * report.traffic.seconds, rel=0.02)


def test_traffic_that_would_drown_it_is_not_tried_scripted_costs(here: Path) -> None:
    report = perwatt.benchmark("net.onnx", rate_per_s=1e6, **NULL).subjects[0]
    assert report.traffic is None
    assert any("was not tried" in note for note in report.notes)


def test_more_traffic_than_it_can_serve_is_not_sustained_scripted_costs(here: Path) -> None:
    report = perwatt.benchmark("net.onnx", rate_per_s=2 * 1e3 / COST_MS, **NULL)
    assert report.subjects[0].traffic.sustained is False


def test_the_server_scenario_finds_the_highest_rate_scripted_costs(here: Path) -> None:
    report = perwatt.benchmark("net.onnx", scenario="server", latency_bound_ms=10.0, **NULL)
    capacity = report.subjects[0].capacity
    assert capacity.rate_per_s == pytest.approx(highest_load(10.0 / COST_MS, 0.99) * 1e3 / COST_MS, rel=0.12)
    assert capacity.tries and capacity.percentile == 99
    none = perwatt.benchmark("net.onnx", scenario="server", latency_bound_ms=1.0, **NULL).subjects[0].capacity
    assert none.rate_per_s is None and "1.9 ms" in none.ended


def test_openvinos_own_files_are_measured_as_they_are(here: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model("net.onnx"), "net.xml")
    report = perwatt.benchmark("net.xml", "net.onnx", time_s=0.5, threads=1)
    ir, model = report.subjects
    assert (ir.kind, ir.target, model.kind) == ("openvino-file", "openvino", "onnx")
    assert ir.operating_point["threads"] == 1
    assert ir.figures["throughput_per_s"].value > 0 and ir.ratio_to_first == {}
    assert model.ratio_to_first["cpu_s_per_inference"].low <= model.ratio_to_first["cpu_s_per_inference"].value


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere.onnx",), "nowhere.onnx"),
        (("net.onnx", "--rate", "often"), "no rate"),
        (("net.onnx", "--rate", "40/s", "--price", "cheap"), "no price"),
        (("net.onnx", "--price", "0.2EUR/kWh"), "--rate"),
        (("net.onnx", "--scenario", "server"), "--latency-bound"),
        (("net.onnx", "--scenario", "server", "--latency-bound", "0ms"), "above 0"),
        (("net.onnx", "--latency-bound", "20ms"), "--scenario server"),
        (("net.onnx", "--profile", "long", "--time", "5s"), "--profile long"),
        (("samples.npz",), "samples.npz"),
        ((), "MODELS"),
    ],
)
def test_bad_input_of_bench_is_one_line(here: Path, arguments, said) -> None:
    assert_one_line_error(optimize("bench", *arguments, cwd=here), 2, said)


def test_a_model_that_is_conv_net() -> None:
    """The script's costs are of this graph."""
    assert [node.op_type for node in conv_net().graph.node] == [
        "Conv", "BatchNormalization", "Relu", "GlobalAveragePool", "Flatten", "Gemm",
    ]  # fmt: skip
