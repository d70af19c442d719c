"""Compute equal things once: nodes with the same operator, attributes and inputs, and weights with the same content.

    a = Shape(x); b = Shape(x)        becomes        a = Shape(x), used twice

Shared weights make the file smaller; a computation done once is time saved. Leans on onnx-ir's own passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, Stage, Tolerance
from perwatt.passes._changes import count_changes


@dataclass(frozen=True)
class CommonSubexpression(Pass):
    """No settings."""

    stage: ClassVar[Stage] = Stage.CLEAN
    in_default: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("fold-constants",)
    also_after: ClassVar[Stage | None] = Stage.FUSE
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=0.0, rtol=0.0)

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        import onnx_ir.passes.common as common

        model = artifact.edit()
        before = len(model.graph.initializers)
        common.DeduplicateHashedInitializersPass()(model)
        common.CommonSubexpressionEliminationPass()(model)
        _straighten(model.graph)
        merged = before - len(model.graph.initializers)
        return count_changes(self, artifact, model, [f"{merged} duplicate weights merged"] if merged else [])


def _straighten(graph: Any) -> None:
    """Identities that give equal outputs their names are equal too, and were chained: each copies the origin again."""
    for node in graph:
        while _names_an_output(node) and _names_an_output(node.inputs[0].producer()):
            node.replace_input_with(0, node.inputs[0].producer().inputs[0])


def _names_an_output(node: Any) -> bool:
    return node is not None and node.op_identifier() == ("", "Identity", "") and node.outputs[0].is_graph_output()
