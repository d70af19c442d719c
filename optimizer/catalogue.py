"""What there is: passes and targets, in words, from their own docstrings and from what they say of this machine."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any

from perwatt import registry
from perwatt.contract import Pass
from perwatt.errors import PerwattError
from perwatt.isolation import Worker


def all_passes() -> list[dict[str, Any]]:
    """Every pass in the order of its stage: name, stage, whether it is in `default`, one line."""
    classes = registry.loadable_passes()
    entries = [_summary(name, cls) for name, cls in classes.items()]
    return sorted(entries, key=lambda entry: (classes[entry["name"]].stage, entry["name"]))


def one_pass(name: str) -> dict[str, Any]:
    """One pass's page: documentation, settings with their defaults, tolerance. Raises InputError for unknown names."""
    cls = registry.pass_class(name)
    settings = {f.name: None if f.default is MISSING else f.default for f in fields(cls)}  # type: ignore[arg-type]
    tolerance = None if cls.tolerance is None else {"atol": cls.tolerance.atol, "rtol": cls.tolerance.rtol}
    return {
        **_summary(name, cls),
        "documentation": inspect.cleandoc(_module_doc(cls)),
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
        ]
        return "\n".join(
            [*lines, "", "optimize passes NAME shows a pass's page. Lossy passes are shipped only if accuracy allows."]
        )
    tolerance = entry["tolerance"]
    promise = f"max|Δ| ≤ {tolerance['atol']:g} + {tolerance['rtol']:g} · RMS" if tolerance else "none: accuracy decides"
    settings = [f"  {name}: {value!r}" for name, value in entry["settings"].items()] or ["  none"]
    return "\n".join(
        [f"{entry['name']} ({entry['stage']})", "", entry["documentation"], "", "Settings and defaults:", *settings, "",
         entry["settings_documentation"] or "", "", f"Tolerance: {promise}"]
    )  # fmt: skip


def all_targets() -> list[dict[str, Any]]:
    """Every target, asked in a worker: usable or what is missing, versions, what it rewards."""
    entries = []
    aliases = {serves: alias for alias, found in registry.ALIASES.items() for serves in found}
    for name in registry.names("targets"):
        with Worker(name) as worker:
            try:
                facts = worker.call("target", name=name)
            except PerwattError as error:
                facts = {"missing": [str(error)], "capabilities": None, "versions": {}}
        summary = " ".join((registry.target(name).__doc__ or "").strip().split("\n\n")[0].split())
        entries.append({"name": name, "alias": aliases.get(name), "summary": summary, **facts})
    return entries


def targets_text(entries: list[dict[str, Any]]) -> str:
    """The list for a terminal."""
    lines: list[str] = []
    for entry in entries:
        mark = "✗" if entry["missing"] else "✓"
        versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
        name = f"{entry['alias']} → {entry['name']}" if entry["alias"] else entry["name"]
        lines.append(f"{mark} {name}  {versions}  {entry['summary']}")
        lines += [f"    missing: {reason}" for reason in entry["missing"]]
        found = entry["capabilities"]
        if found:
            precisions = ", ".join(found["floating_precisions"])
            lines.append(f"    floating precision: {precisions} (the first is the backend's default)")
            if found["isa"]:
                lines.append(f"    instruction sets: {', '.join(found['isa'])}")
            if found["quantization_styles"]:
                lines.append(f"    int8: {', '.join(style['name'] for style in found['quantization_styles'])}")
            if found["channel_multiples"]:
                pays = ", ".join(f"{kind} {multiple}" for kind, multiple in found["channel_multiples"].items())
                lines.append(f"    channels pay in multiples of: {pays}")
    return "\n".join(lines)
