"""`Backend`: what a target said of itself on the machine where it will run, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from perwatt.contract import Capabilities, OperatingPoint
from perwatt.errors import PerwattError
from perwatt.isolation import Worker
from perwatt.worker import capabilities_from_json


@dataclass(frozen=True)
class Backend:
    """A target that can be used. `alone`: no other one competes with it, so it needs no mention. `spare`: it is tried
    only where all others refuse the model. `joules_count`: the meter counts the joules of its own device, so that they
    decide; on CPUs CPU seconds do. `meter` is the one that can."""

    name: str
    device: Literal["cpu", "gpu"] = "cpu"
    capabilities: Capabilities = field(default_factory=Capabilities)
    versions: dict[str, str] = field(default_factory=dict)
    knobs: dict[str, list[Any]] = field(default_factory=dict)
    slow_to_lower: bool = False
    meter: str = "auto"
    alone: bool = True
    spare: bool = False
    joules_count: bool = False

    @property
    def rate_words(self) -> str:
        """What a gain is a gain of."""
        if self.device == "cpu":
            return "inferences per CPU second"
        return "inferences per joule" if self.joules_count else "inferences per second"

    @property
    def saved_words(self) -> str:
        """What a gain saves."""
        if self.device == "cpu":
            return "fewer CPU seconds"
        return "fewer joules" if self.joules_count else "less time"


ASK_TIMEOUT_S = 120.0
"""A backend that takes longer to say what it is hangs: the others are asked."""


def precision_refusal(offered: Sequence[str], precision: str | None) -> str | None:
    """Why a backend that offers these floating precisions can't do what is asked for; None where it can."""
    if precision in (None, *offered):
        return None
    return f"it calculates in {', '.join(offered)} here, and not in {precision}"


def ask(names: Sequence[str], point: OperatingPoint, checks: Worker) -> tuple[list[Backend], dict[str, list[str]]]:
    """The targets among `names` that can be used at `point`, and why the others can't. One that crashes when it is asked
    is one that can't."""
    usable: list[Backend] = []
    missing: dict[str, list[str]] = {}
    for name in names:
        try:
            facts = checks.call("target", timeout_s=ASK_TIMEOUT_S, name=name, point=asdict(point))
        except PerwattError as error:
            missing[name] = [str(error)]
            continue
        if facts["missing"]:
            missing[name] = facts["missing"]
            continue
        usable.append(
            Backend(
                name, facts["device"], capabilities_from_json(facts["capabilities"]), facts["versions"],
                facts["knobs"], facts["slow_to_lower"], facts["meter"], alone=len(names) == 1,
            )
        )  # fmt: skip
    return usable, missing
