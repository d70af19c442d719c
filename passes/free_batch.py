"""Let a model that was exported for calls of a fixed size take calls of any.

    x[1,64] → Reshape([1,256])        becomes        x[batch,64] → Reshape([0,256])

Many files were exported for one item at a time. Their weights are read from memory anew for each, and kernels that would do well
on 32 rows get one. Who may choose the batch chooses a better one where calls may wait for each other (offline): MNIST's
convolutions in OpenVINO take half the time an item in calls of 32. Where calls are of one item anyway, nothing changes.

Whether the graph treats items apart is tried on samples: calls of both of two must give what two calls give. Left: graphs that
mix items, and those that write down the batch elsewhere than in the shape that Reshape is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from perwatt.artifact import Artifact
from perwatt.batching import apart, free_batch
from perwatt.contract import Context, Pass, Stage, Tolerance
from perwatt.data import Samples
from perwatt.signature import Batch, rows, split


@dataclass(frozen=True)
class FreeBatch(Pass):
    """No settings."""

    stage: ClassVar[Stage] = Stage.CLEAN
    in_default: ClassVar[bool] = True
    # Sums are taken in another order where there are more rows.
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        batch = artifact.signature.batch
        if batch is None:
            yield "the model has no batch axis"
        elif isinstance(batch, str):
            yield "the model takes calls of any size already"

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        batch = artifact.signature.batch
        if not isinstance(batch, int):
            return artifact, []
        model = artifact.edit()
        free_batch(artifact, model)
        changes = [f"calls of any size, where they had to be of {batch}"]
        after = artifact.after(model, self.step(changes))
        if not isinstance(after.signature.batch, str):
            return artifact, ["its inputs and outputs don't agree on an axis that counts items"]

        def outputs(call: Batch) -> Batch:
            return next(iter(context.execute(after, Samples([call], batch_size=rows(call)))))

        one, other = itertools.islice(itertools.cycle(_calls(context, batch)), 2)
        if not apart(outputs, one, other):
            return artifact, ["its items are not treated apart, or their number is written down in it"]
        return after, changes


def _calls(context: Context, size: int) -> list[Batch]:
    """The first two calls of so many samples, or one where there are no more."""
    few = context.samples("calibrate").batches(size)
    return [piece for call in itertools.islice(few, 2) for piece, _ in split(call, size)]
