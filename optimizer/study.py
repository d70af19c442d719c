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
from perwatt.accounting_shares import Account
from perwatt.backends import Backend
from perwatt.candidates import (
    Branch,
    Candidate,
    at_cost,
    cost_of,
    fitted,
    gain_of,
    ledger,
    ratio_text,
)  # fmt: skip
from perwatt.errors import BackendError, PerwattError
from perwatt.finals import AT_POINT, Finals
from perwatt.judging import Judge, p99_ms
from perwatt.measuring import Effort
from perwatt.pipeline import OUT_OF_TIME, Row
from perwatt.screening import Screening
from perwatt.setup import Setup
from perwatt.sides import Side
from perwatt.tune import Front
from perwatt.tuning import TunePlan, tuned

FINAL_TRIES = 3
CLOSE = 1.15
"""A runner-up that costs no more than this times the best is tuned too: the point may turn the order round."""


@dataclass
class Result:
    """What the study found. `sides` are still open: original first, then by label; the caller closes them. `front` has
    the operating points that were measured for the winner's graph; None where none were. `search`: what a search tried, as plain
    data, `account`: what each pass of its answer brings; None where there was none."""

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
    search: dict[str, Any] | None = None
    account: Account | None = None
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
        self.plan, self.effort = plan, effort or Effort()
        self.deadline, self.progress = deadline, progress
        self.tune_by: float | None = None
        """When operating points have to be tuned, where that is after the deadline."""
        self.notes: list[str] = []
        self.finals = Finals(setup, judge, eager, progress, self.notes)
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
        every = [branch for found_there in branches.values() for branch in found_there]
        hopeful = sorted((c for c in found if c.verdict != "rejected" and gain_of(c).value), key=cost_of)
        return self.decide(baseline, originals, every, found, self.tuned(baseline, hopeful))

    def decide(
        self, baseline: Candidate, originals: Sequence[Candidate], branches: Sequence[Branch],
        found: Sequence[Candidate], chosen: Sequence[Candidate],
    ) -> Result:  # fmt: skip
        """Measure again what was `chosen`, best first, in fresh processes, until one holds; the answer, with the ledger of all
        `branches`. `found`: every other candidate that there was."""
        considered = [*(o for o in originals if o is not baseline), *found, *(c for c in chosen if c not in found)]
        result = self._final(baseline, chosen, considered)
        result.rows = ledger(branches, result.winner, [*found, *chosen])
        result.front = next((front for c, front in self.fronts if _same_program(c, result.winner)), None)
        result.notes = [*self.screening.notes, *self.notes, *result.notes]
        late = sum(row.reason == OUT_OF_TIME for row in result.rows)
        if late and result.outcome == "unchanged":
            result.reason = f"out of time: {late} of {len(result.rows)} passes were not run (--time); {result.reason}"
        return result

    def _out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _too_late_to_tune(self) -> bool:
        return time.monotonic() > self.tune_by if self.tune_by is not None else self._out_of_time()

    # Operating points -------------------------------------------------------------------------------------------

    def tuned(self, baseline: Candidate, hopeful: Sequence[Candidate]) -> list[Candidate]:
        """What to measure again, best first: the hopeful ones, the best of them at tuned operating points, and the
        original's graph at the point that was found."""
        if self.plan is None or self._too_late_to_tune():
            return list(hopeful)
        close = [c for c in hopeful if cost_of(c) <= CLOSE * cost_of(hopeful[0])][:2]
        found: list[Candidate] = []
        for number, candidate in enumerate(close or [baseline]):
            self.progress(0.5 + 0.05 * number, f"tuning {candidate.name}")
            if self._too_late_to_tune():
                break
            plan = self.plan
            if self.tune_by is not None:
                left = (self.tune_by - time.monotonic()) / (len(close) - number if close else 1)
                plan = replace(plan, max_s=min(plan.max_s, left))
            try:
                front = tuned(plan, self.setup, candidate, self.judge.budget, self.progress)
            except PerwattError as error:
                self.notes.append(f"the operating point of {candidate.name} could not be tuned: {error}")
                continue
            if front is None:
                continue
            self.fronts.append((candidate, front))
            if front.best.point == candidate.point:
                continue
            base = 1.0 if candidate is baseline else cost_of(candidate)
            better = replace(candidate, point=front.best.point, tuned=True, reason="", verdict="runner-up", p99_ms=None)
            better.ratios = at_cost(base * front.cost, candidate.backend)
            found.append(better)
        if self.finals.objective == "inferences-per-joule":
            found.sort(key=cost_of)
        if found and found[0].branch is not baseline.branch and found[0].backend == baseline.backend:
            # Where the graph brings nothing at that point, the point alone is the answer.
            point = replace(found[0].point, floating_precision=baseline.point.floating_precision)
            point = fitted(point, baseline.branch.artifact)
            found.append(Candidate(baseline.branch, point, baseline.backend, tuned=True))
        return [*found, *hopeful]

    # The last comparison ------------------------------------------------------------------------------------------

    def _final(self, baseline: Candidate, chosen: Sequence[Candidate], considered: list[Candidate]) -> Result:
        tried: dict[str, Side] | None = None
        inaccurate: list[Candidate] = []
        tries = 0
        for candidate in chosen:
            if any(_same_program(candidate, other) for other in inaccurate):
                # The same program at another point gives the same answers.
                candidate.verdict, candidate.reason = "rejected", inaccurate[-1].reason
                continue
            # What is lossless always gets its turn: it can't fail as those before it did.
            if tries >= FINAL_TRIES and candidate.branch.lossy:
                continue
            if tried is not None:
                self.finals.close(tried)
            self.progress(0.6 + 0.1 * min(tries, 2), f"measuring {candidate.name}")
            effort = self.effort if tries == 0 else replace(self.effort, max_s=self.effort.max_s / 2)
            tries += 1
            try:
                tried = self.finals.sides(baseline, candidate, effort)
            except PerwattError as error:
                candidate.verdict, candidate.reason, tried = "rejected", str(error), None
                continue
            try:
                problem, comparison, score = self.finals.confirm(candidate, baseline, tried)
            except BackendError as error:
                problem, comparison, score = str(error), None, None
            except BaseException:
                self.finals.close(tried)
                raise
            if problem is None:
                candidate.verdict = "shipped"
                candidate.reason = self.finals.gain_words(candidate, baseline, tried)
                return self._result(
                    "optimized", candidate.reason, baseline, candidate, tried, considered, comparison, score
                )
            candidate.verdict, candidate.reason = "rejected", problem
            if comparison is not None:
                inaccurate.append(candidate)
            if tries > FINAL_TRIES:
                break
        return self._unchanged(baseline, considered, tried)

    def _unchanged(self, baseline: Candidate, considered: list[Candidate], tried: dict[str, Side] | None) -> Result:
        """The original is the answer; its figures are those of the last comparison, where there was one."""
        if tried is not None:
            for label in ("optimized", AT_POINT):
                if label in tried:
                    tried.pop(label).close()
            sides = tried
        else:
            self.progress(0.9, "measuring the original")
            sides = self.finals.sides(baseline, baseline, self.effort)
        try:
            self.finals.measure_energy(sides)
            comparison, score = None, None
            if self.judge.evaluation is not None:
                comparison, score = self.judge.drop_on_all(sides["original"])
        except BaseException:
            self.finals.close(sides)
            raise
        baseline.verdict = "shipped"
        baseline.reason = baseline.reason or "the original is the answer"
        reason = _why_unchanged(considered)
        return self._result("unchanged", reason, baseline, baseline, sides, considered, comparison, score)

    def _result(self, outcome: Any, reason: str, baseline: Candidate, winner: Candidate, sides: dict[str, Side],
                considered: list[Candidate], comparison: Any, score: Any) -> Result:  # fmt: skip
        as_run = None
        try:
            if self.judge.evaluation is not None:
                as_run = score.value if winner is baseline else self.judge.drop_on_all(sides["original"])[1].value
        except BackendError as error:
            self.notes.append(f"the original's accuracy as it runs could not be measured: {error}")
        except BaseException:
            self.finals.close(sides)
            raise
        if winner.point.power_limit_w is not None:
            watts = winner.point.power_limit_w
            self.notes.append(
                f"warning: its joules hold at a power limit of {watts:g} W only: nvidia-smi -pl {watts:g}"
            )
        if winner.point.clock_mhz is not None:
            mhz = winner.point.clock_mhz
            self.notes.append(f"warning: its joules hold at a graphics clock of {mhz} MHz only: nvidia-smi -lgc {mhz}")
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
        misses = self.finals.misses(result.winner, side)
        if misses is not None:
            return misses
        changed = result.winner is not result.baseline
        if result.comparison is not None and self.judge.too_much(result.comparison, final=changed):
            return self.judge.drop_words(result.comparison)
        return None


def _same_program(a: Candidate, b: Candidate) -> bool:
    """Whether two candidates compute the same, whatever operating point they run at."""
    return a.branch is b.branch and a.backend == b.backend and a.point.floating_precision == b.point.floating_precision


def _why_unchanged(considered: Sequence[Candidate]) -> str:
    """Why the original is the answer, and what was not looked at."""
    best = min((c for c in considered if c.ratios), key=cost_of, default=None)
    reason = "nothing was better than the original beyond the noise"
    if best is not None and cost_of(best) >= 1 and gain_of(best).value is not None:
        rate = f"{ratio_text(gain_of(best))} of the original's {best.backend.rate_words}"
        reason = f"nothing is faster: the best other answer ({best.name}) does {rate}"
    elif best is not None and best.reason:
        reason = f"the best other answer ({best.name}) is not shipped: {best.reason}"
    late = sum(c.reason.startswith("not tried") for c in considered)
    if late and best is None:
        return f"no other answer was tried, of {late}: out of time (--time)"
    return f"{reason}; not tried, out of time (--time): {late} of the other answers" if late else reason
