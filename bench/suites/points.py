"""Our operating points against OpenVINO's `benchmark_app` with its own defaults, on the same NNCF int8 models, interleaved.

    python points.py [--models resnet20,…] [--scenarios offline,single-stream] [--rounds 10] [--seconds 2] [--quick] [--reuse]

For each of the six models of architectures.py, three sides in one run, a window each in every round, in random order:

- `app`: `benchmark_app -hint throughput` (offline) or `-hint latency` (single-stream) on NNCF's int8 file, as a process of
  its own, at batch 1, with the types that the file asks for (it would feed pictures as bytes), its defaults otherwise;
- `point`: the same file through `perwatt.optimize(…, target="openvino", passes="")`: the operating point alone;
- `tool`: the float32 file through `perwatt.optimize(…, target="cpu")`: passes, backends and operating point.

And told beside: `app-ir`, `benchmark_app` on NNCF's int8 of the model as OpenVINO reads it, which is what many users of
OpenVINO have and `perwatt.optimize` does not take; for MobileNetV2 `half`, the float32 file in bf16 at the tool's point.

CPU seconds are user + system time of the whole process over its measuring loop alone, on both sides (see _app.py). Ratios
are ours ÷ theirs with 95 % intervals over the rounds. Where weights are random, accuracy says nothing and its budget is
left open, so that speed alone chooses. Each side runs on a few inputs for ever, as `benchmark_app` does, two calls' worth
(four at least).

Wanted: CPU seconds per inference ≤ 1.02 × theirs in offline, p50 ≤ 1.02 × theirs in single-stream, for `point` on every
model; geometric mean ≥ 1.3 × better in offline; and for MobileNetV2 `tool` chooses bf16 unless its choice is as cheap
(NNCF's int8 in the IR loses to bf16 by 1.3 ×, its int8 in ONNX, which the tool makes, does not). Prints a table in Markdown,
writes bench/results/points.json after each model (models that a run leaves out stay as they were), exits 1 where
something wanted is missed. `--quick` tries it out: 3 rounds of one second, nothing written. Told besides, for each program:
the share that it reaches of one core's peak, and the operators that hold it down.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import _app
import _operations
import architectures
import benchmark_app
import models
import numpy as np

import perwatt
from perwatt.bench.fingerprint import fingerprint
from perwatt.bench.statistics import paired_figures, paired_ratio, percentile
from perwatt.contract import OperatingPoint
from perwatt.data import Samples
from perwatt.isolation import Worker

RESULTS = models.ROOT / "bench" / "results" / "points.json"
HINTS = {"offline": "throughput", "single-stream": "latency"}
FIGURES = ("cpu_s_per_inference", "throughput_per_s", "latency_p50_ms")
DECIDES = {"offline": "cpu_s_per_inference", "single-stream": "latency_p50_ms"}
NOT_WORSE, GEOMETRIC_MEAN = 1.02, 1.3
HALF_WINS = "mobilenetv2"
"""Known to be faster in bf16 than in NNCF's int8 of the IR: here bf16 is measured beside, and the tool may not lose to it."""
TOP = 5


# Our sides ------------------------------------------------------------------------------------------------------------


def optimized(name: str, side: str, scenario: str, reuse: bool) -> perwatt.Bundle:
    """The bundle of that side, made now (or the one that is there, with `reuse`)."""
    files, what = architectures.built(name), architectures.ALL[name]
    out = architectures.FOLDER / "bundles" / f"{name}-{scenario}-{side}"
    if reuse and (out / "program.json").exists():
        return perwatt.Bundle(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"optimizing for {out.name}", file=sys.stderr, flush=True)
    options: dict[str, Any] = {"scenario": scenario, "out": out, "force": True}
    if side == "point":
        # Nothing is calibrated without passes; what is judged is the precision of what the file leaves in floating point.
        options |= {"data": files.samples} if what.real else {"data": files.samples, "max_drop": 100}
        return perwatt.optimize(files.int8, target="openvino", passes="", **options)
    if name == "resnet20":
        options |= {**models.cifar(), "normalize": "imagenet"}
    else:
        options |= {"data": files.samples} if what.real else {"data": files.samples, "max_drop": 100}
    return perwatt.optimize(files.fp32, target="cpu", **options)


def chosen(bundle: perwatt.Bundle) -> dict[str, Any]:
    """What a bundle ships, from its own report."""
    report, program = bundle.report, bundle.program
    shipped = [candidate for candidate in report["candidates"] if candidate["verdict"] == "shipped"]
    int8 = any("quantize-int8" in candidate["passes"] for candidate in shipped)
    precision = report["optimized"]["execution_precision"]
    return {
        "outcome": report["outcome"], "reason": report["reason"], "seconds": report["seconds"],
        "shipped": [candidate["name"] for candidate in shipped],
        "arithmetic": "int8" if int8 else {"bfloat16": "bf16", "float32": "f32"}.get(precision, precision),
        "considered": {c["name"]: {k: c[k] for k in ("verdict", "reason", "cpu_s_ratio")} for c in report["candidates"]},
        "target": program["target"], "operating_point": program["operating_point"],
    }  # fmt: skip


def feed(samples: Path, batch: int, folder: Path) -> Path:
    """Inputs for calls of `batch` items: two calls' worth, four items at least, taken round and round from `samples`."""
    with np.load(samples) as archive:
        arrays = {name: archive[name] for name in archive.files}
    count = max(4, 2 * batch)
    return Samples([{name: np.resize(array, (count, *array.shape[1:])) for name, array in arrays.items()}]).save(folder)


def opened(bundle: perwatt.Bundle, samples: Path, folder: Path, cleanup: ExitStack) -> Worker:
    """A worker that holds the bundle's program, warm."""
    program = bundle.program
    worker = cleanup.enter_context(Worker(bundle.path.name))
    # Files lie under the plain name of a target, its variant left out.
    where = bundle.path / program["target"].partition(":")[0]
    worker.call(
        "load", target=program["target"], folder=str(where), signature=program["signature"],
        point=program["operating_point"],
    )  # fmt: skip
    inputs = feed(samples, program["call_batch"] or 1, folder)
    worker.call("prepare", samples=str(inputs), warm_up_s=1.0, most_s=5.0)
    return worker


def half_precision(files: architectures.Files, tool: perwatt.Bundle, folder: Path, cleanup: ExitStack) -> Worker:
    """A worker that holds the float32 file in bf16, at the batch, threads and streams of the tool's bundle."""
    point = OperatingPoint(**tool.program["operating_point"])
    worker = cleanup.enter_context(Worker("half"))
    point = OperatingPoint(point.scenario, point.batch, point.threads, point.streams, "bf16")
    worker.call("open", target="openvino", model=str(files.fp32), point=point.to_json())
    worker.call("prepare", samples=str(feed(files.samples, point.batch, folder / "half")), warm_up_s=1.0, most_s=5.0)
    return worker


def our_window(worker: Worker, seconds: int) -> dict[str, float]:
    """One window of the program that is open in `worker`, which is idle again afterwards."""
    window = worker.call("drive", seconds=float(seconds))
    worker.call("settle")
    return {
        "cpu_s_per_inference": window["cpu_s"] / window["inferences"],
        "throughput_per_s": window["inferences"] / window["wall_s"],
        "latency_p50_ms": percentile(window["latencies_ms"], 0.5) or math.nan,
    }


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(name: str, scenario: str, options: argparse.Namespace, probes: list[dict[str, float]]) -> dict[str, Any]:
    """One model in one scenario: all sides interleaved, and what can be told of them."""
    files = architectures.built(name)
    bundles = {side: optimized(name, side, scenario, options.reuse) for side in options.sides}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as cleanup:
        samples = {"point": files.samples, "tool": files.samples}
        workers = {s: opened(b, samples[s], Path(scratch) / s, cleanup) for s, b in bundles.items()}
        signature = perwatt.read(files.int8).artifact.signature
        feeding = benchmark_app.feeding(signature)
        windows = {side: partial(our_window, worker, options.seconds) for side, worker in workers.items()}
        windows["app"] = partial(_app.app_window, files.int8, HINTS[scenario], feeding, options.seconds)
        windows["app-ir"] = partial(_app.app_window, files.ir, HINTS[scenario], feeding, options.seconds)
        if name == HALF_WINS and "tool" in bundles:
            half = half_precision(files, bundles["tool"], Path(scratch), cleanup)
            windows["half"] = partial(our_window, half, options.seconds)
        prober = cleanup.enter_context(Worker("probe"))
        found = interleaved(windows, options.rounds, lambda: probes.append(prober.call("probe")), f"{name} {scenario}")
    result: dict[str, Any] = {"app": {f: found["app"]["figures"][f] for f in FIGURES}}
    result |= {side: found[side] for side in ("app-ir", "half") if side in found}
    if "half" in found:
        result["half"]["tool_to_half"] = asdict(_ratio(found, "tool", "half"))
    operations = sum(_operations.count_operations(files.int8).values())
    for side, bundle in bundles.items():
        result[side] = {**chosen(bundle), **found[side], "operations_per_inference": operations}
        result[side]["operators"] = operators(bundle)
    return result


def interleaved(windows: dict[str, Any], rounds: int, between: Any, title: str) -> dict[str, Any]:
    """A window of every side in each round, in random order; figures, and ratios to `app`."""
    order, found = random.Random(0), {side: [] for side in windows}
    for number in range(rounds):
        between()
        for side in order.sample(sorted(windows), len(windows)):
            found[side].append(windows[side]())
        print(f"{title}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    told: dict[str, Any] = {}
    for side, its in found.items():
        told[side] = {"figures": {}, "ratios": {}, "windows": its}
        for figure in FIGURES:
            mine, theirs = ([window[figure] for window in of] for of in (its, found["app"]))
            told[side]["figures"][figure] = paired_figures(mine, theirs)[0]
            told[side]["ratios"][figure] = asdict(paired_ratio(mine, theirs))
    return told


def _ratio(found: dict[str, Any], mine: str, theirs: str) -> Any:
    """CPU seconds per inference of one side ÷ another's."""
    costs = [[window["cpu_s_per_inference"] for window in found[side]["windows"]] for side in (mine, theirs)]
    return paired_ratio(*costs)


def operators(bundle: perwatt.Bundle) -> list[dict[str, Any]] | None:
    """The operators that take most of a call's time; None for backends that don't tell."""
    model = bundle.path / "openvino" / "model.xml"
    if bundle.program["target"] != "openvino" or not model.exists():
        return None
    # A process of its own, which takes its threads and its memory with it.
    command = [sys.executable, _operations.__file__, str(model), json.dumps(bundle.program["operating_point"])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"operators of {bundle.path.name}: {done.stderr.strip()[-300:]}", file=sys.stderr)
        return None
    return list(json.loads(done.stdout))[:TOP]


def peaks(probes: list[dict[str, float]]) -> dict[str, Any]:
    """One core's peaks: what one thread reached in the probe (the best twentieth), and what AMX could do in theory."""
    reached = {kind: float(np.quantile([probe[kind] for probe in probes], 0.95)) for kind in (probes or [{}])[0]}
    ghz = _operations.clock_ghz()
    return {
        "probe_tops": reached,
        "clock_ghz": round(ghz, 3),
        "clock_from": "timing a chain of dependent instructions on one core, best of 2000 half milliseconds",
        "theoretical_tops": _operations.theoretical_tops(ghz, fingerprint()["isa"]),
    }


def add_shares(result: dict[str, Any], known: dict[str, Any]) -> None:
    """Which share of the peaks each program reaches: operations per CPU second, against one thread's peak. CPU seconds of
    two hardware threads of one core count twice, although they share its matrix unit: busy both, they can reach half."""
    for side in ("point", "tool"):
        for its in (scenario[side] for scenario in result.values() if side in scenario):
            kind = its["arithmetic"] if side == "tool" else "int8"
            tops = its["operations_per_inference"] / its["figures"]["cpu_s_per_inference"] / 1e12
            wall_tops = its["operations_per_inference"] * its["figures"]["throughput_per_s"] / 1e12
            its["reached"] = {"arithmetic": kind, "tops_per_cpu_second": tops, "tops": wall_tops}
            for name, source in (("of_probe", "probe_tops"), ("of_theoretical", "theoretical_tops")):
                peak = known[source].get(kind)
                its["reached"][name] = tops / peak if peak else None
                its["reached"][f"{name}_wall"] = wall_tops / peak if peak else None


# Telling --------------------------------------------------------------------------------------------------------------


def verdicts(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """What is wanted of the models that were measured, and whether it holds."""
    lines = []
    for scenario, figure in DECIDES.items():
        here = {name: found[scenario]["point"] for name, found in results.items() if "point" in found.get(scenario, {})}
        for name, its in here.items():
            ratio = its["ratios"][figure]["value"]
            lines.append(
                (
                    f"{name}, {scenario}: {figure} {ratio:.3f} × benchmark_app's (at most {NOT_WORSE})",
                    ratio <= NOT_WORSE,
                )
            )
        if scenario == "offline" and here:
            better = gain(here)
            lines.append((f"offline, {len(here)} models: {better:.2f} × fewer CPU seconds in the geometric mean "
                          f"(at least {GEOMETRIC_MEAN})", better >= GEOMETRIC_MEAN))  # fmt: skip
    for scenario, found in results.get(HALF_WINS, {}).items():
        if scenario == "offline" and "half" in found:
            took, ratio = found["tool"]["arithmetic"], found["half"]["tool_to_half"]["value"]
            line = f"{HALF_WINS}, {scenario}: the whole tool chose {took}, {ratio:.3f} × what bf16 takes (at most {NOT_WORSE})"
            lines.append((line, took == "bf16" or ratio <= NOT_WORSE))
    return lines


def gain(sides: dict[str, Any]) -> float:
    """Geometric mean of how many times fewer CPU seconds."""
    ratios = [its["ratios"]["cpu_s_per_inference"]["value"] for its in sides.values()]
    return math.exp(-sum(map(math.log, ratios)) / len(ratios))


def table(results: dict[str, Any]) -> str:
    """Everything as a table in Markdown."""
    lines = [
        "| model | scenario | side | ran as | CPU ms / inference | ÷ benchmark_app | p50 ms | ÷ benchmark_app "
        "| of the probe | of AMX in theory | operators that hold it down |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, scenarios in results.items():
        for scenario, sides in scenarios.items():
            app = sides["app"]
            figures = f"{1e3 * app['cpu_s_per_inference']:.3f} | 1 | {app['latency_p50_ms']:.3f} | 1"
            lines.append(f"| {name} | {scenario} | benchmark_app | -hint {HINTS[scenario]} | {figures} | | | |")
            for side, ran in (("app-ir", f"NNCF's IR, -hint {HINTS[scenario]}"), ("half", "float32 file in bf16")):
                if side in sides:
                    lines.append(_plain_row(name, scenario, side, ran, sides[side]))
            for side in (s for s in ("point", "tool") if s in sides):
                lines.append(_row(name, scenario, side, sides[side]))
    return "\n".join(lines)


def _plain_row(name: str, scenario: str, side: str, ran: str, its: dict[str, Any]) -> str:
    figures, ratios = its["figures"], its["ratios"]
    cells = [name, scenario, side, ran, f"{1e3 * figures['cpu_s_per_inference']:.3f}", _interval(ratios["cpu_s_per_inference"]),
             f"{figures['latency_p50_ms']:.3f}", _interval(ratios["latency_p50_ms"]), "", "", ""]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _row(name: str, scenario: str, side: str, its: dict[str, Any]) -> str:
    point, reached = its["operating_point"], its.get("reached", {})
    ran = (f"{its['target']}, {', '.join(its['shipped']) or its['outcome']}: batch {point['batch']}, {point['streams']} "
           f"streams, {point['threads']} threads, {point['floating_precision']}")  # fmt: skip
    held = "; ".join(f"{o['kernel']} ({o['layer']}) {o['share']:.0%}" for o in its["operators"] or ())
    figures, ratios = its["figures"], its["ratios"]
    shares = [f"{reached[key]:.0%}" if reached.get(key) else "–" for key in ("of_probe", "of_theoretical")]
    cells = [name, scenario, side, ran, f"{1e3 * figures['cpu_s_per_inference']:.3f}", _interval(ratios["cpu_s_per_inference"]),
             f"{figures['latency_p50_ms']:.3f}", _interval(ratios["latency_p50_ms"]), *shares, held or "not told"]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _interval(ratio: dict[str, float | None]) -> str:
    if ratio["low"] is None:
        return f"{ratio['value']:.3f}"
    return f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(architectures.ALL))
    parser.add_argument("--scenarios", default=",".join(HINTS))
    parser.add_argument("--sides", default="point,tool", help="point, tool or both")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=2, help="of one window (benchmark_app takes whole ones)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 1 s, and nothing is written")
    parser.add_argument("--reuse", action="store_true", help="take bundles of earlier runs where they are there")
    options = parser.parse_args()
    for words, known in (("models", architectures.ALL), ("scenarios", HINTS), ("sides", ("point", "tool"))):
        given = getattr(options, words).split(",")
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {words}: {', '.join(unknown)}; known are {', '.join(known)}")
        setattr(options, words, given)
    if options.quick:
        options.rounds, options.seconds = 3, 1
    return options


def main() -> None:
    """Measure, write, tell."""
    options = parsed()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.quick else {"models": {}}
    measured: dict[str, Any] = {}
    for name in options.models:
        probes: list[dict[str, float]] = []
        measured[name] = {s: measure(name, s, options, probes) for s in options.scenarios}
        add_shares(measured[name], found := peaks(probes))
        kept["models"][name] = {**kept["models"].get(name, {}), **measured[name]}
        kept |= {"machine": fingerprint(), "peaks": found, "rounds": options.rounds, "seconds": options.seconds}
        kept["load_average"] = os.getloadavg()[0]
        if not options.quick:
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    results = measured if options.quick else kept["models"]
    print(table(results))
    print()
    told = verdicts(results)
    print("\n".join(f"- {'holds' if holds else 'MISSED'}: {line}" for line, holds in told))
    for side in ("point", "tool"):
        if here := {n: r["offline"][side] for n, r in results.items() if side in r.get("offline", {})}:
            print(f"- {side}, offline: {gain(here):.2f} × fewer CPU seconds than benchmark_app in the geometric mean")
    raise SystemExit(0 if all(holds for _, holds in told) else 1)


if __name__ == "__main__":
    main()
