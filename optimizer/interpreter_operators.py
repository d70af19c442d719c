"""The table of operators that the interpreter has. Each stands in one of the `interpreter_*` modules, as

    @operator("Gemm", since=7)
    def gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0): ...

Inputs come by position in ONNX's order (None for an optional one that is left out), attributes by their ONNX names as
plain numbers, strings, tuples or tensors. The function returns a tensor, or a tuple where the operator has several
outputs; one whose number of outputs is variable takes `outputs`, how many are asked for; one that makes tensors of host
values alone takes `device`, where to make them.

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
    ints and tuples where they are known as such; True where that goes for every position. `number_inputs`: positions of
    which only the numbers matter and never the type, so that a constant of any type comes as plain numbers."""

    domain: str
    name: str
    since: int
    function: Callable[..., Any]
    host_inputs: frozenset[int] | bool
    number_inputs: frozenset[int]
    settings: frozenset[str]
    counts_outputs: bool
    wants_device: bool

    @property
    def may_give_host(self) -> bool:
        """Whether its outputs may be plain numbers where its first input is one."""
        return self.host_inputs is True

    @property
    def makes_host(self) -> bool:
        """Whether its outputs may be plain numbers even though its first input is a tensor."""
        return self.name in ("Shape", "Size", "ConstantOfShape", "If", "Loop", "Scan")

    def takes_host(self, position: int) -> bool:
        """Whether the input at `position` may come as a plain number or a tuple of them."""
        return self.host_inputs if isinstance(self.host_inputs, bool) else position in self.host_inputs

    def reads_numbers(self, position: int) -> bool:
        """Whether a constant at `position` may come as plain numbers whatever its type."""
        return position in self.number_inputs or (self.host_inputs is not True and self.takes_host(position))


_TABLE: dict[tuple[str, str], list[Operator]] = {}


def operator(
    name: str, since: int = 1, *, domain: str = "", host: Sequence[int] | bool = (), numbers: Sequence[int] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the ONNX operator `name`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(function).parameters.values()
        settings = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        positions: frozenset[int] | bool = host if isinstance(host, bool) else frozenset(host)
        own = settings - {"outputs", "device"}
        asks = "outputs" in settings, "device" in settings
        found = Operator(domain, name, since, function, positions, frozenset(numbers), own, *asks)
        versions = _TABLE.setdefault((domain, name), [])
        assert all(other.since != since for other in versions), f"{name} is registered twice since {since}"
        versions.append(found)
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
