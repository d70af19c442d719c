"""`Judge`: whether a program may be shipped, whatever its speed: accuracy and latency against the budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from weakref import WeakKeyDictionary

import numpy as np

from perwatt import metrics
from perwatt.bench.sequential import Sequential
from perwatt.bench.statistics import percentile
from perwatt.evaluation import Evaluation
from perwatt.measurement import Ratio
from perwatt.recipe import Budget
from perwatt.sides import Side
from perwatt.signature import Array, Batch
from perwatt.worker import load_outputs

ROUNDING = 1e-9
"""Half a sample of a billion: what rounding leaves of a difference that is exactly the budget."""
MOST_CALLS = 1.5
"""Portions may take this many times the calls that all samples at once take: a backend that fixes its batch fills up calls,
and samples of many shapes leave little in each."""


@dataclass
class Judge:
    """Judges by the samples of `select` while choosing, by those of `evaluation` at the end; None where there are none.
    `max_drop` is in points for accuracies, in metric units otherwise."""

    budget: Budget
    max_drop: float
    select: Evaluation | None
    evaluation: Evaluation | None
    folder: Path
    _scores: WeakKeyDictionary[Side, Array] = field(default_factory=WeakKeyDictionary, init=False, repr=False)
    """Of the first samples in the order of `select`, for sides that were judged portion by portion."""

    def drop_on_select(self, side: Side) -> metrics.Comparison | None:
        """What `side` loses against the original in float32, on the samples to choose by. Those that `quick_drop` ran it on
        already are not run again."""
        if self.select is None:
            return None
        if side in self._scores:
            return self._in_portions(side, self.select, until_clear=False)
        return self.select.compare(self._outputs(side, self.select.folder))

    def quick_drop(self, side: Side) -> tuple[metrics.Comparison, bool] | None:
        """What `side` loses on as many of the samples to choose by as it takes to be clear whether that is too much, and
        whether these were all. At whatever moment it stops, `too_much` says of this what it would say of all of them, but
        for a probability of 5 %. The samples come in one random order for all sides, so what is wrong for one is often wrong
        for others like it, and a search that goes by what was found on the first samples favours what happens to do well
        there: what it chooses is to be judged on all of them, which `drop_on_select` goes on to.

        All samples are seen where they are not scored one by one, and where portions would take many more calls."""
        if self.select is None:
            return None
        if not self._divisible(side, self.select):
            return self.select.compare(self._outputs(side, self.select.folder)), True
        comparison = self._in_portions(side, self.select, until_clear=True)
        return comparison, comparison.n == len(self.select.samples)

    @property
    def allowed(self) -> float:
        """What may be lost, as something to take shares of: a tenth of a point where that is nothing."""
        fraction = self.evaluation is None or self.evaluation.metric.unit == "fraction"
        return max(self.max_drop, 0.1) if fraction else self.max_drop or 1e-3

    def drop_on_all(self, side: Side) -> tuple[metrics.Comparison, metrics.Score]:
        """What `side` loses on all evaluation samples, and its own score."""
        assert self.evaluation is not None
        score = self.evaluation.score(self._outputs(side, self.evaluation.folder))
        return metrics.compare(self.evaluation.metric, self.evaluation.original, score), score

    def _outputs(self, side: Side, samples: Path) -> list[Batch]:
        with TemporaryDirectory(prefix="outputs-", dir=self.folder) as folder:
            out = Path(folder) / "out"
            side.worker.call("predict", samples=str(samples), out=str(out))
            return load_outputs(out)

    def _divisible(self, side: Side, select: Evaluation) -> bool:
        if select.loss_range is None:
            return False
        whole, portions = select.calls(side.facts.get("operating_point", {}).get("batch") or 1)
        return portions <= MOST_CALLS * whole

    def _in_portions(self, side: Side, select: Evaluation, until_clear: bool) -> metrics.Comparison:
        """What `side` loses on the samples that it was run on before and the portions that are left; with `until_clear` no
        more of them than it takes."""
        scores = self._scores.get(side, np.zeros(0))
        test = self._test(select)
        test.update(select.losses(scores))
        for portion in select.portions:
            if portion.start < len(scores):
                continue
            if until_clear and self._clear(test, select, scores):
                break
            outputs = self._outputs(side, select.portion_folder(portion))
            scores = np.concatenate([scores, select.portion_scores(portion, outputs)])
            self._scores[side] = scores
            test.update(select.losses(scores)[portion])
        return select.compare_scores(scores)

    def _test(self, select: Evaluation) -> Sequential:
        assert select.loss_range is not None
        fraction = select.metric.unit == "fraction"
        limit = (self.max_drop + ROUNDING) / (100 if fraction else 1)
        return Sequential(len(select.samples), limit, *select.loss_range, step=1.0 if fraction else 0.0)

    def _clear(self, test: Sequential, select: Evaluation, scores: Array) -> bool:
        # What was clear on the way must still be so in the figures that are handed on.
        return test.answer is not None and self.too_much(select.compare_scores(scores)) == (test.answer == "above")

    def too_much(self, comparison: metrics.Comparison, *, final: bool = False) -> bool:
        """Whether this drop is more than the budget allows."""
        # The bound is asked of what is to be shipped, on all samples: on the few of screening it would reject everything.
        worst = comparison.high if final and self.budget.prove_accuracy else comparison.drop
        return worst > self.max_drop + ROUNDING

    def drop_words(self, comparison: metrics.Comparison) -> str:
        """How much was lost of how much allowed."""
        judged_by = self.evaluation or self.select
        unit = " points" if judged_by is not None and judged_by.metric.unit == "fraction" else ""
        bound = f", {comparison.high:.2f} at the bound," if self.budget.prove_accuracy else ""
        return f"loses {comparison.drop:.2f}{unit}{bound} of {self.max_drop:g} allowed (n = {comparison.n})"

    def hopeless(self, cost: Ratio) -> bool:
        """Whether the interval of this cost, to the original's, already excludes the least gain."""
        return cost.low is not None and cost.low > 1 / (1 + self.budget.min_gain)

    def too_late(self, p99_ms: float | None) -> bool:
        """Whether this p99 latency misses the budget."""
        return self.budget.p99_ms is not None and p99_ms is not None and p99_ms > self.budget.p99_ms

    def too_big(self, memory_bytes: int | None) -> bool:
        """Whether a program that holds this much misses the budget."""
        return self.budget.memory is not None and memory_bytes is not None and memory_bytes > self.budget.memory

    def big_words(self, memory_bytes: int | None) -> str:
        """How much it holds of how much allowed."""
        return (
            f"takes {(memory_bytes or 0) / 1e6:.0f} MB of memory, {(self.budget.memory or 0) / 1e6:.0f} MB are allowed"
        )

    def late_words(self, p99_ms: float | None) -> str:
        """By how much it misses it."""
        over = (p99_ms or 0.0) - (self.budget.p99_ms or 0.0)
        return f"p99 latency is {p99_ms:.2f} ms, {over:.2f} ms over the {self.budget.p99_ms:g} ms allowed"


def p99_ms(side: Side) -> float | None:
    """The p99 latency of a side over all its windows, in ms."""
    return percentile([latency for window in side.windows for latency in window.latencies_ms], 0.99)
