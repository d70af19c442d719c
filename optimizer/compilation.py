"""One run, from a recipe to a bundle: read, verify, lower, measure, decide, write.

    model → Artifact → Pipeline (passes, each verified) → Study (lowered, judged, measured) → Bundle

This is the only place that knows the whole way; no step below reaches back.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perwatt import datasets, metrics, registry
from perwatt.artifact import Artifact
from perwatt.bundle import Bundle, check_destination, is_bundle, no_room
from perwatt.contract import Capabilities, Context, OperatingPoint, Pass, Tolerance
from perwatt.data import Samples
from perwatt.drift import drift
from perwatt.errors import BackendError, InputError, PerwattError, TargetError
from perwatt.isolation import Worker, workspace
from perwatt.measuring import SCREENING, Effort, Side, figures, interleave
from perwatt.pipeline import Pipeline, Proof, Row, finite_drift
from perwatt.reading import Reading, read
from perwatt.recipe import OneOf, PassStep, Recipe
from perwatt.signature import Batch
from perwatt.study import Evaluation, Result, Study, check_original, explore
from perwatt.synthetic import synthetic
from perwatt.worker import capabilities_from_json, load_outputs

CHECKED_SAMPLES = 16
"""Samples on which drift is measured after every pass."""

OFFLINE_BATCH = 32

SOURCE_TOLERANCE = Tolerance(atol=1e-3, rtol=1e-2)
"""Between a source and the artifact read from it; a mistake in reading is orders of magnitude beyond rounding."""
Progress = Callable[[str, float], None]


@dataclass
class Run:
    """What one run knows: filled in on its way, told in the report."""

    recipe: Recipe
    steps: list[PassStep | OneOf]
    folder: Path
    started: float
    target: dict[str, Any]
    capabilities: Capabilities
    reading: Reading
    roles: datasets.Roles
    samples: dict[str, Samples]
    evaluation: Evaluation | None
    max_drop: float
    rows: list[Row]
    result: Result
    facts: dict[str, Any]


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


def compile_model(recipe: Recipe, out: Path, *, force: bool = False, progress: Progress = lambda stage, share: None) -> Bundle:
    """Run the recipe and leave a bundle in `out`. Raises PerwattError; then nothing was written."""
    from perwatt.writing import write_bundle

    started = time.perf_counter()
    steps = resolve_steps(recipe)
    registry.target(recipe.target.name)
    check_destination(out, model_name(recipe), force, inputs_of(recipe))
    with full_disk_explained(), workspace() as scratch, Worker("checks") as checks:
        run = _prepare(recipe, steps, Path(scratch), checks, progress, started)
        try:
            progress("writing the bundle", 0.96)
            return write_bundle(run, out)
        finally:
            for side in run.result.sides.values():
                side.close()


def _prepare(recipe: Recipe, steps: list[PassStep | OneOf], folder: Path, checks: Worker, progress: Progress, started: float) -> Run:
    progress(f"looking at the target {recipe.target.name}", 0.0)
    target = checks.call("target", name=recipe.target.name)
    if target["missing"]:
        raise TargetError(f"target {recipe.target.name} can't be used here: {'; '.join(target['missing'])}")
    capabilities = capabilities_from_json(target["capabilities"])
    progress(f"reading {recipe.model.path}", 0.03)
    # What the worker will need is imported while the model is read here; nothing is being measured yet.
    meanwhile = ThreadPoolExecutor(max_workers=1)
    meanwhile.submit(checks.call, "warm")
    reading = read_model(recipe, checks)
    source = reading.artifact
    progress("opening the data", 0.15)
    roles = datasets.open_roles(
        recipe.data, source.signature, raw_inputs=recipe.inputs, tokenizer=reading.tokenizer,
        label2id=reading.label2id, seed=recipe.seed,
    )  # fmt: skip
    samples, notes = _samples(roles, source, recipe.seed)
    saved = {role: found.save(folder / "samples" / role) for role, found in samples.items()}
    _check_model(source, folder, checks)
    progress("judging the original", 0.2)
    eager, opened = _eager_side(reading, recipe, folder, meanwhile)
    try:
        select, evaluation = _evaluations(recipe, roles, samples, saved, source, folder, checks)
        try:
            opened.result()
        except BackendError as error:
            notes.append(f"torch eager could not be measured: {error}")
            eager = None
        pipeline = _pipeline(recipe, source, samples, saved, capabilities, folder, checks, _pass_progress(progress, steps))
        rows = [_first_row(
            reading, pipeline.outputs(source), lambda: _source_outputs(reading, saved["check"], eager, recipe, folder)
        )]  # fmt: skip
        progress("running the passes", 0.3)
        branches = explore(pipeline, source, steps)
        study = Study(
            target=recipe.target.name,
            capabilities=capabilities,
            point=operating_point(recipe),
            budget=recipe.budget,
            source=source,
            timing=saved["timing"],
            select=select,
            evaluation=evaluation,
            max_drop=_max_drop(recipe, evaluation),
            folder=folder,
            eager=eager,
            effort=_effort(recipe, started),
            progress=lambda share, text: progress(text, 0.45 + 0.5 * share),
        )
        result = study.run(branches)
    except BaseException:
        if eager is not None:
            eager.close()
        raise
    result.notes = [*roles.notes, *notes, *result.notes]
    energy = result.sides["original"].worker.call("meter_facts")
    facts = {"energy": energy, "data": _data_facts(recipe, roles, samples)}
    return Run(
        recipe, steps, folder, started, target, capabilities, reading, roles, samples, evaluation,
        study.max_drop, [*rows, *result.rows], result, facts,
    )  # fmt: skip


def read_model(recipe: Recipe, checks: Worker) -> Reading:
    """The recipe's model; a bundle counts as the model in it."""
    path = Path(recipe.model.path)
    from_bundle = is_bundle(path)

    def convert(model: Path, opset: int, out: Path) -> Path:
        return Path(checks.call("convert", model=str(model), opset=opset, out=str(out))["model"])

    reading = read(
        path / "model.onnx" if from_bundle else path,
        arch=recipe.model.arch,
        arch_args=recipe.model.arch_args,
        inputs=recipe.model.input,
        example=datasets.peek(recipe.data),
        trust=recipe.model.trust,
        raw_inputs=recipe.inputs,
        convert=convert,
    )
    if from_bundle and (path / "tokenizer").is_dir():
        from dataclasses import replace

        assets = tuple(sorted((path / "tokenizer").iterdir()))
        return replace(reading, tokenizer=path / "tokenizer", assets=assets)
    return reading


def operating_point(recipe: Recipe) -> OperatingPoint:
    """The point that the recipe asks for; the backend decides what it leaves open."""
    target = recipe.target
    batch = target.batch or (OFFLINE_BATCH if target.scenario == "offline" else 1)
    return OperatingPoint(scenario=target.scenario, batch=batch, threads=target.threads)


def _effort(recipe: Recipe, started: float) -> Effort:
    """How long the final measurement may take: a fair share of the time budget where there is one."""
    if recipe.budget.time is None:
        return Effort()
    left = recipe.budget.time - (time.perf_counter() - started)
    return Effort(max_s=max(1.0, min(Effort.max_s, left * 0.4)))


def _samples(roles: datasets.Roles, source: Artifact, seed: int) -> tuple[dict[str, Samples], list[str]]:
    """Samples for every role, synthetic ones where there are none."""
    real = roles.calibrate or roles.select or roles.confirm
    if real is None:
        made = synthetic(source, seed=seed)
        return {"calibrate": made, "check": made.take(CHECKED_SAMPLES, seed), "timing": made}, [
            "no data: inputs are synthetic, so speed is measured and accuracy is not known"
        ]
    basis = roles.select or real
    found = {
        "calibrate": roles.calibrate or real,
        "check": basis.take(CHECKED_SAMPLES, seed).without_labels(),
        "timing": basis.without_labels(),
    }
    if roles.learn is not None:
        found["learn"] = roles.learn
    if roles.select is not None:
        found["select"] = roles.select
    if roles.evaluation is not None:
        found["evaluation"] = roles.evaluation
    return found, []


def _check_model(source: Artifact, folder: Path, checks: Worker) -> None:
    """The model must hold before anything is done to it. A crash of the checker names the model, not us."""
    try:
        problems = checks.call("check", model=str(source.file(folder)))["problems"]
    except BackendError as error:
        raise InputError(f"the model can't be checked: {error}") from None
    # Custom operators and rare types fail the checker and run all the same; the lowering will tell.
    serious = [p for p in problems if "No Op registered" not in p and "No opset import" not in p]
    if serious:
        raise InputError(f"the model is not valid ONNX: {serious[0]}")


def _evaluations(recipe: Recipe, roles: datasets.Roles, samples: dict[str, Samples], saved: dict[str, Path],
                 source: Artifact, folder: Path, checks: Worker) -> tuple[Evaluation | None, Evaluation | None]:  # fmt: skip
    """What to choose with and what to judge with; stops where the original itself makes no sense on the data."""
    if "evaluation" not in samples or "select" not in samples:
        return None, None
    outputs = _fp32_outputs(source, saved["evaluation"], folder, checks, recipe.target.name)
    metric = metrics.resolve(recipe.data.metric, samples["evaluation"], outputs)
    # The evaluation samples are the select samples and then the confirm samples, batch by batch.
    first = outputs[: len(list(samples["select"]))]
    found = [
        Evaluation(metric, samples[role], saved[role], part, metric.score(part, samples[role], part))
        for role, part in (("select", first), ("evaluation", outputs))
    ]
    check_original(found[1], recipe.data.expect)
    return found[0], found[1]


def _fp32_outputs(source: Artifact, samples: Path, folder: Path, checks: Worker, target: str) -> list[Batch]:
    """The original in float32: by ONNX Runtime, else by the target itself."""
    out = folder / f"fp32-{samples.name}"
    try:
        checks.call("reference", model=str(source.file(folder)), samples=str(samples), out=str(out), optimized=True)
    except BackendError:
        point = OperatingPoint(floating_precision="f32")
        with Worker("float32 original") as worker:
            worker.call("open", target=target, model=str(source.file(folder)), point=point.to_json())
            worker.call("predict", samples=str(samples), out=str(out))
    return load_outputs(out)


def _max_drop(recipe: Recipe, evaluation: Evaluation | None) -> float:
    if recipe.budget.max_drop is not None:
        return recipe.budget.max_drop
    if evaluation is None:
        return 1.0
    default = evaluation.metric.default_max_drop
    return default if default is not None else 0.01 * abs(evaluation.original.value)


def _eager_side(reading: Reading, recipe: Recipe, folder: Path, meanwhile: Executor) -> tuple[Side | None, Future[None]]:
    """torch eager in a worker of its own, for row 0 and for the comparison, and when it will be open; None where its
    inputs are not those that are fed."""
    if reading.exported is None or recipe.inputs:
        return None, meanwhile.submit(lambda: None)
    import torch

    path = folder / "eager.pt2"
    torch.export.save(reading.exported, path)
    side, opened = Side.eager(path, reading.artifact, operating_point(recipe), folder)
    return side, meanwhile.submit(opened)


def _pipeline(recipe: Recipe, source: Artifact, samples: dict[str, Samples], saved: dict[str, Path],
              capabilities: Capabilities, folder: Path, checks: Worker, progress: Callable[[str], None]) -> Pipeline:  # fmt: skip
    from dataclasses import asdict

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
            capabilities=asdict(capabilities),
            budget=recipe.budget.model_dump(),
            seed=recipe.seed,
            folder=str(folder),
        )
        same = answer["model"] == str(artifact.file(folder))
        return (artifact if same else Artifact.load(answer["model"])), answer["changes"]

    def roles(role: str) -> Samples:
        if role not in ("calibrate", "learn", "select") or role not in samples:
            raise PerwattError(f"there are no samples for {role!r} that a pass may see")
        return samples[role]

    context = Context(
        samples=roles,
        capabilities=capabilities,
        budget=recipe.budget,
        seed=recipe.seed,
        deadline=None if recipe.budget.time is None else time.monotonic() + recipe.budget.time,
        progress=progress,
        execute=execute,
        measure=lambda artifacts: measure_graphs(recipe, artifacts, saved["timing"], folder),
    )
    proof = Proof(
        check=lambda artifact: checks.call("check", model=str(artifact.file(folder)))["problems"],
        reference=lambda artifact: reference(artifact, saved["check"]),
        run_isolated=run_isolated,
    )
    return Pipeline(source, context, proof)


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


def _first_row(reading: Reading, ours: list[Batch] | str, source: Callable[[], list[Batch] | None]) -> Row:
    """Row 0 of the ledger: the source model (`source()` runs it) against the first artifact, on the same samples.

    Raises InputError where the artifact is not the model that was given."""
    step = reading.artifact.steps[0]
    row = Row("read", dict(step.settings), "applied", changes=list(step.changes) or ["as it is"])
    try:
        theirs = source()
    except PerwattError as error:
        row.reason = f"not compared with the source: {error}"
        return row
    if isinstance(ours, str) or theirs is None:
        row.reason = f"not verified numerically: {ours}" if isinstance(ours, str) else "not compared with the source"
        return row
    measured = drift(theirs, ours, SOURCE_TOLERANCE)
    row.drift = row.drift_from_original = finite_drift(measured)
    if measured.reasons:
        again = source()
        if again is None or not drift(theirs, again, SOURCE_TOLERANCE).reasons:
            words = "; ".join(measured.reasons)
            raise InputError(f"the model as read is not the model as given: {words}", fix="please report it")
        row.reason = "the source gives other outputs each time (dropout or random numbers), so it can't be compared"
    return row


def _source_outputs(reading: Reading, check: Path, eager: Side | None, recipe: Recipe, folder: Path) -> list[Batch] | None:
    """What the source itself gives on the checking samples: torch eager, or the ONNX file as it came."""
    out = folder / "source-outputs"
    if eager is not None:
        eager.worker.call("predict", samples=str(check), out=str(out))
    elif reading.format == "onnx" and not recipe.inputs:
        path = Path(recipe.model.path)
        path = path / "model.onnx" if path.is_dir() else path
        with Worker("source") as worker:
            worker.call("reference", model=str(path), samples=str(check), out=str(out))
    else:
        return None
    return load_outputs(out)


def _data_facts(recipe: Recipe, roles: datasets.Roles, samples: dict[str, Samples]) -> dict[str, Any]:
    real = bool(roles.sources) or roles.calibrate is not None or roles.select is not None
    return {
        "synthetic": not real,
        "samples": {role: len(found) for role, found in samples.items() if role not in ("check", "timing")},
        "unseen": len(roles.confirm) if roles.confirm is not None else 0,
        "metric": recipe.data.metric,
    }
