"""Whether the mean of a whole finite set keeps a limit, told from as few of its values as it takes.

The values come in random order. Suppose that all N of them sum up to t. After i − 1 of them, whose sum is S, the next one is
expected to be μ = (t − S) / (N − i + 1), so whoever puts a share c of his money on more than that has, on average,
neither more nor less afterwards if he gets 1 − c + c · (x − low) / (μ − low) times what he had. Whatever the values are,
such a gambler multiplies his money by 20 at any time with a probability of 1/20 at most (Ville's inequality); where it
happens, t is refuted, and every smaller total with it. That holds at whatever moment one looks, and however often: the test
may stop as soon as the answer is clear. For the other side the values are mirrored.

The best share depends on what is not known, so the money is divided among shares from 1 to 1/1024, most of it on the large
ones: they are the best where the answer is clear early. Who bets it all (c = 1) where nothing changes has the exact
hypergeometric test. Besides, the values not seen yet lie within bounds, so the sum of all is certain at some point.

Sources: I. Waudby-Smith and A. Ramdas, "Estimating means of bounded random variables by betting", Journal of the Royal
Statistical Society B 86, 2024, 1-27 (without replacement too); the same, "Confidence sequences for sampling without
replacement", NeurIPS 2020.

Limits: the order must be random and independent of the values. Where one order serves many sets of values and the next set
is chosen by what earlier ones showed, those chosen look better on the first of them than they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Answer = Literal["below", "above"]

SHARES = 0.5 ** np.arange(11)
MONEY = (np.arange(11) + 2.0) ** -2 / ((np.arange(11) + 2.0) ** -2).sum()
"""What is put on each of `SHARES`, and how the money is divided among them."""
FINENESS = 2**16
"""Into how many parts the range of an interval's bound is divided, where values may be anything."""


class Sequential:
    """Tells whether the mean of `population` values is `limit` at most, from the first of them in a random order.

    All values lie within `low` and `high`, either of which may be infinite: then nothing is told early for that side.
    `step`: values, `low` and `high` are multiples of it (0: they may be anything). With a probability of `error` at most
    the answer is ever wrong; once all values are seen it is exact."""

    def __init__(
        self,
        population: int,
        limit: float,
        low: float = -1.0,
        high: float = 1.0,
        error: float = 0.05,
        step: float = 0.0,
    ) -> None:
        self.population, self.low, self.high, self.error, self.step = population, low, high, error, step
        # A rounding error must not cost a whole step.
        self.most = math.floor(population * limit / step + 1e-9) * step if step else population * limit
        """The highest total within the limit."""
        self.seen: Floats = np.zeros(0)
        self.answer: Answer | None = None

    def update(self, values: Sequence[float] | Floats) -> Answer | None:
        """The answer after these values too: the mean of all is within the limit, above it, or nobody knows yet.

        Raises ValueError for values out of bounds or more of them than there are."""
        added = np.asarray(values, dtype=np.float64)
        if not ((added >= self.low) & (added <= self.high)).all():
            raise ValueError(f"values must lie within {self.low:g} and {self.high:g}")
        if len(self.seen) + len(added) > self.population:
            raise ValueError(f"{len(self.seen) + len(added)} values of {self.population}")
        self.seen = np.concatenate([self.seen, added])
        self.answer = self._certain() or self.answer or self._won()
        return self.answer

    def interval(self) -> tuple[float, float]:
        """The least and the most that the mean of all may be. Each bound alone is wrong, ever, with a probability of
        `error` at most."""
        if len(self.seen) == self.population:
            mean = float(self.seen.sum()) / self.population
            return mean, mean
        least, most = self.low, self.high
        if math.isfinite(self.low):
            least += self._bound(self.seen - self.low) / self.population
        if math.isfinite(self.high):
            most -= self._bound(self.high - self.seen) / self.population
        return least, max(least, most)

    def _certain(self) -> Answer | None:
        """What is sure, whatever the values that are left."""
        total, left = float(self.seen.sum()), self.population - len(self.seen)
        if total + (left * self.high if left else 0.0) <= self.most:
            return "below"
        return "above" if total + (left * self.low if left else 0.0) > self.most else None

    def _won(self) -> Answer | None:
        """What the bets say: the side that was the first to win."""
        above = self._wins(self.seen - self.low, self.most - self.population * self.low)
        below = self._wins(self.high - self.seen, self.population * self.high - self.most - self.step)
        if above == below:
            return None
        return "above" if above < below else "below"

    def _wins(self, excess: Floats, total: float) -> float:
        """After how many values the bets on more than `total` have won; infinite where they have not."""
        if not math.isfinite(total):
            return math.inf
        won = capital(excess, total, self.population) >= 1 / self.error
        return float(won.argmax()) if won.any() else math.inf

    def _bound(self, excess: Floats) -> float:
        """The least total of values from 0 on that is not refuted."""
        sure = float(excess.sum())
        # Of this total no value is more than its share, so nobody could have won anything.
        open_to = self.population * float(excess.max(initial=0.0))
        unit = self.step or (open_to - sure) / FINENESS
        if not (math.isfinite(open_to) and unit > 0):
            return sure
        first = _first(lambda k: math.isinf(self._wins(excess, sure + k * unit)), math.ceil((open_to - sure) / unit))
        # Without steps the bound lies between the last total that is refuted and the first that is not.
        return sure + unit * (first if self.step else max(first - 1, 0))


def capital(excess: Floats, total: float, population: int) -> Floats:
    """What one has after each of the values, from 0 on, who began with 1 and bet that all of the `population` sum up to more
    than `total`, which no sum of the given ones exceeds."""
    before = np.cumsum(excess) - excess
    expected = np.maximum(total - before, 0.0) / (population - np.arange(len(excess)))
    # Where nothing is expected any more, nothing can be bet.
    gains = np.divide(excess, expected, out=np.ones_like(excess), where=expected > 0)
    # Beyond the largest number one has won already.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(MONEY @ np.cumprod(1 - SHARES[:, None] + SHARES[:, None] * gains, axis=1))


def _first(holds: Callable[[int], bool], most: int) -> int:
    """The first whole number from 0 on for which `holds`; it does for all that follow, and for `most`."""
    low, high = -1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
