"""The doctor: which targets can be used here, what is missing and what gets it, what the hardware rewards.

Every target is asked in a worker of its own, side by side, because importing a backend takes seconds and may crash; its
variants are asked there one after the other. The machine, its GPUs and the meters are looked at meanwhile. What the
hardware rewards is measured on request (`perwatt.bench.probe_hardware`) and remembered. All of it is plain data here;
`doctor_words` says it to a person.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Literal, get_args

from perwatt import registry
from perwatt.contract import OperatingPoint, Scenario, Target
from perwatt.errors import InputError, PerwattError
from perwatt.isolation import Worker

ASK_TIMEOUT_S = 120.0
NOTHING_SAID: dict[str, Any] = {
    "device": None,
    "slow_to_lower": None,
    "capabilities": None,
    "versions": {},
    "knobs": {},
}


def examine(measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """{"targets", "aliases", "machine", "meters", "probe"}. "probe" is `measured`, else what an earlier `probe` found,
    else None."""
    names = sorted(registry.names("targets"), key=_slow_last)
    # The slowest to import begin first; more workers than CPUs would only be in each other's way.
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        asked = {name: pool.submit(_target, name) for name in reversed(names)}
        seen = pool.submit(machine), pool.submit(meters)
        targets = [asked[name].result() for name in names]
        here, energy = (future.result() for future in seen)
    return {
        "targets": sorted(targets, key=lambda entry: (not entry["serves"], entry["name"])),
        "aliases": {alias: _serving(alias, targets) for alias in registry.ALIASES},
        "machine": here,
        "meters": energy,
        "probe": measured or _kept(),
    }


def one(name: str) -> list[dict[str, Any]]:
    """The page of the target that `name` names, or of each that an alias stands for: what it is, what it says of
    itself here, and the knobs that can be tuned, by scenario. Raises InputError for unknown names."""
    return [_page(full_name) for full_name in registry.serving(name)]


def probe(progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Measure what the hardware rewards, about 10 s. Raises BackendError where that can't be done here."""
    from perwatt.bench import probe_gpu, probe_hardware, probe_shapes
    from perwatt.bench.fingerprint import gpu_names, isa
    from perwatt.bench.probe import rewarded

    steps = (1 + len(probe_shapes.LAYERS)) * len(rewarded(isa())) + len(probe_gpu.PRODUCTS) * bool(gpu_names())
    done = 0

    def step(text: str) -> None:
        nonlocal done
        progress(text, min(done / steps, 1.0))
        done += 1

    return probe_hardware.run(step)


# Targets --------------------------------------------------------------------------------------------------------------


def _slow_last(name: str) -> tuple[bool, str]:
    try:
        return registry.target_class(name).slow_to_lower, name
    except PerwattError:
        return False, name


def _target(name: str) -> dict[str, Any]:
    """One target with all its variants. What can't even be loaded is an entry too, with the reason."""
    try:
        cls = registry.target_class(name)
    except PerwattError as error:
        variant = {"name": name, "variant": "", **NOTHING_SAID, "missing": [str(error)]}
        return {"name": name, "summary": "", "package": None, "serves": {}, "variants": [variant]}
    with Worker(name) as worker:
        variants = [_ask(worker, cls(variant)) for variant in cls.variants]
    serves = {alias: cls(cls.serves[alias]).full_name for alias in registry.ALIASES if alias in cls.serves}
    return {"name": name, "summary": _summary(cls), "package": _package(cls), "serves": serves, "variants": variants}


def _ask(worker: Worker, target: Target, scenario: Scenario = "single-stream") -> dict[str, Any]:
    point = asdict(OperatingPoint(scenario=scenario))
    try:
        facts = worker.call("target", timeout_s=ASK_TIMEOUT_S, name=target.full_name, point=point)
    except PerwattError as error:
        # One that crashes when it is asked can't be used.
        facts = {**NOTHING_SAID, "missing": [str(error)]}
    return {"name": target.full_name, "variant": target.variant, **facts}


def _page(full_name: str) -> dict[str, Any]:
    target = registry.target(full_name)
    cls = type(target)
    knobs = {}
    with Worker(full_name) as worker:
        for scenario in get_args(Scenario):
            facts = _ask(worker, target, scenario)
            if facts["missing"]:
                break
            knobs[scenario] = facts["knobs"]
    module = inspect.getmodule(cls)
    return {
        **facts,
        "knobs": knobs,
        "summary": _summary(cls),
        "documentation": inspect.cleandoc((module.__doc__ if module is not None else None) or ""),
        "package": _package(cls),
        "serves": [alias for alias in registry.ALIASES if cls.serves.get(alias) == target.variant],
        "variants": [cls(variant).full_name for variant in cls.variants],
        "formats": list(cls.formats),
    }


def _summary(cls: type[Target]) -> str:
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def _package(cls: type[Target]) -> str:
    return cls.__module__.partition(".")[0]


def _serving(alias: str, targets: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Which targets an alias stands for, usable and not."""
    usable = {variant["name"] for entry in targets for variant in entry["variants"] if not variant["missing"]}
    try:
        names = registry.serving(alias)
    except InputError:
        names = []
    return {"usable": [n for n in names if n in usable], "missing": [n for n in names if n not in usable]}


# The machine ----------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What this machine is: the fingerprint, what may be used of it, and its GPUs. Missing is None."""
    from perwatt.bench import machine as system
    from perwatt.bench.fingerprint import fingerprint
    from perwatt.bench.probe_gpu import gpus

    return {**fingerprint(), "virtualised": system.virtualised(), "gpus": gpus()}


def meters() -> dict[str, Any]:
    """Which meter would measure, for each device, and for every meter why it can't be used here."""
    from perwatt.bench.modelled import Modelled
    from perwatt.bench.nvml import Nvml
    from perwatt.bench.rapl import Rapl

    known = {"rapl": Rapl(), "rapl:psys": Rapl(domain="psys"), "nvml": Nvml(), "modelled": Modelled()}
    missing = {}
    for name, meter in known.items():
        missing[name] = meter.missing()
        meter.close()
    return {"cpu": _meter("cpu"), "gpu": _meter("gpu"), "missing": missing}


def _meter(device: Literal["cpu", "gpu"]) -> dict[str, Any]:
    from perwatt.bench.meters import open_meter

    try:
        meter, notes = open_meter(device=device)
    except PerwattError as error:
        return {"name": None, "method": "unavailable", "boundary": None, "how": None, "notes": [str(error)]}
    try:
        said = meter.describe()
        return {
            "name": meter.name() if meter.method != "unavailable" else None,
            "method": meter.method,
            "boundary": meter.boundary,
            "how": said.get("how"),
            "notes": notes,
        }
    finally:
        meter.close()


def _kept() -> dict[str, Any] | None:
    from perwatt.bench.probe_hardware import kept

    return kept()
