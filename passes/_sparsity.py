"""Zeros in the weights of products: which weights go, by magnitude, Wanda or SparseGPT, and what becomes of those that stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from perwatt import calibration
from perwatt.artifact import Artifact, Step
from perwatt.contract import Capabilities, Context, Pass
from perwatt.data import Samples
from perwatt.errors import PassError
from perwatt.fusion import Builder, names_in
from perwatt.kernels import gptq, n_of_m, sparse_gpt
from perwatt.kernels.sparse_gpt import Pattern
from perwatt.passes import _weight_quantizers as matrices
from perwatt.passes._naming import matching, with_names
from perwatt.passes._sparse_layers import Layer, count, layers, put_weights
from perwatt.patterns import rank, stored

Algorithm = Literal["magnitude", "wanda", "sparsegpt"]
Scope = Literal["row", "layer", "all"]
BY = {"magnitude": "by magnitude", "wanda": "by Wanda", "sparsegpt": "by SparseGPT"}


@dataclass(frozen=True)
class Plan:
    """What goes, by which algorithm. `per`: among which weights a ratio chooses."""

    algorithm: Algorithm
    pattern: Pattern
    per: Scope = "row"
    damping: float = 0.01

    @property
    def called(self) -> str:
        """`2:4` or `unstructured`, as `Capabilities.sparse_patterns` has it."""
        return f"{self.pattern.n}:{self.pattern.m}" if self.pattern.m else "unstructured"


# What would pay -------------------------------------------------------------------------------------------------------


def unrewarded(capabilities: Capabilities, wanted: str) -> str | None:
    """Why zeros of this pattern wouldn't pay on a backend; None where they do."""
    would = f"{wanted} sparsity would not pay (anyway: true does it all the same)"
    patterns = capabilities.sparse_patterns if capabilities.sparse_types else ()
    if wanted in patterns:
        return None
    if patterns:
        return f"this backend gains from {', '.join(patterns)} zeros alone: {would}"
    return f"this backend runs zeros as fast as anything else: {would}"


# Pruning --------------------------------------------------------------------------------------------------------------


def run(
    made_by: Pass, artifact: Artifact, plan: Plan, exclude: tuple[str, ...], subset_size: int, context: Context
) -> tuple[Artifact, list[str]]:
    """What a pass with this plan makes of a model, and what was changed, in words."""
    named = with_names(artifact, made_by.step([]))
    model = named.edit()
    left_out = set(matching(exclude, model.graph))
    found, refused = layers(model.graph, plan.pattern.m, left_out)
    left = [f"{times} left: {reason}" for reason, times in refused.most_common()]
    if not found:
        return artifact, ["nothing was found that can have zeros", *left]
    made = _Pruning(named, found, plan, subset_size, context)
    if not put_weights(model, found, made.weights):
        return artifact, [f"the weights have {plan.called} zeros already", *left]
    changes = [*_words(found, made, plan), *left]
    return artifact.after(model, made_by.step(changes)), changes


class _Pruning:
    """Weights of layers as they come out: `weights`, by the layer's name, and `notes` to tell besides. Raises PassError without
    samples where the plan needs some, BackendError where the model can't be run on them."""

    def __init__(
        self, artifact: Artifact, found: Sequence[Layer], plan: Plan, subset_size: int, context: Context
    ) -> None:
        self.artifact, self.plan, self.context = artifact, plan, context
        self.notes: Counter[str] = Counter()
        self.weights: dict[str, Any] = {}
        self.samples: Samples | None = None
        if plan.algorithm != "magnitude" and found:
            samples = context.samples("calibrate")
            if not len(samples):
                raise PassError("there are no samples to see activations on", fix="algorithm: magnitude needs none")
            self.samples = calibration.some(artifact, samples, subset_size, context.seed)
        rest = list(found)
        if plan.algorithm == "sparsegpt":
            rest = self._by_moments([layer for layer in found if layer.has_moments])
            kernels = [layer for layer in found if not layer.has_moments]
            self.notes["by Wanda: SparseGPT is for matrix products and 1 × 1 convolutions"] += count(kernels)
            rest += kernels
        self._by_scores(rest)

    def _by_moments(self, found: Sequence[Layer]) -> list[Layer]:
        """SparseGPT; layers that it can't do come back."""
        assert self.samples is not None
        seen, refused, done = _with_twins(self.artifact, found), [], 0
        for several in matrices.rounds(found):
            self.context.progress(f"pruning: {done} of {len(found)} weights")
            widths = {inputs: group[0].weight.shape[1] for inputs, group in several.items()}
            moments = matrices.second_moments(seen, widths, self.samples, self.context)
            for inputs, of_inputs in several.items():
                group = [layer for layer in of_inputs if isinstance(layer, Layer)]
                done += len(group)
                try:
                    factor = gptq.factorize(moments.pop(inputs), damping=self.plan.damping)
                except ValueError:
                    self.notes["by Wanda: their inputs are no good to SparseGPT"] += count(group)
                    refused += group
                    continue
                for layer in group:
                    self.weights[layer.name] = sparse_gpt.compute_columns(layer.weight, factor, self.plan.pattern)
        return refused

    def _by_scores(self, found: Sequence[Layer]) -> None:
        """By magnitude or Wanda: what stays is as it was."""
        norms = {} if self.plan.algorithm == "magnitude" or not found else self._norms(found)
        pattern, scores = self.plan.pattern, {}
        for layer in found:
            score = np.abs(layer.weight)
            if layer.name in norms:
                score *= np.tile(norms[layer.name], layer.weight.shape[1] // len(norms[layer.name]))
            if pattern.m:
                self.weights[layer.name] = n_of_m.compute_pruned(layer.weight, score, pattern.n, pattern.m)
            else:
                scores[layer.name] = score
        if scores and pattern.ratio is not None:
            chosen = lowest(list(scores.values()), pattern.ratio, self.plan.per)
            for layer, goes in zip(found, chosen, strict=True):
                self.weights[layer.name] = np.where(goes, np.float32(0), layer.weight)

    def _norms(self, found: Sequence[Layer]) -> dict[str, Any]:
        """√(mean x²) of each layer's input channels, float32, by the layer's name; where they are known."""
        assert self.samples is not None
        seen, places = _with_squares(self.artifact, found)
        self.context.progress(f"pruning: sizes of the channels that {len(found)} weights read")
        means = calibration.calibrate(seen, {}, self.samples, self.context, channels=dict(places.values())).means
        norms = {}
        for layer in found:
            squares = sum(np.asarray(means[places[each][0]]) for each in _data(layer))
            channels = stored(layer.value).shape[1] if layer.convolves else layer.weight.shape[1]
            if np.shape(squares) == (channels,) and np.isfinite(squares).all():
                norms[layer.name] = np.sqrt(squares).astype(np.float32)
            else:
                self.notes["by magnitude: what their inputs look like can't be told"] += len(layer.nodes)
        return norms


def lowest(scores: Sequence[Any], ratio: float, per: Scope) -> list[Any]:
    """Which weights have the lowest scores [out, in], as booleans: of each row, of each layer or of all together the nearest
    whole number to ratio × weights, of equal ones at the limit the first."""
    if per == "row":
        return [np.stack([_lowest(row, ratio) for row in each]) for each in scores]
    if per == "layer":
        return [_lowest(each.reshape(-1), ratio).reshape(each.shape) for each in scores]
    together = _lowest(np.concatenate([each.reshape(-1) for each in scores]), ratio)
    ends = np.cumsum([each.size for each in scores])[:-1]
    return [part.reshape(each.shape) for part, each in zip(np.split(together, ends), scores, strict=True)]


def _lowest(scores: Any, ratio: float) -> Any:
    count = round(ratio * scores.size)
    if not count:
        return np.zeros(scores.shape, bool)
    limit = np.partition(scores, count - 1)[count - 1]
    goes = scores <= limit
    if spare := int(np.count_nonzero(goes)) - count:
        goes[np.flatnonzero(scores == limit)[-spare:]] = False
    return goes


# What inputs look like ------------------------------------------------------------------------------------------------


def _data(layer: Layer) -> list[tuple[str, int | None]]:
    """(name, axis of the channels) of what the products read, each once; None: the last one."""
    if layer.convolves:
        return list(dict.fromkeys((node.inputs[0].name, 1) for node in layer.nodes))
    return [(each.name, 0 if each.turned else None) for each in layer.inputs]


def _with_squares(
    artifact: Artifact, found: Sequence[Layer]
) -> tuple[Artifact, dict[tuple[str, int | None], tuple[str, int]]]:
    """The model with the squares of all that the layers read, and by (name, axis) their names and axes there."""
    model = artifact.edit()
    graph, taken = model.graph, names_in(model)
    values = _values(graph)
    places: dict[tuple[str, int | None], tuple[str, int]] = {}
    for name, axis in dict.fromkeys(each for layer in found for each in _data(layer)):
        value = values[name]
        build = Builder(graph, value.producer() or graph[0], taken)
        square = build.op("Mul", value, value)
        square.shape = value.shape
        _put_behind(graph, value, build)
        places[name, axis] = square.name, (rank(value) or 1) - 1 if axis is None else axis
    return artifact.after(model, Step("instrument")), places


def _with_twins(artifact: Artifact, found: Sequence[Layer]) -> Artifact:
    """The model with what 1 × 1 convolutions read once more, channels last; the layers learn its name."""
    model = artifact.edit()
    graph, taken = model.graph, names_in(model)
    values, twins = _values(graph), {}
    for layer in found:
        for node in layer.nodes if layer.convolves else ():
            value = values[node.inputs[0].name]
            if value.name in twins:
                continue
            axes = stored(layer.value).ndim
            build = Builder(graph, value.producer() or graph[0], taken)
            twins[value.name] = build.op("Transpose", value, perm=[0, *range(2, axes), 1]).name
            _put_behind(graph, value, build)
    for layer in found:
        layer.twins = twins
    return artifact.after(model, Step("instrument"))


def _values(graph: Any) -> dict[str, Any]:
    return {value.name: value for value in (*graph.inputs, *(v for node in graph for v in node.outputs))}


def _put_behind(graph: Any, value: Any, build: Builder) -> None:
    if value.producer() is None:
        graph.insert_before(graph[0], build.nodes)
    else:
        graph.insert_after(value.producer(), build.nodes)


def _words(found: Sequence[Layer], made: _Pruning, plan: Plan) -> Iterator[str]:
    """What was done, for the ledger."""
    total = sum(layer.weight.size for layer in found)
    zeros = sum(int(np.count_nonzero(made.weights[layer.name] == 0)) for layer in found)
    data = "" if made.samples is None else f" on {len(made.samples)} samples"
    which = f"{plan.called} zeros in the weights of {count(found)} products"
    yield f"{which}, {BY[plan.algorithm]}{data}: {zeros / total:.1%} of them"
    yield from (f"{times} {note}" for note, times in made.notes.most_common() if times)
