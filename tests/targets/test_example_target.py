"""The example of a third party's target: installed as a user would, listed, compiled for, loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "optimizer"))
from runs import command, environment, images, outputs, put_net

ROOT = Path(__file__).resolve().parents[2]
NAME = "onnx-reference"
LOAD = (
    "import sys, numpy, perwatt; numpy.save(sys.argv[2], perwatt.load(sys.argv[1]).run(numpy.load(sys.argv[3]))['y'])"
)


def call(arguments: list[str], site: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=folder, env=environment(site), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the example."""
    folder = tmp_path_factory.mktemp("site")
    # A copy, because setuptools builds beside the source.
    source = Path(shutil.copytree(ROOT / "docs/example-target", folder / "source"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    quiet = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*install, "--target", str(folder / "installed"), str(source)], check=True, env=quiet)
    return folder / "installed"


@pytest.mark.slow
def test_an_installed_target_is_listed_and_has_a_page(site: Path, tmp_path: Path) -> None:
    listed = call(command("targets", "--json"), site, tmp_path)
    entry = {entry["name"]: entry for entry in json.loads(listed.stdout)["targets"]}[NAME]
    assert entry["package"] == "onnx_reference" and entry["serves"] == {}
    assert entry["variants"][0]["missing"] == [] and set(entry["variants"][0]["versions"]) == {"onnx"}
    page = call(command("targets", NAME), site, tmp_path)
    assert page.returncode == 0 and f"{NAME} by onnx_reference" in page.stdout
    unknown = call(command("targets", NAME), Path(), tmp_path)
    assert unknown.returncode == 2 and NAME in unknown.stderr


@pytest.mark.slow
def test_a_model_is_compiled_for_an_installed_target_and_its_bundle_loads(site: Path, tmp_path: Path) -> None:
    model = put_net(tmp_path, 64)
    arguments = [model.name, "--data", "samples.npz", "--target", NAME, "--out", "bundle", "--quiet", "--time", "20s"]
    done = call(command(*arguments), site, tmp_path)
    assert done.returncode == 0, done.stderr
    program = json.loads((tmp_path / "bundle/program.json").read_text())
    assert program["target"] == NAME and (tmp_path / "bundle" / NAME / "model.onnx").is_file()
    np.save(tmp_path / "x.npy", images(3))
    loaded = call([sys.executable, "-c", LOAD, "bundle", "y.npy", "x.npy"], site, tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    assert np.allclose(np.load(tmp_path / "y.npy"), outputs(model, images(3)), atol=1e-4)
