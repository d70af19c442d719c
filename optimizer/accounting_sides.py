"""Measures the graphs of an account: some at a time, interleaved beside one that is in every group, each once; and judges
them on the samples to choose by.

Two graphs that were never in one group are compared through one that was beside both, with the wider interval that this
has. Learning changes weights and nothing that takes time, so a graph that was taught and nothing else is not measured
again: it is as fast as its `twin`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from perwatt import metrics
from perwatt.artifact import Artifact
from perwatt.bench.statistics import half_width
from perwatt.candidates import Candidate, cost_in
from perwatt.errors import BackendError, PerwattError
from perwatt.judging import Judge
from perwatt.measurement import Ratio
from perwatt.measuring import STOPPING_RESAMPLES, Effort, cost_ratio, ratios, run_blocks
from perwatt.setup import Setup
from perwatt.sides import Side
from perwatt.worker import load_outputs

AT_ONCE, AT_ONCE_LARGE = 6, 3
"""Processes in one group; of models of `LARGE_BYTES` and more, each of which takes a multiple of that in memory."""
LARGE_BYTES = 300_000_000
LATE = "there was no time left to measure it"
NO_BASE = "what it is compared with could not be run"


@dataclass(frozen=True)
class Graph:
    """A graph where it runs. `label`: how it came about, in words. `judged`: its accuracy says something. `twin`: a graph
    that is exactly as fast."""

    label: str
    candidate: Candidate
    judged: bool = True
    twin: Graph | None = None

    @property
    def artifact(self) -> Artifact:
        """The model."""
        return self.candidate.branch.artifact

    @property
    def key(self) -> str:
        """Of the program: two with the same are the same."""
        return repr((self.artifact.digest(), self.candidate.backend.name, self.candidate.point))

    @property
    def timed(self) -> Graph:
        """The graph that is measured to know how fast this one is."""
        return self if self.twin is None else self.twin.timed


UNKNOWN = Ratio(None)


@dataclass(frozen=True)
class Compared:
    """One graph ÷ another in what decides (`candidates.cost_in`) and in median latency."""

    cost: Ratio = UNKNOWN
    latency: Ratio = UNKNOWN

    def over(self, other: Compared) -> Compared:
        """This ÷ `other`, where both are ÷ the same third."""
        return Compared(product(self.cost, other.cost.inverse()), product(self.latency, other.latency.inverse()))


EQUAL = Compared(Ratio(1.0, 1.0, 1.0), Ratio(1.0, 1.0, 1.0))


class Measurements:
    """The graphs that were measured so far. `deadline`: when no further one is begun, in `time.monotonic()` seconds."""

    def __init__(
        self, setup: Setup, judge: Judge, effort: Effort, deadline: float | None, progress: Callable[[str], None]
    ) -> None:
        self.setup, self.judge, self.effort, self.deadline, self.progress = setup, judge, effort, deadline, progress
        self.missing: dict[str, str] = {}
        """By key of a graph, why it was not measured or judged."""
        self._groups: list[dict[str, Side]] = []
        self._scores: dict[str, metrics.Score] = {}

    def late(self, until: float | None = None) -> bool:
        """Whether the time is up: the deadline, or `until`."""
        left = self.seconds_left(until)
        return left is not None and left <= 0

    def seconds_left(self, until: float | None = None) -> float | None:
        """Until the deadline or `until`, whichever comes first; None where there is neither."""
        ends = [moment for moment in (until, self.deadline) if moment is not None]
        return min(ends) - time.monotonic() if ends else None

    # Measuring ----------------------------------------------------------------------------------------------------------

    def measure(self, base: Graph, graphs: Sequence[Graph], until: float | None = None) -> None:
        """Measure each of `graphs` in one group with `base`, unless it was already, and judge it."""
        timed = {graph.timed.key: graph.timed for graph in graphs if graph.timed.key != base.timed.key}
        waiting = [graph for graph in timed.values() if self._waits(graph, base.timed)]
        size = (AT_ONCE_LARGE if base.artifact.size_bytes() >= LARGE_BYTES else AT_ONCE) - 1
        groups = [waiting[start : start + size] for start in range(0, len(waiting), size)]
        for number, group in enumerate(groups):
            left = self.seconds_left(until)
            if base.timed.key in self.missing or (left is not None and left <= 0):
                self._note(group, LATE if base.timed.key not in self.missing else NO_BASE)
                continue
            self._measured([base.timed, *group], 1 / (len(groups) - number), until)
        for graph in (base, *graphs):
            if not self.late(until):
                self._judged_alone(graph)

    def compared(self, graph: Graph, other: Graph) -> Compared:
        """`graph` ÷ `other`; unknown where nothing was beside both."""
        ours, theirs = graph.timed, other.timed
        if ours.key == theirs.key:
            return EQUAL
        beside = self._group_of(ours, theirs)
        if beside is not None:
            found = ratios(beside[ours.key], beside[theirs.key])
            return Compared(cost_in(found, ours.candidate.backend), found["latency_p50_ms"])
        for one in self._groups:
            for two in self._groups:
                common = next((key for key in one if key in two), None)
                if ours.key in one and theirs.key in two and common is not None:
                    return self._over(one, ours, common).over(self._over(two, theirs, common))
        return Compared()

    def drop(self, graph: Graph, other: Graph) -> metrics.Comparison | None:
        """What `graph` loses against `other`, sample by sample; None where one of them was not judged."""
        ours, theirs = self._scores.get(graph.key), self._scores.get(other.key)
        if self.judge.select is None or ours is None or theirs is None:
            return None
        return metrics.compare(self.judge.select.metric, theirs, ours)

    def loss(self, graph: Graph) -> metrics.Comparison | None:
        """What `graph` loses against the original in float32, which the budget is about."""
        score = self._scores.get(graph.key)
        if self.judge.select is None or score is None:
            return None
        return metrics.compare(self.judge.select.metric, self.judge.select.original, score)

    def latencies_ms(self, graph: Graph) -> list[float]:
        """Of all its calls."""
        sides = [group[graph.timed.key] for group in self._groups if graph.timed.key in group]
        return [latency for side in sides for window in side.windows for latency in window.latencies_ms]

    def basis(self, graph: Graph) -> str:
        """What a cost is, in words."""
        backend = graph.candidate.backend
        if backend.device == "cpu":
            return "CPU seconds per inference"
        sides = [group[graph.timed.key] for group in self._groups if graph.timed.key in group]
        counted = any(window.energy_j is not None for side in sides for window in side.windows)
        return "joules per inference" if backend.joules_count and counted else "seconds per inference"

    def _over(self, group: dict[str, Side], graph: Graph, common: str) -> Compared:
        if graph.key == common:
            return EQUAL
        found = ratios(group[graph.key], group[common])
        return Compared(cost_in(found, graph.candidate.backend), found["latency_p50_ms"])

    def _waits(self, graph: Graph, base: Graph) -> bool:
        """Whether a graph is still to be measured beside `base`."""
        return self._group_of(graph, base) is None and self.missing.get(graph.key, LATE) == LATE

    def _group_of(self, graph: Graph, other: Graph) -> dict[str, Side] | None:
        return next((group for group in self._groups if graph.key in group and other.key in group), None)

    def _note(self, graphs: Sequence[Graph], reason: str) -> None:
        for graph in graphs:
            self.missing.setdefault(graph.key, reason)

    # One group ------------------------------------------------------------------------------------------------------------

    def _measured(self, graphs: Sequence[Graph], share: float, until: float | None) -> None:
        """Open all of them, the base first, judge them and give them windows, for `share` of the time left at most. What
        fails is left out."""
        sides: dict[str, Side] = {}
        base, *others = graphs
        self.progress(f"measuring {len(others)} graphs")
        try:
            for graph in graphs:
                self._open(graph, sides)
                if base.key not in sides:
                    self._note(others, NO_BASE)
                    return
            most_s, left = self.effort.max_s * len(sides) / 2, self.seconds_left(until)
            self._run(sides, graphs, most_s if left is None else min(most_s, max(0.0, left * share)))
        finally:
            for side in sides.values():
                side.close()
        if base.key in sides and len(sides) > 1:
            self._groups.append(sides)
            self.missing = {key: reason for key, reason in self.missing.items() if key not in sides or reason != LATE}

    def _open(self, graph: Graph, sides: dict[str, Side]) -> None:
        try:
            side = sides[graph.key] = self.setup.open(graph.label, graph.candidate)
            self._score(graph, side)
        except PerwattError as error:
            self._without(graph, sides, str(error))

    def _run(self, sides: dict[str, Side], graphs: Sequence[Graph], most_s: float) -> None:
        while len(sides) > 1 and graphs[0].key in sides:
            try:
                self._blocks(list(sides.values()), most_s)
                return
            except BackendError as error:
                here = [graph for graph in graphs if graph.key in sides]
                # Where all processes live, nobody knows whose error it was.
                for graph in [g for g in here if not sides[g.key].worker.running] or here:
                    self._without(graph, sides, str(error))
        self._note([graph for graph in graphs if graph.key in sides], NO_BASE)

    def _without(self, graph: Graph, sides: dict[str, Side], reason: str) -> None:
        self.missing.setdefault(graph.key, reason)
        if graph.key in sides:
            sides.pop(graph.key).close()

    def _blocks(self, sides: Sequence[Side], most_s: float) -> None:
        """Blocks until every ratio to the first side is known well enough."""
        for side in sides:
            side.windows.clear()
            side.energy_windows.clear()
            side.prepare(self.setup.timing, self.effort.warm_up_s, self.effort.steady_s)
        device = self.setup.conductor.device

        def enough() -> bool:
            found = (cost_ratio(side, sides[0], device, STOPPING_RESAMPLES) for side in sides[1:])
            return all(half_width(ratio) < self.effort.tight for ratio in found)

        run_blocks([[side] for side in sides], replace(self.effort, max_s=most_s), self.setup.conductor, enough)

    # Accuracy -------------------------------------------------------------------------------------------------------------

    def _judged_alone(self, graph: Graph) -> None:
        """Judge a graph that needs no measuring."""
        wanted = graph.judged and self.judge.select is not None
        if not wanted or graph.key in self._scores or graph.key in self.missing:
            return
        try:
            side = self.setup.open(graph.label, graph.candidate)
            try:
                self._score(graph, side)
            finally:
                side.close()
        except PerwattError as error:
            self.missing[graph.key] = str(error)

    def _score(self, graph: Graph, side: Side) -> None:
        select = self.judge.select
        if not graph.judged or select is None or graph.key in self._scores:
            return
        with TemporaryDirectory(prefix="outputs-", dir=self.judge.folder) as folder:
            out = Path(folder) / "out"
            side.worker.call("predict", samples=str(select.folder), out=str(out))
            self._scores[graph.key] = select.score(load_outputs(out))


def product(*parts: Ratio) -> Ratio:
    """The product of ratios that know nothing of each other: the widths of their intervals add up in squares."""
    if not parts or any(not part.value for part in parts):
        return UNKNOWN
    value = math.prod(part.value or 1.0 for part in parts)
    if any(not part.low or not part.high for part in parts):
        return Ratio(value)
    down = math.hypot(*(math.log((part.value or 1.0) / (part.low or 1.0)) for part in parts))
    up = math.hypot(*(math.log((part.high or 1.0) / (part.value or 1.0)) for part in parts))
    return Ratio(value, value * math.exp(-down), value * math.exp(up))


def moved_to(ratio: Ratio, value: float | None) -> Ratio:
    """The same interval about another value."""
    if value is None or not ratio.value or ratio.low is None or ratio.high is None:
        return Ratio(value)
    return Ratio(value, value * ratio.low / ratio.value, value * ratio.high / ratio.value)
