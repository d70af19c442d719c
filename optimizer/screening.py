"""Screening: which backend and floating precision the original runs best in, and which candidates are worth measuring
again.

The original is tried on every backend, at every floating precision that it offers; the cheapest that the budget permits
is what everything else is compared with, so that nothing is called a gain which a better choice of backend would have
given as well. Candidates are judged on the `select` samples and raced against it briefly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from perwatt.artifact import Artifact
from perwatt.backends import Backend
from perwatt.candidates import (
    Branch,
    Candidate,
    cost_of,
    enough,
    fitted,
    gain_of,
    leaves_float32,
    no_gain_text,
    promising,
)  # fmt: skip
from perwatt.contract import OperatingPoint
from perwatt.errors import BackendError
from perwatt.isolation import Worker
from perwatt.judging import Judge, p99_ms
from perwatt.measurement import Ratio
from perwatt.measuring import SCREENING, interleave, ratios
from perwatt.metrics import Comparison
from perwatt.setup import Setup
from perwatt.sides import Side

CLEARLY_WORSE = 1.1
"""A floating precision that costs the original more than this is not tried on other graphs."""
FAR_BEHIND = 2.5
"""A backend that costs the original more than this is given up: quantization does not bring that much more there."""
ANOTHER_BACKEND_GAIN = 0.01
"""What another backend must bring the original to become the one that is compared with."""


class Screening:
    """The originals and candidates of one study; `close` ends the processes."""

    def __init__(
        self, setup: Setup, judge: Judge, source: Artifact, point: OperatingPoint, backends: Sequence[Backend]
    ) -> None:
        self.setup, self.judge, self.source, self.point, self.backends = setup, judge, source, point, backends
        self.notes: list[str] = []
        self.quick = False
        """Whether one that clearly loses too much is judged on as few samples as it takes."""
        self._workers: dict[str, Worker] = {}

    def close(self) -> None:
        """End the processes that candidates were opened in."""
        for worker in self._workers.values():
            worker.close()

    def original(self, backend: Backend, precision: str) -> Candidate:
        """The model as read, on that backend in that floating precision."""
        return Candidate(Branch(self.source), self._point(self.source, precision), backend)

    def _point(self, artifact: Artifact, precision: str) -> OperatingPoint:
        return fitted(replace(self.point, floating_precision=precision), artifact)

    # One candidate ----------------------------------------------------------------------------------------------

    def screen(self, candidate: Candidate, baseline: Side) -> None:
        """Accuracy on the select samples, then speed against the original; fills in what was found. Raises BackendError
        where the original itself can't be run any more."""
        for last in (False, True):
            try:
                self._screened(candidate, baseline)
                return
            except BackendError as error:
                alive = baseline.worker.running
                if alive or last:
                    candidate.verdict, candidate.reason = "rejected", str(error)
                if alive:
                    return
                # It was the original's process that died, which says nothing of the candidate.
                baseline.load()

    def _screened(self, candidate: Candidate, baseline: Side) -> None:
        # One process a backend serves all its candidates in turn; a crash costs its candidate, and the next call starts
        # anew.
        backend = candidate.backend.name
        if self.judge.budget.memory is not None and backend in self._workers:
            # What a process held at most, it held with any of those before.
            self._workers.pop(backend).close()
        if backend not in self._workers:
            self._workers[backend] = self.setup.worker(f"candidate on {backend}")
        side = self.setup.open(candidate.name, candidate, self._workers[backend])
        self._judge(candidate, side)
        interleave(
            [baseline, side], self.setup.timing, SCREENING, hopeless=self.judge.hopeless, conductor=self.setup.conductor
        )
        candidate.ratios = ratios(side, baseline)
        candidate.p99_ms = p99_ms(side)
        candidate.memory_bytes = side.note_memory()

    def _judge(self, candidate: Candidate, side: Side) -> None:
        """Reject the candidate where it loses too much accuracy, as far as that is known."""
        candidate.drop = self._drop(side)
        if candidate.drop is not None and self.judge.too_much(candidate.drop):
            candidate.verdict, candidate.reason = "rejected", self.judge.drop_words(candidate.drop)

    def _drop(self, side: Side) -> Comparison | None:
        """What it loses. Where many are tried, one that clearly loses too much is not judged on all samples."""
        if self.quick:
            found = self.judge.quick_drop(side)
            if found is None or self.judge.too_much(found[0]):
                return None if found is None else found[0]
        return self.judge.drop_on_select(side)

    # The original -----------------------------------------------------------------------------------------------

    def choose_baseline(self) -> tuple[Candidate, Side, list[Candidate]]:
        """The original where it runs best, its open side, and every original that was tried. Raises BackendError where
        no backend takes the model."""
        first, side, refused = self._first_original()
        try:
            return self._best_original(first, side, refused)
        except BaseException:
            side.close()
            raise

    def _first_original(self) -> tuple[Candidate, Side, list[Candidate]]:
        refused: list[Candidate] = []
        for backend in self.backends:
            candidate = self.original(backend, backend.capabilities.floating_precisions[0])
            side: Side | None = None
            try:
                side = self.setup.open("original", candidate)
                self._judge(candidate, side)
                # What compiles may still not run.
                side.prepare(self.setup.timing, SCREENING.warm_up_s)
                return candidate, side, refused
            except BackendError as error:
                if side is not None:
                    side.close()
                if backend is self.backends[-1]:
                    reasons = [f"{c.backend.name}: {c.reason}" for c in refused]
                    raise BackendError("; ".join([*reasons, str(error)]), fix=error.fix) from error
                candidate.verdict, candidate.reason = "rejected", str(error)
                self.notes.append(f"warning: {backend.name} does not take this model: {error}")
                refused.append(candidate)
        raise AssertionError("there is at least one backend")

    def _best_original(
        self, first: Candidate, side: Side, refused: list[Candidate]
    ) -> tuple[Candidate, Side, list[Candidate]]:
        permitted = first.verdict != "rejected"
        others: list[Candidate] = []
        gone = {candidate.backend.name for candidate in refused}
        for backend in self.backends:
            if backend.name in gone or (backend.spare and backend != first.backend):
                continue
            for precision in self.precisions(backend):
                if backend == first.backend and precision == first.point.floating_precision:
                    continue
                other = self.original(backend, precision)
                self.screen(other, side)
                others.append(other)
                if not other.ratios:
                    self.notes.append(
                        f"warning: {backend.name} in {precision} does not take this model: {other.reason}"
                    )
        usable = [o for o in others if o.ratios and o.verdict != "rejected" and not self.judge.too_late(o.p99_ms)]
        first.p99_ms, first.memory_bytes = p99_ms(side), side.note_memory()
        in_time = not self.judge.too_late(first.p99_ms)
        # A process that held others before has the highest memory of them all: one that fits in spite of it does.
        fitting = [o for o in usable if not self.judge.too_big(o.memory_bytes)]
        too_big = self.judge.too_big(first.memory_bytes) and bool(fitting)
        best = min(fitting if too_big else usable, key=cost_of, default=None)
        if best is None or (permitted and in_time and not too_big and not self._better(best, first)):
            return first, side, [first, *refused, *others]
        side.close()
        theirs = "the backend's default" if best.backend == first.backend else first.backend.name
        why = f"it costs less than {theirs}"
        if not permitted:
            why = f"{theirs} loses too much accuracy"
        elif not in_time:
            why = f"{theirs} is too slow for the latency allowed"
        elif too_big:
            why = f"{theirs} takes more memory than allowed"
        where = "" if best.backend.alone else f"{best.backend.name}, "
        self.notes.append(f"the original runs in {where}{best.point.floating_precision}: {why}")
        best.reason = why
        first.reason = first.reason or f"the original is better in {where}{best.point.floating_precision}"
        self.rebase(best, first, others)
        return best, self.setup.open("original", best), [first, *refused, *others]

    def precisions(self, backend: Backend) -> list[str]:
        """The floating precisions that may be tried there: without samples to judge accuracy on, none below the
        backend's own default."""
        default, *others = backend.capabilities.floating_precisions
        return [default, *(p for p in others if self.judge.evaluation is not None or p == "f32")]

    def _better(self, other: Candidate, first: Candidate) -> bool:
        """Whether another original is what to compare with: cheaper beyond doubt, and no slower."""
        throughput = other.ratios["throughput_per_s"]
        if throughput.high is not None and throughput.high < 1:
            return False
        least = self.judge.budget.min_gain if other.backend == first.backend else ANOTHER_BACKEND_GAIN
        return enough(gain_of(other), least)

    def rebase(self, best: Candidate, first: Candidate, others: Sequence[Candidate]) -> None:
        """What was measured against the first original, as ratios to the best one; their intervals are not known."""
        to_best = {name: ratio.value for name, ratio in best.ratios.items()}
        for other in others:
            if other is not best:
                other.ratios = {
                    name: Ratio(ratio.value / base if ratio.value is not None and (base := to_best.get(name)) else None)
                    for name, ratio in other.ratios.items()
                }
        first.ratios = {name: Ratio(1 / base if base else None) for name, base in to_best.items()}
        best.ratios = {}

    # Candidates -------------------------------------------------------------------------------------------------

    def worth_it(self, baseline: Candidate, originals: Sequence[Candidate]) -> list[Backend]:
        """The backends that are not far behind with the original, the one that it runs best on first: time may run out.
        Those that refuse it are out."""
        kept = []
        for backend in self.backends:
            costs = [1.0 if c is baseline else cost_of(c) for c in originals if c.backend == backend]
            if min(costs, default=float("inf")) <= FAR_BEHIND:
                kept.append(backend)
        return sorted(kept, key=lambda backend: backend != baseline.backend)

    def candidates(
        self, branches: dict[str, list[Branch]], baseline: Candidate, originals: Sequence[Candidate]
    ) -> list[Candidate]:
        """Each distinct graph of `branches` (by the backend's name) at each floating precision worth trying there."""
        slow = self._slow(baseline, originals)
        seen = {(c.backend.name, self.source.digest(), c.point.floating_precision) for c in originals}
        found = []
        for backend in self.backends:
            precisions = self.precisions(backend)
            for branch in branches.get(backend.name, []):
                for precision in precisions:
                    key = (backend.name, branch.artifact.digest(), precision)
                    only_default = not leaves_float32(branch.artifact) and precision != precisions[0]
                    if key in seen or only_default or ((backend.name, precision) in slow and not branch.lossy):
                        continue
                    seen.add(key)
                    found.append(Candidate(branch, self._point(branch.artifact, precision), backend))
        return found

    def _slow(self, baseline: Candidate, originals: Sequence[Candidate]) -> set[tuple[str, str | None]]:
        """Backends and precisions in which the original costs clearly more than at its best."""
        return {
            (c.backend.name, c.point.floating_precision)
            for c in originals
            if c is not baseline and c.ratios and cost_of(c) > CLEARLY_WORSE
        }

    def permit(self, candidate: Candidate, baseline: Candidate) -> None:
        """Reject what may not be shipped, whatever its speed, and what is not worth measuring again."""
        if candidate.verdict == "rejected":
            return
        budget = self.judge.budget
        if self.judge.too_late(candidate.p99_ms):
            candidate.verdict, candidate.reason = "rejected", self.judge.late_words(candidate.p99_ms)
        elif candidate.branch.lossy and self.judge.evaluation is None and not candidate.branch.judged:
            candidate.verdict, candidate.reason = "rejected", "accuracy unknown: there are no samples to judge it on"
        elif self.judge.too_late(baseline.p99_ms):
            # Where the original is too slow for its budget, being in time is gain enough.
            return
        elif not promising(candidate, budget.min_gain):
            words = no_gain_text(gain_of(candidate), budget.min_gain, candidate.backend.rate_words)
            candidate.verdict, candidate.reason = "rejected", words
