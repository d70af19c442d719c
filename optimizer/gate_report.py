"""What a gate says: `GateReport` is its JSON form, from which every other form is made. The schema is published.

Ratios are head ÷ base with their 95 % interval. Missing is null, never 0. Accuracy is a fraction where the metric is one.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from perwatt.report import RatioFigure

Verdict = Literal["pass", "fail", "inconclusive"]
SAME_FILES = "both sides are the same files, run in the same way"
EXIT_CODES: dict[Verdict, int] = {"pass": 0, "fail": 1, "inconclusive": 3}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class GateSide(_Part):
    """One side: what was compared, where it came from, how it was run."""

    label: str = Field(description="As the person named it: git:origin/main, main-bundle, working tree.")
    path: str
    kind: str = Field(description="bundle, onnx, torchscript, …")
    commit: str | None = None
    dirty: bool = Field(False, description="The working tree had changes that are not committed.")
    from_cache: bool = False
    digest: str | None = Field(None, description="SHA-256 of the deployed model's files.")
    target: str
    operating_point: dict[str, Any]
    execution_precision: str | None = None
    notes: list[str] = []


class ComparedFigure(_Part):
    """One figure on both sides. `floor`: how far apart two processes of the *same* model were in this very job, as a
    fraction; an effect within it is noise. `n`: blocks, or samples for accuracy."""

    unit: str
    base: float | None
    head: float | None
    ratio: RatioFigure
    base_interval: tuple[float, float] | None = None
    head_interval: tuple[float, float] | None = None
    floor: float | None = None
    n: int = 0
    method: Literal["metered", "counter", "modelled", "unavailable"] | None = Field(None, description="Of energy.")
    boundary: Literal["device", "package", "package+dram", "host", "wall"] | None = None


class Check(_Part):
    """One limit and what became of it."""

    figure: str
    key: Literal["max_increase", "max_decrease", "max", "min", "max_drop"] = Field(description="As in the gate's file.")
    limit: str = Field(description="In words: at most 5 % more, at most 20 ms.")
    verdict: Verdict
    reason: str = Field(description="Why, in a sentence with the numbers.")
    decided_by: str | None = Field(None, description="The figure that decided instead, where joules are only modelled.")


class ComparedAccuracy(_Part):
    """Both sides on the same labelled samples, sample by sample."""

    metric: str
    unit: Literal["fraction", "metric"]
    higher_is_better: bool = True
    n: int
    base: float
    head: float
    drop: float = Field(description="Positive is worse: points for fractions, metric units otherwise.")
    low: float | None = Field(description="95 % paired interval of the drop.")
    high: float | None
    flips_lost: int | None = Field(None, description="Right in base, wrong in head.")
    flips_gained: int | None = None
    p_value: float | None = Field(None, description="Exact McNemar test on the flips, two-sided.")
    chance: str | None = Field(None, description="Why the base looks no better than guessing; null where it doesn't.")


class GateReport(_Part):
    """Everything about one gate."""

    schema_version: Literal[1] = 1
    perwatt_version: str
    created: str
    seconds: float = Field(description="Wall time of the whole gate, builds included.")
    verdict: Verdict
    reason: str = Field(description="The verdict in a sentence.")
    exit_code: int
    name: str = Field(description="The model's name, by which history is kept.")
    base: GateSide
    head: GateSide
    checks: list[Check]
    figures: dict[str, ComparedFigure]
    accuracy: ComparedAccuracy | None
    identical: bool = Field(
        False, description="Both sides are the same files, run in the same way: limits against the base hold by that."
    )
    disturbed: list[str] = Field(description="Why this counts as a disturbed run; empty where it was quiet.")
    machine: dict[str, Any] = Field(description="fingerprint, its digest, and facts as far as readable.")
    measuring: dict[str, Any] = Field(description="scenario, blocks, window_s, seconds, seed, protocol, discarded.")
    energy: dict[str, Any] = Field(description="method, boundary, how, source, uncertainty, idle, meter overhead.")
    samples: dict[str, dict[str, list[float]]] = Field(
        default={}, description="base and head: figure by window, in the order of measuring; discarded blocks included."
    )
    notes: list[str]


def schema() -> dict[str, Any]:
    """JSON Schema of what `optimize gate --json` prints."""
    made = GateReport.model_json_schema()
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return made
