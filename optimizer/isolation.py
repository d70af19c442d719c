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
from typing import IO, Any

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
        self.memory_limit_bytes = memory_limit_bytes
        self.on_progress = on_progress
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._log: Any = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
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
            return self._ask(self._started(), operation, timeout_s, parameters)

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process now. It ends with the thread that starts it, so start it where the run itself lives."""
        self._started()

    def _ask(
        self, process: subprocess.Popen[str], operation: str, timeout_s: float, parameters: dict[str, Any]
    ) -> dict[str, Any]:
        try:
            self._send(process, json.dumps({"operation": operation, "parameters": parameters}))
        except OSError:
            raise self._died(operation) from None
        return self._result(operation, timeout_s)

    def _send(self, process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()

    def _result(self, operation: str, timeout_s: float) -> dict[str, Any]:
        try:
            answer = self._answer(operation, timeout_s)
        except BaseException:
            # Whatever interrupts the wait, Ctrl-C too: an answer that is still to come must not serve another question.
            self.kill()
            raise
        if "error" in answer:
            raise self._error(answer["error"])
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
                # For who looks again: there will be nothing more.
                self._answers.put(None)
                raise self._died(operation)
            answer: dict[str, Any] = json.loads(line)
            if "result" in answer or "error" in answer:
                return answer
            self._heed(operation, answer)

    def _heed(self, operation: str, message: dict[str, Any]) -> None:
        """What comes before the answer."""
        if self.on_progress and "progress" in message:
            self.on_progress(message["progress"])

    def _error(self, facts: dict[str, Any]) -> PerwattError:
        return _error_from(facts)

    def close(self) -> None:
        """End the process. It holds nothing that isn't written, and runtimes take seconds to leave by themselves."""
        self.kill()

    def kill(self) -> None:
        """End the process now."""
        # The run may end while another thread waits for an answer, which then ends the process as well.
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            self._close_log()
        self._sweep()

    def _sweep(self) -> None:
        """Away with the temporary files of a process that had no time to."""
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None:
            return self._process
        self._log = tempfile.TemporaryFile(mode="w+b")  # noqa: SIM115 (lives as long as the process)
        try:
            self._process, answers = self._launch()
        except BaseException:
            self._close_log()
            raise
        self._answers = queue.Queue()
        threading.Thread(target=_pump, args=(answers, self._answers), daemon=True).start()
        return self._process

    def _launch(self) -> tuple[subprocess.Popen[str], IO[str]]:
        """A new process, and where its answers come."""
        # Answers have a pipe of their own: what libraries print from their first import on goes to the log.
        self._sweep()
        prefix = f"perwatt-{os.getpid()}-worker-"
        self._temporary = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
        reading, writing = os.pipe()
        try:
            process = spawn(
                writing, self.name, self.memory_limit_bytes, folder=Path(self._temporary.name),
                stdin=subprocess.PIPE, stdout=self._log, stderr=self._log,
            )  # fmt: skip
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        return process, os.fdopen(reading)

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
        return BackendError(f"{self.name}: the worker {how_it_ended(code)} during {operation}{words}")

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


def spawn(
    answers: int, name: str, memory_limit_bytes: int | None = None, *, folder: Path | None = None, **streams: Any
) -> subprocess.Popen[str]:
    """Start `python -m perwatt.worker`, which answers on the file descriptor `answers` and ends with the thread that
    starts it. `folder`: for its temporary files; `streams`: stdin, stdout, stderr."""
    limit = memory_limit_bytes or int(MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    environment = {**os.environ, "PERWATT_WORKER": name, "PYTHONUNBUFFERED": "1", "PERWATT_MEMORY_LIMIT": str(limit)}
    # OpenMP threads that spin while they wait cost torch 7 to 20 times the CPU seconds on a busy machine; it reads this
    # when it is imported, so later is too late.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if folder is not None:
        environment["TMPDIR"] = str(folder)
    # A session of its own: Ctrl-C reaches the compiler, which then ends its workers in order.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "perwatt.worker", str(os.getpid()), str(answers)],
        pass_fds=(answers,), text=True, env=environment, start_new_session=True, **streams,
    )  # fmt: skip


def how_it_ended(code: int) -> str:
    """In words, from an exit code as `subprocess` gives it."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _pump(stream: IO[str], answers: queue.Queue[str | None]) -> None:
    with stream:
        for line in stream:
            answers.put(line)
    answers.put(None)


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
