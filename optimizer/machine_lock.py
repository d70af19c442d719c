"""Who has the machine: many may make something on it at once, one at a time measures, and nobody beside it.

    lock = MachineLock()
    with lock.shared():            # passes, learning
        with lock.alone():         # a race: waits until nobody else makes or measures anything

Two locked files in the temporary folder (`flock`), the same for all processes of the machine that use that folder. A process
that ends, however it does, lets go of both. Who wants the machine alone closes the turnstile behind itself while it waits, so
that others who only share it can't keep it waiting for ever. Within `shared`, `alone` gives up its share first and takes it
again afterwards: two that share and both want to be alone take turns.

Limits: it binds those who ask, and nobody else on the machine. One thread of a process uses a lock. A process that was stopped
and not ended keeps what it has. Network file systems may not lock.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TURNSTILE, MACHINE = "perwatt-turnstile.lock", "perwatt-machine.lock"


class MachineLock:
    """The machine as one process sees it."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: where the files are, the temporary folder where none is given. Raises OSError where they can't be opened."""
        self._folder = folder or Path(tempfile.gettempdir())
        self._turnstile, self._machine = (_opened(self._folder / name) for name in (TURNSTILE, MACHINE))
        self._sharing = self._alone = False

    def close(self) -> None:
        """Let go of the machine."""
        for file in (self._turnstile, self._machine):
            os.close(file)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """The machine together with others who share it. Raises OSError where the files can't be locked."""
        self._take(fcntl.LOCK_SH)
        self._sharing = True
        try:
            yield
        finally:
            self._sharing = self._alone = False
            self._give_back()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The machine without anybody else; nothing more to wait for where it is alone already."""
        already = self._alone
        self.take_alone()
        try:
            yield
        finally:
            if not already:
                self.end_alone()

    def take_alone(self) -> None:
        """Wait until nobody else has the machine. Ends with `end_alone`; once is enough for many."""
        if self._alone:
            return
        if self._sharing:
            # Two that wait for each other to give up a share would wait for ever.
            self._give_back()
        self._take(fcntl.LOCK_EX)
        self._alone = True

    def end_alone(self) -> None:
        """Others may have the machine, too; whoever shared it before does so again."""
        if not self._alone:
            return
        self._alone = False
        self._give_back()
        if self._sharing:
            self._take(fcntl.LOCK_SH)

    def _take(self, how: int) -> None:
        fcntl.flock(self._turnstile, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._machine, how)
        finally:
            fcntl.flock(self._turnstile, fcntl.LOCK_UN)

    def _give_back(self) -> None:
        fcntl.flock(self._machine, fcntl.LOCK_UN)


def _opened(path: Path) -> int:
    """A file to lock, for reading: in a folder that is everybody's it may be somebody else's."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        made = os.open(path, flags | os.O_CREAT, 0o644)
        # Somebody else's file by now, or ours, whatever may be read of new files otherwise.
        with suppress(PermissionError):
            os.fchmod(made, 0o644)
        return made
