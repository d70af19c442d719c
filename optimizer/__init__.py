"""perwatt: a compiler for trained neural networks whose objective function is throughput per watt.

    import perwatt
    bundle = perwatt.optimize("model.pt", target="cpu", data="val/", image=224, normalize="imagenet")
    outputs = perwatt.load(bundle).run(x)

Importing this costs nothing: what is named here is loaded when it is first used (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perwatt.api import Model, Reading, load, optimize, read, rewrite
    from perwatt.artifact import Artifact
    from perwatt.bench_report import BenchReport
    from perwatt.benching import benchmark
    from perwatt.bundle import Bundle
    from perwatt.errors import BackendError, InputError, PerwattError, TargetError, UntrustedCodeError
    from perwatt.gate_report import GateReport
    from perwatt.gating import gate
    from perwatt.recipe import Recipe
    from perwatt.rewriting import Rewritten

_HOMES = {
    "optimize": "api", "read": "api", "rewrite": "api", "load": "api", "Model": "api", "Reading": "api",
    "benchmark": "benching", "BenchReport": "bench_report", "gate": "gating", "GateReport": "gate_report",
    "Artifact": "artifact", "Bundle": "bundle", "Recipe": "recipe", "Rewritten": "rewriting",
    "PerwattError": "errors", "InputError": "errors", "UntrustedCodeError": "errors",
    "TargetError": "errors", "BackendError": "errors",
}  # fmt: skip

__all__ = [
    "Artifact", "BackendError", "BenchReport", "Bundle", "GateReport", "InputError", "Model", "PerwattError", "Reading",
    "Recipe", "Rewritten", "TargetError", "UntrustedCodeError", "benchmark", "gate", "load", "optimize", "read", "rewrite",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("perwatt")
    if name not in _HOMES:
        raise AttributeError(f"module 'perwatt' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"perwatt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
