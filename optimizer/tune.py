"""Finds the operating point: how a lowered program should be run so that an inference costs least.

What decides joules besides the graph is tried on the machine itself: threads and streams together, then the batch, then
the backend's switches one by one. Each round is a race: the points run interleaved with the starting point and the best
so far, and those whose interval already excludes that they are the best drop out (successive halving on confidence
intervals), so that time is spent on those that are close. A point that is slower than the start, beyond the p99 or the
memory allowed, does not win whatever it saves: fewer CPU seconds bought with a longer wait are no gain.

Everything that was measured stays: the points that no other one beats in cost, throughput and latency at once are the
front, from which a loader picks for the load at hand.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from perwatt.bench.statistics import half_width
from perwatt.contract import OperatingPoint
from perwatt.errors import BackendError
from perwatt.judging import p99_ms
from perwatt.measurement import Ratio
from perwatt.measuring import STOPPING_RESAMPLES, Conductor, Effort, cost_ratio, figures, ratios
from perwatt.sides import Side

ROUNDS = (("threads", "streams"), ("batch",), ("requests",), ("pinned",), ("graphs",), ("autotune",))
"""What is varied together. The first two come again, the streams at the batch that won."""

HEAT = Effort(window_s=0.03, warm_up_s=0.15, min_blocks=6, max_s=4.0, tight=0.015)
HEAT_POINTS = 6
"""So many new points at once: each has a process of its own, with the whole model in it."""
LONGEST_CALL_S = 1.0
"""A batch whose call would take longer is not tried: nobody waits for it, and measuring it takes minutes."""
BATCHES_A_HEAT = 3
SLOWER = 0.98
"""Of the start's throughput, what a point may fall to; noise hides no more."""
LATER = 1.01
"""Of the start's median latency, what a point may rise to in single-stream."""
BETTER, SURE = 0.99, 1.02
"""Of the best cost so far, what a point must fall to, and what its interval may reach up to: less is noise."""
ANOTHER_BATCH = 4
"""By how much the batch must have changed for the streams to be tried again."""


@dataclass
class Trial:
    """One operating point as measured. `point` is as it was asked for, `facts` what the backend took; ratios are to the
    start of the search. `reason` says why it may not win; empty where it may."""

    point: OperatingPoint
    facts: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, float | None] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    memory_bytes: int | None = None
    reason: str = ""
    device: str = "cpu"

    @property
    def cost(self) -> float | None:
        """What an inference costs: CPU seconds on a CPU; on a GPU joules where they were counted, else seconds."""
        if self.device == "cpu":
            return self.figures.get("cpu_s_per_inference")
        joules, rate = self.figures.get("energy_j_per_inference"), self.figures.get("throughput_per_s")
        return joules if joules is not None else 1 / rate if rate else None

    def to_json(self) -> dict[str, Any]:
        """Plain data for the bundle."""
        plain = {name: {"value": r.value, "low": r.low, "high": r.high} for name, r in self.ratios.items()}
        return {
            "operating_point": self.facts.get("operating_point", self.point.to_json()),
            "settings": self.facts.get("settings", {}),
            "figures": self.figures,
            "cost": self.cost,
            "ratios": plain,
            "peak_memory_bytes": self.memory_bytes,
            "reason": self.reason,
        }


@dataclass
class Front:
    """What a search found: the best point, and every point that was measured, the start first. `cost`: of the best point
    ÷ the start, in what decides. `complete`: it was not cut short by time."""

    best: Trial
    trials: list[Trial]
    seconds: float = 0.0
    cost: float = 1.0
    complete: bool = True

    def undominated(self) -> list[Trial]:
        """The points that no other one beats in cost, throughput and p99 latency at once, cheapest first."""
        known = [t for t in self.trials if t.figures and not t.reason.startswith("memory")]
        kept = [t for t in known if not any(_beats(other, t) for other in known)]
        return sorted(kept, key=lambda t: t.cost or 0.0)


def _beats(a: Trial, b: Trial) -> bool:
    def costs(trial: Trial) -> tuple[float, float, float]:
        found = trial.figures
        return trial.cost or 0.0, -(found["throughput_per_s"] or 0.0), found["latency_p99_ms"] or 0.0

    ours, theirs = costs(a), costs(b)
    return all(x <= y for x, y in zip(ours, theirs, strict=True)) and ours != theirs


@dataclass(frozen=True)
class Allowed:
    """What a point must keep besides being no slower than the start."""

    p99_ms: float | None = None
    memory_bytes: int | None = None

    def late_words(self, p99_ms: float | None) -> str:
        """By what this p99 latency misses what is allowed; empty where it doesn't."""
        if self.p99_ms is None or p99_ms is None or p99_ms <= self.p99_ms:
            return ""
        return f"p99 latency is {p99_ms:.2f} ms of {self.p99_ms:g} ms allowed"


class Tuning:
    """One search. `open_at` lowers the program at a point, in a process of its own; `prepare` gives a side its calls."""

    def __init__(
        self,
        open_at: Callable[[OperatingPoint], Side],
        prepare: Callable[[Side, Effort], None],
        conductor: Conductor,
        *,
        allowed: Allowed | None = None,
        deadline: float | None = None,
        progress: Callable[[float, str], None] = lambda share, text: None,
    ) -> None:
        """`deadline` is in `time.monotonic()` seconds."""
        self.open_at, self.prepare, self.conductor = open_at, prepare, conductor
        self.allowed, self.deadline, self.progress = allowed or Allowed(), deadline, progress
        self.trials: dict[OperatingPoint, Trial] = {}
        self._sides: dict[OperatingPoint, Side] = {}
        self._taken: set[str] = set()
        self._failed: dict[int, str] = {}

    def run(self, start: OperatingPoint, knobs: dict[str, list[Any]], first: OperatingPoint | None = None) -> Front:
        """Search from `start` over `knobs`: field → values. `first` is tried before all others, as what an earlier
        search on such a machine ended with; where it holds, nothing else is tried. Raises BackendError where the start
        itself does not run."""
        began = time.perf_counter()
        self.start, self.best = start, start
        try:
            self._sides[start] = self._opened(start)
            self._taken.add(json.dumps(self._sides[start].facts.get("operating_point")))
            # How long its calls take decides which batches are tried at all.
            self._window(self._sides[start], HEAT.window_s)
            self._note(start)
            if first is not None and first != start:
                self._heat([first])
            if first is None or self.best != first:
                self._rounds(knobs)
            self._note(start)
        finally:
            for side in self._sides.values():
                side.close()
        for trial in self.trials.values():
            compare_with(self.trials[start], trial)
        seconds = time.perf_counter() - began
        best = self.trials[self.best]
        return Front(best, list(self.trials.values()), seconds, self._cost_of(best), self._time_left())

    def _cost_of(self, trial: Trial) -> float:
        """÷ the start's, in what short windows decide by."""
        name = "cpu_s_per_inference" if self.conductor.device == "cpu" else "throughput_per_s"
        ratio = trial.ratios.get(name, Ratio(1.0))
        value = ratio.value if self.conductor.device == "cpu" else ratio.inverse().value
        return value if value is not None else 1.0

    def _rounds(self, knobs: dict[str, list[Any]]) -> None:
        rounds = [fields for fields in ROUNDS if any(name in knobs for name in fields)]
        for number, fields in enumerate(rounds):
            self.progress(number / len(rounds), f"tuning {' and '.join(fields)}")
            if fields == ("batch",):
                self._climb(knobs["batch"])
                change = max(self.best.batch, self.start.batch) / min(self.best.batch, self.start.batch)
                if change >= ANOTHER_BATCH and any(name in knobs for name in ROUNDS[0]):
                    # Which streams are best depends on the batch.
                    self._heat(self._varied(ROUNDS[0], knobs))
            else:
                self._heat(self._varied(fields, knobs))

    def _varied(self, fields: Sequence[str], knobs: dict[str, list[Any]]) -> list[OperatingPoint]:
        points = [self.best]
        for name in fields:
            points = [replace(point, **{name: value}) for point in points for value in knobs.get(name, [])] or points
        return [p for p in dict.fromkeys(points) if _possible(p)]

    def _climb(self, batches: Sequence[int]) -> None:
        """Batches from the best one outwards, both ways, for as long as a way leads on."""
        sizes = sorted({*batches, self.best.batch})
        for step in (1, -1):
            position = sizes.index(self.best.batch) + step
            while 0 <= position < len(sizes) and self._time_left():
                ahead = sizes[position::step][:BATCHES_A_HEAT]
                before = self.best
                self._heat([replace(self.best, batch=size) for size in ahead if self._short_enough(size)])
                if self.best is before:
                    break
                position = sizes.index(self.best.batch) + step

    def _short_enough(self, batch: int) -> bool:
        """Whether a call of that batch would be over soon enough, going by the start's rate."""
        rate = self.trials[self.start].figures["throughput_per_s"] or float("inf")
        return batch / rate <= LONGEST_CALL_S

    # One race ---------------------------------------------------------------------------------------------------

    def _heat(self, points: Sequence[OperatingPoint]) -> None:
        """Race the points that were not measured yet against the best so far; the best may change."""
        fresh = [point for point in points if point not in self.trials and point not in self._sides]
        for first in range(0, len(fresh), HEAT_POINTS):
            self._one_heat(fresh[first : first + HEAT_POINTS])

    def _one_heat(self, fresh: Sequence[OperatingPoint]) -> None:
        for point in fresh:
            if not self._time_left():
                break
            try:
                side = self._opened(point)
            except BackendError as error:
                self.trials[point] = Trial(point, reason=str(error))
                continue
            taken = json.dumps(side.facts.get("operating_point"))
            if taken in self._taken:
                # The backend's own choice, spelt out: it was measured already.
                side.close()
                continue
            self._taken.add(taken)
            self._sides[point] = side
        racing = [point for point in fresh if point in self._sides]
        if not racing:
            return
        held = list(dict.fromkeys([self.start, self.best]))
        for point in held:
            self._sides[point].windows.clear()
            self._sides[point].energy_windows.clear()
        self._failed = {}
        try:
            self._race([*held, *racing], held)
            for point in racing:
                failed = self._failed.get(id(self._sides[point]))
                if failed is None:
                    self._note(point)
                else:
                    self.trials[point] = Trial(point, dict(self._sides[point].facts), reason=failed)
            self._choose([point for point in racing if id(self._sides[point]) not in self._failed])
        finally:
            for point in [p for p in self._sides if p not in (self.start, self.best)]:
                self._sides.pop(point).close()

    def _opened(self, point: OperatingPoint) -> Side:
        self.progress(0.0, f"tuning: {point.words()}")
        side = self.open_at(point)
        try:
            self.prepare(side, HEAT)
        except BaseException:
            side.close()
            raise
        return side

    def _race(self, points: Sequence[OperatingPoint], held: Sequence[OperatingPoint]) -> None:
        """Blocks of windows until one point is left, all are known well enough, or the time is up."""
        alive = list(points)
        window_s = self._window_s(alive)
        start = time.perf_counter()
        most_s = HEAT.max_s + len(points)
        blocks = 0
        while True:
            alive = [point for point in alive if id(self._sides[point]) not in self._failed]
            self.conductor.block([[self._sides[point]] for point in alive], lambda side: self._window(side, window_s))
            blocks += 1
            spent = time.perf_counter() - start
            if blocks >= 2 and (spent > most_s or not self._time_left()):
                return
            if blocks < HEAT.min_blocks or blocks % 2:
                continue
            alive = [point for point in alive if id(self._sides[point]) not in self._failed]
            best = min((p for p in alive if not self._slower(p)), key=self._cost, default=self.best)
            against = {p: self._ratio(p, best) for p in alive if p != best}
            # Dropped: what cannot be the best any more. The start and the best so far stay, to compare with.
            alive = [p for p in alive if p in held or p == best or (against[p].low or 0.0) <= 1.0]
            if all(half_width(ratio) < HEAT.tight or p not in alive for p, ratio in against.items()):
                return
            if not [p for p in alive if p not in held]:
                return

    def _window_s(self, points: Sequence[OperatingPoint]) -> float:
        """Long enough for a call or two of the slowest."""
        longest = 0.0
        for point in points:
            try:
                window = self._sides[point].window(0.0)
                self._sides[point].settle()
            except BackendError as error:
                self._fail(self._sides[point], error)
                continue
            longest = max(longest, window.wall_s)
        return min(max(HEAT.window_s, longest), LONGEST_CALL_S)

    def _window(self, side: Side, seconds: float) -> Any:
        if id(side) in self._failed:
            return None
        try:
            return self.conductor.window(side, seconds)
        except BackendError as error:
            return self._fail(side, error)

    def _fail(self, side: Side, error: BackendError) -> None:
        """A point that crashes costs itself; what all others are compared with may not."""
        if side in (self._sides[self.start], self._sides[self.best]):
            raise error
        self._failed[id(side)] = str(error)

    def _ratio(self, point: OperatingPoint, base: OperatingPoint) -> Ratio:
        ours, theirs = self._sides[point], self._sides[base]
        return cost_ratio(ours, theirs, self.conductor.device, resamples=STOPPING_RESAMPLES)

    def _cost(self, point: OperatingPoint) -> float:
        value = self._ratio(point, self.start).value if point != self.start else 1.0
        return value if value is not None else float("inf")

    def _slower(self, point: OperatingPoint) -> bool:
        if point == self.start:
            return False
        found = figures(self._sides[point].windows)
        base = figures(self._sides[self.start].windows)
        if self.start.scenario == "single-stream":
            return (found["latency_p50_ms"] or 0.0) > LATER * (base["latency_p50_ms"] or float("inf"))
        return (found["throughput_per_s"] or 0.0) < SLOWER * (base["throughput_per_s"] or 0.0)

    # What was found ---------------------------------------------------------------------------------------------

    def _note(self, point: OperatingPoint) -> Trial:
        """Keep what the side of this point has measured so far."""
        side = self._sides[point]
        trial = self.trials.get(point) or Trial(point, dict(side.facts), device=self.conductor.device)
        if side.windows:
            trial.figures = figures(side.windows)
            trial.ratios = ratios(side, self._sides[self.start]) if point != self.start else trial.ratios
            side.note_memory()
            trial.memory_bytes = side.peak_memory_bytes
            trial.reason = self._why_not(trial, point, side)
        self.trials[point] = trial
        return trial

    def _why_not(self, trial: Trial, point: OperatingPoint, side: Side) -> str:
        memory = trial.memory_bytes
        if late := self.allowed.late_words(p99_ms(side)):
            return late
        if self.allowed.memory_bytes is not None and memory is not None and memory > self.allowed.memory_bytes:
            return f"memory: {memory / 1e6:.0f} MB of {self.allowed.memory_bytes / 1e6:.0f} MB allowed"
        if self._slower(point):
            single = self.start.scenario == "single-stream"
            found = trial.ratios["latency_p50_ms" if single else "throughput_per_s"]
            return f"slower: {found.value:.2f}× of the start's {'median latency' if single else 'throughput'}"
        return ""

    def _choose(self, racing: Sequence[OperatingPoint]) -> None:
        for point in sorted(racing, key=self._cost):
            best_barred = bool(self._note(self.best).reason)
            ratio = self._ratio(point, self.best)
            better = ratio.value is not None and ratio.value < BETTER and (ratio.high or SURE) <= SURE
            if not self.trials[point].reason and (best_barred or better):
                self.best = point

    def _time_left(self) -> bool:
        return self.deadline is None or time.monotonic() < self.deadline


def compare_with(start: Trial, trial: Trial) -> None:
    """Figures of races at different times, made comparable: what the start has now, times the ratio of then."""
    for name, ratio in trial.ratios.items():
        base = start.figures.get(name)
        if ratio.value is not None and base is not None:
            trial.figures[name] = ratio.value * base


def _possible(point: OperatingPoint) -> bool:
    """No more streams than threads, no fewer requests than streams."""
    if point.streams is not None and point.threads is not None and point.streams > point.threads:
        return False
    return point.requests is None or point.streams is None or point.requests >= point.streams
