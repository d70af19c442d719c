"""The line protocol of external meters, and the two ways in which lines come: from a command or from a socket.

One line a sample, a JSON object; docs/wall-meter.md describes it for those who write such a meter. A line that is not
understood is counted and passed over: one garbled line must not cost a measurement.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import socket
import subprocess
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, Protocol, get_args

import psutil

from perwatt.measurement import Boundary

LINE_BYTES = 65536

GRACE_S = 2.0
"""How long a command may take to end by itself when asked to."""


@dataclass(frozen=True)
class Header:
    """What a meter says of itself on its first line. `interval_s`: seconds between samples, None where it does not say."""

    meter: str | None = None
    interval_s: float | None = None
    boundary: Boundary = "wall"


@dataclass(frozen=True)
class Sample:
    """One line: watts, cumulative joules or both, at `time_s` on the meter's clock (None: it keeps none)."""

    time_s: float | None
    power_w: float | None
    energy_j: float | None


def parse_line(line: bytes) -> Header | Sample:
    """A line of the protocol. Raises ValueError with what is wrong with it."""
    try:
        plain = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(plain, dict):
        raise ValueError("not a JSON object")
    if "power_w" not in plain and "energy_j" not in plain:
        return _header(plain)
    sample = Sample(*(_number(plain, key) for key in ("time_s", "power_w", "energy_j")))
    if sample.power_w is None and sample.energy_j is None:
        raise ValueError("neither power_w nor energy_j")
    return sample


def _header(plain: dict[str, Any]) -> Header:
    if not {"meter", "interval_s", "boundary"} & plain.keys():
        raise ValueError("neither power_w nor energy_j")
    boundary = plain.get("boundary", "wall")
    if boundary not in get_args(Boundary):
        raise ValueError(f"boundary {boundary!r} is none of {', '.join(get_args(Boundary))}")
    interval_s = _number(plain, "interval_s")
    if interval_s is not None and interval_s <= 0:
        raise ValueError("interval_s is not positive")
    meter = plain.get("meter")
    return Header(str(meter) if meter is not None else None, interval_s, boundary)


def _number(plain: dict[str, Any], key: str) -> float | None:
    value = plain.get(key)
    if value is None:
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key} is no finite number")
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{key} is no finite number") from error


class Source(Protocol):
    """Where lines come from."""

    lines: IO[bytes]

    def last_words(self) -> str:
        """Why no more lines come."""

    def cpu_seconds(self) -> float:
        """CPU seconds that it has cost on this machine so far."""

    def close(self) -> None:
        """Let go of it; `lines` ends."""


class Command:
    """A command that writes lines to standard output, in a process group of its own that `close` ends.

    Raises OSError where it can't be started, ValueError where its quotes don't match."""

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout is not None and self._process.stderr is not None
        self.lines: IO[bytes] = self._process.stdout
        self._words: deque[str] = deque(maxlen=5)
        self._listener = threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
        self._listener.start()

    def last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        self._listener.join(GRACE_S)
        code = self._process.poll()
        ended = "closed its output" if code is None else f"ended with exit code {code}"
        said = " / ".join(word for word in self._words if word)
        return f"the meter's command {ended}" + (f", saying: {said}" if said else "")

    def cpu_seconds(self) -> float:
        total = 0.0
        with suppress(psutil.Error):
            parent = psutil.Process(self._process.pid)
            for process in (parent, *parent.children(recursive=True)):
                with suppress(psutil.Error):
                    # Short-lived children (an awk for every sample) show up in their parent's sum once they ended.
                    total += sum(process.cpu_times()[:4])
        return total

    def close(self) -> None:
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        # The leader may be gone while others of its group live on and hold the pipe open.
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._listener.join(GRACE_S)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _listen(self, errors: IO[bytes]) -> None:
        with errors:
            for line in errors:
                self._words.append(line.decode(errors="replace").strip())


class Socket:
    """A TCP socket that lines come from. Raises OSError where nobody answers, ValueError where the address is none."""

    def __init__(self, address: str, timeout_s: float) -> None:
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdigit():
            raise ValueError(f"{address!r} is not HOST:PORT")
        self._address = address
        self._socket = socket.create_connection((host.strip("[]"), int(port)), timeout_s)
        self._socket.settimeout(None)
        self.lines: IO[bytes] = self._socket.makefile("rb")

    def last_words(self) -> str:
        return f"the meter at {self._address} closed the connection"

    def cpu_seconds(self) -> float:
        return 0.0

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
