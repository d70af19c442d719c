"""`Judge`: whether a program may be shipped, whatever its speed: accuracy and latency against the budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perwatt import metrics
from perwatt.bench.statistics import percentile
from perwatt.evaluation import Evaluation
from perwatt.measurement import Ratio
from perwatt.recipe import Budget
from perwatt.sides import Side
from perwatt.worker import load_outputs


@dataclass
class Judge:
    """Judges by the samples of `select` while choosing, by those of `evaluation` at the end; None where there are none.
    `max_drop` is in points for accuracies, in metric units otherwise."""

    budget: Budget
    max_drop: float
    select: Evaluation | None
    evaluation: Evaluation | None
    folder: Path

    def drop_on_select(self, side: Side) -> metrics.Comparison | None:
        """What `side` loses against the original in float32, on the samples to choose by."""
        if self.select is None:
            return None
        return self.select.compare(load_outputs(self._outputs(side, self.select)))

    def drop_on_all(self, side: Side) -> tuple[metrics.Comparison, metrics.Score]:
        """What `side` loses on all evaluation samples, and its own score."""
        assert self.evaluation is not None
        score = self.evaluation.score(load_outputs(self._outputs(side, self.evaluation)))
        return metrics.compare(self.evaluation.metric, self.evaluation.original, score), score

    def _outputs(self, side: Side, evaluation: Evaluation) -> Path:
        out = self.folder / f"outputs-{len(list(self.folder.iterdir()))}"
        side.worker.call("predict", samples=str(evaluation.folder), out=str(out))
        return out

    def too_much(self, comparison: metrics.Comparison, *, final: bool = False) -> bool:
        """Whether this drop is more than the budget allows."""
        # The bound is asked of what is to be shipped, on all samples: on the few of screening it would reject everything.
        worst = comparison.high if final and self.budget.prove_accuracy else comparison.drop
        # Half a sample of a billion: what rounding leaves of a difference that is exactly the budget.
        return worst > self.max_drop + 1e-9

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
