"""A GPU's power limit and clocks as part of an operating point: set, measured at, and put back whatever happens.

Below its default limit a GPU does most of its work for less than most of its power, so the limit is often the cheapest
joule there is. It is also a setting of the machine that outlives the process and takes root. So nothing here runs unless
the user allows it (`--allow-power-control`), and what was found comes back at the end of the `with` block, in an exception
and after a crash too: before the first change a guard process (perwatt.bench.power_guard) is armed with the original values,
and they are written to disk. If the guard can't be armed nothing is changed.

    with PowerControl() as control:
        if not control.missing():
            control.apply(power_limit_w=250, clock_mhz=1410)
            ...

One run at a time: each GPU is locked, by its UUID, from the beginning of the block until it is put back.

Limits. NVML tells the power limit but not whether clocks are locked: what comes back is the driver's own choice of clocks,
and where NVML says that somebody else holds the clocks down they are left alone. Locks and records lie in the user's cache
folder: they don't reach across users and containers. Setting a limit again that it has already changes nothing; that is
how the permission is tried. Not for use by several threads at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from perwatt.bench.nvml import Gpu, open_gpus, words
from perwatt.bench.power_guard import PowerGuard, Record, boot_id, put_back, read_record, record_folder
from perwatt.errors import InputError, PerwattError, TargetError

LIMIT_SHARES = (1.0, 0.85, 0.7, 0.55)
"""Of the default limit. Below half of it most cards only wait."""

CLOCK_SHARES = (1.0, 0.875, 0.75, 0.625, 0.5)
"""Of the highest clock."""

NO_ROOT = "run as root; in a container also give it `--cap-add SYS_ADMIN`, or leave --allow-power-control out"
NO_FOLDER = "set XDG_CACHE_HOME to a folder that can be written"

ROUNDING_MW = 1000
"""How far a limit that is read back may lie from the one that was set."""


@dataclass(frozen=True)
class _Card:
    """One GPU as it was found; `path` is where its record belongs. `limits_mw`: least, most, default; None where the card
    lets nobody set its limit. `clocks_mhz` is empty, and `no_clocks` says why, where clocks are left alone."""

    gpu: Gpu
    uuid: str
    path: Path
    limit_mw: int
    limits_mw: tuple[int, int, int] | None
    clocks_mhz: tuple[int, ...]
    no_clocks: str

    def untouched(self) -> Record:
        return Record(self.uuid, self.gpu.label, str(self.path), boot_id=boot_id())


class PowerControl:
    """Power limit and clocks of the GPUs at `indices` (None: those of CUDA_VISIBLE_DEVICES, else the only one), all set
    alike.

    Entering it never fails: `missing` says why nothing can be set. `notes` are words for the user: what an earlier run
    had left, for one."""

    def __init__(self, indices: tuple[int, ...] | None = None) -> None:
        self.indices = indices
        self.notes: list[str] = []
        self._inside = False
        self._nvml: Any = None
        self._reasons: list[str] = []
        self._cards: list[_Card] = []
        self._locks: list[int] = []
        self._records: list[Record] = []
        self._guard: PowerGuard | None = None
        # What is set now, (milliwatts, MHz), None for what was found; unknown in the middle of a change.
        self._now: tuple[int | None, int | None] | None = (None, None)

    def __enter__(self) -> PowerControl:
        self._inside = True
        try:
            self._reasons = list(self._open())
        except BaseException:
            self._close()
            raise
        if self._reasons:
            self._close()
            self._inside = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.restore()
        except TargetError as failure:
            # The guard is still armed, and tries once more when it is let go.
            guard, self._guard = self._guard, None
            if guard is not None and guard.finish():
                if error is None:
                    raise
                error.add_note(str(failure))
        finally:
            self._close()

    def missing(self) -> list[str]:
        """Why nothing can be set here, each with what mends it; empty where it can. Outside of the `with` block it looks,
        and lets go of the GPUs again."""
        if self._inside:
            return list(self._reasons)
        with self:
            return list(self._reasons)

    def choices(self) -> dict[str, tuple[float, ...]]:
        """What is worth trying: `power_limit_w` in watts and `clock_mhz`, each from high to low. Never above the limit
        that was found: somebody may have had a reason for it. What can't be set is not in it."""
        if not self._inside:
            with self:
                return self.choices()
        found: dict[str, tuple[float, ...]] = {}
        if limits := self._limits_mw():
            least, _, default = limits
            most = min(card.limit_mw for card in self._cards)
            worth = {min(max(round(share * default, -3), least), most) for share in LIMIT_SHARES}
            found["power_limit_w"] = tuple(limit / 1e3 for limit in sorted(worth, reverse=True))
        if clocks := self._clocks_mhz():
            near = {min(clocks, key=lambda clock: abs(clock - share * max(clocks))) for share in CLOCK_SHARES}
            found["clock_mhz"] = tuple(sorted(near, reverse=True))
        return found

    def apply(self, power_limit_w: float | None = None, clock_mhz: int | None = None) -> None:
        """Set the power limit (watts) and lock the graphics clock (MHz, both ends of its range) of every GPU; None puts
        that one back. Raises InputError for what the cards don't take and TargetError where they refuse; then everything
        is as it was found."""
        if not self._inside:
            raise TargetError("power limit and clocks are set inside of `with PowerControl() as control:` only")
        if self._reasons:
            raise TargetError("; ".join(self._reasons))
        limit_mw = None if power_limit_w is None else round(power_limit_w * 1e3)
        self._check(limit_mw, clock_mhz)
        if (limit_mw, clock_mhz) == self._now:
            return
        try:
            self._arm(limit_mw, clock_mhz)
            self._now = None
            for card, record in zip(self._cards, self._records, strict=True):
                self._set(card, record, limit_mw, clock_mhz)
        except TargetError:
            self.restore()
            raise
        self._now = (limit_mw, clock_mhz)

    def restore(self) -> None:
        """Put everything back as it was found. Raises TargetError naming the commands that do it by hand."""
        if self._guard is None:
            return
        self._now = None
        failures = [failure for record in self._records for failure in put_back(self._nvml, record)]
        if failures:
            commands = " and ".join(filter(None, (record.by_hand() for record in self._records)))
            raise TargetError("; ".join(failures), fix=f"as root: {commands}")
        guard, self._guard, self._records = self._guard, None, []
        self._now = (None, None)
        guard.dismiss()

    def _open(self) -> Iterator[str]:
        """Find, lock and read the GPUs; yields reasons why nothing can be set."""
        self._now = (None, None)
        try:
            self._nvml, gpus = open_gpus(self.indices)
            folder = record_folder()
        except PerwattError as error:
            yield str(error)
            return
        if len(gpus) > 1 and self.indices is None and "CUDA_VISIBLE_DEVICES" not in os.environ:
            yield f"{len(gpus)} GPUs are visible, and some may be at work for others: name yours in CUDA_VISIBLE_DEVICES"
            return
        for gpu in gpus:
            try:
                self._cards.append(self._found(gpu, folder))
            except PerwattError as error:
                yield str(error)
            except self._nvml.NVMLError as error:
                yield f"{gpu.label} does not say what its power limit is ({error}): leave --allow-power-control out"
            except OSError as error:
                yield f"{folder} can't be used ({error}): {NO_FOLDER}"
        if len(self._cards) == len(gpus) and not self._limits_mw() and not self._clocks_mhz():
            why = "; ".join(sorted({card.no_clocks for card in self._cards if card.no_clocks}))
            yield f"these GPUs let nobody set their power limit{', and ' if why else ''}{why}: leave --allow-power-control out"

    def _found(self, gpu: Gpu, folder: Path) -> _Card:
        """Lock the GPU, put back what an earlier run left, and read it. Raises NVMLError, InputError and TargetError."""
        nvml, uuid = self._nvml, words(self._nvml.nvmlDeviceGetUUID(gpu.handle))
        self._locks.append(_lock(folder / f"{uuid}.lock", gpu.label))
        path = folder / f"{uuid}.json"
        left = read_record(path)
        if left is not None:
            self.notes.append(_recover(nvml, gpu, left))
        limit_mw, limits_mw = self._limit(gpu)
        clocks, no_clocks = _clocks(nvml, gpu)
        return _Card(gpu, uuid, path, limit_mw, limits_mw, clocks, no_clocks)

    def _limit(self, gpu: Gpu) -> tuple[int, tuple[int, int, int] | None]:
        """The limit now, and (least, most, default), None where nobody can set it. Raises TargetError without permission."""
        nvml = self._nvml
        try:
            limit_mw = int(nvml.nvmlDeviceGetPowerManagementLimit(gpu.handle))
            least, most = nvml.nvmlDeviceGetPowerManagementLimitConstraints(gpu.handle)
            default = nvml.nvmlDeviceGetPowerManagementDefaultLimit(gpu.handle)
            nvml.nvmlDeviceSetPowerManagementLimit(gpu.handle, limit_mw)
        except nvml.NVMLError_NotSupported:
            return 0, None
        except nvml.NVMLError_NoPermission as error:
            raise TargetError(
                f"the power limit of {gpu.label} can't be set by this user ({error})", fix=NO_ROOT
            ) from None
        return limit_mw, (int(least), int(most), int(default))

    def _limits_mw(self) -> tuple[int, int, int] | None:
        """(least, most, default) that every card takes; None where one takes none."""
        every = [card.limits_mw for card in self._cards if card.limits_mw is not None]
        if not every or len(every) < len(self._cards):
            return None
        least, most, default = max(x[0] for x in every), min(x[1] for x in every), min(x[2] for x in every)
        return (least, most, default) if least <= most else None

    def _clocks_mhz(self) -> list[int]:
        """The graphics clocks that every card has."""
        sets = [set(card.clocks_mhz) for card in self._cards]
        return sorted(set.intersection(*sets)) if sets else []

    def _check(self, limit_mw: int | None, clock_mhz: int | None) -> None:
        limits, clocks = self._limits_mw(), self._clocks_mhz()
        if limit_mw is not None:
            if limits is None:
                raise TargetError("these GPUs let nobody set their power limit", fix="leave power_limit_w out")
            if not limits[0] <= limit_mw <= limits[1]:
                raise InputError(
                    f"a power limit of {limit_mw / 1e3:g} W is outside of what the GPU takes",
                    fix=f"give one from {limits[0] / 1e3:g} to {limits[1] / 1e3:g} W",
                )
        if clock_mhz is not None:
            if not clocks:
                why = "; ".join(sorted({card.no_clocks for card in self._cards if card.no_clocks}))
                raise TargetError(why or "these GPUs have no clock in common", fix="leave clock_mhz out")
            if not clocks[0] <= clock_mhz <= clocks[-1]:
                raise InputError(
                    f"a clock of {clock_mhz} MHz is outside of what the GPU takes",
                    fix=f"give one from {clocks[0]} to {clocks[-1]} MHz",
                )

    def _arm(self, limit_mw: int | None, clock_mhz: int | None) -> None:
        """Before a change: the guard and the disk know what has to be put back. Raises TargetError."""
        before = self._records or [card.untouched() for card in self._cards]
        records = [_noting(record, card, limit_mw, clock_mhz) for record, card in zip(before, self._cards, strict=True)]
        guard = self._guard or PowerGuard(self._locks)
        try:
            guard.tell(records)
            for record in records:
                record.write()
        except BaseException as error:
            if self._guard is None:
                # Nothing was changed yet: putting back would only undo what somebody else has set.
                guard.dismiss()
                for record in records:
                    with contextlib.suppress(OSError):
                        Path(record.path).unlink()
            if isinstance(error, OSError):
                raise TargetError(f"what the GPU was found at can't be noted ({error})", fix=NO_FOLDER) from None
            raise
        self._guard, self._records = guard, records

    def _set(self, card: _Card, record: Record, limit_mw: int | None, clock_mhz: int | None) -> None:
        nvml, handle = self._nvml, card.gpu.handle
        try:
            if record.power_limit_mw is not None:
                wanted = record.power_limit_mw if limit_mw is None else limit_mw
                nvml.nvmlDeviceSetPowerManagementLimit(handle, wanted)
                is_now = nvml.nvmlDeviceGetPowerManagementLimit(handle)
                if abs(is_now - wanted) > ROUNDING_MW:
                    raise TargetError(
                        f"{card.gpu.label} took a power limit of {wanted / 1e3:g} W and stays at {is_now / 1e3:g} W"
                    )
            if clock_mhz is not None:
                nvml.nvmlDeviceSetGpuLockedClocks(handle, clock_mhz, clock_mhz)
            elif record.clocks_locked:
                nvml.nvmlDeviceResetGpuLockedClocks(handle)
        except nvml.NVMLError as error:
            what = " and ".join(
                ([] if limit_mw is None else [f"{limit_mw / 1e3:g} W"])
                + ([] if clock_mhz is None else [f"{clock_mhz} MHz"])
            )
            raise TargetError(f"{card.gpu.label} refuses {what or 'to be put back'} ({error})") from None

    def _close(self) -> None:
        """Let go of everything. A guard that is still armed puts everything back."""
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.finish()
        for lock in self._locks:
            os.close(lock)
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
        self._nvml, self._cards, self._locks, self._records, self._inside = None, [], [], [], False


def _lock(path: Path, label: str) -> int:
    """A lock on one GPU, gone with the processes that hold it. Raises TargetError where another run holds it, OSError."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode(errors="replace").strip()
        os.close(lock)
        raise TargetError(
            f"another perwatt run (process {holder or 'unknown'}) sets the power of {label}, or is putting it back",
            fix="wait until it is done",
        ) from None
    os.truncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _recover(nvml: Any, gpu: Gpu, left: Record) -> str:
    """Put back what a run that was cut off left, and say so. Raises TargetError where that fails, NVMLError."""
    if left.boot_id != boot_id():
        Path(left.path).unlink(missing_ok=True)
        return f"a run that was cut off had changed {gpu.label}; the machine was started anew since, which undid it"
    is_now = None if left.power_limit_mw is None else int(nvml.nvmlDeviceGetPowerManagementLimit(gpu.handle))
    mine = is_now is not None and any(abs(is_now - limit) <= ROUNDING_MW for limit in left.applied_mw)
    if failures := put_back(nvml, left if mine else replace(left, power_limit_mw=None)):
        raise TargetError(
            f"a run that was cut off had changed {gpu.label}, and it can't be put back: {'; '.join(failures)}",
            fix=f"{NO_ROOT}; by hand: {left.by_hand()}",
        )
    done = [f"its power limit is back at {(left.power_limit_mw or 0) / 1e3:g} W"] if mine else []
    if is_now is not None and not mine and is_now != left.power_limit_mw:
        done.append(f"somebody has set its power limit to {is_now / 1e3:g} W since, which stays")
    done += ["its clocks are the driver's again"] if left.clocks_locked else []
    return f"a run that was cut off had changed {gpu.label}: {' and '.join(done) or 'nothing of it was left'}"


def _noting(record: Record, card: _Card, limit_mw: int | None, clock_mhz: int | None) -> Record:
    """The record once these have been set."""
    if limit_mw is not None:
        applied = tuple(sorted({*record.applied_mw, limit_mw}))
        record = replace(record, power_limit_mw=card.limit_mw, applied_mw=applied)
    return replace(record, clocks_locked=True) if clock_mhz is not None else record


def _clocks(nvml: Any, gpu: Gpu) -> tuple[tuple[int, ...], str]:
    """The graphics clocks at the fastest memory clock; none, and why, where they are to be left alone."""
    with contextlib.suppress(nvml.NVMLError):  # An old driver does not say: then nobody is known to hold them.
        held = (
            nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu.handle)
            & nvml.nvmlClocksEventReasonApplicationsClocksSetting
        )
        if held:
            return (), f"somebody else holds the clocks of {gpu.label} down, and NVML does not say at what"
    try:
        memory_mhz = max(nvml.nvmlDeviceGetSupportedMemoryClocks(gpu.handle))
        clocks = tuple(int(clock) for clock in nvml.nvmlDeviceGetSupportedGraphicsClocks(gpu.handle, memory_mhz))
    except (nvml.NVMLError, ValueError) as error:
        return (), f"{gpu.label} does not say which clocks it has ({error})"
    return clocks, "" if clocks else f"{gpu.label} has no clocks to choose from"
