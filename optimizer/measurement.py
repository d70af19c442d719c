"""What a measurement is: a value that knows its unit, how it was come by and how sure it is. Missing is None, never 0."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["metered", "counter", "modelled", "unavailable"]
Boundary = Literal["device", "package", "package+dram", "host", "wall"]


@dataclass(frozen=True)
class Measurement:
    """One figure. `n` windows or calls stand behind it; `low` to `high` is the 95 % interval; `spread` the standard
    deviation between windows. `method` and `boundary` are given where the figure rests on energy."""

    value: float | None
    unit: str
    n: int = 0
    spread: float | None = None
    low: float | None = None
    high: float | None = None
    method: Method | None = None
    boundary: Boundary | None = None

    def labelled(self) -> dict[str, Any]:
        """The form of the report: {value, method, boundary}."""
        return {"value": self.value, "method": self.method or "unavailable", "boundary": self.boundary}


@dataclass(frozen=True)
class Ratio:
    """Optimized ÷ original, with its 95 % interval. None where one side is missing."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def inverse(self) -> Ratio:
        """The ratio the other way round: original ÷ optimized."""
        if self.value is None:
            return Ratio(None)
        return Ratio(
            1 / self.value,
            1 / self.high if self.high is not None else None,
            1 / self.low if self.low is not None else None,
        )


@dataclass
class Window:
    """One stretch of load on one program.

    `cpu_s` is user + system time of the whole process that ran it; `latencies_ms` one entry for each call. Energy is
    filled in by whoever held the meter: None where there is none, and `energy_reason` says why. `refreshes` is how often
    the counter moved, `meter_cpu_s` what reading it cost. `steal_s` and `other_cpu_s` are CPU seconds that the
    hypervisor took and that other processes used meanwhile; None where the system does not say."""

    inferences: int
    wall_s: float
    cpu_s: float
    latencies_ms: list[float] = field(default_factory=list)
    energy_j: float | None = None
    energy_reason: str | None = None
    refreshes: int | None = None
    meter_cpu_s: float = 0.0
    steal_s: float | None = None
    other_cpu_s: float | None = None


@dataclass(frozen=True)
class Reading:
    """What a meter says of one window: `energy_j` in joules, None where it can't tell, and then `reason` says why.
    `refreshes`: how often the counter moved in the window; `meter_cpu_s`: CPU seconds that reading it cost."""

    energy_j: float | None
    reason: str | None = None
    refreshes: int | None = None
    meter_cpu_s: float = 0.0
