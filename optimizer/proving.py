"""The pipeline of one run: what passes may ask for, and how they are proved, wired to the worker that does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perwatt.artifact import Artifact
from perwatt.bench.fingerprint import fingerprint
from perwatt.cache_keys import StepKeys
from perwatt.contract import Capabilities, Context, Pass
from perwatt.data import Samples
from perwatt.errors import BackendError, PerwattError
from perwatt.isolation import Worker
from perwatt.pipeline import Pipeline, Proof
from perwatt.preparation import Opened
from perwatt.recipe import Recipe
from perwatt.signature import Batch
from perwatt.step_store import KeptSteps, StepStore
from perwatt.worker import load_outputs

PORTION = 8
"""Batches that the worker runs before the first of them are looked at."""

FOR_PASSES = ("calibrate", "learn", "select")
"""Roles of samples that a pass may see. What judges the result is not among them."""


def open_pipeline(
    recipe: Recipe,
    opened: Opened,
    folder: Path,
    checks: Worker,
    progress: Callable[[str], None],
    deadline: float | None = None,
    store: StepStore | None = None,
    machine: Mapping[str, Any] | None = None,
) -> Pipeline:
    """The pipeline from the model as read, for no target yet (`Pipeline.for_target`), so nothing can be measured. Models,
    samples and outputs that pass between processes lie in `folder`; `deadline` is in `time.monotonic()` seconds. Steps that
    an earlier run took come from `store`; `machine`: the fingerprint of the one that measures, None for this one."""
    samples, saved = opened.samples, opened.saved

    def execute(
        artifact: Artifact, batches: Samples, taps: Sequence[str] = (), optimized: bool = False, quick: bool = False
    ) -> Iterator[Batch]:
        waiting, portion = list(batches), PORTION
        while waiting:
            # Twice as many each time: who has seen enough stops, and the model is not compiled often.
            part, waiting, portion = Samples(waiting[:portion]), waiting[portion:], 2 * portion
            yield from reference(artifact, part.save(folder / f"batches-{part.digest()[:16]}"), taps, optimized, quick)

    def reference(
        artifact: Artifact, where: Path, taps: Sequence[str] = (), optimized: bool = False, quick: bool = False
    ) -> list[Batch]:
        out = folder / f"reference-{artifact.digest()[:16]}-{where.name}-{len(taps)}-{optimized}-{quick}"
        checks.call(
            "reference", model=str(artifact.file(folder)), samples=str(where), out=str(out), taps=list(taps),
            optimized=optimized, quick=quick,
        )  # fmt: skip
        return load_outputs(out)

    def run_isolated(made_by: Pass, artifact: Artifact, capabilities: Capabilities) -> tuple[Artifact, list[str]]:
        answer = checks.call(
            "run_pass",
            step={"name": made_by.name(), "settings": made_by.settings()},
            model=str(artifact.file(folder)),
            roles={role: str(where) for role, where in saved.items() if role in FOR_PASSES},
            capabilities=asdict(capabilities),
            budget=recipe.budget.model_dump(),
            seed=recipe.seed,
            folder=str(folder),
            **({} if deadline is None else {"timeout_s": max(1.0, deadline - time.monotonic())}),
        )
        same = answer["model"] == str(artifact.file(folder))
        return (artifact if same else Artifact.load(answer["model"])), answer["changes"]

    def roles(role: str) -> Samples:
        if role not in FOR_PASSES or role not in samples:
            raise PerwattError(f"there are no samples for {role!r} that a pass may see")
        return samples[role]

    data = opened.roles
    context = Context(
        samples=roles,
        capabilities=Capabilities(),
        budget=recipe.budget,
        seed=recipe.seed,
        deadline=deadline,
        progress=progress,
        execute=execute,
        measure=_not_here,
        profile=_not_here,
        judge=_not_here,
        made_up=data.calibrate is None and data.select is None and data.confirm is None and data.learn is None,
    )
    proof = Proof(
        check=lambda artifact: checks.call("check", model=str(artifact.file(folder)))["problems"],
        reference=lambda artifact: reference(artifact, saved["check"]),
        run_isolated=run_isolated,
        reference_on=reference,
    )
    memory = None
    if store is not None:
        decide = {role: samples[role] for role in (*FOR_PASSES, "check", "confirm") if role in samples}
        keys = StepKeys(recipe, opened.source, decide, fingerprint() if machine is None else machine, context.made_up)
        memory = KeptSteps(store, keys, folder)
    return Pipeline(opened.source, context, proof, memory=memory)


def _not_here(_: Any) -> Any:
    raise BackendError("nothing can be measured here: `optimize MODEL` on a machine with the target does")
