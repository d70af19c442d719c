"""The study: which answers to consider, which to believe, which to ship.

In its plain form a handful of candidates: the cleaned graph, and each lossy branch of it, at each floating precision
that the backend offers. All are lowered, judged on the `select` samples and screened against the original; the best
that the budget permits is measured again in fresh processes and judged on all evaluation samples. If nothing clears the
noise and the least gain, the answer is the original.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from perwatt import metrics
from perwatt.artifact import Artifact
from perwatt.bench.statistics import percentile
from perwatt.candidates import (
    Branch,
    Candidate,
    clearly_better,
    cost_of,
    gain_of,
    leaves_float32,
    ledger,
    no_gain_text,
    promising,
    ratio_text,
)  # fmt: skip
from perwatt.contract import Capabilities, OperatingPoint
from perwatt.errors import BackendError
from perwatt.evaluation import Evaluation
from perwatt.isolation import Worker
from perwatt.measurement import Ratio
from perwatt.measuring import SCREENING, Conductor, Effort, cpu_ratio, interleave, ratios, run_energy_blocks
from perwatt.pipeline import Row
from perwatt.recipe import Budget
from perwatt.sides import Side
from perwatt.worker import load_outputs

FINAL_TRIES = 2
ENERGY_BLOCKS = 2
"""Of windows for a counter of energy, where there is one."""
CLEARLY_WORSE = 1.1
"""A floating precision that costs the original more than this is not tried on other graphs."""


@dataclass
class Result:
    """What the study found. `sides` are still open: original first, then by label; the caller closes them."""

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
    notes: list[str] = field(default_factory=list)


class Study:
    """One run over the candidates of one model on one target."""

    def __init__(
        self,
        *,
        target: str,
        capabilities: Capabilities,
        point: OperatingPoint,
        budget: Budget,
        source: Artifact,
        timing: Path,
        select: Evaluation | None,
        evaluation: Evaluation | None,
        max_drop: float,
        folder: Path,
        eager: Side | None,
        effort: Effort,
        deadline: float | None,
        progress: Callable[[float, str], None],
        conductor: Conductor | None = None,
    ) -> None:
        self.target, self.capabilities, self.point, self.budget = target, capabilities, point, budget
        self.source, self.timing, self.folder, self.eager = source, timing, folder, eager
        self.select, self.evaluation, self.max_drop = select, evaluation, max_drop
        self.effort, self.deadline, self.progress = effort, deadline, progress
        self.conductor = conductor or Conductor()
        self.notes: list[str] = []
        self._screening = Worker("candidate")

    # Judging ----------------------------------------------------------------------------------------------------

    def _too_much(self, comparison: metrics.Comparison, *, final: bool = False) -> bool:
        # The bound is asked of what is to be shipped, on all samples: on the few of screening it would reject everything.
        worst = comparison.high if final and self.budget.prove_accuracy else comparison.drop
        # Half a sample of a billion: what rounding leaves of a difference that is exactly the budget.
        return worst > self.max_drop + 1e-9

    def _judge(self, candidate: Candidate, side: Side, evaluation: Evaluation) -> metrics.Comparison:
        out = self.folder / f"outputs-{len(list(self.folder.iterdir()))}"
        side.worker.call("predict", samples=str(evaluation.folder), out=str(out))
        candidate.drop = evaluation.compare(load_outputs(out))
        return candidate.drop

    def _drop_text(self, comparison: metrics.Comparison, evaluation: Evaluation) -> str:
        unit = " points" if evaluation.metric.unit == "fraction" else ""
        bound = f", {comparison.high:.2f} at the bound," if self.budget.prove_accuracy else ""
        return f"loses {comparison.drop:.2f}{unit}{bound} of {self.max_drop:g} allowed (n = {comparison.n})"

    # Screening --------------------------------------------------------------------------------------------------

    def _hopeless(self, cost: Ratio) -> bool:
        """Whether the interval already excludes the least gain."""
        return cost.low is not None and cost.low > 1 / (1 + self.budget.min_gain)

    def _open(self, label: str, candidate: Candidate, worker: Worker | None = None) -> Side:
        return Side.lowered(label, self.target, candidate.branch.artifact, candidate.point, self.folder, worker)

    def _at(self, precision: str | None) -> OperatingPoint:
        return replace(self.point, floating_precision=precision)

    def screen(self, candidate: Candidate, baseline: Side) -> None:
        """Accuracy on the select samples, then speed against the original; fills in what was found."""
        try:
            # One process serves all candidates in turn; a crash costs its candidate, and the next call starts anew.
            side = self._open(candidate.name, candidate, self._screening)
            if self.select is not None:
                comparison = self._judge(candidate, side, self.select)
                if self._too_much(comparison):
                    candidate.verdict, candidate.reason = "rejected", self._drop_text(comparison, self.select)
            interleave([baseline, side], self.timing, SCREENING, hopeless=self._hopeless, conductor=self.conductor)
            candidate.ratios = ratios(side, baseline)
            candidate.p99_ms = _p99(side)
        except BackendError as error:
            candidate.verdict, candidate.reason = "rejected", str(error)
            if not baseline.worker.running:
                # It was the original's worker that died: the next candidate wants a living one to compare with.
                baseline.load()

    def choose_baseline(self) -> tuple[Candidate, Side, list[Candidate]]:
        """The original at its best permitted floating precision; the backend's own default unless another is better."""
        default = Candidate(Branch(self.source), self._at(self.capabilities.floating_precisions[0]))
        side = self._open("original", default)
        try:
            return self._chosen_baseline(default, side)
        except BaseException:
            side.close()
            raise

    def _chosen_baseline(self, default: Candidate, side: Side) -> tuple[Candidate, Side, list[Candidate]]:
        permitted = True
        if self.select is not None:
            comparison = self._judge(default, side, self.select)
            permitted = not self._too_much(comparison)
            if not permitted:
                default.verdict, default.reason = "rejected", self._drop_text(comparison, self.select)
        others = []
        for precision in self.capabilities.floating_precisions[1:]:
            other = Candidate(Branch(self.source), self._at(precision))
            self.screen(other, side)
            others.append(other)
        best = min((o for o in others if o.ratios and o.verdict != "rejected"), key=cost_of, default=None)
        if best is not None and (not permitted or (clearly_better(best, self.budget.min_gain))):
            side.close()
            why = (
                "the backend's default loses too much accuracy"
                if not permitted
                else "it is faster than the backend's default"
            )
            self.notes.append(f"the original runs in {best.point.floating_precision}: {why}")
            best.reason = why
            default.reason = default.reason or f"the original is better in {best.point.floating_precision}"
            # These figures were against the default, which is no longer what others are compared with.
            for other in others:
                other.ratios = {}
            return best, self._open("original", best), [default, *others]
        return default, side, [default, *others]

    def candidates(
        self, branches: Sequence[Branch], baseline: Candidate, originals: Sequence[Candidate]
    ) -> list[Candidate]:
        """Each distinct graph at each floating precision worth trying."""
        slow = {
            c.point.floating_precision for c in originals
            if c is not baseline and c.ratios and cost_of(c) > CLEARLY_WORSE
        }  # fmt: skip
        seen = {(self.source.digest(), c.point.floating_precision) for c in originals}
        found = []
        for branch in branches:
            for precision in self.capabilities.floating_precisions:
                key = (branch.artifact.digest(), precision)
                only_default = (
                    not leaves_float32(branch.artifact) and precision != self.capabilities.floating_precisions[0]
                )
                if key in seen or only_default or (precision in slow and not branch.lossy):
                    continue
                seen.add(key)
                found.append(Candidate(branch, self._at(precision)))
        return found

    # The whole --------------------------------------------------------------------------------------------------

    def run(self, branches: Sequence[Branch]) -> Result:
        """Screen, choose, measure again, judge again."""
        self.progress(0.0, "the original")
        try:
            baseline, side, originals = self.choose_baseline()
            try:
                found = self.candidates(branches, baseline, originals)
                for number, candidate in enumerate(found):
                    self.progress(0.1 + 0.5 * number / max(1, len(found)), candidate.name)
                    if self._out_of_time():
                        candidate.verdict, candidate.reason = "rejected", "not tried: out of time"
                    else:
                        self.screen(candidate, side)
                baseline.p99_ms = _p99(side)
            finally:
                side.close()
        finally:
            self._screening.close()
        for candidate in found:
            self._permit(candidate, baseline)
        hopeful = sorted((c for c in found if c.verdict != "rejected" and gain_of(c).value), key=cost_of)
        result = self._final(baseline, hopeful, [*(o for o in originals if o is not baseline), *found])
        result.rows = ledger(branches, result.winner, found)
        result.notes = [*self.notes, *result.notes]
        return result

    def _out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _too_late(self, p99_ms: float | None) -> bool:
        """Whether the p99 latency misses the budget."""
        return self.budget.p99_ms is not None and p99_ms is not None and p99_ms > self.budget.p99_ms

    def _permit(self, candidate: Candidate, baseline: Candidate) -> None:
        """Reject what may not be shipped, whatever its speed."""
        if candidate.verdict == "rejected":
            return
        if self._too_late(candidate.p99_ms):
            candidate.verdict, candidate.reason = "rejected", self._late_text(candidate.p99_ms)
        elif candidate.branch.lossy and self.evaluation is None:
            candidate.verdict, candidate.reason = "rejected", "accuracy unknown: there are no samples to judge it on"
        elif self._too_late(baseline.p99_ms):
            # Where the original is too slow for its budget, being in time is gain enough.
            return
        elif not promising(candidate, self.budget.min_gain):
            candidate.verdict, candidate.reason = "rejected", no_gain_text(gain_of(candidate), self.budget.min_gain)

    def _late_text(self, p99_ms: float | None) -> str:
        over = (p99_ms or 0.0) - (self.budget.p99_ms or 0.0)
        return f"p99 latency is {p99_ms:.2f} ms, {over:.2f} ms over the {self.budget.p99_ms:g} ms allowed"

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
                candidate.reason = f"{_gain_of(sides).value:.2f}× the original's inferences per CPU second"
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
            sides["original"] = self._open("original", baseline)
            if winner is not baseline and winner.point != baseline.point:
                at_point = Candidate(baseline.branch, winner.point)
                sides["original at the same point"] = self._open("original at the same point", at_point)
            if self.eager is not None:
                try:
                    self.eager.prepare(self.timing, 0.0)
                    sides["torch eager"] = self.eager
                except BackendError as error:
                    self.eager.close()
                    self.eager = None
                    self.notes.append(f"torch eager could not be measured: {error}")
            if winner is not baseline:
                sides["optimized"] = self._open("optimized", winner)
            interleave(
                list(sides.values()), self.timing, effort, lambda share: self.progress(0.6 + 0.35 * share, "measuring"),
                self._hopeless, conductor=self.conductor,
            )  # fmt: skip
            run_energy_blocks([[side] for side in sides.values()], ENERGY_BLOCKS, self.conductor)
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
        side = sides["optimized"]
        measured = ratios(side, sides["original"])
        gain, p99 = _gain_of(sides), _p99(side)
        if self._too_late(p99):
            return self._late_text(p99), None, None
        small = gain.low is None or gain.value is None or gain.low <= 1 or gain.value < 1 + self.budget.min_gain
        if small and not self._too_late(_p99(sides["original"])):
            return no_gain_text(gain, self.budget.min_gain), None, None
        throughput = measured["throughput_per_s"]
        if throughput.high is not None and throughput.high < 1:
            return f"fewer CPU seconds, but slower: {ratio_text(throughput)} of the throughput", None, None
        if self.evaluation is None:
            return None, None, None
        comparison, score = self._evaluate(side)
        candidate.drop = comparison
        if self._too_much(comparison, final=True):
            return self._drop_text(comparison, self.evaluation), comparison, score
        return None, comparison, score

    def _evaluate(self, side: Side) -> tuple[metrics.Comparison, metrics.Score]:
        assert self.evaluation is not None
        out = self.folder / f"final-{side.label.replace(' ', '-')}-{len(list(self.folder.iterdir()))}"
        side.worker.call("predict", samples=str(self.evaluation.folder), out=str(out))
        score = self.evaluation.score(load_outputs(out))
        return metrics.compare(self.evaluation.metric, self.evaluation.original, score), score

    def _unchanged(self, baseline: Candidate, considered: list[Candidate], tried: dict[str, Side] | None) -> Result:
        """The original is the answer; its figures are those of the last comparison, where there was one."""
        if tried is not None:
            for label in ("optimized", "original at the same point"):
                if label in tried:
                    tried.pop(label).close()
            sides = tried
        else:
            self.progress(0.9, "measuring the original")
            sides = self._sides(baseline, baseline, self.effort)
        baseline.verdict = "shipped"
        comparison, score = self._evaluate(sides["original"]) if self.evaluation is not None else (None, None)
        baseline.reason = baseline.reason or "the original is the answer"
        best = min((c for c in considered if c.ratios), key=cost_of, default=None)
        reason = "nothing was better than the original beyond the noise"
        if best is not None and cost_of(best) >= 1:
            rate = f"{ratio_text(gain_of(best))} of the original's inferences per CPU second"
            reason = f"nothing is faster: the best other answer ({best.name}) does {rate}"
        elif best is not None and best.reason:
            reason = f"the best other answer ({best.name}) is not shipped: {best.reason}"
        return self._result("unchanged", reason, baseline, baseline, sides, considered, comparison, score)

    def _result(self, outcome: Any, reason: str, baseline: Candidate, winner: Candidate, sides: dict[str, Side],
                considered: list[Candidate], comparison: Any, score: Any) -> Result:  # fmt: skip
        as_run = None
        if self.evaluation is not None:
            as_run = score.value if winner is baseline else self._evaluate(sides["original"])[1].value
        result = Result(
            outcome, reason, winner, baseline, sides, [baseline, *considered], [], comparison, score, as_run
        )
        problem = self._budget_problem(result)
        if problem:
            result.outcome, result.reason = "budget_not_met", problem
        return result

    def _budget_problem(self, result: Result) -> str | None:
        """Which constraint the shipped program misses, and by how much."""
        p99 = _p99(result.sides.get("optimized", result.sides["original"]))
        if self._too_late(p99):
            return self._late_text(p99)
        changed = result.winner is not result.baseline
        if (
            result.comparison is not None
            and self._too_much(result.comparison, final=changed)
            and self.evaluation is not None
        ):
            return self._drop_text(result.comparison, self.evaluation)
        return None


def _gain_of(sides: dict[str, Side]) -> Ratio:
    return cpu_ratio(sides["optimized"], sides["original"]).inverse()


def _p99(side: Side) -> float | None:
    return percentile([latency for window in side.windows for latency in window.latencies_ms], 0.99)
