"""The numeric reference: ONNX Runtime without graph optimization, so that what the file says is what is computed.

It runs inside the worker. Where ONNX Runtime has no kernel for an operator in the given type (bfloat16 MatMul, Add and
Conv among them) the interpreter takes its place; where that can't run it either, or torch is not installed, BackendError
says so, and the caller reports "not verified".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from perwatt.artifact import Artifact
from perwatt.errors import BackendError, PerwattError
from perwatt.signature import Batch, inferences, rows, split


class Quick:
    """One model as fast as this machine runs it, by OpenVINO in its default precision: bfloat16 where the processor has it,
    which is 5 to 10 times as fast as float32 and rounds values to 0.4 %. For what doesn't depend on more, as ranges do not.
    Raises BackendError where OpenVINO doesn't take the model or fails on a batch."""

    def __init__(self, artifact: Artifact, folder: Path) -> None:
        import openvino

        self.inputs = [spec.name for spec in artifact.signature.inputs]
        self.outputs = [spec.name for spec in artifact.signature.outputs]
        try:
            self.model = openvino.Core().compile_model(
                str(artifact.file(folder)), "CPU", {"PERFORMANCE_HINT": "LATENCY"}
            )
            self.request = self.model.create_infer_request()
        except Exception as error:
            raise BackendError(f"OpenVINO can't run this model: {_words(error)}") from error

    def run(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """One {name: array} for each batch."""
        import numpy as np

        for batch in batches:
            try:
                self.request.infer([batch[name] for name in self.inputs], share_inputs=True)
            except Exception as error:
                raise BackendError(f"OpenVINO failed on {rows(batch)} samples: {_words(error)}") from error
            yield {
                name: np.array(self.request.get_output_tensor(place).data) for place, name in enumerate(self.outputs)
            }


class Reference:
    """One model on the CPU. `optimized` lets ONNX Runtime fuse (faster, still float32)."""

    def __init__(self, artifact: Artifact, folder: Path, taps: Sequence[str] = (), *, optimized: bool = False) -> None:
        import onnxruntime

        self.signature = artifact.signature
        path = _with_taps(artifact, folder, taps) if taps else artifact.file(folder)
        self.interpreter: Any = None
        self.path = path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            self.interpreter = _interpreter(path, f"ONNX Runtime can't run this model: {_words(error)}")
            self.outputs = list(self.interpreter.outputs)
            return
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """One {name: array} for each batch; a fixed batch is looped, its remainder filled up and cut."""
        fixed = self.signature.batch if isinstance(self.signature.batch, int) else None
        for batch in batches:
            if fixed is None or rows(batch) == fixed:
                yield self._call(batch)
                continue
            import numpy as np

            pieces = [(self._call(piece), real) for piece, real in split(batch, fixed)]
            yield {name: np.concatenate([out[name][:real] for out, real in pieces]) for name in self.outputs}

    def _call(self, batch: Batch) -> Batch:
        if self.interpreter is not None:
            return self._interpreted(batch)
        try:
            return dict(zip(self.outputs, self.session.run(self.outputs, batch), strict=True))
        except Exception as error:
            # Some of its kernels refuse at run time what ONNX allows, an attention mask that broadcasts for one.
            count = inferences(self.signature, batch)
            refused = f"ONNX Runtime failed on {count} samples: {_words(error)}"
            self.interpreter = _interpreter(self.path, refused)
            try:
                return self._interpreted(batch)
            except BackendError as second:
                raise BackendError(f"{refused}; {second}") from error

    def _interpreted(self, batch: Batch) -> Batch:
        try:
            found: Batch = self.interpreter.run(batch)
        except Exception as error:
            count = inferences(self.signature, batch)
            raise BackendError(f"the interpreter failed on {count} samples: {_words(error)}") from error
        return found


def quickly(artifact: Artifact, folder: Path, taps: Sequence[str] = (), *, optimized: bool = False) -> Any:
    """`Quick`, or the reference where OpenVINO doesn't take the model."""
    try:
        return Quick(artifact, folder)
    except BackendError:
        return Reference(artifact, folder, taps, optimized=optimized)


def _interpreter(path: Path, refused: str) -> Any:
    """The model in torch, where ONNX Runtime `refused` it."""
    try:
        from perwatt.interpreter import Interpreter
    except ImportError:
        raise BackendError(refused) from None
    try:
        return Interpreter(Artifact.load(path).model)
    except PerwattError as error:
        raise BackendError(f"{refused}; {error}") from error


def _with_taps(artifact: Artifact, folder: Path, taps: Sequence[str]) -> Path:
    """A copy of the model in which the values named by `taps` are outputs too."""
    model = artifact.edit()
    values = {value.name: value for node in model.graph for value in node.outputs}
    unknown = [name for name in taps if name not in values]
    if unknown:
        raise BackendError(f"the graph computes no value {unknown[0]!r} to look at")
    present = {value.name for value in model.graph.outputs}
    model.graph.outputs.extend(values[name] for name in dict.fromkeys(taps) if name not in present)
    return artifact.after(model, artifact.steps[-1] if artifact.steps else _tap_step()).file(folder)


def _tap_step() -> Any:
    from perwatt.artifact import Step

    return Step("tap")


def _words(error: Exception) -> str:
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : (\w+) : ", r"\1: ", str(error))
    return re.sub(r"\s+", " ", text)[:300]
