"""What the hardware rewards, measured once and kept: `python -m perwatt.bench.probe_hardware` in a process of its own.

The process prints one JSON object a line, {"progress"} while it works and {"result"} or {"error"} at the end: kernels may
crash, and threads that are bound to CPUs must not be the caller's. What it found is kept under the user's cache folder,
keyed by the machine's fingerprint and the version of what did the work, because another backend has other kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from perwatt.bench import fingerprint
from perwatt.errors import BackendError

FORMAT = 1
TIMEOUT_S = 300.0
KEYED_BY = ("openvino", "torch")


def run(progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure here and now in a process of its own, and keep the result; about 10 s. Raises BackendError where that
    process crashes, hangs, or has no backend to measure with."""
    command = [sys.executable, "-P", "-m", __name__]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        stop = threading.Timer(TIMEOUT_S, process.kill)
        stop.start()
        try:
            found = _heard(process, log, progress)
        finally:
            stop.cancel()
            process.kill()
            process.wait()
    write(found)
    return found


def _heard(process: subprocess.Popen[str], log: IO[str], progress: Callable[[str], None]) -> dict[str, Any]:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            said = json.loads(line)
            if "result" in said:
                result: dict[str, Any] = said["result"]
                return result
            if "error" in said:
                raise BackendError(said["error"])
            progress(said["progress"])
    code = process.wait()
    log.seek(0)
    words = log.read().strip().split("\n")[-1][:300]
    raise BackendError(f"the probe {_ended(code)}{': ' if words else ''}{words}")


def _ended(code: int) -> str:
    return f"ended with exit code {code}" if code >= 0 else f"was ended by signal {-code}"


def measure(progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """{"format", "date", "seconds", "fingerprint", "versions", "arithmetic", "channels", "channel_multiples", "gpu"}; a
    part that can't be measured here is None. Raises BackendError where OpenVINO, which does the work on CPUs, is
    missing or fails."""
    from perwatt.bench import probe_gpu, probe_shapes, probe_threads

    begun = time.monotonic()
    if "openvino" not in versions():
        raise BackendError("the probe multiplies with OpenVINO, which is not installed", fix="pip install openvino")
    arithmetic = probe_threads.measure(progress=progress)
    channels = probe_shapes.sweep(progress=progress)
    return {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "fingerprint": fingerprint.fingerprint(),
        "versions": versions(),
        "arithmetic": arithmetic,
        "channels": channels,
        "channel_multiples": probe_shapes.smallest(channels),
        "gpu": probe_gpu.measure(progress) if fingerprint.gpu_names() else None,
        "seconds": round(time.monotonic() - begun, 1),
    }


def versions() -> dict[str, str]:
    """Of the packages that do the work, those that are installed."""
    found = {}
    for name in KEYED_BY:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def path(facts: Mapping[str, Any] | None = None, environment: Mapping[str, str] = os.environ) -> Path:
    """Where the result for a machine (this one) and the versions here is kept. Raises RuntimeError without a home."""
    base = environment.get("XDG_CACHE_HOME", "")
    # A relative one is invalid, says the XDG specification.
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    key = {"machine": facts or fingerprint.fingerprint(), "versions": versions(), "format": FORMAT}
    return folder / "perwatt" / "probe" / f"{fingerprint.digest(key)}.json"


def write(found: Mapping[str, Any]) -> Path | None:
    """Keep a result whole or not at all; None where the folder can't be written to, which costs only the next probe."""
    try:
        where = path(found["fingerprint"])
        aside = where.with_name(f"{where.name}.{os.getpid()}")
        where.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(found, indent=1))
        aside.replace(where)
    except (OSError, RuntimeError):
        return None
    return where


def kept() -> dict[str, Any] | None:
    """What an earlier probe found on this machine with these versions; None where there is none that can be read."""
    try:
        found = json.loads(path().read_text())
    except (OSError, RuntimeError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def main() -> None:
    """Measure, and say so on standard output."""

    def say(message: dict[str, Any]) -> None:
        # A line at a time, whatever libraries may print between.
        os.write(answers, (json.dumps(message) + "\n").encode())

    answers = os.dup(1)
    os.dup2(2, 1)
    try:
        say({"result": measure(lambda text: say({"progress": text}))})
    except BackendError as error:
        say({"error": str(error)})


if __name__ == "__main__":
    main()
