"""RAPL over synthetic powercap trees: real folders and files laid out as Linux does. Counters that have to move during a
test do so in a scripted reader, because nothing moves files of a test."""

import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench.rapl import Rapl, find_zones
from perwatt.measurement import Window

WINDOW = Window(inferences=1, wall_s=1.0, cpu_s=1.0)
RANGE_UJ = 262_143_328_850


class SyntheticPowercap:
    """A powercap tree under `root`, and a reader whose counters move by `step` microjoules with each look at them."""

    def __init__(self, root):
        self.root = root
        self.values = {}
        self.steps = {}
        self.looks = Counter()

    def add(self, entry, name, value=1_000, step=100, range_uj=RANGE_UJ):
        folder = self.root / entry
        folder.mkdir(parents=True)
        (folder / "name").write_text(name + "\n")
        (folder / "energy_uj").write_text(f"{value}\n")
        if range_uj is not None:
            (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
        self.values[entry], self.steps[entry] = value, step
        return self

    def read(self, path):
        entry = path.parent.name
        self.looks[entry] += 1
        value = self.values[entry]
        if isinstance(value, OSError):
            raise value
        self.values[entry] = value + self.steps[entry]
        return value

    def meter(self, **options):
        meter = Rapl(self.root, read=self.read, **options)
        meter.missing()
        # From here on the test moves the counters.
        self.steps = dict.fromkeys(self.steps, 0)
        return meter

    def spend(self, **joules):
        """Let counters move; keys are entries with _ for every : ."""
        for key, amount in joules.items():
            self.values["intel-rapl" + key.replace("_", ":")] += round(amount * 1e6)


@pytest.fixture
def tree(tmp_path):
    return SyntheticPowercap(tmp_path)


def two_packages(tree):
    """A server with two packages: nested domains, DRAM beside, the platform, and one package a second time."""
    tree.add("intel-rapl:0", "package-0").add("intel-rapl:0:0", "core").add("intel-rapl:0:1", "uncore")
    tree.add("intel-rapl:0:2", "dram").add("intel-rapl:1", "package-1").add("intel-rapl:1:0", "dram")
    return tree.add("intel-rapl:2", "psys").add("intel-rapl-mmio:0", "package-0")


def test_synthetic_packages_and_dram_are_added_nested_domains_doubles_and_the_platform_are_not(tree):
    meter = two_packages(tree).meter()
    assert meter.missing() == []
    meter.start()
    tree.spend(_0=5, _0_0=4, _0_1=0.5, _0_2=1, _1=3, _1_0=0.5, _2=20)
    tree.values["intel-rapl-mmio:0"] += 5_000_000
    reading = meter.stop(WINDOW)
    assert reading.energy_j == pytest.approx(5 + 1 + 3 + 0.5)
    assert reading.reason is None and reading.meter_cpu_s > 0
    assert (meter.method, meter.boundary) == ("counter", "package+dram")


def test_synthetic_platform_is_told_of_and_read_on_request(tree):
    described = two_packages(tree).meter().describe()
    assert "package-0 + package-1 + package-0 dram + package-1 dram" in described["how"]
    assert "rapl:psys" in described["how"] and "core" not in described["how"]
    tree.steps = dict.fromkeys(tree.steps, 100)
    meter = tree.meter(domain="psys")
    assert (meter.missing(), meter.boundary) == ([], "host")
    meter.start()
    tree.spend(_0=5, _2=20)
    assert meter.stop(WINDOW).energy_j == pytest.approx(20)


def test_a_synthetic_platform_that_is_not_there_is_missing(tree):
    meter = tree.add("intel-rapl:0", "package-0").meter(domain="psys")
    assert "no psys counter among package-0" in meter.missing()[0]


def test_a_synthetic_processor_without_dram_has_the_package_for_its_boundary(tree):
    meter = tree.add("intel-rapl:0", "package-0").add("intel-rapl:0:0", "core").meter()
    meter.start()
    tree.spend(_0=2, _0_0=1)
    assert meter.stop(WINDOW).energy_j == pytest.approx(2)
    assert meter.boundary == "package"


def test_synthetic_dram_that_stands_still_is_left_out_and_said_so(tree):
    meter = tree.add("intel-rapl:0", "package-0").add("intel-rapl:0:0", "dram", step=0).meter()
    assert (meter.missing(), meter.boundary) == ([], "package")
    assert "dram not added" in meter.describe()["how"]


def test_synthetic_dram_of_one_package_only_is_left_out(tree):
    tree.add("intel-rapl:0", "package-0").add("intel-rapl:0:0", "dram").add("intel-rapl:1", "package-1")
    meter = tree.meter()
    assert (meter.missing(), meter.boundary) == ([], "package")
    assert "not every package has one" in meter.describe()["how"]


def test_a_synthetic_double_stands_in_where_the_registers_stand_still(tree):
    meter = tree.add("intel-rapl:0", "package-0", step=0).add("intel-rapl-mmio:0", "package-0").meter()
    meter.start()
    tree.values["intel-rapl-mmio:0"] += 3_000_000
    assert meter.stop(WINDOW).energy_j == pytest.approx(3)


def test_a_synthetic_counter_that_wraps_round_goes_on_counting(tree):
    meter = tree.add("intel-rapl:0", "package-0", value=RANGE_UJ - 500_000).meter()
    meter.start()
    before = tree.values["intel-rapl:0"]
    tree.values["intel-rapl:0"] = before + 2_000_000 - RANGE_UJ
    assert meter.stop(WINDOW).energy_j == pytest.approx(2)


@given(st.integers(1, RANGE_UJ), st.data())
def test_synthetic_windows_across_a_wrap_read_as_windows_without_one(moved, data):
    start = data.draw(st.integers(0, RANGE_UJ - 1))
    with tempfile.TemporaryDirectory() as folder:
        tree = SyntheticPowercap(Path(folder)).add("intel-rapl:0", "package-0", value=0)
        meter = tree.meter()
        tree.values["intel-rapl:0"] = start
        meter.start()
        tree.values["intel-rapl:0"] = (start + moved) % RANGE_UJ
        expected = moved % RANGE_UJ / 1e6
        assert (meter.stop(WINDOW).energy_j or 0.0) == pytest.approx(expected)


def test_a_synthetic_wrap_of_unknown_range_is_no_energy(tree):
    meter = tree.add("intel-rapl:0", "package-0", value=10_000_000, range_uj=None).meter()
    meter.start()
    tree.values["intel-rapl:0"] = 5
    reading = meter.stop(WINDOW)
    assert reading.energy_j is None and "range is unknown" in reading.reason


def test_synthetic_windows_longer_than_the_wrap_are_looked_after_by_a_thread(tree):
    """The counter wraps round every 40 looks and more are taken: only the thread in between can have seen it all."""
    tree.add("intel-rapl:0", "package-0", value=0, range_uj=4_000_000)
    enough, target, looks = threading.Event(), 1_000_000, 0

    def read(path):
        nonlocal looks
        looks += 1
        if looks > target:
            enough.set()
        return looks * 100_000 % 4_000_000

    meter = Rapl(tree.root, read=read)
    meter.missing()
    before, target = looks, looks + 100
    meter.start()
    assert enough.wait(60)
    reading = meter.stop(WINDOW)
    # The first look is where the window begins.
    assert reading.energy_j == pytest.approx((looks - before - 1) * 0.1)
    assert reading.energy_j > 2 * 4.0


def test_a_synthetic_counter_that_does_not_advance_is_missing_and_its_energy_is_none_not_zero(tmp_path):
    """As seen on a virtual machine: the counter exists and reads 0 for ever. Real files, read as they are."""
    SyntheticPowercap(tmp_path).add("intel-rapl:0", "package-0", value=0)
    meter = Rapl(tmp_path)
    (reason,) = meter.missing()
    assert "does not advance" in reason and "virtual machine" in reason and meter.present
    meter.start()
    assert meter.stop(WINDOW).energy_j is None
    assert "does not advance" in meter.describe()["how"]


def test_a_synthetic_counter_that_stops_in_a_window_gives_none_not_zero(tree):
    meter = tree.add("intel-rapl:0", "package-0").add("intel-rapl:1", "package-1").meter()
    meter.start()
    tree.spend(_0=5)
    reading = meter.stop(WINDOW)
    assert reading.energy_j is None
    assert "package-1 counter did not advance" in reading.reason and "package-0" not in reading.reason


def test_a_synthetic_domain_that_goes_away_in_a_window_gives_none_with_a_reason(tree):
    meter = tree.add("intel-rapl:0", "package-0").meter()
    meter.start()
    tree.values["intel-rapl:0"] = FileNotFoundError(2, "No such file or directory")
    reading = meter.stop(WINDOW)
    assert reading.energy_j is None and "can't be read any more" in reading.reason
    tree.values["intel-rapl:0"] = 0
    meter.start()
    tree.spend(_0=1)
    assert meter.stop(WINDOW).energy_j == pytest.approx(1)


def test_scripted_permission_trouble_is_explained_with_the_fix(tree):
    tree.add("intel-rapl:0", "package-0")
    tree.values["intel-rapl:0"] = PermissionError(13, "Permission denied")
    (reason,) = tree.meter().missing()
    for words in ("CVE-2020-8694", "sudo chmod a+r /sys/class/powercap/*/energy_uj", "as root", "udev rule"):
        assert words in reason


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a moment")
def test_synthetic_files_of_root_are_explained_to_somebody_else():
    root = Path(tempfile.mkdtemp())
    try:
        SyntheticPowercap(root).add("intel-rapl:0", "package-0")
        root.chmod(0o755)
        (root / "intel-rapl:0" / "energy_uj").chmod(0o400)
        meter = Rapl(root)
        os.seteuid(65534)
        try:
            (reason,) = meter.missing()
        finally:
            os.seteuid(0)
    finally:
        shutil.rmtree(root)
    assert "not readable" in reason and "sudo chmod a+r" in reason


def test_a_synthetic_counter_that_is_a_folder_is_explained(tmp_path):
    SyntheticPowercap(tmp_path).add("intel-rapl:0", "package-0")
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()
    (reason,) = Rapl(tmp_path).missing()
    assert "can't be read" in reason and "energy_uj" in reason


@pytest.mark.parametrize("entries", [[], ["dtpm", "intel-rapl"]])
def test_a_synthetic_machine_without_counters_says_what_to_do(tmp_path, entries):
    for entry in entries:
        (tmp_path / entry).mkdir()
    meter = Rapl(tmp_path)
    assert not meter.present
    assert "modprobe intel_rapl_msr" in meter.missing()[0]
    assert Rapl(tmp_path / "absent").missing()


def test_synthetic_names_of_other_processors_are_understood(tree):
    """AMD's come through the same driver; a driver of another vendor and packages of several dies differ in names only."""
    tree.add("amd-rapl:0", "package-0-die-0").add("amd-rapl:0:0", "core").add("amd-rapl:1", "package-0-die-1")
    assert [zone.label for zone in find_zones(tree.root)] == [
        "package-0-die-0", "package-0-die-0 core", "package-0-die-1",
    ]  # fmt: skip
    meter = tree.meter()
    assert meter.missing() == []
    meter.start()
    tree.values["amd-rapl:0"] += 1_000_000
    tree.values["amd-rapl:1"] += 2_000_000
    assert meter.stop(WINDOW).energy_j == pytest.approx(3)


def test_a_window_that_was_never_begun_has_no_energy(tree):
    meter = tree.add("intel-rapl:0", "package-0").meter()
    assert meter.stop(WINDOW).reason == "the meter was not started"
    meter.close()


def test_a_synthetic_file_that_a_thread_keeps_moving_is_read_as_it_is(tmp_path):
    """No scripted reader: a writer moves the file as the kernel moves its counters, and says by how much."""
    SyntheticPowercap(tmp_path).add("intel-rapl:0", "package-0", value=0)
    file = tmp_path / "intel-rapl:0" / "energy_uj"
    over, value = threading.Event(), 0

    def move():
        nonlocal value
        while not over.is_set():
            value += 1_000
            aside = tmp_path / "aside"
            aside.write_text(f"{value}\n")
            aside.replace(file)
            time.sleep(0.0005)

    writer = threading.Thread(target=move)
    writer.start()
    try:
        meter = Rapl(tmp_path)
        assert meter.missing() == [] and meter.refresh_s > 0
        before = value
        meter.start()
        begun = value
        time.sleep(0.02)
        ending = value
        reading = meter.stop(WINDOW)
        after = value
    finally:
        over.set()
        writer.join()
    assert (ending - begun - 2_000) / 1e6 <= reading.energy_j <= (after - before + 2_000) / 1e6
    assert reading.refreshes >= 0
