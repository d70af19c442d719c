"""ONNX Runtime: small overhead for each call, which decides for small models; on the CPU and by execution providers.

Threads, graph optimization level, providers and their options are always set and recorded. A program that asks for a GPU
never runs on the CPU instead: falling back is off, and a session whose first provider is another one is refused.

Threads that spin while they wait for work are for single-stream alone, where calls follow each other: on two CPUs a
ResNet-20 took 0.98 ms instead of 1.40 and less CPU time (1.95 ms instead of 2.23). With pauses between calls the same
spinning took 8 ms of CPU instead of 2, so nothing spins in the other scenarios.

The batch axis is overridden with the operating point's batch, so that shapes are known when the graph is optimized; other
batches are split, and the remainder is filled up. On the CPU floating point runs in float32: of half precision ONNX
Runtime has casts there and few kernels, so a model that holds it may be refused.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from perwatt.artifact import Artifact
from perwatt.contract import Capabilities, Clock, NodeCost, OperatingPoint, Program, Target, as_calls
from perwatt.errors import BackendError, InputError
from perwatt.measurement import Window
from perwatt.signature import Array, Batch, Signature, TensorSpec
from perwatt.targets import _cpu
from perwatt.targets._onnxruntime_load import (
    NUMPY_TYPES,
    Bound,
    Caller,
    Load,
    Replayed,
    in_words,
    telling_words,
    to_value,
)
from perwatt.targets._onnxruntime_profile import node_costs
from perwatt.targets._onnxruntime_providers import PROVIDERS, Provider, capabilities, chain
from perwatt.targets._run_script import run_script

MANY = (*_cpu.BATCHES, 128, 256)


NOT_WORTH_IT = ("SkipLayerNormFusion",)
"""Measured (bench/suites/onnxruntime_fusions.py): what this fusion makes of an addition and a layer normalization takes three
to five times as long on the CPU as the two apart."""


class ONNXRuntime(Target):
    """Microsoft's runtime, with the execution provider that the variant names."""

    formats = (".ort",)
    variants = tuple(PROVIDERS)
    serves: ClassVar = {"cpu": "", "gpu": "cuda"}

    def __init__(self, variant: str = "") -> None:
        super().__init__(variant)
        self.provider = PROVIDERS[variant]
        self.device = self.provider.device
        # No meter here watches what is neither a CPU nor NVIDIA's.
        self.meter = "auto" if variant in ("cuda", "tensorrt") or self.device == "cpu" else "none"

    def missing(self) -> list[str]:
        package, name = self.provider.package, self.provider.name
        try:
            import onnxruntime
        except ImportError as error:
            return [f"onnxruntime can't be imported ({error}): pip install {package}"]
        here = onnxruntime.get_available_providers()
        if name not in here:
            # All builds are one and the same module, so the other one has to go first.
            instead = f"pip uninstall -y onnxruntime && pip install {package}"
            return [f"this build of onnxruntime has no {name}, only {', '.join(here) or 'none'}: {instead}"]
        # That a build has a provider says nothing about the device and the libraries that it needs.
        return [] if not self.variant else _does_not_start(name, package)

    def capabilities(self) -> Capabilities:
        return capabilities(self.variant)

    def knobs(self, point: OperatingPoint) -> dict[str, tuple[Any, ...]]:
        """On the CPU threads, streams and batch; beside it streams, batch and, where the provider can, recorded calls."""
        if self.device == "cpu":
            return _cpu.knobs(point)
        found: dict[str, tuple[Any, ...]] = {"graphs": (False, True)} if self.provider.graphs else {}
        if point.scenario == "single-stream":
            return found
        return {**({"streams": (1, 2, 4)} if self.provider.concurrent else {}), "batch": MANY, **found}

    def lower(self, artifact: Artifact, point: OperatingPoint) -> Program:
        """Optimize the graph for this machine. Raises BackendError with ONNX Runtime's own words."""
        assert artifact.path is not None, "lowering needs the artifact on disk: call artifact.file(folder) first"
        return ONNXRuntimeProgram(artifact.path, artifact.signature, point, self.variant)

    def profile(
        self, artifact: Artifact, point: OperatingPoint, samples: Sequence[Batch], seconds: float
    ) -> list[NodeCost]:
        """By ONNX Runtime's profiler. Raises BackendError with its own words."""
        assert artifact.path is not None
        with tempfile.TemporaryDirectory(prefix="perwatt-profile-") as folder:
            where = Path(folder) / "profile"
            program = ONNXRuntimeProgram(artifact.path, artifact.signature, point, self.variant, profile=where)
            return node_costs(program, as_calls(artifact.signature, samples, program.batch_size or 1), seconds)

    def load(self, folder: Path, signature: Signature, point: OperatingPoint) -> Program:
        """What `save` wrote. Raises BackendError with ONNX Runtime's own words."""
        own = folder / "model.ort"
        return ONNXRuntimeProgram(own if own.exists() else folder / "model.onnx", signature, point, self.variant)

    def file_signature(self, path: Path) -> Signature:
        """Inputs and outputs of an `.ort` file. Raises InputError where it is none."""
        try:
            session = _session(path, _options({"intra_op_num_threads": 1}), [("CPUExecutionProvider", {})])
        except BackendError as error:
            raise InputError(f"{path} is no ONNX Runtime model that can be read: {error.message}") from error
        return Signature(tuple(map(_spec, session.get_inputs())), tuple(map(_spec, session.get_outputs())))

    def open_file(self, path: Path, signature: Signature, point: OperatingPoint) -> Program:
        """An `.ort` file as it is. Raises BackendError with ONNX Runtime's own words."""
        return ONNXRuntimeProgram(path, signature, point, self.variant)

    def script(self) -> str:
        return run_script(self.provider.package, "onnxruntime_run.py.txt")

    def versions(self) -> dict[str, str]:
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__}


class ONNXRuntimeProgram(Program):
    """One session. Raises BackendError where ONNX Runtime refuses the model or the provider does not start."""

    def __init__(
        self, path: Path, signature: Signature, point: OperatingPoint, variant: str = "", profile: Path | None = None
    ) -> None:
        self.path, self.signature, self.variant = path, signature, variant
        provider, batch = PROVIDERS[variant], signature.batch
        precision = point.floating_precision or next(iter(provider.precisions))
        if precision not in provider.precisions:
            known = ", ".join(provider.precisions)
            raise BackendError(f"ONNX Runtime has no floating precision {precision!r} here: known are {known}")
        self.batch_size = batch if isinstance(batch, int) else None if batch is None else point.batch
        self.streams, threads, of_all = _streams_and_threads(point, provider)
        self.graphs = bool(point.graphs) if provider.graphs else None
        point = replace(point, threads=of_all, streams=self.streams)
        providers = chain(variant, precision, point)
        if variant == "tensorrt" and b"QuantizeLinear" in path.read_bytes():
            providers[0][1]["trt_int8_enable"] = "1"
        # An `.ort` file is optimized already, for the shapes that it was made for.
        overridden = {batch: point.batch} if isinstance(batch, str) and path.suffix != ".ort" else {}
        self.settings: dict[str, Any] = {
            "intra_op_num_threads": threads,
            "inter_op_num_threads": 1,
            "graph_optimization_level": "ORT_ENABLE_ALL",
            "execution_mode": "ORT_SEQUENTIAL",
            "disabled_optimizers": list(NOT_WORTH_IT) if provider.device == "cpu" else [],
            "enable_mem_pattern": variant != "dml",
            "session": _session_config(point, threads),
            "free_dimensions": overridden,
            "providers": providers,
            **({} if profile is None else {"profile": str(profile)}),
        }
        start = time.perf_counter()
        self.session = _session(path, _options(self.settings), providers, self.settings["disabled_optimizers"])
        self.compile_s = time.perf_counter() - start
        self.point = replace(
            point, batch=self.batch_size or 1, floating_precision=precision, requests=None, pinned=None,
            graphs=self.graphs, autotune=point.autotune is not False if variant == "cuda" else None,
        )  # fmt: skip
        self.caller = self._caller()
        self._load: Load | None = None

    def _caller(self) -> Caller:
        return Replayed(self.session, PROVIDERS[self.variant].memory) if self.graphs else Bound(self.session)

    def _generator(self) -> Load:
        if self._load is None:
            # Recorded calls own their memory, so there is one caller for all that runs.
            self._load = Load(lambda: self.caller if self.graphs else self._caller(), self.signature, self.streams)
        return self._load

    def call(self, batch: Batch) -> Batch:
        # By position, not by name: an exporter may have given inputs other names than the source's.
        with in_words():
            self.caller([to_value(batch[spec.name]) for spec in self.signature.inputs])
            found = self.caller.outputs()
        pairs = zip(self.signature.outputs, found, strict=True)
        return {spec.name: _as_declared(spec, array) for spec, array in pairs}

    def drive(self, samples: Sequence[Batch], seconds: float) -> Window:
        """Single-stream: one call after the other. Offline and server: as many at a time as there are streams."""
        streams = 1 if self.point.scenario == "single-stream" else self.streams
        return self._generator().saturated(samples, seconds, streams)

    def serve(self, samples: Sequence[Batch], arrivals_s: Sequence[float], clock: Clock | None = None) -> Window:
        """As many requests under way as there are streams; the others wait their turn."""
        return self._generator().arriving(samples, arrivals_s, clock or Clock(), self.streams)

    def save(self, folder: Path) -> list[Path]:
        """`model.onnx` (or `.ort`) as it was lowered: what ONNX Runtime makes of it is of this machine alone."""
        found = [Path(shutil.copy(self.path, folder / f"model{self.path.suffix}"))]
        beside = self.path.with_name(self.path.name + ".data")
        if beside.exists():
            # External data is found by the name that the model says.
            found.append(Path(shutil.copy(beside, folder / beside.name)))
        return found

    def facts(self) -> dict[str, Any]:
        provider = PROVIDERS[self.variant]
        taken: dict[str, int] = {}
        for part in self.session.get_provider_graph_assignment_info():
            taken[part.ep_name] = taken.get(part.ep_name, 0) + len(part.get_nodes())
        return {
            "backend": "onnxruntime",
            "device": _cpu.cpu_name() if provider.device == "cpu" else provider.name.removesuffix("ExecutionProvider"),
            "execution_precision": self.point.floating_precision,
            "operating_point": self.point.to_json(),
            "compile_s": round(self.compile_s, 3),
            "settings": self.settings,
            "nodes_by_provider": taken,
        }


def _streams_and_threads(point: OperatingPoint, provider: Provider) -> tuple[int, int, int]:
    """Streams, what the session is told, and threads of all streams together. Concurrent calls share one pool, which has
    a thread less than it is told, because a caller works with it: so it is told what the other callers leave."""
    if provider.device != "cpu":
        one_at_a_time = not provider.concurrent or (provider.graphs is not None and point.graphs)
        streams = 1 if one_at_a_time else point.streams or 1
        return streams, 1, streams
    threads = point.threads or _cpu.usable_cpus()
    # Where nothing is asked for: all threads in one call, or, where throughput counts, about four in each of several.
    several = 1 if point.scenario == "single-stream" else max(threads // 4, min(threads, 4))
    streams = point.streams or several
    if point.threads is not None:
        streams = min(streams, point.threads)
    threads = max(threads, streams)
    return streams, threads - streams + 1, threads


def _session_config(point: OperatingPoint, threads: int) -> dict[str, str]:
    spins = point.scenario == "single-stream" and threads > 1
    return {
        "session.intra_op.allow_spinning": "1" if spins else "0",
        "session.inter_op.allow_spinning": "0",
        "session.record_ep_graph_assignment_info": "1",
    }


def _options(settings: dict[str, Any]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.enable_mem_pattern = settings.get("enable_mem_pattern", True)
    options.intra_op_num_threads = settings["intra_op_num_threads"]
    options.inter_op_num_threads = 1
    for key, setting in settings.get("session", {}).items():
        options.add_session_config_entry(key, setting)
    if "profile" in settings:
        options.enable_profiling, options.profile_file_prefix = True, settings["profile"]
    for symbol, size in settings.get("free_dimensions", {}).items():
        options.add_free_dimension_override_by_name(symbol, size)
    return options


def _session(
    path: Path | bytes, options: Any, providers: list[tuple[str, dict[str, str]]], disabled: Sequence[str] = ()
) -> Any:
    import onnxruntime

    wanted = path if isinstance(path, bytes) else str(path)
    try:
        with warnings.catch_warnings():
            # That a provider is not there is said below, as an error.
            warnings.simplefilter("ignore")
            session = onnxruntime.InferenceSession(
                wanted, options, providers=providers, disabled_optimizers=list(disabled), enable_fallback=0
            )
    except Exception as error:
        raise BackendError(f"ONNX Runtime refused the model: {telling_words(error)}") from error
    session.disable_fallback()
    if session.get_providers()[0] != providers[0][0]:
        raise BackendError(
            f"ONNX Runtime did not start {providers[0][0]} and would have run on {session.get_providers()[0]}",
            fix="see that the device, its driver and its libraries are there: `optimize targets`",
        )
    return session


def _does_not_start(name: str, package: str) -> list[str]:
    """Why a session of one node does not start with the provider; empty where it does."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    try:
        _session(model.SerializeToString(), _options({"intra_op_num_threads": 1}), [(name, {})])
    except BackendError as error:
        return [
            f"{name} is there but does not start ({error.message}): it needs its device, a driver and its libraries, "
            f"pip install {package}"
        ]
    return []


def _as_declared(spec: TensorSpec, array: Array) -> Array:
    return array if spec.dtype in ("unknown", str(array.dtype)) else array.astype(spec.dtype)


def _spec(value: Any) -> TensorSpec:
    dims = tuple(
        d if isinstance(d, int) else str(d) if d else f"axis{i}" if i else "batch" for i, d in enumerate(value.shape)
    )
    return TensorSpec(value.name, NUMPY_TYPES.get(value.type, "unknown"), dims)
