"""The guard of a GPU's power limit and clocks: it puts them back when the process that changed them is gone.

`PowerGuard` starts it and talks to it; `python -m perwatt.bench.power_guard` is the process itself. It is a session of its
own, so neither Ctrl-C nor a kill of the parent's process group reaches it, and it ignores every signal it can: it ends by
itself. It reads from a pipe whose other end only the parent holds. Each line says what has to be put back from now on, and
is answered by `ready` before anything is changed. The pipe's end, or the parent's (a fork of it may still hold the pipe),
means: put everything back and exit.

What was found also lies on disk, one `Record` a GPU, until it is put back: for a guard that was killed too. Limits and
locked clocks are gone after a reboot, so a record of an earlier boot is only forgotten.

Where everything is killed at once (a container that ends with its first process, a batch system's control group) there is
nobody left to put anything back: the next run that uses the same cache folder does it. Linux only.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perwatt.errors import InputError, TargetError

PATIENCE_S = 60.0
"""How long the guard may take to answer, at most: NVML takes seconds to start on a machine with many GPUs."""

READY = "ready"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Record:
    """What one GPU was found at, and what was changed of it; `applied_mw` are the limits that were set since.
    `power_limit_mw` is None where the limit was not touched. NVML can't read locked clocks: put back are the driver's."""

    uuid: str
    label: str
    path: str
    power_limit_mw: int | None = None
    applied_mw: tuple[int, ...] = ()
    clocks_locked: bool = False
    boot_id: str = ""

    def write(self) -> None:
        """Write it whole or not at all. Raises OSError. No fsync: what takes the page cache takes the limits too."""
        path = Path(self.path)
        aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            aside.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
            aside.replace(path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise

    def by_hand(self) -> str:
        """The commands that put it back."""
        limit = (
            [] if self.power_limit_mw is None else [f"`nvidia-smi -i {self.uuid} -pl {self.power_limit_mw / 1e3:g}`"]
        )
        return " and ".join(limit + ([f"`nvidia-smi -i {self.uuid} -rgc`"] if self.clocks_locked else []))


def record_folder() -> Path:
    """Where records and locks lie: `perwatt/power` in the user's cache folder. Raises InputError where there is none."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # A relative one is invalid, says the XDG specification.
        folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "perwatt" / "power"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"there is no folder to note in what a GPU's power limit was: {error}",
            fix="set XDG_CACHE_HOME to a folder that can be written",
        ) from None
    return folder


def read_record(path: Path) -> Record | None:
    """The record that a run left; None where there is none. Raises InputError for one that is damaged."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return _record(fields | {"path": str(path)})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} says what a GPU was set to before a run that was cut off, and can't be read: {error}",
            fix="look at `nvidia-smi -q -d POWER`, set what is wrong there, then remove the file",
        ) from None


def boot_id() -> str:
    """Which start of the machine this is; empty where the kernel does not say."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def put_back(nvml: Any, record: Record) -> list[str]:
    """Put one GPU back and forget its record. Gives reasons for what could not be put back; the record stays then."""
    failures = []
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(record.uuid)
    except nvml.NVMLError as error:
        return [f"{record.label} is not found any more ({error})"]
    if record.power_limit_mw is not None:
        try:
            nvml.nvmlDeviceSetPowerManagementLimit(handle, record.power_limit_mw)
        except nvml.NVMLError as error:
            failures.append(
                f"the power limit of {record.label} is not back at {record.power_limit_mw / 1e3:g} W ({error})"
            )
    if record.clocks_locked:
        try:
            nvml.nvmlDeviceResetGpuLockedClocks(handle)
        except nvml.NVMLError as error:
            failures.append(f"the clocks of {record.label} are still locked ({error})")
    if not failures:
        try:
            Path(record.path).unlink(missing_ok=True)
        except OSError as error:
            failures.append(f"{record.label} is put back, but {record.path} can't be removed: {error.strerror}")
    return failures


class PowerGuard:
    """The guard, seen by the process that it watches. The locks on the GPUs are handed on to it: they hold until it has
    put everything back, so that nobody takes a limit that is about to go for the original one."""

    def __init__(self, locks: Sequence[int]) -> None:
        """Starts it; `tell` says whether it runs. Raises TargetError where it can't be started."""
        command = [sys.executable, "-P", "-m", "perwatt.bench.power_guard", str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
                pass_fds=tuple(locks), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise _not_guarded(f"it does not start: {error}") from None

    def tell(self, records: Sequence[Record]) -> None:
        """From now on these are what it puts back. Raises TargetError where it does not confirm that."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # If it is gone, its last words say why.
            self._process.stdin.write(json.dumps([asdict(record) for record in records]).encode() + b"\n")
        answer = self._answer()
        if answer != READY:
            raise _not_guarded(answer or "it is gone")

    def dismiss(self) -> None:
        """Nothing is left to put back: let it go."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # It may have gone before.
            self._process.stdin.write(b"[]\n")
        self.finish()

    def finish(self) -> list[str]:
        """Leave it to the guard: it puts back what it was told and exits. Gives reasons for what it could not put back."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            return [f"the guard (process {self._process.pid}) is still at it after {PATIENCE_S:g} s"]
        lines = self._process.stdout.read().decode().splitlines()
        self._process.stdout.close()
        said = [line for line in lines if line != READY]
        return said or ([f"the guard ended with exit status {code}"] if code else [])

    def _answer(self) -> str:
        """Its next line; empty where it has ended."""
        assert self._process.stdout is not None
        line, end = b"", time.monotonic() + PATIENCE_S
        while not line.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                return f"it does not answer within {PATIENCE_S:g} s"
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                break
            line += piece
        return line.decode().strip()


def _not_guarded(why: str) -> TargetError:
    return TargetError(
        f"the process that would put the GPU's power limit and clocks back can't be relied on ({why})",
        fix="leave --allow-power-control out, or try it by hand: `python -m perwatt.bench.power_guard` says what is wrong",
    )


def _record(fields: dict[str, Any]) -> Record:
    return Record(**{**fields, "applied_mw": tuple(fields["applied_mw"])})


def _statements(parent: int) -> Iterator[list[Record]]:
    """What the parent says, until it is gone."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    with contextlib.suppress(OSError):  # Where the kernel is old, or the parent gone already, the pipe alone has to do.
        poll.register(os.pidfd_open(parent), select.POLLIN)
    rest = b""
    # A process that took over its number is not the parent.
    while os.getppid() == parent:
        ready = [number for number, _ in poll.poll()]
        piece = os.read(0, 1 << 16) if 0 in ready else b""
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield [_record(fields) for fields in json.loads(line)]


def _say(words: str) -> None:
    with contextlib.suppress(OSError):  # Perhaps nobody is left who reads it.
        os.write(1, words.encode() + b"\n")


def main() -> int:
    """The guard's life. Exit code 1: something could not be put back, and the record of it stays on disk."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception as error:
        _say(f"NVML does not start: {error}")
        return 1
    records: list[Record] = []
    for records in _statements(int(sys.argv[1]) if len(sys.argv) > 1 else os.getppid()):
        _say(READY)
        if not records:
            return 0
    failures = [failure for record in records for failure in put_back(nvml, record)]
    for failure in failures:
        _say(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
