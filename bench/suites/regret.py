"""How close a search comes to the best of a grid, and in how much of the time that trying all of it takes.

    python regret.py [--seeds 10] [--reuse] [--quick]

ResNet-20 on CIFAR-10 (PERWATT_DATA), offline, `--target cpu`. The grid: every backend, every share of residual blocks that
`drop-blocks` may take (each tenth taught back in 40 steps), every int8 alternative. All of it is made and measured once, trial
by trial; that is the truth, with the seconds that each step of each trial took. Then the search runs on it with as many seeds: a
trial gives what the grid found, its cost drawn anew from the interval that it was measured with, and takes the seconds of its own
measurement and of those of its steps that no trial before it had made. Planning and measuring again are not part of it.

Wanted: after a quarter of the grid's time, what the search takes for the best choice that keeps the accuracy budget costs, by
the grid, at most 1.03 × the grid's best, in 9 of 10 seeds. Writes bench/results/regret.json (`--reuse` takes the grid from
there), exits 1 where that was missed.
`--quick` tries it out on MNIST without blocks, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import _pruning_frontier as pruning
import alias

import perwatt
from perwatt import choices, registry, searching
from perwatt.bench.fingerprint import fingerprint
from perwatt.choices import Space, Values
from perwatt.recipe import OneOf, PassStep
from perwatt.search import Search
from perwatt.search_log import Log, Outcome, Trial
from perwatt.search_proposals import ROUND
from perwatt.trials import Trials

RESULTS = Path(__file__).resolve().parents[1] / "results" / "regret.json"
WITHIN, SHARE_OF_TIME, SEEDS_WANTED = 1.03, 0.25, 0.9
BUDGET = 1.0
STEPS = 40
NO_END = 100_000
NORMAL_95 = 1.96
"""Standard deviations to either side that hold 95 %."""


@dataclass
class Point:
    """One choice of the grid: what it found, the seconds of each of its steps by what they begin with, and of the rest."""

    values: dict[str, int]
    outcome: Outcome
    steps: dict[str, float]
    rest_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"values": self.values, "outcome": self.outcome.to_json(), "steps": self.steps, "rest_s": self.rest_s}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Point:
        """What `to_json` made."""
        return cls(plain["values"], Outcome.from_json(plain["outcome"]), plain["steps"], plain["rest_s"])


# The truth --------------------------------------------------------------------------------------------------------------


class Exhaustive(Search):
    """Tries everything, in the order of the space, and remembers itself."""

    last: Exhaustive

    def run(self) -> str:
        Exhaustive.last = self
        return super().run()

    def _proposals(self, before: Sequence[Trial], number: int) -> list[tuple[Values, str]]:
        tried = [trial.values for trial in before]
        return [(values, "the grid") for values in self.space.all() if values not in tried][:ROUND]


def steps_of(quick: bool) -> list[PassStep | OneOf]:
    """What the grid is made of."""
    alternatives = [
        PassStep(name="quantize-int8", settings=one) for one in registry.pass_class("quantize-int8").variants
    ]
    steps = registry.edit_steps(registry.default_steps(), "-cast-half,-quantize-fp8,-quantize-int8,-assign-precision")
    if not quick:
        steps += [PassStep(name="drop-blocks"), PassStep(name="recover", settings={"steps": STEPS})]
    return [*steps, OneOf(steps=[*alternatives, PassStep(name="assign-precision")])]


def grid(quick: bool, folder: Path) -> tuple[Space, list[Point]]:
    """Every choice, made and measured."""
    name = "mnist" if quick else "resnet20"
    model, options = alias.made_ready(name, folder, alias.cases(folder)[name])
    if not quick:
        options = {**options, "train": str(pruning.training(name, folder))}
    kept, searching.Search = searching.Search, Exhaustive  # type: ignore[misc]
    try:
        perwatt.optimize(
            model, out=folder / "bundle", target="cpu", scenario="offline", max_drop=BUDGET, trials=NO_END, tune=False,
            passes=steps_of(quick), **options,
        )  # fmt: skip
    finally:
        searching.Search = kept  # type: ignore[misc]
    search = Exhaustive.last
    made: Trials = search.evaluate.__self__  # type: ignore[attr-defined]
    return search.space, points(search, made)


def points(search: Search, made: Trials) -> list[Point]:
    """The grid with the seconds that each step took when it was made, whichever trial made it."""
    found = []
    seen: set[str] = set()
    for trial in search.log.told():
        assert trial.outcome is not None
        rows, backend = made.branch(trial.values).rows, search.space.where(trial.values)[0]
        begun, steps = backend, {}
        for row in rows:
            begun = f"{begun} > {row.name} {json.dumps(row.settings, sort_keys=True)}"
            steps[begun] = row.seconds
        fresh = sum(seconds for key, seconds in steps.items() if key not in seen)
        seen |= set(steps)
        found.append(Point(dict(trial.values), trial.outcome, steps, max(0.0, trial.outcome.seconds - fresh)))
    return found


# The search on it -------------------------------------------------------------------------------------------------------


@dataclass
class Replay:
    """Gives what the grid found, with another chance in its cost, and counts the seconds that it would have taken."""

    space: Space
    by_values: dict[tuple[int, ...], Point]
    seed: int
    made: set[str] = field(default_factory=set)
    seconds: float = 0.0

    def evaluate(self, trials: Sequence[Trial], before: Sequence[Trial]) -> Iterator[tuple[Trial, Outcome]]:
        for trial in trials:
            point = self.by_values[tuple(trial.values.values())]
            self.seconds += point.rest_s + sum(s for key, s in point.steps.items() if key not in self.made)
            self.made |= set(point.steps)
            yield trial, self._drawn(point.outcome)

    def _drawn(self, outcome: Outcome) -> Outcome:
        """As another measurement of the same graph might have found it."""
        ratio = outcome.ratios.get("cpu_s_per_inference")
        if ratio is None or not ratio.low or not ratio.high or not outcome.objectives:
            return outcome
        spread = math.log(ratio.high / ratio.low) / (2 * NORMAL_95)
        chance = random.Random(f"{self.seed} {outcome.digest}").gauss(0.0, spread)
        return replace(outcome, objectives=(outcome.objectives[0] * math.exp(chance),))


def replayed(space: Space, truth: Sequence[Point], seed: int, most_s: float, folder: Path) -> tuple[float, int, float]:
    """What the choice that a search ends with costs by the grid, after how many trials, and the seconds that they took."""
    replay = Replay(space, {tuple(point.values.values()): point for point in truth}, seed)
    log = Log(folder / f"{seed}.sqlite", space, seed=seed)
    search = Search(
        space, log, replay.evaluate, stop=lambda: "time" if replay.seconds >= most_s else None, max_drop=BUDGET
    )
    best, taken, said = float("inf"), 0, float("inf")
    search.run()
    replay_again = Replay(space, replay.by_values, seed)
    # What was found within the time, to the trial: a round may end later than that.
    for trial in log.told():
        list(replay_again.evaluate([trial], []))
        if replay_again.seconds > most_s:
            break
        taken += 1
        if trial.outcome is not None and trial.outcome.permitted and trial.outcome.cost < said:
            said, best = trial.outcome.cost, replay.by_values[tuple(trial.values.values())].outcome.cost
    log.close()
    return best, taken, replay.seconds


def main() -> int:
    """The grid, then every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--reuse", action="store_true", help="take the grid from the results file")
    parser.add_argument("--quick", action="store_true", help="MNIST without blocks, nothing written")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside:
        if asked.reuse:
            known = json.loads(RESULTS.read_text())
            space = choices.space(steps_of(False), known["places"])
            truth = [Point.from_json(plain) for plain in known["grid"]]
        else:
            space, truth = grid(asked.quick, Path(aside))
        whole_s = sum(point.rest_s for point in truth)
        whole_s += sum({key: s for point in truth for key, s in point.steps.items()}.values())
        optimum = min(point.outcome.cost for point in truth if point.outcome.permitted)
        rows = []
        for seed in range(asked.seeds):
            best, taken, seconds = replayed(space, truth, seed, SHARE_OF_TIME * whole_s, Path(aside))
            rows.append({"seed": seed, "regret": best / optimum, "trials": taken, "seconds": seconds})
            print(f"seed {seed}: {best / optimum:.3f} × the optimum after {taken} of {len(truth)} trials", flush=True)
    held = sum(row["regret"] <= WITHIN for row in rows)
    print(f"grid of {len(truth)} choices: {whole_s:.0f} s, optimum {optimum:.3f} × the original's cost")
    holds = held >= SEEDS_WANTED * len(rows)
    print(f"{'ok  ' if holds else 'MISS'} within {WITHIN} × in a quarter of the time: {held} of {len(rows)}")
    if not asked.quick:
        plain = {"machine": fingerprint(), "places": space.places, "grid_s": whole_s, "optimum": optimum, "seeds": rows,
                 "grid": [point.to_json() for point in truth]}  # fmt: skip
        RESULTS.write_text(json.dumps(plain, indent=1) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
