"""What a worker on another machine is asked besides its program: that machine's facts, and its meter.

On this machine the conductor holds the meter itself. There it must stand beside the load, and has a worker of its own.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any, Literal

from perwatt.bench import fingerprint, machine, probe
from perwatt.bench.meters import open_meter
from perwatt.bench.modelled import Modelled
from perwatt.contract import Meter
from perwatt.errors import BackendError
from perwatt.measurement import Window


def this_machine() -> dict[str, Any]:
    """What this machine is and in what state now: {"facts", "fingerprint", "cpus", "probe_pays"}, as
    `bench.machine.facts`, `bench.fingerprint.fingerprint`, `os.cpu_count` and `bench.probe.pays` say."""
    return {
        "facts": machine.facts(),
        "fingerprint": fingerprint.fingerprint(),
        "cpus": os.cpu_count() or 1,
        "probe_pays": probe.pays(),
    }


class MeterOperations:
    """Operations of `worker.Session`."""

    meter: Meter | None = None

    def machine(self) -> dict[str, Any]:
        """What `this_machine` says there."""
        return this_machine()

    def meter_open(self, choice: str, device: Literal["cpu", "gpu"]) -> dict[str, Any]:
        """Open the meter for `choice`, as `bench.meters.open_meter` does, in the place of the last one. Where that is a
        model of the machine, "model" has what it is made from."""
        self.meter_close()
        self.meter, notes = open_meter(choice, device)
        model = None
        if isinstance(self.meter, Modelled):
            model = {
                "processor": self.meter.processor and asdict(self.meter.processor),
                "size": asdict(self.meter.size),
            }
        return {"notes": notes, "model": model, "how": self.meter.describe()["how"], **self._of_meter()}

    def meter_start(self) -> dict[str, Any]:
        """A window begins."""
        self._opened().start()
        return {}

    def meter_stop(self, window: dict[str, Any]) -> dict[str, Any]:
        """The window is over: {"reading"}, and what of the meter may have become known meanwhile."""
        reading = self._opened().stop(Window(**window))
        return {"reading": asdict(reading), **self._of_meter()}

    def meter_describe(self) -> dict[str, Any]:
        """How the joules are come by."""
        return self._opened().describe()

    def meter_close(self) -> dict[str, Any]:
        """Let go of the meter."""
        if self.meter is not None:
            self.meter.close()
            self.meter = None
        return {}

    def _of_meter(self) -> dict[str, Any]:
        meter = self._opened()
        return {
            "method": meter.method, "boundary": meter.boundary, "refresh_s": meter.refresh_s,
        }  # fmt: skip

    def _opened(self) -> Meter:
        if self.meter is None:
            raise BackendError("no meter is open in this worker")
        return self.meter
