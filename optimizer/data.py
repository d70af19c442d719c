"""`Samples`: named batches with labels, re-iterable, stored as plain `.npy` files that a worker maps into memory.

Items of one shape live in one chunk, so that nothing is ever padded just for the sake of storage: images make one
chunk, sentences one chunk for each length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from perwatt.signature import Array, Batch, rows


class Samples:
    """Chunks of items ({input name: array[n, …]}) and, where known, one label an item, in the same order.

    Iterating gives batches of at most `batch_size` items of one shape. Labels are int64 [n] for classes, or
    float32 [n, …] targets."""

    def __init__(self, chunks: Sequence[Batch], labels: Array | None = None, batch_size: int = 32) -> None:
        self.chunks = [chunk for chunk in chunks if rows(chunk)]
        self.labels = labels
        self.batch_size = batch_size
        if labels is not None and len(labels) != len(self):
            raise ValueError(f"{len(labels)} labels for {len(self)} samples")

    def __len__(self) -> int:
        return sum(rows(chunk) for chunk in self.chunks)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(self.batch_size)

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of at most `size` items, all of one shape."""
        for chunk in self.chunks:
            for start in range(0, rows(chunk), size):
                yield {name: np.ascontiguousarray(array[start : start + size]) for name, array in chunk.items()}

    def subset(self, indices: Sequence[int] | Array) -> Samples:
        """The items at `indices` (sorted into storage order), with their labels."""
        wanted = np.unique(np.asarray(indices, dtype=np.int64))
        chunks, first = [], 0
        for chunk in self.chunks:
            inside = wanted[(wanted >= first) & (wanted < first + rows(chunk))] - first
            if len(inside):
                chunks.append({name: array[inside] for name, array in chunk.items()})
            first += rows(chunk)
        return Samples(chunks, None if self.labels is None else self.labels[wanted], self.batch_size)

    def take(self, count: int, seed: int = 0) -> Samples:
        """At most `count` items, drawn without replacement."""
        if count >= len(self):
            return self
        return self.subset(np.random.default_rng(seed).choice(len(self), count, replace=False))

    def divide(self, fractions: dict[str, float], seed: int = 0) -> dict[str, Samples]:
        """Disjoint parts by name, drawn at random; fractions sum to one."""
        order = np.random.default_rng(seed).permutation(len(self))
        edges = np.round(np.cumsum([0.0, *fractions.values()]) * len(self)).astype(int)
        return {name: self.subset(order[a:b]) for name, a, b in zip(fractions, edges[:-1], edges[1:], strict=True)}

    def without_labels(self) -> Samples:
        """The same inputs, labels unknown."""
        return Samples(self.chunks, None, self.batch_size)

    def digest(self) -> str:
        """SHA-256 over all inputs and labels, in order."""
        sha = hashlib.sha256()
        for chunk in self.chunks:
            for name, array in sorted(chunk.items()):
                sha.update(repr((name, str(array.dtype), array.shape)).encode())
                sha.update(np.ascontiguousarray(array).data)
        if self.labels is not None:
            sha.update(np.ascontiguousarray(self.labels).data)
        return sha.hexdigest()

    def save(self, folder: Path) -> Path:
        """Write one `.npy` for each array; returns `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted({name for chunk in self.chunks for name in chunk})
        index = {"chunks": len(self.chunks), "names": names, "batch_size": self.batch_size}
        for number, chunk in enumerate(self.chunks):
            for position, name in enumerate(names):
                np.save(folder / f"{number}-{position}.npy", chunk[name], allow_pickle=False)
        if self.labels is not None:
            np.save(folder / "labels.npy", self.labels, allow_pickle=False)
        (folder / "index.json").write_text(json.dumps(index))
        return folder

    @classmethod
    def load(cls, folder: Path) -> Samples:
        """The samples saved in `folder`, mapped into memory."""
        index = json.loads((folder / "index.json").read_text())
        chunks = [
            {name: np.load(folder / f"{c}-{i}.npy", mmap_mode="r") for i, name in enumerate(index["names"])}
            for c in range(index["chunks"])
        ]
        labels = folder / "labels.npy"
        return cls(chunks, np.load(labels) if labels.exists() else None, index["batch_size"])
