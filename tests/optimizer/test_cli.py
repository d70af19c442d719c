"""The command line: exit codes, what goes to which stream, suggestions, and one line for everything that is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from perwatt import cli, registry
from perwatt.bundle import Bundle

sys.path.insert(0, str(Path(__file__).parent))
from runs import assert_one_line_error, command, environment, gone, optimize, put_net, until, workers_of


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `net.onnx` and `samples.npz`, to work in."""
    monkeypatch.chdir(tmp_path)
    put_net(tmp_path)
    return tmp_path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the program in this process: (exit code, standard output, standard error)."""

    def made(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["optimize", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return made


def test_version_and_help_end_with_zero(call) -> None:
    from perwatt import __version__

    assert __version__ in call("--version").stdout
    for arguments in ((), ("--help",), ("-h",)):
        shown = call(*arguments)
        assert shown.returncode == 0
        for word in (
            "--target",
            "--max-drop",
            "Exit codes",
            "optimize model.onnx",
            "  3  budget not met",
            "passes",
            "show",
        ):
            assert word in shown.stdout, word


def test_help_lists_every_command_and_every_command_has_help(call) -> None:
    shown = call("--help").stdout
    for name, found in cli.cli.commands.items():
        if not found.hidden:
            assert re.search(rf"^  {name} +\S", shown, re.MULTILINE), name
            assert call(name, "--help").returncode == 0


def test_every_exit_code_in_the_help_is_one_that_errors_carry(call) -> None:
    from perwatt import errors

    codes = {int(code) for code in re.findall(r"^ +(\d)  ", call("--help").stdout, re.MULTILINE)}
    assert codes == {0, 1, 2, 3, 4, 5}
    assert {kind.exit_code for kind in (errors.InputError, errors.TargetError, errors.BackendError)} == {2, 4, 5}


def write_bad_inputs(here: Path) -> None:
    (here / "text.pt").write_text("import torch\n")
    (here / "cut.onnx").write_bytes((here / "net.onnx").read_bytes()[:300])
    (here / "cut.npz").write_bytes((here / "samples.npz").read_bytes()[:500])
    (here / "empty.onnx").write_bytes(b"")
    (here / "plain.pkl").write_bytes(pickle.dumps(print))
    (here / "foreign").mkdir()
    (here / "foreign" / "thesis.tex").write_text("years of work")
    x = np.zeros((10, 1, 8, 8), np.float32)
    np.savez(here / "shapes.npz", x=np.zeros((10, 1, 9, 9), np.float32))
    np.savez(here / "names.npz", a=x, b=x)
    np.savez(here / "short.npz", x=x, labels=np.zeros(7, int))
    np.savez(here / "chance.npz", x=np.load(here / "samples.npz")["x"], labels=np.arange(200) % 4)
    (here / "key.yaml").write_text("model: {path: net.onnx}\nbudget: {max_dorp: 1}\n")
    (here / "setting.yaml").write_text("model: {path: net.onnx}\npasses: [{quantize-int8: {activation: symmetric}}]\n")
    (here / "broken.yaml").write_text("model: [unclosed\n")
    (here / "list.yaml").write_text("- net.onnx\n")


BAD_INPUT = {
    "text named .pt": ("text.pt", ("text.pt is a text file",)),
    "truncated model": ("cut.onnx", ("cut.onnx",)),
    "empty model": ("empty.onnx", ("empty.onnx is empty",)),
    "pickle": ("plain.pkl", ("pickle",)),
    "missing model": ("nett.onnx", ("no file or folder nett.onnx", "net.onnx?")),
    "no model": ("--target null", ("no model was given",)),
    "truncated data": ("net.onnx --data cut.npz", ("cut.npz is damaged",)),
    "missing data": ("net.onnx --data sample.npz", ("sample.npz",)),
    "wrong shapes": ("net.onnx --data shapes.npz", ("x:float32[n,1,8,8]", "1, 9, 9")),
    "wrong names": ("net.onnx --data names.npz", ("names.npz", "x")),
    "wrong length of labels": ("net.onnx --data short.npz", ("7", "10 samples")),
    "labels that fit nothing": ("net.onnx --data chance.npz", ("on your labels", "check normalisation or class order")),
    "expectation missed": ("net.onnx --data samples.npz --expect 99", ("99 % was expected",)),
    "unknown pass": ("net.onnx --passes fold-batchnrm", ("unknown pass 'fold-batchnrm'", "fold-batchnorm")),
    "unknown added pass": ("net.onnx --passes +quantize", ("unknown pass 'quantize'", "quantize-int8")),
    "unknown target": ("net.onnx --target nul", ("unknown target 'nul'", "null")),
    "unknown option": ("net.onnx --max-dro 1", ("--max-dro", "--max-drop")),
    "unknown recipe key": ("--config key.yaml", ("max_dorp", "max_drop")),
    "unknown setting": ("--config setting.yaml", ("activation", "activations")),
    "bad YAML": ("--config broken.yaml", ("broken.yaml is not YAML",)),
    "no recipe": ("--config list.yaml", ("list.yaml is no recipe", "optimize init")),
    "missing recipe": ("--config none.yaml", ("none.yaml",)),
    "unknown metric": ("net.onnx --data samples.npz --metric top3", ("top3", "top5")),
    "bad time": ("net.onnx --time soon", ("'soon' is no time",)),
    "bad size": ("net.onnx --image 3y", ("--image 3y",)),
    "negative drop": ("net.onnx --max-drop -1", ("max_drop",)),
    "no number": ("net.onnx --batch many", ("many",)),
    "foreign folder": ("net.onnx --out foreign", ("foreign", "--force")),
    "folder with the model": ("net.onnx --out . --force", ("net.onnx", "would be replaced")),
    "file for a folder": ("net.onnx --out samples.npz", ("samples.npz is a file",)),
    "missing parent": ("net.onnx --out no/where", ("does not exist",)),
}


@pytest.mark.parametrize(("line", "words"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(
    here: Path, call, line: str, words: tuple[str, ...]
) -> None:
    write_bad_inputs(here)
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    target = () if "--target" in line else ("--target", "null")
    assert_one_line_error(call(*line.split(), *target), 2, *words)
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.name != "__pycache__"} == before


def test_json_keeps_standard_output_for_json_even_when_it_fails(here: Path) -> None:
    done = optimize("net.onnx", "--target", "nul", "--json", cwd=here)
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == done.returncode == 2
    assert "unknown target 'nul'" in answer["error"]
    assert_one_line_error(done, 2, answer["error"])


def test_a_target_that_cannot_be_used_here_is_exit_code_4_with_what_to_do(here: Path, call, monkeypatch) -> None:
    from perwatt.isolation import Worker

    real = Worker.call

    def ask(self, operation, **rest):
        missing = ["no such board here: plug it in"]
        return {"missing": missing} if operation == "target" else real(self, operation, **rest)

    monkeypatch.setattr(Worker, "call", ask)
    assert_one_line_error(call("net.onnx", "--target", "null"), 4, "null can't be used here", "plug it in")


def test_an_internal_error_is_one_line_and_exit_code_5_and_verbose_shows_the_trace(
    here: Path, call, monkeypatch
) -> None:
    from perwatt import compilation

    def broken(*anything, **more):
        raise ZeroDivisionError("several\nlines")

    monkeypatch.setattr(compilation, "compile_model", broken)
    assert_one_line_error(call("net.onnx"), 5, "internal error: ZeroDivisionError: several lines", "--verbose")
    done = call("net.onnx", "--verbose")
    assert done.returncode == 5, "1 is a failed gate's"
    assert "Traceback" in done.stderr and "in broken" in done.stderr


def test_a_backend_that_fails_on_the_model_is_exit_code_5_in_the_backends_words(here: Path, call, monkeypatch) -> None:
    from perwatt import compilation
    from perwatt.errors import BackendError

    def refuse(*anything, **more):
        raise BackendError("OpenVINO refused the model: no kernel for Mine")

    monkeypatch.setattr(compilation, "compile_model", refuse)
    done = call("net.onnx", "--json")
    assert_one_line_error(done, 5, "no kernel for Mine")
    assert json.loads(done.stdout)["exit_code"] == 5


def test_dry_run_prints_the_resolved_recipe_and_writes_nothing(here: Path, call) -> None:
    before = sorted(os.listdir(here))
    shown = call(
        "net.onnx", "--target", "null", "--data", "samples.npz", "--p99", "20ms", "--min-gain", "5%", "--dry-run"
    )
    recipe = yaml.safe_load(shown.stdout)
    assert recipe["model"]["path"] == "net.onnx" and recipe["data"]["all"] == "samples.npz"
    assert recipe["budget"]["p99_ms"] == 20 and recipe["budget"]["min_gain"] == 0.05
    assert "fold-batchnorm" in recipe["passes"] and recipe["target"]["name"] == "null"
    assert "net-null" in shown.stdout.split("\n")[0]
    plain = json.loads(call("net.onnx", "--target", "null", "--dry-run", "--json").stdout)
    assert (plain["model_format"], plain["out"]) == ("onnx", "net-null")
    assert call("net.onnx", "--dry-run", "--quiet").stdout == ""
    assert sorted(os.listdir(here)) == before


def test_options_override_the_recipe(here: Path, call) -> None:
    (here / "r.yaml").write_text(
        "model: {path: net.onnx}\ntarget: {name: cpu, threads: 2}\ndata: {all: a.npz}\nseed: 3\n"
    )
    line = "--config r.yaml --target null --data samples.npz --passes -quantize-int8,+cast-half --dry-run --json"
    recipe = json.loads(call(*line.split()).stdout)["recipe"]
    given = {name: recipe["target"][name] for name in ("name", "threads", "scenario", "batch", "tune", "on")}
    assert given == {
        "name": "null", "threads": 2, "scenario": "single-stream", "batch": None, "tune": True, "on": None
    }  # fmt: skip
    assert recipe["data"]["all"] == "samples.npz" and recipe["seed"] == 3
    assert "quantize-int8" not in json.dumps(recipe["passes"])


def test_a_section_whose_keys_are_all_commented_out_counts_as_not_given(here: Path, call) -> None:
    (here / "r.yaml").write_text("model: {path: net.onnx}\ndata:\n  # all: a.npz\nbudget:\ntarget:\n")
    recipe = json.loads(call("--config", "r.yaml", "--dry-run", "--json").stdout)["recipe"]
    assert recipe["data"]["all"] is None and recipe["target"]["name"] == "cpu"


def test_data_beside_eval_calibrates_and_eval_judges(here: Path, call) -> None:
    (here / "r.yaml").write_text("model: {path: net.onnx}\ndata: {all: all.npz}\n")
    for name in ("all", "c", "e"):
        shutil.copy(here / "samples.npz", here / f"{name}.npz")
    for line in ("net.onnx --data c.npz --eval e.npz", "--config r.yaml --data c.npz --eval e.npz"):
        data = json.loads(call(*line.split(), "--dry-run", "--json").stdout)["recipe"]["data"]
        assert (data["all"], data["calibrate"], data["eval"]) == (None, "c.npz", "e.npz")
    data = json.loads(call("--config", "r.yaml", "--eval", "e.npz", "--dry-run", "--json").stdout)["recipe"]["data"]
    assert (data["all"], data["calibrate"], data["eval"]) == (None, "all.npz", "e.npz")


def test_the_starter_recipe_of_a_model_is_a_recipe(here: Path, call) -> None:
    starter = call("init", "net.onnx")
    assert starter.returncode == 0 and starter.stderr == ""
    assert "x:float32[n,1,8,8]" in starter.stdout and "quantize-int8" in starter.stdout
    assert "#   - quantize-int8: {operators: all}\n" in starter.stdout
    (here / "recipe.yaml").write_text(starter.stdout)
    assert call("--config", "recipe.yaml", "--dry-run").returncode == 0
    # What stands there as a comment works when it is taken out of it.
    lines = [line.removeprefix("  # ").removeprefix("# ") for line in starter.stdout.split("\n")]
    commented = yaml.safe_load("\n".join(f"  {line}" if re.match(r"(p99_ms|time):", line) else "" for line in lines))
    assert set(commented) == {"p99_ms", "time"}
    assert_one_line_error(call("init", "missing.onnx"), 2, "missing.onnx")


def test_passes_and_targets_are_listed_with_their_pages(call) -> None:
    listed = call("passes")
    for name in registry.names("passes"):
        assert re.search(rf"^{name} +\w+", listed.stdout, re.MULTILINE)
        page = call("passes", name)
        assert page.returncode == 0 and "Tolerance, for each output" in page.stdout
        cls = registry.pass_class(name)
        assert ("Runs by default: " in page.stdout) is cls.in_default
        assert ("Settings and defaults:" in page.stdout) is bool(dataclasses.fields(cls))
        assert json.loads(call("passes", name, "--json").stdout)["name"] == name
    assert {entry["name"] for entry in json.loads(call("passes", "--json").stdout)} == set(registry.names("passes"))
    assert_one_line_error(call("passes", "fold-batchnrm"), 2, "fold-batchnorm")
    entries = {entry["name"]: entry for entry in json.loads(call("targets", "--json").stdout)["targets"]}
    assert entries["null"]["variants"][0]["missing"] == [] and entries["openvino"]["serves"]["cpu"] == "openvino"
    assert call("targets", "null").stdout.startswith("✓ null")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_serve_both_names(call, shell: str) -> None:
    script = call("completion", shell).stdout
    for name in ("optimize", "perwatt"):
        assert f"_{name.upper()}_COMPLETE" in script


def test_completion_knows_options_passes_and_targets() -> None:
    def complete(line: str) -> str:
        words = {
            **environment(),
            "_OPTIMIZE_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split())),
        }
        main = "from perwatt.cli import cli; cli(prog_name='optimize')"
        return subprocess.run([sys.executable, "-c", main], env=words, capture_output=True, text=True).stdout

    assert "fold-batchnorm" in complete("optimize passes ")
    assert "schema" in complete("optimize ")


def test_schemas_are_printed_as_json_schema(call) -> None:
    for kind in ("recipe", "report"):
        assert json.loads(call("schema", kind).stdout)["$schema"].startswith("https://json-schema.org/")
    assert_one_line_error(call("schema", "repot"), 2, "repot")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished bundle."""
    folder = tmp_path_factory.mktemp("finished")
    put_net(folder)
    line = "net.onnx --target null --data samples.npz --passes fold-batchnorm --quiet"
    done = optimize(*line.split(), cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder / "net-null"


def test_quiet_prints_nothing_and_the_default_folder_is_model_and_target(bundle: Path) -> None:
    assert Bundle(bundle).outcome == "optimized"
    assert sorted(os.listdir(bundle.parent)) == ["net-null", "net.onnx", "samples.npz"]


def test_show_prints_a_bundle_two_and_json(bundle: Path, call, here: Path) -> None:
    assert "inferences per joule" in call("show", bundle).stdout
    assert call("show", bundle, bundle).returncode == 0
    assert json.loads(call("show", bundle, "--json").stdout) == Bundle(bundle).report
    assert len(json.loads(call("show", bundle, bundle, "--json").stdout)) == 2
    assert_one_line_error(call("show", "nothing"), 2, "nothing is no perwatt bundle")
    (here / "damaged").mkdir()
    for name in ("perwatt.lock.json", "program.json"):
        (here / "damaged" / name).write_text("{}")
    assert_one_line_error(call("show", "damaged"), 2, "damaged", "report.json")


def test_output_that_nobody_reads_is_no_error(bundle: Path) -> None:
    shell = subprocess.run(
        ["bash", "-o", "pipefail", "-c", '"$@" | true', "-", *command("passes")],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (shell.returncode, shell.stderr) == (0, "")


@pytest.mark.parametrize("stage", ["looking at", "running the passes", "measuring"])
def test_ctrl_c_ends_with_130_writes_nothing_and_leaves_no_worker(here: Path, stage: str) -> None:
    mark = f"interrupted-{os.getpid()}-{stage}"
    line = ["net.onnx", "--target", "null", "--data", "samples.npz", "--passes", "fold-batchnorm", "--verbose"]
    settings = {**environment(), "PERWATT_TEST_MARK": mark}
    run = subprocess.Popen(
        command(*line),
        cwd=here,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with run:
        assert run.stderr is not None
        told = ""
        while stage not in told:
            told = run.stderr.readline()
            assert told, "it ended before"
        running = until(lambda: workers_of(mark))
        os.killpg(run.pid, signal.SIGINT)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert err.strip().split("\n")[-1].startswith("optimize: stopped")
    assert gone(running) and gone(workers_of(mark))
    assert sorted(os.listdir(here)) == ["net.onnx", "samples.npz"]


def test_killed_while_it_runs_it_leaves_no_worker_and_no_half_bundle(here: Path) -> None:
    mark = f"killed-{os.getpid()}"
    line = ["net.onnx", "--target", "null", "--data", "samples.npz", "--passes", "fold-batchnorm", "--verbose"]
    with subprocess.Popen(
        command(*line),
        cwd=here,
        env={**environment(), "PERWATT_TEST_MARK": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if b"writing the bundle" in line:
                break
        else:
            pytest.fail("the run ended before it wrote its bundle")
        running = workers_of(mark)
        run.kill()
        run.wait()
    assert gone(running)
    assert gone(workers_of(mark))
    bundle = here / "net-null"
    assert not bundle.exists() or set(Bundle(bundle).lock["outputs"]) <= {
        p.relative_to(bundle).as_posix() for p in bundle.rglob("*")
    }
