"""Compute at compile time what does not depend on the input.

Exporters leave shape arithmetic, casts of weights and broadcasts behind that every inference would compute anew; a
backend that meets them may also miss its fast path for the operator they belong to. Large results are not folded
(`output_size_limit`): a constant that is bigger than what makes it costs memory bandwidth.

    Shape(x) → Gather(0) → …        becomes        a constant, once the shape is known

Leans on onnxscript's constant folder. It pays on every graph that torch exports; hand-written graphs are often clean
already, and then nothing happens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, Stage
from perwatt.passes._changes import count_changes


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Settings: results above `output_size_limit` elements stay computed (search: 2**12 … 2**22)."""

    stage: ClassVar[Stage] = Stage.CLEAN
    imports: ClassVar[tuple[str, ...]] = ("onnxscript.optimizer",)
    in_default: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("fold-shapes",)
    # Shape inference inside the folder is C++ of onnx, which has crashed on odd files.
    isolated: ClassVar[bool] = True

    output_size_limit: int = 262144

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        import onnx_ir.passes.common as common
        from onnxscript.optimizer import fold_constants

        model = artifact.edit()
        fold_constants(model, input_size_limit=8192, output_size_limit=self.output_size_limit)
        common.RemoveUnusedNodesPass()(model)
        # The folder carries what it knows of an output back to the input; what can be fed is not its business.
        for value, original in zip(model.graph.inputs, artifact.model.graph.inputs, strict=True):
            value.shape = original.shape.copy() if original.shape is not None else None
        return count_changes(self, artifact, model)
