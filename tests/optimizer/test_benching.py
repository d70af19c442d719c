"""`perwatt.benching`: traffic and capacity whole, by real workers with costs scripted by the null target; and what is made of
windows."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import perwatt
from perwatt.bench.capacity import Try
from perwatt.benching import _joules_at_capacity, _scenario_words, _try_words
from perwatt.contract import OperatingPoint
from perwatt.headline_words import headline
from perwatt.measurement import Window

sys.path.insert(0, str(Path(__file__).parent))
from runs import put_net

NULL: dict[str, Any] = {"target": "null", "time_s": 0.2}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `net.onnx`, to work in."""
    monkeypatch.chdir(tmp_path)
    put_net(tmp_path)
    return tmp_path


@pytest.fixture
def heard() -> list[str]:
    """What progress said."""
    return []


def run(heard: list[str], **options: Any) -> perwatt.BenchReport:
    return perwatt.benchmark("net.onnx", progress=lambda stage, share: heard.append(stage), **{**NULL, **options})


@pytest.mark.slow
def test_rare_requests_have_no_p99_and_progress_counts_windows_scripted_costs(
    here: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perwatt.benching.TRAFFIC_S", 0.5)
    traffic = run(heard, rate_per_s=6.0).subjects[0].traffic
    assert traffic is not None
    # 50 requests would take 8.3 s.
    windows = [said for said in heard if said.startswith("traffic")]
    assert windows == [f"traffic: {number} of 4 windows of 8.3 s" for number in range(1, 5)]
    assert traffic.requests == 200 and traffic.latency_p99_ms is not None
    monkeypatch.setattr("perwatt.benching.TRAFFIC_MOST_S", 0.5)
    few = run(heard, rate_per_s=6.0).subjects[0].traffic
    assert few is not None and few.requests == 12
    assert few.latency_p50_ms is not None and few.latency_p99_ms is None
    fewer = run(heard, rate_per_s=2.0).subjects[0].traffic
    assert fewer is not None and fewer.requests == 4 and fewer.latency_p50_ms is None


@pytest.mark.slow
def test_capacity_tells_what_was_reached_at_that_rate_scripted_costs(here: Path, heard: list[str]) -> None:
    report = run(heard, scenario="server", latency_bound_ms=10.0, meter="modelled")
    capacity = report.subjects[0].capacity
    assert capacity is not None and capacity.rate_per_s is not None and capacity.items_per_request == 1
    proof = capacity.tries[-1]
    assert capacity.latency_ms == proof["latency_ms"] <= 10.0
    assert capacity.utilisation is not None and 0 < capacity.utilisation <= 1
    figure, idle_w = capacity.energy_j_per_request, report.energy["idle_power_w"]
    assert figure is not None and figure.value is not None and figure.method == "modelled" and figure.n == 3
    assert figure.value > idle_w / capacity.rate_per_s
    assert "requests/s within p99 ≤ 10 ms, " in headline(report) and "(modelled, uncertain by" in headline(report)
    tries = [said for said in heard if "p99" in said]
    assert len(tries) == len(capacity.tries) and tries[-1].endswith(" ms, held (net.onnx)")


@pytest.mark.slow
def test_a_bound_that_no_request_meets_is_told_first_and_why_scripted_costs(here: Path, heard: list[str]) -> None:
    report = run(heard, scenario="server", latency_bound_ms=1.0)
    capacity = report.subjects[0].capacity
    assert capacity is not None
    assert (capacity.rate_per_s, capacity.latency_ms, capacity.utilisation) == (None, None, None)
    assert capacity.energy_j_per_request is None
    why = "no rate of requests within p99 ≤ 1 ms: the fastest of all requests took 1.9 ms, and 1 ms are allowed"
    assert headline(report) == f"net.onnx: {why}"


@pytest.mark.slow
def test_drowning_traffic_is_told_in_rates_of_people_scripted_costs(here: Path, heard: list[str]) -> None:
    [note] = [note for note in run(heard, rate_per_s=1e6).subjects[0].notes if "not tried" in note]
    assert note == "traffic of 1,000,000 /s was not tried: it serves about 526 /s"


def served(joules: float | None, refreshes: int | None) -> Window:
    """A window of 2 s with 100 requests."""
    return Window(100, 2.0, 1.0, [1.0] * 100, energy_j=joules, refreshes=refreshes)


ENERGY = {"method": "counter", "boundary": "package", "idle_power_w": 2.0}


def test_joules_at_capacity_are_above_idle_and_the_share_of_idle_power() -> None:
    figure = _joules_at_capacity([served(10.0, 2000)] * 3, 50.0, ENERGY)
    assert figure is not None and figure.value == pytest.approx((10 - 2 * 2) / 100 + 2 / 50)
    assert (figure.unit, figure.n, figure.method, figure.boundary) == ("J", 3, "counter", "package")


@pytest.mark.parametrize(
    ("windows", "idle_w"),
    [
        ([served(10.0, 2000), served(10.0, 20)], 2.0),
        ([served(10.0, 2000), served(None, None)], 2.0),
        ([served(10.0, None)], None),
    ],
)
def test_joules_at_capacity_are_missing_where_a_window_does_not_know_them(
    windows: list[Window], idle_w: float | None
) -> None:
    assert _joules_at_capacity(windows, 50.0, {**ENERGY, "idle_power_w": idle_w}) is None


def test_there_are_no_joules_at_no_capacity() -> None:
    assert _joules_at_capacity([served(10.0, 2000)], None, ENERGY) is None


@pytest.mark.parametrize(
    ("latency_ms", "ok", "said"),
    [
        (18.34, True, "412 /s: p99 18.3 ms, held"),
        (180.0, False, "412 /s: p99 180 ms, too slow"),
        (18.34, False, "412 /s: p99 18.3 ms, backlog grew"),
    ],
)
def test_a_try_tells_its_rate_its_p99_and_how_it_ended(latency_ms: float, ok: bool, said: str) -> None:
    assert _try_words(Try(412.3, latency_ms, 0.0, 1000, 1, ok), bound_ms=20.0) == said


def test_bundles_that_are_loaded_in_different_ways_are_told() -> None:
    a, b = (
        SimpleNamespace(label=label, point=OperatingPoint(scenario=scenario))
        for label, scenario in (("a", "single-stream"), ("b", "offline"))
    )
    said = (
        "not loaded alike (a single-stream, b offline): ratios compare scenarios too; --scenario loads all in one way"
    )
    assert _scenario_words([a, b]) == [said]
    assert _scenario_words([a, a]) == _scenario_words([b]) == []
