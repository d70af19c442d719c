"""Makes and measures the choices of a search: passes, lowering, accuracy as far as is needed, speed beside the original.

The same choice on the same machine gives the same graph; prefixes that choices share are made once. Two choices that come to
the same graph are measured once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from perwatt import registry
from perwatt.artifact import Artifact
from perwatt.backends import Backend
from perwatt.candidates import Branch, Candidate, cost_in, fitted, leaves_float32
from perwatt.choices import Space, Values
from perwatt.contract import OperatingPoint
from perwatt.errors import PerwattError
from perwatt.measurement import Ratio
from perwatt.pipeline import Pipeline
from perwatt.recipe import Objective, PassStep
from perwatt.screening import Screening
from perwatt.search_log import Outcome, Trial
from perwatt.sides import Side

SAME = "the same graph as trial {}"


@dataclass
class Trials:
    """What it takes to try a choice. `pipelines` and `backends` by the backend's name; `baseline` is what is compared with, open
    as `side`; `minutes`: the usual time for each round of learning."""

    space: Space
    pipelines: Mapping[str, Pipeline]
    backends: Mapping[str, Backend]
    source: Artifact
    screening: Screening
    baseline: Candidate
    side: Side
    point: OperatingPoint
    objectives: Sequence[Objective] = ("inferences-per-joule",)
    minutes: float | None = None
    affords: Callable[[Values], bool] = lambda values: True
    progress: Callable[[str], None] = lambda text: None

    def evaluate(self, trials: Sequence[Trial], before: Sequence[Trial]) -> Iterator[tuple[Trial, Outcome]]:
        """Each trial with its outcome, one after the other; those that there is no time for are left out."""
        for trial in trials:
            if self.affords(trial.values):
                self.progress(f"trial {trial.number + 1}: {self.space.words(trial.values)}")
                yield trial, self.outcome(trial.values, before)

    def outcome(self, values: Values, before: Sequence[Trial]) -> Outcome:
        """Make this choice and measure it. What fails is an outcome too."""
        start = time.perf_counter()
        try:
            found = self._found(values, before)
        except PerwattError as error:
            if not self.side.worker.running:
                # It was the original that could not be run any more, which says nothing of this choice.
                raise
            found = Outcome("refused", str(error))
        finally:
            for pipeline in self.pipelines.values():
                pipeline.release()
        return replace(found, seconds=round(time.perf_counter() - start, 3))

    def candidate(self, trial: Trial) -> Candidate:
        """The trial as a candidate of the study, with what it found."""
        assert trial.outcome is not None
        made = self._candidate(trial.values)
        made.ratios, made.p99_ms = dict(trial.outcome.ratios), trial.outcome.p99_ms
        made.memory_bytes = trial.outcome.memory_bytes
        made.trial = trial.number
        return made

    def is_same(self, candidate: Candidate, trial: Trial) -> bool:
        """Whether a candidate is what the trial measured: a pass that learns may have had another time."""
        return trial.outcome is not None and trial.outcome.digest in (None, self._identity(candidate))

    def branch(self, values: Values) -> Branch:
        """The graph of a choice, and how it came about."""
        backend, _ = self.space.where(values)
        return walk(self.pipelines[backend], self.source, self.space.steps(values, self.minutes))

    def _candidate(self, values: Values) -> Candidate:
        backend, floating = self.space.where(values)
        branch = self.branch(values)
        point = fitted(replace(self.point, floating_precision=floating), branch.artifact)
        return Candidate(branch, point, self.backends[backend])

    def _found(self, values: Values, before: Sequence[Trial]) -> Outcome:
        candidate = self._candidate(values)
        artifact = candidate.branch.artifact
        digest = self._identity(candidate)
        unapplied = self._unapplied(candidate.branch)
        for other in before:
            if other.outcome is not None and other.outcome.status == "measured" and other.outcome.digest == digest:
                return replace(other.outcome, reason=SAME.format(other.number + 1), partly=bool(unapplied))
        judge = self.screening.judge
        if candidate.branch.lossy and judge.select is None:
            return Outcome("refused", "accuracy unknown: there are no samples to judge it on", digest=digest)
        self.screening.screen(candidate, self.side)
        if not candidate.ratios:
            return Outcome("refused", candidate.reason or "it could not be measured", digest=digest)
        drop = candidate.drop
        early = drop is not None and judge.select is not None and drop.n < len(judge.select.samples)
        return Outcome(
            "measured",
            unapplied,
            ratios=candidate.ratios,
            objectives=tuple(self._cost(name, candidate) for name in self.objectives),
            drop=None if drop is None else drop.drop,
            drop_low=drop.low if drop is not None and early else None,
            n=None if drop is None else drop.n,
            p99_ms=candidate.p99_ms,
            memory_bytes=candidate.memory_bytes,
            size_bytes=artifact.size_bytes(),
            missed=self.missed(candidate),
            digest=digest,
            partly=bool(unapplied),
        )

    def _identity(self, candidate: Candidate) -> str:
        """Of a program: two with the same are the same."""
        artifact = candidate.branch.artifact
        # Where nothing is left in float32, what becomes of it makes no difference.
        floating = candidate.point.floating_precision if leaves_float32(artifact) else ""
        return f"{artifact.digest()}:{candidate.backend.name}:{floating}"

    def _unapplied(self, branch: Branch) -> str:
        """Which lossy passes changed nothing, and why."""
        lossy = [
            row for row in branch.rows if registry.pass_class(row.name).tolerance is None and row.status != "applied"
        ]
        return "; ".join(dict.fromkeys(f"{row.name} {row.status}: {row.reason}" for row in lossy))

    def _cost(self, objective: Objective, candidate: Candidate) -> float:
        if objective == "size":
            return candidate.branch.artifact.size_bytes() / max(1, self.source.size_bytes())
        found = {
            "inferences-per-joule": cost_in(candidate.ratios, candidate.backend),
            "latency": candidate.ratios.get("latency_p50_ms", Ratio(None)),
            "throughput": candidate.ratios.get("throughput_per_s", Ratio(None)).inverse(),
        }[objective]
        return found.value if found.value is not None else math.inf

    def missed(self, candidate: Candidate) -> dict[str, float]:
        """By which share of it each constraint is missed."""
        judge = self.screening.judge
        budget = judge.budget
        missed = {}
        if candidate.drop is not None and judge.too_much(candidate.drop):
            missed["accuracy"] = (candidate.drop.drop - judge.max_drop) / judge.allowed
        if judge.too_late(candidate.p99_ms):
            missed["p99"] = (candidate.p99_ms or 0.0) / (budget.p99_ms or 1.0) - 1
        if judge.too_big(candidate.memory_bytes):
            missed["memory"] = (candidate.memory_bytes or 0) / (budget.memory or 1) - 1
        size = candidate.branch.artifact.size_bytes()
        if budget.size is not None and size > budget.size:
            missed["size"] = size / budget.size - 1
        throughput = candidate.ratios.get("throughput_per_s", Ratio(None))
        if throughput.high is not None and throughput.high < 1:
            missed["throughput"] = 1 - throughput.high
        return missed


def walk(pipeline: Pipeline, source: Artifact, steps: Sequence[PassStep]) -> Branch:
    """The graph after these steps, one after the other, and a row for each."""
    artifact, rows, lossy = source, [], False
    for step in steps:
        made_by = registry.bind(step)
        artifact, row = pipeline.step(artifact, made_by)
        if made_by.tolerance is None:
            row.measured = {}
            lossy = lossy or row.status == "applied"
        rows.append(row)
    return Branch(artifact, tuple(rows), lossy)
