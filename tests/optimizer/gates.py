"""Gates and benchmarks as a run would write them, for tests of what is shown: figures of a small convnet on two cores."""

from __future__ import annotations

from typing import Any

from perwatt.bench_report import BenchReport, Capacity, Figure, Subject, Traffic
from perwatt.gate_report import EXIT_CODES, Check, ComparedAccuracy, ComparedFigure, GateReport, GateSide
from perwatt.report import RatioFigure

UNITS = {
    "throughput_per_watt": "1/J", "energy_j_per_inference": "J", "energy_above_idle_j_per_inference": "J", "power_w": "W",
    "cpu_s_per_inference": "s", "throughput_per_s": "1/s", "latency_p50_ms": "ms", "latency_p99_ms": "ms",
    "size_bytes": "B", "peak_memory_bytes": "B",
}  # fmt: skip
OF_ENERGY = ("throughput_per_watt", "energy_j_per_inference", "energy_above_idle_j_per_inference", "power_w")
EXACT = ("size_bytes", "peak_memory_bytes")
BASE = {
    "throughput_per_watt": 3077.0, "energy_j_per_inference": 325e-6, "energy_above_idle_j_per_inference": 211e-6,
    "power_w": 4.9, "cpu_s_per_inference": 130e-6, "throughput_per_s": 15385.0, "latency_p50_ms": 0.13,
    "latency_p99_ms": 0.19, "size_bytes": 1_090_000.0, "peak_memory_bytes": 182_000_000.0,
}  # fmt: skip
CPU = "cpu_s_per_inference"
WATT = "throughput_per_watt"


def around(value: float, half: float = 0.03) -> RatioFigure:
    """A ratio with an interval of ± `half`."""
    return RatioFigure(value=value, low=value - half, high=value + half)


def bounds(value: float, share: float) -> tuple[float, float]:
    return value * (1 - share), value * (1 + share)


# Gates ------------------------------------------------------------------------------------------------------------


def compared(name: str, ratio: RatioFigure, *, method: Any = "counter", floor: float | None = 0.012) -> ComparedFigure:
    """`name` on both sides, the base as in `BASE` and the head as the ratio says."""
    base = BASE[name]
    head = None if ratio.value is None else base * ratio.value
    measured = name not in EXACT and head is not None
    labelled = name in OF_ENERGY
    return ComparedFigure(
        unit=UNITS[name],
        base=base,
        head=head,
        ratio=ratio,
        base_interval=bounds(base, 0.008) if measured else None,
        head_interval=bounds(head, 0.009) if measured and head is not None else None,
        floor=floor if measured else None,
        n=1 if name in EXACT else 12 if labelled else 48,
        method=method if labelled else None,
        boundary="package" if labelled and method != "unavailable" else None,
    )


def all_figures(slower: float = 1.0, *, method: Any = "counter") -> dict[str, ComparedFigure]:
    """Every figure of a head that takes `slower` times the CPU time; size and memory are the same."""
    ratios = {name: around(slower) for name in BASE}
    ratios |= {name: around(1 / slower) for name in (WATT, "throughput_per_s")}
    ratios |= {name: RatioFigure(value=1.0, low=1.0, high=1.0) for name in EXACT}
    ratios |= {"power_w": around(1.004, 0.006), "latency_p99_ms": around(slower * 1.02, 0.2)}
    return {name: compared(name, ratio, method=method) for name, ratio in ratios.items()}


def a_check(figure: str = CPU, limit: str = "at most 5 % more", verdict: Any = "pass", **changes: Any) -> Check:
    words = {"more": "max_increase", "less": "max_decrease", "points": "max_drop"}
    key = words.get(limit.rpartition(" ")[2], "min" if limit.startswith("at least") else "max")
    facts: dict[str, Any] = {"key": key, "reason": "well within the limit", "decided_by": None}
    return Check(figure=figure, limit=limit, verdict=verdict, **{**facts, **changes})


def a_gate_side(label: str, **changes: Any) -> GateSide:
    facts: dict[str, Any] = {
        "path": f"/builds/{label}/resnet20-cpu", "kind": "bundle", "commit": "0d12cd6f5c1e8a77aa", "target": "cpu",
        "digest": "sha256:" + "3f" * 32, "execution_precision": "bf16",
        "operating_point": {"scenario": "single-stream", "batch": 1, "threads": None, "streams": 1},
    }  # fmt: skip
    return GateSide(label=label, **{**facts, **changes})


def a_compared_accuracy(**changes: Any) -> ComparedAccuracy:
    facts: dict[str, Any] = {
        "metric": "top1", "unit": "fraction", "n": 1017, "base": 0.9164, "head": 0.9154, "drop": 0.10, "low": -0.2,
        "high": 0.4, "flips_lost": 12, "flips_gained": 11, "p_value": 1.0,
    }  # fmt: skip
    return ComparedAccuracy(**{**facts, **changes})


ENERGY = {
    "method": "counter", "boundary": "package", "how": "RAPL energy counters: package-0",
    "source": "Linux powercap, /sys/class/powercap", "uncertainty": "measured, not modelled, since Haswell",
    "window_s": 10.02, "refresh_s": 0.001, "least_refreshes": 9_870, "n": 16, "missing": [],
    "idle_policy": "gross is the headline; above idle = gross − idle power × time",
    "idle_state": "models loaded, their processes asleep", "idle_power_w": 1.7,
    "meter_overhead": {"cpu_s": 0.0021, "share_of_one_cpu": 0.00002},
    "rules": "quick: shorter than MLPerf's 600 s; --profile long follows its rules",
}  # fmt: skip
MODELLED = {
    "method": "modelled", "boundary": "package", "how": "CPU seconds × 2.50 W for one busy core",
    "source": "https://example.org/datasheet", "uncertainty": "a factor of 1.5",
    "uncertainty_factor": 1.5, "window_s": 0.15, "refresh_s": None,
    "least_refreshes": None, "n": 96, "missing": [], "idle_policy": "gross is the headline",
    "idle_state": "models loaded, their processes asleep", "idle_power_w": 0.0,
    "meter_overhead": {"cpu_s": 0.0, "share_of_one_cpu": 0.0},
}  # fmt: skip
NO_ENERGY = {
    "method": "unavailable", "boundary": None, "how": "no energy counter, and Foo 1 is not in the power table",
    "source": None, "uncertainty": None, "refresh_s": None, "n": 0, "meter_overhead": {"cpu_s": 0.0, "share_of_one_cpu": None},
}  # fmt: skip
MACHINE = {
    "fingerprint": {
        "vendor": "AuthenticAMD", "family": 25, "name": "AMD EPYC 9B14", "cpus": 2, "memory_gib": 16,
        "isa": ["avx2", "avx512_vnni"], "gpus": [], "cpu_limit": None,
    },
    "digest": "9c1f02ab77de",
    "facts": {"virtualised": True, "load_average": [0.2, 0.1, 0.1], "governor": None, "frequency_mhz": None},
}  # fmt: skip
MEASURING = {
    "scenario": "single-stream", "blocks": 24, "discarded": 1, "window_s": 0.15, "seconds": 61.2, "seed": 0,
    "inputs": "64 seeded random batches", "processes_per_side": 2, "protocol": "windows interleaved in ABBA blocks",
    "warm_up": {
        "base": {"seconds": 0.8, "slices": 12, "steady": True}, "head": {"seconds": 3.0, "slices": 58, "steady": False},
    },
    "probe": {
        "peak_tops": {"int8": 3.1}, "fraction_of_peak": {"int8": {"p5": 0.78, "median": 0.93}}, "n": 96,
        "blocks_discarded": 1, "rule": "a block whose probe fell below 70 % is discarded", "seconds": 1.9,
    },
}  # fmt: skip


def a_gate(verdict: Any = "pass", **changes: Any) -> GateReport:
    """A gate with the given verdict; `changes` replace top-level fields."""
    facts: dict[str, Any] = {
        "perwatt_version": "0.1.0",
        "created": "2026-05-04T10:11:12Z",
        "seconds": 94.3,
        "verdict": verdict,
        "reason": "every limit holds",
        "exit_code": EXIT_CODES[verdict],
        "name": "resnet20",
        "base": a_gate_side("git:origin/main", from_cache=True),
        "head": a_gate_side("working tree", commit="548d3c8f00ba", dirty=True),
        "checks": [
            a_check(),
            a_check(WATT, "at most 5 % less"),
            a_check("latency_p99_ms", "at most 20 ms"),
            a_check("accuracy", "loses at most 0.5 points"),
        ],
        "figures": all_figures(),
        "accuracy": a_compared_accuracy(),
        "disturbed": [],
        "machine": MACHINE,
        "measuring": MEASURING,
        "energy": ENERGY,
        "notes": ["the base was built from 0d12cd6"],
    }  # fmt: skip
    return GateReport(**{**facts, **changes})


def _reasons(checks: list[Check], verdict: str) -> str:
    """The gate's reason is those of the checks that have its verdict."""
    return "; ".join(dict.fromkeys(check.reason for check in checks if check.verdict == verdict))


def failed_gate(**changes: Any) -> GateReport:
    """11 % more CPU time where 5 % is allowed; inferences per joule fail with it."""
    checks = [
        a_check(verdict="fail", reason="CPU time per inference is 1.110× the base's [1.080, 1.140]"),
        a_check(WATT, "at most 5 % less", "fail", reason="inferences per joule is 0.901× the base's [0.871, 0.931]"),
        a_check("latency_p99_ms", "at most 20 ms"),
        a_check("accuracy", "loses at most 0.5 points"),
    ]
    facts: dict[str, Any] = {"reason": _reasons(checks, "fail"), "checks": checks, "figures": all_figures(1.11)}
    return a_gate("fail", **{**facts, **changes})


def inconclusive_gate(**changes: Any) -> GateReport:
    """The interval holds the limit."""
    checks = [
        a_check(
            verdict="inconclusive",
            reason="CPU time per inference is 1.040× the base's [0.980, 1.100]: the interval holds the limit",
        ),
        a_check("accuracy", "loses at most 0.5 points"),
    ]
    figures = {**all_figures(), CPU: compared(CPU, around(1.04, 0.06), floor=0.05)}
    facts: dict[str, Any] = {"reason": _reasons(checks, "inconclusive"), "checks": checks, "figures": figures}
    return a_gate("inconclusive", **{**facts, **changes})


def modelled_gate(slower: float = 1.01, verdict: Any = "pass", **changes: Any) -> GateReport:
    """Joules are only modelled: CPU seconds decide their limit."""
    reason = f"CPU time per inference is {slower:.3f}× the base's [{slower - 0.03:.3f}, {slower + 0.03:.3f}]"
    facts: dict[str, Any] = {
        "reason": "every limit holds" if verdict == "pass" else reason,
        "checks": [a_check(WATT, "at most 5 % less", verdict, decided_by=CPU, reason=reason)],
        "figures": all_figures(slower, method="modelled"),
        "energy": MODELLED,
    }
    return a_gate(verdict, **{**facts, **changes})


def gate_without_accuracy(**changes: Any) -> GateReport:
    """No labelled samples: the accuracy limit is open, and its figure missing."""
    reason = "no samples that accuracy could be judged on: give --eval"
    facts: dict[str, Any] = {
        "reason": reason,
        "checks": [a_check(), a_check("accuracy", "loses at most 0.5 points", "inconclusive", reason=reason)],
        "accuracy": None,
    }
    return a_gate("inconclusive", **{**facts, **changes})


def disturbed_gate(**changes: Any) -> GateReport:
    """Others took CPU time in the middle of it."""
    disturbed = [
        "other processes used 31 % of the machine during the windows",
        "the hypervisor took 4 % of the CPU time asked for (steal)",
    ]
    return inconclusive_gate(disturbed=disturbed, **changes)


def unmeasurable_gate(**changes: Any) -> GateReport:
    """One side can't be measured again: no figure of it, no ratio, and no joules either."""
    missing = RatioFigure(value=None)
    reason = "CPU time per inference was not measured on both sides"
    facts: dict[str, Any] = {
        "reason": reason,
        "checks": [a_check(verdict="inconclusive", reason=reason)],
        "figures": {
            CPU: ComparedFigure(unit="s", base=None, head=130e-6, ratio=missing, n=0),
            WATT: ComparedFigure(unit="1/J", base=None, head=None, ratio=missing, method="unavailable"),
        },
        "accuracy": None,
        "energy": NO_ENERGY,
    }
    return a_gate("inconclusive", **{**facts, **changes})


GATES = {
    "pass": a_gate,
    "fail": failed_gate,
    "inconclusive": inconclusive_gate,
    "modelled": modelled_gate,
    "without_accuracy": gate_without_accuracy,
    "disturbed": disturbed_gate,
    "unmeasurable": unmeasurable_gate,
}


# Benchmarks -------------------------------------------------------------------------------------------------------


def a_figure(name: str, value: float | None, *, method: Any = "counter", n: int = 24) -> Figure:
    measured = value is not None and name not in EXACT
    low, high = bounds(value, 0.012) if measured and value is not None else (None, None)
    labelled = name in OF_ENERGY
    return Figure(
        value=value, unit=UNITS[name], low=low, high=high, n=n, method=method if labelled else None,
        boundary="package" if labelled and method != "unavailable" else None,
    )  # fmt: skip


def a_subject(
    label: str, speed: float = 1.0, *, first: bool = False, method: Any = "counter", **changes: Any
) -> Subject:
    """A subject that is `speed` times as fast as the base figures."""
    ups = {WATT, "throughput_per_s"}
    same = {"power_w", *EXACT}
    scale = {name: 1.0 if name in same else speed if name in ups else 1 / speed for name in BASE}
    gone = method == "unavailable"
    found = {
        name: a_figure(name, None if gone and name in OF_ENERGY else value * scale[name], method=method)
        for name, value in BASE.items()
        if name not in EXACT
    }
    ratios = {
        name: RatioFigure(value=None) if found[name].value is None else around(scale[name], 0.02) for name in found
    }
    facts: dict[str, Any] = {
        "path": f"/models/{label}", "kind": "bundle", "target": "cpu", "scenario": "single-stream",
        "operating_point": {"batch": 1, "threads": None, "streams": 1}, "execution_precision": "bf16",
        "size_bytes": 1_090_000, "peak_memory_bytes": 182_000_000,
        "warm_up": {"seconds": 0.8, "slices": 12, "steady": True}, "figures": found, "ratio_to_first": {} if first else ratios,
    }  # fmt: skip
    return Subject(label=label, **{**facts, **changes})


def some_traffic(**changes: Any) -> Traffic:
    facts: dict[str, Any] = {
        "rate_per_s": 10.0, "seconds": 60.0, "requests": 603,
        "energy_j_per_request": Figure(
            value=0.171, unit="J", low=0.169, high=0.173, n=6, method="counter", boundary="package"
        ),
        "above_idle_j_per_request": Figure(
            value=0.001, unit="J", low=0.0009, high=0.0011, n=6, method="counter", boundary="package"
        ),
        "idle_j_per_request": Figure(value=0.17, unit="J", n=1, method="counter", boundary="package"),
        "power_w": Figure(value=1.72, unit="W", low=1.70, high=1.74, n=6, method="counter", boundary="package"),
        "idle_power_w": Figure(value=1.70, unit="W", low=1.69, high=1.71, n=6, method="counter", boundary="package"),
        "latency_p50_ms": 0.21, "latency_p99_ms": 0.52, "utilisation": 0.0012, "sustained": True,
        "kwh_per_million": 0.0475, "cost_per_million": 0.0142, "currency": "EUR", "price_per_kwh": 0.3,
    }  # fmt: skip
    return Traffic(**{**facts, **changes})


def some_capacity(**changes: Any) -> Capacity:
    facts: dict[str, Any] = {
        "rate_per_s": 4120.0, "bound_ms": 5.0, "percentile": 99.0, "tries": [{"rate_per_s": 8000.0, "held": False}],
        "ended": "the bracket is within 3 %", "latency_ms": 4.31, "utilisation": 0.62,
        "energy_j_per_request": Figure(
            value=412e-6, unit="J", low=409e-6, high=415e-6, n=3, method="counter", boundary="package"
        ),
    }  # fmt: skip
    return Capacity(**{**facts, **changes})


def a_bench(*subjects: Subject, **changes: Any) -> BenchReport:
    """A benchmark of `subjects`, of two if none are given."""
    found = list(subjects) or [a_subject("resnet20.onnx", first=True), a_subject("resnet20-int8", 1.62)]
    facts: dict[str, Any] = {
        "perwatt_version": "0.1.0", "created": "2026-05-04T10:11:12Z", "seconds": 64.0, "profile": "quick",
        "subjects": found, "noise_floor": {name: 0.015 for name in BASE if name not in EXACT}, "disturbed": [],
        "machine": MACHINE,
        "measuring": {**MEASURING, "warm_up": {}},
        "energy": ENERGY,
        "notes": [],
    }  # fmt: skip
    return BenchReport(**{**facts, **changes})
