"""What a choice will cost and lose, going by those that were tried.

The logarithm of the cost and the drop in accuracy are sums over decisions, as far as all trials tell; a choice is predicted from
the trial that differs least from it, by what the decisions that differ make on average. So what was tried is predicted as it came
out, and its neighbours nearly so. Good enough to put proposals in order and to leave out what has no chance.

What teaching wins back is a share of what was lost without, found from choices that were tried both ways (`Teaching`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from perwatt.choices import LEARN, Space, Values
from perwatt.search_log import Outcome, Trial
from perwatt.signature import Array

CHANCE = 0.05
"""By which share the cost of a graph differs from one short measurement to the next, beside others on a shared machine."""
RIDGE = 1e-3
"""Of what was never tried, or only together with something else, as little as possible is believed."""


USUALLY_LEFT, LONGER_LEFT = 0.1, 0.75
"""Of what a choice loses untaught, what it still loses when it was taught as long as is usual; of that, when taught for longer.
What is taken to be so where nothing is known, and counts as one observation where something is."""
LEAST_LEFT = 0.01
WORTH_A_LOOK = 0.5
"""Of what may be lost: a choice that loses less than this share of it tells nothing of teaching."""


@dataclass(frozen=True)
class Prediction:
    """`cost` ÷ the original's; `drop` None where no trial has one. `new`: it differs from all trials in what was never tried."""

    cost: float
    drop: float | None
    new: bool


class Model:
    """Fitted to the trials that were measured, and that are what they say."""

    def __init__(self, space: Space, trials: Sequence[Trial]) -> None:
        self.space = space
        self.known = [
            t for t in trials if t.outcome is not None and math.isfinite(t.outcome.cost) and not t.outcome.partly
        ]
        self._features = np.stack([self._of(t.values) for t in self.known]) if self.known else np.zeros((0, 1))
        self._cost = self._fitted(lambda outcome: math.log(max(outcome.cost, 1e-9)))
        self._drop = self._fitted(lambda outcome: outcome.drop)

    def predict(self, values: Values) -> Prediction | None:
        """None where nothing was measured yet."""
        if not self.known:
            return None
        ours = self._of(values)
        apart = np.abs(self._features - ours).sum(axis=1)
        nearest = int(apart.argmin())
        outcome, step = self.known[nearest].outcome, ours - self._features[nearest]
        assert outcome is not None and self._cost is not None
        cost = self.smoothed(self.known[nearest]) * math.exp(float(step @ self._cost))
        drop = None if outcome.drop is None or self._drop is None else outcome.drop + float(step @ self._drop)
        new = bool(np.any((ours != 0) & ~np.any(self._features != 0, axis=0)))
        return Prediction(cost, drop, new)

    def smoothed(self, trial: Trial) -> float:
        """The cost of a trial that it was fitted to; as much of its distance from the sum as measurements of the same graph are
        apart is taken for chance."""
        assert trial.outcome is not None and self._cost is not None
        summed = float(self._of(trial.values) @ self._cost)
        apart = math.log(max(trial.outcome.cost, 1e-9)) - summed
        return math.exp(summed + math.copysign(max(0.0, abs(apart) - CHANCE), apart))

    def _fitted(self, figure: Callable[[Outcome], float | None]) -> Array | None:
        told = [(i, value) for i, t in enumerate(self.known) if t.outcome and (value := figure(t.outcome)) is not None]
        if not told:
            return None
        features = self._features[[i for i, _ in told]]
        normal = features.T @ features + RIDGE * np.eye(features.shape[1])
        found: Array = np.linalg.solve(normal, features.T @ np.array([value for _, value in told]))
        return found

    def _of(self, values: Values) -> Array:
        """1, and for each decision where it stands: how far for an ordered one, which value for the others."""
        found = [1.0]
        for decision in self.space.decisions:
            index = values[decision.name]
            if decision.kind == "ordered":
                found.append(float(index))
            else:
                found += [float(index == other) for other in range(1, len(decision.values))]
        return np.array(found)


class Teaching:
    """What is left of a drop once a choice was taught. `most`: the drop that may be, in its unit."""

    def __init__(self, space: Space, trials: Sequence[Trial], most: float) -> None:
        drops = {tuple(sorted(t.values.items())): t.outcome.drop for t in trials if t.outcome is not None}
        left: dict[int, list[float]] = {}
        for trial in trials:
            taught = trial.outcome.drop if trial.outcome is not None else None
            rounds = trial.values.get(LEARN, 0)
            untaught = drops.get(tuple(sorted(space.untaught(trial.values).items()))) if rounds else None
            if taught is not None and untaught is not None and untaught > WORTH_A_LOOK * most:
                left.setdefault(rounds, []).append(min(1.0, max(LEAST_LEFT, taught / untaught)))
        self._left = [1.0]
        for rounds in range(1, max([2, *left]) + 1):
            before = USUALLY_LEFT if rounds == 1 else LONGER_LEFT * self._left[-1]
            several = [before, *left.get(rounds, [])]
            self._left.append(math.exp(sum(map(math.log, several)) / len(several)))

    def left(self, rounds: int) -> float:
        """The share of a drop that is left after so many rounds of learning; 1 after none."""
        return self._left[min(rounds, len(self._left) - 1)]
