"""How much outputs move without blocks, and how little a block changes what it reads.

The model gets a switch for each block: the branch is multiplied by one or zero before it is added, and which of them is an input
of its own. So one file serves every choice of blocks, and what would be dropped next is found out without making a model for
each candidate.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from perwatt import calibration
from perwatt.artifact import Artifact, Step
from perwatt.contract import Context
from perwatt.data import Samples
from perwatt.fusion import Builder, names_in, remove_unused
from perwatt.passes._residual_blocks import Block
from perwatt.signature import Batch, rows

SWITCHES = "drop-blocks/switches"
LIKENESS = "drop-blocks/likeness"
AXES_AS_INPUT = 13
"""The opset since which the axes of a sum are an input."""
TINY = 1e-20


class Movement:
    """How far the outputs of `artifact` move on `samples` without some of `blocks`."""

    def __init__(self, artifact: Artifact, blocks: Sequence[Block], samples: Samples, context: Context) -> None:
        self.names = [block.name for block in blocks]
        self.calls = calibration.calls(artifact, samples)
        self.model = switched(artifact, blocks)
        self.context = context
        self.original = next(self._outputs([()]))

    def of(self, choices: Sequence[Collection[str]]) -> Iterator[float]:
        """For each choice of blocks left out, as they come: root of the mean square by which outputs move, relative to their own;
        of several outputs the mean. Infinite where they are not finite."""
        for found in self._outputs(choices):
            yield _distance(found, self.original)

    def _outputs(self, choices: Sequence[Collection[str]]) -> Iterator[list[Batch]]:
        fed = [{**call, SWITCHES: self._row(choice)} for choice in choices for call in self.calls]
        batches = Samples(fed, batch_size=max(map(rows, self.calls)))
        found = iter(self.context.execute(self.model, batches, (), True, True))
        for _ in choices:
            yield [next(found) for _ in self.calls]

    def _row(self, choice: Collection[str]) -> Any:
        return np.array([[name not in choice for name in self.names]], np.float32)


def switched(artifact: Artifact, blocks: Sequence[Block]) -> Artifact:
    """The model with one more input, SWITCHES: float32 [1, blocks], 1 for each that is there and 0 for each that is not."""
    import onnx_ir as ir

    model = artifact.edit()
    graph, taken = model.graph, names_in(model)
    nodes = {node.name: node for node in graph}
    switches = ir.Value(name=SWITCHES, shape=ir.Shape([1, len(blocks)]), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(switches)
    for number, block in enumerate(blocks):
        root = nodes[block.name]
        goes = root.inputs[1 - block.side]
        build = Builder(graph, root, taken)
        switch = build.op("Gather", switches, build.constant(np.array([number], np.int64), "number"), axis=1)
        # A scalar, which goes with any number of axes.
        switch = build.op("Reshape", switch, build.constant(np.array([], np.int64), "scalar"))
        if block.dtype != ir.DataType.FLOAT:
            switch = build.op("Cast", switch, to=ir.DataType(block.dtype))
        root.replace_input_with(1 - block.side, build.op("Mul", goes, switch))
        graph.insert_before(root, build.nodes)
    return artifact.after(model, Step("switch"))


def _distance(found: Sequence[Batch], original: Sequence[Batch]) -> float:
    shares = []
    for name, first in original[0].items():
        if first.dtype.kind in "biu":
            continue
        pairs = [
            (one[name].astype(np.float64), other[name].astype(np.float64))
            for one, other in zip(found, original, strict=True)
        ]
        moved, size = (
            sum(float(np.square(a - b).sum()) for a, b in pairs),
            sum(float(np.square(b).sum()) for _, b in pairs),
        )
        shares.append(math.sqrt(moved / max(size, TINY)) if math.isfinite(moved) else math.inf)
    return float(np.mean(shares)) if shares else 0.0


# Likeness ---------------------------------------------------------------------------------------------------------------


def likeness(artifact: Artifact, blocks: Sequence[Block], samples: Samples, context: Context) -> dict[str, float]:
    """Cosine similarity between what each block reads and what it gives, by its name: at every position along the channels
    (the last axis, of images the second), averaged. Raises BackendError where the model can't be run."""
    calls = calibration.calls(artifact, samples)
    batches = Samples(calls, batch_size=max(map(rows, calls)))
    found = list(context.execute(_compared(artifact, blocks), batches, (), True, True))
    weights = [rows(call) for call in calls]
    return {
        block.name: float(np.average([float(batch[f"{LIKENESS}_{number}"]) for batch in found], weights=weights))
        for number, block in enumerate(blocks)
    }


def _compared(artifact: Artifact, blocks: Sequence[Block]) -> Artifact:
    import onnx_ir as ir

    model = artifact.edit()
    graph, taken = model.graph, names_in(model)
    nodes = {node.name: node for node in graph}
    outputs = []
    for number, block in enumerate(blocks):
        root = nodes[block.name]
        build = Builder(graph, root, taken)
        before, after = (
            build.op("Cast", value, to=ir.DataType.FLOAT) for value in (root.inputs[block.side], root.outputs[0])
        )
        axis = 1 if block.rank >= 4 else block.rank - 1
        dot, own, new = (_summed(build, a, b, axis) for a, b in ((before, after), (before, before), (after, after)))
        size = build.op("Sqrt", build.op("Mul", own, new))
        tiny = build.constant(np.array(TINY, np.float32), "tiny")
        output = build.op("ReduceMean", build.op("Div", dot, build.op("Max", size, tiny)), keepdims=0)
        output.name, output.type, output.shape = f"{LIKENESS}_{number}", ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.insert_after(root, build.nodes)
        outputs.append(output)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    remove_unused(model)
    return artifact.after(model, Step("compare"))


def _summed(build: Builder, a: Any, b: Any, axis: int) -> Any:
    """Σ a · b along an axis."""
    if build.graph.opset_imports.get("", 0) >= AXES_AS_INPUT:
        return build.op("ReduceSum", build.op("Mul", a, b), build.constant(np.array([axis], np.int64), "axis"))
    return build.op("ReduceSum", build.op("Mul", a, b), axes=[axis])
