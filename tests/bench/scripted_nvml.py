"""A stand-in for the module pynvml, for machines without a GPU: scripted boards behind the names, arguments, units and
errors of the real bindings. The errors are the real bindings' own classes where they are installed."""

from __future__ import annotations

import time
import types
from dataclasses import dataclass, field

try:
    import pynvml as real
except ImportError:
    real = None


class ScriptedTime:
    """The module `time` for a test: sleeping moves the clock and takes no time."""

    thread_time = staticmethod(time.thread_time)

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Board:
    """One GPU: draws `watts`, its counter (in millijoules) moves every `period_s`, first `phase_s` after whole periods;
    what is in `refuses` it does not do."""

    name: str = "NVIDIA Scripted"
    watts: float = 200.0
    period_s: float = 0.05
    phase_s: float = 0.013
    start_mj: int = 5_000_000
    mig: int | None = None
    refuses: set[str] = field(default_factory=set)
    time: ScriptedTime = field(default_factory=ScriptedTime)
    asked: int = 0

    def energy_mj(self) -> int:
        ticks = int((self.time.monotonic() - 900.0 - self.phase_s) / self.period_s)
        return self.start_mj + round(ticks * self.period_s * self.watts * 1e3)


def errors() -> types.SimpleNamespace:
    """The error classes, and how the stand-in raises them by code."""
    if real is not None:
        return types.SimpleNamespace(base=real.NVMLError, of=lambda code: real.NVMLError(code))

    class NVMLError(Exception):
        """Only where the real bindings are not installed."""

    return types.SimpleNamespace(base=NVMLError, of=lambda code: NVMLError(str(code)))


NOT_SUPPORTED, LIBRARY_NOT_FOUND, GPU_IS_LOST, INVALID_ARGUMENT, NOT_FOUND = 3, 12, 15, 2, 6


class ScriptedNvml(types.ModuleType):
    """What `import pynvml` gives in a test."""

    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self, *boards: Board, driver: bool = True) -> None:
        super().__init__("pynvml")
        self.boards = list(boards)
        self.driver = driver
        self.time = ScriptedTime()
        for board in self.boards:
            board.time = self.time
        self.open = 0
        self._errors = errors()
        self.NVMLError = self._errors.base

    def _fail(self, code: int) -> None:
        raise self._errors.of(code)

    def _board(self, handle: Board, what: str) -> Board:
        if not self.open:
            self._fail(1)
        if "lost" in handle.refuses:
            self._fail(GPU_IS_LOST)
        if what in handle.refuses:
            self._fail(NOT_SUPPORTED)
        return handle

    def nvmlInit(self):
        if not self.driver:
            self._fail(LIBRARY_NOT_FOUND)
        self.open += 1

    def nvmlShutdown(self):
        if not self.open:
            self._fail(1)
        self.open -= 1

    def nvmlSystemGetDriverVersion(self):
        return "999.1"

    def nvmlDeviceGetCount(self):
        return len(self.boards)

    def nvmlDeviceGetHandleByIndex(self, index):
        if index >= len(self.boards):
            self._fail(INVALID_ARGUMENT)
        return self.boards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if not uuid.startswith("GPU-") or int(uuid[4:]) >= len(self.boards):
            self._fail(NOT_FOUND)
        return self.boards[int(uuid[4:])]

    def nvmlDeviceGetName(self, handle):
        return self._board(handle, "name").name

    def nvmlDeviceGetMigMode(self, handle):
        if handle.mig is None:
            self._fail(NOT_SUPPORTED)
        return [handle.mig, handle.mig]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._board(handle, "energy").energy_mj()

    def nvmlDeviceGetPowerUsage(self, handle):
        self._board(handle, "power").asked += 1
        return round(handle.watts * 1e3)
