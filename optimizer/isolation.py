"""The caller's end of a worker: start it, ask it, survive it.

A backend may crash, hang or eat all memory. It does so in `python -m perwatt.worker`, a subprocess that speaks one JSON
object a line and gets models and samples as paths; what happens there arrives here as an error with a name and the
backend's last words.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from perwatt import errors
from perwatt.errors import BackendError, PerwattError

DEFAULT_TIMEOUT_S = 1800.0
LAST_WORDS_BYTES = 2000
MEMORY_SHARE = 0.9
"""Of the machine's memory, what one worker may hold before it is ended instead of dragging the machine down."""


class Worker:
    """One worker process. Use it as a context manager; it starts with the first call."""

    def __init__(
        self, name: str, *, memory_limit_bytes: int | None = None, on_progress: Callable[[str], None] | None = None
    ) -> None:
        self.name = name
        self.memory_limit_bytes = memory_limit_bytes or int(
            MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        )
        self.on_progress = on_progress
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._log: Any = None
        self._turn = threading.Lock()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, operation: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, **parameters: Any) -> dict[str, Any]:
        """Ask for one operation and wait for its answer.

        One question at a time; another thread waits for its turn. Raises the error that the worker names, or
        BackendError where it crashed or did not answer in time."""
        with self._turn:
            return self._ask(operation, timeout_s, parameters)

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process now. It ends with the thread that starts it, so start it where the run itself lives."""
        self._started()

    def _ask(self, operation: str, timeout_s: float, parameters: dict[str, Any]) -> dict[str, Any]:
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"operation": operation, "parameters": parameters}) + "\n")
            process.stdin.flush()
        except (BrokenPipeError, OSError):
            raise self._died(operation) from None
        try:
            answer = self._answer(operation, timeout_s)
        except BaseException:
            # Whatever interrupts the wait, Ctrl-C too: an answer that is still to come must not serve another question.
            self.kill()
            raise
        if "error" in answer:
            raise _error_from(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def _answer(self, operation: str, timeout_s: float) -> dict[str, Any]:
        until = time.monotonic() + timeout_s
        while True:
            try:
                line = self._answers.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                words = self._last_words()
                raise BackendError(
                    f"{self.name}: {operation} did not end within {timeout_s:.0f} s and was stopped{words}"
                ) from None
            if line is None:
                raise self._died(operation)
            answer: dict[str, Any] = json.loads(line)
            if "progress" not in answer:
                return answer
            if self.on_progress:
                self.on_progress(answer["progress"])

    def close(self) -> None:
        """End the process. It holds nothing that isn't written, and runtimes take seconds to leave by themselves."""
        self.kill()

    def kill(self) -> None:
        """End the process now."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._close_log()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None:
            return self._process
        self._log = tempfile.TemporaryFile(mode="w+b")  # noqa: SIM115 (lives as long as the process)
        environment = {**os.environ, "PERWATT_WORKER": self.name, "PYTHONUNBUFFERED": "1"}
        environment["PERWATT_MEMORY_LIMIT"] = str(self.memory_limit_bytes)
        # Answers have a pipe of their own: what libraries print from their first import on goes to the log.
        reading, writing = os.pipe()
        try:
            # A session of its own: Ctrl-C reaches the compiler, which then ends its workers in order.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "perwatt.worker", str(os.getpid()), str(writing)],
                stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, pass_fds=(writing,), text=True,
                env=environment, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(reading)
            self._close_log()
            raise
        finally:
            os.close(writing)
        self._answers = queue.Queue()
        threading.Thread(target=_pump, args=(reading, self._answers), daemon=True).start()
        return self._process

    def _died(self, operation: str) -> BackendError:
        process = self._process
        if process is None:
            return BackendError(f"{self.name}: the worker was closed during {operation}")
        try:
            code = process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            # It closed its end and lives on.
            process.kill()
            code = process.wait()
        words = self._last_words()
        self._process = None
        self._close_log()
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        return BackendError(f"{self.name}: the worker {how} during {operation}{words}")

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - LAST_WORDS_BYTES))
        lines = [line.strip() for line in self._log.read().decode(errors="replace").split("\n") if line.strip()]
        return f": {lines[-1][:300]}" if lines else ""

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None


def _pump(reading: int, answers: queue.Queue[str | None]) -> None:
    with os.fdopen(reading) as stream:
        for line in stream:
            answers.put(line)
    answers.put(None)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _error_from(facts: dict[str, Any]) -> PerwattError:
    kind = getattr(errors, facts["type"], BackendError)
    known = isinstance(kind, type) and issubclass(kind, PerwattError)
    return (kind if known else BackendError)(facts["message"], fix=facts.get("fix"))


def workspace() -> tempfile.TemporaryDirectory[str]:
    """A scratch folder for artifacts and samples of one run; gone when closed. Those of killed runs are swept."""
    for left in Path(tempfile.gettempdir()).glob("perwatt-*"):
        owner = re.match(r"perwatt-(\d+)-", left.name)
        if owner and not Path(f"/proc/{owner[1]}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"perwatt-{os.getpid()}-", ignore_cleanup_errors=True)
