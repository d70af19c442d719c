"""What a benchmark says of every subject, in sentences and formatted rows: terminal and Markdown say the same thing. The
headline is in `perwatt.headline_words`, traffic and capacity in `perwatt.served_words`.

Nothing here knows colours, columns or tags. Missing figures read "–", never 0. Ratios are to the first subject.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perwatt.basis_words import energy_words, point_words, uncertainty_words, warm_up_words
from perwatt.figure_words import Change, by_method, change, in_order, n_words, percent, spread, title
from perwatt.report_units import MISSING, known, plain, ratio_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from perwatt.bench_report import BenchReport, Figure, Subject
    from perwatt.report import RatioFigure

LONGEST_NAME = 26
EXACT = ("size_bytes", "peak_memory_bytes")
LEAST_MODELLED = 0.01
"""Of a modelled figure: a narrower interval would only say that idle power, a constant, is most of it."""
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
    sentences, which may wrap. `noise`: how far apart two processes of one subject were."""

    name: str
    label: str
    note: str
    cells: list[Cell]
    prose: bool = False
    noise: str = ""


# Figures ----------------------------------------------------------------------------------------------------------


def figure_of(subject: Subject, name: str) -> Figure:
    """That figure of a subject, those that are counted included; without a value where it has none."""
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
    found = [figure_of(subject, name) for subject in report.subjects]
    shown, note, notes = labelled(found)
    floor = report.noise_floor.get(name)
    cells = []
    for index, (figure, value) in enumerate(zip(found, shown, strict=True)):
        own = f" ({notes[index]})" if notes[index] and not note else ""
        ratio = _ratio(report, index, name) if index else None
        words = ratio_words(ratio) if ratio is not None else ("", "")
        said = change(name, ratio, floor) if ratio is not None else ""
        cells.append(Cell(value + own, sure(figure), *words, said))
    measured = known(floor) is not None and any(value != MISSING for value in shown)
    return Row(name, title(name), note, cells, noise=percent(floor) if measured else "")


def sure(figure: Figure) -> str:
    """The interval relative to the value; of what is modelled, no narrower than `LEAST_MODELLED`."""
    value, low, high = (known(bound) for bound in (figure.value, figure.low, figure.high))
    if figure.method == "modelled" and value and low is not None and high is not None:
        arm = max(high - value, value - low) / abs(value)
        if 0 < arm < LEAST_MODELLED:
            return f"±<{percent(LEAST_MODELLED)}"
    return spread(value, low, high)


def labelled(found: Sequence[Figure | None]) -> tuple[list[str], str, list[str]]:
    """Figures of one kind: each in words, what all of them rest on (empty where they differ), and what each rests on."""
    unit = next((figure.unit for figure in found if figure is not None and figure.unit), "")
    shown = by_method(unit, [(None, None) if figure is None else (figure.value, figure.method) for figure in found])
    notes = ["" if figure is None else _basis(figure) for figure in found]
    some = {note for note, figure in zip(notes, found, strict=True) if figure is not None}
    return shown, some.pop() if len(some) == 1 else "", notes


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
    ours, theirs = known(figure_of(subject, name).value), known(figure_of(first, name).value)
    exact = name in EXACT and ours is not None and theirs
    return RatioFigure(value=ours / theirs if exact and ours is not None and theirs else None)


def noise_words(report: BenchReport) -> str:
    """How far apart two processes of one and the same subject were, figure by figure."""
    floors = {name: floor for name, floor in report.noise_floor.items() if known(floor) is not None}
    if not floors:
        return "not measured"
    return ", ".join(f"{title(name)} {percent(floors[name])}" for name in in_order(list(floors)))


# Sentences --------------------------------------------------------------------------------------------------------


def subject_words(subject: Subject) -> list[str]:
    """What was measured and how it was run; warm-up; notes."""
    first = [plain(subject.kind), *([plain(subject.path)] if subject.path != subject.label else [])]
    point = {name: value for name, value in subject.operating_point.items() if name != "scenario"}
    run = point_words(point, subject.execution_precision)
    said = [
        ", ".join(first),
        f"on {plain(subject.target)}, {plain(subject.scenario)}" + (f": {run}" if run else ""),
    ]
    said.append(f"warm-up: {warm_up_words(subject.warm_up)}")
    return [*said, *map(plain, subject.notes)]


def joules_words(report: BenchReport, *, brief: bool = False) -> list[str]:
    """How the joules were come by, gross and idle-subtracted of each subject side by side."""
    gross, above = (_each(report, name) for name in ("energy_j_per_inference", "energy_above_idle_j_per_inference"))
    return energy_words(report.energy, gross, above, brief=brief)


def _each(report: BenchReport, name: str) -> str:
    shown, _, _ = labelled([figure_of(subject, name) for subject in report.subjects])
    return "" if all(text == MISSING for text in shown) else " / ".join(shown)


def counts_words(report: BenchReport) -> str:
    """How many windows stand behind the figures of the first subject."""
    found = report.subjects[0].figures
    return n_words({name: found[name].n for name in in_order(list(found))})


def how_to_read(report: BenchReport) -> str:
    """What ±, ratios and noise are, and what a model of the machine's power adds."""
    floor = known(report.noise_floor.get(CPU))
    differs = "may differ by more" if floor is None else "differs by about the noise"
    apart = "" if floor is None else f" (two processes: {percent(floor)} of CPU time)"
    several = len(report.subjects) > 1
    shown = "± and [ ]: 95 % intervals" if several else "±: 95 % interval"
    said = [f"{shown} within this run; another run of the same model {differs}{apart}."]
    if several:
        said.append(
            f"Ratios are to {labels(report)[0]}, paired by block. Marked noise: the interval includes 1, or two processes "
            "of the same model were as far apart."
        )
    if any(figure.method == "modelled" for subject in report.subjects for figure in subject.figures.values()):
        said.append(f"Modelled figures are {uncertainty_words(report.energy) or 'uncertain'}, whatever the ± says.")
    return " ".join(said)


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
