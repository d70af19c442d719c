"""A target for tests: runs the model in ONNX Runtime, pretends to take the time that a script says.

Nothing here is a measurement of anything. Latency and CPU time come from a cost for each operator, so that pipelines,
reports and gates can be tested without hardware and without a clock. Under server load, where requests come at times of
their own, time is scripted as well: it stands still except where a request is waited for or served.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from perwatt.artifact import Artifact
from perwatt.contract import Capabilities, Clock, OperatingPoint, Program, QuantizationStyle, Target
from perwatt.errors import BackendError
from perwatt.measurement import Window
from perwatt.signature import Batch, Signature, inferences

COST_MS = {"Conv": 1.0, "Gemm": 0.5, "MatMul": 0.5, "BatchNormalization": 0.25}
"""Scripted cost of an operator; one that is not named costs 0.05 ms."""


class ScriptedClock(Clock):
    """Time that passes only where it is waited for, and then at once."""

    def __init__(self) -> None:
        self.moment = 0.0

    def now(self) -> float:
        return self.moment

    def wait_until(self, moment: float) -> None:
        self.moment = max(self.moment, moment)


class Null(Target):
    """For tests only: real outputs, scripted costs."""

    def missing(self) -> list[str]:
        return []

    def capabilities(self) -> Capabilities:
        style = QuantizationStyle("symmetric", "int8", "int8", activation_symmetric=True, weight_per_channel=True)
        return Capabilities(floating_precisions=("f32",), half_types=(), quantization_styles=(style,))

    def lower(self, artifact: Artifact, point: OperatingPoint) -> Program:
        return NullProgram(artifact, point)

    def load(self, folder: Path, signature: Signature, point: OperatingPoint) -> Program:
        return NullProgram(Artifact(path=folder / "model.onnx", signature=signature), point)

    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        return {"onnxruntime": version("onnxruntime")}


class NullProgram(Program):
    """Outputs by ONNX Runtime, time by the script."""

    def __init__(self, artifact: Artifact, point: OperatingPoint) -> None:
        import onnxruntime

        assert artifact.path is not None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self.session = onnxruntime.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendError(f"ONNX Runtime refused the model: {' '.join(str(error).split())[:300]}") from error
        self.path = artifact.path
        self.signature = artifact.signature
        self.point = point
        batch = artifact.signature.batch
        self.batch_size = batch if isinstance(batch, int) else None
        counts = _operators(artifact.path)
        cost = sum(COST_MS.get(name, 0.05) * count for name, count in counts.items()) or 0.05
        self.cost_ms = cost / (2 if counts.get("DequantizeLinear") else 1)
        self.clock: Clock = ScriptedClock()

    def call(self, batch: Batch) -> Batch:
        names = [spec.name for spec in self.signature.outputs]
        self.clock.wait_until(self.clock.now() + self.cost_ms / 1e3)
        return dict(zip(names, self.session.run(names, batch), strict=True))

    def drive(self, samples: Sequence[Batch], seconds: float) -> Window:
        calls = max(1, int(seconds * 1e3 / self.cost_ms))
        done = sum(inferences(self.signature, samples[i % len(samples)]) for i in range(calls))
        busy = calls * self.cost_ms / 1e3
        return Window(done, busy, busy, [self.cost_ms] * calls)

    def serve(self, samples: Sequence[Batch], arrivals_s: Sequence[float], clock: Clock | None = None) -> Window:
        """The inherited generator in scripted time, one request at a time; CPU seconds are those that were busy."""
        self.clock = clock or ScriptedClock()
        return replace(super().serve(samples, arrivals_s, self.clock), cpu_s=len(arrivals_s) * self.cost_ms / 1e3)

    def save(self, folder: Path) -> list[Path]:
        return [Path(shutil.copy(self.path, folder / "model.onnx"))]

    def facts(self) -> dict[str, Any]:
        return {
            "backend": "null",
            "device": "scripted",
            "execution_precision": "f32",
            "operating_point": self.point.to_json(),
        }


def _operators(path: Path) -> Counter[str]:
    """How many nodes of each operator the file has, subgraphs and functions included. Read by `onnx` itself: a worker starts in
    half the time."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    nodes = [node for graph in (model.graph, *model.functions) for node in _nodes(graph)]
    return Counter(node.op_type for node in nodes if node.op_type != "Constant")


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body)
