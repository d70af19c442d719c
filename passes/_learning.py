"""What passes that learn are given: samples to learn from and to select by, time, and a folder for what is half done."""

from __future__ import annotations

import os
import time
from pathlib import Path

from perwatt.contract import Context
from perwatt.data import Samples
from perwatt.errors import PassError, PerwattError

LEAST_SAMPLES = 64
HELD_OUT = 0.1
"""Of the samples to learn from, where there are none to select by."""


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
    """`minutes`, or what is left until the deadline. Raises PassError where that is nothing."""
    seconds = minutes * 60
    if context.deadline is not None:
        seconds = min(seconds, context.deadline - time.monotonic())
    if seconds <= 0:
        raise PassError("there is no time left to learn")
    return seconds


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


__all__ = ["cache_of_learning", "samples_to_learn", "seconds_to_learn"]
