"""RAPL: the energy counters of Intel and AMD processors, read through Linux's powercap tree.

    package-0            counted                                   core, uncore: inside their package, never added
      core, uncore       not counted                               dram: beside it, added where every package has it
      dram               counted where there                       psys: the whole platform, never added to a package
    psys                 instead of all others, on request         intel-rapl-mmio: the same package a second time

The figure is the whole package's, other programs and idle power included. A counter that does not advance is missing: a
virtual machine may show one that reads 0 for ever. The files are root's since 2020, because the counters leak what is
computed (CVE-2020-8694). Counters wrap round (after minutes under load on some processors): a thread that wakes up now
and then looks after windows longer than that.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perwatt.bench.sampling import Sampler, refresh_period
from perwatt.contract import Meter
from perwatt.measurement import Boundary, Method, Reading, Window

POWERCAP = Path("/sys/class/powercap")

Domain = Literal["package", "psys"]

PROBE_S = 0.25
PROBE_TICKS = 10

MAX_POWER_W = 1000.0
"""No package draws more; says how soon a counter can wrap round at the earliest."""

ZONE = re.compile(r"(?P<parent>(?P<control>[a-z]+-rapl(?:-[a-z]+)?):\d+)(?P<part>:\d+)?")

READABLE = (
    "run `sudo chmod a+r /sys/class/powercap/*/energy_uj`, or run as root; to keep it, a udev rule: "
    'SUBSYSTEM=="powercap", ACTION=="add", RUN+="/bin/chmod a+r /sys%p/energy_uj"'
)


@dataclass(frozen=True)
class Zone:
    """One counter of the tree. `package` is the name of the package that it belongs to, or its own at the top level."""

    path: Path
    name: str
    package: str
    range_uj: int | None

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.name if self.name == self.package else f"{self.package} {self.name}"


def read_counter(path: Path) -> int:
    """Microjoules from an `energy_uj` file. Raises OSError and ValueError."""
    return int(path.read_text())


def find_zones(root: Path) -> list[Zone]:
    """The counters under `root`, those of the processor's own registers before their memory-mapped doubles."""
    try:
        entries = sorted(root.iterdir(), key=lambda entry: ("-mmio" in entry.name, entry.name))
    except OSError:
        return []
    matches = [(entry, match) for entry in entries if (match := ZONE.fullmatch(entry.name))]
    return [
        Zone(entry, _text(entry / "name") or "", _text(root / match["parent"] / "name") or "", _range_uj(entry))
        for entry, match in matches
        if _is_there(entry / "energy_uj")
    ]


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


class Rapl(Meter):
    """Package energy, with DRAM where every package has it; `domain="psys"` reads the platform's counter instead.

    `root` is the powercap tree; `read` gives the microjoules of an `energy_uj` file."""

    method: Method = "counter"
    boundary: Boundary | None = "package"

    def __init__(
        self, root: Path = POWERCAP, domain: Domain = "package", read: Callable[[Path], int] = read_counter
    ) -> None:
        self.root, self.domain = root, domain
        self._read = read
        self._zones = find_zones(root)
        self._counted: list[Zone] = []
        self._notes: list[str] = []
        self._reasons: list[str] | None = None
        self._failure: str | None = "the meter was not started"
        self._sampler: Sampler | None = None
        self._last_uj: dict[Zone, int] = {}
        self._energy_uj: dict[Zone, int] = {}
        self._began = self._cpu_s = 0.0
        if domain == "psys":
            self.boundary = "host"

    @property
    def present(self) -> bool:
        """Whether this machine shows counters at all, usable or not."""
        return bool(self._zones)

    def missing(self) -> list[str]:
        if self._reasons is None:
            self._reasons = list(self._choose())
        return list(self._reasons)

    def start(self) -> None:
        self.close()
        reasons = self.missing()
        self._failure = "; ".join(reasons) or None
        if reasons:
            return
        cpu, self._began = time.thread_time(), time.monotonic()
        self._last_uj, self._energy_uj = {}, dict.fromkeys(self._counted, 0)
        self._take()
        self._sampler = Sampler(self._take, self._interval_s())
        self._cpu_s = time.thread_time() - cpu

    def stop(self, window: Window) -> Reading:
        cpu = time.thread_time()
        elapsed_s = time.monotonic() - self._began
        if self._sampler is not None:
            self._cpu_s += self._sampler.stop()
            self._take()
            self._sampler = None
        failure, self._failure = self._failure, "the meter was not started"
        if failure:
            return Reading(None, failure)
        still = [zone.label for zone, energy in self._energy_uj.items() if energy <= 0]
        if still:
            return Reading(None, f"RAPL's {', '.join(still)} counter did not advance in {elapsed_s:.3g} s")
        moved = int(elapsed_s / self.refresh_s) if self.refresh_s else None
        cost = self._cpu_s + time.thread_time() - cpu
        return Reading(sum(self._energy_uj.values()) / 1e6, None, moved, cost)

    def describe(self) -> dict[str, Any]:
        reasons = self.missing()
        counted = " + ".join(zone.label for zone in self._counted)
        extra = "; ".join(self._notes)
        how = f"RAPL energy counters: {counted}" + (f" ({extra})" if extra else "")
        return {
            "method": self.method, "boundary": self.boundary, "how": "; ".join(reasons) or how,
            "source": f"Linux powercap, {self.root}",
            "uncertainty": "measured, not modelled, since Haswell (Hackenberg et al. 2015); DRAM within about 20 % "
            "(Desrochers et al. 2016); other programs on the package are included",
            "refresh_s": self.refresh_s,
        }  # fmt: skip

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None

    def _choose(self) -> Iterator[str]:
        """Settle what is counted; yields reasons why it can't be."""
        if not self._zones:
            yield (
                f"no RAPL counters in {self.root}: a virtual machine or container without them, or the kernel module is "
                "not loaded (`sudo modprobe intel_rapl_msr`)"
            )
            return
        packages = self._doubles("psys" if self.domain == "psys" else "package")
        if not packages:
            yield f"no {self.domain} counter among {', '.join(sorted({zone.label for zone in self._zones}))}"
            return
        periods = []
        for doubles in packages.values():
            zone, period, trouble = self._usable(doubles)
            if zone is None or period is None:
                yield trouble
            else:
                self._counted.append(zone)
                periods.append(period)
        if self.domain == "package" and len(self._counted) == len(packages):
            periods += self._add_dram()
            self._note_psys()
        self.refresh_s = max(periods, default=None)

    def _doubles(self, kind: str) -> dict[str, list[Zone]]:
        """Top-level zones by name, doubles of one name together. Of several `psys` the first: they overlap."""
        found: dict[str, list[Zone]] = {}
        for zone in self._zones:
            if zone.name == zone.package and zone.name.startswith(kind):
                found.setdefault(zone.name, []).append(zone)
        return dict(sorted(found.items())[:1]) if kind == "psys" else found

    def _add_dram(self) -> list[float]:
        """Count DRAM beside the packages where every package has it; returns its refresh periods."""
        drams = [
            [zone for zone in self._zones if zone.name == "dram" and zone.package == package.name]
            for package in self._counted
        ]
        if not any(drams):
            return []
        found = [self._usable(doubles) for doubles in drams]
        zones = [zone for zone, _, _ in found if zone is not None]
        if len(zones) < len(self._counted):
            trouble = next(trouble for zone, _, trouble in found if zone is None)
            self._notes.append(f"dram not added: {trouble}")
            return []
        self._counted += zones
        self.boundary = "package+dram"
        return [period for _, period, _ in found if period is not None]

    def _note_psys(self) -> None:
        if self._doubles("psys"):
            self._notes.append("psys, the whole platform, is there too and not added: choose it with rapl:psys")

    def _usable(self, doubles: list[Zone]) -> tuple[Zone | None, float | None, str]:
        """The first of several counters of one thing that can be read and advances, its refresh period, or the trouble."""
        troubles = []
        for zone in doubles:
            file = zone.path / "energy_uj"
            try:
                # Polling keeps a core busy, so that a counter that works has something to count.
                period = refresh_period(lambda file=file: self._read(file), PROBE_S, PROBE_TICKS)  # type: ignore[misc]
            except PermissionError:
                troubles.append(f"{file} is not readable (CVE-2020-8694 made it root's): {READABLE}")
            except (OSError, ValueError) as error:
                troubles.append(f"{file} can't be read: {error}")
            else:
                if period is not None:
                    return zone, period, ""
                troubles.append(
                    f"RAPL's {zone.label} counter does not advance ({file}): this is often so on a virtual machine"
                )
        return None, None, troubles[0] if troubles else "not every package has one"

    def _interval_s(self) -> float:
        """Four looks within the shortest time in which a counter can wrap round."""
        ranges = [zone.range_uj for zone in self._counted if zone.range_uj]
        return min(60.0, max(0.001, min(ranges, default=60e9) / 1e6 / MAX_POWER_W / 4))

    def _take(self) -> None:
        """Add to each zone what its counter moved by since the last look."""
        for zone in self._counted:
            try:
                now = self._read(zone.path / "energy_uj")
            except (OSError, ValueError) as error:
                self._failure = self._failure or f"RAPL's {zone.label} counter can't be read any more: {error}"
                continue
            moved = now - self._last_uj.get(zone, now)
            if moved < 0:
                if not zone.range_uj:
                    self._failure = (
                        self._failure or f"RAPL's {zone.label} counter wrapped round, and its range is unknown"
                    )
                moved += zone.range_uj or 0
            self._last_uj[zone] = now
            self._energy_uj[zone] += moved


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _range_uj(entry: Path) -> int | None:
    text = _text(entry / "max_energy_range_uj")
    return int(text) if text and text.isdigit() else None
