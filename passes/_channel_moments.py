"""Second moments of a value's channels: how much of one channel the others could make up for.

    moments = channel_moments(artifact, {"relu_3": (1, 4)}, samples, context)
    moments["relu_3"].gram                  # E[x xᵀ], [C, C], over samples and all other axes
    moments["relu_3"].mean                  # E[x], [C]

Summed up batch by batch inside one instrumented graph, so that memory doesn't depend on the number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from perwatt import calibration
from perwatt.artifact import Artifact, Step
from perwatt.contract import Context
from perwatt.data import Samples
from perwatt.fusion import Builder, names_in, remove_unused
from perwatt.signature import rows

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """`gram`: E[x xᵀ], [C, C]; `mean`: E[x], [C]; float64."""

    gram: Doubles
    mean: Doubles


def channel_moments(
    artifact: Artifact, wanted: Mapping[str, tuple[int, int]], samples: Samples, context: Context
) -> dict[str, Moments]:
    """Moments of each value along an axis, given as (axis, rank). Raises BackendError where the model can't be run."""
    if not wanted:
        return {}
    calls = calibration.calls(artifact, samples)
    batches = Samples(calls, batch_size=max(map(rows, calls)))
    sums: dict[str, list[Any]] = {}
    for batch in context.execute(_instrumented(artifact, wanted), batches, (), True):
        for number, name in enumerate(wanted):
            found = [batch[f"{word}_{number}"].astype(np.float64) for word in ("gram", "sum", "shape")]
            parts = [found[0], found[1], found[2].reshape(-1, 2)[:, 0].sum()]
            sums[name] = parts if name not in sums else [a + b for a, b in zip(sums[name], parts, strict=True)]
    return {name: Moments(gram / count, total / count) for name, (gram, total, count) in sums.items()}


def _instrumented(artifact: Artifact, wanted: Mapping[str, tuple[int, int]]) -> Artifact:
    """The model that gives `gram_i`, `sum_i` and `shape_i` of the i-th value over a batch, and nothing else."""
    model = artifact.edit()
    graph, taken = model.graph, names_in(model)
    values = {value.name: value for value in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    outputs = []
    for number, (name, (axis, rank)) in enumerate(wanted.items()):
        value = values[name]
        producer = value.producer()
        build = Builder(graph, producer or graph[0], taken)
        order = [place for place in range(rank) if place != axis] + [axis]
        last = value if order == sorted(order) else build.op("Transpose", value, perm=order)
        shape = build.op("Shape", last, start=-1)
        flat = build.op("Reshape", last, build.op("Concat", build.constant(np.array([-1]), "any"), shape, axis=0))
        gram = build.op("MatMul", build.op("Transpose", flat, perm=[1, 0]), flat)
        total = build.op("ReduceSum", flat, build.constant(np.array([0]), "rows"), keepdims=0)
        counted = build.op("Shape", flat)
        for word, made in (("gram", gram), ("sum", total), ("shape", counted)):
            made.name = f"{word}_{number}"
            outputs.append(made)
        if producer is None:
            graph.insert_before(graph[0], build.nodes)
        else:
            graph.insert_after(producer, build.nodes)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    remove_unused(model)
    return artifact.after(model, Step("instrument"))
