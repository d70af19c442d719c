"""What the machine says of itself while it measures: busy and stolen time, frequencies, temperatures, limits.

Everything is read from Linux's /proc and /sys; what a system does not tell is None or absent, never 0. A virtual machine
usually tells neither frequencies nor temperatures, and its steal time only where the host reports it: a quiet answer
there means "nothing seen". What shows nowhere else, the compute probe sees (`perwatt.bench.probe`).

`/proc/stat` counts in ticks of 10 ms and, on most kernels, charges a whole timer tick to whoever runs when the timer
fires. One window of 50 ms therefore says next to nothing; sums over many windows do, as long as differences are summed
with their sign (cutting each off at 0 turns that noise into load).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perwatt.measurement import Window

ROOT = Path("/")
TICK_S = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01

STEAL_SHARE = 0.02
"""Of the CPU time that was asked for, what the hypervisor may take before a run counts as disturbed."""
OTHER_SHARE = 0.10
"""Of all CPUs' time, what other processes may use before a run counts as disturbed."""


@dataclass(frozen=True)
class Ticks:
    """CPU seconds since boot, summed over all CPUs: `busy_s` of all processes and the kernel, `steal_s` taken by the
    hypervisor while a CPU wanted to run, `idle_s` with nothing to do (waiting for disks included)."""

    busy_s: float
    steal_s: float
    idle_s: float

    def since(self, earlier: Ticks) -> Ticks:
        """What was counted from `earlier` to now."""
        return Ticks(self.busy_s - earlier.busy_s, self.steal_s - earlier.steal_s, self.idle_s - earlier.idle_s)


def ticks(root: Path = ROOT) -> Ticks | None:
    """The counters now; about 20 µs on a small machine. None where there is no /proc/stat."""
    try:
        with (root / "proc/stat").open() as stat:
            fields = stat.readline().split()
    except OSError:
        return None
    if len(fields) < 9 or fields[0] != "cpu":
        return None
    user, nice, system, idle, wait, irq, softirq, steal = (int(field) * TICK_S for field in fields[1:9])
    return Ticks(user + nice + system + irq + softirq, steal, idle + wait)


# Facts ----------------------------------------------------------------------------------------------------------------


def facts(root: Path = ROOT) -> dict[str, Any]:
    """The machine's conditions at this moment; what the system does not say is None."""
    load = text(root / "proc/loadavg")
    return {
        "processor": cpuinfo(root).get("model name"),
        "cpus_online": cpus_online(root),
        "cpus_allowed": cpus_allowed(root),
        "memory_bytes": memory_bytes(root),
        "virtualised": virtualised(root),
        "kernel": text(root / "proc/sys/kernel/osrelease"),
        "load_average": [float(x) for x in load.split()[:3]] if load else None,
        "governor": _one_of_all(root, "cpufreq/scaling_governor"),
        "scaling_driver": _one_of_all(root, "cpufreq/scaling_driver"),
        "frequency_mhz": _frequency_mhz(root),
        "turbo": _turbo(root),
        "temperatures_c": _temperatures_c(root),
        "throttle_count": _throttle_count(root),
        "cpu_limit": cpu_limit(root),
        "cgroup_throttled": _cgroup_throttled(root),
    }


def cpuinfo(root: Path = ROOT) -> dict[str, str]:
    """The first processor of /proc/cpuinfo, by Linux's names; empty where there is none to read."""
    first = (text(root / "proc/cpuinfo") or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.split("\n"))
    return {key.strip(): value.strip() for key, _, value in pairs if key.strip()}


def cpus_online(root: Path = ROOT) -> int | None:
    """How many CPUs the kernel schedules on."""
    spans = text(root / "sys/devices/system/cpu/online")
    if not spans:
        return os.cpu_count() if root == ROOT else None
    return count(spans)


def cpus_allowed(root: Path = ROOT) -> int | None:
    """How many CPUs this process may run on: fewer than are online in a container with a set of its own."""
    found = re.search(r"^Cpus_allowed_list:\s*(\S+)", text(root / "proc/self/status") or "", re.MULTILINE)
    return count(found[1]) if found else None


def count(spans: str) -> int:
    """How many numbers a list such as `0-3,8` stands for."""
    ends = [[int(end) for end in span.split("-")] for span in spans.split(",")]
    return sum(span[-1] - span[0] + 1 for span in ends)


def memory_bytes(root: Path = ROOT) -> int | None:
    """What the kernel has to give, in bytes: installed memory less what it keeps for itself."""
    found = re.search(r"^MemTotal:\s*(\d+) kB", text(root / "proc/meminfo") or "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def virtualised(root: Path = ROOT) -> bool | None:
    """Whether the processor says that it runs under a hypervisor; None where it has no such flag to show (not x86)."""
    flags = cpuinfo(root).get("flags")
    return "hypervisor" in flags.split() if flags is not None else None


def cpu_limit(root: Path = ROOT) -> float | None:
    """How many CPUs the container may use: the tightest `cpu.max` from this process's cgroup up; None where unlimited."""
    limits = []
    for folder in _cgroups(root):
        quota, _, period = (text(folder / "cpu.max") or "max").partition(" ")
        if quota != "max" and period:
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def text(path: Path) -> str | None:
    """What a small file says, without white space at its ends; None where it can't be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int | None:
    said = text(path)
    return int(said) if said and re.fullmatch(r"-?\d+", said) else None


def _per_cpu(root: Path, name: str) -> list[Path]:
    return sorted((root / "sys/devices/system/cpu").glob(f"cpu[0-9]*/{name}"))


def _one_of_all(root: Path, name: str) -> str | None:
    """What all CPUs say, joined where they differ."""
    said = {value for path in _per_cpu(root, name) if (value := text(path))}
    return ", ".join(sorted(said)) or None


def _frequency_mhz(root: Path) -> dict[str, Any] | None:
    """Lowest and highest current frequency over the CPUs, and the limits; from cpufreq, else from /proc/cpuinfo, where a
    virtual machine shows a constant (then `from` says so)."""
    now = [hertz / 1e3 for path in _per_cpu(root, "cpufreq/scaling_cur_freq") if (hertz := _number(path))]
    if now:
        most = [hertz / 1e3 for path in _per_cpu(root, "cpufreq/cpuinfo_max_freq") if (hertz := _number(path))]
        allowed = [hertz / 1e3 for path in _per_cpu(root, "cpufreq/scaling_max_freq") if (hertz := _number(path))]
        limits = {"max": max(most, default=None), "allowed_max": max(allowed, default=None)}
        return {"lowest": min(now), "highest": max(now), **limits, "from": "cpufreq"}
    said = [
        float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text(root / "proc/cpuinfo") or "", re.MULTILINE)
    ]
    if not said:
        return None
    return {"lowest": min(said), "highest": max(said), "max": None, "allowed_max": None, "from": "/proc/cpuinfo"}


def _turbo(root: Path) -> bool | None:
    cpu = root / "sys/devices/system/cpu"
    off, boost = _number(cpu / "intel_pstate/no_turbo"), _number(cpu / "cpufreq/boost")
    if off is not None:
        return off == 0
    return boost == 1 if boost is not None else None


def _temperatures_c(root: Path) -> dict[str, float] | None:
    """By sensor: thermal zones and hardware monitors; the highest where several have one name."""
    found: dict[str, float] = {}
    zones = ((text(zone / "type"), _number(zone / "temp")) for zone in root.glob("sys/class/thermal/thermal_zone*"))
    inputs = (
        (f"{text(sensor.parent / 'name') or sensor.parent.name} {_label(sensor)}", _number(sensor))
        for sensor in root.glob("sys/class/hwmon/hwmon*/temp*_input")
    )
    for name, thousandths in (*zones, *inputs):
        if name and thousandths is not None:
            found[name] = max(thousandths / 1e3, found.get(name, -math.inf))
    return dict(sorted(found.items())) or None


def _label(sensor: Path) -> str:
    number = sensor.name.removesuffix("_input")
    return text(sensor.with_name(f"{number}_label")) or number


def _throttle_count(root: Path) -> int | None:
    """How often cores and packages slowed down for their temperature since boot, summed over the CPUs."""
    counts = [
        times
        for name in ("core_throttle_count", "package_throttle_count")
        for path in _per_cpu(root, f"thermal_throttle/{name}")
        if (times := _number(path)) is not None
    ]
    return sum(counts) if counts else None


def _cgroups(root: Path) -> list[Path]:
    """Folders of this process's cgroup (version 2) and of those above it. In a container the path that the kernel tells
    may not exist; the top of what is mounted is the container's own then."""
    top = root / "sys/fs/cgroup"
    own = re.search(r"^0::/(.*)$", text(root / "proc/self/cgroup") or "", re.MULTILINE)
    folder = top / own[1] if own else top
    chain = [folder, *folder.parents]
    return [path for path in chain if path == top or top in path.parents]


def _cgroup_throttled(root: Path) -> int | None:
    """How often this container was stopped because it had used its CPU time, over its cgroups."""
    counts = [
        int(found[1])
        for folder in _cgroups(root)
        if (found := re.search(r"^nr_throttled (\d+)", text(folder / "cpu.stat") or "", re.MULTILINE))
    ]
    return sum(counts) if counts else None


# Judgement ------------------------------------------------------------------------------------------------------------


def disturbance(
    windows: Sequence[Window],
    cpus: int,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> list[str]:
    """Why a run counts as disturbed, in sentences; empty where nothing was seen. `cpus`: how many are online; `before`
    and `after`: `facts()` at the start and at the end.

    Disturbed is: steal above `STEAL_SHARE` of the CPU time asked for in the windows (used by anyone, or stolen); other
    processes above `OTHER_SHARE` of all CPUs' time; any throttling for temperature, or of the container, between the
    facts. Shares count only beyond what ticks can blur, twice the square root of ticks × windows × CPUs, so that
    a few short windows of a quiet machine are not called disturbed."""
    reasons = []
    stolen = [w for w in windows if w.steal_s is not None]
    shared = [w for w in windows if w.other_cpu_s is not None]
    steal = sum(w.steal_s or 0.0 for w in stolen)
    asked = steal + sum(w.cpu_s + (w.other_cpu_s or 0.0) for w in stolen)
    if steal > STEAL_SHARE * asked + _blur_s(stolen, cpus):
        reasons.append(f"the hypervisor took {100 * steal / asked:.0f} % of the CPU time asked for (steal)")
    other, whole = sum(w.other_cpu_s or 0.0 for w in shared), cpus * sum(w.wall_s for w in shared)
    if other > OTHER_SHARE * whole + _blur_s(shared, cpus):
        reasons.append(f"other processes used {100 * other / whole:.0f} % of the machine during the windows")
    if _rose(before, after, "throttle_count"):
        reasons.append("the processor slowed down for its temperature (throttling) during the run")
    if _rose(before, after, "cgroup_throttled"):
        reasons.append("the container used up its CPU limit and was stopped during the run")
    return reasons


def _blur_s(windows: Sequence[Window], cpus: int) -> float:
    return 2 * TICK_S * math.sqrt(len(windows) * cpus)


def _rose(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, key: str) -> bool:
    first, last = (before or {}).get(key), (after or {}).get(key)
    return first is not None and last is not None and last > first
