"""The first line of a benchmark: the one to remember. Capacity leads where it was looked for, then joules per request at
the traffic that was asked about; else inferences per joule where they are measured, and CPU time where they are only
modelled, with the modelled ones beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from perwatt.basis_words import uncertainty_words
from perwatt.bench_words import CPU, WATT, figure_of, labelled, labels
from perwatt.figure_words import change
from perwatt.report_units import known, with_interval
from perwatt.served_words import capacity_headline, joules_at_capacity, traffic_headline

if TYPE_CHECKING:
    from perwatt.bench_report import BenchReport
    from perwatt.report import RatioFigure

SHORT = {CPU: "CPU time", WATT: "inferences per joule"}
MOST_NAMED = 3
"""So many subjects' modelled joules in a line; of more, the best and the first."""


def headline(report: BenchReport) -> str:
    """What the only subject does, or which is best and by how much."""
    capacity = capacity_headline(report)
    if capacity:
        joules = joules_at_capacity(report)
        return f"{capacity}, {joules} ({_label(report)})" if joules else capacity
    traffic = traffic_headline(report)
    if traffic:
        return f"{labels(report)[0]}: {traffic} ({_label(report)})"
    if len(report.subjects) == 1:
        return f"{labels(report)[0]}: {_alone_words(report)}"
    return _compared_words(report)


def _label(report: BenchReport) -> str:
    """Method of the joules, and how uncertain a modelled one is."""
    said = [str(report.energy.get("method") or "method not stated"), uncertainty_words(report.energy)]
    return ", ".join(filter(None, said))


def _alone_words(report: BenchReport) -> str:
    subject = report.subjects[0]
    watt, cpu = figure_of(subject, WATT), figure_of(subject, CPU)
    took = f"{labelled([cpu])[0][0]} of CPU time per inference"
    if known(watt.value) is None:
        return took
    return f"{labelled([watt])[0][0]} inferences per joule ({_label(report)}), {took}"


# Several ----------------------------------------------------------------------------------------------------------


def _compared_words(report: BenchReport) -> str:
    names, name = labels(report), _lead(report)
    ratios = [subject.ratio_to_first.get(name) for subject in report.subjects]
    found = [(r, i) for i, r in enumerate(ratios) if i and r is not None and known(r.value) is not None]
    if not found:
        return f"no ratio of {SHORT[name]} to {names[0]}: it was not measured of both"
    better = [(r, i) for r, i in found if change(name, r, report.noise_floor.get(name)) == "better"]
    ratio, best = (max if name == WATT else min)(better or found, key=lambda pair: pair[0].value or 0.0)
    method = figure_of(report.subjects[best], name).method if name == WATT else None
    said = _verdict_words(report, name, ratio, best) + (f" ({method})" if method else "")
    joules = _modelled_words(report, best) if name == CPU else ""
    return f"{said}; {joules}" if joules else said


def _verdict_words(report: BenchReport, name: str, ratio: RatioFigure, best: int) -> str:
    """What the ratio of the best of the others to the first says."""
    names = labels(report)
    verdict = change(name, ratio, report.noise_floor.get(name))
    said, of = with_interval(ratio), f"the {SHORT[name]} of {names[0]}"
    if verdict == "better" or (verdict == "worse" and len(names) == 2):
        return f"{names[best]}: {said} {of}"
    if verdict == "worse":
        return f"{names[0]} is the best; next is {names[best]} with {said} {of}"
    begin = "too little was measured to tell a difference" if not verdict else "no difference beyond the noise"
    return (
        f"{begin}: {names[best]} {said} {of}"
        if len(names) == 2
        else f"{begin}: {names[best]}, the best of the others, {said} {of}"
    )


def _lead(report: BenchReport) -> str:
    """What leads: inferences per joule where all subjects have a ratio of them, else CPU time. Modelled joules don't
    decide which is best."""
    ratios = [subject.ratio_to_first.get(WATT) for subject in report.subjects[1:]]
    modelled = any(figure_of(subject, WATT).method == "modelled" for subject in report.subjects)
    return WATT if not modelled and all(r is not None and known(r.value) is not None for r in ratios) else CPU


def _modelled_words(report: BenchReport, best: int) -> str:
    """Modelled inferences per joule of each; of many subjects, of the first and the best. Empty where they are measured."""
    found = [figure_of(subject, WATT) for subject in report.subjects]
    if any(figure.method != "modelled" or known(figure.value) is None for figure in found):
        return ""
    shown = range(len(found)) if len(found) <= MOST_NAMED else (0, best)
    names, values = labels(report), labelled(found)[0]
    each = ", ".join(f"{names[index]} {values[index]}" for index in shown)
    return f"modelled inferences per joule: {each} ({uncertainty_words(report.energy)})"
