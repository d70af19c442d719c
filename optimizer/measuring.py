"""Measures programs side by side: one worker for each, windows interleaved in randomised ABBA blocks.

Windows are short: on a shared machine speed changes by a factor of two within a tenth of a second, and what lies closer
together is disturbed alike (a small network's ratio came out at ±1.9 % after 10 s of 20 ms windows, ±5 % of 200 ms ones).

A block gives every subject two windows: all of them in a random order, and then in the reverse order (A B B A), so that
a machine that slows down or recovers during a block hurts all alike. A subject with two processes (`replicas`) gives
each of them one window of the two; what those two differ by, the model being the same, is the noise floor of the job
(A/A). Ratios are taken within blocks.

Where joules come from a counter, short windows give time only, and longer ones, interleaved in the same way, give
energy: at least 10 s, and 100 refreshes of the counter.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Protocol

from perwatt.bench.statistics import (
    costs_by_round,
    half_width,
    paired_figures,
    paired_ratio,
    percentile,
    percentile_ratio,
)
from perwatt.bench.unavailable import Unavailable
from perwatt.contract import Meter
from perwatt.errors import BackendError
from perwatt.isolation import Worker
from perwatt.measurement import Ratio, Window
from perwatt.sides import Side

FIGURES = (
    "cpu_s_per_inference", "throughput_per_s", "latency_p50_ms", "latency_p99_ms",
    "power_w", "energy_j_per_inference", "throughput_per_watt",
)  # fmt: skip
PERCENTILES = {"latency_p50_ms": 0.5, "latency_p99_ms": 0.99}
OF_ENERGY = ("power_w", "energy_j_per_inference", "throughput_per_watt")

COUNTER_WINDOW_S = 10.0
COUNTER_REFRESHES = 100


POWER_SETTLES_S = 0.5
"""After a change of the power limit: clocks follow within some tenths of a second."""


class Power(Protocol):
    """What sets a GPU's power limit and clock; None is what it was."""

    def apply(self, power_limit_w: float | None = None, clock_mhz: int | None = None) -> None:
        """Set both, or raise TargetError."""

    def choices(self) -> Mapping[str, Sequence[float]]:
        """`power_limit_w` and `clock_mhz` → values worth trying."""


@dataclass(frozen=True)
class Effort:
    """How long to measure. Blocks go on until the CPU-seconds ratio's half-width is below `tight`, at least
    `min_blocks`, at most until `max_s`. `steady_s`: most time for warming up until the cost of a call is steady."""

    window_s: float = 0.04
    warm_up_s: float = 0.3
    min_blocks: int = 16
    max_s: float = 12.0
    tight: float = 0.015
    steady_s: float | None = None


SCREENING = Effort(window_s=0.03, warm_up_s=0.15, min_blocks=8, max_s=2.5, tight=0.025)
LEAST_BLOCKS = 4
"""However slow a program is: fewer say next to nothing of how sure a ratio is."""
STOPPING_RESAMPLES = 1000
"""To decide whether to go on; what is reported has more."""


class Conductor:
    """Gives windows one at a time on the whole machine, and reads the meter around each.

    With `probe`, a worker of its own, what the machine's arithmetic units reach is measured before each block and after
    the last. Not before each window: a probe leaves its data in the caches, and a small network's windows cost a quarter
    more right after one."""

    def __init__(
        self, meter: Meter | None = None, *, probe: Worker | None = None, seed: int = 0, device: str = "cpu"
    ) -> None:
        """`device` is what does the arithmetic, "cpu" or "gpu": it decides what a cost is."""
        self.meter = meter or Unavailable("no meter was asked for")
        self.device = device
        self.probe = probe
        self.power: Power | None = None
        self.random = random.Random(seed)
        self._power_of: tuple[float | None, int | None] = (None, None)
        self._probed: list[dict[str, float]] = []
        self.probe_s = 0.0

    @property
    def counter_window_s(self) -> float | None:
        """Length of a window that the meter's counter can tell the energy of; None where any window will do."""
        if self.meter.refresh_s is None:
            return None
        return max(COUNTER_WINDOW_S, COUNTER_REFRESHES * self.meter.refresh_s)

    def window(self, side: Side, seconds: float) -> Window:
        """One window for time; with its energy where the meter needs no longer ones."""
        self._set_power(side)
        if self.counter_window_s is None:
            self.meter.start()
            window = side.window(seconds)
            self._read(window)
        else:
            window = side.window(seconds)
        side.windows.append(window)
        side.settle()
        return window

    def energy_window(self, side: Side, seconds: float) -> Window:
        """One window that is long enough for the meter."""
        self._set_power(side)
        self.meter.start()
        window = side.held_window(max(seconds, self.counter_window_s or 0.0))
        self._read(window)
        window.latencies_ms = side.latencies_ms()
        side.energy_windows.append(window)
        side.settle()
        return window

    def served(self, side: Side, arrivals_s: Sequence[float]) -> Window:
        """One window of requests that come by themselves, with its energy; kept by the caller."""
        self.meter.start()
        window = side.serve(arrivals_s)
        self._read(window)
        window.latencies_ms = side.latencies_ms()
        side.settle()
        return window

    def idle(self, seconds: float) -> Window:
        """A window without load: the programs are loaded, their processes sleep."""
        self.meter.start()
        start = time.perf_counter()
        time.sleep(seconds)
        window = Window(0, time.perf_counter() - start, 0.0)
        self._read(window)
        return window

    def block(self, subjects: Sequence[Sequence[Side]], give: Callable[[Side], Window]) -> None:
        """One ABBA block: every subject twice, by two of its processes where it has them."""
        self.take_probe()
        order = list(range(len(subjects)))
        self.random.shuffle(order)
        first = [self.random.randrange(len(replicas)) for replicas in subjects]
        for number in order:
            give(subjects[number][first[number]])
        for number in reversed(order):
            give(subjects[number][(first[number] + 1) % len(subjects[number])])

    @property
    def probed(self) -> list[list[dict[str, float]]]:
        """For each block the probe before it and the one after it; the last block's is `take_probe`'s to take."""
        return [list(pair) for pair in pairwise(self._probed)]

    def take_probe(self) -> None:
        """Measure what the machine's arithmetic units reach at this moment."""
        if self.probe is None:
            return
        start = time.perf_counter()
        try:
            self._probed.append(self.probe.call("probe", timeout_s=60.0))
        except BackendError:
            # A machine where the probe does not run is measured without it.
            self.probe.close()
            self.probe = None
        self.probe_s += time.perf_counter() - start

    def _set_power(self, side: Side) -> None:
        """The GPU at the side's own power limit and clock, where the user allowed that to be changed."""
        if self.power is None:
            return
        if self._power_of != side.power:
            # Where that is refused everything is put back, and what is set is not what this side wants.
            self._power_of = (None, None)
            self.power.apply(*side.power)
            self._power_of = side.power
            time.sleep(POWER_SETTLES_S)

    def _read(self, window: Window) -> None:
        reading = self.meter.stop(window)
        window.energy_j, window.energy_reason = reading.energy_j, reading.reason
        window.refreshes, window.meter_cpu_s = reading.refreshes, reading.meter_cpu_s


def interleave(
    sides: Sequence[Side],
    samples: Path,
    effort: Effort,
    progress: Callable[[float], None] = lambda share: None,
    hopeless: Callable[[Ratio], bool] = lambda ratio: False,
    *,
    conductor: Conductor | None = None,
) -> None:
    """Give all sides windows in blocks. The first side is compared with the last: the ratio of their costs decides
    when it is enough, because it is known well or because it is `hopeless`."""
    conductor = conductor or Conductor()
    for side in sides:
        side.windows.clear()
        side.energy_windows.clear()
        side.prepare(samples, effort.warm_up_s, effort.steady_s)

    def enough() -> bool:
        if len(sides) < 2:
            return True
        ratio = cost_ratio(sides[-1], sides[0], conductor.device, resamples=STOPPING_RESAMPLES)
        return half_width(ratio) < effort.tight or hopeless(ratio)

    run_blocks([[side] for side in sides], effort, conductor, enough, progress)


def run_blocks(
    subjects: Sequence[Sequence[Side]],
    effort: Effort,
    conductor: Conductor,
    enough: Callable[[], bool],
    progress: Callable[[float], None] = lambda share: None,
) -> int:
    """Blocks of short windows until `enough` says so or the time is up; returns how many."""
    start = time.perf_counter()
    blocks = 0
    while True:
        conductor.block(subjects, lambda side: conductor.window(side, effort.window_s))
        blocks += 1
        spent = time.perf_counter() - start
        progress(min(1.0, max(blocks / effort.min_blocks / 2, spent / effort.max_s)))
        if spent > effort.max_s and blocks >= LEAST_BLOCKS:
            return blocks
        if blocks >= effort.min_blocks and enough():
            return blocks


def run_energy_blocks(
    subjects: Sequence[Sequence[Side]],
    blocks: int,
    conductor: Conductor,
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Blocks of windows that the meter's counter can tell the energy of; none where short ones have it already."""
    seconds = conductor.counter_window_s
    for number in range(blocks if seconds is not None else 0):
        conductor.block(subjects, lambda side: conductor.energy_window(side, seconds or 0.0))
        progress((number + 1) / blocks)


def figures(windows: Sequence[Window], energy: Sequence[Window] = ()) -> dict[str, float | None]:
    """The figures of one side: medians over its windows, percentiles over all calls; None where there is no energy.
    `energy`: the windows that were long enough for a counter, where there are such."""
    latencies = [latency for w in windows for latency in w.latencies_ms]
    read = energy or windows
    known = [w.energy_j / w.inferences for w in read if w.energy_j is not None]
    joules = median(known) if known and len(known) == len(read) else None
    return {
        "cpu_s_per_inference": median(w.cpu_s / w.inferences for w in windows),
        "throughput_per_s": median(w.inferences / w.wall_s for w in windows),
        "latency_p50_ms": percentile(latencies, 0.5),
        "latency_p99_ms": percentile(latencies, 0.99),
        "power_w": median(w.energy_j / w.wall_s for w in read if w.energy_j is not None) if joules else None,
        "energy_j_per_inference": joules,
        # Inferences a second for each watt is inferences per joule.
        "throughput_per_watt": 1 / joules if joules else None,
    }


def _windows_for(name: str, side: Side) -> list[Window]:
    """The windows that know this figure of a side."""
    return side.energy_windows if name in OF_ENERGY and side.energy_windows else side.windows


def _by_window(name: str, side: Side) -> list[float | None]:
    return [figures([window])[name] for window in _windows_for(name, side)]


def cpu_ratio(optimized: Side, original: Side, resamples: int = 10_000) -> Ratio:
    """Optimized ÷ original in CPU seconds per inference."""
    return cost_ratio(optimized, original, "cpu", resamples)


def cost_ratio(optimized: Side, original: Side, device: str, resamples: int = 10_000) -> Ratio:
    """Optimized ÷ original in what short windows can decide by: CPU seconds per inference, or time on a GPU."""
    pairs = list(zip(optimized.windows, original.windows, strict=False))
    return paired_ratio([_cost(a, device) for a, _ in pairs], [_cost(b, device) for _, b in pairs], resamples=resamples)


def costs(sides: Sequence[Side], device: str) -> list[float]:
    """What an inference costs on each of several sides measured in the same blocks: see `cost_ratio`."""
    return costs_by_round([[_cost(window, device) for window in side.windows] for side in sides])


def _cost(window: Window, device: str) -> float:
    return (window.cpu_s if device == "cpu" else window.wall_s) / window.inferences


def side_by_side(optimized: Side, original: Side) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """The figures of both sides over the same blocks, so that dividing them gives the ratios of `ratios`."""
    ours = figures(optimized.windows, optimized.energy_windows)
    theirs = figures(original.windows, original.energy_windows)
    for name in FIGURES:
        if name in PERCENTILES:
            continue
        both = zip(_by_window(name, optimized), _by_window(name, original), strict=False)
        known = [(a, b) for a, b in both if a and b]
        if known:
            ours[name], theirs[name] = paired_figures([a for a, _ in known], [b for _, b in known])
    return ours, theirs


def ratios(optimized: Side, original: Side) -> dict[str, Ratio]:
    """Optimized ÷ original for every figure, paired window by window, with 95 % intervals."""
    found = {}
    for name in FIGURES:
        ours, theirs = _by_window(name, optimized), _by_window(name, original)
        count = min(len(ours), len(theirs))
        found[name] = paired_ratio(ours[:count], theirs[:count])
    rounds = min(len(optimized.windows), len(original.windows))
    calls = [[window.latencies_ms for window in side.windows[:rounds]] for side in (optimized, original)]
    for name, share in PERCENTILES.items():
        found[name] = percentile_ratio(calls[0], calls[1], share)
    return found
