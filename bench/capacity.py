"""The highest rate of arrivals that a program sustains within a latency bound, found by trying.

A rate is sustained when the given share of all requests is answered within the bound (MLPerf's Server scenario binds the
99th percentile) and the backlog does not grow. The second rule is there because a window is short: a server slightly too
slow takes minutes to break the bound, and its latency climbs all the while. Hence: the median latency of the last third of
the requests may exceed that of the first third by a quarter of the bound at most.

The search goes down from the offline throughput until a rate is sustained, halves the bracket on a logarithmic scale, and
lets the rate that is left prove itself in a longer run with arrivals of its own, because the winner of many tries is a
lucky one. What it can't see: disturbances rarer than its windows, and load that is not steady.

How far to trust it: on a simulated M/D/1 server, with windows as long as `window_s` says, the rates found for bounds of 2
to 100 service times were 0 to 4 % below the true ones in the median, with a standard deviation of 2 to 5 %. It is largest
where the bound is tight, because there a little latency is a lot of rate. Shorter windows make it worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from perwatt.bench.statistics import percentile
from perwatt.measurement import Window

STEPS_DOWN = (2.0, 8.0, 64.0)
"""Parts of the start rate that are tried for one that is sustained; at a 64th hardly a request meets another."""
STEP_UP = 1.5
GROWTH = 0.25
"""Of the bound, by which the median latency may grow within a window."""
NEAR_EDGE = 0.1
CONFIRMING_WINDOWS = 3
KEPT_FOR_CONFIRMING = 3
EXCEEDING = 20
"""Requests that a window should hold beyond the percentile, so that it doesn't hang on a single one."""
LONG_IN_BOUNDS = 40


@dataclass(frozen=True)
class Try:
    """One rate that was tried, over `windows` windows with `requests` requests in all. `latency_ms` is the percentile that
    is bound; `growth_ms` the median latency of the last third of a window less that of the first."""

    rate_per_s: float
    latency_ms: float
    growth_ms: float
    requests: int
    windows: int
    ok: bool


@dataclass(frozen=True)
class Capacity:
    """`rate_per_s` is the highest rate that proved itself, None where none did; `reason` says how the search ended.
    `windows` are those that proved it, with the CPU seconds and the energy at that rate."""

    rate_per_s: float | None
    bound_ms: float
    share: float
    reason: str
    tries: list[Try]
    windows: list[Window] = field(default_factory=list)


def window_s(rate_per_s: float, bound_ms: float, share: float = 0.99, at_most_s: float = math.inf) -> float:
    """How long one window should be: twenty requests expected beyond the percentile, and forty times the bound, so that a
    server that is 1 % too slow is found out by its growing backlog."""
    return min(at_most_s, max(EXCEEDING / (1 - share) / rate_per_s, LONG_IN_BOUNDS * bound_ms / 1e3))


def highest_rate(
    serve: Callable[[float], Window],
    *,
    bound_ms: float,
    share: float = 0.99,
    start_rate: float,
    precision: float = 0.03,
    max_tries: int = 14,
    progress: Callable[[Try], None] = lambda tried: None,
) -> Capacity:
    """The highest sustained rate, known to `precision` (a fraction of it).

    `serve(rate)` gives one window of arrivals at that rate, new ones each time; `window_s` says how long it should be. A
    try is one rate: one window, a second one where the first is near the edge, three to confirm. `start_rate` should be
    the offline throughput. Raises ValueError for a window without requests."""
    search = _Search(serve, bound_ms, share, max_tries, progress)
    low, high = search.bracket(start_rate)
    if low is None:
        return search.failed()
    while high is not None and high > low * (1 + precision) and search.left > KEPT_FOR_CONFIRMING:
        middle = math.sqrt(low * high)
        if search.sustained(middle):
            low = middle
        else:
            high = middle
    return search.confirmed(low, high, precision)


class _Search:
    """The tries so far, and how they are made."""

    def __init__(
        self,
        serve: Callable[[float], Window],
        bound_ms: float,
        share: float,
        max_tries: int,
        progress: Callable[[Try], None],
    ) -> None:
        self.serve, self.bound_ms, self.share = serve, bound_ms, share
        self.max_tries, self.progress = max_tries, progress
        self.tries: list[Try] = []
        self.windows: list[Window] = []
        self.fastest_ms = math.inf

    @property
    def left(self) -> int:
        return self.max_tries - len(self.tries)

    def sustained(self, rate: float, windows: int = 1) -> bool:
        """Try one rate; near the edge, a second window joins the first."""
        found = [self.serve(rate) for _ in range(windows)]
        tried = judged(rate, found, self.bound_ms, self.share)
        within = tried.latency_ms <= self.bound_ms
        if windows == 1 and (abs(tried.latency_ms / self.bound_ms - 1) < NEAR_EDGE or within != tried.ok):
            found.append(self.serve(rate))
            tried = judged(rate, found, self.bound_ms, self.share)
        self.fastest_ms = min(self.fastest_ms, *(min(window.latencies_ms) for window in found))
        self.tries.append(tried)
        self.windows = found
        self.progress(tried)
        return tried.ok

    def bracket(self, start_rate: float) -> tuple[float | None, float | None]:
        """The highest rate that was sustained and the lowest that was not; None for what was not found."""
        if self.sustained(start_rate):
            low = start_rate
            while self.left > KEPT_FOR_CONFIRMING:
                if not self.sustained(low * STEP_UP):
                    return low, low * STEP_UP
                low *= STEP_UP
            return low, None
        high = start_rate
        for part in STEPS_DOWN:
            if self.sustained(start_rate / part):
                return start_rate / part, high
            high = start_rate / part
            # Waiting only adds to the time that a request takes by itself.
            if self.fastest_ms > self.bound_ms:
                break
        return None, high

    def failed(self) -> Capacity:
        """No rate was sustained."""
        if self.fastest_ms > self.bound_ms:
            reason = f"the fastest of all requests took {self.fastest_ms:.3g} ms, and {self.bound_ms:g} ms are allowed"
        else:
            reason = f"even {_shown(self.tries[-1].rate_per_s)} requests a second were not answered in time"
        return Capacity(None, self.bound_ms, self.share, reason, self.tries)

    def confirmed(self, low: float, high: float | None, precision: float) -> Capacity:
        """`low`, or what is a little less, after a longer run."""
        rate, step = low, precision
        while self.left > 0:
            if self.sustained(rate, CONFIRMING_WINDOWS):
                return Capacity(rate, self.bound_ms, self.share, self._told(rate, high), self.tries, self.windows)
            rate, high, step = rate / (1 + step), rate, 2 * step
        reason = f"no rate held in a longer run within {self.max_tries} tries"
        return Capacity(None, self.bound_ms, self.share, reason, self.tries)

    def _told(self, rate: float, high: float | None) -> str:
        if high is None:
            return f"{_shown(rate)}/s held in a longer run; higher rates were not tried, for want of tries"
        return f"{_shown(rate)}/s held in a longer run, {_shown(high)}/s did not hold"


def _shown(rate_per_s: float) -> str:
    return f"{rate_per_s:,.0f}" if rate_per_s >= 1000 else f"{rate_per_s:.3g}"


def judged(rate_per_s: float, windows: Sequence[Window], bound_ms: float, share: float) -> Try:
    """Whether the windows at that rate, taken together, sustain it. Raises ValueError where they hold no requests."""
    latencies = [latency for window in windows for latency in window.latencies_ms]
    reached = percentile(latencies, share)
    if reached is None:
        raise ValueError(f"no request came in a window at {rate_per_s:.3g}/s: make it longer")
    growth = fmean(growth_ms(window.latencies_ms) for window in windows)
    ok = reached <= bound_ms and growth <= GROWTH * bound_ms
    return Try(rate_per_s, reached, growth, len(latencies), len(windows), ok)


def growth_ms(latencies_ms: Sequence[float]) -> float:
    """Median latency of the last third less that of the first third, requests in the order of arrival."""
    third = len(latencies_ms) // 3
    return median(latencies_ms[-third:]) - median(latencies_ms[:third]) if third else 0.0
