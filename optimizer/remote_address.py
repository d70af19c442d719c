"""`ssh://user@host:port?python=/path/to/python&folder=/scratch`: which machine, and the ssh command that gets there.

The user's own `~/.ssh/config`, agent and keys are used; `PERWATT_SSH` names another ssh command, with options where it
needs some (as GIT_SSH_COMMAND does). Nothing may ask a question: a password prompt would wait for ever.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from urllib.parse import parse_qsl

from perwatt.errors import InputError, TargetError, nearest

COMMAND_VARIABLE = "PERWATT_SSH"
CONNECT_S = 20
ALIVE_S, ALIVE_TIMES = 10, 3
"""A link that answers nothing for so many seconds, so many times, is dead."""
OPTIONS = {
    "BatchMode": "yes", "ConnectTimeout": str(CONNECT_S), "ServerAliveInterval": str(ALIVE_S),
    "ServerAliveCountMax": str(ALIVE_TIMES), "ClearAllForwardings": "yes", "ForwardAgent": "no", "ForwardX11": "no",
    "RequestTTY": "no", "RemoteCommand": "none", "LogLevel": "ERROR",
}  # fmt: skip
EXAMPLE = "for example ssh://me@board.local or ssh://me@board.local:2222?python=~/perwatt/bin/python"
SHAPE = re.compile(
    r"ssh://(?:(?P<user>[^@/?#:]+)@)?(?P<host>\[[\w:.%]+\]|[^@/?#:\[\]]+)(?::(?P<port>\d+))?/?(?:\?(?P<settings>[^#]*))?"
)


@dataclass(frozen=True)
class Address:
    """Another machine. `python` runs perwatt there; `folder` is where files are put, None for the machine's own choice."""

    host: str
    user: str | None = None
    port: int | None = None
    python: str = "python3"
    folder: str | None = None

    @property
    def words(self) -> str:
        """`user@host`, as a person writes it."""
        return f"{self.user}@{self.host}" if self.user else self.host

    def ssh(self) -> str:
        """How a person gets there from a shell."""
        return " ".join(["ssh", *(["-p", str(self.port)] if self.port else []), self.words])

    def command(self) -> list[str]:
        """What starts our end there, for `subprocess`. Raises InputError for a PERWATT_SSH that can't be read."""
        try:
            ssh = shlex.split(os.environ.get(COMMAND_VARIABLE, "").strip() or "ssh")
        except ValueError as error:
            raise InputError(f"{COMMAND_VARIABLE} can't be read as a command: {error}") from error
        options = [f"-o{name}={value}" for name, value in OPTIONS.items()]
        port = ["-p", str(self.port)] if self.port else []
        return [*ssh, *options, "-T", *port, "--", self.words, f"exec {quoted(self.python)} -P -m perwatt.remote_end"]


def parse(text: str) -> Address:
    """The machine that `text` names. Raises InputError where it is no such address."""
    found = SHAPE.fullmatch(text)
    if not found:
        raise InputError(f"{text!r} names no machine", fix=EXAMPLE)
    host, user = found["host"].strip("[]"), found["user"]
    if host.startswith("-") or (user or "").startswith("-") or re.search(r"\s", host + (user or "")):
        raise InputError(f"{text!r} names no machine", fix=EXAMPLE)
    # A plus sign is one: these are paths.
    settings = dict(parse_qsl((found["settings"] or "").replace("+", "%2B"), keep_blank_values=True))
    for name, value in settings.items():
        if name not in ("python", "folder"):
            raise InputError(f"{text!r}: {nearest(name, ['python', 'folder'], 'setting')}")
        if not value:
            raise InputError(f"{text!r}: {name} is empty", fix=EXAMPLE)
    port = int(found["port"]) if found["port"] else None
    return Address(host, user, port, settings.get("python", "python3"), settings.get("folder"))


def quoted(path: str) -> str:
    """A path for the shell there, which knows what `~/` is."""
    return "~/" + shlex.quote(path[2:]) if path.startswith("~/") and path != "~/" else shlex.quote(path)


def refusal(address: Address, code: int | None, words: str, version: str) -> TargetError:
    """Why our end did not start there, from ssh's exit code (None: it did not answer) and what was said last."""
    where, python = address.words, address.python
    by_hand = f"this must work without a question: {address.ssh()} true"
    if code is None:
        return TargetError(f"{where} did not answer in time{words}", fix=by_hand)
    if re.search(r"unknown option:? -P", words, re.IGNORECASE):
        fix = f"name a newer one: --on ssh://{where}?python=/path/to/python3.11"
        return TargetError(f"{python} on {where} is older than Python 3.11", fix=fix)
    if re.search(r"No module named '?perwatt", words):
        return TargetError(f"{python} on {where} has no perwatt {version}", fix=install(address, version))
    if code in (126, 127):
        fix = f"name it: --on ssh://{where}?python=/path/to/python"
        return TargetError(f"{python} can't be run on {where}{words}", fix=fix)
    if code != 255:
        return TargetError(f"perwatt does not start on {where}{words}", fix=install(address, version))
    if "host key" in words.lower():
        by_hand = f"connect once by hand, and look at its key: {address.ssh()}"
    elif "Permission denied" in words:
        by_hand = f"it must work without a password, by a key (ssh-copy-id {where}) or the agent (ssh-add)"
    return TargetError(f"ssh does not get to {where}{words}", fix=by_hand)


def install(address: Address, version: str) -> str:
    """What to run there."""
    python = address.python
    return f"run there: {python} -m pip install 'perwatt=={version}', or name the Python that has it with ?python="
