"""Accuracy metrics, the paired comparison of two models on the same samples, and the check against chance.

Outputs are lists of {name: array} batches in the order in which the samples iterate, cut anywhere. Fractions are kept
as fractions; drops of fractions are in points. Every drop is positive when the optimized model is worse.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from perwatt.data import Samples
from perwatt.datasets_callable import explained, is_callable_spec, load_callable
from perwatt.errors import InputError, nearest
from perwatt.metrics_paired import binomial_tail, t_quantile, tango_interval
from perwatt.metrics_rows import aligned
from perwatt.signature import Array, Batch

CHANCE_NEEDS = 30
"""Below this many labelled samples nothing is said about chance."""


@dataclass(frozen=True)
class Score:
    """`value`: a fraction for accuracies, metric units otherwise. `per_sample`: float64 [n], 0 or 1 for accuracies,
    each sample's own value otherwise; None where a metric has no such thing."""

    value: float
    per_sample: Array | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """Original against optimized on the same samples. `drop`, `low`, `high` (95 % paired interval): points for
    fractions, metric units otherwise; positive is worse. Infinite bounds: the metric has no value for each sample.
    `flips_lost` went from right to wrong, `flips_gained` from wrong to right (None unless the metric is a fraction)."""

    drop: float
    low: float
    high: float
    flips_lost: int | None
    flips_gained: int | None
    n: int


class Metric(ABC):
    """How good outputs are. `default_max_drop`: points for fractions, metric units otherwise; None: 1 % of the
    original's value."""

    name: str
    higher_is_better: bool = True
    unit: Literal["fraction", "metric"] = "fraction"
    default_max_drop: float | None = 1.0

    @abstractmethod
    def score(self, outputs: Sequence[Batch], samples: Samples, reference: Sequence[Batch] | None) -> Score:
        """The score of `outputs`; `reference` is what the original gave (None: these are the original's own).
        Raises InputError where outputs or labels don't suit the metric."""

    def sample_range(self, reference: Sequence[Batch]) -> tuple[float, float] | None:
        """The least and the most that one sample can score, for a model that gave `reference`; None where samples are not
        scored each by itself, or nothing is known of it."""
        return None


class TopK(Metric):
    """The label is among the k highest class scores. NaN counts as wrong."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.name = f"top{k}"

    def score(self, outputs: Sequence[Batch], samples: Samples, reference: Sequence[Batch] | None) -> Score:
        labels = _class_labels(samples, self.name)
        name = class_output(outputs)
        if name is None:
            return _scored(self._without_scores(outputs, labels))
        scores = np.concatenate([_class_scores(batch[name]) for batch in outputs])
        _same_count(scores, labels)
        _labels_in_range(labels, scores.shape[1])
        own = scores[np.arange(len(labels)), labels]
        broken = np.isnan(scores).any(axis=1)
        # Ties go to the lower class number, as argmax does it.
        classes = np.arange(scores.shape[1])
        above = (scores > own[:, None]) | ((scores == own[:, None]) & (classes < labels[:, None]))
        return _scored((above.sum(axis=1) < self.k) & ~broken)

    def sample_range(self, reference: Sequence[Batch]) -> tuple[float, float] | None:
        # Whether single numbers are probabilities is seen from all of them together.
        return None if class_output(reference) is None else (0.0, 1.0)

    def _without_scores(self, outputs: Sequence[Batch], labels: Array) -> Array:
        """One number an item: a yes or no score for labels 0 and 1, or the class number itself."""
        for name in outputs[0] if outputs else ():
            found = [np.asarray(batch[name]) for batch in outputs]
            if any(a.ndim == 0 or a.size != len(a) for a in found):
                continue
            flat = np.concatenate([a.reshape(-1) for a in found])
            _same_count(flat, labels)
            if flat.dtype.kind in "biu":
                return np.asarray(flat.astype(np.int64) == labels)
            _labels_in_range(labels, 2)
            values = flat.astype(np.float64)
            probabilities = bool(((values >= 0) & (values <= 1)).all())
            said_yes = values > (0.5 if probabilities else 0.0)
            return np.asarray((said_yes == (labels == 1)) & ~np.isnan(values))
        shapes = {name: list(np.shape(array)) for name, array in outputs[0].items()} if outputs else {}
        raise InputError(f"{self.name} needs class scores [N, C], the outputs are {shapes}", fix="choose --metric")


class Agreement(Metric):
    """The highest class score is the same class as the original's. NaN counts as wrong."""

    name = "agreement"

    def score(self, outputs: Sequence[Batch], samples: Samples, reference: Sequence[Batch] | None) -> Score:
        name = class_output(outputs if reference is None else reference)
        if name is None:
            raise InputError("agreement needs class scores [N, classes]", fix="use --metric cosine")
        agreed = []
        for mine, theirs in aligned(outputs, reference, len(samples)):
            ours, original = _class_scores(mine[name]), _class_scores(theirs[name])
            agreed.append((ours.argmax(axis=1) == original.argmax(axis=1)) & ~np.isnan(ours).any(axis=1))
        return _scored(np.concatenate(agreed) if agreed else np.zeros(0))

    def sample_range(self, reference: Sequence[Batch]) -> tuple[float, float] | None:
        return 0.0, 1.0


class Cosine(Metric):
    """Cosine similarity of each sample's outputs to the original's (to float labels, where there are some), averaged
    over the float outputs and the samples. Two zero vectors are alike; NaN scores 0."""

    name = "cosine"
    unit = "metric"
    default_max_drop = 0.01

    def score(self, outputs: Sequence[Batch], samples: Samples, reference: Sequence[Batch] | None) -> Score:
        return mean_score(_per_sample(outputs, samples, reference, _cosine, self.name))

    def sample_range(self, reference: Sequence[Batch]) -> tuple[float, float] | None:
        return -1.0, 1.0


class MeanSquaredError(Metric):
    """Mean squared difference from float labels, else from the original's float outputs. NaN scores infinity."""

    name = "mse"
    higher_is_better = False
    unit = "metric"
    default_max_drop = None

    def score(self, outputs: Sequence[Batch], samples: Samples, reference: Sequence[Batch] | None) -> Score:
        return mean_score(_per_sample(outputs, samples, reference, _squared_error, self.name))

    def sample_range(self, reference: Sequence[Batch]) -> tuple[float, float] | None:
        return 0.0, math.inf


class Custom(Metric):
    """`file.py:callable`: callable({output: array [N, …]}, labels) gives a number or one number a sample; higher is
    better. Outputs whose items differ in shape come as a list of N arrays."""

    unit = "metric"
    default_max_drop = None

    def __init__(self, text: str) -> None:
        self.name = text
        self.function = load_callable(text)

    def score(self, outputs: Sequence[Batch], samples: Samples, reference: Sequence[Batch] | None) -> Score:
        joined = {name: _joined([batch[name] for batch in outputs]) for name in outputs[0]}
        with explained(f"the metric {self.name} failed"):
            result = np.asarray(self.function(joined, samples.labels), dtype=np.float64)
        if result.ndim == 0:
            return Score(float(result), None, len(samples))
        if result.shape != (len(samples),):
            raise InputError(f"the metric {self.name} gave {list(result.shape)} numbers for {len(samples)} samples")
        return mean_score(result)


_METRICS: dict[str, Callable[[], Metric]] = {
    "top1": lambda: TopK(1),
    "top5": lambda: TopK(5),
    "mse": MeanSquaredError,
    "cosine": Cosine,
    "agreement": Agreement,
}


def resolve(name: str | None, samples: Samples | None, outputs: Sequence[Batch] | None) -> Metric:
    """The metric that `name` means; None: top1 for class labels, mse for other labels, agreement without labels.

    `outputs` are the original's: where they aren't class scores, agreement is cosine. Raises InputError."""
    if name is not None and is_callable_spec(name):
        return Custom(name)
    if name is not None and name not in _METRICS:
        raise InputError(f"{nearest(name, _METRICS, 'metric')}, or file.py:callable")
    chosen = name or _usual(samples, outputs)
    if chosen == "agreement" and outputs and class_output(outputs, sure=True) is None:
        chosen = "cosine"
    return _METRICS[chosen]()


def _usual(samples: Samples | None, outputs: Sequence[Batch] | None) -> str:
    labels = None if samples is None else samples.labels
    if labels is None:
        return "agreement"
    if labels.dtype.kind == "f":
        return "mse"
    if outputs and class_output(outputs) is None and labels.size and labels.max() > 1:
        floats = [a for a in outputs[0].values() if _is_float(a)]
        if floats and floats[0].ndim and floats[0].size == len(floats[0]):
            return "mse"  # one number an item and labels beyond yes and no: whole-numbered targets
    return "top1"


def compare(metric: Metric, original: Score, optimized: Score) -> Comparison:
    """Paired comparison on the same samples in the same order. The interval of a fraction is Tango's score interval
    (Statistics in Medicine 17, 1998, 891-908), which holds with no flips at all; of other metrics the paired t."""
    if original.n != optimized.n:
        raise ValueError(f"scores of {original.n} and {optimized.n} samples can't be compared")
    sign = 1.0 if metric.higher_is_better else -1.0
    before, after, n = original.per_sample, optimized.per_sample, original.n
    drop = sign * (original.value - optimized.value)
    if metric.unit == "fraction" and before is not None and after is not None:
        lost = int(((before > 0.5) & (after < 0.5)).sum())
        gained = int(((before < 0.5) & (after > 0.5)).sum())
        low, high = tango_interval(lost, gained, n)
        return Comparison(100 * drop, 100 * low, 100 * high, lost, gained, n)
    if before is None or after is None or n < 2:
        return Comparison(drop, -math.inf, math.inf, None, None, n)
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        return Comparison(math.inf if math.isnan(drop) else drop, -math.inf, math.inf, None, None, n)
    differences = sign * (before - after)
    half = t_quantile(n - 1) * float(differences.std(ddof=1)) / math.sqrt(n)
    return Comparison(drop, drop - half, drop + half, None, None, n)


def near_chance(metric: Metric, score: Score, samples: Samples) -> str | None:
    """Why the original's top-1 looks like no better than chance, else None (always below 30 samples).

    Chance is the largest class's share, by a one-sided binomial test at 1 %. A model that is no better than that but
    tells the classes apart (mean recall clearly above 1 / classes) passes: lopsided classes do that."""
    labels = samples.labels
    if metric.name != "top1" or score.per_sample is None or labels is None or score.n < CHANCE_NEEDS:
        return None
    classes, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        return None
    share = float(counts.max()) / score.n
    if binomial_tail(int(score.per_sample.sum()), score.n, share) < 0.01:
        return None
    recalls = np.bincount(which, weights=score.per_sample) / counts
    error = math.sqrt(float((recalls * (1 - recalls) / counts).sum())) / len(classes)
    if recalls.mean() - 1 / len(classes) > 2.33 * error + 1e-9:
        return None
    return (
        f"scores {100 * score.value:.0f} % on your labels ({score.n} samples; always guessing the commonest of "
        f"{len(classes)} classes gives {100 * share:.0f} %): check normalisation or class order"
    )


def class_output(outputs: Sequence[Batch], *, sure: bool = False) -> str | None:
    """The output that holds class scores, float [N, C] with C ≥ 2: the first output, else the only one of that form.

    With `sure` it must be the only one, and must not look like an embedding (rows of length 1, or a [N, …, C] beside
    it)."""
    if not outputs:
        return None
    scores = {name: _class_scores(array) for name, array in outputs[0].items() if _is_float(array)}
    scores = {name: s for name, s in scores.items() if s.ndim == 2 and s.shape[1] > 1}
    scores = {n: s for n, s in scores.items() if all(_class_scores(b[n]).shape[1:] == s.shape[1:] for b in outputs)}
    if not sure:
        first = next(iter(outputs[0]))
        return first if first in scores else next(iter(scores)) if len(scores) == 1 else None
    if len(scores) != 1:
        return None
    ((name, values),) = scores.items()
    lengths = np.linalg.norm(values, axis=1)
    if np.abs(lengths - 1).max(initial=0) < 1e-3 and (values < 0).any():
        return None
    beside = [a for n, a in outputs[0].items() if n != name and _is_float(a) and np.ndim(a) > 2]
    return None if any(a.shape[-1] == values.shape[1] for a in beside) else name


def _class_scores(array: Array) -> Array:
    """float [N, C], from [N, C] or [N, C, 1, 1]."""
    array = np.asarray(array)
    while array.ndim > 2 and array.shape[-1] == 1:
        array = array[..., 0]
    return array.astype(np.float32, copy=False)


def _is_float(array: Array) -> bool:
    dtype = np.asarray(array).dtype
    return dtype.kind == "f" or (dtype.kind == "V" and "float" in dtype.name)


def _class_labels(samples: Samples, name: str) -> Array:
    if samples.labels is None:
        raise InputError(f"--metric {name} needs labels, the data has none", fix="add labels or use agreement")
    if samples.labels.dtype.kind != "i" or samples.labels.ndim != 1:
        raise InputError(f"--metric {name} needs class numbers as labels, these are {samples.labels.dtype} targets")
    return samples.labels


def _labels_in_range(labels: Array, classes: int) -> None:
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        have = f"labels go from {labels.min()} to {labels.max()}"
        raise InputError(f"{have}, the model has {classes} classes (0 to {classes - 1})", fix="check the labels")


def _same_count(outputs: Array, labels: Array) -> None:
    if len(outputs) != len(labels):
        raise InputError(f"the model gave {len(outputs)} results for {len(labels)} labels")


def _scored(right: Array) -> Score:
    return mean_score(right.astype(np.float64))


def mean_score(per_sample: Array) -> Score:
    """The score of samples that each have one, [n]: their mean."""
    values = per_sample.astype(np.float64)
    return Score(float(values.mean()) if len(values) else math.nan, values, len(values))


def _joined(arrays: Sequence[Array]) -> Array | list[Array]:
    if len({array.shape[1:] for array in arrays}) == 1 and arrays[0].ndim:
        return np.concatenate(arrays)
    return [item for array in arrays for item in (array if array.ndim else [array])]


def _per_sample(
    outputs: Sequence[Batch], samples: Samples, reference: Sequence[Batch] | None,
    measure: Callable[[Array, Array], Array], name: str,
) -> Array:  # fmt: skip
    """`measure` on float64 [n, …] rows, ours and wanted, averaged over the float outputs; float64 [N]."""
    labels = samples.labels
    if labels is not None and (labels.dtype.kind == "f" or name == "mse"):
        return measure(*_against_labels(outputs, labels, name))
    found = []
    for mine, theirs in aligned(outputs, reference, len(samples)):
        names = [n for n, array in theirs.items() if _is_float(array)]
        if not names:
            raise InputError(f"--metric {name} needs float outputs, the model has none")
        found.append(np.mean([measure(_rows(mine[n]), _rows(theirs[n])) for n in names], axis=0))
    return np.concatenate(found) if found else np.zeros(0)


def _against_labels(outputs: Sequence[Batch], labels: Array, name: str) -> tuple[Array, Array]:
    for output in outputs[0]:
        found = [np.asarray(batch[output]) for batch in outputs]
        if all(_is_float(a) and a.ndim and a.size // max(len(a), 1) == labels[0].size for a in found):
            ours = np.concatenate([_rows(a) for a in found])
            _same_count(ours, labels)
            return ours, _rows(labels)
    shapes = {n: list(a.shape) for n, a in outputs[0].items()}
    raise InputError(
        f"--metric {name} needs an output of the labels' shape {list(labels.shape)}, the outputs are {shapes}",
        fix="save class labels as whole numbers",
    )


def _rows(array: Array) -> Array:
    return np.asarray(array).astype(np.float64).reshape(len(array), -1)


def _cosine(ours: Array, wanted: Array) -> Array:
    same = (ours == wanted) | (np.isnan(ours) & np.isnan(wanted))
    both = same & ~np.isfinite(wanted)
    ours, wanted = np.where(both, 0.0, ours), np.where(both, 0.0, wanted)
    broken = np.asarray(~np.isfinite(np.concatenate([ours, wanted], axis=1)).all(axis=1))
    ours, wanted = np.where(broken[:, None], 0.0, ours), np.where(broken[:, None], 0.0, wanted)
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(wanted, axis=1)
    zeros = ~ours.any(axis=1) & ~wanted.any(axis=1)
    similar = (ours * wanted).sum(axis=1) / np.where(lengths > 0, lengths, 1.0)
    return np.where(broken, 0.0, np.where(zeros, 1.0, np.clip(similar, -1.0, 1.0)))


def _squared_error(ours: Array, wanted: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        squared = np.where(ours == wanted, 0.0, (ours - wanted) ** 2)
    return np.asarray(np.nan_to_num(squared.mean(axis=1), nan=np.inf, posinf=np.inf))
