"""What each node of a session costs, by ONNX Runtime's own profiler."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perwatt.contract import NodeCost
from perwatt.signature import Batch, inferences

KERNEL = "_kernel_time"


def node_costs(program: Any, batches: Sequence[Batch], seconds: float) -> list[NodeCost]:
    """Costs over calls with `batches` for about `seconds`; the session was told to write a profile."""
    items, turn, start = 0, 0, time.perf_counter()
    while not turn or time.perf_counter() - start < seconds:
        batch = batches[turn % len(batches)]
        program.call(batch)
        items += inferences(program.signature, batch)
        turn += 1
    events = json.loads(Path(program.session.end_profiling()).read_text())
    spent: dict[tuple[str, str], float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
            key = event["name"].removesuffix(KERNEL), event["args"]["op_name"]
            spent[key] = spent.get(key, 0.0) + event["dur"] * 1e-6
    return [NodeCost((name,), kind, total / items) for (name, kind), total in spent.items()]
