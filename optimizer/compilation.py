"""One run, from a recipe to a bundle: read, verify, lower, measure, decide, write.

    model → Artifact → Pipeline (passes, each verified) → Study (lowered, judged, measured) → Bundle

This is the only place that knows the whole way; no step below reaches back.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perwatt import cluster as clusters
from perwatt import planning, registry, searching
from perwatt.artifact import Artifact
from perwatt.backends import Backend
from perwatt.bench.power_control import PowerControl
from perwatt.bundle import Bundle, cache_folder, check_destination, no_room
from perwatt.candidates import Branch, Candidate, explore, fitted
from perwatt.cluster import Cluster
from perwatt.contract import Loss, NodeCost, OperatingPoint
from perwatt.errors import InputError
from perwatt.isolation import Worker, workspace
from perwatt.judging import Judge
from perwatt.measuring import SCREENING, Conductor, Effort, costs, interleave
from perwatt.pipeline import Ask, Pipeline, Row
from perwatt.place import Place, open_place
from perwatt.plan import Plan
from perwatt.portable import kept_branches, write_portable
from perwatt.preparation import Prepared, Progress, first_row, operating_point, prepare, source_outputs
from perwatt.proving import open_pipeline
from perwatt.recipe import OneOf, PassStep, Recipe
from perwatt.run_cache import open_run_cache, run_key
from perwatt.run_cost import Charge
from perwatt.screening import Screening
from perwatt.setup import Setup
from perwatt.sides import Side
from perwatt.step_store import StepStore, open_step_store
from perwatt.study import Result, Study
from perwatt.tuning import TunePlan

PASSES_SHARE, SCREENING_SHARE, TUNING_SHARE = 0.5, 0.7, 0.15
SHARES_TO_LEARN = (0.65, 0.8)
"""Instead of the first two where a pass learns, which is worth more of the time than tuning is."""
"""Of the time budget: when no further pass is begun, when no further candidate is screened, what one search for an
operating point may take."""
PROFILE_S = 1.0
GRAPH_S = 1.0
"""How long a pass has each graph measured that it wants compared."""
TUNING_S = 90.0
"""The same where there is no time budget."""


@dataclass
class Run:
    """What one run knows when it is over: what the report tells. `machine` is the one that measured; `on` names it where
    it is not this one."""

    recipe: Recipe
    steps: list[PassStep | OneOf]
    folder: Path
    started: float
    prepared: Prepared
    rows: list[Row]
    result: Result
    energy: dict[str, Any]
    machine: dict[str, Any]
    on: str | None
    charge: Charge


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
    return [
        recipe.model.path,
        *(where for where in (data.all, data.calibrate, data.eval, data.train, data.confirm) if where),
    ]


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
    recipe: Recipe, out: Path, *, force: bool = False, fresh: bool = False, cluster: str | None = None,
    progress: Progress = lambda stage, share: None, announce: Callable[[Plan], None] = lambda plan: None,
) -> Bundle:  # fmt: skip
    """Run the recipe and leave a bundle in `out`. The answer of the same search, of the same files on the same machine, comes
    from the cache, but for `fresh`. `cluster` makes the trials of a search: "auto", a number of workers, or an address.
    `announce` is given the plan of a search before it begins. Raises PerwattError; then nothing was written."""
    started = time.perf_counter()
    steps = resolve_steps(recipe)
    registry.serving(recipe.target.name)
    check_destination(out, model_name(recipe), force, inputs_of(recipe))
    if cluster is not None:
        clusters.check(cluster, recipe, searching.wanted(recipe))
    cache = open_run_cache() if searching.wanted(recipe) and recipe.target.on is None else None
    key = run_key(recipe, steps) if cache is not None else None
    if cache is not None and key is not None and not fresh:
        known = cache.restore(key, out)
        if known is not None:
            return replace(known, from_cache=True)
    with full_disk_explained(), open_work(recipe, steps, out, progress, started) as work:
        if work.prepared.absent is not None:
            return write_portable(*work.portable(), out)
        work.fresh = fresh
        if cluster is not None:
            work.spread_over(cluster)
        run = work.run(announce)
        progress("writing the bundle", 0.96)
        made = _write_bundle(run, out)
        whole = run.result.search is not None and run.result.search["ended"] != searching.STOPPED
        if cache is not None and key is not None and whole:
            cache.keep(key, out)
        return made


def plan_model(recipe: Recipe, out: Path, *, progress: Progress = lambda stage, share: None) -> Plan | None:
    """The plan of the search that this recipe asks for; None where it asks for none, or its target is not here. Writes nothing.
    Raises PerwattError."""
    if not searching.wanted(recipe):
        return None
    steps = resolve_steps(recipe)
    with full_disk_explained(), open_work(recipe, steps, out, progress, time.perf_counter()) as work:
        return None if work.prepared.absent is not None else work.plan()


@contextmanager
def open_work(
    recipe: Recipe, steps: list[PassStep | OneOf], out: Path, progress: Progress, started: float
) -> Iterator[Work]:
    """The model read, its samples divided, the place to measure open. `started`: when the run did, in `time.perf_counter()`
    seconds. Raises PerwattError."""
    with workspace() as scratch, Worker("checks") as checks, ExitStack() as cleanup:
        charge = Charge()
        cleanup.callback(charge.close)
        place = cleanup.enter_context(open_place(recipe.target.on))
        prepared = prepare(recipe, Path(scratch), checks, place, progress, cleanup, registry.imports(steps))
        prepared.notes.extend(registry.out_of_order(steps))
        if searching.wanted(recipe) and prepared.absent is None:
            steps = searching.steps_for(recipe, prepared, steps)
            # What is judged in the end is what no trial saw.
            prepared = replace(prepared, evaluation=prepared.confirm or prepared.evaluation)
        yield Work(recipe, steps, prepared, Path(scratch), checks, place, charge, progress, started, out, cleanup)


def _fixed_batch_words(recipe: Recipe, tried: Sequence[Artifact]) -> list[str]:
    """That no batch was searched, where all graphs that were tried fix it as the model does, which is the first."""
    batch = tried[0].signature.batch
    if recipe.target.scenario != "offline" or any(isinstance(one.signature.batch, str) for one in tried):
        return []
    fixed = "has no batch axis" if batch is None else f"fixes its batch at {batch}"
    return [f"the model {fixed}, so no other number of items in a call is tried: export it with a dynamic batch axis"]


def _unjudged_words(recipe: Recipe, prepared: Prepared) -> list[str]:
    """That a lower precision was asked for and nobody knows what it costs."""
    if recipe.target.precision not in ("bf16", "f16") or prepared.evaluation is not None:
        return []
    return [
        f"warning: accuracy in {recipe.target.precision} was not judged: there are no labelled samples (--data, --eval)"
    ]


def _power_control(recipe: Recipe, device: str, notes: list[str], cleanup: ExitStack) -> PowerControl | None:
    """What sets the GPU's power limit and clock, where the recipe allows it and the machine does; else a note says why
    not."""
    if not recipe.target.allow_power_control:
        return None
    if recipe.target.on is not None:
        notes.append("warning: --allow-power-control is for the machine that it is said on: power stays as it is there")
        return None
    if device != "gpu":
        notes.append("warning: --allow-power-control is for GPUs: it was left alone on a CPU")
        return None
    control = cleanup.enter_context(PowerControl())
    reasons = control.missing()
    notes.extend([*control.notes, *(f"warning: power stays as it is: {reason}" for reason in reasons)])
    return None if reasons else control


@dataclass
class Work:
    """From the model as read to the answer: passes, candidates, measurements. The sides of the answer stay open until
    `cleanup`. `started` is in `time.perf_counter()` seconds. `store` has the steps that a search took, the user's where it is
    None; what passes measure is measured inside `alone()`."""

    recipe: Recipe
    steps: list[PassStep | OneOf]
    prepared: Prepared
    folder: Path
    checks: Worker
    place: Place
    charge: Charge
    progress: Progress
    started: float
    out: Path
    cleanup: ExitStack
    store: StepStore | None = None
    alone: Callable[[], AbstractContextManager[object]] = nullcontext
    cluster: Cluster | None = None
    fresh: bool = False

    def portable(self) -> tuple[Recipe, Prepared, list[Branch], Pipeline, Path, Worker]:
        """The graphs for a backend that is not here, each verified by the reference."""
        recipe, prepared = self.recipe, self.prepared
        assert prepared.absent is not None
        deadline = _deadline(recipe, self.started, _shares(self.steps)[0])
        told = _pass_progress(self.progress, self.steps)
        pipeline = open_pipeline(recipe, prepared, self.folder, self.checks, told, deadline)
        pipeline = pipeline.for_target(prepared.absent.capabilities)
        self.progress("running the passes", 0.3)
        branches = explore(pipeline, prepared.source, self.steps)
        self.progress("judging the variants", 0.7)
        return recipe, prepared, branches, pipeline, self.folder, self.checks

    def plan(self) -> Plan:
        """The plan of a search that will not begin."""
        study = self.begun()
        return planning.without_searching(
            self.steps, self.prepared, study.screening, self.pipeline_for, searching.limits(self.recipe),
            lambda text: self.progress(f"planning: {text}", 0.5),
        )  # fmt: skip

    def spread_over(self, address: str) -> None:
        """Have the trials of a search made by the cluster at this address."""
        machine = self.place.machine()["fingerprint"]
        self.cluster = Cluster(address, self.recipe, self.prepared, machine, self.started, self.folder, self.charge.add)
        self.store = self.cluster.store

    def run(self, announce: Callable[[Plan], None]) -> Run:
        """Study the candidates, or search for better ones, and tell what was found."""
        study = self.begun()
        search = searching.wanted(self.recipe) and self.kept is None
        result = self._searched(study, announce) if search else study.run()
        for side in result.sides.values():
            self.cleanup.callback(side.close)
        return self._told(result)

    def begun(self) -> Study:
        """Everything open that a study needs."""
        recipe, prepared = self.recipe, self.prepared
        search = searching.wanted(recipe)
        self.conductor = self._watching()
        self.setup = Setup(self.folder, prepared.saved["timing"], self.conductor, self.place.worker)
        shares = (searching.PASSES_SHARE, searching.SEARCH_SHARE) if search else _shares(self.steps)
        told = _pass_progress(self.progress, self.steps)
        self.pipeline = open_pipeline(
            recipe, prepared, self.folder, self.checks, told, _deadline(recipe, self.started, shares[0]),
            (self.store or open_step_store()) if search else None, self.place.machine()["fingerprint"],
        )  # fmt: skip
        self.first = first_row(
            prepared.reading,
            self.pipeline.outputs(prepared.source),
            lambda: source_outputs(prepared.reading, prepared.saved["check"], prepared.eager, recipe, self.folder),
        )
        self.judge = Judge(recipe.budget, prepared.max_drop, prepared.select, prepared.evaluation, self.folder)
        self.kept = kept_branches(recipe, self.pipeline, self.folder)
        return self._study(_deadline(recipe, self.started, shares[1]))

    def _watching(self) -> Conductor:
        """What measures, by the meter that there is."""
        recipe, prepared = self.recipe, self.prepared
        device = prepared.backends[0].device
        watched = all(backend.meter == "auto" for backend in prepared.backends)
        meter, notes = self.place.meter("auto" if watched else "none", device)
        self.cleanup.callback(meter.close)
        counted = meter.method in ("counter", "metered") and meter.boundary in ("device", "wall")
        prepared.backends = [replace(b, joules_count=device == "gpu" and counted) for b in prepared.backends]
        prepared.notes.extend([*notes, *_unjudged_words(recipe, prepared)])
        conductor = Conductor(meter, seed=recipe.seed, device=device)
        conductor.power = _power_control(recipe, device, prepared.notes, self.cleanup)
        return conductor

    def _study(self, deadline: float | None) -> Study:
        recipe, prepared = self.recipe, self.prepared

        def branches(backend: Backend) -> list[Branch]:
            if self.kept is not None:
                return self.kept
            self.progress("running the passes", 0.35)
            return explore(self.pipeline_for(backend), prepared.source, self.steps)

        return Study(
            self.setup,
            self.judge,
            Screening(self.setup, self.judge, prepared.source, self.point(), prepared.backends),
            branches,
            plan=tune_plan(recipe, self.place),
            eager=prepared.eager,
            effort=_effort(recipe, self.started),
            deadline=deadline,
            progress=lambda share, text: self.progress(text, 0.3 + 0.65 * share),
        )

    def _searched(self, study: Study, announce: Callable[[Plan], None]) -> Result:
        found = searching.Searching(
            self.recipe,
            study,
            self.steps,
            self.prepared,
            self.pipeline_for,
            self.point(),
            searching.log_path(cache_folder("search") or self.folder, self.recipe, self.prepared, self.place.machine()),
            lambda result: _write_bundle(self._told(result), self.out),
            _deadline(self.recipe, self.started, searching.SEARCH_SHARE),
            _deadline(self.recipe, self.started, searching.TUNE_SHARE),
            _deadline(self.recipe, self.started, searching.ACCOUNT_SHARE),
            lambda share, text: self.progress(text, 0.3 + 0.4 * share),
            announce,
            self.cluster,
            self.fresh,
        )
        return found.run()

    def point(self) -> OperatingPoint:
        """How everything is run until it is tuned."""
        return operating_point(self.recipe)

    def pipeline_for(self, backend: Backend) -> Pipeline:
        """The passes for a backend, which they may ask."""
        recipe, setup = self.recipe, self.setup

        def measure(artifacts: Sequence[Artifact]) -> list[float]:
            with self.alone():
                return measure_graphs(recipe, backend, artifacts, setup)

        def profile(artifact: Artifact) -> list[NodeCost]:
            with self.alone():
                return profile_graph(recipe, backend, artifact, setup)

        asked = Ask(measure, profile, lambda artifact: judge_graph(recipe, backend, artifact, setup, self.judge))
        return self.pipeline.for_target(backend.capabilities, backend.name, asked)

    def _told(self, result: Result) -> Run:
        tried = [self.prepared.source, *(one.branch.artifact for one in result.candidates)]
        result.notes = [*self.prepared.notes, *_fixed_batch_words(self.recipe, tried), *result.notes]
        return Run(
            self.recipe, self.steps, self.folder, self.started, self.prepared, [self.first, *result.rows], result,
            self.conductor.meter.describe(), self.place.machine(), self.place.words, self.charge,
        )  # fmt: skip


def _write_bundle(run: Run, out: Path) -> Bundle:
    from perwatt.writing import write_bundle

    return write_bundle(run, out)


def tune_plan(recipe: Recipe, place: Place) -> TunePlan | None:
    """What the search for an operating point may vary, and for how long; None where the recipe wants none."""
    if not recipe.target.tune:
        return None
    fixed = {name for name in ("batch", "threads") if getattr(recipe.target, name) is not None}
    if recipe.target.scenario == "single-stream":
        fixed.add("batch")
    budget = recipe.budget
    return TunePlan(
        fixed=frozenset(fixed),
        max_s=TUNING_S if budget.time is None else TUNING_SHARE * budget.time,
        limited=budget.time is not None,
        memory_bytes=budget.memory,
        cache=cache_folder("tune"),
        machine=place.machine()["fingerprint"],
    )


def _deadline(recipe: Recipe, started: float, share: float) -> float | None:
    """When `share` of the time budget is spent, in `time.monotonic()` seconds; None without a budget."""
    if recipe.budget.time is None:
        return None
    return time.monotonic() + share * recipe.budget.time - (time.perf_counter() - started)


def _shares(steps: Sequence[PassStep | OneOf]) -> tuple[float, float]:
    """Of the time budget, when no further pass is begun, and no further candidate screened."""
    learns = any(registry.pass_class(name).mends for name in registry.names_in(steps))
    return SHARES_TO_LEARN if learns else (PASSES_SHARE, SCREENING_SHARE)


def _effort(recipe: Recipe, started: float) -> Effort:
    """How long the final measurement may take: a fair share of the time budget where there is one."""
    if recipe.budget.time is None:
        return Effort()
    left = recipe.budget.time - (time.perf_counter() - started)
    return Effort(max_s=max(1.0, min(Effort.max_s, left * 0.4)))


def measure_graphs(recipe: Recipe, backend: Backend, artifacts: Sequence[Artifact], setup: Setup) -> list[float]:
    """What an inference costs with each artifact at the recipe's operating point, measured interleaved on `backend`: CPU
    seconds, or seconds on a GPU."""
    sides: list[Side] = []
    try:
        for number, artifact in enumerate(artifacts):
            candidate = Candidate(Branch(artifact), fitted(operating_point(recipe), artifact), backend)
            sides.append(setup.open(f"graph {number}", candidate))
        effort = replace(SCREENING, max_s=GRAPH_S * len(sides), tight=0.0)
        interleave(sides, setup.timing, effort)
        return costs(sides, setup.conductor.device)
    finally:
        for side in sides:
            side.close()


def judge_graph(recipe: Recipe, backend: Backend, artifact: Artifact, setup: Setup, judge: Judge) -> Loss | None:
    """What the artifact loses on `backend`, on the select samples; None where there are none."""
    if judge.select is None:
        return None
    point = fitted(operating_point(recipe), artifact)
    side = setup.open("graph to judge", Candidate(Branch(artifact), point, backend))
    try:
        found = judge.drop_on_select(side)
    finally:
        side.close()
    return None if found is None else Loss(found.drop, not judge.too_much(found))


def profile_graph(recipe: Recipe, backend: Backend, artifact: Artifact, setup: Setup) -> list[NodeCost]:
    """What each operation of the artifact costs on `backend` at the recipe's operating point."""
    point = fitted(operating_point(recipe), artifact)
    with setup.worker("profile") as worker:
        told = worker.call(
            "profile", target=backend.name, model=str(artifact.file(setup.folder)), point=point.to_json(),
            samples=str(setup.timing), seconds=PROFILE_S,
        )  # fmt: skip
    return [NodeCost(tuple(row["nodes"]), row["kind"], row["seconds"]) for row in told["costs"]]


def _pass_progress(progress: Progress, steps: Sequence[PassStep | OneOf]) -> Callable[[str], None]:
    """Progress from 30 % to 45 % of the run, an equal share for each pass."""
    count = sum(len(step.steps) if isinstance(step, OneOf) else 1 for step in steps)
    begun = 0

    def told(text: str) -> None:
        nonlocal begun
        # What a pass tells of itself begins with its name and a colon.
        begun += ": " not in text
        progress(text, 0.3 + 0.15 * min(1.0, begun / (count + 1)))

    return told
