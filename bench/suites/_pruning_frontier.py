"""Accuracy against CPU seconds: blocks dropped, learnt back, then the best precision, beside the best precision alone.

ResNet-56 on CIFAR-10 with the 5,085 training pictures that there are, and MiniLM on SST-2's training sentences; their labels
count a tenth beside the original's answers. Every point is a bundle of `perwatt.optimize` on OpenVINO, judged on the test set,
at its own operating point; all are run side by side. Used by pruning.py.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _fusion_speed as speed
import _precision_files as files
import _precision_trained as trained
import alias
import models
import numpy as np

import perwatt
from perwatt import registry
from perwatt.bench.statistics import paired_ratio
from perwatt.measurement import Ratio
from perwatt.recipe import OneOf, PassStep

TARGET = "openvino"
DROPPED = {"resnet56": (10, 12), "minilm": (4,)}
MODELS = tuple(DROPPED)
BUDGET = 1.0
"""Points of accuracy that may be lost."""
MOST_LOST = 3.0
"""Points that a bundle may lose to be a point of the frontier."""
WANTED = {"resnet56": 1.5, "minilm": 1.3}
MOST_MINUTES = {"resnet56": 20.0, "minilm": 40.0}


def frontier(name: str, minutes: float, effort: speed.Effort, folder: Path) -> dict[str, Any]:
    """One model: a bundle for every number of blocks, and all beside the one without pruning."""
    model, options = alias.made_ready(name, folder, alias.cases(folder)[name])
    options = {**options, "max_drop": MOST_LOST, "scenario": "offline", "target": TARGET, "force": True}
    train = training(name, folder)
    bundles = {"precision alone": perwatt.optimize(model, out=folder / "whole", **options)}
    took = {}
    for blocks in DROPPED[name]:
        start = time.perf_counter()
        passes = _passes(
            {"drop-blocks": {"blocks": blocks, "judged_on": 256}, "recover": {"minutes": minutes, "batch": 128}}
        )
        side = f"{blocks} blocks dropped"
        bundles[side] = perwatt.optimize(
            model, out=folder / f"dropped-{blocks}", train=str(train), passes=passes, **options
        )
        took[side] = (time.perf_counter() - start) / 60
        print(
            f"{name}, {side}: {took[side]:.1f} min, {trained.shipped(bundles[side])['names']}",
            file=sys.stderr,
            flush=True,
        )
    case = trained.read(
        model, {key: value for key, value in options.items() if key not in ("scenario", "target", "force")}
    )
    saved = {"judging": case.judging.save(folder / "judging")}
    saved["fed"] = case.judging.take(trained.FED).without_labels().save(folder / "fed")
    reference = files.accuracy(files.outputs(case.artifact, case.judging, folder), case.judging.labels)
    with ExitStack() as cleanup:
        workers = {side: trained.opened_bundle(cleanup, bundle, saved["fed"]) for side, bundle in bundles.items()}
        accuracy = {
            side: trained.accuracy(worker, saved["judging"], case.judging.labels, folder / f"outputs-{number}")
            for number, (side, worker) in enumerate(workers.items())
        }
        found = speed.interleaved({side: speed.window(w, effort.seconds) for side, w in workers.items()}, effort.rounds)
    whole = found["precision alone"]
    return {
        "float32_accuracy": reference, "accuracy": accuracy, "minutes": took,
        "shipped": {side: trained.shipped(bundle) for side, bundle in bundles.items()},
        "costs": {side: speed.told(windows_s) for side, windows_s in found.items()},
        "to_precision": {side: asdict(paired_ratio(found[side], whole)) for side in found if side != "precision alone"},
    }  # fmt: skip


def _passes(settings: dict[str, Any]) -> list[Any]:
    """The default passes with these put in, as a recipe has them."""

    def plain(step: PassStep | OneOf) -> Any:
        if isinstance(step, OneOf):
            return {"one-of": [plain(one) for one in step.steps]}
        return {step.name: {**step.settings, **settings.get(step.name, {})}}

    return [
        plain(step) for step in registry.edit_steps(registry.default_steps(), ",".join(f"+{name}" for name in settings))
    ]


def training(name: str, folder: Path) -> Path:
    """A file with everything that may be learnt from."""
    if name == "minilm":
        return models.DATA / "text" / "sst2_train.tsv"
    parts = [
        models.DATA / "cifar10" / f"cifar10_{part}.npz"
        for part in ("calib_train_lossless_2000", "train_lossless_rest_3085")
    ]
    loaded = [np.load(part) for part in parts]
    out = folder / "train.npz"
    np.savez(out, **{key: np.concatenate([one[key] for one in loaded]) for key in ("images", "labels")})
    return out


# Telling --------------------------------------------------------------------------------------------------------------


def drop(its: dict[str, Any], side: str) -> float:
    """Points of accuracy lost against float32."""
    return round(100 * (its["float32_accuracy"] - its["accuracy"][side]), 9)


def verdicts(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """So much faster within the budget, in time."""
    lines = []
    for name, its in results.items():
        within = {
            side: Ratio(**ratio)
            for side, ratio in its["to_precision"].items()
            if drop(its, side) <= BUDGET and its["minutes"][side] <= MOST_MINUTES[name]
        }
        best = min(within, key=lambda side: within[side].value or 1e9, default=None)
        if best is None:
            lines.append((f"{name}: nothing loses at most {BUDGET:g} points in {MOST_MINUTES[name]:g} minutes", False))
            continue
        faster = within[best].inverse()
        text = f"{name}: {best}: {speed.words(faster)} × as fast, {drop(its, best):.2f} points lost (at least {WANTED[name]:g} ×)"
        lines.append((text, faster.value is not None and faster.value >= WANTED[name]))
    return lines


def table(results: dict[str, Any]) -> str:
    """Every point, as Markdown."""
    lines = [
        "| model | what | minutes | accuracy | points lost | CPU ms | ÷ precision alone | shipped |",
        "| --- |" + " --- |" * 7,
    ]
    for name, its in results.items():
        for side, cost in its["costs"].items():
            ratio = "–" if side not in its["to_precision"] else speed.words(Ratio(**its["to_precision"][side]))
            minutes = f"{its['minutes'][side]:.1f}" if side in its["minutes"] else "–"
            cells = [
                name, side, minutes, f"{its['accuracy'][side]:.2%}", f"{drop(its, side):.2f}",
                f"{cost['cpu_ms_per_inference']['value']:.4f}", ratio, ", ".join(its["shipped"][side]["names"]),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
