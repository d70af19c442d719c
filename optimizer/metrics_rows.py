"""Lines up the outputs of two models row by row, however each was cut into batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from perwatt.errors import InputError
from perwatt.signature import Batch


def aligned(ours: Sequence[Batch], reference: Sequence[Batch] | None, count: int) -> Iterator[tuple[Batch, Batch]]:
    """Both lists cut at the same rows; where they aren't rows of `count` items (no batch axis), one call is one row."""
    theirs = ours if reference is None else reference
    if not (_is_rowwise(ours, count) and _is_rowwise(theirs, count)):
        if len(ours) != len(theirs):
            raise InputError(f"{len(ours)} results against {len(theirs)} of the original")
        ours, theirs = _stacked(ours), _stacked(theirs)
    left, right = list(ours), list(theirs)
    while left and right:
        size = min(_length(left[0]), _length(right[0]))
        yield _cut(left, size), _cut(right, size)


def _cut(batches: list[Batch], size: int) -> Batch:
    """The first `size` rows, taken off the front of `batches`."""
    first = batches[0]
    head = {name: array[:size] for name, array in first.items()}
    if _length(first) == size:
        batches.pop(0)
    else:
        batches[0] = {name: array[size:] for name, array in first.items()}
    return head


def _length(batch: Mapping[str, Any]) -> int:
    return len(next(iter(batch.values())))


def _is_rowwise(outputs: Sequence[Batch], count: int) -> bool:
    if any(np.ndim(array) == 0 for batch in outputs for array in batch.values()):
        return False
    lengths = [{len(array) for array in batch.values()} for batch in outputs]
    return all(len(found) == 1 for found in lengths) and sum(found.pop() for found in lengths) == count


def _stacked(outputs: Sequence[Batch]) -> list[Batch]:
    return [{name: np.asarray(array)[None] for name, array in batch.items()} for batch in outputs]
