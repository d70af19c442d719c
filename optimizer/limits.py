"""`gate.yaml`: what a change may cost. Strict like a recipe: an unknown key names the nearest known one.

limits:
  cpu_s_per_inference: {max_increase: 5%}
  latency_p99_ms: {max: 20}
  accuracy: {max_drop: 0.5}
on_inconclusive: block
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from perwatt.errors import InputError, nearest
from perwatt.figures import FIGURES
from perwatt.recipe import Fraction, Section, load, parse_milliseconds, parse_seconds

_BYTES = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_QUANTITY = r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*"

Amount = Annotated[float | str, Field(description="A number in the figure's unit, or with a unit, as 20ms or 5MB.")]


class Limit(Section):
    """What one figure may do, against the base or absolutely."""

    max_increase: Fraction | None = Field(None, description="Against the base, as 5% or 0.05.")
    max_decrease: Fraction | None = Field(None, description="Against the base, as 5% or 0.05.")
    max: Amount | None = None
    min: Amount | None = None
    max_drop: float | None = Field(None, ge=0, description="Accuracy only: points, or metric units.")

    @model_validator(mode="after")
    def _says_something(self) -> Limit:
        if not self.model_fields_set or all(getattr(self, name) is None for name in self.model_fields_set):
            raise ValueError("a limit wants max_increase, max_decrease, max, min or max_drop")
        return self


class GateFile(Section):
    """Everything that a gate is told by its file."""

    limits: dict[str, Limit] = Field(min_length=1)
    on_inconclusive: Literal["block", "pass"] = Field(
        "block", description="Whether an inconclusive gate ends with exit code 3 (block) or 0 (pass)."
    )

    @model_validator(mode="after")
    def _figures_are_known(self) -> GateFile:
        for name, limit in self.limits.items():
            if name not in FIGURES:
                raise ValueError(nearest(name, FIGURES, "figure"))
            relative = limit.max_increase is not None or limit.max_decrease is not None
            if relative if name == "accuracy" else limit.max_drop is not None:
                takes = "max_drop, max or min" if name == "accuracy" else "max_increase, max_decrease, max or min"
                raise ValueError(f"{name} takes {takes}")
            for value in (limit.max, limit.min):
                if value is not None:
                    amount(name, value)
        return self


DEFAULT = GateFile(
    limits={
        "cpu_s_per_inference": Limit(max_increase=0.05),
        "throughput_per_watt": Limit(max_decrease=0.05),
        "accuracy": Limit(max_drop=0.5),
    }
)
"""What holds where no file is given."""


def amount(figure: str, value: float | str) -> float:
    """`20`, `20ms` or `5MB` in the figure's own unit. Raises ValueError."""
    if not isinstance(value, str):
        return float(value)
    unit = FIGURES[figure].unit
    if unit == "ms":
        return float(parse_milliseconds(value))
    if unit == "s":
        return float(parse_seconds(value))
    match = re.fullmatch(_QUANTITY, value)
    if match and unit == "B" and match[2].lower() in _BYTES:
        return float(match[1]) * _BYTES[match[2].lower()]
    if match and match[2] in ("", unit):
        return float(match[1])
    if figure == "accuracy" and re.fullmatch(r"\s*[0-9.]+\s*%\s*", value):
        return float(value.strip().rstrip("% ")) / 100
    example = {"B": "5MB or 800KiB", "": "0.9 or 90%"}.get(unit, f"20 (in {unit})")
    raise ValueError(f"{figure}: {value!r} is no amount: write {example}")


def read_limits(path: str | Path | None) -> GateFile:
    """The limits in the file at `path`, or the default ones. Raises InputError in one line that names the key."""
    if path is None:
        return DEFAULT
    plain = load(path, "file of limits", "write limits: {cpu_s_per_inference: {max_increase: 5%}}")
    try:
        return GateFile.model_validate(plain)
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error)}") from None


def check_accuracy_limit(limits: GateFile, unit: str) -> None:
    """Refuse a bound on accuracy that no fraction can reach, once it is known that the metric is one. Raises InputError."""
    limit = limits.limits.get("accuracy")
    for key in ("max", "min"):
        asked = getattr(limit, key, None)
        value = None if asked is None else amount("accuracy", asked)
        if unit == "fraction" and value is not None and value > 1:
            raise InputError(
                f"limits.accuracy.{key}: {asked} is more than any accuracy can be",
                fix=f"write {value:g}% or {value / 100:g}",
            )


def schema() -> dict[str, Any]:
    """JSON Schema of `gate.yaml`."""
    made = GateFile.model_json_schema()
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    made["properties"]["limits"]["propertyNames"] = {"enum": list(FIGURES)}
    return made


def _explain(error: ValidationError) -> str:
    # An unknown key explains a missing one.
    first = next((e for e in error.errors() if e["type"] == "extra_forbidden"), error.errors()[0])
    keys = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        if keys[0] in FIGURES:
            return f"{keys[0]} belongs under limits: write limits: {{{keys[0]}: …}}"
        known = Limit.model_fields if keys[0] == "limits" else GateFile.model_fields
        return nearest(keys[-1], known, f"key in {'.'.join(keys[:-1]) or 'the file'}")
    if keys[:2] == ["limits", "on_inconclusive"]:
        return "on_inconclusive stands beside limits, not under it"
    message, given = first["msg"].removeprefix("Value error, "), first["input"]
    if "Keys should be strings" in message:
        return f"{'.'.join(keys[:-1])}: a comma ends a value: write decimals with a point, as 0.5"
    if first["type"] == "less_than":
        message = f"{given:.0%} is not below 100%: for {given:g} percent write {given:g}% or {given / 100:g}"
    if keys[-1:] == ["max_drop"] and isinstance(given, str):
        message = f"{given!r} is no number: write {given.strip().rstrip('% ') or '0.5'} (points, or metric units)"
    return f"{'.'.join(keys)}: {message}" if keys else message
