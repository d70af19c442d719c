"""What tests of whole searches share: a tiny network on the null target, whose time is scripted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import perwatt
from perwatt.report import schema

sys.path.insert(0, str(Path(__file__).parent))
from runs import put_net

TRIALS = 6
OPTIONS = {"target": "null", "min_gain": "1%", "max_drop": 100, "tune": False}
FLAGS = ("--target", "null", "--min-gain", "1%", "--max-drop", "100", "--no-tune", "--data", "samples.npz")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `net.onnx` and `samples.npz`."""
    folder = tmp_path_factory.mktemp("searches")
    put_net(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own: every search begins anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def searched(here: Path, out: Path, trials: int = TRIALS, **options: Any) -> dict[str, Any]:
    bundle = perwatt.optimize(
        here / "net.onnx", data=here / "samples.npz", out=out, trials=trials, force=True, **{**OPTIONS, **options}
    )
    report = bundle.report
    jsonschema.validate(report, schema())
    return report


def told(report: dict[str, Any]) -> list[tuple[int, str, tuple[float, ...], float | None]]:
    """What must be the same however often a search was interrupted."""
    return [(t["number"], t["choice"], tuple(t["objectives"]), t["drop"]) for t in report["search"]["trials"]]
