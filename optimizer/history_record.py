"""Writing gates and benches down in the history: a row for each side or subject, and its figures beside it.

Each row says where the thing lay that was measured (`whereabouts`), because a model's name alone tells too little apart:
two projects have a `model.onnx` each, and a bundle bears the name of the model that it was made from. In a git
repository, that is the repository, by its remote, and the path in it: the same for every checkout, wherever CI puts it.
Elsewhere it is the absolute path. What a gate built from a recipe lies nowhere of its own (its bundle is in the cache):
there it is the working directory, to which a recipe's paths are relative.

Nothing here ever raises for what is wrong with the file: what was measured is worth more than its record.

Limits: relative paths of a report are those of this process's working directory, so a report is to be recorded where it
was made. Two recipes for one model, target and operating point, built in one folder, can't be told apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sqlite3
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perwatt.errors import InputError
from perwatt.history_store import history_path, writing

if TYPE_CHECKING:
    from perwatt.bench_report import BenchReport, Figure, Subject
    from perwatt.gate_report import ComparedFigure, GateReport, GateSide

Row = dict[str, Any]

BUILT = "build"
"""The kind of what a gate built from a recipe."""

WORKING_TREE, GIT = "working tree", "git:"
"""How the label of such a side reads, or begins; all others are paths."""

MISLEADING = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_CONFIG")
"""Hooks set these: git would answer for another folder than the one that is asked about."""

GIT_WAIT_S = 10.0

_REMOTE = re.compile(r"(?:[a-z][a-z0-9+.-]*://(?:[^/]*@)?([^/:@]+)(?::\d+)?/|(?:[^/@:]*@)?([^/:@]+):(?!//))(.+)")
"""https://user:password@host:443/path, and user@host:path."""


def record_gate(report: GateReport, path: str | Path | None = None) -> str | None:
    """Write both sides of a gate down in the history at `path` (`history_path` says which where it is None).

    Returns why that could not be done, in a sentence, or None: a gate never fails for its history. The same report
    written down twice is there once."""
    shared = {
        "kind": "gate",
        "name": report.name,
        "scenario": str(report.measuring.get("scenario") or report.head.operating_point.get("scenario") or ""),
    }
    runs = []
    for side, head in ((report.base, False), (report.head, True)):
        run = {**shared, **_side(side), "side": "head" if head else "base", "verdict": report.verdict if head else None}
        runs.append((run, _compared(report, head)))
    return _recorded(report, runs, path)


def record_bench(report: BenchReport, path: str | Path | None = None) -> str | None:
    """Write every subject of a bench down, as `record_gate` does, in the same way, so that both form one line."""
    return _recorded(report, [(_subject(one), _measured(one)) for one in report.subjects], path)


def whereabouts(path: str | Path) -> tuple[str | None, str]:
    """Which repository the file or folder at `path` lies in, and where in it; (None, absolute path) where it is in none.

    A repository is called by its remote ("github.com/acme/vision"), without one by its absolute path. A link stands
    for itself, not for what it leads to today. Nothing needs to be there, and nothing is raised."""
    try:
        folder, name = os.path.split(os.path.abspath(path))
        whole = os.path.join(os.path.realpath(folder), name)
        found = _repository(_folder(whole))
    except (OSError, ValueError):
        # The working directory is gone, or this is no path at all.
        return None, storable(str(path))
    if found is None:
        return None, storable(whole)
    repository, top = found
    return storable(repository), storable(os.path.relpath(whole, top))


def _folder(path: str) -> str:
    """The folder to ask git in: `path` itself where it is one, as a model from a hub is a repository of its own."""
    while not os.path.isdir(path) or os.path.islink(path):
        path, name = os.path.split(path)
        if not name:
            break
    return path


def _repository(folder: str) -> tuple[str, str] | None:
    """How the repository that holds `folder` is called, and the folder of its work tree."""
    told = _git(folder, "rev-parse", "--show-toplevel", "--git-common-dir")
    if len(told) != 2:
        return None
    top, inner = told[0], os.path.realpath(os.path.join(folder, told[1]))
    remotes = sorted(_git(top, "config", "--get-regexp", r"^remote\..*\.url$"))
    first = next((line for line in remotes if line.startswith("remote.origin.")), remotes[0] if remotes else "")
    # The first work tree's folder stands for all that share its git folder.
    own = os.path.dirname(inner) if os.path.basename(inner) == ".git" else inner
    return _remote(first.partition(" ")[2]) or own, top


def _remote(url: str) -> str | None:
    """A remote's host and path, whichever way it is reached. Never who reaches it: in CI, the address holds a token."""
    plain = re.split(r"[?#]", url.removeprefix("file://"))[0].rstrip("/").removesuffix(".git")
    if os.path.isabs(plain):
        return os.path.realpath(plain)
    found = _REMOTE.fullmatch(plain)
    # An address in an address, as of a remote helper, may hold what it should not.
    if found is None or "@" in found[3]:
        return None
    return f"{(found[1] or found[2]).lower()}/{found[3].strip('/')}"


def _git(folder: str, *arguments: str) -> list[str]:
    """What git says, line by line; nothing where it refuses, or where there is none."""
    kept = {name: value for name, value in os.environ.items() if name not in MISLEADING}
    try:
        done = subprocess.run(
            ["git", "-C", folder, *arguments], env=kept, stdin=subprocess.DEVNULL, capture_output=True,
            encoding="utf-8", errors="surrogateescape", timeout=GIT_WAIT_S,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _lay(kind: str, path: str, label: str = "") -> Row:
    """The columns that say what kind of thing was measured, and where it lay."""
    built = label == WORKING_TREE or label.startswith(GIT)
    repository, place = whereabouts("." if built else path)
    return {"subject_kind": BUILT if built else kind, "repository": repository, "place": place}


def _side(side: GateSide) -> Row:
    return {
        **_lay(side.kind, side.path, side.label),
        "label": side.label,
        "commit_id": side.commit,
        "dirty": side.dirty,
        "digest": side.digest,
        "target": side.target,
        "operating_point": _json(side.operating_point),
        "execution_precision": side.execution_precision,
    }


def _subject(one: Subject) -> Row:
    return {
        **_lay(one.kind, one.path),
        "kind": "bench",
        "side": "subject",
        "name": one.name or one.label,
        "label": one.label,
        "dirty": False,
        "digest": one.digest,
        "target": one.target,
        "scenario": one.scenario,
        "operating_point": _json(one.operating_point),
        "execution_precision": one.execution_precision,
    }


def _compared(report: GateReport, head: bool) -> list[Row]:
    found = report.accuracy
    figures = {name: one for name, one in report.figures.items() if found is None or name != "accuracy"}
    rows = [_compared_figure(name, one, head) for name, one in figures.items()]
    if found is not None:
        value = found.head if head else found.base
        rows.append({"figure": "accuracy", "unit": found.unit, "metric": found.metric, "value": value, "n": found.n})
    return rows


def _compared_figure(name: str, figure: ComparedFigure, head: bool) -> Row:
    low, high = (figure.head_interval if head else figure.base_interval) or (None, None)
    row = {
        "figure": name,
        "unit": figure.unit,
        "value": figure.head if head else figure.base,
        "low": low,
        "high": high,
        "n": figure.n,
        "method": figure.method,
        "boundary": figure.boundary,
    }
    if not head:
        return row
    ratio = figure.ratio
    return {**row, "ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high, "floor": figure.floor}


def _measured(one: Subject) -> list[Row]:
    rows = [_measured_figure(name, figure) for name, figure in one.figures.items()]
    counted = {"size_bytes": one.size_bytes, "peak_memory_bytes": one.peak_memory_bytes}
    return rows + [
        {"figure": name, "unit": "B", "value": value, "n": 1}
        for name, value in counted.items()
        if value is not None and name not in one.figures
    ]


def _measured_figure(name: str, figure: Figure) -> Row:
    kept = figure.model_dump(include={"unit", "value", "low", "high", "n", "method", "boundary"})
    return {"figure": name, **kept}


def _recorded(
    report: GateReport | BenchReport, runs: list[tuple[Row, list[Row]]], path: str | Path | None
) -> str | None:
    try:
        shared = _of_the_job(report)
        with writing(history_path(path)) as connection:
            _insert(connection, shared, _fingerprint(report)[1], runs)
    except InputError as error:
        return f"not written down in the history: {error}"
    return None


def _of_the_job(report: GateReport | BenchReport) -> Row:
    return {
        "job": hashlib.sha256(_json(report.model_dump()).encode()).hexdigest(),
        "created": _utc(report.created),
        "machine": _fingerprint(report)[0],
        "perwatt_version": report.perwatt_version,
        "disturbed": bool(report.disturbed),
    }


def _fingerprint(report: GateReport | BenchReport) -> tuple[str, str]:
    """The machine's digest and its facts as JSON. Raises InputError where the report names no machine: figures of an
    unknown machine could be compared with nothing."""
    facts = report.machine.get("fingerprint")
    digest = report.machine.get("digest")
    if not digest and not facts:
        raise InputError("the report doesn't say which machine it comes from")
    return str(digest or hashlib.sha256(_json(facts).encode()).hexdigest()), _json(facts or {})


def _utc(created: str) -> str:
    """To the second, in UTC, so that text sorts as time does; without an offset it is taken for UTC."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        raise InputError(f"the report's date {created!r} is no ISO 8601 date") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC).isoformat(timespec="seconds")


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _insert(connection: sqlite3.Connection, shared: Row, facts: str, runs: list[tuple[Row, list[Row]]]) -> None:
    if connection.execute("SELECT 1 FROM runs WHERE job = ?", (shared["job"],)).fetchone():
        return
    connection.execute("INSERT OR IGNORE INTO machines VALUES (?, ?)", (shared["machine"], facts))
    for position, (run, figures) in enumerate(runs):
        made = _insert_row(connection, "runs", {**shared, "position": position, **run})
        for figure in figures:
            _insert_row(connection, "figures", {"run": made, **figure})


def _insert_row(connection: sqlite3.Connection, table: str, row: Row) -> int | None:
    marks = ", ".join("?" * len(row))
    values = [_value(value) for value in row.values()]
    return connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", values).lastrowid


def storable(text: str) -> str:
    """`text` as the file keeps it: paths may hold bytes that are no text, which SQLite has no place for."""
    return text.encode("utf-8", "backslashreplace").decode()


def _value(value: Any) -> Any:
    """Figures may be infinite, which SQLite doesn't know."""
    if isinstance(value, str):
        return storable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
