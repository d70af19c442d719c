"""`perwatt.progress`: what is said while a run goes on, and where it is said."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from perwatt.progress import TimeLeft, time_words
from perwatt.terminal import Progress


def progress_text(mode: Any, **console: Any) -> tuple[str, float]:
    out = io.StringIO()
    with Progress(mode, Console(file=out, width=80, **console)) as progress:
        progress.stage("Reading [b]model.pt", 0.0, until=0.4)
        progress.update(0.5)
        progress.note("11 MB")
        progress.stage("Measuring", 0.4)
        share = progress.share
    return out.getvalue(), share


def test_progress_in_lines() -> None:
    text, _ = progress_text("lines")
    lines = text.rstrip("\n").split("\n")
    assert lines[0].split() == ["0.0", "s", "0", "%", "Reading", "[b]model.pt"]
    assert lines[1].strip() == "11 MB"
    assert lines[2].split()[-3:] == ["40", "%", "Measuring"]


def test_progress_is_silent_where_nobody_watches() -> None:
    assert progress_text("silent") == ("", 0.4)
    assert progress_text("bar") == ("", 0.4)


def test_progress_draws_a_bar_on_a_terminal() -> None:
    text, _ = progress_text("bar", force_terminal=True)
    assert "Measuring" in text and "40%" in text


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("lines") as progress:
        progress.stage("Reading", 0.0)
    caught = capsys.readouterr()
    assert caught.out == "" and "Reading" in caught.err


def test_progress_never_goes_back_and_stays_within_its_stage() -> None:
    with Progress("silent") as progress:
        progress.stage("one", 0.5, until=0.6)
        progress.update(7.0)
        assert progress.share == pytest.approx(0.6)
        progress.stage("two", 0.3)
        assert progress.share == pytest.approx(0.6)
        progress.stage_at(0.8)
        assert progress.share == pytest.approx(0.8)


def test_time_left_follows_from_share_and_elapsed() -> None:
    now = [0.0]
    times = TimeLeft(clock=lambda: now[0])
    now[0] = 1.0
    assert times.left(0.5) is None
    now[0] = 10.0
    assert times.left(0.25) == pytest.approx(30.0)
    now[0] = 10.5
    jumped = times.left(0.75)
    # Smoothed: a jump ahead doesn't throw the estimate about.
    assert jumped is not None and 15 < jumped < 30
    now[0] = 60.0
    settled = times.left(0.75)
    assert settled == pytest.approx(20.0, abs=1.0)
    assert time_words(12.3, 29.2) == "12 s, about 30 s left"
    assert time_words(0.4, None) == "0 s"
