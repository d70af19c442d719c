"""A benchmark in the terminal: a column for each subject where they fit beside each other, else a block for each.

Words first and colours second; made for 80 columns and for pipes. rich is imported when something is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perwatt import bench_words as words
from perwatt import served_words as served
from perwatt.basis_words import (
    BRIEF_ENERGY,
    brief_measuring,
    condition_words,
    machine_words,
    measuring_words,
    run_words,
)
from perwatt.headline_words import headline
from perwatt.report_units import plain
from perwatt.terminal import STYLES, Output, as_text, new_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from perwatt.bench_report import BenchReport

LABEL = 22
NOISE = "noise"
GAP = 2
TRAFFIC, CAPACITY = "At this traffic, idle time included", "Capacity, for requests at random times"


@dataclass(frozen=True)
class _Part:
    """A table with its heading, and a word on how it is to be read."""

    heading: str
    rows: list[words.Row]
    formula: str = ""


def print_bench(report: BenchReport, console: Console | None = None, *, verbose: bool = True) -> None:
    """Show `report`. Without `verbose`, what the figures rest on is told in a few lines."""
    out = Output(console)
    out.line(headline(report), "bold")
    if report.disturbed:
        out.line("Disturbed run: " + "; ".join(map(plain, report.disturbed)), "bold yellow")
    out.gap()
    noise_shown = _tables(out, report)
    out.line(words.how_to_read(report), "dim")
    out.gap()
    _sections(out, report, verbose, noise_shown)


def _tables(out: Output, report: BenchReport) -> bool:
    """The tables, side by side where they fit; whether the noise had room in them."""
    found = [
        _Part(served.closed_loop_words(report), words.figure_rows(report)),
        _Part(TRAFFIC, served.traffic_rows(report), served.FORMULA),
        _Part(CAPACITY, served.capacity_rows(report)),
    ]
    parts = [part for part in found if part.rows]
    labels = words.labels(report)
    for noise in (True, False):
        for shape in (_one_line, _two_lines):
            if all(_fits(part.rows, labels, shape, noise, out.console.width) for part in parts):
                for part in parts:
                    _show(out, part, _columns(part.rows, labels, shape, noise), part.formula)
                return noise
    for index, label in enumerate(labels):
        out.line(label, "bold reverse" if out.console.is_terminal else "")
        for part in parts:
            _show(out, part, _block(part.rows, index), part.formula if index == len(labels) - 1 else "")
    return True


def _show(out: Output, part: _Part, table: Table, formula: str) -> None:
    if part.heading:
        out.line(part.heading, "bold")
    table.columns[0].min_width = min(LABEL, out.console.width // 3)
    out.show(table)
    if formula:
        out.line(formula, "dim")
    out.gap()


# Columns ----------------------------------------------------------------------------------------------------------

Shape = Callable[[words.Cell], list[str]]


def _one_line(cell: words.Cell) -> list[str]:
    return [cell.measured, *filter(None, [f"{cell.compared} {cell.change}".strip()])]


def _two_lines(cell: words.Cell) -> list[str]:
    return [cell.measured, *filter(None, [cell.compared, cell.change])]


def _fits(rows: list[words.Row], labels: list[str], shape: Shape, noise: bool, width: int) -> bool:
    """Whether a column for each subject leaves every cell in one piece. Reasons may wrap."""
    columns = max(LABEL, *(len(line) for row in rows for line in _label(row).split("\n")))
    columns += sum(GAP + needed for needed in _needed(rows, labels, shape))
    noises = [len(row.noise) for row in rows if row.noise] if noise else []
    return columns + (GAP + max(len(NOISE), *noises) if noises else 0) <= width


def _needed(rows: list[words.Row], labels: list[str], shape: Shape) -> list[int]:
    """How wide each subject's column must be."""
    lines = [[line for row in rows if not row.prose for line in shape(row.cells[i])] for i in range(len(labels))]
    return [
        max([min(len(label), words.LONGEST_NAME), *map(len, found)]) for label, found in zip(labels, lines, strict=True)
    ]


def _columns(rows: list[words.Row], labels: list[str], shape: Shape, noise: bool) -> Table:
    noise = noise and any(row.noise for row in rows)
    # The last column of a table is for a word; here each cell has its own.
    table = new_table("", *labels, *([NOISE] if noise else []), "")
    for row in rows:
        cells = [as_text("\n".join(shape(cell)), _style(cell)) for cell in row.cells]
        table.add_row(as_text(_label(row)), *cells, *([as_text(row.noise, "dim")] if noise else []), as_text(""))
    # Where there is too little room, it is the reasons that wrap.
    table.columns[0].no_wrap = True
    for column, needed in zip(table.columns[1:], _needed(rows, labels, shape), strict=False):
        column.min_width = needed
    return table


def _label(row: words.Row) -> str:
    return f"{row.label}\n  ({row.note})" if row.note else row.label


def _style(cell: words.Cell) -> str:
    return "bold red" if cell.alarm else STYLES.get(cell.change, "dim" if cell.change else "")


# Blocks -----------------------------------------------------------------------------------------------------------


def _block(rows: list[words.Row], index: int) -> Table:
    compared = any(row.cells[index].ratio for row in rows)
    # The noise is the same for all: beside the first there is room for it.
    noise = index == 0 and any(row.noise for row in rows)
    table = new_table("", "", *(["÷ the first"] if compared else []), *([NOISE] if noise else []), "")
    for row in rows:
        cell = row.cells[index]
        # The boundary stands with the joules: on one line, a block is half as long.
        method = row.note.partition(",")[0]
        beside = [as_text(cell.compared, _style(cell))] if compared else []
        beside += [as_text(row.noise, "dim")] if noise else []
        label = f"{row.label} ({method})" if method else row.label
        table.add_row(as_text(label), as_text(cell.measured, _style(cell) if cell.alarm else ""), *beside,
                      as_text(cell.change, _style(cell)))  # fmt: skip
    return table


# What it rests on -------------------------------------------------------------------------------------------------


def _sections(out: Output, report: BenchReport, verbose: bool, noise_shown: bool) -> None:
    if verbose or not report.disturbed:
        out.section("Conditions", condition_words(report.disturbed))
    for title, subject in zip(words.subject_titles(report), report.subjects, strict=True):
        said = words.subject_words(subject)
        out.section("Subject", [title, *(said if verbose else [*said[:2], *map(plain, subject.notes)])])
    out.section("Joules", words.joules_words(report, brief=True)[: None if verbose else BRIEF_ENERGY])
    price = served.price_words(report)
    out.section("Price", [price] if price else [])
    if not noise_shown or (verbose and not report.noise_floor):
        out.section("Noise", [words.noise_words(report)])
    facts = words.measuring(report) if verbose else brief_measuring(words.measuring(report))
    measured = [*filter(None, [words.counts_words(report)]), *measuring_words(facts, brief=True)]
    out.section("Measured", ["; ".join([f"profile: {report.profile}", *measured])])
    if verbose:
        out.section("Machine", machine_words(report.machine)[:1])
    out.section("Notes", map(plain, report.notes))
    more = "" if verbose else " (--verbose tells all that this rests on)"
    out.section("Run", [run_words(report.perwatt_version, report.seconds, report.created) + more])
