"""Which layers to quantize: the cheapest choice whose damage stays within a budget, as one integer program.

    minimize    Σ cost[l, t] x[l, t]  +  Σ price[a, b] · |q[a] − q[b]|        x[l, t] ∈ {0, 1}, one type t for each layer l
    subject to  Σ damage[l, t] x[l, t] ≤ budget

q[l] says whether layer l is quantized; neighbours of different kind pay a conversion. Solved by HiGHS through SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_S = 20.0
"""A solver that has proved nothing by then gives the best that it has."""


@dataclass(frozen=True)
class Layer:
    """What a layer costs (seconds an inference) as it is and quantized, and what quantizing it does to the outputs."""

    name: str
    cost: float
    quantized_cost: float
    damage: float


@dataclass(frozen=True)
class Border:
    """Two layers, one of which reads what the other makes, and what a conversion between them costs."""

    first: str
    second: str
    price: float


def allocate(layers: Sequence[Layer], borders: Sequence[Border], budget: float) -> frozenset[str]:
    """The layers to quantize."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    if not layers:
        return frozenset()
    place = {layer.name: position for position, layer in enumerate(layers)}
    edges = [b for b in borders if b.first in place and b.second in place and b.first != b.second and b.price > 0]
    n, m = len(layers), len(edges)
    # Seconds are of the order of microseconds, which solvers take for zero.
    unit = max((max(layer.cost, layer.quantized_cost) for layer in layers), default=0.0) or 1.0
    objective = np.array(
        [(layer.quantized_cost - layer.cost) / unit for layer in layers] + [b.price / unit for b in edges]
    )
    rows = np.zeros((2 * m + 1, n + m))
    for number, edge in enumerate(edges):
        a, b = place[edge.first], place[edge.second]
        # The edge's variable is at least the difference, either way.
        rows[2 * number, [a, b, n + number]] = 1, -1, -1
        rows[2 * number + 1, [a, b, n + number]] = -1, 1, -1
    finite = np.array([math.isfinite(layer.damage) for layer in layers], bool)
    worst = max((layer.damage for layer in layers if math.isfinite(layer.damage)), default=0.0) or 1.0
    rows[-1, :n] = [layer.damage / worst if known else 0.0 for layer, known in zip(layers, finite, strict=True)]
    above = np.append(np.zeros(2 * m), min(budget / worst, 2.0 * n))
    most = np.ones(n + m)
    if budget < math.inf:
        # What nobody could tell the damage of stays as it is; and solvers take what is a millionth for nothing.
        most[:n] = [layer.damage <= budget for layer in layers]
    found = milp(
        objective,
        constraints=LinearConstraint(rows, -np.inf, above),
        integrality=np.append(np.ones(n), np.zeros(m)),
        bounds=Bounds(0, most),
        options={"time_limit": MOST_S},
    )
    if found.x is None:
        return frozenset()
    return frozenset(layer.name for layer, chosen in zip(layers, found.x[:n], strict=True) if chosen > 0.5)


def gain(layers: Sequence[Layer], borders: Sequence[Border], chosen: frozenset[str]) -> float:
    """What the model says a choice saves, in seconds an inference."""
    saved = sum(layer.cost - layer.quantized_cost for layer in layers if layer.name in chosen)
    return saved - sum(b.price for b in borders if (b.first in chosen) != (b.second in chosen))
