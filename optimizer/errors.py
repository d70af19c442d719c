"""Errors that a person can act on: what was wrong, where, and what to do.

Every error that perwatt raises on purpose derives from `PerwattError` and carries the exit code of the command line:
2 usage or input, 4 target not usable here, 5 internal. Exit code 1 is reserved for a failed gate, 3 for a budget that
was not met; neither is an error.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires


class PerwattError(Exception):
    """Base of all errors raised on purpose. `str(error)` is one line for a person; `fix` says what to do, if known."""

    exit_code = 5

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} — {self.fix}" if self.fix else self.message


class Stopped(KeyboardInterrupt):
    """Ctrl-C where something is left for who pressed it; the message says what."""


class InputError(PerwattError):
    """What the user gave can't be used: a file, a flag, a recipe, a data set. Exit code 2."""

    exit_code = 2


class UntrustedCodeError(InputError):
    """Loading the file would run code that it carries, and nobody said `--trust`. Exit code 2."""


class TargetError(PerwattError):
    """The target can't be used on this machine. Exit code 4."""

    exit_code = 4


class BackendError(PerwattError):
    """A backend failed on this model: refused it, crashed, hung or ran out of memory. Carries its last words."""


class PassError(PerwattError):
    """A pass could not do its work on this model; the pipeline rolls it back and goes on."""


def install_words(extra: str) -> str:
    """The command that gets what an extra of perwatt needs. The packages by name: perwatt itself may be on no index."""
    packages = sorted({shlex.quote(package) for package in _needed(extra)})
    return f"pip install {' '.join(packages)}" if packages else f"pip install 'perwatt[{extra}]'"


def _needed(extra: str) -> Iterator[str]:
    try:
        known = requires("perwatt") or []
    except PackageNotFoundError:
        return
    for requirement in known:
        package, _, condition = requirement.partition(";")
        if not re.search(rf"""extra\s*==\s*['"]{re.escape(extra)}['"]""", condition):
            continue
        own = re.match(r"perwatt\[(.+)\]", package.strip())
        if own is None:
            yield package.strip()
        for other in own[1].split(",") if own is not None else ():
            yield from _needed(other.strip())


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """A sentence that says `name` is unknown and lists the nearest known names (all of them where none is near)."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"unknown {what} {name!r}: did you mean {' or '.join(near)}?"
    return f"unknown {what} {name!r}: known are {', '.join(names)}"
