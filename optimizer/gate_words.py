"""What a gate says, in sentences and formatted rows: terminal, Markdown and JUnit say the same thing.

Nothing here knows colours, columns or tags. Missing figures read "–", never 0. Ratios are head ÷ base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from perwatt.basis_words import energy_words, point_words
from perwatt.figure_words import Change, change, in_order, n_words, percent, spread, title, values, with_bounds
from perwatt.figures import FIGURES
from perwatt.report_table import accuracy_change, accuracy_verdict, metric_name
from perwatt.report_units import (
    MISSING,
    compact,
    inverse,
    known,
    percent_or_number,
    plain,
    ratio_words,
    with_interval,
)

if TYPE_CHECKING:
    from perwatt.gate_report import Check, ComparedAccuracy, ComparedFigure, GateReport, GateSide, Verdict
    from perwatt.report import AccuracyReport, RatioFigure

WORDS: dict[Verdict, str] = {"pass": "PASS", "fail": "FAIL", "inconclusive": "INCONCLUSIVE"}
RATIO_TITLE = "head ÷ base"
HOW_TO_READ = (
    "Ratios are head ÷ base with their 95 % interval. Noise: how far apart two processes of the same model were in this "
    "very job."
)


@dataclass(frozen=True)
class FigureRow:
    """One figure on both sides, as words. `note`: method and boundary of what rests on energy, or the metric's name."""

    name: str
    title: str
    note: str
    base: str
    head: str
    base_spread: str
    head_spread: str
    ratio: str
    interval: str
    floor: str
    n: int
    change: Change


@dataclass(frozen=True)
class LimitRow:
    """One limit, its figure, and what became of it. `decided_by` is a figure's title."""

    figure: FigureRow
    limit: str
    verdict: Verdict
    reason: str
    decided_by: str | None


# The headline -----------------------------------------------------------------------------------------------------


def headline(report: GateReport) -> str:
    """After the verdict word: the decisive number with its interval, and the limit."""
    check = decisive(report)
    if check is None:
        return plain(report.reason)
    if report.identical and report.verdict == "pass":
        from perwatt.gate_report import SAME_FILES

        return SAME_FILES
    said = _titled(check.figure, _decisive_words(report, check))
    more = sum(other.verdict == report.verdict for other in report.checks) - 1
    if report.verdict == "pass" or more == 0:
        return said
    limits = "1 more limit" if more == 1 else f"{more} more limits"
    return f"{said} (and {limits} {'failed' if report.verdict == 'fail' else 'undecided'})"


def decisive(report: GateReport) -> Check | None:
    """The check that the headline is about: the first that has the gate's verdict, with a number before without, on its
    own figure before by another."""
    same = [check for check in report.checks if check.verdict == report.verdict]
    order = sorted(same, key=lambda check: (not _has_number(report, check), check.decided_by is not None))
    return order[0] if order else None


def reason(report: GateReport) -> str:
    """The verdict in a sentence; empty where it only strings together what `why` says, or what the headline said."""
    rest = report.reason
    for check in report.checks:
        rest = rest.replace(check.reason, "")
    return plain(report.reason) if rest.strip("; ") and decisive(report) is not None else ""


def _has_number(report: GateReport, check: Check) -> bool:
    """Whether what decides this check was measured."""
    if check.figure == "accuracy":
        return report.accuracy is not None
    name = check.decided_by or check.figure
    found = report.figures.get(name)
    if found is None or (name in FIGURES and FIGURES[name].of_energy and found.method not in ("counter", "metered")):
        return False
    return known(found.ratio.value if _relative(check) else found.head) is not None


def _relative(check: Check) -> bool:
    """Whether a limit is against the base ("at most 5 % more", "loses at most 0.5 points"), not absolute ("at most
    20 ms")."""
    return check.decided_by is not None or check.key.startswith("max_")


def _decisive_words(report: GateReport, check: Check) -> str:
    if not _has_number(report, check):
        return plain(check.reason)
    return f"{_number(report, check)}, limit: {plain(check.limit)}"


def _number(report: GateReport, check: Check) -> str:
    if check.figure == "accuracy" and report.accuracy is not None:
        found = report.accuracy
        relative = _relative(check)
        return _joined(*_accuracy_change(found)) if relative else percent_or_number(found.head, found.unit)
    figure = report.figures[check.decided_by or check.figure]
    if check.decided_by is not None:
        return _decided_instead(report, check, figure.ratio)
    if _relative(check):
        return with_interval(figure.ratio)
    return with_bounds(figure.unit, figure.head, figure.head_interval)


def _decided_instead(report: GateReport, check: Check, ratio: RatioFigure) -> str:
    """CPU seconds decide where joules can't: the way round that the limit is meant."""
    asked, by = FIGURES.get(check.figure), str(check.decided_by)
    joules = report.figures.get(check.figure)
    why = "modelled joules don't decide" if joules and joules.method == "modelled" else "no joules were measured"
    if by == "cpu_s_per_inference" and asked is not None and asked.better == "higher":
        return f"{why}; inferences per CPU second {with_interval(inverse(ratio))}"
    return f"{why}; {title(by)} {with_interval(ratio)}"


def _joined(*words: str) -> str:
    return " ".join(word for word in words if word)


def warnings(report: GateReport) -> list[str]:
    """What nobody should miss of the notes of both sides, each once."""
    from perwatt.datasets_source import WARNING

    found: dict[str, list[str]] = {}
    for name, side in (("base", report.base), ("head", report.head)):
        for note in side.notes:
            if note.startswith(WARNING):
                found.setdefault(plain(note.removeprefix(WARNING)), []).append(name)
    return [f"{' and '.join(names)}: {note}" for note, names in found.items()]


def let_through(report: GateReport) -> bool:
    """Inconclusive, and told not to stop anything."""
    return report.verdict == "inconclusive" and report.exit_code == 0


def advice(report: GateReport) -> list[str]:
    """What to do about an inconclusive gate; nothing where there is a verdict."""
    if report.verdict != "inconclusive":
        return []
    open_checks = [check for check in report.checks if check.verdict == "inconclusive"]
    measured = [check for check in open_checks if _has_number(report, check)]
    said = []
    if any(check.figure != "accuracy" for check in measured):
        said.append("measure longer with --time: the interval narrows with the number of windows")
        said.append("measure on a quieter machine" + (": this run was disturbed" if report.disturbed else ""))
    if report.accuracy is not None and report.accuracy.chance is not None:
        said.append(
            "say how the samples are to be read, as --normalize imagenet: the base does no better than guessing"
        )
    elif any(check.figure == "accuracy" for check in measured):
        said.append("give more labelled samples: the interval of the accuracy narrows with their number")
    if len(measured) < len(open_checks):
        said.append("what could not be measured stays open however long it takes: the reason stands with the limit")
    if let_through(report):
        return [*said, "it was let through, because the gate's file says on_inconclusive: pass"]
    return [*said, "or say what an open gate is to do: on_inconclusive: pass in the gate's file lets it through"]


# Rows -------------------------------------------------------------------------------------------------------------


def limit_rows(report: GateReport) -> list[LimitRow]:
    """Every limit, in the order of the gate's file."""
    return [
        LimitRow(
            figure_row(report, check.figure),
            plain(check.limit),
            check.verdict,
            plain(check.reason),
            None if check.decided_by is None else title(check.decided_by),
        )
        for check in report.checks
    ]


def other_rows(report: GateReport) -> tuple[list[FigureRow], list[FigureRow]]:
    """The figures without a limit: those that changed beyond the noise, and the rest."""
    checked = {check.figure for check in report.checks}
    names = [*report.figures, *(["accuracy"] if report.accuracy and "accuracy" not in report.figures else [])]
    rows = [figure_row(report, name) for name in in_order(names) if name not in checked]
    changed = [row for row in rows if row.change in ("better", "worse")]
    return changed, [row for row in rows if row not in changed]


def figure_row(report: GateReport, name: str) -> FigureRow:
    """One figure of both sides."""
    if name == "accuracy" and report.accuracy is not None:
        return _accuracy_row(report.accuracy)
    found = report.figures.get(name)
    if found is None:
        return FigureRow(name, title(name), "", MISSING, MISSING, "", "", MISSING, "", MISSING, 0, "")
    base, head = values(found.unit, [found.base, found.head])
    ratio, interval = ratio_words(found.ratio)
    if found.method == "unavailable" and known(found.ratio.value) is None:
        ratio = "unavailable"
    note = "" if found.method in (None, "unavailable") else ", ".join(filter(None, (found.method, found.boundary)))
    return FigureRow(
        name, title(name), note, base, head,
        spread(found.base, *(found.base_interval or (None, None))),
        spread(found.head, *(found.head_interval or (None, None))),
        ratio, interval, percent(found.floor), found.n, change(name, found.ratio, found.floor),
    )  # fmt: skip


def _accuracy_row(found: ComparedAccuracy) -> FigureRow:
    base, head = (percent_or_number(value, found.unit) for value in (found.base, found.head))
    moved, interval = _accuracy_change(found)
    verdict = accuracy_verdict(_as_accuracy(found))
    said: Change = "noise" if verdict == "≈ same" else "" if verdict == "over budget" else verdict
    metric = metric_name(_as_accuracy(found))
    return FigureRow("accuracy", title("accuracy"), metric, base, head, "", "", moved, interval, MISSING, found.n, said)


def _accuracy_change(found: ComparedAccuracy) -> tuple[str, str]:
    return accuracy_change(_as_accuracy(found))


def _as_accuracy(found: ComparedAccuracy) -> AccuracyReport:
    """In the form that the words of a report are made from; no budget there, because the limits judge here."""
    from perwatt.report import AccuracyReport

    return AccuracyReport(
        metric=found.metric, unit=found.unit, higher_is_better=found.higher_is_better, n=found.n, n_unseen=found.n,
        original=found.base, optimized=found.head, drop=found.drop, low=found.low, high=found.high, max_drop=float("inf"),
    )  # fmt: skip


# Sentences --------------------------------------------------------------------------------------------------------


def why(report: GateReport) -> list[str]:
    """For each limit that does not simply hold: its reason."""
    return [_named(row) for row in limit_rows(report) if row.verdict != "pass" or row.decided_by is not None]


def _named(row: LimitRow) -> str:
    said = row.reason if row.reason.startswith(row.figure.title) else f"{row.figure.title}: {row.reason}"
    return f"{said} (limit: {row.limit})"


def _titled(name: str, said: str) -> str:
    """With the figure's name before it, unless it begins so itself."""
    return said if said.startswith(title(name)) else f"{title(name)}: {said}"


def accuracy_words(report: GateReport) -> str:
    """Both accuracies, the change with its interval, the flips and what McNemar's test makes of them."""
    found = report.accuracy
    if found is None:
        return "not measured"
    base, head = (percent_or_number(value, found.unit) for value in (found.base, found.head))
    metric = metric_name(_as_accuracy(found))
    said = [f"{metric} {base} → {head}, {_joined(*_accuracy_change(found))}"]
    if found.flips_lost is not None and found.flips_gained is not None:
        said.append(f"{found.flips_lost:,} lost / {found.flips_gained:,} gained of {found.n:,}")
    else:
        said.append(f"n = {found.n:,}")
    if found.p_value is not None:
        p = "p < 0.001" if found.p_value < 0.001 else f"p = {compact(found.p_value, 2)}"
        said.append(f"{p} (exact McNemar test on the flips)")
    return ", ".join(said)


def side_words(side: GateSide) -> list[str]:
    """What a side is and where it came from; how it was run; its notes."""
    first = [f"{plain(side.label)}: {plain(side.kind)}"]
    if side.path != side.label:
        first.append(plain(side.path))
    first.append(f"commit {plain(side.commit)[:12]}" if side.commit else "no commit")
    if side.dirty:
        first.append("with changes that are not committed")
    if side.from_cache:
        first.append("built earlier (from the cache)")
    point = point_words(side.operating_point, side.execution_precision)
    second = f"on {plain(side.target)}" + (f": {point}" if point else "")
    return [", ".join(first), second, *map(plain, side.notes)]


def joules_words(report: GateReport, *, brief: bool = False) -> list[str]:
    """How the joules were come by, with gross and idle-subtracted side by side."""
    gross, above = (
        _both(report.figures.get(name)) for name in ("energy_j_per_inference", "energy_above_idle_j_per_inference")
    )
    return energy_words(report.energy, gross, above, brief=brief)


def _both(found: ComparedFigure | None) -> str:
    if found is None or (known(found.base) is None and known(found.head) is None):
        return ""
    return " → ".join(values(found.unit, [found.base, found.head]))


def counts_words(report: GateReport) -> str:
    """How many blocks stand behind the figures."""
    return n_words({name: report.figures[name].n for name in in_order(list(report.figures))})
