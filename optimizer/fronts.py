"""Picks an operating point from a bundle's front for the load at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from perwatt.errors import InputError

BUSY_AT_MOST = 0.7
"""Share of a point's highest rate that it is used at: beyond it, requests that come by chance queue up."""


def pick(front: Sequence[Mapping[str, Any]], rate: float | None, p99_ms: float | None) -> Mapping[str, Any]:
    """The entry of `front` that costs least of those that serve `rate` inferences a second within `p99_ms`.

    A batch is counted with the time that its first item waits for its last at that rate. Raises InputError where no
    point does it, with what the best one can."""
    for name, value, example in (
        ("rate", rate, "rate=40 is 40 inferences a second"), ("p99_ms", p99_ms, "p99_ms=20 is 20 ms")
    ):  # fmt: skip
        if value is not None and not isinstance(value, Real):
            raise InputError(f"{name} must be a number, it is {value!r}", fix=example)
        if value is not None and not value > 0:
            raise InputError(f"{name} must be positive, it is {value}")
    if not front:
        raise InputError(
            "this bundle knows one operating point only",
            fix="make it anew with --tune, or load it without rate and p99_ms",
        )
    fast = [entry for entry in front if rate is None or BUSY_AT_MOST * _rate(entry) >= rate]
    if not fast:
        best = max(_rate(entry) for entry in front)
        raise InputError(
            f"no operating point serves {rate:g}/s: the fastest does {best:.4g}/s, and {BUSY_AT_MOST:.0%} of it can be relied on"
        )
    in_time = [entry for entry in fast if p99_ms is None or _p99_ms(entry, rate) <= p99_ms]
    if not in_time:
        quickest = min(fast, key=lambda entry: _p99_ms(entry, rate))
        at = f" at {rate:g}/s" if rate is not None else ""
        words = (
            f"no operating point stays within {p99_ms:g} ms{at}: the best has a p99 of {_p99_ms(quickest, rate):.3g} ms"
        )
        batch = _batch(quickest)
        if batch > 1 and batch == min(map(_batch, front)):
            alone = "make the bundle with --scenario single-stream" if _is_offline(quickest) else None
            raise InputError(f"{words}, with {batch} items in a call, the fewest that it knows", fix=alone)
        raise InputError(words)
    return min(in_time, key=lambda entry: float(entry["cost"]))


def _rate(entry: Mapping[str, Any]) -> float:
    return float(entry["figures"]["throughput_per_s"])


def _p99_ms(entry: Mapping[str, Any], rate: float | None) -> float:
    gathering_ms = (_batch(entry) - 1) / rate * 1e3 if rate is not None else 0.0
    return float(entry["figures"]["latency_p99_ms"]) + gathering_ms


def _batch(entry: Mapping[str, Any]) -> int:
    return int(entry["operating_point"]["batch"])


def _is_offline(entry: Mapping[str, Any]) -> bool:
    return bool(entry["operating_point"].get("scenario") == "offline")
