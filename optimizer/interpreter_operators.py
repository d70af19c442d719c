"""The table of operators that the interpreter has. Each stands in one of the `interpreter_*` modules, as

    @operator("Gemm", since=7)
    def gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0): ...

Inputs come by position in ONNX's order (None for an optional one that is left out), attributes by their ONNX names as
plain numbers, strings, tuples or tensors. The function returns a tensor, or a tuple where the operator has several
outputs; one whose number of outputs is variable takes `outputs`, how many are asked for.

`since` is the first opset version for which the function is right; an operator whose meaning changed is registered
several times, and the newest that is not newer than the model's opset is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

MODULES = (
    "attention", "control", "convolution", "elementwise", "elementwise_math", "elementwise_types", "indexing", "linear",
    "losses", "normalization", "pooling", "quantize", "random", "recurrent", "reduce", "resize", "rois", "sampling",
    "shape", "signal",
)  # fmt: skip


@dataclass(frozen=True)
class Operator:
    """One operator as from one opset version on. `host_inputs`: positions that are shapes or counts, which come as plain
    ints and tuples where they are known as such; True where that goes for every position."""

    domain: str
    name: str
    since: int
    function: Callable[..., Any]
    host_inputs: frozenset[int] | bool
    settings: frozenset[str]
    counts_outputs: bool

    @property
    def may_give_host(self) -> bool:
        """Whether its outputs may be plain numbers."""
        return self.host_inputs is True or self.name in ("Shape", "Size", "If", "Loop", "Scan")

    def takes_host(self, position: int) -> bool:
        """Whether the input at `position` may come as a plain number or a tuple of them."""
        return self.host_inputs if isinstance(self.host_inputs, bool) else position in self.host_inputs


_TABLE: dict[tuple[str, str], list[Operator]] = {}


def operator(
    name: str, since: int = 1, *, domain: str = "", host: Sequence[int] | bool = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the ONNX operator `name`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(function).parameters.values()
        settings = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        positions: frozenset[int] | bool = host if isinstance(host, bool) else frozenset(host)
        entry = Operator(domain, name, since, function, positions, settings - {"outputs"}, "outputs" in settings)
        versions = _TABLE.setdefault((domain, name), [])
        assert all(other.since != since for other in versions), f"{name} is registered twice since {since}"
        versions.append(entry)
        versions.sort(key=lambda one: one.since)
        return function

    return register


@cache
def _load() -> None:
    for module in MODULES:
        import_module(f"perwatt.interpreter_{module}")


def find(domain: str, name: str, version: int) -> Operator | None:
    """The operator for a model of this opset version; None where there is none."""
    _load()
    fitting = [one for one in _TABLE.get(("" if domain == "ai.onnx" else domain, name), []) if one.since <= version]
    return fitting[-1] if fitting else None
