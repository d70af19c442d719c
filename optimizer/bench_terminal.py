"""A benchmark in the terminal: a column for each subject where they fit beside each other, else a block for each.

Words first and colours second; made for 80 columns and for pipes. rich is imported when something is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from perwatt import bench_words as words
from perwatt.basis_words import (
    BRIEF_ENERGY,
    brief_measuring,
    condition_words,
    machine_words,
    measuring_words,
    run_words,
)
from perwatt.report_units import plain
from perwatt.terminal import STYLES, Output, as_text, new_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from perwatt.bench_report import BenchReport

LABEL = 22
GAP = 2
TRAFFIC, CAPACITY = "At this traffic, idle time included", "Capacity"


def print_bench(report: BenchReport, console: Console | None = None, *, verbose: bool = True) -> None:
    """Show `report`. Without `verbose`, what the figures rest on is told in a few lines."""
    out = Output(console)
    out.line(words.headline(report), "bold")
    if report.disturbed:
        out.line("Disturbed run: " + "; ".join(map(plain, report.disturbed)), "bold yellow")
    out.gap()
    _tables(out, report)
    out.line(words.how_to_read(report), "dim")
    out.gap()
    _sections(out, report, verbose)


def _tables(out: Output, report: BenchReport) -> None:
    found = [
        ("", words.figure_rows(report)),
        (TRAFFIC, words.traffic_rows(report)),
        (CAPACITY, words.capacity_rows(report)),
    ]
    tables = [(heading, rows) for heading, rows in found if rows]
    labels = words.labels(report)
    every = [row for _, rows in tables for row in rows]
    shape = next((shape for shape in (_one_line, _two_lines) if _fits(every, labels, shape, out.console.width)), None)
    if shape is not None:
        for heading, rows in tables:
            _show(out, heading, _columns(rows, labels, shape))
        return
    for index, label in enumerate(labels):
        out.line(label, "bold reverse" if out.console.is_terminal else "")
        for heading, rows in tables:
            _show(out, heading, _block(rows, index))


def _show(out: Output, heading: str, table: Table) -> None:
    if heading:
        out.line(heading, "bold")
    table.columns[0].min_width = min(LABEL, out.console.width // 3)
    out.show(table)
    out.gap()


# Columns ----------------------------------------------------------------------------------------------------------

Shape = Callable[[words.Cell], list[str]]


def _one_line(cell: words.Cell) -> list[str]:
    return [cell.measured, *filter(None, [f"{cell.compared} {cell.change}".strip()])]


def _two_lines(cell: words.Cell) -> list[str]:
    return [cell.measured, *filter(None, [cell.compared, cell.change])]


def _fits(rows: list[words.Row], labels: list[str], shape: Shape, width: int) -> bool:
    """Whether a column for each subject leaves every cell in one piece. Reasons may wrap."""
    columns = max(LABEL, *(len(line) for row in rows for line in _label(row).split("\n")))
    for index, label in enumerate(labels):
        lines = [line for row in rows if not row.prose for line in shape(row.cells[index])]
        columns += GAP + max([min(len(label), words.LONGEST_NAME), *map(len, lines)])
    return columns <= width


def _columns(rows: list[words.Row], labels: list[str], shape: Shape) -> Table:
    # The last column of a table is for a word; here each cell has its own.
    table = new_table("", *labels, "")
    for row in rows:
        cells = [as_text("\n".join(shape(cell)), _style(cell)) for cell in row.cells]
        table.add_row(as_text(_label(row)), *cells, as_text(""))
    return table


def _label(row: words.Row) -> str:
    return f"{row.label}\n  ({row.note})" if row.note else row.label


def _style(cell: words.Cell) -> str:
    return "bold red" if cell.alarm else STYLES.get(cell.change, "dim" if cell.change else "")


# Blocks -----------------------------------------------------------------------------------------------------------


def _block(rows: list[words.Row], index: int) -> Table:
    compared = any(row.cells[index].ratio for row in rows)
    table = new_table("", "", *(["÷ the first"] if compared else []), "")
    for row in rows:
        cell = row.cells[index]
        # The boundary stands with the joules: on one line, a block is half as long.
        method = row.note.partition(",")[0]
        beside = [as_text(cell.compared, _style(cell))] if compared else []
        label = f"{row.label} ({method})" if method else row.label
        table.add_row(as_text(label), as_text(cell.measured, _style(cell) if cell.alarm else ""), *beside,
                      as_text(cell.change, _style(cell)))  # fmt: skip
    return table


# What it rests on -------------------------------------------------------------------------------------------------


def _sections(out: Output, report: BenchReport, verbose: bool) -> None:
    if verbose or not report.disturbed:
        out.section("Conditions", condition_words(report.disturbed))
    for title, subject in zip(words.subject_titles(report), report.subjects, strict=True):
        said = words.subject_words(subject)
        out.section("Subject", [title, *(said if verbose else [*said[:2], *map(plain, subject.notes)])])
    out.section("Joules", words.joules_words(report, brief=True)[: None if verbose else BRIEF_ENERGY])
    price = words.price_words(report)
    out.section("Price", [price] if price else [])
    if verbose:
        out.section("Noise", [words.noise_words(report)])
    facts = words.measuring(report) if verbose else brief_measuring(words.measuring(report))
    measured = [*filter(None, [words.counts_words(report)]), *measuring_words(facts, brief=True)]
    out.section("Measured", ["; ".join([f"profile: {report.profile}", *measured])])
    if verbose:
        out.section("Machine", machine_words(report.machine)[:1])
    out.section("Notes", map(plain, report.notes))
    more = "" if verbose else " (--verbose tells all that this rests on)"
    out.section("Run", [run_words(report.perwatt_version, report.seconds, report.created) + more])
