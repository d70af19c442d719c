"""Whether our figures agree with OpenVINO's own `benchmark_app`, both measured in one run, interleaved.

    python benchmark_app.py [MODEL] [--rounds 12] [--seconds 2] [--streams N] [--threads N] [--precision f32]

MODEL is an OpenVINO IR (.xml), a bundle, or an ONNX file, which is turned into an IR first; without one, the ResNet-20 in
PERWATT_DATA. Both sides run the same IR at batch 1, with the same streams, threads, requests and precision, on inputs
filled alike. In every round each side gets one window, in random order: `benchmark_app` a process of its own, we a worker
that is warm. Three figures are compared by paired ratios, ours ÷ theirs, with 95 % intervals: offline throughput,
single-stream throughput and single-stream median latency. Writes bench/results/benchmark_app.json; exit code 1 where a
ratio is more than 5 % from one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np

from perwatt.artifact import signature_from_json
from perwatt.bench.statistics import paired_figures, paired_ratio, percentile
from perwatt.contract import OperatingPoint
from perwatt.data import Samples
from perwatt.isolation import Worker
from perwatt.signature import Signature

RESULTS = models.ROOT / "bench" / "results" / "benchmark_app.json"
AGREES_WITHIN = 0.05
ITEMS = 4
"""`benchmark_app` runs every request on one input for ever, which stays in the cache: 64 inputs in turn cost a ResNet-20 4 %
of its rate, and with 64 the two would be asked different questions."""
APP = str(Path(sys.executable).parent / "benchmark_app")


def as_ir(model: Path, folder: Path, worker: Worker) -> Path:
    """The IR of a bundle, of an ONNX file, or `model` itself."""
    if model.is_dir():
        return model / "openvino" / "model.xml"
    if model.suffix == ".xml":
        return model
    worker.call("open", target="openvino", model=str(model), point=asdict(OperatingPoint()))
    worker.call("save", folder=str(folder))
    return folder / "model.xml"


def fixed_shapes(signature: Signature) -> dict[str, list[int]]:
    """Shapes at batch 1. Ends the program where another dimension is dynamic."""
    found = {}
    for spec in signature.inputs:
        dims = [1 if axis == 0 and isinstance(dim, str) else dim for axis, dim in enumerate(spec.shape or ())]
        if spec.shape is None or any(isinstance(dim, str) for dim in dims):
            sys.exit(f"benchmark_app.py: input {spec} has dimensions of no fixed size")
        found[spec.name] = [int(dim) for dim in dims]
    return found


def inputs(signature: Signature, folder: Path) -> Path:
    """Samples filled as `benchmark_app` fills its own: uniform between 0 and 255."""
    noise = np.random.default_rng(0)
    batches = [
        {
            spec.name: noise.uniform(0, 255, shape).astype(spec.dtype)
            for spec, shape in zip(signature.inputs, fixed_shapes(signature).values(), strict=True)
        }
        for _ in range(ITEMS)
    ]
    return Samples(batches, batch_size=1).save(folder)


def feeding(signature: Signature) -> list[str]:
    """Options that make `benchmark_app` feed what we feed: shapes at batch 1, and types as they are, because it feeds
    whatever looks like a picture as bytes."""
    shapes = ",".join(f"{name}[{','.join(map(str, dims))}]" for name, dims in fixed_shapes(signature).items())
    short = {"float": "f", "int": "i", "uint": "u", "bool": "bool"}
    types = [re.sub(r"^[a-z]+", lambda word: short[word[0]], spec.dtype) for spec in signature.inputs]
    named = ",".join(f"{spec.name}:{kind}" for spec, kind in zip(signature.inputs, types, strict=True))
    return ["-shape", shapes, "-iop", named]


def theirs(ir: Path, feeding: list[str], api: str, settings: Path, seconds: int) -> dict[str, float]:
    """One window of `benchmark_app`, with the very settings that our program was compiled with."""
    command = [APP, "-m", str(ir), "-d", "CPU", "-api", api, "-load_config", str(settings), "-t", str(seconds)]
    text = subprocess.run([*command, *feeding], capture_output=True, text=True).stdout
    # Count and duration rather than the throughput it prints, which is rounded.
    count, duration = (re.search(rf"{name}:\s+([0-9.]+)", text) for name in ("Count", "Duration"))
    latency = re.search(r"Median:\s+([0-9.]+) (ms|us)", text)
    if not (count and duration and latency):
        sys.exit(f"benchmark_app.py: benchmark_app did not measure:\n{text[-2000:]}")
    return {
        "throughput_per_s": float(count[1]) / float(duration[1]) * 1e3,
        "latency_p50_ms": float(latency[1]) * (1e-3 if latency[2] == "us" else 1.0),
    }


def ours(worker: Worker, seconds: int) -> dict[str, float]:
    """One window of the program that is open in `worker`."""
    window = worker.call("drive", seconds=float(seconds))
    return {
        # Calls, as their count is one of calls: the same as inferences unless the model's batch is fixed.
        "throughput_per_s": len(window["latencies_ms"]) / window["wall_s"],
        "latency_p50_ms": percentile(window["latencies_ms"], 0.5) or 0.0,
    }


def compare(point: OperatingPoint, figures: list[str], sides: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Windows of both sides in random order within each round; figures and their ratios."""
    order, found = random.Random(0), {name: [] for name in sides}
    for number in range(rounds):
        for name in order.sample(sorted(sides), len(sides)):
            found[name].append(sides[name]())
        print(f"{point.scenario}, round {number + 1} of {rounds}", flush=True)
    compared = {}
    for figure in figures:
        mine, other = ([window[figure] for window in found[name]] for name in ("ours", "benchmark_app"))
        ratio, (our_mean, their_mean) = paired_ratio(mine, other), paired_figures(mine, other)
        compared[figure] = {
            "ours": our_mean,
            "benchmark_app": their_mean,
            "ratio": asdict(ratio),
            "agrees": abs(ratio.value - 1) <= AGREES_WITHIN,
            "interval_within": max(1 - ratio.low, ratio.high - 1) <= AGREES_WITHIN,
        }
    return {"operating_point": point.to_json(), "rounds": rounds, "figures": compared}


def main() -> None:
    """Measure, tell, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("model", nargs="?", type=Path, default=models.resnet(20, "onnx", Path())[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=int, default=2, help="of one window (benchmark_app takes whole ones)")
    parser.add_argument("--streams", type=int, default=cpus, help="offline; single-stream has one")
    parser.add_argument("--threads", type=int, default=cpus)
    parser.add_argument("--precision", default="f32")
    options = parser.parse_args()
    points = [
        (OperatingPoint("offline", 1, options.threads, options.streams, options.precision), ["throughput_per_s"]),
        (
            OperatingPoint("single-stream", 1, options.threads, 1, options.precision),
            ["throughput_per_s", "latency_p50_ms"],
        ),
    ]
    with tempfile.TemporaryDirectory() as scratch, Worker("ours") as worker:
        folder = Path(scratch)
        ir = as_ir(options.model, folder, worker)
        signature = signature_from_json(worker.call("file_signature", target="openvino", path=str(ir))["signature"])
        samples = inputs(signature, folder / "samples")
        results: dict[str, Any] = {"model": options.model.name, "seconds": options.seconds, "cpus": cpus}
        results |= {"load_average_before": os.getloadavg()[0], "scenarios": {}}
        for point, figures in points:
            facts = worker.call(
                "open_file", target="openvino", path=str(ir), signature=asdict(signature), point=point.to_json()
            )
            worker.call("prepare", samples=str(samples), warm_up_s=1.0)
            results["device"] = facts["device"]
            settings = folder / f"{point.scenario}.json"
            settings.write_text(json.dumps({"CPU": {name: str(value) for name, value in facts["settings"].items()}}))
            api = "sync" if point.scenario == "single-stream" else "async"
            sides = {
                "ours": partial(ours, worker, options.seconds),
                "benchmark_app": partial(theirs, ir, feeding(signature), api, settings, options.seconds),
            }
            results["scenarios"][point.scenario] = compare(point, figures, sides, options.rounds)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    verdicts = []
    for scenario, found in results["scenarios"].items():
        for figure, told in found["figures"].items():
            ratio = told["ratio"]
            print(
                f"{scenario} {figure}: ours {told['ours']:.4g}, benchmark_app {told['benchmark_app']:.4g}, ratio "
                f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]: within 5 %: {told['agrees']}"
                + ("" if told["interval_within"] else ", but the interval reaches further: repeat on a quiet machine")
            )
            verdicts.append(told["agrees"])
    raise SystemExit(0 if all(verdicts) else 1)


if __name__ == "__main__":
    main()
