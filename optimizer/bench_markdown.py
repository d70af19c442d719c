"""A benchmark in Markdown, for a comment or a job's step summary: a column for each subject, and what it all rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from perwatt import bench_words as words
from perwatt import markdown as md
from perwatt import served_words as served
from perwatt.basis_words import condition_words, machine_words, measuring_words, run_words
from perwatt.figure_words import meaning_words
from perwatt.headline_words import headline

if TYPE_CHECKING:
    from collections.abc import Iterable

    from perwatt.bench_report import BenchReport

MARKER = md.comment("perwatt-bench")
REASON = 600
SHORT = 120


def render(report: BenchReport) -> str:
    """The whole text, at most 60,000 bytes; begins with `MARKER`."""
    rows = words.figure_rows(report)
    price = served.price_words(report)
    traffic = "At this traffic, idle time included" + (f" ({md.safe(price, SHORT)})" if price else "")
    return md.fitted([
        _head(report),
        _headed(served.closed_loop_words(report), _table(report, rows)),
        _headed(traffic, _table(report, served.traffic_rows(report)), served.FORMULA),
        _headed("Capacity, for requests at random times", _table(report, served.capacity_rows(report))),
        f"<sub>{md.safe(words.how_to_read(report))}</sub>",
        md.details("What each figure means", _meanings([row.name for row in rows])),
        md.details("How it was measured", _basis(report)),
    ])  # fmt: skip


def _head(report: BenchReport) -> str:
    lines = [f"{MARKER}\n### {md.safe(headline(report), REASON)}"]
    if report.disturbed:
        lines.append(f"> **Disturbed run**: {md.safe('; '.join(report.disturbed), REASON)}")
    return "\n\n".join(lines)


def _table(report: BenchReport, rows: list[words.Row]) -> str:
    if not rows:
        return ""
    noise = any(row.noise for row in rows)
    titles = ["", *(md.safe(label, SHORT) for label in words.labels(report)), *(["noise"] if noise else [])]
    return md.table(titles, [[_label(row), *map(_cell, row.cells), *([row.noise] if noise else [])] for row in rows])


def _label(row: words.Row) -> str:
    return f"{md.safe(row.label, SHORT)}{f' ({md.safe(row.note, SHORT)})' if row.note else ''}"


def _cell(cell: words.Cell) -> str:
    said = md.safe(cell.measured, SHORT)
    beside = " ".join(filter(None, [md.safe(cell.compared, SHORT), cell.change]))
    if cell.alarm:
        said = f"**{said}**"
    return f"{said}<br>{beside}" if beside else said


def _headed(heading: str, table: str, formula: str = "") -> str:
    said = [f"**{heading}**"] if heading else []
    said += [table, *([f"<sub>{md.safe(formula)}</sub>"] if formula else [])]
    return "\n\n".join(said) if table else ""


def _meanings(names: list[str]) -> str:
    return "\n".join(f"- **{name}**: {meaning}" for name, meaning in meaning_words(names))


def _basis(report: BenchReport) -> str:
    counts = [f"profile: {report.profile}", *filter(None, [words.counts_words(report)])]
    blocks = [
        _titled("Conditions", condition_words(report.disturbed)),
        *(
            _titled("Subject", [title, *words.subject_words(subject)])
            for title, subject in zip(words.subject_titles(report), report.subjects, strict=True)
        ),
        _titled("Joules", words.joules_words(report)),
        _titled("Noise", [] if report.noise_floor else [words.noise_words(report)]),
        _titled("Measuring", [*counts, *measuring_words(words.measuring(report))]),
        _titled("Machine", machine_words(report.machine)),
        _titled("Notes", report.notes),
        _titled("Run", [run_words(report.perwatt_version, report.seconds, report.created)]),
    ]
    return "\n\n".join(filter(None, blocks))


def _titled(title: str, items: Iterable[str]) -> str:
    said = md.bullets(items)
    return f"**{title}**\n\n{said}" if said else ""
