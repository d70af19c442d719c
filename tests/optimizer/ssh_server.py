"""A real SSH server for tests, as a process: `python ssh_server.py FOLDER`, settings as one JSON object on standard input.

It executes what it is asked for with the shell. Where the system allows it, it runs in a mount namespace of its own with
an empty folder for temporary files, so that commands can't see ours: another machine in all that matters here.
Prints {"port", "host_key", "isolated"} once it listens.
"""

import asyncio
import ctypes
import json
import os
import subprocess
import sys
from contextlib import suppress

import asyncssh

CLONE_NEWNS = 0x00020000


def leave_our_files(hidden: str) -> bool:
    """A mount namespace where `hidden` is empty; False where the system does not allow it."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNS) != 0:
        return False
    private = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True)
    empty = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", hidden], capture_output=True)
    return private.returncode == 0 and empty.returncode == 0


async def execute(process: asyncssh.SSHServerProcess, environment: dict[str, str]) -> None:
    """What sshd does with a command: pipes, the user's shell, the exit status; the end of the one is that of the other."""
    child = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", process.command or "true",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=environment["HOME"],
    )  # fmt: skip

    async def copy(source, sink, close) -> None:
        with suppress(OSError, asyncssh.Error):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        close()

    async def inwards() -> None:
        await copy(process.stdin, child.stdin, child.stdin.close)

    arriving = asyncio.create_task(inwards())
    outputs = [
        copy(child.stdout, process.stdout, lambda: None),
        copy(child.stderr, process.stderr, lambda: None),
    ]
    await asyncio.gather(*outputs)
    code = await child.wait()
    arriving.cancel()
    with suppress(OSError, asyncssh.Error):
        process.exit(code if code >= 0 else 128 - code)


async def main() -> None:
    told = json.loads(sys.stdin.readline())
    isolated = leave_our_files(told["hidden"])
    home = os.path.join(told["hidden"] if isolated else told["folder"], "home")
    os.makedirs(home, exist_ok=True)
    environment = {"HOME": home, "PATH": os.environ["PATH"], "USER": "somebody", **told["environment"]}
    if not isolated:
        environment["TMPDIR"] = told["folder"]
    key = asyncssh.generate_private_key("ssh-ed25519")
    server = await asyncssh.listen(
        "127.0.0.1", 0, server_host_keys=[key], encoding=None, line_editor=False,
        authorized_client_keys=asyncssh.import_authorized_keys(told["authorized_key"]),
        process_factory=lambda process: execute(process, environment),
    )  # fmt: skip
    facts = {
        "port": server.sockets[0].getsockname()[1],
        "host_key": key.export_public_key().decode().strip(),
        "isolated": isolated,
    }
    print(json.dumps(facts), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)


asyncio.run(main())
