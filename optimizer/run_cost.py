"""What a run itself costs: seconds, CPU seconds of all its processes, joules, and after how many inferences it has paid back.

Joules are those of this machine: its counter's, which counts what others do there as well, or modelled from CPU seconds.
Another machine that measures (`--on`) and a GPU are not in them. Workers of a cluster count by their CPU seconds; a counter sees
those of this machine only.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import asdict, dataclass
from typing import Any

from perwatt.bench.modelled import Modelled
from perwatt.bench.rapl import Rapl
from perwatt.contract import Meter
from perwatt.measurement import Window

RAY = ("raylet", "gcs_server")
"""Names of the processes that Ray starts; all others of it are theirs."""


@dataclass(frozen=True)
class RunCost:
    """`energy_j` is None where nothing tells; `pays_back_after`: inferences that save what the run took, by joules of the same
    method where both are known, else by CPU seconds (`pays_back_in` says which); None where nothing was saved."""

    seconds: float
    cpu_s: float
    energy_j: float | None
    method: str
    boundary: str | None
    pays_back_after: int | None = None
    pays_back_in: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Charge:
    """Counts from when it is made until `close`."""

    def __init__(self) -> None:
        counter = Rapl()
        self.meter: Meter = Modelled() if counter.missing() else counter
        if self.meter is not counter:
            counter.close()
        self._begun, self._cpu_s = time.perf_counter(), tree_cpu_s()
        self._workers_s = 0.0
        self._read: tuple[float, float] = (0.0, 0.0)
        self._energy_j: float | None = 0.0
        self.meter.start()

    def add(self, cpu_s: float) -> None:
        """CPU seconds of a worker that Ray looks after, here or on another machine."""
        self._workers_s += cpu_s

    def total(self, original: dict[str, Any], shipped: dict[str, Any]) -> RunCost:
        """What was used so far. `original` and `shipped`: figures of one inference: cpu_s_per_inference, and
        energy_j_per_inference labelled {value, method}."""
        seconds, cpu_s = time.perf_counter() - self._begun, tree_cpu_s() - self._cpu_s + self._workers_s
        energy_j = self._joules(seconds, cpu_s)
        method = self.meter.method if energy_j is not None else "unavailable"
        boundary = self.meter.boundary if energy_j is not None else None
        after, unit = _paid_back(energy_j, method, cpu_s, original, shipped)
        return RunCost(round(seconds, 2), round(cpu_s, 2), energy_j, method, boundary, after, unit)

    def _joules(self, seconds: float, cpu_s: float) -> float | None:
        """All so far: what was read before, and since. One gap, and the sum is not known."""
        reading = self.meter.stop(Window(0, seconds - self._read[0], cpu_s - self._read[1]))
        self.meter.start()
        self._read = (seconds, cpu_s)
        if self._energy_j is not None:
            self._energy_j = None if reading.energy_j is None else self._energy_j + reading.energy_j
        return self._energy_j

    def close(self) -> None:
        """Let go of the meter."""
        self.meter.close()


def _paid_back(
    energy_j: float | None, method: str, cpu_s: float, original: dict[str, Any], shipped: dict[str, Any]
) -> tuple[int | None, str | None]:
    before, after = original["energy_j_per_inference"], shipped["energy_j_per_inference"]
    same = method == before["method"] == after["method"]
    if energy_j is not None and same and before["value"] is not None and after["value"] is not None:
        saved, spent, unit = before["value"] - after["value"], energy_j, "joules"
    else:
        saved, spent, unit = original["cpu_s_per_inference"] - shipped["cpu_s_per_inference"], cpu_s, "CPU seconds"
    return (round(spent / saved), unit) if saved > 0 else (None, None)


def tree_cpu_s() -> float:
    """User + system seconds of this process, of its children that are over, and of those that run; without those that Ray looks
    after, whose time is lost when it kills one: they tell it themselves."""
    own, over = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    total = own.ru_utime + own.ru_stime + over.ru_utime + over.ru_stime
    return total + _running_cpu_s()


def _running_cpu_s() -> float:
    import psutil

    total, left_out = 0.0, set[int]()
    # Parents before their children.
    for child in sorted(psutil.Process(os.getpid()).children(recursive=True), key=lambda child: child.create_time()):
        try:
            if child.ppid() in left_out or child.name() in RAY:
                left_out.add(child.pid)
                continue
            times = child.cpu_times()
        except psutil.Error:
            continue
        # What its own children took counts with those, where they run, or with it once they are over.
        total += times.user + times.system + times.children_user + times.children_system
    return total
