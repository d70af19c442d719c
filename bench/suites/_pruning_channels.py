"""What `prune-channels` brings in int8: ResNet-50 and BERT-base with random weights, one thread of OpenVINO.

Each share of channels is taken out of the model after the default passes that keep outputs, and what is left is quantized by
`quantize-int8`, as is the whole model that all are held against. Random weights tell of speed alone. Used by pruning.py.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _fusion_speed as speed
import _precision_files as files
import architectures
import numpy as np

from perwatt import registry
from perwatt.artifact import Artifact
from perwatt.bench.statistics import paired_ratio
from perwatt.contract import OperatingPoint
from perwatt.data import Samples
from perwatt.measurement import Ratio
from perwatt.passes.prune_channels import PruneChannels
from perwatt.passes.quantize_int8 import QuantizeInt8

BATCHES = {"resnet50": 8, "bert-base": 4}
MODELS = tuple(BATCHES)
TARGET = "openvino"
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
WANTED_AT, WANTED = 0.3, 1.25
CALIBRATED_ON = 32


def channels(name: str, effort: speed.Effort, folder: Path) -> dict[str, Any]:
    """One model: every ratio's file beside the whole one."""
    paths = architectures.built(name)
    with np.load(paths.samples) as archive:
        samples = Samples([{key: archive[key][:CALIBRATED_ON] for key in archive.files}])
    before = files.lossless(Artifact.load(paths.fp32), TARGET, folder)
    precision = "bf16" if "bf16" in registry.target(TARGET).capabilities().floating_precisions else "f32"
    point = OperatingPoint("offline", BATCHES[name], 1, 1, precision)
    fed = samples.take(BATCHES[name])
    given = files.measuring(files.context(samples, TARGET, folder), TARGET, point, fed, folder)
    made, decided = {"whole": before}, {}
    for ratio in RATIOS:
        made[f"{ratio:g}"], decided[f"{ratio:g}"] = PruneChannels(ratio=ratio).run(before, given)
        print(f"{name}, {ratio:g}: {'; '.join(decided[f'{ratio:g}'])}", file=sys.stderr, flush=True)
    quantized = {side: QuantizeInt8().run(artifact, given)[0] for side, artifact in made.items()}
    saved = fed.save(folder / "fed")
    with ExitStack() as cleanup:
        windows = {}
        for side, artifact in quantized.items():
            worker, _ = speed.opened(cleanup, side, artifact.file(folder), TARGET, point, saved)
            windows[side] = speed.window(worker, effort.seconds)
        found = speed.interleaved(windows, effort.rounds)
    return {
        "point": point.to_json(), "decided": decided,
        "costs": {side: speed.told(windows_s) for side, windows_s in found.items()},
        "bytes": {side: artifact.size_bytes() for side, artifact in quantized.items()},
        "to_whole": {side: asdict(paired_ratio(found[side], found["whole"])) for side in found if side != "whole"},
    }  # fmt: skip


# Telling --------------------------------------------------------------------------------------------------------------


def verdicts(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """So much faster at one ratio, and slower at none."""
    lines = []
    for name, its in results.items():
        found = {float(side): Ratio(**ratio) for side, ratio in its["to_whole"].items()}
        wanted = found[WANTED_AT]
        faster = wanted.inverse()
        text = f"{name}: {speed.words(faster)} × as fast at {WANTED_AT:.0%} of the channels (at least {WANTED:g})"
        lines.append((text, faster.value is not None and faster.value >= WANTED))
        for ratio, its_ratio in found.items():
            slower = its_ratio.value is None or (its_ratio.value > 1 and (its_ratio.low or 0) > 1)
            lines.append(
                (f"{name}: {speed.words(its_ratio)} × the cost at {ratio:.0%} (at most 1 within noise)", not slower)
            )
    return lines


def table(results: dict[str, Any]) -> str:
    """Every ratio of every model, as Markdown."""
    lines = ["| model | channels taken out | CPU ms | ÷ whole | size | what went |", "| --- |" + " --- |" * 5]
    for name, its in results.items():
        for side, cost in its["costs"].items():
            ratio = "–" if side == "whole" else speed.words(Ratio(**its["to_whole"][side]))
            size = its["bytes"][side] / its["bytes"]["whole"]
            what = "" if side == "whole" else its["decided"][side][0].split(",")[0]
            title = side if side == "whole" else f"{float(side):.0%}"
            lines.append(
                f"| {name} | {title} | {cost['cpu_ms_per_inference']['value']:.3f} | {ratio} | {size:.2f} | {what} |"
            )
    return "\n".join(lines)
