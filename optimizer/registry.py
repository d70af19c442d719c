"""Finds passes and targets by file name, on demand, and binds settings to a pass's dataclass.

Adding a pass or a target is adding one file: nothing here is edited. Third parties add theirs through the entry points
`perwatt.passes` and `perwatt.targets`; a clash of names raises. Listing names imports nothing.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_type_hints

from perwatt.contract import Pass, Stage, Target
from perwatt.errors import InputError, PassError, PerwattError, nearest
from perwatt.recipe import OneOf, PassStep, Recipe

Kind = Literal["passes", "targets"]
ALIASES = ("cpu", "gpu")
"""Names that stand for the backends which say that they serve them; measuring decides which of these it is."""


@cache
def _found(kind: Kind) -> dict[str, str | EntryPoint]:
    package = importlib.import_module(f"perwatt.{kind}")
    found: dict[str, str | EntryPoint] = {
        module.name.replace("_", "-"): f"{package.__name__}.{module.name}"
        for module in pkgutil.iter_modules(package.__path__)
        if not module.name.startswith("_")
    }
    for entry in entry_points(group=f"perwatt.{kind}"):
        if entry.name in found:
            raise PerwattError(f"two {kind} are called {entry.name!r}: {found[entry.name]} and {entry.value}")
        found[entry.name] = entry
    return found


def names(kind: Kind) -> list[str]:
    """All known names, sorted."""
    return sorted(_found(kind))


def _class(kind: Kind, name: str, base: type) -> Any:
    found = _found(kind)
    if name not in found:
        known = [*found, *(ALIASES if kind == "targets" else ())]
        raise InputError(nearest(name, known, kind.removesuffix("es") if kind == "passes" else "target"))
    where = found[name]
    if isinstance(where, EntryPoint):
        return _third_party(kind, where, base)
    module = importlib.import_module(where)
    classes = [
        member
        for member in vars(module).values()
        if inspect.isclass(member) and issubclass(member, base) and member.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise PerwattError(f"{where} must define exactly one {base.__name__}, it defines {len(classes)}")
    return classes[0]


def _third_party(kind: Kind, entry: EntryPoint, base: Any) -> Any:
    """What another package brings. Raises InputError where it can't be loaded or goes by another name than it says."""
    owner = entry.dist.name if entry.dist is not None else entry.value
    try:
        loaded: Any = entry.load()
    except Exception as error:
        raise InputError(f"{entry.name!r} of {owner} can't be loaded: {type(error).__name__}: {error}") from error
    if not (inspect.isclass(loaded) and issubclass(loaded, base)):
        raise InputError(f"{entry.name!r} of {owner} is no {base.__name__}")
    found: Any = loaded
    if found.name() != entry.name:
        raise InputError(
            f"{owner} calls {kind} {entry.name!r} what calls itself {found.name()!r}: name the file after it"
        )
    return found


def pass_class(name: str) -> type[Pass]:
    """The pass of that name. Raises InputError that lists the nearest known names."""
    found: type[Pass] = _class("passes", name, Pass)
    return found


def target_class(name: str) -> type[Target]:
    """The target of that plain name. Raises InputError that lists the nearest known names."""
    found: type[Target] = _class("targets", name, Target)
    return found


def target(name: str) -> Target:
    """The target of that name, as `openvino` or `onnxruntime:cuda`. Raises InputError for unknown ones, aliases
    included: `serving` says what they stand for."""
    plain, _, variant = name.partition(":")
    cls = target_class(plain)
    if variant not in cls.variants:
        known = ", ".join(f"{plain}:{v}" if v else plain for v in cls.variants)
        raise InputError(f"{plain} has no variant {variant!r}: known are {known}")
    return cls(variant)


def serving(name: str) -> list[str]:
    """The targets that `name` stands for: itself, or those that serve an alias, best liked first and slow ones last.
    Raises InputError for unknown names."""
    if name not in ALIASES:
        return [target(name).full_name]
    found = []
    for plain in names("targets"):
        try:
            cls = target_class(plain)
        except InputError:
            # A broken package of somebody else's is an error only for who names it.
            if not isinstance(_found("targets")[plain], EntryPoint):
                raise
            continue
        if name in cls.serves:
            found.append((cls.slow_to_lower, -cls.preference, cls(cls.serves[name]).full_name))
    return [full_name for *_, full_name in sorted(found)]


def _settings_model(cls: type[Pass]) -> Any:
    """A strict pydantic model of the settings of `cls`: what its dataclass fields are called, may be and default to."""
    from pydantic import ConfigDict, create_model

    hints = get_type_hints(cls)
    defined = {f.name: (hints[f.name], _default(f)) for f in fields(cls)}  # type: ignore[arg-type]
    # Strict: what a file says is what a pass gets, `true` is no number and "300" is none either.
    return create_model(cls.__name__, __config__=ConfigDict(extra="forbid", strict=True), **defined)  # type: ignore[call-overload]


def _default(field: Field[Any]) -> Any:
    from pydantic import Field as PydanticField

    if field.default_factory is not MISSING:
        return PydanticField(default_factory=field.default_factory)
    return ... if field.default is MISSING else field.default


def bind(step: PassStep) -> Pass:
    """The pass that `step` names, with its settings checked. Raises InputError in one line."""
    from pydantic import ValidationError

    cls = pass_class(step.name)
    model = _settings_model(cls)
    try:
        # As JSON, which is where settings live: strictness would refuse a list for a tuple otherwise.
        checked = model.model_validate_json(json.dumps(step.settings))
    except TypeError as error:
        raise InputError(f"the settings of {step.name} must be plain data: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] != "extra_forbidden":
            raise InputError(f"{step.name}.{key}: {first['msg']}") from None
        known = list(model.model_fields)
        if not known:
            raise InputError(f"{step.name} has no settings, {key!r} was given") from None
        raise InputError(nearest(key, known, f"setting of {step.name}")) from None
    made = cls(**{name: getattr(checked, name) for name in step.settings})
    try:
        made.check_settings()
    except PassError as error:
        raise InputError(f"{step.name}: {error.message}", fix=error.fix) from None
    return made


def default_steps(budget_and_training: bool = False) -> list[PassStep | OneOf]:
    """The default pipeline, assembled from what each pass says of itself: stage by stage, `after` respected, those of
    the stage PRECISION as alternatives, at the end of a stage those that want to run once more after it."""
    classes = loadable_passes()
    chosen = {
        name: cls
        for name, cls in classes.items()
        if cls.in_default and (cls.stage is not Stage.PRUNE or budget_and_training)
    }
    steps: list[PassStep | OneOf] = []
    for stage in Stage:
        here = _ordered({name: cls for name, cls in chosen.items() if cls.stage is stage})
        if stage is Stage.PRECISION and here:
            steps.append(OneOf(steps=[step for name in here for step in _variants(name)]))
        else:
            again = {name: cls for name, cls in chosen.items() if cls.also_after is stage}
            steps += [PassStep(name=name) for name in (*here, *_ordered(again))]
    return steps


def _variants(name: str) -> list[PassStep]:
    """A pass as an alternative, in each of its variants."""
    return [PassStep(name=name, settings=settings) for settings in pass_class(name).variants]


def loadable_passes() -> dict[str, type[Pass]]:
    """All passes that can be loaded: a broken package of somebody else's is an error only for who names it."""
    return _loaded_passes()[0]


def broken_passes() -> dict[str, str]:
    """Why passes of other packages can't be loaded, by name."""
    return _loaded_passes()[1]


def _loaded_passes() -> tuple[dict[str, type[Pass]], dict[str, str]]:
    classes, broken = {}, {}
    for name in names("passes"):
        try:
            classes[name] = pass_class(name)
        except InputError as error:
            if not isinstance(_found("passes")[name], EntryPoint):
                raise
            broken[name] = str(error)
    return classes, broken


def out_of_order(steps: Sequence[PassStep | OneOf]) -> list[str]:
    """In words, which steps stand before others that prepare models for them. The order is the recipe's to choose, but
    what such a pass doesn't find for want of them is told nowhere else."""
    ranks = {name: rank for rank, name in reversed(list(enumerate(names_in(default_steps(True)))))}
    listed = names_in(steps)
    said = []
    for position, name in enumerate(listed):
        cls = pass_class(name)
        if cls.mends and not {*cls.after} & {*listed[:position]}:
            said.append(f"{name} has nothing to mend: it comes behind {' or '.join(cls.after)}")
            continue
        later = [other for other in dict.fromkeys(listed[position + 1 :]) if other not in listed[:position]]
        late = [other for other in later if _prepares(pass_class(other), cls)]
        if late and name not in listed[:position]:
            late.sort(key=lambda other: ranks.get(other, len(ranks)))
            said.append(f"{name} stands before {', '.join(late)}, after which it finds more")
    return said


def _prepares(other: type[Pass], cls: type[Pass]) -> bool:
    """Whether `cls` wants to come after `other`, and `other` is not also there to tidy up behind it."""
    tidies = other.also_after is not None and other.also_after >= cls.stage
    return not tidies and (other.name() in cls.after or other.stage < cls.stage)


def _ordered(classes: dict[str, type[Pass]]) -> list[str]:
    """Names so that each comes after those that its `after` names; alphabetical where that leaves a choice."""
    order: list[str] = []
    left = sorted(classes)
    while left:
        ready = next((n for n in left if all(a in order or a not in classes for a in classes[n].after)), None)
        if ready is None:
            raise PerwattError(f"the passes {left} wait for each other: mend their `after`")
        order.append(ready)
        left.remove(ready)
    return order


def imports(steps: Sequence[PassStep | OneOf]) -> list[str]:
    """Packages that take seconds to import and that these passes may run, each once."""
    return list(dict.fromkeys(package for name in names_in(steps) for package in pass_class(name).imports))


LOSSLESS = "lossless"


def edit_steps(steps: Sequence[PassStep | OneOf], edits: str) -> list[PassStep | OneOf]:
    """`+name` adds a pass where its stage belongs (one that is there stays as it is), `-name` takes one out,
    comma-separated; a plain list replaces all. `lossless` keeps those that promise to keep outputs."""
    if edits.strip() == LOSSLESS:
        return [s for s in steps if isinstance(s, PassStep) and pass_class(s.name).tolerance is not None]
    parts = [part.strip() for part in edits.split(",") if part.strip()]
    if not any(part[0] in "+-" for part in parts):
        for part in parts:
            pass_class(part)
        return [PassStep(name=part) for part in parts]
    result = list(steps)
    for part in parts:
        name = part[1:]
        if part[0] not in "+-":
            raise InputError(f"--passes {edits}: write +name or -name for each, or plain names only")
        cls = pass_class(name)
        if part[0] == "-":
            result = _without(result, name)
        elif not any(name == one.name for step in result for one in _alternatives(step)):
            result = _with(result, name, cls)
    return result


def names_in(steps: Sequence[PassStep | OneOf]) -> list[str]:
    """The passes that steps name, in their order, alternatives one after the other."""
    return [one.name for step in steps for one in _alternatives(step)]


def _alternatives(step: PassStep | OneOf) -> list[PassStep]:
    return step.steps if isinstance(step, OneOf) else [step]


def _without(steps: Sequence[PassStep | OneOf], name: str) -> list[PassStep | OneOf]:
    result: list[PassStep | OneOf] = []
    for step in steps:
        if isinstance(step, OneOf):
            kept = [s for s in step.steps if s.name != name]
            result += [OneOf(steps=kept)] if kept else []
        elif step.name != name:
            result.append(step)
    return result


def _with(steps: Sequence[PassStep | OneOf], name: str, cls: type[Pass]) -> list[PassStep | OneOf]:
    """`name` put in before the first step that the default has behind it; one that is not in the default before the first
    of a later stage, or of its own stage that wants to come after it."""
    result = list(steps)
    order = names_in(default_steps(True))
    for position, step in enumerate(result):
        if isinstance(step, OneOf) and cls.stage is Stage.PRECISION:
            if cls.mends:
                # What mends is no alternative to what it mends.
                return [*result[: position + 1], PassStep(name=name), *result[position + 1 :]]
            behind = set(order[order.index(name) + 1 :]) if name in order else set()
            place = next((i for i, one in enumerate(step.steps) if one.name in behind), len(step.steps))
            result[position] = OneOf(steps=[*step.steps[:place], *_variants(name), *step.steps[place:]])
            return result
        first = _alternatives(step)[0].name
        if name in order and first in order:
            if order.index(first) > order.index(name):
                return [*result[:position], PassStep(name=name), *result[position:]]
            continue
        there = pass_class(first)
        if there.stage > cls.stage or (there.stage is cls.stage and name in there.after):
            return [*result[:position], PassStep(name=name), *result[position:]]
    return [*result, PassStep(name=name)]


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, with the settings of every pass found here, for editors."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "perwatt recipe"
    settings: dict[str, Any] = {}
    for name, cls in loadable_passes().items():
        entry = _settings_model(cls).model_json_schema()
        entry["description"] = (getattr(inspect.getmodule(cls), "__doc__", None) or "").strip().split("\n")[0]
        settings[name] = {"anyOf": [entry, {"type": "null"}]}
    for gone in ("PassStep", "OneOf"):
        schema["$defs"].pop(gone, None)
    one = {"type": "object", "properties": settings, "additionalProperties": False}
    one |= {"minProperties": 1, "maxProperties": 1}
    schema["$defs"]["step"] = {"anyOf": [{"enum": list(settings)}, one]}
    one_of = {
        "type": "object",
        "properties": {"one-of": {"type": "array", "items": {"$ref": "#/$defs/step"}, "minItems": 1}},
        "additionalProperties": False,
        "required": ["one-of"],
    }
    schema["properties"]["passes"] = {
        "anyOf": [{"const": "default"}, {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/step"}, one_of]}}],
        "default": "default",
        "description": "`default`, or passes in order.",
    }
    return schema
