"""Values on the way that the student still has in common with its teacher: what it is brought nearer to besides the outputs.

A network that lost some of its residual blocks still has the others, and its stream between them is meant to carry what the
teacher's does. Told where it should be all along the way, and not at the end alone, it learns in fewer steps (Romero et al.,
"FitNets: hints for thin deep nets", 2015; Jiao et al., "TinyBERT: distilling BERT for natural language understanding", 2020).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perwatt.artifact import Artifact
from perwatt.batching import free_batch
from perwatt.interpreter import Interpreter
from perwatt.signature import Batch


def hints(student: Artifact, teacher: Artifact, batch: Batch, most: int) -> list[str]:
    """Names of at most `most` values of the residual stream that both have, in the order of the graph, evenly spread, the last
    among them. Both run on `batch`: what has another shape there, or is the same already, is none of them."""
    theirs = _values(teacher.model)
    names = (
        [name for name, value in _values(student.model).items() if name in theirs and _is_stream(value)] if most else []
    )
    if not names:
        return []
    mine, wanted = (Interpreter(with_outputs(artifact, names)).run(batch) for artifact in (student, teacher))
    differ = [name for name in names if _differ(mine[name], wanted[name])]
    if len(differ) <= most:
        return differ
    return [differ[round((number + 1) * len(differ) / most) - 1] for number in range(most)]


def with_outputs(artifact: Artifact, names: list[str]) -> Any:
    """The model with these values as outputs, behind its own; it takes any batch."""
    model = artifact.edit()
    free_batch(artifact, model)
    values = _values(model)
    model.graph.outputs.extend(values[name] for name in names)
    return model


def _values(model: Any) -> dict[str, Any]:
    return {out.name: out for node in model.graph for out in node.outputs if out.name}


def _is_stream(value: Any) -> bool:
    """Whether it is added to what is made of it."""
    kinds = [use.node.op_type for use in value.uses()]
    return len(kinds) > 1 and "Add" in kinds and not value.is_graph_output()


def _differ(mine: Any, theirs: Any) -> bool:
    return mine.shape == theirs.shape and mine.dtype == theirs.dtype == np.float32 and not np.array_equal(mine, theirs)
