"""NVML: the energy of NVIDIA GPUs, boards and their memory included, by the driver's own sensors.

First choice is the energy counter (Volta and later). It moves every 20 to 100 ms, so its refresh period is measured, a
window begins at a tick, and its end is interpolated between the two ticks around it. Second choice is the power that the
driver reports, sampled by a thread and integrated by trapezoids; on Ampere and later (but not GA100) that power is an
average over the last second, so short windows are smeared. Several GPUs are added up; as they tick at different moments,
up to one refresh of idle power of the earlier ones comes into a window.

With no indices given the GPUs of CUDA_VISIBLE_DEVICES count, else all. NVML numbers GPUs by PCI bus; CUDA does so too
only with CUDA_DEVICE_ORDER=PCI_BUS_ID, or where all GPUs are alike. A GPU split by MIG has counters for the whole board
only, and is refused.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from perwatt.bench.sampling import Sampler, changes, integrate, refresh_period
from perwatt.contract import Meter
from perwatt.errors import TargetError
from perwatt.measurement import Boundary, Method, Reading, Window

Source = Literal["auto", "counter", "power"]

PROBE_S = 1.0
PROBE_TICKS = 5
POLL_S = 0.001
POWER_INTERVAL_S = 0.02

AVERAGING_S = 1.0
"""Over how long the driver averages the power that it reports, at most (NVML's documentation of GetPowerUsage)."""

_WHOLE_BOARD = "its counters and limits are those of the whole board: use an external meter, and leave the limits alone"


@dataclass(frozen=True)
class Gpu:
    """One GPU as NVML knows it."""

    label: str
    handle: Any


class Nvml(Meter):
    """The energy of the GPUs at `indices`. `source` settles which sensor is read; "auto" takes the better one there is."""

    method: Method = "counter"
    boundary: Boundary | None = "device"

    def __init__(self, indices: tuple[int, ...] | None = None, source: Source = "auto") -> None:
        self.indices, self.source = indices, source
        self._nvml: Any = None
        self._gpus: list[Gpu] = []
        self._driver = ""
        self._reasons: list[str] | None = None
        self._by_power = False
        self._second_choice = ""
        self._failure: str | None = "the meter was not started"
        self._began = self._cpu_s = 0.0
        self._first_mj: list[int] = []
        self._watts: list[tuple[float, float]] = []
        self._sampler: Sampler | None = None

    def missing(self) -> list[str]:
        if self._reasons is None:
            self._reasons = list(self._open())
            if self._reasons:
                self.close()
        return list(self._reasons)

    def start(self) -> None:
        self._end_sampler()
        reasons = self.missing()
        self._failure = "; ".join(reasons) or None
        if reasons:
            return
        cpu = time.thread_time()
        if self._by_power:
            self._watts = []
            self._note_power()
            self._sampler = Sampler(self._note_power, POWER_INTERVAL_S)
        else:
            # A window that begins at a tick leaves nothing to guess at its start.
            self._first_mj = [energy for energy, _ in self._next_ticks()]
        self._began = time.monotonic()
        self._cpu_s = time.thread_time() - cpu

    def stop(self, window: Window) -> Reading:
        cpu, end = time.thread_time(), time.monotonic()
        if self._by_power:
            self._end_sampler()
            self._note_power()
        reading = Reading(None, self._failure) if self._failure else self._read(end)
        reading = Reading(None, self._failure) if self._failure else reading
        self._failure = "the meter was not started"
        cost = self._cpu_s + time.thread_time() - cpu
        return Reading(reading.energy_j, reading.reason, reading.refreshes, cost)

    def describe(self) -> dict[str, Any]:
        reasons = self.missing()
        names = " + ".join(gpu.label for gpu in self._gpus)
        if self._by_power:
            how = f"driver-reported power of {names}, every {POWER_INTERVAL_S * 1e3:.0f} ms, by trapezoids"
            how += "; an average over 1 s on Ampere and later (not GA100), instantaneous before"
            how += f"; second choice, because {self._second_choice}" if self._second_choice else ""
        else:
            how = f"NVML energy counter of {names}"
        return {
            "method": self.method, "boundary": self.boundary, "how": "; ".join(reasons) or how,
            "source": f"NVML, driver {self._driver}" if self._driver else "NVML",
            "uncertainty": "NVIDIA states 5 % for the power readings of Fermi and Kepler and nothing for later GPUs; more where "
            "load comes in bursts: on A100 and H100 the sensor looks a quarter of the time (Yang et al. 2023, arXiv:2312.02741)",
            "refresh_s": self.refresh_s,
        }  # fmt: skip

    def close(self) -> None:
        self._end_sampler()
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
            self._nvml = None
            self._gpus = []

    def _open(self) -> Iterator[str]:
        """Find the GPUs and settle which sensor is read; yields reasons why that can't be done."""
        try:
            self._nvml, self._gpus = open_gpus(self.indices)
        except TargetError as error:
            yield error.message
            return
        with contextlib.suppress(self._nvml.NVMLError):
            self._driver = words(self._nvml.nvmlSystemGetDriverVersion())
        yield from self._settle()

    def _settle(self) -> Iterator[str]:
        no_counter = "the counter was not asked for" if self.source == "power" else self._no_counter()
        if not no_counter:
            return
        if self.source == "counter":
            yield no_counter
            return
        no_power = self._no_power()
        if no_power:
            yield no_counter
            yield no_power
            return
        self._by_power = True
        self._second_choice = "" if self.source == "power" else no_counter
        self.refresh_s = AVERAGING_S

    def _no_counter(self) -> str | None:
        """Why the energy counters can't be used; measures how often they move on the way."""
        periods = []
        for gpu in self._gpus:
            try:
                period = refresh_period(lambda gpu=gpu: self._energy_mj(gpu), PROBE_S, PROBE_TICKS, POLL_S)  # type: ignore[misc]
            except self._nvml.NVMLError as error:
                return f"{gpu.label} has no energy counter ({error}; it takes Volta or later)"
            if period is None:
                return f"the energy counter of {gpu.label} did not advance in {PROBE_S:g} s"
            periods.append(period)
        self.refresh_s = max(periods)
        return None

    def _no_power(self) -> str | None:
        """Why the power that the driver reports can't be used."""
        for gpu in self._gpus:
            try:
                milliwatts = self._nvml.nvmlDeviceGetPowerUsage(gpu.handle)
            except self._nvml.NVMLError as error:
                return f"{gpu.label} reports no power ({error})"
            if milliwatts <= 0:
                return f"{gpu.label} reports a power of 0 W"
        return None

    def _energy_mj(self, gpu: Gpu) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle))

    def _energies_mj(self) -> list[int]:
        """Every GPU's counter; none of them, and the failure noted, where one can't be read."""
        try:
            return [self._energy_mj(gpu) for gpu in self._gpus]
        except self._nvml.NVMLError as error:
            self._failure = self._failure or f"NVML stopped answering: {error}"
            return []

    def _next_ticks(self) -> list[tuple[int, float | None]]:
        """(millijoules, moment) of each GPU's next tick. After one and a half periods those that did not tick are given
        as they stand, with no moment."""
        before = self._energies_mj()
        ticks: list[tuple[int, float | None]] = [(energy, None) for energy in before]
        deadline = time.monotonic() + 1.5 * (self.refresh_s or 0.0)
        while any(moment is None for _, moment in ticks) and time.monotonic() < deadline:
            time.sleep(POLL_S)
            for place, energy in enumerate(self._energies_mj()):
                if ticks[place][1] is None and energy != before[place]:
                    ticks[place] = (energy, time.monotonic())
        return ticks

    def _read(self, end: float) -> Reading:
        return self._read_power(end) if self._by_power else self._read_counter(end)

    def _read_counter(self, end: float) -> Reading:
        last_mj = self._energies_mj()
        if len(last_mj) != len(self._first_mj):
            return Reading(None, self._failure)
        elapsed_s = end - self._began
        for gpu, first, last in zip(self._gpus, self._first_mj, last_mj, strict=True):
            if last < first:
                return Reading(None, f"the energy counter of {gpu.label} ran backwards: was the driver reset?")
            if last == first:
                why = f"did not advance in {elapsed_s:.3g} s; it moves every {self.refresh_s or 0:.3g} s"
                return Reading(None, f"the energy counter of {gpu.label} {why}")
        ticks = self._next_ticks()
        if len(ticks) != len(last_mj):
            return Reading(None, self._failure)
        energy_mj = 0.0
        period = self.refresh_s or POLL_S
        for first, last, (after, moment) in zip(self._first_mj, last_mj, ticks, strict=True):
            # The end of the window lies between the last tick and the next: take that share of the step between them.
            share = 0.0 if moment is None else min(1.0, max(0.0, 1 - (moment - end) / period))
            energy_mj += last - first + share * (after - last)
        return Reading(energy_mj / 1e3, None, round(elapsed_s / period))

    def _note_power(self) -> None:
        try:
            milliwatts = sum(self._nvml.nvmlDeviceGetPowerUsage(gpu.handle) for gpu in self._gpus)
        except self._nvml.NVMLError as error:
            self._failure = self._failure or f"NVML stopped answering: {error}"
        else:
            self._watts.append((time.monotonic(), milliwatts / 1e3))

    def _read_power(self, end: float) -> Reading:
        energy_j = integrate(self._watts, self._began, end)
        if not energy_j:
            return Reading(None, "the driver reported no power in the window")
        return Reading(energy_j, None, changes(self._watts, self._began, end))

    def _end_sampler(self) -> None:
        if self._sampler is not None:
            self._cpu_s += self._sampler.stop()
            self._sampler = None


def open_gpus(indices: tuple[int, ...] | None) -> tuple[Any, list[Gpu]]:
    """The bindings of NVML, started, and the GPUs at `indices` (None: those of CUDA_VISIBLE_DEVICES, else all). Who
    opens them ends with `nvmlShutdown`. Raises TargetError that says why they can't be had; NVML is shut down then."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise TargetError("the package nvidia-ml-py is not installed: `pip install nvidia-ml-py`") from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise TargetError(
            f"NVML does not start ({error}): install the NVIDIA driver; in a container, give it the GPUs (`--gpus all`)"
        ) from None
    try:
        return nvml, _whole_gpus(nvml, indices)
    except BaseException:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()
        raise


def _whole_gpus(nvml: Any, indices: tuple[int, ...] | None) -> list[Gpu]:
    try:
        gpus = [
            Gpu(f"GPU {name} ({words(nvml.nvmlDeviceGetName(handle))})", handle)
            for name, handle in _handles(nvml, indices)
        ]
    except nvml.NVMLError as error:
        raise TargetError(f"NVML finds no such GPU ({error}); `nvidia-smi -L` lists them") from None
    if not gpus:
        raise TargetError("no NVIDIA GPU is visible; `nvidia-smi -L` lists them")
    if split := [gpu.label for gpu in gpus if _is_split(nvml, gpu)]:
        raise TargetError(f"{', '.join(split)} is split by MIG, and {_WHOLE_BOARD}")
    return gpus


def _handles(nvml: Any, indices: tuple[int, ...] | None) -> Iterator[tuple[str, Any]]:
    """(number or name, NVML handle) of each GPU that counts. Raises NVMLError, and TargetError for a name that is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if indices is not None:
        names = [str(index) for index in indices]
    elif visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
    else:
        names = [str(index) for index in range(nvml.nvmlDeviceGetCount())]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise TargetError(f"GPU {repeated[0]} is named twice")
    for name in names:
        if name.startswith("MIG-"):
            raise TargetError(f"{name} is a slice of a GPU, and {_WHOLE_BOARD}")
        if name == "-1":
            return
        by = nvml.nvmlDeviceGetHandleByIndex if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID
        yield name, by(int(name) if name.isdigit() else name)


def _is_split(nvml: Any, gpu: Gpu) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(gpu.handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    except nvml.NVMLError:
        return False


def words(text: str | bytes) -> str:
    """Older bindings answer in bytes."""
    return text.decode() if isinstance(text, bytes) else text
