"""Gates and benches as history keeps them: a small convnet on one machine, changed commit by commit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from perwatt.bench_report import BenchReport, Figure, Subject
from perwatt.gate_report import ComparedAccuracy, ComparedFigure, GateReport, GateSide
from perwatt.report import RatioFigure

POINT = {"scenario": "single-stream", "batch": 1, "threads": None, "streams": 1}
EPYC = {"fingerprint": {"vendor": "AuthenticAMD", "name": "AMD EPYC 9B14", "cpus": 2}, "digest": "1a2b3c4d5e6f"}
XEON = {"fingerprint": {"vendor": "GenuineIntel", "name": "Intel Xeon 8481C", "cpus": 4}, "digest": "ffee00112233"}

PLACE = "/srv/models/resnet20"
"""Where all of them lay, in no repository."""


def a_digest(model: str) -> str:
    """As of the files of `model`: equal for equal names."""
    return "sha256:" + hashlib.sha256(model.encode()).hexdigest()


def a_side(model: str, **changes: Any) -> GateSide:
    """A side that runs `model`; its commit begins with its digest's letters."""
    facts: dict[str, Any] = {
        "label": model, "path": PLACE, "kind": "bundle", "commit": a_digest(model)[7:47],
        "digest": a_digest(model), "target": "cpu", "operating_point": POINT, "execution_precision": "bf16",
    }  # fmt: skip
    return GateSide(**{**facts, **changes})


def compared(base: float, head: float, unit: str = "s", half: float = 0.02, **changes: Any) -> ComparedFigure:
    """Both sides and their ratio, each with an interval of ± `half`; a floor of 1 %."""
    facts: dict[str, Any] = {
        "unit": unit, "base": base, "head": head, "n": 24, "floor": 0.01,
        "ratio": RatioFigure(value=head / base, low=head / base * (1 - half), high=head / base * (1 + half)),
        "base_interval": (base * (1 - half), base * (1 + half)), "head_interval": (head * (1 - half), head * (1 + half)),
    }  # fmt: skip
    return ComparedFigure(**{**facts, **changes})


def joules(base: float, head: float, method: Any = "counter", boundary: Any = "package") -> ComparedFigure:
    """Inferences per joule of both sides, by one method."""
    return compared(base, head, "1/J", method=method, boundary=boundary)


def a_gate(
    base: str | GateSide = "main",
    head: str | GateSide = "change",
    cpu_s: tuple[float, float] = (130e-6, 120e-6),
    *,
    day: int = 1,
    **changes: Any,
) -> GateReport:
    """A gate on that day of September: CPU seconds per inference of both sides in `cpu_s`."""
    facts: dict[str, Any] = {
        "perwatt_version": "0.2.0", "created": f"2026-09-{day:02d}T10:11:12Z", "seconds": 60.0, "verdict": "pass",
        "reason": "every limit holds", "exit_code": 0, "name": "resnet20", "checks": [],
        "base": base if isinstance(base, GateSide) else a_side(base),
        "head": head if isinstance(head, GateSide) else a_side(head),
        "figures": {
            "cpu_s_per_inference": compared(*cpu_s),
            "throughput_per_watt": joules(0.4 / cpu_s[0], 0.4 / cpu_s[1]),
            "size_bytes": compared(1e6, 1e6, "B", half=0, floor=None, base_interval=None, head_interval=None),
        },
        "accuracy": ComparedAccuracy(metric="top1", unit="fraction", n=1000, base=0.916, head=0.915, drop=0.1, low=-0.2,
                                     high=0.4),
        "disturbed": [], "machine": EPYC, "measuring": {"scenario": "single-stream"}, "energy": {}, "notes": [],
    }  # fmt: skip
    return GateReport(**{**facts, **changes})


def a_subject(label: str = "resnet20", cpu_s: float = 120e-6, **changes: Any) -> Subject:
    """A subject of a bench that takes `cpu_s` CPU seconds per inference."""
    facts: dict[str, Any] = {
        "label": label, "path": PLACE, "kind": "bundle", "target": "cpu", "scenario": "single-stream",
        "operating_point": POINT, "size_bytes": 1_000_000,
        "figures": {
            "cpu_s_per_inference": Figure(value=cpu_s, unit="s", low=0.97 * cpu_s, high=1.03 * cpu_s, n=12),
            "throughput_per_watt": Figure(value=None, unit="1/J", method="unavailable"),
        },
    }  # fmt: skip
    return Subject(**{**facts, **changes})


def a_bench(subjects: Sequence[Subject] = (), *, day: int = 1, **changes: Any) -> BenchReport:
    """A bench on that day of September."""
    facts: dict[str, Any] = {
        "perwatt_version": "0.2.0", "created": f"2026-09-{day:02d}T10:11:12Z", "seconds": 20.0, "profile": "quick",
        "subjects": list(subjects) or [a_subject()], "noise_floor": {}, "disturbed": [], "machine": EPYC,
        "measuring": {}, "energy": {}, "notes": [],
    }  # fmt: skip
    return BenchReport(**{**facts, **changes})


def a_month() -> list[GateReport | BenchReport]:
    """A line of work: main → a → b, c that failed, d after b on a machine that had become slower, and a bench."""
    fail: dict[str, Any] = {"verdict": "fail", "exit_code": 1}
    return [
        a_gate("main", "a", (130e-6, 123e-6), day=1),
        a_gate("a", "b", (124e-6, 112e-6), day=4),
        a_gate("b", "c", (112e-6, 133e-6), day=9, **fail),
        a_gate("b", "d", (119e-6, 114e-6), day=12, disturbed=["other processes took 31 % of the CPU"]),
        a_bench([a_subject("nightly", 115e-6)], day=20),
        a_gate("d", a_side("e", dirty=True), (117e-6, 101e-6), day=28, verdict="inconclusive"),
    ]
