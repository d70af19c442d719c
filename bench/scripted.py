"""A meter for tests: it says what it was told to say, and needs no hardware and no clock."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from perwatt.contract import Meter
from perwatt.measurement import Boundary, Method, Reading, Window


class Scripted(Meter):
    """Gives `readings` one after the other, round and round (joules, None, or a whole `Reading`), or `watts` times the
    seconds of the window. Exactly one of the two. `started` counts the windows.

    Raises ValueError where none or both are given."""

    def __init__(
        self,
        readings: Sequence[float | Reading | None] | None = None,
        watts: float | None = None,
        *,
        method: Method = "counter",
        boundary: Boundary | None = "package",
        refresh_s: float | None = None,
        missing: Sequence[str] = (),
    ) -> None:
        if (watts is None) == (not readings):
            raise ValueError("a scripted meter wants readings or watts, and not both")
        self.method, self.boundary, self.refresh_s = method, boundary, refresh_s
        self.watts = watts
        self.started = 0
        self._missing = list(missing)
        self._readings = cycle(readings) if readings else None

    def missing(self) -> list[str]:
        return list(self._missing)

    def start(self) -> None:
        self.started += 1

    def stop(self, window: Window) -> Reading:
        if self._readings is None:
            assert self.watts is not None
            return Reading(self.watts * window.wall_s)
        value = next(self._readings)
        if isinstance(value, Reading):
            return value
        return Reading(value, None if value is not None else "the script says so")

    def describe(self) -> dict[str, Any]:
        return {
            "method": self.method, "boundary": self.boundary, "how": "a script", "source": "a test",
            "uncertainty": "none", "refresh_s": self.refresh_s,
        }  # fmt: skip
