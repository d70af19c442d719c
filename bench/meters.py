"""Which meter measures: the one that was named, else the best that works here.

auto          PERWATT_METER where that is set; else counters, else (on a CPU) the modelled meter
rapl          Intel's and AMD's counters of the package, with DRAM where they have it; rapl:psys: of the platform
nvml          NVIDIA GPUs; nvml:0,1: these
wall:…        an external meter: a command, or tcp://HOST:PORT (docs/wall-meter.md)
modelled      from CPU time and a power table
none          no energy
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

from perwatt.bench.modelled import Modelled
from perwatt.bench.nvml import Nvml
from perwatt.bench.rapl import Rapl
from perwatt.bench.unavailable import Unavailable
from perwatt.bench.wall import Wall
from perwatt.contract import Meter
from perwatt.errors import InputError, TargetError, nearest

CHOICES = ("auto", "rapl", "rapl:psys", "nvml", "nvml:0,1", "wall:COMMAND", "wall:tcp://HOST:PORT", "modelled", "none")

VARIABLE = "PERWATT_METER"


def open_meter(choice: str = "auto", device: Literal["cpu", "gpu"] = "cpu") -> tuple[Meter, list[str]]:
    """The meter for `choice`, ready to start, and notes for a person: why a better one was passed over, and what mends it.

    Raises InputError for a choice that is none, TargetError where a meter that was named can't be used."""
    asked = os.environ.get(VARIABLE, "").strip() if choice == "auto" else ""
    if choice == "auto" and asked in ("", "auto"):
        return _best(device)
    meter = _named(asked or choice)
    reasons = meter.missing()
    if reasons:
        meter.close()
        by = f" (named by {VARIABLE})" if asked else ""
        raise TargetError(
            f"the meter {asked or choice!r}{by} can't be used: {'; '.join(reasons)}",
            fix="give --meter auto for the best that works here, or --meter modelled",
        )
    return meter, []


def _named(choice: str) -> Meter:
    kind, colon, rest = choice.partition(":")
    if kind == "wall" and rest.strip():
        return Wall(rest)
    if kind == "nvml" and colon:
        return Nvml(_indices(choice, rest))
    simple: dict[str, Callable[[], Meter]] = {
        "rapl": Rapl, "rapl:psys": lambda: Rapl(domain="psys"), "nvml": Nvml, "modelled": Modelled, "none": Unavailable,
    }  # fmt: skip
    if choice not in simple:
        raise InputError(nearest(choice, CHOICES, "meter"), fix=f"known are {', '.join(CHOICES)}")
    return simple[choice]()


def _indices(choice: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"{choice!r} does not name GPUs by their numbers", fix="for example nvml:0 or nvml:0,1")
    return tuple(int(part) for part in parts)


def _best(device: Literal["cpu", "gpu"]) -> tuple[Meter, list[str]]:
    if device == "gpu":
        gpus = Nvml()
        reasons = gpus.missing()
        return (Unavailable("; ".join(reasons)), reasons) if reasons else (gpus, [])
    counters = Rapl()
    reasons = counters.missing()
    if not reasons:
        return counters, []
    # Counters that are there and don't work are worth a word; that a machine has none is not.
    notes = reasons if counters.present else []
    model = Modelled()
    if unknown := model.missing():
        return Unavailable("; ".join([*reasons, *unknown])), [*notes, *unknown]
    return model, notes
