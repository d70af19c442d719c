"""Keys of kept results: SHA-256 over all that decided them.

A result that is found again by its key must be the one that would be made now. So a key holds, besides what the result was
made of, perwatt's own source files (an editable install changes without a new version), Python, and the versions of the
packages underneath, absent ones as such.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from perwatt.artifact import Artifact, graphs_of
from perwatt.contract import Capabilities, Pass
from perwatt.data import Samples
from perwatt.datasets_callable import callable_file, is_callable_spec
from perwatt.recipe import Recipe

OWN = ("perwatt", "perwatt.passes", "perwatt.kernels", "perwatt.targets", "perwatt.bench")
PACKAGES = (
    "perwatt", "numpy", "ml-dtypes", "scipy", "numba", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "openvino", "nncf", "tensorrt", "torch", "transformers", "tokenizers", "safetensors", "pillow", "optuna",
)  # fmt: skip
"""Whatever may have a part in a result."""
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def digest(plain: Any) -> str:
    """SHA-256 over plain data, whatever the order of its keys. Raises TypeError for what is no plain data."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@cache
def environment() -> dict[str, Any]:
    """perwatt's source, Python, packages, third parties' passes and targets, and the driver, as they were when this process
    first asked."""
    brought = [entry for group in ("perwatt.passes", "perwatt.targets") for entry in entry_points(group=group)]
    return {
        "source": own_source(),
        "python": platform.python_version(),
        "machine": [platform.system(), platform.machine()],
        "packages": {name: _version(name) for name in PACKAGES},
        "third parties": sorted(f"{e.name}={e.value} {e.dist.version if e.dist is not None else ''}" for e in brought),
        "driver": _text(NVIDIA_DRIVER),
    }


def own_source() -> str:
    """SHA-256 over the files of perwatt's packages."""
    sha = hashlib.sha256()
    for package in OWN:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            for file in sorted(Path(folder).iterdir()):
                if file.is_file():
                    sha.update(f"{package}/{file.name} {file_digest(file)}\n".encode())
    return sha.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


# Steps of pipelines ---------------------------------------------------------------------------------------------------


class StepKeys:
    """Keys of the steps that the pipelines of one run take."""

    def __init__(
        self,
        recipe: Recipe,
        original: Artifact,
        samples: Mapping[str, Samples],
        machine: Mapping[str, Any],
        made_up: bool,
    ) -> None:
        """`samples` by role, those that judge included: what is lossy may depend on them by the drop that is allowed.
        `machine`: the fingerprint of the one that measures."""
        held = {role: [found.digest(), found.batch_size] for role, found in samples.items()}
        self._seen: WeakKeyDictionary[Artifact, str] = WeakKeyDictionary()
        self._always = digest(
            {
                "environment": environment(),
                "original": self.seen(original),
                "samples": {role: told for role, told in held.items() if role != "confirm"},
                "made up": made_up,
                "seed": recipe.seed,
            }
        )
        # Time is no part of it: what the deadline decided is not kept.
        self._lossy = recipe.budget.model_dump(mode="json", exclude={"time"})
        self._measured = {
            "machine": dict(machine),
            "target": recipe.target.model_dump(mode="json"),
            "metric": metric_key(recipe.data.metric),
            "confirm": held.get("confirm"),
        }

    def key(self, artifact: Artifact, made_by: Pass, capabilities: Capabilities, target: str) -> str | None:
        """The key of a pass on a model; None where its settings are no plain data. `capabilities` are what it sees of them."""
        facts = {
            "always": self._always,
            "artifact": self.seen(artifact),
            "pass": [made_by.name(), type(made_by).__qualname__, _source_of(type(made_by))],
            "capabilities": asdict(capabilities),
            "budget": self._lossy if made_by.tolerance is None else None,
            "measured": [target, self._measured] if made_by.measures else None,
        }
        try:
            return digest({**facts, "settings": made_by.settings()})
        except (TypeError, ValueError):
            return None

    def seen(self, artifact: Artifact) -> str:
        """`what_is_seen` of it; found once for each artifact."""
        if artifact not in self._seen:
            self._seen[artifact] = what_is_seen(artifact)
        return self._seen[artifact]


def metric_key(name: str | None) -> list[str | None]:
    """A metric's name and, where it is somebody's own, its source."""
    return [name, _text(callable_file(name)) if name is not None and is_callable_spec(name) else None]


def what_is_seen(artifact: Artifact) -> str:
    """SHA-256 over all that a pass sees of an artifact: beside the model's digest its history, and what the digest leaves
    out: names of nodes, and types and shapes that were noted."""
    sha = hashlib.sha256(artifact.digest().encode())
    sha.update(json.dumps([[step.name, step.settings] for step in artifact.steps], sort_keys=True).encode())
    for graph in graphs_of(artifact.model):
        weights = sorted(graph.initializers.values(), key=lambda value: str(value.name))
        sha.update(repr([(str(value.dtype), str(value.shape)) for value in weights]).encode())
        for node in graph:
            noted = [(str(value.dtype), str(value.shape)) for value in node.outputs]
            sha.update(repr((node.name or "", noted)).encode())
    return sha.hexdigest()


@cache
def _source_of(cls: type[Pass]) -> str | None:
    """Of the file that a pass is defined in: a third party's is none of perwatt's."""
    try:
        file = inspect.getsourcefile(cls)
        return None if file is None else file_digest(Path(file))
    except (OSError, TypeError):
        return None
