"""`perwatt.gate_terminal`: what a person reads after a gate, at any width, with and without colours and Unicode."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from perwatt import gate_words as words
from perwatt.comparison import limit_words
from perwatt.figure_words import change
from perwatt.gate_report import ComparedFigure, GateReport
from perwatt.gate_terminal import print_gate
from perwatt.report import RatioFigure

sys.path.insert(0, str(Path(__file__).parent))
from gates import (
    CPU,
    GATES,
    WATT,
    a_check,
    a_compared_accuracy,
    a_gate,
    a_gate_side,
    all_figures,
    around,
    compared,
    disturbed_gate,
    failed_gate,
    gate_without_accuracy,
    inconclusive_gate,
    modelled_gate,
    unmeasurable_gate,
)


def shown(report: GateReport, width: int = 80) -> str:
    """What `print_gate` writes into a pipe of that width."""
    out = io.StringIO()
    print_gate(report, console=Console(file=out, width=width))
    return out.getvalue()


def row(text: str, label: str) -> str:
    return next(line for line in text.split("\n") if line.startswith(label))


@pytest.mark.parametrize("name", ["pass", "fail", "modelled", "disturbed", "unmeasurable"])
def test_as_recorded_at_80_columns(name: str, golden: Any) -> None:
    golden(f"gate_{name}_terminal", shown(GATES[name]()))


# The headline -----------------------------------------------------------------------------------------------------


def first(report: GateReport) -> str:
    return shown(report, width=200).split("\n")[0]


def test_the_first_line_has_the_verdict_the_decisive_number_and_the_limit() -> None:
    said = "CPU time per inference: 1.11× [1.08, 1.14], limit: at most 5 % more (and 1 more limit failed)"
    assert first(failed_gate()) == f"FAIL  {said}"
    assert first(a_gate()) == "PASS  CPU time per inference: 1.00× [0.97, 1.03], limit: at most 5 % more"
    assert first(inconclusive_gate()).startswith("INCONCLUSIVE  CPU time per inference: 1.04× [0.98, 1.10], limit: ")


def test_an_absolute_limit_shows_the_heads_own_value() -> None:
    report = a_gate("fail", checks=[a_check("latency_p99_ms", limit_words("latency_p99_ms", "max", "20ms"), "fail")])
    assert first(report) == "FAIL  latency p99: 194 µs [192, 196], limit: at most 20ms"


@pytest.mark.parametrize(
    ("figure", "key", "value", "number"),
    [
        (CPU, "max_increase", 0.05, "1.02× [0.99, 1.05]"),
        (WATT, "max_decrease", 0.05, "0.98× [0.95, 1.01]"),
        (CPU, "max", "1ms", "133 µs [131, 134]"),
        (WATT, "min", 100, "3,017 [2,990, 3,044]"),
        ("size_bytes", "max", "5MB", "1.09 MB"),
        ("accuracy", "max_drop", 0.5, "−0.10 points [−0.4, +0.2]"),
        ("accuracy", "min", "90%", "91.54 %"),
    ],
)
def test_each_kind_of_limit_shows_the_number_that_it_is_about(figure: str, key: str, value: Any, number: str) -> None:
    limit = limit_words(figure, key, value, "points")
    text = first(a_gate(checks=[a_check(figure, limit)], figures=all_figures(1.02)))
    assert text.endswith(f": {number}, limit: {limit}")


def test_the_accuracy_that_fails_leads() -> None:
    report = a_gate(
        "fail",
        checks=[a_check(), a_check("accuracy", "loses at most 0.5 points", "fail", reason="loses 2.54 points")],
        accuracy=a_compared_accuracy(head=0.891, drop=2.54, low=1.6, high=3.4, p_value=2e-7),
    )
    assert first(report) == "FAIL  accuracy: −2.54 points [−3.4, −1.6], limit: loses at most 0.5 points"
    assert "p < 0.001 (exact McNemar test on the flips)" in shown(report, 200)


def test_modelled_joules_do_not_decide_and_cpu_seconds_are_shown_the_way_round_that_the_limit_is() -> None:
    text = first(modelled_gate(1.25, "fail"))
    number = "inferences per CPU second 0.80× [0.78, 0.82], limit: at most 5 % less"
    assert text == f"FAIL  inferences per joule: modelled joules don't decide; {number}"
    table = shown(modelled_gate(), 120)
    assert "  by CPU time per inference" in table and "(modelled)" in table and "modelled, boundary package" in table
    assert "modelled joules never decide by themselves" in table


def test_a_limit_on_its_own_figure_leads_before_one_that_another_decides() -> None:
    checks = [a_check(WATT, "at most 5 % less", decided_by=CPU), a_check()]
    assert first(a_gate(checks=checks, figures=all_figures(method="modelled"))).startswith(
        "PASS  CPU time per inference"
    )


def test_a_limit_on_joules_that_nothing_can_decide_gives_its_reason_and_no_modelled_number() -> None:
    reason = "joules are not measured here: it wants a meter"
    check = a_check("power_w", "at most 5 W", "inconclusive", reason=reason)
    text = shown(a_gate("inconclusive", checks=[check], figures=all_figures(method="modelled")), 200)
    assert text.startswith(f"INCONCLUSIVE  power: {reason}\n")
    assert "--time" not in text


def test_a_verdict_without_any_limit_is_its_reason() -> None:
    assert first(a_gate("inconclusive", reason="no limit was asked", checks=[])) == "INCONCLUSIVE  no limit was asked"


# Tables -----------------------------------------------------------------------------------------------------------


def test_every_limit_has_its_row_with_both_sides_ratio_floor_and_verdict() -> None:
    lines = shown(failed_gate()).split("\n")
    at = next(index for index, line in enumerate(lines) if line.startswith("CPU time per inference"))
    assert lines[at].split() == [
        "CPU",
        "time",
        "per",
        "inference",
        "130",
        "µs",
        "144",
        "µs",
        "1.11×",
        "1.2",
        "%",
        "FAIL",
    ]
    assert lines[at + 1].split() == ["at", "most", "5", "%", "more", "±0.8", "%", "±0.9", "%", "[1.08,", "1.14]"]
    assert row(shown(failed_gate()), "latency p99").endswith("pass")
    assert row(shown(failed_gate()), "accuracy").split() == [
        "accuracy",
        "91.64",
        "%",
        "91.54",
        "%",
        "−0.10",
        "points",
        "–",
        "pass",
    ]


def test_the_ratios_direction_is_stated() -> None:
    text = shown(failed_gate())
    assert row(text, "limit ").split()[-5:] == ["head", "÷", "base", "noise", "verdict"]
    assert "Ratios are head ÷ base with their 95 % interval." in text


def test_other_figures_say_better_worse_or_noise_and_limits_are_not_repeated() -> None:
    text = shown(failed_gate())
    others = text[text.index("without a limit") : text.index("Ratios are")]
    assert row(others, "throughput").endswith("0.90× [0.87, 0.93]  worse")
    assert row(others, "power").endswith("noise")
    assert row(others, "size").split()[-2:] == ["1.00×", "same"]
    assert "latency p99" not in others


def test_an_effect_no_larger_than_the_floor_is_noise_though_its_interval_excludes_none() -> None:
    assert change(CPU, around(1.10), 0.05) == "worse"
    assert change(CPU, around(1.10), 0.12) == "noise"
    assert change(CPU, around(1 / 1.11, 0.01), 0.12) == "noise"
    assert change(CPU, around(1.02), None) == "noise"
    assert change("throughput_per_s", around(1.10), 0.05) == "better"
    assert change(CPU, RatioFigure(value=1.10), None) == ""
    assert change("size_bytes", RatioFigure(value=0.5, low=0.5, high=0.5), None) == "better"
    assert change("peak_memory_bytes", RatioFigure(value=1.04, low=1.04, high=1.04), 0.06) == "noise"
    assert change(CPU, RatioFigure(value=None), 0.05) == ""


def test_missing_is_a_dash_and_never_zero() -> None:
    text = shown(unmeasurable_gate())
    assert row(text, "CPU time per inference ").split()[4:] == ["–", "130", "µs", "–", "–", "INCONCLUSIVE"]
    assert row(text, "inferences per joule").split()[-3:] == ["–", "–", "unavailable"]
    assert "unavailable: no energy counter, and Foo 1 is not in the power table" in text
    assert "Accuracy    not measured" in text
    assert "None" not in text and "nan" not in text


def test_numbers_that_are_not_finite_are_missing() -> None:
    broken = ComparedFigure(
        unit="s", base=1e-4, head=float("nan"), ratio=RatioFigure(value=float("nan"), low=float("-inf"), high=float("inf")),
        base_interval=(float("-inf"), float("inf")), floor=float("nan"),
    )  # fmt: skip
    text = shown(a_gate("inconclusive", checks=[a_check(verdict="inconclusive")], figures={CPU: broken}))
    assert row(text, "CPU time per inference ").split()[4:] == ["100", "µs", "–", "–", "–", "INCONCLUSIVE"]
    assert "inf " not in text and "nan" not in text


def test_a_figure_that_is_not_known_here_is_shown_by_its_name() -> None:
    odd = ComparedFigure(unit="widgets", base=2, head=3, ratio=around(1.5))
    assert row(shown(a_gate(figures={"wid_gets": odd})), "wid gets").split()[2:6] == [
        "2.00",
        "widgets",
        "3.00",
        "widgets",
    ]


# What it rests on -------------------------------------------------------------------------------------------------


def test_reasons_of_limits_that_do_not_simply_hold_stand_once() -> None:
    text = " ".join(shown(failed_gate()).split())
    assert text.count("CPU time per inference is 1.110× the base's [1.080, 1.140]") == 1
    assert "Why" not in shown(a_gate())


def test_a_reason_of_its_own_stands_under_the_headline() -> None:
    assert shown(failed_gate(reason="both were built twice")).split("\n")[2] == "both were built twice"


def test_accuracy_has_flips_and_the_p_value() -> None:
    text = shown(a_gate(), 200)
    assert "top-1 91.64 % → 91.54 %, −0.10 points [−0.4, +0.2], 12 lost / 11 gained of 1,017, p = 1 (exact" in text
    lower = a_compared_accuracy(
        metric="mse", unit="metric", higher_is_better=False, base=0.0123, head=0.013, drop=0.0007, low=None, high=None,
        flips_gained=None, p_value=None,
    )  # fmt: skip
    assert "mean squared error 0.0123 → 0.0130, +0.000700, n = 1,017\n" in shown(a_gate(accuracy=lower), 200)


def test_a_disturbed_run_is_marked_at_the_top_and_a_quiet_one_says_so() -> None:
    text = shown(disturbed_gate(), 200)
    assert text.split("\n")[1].startswith("Disturbed run: other processes used 31 %")
    assert "Conditions  disturbed: other processes used 31 % of the machine during the windows" in text
    assert "Conditions  quiet" in shown(a_gate())


def test_both_sides_say_what_they_are() -> None:
    text = shown(a_gate(), 200)
    assert "commit 0d12cd6f5c1e, built earlier (from the cache)" in text
    assert "commit 548d3c8f00ba, with changes that are not committed" in text
    assert "threads the default" in text
    bare = a_gate_side("main.onnx", path="main.onnx", kind="onnx", commit=None)
    assert "main.onnx: onnx, no commit\n" in shown(a_gate(base=bare), 200)


def test_joules_carry_method_boundary_window_refresh_n_idle_and_what_the_meter_cost() -> None:
    text = shown(a_gate(), 300)
    for said in (
        "counter, boundary package: RAPL energy counters: package-0",
        "gross (idle power included, the headline): 325 µJ → 325 µJ per inference; above idle: 211 µJ → 211 µJ",
        "idle: 1.70 W, models loaded, their processes asleep; idle policy: gross is the headline",
        "windows of 10.0 s, n = 16, the counter refreshes every 1.00 ms, at least 9,870 refreshes a window",
        "the meter itself: 0.002 % of one CPU while measuring",
    ):
        assert said in text
    assert "n = 12; n = 48 for CPU time per inference" in text


def test_the_probe_and_the_warm_up() -> None:
    text = shown(a_gate(), 2000)
    assert "probe: int8 93 % of its peak of 3.10 TOPS (5th percentile 78 %), n = 96, blocks discarded 1\n" in text
    assert "warm-up of base: 0.80 s, slices: 12, steady;" in text
    assert "warm-up of head: 3.0 s, slices: 58, NOT steady;" in text


def test_an_open_gate_says_what_to_do() -> None:
    text = " ".join(shown(inconclusive_gate()).split())
    assert "measure longer with --time" in text and "on a quieter machine" in text
    assert "on_inconclusive: pass in the gate's file lets it through" in text
    assert "What to do" not in shown(failed_gate()) + shown(a_gate())


def test_an_open_gate_that_is_let_through_says_so() -> None:
    report = inconclusive_gate(exit_code=0)
    assert "it was let through, because the gate's file says on_inconclusive: pass" in words.advice(report)
    assert "exit code 0" in shown(report)


def test_measuring_longer_is_no_advice_where_samples_are_missing() -> None:
    said = " ".join(words.advice(gate_without_accuracy()))
    assert "--time" not in said and "the reason stands with the limit" in said
    wide = a_check("accuracy", "loses at most 0.5 points", "inconclusive")
    said = " ".join(words.advice(a_gate("inconclusive", checks=[wide])))
    assert "--time" not in said and "more labelled samples" in said


# Any terminal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("name", GATES)
def test_nothing_is_cut_off_at_any_width(name: str, width: int) -> None:
    text = shown(GATES[name](), width)
    assert "…" not in text
    assert max(map(len, text.split("\n"))) <= width


@pytest.mark.parametrize("name", GATES)
def test_at_80_columns_no_number_is_broken(name: str) -> None:
    text = shown(GATES[name]())
    for limit in words.limit_rows(GATES[name]()):
        for cell in (limit.figure.base, limit.figure.head, limit.figure.ratio, limit.figure.interval):
            assert cell in text


def test_a_pipe_gets_no_escapes_and_no_trailing_spaces() -> None:
    text = shown(failed_gate())
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.split("\n"))


def test_colours_on_a_terminal_and_none_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    def terminal() -> str:
        out = io.StringIO()
        print_gate(failed_gate(), console=Console(file=out, width=80, force_terminal=True, color_system="standard"))
        return out.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;31mFAIL" in terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;31m" not in terminal() and "FAIL" in terminal()


def test_hostile_names_steer_nothing() -> None:
    report = a_gate(
        "fail", name="[red]x", base=a_gate_side("[bold]\x1b[2J\nb"), reason="[/]\x07",
        checks=[a_check(limit="[blink]\x1b]0;t\x07", verdict="fail", reason="[/bold]\nnext")], notes=["[dim]n"],
    )  # fmt: skip
    text = shown(report, 200)
    assert "\x1b" not in text and "\x07" not in text
    for said in ("[red]x", "[bold]�[2J b: bundle", "[blink]�]0;t�", "[/bold] next", "[dim]n"):
        assert said in text


def test_where_unicode_cannot_be_shown_ascii_is() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    print_gate(failed_gate(), console=Console(file=out, width=80))
    out.flush()
    assert raw.getvalue().decode("ascii").startswith("FAIL  CPU time per inference: 1.11x [1.08, 1.14]")


def test_lopsided_intervals_show_both_arms() -> None:
    odd = compared("latency_p99_ms", around(1.1)).model_copy(update={"head": 0.2, "head_interval": (0.19, 0.4)})
    report = a_gate(checks=[a_check("latency_p99_ms", "at most 20 ms")], figures={"latency_p99_ms": odd})
    assert words.limit_rows(report)[0].figure.head_spread == "−5 % +100 %"
