"""A gate's verdict in the terminal: headline, limits, the other figures, and what they rest on.

Words first and colours second; made for 80 columns, for pipes and for CI logs. rich is imported when something is shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from perwatt import gate_words as words
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

    from perwatt.gate_report import GateReport, GateSide, Verdict

VERDICT_STYLES: dict[Verdict, str] = {"pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow"}
ROOMY = 100
"""From this width on, notes and intervals stand beside what they belong to, and not under it."""


def print_gate(report: GateReport, console: Console | None = None, *, verbose: bool = True) -> None:
    """Show `report`; the last line says when and with which exit code. Without `verbose`, what the figures rest on is
    told in a few lines."""
    out = Output(console)
    out.line(f"{words.WORDS[report.verdict]}  {words.headline(report)}", VERDICT_STYLES[report.verdict])
    if words.reason(report):
        out.line(words.reason(report))
    if report.disturbed:
        out.line("Disturbed run: " + "; ".join(map(plain, report.disturbed)), "bold yellow")
    for warning in words.warnings(report):
        out.line(f"Warning: {warning}", "bold yellow")
    out.gap()
    wide = out.console.width >= ROOMY
    if report.checks:
        out.show(_limits(words.limit_rows(report)))
        out.gap()
    changed, rest = words.other_rows(report)
    if changed or rest:
        out.show(_others(changed + rest, wide))
        out.gap()
    out.line(words.HOW_TO_READ, "dim")
    out.gap()
    _sections(out, report, verbose)


def _sections(out: Output, report: GateReport, verbose: bool) -> None:
    out.section("Why", words.why(report))
    out.section("What to do", words.advice(report))
    out.section("Accuracy", [words.accuracy_words(report)])
    if verbose or not report.disturbed:
        out.section("Conditions", condition_words(report.disturbed))
    out.section("Base", _side(report.base, verbose))
    out.section("Head", _side(report.head, verbose))
    out.section("Joules", words.joules_words(report, brief=True)[: None if verbose else BRIEF_ENERGY])
    facts = report.measuring if verbose else brief_measuring(report.measuring)
    measured = [*filter(None, [words.counts_words(report)]), *measuring_words(facts, brief=True)]
    out.section("Measured", ["; ".join(measured)] if measured else [])
    if verbose:
        out.section("Machine", machine_words(report.machine)[:1])
    out.section("Notes", map(plain, report.notes))
    run = run_words(report.perwatt_version, report.seconds, report.created)
    more = "" if verbose else " (--verbose tells all that this rests on)"
    out.section("Run", [f"{plain(report.name)}: {run}, exit code {report.exit_code}{more}"])


def _side(side: GateSide, verbose: bool) -> list[str]:
    said = words.side_words(side)
    return said if verbose else [said[0], *map(plain, side.notes)]


def _limits(rows: list[words.LimitRow]) -> Table:
    table = new_table("limit", "base", "head", words.RATIO_TITLE, "noise", "verdict")
    for row in rows:
        figure = row.figure
        label = [_noted(figure.title, figure.note), f"  {row.limit}"]
        if row.decided_by is not None:
            label.append(f"  by {row.decided_by}")
        table.add_row(
            as_text("\n".join(label)),
            as_text(_under(figure.base, figure.base_spread)),
            as_text(_under(figure.head, figure.head_spread)),
            as_text(_under(figure.ratio, figure.interval)),
            as_text(figure.floor),
            as_text(row.verdict if row.verdict == "pass" else words.WORDS[row.verdict], VERDICT_STYLES[row.verdict]),
        )
    return table


def _others(rows: list[words.FigureRow], wide: bool) -> Table:
    table = new_table("without a limit", "base", "head", words.RATIO_TITLE, *(["noise"] if wide else []), "")
    for row in rows:
        style = STYLES.get(row.change, "dim")
        beside = [as_text(row.floor)] if wide else []
        table.add_row(
            as_text(f"{row.title} ({row.note})" if wide and row.note else _noted(row.title, row.note)),
            as_text(f"{row.base} {row.base_spread}".strip() if wide else row.base),
            as_text(f"{row.head} {row.head_spread}".strip() if wide else row.head),
            as_text(f"{row.ratio} {row.interval}".strip(), style),
            *beside,
            as_text(row.change, style),
        )
    return table


def _noted(title: str, note: str) -> str:
    # The boundary stands with the joules: beside it, a number would no longer fit into its line.
    return f"{title}\n  ({note.partition(',')[0]})" if note else title


def _under(value: str, interval: str) -> str:
    return f"{value}\n{interval}" if interval else value
