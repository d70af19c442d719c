"""Our quantizer: which products, which ranges, how much smoothing; where that is left open, what moves outputs least.

Nothing is known beforehand of which ranges suit a model: clipping outliers wins a convolutional net three decimals and costs a
transformer everything. So each choice is made and run on a few calibration samples, and the one whose outputs lie nearest to
the float ones is taken. Statistics are collected once for all ways to choose ranges, and once more for smoothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from perwatt import calibration
from perwatt.artifact import Artifact, Step
from perwatt.contract import Capabilities, Context, QuantizationStyle
from perwatt.data import Samples
from perwatt.fusion import Builder, names_in, remove_unused
from perwatt.passes._placement import JOINING, place, products
from perwatt.passes._quantizing import correct_biases, put_pairs, rounded_weight, scale_for
from perwatt.passes._smoothing import smooth
from perwatt.passes._weights import Product
from perwatt.patterns import given, is_stored
from perwatt.signature import Batch

Ranges = Literal["auto", "minmax", "percentile", "mse", "entropy"]
METHODS: tuple[calibration.Method, ...] = ("mse", "minmax")
STRENGTHS = (0.0, 0.85)
SMOOTHED_ON = 64
"""Samples on which the peaks of channels are looked for."""
COMPARED_ON = 16
"""Samples on which choices are compared."""


@dataclass(frozen=True)
class Wish:
    """What is to be quantized and how. `excluded`: names of nodes that stay; `operators`: that calculate in integers beside
    products; `strength`: of smoothing, None where it is open."""

    style: QuantizationStyle
    excluded: Collection[str] = ()
    operators: Collection[str] = ()
    ranges: Ranges = "auto"
    strength: float | None = None
    bias_correction: bool = True
    subset_size: int = 300


@dataclass(frozen=True)
class Quantized:
    """The quantized model and how it came about. `error`: how far outputs moved, relative to their size, where choices
    were compared. `base`: the model before pairs were put in, `seen` and `means` what was calibrated on it."""

    artifact: Artifact
    samples: int
    converged: bool
    ranges: str
    strength: float
    error: float | None
    base: Artifact
    seen: dict[str, tuple[float, float]]
    means: dict[str, Any]

    def only(self, wish: Wish, names: Collection[str]) -> Artifact:
        """The same with these products alone, by their nodes' names; `wish` is what this was made from."""
        others = {product.node.name for product in products(self.base.model.graph)} - set(names)
        return _put(self.base, replace(wish, excluded={*wish.excluded, *others}), self.seen, self.means)

    def words(self) -> str:
        """`on 64 samples, when ranges had converged (mse, smoothed by 0.85)`."""
        how = [self.ranges, *([f"smoothed by {self.strength:g}"] if self.strength else [])]
        when = ", when ranges had converged" if self.converged else ""
        return f"on {self.samples} samples{when} ({', '.join(how)})"


def quantize(artifact: Artifact, context: Context, wish: Wish) -> Quantized | None:
    """The model as `wish` wants it; None where there is nothing to quantize."""
    artifact = with_types(artifact)
    if not _chosen(artifact, wish):
        return None
    samples = calibration.some(artifact, context.samples("calibrate"), wish.subset_size, context.seed)
    smoothed = any(product.kind == "MatMul" and is_stored(product.weight) for product in _chosen(artifact, wish))
    strengths = [wish.strength] if wish.strength is not None else list(STRENGTHS) if smoothed else [0.0]
    methods = list(METHODS) if wish.ranges == "auto" else [wish.ranges]
    found: list[Quantized] = []
    for strength in strengths:
        found += _by_each(artifact, context, wish, samples, strength, methods)
    if len(found) == 1:
        return found[0]
    few = calibration.some(artifact, samples, COMPARED_ON, context.seed + 1)
    compared = Samples(calibration.calls(artifact, few), batch_size=few.batch_size)
    wanted = list(context.execute(artifact, compared, (), True))
    errors = [output_error(wanted, list(context.execute(one.artifact, compared, (), True))) for one in found]
    best = int(np.argmin(errors))
    return replace(found[best], error=errors[best])


def _by_each(
    artifact: Artifact, context: Context, wish: Wish, samples: Samples, strength: float, methods: Sequence[Any]
) -> list[Quantized]:
    """The model quantized with ranges by each of the methods, from one collection of statistics."""
    base = _smoothed(artifact, context, wish, samples, strength)
    style = wish.style
    placement = place(base.model.graph, _chosen(base, wish), wish.operators, wish.excluded)
    kind = calibration.Wanted(style.activation_symmetric, style.unsigned_activations)
    inputs = channels_of(placement.weights) if wish.bias_correction else {}
    seen = calibration.calibrate(base, dict.fromkeys(placement.sites, kind), samples, context, methods[0], inputs)
    found = []
    for method in methods:
        ranges = seen.ranges if method == methods[0] else seen.by(method)
        made = _put(base, wish, ranges, seen.means)
        found.append(Quantized(made, seen.samples, seen.converged, method, strength, None, base, ranges, seen.means))
    return found


def _put(base: Artifact, wish: Wish, ranges: dict[str, tuple[float, float]], means: dict[str, Any]) -> Artifact:
    model = base.edit()
    taken = names_in(model)
    placement = place(model.graph, _chosen_in(model.graph, wish), wish.operators, wish.excluded)
    ranges = {name: range_at(site.value, ranges) for name, site in placement.sites.items()}
    if wish.bias_correction:
        correct_biases(model, placement, means, wish.style, taken)
    put_pairs(model, placement, ranges, wish.style, taken)
    remove_unused(model)
    return base.after(model, Step("quantize"))


def range_at(value: Any, ranges: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """The range of a value; of what it was moved from, where fewer products than were calibrated for read that quantized."""
    if value.name in ranges:
        return ranges[value.name]
    node = value.producer()
    joined = node.inputs if node.op_type in JOINING else node.inputs[:1]
    lows, highs = zip(*(range_at(one, ranges) for one in joined), strict=True)
    return min(lows), max(highs)


def layers_twice(found: Quantized, wish: Wish) -> tuple[Artifact, dict[str, tuple[str, str]]]:
    """The model with every product there twice, as it is and quantized, the second led nowhere; and the names of both values
    by product, as outputs."""
    model = found.base.edit()
    graph, taken = model.graph, names_in(model)
    placement = place(graph, _chosen_in(graph, wish), ())
    pairs: dict[str, tuple[str, str]] = {}
    for product in _chosen_in(graph, wish):
        node = product.node
        build = Builder(graph, node, taken)
        data = []
        for place_there in (0,) if is_stored(product.weight) else (0, 1):
            site = placement.sites[placement.read_from[node.name, place_there]]
            seen = range_at(site.value, found.seen)
            # What isn't finite gets no pair either.
            given_to = node.inputs[place_there]
            data.append(_rounded(build, given_to, seen, wish.style) if np.isfinite(seen).all() else given_to)
        weight = [build.constant(rounded_weight(product, wish.style), "rounded")] if is_stored(product.weight) else []
        twin = build.op(node.op_type, *data, *weight, *given(node)[2:], **node.attributes)
        graph.insert_after(node, build.nodes)
        pairs[node.name] = node.outputs[0].name, twin.name
        fresh = [value for value in (node.outputs[0], twin) if not value.is_graph_output()]
        graph.outputs.extend(fresh)
    return found.base.after(model, Step("twice")), pairs


def _rounded(build: Builder, value: Any, seen: tuple[float, float], style: QuantizationStyle) -> Any:
    """A value there and back through the integers."""
    scale = scale_for(*seen, style)
    numbers = (
        build.constant(np.asarray(scale.scale), "scale"),
        build.constant(np.asarray(scale.zero_point), "zero_point"),
    )
    back = build.op("DequantizeLinear", build.op("QuantizeLinear", value, *numbers), *numbers)
    back.type, back.shape = value.type, value.shape
    return back


def _chosen(artifact: Artifact, wish: Wish) -> list[Product]:
    return _chosen_in(artifact.model.graph, wish)


def _chosen_in(graph: Any, wish: Wish) -> list[Product]:
    return [product for product in products(graph) if product.node.name not in wish.excluded]


def _smoothed(artifact: Artifact, context: Context, wish: Wish, samples: Samples, strength: float) -> Artifact:
    """The artifact with outliers moved into the weights of the chosen matrix products."""
    model = artifact.edit()
    chosen = [p for p in _chosen_in(model.graph, wish) if p.kind == "MatMul" and is_stored(p.weight)]
    if not strength or not chosen:
        return artifact
    inputs = {product.data.name: -1 for product in chosen}
    few = calibration.some(artifact, samples, SMOOTHED_ON, context.seed)
    peaks = calibration.calibrate(artifact, {}, few, context, channels=inputs).peaks
    smooth(model, chosen, peaks, strength, names_in(model))
    return artifact.after(model, Step("smooth"))


def with_types(artifact: Artifact) -> Artifact:
    """The artifact with types and shapes noted, where some are not."""
    import onnx_ir.passes.common as common

    if all(value.dtype is not None for node in artifact.model.graph for value in node.outputs):
        return artifact
    model = artifact.edit()
    common.ShapeInferencePass()(model)
    return artifact.after(model, Step("infer-shapes"))


def integer_styles(capabilities: Capabilities) -> list[QuantizationStyle]:
    """The styles with int8 weights and integer activations."""
    styles = capabilities.quantization_styles
    return [style for style in styles if style.weight_type == "int8" and style.activation_type in ("int8", "uint8")]


def channels_of(wanted: Sequence[Product]) -> dict[str, int]:
    """The axis of each product's data that counts its input channels; a value that two read along different axes is left
    out."""
    axes: dict[str, set[int]] = {}
    for product in wanted:
        axes.setdefault(product.data.name, set()).add(channel_axis(product))
    return {name: next(iter(found)) for name, found in axes.items() if len(found) == 1}


def channel_axis(product: Product) -> int:
    """The axis of a product's data that counts its input channels."""
    return 1 if product.kind in ("Conv", "ConvTranspose") else 0 if product.data_turned else -1


def output_error(wanted: Sequence[Batch], found: Sequence[Batch]) -> float:
    """How far float outputs moved, relative to their size: the root of the mean over outputs of Σ Δ² / Σ y²; infinite where
    one is not finite that was."""
    shares = []
    for name in wanted[0]:
        if wanted[0][name].dtype.kind != "f":
            continue
        moved = size = 0.0
        for old, new in zip(wanted, found, strict=True):
            kept = np.isfinite(old[name])
            gap = new[name][kept].astype(np.float64) - old[name][kept]
            moved, size = moved + float((gap**2).sum()), size + float((old[name][kept].astype(np.float64) ** 2).sum())
        shares.append(moved / size if size else moved)
    worst = float(np.sqrt(np.mean(shares))) if shares else 0.0
    return worst if np.isfinite(worst) else float("inf")
