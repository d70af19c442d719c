"""Measures programs side by side: one worker for each, windows interleaved, until the ratio is known well enough.

Each round gives every side one window, in an order that turns round with every round (A B, B A, …), so that a machine
that slows down or recovers hurts all sides alike. Ratios are taken within rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from perwatt.artifact import Artifact
from perwatt.bench.statistics import half_width, paired_figures, paired_ratio, percentile, percentile_ratio
from perwatt.contract import OperatingPoint
from perwatt.isolation import Worker
from perwatt.measurement import Ratio, Window

FIGURES = (
    "cpu_s_per_inference", "throughput_per_s", "latency_p50_ms", "latency_p99_ms",
    "power_w", "energy_j_per_inference", "throughput_per_watt",
)  # fmt: skip


PERCENTILES = {"latency_p50_ms": 0.5, "latency_p99_ms": 0.99}


@dataclass(frozen=True)
class Effort:
    """How long to measure. Rounds go on until the CPU-seconds ratio's half-width is below `tight`, at least
    `min_rounds`, at most until `max_s`."""

    window_s: float = 0.15
    warm_up_s: float = 0.3
    min_rounds: int = 12
    max_s: float = 12.0
    tight: float = 0.015


CALL_TIMEOUT_S = 600.0
"""A backend that takes longer for a few calls hangs, or is of no use."""

SCREENING = Effort(window_s=0.1, warm_up_s=0.15, min_rounds=6, max_s=2.5, tight=0.025)


class Side:
    """One program in one worker, with the windows it was given."""

    def __init__(self, label: str, worker: Worker) -> None:
        self.label = label
        self.worker = worker
        self.facts: dict[str, Any] = {}
        self.windows: list[Window] = []
        self.peak_memory_bytes: int | None = None
        self._prepared: Path | None = None
        self._load: Callable[[], dict[str, Any]] = dict

    @classmethod
    def lowered(
        cls,
        label: str,
        target: str,
        artifact: Artifact,
        point: OperatingPoint,
        folder: Path,
        worker: Worker | None = None,
    ) -> Side:
        """Lower `artifact` in a worker of its own, or in `worker`, whose last program makes room for it."""
        side = cls(label, worker or Worker(label))
        side.worker.start()
        model = str(artifact.file(folder))
        side._load = lambda: side.worker.call("open", target=target, model=model, point=asdict(point))
        try:
            side.load()
        except BaseException:
            side.close()
            raise
        return side

    @classmethod
    def eager(cls, exported: Path, artifact: Artifact, point: OperatingPoint, folder: Path) -> Side:
        """Run torch eager in a worker; `load()` takes a while, and may be called meanwhile, in another thread."""
        side = cls("torch eager", Worker("torch eager"))
        side.worker.start()
        model = str(artifact.file(folder))
        side._load = lambda: side.worker.call("open_eager", exported=str(exported), model=model, point=asdict(point))
        return side

    def load(self) -> None:
        """Load the program into the worker, anew where the worker died."""
        self.facts = self._load()
        self._prepared = None

    def prepare(self, samples: Path, warm_up_s: float) -> None:
        """Load the calls and warm up; a side that did so already is warm."""
        if self._prepared != samples:
            self.worker.call("prepare", timeout_s=CALL_TIMEOUT_S, samples=str(samples), warm_up_s=warm_up_s)
            self._prepared = samples

    def window(self, seconds: float) -> Window:
        """One more window of load."""
        window = Window(**self.worker.call("drive", timeout_s=CALL_TIMEOUT_S + 10 * seconds, seconds=seconds))
        self.windows.append(window)
        return window

    def note_memory(self) -> None:
        """Keep the highest resident memory of this side's process so far: inference, before anything else is asked."""
        self.peak_memory_bytes = self.worker.call("memory")["peak_memory_bytes"]

    def close(self) -> None:
        """End the worker."""
        self.worker.close()


def interleave(
    sides: Sequence[Side],
    samples: Path,
    effort: Effort,
    progress: Callable[[float], None] = lambda share: None,
    hopeless: Callable[[Ratio], bool] = lambda ratio: False,
) -> None:
    """Give all sides windows in turn. The first side is compared with the last: their ratio of CPU seconds decides when
    it is enough, because it is known well or because it is `hopeless`."""
    for side in sides:
        side.windows.clear()
        side.prepare(samples, effort.warm_up_s)
    start = time.perf_counter()
    rounds = 0
    while True:
        order = sides if rounds % 2 == 0 else list(reversed(sides))
        for side in order:
            side.window(effort.window_s)
        rounds += 1
        spent = time.perf_counter() - start
        progress(min(1.0, max(rounds / effort.min_rounds / 2, spent / effort.max_s)))
        if spent > effort.max_s and rounds >= 2:
            return
        if rounds < effort.min_rounds:
            continue
        if len(sides) < 2:
            return
        ratio = cpu_ratio(sides[-1], sides[0])
        if half_width(ratio) < effort.tight or hopeless(ratio):
            return


def figures(windows: Sequence[Window]) -> dict[str, float | None]:
    """The figures of one side: medians over its windows, percentiles over all calls; None where there is no energy."""
    latencies = [latency for w in windows for latency in w.latencies_ms]
    cpu = median(w.cpu_s / w.inferences for w in windows)
    throughput = median(w.inferences / w.wall_s for w in windows)
    known = [w.energy_j / w.inferences for w in windows if w.energy_j is not None]
    energy = median(known) if len(known) == len(windows) else None
    return {
        "cpu_s_per_inference": cpu,
        "throughput_per_s": throughput,
        "latency_p50_ms": percentile(latencies, 0.5),
        "latency_p99_ms": percentile(latencies, 0.99),
        "power_w": median(w.energy_j / w.wall_s for w in windows if w.energy_j is not None) if energy else None,
        "energy_j_per_inference": energy,
        # Inferences a second for each watt is inferences per joule.
        "throughput_per_watt": 1 / energy if energy else None,
    }


def cpu_ratio(optimized: Side, original: Side) -> Ratio:
    """Optimized ÷ original in CPU seconds per inference: what decides."""
    pairs = list(zip(optimized.windows, original.windows, strict=False))
    return paired_ratio([a.cpu_s / a.inferences for a, _ in pairs], [b.cpu_s / b.inferences for _, b in pairs])


def side_by_side(optimized: Side, original: Side) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """The figures of both sides over the same rounds, so that dividing them gives the ratios of `ratios`."""
    ours, theirs = figures(optimized.windows), figures(original.windows)
    pairs = list(zip(optimized.windows, original.windows, strict=False))
    for name in FIGURES:
        if name in PERCENTILES:
            continue
        both = [(figures([a])[name], figures([b])[name]) for a, b in pairs]
        known = [(a, b) for a, b in both if a and b]
        if known:
            ours[name], theirs[name] = paired_figures([a for a, _ in known], [b for _, b in known])
    return ours, theirs


def ratios(optimized: Side, original: Side) -> dict[str, Ratio]:
    """Optimized ÷ original for every figure, paired by round, with 95 % intervals."""
    rounds = min(len(optimized.windows), len(original.windows))
    ours = [figures([w]) for w in optimized.windows[:rounds]]
    theirs = [figures([w]) for w in original.windows[:rounds]]
    found = {name: paired_ratio([f[name] for f in ours], [f[name] for f in theirs]) for name in FIGURES}
    calls = [[window.latencies_ms for window in side.windows[:rounds]] for side in (optimized, original)]
    for name, share in PERCENTILES.items():
        found[name] = percentile_ratio(calls[0], calls[1], share)
    return found
