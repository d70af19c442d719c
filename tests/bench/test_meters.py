"""Which meter is opened: what was named, or the best that works; and the words for a person when it is another."""

import sys
from pathlib import Path

import pytest

from perwatt.bench import meters, modelled
from perwatt.bench.meters import open_meter
from perwatt.bench.modelled import Modelled, Processor
from perwatt.bench.nvml import Nvml
from perwatt.bench.rapl import Rapl
from perwatt.bench.unavailable import Unavailable
from perwatt.bench.wall import Wall
from perwatt.contract import Meter
from perwatt.errors import InputError, TargetError
from perwatt.measurement import Window

sys.path.insert(0, str(Path(__file__).parent))

from scripted_nvml import Board, ScriptedNvml

WINDOW = Window(inferences=1, wall_s=1.0, cpu_s=1.0)
KNOWN = Processor("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Processor @ 2.10GHz")


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine without counters and GPUs, with a processor that the table knows; `counters` gives it scripted RAPL."""
    monkeypatch.delenv("PERWATT_METER", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(modelled, "this_processor", lambda: KNOWN)
    looks = iter(range(10**9))

    def rapl(domain="package"):
        return Rapl(tmp_path, domain, read=lambda path: next(looks) if "moves" in path.read_text() else 0)

    monkeypatch.setattr(meters, "Rapl", rapl)

    def counters(kind):
        (tmp_path / "intel-rapl:0").mkdir()
        (tmp_path / "intel-rapl:0" / "name").write_text("package-0\n")
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text(f"{kind}\n")

    return counters


def test_a_machine_without_counters_is_modelled_and_that_is_not_worth_a_word():
    meter, notes = open_meter()
    assert isinstance(meter, Modelled) and notes == []


def test_scripted_counters_that_work_are_the_first_choice(machine):
    machine("moves")
    meter, notes = open_meter()
    assert isinstance(meter, Rapl) and notes == [] and meter.missing() == []


def test_scripted_counters_that_stand_still_are_passed_over_with_a_note(machine):
    machine("stands")
    meter, notes = open_meter()
    assert isinstance(meter, Modelled)
    assert len(notes) == 1 and "does not advance" in notes[0]


def test_a_processor_that_nobody_knows_has_no_energy_and_says_why(monkeypatch):
    monkeypatch.setattr(modelled, "this_processor", lambda: Processor("Nobody", 1, 2, "a box"))
    meter, notes = open_meter()
    assert isinstance(meter, Unavailable)
    assert len(notes) == 1 and "a box is not in the power table" in notes[0]
    reading = meter.stop(WINDOW)
    assert reading.energy_j is None and "no RAPL counters" in reading.reason and "power table" in reading.reason


def test_a_gpu_is_never_modelled():
    meter, notes = open_meter(device="gpu")
    assert isinstance(meter, Unavailable) and "pip install nvidia-ml-py" in notes[0]


def test_a_scripted_gpu_is_read_by_nvml(monkeypatch):
    module = ScriptedNvml(Board())
    monkeypatch.setitem(sys.modules, "pynvml", module)
    for name in ("nvml", "sampling"):
        monkeypatch.setattr(sys.modules[f"perwatt.bench.{name}"], "time", module.time)
    meter, notes = open_meter(device="gpu")
    assert isinstance(meter, Nvml) and notes == []
    assert open_meter("nvml:0")[0].indices == (0,)


@pytest.mark.parametrize(("choice", "kind"), [("modelled", Modelled), ("none", Unavailable)])
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_a_meter_can_be_named_by_argument_and_environment(monkeypatch, choice, kind, way):
    if way == "environment":
        monkeypatch.setenv("PERWATT_METER", choice)
    meter, notes = open_meter(choice if way == "argument" else "auto", device="gpu")
    assert isinstance(meter, kind) and notes == []


def test_an_argument_wins_over_the_environment_and_auto_there_changes_nothing(monkeypatch):
    monkeypatch.setenv("PERWATT_METER", "none")
    assert isinstance(open_meter("modelled")[0], Modelled)
    monkeypatch.setenv("PERWATT_METER", "auto")
    assert isinstance(open_meter()[0], Modelled)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("rapl", "modprobe"), ("rapl:psys", "modprobe"), ("nvml", "pip install"), ("nvml:0,1", "pip install"),
        ("wall:/no/such/command", "can't be opened"), ("wall:tcp://nowhere", "HOST:PORT"),
    ],
)  # fmt: skip
def test_a_meter_that_was_named_and_can_not_be_used_is_an_error_with_the_fix(choice, words):
    with pytest.raises(TargetError, match=words) as caught:
        open_meter(choice)
    assert caught.value.exit_code == 4 and choice in str(caught.value)


def test_an_error_says_that_the_environment_named_the_meter(monkeypatch):
    monkeypatch.setenv("PERWATT_METER", "rapl")
    with pytest.raises(TargetError, match="PERWATT_METER"):
        open_meter()


@pytest.mark.parametrize(
    ("choice", "words"),
    [("raple", "did you mean rapl"), ("nvlm", "did you mean nvml"), ("", "known are"), ("wall:", "wall:COMMAND"),
     ("rapl:dram", "rapl"), ("nvml:x", "nvml:0"), ("nvml:", "nvml:0"), ("modelled:2", "modelled")],
)  # fmt: skip
def test_a_choice_that_is_none_names_the_nearest(choice, words):
    with pytest.raises(InputError, match=words) as caught:
        open_meter(choice)
    assert caught.value.exit_code == 2


def test_an_external_meter_is_opened_by_its_command():
    command = f'{sys.executable} -c "print(\'{{\\"power_w\\": 5}}\', flush=True); import time; time.sleep(1000)"'
    meter, notes = open_meter(f"wall:{command}")
    try:
        assert isinstance(meter, Wall) and notes == []
    finally:
        meter.close()


@pytest.mark.parametrize("kind", [Modelled, Nvml, Rapl, Unavailable, Wall], ids=lambda kind: kind.name())
def test_every_meter_keeps_the_contract_on_any_machine(kind):
    """Nothing raises, whatever is missing: a reading has joules above zero, or none and the reason."""
    meter = kind("wall:/no/such/command") if kind is Wall else kind()
    assert isinstance(meter, Meter)
    assert all(isinstance(reason, str) and reason for reason in meter.missing())
    meter.start()
    reading = meter.stop(WINDOW)
    assert reading.reason if reading.energy_j is None else reading.energy_j > 0
    assert {"method", "boundary", "how", "source", "uncertainty", "refresh_s"} <= meter.describe().keys()
    assert meter.describe()["method"] == meter.method and meter.describe()["boundary"] == meter.boundary
    meter.close()
