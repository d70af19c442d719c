"""What a search finds beyond the best single pass: the CPU seconds per inference of both answers, side by side.

    python search.py [--models resnet56,minilm,resnet20,resnet8,mnist] [--speed-up 1] [--rounds 12] [--seconds 1] [--quick]

The five trained models of PERWATT_DATA, offline, at most 1.0 point of accuracy lost. `single`: `optimize` without a search:
every pass of the precision stage by itself, after the passes that lose nothing, on every backend of `--target cpu`, the best
operating point of the best of them. `searched`: `optimize --time` with samples to learn from (the training pictures and
sentences that there are; MNIST's 1,000 for calibration). Both are bundles; they are run side by side, interleaved, each at its
own operating point. Accuracy is what the search's report says of samples that it never saw.

Wanted: the searched answer never costs more than 1.02 × the single one, the geometric mean of single ÷ searched is at least
1.25, and no more than the budget is lost on the unseen samples. Writes bench/results/search.json after each model (what a run
leaves out stays as it was), exits 1 where that was missed. `--speed-up 4` searches a quarter of the time. `--quick` tries it
out: MNIST, a minute or two, nothing written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _fusion_speed as speed
import _precision_trained as trained
import _pruning_frontier as pruning
import alias
import models

import perwatt
from perwatt.bench.fingerprint import fingerprint
from perwatt.bench.statistics import paired_ratio

RESULTS = Path(__file__).resolve().parents[1] / "results" / "search.json"
MINUTES = {"resnet56": 30.0, "minilm": 30.0, "resnet20": 20.0, "resnet8": 12.0, "mnist": 8.0}
BUDGET = 1.0
NEVER_WORSE, MEAN_WANTED = 1.02, 1.25


def training(name: str, folder: Path) -> Path:
    """What may be learnt from."""
    return models.DATA / "mnist" / "mnist_calib_train_1000.npz" if name == "mnist" else pruning.training(name, folder)


def compared(name: str, minutes: float, effort: speed.Effort, folder: Path) -> dict[str, Any]:
    """One model: both answers, and what they cost side by side."""
    # A search of this model that was made before would be gone on with.
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    model, options = alias.made_ready(name, folder, alias.cases(folder)[name])
    options = {**options, "max_drop": BUDGET, "scenario": "offline", "target": alias.ALIAS, "force": True}
    bundles, took = {}, {}
    for side, more in {
        "single": {"trials": 0},
        "searched": {"time": f"{minutes:g}m", "train": str(training(name, folder))},
    }.items():
        start = time.perf_counter()
        bundles[side] = perwatt.optimize(model, out=folder / side, **options, **more)
        took[side] = (time.perf_counter() - start) / 60
        print(
            f"{name}, {side}: {took[side]:.1f} min, {trained.shipped(bundles[side])['names']}",
            file=sys.stderr,
            flush=True,
        )
    plain = {key: value for key, value in options.items() if key not in ("scenario", "target", "force")}
    case = trained.read(model, plain)
    fed = case.judging.take(trained.FED).without_labels().save(folder / "fed")
    with ExitStack() as cleanup:
        workers = {side: trained.opened_bundle(cleanup, bundle, fed) for side, bundle in bundles.items()}
        found = speed.interleaved({side: speed.window(w, effort.seconds) for side, w in workers.items()}, effort.rounds)
    report = bundles["searched"].report
    return {
        "machine": fingerprint(), "minutes": took, "asked_minutes": minutes,
        "shipped": {side: trained.shipped(bundle) for side, bundle in bundles.items()},
        "accuracy": {side: bundle.report["accuracy"] for side, bundle in bundles.items()},
        "costs": {side: speed.told(windows_s) for side, windows_s in found.items()},
        "single_to_searched": asdict(paired_ratio(found["single"], found["searched"])),
        "run_cost": report["run_cost"],
        "search": {key: value for key, value in report["search"].items() if key != "trials"},
        "trials": [
            {key: trial[key] for key in ("number", "choice", "why", "status", "objectives", "drop", "missed", "seconds")}
            for trial in report["search"]["trials"]
        ],
    }  # fmt: skip


def verdicts(found: dict[str, dict[str, Any]]) -> list[tuple[str, bool]]:
    """What is wanted, and whether it holds."""
    said = []
    for name, its in found.items():
        ratio, accuracy = its["single_to_searched"], its["accuracy"]["searched"]
        interval = f"[{ratio['low']:.3f}, {ratio['high']:.3f}]"
        words = f"{name}: {ratio['value']:.3f} × {interval} the single pass's inferences per CPU second, "
        words += f"{accuracy['drop']:+.2f} points lost on {accuracy['n']} unseen samples"
        said.append((words, ratio["value"] >= 1 / NEVER_WORSE and accuracy["drop"] <= BUDGET + 1e-9))
    values = [its["single_to_searched"]["value"] for its in found.values()]
    mean = math.exp(sum(map(math.log, values)) / len(values))
    whole = set(MINUTES) <= set(found)
    said.append(
        (f"geometric mean of {len(values)}: {mean:.3f} × (wanted {MEAN_WANTED})", whole and mean >= MEAN_WANTED)
    )
    return said


def main() -> int:
    """Every model, then the verdict on all that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MINUTES))
    parser.add_argument("--speed-up", type=float, default=1.0, help="search so many times shorter")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--quick", action="store_true", help="MNIST, a minute or two, nothing written")
    asked = parser.parse_args()
    names = ["mnist"] if asked.quick else asked.models.split(",")
    effort = speed.Effort(3, 0.3) if asked.quick else speed.Effort(asked.rounds, asked.seconds)
    known = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() and not asked.quick else {}
    for name in names:
        with tempfile.TemporaryDirectory() as aside:
            minutes = 2.0 if asked.quick else MINUTES[name] / asked.speed_up
            known[name] = compared(name, minutes, effort, Path(aside))
        if not asked.quick:
            RESULTS.write_text(json.dumps({"models": known}, indent=1) + "\n")
    lines = verdicts(known)
    for words, holds in lines:
        print(f"{'ok  ' if holds else 'MISS'} {words}")
    return 0 if all(holds for _, holds in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
