"""A search of one run: the time of the budget spent where it buys most, and an answer at every moment.

    original on its best backend → plan → rounds of trials → the best of them tuned → measured again, confirmed on unseen samples

Whenever a round finds what is better than the bundle that there is, it is measured again in fresh processes, confirmed on
samples that no trial saw, and written as a whole bundle: whoever stops the search has the best so far. Trials are kept in a
log (`search_log`) and passes in a store (`step_store`), both under the user's cache folder, so that the same command goes on
where it was stopped or killed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from perwatt import choices, planning
from perwatt.accounting import account
from perwatt.backends import Backend
from perwatt.bundle import write_text
from perwatt.cache_keys import digest, environment, metric_key
from perwatt.candidates import Branch, Candidate
from perwatt.choices import Space, Values
from perwatt.contract import OperatingPoint
from perwatt.errors import Stopped
from perwatt.judging import p99_ms
from perwatt.measuring import Effort
from perwatt.pipeline import Pipeline
from perwatt.plan import Limits, Plan
from perwatt.preparation import Prepared
from perwatt.recipe import OneOf, PassStep, Recipe
from perwatt.run_cache import VARIABLES
from perwatt.search import Evaluate, Search
from perwatt.search_log import Log, Outcome, Trial, aside, front
from perwatt.sides import Side
from perwatt.study import FINAL_TRIES, Result, Study
from perwatt.trials import Trials

STOPPED = "stopped by Ctrl-C"
FROM_S = 120.0
"""A time budget from here on is spent on a search; less is what the plain pipeline takes."""
SEARCH_SHARE, TUNE_SHARE, ACCOUNT_SHARE, PASSES_SHARE = 0.72, 0.82, 0.93, 0.95
"""Of the time budget: when no further trial is begun; when the operating point of the best has to be tuned, and when what each of
its passes brings has to be known, for which it is measured again; and when no pass is begun any more."""
ACCOUNT_S = 120.0
"""What the account may take where there is no time budget."""
LEARN_SHARE, ROUNDS_OF_LEARNING = 0.6, 4
"""Of the search's time, what the expected number of rounds of learning may take together."""
LEAST_MINUTES, MOST_MINUTES = 0.1, 5.0
PROMOTION = Effort(max_s=5.0, tight=0.02)
"""How long a best so far is measured before it is written: the last one is measured as long as any answer."""
STOPPED_S = 20.0
"""For tuning where a person has stopped the search."""
LEDGER = 8
"""Choices besides the answer whose passes the ledger tells of: the cheapest."""


def wanted(recipe: Recipe) -> bool:
    """Whether the recipe asks for a search: by a number of trials, or by a time that is worth it."""
    if recipe.search.trials is not None:
        return recipe.search.trials > 0
    return recipe.budget.time is not None and recipe.budget.time >= FROM_S


def steps_for(recipe: Recipe, prepared: Prepared, steps: Sequence[PassStep | OneOf]) -> list[PassStep | OneOf]:
    """What is searched over: the recipe's own steps, or, where it leaves them to us, all that a search may use."""
    if recipe.passes != "default":
        return list(steps)
    learning = prepared.roles.learn or prepared.roles.calibrate
    return choices.steps_to_search(learning is not None, prepared.select is not None)


def limits(recipe: Recipe) -> Limits:
    """What a search may take, for its plan."""
    whole, trials = recipe.budget.time, recipe.search.trials
    minutes = _minutes(recipe)
    if whole is None:
        return Limits(behind={"what each pass brings": ACCOUNT_S}, minutes=minutes, trials=trials)
    behind = {
        "tuning": (TUNE_SHARE - SEARCH_SHARE) * whole,
        "measuring again, and what each pass brings": (1 - TUNE_SHARE) * whole,
    }
    return Limits(whole, SEARCH_SHARE * whole, behind, minutes, trials)


def _minutes(recipe: Recipe) -> float | None:
    """For each round of learning; the pass's own where no time was given."""
    if recipe.budget.time is None:
        return None
    minutes = SEARCH_SHARE * recipe.budget.time / 60 * LEARN_SHARE / ROUNDS_OF_LEARNING
    return round(min(MOST_MINUTES, max(LEAST_MINUTES, minutes)), 2)


def log_path(folder: Path, recipe: Recipe, prepared: Prepared, machine: dict[str, Any]) -> Path:
    """Where the trials of this search are kept: by the model, its data, what was asked for, and where it is measured. Time is
    not part of it: a longer search goes on where a shorter one ended."""
    plain = recipe.model_dump(mode="json")
    plain["budget"]["time"] = plain["search"]["trials"] = None
    facts = {
        "recipe": {name: plain[name] for name in ("inputs", "budget", "passes", "target", "search", "seed")},
        "samples": {role: samples.digest() for role, samples in prepared.samples.items()},
        "metric": metric_key(recipe.data.metric),
        "model": prepared.source.digest(),
        "backends": {backend.name: backend.versions for backend in prepared.backends},
        "machine": machine["fingerprint"],
        "variables": {name: os.environ.get(name) for name in VARIABLES},
        "environment": environment(),
    }
    return folder / digest(facts)[:24] / "search.sqlite"


class Spread(Protocol):
    """Tries choices elsewhere: `cluster.Cluster`."""

    def over(self, trials: Trials, notes: list[str]) -> Evaluate:
        """Begin; what evaluates rounds in the place of `trials`. `notes` takes what the report should tell."""

    def close(self) -> None:
        """End whatever was begun."""


@dataclass
class Searching:
    """One search. `pipeline_for` gives the passes of a backend, `write` a bundle of a result; `deadline` is when no further trial
    is begun, `tune_by` and `account_by` when those are over, in `time.monotonic()` seconds. `announce` is given the plan before
    the first trial. Trials are made here, one after the other, or by `spread`. `fresh`: not going on where another one ended."""

    recipe: Recipe
    study: Study
    steps: Sequence[PassStep | OneOf]
    prepared: Prepared
    pipeline_for: Callable[[Backend], Pipeline]
    point: OperatingPoint
    log: Path
    write: Callable[[Result], object]
    deadline: float | None = None
    tune_by: float | None = None
    account_by: float | None = None
    progress: Callable[[float, str], None] = lambda share, text: None
    announce: Callable[[Plan], None] = lambda plan: None
    spread: Spread | None = None
    fresh: bool = False
    shipped_cost: float = 1.0
    shipped: int | None = None
    started: float = field(default_factory=time.monotonic)

    def run(self) -> Result:
        """Search, and decide. Ctrl-C ends the search, not the run: the best so far is measured and returned."""
        study = self.study
        if self.fresh:
            for path in (self.log, self._plan_path, self._begun_path):
                aside(path)
        study.progress(0.0, "the original")
        baseline, side, originals, backends = self._begun()
        try:
            space = choices.space(self.steps, {b.name: study.screening.precisions(b) for b in backends})
            pipelines = {backend.name: self.pipeline_for(backend) for backend in backends}
            self.plan = planning.kept(
                self._plan_path, space, self.prepared, pipelines, baseline, originals, limits(self.recipe),
                lambda text: self.progress(0.0, f"planning: {text}"),
            )  # fmt: skip
            self.announce(self.plan)
            self._open(space, backends, pipelines, baseline, side, originals)
            try:
                why = self.search.run()
            except KeyboardInterrupt:
                why = STOPPED
                self.study.progress(0.75, "stopping: measuring the best so far (Ctrl-C again: at once)")
            baseline.p99_ms = baseline.p99_ms or p99_ms(side)
        finally:
            if self.spread is not None:
                self.spread.close()
            side.close()
            study.screening.close()
        try:
            return self._answer(why)
        except KeyboardInterrupt:
            if self.shipped_cost < 1:
                raise Stopped("the best that was measured again before is in the bundle") from None
            raise
        finally:
            self.search.log.close()

    @property
    def _plan_path(self) -> Path:
        return self.log.with_name("plan.json")

    @property
    def _begun_path(self) -> Path:
        return self.log.with_name("begun.json")

    def _begun(self) -> tuple[Candidate, Side, list[Candidate], list[Backend]]:
        """The original where it runs best, its open side, every original that was tried, and the backends worth it; as they were
        when the search began, where it goes on: what its trials cost is told in terms of that."""
        screening = self.study.screening
        baseline, side, originals = screening.choose_baseline()
        try:
            backends = screening.worth_it(baseline, originals)
            known = {backend.name: backend for backend in self.prepared.backends}
            before = _read(self._begun_path)
            names = before.get("backends", [])
            if names and all(name in known for name in names):
                backends = [known[name] for name in names]
                was = next(
                    (o for o in originals if _place(o) == before.get("baseline") and o.verdict != "rejected"), None
                )
                if was is not None and was is not baseline and was.ratios:
                    side.close()
                    screening.rebase(was, baseline, [o for o in originals if o is not baseline])
                    baseline, side = was, self.study.setup.open("original", was)
            began = {"baseline": _place(baseline), "backends": [backend.name for backend in backends]}
            if began != before:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                write_text(self._begun_path, json.dumps(began) + "\n")
        except BaseException:
            side.close()
            raise
        return baseline, side, originals, backends

    def _open(
        self, space: Space, backends: Sequence[Backend], pipelines: dict[str, Pipeline], baseline: Candidate, side: Any,
        originals: list[Candidate],
    ) -> None:  # fmt: skip
        self.space, self.baseline, self.originals = space, baseline, originals
        self.study.screening.quick = True
        objectives = self.recipe.search.objective
        log = Log(self.log, space, seed=self.recipe.seed, objectives=len(objectives))
        # Another time would be another length of learning, of which nothing is known.
        self.minutes = log.settled("minutes", _minutes(self.recipe))
        self.trials = Trials(
            space,
            pipelines,
            {backend.name: backend for backend in backends},
            self.prepared.source,
            self.study.screening,
            baseline,
            side,
            self.point,
            objectives,
            self.minutes,
            self._affords,
            lambda text: self.progress(self._share(), text),
        )
        self.study.finals.objective = objectives[0]
        self.search = Search(
            space,
            log,
            self._evaluate(),
            stop=self._stop,
            after_round=self._after_round,
            # What the plan estimates are CPU seconds, or seconds.
            estimate=self.plan.estimate if objectives[0] == "inferences-per-joule" else lambda values: None,
            max_drop=self.study.judge.allowed if self.study.judge.select is not None else None,
        )

    def _evaluate(self) -> Evaluate:
        """Who makes the trials."""
        if self.spread is None:
            return self.trials.evaluate
        self.progress(0.0, "starting the workers")
        together, most = self.spread.over(self.trials, self.study.notes), self.recipe.search.trials

        def evaluate(trials: Sequence[Trial], before: Sequence[Trial]) -> Iterable[tuple[Trial, Outcome]]:
            # Those that are being made count, though nobody knows their outcome yet.
            left = len(trials) if most is None else max(0, most - len(self.search.log.told()))
            return together(trials[:left], before)

        return evaluate

    # Time -------------------------------------------------------------------------------------------------------------

    def _affords(self, values: Values) -> bool:
        """Whether there is time for a trial."""
        if self._stop() is not None:
            return False
        learnt = {self.space.learning(trial.values) for trial in self.search.log.told()}
        if self.deadline is None or self.space.learning(values) in {(), *learnt}:
            return True
        # What it shares with others is learnt already: what is left is the last round.
        longest = max(
            (float(step.settings.get("minutes", 0.0)) for step in self.space.steps(values, self.minutes)), default=0.0
        )
        return time.monotonic() + 60 * longest < self.deadline

    def _stop(self) -> str | None:
        most = self.recipe.search.trials
        if most is not None and len(self.search.log.told()) >= most:
            return f"{most} trials were made"
        if self.deadline is not None and time.monotonic() > self.deadline:
            return "the time is up"
        return None

    def _share(self) -> float:
        if self.deadline is not None:
            return min(1.0, (time.monotonic() - self.started) / max(1.0, self.deadline - self.started))
        most = self.recipe.search.trials or 1
        return min(1.0, len(self.search.log.told()) / most)

    # The best so far ----------------------------------------------------------------------------------------------------

    def _after_round(self, best: Trial | None) -> None:
        """Measure again and write what is clearly better than the bundle that there is."""
        while best is not None and best.outcome is not None:
            gain = self.shipped_cost / best.outcome.cost
            if gain < 1 + self.recipe.budget.min_gain:
                return
            if self._promoted(best):
                self.shipped_cost, self.shipped = best.outcome.cost, best.number
                return
            self.search.give_up(best)
            best = self.search.best()

    def _promoted(self, best: Trial) -> bool:
        candidate = self.trials.candidate(best)
        if not self.trials.is_same(candidate, best):
            return False
        self.progress(self._share(), f"measuring the best so far: {candidate.name}")
        kept, self.study.effort = self.study.effort, PROMOTION
        told = self.baseline.verdict, self.baseline.reason
        self.study.finals.quick = True
        try:
            result = self.study.decide(self.baseline, self.originals, [candidate.branch], [], [candidate])
        finally:
            self.study.effort, self.study.finals.quick = kept, False
            self.baseline.verdict, self.baseline.reason = told
        try:
            holds = result.winner is candidate
            if holds:
                self.write(result)
            return holds
        finally:
            _close(result)

    # The answer -----------------------------------------------------------------------------------------------------------

    def _answer(self, why: str) -> Result:
        told = self.search.log.told()
        ranking = self.search.ranking(told)
        hopeful = self._nearest(told) or [
            candidate for trial in ranking[:LEDGER]
            if trial.outcome and trial.outcome.cost < 1
            and self.trials.is_same(candidate := self.trials.candidate(trial), trial)
        ]  # fmt: skip
        self.study.tune_by = time.monotonic() + STOPPED_S if why == STOPPED else self.tune_by
        chosen = _early(self.study.tuned(self.baseline, hopeful), self.shipped)
        branches: list[Branch] = [candidate.branch for candidate in hopeful]
        result = self.study.decide(self.baseline, self.originals, branches, hopeful, chosen)
        if result.winner.branch.rows and result.winner is not result.baseline:
            result = self._accounted(result, branches, hopeful)
        result.search = {
            "plan": self.plan.to_json(),
            "ended": why,
            "seconds": round(time.monotonic() - self.started, 1),
            "choices": self.space.count(),
            "trials": [self._told(trial) for trial in told],
            "front": [trial.number for trial in front(told)],
            "looks": self.study.finals.looks,
            "shipped": result.winner.trial,
            "objectives": list(self.recipe.search.objective),
        }
        return result

    def _accounted(self, result: Result, branches: Sequence[Branch], hopeful: Sequence[Candidate]) -> Result:
        """The result with what each of its passes brings; without those that bring nothing, where that holds."""
        winner = result.winner
        self.progress(0.9, "what each pass brings")
        told = account(
            winner,
            self.baseline,
            self.trials.pipelines[winner.backend.name],
            self.prepared.source,
            [PassStep(name=row.name, settings=row.settings) for row in winner.branch.rows],
            self.study.setup,
            self.study.judge,
            deadline=self.account_by if self.account_by is not None else time.monotonic() + ACCOUNT_S,
            progress=lambda share, text: self.progress(0.9 + 0.05 * share, text),
        )
        result.account = told
        if told.reduced is None:
            return result
        leaner = replace(winner, branch=told.reduced, verdict="runner-up", reason="")
        before = self.baseline.verdict, self.baseline.reason
        again = self.study.decide(self.baseline, self.originals, [told.reduced, *branches], hopeful, [leaner])
        if again.winner is leaner:
            _close(result)
            again.account = told
            return again
        _close(again)
        told.keep(leaner.reason)
        self.baseline.verdict, self.baseline.reason = before
        winner.verdict = "shipped"
        return result

    def _nearest(self, told: Sequence[Trial]) -> list[Candidate]:
        """Where neither the original nor any trial keeps every constraint: the trial that misses them least, nearer than the
        original does."""
        original = max(self.trials.missed(self.baseline).values(), default=0.0)
        known = [t for t in told if t.outcome is not None and t.outcome.status == "measured"]
        if not original or any(t.outcome.permitted for t in known if t.outcome is not None):
            return []
        far = {t.number: max(t.outcome.missed.values()) for t in known if t.outcome is not None}
        kept = [
            t
            for t in known
            if t.outcome and not {"accuracy", "throughput"} & set(t.outcome.missed) and far[t.number] < original
        ]
        nearest = min(kept, key=lambda t: far[t.number], default=None)
        self.study.finals.strict = nearest is None
        return [] if nearest is None else [self.trials.candidate(nearest)]

    def _told(self, trial: Trial) -> dict[str, Any]:
        assert trial.outcome is not None
        plain = trial.outcome.to_json()
        plain["ratios"] = {
            name: dict(zip(("value", "low", "high"), three, strict=True)) for name, three in plain["ratios"].items()
        }
        return {
            "number": trial.number,
            "round": trial.round,
            "choice": self.space.words(trial.values),
            "why": trial.why,
            **plain,
        }


def _early(chosen: Sequence[Candidate], shipped: int | None) -> list[Candidate]:
    """With what is in the bundle already among the first: not all that promise more will be measured again."""
    known = [c for c in chosen if shipped is not None and c.trial == shipped]
    if not known or chosen.index(known[0]) < FINAL_TRIES:
        return list(chosen)
    others = [c for c in chosen if c is not known[0]]
    return [*others[: FINAL_TRIES - 1], known[0], *others[FINAL_TRIES - 1 :]]


def _place(candidate: Candidate) -> list[str | None]:
    return [candidate.backend.name, candidate.point.floating_precision]


def _read(path: Path) -> dict[str, Any]:
    """What is kept there; nothing where it can't be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _close(result: Result) -> None:
    for side in result.sides.values():
        side.close()
