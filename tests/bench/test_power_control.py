"""Power limit and clocks without a GPU: a scripted machine in a file, whose names are checked against the real bindings.
What happens in a crash is in test_power_guard.py."""

import ast
import inspect
import json
import sys
from pathlib import Path

import psutil
import pytest

from perwatt.bench import power_control, power_guard
from perwatt.bench.power_control import PowerControl
from perwatt.errors import InputError, TargetError

sys.path.insert(0, str(Path(__file__).parent))

import scripted_power
from power_machine import LOCK, MINE, SET_LIMIT, UNLOCK, scripted_machine
from scripted_power import NO_PERMISSION, NOT_SUPPORTED


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    return scripted_machine(monkeypatch, tmp_path)


def names_used():
    trees = [ast.parse(Path(module.__file__).read_text()) for module in (power_control, power_guard)]
    attributes = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in attributes if name.startswith(("nvml", "NVML"))}


def test_every_name_that_is_used_is_in_the_real_bindings_and_takes_as_much_as_in_the_stand_in():
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    used = names_used()
    assert {SET_LIMIT, LOCK, UNLOCK, "NVMLError_NoPermission"} <= used
    assert [name for name in used if not hasattr(real, name)] == []
    for name in used:
        theirs, ours = getattr(real, name), getattr(scripted_power, name)
        if inspect.isfunction(theirs):
            assert len(inspect.signature(ours).parameters) == len(inspect.signature(theirs).parameters), name
        elif isinstance(theirs, int):
            assert ours == theirs, name


def test_a_missing_package_is_explained_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    control = PowerControl()
    assert "pip install nvidia-ml-py" in control.missing()[0] and control.choices() == {}
    with control, pytest.raises(TargetError, match="pip install nvidia-ml-py"):
        control.apply(power_limit_w=200)


def test_scripted_looking_sets_nothing_but_the_limit_that_is_set_already(scripted):
    scripted.change(limit_mw=250_000, locked_mhz=[900, 900])
    control = PowerControl()
    assert control.missing() == [] and set(control.choices()) == {"power_limit_w", "clock_mhz"}
    assert set(scripted.log()) == {(SET_LIMIT, 250_000)}
    # Tests before this one may have left processes that serve the next ones.
    others = psutil.Process().children()
    with control:
        assert psutil.Process().children() == others, "a guard before there is something to guard"
    assert scripted.now() == (250, 900) and scripted.left() == []


def test_scripted_gpus_that_nobody_named_are_left_alone(scripted, monkeypatch):
    scripted.put({}, {})
    (reason,) = PowerControl().missing()
    assert "2 GPUs are visible" in reason and "CUDA_VISIBLE_DEVICES" in reason and scripted.log() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with PowerControl() as control:
        control.apply(power_limit_w=200)
        assert scripted.now(0) == (300, None) and scripted.now(1) == (200, None)


@pytest.mark.parametrize(
    ("gpus", "watts"),
    [
        ([{}], (300, 255, 210, 165)),
        ([{"limit_mw": 200_000}], (200, 165)),
        ([{"limit_mw": 72_000, "default_mw": 72_000, "limits_mw": [40_000, 72_000]}], (72, 61, 50, 40)),
        ([{}, {"limits_mw": [200_000, 300_000]}], (300, 255, 210, 200)),
        ([{}, {"limits_mw": [100_000, 280_000], "default_mw": 280_000, "limit_mw": 280_000}], (280, 238, 196, 154)),
    ],
)
def test_scripted_limits_worth_trying_are_shares_of_the_default_within_what_every_card_takes(scripted, gpus, watts):
    scripted.put(*gpus)
    assert PowerControl(tuple(range(len(gpus)))).choices()["power_limit_w"] == watts


def test_scripted_clocks_worth_trying_are_ones_that_every_card_has_at_its_fastest_memory(scripted):
    scripted.put({}, {"clocks_mhz": [2010, 1980, 1500, 1230, 990, 300]})
    assert PowerControl((0,)).choices()["clock_mhz"] == (1980, 1725, 1485, 1230, 990)
    assert PowerControl((0, 1)).choices()["clock_mhz"] == (1980, 1500, 1230, 990)


def test_scripted_clocks_that_somebody_else_holds_are_left_alone(scripted):
    scripted.change(event_reasons=2, locked_mhz=[900, 900])
    with PowerControl() as control:
        assert list(control.choices()) == ["power_limit_w"]
        with pytest.raises(TargetError, match="somebody else holds the clocks of GPU 0"):
            control.apply(clock_mhz=1500)
        control.apply(power_limit_w=200)
    assert scripted.now() == (300, 900)


def test_a_scripted_card_without_a_settable_limit_still_has_clocks(scripted):
    scripted.refuse("nvmlDeviceGetPowerManagementLimitConstraints", NOT_SUPPORTED)
    with PowerControl() as control:
        assert control.missing() == [] and list(control.choices()) == ["clock_mhz"]
        with pytest.raises(TargetError, match="let nobody set their power limit"):
            control.apply(power_limit_w=200)
        control.apply(clock_mhz=1500)
        assert scripted.now() == (300, 1500)
    scripted.refuse("nvmlDeviceGetSupportedMemoryClocks", NOT_SUPPORTED)
    (reason,) = PowerControl().missing()
    assert "let nobody set their power limit" in reason and "which clocks it has" in reason


def test_scripted_permission_that_is_refused_is_explained_and_nothing_is_changed(scripted):
    scripted.refuse(SET_LIMIT, NO_PERMISSION)
    with PowerControl() as control:
        (reason,) = control.missing()
        assert "Insufficient Permissions" in reason and "run as root" in reason and "SYS_ADMIN" in reason
        with pytest.raises(TargetError, match="run as root"):
            control.apply(power_limit_w=200)
        assert PowerControl().missing() == [reason], "the first holds the GPU, which it can't set"
    assert scripted.log() == []


def test_scripted_settings_come_back_to_what_they_were_not_to_the_default(scripted):
    scripted.change(limit_mw=250_000)
    others = psutil.Process().children()
    with PowerControl() as control:
        control.apply(power_limit_w=200.5, clock_mhz=1410)
        assert scripted.now() == (200.5, 1410)
        record = json.loads((scripted.records / "GPU-0.json").read_text())
        assert (record["power_limit_mw"], record["applied_mw"], record["clocks_locked"]) == (250_000, [200_500], True)
        control.apply(clock_mhz=1410)
        assert scripted.now() == (250, 1410)
        control.apply(power_limit_w=150)
        assert scripted.now() == (150, None)
        (guard,) = (child for child in psutil.Process().children() if child not in others)
    assert scripted.now() == (250, None) and scripted.left() == [] and not guard.is_running()


def test_scripted_restore_puts_back_and_the_block_goes_on(scripted):
    with PowerControl() as control:
        control.restore()
        control.apply(clock_mhz=1410)
        control.restore()
        assert scripted.now() == (300, None) and scripted.left() == []
        control.apply(power_limit_w=150)
        assert scripted.now() == (150, None)
    assert scripted.now() == (300, None)


def test_a_scripted_point_that_is_set_already_is_not_set_again(scripted):
    with PowerControl() as control:
        control.apply(200, 1500)
        calls = len(scripted.log())
        control.apply(200, 1500)
        assert len(scripted.log()) == calls
    assert (SET_LIMIT, 200_000) in scripted.log() and (LOCK, 1500) in scripted.log()


def test_scripted_clocks_that_were_never_set_are_never_reset(scripted):
    scripted.change(locked_mhz=[900, 900])
    with PowerControl() as control:
        control.apply(power_limit_w=200)
    assert scripted.now() == (300, 900)


@pytest.mark.parametrize(("point", "words"), [((99,), "from 100 to 300 W"), ((None, 2000), "from 210 to 1980 MHz")])
def test_a_scripted_value_outside_of_the_cards_range_is_refused_with_the_range(scripted, point, words):
    with PowerControl() as control, pytest.raises(InputError, match=words):
        control.apply(*point)
    assert {call for call, _ in scripted.log()} == {SET_LIMIT} and scripted.now() == (300, None)


def test_nothing_is_set_outside_of_the_block(scripted):
    with pytest.raises(TargetError, match="with PowerControl"):
        PowerControl().apply(power_limit_w=200)


def test_two_scripted_gpus_are_set_alike_and_both_come_back_where_one_refuses(scripted):
    scripted.put({}, {"limit_mw": 280_000})
    with PowerControl((0, 1)) as control:
        control.apply(200, 1500)
        assert scripted.now(0) == scripted.now(1) == (200, 1500)
        scripted.refuse(LOCK, NOT_SUPPORTED, uuid="GPU-1")
        with pytest.raises(TargetError, match=r"GPU 1 .* refuses 150 W and 1200 MHz"):
            control.apply(150, 1200)
        assert scripted.now(0) == (300, None) and scripted.now(1) == (280, None) and scripted.left() == []


def test_a_scripted_limit_that_is_taken_and_not_kept_is_an_error(scripted):
    scripted.change(stays=True)
    with PowerControl() as control, pytest.raises(TargetError, match="took a power limit of 200 W and stays at 300 W"):
        control.apply(power_limit_w=200)


def test_scripted_settings_come_back_after_an_exception(scripted):
    with pytest.raises(ZeroDivisionError), PowerControl() as control:
        control.apply(200, 1500)
        _ = 1 / 0
    assert scripted.now() == (300, None) and scripted.left() == []


def test_nothing_scripted_is_changed_where_the_record_can_not_be_written(scripted):
    scripted.change(locked_mhz=[900, 900])
    with PowerControl() as control:
        (scripted.records / "GPU-0.json").mkdir()
        with pytest.raises(TargetError, match="set XDG_CACHE_HOME"):
            control.apply(200, 1500)
        (scripted.records / "GPU-0.json").rmdir()
    assert set(scripted.log()) == {(SET_LIMIT, 300_000)} and scripted.now() == (300, 900) and scripted.left() == []


def test_a_second_run_on_a_scripted_gpu_is_refused_and_one_on_another_is_not(scripted):
    scripted.put({}, {})
    with PowerControl((0,)) as control:
        control.apply(200)
        (reason,) = PowerControl((0, 1)).missing()
        assert f"another perwatt run (process {MINE}) sets the power of GPU 0" in reason and "wait" in reason
        assert PowerControl((1,)).missing() == []
    assert PowerControl((0, 1)).missing() == []


def test_a_cache_folder_that_is_none_is_explained(scripted, monkeypatch):
    (scripted.folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(scripted.folder / "file"))
    assert "set XDG_CACHE_HOME" in PowerControl().missing()[0]
