"""Which files go along with a question to a worker on another machine, and which come back.

One table says it. A parameter that is a file goes with what belongs to it (weights beside a model, perwatt's own note of
its signature); one that is a folder goes whole. What goes is told as a tree: relative paths with SHA-256 and size, so
that the other machine asks only for contents that it doesn't have yet.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from perwatt.errors import InputError

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Carried:
    """The parameters of one operation that are paths: files and folders that it reads, folders that it writes."""

    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


CARRIED = {
    "open": Carried(files=("model",)),
    "open_eager": Carried(files=("exported", "model")),
    "open_file": Carried(files=("path",)),
    "file_signature": Carried(files=("path",)),
    "load": Carried(folders=("folder",)),
    "predict": Carried(folders=("samples",), outputs=("out",)),
    "prepare": Carried(folders=("samples",)),
    "save": Carried(outputs=("folder",)),
    **dict.fromkeys(
        (
            "target", "warm", "drive", "serve", "latencies", "settle", "probe", "memory",
            "machine", "meter_open", "meter_start", "meter_stop", "meter_describe", "meter_close",
        ),
        Carried(),
    ),
}  # fmt: skip
"""Every operation that another machine is asked for. What is not here stays on this one."""


@dataclass(frozen=True)
class Tree:
    """Files below one folder: (relative path, SHA-256, bytes) of each, and where each lies on this machine."""

    entries: tuple[tuple[str, str, int], ...]
    sources: tuple[Path, ...]

    def digest(self) -> str:
        """Stands for the tree on both machines."""
        return tree_digest([list(entry) for entry in self.entries])


def tree_digest(entries: list[list[Any]]) -> str:
    """SHA-256 of a tree as it is sent."""
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


Key = tuple[str, int, int, int]


def _key(path: Path) -> Key:
    """Changes when the file does: path, bytes, time of change, inode."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns, status.st_ino


class Forest:
    """Trees of local files. Contents are read once, as long as a file's size and time of change stay the same."""

    def __init__(self) -> None:
        self._digests: dict[Key, str] = {}
        self._belonging: dict[Key, list[Path]] = {}

    def of_file(self, path: Path) -> Tree:
        """A file and what belongs to it. Raises InputError where it isn't there."""
        if not path.is_file():
            raise InputError(f"{path} is no file")
        key = _key(path)
        if key not in self._belonging:
            self._belonging[key] = list(_belonging(path))
        return self._tree(path.parent, [path, *self._belonging[key]])

    def of_folder(self, folder: Path) -> Tree:
        """Everything below a folder. Raises InputError where it isn't there."""
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder")
        return self._tree(folder, files_below(folder))

    def _tree(self, root: Path, files: list[Path]) -> Tree:
        ordered = sorted(set(files))
        entries = [(path.relative_to(root).as_posix(), *self._facts(path)) for path in ordered]
        return Tree(tuple(entries), tuple(ordered))

    def _facts(self, path: Path) -> tuple[str, int]:
        key = _key(path)
        if key not in self._digests:
            self._digests[key] = file_digest(path)
        return self._digests[key], key[1]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(relative: str) -> PurePosixPath:
    """`relative`, which another machine named, as a path that stays below its folder. Raises ValueError for any other."""
    path = PurePosixPath(relative)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in relative:
        raise ValueError(f"{relative!r} leaves its folder")
    return path


def files_below(folder: Path) -> list[Path]:
    """All files below `folder`, sorted; links are what they point to."""
    return sorted(Path(where) / name for where, _, names in os.walk(folder) for name in names)


def _belonging(path: Path) -> Iterator[Path]:
    """Files that a model file is of no use without, or that say what it is."""
    named = [path.name + ".json"]
    if path.suffix == ".xml":
        named.append(path.with_suffix(".bin").name)
    if path.suffix == ".onnx":
        named += _external_weights(path)
    for name in named:
        beside = path.parent / name
        if beside.is_file():
            yield beside


def _external_weights(path: Path) -> list[str]:
    """The files that an ONNX model says its weights are in; links out of its folder were refused when it was read."""
    from perwatt.artifact import external_files

    found = external_files(path)
    return [name for name in found if ".." not in PurePosixPath(name).parts and not Path(name).is_absolute()]
