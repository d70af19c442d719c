"""How well the plan of a search foresees what choices cost: estimates beside measurements.

    python cost_model.py [--models resnet20,resnet56,minilm] [--target openvino] [--rounds 12] [--seconds 1] [--quick]

For each trained model of PERWATT_DATA a plan is made as `optimize --time` makes it (perwatt.planning): the lossless graph and its
forms in int8 are measured and profiled, a cost model is fitted, and every choice gets an estimate. Then the choices are made for
real and run side by side with the original, in rounds, one thread at batch 32: `quantize-int8` with products alone and with all
operators, a tenth to four tenths of the blocks dropped, 30 % of the channels, and three tenths of the blocks in int8. Nothing is
taught back, since values of weights cost no time. A choice that leaves the graph as it was, or whose cost nobody knows
beforehand, is told and compares nothing.

The error is |estimated ÷ measured − 1|. Wanted: a median of at most 10 %, and that what costs least of the choices by themselves
is among the three that are estimated to cost least. Writes bench/results/cost_model.json after each model (what a run leaves out
stays as it was), exits 1 where that was missed. `--quick` tries it out: ResNet-20, short windows, nothing written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _fusion_speed as speed
import _precision_files as files
import _precision_trained as trained
import alias

from perwatt import choices, planning, registry
from perwatt.artifact import Artifact
from perwatt.bench.fingerprint import fingerprint
from perwatt.bench.statistics import paired_ratio
from perwatt.choices import PRECISION, Space
from perwatt.contract import OperatingPoint
from perwatt.cost_model import Estimate
from perwatt.data import Samples
from perwatt.errors import BackendError
from perwatt.measurement import Ratio
from perwatt.pipeline import Pipeline, Proof
from perwatt.plan import Limits, Plan
from perwatt.recipe import OneOf, PassStep
from perwatt.trials import walk

RESULTS = Path(__file__).resolve().parents[1] / "results" / "cost_model.json"
MODELS = ("resnet20", "resnet56", "minilm")
BATCH, FED, CALIBRATED = 32, 128, 128
MEDIAN_WANTED, AMONG = 0.10, 3
INT8 = (PassStep(name="quantize-int8"), PassStep(name="quantize-int8", settings={"operators": "all"}))
BLOCKS, CHANNELS, TOGETHER = (1, 2, 3, 4), 2, 3
"""Indices of a tenth to four tenths of the blocks, of 30 % of the channels, and of the blocks that go in int8."""


def compared(name: str, target: str, effort: speed.Effort, folder: Path) -> dict[str, Any]:
    """One model: what the plan says of each choice, and what it measures."""
    model, options = alias.made_ready(name, folder, alias.cases(folder)[name])
    case = trained.read(model, options)
    precision = registry.target(target).capabilities().floating_precisions[0]
    point = OperatingPoint("offline", BATCH, 1, 1, precision)
    fed = case.judging.take(FED).without_labels()
    pipeline = opened(case, target, point, fed, folder)
    lossless = registry.edit_steps(registry.default_steps(), registry.LOSSLESS)
    steps = [*lossless, PassStep(name="drop-blocks"), PassStep(name="prune-channels"), OneOf(steps=list(INT8))]
    space = choices.space(steps, {target: (precision,)})
    start = time.perf_counter()
    plan = planning.plan(
        space, case.artifact, {target: pipeline}, originals={(target, precision): 1.0}, timing=fed, batch=BATCH,
        judged=len(case.judging), limits=Limits(),
    )  # fmt: skip
    took = time.perf_counter() - start
    print("\n".join(plan.words()), file=sys.stderr, flush=True)
    made = {space.words(values): walk(pipeline, case.artifact, space.steps(values)) for values in wanted(space)}
    told = beside(space, plan, made)
    graphs = {
        "original": case.artifact,
        **{choice: made[choice].artifact for choice in told if "why" not in told[choice]},
    }
    ratios = raced(graphs, target, point, fed.save(folder / "fed"), effort, folder)
    for choice, ratio in ratios.items():
        told[choice]["measured"] = asdict(ratio)
        if told[choice]["estimated"] is not None and ratio.value:
            told[choice]["error"] = abs(told[choice]["estimated"]["value"] / ratio.value - 1)
    return {
        "machine": fingerprint(), "point": point.to_json(), "plan_s": plan.seconds, "with_passes_s": took,
        "cost_model": plan.to_json()["models"].get(target), "choices": told,
    }  # fmt: skip


def opened(case: trained.Case, target: str, point: OperatingPoint, fed: Samples, folder: Path) -> Pipeline:
    """Passes that may ask the target, all in this process; outputs are not compared."""
    given = files.context(case.calibrate.take(CALIBRATED), target, folder)
    asked = files.measuring(given, target, point, fed, folder)

    def not_compared(*_: Any) -> Any:
        raise BackendError("not compared here")

    proof = Proof(lambda made: [], not_compared, lambda made_by, before, _: made_by.run(before, asked), not_compared)
    return Pipeline(case.artifact, asked, proof, target=target)


def wanted(space: Space) -> list[dict[str, int]]:
    """The choices to make and measure."""
    usual = space.usual()
    found = [{PRECISION: index} for index in range(1, 1 + len(INT8))]
    found += [{"drop-blocks": index} for index in BLOCKS]
    found += [{"prune-channels": CHANNELS}, {"drop-blocks": TOGETHER, PRECISION: 1}]
    return [space.canonical({**usual, **one}) for one in found]


def beside(space: Space, plan: Plan, made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each choice with its estimate, and why it has none or is not made."""
    found: dict[str, dict[str, Any]] = {}
    seen: dict[str, str] = {}
    for values in wanted(space):
        choice = space.words(values)
        estimate, digest = plan.factors.of(values), made[choice].artifact.digest()
        told = found[choice] = {"estimated": asdict(estimate) if isinstance(estimate, Estimate) else None}
        changed = [row for row in made[choice].rows if registry.pass_class(row.name).tolerance is None]
        if any(row.status != "applied" for row in changed):
            told["why"] = "; ".join(
                f"{row.name}: {row.reason or row.status}" for row in changed if row.status != "applied"
            )
        elif digest in seen:
            told["why"] = f"the same graph as {seen[digest]}"
        seen.setdefault(digest, choice)
    return found


def raced(
    graphs: dict[str, Artifact], target: str, point: OperatingPoint, fed: Path, effort: speed.Effort, folder: Path
) -> dict[str, Ratio]:
    """CPU seconds per inference of each ÷ the original's, measured in rounds."""
    with ExitStack() as cleanup:
        workers = {
            choice: speed.opened(cleanup, choice, made.file(folder), target, point, fed)[0]
            for choice, made in graphs.items()
        }
        found = speed.interleaved({side: speed.window(w, effort.seconds) for side, w in workers.items()}, effort.rounds)
    return {side: paired_ratio(windows, found["original"]) for side, windows in found.items() if side != "original"}


# Telling ----------------------------------------------------------------------------------------------------------------


def errors(results: dict[str, Any]) -> dict[str, float]:
    """By model and choice."""
    return {
        f"{name}: {choice}": told["error"]
        for name, its in results.items()
        for choice, told in its["choices"].items()
        if "error" in told
    }


def verdicts(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """The median error of all choices, and for each model whether the cheapest was foreseen."""
    found = errors(results)
    if not found:
        return [("nothing was both estimated and measured", False)]
    median, worst = statistics.median(found.values()), max(found, key=lambda one: found[one])
    words = f"median error {median:.1%} of {len(found)} choices (wanted {MEDIAN_WANTED:.0%}); worst {found[worst]:.1%}, {worst}"
    lines = [(words, median <= MEDIAN_WANTED)]
    for name, its in results.items():
        known = {choice: told for choice, told in its["choices"].items() if "error" in told}
        if known:
            cheapest = min(known, key=lambda one: known[one]["measured"]["value"])
            ranks = sorted(known, key=lambda one: known[one]["estimated"]["value"])
            place = ranks.index(cheapest) + 1
            lines.append((f"{name}: the cheapest ({cheapest}) was estimated to be number {place}", place <= AMONG))
    return lines


def table(results: dict[str, Any]) -> str:
    """Estimates beside measurements, as Markdown."""
    lines = ["| model | choice | estimated | measured | error |", "| --- | --- | --- | --- | --- |"]
    for name, its in results.items():
        for choice, told in its["choices"].items():
            estimate = told["estimated"]
            said = "–" if estimate is None else f"{estimate['value']:.3f} ± {estimate['spread']:.3f}"
            real = told.get("why", "–") if "measured" not in told else speed.words(Ratio(**told["measured"]))
            error = f"{told['error']:.1%}" if "error" in told else "–"
            lines.append(f"| {name} | {choice} | {said} | {real} | {error} |")
    return "\n".join(lines)


def main() -> int:
    """Every model, then the verdict on all that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--target", default="openvino")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--quick", action="store_true", help="ResNet-20, short windows, nothing written")
    asked = parser.parse_args()
    names = ["resnet20"] if asked.quick else asked.models.split(",")
    effort = speed.Effort(6, 0.3) if asked.quick else speed.Effort(asked.rounds, asked.seconds)
    known = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() and not asked.quick else {}
    for name in names:
        with tempfile.TemporaryDirectory() as aside:
            known[name] = compared(name, asked.target, effort, Path(aside))
        if not asked.quick:
            RESULTS.write_text(json.dumps({"models": known}, indent=1) + "\n")
    print(table(known))
    lines = verdicts(known)
    for words, holds in lines:
        print(f"{'ok  ' if holds else 'MISS'} {words}")
    return 0 if all(holds for _, holds in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
