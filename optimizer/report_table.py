"""The before/after table of a report, as words: which figures, in which order and unit, and what each change means.

A change that its 95 % interval doesn't tell from none reads "≈ same": that is a statement about the measurement, not
about the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from perwatt.report_units import (
    MISSING,
    PLAIN,
    RATES,
    SIZES,
    TIMES,
    Units,
    in_units,
    known,
    percent_or_number,
    plain,
    ratio_words,
    signed,
)

if TYPE_CHECKING:
    from perwatt.report import (
        AccuracyReport,
        RatioFigure,
        Report,
        SideFigures,
    )

METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "mse": "mean squared error",
    "cosine": "cosine similarity",
    "agreement": "agreement with the original",
}
# A figure without an interval (size, peak memory) has changed when it moved by more than this.
SAME_WITHIN = 0.01
SAME_BETWEEN_RUNS = 0.05

Verdict = Literal["better", "worse", "same", "≈ same", "over budget", ""]


@dataclass(frozen=True)
class Line:
    """A row of the before/after table, as words. `note` says what the figure rests on: a method, a number of samples;
    `interval` is empty where there is none."""

    key: str
    label: str
    note: str
    before: str
    after: str
    ratio: str
    interval: str
    verdict: Verdict


@dataclass(frozen=True)
class Figure:
    """How one figure of a side is read, scaled to its base unit, named and judged."""

    key: str
    label: str
    units: Units
    read: Callable[[SideFigures], float | None]
    more_is_better: bool


FIGURES = (
    Figure("throughput_per_watt", "inferences per joule", PLAIN, lambda side: side.throughput_per_watt.value, True),
    Figure("cpu_s_per_inference", "CPU time / inference", TIMES, lambda side: side.cpu_s_per_inference, False),
    Figure("throughput_per_s", "throughput", RATES, lambda side: side.throughput_per_s, True),
    Figure("latency_p50_ms", "latency p50", TIMES, lambda side: _milli(side.latency_p50_ms), False),
    Figure("latency_p99_ms", "latency p99", TIMES, lambda side: _milli(side.latency_p99_ms), False),
    Figure("size_bytes", "size", SIZES, lambda side: side.size_bytes, False),
    Figure("peak_memory_bytes", "peak memory", SIZES, lambda side: side.peak_memory_bytes, False),
)


def _milli(value: float | None) -> float | None:
    return None if value is None else value / 1e3


def judged(ratio: RatioFigure, more_is_better: bool, same_within: float = SAME_WITHIN) -> Verdict:
    """What a ratio says, given its interval; without one, by a threshold."""
    value, low, high = known(ratio.value), known(ratio.low), known(ratio.high)
    if value is None:
        return ""
    if low is None or high is None or low == high:
        if abs(value - 1) <= same_within:
            return "same" if value == 1 else "≈ same"
    elif low <= 1 <= high:
        return "≈ same"
    return "better" if (value > 1) == more_is_better else "worse"


def energy_known(report: Report) -> bool:
    """Both sides have joules, by one method: two methods are never compared."""
    sides = (report.original, report.optimized)
    return _label(sides[0]) == _label(sides[1]) and all(known(s.throughput_per_watt.value) is not None for s in sides)


def _label(side: SideFigures) -> tuple[str, str | None]:
    return side.throughput_per_watt.method, side.throughput_per_watt.boundary


def lines(report: Report) -> list[Line]:
    """The rows of the table: what people pay for first, accuracy before size and memory."""
    rows = [_line(report, figure) for figure in FIGURES]
    if not energy_known(report):
        rows[0], rows[1] = rows[1], rows[0]
    rows.insert(5, _accuracy_line(report))
    return rows


def _line(report: Report, figure: Figure) -> Line:
    before, after = in_units([figure.read(report.original), figure.read(report.optimized)], figure.units)
    ratio: RatioFigure = getattr(report.ratio, figure.key)
    note = ""
    if figure.key == "throughput_per_watt":
        if not energy_known(report):
            return Line(figure.key, figure.label, "", before, after, why_no_energy(report), "", "")
        note = report.optimized.throughput_per_watt.method
    value, interval = ratio_words(ratio)
    return Line(figure.key, figure.label, note, before, after, value, interval, judged(ratio, figure.more_is_better))


def why_no_energy(report: Report) -> str:
    """In a word, why there is no ratio of joules."""
    labels = (_label(report.original), _label(report.optimized))
    missing = any(method == "unavailable" for method, _ in labels)
    return "unavailable" if missing or labels[0] == labels[1] else "not comparable"


def lines_of_two(a: Report, b: Report) -> list[Line]:
    """The optimized sides of two reports, B ÷ A: no intervals, because the two were not measured together."""
    from perwatt.report import RatioFigure

    rows = []
    for figure in FIGURES:
        one, two = known(figure.read(a.optimized)), known(figure.read(b.optimized))
        before, after = in_units([one, two], figure.units)
        if figure.key == "throughput_per_watt" and _label(a.optimized) != _label(b.optimized):
            rows.append(Line(figure.key, figure.label, "", before, after, "not comparable", "", ""))
            continue
        ratio = RatioFigure(value=two / one if one and two is not None else None)
        verdict = judged(ratio, figure.more_is_better, SAME_BETWEEN_RUNS)
        rows.append(Line(figure.key, figure.label, "", before, after, ratio_words(ratio)[0], "", verdict))
    return rows


def _accuracy_line(report: Report) -> Line:
    found = report.accuracy
    if found is None:
        return Line("accuracy", "accuracy", "", MISSING, MISSING, "not measured", "", "")
    before, after = (percent_or_number(v, found.unit) for v in (found.original, found.optimized))
    change, interval = accuracy_change(found)
    return Line(
        "accuracy", metric_name(found), f"n = {found.n:,}", before, after, change, interval, accuracy_verdict(found)
    )


def metric_name(found: AccuracyReport) -> str:
    """The metric's own name, spelled out where we know it."""
    return METRICS.get(found.metric, plain(found.metric))


def accuracy_verdict(found: AccuracyReport) -> Verdict:
    """The budget judges the point estimate; within it, the interval says whether there is a change at all."""
    if found.drop > found.max_drop + 1e-9:
        return "over budget"
    if found.low is not None and found.high is not None and found.low < found.high and found.low <= 0 <= found.high:
        return "≈ same"
    return "same" if found.drop == 0 else "better" if found.drop < 0 else "worse"


def accuracy_change(found: AccuracyReport) -> tuple[str, str]:
    """The change and its interval as the metric moved: ("−0.10 points", "[−0.4, +0.2]")."""
    sign = -1 if found.higher_is_better else 1
    value = sign * found.drop
    bounds = [] if found.low is None or found.high is None else sorted((sign * found.low, sign * found.high))
    half = (bounds[1] - bounds[0]) / 2 if bounds else 0.0
    if found.unit == "fraction":
        change, decimals = f"{signed(value, 2)} points", 2 if 0 < half < 0.1 else 1
    else:
        size = max(abs(value), half)
        decimals = max(2, 2 - math.floor(math.log10(size))) if size > 0 else 2
        change = signed(value, decimals)
    return change, f"[{', '.join(signed(bound, decimals) for bound in bounds)}]" if bounds else ""
