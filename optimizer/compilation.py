"""One run, from a recipe to a bundle: read, verify, lower, measure, decide, write.

    model → Artifact → Pipeline (passes, each verified) → Study (lowered, judged, measured) → Bundle

This is the only place that knows the whole way; no step below reaches back.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perwatt import registry
from perwatt.artifact import Artifact
from perwatt.bench.meters import open_meter
from perwatt.bundle import Bundle, check_destination, no_room
from perwatt.candidates import explore
from perwatt.contract import Context, Pass
from perwatt.data import Samples
from perwatt.errors import InputError, PerwattError
from perwatt.isolation import Worker, workspace
from perwatt.measuring import SCREENING, Conductor, Effort, figures, interleave
from perwatt.pipeline import Pipeline, Proof, Row
from perwatt.preparation import Prepared, Progress, first_row, operating_point, prepare, source_outputs
from perwatt.recipe import OneOf, PassStep, Recipe
from perwatt.sides import Side
from perwatt.signature import Batch
from perwatt.study import Result, Study
from perwatt.worker import load_outputs

PASSES_SHARE, SCREENING_SHARE = 0.5, 0.75
"""Of the time budget: when no further pass is begun, and when no further candidate is screened."""


@dataclass
class Run:
    """What one run knows when it is over: what the report tells."""

    recipe: Recipe
    steps: list[PassStep | OneOf]
    folder: Path
    started: float
    prepared: Prepared
    rows: list[Row]
    result: Result
    energy: dict[str, Any]


def out_folder(recipe: Recipe, out: str | Path | None) -> Path:
    """Where the bundle goes: `out`, else `<stem>-<target>` in the working directory."""
    return Path(out) if out is not None else Path(f"{model_name(recipe)}-{recipe.target.name}")


def model_name(recipe: Recipe) -> str:
    """The model's name: its file's stem, or its folder's name."""
    path = Path(recipe.model.path)
    return path.resolve().name if path.is_dir() else path.stem


def inputs_of(recipe: Recipe) -> list[str]:
    """The files and folders that a run reads."""
    data = recipe.data
    return [recipe.model.path, *(where for where in (data.all, data.calibrate, data.eval, data.train) if where)]


@contextmanager
def full_disk_explained() -> Iterator[None]:
    """A full disk under the scratch folder is the user's to mend, and no internal error."""
    try:
        yield
    except OSError as error:
        if not no_room(error):
            raise
        raise InputError(f"no room in the folder {tempfile.gettempdir()}", fix="free some, or set TMPDIR") from None


def resolve_steps(recipe: Recipe) -> list[PassStep | OneOf]:
    """The recipe's passes, `default` spelled out, every setting checked. Raises InputError."""
    pruning = recipe.data.train is not None and recipe.budget.max_drop is not None
    steps = registry.default_steps(pruning) if recipe.passes == "default" else list(recipe.passes)
    for step in steps:
        for one in step.steps if isinstance(step, OneOf) else [step]:
            registry.bind(one)
    return steps


def compile_model(
    recipe: Recipe, out: Path, *, force: bool = False, progress: Progress = lambda stage, share: None
) -> Bundle:
    """Run the recipe and leave a bundle in `out`. Raises PerwattError; then nothing was written."""
    from perwatt.writing import write_bundle

    started = time.perf_counter()
    steps = resolve_steps(recipe)
    registry.target(recipe.target.name)
    check_destination(out, model_name(recipe), force, inputs_of(recipe))
    with full_disk_explained(), workspace() as scratch, Worker("checks") as checks, ExitStack() as cleanup:
        prepared = prepare(recipe, Path(scratch), checks, progress, cleanup)
        meter, notes = open_meter(device=prepared.target["device"])
        cleanup.callback(meter.close)
        prepared.notes.extend(notes)
        conductor = Conductor(meter, seed=recipe.seed)
        run = _search(recipe, steps, prepared, Path(scratch), checks, conductor, progress, started)
        for side in run.result.sides.values():
            cleanup.callback(side.close)
        progress("writing the bundle", 0.96)
        return write_bundle(run, out)


def _search(recipe: Recipe, steps: list[PassStep | OneOf], prepared: Prepared, folder: Path, checks: Worker,
            conductor: Conductor, progress: Progress, started: float) -> Run:  # fmt: skip
    """From the model as read to the answer: passes, candidates, measurements."""
    pipeline = _pipeline(recipe, prepared, folder, checks, _pass_progress(progress, steps), started)
    first = first_row(
        prepared.reading,
        pipeline.outputs(prepared.source),
        lambda: source_outputs(prepared.reading, prepared.saved["check"], prepared.eager, recipe, folder),
    )
    progress("running the passes", 0.3)
    branches = explore(pipeline, prepared.source, steps)
    study = Study(
        target=recipe.target.name,
        capabilities=prepared.capabilities,
        point=operating_point(recipe),
        budget=recipe.budget,
        source=prepared.source,
        timing=prepared.saved["timing"],
        select=prepared.select,
        evaluation=prepared.evaluation,
        max_drop=prepared.max_drop,
        folder=folder,
        eager=prepared.eager,
        effort=_effort(recipe, started),
        deadline=_deadline(recipe, started, SCREENING_SHARE),
        progress=lambda share, text: progress(text, 0.45 + 0.5 * share),
        conductor=conductor,
    )
    result = study.run(branches)
    result.notes = [*prepared.notes, *result.notes]
    return Run(recipe, steps, folder, started, prepared, [first, *result.rows], result, conductor.meter.describe())


def _deadline(recipe: Recipe, started: float, share: float) -> float | None:
    """When `share` of the time budget is spent, in `time.monotonic()` seconds; None without a budget."""
    if recipe.budget.time is None:
        return None
    return time.monotonic() + share * recipe.budget.time - (time.perf_counter() - started)


def _effort(recipe: Recipe, started: float) -> Effort:
    """How long the final measurement may take: a fair share of the time budget where there is one."""
    if recipe.budget.time is None:
        return Effort()
    left = recipe.budget.time - (time.perf_counter() - started)
    return Effort(max_s=max(1.0, min(Effort.max_s, left * 0.4)))


def _pipeline(recipe: Recipe, prepared: Prepared, folder: Path, checks: Worker, progress: Callable[[str], None],
              started: float) -> Pipeline:  # fmt: skip
    """The pipeline with its context and its proofs wired to the worker."""
    samples, saved = prepared.samples, prepared.saved
    deadline = _deadline(recipe, started, PASSES_SHARE)

    def execute(artifact: Artifact, batches: Samples, taps: Sequence[str]) -> list[Batch]:
        where = batches.save(folder / f"batches-{batches.digest()[:16]}")
        return reference(artifact, where, taps)

    def reference(artifact: Artifact, where: Path, taps: Sequence[str] = ()) -> list[Batch]:
        out = folder / f"reference-{artifact.digest()[:16]}-{where.name}-{len(taps)}"
        checks.call("reference", model=str(artifact.file(folder)), samples=str(where), out=str(out), taps=list(taps))
        return load_outputs(out)

    def run_isolated(made_by: Pass, artifact: Artifact) -> tuple[Artifact, list[str]]:
        answer = checks.call(
            "run_pass",
            step={"name": made_by.name(), "settings": made_by.settings()},
            model=str(artifact.file(folder)),
            roles={role: str(where) for role, where in saved.items() if role in ("calibrate", "learn", "select")},
            capabilities=asdict(prepared.capabilities),
            budget=recipe.budget.model_dump(),
            seed=recipe.seed,
            folder=str(folder),
            **({} if deadline is None else {"timeout_s": max(1.0, deadline - time.monotonic())}),
        )
        same = answer["model"] == str(artifact.file(folder))
        return (artifact if same else Artifact.load(answer["model"])), answer["changes"]

    def roles(role: str) -> Samples:
        if role not in ("calibrate", "learn", "select") or role not in samples:
            raise PerwattError(f"there are no samples for {role!r} that a pass may see")
        return samples[role]

    context = Context(
        samples=roles,
        capabilities=prepared.capabilities,
        budget=recipe.budget,
        seed=recipe.seed,
        deadline=deadline,
        progress=progress,
        execute=execute,
        measure=lambda artifacts: measure_graphs(recipe, artifacts, saved["timing"], folder),
    )
    proof = Proof(
        check=lambda artifact: checks.call("check", model=str(artifact.file(folder)))["problems"],
        reference=lambda artifact: reference(artifact, saved["check"]),
        run_isolated=run_isolated,
    )
    return Pipeline(prepared.source, context, proof)


def measure_graphs(recipe: Recipe, artifacts: Sequence[Artifact], timing: Path, folder: Path) -> list[float]:
    """CPU seconds per inference of each artifact at the recipe's operating point, measured interleaved."""
    sides: list[Side] = []
    try:
        for number, artifact in enumerate(artifacts):
            sides.append(Side.lowered(f"graph {number}", recipe.target.name, artifact, operating_point(recipe), folder))
        interleave(sides, timing, SCREENING)
        return [float(figures(side.windows)["cpu_s_per_inference"] or 0) for side in sides]
    finally:
        for side in sides:
            side.close()


def _pass_progress(progress: Progress, steps: Sequence[PassStep | OneOf]) -> Callable[[str], None]:
    """Progress from 30 % to 45 % of the run, an equal share for each pass."""
    count = sum(len(step.steps) if isinstance(step, OneOf) else 1 for step in steps)
    done = iter(range(1, 1 << 30))
    return lambda text: progress(text, 0.3 + 0.15 * min(1.0, next(done) / (count + 1)))
