"""A bundle prepared where its hardware is not: what is in it, and how another machine goes on from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import perwatt
from perwatt import registry
from perwatt.bundle import Bundle
from perwatt.contract import Capabilities
from perwatt.portable import is_portable, recipe_for, words

sys.path.insert(0, str(Path(__file__).parent))
from runs import optimize, put_net

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not registry.target("tensorrt").missing(), reason="this machine has TensorRT"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("portable")
    put_net(made)
    return made


@pytest.fixture(scope="module")
def run(folder: Path) -> subprocess.CompletedProcess[str]:
    return optimize(
        "net.onnx", "--target", "tensorrt", "--data", "samples.npz", "--max-drop", "9", "--out", "bundle", cwd=folder
    )


@pytest.fixture(scope="module")
def bundle(folder: Path, run: subprocess.CompletedProcess[str]) -> Bundle:
    return Bundle(folder / "bundle")


def test_it_ends_with_the_code_of_a_target_that_is_not_here_and_says_what_to_do(run: Any) -> None:
    assert run.returncode == 4, run.stderr
    assert "pip install tensorrt" in run.stdout
    assert "Not measured: throughput, latency, CPU time, energy" in run.stdout
    assert "optimize bundle --target tensorrt" in run.stdout and "sh bundle/trtexec.sh" in run.stdout


def test_every_graph_in_it_is_a_valid_model_and_is_judged(bundle: Bundle) -> None:
    variants = {entry["file"]: entry for entry in bundle.program["variants"]}
    assert {"variants/cast-half.onnx", "variants/quantize-int8.onnx"} <= set(variants)
    assert len({entry["digest"] for entry in variants.values()}) == len(variants)
    for file, entry in variants.items():
        onnx.checker.check_model(onnx.load(bundle.path / file), full_check=True)
        assert entry["permitted"] and entry["reason"].startswith("loses ")
        assert (bundle.path / "check" / Path(file).stem).is_dir()
    onnx.checker.check_model(onnx.load(bundle.path / "model.onnx"), full_check=True)
    types = {i.data_type for i in onnx.load(bundle.path / "variants/quantize-int8.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in types


def test_nothing_in_it_passes_for_a_measurement(bundle: Bundle) -> None:
    report = bundle.report
    assert report["outcome"] == "portable" and bundle.outcome == "portable"
    assert not {"original", "optimized", "ratio", "energy"} & set(report)
    assert [row["name"] for row in report["passes"] if row["status"] == "applied"]


def test_its_script_is_plain_shell_and_says_what_is_missing(bundle: Bundle) -> None:
    done = subprocess.run(["sh", bundle.path / "trtexec.sh"], capture_output=True, text=True)
    assert done.returncode == 4 and "trtexec is not here" in done.stderr
    checker = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    checked = subprocess.run([checker, bundle.path / "trtexec.sh"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_it_is_shown_and_refuses_to_be_loaded(folder: Path, bundle: Bundle) -> None:
    shown = optimize("show", str(bundle.path), cwd=folder)
    assert shown.returncode == 0 and shown.stdout.strip() == "\n".join(words(bundle)).strip()
    assert "variants/quantize-int8.onnx" in shown.stdout
    with pytest.raises(perwatt.InputError, match="is not finished: nothing was lowered — optimize"):
        perwatt.load(bundle.path)


def test_another_machine_goes_on_from_its_graphs_without_running_a_pass(
    bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    report = perwatt.optimize(bundle.path, target="null", out=tmp_path / "done").report
    assert report["outcome"] == "optimized"
    found = {row["status"] for row in report["passes"] if row["name"] == "quantize-int8"}
    assert "applied" in found, "the scripted target pays for quantized graphs"
    assert report["passes"][0]["name"] == "read"


def test_without_its_data_what_was_judged_where_it_was_made_counts(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(bundle.path, tmp_path / "moved"))
    recipe = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(recipe.replace("samples.npz", "gone.npz"))
    assert recipe_for(None, model=moved).data.all is None
    done = perwatt.optimize(moved, target="null", out=tmp_path / "done")
    assert done.report["outcome"] == "optimized" and done.report["accuracy"] is None


def test_a_graph_that_gives_something_else_here_is_left_out(bundle: Bundle, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(bundle.path, tmp_path / "changed"))
    for path in (changed / "check").glob("quantize-int8*/*.npz"):
        with np.load(path) as stored:
            np.savez(path, **{name: stored[name] + 1 for name in stored.files})
    done = perwatt.optimize(changed, target="null", out=tmp_path / "done")
    assert "quantize-int8" not in {row["name"] for row in done.report["passes"]}


def test_what_is_no_portable_bundle_is_none(folder: Path) -> None:
    assert not is_portable(folder) and not is_portable(folder / "net.onnx")
    assert registry.target("null").portable() is None
    assert isinstance(registry.target("tensorrt").portable(), Capabilities)
    assert json.loads((folder / "bundle" / "program.json").read_text())["portable"] is True
