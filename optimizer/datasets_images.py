"""A folder of pictures as a data set.

Three layouts: class subfolders (labels in sorted order, or as the model numbers them), `labels.csv` (file name, label),
or pictures without labels. Each picture is turned upright (EXIF), resized by its shorter side, cropped at the centre
and laid out as the model's input wants it. Decoding runs in threads.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perwatt.data import Samples
from perwatt.datasets_fit import PICTURE_CHANNELS, Normalization, dtype_of, is_float
from perwatt.datasets_source import Labels, Notes, Source, encode_text, listed, name_ids, ordered_names
from perwatt.errors import InputError
from perwatt.recipe import DataSection, RawInput
from perwatt.signature import Array, Signature, TensorSpec

if TYPE_CHECKING:
    from PIL.Image import Image

LABELS_FILE = "labels.csv"

_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".jp2"}
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_GRAYSCALE = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L")


@dataclass(frozen=True)
class _Plan:
    """How a picture becomes an item of the input."""

    height: int
    width: int
    resize: int | None
    channels: int
    channels_last: bool
    dtype: np.dtype[Any]
    normalization: Normalization | None

    @property
    def item_shape(self) -> tuple[int, int, int]:
        size = (self.height, self.width)
        return (*size, self.channels) if self.channels_last else (self.channels, *size)


def peek_images(folder: Path, image: int | list[int] | None) -> list[TensorSpec] | None:
    """float32 ["batch", channels, height, width]; None where --image is missing. Channels are the first picture's."""
    from PIL import Image

    size = _image_size(image)
    if size is None:
        return None
    pictures = sorted(path for path in folder.rglob("*") if _is_picture(path))
    if not pictures:
        raise InputError(f"{folder} has no pictures in it")
    try:
        with Image.open(pictures[0]) as picture:
            channels = 1 if picture.mode in _GRAYSCALE else 3
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(pictures[0], error) from None
    return [TensorSpec("images", "float32", ("batch", channels, *size))]


def open_images(
    folder: Path,
    section: DataSection,
    signature: Signature,
    *,
    normalization: Normalization | None,
    raw_inputs: Mapping[str, RawInput],
    label2id: Mapping[str, int] | None,
) -> Source:
    """Lists the folder; pictures are decoded when loaded. Raises InputError where the model takes no pictures, the size
    is unknown, the folder has no pictures or bad labels, or (when loaded) a picture can't be read."""
    notes = Notes()
    plan = _plan(section, signature, raw_inputs, normalization, notes)
    pictures, labels = _listing(folder, label2id, notes)
    name = signature.inputs[0].name

    def load(indices: Array) -> Samples:
        items = _decode([pictures[i] for i in indices], plan)
        return Samples([{name: items}], None if labels is None else labels.values[indices])

    table = folder / LABELS_FILE
    files = [*pictures, table] if table.is_file() else pictures
    names = None if labels is None else labels.class_names
    item_bytes = int(np.prod(plan.item_shape)) * plan.dtype.itemsize
    return Source(len(pictures), load, files, notes, names, item_bytes)


def _plan(
    section: DataSection, signature: Signature, raw_inputs: Mapping[str, RawInput],
    normalization: Normalization | None, notes: Notes,
) -> _Plan:  # fmt: skip
    if len(signature.inputs) != 1:
        names = listed(spec.name for spec in signature.inputs)
        raise InputError(f"pictures feed one input, the model has {names}", fix="give an .npz or file.py:callable")
    spec = signature.inputs[0]
    if spec.shape is not None and len(spec.shape) != 4:
        raise InputError(f"the model's input {spec} takes no pictures", fix="give an .npz or file.py:callable")
    raw = raw_inputs.get(spec.name)
    shape = spec.shape or ("batch", "channels", "height", "width")
    last = shape[1] not in PICTURE_CHANNELS and shape[3] in PICTURE_CHANNELS
    if raw is not None and raw.layout is not None:
        last = raw.layout == "NHWC"
    channels = shape[3 if last else 1]
    if not isinstance(channels, int):
        channels = 3
    if channels not in PICTURE_CHANNELS:
        raise InputError(f"the model's input {spec} has {channels} channels, pictures have 1 or 3")
    size = _size(section, spec, shape[1:3] if last else shape[2:4])
    dtype = dtype_of(spec)
    if raw is not None or not is_float(dtype):
        normalization = Normalization(raw=True)
        notes.add(f"input {spec.name} is fed raw 0..255")
    elif normalization is None:
        normalization = Normalization()
        notes.add("warning: no --normalize was given, so pictures are fed as x/255: is that how the model was trained?")
    _note_resize(size, section.resize, notes)
    return _Plan(*size, section.resize, channels, last, dtype, normalization)


def _size(section: DataSection, spec: TensorSpec, dims: tuple[int | str, ...]) -> tuple[int, int]:
    asked = _image_size(section.image)
    fixed = [d if isinstance(d, int) else None for d in dims]
    if asked is None:
        if None in fixed:
            raise InputError(f"the model's input {spec} leaves the picture size open", fix="give --image SIDE or H,W")
        asked = (fixed[0] or 0, fixed[1] or 0)
    if any(f not in (None, a) for f, a in zip(fixed, asked, strict=True)):
        raise InputError(f"--image {asked[0]},{asked[1]} doesn't fit the model's input {spec}")
    if section.resize is not None and section.resize < min(asked):
        raise InputError(f"--resize {section.resize} is smaller than --image {min(asked)}, which is cropped out of it")
    return asked


def _image_size(image: int | list[int] | None) -> tuple[int, int] | None:
    if image is None:
        return None
    sides = [image] if isinstance(image, int) else list(image)
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise InputError(f"--image {image} is no size", fix="give one side, or height and width")
    return sides[0], sides[-1]


def _note_resize(size: tuple[int, int], resize: int | None, notes: Notes) -> None:
    height, width = size
    if resize is not None:
        notes.add(f"pictures: shorter side to {resize} (bilinear), centre crop {height}×{width}")
    else:
        side = round(height * 256 / 224) if height == width else "256/224 of the crop"
        notes.add(
            f"pictures of {height}×{width} are fed as they are; others: shorter side to {side} (bilinear), centre crop"
        )


def _listing(folder: Path, label2id: Mapping[str, int] | None, notes: Notes) -> tuple[list[Path], Labels | None]:
    """Pictures in order, and their labels."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__")))
    flat = [path for path in entries if _is_picture(path)]
    folders = [path for path in entries if path.is_dir()]
    others = sum(path.is_file() and not _is_picture(path) and path.name != LABELS_FILE for path in entries)
    if others:
        notes.add(f"{folder}: {others} files that are no pictures left aside")
    if (folder / LABELS_FILE).is_file():
        return _by_table(folder, label2id, notes)
    if folders and {path.name.lower() for path in folders} <= _SPLITS:
        best = next((p.name for p in folders if p.name.lower().startswith(("val", "test"))), folders[0].name)
        names = listed(path.name for path in folders)
        raise InputError(f"{folder} holds whole data sets: {names}", fix=f"give {folder / best}")
    inside = {path: sorted(p for p in path.rglob("*") if _is_picture(p)) for path in folders}
    if not flat and sum(map(len, inside.values())) == 0:
        raise InputError(f"{folder} has no pictures in it")
    if flat:
        if any(inside.values()):
            notes.add(f"{folder}: pictures in subfolders left aside, as there are pictures beside them")
        return flat, None
    if len(folders) == 1:
        notes.add(f"{folder} has one subfolder, so its pictures are taken as unlabelled")
        return inside[folders[0]], None
    return _by_folder(folder, inside, label2id, notes)


def _by_folder(
    folder: Path, inside: Mapping[Path, list[Path]], label2id: Mapping[str, int] | None, notes: Notes
) -> tuple[list[Path], Labels]:
    names = [path.name for path in inside]
    empty = [path.name for path, pictures in inside.items() if not pictures]
    if empty:
        notes.add(f"{folder}: no pictures of {listed(empty)}")
    if len(names) > 10 and all(name.isdigit() and str(int(name)) == name for name in names):
        notes.add("class folders with bare numbers are sorted as text (0, 1, 10, 2, …), as torchvision does")
    ids = name_ids(names, str(folder), label2id, notes)
    pictures = [picture for found in inside.values() for picture in found]
    values = [ids[path.name] for path, found in inside.items() for _ in found]
    return pictures, Labels(np.array(values, dtype=np.int64), ordered_names(ids))


def _by_table(folder: Path, label2id: Mapping[str, int] | None, notes: Notes) -> tuple[list[Path], Labels]:
    table = folder / LABELS_FILE
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            lines = [line for line in csv.reader(stream) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"can't read {table}: {error}") from None
    if lines and not (folder / lines[0][0]).is_file():
        lines = lines[1:]
    pictures, texts = [], []
    for line in lines:
        if len(line) < 2:
            raise InputError(f"{table}: {line[0]!r} has no label", fix="each line is file name, label")
        path = folder / line[0].strip()
        if not path.is_file():
            raise InputError(f"{table} names {line[0]!r}, which is not in {folder}")
        pictures.append(path)
        texts.append(line[1])
    if not pictures:
        raise InputError(f"{table} names no pictures", fix="each line is file name, label")
    unlisted = len({p for p in folder.rglob("*") if _is_picture(p)} - set(pictures))
    if unlisted:
        notes.add(f"{folder}: {unlisted} pictures that {LABELS_FILE} doesn't name left aside")
    return pictures, encode_text(texts, str(table), label2id, notes)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _ENDINGS and not path.name.startswith(".") and path.is_file()


def _decode(pictures: Sequence[Path], plan: _Plan) -> Array:
    """[n, …] in the input's layout and type."""
    items = np.empty((len(pictures), *plan.item_shape), dtype=plan.dtype)

    def one(position: int) -> None:
        pixels = _pixels(pictures[position], plan)
        arranged = pixels if plan.channels_last else pixels.transpose(2, 0, 1)
        if plan.normalization is None:
            items[position] = arranged
        else:
            axis = 3 if plan.channels_last else 1
            items[position] = plan.normalization.apply(arranged[None], axis, "the model's input")[0]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(one, range(len(pictures))):
            pass
    return items


def _pixels(path: Path, plan: _Plan) -> Array:
    """uint8 [height, width, channels]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture: Any = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I;16"):
                # Pillow clips 16 bits to 8 instead of scaling them.
                picture = Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
            picture = _cropped(picture.convert("L" if plan.channels == 1 else "RGB"), plan)
            return np.asarray(picture, dtype=np.uint8).reshape(plan.height, plan.width, plan.channels)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from None


def _cropped(picture: Image, plan: _Plan) -> Image:
    from PIL.Image import Resampling

    width, height = picture.size
    if plan.resize is None and (height, width) == (plan.height, plan.width):
        return picture
    if plan.resize is not None:
        scale = plan.resize / min(width, height)
    elif plan.height == plan.width:
        scale = round(plan.height * 256 / 224) / min(width, height)
    else:
        scale = max(plan.height / height, plan.width / width) * 256 / 224
    # A rounding error must not leave the picture a pixel short of the crop.
    wide, high = max(int(width * scale + 1e-6), plan.width), max(int(height * scale + 1e-6), plan.height)
    picture = picture.resize((wide, high), Resampling.BILINEAR)
    left, top = round((wide - plan.width) / 2), round((high - plan.height) / 2)
    return picture.crop((left, top, left + plan.width, top + plan.height))


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"the picture {path} can't be read: {' '.join(str(error).split()) or type(error).__name__}")
