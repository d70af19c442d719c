"""`Bundle`: the folder that a run leaves, written whole or not at all.

Everything is written into a folder beside the final one, synced to disk, and then moved into place in one step: a plain
rename where nothing is there, an exchange of the two folders (`renameat2(RENAME_EXCHANGE)`) where an older bundle is.
Whatever moment the process is killed at, the old bundle or the new one is there, never half of one; leftovers of killed
runs are swept by the next.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perwatt.artifact import signature_from_json
from perwatt.errors import InputError
from perwatt.signature import Signature

LOCK = "perwatt.lock.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk."""

    path: Path

    @property
    def report(self) -> dict[str, Any]:
        """`report.json` as plain data."""
        found: dict[str, Any] = json.loads((self.path / "report.json").read_text())
        return found

    @property
    def lock(self) -> dict[str, Any]:
        """`perwatt.lock.json` as plain data."""
        found: dict[str, Any] = json.loads((self.path / LOCK).read_text())
        return found

    @property
    def program(self) -> dict[str, Any]:
        """`program.json`: target, signature, operating point, backend settings."""
        found: dict[str, Any] = json.loads((self.path / "program.json").read_text())
        return found

    @property
    def signature(self) -> Signature:
        """Inputs and outputs of the deployed model."""
        return signature_from_json(self.program["signature"])

    @property
    def outcome(self) -> str:
        """optimized, unchanged or budget_not_met."""
        return str(self.report["outcome"])


def open_bundle(path: str | Path) -> Bundle:
    """The bundle at `path`. Raises InputError where there is none."""
    bundle = Bundle(Path(path))
    if not (bundle.path / LOCK).is_file() or not (bundle.path / "program.json").is_file():
        raise InputError(f"{path} is no perwatt bundle", fix="give a folder that `optimize` wrote")
    return bundle


def is_bundle(path: Path) -> bool:
    """Whether `path` is a folder that perwatt wrote."""
    return (path / LOCK).is_file() and (path / "program.json").is_file()


def check_destination(path: Path, model_name: str, force: bool) -> None:
    """Refuse, before any work is done, a destination that can't or mustn't be written. Raises InputError."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file", fix="give another folder with --out")
    if path.is_dir() and not force and any(path.iterdir()):
        if not is_bundle(path):
            raise InputError(f"{path} exists and is no bundle of perwatt's", fix="give another folder with --out, or --force to replace it")
        made_from = open_bundle(path).lock.get("model", {}).get("name")
        if made_from != model_name:
            raise InputError(f"{path} is a bundle of another model ({made_from})", fix="give another folder with --out, or --force to replace it")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"the folder {parent} does not exist", fix="create it, or give another one with --out")
    probe = parent / f".{path.name}.probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise InputError(f"can't write into {parent}: {error.strerror}", fix="give another folder with --out") from None


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A folder to fill; on success it becomes `path` in one step, on any failure it is gone. Raises InputError where
    the disk is full or not writable."""
    path = path.absolute()
    sweep(path)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
        _sync(partial)
        _into_place(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"no room on the disk that holds {path.parent}", fix="free some, or give another folder with --out") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"can't write {path}: {error.strerror}", fix="give another folder with --out") from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep(path: Path) -> None:
    """Remove what killed runs left beside `path`."""
    for left in path.absolute().parent.glob(f".{path.name}.partial-*"):
        owner = re.search(r"-(\d+)$", left.name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            shutil.rmtree(left, ignore_errors=True)


def _sync(folder: Path) -> None:
    for where, _, names in os.walk(folder):
        for name in [*names, "."]:
            handle = os.open(os.path.join(where, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _into_place(partial: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        os.rename(partial, path)
    elif not _exchange(partial, path):
        # No exchange on this system: the old folder steps aside first. A kill between the two renames leaves it there.
        aside = path.parent / f".{path.name}.partial-old-{os.getpid()}"
        os.rename(path, aside)
        os.rename(partial, path)
        shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(path.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step (Linux renameat2); False where the system can't."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative names and contents."""
    sha = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if file != path:
            sha.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def write_json(path: Path, plain: Any) -> None:
    """Indented, UTF-8, with a newline at its end; refuses NaN, which JSON does not have."""
    path.write_text(json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def program_json(target: str, signature: Signature, facts: dict[str, Any]) -> dict[str, Any]:
    """What a loader needs to know to run the saved program at its operating point."""
    return {
        "target": target,
        "signature": asdict(signature),
        "batch_is_dynamic": isinstance(signature.batch, str),
        "call_batch": None if signature.batch is None else facts["operating_point"]["batch"],
        "operating_point": facts["operating_point"],
        "settings": facts.get("settings", {}),
    }
