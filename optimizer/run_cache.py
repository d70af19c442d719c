"""Answers of whole runs, kept as bundles and found by what decided them.

    cache = open_run_cache()
    key = run_key(recipe, steps)
    bundle = cache.restore(key, out)          # None: run it, and then
    cache.keep(key, out)

The same model, data, recipe, perwatt, packages and machine give the same answer, so that it need not be found again. Files
count by their content and by their path as written, tidied: the bundle's recipe names them, and a gate looks for its data
there. Where the recipe names Python code, the Python files of the folders that such code can import from count, too.

An entry is a folder with the bundle and a digest over all of it, written whole or not at all; one that is damaged is removed
and found anew. What was not used for longest goes first where the folder grows beyond its limit. A cache that can't be
written costs the head start only.

Limits: what the recipe's own code reads beside Python files is not seen, nor are packages that `cache_keys` doesn't list and
meters other than RAPL's that come and go. Nothing here imports a backend, torch or onnx_ir.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from perwatt.bench.fingerprint import fingerprint
from perwatt.bench.rapl import POWERCAP, find_zones
from perwatt.bundle import Bundle, cache_folder, digest_of, is_bundle, sweep, writing
from perwatt.cache_keys import digest, environment
from perwatt.datasets_callable import callable_file, is_callable_spec
from perwatt.datasets_source import digest_files
from perwatt.errors import InputError
from perwatt.recipe import OneOf, PassStep, Recipe

LIMIT_BYTES = 10 << 30
BUNDLE, ENTRY = "bundle", "entry.json"
FILES = (
    ("model", "path"), ("model", "arch"), ("data", "all"), ("data", "calibrate"), ("data", "eval"), ("data", "train"),
    ("data", "confirm"), ("data", "metric"),
)  # fmt: skip
"""What of a recipe may name a file or a folder."""
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PERWATT_METER", "PERWATT_MEMORY_LIMIT")
"""What of this process's environment a run depends on."""
MOST_CODE = 5000
"""More Python files than this are not looked through."""
LIBRARIES = ("node_modules", "site-packages")
EXTERNAL = b"\x0a\x08location\x12"
"""In a file of ONNX, what is before the name of a file that holds a tensor: the key of an entry of
`TensorProto.external_data`, and the tag of its value."""
LONGEST_NAME = 4096


def run_key(
    recipe: Recipe, steps: Sequence[PassStep | OneOf], machine: Mapping[str, Any] | None = None, **facts: Any
) -> str | None:
    """The key of a run; None where nobody can tell whether it would be the same again.

    `steps`: the recipe's passes, `default` spelled out. `machine`: the fingerprint of the one that measures, None for this
    one. `facts`: whatever else decides, as plain data. Raises InputError for a file that is named and can't be read."""
    code = _code(recipe)
    if code is None:
        return None
    plain = recipe.model_copy(update={"passes": list(steps)}).model_dump(mode="json")
    inputs = {}
    for section, name in FILES:
        where = getattr(getattr(recipe, section), name)
        if where is not None:
            plain[section][name] = _tidied(where)
            inputs[f"{section}.{name}"] = _content(where, name == "path")
    return digest(
        {
            "recipe": plain,
            "inputs": inputs,
            "code": code,
            "machine": {**fingerprint(), "counters": _counters()} if machine is None else dict(machine),
            "variables": {name: os.environ.get(name) for name in VARIABLES},
            "environment": environment(),
            "facts": facts,
        }
    )


def open_run_cache() -> RunCache | None:
    """The user's cache; None where there is no home."""
    folder = cache_folder("runs")
    return None if folder is None else RunCache(folder)


class RunCache:
    """A folder of bundles by key. Several processes may use it at once. `limit_bytes`: what it may take, about."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def kept(self, key: str) -> Path | None:
        """The bundle that is kept under `key`; not yet known to be whole, which `restore` finds out."""
        path = self.folder / key / BUNDLE
        return path if is_bundle(path) and (self.folder / key / ENTRY).is_file() else None

    def keep(self, key: str, bundle: Path) -> bool:
        """Keep a copy of the bundle; whether that could be done."""
        try:
            if _bytes(bundle) > self.limit_bytes:
                return False
            self.folder.mkdir(parents=True, exist_ok=True)
            with writing(self.folder / key) as entry:
                _copy(bundle, entry / BUNDLE)
                (entry / ENTRY).write_text(json.dumps({"sha256": digest_of(entry / BUNDLE)}))
            self._make_room()
        except (OSError, InputError):
            return False
        return True

    def restore(self, key: str, out: Path) -> Bundle | None:
        """Put the bundle of `key` into place as `out`, in one step; None where there is none that is whole. What is there is
        replaced, so see `check_destination` before. Raises InputError where `out` can't be written."""
        found = self.kept(key)
        if found is None:
            return None
        try:
            told = json.loads((found.parent / ENTRY).read_text())["sha256"]
            with writing(out) as folder:
                _copy(found, folder)
                # What is checked is what was copied: nobody can change it in between.
                if digest_of(folder) != told:
                    raise ValueError("the bundle is damaged")
        except (OSError, ValueError, KeyError, TypeError):
            # Damaged, or removed by another process meanwhile.
            shutil.rmtree(found.parent, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(found.parent)
        return Bundle(out)

    def _make_room(self) -> None:
        """Remove what was not used for longest, and what killed processes left."""
        for left in self.folder.glob(".*.partial-*"):
            sweep(self.folder / left.name[1:].rpartition(".partial-")[0])
        entries = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        total = 0
        for path in sorted(entries, key=_used, reverse=True):
            total += _bytes(path)
            if total > self.limit_bytes:
                shutil.rmtree(path, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """All files of a folder, with their modes. Not `shutil.copytree`, which gathers errors and forgets which one was that the
    disk is full."""
    for where, _, names in os.walk(source):
        folder = target / Path(where).relative_to(source)
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(Path(where) / name, folder / name)


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _bytes(folder: Path) -> int:
    """Of all files in it; what another process removes meanwhile counts for nothing."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_size
    return total


# What a run reads -----------------------------------------------------------------------------------------------------


def _tidied(where: str) -> str:
    """`./net.onnx` and `net.onnx` are one path."""
    return os.path.normpath(os.path.expanduser(where))


def _content(where: str, model: bool = False) -> list[str] | None:
    """Digests of what a recipe names: a file, with those that hold the weights of a model, a folder, the file of
    `file.py:callable`; None for what names no file, as a metric, a package, or what is missing, which the run says."""
    path = callable_file(where) if is_callable_spec(where) else Path(where).expanduser()
    try:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return [digest_files(files, path)]
        if path.is_file():
            return [digest_files([file]) for file in (path, *(_weights_of(path) if model else ()))]
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from None
    return None


def _counters() -> list[str]:
    """The energy counters that may be read: a run says with which one it counted."""
    return [str(zone.path) for zone in find_zones(POWERCAP) if os.access(zone.path / "energy_uj", os.R_OK)]


def _weights_of(model: Path) -> list[Path]:
    """The files that a model in ONNX says its weights are in: found by the bytes before their names, as parsing takes seconds
    that a finished answer should not."""
    names = set()
    if model.stat().st_size:
        with model.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.find(EXTERNAL)
            while start >= 0:
                start += len(EXTERNAL)
                names.add(_counted(content[start : start + LONGEST_NAME] + b"\0\0"))
                start = content.find(EXTERNAL, start)
    return [file for name in sorted(names) if _is_file(file := model.parent / os.fsdecode(name))]


def _counted(content: bytes) -> bytes:
    """What is behind a length of one or two bytes, as protobuf writes it."""
    length, start = content[0], 1
    if length > 127:
        length, start = length - 128 + 128 * content[1], 2
    return content[start : start + length]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        # By chance, bytes of some weight look like the place of another one.
        return False


def _code(recipe: Recipe) -> str | None:
    """SHA-256 over the Python files that code named by the recipe may import; None where they are too many to look through."""
    named = [getattr(getattr(recipe, section), name) for section, name in FILES if (section, name) != ("model", "path")]
    roots = {callable_file(where).resolve().parent for where in named if where and is_callable_spec(where)}
    if recipe.model.arch or recipe.model.trust:
        # Networks and pickled modules are imported from the working directory, too.
        roots |= {Path.cwd(), *_package(recipe.model.arch or "")}
    found = set()
    for root in roots:
        for file in _python_files(root):
            found.add((os.path.relpath(file, root), digest_files([file])))
            if len(found) > MOST_CODE:
                return None
    return digest(sorted(found))


def _package(arch: str) -> list[Path]:
    """Where the package lies that `package.module:callable` names; nothing where it lies nowhere, or a file is named."""
    top = arch.partition(":")[0].partition(".")[0]
    if is_callable_spec(arch) or not top.isidentifier():
        return []
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    places = list(spec.submodule_search_locations or ()) or [spec.origin or ""]
    return [Path(place) for place in places if place]


def _python_files(root: Path) -> Iterator[Path]:
    """`root` itself, or those below it; without hidden folders, virtual environments and installed packages."""
    if root.is_file():
        yield root
    for where, inside, names in os.walk(root):
        inside[:] = [name for name in inside if not _passed_over(Path(where) / name)]
        yield from (file for name in names if name.endswith(".py") and (file := Path(where) / name).is_file())


def _passed_over(folder: Path) -> bool:
    return folder.name.startswith((".", "__")) or folder.name in LIBRARIES or (folder / "pyvenv.cfg").exists()
