"""Quantization-aware tuning: a quantized student learns its teacher's outputs with the rounding in the loop.

    learnt = tune(student, teacher, samples, select, TuningPlan(seconds=120), progress)

As `perwatt.distillation`, with these differences. Weights are learnt by float copies behind fake quantization, whose gradient
passes rounding straight through (Bengio, Léonard and Courville, "Estimating or propagating gradients through stochastic neurons",
2013), and are rounded to codes again by the very operator that they were learnt through. Scales are learnt as in Learned Step
Size Quantization (Esser et al., ICLR 2020), those of activations alone: a weight's would move all its values at once, and Adam
with it, which cost more than it won. Nothing is normalised anew: the size of every layer's values is part of what was calibrated.

Steps are Adam's, and lengths are told in 127ths of each tensor's range, the steps of an 8-bit grid: at a learning rate of 0.1
the first updates move a weight by a tenth of such a step, whatever the layer's scale. (In steps of its own grid, 4 bits would
want a rate 16 times lower.) That takes the place of LSQ's factor 1/√(n·Q) on gradients, which Adam would divide out again: a
scale moves by 1/√Q of itself in place of 1/Q, as it counts for all values at once. It learns in float32: bfloat16 has no more
digits than the codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from perwatt.artifact import Artifact, Step
from perwatt.data import Samples
from perwatt.distillation import SPARSE, Learnt, Plan, _Work
from perwatt.distillation_weights import learnt_names
from perwatt.errors import BackendError
from perwatt.interpreter import Interpreter, Unsupported
from perwatt.interpreter_weights import with_weights
from perwatt.learning_codes import Codes, Learnable, learnable, with_codes

USUAL_RATE = 0.03
GRID = 127
"""Steps to either side of zero that every tensor counts as having."""
FARTHEST = 4.0
"""Scales stay within that factor of where they began: what leaves it has gone astray."""


@dataclass(frozen=True)
class TuningPlan(Plan):
    """`scales`: whether those of activations are learnt beside weights and biases. `learning_rate`: in 127ths of each
    tensor's range. Pictures are mixed as they are for any other learning."""

    hints: int = 0
    norms: bool = False
    scales: bool = True


def tune(
    student: Artifact, teacher: Artifact, samples: Samples, select: Samples, plan: TuningPlan,
    progress: Callable[[str], None], folder: Path | None = None, step: Step | None = None,
) -> Learnt:  # fmt: skip
    """As `distil`, for a student with QuantizeLinear and DequantizeLinear. Raises BackendError where torch lacks an operator,
    or where nothing is stored as codes."""
    torch.manual_seed(plan.seed)
    try:
        work = Tuning(student, teacher, samples, select, plan)
    except Unsupported as error:
        raise BackendError(f"learning runs in torch, and {error}") from error
    return work.done_with(folder, step or Step("tune"), lambda words: progress(f"tune-quantization: {words}"))


class Tuning(_Work):
    """A quantized network on the way to its teacher."""

    def __init__(
        self, student: Artifact, teacher: Artifact, samples: Samples, select: Samples, plan: TuningPlan
    ) -> None:
        self.graph: Learnable = learnable(student)
        if not self.graph.codes:
            raise BackendError("nothing is stored as codes that could be learnt")
        plan = replace(plan, learning_rate=plan.learning_rate or USUAL_RATE)
        self.began: dict[str, torch.Tensor] = {}
        super().__init__(self.graph.artifact, teacher, samples, select, plan)
        self.source = student
        self.half = False
        self.targets = [self._run(self.teacher, batch) for batch in self.select.batches(plan.batch)]
        self.weights = {name: w for name, w in self.network.weights.items() if name in self._learnt(plan)}
        for name, weight in self.network.weights.items():
            if weight.is_floating_point():
                weight.requires_grad_(name in self.weights)
        sparse = any(one.name in SPARSE for one in student.steps)
        copies = [one.copy for one in self.graph.codes]
        self.masks = {name: self.weights[name] != 0 for name in copies} if sparse else {}
        self.began = {name: w.detach().clone() for name, w in self.weights.items() if name in self.graph.activations}
        self.optimizer = self._optimizer()
        self.kept = self._state()
        self._first_judged()

    def learn(self) -> None:
        """One step; copies stay where there are codes, scales near where they began."""
        super().learn()
        with torch.no_grad():
            for name, began in self.began.items():
                scale = self.weights[name]
                scale.copy_(torch.minimum(torch.maximum(scale, began / FARTHEST), began * FARTHEST))
            for codes in self.graph.codes:
                copy = self.weights[codes.copy]
                low, high = codes.limits(self.network.weights[codes.scale], copy)
                copy.copy_(torch.minimum(torch.maximum(copy, low), high))

    def finished(self, step: Step) -> Learnt:
        """The student with the best codes, scales and biases."""
        self._load(self.kept)
        notes = (*self.notes, *self._notes())
        told = (*self.figures(), notes)
        if self.best_step == 0:
            return Learnt(self.source, *told)
        weights = self.network.weights
        copies = {one.copy for one in self.graph.codes}
        plain = {name: weight.detach() for name, weight in self.weights.items() if name not in copies}
        held: Any = self.source.model.graph.initializers
        for name, other in self.graph.tied.items():
            if other in plain and name in held:
                plain[name] = plain[other].reshape(held[name].const_value.numpy().shape)
        with torch.no_grad():
            codes = {one.name: one.rounded(weights[one.copy], weights[one.scale]) for one in self.graph.codes}
        made = with_codes(with_weights(self.source, plain, step), codes, step)
        return Learnt(self.source.after(made.edit(), step), *told)

    # Parts ------------------------------------------------------------------------------------------------------------

    def _module(self, model: Any) -> Any:
        """As gradients go through it: straight through the rounding."""
        return Interpreter(model, straight_through=True)

    def _learnt(self, plan: TuningPlan) -> set[str]:
        """Names of what is learnt: copies, biases and what else is in floating point, scales of activations."""
        nodes: list[Any] = list(self.graph.artifact.model.graph)
        pairs = (n.inputs[1:2] for n in nodes if n.op_type in ("QuantizeLinear", "DequantizeLinear"))
        kept = {str(value.name) for inputs in pairs for value in inputs}
        found = {
            name
            for name, weight in self.network.weights.items()
            if weight.dtype is torch.float32 and weight.numel() > 1 and bool(weight.isfinite().all())
        }
        scales = set(self.graph.activations) if plan.scales and not self.graph.fixed else set()
        return (found & learnt_names(self.graph.artifact.model) - kept) | scales

    def _notes(self) -> list[str]:
        scales = len(self.began)
        return [f"{len(self.graph.codes)} weights learnt by float copies" + (f", {scales} scales" if scales else "")]

    def _optimizer(self) -> Any:
        codes: dict[str, Codes] = {one.copy: one for one in self.graph.codes}
        groups = []
        for name, weight in self.weights.items():
            value = weight.detach().abs()
            if name in codes:
                one = codes[name]
                length = float(self.network.weights[one.scale].detach().mean()) * (one.high - one.low) / 2 / GRID
            elif name in self.began:
                length = float(value) / math.sqrt(GRID)
            else:
                length = float(value.max()) / GRID
            if length > 0:  # all zeros have no size to go by
                groups.append({"params": [weight], "scale": length})
        return torch.optim.Adam(groups, lr=1e-3)
