"""The study: which answers to consider, which to believe, which to ship.

The original is tried on every backend that the target stands for, and every graph that the passes lead to at each
floating precision; the best that the budget permits get their operating point tuned, are measured again in fresh
processes and judged on all evaluation samples. What graph and operating point bring is told apart: the original is
measured at the winner's point too, and where the graph brings nothing there, the original's own graph is shipped at
that point. If nothing clears the noise and the least gain, the answer is the original.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from perwatt import metrics
from perwatt.backends import Backend
from perwatt.candidates import Branch, Candidate, cost_in, cost_of, enough, gain_of, ledger, no_gain_text, ratio_text
from perwatt.errors import BackendError
from perwatt.judging import Judge, p99_ms
from perwatt.measurement import Ratio
from perwatt.measuring import Effort, interleave, ratios, run_energy_blocks
from perwatt.pipeline import Row
from perwatt.screening import Screening
from perwatt.setup import Setup
from perwatt.sides import Side
from perwatt.tune import Front
from perwatt.tuning import TunePlan, tuned

FINAL_TRIES = 3
ENERGY_BLOCKS = 2
"""Of windows for a counter of energy, where there is one."""
CLOSE = 1.15
"""A runner-up that costs no more than this times the best is tuned too: the point may turn the order round."""
AT_POINT = "original at the same point"


@dataclass
class Result:
    """What the study found. `sides` are still open: original first, then by label; the caller closes them. `front` has
    the operating points that were measured for the winner's graph; None where none were."""

    outcome: Literal["optimized", "unchanged", "budget_not_met"]
    reason: str
    winner: Candidate
    baseline: Candidate
    sides: dict[str, Side]
    candidates: list[Candidate]
    rows: list[Row]
    comparison: metrics.Comparison | None = None
    score: metrics.Score | None = None
    original_as_run: float | None = None
    front: Front | None = None
    notes: list[str] = field(default_factory=list)


class Study:
    """One run over the candidates of one model. `explore` gives the graphs that the passes lead to for a backend."""

    def __init__(
        self,
        setup: Setup,
        judge: Judge,
        screening: Screening,
        explore: Callable[[Backend], list[Branch]],
        *,
        plan: TunePlan | None = None,
        eager: Side | None = None,
        effort: Effort | None = None,
        deadline: float | None = None,
        progress: Callable[[float, str], None] = lambda share, text: None,
    ) -> None:
        """Without a `plan` operating points stay as they are. `deadline`: when no further candidate is screened, in
        `time.monotonic()` seconds."""
        self.setup, self.judge, self.screening, self.explore = setup, judge, screening, explore
        self.plan, self.eager, self.effort = plan, eager, effort or Effort()
        self.deadline, self.progress = deadline, progress
        self.notes: list[str] = []
        self.fronts: list[tuple[Candidate, Front]] = []

    def run(self) -> Result:
        """Screen, tune, measure again, judge again."""
        self.progress(0.0, "the original")
        try:
            baseline, side, originals = self.screening.choose_baseline()
            try:
                branches = {b.name: self.explore(b) for b in self.screening.worth_it(baseline, originals)}
                found = self.screening.candidates(branches, baseline, originals)
                for number, candidate in enumerate(found):
                    self.progress(0.1 + 0.4 * number / max(1, len(found)), candidate.name)
                    if self._out_of_time():
                        candidate.verdict, candidate.reason = "rejected", "not tried: out of time"
                    else:
                        self.screening.screen(candidate, side)
                baseline.p99_ms = p99_ms(side)
            finally:
                side.close()
        finally:
            self.screening.close()
        for candidate in found:
            self.screening.permit(candidate, baseline)
        hopeful = sorted((c for c in found if c.verdict != "rejected" and gain_of(c).value), key=cost_of)
        chosen = self._tuned(baseline, hopeful)
        considered = [*(o for o in originals if o is not baseline), *found, *(c for c in chosen if c not in found)]
        result = self._final(baseline, chosen, considered)
        every = [branch for found_there in branches.values() for branch in found_there]
        result.rows = ledger(every, result.winner, [*found, *chosen])
        result.front = next((f for c, f in self.fronts if c.branch is result.winner.branch and
                             c.backend == result.winner.backend), None)  # fmt: skip
        result.notes = [*self.screening.notes, *self.notes, *result.notes]
        return result

    def _out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    # Operating points -------------------------------------------------------------------------------------------

    def _tuned(self, baseline: Candidate, hopeful: Sequence[Candidate]) -> list[Candidate]:
        """What to measure again, best first: the hopeful ones, the best of them at tuned operating points, and the
        original's graph at the point that was found."""
        if self.plan is None or self._out_of_time():
            return list(hopeful)
        close = [c for c in hopeful if cost_of(c) <= CLOSE * cost_of(hopeful[0])][:2]
        found: list[Candidate] = []
        for number, candidate in enumerate(close or [baseline]):
            self.progress(0.5 + 0.05 * number, f"tuning {candidate.name}")
            try:
                front = tuned(self.plan, self.setup, candidate, self.judge.budget, self.progress)
            except BackendError as error:
                self.notes.append(f"the operating point of {candidate.name} could not be tuned: {error}")
                continue
            if front is None:
                continue
            self.fronts.append((candidate, front))
            if front.best.point == candidate.point:
                continue
            base = 1.0 if candidate is baseline else cost_of(candidate)
            better = replace(candidate, point=front.best.point, tuned=True, reason="", verdict="runner-up", p99_ms=None)
            gain = cost_in(front.best.ratios, candidate.backend)
            better.ratios = {} if gain.value is None else {"cpu_s_per_inference": Ratio(base * gain.value)}
            found.append(better)
        found.sort(key=cost_of)
        if found and found[0].branch is not baseline.branch and found[0].backend == baseline.backend:
            # Where the graph brings nothing at that point, the point alone is the answer.
            point = replace(found[0].point, floating_precision=baseline.point.floating_precision)
            found.insert(1, Candidate(baseline.branch, point, baseline.backend, tuned=True))
        return [*found, *hopeful]

    # The last comparison ------------------------------------------------------------------------------------------

    def _final(self, baseline: Candidate, hopeful: Sequence[Candidate], considered: list[Candidate]) -> Result:
        tried: dict[str, Side] | None = None
        for number, candidate in enumerate(hopeful[:FINAL_TRIES]):
            if tried is not None:
                self._close(tried)
            self.progress(0.6 + 0.1 * number, f"measuring {candidate.name}")
            effort = self.effort if number == 0 else replace(self.effort, max_s=self.effort.max_s / 2)
            try:
                sides = self._sides(baseline, candidate, effort)
            except BackendError as error:
                candidate.verdict, candidate.reason, tried = "rejected", str(error), None
                continue
            try:
                problem, comparison, score = self._confirm(candidate, sides)
            except BackendError as error:
                problem, comparison, score = str(error), None, None
            except BaseException:
                self._close(sides)
                raise
            if problem is None:
                candidate.verdict = "shipped"
                candidate.reason = self._gain_words(candidate, baseline, sides)
                return self._result(
                    "optimized", candidate.reason, baseline, candidate, sides, considered, comparison, score
                )
            candidate.verdict, candidate.reason = "rejected", problem
            tried = sides
        return self._unchanged(baseline, considered, tried)

    def _sides(self, baseline: Candidate, winner: Candidate, effort: Effort) -> dict[str, Side]:
        """Fresh workers: the original, the original at the winner's point where that differs, torch eager, the winner."""
        sides: dict[str, Side] = {}
        try:
            sides["original"] = self.setup.open("original", baseline)
            elsewhere = winner.point != baseline.point or winner.backend != baseline.backend
            if winner.branch is not baseline.branch and elsewhere:
                sides[AT_POINT] = self.setup.open(AT_POINT, replace(winner, branch=baseline.branch))
            if self.eager is not None:
                try:
                    self.eager.prepare(self.setup.timing, 0.0)
                    sides["torch eager"] = self.eager
                except BackendError as error:
                    self.eager.close()
                    self.eager = None
                    self.notes.append(f"torch eager could not be measured: {error}")
            if winner is not baseline:
                sides["optimized"] = self.setup.open("optimized", winner)
            interleave(
                list(sides.values()), self.setup.timing, effort,
                lambda share: self.progress(0.6 + 0.35 * share, "measuring"), self._hopeless,
                conductor=self.setup.conductor,
            )  # fmt: skip
            run_energy_blocks([[side] for side in sides.values()], ENERGY_BLOCKS, self.setup.conductor)
            for side in sides.values():
                side.note_memory()
        except BaseException:
            self._close(sides)
            raise
        return sides

    def _close(self, sides: dict[str, Side]) -> None:
        """End these workers; torch eager's goes on to the next comparison, and its owner closes it."""
        for side in sides.values():
            if side is not self.eager:
                side.close()

    def _confirm(
        self, candidate: Candidate, sides: dict[str, Side]
    ) -> tuple[str | None, metrics.Comparison | None, metrics.Score | None]:
        """Why this candidate is not shipped after all (None where it is), with its accuracy on all evaluation samples."""
        side, least = sides["optimized"], self.judge.budget.min_gain
        p99, rate_words = p99_ms(side), candidate.backend.rate_words
        if self.judge.too_late(p99):
            return self.judge.late_words(p99), None, None
        if self.judge.too_big(side.peak_memory_bytes):
            return self.judge.big_words(side.peak_memory_bytes), None, None
        gain = _gain(sides, "original", candidate)
        if not enough(gain, least) and not self.judge.too_late(p99_ms(sides["original"])):
            return no_gain_text(gain, least, rate_words), None, None
        throughput = ratios(side, sides["original"])["throughput_per_s"]
        powered = candidate.point.power_limit_w is not None or candidate.point.clock_mhz is not None
        if throughput.high is not None and throughput.high < 1 and not powered:
            return f"fewer CPU seconds, but slower: {ratio_text(throughput)} of the throughput", None, None
        if candidate.tuned and AT_POINT in sides and not enough(_gain(sides, AT_POINT, candidate), least):
            of_graph = ratio_text(_gain(sides, AT_POINT, candidate))
            return f"the operating point is what brings it: its graph does {of_graph} at that point", None, None
        if self.judge.evaluation is None:
            return None, None, None
        comparison, score = self.judge.drop_on_all(side)
        candidate.drop = comparison
        if self.judge.too_much(comparison, final=True):
            return self.judge.drop_words(comparison), comparison, score
        return None, comparison, score

    def _gain_words(self, candidate: Candidate, baseline: Candidate, sides: dict[str, Side]) -> str:
        """`2.10× the original's inferences per CPU second: 1.30× by the graph, 1.62× by the operating point`."""
        words = f"{_gain(sides, 'original', candidate).value:.2f}× the original's {candidate.backend.rate_words}"
        if not candidate.tuned:
            return words
        if candidate.branch is baseline.branch:
            return f"{words}, by the operating point alone"
        if AT_POINT not in sides:
            return words
        graph = _gain(sides, AT_POINT, candidate).value or 1.0
        point = cost_in(ratios(sides[AT_POINT], sides["original"]), candidate.backend).inverse().value or 1.0
        return f"{words}: {graph:.2f}× by the graph, {point:.2f}× by the operating point"

    def _unchanged(self, baseline: Candidate, considered: list[Candidate], tried: dict[str, Side] | None) -> Result:
        """The original is the answer; its figures are those of the last comparison, where there was one."""
        if tried is not None:
            for label in ("optimized", AT_POINT):
                if label in tried:
                    tried.pop(label).close()
            sides = tried
        else:
            self.progress(0.9, "measuring the original")
            sides = self._sides(baseline, baseline, self.effort)
        baseline.verdict = "shipped"
        comparison, score = None, None
        if self.judge.evaluation is not None:
            comparison, score = self.judge.drop_on_all(sides["original"])
        baseline.reason = baseline.reason or "the original is the answer"
        best = min((c for c in considered if c.ratios), key=cost_of, default=None)
        reason = "nothing was better than the original beyond the noise"
        if best is not None and cost_of(best) >= 1:
            rate = f"{ratio_text(gain_of(best))} of the original's {best.backend.rate_words}"
            reason = f"nothing is faster: the best other answer ({best.name}) does {rate}"
        elif best is not None and best.reason:
            reason = f"the best other answer ({best.name}) is not shipped: {best.reason}"
        return self._result("unchanged", reason, baseline, baseline, sides, considered, comparison, score)

    def _result(self, outcome: Any, reason: str, baseline: Candidate, winner: Candidate, sides: dict[str, Side],
                considered: list[Candidate], comparison: Any, score: Any) -> Result:  # fmt: skip
        as_run = None
        if self.judge.evaluation is not None:
            as_run = score.value if winner is baseline else self.judge.drop_on_all(sides["original"])[1].value
        result = Result(
            outcome, reason, winner, baseline, sides, [baseline, *considered], [], comparison, score, as_run
        )
        problem = self._budget_problem(result)
        if problem:
            result.outcome, result.reason = "budget_not_met", problem
        return result

    def _budget_problem(self, result: Result) -> str | None:
        """Which constraint the shipped program misses, and by how much."""
        side = result.sides.get("optimized", result.sides["original"])
        if self.judge.too_late(p99_ms(side)):
            return self.judge.late_words(p99_ms(side))
        if self.judge.too_big(side.peak_memory_bytes):
            return self.judge.big_words(side.peak_memory_bytes)
        changed = result.winner is not result.baseline
        if result.comparison is not None and self.judge.too_much(result.comparison, final=changed):
            return self.judge.drop_words(result.comparison)
        return None

    def _hopeless(self, cost: Ratio) -> bool:
        """Whether the interval already excludes the least gain."""
        return cost.low is not None and cost.low > 1 / (1 + self.judge.budget.min_gain)


def _gain(sides: dict[str, Side], base: str, candidate: Candidate) -> Ratio:
    """What the optimized side does more than `base`."""
    return cost_in(ratios(sides["optimized"], sides[base]), candidate.backend).inverse()
