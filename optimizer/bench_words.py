"""What a benchmark says, in sentences and formatted rows: terminal and Markdown say the same thing.

Nothing here knows colours, columns or tags. Missing figures read "–", never 0. Ratios are to the first subject.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from perwatt.basis_words import energy_words, point_words, warm_up_words
from perwatt.figure_words import Change, change, in_order, n_words, percent, spread, title, values
from perwatt.report_units import MISSING, compact, duration, known, number, plain, ratio_words, with_interval

if TYPE_CHECKING:
    from perwatt.bench_report import BenchReport, Capacity, Figure, Subject, Traffic
    from perwatt.report import RatioFigure

LONGEST_NAME = 26
EXACT = ("size_bytes", "peak_memory_bytes")
WATT, CPU = "throughput_per_watt", "cpu_s_per_inference"


@dataclass(frozen=True)
class Cell:
    """What one subject has to say to one row: a value, how sure it is, its ratio to the first with interval, and what
    that ratio says. Empty where there is nothing to say. `alarm`: the row's figures don't mean what they seem to."""

    value: str
    spread: str = ""
    ratio: str = ""
    interval: str = ""
    change: Change = ""
    alarm: bool = False

    @property
    def measured(self) -> str:
        """The value with how sure it is."""
        return f"{self.value} {self.spread}".strip()

    @property
    def compared(self) -> str:
        """The ratio with its interval."""
        return f"{self.ratio} {self.interval}".strip()


@dataclass(frozen=True)
class Row:
    """A row: a cell for each subject. `note`: method and boundary, where they are the same for all. `prose`: its cells are
    sentences, which may wrap."""

    name: str
    label: str
    note: str
    cells: list[Cell]
    prose: bool = False


# Figures ----------------------------------------------------------------------------------------------------------


def headline(report: BenchReport) -> str:
    """The one line to remember: what the only subject does, or which is best and by how much."""
    names = labels(report)
    if len(names) == 1:
        return f"{names[0]}: {_lead_words(report.subjects[0])}"
    name = _lead(report)
    floor = report.noise_floor.get(name)
    found = [subject.ratio_to_first.get(name) for subject in report.subjects]
    better = [(r, i) for i, r in enumerate(found) if i and r is not None and change(name, r, floor) == "better"]
    if not better:
        return f"nothing has {_more(name)} {title(name)} than {names[0]} beyond the noise"
    ratio, best = (max if name == WATT else min)(better, key=lambda pair: pair[0].value or 0.0)
    said = f"{names[best]}: {with_interval(ratio)} the {title(name)} of {names[0]}"
    method = _figure(report.subjects[best], name).method if name == WATT else None
    return f"{said} ({method})" if method else said


def _more(name: str) -> str:
    return "more" if name == WATT else "less"


def _lead(report: BenchReport) -> str:
    """What leads: inferences per joule where all subjects have a ratio of them, else CPU time. Modelled joules don't
    decide which is best."""
    ratios = [subject.ratio_to_first.get(WATT) for subject in report.subjects[1:]]
    modelled = any(_figure(subject, WATT).method == "modelled" for subject in report.subjects)
    return WATT if not modelled and all(r is not None and known(r.value) is not None for r in ratios) else CPU


def _lead_words(subject: Subject) -> str:
    watt, cpu = _figure(subject, WATT), _figure(subject, CPU)
    took = f"{values(cpu.unit, [cpu.value])[0]} of CPU time per inference"
    if known(watt.value) is None:
        return took
    return f"{values(watt.unit, [watt.value])[0]} inferences per joule ({watt.method or 'method not stated'}), {took}"


def _figure(subject: Subject, name: str) -> Figure:
    from perwatt.bench_report import Figure

    found = subject.figures.get(name)
    if found is not None:
        return found
    if name in EXACT:
        value = getattr(subject, name)
        return Figure(value=None if value is None else float(value), unit="B", n=0 if value is None else 1)
    return Figure(value=None, unit="")


def figure_rows(report: BenchReport) -> list[Row]:
    """Every figure that a subject has, with size and memory last."""
    names = [name for subject in report.subjects for name in subject.figures]
    return [_figure_row(report, name) for name in in_order([*dict.fromkeys([*names, *EXACT])])]


def _figure_row(report: BenchReport, name: str) -> Row:
    found = [_figure(subject, name) for subject in report.subjects]
    units = [figure.unit for figure in found if figure.unit]
    shown = values(units[0] if units else "", [figure.value for figure in found])
    notes = [_basis(figure) for figure in found]
    note = notes[0] if len(set(notes)) == 1 else ""
    cells = []
    for index, (figure, value) in enumerate(zip(found, shown, strict=True)):
        own = f" ({notes[index]})" if notes[index] and not note else ""
        ratio = _ratio(report, index, name) if index else None
        words = ratio_words(ratio) if ratio is not None else ("", "")
        said = change(name, ratio, report.noise_floor.get(name)) if ratio is not None else ""
        cells.append(Cell(value + own, spread(figure.value, figure.low, figure.high), *words, said))
    return Row(name, title(name), note, cells)


def _basis(figure: Figure) -> str:
    if figure.method in (None, "unavailable"):
        return figure.method or ""
    return ", ".join(filter(None, (figure.method, figure.boundary)))


def _ratio(report: BenchReport, index: int, name: str) -> RatioFigure:
    """The ratio as measured; of what is counted, the quotient."""
    from perwatt.report import RatioFigure

    subject, first = report.subjects[index], report.subjects[0]
    if name in subject.ratio_to_first:
        return subject.ratio_to_first[name]
    ours, theirs = known(_figure(subject, name).value), known(_figure(first, name).value)
    exact = name in EXACT and ours is not None and theirs
    return RatioFigure(value=ours / theirs if exact and ours is not None and theirs else None)


def noise_words(report: BenchReport) -> str:
    """How far apart two processes of the first subject were, figure by figure."""
    floors = {name: floor for name, floor in report.noise_floor.items() if known(floor) is not None}
    if not floors:
        return "not measured"
    return ", ".join(f"{title(name)} {percent(floors[name])}" for name in in_order(list(floors)))


# Traffic and capacity ---------------------------------------------------------------------------------------------


def traffic_rows(report: BenchReport) -> list[Row]:
    """What the traffic that was asked about costs, idle time included; nothing where none was asked about."""
    found = [subject.traffic for subject in report.subjects]
    if not any(found):
        return []

    def measured(name: str, label: str, read: Callable[[Traffic], Figure]) -> Row:
        figures = [None if traffic is None else read(traffic) for traffic in found]
        unit = next((figure.unit for figure in figures if figure is not None), "")
        shown = values(unit, [None if figure is None else figure.value for figure in figures])
        spreads = ["" if figure is None else spread(figure.value, figure.low, figure.high) for figure in figures]
        notes = [_basis(figure) for figure in figures if figure is not None]
        note = notes[0] if len(set(notes)) == 1 else ""
        return Row(name, label, note, [Cell(*pair) for pair in zip(shown, spreads, strict=True)])

    def plainly(name: str, label: str, read: Callable[[Traffic], str]) -> Row:
        return Row(name, label, "", [Cell(MISSING if traffic is None else read(traffic)) for traffic in found])

    def latency(name: str, label: str, read: Callable[[Traffic], float | None]) -> Row:
        shown = values("ms", [None if traffic is None else read(traffic) for traffic in found])
        return Row(name, label, "", [Cell(value) for value in shown])

    rows = [
        plainly("rate", "requests a second", lambda t: f"{number(t.rate_per_s)} /s"),
        plainly("requests", "served", lambda t: f"{t.requests:,} in {duration(t.seconds)}"),
        measured("energy_j_per_request", "energy per request", lambda t: t.energy_j_per_request),
        measured("power_w", "power", lambda t: t.power_w),
        measured("idle_power_w", "idle power", lambda t: t.idle_power_w),
        latency("latency_p50_ms", "latency p50", lambda t: t.latency_p50_ms),
        latency("latency_p99_ms", "latency p99", lambda t: t.latency_p99_ms),
        plainly("utilisation", "utilisation", lambda t: percent(t.utilisation)),
        Row("sustained", "sustained", "", [_sustained(traffic) for traffic in found]),
        plainly("kwh_per_million", "kWh per million", lambda t: number(t.kwh_per_million)),
    ]
    if any(traffic is not None and traffic.price_per_kwh is not None for traffic in found):
        rows.append(plainly("cost_per_million", "cost per million", _cost_words))
    return rows


def _sustained(traffic: Traffic | None) -> Cell:
    if traffic is None:
        return Cell(MISSING)
    return Cell("yes") if traffic.sustained else Cell("no: the backlog grew", alarm=True)


def _cost_words(traffic: Traffic) -> str:
    if known(traffic.cost_per_million) is None:
        return MISSING
    return f"{number(traffic.cost_per_million)} {plain(traffic.currency or '')}".strip()


def price_words(report: BenchReport) -> str:
    """What a kilowatt hour was taken to cost; empty where no price was given."""
    for subject in report.subjects:
        traffic = subject.traffic
        if traffic is not None and traffic.price_per_kwh is not None:
            return f"at {compact(traffic.price_per_kwh)} {plain(traffic.currency or '')}".strip() + " per kWh"
    return ""


def capacity_rows(report: BenchReport) -> list[Row]:
    """The highest rate whose latency stays within the bound; nothing where it was not looked for."""
    found = [subject.capacity for subject in report.subjects]
    if not any(found):
        return []

    def plainly(name: str, label: str, read: Callable[[Capacity], str]) -> Row:
        return Row(name, label, "", [Cell(MISSING if capacity is None else read(capacity)) for capacity in found])

    return [
        plainly("rate", "capacity", lambda c: MISSING if known(c.rate_per_s) is None else f"{number(c.rate_per_s)} /s"),
        plainly("bound", "latency bound", _bound_words),
        plainly("tries", "rates tried", lambda c: f"{len(c.tries):,}"),
        replace(plainly("ended", "ended because", lambda c: plain(c.ended)), prose=True),
    ]


def _bound_words(capacity: Capacity) -> str:
    share = 100 * capacity.percentile if capacity.percentile < 1 else capacity.percentile
    return f"p{compact(share)} ≤ {values('ms', [capacity.bound_ms])[0]}"


# Sentences --------------------------------------------------------------------------------------------------------


def subject_words(subject: Subject) -> list[str]:
    """What was measured and how it was run; warm-up; notes."""
    first = [plain(subject.kind), *([plain(subject.path)] if subject.path != subject.label else [])]
    point = point_words(subject.operating_point, subject.execution_precision)
    said = [
        ", ".join(first),
        f"on {plain(subject.target)}, {plain(subject.scenario)}" + (f": {point}" if point else ""),
    ]
    said.append(f"warm-up: {warm_up_words(subject.warm_up)}")
    return [*said, *map(plain, subject.notes)]


def joules_words(report: BenchReport, *, brief: bool = False) -> list[str]:
    """How the joules were come by, gross and idle-subtracted of each subject side by side."""
    gross, above = (_each(report, name) for name in ("energy_j_per_inference", "energy_above_idle_j_per_inference"))
    return energy_words(report.energy, gross, above, brief=brief)


def _each(report: BenchReport, name: str) -> str:
    found = [_figure(subject, name) for subject in report.subjects]
    shown = values("J", [figure.value for figure in found])
    return "" if all(text == MISSING for text in shown) else " / ".join(shown)


def counts_words(report: BenchReport) -> str:
    """How many windows stand behind the figures of the first subject."""
    found = report.subjects[0].figures
    return n_words({name: found[name].n for name in in_order(list(found))})


def how_to_read(report: BenchReport) -> str:
    """What ±, ratios and noise are; shorter where there is nothing to compare."""
    said = "± and intervals: 95 %."
    if len(report.subjects) > 1:
        said += (
            f" Ratios are to {labels(report)[0]}, paired by block. Noise: the interval includes 1, or two "
            "processes of the same model were as far apart."
        )
    return said


def labels(report: BenchReport) -> list[str]:
    """Short names for columns: the labels; where two are alike or one is long, a letter and the end of the path."""
    found = [plain(subject.label) for subject in report.subjects]
    ends = [name.rstrip("/").rpartition("/")[2] or name for name in found]
    if len(found) == 1:
        return ends
    if len(set(found)) == len(found) and max(map(len, found)) <= LONGEST_NAME:
        return found
    return [f"{_letter(index)} {end}" for index, end in enumerate(ends)]


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"{_letter(index // 26 - 1)}{_letter(index % 26)}"


def subject_titles(report: BenchReport) -> list[str]:
    """The short name, and the label where it is another."""
    pairs = zip(labels(report), (plain(subject.label) for subject in report.subjects), strict=True)
    return [short if short == label else f"{short}: {label}" for short, label in pairs]


def measuring(report: BenchReport) -> dict[str, Any]:
    """How it was measured, without the warm-up, which stands with each subject."""
    return {name: value for name, value in report.measuring.items() if name != "warm_up"}
