"""A gate's verdict in Markdown, for a pull request's comment and a job's step summary: headline, limits, the other
figures (noise folded apart), what each figure means, and what it all rests on. Never more than a comment may hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from perwatt import gate_words as words
from perwatt import markdown as md
from perwatt.basis_words import condition_words, machine_words, measuring_words, run_words
from perwatt.figure_words import meaning_words

if TYPE_CHECKING:
    from collections.abc import Iterable

    from perwatt.gate_report import GateReport, Verdict

SYMBOLS: dict[Verdict, str] = {"pass": "✓", "fail": "✗", "inconclusive": "?"}
REASON = 600
SHORT = 120
MOST_WARNINGS = 8


def marker(name: str) -> str:
    """The hidden first line by which a later run finds the comment of the gate of this name, to update it."""
    return md.comment(f"perwatt-gate: {name}")


def render(report: GateReport) -> str:
    """The whole text, at most 60,000 bytes; begins with `marker(report.name)`."""
    changed, rest = words.other_rows(report)
    names = [*(check.figure for check in report.checks), *(row.name for row in changed + rest)]
    return md.fitted([
        _head(report),
        _limits(report),
        _titled("Why", words.why(report)),
        _titled("What to do", words.advice(report)),
        f"**Accuracy**: {md.safe(words.accuracy_words(report))}",
        f"<sub>{md.safe(words.HOW_TO_READ)}</sub>",
        md.details(f"Other figures that changed ({len(changed)})", _others(changed)),
        md.details(f"Within the noise, the same, or not measured ({len(rest)})", _others(rest)),
        md.details("What each figure means", _meanings(names)),
        md.details("How it was measured", _basis(report)),
    ])  # fmt: skip


def _head(report: GateReport) -> str:
    word = f"{SYMBOLS[report.verdict]} {words.WORDS[report.verdict]}"
    lines = [f"{marker(report.name)}\n### {word}: {md.safe(words.headline(report), REASON)}"]
    if words.reason(report):
        lines.append(md.safe(words.reason(report), REASON))
    if report.disturbed:
        lines.append(f"> **Disturbed run**: {md.safe('; '.join(report.disturbed), REASON)}")
    lines += [f"> **Warning**: {md.safe(warning, REASON)}" for warning in words.warnings(report)[:MOST_WARNINGS]]
    return "\n\n".join(lines)


def _limits(report: GateReport) -> str:
    rows = []
    for row in words.limit_rows(report):
        figure = row.figure
        by = f", decided by {md.safe(row.decided_by, SHORT)}" if row.decided_by is not None else ""
        verdict = f"{SYMBOLS[row.verdict]} {row.verdict}"
        rows.append([
            f"**{md.safe(figure.title, SHORT)}**{_note(figure)}: {md.safe(row.limit, SHORT)}{by}",
            *_numbers(figure),
            figure.floor,
            verdict if row.verdict == "pass" else f"**{verdict}**",
        ])  # fmt: skip
    return md.table(["limit", "base", "head", words.RATIO_TITLE, "noise", "verdict"], rows, (0, 5)) if rows else ""


def _others(rows: list[words.FigureRow]) -> str:
    cells = [
        [
            f"{md.safe(row.title, SHORT)}{_note(row)}",
            *_numbers(row),
            row.floor,
            f"{row.n:,}" if row.n else "–",
            row.change,
        ]
        for row in rows
    ]
    return md.table(["figure", "base", "head", words.RATIO_TITLE, "noise", "n", ""], cells, (0, 6)) if rows else ""


def _numbers(row: words.FigureRow) -> list[str]:
    pairs = ((row.base, row.base_spread), (row.head, row.head_spread), (row.ratio, row.interval))
    return [md.safe(" ".join(filter(None, pair)), SHORT) for pair in pairs]


def _note(row: words.FigureRow) -> str:
    return f" ({md.safe(row.note, SHORT)})" if row.note else ""


def _meanings(names: list[str]) -> str:
    return "\n".join(f"- **{name}**: {meaning}" for name, meaning in meaning_words(names))


def _basis(report: GateReport) -> str:
    blocks = [
        _titled("Conditions", condition_words(report.disturbed)),
        _titled("Base", words.side_words(report.base)),
        _titled("Head", words.side_words(report.head)),
        _titled("Joules", words.joules_words(report)),
        _titled("Measuring", [*filter(None, [words.counts_words(report)]), *measuring_words(report.measuring)]),
        _titled("Machine", machine_words(report.machine)),
        _titled("Notes", report.notes),
        _titled(
            "Run", [run_words(report.perwatt_version, report.seconds, report.created), f"exit code {report.exit_code}"]
        ),
    ]
    return "\n\n".join(filter(None, blocks))


def _titled(title: str, items: Iterable[str]) -> str:
    said = md.bullets(items)
    return f"**{title}**\n\n{said}" if said else ""
