"""How many units each group keeps: so that enough time is saved, in sizes that the hardware likes, where it does least damage.

What a product costs is taken to shrink as its inputs and outputs do. Units go a step at a time, to the next size that is a
multiple of what pays; of all groups, the one whose next step loses least for what it saves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from perwatt.coupling_places import Coupling, Group, Product


@dataclass
class Costs:
    """What products cost (seconds, or multiplications), and what of it is left while units go."""

    coupling: Coupling
    products: Sequence[Product]
    seconds: Mapping[str, float]
    _left: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._left = {product.node: [1.0, 1.0] for product in self.products}

    def total(self) -> float:
        """What all products cost now."""
        return sum(self.seconds[product.node] * math.prod(self._left[product.node]) for product in self.products)

    def without(self, group: Group, units: float, *, take: bool = False) -> float:
        """What all cost once so many further units of a group go; `take` makes it so."""
        old: dict[str, list[float]] = {}
        for side, products, place in ((0, group.makers, "made"), (1, group.readers, "read")):
            for product in products:
                old.setdefault(product.node, list(self._left[product.node]))
                self._left[product.node][side] -= units * self._share(group, getattr(product, place))
        cost = self.total()
        if not take:
            self._left.update(old)
        return cost

    def _share(self, group: Group, place: tuple[str, int]) -> float:
        """The part of an axis that a unit is."""
        at = group.positions(*place)
        return 0.0 if at is None else at.shape[1] / self.coupling.lengths()[place]


def sizes(group: Group, multiple: int) -> list[int]:
    """How many units a group may keep, most first: all, and what leaves every axis of a product a multiple of channels."""
    each = {at.shape[1] for product in group.makers if (at := group.positions(*product.made)) is not None}
    kept = [n for n in range(group.size - 1, 0, -1) if all(n * channels % multiple == 0 for channels in each)]
    return [group.size, *kept]


def uniform(groups: Mapping[Group, list[int]], ratio: float) -> dict[Group, int]:
    """The size nearest to the same share of every group, of those that it may keep; the larger of two."""
    found = {}
    for group, steps in groups.items():
        wanted = group.size * (1 - ratio)
        found[group] = min((abs(n - wanted), -n) for n in steps)[1]
    return {group: -size for group, size in found.items()}


def cheapest(
    groups: Mapping[Group, list[int]], scores: Mapping[Group, Any], costs: Costs, target: float, least: float
) -> dict[Group, int]:
    """Units kept so that all costs about `target`, with the least score lost; of the sizes that a group may keep, those of at
    least a share of it."""
    steps = {group: [n for n in sizes if n >= least * group.size - 1e-9] for group, sizes in groups.items()}
    lost = {group: np.concatenate([[0.0], np.cumsum(np.sort(scores[group]))]) for group in groups}
    now = {group: 0 for group in groups}
    cost = costs.total()
    while True:
        best: tuple[float, Group, float] | None = None
        for group in groups:
            if now[group] + 1 >= len(steps[group]):
                continue
            before, after = steps[group][now[group]], steps[group][now[group] + 1]
            then = costs.without(group, before - after)
            # A step that goes further beyond the target than it is away now is none.
            if then >= cost or abs(then - target) > abs(cost - target):
                continue
            damage = lost[group][group.size - after] - lost[group][group.size - before]
            price = damage / (cost - then)
            if best is None or price < best[0]:
                best = price, group, then
        if best is None:
            return {group: steps[group][now[group]] for group in groups}
        _, group, cost = best
        costs.without(group, steps[group][now[group]] - steps[group][now[group] + 1], take=True)
        now[group] += 1
