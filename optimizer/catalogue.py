"""What passes there are, in words, from their own docstrings. Targets have a doctor: `perwatt.doctor`."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any

from perwatt import registry
from perwatt.contract import Pass


def all_passes() -> list[dict[str, Any]]:
    """Every pass: name, stage, whether it is in `default`, one line; stage by stage, those of `default` first and in the
    order in which they run. Then those of other packages that can't be loaded, with the `problem`."""
    classes = registry.loadable_passes()
    steps = registry.names_in(registry.default_steps(True))
    runs = {name: position for position, name in reversed(list(enumerate(steps)))}
    order = sorted(classes, key=lambda name: (classes[name].stage, runs.get(name, len(steps)), name))
    broken = registry.broken_passes()
    return [
        *(_summary(name, classes[name]) for name in order),
        *({"name": name, "stage": None, "default": False, "lossy": None, "summary": "", "problem": problem}
          for name, problem in broken.items()),
    ]  # fmt: skip


def one_pass(name: str) -> dict[str, Any]:
    """One pass's page: documentation, settings with their defaults, tolerance. Raises InputError for unknown names."""
    cls = registry.pass_class(name)
    settings = {f.name: None if f.default is MISSING else f.default for f in fields(cls)}  # type: ignore[arg-type]
    tolerance = None if cls.tolerance is None else {"atol": cls.tolerance.atol, "rtol": cls.tolerance.rtol}
    return {
        **_summary(name, cls),
        "documentation": inspect.cleandoc(_module_doc(cls)),
        "after": list(cls.after),
        "again_after": cls.also_after.name.lower() if cls.also_after is not None else None,
        "settings": settings,
        "settings_documentation": inspect.getdoc(cls),
        "tolerance": tolerance,
    }


def _summary(name: str, cls: type[Pass]) -> dict[str, Any]:
    return {
        "name": name,
        "stage": cls.stage.name.lower(),
        "default": cls.in_default,
        "lossy": cls.tolerance is None,
        "summary": " ".join(_module_doc(cls).strip().split("\n\n")[0].split()),
    }


def _module_doc(cls: type[Pass]) -> str:
    module = inspect.getmodule(cls)
    return (module.__doc__ if module is not None else None) or cls.__doc__ or ""


def as_text(entry: dict[str, Any] | list[dict[str, Any]]) -> str:
    """The list, or one page, for a terminal."""
    if isinstance(entry, list):
        width = max(len(e["name"]) for e in entry)
        lines = [
            f"{e['name']:<{width}}  {e['stage']:<9}  {'default' if e['default'] else '       '}  {e['summary']}"
            for e in entry
            if "problem" not in e
        ]
        broken = [f"✗ {e['problem']}" for e in entry if "problem" in e]
        return "\n".join(
            [*lines, *broken, "", "In this order, stage by stage, the default ones run; of the stage precision the best is "
             "taken. optimize passes NAME shows a pass's page. Lossy passes are shipped only if accuracy allows."]
        )  # fmt: skip
    tolerance = entry["tolerance"]
    promise = f"max|Δ| ≤ {tolerance['atol']:g} + {tolerance['rtol']:g} · RMS" if tolerance else "none: accuracy decides"
    settings = [f"  {name}: {value!r}" for name, value in entry["settings"].items()]
    told = ["", "Settings and defaults:", *settings, "", entry["settings_documentation"] or ""] if settings else []
    order = f"after {', '.join(entry['after'])}" if entry["after"] else "in any order within its stage"
    again = f", and once more at the end of the stage {entry['again_after']}" if entry["again_after"] else ""
    runs = f"Runs by default: {order}{again}." if entry["default"] else f"Not by default: --passes +{entry['name']}."
    return "\n".join(
        [f"{entry['name']} (stage {entry['stage']})", "", entry["documentation"], *told, "", runs,
         f"Tolerance, for each output over the checking samples, against what went in: {promise}"]
    )  # fmt: skip
