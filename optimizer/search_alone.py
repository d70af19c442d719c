"""What a search tries before anything else: every alternative by itself.

First the lossless passes on every backend, in every floating precision; then each alternative on the backend that these run best
on; then those that may be worth it on the others, one after the other, as long as they come near.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from perwatt.choices import BACKEND, FLOATING, PRECISION, Space, Values
from perwatt.search_seen import FORESEEN, Seen, key


def by_themselves(seen: Seen) -> list[Values]:
    """Those that come next; none where all were tried."""
    for several in (_plain(seen.space), _alternatives(seen.space, _home(seen)), _elsewhere(seen)):
        left = [values for values in several if key(values) not in seen.known]
        if left:
            return left
    return []


def _plain(space: Space) -> list[dict[str, int]]:
    """The lossless passes on every backend in every floating precision, each backend's own first."""
    there = [_with(space.usual(), BACKEND, backend) for backend in range(_count(space, BACKEND))]
    floating = [
        space.canonical(_with(one, FLOATING, index)) for one in there for index in range(_count(space, FLOATING))
    ]
    return [*map(space.at_home, there), *floating]


def _alternatives(space: Space, backend: int) -> list[dict[str, int]]:
    """Each by itself there."""
    there = _with(space.usual(), BACKEND, backend)
    return [space.at_home({**there, PRECISION: index}) for index in range(1, _count(space, PRECISION))]


def _elsewhere(seen: Seen) -> Iterator[Values]:
    """Of the alternatives on each other backend the one that is best at home; the next where that came near, and so on."""

    def told(values: Values) -> float:
        found = seen.known.get(key(values))
        return math.inf if found is None else found.cost

    home = _home(seen)
    for backend in range(_count(seen.space, BACKEND)):
        there = sorted(
            filter(seen.elsewhere, _alternatives(seen.space, backend) if backend != home else []),
            key=lambda values: told(seen.space.at_home(_with(values, BACKEND, home))),
        )
        for values in there:
            yield values
            # What the plan has measured there stands for itself.
            if seen.estimate(values) is None and not told(values) < FORESEEN * seen.least:
                break


def _home(seen: Seen) -> int:
    """The backend that the lossless passes cost least on."""
    costs: dict[int, float] = {}
    for values in _plain(seen.space):
        found, backend = seen.known.get(key(values)), values.get(BACKEND, 0)
        cost = found.cost if found is not None and found.permitted else math.inf
        costs[backend] = min(cost, costs.get(backend, math.inf))
    return min(costs, key=lambda backend: costs[backend])


def _count(space: Space, name: str) -> int:
    """How many values a decision has; one where there is nothing to decide."""
    return next((len(decision.values) for decision in space.decisions if decision.name == name), 1)


def _with(values: Values, name: str, index: int) -> dict[str, int]:
    """Another value of a decision, where it is one."""
    return {**values, name: index} if name in values else dict(values)
