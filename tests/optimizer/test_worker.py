"""`Worker`: real processes that crash, hang, print, swell and lose their parent; none of it harms who asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from perwatt import errors
from perwatt.errors import BackendError, InputError, PassError, TargetError, UntrustedCodeError
from perwatt.isolation import Worker

sys.path.insert(0, str(Path(__file__).parent))
from runs import environment, gone, package, workers_of

MISBEHAVING = '''
    """A target that does what the environment says when it is asked what is missing."""
    import ctypes, os, subprocess, sys, time
    from perwatt import errors
    from perwatt.contract import Target

    print("noise at import")
    os.write(1, b'{"result": "forged"}\\n')

    class Misbehaving(Target):
        def missing(self):
            return getattr(self, os.environ["PERWATT_TEST_ACT"])()

        def well(self):
            return ["nothing is wrong"]

        def crash(self):
            sys.stderr.write("kernel: no such instruction\\n")
            sys.stderr.flush()
            ctypes.string_at(0)

        def leave(self):
            os._exit(3)

        def hang(self):
            sys.stderr.write("waiting for the device\\n")
            sys.stderr.flush()
            time.sleep(3600)

        def talk(self):
            print('{"result": "forged"}')
            os.write(1, b"from C, without a newline")
            subprocess.run([sys.executable, "-c", "print('from a child')"])
            return ["said a lot"]

        def read(self):
            return [repr(sys.stdin.read()), repr(subprocess.run(["cat"], capture_output=True).stdout)]

        def swell(self):
            held = []
            while True:
                held.append(bytearray(os.urandom(1) * 20_000_000))
                time.sleep(0.01)

        def fail(self):
            raise ValueError("several\\nlines  of\\nwords")

        def fill(self):
            raise OSError(28, "No space left on device", "/far/away/model.bin")

        def name_it(self):
            kind = getattr(errors, os.environ["PERWATT_TEST_ERROR"])
            raise kind("it is so", fix="do this")

        def capabilities(self): ...
        def lower(self, artifact, point): ...
        def versions(self): return {}
'''


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ask a new worker's misbehaving target to act."""
    package(tmp_path, "targets", "misbehaving", MISBEHAVING)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    workers = []

    def act(what: str, worker: Worker | None = None, timeout_s: float = 60, **settings):
        monkeypatch.setenv("PERWATT_TEST_ACT", what)
        if worker is None:
            worker = Worker("the backend", **settings)
            workers.append(worker)
        return worker.call("target", name="misbehaving", timeout_s=timeout_s)

    yield act
    for worker in workers:
        worker.close()


@pytest.fixture
def worker():
    with Worker("here") as made:
        yield made


def test_an_answer_comes_back_whatever_libraries_print_on_their_way(ask) -> None:
    assert ask("well")["missing"] == ["nothing is wrong"]
    assert ask("talk")["missing"] == ["said a lot"]


def test_a_library_that_reads_standard_input_finds_it_empty_and_eats_no_question(ask, worker: Worker) -> None:
    for _ in range(2):
        assert ask("read", worker)["missing"] == ["''", "b''"]


def test_a_crash_is_an_error_with_the_signal_and_the_last_words(ask) -> None:
    with pytest.raises(BackendError, match=r"the backend: the worker was ended by SIGSEGV during target: .+"):
        ask("crash")
    with pytest.raises(BackendError, match="exit code 3"):
        ask("leave")


def test_after_a_crash_the_next_question_starts_a_new_process(ask, worker: Worker, monkeypatch) -> None:
    with pytest.raises(BackendError, match="SIGSEGV"):
        ask("crash", worker)
    assert ask("well", worker)["missing"] == ["nothing is wrong"]


def test_a_process_killed_from_outside_is_an_error_that_says_so(worker: Worker) -> None:
    worker.call("memory")
    assert worker._process is not None
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(BackendError, match="here: the worker was ended by SIGKILL during memory"):
        worker.call("memory")
    assert worker.call("memory")["peak_memory_bytes"] > 0


def test_a_hang_ends_with_the_timeout_and_leaves_no_process(ask, worker: Worker) -> None:
    with pytest.raises(BackendError, match="target did not end within 3 s and was stopped: waiting for the device"):
        ask("hang", worker, timeout_s=3)
    assert gone(workers_of("here"))
    assert ask("well", worker)["missing"] == ["nothing is wrong"]


def test_a_process_that_takes_more_memory_than_it_may_is_stopped_and_says_how_much(ask) -> None:
    with pytest.raises(
        BackendError, match=r"exit code 137 during target: out of memory: [\d.]+ GB used, 0.4 GB allowed"
    ):
        ask("swell", memory_limit_bytes=400_000_000)


@pytest.mark.parametrize("kind", [InputError, TargetError, PassError, UntrustedCodeError, BackendError])
def test_errors_raised_on_purpose_keep_their_name_their_words_and_their_exit_code(ask, monkeypatch, kind) -> None:
    monkeypatch.setenv("PERWATT_TEST_ERROR", kind.__name__)
    with pytest.raises(errors.PerwattError) as caught:
        ask("name_it")
    assert type(caught.value) is kind
    assert str(caught.value) == "it is so — do this"


def test_any_other_exception_is_a_backend_error_in_one_line(ask) -> None:
    with pytest.raises(BackendError, match=r"^target failed: ValueError: several lines of words$"):
        ask("fail")


def test_a_full_disk_in_the_worker_is_the_users_to_mend(ask) -> None:
    with pytest.raises(InputError, match="no room on the disk that holds /far/away"):
        ask("fill")


def test_an_unknown_operation_or_parameter_is_an_error_and_not_a_crash(worker: Worker) -> None:
    with pytest.raises(BackendError, match="dance failed: AttributeError"):
        worker.call("dance")
    with pytest.raises(BackendError, match="memory failed: TypeError"):
        worker.call("memory", of="everyone")
    assert worker.call("memory")["peak_memory_bytes"] > 0


def test_a_program_must_be_open_before_it_is_driven(worker: Worker) -> None:
    with pytest.raises(BackendError, match="no program is open"):
        worker.call("drive", seconds=0.1)


INTERRUPTED = """
import os, sys
from perwatt.isolation import Worker
worker = Worker(sys.argv[1])
worker.call("memory")
print("ready", flush=True)
try:
    worker.call("target", name="misbehaving")
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.stdin.readline()
os.environ["PERWATT_TEST_ACT"] = "well"
print(worker.call("target", name="misbehaving")["missing"], flush=True)
worker.close()
"""


def test_an_interrupted_wait_takes_the_process_with_it_so_that_no_late_answer_is_mistaken(tmp_path: Path) -> None:
    """In a process of its own: in this one, where other tests have used AMX, the kernel finds the alternative signal stack
    of Python's fault handler too small for the matrix registers, and ends the process."""
    package(tmp_path, "targets", "misbehaving", MISBEHAVING)
    settings = {**environment(tmp_path), "PERWATT_TEST_ACT": "hang"}
    name = f"interrupted {os.getpid()}"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, name],
        env=settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        running = workers_of(name)
        assert len(running) == 1
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert gone(running)
        process.stdin.write("go on\n")
        process.stdin.close()
        assert process.stdout.readline() == "['nothing is wrong']\n"
        assert process.wait(timeout=30) == 0


def test_closing_ends_the_process_and_may_be_done_twice() -> None:
    worker = Worker("to be closed")
    worker.close()
    worker.call("memory")
    running = workers_of("to be closed")
    assert len(running) == 1
    worker.close()
    worker.close()
    assert gone(running)


def test_a_process_that_does_not_go_by_itself_is_ended_when_closed(ask) -> None:
    worker = Worker("stubborn")
    ask("well", worker)
    running = workers_of("stubborn")
    os.kill(running[0].pid, signal.SIGSTOP)
    worker.close()
    assert gone(running)


PARENT = """
import signal, sys
from perwatt.isolation import Worker
worker = Worker(sys.argv[1])
worker.call("memory")
print("ready", flush=True)
worker.call("target", name="misbehaving") if sys.argv[2] == "busy" else signal.pause()
"""


@pytest.mark.parametrize(("how", "what"), [(signal.SIGKILL, "busy"), (signal.SIGKILL, "idle"), (signal.SIGINT, "busy")])
def test_no_worker_outlives_its_parent(tmp_path: Path, how: signal.Signals, what: str) -> None:
    package(tmp_path, "targets", "misbehaving", MISBEHAVING)
    name = f"child of {how.name} {what} {os.getpid()}"
    settings = {**environment(tmp_path), "PERWATT_TEST_ACT": "hang"}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, name, what], env=settings, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
        running = workers_of(name)
        assert len(running) == 1 and running[0].is_running()
        time.sleep(0.3)
        parent.send_signal(how)
        parent.wait(timeout=30)
    assert gone(running)


def test_workers_take_no_part_in_ctrl_c_which_is_the_parents_to_handle(worker: Worker) -> None:
    worker.call("memory")
    assert worker._process is not None
    assert os.getsid(worker._process.pid) != os.getsid(0)
    assert psutil.Process(worker._process.pid).ppid() == os.getpid()
