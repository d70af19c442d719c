"""Everything before the first pass: the target, the model as read, its data, and what the original makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from perwatt import datasets, metrics, registry
from perwatt.artifact import Artifact
from perwatt.backends import Backend, ask, precision_refusal
from perwatt.bundle import is_bundle
from perwatt.contract import Capabilities, OperatingPoint, Tolerance
from perwatt.data import Samples
from perwatt.drift import drift
from perwatt.errors import BackendError, InputError, PerwattError, TargetError
from perwatt.evaluation import Evaluation, check_original
from perwatt.isolation import Worker
from perwatt.pipeline import Row, finite_drift
from perwatt.place import Place
from perwatt.reading import Reading, read
from perwatt.recipe import Recipe
from perwatt.sides import Side
from perwatt.signature import Batch
from perwatt.synthetic import synthetic
from perwatt.worker import load_outputs

TIME_FOR_SLOW_S = 600.0
"""With a time budget from here on, an alias tries backends that compile for tens of seconds too."""

CHECKED_SAMPLES = 16
"""Samples on which drift is measured after every pass."""

OFFLINE_BATCH = 32

SOURCE_TOLERANCE = Tolerance(atol=1e-3, rtol=1e-2)
"""Between a source and the artifact read from it; a mistake in reading is orders of magnitude beyond rounding."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Absent:
    """A backend that is not here: what such hardware rewards, and why nothing that serves the target can be used."""

    target: str
    capabilities: Capabilities
    reasons: tuple[str, ...]


@dataclass
class Opened:
    """The model as read, and its samples: all that passes and their proofs need. `saved` has the folder of each role's
    samples."""

    reading: Reading
    roles: datasets.Roles
    samples: dict[str, Samples]
    saved: dict[str, Path]
    notes: list[str]

    @property
    def source(self) -> Artifact:
        """The model as read."""
        return self.reading.artifact


@dataclass
class Prepared(Opened):
    """What is known before the first pass. Where no backend can be used here, `absent` says which one a portable bundle is
    prepared for. `select` is for choosing, `confirm` has what nothing was chosen by, `evaluation` both."""

    backends: list[Backend]
    absent: Absent | None
    select: Evaluation | None
    evaluation: Evaluation | None
    confirm: Evaluation | None
    max_drop: float
    eager: Side | None


def prepare(
    recipe: Recipe, folder: Path, checks: Worker, place: Place, progress: Progress, cleanup: ExitStack,
    imports: Sequence[str] = (),
) -> Prepared:  # fmt: skip
    """Look at the target where it is (`place`), read the model, open the data, judge the original. What must be closed
    goes into `cleanup`. `imports`: packages that passes will run.

    Raises PerwattError where any of them can't be used."""
    progress(f"looking at the target {recipe.target.name}", 0.0)
    with ExitStack() as asking:
        there = checks if place.words is None else asking.enter_context(place.worker("the targets"))
        backends, passed_over, absent = usable_backends(recipe, there)
    opened = open_model(recipe, folder, checks, progress, cleanup, imports)
    progress("judging the original", 0.2)
    eager = open_eager(opened, recipe, folder, place, cleanup)
    select, evaluation, confirm = _evaluations(recipe, backends, opened, folder, checks, place)
    opened.notes.extend(passed_over)
    return Prepared(
        opened.reading, opened.roles, opened.samples, opened.saved, opened.notes,
        backends, absent, select, evaluation, confirm, _max_drop(recipe, evaluation), eager.result(),
    )  # fmt: skip


def open_model(
    recipe: Recipe, folder: Path, checks: Worker, progress: Progress, cleanup: ExitStack, imports: Sequence[str] = ()
) -> Opened:
    """Read the recipe's model and open its data. What must be closed goes into `cleanup`. `imports`: packages that passes
    will run.

    Raises PerwattError where either can't be used."""
    meanwhile = _aside(cleanup)
    # What the worker will need is imported while the model is read here; nothing is being measured yet. It starts in this
    # thread, because a worker ends with the thread that started it.
    checks.start()
    meanwhile.submit(checks.call, "warm", imports=list(imports))
    progress(f"reading {recipe.model.path}", 0.03)
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
    return Opened(reading, roles, samples, saved, [*roles.shares, *roles.notes, *notes])


def _aside(cleanup: ExitStack) -> ThreadPoolExecutor:
    """One thread for what may go on meanwhile."""
    meanwhile = ThreadPoolExecutor(max_workers=1)
    cleanup.callback(meanwhile.shutdown, wait=False, cancel_futures=True)
    return meanwhile


def usable_backends(recipe: Recipe, checks: Worker) -> tuple[list[Backend], list[str], Absent | None]:
    """The backends that the recipe's target stands for and that can be used, in words which were passed over, and, where
    none can be used, the one that a portable bundle can be prepared for. Raises TargetError where there is none either."""
    names = registry.serving(recipe.target.name)
    here, missing = ask(names, operating_point(recipe), checks)
    elsewhere = [name for name in names if name in missing]
    usable = _in_precision(here, recipe.target.precision, missing)
    reasons = [f"{name} can't be used here: {'; '.join(why)}" for name, why in missing.items()]
    if not usable:
        for name in elsewhere:
            portable = registry.target(name).portable()
            if portable is not None and recipe.target.precision in (None, *portable.floating_precisions):
                return [], [], Absent(name, portable, tuple(reasons))
        alone = f"target {names[0]} can't be used here: {'; '.join(missing[names[0]])}" if len(names) == 1 else ""
        raise TargetError(alone or f"nothing that serves {recipe.target.name} can be used here: {'; '.join(reasons)}")
    slow = [backend for backend in usable if backend.slow_to_lower]
    time_s = recipe.budget.time
    if slow and len(slow) < len(usable) and (time_s is None or time_s < TIME_FOR_SLOW_S):
        usable = [replace(backend, spare=backend.slow_to_lower) for backend in usable]
        named = ", ".join(backend.name for backend in slow)
        how = f"--time {TIME_FOR_SLOW_S / 60:g}m or --target {slow[0].name}"
        reasons.append(f"{named} is tried only where nothing else takes the model, it compiles for long: {how}")
    return usable, reasons, None


def _in_precision(usable: list[Backend], precision: str | None, missing: dict[str, list[str]]) -> list[Backend]:
    """The backends as they are in the floating precision that the recipe asks for; those that lack it go to `missing`."""
    if precision is None:
        return usable
    kept = []
    for backend in usable:
        if refusal := precision_refusal(backend.capabilities.floating_precisions, precision):
            missing[backend.name] = [refusal]
            continue
        # Nothing in half means casts in the graph neither.
        half = () if precision == "f32" else backend.capabilities.half_types
        only = replace(backend.capabilities, floating_precisions=(precision,), half_types=half)
        kept.append(replace(backend, capabilities=only))
    return kept


def operating_point(recipe: Recipe) -> OperatingPoint:
    """The point that the recipe asks for; the backend decides what it leaves open."""
    target = recipe.target
    batch = target.batch or (OFFLINE_BATCH if target.scenario == "offline" else 1)
    return OperatingPoint(target.scenario, batch, target.threads, floating_precision=target.precision)


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
        assets = tuple(sorted((path / "tokenizer").iterdir()))
        return replace(reading, tokenizer=path / "tokenizer", assets=assets)
    return reading


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
    if roles.confirm is not None:
        found["confirm"] = roles.confirm
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


def _evaluations(
    recipe: Recipe, backends: list[Backend], opened: Opened, folder: Path, checks: Worker, place: Place
) -> tuple[Evaluation | None, Evaluation | None, Evaluation | None]:
    """What to choose with, what to judge with, and what of that took no part in choosing; stops where the original itself
    makes no sense on the data."""
    samples, saved = opened.samples, opened.saved
    if "evaluation" not in samples or "select" not in samples:
        return None, None, None
    target = backends[0].name if backends else None
    outputs = _fp32_outputs(opened.source, saved["evaluation"], folder, checks, place, target)
    metric = metrics.resolve(recipe.data.metric, samples["evaluation"], outputs)
    # The evaluation samples are the select samples and then the confirm samples, batch by batch.
    count = len(list(samples["select"]))
    whole = opened.source.signature.batch is None
    parts = {"select": outputs[:count], "evaluation": outputs, "confirm": outputs[count:]}
    found = {
        role: Evaluation(
            metric, samples[role], saved[role], part, metric.score(part, samples[role], part), whole_calls=whole
        )
        for role, part in parts.items()
        if role in samples
    }
    check_original(found["evaluation"], recipe.data.expect)
    return found["select"], found["evaluation"], found.get("confirm")


def _fp32_outputs(
    source: Artifact, samples: Path, folder: Path, checks: Worker, place: Place, target: str | None
) -> list[Batch]:
    """The original in float32: by ONNX Runtime, else by the target itself where it is here."""
    out = folder / f"fp32-{samples.name}"
    try:
        checks.call("reference", model=str(source.file(folder)), samples=str(samples), out=str(out), optimized=True)
    except BackendError:
        if target is None:
            raise
        point = OperatingPoint(floating_precision="f32")
        with place.worker("float32 original") as worker:
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


def open_eager(opened: Opened, recipe: Recipe, folder: Path, place: Place, cleanup: ExitStack) -> Future[Side | None]:
    """torch eager in a worker of its own, for row 0 and for the comparison; it opens while its caller goes on. None where
    its inputs are not those that are fed, where another machine measures, which may have no torch, and where it fails,
    which a note tells."""
    reading = opened.reading
    if reading.exported is None or recipe.inputs or place.words is not None:
        nothing: Future[Side | None] = Future()
        nothing.set_result(None)
        return nothing
    import torch

    path = folder / "eager.pt2"
    torch.export.save(reading.exported, path)
    side = Side.eager(path, reading.artifact, operating_point(recipe), folder)
    cleanup.callback(side.close)

    def load() -> Side | None:
        try:
            side.load()
        except BackendError as error:
            opened.notes.append(f"torch eager could not be opened: {error}")
            return None
        return side

    return _aside(cleanup).submit(load)


def first_row(reading: Reading, ours: list[Batch] | str, source: Callable[[], list[Batch] | None]) -> Row:
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


def source_outputs(
    reading: Reading, check: Path, eager: Side | None, recipe: Recipe, folder: Path
) -> list[Batch] | None:
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
