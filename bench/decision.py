"""A gate's decision on one figure: pass, fail or inconclusive.

A limit fails only if the whole interval lies beyond it *and* the effect is larger than the noise floor that the same
job showed between processes of one and the same model. It passes if the whole interval lies within. Everything else is
inconclusive: more measuring, or a quieter machine, would tell. Accuracy is judged on paired flips instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from perwatt.measurement import Ratio

Verdict = Literal["pass", "fail", "inconclusive"]
SIGNIFICANT = 0.05
"""p-value below which flips are no chance."""


@dataclass(frozen=True)
class Decision:
    """A verdict and its ground: `within` or `beyond` the limit, `noise` (beyond, but no more than the floor), `unsure`
    (the interval holds the limit), `alone` (one observation, so no interval), `unknown` (not measured)."""

    verdict: Verdict
    ground: Literal["within", "beyond", "noise", "unsure", "alone", "unknown"]


def decide(
    value: Ratio, bound: float, side: Literal["at most", "at least"], floor: float, effect: float, exact: bool = False
) -> Decision:
    """Judge `value` (a ratio to the base, or an absolute figure) with its interval against `bound`. `floor` and `effect`
    are on the log scale; `exact` is what was counted and needs no interval. Values and bounds must be positive."""
    if value.value is None or not value.value > 0:
        return Decision("inconclusive", "unknown")
    if not exact and (value.low is None or value.high is None):
        return Decision("inconclusive", "alone")
    low = value.low if value.low is not None else value.value
    high = value.high if value.high is not None else value.value
    if side == "at least":
        beyond, within = high < bound, low >= bound
    else:
        beyond, within = low > bound, high <= bound
    if within:
        return Decision("pass", "within")
    if not beyond:
        return Decision("inconclusive", "unsure")
    return Decision("fail", "beyond") if abs(effect) > floor else Decision("inconclusive", "noise")


def log_ratio(ratio: float | None) -> float:
    """Natural logarithm of a ratio; 0 where it is not known, so that nothing unknown counts as an effect."""
    return math.log(ratio) if ratio and ratio > 0 else 0.0


def decide_accuracy(drop: float, allowed: float, p_value: float | None, low: float | None) -> Decision:
    """A drop within the budget passes. One beyond it fails if the flips are no chance (exact McNemar), or, for metrics
    without flips, if the interval of the drop excludes none; else it is inconclusive."""
    if drop <= allowed + 1e-9:
        return Decision("pass", "within")
    real = p_value < SIGNIFICANT if p_value is not None else (low is not None and low > 0)
    return Decision("fail", "beyond") if real else Decision("inconclusive", "unsure")
