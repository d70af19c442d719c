"""What a report says, in sentences: the terminal and the HTML page say the same thing.

Nothing here knows colours, columns or tags. Missing figures read "–", never 0.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perwatt.report_table import accuracy_change, energy_known, metric_name, why_no_energy
from perwatt.report_units import (
    JOULES,
    MISSING,
    TIMES,
    compact,
    duration,
    in_units,
    inverse,
    known,
    percent_or_number,
    plain,
    ratio_words,
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

SYMBOLS = {"applied": "✓", "unchanged": "–", "refused": "–", "rolled-back": "✗", "not-chosen": "✗"}
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
    "inferences_per_cpu_s_ratio": "inferences per CPU second",
}
DROPS = ("drop", "accuracy_drop")
CHANGES_SHOWN = 3
NOTHING = "nothing to do on this model"


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
    energy = energy_known(report)
    ratio, name = gain(report.ratio, energy)
    value, interval = ratio_words(ratio)
    method = f", {report.optimized.throughput_per_watt.method}" if energy else ""
    return " ".join(word for word in (value, "the", name, interval) if word) + method


def title(report: Report) -> str:
    """The headline without its interval: the largest letters of a page carry one number."""
    if report.outcome != "optimized":
        return headline(report).split(":")[0]
    ratio, name = gain(report.ratio, energy_known(report))
    return f"{ratio_words(ratio)[0]} the {name}"


def basis(report: Report) -> str:
    """What the headline's number rests on: its interval, and how the joules were come by. Empty without a gain."""
    if report.outcome != "optimized":
        return ""
    energy = energy_known(report)
    interval = ratio_words(gain(report.ratio, energy)[0])[1]
    side = report.optimized.throughput_per_watt
    said = [f"95 % interval {interval}"] if interval else []
    return "; ".join([*said, f"joules {side.method} ({side.boundary})" if energy else "joules unavailable"])


def subject(report: Report) -> str:
    """What was optimized for what: model, target, scenario, batch."""
    target = report.target
    where = ", ".join(plain(target[key]) for key in ("backend", "device", "scenario") if target.get(key))
    batch = f", batch {target['batch']}" if target.get("batch") is not None else ""
    return f"{plain(report.model.get('name', 'model'))} on {plain(target.get('name', 'target'))} ({where}{batch})"


def accuracy_words(found: AccuracyReport) -> list[str]:
    """The change with its flips and the budget; what was unseen; the original as the backend runs it."""
    before, after = (percent_or_number(v, found.unit) for v in (found.original, found.optimized))
    first = f"{metric_name(found)} {before} → {after}, {' '.join(accuracy_change(found)).strip()}"
    if found.flips_lost is not None and found.flips_gained is not None:
        first += f", {found.flips_lost:,} lost / {found.flips_gained:,} gained of {found.n:,}"
    else:
        first += f", n = {found.n:,}"
    unit = " points" if found.unit == "fraction" else ""
    over = found.drop > found.max_drop + 1e-9
    budget = f"the budget of {compact(found.max_drop)}{unit}; the point estimate decides"
    said = [first, f"{'over' if over else 'within'} {budget}"]
    if found.n_unseen < found.n:
        said.append(f"nothing was chosen on {found.n_unseen:,} of the {found.n:,} samples")
    if found.original_as_run is not None:
        as_run = percent_or_number(found.original_as_run, found.unit)
        said.append(f"the original at the backend's own precision: {as_run}")
    return said


def drop_unit(report: Report) -> str:
    """The unit in which drops of this report are: points for accuracies, nothing where it isn't known."""
    return " points" if report.accuracy is not None and report.accuracy.unit == "fraction" else ""


def accuracy_moved(drop: float, unit: str = "") -> str:
    """A drop, positive is worse, without a sign to puzzle over: "0.1 points worse"."""
    return f"{compact(abs(drop), 2)}{unit} {'worse' if drop > 0 else 'better'}" if drop else "as before"


def pass_words(row: PassReport, every_change: bool = False, unit: str = "") -> str:
    """What a pass did and what it brought, or why it did not; `unit` is that of a drop in accuracy."""
    where = f"behind {', '.join(map(plain, row.behind))}: " if row.behind else ""
    return where + _pass_words(row, every_change, unit)


def _pass_words(row: PassReport, every_change: bool, unit: str) -> str:
    reason = plain(row.reason) if row.reason else ""
    if row.status not in ("applied", "unchanged"):
        why = f"{STATUS_WORDS.get(row.status, row.status)}: {reason or 'no reason recorded'}{_brought(row, unit)}"
        return f"{why} (it did: {_did(row, every_change)})" if row.changes else why
    if row.status == "unchanged":
        return reason or NOTHING
    return (_did(row, every_change) or "applied") + (f" ({reason})" if reason else "") + _brought(row, unit)


def _did(row: PassReport, every_change: bool) -> str:
    """What a pass changed, the most telling first: its first words, what it left and why, how many nodes there are now."""
    first, rest = row.changes[:1], row.changes[1:]
    told = [*first, *sorted(rest, key=lambda text: 0 if " left: " in text else 1 if " nodes: " in text else 2)]
    shown = told if every_change else told[:CHANGES_SHOWN]
    more = len(told) - len(shown)
    return "; ".join([*map(plain, shown), *([f"and {more} more"] if more else [])])


def _brought(row: PassReport, unit: str) -> str:
    said = measured_words(row.measured or {}, unit)
    return f"; measured: {said}" if said else ""


def measured_words(measured: Mapping[str, Any], unit: str = "") -> str:
    """Ratios with their intervals, drops as better or worse, anything else as it is."""
    found = {name: value for name, value in measured.items() if value is not None}
    return ", ".join(
        f"accuracy {accuracy_moved(value, unit)}"
        if name in DROPS and isinstance(value, int | float)
        else f"{_figure_name(name)} {_value_words(value)}"
        for name, value in found.items()
    )


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
        return compact(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {said}" for name, said in facts(value)) or MISSING
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(value_words, value)) or MISSING
    return plain(value)


def facts(plain_data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Plain data as names and values for a person."""
    return [(plain(name).replace("_", " "), value_words(value)) for name, value in plain_data.items()]


def joules_words(report: Report) -> list[str]:
    """How the joules were come by; where there are none, why, and what leads instead."""
    energy = report.energy
    how = plain(energy.get("how") or "no reason recorded")
    if not energy_known(report):
        why = how if why_no_energy(report) == "unavailable" else "the two sides were not metered by the same method"
        return [f"unavailable: {why}", "CPU time per inference leads instead"]
    side = report.optimized.throughput_per_watt
    said = [f"{side.method}, boundary {side.boundary or 'not stated'}: {how}"]
    before, after = in_units([s.energy_j_per_inference.value for s in (report.original, report.optimized)], JOULES)
    said.append(f"{before if before == after else f'{before} → {after}'} per inference")
    if energy.get("uncertainty"):
        said.append(f"uncertainty: {value_words(energy['uncertainty'])}")
    if side.method == "modelled":
        said.append("modelled joules never decide by themselves: CPU seconds per inference do")
    return said


def point_words(report: Report) -> list[str]:
    """The headline ratio and the graph's own share, as two figures where they differ, each with its name."""
    if report.outcome == "unchanged" and report.ratio.cpu_s_per_inference.value == 1:
        return []
    energy = energy_known(report)
    (best, name), (graph, _) = gain(report.ratio, energy), gain(report.ratio_graph, energy)
    if report.ratio == report.ratio_graph and report.original.operating_point == report.optimized.operating_point:
        return [f"both sides ran at the same operating point: {with_interval(best)} {name} is the graph's own share"]
    if report.ratio == report.ratio_point:
        return [f"{with_interval(best)} {name}, all of it by the operating point: the graph is the original's own"]
    said = [
        f"{with_interval(best)} {name}, each side at its own operating point (the headline)",
        f"{with_interval(graph)} {name}, both sides at the shipped operating point, each in its floating precision "
        "(the graph's share)",
    ]
    if report.ratio_point is not None:
        point, _ = gain(report.ratio_point, energy)
        said.append(
            f"{with_interval(point)} {name}, the original's graph at the two points (the operating point's share)"
        )
    return said


def tuning_words(report: Report) -> list[str]:
    """What operating points were searched, and what became of each."""
    if report.tuning is None:
        return []
    points = report.tuning["points"]
    said = [f"{len(points)} operating points in {duration(report.tuning['seconds'])}"]
    for point in points:
        plain_point = {name: value for name, value in point["operating_point"].items() if name != "scenario"}
        set_values = ", ".join(
            f"{name.replace('_', ' ')} {value_words(v)}" for name, v in plain_point.items() if v is not None
        )
        cpu = point["figures"].get("cpu_s_per_inference")
        cost = in_units([cpu], TIMES)[0] + " of CPU per inference" if cpu is not None else "not measured"
        said.append(f"{set_values}: {cost}{', ' + plain(point['reason']) if point['reason'] else ''}")
    return said


UNEVEN = 2.0
"""An interval whose ends differ by more than this factor says that the machine was busy, and nothing else."""


def eager_words(report: Report) -> str | None:
    """torch eager beside it, where torch is in play."""
    eager = report.torch_eager
    if eager is None:
        return None
    [cpu] = in_units([eager.cpu_s_per_inference], TIMES)
    stands = f"torch {plain(eager.version)} eager, float32, same batch: {cpu} of CPU per inference"
    value, low, high = (known(x) for x in (eager.cpu_s_ratio.value, eager.cpu_s_ratio.low, eager.cpu_s_ratio.high))
    if not value:
        return stands
    if low and high and high / low > UNEVEN:
        return f"measured too unevenly to be quoted (the machine was busy): {stands}"
    if value > 1:
        return f"{with_interval(eager.cpu_s_ratio)} the CPU seconds of torch eager ({stands})"
    return f"{with_interval(inverse(eager.cpu_s_ratio))} fewer CPU seconds than torch eager ({stands})"


def candidate_words(row: CandidateReport, unit: str = "") -> str:
    """What was measured of a candidate, and why it ended as it did."""
    figures = {"cpu_s_ratio": row.cpu_s_ratio, "throughput_ratio": row.throughput_ratio}
    said = [f"{FIGURE_WORDS[name]} {with_interval(ratio)}" for name, ratio in figures.items() if ratio is not None]
    if row.drop is not None:
        said.append(f"accuracy {accuracy_moved(row.drop, unit)}")
    return "; ".join([plain(row.reason), *([", ".join(said)] if said else [])])


def backend_words(report: Report) -> list[str]:
    """What became of the backends that an alias stood for and that were not taken: the best answer of each."""
    taken = next((row.backend for row in report.candidates if row.verdict == "shipped"), None)
    others = dict.fromkeys(row.backend for row in report.candidates if row.backend not in (None, taken))
    return [_beside_words(report, name) for name in others if name is not None and taken is not None]


def _beside_words(report: Report, backend: str) -> str:
    rows = [row for row in report.candidates if row.backend == backend]
    # The first is what the others are compared with.
    itself = report.candidates[0]
    if itself in rows:
        return f"{plain(backend)}: the original runs best there, and nothing beats what is shipped"
    allowed = [
        row for row in rows if row.drop is None or report.accuracy is None or row.drop <= report.accuracy.max_drop
    ]
    rates = [(rate, row) for row in allowed if (rate := _rate(report, row)) is not None]
    if not rates:
        return f"{plain(backend)}: {plain(rows[0].reason) or 'not measured'}"
    rate, best = max(rates, key=lambda pair: pair[0].value or 0.0)
    answer = plain(best.name.replace(f" on {backend}", "", 1))
    unit = "inferences per second" if _on_gpu(report) else "inferences per CPU second"
    return f"{plain(backend)}: at its best {with_interval(rate)} the original's {unit} ({answer})"


def _rate(report: Report, row: CandidateReport) -> RatioFigure | None:
    """How many times the original's inferences a candidate does, by what decides there; None where it wasn't measured."""
    found = row.throughput_ratio if _on_gpu(report) else row.cpu_s_ratio and inverse(row.cpu_s_ratio)
    return found if found is not None and known(found.value) is not None else None


def _on_gpu(report: Report) -> bool:
    return bool(report.target.get("device") == "gpu")


def operating_point_words(side: SideFigures) -> list[tuple[str, str]]:
    """How a side was run; what was left to the backend says so."""
    point = [
        (plain(name).replace("_", " "), "backend's default" if value is None else value_words(value))
        for name, value in side.operating_point.items()
    ]
    return [*point, ("precision as run", plain(side.execution_precision))]


def deploy_words(bundle: Path | None) -> tuple[str, str]:
    """The two commands that run a bundle: in Python, and without perwatt."""
    folder = "PATH/TO/THIS/FOLDER" if bundle is None else str(bundle)
    script = "run.py" if bundle is None else str(bundle / "run.py")
    return f"perwatt.load({json.dumps(folder, ensure_ascii=False)}).run(x)", f"python {shlex.quote(script)}"
