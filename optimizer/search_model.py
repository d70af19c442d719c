"""What a choice will cost, from those that were tried: the logarithm of the cost as a sum over decisions.

Removing a tenth of the blocks takes about the same share of the cost whatever the precision is, and the other way round; that is
all that the model knows. It is good enough to leave out what has no chance of being cheaper than the best, and is asked for
nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from perwatt.choices import Space, Values
from perwatt.search_log import Trial
from perwatt.signature import Array

RIDGE = 1e-3
"""Of what was never tried, or only together with something else, as little as possible is believed."""


class CostModel:
    """Fitted to trials; `cost` is ÷ the original's."""

    def __init__(self, space: Space, trials: Sequence[Trial]) -> None:
        self.space = space
        known = [(t.values, t.outcome.cost) for t in trials if t.outcome is not None and math.isfinite(t.outcome.cost)]
        self.fitted = bool(known)
        if not known:
            return
        features = np.stack([self._features(values) for values, _ in known])
        logs = np.log([max(cost, 1e-9) for _, cost in known])
        normal = features.T @ features + RIDGE * np.eye(features.shape[1])
        self._weights: Array = np.linalg.solve(normal, features.T @ logs)

    def cost(self, values: Values) -> float | None:
        """The cost of a choice; None where nothing was tried yet."""
        return float(math.exp(float(self._features(values) @ self._weights))) if self.fitted else None

    def _features(self, values: Values) -> Array:
        """1, and for each decision where it stands: how far for an ordered one, which value for the others."""
        found = [1.0]
        for decision in self.space.decisions:
            index = values[decision.name]
            if decision.kind == "ordered":
                found.append(float(index))
            else:
                found += [float(index == other) for other in range(1, len(decision.values))]
        return np.array(found)
