"""`perwatt.history`: what is written down, what may stand in one line, and what the gates chain up to."""

from __future__ import annotations

import json
import math
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench_report import BenchReport, Figure
from perwatt.errors import InputError
from perwatt.gate_report import ComparedAccuracy, GateReport
from perwatt.history import Chain, Series, as_json, of_machine, record_bench, record_gate, trend
from perwatt.measurement import Ratio
from perwatt.report import RatioFigure

sys.path.insert(0, str(Path(__file__).parent))
from histories import EPYC, PLACE, POINT, XEON, a_bench, a_digest, a_gate, a_month, a_side, a_subject, compared, joules

CPU = "cpu_s_per_inference"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a history may be begun."""
    return tmp_path / "new folder" / "history.sqlite"


def record(file: Path, *reports: GateReport | BenchReport) -> None:
    """Write all down; nothing may go wrong."""
    for report in reports:
        note = record_gate(report, file) if isinstance(report, GateReport) else record_bench(report, file)
        assert note is None


def rows(file: Path, query: str) -> list[tuple[Any, ...]]:
    """What the file itself holds."""
    connection = sqlite3.connect(file)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def only(series: list[Series]) -> Series:
    [one] = series
    return one


# Writing down -----------------------------------------------------------------------------------------------------


def test_a_gate_is_a_row_for_each_side_with_its_figures(file: Path) -> None:
    gate = a_gate("main", a_side("change", dirty=True), (130e-6, 120e-6))
    record(file, gate)
    columns = "kind, side, name, label, commit_id, dirty, digest, target, scenario, machine, perwatt_version, verdict"
    assert rows(file, f"SELECT {columns} FROM runs ORDER BY id") == [
        ("gate", "base", "resnet20", "main", a_digest("main")[7:47], 0, a_digest("main"), "cpu", "single-stream",
         "1a2b3c4d5e6f", "0.2.0", None),
        ("gate", "head", "resnet20", "change", a_digest("change")[7:47], 1, a_digest("change"), "cpu", "single-stream",
         "1a2b3c4d5e6f", "0.2.0", "pass"),
    ]  # fmt: skip
    assert [json.loads(point) for (point,) in rows(file, "SELECT operating_point FROM runs")] == [POINT, POINT]
    assert [json.loads(facts) for (facts,) in rows(file, "SELECT fingerprint FROM machines")] == [EPYC["fingerprint"]]
    figure = f"FROM figures JOIN runs ON runs.id = run WHERE figure = '{CPU}' ORDER BY run"
    assert rows(file, f"SELECT side, value, low, high, n, unit, ratio, floor {figure}") == [
        ("base", 130e-6, 130e-6 * 0.98, 130e-6 * 1.02, 24, "s", None, None),
        ("head", 120e-6, 120e-6 * 0.98, 120e-6 * 1.02, 24, "s", 120 / 130, 0.01),
    ]
    assert rows(file, "SELECT method, boundary FROM figures WHERE figure = 'throughput_per_watt'") == [
        ("counter", "package"), ("counter", "package"),
    ]  # fmt: skip


def test_a_bench_is_a_row_for_each_subject(file: Path) -> None:
    bench = a_bench([a_subject("first"), a_subject("second", 90e-6, name="resnet20")], disturbed=["load"])
    assert record_bench(bench, file) is None
    assert rows(file, "SELECT kind, side, name, label, verdict, disturbed FROM runs ORDER BY id") == [
        ("bench", "subject", "first", "first", None, 1),
        ("bench", "subject", "resnet20", "second", None, 1),
    ]
    assert only(trend("size_bytes", name="resnet20", path=file)).entries[0].value == 1_000_000


def test_the_same_report_twice_is_there_once(file: Path) -> None:
    record(file, a_gate(), a_gate(), a_bench(), a_bench())
    assert rows(file, "SELECT count(*) FROM runs") == [(3,)]


def test_dates_are_kept_in_utc_and_entries_stand_in_the_order_of_time(file: Path) -> None:
    record(
        file,
        a_gate("b", "c", created="2026-09-01T23:00:00-05:00"),
        a_gate("a", "b", created="2026-09-02T01:00:00"),
        a_gate("main", "a", created="2026-09-02T02:30:00.75+02:00"),
    )
    assert [(entry.created, entry.label) for entry in only(trend(CPU, path=file)).entries] == [
        ("2026-09-02T00:30:00+00:00", "a"), ("2026-09-02T01:00:00+00:00", "b"), ("2026-09-02T04:00:00+00:00", "c"),
    ]  # fmt: skip


def test_a_label_that_is_no_text_and_figures_that_are_no_numbers(file: Path) -> None:
    figures = {
        CPU: compared(1e-4, 1e-4, ratio=RatioFigure(value=math.inf), head_interval=(math.nan, math.inf)),
        "latency_p99_ms": compared(1.0, math.nan, "ms"),
    }
    record(file, a_gate(head=a_side("change", label="bundle-\udcff"), figures=figures))
    [entry] = only(trend(CPU, path=file)).entries
    assert entry.label == "bundle-\\udcff"
    assert (entry.low, entry.high, entry.ratio.value, entry.chain) == (None, None, None, None)
    assert trend("latency_p99_ms", path=file) == []


def test_a_report_that_names_no_machine_is_not_written_down(file: Path) -> None:
    note = record_gate(a_gate(machine={"governor": "performance"}), file)
    assert note is not None and "which machine" in note
    assert not file.exists()


def test_a_machine_with_facts_and_no_digest_gets_one(file: Path) -> None:
    facts = EPYC["fingerprint"]
    record(file, a_gate(machine={"fingerprint": facts}), a_gate(day=2, machine={"fingerprint": facts}))
    assert len(only(trend(CPU, path=file)).entries) == 2


# Series -----------------------------------------------------------------------------------------------------------


def with_point(**point: Any) -> GateReport:
    changed = {**POINT, **point}
    return a_gate(head=a_side("change", operating_point=changed), base=a_side("main", operating_point=changed), day=2)


OTHERS: dict[str, tuple[str, GateReport]] = {
    "another machine": (CPU, a_gate(machine=XEON, day=2)),
    "another model": (CPU, a_gate(name="resnet50", day=2)),
    "another target": (CPU, a_gate(head=a_side("change", target="onnxruntime"), day=2)),
    "another scenario": (CPU, a_gate(measuring={"scenario": "offline"}, day=2)),
    "another batch": (CPU, with_point(batch=8)),
    "another precision": (CPU, with_point(floating_precision="bf16")),
    "another method": (
        "throughput_per_watt", a_gate(figures={"throughput_per_watt": joules(3e3, 3e3, "modelled")}, day=2),
    ),
    "another boundary": (
        "throughput_per_watt", a_gate(figures={"throughput_per_watt": joules(3e3, 3e3, boundary="wall")}, day=2),
    ),
    "another metric": ("accuracy", a_gate(
        accuracy=ComparedAccuracy(metric="top5", unit="fraction", n=9, base=1.0, head=1.0, drop=0, low=0, high=0), day=2,
    )),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_what_may_not_be_compared_stands_apart(file: Path, what: str) -> None:
    figure, other = OTHERS[what]
    record(file, a_gate(), other)
    assert [len(series.entries) for series in trend(figure, path=file)] == [1, 1]
    assert all(entry.previous is None for series in trend(figure, path=file) for entry in series.entries)


def test_the_order_of_an_operating_points_keys_is_no_difference(file: Path) -> None:
    turned = dict(reversed(POINT.items()))
    sides = {"head": a_side("change", operating_point=turned), "base": a_side("main", operating_point=turned)}
    record(file, a_gate(), a_gate(day=2, **sides))
    assert len(only(trend(CPU, path=file)).entries) == 2


def test_filters(file: Path) -> None:
    record(file, *(other for _, other in OTHERS.values()), a_gate())
    assert {series.name for series in trend(CPU, name="resnet50", path=file)} == {"resnet50"}
    assert {series.fingerprint for series in trend(CPU, fingerprint=XEON["digest"], path=file)} == {XEON["digest"]}
    assert {series.target for series in trend(CPU, target="onnxruntime", path=file)} == {"onnxruntime"}
    assert {series.scenario for series in trend(CPU, scenario="offline", path=file)} == {"offline"}
    here, others = of_machine(trend(CPU, path=file), XEON["digest"])
    assert [series.machine["name"] for series in here] == ["Intel Xeon 8481C"]
    assert XEON["digest"] not in {series.fingerprint for series in others}


# The line ---------------------------------------------------------------------------------------------------------


def test_the_line_is_heads_and_subjects_without_bases_and_failed_heads(file: Path) -> None:
    record(file, *a_month())
    by_name = {series.name: series for series in trend(CPU, path=file)}
    entries = by_name["resnet20"].entries
    assert [entry.label for entry in entries] == ["a", "b", "c", "d", "e"]
    assert [entry.label for entry in entries if not entry.on_line] == ["c"]
    # d comes after b: c, whose gate failed, is nobody's predecessor.
    assert [entry.previous for entry in entries] == [None, 123e-6, 112e-6, 112e-6, 114e-6]
    assert [entry.together for entry in entries] == [False, True, True, True, True]
    assert [entry.label for entry in by_name["nightly"].entries] == ["nightly"]


def test_a_bench_stands_in_the_line_of_its_name(file: Path) -> None:
    record(file, a_gate())
    assert record_bench(a_bench([a_subject("mine", 99e-6, name="resnet20")], day=2), file) is None
    entry = only(trend(CPU, path=file)).entries[-1]
    assert (entry.kind, entry.value, entry.previous, entry.chain) == ("bench", 99e-6, 120e-6, None)


def test_the_limit_keeps_the_newest_and_what_they_follow(file: Path) -> None:
    record(file, *a_month())
    series = only(trend(CPU, name="resnet20", limit=2, path=file))
    assert [entry.label for entry in series.entries] == ["d", "e"]
    assert series.older == 3
    assert series.entries[0].previous == 112e-6
    assert series.entries[-1].chain == only(trend(CPU, name="resnet20", path=file)).entries[-1].chain


def test_a_missing_figure_is_no_entry(file: Path) -> None:
    record(file, a_bench([a_subject(figures={CPU: Figure(value=None, unit="s")})]))
    assert trend(CPU, path=file) == []


# Chains -----------------------------------------------------------------------------------------------------------


def test_gates_chain_where_a_base_is_an_earlier_head(file: Path) -> None:
    record(file, *a_month())
    chains = [entry.chain for entry in only(trend(CPU, name="resnet20", path=file)).entries]
    a, b, d, e = 123 / 130, 112 / 124, 114 / 119, 101 / 117
    assert [chain.jobs for chain in chains if chain] == [1, 2, 3, 3, 4]
    assert [chain.ratio.value for chain in chains if chain] == pytest.approx(
        [a, a * b, a * b * 133 / 112, a * b * d, a * b * d * e]
    )
    assert {chain.since for chain in chains if chain} == {f"main at {a_digest('main')[7:16]}"}


def test_a_chain_is_surer_than_its_parts_added_up(file: Path) -> None:
    record(file, a_gate("main", "a", (1.0, 1.0)), a_gate("a", "b", (1.0, 1.0), day=2))
    chain = only(trend(CPU, path=file)).entries[-1].chain
    assert chain is not None and chain.ratio.low is not None and chain.ratio.high is not None
    # Two independent intervals of 2 % make one of √2 · 2 %, to first order.
    assert chain.ratio.high == pytest.approx(1 + 0.02 * math.sqrt(2), abs=1e-3)
    assert chain.ratio.low == pytest.approx(1 - 0.02 * math.sqrt(2), abs=1e-3)


def test_two_identical_sides_add_nothing_to_a_chain(file: Path) -> None:
    record(
        file, a_gate("main", "a", (1.0, 0.9)), a_gate("a", "a", (0.9, 0.93), day=2), a_gate("a", "b", (1.0, 0.9), day=3)
    )
    entries = only(trend(CPU, path=file)).entries
    assert entries[1].chain == entries[0].chain
    assert entries[2].chain is not None and entries[2].chain.ratio.value == pytest.approx(0.81)


def test_a_base_that_ran_in_another_way_ties_nothing(file: Path) -> None:
    other = a_side("a", operating_point={**POINT, "streams": 4})
    record(file, a_gate("main", "a"), a_gate(other, "b", day=2))
    entry = only(trend(CPU, path=file)).entries[-1]
    assert not entry.together
    assert entry.chain is not None and (entry.chain.jobs, entry.chain.since[:4]) == (1, "a at")


def test_a_gate_without_a_ratio_breaks_the_chain(file: Path) -> None:
    nothing = {CPU: compared(1.0, 1.0, ratio=RatioFigure(value=None))}
    record(file, a_gate("main", "a"), a_gate("a", "b", day=2, figures=nothing), a_gate("b", "c", day=3))
    chains = [entry.chain for entry in only(trend(CPU, path=file)).entries]
    assert chains[1] is None
    assert chains[2] is not None and chains[2].jobs == 1


def test_another_machines_gate_is_no_link(file: Path) -> None:
    record(file, a_gate("main", "a", machine=XEON), a_gate("a", "b", day=2))
    assert [entry.chain.jobs for series in trend(CPU, path=file) for entry in series.entries if entry.chain] == [1, 1]


ratios = st.tuples(st.floats(0.01, 100), st.floats(0, 0.5), st.floats(0, 0.5)).map(
    lambda drawn: Ratio(drawn[0], drawn[0] * (1 - drawn[1]), drawn[0] * (1 + drawn[2]))
)


@given(st.lists(ratios, min_size=1, max_size=8))
def test_a_chain_is_the_product_within_its_interval(jobs: list[Ratio]) -> None:
    chain: Chain | None = Chain(Ratio(1.0, 1.0, 1.0), 0, "main")
    for job in jobs:
        assert chain is not None
        chain = chain.extended(job)
    assert chain is not None and chain.jobs == len(jobs)
    found = chain.ratio
    assert found.value is not None and found.low is not None and found.high is not None
    assert found.value == pytest.approx(math.prod(job.value or 0 for job in jobs))
    assert found.low <= found.value * (1 + 1e-12) and found.value <= found.high * (1 + 1e-12)
    # Never wider than if every job had been wrong in the same direction.
    assert found.low >= math.prod(job.low or 0 for job in jobs) * (1 - 1e-9)
    assert found.high <= math.prod(job.high or 0 for job in jobs) * (1 + 1e-9)


def test_a_ratio_without_bounds_leaves_a_chain_without() -> None:
    chain = Chain(Ratio(1.0, 1.0, 1.0), 0, "main").extended(Ratio(0.9))
    assert chain is not None and chain.ratio == Ratio(0.9)
    assert chain.extended(Ratio(-0.5, -0.6, -0.4)) is None


# Asking -----------------------------------------------------------------------------------------------------------


def test_unknown_figures_and_names_say_the_nearest(file: Path) -> None:
    record(file, a_gate())
    with pytest.raises(InputError, match="did you mean cpu_s_per_inference"):
        trend("cpu_s_per_inferense", path=file)
    with pytest.raises(InputError, match="unknown name in the history 'resnet2': did you mean resnet20"):
        trend(CPU, name="resnet2", path=file)
    with pytest.raises(InputError, match="give 1 or more"):
        trend(CPU, limit=0, path=file)


def test_as_json_is_plain_data(file: Path) -> None:
    record(file, *a_month())
    plain = as_json(trend(CPU, path=file))
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain | {
        "series": [{**one, "entries": list(one["entries"])} for one in plain["series"]]
    }
    assert plain["schema_version"] == 1
    last = plain["series"][-1]["entries"][-1]
    assert plain["series"][-1]["place"] == PLACE and last["created"] == "2026-09-28T10:11:12+00:00"
    assert last["value"] == 101e-6 and last["chain"]["jobs"] == 4 and last["ratio"]["low"] < last["ratio"]["high"]


def test_as_json_of_nothing() -> None:
    assert as_json([]) == {"schema_version": 1, "series": []}
