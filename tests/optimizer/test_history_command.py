"""`perwatt.history_command`: what `optimize history` prints, draws and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from perwatt import history_command
from perwatt.bench.fingerprint import digest, fingerprint
from perwatt.errors import InputError
from perwatt.history import record_gate

sys.path.insert(0, str(Path(__file__).parent))
from histories import XEON, a_gate

HERE = {"fingerprint": fingerprint(), "digest": digest(fingerprint())}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two gates of this machine, in a folder to work in."""
    monkeypatch.chdir(tmp_path)
    for day in (1, 2):
        assert record_gate(a_gate(machine=HERE, day=day), tmp_path / "h.sqlite") is None
    return tmp_path / "h.sqlite"


def run(file: Path, name: str | None = None, **changes: Any) -> str | None:
    asked: dict[str, Any] = {
        "figure": "cpu_s_per_inference", "limit": 30, "plot": None, "all_machines": False, "path": str(file),
        "as_json": False,
    }  # fmt: skip
    return history_command.run(name, **{**asked, **changes})


def test_a_picture_that_is_written_is_told_beside_the_trend(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(file, plot="trend.svg") is None
    out, err = capsys.readouterr()
    assert (
        err == "written trend.svg\n" and "written" not in out and out.startswith("CPU time per inference of resnet20")
    )
    assert Path("trend.svg").read_text().startswith("<svg")


def test_json_stays_json_beside_a_picture(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(file, plot="trend.html", as_json=True)
    assert capsys.readouterr() == ("", "written trend.html\n")
    assert text is not None
    assert [entry["created"] for entry in json.loads(text)["series"][0]["entries"]] == [
        "2026-09-01T10:11:12+00:00", "2026-09-02T10:11:12+00:00",
    ]  # fmt: skip


def test_a_picture_that_can_not_be_drawn_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for plot, says in (("trend.png", r"write it trend\.svg or trend\.html"), ("no/trend.svg", "create no")):
        with pytest.raises(InputError, match=says):
            run(tmp_path / "there is none.sqlite", plot=plot)
    assert capsys.readouterr() == ("", "")


def test_nothing_to_draw_of_this_machine_names_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "h.sqlite"
    assert record_gate(a_gate(machine=XEON), file) is None
    with pytest.raises(InputError, match="no entries of this machine — add --all-machines"):
        run(file, plot="trend.svg")
    assert not Path("trend.svg").exists() and capsys.readouterr() == ("", "")
    run(file, plot="trend.svg", all_machines=True)
    assert capsys.readouterr()[1] == "written trend.svg\n"


def test_a_path_is_a_name_too(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(file, "/srv/models/resnet20/")
    assert capsys.readouterr()[0].startswith("CPU time per inference of resnet20")
    with pytest.raises(InputError, match="unknown name in the history 'resnet2': did you mean resnet20"):
        run(file, "resnet2")
