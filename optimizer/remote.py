"""A worker on another machine: the same questions and answers, over ssh.

The process is ssh, one connection for each worker; `perwatt.remote_end` is at its other end. Files that a question names
are brought there before it, contents that are there already are not sent again, and what it writes comes back after it;
paths in answers are this machine's. `remote_files.CARRIED` says which parameters those are.

Every second that counts is counted beside the backend. What the link takes is in no figure, except a counter's window of
energy: see `place.RemoteMeter`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import queue
import secrets
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from perwatt.errors import BackendError, InputError, PerwattError, TargetError
from perwatt.isolation import DEFAULT_TIMEOUT_S, Worker, how_it_ended
from perwatt.remote_address import CONNECT_S, Address, install, refusal
from perwatt.remote_files import CARRIED, Forest, Tree, inside

BEAT_S = 10.0
START_S = 3.0 * CONNECT_S
CHUNK_BYTES = 1 << 18
STALL_S = 120.0
"""So long may a chunk take; a link slower than 2 kB/s is dead."""
LEAVE_S = 5.0
TOLD_ABOVE_BYTES = 8_000_000


class Connections:
    """What all workers of one run on one machine share."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.run = secrets.token_hex(8)
        self.forest = Forest()
        self.bringing = threading.Lock()
        """Two workers that need the same model must not both send it."""


class RemoteWorker(Worker):
    """One worker process on another machine. It starts with the first call, or with `start`, which then waits for the
    connection and raises TargetError where there is none."""

    def __init__(
        self,
        name: str,
        connections: Connections,
        *,
        memory_limit_bytes: int | None = None,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(
            f"{name} on {connections.address.words}", memory_limit_bytes=memory_limit_bytes, on_progress=on_progress
        )
        self.connections = connections
        self._writing = threading.Lock()
        self._over = threading.Event()
        self._folder = ""
        self._trees: dict[str, str] = {}
        self._local: dict[str, str] = {}
        self._download: _Download | None = None

    def call(self, operation: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, **parameters: Any) -> dict[str, Any]:
        """As a local worker's, with the files that the operation reads and writes."""
        carried = CARRIED.get(operation)
        if carried is None:
            raise PerwattError(f"{operation} is no operation for another machine: it stays on this one")
        with self._turn:
            process = self._started()
            sent = dict(parameters)
            named = [*carried.files, *carried.folders]
            trees = [self._tree(name in carried.files, Path(parameters[name])) for name in named]
            for name, folder in zip(named, self._brought(process, operation, trees), strict=True):
                path = Path(parameters[name])
                sent[name] = f"{folder}/{path.name}" if name in carried.files else folder
                self._local[folder] = str(path.parent if name in carried.files else path)
            outputs = {f"{self._folder}/out/{secrets.token_hex(8)}": parameters[name] for name in carried.outputs}
            sent.update(zip(carried.outputs, outputs, strict=True))
            self._local.update(outputs)
            answer = self._ask(process, operation, timeout_s, sent)
            for there, here in outputs.items():
                self._fetch(process, there, Path(here))
            translated: dict[str, Any] = _translated(answer, self._local)
            return translated

    def start(self) -> None:
        """Start the process now."""
        with self._turn:
            self._started()

    def kill(self) -> None:
        """End the process there and the connection; it is given a moment to leave nothing behind."""
        process = self._process
        if process is None:
            return
        self._over.set()
        if self._writing.acquire(timeout=1.0):
            try:
                with suppress(OSError):
                    assert process.stdin is not None
                    process.stdin.close()
            finally:
                self._writing.release()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=LEAVE_S)
        super().kill()

    # The connection ---------------------------------------------------------------------------------------------------

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None:
            return self._process
        process = super()._started()
        try:
            self._greet(process)
        except BaseException:
            self.kill()
            raise
        self._over = threading.Event()
        threading.Thread(target=self._beat, args=(process, self._over), daemon=True, name="perwatt-beat").start()
        return process

    def _launch(self) -> tuple[subprocess.Popen[str], IO[str]]:
        self._trees, self._local, self._download = {}, {}, None
        command = self.connections.address.command()
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, encoding="utf-8",
                errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise TargetError(f"{command[0]} can't be run: {error.strerror}", fix="install OpenSSH's client") from error
        assert process.stdout is not None
        return process, process.stdout

    def _greet(self, process: subprocess.Popen[str]) -> None:
        """Wait until our end says that it is there, and tell it what to do."""
        address, ours = self.connections.address, version("perwatt")
        theirs = self._greeting(process)
        if theirs != ours:
            raise TargetError(f"{address.words} has perwatt {theirs}, here is {ours}", fix=install(address, ours))
        limit = self.memory_limit_bytes
        told = {"name": self.name, "run": self.connections.run, "folder": address.folder, "memory_limit_bytes": limit}
        with suppress(OSError):
            self._send(process, json.dumps(told))
        self._folder = self._result("the start", START_S)["folder"]

    def _greeting(self, process: subprocess.Popen[str]) -> str:
        until = time.monotonic() + START_S
        address, ours = self.connections.address, version("perwatt")
        while True:
            try:
                line = self._answers.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise refusal(address, None, self._last_words(), ours) from None
            if line is None:
                raise refusal(address, process.wait(), self._last_words(), ours)
            # A shell's start-up files may say something first.
            if line.startswith('{"perwatt": '):
                found: str = json.loads(line)["perwatt"]
                return found

    def _send(self, process: subprocess.Popen[str], line: str) -> None:
        with self._writing:
            try:
                super()._send(process, line)
            except ValueError as error:
                # Closed by another thread.
                raise BrokenPipeError from error

    def _beat(self, process: subprocess.Popen[str], over: threading.Event) -> None:
        """Let the other end know that somebody is here."""
        while not over.wait(BEAT_S):
            try:
                self._send(process, '{"beat": true}')
            except OSError:
                return

    def _heed(self, operation: str, message: dict[str, Any]) -> None:
        if "ended" in message:
            self._ended(operation, message["ended"])
        if "chunk" in message and self._download is not None:
            self._download.take(message)
        super()._heed(operation, message)

    def _ended(self, operation: str, code: int) -> None:
        process = self._process
        if process is not None:
            # What it said last comes by another way than its answers: with the connection's end all is there.
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=LEAVE_S)
        words = self._last_words()
        raise BackendError(f"{self.name}: the worker {how_it_ended(code)} during {operation}{words}")

    def _died(self, operation: str) -> BackendError:
        if self._process is not None:
            # A worker that ended is told of in its last line, which may not have been read yet.
            with suppress(queue.Empty):
                while line := self._answers.get(timeout=LEAVE_S):
                    message = json.loads(line)
                    if "ended" in message:
                        try:
                            self._ended(operation, message["ended"])
                        except BackendError as error:
                            self.kill()
                            return error
        process, words = self._process, self._last_words()
        if process is None:
            return BackendError(f"{self.name}: the worker was closed during {operation}")
        self.kill()
        how = f" ({how_it_ended(process.returncode)})" if process.returncode not in (0, 255) else ""
        return BackendError(f"{self.name}: the connection was lost during {operation}{words or how}")

    def _error(self, facts: dict[str, Any]) -> PerwattError:
        error = super()._error({**facts, "message": _translated(facts["message"], self._local)})
        if isinstance(error, InputError | TargetError):
            # Somebody has to do something, and not on this machine.
            return type(error)(f"on {self.connections.address.words}: {error.message}", fix=error.fix)
        return error

    # Files ------------------------------------------------------------------------------------------------------------

    def _tree(self, is_file: bool, path: Path) -> Tree:
        forest = self.connections.forest
        return forest.of_file(path) if is_file else forest.of_folder(path)

    def _brought(self, process: subprocess.Popen[str], operation: str, trees: list[Tree]) -> list[str]:
        """The folders there that hold these trees."""
        if any(tree.digest() not in self._trees for tree in trees):
            question = [[list(entry) for entry in tree.entries] for tree in trees]
            with self.connections.bringing:
                staged = self._ask(process, "stage", DEFAULT_TIMEOUT_S, {"trees": question})
                if staged["missing"]:
                    self._put(process, operation, trees, staged["missing"])
                    staged = self._ask(process, "stage", DEFAULT_TIMEOUT_S, {"trees": question})
            self._trees.update({tree.digest(): f for tree, f in zip(trees, staged["folders"], strict=True)})
        return [self._trees[tree.digest()] for tree in trees]

    def _put(self, process: subprocess.Popen[str], operation: str, trees: list[Tree], missing: list[str]) -> None:
        found = {
            entry[1]: (source, entry[2])
            for tree in trees
            for entry, source in zip(tree.entries, tree.sources, strict=True)
            if entry[1] in missing
        }
        total = sum(size for _, size in found.values())
        if total > TOLD_ABOVE_BYTES and self.on_progress:
            self.on_progress(f"sending {total / 1e6:.0f} MB to {self.connections.address.words}")
        contents = [[digest, size] for digest, (_, size) in found.items()]
        try:
            self._send(process, json.dumps({"operation": "put", "parameters": {"contents": contents}}))
            for source, size in found.values():
                self._send_file(process, source, size)
        except BrokenPipeError:
            raise self._died(operation) from None
        except BaseException:
            self.kill()
            raise
        self._result(operation, DEFAULT_TIMEOUT_S)

    def _send_file(self, process: subprocess.Popen[str], source: Path, size: int) -> None:
        left = size
        with source.open("rb") as file:
            while left > 0:
                chunk = file.read(min(CHUNK_BYTES, left))
                if not chunk:
                    raise InputError(f"{source} changed while it was sent")
                left -= len(chunk)
                # Writing waits for as long as the pipe is full: no timeout of ours ends that.
                patience = threading.Timer(STALL_S, process.kill)
                patience.start()
                try:
                    self._send(process, json.dumps({"chunk": base64.b64encode(chunk).decode()}))
                finally:
                    patience.cancel()

    def _fetch(self, process: subprocess.Popen[str], there: str, here: Path) -> None:
        """Bring a folder that was written there to this machine."""
        self._download = _Download(here)
        try:
            count = self._ask(process, "fetch", DEFAULT_TIMEOUT_S, {"folder": there})["files"]
            if count != self._download.whole:
                raise BackendError(f"{self.name}: {self._download.whole} of {count} files came back")
        finally:
            self._download.close()
            self._download = None


class _Download:
    """Files that come in chunks, written below `folder`; each is there under its name only when it is whole."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.whole = 0
        self._file: Any = None
        self._sha = hashlib.sha256()

    def take(self, message: dict[str, Any]) -> None:
        """One chunk; the last one of a file has its digest. Raises BackendError for a file that is not as it was sent."""
        try:
            path = self.folder / inside(message["file"])
        except ValueError as error:
            raise BackendError(f"a file came back under a name that is none: {error}") from error
        part = path.with_name(path.name + ".part")
        if self._file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._sha = part.open("wb"), hashlib.sha256()
        chunk = base64.b64decode(message["chunk"])
        self._sha.update(chunk)
        self._file.write(chunk)
        if "sha256" not in message:
            return
        self.close()
        if self._sha.hexdigest() != message["sha256"]:
            raise BackendError(f"{message['file']} did not come back as it was sent")
        part.replace(path)
        self.whole += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _translated(value: Any, local: dict[str, str]) -> Any:
    """`value` with paths of the other machine replaced by those of this one that they stand for."""
    if isinstance(value, str):
        for there, here in local.items():
            value = value.replace(there, here)
        return value
    if isinstance(value, list):
        return [_translated(item, local) for item in value]
    if isinstance(value, dict):
        return {key: _translated(item, local) for key, item in value.items()}
    return value
