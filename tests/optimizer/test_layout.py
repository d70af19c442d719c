"""The house as drawn: folders and packages agree, names don't collide, importing is light, schemas are current."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import perwatt
from perwatt import bench_report, gate_report, limits, registry, report

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
NOT_PACKAGES = {"tests", "docs", "build", "dist", "example"}


def modules(folder: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}


def test_folders_on_disk_are_the_packages_of_pyproject() -> None:
    """A package that is not listed works in an editable install and is silently missing from the wheel."""
    top = [f for f in ROOT.iterdir() if f.is_dir() and not f.name.startswith(".") and f.name not in NOT_PACKAGES]
    found = {str(init.parent.relative_to(ROOT)) for folder in top for init in folder.rglob("__init__.py")}
    assert found == set(SETUPTOOLS["package-dir"].values())
    assert set(SETUPTOOLS["packages"]) == set(SETUPTOOLS["package-dir"])


def test_no_package_has_modules_in_a_folder_that_is_not_one() -> None:
    for folder in SETUPTOOLS["package-dir"].values():
        inner = [
            f for f in (ROOT / folder).iterdir() if f.is_dir() and f.name not in ("__pycache__", "suites", "results")
        ]
        assert inner == [], f"{inner[0]} would not be in the wheel"


def test_data_files_beside_modules_are_in_the_wheel() -> None:
    for package, folder in SETUPTOOLS["package-dir"].items():
        patterns = SETUPTOOLS["package-data"].get(package, [])
        for path in (ROOT / folder).iterdir():
            if path.is_file() and path.suffix != ".py":
                assert any(path.match(pattern) for pattern in patterns), f"{path.name} would not be in the wheel"


def test_the_public_names_are_these() -> None:
    assert sorted(perwatt.__all__) == [
        "Artifact", "BackendError", "BenchReport", "Bundle", "GateReport", "InputError", "Model", "PerwattError", "Reading",
        "Recipe", "Rewritten", "TargetError", "UntrustedCodeError", "benchmark", "gate", "load", "optimize", "read",
        "rewrite",
    ]  # fmt: skip
    assert dir(perwatt) == sorted([*perwatt.__all__, "__version__"])


def test_every_public_name_is_there_and_documented() -> None:
    for name in perwatt.__all__:
        assert getattr(perwatt, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        perwatt.optimise  # noqa: B018
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", perwatt.__version__)


def test_no_module_bears_the_name_of_something_exported_or_of_a_mapped_folder() -> None:
    """`import perwatt.optimize` would replace the function by a module."""
    folders = {name.partition(".")[2] for name in SETUPTOOLS["package-dir"]} - {""}
    assert not modules("optimizer") & (set(perwatt.__all__) | folders)
    assert {m.name for m in pkgutil.iter_modules(perwatt.__path__)} >= {"api", "cli", "worker"}


def test_every_module_says_what_it_is_for() -> None:
    for folder in SETUPTOOLS["package-dir"].values():
        for path in (ROOT / folder).glob("*.py"):
            assert path.read_text().lstrip().startswith('"""'), f"{path} has no docstring"


def imported(code: str, *arguments: str) -> set[str]:
    """Top-level packages that a fresh process holds after `code`."""
    names = "' '.join({name.split('.')[0] for name in sys.modules})"
    said = f"import sys\n{code}\nsys.stderr.write('\\n' + {names})"
    done = subprocess.run([sys.executable, "-c", said, *arguments], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split("\n")[-1].split())


HEAVY = {
    "numpy",
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nncf",
    "transformers",
    "PIL",
    "pydantic",
    "rich",
}


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("import perwatt; perwatt.__version__; dir(perwatt)", ()),
        ("from perwatt.cli import cli; cli.main(['--help'], standalone_mode=False)", ()),
        ("from perwatt.cli import cli; cli.main(['completion', 'bash'], standalone_mode=False)", ()),
    ],
    ids=["import perwatt", "optimize --help", "optimize completion"],
)
def test_what_should_be_light_imports_nothing_heavy(code: str, arguments: tuple[str, ...]) -> None:
    assert not imported(code, *arguments) & HEAVY


def test_the_way_through_imports_no_backend_and_no_torch_into_the_callers_process() -> None:
    code = "import perwatt; perwatt.optimize, perwatt.load; import perwatt.worker, perwatt.pipeline, perwatt.study"
    assert not imported(code) & {"torch", "transformers", "nncf", "openvino", "onnxruntime", "onnx"}


def test_listing_names_imports_no_pass_and_no_backend() -> None:
    held = imported("from perwatt import registry; registry.names('passes'); registry.names('targets')")
    assert not held & {"onnx", "openvino", "nncf", "torch", "onnxruntime"}


def test_telemetry_of_dependencies_is_off() -> None:
    code = "import perwatt.targets.openvino, os, sys; assert os.environ['OPENVINO_TELEMETRY_OPT_OUT'] == '1'"
    imported(code)


def test_the_readme_tells_of_every_subcommand_and_exit_code() -> None:
    from perwatt.cli import cli

    text = (ROOT / "README.md").read_text()
    for name, command in cli.commands.items():
        if not command.hidden:
            assert re.search(rf"optimize {name}\b", text), f"README.md does not mention optimize {name}"


def test_the_published_schemas_are_current() -> None:
    for name, made in (
        ("recipe", registry.recipe_schema()),
        ("report", report.schema()),
        ("limits", limits.schema()),
        ("gate", gate_report.schema()),
        ("bench", bench_report.schema()),
    ):
        published = json.loads((ROOT / "docs" / f"{name}.schema.json").read_text())
        assert published == made, f"optimize schema {name} > docs/{name}.schema.json"


def test_every_pass_and_target_carries_the_name_of_its_file() -> None:
    for name in registry.names("passes"):
        cls = registry.pass_class(name)
        assert cls.name() == name
        assert cls.__name__ == "".join(part.capitalize() for part in name.split("-"))
    for name in registry.names("targets"):
        assert type(registry.target(name)).name() == name


def test_nothing_banned_is_imported() -> None:
    """ruff checks it too; this holds where ruff does not look."""
    banned = PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    for folder in SETUPTOOLS["package-dir"].values():
        for path in (ROOT / folder).rglob("*.py"):
            for name in banned:
                assert not re.search(rf"^\s*(import|from) {name}\b", path.read_text(), re.MULTILINE), (
                    f"{path} imports {name}"
                )
