"""`Bundle`: the folder that a run leaves, written whole or not at all.

Everything is written into a folder beside the final one, synced to disk, and then moved into place in one step: a plain
rename where nothing is there, an exchange of the two folders (`renameat2(RENAME_EXCHANGE)`) where an older bundle is.
Whatever moment the process is killed at, the old bundle or the new one is there, never half of one; leftovers of killed
runs are swept by the next.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
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
    """A bundle on disk. `from_cache`: it was made by an earlier run of the same search."""

    path: Path
    from_cache: bool = False

    @property
    def report(self) -> dict[str, Any]:
        """`report.json` as plain data."""
        return self._read("report.json")

    @property
    def lock(self) -> dict[str, Any]:
        """`perwatt.lock.json` as plain data."""
        return self._read(LOCK)

    @property
    def program(self) -> dict[str, Any]:
        """`program.json`: target, signature, operating point, backend settings."""
        return self._read("program.json")

    @property
    def signature(self) -> Signature:
        """Inputs and outputs of the deployed model."""
        return signature_from_json(self.program["signature"])

    @property
    def outcome(self) -> str:
        """optimized, unchanged or budget_not_met."""
        return str(self.report["outcome"])

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"the bundle {self.path} is damaged: {name} can't be read ({error})", fix="make it anew"
            ) from None
        if not isinstance(found, dict):
            raise InputError(f"the bundle {self.path} is damaged: {name} holds no object", fix="make it anew")
        return found


def open_bundle(path: str | Path) -> Bundle:
    """The bundle at `path`. Raises InputError where there is none."""
    if not is_bundle(Path(path)):
        raise InputError(f"{path} is no perwatt bundle", fix="give a folder that `optimize` wrote")
    return Bundle(Path(path))


def is_bundle(path: Path) -> bool:
    """Whether `path` is a folder that perwatt wrote."""
    return (path / LOCK).is_file() and (path / "program.json").is_file()


def check_destination(path: Path, model_name: str, force: bool, inputs: Sequence[str | Path] = ()) -> None:
    """Refuse, before any work is done, a destination that can't or mustn't be written. A folder that holds one of the
    run's own `inputs` is never replaced, forced or not. Raises InputError."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file", fix="give another folder with --out")
    if path.is_dir() and not force and any(path.iterdir()):
        if not is_bundle(path):
            raise InputError(
                f"{path} exists and is no bundle of perwatt's",
                fix="give another folder with --out, or --force to replace it",
            )
        made_from = open_bundle(path).lock.get("model", {})
        if not _same_model(made_from, model_name, inputs):
            raise InputError(
                f"{path} is a bundle of another model ({made_from.get('path', made_from.get('name'))})",
                fix="give another folder with --out, or --force to replace it",
            )
    held = [where for where in inputs if Path(os.path.realpath(where)).is_relative_to(os.path.realpath(path))]
    if held:
        raise InputError(f"{path} holds {held[0]}, which would be replaced", fix="give another folder with --out")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"the folder {parent} does not exist", fix="create it, or give another one with --out")
    probe = parent / f".{path.name}.probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise InputError(f"can't write into {parent}: {error.strerror}", fix="give another folder with --out") from None


def _same_model(made_from: dict[str, Any], model_name: str, inputs: Sequence[str | Path]) -> bool:
    """Whether the bundle's lock tells of the model that this run is about: the same path, or the same content."""
    if made_from.get("name") != model_name:
        return False
    if not inputs or "path" not in made_from or made_from["path"] == str(inputs[0]):
        return True
    return Path(inputs[0]).exists() and digest_of(Path(inputs[0])) == made_from.get("sha256")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A folder to fill; on success it becomes `path` in one step, on any failure it is gone. Raises InputError where
    the disk is full or not writable."""
    # A link to a folder stays a link: what it points to is what gets replaced.
    path = Path(os.path.realpath(path))
    try:
        sweep(path)
        partial, mark = _new_partial(path)
    except OSError as error:
        raise _cant_write(path, error) from None
    try:
        yield partial
        _sync(partial)
        _into_place(partial, path)
    except OSError as error:
        if no_room(error) or error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise _cant_write(path, error) from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(mark)


def _cant_write(path: Path, error: OSError) -> InputError:
    if no_room(error):
        return InputError(
            f"no room on the disk that holds {path.parent}", fix="free some, or give another folder with --out"
        )
    return InputError(f"can't write {path}: {error.strerror}", fix="give another folder with --out")


def no_room(error: OSError) -> bool:
    """Whether a disk is full. NumPy says so in words, without the number."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or bool(re.search(r"\d+ requested and \d+ written", str(error)))


def _new_partial(path: Path) -> tuple[Path, int]:
    """A new folder beside `path`, and the lock on it that says that its owner lives. Process numbers would not do: they
    come again, in containers at every start."""
    while True:
        partial = path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"
        partial.mkdir()
        mark = _lock(partial)
        # Between the two calls another run may have swept it.
        if mark is not None and partial.exists():
            return partial, mark
        if mark is not None:
            os.close(mark)


def _lock(folder: Path) -> int | None:
    """An exclusive lock on `folder`, held until closed; None where another process holds it or it is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def sweep(path: Path) -> None:
    """Remove what killed runs left beside `path`; put back a bundle that one of them had moved aside."""
    path = Path(os.path.realpath(path))
    aside = _aside(path)
    if aside.is_dir() and not path.exists():
        os.rename(aside, path)
    for left in path.parent.iterdir():
        if left.name.startswith(f".{path.name}.partial-"):
            mark = _lock(left)
            if mark is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(mark)


def _aside(path: Path) -> Path:
    return path.parent / f".{path.name}.partial-old"


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
        # No exchange on this system: the old folder steps aside first. After a kill between the two renames, the next
        # run puts it back.
        aside = _aside(path)
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


def program_json(
    target: str,
    signature: Signature,
    facts: dict[str, Any],
    preprocessing: dict[str, Any] | None = None,
    front: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """What a loader needs to know to run the saved program at its operating point. `preprocessing` is how uint8 pictures
    were made into its inputs: mean and std of 0..1 values (None: 0..255 as it is). `front`: other operating points, with
    what was measured at each."""
    return {
        "target": target,
        "signature": asdict(signature),
        "batch_is_dynamic": isinstance(signature.batch, str),
        "call_batch": None if signature.batch is None else facts["operating_point"]["batch"],
        "operating_point": facts["operating_point"],
        "settings": facts.get("settings", {}),
        "preprocessing": preprocessing,
        "front": list(front),
    }


def copy_model(path: Path, where: Path) -> None:
    """The ONNX file `path` as `where`, its external data beside it."""
    if path.with_name(path.name + ".data").exists():
        import onnx_ir as ir

        # The file names its data by the old name.
        ir.save(ir.load(str(path)), str(where), external_data=f"{where.name}.data")
    else:
        shutil.copy(path, where)


def copy_assets(assets: Sequence[Path], folder: Path) -> None:
    """Tokenizer and preprocessor files into the bundle's `tokenizer/`, where there are any."""
    if assets:
        (folder / "tokenizer").mkdir()
    for asset in assets:
        shutil.copy(asset, folder / "tokenizer" / asset.name)


def cache_folder(name: str) -> Path | None:
    """A folder of perwatt's in the user's cache folder; None where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "perwatt" / name
    except RuntimeError:
        return None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises InputError where it can't be written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise _cant_write(path, error) from None
