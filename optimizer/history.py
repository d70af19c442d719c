"""What was measured, job after job: every gate and bench is written down, and `trend` reads the line of one figure.

A number is only ever put beside numbers of the same thing on the same machine (its fingerprint), at the same target,
scenario, operating point and, for joules, method and boundary: that is a `Series`, and series are never mixed.

**The same thing** is what has the same model name, the same kind (bundle, onnx, …) and lay in the same place: in a git
repository, that is the repository, by its remote, and the path in it, elsewhere the absolute path. So a bundle that is
built again at its path stays one series, and so does the same file in another checkout of the repository; a bundle and
the model it was made from are two, and so are the `model.onnx` of two projects. What gates build from git refs and the
working tree has the working directory for its place, and is one series for all refs. Entries that were written by a
perwatt that kept no places are series of their own, by name alone.

A gate writes down both of its sides, a bench every subject. **The line of a series is made of the heads of gates and the
subjects of benches**, in the order of time: a head is what somebody wanted to have accepted. A head whose gate failed is
an entry too, but no part of the line: later ones are not compared with it. An entry is compared with the last one on the
line from an earlier job, never with one of its own job. Bases are kept, and form no line of their own: a base is an
earlier head measured again, and is there for its ratio.

Machines drift: between two jobs, the same model differs by heat, load and kernel. So a change is best known from one
job, head ÷ base. Where the base of a gate is an earlier head of the same model, by digest, wherever it lay, the ratios
chain: their product is the change since the base of the first, free of the drift between the jobs. A gate of two
identical sides adds nothing.

Limits: history is for looking at. No gate decides by it: a gate measures both sides anew. Joules per request at a given
traffic and the capacity of a server are not kept: they hold for one rate or one bound only.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from perwatt.errors import InputError, nearest
from perwatt.figures import FIGURES
from perwatt.history_record import BUILT, storable, whereabouts
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
    """One measurement in a series. `created` is ISO 8601 in UTC; `value`, `low` and `high` are in the figure's own unit, at
    95 %; entries of one job have the same `job`.

    `ratio` is head ÷ base as measured in one job, `floor` how far two processes of the same model were apart in it.
    `previous` is the value of the entry before on the line, from an earlier job, `previous_low` and `previous_high` its
    interval. `together`: that entry was this gate's base, so `ratio` is the same change, better known. `unchanged`: it was
    of the same files."""

    created: str
    job: str
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
    previous_low: float | None = None
    previous_high: float | None = None
    together: bool = False
    unchanged: bool = False
    chain: Chain | None = None


@dataclass(frozen=True)
class Series:
    """Entries that may be compared, oldest first. `older` counts those that `limit` left out; `machine` is the
    fingerprint's facts; `metric` names the metric of accuracy; `method` and `boundary` are of energy.

    `subject_kind` is bundle, onnx, …, or `build` for what gates built from a recipe; `place` is its path in `repository`,
    absolute where that is None, and of a build the folder it was built in. All three are None where they were not kept."""

    figure: str
    name: str
    subject_kind: str | None
    repository: str | None
    place: str | None
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
    AND (:machine IS NULL OR runs.machine = :machine)
    AND (:target IS NULL OR runs.target = :target) AND (:scenario IS NULL OR runs.scenario = :scenario)
ORDER BY runs.created, runs.id
"""
_SUBJECT = ("name", "repository", "place", "subject_kind")
_WAY = ("machine", "target", "scenario", "operating_point", "unit", "metric", "method", "boundary")
_KNOWN = f"SELECT DISTINCT label, {', '.join(_SUBJECT)} FROM runs WHERE side != 'base'"
_Key = tuple[Any, ...]


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

    `name` is the model's, or the path of what was measured, as seen from the working directory; where it is neither, a
    file's name anywhere, or a label as it was given ("working tree").

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
    asked = {"figure": figure, "machine": fingerprint, "target": target, "scenario": scenario}
    with reading(where) as connection:
        connection.row_factory = sqlite3.Row
        rows = connection.execute(_ENTRIES, asked).fetchall()
        known = connection.execute(_KNOWN).fetchall()
    wanted = None if name is None or not known else _wanted(name, known)
    try:
        lines = _lines(rows)
        found = [(key, line) for key, line in lines.items() if wanted is None or key[: len(_SUBJECT)] in wanted]
        found.sort(key=lambda item: [str(part) for part in item[0]])
        facts = {row["machine"]: row["facts"] for row in rows}
        return [_series(figure, key, line, facts, limit) for key, line in found]
    except ValueError as error:
        raise InputError(f"{where} is damaged or was altered: {error}", fix="name another file") from None


def _wanted(name: str, known: Sequence[sqlite3.Row]) -> set[_Key]:
    """Which things `name` means. Raises InputError where it means none."""
    where, plain = whereabouts(name), storable(name)
    found = [row for row in known if row["name"] == plain or (row["repository"], row["place"]) == where]
    # Less certain, so only where nothing bears the name or lies there.
    found = found or [row for row in known if plain.rstrip("/") in (row["label"], _file(row))]
    if not found:
        names = {text for row in known for text in (row["name"], row["label"], _file(row)) if text}
        raise InputError(nearest(plain, names, "name in the history"))
    return {tuple(row[column] for column in _SUBJECT) for row in found}


def _file(row: sqlite3.Row) -> str | None:
    return None if row["place"] is None or row["subject_kind"] == BUILT else PurePath(row["place"]).name


def _series(figure: str, key: _Key, entries: Sequence[Entry], facts: dict[str, str], limit: int) -> Series:
    named = dict(zip((*_SUBJECT, *_WAY), key, strict=True))
    machine = named.pop("machine")
    return Series(
        figure=figure,
        fingerprint=machine,
        operating_point=json.loads(named.pop("operating_point")),
        machine=json.loads(facts[machine]),
        entries=tuple(entries[-limit:]),
        older=max(0, len(entries) - limit),
        **named,
    )


def _lines(rows: Iterable[sqlite3.Row]) -> dict[_Key, list[Entry]]:
    """Every series' entries, tied to those before: to the last on the line, and to the head that was the gate's base,
    which may have lain elsewhere."""
    lines: dict[_Key, list[Entry]] = {}
    heads: dict[_Key, dict[str, Chain]] = {}
    for row in rows:
        way = tuple(row[column] for column in _WAY)
        entries = lines.setdefault((*(row[column] for column in _SUBJECT), *way), [])
        chains = heads.setdefault((row["name"], *way), {})
        entry = _entry(row)
        last = next((one for one in reversed(entries) if one.on_line and one.job != entry.job), None)
        # The same files run in another way are another thing: they tie nothing.
        base = entry.base_digest if row["run_alike"] else None
        if entry.kind == "gate":
            begun = Chain(Ratio(1.0, 1.0, 1.0), 0, _named(row["base_label"], row["base_commit"]))
            chain = begun if base is None else chains.get(base, begun)
            # Two identical sides differ by noise alone, which is left out.
            identical = base is not None and base == entry.digest
            entry = replace(entry, chain=chain if identical else chain.extended(entry.ratio))
        if last is not None:
            entry = replace(entry, previous=last.value, previous_low=last.low, previous_high=last.high)
            unchanged = entry.digest is not None and entry.digest == last.digest
            entry = replace(entry, together=base is not None and base == last.digest, unchanged=unchanged)
        if entry.digest is not None and entry.chain is not None:
            chains[entry.digest] = entry.chain
        entries.append(entry)
    return lines


def _entry(row: sqlite3.Row) -> Entry:
    kept = ("job", "kind", "label", "digest", "base_digest", "perwatt_version", "verdict", "value", "low", "high")
    return Entry(
        created=datetime.fromisoformat(row["created"]).isoformat(timespec="seconds"),
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
