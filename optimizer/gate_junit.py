"""A gate's verdict as JUnit XML, for the test tabs of GitLab, Jenkins and GitHub: one suite, one case for each limit.

Valid against both schemas in use, Windy Road's of Ant's reports and Jenkins' xUnit (junit-10), which agree on little: a
bare root, `package` and `id`, properties before cases, and both streams at the end.

An undecided limit is `skipped`. It is neither a success nor a failure of the change: as an `error` it would stand among
the newly failed tests of a merge request and turn a Jenkins build unstable even where the gate's file lets it through;
left out, it would look as if nobody had asked. Whether it stops anything is for the exit code (3) to say: GitLab and
Jenkins take a job's result from there, and show the skipped case with its reason. A gate that fails, or is open, for
something that is no limit has a case of its own, "the gate as a whole", so that no reader takes the file for green.

GitLab shows an element's text and not its `message`, Jenkins both, so both say it. Names carry no measured numbers: by
class and name a case is recognised in the next run.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from perwatt import gate_words as words
from perwatt.basis_words import condition_words, flat_machine
from perwatt.report_units import known, plain

if TYPE_CHECKING:
    from perwatt.gate_report import GateReport, GateSide, Verdict

WHOLE = "the gate as a whole"


def render(report: GateReport) -> str:
    """The XML document. Text that XML can't hold (control characters, lone surrogates) is replaced."""
    cases = _cases(report)
    found = [verdict for _, verdict, _ in cases]
    root = ET.Element("testsuites")
    suite = ET.SubElement(root, "testsuite", {
        "name": f"perwatt gate {_named(report)}",
        "package": "perwatt.gate",
        "id": "0",
        **_timestamp(report.created),
        "hostname": plain(report.machine.get("hostname") or "localhost"),
        "tests": str(len(cases)),
        "failures": str(found.count("fail")),
        "errors": "0",
        "skipped": str(found.count("inconclusive")),
        "time": _seconds(report.seconds),
    })  # fmt: skip
    _properties(suite, report)
    for name, verdict, reason in cases:
        # All limits are judged by one measurement: each takes its share, because readers add the cases up.
        share = _seconds((known(report.seconds) or 0.0) / len(cases))
        case = ET.SubElement(suite, "testcase", {"classname": _class(report), "name": name, "time": share})
        _outcome(case, verdict, reason)
    ET.SubElement(suite, "system-out").text = "\n".join(_said(report))
    ET.SubElement(suite, "system-err").text = "\n".join(condition_words(report.disturbed)) if report.disturbed else ""
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _named(report: GateReport) -> str:
    return plain(report.name) or "unnamed"


def _class(report: GateReport) -> str:
    """`perwatt.gate.NAME`; dots in the name would make packages of it."""
    return f"perwatt.gate.{_named(report).replace('.', '_')}"


def _cases(report: GateReport) -> list[tuple[str, Verdict, str]]:
    """Name, verdict and reason of each case. Names are unique: of two that are the same, GitLab drops one."""
    cases: list[tuple[str, Verdict, str]] = []
    seen: dict[str, int] = {}
    for row in words.limit_rows(report):
        name = f"{row.figure.title}: {row.limit}"
        seen[name] = seen.get(name, 0) + 1
        cases.append((name if seen[name] == 1 else f"{name} ({seen[name]})", row.verdict, _reason(row)))
    if report.verdict not in [verdict for _, verdict, _ in cases]:
        cases.append((WHOLE, report.verdict, plain(report.reason)))
    return cases


def _reason(row: words.LimitRow) -> str:
    """Why, and the numbers in a second line."""
    figure = row.figure
    moved = "change" if figure.name == "accuracy" else words.RATIO_TITLE
    by = f" (decided by {row.decided_by})" if row.decided_by is not None else ""
    ratio = f"{figure.ratio} {figure.interval}".strip()
    return f"{row.reason}{by}\nbase {figure.base}, head {figure.head}, {moved} {ratio}, noise {figure.floor}"


def _outcome(case: ET.Element, verdict: Verdict, reason: str) -> None:
    message = reason.partition("\n")[0]
    if verdict == "fail":
        ET.SubElement(case, "failure", {"message": message, "type": "LimitExceeded"}).text = reason
    elif verdict == "inconclusive":
        ET.SubElement(case, "skipped", {"message": f"inconclusive: {message}"}).text = f"inconclusive: {reason}"


def _properties(suite: ET.Element, report: GateReport) -> None:
    found = {
        "verdict": report.verdict,
        "exit_code": str(report.exit_code),
        "perwatt_version": report.perwatt_version,
        **_side("base", report.base),
        **_side("head", report.head),
        "energy.method": report.energy.get("method") or "unavailable",
        "energy.boundary": report.energy.get("boundary") or "–",
        "disturbed": "; ".join(report.disturbed) or "no",
    }
    found |= {f"machine.{name}": value for name, value in flat_machine(report.machine).items()}
    properties = ET.SubElement(suite, "properties")
    for name, value in found.items():
        ET.SubElement(properties, "property", {"name": plain(name), "value": plain(value)})


def _side(name: str, side: GateSide) -> dict[str, str]:
    return {
        name: side.label,
        f"{name}.commit": side.commit or "–",
        f"{name}.dirty": "yes" if side.dirty else "no",
        f"{name}.from_cache": "yes" if side.from_cache else "no",
        f"{name}.digest": side.digest or "–",
        f"{name}.target": side.target,
    }


def _said(report: GateReport) -> list[str]:
    """The verdict and every limit in a line, for whoever opens the suite's output."""
    lines = [f"{words.WORDS[report.verdict]}  {words.headline(report)}", plain(report.reason)]
    for row in words.limit_rows(report):
        lines.append(f"{row.verdict}: {row.figure.title}, {row.limit}: {_reason(row).replace(chr(10), '; ')}")
    return [*lines, *(f"warning: {warning}" for warning in words.warnings(report)), *words.advice(report)]


def _seconds(value: float) -> str:
    return f"{known(value) or 0.0:.3f}"


def _timestamp(created: str) -> dict[str, str]:
    """In UTC without a zone, which is what Windy Road's schema takes; nothing where `created` is no time."""
    try:
        moment = datetime.fromisoformat(created)
        moment = moment.astimezone(UTC) if moment.tzinfo else moment
    except (ValueError, OverflowError):
        return {}
    return {"timestamp": moment.strftime("%Y-%m-%dT%H:%M:%S")}
