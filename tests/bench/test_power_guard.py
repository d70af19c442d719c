"""A scripted GPU's limit and clocks come back when real processes that set them are killed: by the guard, and where that
was killed too by the next run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from perwatt.bench import power_guard
from perwatt.bench.power_control import PowerControl
from perwatt.errors import TargetError

sys.path.insert(0, str(Path(__file__).parent))

import scripted_power
from power_machine import MINE, SET_LIMIT, UNLOCK, scripted_machine
from scripted_power import LIBRARY_NOT_FOUND, NO_PERMISSION

RUN = """
import os, subprocess, sys
from perwatt.bench.power_control import PowerControl
with PowerControl() as control:
    assert control.missing() == [], control.missing()
    control.apply(200, 1500)
    {before}
    print("set", os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    return scripted_machine(monkeypatch, tmp_path)


@pytest.fixture
def started():
    """`started(before="…")`: a run in a process group of its own that has set 200 W and 1500 MHz, then waits."""
    runs = []

    def start(before="pass"):
        run = subprocess.Popen(
            [sys.executable, "-c", RUN.format(before=before)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0,
        )  # fmt: skip
        runs.append(run)
        assert run.stdout.readline().split() == ["set", str(run.pid)]
        return run

    yield start
    for run in runs:
        run.stdin.close()
        run.wait(60)
        run.stdout.close()


def guard_of(pid):
    """The guard process that a run has started."""
    (guard,) = [child for child in psutil.Process(pid).children() if "perwatt.bench.power_guard" in child.cmdline()]
    return guard


def wait_until(happens):
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.01)


def put_back_by_the_guard(machine, run):
    """The run is gone, and everything is as before, by another process's hand."""
    run.wait(60)
    wait_until(lambda: PowerControl().missing() == [])
    assert machine.now() == (300, None) and machine.left() == []
    by = {pid for pid, call, _, value, *_ in machine.state()["log"] if (call, value) == (UNLOCK, None)}
    assert by and not by & {run.pid, MINE}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGABRT])
def test_scripted_settings_come_back_when_the_run_and_its_group_are_ended(scripted, started, number):
    run = started()
    assert scripted.now() == (200, 1500) and scripted.left() == ["GPU-0.json"]
    os.killpg(run.pid, number)
    if number == signal.SIGINT:
        assert run.wait(60) != 0 and scripted.now() == (300, None) and scripted.left() == []
    else:
        put_back_by_the_guard(scripted, run)


@pytest.mark.parametrize(
    "before",
    [
        "child = subprocess.Popen(['sleep', '600'], close_fds=False).pid",
        "child = os.fork() or os.execlp('sleep', 'sleep', '600')",
    ],
)
def test_scripted_settings_come_back_while_what_the_run_had_started_lives_on(scripted, started, before):
    run = started(f"{before}; print(child, file=open({str(scripted.folder / 'child')!r}, 'w'))")
    child = psutil.Process(int((scripted.folder / "child").read_text()))
    try:
        os.kill(run.pid, signal.SIGKILL)
        put_back_by_the_guard(scripted, run)
        assert child.is_running()
    finally:
        child.kill()


def test_scripted_settings_come_back_while_a_fork_of_the_run_holds_the_pipe(scripted, started):
    """A forked child has every file of its parent, close-on-exec or not, and so the pipe does not end."""
    try:
        os.close(os.pidfd_open(MINE))
    except OSError:
        pytest.skip("this kernel has no pidfd_open")
    run = started("child = os.fork() or (sys.stdout.close(), __import__('time').sleep(600))")
    (fork,) = [child for child in psutil.Process(run.pid).children() if child.pid != guard_of(run.pid).pid]
    try:
        os.kill(run.pid, signal.SIGKILL)
        wait_until(lambda: scripted.now() == (300, None) and scripted.left() == [])
        assert fork.is_running()
    finally:
        fork.kill()


def test_a_scripted_guard_is_not_ended_by_signals(scripted, started):
    run = started()
    guard = guard_of(run.pid)
    assert os.getsid(guard.pid) == guard.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        guard.send_signal(number)
    run.kill()
    put_back_by_the_guard(scripted, run)


@pytest.mark.parametrize("why", ["no NVML for it", "no interpreter"])
def test_nothing_scripted_is_changed_where_the_guard_can_not_be_started(scripted, monkeypatch, why):
    scripted.change(locked_mhz=[900, 900])
    if why == "no interpreter":
        monkeypatch.setattr(sys, "executable", str(scripted.folder / "none"))
    else:
        scripted.refuse("nvmlInit", LIBRARY_NOT_FOUND, unless_pid=MINE)
    with (
        PowerControl() as control,
        pytest.raises(TargetError, match=r"can't be relied on .*(NVML Shared|No such file)"),
    ):
        control.apply(200, 1500)
    assert set(scripted.log()) == {(SET_LIMIT, 300_000)} and scripted.now() == (300, 900) and scripted.left() == []


def test_a_scripted_guard_that_is_lost_is_noticed_before_the_next_change(scripted):
    with PowerControl() as control:
        control.apply(200, 1500)
        guard_of(MINE).kill()
        with pytest.raises(TargetError, match="can't be relied on"):
            control.apply(150, 1500)
        assert scripted.now() == (300, None) and (SET_LIMIT, 150_000) not in scripted.log()
        control.apply(180)
        assert scripted.now() == (180, None)
    assert scripted.now() == (300, None) and scripted.left() == []


def test_what_the_run_can_not_put_back_the_scripted_guard_does(scripted):
    with PowerControl() as control:
        control.apply(200, 1500)
        scripted.refuse(SET_LIMIT, pid=MINE)
    assert scripted.now() == (300, None) and scripted.left() == []


def test_what_nobody_can_put_back_is_said_with_the_commands_and_stays_on_record(scripted):
    with pytest.raises(TargetError) as caught, PowerControl() as control:
        control.apply(200, 1500)
        scripted.refuse(SET_LIMIT)
    assert "not back at 300 W (GPU is lost)" in str(caught.value)
    assert "`nvidia-smi -i GPU-0 -pl 300` and `nvidia-smi -i GPU-0 -rgc`" in caught.value.fix
    assert scripted.left() == ["GPU-0.json"] and scripted.now() == (200, None)
    scripted.allow_everything()
    with PowerControl() as control:
        assert control.missing() == [] and "its power limit is back at 300 W" in control.notes[0]
    assert scripted.now() == (300, None) and scripted.left() == []


def test_an_exception_that_is_under_way_keeps_its_name_where_nothing_scripted_can_be_put_back(scripted):
    with pytest.raises(ZeroDivisionError) as caught, PowerControl() as control:
        control.apply(200)
        scripted.refuse(SET_LIMIT)
        _ = 1 / 0
    assert "nvidia-smi -i GPU-0 -pl 300" in caught.value.__notes__[0]


def test_a_scripted_gpu_is_refused_until_the_guard_of_a_killed_run_has_put_it_back(scripted, started):
    """Else the second run would take the limit that is about to go for the original one."""
    run = started()
    (scripted.folder / "hold").touch()
    with scripted_power.machine() as state:
        state["holds"] = {UNLOCK: MINE}
    run.kill()
    run.wait(60)
    (reason,) = PowerControl().missing()
    assert f"(process {run.pid})" in reason and "is putting it back" in reason
    (scripted.folder / "hold").unlink()
    put_back_by_the_guard(scripted, run)


@pytest.fixture
def abandoned(scripted, started):
    """A scripted machine where the run and its guard were killed."""
    run = started()
    guard_of(run.pid).kill()
    run.kill()
    run.wait(60)
    assert scripted.now() == (200, 1500) and scripted.left() == ["GPU-0.json"]
    return scripted


def notes_of_the_next_run():
    control = PowerControl()
    assert control.missing() == []
    with control:
        assert control.missing() == []
    return control.notes


def test_the_next_run_puts_a_scripted_gpu_back_that_was_abandoned_and_says_so(abandoned):
    (note,) = notes_of_the_next_run()
    assert "power limit is back at 300 W" in note and "clocks are the driver's again" in note
    assert abandoned.now() == (300, None) and abandoned.left() == [] and notes_of_the_next_run() == []


def test_a_scripted_record_of_an_earlier_boot_is_forgotten(abandoned, monkeypatch):
    monkeypatch.setattr(power_guard, "BOOT_ID", abandoned.folder / "boot_id")
    power_guard.BOOT_ID.write_text("another\n")
    (note,) = notes_of_the_next_run()
    assert "started anew since" in note and abandoned.now() == (200, 1500) and abandoned.left() == []


@pytest.mark.parametrize(
    ("watts", "words"), [(220, "somebody has set its power limit to 220 W since"), (300, "driver's again")]
)
def test_a_scripted_limit_that_was_set_by_somebody_since_stays(abandoned, watts, words):
    abandoned.change(limit_mw=watts * 1000)
    (note,) = notes_of_the_next_run()
    assert words in note and "back at" not in note
    assert abandoned.now() == (watts, None) and abandoned.left() == []


def test_an_abandoned_scripted_gpu_that_can_not_be_put_back_is_not_touched(abandoned):
    abandoned.refuse(SET_LIMIT, NO_PERMISSION)
    (reason,) = PowerControl().missing()
    assert "a run that was cut off" in reason and "run as root" in reason and "-pl 300" in reason
    assert abandoned.left() == ["GPU-0.json"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"uuid": 1}'])
def test_a_damaged_scripted_record_is_named(abandoned, text):
    (abandoned.records / "GPU-0.json").write_text(text)
    (reason,) = PowerControl().missing()
    assert "GPU-0.json" in reason and "then remove the file" in reason and abandoned.now() == (200, 1500)


def test_the_guard_says_what_is_wrong_with_nvml(scripted):
    scripted.refuse("nvmlInit", LIBRARY_NOT_FOUND)
    run = subprocess.run(
        [sys.executable, "-m", "perwatt.bench.power_guard"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert run.returncode == 1 and "NVML does not start: NVML Shared Library Not Found" in run.stdout
