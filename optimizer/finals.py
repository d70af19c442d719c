"""The last comparison: the original and what is to be shipped in fresh processes, side by side, and whether it holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from perwatt import metrics
from perwatt.bench.machine import disturbance
from perwatt.candidates import Candidate, cost_in, enough, fitted, no_gain_text, ratio_text
from perwatt.errors import BackendError
from perwatt.judging import Judge, p99_ms
from perwatt.measurement import Ratio
from perwatt.measuring import Effort, cost_ratio, interleave, ratios, run_energy_blocks
from perwatt.recipe import Objective
from perwatt.setup import Setup
from perwatt.sides import Side

ENERGY_BLOCKS = 2
"""Of windows for a counter of energy, where there is one."""
AT_POINT, EAGER = "original at the same point", "torch eager"
BESIDE = (AT_POINT, EAGER)
"""Sides that tell something besides: where one of them fails, the comparison goes on without it."""
DISTURBED = "warning: this run was disturbed, so latencies and rates may not hold on a quiet machine: "

Verdict = tuple[str | None, metrics.Comparison | None, metrics.Score | None]


class Finals:
    """Opens and measures the sides of a last comparison, and judges it. `eager` is torch eager's side, which its owner
    closes; `notes` takes what a person should know."""

    def __init__(
        self, setup: Setup, judge: Judge, eager: Side | None, progress: Callable[[float, str], None], notes: list[str]
    ) -> None:
        self.setup, self.judge, self.eager, self.progress, self.notes = setup, judge, eager, progress, notes
        self.strict = True
        """Where nothing keeps every constraint, what misses them least may be shipped: then this is off."""
        self.objective: Objective = "inferences-per-joule"
        self.quick = False
        """Without the long windows that a counter of energy wants, where CPU seconds decide."""
        self.looks = 0
        """How often candidates were judged on the samples to confirm by."""

    def sides(self, baseline: Candidate, winner: Candidate, effort: Effort) -> dict[str, Side]:
        """Fresh workers: the original, the original at the winner's point where that differs, torch eager, the winner."""
        sides: dict[str, Side] = {}
        try:
            sides["original"] = self.setup.open("original", baseline)
            there = _at_point(baseline, winner)
            elsewhere = there.point != baseline.point or there.backend != baseline.backend
            if winner.branch is not baseline.branch and elsewhere:
                self._beside(sides, AT_POINT, lambda: self.setup.open(AT_POINT, there))
            if self.eager is not None:
                self._beside(sides, EAGER, self._warm_eager)
            if winner is not baseline:
                sides["optimized"] = self.setup.open("optimized", winner)
            self._measured(sides, effort)
            if "optimized" not in sides or self._open_question(sides, winner):
                self.measure_energy(sides)
            for side in sides.values():
                side.note_memory()
            self._note_disturbance(sides)
        except BaseException:
            self.close(sides)
            raise
        return sides

    def measure_energy(self, sides: dict[str, Side]) -> None:
        """Windows that are long enough for a counter, where there is one and a side has none yet."""
        conductor = self.setup.conductor
        if self.quick and conductor.device == "cpu" and conductor.meter.describe()["method"] in ("counter", "metered"):
            return
        left = [[side] for side in sides.values() if not side.energy_windows]
        if left:
            run_energy_blocks(left, ENERGY_BLOCKS, self.setup.conductor)

    def _note_disturbance(self, sides: dict[str, Side]) -> None:
        """Say so where the last comparison, which the report's figures come from, was not alone on the machine."""
        windows = [window for side in sides.values() for window in side.windows]
        reasons = disturbance(windows, os.cpu_count() or 1)
        kept = [note for note in self.notes if not note.startswith(DISTURBED)]
        self.notes[:] = [*kept, *([DISTURBED + "; ".join(reasons)] if reasons else [])]

    def _beside(self, sides: dict[str, Side], label: str, opened: Callable[[], Side]) -> None:
        try:
            sides[label] = opened()
        except BackendError as error:
            self._without(sides, label, str(error))

    def _warm_eager(self) -> Side:
        assert self.eager is not None
        self.eager.prepare(self.setup.timing, 0.0)
        return self.eager

    def _without(self, sides: dict[str, Side], label: str, why: str) -> None:
        gone = sides.pop(label, self.eager if label == EAGER else None)
        if gone is not None:
            gone.close()
        if label == EAGER:
            self.eager = None
        self.notes.append(f"{label} could not be measured: {why}")

    def _measured(self, sides: dict[str, Side], effort: Effort) -> None:
        def share(value: float) -> None:
            self.progress(0.6 + 0.35 * value, "measuring")

        while True:
            try:
                interleave(
                    list(sides.values()),
                    self.setup.timing,
                    effort,
                    share,
                    self.judge.hopeless,
                    conductor=self.setup.conductor,
                )
                return
            except BackendError as error:
                dead = [label for label in BESIDE if label in sides and not sides[label].worker.running]
                if not dead:
                    raise
                for label in dead:
                    self._without(sides, label, str(error))

    def _open_question(self, sides: dict[str, Side], winner: Candidate) -> bool:
        """Whether joules are worth their long windows: not where CPU seconds have decided against the winner already."""
        device = self.setup.conductor.device
        return device != "cpu" or not self.judge.hopeless(cost_ratio(sides["optimized"], sides["original"], device))

    def close(self, sides: dict[str, Side]) -> None:
        """End these workers; torch eager's goes on to the next comparison, and its owner closes it."""
        for side in sides.values():
            if side is not self.eager:
                side.close()

    def confirm(self, candidate: Candidate, baseline: Candidate, sides: dict[str, Side]) -> Verdict:
        """Why this candidate is not shipped after all (None where it is), with its accuracy on all evaluation samples."""
        side, least = sides["optimized"], self.judge.budget.min_gain
        misses = self.misses(candidate, side)
        if misses is not None and self.strict:
            return misses, None, None
        gain = self._gain(sides, candidate, baseline)
        if not enough(gain, least) and self.misses(baseline, sides["original"]) is None:
            return no_gain_text(gain, least, candidate.backend.rate_words), None, None
        throughput = ratios(side, sides["original"])["throughput_per_s"]
        powered = candidate.point.power_limit_w is not None or candidate.point.clock_mhz is not None
        if throughput.high is not None and throughput.high < 1 and not powered:
            return (
                f"{candidate.backend.saved_words}, but slower: {ratio_text(throughput)} of the throughput",
                None,
                None,
            )
        by_point = candidate.tuned and AT_POINT in sides and self.objective == "inferences-per-joule"
        if by_point and not enough(gain_over(sides, AT_POINT, candidate), least):
            of_graph = ratio_text(gain_over(sides, AT_POINT, candidate))
            return f"the operating point is what brings it: its graph does {of_graph} at that point", None, None
        if self.judge.evaluation is None:
            return None, None, None
        self.looks += 1
        comparison, score = self.judge.drop_on_all(side)
        candidate.drop = comparison
        if self.judge.too_much(comparison, final=True):
            return self.judge.drop_words(comparison), comparison, score
        return None, comparison, score

    def _gain(self, sides: dict[str, Side], candidate: Candidate, baseline: Candidate) -> Ratio:
        """What it does better than the original, by what it was searched for."""
        if self.objective == "size":
            times = baseline.branch.artifact.size_bytes() / max(1, candidate.branch.artifact.size_bytes())
            return Ratio(times, times, times)
        found = ratios(sides["optimized"], sides["original"])
        if self.objective == "latency":
            return found["latency_p50_ms"].inverse()
        if self.objective == "throughput":
            return found["throughput_per_s"]
        return gain_over(sides, "original", candidate)

    def misses(self, candidate: Candidate, side: Side) -> str | None:
        """Which constraint besides accuracy a candidate misses, measured as `side`, and by how much; None where it keeps all."""
        budget = self.judge.budget
        size = candidate.branch.artifact.size_bytes()
        if self.judge.too_late(p99_ms(side)):
            return self.judge.late_words(p99_ms(side))
        if self.judge.too_big(side.peak_memory_bytes):
            return self.judge.big_words(side.peak_memory_bytes)
        if budget.size is not None and size > budget.size:
            return f"its weights take {size / 1e6:.2f} MB, {budget.size / 1e6:.2f} MB are allowed"
        return None

    def gain_words(self, candidate: Candidate, baseline: Candidate, sides: dict[str, Side]) -> str:
        """`2.10× the original's inferences per CPU second: 1.30× by the graph, 1.62× by the operating point`."""
        words = f"{gain_over(sides, 'original', candidate).value:.2f}× the original's {candidate.backend.rate_words}"
        if not candidate.tuned:
            return words
        if candidate.branch is baseline.branch:
            return f"{words}, by the operating point alone"
        if AT_POINT not in sides:
            return words
        graph = gain_over(sides, AT_POINT, candidate).value or 1.0
        point = cost_in(ratios(sides[AT_POINT], sides["original"]), candidate.backend).inverse().value or 1.0
        return f"{words}: {graph:.2f}× by the graph, {point:.2f}× by the operating point"


def _at_point(baseline: Candidate, winner: Candidate) -> Candidate:
    """The original where and how the winner runs, but in its own floating precision: what int8 leaves in float32 would be
    the whole original, which nobody runs like that."""
    point = winner.point
    if winner.backend == baseline.backend:
        point = replace(point, floating_precision=baseline.point.floating_precision)
    return replace(winner, branch=baseline.branch, point=fitted(point, baseline.branch.artifact))


def gain_over(sides: dict[str, Side], base: str, candidate: Candidate) -> Ratio:
    """What the optimized side does more than `base`."""
    return cost_in(ratios(sides["optimized"], sides[base]), candidate.backend).inverse()
