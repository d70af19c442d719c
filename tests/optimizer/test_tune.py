"""The search for an operating point, on scripted sides: costs are functions of the point, nothing is run or measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perwatt.contract import OperatingPoint
from perwatt.errors import BackendError
from perwatt.measurement import Window
from perwatt.measuring import Conductor
from perwatt.tune import Allowed, Front, Tuning

Cost = Callable[[OperatingPoint], tuple[float, float, float]]
"""CPU milliseconds per inference, inferences a second, latency of a call in ms."""
NOISE = (1.0, 1.004, 0.997, 1.002, 0.998, 1.001, 0.999)


class ScriptedSide:
    """Windows from a function of the point, with a little noise that differs from side to side."""

    def __init__(self, point: OperatingPoint, cost: Cost, number: int, memory_bytes: int = 0) -> None:
        self.point, self.cost, self.number = point, cost, number
        self.windows: list[Window] = []
        self.energy_windows: list[Window] = []
        self.facts: dict[str, Any] = {"operating_point": point.to_json()}
        self.memory_bytes, self.peak_memory_bytes = memory_bytes, None
        self.closed, self.given = False, 0

    def window(self, seconds: float) -> Window:
        cpu_ms, rate, latency_ms = self.cost(self.point)
        self.given += 1
        noise = NOISE[(self.given * (1 + self.number)) % len(NOISE)]
        return Window(100, 100 / rate * noise, 0.1 * cpu_ms * noise, [latency_ms * noise] * 20)

    def settle(self) -> None:
        """Nothing runs."""

    def note_memory(self) -> None:
        self.peak_memory_bytes = self.memory_bytes

    def close(self) -> None:
        self.closed = True


class Bench:
    """Opens scripted sides and remembers them."""

    def __init__(self, cost: Cost, refused: Callable[[OperatingPoint], bool] = lambda point: False) -> None:
        self.cost, self.refused, self.memory = cost, refused, lambda point: 0
        self.opened: list[ScriptedSide] = []

    def open_at(self, point: OperatingPoint) -> ScriptedSide:
        if self.refused(point):
            raise BackendError(f"no kernel for {point.words()}")
        self.opened.append(ScriptedSide(point, self.cost, len(self.opened), self.memory(point)))
        return self.opened[-1]

    def search(self, start: OperatingPoint, knobs: dict[str, list[Any]], **options: Any) -> Front:
        first = options.pop("first", None)
        tuning = Tuning(self.open_at, lambda side, effort: None, Conductor(), **options)  # type: ignore[arg-type]
        front = tuning.run(start, knobs, first)
        assert all(side.closed for side in self.opened)
        return front


OFFLINE = OperatingPoint("offline", batch=32)
KNOBS: dict[str, list[Any]] = {
    "threads": [None, 1, 2, 4], "streams": [None, 1, 2, 4], "batch": [1, 2, 4, 8, 16, 32, 64], "pinned": [None, True],
}  # fmt: skip


def plain(point: OperatingPoint) -> tuple[float, float, float]:
    """Cheapest at 2 streams of 4 threads and batch 8; one thread is cheap and slow."""
    threads, streams = point.threads or 4, point.streams or 4
    cpu = 1.0 + 0.2 * abs(streams - 2) + (0.0 if threads > 1 else -0.6)
    cpu *= 1 + 0.1 * abs(point.batch.bit_length() - 4) - (0.05 if point.pinned else 0.0)
    return cpu, 1000 * threads / cpu, point.batch / threads


def test_the_cheapest_point_is_found_round_by_round() -> None:
    front = Bench(plain).search(OFFLINE, KNOBS)
    best = front.best.point
    assert (best.streams, best.batch, best.pinned) == (2, 8, True)
    assert front.best.ratios["cpu_s_per_inference"].value == pytest.approx(0.95 / (1.4 * 1.2), rel=0.02)
    assert front.trials[0].point == OFFLINE


def test_fewer_cpu_seconds_bought_with_less_throughput_do_not_win_and_are_kept_with_the_reason() -> None:
    front = Bench(plain).search(OFFLINE, KNOBS)
    slow = [trial for trial in front.trials if trial.point.threads == 1]
    assert slow and all(trial.reason.startswith("slower: ") for trial in slow)
    assert min(t.figures["cpu_s_per_inference"] for t in slow) < front.best.figures["cpu_s_per_inference"]


def test_in_single_stream_the_median_latency_may_not_rise() -> None:
    def cost(point: OperatingPoint) -> tuple[float, float, float]:
        threads = point.threads or 2
        return 0.5 * threads, 1000.0, {1: 1.5, 2: 1.0, 4: 0.9}[threads]

    front = Bench(cost).search(OperatingPoint(), {"threads": [None, 1, 2, 4]})
    assert front.best.point.threads in (None, 2)
    barred = next(t for t in front.trials if t.point.threads == 1)
    assert barred.reason == "slower: 1.50× of the start's median latency"


def test_the_p99_and_the_memory_allowed_bar_a_point() -> None:
    bench = Bench(lambda point: (1 / point.batch, 100.0 * point.batch, 2.0 * point.batch))
    assert (
        bench.search(
            replace(OFFLINE, batch=4), {"batch": [1, 2, 4, 8, 16]}, allowed=Allowed(p99_ms=17.0)
        ).best.point.batch
        == 8
    )
    bench.memory = lambda point: 1_000_000 * point.batch
    front = bench.search(
        replace(OFFLINE, batch=4), {"batch": [1, 2, 4, 8, 16]}, allowed=Allowed(memory_bytes=9_000_000)
    )
    assert front.best.point.batch == 8
    assert next(t for t in front.trials if t.point.batch == 16).reason == "memory: 16 MB of 9 MB allowed"


def test_where_the_start_itself_is_not_allowed_the_best_that_is_wins_whatever_it_costs() -> None:
    bench = Bench(lambda point: (1 / point.batch, 100.0, 2.0 * point.batch))
    front = bench.search(OFFLINE, {"batch": [1, 2, 4, 8, 16, 32]}, allowed=Allowed(p99_ms=20.0))
    assert front.best.point.batch <= 8


def test_a_batch_whose_call_would_take_too_long_is_not_tried() -> None:
    bench = Bench(lambda point: (1 / point.batch, 10.0, 100.0 * point.batch))
    bench.search(replace(OFFLINE, batch=2), {"batch": [1, 2, 4, 8, 16, 32, 64]})
    assert max(side.point.batch for side in bench.opened) == 8


def test_a_point_that_the_backend_refuses_is_told_and_the_search_goes_on() -> None:
    front = Bench(plain, lambda point: point.streams == 2).search(OFFLINE, KNOBS)
    refused = [t for t in front.trials if t.point.streams == 2]
    assert refused and all("no kernel for" in t.reason and not t.figures for t in refused)
    assert front.best.point.streams in (1, 4, None)
    assert not set(map(id, refused)) & set(map(id, front.undominated()))


def test_a_start_that_does_not_run_is_an_error() -> None:
    with pytest.raises(BackendError, match="no kernel"):
        Bench(plain, lambda point: True).search(OFFLINE, KNOBS)


def test_what_an_earlier_search_ended_with_is_tried_first_and_where_it_holds_nothing_else_is() -> None:
    known = replace(OFFLINE, streams=2, threads=4, batch=8, pinned=True)
    bench = Bench(plain)
    assert bench.search(OFFLINE, KNOBS, first=known).best.point == known
    assert [side.point for side in bench.opened] == [OFFLINE, known]


def test_what_an_earlier_search_ended_with_is_not_believed_where_it_is_worse_now() -> None:
    bench = Bench(plain)
    front = bench.search(OFFLINE, KNOBS, first=replace(OFFLINE, batch=1))
    assert front.best.point.batch == 8 and len(bench.opened) > 5


def test_nothing_else_is_opened_when_the_time_is_up() -> None:
    bench = Bench(plain)
    assert bench.search(OFFLINE, KNOBS, deadline=0.0).best.point == OFFLINE
    assert [side.point for side in bench.opened] == [OFFLINE]


def test_the_front_has_what_no_other_point_beats_in_everything() -> None:
    front = Bench(plain).search(OFFLINE, KNOBS)
    kept = front.undominated()
    assert [t.figures["cpu_s_per_inference"] for t in kept] == sorted(t.figures["cpu_s_per_inference"] for t in kept)
    for a, b in itertools.permutations(kept, 2):
        figures = [("cpu_s_per_inference", 1), ("throughput_per_s", -1), ("latency_p99_ms", 1)]
        assert any(sign * a.figures[n] < sign * b.figures[n] for n, sign in figures), "one beats the other"
    fastest = max(front.trials, key=lambda t: t.figures.get("throughput_per_s") or 0.0)
    assert fastest.figures["throughput_per_s"] == max(t.figures["throughput_per_s"] for t in kept)


def test_a_point_that_crashes_while_it_is_raced_costs_itself_and_not_the_search() -> None:
    class Crashes(ScriptedSide):
        def window(self, seconds: float) -> Window:
            if self.point.streams == 2 and self.given > 3:
                raise BackendError("tuning: the worker was ended by SIGSEGV during drive")
            return super().window(seconds)

    bench = Bench(plain)
    opened = bench.opened
    bench.open_at = lambda point: opened.append(Crashes(point, plain, len(opened))) or opened[-1]  # type: ignore[method-assign]
    front = bench.search(OFFLINE, KNOBS)
    crashed = [t for t in front.trials if t.point.streams == 2]
    assert crashed and all("SIGSEGV" in t.reason and not t.figures for t in crashed)
    assert front.best.point.streams != 2 and front.best.ratios["cpu_s_per_inference"].value < 1


def test_no_more_than_a_few_processes_hold_the_model_at_once() -> None:
    bench = Bench(plain)
    most = 0
    real = bench.open_at

    def counted(point: OperatingPoint) -> ScriptedSide:
        nonlocal most
        side = real(point)
        most = max(most, sum(not one.closed for one in bench.opened))
        return side

    bench.open_at = counted  # type: ignore[method-assign]
    many = [1, 2, 4, 8, 16, 32, 64]
    bench.search(replace(OFFLINE, threads=64), {"threads": many, "streams": many})
    assert most <= 8 < len(bench.opened)


def test_a_search_that_was_cut_short_says_so() -> None:
    assert Bench(plain).search(OFFLINE, KNOBS).complete
    assert not Bench(plain).search(OFFLINE, KNOBS, deadline=0.0).complete


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.2, 5.0), min_size=4, max_size=4))
def test_what_wins_is_never_worse_than_the_start(costs: list[float]) -> None:
    def cost(point: OperatingPoint) -> tuple[float, float, float]:
        value = costs[point.batch.bit_length() - 1]
        return value, 1000 / value, value

    front = Bench(cost).search(replace(OFFLINE, batch=2), {"batch": [1, 2, 4, 8]})
    assert cost(front.best.point)[0] <= cost(replace(OFFLINE, batch=2))[0]
