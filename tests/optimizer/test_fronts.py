"""Picking an operating point for the load at hand, from figures made up by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from perwatt.errors import InputError
from perwatt.fronts import pick


def entry(batch: int, cpu_us: float, rate: float, p99_ms: float) -> dict[str, Any]:
    figures = {"cpu_s_per_inference": cpu_us * 1e-6, "throughput_per_s": rate, "latency_p99_ms": p99_ms}
    return {"operating_point": {"batch": batch, "scenario": "offline"}, "figures": figures, "cost": cpu_us * 1e-6}


FRONT = [entry(32, 100, 17000, 4.0), entry(8, 125, 13000, 1.5), entry(1, 280, 5700, 0.5)]


def batch(rate: float | None, p99_ms: float | None) -> int:
    return int(pick(FRONT, rate, p99_ms)["operating_point"]["batch"])


def test_without_a_bound_the_cheapest_that_keeps_up_is_taken() -> None:
    assert batch(None, None) == 32
    assert batch(40, None) == 32, "nobody waits for an answer, so items may gather"
    assert batch(11000, None) == 32


def test_a_latency_bound_counts_the_time_that_a_batch_takes_to_fill_up() -> None:
    assert batch(None, 2.0) == 8
    assert batch(None, 0.6) == 1
    assert batch(40, 100.0) == 1, "eight items at 40/s take 175 ms to come together"
    assert batch(40, 180.0) == 8
    assert batch(3000, 15.0) == 32, "31 items at 3000/s take 10.3 ms"


def test_a_load_that_no_point_serves_is_refused_with_what_is_possible() -> None:
    with pytest.raises(InputError, match=r"no operating point serves 12000/s: the fastest does 1.7e\+04/s, and 70%"):
        pick(FRONT, 12000, None)
    with pytest.raises(
        InputError, match=r"no operating point stays within 0.1 ms at 40/s: the best has a p99 of 0.5 ms"
    ):
        pick(FRONT, 40, 0.1)
    offline = (
        "p99 of 1.5 ms, with 8 items in a call, the fewest that it knows — make the bundle with --scenario single-"
    )
    with pytest.raises(InputError, match=offline):
        pick(FRONT[:2], None, 0.1)
    with pytest.raises(InputError, match=r"at 5000/s: the best has a p99 of 2.9 ms$"):
        # One item in a call is known, and too slow for that rate.
        pick(FRONT, 5000, 0.1)
    assert pick(FRONT, np.float32(40), None) == FRONT[0]
    with pytest.raises(InputError, match="rate must be a number, it is '40/s' — rate=40 is 40 inferences a second"):
        pick(FRONT, "40/s", None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one operating point only"):
        pick([], 40, None)
    with pytest.raises(InputError, match="rate must be positive"):
        pick(FRONT, 0, None)
