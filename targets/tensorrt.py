"""TensorRT 10 and 11 on NVIDIA GPUs: strongly typed networks from the ONNX file, engines for one GPU and one batch.

What the file says is what runs: quantization is Q/DQ in the graph, half precision is casts in the graph; the operating
point's floating precision only says how float32 products are computed (`tf32`, TensorRT's default, or `f32`).
CUDA graphs are on unless the operating point says otherwise. `streams` is how many calls are under way at once, each
with a context of its own; there is no queue behind them, so `requests` is the same number.

Limits: an output whose shape depends on the data, and an input whose values decide shapes, are refused. An engine runs
only where it was built; the bundle's model.onnx is what travels.
"""

# The pieces: _tensorrt_build (engine), _tensorrt_engine (files, inspector), _tensorrt_slot (one call), _tensorrt_load
# (load), _tensorrt_cuda and _tensorrt_torch (CUDA), _tensorrt_refusal (errors), _tensorrt_trtexec (a script for people
# without perwatt).

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from perwatt.artifact import Artifact
from perwatt.contract import Capabilities, Clock, OperatingPoint, Program, QuantizationStyle, Target
from perwatt.errors import BackendError, TargetError
from perwatt.measurement import Window
from perwatt.signature import Batch, Signature, TensorSpec
from perwatt.targets._run_script import run_script
from perwatt.targets._tensorrt_bindings import OLDEST, Log, bindings, major, opened, version
from perwatt.targets._tensorrt_build import Bounds, Built, batch_size, build, floating_precisions
from perwatt.targets._tensorrt_cuda import Device, find_device
from perwatt.targets._tensorrt_engine import execution_precision, layer_types, read, write
from perwatt.targets._tensorrt_load import Load
from perwatt.targets._tensorrt_slot import Slot, Staged
from perwatt.targets._tensorrt_trtexec import trtexec_script

LEAST_CAPABILITY = (7, 5)
"""Turing: the oldest that both versions run on; what is assumed where no GPU is there to be asked."""
PORTABLE_CAPABILITY = (8, 0)
"""What a portable bundle is prepared for."""

BATCHES = (1, 8, 32, 128)
"""Few, because each costs a build."""

STREAMS = (1, 2, 3, 4)
DEFAULT_STREAMS = {"single-stream": 1, "offline": 2, "server": 2}
"""Two hide the copies of one call behind the arithmetic of the other."""


class TensorRT(Target):
    """NVIDIA's runtime.

    `bounds` says what dynamic dimensions other than the batch may be; set it before `lower`."""

    preference = 2
    serves: ClassVar = {"gpu": ""}
    fixed_once_saved: ClassVar = ("batch", "floating_precision", "autotune")
    device: Literal["cpu", "gpu"] = "gpu"
    bounds: Bounds = Bounds()

    def missing(self) -> list[str]:
        try:
            bindings()
        except ImportError as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            return [f"tensorrt can't be imported ({first}): pip install tensorrt, which brings its libraries"]
        if major() < OLDEST:
            return [f"TensorRT {version()} is too old: pip install 'tensorrt>={OLDEST}'"]
        try:
            find_device()
        except TargetError as error:
            return [f"{error.message}: {error.fix}"]
        return []

    def capabilities(self) -> Capabilities:
        """What this GPU rewards; without one, what every GPU does that TensorRT runs on."""
        try:
            capability = find_device().compute_capability
        except TargetError:
            capability = LEAST_CAPABILITY
        return self._of(capability)

    def _of(self, capability: tuple[int, int]) -> Capabilities:
        ampere = capability >= (8, 0)
        # TensorRT takes no unsigned ones.
        styles = [QuantizationStyle("symmetric", "int8", "int8", True, True, unsigned_activations=False)]
        if capability >= (8, 9):
            styles.append(QuantizationStyle("float8", "float8_e4m3fn", "float8_e4m3fn", True, weight_per_channel=False))
        return Capabilities(
            isa=("sm_{}{}".format(*capability),),
            floating_precisions=floating_precisions(capability),
            half_types=("float16", "bfloat16") if ampere else ("float16",),
            sparse_types=("float16", "bfloat16", "int8") if ampere else (),
            sparse_patterns=("2:4",) if ampere else (),
            # What fills the tensor cores: below it TensorRT pads.
            channel_multiples={"int8": 16, "float16": 8, **({"bfloat16": 8, "float32": 4} if ampere else {})},
            quantization_styles=tuple(styles),
        )

    def portable(self) -> Capabilities:
        """What every GPU since Ampere rewards."""
        return self._of(PORTABLE_CAPABILITY)

    def build_script(self, models: Sequence[str], signature: Signature, batch: int) -> tuple[str, str]:
        """`trtexec.sh`: builds and times them with TensorRT's own tool."""
        return "trtexec.sh", trtexec_script(models, signature, batch=batch, bounds=self.bounds)

    def knobs(self, point: OperatingPoint) -> dict[str, tuple[Any, ...]]:
        found: dict[str, tuple[Any, ...]] = {"graphs": (None, False), "autotune": (None, True)}
        if point.scenario != "single-stream":
            found |= {
                "batch": BATCHES,
                "streams": (None, *(n for n in STREAMS if n != DEFAULT_STREAMS[point.scenario])),
            }
        return found

    def lower(self, artifact: Artifact, point: OperatingPoint) -> Program:
        """Parse, choose kernels by measuring them, load. Raises BackendError with TensorRT's own words and what would
        help."""
        assert artifact.path is not None, "lowering needs the artifact on disk: call artifact.file(folder) first"
        device = find_device()
        built = build(artifact, point, device, self.bounds)
        return TensorRTProgram(built, artifact.signature, point, device)

    def load(self, folder: Path, signature: Signature, point: OperatingPoint) -> Program:
        """The engine that `save` wrote. Raises TargetError where it was built for another TensorRT, GPU or batch."""
        device = find_device()
        built = read(folder, device, batch_size(signature, point))
        return TensorRTProgram(built, signature, point, device)

    def script(self) -> str:
        return run_script("tensorrt cuda-python", "tensorrt_run.py.txt")

    def versions(self) -> dict[str, str]:
        return {"tensorrt": version(), **find_device().versions()}


class TensorRTProgram(Program):
    """An engine with a context for every call under way."""

    def __init__(self, built: Built, signature: Signature, point: OperatingPoint, device: Device) -> None:
        self.built, self.signature, self.device = built, signature, device
        self.batch_size = batch_size(signature, point)
        streams = point.streams or DEFAULT_STREAMS[point.scenario]
        self.log = Log()
        # The runtime has to outlive the engine.
        self.runtime, self.engine = opened(built.engine, self.log)
        graphs = point.graphs is not False
        self.slots = [Slot(self.engine, device, self.log, graphs) for _ in range(streams)]
        self._check_names()
        self.generator = Load(self.slots, device, signature)
        self.staging: Staged | None = None
        self.point = OperatingPoint(
            scenario=point.scenario,
            batch=self.batch_size or 1,
            streams=streams,
            requests=streams,
            floating_precision=built.facts["floating_precision"],
            graphs=graphs,
            autotune=point.autotune,
        )
        self._warm_up()

    def call(self, batch: Batch) -> Batch:
        slot = self.slots[0]
        if self.staging is None or not self.staging.fits(slot.inputs, batch):
            self.staging = Staged(self.device, slot.inputs, batch)
        else:
            self.staging.fill(slot.inputs, batch)
        slot.begin(self.staging)
        slot.stream.synchronize()
        found = slot.results()
        return {spec.name: self._as_declared(spec, found[spec.name]) for spec in self.signature.outputs}

    def _as_declared(self, spec: TensorSpec, array: Any) -> Any:
        return array if spec.dtype in ("unknown", str(array.dtype)) else array.astype(spec.dtype)

    def drive(self, samples: Sequence[Batch], seconds: float) -> Window:
        """Single-stream: one call after the other. Offline and server: a call under way in every stream."""
        if self.point.scenario == "single-stream":
            return self.generator.one_by_one(samples, seconds)
        return self.generator.saturated(samples, seconds)

    def serve(self, samples: Sequence[Batch], arrivals_s: Sequence[float], clock: Clock | None = None) -> Window:
        """As many requests under way as there are streams; the others wait their turn."""
        return self.generator.arriving(samples, arrivals_s, clock or Clock())

    def save(self, folder: Path) -> list[Path]:
        """`model.engine`, and `engine.json` that says for which TensorRT, GPU, batch and shapes it is."""
        return write(self.built, folder)

    def facts(self) -> dict[str, Any]:
        known = self.built.facts
        types = layer_types(self.engine)
        refused = next((slot.no_graph for slot in self.slots if slot.no_graph), None)
        return {
            "backend": "tensorrt",
            "device": self.device.name,
            "execution_precision": execution_precision(types, known["floating_precision"]),
            "operating_point": self.point.to_json(),
            "compile_s": round(self.built.compile_s, 3),
            "settings": {
                name: known[name] for name in ("profile", "floating_precision", "optimization_level", "sparse_weights")
            },
            "layer_types": types,
            "timing_cache": known["timing_cache"],
            **({"no_graphs_because": refused} if refused else {}),
        }

    def _check_names(self) -> None:
        slot = self.slots[0]
        here = sorted(port.name for port in slot.inputs), sorted(port.name for port in slot.outputs)
        wanted = sorted(s.name for s in self.signature.inputs), sorted(s.name for s in self.signature.outputs)
        if here != wanted:
            raise BackendError(
                f"the engine has the inputs {here[0]} and outputs {here[1]}, not {wanted[0]} and {wanted[1]}"
            )

    def _warm_up(self) -> None:
        """Two calls on zeros in every slot: what TensorRT puts off to the first call, and the record of a graph, are no
        part of a measurement, and an engine that fails does so here."""
        usual = {name: shapes[1] for name, shapes in self.built.facts["profile"].items()}
        zeros = {
            spec.name: np.zeros(tuple(usual.get(spec.name, spec.shape or ())), _dtype(self.slots[0], spec.name))
            for spec in self.signature.inputs
        }
        for slot in self.slots:
            staged = Staged(self.device, slot.inputs, zeros)
            for _ in range(2):
                slot.begin(staged)
                slot.stream.synchronize()
        if any(slot.no_graph for slot in self.slots):
            self.point = replace(self.point, graphs=False)


def _dtype(slot: Slot, name: str) -> np.dtype[Any]:
    return next(port.dtype for port in slot.inputs if port.name == name)
