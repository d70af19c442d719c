"""What passes that learn are given: samples to learn from and to select by, time, and a folder for what is half done."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from perwatt.artifact import Artifact
from perwatt.contract import Context
from perwatt.data import Samples
from perwatt.errors import PassError, PerwattError

if TYPE_CHECKING:
    from perwatt.distillation import Learnt

LEAST_SAMPLES = 64
SHARE = 0.5
"""Of the time left that a pass may learn for."""
HELD_OUT = 0.1
"""Of the samples to learn from, where there are none to select by."""


def check_learning(minutes: float, steps: int, batch: int, temperature: float, labels: float) -> None:
    """Raises PassError for settings that nothing could learn by."""
    if minutes <= 0 or steps < 0 or batch < 2:
        raise PassError("minutes must be more than 0, steps 0 or more and batch 2 or more", fix="minutes: 5, batch: 64")
    if temperature <= 0 or labels < 0:
        raise PassError("temperature must be more than 0 and labels 0 or more", fix="temperature: 4, labels: 0.1")


def nothing_to_learn_from(artifact: Artifact, context: Context) -> Iterator[str]:
    """Why no model could learn here: the original is gone; all samples are made up, and a network taught by noise answers noise;
    items can't be drawn one by one; torch is missing."""
    if context.original is None:
        yield "the original isn't there to learn from"
    if context.made_up:
        yield "there are no real samples to learn from: --train, or --data"
    if artifact.signature.batch is None:
        yield "the model has no batch axis: no items to draw and put together"
    if importlib.util.find_spec("torch") is None:
        yield "learning needs torch: pip install 'perwatt[torch]'"


def samples_to_learn(context: Context) -> tuple[Samples, Samples, str]:
    """Those to learn from, those to select by (without labels), and where the first come from, in words. Raises PassError
    where there are too few."""
    found, where = _role(context, "learn"), "to learn from"
    if found is None:
        found, where = _role(context, "calibrate"), "to calibrate on, as there are none to learn from"
    if found is None or len(found) < LEAST_SAMPLES:
        count = 0 if found is None else len(found)
        raise PassError(f"{count} samples to learn from are too few: at least {LEAST_SAMPLES}", fix="--train PATH")
    select = _role(context, "select")
    if select is None or not len(select):
        parts = found.divide({"learn": 1 - HELD_OUT, "select": HELD_OUT}, context.seed)
        return parts["learn"], parts["select"].without_labels(), where
    return found, select.without_labels(), where


def seconds_to_learn(minutes: float, context: Context) -> float:
    """`minutes`, or half of what is left until the deadline: what was learnt has yet to be quantized and judged. Raises PassError
    where that is nothing."""
    seconds = minutes * 60
    if context.deadline is not None:
        seconds = min(seconds, SHARE * (context.deadline - time.monotonic()))
    if seconds <= 0:
        raise PassError("there is no time left to learn", fix="give more --time")
    return seconds


def words_of(
    made: Learnt, asked_s: float | None, minutes: float, learn: Samples, select: Samples, where: str
) -> list[str]:
    """What was learnt, for the ledger. `asked_s`: the seconds that it had, None where steps were counted."""
    taken = f"{made.steps} steps in {made.seconds / 60:.1f} min on {len(learn)} samples {where}"
    if asked_s is not None and asked_s < 0.95 * minutes * 60:
        taken += f" ({asked_s / 60:.1f} of the {minutes:g} minutes, for --time)"
    if made.step == 0:
        return [f"nothing was gained in {taken}"]
    share = made.after / made.before if made.before else 1.0
    loss = (
        f"{taken}: loss against the original {made.before:.3g} → {made.after:.3g} on {len(select)} held-out samples "
        f"({share:.0%}), best at step {made.step}"
    )
    if made.agreement is None:
        return [loss, *made.notes]
    before, after = made.agreement
    return [loss, f"answers {before:.1%} of them as the original does before, {after:.1%} after", *made.notes]


def cache_of_learning() -> Path | None:
    """Where state is kept while something learns; None where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "perwatt" / "learning"
    except RuntimeError:
        return None


def _role(context: Context, role: str) -> Samples | None:
    try:
        return context.samples(role)
    except PerwattError:
        return None


__all__ = [
    "cache_of_learning",
    "check_learning",
    "nothing_to_learn_from",
    "samples_to_learn",
    "seconds_to_learn",
    "words_of",
]
