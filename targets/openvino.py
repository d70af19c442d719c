"""OpenVINO: the model's own precision, explicit threads, and load generated beside the runtime. CPU, Intel GPU and NPU.

OpenVINO runs "fp32" models in bfloat16 where the processor can, unless `INFERENCE_PRECISION_HINT` says otherwise: it is
always set here, to the backend's own default where nothing else was asked for, and read back into the facts.
The batch axis is made static at the operating point's batch, because static shapes let the plugin choose layouts at
compile time; other batches are split, and the remainder is filled up.

Server load gets the THROUGHPUT hint, as offline load does: the question is the highest rate, and requests that overlap
are served by several streams at once. Its price is a longer single call, since each stream has fewer threads. Where the
bound is tighter than that allows, the operating point says `streams: 1`, and all threads work on one request.

Hyper-threading and the choice between fast and slow cores are left to the plugin: on the machines at hand neither can be
told apart. Only the CPU plugin ran so far; the other two go through the same code with what their plugins offer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from perwatt.artifact import Artifact
from perwatt.contract import (
    Capabilities,
    Clock,
    NodeCost,
    OperatingPoint,
    Program,
    QuantizationStyle,
    Target,
    as_calls,
)  # fmt: skip
from perwatt.errors import BackendError, InputError
from perwatt.measurement import Window
from perwatt.signature import Batch, Signature, TensorSpec
from perwatt.targets import _cpu, _openvino_cache
from perwatt.targets._openvino_load import Load, in_words, telling_lines
from perwatt.targets._openvino_profile import node_costs
from perwatt.targets._run_script import run_script

DEVICES = {"": "CPU", "gpu": "GPU", "npu": "NPU"}
HINTS = {"single-stream": "LATENCY", "offline": "THROUGHPUT", "server": "THROUGHPUT"}
PRECISIONS = {"bf16": "bf16", "f32": "f32", "f16": "f16"}
"""Ours to OpenVINO's names; the default that the plugin reports is among them."""

INTEGER_OPERATORS = ("Add", "AveragePool", "GlobalAveragePool")
WEIGHTS_ALONE = tuple(
    QuantizationStyle(f"{kind}-weights", "float", kind, True, True) for kind in ("int4", "uint4", "int8")
)
"""They stay codes in memory and are unpacked within the product, before which activations are rounded to 8 bits in groups where
floating point is f32. Seen on the CPU alone."""
HALVES = {"bf16": ("BF16", "bfloat16"), "f16": ("FP16", "float16")}
"""What a plugin calls the ability, and NumPy the type."""
MENDED_BY = {
    "CPU": "pip install --force-reinstall openvino",
    "GPU": "it takes an Intel GPU and its OpenCL driver (Debian, Ubuntu: apt install intel-opencl-icd)",
    "NPU": "it takes a processor with an NPU and its driver (github.com/intel/linux-npu-driver)",
}

BITS = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8}
"""Types that NumPy has no name for, and the integers that hold them."""

# Telemetry of any dependency is off (openvino_telemetry reads this).
os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


class OpenVINO(Target):
    """Intel's runtime: x86 and Arm CPUs, and by variants Intel's GPUs and NPUs."""

    formats = (".xml",)
    variants = tuple(DEVICES)
    preference = 1
    serves: ClassVar = {"cpu": "", "gpu": "gpu"}

    def __init__(self, variant: str = "") -> None:
        super().__init__(variant)
        self.plugin = DEVICES[variant]
        # Of an NPU a meter of the CPU sees as little as of a GPU.
        self.device = "gpu" if variant else "cpu"
        self.meter = "none" if variant else "auto"

    def missing(self) -> list[str]:
        try:
            devices = _core().available_devices
        except ImportError as error:
            return [f"openvino can't be imported ({error}): pip install openvino"]
        except Exception as error:
            return [f"openvino does not start: {telling_lines(error)}"]
        # Several devices of a kind are GPU.0, GPU.1, …; the plain name is the first of them.
        if any(device.partition(".")[0] == self.plugin for device in devices):
            return []
        return [
            f"openvino finds no {self.plugin} here, only {', '.join(devices) or 'nothing'}: {MENDED_BY[self.plugin]}"
        ]

    def capabilities(self) -> Capabilities:
        abilities = set(_core().get_property(self.plugin, "OPTIMIZATION_CAPABILITIES"))
        default = _default_precision(self.plugin)
        able = [p for p in ("bf16", "f16", "f32") if p == "f32" or HALVES[p][0] in abilities]
        # On CPUs float16 is slower than bfloat16 where both are there, and of no use where neither is.
        offered = [p for p in able if p != "f16" or self.variant]
        styles = (
            # Asymmetric signed activations do not compile in every model, so symmetric ones come first.
            QuantizationStyle("symmetric", "int8", "int8", True, True, operators=INTEGER_OPERATORS),
            QuantizationStyle("asymmetric-activations", "uint8", "int8", False, True, operators=INTEGER_OPERATORS),
            *(WEIGHTS_ALONE if not self.variant else ()),
        )
        return Capabilities(
            isa=() if self.variant else _cpu.cpu_isa(),
            floating_precisions=(default, *(p for p in offered if p != default)),
            half_types=tuple(HALVES[p][1] for p in offered if p != "f32"),
            channel_multiples={} if self.variant else _cpu.channel_multiples(_cpu.cpu_isa()),
            quantization_styles=styles if "INT8" in abilities else (),
            # Measured (bench/suites/fusion.py): Attention takes 1.1 to 1.4 × and RotaryEmbedding 1.4 to 1.7 × what their
            # pieces take, because the plugin only recognizes the pieces.
            operators=("GroupNormalization", "RMSNormalization", "Swish"),
        )

    def knobs(self, point: OperatingPoint) -> dict[str, tuple[Any, ...]]:
        """On the CPU threads, and whether they are pinned, and under load streams, batch and requests too."""
        streams = point.streams or (_cpu.usable_cpus() if not self.variant else 2)
        loaded: dict[str, tuple[Any, ...]] = {"requests": (None, 2 * streams)}
        if self.variant:
            several = {"streams": (1, 2, 4)} if self.plugin == "GPU" else {}
            return {} if point.scenario == "single-stream" else {**several, "batch": _cpu.BATCHES, **loaded}
        pinned = {"pinned": (None, not _core().get_property("CPU", "ENABLE_CPU_PINNING"))}
        return {**_cpu.knobs(point), **pinned, **({} if point.scenario == "single-stream" else loaded)}

    def lower(self, artifact: Artifact, point: OperatingPoint) -> Program:
        """Read, make the batch static, compile. Raises BackendError with OpenVINO's own words."""
        assert artifact.path is not None, "lowering needs the artifact on disk: call artifact.file(folder) first"
        return _compiled(artifact.path, artifact.signature, point, self.plugin)

    def profile(
        self, artifact: Artifact, point: OperatingPoint, samples: Sequence[Batch], seconds: float
    ) -> list[NodeCost]:
        """By the plugin's counters. Raises BackendError with OpenVINO's own words."""
        assert artifact.path is not None
        program = _compiled(artifact.path, artifact.signature, replace(point, streams=1), self.plugin, profiled=True)
        return node_costs(program, as_calls(artifact.signature, samples, program.batch_size or 1), seconds)

    def load(self, folder: Path, signature: Signature, point: OperatingPoint) -> Program:
        """Compile what `save` wrote. Raises BackendError with OpenVINO's own words."""
        return _compiled(folder / "model.xml", signature, point, self.plugin)

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
        return _compiled(path, signature, point, self.plugin)

    def script(self) -> str:
        return run_script("openvino", "openvino_run.py.txt")

    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        return {"openvino": version("openvino")}


def _compiled(
    path: Path, signature: Signature, point: OperatingPoint, plugin: str, profiled: bool = False
) -> OpenVINOProgram:
    try:
        return OpenVINOProgram(path, signature, point, plugin, profiled)
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"OpenVINO refused the model: {telling_lines(error)}") from error


class OpenVINOProgram(Program):
    """A compiled model on one of OpenVINO's devices."""

    def __init__(
        self, path: Path, signature: Signature, point: OperatingPoint, plugin: str = "CPU", profiled: bool = False
    ) -> None:
        self.signature, self.plugin = signature, plugin
        self.batch_size = batch_size(signature, point)
        self.model = _core().read_model(str(path))
        if isinstance(signature.batch, str):
            _make_batch_static(self.model, point.batch)
        precision = point.floating_precision or _default_precision(plugin)
        if precision not in PRECISIONS:
            raise BackendError(f"OpenVINO has no floating precision {precision!r}: known are {', '.join(PRECISIONS)}")
        self.settings = _settings(point, PRECISIONS[precision], plugin) | ({"PERF_COUNT": True} if profiled else {})
        if plugin == "CPU" and has_chained_integer_products(self.model):
            self.settings["SNIPPETS_MODE"] = "DISABLE"
        start = time.perf_counter()
        self.compiled, self.from_cache = self._compile(path)
        self.compile_s = time.perf_counter() - start
        requests = point.requests or self._read("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        pinned = self._read("ENABLE_CPU_PINNING")
        self.point = replace(
            point, batch=self.batch_size or 1, threads=self._read("INFERENCE_NUM_THREADS"),
            streams=self._read("NUM_STREAMS"), floating_precision=precision, requests=requests,
            pinned=None if pinned is None else bool(pinned), graphs=None, autotune=None,
        )  # fmt: skip
        self.request = self.compiled.create_infer_request()
        self.generator = Load(self.compiled, self.request, signature, point.requests)
        # By position, not by name: OpenVINO may give a port several names or none.
        self.inputs = [spec.name for spec in signature.inputs]
        self.outputs = [spec.name for spec in signature.outputs]

    def _compile(self, path: Path) -> tuple[Any, bool]:
        try:
            return _openvino_cache.compiled(_core(), self.model, path, self.plugin, self.settings)
        except RuntimeError as error:
            if not has_asymmetric_signed_values(self.model):
                raise
            raise BackendError(
                f"OpenVINO refused the model: {telling_lines(error)}",
                fix="signed int8 activations that have a zero point are what it often does not compile, above all under "
                "bf16: quantize them symmetrically, or as uint8",
            ) from error

    def _read(self, name: str) -> int | None:
        """A number that the compiled model runs by; None where its device knows no such property."""
        try:
            return int(self.compiled.get_property(name))
        except RuntimeError:
            return None

    def call(self, batch: Batch) -> Batch:
        with in_words():
            self.request.infer([batch[name] for name in self.inputs], share_inputs=True)
        found = [np.array(self.request.get_output_tensor(i).data) for i in range(len(self.outputs))]
        return {name: self._as_declared(name, array) for name, array in zip(self.outputs, found, strict=True)}

    def _as_declared(self, name: str, array: Any) -> Any:
        spec = next(s for s in self.signature.outputs if s.name == name)
        if spec.dtype in BITS:
            # The bindings know no NumPy type for it and give its bits under another name.
            return array.view(BITS[spec.dtype]).view(_narrow(spec.dtype))
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
            "device": str(_core().get_property(self.plugin, "FULL_DEVICE_NAME")),
            "execution_precision": str(read_back.to_string() if hasattr(read_back, "to_string") else read_back),
            "operating_point": self.point.to_json(),
            "compile_s": round(self.compile_s, 3),
            "compiled_before": self.from_cache,
            "settings": self.settings,
        }


def _settings(point: OperatingPoint, precision: str, plugin: str) -> dict[str, Any]:
    """What the plugin is told; threads and pinning are the CPU's alone, and an NPU has no streams to set."""
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": HINTS[point.scenario]}
    if plugin == "CPU" and point.threads is not None:
        settings["INFERENCE_NUM_THREADS"] = point.threads
    if plugin == "CPU" and point.pinned is not None:
        settings["ENABLE_CPU_PINNING"] = point.pinned
    if plugin != "NPU" and point.streams is not None:
        settings["NUM_STREAMS"] = point.streams
    return settings


def has_chained_integer_products(model: Any) -> bool:
    """Whether quantized matrix products on two axes may follow one another: OpenVINO 2026.4 makes one kernel of two such with
    a static batch, whose results are wrong by orders of magnitude, or zero."""
    kinds = [operation.get_type_name() for operation in model.get_ordered_ops()]
    if "FakeQuantize" not in kinds and not any(
        operation.get_type_name() == "Convert" and operation.get_input_element_type(0).get_type_name() in ("i8", "u8")
        for operation in model.get_ordered_ops()
    ):
        return False
    flat = [
        operation for operation in model.get_ordered_ops()
        if operation.get_type_name() == "MatMul" and operation.get_output_partial_shape(0).rank == 2
    ]  # fmt: skip
    return len(flat) > 1


def has_asymmetric_signed_values(model: Any) -> bool:
    """Whether signed 8-bit values with a zero point other than 0 are dequantized anywhere in `model`."""
    for operation in model.get_ordered_ops():
        if operation.get_type_name() != "Subtract":
            continue
        values, point = (operation.input_value(position).get_node() for position in (0, 1))
        if values.get_type_name() != "Convert" or values.get_input_element_type(0).get_type_name() != "i8":
            continue
        while point.get_type_name() == "Convert":
            point = point.input_value(0).get_node()
        if point.get_type_name() == "Constant" and np.any(point.data):
            return True
    return False


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


def _narrow(dtype: str) -> Any:
    import ml_dtypes

    return getattr(ml_dtypes, dtype)


@cache
def _default_precision(plugin: str) -> str:
    hint = _core().get_property(plugin, "INFERENCE_PRECISION_HINT")
    name = hint.to_string() if hasattr(hint, "to_string") else str(hint)
    return {"bfloat16": "bf16", "float": "f32", "float32": "f32", "half": "f16", "float16": "f16"}.get(name, name)
