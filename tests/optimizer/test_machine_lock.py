"""`MachineLock`: real processes that share a machine and want it alone, some of them killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perwatt.machine_lock import MachineLock

MAKING = """
import random, sys, time
from pathlib import Path
from perwatt.machine_lock import MachineLock

name, folder, times = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
lock, draw = MachineLock(folder), random.Random(name)
log = open(folder / "log", "a", buffering=1)

def noted(event):
    log.write(f"{event} {name}\\n")
    time.sleep(draw.uniform(0, 0.01))

for _ in range(times):
    with lock.shared():
        noted("shares")
        noted("shared")
        with lock.alone():
            noted("has")
            with lock.alone():
                noted("had")
        noted("shares")
        noted("shared")
"""
HOLDING = """
import sys, time
from pathlib import Path
from perwatt.machine_lock import MachineLock

how, folder = sys.argv[1], Path(sys.argv[2])
lock = MachineLock(folder)
with lock.shared():
    if how == "alone":
        lock.take_alone()
    print("there", flush=True)
    time.sleep(60)
"""
SHARING = """
import sys, time
from pathlib import Path
from perwatt.machine_lock import MachineLock

lock, end = MachineLock(Path(sys.argv[1])), time.monotonic() + 60
print("there", flush=True)
while time.monotonic() < end:
    with lock.shared():
        time.sleep(0.05)
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended behind the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def begin(processes: list[subprocess.Popen[str]], script: str, *arguments: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", script, *map(str, arguments)]
    processes.append(subprocess.Popen(line, stdout=subprocess.PIPE, text=True))
    return processes[-1]


def said(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stdout.readline() == "there\n"


def test_who_is_alone_is_alone(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    for number in range(4):
        begin(started, MAKING, number, tmp_path, 10)
    assert [process.wait(timeout=60) for process in started] == [0] * 4
    there: list[str] = []
    events = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len(events) == 4 * 10 * 6
    for event, name in events:
        if event in ("shares", "has"):
            assert "alone" not in there and (event == "shares" or not there), events
            there.append("alone" if event == "has" else name)
        else:
            there.remove("alone" if event == "had" else name)


def test_who_shares_does_not_keep_out_who_wants_to_be_alone(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    for _ in range(3):
        said(begin(started, SHARING, tmp_path))
    time.sleep(0.3)
    lock, start = MachineLock(tmp_path), time.monotonic()
    for _ in range(5):
        with lock.alone():
            pass
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("how", ["shared", "alone"])
def test_a_process_that_is_killed_lets_go(how: str, tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    holder = begin(started, HOLDING, how, tmp_path)
    said(holder)
    holder.send_signal(signal.SIGKILL)
    lock, start = MachineLock(tmp_path), time.monotonic()
    with lock.alone():
        assert time.monotonic() - start < 20
    lock.close()


def test_one_that_is_killed_while_it_waits_keeps_nobody_out(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    lock = MachineLock(tmp_path)
    with lock.shared():
        waiting = begin(started, HOLDING, "alone", tmp_path)
        time.sleep(1.0)
        waiting.kill()
        waiting.wait()
        said(begin(started, HOLDING, "shared", tmp_path))


def test_it_is_shared_again_after_it_was_had_alone(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    lock = MachineLock(tmp_path)
    with lock.shared():
        lock.take_alone()
        lock.take_alone()
        lock.end_alone()
        lock.end_alone()
        said(begin(started, HOLDING, "shared", tmp_path))
        waiting = begin(started, HOLDING, "alone", tmp_path)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=1.0)


def test_what_went_wrong_ends_both(tmp_path: Path) -> None:
    lock = MachineLock(tmp_path)
    with pytest.raises(ValueError), lock.shared():
        lock.take_alone()
        raise ValueError
    with MachineLock(tmp_path).alone():
        pass
    with lock.shared(), MachineLock(tmp_path).shared():
        pass


def test_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MachineLock(tmp_path / "nowhere")
