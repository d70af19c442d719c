"""Learn back what quantization lost: the quantized network is taught by the model as it was, with the rounding in the loop.

Rounding loses least where weights know of it. Each stored weight gets a float copy that is quantized anew in every step; the
copies, the biases and the scales of activations learn the original's outputs, on the samples to learn from (`--train`; the
calibration samples where there are none), without labels or with them. Then the copies are rounded by the very operator that
they were learnt through: the file computes what was learnt, on the same operators, as fast as before.

    Conv(DQ(Q(x, s)), DQ(W:int8))      becomes      Conv(DQ(Q(x, s')), DQ(W':int8))

It pays where calibration alone leaves a gap: small convolutional nets, 4-bit weights, networks that were pruned before. Where
nothing is gained on held-out samples, the model stays as it was. It takes the time that `minutes` gives, goes on where it was
stopped, and with `steps` in place of minutes the same twice is the same network. It stands behind a pass that quantizes, each
of whose results it tunes:

    - quantize-int8
    - tune-quantization: {minutes: 3}

Weights stored as codes in front of DequantizeLinear are learnt, in integers of 4 to 16 bits; what QLinearConv and its like
hold is not. Scales of weights stay, and where biases are stored as integers all scales do. Zeros of sparse weights stay zeros.

Lossy: accuracy decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, Stage, Tolerance
from perwatt.errors import PassError
from perwatt.passes._learning import (
    cache_of_learning,
    check_learning,
    nothing_to_learn_from,
    samples_to_learn,
    seconds_to_learn,
    words_of,
)
from perwatt.patterns import is_stored

WHOLE = ("INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16")
"""Types of codes that are learnt."""


@dataclass(frozen=True)
class TuneQuantization(Pass):
    """`minutes`: how long it may learn. `steps`: so many in place of minutes, which makes it repeatable.
    `batch`: items in a step.
    `learning_rate`: the highest, in 127ths of each tensor's range: at 0.1 the first updates move weights by a tenth of what
    lies between two codes of 8 bits (search: 0.01 … 0.3).
    `temperature`: of the original's answers (search: 1 … 8). `labels`: how much labels count beside it, where there are any.
    `augment`: shift and mirror pictures: `auto` where the original answers mirrored ones alike.
    `scales`: learn those of activations, too (search: both)."""

    stage: ClassVar[Stage] = Stage.PRECISION
    tolerance: ClassVar[Tolerance | None] = None
    mends: ClassVar[bool] = True
    in_search: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("quantize-int8", "assign-precision", "quantize-weights")

    minutes: float = 5.0
    steps: int = 0
    batch: int = 64
    learning_rate: float = 0.03
    temperature: float = 4.0
    labels: float = 0.1
    augment: Literal["auto", "none", "flip-shift"] = "auto"
    scales: bool = True

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        codes: list[Any] = [node for node in artifact.model.graph if _reads_codes(node)]
        if not codes:
            yield "no weight is stored as codes in front of DequantizeLinear: nothing was quantized that could be tuned"
        elif not any(node.inputs[1].dtype.name == "FLOAT" for node in codes):
            yield "scales are in half precision, in which nothing can be learnt: quantize with rest: float32"
        yield from nothing_to_learn_from(artifact, context)

    def check_settings(self) -> None:
        check_learning(self.minutes, self.steps, self.batch, self.temperature, self.labels)
        if self.learning_rate <= 0:
            raise PassError(
                f"a learning rate of {self.learning_rate:g}: it must be more than 0", fix="learning_rate: 0.03"
            )

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        from perwatt.learning_quantized import TuningPlan, tune

        self.check_settings()
        assert context.original is not None
        learn, select, where = samples_to_learn(context)
        plan = TuningPlan(
            seconds=seconds_to_learn(self.minutes, context), steps=self.steps or None, batch=self.batch,
            learning_rate=self.learning_rate, temperature=self.temperature, labels=self.labels, augment=self.augment,
            seed=context.seed, scales=self.scales,
        )  # fmt: skip
        made = tune(
            artifact, context.original, learn, select, plan, context.progress, cache_of_learning(), self.step([])
        )
        changes = words_of(made, None if self.steps else plan.seconds, self.minutes, learn, select, where)
        if made.step == 0:
            return artifact, changes
        return artifact.after(made.artifact.edit(), self.step(changes)), changes

    def ensures(self, before: Artifact, after: Artifact) -> Iterator[str]:
        if before.operator_counts() != after.operator_counts():
            yield "the graph changed, where only its numbers may"


def _reads_codes(node: Any) -> bool:
    """Whether a node dequantizes a stored tensor of integers."""
    if node.op_type != "DequantizeLinear" or not is_stored(node.inputs[0]):
        return False
    return node.inputs[0].dtype is not None and node.inputs[0].dtype.name in WHOLE
