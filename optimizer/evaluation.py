"""What accuracy is judged on: samples, a metric, and what the original in float32 makes of them.

Where samples are scored one by one they may also be judged portion by portion, in an order that is drawn once: portions are
saved when they are first needed, for all candidates alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from perwatt import metrics
from perwatt.data import Samples
from perwatt.errors import InputError
from perwatt.signature import Array, Batch, rows

FIRST_PORTION = 32
"""Samples that are looked at first; what is seen grows by half with every further portion, in whole multiples of this."""
ORDER_SEED = 1


@dataclass
class Evaluation:
    """Samples to judge on, and what the float32 original makes of them. `whole_calls`: the model has no batch axis, so the
    rows of a call are not samples that could be taken apart."""

    metric: metrics.Metric
    samples: Samples
    folder: Path
    reference: list[Batch]
    original: metrics.Score
    whole_calls: bool = False

    def compare(self, outputs: Sequence[Batch]) -> metrics.Comparison:
        """The original in float32 against `outputs`, sample by sample."""
        return metrics.compare(self.metric, self.original, self.score(outputs))

    def score(self, outputs: Sequence[Batch]) -> metrics.Score:
        """Accuracy of `outputs`."""
        return self.metric.score(outputs, self.samples, self.reference)

    # Portion by portion ---------------------------------------------------------------------------------------------------

    @cached_property
    def loss_range(self) -> tuple[float, float] | None:
        """The least and the most that one sample can lose (see `losses`); the most may be infinite. None where samples can't
        be judged one by one."""
        scores, limits = self.original.per_sample, self.metric.sample_range(self.reference)
        if limits is None or scores is None or not self._row_by_row() or not np.isfinite(scores).all():
            return None
        if self.metric.higher_is_better:
            return float(scores.min()) - limits[1], float(scores.max()) - limits[0]
        return limits[0] - float(scores.max()), limits[1] - float(scores.min())

    @cached_property
    def order(self) -> Array:
        """The places of all samples, int64 [N], in random order."""
        return np.random.default_rng(ORDER_SEED).permutation(len(self.samples))

    @cached_property
    def portions(self) -> list[slice]:
        """Which stretches of `order` are judged one after the other."""
        ends, end = [0], FIRST_PORTION
        while end + FIRST_PORTION <= len(self.samples):
            ends.append(end)
            end = math.ceil(1.5 * end / FIRST_PORTION) * FIRST_PORTION
        ends.append(len(self.samples))
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]

    def portion_folder(self, portion: slice) -> Path:
        """The samples of a portion as the worker reads them; saved once."""
        folder = self.folder.with_name(f"{self.folder.name}-portions") / f"{portion.start}-{portion.stop}"
        # Written last: where it is missing, saving was stopped on the way.
        if not (folder / "index.json").exists():
            self.samples.subset(self.order[portion]).save(folder)
        return folder

    def portion_scores(self, portion: slice, outputs: Sequence[Batch]) -> Array:
        """The score of each sample of a portion, in its order, from what a candidate made of `portion_folder`."""
        places = self.order[portion]
        samples = Samples.load(self.portion_folder(portion))
        scores = self.metric.score(outputs, samples, Samples(self.reference).subset(places).chunks).per_sample
        assert scores is not None
        return np.asarray(scores[np.searchsorted(np.sort(places), places)])

    def losses(self, scores: Array) -> Array:
        """By how much a candidate with these `scores` of the first samples in `order` is worse on each of them."""
        assert self.original.per_sample is not None
        sign = 1.0 if self.metric.higher_is_better else -1.0
        return np.asarray(sign * (self.original.per_sample[self.order[: len(scores)]] - scores))

    def compare_scores(self, scores: Array) -> metrics.Comparison:
        """The original against a candidate with these `scores` of the first samples in `order`."""
        assert self.original.per_sample is not None
        places = self.order[: len(scores)]
        stored = np.argsort(places)
        original = metrics.mean_score(self.original.per_sample[places[stored]])
        return metrics.compare(self.metric, original, metrics.mean_score(scores[stored]))

    def calls(self, size: int) -> tuple[int, int]:
        """How many calls of `size` items of one shape it takes to judge all samples at once, and portion by portion."""
        shapes = np.repeat(np.arange(len(self.samples.chunks)), [rows(chunk) for chunk in self.samples.chunks])

        def count(places: Array) -> int:
            return int((-(-np.bincount(shapes[places]) // size)).sum())

        return count(self.order), sum(count(self.order[portion]) for portion in self.portions)

    def _row_by_row(self) -> bool:
        """Whether every input and output has a row for each sample."""
        calls = [*self.samples.chunks, *self.reference]
        lengths = [{len(array) if np.ndim(array) else -1 for array in call.values()} for call in calls]
        if self.whole_calls or any(len(found) != 1 for found in lengths):
            return False
        return len(self.samples) == self.original.n == sum(rows(batch) for batch in self.reference)


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
