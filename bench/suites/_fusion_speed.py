"""What fusion brings in speed: our file against OpenVINO's own conversion, and each pass on top of all others.

Each program lies open in a worker of its own; in every round each gets one window, in random order, and ratios of CPU
seconds are taken within rounds.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _fusion_counts as counts
import fusion_models
import numpy as np
from fusion_models import Files

from perwatt import registry
from perwatt.artifact import Artifact
from perwatt.bench.statistics import figure_interval, half_width, paired_ratio
from perwatt.contract import OperatingPoint, Pass, Stage
from perwatt.data import Samples
from perwatt.errors import PerwattError
from perwatt.isolation import Worker
from perwatt.measurement import Ratio
from perwatt.worker import load_outputs

DIRECT = ("vit-b", "bert-base", "swin-tiny")
SIDES = ("openvino:bf16", "openvino:f32", "onnxruntime:f32", "inductor:f32")
SETTLED = 0.03
"""A ratio whose interval reaches further on either side says too little to hold."""
SAME = 1e-3
"""How far outputs in f32 may lie from torch's, relative to the largest."""
SCREENING_ROUNDS, SCREENING_S = 4, 0.5


@dataclass(frozen=True)
class Effort:
    """How long to measure: windows of `seconds` in each of `rounds`."""

    rounds: int = 12
    seconds: float = 1.0


# Windows --------------------------------------------------------------------------------------------------------------


def opened(
    cleanup: ExitStack, title: str, path: Path, target: str, point: OperatingPoint, samples: Path
) -> tuple[Worker, dict[str, Any]]:
    """A worker with that file lowered (an ONNX file, or OpenVINO's IR as it is) and warm, and the facts of its program."""
    worker = cleanup.enter_context(Worker(title))
    if path.suffix == ".xml":
        signature = worker.call("file_signature", target=target, path=str(path))["signature"]
        facts = worker.call("open_file", target=target, path=str(path), signature=signature, point=point.to_json())
    else:
        facts = worker.call("open", target=target, model=str(path), point=point.to_json())
    worker.call("prepare", samples=str(samples), warm_up_s=1.0, most_s=5.0)
    return worker, facts


def interleaved(windows: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """One window of every side in each round, in random order."""
    order, found = random.Random(0), {side: [] for side in windows}
    for _ in range(rounds):
        for side in order.sample(sorted(windows), len(windows)):
            found[side].append(windows[side]())
    return found


def window(worker: Worker, seconds: float) -> Callable[[], float]:
    """CPU seconds per inference of a window; the worker is idle again afterwards."""

    def measured() -> float:
        told = worker.call("drive", seconds=seconds)
        worker.call("settle")
        return float(told["cpu_s"] / told["inferences"])

    return measured


def fed(archive: Path, folder: Path) -> Path:
    """The samples of `archive` as workers read them."""
    if not (folder / "index.json").exists():
        with np.load(archive) as arrays:
            Samples([{name: arrays[name] for name in arrays.files}]).save(folder)
    return folder


def told(costs: Sequence[float]) -> dict[str, Any]:
    """CPU milliseconds per inference over all windows, with their interval."""
    value, low, high = (None if figure is None else 1e3 * figure for figure in figure_interval(costs))
    return {"cpu_ms_per_inference": {"value": value, "low": low, "high": high}, "windows_s": list(costs)}


# Against OpenVINO's own conversion --------------------------------------------------------------------------------------


def direct(name: str, precisions: Sequence[str], effort: Effort, folder: Path) -> dict[str, Any]:
    """One architecture: `ours` (dynamo's export, our passes in OpenVINO's form), `plain` (torch's own ONNX) and `direct`
    (openvino.convert_model of the module), compiled alike."""
    files = Files(name)
    paths = {kind: fusion_models.built(files, kind) for kind in ("dynamo", "torch", "ir")}
    fused = fused_file(Artifact.load(paths["dynamo"]), "openvino", counts.fusing_passes(), folder)
    sides = {"ours": fused, "plain": paths["torch"], "direct": paths["ir"]}
    fixed = [batch for path in (fused, paths["torch"]) if isinstance(batch := Artifact(path=path).signature.batch, int)]
    batch = fixed[0] if fixed else fusion_models.BATCH
    cpus = len(os.sched_getaffinity(0))
    samples = fed(files.samples, folder / f"{name}-samples")
    result: dict[str, Any] = {}
    for precision in precisions:
        point = OperatingPoint("offline", batch, cpus, cpus, precision)
        result[precision] = side_by_side(sides, point, samples, files.outputs, effort)
        print(f"{name}, {precision}: {result[precision]['ratios']}", file=sys.stderr, flush=True)
    return result


def side_by_side(
    sides: dict[str, Path], point: OperatingPoint, samples: Path, outputs: Path, effort: Effort
) -> dict[str, Any]:
    """All files at one operating point: how far each is from torch, its cost, and ratios to `direct`."""
    with ExitStack() as cleanup:
        workers = {side: opened(cleanup, side, path, "openvino", point, samples)[0] for side, path in sides.items()}
        far = {side: distance(worker, samples, outputs) for side, worker in workers.items()}
        windows = {side: window(worker, effort.seconds) for side, worker in workers.items()}
        found = interleaved(windows, effort.rounds)
    ratios = {f"{mine} / direct": asdict(paired_ratio(found[mine], found["direct"])) for mine in ("ours", "plain")}
    costs = {side: told(windows_s) for side, windows_s in found.items()}
    return {"point": point.to_json(), "from_torch": far, **costs, "ratios": ratios}


def distance(worker: Worker, samples: Path, outputs: Path) -> float:
    """The largest difference of the program's outputs from torch's, relative to the largest of these."""
    with tempfile.TemporaryDirectory() as scratch:
        worker.call("predict", samples=str(samples), out=scratch)
        found = np.concatenate([next(iter(batch.values())) for batch in load_outputs(scratch)])
    with np.load(outputs) as archive:
        wanted = archive["output"]
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def fused_file(artifact: Artifact, target: str, passes: Sequence[Pass], folder: Path) -> Path:
    """The file after `passes` with that target's capabilities."""
    capabilities = registry.target(target).capabilities()
    after, rows = counts.pipeline(artifact, None, folder).for_target(capabilities).run(artifact, passes)
    if broken := [row for row in rows if row.status == "rolled-back"]:
        print(f"rolled back: {broken[0].name}: {broken[0].reason}", file=sys.stderr, flush=True)
    return after.file(folder)


def direct_verdicts(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """Ours at least as fast as the direct conversion, and right."""
    lines = []
    for name, precisions in results.items():
        for precision, its in precisions.items():
            ratio = Ratio(**its["ratios"]["ours / direct"])
            text = f"{name}, {precision}: ours {words(ratio)} × the direct conversion (at most 1 within noise)"
            lines.append((text, not_slower(ratio)))
            if precision == "f32":
                worst = max(its["from_torch"], key=lambda side: its["from_torch"][side])
                far = its["from_torch"][worst]
                lines.append((f"{name}, {precision}: outputs within {far:.1e} of torch's ({worst})", far <= SAME))
    return lines


def not_slower(ratio: Ratio) -> bool:
    """Whether a ratio to something else is at most 1 within its noise, that noise being small enough to tell."""
    if ratio.value is None or ratio.low is None:
        return False
    return ratio.value <= 1 or (ratio.low <= 1 and half_width(ratio) <= SETTLED)


def direct_table(results: dict[str, Any]) -> str:
    """CPU milliseconds and ratios, as Markdown."""
    lines = [
        "| model | precision | direct, CPU ms | torch's ONNX | ÷ direct | ours | ÷ direct |",
        "| --- |" + " --- |" * 6,
    ]
    for name, precisions in results.items():
        for precision, its in precisions.items():
            cost = {side: f"{its[side]['cpu_ms_per_inference']['value']:.3f}" for side in ("direct", "plain", "ours")}
            ratio = {side: words(Ratio(**its["ratios"][f"{side} / direct"])) for side in ("plain", "ours")}
            cells = [name, precision, cost["direct"], cost["plain"], ratio["plain"], cost["ours"], ratio["ours"]]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def words(ratio: Ratio) -> str:
    """`0.980 [0.971, 0.990]`."""
    if ratio.value is None:
        return "–"
    return f"{ratio.value:.3f}" + (f" [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio.low and ratio.high else "")


# Each pass alone ------------------------------------------------------------------------------------------------------


def patterns(
    name: str, sides: Sequence[str], passes: Sequence[str], known: dict[str, Any], effort: Effort, folder: Path
) -> None:
    """For each pass that changes what comes out of `name`: CPU seconds with it ÷ without it, beside all default passes, on
    each side. A short look first; `known`[pass] keeps what was found, and gets a closer look where it promises more than
    any place before."""
    artifact = Artifact.load(fusion_models.built(Files(name), "dynamo"))
    samples = fed(Files(name).samples, folder / f"{name}-samples")
    for side in sides:
        usual, changed = changed_by(artifact, side.partition(":")[0], passes, folder)
        batch = usual.signature.batch
        size = batch if isinstance(batch, int) else fusion_models.BATCH
        place = Place(name, side, size, samples, folder)
        with ExitStack() as cleanup:
            try:
                worker = place.opened(cleanup, usual) if changed else None
            except PerwattError as error:
                print(f"{name}, {side}: {error}", file=sys.stderr, flush=True)
                continue
            for made, found in changed.items():
                entries = known.setdefault(made, {"screened": [], "best": None})
                looked_at(entries, place, made, (usual, worker), found, effort)
                print(f"{name}, {side}, {made}: {entries['screened'][-1]}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Place:
    """A model on a side, with what its programs are fed."""

    model: str
    side: str
    batch: int
    samples: Path
    folder: Path

    def opened(self, cleanup: ExitStack, artifact: Artifact) -> Worker:
        """A worker with that artifact lowered, one thread, and warm."""
        target, _, precision = self.side.partition(":")
        point = OperatingPoint("offline", self.batch, 1, 1, precision)
        return opened(cleanup, self.model, artifact.file(self.folder), target, point, self.samples)[0]

    def nodes(self, artifact: Artifact) -> int:
        return counts.total(counts.operators(artifact.file(self.folder)))


def changed_by(
    artifact: Artifact, target: str, passes: Sequence[str], folder: Path
) -> tuple[Artifact, dict[str, Artifact]]:
    """What all default passes make of a model for that target, and, for each pass that matters, what they make without it
    (with it, where it is not among them)."""
    whole = counts.pipeline(artifact, None, folder).for_target(registry.target(target).capabilities())
    usual, _ = whole.run(artifact, counts.fusing_passes())
    found = {}
    for made, cls in registry.loadable_passes().items():
        if cls.stage is Stage.FUSE and (not passes or made in passes):
            edits = f"{'-' if cls.in_default else '+'}{made}"
            found[made], _ = whole.run(artifact, counts.fusing_passes(edits))
    return usual, {made: other for made, other in found.items() if other.digest() != usual.digest()}


def looked_at(
    entries: dict[str, Any], place: Place, made: str, usual: tuple[Artifact, Any], found: Artifact, effort: Effort
) -> None:
    """One pass at one place; `usual` is what all default passes made, and the worker that holds it."""
    by_default = registry.pass_class(made).in_default
    with_it, without = (usual[0], found) if by_default else (found, usual[0])
    told = {"model": place.model, "side": place.side, "nodes": place.nodes(without) - place.nodes(with_it)}
    told["in_default"] = by_default
    with ExitStack() as cleanup:
        try:
            other = place.opened(cleanup, found)
        except PerwattError as error:
            # What only fusion makes run at all is worth knowing too.
            entries["screened"].append({**told, "failed": str(error)})
            return
        look_closer(entries, told, (usual[1], other) if by_default else (other, usual[1]), effort)


def look_closer(entries: dict[str, Any], place: dict[str, Any], pair: tuple[Worker, Worker], effort: Effort) -> None:
    """A short look at (with, without), and a longer one where this may be the place where the pass pays most."""
    quick = ratio_of(*pair, Effort(min(SCREENING_ROUNDS, effort.rounds), min(SCREENING_S, effort.seconds)))
    entries["screened"].append({**place, "with_to_without": asdict(quick)})
    best = entries["best"]
    if quick.value is None or (best and quick.value >= best["with_to_without"]["value"]):
        return
    sure = ratio_of(*pair, effort)
    entries["screened"][-1]["with_to_without"] = asdict(sure)
    if sure.value is not None and (best is None or sure.value < best["with_to_without"]["value"]):
        entries["best"] = {**place, "with_to_without": asdict(sure)}


def ratio_of(worker: Worker, other: Worker, effort: Effort) -> Ratio:
    """CPU seconds of the program in `worker` ÷ those of the other's."""
    found = interleaved({"mine": window(worker, effort.seconds), "other": window(other, effort.seconds)}, effort.rounds)
    return paired_ratio(found["mine"], found["other"])


def pays(entries: dict[str, Any]) -> bool:
    """Whether a pass saves CPU seconds somewhere, beyond noise."""
    ratio = Ratio(**entries["best"]["with_to_without"]) if entries["best"] else Ratio(None)
    return ratio.high is not None and ratio.high < 1


def patterns_table(known: dict[str, Any]) -> str:
    """Where each pass pays most, as Markdown."""
    lines = [
        "| pass | in the default | pays most on | CPU seconds with ÷ without | nodes fewer | pays |",
        "| --- |" + " --- |" * 5,
    ]
    for name, entries in sorted(known.items()):
        best = entries["best"]
        if best is None:
            lines.append(f"| {name} | – | – | – | – | not measured |")
            continue
        ratio, answer = words(Ratio(**best["with_to_without"])), "yes" if pays(entries) else "no"
        usual = "yes" if best["in_default"] else "no"
        lines.append(f"| {name} | {usual} | {best['model']}, {best['side']} | {ratio} | {best['nodes']} | {answer} |")
    return "\n".join(lines)
