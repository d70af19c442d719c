"""Blocks: every subject twice, mirrored, in random order; long windows where a counter needs them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from perwatt.bench.scripted import Scripted
from perwatt.errors import BackendError
from perwatt.measurement import Window
from perwatt.measuring import Conductor, Effort, figures, interleave, run_blocks, run_energy_blocks


class LoggedSide:
    """A side that logs who was given a window; nothing runs."""

    def __init__(self, label: str, log: list[str], cpu_s: float = 0.01) -> None:
        self.label, self.log, self.cpu_s = label, log, cpu_s
        self.windows: list[Window] = []
        self.energy_windows: list[Window] = []

    def window(self, seconds: float) -> Window:
        self.log.append(self.label)
        return Window(10, seconds, 10 * self.cpu_s, [seconds * 100] * 10)

    def held_window(self, seconds: float) -> Window:
        self.held = self.window(seconds)
        return replace(self.held, latencies_ms=[])

    def latencies_ms(self) -> list[float]:
        return self.held.latencies_ms

    def settle(self) -> None:
        self.log.append("settled")

    def prepare(self, samples: Path, warm_up_s: float, most_s: float | None = None) -> None:
        self.log.append(f"{self.label} prepared")


class ScriptedProbe:
    """A probe worker that answers, until it breaks."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.asked, self.breaks_at, self.closed = 0, breaks_at, False

    def call(self, operation: str, **parameters: object) -> dict[str, float]:
        self.asked += 1
        if self.asked == self.breaks_at:
            raise BackendError("probe: the worker was ended by SIGILL during probe")
        return {"f32": 1.0}

    def close(self) -> None:
        self.closed = True


def order(log: list[str]) -> list[str]:
    return [entry for entry in log if entry != "settled"]


def test_a_block_is_mirrored_and_gives_each_process_of_a_subject_one_window():
    log: list[str] = []
    subjects = [[LoggedSide(f"{name}{number}", log) for number in (1, 2)] for name in "ab"]
    conductor = Conductor(seed=3)
    seen = set()
    for _ in range(40):
        log.clear()
        conductor.block(subjects, lambda side: conductor.window(side, 0.05))
        found = order(log)
        assert [x[0] for x in found] == [x[0] for x in reversed(found)], "A B B A"
        assert sorted(found) == ["a1", "a2", "b1", "b2"]
        assert log.count("settled") == 4, "each waits until it is idle"
        seen.add(tuple(found))
    assert len(seen) == 8, "which subject is first, and which process, is drawn"
    for subject in subjects:
        assert [len(side.windows) for side in subject] == [40, 40]


def test_a_subject_with_one_process_gets_both_windows():
    log: list[str] = []
    sides = [LoggedSide(name, log) for name in "abc"]
    conductor = Conductor()
    conductor.block([[side] for side in sides], lambda side: conductor.window(side, 0.05))
    assert Counter(order(log)) == {"a": 2, "b": 2, "c": 2}
    assert order(log) == list(reversed(order(log)))


def test_blocks_go_on_until_it_is_enough_but_never_fewer_than_the_least():
    log: list[str] = []
    subjects = [[LoggedSide("a", log)], [LoggedSide("b", log)]]
    asked = []

    def enough() -> bool:
        asked.append(len(subjects[0][0].windows))
        return len(asked) == 3

    assert run_blocks(subjects, Effort(min_blocks=5, max_s=60), Conductor(), enough) == 7
    assert asked == [10, 12, 14]


def test_interleaving_compares_the_last_with_the_first():
    log: list[str] = []
    sides = [LoggedSide("a", log), LoggedSide("b", log, cpu_s=0.02)]
    ratios = []
    interleave(
        sides, Path("samples"), Effort(min_blocks=2, max_s=60, tight=0.0), hopeless=lambda r: ratios.append(r) or True
    )
    assert ratios[0].value == pytest.approx(2.0)
    assert log[:2] == ["a prepared", "b prepared"]


def test_a_model_of_the_machine_gives_every_window_its_energy_scripted_meter():
    side = LoggedSide("a", [])
    conductor = Conductor(Scripted(watts=10.0))
    conductor.window(side, 0.5)
    assert side.windows[0].energy_j == pytest.approx(5.0)
    run_energy_blocks([[side]], 2, conductor)
    assert side.energy_windows == []
    assert figures(side.windows)["power_w"] == pytest.approx(10.0)


@pytest.mark.parametrize(("refresh_s", "wanted_s"), [(0.001, 10.0), (0.1, 10.0), (0.5, 50.0)])
def test_a_counter_gets_windows_of_10_s_and_100_refreshes_scripted_meter(refresh_s, wanted_s):
    side = LoggedSide("a", [])
    meter = Scripted(watts=10.0)
    meter.refresh_s = refresh_s
    conductor = Conductor(meter)
    conductor.window(side, 0.05)
    assert side.windows[0].energy_j is None, "a short window tells nothing"
    run_energy_blocks([[side]], 2, conductor)
    assert [window.wall_s for window in side.energy_windows] == [wanted_s] * 4
    assert all(window.latencies_ms for window in side.energy_windows), "fetched when the meter had been read"
    found = figures(side.windows, side.energy_windows)
    assert found["power_w"] == pytest.approx(10.0)
    assert found["throughput_per_s"] == pytest.approx(10 / 0.05), "time comes from the short ones"


def test_without_a_meter_there_is_no_energy_and_a_reason():
    side = LoggedSide("a", [])
    Conductor().window(side, 0.05)
    assert side.windows[0].energy_j is None
    assert "no meter" in side.windows[0].energy_reason
    assert figures(side.windows)["throughput_per_watt"] is None


def test_the_machine_is_probed_before_each_block_and_after_the_last_scripted_probe():
    probe = ScriptedProbe()
    conductor = Conductor(probe=probe)
    sides = [LoggedSide(name, []) for name in "ab"]
    for _ in range(3):
        conductor.block([[side] for side in sides], lambda side: conductor.window(side, 0.05))
    conductor.take_probe()
    assert probe.asked == 4
    assert [len(block) for block in conductor.probed] == [2, 2, 2]


def test_a_probe_that_breaks_costs_the_probe_and_not_the_job_scripted_probe():
    probe = ScriptedProbe(breaks_at=2)
    conductor = Conductor(probe=probe)
    side = LoggedSide("a", [])
    for _ in range(3):
        conductor.block([[side]], lambda side: conductor.window(side, 0.05))
    assert len(side.windows) == 6
    assert probe.closed and conductor.probe is None
