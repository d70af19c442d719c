"""Graphs that fix their batch, made to take any: what exporters wrote down as a number is taken from the input again.

A model that was exported for one picture reshapes to [1, 256], and no operator but that one minds a call of 64. Learning wants
such calls. Whether the graph then treats items apart, `apart` says by trying.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from perwatt.analysis_shapes import analyse
from perwatt.artifact import Artifact
from perwatt.patterns import is_stored, stored
from perwatt.signature import Batch

ALIKE = 1e-4
"""How far items may differ between calls, relative to the largest value: sums are taken in another order."""


def free_batch(artifact: Artifact, model: Any) -> None:
    """Where a Reshape of `model`, an edit of the artifact's, writes down the batch, or what it was merged with, the size comes
    from its input; in place. Sizes that were noted on values inside are forgotten. Nothing to do where the batch is free
    already."""
    import onnx_ir as ir

    batch = artifact.signature.batch
    if not isinstance(batch, int):
        return
    facts = analyse(artifact, model)
    name = "batch" if "batch" not in artifact.signature.other_dynamic else "items"
    fed = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    given: set[Any] = set(fed)
    for node in model.graph:
        if not any(value in given for value in node.inputs if value is not None):
            continue
        given.update(node.outputs)
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
        if node.op_type != "Reshape" or node.domain or not is_stored(node.inputs[1]):
            continue
        shape = stored(node.inputs[1]).astype(np.int64).reshape(-1).copy()
        data = facts.shape(node.inputs[0])
        if not len(shape) or shape[0] <= 0 or node.attributes.get_int("allowzero", 0):
            continue
        if shape[0] == batch and data and data[0] == batch:
            shape[0] = 0
        elif -1 not in shape:
            shape[0] = -1
        else:
            continue
        stored_as = f"{node.inputs[1].name}/{node.outputs[0].name}/any_batch"
        value = ir.Value(name=stored_as, const_value=ir.Tensor(shape, name=stored_as))
        value.dtype, value.shape = ir.DataType.INT64, ir.Shape(shape.shape)
        model.graph.register_initializer(value)
        node.replace_input_with(1, value)
    for value in (*fed, *model.graph.outputs):
        if value.shape is not None and len(value.shape) and value.shape[0] == batch:
            value.shape = ir.Shape([name, *list(value.shape)[1:]])


def apart(run: Callable[[Batch], Batch], one: Batch, other: Batch) -> bool:
    """Whether a call with the items of both gives what two calls give."""
    try:
        both = run({name: np.concatenate([array, other[name]]) for name, array in one.items()})
        alone = [run(batch) for batch in (one, other)]
    except Exception:
        # Whatever the graph has against it.
        return False
    for name, found in both.items():
        wanted = np.concatenate([answers[name] for answers in alone])
        if found.shape != wanted.shape or not np.allclose(found, wanted, atol=ALIKE * float(np.abs(wanted).max())):
            return False
    return True
