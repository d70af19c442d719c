"""A meter for machines without one: joules from CPU time and a power table. Labelled `modelled`, always.

    energy = CPU seconds × watts of one busy core

Watts of a busy core are the processor's thermal design power over its cores; the table names its source. Turbo, memory
and voltage regulators and idle power are left out, so a figure is good for comparing two programs on one machine (where
the factor cancels) and within about a factor of 1.5 in absolute terms. Unknown processors get no figure: None, never 0.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from perwatt.contract import Meter
from perwatt.measurement import Boundary, Method, Window


@dataclass(frozen=True)
class Processor:
    """What this machine says it is."""

    vendor: str
    family: int
    model: int
    name: str


@cache
def this_processor() -> Processor | None:
    """From /proc/cpuinfo; None where there is none to read."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None

    def field(key: str) -> str:
        found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        return found[1].strip() if found else ""

    numbers = [int(field(key)) if field(key).isdigit() else -1 for key in ("cpu family", "model")]
    return Processor(field("vendor_id"), numbers[0], numbers[1], field("model name"))


@cache
def power_table() -> list[dict[str, Any]]:
    """The rows of `power_table.json`: how to recognise a processor, its power and the row's source."""
    rows: list[dict[str, Any]] = json.loads((files("perwatt.bench") / "power_table.json").read_text())["processors"]
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
    """Joules from CPU seconds. `stop` gives None where the processor is unknown."""

    method: Method = "modelled"
    boundary: Boundary | None = "package"

    def __init__(self, processor: Processor | None = None) -> None:
        self.processor = processor or this_processor()
        self.row = row_for(self.processor)
        if self.row is None:
            self.method, self.boundary = "unavailable", None

    def start(self) -> None:
        """Nothing to start: the window carries its own CPU time."""

    def stop(self, window: Window) -> float | None:
        if self.row is None:
            return None
        return window.cpu_s * float(self.row["tdp_w"]) / float(self.row["cores"])

    def describe(self) -> dict[str, Any]:
        name = self.processor.name if self.processor else "unknown processor"
        if self.row is None:
            how = f"no energy counter, and {name} is not in the power table"
            return {"method": "unavailable", "boundary": None, "how": how}
        row = self.row
        watts = float(row["tdp_w"]) / float(row["cores"])
        of = f"{row['as']}: {row['tdp_w']} W, {row['cores']} cores"
        return {
            "method": "modelled",
            "boundary": "package",
            "how": f"CPU seconds × {watts:.2f} W for one busy core ({of})",
            "source": row["source"],
            "uncertainty": row["uncertainty"],
        }
