"""What is known before a round of a search: its trials, and what they let expect of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from perwatt.choices import BACKEND, LEARN, ORDER, ROUNDS, Space, Values
from perwatt.search_log import Outcome, Trial
from perwatt.search_model import Model, Prediction, Teaching

NEAR = 1.0
"""A constraint that is missed by at most this share of it may be won back; what misses it by more is given up."""
ELSEWHERE, FORESEEN = 1.5, 1.2
"""How many times the best an alternative on another backend may be expected to cost; where the plan measured it."""
SLACK = 1.3
"""What is expected to lose up to this times what may be lost may turn out to lose less."""
PROMISING = 1.05
"""What is expected to cost up to this times the best may turn out cheaper."""


class Seen:
    """The trials `before` a round, and what they let expect of others. `ranking`: those that are permitted, cheapest first."""

    def __init__(
        self, space: Space, before: Sequence[Trial], ranking: Sequence[Trial],
        estimate: Callable[[Values], float | None], max_drop: float | None,
    ) -> None:  # fmt: skip
        """`max_drop`: what may be lost, more than nothing; None where there is nothing to judge it by."""
        self.before, self.space, self.estimate = before, space, estimate
        self.most = max_drop
        self.known = {key(trial.values): trial.outcome for trial in before if trial.outcome is not None}
        self.removed = {self.removal(trial.values) for trial in before if trial.outcome is not None}
        self.model = Model(self.space, before)
        self.costs = {values: outcome.cost for values, outcome in self.known.items()}
        """Of what was tried, with what is chance taken out; infinite where it was not measured."""
        self.costs.update({key(trial.values): self.model.smoothed(trial) for trial in self.model.known})
        self.ranking = sorted(ranking, key=self.cost)
        self.best = self.ranking[0] if self.ranking else None
        self.least = self.cost(self.best) if self.best is not None else math.inf
        self.teaching = Teaching(self.space, before, self.most or 0.1)

    def step_by_step(self, values: Values) -> dict[str, int]:
        """The choice; or what should be tried before it: what is removed untaught, which takes seconds; taught for less, where
        longer learning goes on, both in whatever precision; with rounding that was not taught."""
        plain = self.space.canonical({**values, **dict.fromkeys(rounding(self.space), 0)})
        for rounds in range(values.get(LEARN, 0)):
            less = self.space.canonical({**plain, LEARN: rounds})
            if self.removal(less) not in self.removed:
                return less
        return plain if values.get(LEARN, 0) and key(plain) not in self.known else dict(values)

    def removal(self, values: Values) -> tuple[int | None, ...]:
        """What is removed, where, and how long the rest is taught."""
        removals = (name for one in self.space.removals for name in (one.step.name, one.how))
        return tuple(values.get(name) for name in (BACKEND, ORDER, LEARN, *removals))

    def elsewhere(self, values: Values) -> bool:
        """Whether an alternative on another backend may be worth it: by its plan's measurements there, else by what it brings
        here."""
        foreseen = self.estimate(values)
        return self.worth(values, ELSEWHERE) if foreseen is None else foreseen < FORESEEN * self.least

    def worth(self, values: Values, times: float = PROMISING) -> bool:
        """Whether a choice may be cheaper than so many `times` the least and lose little enough, going by what was tried."""
        expected = self.model.predict(values)
        if expected is None or self._cost(values, expected) >= times * self.least:
            return expected is None
        # Of what was never tried nobody knows what it wins back.
        return expected.new or self.loses(values) <= SLACK or self._should_be_tried(values)

    def promise(self, values: Values) -> tuple[bool, float]:
        """What sorts proposals: those that are expected to lose little enough first, the cheapest of them first."""
        expected = self.model.predict(values)
        return self.loses(values) > 1.0, 0.0 if expected is None else self._cost(values, expected)

    def loses(self, values: Values) -> float:
        """The drop, as a share of what may be lost; of what may be taught, once it was."""
        rounds, left = values.get(LEARN, 0), 1.0
        if self.space.mending is not None and self.space.removes(values):
            if not rounds:
                left = self.teaching.left(len(ROUNDS))
            elif key(values) not in self.known:
                # What was not taught yet loses what is left of what it loses untaught.
                values, left = self.space.untaught(values), self.teaching.left(rounds)
        expected = self.model.predict(values)
        drop = None if expected is None else expected.drop
        return 0.0 if drop is None or self.most is None else left * drop / self.most

    def cost(self, trial: Trial) -> float:
        """Of a trial, with what is chance taken out; infinite where it was not measured."""
        return self.costs[key(trial.values)]

    def far(self, trial: Trial) -> bool:
        """Whether a trial lost so much too much that taking more away is hopeless."""
        if trial.outcome is None or "accuracy" not in trial.outcome.missed:
            return False
        untaught = (
            not trial.values.get(LEARN, 0) and self.space.mending is not None and self.space.removes(trial.values)
        )
        drop = trial.outcome.drop if trial.outcome.drop_low is None else trial.outcome.drop_low
        if untaught and drop is not None and self.most is not None:
            return drop * self.teaching.left(len(ROUNDS)) > (1 + NEAR) * self.most
        return trial.outcome.missed["accuracy"] > NEAR

    def _should_be_tried(self, values: Values) -> bool:
        """Whether it is the first to be taught: what teaching wins back was only guessed so far."""
        return bool(values.get(LEARN, 0)) and not any(trial.values.get(LEARN, 0) for trial in self.before)

    def _cost(self, values: Values, expected: Prediction) -> float:
        untaught = self.costs.get(key(self.space.untaught(values)))
        if untaught is not None and math.isfinite(untaught) and values.get(LEARN, 0):
            # Values of weights cost no time.
            return untaught
        estimate = self.estimate(values) if expected.new else None
        return expected.cost if estimate is None else estimate


def key(values: Values) -> tuple[Any, ...]:
    """Of a choice: the same for the same."""
    return tuple(sorted(values.items()))


def same_graph(one: Outcome, other: Outcome | None) -> bool:
    """Whether both came to the same program."""
    return other is not None and one.digest is not None and one.digest == other.digest


def cost(trial: Trial | None) -> float:
    """As it was measured; infinite where there is none."""
    return trial.outcome.cost if trial is not None and trial.outcome is not None else math.inf


def rounding(space: Space) -> list[str]:
    """The decision whether rounding is taught, where there is one."""
    return [space.tuning.name] if space.tuning is not None else []
