"""Reading: a trained model, in whatever file it came, as an `Artifact`.

What a file is, is found by looking at its bytes and never by its ending. Nothing that could run code is loaded unless
trusted (see `reading_safety` and `reading_program`). An `.onnx` file is read without importing torch.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perwatt.artifact import Artifact, Step, freeze
from perwatt.errors import InputError, UntrustedCodeError, install_words
from perwatt.reading_onnx import KNOWN, Convert, read_onnx
from perwatt.reading_preprocess import add_preprocessing
from perwatt.reading_safety import PLAIN_WAYS, Archive, first_pickled_number, pickled_globals
from perwatt.reading_shapes import parse_input
from perwatt.recipe import RawInput
from perwatt.signature import TensorSpec

if TYPE_CHECKING:
    from perwatt.reading_torch import Wishes

_LEGACY_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_LARGEST_PICKLE_LOOKED_AT = 64_000_000


@dataclass(frozen=True)
class Reading:
    """A model as it was read.

    `format`: torchscript, torch-export, pickled-module, checkpoint, safetensors, huggingface, sentence-transformers or
    onnx. `assets` are files that travel into the bundle, `tokenizer` the folder to load one from. `exported` is the
    `torch.export.ExportedProgram` where torch was in play. `notes` are sentences for the report."""

    artifact: Artifact
    format: str
    assets: tuple[Path, ...] = ()
    tokenizer: Path | None = None
    label2id: dict[str, int] | None = None
    exported: Any | None = None
    notes: tuple[str, ...] = ()


def read(
    path: str | Path,
    *,
    arch: str | None = None,
    arch_args: dict[str, Any] | None = None,
    inputs: Sequence[str] = (),
    example: Sequence[TensorSpec] | None = None,
    trust: bool = False,
    raw_inputs: Mapping[str, RawInput] | None = None,
    convert: Convert | None = None,
) -> Reading:
    """Read the model at `path`.

    `arch` and `arch_args` build the network that weights alone belong to. `inputs` are types as
    "x:float32[batch,3,32,32]"; `example` what the user's data looks like, used where the file and `inputs` say nothing.
    `raw_inputs` names inputs that take raw data. `convert(source, opset, result)` runs onnx's version converter where
    a crash does no harm. Raises InputError (UntrustedCodeError where loading would run code) in one line."""
    path = Path(path)
    raw_inputs = dict(raw_inputs or {})
    specs = [parse_input(text) for text in inputs]
    kind = detect(path)
    if kind == "onnx":
        if arch is not None:
            raise InputError(f"{path} is an ONNX model or nothing known; --arch is for weights alone", fix=KNOWN)
        model, changes = read_onnx(path, convert)
        found: dict[str, Any] = {"notes": tuple(changes)}
    else:
        _need_torch(path, kind)
        from perwatt.reading_torch import Wishes

        wishes = Wishes(arch, arch_args or {}, specs, list(example or ()), trust, raw_inputs)
        kind, model, found = _read_torch(path, kind, wishes)
        changes = list(found["notes"])
    changes += add_preprocessing(model, raw_inputs)
    freeze(model)
    settings: dict[str, Any] = {"path": path.name, "format": kind, "arch": arch, "inputs": list(inputs)}
    settings = {key: value for key, value in settings.items() if value}
    artifact = Artifact(model=model, steps=(Step("read", settings, tuple(changes)),))
    return Reading(artifact, kind, **found)


def _read_torch(path: Path, kind: str, wishes: Wishes) -> tuple[str, Any, dict[str, Any]]:
    from perwatt import reading_torch

    if kind in ("huggingface", "sentence-transformers") and wishes.arch is None:
        from perwatt.reading_huggingface import read_huggingface

        return read_huggingface(path, kind, wishes)
    if path.is_dir():
        kind, exported = "safetensors", reading_torch.read_folder_with_arch(path, wishes)
    elif kind == "torchscript":
        exported = reading_torch.read_torchscript(path, wishes)
    elif kind == "torch-export":
        exported = reading_torch.read_program(path, wishes)
    elif kind == "safetensors":
        exported = reading_torch.read_safetensors([path], wishes)
    else:
        kind, exported = reading_torch.read_saved(path, _pickle_in(path), wishes)
    return kind, exported.model, {"exported": exported.program, "notes": tuple(exported.notes)}


def detect(path: Path) -> str:
    """The format of what lies at `path`, found by looking. Raises InputError for what is nothing of the kind.

    `saved` stands for a file of `torch.save`, which is a checkpoint or a pickled module."""
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, near, n=1)
        fix = f"did you mean {path.parent / close[0]}?" if close else None
        raise InputError(f"there is no file or folder {path}", fix=fix)
    if path.is_dir():
        return _detect_folder(path)
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            size = file.seek(0, 2)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from None
    if not head:
        raise InputError(f"{path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer and not the file itself", fix="fetch it with git lfs pull")
    if head.startswith(b"PK\x03\x04"):
        return _detect_archive(path)
    if head[:1] == b"\x80" and head[1] in range(1, 6):
        return _detect_pickle(path, head)
    if _is_safetensors(head, size):
        return "safetensors"
    if head.startswith(b"\x89HDF"):
        raise InputError(f"{path} is an HDF5 file (Keras)", fix="export it to ONNX, with tf2onnx")
    if _is_text(head):
        raise InputError(f"{path} is a text file, no model", fix=KNOWN)
    return "onnx"


def _detect_folder(path: Path) -> str:
    if (path / "modules.json").is_file():
        return "sentence-transformers"
    if (path / "config.json").is_file():
        return "huggingface"
    if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return "folder"
    inside = sorted(path.glob("*.onnx"))
    fix = f"give the file itself: {inside[0]}" if inside else "a Hugging Face folder has a config.json and weights"
    raise InputError(f"{path} is a folder without config.json", fix=fix)


def _detect_archive(path: Path) -> str:
    archive = Archive(path)
    names = archive.names
    if "constants.pkl" in archive and any(n.startswith("code/") for n in names):
        return "torchscript"
    if any(n == "serialized_exported_program.json" or (n.startswith("models/") and n.endswith(".json")) for n in names):
        return "torch-export"
    if "data.pkl" in archive:
        return "saved"
    if any(n.startswith("data/aotinductor/") for n in names):
        fix = "save the program itself with torch.export.save"
        raise UntrustedCodeError(f"{path} is a compiled AOTInductor package, which is native code", fix=fix)
    if any(n.endswith(".npy") for n in names):
        raise InputError(f"{path} is an .npz archive of arrays, no model", fix="give it with --data")
    shown = ", ".join(names[:3]) or "nothing"
    raise InputError(f"{path} is a zip archive that holds no model (it holds {shown})", fix=KNOWN)


def _detect_pickle(path: Path, head: bytes) -> str:
    if first_pickled_number(head) == _LEGACY_TORCH_MAGIC:
        return "saved"
    try:
        names = sorted(pickled_globals(_pickle_in(path)))
    except ValueError:
        return "onnx"
    what = f" that imports {', '.join(names[:3])}" if names else ""
    raise UntrustedCodeError(
        f"{path} is a Python pickle{what}, no file of torch.save, and never loaded", fix=PLAIN_WAYS
    )


def _pickle_in(path: Path) -> bytes:
    """The pickle of a file of `torch.save` (old files begin with it), for looking at."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            return file.read(_LARGEST_PICKLE_LOOKED_AT)
    return Archive(path).read("data.pkl")


def _is_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:9] != b"{" or length < 2:
        return False
    if length <= len(head) - 8:
        try:
            json.loads(head[8 : 8 + length])
        except ValueError:
            return False
    return length < 100_000_000


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return False
        text = head[: error.start].decode("utf-8")
    return all(c.isprintable() or c in "\r\n\t\f" for c in text)


def _need_torch(path: Path, kind: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            f"{path} ({kind}) needs PyTorch to be read", fix=f"{install_words('torch')}, or give an ONNX file"
        )
