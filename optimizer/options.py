"""Flat options, as the command line and `perwatt.optimize` take them, to the nested sections of a recipe.

A recipe file comes first, options override it: each option has one place in the recipe, named here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from perwatt import recipe as recipes
from perwatt.errors import InputError, nearest
from perwatt.recipe import Recipe

PLACES: dict[str, tuple[str, str]] = {
    "model": ("model", "path"), "arch": ("model", "arch"), "arch_args": ("model", "arch_args"),
    "input": ("model", "input"), "trust": ("model", "trust"),
    "calibrate": ("data", "calibrate"), "eval": ("data", "eval"), "train": ("data", "train"),
    "image": ("data", "image"), "resize": ("data", "resize"), "normalize": ("data", "normalize"),
    "text": ("data", "text"), "label": ("data", "label"), "metric": ("data", "metric"), "expect": ("data", "expect"),
    "max_samples": ("data", "max_samples"), "confirm": ("data", "confirm"),
    "max_drop": ("budget", "max_drop"), "p99": ("budget", "p99_ms"), "min_gain": ("budget", "min_gain"),
    "time": ("budget", "time"), "memory": ("budget", "memory"), "prove_accuracy": ("budget", "prove_accuracy"),
    "target": ("target", "name"), "on": ("target", "on"), "threads": ("target", "threads"), "scenario": ("target", "scenario"),
    "batch": ("target", "batch"), "precision": ("target", "precision"), "tune": ("target", "tune"),
    "allow_power_control": ("target", "allow_power_control"),
    "size": ("budget", "size"), "objective": ("search", "objective"), "trials": ("search", "trials"),
}  # fmt: skip
"""Option → (section, key). `data`, `passes`, `inputs`, `seed` and `config` have rules of their own below."""


def build_recipe(config: str | Path | None = None, *, base: dict[str, Any] | None = None, **options: Any) -> Recipe:
    """The recipe that a file, or the plain data of `base`, and options make together; None and empty options are not
    given.

    Raises InputError for unknown options and for anything that the recipe refuses."""
    unknown = [name for name in options if name not in PLACES and name not in ("data", "passes", "inputs", "seed")]
    if unknown:
        raise InputError(nearest(unknown[0], [*PLACES, "data", "passes", "inputs", "seed", "config"], "option"))
    # A section whose keys are all commented out is read as null: it is as good as not there.
    plain = dict(base or {})
    if config is not None:
        plain = {name: v for name, v in recipes.load(config).items() if v is not None}
    given = {name: value for name, value in options.items() if value is not None and value not in ((), [], {})}
    edits = given.pop("passes", None)
    for name, value in given.items():
        if name in PLACES:
            section, key = PLACES[name]
            _section(plain, section)[key] = _plain(name, value)
        elif name != "data":
            plain[name] = value
    data = _section(plain, "data")
    if "data" in given:
        _place_data(data, str(given["data"]))
    elif "eval" in given and data.get("all"):
        # What the recipe gave for everything is left with calibration.
        data["calibrate"] = data.pop("all")
    if "path" not in _section(plain, "model"):
        raise InputError("no model was given", fix="optimize MODEL …, or model: {path: …} in the recipe")
    recipe = recipes.parse(plain, str(config) if config is not None else "recipe")
    return recipe if edits is None else _with_passes(recipe, edits)


def _section(plain: dict[str, Any], name: str) -> dict[str, Any]:
    section = plain.setdefault(name, {})
    if not isinstance(section, dict):
        raise InputError(f"recipe: {name} must be a section, as {name}: {{…}}")
    return section


def _place_data(section: dict[str, Any], where: str) -> None:
    """`--data` alone serves everything; beside evaluation data it is what calibration draws from."""
    section.pop("all", None)
    if section.get("eval"):
        section["calibrate"] = where
    else:
        section.pop("calibrate", None)
        section["all"] = where


def _plain(name: str, value: Any) -> Any:
    if name == "arch_args" and isinstance(value, str):
        return parse_arch_args(value)
    if name == "image" and isinstance(value, str):
        parts = value.replace("x", ",").split(",")
        if not all(part.strip().isdigit() for part in parts) or len(parts) > 2:
            raise InputError(f"--image {value}: write a side as 224, or height and width as 224x320")
        return int(parts[0]) if len(parts) == 1 else [int(part) for part in parts]
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def parse_arch_args(text: str) -> dict[str, Any]:
    """`num_classes=10,width=64` or a JSON object. Raises InputError."""
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"--arch-args {text}: not JSON: {error}") from None
        return dict(found)
    result: dict[str, Any] = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if not separator or not name.strip().isidentifier():
            raise InputError(f"--arch-args {text}: write name=value, comma-separated, or a JSON object")
        try:
            result[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            result[name.strip()] = {"True": True, "False": False, "None": None}.get(value.strip(), value.strip())
    return result


def _with_passes(recipe: Recipe, edits: Any) -> Recipe:
    if edits == "default":
        return recipe.model_copy(update={"passes": "default"})
    if not isinstance(edits, str):
        return recipes.parse({**recipe.model_dump(mode="json"), "passes": list(edits)})
    from perwatt import registry

    pruning = recipe.data.train is not None and recipe.budget.max_drop is not None
    steps = registry.default_steps(pruning) if recipe.passes == "default" else recipe.passes
    return recipe.model_copy(update={"passes": registry.edit_steps(steps, edits)})
