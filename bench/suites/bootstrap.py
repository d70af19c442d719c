"""The bootstrap kernel against `scipy.stats.bootstrap(method="percentile")`: 10,000 resamples of 1,000 pairs.

    python bootstrap.py [--rounds 15] [--seed 0]

All contenders run in one process, in a new random order each round; each figure is a contender's CPU seconds (of all threads)
and wall seconds for one whole bootstrap, each ratio the bootstrap interval of the log-ratios within rounds. scipy gets its
best: `vectorized=True`, logarithms taken beforehand, and the batch that costs it least, tried first (its default is all
resamples at once). Two ways to ask it: `pairs` resamples both columns (`paired=True`), as the claim says and as an interval of
any paired figure needs; `log_ratios` resamples one column of differences, which is what the kernel does, and half the work.

The claim is 15 × on pairs, in CPU seconds: exits 1 when the low end of that ratio is below 15 for the mean, or when the two
sides' intervals differ by more than Monte Carlo error. Everything else is recorded, wall seconds too, which say little where
others use the same cores. Writes bench/results/bootstrap.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import scipy
from scipy import stats

from perwatt.bench.machine import facts
from perwatt.bench.statistics import paired_ratio
from perwatt.kernels import bootstrap

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "bootstrap.json"
N, RESAMPLES, TRIM, WANTED = 1000, 10_000, 0.2, 15.0
BATCHES = (None, 3000, 1000, 300, 100, 30, 10)
SMALL = (6, 12, 40, 80)

Run = Callable[[int], Any]
Interval = tuple[float, float]


def data() -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of both sides' figures: windows that share their disturbances, five per cent apart."""
    chance = np.random.default_rng(0)
    disturbed = chance.normal(0, 0.3, N)
    return disturbed + chance.normal(-0.05, 0.05, N), disturbed + chance.normal(0, 0.05, N)


def kernel(values: np.ndarray, trim: float, threads: int | None) -> Run:
    """Our interval, as `perwatt.bench.statistics` takes it from the distribution, without the correction for few values."""

    def run(seed: int) -> Interval:
        low, high = np.quantile(bootstrap.compute(values, RESAMPLES, seed, trim, threads=threads), [0.025, 0.975])
        return float(low), float(high)

    return run


def scipys(columns: tuple[np.ndarray, ...], trim: float, batch: int | None) -> Run:
    """scipy's interval of the mean difference of two columns, or of the mean of one."""

    def statistic(*drawn: np.ndarray, axis: int) -> np.ndarray:
        difference = drawn[0] - drawn[1] if len(drawn) > 1 else drawn[0]
        return stats.trim_mean(difference, trim, axis=axis) if trim else np.mean(difference, axis=axis)

    def run(seed: int) -> Interval:
        found = stats.bootstrap(
            columns, statistic, paired=len(columns) > 1, vectorized=True, method="percentile", n_resamples=RESAMPLES,
            batch=batch, rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
        return float(found.low), float(found.high)

    return run


def timed(run: Run, seed: int) -> dict[str, Any]:
    """One bootstrap: its CPU and wall seconds, and what came out."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = run(seed)
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "interval": found}


def rounds(contenders: dict[str, Run], count: int, chance: random.Random) -> dict[str, list[dict[str, Any]]]:
    """Every contender once a round, in random order."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(count):
        order = list(contenders)
        chance.shuffle(order)
        for name in order:
            found[name].append(timed(contenders[name], number))
    return found


def best_batch(
    columns: tuple[np.ndarray, ...], trim: float, chance: random.Random
) -> tuple[int | None, dict[str, float]]:
    """The batch that costs scipy the fewest CPU seconds, and what all of them cost."""
    tried = rounds({str(batch): scipys(columns, trim, batch) for batch in BATCHES}, 2 if trim else 4, chance)
    cost = {name: median(entry["cpu_s"] for entry in entries) for name, entries in tried.items()}
    return min(BATCHES, key=lambda batch: cost[str(batch)]), cost


def ratio(slow: list[dict[str, Any]], quick: list[dict[str, Any]], figure: str) -> dict[str, float | None]:
    """How many times the seconds, within rounds."""
    found = paired_ratio([entry[figure] for entry in slow], [entry[figure] for entry in quick])
    return {"value": found.value, "low": found.low, "high": found.high}


def disagreement(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """Largest distance of the mean bounds of both sides, in standard errors from round to round: every round has a seed of
    its own, so this is the Monte Carlo error, measured."""
    worst = 0.0
    for bound in (0, 1):
        a, b = (np.array([entry["interval"][bound] for entry in side]) for side in (ours, theirs))
        worst = max(worst, abs(a.mean() - b.mean()) / math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a)))
    return float(worst)


def versus_scipy(trim: float, count: int, chance: random.Random) -> dict[str, Any]:
    """The kernel as it comes (on one thread here) and on all, scipy in both ways, with its best batch and its default."""
    ours, theirs = data()
    ways: dict[str, tuple[np.ndarray, ...]] = {"pairs": (ours, theirs), "log_ratios": (ours - theirs,)}
    batches = {way: best_batch(columns, trim, chance) for way, columns in ways.items()}
    contenders = {
        "kernel": kernel(ours - theirs, trim, None),
        "kernel, all threads": kernel(ours - theirs, trim, os.cpu_count()),
    }
    for way, columns in ways.items():
        contenders[f"scipy {way}"] = scipys(columns, trim, batches[way][0])
        contenders[f"scipy {way}, default batch"] = scipys(columns, trim, None)
    for run in contenders.values():
        run(0)
    found = rounds(contenders, count, chance)
    return {
        "trim": trim,
        "batch": {way: batch for way, (batch, _) in batches.items()},
        "batches_cpu_s": {way: cost for way, (_, cost) in batches.items()},
        "seconds": {
            name: {figure: median(entry[figure] for entry in entries) for figure in ("cpu_s", "wall_s")}
            for name, entries in found.items()
        },
        "times_kernel": {
            name: {figure: ratio(found[name], found["kernel"], figure) for figure in ("cpu_s", "wall_s")}
            for name in found if name.startswith("scipy")
        },
        "intervals": {name: found[name][0]["interval"] for name in ("kernel", "scipy pairs", "scipy log_ratios")},
        "intervals_apart_in_standard_errors": disagreement(found["kernel"], found["scipy pairs"]),
    }  # fmt: skip


def versus_reference(count: int, chance: random.Random) -> list[dict[str, Any]]:
    """What `best` weighs: NumPy against the kernel on the few values of a real run, and what loading the kernel costs."""
    found = []
    for n in SMALL:
        values = data()[0][:n]
        sides: dict[str, Run] = {
            "reference": lambda seed, values=values: bootstrap.reference(values, RESAMPLES, seed, TRIM),
            "kernel": lambda seed, values=values: bootstrap.compute(values, RESAMPLES, seed, TRIM),
        }
        cost = rounds(sides, count, chance)
        cpu = {name: median(entry["cpu_s"] for entry in entries) for name, entries in cost.items()}
        found.append(
            {"n": n, "trim": TRIM, "cpu_s": cpu, "times_kernel": ratio(cost["reference"], cost["kernel"], "cpu_s")}
        )
    return found


def load_cpu_s(count: int = 5) -> float:
    """CPU seconds to import Numba and load the cached kernel in a fresh process."""
    script = (
        "import time, numpy; from perwatt.kernels import bootstrap; start = time.process_time(); "
        "bootstrap.compute([1.0, 2.0], 1, 0); print(time.process_time() - start)"
    )
    said = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(count)
    ]
    return median(float(done.stdout) for done in said)


def main() -> None:
    """Measure, write, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    import numba

    compared = {
        name: versus_scipy(trim, options.rounds, chance) for name, trim in (("mean", 0.0), ("trimmed_mean", TRIM))
    }
    conditions = facts()
    lowest = compared["mean"]["times_kernel"]["scipy pairs"]["cpu_s"]["low"]
    apart = max(side["intervals_apart_in_standard_errors"] for side in compared.values())
    good = lowest >= WANTED and apart < 4
    result = {
        "resamples": RESAMPLES, "n": N, "rounds": options.rounds, "wanted": WANTED, "lowest": lowest, "good": good,
        **compared,
        "few_values": versus_reference(options.rounds, chance),
        "load_cpu_s": load_cpu_s(),
        "machine": {
            "processor": conditions["processor"], "cpus": os.cpu_count(), "system": platform.system(),
            "load_average": conditions["load_average"],
        },
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "numba": numba.__version__,
                     "scipy": scipy.__version__},
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for name, side in compared.items():
        for contender, times in side["times_kernel"].items():
            words = [f"{times[f]['value']:.1f} × ({times[f]['low']:.1f} to {times[f]['high']:.1f})" for f in times]
            print(f"{name:12} {contender:34} {words[0]:26} CPU seconds, {words[1]:26} wall seconds")
        print(f"{name:12} intervals {side['intervals_apart_in_standard_errors']:.1f} standard errors apart")
    print(
        f"scipy takes at least {lowest:.1f} × the CPU seconds on pairs; wanted {WANTED:g}: {'holds' if good else 'FAILS'}"
    )
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
