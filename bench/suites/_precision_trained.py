"""What `optimize` ships for trained networks beside float32, bf16, NNCF's int8 and ONNX Runtime's, on both backends.

The alternatives are made of the model as it is read, and run at one operating point: batch 32, all threads; ours at the point
that was shipped with it. Every side is fed and judged with the same test set. An alternative that loses more accuracy than the
budget allows is none. Used by precision.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _fusion_speed as speed
import _precision_files as files
import alias
import numpy as np

import perwatt
from perwatt import datasets, registry
from perwatt.artifact import Artifact
from perwatt.bench.statistics import paired_ratio
from perwatt.contract import OperatingPoint
from perwatt.data import Samples
from perwatt.errors import PerwattError
from perwatt.isolation import Worker
from perwatt.measurement import Ratio
from perwatt.options import build_recipe
from perwatt.worker import load_outputs

BUDGETS = {"minilm": 0.5, "resnet20": 1.0, "resnet56": 1.0, "resnet8": 1.0, "mnist": 1.0}
"""Points of accuracy that may be lost."""
MODELS = tuple(BUDGETS)
BATCH = 32
BACKENDS = ("openvino:f32", "openvino:bf16", "onnxruntime:f32")
FED = 512


@dataclass(frozen=True)
class Case:
    """A model as read, with its samples: some to calibrate on, and those that judge, with labels."""

    artifact: Artifact
    calibrate: Samples
    judging: Samples


def read(model: Path, options: dict[str, Any]) -> Case:
    """The model and its samples, as `optimize` reads them."""
    recipe = build_recipe(None, model=str(model), **options)
    reading = perwatt.read(model, **options)
    roles = datasets.open_roles(
        recipe.data, reading.artifact.signature, raw_inputs=recipe.inputs, tokenizer=reading.tokenizer,
        label2id=reading.label2id, seed=recipe.seed,
    )  # fmt: skip
    assert roles.calibrate is not None and roles.evaluation is not None and roles.evaluation.labels is not None
    return Case(reading.artifact, roles.calibrate, roles.evaluation)


def trained(name: str, time_s: float, effort: speed.Effort, folder: Path) -> dict[str, Any]:
    """One model: its bundle and all alternatives, side by side."""
    model, options = alias.made_ready(name, folder, alias.cases(folder)[name])
    bundle = perwatt.optimize(
        model, target=alias.ALIAS, out=folder / "bundle", force=True, scenario="offline", time=f"{time_s:g}s", trials=0,
        **{**options, "max_drop": BUDGETS[name]},
    )  # fmt: skip
    case = read(model, options)
    saved = {"judging": case.judging.save(folder / "judging")}
    saved["fed"] = case.judging.take(FED).without_labels().save(folder / "fed")
    made, failed = alternatives(name, case, folder)
    reference = files.outputs(case.artifact, case.judging, folder)
    told: dict[str, Any] = {"shipped": shipped(bundle), "budget_points": BUDGETS[name], "failed": failed}
    told["float32_accuracy"] = files.accuracy(reference, case.judging.labels)
    with ExitStack() as cleanup:
        workers = {"ours": opened_bundle(cleanup, bundle, saved["fed"])}
        for side, path in sides(made):
            try:
                workers[side] = opened(cleanup, side, path, saved["fed"])
            except PerwattError as error:
                failed[side] = str(error)
        told["accuracy"] = {
            side: accuracy(worker, saved["judging"], case.judging.labels, folder / f"outputs-{number}")
            for number, (side, worker) in enumerate(workers.items())
        }
        found = speed.interleaved({side: speed.window(w, effort.seconds) for side, w in workers.items()}, effort.rounds)
    told["costs"] = {side: speed.told(windows_s) for side, windows_s in found.items()}
    told["ours_to"] = {
        side: asdict(paired_ratio(found["ours"], windows_s)) for side, windows_s in found.items() if side != "ours"
    }
    print(f"{name}: {told['ours_to']}; failed: {failed}", file=sys.stderr, flush=True)
    return told


def alternatives(name: str, case: Case, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Files by what made them, and why one could not be made."""
    made, failed = {"float": case.artifact.file(folder)}, {}
    calls = files.one_by_one(case.artifact, case.calibrate)
    makers = {
        "nncf": lambda out: files.nncf_file(made["float"], calls, name == "minilm", out),
        "onnxruntime-int8": lambda out: files.onnxruntime_file(made["float"], calls, out),
    }
    for kind, maker in makers.items():
        try:
            made[kind] = maker(folder / f"{kind}.onnx")
        except Exception as error:
            failed[kind] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return made, failed


def sides(made: dict[str, Path]) -> list[tuple[str, Path]]:
    """Every file on every backend that has its precision: `nncf, openvino:f32`."""
    found = []
    for backend in BACKENDS:
        target, _, precision = backend.partition(":")
        if precision in registry.target(target).capabilities().floating_precisions:
            found += [(f"{kind}, {backend}", path) for kind, path in made.items()]
    return found


def opened(cleanup: ExitStack, side: str, path: Path, fed: Path) -> Worker:
    """A worker with one alternative, warm."""
    target, _, precision = side.rpartition(", ")[2].partition(":")
    cpus = len(os.sched_getaffinity(0))
    return speed.opened(cleanup, side, path, target, OperatingPoint("offline", BATCH, cpus, cpus, precision), fed)[0]


def opened_bundle(cleanup: ExitStack, bundle: Any, fed: Path) -> Worker:
    """A worker with what a bundle holds, at its own operating point, warm."""
    program = bundle.program
    worker = cleanup.enter_context(Worker("ours"))
    worker.call(
        "load", target=program["target"], folder=str(bundle.path / registry.target(program["target"]).name()),
        signature=asdict(bundle.signature), point=program["operating_point"],
    )  # fmt: skip
    worker.call("prepare", samples=str(fed), warm_up_s=1.0, most_s=5.0)
    return worker


def shipped(bundle: Any) -> dict[str, Any]:
    """What the report says was shipped."""
    names = [one["name"] for one in bundle.report["candidates"] if one["verdict"] == "shipped"]
    program = bundle.program
    return {
        "outcome": bundle.outcome, "names": names, "target": program["target"],
        "operating_point": program["operating_point"],
    }  # fmt: skip


def accuracy(worker: Worker, judging: Path, labels: np.ndarray, out: Path) -> float:
    """What the opened program scores."""
    worker.call("predict", samples=str(judging), out=str(out))
    return files.accuracy(files.first_output(load_outputs(out)), labels)


# Telling --------------------------------------------------------------------------------------------------------------


def drop(its: dict[str, Any], side: str) -> float:
    """Points of accuracy lost against float32."""
    return round(100 * (its["float32_accuracy"] - its["accuracy"][side]), 9)


def best(its: dict[str, Any]) -> str:
    """The alternative that takes the fewest CPU seconds among those within the budget, by its ratio to ours."""
    within = [side for side in its["ours_to"] if drop(its, side) <= its["budget_points"]]
    return max(within, key=lambda side: its["ours_to"][side]["value"] or 0.0)


def verdicts(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """Ours as fast as the best alternative within the budget, and within it itself."""
    lines = []
    for name, its in results.items():
        other = best(its)
        ratio = Ratio(**its["ours_to"][other])
        text = f"{name}: ours {speed.words(ratio)} × {other} (at most {files.WITHIN:g} within noise)"
        lines.append((text, files.near(ratio)))
        lost = drop(its, "ours")
        lines.append(
            (f"{name}: {lost:.2f} points lost (at most {its['budget_points']:g})", lost <= its["budget_points"])
        )
    return lines


def table(results: dict[str, Any]) -> str:
    """Every side of every model, as Markdown."""
    lines = ["| model | side | CPU ms | accuracy | points lost | ours ÷ it |", "| --- |" + " --- |" * 5]
    for name, its in results.items():
        order: Sequence[str] = sorted(
            its["costs"], key=lambda side: its["costs"][side]["cpu_ms_per_inference"]["value"]
        )
        for side in order:
            what = (
                side
                if side != "ours"
                else f"**ours**: {', '.join(its['shipped']['names'])}, {its['shipped']['target']}"
            )
            ratio = speed.words(Ratio(**its["ours_to"][side])) if side != "ours" else "–"
            cost = its["costs"][side]["cpu_ms_per_inference"]["value"]
            over = " (over the budget)" if drop(its, side) > its["budget_points"] else ""
            cells = [name, what, f"{cost:.4f}", f"{its['accuracy'][side]:.2%}", f"{drop(its, side):.2f}{over}", ratio]
            lines.append("| " + " | ".join(cells) + " |")
        lines += [f"| {name} | {kind} | failed: {why} | – | – | – |" for kind, why in its["failed"].items()]
    return "\n".join(lines)
