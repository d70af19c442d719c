"""CPU seconds of `quantize-int8` and of NNCF, each in a process of its own, and how far their outputs lie from float32's.

NNCF gets the file as torch exported it, as its users have it; ours the same after the default passes that keep outputs, which
are not counted: they run anyway. Both get the same 300 samples. Imports and compilation of kernels are not counted: the process
quantizes a small network before the clock starts. Used by precision.py, which starts this file for each process:

    python _precision_calibration.py PLAN.json
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _precision_files as files
import architectures
import models
import numpy as np

from perwatt.artifact import Artifact
from perwatt.data import Samples

MODELS = ("bert-base", "resnet50", "minilm")
ORDER = ("ours", "nncf", "nncf", "ours")
TARGET = "openvino"
UNSEEN, UNSEEN_SEED = 32, 77
TIMES_LESS, ERROR_AT_MOST, POINTS_LOWER = 3.0, 1.1, 0.5


# In a process of its own ----------------------------------------------------------------------------------------------


def quantized(kind: str, path: Path, arrays: dict[str, np.ndarray], transformer: bool, out: Path) -> float:
    """Quantize one file and tell the CPU seconds, those of all threads and children included."""
    folder = out.parent
    samples = Samples([arrays])
    artifact = Artifact.load(path)
    calls = files.one_by_one(artifact, samples)
    begun = cpu_s()
    if kind == "nncf":
        files.nncf_file(path, calls, transformer, out)
    else:
        from perwatt.passes.quantize_int8 import QuantizeInt8

        made, _ = QuantizeInt8().run(artifact, files.context(samples, TARGET, folder))
        made.save(out)
    return cpu_s() - begun


def cpu_s() -> float:
    """CPU seconds of this process and its children so far, user and system."""
    return sum(os.times()[:4])


def warm(kind: str, folder: Path) -> None:
    """Quantize a small network, so that everything is imported and compiled."""
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(2), torch.nn.Linear(36, 16),
        torch.nn.LayerNorm(16), torch.nn.Linear(16, 8),
    )  # fmt: skip
    arrays = {"x": np.random.default_rng(0).standard_normal((8, 3, 8, 8), dtype=np.float32)}
    architectures.export(net, arrays, folder / "small.onnx")
    quantized(kind, folder / "small.onnx", arrays, False, folder / f"small-{kind}.onnx")


def process(plan: dict[str, Any]) -> dict[str, float]:
    """What one process does."""
    with tempfile.TemporaryDirectory() as scratch:
        warm(plan["kind"], Path(scratch))
    with np.load(plan["samples"]) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return {"cpu_s": quantized(plan["kind"], Path(plan["model"]), arrays, plan["transformer"], Path(plan["out"]))}


# From outside ---------------------------------------------------------------------------------------------------------


def calibration(name: str, quick: bool, folder: Path) -> dict[str, Any]:
    """Both sides of one model, in turn, in both orders."""
    paths = architectures.built(name)
    count = 16 if quick else files.SUBSET
    np.savez(folder / "calibrate.npz", **calibrating(name, count, folder))
    source = Artifact.load(paths.fp32)
    ours = files.lossless(source, TARGET, folder).save(folder / "lossless.onnx")
    given = {"ours": ours, "nncf": paths.fp32}
    seconds: dict[str, list[float]] = {"ours": [], "nncf": []}
    for kind in ORDER[: 2 if quick else 4]:
        plan = {
            "kind": kind, "model": str(given[kind]), "samples": str(folder / "calibrate.npz"),
            "transformer": architectures.ALL[name].transformer, "out": str(folder / f"{kind}.onnx"),
        }  # fmt: skip
        seconds[kind].append(started(plan, folder))
        print(f"{name}, {kind}: {seconds[kind][-1]:.1f} CPU s", file=sys.stderr, flush=True)
    made = {kind: Artifact.load(folder / f"{kind}.onnx") for kind in seconds}
    return {"samples": count, "cpu_s": seconds, **judged(name, source, made, quick, folder)}


def started(plan: dict[str, Any], folder: Path) -> float:
    """CPU seconds that a fresh process took."""
    where = folder / "plan.json"
    where.write_text(json.dumps(plan))
    done = subprocess.run([sys.executable, __file__, str(where)], text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{plan['kind']} failed on {plan['model']}:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["cpu_s"])


def calibrating(name: str, count: int, folder: Path) -> dict[str, np.ndarray]:
    """Calibration samples: real ones for trained weights, made-up ones else."""
    if name == "minilm":
        return architectures.sst2_sentences(folder, count)
    return made_up(name, count, architectures.SEED)


def made_up(name: str, count: int, seed: int) -> dict[str, np.ndarray]:
    """Made-up samples of a network with random weights."""
    if name == "bert-base":
        return architectures.sentences(count, 30522, seed)
    return {"pixel_values": architectures.pictures(count, seed)}


def judged(name: str, source: Artifact, made: dict[str, Artifact], quick: bool, folder: Path) -> dict[str, Any]:
    """How far each lies from float32 on samples that neither has seen; for trained weights accuracy and flips too."""
    labels = None
    if name == "minilm":
        arrays, labels = sst2_test(folder, 64 if quick else None)
    else:
        arrays = made_up(name, 4 if quick else UNSEEN, UNSEEN_SEED)
    unseen = Samples([arrays])
    wanted = files.outputs(source, unseen, folder)
    found = {kind: files.outputs(artifact, unseen, folder) for kind, artifact in made.items()}
    told: dict[str, Any] = {"error": {kind: files.relative_rms(out, wanted) for kind, out in found.items()}}
    if labels is not None:
        sides = {"float32": wanted, **found}
        told["accuracy"] = {kind: files.accuracy(out, labels) for kind, out in sides.items()}
        told["flips"] = {kind: int((out.argmax(1) != wanted.argmax(1)).sum()) for kind, out in found.items()}
    return told


def sst2_test(folder: Path, count: int | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """SST-2's test set, filled up as the calibration samples are, and its labels."""
    from tokenizers import Tokenizer

    with (models.DATA / "text" / "sst2_test.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))[:count]
    tokenizer = Tokenizer.from_file(str(models.minilm(folder) / "tokenizer.json"))
    tokenizer.enable_truncation(architectures.SEQUENCE)
    tokenizer.enable_padding(length=architectures.SEQUENCE)
    found = tokenizer.encode_batch([row["sentence"] for row in rows])
    named = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    arrays = {name: np.int64([getattr(one, key) for one in found]) for name, key in named.items()}
    return arrays, np.int64([int(row["label"]) for row in rows])


# Telling --------------------------------------------------------------------------------------------------------------


def less(its: dict[str, Any]) -> float:
    """NNCF's CPU seconds ÷ ours, over both orders."""
    return sum(its["cpu_s"]["nncf"]) / sum(its["cpu_s"]["ours"])


def verdicts(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """A third of NNCF's CPU seconds, at an error like its own; at its accuracy where there are labels."""
    lines = []
    for name, its in results.items():
        times = less(its)
        lines.append((f"{name}: {times:.2f} × less CPU time than NNCF (at least {TIMES_LESS:g})", times >= TIMES_LESS))
        if "accuracy" in its:
            lower = 100 * (its["accuracy"]["nncf"] - its["accuracy"]["ours"])
            text = f"{name}: accuracy {lower:.2f} points below NNCF's (at most {POINTS_LOWER:g})"
            lines.append((text, round(lower, 9) <= POINTS_LOWER))
        else:
            times = its["error"]["ours"] / its["error"]["nncf"]
            text = f"{name}: output error {times:.2f} × NNCF's (at most {ERROR_AT_MOST:g})"
            lines.append((text, times <= ERROR_AT_MOST))
    return lines


def table(results: dict[str, Any]) -> str:
    """CPU seconds, errors and accuracy, as Markdown."""
    lines = [
        "| model | samples | ours, CPU s | NNCF, CPU s | × less | error, ours | error, NNCF "
        "| accuracy: float32, ours, NNCF | flips: ours, NNCF |",
        "| --- |" + " --- |" * 8,
    ]
    for name, its in results.items():
        spent = {kind: ", ".join(f"{one:.1f}" for one in its["cpu_s"][kind]) for kind in ("ours", "nncf")}
        accuracies = ", ".join(f"{100 * its['accuracy'][kind]:.2f} %" for kind in its.get("accuracy", {})) or "–"
        flips = ", ".join(str(count) for count in its.get("flips", {}).values()) or "–"
        cells = [
            name, str(its["samples"]), spent["ours"], spent["nncf"], f"{less(its):.2f}", f"{its['error']['ours']:.4f}",
            f"{its['error']['nncf']:.4f}", accuracies, flips,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(process(json.loads(Path(sys.argv[1]).read_text()))))
