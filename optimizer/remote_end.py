"""The other machine's end of a connection: `python -m perwatt.remote_end`, started by ssh.

It takes files in, starts one worker, hands questions on to it and files back, and ends it when the connection does: at
the end of standard input, and where the caller has not been heard of for two minutes (a link may die without a word).
It is a process of its own because a backend that computes lets no thread of its own process run.

All connections of one run share a scratch folder and hold a lock on it. The last one to go removes the folder; where it
was killed instead, the next run's first connection does.

It speaks the worker's protocol, one JSON object a line. It says who it is, is told {"name", "run", "folder",
"memory_limit_bytes"}, and answers three operations itself: `stage` (lay out trees of files, or say whose contents are
missing), `put` (take contents in, {"chunk"} lines after the question) and `fetch` (give a folder's files, {"chunk"} lines
before the answer).
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from perwatt.isolation import spawn
from perwatt.remote_files import READ_BYTES, files_below, inside, tree_digest

PREFIX = "perwatt-on-"
SILENCE_S = 120.0
"""A caller says something every ten seconds. One who suspends its process for longer than this loses its workers."""
WATCH_S = 5.0
UNLOCKED_S = 3600.0
"""A scratch folder without a lock file may be one that is just being made."""


class Scratch:
    """One run's folder on this machine: contents by digest, trees laid out from them, outputs."""

    def __init__(self, run: str, parent: Path) -> None:
        if not re.fullmatch(r"[0-9a-f]{8,64}", run):
            raise ValueError("a run is named by hexadecimal digits")
        sweep(parent)
        self.folder = parent / f"{PREFIX}{run}"
        self._lock = self._hold()
        for name in ("contents", "trees", "out", "tmp"):
            (self.folder / name).mkdir(mode=0o700, exist_ok=True)

    def stage(self, trees: list[list[list[Any]]]) -> dict[str, Any]:
        """{"missing": digests of contents that are not here, "folders": where the trees lie once nothing is missing}."""
        with self._alone():
            missing = sorted({entry[1] for tree in trees for entry in tree if not self._content(entry[1]).exists()})
            return {"missing": missing, "folders": [] if missing else [str(self._laid_out(tree)) for tree in trees]}

    def put(self, contents: list[list[Any]], chunks: Iterator[bytes]) -> dict[str, Any]:
        """Take in contents, [SHA-256, bytes] each, from `chunks` in their order. All chunks are taken even where one
        content can't be kept, so that the next line is a question again."""
        failed: OSError | None = None
        for digest, size in contents:
            try:
                self._take(digest, size, chunks)
            except OSError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return {}

    def outputs(self, folder: str) -> Path:
        """The folder of outputs that was named, which must be one of this run's."""
        path = Path(folder)
        if path.parent != self.folder / "out":
            raise ValueError(f"{folder} is no folder of outputs")
        return path

    def leave(self) -> None:
        """Let go of the folder; the last one removes it."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        shutil.rmtree(self.folder, ignore_errors=True)

    def _content(self, digest: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError("contents are named by their SHA-256")
        return self.folder / "contents" / digest

    def _take(self, digest: str, size: int, chunks: Iterator[bytes]) -> None:
        where, left, sha = self._content(digest), size, hashlib.sha256()
        handle, name = tempfile.mkstemp(dir=self.folder / "contents")
        try:
            with os.fdopen(handle, "wb") as file:
                while left > 0:
                    chunk = next(chunks)
                    left -= len(chunk)
                    sha.update(chunk)
                    file.write(chunk)
        except OSError:
            os.unlink(name)
            while left > 0:
                left -= len(next(chunks))
            raise
        if sha.hexdigest() != digest or left:
            os.unlink(name)
            raise OSError(f"a file did not arrive as it was sent ({digest[:12]})")
        # Others are copied from it: nothing that reads a model has to change it.
        os.chmod(name, 0o400)
        os.replace(name, where)

    def _laid_out(self, tree: list[list[Any]]) -> Path:
        """The folder of this tree. Contents are moved into the first tree that needs them, and copied for others: onnx
        takes weights in a file with several links for an attack."""
        where = self.folder / "trees" / tree_digest(tree)[:32]
        if where.exists():
            return where
        making = Path(tempfile.mkdtemp(dir=self.folder / "trees"))
        moved: dict[str, Path] = {}
        try:
            for relative, digest, _ in tree:
                path = making / inside(relative)
                path.parent.mkdir(parents=True, exist_ok=True)
                if digest in moved or self._content(digest).is_symlink():
                    shutil.copyfile(self._content(digest), path)
                else:
                    moved[digest] = path
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
        for digest, path in moved.items():
            os.rename(self._content(digest), path)
        making.rename(where)
        for digest, path in moved.items():
            self._content(digest).symlink_to(Path("..", "trees", where.name) / path.relative_to(making))
        return where

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other connection of this run lays out trees meanwhile."""
        lock = os.open(self.folder / "staging", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _hold(self) -> int:
        """The folder's lock, shared. Whoever removes the folder holds it alone, and takes the lock's file along."""
        while True:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            status = os.lstat(self.folder)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                raise OSError(f"{self.folder} is somebody else's")
            try:
                lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            except FileNotFoundError:
                continue
            fcntl.flock(lock, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(self.folder / "lock")):
                    return lock
            os.close(lock)


def sweep(parent: Path) -> None:
    """Remove the folders of runs that nobody holds any more."""
    for left in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if left.is_symlink() or left.stat().st_uid != os.geteuid():
                continue
            if not (left / "lock").exists():
                if time.time() - left.stat().st_mtime > UNLOCKED_S:
                    shutil.rmtree(left, ignore_errors=True)
                continue
            lock = os.open(left / "lock", os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


class End:
    """One connection with its worker."""

    def __init__(self, answers: int) -> None:
        self._answers = os.fdopen(os.dup(answers), "w")
        self._worker_answers = answers
        self._leaving = threading.Lock()
        self._speaking = threading.Lock()
        self._heard = time.monotonic()
        self._worker: subprocess.Popen[str] | None = None
        self._scratch: Scratch | None = None

    def serve(self) -> None:
        """Until standard input ends."""
        # Before anything of ours: what the shell's start-up files wrote may not have ended its line.
        self._answers.write("\n")
        self._say({"perwatt": version("perwatt")})
        threading.Thread(target=self._watch, daemon=True).start()
        lines = self._lines()
        try:
            self._begin(json.loads(next(lines)))
            for line in lines:
                self._take(line, lines)
        except StopIteration:
            # The connection ended in the middle of something.
            pass
        except Exception:
            traceback.print_exc()
        self.leave()
        # Another thread was faster, and ends this process.
        time.sleep(SILENCE_S)

    def leave(self, *_: Any) -> None:
        """End the worker and this process, and leave nothing behind."""
        if not self._leaving.acquire(blocking=False):
            return
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
        if self._scratch is not None:
            self._scratch.leave()
        os._exit(0)

    def _begin(self, told: dict[str, Any]) -> None:
        try:
            self._scratch = Scratch(told["run"], Path(told["folder"] or tempfile.gettempdir()).expanduser())
        except (OSError, ValueError) as error:
            self._say({"error": {"type": "InputError", "message": f"no scratch folder: {error}"}})
            self.leave()
            return
        # Standard output is the protocol's: what libraries print goes where ssh shows it, with the errors.
        self._worker = spawn(
            self._worker_answers, told["name"], told["memory_limit_bytes"],
            folder=self._scratch.folder / "tmp", stdin=subprocess.PIPE, stdout=2, stderr=2,
        )  # fmt: skip
        os.close(self._worker_answers)
        threading.Thread(target=self._await_worker, args=(self._worker,), daemon=True).start()
        self._say({"result": {"folder": str(self._scratch.folder)}})

    def _take(self, line: str, lines: Iterator[str]) -> None:
        assert self._scratch is not None and self._worker is not None and self._worker.stdin is not None
        question = json.loads(line)
        operation, parameters = question.get("operation"), question.get("parameters", {})
        if operation not in ("stage", "put", "fetch"):
            with suppress(OSError):
                self._worker.stdin.write(line)
                self._worker.stdin.flush()
            return
        try:
            if operation == "stage":
                found = self._scratch.stage(**parameters)
            elif operation == "put":
                chunks = (base64.b64decode(json.loads(chunk)["chunk"]) for chunk in lines)
                found = self._scratch.put(parameters["contents"], chunks)
            else:
                found = self._fetch(self._scratch.outputs(parameters["folder"]))
        except OSError as error:
            if error.errno is not None:
                error = OSError(error.errno, f"{error.strerror} ({self._scratch.folder.parent})")
            self._say({"error": {"type": "InputError", "message": f"files can't be brought there: {error}"}})
            return
        self._say({"result": found})

    def _fetch(self, folder: Path) -> dict[str, Any]:
        paths = files_below(folder)
        for path in paths:
            sha, name = hashlib.sha256(), path.relative_to(folder).as_posix()
            with path.open("rb") as file:
                while chunk := file.read(READ_BYTES):
                    sha.update(chunk)
                    self._say({"chunk": base64.b64encode(chunk).decode(), "file": name})
            self._say({"chunk": "", "file": name, "sha256": sha.hexdigest()})
        shutil.rmtree(folder, ignore_errors=True)
        return {"files": len(paths)}

    def _lines(self) -> Iterator[str]:
        with os.fdopen(os.dup(0)) as questions:
            for line in questions:
                self._heard = time.monotonic()
                if line != '{"beat": true}\n':
                    yield line

    def _say(self, answer: dict[str, Any]) -> None:
        try:
            with self._speaking:
                self._answers.write(json.dumps(answer) + "\n")
                self._answers.flush()
        except OSError:
            self.leave()

    def _await_worker(self, worker: subprocess.Popen[str]) -> None:
        code = worker.wait()
        if not self._leaving.locked():
            self._say({"ended": code})
        self.leave()

    def _watch(self) -> None:
        while time.monotonic() - self._heard < SILENCE_S:
            time.sleep(WATCH_S)
        sys.stderr.write(f"nothing was heard of the caller for {SILENCE_S:.0f} s\n")
        self.leave()


def main() -> None:
    """Serve one connection."""
    answers = os.dup(1)
    os.dup2(2, 1)
    end = End(answers)
    signal.signal(signal.SIGTERM, end.leave)
    signal.signal(signal.SIGHUP, end.leave)
    end.serve()


if __name__ == "__main__":
    main()
