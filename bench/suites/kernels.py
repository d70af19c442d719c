"""Each kernel of perwatt beside the best existing alternative, and beside this machine's memory bandwidth.

    python kernels.py [--kernels int4,…] [--rounds 15] [--seconds 0.2] [--cuda] [--quick]

A kernel's cases stand in `_kernels_<name>.py`, which has a function `cases()`. Every contender runs in this process, on one
thread and on the same arrays, in a new random order each round, for about `--seconds` a turn; figures are CPU seconds of a
call (user + system, all threads), ratios are taken within rounds, with their 95 % intervals. What the others make is
compared with what ours makes first.

Wanted of every case: at least 3 × fewer CPU seconds than the best of the others (the low end of the interval), or at least
80 % of the bandwidth measured here: bytes that have to be read and written at least, a second, beside those of the fastest copy
of an array of the same size, in the same rounds. `--cuda` does the same on a GPU, in wall seconds, because there the device does
the work. Writes bench/results/kernels.json (kernels left out stay as they were), exits 1 where something wanted was missed;
`--quick` tries it out: 3 short rounds, nothing written.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

# Before NumPy, torch and ONNX Runtime are loaded: each reads its number of threads once.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")

import numpy as np
from _kernel_case import Case, Run

from perwatt.bench.fingerprint import fingerprint
from perwatt.bench.statistics import figure_interval, paired_ratio

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "bench" / "results" / "kernels.json"
OTHERS_AT_LEAST, BANDWIDTH_AT_LEAST = 3.0, 0.8
COPY = "copy of as many bytes"


def names() -> list[str]:
    """Kernels that have cases."""
    return sorted(path.stem.removeprefix("_kernels_") for path in HERE.glob("_kernels_*.py"))


def copying(moved_bytes: int) -> Run:
    """The fastest copy that reads and writes this many bytes in all: `np.copyto`, which is memcpy."""
    source = np.ones(moved_bytes // 2, np.uint8)
    target = np.empty_like(source)
    return lambda: np.copyto(target, source)


def per_call(run: Run, seconds: float, clock: Any) -> float:
    """Seconds of `clock` for one call, over about `seconds` of wall time and at least one call."""
    count, start, begun = 0, time.perf_counter(), clock()
    while True:
        run()
        count += 1
        if time.perf_counter() - start >= seconds:
            return float((clock() - begun) / count)


def measured(contenders: dict[str, Run], rounds: int, seconds: float, clock: Any) -> dict[str, list[float]]:
    """Every contender once a round, in random order."""
    order, found = random.Random(0), {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name in order.sample(sorted(contenders), len(contenders)):
            found[name].append(per_call(contenders[name], seconds, clock))
    return found


def told(case: Case, found: dict[str, list[float]], unit: str) -> dict[str, Any]:
    """What a case showed, and whether that is what was wanted."""
    mine = found.pop("ours")
    copy = found.pop(COPY, None)
    cost = {name: figure_interval(values) for name, values in {"ours": mine, **found}.items()}
    ratios = {name: paired_ratio(values, mine) for name, values in found.items()}
    best = min(ratios, key=lambda name: ratios[name].value or np.inf, default=None)
    bandwidth = None if copy is None else paired_ratio(copy, mine)
    times = best is not None and (ratios[best].low or 0) >= OTHERS_AT_LEAST
    return {
        "kernel": case.kernel,
        unit: {name: {"value": value, "low": low, "high": high} for name, (value, low, high) in cost.items()},
        "others_to_ours": {name: {"value": r.value, "low": r.low, "high": r.high} for name, r in ratios.items()},
        "best_other": best,
        "moved_bytes": case.moved_bytes,
        "share_of_bandwidth": None
        if bandwidth is None
        else {"value": bandwidth.value, "low": bandwidth.low, "high": bandwidth.high},
        "holds": bool(times or (bandwidth is not None and (bandwidth.value or 0) >= BANDWIDTH_AT_LEAST)),
    }


def on_cpu(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    """A case on this machine's CPU."""
    mine = case.ours()
    for name, other in case.others.items():
        try:
            case.same(mine, other())
        except AssertionError as error:
            raise SystemExit(f"{case.title}: {name} makes something else: {error}") from error
    contenders = {"ours": case.ours, **case.others}
    if case.moved_bytes:
        contenders[COPY] = copying(case.moved_bytes)
    return told(case, measured(contenders, rounds, seconds, time.process_time), "cpu_s")


def on_gpu(case: Case, rounds: int, seconds: float) -> dict[str, Any] | None:
    """A case on the GPU, None where the kernel has no version for it."""
    if case.cuda is None:
        return None
    ours, others = case.cuda()
    mine = ours()
    for name, other in others.items():
        try:
            case.same(mine, other())
        except AssertionError as error:
            raise SystemExit(f"{case.title}, GPU: {name} makes something else: {error}") from error
    contenders = {"ours": ours, **others}
    if case.moved_bytes:
        contenders[COPY] = copying_on_gpu(case.moved_bytes)
    return told(case, measured(contenders, rounds, seconds, time.perf_counter), "wall_s")


def copying_on_gpu(moved_bytes: int) -> Run:
    """torch's own copy within the GPU's memory."""
    import torch

    source = torch.ones(moved_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return run


def words(figure: dict[str, float | None] | None) -> str:
    if figure is None or figure["value"] is None:
        return "–"
    return f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def table(results: dict[str, Any]) -> str:
    """All cases, as Markdown."""
    lines = [
        "| kernel | case | ours, ms | best other | × ours | share of bandwidth | holds |",
        "| --- |" + " --- |" * 6,
    ]
    for title, its in results.items():
        mine = (its.get("cpu_s") or its["wall_s"])["ours"]["value"]
        best = its["best_other"]
        times = words(its["others_to_ours"].get(best)) if best else "–"
        share = words(its["share_of_bandwidth"])
        answer = "yes" if its["holds"] else "**no**"
        lines.append(f"| {its['kernel']} | {title} | {1e3 * mine:.3f} | {best or '–'} | {times} | {share} | {answer} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=",".join(names()), help="which ones (default: all: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--cuda", action="store_true", help="on the GPU instead of the CPU")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    chosen = options.kernels.split(",")
    if unknown := sorted(set(chosen) - set(names())):
        parser.error(f"no kernel {unknown[0]!r}; there are {', '.join(names())}")
    rounds, seconds = (3, 0.02) if options.quick else (options.rounds, options.seconds)
    measure, part = (on_gpu, "cuda") if options.cuda else (on_cpu, "cpu")
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = {title: its for title, its in kept.get(part, {}).items() if its["kernel"] not in chosen}
    fresh: dict[str, Any] = {}
    for name in chosen:
        for case in importlib.import_module(f"_kernels_{name}").cases():
            if (found := measure(case, rounds, seconds)) is not None:
                fresh[case.title] = found
                print(table({case.title: found}).splitlines()[-1], file=sys.stderr, flush=True)
    kept[part] = dict(sorted((results | fresh).items(), key=lambda item: (item[1]["kernel"], item[0])))
    kept |= {f"machine_{part}": fingerprint(), "python": platform.python_version(), "numpy": np.__version__}
    if not options.quick:
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    print(table(fresh))
    raise SystemExit(0 if all(its["holds"] for its in fresh.values()) else 1)


if __name__ == "__main__":
    main()
