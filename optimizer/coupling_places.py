"""The notebook of couplings: places, which of them are the same, and the groups of units that follow.

A place is an axis of a value. Axes that are the same from end to end are merged first, so that positions are only told apart
where an operator shifts, joins or regroups them. A Reshape that splits an axis keeps what comes first of its parts cuttable
(heads rather than what is inside of each), unless that is frozen, or the parts change places (channels that are shuffled). The
batch and other axes whose length isn't known are never cut. What operators say stands in `coupling`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from perwatt.analysis_expressions import Expression, Number
from perwatt.analysis_facts import Facts

Place = tuple[str, int]
"""An axis of a value: the value's name, and which of its axes."""
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Product:
    """A product with a stored weight: its node's name, its operator, the weight, and along which axes of that lie what it
    makes and what it reads; `data`: the axis that it reads."""

    node: str
    kind: str
    weight: str
    made: Place
    read: Place
    data: Place
    output: Place


@dataclass(frozen=True, eq=False)
class Group:
    """Units that lie along the same axes. `name`: the first product that makes them. `makers` and `readers`: products of which
    they are outputs and inputs."""

    name: str
    size: int
    makers: tuple[Product, ...]
    readers: tuple[Product, ...]
    _found: dict[Place, Positions]
    _classes: dict[Place, Place]

    def positions(self, value: str, axis: int) -> Positions | None:
        """[units, positions of each] along that axis; None where the group has none there."""
        place = self._classes.get((value, axis))
        return None if place is None else self._found.get(place)

    def along(self) -> dict[Place, Positions]:
        """The same for every class of axes, by the place that stands for it."""
        return dict(self._found)


@dataclass(frozen=True)
class Left:
    """Units that can't be cut: the first product that makes them, how many, and why."""

    name: str
    size: int
    reason: str


@dataclass
class Coupling:
    """What rules say of a graph, and what follows from it."""

    facts: Facts
    products: list[Product] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    _parent: dict[Place, Place] = field(default_factory=dict)
    _length: dict[Place, int] = field(default_factory=dict)
    _frozen: dict[Place, str] = field(default_factory=dict)
    _frozen_at: list[tuple[Place, Positions, str]] = field(default_factory=list)
    _links: list[tuple[Place, Positions, Place, Positions]] = field(default_factory=list)
    _splits: list[tuple[Place, list[Place]]] = field(default_factory=list)

    # What rules say ---------------------------------------------------------------------------------------------------

    def rank(self, value: Any) -> int | None:
        """How many axes a value has."""
        shape = self.facts.shape(value)
        return None if shape is None else len(shape)

    def length(self, value: Any, axis: int) -> int | None:
        """How many positions an axis has, where that is known."""
        shape = self.facts.shape(value)
        size = shape[axis] if shape is not None else None
        return size if isinstance(size, int) else None

    def place(self, value: Any, axis: int) -> Place | None:
        """The axis as a place; None where there is nothing to cut: its length is 1, or not known."""
        length = self.length(value, axis)
        if length is None or length <= 1:
            return None
        rank = self.rank(value)
        assert rank is not None
        place = (str(value.name), axis % rank)
        self._length[place] = length
        return place

    def virtual(self, node: Any, word: str, length: int) -> Place:
        """An axis of no value, such as the heads within a joined axis of what a node makes."""
        place = virtual_place(node, word)
        self._length[place] = length
        return place

    def same(self, one: Any, axis: int, other: Any, other_axis: int) -> None:
        """Two axes are the same from end to end. An axis of one position that is repeated along the other is none of it."""
        a, b = self.place(one, axis), self.place(other, other_axis)
        if a is None or b is None:
            for value, at, place, beside, there in (
                (one, axis, a, other, other_axis),
                (other, other_axis, b, one, axis),
            ):
                if place is not None and self.length(beside, there) is None:
                    self.freeze(value, at, f"nobody knows how long {beside.name} is")
        elif self._length[a] != self._length[b]:
            self.freeze(one, axis, f"{self._length[a]} positions meet {self._length[b]}")
            self.freeze(other, other_axis, f"{self._length[b]} positions meet {self._length[a]}")
        else:
            self._unite(a, b)

    def link(self, a: Place | None, at: Any, b: Place | None, there: Any) -> None:
        """Positions `at` of one place are positions `there` of the other, one by one (int arrays of one length)."""
        if a is not None and b is not None:
            self._links.append((a, np.asarray(at, np.int64), b, np.asarray(there, np.int64)))
        else:
            for place, positions in ((a, at), (b, there)):
                if place is not None:
                    why = "what it becomes or comes of has a single position, or nobody knows how many"
                    self._frozen_at.append((place, np.asarray(positions, np.int64), why))

    def freeze(self, value: Any, axis: int, reason: str) -> None:
        """Nothing may be cut along this axis."""
        place = self.place(value, axis)
        if place is not None:
            self._freeze(place, reason)

    def freeze_all(self, value: Any, reason: str) -> None:
        """Nothing may be cut out of this value."""
        for axis in range(self.rank(value) or 0):
            self.freeze(value, axis, reason)

    def split(self, whole: tuple[Any, int], parts: Sequence[tuple[Any, int]]) -> None:
        """An axis is what several make, first to last. Which of them positions are cut along is settled last."""
        joined = self.place(*whole)
        known = [(value, axis) for value, axis in parts if self.length(value, axis) != 1]
        places = [place for part in known if (place := self.place(*part)) is not None]
        if joined is None or len(places) != len(known):
            for place in (*places, *([joined] if joined else [])):
                self._freeze(place, "it is joined with an axis whose length nobody knows")
        else:
            self._splits.append((joined, places))

    # What follows -----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Find the groups, once every operator has been asked."""
        orders: dict[frozenset[Place], set[tuple[Place, ...]]] = {}
        for _, parts in self._splits:
            roots = tuple(map(self._root, parts))
            orders.setdefault(frozenset(roots), set()).add(roots)
        partly = {self._root(place) for place, _, _ in self._frozen_at}
        for whole, parts in self._splits:
            # Parts that are joined in another order elsewhere don't lie inside of each other: the longest leaves most to choose.
            shuffled = len(orders[frozenset(map(self._root, parts))]) > 1
            best = sorted(parts, key=lambda part: (-self._length[part], self._root(part))) if shuffled else parts
            self._settle_split(whole, parts, sorted(best, key=lambda part: self._root(part) in partly))
        starts, count = self._numbered()
        units, reasons = self._units(starts, count)
        self._group(starts, units, reasons)

    def shapes(self) -> dict[str, Any]:
        """The shape of every value by its name, where the rank is known."""
        known = self.facts.known.items()
        return {str(value.name): fact.shape for value, fact in known if value is not None and fact.shape is not None}

    def lengths(self) -> Mapping[Place, int]:
        """Every place that positions can be cut from, with how many it has."""
        return MappingProxyType(self._length)

    def same_class(self, place: Place) -> Place:
        """What stands for all places that are the same from end to end."""
        return self._root(place)

    def _root(self, place: Place) -> Place:
        path = []
        while (parent := self._parent.get(place, place)) != place:
            path.append(place)
            place = parent
        for one in path:
            self._parent[one] = place
        return place

    def _unite(self, a: Place, b: Place) -> None:
        a, b = self._root(a), self._root(b)
        if a != b:
            self._parent[b] = a
            if (reason := self._frozen.pop(b, None)) is not None:
                self._frozen.setdefault(a, reason)

    def _freeze(self, place: Place, reason: str) -> None:
        self._frozen.setdefault(self._root(place), reason)

    def _settle_split(self, whole: Place, parts: list[Place], best: list[Place]) -> None:
        """Cut along one of the parts, the first of `best` that may be."""
        free = [part for part in best if self._root(part) not in self._frozen]
        chosen = free[0] if free and self._root(whole) not in self._frozen else None
        for part in parts:
            if part is not chosen:
                self._freeze(part, "it lies inside of what is cut as one")
        if chosen is None:
            self._freeze(whole, self._frozen.get(self._root(parts[0]), "it is made of axes that stay"))
            return
        lengths = [self._length[part] for part in parts]
        inner = math.prod(lengths[parts.index(chosen) + 1 :])
        at = np.arange(self._length[whole])
        self._links.append((whole, at, chosen, at // inner % self._length[chosen]))

    def _numbered(self) -> tuple[dict[Place, int], int]:
        """The first number of each class's positions, and how many numbers there are."""
        starts: dict[Place, int] = {}
        count = 0
        for place in self._length:
            root = self._root(place)
            if root not in starts:
                starts[root] = count
                count += self._length[root]
        return starts, count

    def _units(self, starts: dict[Place, int], count: int) -> tuple[Any, dict[int, str]]:
        """The unit of each number, and why units are frozen."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        ends = [(starts[self._root(a)] + at, starts[self._root(b)] + there) for a, at, b, there in self._links]
        none = np.zeros(0, np.int64)
        left, right = (np.concatenate([none, *(pair[side] for pair in ends)]) for side in (0, 1))
        edges = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(count, count))
        units = connected_components(edges, directed=False)[1] if count else np.zeros(0, np.int64)
        reasons: dict[int, str] = {}
        whole = ((place, np.arange(self._length[place]), reason) for place, reason in self._frozen.items())
        for place, positions, reason in (*whole, *self._frozen_at):
            for unit in np.unique(units[starts[self._root(place)] + positions]).tolist():
                reasons.setdefault(unit, reason)
        return units, reasons

    def _group(self, starts: dict[Place, int], units: Any, reasons: dict[int, str]) -> None:
        """Units with positions along the same classes, as many along each, together."""
        along: dict[int, list[tuple[Place, int]]] = {}
        for root, start in starts.items():
            found, counts = np.unique(units[start : start + self._length[root]], return_counts=True)
            for unit, times in zip(found.tolist(), counts.tolist(), strict=True):
                along.setdefault(unit, []).append((root, times))
        alike: dict[Any, list[int]] = {}
        for unit, where in along.items():
            alike.setdefault((tuple(where), reasons.get(unit)), []).append(unit)
        makers, readers = self._by_class("made"), self._by_class("read")
        number = {product: at for at, product in enumerate(self.products)}
        classes = {place: self._root(place) for place in self._length}
        for (where, reason), members in alike.items():
            roots = [root for root, _ in where]
            made = sorted((one for root in roots for one in makers.get(root, ())), key=number.__getitem__)
            read = sorted((one for root in roots for one in readers.get(root, ())), key=number.__getitem__)
            if not made:
                continue
            if reason is None and not read:
                reason = "no product reads it"
            elif reason is None and len(members) == 1 and any(times == self._length[root] for root, times in where):
                reason = "all of it would go at once"
            if reason is not None:
                self.left.append(Left(made[0].node, len(members), reason))
                continue
            tables = {root: _table(units[starts[root] :][: self._length[root]], members) for root in roots}
            self.groups.append(Group(made[0].node, len(members), tuple(made), tuple(read), tables, classes))
        self.groups.sort(key=lambda group: number[group.makers[0]])

    def _by_class(self, side: str) -> dict[Place, list[Product]]:
        found: dict[Place, list[Product]] = {}
        for product in self.products:
            place = getattr(product, side)
            if place in self._length:
                found.setdefault(self._root(place), []).append(product)
        return found


def virtual_place(node: Any, word: str) -> Place:
    """What stands for an axis of no value; axes of values are never negative."""
    return (f"{node.outputs[0].name}#{word}", -1)


def matched(old: Sequence[Number], new: Sequence[Number]) -> Iterator[tuple[list[int], list[int]]] | None:
    """Runs of axes of two shapes of the same elements that hold the same, first to last; axes of length 1 are in none. None
    where nobody can tell."""
    primes = _Primes()
    before = [(axis, primes.of(size)) for axis, size in enumerate(old) if size != 1]
    after = [(axis, primes.of(size)) for axis, size in enumerate(new) if size != 1]
    runs = []
    while before or after:
        if not before or not after:
            return None
        (a, many), (b, there) = before.pop(0), after.pop(0)
        mine, theirs = [a], [b]
        while many != there:
            short, axes, rest = (many, mine, before) if many < there else (there, theirs, after)
            if not rest:
                return None
            axis, size = rest.pop(0)
            axes.append(axis)
            many, there = (short * size, there) if axes is mine else (many, short * size)
        runs.append((mine, theirs))
    return iter(runs)


class _Primes:
    """A number for every symbol: large primes, so that products of shapes compare as the shapes do."""

    LARGE = (1000003, 1000033, 1000037, 1000039, 1000081, 1000099, 1000117, 1000121, 1000133, 1000151, 1000159, 1000171)

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}

    def of(self, size: Number) -> int:
        if not isinstance(size, Expression):
            return int(size)
        total = 0
        for monomial, factor in size.terms.items():
            total += factor * math.prod(self._symbol(one) for one in monomial)
        return total

    def _symbol(self, one: Any) -> int:
        if one not in self._known:
            # Beyond a dozen symbols, odd numbers do.
            number = len(self._known)
            self._known[one] = self.LARGE[number] if number < len(self.LARGE) else 2000003 + 2 * number
        return self._known[one]


def _table(units: Any, members: Sequence[int]) -> Positions:
    """[units, positions of each], from the unit of each position; `members` in order."""
    order = np.argsort(units, kind="stable")
    first = np.searchsorted(units, members, sorter=order)
    each = np.searchsorted(units, members, side="right", sorter=order) - first
    return order[first[:, None] + np.arange(each[0])].astype(np.int64)
