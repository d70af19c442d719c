"""What an engine says of itself: the files beside it, whether it fits this machine, and the types its layers run in.

An engine is machine code for one version of TensorRT and one kind of GPU. `engine.json` says for which, and an engine
that does not fit is refused before TensorRT sees it, with the way to build it again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perwatt.errors import TargetError
from perwatt.targets._tensorrt_bindings import bindings, version
from perwatt.targets._tensorrt_build import Built
from perwatt.targets._tensorrt_cuda import Device

if TYPE_CHECKING:
    import tensorrt as trt  # type: ignore[import-not-found, unused-ignore]

ENGINE, FACTS = "model.engine", "engine.json"
REBUILD = "build it again here from the bundle's model.onnx: optimize BUNDLE --target tensorrt"

TYPES = (
    ("float4", r"fp4|e2m1"), ("float8", r"fp8|float8|e4m3"), ("int4", r"int4"), ("int8", r"\bint8"),
    ("bfloat16", r"bf16|bfloat16"), ("float16", r"fp16|half|float16"), ("float32", r"fp32|tf32|\bfloat\b|float32"),
)  # fmt: skip
"""Our names, and what of the inspector's words says them; narrowest first. Integers that are no arithmetic are left out."""


def write(built: Built, folder: Path) -> list[Path]:
    """The engine and what it is for, into `folder`."""
    (folder / ENGINE).write_bytes(built.engine)
    (folder / FACTS).write_text(json.dumps(built.facts, indent=2) + "\n")
    return [folder / ENGINE, folder / FACTS]


def read(folder: Path, device: Device, batch: int | None) -> Built:
    """What `write` wrote. Raises TargetError where it is not whole, or was not built for this TensorRT, this GPU or
    calls of `batch` items."""
    try:
        engine = (folder / ENGINE).read_bytes()
        facts = json.loads((folder / FACTS).read_text())
        reasons = list(_misfits(engine, facts, device, batch))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{folder} holds no engine that can be read: {error!r}", fix=REBUILD) from error
    if reasons:
        raise TargetError(f"the engine in {folder} {' and '.join(reasons)}", fix=REBUILD)
    return Built(engine, facts, 0.0)


def _misfits(engine: bytes, facts: dict[str, Any], device: Device, batch: int | None) -> Iterator[str]:
    if hashlib.sha256(engine).hexdigest() != facts["engine_sha256"]:
        yield f"is not the one that {FACTS} describes"
    if facts["tensorrt"] != version():
        yield f"was built by TensorRT {facts['tensorrt']}, here is {version()}"
    capability = "{}.{}".format(*device.compute_capability)
    if (facts["gpu"], facts["compute_capability"]) != (device.name, capability):
        yield f"was built for {facts['gpu']} (compute capability {facts['compute_capability']}), here is {device.name}"
    if facts["batch"] != batch:
        yield f"was built for calls of {facts['batch']} items, not {batch}"


def layer_types(engine: trt.ICudaEngine) -> dict[str, int]:
    """How many layers run in each type, most first; empty where the engine does not tell."""
    trt = bindings()
    inspector = engine.create_engine_inspector()
    if inspector is None:
        return {}
    try:
        told = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        layers = told["Layers"]
    except (ValueError, KeyError, TypeError):
        return {}
    return dict(Counter(kind for layer in layers if (kind := _layer_type(layer))).most_common())


def _layer_type(layer: Any) -> str | None:
    """The narrowest type among a layer's inputs: a convolution of int8 that gives float16 is one of int8."""
    if not isinstance(layer, dict):
        return None
    # TensorRT 10 says "Format/Datatype", 11 has a field of its own.
    words = " ".join(
        str(tensor.get(key, ""))
        for tensor in layer.get("Inputs") or layer.get("Outputs") or []
        for key in ("DataType", "Datatype", "Format/Datatype")
        if isinstance(tensor, dict)
    )
    return next((name for name, pattern in TYPES if re.search(pattern, words, re.IGNORECASE)), None)


def execution_precision(types: dict[str, int], floating_precision: str) -> str:
    """`int8 + tf32`: what layers run in, most first."""
    names = [floating_precision if name == "float32" else name for name in types]
    return " + ".join(names) or f"as the graph says ({floating_precision} for float32)"
