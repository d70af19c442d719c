"""Which machine a figure was measured on: what decides speed, and nothing that changes while the machine stays the same.

Figures of two machines must not be compared by accident, and those of one machine must stay comparable after a reboot or
a kernel update. So the fingerprint has the processor, its instruction sets, CPUs, memory, graphics processors and the
container's CPU limit; it has no kernel version, frequency, host name or date. What it cannot tell: which neighbours a
virtual machine has, and which of several equal machines this is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from perwatt.bench import machine
from perwatt.bench.modelled import Processor, this_processor

ISA_FLAGS = (
    "avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
    "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme",
)  # fmt: skip
"""Instruction sets that decide how fast a network runs, as Linux names them (x86 and Arm)."""

DIGEST_DIGITS = 12
GIB = 2**30

WORDS = {
    "vendor": "processor vendor", "family": "processor family", "model": "processor model",
    "stepping": "processor stepping", "name": "processor", "cpus": "CPUs online",
    "cpus_allowed": "CPUs that may be used",
    "threads_per_core": "threads per core", "memory_gib": "memory in GiB", "isa": "instruction sets",
    "gpus": "graphics processors", "cpu_limit": "CPU limit of the container",
}  # fmt: skip


def fingerprint(root: Path = machine.ROOT, processor: Processor | None = None) -> dict[str, Any]:
    """What decides this machine's speed. None where the system does not say; lists are empty where there is nothing."""
    found = processor or this_processor()
    stepping = machine.cpuinfo(root).get("stepping")
    return {
        "vendor": found.vendor if found else None,
        "family": found.family if found else None,
        "model": found.model if found else None,
        "stepping": int(stepping) if stepping and stepping.isdigit() else None,
        "name": found.name if found else None,
        "cpus": machine.cpus_online(root),
        "cpus_allowed": machine.cpus_allowed(root),
        "threads_per_core": _threads_per_core(root),
        "memory_gib": memory_gib(root),
        "isa": isa(root),
        "gpus": gpu_names(),
        "cpu_limit": machine.cpu_limit(root),
    }


def digest(facts: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that stand for a fingerprint, whatever the order of its keys."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_DIGITS]


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of equal machines."""
    return not difference(a, b)


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """In words, what differs between two fingerprints; empty where nothing does."""
    return [_differs(key, a.get(key), b.get(key)) for key in dict.fromkeys((*a, *b)) if a.get(key) != b.get(key)]


def isa(root: Path = machine.ROOT) -> list[str]:
    """The instruction sets among `ISA_FLAGS` that this processor has."""
    info = machine.cpuinfo(root)
    has = set((info.get("flags") or info.get("Features") or "").split())
    return [flag for flag in ISA_FLAGS if flag in has]


def memory_gib(root: Path = machine.ROOT) -> int | None:
    """Installed memory in GiB: the memory blocks that are online. `MemTotal` is what the kernel leaves of it, which
    changes with the kernel: it is used, rounded, only where there are no blocks to count."""
    folder = root / "sys/devices/system/memory"
    block = machine.text(folder / "block_size_bytes")
    online = sum(machine.text(path / "online") == "1" for path in folder.glob("memory[0-9]*"))
    if block and online:
        return round(online * int(block, 16) / GIB)
    total = machine.memory_bytes(root)
    return round(total / GIB) if total is not None else None


@cache
def gpu_names() -> list[str]:
    """Names of the graphics processors, as the driver's own tool lists them; empty where it isn't there."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    ask = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted(line.strip() for line in done.stdout.split("\n") if line.strip())


def _threads_per_core(root: Path) -> int | None:
    siblings = machine.text(root / "sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    return machine.count(siblings) if siblings else None


def _differs(key: str, a: Any, b: Any) -> str:
    word = WORDS.get(key, key.replace("_", " "))
    if key == "isa" and a is not None and b is not None:
        missing, new = [x for x in a if x not in b], [x for x in b if x not in a]
        changes = [f"without {', '.join(missing)}"] * bool(missing) + [f"with {', '.join(new)}"] * bool(new)
        return f"{word}: {' and '.join(changes)}"
    unsaid = "none" if key == "cpu_limit" else "unknown"
    return f"{word}: {_plain(a, unsaid)} became {_plain(b, unsaid)}"


def _plain(value: Any, unsaid: str) -> str:
    if value is None:
        return unsaid
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
