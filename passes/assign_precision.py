"""Give each layer the cheaper of two types, int8 or floating point, as far as accuracy allows.

Quantizing everything is seldom the fastest and never the most accurate: a depthwise convolution between two layers that stay in
floating point pays two conversions for nothing, and a handful of layers does most of the damage. Here each layer's cost in
either type is measured on the target, by its own profile of the whole graph in either; each layer's damage is measured on the
data; and the choice is one integer program:

    least  Σ cost[layer, type] + Σ conversions between neighbours of different type,  with  Σ damage ≤ budget

Its answer, without a limit on the damage first, is run against the whole graph in either type, and the measured fastest is kept:
that may well be "leave it as it is". Where it loses more accuracy than the budget allows, the limit is halved into the right
place, `steps` times, each answer judged on the target: how often is known before, and the best so far is always in hand.

    Conv₁ → Conv₂ → MatMul        becomes        Conv₁:int8 → Conv₂ → MatMul:int8

Damages: `perwatt.sensitivity` (needs torch, else layers count alike). Costs: the backend's profiler (OpenVINO's counters, ONNX
Runtime's profile; where a backend tells none, multiplications count). Solver: HiGHS through SciPy. Lossy: accuracy decides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from perwatt import calibration
from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, QuantizationStyle, Stage, Tolerance
from perwatt.errors import BackendError, PassError, PerwattError
from perwatt.passes._allocation import Border, Layer, allocate
from perwatt.passes._half_rest import Rest, with_rest
from perwatt.passes._layer_costs import borders_between, by_product, conversions
from perwatt.passes._naming import with_names
from perwatt.passes._placement import products
from perwatt.passes._quantized import quantized_already
from perwatt.passes._quantizer import Quantized, Wish, integer_styles, layers_twice, quantize
from perwatt.signature import Batch

CAREFUL = (1.0, 0.0, 4.0)
"""What conversions count, times what they were measured to cost: profiles of either graph say little about a mixture of both, so
answers that shun them more and less are tried too."""

NEAR, EQUAL = 1.1, 1.01
"""What is within a tenth of the least cost is measured twice, what is within a hundredth then is no different."""

UNTOLD = 0.5
"""What a layer in int8 is taken to cost of itself in floating point where the backend tells no costs."""


@dataclass(frozen=True)
class AssignPrecision(Pass):
    """`steps`: how often an answer that loses too much is mended and judged again (search: 4 … 8).
    `subset_size`: calibration samples used at most. `judged_on`: samples that damages are measured on.
    `rest`: what stays in floating point is carried in `float32` or `half`; `auto`: in half on backends that run the types that
    the graph says, where no operating point could ask for it."""

    stage: ClassVar[Stage] = Stage.PRECISION
    in_default: ClassVar[bool] = True
    tolerance: ClassVar[Tolerance | None] = None
    depends_on_target: ClassVar[bool] = True
    measures: ClassVar[bool] = True
    # Where its answer is to quantize everything, that is theirs.
    after: ClassVar[tuple[str, ...]] = ("cast-half", "quantize-fp8", "quantize-int8")

    steps: int = 6
    subset_size: int = 300
    judged_on: int = 16
    rest: Rest = "auto"

    def check_settings(self) -> None:
        if self.subset_size < 1:
            raise PassError(f"{self.subset_size} calibration samples: at least 1", fix="subset_size: 300")
        if self.steps < 0 or self.judged_on < 1:
            raise PassError("steps must be 0 or more and judged_on 1 or more", fix="steps: 6, judged_on: 16")

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        if _style(context) is None:
            yield "this backend has no int8 arithmetic"
        if reason := quantized_already(artifact):
            yield reason
        if not products(artifact.model.graph):
            yield "no convolution or matrix product to quantize"

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        style = _style(context)
        assert style is not None
        named = with_names(artifact, self.step([]))
        wish = Wish(style, operators=style.operators, subset_size=self.subset_size)
        whole = quantize(named, context, wish)
        if whole is None:
            return artifact, ["nothing was found worth quantizing"]
        layers, borders = self._costs(named, whole, context)
        everything = frozenset(layer.name for layer in layers)
        allocated = [allocate(layers, _weighed(borders, factor), math.inf) for factor in CAREFUL]
        plain = replace(wish, operators=())
        tried = [(everything, wish), (everything, plain), *((answer, wish) for answer in allocated if answer)]
        choices = list(dict.fromkeys(tried))
        graphs = [self._finished(whole.only(how, answer), context) for answer, how in choices]
        fastest, cost = _fastest([self._finished(named, context), *graphs], context)
        if fastest == 0:
            return artifact, [f"left in floating point: measured fastest, {_against(cost[0], cost[1:])}"]
        answer, wish = choices[fastest - 1]
        why = f"{len(layers) - len(answer)} of {len(layers)} layers stay in floating point, where they are faster"
        found, more = self._within_budget(whole, wish, layers, borders, answer, graphs[fastest - 1], context)
        changes = [f"{len(found)} of {len(layers)} layers in int8 {whole.words()}", why, *more]
        if not found:
            return artifact, [f"left in floating point: {more[-1]}"]
        made = self._finished(whole.only(wish, found), context)
        return artifact.after(made.edit(), self.step(changes)), changes

    def _finished(self, artifact: Artifact, context: Context) -> Artifact:
        """With what is left in floating point in the type that it will run in."""
        return with_rest(artifact.after(artifact.edit(), self.step([])), context, self.rest)[0]

    def _costs(self, named: Artifact, whole: Quantized, context: Context) -> tuple[list[Layer], list[Border]]:
        """Each layer's cost in either type, and what conversions between neighbours cost."""
        graph = whole.base.model.graph
        names = [product.node.name for product in products(graph)]
        plain, quantized = (context.profile(self._finished(one, context)) for one in (named, whole.artifact))
        if not (plain and quantized):
            counted = by_product(graph, names, [])
            return [Layer(name, counted[name], counted[name] * UNTOLD, 0.0) for name in names], []
        before, after = by_product(graph, names, plain), by_product(graph, names, quantized)
        layers = [Layer(name, before[name], after[name], 0.0) for name in names]
        return layers, borders_between(graph, names, conversions(whole.artifact.model.graph, quantized))

    def _within_budget(
        self, whole: Quantized, wish: Wish, layers: Sequence[Layer], borders: Sequence[Border], answer: frozenset[str],
        graph: Artifact, context: Context,
    ) -> tuple[frozenset[str], list[str]]:  # fmt: skip
        """The answer, or less of it where it loses more than the budget allows; and what was done about it."""
        loss = context.judge(graph)
        if loss is None or loss.allowed:
            return answer, []
        known = self._damages(whole, wish, context)
        layers = [replace(one, damage=known.get(one.name, 0.0)) for one in layers if one.name in answer]
        total = sum(layer.damage for layer in layers if math.isfinite(layer.damage))
        low, high, kept, how = 0.0, 1.0, frozenset[str](), f"found in {self.steps} steps"
        for step in range(self.steps):
            if context.deadline is not None and time.monotonic() > context.deadline:
                how = f"out of time after {step} of {self.steps} steps"
                break
            # Damages span decades, so the limit is sought on their logarithm's scale.
            share = (low + high) / 2
            context.progress(f"assign-precision: judging, step {step + 1} of {self.steps}")
            tried = allocate(layers, borders, _limit(total, share))
            try:
                verdict = context.judge(self._finished(whole.only(wish, tried), context)) if tried else None
            except PerwattError as error:
                how = f"stopped at step {step + 1} of {self.steps}: {error}"
                break
            if verdict is None or verdict.allowed:
                # A wider limit allows all that a narrower one did.
                low, kept = share, tried
            else:
                high = share
        left = len(answer) - len(kept)
        return kept, [f"{left} more stay for accuracy: all together lose {loss.drop:.2f}; {how}"]

    def _damages(self, whole: Quantized, wish: Wish, context: Context) -> dict[str, float]:
        from perwatt import sensitivity

        samples = calibration.some(whole.base, context.samples("calibrate"), self.judged_on, context.seed)
        twice, pairs = layers_twice(whole, wish)
        batches: list[Batch] = calibration.calls(whole.base, samples)
        try:
            outputs = [str(value.name) for value in whole.base.model.graph.outputs]
            return sensitivity.damages(twice, pairs, outputs, batches, context.seed)
        except BackendError:
            return dict.fromkeys(pairs, 1.0)


def _fastest(graphs: Sequence[Artifact], context: Context) -> tuple[int, list[float]]:
    """Which of `graphs` costs least, and what each does. Those near the least are measured once more among themselves, as the
    least of several noisy figures is too low; of equals, the first is taken."""
    cost = context.measure(graphs)
    near = [number for number, one in enumerate(cost) if one <= min(cost) * NEAR]
    if len(near) > 1:
        again = context.measure([graphs[number] for number in near])
        # Both times count alike: on the scale of the first, by what the first of them costs.
        unit = cost[near[0]] / again[0]
        for number, one in zip(near, again, strict=True):
            cost[number] = math.sqrt(cost[number] * one * unit)
    least = min(cost)
    return next(number for number, one in enumerate(cost) if one <= least * EQUAL), cost


def _limit(total: float, share: float) -> float:
    """The damage that a share of the way from a millionth of all to all of it allows."""
    return total * float(10.0 ** (-6.0 * (1.0 - share)))


def _weighed(borders: Sequence[Border], factor: float) -> list[Border]:
    return [Border(border.first, border.second, border.price * factor) for border in borders]


def _style(context: Context) -> QuantizationStyle | None:
    return next(iter(integer_styles(context.capabilities)), None)


def _against(plain: float, others: Sequence[float]) -> str:
    """`int8 takes 1.08 ×`."""
    return "int8 takes " + ", ".join(f"{other / plain:.2f} ×" for other in others)
