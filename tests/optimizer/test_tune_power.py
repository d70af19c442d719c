"""The search for a GPU's power limit and clock on a scripted card: no hardware here has one."""

from __future__ import annotations

from typing import Any

from perwatt.contract import Meter, OperatingPoint
from perwatt.errors import TargetError
from perwatt.measurement import Reading, Window
from perwatt.measuring import Conductor
from perwatt.tune import Allowed
from perwatt.tune_power import tune_power


class ScriptedCard:
    """A card whose throughput falls more slowly than its power. It is its own meter, and what sets its power."""

    def __init__(self, refuses: tuple[float, ...] = ()) -> None:
        self.limit: float | None = None
        self.clock: int | None = None
        self.refuses, self.applied = refuses, []

    def apply(self, power_limit_w: float | None = None, clock_mhz: int | None = None) -> None:
        if power_limit_w in self.refuses:
            raise TargetError(f"the driver does not take {power_limit_w:g} W")
        self.applied.append((power_limit_w, clock_mhz))
        self.limit, self.clock = power_limit_w, clock_mhz

    def choices(self) -> dict[str, tuple[float, ...]]:
        return {"power_limit_w": (300.0, 200.0, 100.0), "clock_mhz": (1200,)}

    def power_and_rate(self) -> tuple[float, float]:
        watts = self.limit or 400.0
        rate = {400.0: 1000.0, 300.0: 980.0, 200.0: 800.0, 100.0: 200.0}[watts]
        return (watts * 0.9, rate * 0.97) if self.clock else (watts, rate)


class CardMeter(Meter):
    """Counts what the card draws."""

    method, boundary, refresh_s = "counter", "device", 0.001

    def __init__(self, card: ScriptedCard) -> None:
        self.card = card

    def start(self) -> None:
        """Nothing to start."""

    def stop(self, window: Window) -> Reading:
        return Reading(self.card.power_and_rate()[0] * window.wall_s, refreshes=1000)

    def describe(self) -> dict[str, Any]:
        return {}


class CardSide:
    """Load on the card."""

    def __init__(self, card: ScriptedCard) -> None:
        self.card, self.facts = card, {"operating_point": OperatingPoint("offline", 8).to_json()}

    def held_window(self, seconds: float) -> Window:
        rate = self.card.power_and_rate()[1]
        return Window(round(rate * 10), 10.0, 10.0, [])

    def latencies_ms(self) -> list[float]:
        return [8e3 / self.card.power_and_rate()[1]] * 10

    def settle(self) -> None:
        """Nothing runs."""


def search(card: ScriptedCard, allowed: Allowed = Allowed()) -> list[Any]:  # noqa: B008
    conductor = Conductor(CardMeter(card), device="gpu")
    conductor.power = card
    return tune_power(CardSide(card), OperatingPoint("offline", 8), card.choices(), conductor, allowed)  # type: ignore[arg-type]


def test_the_setting_with_the_fewest_joules_wins_on_a_scripted_card(monkeypatch) -> None:
    monkeypatch.setattr("perwatt.measuring.POWER_SETTLES_S", 0.0)
    best, *others = search(ScriptedCard())
    assert (best.point.power_limit_w, best.point.clock_mhz) == (200.0, 1200)
    assert best.facts["operating_point"]["power_limit_w"] == 200.0
    assert {t.point.power_limit_w for t in others} == {None, 300.0, 200.0, 100.0}
    joules = {t.point.power_limit_w: t.figures["energy_j_per_inference"] for t in others if t.point.clock_mhz is None}
    assert round(joules[200.0], 3) == 0.25 and round(joules[None], 3) == 0.4


def test_the_p99_allowed_holds_for_power_too_on_a_scripted_card(monkeypatch) -> None:
    monkeypatch.setattr("perwatt.measuring.POWER_SETTLES_S", 0.0)
    best, *others = search(ScriptedCard(), Allowed(p99_ms=9.0))
    assert best.point.power_limit_w == 300.0
    assert next(t for t in others if t.point.power_limit_w == 200.0).reason == "p99 latency is 10.00 ms of 9 ms allowed"


def test_a_limit_that_the_driver_refuses_is_told_and_the_others_are_tried_on_a_scripted_card(monkeypatch) -> None:
    monkeypatch.setattr("perwatt.measuring.POWER_SETTLES_S", 0.0)
    best, *others = search(ScriptedCard(refuses=(200.0,)))
    assert best.point.power_limit_w == 300.0
    assert next(t for t in others if t.point.power_limit_w == 200.0).reason == "the driver does not take 200 W"


def test_without_a_counter_of_joules_nothing_is_tried() -> None:
    card = ScriptedCard()
    point = OperatingPoint("offline", 8)
    [only] = tune_power(CardSide(card), point, card.choices(), Conductor(device="gpu"), Allowed())  # type: ignore[arg-type]
    assert only.point == point and not card.applied
