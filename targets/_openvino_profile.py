"""What each operation of a compiled OpenVINO model costs, by the plugin's own counters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from perwatt.contract import NodeCost
from perwatt.signature import Batch, inferences

ALTERED = "/WithoutBiases"
"""What the plugin appends to the name of an operation that it took the bias out of."""


def node_costs(program: Any, batches: Sequence[Batch], seconds: float) -> list[NodeCost]:
    """Costs over calls with `batches` for about `seconds`; the program was compiled with PERF_COUNT."""
    sources = _sources(program.compiled)
    spent: dict[str, float] = {}
    kinds: dict[str, str] = {}
    done, start = 0, time.perf_counter()
    program.call(batches[0])
    while not done or time.perf_counter() - start < seconds:
        batch = batches[done % len(batches)]
        program.call(batch)
        done += 1
        for row in program.request.get_profiling_info():
            spent[row.node_name] = spent.get(row.node_name, 0.0) + row.real_time.total_seconds()
            kinds[row.node_name] = f"{row.node_type} {row.exec_type}"
    items = sum(inferences(program.signature, batches[turn % len(batches)]) for turn in range(done))
    return [NodeCost(sources.get(name, (name,)), kinds[name], total / items) for name, total in spent.items() if total]


def _sources(compiled: Any) -> dict[str, tuple[str, ...]]:
    """The operations of the model that each operation of the compiled one was made from."""
    found: dict[str, tuple[str, ...]] = {}
    for operation in compiled.get_runtime_model().get_ordered_ops():
        told = operation.get_rt_info()
        names = str(told["originalLayersNames"].astype(str)) if "originalLayersNames" in told else ""
        if names:
            listed = dict.fromkeys(name.removesuffix(ALTERED) for name in names.split(",") if name)
            found[operation.get_friendly_name()] = tuple(listed)
    return found
