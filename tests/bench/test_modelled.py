"""The modelled meter: a table with sources, plain arithmetic, and nothing at all for a processor that nobody knows."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench import modelled
from perwatt.bench.modelled import Modelled, Processor, Size, power_table, row_for, whole_table
from perwatt.measurement import Reading, Window

SAPPHIRE_RAPIDS = Processor("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Processor @ 2.10GHz")
UNKNOWN = Processor("Nobody", 1, 2, "a box")
SIZE = Size(cores=4, memory_gib=16)


def window(cpu_s, wall_s=1.0, inferences=10):
    return Window(inferences, wall_s, cpu_s)


def energy_j(meter, *args, **kwargs):
    meter.start()
    return meter.stop(window(*args, **kwargs)).energy_j


def test_joules_are_busy_cores_plus_the_share_of_an_idle_package_plus_memory():
    meter = Modelled(SAPPHIRE_RAPIDS, SIZE)
    # 350 W over 56 cores are 6.25 W: 12 % of it idle, 102 % busy, so 90 % above idle. 0.284 W for each GiB.
    assert energy_j(meter, 4.0, 2.0) == pytest.approx(4 * 0.9 * 6.25 + 2 * (4 * 0.12 * 6.25 + 16 * 0.284))
    assert (meter.method, meter.boundary, meter.refresh_s) == ("modelled", "package+dram", None)


def test_a_fully_busy_package_draws_its_share_of_thermal_design_power():
    meter = Modelled(SAPPHIRE_RAPIDS, Size(cores=56, memory_gib=None))
    assert energy_j(meter, 56 * 3.0, 3.0) == pytest.approx(3 * 1.02 * 350)


def test_an_idle_window_has_idle_energy():
    meter = Modelled(SAPPHIRE_RAPIDS, SIZE)
    idle = meter.stop(Window(inferences=0, wall_s=10.0, cpu_s=0.0))
    assert idle == Reading(pytest.approx(10 * (3.0 + 4.544)))


@given(st.floats(0, 1e4), st.floats(0.001, 1e4), st.floats(0, 100))
def test_energy_above_idle_is_what_the_busy_cores_took(cpu_s, wall_s, more):
    meter = Modelled(SAPPHIRE_RAPIDS, SIZE)
    above = energy_j(meter, cpu_s + more, wall_s) - energy_j(meter, cpu_s, wall_s)
    assert above == pytest.approx(more * meter.busy_core_w, abs=1e-6)


def test_memory_of_unknown_size_is_left_out_and_the_boundary_says_so():
    meter = Modelled(SAPPHIRE_RAPIDS, Size(cores=4, memory_gib=None))
    assert energy_j(meter, 0.0) == pytest.approx(3.0)
    assert meter.boundary == "package" and "GiB" not in meter.describe()["how"]


def test_a_window_of_no_length_has_no_energy():
    assert Modelled(SAPPHIRE_RAPIDS, SIZE).stop(window(0.0, 0.0)) == Reading(None, "the window has no length")


def test_how_it_is_come_by_names_the_figures_their_sources_and_their_uncertainty():
    described = Modelled(SAPPHIRE_RAPIDS, SIZE).describe()
    assert described["method"] == "modelled" and described["boundary"] == "package+dram"
    for figure in ("5.62 W", "3.00 W idle", "4 of 56 cores", "4.54 W for 16.0 GiB", "350 W"):
        assert figure in described["how"]
    assert all(words in described["source"] for words in ("Xeon Platinum 8480+ (2023)", "Teads", "Boavizta"))
    assert "a factor of 1.5" in described["uncertainty"] and "a virtual CPU" in described["uncertainty"]
    assert described["uncertainty_factor"] == 2.2
    assert described["watts"] == {"busy_core": 5.625, "idle": 3.0, "memory": 4.544}
    json.dumps(described)


def test_an_unknown_processor_has_no_energy_and_says_so():
    meter = Modelled(UNKNOWN)
    why = "no energy counter, and a box is not in the power table"
    assert meter.stop(window(4.0)) == Reading(None, why)
    assert meter.missing() == [why]
    assert (meter.method, meter.boundary) == ("unavailable", None)
    described = meter.describe()
    assert (described["method"], described["boundary"], described["how"]) == ("unavailable", None, why)


def test_a_machine_that_says_nothing_has_no_energy(monkeypatch):
    monkeypatch.setattr(modelled, "this_processor", lambda: None)
    meter = Modelled()
    assert meter.stop(window(4.0)).energy_j is None
    assert "unknown processor" in meter.describe()["how"]


def test_this_machine_is_asked_once_and_never_an_error():
    meter = Modelled()
    assert (meter.stop(window(1.0)).energy_j is None) == (meter.method == "unavailable") == bool(meter.missing())
    assert meter.size.cores > 0


def test_every_row_has_what_the_arithmetic_needs_and_a_source():
    for row in power_table():
        assert row["tdp_w"] > 0 and row["cores"] > 0
        assert 1 < row["tdp_w"] / row["cores"] < 30, row["as"]
        assert all(row[key] for key in ("as", "source", "uncertainty")) and row["year"] >= 2017
        assert row["uncertainty"] == f"a factor of {row['uncertainty_factor']:g}"
        assert row.get("name") or all(key in row for key in ("vendor", "family", "model"))


def test_shares_and_memory_have_sources_and_uncertainties():
    package, memory = whole_table()["package"], whole_table()["memory"]
    assert 0 < package["idle_share_of_tdp"] < package["busy_share_of_tdp"] < 1.5
    assert 0 < memory["watts_per_gib"] < 1
    assert all(part[key] for part in (package, memory) for key in ("source", "uncertainty", "year"))
    assert all(f"{part['uncertainty_factor']:g}" in part["uncertainty"] for part in (package, memory))


def test_no_processor_has_two_rows():
    keys = [(row["vendor"], row["family"], row["model"]) for row in power_table() if not row.get("name")]
    assert len(set(keys)) == len(keys)
    for vendor, family, model in keys:
        row = row_for(Processor(vendor, family, model, ""))
        assert (row["vendor"], row["family"], row["model"]) == (vendor, family, model)


def test_a_row_by_name_wins_over_one_by_model():
    assert row_for(Processor("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Platinum 8488C"))["cores"] == 48
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


@pytest.mark.parametrize(
    ("cpuinfo", "meminfo", "size"),
    [
        ("siblings\t: 16\ncpu cores\t: 8\n", "MemTotal:       16777216 kB\n", Size(4.0, 16.0)),
        ("siblings\t: 8\ncpu cores\t: 8\n", "MemTotal:       1048576 kB\n", Size(8.0, 1.0)),
        ("processor\t: 0\n", "", Size(8.0, None)),
        ("siblings\t: 4\ncpu cores\t: 0\n", "MemTotal: lots\n", Size(8.0, None)),
    ],
    ids=["two threads a core", "one", "nothing said", "nonsense"],
)
def test_the_size_is_read_from_what_linux_says(monkeypatch, tmp_path, cpuinfo, meminfo, size):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    (tmp_path / "meminfo").write_text(meminfo)
    says(monkeypatch, tmp_path, allowed=8, limit=None)
    assert modelled.this_size.__wrapped__() == size


def says(monkeypatch, tmp_path, *, allowed, limit):
    """Linux shows 8 CPUs, the files of `tmp_path`, and a container's limits."""
    monkeypatch.setattr(modelled, "Path", lambda path: tmp_path / path.rpartition("/")[2])
    monkeypatch.setattr(modelled.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(modelled.machine, "cpus_allowed", lambda: allowed)
    monkeypatch.setattr(modelled.machine, "cpu_limit", lambda: limit)


@pytest.mark.parametrize(("allowed", "limit", "cores"), [(2, None, 2.0), (8, 1.5, 1.5), (None, None, 8.0)])
def test_a_container_is_charged_for_what_it_may_use(monkeypatch, tmp_path, allowed, limit, cores):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    (tmp_path / "meminfo").write_text("MemTotal:       16777216 kB\n")
    (tmp_path / "memory.max").write_text(f"{2 * 2**30}\n")
    says(monkeypatch, tmp_path, allowed=allowed, limit=limit)
    assert modelled.this_size.__wrapped__() == Size(cores, 2.0)


def test_arm_processors_are_told_apart(monkeypatch, tmp_path):
    text = "processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd0c\nCPU revision\t: 1\n"
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(modelled, "Path", lambda _: tmp_path / "cpuinfo")
    one = modelled.this_processor.__wrapped__()
    (tmp_path / "cpuinfo").write_text(text.replace("0xd0c", "0xd40"))
    other = modelled.this_processor.__wrapped__()
    assert one.vendor == other.vendor == "0x41"
    assert "0xd0c" in one.name and one != other
