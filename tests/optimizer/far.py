"""Another machine for tests: a real SSH server of its own, spoken to by the real ssh client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import until

from perwatt.isolation import Worker
from perwatt.place import open_place

SERVER = Path(__file__).parent / "ssh_server.py"


@dataclass
class Far:
    """`address` is what `--on` takes; `isolated`: commands there see nothing of our temporary files."""

    port: int
    isolated: bool
    process: subprocess.Popen[str]
    folder: Path
    host_key: str

    @property
    def address(self) -> str:
        """With the Python of these tests."""
        return self.with_python(sys.executable)

    def with_python(self, python: str) -> str:
        return f"ssh://somebody@127.0.0.1:{self.port}?python={python}"

    @property
    def temporary(self) -> Path:
        """Its folder for temporary files, as seen from here."""
        if self.isolated:
            return Path(f"/proc/{self.process.pid}/root{tempfile.gettempdir()}")
        return self.folder

    def scratch(self) -> list[Path]:
        """Folders of runs that lie there now."""
        return sorted(self.temporary.glob("perwatt-on-*"))

    def processes(self, module: str = "perwatt.remote_end") -> list[psutil.Process]:
        """Processes of ours that run there."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if module in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def at_rest(self) -> None:
        """Wait until nothing of ours runs or lies there."""
        until(lambda: not self.processes() and not self.processes("perwatt.worker"), 30)
        until(lambda: not self.scratch(), 30)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory):
    """One server for all tests of a file."""
    asyncssh = pytest.importorskip("asyncssh")
    if shutil.which("ssh") is None:
        pytest.skip("there is no ssh client")
    folder = tmp_path_factory.mktemp("far")
    key = asyncssh.generate_private_key("ssh-ed25519")
    (folder / "key").write_bytes(key.export_private_key("openssh"))
    (folder / "key").chmod(0o600)
    told = {
        "authorized_key": key.export_public_key().decode(), "hidden": tempfile.gettempdir(), "folder": str(folder / "there"),
        "environment": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    }  # fmt: skip
    (folder / "there").mkdir()
    process = subprocess.Popen([sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(told) + "\n")
    process.stdin.flush()
    facts = json.loads(process.stdout.readline())
    (folder / "known").write_text(f"[127.0.0.1]:{facts['port']} {facts['host_key']}\n")
    (folder / "unknown").write_text("")
    for name in ("known", "unknown"):
        (folder / f"{name}.config").write_text(
            f"Host *\n IdentityFile {folder}/key\n IdentitiesOnly yes\n UserKnownHostsFile {folder}/{name}\n"
            " GlobalKnownHostsFile /dev/null\n"
        )
    yield Far(facts["port"], facts["isolated"], process, folder / "there", facts["host_key"])
    process.stdin.close()
    process.wait(timeout=30)


@pytest.fixture
def place(far: Far):
    """The other machine as a place, left clean: workers are closed even where a test fails."""
    made: list[Worker] = []
    with open_place(far.address) as opened:
        real = opened.worker

        def worker(name: str, **options: Any) -> Worker:
            made.append(real(name, **options))
            return made[-1]

        opened.worker = worker  # type: ignore[method-assign]
        yield opened
        for one in made:
            one.close()
    far.at_rest()


@pytest.fixture
def far(server: Far, monkeypatch: pytest.MonkeyPatch) -> Far:
    """The other machine; nothing of an earlier test runs there."""
    monkeypatch.setenv("PERWATT_SSH", f"ssh -F {server.folder.parent}/known.config")
    server.at_rest()
    return server
