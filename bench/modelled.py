"""A meter for machines without one: joules from CPU time, a power table and the clock. Labelled `modelled`, always.

    energy = CPU seconds × watts of a busy core above idle
           + seconds × (idle watts of this machine's share of the package + watts of its memory)

The table names its sources: a processor's thermal design power over its cores, the shares of it that a package draws
idle and busy, and watts for each GiB of memory. A CPU second is priced as a whole core's, because backends run a thread
a core; where both hardware threads of a core are busy that is up to twice too much. The machine's share of the package
is the cores that it shows (online CPUs over the threads a core that /proc/cpuinfo tells of) over the product's cores. A
virtual machine that hides its threads has its CPUs taken for whole cores: where they are hardware threads, its idle share
is half of that.

Turbo, voltage regulators and what neighbours do to the package are left out, so a figure is good for comparing two
programs on one machine, not for a bill. An unknown processor gets no figure: None, never 0.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from perwatt.bench import machine
from perwatt.contract import Meter
from perwatt.measurement import Boundary, Method, Reading, Window


@dataclass(frozen=True)
class Processor:
    """What this machine says it is."""

    vendor: str
    family: int
    model: int
    name: str


@dataclass(frozen=True)
class Size:
    """How much of a machine this is: cores as it shows them, and memory in GiB (None where it does not say)."""

    cores: float
    memory_gib: float | None


@cache
def this_processor() -> Processor | None:
    """From /proc/cpuinfo; None where there is none to read."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    numbers = [int(_field(text, key)) if _field(text, key).isdigit() else -1 for key in ("cpu family", "model")]
    # Arm says who designed the core and which one it is, by numbers.
    arm = [_field(text, f"CPU {key}") for key in ("implementer", "part", "variant", "revision")]
    name = _field(text, "model name") or " ".join(filter(None, ["Arm", *arm] if arm[0] else []))
    return Processor(_field(text, "vendor_id") or arm[0], numbers[0], numbers[1], name)


@cache
def this_size() -> Size:
    """CPUs over threads a core, and the memory that Linux manages; in a container what it may use of them."""
    limits = (machine.cpus_allowed(), machine.cpu_limit())
    cpus = min([os.cpu_count() or 1, *(limit for limit in limits if limit)])
    siblings, cores = (_field(_read("/proc/cpuinfo"), key) for key in ("siblings", "cpu cores"))
    threads = int(siblings) / int(cores) if siblings.isdigit() and cores.isdigit() and int(cores) else 1.0
    kibibytes = _field(_read("/proc/meminfo"), "MemTotal").removesuffix(" kB")
    allowed = _read("/sys/fs/cgroup/memory.max").strip()
    gibibytes = [int(kibibytes) / 2**20] if kibibytes.isdigit() else []
    gibibytes += [int(allowed) / 2**30] if allowed.isdigit() else []
    return Size(cpus / max(1.0, threads), min(gibibytes, default=None))


@cache
def whole_table() -> dict[str, Any]:
    """`power_table.json` as it stands."""
    table: dict[str, Any] = json.loads((files("perwatt.bench") / "power_table.json").read_text())
    return table


def power_table() -> list[dict[str, Any]]:
    """The rows of `power_table.json`: how to recognise a processor, its power and the row's source."""
    rows: list[dict[str, Any]] = whole_table()["processors"]
    return rows


def row_for(processor: Processor | None) -> dict[str, Any] | None:
    """The most exact row for `processor`: by name, else by vendor, family and model; None where none fits."""
    if processor is None:
        return None
    by_name = [r for r in power_table() if r.get("name") and re.search(r["name"], processor.name)]
    key = [processor.vendor, processor.family, processor.model]
    by_model = [r for r in power_table() if not r.get("name") and [r["vendor"], r["family"], r["model"]] == key]
    return next(iter([*by_name, *by_model]), None)


class Modelled(Meter):
    """Joules from CPU seconds and seconds. None where the processor is unknown; where the memory's size is unknown it is
    left out, and the boundary is the package.

    After construction `busy_core_w`, `idle_w` and `memory_w` are the watts in use."""

    method: Method = "modelled"
    boundary: Boundary | None = "package+dram"

    def __init__(self, processor: Processor | None = None, size: Size | None = None) -> None:
        self.processor = processor or this_processor()
        self.size = size or this_size()
        self.row = row_for(self.processor)
        self.busy_core_w = self.idle_w = self.memory_w = 0.0
        if self.row is None:
            self.method, self.boundary = "unavailable", None
            return
        package, memory = whole_table()["package"], whole_table()["memory"]
        tdp_of_a_core_w = float(self.row["tdp_w"]) / float(self.row["cores"])
        self.busy_core_w = (package["busy_share_of_tdp"] - package["idle_share_of_tdp"]) * tdp_of_a_core_w
        self.idle_w = package["idle_share_of_tdp"] * tdp_of_a_core_w * self.size.cores
        if self.size.memory_gib is None:
            self.boundary = "package"
        else:
            self.memory_w = memory["watts_per_gib"] * self.size.memory_gib

    def missing(self) -> list[str]:
        return [self._unknown()] if self.row is None else []

    def start(self) -> None:
        """Nothing to start: the window carries its own CPU time."""

    def stop(self, window: Window) -> Reading:
        if self.row is None:
            return Reading(None, self._unknown())
        energy_j = window.cpu_s * self.busy_core_w + window.wall_s * (self.idle_w + self.memory_w)
        return Reading(energy_j) if energy_j > 0 else Reading(None, "the window has no length")

    def describe(self) -> dict[str, Any]:
        if self.row is None:
            return {
                "method": "unavailable", "boundary": None, "how": self._unknown(),
                "source": None, "uncertainty": None, "refresh_s": None,
            }  # fmt: skip
        return {
            "method": self.method, "boundary": self.boundary, "how": self._how(self.row), "source": self._sources(self.row),
            "uncertainty": self._uncertainty(self.row), "uncertainty_factor": self._factor(self.row), "refresh_s": None,
            "watts": {
                "busy_core": round(self.busy_core_w, 3), "idle": round(self.idle_w, 3), "memory": round(self.memory_w, 3),
            },
        }  # fmt: skip

    def _unknown(self) -> str:
        name = self.processor.name if self.processor and self.processor.name else "unknown processor"
        return f"no energy counter, and {name} is not in the power table"

    def _how(self, row: dict[str, Any]) -> str:
        idle = f"{self.idle_w:.2f} W idle for {self.size.cores:g} of {row['cores']} cores"
        memory = f" + {self.memory_w:.2f} W for {self.size.memory_gib:.1f} GiB" if self.size.memory_gib else ""
        of = f"{row['as']}: {row['tdp_w']} W, {row['cores']} cores"
        return (
            f"CPU seconds × {self.busy_core_w:.2f} W for one busy core above idle + seconds × ({idle}{memory}) ({of})"
        )

    def _sources(self, row: dict[str, Any]) -> str:
        parts = [f"{row['source']} ({row['year']})", whole_table()["package"]["source"]]
        return "; ".join([*parts, whole_table()["memory"]["source"]] if self.memory_w else parts)

    def _factor(self, row: dict[str, Any]) -> float:
        """The widest of any part: in a ratio of two sides much of it cancels, in joules it stands."""
        parts = [row, whole_table()["package"], *([whole_table()["memory"]] if self.memory_w else [])]
        return max(float(part["uncertainty_factor"]) for part in parts)

    def _uncertainty(self, row: dict[str, Any]) -> str:
        parts = [f"{row['uncertainty']} for a busy core", whole_table()["package"]["uncertainty"]]
        parts.append("a virtual CPU is taken for what the machine shows, a core or a thread of one")
        return "; ".join([*parts, f"memory {whole_table()['memory']['uncertainty']}"] if self.memory_w else parts)


def _field(text: str, key: str) -> str:
    found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
