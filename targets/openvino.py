"""OpenVINO on the CPU: the model's own precision, explicit threads, and load generated beside the runtime.

OpenVINO runs "fp32" models in bfloat16 where the processor can, unless `INFERENCE_PRECISION_HINT` says otherwise: it is
always set here, to the backend's own default where nothing else was asked for, and read back into the facts.
The batch axis is made static at the operating point's batch, because static shapes let the plugin choose layouts at
compile time; other batches are split, and the remainder is filled up.
"""

from __future__ import annotations

import os
import re
import time
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from perwatt.artifact import Artifact
from perwatt.contract import Capabilities, OperatingPoint, Program, QuantizationStyle, Target, cpu_seconds
from perwatt.errors import BackendError
from perwatt.measurement import Window
from perwatt.signature import Batch, Signature, inferences

HINTS = {"single-stream": "LATENCY", "offline": "THROUGHPUT"}
PRECISIONS = {"bf16": "bf16", "f32": "f32", "f16": "f16"}
"""Ours to OpenVINO's names; the default that the plugin reports is among them."""

# Telemetry of any dependency is off (openvino_telemetry reads this).
os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


class OpenVINO(Target):
    """Intel's runtime on x86 and Arm CPUs."""

    def missing(self) -> list[str]:
        try:
            devices = _core().available_devices
        except ImportError as error:
            return [f"openvino can't be imported ({error}): pip install openvino"]
        except Exception as error:
            return [f"openvino does not start: {_words(error)}"]
        return [] if "CPU" in devices else [f"openvino finds no CPU plugin here, only {devices or 'nothing'}"]

    def capabilities(self) -> Capabilities:
        abilities = set(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        default = _default_precision()
        precisions = [default, *(p for p in ("bf16", "f32") if p != default and (p == "f32" or "BF16" in abilities))]
        styles = (
            # Asymmetric signed activations do not compile under the bf16 default, so symmetric ones come first.
            QuantizationStyle("symmetric", "int8", "int8", activation_symmetric=True, weight_per_channel=True),
            QuantizationStyle("asymmetric-activations", "uint8", "int8", False, True),
        )
        return Capabilities(
            isa=cpu_isa(),
            floating_precisions=tuple(precisions),
            half_types=("bfloat16",) if "BF16" in abilities else (),
            channel_multiples={"int8": 64, "bfloat16": 32, "float32": 16},
            quantization_styles=styles if "INT8" in abilities else (),
        )

    def lower(self, artifact: Artifact, point: OperatingPoint) -> Program:
        """Read, make the batch static, compile. Raises BackendError with OpenVINO's own words."""
        assert artifact.path is not None, "lowering needs the artifact on disk: call artifact.file(folder) first"
        return _compiled(artifact.path, artifact.signature, point)

    def load(self, folder: Path, signature: Signature, point: OperatingPoint) -> Program:
        """Compile what `save` wrote. Raises BackendError with OpenVINO's own words."""
        return _compiled(folder / "model.xml", signature, point)

    def script(self) -> str:
        return (files("perwatt.targets") / "openvino_run.py.txt").read_text()

    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        return {"openvino": version("openvino")}


def _compiled(path: Path, signature: Signature, point: OperatingPoint) -> Program:
    try:
        return OpenVINOProgram(path, signature, point)
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"OpenVINO refused the model: {_words(error)}") from error


class OpenVINOProgram(Program):
    """A compiled model on the CPU plugin."""

    def __init__(self, path: Path, signature: Signature, point: OperatingPoint) -> None:
        self.signature = signature
        self.batch_size = batch_size(signature, point)
        self.model = _core().read_model(str(path))
        if isinstance(signature.batch, str):
            _make_batch_static(self.model, point.batch)
        precision = point.floating_precision or _default_precision()
        if precision not in PRECISIONS:
            raise BackendError(f"OpenVINO has no floating precision {precision!r}: known are {', '.join(PRECISIONS)}")
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "PERFORMANCE_HINT": HINTS[point.scenario],
        }
        if point.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = point.threads
        if point.streams is not None:
            settings["NUM_STREAMS"] = point.streams
        start = time.perf_counter()
        self.compiled = _core().compile_model(self.model, "CPU", settings)
        self.compile_s = time.perf_counter() - start
        self.settings = settings
        self.point = OperatingPoint(
            scenario=point.scenario,
            batch=self.batch_size or 1,
            threads=int(self.compiled.get_property("INFERENCE_NUM_THREADS")),
            streams=int(self.compiled.get_property("NUM_STREAMS")),
            floating_precision=precision,
        )
        self.request = self.compiled.create_infer_request()
        # By position, not by name: OpenVINO may give a port several names or none.
        self.inputs = [spec.name for spec in signature.inputs]
        self.outputs = [spec.name for spec in signature.outputs]

    def call(self, batch: Batch) -> Batch:
        try:
            self.request.infer([batch[name] for name in self.inputs], share_inputs=True)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed on this input: {_words(error)}") from error
        found = [np.array(self.request.get_output_tensor(i).data) for i in range(len(self.outputs))]
        return {name: self._as_declared(name, array) for name, array in zip(self.outputs, found, strict=True)}

    def _as_declared(self, name: str, array: Any) -> Any:
        spec = next(s for s in self.signature.outputs if s.name == name)
        return array if spec.dtype in ("unknown", str(array.dtype)) else array.astype(spec.dtype)

    def drive(self, samples: list[Batch], seconds: float) -> Window:  # type: ignore[override]
        """Single-stream: one call after the other. Offline: as many calls under way as the compiled model likes."""
        feeds = [[batch[name] for name in self.inputs] for batch in samples]
        counts = [inferences(self.signature, batch) for batch in samples]
        if self.point.scenario == "single-stream":
            return self._drive_one(feeds, counts, seconds)
        return self._drive_queue(feeds, counts, seconds)

    def _drive_one(self, feeds: list[Any], counts: list[int], seconds: float) -> Window:
        latencies: list[float] = []
        done, infer = 0, self.request.infer
        cpu, start = cpu_seconds(), time.perf_counter()
        now = start
        while now - start < seconds or not latencies:
            turn = len(latencies) % len(feeds)
            infer(feeds[turn], share_inputs=True, share_outputs=True)
            then, now = now, time.perf_counter()
            latencies.append((now - then) * 1e3)
            done += counts[turn]
        return Window(done, now - start, cpu_seconds() - cpu, latencies)

    def _drive_queue(self, feeds: list[Any], counts: list[int], seconds: float) -> Window:
        import openvino

        queue = openvino.AsyncInferQueue(self.compiled)
        latencies: list[float] = []
        queue.set_callback(lambda request, started: latencies.append((time.perf_counter() - started) * 1e3))
        done, turn = 0, 0
        cpu, start = cpu_seconds(), time.perf_counter()
        while time.perf_counter() - start < seconds or not turn:
            queue.start_async(feeds[turn % len(feeds)], time.perf_counter(), share_inputs=True)
            done += counts[turn % len(feeds)]
            turn += 1
        queue.wait_all()
        return Window(done, time.perf_counter() - start, cpu_seconds() - cpu, latencies)

    def save(self, folder: Path) -> list[Path]:
        """`model.xml` and `model.bin` (batch left dynamic where the source's was), and how to run them."""
        import openvino

        model = self.model
        if isinstance(self.signature.batch, str):
            model = model.clone()
            _make_batch_dynamic(model)
        # Weights stay as the graph says: compressing to fp16 behind its back would break "what the file says runs".
        openvino.save_model(model, str(folder / "model.xml"), compress_to_fp16=False)
        return [folder / "model.xml", folder / "model.bin"]

    def facts(self) -> dict[str, Any]:
        read_back = self.compiled.get_property("INFERENCE_PRECISION_HINT")
        return {
            "backend": "openvino",
            "device": str(_core().get_property("CPU", "FULL_DEVICE_NAME")),
            "execution_precision": str(read_back.to_string() if hasattr(read_back, "to_string") else read_back),
            "operating_point": self.point.to_json(),
            "compile_s": round(self.compile_s, 3),
            "settings": self.settings,
        }


def batch_size(signature: Signature, point: OperatingPoint) -> int | None:
    """Items in one call: the point's batch, the model's own where that is fixed, None without a batch axis."""
    if signature.batch is None:
        return None
    return signature.batch if isinstance(signature.batch, int) else point.batch


def _make_batch_static(model: Any, batch: int) -> None:
    _reshape_batch(model, batch)


def _make_batch_dynamic(model: Any) -> None:
    _reshape_batch(model, -1)


def _reshape_batch(model: Any, batch: int) -> None:
    shapes = {}
    for port in model.inputs:
        shape = port.get_partial_shape()
        shape[0] = batch
        shapes[port] = shape
    model.reshape(shapes)


@cache
def _default_precision() -> str:
    hint = _core().get_property("CPU", "INFERENCE_PRECISION_HINT")
    name = hint.to_string() if hasattr(hint, "to_string") else str(hint)
    return {"bfloat16": "bf16", "float": "f32", "float32": "f32", "half": "f16", "float16": "f16"}.get(name, name)


@cache
def cpu_isa() -> tuple[str, ...]:
    """The instruction sets that decide what pays, as Linux names them."""
    vector = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "asimd", "i8mm")
    known = (*vector, "amx_tile", "amx_int8", "amx_bf16")
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return ()
    return tuple(name for name in known if name in flags)


def _words(error: Exception) -> str:
    """The telling lines of an OpenVINO message: without the trail of source files and conditions before it."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    trail = r"Exception from src|While validating|FrontEnd API failed|Check '.*' failed at \S+$"
    telling = [line for line in lines if not re.match(trail, line)]
    return re.sub(r"\s+", " ", " ".join(telling or lines))[:400]
