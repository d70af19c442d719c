"""The study: which answers to consider, which to believe, which to ship.

In its plain form a handful of candidates: the cleaned graph, and each lossy branch of it, at each floating precision
that the backend offers. All are lowered, judged on the `select` samples and screened against the original; the best
that the budget permits is measured again in fresh processes and judged on all evaluation samples. If nothing clears the
noise and the least gain, the answer is the original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from perwatt import metrics, registry
from perwatt.artifact import Artifact
from perwatt.contract import Capabilities, OperatingPoint
from perwatt.data import Samples
from perwatt.errors import BackendError, InputError
from perwatt.isolation import Worker
from perwatt.measurement import Ratio
from perwatt.measuring import SCREENING, Effort, Side, interleave, ratios
from perwatt.pipeline import Pipeline, Row
from perwatt.recipe import Budget, OneOf, PassStep
from perwatt.signature import Batch
from perwatt.worker import load_outputs

FINAL_TRIES = 2
CLEARLY_WORSE = 1.1
"""A floating precision that costs the original more than this is not tried on other graphs."""


@dataclass(frozen=True)
class Branch:
    """A graph that the recipe's passes lead to, and how."""

    artifact: Artifact
    rows: tuple[Row, ...] = ()
    lossy: bool = False

    def applied(self) -> list[str]:
        """Names of the passes that changed this graph."""
        return [row.name for row in self.rows if row.status == "applied"]


@dataclass
class Candidate:
    """A graph at an operating point, with what was found out about it."""

    branch: Branch
    point: OperatingPoint
    verdict: Literal["shipped", "runner-up", "rejected"] = "runner-up"
    reason: str = ""
    ratios: dict[str, Ratio] = field(default_factory=dict)
    drop: metrics.Comparison | None = None
    p99_ms: float | None = None

    @property
    def name(self) -> str:
        """What a person would call it: `quantize-int8, rest in bf16`."""
        lossy = [name for name in self.branch.applied() if registry.pass_class(name).tolerance is None]
        changed = self.branch.applied()
        graph = ", ".join(lossy) or ("cleaned graph" if changed else "original graph")
        return f"{graph}, floating point in {self.point.floating_precision or 'the default'}"


@dataclass
class Evaluation:
    """Samples to judge on, and what the float32 original makes of them."""

    metric: metrics.Metric
    samples: Samples
    folder: Path
    reference: list[Batch]
    original: metrics.Score

    def compare(self, outputs: Sequence[Batch]) -> metrics.Comparison:
        """The original in float32 against `outputs`, sample by sample."""
        return metrics.compare(self.metric, self.original, self.score(outputs))

    def score(self, outputs: Sequence[Batch]) -> metrics.Score:
        """Accuracy of `outputs`."""
        return self.metric.score(outputs, self.samples, self.reference)


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


def explore(pipeline: Pipeline, source: Artifact, steps: Sequence[PassStep | OneOf]) -> list[Branch]:
    """All graphs worth considering: the lossless prefix, and every lossy branch of it. A lossy pass never replaces the
    graph that it started from."""
    branches = [Branch(source)]
    for step in steps:
        if isinstance(step, PassStep) and registry.pass_class(step.name).tolerance is not None:
            branches = [_extended(pipeline, branch, step) for branch in branches]
            continue
        alternatives = step.steps if isinstance(step, OneOf) else [step]
        tried = [_extended(pipeline, branch, other) for branch in branches for other in alternatives]
        branches = [*branches, *tried]
    return branches


def _extended(pipeline: Pipeline, branch: Branch, step: PassStep) -> Branch:
    made_by = registry.bind(step)
    artifact, row = pipeline.step(branch.artifact, made_by)
    lossy = made_by.tolerance is None and row.status == "applied"
    if made_by.tolerance is None:
        row.measured = {}
    return Branch(artifact, (*branch.rows, row), branch.lossy or lossy)


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
        progress: Callable[[float, str], None],
    ) -> None:
        self.target, self.capabilities, self.point, self.budget = target, capabilities, point, budget
        self.source, self.timing, self.folder, self.eager = source, timing, folder, eager
        self.select, self.evaluation, self.max_drop = select, evaluation, max_drop
        self.effort, self.progress = effort, progress
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
            interleave([baseline, side], self.timing, SCREENING, hopeless=self._hopeless)
            candidate.ratios = ratios(side, baseline)
            candidate.p99_ms = _p99(side)
        except BackendError as error:
            candidate.verdict, candidate.reason = "rejected", str(error)

    def choose_baseline(self) -> tuple[Candidate, Side, list[Candidate]]:
        """The original at its best permitted floating precision; the backend's own default unless another is better."""
        default = Candidate(Branch(self.source), self._at(self.capabilities.floating_precisions[0]))
        side = self._open("original", default)
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
        best = min((o for o in others if o.ratios and o.verdict != "rejected"), key=_cost, default=None)
        if best is not None and (not permitted or (_clearly_better(best, self.budget.min_gain))):
            side.close()
            why = "the backend's default loses too much accuracy" if not permitted else "it is faster than the backend's default"
            self.notes.append(f"the original runs in {best.point.floating_precision}: {why}")
            best.reason = why
            # Its figures were against the default, which is no longer what others are compared with.
            best.ratios = {}
            return best, self._open("original", best), [default, *others]
        return default, side, [default, *others]

    def candidates(self, branches: Sequence[Branch], baseline: Candidate, originals: Sequence[Candidate]) -> list[Candidate]:
        """Each distinct graph at each floating precision worth trying."""
        slow = {
            c.point.floating_precision for c in originals
            if c is not baseline and c.ratios and _cost(c) > CLEARLY_WORSE
        }  # fmt: skip
        seen = {(self.source.digest(), c.point.floating_precision) for c in originals}
        found = []
        for branch in branches:
            for precision in self.capabilities.floating_precisions:
                key = (branch.artifact.digest(), precision)
                only_default = not leaves_float32(branch.artifact) and precision != self.capabilities.floating_precisions[0]
                if key in seen or only_default or (precision in slow and not branch.lossy):
                    continue
                seen.add(key)
                found.append(Candidate(branch, self._at(precision)))
        return found

    # The whole --------------------------------------------------------------------------------------------------

    def run(self, branches: Sequence[Branch]) -> Result:
        """Screen, choose, measure again, judge again."""
        self.progress(0.0, "the original")
        baseline, side, originals = self.choose_baseline()
        try:
            found = self.candidates(branches, baseline, originals)
            for number, candidate in enumerate(found):
                self.progress(0.1 + 0.5 * number / max(1, len(found)), candidate.name)
                self.screen(candidate, side)
        finally:
            side.close()
            self._screening.close()
        for candidate in found:
            self._permit(candidate)
        hopeful = sorted((c for c in found if c.verdict != "rejected" and _gain(c).value), key=_cost)
        result = self._final(baseline, hopeful, [*(o for o in originals if o is not baseline), *found])
        result.rows = ledger(branches, result.winner, found)
        result.notes = [*self.notes, *result.notes]
        return result

    def _permit(self, candidate: Candidate) -> None:
        """Reject what may not be shipped, whatever its speed."""
        if candidate.verdict == "rejected":
            return
        if self.budget.p99_ms is not None and candidate.p99_ms is not None and candidate.p99_ms > self.budget.p99_ms:
            candidate.verdict = "rejected"
            candidate.reason = f"p99 latency {candidate.p99_ms:.2f} ms, {self.budget.p99_ms:g} ms allowed"
        elif candidate.branch.lossy and self.evaluation is None:
            candidate.verdict, candidate.reason = "rejected", "accuracy unknown: there are no samples to judge it on"
        elif not _promising(candidate, self.budget.min_gain):
            candidate.verdict, candidate.reason = "rejected", no_gain_text(_gain(candidate), self.budget.min_gain)

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
            except BaseException:
                self._close(sides)
                raise
            if problem is None:
                candidate.verdict = "shipped"
                candidate.reason = f"{_gain_of(sides).value:.2f}× the original's inferences per CPU second"
                return self._result("optimized", candidate.reason, baseline, candidate, sides, considered, comparison, score)
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
                    self.eager = None
                    self.notes.append(f"torch eager could not be measured: {error}")
            if winner is not baseline:
                sides["optimized"] = self._open("optimized", winner)
            interleave(
                list(sides.values()), self.timing, effort, lambda share: self.progress(0.6 + 0.35 * share, "measuring"),
                self._hopeless,
            )  # fmt: skip
        except BaseException:
            self._close(sides)
            raise
        return sides

    def _close(self, sides: dict[str, Side]) -> None:
        """End these workers; torch eager's goes on to the next comparison, and its owner closes it."""
        for side in sides.values():
            if side is not self.eager:
                side.close()

    def _confirm(self, candidate: Candidate, sides: dict[str, Side]) -> tuple[str | None, metrics.Comparison | None, metrics.Score | None]:
        """Why this candidate is not shipped after all (None where it is), with its accuracy on all evaluation samples."""
        side = sides["optimized"]
        measured = ratios(side, sides["original"])
        gain = _gain_of(sides)
        if gain.low is None or gain.value is None or gain.low <= 1 or gain.value < 1 + self.budget.min_gain:
            return no_gain_text(gain, self.budget.min_gain), None, None
        throughput = measured["throughput_per_s"]
        if throughput.high is not None and throughput.high < 1:
            return f"fewer CPU seconds, but slower: {_ratio_text(throughput)} of the throughput", None, None
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
        best = min((c for c in considered if c.ratios), key=_cost, default=None)
        reason = "nothing was better than the original beyond the noise"
        if best is not None and best.reason:
            reason = f"the best other answer ({best.name}) is not shipped: {best.reason}"
        return self._result("unchanged", reason, baseline, baseline, sides, considered, comparison, score)

    def _result(self, outcome: Any, reason: str, baseline: Candidate, winner: Candidate, sides: dict[str, Side],
                considered: list[Candidate], comparison: Any, score: Any) -> Result:  # fmt: skip
        as_run = None
        if self.evaluation is not None:
            as_run = score.value if winner is baseline else self._evaluate(sides["original"])[1].value
        result = Result(outcome, reason, winner, baseline, sides, [baseline, *considered], [], comparison, score, as_run)
        problem = self._budget_problem(result)
        if problem:
            result.outcome, result.reason = "budget_not_met", problem
        return result

    def _budget_problem(self, result: Result) -> str | None:
        """Which constraint the shipped program misses, and by how much."""
        side = result.sides.get("optimized", result.sides["original"])
        p99 = _p99(side)
        if self.budget.p99_ms is not None and p99 is not None and p99 > self.budget.p99_ms:
            return f"p99 latency is {p99:.2f} ms, {p99 - self.budget.p99_ms:.2f} ms over the {self.budget.p99_ms:g} ms allowed"
        changed = result.winner is not result.baseline
        if result.comparison is not None and self._too_much(result.comparison, final=changed) and self.evaluation is not None:
            return self._drop_text(result.comparison, self.evaluation)
        return None


def ledger(branches: Sequence[Branch], winner: Candidate, found: Sequence[Candidate]) -> list[Row]:
    """The winner's rows, and those of the branches that were not chosen, each once, with what was measured."""
    told: set[int] = set()
    rows: list[Row] = []
    shipped = {id(row) for row in winner.branch.rows}
    # The winner's own order first; then what else was tried.
    for branch in [winner.branch, *branches]:
        for row in branch.rows:
            if id(row) in told:
                continue
            told.add(id(row))
            about = [c for c in found if any(row is other for other in c.branch.rows)]
            if row.measured is not None:
                _credit(row, about)
            rows.append(row if id(row) in shipped else _not_chosen(row, winner, about))
    return rows


def _credit(row: Row, about: Sequence[Candidate]) -> None:
    """What a lossy pass brought at its best operating point."""
    best = min((c for c in about if c.ratios), key=_cost, default=None)
    if best is None:
        row.measured = None
        return
    gain = _gain(best)
    row.measured = {
        "inferences_per_cpu_s_ratio": {"value": gain.value, "low": gain.low, "high": gain.high},
        "floating_precision": best.point.floating_precision,
        "accuracy_drop": best.drop.drop if best.drop else None,
    }


def _not_chosen(row: Row, winner: Candidate, about: Sequence[Candidate]) -> Row:
    if row.status != "applied":
        return row
    # A lossless pass answers for its own graph, not for what a lossy pass made of it.
    judged = [c for c in about if c.reason and (row.measured is not None or not c.branch.lossy)]
    best = min(judged, key=_cost, default=None)
    return replace(row, status="not-chosen", reason=best.reason if best else f"{winner.name} is better")


def leaves_float32(artifact: Artifact) -> bool:
    """Whether the graph leaves anything in float32 for the operating point to decide."""
    values = artifact.model.graph.initializers.values()
    return any(v.const_value is not None and v.const_value.dtype.name == "FLOAT" for v in values) or not values


def check_original(evaluation: Evaluation, expect_percent: float | None) -> None:
    """Stop where the original's own accuracy says that the data don't fit the model. Raises InputError."""
    value = evaluation.original.value
    if expect_percent is not None and evaluation.metric.unit == "fraction" and value * 100 < expect_percent - 0.05:
        raise InputError(
            f"the original scores {value:.2%} on your labels, {expect_percent:g} % was expected",
            fix="check normalisation, class order and the data set",
        )
    chance = metrics.near_chance(evaluation.metric, evaluation.original, evaluation.samples)
    if chance and expect_percent is None:
        raise InputError(f"the original {chance}")


def _gain(candidate: Candidate) -> Ratio:
    found = candidate.ratios.get("cpu_s_per_inference")
    return found.inverse() if found is not None else Ratio(None)


def _gain_of(sides: dict[str, Side]) -> Ratio:
    return ratios(sides["optimized"], sides["original"])["cpu_s_per_inference"].inverse()


def _cost(candidate: Candidate) -> float:
    found = candidate.ratios.get("cpu_s_per_inference")
    return found.value if found is not None and found.value is not None else float("inf")


def _promising(candidate: Candidate, min_gain: float) -> bool:
    """Whether screening leaves open that the least gain is there."""
    gain = _gain(candidate)
    return gain.value is not None and (gain.high or gain.value) >= 1 + min_gain and gain.value > 1


def _clearly_better(candidate: Candidate, min_gain: float) -> bool:
    gain = _gain(candidate)
    return gain.low is not None and gain.value is not None and gain.low > 1 and gain.value >= 1 + min_gain


def no_gain_text(gain: Ratio, min_gain: float) -> str:
    """Why a gain is not worth shipping."""
    if gain.value is None:
        return "its speed could not be measured"
    if gain.value <= 1:
        return f"no gain: {_ratio_text(gain)} of the original's inferences per CPU second"
    return f"gain too small or too uncertain: {_ratio_text(gain)} of the original's inferences per CPU second, {min_gain:.0%} is the least worth keeping"


def _ratio_text(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}×"
    return f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]"


def _p99(side: Side) -> float | None:
    from perwatt.bench.statistics import percentile

    return percentile([latency for window in side.windows for latency in window.latencies_ms], 0.99)
