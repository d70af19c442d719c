"""What a model takes and gives: names, types and shapes of its inputs and outputs. Plain data, no backend imported.

The batch axis is axis 0 when all inputs, and all outputs of known rank, agree on it: the same symbol (dynamic batch) or
the same number (fixed batch). Where they disagree, or one has no axis at all, the model has no batch axis and one call is
one inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Batch = dict[str, Array]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. `dtype` is a NumPy name (`float32`, `int64`, …; `bfloat16` from ml_dtypes); a dimension is
    a number, or a symbol's name where it is dynamic; `shape` is None where even the rank is unknown."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None

    def __str__(self) -> str:
        dims = "…" if self.shape is None else ",".join(str(d) for d in self.shape)
        return f"{self.name}:{self.dtype}[{dims}]"


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a model, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def batch(self) -> int | str | None:
        """The batch axis: a symbol (dynamic), a number (fixed), or None where there is no batch axis."""
        firsts: set[int | str | None] = {spec.shape[0] if spec.shape else None for spec in self.inputs}
        symbols = {d for spec in self.inputs for d in (spec.shape or ()) if isinstance(d, str)}
        for spec in self.outputs:
            first = spec.shape[0] if spec.shape else None
            # A symbol that no input knows says only that the exporter did not follow the axis.
            if spec.shape is not None and (not isinstance(first, str) or first in symbols):
                firsts.add(first)
        return firsts.pop() if self.inputs and len(firsts) == 1 else None

    @property
    def other_dynamic(self) -> frozenset[str]:
        """Symbols of the inputs other than the batch axis, such as a sequence length."""
        found = {d for spec in self.inputs for d in (spec.shape or ()) if isinstance(d, str)}
        return frozenset(found - {self.batch})

    def problems(self, batch: Mapping[str, Array]) -> list[str]:
        """Why `batch` can't be fed to this model: names, types, ranks and fixed sizes (batch axis left aside)."""
        want, got = {spec.name for spec in self.inputs}, set(batch)
        if want != got:
            return [f"the model's inputs are {sorted(want)}, the data has {sorted(got)}"]
        reasons = []
        for spec in self.inputs:
            array = batch[spec.name]
            if str(array.dtype) != spec.dtype:
                reasons.append(f"input {spec} was given {array.dtype}")
            if spec.shape is None:
                continue
            fixed = [d if isinstance(d, int) else None for d in spec.shape]
            if self.batch is not None:
                fixed[0] = None
            if len(fixed) != array.ndim or any(d not in (None, a) for d, a in zip(fixed, array.shape, strict=True)):
                reasons.append(f"input {spec} was given shape {list(array.shape)}")
        if self.batch is not None and not reasons:
            counts = sorted({len(array) for array in batch.values()})
            if len(counts) > 1:
                reasons.append(f"the inputs have different numbers of items: {', '.join(map(str, counts))}")
            elif counts == [0]:
                reasons.append("there are no items on the batch axis")
        return reasons


def rows(batch: Mapping[str, Array]) -> int:
    """Number of items on the batch axis of `batch`."""
    return int(next(iter(batch.values())).shape[0])


def inferences(signature: Signature, batch: Mapping[str, Array]) -> int:
    """How many inferences one call with `batch` is: items on the batch axis, else one."""
    return rows(batch) if signature.batch is not None else 1


def split(batch: Mapping[str, Array], size: int) -> list[tuple[Batch, int]]:
    """Cut `batch` into pieces of exactly `size` items; the last one is filled up by repeating its last item.

    Returns (piece, how many of its items are real)."""
    total = rows(batch)
    pieces = []
    for start in range(0, total, size):
        piece = {name: array[start : start + size] for name, array in batch.items()}
        real = min(size, total - start)
        if real < size:
            piece = {name: np.concatenate([a, np.repeat(a[-1:], size - real, axis=0)]) for name, a in piece.items()}
        pieces.append((piece, real))
    return pieces
