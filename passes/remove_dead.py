"""Remove what no output depends on: nodes, initializers, functions and opset imports, and identities.

    y = Relu(x); z = Exp(x); return y        becomes        y = Relu(x); return y

Dead weights cost memory and load time, rarely speed. Leans on onnx-ir's own passes, but for identities: those that give
an output a name of its own must stay where what they copy has a name to keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from perwatt.artifact import Artifact, graphs_of
from perwatt.contract import Context, Pass, Stage, Tolerance
from perwatt.passes._changes import count_changes


@dataclass(frozen=True)
class RemoveDead(Pass):
    """No settings."""

    stage: ClassVar[Stage] = Stage.CLEAN
    in_default: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "common-subexpression")
    also_after: ClassVar[Stage | None] = Stage.FUSE
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=0.0, rtol=0.0)

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        import onnx_ir.passes.common as common

        model = artifact.edit()
        unused_before = len(model.graph.initializers)
        for graph in graphs_of(model):
            _drop_identities(graph)
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass()(model)
        gone = unused_before - len(model.graph.initializers)
        return count_changes(self, artifact, model, [f"{gone} unused weights removed"] if gone else [])


def _drop_identities(graph: Any) -> None:
    import onnx_ir as ir

    for node in [node for node in graph if node.op_type == "Identity" and node.domain == ""]:
        source, copy = node.inputs[0], node.outputs[0]
        if source is None or (copy.is_graph_output() and _keeps_its_name(source, graph)):
            continue
        source.type, source.shape = source.type or copy.type, source.shape or copy.shape
        name = copy.name if copy.is_graph_output() else source.name
        ir.convenience.replace_all_uses_with(copy, source, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        source.name = name


def _keeps_its_name(value: Any, graph: Any) -> bool:
    """Whether `value` can't take over the name of an output: it comes from outside, or is an output itself."""
    return value.producer() is None or value.producer().graph is not graph or value.is_graph_output()
