"""Tunes a candidate's operating point: what may vary there, what earlier runs on such a machine found, and for how long.

What was found is kept under the user's cache folder, by the model's digest, the backend with its versions, the machine's
fingerprint and what was asked for. It is where the next search begins: it must win again, by measuring, against the
backend's own choice.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perwatt.bench import fingerprint
from perwatt.bundle import write_text
from perwatt.candidates import Candidate
from perwatt.contract import OperatingPoint
from perwatt.errors import InputError
from perwatt.measurement import Ratio
from perwatt.measuring import Effort
from perwatt.recipe import Budget
from perwatt.setup import Setup
from perwatt.sides import Side
from perwatt.tune import HEAT, Allowed, Front, Trial, Tuning, compare_with
from perwatt.tune_power import onwards, tune_power


@dataclass(frozen=True)
class TunePlan:
    """`fixed`: fields of the operating point that stay as they are. `max_s`: time for one search, `limited` where the user said
    so: joules of a GPU take longer to count. `memory_bytes`: what a program may hold."""

    fixed: frozenset[str] = frozenset()
    max_s: float = 60.0
    limited: bool = False
    memory_bytes: int | None = None
    cache: Path | None = None
    machine: dict[str, Any] = field(default_factory=dict)


def tuned(
    plan: TunePlan, setup: Setup, candidate: Candidate, budget: Budget, progress: Callable[[float, str], None]
) -> Front | None:
    """The front of a candidate's operating points; None where nothing may vary. Raises BackendError where the candidate
    does not run at its own point."""
    fixed = set(plan.fixed)
    if not isinstance(candidate.branch.artifact.signature.batch, str):
        fixed.add("batch")
    knobs = {name: values for name, values in candidate.backend.knobs.items() if name not in fixed}
    power = setup.conductor.power
    if power is None and not any(len(values) > 1 for values in knobs.values()):
        return None
    key = _key(plan, candidate, budget)
    tuning = Tuning(
        lambda point: setup.open("tuning", replace(candidate, point=point)),
        lambda side, effort: _prepare(side, setup.timing, effort),
        setup.conductor,
        allowed=Allowed(budget.p99_ms, plan.memory_bytes),
        deadline=time.monotonic() + plan.max_s,
        progress=lambda share, text: progress(0.5 + 0.1 * share, text),
    )
    best, known = _remembered(plan, key)
    front = tuning.run(candidate.point, knobs, best)
    if best is not None and front.best.point == best:
        _join(front, known)
    if front.complete:
        _remember(plan, key, front)
    if power is not None:
        deadline = None if not plan.limited else time.monotonic() + plan.max_s
        choices = power.choices()
        _at_best_power(front, choices, setup, candidate, budget, lambda text: progress(0.6, text), deadline)
    return front


def _at_best_power(
    front: Front, choices: Mapping[str, Sequence[Any]], setup: Setup, candidate: Candidate, budget: Budget,
    progress: Callable[[str], None], deadline: float | None,
) -> None:  # fmt: skip
    """Search the power limit and clock for the best point, too; what was measured joins the front."""
    side = setup.open("tuning", replace(candidate, point=front.best.point))
    try:
        _prepare(side, setup.timing, HEAT)
        best, *others = tune_power(
            side, front.best.point, choices, setup.conductor, Allowed(budget.p99_ms), progress, deadline
        )  # fmt: skip
    finally:
        side.close()
    if best.point != front.best.point:
        front.trials += [best, *(trial for trial in others if trial.point != front.best.point)]
        joules = best.ratios["energy_j_per_inference"].value
        front.cost *= joules if joules is not None else 1.0
        # Its gain over the start is that of its process at the power as found, times what the power brings.
        best.ratios = onwards(front.best.ratios, best.ratios)
        front.best = best


def _prepare(side: Side, timing: Path, effort: Effort) -> None:
    side.prepare(timing, effort.warm_up_s, effort.steady_s)


def _key(plan: TunePlan, candidate: Candidate, budget: Budget) -> str:
    facts = {
        "model": candidate.branch.artifact.digest(),
        "backend": candidate.backend.name,
        "versions": candidate.backend.versions,
        "start": candidate.point.to_json(),
        "fixed": sorted(plan.fixed),
        "memory_bytes": plan.memory_bytes,
        "p99_ms": budget.p99_ms,
        "machine": fingerprint.digest(plan.machine or fingerprint.fingerprint()),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _remembered(plan: TunePlan, key: str) -> tuple[OperatingPoint | None, list[Trial]]:
    """The best point of the last search, and every point that it measured."""
    if plan.cache is None:
        return None, []
    try:
        found = json.loads((plan.cache / f"{key}.json").read_text(encoding="utf-8"))
        return OperatingPoint(**found["best"]), [_trial(plain) for plain in found["trials"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        # Not there, or not ours: the search goes without.
        return None, []


def _trial(plain: dict[str, Any]) -> Trial:
    # An interval of then says nothing of now.
    ratios = {name: Ratio(ratio["value"]) for name, ratio in plain["ratios"].items()}
    facts = {"operating_point": plain["operating_point"], "settings": plain["settings"]}
    point = OperatingPoint(**plain["asked"])
    return Trial(point, facts, {}, ratios, plain["peak_memory_bytes"], plain["reason"])


def _join(front: Front, known: Sequence[Trial]) -> None:
    """What the last search measured and this one did not need to, in terms of what the start does now."""
    start, measured = front.trials[0], {trial.point for trial in front.trials}
    for trial in known:
        if trial.point not in measured and trial.ratios:
            compare_with(start, trial)
            front.trials.append(trial)


def _remember(plan: TunePlan, key: str, front: Front) -> None:
    if plan.cache is None:
        return
    try:
        plan.cache.mkdir(parents=True, exist_ok=True)
        trials = [{"asked": trial.point.to_json(), **trial.to_json()} for trial in front.trials if trial.figures]
        kept = {"best": front.best.point.to_json(), "trials": trials}
        write_text(plan.cache / f"{key}.json", json.dumps(kept, indent=1) + "\n")
    except (OSError, InputError):
        # A cache that can't be written costs the next run its head start, nothing else.
        return
