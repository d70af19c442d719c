"""What may go wrong between two machines: real refusals of a real server, real processes that are killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from models import conv_net, feed

from perwatt.contract import OperatingPoint
from perwatt.data import Samples
from perwatt.errors import BackendError, InputError, TargetError
from perwatt.place import open_place

sys.path.insert(0, str(Path(__file__).parent))
from far import Far
from runs import environment, gone, until

POINT = asdict(OperatingPoint(floating_precision="f32", threads=1, streams=1))


def python_there(far: Far, name: str, script: str) -> str:
    """The address with a Python that is this script."""
    path = far.temporary / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return far.with_python(f"{tempfile.gettempdir()}/{name}" if far.isolated else str(path))


def refused(address: str) -> TargetError:
    with pytest.raises(TargetError) as caught:
        open_place(address)
    assert "\n" not in str(caught.value)
    return caught.value


# The way there ----------------------------------------------------------------------------------------------------------


def test_a_port_where_nobody_listens(far: Far) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    error = refused(f"ssh://somebody@127.0.0.1:{port}")
    assert "ssh does not get to somebody@127.0.0.1: " in error.message and "Connection refused" in error.message
    assert error.fix == f"this must work without a question: ssh -p {port} somebody@127.0.0.1 true"


def test_a_host_key_that_nobody_has_looked_at(far: Far, monkeypatch) -> None:
    monkeypatch.setenv("PERWATT_SSH", f"ssh -F {far.folder.parent}/unknown.config")
    error = refused(far.address)
    assert "Host key verification failed" in error.message
    assert error.fix == f"connect once by hand, and look at its key: ssh -p {far.port} somebody@127.0.0.1"


def test_a_key_that_is_not_let_in(far: Far, tmp_path, monkeypatch) -> None:
    import asyncssh

    other = tmp_path / "other"
    other.write_bytes(asyncssh.generate_private_key("ssh-ed25519").export_private_key("openssh"))
    other.chmod(0o600)
    settings = (far.folder.parent / "known.config").read_text()
    (tmp_path / "config").write_text(settings.replace(f"{far.folder.parent}/key", str(other)))
    monkeypatch.setenv("PERWATT_SSH", f"ssh -F {tmp_path}/config")
    error = refused(far.address)
    assert "Permission denied" in error.message
    assert error.fix is not None and "without a password" in error.fix


def test_no_ssh_here(far: Far, monkeypatch) -> None:
    monkeypatch.setenv("PERWATT_SSH", "/not/there/ssh")
    assert "/not/there/ssh can't be run: No such file" in refused(far.address).message


def test_a_python_without_perwatt(far: Far) -> None:
    address = python_there(far, "bare", f'exec {sys.executable} -I -S "$@"')
    error = refused(address)
    assert "bare on somebody@127.0.0.1 has no perwatt" in error.message
    assert error.fix is not None and "-m pip install 'perwatt==" in error.fix


def test_another_version_of_perwatt(far: Far) -> None:
    facts = far.temporary / "newer" / "perwatt-99.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: perwatt\nVersion: 99.0\n")
    folder = f"{tempfile.gettempdir()}/newer" if far.isolated else str(far.temporary / "newer")
    address = python_there(far, "other", f'PYTHONPATH={folder} exec {sys.executable} "$@"')
    error = refused(address)
    assert "somebody@127.0.0.1 has perwatt 99.0, here is " in error.message
    far.at_rest()


def test_no_python_by_that_name(far: Far) -> None:
    error = refused(far.with_python("~/nowhere/python"))
    assert "~/nowhere/python can't be run on somebody@127.0.0.1: " in error.message
    assert error.fix is not None and "?python=/path/to/python" in error.fix


def test_a_stand_in_for_a_python_that_is_too_old(far: Far) -> None:
    address = python_there(far, "old", "echo 'Unknown option: -P' >&2; exit 2")
    assert "old on somebody@127.0.0.1 is older than Python 3.11" in refused(address).message


def test_a_perwatt_that_breaks_at_its_start_has_its_last_words_told(far: Far) -> None:
    address = python_there(far, "broken", "echo 'ImportError: libc is too old' >&2; exit 1")
    error = refused(address)
    assert error.message == "perwatt does not start on somebody@127.0.0.1: ImportError: libc is too old"


def test_a_shell_that_greets_disturbs_nothing(far: Far) -> None:
    address = python_there(far, "chatty", f"echo Welcome; printf 'no newline'; exec {sys.executable} \"$@\"")
    with open_place(address) as place:
        assert place.machine()["cpus"] >= 1


def test_a_scratch_folder_that_can_not_be_made(far: Far) -> None:
    with pytest.raises(InputError, match=r"on somebody@127.0.0.1: no scratch folder: .*/proc/nowhere"):
        open_place(far.address + "&folder=/proc/nowhere")
    far.at_rest()


# While it works ---------------------------------------------------------------------------------------------------------


def backend(far: Far, label: str):
    """The worker process there whose name begins so."""
    found = [p for p in far.processes("perwatt.worker") if p.environ()["PERWATT_WORKER"].startswith(label)]
    assert len(found) == 1
    return found[0]


def test_a_worker_killed_there_is_named_and_the_next_question_starts_another(far: Far, place) -> None:
    with place.worker("a side") as worker:
        worker.call("memory")
        backend(far, "a side").kill()
        with pytest.raises(BackendError) as caught:
            worker.call("memory")
        assert str(caught.value) == "a side on somebody@127.0.0.1: the worker was ended by SIGKILL during memory"
        assert worker.call("memory")["peak_memory_bytes"] > 0
        with pytest.raises(BackendError, match="no program is open"):
            worker.call("drive", seconds=0.1)


def test_a_worker_that_swells_there_is_stopped_with_its_words(far: Far, place) -> None:
    with (
        place.worker("swollen", memory_limit_bytes=1_000_000) as worker,
        pytest.raises(BackendError, match=r"ended with exit code 137 during .*out of memory: .* allowed"),
    ):
        while True:
            worker.call("memory")


def test_our_end_killed_there_is_a_lost_connection_and_takes_its_worker_along(far: Far, place) -> None:
    with place.worker("a side") as worker:
        worker.call("memory")
        process = backend(far, "a side")
        os.kill(process.ppid(), signal.SIGKILL)
        with pytest.raises(BackendError, match=r"a side on .*: the connection was lost during memory"):
            worker.call("memory")
        assert gone([process])
        assert worker.call("memory")["peak_memory_bytes"] > 0


def test_a_link_that_dies_during_a_window(far: Far, place, tmp_path) -> None:
    artifact = conv_net()
    artifact.save(tmp_path / "net.onnx")
    Samples([feed(artifact, 4)]).save(tmp_path / "samples")
    with place.worker("a side") as worker:

        def ready() -> None:
            worker.call("open", target="openvino", model=str(tmp_path / "net.onnx"), point=POINT)
            worker.call("prepare", samples=str(tmp_path / "samples"), warm_up_s=0.0)

        ready()
        process = backend(far, "a side")
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {worker._process.pid}"])
        with pytest.raises(BackendError, match=r"a side on .*: the connection was lost during drive"):
            worker.call("drive", seconds=60.0)
        killer.wait()
        assert gone([process])
        # All that was brought there is there still, held by the run.
        ready()
        assert worker.call("drive", seconds=0.01)["inferences"] > 0


def test_a_link_that_dies_while_files_are_sent(far: Far, place, tmp_path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "model.xml").write_text("<net/>")
    (folder / "model.bin").write_bytes(os.urandom(30_000_000))
    signature = {"inputs": [], "outputs": []}
    with place.worker("a side", on_progress=lambda text: os.kill(worker._process.pid, signal.SIGKILL)) as worker:
        with pytest.raises(BackendError, match=r"a side on .*: the connection was lost during load"):
            worker.call("load", target="openvino", folder=str(folder), signature=signature, point=POINT)
        worker.on_progress = None
        # Nothing was kept of what did not arrive, and the second time it does.
        with pytest.raises(BackendError, match="OpenVINO refused"):
            worker.call("load", target="openvino", folder=str(folder), signature=signature, point=POINT)
        [scratch] = far.scratch()
        assert max(path.stat().st_size for path in (scratch / "contents").iterdir()) == 30_000_000


LOCAL = """
import sys
from perwatt.place import open_place
place = open_place(sys.argv[1])
worker = place.worker("a side")
worker.start()
print("ready", flush=True)
sys.stdin.readline()
"""


def test_when_our_process_is_killed_nothing_is_left_there(far: Far) -> None:
    local = subprocess.Popen(
        [sys.executable, "-c", LOCAL, far.address],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with local:
        assert local.stdout is not None and local.stdout.readline() == "ready\n"
        assert len(far.processes()) == 2 and len(far.scratch()) == 1
        local.kill()
        local.wait()
    far.at_rest()


def test_what_a_killed_machine_left_is_swept_by_the_next_run(far: Far) -> None:
    place = open_place(far.address)
    [left] = far.scratch()
    for process in far.processes():
        process.kill()
    until(lambda: not far.processes())
    assert left.exists()
    place.close()
    with open_place(far.address) as other:
        other.machine()
        [now] = far.scratch()
        assert now.name != left.name


SILENT = "import perwatt.remote_end as end; end.SILENCE_S, end.WATCH_S = 3.0, 0.1; end.main()"


def test_a_caller_who_falls_silent_loses_his_worker(tmp_path) -> None:
    """Without ssh: our end, and a link that stays open and says nothing."""
    process = subprocess.Popen(
        [sys.executable, "-c", SILENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(
            f'{{"name": "x", "run": "0123456789abcdef", "folder": "{tmp_path}", "memory_limit_bytes": null}}\n'
        )
        process.stdin.flush()
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0] == "\n" and '"perwatt"' in lines[1] and str(tmp_path) in lines[2]
        for _ in range(10):
            time.sleep(0.5)
            process.stdin.write('{"beat": true}\n')
            process.stdin.flush()
        # Longer than the silence that it bears, and still there.
        assert process.poll() is None
        assert process.wait(timeout=30) == 0
        assert "nothing was heard" in process.stderr.read()
    assert list(tmp_path.iterdir()) == []
