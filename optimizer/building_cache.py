"""Bundles that were built already, found by what went into them.

The key is a SHA-256 over the content of every file that the recipe names, the recipe itself without where those files
lie, perwatt (its version and its source files: an editable install changes without a new version), the packages that a
bundle records, third-party passes and targets, and the machine's fingerprint: a bundle holds measurements of one machine.
Where the recipe names Python code, all of the commit counts, as nobody can tell which files that code reads.

An entry is a bundle, written whole or not at all; one that is damaged is built anew. The 20 used last are kept, up to
5 GB; whatever was used within the hour stays, because a gate may be measuring from it.

Limits: files that such code reads and that git ignores are not seen: `force` builds anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from perwatt.bundle import digest_of, is_bundle, open_bundle, sweep
from perwatt.errors import InputError
from perwatt.recipe import Recipe

KEEP_ENTRIES, KEEP_BYTES, IN_USE_S = 20, 5_000_000_000, 3600.0
"""How many entries stay, how much they may hold together, and how long one that was used is left alone."""

PACKAGES = ("perwatt", "perwatt.bench", "perwatt.kernels", "perwatt.passes", "perwatt.targets")
_ENTRY = re.compile(r".+-[0-9a-f]{32}")
_LOCK, _STRIPE = ".lock", ".lock-{}"


def default_folder() -> Path:
    """`$PERWATT_CACHE`, else `perwatt/bundles` in the user's cache folder. Raises InputError where there is no home."""
    if given := os.environ.get("PERWATT_CACHE"):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # a relative one is invalid, says the XDG specification
        return Path(base) / "perwatt" / "bundles"
    try:
        return Path.home() / ".cache" / "perwatt" / "bundles"
    except RuntimeError:
        raise InputError("there is no home folder to cache bundles in", fix="set PERWATT_CACHE to a folder") from None


class Cache:
    """A folder of bundles. Several processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _LOCK).touch()
        except OSError as error:
            raise InputError(
                f"can't write the cache of bundles {folder}: {error.strerror}",
                fix="set PERWATT_CACHE to another folder",
            ) from None

    @contextmanager
    def building(self, name: str, waiting: Callable[[], None]) -> Iterator[Path]:
        """Where the entry `name` lies or will lie; nobody else builds it meanwhile. `waiting` is called once where
        somebody does."""
        with self._locked(_STRIPE.format(name[-2:]), waiting):
            yield self.folder / name

    def use(self, name: str) -> Path | None:
        """The entry `name`, marked as used now; None where there is none, or a damaged one."""
        path = self.folder / name
        with self._locked(_LOCK):
            if not is_bundle(path):
                return None
            os.utime(path)
        return path if intact(path) else None

    def prune(self) -> None:
        """Remove what was not used for long, and what killed builds left. What is no entry is never touched."""
        with self._locked(_LOCK):
            for left in self.folder.glob(".*.partial-*"):
                sweep(self.folder / left.name[1:].rpartition(".partial-")[0])
            used = {path: _status(path, "st_mtime") for path in self.folder.iterdir() if _is_entry(path)}
            size = 0.0
            for count, path in enumerate(sorted(used, key=lambda entry: used[entry], reverse=True), start=1):
                size += sum(_status(file, "st_size") for file in path.rglob("*"))
                if (count > KEEP_ENTRIES or size > KEEP_BYTES) and time.time() - used[path] > IN_USE_S:
                    shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _locked(self, name: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """An exclusive lock of that name, held by this process alone and gone with it."""
        with (self.folder / name).open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _status(path: Path, name: str) -> float:
    """A number of the file's status; zero for what another process has removed meanwhile."""
    try:
        return float(getattr(path.lstat(), name))
    except FileNotFoundError:
        return 0.0


def _is_entry(path: Path) -> bool:
    return _ENTRY.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def intact(path: Path) -> bool:
    """Whether all that the bundle's lock lists is there, byte for byte."""
    try:
        outputs = open_bundle(path).lock["outputs"]
        return bool(outputs) and all(digest_of(path / name) == digest for name, digest in outputs.items())
    except (InputError, OSError, KeyError, AttributeError):
        return False


def entry_name(recipe: Recipe, here: Path, code: Callable[[], str]) -> str:
    """The entry's name for `recipe` built in the folder `here`: model, target and key. `code` gives a digest of all that
    the recipe's own Python code may read there; it is asked only where there is such code. Raises InputError."""
    from perwatt.compilation import resolve_steps

    plain = recipe.model_copy(update={"passes": resolve_steps(recipe)}).model_dump(mode="json")
    digests = {}
    for (section, key), where in named_files(recipe).items():
        # The path as written counts too: the bundle keeps it, and a gate looks for the data there.
        plain[section][key] = where
        digests[f"{section}.{key}"] = [_digest(file) for file in files_of(where, here)]
    facts = {
        "recipe": plain,
        "inputs": digests,
        "code": [code(), _environment_code(recipe, here)] if names_code(recipe) else None,
        "perwatt": _own_source(),
        "versions": _versions(),
        "hardware": _hardware(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^\w.-]", "_", f"{Path(recipe.model.path).stem}-{recipe.target.name}").lstrip(".")
    return f"{name[:80]}-{key[:32]}"


def named_files(recipe: Recipe) -> dict[tuple[str, str], str]:
    """(section, key) → what the recipe says there, for everything in it that names a file or a folder."""
    data = {key: getattr(recipe.data, key) for key in ("all", "calibrate", "eval", "train", "confirm", "metric")}
    found = {("data", key): where for key, where in data.items() if where}
    found["model", "path"] = recipe.model.path
    if recipe.model.arch:
        found["model", "arch"] = recipe.model.arch
    # A metric goes by its name, and a network may come from a package: both name no file then.
    return {
        place: where
        for place, where in found.items()
        if place not in (("data", "metric"), ("model", "arch")) or code_file(where) is not None
    }


def names_code(recipe: Recipe) -> bool:
    """Whether building runs Python code that the recipe names."""
    return bool(recipe.model.arch) or any(code_file(where) is not None for where in named_files(recipe).values())


def code_file(where: str) -> Path | None:
    """The file in `file.py:callable`; None for anything else."""
    file, colon, name = where.rpartition(":")
    return Path(file).expanduser() if colon and name and file.endswith(".py") else None


def path_of(where: str) -> Path:
    """The file or folder that `where` names, as written: absolute, or relative to the folder that perwatt runs in."""
    return code_file(where) or Path(where).expanduser()


def files_of(where: str, here: Path) -> list[Path]:
    """The file or folder that `where` names, seen from `here`, and the files of weights that an ONNX model refers to."""
    path = here / path_of(where)
    return [path, *(path.parent / name for name in external_weights(path))]


def external_weights(model: Path) -> list[str]:
    """Names of the files beside an ONNX model that hold its weights, sorted; empty for anything else."""
    from perwatt.reading import detect

    try:
        if not model.is_file() or detect(model) != "onnx":
            return []
    except InputError:
        return []
    from perwatt.artifact import external_files

    return external_files(model)


def _digest(path: Path) -> str | None:
    """None for what is not there: building says so."""
    try:
        return digest_of(path) if path.exists() else None
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from None


def source_digest(packages: Sequence[str] = PACKAGES) -> str:
    """SHA-256 over the files of packages, perwatt's own unless others are named; folders inside don't count."""
    sha = hashlib.sha256()
    for package in packages:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            for file in sorted(Path(folder).iterdir()):
                if file.is_file():
                    sha.update(f"{package}/{file.name} {digest_of(file)}\n".encode())
    return sha.hexdigest()


@cache
def _own_source() -> str:
    """perwatt as it was when this process first asked: who edits it during a gate gets one answer all the same."""
    return source_digest()


def from_environment(recipe: Recipe, here: Path) -> Path | None:
    """Where the package that the recipe's `arch` names comes from; None where it lies in `here`, or there is none."""
    place = (recipe.model.arch or "").partition(":")[0]
    top = place.partition(".")[0]
    if not top.isidentifier() or place.endswith(".py") or (here / top).exists() or (here / f"{top}.py").exists():
        return None
    spec = None
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    return Path(folders[0]) if folders else Path(spec.origin) if spec.origin else None


def _environment_code(recipe: Recipe, here: Path) -> str | None:
    where = from_environment(recipe, here)
    if where is None or not where.exists():
        return None
    files = [where] if where.is_file() else sorted(where.rglob("*.py"))
    return hashlib.sha256(repr([(file.name, digest_of(file)) for file in files]).encode()).hexdigest()


def _versions() -> dict[str, Any]:
    """Python, the packages that a bundle records, and who brings passes and targets of their own."""
    from perwatt.writing import RECORDED_PACKAGES

    found: dict[str, Any] = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    for group in ("perwatt.passes", "perwatt.targets"):
        brought = entry_points(group=group)
        found[group] = sorted(f"{e.name}={e.value} {e.dist.version if e.dist is not None else ''}" for e in brought)
    return found


def _hardware() -> str:
    from perwatt.bench.fingerprint import digest, fingerprint

    return digest(fingerprint())
