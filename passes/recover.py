"""Learn back what pruning lost: the pruned network is taught by the model as it was.

Its outputs are brought nearer to the original's, on the samples to learn from (`--train`; the calibration samples where there
are none), without labels or with them, and so are the values of the residual stream that are left of it. No source code is
needed: the graph itself is what learns, in torch. Batch normalization that was folded away is put back for as long as it
learns; pictures are shifted, mirrored where the original doesn't mind, and mixed with one another; the weights with the least
loss on held-out samples are kept, and where nothing is gained, it stays as it was.

    Conv(256 → 192) → Relu → …      becomes      the same graph, with other weights

It takes the time that `minutes` gives; a run that was stopped goes on where it was. With `steps` in place of minutes the same
twice is the same network. Zeros of sparse weights stay zeros.

Lossy: accuracy decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

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
from perwatt.passes._quantized import quantized_already

LOSSY = ("drop-blocks", "prune-channels", "prune-weights", "prune-n-of-m")


@dataclass(frozen=True)
class Recover(Pass):
    """`minutes`: how long it may learn. `steps`: so many in place of minutes, which makes it repeatable.
    `batch`: items in a step. `learning_rate`: the highest; 0: what suits the network.
    `temperature`: of the original's answers (search: 1 … 8). `labels`: how much labels count beside it, where there are any.
    `augment`: shift and mirror pictures: `auto` where the original answers mirrored ones alike.
    `mix`: the share of pictures that are mixed with others (search: 0 … 1).
    `hints`: how many values of the residual stream it learns besides the outputs (search: 0 … 12).
    `norms`: put batch normalization back while it learns."""

    stage: ClassVar[Stage] = Stage.PRUNE
    tolerance: ClassVar[Tolerance | None] = None
    mends: ClassVar[bool] = True
    in_search: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = LOSSY

    minutes: float = 5.0
    steps: int = 0
    batch: int = 64
    learning_rate: float = 0.0
    temperature: float = 4.0
    labels: float = 0.1
    augment: Literal["auto", "none", "flip-shift"] = "auto"
    mix: float = 0.5
    hints: int = 6
    norms: bool = True

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        if not any(step.name in LOSSY for step in artifact.steps):
            yield "nothing was pruned that could be learnt back"
        yield from nothing_to_learn_from(artifact, context)
        if reason := quantized_already(artifact):
            yield reason

    def check_settings(self) -> None:
        check_learning(self.minutes, self.steps, self.batch, self.temperature, self.labels)
        if self.learning_rate < 0:
            raise PassError(
                f"a learning rate of {self.learning_rate:g}: it must be more than 0, or 0 for the usual one",
                fix="learning_rate: 0",
            )
        if not 0 <= self.mix <= 1 or self.hints < 0:
            raise PassError("mix must be between 0 and 1 and hints 0 or more", fix="mix: 0.5, hints: 6")

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        from perwatt.distillation import Plan, distil

        self.check_settings()
        assert context.original is not None
        learn, select, where = samples_to_learn(context)
        seconds = seconds_to_learn(self.minutes, context)
        plan = Plan(
            seconds, self.steps or None, self.batch, self.learning_rate or None, self.temperature, self.labels, self.augment,
            self.mix, self.hints, self.norms, context.seed,
        )  # fmt: skip
        made = distil(
            artifact, context.original, learn, select, plan, context.progress, cache_of_learning(), self.step([])
        )
        changes = words_of(made, None if self.steps else seconds, self.minutes, learn, select, where)
        if made.step == 0:
            return artifact, changes
        return artifact.after(made.artifact.edit(), self.step(changes)), changes
