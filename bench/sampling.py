"""What the meters share: a thread that samples and knows what it cost, how often a counter moves, and the arithmetic of
samples.

A series is a list of (moment in seconds, value), moments ascending. Values between two samples are taken to lie on the
straight line between them; outside the series nothing is known, and the answer is None.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

Series = Sequence[tuple[float, float]]


class Sampler:
    """Calls `sample` every `interval_s` seconds in a thread of its own. `sample` must raise nothing."""

    def __init__(self, sample: Callable[[], None], interval_s: float) -> None:
        self._sample = sample
        self._interval_s = interval_s
        self._over = threading.Event()
        self._cpu_s = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True, name="perwatt-meter")
        self._thread.start()

    def stop(self) -> float:
        """End the thread; returns the CPU seconds that it took."""
        self._over.set()
        self._thread.join()
        return self._cpu_s

    def _run(self) -> None:
        while not self._over.wait(self._interval_s):
            self._sample()
        self._cpu_s = time.thread_time()


def refresh_period(read: Callable[[], float], limit_s: float, ticks: int, pause_s: float = 0.0) -> float | None:
    """How often `read` changes, in seconds: the median over `ticks` changes, found by polling for at most `limit_s`.

    None where it did not change at all; `limit_s` where it changed once, which says no more than that."""
    moments: list[float] = []
    before, now = read(), time.monotonic()
    end = now + limit_s
    while now < end and len(moments) <= ticks:
        if pause_s:
            time.sleep(pause_s)
        value, now = read(), time.monotonic()
        if value != before:
            before = value
            moments.append(now)
    if len(moments) < 2:
        return limit_s if moments else None
    return median(later - earlier for earlier, later in pairwise(moments))


def value_at(series: Series, moment: float) -> float | None:
    """The value at `moment`, on the straight line between its neighbours; None outside the series."""
    if not series or not series[0][0] <= moment <= series[-1][0]:
        return None
    after = bisect_left(series, moment, key=lambda sample: sample[0])
    later, upper = series[after]
    if later == moment:
        return upper
    earlier, lower = series[after - 1]
    return lower + (upper - lower) * (moment - earlier) / (later - earlier)


def integrate(series: Series, start: float, end: float) -> float | None:
    """The integral from `start` to `end` by trapezoids: joules from watts. None where the series does not cover it."""
    first, last = value_at(series, start), value_at(series, end)
    if first is None or last is None or end < start:
        return None
    low = bisect_right(series, start, key=lambda sample: sample[0])
    high = bisect_left(series, end, key=lambda sample: sample[0])
    points = [(start, first), *series[low:high], (end, last)]
    return sum((b - a) * (u + v) / 2 for (a, u), (b, v) in pairwise(points))


def changes(series: Series, start: float, end: float) -> int:
    """How often the value moved after `start` and until `end`."""
    moves = (later for (_, u), (later, v) in pairwise(series) if u != v)
    return sum(start < moment <= end for moment in moves)
