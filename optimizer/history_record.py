"""Writing gates and benches down in the history: a row for each side or subject, and its figures beside it.

Nothing here ever raises for what is wrong with the file: what was measured is worth more than its record.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perwatt.errors import InputError
from perwatt.history_store import history_path, writing

if TYPE_CHECKING:
    from perwatt.bench_report import BenchReport, Figure, Subject
    from perwatt.gate_report import ComparedFigure, GateReport, GateSide

Row = dict[str, Any]


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
    """Write every subject of a bench down, as `record_gate` does, under the model's name, so that both form one line."""
    return _recorded(report, [(_subject(one), _measured(one)) for one in report.subjects], path)


def _side(side: GateSide) -> Row:
    return {
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
        "kind": "bench",
        "side": "subject",
        "name": one.name or one.label,
        "label": one.label,
        "dirty": False,
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
    values = [_storable(value) for value in row.values()]
    return connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", values).lastrowid


def _storable(value: Any) -> Any:
    """Paths may hold bytes that are no text, and figures may be infinite: SQLite has neither."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value
