"""Remove what no output depends on: nodes, initializers, functions and opset imports, and identities.

    y = Relu(x); z = Exp(x); return y        becomes        y = Relu(x); return y

Dead weights cost memory and load time, rarely speed. Leans on onnx-ir's own passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, Stage, Tolerance
from perwatt.passes._changes import count_changes


@dataclass(frozen=True)
class RemoveDead(Pass):
    """No settings."""

    stage: ClassVar[Stage] = Stage.CLEAN
    in_default: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("fold-constants", "common-subexpression")
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=0.0, rtol=0.0)

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        import onnx_ir.passes.common as common

        model = artifact.edit()
        unused_before = len(model.graph.initializers)
        common.IdentityEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedFunctionsPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
        gone = unused_before - len(model.graph.initializers)
        return count_changes(self, artifact, model, [f"{gone} unused weights removed"] if gone else [])
