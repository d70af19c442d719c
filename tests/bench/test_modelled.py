"""The modelled meter: a table with sources, plain arithmetic, and nothing at all for a processor that nobody knows."""

import json

import pytest

from perwatt.bench import modelled
from perwatt.bench.modelled import Modelled, Processor, power_table, row_for
from perwatt.measurement import Window

SAPPHIRE_RAPIDS = Processor("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Processor @ 2.10GHz")
UNKNOWN = Processor("Nobody", 1, 2, "a box")


def window(cpu_s):
    return Window(inferences=10, wall_s=1.0, cpu_s=cpu_s)


def test_joules_are_cpu_seconds_times_the_watts_of_a_busy_core():
    meter = Modelled(SAPPHIRE_RAPIDS)
    meter.start()
    # 350 W over 56 cores are 6.25 W a core.
    assert meter.stop(window(4.0)) == pytest.approx(25.0)
    assert meter.stop(window(8.0)) == pytest.approx(50.0)
    assert (meter.method, meter.boundary) == ("modelled", "package")


def test_how_it_is_come_by_names_the_figures_their_source_and_their_uncertainty():
    described = Modelled(SAPPHIRE_RAPIDS).describe()
    assert described["method"] == "modelled" and described["boundary"] == "package"
    assert all(figure in described["how"] for figure in ("6.25 W", "350 W", "56 cores"))
    assert described["source"] and described["uncertainty"]
    json.dumps(described)


def test_an_unknown_processor_has_no_energy_and_says_so():
    meter = Modelled(UNKNOWN)
    assert meter.stop(window(4.0)) is None
    assert (meter.method, meter.boundary) == ("unavailable", None)
    assert meter.describe() == {
        "method": "unavailable", "boundary": None, "how": "no energy counter, and a box is not in the power table",
    }  # fmt: skip


def test_a_machine_that_says_nothing_has_no_energy(monkeypatch):
    monkeypatch.setattr(modelled, "this_processor", lambda: None)
    meter = Modelled()
    assert meter.stop(window(4.0)) is None
    assert "unknown processor" in meter.describe()["how"]


def test_this_machine_is_asked_once_and_never_an_error():
    meter = Modelled()
    assert (meter.stop(window(1.0)) is None) == (meter.method == "unavailable")


def test_every_row_has_what_the_arithmetic_needs_and_a_source():
    for row in power_table():
        assert row["tdp_w"] > 0 and row["cores"] > 0
        assert 1 < row["tdp_w"] / row["cores"] < 30, row["as"]
        assert all(row[key] for key in ("as", "source", "uncertainty"))
        assert row.get("name") or all(key in row for key in ("vendor", "family", "model"))


def test_no_processor_has_two_rows():
    keys = [(row["vendor"], row["family"], row["model"]) for row in power_table() if not row.get("name")]
    assert len(set(keys)) == len(keys)
    for vendor, family, model in keys:
        row = row_for(Processor(vendor, family, model, ""))
        assert (row["vendor"], row["family"], row["model"]) == (vendor, family, model)


def test_a_row_by_name_wins_over_one_by_model(monkeypatch):
    exact = {"name": r"8490H", "as": "Xeon 8490H", "tdp_w": 350, "cores": 60, "source": "s", "uncertainty": "u"}
    monkeypatch.setattr(modelled, "power_table", lambda: [*power_table(), exact])
    assert row_for(Processor("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Platinum 8490H")) is exact
    assert row_for(SAPPHIRE_RAPIDS)["cores"] == 56
    assert row_for(None) is None


def test_the_processor_is_read_from_what_linux_says(monkeypatch, tmp_path):
    text = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Some Xeon\n\n"
    (tmp_path / "cpuinfo").write_text(text * 2)
    monkeypatch.setattr(modelled, "Path", lambda _: tmp_path / "cpuinfo")
    assert modelled.this_processor.__wrapped__() == Processor("GenuineIntel", 6, 143, "Some Xeon")
    (tmp_path / "cpuinfo").write_text("processor : 0\nBogoMIPS : 50\n")
    assert modelled.this_processor.__wrapped__() == Processor("", -1, -1, "")
    (tmp_path / "cpuinfo").unlink()
    assert modelled.this_processor.__wrapped__() is None
