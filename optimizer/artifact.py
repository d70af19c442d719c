"""`Artifact`: a model on its way through the compiler. Immutable, digested by content, cheap to hand around.

An artifact holds one `onnx_ir.Model` (or only the path of its file until somebody looks inside), its signature, and the
steps that made it. Whoever wants to change a model calls `edit()`, changes the copy, and calls `after()`: weights are
read-only arrays shared between artifacts, so the copy costs the graph and not the weights, and each array is digested
once. Beside the ONNX file stands a small JSON sidecar, so that a worker knows signature and digest without parsing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perwatt.errors import InputError
from perwatt.signature import Signature, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

EXTERNAL_DATA_ABOVE_BYTES = 1_500_000_000
"""Above this size weights go beside the file (a protobuf message ends at 2 GB)."""

_DIGEST_KEY = "perwatt.digest"


@dataclass(frozen=True)
class Step:
    """One thing that happened to the model: a pass (or the reading) with its settings and what it changed."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    changes: tuple[str, ...] = ()


class Artifact:
    """A model, its signature and its history. Treat everything reachable from it as read-only."""

    def __init__(
        self,
        *,
        model: ir.Model | None = None,
        path: Path | None = None,
        signature: Signature | None = None,
        steps: tuple[Step, ...] = (),
        digest: str | None = None,
    ) -> None:
        if model is None and path is None:
            raise ValueError("an artifact needs a model or a path")
        if model is not None:
            freeze(model)
        self._model = model
        self._signature = signature
        self._digest = digest
        self.path = path
        self.steps = steps

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """The artifact saved at `path` (an `.onnx` file, with its sidecar where perwatt wrote it)."""
        path = Path(path)
        sidecar = _sidecar(path)
        if not sidecar.exists():
            return cls(path=path)
        facts = json.loads(sidecar.read_text())
        return cls(
            path=path,
            digest=facts["digest"],
            signature=signature_from_json(facts["signature"]),
            steps=tuple(Step(s["name"], s["settings"], tuple(s["changes"])) for s in facts["steps"]),
        )

    @property
    def model(self) -> ir.Model:
        """The graph. Never change it: `edit()` gives a copy for that."""
        if self._model is None:
            import onnx_ir as ir

            try:
                self._model = ir.load(str(self.path))
            except Exception as error:
                # Protobuf, the file system and onnx_ir have errors of their own, with no common base.
                words = " ".join(str(error).split())[:200]
                raise InputError(f"{self.path} is no ONNX model that can be read: {words}") from error
        return self._model

    def release(self) -> None:
        """Forget the graph in memory where a file holds it, which it is read from when it is wanted again."""
        if self.path is not None and self.path.exists():
            self.signature, self.digest()
            self._model = None

    @property
    def signature(self) -> Signature:
        """Typed inputs and outputs, in order."""
        if self._signature is None:
            self._signature = read_signature(self.model)
        return self._signature

    def digest(self) -> str:
        """SHA-256 over structure and tensors, in hexadecimal. Equal digests mean equal models."""
        if self._digest is None:
            self._digest = model_digest(self.model)
        return self._digest

    def edit(self) -> ir.Model:
        """A copy of the graph to change; weights are shared and stay read-only."""
        model = self.model.clone()
        for graph in graphs_of(model):
            values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
            for value in values:
                # onnx_ir's clone copies shapes and shares types, and types can be changed in place.
                value.type = copy(value.type)
        return model

    def after(self, model: ir.Model, step: Step) -> Artifact:
        """The artifact that `step` made of this one."""
        return Artifact(model=model, steps=(*self.steps, step))

    def with_steps(self, steps: tuple[Step, ...]) -> Artifact:
        """The same model with another history."""
        return Artifact(model=self._model, path=self.path, signature=self._signature, steps=steps, digest=self._digest)

    def save(self, path: str | Path) -> Path:
        """Write the ONNX file (weights beside it above 1.5 GB) and its sidecar; remembers where."""
        import onnx_ir as ir

        path = Path(path)
        external = path.name + ".data" if self.size_bytes() > EXTERNAL_DATA_ABOVE_BYTES else None
        model = self.model
        if external is None and any(isinstance(t, ir.ExternalTensor) for t in _weights(model)):
            # Written as they are, they would name a file beside the model they came from.
            model = ir.external_data.load_to_model(self.edit())
        ir.save(model, str(path), external_data=external)
        facts = {"digest": self.digest(), "signature": asdict(self.signature), "steps": [asdict(s) for s in self.steps]}
        _sidecar(path).write_text(json.dumps(facts))
        if self.path is None:
            self.path = path
        return path

    def file(self, folder: str | Path) -> Path:
        """A file that holds this model: where it was saved, else saved now into `folder` under its digest."""
        if self.path is None:
            self.save(Path(folder) / f"{self.digest()[:24]}.onnx")
        assert self.path is not None
        return self.path

    def size_bytes(self) -> int:
        """Bytes of all weights, each shared array counted once."""
        return sum({id(tensor): tensor.nbytes for tensor in _weights(self.model)}.values())

    def operator_counts(self) -> dict[str, int]:
        """How many nodes of each operator there are, subgraphs included; constants are not operators."""
        counts = Counter(n.op_type for graph in graphs_of(self.model) for n in graph if n.op_type != "Constant")
        return dict(counts.most_common())

    def __repr__(self) -> str:
        return f"Artifact({self.digest()[:12]}, {len(self.steps)} steps)"


def graphs_of(model: ir.Model) -> Iterator[Any]:
    """The main graph, every subgraph and every function body."""
    yield model.graph
    yield from model.graph.subgraphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.subgraphs()


def external_files(path: Path) -> list[str]:
    """Names of the files that the ONNX model at `path` says its weights are in, sorted; empty where it can't be read, which
    whoever opens it tells with more words."""
    import onnx_ir as ir

    try:
        graphs = list(graphs_of(ir.load(str(path))))
    except Exception:
        return []
    tensors = [value.const_value for graph in graphs for value in graph.initializers.values()]
    tensors += [
        attribute.value for graph in graphs for node in graph for attribute in node.attributes.values()
        if attribute.type.name == "TENSOR"
    ]  # fmt: skip
    return sorted({str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)})


def _weights(model: ir.Model) -> Iterator[Any]:
    """The tensor of every initializer, subgraphs included; one that several share comes several times."""
    for graph in graphs_of(model):
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)


def freeze(model: ir.Model) -> None:
    """Make every in-memory weight read-only and contiguous, and free of whatever framework it came from."""
    import onnx_ir as ir

    for graph in graphs_of(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor | ir.StringTensor | ir.TensorProtoTensor):
                continue
            strided = isinstance(tensor, ir.Tensor) and not tensor.numpy().flags.c_contiguous
            if strided or isinstance(tensor, ir.LazyTensor) or type(tensor).__module__.startswith("torch."):
                # Framework tensors keep a whole framework alive, and can be changed behind our back; what hashes and
                # writes bytes wants them in order.
                value.const_value = ir.Tensor(tensor.numpy().copy(order="C"), dtype=tensor.dtype, name=tensor.name)
            if isinstance(value.const_value, ir.Tensor) and isinstance(value.const_value.raw, np.ndarray):
                value.const_value.raw.flags.writeable = False


def read_signature(model: ir.Model) -> Signature:
    """Inputs (initializers listed as inputs are not inputs) and outputs of `model`."""
    initializers = model.graph.initializers
    inputs = tuple(_spec(value) for value in model.graph.inputs if value.name not in initializers)
    return Signature(inputs, tuple(_spec(value) for value in model.graph.outputs))


def _spec(value: Any) -> TensorSpec:
    if value.shape is None:
        return TensorSpec(value.name, _numpy_name(value.dtype), None)
    dims: list[int | str] = []
    for axis, dim in enumerate(value.shape):
        if isinstance(dim, int) and dim >= 0:
            dims.append(dim)
        elif isinstance(dim, int) or getattr(dim, "value", None) is None:
            # Old exporters leave dynamic axes unnamed; the first is the batch in all that was seen.
            dims.append("batch" if axis == 0 else f"{value.name}_{axis}")
        else:
            dims.append(str(dim.value))
    return TensorSpec(value.name, _numpy_name(value.dtype), tuple(dims))


def _numpy_name(dtype: Any) -> str:
    return "unknown" if dtype is None or dtype.name == "UNDEFINED" else str(np.dtype(dtype.numpy()).name)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def signature_from_json(facts: dict[str, Any]) -> Signature:
    """The signature that `dataclasses.asdict` made plain data of."""

    def specs(entries: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(e["name"], e["dtype"], tuple(e["shape"]) if e["shape"] is not None else None) for e in entries
        )

    return Signature(specs(facts["inputs"]), specs(facts["outputs"]))


def tensor_digest(tensor: Any) -> str:
    """SHA-256 of type, shape and content of one tensor; computed once for each tensor object."""
    known = tensor.meta.get(_DIGEST_KEY)
    if known is None:
        sha = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.dtype.name == "STRING":
            for text in tensor.string_data():
                sha.update(len(text).to_bytes(8, "little") + text)
        else:
            sha.update(tensor.tobytes())
        known = tensor.meta[_DIGEST_KEY] = sha.hexdigest()
    return str(known)


def model_digest(model: ir.Model) -> str:
    """SHA-256 over inputs, outputs, nodes in order, attributes, functions, opsets and the digests of all tensors."""
    sha = hashlib.sha256()
    sha.update(repr((model.ir_version, sorted(model.opset_imports.items()))).encode())
    _digest_graph(sha, model.graph)
    for identifier, function in sorted(model.functions.items()):
        sha.update(repr((identifier, sorted(function.opset_imports.items()))).encode())
        for name in sorted(function.attributes):
            _digest_attribute(sha, function.attributes[name])
        _digest_graph(sha, function.graph)
    return sha.hexdigest()


def _digest_graph(sha: Any, graph: Any) -> None:
    def values(entries: Any) -> list[tuple[str, str, str]]:
        return [(v.name, str(v.dtype), str(v.shape)) for v in entries]

    sha.update(repr((values(graph.inputs), values(graph.outputs))).encode())
    for name in sorted(graph.initializers):
        tensor = graph.initializers[name].const_value
        sha.update(repr((name, None if tensor is None else tensor_digest(tensor))).encode())
    for node in graph:
        sha.update(repr((node.op_identifier(), _names(node.inputs), _names(node.outputs))).encode())
        for name in sorted(node.attributes):
            _digest_attribute(sha, node.attributes[name])


def _names(values: Any) -> list[str]:
    """Names in order, empty for what is left out; what is left out at the end is not written to a file either."""
    names = [v.name or "" if v is not None else "" for v in values]
    while names and not names[-1]:
        names.pop()
    return names


def _digest_attribute(sha: Any, attribute: Any) -> None:
    kind = attribute.type.name
    sha.update(repr((attribute.name, kind, getattr(attribute, "ref_attr_name", None))).encode())
    if attribute.value is None:
        return
    if kind == "TENSOR":
        sha.update(tensor_digest(attribute.value).encode())
    elif kind == "TENSORS":
        for tensor in attribute.value:
            sha.update(tensor_digest(tensor).encode())
    elif kind == "GRAPH":
        _digest_graph(sha, attribute.value)
    elif kind == "GRAPHS":
        for graph in attribute.value:
            _digest_graph(sha, graph)
    elif kind in ("FLOAT", "FLOATS"):
        # The file holds 32 bits: 0.1 as Python has it and 0.1 as it comes back are one attribute.
        sha.update(np.asarray(attribute.value, dtype=np.float32).tobytes())
    else:
        sha.update(repr(attribute.value).encode())


def copy_with_path(artifact: Artifact, path: Path) -> Artifact:
    """The same artifact, known to lie at `path` (after the file was moved or copied)."""
    twin = artifact.with_steps(artifact.steps)
    twin.path = path
    return twin


__all__ = [
    "Artifact",
    "Step",
    "copy_with_path",
    "external_files",
    "freeze",
    "graphs_of",
    "model_digest",
    "read_signature",
]
