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
from perwatt.bench_report import BenchReport, Figure, Subject
from perwatt.bench_terminal import print_bench
from perwatt.report import RatioFigure
from perwatt.served_words import FORMULA

sys.path.insert(0, str(Path(__file__).parent))
from gates import CPU, MODELLED, NO_ENERGY, WATT, a_bench, a_subject, around, some_capacity, some_traffic

ROUGH = {
    **MODELLED,
    "uncertainty_factor": 2.2,
    "uncertainty": "a factor of 1.5 for a busy core; a factor of 2 for idle power; a first busy core costs up to 2.2 times "
    "the average core; " + "; ".join(f"reason {number} of many that make this text long" for number in range(12)),
}

PARSER = MarkdownIt("commonmark").enable("table")


def shown(report: BenchReport, width: int = 80) -> str:
    """What `print_bench` writes into a pipe of that width."""
    out = io.StringIO()
    print_bench(report, console=Console(file=out, width=width))
    return out.getvalue()


def brief(report: BenchReport, width: int) -> str:
    """The same without --verbose."""
    out = io.StringIO()
    print_bench(report, console=Console(file=out, width=width), verbose=False)
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
    assert first(a_bench(a_subject("resnet20-int8", first=True))) == f"resnet20-int8: {said}"


def test_modelled_joules_lead_with_two_digits_the_label_and_how_uncertain_the_model_is() -> None:
    report = a_bench(a_subject("a", first=True, method="modelled"), energy=ROUGH)
    said = "a: 3,100 inferences per joule (modelled, uncertain by about a factor of 2.2)"
    assert first(report) == f"{said}, 130 µs of CPU time per inference"
    unknown = a_bench(a_subject("a", first=True, method="modelled"), energy={**MODELLED, "uncertainty_factor": None})
    assert "(modelled, how uncertain is not stated)" in first(unknown)


def test_several_lead_with_the_best_and_by_how_much() -> None:
    assert first(a_bench()) == "resnet20-int8: 1.62× [1.60, 1.64] the inferences per joule of resnet20.onnx (counter)"
    assert first(five()).startswith("subject-4: 1.40× [1.38, 1.42]")
    slower = a_bench(a_subject("a", first=True), a_subject("b", 0.5))
    assert first(slower) == "b: 0.50× [0.48, 0.52] the inferences per joule of a (counter)"
    all_slower = a_bench(a_subject("a", first=True), a_subject("b", 0.5), a_subject("c", 0.8))
    best = "a is the best; next is c with 0.80× [0.78, 0.82] the inferences per joule of a (counter)"
    assert first(all_slower) == best


def without_joules(label: str, ratio: RatioFigure) -> Subject:
    return a_subject(label, method="unavailable", ratio_to_first={CPU: ratio})


def test_no_difference_beyond_the_noise_still_says_how_much_there_is() -> None:
    base = a_subject("a", first=True, method="unavailable")
    same, slower = without_joules("b", around(0.998, 0.012)), without_joules("c", around(1.3, 0.02))
    two = a_bench(base, same, energy=NO_ENERGY)
    assert first(two) == "no difference beyond the noise: b 1.00× [0.99, 1.01] the CPU time of a"
    three = a_bench(base, slower, same, energy=NO_ENERGY)
    assert (
        first(three)
        == "no difference beyond the noise: b, the best of the others, 1.00× [0.99, 1.01] the CPU time of a"
    )


def test_too_little_to_tell_or_to_compare_is_said() -> None:
    base = a_subject("a", first=True, method="unavailable")
    single = without_joules("b", RatioFigure(value=0.9))
    report = a_bench(base, single, energy=NO_ENERGY, noise_floor={})
    assert first(report) == "too little was measured to tell a difference: b 0.90× the CPU time of a"
    gone = a_bench(base, without_joules("b", RatioFigure(value=None)), energy=NO_ENERGY)
    assert first(gone) == "no ratio of CPU time to a: it was not measured of both"


def test_modelled_joules_do_not_decide_which_is_best() -> None:
    report = a_bench(
        a_subject("a", first=True, method="modelled"), a_subject("b", 1.62, method="modelled"), energy=MODELLED
    )
    joules = "modelled inferences per joule: a 3,100, b 5,000 (uncertain by about a factor of 1.5)"
    assert first(report) == f"b: 0.62× [0.60, 0.64] the CPU time of a; {joules}"
    many = [a_subject(f"s{number}", 1 + number / 10, first=not number, method="modelled") for number in range(5)]
    assert "modelled inferences per joule: s0 3,100, s4 4,300 (" in first(a_bench(*many, energy=MODELLED))
    assert "modelled joules never decide by themselves" in shown(report, 200)


# Columns and blocks -----------------------------------------------------------------------------------------------


def test_two_subjects_stand_beside_each_other_with_the_ratio_under_the_value() -> None:
    lines = shown(a_bench()).split("\n")
    at = next(index for index, line in enumerate(lines) if line.startswith("CPU time per inference"))
    assert lines[at].split()[4:] == ["130", "µs", "±1.2", "%", "80.2", "µs", "±1.2", "%", "1.5", "%"]
    assert lines[at + 1].strip() == "0.62× [0.60, 0.64] better"
    assert "Ratios are to resnet20.onnx, paired by block." in shown(a_bench(), 200)


def test_what_does_not_fit_becomes_a_block_for_each() -> None:
    text = shown(five())
    for number in range(5):
        assert f"\nsubject-{number}\n" in text
    assert row(text, "CPU time per inference").split()[4:] == ["130", "µs", "±1.2", "%", "1.5", "%"]
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
    assert row(text, "CPU time per inference").endswith("  5 %")
    assert "Noise       not measured" in shown(a_bench(noise_floor={}), 120)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("subjects", [1, 2, 3, 5])
def test_the_noise_of_each_figure_is_always_shown_beside_it_or_below(width: int, subjects: int) -> None:
    report = a_bench(*[a_subject(f"s{number}", 1 + number / 10, first=not number) for number in range(subjects)])
    report.noise_floor = {name: 0.0123 + index / 100 for index, name in enumerate(report.noise_floor)}
    text = brief(report, width)
    for floor in report.noise_floor.values():
        assert f"{100 * floor:.2g} %" in " ".join(text.split())
    said = "another run of the same model differs by about the noise (two processes: 5.2 % of CPU time)"
    assert said in " ".join(text.split())


def test_where_the_noise_is_not_known_another_run_may_differ_by_more() -> None:
    text = shown(a_bench(a_subject("a", first=True), noise_floor={}), 200)
    assert "±: 95 % interval within this run; another run of the same model may differ by more." in text
    assert "noise" not in text.split("\n")[2]


def test_two_methods_are_told_apart_cell_by_cell() -> None:
    other = a_subject("b", 1.5)
    other.ratio_to_first[WATT] = RatioFigure(value=None)
    report = a_bench(a_subject("a", first=True, method="modelled"), other)
    text = shown(report, 160)
    assert "3,100 (modelled, package) ±1.2 %" in row(text, "inferences per joule")
    assert "4,616 (counter, package) ±1.2 %" in row(text, "inferences per joule")
    assert first(report) == "b: 0.67× [0.65, 0.69] the CPU time of a"


def test_subjects_with_the_same_name_get_letters() -> None:
    text = shown(a_bench(a_subject("net", first=True), a_subject("net", 1.5)))
    assert "A net" in text and text.startswith("B net: 1.50× [1.48, 1.52] the inferences per joule of A net (counter)")


def test_long_paths_are_columns_by_letter_and_end_and_stand_whole_below() -> None:
    paths = [f"/builds/{number}/{'deep/' * 8}net.onnx" for number in range(2)]
    text = shown(a_bench(a_subject(paths[0], first=True), a_subject(paths[1], 1.5)), 160)
    assert text.split("\n")[2].split() == ["A", "net.onnx", "B", "net.onnx", "noise"]
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
    assert row(traffic, "requests asked for").split()[3:] == ["10", "/s"]
    assert row(traffic, "kWh per million requests").split()[4:] == ["0.0475"]
    assert row(traffic, "cost per million requests").split()[4:] == ["0.0142", "EUR"]
    lines = traffic.split("\n")
    for label in ("kWh per million requests", "cost per million requests"):
        assert lines[lines.index(row(traffic, label)) + 1] == "  (counter, package)"
    assert "\n" + FORMULA + "\n" in traffic and len(FORMULA) < 80
    assert row(traffic, "utilisation").split()[1:] == ["0.12", "%"]
    assert "Price       at 0.3 EUR per kWh" in text


def test_without_a_price_there_is_no_money() -> None:
    dear = some_traffic(cost_per_million=None, currency=None, price_per_kwh=None)
    text = shown(a_bench(a_subject("a", first=True, traffic=dear)))
    assert "cost" not in text and "Price" not in text and "kWh per million" in text
    assert "At this traffic" not in shown(a_bench()) and "its share of idle" not in shown(a_bench())


def test_modelled_money_has_two_digits_and_the_label() -> None:
    joules = Figure(value=0.17136, unit="J", low=0.17122, high=0.1714, n=4, method="modelled", boundary="package")
    report = a_bench(a_subject("a", first=True, traffic=some_traffic(energy_j_per_request=joules)))
    text = shown(report)
    traffic = text[text.index("At this traffic") :].split("\n")
    for label, said in (
        ("energy per request", "170 mJ ±<1 %"),
        ("kWh per million requests", "0.048"),
        ("cost per million requests", "0.014 EUR"),
    ):
        at = next(index for index, line in enumerate(traffic) if line.startswith(label))
        assert said in traffic[at] and traffic[at + 1] == "  (modelled, package)"
    assert "| kWh per million requests (modelled, package) | 0.048 |" in render(report)


@pytest.mark.parametrize(
    ("rate", "said"), [(40, "40 /s"), (1, "1 /s"), (5 / 60, "5 /min"), (1 / 60, "1 /min"), (2 / 3600, "2 /h")]
)
def test_a_rate_is_said_as_a_person_would(rate: float, said: str) -> None:
    text = shown(a_bench(a_subject("a", first=True, traffic=some_traffic(rate_per_s=rate))))
    assert row(text, "requests asked for").endswith(f"  {said}")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_percentiles_of_too_few_requests_are_not_told_but_why(width: int) -> None:
    few = some_traffic(requests=12, latency_p50_ms=0.2, latency_p99_ms=None)
    one, two = a_subject("a", first=True, traffic=few), a_subject("b", traffic=few)
    text = " ".join(shown(a_bench(one), width).split())
    assert "latency p99 –, from too few requests (12)" in text
    assert "latency p50 –, from" not in text and "latency p50 200 µs" in text
    # It wraps before it takes the room of the numbers.
    both = shown(a_bench(one, two), width)
    assert "from too few" in " ".join(both.split())
    if width >= 80:
        assert "\ncost per million requests  " in both and "\n  (counter, package)\n" in both
        assert row(both[both.index("At this") :], "latency p50").split()[2:] == ["200", "µs"] * 2
    gone = some_traffic(requests=603, latency_p99_ms=None)
    assert "too few" not in shown(a_bench(a_subject("a", first=True, traffic=gone)), width)


def test_of_a_batch_requests_are_calls_and_throughput_counts_items() -> None:
    batched = a_subject(
        "a",
        first=True,
        scenario="server",
        traffic=some_traffic(items_per_request=8),
        capacity=some_capacity(items_per_request=8),
    )
    text = shown(a_bench(batched), 120)
    assert text.startswith("a: 4,120 requests/s of 8 items each within p99 ≤ 5 ms")
    assert "a new call whenever one has ended; throughput counts items, 8 a call;" in text
    assert row(text, "requests asked for").endswith("10 /s of 8 items each")


def test_a_backlog_that_grew_is_said() -> None:
    late = a_subject("a", first=True, traffic=some_traffic(sustained=False, latency_p99_ms=None))
    text = shown(a_bench(late))
    assert row(text, "sustained").endswith("no: the backlog grew")
    assert row(text[text.index("At this") :], "latency p99").endswith("–")


def test_capacity_has_the_rate_the_bound_and_why_it_ended() -> None:
    text = shown(alone())
    capacity = text[text.index("\nCapacity") :]
    assert row(capacity, "capacity").split() == ["capacity", "4,120", "requests/s"]
    assert row(capacity, "latency bound").split()[2:] == ["p99", "≤", "5", "ms"]
    assert row(capacity, "latency p99 at that rate").endswith("  4.31 ms")
    assert row(capacity, "utilisation there").endswith("  62 %")
    assert row(capacity, "energy per request there").endswith("  412 µJ ±0.73 %")
    assert row(capacity, "rates tried").endswith("  1")
    assert row(capacity, "ended because").endswith("the bracket is within 3 %")
    none = some_capacity(rate_per_s=None, ended="no rate held")
    text = shown(a_bench(a_subject("a", first=True, capacity=none), a_subject("b")))
    assert row(text[text.index("\nCapacity") :], "capacity").split() == ["capacity", "none", "–"]


def test_the_headline_of_a_server_is_its_capacity() -> None:
    said = "resnet20-int8: 4,120 requests/s within p99 ≤ 5 ms, 412 µJ per request (counter)"
    assert first(alone()) == said
    dark = some_capacity(energy_j_per_request=None, latency_ms=None)
    bare = a_bench(a_subject("a", first=True, capacity=dark))
    assert first(bare) == "a: 4,120 requests/s within p99 ≤ 5 ms"
    assert row(shown(bare), "latency p99 at that rate").endswith("  –")
    none = some_capacity(rate_per_s=None, ended="the fastest of all requests took 20 ms, and 5 ms are allowed")
    why = "the fastest of all requests took 20 ms, and 5 ms are allowed"
    assert (
        first(a_bench(a_subject("a", first=True, capacity=none))) == f"a: no rate of requests within p99 ≤ 5 ms: {why}"
    )
    two = a_bench(a_subject("a", first=True, capacity=some_capacity()), a_subject("b", capacity=none))
    assert first(two) == "within p99 ≤ 5 ms: a 4,120 requests/s, b none"


def test_closed_loop_figures_are_not_taken_for_those_of_requests_at_random_times() -> None:
    server = a_subject("a", first=True, scenario="server", capacity=some_capacity())
    said = "Closed loop, a new call whenever one has ended; requests at random times: below\n"
    assert said in shown(a_bench(server)) and said.strip() in render(a_bench(server))
    single = a_subject("a", first=True, traffic=some_traffic())
    assert "Closed loop, one call after another; " in shown(a_bench(single))
    assert "Closed loop" not in shown(a_bench()) + render(a_bench())


# Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 200])
def test_sizes_are_in_units_for_people_in_every_form(width: int) -> None:
    sizes = [3_812_345, 38, None, 3_812_345, 4_100_000]
    many = [a_subject(f"s{n}", first=not n, size_bytes=size, ratio_to_first={}) for n, size in enumerate(sizes)]
    for subjects in (many[:1], many[:2], many):
        text = shown(a_bench(*subjects), width)
        assert "3.81 MB" in row(text, "size") and "812," not in text
        assert "812," not in render(a_bench(*subjects))


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
    assert text.startswith("b: 0.67× [0.65, 0.69] the CPU time of a\n")
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
    assert "<br>0.71× [0.69, 0.73] better | 1.5 % |" in text
    assert "\n**At this traffic, idle time included (at 0.3 EUR per kWh)**\n" in render(alone())
    assert "| capacity | 4,120 requests/s |" in render(alone())
    assert "\n<sub>energy per request = its own above idle + its share of idle power at this rate</sub>\n" in render(
        alone()
    )


def test_markdown_says_in_words_what_it_rests_on_and_cuts_no_word() -> None:
    facts = {
        "processor": "Foo 1", "load_average": [0.2, 0.1, 0.1], "temperatures_c": {"core": 41.0}, "governor": "performance",
        "frequency_mhz": {"lowest": 2100.0, "highest": 2900.0, "max": 3900.0, "allowed_max": None, "from": "cpufreq"},
    }  # fmt: skip
    later = {**facts, "load_average": [1.5, 0.3, 0.1]}
    machine = {
        "fingerprint": {"name": "Foo 1", "cpus": 2}, "facts": facts, "facts_after": later, "steal_share": 0.0,
        "others_share": 0.658,
    }  # fmt: skip
    probe = {"peak_tops": {"int8": 2.1}, "n": 3}
    text = render(a_bench(machine=machine, energy={**ROUGH, "watts": {"busy_core": 4.9}}, measuring={"probe": probe}))
    for said in (
        "- frequency: 2,100 to 2,900 MHz, at most 3,900 MHz (cpufreq)\n",
        "- load average: 0.2, 0.1, 0.1 before, 1.5, 0.3, 0.1 after\n",
        "- temperature: core 41 °C\n",
        "- frequency governor: performance\n",
        "- other processes used 66 % of the machine's CPU time in the windows\n",
        "- the hypervisor took 0 % of the machine's CPU time in the windows\n",
        "- uncertainty: a factor of 2 for idle power\n",
    ):
        assert said in text
    for dumped in ("facts", "watts", "probe", "lowest", "…"):
        assert dumped not in text


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


@pytest.mark.parametrize(
    ("text", "most", "said"),
    [
        ("a few words too many", 12, "a few words…"),
        ("a few words too many", 13, "a few words…"),
        ("a few words too many", 14, "a few words…"),
        ("a few words too many", 15, "a few words…"),
        ("a few words too many", 20, "a few words too many"),
        ("x" * 99, 50, "x" * 49 + "…"),
        ("a " + "x" * 99, 50, "a " + "x" * 47 + "…"),
    ],
)
def test_markdown_cuts_at_the_end_of_a_word_where_there_is_one(text: str, most: int, said: str) -> None:
    assert md.safe(text, most) == said
