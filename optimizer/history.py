"""What was measured, job after job: every gate and bench is written down, and `trend` reads the line of one figure.

A number is only ever put beside numbers of the same model name, machine (its fingerprint), target, scenario, operating
point and, for joules, method and boundary: that is a `Series`, and series are never mixed. A gate writes down both of
its sides, a bench every subject. **The line of a series is made of the heads of gates and the subjects of benches**, in
the order of time: a head is what somebody wanted to have accepted. A head whose gate failed is an entry too, but no part
of the line: later ones are not compared with it. Bases are kept, and form no line of their own: a base is an earlier
head measured again, and is there for its ratio.

Machines drift: between two jobs, the same model differs by heat, load and kernel. So a change is best known from one
job, head ÷ base. Where the base of a gate is an earlier head of the series, by digest, the ratios chain: their product is
the change since the base of the first, free of the drift between the jobs. A gate of two identical sides adds nothing.

Limits: history is for looking at. No gate decides by it: a gate measures both sides anew. Joules per request at a given
traffic and the capacity of a server are not kept: they hold for one rate or one bound only.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from perwatt.errors import InputError, nearest
from perwatt.figures import FIGURES
from perwatt.history_record import record_bench as record_bench
from perwatt.history_record import record_gate as record_gate
from perwatt.history_store import history_path, reading
from perwatt.measurement import Ratio

SCHEMA_VERSION = 1
"""Of `as_json`."""


@dataclass(frozen=True)
class Chain:
    """Head ÷ base through `jobs` gates, each of whose bases was an earlier gate's head: the change since `since`, the
    base of the first. The jobs are independent, so their intervals add up in squares on the logarithmic scale."""

    ratio: Ratio
    jobs: int
    since: str

    def extended(self, job: Ratio) -> Chain | None:
        """One gate more; None where its ratio isn't known."""
        if not self.ratio.value or not job.value or job.value < 0:
            return None
        value = self.ratio.value * job.value
        below, above = (
            math.hypot(one, other) if one is not None and other is not None else None
            for one, other in zip(_widths(self.ratio), _widths(job), strict=True)
        )
        low = None if below is None else value / math.exp(below)
        high = None if above is None else value * math.exp(above)
        return replace(self, ratio=Ratio(value, low, high), jobs=self.jobs + 1)


def _widths(ratio: Ratio) -> tuple[float | None, float | None]:
    """How far its bounds are below and above it, as natural logarithms."""
    value, low, high = ratio.value or 0.0, ratio.low or 0.0, ratio.high or 0.0
    return math.log(value / low) if low > 0 else None, math.log(high / value) if high > 0 else None


@dataclass(frozen=True)
class Entry:
    """One measurement in a series. `value`, `low` and `high` are in the figure's own unit, at 95 %.

    `ratio` is head ÷ base as measured in one job, `floor` how far two processes of the same model were apart in it.
    `previous` is the value of the entry before on the line, from another job. `together`: that entry was this gate's base,
    so `ratio` is the same change, better known."""

    created: str
    kind: str
    label: str
    commit: str | None
    dirty: bool
    digest: str | None
    base_digest: str | None
    perwatt_version: str
    verdict: str | None
    disturbed: bool
    value: float
    low: float | None
    high: float | None
    n: int
    ratio: Ratio
    floor: float | None
    on_line: bool
    previous: float | None = None
    together: bool = False
    chain: Chain | None = None


@dataclass(frozen=True)
class Series:
    """Entries that may be compared, oldest first. `older` counts those that `limit` left out; `machine` is the
    fingerprint's facts; `metric` names the metric of accuracy; `method` and `boundary` are of energy."""

    figure: str
    name: str
    fingerprint: str
    target: str
    scenario: str
    operating_point: dict[str, Any]
    unit: str
    metric: str | None
    method: str | None
    boundary: str | None
    machine: dict[str, Any]
    entries: tuple[Entry, ...]
    older: int = 0


_ENTRIES = """
SELECT runs.*, figures.*, machines.fingerprint AS facts, base.digest AS base_digest, base.label AS base_label,
    base.commit_id AS base_commit, base.target = runs.target AND base.operating_point = runs.operating_point AS run_alike
FROM runs
JOIN figures ON figures.run = runs.id
JOIN machines ON machines.digest = runs.machine
LEFT JOIN runs AS base ON base.job = runs.job AND base.side = 'base' AND runs.side = 'head'
WHERE runs.side != 'base' AND figures.value IS NOT NULL AND figures.figure = :figure
    AND (:name IS NULL OR runs.name = :name) AND (:machine IS NULL OR runs.machine = :machine)
    AND (:target IS NULL OR runs.target = :target) AND (:scenario IS NULL OR runs.scenario = :scenario)
ORDER BY runs.created, runs.id
"""
_KEY = ("name", "machine", "target", "scenario", "operating_point", "unit", "metric", "method", "boundary")


def trend(
    figure: str,
    *,
    name: str | None = None,
    fingerprint: str | None = None,
    limit: int = 30,
    target: str | None = None,
    scenario: str | None = None,
    path: str | Path | None = None,
) -> list[Series]:
    """Every series of `figure`, by name, each with its last `limit` entries, oldest first; the line is what the module
    says. `name`, `fingerprint` (the machine's digest), `target` and `scenario` leave out all others.

    Nothing has been written down yet: an empty list. Raises InputError where the figure or the name is unknown (and says
    the nearest), where `limit` is no positive number, and where the file can't be read or isn't there though named."""
    if figure not in FIGURES:
        raise InputError(nearest(figure, FIGURES, "figure"))
    if limit < 1:
        raise InputError(f"a limit of {limit} entries would show nothing", fix="give 1 or more")
    where = history_path(path)
    if not where.exists():
        if path is None:
            return []
        raise InputError(f"there is no history at {where}", fix="`optimize gate` and `optimize bench` write one")
    asked = {"figure": figure, "name": name, "machine": fingerprint, "target": target, "scenario": scenario}
    with reading(where) as connection:
        connection.row_factory = sqlite3.Row
        rows = connection.execute(_ENTRIES, asked).fetchall()
        names = [known for (known,) in connection.execute("SELECT DISTINCT name FROM runs")]
    if name is not None and names and name not in names:
        raise InputError(nearest(name, names, "name in the history"))
    grouped: dict[tuple[Any, ...], list[sqlite3.Row]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[column] for column in _KEY), []).append(row)
    ordered = sorted(grouped.items(), key=lambda item: [str(part) for part in item[0]])
    try:
        return [_series(figure, group, limit) for _, group in ordered]
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is damaged or was altered: {error}", fix="name another file") from None


def _series(figure: str, rows: Sequence[sqlite3.Row], limit: int) -> Series:
    entries = _entries(rows)
    kept = ("name", "target", "scenario", "unit", "metric", "method", "boundary")
    return Series(
        figure=figure,
        fingerprint=rows[0]["machine"],
        operating_point=json.loads(rows[0]["operating_point"]),
        machine=json.loads(rows[0]["facts"]),
        entries=tuple(entries[-limit:]),
        older=max(0, len(entries) - limit),
        **{column: rows[0][column] for column in kept},
    )


def _entries(rows: Iterable[sqlite3.Row]) -> list[Entry]:
    """Every entry, tied to those before it: to the last one on the line, and to the head that was its base."""
    entries: list[Entry] = []
    chains: dict[str, Chain] = {}
    last: Entry | None = None
    for row in rows:
        entry = _entry(row)
        # The same files run in another way are another thing: they tie nothing.
        base = entry.base_digest if row["run_alike"] else None
        if entry.kind == "gate":
            begun = Chain(Ratio(1.0, 1.0, 1.0), 0, _named(row["base_label"], row["base_commit"]))
            chain = begun if base is None else chains.get(base, begun)
            # Two identical sides differ by noise alone, which is left out.
            identical = base is not None and base == entry.digest
            entry = replace(entry, chain=chain if identical else chain.extended(entry.ratio))
        if last is not None:
            entry = replace(entry, previous=last.value, together=base is not None and base == last.digest)
        if entry.digest is not None and entry.chain is not None:
            chains[entry.digest] = entry.chain
        entries.append(entry)
        last = entry if entry.on_line else last
    return entries


def _entry(row: sqlite3.Row) -> Entry:
    kept = ("created", "kind", "label", "digest", "base_digest", "perwatt_version", "verdict", "value", "low", "high")
    return Entry(
        commit=row["commit_id"],
        dirty=bool(row["dirty"]),
        disturbed=bool(row["disturbed"]),
        ratio=Ratio(row["ratio"], row["ratio_low"], row["ratio_high"]),
        n=row["n"],
        floor=row["floor"],
        on_line=row["verdict"] != "fail",
        **{column: row[column] for column in kept},
    )


def _named(label: str | None, commit: str | None) -> str:
    return " at ".join(filter(None, (label, (commit or "")[:9])))


def of_machine(series: Sequence[Series], fingerprint: str) -> tuple[list[Series], list[Series]]:
    """The series of that machine, and those of all others."""
    here = [one for one in series if one.fingerprint == fingerprint]
    return here, [one for one in series if one.fingerprint != fingerprint]


def as_json(series: Sequence[Series]) -> dict[str, Any]:
    """Plain data for `--json`: what `Series`, `Entry` and `Chain` hold, by the same names. Missing is null."""
    return {"schema_version": SCHEMA_VERSION, "series": [asdict(one) for one in series]}
