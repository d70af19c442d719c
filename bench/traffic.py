"""What comes and what it costs: requests at random times, rates of arrival, prices of energy.

Requests of many independent users come as a Poisson process: the gaps are exponential, and know nothing of each other or
of how busy the server is. This is MLPerf's Server scenario (Reddi et al., "MLPerf Inference Benchmark", ISCA 2020, section
IV). Evenly spaced requests would never queue below saturation, and a fixed number of users would slow down with the
server: both hide the latency that users see.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perwatt.errors import InputError

JOULES_PER_KWH = 3.6e6
LEAST_REQUESTS = {0.5: 10, 0.99: 100}
"""So many requests at least, or a percentile is that of a few lucky or unlucky ones: with fewer than a hundred, the 99th is
the slowest of all."""
UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0}
SYMBOLS = {"€": "EUR", "$": "USD", "£": "GBP"}
_NUMBER = r"([0-9]+\.?[0-9]*|\.[0-9]+)"


@dataclass(frozen=True)
class Price:
    """What a kilowatt-hour costs: `amount` in units of `currency` (three letters; empty where none was named)."""

    amount: float
    currency: str = ""

    def of_joules(self, joules: float) -> float:
        """What so many joules cost, in `currency`."""
        return self.amount * joules / JOULES_PER_KWH


def poisson_arrivals(
    rate_per_s: float, seed: int, *, seconds: float | None = None, count: int | None = None
) -> list[float]:
    """Times in seconds after the start at which requests are due, in order: all before `seconds`, or the first `count`.

    With both, exactly `count` come within `seconds`: given their number, the arrivals of a Poisson process are spread
    evenly at random (Ross, "Introduction to Probability Models", theorem 5.2), so that what is counted per request does
    not vary with how many happened to come. The same seed gives the same pattern at any rate, stretched. Raises ValueError
    unless the rate is positive and one of `seconds` and `count` is given."""
    if not 0 < rate_per_s < math.inf:
        raise ValueError(f"arrivals need a positive rate, not {rate_per_s} a second")
    if seconds is None and count is None:
        raise ValueError("give seconds, count or both")
    if seconds is not None and count is not None:
        return [float(due) for due in np.sort(np.random.default_rng(seed).uniform(0, seconds, count))]
    gap = np.random.default_rng(seed).standard_exponential
    arrivals: list[float] = []
    due = gap() / rate_per_s
    while due < seconds if seconds is not None else len(arrivals) < (count or 0):
        arrivals.append(due)
        due += gap() / rate_per_s
    return arrivals


def known_percentile(latencies_ms: Sequence[float], share: float) -> float | None:
    """A percentile (nearest rank) of what requests took, in ms; None where they are fewer than `LEAST_REQUESTS` of it."""
    from perwatt.bench.statistics import percentile

    least = LEAST_REQUESTS.get(share, math.ceil(1 / (1 - share)))
    return percentile(latencies_ms, share) if len(latencies_ms) >= least else None


def parse_rate(text: str | float) -> float:
    """Requests a second: `40/s`, `2400/min`, `90/h`, or `40`. Raises InputError for anything else."""
    match = re.fullmatch(rf"\s*{_NUMBER}\s*(?:/\s*([a-z]+))?\s*", str(text))
    if not match or (match[2] or "s") not in UNITS_S:
        raise InputError(f"{text!r} is no rate of requests", fix="write 40/s, 2400/min, 90/h or 40, which is 40/s")
    if float(match[1]) <= 0:
        raise InputError("a rate of requests must be above 0", fix="write 40/s, or 1/h for a rare one")
    return float(match[1]) / UNITS_S[match[2] or "s"]


def parse_price(text: str) -> Price:
    """What a kilowatt-hour costs: `0.20EUR/kWh`, `0.20€/kWh`, or `0.20/kWh` in no currency. Raises InputError for anything
    else, hundredths of a currency included."""
    currency = f"[A-Za-z]{{3}}|[{''.join(SYMBOLS)}]"
    match = re.fullmatch(rf"\s*{_NUMBER}\s*({currency})?\s*/\s*kwh\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise InputError(f"{text!r} is no price of energy", fix="write 0.20EUR/kWh or 0.20/kWh")
    named = match[2] or ""
    return Price(float(match[1]), SYMBOLS.get(named, named.upper()))
