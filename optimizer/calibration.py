"""Calibration: what values inside a model look like on samples, found out by one instrumented graph.

The graph is the model with reductions put in for every value looked at, and nothing else as output: minimum, maximum and an
even selection of the values themselves. It is compiled once and run on batches; what comes out is a few kilobytes a batch
whatever the size of the values, and goes into histograms whose memory doesn't depend on the number of samples. It stops
before the samples are used up where ranges have converged: they are looked at whenever the number of samples has doubled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from perwatt.artifact import Artifact, Step
from perwatt.contract import Context
from perwatt.data import Samples
from perwatt.fusion import Builder, names_in, remove_unused
from perwatt.kernels import clip_search, histogram
from perwatt.patterns import dims, rank
from perwatt.signature import Batch, inferences, rows, split

Method = Literal["minmax", "percentile", "mse", "entropy"]

SELECTED = 4096
"""Values of a tensor that one item gives to its histogram, about."""
BINS = 2048
BATCH = 8
FIRST_LOOK = 16
"""Samples after which ranges are looked at for the first time."""
CONVERGED, CONVERGED_AT_WORST = 0.05, 0.2
"""How far ranges may have moved since half as many samples, relative to their width: the median of them, and any."""
BEYOND = 1e-4
"""The share of the values beyond either end that `percentile` leaves outside."""
AXES_AS_INPUT = 18
"""The opset since which the axes of a mean are an input."""
LAST = np.iinfo(np.int64).max
STEPS = (5, 11, 23, 47, 97, 193, 389, 769, 1543, 3079, 6151, 12289, 24593, 49157)
"""Steps for values whose size shows only when they are there: primes, which hardly any axis is a multiple of."""
PREFIX = "calibration/"
"""What names of the outputs begin with, so that they are none of the model's own."""
MADE_UP = "warning: chosen on made-up samples, which say nothing of what matters in real ones (--data)"
"""What lossy passes tell where there is no data."""


@dataclass(frozen=True)
class Wanted:
    """What a value's range is for: a symmetric type or not; `unsigned`: one of its own where the value is never negative."""

    symmetric: bool = True
    unsigned: bool = True


@dataclass(frozen=True)
class Calibrated:
    """Low and high of each value, means and largest magnitudes by channel, and how many samples it took. Both ends are NaN
    where a value was not always finite (infinities are found wherever they are, NaN among the values selected): no range
    holds it. `converged`: no more would have changed much. `by`: the ranges by another method, from what was seen."""

    ranges: dict[str, tuple[float, float]]
    means: dict[str, Any]
    peaks: dict[str, Any]
    samples: int
    converged: bool
    by: Callable[[Method], dict[str, tuple[float, float]]]


class _Seen:
    """Extremes and a histogram of one value."""

    def __init__(self) -> None:
        self.low, self.high, self.selected = math.inf, -math.inf, histogram.empty(BINS)
        self.finite = True

    def add(self, low: Any, high: Any, some: Any) -> None:
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        histogram.compute(self.selected, some)
        lost = self.selected.nan.any() or self.selected.infinite.any()
        self.finite = bool(self.finite and np.isfinite(low) and np.isfinite(high) and not lost)


def calibrate(
    artifact: Artifact,
    wanted: Mapping[str, Wanted],
    samples: Samples,
    context: Context,
    method: Method = "mse",
    channels: Mapping[str, int] | None = None,
) -> Calibrated:
    """Ranges of the values named by `wanted`, and means and peaks of those named by `channels` along that axis, on samples
    in random order until ranges have converged.

    Raises BackendError where the model can't be run."""
    names, averaged = list(wanted), dict(channels or {})
    seen = {name: _Seen() for name in names}
    sums: dict[str, Any] = dict.fromkeys(averaged, 0.0)
    peaks: dict[str, Any] = dict.fromkeys(averaged, 0.0)
    found: dict[str, tuple[float, float]] = {}
    done, look, converged = 0, FIRST_LOOK, False
    batches = in_random_order(calls(artifact, samples), context.seed)
    whole = Samples(batches, batch_size=max(map(rows, batches), default=1))
    looked = context.execute(instrumented(artifact, names, averaged), whole, (), True, True)
    for given, outputs in zip(batches, looked, strict=False):
        batch = {name.removeprefix(PREFIX): array for name, array in outputs.items()}
        items = inferences(artifact.signature, given)
        for number, name in enumerate(names):
            seen[name].add(*(batch[f"{part}_{number}"] for part in ("low", "high", "some")))
        for number, name in enumerate(averaged):
            sums[name] = sums[name] + items * batch[f"mean_{number}"].astype(np.float64)
            peaks[name] = np.maximum(peaks[name], batch[f"peak_{number}"])
        done += items
        if done >= look:
            before, found = found, _chosen(seen, wanted, method)
            if before and (converged := _settled(before, found)):
                break
            look = 2 * done
    means = {name: total / done for name, total in sums.items()}
    chosen = found if converged else _chosen(seen, wanted, method)
    # The last call of a fixed size was filled up.
    used = done if artifact.signature.batch is None else min(done, len(samples))
    return Calibrated(chosen, means, peaks, used, converged, lambda other: _chosen(seen, wanted, other))


def calls(artifact: Artifact, samples: Samples, size: int = BATCH) -> list[Batch]:
    """Calls of `size` items of one shape; of as many as the model takes, where that is fixed."""
    batch = artifact.signature.batch
    if batch is None:
        return list(samples)
    if isinstance(batch, int):
        return [piece for chunk in samples.batches(batch) for piece, _ in split(chunk, batch)]
    return list(samples.batches(size))


def some(artifact: Artifact, samples: Samples, count: int, seed: int) -> Samples:
    """At most `count` items, drawn at random; all where the model has no batch axis, and an item is no row."""
    return samples if artifact.signature.batch is None else samples.take(count, seed)


def in_random_order(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """The batches shuffled: stored samples are sorted by shape, and the first ones look unlike the rest."""
    return [batches[place] for place in np.random.default_rng(seed).permutation(len(batches))]


def instrumented(artifact: Artifact, names: Sequence[str], averaged: Mapping[str, int]) -> Artifact:
    """The model that gives `low_i`, `high_i` (numbers) and `some_i` (a vector) of the i-th value in `names`, `mean_i` and
    `peak_i` by channel of the i-th in `averaged`, each behind PREFIX, and nothing else. Of a value whose rank nobody knows
    there is one mean and one peak."""
    model = artifact.edit()
    graph, taken = model.graph, names_in(model)
    values = {value.name: value for value in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    outputs = []
    for number, name in enumerate(names):
        outputs += _looked_at(graph, values[name], number, taken)
    for number, (name, axis) in enumerate(averaged.items()):
        outputs += _by_channel(graph, values[name], axis, number, taken)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    remove_unused(model)
    return artifact.after(model, Step("instrument"))


def _looked_at(graph: Any, value: Any, number: int, taken: set[str]) -> list[Any]:
    """Extremes of a value and some of it."""
    build = Builder(graph, value.producer() or graph[0], taken)
    flat = build.op("Reshape", value, build.constant(np.array([-1], np.int64), "flat"))
    ends = (("first", 0), ("last", LAST), ("axis", 0))
    span = [build.constant(np.array([n], np.int64), word) for word, n in ends]
    made = {
        # Of the value as it lies, which needn't be copied for that.
        "low": build.op("ReduceMin", value, keepdims=0),
        "high": build.op("ReduceMax", value, keepdims=0),
        "some": build.op("Slice", flat, *span, _step(value, build)),
    }
    for word, output in made.items():
        output.name = f"{PREFIX}{word}_{number}"
    _put_behind(graph, value, build)
    return list(made.values())


def _by_channel(graph: Any, value: Any, axis: int, number: int, taken: set[str]) -> list[Any]:
    """Means and largest magnitudes of a value along one axis: over all others."""
    build = Builder(graph, value.producer() or graph[0], taken)
    others = [place for place in range(rank(value) or 0) if place != axis % (rank(value) or 1)]

    def reduced(kind: str, given: Any) -> Any:
        if not others and rank(value) is not None:
            return build.op("Identity", given)
        if graph.opset_imports.get("", 0) >= AXES_AS_INPUT:
            return build.op(kind, given, build.constant(np.array(others, np.int64), "others"), keepdims=0)
        return build.op(kind, given, axes=others, keepdims=0)

    made = {"mean": reduced("ReduceMean", value), "peak": reduced("ReduceMax", build.op("Abs", value))}
    for word, output in made.items():
        output.name = f"{PREFIX}{word}_{number}"
    _put_behind(graph, value, build)
    return list(made.values())


def _put_behind(graph: Any, value: Any, build: Builder) -> None:
    """Right behind the value, so that it needn't be kept for longer than the model needs it."""
    if value.producer() is None:
        graph.insert_before(graph[0], build.nodes)
    else:
        graph.insert_after(value.producer(), build.nodes)


def _step(value: Any, build: Builder) -> Any:
    """Which of the values in a row are selected: every so many-th, no multiple of an axis, so that all channels and places
    have their turn. Calculated where axes other than the first, which counts items, are not known beforehand."""
    known = dims(value)
    if known is not None and all(isinstance(length, int) for length in known[1:]):
        lengths = [length for length in known if isinstance(length, int)]
        return build.constant(np.array([_coprime_step(lengths)], np.int64), "step")
    steps = np.array(STEPS, np.int64)
    small = build.op("Less", build.op("Size", value), build.constant(steps * SELECTED * BATCH, "sizes"))
    fitting = build.op("Where", small, build.constant(np.ones(1, np.int64), "all"), build.constant(steps, "steps"))
    return build.op("ReduceMax", fitting, keepdims=1)


def _coprime_step(lengths: Sequence[int]) -> int:
    step = max(1, math.prod(lengths) // SELECTED)
    while step > 1 and any(math.gcd(step, length) > 1 for length in lengths if length > 1):
        step += 1
    return step


def _chosen(seen: Mapping[str, _Seen], wanted: Mapping[str, Wanted], method: Method) -> dict[str, tuple[float, float]]:
    """The range of each value by that method, never beyond its extremes; NaN where it was not always finite."""
    found = {name: (its.low, its.high) if its.finite else (math.nan, math.nan) for name, its in seen.items()}
    if method == "minmax":
        return found
    kinds: dict[str, list[str]] = {}
    for name, its in seen.items():
        if its.finite:
            kinds.setdefault(_kind(its, wanted[name], method), []).append(name)
    for kind, names in kinds.items():
        counts = np.concatenate([seen[name].selected.counts for name in names])
        high = np.concatenate([seen[name].selected.limits for name in names])
        low = np.zeros_like(high) if kind == "positive" else -high
        counts = counts[:, counts.shape[1] // 2 :] if kind == "positive" else counts
        for name, bottom, top in zip(names, *_search(counts, low, high, kind == "symmetric", method), strict=True):
            low_end, high_end = np.clip((bottom, top), seen[name].low, seen[name].high)
            found[name] = float(low_end), float(high_end)
    return found


def _kind(its: _Seen, how: Wanted, method: Method) -> str:
    """What range is looked for: `positive` ones begin at zero. The entropy of one around zero is always taken symmetric."""
    if its.low >= 0 and (how.unsigned or not how.symmetric):
        return "positive"
    return "symmetric" if how.symmetric or method == "entropy" else "around-zero"


def _search(counts: Any, low: Any, high: Any, symmetric: bool, method: Method) -> tuple[Any, Any]:
    levels = 255 if symmetric else 256
    if method in ("mse", "entropy"):
        search = clip_search.compute_mse if method == "mse" else clip_search.compute_entropy
        counts = _without_zeros(counts, symmetric) if method == "entropy" else counts
        found = search(counts, low, high, levels, symmetric=symmetric)
        return found.low, found.high
    below = np.cumsum(counts, axis=1) / counts.sum(axis=1, keepdims=True)
    width = (high - low) / counts.shape[1]
    return low + width * (below < BEYOND).sum(axis=1), low + width * ((below < 1 - BEYOND).sum(axis=1) + 1)


def _without_zeros(counts: Any, symmetric: bool) -> Any:
    """Counts with no more values around zero than in the bins beside them. What ReLU cuts off is represented exactly, and as
    one bin that holds half of all values it would make the divergence blind to everything else."""
    fewer, middle = counts.copy(), counts.shape[1] // 2
    if symmetric:
        fewer[:, middle - 1] = np.minimum(counts[:, middle - 1], counts[:, middle - 2])
        fewer[:, middle] = np.minimum(counts[:, middle], counts[:, middle + 1])
    else:
        fewer[:, 0] = np.minimum(counts[:, 0], counts[:, 1])
    # Where there is nothing else, they are all that there is to see.
    return np.where(fewer.any(axis=1, keepdims=True), fewer, counts)


def _settled(before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]) -> bool:
    """Whether ranges hardly moved, relative to their width, zero included."""
    moved = [
        max(abs(a - b) for a, b in zip(before[name], (low, high), strict=True))
        / (max(high, 0.0) - min(low, 0.0) or 1.0)
        for name, (low, high) in after.items()
        if math.isfinite(low)
    ]
    return not moved or (float(np.median(moved)) <= CONVERGED and max(moved) <= CONVERGED_AT_WORST)
