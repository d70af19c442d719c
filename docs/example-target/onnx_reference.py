"""An example of a target for perwatt: onnx's reference evaluator, the operators as their specification writes them.

It is right and slow, which makes it a place to look up what a model should answer, and a short example: everything that a
backend has to say for itself, and nothing else. Copy this folder, rename module and entry point, and put your runtime in.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from perwatt.artifact import Artifact
from perwatt.contract import Capabilities, OperatingPoint, Program, Target
from perwatt.errors import BackendError
from perwatt.signature import Batch, Signature


class OnnxReference(Target):
    """onnx's own evaluator in NumPy: an example of a target from another package."""

    def missing(self) -> list[str]:
        # Import what you need here or below, never at the top: listing targets imports this module.
        try:
            import onnx.reference  # noqa: F401
        except ImportError as error:
            return [f"onnx can't be imported ({error}): pip install onnx"]
        return []

    def capabilities(self) -> Capabilities:
        # Passes branch on this: what is left out (int8 styles, half types) is not tried for this target.
        return Capabilities(floating_precisions=("f32",))

    def lower(self, artifact: Artifact, point: OperatingPoint) -> Program:
        assert artifact.path is not None
        return OnnxReferenceProgram(artifact.path, artifact.signature, point)

    def load(self, folder: Path, signature: Signature, point: OperatingPoint) -> Program:
        return OnnxReferenceProgram(folder / "model.onnx", signature, point)

    def versions(self) -> dict[str, str]:
        return {"onnx": version("onnx")}


class OnnxReferenceProgram(Program):
    """A model in the evaluator."""

    def __init__(self, path: Path, signature: Signature, point: OperatingPoint) -> None:
        from onnx.reference import ReferenceEvaluator

        self.path = path
        self.signature = signature
        self.point = point
        # Items in one call: a number where the model fixes it, else the evaluator takes any.
        self.batch_size = signature.batch if isinstance(signature.batch, int) else None
        self.evaluator = in_words(lambda: ReferenceEvaluator(str(path)), "refused the model")

    def call(self, batch: Batch) -> Batch:
        names = [spec.name for spec in self.signature.outputs]
        return dict(zip(names, in_words(lambda: self.evaluator.run(names, batch), "failed on this input"), strict=True))

    def save(self, folder: Path) -> list[Path]:
        return [Path(shutil.copy(self.path, folder / "model.onnx"))]

    def facts(self) -> dict[str, Any]:
        # What really is, read back where the runtime has a say in it.
        return {
            "backend": "onnx reference",
            "device": "cpu",
            "execution_precision": "f32",
            "operating_point": self.point.to_json(),
        }


def in_words(ask: Callable[[], Any], what: str) -> Any:
    """What `ask` gives; what it raises becomes BackendError with the backend's own words, which perwatt reports."""
    try:
        return ask()
    except Exception as error:
        raise BackendError(f"onnx's evaluator {what}: {' '.join(str(error).split())[:300]}") from error
