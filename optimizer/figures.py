"""The figures that are measured and judged: name, unit, which way is better, and what each one means in a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FigureKind:
    """One kind of figure. `of_energy`: it rests on joules, so a modelled one never decides. `exact`: it is counted, not
    measured, so it has no interval."""

    name: str
    title: str
    unit: str
    better: Literal["lower", "higher"]
    meaning: str
    of_energy: bool = False
    exact: bool = False


_KINDS = (
    FigureKind(
        "throughput_per_watt", "inferences per joule", "1/J", "higher",
        "Inferences a second for each watt, idle power included: what perwatt optimizes.", of_energy=True,
    ),
    FigureKind(
        "energy_j_per_inference", "energy per inference", "J", "lower",
        "Gross joules over inferences: what the machine draws anyway is included.", of_energy=True,
    ),
    FigureKind(
        "energy_above_idle_j_per_inference", "energy above idle", "J", "lower",
        "Joules per inference beyond what the machine draws with the model loaded and no load.", of_energy=True,
    ),
    FigureKind("power_w", "power", "W", "lower", "Mean power under this load.", of_energy=True),
    FigureKind(
        "cpu_s_per_inference", "CPU time per inference", "s", "lower",
        "User + system seconds of the whole process over inferences: steadier than wall time on a shared machine.",
    ),
    FigureKind("throughput_per_s", "throughput", "1/s", "higher", "Inferences a second of wall time."),
    FigureKind("latency_p50_ms", "latency p50", "ms", "lower", "Half of all calls take no longer."),
    FigureKind("latency_p99_ms", "latency p99", "ms", "lower", "99 % of all calls take no longer (nearest rank)."),
    FigureKind("size_bytes", "size", "B", "lower", "Bytes of what is deployed: graph and weights as lowered.", exact=True),
    FigureKind(
        "peak_memory_bytes", "peak memory", "B", "lower",
        "Highest resident memory of the process that ran it, runtime included.", exact=True,
    ),
    FigureKind("accuracy", "accuracy", "", "higher", "The metric on the labelled samples.", exact=True),
)  # fmt: skip

FIGURES: dict[str, FigureKind] = {kind.name: kind for kind in _KINDS}
"""By name, in the order in which they are shown."""

MEASURED: tuple[str, ...] = tuple(kind.name for kind in _KINDS if not kind.exact)
"""The figures that every window gives."""
