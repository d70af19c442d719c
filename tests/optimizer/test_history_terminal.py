"""`perwatt.history_terminal` and `perwatt.history_words`: the table, the plot and the sentences, at any width."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from perwatt.gate_report import ComparedAccuracy, GateReport
from perwatt.history import Entry, Series, record_bench, record_gate, trend
from perwatt.history_terminal import fitting, plot, print_history
from perwatt.history_words import bounds, elsewhere, latest, subject
from perwatt.measurement import Ratio
from perwatt.report import RatioFigure

sys.path.insert(0, str(Path(__file__).parent))
from histories import EPYC, XEON, a_bench, a_gate, a_month, a_side, a_subject, compared

CPU = "cpu_s_per_inference"


@pytest.fixture(autouse=True, scope="module")
def in_utc() -> Iterator[None]:
    """Dates are shown in local time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


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


# Telling apart ----------------------------------------------------------------------------------------------------


def test_a_bundle_and_the_model_it_was_made_from_are_told_apart(tmp_path: Path) -> None:
    for day in (1, 2):
        sides = [
            a_subject(label, cpu_s, name="net", path=f"/srv/{label}", kind=kind)
            for label, cpu_s, kind in (("net-cpu", 80e-6, "bundle"), ("net.onnx", 160e-6, "onnx"))
        ]
        assert record_bench(a_bench(sides, day=day), tmp_path / "h.sqlite") is None
    text = shown(trend(CPU, path=tmp_path / "h.sqlite"))
    assert text.count("CPU time per inference of net on cpu\n") == 2
    bundle, model = text.split("\nonnx /srv/net.onnx\n")
    assert "\nbundle /srv/net-cpu\n" in bundle
    assert re.findall(r"\d+\.?\d* µs \[|~?[\d.]+×", bundle.split("Latest")[0]) == ["80.0 µs [", "80.0 µs [", "~1.00×"]
    assert re.findall(r"\d+\.?\d* µs \[|~?[\d.]+×", model.split("Latest")[0]) == ["160 µs [", "160 µs [", "~1.00×"]


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"place": "out/net-cpu", "repository": "github.com/acme/vision", "subject_kind": "bundle"},
         "bundle out/net-cpu in github.com/acme/vision"),
        ({"place": ".", "repository": "huggingface.co/acme/bert", "subject_kind": "huggingface"},
         "huggingface huggingface.co/acme/bert"),
        ({"place": ".", "repository": "github.com/acme/vision", "subject_kind": "build"},
         "built from a recipe in github.com/acme/vision"),
        ({"place": "models", "repository": "github.com/acme/vision", "subject_kind": "build"},
         "built from a recipe in models in github.com/acme/vision"),
        ({"place": "/home/ada/models/net.onnx", "subject_kind": "onnx"}, "onnx ~/models/net.onnx"),
        ({"place": "/home/adam/net.onnx", "subject_kind": "onnx"}, "onnx /home/adam/net.onnx"),
        ({}, "entries of an earlier perwatt, which kept no paths"),
    ],
)  # fmt: skip
def test_where_it_lay_in_words(facts: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert subject(a_series([1.0], **facts)) == says


def test_dates_are_local_and_several_of_one_day_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for hour in (8, 9):
        assert record_gate(a_gate(created=f"2026-09-01T{hour:02d}:10:00Z"), tmp_path / "h.sqlite") is None
    series = trend(CPU, path=tmp_path / "h.sqlite")
    monkeypatch.setenv("TZ", "XXX-05:45")
    time.tzset()
    text = shown(series)
    monkeypatch.undo()
    time.tzset()
    assert re.findall(r"^(2026-\S+ \S+)  main|^(2026-\S+ \S+)  ", text, re.M) == [
        ("", "2026-09-01 13:55"), ("", "2026-09-01 14:55"),
    ]  # fmt: skip
    assert re.search(r"^ +2026-09-01 13:55 to 14:55$", text, re.M)
    assert "Latest: 1ccf8cb, 2026-09-01 14:55," in text or ", 2026-09-01 14:55," in text
    assert [entry.created for entry in series[0].entries] == ["2026-09-01T08:10:00+00:00", "2026-09-01T09:10:00+00:00"]


LONG = "distilbert-base-multilingual-cased-finetuned-int8-weights-per-channel-symmetric-onnx-bundle-for-cpu"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [80, 120])
def test_long_names_give_way_in_the_middle_and_nothing_breaks(tmp_path: Path, width: int, encoding: str) -> None:
    dots = "…" if encoding == "utf-8" else "..."
    for day, label in ((1, LONG), (2, f"{LONG}-v2")):
        facts: Any = {"label": label, "commit": None, "path": f"/srv/{LONG}"}
        gate = a_gate("main", a_side(label, **facts), name=LONG, day=day)
        assert record_gate(gate, tmp_path / "h.sqlite") is None
    text = shown(trend(CPU, path=tmp_path / "h.sqlite"), width, encoding)
    lines = text.split("\n")
    assert max(map(len, lines)) <= width
    table = [line for line in lines if re.match(r"2026-09-0\d 10:11 ", line)]
    assert len(table) == 2 and all(line.rstrip().endswith("pass") for line in table)
    assert "disti" in table[0] and dots in table[0] and "-cpu " in table[0] and "-v2 " in table[1]
    # Words are whole, or cut in one place; the long ones are in the heading and where the latest is told.
    words = {word.strip(";,|") for word in text.split() if "distil" in word or "-bundle-" in word}
    whole = {LONG, f"{LONG}-v2", f"/srv/{LONG}"}
    for word in words - whole:
        begin, end = word.split(dots)
        assert any(name.startswith(begin) and name.endswith(end) for name in whole), word


@pytest.mark.parametrize("width", [80, 100])
def test_ratios_that_are_known_badly_stand_over_their_spreads(tmp_path: Path, width: int) -> None:
    """Both columns with lopsided spreads, both with the longest verdict: nothing is broken inside a number."""
    wild = RatioFigure(value=1.1, low=0.968, high=1.342)
    for day, base in ((1, "main"), (2, "change"), (3, "main")):
        figures = {CPU: compared(1e-4, 1.1e-4, ratio=wild)}
        gate = a_gate(base, "change" if day == 1 else f"change {day}", day=day, figures=figures, verdict="inconclusive",
                      disturbed=["load"])  # fmt: skip
        assert record_gate(gate, tmp_path / "h.sqlite") is None
    text = shown(trend(CPU, path=tmp_path / "h.sqlite"), width)
    assert max(map(len, text.split("\n"))) <= width
    assert text.count("−12 % +22 %") == 3 and text.count("inconclusive !") == 3
    assert len(re.findall(r"^2026-09-0\d 10:11  \w{7}", text, re.M)) == 3


def test_wide_letters_are_cut_by_the_columns_they_take() -> None:
    assert [fitting("模型模型模型", room) for room in (12, 11, 7)] == ["模型模型模型", "模型…模型", "模型…型"]
    assert fitting("resnet20", 8) == "resnet20" and fitting("resnet20", 5) == "re…20"


# Sentences --------------------------------------------------------------------------------------------------------


def test_the_latest_change_and_the_chain(file: Path) -> None:
    said = latest(trend(CPU, fingerprint=EPYC["digest"], path=file)[0])
    assert said == [
        "Latest: 3f79bb7+, 2026-09-28 10:11, 101 µs [99.0, 103]; 0.86× [0.85, 0.88] of its base, measured in one job: better; "
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


@pytest.mark.parametrize(
    ("cpu_s", "says"),
    [
        (131e-6, "worse"),
        (127e-6, "no change that can be told from noise"),
        (113e-6, "better"),
        (121e-6, "about the same"),
    ],
)
def test_what_two_jobs_say_where_their_intervals_overlap(tmp_path: Path, cpu_s: float, says: str) -> None:
    for day, value in ((1, 120e-6), (2, cpu_s)):
        # Each with an interval of 3 %.
        assert record_bench(a_bench([a_subject(cpu_s=value)], day=day), tmp_path / "h.sqlite") is None
    [said] = latest(trend(CPU, path=tmp_path / "h.sqlite")[0])
    assert said.endswith(f"against the entry before, across two jobs: {says}")


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
            created=f"2026-09-{number % 28 + 1:02d}T00:00:00+00:00", job=f"job {number}", kind="gate",
            label=f"head {number}", commit=None, dirty=False, digest=None, base_digest=None, perwatt_version="0.2.0",
            verdict="pass", disturbed=False, value=value, low=0.99 * value, high=1.01 * value, n=9, ratio=Ratio(None),
            floor=None, on_line=True,
        )
        for number, value in enumerate(values)
    )  # fmt: skip
    facts: dict[str, Any] = {
        "figure": CPU, "name": "resnet20", "subject_kind": None, "repository": None, "place": None,
        "fingerprint": "1a2b", "target": "cpu", "scenario": "offline",
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
        # The values beside the axis may take half of it.
        assert len(values) == 1 or width < 40


def test_the_newest_are_drawn_where_there_is_room_for_some_only() -> None:
    drawn = plot(a_series([1.0] * 100 + [2.0] * 21), 30, height=5)
    assert sum(line.count("●") for line in drawn[:5]) == 21
    assert all("●" not in line for line in drawn[2:5])


def test_one_entry_is_no_plot() -> None:
    assert plot(a_series([1.0]), 80) == []
