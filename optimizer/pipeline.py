"""`Pipeline`: runs passes in order, and believes none of them.

After each pass: its own promise (`ensures`), the checker, purity (the input is what it was), drift against its input on
real samples. A pass that breaks its promise is rolled back, named and explained, and the run goes on. Every pass leaves
one row in the ledger.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from perwatt import registry
from perwatt.artifact import Artifact, graphs_of, model_digest
from perwatt.contract import Capabilities, Context, Loss, NodeCost, Pass, Tolerance
from perwatt.drift import Drift, drift
from perwatt.errors import PassError, PerwattError
from perwatt.passes._learning import seconds_to_learn
from perwatt.signature import Batch, TensorSpec

HALF_EPSILON = {"FLOAT16": 2.0**-10, "BFLOAT16": 2.0**-7}
ROUNDINGS = 16
"""Roundings of the type, of values as large as the outputs' RMS, that a pass may shift in a model that calculates in half."""

OUT_OF_TIME = "out of time"
NOT_VERIFIED = "not verified numerically"
Status = Literal["applied", "unchanged", "refused", "rolled-back", "not-chosen"]


@dataclass
class Row:
    """One line of the ledger: what a pass did to this model, and what became of it."""

    name: str
    settings: dict[str, Any]
    status: Status
    reason: str | None = None
    changes: list[str] = field(default_factory=list)
    drift: dict[str, float | None] | None = None
    drift_from_original: dict[str, float | None] | None = None
    seconds: float = 0.0
    size_bytes: tuple[int, int] | None = None
    operators: tuple[dict[str, int], dict[str, int]] | None = None
    measured: dict[str, Any] | None = None
    behind: list[str] = field(default_factory=list)
    """Lossy passes that had changed the model it was given."""
    cached: bool = False
    """An earlier run took this step, which took it `seconds`; no part of the report."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for the report."""
        plain = asdict(self)
        del plain["cached"]
        if self.size_bytes is not None:
            plain["size_bytes"] = {"before": self.size_bytes[0], "after": self.size_bytes[1]}
        if self.operators is not None:
            plain["operators"] = {"before": self.operators[0], "after": self.operators[1]}
        return plain


@dataclass
class Proof:
    """How to check a result; each function runs in the worker. `reference_on` runs the reference on the samples of
    another folder; `run_isolated` runs a pass that may crash, for a target with these capabilities."""

    check: Callable[[Artifact], list[str]]
    reference: Callable[[Artifact], list[Batch]]
    run_isolated: Callable[[Pass, Artifact, Capabilities], tuple[Artifact, list[str]]]
    reference_on: Callable[[Artifact, Path], list[Batch]]


@dataclass(frozen=True)
class Ask:
    """What passes may ask a backend: see `Context`."""

    measure: Callable[[Sequence[Artifact]], list[float]]
    profile: Callable[[Artifact], list[NodeCost]]
    judge: Callable[[Artifact], Loss | None]


@dataclass(frozen=True)
class Asked:
    """A step that is asked for: a pass on a model, with what it sees of a target. `target` is empty for a pass that doesn't
    measure."""

    artifact: Artifact
    made_by: Pass
    capabilities: Capabilities
    target: str


class Memory(Protocol):
    """Steps that earlier runs took."""

    def recall(self, asked: Asked) -> tuple[Artifact, Row] | None:
        """The step; None where it was not taken."""

    def keep(self, asked: Asked, after: Artifact, row: Row) -> None:
        """Keep a step that was taken now."""


@dataclass
class _Known:
    """What pipelines of one run share: outputs of the reference by the model's digest, and steps that were taken."""

    outputs: dict[str, list[Batch] | str] = field(default_factory=dict)
    steps: dict[str, tuple[Artifact, Row]] = field(default_factory=dict)


class Pipeline:
    """Runs passes from one original. Each model is run once by the reference, and each pass once on a model, whichever
    targets ask for it; not even that where an earlier run did, which `memory` tells."""

    def __init__(
        self,
        original: Artifact,
        context: Context,
        proof: Proof,
        known: _Known | None = None,
        target: str = "",
        memory: Memory | None = None,
    ) -> None:
        self.original = original
        self.target = target
        self.context = context
        self.proof = proof
        self.memory = memory
        self._known = known or _Known()

    def for_target(self, capabilities: Capabilities, target: str = "", ask: Ask | None = None) -> Pipeline:
        """The same for a target that rewards something else, and that can be asked."""
        context = replace(self.context, capabilities=capabilities)
        if ask is not None:
            context = replace(context, measure=ask.measure, profile=ask.profile, judge=ask.judge)
        return Pipeline(self.original, context, self.proof, self._known, target, self.memory)

    def run(self, artifact: Artifact, passes: Sequence[Pass]) -> tuple[Artifact, list[Row]]:
        """The artifact after all passes that held their promise, and a row for every one."""
        rows = []
        for made_by in passes:
            artifact, row = self.step(artifact, made_by)
            rows.append(row)
        return artifact, rows

    def step(self, artifact: Artifact, made_by: Pass) -> tuple[Artifact, Row]:
        """One pass: run it, check it, keep it or roll it back. The same step asked for again gives the same row."""
        # A pass that doesn't say that it depends on the target sees none, so that its result serves them all.
        capabilities = self.context.capabilities if made_by.depends_on_target else Capabilities()
        asked = Asked(artifact, made_by, capabilities, self.target if made_by.measures else "")
        key = repr((artifact.digest(), made_by, capabilities, asked.target))
        if key not in self._known.steps:
            recalled = self.memory.recall(asked) if self.memory is not None else None
            if recalled is None and self._late():
                return artifact, Row(made_by.name(), made_by.settings(), "refused", OUT_OF_TIME)
            self.context.progress(made_by.name())
            self._known.steps[key] = recalled or self._taken(asked)
        return self._known.steps[key]

    def release(self) -> None:
        """Keep nothing of what lossy passes made in memory but where it is: many choices make more graphs than fit there."""
        lossy = {name for name, cls in registry.loadable_passes().items() if cls.tolerance is None}
        for artifact, _ in self._known.steps.values():
            if any(step.name in lossy for step in artifact.steps):
                artifact.release()
                self._known.outputs.pop(artifact.digest(), None)

    def _taken(self, asked: Asked) -> tuple[Artifact, Row]:
        artifact, made_by = asked.artifact, asked.made_by
        context = replace(self.context, capabilities=asked.capabilities, original=self.original)
        start = time.perf_counter()
        row = Row(made_by.name(), made_by.settings(), "refused")
        whole = self._gets_its_time(made_by)
        raised = True
        try:
            after = self._verified(artifact, made_by, row, context)
            raised = False
        except PerwattError as error:
            row.status, row.reason, after = "rolled-back", str(error), artifact
        except Exception as error:
            # A pass is somebody's code: whatever it raises costs this pass, not the run.
            words = " ".join(str(error).split())[:300]
            row.status, row.reason, after = "rolled-back", f"{type(error).__name__}: {words}", artifact
        row.seconds = round(time.perf_counter() - start, 3)
        # What raised, or could not be verified, may do so for what is the matter with this machine today.
        by_chance = raised or (row.reason or "").startswith(NOT_VERIFIED)
        if self.memory is not None and not by_chance and (whole if made_by.mends else not self._late()):
            self.memory.keep(asked, after, row)
        return after, row

    def _late(self) -> bool:
        return self.context.deadline is not None and time.monotonic() > self.context.deadline

    def _gets_its_time(self, made_by: Pass) -> bool:
        """Whether the deadline has no part in what a pass learns that begins now: it is given all that it asks for."""
        if self.context.deadline is None or not made_by.mends:
            return True
        minutes = made_by.settings().get("minutes")
        try:
            return minutes is not None and seconds_to_learn(minutes, self.context) == minutes * 60
        except PassError:
            return False

    def _verified(self, before: Artifact, made_by: Pass, row: Row, context: Context) -> Artifact:
        # The pass gets a twin: what it breaks in there, by mistake or on its way to an error, is not what goes on.
        given = Artifact(
            model=before.edit(),
            path=before.path,
            signature=before.signature,
            steps=before.steps,
            digest=before.digest(),
        )
        digest = model_digest(given.model)
        reasons = list(made_by.requires(given, context))
        if reasons:
            row.reason = "; ".join(reasons)
            return before
        if made_by.isolated:
            after, row.changes = self.proof.run_isolated(made_by, before, context.capabilities)
        else:
            after, row.changes = made_by.run(given, context)
        if model_digest(given.model) != digest:
            raise PerwattError(f"{made_by.name()} changed the model it was given: it must work on artifact.edit()")
        if after.digest() == before.digest():
            row.status = "unchanged"
            row.reason = "; ".join(row.changes) or "nothing to do on this model"
            # Types and shapes that it noted down are no change, and of use to the passes that follow.
            noted = after is not given and (after.path is None or after.path != before.path)
            return after if noted else before
        problems = [*self._interface(before, after), *made_by.ensures(given, after), *self._check(before, after)]
        if not problems:
            problems = self._drifted(before, after, made_by, row)
        if problems:
            row.status, row.reason = "rolled-back", "; ".join(problems)
            return before
        row.status = "applied"
        row.size_bytes = (before.size_bytes(), after.size_bytes())
        row.operators = (before.operator_counts(), after.operator_counts())
        return after

    def _check(self, before: Artifact, after: Artifact) -> list[str]:
        found = self.proof.check(after)
        # What the checker says of the input already, such as an operator unknown to it, is not this pass's doing.
        known = self.proof.check(before) if found else []
        return [problem for problem in found if problem not in known]

    def _interface(self, before: Artifact, after: Artifact) -> list[str]:
        old, new = before.signature, after.signature
        # A batch may become free: what was fed can be fed as before.
        freed = isinstance(old.batch, int) and isinstance(new.batch, str)
        if [_fed(spec, freed) for spec in old.inputs] != [_fed(spec, freed) for spec in new.inputs]:
            return [f"the model's inputs changed: {_listed(old.inputs)} became {_listed(new.inputs)}"]
        same_names = [s.name for s in old.outputs] == [s.name for s in new.outputs]
        if not same_names or any(not _same_type(a, b) for a, b in zip(old.outputs, new.outputs, strict=True)):
            return [f"the model's outputs changed: {_listed(old.outputs)} became {_listed(new.outputs)}"]
        return []

    def _drifted(self, before: Artifact, after: Artifact, made_by: Pass, row: Row) -> list[str]:
        old, new, first = self.outputs(before), self.outputs(after), self.outputs(self.original)
        if isinstance(new, str) or isinstance(old, str):
            row.reason = f"{NOT_VERIFIED}, accuracy decides: {new if isinstance(new, str) else old}"
            return [row.reason] if made_by.tolerance is not None and not isinstance(old, str) else []
        measured = drift(old, new, _allowed(made_by.tolerance, before))
        row.drift = finite_drift(measured)
        if not isinstance(first, str):
            row.drift_from_original = finite_drift(drift(first, new, None))
        return list(measured.reasons)

    def outputs(self, artifact: Artifact) -> list[Batch] | str:
        """Reference outputs on the checking samples, or why there are none."""
        digest = artifact.digest()
        known = self._known.outputs
        if digest not in known:
            try:
                known[digest] = self.proof.reference(artifact)
            except PerwattError as error:
                known[digest] = str(error)
        return known[digest]


def _allowed(tolerance: Tolerance | None, artifact: Artifact) -> Tolerance | None:
    """What a pass may move outputs by where the model calculates in half: no pass can round less than the type does. Exact
    stays exact."""
    if tolerance is None or tolerance == Tolerance(atol=0.0, rtol=0.0):
        return tolerance
    values = (value for graph in graphs_of(artifact.model) for node in graph for value in node.outputs)
    kinds = {value.dtype.name for value in values if value.dtype is not None}
    coarsest = max((eps for kind, eps in HALF_EPSILON.items() if kind in kinds), default=0.0)
    return Tolerance(tolerance.atol, tolerance.rtol + ROUNDINGS * coarsest)


def _fed(spec: TensorSpec, any_batch: bool) -> tuple[Any, ...]:
    """What a caller must know of an input: a dynamic axis stays dynamic, whatever its symbol is called."""
    shape = None if spec.shape is None else [d if isinstance(d, int) else None for d in spec.shape]
    if any_batch and shape:
        shape[0] = None
    return spec.name, spec.dtype, shape


def _same_type(a: TensorSpec, b: TensorSpec) -> bool:
    return a.dtype == b.dtype or "unknown" in (a.dtype, b.dtype)


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(str(spec) for spec in specs)


def finite_drift(measured: Drift) -> dict[str, float | None]:
    """Drift as JSON can carry it: what is not finite is None."""
    figures = {"max_abs": measured.max_abs, "relative": measured.relative}
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
