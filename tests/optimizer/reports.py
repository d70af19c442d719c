"""Reports as a run would write them, for tests of what is shown: figures of a small convnet, int8 against float32."""

from __future__ import annotations

from typing import Any

from perwatt.report import (
    AccountReport,
    AccuracyReport,
    CandidateReport,
    ChangeReport,
    DriftFigures,
    DropFigure,
    EagerReport,
    Labelled,
    PassReport,
    RatioFigure,
    RatioFigures,
    Report,
    ShareReport,
    SideFigures,
)

JOULES_PER_CPU_S = 2.5


def labelled(value: float | None) -> Labelled:
    """A modelled figure; unavailable where `value` is None."""
    if value is None:
        return Labelled(value=None, method="unavailable", boundary=None)
    return Labelled(value=value, method="modelled", boundary="package")


def a_side(cpu_s: float, *, energy: bool = True, **changes: Any) -> SideFigures:
    """One side that takes `cpu_s` CPU seconds for an inference."""
    joules = cpu_s * JOULES_PER_CPU_S if energy else None
    figures: dict[str, Any] = {
        "cpu_s_per_inference": cpu_s,
        "throughput_per_s": 2 / cpu_s,
        "latency_p50_ms": cpu_s * 1e3,
        "latency_p99_ms": cpu_s * 1.4e3,
        "size_bytes": 1_090_000,
        "peak_memory_bytes": 182_000_000,
        "accuracy": 0.9164,
        "power_w": labelled(2 * JOULES_PER_CPU_S if energy else None),
        "energy_j_per_inference": labelled(joules),
        "throughput_per_watt": labelled(1 / joules if joules else None),
        "operating_point": {
            "scenario": "single-stream", "batch": 1, "threads": None, "streams": 1, "floating_precision": "bf16",
        },
        "execution_precision": "bf16",
    }  # fmt: skip
    return SideFigures(**{**figures, **changes})


def exact(value: float) -> RatioFigure:
    """A ratio of what is counted: low and high are the value."""
    return RatioFigure(value=value, low=value, high=value)


def ratios(speed: float, *, energy: bool = True, half: float = 0.04) -> RatioFigures:
    """Ratios of a side that is `speed` times as fast, with an interval of ± `half`."""

    def around(value: float, width: float) -> RatioFigure:
        return RatioFigure(value=value, low=value - width, high=value + width)

    faster, slower = around(speed, half), around(1 / speed, half / speed**2)
    missing = RatioFigure(value=None)
    return RatioFigures(
        cpu_s_per_inference=slower,
        throughput_per_s=faster,
        latency_p50_ms=slower,
        latency_p99_ms=around(1 / speed, 0.5),
        size_bytes=exact(310_000 / 1_090_000),
        peak_memory_bytes=exact(0.97),
        accuracy=exact(0.9154 / 0.9164),
        power_w=around(1.0, 0.01) if energy else missing,
        energy_j_per_inference=slower if energy else missing,
        throughput_per_watt=faster if energy else missing,
    )


def an_accuracy(**changes: Any) -> AccuracyReport:
    """Top-1 of int8 against float32 on 1,017 images."""
    facts: dict[str, Any] = {
        "metric": "top1", "unit": "fraction", "higher_is_better": True, "n": 1017, "n_unseen": 509,
        "original": 0.9164, "optimized": 0.9154, "drop": 0.10, "low": -0.2, "high": 0.4,
        "flips_lost": 12, "flips_gained": 11, "max_drop": 0.5, "original_as_run": 0.9159,
    }  # fmt: skip
    return AccuracyReport(**{**facts, **changes})


def a_pass(name: str, status: str, **changes: Any) -> PassReport:
    """A row of the ledger."""
    facts: dict[str, Any] = {
        "settings": {}, "reason": None, "changes": [], "drift": None, "drift_from_original": None, "seconds": 0.02,
        "size_bytes": None, "operators": None, "measured": None,
    }  # fmt: skip
    return PassReport(name=name, status=status, **{**facts, **changes})  # type: ignore[arg-type]


def some_passes() -> list[PassReport]:
    """One row of each status."""
    return [
        a_pass(
            "fold-batchnorm", "applied", changes=["folded 19 BatchNormalization into the Conv before them"],
            drift=DriftFigures(max_abs=3.1e-6, relative=1.4e-6), size_bytes={"before": 1_094_000, "after": 1_090_000},
            operators={"before": {"Conv": 19, "BatchNormalization": 19, "Relu": 19}, "after": {"Conv": 19, "Relu": 19}},
        ),
        a_pass("common-subexpression", "unchanged", reason="no two nodes compute the same"),
        a_pass("fold-constants", "refused", reason="the model has external data"),
        a_pass(
            "quantize-int8", "applied", settings={"exclude": ["/layer1/*"], "per_channel": True}, seconds=6.4,
            changes=["19 Conv to int8", "1 Gemm to int8", "38 Q/DQ pairs", "calibrated on 300 samples"],
            drift=DriftFigures(max_abs=0.31, relative=0.021),
            drift_from_original=DriftFigures(max_abs=0.31, relative=0.021),
            size_bytes={"before": 1_090_000, "after": 310_000},
            measured={
                "inferences_per_cpu_s_ratio": {"value": 1.62, "low": 1.58, "high": 1.66},
                "floating_precision": "bf16", "accuracy_drop": 0.1,
            },
        ),
        a_pass("remove-dead", "rolled-back", reason="drift 0.2 is above the tolerance 1e-05"),
        a_pass("cast-half", "not-chosen", reason="no faster than the backend's own bf16",
               measured={"inferences_per_cpu_s_ratio": {"value": 1.003, "low": 0.99, "high": 1.016}}),
    ]  # fmt: skip


def some_candidates() -> list[CandidateReport]:
    """What was considered."""
    return [
        CandidateReport(
            name="int8", passes=["fold-batchnorm", "quantize-int8"], floating_precision="bf16", verdict="shipped",
            reason="most inferences per joule within the budget",
            cpu_s_ratio=RatioFigure(value=0.62, low=0.6, high=0.64),
            throughput_ratio=RatioFigure(value=1.62, low=1.58, high=1.66), drop=0.1,
        ),
        CandidateReport(
            name="bf16", passes=["fold-batchnorm", "cast-half"], floating_precision="bf16", verdict="runner-up",
            reason="within budget, slower than int8", cpu_s_ratio=RatioFigure(value=0.99, low=0.97, high=1.01),
        ),
        CandidateReport(
            name="int8-everything", passes=["quantize-int8"], floating_precision=None, verdict="rejected",
            reason="loses 2.30 points, the budget is 0.5", drop=2.3,
        ),
    ]  # fmt: skip


def a_change(
    cost: float | None, half: float = 0.02, size: float = 1.0, drop: float | None = 0.0, **changes: Any
) -> ChangeReport:
    """One model ÷ another."""
    ratio = RatioFigure(value=cost) if cost is None else RatioFigure(value=cost, low=cost - half, high=cost + half)
    lost = None if drop is None else DropFigure(value=drop, low=drop - 0.2, high=drop + 0.3, n=508)
    facts = {"cost": ratio, "latency_p50_ms": ratio, "size_bytes": exact(size), "drop": lost, "reason": None}
    return ChangeReport(**{**facts, **changes})


def a_share(name: str, cost: float | None, verdict: str = "earns its keep", **changes: Any) -> ShareReport:
    """What one pass brings."""
    change = a_change(cost, reason=None if cost is not None else "the backend refused the model")
    facts = {"settings": [{}], "prefix": change, "alone_out": change, "why": f"{verdict}, measured", "needed_by": []}
    return ShareReport(name=name, verdict=verdict, **{**facts, **changes})  # type: ignore[arg-type]


def an_account(**changes: Any) -> AccountReport:
    """Pruned, taught back and quantized: 0.9 · 0.8 · 1 · 0.6 · 1 = 0.432 of the CPU seconds, 0.864 of those by the point."""
    facts: dict[str, Any] = {
        "cost_is": "CPU seconds per inference", "whole": a_change(0.432, size=0.2, drop=0.3), "point": a_change(0.864),
        "shares": [
            a_share("fold-batchnorm", 0.9),
            a_share("drop-blocks", 0.8, settings=[{"ratio": 0.1}, {"ratio": 0.111}], prefix=a_change(0.8, size=0.8, drop=9.1),
                    alone_out=a_change(0.81, drop=None, reason="accuracy: it would have to be learnt again")),
            a_share("recover", 1.0, "for accuracy", prefix=a_change(1.0, half=0.0, drop=-8.9), why="8.9 points better with it"),
            a_share("quantize-int8", 0.6, prefix=a_change(0.6, size=0.25, drop=0.1)),
            a_share("remove-dead", 1.0, "brings nothing"),
        ],
        "droppable": ["remove-dead"], "without_them": a_change(1.001), "dropped": True,
        "decision": "left out: without all of that an inference takes 1.00× [0.98, 1.02] the CPU seconds",
        "notes": [], "seconds": 93.1,
    }  # fmt: skip
    return AccountReport(**{**facts, **changes})


def a_trial(number: int, cost: float, drop: float | None = 0.1, **changes: Any) -> dict[str, Any]:
    """A trial of a search, as a report carries it."""
    facts: dict[str, Any] = {
        "number": number, "round": 1, "choice": f"drop-blocks 0.{number} on openvino in f32", "why": "by itself",
        "status": "measured", "reason": "", "ratios": {}, "objectives": [cost], "drop": drop, "n": 508, "p99_ms": 1.0,
        "memory_bytes": None, "size_bytes": 310_000, "missed": {}, "digest": "3f", "seconds": 4.0,
    }  # fmt: skip
    return {**facts, **changes}


def a_search(**changes: Any) -> dict[str, Any]:
    """Six trials: two on the front, one of them shipped; one was refused, two lost too much."""
    refused = {"status": "refused", "reason": "out of memory", "objectives": []}
    trials = [
        a_trial(0, 0.8, 0.0), a_trial(1, 0.432, 0.3), a_trial(2, 0.5, 0.4), a_trial(3, 0.3, 4.0, missed={"accuracy": 7.0}),
        a_trial(4, 0.2, 9.0, missed={"accuracy": 17.0}), a_trial(5, 9.9, None, **refused),
    ]  # fmt: skip
    facts = {"ended": "the time is up", "seconds": 542.0, "choices": 7840, "trials": trials, "front": [3, 1, 0],
             "shipped": 1, "objectives": ["inferences-per-joule"]}  # fmt: skip
    return {**facts, **changes}


def a_report(**changes: Any) -> Report:
    """A run that was worth it: int8 at 1.62 times the inferences per joule. `changes` replace top-level fields."""
    facts: dict[str, Any] = {
        "perwatt_version": "0.1.0",
        "created": "2026-05-04T10:11:12Z",
        "seconds": 41.3,
        "outcome": "optimized",
        "reason": "int8 clears the noise and stays within the budget",
        "model": {
            "name": "resnet20", "path": "resnet20.pt", "format": "torchscript", "digest": "sha256:" + "3f" * 32,
            "inputs": ["x:float32[batch,3,32,32]"], "outputs": ["y:float32[batch,10]"], "weights_bytes": 1_090_000,
        },
        "target": {
            "name": "cpu", "backend": "OpenVINO", "device": "AMD EPYC 9B14", "scenario": "single-stream", "batch": 1,
            "versions": {"openvino": "2026.4.0"},
        },
        "original": a_side(130e-6),
        "optimized": a_side(80.2e-6, size_bytes=310_000, peak_memory_bytes=176_540_000, accuracy=0.9154),
        "ratio": ratios(1.62),
        "ratio_graph": ratios(1.62),
        "accuracy": an_accuracy(),
        "torch_eager": EagerReport(
            version="2.11.0", cpu_s_per_inference=1.31e-3, throughput_per_s=1500, latency_p50_ms=0.66,
            cpu_s_ratio=RatioFigure(value=0.0612, low=0.06, high=0.0625),
        ),
        "passes": some_passes(),
        "candidates": some_candidates(),
        "energy": {
            "method": "modelled", "boundary": "package", "how": "CPU seconds × 2.50 W for one busy core",
            "source": "https://example.org/datasheet", "uncertainty": "a factor of 1.5",
        },
        "measuring": {"rounds": 12, "seconds": 9.8, "protocol": "interleaved windows of 0.25 s"},
        "data": {
            "synthetic": False, "samples": {"calibrate": 300, "select": 508, "evaluation": 1017}, "unseen": 509,
            "metric": None,
        },
        "notes": ["one dataset was given alone and split: 300 to calibrate, 1,017 to evaluate"],
        "last_word": None,
    }  # fmt: skip
    return Report(**{**facts, **changes})


def without_energy(**changes: Any) -> Report:
    """The same run on a machine where joules can't be had."""
    facts: dict[str, Any] = {
        "original": a_side(130e-6, energy=False),
        "optimized": a_side(80.2e-6, energy=False, size_bytes=310_000),
        "ratio": ratios(1.62, energy=False),
        "ratio_graph": ratios(1.62, energy=False),
        "energy": {"method": "unavailable", "boundary": None, "how": "no counter, and Foo 1 is not in the power table"},
    }
    return a_report(**{**facts, **changes})
