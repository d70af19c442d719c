"""`perwatt.bench_terminal` and `perwatt.bench_markdown`: one subject, two, and more than fit beside each other."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from perwatt import markdown as md
from perwatt.bench_markdown import MARKER, render
from perwatt.bench_report import BenchReport
from perwatt.bench_terminal import print_bench
from perwatt.report import RatioFigure

sys.path.insert(0, str(Path(__file__).parent))
from gates import CPU, MODELLED, NO_ENERGY, WATT, a_bench, a_subject, around, some_capacity, some_traffic

PARSER = MarkdownIt("commonmark").enable("table")


def shown(report: BenchReport, width: int = 80) -> str:
    """What `print_bench` writes into a pipe of that width."""
    out = io.StringIO()
    print_bench(report, console=Console(file=out, width=width))
    return out.getvalue()


def row(text: str, label: str) -> str:
    return next(line for line in text.split("\n") if line.startswith(label))


def alone() -> BenchReport:
    return a_bench(a_subject("resnet20-int8", first=True, traffic=some_traffic(), capacity=some_capacity()))


def five() -> BenchReport:
    return a_bench(*[a_subject(f"subject-{number}", 1 + 0.1 * number, first=not number) for number in range(5)])


BENCHES = {"one": alone, "two": a_bench, "five": five}


@pytest.mark.parametrize("name", BENCHES)
def test_as_recorded_at_80_columns(name: str, golden: Any) -> None:
    golden(f"bench_{name}_terminal", shown(BENCHES[name]()))


def test_markdown_as_recorded(golden: Any) -> None:
    golden("bench_two_markdown", render(a_bench()))


# The headline -----------------------------------------------------------------------------------------------------


def first(report: BenchReport) -> str:
    return shown(report, 200).split("\n")[0]


def test_one_subject_leads_with_its_own_figures() -> None:
    said = "3,077 inferences per joule (counter), 130 µs of CPU time per inference"
    assert first(alone()) == f"resnet20-int8: {said}"


def test_several_lead_with_the_best_and_by_how_much() -> None:
    assert first(a_bench()) == "resnet20-int8: 1.62× [1.60, 1.64] the inferences per joule of resnet20.onnx (counter)"
    assert first(five()).startswith("subject-4: 1.40× [1.38, 1.42]")
    slower = a_bench(a_subject("a", first=True), a_subject("b", 0.5))
    assert first(slower) == "nothing has more inferences per joule than a beyond the noise"


def test_modelled_joules_do_not_decide_which_is_best() -> None:
    report = a_bench(
        a_subject("a", first=True, method="modelled"), a_subject("b", 1.62, method="modelled"), energy=MODELLED
    )
    assert first(report) == "b: 0.62× [0.60, 0.64] the CPU time per inference of a"
    assert "modelled joules never decide by themselves" in shown(report, 200)


# Columns and blocks -----------------------------------------------------------------------------------------------


def test_two_subjects_stand_beside_each_other_with_the_ratio_under_the_value() -> None:
    lines = shown(a_bench()).split("\n")
    at = next(index for index, line in enumerate(lines) if line.startswith("CPU time per inference"))
    assert lines[at].split()[4:] == ["130", "µs", "±1.2", "%", "80.2", "µs", "±1.2", "%"]
    assert lines[at + 1].strip() == "0.62× [0.60, 0.64] better"
    assert "Ratios are to resnet20.onnx, paired by block." in shown(a_bench())


def test_what_does_not_fit_becomes_a_block_for_each() -> None:
    text = shown(five())
    for number in range(5):
        assert f"\nsubject-{number}\n" in text
    assert row(text, "CPU time per inference").split()[4:] == ["130", "µs", "±1.2", "%"]
    assert text.count("÷ the first") == 4
    assert row(text[text.index("\nsubject-4\n") :], "CPU time per inference").endswith("0.71× [0.69, 0.73]  better")
    assert "÷ the first" not in shown(five(), 200)


def test_three_fit_where_words_stand_under_ratios() -> None:
    report = a_bench(a_subject("a", first=True), a_subject("b", 1.3), a_subject("c", 1.1))
    text = shown(report)
    assert "÷ the first" not in text
    assert row(text, "  (counter, package)").split()[2:] == ["1.30×", "[1.28,", "1.32]", "1.10×", "[1.08,", "1.12]"]


def test_differences_within_the_noise_are_marked_as_noise() -> None:
    close = a_subject("b", ratio_to_first={CPU: around(0.96, 0.02), WATT: around(1.01, 0.02)})
    report = a_bench(a_subject("a", first=True), close, noise_floor={CPU: 0.05, WATT: None})
    text = shown(report, 120)
    assert "0.96× [0.94, 0.98] noise" in text and "1.01× [0.99, 1.03] noise" in text
    assert "Noise       CPU time per inference 5 %\n" in text
    assert "Noise       not measured" in shown(a_bench(noise_floor={}), 120)


def test_two_methods_are_told_apart_cell_by_cell() -> None:
    other = a_subject("b", 1.5, ratio_to_first={WATT: RatioFigure(value=None)})
    report = a_bench(a_subject("a", first=True, method="modelled"), other)
    text = shown(report, 160)
    assert "3,077 (modelled, package) ±1.2 %" in row(text, "inferences per joule")
    assert "4,616 (counter, package) ±1.2 %" in row(text, "inferences per joule")
    assert first(report).endswith("beyond the noise")


def test_subjects_with_the_same_name_get_letters() -> None:
    text = shown(a_bench(a_subject("net", first=True), a_subject("net", 1.5)))
    assert "A net" in text and text.startswith("B net: 1.50× [1.48, 1.52] the inferences per joule of A net (counter)")


def test_long_paths_are_columns_by_letter_and_end_and_stand_whole_below() -> None:
    paths = [f"/builds/{number}/{'deep/' * 8}net.onnx" for number in range(2)]
    text = shown(a_bench(a_subject(paths[0], first=True), a_subject(paths[1], 1.5)), 160)
    assert text.split("\n")[2].split() == ["A", "net.onnx", "B", "net.onnx"]
    assert f"Subject     B net.onnx: {paths[1]}\n" in text
    assert shown(a_bench(a_subject(paths[0], first=True))).startswith("net.onnx: 3,077 inferences per joule")


def test_a_wide_boundary_pushes_no_number_out_of_its_line() -> None:
    report = a_bench()
    for subject in report.subjects:
        for figure in subject.figures.values():
            figure.boundary = "package+dram" if figure.method else None
    text = shown(report)
    assert "\n  (counter, package+dram)" in text and "1.62× [1.60, 1.64] better\n" in text


# Traffic, capacity ------------------------------------------------------------------------------------------------


def test_traffic_has_joules_per_request_idle_included_and_the_money() -> None:
    text = shown(alone())
    assert "At this traffic, idle time included" in text
    traffic = text[text.index("At this traffic") :]
    assert row(traffic, "energy per request").split()[3:] == ["171", "mJ", "±1.2", "%"]
    assert row(traffic, "requests a second").split()[3:] == ["10.0", "/s"]
    assert row(traffic, "kWh per million").split()[3:] == ["0.0475"]
    assert row(traffic, "cost per million").split()[3:] == ["0.0142", "EUR"]
    assert row(traffic, "utilisation").split()[1:] == ["0.12", "%"]
    assert "Price       at 0.3 EUR per kWh" in text


def test_without_a_price_there_is_no_money() -> None:
    dear = some_traffic(cost_per_million=None, currency=None, price_per_kwh=None)
    text = shown(a_bench(a_subject("a", first=True, traffic=dear)))
    assert "cost" not in text and "Price" not in text and "kWh per million" in text
    assert "At this traffic" not in shown(a_bench())


def test_a_backlog_that_grew_is_said() -> None:
    late = a_subject("a", first=True, traffic=some_traffic(sustained=False, latency_p99_ms=None))
    text = shown(a_bench(late))
    assert row(text, "sustained").endswith("no: the backlog grew")
    assert row(text[text.index("At this") :], "latency p99").endswith("–")


def test_capacity_has_the_rate_the_bound_and_why_it_ended() -> None:
    text = shown(alone())
    capacity = text[text.index("\nCapacity") :]
    assert row(capacity, "capacity").split() == ["capacity", "4,120", "/s"]
    assert row(capacity, "latency bound").split()[2:] == ["p99", "≤", "5.00", "ms"]
    assert row(capacity, "ended because").endswith("the bracket is within 3 %")
    none = some_capacity(rate_per_s=None, ended="no rate held")
    text = shown(a_bench(a_subject("a", first=True, capacity=none), a_subject("b")))
    assert row(text[text.index("\nCapacity") :], "capacity").split() == ["capacity", "–", "–"]


# What it rests on -------------------------------------------------------------------------------------------------


def test_joules_have_gross_beside_idle_subtracted_of_each() -> None:
    text = shown(a_bench(), 200)
    assert (
        "gross (idle power included, the headline): 325 µJ / 201 µJ per inference; above idle: 211 µJ / 130 µJ" in text
    )
    assert (
        "idle: 1.70 W, models loaded" in text
        and "windows of 10.0 s, n = 16, the counter refreshes every 1.00 ms" in text
    )
    assert "the meter itself: 0.002 % of one CPU" in text
    assert "probe: int8 93 % of its peak" in text and "profile: quick" in text


def test_without_joules_everything_else_is_there_and_says_why() -> None:
    bare = [a_subject("a", first=True, method="unavailable"), a_subject("b", 1.5, method="unavailable")]
    text = shown(a_bench(*bare, energy=NO_ENERGY))
    assert text.startswith("b: 0.67× [0.65, 0.69] the CPU time per inference of a\n")
    assert row(text, "inferences per joule").split()[3:] == ["–", "–"]
    assert "unavailable: no energy counter, and Foo 1 is not in the power table" in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("steady", "said"),
    [(True, "12, steady"), (False, "12, NOT steady"), (None, "12, too short to tell whether steady")],
)
def test_warm_up_says_whether_it_became_steady(steady: bool | None, said: str) -> None:
    subject = a_subject("a", first=True, warm_up={"seconds": 0.8, "slices": 12, "steady": steady})
    assert f"warm-up: 0.80 s, slices: {said}\n" in shown(a_bench(subject))
    assert "warm-up: not recorded" in shown(a_bench(a_subject("a", first=True, warm_up={})))


def test_a_disturbed_run_is_marked_at_the_top() -> None:
    report = a_bench(disturbed=["other processes used 31 %"])
    assert shown(report, 200).split("\n")[1] == "Disturbed run: other processes used 31 %"
    assert "> **Disturbed run**: other processes used 31 %" in render(report)
    assert "Disturbed" not in shown(a_bench()) + render(a_bench())


def test_missing_figures_are_dashes() -> None:
    gone = a_subject("a", first=True, figures={}, size_bytes=None, peak_memory_bytes=None)
    text = shown(a_bench(gone))
    assert row(text, "size").split() == ["size", "–"]
    assert "None" not in text + render(a_bench(gone))


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("name", BENCHES)
def test_nothing_is_cut_off_at_any_width(name: str, width: int) -> None:
    text = shown(BENCHES[name](), width)
    assert "…" not in text and "\x1b" not in text
    assert max(map(len, text.split("\n"))) <= width


def test_hostile_names_steer_nothing() -> None:
    text = shown(a_bench(a_subject("[red]x\x1b[2J\n", first=True), a_subject("b", notes=["[/]\x07"])), 200)
    assert "\x1b" not in text and "\x07" not in text
    assert "[red]x�[2J" in text


# Markdown ---------------------------------------------------------------------------------------------------------


def test_markdown_has_a_column_for_each_subject() -> None:
    text = render(five())
    assert text.startswith(f"{MARKER}\n### subject-4: 1.40×")
    assert "|  | subject-0 | subject-1 | subject-2 | subject-3 | subject-4 |" in text
    assert "| CPU time per inference | 130 µs ±1.2 % | 118 µs ±1.2 %<br>0.91× [0.89, 0.93] better |" in text
    assert "\n**At this traffic, idle time included (at 0.3 EUR per kWh)**\n" in render(alone())
    assert "| capacity | 4,120 /s |" in render(alone())


@pytest.mark.parametrize("text", ["a|b", "<img src=x>", "`c`", "</details>", "x\n# y", "[a](b)"])
def test_markdown_of_hostile_names_has_the_same_shape(text: str) -> None:
    def shape(word: str) -> list[str]:
        subject = a_subject(word, path=word, notes=[word], first=True, traffic=some_traffic(currency=word))
        report = a_bench(subject, a_subject("b", 1.5), notes=[word], disturbed=[word], machine={word: word})
        return [token.type for token in PARSER.parse(render(report)) if token.type != "html_block"]

    assert shape(text) == shape("word")


def test_markdown_always_fits() -> None:
    long = "|@<é" * 9_000
    subjects = [a_subject(long, path=long, notes=[long] * 100, first=not number) for number in range(30)]
    text = render(
        a_bench(*subjects, notes=[long] * 100, disturbed=[long] * 100, machine={str(i): long for i in range(99)})
    )
    assert len(text.encode()) <= md.MAX_BYTES
    assert text.startswith(MARKER) and text.count("<details>") == text.count("</details>")
