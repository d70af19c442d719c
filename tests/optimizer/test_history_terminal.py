"""`perwatt.history_terminal` and `perwatt.history_words`: the table, the plot and the sentences, at any width."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from perwatt.gate_report import ComparedAccuracy, GateReport
from perwatt.history import Entry, Series, record_bench, record_gate, trend
from perwatt.history_terminal import plot, print_history
from perwatt.history_words import bounds, elsewhere, latest
from perwatt.measurement import Ratio
from perwatt.report import RatioFigure

sys.path.insert(0, str(Path(__file__).parent))
from histories import EPYC, XEON, a_gate, a_month, a_side, compared

CPU = "cpu_s_per_inference"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A month of gates, and two gates of another machine."""
    path = tmp_path / "history.sqlite"
    for report in a_month():
        if isinstance(report, GateReport):
            assert record_gate(report, path) is None
        else:
            report.subjects[0].name = "resnet20"
            assert record_bench(report, path) is None
    for day in (2, 3):
        assert record_gate(a_gate(machine=XEON, day=day, disturbed=[]), path) is None
    return path


def shown(series: list[Series], width: int = 80, encoding: str = "utf-8", **options: Any) -> str:
    """What `print_history` writes into a pipe of that width."""
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding)
    print_history(series, Console(file=out, width=width), **options)
    out.flush()
    return raw.getvalue().decode(encoding)


def of(file: Path, *reports: GateReport) -> list[Series]:
    for report in reports:
        assert record_gate(report, file) is None
    return trend(CPU, path=file)


@pytest.mark.parametrize("width", [80, 120])
def test_the_whole_of_it(file: Path, width: int, golden: Callable[[str, str], None]) -> None:
    text = shown(trend(CPU, path=file), width, here=EPYC["digest"])
    assert max(map(len, text.split("\n"))) <= width
    golden(f"history_{width}", text)


def test_other_machines_are_counted_and_never_shown_beside(file: Path) -> None:
    text = shown(trend(CPU, path=file), here=EPYC["digest"])
    assert text.rstrip().endswith("2 entries of 1 other machine are not shown: --all-machines")
    assert "Xeon" not in text
    everything = shown(trend(CPU, path=file), 120)
    assert everything.count("when") == 2 and "not shown" not in everything
    assert "machine 1a2b3c4d5e6f (AMD EPYC 9B14)" in everything
    assert "machine ffee00112233 (Intel Xeon 8481C)" in everything
    # One plot each: the first and the last date under every axis.
    axes = re.findall(r"^ +2026-09-(\d\d) +(?:to )?2026-09-(\d\d)$", everything, re.M)
    assert axes == [("01", "28"), ("02", "03")]


def test_nothing_of_this_machine(file: Path) -> None:
    assert shown(trend(CPU, path=file), here="unknown").split("\n")[:2] == [
        "no entries of this machine", "8 entries of 2 other machines are not shown: --all-machines",
    ]  # fmt: skip
    assert shown([]) == "no entries yet: `optimize gate` and `optimize bench` write them down\n"
    assert shown([], here="unknown") == shown([])


def test_entries_beyond_the_limit_count_too(file: Path) -> None:
    series = trend(CPU, limit=1, path=file)
    assert elsewhere(series) == "8 entries of 2 other machines are not shown: --all-machines"
    assert "5 older not shown: --limit 6" in shown(series, here=EPYC["digest"])


def test_where_only_ascii_can_be_shown(file: Path) -> None:
    text = shown(trend(CPU, path=file), encoding="ascii", here=EPYC["digest"])
    assert "0.90x" in text
    plotted = [line for line in text.split("\n") if re.match(r"^ *([\d.]+ us)? +[+|]", line)]
    assert len(plotted) == 9
    assert sum(line.count("o") for line in plotted) == 5 and sum(line.count("x") for line in plotted) == 1
    assert not any("?" in line for line in plotted)


@pytest.mark.parametrize("width", [20, 40, 79, 81, 99, 100, 300])
def test_at_any_width(file: Path, width: int) -> None:
    text = shown(trend(CPU, path=file), width)
    assert max(map(len, text.split("\n"))) <= width
    assert "fail" in text


def test_names_do_not_steer_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b[31m[bold]evil[/bold]\n\x07"
    side = a_side(evil, target=evil, commit=None)
    machine = {"fingerprint": {"name": evil}, "digest": evil}
    gate = a_gate("main", side, name=evil, machine=machine, measuring={"scenario": evil})
    text = shown(of(tmp_path / "h.sqlite", gate, a_gate("main", side, day=2)), 120)
    assert "\x1b" not in text and "\x07" not in text
    assert "[bold]evil[/bold]" in text


# Sentences --------------------------------------------------------------------------------------------------------


def test_the_latest_change_and_the_chain(file: Path) -> None:
    said = latest(trend(CPU, fingerprint=EPYC["digest"], path=file)[0])
    assert said == [
        "Latest: 3f79bb7+, 2026-09-28, 101 µs [99.0, 103]; 0.86× [0.85, 0.88] of its base, measured in one job: better; "
        "~0.88× against the entry before, across two jobs",
        "0.71× [0.68, 0.74] since main at 0d6e4079e: 4 gates chained, each against the head before it, so that the "
        "machine's drift between jobs is not in it",
    ]


def test_a_failed_head_says_so(tmp_path: Path) -> None:
    gate = a_gate("main", "a", (100e-6, 120e-6), verdict="fail", exit_code=1)
    [said] = latest(of(tmp_path / "h.sqlite", gate)[0])
    assert said.endswith("measured in one job: worse; its gate failed, so it is no part of the line")


@pytest.mark.parametrize(
    ("ratio", "floor", "says"),
    [
        (RatioFigure(value=0.99, low=0.97, high=1.01), 0.0, "no change that can be told from noise"),
        (RatioFigure(value=0.97, low=0.96, high=0.98), 0.05, "no change that can be told from noise"),
        (RatioFigure(value=0.97, low=0.96, high=0.98), 0.01, "better"),
        (RatioFigure(value=1.08, low=1.05, high=1.11), None, "worse"),
    ],
)
def test_what_a_ratio_says(tmp_path: Path, ratio: RatioFigure, floor: float | None, says: str) -> None:
    figures = {CPU: compared(1e-4, 1e-4, ratio=ratio, floor=floor)}
    [said] = latest(of(tmp_path / "h.sqlite", a_gate(figures=figures))[0])
    assert said.endswith(f"measured in one job: {says}")


def test_a_counted_figure_has_no_drift(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    sizes = {"half": 0, "floor": None, "base_interval": None, "head_interval": None}
    for day, size in ((1, 1.0e6), (2, 0.5e6)):
        figures = {"size_bytes": compared(2.0e6, size, "B", **sizes)}
        assert record_gate(a_gate("main", f"change {day}", day=day, figures=figures), path) is None
    text = shown(trend("size_bytes", path=path))
    assert re.search(r"0\.500 MB +0\.50× +0\.25× +pass", text)
    assert "~" not in text and "two jobs" not in text


def test_accuracy_moves_in_points(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    for day, head in ((1, 0.9164), (2, 0.9104)):
        found = ComparedAccuracy(metric="top1", unit="fraction", n=1000, base=0.92, head=head, drop=0.3, low=0, high=1)
        assert record_gate(a_gate("main", f"change {day}", day=day, accuracy=found), path) is None
    text = shown(trend("accuracy", path=path))
    assert text.startswith("Top-1 of resnet20 on cpu\n")
    assert "91.04 %  −0.60 points" in text
    assert "Latest: " in text and "−0.60 points against the entry before: worse" in " ".join(text.split())


def test_a_metric_nobody_knows_the_direction_of_is_not_judged(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    for day, head in ((1, 0.5), (2, 0.6)):
        found = ComparedAccuracy(metric="my_loss", unit="metric", n=9, base=0.5, head=head, drop=0, low=None, high=None)
        assert record_gate(a_gate("main", f"change {day}", day=day, accuracy=found), path) is None
    text = shown(trend("accuracy", path=path), 120)
    assert "My_loss of resnet20" in text and "better" not in text and "worse" not in text


# The plot ---------------------------------------------------------------------------------------------------------


def a_series(values: list[float], **changes: Any) -> Series:
    """A line of these values, each with an interval of 1 %."""
    entries = tuple(
        Entry(
            created=f"2026-09-{number % 28 + 1:02d}T00:00:00+00:00", kind="gate", label=f"head {number}", commit=None,
            dirty=False, digest=None, base_digest=None, perwatt_version="0.2.0", verdict="pass", disturbed=False,
            value=value, low=0.99 * value, high=1.01 * value, n=9, ratio=Ratio(None), floor=None, on_line=True,
        )
        for number, value in enumerate(values)
    )  # fmt: skip
    facts: dict[str, Any] = {
        "figure": CPU, "name": "resnet20", "fingerprint": "1a2b", "target": "cpu", "scenario": "offline",
        "operating_point": {}, "unit": "s", "metric": None, "method": None, "boundary": None, "machine": {},
    }  # fmt: skip
    return Series(**{**facts, **changes}, entries=entries)


def test_higher_values_stand_higher() -> None:
    drawn = plot(a_series([1.0, 2.0, 3.0, 2.0]), 60, height=5)
    columns = {mark.start(): row for row, line in enumerate(drawn[:5]) for mark in re.finditer("●", line)}
    assert [columns[x] for x in sorted(columns)] == [4, 2, 0, 2]
    assert drawn[0].startswith("2.91 s ┤") and drawn[2].startswith("2.01 s ┤") and drawn[4].startswith("1.11 s ┤")


def test_noise_does_not_fill_the_plot() -> None:
    low, high = bounds(a_series([1.0, 1.001, 0.999]))
    assert low < 0.985 and high > 1.015


@given(
    st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=60),
    st.integers(0, 130),
    st.integers(2, 20),
)
def test_the_plot_fits_its_width(values: list[float], width: int, height: int) -> None:
    drawn = plot(a_series(values), width, height)
    if drawn:
        assert len(drawn) == height + 2
        assert max(map(len, drawn[:height])) <= width
        marks = "".join(drawn[:height]).count("●")
        assert marks == min(len(values), width - drawn[0].index("┤") - 2)
    else:
        assert len(values) == 1 or width < 25


def test_the_newest_are_drawn_where_there_is_room_for_some_only() -> None:
    drawn = plot(a_series([1.0] * 100 + [2.0] * 21), 30, height=5)
    assert sum(line.count("●") for line in drawn[:5]) == 21
    assert all("●" not in line for line in drawn[2:5])


def test_one_entry_is_no_plot() -> None:
    assert plot(a_series([1.0]), 80) == []
