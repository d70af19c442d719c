"""From an ONNX file to a serialized TensorRT engine, and the facts by which the engine is known again.

Networks are strongly typed: what the file says is what runs (TensorRT 11 knows nothing else, 10 is told so). Only the
arithmetic of float32 products is a choice: TensorFloat-32, TensorRT's own default, or full float32.

The batch axis is fixed at the operating point's batch, because kernels are chosen for one shape. Every other dynamic
dimension gets a range: `Bounds`, by name, else the default for a sequence or a picture. Calls outside it are refused.

Kernel timings are kept in `~/.cache/perwatt/tensorrt/<gpu>-<version>.timing`: the next build on this GPU measures only
what is new.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perwatt.artifact import Artifact
from perwatt.contract import OperatingPoint
from perwatt.errors import BackendError
from perwatt.signature import Signature, TensorSpec
from perwatt.targets._tensorrt_bindings import Log, bindings, last_words, major, version
from perwatt.targets._tensorrt_cuda import Device
from perwatt.targets._tensorrt_refusal import parser_refusals, refused
from perwatt.targets._tensorrt_sparsity import sparse_weights

if TYPE_CHECKING:
    import tensorrt as trt  # type: ignore[import-not-found, unused-ignore]

OPTIMIZATION_LEVEL = 3
"""TensorRT's default, of 0 to 5."""

AUTOTUNED_LEVEL = 5
"""Compares every kernel there is, also those generated for this shape; builds take several times as long."""

WORKSPACE_SHARE = 0.8
"""Of the memory that is free: a kernel's scratch space may take so much, the rest stays for contexts and others."""

KEPT_ENGINES = 2
"""Built engines kept in memory: other streams or graphs of the same model need no new build."""


@dataclass(frozen=True)
class Range:
    """What a dynamic dimension may be: `low` to `high`; kernels are chosen for `usual`."""

    low: int
    usual: int
    high: int


@dataclass(frozen=True)
class Bounds:
    """Ranges of dynamic dimensions other than the batch axis: by the dimension's name where `named` has it, else
    `picture` for the third axis on of inputs with four or more, and `sequence` for all others."""

    sequence: Range = Range(1, 128, 512)
    picture: Range = Range(32, 224, 1024)
    named: Mapping[str, Range] = field(default_factory=dict)

    def of(self, spec: TensorSpec, axis: int) -> Range:
        """The range of `axis` of `spec`, which is dynamic there."""
        assert spec.shape is not None
        spatial = len(spec.shape) >= 4 and axis >= 2
        return self.named.get(str(spec.shape[axis]), self.picture if spatial else self.sequence)


Shapes = dict[str, list[list[int]]]
"""Input name → its [smallest, usual, largest] shape."""


@dataclass(frozen=True)
class Built:
    """A serialized engine and what there is to know about it (plain data, what `engine.json` holds)."""

    engine: bytes
    facts: dict[str, Any]
    compile_s: float


_kept: OrderedDict[str, Built] = OrderedDict()


def profile_shapes(signature: Signature, batch: int, bounds: Bounds) -> Shapes:
    """[smallest, usual, largest] shape of each input that has a dynamic dimension. Raises BackendError where a rank is
    unknown."""
    shapes: Shapes = {}
    for spec in signature.inputs:
        if spec.shape is None:
            raise BackendError(f"TensorRT wants the rank of every input, that of {spec.name} is unknown")
        if all(isinstance(dim, int) for dim in spec.shape):
            continue
        ranges = [_range(signature, spec, axis, batch, bounds) for axis in range(len(spec.shape))]
        shapes[spec.name] = [[r.low for r in ranges], [r.usual for r in ranges], [r.high for r in ranges]]
    return shapes


def _range(signature: Signature, spec: TensorSpec, axis: int, batch: int, bounds: Bounds) -> Range:
    assert spec.shape is not None
    dim = spec.shape[axis]
    if isinstance(dim, int):
        return Range(dim, dim, dim)
    return Range(batch, batch, batch) if dim == signature.batch else bounds.of(spec, axis)


def floating_precisions(capability: tuple[int, int]) -> tuple[str, ...]:
    """What float32 products may run in on a GPU of that compute capability, TensorRT's default first."""
    return ("tf32", "f32") if capability >= (8, 0) else ("f32",)


def build(artifact: Artifact, point: OperatingPoint, device: Device, bounds: Bounds) -> Built:
    """The engine for `artifact` at `point`; the same one where it was built a moment ago. Raises BackendError with the
    parser's or the builder's own words."""
    facts = _settings(artifact, point, device, bounds)
    key = repr(sorted(facts.items()))
    if key in _kept:
        _kept.move_to_end(key)
        return _kept[key]
    start = time.perf_counter()
    assert artifact.path is not None
    engine, cached = _built(artifact.path, facts, device)
    facts |= {"engine_sha256": hashlib.sha256(engine).hexdigest(), "timing_cache": cached}
    _kept[key] = Built(engine, facts, time.perf_counter() - start)
    while len(_kept) > KEPT_ENGINES:
        _kept.popitem(last=False)
    return _kept[key]


def _settings(artifact: Artifact, point: OperatingPoint, device: Device, bounds: Bounds) -> dict[str, Any]:
    """What decides the engine: two builds of equal settings give engines that may stand for each other."""
    known = floating_precisions(device.compute_capability)
    precision = point.floating_precision or known[0]
    if precision not in known:
        raise BackendError(
            f"TensorRT has no floating precision {precision!r} on this GPU: known are {', '.join(known)}",
            fix="bfloat16 and float16 are casts in the graph: the pass cast-half writes them",
        )
    sparse = sparse_weights(artifact) if device.compute_capability >= (8, 0) else []
    return {
        "tensorrt": version(),
        "gpu": device.name,
        "compute_capability": "{}.{}".format(*device.compute_capability),
        "batch": batch_size(artifact.signature, point),
        "profile": profile_shapes(artifact.signature, point.batch, bounds),
        "floating_precision": precision,
        "optimization_level": AUTOTUNED_LEVEL if point.autotune else OPTIMIZATION_LEVEL,
        "sparse_weights": len(sparse),
        "model_digest": artifact.digest(),
    }


def batch_size(signature: Signature, point: OperatingPoint) -> int | None:
    """Items in one call: the point's batch, the model's own where that is fixed, None without a batch axis."""
    return point.batch if isinstance(signature.batch, str) else signature.batch


def _built(path: Path, facts: dict[str, Any], device: Device) -> tuple[bytes, str]:
    """The engine, and what became of the timing cache."""
    trt = bindings()
    log = Log()
    try:
        builder = trt.Builder(log.logger)
    except (TypeError, RuntimeError) as error:
        raise BackendError(f"TensorRT does not start: {last_words(log, str(error))}") from error
    # TensorRT 11 has the flag without a meaning; it is set where it means something.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if major() < 11 else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log.logger)
    # From the file, not from its bytes: weights may lie beside it.
    if not parser.parse_from_file(str(path)):
        raise refused(parser_refusals(parser), last_words(log))
    config = builder.create_builder_config()
    _configure(config, facts, device)
    _check_inputs(network)
    if facts["profile"]:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in facts["profile"].items():
            profile.set_shape(name, low, usual, high)
        if config.add_optimization_profile(profile) < 0:
            raise BackendError(f"TensorRT refused the shapes {facts['profile']}: {last_words(log)}")
    cache = timing_cache_path(device)
    known = _load_timings(config, cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError(f"TensorRT could not build the engine: {last_words(log)}")
    return bytes(engine), f"{known} bytes known, {_save_timings(config, cache)}"


def _configure(config: trt.IBuilderConfig, facts: dict[str, Any], device: Device) -> None:
    trt = bindings()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(device.free_bytes() * WORKSPACE_SHARE))
    config.builder_optimization_level = facts["optimization_level"]
    # The inspector tells layers and their types only then; it costs a few kilobytes of engine and no speed.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if facts["floating_precision"] == "tf32":
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if facts["sparse_weights"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)


def _check_inputs(network: trt.INetworkDefinition) -> None:
    """Raise BackendError for an input whose values decide shapes: their range would have to be known."""
    for position in range(network.num_inputs):
        tensor: trt.ITensor = network.get_input(position)
        if tensor.is_shape_tensor:
            raise BackendError(
                f"the values of input {tensor.name} decide shapes inside the model, and TensorRT wants to know their range",
                fix="make them constants when the model is exported",
            )


def timing_cache_path(device: Device) -> Path | None:
    """Where kernel timings of this GPU and version are kept; None where there is no home folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The specification has relative paths ignored.
        home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:
        return None
    gpu = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return home / "perwatt" / "tensorrt" / f"{gpu}-{version()}.timing"


def _load_timings(config: trt.IBuilderConfig, path: Path | None) -> int:
    """Give the builder what is known; a cache that TensorRT refuses is begun anew. Returns the bytes that were taken."""
    try:
        content = path.read_bytes() if path is not None else b""
    except OSError:
        content = b""
    for attempt in dict.fromkeys((content, b"")):
        cache: trt.ITimingCache = config.create_timing_cache(attempt)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return len(attempt)
    return 0


def _save_timings(config: trt.IBuilderConfig, path: Path | None) -> str:
    """Write what the builder knows now, whole or not at all; says what was done. A cache is never worth an error."""
    cache: trt.ITimingCache = config.get_timing_cache()
    if cache is None or path is None:
        return "not kept"
    content = bytes(cache.serialize())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        return f"not kept ({error.strerror})"
    return f"{len(content)} bytes kept"
