"""Compiled models kept on disk, where compiling takes long enough to pay: GPU and NPU plugins, which build kernels.

On the CPU it does not pay. Read and compiled against imported, on two CPUs: ResNet-20 0.12 s against 0.03 s, MiniLM (90 MB
of weights) 0.37 s against 0.21 s, and each operating point would keep the weights on disk once more.

OpenVINO's own CACHE_DIR notices a blob of another version and one that is cut off, but not one whose weights changed: a
ResNet-20 with 200 damaged bytes was imported and answered NaN. So blobs carry a digest of their own here, and one that
does not match, or that the plugin refuses, is compiled anew. What was asked for is the key: the content of the model
file, the batch, the settings, OpenVINO's version, the device and its driver.

Blobs lie in `perwatt/openvino` in the user's cache folder (`XDG_CACHE_HOME`); together they take `LIMIT_BYTES` at most,
those not used for longest go first.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

PAYS = ("GPU", "NPU")
LIMIT_BYTES = 2 << 30
DIGEST_BYTES = 32


def default_folder() -> Path:
    """Where blobs are kept for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perwatt" / "openvino"


def compiled(
    core: Any, model: Any, source: Path, device: str, settings: dict[str, Any], folder: Path | None = None
) -> tuple[Any, bool]:
    """The model compiled for `device`, and whether it came from the cache. `model` was read from `source` and made
    static. Without `folder` only devices where it pays are cached. A cache that can't be used costs nothing but time."""
    if folder is None and device not in PAYS:
        return core.compile_model(model, device, settings), False
    blob = (folder or default_folder()) / f"{_key(core, model, source, device, settings)}.blob"
    found = _imported(core, blob, device, settings)
    if found is not None:
        return found, True
    made = core.compile_model(model, device, settings)
    _keep(made, blob)
    return made, False


def _key(core: Any, model: Any, source: Path, device: str, settings: dict[str, Any]) -> str:
    import openvino

    def told(name: str) -> str:
        try:
            return str(core.get_property(device, name))
        except RuntimeError:
            return ""

    asked = {
        "shapes": [str(port.get_partial_shape()) for port in model.inputs],
        "settings": {name: str(setting) for name, setting in settings.items()},
        "device": [device, told("FULL_DEVICE_NAME"), told("DEVICE_ARCHITECTURE"), told("GPU_DRIVER_VERSION")],
        "driver": told("NPU_DRIVER_VERSION"),
        "version": [openvino.__version__, sys.byteorder],
    }
    sha = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for path in (source, source.with_suffix(".bin"), source.with_name(source.name + ".data")):
        if path.exists():
            with path.open("rb") as stream:
                sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()


def _imported(core: Any, blob: Path, device: str, settings: dict[str, Any]) -> Any | None:
    """What the blob holds; None where there is none, or it is damaged, or the plugin does not take it."""
    try:
        content = blob.read_bytes()
        digest, rest = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(rest).digest() != digest:
            return None
        found = core.import_model(rest, device, settings)
        os.utime(blob)
    except (OSError, RuntimeError):
        return None
    return found


def _keep(made: Any, blob: Path) -> None:
    """Write the blob, whole or not at all, and make room. A full disk or a plugin that can't export is no error."""
    partial = None
    try:
        content = made.export_model().getvalue()
        if len(content) > LIMIT_BYTES:
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=blob.parent, suffix=".partial", delete=False) as file:
            partial = Path(file.name)
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(partial, blob)
        trim(blob.parent, LIMIT_BYTES)
    except (OSError, RuntimeError):
        if partial is not None:
            partial.unlink(missing_ok=True)


def trim(folder: Path, limit_bytes: int) -> None:
    """Remove what was not used for longest until the rest takes `limit_bytes` at most; leftovers of killed runs count."""
    files = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in files)
    for path in files:
        if total <= limit_bytes:
            return
        total -= path.stat().st_size
        path.unlink(missing_ok=True)
