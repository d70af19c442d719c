"""`assign-precision` beside every single answer on networks with random weights: one thread of OpenVINO.

The single answers: floating point as it is (bf16 where the machine has it), `quantize-int8` in each of its variants, and ONNX
Runtime's static int8. Ours start from the model after the default passes that keep outputs; ONNX Runtime gets the file as
exported, and after those passes too: whichever OpenVINO runs faster counts. A single answer that is the very file that
`assign-precision` made decides nothing. Used by precision.py.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _fusion_speed as speed
import _precision_calibration as calibrating
import _precision_files as files
import architectures
import numpy as np

from perwatt import registry
from perwatt.artifact import Artifact
from perwatt.bench.statistics import paired_ratio
from perwatt.contract import OperatingPoint
from perwatt.data import Samples
from perwatt.errors import PerwattError
from perwatt.measurement import Ratio
from perwatt.passes.assign_precision import AssignPrecision
from perwatt.passes.quantize_int8 import QuantizeInt8

BATCHES = {"mobilenetv2": 8, "resnet50": 8, "bert-base": 4, "vit-b16": 4}
MODELS = tuple(BATCHES)
TARGET = "openvino"
COSINE = 0.999
OURS = "assign-precision"


def assigned(name: str, effort: speed.Effort, folder: Path) -> dict[str, Any]:
    """One model: what the pass decided, and its file beside all single answers."""
    paths = architectures.built(name)
    with np.load(paths.samples) as archive:
        samples = Samples([{key: archive[key] for key in archive.files}])
    source = Artifact.load(paths.fp32)
    before = files.lossless(source, TARGET, folder)
    precision = "bf16" if "bf16" in registry.target(TARGET).capabilities().floating_precisions else "f32"
    point = OperatingPoint("offline", BATCHES[name], 1, 1, precision)
    fed = samples.take(BATCHES[name])
    asked = files.measuring(files.context(samples, TARGET, folder), TARGET, point, fed, folder)
    mine, changes = AssignPrecision().run(before, asked)
    made, failed = answers(source, before, samples, folder)
    same = [side for side, artifact in made.items() if artifact.digest() == mine.digest()]
    made = {OURS: mine, **made}
    found = raced(made, failed, point, fed.save(folder / "fed"), effort, folder)
    told = {
        "point": point.to_json(), "decided": changes, "same": same, "failed": failed,
        "cosine": cosines(made, source, calibrating.made_up(name, 8, calibrating.UNSEEN_SEED), folder),
        "costs": {side: speed.told(windows_s) for side, windows_s in found.items()},
        "ours_to": {side: asdict(paired_ratio(found[OURS], found[side])) for side in found if side != OURS},
    }  # fmt: skip
    print(f"{name}: {changes} {told['ours_to']}; failed: {failed}", file=sys.stderr, flush=True)
    return told


def answers(
    source: Artifact, before: Artifact, samples: Samples, folder: Path
) -> tuple[dict[str, Artifact], dict[str, str]]:
    """Every single answer, and why one could not be made."""
    given = files.context(samples, TARGET, folder)
    calls = files.one_by_one(source, samples)
    makers: dict[str, Any] = {"float": lambda: before}
    for settings in QuantizeInt8.variants:
        words = ", ".join(f"{key} {value}" for key, value in settings.items())
        makers[f"quantize-int8 {words}".strip()] = lambda settings=settings: QuantizeInt8(**settings).run(
            before, given
        )[0]
    for title, start in (("as exported", source), ("after our passes", before)):
        makers[f"onnxruntime-int8 {title}"] = lambda start=start, title=title: Artifact.load(
            files.onnxruntime_file(start.file(folder), calls, folder / f"{title.replace(' ', '-')}.onnx")
        )
    made, failed = {}, {}
    for side, maker in makers.items():
        try:
            made[side] = maker()
        except Exception as error:
            failed[side] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return made, failed


def raced(
    made: dict[str, Artifact],
    failed: dict[str, str],
    point: OperatingPoint,
    fed: Path,
    effort: speed.Effort,
    folder: Path,
) -> dict[str, list[float]]:
    """CPU seconds per inference of each file, window by window; what the target refuses goes into `failed`."""
    with ExitStack() as cleanup:
        windows = {}
        for side, artifact in made.items():
            try:
                worker, _ = speed.opened(cleanup, side, artifact.file(folder), TARGET, point, fed)
            except PerwattError as error:
                if side == OURS:
                    raise
                failed[side] = str(error)
                continue
            windows[side] = speed.window(worker, effort.seconds)
        return speed.interleaved(windows, effort.rounds)


def cosines(
    made: dict[str, Artifact], source: Artifact, unseen: dict[str, np.ndarray], folder: Path
) -> dict[str, float]:
    """The lowest cosine of each file's output to float32's, on samples that nothing was calibrated on."""
    samples = Samples([unseen])
    wanted = files.outputs(source, samples, folder)
    return {side: files.cosine(files.outputs(artifact, samples, folder), wanted) for side, artifact in made.items()}


# Telling --------------------------------------------------------------------------------------------------------------


def fastest(its: dict[str, Any]) -> str | None:
    """The single answer that takes the fewest CPU seconds, by its ratio to ours; None where all are the same file."""
    others = [side for side in its["ours_to"] if side not in its["same"]]
    return max(others, key=lambda side: its["ours_to"][side]["value"] or 0.0, default=None)


def verdicts(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """As fast as the fastest single answer. A cosine that is too low is told, and misses nothing: weights are random."""
    lines = []
    for name, its in results.items():
        cosine = its["cosine"][OURS]
        text = f"cosine to float32 {cosine:.5f}" + ("" if cosine >= COSINE else f", below {COSINE:g}")
        other = fastest(its)
        if other is None:
            lines.append((f"{name}: {OURS} made the same file as every single answer; {text}", True))
            continue
        ratio = Ratio(**its["ours_to"][other])
        lines.append(
            (
                f"{name}: {speed.words(ratio)} × {other} (at most {files.WITHIN:g} within noise); {text}",
                files.near(ratio),
            )
        )
    return lines


def table(results: dict[str, Any]) -> str:
    """Every side of every model, as Markdown."""
    lines = ["| model | side | CPU ms | assign-precision ÷ it | cosine to float32 |", "| --- |" + " --- |" * 4]
    for name, its in results.items():
        for side in sorted(its["costs"], key=lambda side: its["costs"][side]["cpu_ms_per_inference"]["value"]):
            ratio = f"**{'; '.join(its['decided'])}**" if side == OURS else speed.words(Ratio(**its["ours_to"][side]))
            what = side + (" (same file)" if side in its["same"] else "")
            cost = its["costs"][side]["cpu_ms_per_inference"]["value"]
            lines.append(f"| {name} | {what} | {cost:.3f} | {ratio} | {its['cosine'][side]:.5f} |")
        lines += [f"| {name} | {side} | failed: {why} | – | – |" for side, why in its["failed"].items()]
    return "\n".join(lines)
