"""Steps of pipelines that earlier runs took, kept on disk and found by what decided them.

    open_pipeline(..., store=open_step_store())

An entry is one file: a digest of what follows it, a line of JSON (the row, the history, what the result has to look like),
and the graph as ONNX. Large weights are files of their own, named by their digest, so that a step which changes the graph
alone writes the graph alone, and a step that changed nothing some hundred bytes. Nothing that is read is believed: what is
damaged, or comes back as another model than was put there, is as good as absent, and removed.

Files are written aside, synced and renamed, so that several processes may use one folder. What was not used for longest
goes first where the folder grows beyond its limit. A disk that is full or can't be written costs the head start only.

Limits: weights come back into memory, those of models above half of the limit are not kept, and neither is anything of which
a part other than an initializer lies in a file of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from perwatt.artifact import Artifact, Step, graphs_of, tensor_digest
from perwatt.bundle import cache_folder
from perwatt.cache_keys import StepKeys, what_is_seen
from perwatt.pipeline import Asked, Row

LIMIT_BYTES = 4 << 30
LARGE_BYTES = 1 << 16
"""A weight of this size or more is a file of its own."""
BLOCK_BYTES = 4096
"""What a file takes on disk is a multiple of this."""
DIGEST_BYTES = 32
ABANDONED_S = 3600.0
"""A file that is still being written after that long was left by a process that was killed."""
ENTRY, TENSOR, PARTIAL = ".step", ".tensor", ".partial"


def open_step_store() -> StepStore | None:
    """The user's store; None where there is no home."""
    folder = cache_folder("steps")
    return None if folder is None else StepStore(folder)


class StepStore:
    """A folder of steps. `limit_bytes`: what it may take on disk, about."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._writable = True
        # How much there is, nobody knows at first: the first that is written makes room.
        self._unchecked = limit_bytes

    def get(self, key: str, before: Artifact) -> tuple[Artifact, Row] | None:
        """What `put` was given under `key`; None where that is not there any more, or not whole. An artifact that was the
        very one before the step is `before` again, and weights that `before` has are shared with it."""
        path = self.folder / f"{key}{ENTRY}"
        try:
            content = path.read_bytes()
        except OSError:
            return None
        try:
            facts, graph = _unpacked(content)
            after = before if facts["after"] is None else self._artifact(facts, graph, before)
            row = _row(facts["row"])
        except Exception:
            # Damaged, of another format, or some weight of it is gone: protobuf, JSON and onnx_ir each say so in their way.
            self._remove(path)
            return None
        self._mark_used(path, facts["tensors"])
        return after, row

    def put(self, key: str, before: Artifact, after: Artifact, row: Row) -> None:
        """Keep a step. Whatever is in the way of that costs nothing but the head start of later runs."""
        if not self._writable:
            return
        facts: dict[str, Any] = {"row": _plain(row), "after": None, "steps": [], "tensors": []}
        graph = b""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if after is not before:
                if after.size_bytes() > self.limit_bytes // 2:
                    return
                facts["after"] = what_is_seen(after)
                facts["steps"] = [asdict(step) for step in after.steps]
                graph, facts["tensors"] = self._graph(after)
            self._write(f"{key}{ENTRY}", _packed(facts, graph))
            self._mark_used(self.folder / f"{key}{ENTRY}", facts["tensors"])
            self._make_room()
        except OSError:
            # Full, or not to be written: the next step would fare no better.
            self._writable = False
        except Exception:
            # Settings that are no plain data, a graph that protobuf can't hold: this step is made again next time.
            pass

    # Models -------------------------------------------------------------------------------------------------------

    def _graph(self, artifact: Artifact) -> tuple[bytes, list[str]]:
        """The graph as ONNX that names its large weights by their digests, and these; the weights are written."""
        import onnx_ir as ir

        model = artifact.edit()
        names = []
        for value in list(_large(model)):
            tensor = value.const_value
            name = tensor_digest(tensor)
            self._write_tensor(name, tensor)
            names.append(name)
            value.const_value = ir.ExternalTensor(
                f"{name}{TENSOR}", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name
            )
        return ir.to_proto(model).SerializeToString(), sorted(set(names))

    def _artifact(self, facts: dict[str, Any], graph: bytes, before: Artifact) -> Artifact:
        """The artifact of an entry. Raises ValueError where it is not what was put there."""
        import onnx
        import onnx_ir as ir

        model = ir.from_proto(onnx.ModelProto.FromString(graph))
        known = {tensor_digest(value.const_value): value.const_value for value in _large(before.model)}
        for value in _initializers(model):
            stored = value.const_value
            if isinstance(stored, ir.ExternalTensor):
                shared = known.get(Path(stored.location).stem)
                value.const_value = self._read_tensor(stored) if shared is None else _named(shared, value.name)
        steps = tuple(Step(step["name"], step["settings"], tuple(step["changes"])) for step in facts["steps"])
        artifact = Artifact(model=model, steps=steps)
        if what_is_seen(artifact) != facts["after"]:
            raise ValueError("this is another model than was put there")
        return artifact

    def _read_tensor(self, stored: Any) -> Any:
        """The weight, in memory. Raises where its file is gone or holds another one."""
        import onnx_ir as ir

        stored.base_dir = str(self.folder.resolve())
        tensor = ir.Tensor(np.array(stored.numpy()), dtype=stored.dtype, name=stored.name)
        if tensor_digest(tensor) != Path(stored.location).stem:
            self._remove(self.folder / stored.location)
            raise ValueError(f"{stored.location} is damaged")
        return tensor

    def _write_tensor(self, name: str, tensor: Any) -> None:
        path = self.folder / f"{name}{TENSOR}"
        if not path.exists() or path.stat().st_size != tensor.nbytes:
            self._write(path.name, tensor.tobytes())

    # Files --------------------------------------------------------------------------------------------------------

    def _write(self, name: str, content: bytes) -> None:
        """A file, whole or not at all."""
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=PARTIAL, delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, self.folder / name)
            except BaseException:
                self._remove(Path(file.name))
                raise
        self._unchecked += _on_disk(len(content))

    def _mark_used(self, entry: Path, tensors: Sequence[str]) -> None:
        """The entry first: it is then older than its weights, and goes before them."""
        for path in (entry, *(self.folder / f"{name}{TENSOR}" for name in tensors)):
            # Gone by now, or not ours to mark.
            with contextlib.suppress(OSError):
                os.utime(path)

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()

    def _make_room(self) -> None:
        """Remove what was not used for longest; now and then, as looking at all files takes its time."""
        if self._unchecked < self.limit_bytes // 64:
            return
        self._unchecked = 0
        files = sorted(self._files())
        total = sum(size for *_, size, _ in files)
        for _, _, size, path in files:
            if total <= self.limit_bytes:
                return
            self._remove(path)
            total -= size

    def _files(self) -> Iterator[tuple[float, bool, int, Path]]:
        """When each file was used last, whether it is a weight (which an entry of the same moment may need), its size and
        path. What killed writers left is removed."""
        for found in os.scandir(self.folder):
            try:
                told = found.stat()
            except OSError:
                continue
            if found.name.endswith(PARTIAL) and time.time() - told.st_mtime > ABANDONED_S:
                self._remove(Path(found.path))
            else:
                yield told.st_mtime, found.name.endswith(TENSOR), _on_disk(told.st_size), Path(found.path)


class KeptSteps:
    """The store as the pipelines of one run use it."""

    def __init__(self, store: StepStore, keys: StepKeys, scratch: Path) -> None:
        """`scratch`: the folder of the run, where files go by the digest of the model in them."""
        self._store, self._keys, self._scratch = store, keys, scratch

    def recall(self, asked: Asked) -> tuple[Artifact, Row] | None:
        """The step as an earlier run took it; None where none did."""
        key = self._key(asked)
        found = self._store.get(key, asked.artifact) if key is not None else None
        if found is None:
            return None
        after, row = found
        if after is not asked.artifact and after.digest() == asked.artifact.digest():
            # Types and shapes alone don't change the digest that files go by, and the old one may be open.
            after.save(self._scratch / f"{after.digest()[:24]}-{str(key)[:8]}.onnx")
        return after, replace(row, settings=asked.made_by.settings(), cached=True)

    def keep(self, asked: Asked, after: Artifact, row: Row) -> None:
        """Keep a step that was taken."""
        key = self._key(asked)
        if key is not None:
            self._store.put(key, asked.artifact, after, row)

    def _key(self, asked: Asked) -> str | None:
        return self._keys.key(asked.artifact, asked.made_by, asked.capabilities, asked.target)


def _initializers(model: Any) -> Iterator[Any]:
    """Those that have a value, subgraphs included."""
    for graph in graphs_of(model):
        yield from (value for value in graph.initializers.values() if value.const_value is not None)


def _large(model: Any) -> Iterator[Any]:
    """Those whose weight is a file of its own; what lies in some other file now is among them."""
    import onnx_ir as ir

    for value in _initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) or (tensor.dtype.name != "STRING" and tensor.nbytes >= LARGE_BYTES):
            yield value


def _named(tensor: Any, name: str) -> Any:
    """The tensor itself, or another one of that name over the same numbers."""
    import onnx_ir as ir

    return tensor if tensor.name == name else ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)


def _packed(facts: dict[str, Any], graph: bytes) -> bytes:
    content = json.dumps(facts).encode() + b"\n" + graph
    return hashlib.sha256(content).digest() + content


def _unpacked(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Raises ValueError where the content is not what was written."""
    told, rest = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(rest).digest() != told:
        raise ValueError("the entry is damaged")
    facts, _, graph = rest.partition(b"\n")
    return json.loads(facts), graph


def _plain(row: Row) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name != "cached"}


def _row(plain: dict[str, Any]) -> Row:
    pairs = {name: tuple(plain[name]) for name in ("size_bytes", "operators") if plain[name] is not None}
    return Row(**{**plain, **pairs})


def _on_disk(size: int) -> int:
    return -(-max(size, 1) // BLOCK_BYTES) * BLOCK_BYTES
