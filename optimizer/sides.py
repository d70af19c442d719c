"""`Side`: one program in one worker process, with the windows of load that it was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perwatt.artifact import Artifact
from perwatt.contract import OperatingPoint
from perwatt.isolation import Worker
from perwatt.measurement import Window

CALL_TIMEOUT_S = 600.0
"""A backend that takes longer for a few calls hangs, or is of no use."""
OPEN_TIMEOUT_S = 900.0
"""The same for compiling a model; a search for kernels takes minutes."""


class Side:
    """One program in one worker. `power` is the power limit in W and the clock in MHz of the GPU that it is measured at,
    None being what they were. `windows` are short ones, for time; `energy_windows` those long enough for a counter
    (empty where the meter needs none, and then every window has its energy)."""

    def __init__(self, label: str, worker: Worker, load: Callable[[], dict[str, Any]] = dict) -> None:
        self.label = label
        self.worker = worker
        self.facts: dict[str, Any] = {}
        self.windows: list[Window] = []
        self.energy_windows: list[Window] = []
        self.peak_memory_bytes: int | None = None
        self.warm_up: dict[str, Any] = {}
        self.power: tuple[float | None, int | None] = (None, None)
        self._prepared: Path | None = None
        self._load = load

    @classmethod
    def lowered(
        cls,
        label: str,
        target: str,
        artifact: Artifact,
        point: OperatingPoint,
        folder: Path,
        worker: Worker | None = None,
    ) -> Side:
        """Lower `artifact` in a worker of its own, or in `worker`, whose last program makes room for it."""
        model = str(artifact.file(folder))
        side = cls.to_open(label, "open", worker, target=target, model=model, point=asdict(point))
        side.power = (point.power_limit_w, point.clock_mhz)
        try:
            side.load()
        except BaseException:
            side.close()
            raise
        return side

    @classmethod
    def eager(cls, exported: Path, artifact: Artifact, point: OperatingPoint, folder: Path) -> Side:
        """Run torch eager in a worker; `load()` takes a while, and may be called meanwhile, in another thread."""
        worker = Worker("torch eager")
        worker.start()
        model = str(artifact.file(folder))
        return cls(
            "torch eager",
            worker,
            lambda: worker.call("open_eager", exported=str(exported), model=model, point=asdict(point)),
        )

    @classmethod
    def to_open(cls, label: str, operation: str, worker: Worker | None = None, **parameters: Any) -> Side:
        """A side whose worker is started and whose program `load()` opens, in whatever thread, by the worker's
        `operation`: open (an artifact), load (what a bundle holds) or open_file (a file of the backend's own)."""
        chosen = worker or Worker(label)
        chosen.start()
        return cls(label, chosen, lambda: chosen.call(operation, timeout_s=OPEN_TIMEOUT_S, **parameters))

    def load(self) -> None:
        """Load the program into the worker, anew where the worker died."""
        self.facts = self._load()
        for name, value in zip(("power_limit_w", "clock_mhz"), self.power, strict=True):
            if value is not None:
                self.facts["operating_point"][name] = value
        self._prepared = None

    def prepare(self, samples: Path, warm_up_s: float, most_s: float | None = None) -> None:
        """Load the calls and warm up, until steady where `most_s` gives the time; a side that did so already is warm."""
        if self._prepared != samples:
            self.warm_up = self.worker.call(
                "prepare", timeout_s=CALL_TIMEOUT_S, samples=str(samples), warm_up_s=warm_up_s, most_s=most_s
            )
            self._prepared = samples

    def window(self, seconds: float) -> Window:
        """One window of load; the caller keeps it."""
        return Window(**self.worker.call("drive", timeout_s=CALL_TIMEOUT_S + 10 * seconds, seconds=seconds))

    def held_window(self, seconds: float) -> Window:
        """One window of load whose latencies are still with the process: see `latencies_ms`."""
        timeout_s = CALL_TIMEOUT_S + 10 * seconds
        return Window(**self.worker.call("drive", timeout_s=timeout_s, seconds=seconds, hold=True))

    def latencies_ms(self) -> list[float]:
        """The latencies of the last window that was held, in ms."""
        found: list[float] = self.worker.call("latencies")["latencies_ms"]
        return found

    def serve(self, arrivals_s: Sequence[float]) -> Window:
        """One window of requests that come by themselves, its latencies held; the caller keeps it."""
        timeout_s = CALL_TIMEOUT_S + 10 * (arrivals_s[-1] if arrivals_s else 0.0)
        return Window(**self.worker.call("serve", timeout_s=timeout_s, arrivals_s=list(arrivals_s)))

    def settle(self) -> None:
        """Wait until the process is idle."""
        self.worker.call("settle")

    def note_memory(self) -> int | None:
        """Keep and tell the highest resident memory of this side's process so far, in bytes: inference, before anything
        else is asked."""
        self.peak_memory_bytes = self.worker.call("memory")["peak_memory_bytes"]
        return self.peak_memory_bytes

    def saved_bytes(self, folder: Path) -> int:
        """Bytes of what this side deploys, saved into `folder`."""
        files = self.worker.call("save", folder=str(folder))["files"]
        return sum(Path(file).stat().st_size for file in files)

    def close(self) -> None:
        """End the worker."""
        self.worker.close()
