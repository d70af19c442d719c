"""The cheapest way to cut a network in two: what any choice between two states for many nodes comes down to, when it costs
something wherever neighbours differ (Ford and Fulkerson 1956; Boykov and Kolmogorov 2004 for the energy it minimizes)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable
from typing import Any

FOREVER = 1 << 60
"""The capacity of an edge that no cut may go through."""


class Network:
    """Directed edges with whole numbers as capacities, those of equal ends added up."""

    def __init__(self) -> None:
        self._left: dict[Any, dict[Any, int]] = defaultdict(dict)

    def edge(self, start: Hashable, end: Hashable, capacity: int) -> None:
        """Cutting between `start` and `end`, with `start` on the side of the source, costs `capacity`."""
        self._left[start][end] = self._left[start].get(end, 0) + capacity
        self._left[end].setdefault(start, 0)

    def cut(self, source: Hashable, sink: Hashable) -> tuple[int, set[Any]]:
        """The least cost of separating `sink` from `source`, and the nodes on the side of `source`; uses the network up."""
        total = 0
        while (reached := self._reached(source, sink)).get(sink) is not None:
            path = [sink]
            while path[-1] != source:
                path.append(reached[path[-1]])
            steps = list(zip(path[1:], path[:-1], strict=True))
            flow = min(self._left[start][end] for start, end in steps)
            for start, end in steps:
                self._left[start][end] -= flow
                self._left[end][start] += flow
            total += flow
        return total, set(reached)

    def _reached(self, source: Any, sink: Any) -> dict[Any, Any]:
        """What can still be reached from `source`, each with the node before it."""
        before = {source: source}
        waiting = deque([source])
        while waiting and sink not in before:
            start = waiting.popleft()
            for end, left in self._left[start].items():
                if left > 0 and end not in before:
                    before[end] = start
                    waiting.append(end)
        return before
