"""What every kind of data set opens into: a `Source`, and what they share: label encoding, notes, file digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from perwatt.data import Samples
from perwatt.errors import InputError, nearest
from perwatt.signature import Array, Batch

MEMORY_BYTES = 4 << 30
"""Samples of one set that would take more than this once decoded are thinned out at random."""


WARNING = "warning: "
"""How a note begins that nobody should miss."""


class Notes(list[str]):
    """Sentences for the report, each once."""

    def add(self, sentence: str) -> None:
        """Append `sentence` unless it was said already."""
        if sentence not in self:
            self.append(sentence)


@dataclass
class Source:
    """An opened data set: how many items it has, and how to load some of them.

    `load(indices)` takes sorted int64 indices and gives those items ready to be fed, labels in the same order as the
    items; it may reorder (text groups by length) and may add to `notes`. `item_bytes`: size of one item once loaded,
    0 where it doesn't matter. `files`: what the digest is taken over."""

    count: int
    load: Callable[[Array], Samples]
    files: Sequence[Path]
    notes: Notes = field(default_factory=Notes)
    class_names: tuple[str, ...] | None = None
    item_bytes: int = 0


@dataclass(frozen=True)
class Labels:
    """Encoded labels: int64 [n] classes or float32 [n, …] targets, and the classes' names where they are known."""

    values: Array
    class_names: tuple[str, ...] | None = None


def whole_calls(calls: Sequence[Batch]) -> Samples:
    """Samples for a model without a batch axis: one chunk a call, which iterating leaves whole. Raises InputError for
    inputs that are single numbers: samples are cut along the first axis."""
    for call in calls:
        for name, array in call.items():
            if not array.ndim:
                raise InputError(f"input {name} is a single number, which samples can't hold", fix="make it a constant")
    return Samples(calls, None, max((len(array) for call in calls for array in call.values()), default=1))


def encode_array(array: Array, what: str, label2id: Mapping[str, int] | None, notes: Notes) -> Labels:
    """Labels from an array: integers and booleans to int64 [n], text by name, floats (and anything of more axes) to
    float32. Raises InputError for other types."""
    if array.dtype.kind in "US":
        return encode_text([str(v) for v in array.astype(str).ravel()], what, label2id, notes)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 1 and array.dtype.kind in "iub":
        return Labels(array.astype(np.int64))
    if array.dtype.kind in "iubf":
        return Labels(array.astype(np.float32))
    raise InputError(f"{what}: labels of type {array.dtype} can't be used", fix="save class numbers or float targets")


def encode_text(values: Sequence[str], what: str, label2id: Mapping[str, int] | None, notes: Notes) -> Labels:
    """Labels from text: class numbers, else float targets, else names mapped by the model's `label2id`, else names
    numbered in sorted order (which is noted). Raises InputError for empty labels and names the model doesn't know."""
    stripped = [value.strip() for value in values]
    if "" in stripped:
        raise InputError(f"{what}: label {stripped.index('') + 1} of {len(stripped)} is empty")
    for kind, dtype in ((int, np.int64), (float, np.float32)):
        try:
            numbers = np.array([kind(value) for value in stripped], dtype=dtype)
        except (ValueError, OverflowError):
            continue
        if np.isnan(numbers).any():
            raise InputError(f"{what}: label {int(np.isnan(numbers).argmax()) + 1} of {len(stripped)} is no number")
        return Labels(numbers)
    names = sorted(set(stripped))
    ids = name_ids(names, what, label2id, notes)
    return Labels(np.array([ids[value] for value in stripped], dtype=np.int64), ordered_names(ids))


def name_ids(names: Sequence[str], what: str, label2id: Mapping[str, int] | None, notes: Notes) -> dict[str, int]:
    """{class name: number} for `names`: by the model's own `label2id` where it has telling names (case aside), else in
    sorted order. Raises InputError where the model knows some of the names but not all of them."""
    telling = {k: v for k, v in (label2id or {}).items() if not re.fullmatch(r"LABEL_\d+", k)}
    folded = {name.casefold(): number for name, number in telling.items()}
    unknown = [name for name in names if name.casefold() not in folded]
    if telling and not unknown:
        ids = {name: telling.get(name, folded[name.casefold()]) for name in names}
        if ids != {name: number for number, name in enumerate(names)}:
            notes.add(f"class numbers are the model's own: {listed(f'{n} = {i}' for n, i in ids.items())}")
        return ids
    if telling and len(unknown) < len(names):
        raise InputError(f"{what}: {nearest(unknown[0], telling, 'class')}")
    notes.add(f"classes numbered in sorted order: {listed(f'{n} = {i}' for i, n in enumerate(names))}")
    return {name: number for number, name in enumerate(names)}


def ordered_names(ids: Mapping[str, int]) -> tuple[str, ...]:
    """Class names by number; a number that has no name stands for itself."""
    by_number = {number: name for name, number in ids.items()}
    return tuple(by_number.get(i, str(i)) for i in range(max(by_number, default=-1) + 1))


def listed(parts: object, most: int = 8) -> str:
    """`a, b, c, … (n)`: at most `most` of `parts`."""
    items = [str(part) for part in parts]  # type: ignore[attr-defined]
    return ", ".join(items) if len(items) <= most else f"{', '.join(items[:most])}, … ({len(items)} in all)"


def digest_files(files: Sequence[Path], root: Path | None = None) -> str:
    """SHA-256 of the one file; of several: of each one's path below `root` and its own SHA-256, in order."""

    def one(path: Path) -> str:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    if root is None and len(files) == 1:
        return one(files[0])
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(one, files))
    names = [str(path.relative_to(root)) if root else path.name for path in files]
    return hashlib.sha256(repr(list(zip(names, digests, strict=True))).encode()).hexdigest()
