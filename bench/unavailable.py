"""The meter where there is none: every reading is None, and says why. Missing is None, never 0."""

from __future__ import annotations

from typing import Any

from perwatt.contract import Meter
from perwatt.measurement import Boundary, Method, Reading, Window


class Unavailable(Meter):
    """No energy, for `reason`."""

    method: Method = "unavailable"
    boundary: Boundary | None = None

    def __init__(self, reason: str = "no meter was asked for") -> None:
        self.reason = reason

    def start(self) -> None:
        """Nothing to start."""

    def stop(self, window: Window) -> Reading:
        return Reading(None, self.reason)

    def describe(self) -> dict[str, Any]:
        return {
            "method": self.method, "boundary": None, "how": self.reason,
            "source": None, "uncertainty": None, "refresh_s": None,
        }  # fmt: skip
