"""What CPU this is and how its threads may be divided up: shared by the targets that run on it."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

from perwatt.contract import OperatingPoint

BATCHES = (1, 2, 4, 8, 16, 32, 64)


def usable_cpus() -> int:
    """CPUs that this process may use, which in a container or under `taskset` are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def counts(most: int) -> tuple[int, ...]:
    """Powers of two up to `most`, and `most`."""
    return tuple(sorted({1 << power for power in range(most.bit_length())} | {most}))


def knobs(point: OperatingPoint) -> dict[str, tuple[Any, ...]]:
    """Threads in single-stream; threads, streams and batches elsewhere."""
    cpus = counts(usable_cpus())
    return {"threads": cpus} if point.scenario == "single-stream" else {
        "threads": cpus, "streams": cpus, "batch": BATCHES
    }  # fmt: skip


@cache
def cpu_isa() -> tuple[str, ...]:
    """The instruction sets that decide what pays, as Linux names them."""
    vector = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "asimd", "i8mm")
    known = (*vector, "amx_tile", "amx_int8", "amx_bf16")
    flags = set(re.findall(r"\w+", _cpuinfo()))
    return tuple(name for name in known if name in flags)


@cache
def cpu_name() -> str:
    """The processor as it calls itself."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
