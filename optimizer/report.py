"""The report: what was done, what it gained, how sure that is. `report.json` is this, its JSON Schema is published.

Every figure of one side is plain; the three that rest on energy say how they were come by. Missing is null, never 0.
Accuracy is a fraction where the metric is one. A ratio is optimized ÷ original with its 95 % interval.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Outcome = Literal["optimized", "unchanged", "budget_not_met"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Labelled(_Part):
    """A figure that rests on energy."""

    value: float | None
    method: Literal["metered", "counter", "modelled", "unavailable"]
    boundary: Literal["device", "package", "package+dram", "host", "wall"] | None


class SideFigures(_Part):
    """One side: the original or the optimized model, as it was run."""

    cpu_s_per_inference: float = Field(description="User + system seconds of the whole process, per inference.")
    throughput_per_s: float = Field(description="Inferences per second of wall time.")
    latency_p50_ms: float | None = Field(description="Median latency of a call.")
    latency_p99_ms: float | None = Field(description="99th percentile (nearest rank) of the latency of a call.")
    size_bytes: int | None = Field(description="Bytes of what is deployed: graph and weights as lowered.")
    peak_memory_bytes: int | None = Field(description="Highest resident memory of the process that ran it.")
    accuracy: float | None = Field(description="Metric on the evaluation samples: a fraction for accuracies.")
    power_w: Labelled
    energy_j_per_inference: Labelled
    throughput_per_watt: Labelled = Field(description="Inferences per joule.")
    operating_point: dict[str, Any] = Field(description="Batch, streams, threads, floating precision as run.")
    execution_precision: str = Field(description="Floating precision that the backend reported.")


class RatioFigure(_Part):
    """Optimized ÷ original, 95 % interval."""

    value: float | None
    low: float | None = None
    high: float | None = None


class RatioFigures(_Part):
    """The same names as on each side."""

    cpu_s_per_inference: RatioFigure
    throughput_per_s: RatioFigure
    latency_p50_ms: RatioFigure
    latency_p99_ms: RatioFigure
    size_bytes: RatioFigure
    peak_memory_bytes: RatioFigure
    accuracy: RatioFigure
    power_w: RatioFigure
    energy_j_per_inference: RatioFigure
    throughput_per_watt: RatioFigure


class AccuracyReport(_Part):
    """Accuracy of the shipped program against the original in float32, sample by sample."""

    metric: str
    unit: Literal["fraction", "metric"]
    higher_is_better: bool
    n: int
    n_unseen: int = Field(description="Of these, samples on which nothing was chosen.")
    original: float
    optimized: float
    drop: float = Field(description="Positive is worse: points for fractions, metric units otherwise.")
    low: float | None = Field(description="95 % paired interval of the drop; null where there is none.")
    high: float | None
    flips_lost: int | None = Field(None, description="Right before, wrong now.")
    flips_gained: int | None = Field(None, description="Wrong before, right now.")
    max_drop: float = Field(description="The budget, in the unit of `drop`.")
    original_as_run: float | None = Field(None, description="The original at the backend's own precision.")


class RunCostReport(_Part):
    """What the run itself took on the machine that compiled."""

    seconds: float
    cpu_s: float = Field(description="User + system seconds of all its processes.")
    energy_j: float | None
    method: Literal["metered", "counter", "modelled", "unavailable"]
    boundary: Literal["device", "package", "package+dram", "host", "wall"] | None
    pays_back_after: int | None = Field(
        description="Inferences of the shipped program that save what the run took; null where it saves nothing."
    )
    pays_back_in: str | None = Field(description="What was compared: joules, or CPU seconds.")


class EagerReport(_Part):
    """torch eager in float32, measured in the same rounds, at the same batch."""

    version: str
    cpu_s_per_inference: float
    throughput_per_s: float
    latency_p50_ms: float | None
    cpu_s_ratio: RatioFigure = Field(description="Optimized ÷ torch eager, CPU seconds per inference.")


class CandidateReport(_Part):
    """One answer that was considered."""

    name: str
    passes: list[str]
    floating_precision: str | None
    backend: str | None = None
    operating_point: dict[str, Any] | None = None
    verdict: Literal["shipped", "runner-up", "rejected"]
    reason: str
    cpu_s_ratio: RatioFigure | None = Field(None, description="To the original, while screening.")
    throughput_ratio: RatioFigure | None = None
    drop: float | None = Field(None, description="On the select samples, in the unit of accuracy.drop.")


class DriftFigures(_Part):
    """Largest absolute and relative (to the RMS) movement of any output; null is not finite."""

    max_abs: float | None
    relative: float | None


class PassReport(_Part):
    """A row of the ledger."""

    name: str
    settings: dict[str, Any]
    status: Literal["applied", "unchanged", "refused", "rolled-back", "not-chosen"]
    reason: str | None
    changes: list[str]
    drift: DriftFigures | None = Field(description="Against the pass's own input.")
    drift_from_original: DriftFigures | None
    seconds: float
    size_bytes: dict[str, int] | None = Field(description="Weights before and after.")
    operators: dict[str, dict[str, int]] | None = Field(description="Operator counts before and after.")
    measured: dict[str, Any] | None = Field(
        description="Of a lossy pass, while screening: inferences_per_cpu_s_ratio {value, low, high} to the original, "
        "floating_precision, accuracy_drop (in the unit of accuracy.drop), together_with (lossy passes behind it that "
        "have a share in these figures)."
    )
    behind: list[str] = Field([], description="Lossy passes that had changed the model it was given.")


class DropFigure(_Part):
    """Accuracy that is lost: points for fractions, metric units otherwise; positive is worse. 95 % paired interval."""

    value: float
    low: float | None
    high: float | None
    n: int = Field(description="Samples that it was judged on: those to choose by.")


class ChangeReport(_Part):
    """What one model is, divided by another. What is not known is null, and `reason` says why."""

    cost: RatioFigure = Field(description="In what `cost_is` names.")
    latency_p50_ms: RatioFigure
    size_bytes: RatioFigure = Field(description="Of the weights.")
    drop: DropFigure | None
    reason: str | None


class ShareReport(_Part):
    """What one pass brings, all its rows together."""

    name: str
    settings: list[dict[str, Any]] = Field(description="Of each row of that name that changed something.")
    prefix: ChangeReport = Field(
        description="The model after the pass ÷ before it, in the order of the pipeline. They multiply to `whole`."
    )
    alone_out: ChangeReport = Field(description="The winner ÷ the same pipeline without this pass.")
    verdict: Literal["earns its keep", "for accuracy", "brings nothing", "costs", "not known"]
    why: str
    needed_by: list[str] = Field(description="Passes that nothing comes of where this one is left out.")


class AccountReport(_Part):
    """What each pass of the winner brings, at the winner's operating point on its backend."""

    cost_is: str = Field(description="What a cost is: CPU seconds, seconds or joules per inference.")
    whole: ChangeReport = Field(description="The winner ÷ the original's graph at the winner's operating point.")
    point: ChangeReport | None = Field(
        description="The original's graph at the winner's operating point ÷ the original as it runs best; null where "
        "that is the same."
    )
    shares: list[ShareReport]
    droppable: list[str] = Field(description="Passes that bring nothing; they were left out together.")
    without_them: ChangeReport | None = Field(description="The winner without `droppable` ÷ the winner.")
    dropped: bool = Field(description="Whether what ships is the winner without them.")
    decision: str = Field(description="Why.")
    notes: list[str]
    seconds: float


class Report(_Part):
    """Everything about one run."""

    schema_version: Literal[1] = 1
    perwatt_version: str
    created: str
    seconds: float = Field(description="Wall time of the whole run.")
    outcome: Outcome
    reason: str = Field(description="Why this outcome, in a sentence.")
    model: dict[str, Any] = Field(description="name, path, format, digest, inputs, outputs, weights_bytes.")
    target: dict[str, Any] = Field(
        description="name, tried (the backends that it stands for), backend, device, scenario, batch, versions, isa."
    )
    original: SideFigures
    optimized: SideFigures
    ratio: RatioFigures = Field(
        description="The shipped program at its operating point ÷ the original on its best backend at that "
        "backend's defaults: the headline."
    )
    ratio_graph: RatioFigures = Field(description="Both sides at the shipped operating point: the graph's share.")
    accuracy: AccuracyReport | None
    ratio_point: RatioFigures | None = Field(
        None,
        description="The original's graph at the shipped operating point ÷ at its own: the point's share; null where "
        "the point is the original's own.",
    )
    tuning: dict[str, Any] | None = Field(
        None,
        description="seconds, and every operating point that was measured for the shipped graph: operating_point, "
        "settings, figures, ratios to the start, peak_memory_bytes, reason why it may not win.",
    )
    search: dict[str, Any] | None = Field(
        None,
        description="What a search tried: plan (what it foresaw: estimates, layers, parts and their seconds), ended (why), "
        "seconds, choices, objectives, trials (number, round, choice, why, status, reason, ratios to the original, objectives, "
        "drop and n on the samples to choose by, p99_ms, memory_bytes, size_bytes, missed constraints, digest, seconds), front "
        "(numbers of the trials that no other beats in cost and accuracy), shipped.",
    )
    run_cost: RunCostReport | None = Field(None, description="What the run itself took, and when that is won back.")
    account: AccountReport | None = Field(None, description="What each pass of the winner brings.")
    torch_eager: EagerReport | None
    passes: list[PassReport]
    candidates: list[CandidateReport]
    energy: dict[str, Any] = Field(description="How the joules were come by: method, boundary, how, source.")
    measuring: dict[str, Any] = Field(description="Rounds, seconds, protocol.")
    data: dict[str, Any] = Field(description="Samples per role and what was assumed.")
    notes: list[str]
    last_word: str | None = Field(None, description="What real samples or another budget would bring.")


def schema() -> dict[str, Any]:
    """JSON Schema of `report.json`."""
    made = Report.model_json_schema()
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return made
