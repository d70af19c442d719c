"""OpenVINO on the CPU: the model's own precision, explicit threads, and load generated beside the runtime.

OpenVINO runs "fp32" models in bfloat16 where the processor can, unless `INFERENCE_PRECISION_HINT` says otherwise: it is
always set here, to the backend's own default where nothing else was asked for, and read back into the facts.
The batch axis is made static at the operating point's batch, because static shapes let the plugin choose layouts at
compile time; other batches are split, and the remainder is filled up.

Server load gets the THROUGHPUT hint, as offline load does: the question is the highest rate, and requests that overlap
are served by several streams at once. Its price is a longer single call, since each stream has fewer threads. Where the
bound is tighter than that allows, the operating point says `streams: 1`, and all threads work on one request.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from perwatt.artifact import Artifact
from perwatt.contract import Capabilities, Clock, OperatingPoint, Program, QuantizationStyle, Target
from perwatt.errors import BackendError, InputError
from perwatt.measurement import Window
from perwatt.signature import Batch, Signature, TensorSpec
from perwatt.targets._openvino_load import Load, in_words, telling_lines

HINTS = {"single-stream": "LATENCY", "offline": "THROUGHPUT", "server": "THROUGHPUT"}
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

    formats = (".xml",)

    def missing(self) -> list[str]:
        try:
            devices = _core().available_devices
        except ImportError as error:
            return [f"openvino can't be imported ({error}): pip install openvino"]
        except Exception as error:
            return [f"openvino does not start: {telling_lines(error)}"]
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

    def file_signature(self, path: Path) -> Signature:
        """Inputs and outputs of an OpenVINO IR. A dynamic leading dimension is the batch axis; other dynamic dimensions
        are named after their place, so that inputs of one sequence length share a symbol."""
        try:
            model = _core().read_model(str(path))
        except Exception as error:
            fix = "it needs its model.bin beside it" if "bin file" in str(error) else None
            raise InputError(
                f"{path} is no OpenVINO model that can be read: {telling_lines(error)}", fix=fix
            ) from error
        return Signature(tuple(map(_spec, model.inputs)), tuple(map(_spec, model.outputs)))

    def open_file(self, path: Path, signature: Signature, point: OperatingPoint) -> Program:
        """Compile an OpenVINO IR as it is. Raises BackendError with OpenVINO's own words."""
        return _compiled(path, signature, point)

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
        raise BackendError(f"OpenVINO refused the model: {telling_lines(error)}") from error


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
        self.generator = Load(self.compiled, self.request, signature)
        # By position, not by name: OpenVINO may give a port several names or none.
        self.inputs = [spec.name for spec in signature.inputs]
        self.outputs = [spec.name for spec in signature.outputs]

    def call(self, batch: Batch) -> Batch:
        with in_words():
            self.request.infer([batch[name] for name in self.inputs], share_inputs=True)
        found = [np.array(self.request.get_output_tensor(i).data) for i in range(len(self.outputs))]
        return {name: self._as_declared(name, array) for name, array in zip(self.outputs, found, strict=True)}

    def _as_declared(self, name: str, array: Any) -> Any:
        spec = next(s for s in self.signature.outputs if s.name == name)
        return array if spec.dtype in ("unknown", str(array.dtype)) else array.astype(spec.dtype)

    def drive(self, samples: Sequence[Batch], seconds: float) -> Window:
        """Single-stream: one call after the other. Offline and server: as many calls under way as the compiled model
        likes, which is also the rate that no arrivals can exceed for long."""
        if self.point.scenario == "single-stream":
            return self.generator.one_by_one(samples, seconds)
        return self.generator.saturated(samples, seconds)

    def serve(self, samples: Sequence[Batch], arrivals_s: Sequence[float], clock: Clock | None = None) -> Window:
        """As many requests under way as the compiled model likes; the others wait their turn."""
        return self.generator.arriving(samples, arrivals_s, clock or Clock())

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


def _spec(port: Any) -> TensorSpec:
    shape, kind = port.get_partial_shape(), port.get_element_type()
    dims = None
    if shape.rank.is_static:
        names = [f"axis{axis}" if axis else "batch" for axis in range(len(shape))]
        dims = tuple(name if dim.is_dynamic else dim.get_length() for name, dim in zip(names, shape, strict=True))
    # The bindings give float16 for bfloat16: NumPy has no such type.
    dtype = "bfloat16" if kind.get_type_name() == "bf16" else str(np.dtype(kind.to_dtype()))
    return TensorSpec(port.get_any_name() if port.get_names() else port.get_node().get_friendly_name(), dtype, dims)


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
