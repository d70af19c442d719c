"""What accuracy is judged on: samples, a metric, and what the original in float32 makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perwatt import metrics
from perwatt.data import Samples
from perwatt.errors import InputError
from perwatt.signature import Batch


@dataclass
class Evaluation:
    """Samples to judge on, and what the float32 original makes of them."""

    metric: metrics.Metric
    samples: Samples
    folder: Path
    reference: list[Batch]
    original: metrics.Score

    def compare(self, outputs: Sequence[Batch]) -> metrics.Comparison:
        """The original in float32 against `outputs`, sample by sample."""
        return metrics.compare(self.metric, self.original, self.score(outputs))

    def score(self, outputs: Sequence[Batch]) -> metrics.Score:
        """Accuracy of `outputs`."""
        return self.metric.score(outputs, self.samples, self.reference)


def check_original(evaluation: Evaluation, expect_percent: float | None) -> None:
    """Stop where the original's own accuracy says that the data don't fit the model. Raises InputError."""
    value = evaluation.original.value
    if expect_percent is not None and evaluation.metric.unit == "fraction" and value * 100 < expect_percent - 0.05:
        raise InputError(
            f"the original scores {value:.2%} on your labels, {expect_percent:g} % was expected",
            fix="check normalisation, class order and the data set",
        )
    chance = metrics.near_chance(evaluation.metric, evaluation.original, evaluation.samples)
    if chance and expect_percent is None:
        raise InputError(f"the original {chance}")
