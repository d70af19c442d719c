"""What a report says, in words and human units: the terminal and the HTML page say the same thing.

Nothing here knows colours, columns or tags. Missing figures read "–", never 0. A change that its 95 % interval doesn't
tell from none reads "≈ same": that is a statement about the measurement, not about the model.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from perwatt.report_units import (
    JOULES,
    MISSING,
    PLAIN,
    RATES,
    SIZES,
    TIMES,
    Units,
    in_units,
    inverse,
    known,
    number,
    percent_or_number,
    plain,
    ratio_words,
    signed,
    with_interval,
)

if TYPE_CHECKING:
    from perwatt.report import (
        AccuracyReport,
        CandidateReport,
        PassReport,
        RatioFigure,
        RatioFigures,
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
SYMBOLS = {"applied": "✓", "unchanged": "–", "refused": "✗", "rolled-back": "✗", "not-chosen": "✗"}
STATUS_WORDS = {"rolled-back": "rolled back", "not-chosen": "not chosen"}
FIGURE_WORDS = {
    "throughput_per_watt": "inferences per joule",
    "cpu_s_per_inference": "CPU time",
    "cpu_s_ratio": "CPU time",
    "throughput_per_s": "throughput",
    "throughput_ratio": "throughput",
    "latency_p50_ms": "latency p50",
    "latency_p99_ms": "latency p99",
    "energy_j_per_inference": "joules per inference",
    "size_bytes": "size",
    "size_ratio": "size",
    "drop": "accuracy drop",
}
CHANGES_SHOWN = 3
# A figure without an interval (size, peak memory) has changed when it moved by more than this.
SAME_WITHIN = 0.01

Verdict = Literal["better", "worse", "same", "≈ same", "over budget", ""]


@dataclass(frozen=True)
class Line:
    """A row of the before/after table, as words. `ratio` and `interval` are empty where there is nothing to compare."""

    key: str
    label: str
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


# The table ------------------------------------------------------------------------------------------------------


def judged(ratio: RatioFigure, more_is_better: bool) -> Verdict:
    """What a ratio says, given its interval; without one, by a threshold."""
    value, low, high = known(ratio.value), known(ratio.low), known(ratio.high)
    if value is None:
        return ""
    if low is None or high is None:
        if abs(value - 1) <= SAME_WITHIN:
            return "same" if value == 1 else "≈ same"
    elif low <= 1 <= high:
        return "same" if low == high else "≈ same"
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
    label = figure.label
    if figure.key == "throughput_per_watt":
        if not energy_known(report):
            return Line(figure.key, label, before, after, _why_no_energy(report), "", "")
        label = f"{label}, {report.optimized.throughput_per_watt.method}"
    value, interval = ratio_words(ratio)
    return Line(figure.key, label, before, after, value, interval, judged(ratio, figure.more_is_better))


def _why_no_energy(report: Report) -> str:
    methods = (report.original.throughput_per_watt.method, report.optimized.throughput_per_watt.method)
    return "unavailable" if "unavailable" in methods or methods[0] == methods[1] else "not comparable"


def lines_of_two(a: Report, b: Report) -> list[Line]:
    """The optimized sides of two reports, B ÷ A: no intervals, because the two were not measured together."""
    from perwatt.report import RatioFigure

    rows = []
    for figure in FIGURES:
        one, two = known(figure.read(a.optimized)), known(figure.read(b.optimized))
        before, after = in_units([one, two], figure.units)
        if figure.key == "throughput_per_watt" and _label(a.optimized) != _label(b.optimized):
            rows.append(Line(figure.key, figure.label, before, after, "not comparable", "", ""))
            continue
        ratio = RatioFigure(value=two / one if one and two is not None else None)
        rows.append(
            Line(figure.key, figure.label, before, after, ratio_words(ratio)[0], "", judged(ratio, figure.more_is_better))
        )
    return rows


def _accuracy_line(report: Report) -> Line:
    found = report.accuracy
    if found is None:
        return Line("accuracy", "accuracy", MISSING, MISSING, "not measured", "", "")
    label = f"{metric_name(found)} (n = {found.n:,})"
    before, after = (percent_or_number(v, found.unit) for v in (found.original, found.optimized))
    change, interval = accuracy_change(found)
    return Line("accuracy", label, before, after, change, interval, accuracy_verdict(found))


def metric_name(found: AccuracyReport) -> str:
    """The metric's own name, spelled out where we know it."""
    return METRICS.get(found.metric, plain(found.metric))


def accuracy_verdict(found: AccuracyReport) -> Verdict:
    """The budget judges the point estimate; within it, the interval says whether there is a change at all."""
    if found.drop > found.max_drop + 1e-9:
        return "over budget"
    if found.low <= 0 <= found.high:
        return "same" if found.low == found.high else "≈ same"
    return "better" if found.drop < 0 else "worse"


def accuracy_change(found: AccuracyReport) -> tuple[str, str]:
    """The change and its interval as the metric moved: ("−0.10 points", "[−0.4, +0.2]")."""
    falls = found.higher_is_better
    value = -found.drop if falls else found.drop
    low, high = (-found.high, -found.low) if falls else (found.low, found.high)
    half = (high - low) / 2
    if found.unit == "fraction":
        decimals = 1 if half >= 0.1 or half == 0 else 2
        return f"{signed(value, 2)} points", f"[{signed(low, decimals)}, {signed(high, decimals)}]"
    size = max(abs(value), half)
    decimals = max(2, 2 - math.floor(math.log10(size))) if size > 0 else 2
    return signed(value, decimals), f"[{signed(low, decimals)}, {signed(high, decimals)}]"


# Sentences ------------------------------------------------------------------------------------------------------


def gain(figures: RatioFigures, energy: bool) -> tuple[RatioFigure, str]:
    """The figure that leads, as more-is-better, and its name: inferences per joule, else per CPU second."""
    if energy and known(figures.throughput_per_watt.value) is not None:
        return figures.throughput_per_watt, "inferences per joule"
    return inverse(figures.cpu_s_per_inference), "inferences per CPU second"


def headline(report: Report) -> str:
    """The one line to remember."""
    if report.outcome == "unchanged":
        return f"unchanged: {plain(report.reason)}"
    if report.outcome == "budget_not_met":
        return f"budget not met: {plain(report.reason)}"
    ratio, name = gain(report.ratio, energy_known(report))
    return f"{ratio_words(ratio)[0]} the {name}"


def subject(report: Report) -> str:
    """What was optimized for what: model, target, scenario, batch."""
    target = report.target
    where = ", ".join(plain(target[key]) for key in ("backend", "device", "scenario") if target.get(key))
    batch = f", batch {target['batch']}" if target.get("batch") is not None else ""
    return f"{plain(report.model.get('name', 'model'))} on {plain(target.get('name', 'target'))} ({where}{batch})"


def accuracy_words(found: AccuracyReport) -> list[str]:
    """The change with its flips and the budget; what was unseen; the original as the backend runs it."""
    before, after = (percent_or_number(v, found.unit) for v in (found.original, found.optimized))
    first = f"{metric_name(found)} {before} → {after}, {' '.join(accuracy_change(found))}"
    if found.flips_lost is not None and found.flips_gained is not None:
        first += f", {found.flips_lost:,} lost / {found.flips_gained:,} gained of {found.n:,}"
    else:
        first += f", n = {found.n:,}"
    unit = " points" if found.unit == "fraction" else ""
    over = found.drop > found.max_drop + 1e-9
    said = [first, f"{'over' if over else 'within'} the budget of {number(found.max_drop)}{unit}; the point estimate decides"]
    if found.n_unseen < found.n:
        said.append(f"nothing was chosen on {found.n_unseen:,} of the {found.n:,} samples")
    if found.original_as_run is not None:
        said.append(f"the original at the backend's own precision: {percent_or_number(found.original_as_run, found.unit)}")
    return said


def pass_words(row: PassReport, every_change: bool = False) -> str:
    """What a pass did and what it brought, or why it did not."""
    reason = plain(row.reason) if row.reason else ""
    if row.status not in ("applied", "unchanged"):
        return f"{STATUS_WORDS.get(row.status, row.status)}: {reason or 'no reason recorded'}{_brought(row)}"
    if row.status == "unchanged":
        return reason or "nothing to do on this model"
    shown = row.changes if every_change else row.changes[:CHANGES_SHOWN]
    more = len(row.changes) - len(shown)
    did = "; ".join([*map(plain, shown), *([f"and {more} more"] if more else [])]) or "applied"
    return did + (f" ({reason})" if reason else "") + _brought(row)


def _brought(row: PassReport) -> str:
    said = measured_words(row.measured or {})
    return f"; measured: {said}" if said else ""


def measured_words(measured: Mapping[str, Any]) -> str:
    """Ratios with their intervals, anything else as it is."""
    return ", ".join(f"{_figure_name(name)} {_value_words(value)}" for name, value in measured.items() if value is not None)


def _figure_name(key: object) -> str:
    return FIGURE_WORDS.get(str(key), plain(key).replace("_", " "))


def _value_words(value: Any) -> str:
    if isinstance(value, Mapping) and "value" in value:
        from perwatt.report import RatioFigure

        return with_interval(RatioFigure(**{name: value.get(name) for name in ("value", "low", "high")}))
    return value_words(value)


def value_words(value: Any) -> str:
    """Any plain value of a report for a person."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{plain(name).replace('_', ' ')} {value_words(inner)}" for name, inner in value.items()) or MISSING
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(value_words, value)) or MISSING
    return plain(value)


def joules_words(report: Report) -> list[str]:
    """How the joules were come by; where there are none, why, and what leads instead."""
    energy = report.energy
    how = plain(energy.get("how") or "no reason recorded")
    if not energy_known(report):
        why = how if _why_no_energy(report) == "unavailable" else "the two sides were not metered by the same method"
        return [f"unavailable: {why}", "CPU time per inference leads instead"]
    side = report.optimized.throughput_per_watt
    said = [f"{side.method}, boundary {side.boundary or 'not stated'}: {how}"]
    before, after = in_units([s.energy_j_per_inference.value for s in (report.original, report.optimized)], JOULES)
    said.append(f"{before} → {after} per inference")
    if energy.get("uncertainty"):
        said.append(f"uncertainty: {value_words(energy['uncertainty'])}")
    if side.method == "modelled":
        said.append("modelled joules never decide by themselves: CPU seconds per inference do")
    return said


def point_words(report: Report) -> list[str]:
    """The headline ratio and the graph's own share, as two figures where they differ, each with its name."""
    energy = energy_known(report)
    (best, name), (graph, _) = gain(report.ratio, energy), gain(report.ratio_graph, energy)
    if report.ratio == report.ratio_graph and report.original.operating_point == report.optimized.operating_point:
        return [f"both sides ran at the same operating point: {with_interval(best)} {name} is the graph's own share"]
    return [
        f"{with_interval(best)} {name}, each side at its best permitted operating point (the headline)",
        f"{with_interval(graph)} {name}, both sides at the same operating point (the graph's own share)",
    ]


def eager_words(report: Report) -> str | None:
    """torch eager beside it, where torch is in play."""
    eager = report.torch_eager
    if eager is None:
        return None
    [cpu] = in_units([eager.cpu_s_per_inference], TIMES)
    stands = f"torch {plain(eager.version)} eager, float32, same batch: {cpu} of CPU per inference"
    value = known(eager.cpu_s_ratio.value)
    if not value:
        return stands
    if value > 1:
        return f"{with_interval(eager.cpu_s_ratio)} the CPU seconds of torch eager ({stands})"
    return f"{with_interval(inverse(eager.cpu_s_ratio))} fewer CPU seconds than torch eager ({stands})"


def candidate_words(row: CandidateReport) -> str:
    """What was measured of a candidate, and why it ended as it did."""
    figures = {"cpu_s_ratio": row.cpu_s_ratio, "throughput_ratio": row.throughput_ratio}
    said = [f"{FIGURE_WORDS[name]} {with_interval(ratio)}" for name, ratio in figures.items() if ratio is not None]
    if row.drop is not None:
        said.append(f"accuracy drop {signed(row.drop, 2)}")
    return "; ".join([plain(row.reason), *([", ".join(said)] if said else [])])


def operating_point_words(side: SideFigures) -> list[tuple[str, str]]:
    """How a side was run; what was left to the backend says so."""
    point = [
        (plain(name).replace("_", " "), "the backend's default" if value is None else value_words(value))
        for name, value in side.operating_point.items()
    ]
    return [*point, ("execution precision, as the backend reported it", plain(side.execution_precision))]


def deploy_words(bundle: Path | None) -> tuple[str, str]:
    """The two commands that run a bundle: in Python, and without perwatt."""
    folder = "PATH/TO/THIS/FOLDER" if bundle is None else str(bundle)
    script = "run.py" if bundle is None else str(bundle / "run.py")
    return f"perwatt.load({json.dumps(folder, ensure_ascii=False)}).run(x)", f"python {shlex.quote(script)}"
