"""Finds a GPU's power limit and clock for a program: below its default limit a GPU often does nearly the same work for
much less.

Joules decide, counted by the GPU itself, so every window is long; the limits come first, then the clocks at the best
limit. What is slower may win here, because the user asked for it with `--allow-power-control`, but not beyond the p99
that the budget allows. The limit is a setting of the machine, not of the program: one process serves all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from perwatt.contract import OperatingPoint
from perwatt.errors import TargetError
from perwatt.measurement import Ratio
from perwatt.measuring import Conductor, figures, ratios
from perwatt.sides import Side
from perwatt.tune import Allowed, Trial

BLOCKS = 2
WORTH_IT = 0.98
"""Of the joules at the machine's own limit, what a setting must fall to."""


def tune_power(
    side: Side,
    point: OperatingPoint,
    choices: Mapping[str, Sequence[Any]],
    conductor: Conductor,
    allowed: Allowed,
    progress: Callable[[str], None] = lambda text: None,
    deadline: float | None = None,
) -> list[Trial]:
    """Every setting that was measured, best first; the first is `point` itself where nothing saves enough. `choices`:
    `power_limit_w` and `clock_mhz` → values worth trying. Nothing is tried where the meter counts no joules."""
    if conductor.counter_window_s is None:
        return [Trial(point, dict(side.facts))]
    best, trials = None, []
    for name in ("power_limit_w", "clock_mhz"):
        if best is not None and deadline is not None and time.monotonic() > deadline:
            break
        as_it_is, *found = _race(
            side, best.point if best else point, name, choices.get(name, ()), conductor, allowed, progress
        )
        if best is None:
            best = as_it_is
            trials.append(best)
        better = [trial for trial in found if not trial.reason and _joules(trial) < WORTH_IT]
        for trial in found:
            trial.ratios = onwards(best.ratios, trial.ratios)
        trials += found
        best = min(better, key=_joules, default=best)
    assert best is not None
    return [best, *(trial for trial in trials if trial is not best)]


def onwards(first: Mapping[str, Ratio], then: Mapping[str, Ratio]) -> dict[str, Ratio]:
    """Ratios to where `first` began, of what was measured against where it ended. Without intervals: the two were taken
    at different times."""
    if not first:
        return dict(then)
    values = {name: (first[name].value, ratio.value) for name, ratio in then.items()}
    return {name: Ratio(a * b if a is not None and b is not None else None) for name, (a, b) in values.items()}


def _race(
    side: Side, point: OperatingPoint, name: str, values: Sequence[Any], conductor: Conductor, allowed: Allowed,
    progress: Callable[[str], None],
) -> list[Trial]:  # fmt: skip
    """The point as it is, and with each of the values, interleaved; ratios are to the first."""
    points = [point, *(replace(point, **{name: value}) for value in values)]
    views = [_View(side, each) for each in points]
    refused: dict[int, str] = {}

    def give(view: Any) -> Any:
        progress(f"tuning: {view.point.words()}")
        return conductor.energy_window(view, 0.0)

    for number, view in enumerate(views):
        try:
            give(view)
        except TargetError as error:
            refused[number] = str(error)
        view.energy_windows.clear()
        view.windows.clear()
    racing = [[view] for number, view in enumerate(views) if number not in refused]
    for _ in range(BLOCKS):
        conductor.block(racing, give)  # type: ignore[arg-type]
    return [_trial(view, views[0], allowed, refused.get(number, "")) for number, view in enumerate(views)]


class _View:
    """One process as several sides, each at its own power."""

    def __init__(self, side: Side, point: OperatingPoint) -> None:
        self.side, self.point = side, point
        self.power = (point.power_limit_w, point.clock_mhz)
        self.windows: list[Any] = []
        self.energy_windows: list[Any] = []
        self.held_window, self.latencies_ms, self.settle = side.held_window, side.latencies_ms, side.settle


def _trial(view: _View, base: _View, allowed: Allowed, refused: str) -> Trial:
    facts = {**view.side.facts}
    facts["operating_point"] = {**facts.get("operating_point", {}), **view.point.to_json()}
    trial = Trial(view.point, facts, reason=refused, device="gpu")
    if refused or not view.energy_windows:
        return trial
    trial.figures = figures(view.energy_windows, view.energy_windows)
    view.windows, base.windows = view.energy_windows, base.energy_windows
    if view is not base:
        trial.ratios = ratios(view, base)  # type: ignore[arg-type]
    trial.reason = allowed.late_words(trial.figures["latency_p99_ms"])
    return trial


def _joules(trial: Trial) -> float:
    found = trial.ratios.get("energy_j_per_inference")
    return found.value if found is not None and found.value is not None else 1.0
