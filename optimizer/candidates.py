"""Candidates: the graphs that a recipe's passes lead to, each at an operating point, and what was found out about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from perwatt import metrics, registry
from perwatt.artifact import Artifact
from perwatt.backends import Backend
from perwatt.contract import OperatingPoint, Pass
from perwatt.measurement import Ratio
from perwatt.pipeline import Pipeline, Row
from perwatt.recipe import OneOf, PassStep


@dataclass(frozen=True)
class Branch:
    """A graph that the recipe's passes lead to, and how."""

    artifact: Artifact
    rows: tuple[Row, ...] = ()
    lossy: bool = False
    judged: bool = False
    """Its accuracy was judged where it was made, by the reference: of use where there are no samples to judge it again."""

    def applied(self) -> list[str]:
        """Names of the passes that changed this graph."""
        return [row.name for row in self.rows if row.status == "applied"]


@dataclass
class Candidate:
    """A graph on a backend at an operating point, with what was found out about it. `tuned`: its operating point was
    found by measuring, rather than being the backend's default."""

    branch: Branch
    point: OperatingPoint
    backend: Backend
    tuned: bool = False
    verdict: Literal["shipped", "runner-up", "rejected"] = "runner-up"
    reason: str = ""
    ratios: dict[str, Ratio] = field(default_factory=dict)
    drop: metrics.Comparison | None = None
    p99_ms: float | None = None
    memory_bytes: int | None = None
    trial: int | None = None
    """Number of the trial of a search that it comes from."""

    @property
    def name(self) -> str:
        """What a person would call it: `quantize-int8, floating point in bf16 on openvino`."""
        changed = self.branch.applied()
        applied = [row for row in self.branch.rows if row.status == "applied"]
        lossy = [_with_settings(row) for row in applied if registry.pass_class(row.name).tolerance is None]
        graph = ", ".join(lossy) or ("cleaned graph" if changed else "original graph")
        where = "" if self.backend.alone else f" on {self.backend.name}"
        tuned = f" at {self.point.words()}" if self.tuned else ""
        return f"{graph}, floating point in {self.point.floating_precision or 'the default'}{where}{tuned}"


def _with_settings(row: Row) -> str:
    """`quantize-int8 (quantizer: nncf)`: a pass with those of its settings that are not the usual ones."""
    usual = registry.bind(PassStep(name=row.name)).settings()
    other = [f"{key.replace('_', ' ')}: {value}" for key, value in row.settings.items() if usual.get(key) != value]
    return f"{row.name} ({', '.join(other)})" if other else row.name


def fitted(point: OperatingPoint, artifact: Artifact) -> OperatingPoint:
    """The point with the batch that the model fixes; one where it has no batch axis."""
    batch = artifact.signature.batch
    return point if isinstance(batch, str) else replace(point, batch=batch or 1)


def explore(pipeline: Pipeline, source: Artifact, steps: Sequence[PassStep | OneOf]) -> list[Branch]:
    """All graphs worth considering: the lossless prefix, and every lossy branch of it. A lossy pass never replaces the
    graph that it started from, but for one that mends what others lost."""
    branches = [Branch(source)]
    for step in steps:
        if isinstance(step, PassStep) and _replaces(cls := registry.pass_class(step.name)):
            # Where nothing was lost on any branch, the first says so.
            mended = [branch for branch in branches if branch.lossy] or branches[:1] if cls.mends else branches
            branches = [_extended(pipeline, branch, step) if branch in mended else branch for branch in branches]
            continue
        alternatives = step.steps if isinstance(step, OneOf) else [step]
        tried = [_extended(pipeline, branch, other) for branch in branches for other in alternatives]
        branches = [*branches, *tried]
    return branches


def _replaces(cls: type[Pass]) -> bool:
    """Whether what a pass makes takes the place of what it was given."""
    return cls.tolerance is not None or cls.mends


def _extended(pipeline: Pipeline, branch: Branch, step: PassStep) -> Branch:
    made_by = registry.bind(step)
    artifact, row = pipeline.step(branch.artifact, made_by)
    lossy = made_by.tolerance is None and row.status == "applied"
    if made_by.tolerance is None:
        row.measured = {}
    return Branch(artifact, (*branch.rows, row), branch.lossy or lossy)


def ledger(branches: Sequence[Branch], winner: Candidate, found: Sequence[Candidate]) -> list[Row]:
    """The winner's rows, and those of the branches that were not chosen, each once, with what was measured."""
    told: set[int] = set()
    rows: list[Row] = []
    shipped = {id(row) for row in winner.branch.rows}
    # The winner's own order first; then what else was tried.
    for branch in [winner.branch, *branches]:
        lossy: list[str] = []
        for row in branch.rows:
            before = list(lossy)
            if row.status == "applied" and registry.pass_class(row.name).tolerance is None:
                lossy.append(row.name)
            if id(row) in told:
                continue
            told.add(id(row))
            row.behind = before
            about = [c for c in found if any(row is other for other in c.branch.rows)]
            if row.measured is None:
                # A lossless pass answers for its own graph, not for what a lossy pass made of it.
                about = [c for c in about if not c.branch.lossy]
            else:
                _credit(row, about)
            rows.append(row if id(row) in shipped else _not_chosen(row, winner, about))
    return rows


def _credit(row: Row, about: Sequence[Candidate]) -> None:
    """What a lossy pass brought at its best operating point."""
    best = min((c for c in about if c.ratios), key=cost_of, default=None)
    if best is None:
        row.measured = None
        return
    gain = gain_of(best)
    later = list(best.branch.rows)
    later = later[[row is other for other in later].index(True) + 1 :]
    together = [
        one.name for one in later if one.status == "applied" and registry.pass_class(one.name).tolerance is None
    ]
    row.measured = {
        "inferences_per_cpu_s_ratio": {"value": gain.value, "low": gain.low, "high": gain.high},
        "floating_precision": best.point.floating_precision,
        "accuracy_drop": best.drop.drop if best.drop else None,
        **({"together_with": together} if together else {}),
    }


def _not_chosen(row: Row, winner: Candidate, about: Sequence[Candidate]) -> Row:
    if row.status != "applied":
        return row
    if registry.pass_class(row.name).tolerance is not None:
        # One pass among many: the verdict is on all of them, and stands at the top of the report.
        return replace(row, status="not-chosen", reason="the original graph ships")
    best = min((c for c in about if c.reason), key=cost_of, default=None)
    return replace(row, status="not-chosen", reason=best.reason if best else f"{winner.name} is better")


def leaves_float32(artifact: Artifact) -> bool:
    """Whether the graph leaves anything in float32 for the operating point to decide."""
    values = artifact.model.graph.initializers.values()
    return any(v.const_value is not None and v.const_value.dtype.name == "FLOAT" for v in values) or not values


def gain_of(candidate: Candidate) -> Ratio:
    """How much more inferences the candidate does than the original for what they cost; above 1 it does more."""
    return cost_in(candidate.ratios, candidate.backend).inverse()


def cost_in(ratios: Mapping[str, Ratio], backend: Backend) -> Ratio:
    """What decides, as a ratio of costs: CPU seconds per inference on a CPU; on a GPU joules where its own were counted,
    else time per inference."""
    if backend.device == "cpu":
        return ratios.get("cpu_s_per_inference", Ratio(None))
    energy = ratios.get("energy_j_per_inference", Ratio(None))
    if backend.joules_count and energy.value is not None:
        return energy
    return ratios.get("throughput_per_s", Ratio(None)).inverse()


def at_cost(cost: float, backend: Backend) -> dict[str, Ratio]:
    """Ratios of which `cost_in` makes this cost, for what was not measured against the original itself."""
    if backend.device == "cpu":
        return {"cpu_s_per_inference": Ratio(cost)}
    return {"throughput_per_s": Ratio(cost).inverse()}


def cost_of(candidate: Candidate) -> float:
    """Candidate ÷ original in what decides; infinite where it was not measured."""
    found = cost_in(candidate.ratios, candidate.backend)
    return found.value if found.value is not None else float("inf")


def promising(candidate: Candidate, min_gain: float) -> bool:
    """Whether screening leaves open that the least gain is there."""
    gain = gain_of(candidate)
    return gain.value is not None and (gain.high or gain.value) >= 1 + min_gain and gain.value > 1


def no_gain_text(gain: Ratio, min_gain: float, rate_words: str) -> str:
    """Why a gain is not worth shipping."""
    if gain.value is None:
        return "its speed could not be measured"
    if gain.value <= 1:
        return f"no gain: {ratio_text(gain)} of the original's {rate_words}"
    least = f"{min_gain:.0%} is the least worth keeping"
    return f"gain too small or too uncertain: {ratio_text(gain)} of the original's {rate_words}, {least}"


def enough(gain: Ratio, min_gain: float) -> bool:
    """Whether the interval lies above 1 and the estimate holds the least gain."""
    return gain.low is not None and gain.value is not None and gain.low > 1 and gain.value >= 1 + min_gain


def ratio_text(ratio: Ratio) -> str:
    """`1.10× [1.07, 1.13]`."""
    if ratio.value is None:
        return "an unknown share"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}×"
    return f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]"
