"""`file.py:callable`: the user's own Python, as a data set that yields batches or as a metric.

The file is run because the user named it as code; its folder is importable while it is in use.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perwatt.data import Samples
from perwatt.datasets_arrays import fit_batch, match_names, same_length
from perwatt.datasets_fit import Normalization, fed_spec
from perwatt.datasets_source import MEMORY_BYTES, Labels, Notes, Source, encode_array, whole_calls
from perwatt.errors import InputError, nearest
from perwatt.recipe import RawInput
from perwatt.signature import Array, Batch, Signature, TensorSpec

_SPELLING = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")
_serial = itertools.count()


def is_callable_spec(text: str) -> bool:
    """Whether `text` is spelled `file.py:name`."""
    return _SPELLING.fullmatch(text) is not None


def callable_file(text: str) -> Path:
    """The file in `file.py:name`."""
    match = _SPELLING.fullmatch(text)
    assert match is not None
    return Path(match["file"]).expanduser()


def load_callable(text: str) -> Callable[..., Any]:
    """The callable that `file.py:name` means. Raises InputError where the file is missing, fails, or lacks the name."""
    path = callable_file(text)
    name = text.rpartition(":")[2]
    if not path.is_file():
        raise InputError(f"no such file: {path} (named by {text})")
    module_name = f"_perwatt_user_{path.stem}_{next(_serial)}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    with importable(path.resolve().parent), explained(f"{path} can't be imported"):
        spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        if found is not None or not names:
            raise InputError(f"{path} has no callable named {name!r}")
        raise InputError(f"{path}: {nearest(name, names, 'callable')}")
    return found  # type: ignore[no-any-return]


def peek_callable(text: str) -> list[TensorSpec] | None:
    """What its first batch would be fed as; None where that batch is an array without a name."""
    for arrays, _ in _batches(text):
        return [fed_spec(name, str(array.dtype), array.shape) for name, array in arrays.items() if array.ndim]
    return None


def open_callable(
    text: str,
    signature: Signature,
    *,
    normalization: Normalization | None,
    raw_inputs: Mapping[str, RawInput],
    label2id: Mapping[str, int] | None,
    most: int | None,
) -> Source:
    """All batches that the callable yields (at most `most` items, at most 4 GiB), as one source.

    It yields {input name: array}, a bare array for the only input, or either with labels: (batch, labels). Raises
    InputError where it raises, yields anything else, or gives labels for some batches only."""
    notes = Notes()
    chunks: list[Batch] = []
    labels: list[Array | None] = []
    names: tuple[str, ...] | None = None
    count = size = 0
    for number, (arrays, given) in enumerate(_batches(text)):
        where = f"{text}, batch {number}"
        matched = match_names(arrays, signature, where, notes)
        length = same_length(matched, where) if signature.batch is not None else None
        chunk = fit_batch(matched, signature, normalization, raw_inputs, notes)
        encoded = None if given is None else _labels(given, length, where, label2id, notes)
        chunks.append(chunk)
        labels.append(None if encoded is None else encoded.values)
        names = names or (encoded.class_names if encoded else None)
        count += 1 if length is None else length
        size += sum(array.nbytes for array in chunk.values())
        if count >= (most or sys.maxsize) or size > MEMORY_BYTES:
            notes.add(f"{text}: stopped after {count} samples ({size / 1e6:.0f} MB)")
            break
    if not chunks:
        raise InputError(f"{text} yields no batch")
    if any(given is None for given in labels) and not all(given is None for given in labels):
        raise InputError(f"{text} yields labels with some batches and not with others")
    if signature.batch is None:
        file = callable_file(text)
        return Source(len(chunks), lambda wanted: whole_calls([chunks[i] for i in wanted]), [file], notes)
    known = [given for given in labels if given is not None]
    samples = Samples(_merged(chunks), np.concatenate(known) if known else None)
    return Source(len(samples), samples.subset, [callable_file(text)], notes, names)


def _merged(chunks: list[Batch]) -> list[Batch]:
    """Neighbours of one shape put together; the order of the items stays."""
    groups = itertools.groupby(chunks, key=lambda chunk: [array.shape[1:] for array in chunk.values()])
    merged = []
    for _, group in groups:
        parts = list(group)
        merged.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return merged


def _labels(given: Array, length: int | None, where: str, label2id: Mapping[str, int] | None, notes: Notes) -> Labels:
    if length is not None and (given.ndim == 0 or len(given) != length):
        raise InputError(f"{where}: {given.size} labels for {length} samples")
    return encode_array(given, where, label2id, notes)


def _batches(text: str) -> Iterator[tuple[dict[str, Array], Array | None]]:
    """(arrays, labels) of each batch, as NumPy."""
    function = load_callable(text)
    with importable(callable_file(text).resolve().parent):
        with explained(f"{text} failed"):
            produced = function()
        if isinstance(produced, Mapping | np.ndarray):
            produced = [produced]
        with explained(f"{text} must give batches (a generator, a list, a DataLoader), not {type(produced).__name__}"):
            iterator = iter(produced)
        for number in itertools.count():
            with explained(f"{text} failed at batch {number}"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield _unpack(batch, f"{text}, batch {number}")


def _unpack(batch: Any, where: str) -> tuple[dict[str, Array], Array | None]:
    labels = None
    if isinstance(batch, tuple | list):
        if len(batch) != 2:
            raise InputError(f"{where}: {len(batch)} values", fix="yield {input: array}, or ({input: array}, labels)")
        batch, given = batch
        labels = None if given is None else _array(given, where)
    if isinstance(batch, Mapping):
        arrays = {str(name): _array(value, where) for name, value in batch.items()}
        if labels is None:
            labels = arrays.pop("labels", None)
        return arrays, labels
    return {"array": _array(batch, where)}, labels


def _array(value: Any, where: str) -> Array:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    with explained(f"{where}: {type(value).__name__} is no array"):
        array = np.asarray(value)
    if array.dtype.hasobject:
        raise InputError(f"{where}: {type(value).__name__} is no array of numbers", fix="yield {input name: array}")
    return array


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """`folder` at the front of the import path, for as long as it lasts."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns anything that the user's code raises into an InputError with its last words."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}") from error


__all__ = [
    "callable_file",
    "explained",
    "importable",
    "is_callable_spec",
    "load_callable",
    "open_callable",
    "peek_callable",
]
