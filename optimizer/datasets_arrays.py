"""Data sets in `.npz` and `.npy` files.

In an `.npz` the only array that isn't `labels` feeds the only input, whatever its name; otherwise arrays are named
after the inputs. Pickled (object) arrays are never loaded.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perwatt.data import Samples
from perwatt.datasets_fit import Normalization, dtype_of, fed_spec, fit
from perwatt.datasets_source import Labels, Notes, Source, encode_array, listed, whole_calls
from perwatt.errors import InputError, nearest
from perwatt.recipe import RawInput
from perwatt.signature import Array, Batch, Signature, TensorSpec

LABELS = "labels"

_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, NotImplementedError)


def peek_arrays(path: Path) -> list[TensorSpec]:
    """What the file's arrays would be fed as, from their headers alone."""
    return [fed_spec(name, dtype, shape) for name, (dtype, shape) in _headers(path).items() if name != LABELS and shape]


def open_arrays(
    path: Path,
    signature: Signature,
    *,
    normalization: Normalization | None,
    raw_inputs: Mapping[str, RawInput],
    label2id: Mapping[str, int] | None,
) -> Source:
    """Opens an `.npz` or `.npy` file. Raises InputError for damage, wrong names, shapes, types and lengths."""
    notes = Notes()
    arrays = {name: _read(path, name) for name in _headers(path)}
    labels = arrays.pop(LABELS, None)
    inputs = match_names(arrays, signature, str(path), notes)
    if signature.batch is None:
        return _calls(path, inputs, labels, signature, normalization, raw_inputs, notes)
    count = same_length(inputs, str(path))
    encoded = None if labels is None else _labels(labels, count, path, label2id, notes)

    def load(indices: Array) -> Samples:
        chunk = fit_batch(
            {name: array[indices] for name, array in inputs.items()}, signature, normalization, raw_inputs, notes
        )
        return Samples([chunk], None if encoded is None else encoded.values[indices])

    names = None if encoded is None else encoded.class_names
    return Source(count, load, [path], notes, names, _item_bytes(inputs, signature))


def match_names(arrays: Mapping[str, Array], signature: Signature, what: str, notes: Notes) -> dict[str, Array]:
    """{input name: array}: the only array for the only input, else by name. Raises InputError with near names."""
    wanted = [spec.name for spec in signature.inputs]
    if not arrays:
        raise InputError(f"{what} has no array to feed, the model's inputs are {listed(wanted)}")
    if len(wanted) == 1 and len(arrays) == 1:
        return {wanted[0]: next(iter(arrays.values()))}
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise InputError(
            f"{what} has the arrays {listed(arrays)}, the model's inputs are {listed(wanted)}",
            fix=f"{nearest(missing[0], arrays, 'array')} (class labels go into an array named {LABELS!r})",
        )
    extra = [name for name in arrays if name not in wanted]
    if extra:
        notes.add(f"{what}: {listed(extra)} not used, as the model has no such input")
    return {name: arrays[name] for name in wanted}


def same_length(inputs: Mapping[str, Array], what: str) -> int:
    """How many items the arrays have. Raises InputError where they disagree or there is none."""
    lengths = {name: len(array) if array.ndim else None for name, array in inputs.items()}
    found = set(lengths.values())
    if None in found:
        raise InputError(f"{what}: {next(n for n, v in lengths.items() if v is None)} is a single number, not samples")
    if len(found) > 1:
        raise InputError(f"{what}: arrays of different lengths: {listed(f'{n} {v}' for n, v in lengths.items())}")
    count = found.pop()
    if not count:
        raise InputError(f"{what} has no samples in it")
    return count


def fit_batch(
    arrays: Mapping[str, Array],
    signature: Signature,
    normalization: Normalization | None,
    raw_inputs: Mapping[str, RawInput],
    notes: Notes,
) -> Batch:
    """Each array as its input wants it (see `fit`), in the order of the inputs."""
    return {
        spec.name: fit(
            arrays[spec.name], spec, normalization=normalization, raw=raw_inputs.get(spec.name),
            fixed_batch=signature.batch is None, notes=notes,
        )
        for spec in signature.inputs
    }  # fmt: skip


def _labels(labels: Array, count: int, path: Path, label2id: Mapping[str, int] | None, notes: Notes) -> Labels:
    if labels.ndim == 0 or len(labels) != count:
        have = "one number" if labels.ndim == 0 else f"{len(labels)} entries"
        raise InputError(f"{path}: {LABELS} has {have}, there are {count} samples")
    return encode_array(labels, str(path), label2id, notes)


def _calls(
    path: Path, inputs: Mapping[str, Array], labels: Array | None, signature: Signature,
    normalization: Normalization | None, raw_inputs: Mapping[str, RawInput], notes: Notes,
) -> Source:  # fmt: skip
    """Without a batch axis arrays hold one call, or calls stacked on an axis in front; each becomes a chunk."""
    ranks = {spec.name: len(spec.shape) for spec in signature.inputs if spec.shape is not None}
    if all(inputs[name].ndim == rank + 1 for name, rank in ranks.items()):
        count = same_length(inputs, str(path))
        calls = [{name: array[i] for name, array in inputs.items()} for i in range(count)]
    else:
        calls = [dict(inputs)]
    notes.add(f"the model has no batch axis: {path} holds {len(calls)} call{'s' * (len(calls) != 1)}")
    if labels is not None:
        notes.add("labels are not used, as the model has no batch axis")

    def load(indices: Array) -> Samples:
        return whole_calls([fit_batch(calls[i], signature, normalization, raw_inputs, notes) for i in indices])

    return Source(len(calls), load, [path], notes)


def _item_bytes(inputs: Mapping[str, Array], signature: Signature) -> int:
    specs = {spec.name: spec for spec in signature.inputs}
    return sum(int(np.prod(a.shape[1:])) * dtype_of(specs[name]).itemsize for name, a in inputs.items())


def _headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{array name: (dtype, shape)} without reading the data. Raises InputError for damage and object arrays."""
    try:
        if path.open("rb").read(2) != b"PK":
            with path.open("rb") as stream:
                found = {"array": _header(stream)}
        else:
            found = {}
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    if member.endswith(".npy"):
                        with archive.open(member) as stream:
                            found[member.removesuffix(".npy")] = _header(stream)
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    for name, (dtype, _) in found.items():
        if dtype.hasobject:
            raise InputError(f"{path}: array {name!r} is pickled objects, which are never loaded", fix="save numbers")
    return {name: (str(dtype), shape) for name, (dtype, shape) in found.items()}


def _header(stream: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return dtype, shape


def _read(path: Path, name: str) -> Array:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return np.asarray(loaded[name])
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    except MemoryError:
        raise InputError(f"{path}: array {name!r} doesn't fit into memory") from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged or cut short: {' '.join(str(error).split()) or type(error).__name__}")
