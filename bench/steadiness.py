"""Warm-up until steady: caches filled, threads started, frequencies settled, lazily compiled kernels compiled.

A fixed warm-up is too short for one program and too long for another. Slices of load run until their cost (CPU seconds
per inference) has stopped falling. On a shared machine single slices are off by a factor of two in either direction, so
the rule must be satisfied by noise soon and by a cost that still falls late.

Chosen among fifteen rules by simulation, 200 runs each of exponential warm-ups in five kinds of noise, from 2 % to jumps
of 2×. A warm-up of +200 % with a time constant of 0.3 s is left at 1.5 % above steady in a quiet run and 2 to 12 % in a
noisy one (the nearest rule to mind, medians of three that agree within 3 %, left 5 and 7 to 23). Where there is nothing
to warm up it is content after 0.5 to 0.6 s on average, noise or not, and within 1 s in 95 %.

It can't see a slow warm-up in much noise: +200 % with a time constant of 1 s is called steady at +15 % in a quiet run,
but at +50 to 90 % in noise of 10 to 20 %. Programs to compare should be warmed up alike, and measured interleaved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

RECENT = 5
"""How many of the last slices are held against the slices before them."""
FALL = 0.03
"""By how much those may be cheaper and still count as steady."""


def steady(costs: Sequence[float]) -> bool | None:
    """Whether the cost of an inference has stopped falling; None with fewer than 2 × `RECENT` slices to tell from.

    The rule: the best of the last five slices is not more than 3 % below the best of all before, and their median not
    more than 3 % below the median of the five before. A rise counts as steady: no program gets dearer by warming up, so
    it is the machine's doing, and waiting would not mend it."""
    if len(costs) < 2 * RECENT:
        return None
    last, previous = costs[-RECENT:], costs[-2 * RECENT : -RECENT]
    best = min(last) >= (1 - FALL) * min(costs[:-RECENT])
    return best and median(last) >= (1 - FALL) * median(previous)


def warm_up(
    slice_cost: Callable[[float], float],
    *,
    slice_s: float = 0.05,
    min_s: float = 0.3,
    max_s: float = 3.0,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Run slices of load until steady, for `min_s` at least and, steady or not, no longer than `max_s` and one slice.

    `slice_cost(seconds)` runs load for that long and returns CPU seconds per inference. Returns {"seconds", "slices",
    "steady"}; `steady` is None where there was no time for enough slices to tell."""
    start = now()
    costs: list[float] = []
    while True:
        costs.append(slice_cost(slice_s))
        spent = now() - start
        settled = steady(costs)
        if (settled and spent >= min_s) or spent >= max_s:
            return {"seconds": spent, "slices": len(costs), "steady": settled}
