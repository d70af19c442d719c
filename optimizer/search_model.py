"""What a choice will cost and lose, going by those that were tried.

The logarithm of the cost and the drop in accuracy are sums over decisions, as far as all trials tell; a choice is predicted from
the trial that differs least from it, by what the decisions that differ make on average. So what was tried is predicted as it came
out, and its neighbours nearly so. Good enough to put proposals in order and to leave out what has no chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from perwatt.choices import Space, Values
from perwatt.search_log import Outcome, Trial
from perwatt.signature import Array

RIDGE = 1e-3
"""Of what was never tried, or only together with something else, as little as possible is believed."""


@dataclass(frozen=True)
class Prediction:
    """`cost` ÷ the original's; `drop` None where no trial has one. `new`: it differs from all trials in what was never tried."""

    cost: float
    drop: float | None
    new: bool


class Model:
    """Fitted to the trials that were measured."""

    def __init__(self, space: Space, trials: Sequence[Trial]) -> None:
        self.space = space
        self.known = [t for t in trials if t.outcome is not None and math.isfinite(t.outcome.cost)]
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
        cost = outcome.cost * math.exp(float(step @ self._cost))
        drop = None if outcome.drop is None or self._drop is None else outcome.drop + float(step @ self._drop)
        new = bool(np.any((ours != 0) & ~np.any(self._features != 0, axis=0)))
        return Prediction(cost, drop, new)

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
