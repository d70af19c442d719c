"""`Recipe`: what to do, as YAML on disk. Strict: an unknown key is an error that names the nearest known one.

Passes are kept as {name, settings}: the registry binds settings to the pass's dataclass, so that this module knows no
pass. Accuracy drops are in points for accuracies (0.5 is half a percentage point), in metric units otherwise.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_serializer, model_validator

from perwatt.errors import InputError, nearest

_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_TIME = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_seconds(value: Any) -> Any:
    """`10m`, `90s`, `1h` or a number of seconds."""
    if isinstance(value, str):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*(ms|s|min|m|h)?\s*", value)
        if not match:
            raise ValueError(f"{value!r} is no time: write 90s, 10m or 1h")
        return float(match[1]) * _TIME[match[2] or "s"]
    return value


def parse_milliseconds(value: Any) -> Any:
    """`20ms`, `0.1s` or a number of milliseconds."""
    if isinstance(value, str):
        try:
            return parse_seconds(value if re.search(r"[A-Za-z]", value) else value + "ms") * 1e3
        except ValueError:
            raise ValueError(f"{value!r} is no latency: write 20ms or 0.1s") from None
    return value


def parse_bytes(value: Any) -> Any:
    """`500MB`, `2GiB` or a number of bytes."""
    if isinstance(value, str):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*([kMGT]i?)?B?\s*", value)
        if not match:
            raise ValueError(f"{value!r} is no size: write 500MB or 2GiB")
        unit = match[2] or ""
        return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** " kMGT".index(unit[:1] or " "))
    return value


def parse_fraction(value: Any) -> Any:
    """`3%` or 0.03."""
    if isinstance(value, str):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*(%?)\s*", value)
        if not match:
            raise ValueError(f"{value!r} is no fraction: write 3% or 0.03")
        return float(match[1]) / (100 if match[2] else 1)
    return value


def _names(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


# What a file may hold, for the JSON Schema: the validators make numbers of the texts.
_Positive = Annotated[float, Field(gt=0)]
_TimeText = Annotated[str, Field(pattern=rf"^\s*{_NUMBER}\s*(ms|s|min|m|h)?\s*$")]
_BytesText = Annotated[str, Field(pattern=rf"^\s*{_NUMBER}\s*([kMGT]i?)?B?\s*$")]
_Share = Annotated[float, Field(ge=0, lt=1)]
_ShareText = Annotated[str, Field(pattern=rf"^\s*{_NUMBER}\s*%?\s*$")]

Seconds = Annotated[float, Field(gt=0), BeforeValidator(parse_seconds, json_schema_input_type=_Positive | _TimeText)]
Milliseconds = Annotated[
    float, Field(gt=0), BeforeValidator(parse_milliseconds, json_schema_input_type=_Positive | _TimeText)
]
Bytes = Annotated[
    int,
    Field(gt=0),
    BeforeValidator(parse_bytes, json_schema_input_type=Annotated[int, Field(gt=0)] | _BytesText),
]
Fraction = Annotated[
    float, Field(ge=0, lt=1), BeforeValidator(parse_fraction, json_schema_input_type=_Share | _ShareText)
]
Names = Annotated[list[str], BeforeValidator(_names, json_schema_input_type=list[str] | str)]

Objective = Literal["inferences-per-joule", "latency", "throughput", "size"]
"""What a search makes as good as it can. The first stands for what decides on that device: CPU seconds an inference on CPUs,
joules on GPUs whose own were counted."""
Objectives = Annotated[
    list[Objective], Field(min_length=1), BeforeValidator(_names, json_schema_input_type=list[Objective] | Objective)
]


class Section(BaseModel):
    """Base of all recipe sections: frozen, unknown keys forbidden, types as written (`yes` is no number)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelSection(Section):
    """The model and how to build it."""

    path: str = Field(description="Model file or Hugging Face folder.")
    arch: str | None = Field(None, description="package.module:callable or net.py:callable that builds the network.")
    arch_args: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of that callable.")
    input: list[str] = Field(default_factory=list, description='Input types, as "x:float32[batch,3,32,32]".')
    trust: bool = Field(False, description="Allow code that the file carries to run.")


class RawInput(Section):
    """An input that takes raw data; the preprocessing is compiled into the graph: (x·scale − mean) ÷ std."""

    dtype: Literal["uint8", "int8", "uint16", "float32"] = "uint8"
    layout: Literal["NHWC", "NCHW"] | None = Field(None, description="Layout of what will be fed; None: as the model.")
    scale: float = Field(1.0, description="Multiplied first, as 0.00392156862745098 for 1/255.")
    mean: list[float] | float = Field(0.0, description="Subtracted next, per channel or for all.")
    std: list[float] | float = Field(1.0, description="Divided by last, per channel or for all.")


class DataSection(Section):
    """Where samples come from and how to turn them into inputs."""

    all: str | None = Field(None, description="One data set for everything: split into calibrate, select, confirm.")
    calibrate: str | None = Field(None, description="Samples to calibrate on (no labels needed).")
    eval: str | None = Field(None, description="Labelled samples that accuracy is judged on.")
    train: str | None = Field(None, description="Samples that passes may learn from.")
    confirm: str | None = Field(
        None, description="Labelled samples that the answer is confirmed on, and nothing else is."
    )
    image: int | list[int] | None = Field(None, description="Image size fed to the model: side, or [height, width].")
    resize: int | None = Field(None, description="Shorter side before the centre crop to `image`.")
    normalize: str | None = Field(None, description="imagenet, cifar10, unit, none, or mean,…/std,… of 0..1 values.")
    text: Names | None = Field(None, description="Column, or two columns, that hold the text.")
    label: str | None = Field(None, description="Column that holds the label.")
    metric: str | None = Field(None, description="top1, top5, mse, cosine, agreement, or file.py:callable.")
    expect: float | None = Field(None, description="Accuracy of the original that must be met, in percent.")
    max_samples: int | None = Field(None, description="Use at most this many samples of each set.")


class Budget(Section):
    """What may be paid, and the least gain worth keeping."""

    max_drop: float | None = Field(None, ge=0, description="Accuracy that may be lost: points, or metric units.")
    p99_ms: Milliseconds | None = Field(None, description="Latency that 99 % of calls must stay under.")
    min_gain: Fraction = Field(0.03, description="Least gain worth shipping, as 3% or 0.03.")
    memory: Bytes | None = Field(None, description="Resident memory that the program may take, as 500MB, 2GiB.")
    size: Bytes | None = Field(None, description="What the model's weights may take, as 5MB.")
    time: Seconds | None = Field(
        None, description="Time budget of the whole run, as 90s, 10m, 1h; from 2m on it is spent on a search."
    )
    prove_accuracy: bool = Field(False, description="The interval's bound must hold the budget, not the estimate.")


class TargetSection(Section):
    """Where and how the result will run."""

    name: str = "cpu"
    on: str | None = Field(None, description="The machine to lower, tune and measure on, as ssh://user@host.")
    threads: int | None = Field(None, gt=0, description="Threads; None: the backend's own default.")
    scenario: Literal["single-stream", "offline"] = "single-stream"
    batch: int | None = Field(
        None, gt=0, description="Items in a call; None: 1 in single-stream; offline searched from 32 both ways."
    )
    precision: Literal["f32", "tf32", "bf16", "f16"] | None = Field(
        None, description="Floating precision of what the graph leaves in float32; None: the best within the budget."
    )
    allow_power_control: bool = Field(False, description="The search may set a GPU's power limit and clock.")
    tune: bool = Field(True, description="Search for the operating point that costs least: what is left open here.")


class SearchSection(Section):
    """How to search, where there is time to (`budget.time` from 2m on) or a number of trials is given."""

    objective: Objectives = Field(
        ["inferences-per-joule"],
        description="What to make as good as can be; of several, the first picks what is shipped.",
    )
    trials: int | None = Field(None, ge=0, description="At most so many trials; 0: no search.")


class PassStep(Section):
    """One pass with its settings."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)


class OneOf(Section):
    """Alternatives: each is tried after what stands before it, and the measured best within the budget wins."""

    steps: list[PassStep] = Field(min_length=1)


def _step(entry: Any) -> Any:
    """`name`, `{name: settings}` or `{one-of: [...]}` to the fields of a step."""
    if isinstance(entry, str):
        return PassStep(name=entry)
    if isinstance(entry, PassStep | OneOf):
        return entry
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, settings),) = entry.items()
        if name == "one-of":
            return OneOf(steps=_alternatives(settings))
        if isinstance(name, str) and isinstance(settings, dict | None):
            return PassStep(name=name, settings=settings or {})
    raise ValueError(f"{entry!r} is no pass: write a name, or `- name: {{setting: value}}`")


def _alternatives(entries: Any) -> list[Any]:
    steps = [_step(entry) for entry in entries] if isinstance(entries, list) else []
    if not steps or any(isinstance(step, OneOf) for step in steps):
        raise ValueError(f"one-of wants a list of passes to choose from, it was given {entries!r}")
    return steps


def _steps(value: Any) -> Any:
    if isinstance(value, list):
        return [_step(entry) for entry in value]
    if value == "default":
        return value
    raise ValueError(f"{value!r} is no pipeline: write default, or a list of passes in order")


class Recipe(Section):
    """Everything that decides a run."""

    model: ModelSection
    data: DataSection = Field(default_factory=DataSection)
    inputs: dict[str, RawInput] = Field(default_factory=dict)
    budget: Budget = Field(default_factory=Budget)
    passes: Annotated[Literal["default"] | list[PassStep | OneOf], BeforeValidator(_steps)] = "default"
    target: TargetSection = Field(default_factory=TargetSection)
    search: SearchSection = Field(default_factory=SearchSection)
    seed: int = 0

    @model_validator(mode="after")
    def _one_way_of_giving_data(self) -> Recipe:
        if self.data.all and (self.data.calibrate or self.data.eval):
            raise ValueError("data.all is for one set that serves everything: give it alone, or calibrate and eval")
        if self.data.confirm and not (self.data.all or self.data.eval or self.data.calibrate):
            raise ValueError("data.confirm is for confirming what was chosen: give data.eval to choose by, too")
        return self

    @model_serializer(mode="wrap")
    def _plain(self, handler: Any) -> dict[str, Any]:
        plain: dict[str, Any] = handler(self)
        if isinstance(self.passes, list):
            plain["passes"] = [_plain_step(step) for step in self.passes]
        return plain


def _plain_step(step: PassStep | OneOf) -> Any:
    if isinstance(step, OneOf):
        return {"one-of": [_plain_step(s) for s in step.steps]}
    return {step.name: dict(step.settings)} if step.settings else step.name


def parse(plain: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check plain data and make a recipe of it. Raises InputError in one line that names the key."""
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    keys = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known, section = _known_keys(keys[:-1]), ".".join(keys[:-1]) or "the recipe"
        return nearest(keys[-1], known, f"key in {section}") if known else f"unknown key {keys[-1]}"
    if len(keys) > 2 and re.fullmatch(r"int|float|list\[\w+\]", keys[-1]):
        keys.pop()  # which of several allowed types: none of the person's words
    message = first["msg"].removeprefix("Value error, ")
    return f"{'.'.join(keys)}: {message}" if keys else message


def _known_keys(path: list[str]) -> list[str]:
    model: Any = Recipe
    for key in path:
        field = model.model_fields.get(key) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return list(RawInput.model_fields) if path[0] == "inputs" else []
        model = field.annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def load(path: str | Path, what: str = "recipe", fix: str = "start from `optimize init MODEL`") -> dict[str, Any]:
    """Read a recipe file (or another `what`) into plain data. Raises InputError for a missing file or bad YAML."""
    import yaml

    path = Path(path)
    if not path.exists():
        raise missing_file(path, what)
    try:
        plain = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read the {what} {path}: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise InputError(f"{path} is no {what}", fix=fix)
    return plain


def missing_file(path: Path, what: str) -> InputError:
    """The error for a file that is not there, with the nearest name that is."""
    beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return InputError(f"there is no {what} {path}", fix=f"did you mean {path.with_name(near[0])}?" if near else None)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML; `load` and `parse` give the same recipe back."""
    import yaml

    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
