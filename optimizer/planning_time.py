"""How long a search takes, which choices come first, and what is not possible."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from perwatt import registry
from perwatt.choices import BACKEND, FLOATING, PRECISION, Values
from perwatt.contract import Stage
from perwatt.measuring import SCREENING
from perwatt.plan import Foreseen, Limits, Part, Plan
from perwatt.planning_backend import WINDOW_S, There
from perwatt.recipe import PassStep

RUNS, RUNS_COMPARING = 3, 12
"""Programs that a lossy pass has run, about: to calibrate and to be verified; one that compares graphs on the backend."""
TRIALS_IN_ROUND = 4
"""Of a search, one of which learns."""


@dataclass
class Timetable:
    """What every choice by itself will cost and take, and how long all stages. `open_s`: to start and compile a program."""

    made: Plan
    limits: Limits
    theres: Sequence[There]
    judged: int
    open_s: float

    def __post_init__(self) -> None:
        self.space = self.made.factors.space

    def fill_in(self) -> None:
        """Estimates, then stages."""
        alone = [self._foreseen(values) for values in self._alone()]
        known = [one for one in alone if one.ratio is not None]
        best = min(known, key=_value, default=alone[0]) if self.judged else alone[0]
        self.made.base = best.choice
        self.made.estimates = [*sorted(alone, key=_value), *self._removals(best.values)]
        self._stages(alone)

    def _there(self, values: Values) -> There:
        backend, _ = self.space.where(values)
        return next(one for one in self.theres if one.name == backend)

    def _foreseen(self, values: Values, removal: str = "", amount: str = "") -> Foreseen:
        found = self.made.factors.of(values)
        ratio, why = (None, found) if isinstance(found, str) else (found, "")
        return Foreseen(values, self.space.words(values), ratio, round(self.trial_s(values), 1), why, removal, amount)

    def _alone(self) -> list[dict[str, int]]:
        """Each backend with each alternative that it has a use for; then each other floating precision."""
        space, count = self.space, {one.name: len(one.values) for one in self.space.decisions}
        plain = [{**space.usual(), BACKEND: backend} for backend in range(count.get(BACKEND, 1))]
        found = [
            space.at_home({**one, PRECISION: index})
            for index in range(count.get(PRECISION, 1))
            for one in plain
            if index not in self._there(one).refused
        ]
        found += [space.canonical({**one, FLOATING: i}) for i in range(count.get(FLOATING, 1)) for one in plain]
        return list({tuple(sorted(values.items())): values for values in found}.values())

    def _removals(self, best: Values) -> Iterator[Foreseen]:
        """Each amount of each removal, the rest being as in `best`."""
        amounts = {decision.name: decision.values for decision in self.space.decisions}
        for one in self.space.removals:
            name = one.step.name
            for index in range(1, len(one.options) + 1):
                yield self._foreseen(self.space.canonical({**best, name: index}), name, amounts[name][index])

    # How long ---------------------------------------------------------------------------------------------------------------

    def trial_s(self, values: Values) -> float:
        """About how long a choice takes to try where nothing of it was made before."""
        there = self._there(values)
        judging = self.judged * there.an_inference()
        passes = sum(self._pass_s(step, judging) for step in self.space.steps(values, self.limits.minutes))
        return self.open_s + judging + SCREENING.max_s + passes

    def _pass_s(self, step: PassStep, judging: float) -> float:
        cls = registry.pass_class(step.name)
        if cls.tolerance is not None:
            return 0.0
        if cls.mends:
            usual = self.limits.minutes or getattr(registry.bind(step), "minutes", None) or 0.0
            return 60 * float(step.settings.get("minutes", usual))
        comparing = cls.measures and cls.stage is Stage.PRECISION
        return RUNS_COMPARING * (self.open_s + WINDOW_S) if comparing else RUNS * (self.open_s + judging)

    def learning_s(self) -> float:
        """One round of learning; 0 where nothing learns."""
        return max(
            (self._pass_s(step, 0.0) for step in (self.space.mending, self.space.tuning) if step is not None),
            default=0.0,
        )

    def _stages(self, alone: Sequence[Foreseen]) -> None:
        """Every choice by itself, then rounds, of which one trial learns: as many as time and trials allow."""
        search, most = self.limits.search, self.limits.trials
        if search is not None:
            search = max(0.0, search - self.made.seconds)
        first = [one.seconds for one in alone[:most]]
        ends = list(itertools.accumulate(first))
        done = len(first) if search is None else sum(end <= search for end in ends)
        spent = ends[-1] if search is None else min(ends[-1], search)
        a_trial = min(first)
        rounds = math.inf if search is None else (search - spent) / (TRIALS_IN_ROUND * a_trial + self.learning_s())
        if most is not None:
            rounds = min(rounds, (most - done) / TRIALS_IN_ROUND)
        endless = math.isinf(rounds)
        self.made.trials = None if endless else done + math.floor(TRIALS_IN_ROUND * rounds)
        self.made.parts = [
            Part("planning", self.made.seconds),
            Part("every choice by itself", spent),
            Part("around the best", None if endless else rounds * TRIALS_IN_ROUND * a_trial),
            *([Part("learning", None if endless else rounds * self.learning_s())] if self.learning_s() else []),
            *(Part(name, seconds) for name, seconds in self.limits.behind.items()),
        ]


def _value(one: Foreseen) -> float:
    return math.inf if one.ratio is None else one.ratio.value


def not_possible(made: Plan, timetable: Timetable, judged: int, learns: bool) -> Iterator[str]:
    """What will not be tried, or not be shipped, and why."""
    space, limits = made.factors.space, timetable.limits
    lossy = bool(space.removals) or any(space.alternatives)
    mends = [step.name for step in (space.mending, space.tuning) if step is not None]
    if lossy and not judged:
        yield "nothing that loses accuracy can be shipped: there are no labelled samples to judge it by (--eval, --data)"
    if lossy and judged and not mends:
        yield "nothing is taught back" + ("" if learns else ": there are no samples to learn from (--train, --data)")
    if mends and importlib.util.find_spec("torch") is None:
        yield f"{' and '.join(mends)}: learning needs torch (pip install 'perwatt[torch]')"
    elif mends and limits.search is not None and timetable.learning_s() > limits.search:
        yield (
            f"{' and '.join(mends)}: a round of learning takes {timetable.learning_s():.0f} s, and the search has "
            f"{limits.search:.0f} s (--time)"
        )
    reasons: dict[str, list[str]] = {}
    for there in timetable.theres:
        for index, reason in there.refused.items():
            name = getattr(space.alternatives[index], "name", "")
            reasons.setdefault(f"{name}: {reason}", []).append(there.name)
    for (backend, name, _), found in made.factors.removals.items():
        if isinstance(found, str):
            reasons.setdefault(f"{name}: {found}", []).append(backend)
    for reason, backends in reasons.items():
        where = "" if len(set(backends)) == len(timetable.theres) else f" ({', '.join(dict.fromkeys(backends))})"
        yield f"{reason}{where}"
