"""External meters: real processes and real sockets that speak the line protocol of docs/wall-meter.md.

The meters of these tests draw constant power, so a window's joules are known from its length, which the test takes from
the outside and from the inside."""

import json
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from perwatt.bench import wall_lines
from perwatt.bench.wall import Wall
from perwatt.measurement import Window

WINDOW = Window(inferences=1, wall_s=1.0, cpu_s=1.0)
DOCS = Path(__file__).parents[2] / "docs" / "wall-meter.md"

METER = '''
import json, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
began = time.monotonic()

def now():
    return time.monotonic() - began

def say(**sample):
    print(json.dumps(sample), flush=True)

def told(word):
    """Whether the test asked for `word`; it is told that this was seen."""
    if not (here / word).exists():
        return False
    (here / (word + ".seen")).touch()
    return True

'''


@pytest.fixture
def meter(tmp_path):
    """Builds a meter from the body of a Python program, and ends it with the test."""
    built = []

    def build(body, **options):
        script = tmp_path / "meter.py"
        script.write_text(METER + body)
        built.append(Wall(f"wall:{sys.executable} {script} {tmp_path}", **options))
        return built[-1]

    yield build
    for each in built:
        each.close()


@pytest.fixture
def tell(tmp_path):
    """Tells the meter's program a word, and waits until it was seen."""

    def send(word):
        (tmp_path / word).touch()
        while not (tmp_path / f"{word}.seen").exists():
            time.sleep(0.005)

    return send


def measured(meter, seconds=0.15):
    """A window of at least `seconds`: the reading, and its length from the inside and from the outside."""
    before = time.monotonic()
    meter.start()
    begun = time.monotonic()
    time.sleep(seconds)
    ending = time.monotonic()
    reading = meter.stop(WINDOW)
    return reading, ending - begun, time.monotonic() - before


STEADY = """
say(meter="scripted analyser", interval_s=0.4)
while True:
    say({sample})
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("sample", "watts"),
    [
        ("power_w=100", 100),
        ("power_w=100, time_s=now() - 5e6", 100),
        ("energy_j=7e6 + 50 * now(), time_s=now()", 50),
        ("energy_j=50 * now(), power_w=1, time_s=now()", 50),
    ],
    ids=["watts", "watts with the meter's clock", "joules", "joules before watts"],
)
def test_a_process_gives_watts_or_joules(meter, sample, watts):
    wall = meter(STEADY.format(sample=sample))
    assert wall.missing() == []
    reading, least_s, most_s = measured(wall)
    assert reading.reason is None
    assert watts * least_s * 0.999 <= reading.energy_j <= watts * most_s
    assert reading.refreshes > 0 and reading.meter_cpu_s >= 0
    assert (wall.method, wall.boundary, wall.refresh_s) == ("metered", "wall", 0.4)
    described = wall.describe()
    assert "scripted analyser" in described["how"] and ("joules" in described["how"]) == ("energy_j" in sample)
    assert "malformed_lines" not in described


def test_lines_that_come_late_do_not_shift_the_meters_clock(meter, tmp_path):
    """Power rises by 1000 W a second; the first line is old when it comes. A shift of 0.2 s would be 200 W."""
    wall = meter("""
(here / "began").write_text(str(began))
say(interval_s=0.4)
late = None
while True:
    moment = now()
    if late is None:
        late = dict(time_s=moment + 77, power_w=1000 * moment)
        time.sleep(0.2)
        say(**late)
    say(time_s=now() + 77, power_w=1000 * now())
    time.sleep(0.01)
""")
    assert wall.missing() == []
    zero = float((tmp_path / "began").read_text())
    before = time.monotonic()
    wall.start()
    begun = time.monotonic()
    time.sleep(0.15)
    ending = time.monotonic()
    reading = wall.stop(WINDOW)
    after = time.monotonic()

    def joules(start, end):
        return 500 * ((end - zero) ** 2 - (start - zero) ** 2)

    # A line takes a moment to come, the quickest of them at most 100 ms.
    assert joules(begun - 0.1, ending - 0.1) * 0.99 <= reading.energy_j <= joules(before, after) * 1.01


def test_windows_follow_each_other(meter):
    wall = meter(STEADY.format(sample="energy_j=50 * now(), time_s=now()"))
    wall.missing()
    energies = [measured(wall, 0.05)[0].energy_j for _ in range(4)]
    assert all(energy > 50 * 0.05 * 0.999 for energy in energies)


def test_what_reading_costs_is_counted_with_the_commands_own_processor_time(meter):
    wall = meter("say(power_w=1)\nwhile True:\n    sum(range(20000))\n    say(power_w=1)\n")
    reading, _, _ = measured(wall, 0.3)
    assert reading.meter_cpu_s > 0.02


def test_what_short_lived_children_of_the_command_cost_is_counted_too(meter):
    wall = meter("""
import subprocess
say(interval_s=1, power_w=1)
while True:
    subprocess.run([sys.executable, "-S", "-c", "sum(range(200000))"])
    say(power_w=1)
""")
    wall.missing()
    reading, _, _ = measured(wall, 0.5)
    assert reading.meter_cpu_s > 0.02


def test_the_first_line_may_name_the_boundary(meter):
    wall = meter('say(boundary="host", interval_s=0.5)\nwhile True:\n    say(power_w=9)\n    time.sleep(0.01)\n')
    assert wall.missing() == [] and wall.boundary == "host"


def test_the_interval_is_measured_where_the_meter_does_not_say(meter):
    wall = meter("n = 0\nwhile True:\n    n += 1\n    say(time_s=n * 0.25, power_w=9)\n    time.sleep(0.005)\n")
    wall.missing()
    measured(wall, 0.05)
    assert wall.refresh_s == pytest.approx(0.25)


def test_lines_that_are_not_understood_are_counted_and_passed_over(meter):
    wall = meter("""
say(interval_s=0.4)
while True:
    say(power_w=100)
    print("{ oops", flush=True)
    print("", flush=True)
    say(power_w="much")
    time.sleep(0.01)
""")
    reading, least_s, most_s = measured(wall)
    assert 100 * least_s * 0.999 <= reading.energy_j <= 100 * most_s
    described = wall.describe()
    assert described["malformed_lines"] >= 2 and "oops" in described["first_malformed"]


def test_a_process_that_ends_in_a_window_leaves_its_last_words(meter, tell):
    wall = meter("""
while not told("end"):
    say(power_w=100)
    time.sleep(0.01)
sys.exit("battery empty")
""")
    assert wall.missing() == []
    wall.start()
    tell("end")
    reading = wall.stop(WINDOW)
    assert reading.energy_j is None
    assert "ended with exit code 1" in reading.reason and "battery empty" in reading.reason
    wall.start()
    assert wall.stop(WINDOW).energy_j is None


def test_a_meter_that_falls_silent_in_a_window_gives_none(meter, tell):
    wall = meter("""
say(interval_s=0.02)
while not told("silence"):
    say(power_w=100)
    time.sleep(0.01)
time.sleep(1000)
""")
    assert wall.missing() == []
    wall.start()
    tell("silence")
    reading = wall.stop(WINDOW)
    assert reading.energy_j is None and "silent for more than 0.5 s" in reading.reason


def test_a_gap_in_the_meters_own_time_is_a_silence_too(meter, tell):
    wall = meter("""
say(interval_s=0.1)
jump = 0
while True:
    jump = 10 if jump or told("jump") else 0
    say(time_s=now() + jump, power_w=100)
    time.sleep(0.01)
""")
    assert wall.missing() == []
    wall.start()
    tell("jump")
    time.sleep(0.05)
    reading = wall.stop(WINDOW)
    assert reading.energy_j is None and "silent for 10 s in the window" in reading.reason


@pytest.mark.parametrize(
    ("after", "words"),
    [("energy_j=1000", "measured nothing"), ("energy_j=3", "ran backwards")],
    ids=["standing still", "reset"],
)
def test_a_counter_that_stands_still_or_falls_in_a_window_gives_none_not_zero(meter, tell, after, words):
    wall = meter(f"""
say(interval_s=0.4)
joules = 100
while not told("change"):
    joules += 1
    say(energy_j=min(joules, 900))
    time.sleep(0.01)
while True:
    say({after})
    time.sleep(0.01)
""")
    assert wall.missing() == []
    wall.start()
    tell("change")
    reading = wall.stop(WINDOW)
    # The move up from the last joules is still one; after it nothing moves any more.
    while reading.energy_j is not None:
        reading, _, _ = measured(wall, 0.01)
    assert words in reading.reason


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("time.sleep(1000)", "gave no sample"),
        ("say(power_w=0)\ntime.sleep(1000)", "its power_w is 0"),
        ("say(energy_j=5)\nsay(energy_j=5)\ntime.sleep(1000)", "energy_j does not advance"),
        ("print('volts', flush=True)\ntime.sleep(1000)", "1 lines not understood, the first: not JSON: volts"),
        ("sys.exit('no such device')", "exit code 1, saying: no such device"),
    ],
    ids=["silent", "nothing", "still", "garbled", "gone"],
)
def test_a_meter_that_is_of_no_use_is_missing_with_the_reason(meter, body, words):
    wall = meter(body, patience_s=1.0)
    (reason,) = wall.missing()
    assert words in reason
    wall.start()
    assert words in wall.stop(WINDOW).reason
    assert words in wall.describe()["how"]


@pytest.mark.parametrize(
    "source", ["/no/such/command", "sh -c 'unbalanced", "", "tcp://nowhere", "tcp://127.0.0.1:x", "tcp://127.0.0.1:1"]
)
def test_what_can_not_be_opened_is_explained(source):
    wall = Wall("wall:" + source)
    assert "can't be opened" in wall.missing()[0]
    wall.close()


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pids):
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(alive(pid) for pid in pids)


def test_close_ends_the_whole_process_group_even_one_that_ignores_being_asked(meter, tmp_path, monkeypatch):
    monkeypatch.setattr(wall_lines, "GRACE_S", 0.2)
    wall = meter("""
import os, signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
(here / "pids").write_text(f"{os.getpid()} {child.pid}")
while True:
    say(power_w=5)
    time.sleep(0.01)
""")
    assert wall.missing() == []
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(alive(pid) for pid in pids)
    wall.close()
    assert wait_until_gone(pids)
    wall.close()


def test_a_window_that_was_never_begun_has_no_energy(meter):
    wall = meter(STEADY.format(sample="power_w=100"))
    wall.missing()
    assert wall.stop(WINDOW).reason == "the meter was not started"


class Server:
    """A meter on a socket: sends `sample(seconds)` every 10 ms to whoever connects, until it is closed."""

    def __init__(self, sample):
        self.sample = sample
        self.server = socket.create_server(("127.0.0.1", 0))
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    @property
    def address(self):
        return f"wall:tcp://127.0.0.1:{self.server.getsockname()[1]}"

    def serve(self):
        connection, _ = self.server.accept()
        with connection:
            connection.sendall(b'{"meter": "on a socket", "interval_s": 0.4}\n')
            while not self.over.is_set():
                connection.sendall(json.dumps(self.sample(time.monotonic())).encode() + b"\n")
                time.sleep(0.01)

    def close(self):
        self.over.set()
        self.thread.join()
        self.server.close()


@pytest.fixture
def server():
    built = Server(lambda now: {"time_s": now, "energy_j": 30 * now})
    yield built
    built.close()


def test_a_socket_gives_lines_too(server):
    wall = Wall(server.address)
    try:
        assert wall.missing() == []
        reading, least_s, most_s = measured(wall)
        assert 30 * least_s * 0.999 <= reading.energy_j <= 30 * most_s
        assert "on a socket" in wall.describe()["how"]
    finally:
        wall.close()


def test_a_socket_that_closes_in_a_window_gives_none(server):
    wall = Wall(server.address)
    try:
        assert wall.missing() == []
        wall.start()
        server.close()
        reading = wall.stop(WINDOW)
        assert reading.energy_j is None and "closed the connection" in reading.reason
    finally:
        wall.close()


def test_the_documented_shell_meter_works(tmp_path):
    text = DOCS.read_text()
    script = tmp_path / "battery.sh"
    script.write_text(text[text.index("#!/bin/sh\n# battery.sh") :].split("```")[0])
    (tmp_path / "power_now").write_text("12500000\n")
    wall = Wall(f"wall:sh {script} {tmp_path}")
    try:
        assert wall.missing() == []
        reading, least_s, most_s = measured(wall, 0.3)
        assert 12.5 * least_s * 0.999 <= reading.energy_j <= 12.5 * most_s
        assert (wall.boundary, wall.refresh_s) == ("host", 0.1)
    finally:
        wall.close()
