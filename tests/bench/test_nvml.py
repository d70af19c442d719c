"""NVML without a GPU: a scripted stand-in for the bindings (tests/bench/scripted_nvml.py), whose names are checked against
the real ones."""

import ast
import inspect
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perwatt.bench import nvml, sampling
from perwatt.bench.nvml import Nvml
from perwatt.measurement import Window

sys.path.insert(0, str(Path(__file__).parent))

from scripted_nvml import Board, ScriptedNvml

WINDOW = Window(inferences=1, wall_s=1.0, cpu_s=1.0)


@pytest.fixture
def scripted(monkeypatch):
    """Puts a machine with these boards, and a clock of its own, behind `import pynvml`."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def build(*boards, **options):
        module = ScriptedNvml(*boards, **options)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        monkeypatch.setattr(nvml, "time", module.time)
        monkeypatch.setattr(sampling, "time", module.time)
        return module

    return build


def measured(meter, module, seconds):
    """The reading of a window of so many scripted seconds."""
    meter.start()
    module.time.sleep(seconds)
    return meter.stop(WINDOW)


def names_used():
    """The names of the bindings that the meter uses."""
    tree = ast.parse(Path(nvml.__file__).read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in attributes if name.startswith(("nvml", "NVML"))}


def test_every_name_that_is_used_is_in_the_real_bindings():
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    used = names_used()
    assert "nvmlDeviceGetTotalEnergyConsumption" in used
    assert [name for name in used if not hasattr(real, name)] == []


def test_the_stand_in_takes_what_the_real_bindings_take():
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    used = {name for name in names_used() if name.startswith("nvml")}
    for name in used:
        stand_in = inspect.signature(getattr(ScriptedNvml(), name)).parameters
        assert len(stand_in) == len(inspect.signature(getattr(real, name)).parameters), name
    assert ScriptedNvml.NVML_DEVICE_MIG_ENABLE == real.NVML_DEVICE_MIG_ENABLE


def test_the_real_bindings_without_a_driver_are_explained():
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    try:
        real.nvmlInit()
    except real.NVMLError:
        (reason,) = Nvml().missing()
        assert "install the NVIDIA driver" in reason and "--gpus all" in reason
    else:
        real.nvmlShutdown()
        pytest.skip("there is a driver here")


def test_a_missing_package_is_explained_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = Nvml()
    assert "pip install nvidia-ml-py" in meter.missing()[0]
    meter.start()
    assert "pip install nvidia-ml-py" in meter.stop(WINDOW).reason
    meter.close()


def test_it_is_not_imported_before_it_is_used():
    script = "import sys; from perwatt.bench.meters import open_meter; from perwatt.bench.nvml import Nvml; Nvml()"
    subprocess.run([sys.executable, "-c", f"{script}; assert 'pynvml' not in sys.modules"], check=True)


def test_a_scripted_counter_is_read_from_tick_to_the_moment_of_the_end(scripted):
    """Ticks come every 50 ms; without waiting for them a window would be wrong by up to 10 J, a poll is 0.2 J."""
    module = scripted(Board(watts=200))
    meter = Nvml()
    assert meter.missing() == []
    assert meter.refresh_s == pytest.approx(0.05, abs=0.002)
    for seconds in (0.271, 0.3, 0.329, 1.017):
        module.time.sleep(0.023)
        reading = measured(meter, module, seconds)
        assert reading.energy_j == pytest.approx(200 * seconds, abs=0.5)
        assert reading.refreshes == round(seconds / 0.05)
        assert reading.meter_cpu_s > 0


def test_scripted_counters_of_several_gpus_are_added_up(scripted):
    module = scripted(Board(watts=100), Board(watts=300, phase_s=0.03))
    meter = Nvml()
    # The second ticks 17 ms after the first, or the first 33 ms after the second: that much of one comes on top.
    assert 400 * 0.5 - 1 <= measured(meter, module, 0.5).energy_j <= 400 * 0.5 + max(0.017 * 100, 0.033 * 300) + 1
    assert (meter.method, meter.boundary) == ("counter", "device")
    assert "energy counter of GPU 0" in meter.describe()["how"] and "GPU 1" in meter.describe()["how"]
    assert "driver 999.1" in meter.describe()["source"]
    meter.close()


def test_a_scripted_window_shorter_than_a_refresh_has_no_energy(scripted):
    module = scripted(Board())
    reading = measured(Nvml(), module, 0.02)
    assert reading.energy_j is None and "did not advance in 0.02 s; it moves every 0.05 s" in reading.reason


def test_scripted_indices_choose_gpus(scripted):
    scripted(Board(name="first"), Board(name="second"))
    how = Nvml((1,)).describe()["how"]
    assert "second" in how and "first" not in how


@pytest.mark.parametrize(
    ("visible", "names"),
    [("1", ["second"]), ("GPU-0", ["first"]), ("0, 1", ["first", "second"]), ("0,-1,1", ["first"])],
)
def test_scripted_gpus_that_cuda_does_not_see_do_not_count(scripted, monkeypatch, visible, names):
    scripted(Board(name="first"), Board(name="second"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meter = Nvml()
    assert meter.missing() == []
    assert [name for name in ("first", "second") if name in meter.describe()["how"]] == names


@pytest.mark.parametrize(
    ("visible", "words"),
    [("", "no NVIDIA GPU is visible"), ("7", "no such GPU"), ("MIG-1", "slice of a GPU"), ("0,0", "named twice")],
)
def test_scripted_gpus_that_are_none_are_explained(scripted, monkeypatch, visible, words):
    module = scripted(Board())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert words in Nvml().missing()[0]
    assert module.open == 0


def test_a_scripted_machine_without_a_driver_is_explained(scripted):
    scripted(driver=False)
    assert "install the NVIDIA driver" in Nvml().missing()[0]


def test_a_scripted_gpu_split_by_mig_is_refused(scripted):
    scripted(Board(mig=0), Board(mig=1))
    assert "GPU 1 (NVIDIA Scripted) is split by MIG" in Nvml().missing()[0]
    assert Nvml((0,)).missing() == []


@pytest.mark.parametrize("boards", [[Board(refuses={"energy"})], [Board(), Board(period_s=1e9)]])
def test_scripted_gpus_without_a_working_counter_are_read_by_their_power_and_it_says_so(scripted, boards):
    module = scripted(*boards)
    meter = Nvml()
    assert meter.missing() == []
    assert measured(meter, module, 2.0).energy_j == pytest.approx(2.0 * 200 * len(boards))
    described = meter.describe()
    assert described["method"] == "counter" and "driver-reported power" in described["how"]
    assert "average over 1 s" in described["how"] and "second choice, because" in described["how"]
    assert meter.refresh_s == 1.0


def test_scripted_power_is_followed_as_it_changes(scripted):
    board = Board(watts=100)
    module = scripted(board)
    meter = Nvml(source="power")
    meter.start()

    def wait_for_samples():
        seen = board.asked
        while board.asked < seen + 2:
            time.sleep(0.001)

    wait_for_samples()
    module.time.sleep(1.0)
    wait_for_samples()
    board.watts = 300
    wait_for_samples()
    module.time.sleep(1.0)
    wait_for_samples()
    reading = meter.stop(WINDOW)
    assert reading.energy_j == pytest.approx(100 + 300)
    assert reading.refreshes == 1 and reading.meter_cpu_s > 0
    assert "second choice" not in meter.describe()["how"]


def test_a_scripted_gpu_with_nothing_to_read_is_missing_with_both_reasons(scripted):
    module = scripted(Board(refuses={"energy", "power"}))
    reasons = Nvml().missing()
    assert "no energy counter" in reasons[0] and "Volta" in reasons[0] and "reports no power" in reasons[1]
    assert module.open == 0


def test_a_scripted_gpu_that_reports_nothing_is_missing(scripted):
    scripted(Board(watts=0))
    reasons = Nvml().missing()
    assert "did not advance" in reasons[0] and "0 W" in reasons[1]


def test_one_scripted_source_is_not_replaced_by_the_other(scripted):
    scripted(Board(refuses={"energy"}), Board(refuses={"power"}))
    assert len(Nvml((0,), source="counter").missing()) == 1
    assert Nvml((0,), source="power").missing() == []
    assert Nvml((1,), source="counter").missing() == []
    assert "reports no power" in Nvml((1,), source="power").missing()[-1]


def test_a_scripted_counter_that_stops_in_a_window_gives_none_not_zero(scripted):
    board = Board()
    module = scripted(board)
    meter = Nvml()
    meter.missing()
    board.period_s = 1e9
    reading = measured(meter, module, 1.0)
    assert reading.energy_j is None and "did not advance" in reading.reason


def test_a_scripted_counter_that_runs_backwards_gives_none(scripted):
    board = Board()
    scripted(board)
    meter = Nvml()
    meter.start()
    board.start_mj = 0
    reading = meter.stop(WINDOW)
    assert reading.energy_j is None and "backwards" in reading.reason


@pytest.mark.parametrize("source", ["counter", "power"])
@pytest.mark.parametrize("when", ["before the start", "in the window"])
def test_a_scripted_gpu_that_is_lost_gives_none_with_the_drivers_words(scripted, source, when):
    board = Board()
    module = scripted(board)
    meter = Nvml(source=source)
    assert meter.missing() == []
    if when == "before the start":
        board.refuses.add("lost")
    meter.start()
    board.refuses.add("lost")
    reading = meter.stop(WINDOW)
    assert reading.energy_j is None and "stopped answering" in reading.reason
    board.refuses.clear()
    assert measured(meter, module, 1.0).energy_j == pytest.approx(200, abs=1)
    meter.close()


def test_scripted_nvml_is_shut_down_once(scripted):
    module = scripted(Board())
    meter = Nvml()
    meter.missing()
    meter.start()
    assert module.open == 1
    meter.close()
    meter.close()
    assert module.open == 0


def test_a_window_that_was_never_begun_has_no_energy(scripted):
    scripted(Board())
    meter = Nvml()
    meter.missing()
    assert meter.stop(WINDOW).reason == "the meter was not started"
