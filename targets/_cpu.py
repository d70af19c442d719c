"""What CPU this is and how its threads may be divided up: shared by the targets that run on it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
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


def channel_multiples(isa: Sequence[str]) -> dict[str, int]:
    """For each type, the multiple of channels that pays in oneDNN. Its AMX tiles are 64 int8 or 32 bfloat16 wide; without AMX,
    channels lie in blocks of one register of 32-bit sums (measured with VNNI on OpenVINO, int8 convolutions of 256 channels: 248
    cost what 256 do, 240 0.95 × and 208 0.86 ×)."""
    block = 16 if "avx512f" in isa else 8
    return {
        "int8": 64 if "amx_int8" in isa else block,
        "bfloat16": 32 if "amx_bf16" in isa else block,
        "float32": block,
    }


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
