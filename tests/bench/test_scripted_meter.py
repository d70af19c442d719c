"""The meters that measure nothing: one says what a test told it, one says why there is no energy."""

import pytest

from perwatt.bench.scripted import Scripted
from perwatt.bench.unavailable import Unavailable
from perwatt.measurement import Reading, Window

WINDOW = Window(inferences=4, wall_s=2.0, cpu_s=1.0)


def test_readings_come_in_turn_round_and_round():
    meter = Scripted(readings=[1.5, None, Reading(3.0, refreshes=7, meter_cpu_s=0.1)])
    meter.start()
    assert meter.stop(WINDOW) == Reading(1.5)
    assert meter.stop(WINDOW) == Reading(None, "the script says so")
    assert meter.stop(WINDOW).refreshes == 7
    assert meter.stop(WINDOW).energy_j == 1.5
    assert meter.started == 1


def test_watts_are_multiplied_by_the_windows_seconds():
    assert Scripted(watts=3.0).stop(WINDOW).energy_j == 6.0


def test_method_boundary_refresh_and_what_is_missing_are_the_tests_to_say():
    meter = Scripted(watts=1.0, method="metered", boundary="wall", refresh_s=0.1, missing=["unplugged"])
    assert (meter.method, meter.boundary, meter.refresh_s) == ("metered", "wall", 0.1)
    assert meter.missing() == ["unplugged"]
    described = meter.describe()
    assert (described["method"], described["boundary"], described["refresh_s"]) == ("metered", "wall", 0.1)


@pytest.mark.parametrize("script", [{}, {"readings": []}, {"readings": [1.0], "watts": 1.0}])
def test_a_script_is_readings_or_watts(script):
    with pytest.raises(ValueError, match="readings or watts"):
        Scripted(**script)


def test_no_meter_gives_no_energy_and_says_why():
    meter = Unavailable("nobody asked")
    meter.start()
    assert meter.stop(WINDOW) == Reading(None, "nobody asked")
    assert (meter.method, meter.boundary, meter.describe()["how"]) == ("unavailable", None, "nobody asked")
