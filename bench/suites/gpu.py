"""perwatt's GPU backends against torch eager and plain `torch.compile`: accuracy, throughput, measured joules, one command.

    python gpu.py [--models resnet50,bert-base,vit-b16] [--batch 64] [--rounds 6] [--seconds 1.5] [--time 540]
    python gpu.py --device cpu --models tiny --batch 4 --rounds 2 --seconds 0.2      # tries every line without a GPU

Sides, each measured in every round in random order: torch eager in float32 and bf16, torch.compile in bf16 (all three copy
their inputs from pinned memory and their outputs back, as our programs do); `inductor:cuda` in float32, bf16, int8 and fp8
(the rest in bf16), with CUDA graphs and with two streams; `onnxruntime:cuda`, `onnxruntime:tensorrt` and `tensorrt` where
they are present. What is absent, or refuses, is named with its reason. int8 and fp8 are explicit Q/DQ around matrix
products (around convolutions too where the backend has such), with scales of the largest value seen.

Energy is NVML's, read in this process around each window (`--device cpu`: the modelled meter); idle power is told beside.
Accuracy: largest classes that agree with eager float32 on `--batch` samples and the relative error of the outputs; for the
trained `resnet20` (where PERWATT_DATA is) also top-1 on real pictures. Random weights say nothing about accuracy otherwise.

Compiling runs in workers, `--jobs` at once. `--time` is for the whole run: what is not compiled when a model's share is
over is left out by name. Results go to bench/results/gpu.json (`--out`) as they come, so that an interrupted run keeps
what it has; models that a run leaves out stay as they were. Exit codes: 1 when none of our programs was measured on some
model, 2 when nothing can be run here.

Wants perwatt importable (`pip install -e .`; without installing: `python -c 'import tasks; tasks.links()'` and
PYTHONPATH=.links), torch with CUDA and Triton, onnx, onnxscript, pydantic, nvidia-ml-py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before torch is imported: from here on CUDA and NVML give the GPUs the same numbers.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

try:
    import _gpu_models
    import models
    import numpy as np
    import torch
    from _gpu_torch import Side, torch_side

    import perwatt
    from perwatt.bench.meters import open_meter
    from perwatt.bench.statistics import figure_interval, paired_ratio, percentile
    from perwatt.contract import OperatingPoint
    from perwatt.data import Samples
    from perwatt.isolation import Worker
    from perwatt.measurement import Window
    from perwatt.worker import load_outputs
except ImportError as missing:
    print(f"gpu.py can't be run here: {missing}", file=sys.stderr)
    raise SystemExit(2) from None

DEFAULT = ("resnet50", "bert-base", "vit-b16")
BASES = ("eager bf16", "torch.compile bf16")
"""What ours are compared with."""
FEEDS = 4
"""Different calls that a window goes through."""
FIGURES = ("throughput_per_s", "energy_j_per_inference", "cpu_s_per_inference", "latency_p50_ms")
WARM_UP_S, IDLE_S = 1.0, 2.0


# Ours -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """A program to make: which file (float, int8, int8+conv, fp8) on which target at which point."""

    label: str
    target: str
    file: str
    point: dict[str, Any]


def wanted(device: str, convolutions: bool) -> list[Wanted]:
    """In order of what matters most, because time may end before all are compiled. Those that differ in graphs and streams
    alone share one compilation, so they come right after it."""
    if device == "cpu":
        return [
            Wanted("inductor f32", "inductor", "float", {"floating_precision": "f32"}),
            Wanted("inductor int8", "inductor", "int8+conv", {"floating_precision": "f32"}),
            Wanted("onnxruntime f32", "onnxruntime", "float", {}),
            Wanted("tensorrt f32", "tensorrt", "float", {}),
        ]
    bf16 = {"floating_precision": "bf16"}
    found = [
        Wanted(f"inductor {name}{suffix}", "inductor:cuda", file, {**bf16, **extra})
        for suffix, extra in (("", {}), (" graphs", {"graphs": True}), (" graphs, 2 streams", {"graphs": True, "streams": 2}))
        for name, file in (("bf16", "float"), ("int8", "int8"), ("fp8", "fp8"))
    ]  # fmt: skip
    found.append(Wanted("inductor f32", "inductor:cuda", "float", {"floating_precision": "f32"}))
    for target in ("onnxruntime:cuda", "onnxruntime:tensorrt", "tensorrt"):
        found.append(Wanted(f"{target} float", target, "float", {}))
        found.append(Wanted(f"{target} int8", target, "int8+conv" if convolutions else "int8", {}))
    return found


def absent(targets: list[str]) -> dict[str, str]:
    """Why targets can't be used here, by name; those that can are not in it."""
    found = {}
    with Worker("targets") as worker:
        for target in targets:
            try:
                reasons = worker.call("target", name=target)["missing"]
            except perwatt.PerwattError as error:
                reasons = [str(error)]
            if reasons:
                found[target] = "; ".join(reasons)
    return found


def our_side(
    asked: Wanted, worker: Worker, model: Path, samples: Path, batch: int, folder: Path, turn: threading.Lock
) -> Side:
    """A program of ours, compiled and warm, in its worker. `turn` is shared by those that share a compilation: the first
    compiles, the others find it in the cache."""
    point = OperatingPoint(scenario="offline", batch=batch, **asked.point)
    with turn:
        facts = worker.call("open", target=asked.target, model=str(model), point=point.to_json(), timeout_s=900)
    worker.call("prepare", samples=str(samples), warm_up_s=WARM_UP_S)

    def predict() -> np.ndarray:
        where = folder / f"out-{asked.label}".replace(" ", "-")
        worker.call("predict", samples=str(samples), out=str(where))
        return np.concatenate([next(iter(batch.values())) for batch in load_outputs(where)]).astype(np.float32)

    drive = lambda seconds: Window(**worker.call("drive", seconds=seconds))  # noqa: E731
    return Side(asked.label, drive, predict, worker.close, facts)


def files(name: str, net: Any, arrays: dict[str, np.ndarray], folder: Path, kinds: set[str]) -> dict[str, Path]:
    """The ONNX files that are wanted, by kind; scales come from the numeric reference on a few samples."""
    import onnx

    found = {"float": _gpu_models.as_onnx(net, name, folder)}
    if kinds <= {"float"}:
        return found
    model = onnx.load(found["float"])
    operators = {"int8": ("MatMul", "Gemm"), "int8+conv": ("Conv", "MatMul", "Gemm"), "fp8": ("MatMul", "Gemm")}
    taps = sorted({node.input[0] for node in _gpu_models.products(model, operators["int8+conv"])})
    few = Samples([_by_position(found["float"], {key: array[:8] for key, array in arrays.items()})], batch_size=8)
    given = {value.name for value in model.graph.input}
    largest = {key: float(np.abs(array).max()) for key, array in few.chunks[0].items()}
    with Worker("reference") as worker:
        worker.call(
            "reference", model=str(found["float"]), samples=str(few.save(folder / "few")),
            out=str(folder / "taps"), taps=[tap for tap in taps if tap not in given],
        )  # fmt: skip
    for batch in load_outputs(folder / "taps"):
        largest |= {tap: float(np.abs(array).max()) for tap, array in batch.items() if tap in taps}
    for kind in sorted(kinds - {"float"}):
        out = folder / f"{name}-{kind}.onnx"
        found[kind] = _gpu_models.quantized(found["float"], largest, kind.split("+")[0], operators[kind], out)
    return found


def _by_position(model: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays under the names that the model gives its inputs: exporters have their own."""
    import onnx

    names = [value.name for value in onnx.load(model, load_external_data=False).graph.input]
    return dict(zip(names, arrays.values(), strict=True))


# One model ------------------------------------------------------------------------------------------------------------


class Run:
    """Everything about one model: opens sides, measures them, and writes after each step."""

    def __init__(
        self, name: str, options: argparse.Namespace, meter: Any, deadline: float, write: Callable[[Any], None]
    ):
        self.name, self.options, self.meter, self.deadline = name, options, meter, deadline
        self.told: dict[str, Any] = {"batch": options.batch, "sides": {}, "left_out": {}}
        self.write = lambda: write(self.told)
        self.windows: dict[str, list[Window]] = {}
        self.expected: np.ndarray | None = None

    def go(self, missing: dict[str, str]) -> dict[str, Any]:
        net = _gpu_models.network(self.name)
        arrays, self.labels = _gpu_models.inputs(self.name, FEEDS * self.options.batch)
        convolutions = any(isinstance(part, torch.nn.Conv2d) for part in net.modules())
        asked = []
        for one in wanted(self.options.device, convolutions):
            if one.target in missing:
                self.told["left_out"][one.label] = missing[one.target]
            else:
                asked.append(one)
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as cleanup:
            folder = Path(scratch)
            sides = self._opened(net, arrays, asked, folder, cleanup)
            self._measured(sides)
        return self.told

    def _opened(
        self, net: Any, arrays: dict[str, np.ndarray], asked: list[Wanted], folder: Path, cleanup: ExitStack
    ) -> list[Side]:
        """torch's own sides while ours compile in workers. Workers end with the thread that starts them: it is this one."""
        made = files(self.name, net, arrays, folder, {one.file for one in asked})
        samples = Samples([_by_position(made["float"], arrays)], batch_size=self.options.batch).save(folder / "samples")
        pool = ThreadPoolExecutor(self.options.jobs)
        cleanup.callback(pool.shutdown, wait=False, cancel_futures=True)
        turns: dict[Any, threading.Lock] = defaultdict(threading.Lock)
        opening: dict[Future[Side], tuple[Wanted, Worker]] = {}
        for one in asked:
            worker = Worker(one.label)
            cleanup.callback(worker.kill)
            worker.start()
            turn = turns[one.target, one.file, one.point.get("floating_precision")]
            job = pool.submit(our_side, one, worker, made[one.file], samples, self.options.batch, folder, turn)
            opening[job] = one, worker
        sides = []
        for label in ("eager f32", *BASES):
            try:
                sides.append(self._accepted(torch_side(label, net, arrays, self.options.device, self.options.batch)))
            except Exception as error:
                self._leave_out(label, error)
        windows_s = self.options.rounds * self.options.seconds * 1.5
        while opening:
            # Every side that is measured takes its part of what is left.
            left = self.deadline - time.monotonic() - windows_s * (len(sides) + 1)
            done, _ = wait_for(opening, timeout=max(left, 0.0), return_when="FIRST_COMPLETED")
            for job in done:
                one, _worker = opening.pop(job)
                try:
                    sides.append(self._accepted(job.result()))
                except Exception as error:
                    self._leave_out(one.label, error)
            if not done:
                break
        for job, (one, worker) in opening.items():
            job.cancel()
            worker.kill()
            self._leave_out(one.label, "not ready when the time was over: give more with --time, or fewer --models")
        return sides

    def _leave_out(self, label: str, why: Any) -> None:
        self.told["left_out"][label] = " ".join(str(why).split())[:400]
        print(f"{self.name}, {label}: {self.told['left_out'][label]}", file=sys.stderr, flush=True)
        self.write()

    def _accepted(self, side: Side) -> Side:
        """What it computes, compared with eager float32, which comes first."""
        out = side.predict()
        self.expected = out if self.expected is None else self.expected
        error = np.sqrt(np.mean((out - self.expected) ** 2) / max(float(np.mean(self.expected**2)), 1e-30))
        told = {
            "agreement": float((out.argmax(-1) == self.expected.argmax(-1)).mean()), "relative_error": float(error),
            "finite": bool(np.isfinite(out).all()), "facts": side.facts,
        }  # fmt: skip
        if self.labels is not None:
            told["accuracy"] = float((out.argmax(-1) == self.labels).mean())
        self.told["sides"][side.label] = told
        print(f"{self.name}, {side.label}: ready, agreement {told['agreement']:.3f}", file=sys.stderr, flush=True)
        self.write()
        return side

    def _measured(self, sides: list[Side]) -> None:
        order = random.Random(0)
        self.windows = {side.label: [] for side in sides}
        for side in sides:
            side.drive(WARM_UP_S)
        self.told["idle_power_w"] = self._idle()
        for number in range(self.options.rounds):
            for side in order.sample(sides, len(sides)):
                self.meter.start()
                window = side.drive(self.options.seconds)
                reading = self.meter.stop(window)
                window.energy_j, window.energy_reason = reading.energy_j, reading.reason
                self.windows[side.label].append(window)
            print(f"{self.name}: round {number + 1} of {self.options.rounds}", file=sys.stderr, flush=True)
            self._summarize()
            self.write()
            if time.monotonic() > self.deadline and 1 <= number < self.options.rounds - 1:
                self.told["left_out"]["rounds"] = f"{self.options.rounds - number - 1} rounds: the time was over"
                break

    def _idle(self) -> float | None:
        self.meter.start()
        time.sleep(IDLE_S)
        reading = self.meter.stop(Window(0, IDLE_S, 0.0))
        return None if reading.energy_j is None else reading.energy_j / IDLE_S

    def _summarize(self) -> None:
        figures = {label: [_figures(window) for window in windows] for label, windows in self.windows.items()}
        for label, rows in figures.items():
            told = self.told["sides"][label]
            told["rounds"] = len(rows)
            told["energy_reason"] = next((w.energy_reason for w in self.windows[label] if w.energy_reason), None)
            for name in FIGURES:
                told[name] = dict(zip(("value", "low", "high"), figure_interval([r[name] for r in rows]), strict=True))
            for base in (base for base in BASES if base in figures and base != label):
                told[f"to {base}"] = {
                    name: asdict(paired_ratio([r[name] for r in rows], [r[name] for r in figures[base]]))
                    for name in FIGURES
                }


def _figures(window: Window) -> dict[str, float | None]:
    return {
        "throughput_per_s": window.inferences / window.wall_s,
        "energy_j_per_inference": None if window.energy_j is None else window.energy_j / window.inferences,
        "cpu_s_per_inference": window.cpu_s / window.inferences,
        "latency_p50_ms": percentile(window.latencies_ms, 0.5),
    }


# Telling --------------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """Everything as a table in Markdown."""
    lines = ["| model | side | inferences/s | J / inference | ÷ eager bf16 | ÷ torch.compile bf16 | agreement | top-1 |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, told in results.items():
        for label, its in told["sides"].items():
            cells = [name, label, _figure(its.get("throughput_per_s")), _figure(its.get("energy_j_per_inference"))]
            for base in BASES:
                ratio = its.get(f"to {base}", {}).get("energy_j_per_inference")
                known = ratio and ratio["value"] and ratio["low"]
                cells.append(f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" if known else "–")
            cells.append(f"{its['agreement']:.3f}")
            lines.append("| " + " | ".join([*cells, f"{its['accuracy']:.4f}" if "accuracy" in its else "–"]) + " |")
        lines += [f"| {name} | {label} | left out: {why} | | | | | |" for label, why in told["left_out"].items()]
    return "\n".join(lines)


def _figure(figure: dict[str, float | None] | None) -> str:
    return "–" if not figure or figure["value"] is None else f"{figure['value']:.4g}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(DEFAULT), help=f"among {', '.join(_gpu_models.NETWORKS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1.5, help="of one window")
    parser.add_argument("--time", type=float, default=540.0, help="seconds for the whole run")
    parser.add_argument("--jobs", type=int, default=max(1, min(4, (os.cpu_count() or 2) // 4)))
    parser.add_argument("--out", type=Path, default=models.ROOT / "bench" / "results" / "gpu.json")
    options = parser.parse_args()
    options.models = options.models.split(",")
    if unknown := [name for name in options.models if name not in _gpu_models.NETWORKS]:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(_gpu_models.NETWORKS)}")
    return options


def main() -> None:
    """Measure the models one after the other."""
    options, started = parsed(), time.monotonic()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device; --device cpu tries the suite without one", file=sys.stderr)
        raise SystemExit(2)
    meter, notes = open_meter(device="gpu" if options.device == "cuda" else "cpu")
    kept: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"models": {}}
    kept |= {
        "device": torch.cuda.get_device_name(0) if options.device == "cuda" else "cpu", "torch": torch.__version__,
        "meter": {**meter.describe(), "notes": notes}, "seconds": options.seconds,
    }  # fmt: skip

    def keep(name: str, told: Any) -> None:
        kept["models"][name] = told
        aside = options.out.with_suffix(".partial")
        aside.write_text(json.dumps(kept, indent=1) + "\n")
        aside.replace(options.out)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    missing = absent(sorted({one.target for one in wanted(options.device, True)}))
    for number, name in enumerate(options.models):
        left = started + options.time - time.monotonic()
        deadline = time.monotonic() + left / (len(options.models) - number)
        try:
            Run(name, options, meter, deadline, lambda told, name=name: keep(name, told)).go(missing)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            kept["models"].setdefault(name, {"sides": {}, "left_out": {}})["left_out"]["the model"] = str(error)[:400]
    meter.close()
    print(table({name: kept["models"][name] for name in options.models}))
    ours = {n: [s for s in kept["models"][n]["sides"] if s not in ("eager f32", *BASES)] for n in options.models}
    typical = [len(labels) for labels in ours.values()]
    print(f"\n{statistics.median(typical):g} of our programs measured on a model in the median")
    raise SystemExit(0 if all(typical) else 1)


if __name__ == "__main__":
    main()
