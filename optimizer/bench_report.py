"""What `optimize bench` says: `BenchReport` is its JSON form. The schema is published. Missing is null, never 0."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from perwatt.report import RatioFigure


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Figure(_Part):
    """A measured figure with its 95 % interval. `n`: blocks of windows behind it. Method and boundary where
    it rests on energy."""

    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    n: int = 0
    method: Literal["metered", "counter", "modelled", "unavailable"] | None = None
    boundary: Literal["device", "package", "package+dram", "host", "wall"] | None = None


class Traffic(_Part):
    """At the traffic that was asked about (Poisson arrivals), idle time included."""

    rate_per_s: float = Field(description="Requests, that is calls, a second.")
    seconds: float
    requests: int
    energy_j_per_request: Figure = Field(description="Above idle, and the request's share of idle time at this rate.")
    above_idle_j_per_request: Figure = Field(description="The first of the two: what the request itself takes.")
    idle_j_per_request: Figure = Field(description="The second: idle power over the rate that was asked for.")
    power_w: Figure
    idle_power_w: Figure
    latency_p50_ms: float | None = Field(description="Null from fewer than 10 requests.")
    latency_p99_ms: float | None = Field(description="Null from fewer than 100 requests.")
    utilisation: float | None = Field(description="CPU seconds over wall seconds and CPUs.")
    sustained: bool = Field(description="Whether the backlog stayed bounded.")
    items_per_request: int = Field(1, description="Items in one call.")
    kwh_per_million: float | None = Field(None, description="Requests; as certain as energy_j_per_request.")
    cost_per_million: float | None = Field(None, description="Requests; as certain as energy_j_per_request.")
    currency: str | None = None
    price_per_kwh: float | None = None


class Capacity(_Part):
    """Server scenario: the highest rate of Poisson arrivals whose latency stays within the bound, and what was reached
    at that rate while it proved itself."""

    rate_per_s: float | None = Field(description="Requests, that is calls, a second; null where no rate held.")
    bound_ms: float
    percentile: float
    failed_rate_per_s: float | None = Field(None, description="The lowest rate above it that did not hold.")
    tries: list[dict[str, Any]]
    ended: str
    items_per_request: int = Field(1, description="Items in one call.")
    latency_ms: float | None = Field(
        None, description="At that rate, the percentile that is bound; null from too few requests (p99: 100)."
    )
    utilisation: float | None = Field(None, description="At that rate: CPU seconds over wall seconds and CPUs.")
    energy_j_per_request: Figure | None = Field(
        None,
        description="At that rate, idle power included; null where there is no energy, or windows too short for it.",
    )


class Subject(_Part):
    """One thing that was measured."""

    label: str
    name: str = Field("", description="The model's name, by which history is kept.")
    path: str
    kind: str = Field(description="bundle, onnx, openvino-ir, torchscript, …")
    target: str
    scenario: str
    operating_point: dict[str, Any]
    execution_precision: str | None = None
    digest: str | None = Field(None, description="SHA-256 of the deployed model's files.")
    size_bytes: int | None = None
    peak_memory_bytes: int | None = None
    warm_up: dict[str, Any] = {}
    figures: dict[str, Figure]
    ratio_to_first: dict[str, RatioFigure] = Field({}, description="This ÷ the first, paired by block.")
    traffic: Traffic | None = None
    capacity: Capacity | None = None
    notes: list[str] = []


class BenchReport(_Part):
    """Everything about one `optimize bench`."""

    schema_version: Literal[1] = 1
    perwatt_version: str
    created: str
    seconds: float
    profile: Literal["quick", "long"]
    subjects: list[Subject]
    noise_floor: dict[str, float | None] = Field(
        description="By figure: how far apart two processes of any one subject were at most (A/A), as a fraction."
    )
    disturbed: list[str]
    machine: dict[str, Any]
    measuring: dict[str, Any] = Field(
        description="blocks, window_s, seconds, seed, protocol, inputs, discarded, probe."
    )
    energy: dict[str, Any] = Field(
        description="method, boundary, how, source, uncertainty, window_s, refresh_s, n, idle_policy, idle_state, "
        "idle_power_w, meter_overhead."
    )
    notes: list[str]


def schema() -> dict[str, Any]:
    """JSON Schema of what `optimize bench --json` prints."""
    made = BenchReport.model_json_schema()
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return made
