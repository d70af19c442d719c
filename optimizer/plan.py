"""A plan as data: what choices should cost, how sensitive layers are, how long a search takes, what is not possible.

A choice's estimate is the product of what its backend, its alternative and its removals make of the cost, each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from perwatt import plan_words
from perwatt.choices import PRECISION, Space, Values
from perwatt.cost_model import Estimate

Place = tuple[str, str]
"""Backend and floating precision."""


@dataclass(frozen=True)
class Limits:
    """What a search may take, in seconds from now on; None: nothing limits it. `whole`: the run's budget; `search`: until no
    further trial is begun; `behind`: what follows that, in order. `minutes`: the usual time of a round of learning, None as the
    passes have it; `trials`: at most so many."""

    whole: float | None = None
    search: float | None = None
    behind: Mapping[str, float | None] = field(default_factory=dict)
    minutes: float | None = None
    trials: int | None = None


@dataclass(frozen=True)
class Layer:
    """A product with stored weights. `movement`: how far rounding it to int8 moves the outputs, relative to them; `share`: of
    the cost where the original runs best."""

    name: str
    kind: str
    movement: float | None
    share: float | None


@dataclass(frozen=True)
class Foreseen:
    """A choice before it is tried. `ratio`: its cost ÷ the original's; where that is not known, `why` says why. `seconds` to try
    it. `removal`: what is taken away in it, and `amount` how much, in words."""

    values: Values
    choice: str
    ratio: Estimate | None
    seconds: float
    why: str = ""
    removal: str = ""
    amount: str = ""


@dataclass(frozen=True)
class Part:
    """A stage of the search, and the seconds that it takes; None where nothing limits it."""

    name: str
    seconds: float | None


@dataclass
class Factors:
    """What the parts of a choice make of the cost, each by itself; where that is not known, why. `places`: the lossless graph
    there ÷ the original where it runs best; `alternatives` (backend, index) ÷ the lossless graph; `removals` (backend, pass,
    index) ÷ the graph before. `rounded`: alternatives that leave too little in floating point for its precision to matter."""

    space: Space
    places: dict[Place, Estimate] = field(default_factory=dict)
    alternatives: dict[tuple[str, int], Estimate | str] = field(default_factory=dict)
    removals: dict[tuple[str, str, int], Estimate | str] = field(default_factory=dict)
    rounded: set[tuple[str, int]] = field(default_factory=set)

    def of(self, values: Values) -> Estimate | str:
        """The cost of a choice ÷ the original's, or why nobody knows."""
        parts = list(self._parts(self.space.canonical(values)))
        unknown = [part for part in parts if isinstance(part, str)]
        return "; ".join(dict.fromkeys(unknown)) or product(*(part for part in parts if isinstance(part, Estimate)))

    def _parts(self, values: Values) -> Iterator[Estimate | str]:
        backend, floating = self.space.where(values)
        index = values.get(PRECISION, 0)
        place = backend, self.space.places[backend][0] if (backend, index) in self.rounded else floating
        yield self.places.get(place, f"the original was not measured on {backend} in {place[1]}")
        if index:
            yield self.alternatives.get((backend, index), "it was not looked at")
        for one in self.space.removals:
            if values[one.step.name]:
                key = backend, one.step.name, values[one.step.name]
                yield self.removals.get(key, f"{one.step.name} was not looked at")

    def to_json(self) -> dict[str, Any]:
        """Plain data: each key's parts, then what is known."""
        kept = {name: getattr(self, name) for name in ("places", "alternatives", "removals")}
        told = {name: [[*key, _plain(found)] for key, found in several.items()] for name, several in kept.items()}
        return {**told, "rounded": sorted(self.rounded)}

    @classmethod
    def from_json(cls, space: Space, plain: Mapping[str, Any]) -> Factors:
        """What `to_json` made."""
        kept = {
            name: {tuple(key): _estimate(found) for *key, found in plain[name]}
            for name in ("places", "alternatives", "removals")
        }
        return cls(space, **kept, rounded={(backend, index) for backend, index in plain["rounded"]})


@dataclass
class Plan:
    """A search that has not begun. `layers`: the most sensitive first; `unmoved`: why nothing is known of how sensitive they are;
    `estimates`: every choice by itself, the cheapest first, then each removal on top of the best of them, which is `base`;
    `trials`: about how many fit; `without`: what is not possible, and why; `left_out`: steps of planning that there was no time
    for, or that failed; `models`: what each backend's cost model rests on; `seconds` it took."""

    factors: Factors
    layers: list[Layer] = field(default_factory=list)
    unmoved: str = ""
    estimates: list[Foreseen] = field(default_factory=list)
    base: str = ""
    parts: list[Part] = field(default_factory=list)
    trials: int | None = None
    without: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0

    def estimate(self, values: Values) -> float | None:
        """The cost of a choice ÷ the original's; None where part of it is not known."""
        found = self.factors.of(values)
        return None if isinstance(found, str) else found.value

    def words(self) -> list[str]:
        """For a person: what is worth most first."""
        return plan_words.words(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        listed = {name: [asdict(one) for one in getattr(self, name)] for name in ("layers", "estimates", "parts")}
        told = {name: getattr(self, name) for name in ("unmoved", "base", "trials", "without", "left_out", "models")}
        return {**listed, **told, "factors": self.factors.to_json(), "seconds": round(self.seconds, 1)}

    @classmethod
    def from_json(cls, space: Space, plain: Mapping[str, Any]) -> Plan:
        """What `to_json` made of a plan for the same space."""
        listed: dict[str, Any] = {
            "layers": [Layer(**one) for one in plain["layers"]],
            "estimates": [Foreseen(**{**one, "ratio": _estimate(one["ratio"])}) for one in plain["estimates"]],
            "parts": [Part(**one) for one in plain["parts"]],
        }
        names = ("unmoved", "base", "trials", "without", "left_out", "models", "seconds")
        told: dict[str, Any] = {name: plain[name] for name in names}
        return cls(Factors.from_json(space, plain["factors"]), **listed, **told)


def product(*parts: Estimate) -> Estimate:
    """Of what is off independently."""
    value = math.prod(part.value for part in parts)
    return Estimate(value, value * math.sqrt(sum((part.spread / part.value) ** 2 for part in parts if part.value)))


def _plain(found: Estimate | str) -> dict[str, float] | str:
    return found if isinstance(found, str) else asdict(found)


def _estimate(plain: Any) -> Any:
    """What was an estimate is one again; the rest stays as it is."""
    return Estimate(**plain) if isinstance(plain, dict) else plain
