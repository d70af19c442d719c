"""What a run itself costs, with scripted meters, and after how many inferences it is won back."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from perwatt.account_words import run_words
from perwatt.bench.scripted import Scripted
from perwatt.report import RunCostReport
from perwatt.run_cost import Charge, RunCost, tree_cpu_s


def figures(cpu_s: float, joules: float | None, method: str = "modelled") -> dict[str, Any]:
    return {"cpu_s_per_inference": cpu_s, "energy_j_per_inference": {"value": joules, "method": method}}


def charged(meter: Scripted) -> Charge:
    charge = Charge()
    charge.meter.close()
    charge.meter = meter
    meter.start()
    return charge


def test_joules_are_those_of_the_meter_and_add_up_over_readings() -> None:
    charge = charged(Scripted([100.0, 20.0], method="modelled"))
    first = charge.total(figures(2.0, 2.0), figures(1.0, 1.0))
    assert (first.energy_j, first.method, first.pays_back_after, first.pays_back_in) == (
        100.0,
        "modelled",
        100,
        "joules",
    )
    assert charge.total(figures(2.0, 2.0), figures(1.0, 1.0)).energy_j == 120.0


def test_one_gap_and_the_joules_are_not_known() -> None:
    charge = charged(Scripted([None, 20.0]))
    for _ in range(2):
        found = charge.total(figures(2.0, 2.0), figures(1.0, 1.0))
        assert found.energy_j is None and found.method == "unavailable" and found.boundary is None
    assert found.pays_back_in == "CPU seconds"


def test_joules_of_different_methods_are_not_compared() -> None:
    charge = charged(Scripted([100.0], method="counter"))
    assert charge.total(figures(2.0, 2.0), figures(1.0, 1.0)).pays_back_in == "CPU seconds"


def test_what_saves_nothing_is_never_won_back() -> None:
    charge = charged(Scripted([100.0], method="modelled"))
    found = charge.total(figures(1.0, 1.0), figures(1.0, 1.0))
    assert found.pays_back_after is None and found.pays_back_in is None


def test_what_workers_took_is_charged() -> None:
    charge = charged(Scripted([100.0], method="modelled"))
    for _ in range(2):
        charge.add(1e6)
    found = charge.total(figures(2.0, None), figures(1.0, None))
    assert found.cpu_s >= 2e6 and found.pays_back_after == pytest.approx(found.cpu_s, abs=1)


BURN = (
    "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass\nprint(1, flush=True)\ninput()"
)


def test_what_ray_looks_after_tells_its_own_time(tmp_path: Path) -> None:
    before = tree_cpu_s()
    (tmp_path / "raylet").symlink_to("/bin/bash")
    # One named as Ray's is, and a child of it.
    line = [str(tmp_path / "raylet"), "-c", f"{sys.executable} -c '{BURN}'; true"]
    child = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert tree_cpu_s() - before < 0.3
    finally:
        child.communicate(b"\n")


def test_cpu_seconds_are_those_of_running_children_too() -> None:
    before = tree_cpu_s()
    child = subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.05)
        running = tree_cpu_s()
        assert running - before >= 0.45
    finally:
        child.communicate(b"\n")
    assert tree_cpu_s() >= running - 0.05, "and stay counted when they are over"


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        (RunCost(542.0, 812.0, 6410.0, "modelled", "package", 3_200_000, "joules"),
         "this run took 9 min 02 s, 812 CPU seconds and 6.41 kJ (modelled); 3,200,000 inferences win that back, in joules"),
        (RunCost(5.0, 8.0, None, "unavailable", None), "this run took 5.0 s, 8.00 CPU seconds; nothing wins that back"),
    ],
)  # fmt: skip
def test_in_words(cost: RunCost, words: str) -> None:
    assert run_words(RunCostReport.model_validate(cost.to_json())) == words
