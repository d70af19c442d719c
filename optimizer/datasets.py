"""Opens the data that a recipe names, and shares it out among the roles: calibrate, learn, select, confirm.

What a data set is, is found by looking at it: an `.npz` or `.npy` file, a folder of pictures, a CSV or TSV table, or
`file.py:callable`. Samples are drawn at random by seed; a set given alone is split, and a note says how. What judges
the result (`confirm`) is never among what passes are given.
"""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perwatt.data import Samples
from perwatt.datasets_arrays import open_arrays, peek_arrays
from perwatt.datasets_callable import is_callable_spec, open_callable, peek_callable
from perwatt.datasets_fit import parse_normalization
from perwatt.datasets_source import MEMORY_BYTES, Notes, Source, digest_files, listed
from perwatt.errors import InputError
from perwatt.recipe import DataSection, RawInput
from perwatt.signature import Array, Signature, TensorSpec

CALIBRATE_AT_MOST = 300
"""More samples than this don't change calibrated ranges noticeably, and cost time."""

SPLIT_AT_LEAST = 4
"""A set with fewer samples is too small to be split."""


@dataclass(frozen=True)
class Roles:
    """Who gets which samples. `select` is for choosing (passes see it), `confirm` for judging (they never do).

    `notes`: sentences for the report; `shares`: those about who gets which samples. `sources`: path as given → SHA-256
    of the file, or of a folder's listing and contents."""

    calibrate: Samples | None
    learn: Samples | None
    select: Samples | None
    confirm: Samples | None
    notes: tuple[str, ...]
    sources: dict[str, str]
    class_names: tuple[str, ...] | None
    shares: tuple[str, ...] = ()

    @property
    def evaluation(self) -> Samples | None:
        """`select` and then `confirm`, together."""
        return _joined(self.select, self.confirm)


def _joined(*given: Samples | None) -> Samples | None:
    """Samples one after the other; None where there are none."""
    parts = [part for part in given if part is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    labelled = [part.labels for part in parts if part.labels is not None]
    labels = np.concatenate(labelled) if len(labelled) == len(parts) else None
    return Samples([chunk for part in parts for chunk in part.chunks], labels, max(p.batch_size for p in parts))


def peek(section: DataSection) -> list[TensorSpec] | None:
    """What would be fed, before the model is known: one spec an array, axis 0 called `batch`; None where that can't be
    known (no data, text, pictures without a size). Raises InputError for a data set that can't be opened."""
    where = section.calibrate or section.all or section.train or section.eval
    if where is None:
        return None
    kind = kind_of(where)
    if kind == "callable":
        return peek_callable(where)
    if kind == "arrays":
        return peek_arrays(_path(where))
    if kind == "pictures":
        from perwatt.datasets_images import peek_images

        return peek_images(_path(where), section.image)
    return None


def open_roles(
    section: DataSection,
    signature: Signature,
    *,
    raw_inputs: Mapping[str, RawInput] | None = None,
    tokenizer: Path | None = None,
    label2id: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Roles:
    """Opens whatever `section` names for a model of this `signature`.

    `raw_inputs` take raw bytes, never normalised. `tokenizer` is the folder of a Hugging Face tokenizer, needed for
    tables. `label2id` numbers class names as the model does. All roles are None where no data is given. Raises
    InputError, in one line, for anything that can't be used."""
    return _Opener(section, signature, raw_inputs or {}, tokenizer, label2id, seed).roles()


def kind_of(where: str) -> str:
    """`callable`, `arrays`, `pictures` or `table`. Raises InputError for anything else."""
    if is_callable_spec(where):
        return "callable"
    path = _path(where)
    if path.is_dir():
        return "pictures"
    try:
        with path.open("rb") as stream:
            head = stream.read(1 << 16)
    except FileNotFoundError:
        siblings = [str(path.with_name(p.name)) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), siblings, n=1)
        raise InputError(f"no such data set: {where}", fix=f"did you mean {near[0]}?" if near else None) from None
    except OSError as error:
        raise InputError(f"can't read {where}: {error.strerror or error}") from None
    if not head:
        raise InputError(f"{where} is empty")
    if head[:6] == b"\x93NUMPY":
        return "arrays"
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _archive_kind(path, where)
    if b"\0" not in head and path.suffix != ".py":
        return "table"
    hint = f"name the callable as {where}:NAME" if path.suffix == ".py" else None
    raise InputError(
        f"{where} is no data set that perwatt knows",
        fix=hint or "give an .npz file, a folder of pictures, a CSV or TSV table, or file.py:callable",
    )


def _archive_kind(path: Path, where: str) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{where} is damaged or cut short: {error}") from None
    if any(member.endswith(".npy") for member in members):
        return "arrays"
    raise InputError(f"{where} is an archive without arrays in it", fix="unpack it and give the folder")


def _path(where: str) -> Path:
    return Path(where).expanduser()


class _Opener:
    """One call of `open_roles`."""

    def __init__(
        self,
        section: DataSection,
        signature: Signature,
        raw_inputs: Mapping[str, RawInput],
        tokenizer: Path | None,
        label2id: Mapping[str, int] | None,
        seed: int,
    ) -> None:
        self.section = section
        self.signature = signature
        self.raw_inputs = raw_inputs
        self.tokenizer = tokenizer
        self.label2id = label2id
        self.seed = seed
        self.normalization = parse_normalization(section.normalize)
        self.notes = Notes()
        self.shares = Notes()
        self.sources: dict[str, str] = {}
        self.class_names: tuple[str, ...] | None = None

    def roles(self) -> Roles:
        section = self.section
        calibrate = learn = select = confirm = None
        train = self.open(section.train) if section.train else None
        held = self.open(section.confirm) if section.confirm else None
        if section.calibrate and section.eval:
            calibrate = self.calibration(self.open(section.calibrate), section.calibrate)
            select, confirm = self.halves(self.open(section.eval), section.eval)
        elif section.eval and train is not None:
            calibrate = self.calibration(train, f"{section.train} (training data)")
            select, confirm = self.halves(self.open(section.eval), section.eval)
        elif alone := section.all or section.calibrate or section.eval:
            calibrate, select, confirm = self.shared_out(self.open(alone), alone)
        elif train is not None:
            calibrate = self.calibration(train, f"{section.train} (training data)")
            self.shares.add("no samples to judge accuracy with: give --eval")
        if held is not None:
            # What chooses has everything else: nothing of it needs to be kept from choosing.
            select = _joined(select, confirm)
            confirm = held.load(self.drawn(held, str(section.confirm)))
            self.shares.add(f"{section.confirm}: {len(confirm)} samples confirm, all others choose")
            self.finish(held)
        if train is not None:
            learn = train.load(self.drawn(train, str(section.train)))
            self.shares.add(f"{section.train}: {len(learn)} samples to learn from")
            self.finish(train)
        return Roles(
            calibrate, learn, select, confirm, tuple(self.notes), self.sources, self.class_names, tuple(self.shares)
        )

    def calibration(self, source: Source, name: str) -> Samples:
        """At most 300 samples, without labels."""
        indices = self.drawn(source, name, CALIBRATE_AT_MOST)
        samples = source.load(indices).without_labels()
        drawn = f"{len(indices)} of {source.count} samples, drawn at random,"
        drawn = drawn if len(indices) < source.count else f"all {source.count} samples"
        self.shares.add(f"{name}: {drawn} calibrate")
        self.take_notes(source)
        return samples

    def halves(self, source: Source, name: str) -> tuple[Samples | None, Samples]:
        """Select and confirm."""
        indices = self.drawn(source, name)
        first = len(indices) // 2
        order = self.shuffled(indices)
        confirm = source.load(np.sort(order[first:]))
        select = source.load(np.sort(order[:first])) if first else None
        self.shares.add(f"{name}: {first} samples choose, {len(order) - first} others judge (seed {self.seed})")
        self.finish(source)
        return select, confirm

    def shared_out(self, source: Source, name: str) -> tuple[Samples, Samples | None, Samples | None]:
        """Calibrate, select and confirm from one set."""
        indices = self.drawn(source, name)
        total = len(indices)
        if total < SPLIT_AT_LEAST:
            calibrate = source.load(indices).without_labels()
            self.shares.add(f"{name} has {total} samples only: all calibrate, accuracy stays unknown")
            self.finish(source)
            return calibrate, None, None
        order = self.shuffled(indices)
        first = min(CALIBRATE_AT_MOST, total // 4)
        second = first + (total - first) // 2
        parts = [np.sort(part) for part in (order[:first], order[first:second], order[second:])]
        calibrate, select, confirm = (source.load(part) for part in parts)
        sizes = [len(part) for part in parts]
        self.shares.add(
            f"{name} is the only set, so it was split at random (seed {self.seed}): "
            f"{sizes[0]} samples calibrate, {sizes[1]} choose, {sizes[2]} judge"
        )
        self.finish(source)
        return calibrate.without_labels(), select, confirm

    def drawn(self, source: Source, name: str, most: int | None = None) -> Array:
        """Indices of the samples to use, sorted: all, or as many as `most`, --max-samples and memory allow."""
        fit = MEMORY_BYTES // source.item_bytes if source.item_bytes else source.count
        asked = source.count if self.section.max_samples is None else max(self.section.max_samples, 1)
        if fit < min(source.count, asked, most or source.count):
            needs = source.count * source.item_bytes / 1e9
            self.notes.add(f"{name}: {fit} of {source.count} samples used, as all of them would take {needs:.1f} GB")
        elif asked < min(source.count, most or source.count):
            self.notes.add(f"{name}: {asked} of {source.count} samples used, as --max-samples says")
        count = min(source.count, fit, asked, most or source.count)
        if count == source.count:
            return np.arange(count, dtype=np.int64)
        return np.sort(np.random.default_rng(self.seed).choice(source.count, count, replace=False))

    def shuffled(self, indices: Array) -> Array:
        return np.random.default_rng((self.seed, 1)).permutation(indices)

    def open(self, where: str) -> Source:
        kind = kind_of(where)
        source = self._opened(kind, where)
        root = _path(where) if kind == "pictures" else None
        self.sources[where] = digest_files(source.files, root)
        return source

    def _opened(self, kind: str, where: str) -> Source:
        if kind == "table":
            from perwatt.datasets_text import open_table

            return open_table(
                _path(where), self.section, self.signature, tokenizer=self.tokenizer, label2id=self.label2id
            )
        if kind == "pictures":
            from perwatt.datasets_images import open_images

            return open_images(
                _path(where), self.section, self.signature, normalization=self.normalization,
                raw_inputs=self.raw_inputs, label2id=self.label2id,
            )  # fmt: skip
        if kind == "arrays":
            return open_arrays(
                _path(where), self.signature, normalization=self.normalization, raw_inputs=self.raw_inputs,
                label2id=self.label2id,
            )  # fmt: skip
        return open_callable(
            where, self.signature, normalization=self.normalization, raw_inputs=self.raw_inputs,
            label2id=self.label2id, most=self.section.max_samples,
        )  # fmt: skip

    def finish(self, source: Source) -> None:
        """Takes over a labelled source's notes and class names; all labelled sources must agree on the classes."""
        self.take_notes(source)
        if source.class_names is None:
            return
        if self.class_names is not None and self.class_names != source.class_names:
            ours, theirs = listed(self.class_names, 4), listed(source.class_names, 4)
            raise InputError(f"the data sets have different classes: {ours} against {theirs}")
        self.class_names = source.class_names

    def take_notes(self, source: Source) -> None:
        for note in source.notes:
            self.notes.add(note)


__all__ = ["CALIBRATE_AT_MOST", "Roles", "kind_of", "open_roles", "peek"]
