"""What a search chooses from: decisions made of a recipe's passes, and the steps that each choice stands for.

Lossless passes are taken as they come. Every lossy pass is a decision: left out, or put in with one of the values that it says
may be searched (`Pass.searched`). Alternatives (`one-of`) are one decision. Where something was removed, it is a decision how
long the rest is taught: what a choice costs is known without, in seconds, and what it loses then says what to teach.

    drop-blocks 0.2                →   drop-blocks(0.2)
    drop-blocks 0.2, learn usual   →   drop-blocks(0.2), recover(2 minutes)
    drop-blocks 0.2, learn long    →   drop-blocks(0.2), recover(2 minutes), recover(4 minutes)

Decisions that make no difference to a choice are set to their first value (`Space.canonical`), so that two ways of saying the
same are one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from perwatt import registry
from perwatt.contract import Pass, Stage
from perwatt.recipe import OneOf, PassStep

Kind = Literal["ordered", "categorical"]
Values = Mapping[str, int]
"""Name of each decision → index of the value that it has."""

BACKEND, FLOATING, PRECISION, ORDER, LEARN = "backend", "floating precision", "precision", "order", "learn"
ROUNDS = (1.0, 2.0)
"""Learning `usual`: a round of the usual minutes; `long`: another one behind it, of so many times that."""


@dataclass(frozen=True)
class Decision:
    """One thing to decide. `values`: in words, the first one is what happens where nothing is decided. `ordered`: the more to
    the right, the more is taken away."""

    name: str
    values: tuple[str, ...]
    kind: Kind = "categorical"


@dataclass(frozen=True)
class _Removal:
    """A lossy pass that is put in or left out; `options`: its settings for each value but the first, which leaves it out; `ways`:
    other settings that it may have besides, chosen by the decision `how`."""

    step: PassStep
    options: tuple[dict[str, Any], ...]
    ways: tuple[dict[str, Any], ...] = ({},)

    @property
    def how(self) -> str:
        """`prune-channels multiple`: the decision between ways, where there are several."""
        return f"{self.step.name} {' and '.join(self.ways[0])}"

    def settings(self, values: Values) -> dict[str, Any]:
        """As a choice has them that takes something away."""
        return {**self.options[values[self.step.name] - 1], **self.ways[values.get(self.how, 0)]}


@dataclass(frozen=True)
class Space:
    """All choices: `decisions`, and how they become steps. `before` and `after`: lossless passes before pruning and behind it;
    `tidy`: those at the very end."""

    decisions: tuple[Decision, ...]
    before: tuple[PassStep, ...] = ()
    removals: tuple[_Removal, ...] = ()
    mending: PassStep | None = None
    after: tuple[PassStep, ...] = ()
    alternatives: tuple[PassStep | None, ...] = (None,)
    tuning: PassStep | None = None
    tidy: tuple[PassStep, ...] = ()
    places: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    # Choices ----------------------------------------------------------------------------------------------------------

    def count(self) -> int:
        """How many choices there are, those that come to the same counted once each time."""
        total = 1
        for decision in self.decisions:
            total *= len(decision.values)
        return total

    def usual(self) -> dict[str, int]:
        """The choice where nothing is decided: the lossless passes."""
        return {decision.name: 0 for decision in self.decisions}

    def all(self) -> Iterator[dict[str, int]]:
        """Every choice, in canonical form, each once."""
        seen = set()
        for indices in itertools.product(*(range(len(decision.values)) for decision in self.decisions)):
            values = self.canonical(dict(zip((d.name for d in self.decisions), indices, strict=True)))
            key = tuple(values.values())
            if key not in seen:
                seen.add(key)
                yield values

    def canonical(self, values: Values) -> dict[str, int]:
        """The same choice with what makes no difference set to its first value."""
        found = {d.name: min(max(0, int(values.get(d.name, 0))), len(d.values) - 1) for d in self.decisions}
        removed = [one for one in self.removals if found[one.step.name]]
        found.update({one.how: 0 for one in self.removals if one.how in found and one not in removed})
        if len(removed) < 2 and ORDER in found:
            found[ORDER] = 0
        if not removed and LEARN in found:
            found[LEARN] = 0
        if self.tuning is not None and self.alternatives[found.get(PRECISION, 0)] is None:
            found[self.tuning.name] = 0
        if FLOATING in found and self._floating(found) is None:
            floating = next(d for d in self.decisions if d.name == FLOATING)
            found[FLOATING] = floating.values.index(self.places[self._words(BACKEND, found)][0])
        return found

    def at_home(self, values: Values) -> dict[str, int]:
        """The same choice in its backend's own floating precision."""
        found = dict(values)
        decision = next((d for d in self.decisions if d.name == FLOATING), None)
        if decision is not None:
            found[FLOATING] = decision.values.index(self.places[self._words(BACKEND, values)][0])
        return self.canonical(found)

    def where(self, values: Values) -> tuple[str, str]:
        """Backend and floating precision."""
        backend = self._words(BACKEND, values)
        return backend, self._floating(values) or self.places[backend][0]

    def _floating(self, values: Values) -> str | None:
        """The floating precision, where this backend has it."""
        wanted = self._words(FLOATING, values)
        offered = self.places[self._words(BACKEND, values)]
        return wanted if wanted in offered else None

    def _words(self, name: str, values: Values) -> str:
        decision = next((d for d in self.decisions if d.name == name), None)
        if decision is None:
            first = next(iter(self.places))
            return first if name == BACKEND else self.places[first][0]
        return decision.values[values.get(name, 0)]

    def words(self, values: Values) -> str:
        """`drop-blocks 0.2, learn long, quantize-int8 on openvino in f32`."""
        found = self.canonical(values)
        said = []
        for decision in self.decisions:
            if decision.name in (BACKEND, FLOATING) or not found[decision.name]:
                continue
            value = decision.values[found[decision.name]]
            said.append(value if decision.name == PRECISION else f"{decision.name} {value}")
        backend, floating = self.where(found)
        return f"{', '.join(said) or 'lossless passes'} on {backend} in {floating}"

    # Steps ------------------------------------------------------------------------------------------------------------

    def steps(self, values: Values, minutes: float | None = None) -> list[PassStep]:
        """The passes of a choice, in order. `minutes`: the usual time for each round of learning; None leaves it to the pass."""
        found = self.canonical(values)
        made = [*self.before, *self._pruned(found, minutes), *self.after]
        alternative = self.alternatives[found.get(PRECISION, 0)]
        if alternative is not None:
            made.append(alternative)
        if self.tuning is not None and found[self.tuning.name]:
            made.append(_with_minutes(self.tuning, minutes))
        return [*made, *self.tidy]

    def _pruned(self, values: Values, minutes: float | None) -> Iterator[PassStep]:
        removals = [one for one in self.removals if values[one.step.name]]
        if values.get(ORDER):
            removals.reverse()
        for one in removals:
            yield _with(one.step, one.settings(values))
        if self.mending is not None:
            for times in ROUNDS[: values.get(LEARN, 0)]:
                yield _with_minutes(self.mending, None if minutes is None else round(minutes * times, 3))

    def ordered(self, name: str) -> bool:
        """Whether a decision is how much is taken away."""
        return any(decision.name == name and decision.kind == "ordered" for decision in self.decisions)

    def removes(self, values: Values) -> bool:
        """Whether a choice takes something away."""
        return any(values[one.step.name] for one in self.removals)

    def untaught(self, values: Values) -> dict[str, int]:
        """The same choice without learning what was lost by removing; itself where nothing is learnt so."""
        return self.canonical({**values, LEARN: 0}) if LEARN in values else dict(values)

    def learns(self, values: Values) -> int:
        """How many times a choice learns."""
        mending = [one.name for one in (self.mending, self.tuning) if one is not None]
        return sum(step.name in mending for step in self.steps(values))

    def learning(self, values: Values) -> tuple[int, ...]:
        """What has to be learnt for a choice: two with the same learn the same. Empty where nothing has to."""
        if not self.learns(values):
            return ()
        found = self.canonical(values)
        apart = {name for one in self.removals for name in (one.step.name, one.how)} | {BACKEND, ORDER, LEARN}
        tuned = self.tuning is not None and found[self.tuning.name]
        return tuple(found[d.name] if tuned or d.name in apart else 0 for d in self.decisions)

    def lighter(self, values: Values, other: Values) -> bool:
        """Whether `other` takes away what `values` does and nothing more, and at least one thing less. What it loses, `values`
        will hardly win back."""
        less = False
        for decision in self.decisions:
            ours, theirs = values[decision.name], other[decision.name]
            if decision.kind == "ordered":
                if theirs > ours or (theirs == 0) != (ours == 0):
                    return False
                less = less or theirs < ours
            elif ours != theirs:
                return False
        return less


def _with(step: PassStep, settings: Mapping[str, Any]) -> PassStep:
    return PassStep(name=step.name, settings={**settings, **step.settings})


def _with_minutes(step: PassStep, minutes: float | None) -> PassStep:
    fixed = minutes is None or {"minutes", "steps"} & set(step.settings)
    return step if fixed else PassStep(name=step.name, settings={**step.settings, "minutes": minutes})


# From a recipe ------------------------------------------------------------------------------------------------------------


def steps_to_search(learning: bool, judged: bool) -> list[PassStep | OneOf]:
    """The default passes of a search: those of the default pipeline, and those that are for searches (`Pass.in_search`).
    `learning`: there are samples to learn from; `judged`: and some to judge accuracy by."""
    wanted = []
    for name, cls in registry.loadable_passes().items():
        needed = judged if cls.tolerance is None else True
        if cls.in_search and needed and (learning or not cls.mends):
            wanted.append(f"+{name}")
    steps = registry.default_steps(False)
    return registry.edit_steps(steps, ",".join(wanted)) if wanted else steps


def space(steps: Sequence[PassStep | OneOf], places: Mapping[str, Sequence[str]]) -> Space:
    """The space of a recipe's steps. `places`: backends, the best first → floating precisions, its default first."""
    found: dict[str, Any] = {"before": [], "removals": [], "after": [], "tidy": [], "mending": None, "tuning": None}
    alternatives: list[PassStep | None] = [None]
    for step in steps:
        if isinstance(step, OneOf):
            alternatives += [one for each in step.steps for one in _spelt_out(each)]
            continue
        cls = registry.pass_class(step.name)
        if cls.tolerance is not None:
            late = "tidy" if len(alternatives) > 1 else "after" if found["removals"] else "before"
            found[late].append(step)
        elif cls.mends:
            found["tuning" if len(alternatives) > 1 or cls.stage is Stage.PRECISION else "mending"] = step
        elif cls.stage is Stage.PRECISION:
            alternatives += _spelt_out(step)
        else:
            found["removals"].append(_removal(cls, step))
    if not found["removals"]:
        found["mending"] = None
    if len(alternatives) == 1:
        found["tuning"] = None
    decisions = tuple(_decisions(found, alternatives, places))
    return Space(
        decisions, tuple(found["before"]), tuple(found["removals"]), found["mending"], tuple(found["after"]),
        tuple(alternatives), found["tuning"], tuple(found["tidy"]), {name: tuple(offered) for name, offered in places.items()},
    )  # fmt: skip


def _decisions(
    found: Mapping[str, Any], alternatives: Sequence[PassStep | None], places: Mapping[str, Sequence[str]]
) -> Iterator[Decision]:
    if len(places) > 1:
        yield Decision(BACKEND, tuple(places))
    floating = tuple(dict.fromkeys(one for offered in places.values() for one in offered))
    if len(floating) > 1:
        yield Decision(FLOATING, floating)
    for one in found["removals"]:
        told = tuple(_told(options) for options in one.options)
        amounts = all(len(options) == 1 and _is_number(*options.values()) for options in one.options)
        yield Decision(one.step.name, ("none", *told), "ordered" if amounts else "categorical")
        if len(one.ways) > 1:
            yield Decision(one.how, tuple(_told(way) for way in one.ways))
    if len(found["removals"]) > 1:
        names = [one.step.name for one in found["removals"]]
        yield Decision(ORDER, (" before ".join(names), " before ".join(reversed(names))))
    if found["mending"] is not None:
        fixed = {"minutes", "steps"} & set(found["mending"].settings)
        yield Decision(LEARN, ("none", "yes") if fixed else ("none", "usual", "long"))
    if len(alternatives) > 1:
        yield Decision(PRECISION, ("none", *(_step_words(one) for one in alternatives if one is not None)))
    if found["tuning"] is not None:
        yield Decision(found["tuning"].name, ("no", "yes"))


def _removal(cls: type[Pass], step: PassStep) -> _Removal:
    """How much goes is the first setting that may be searched, where it is a number; the others are ways to do it."""
    open_ = [name for name in cls.searched if name not in step.settings]
    amount = open_[0] if open_ and all(map(_is_number, cls.searched[open_[0]])) else None
    options, ways = dict[str, Any](), dict[str, Any]()
    for name in open_:
        (options if amount in (None, name) else ways)[name] = cls.searched[name]
    return _Removal(step, tuple(_products(options)), tuple(_products(ways)))


def _products(options: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination; the empty one where there is nothing to choose."""
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _spelt_out(step: PassStep) -> list[PassStep]:
    """A pass with each of the settings that may be searched and that the recipe leaves open."""
    searched = registry.pass_class(step.name).searched
    options = _products({name: values for name, values in searched.items() if name not in step.settings})
    return [PassStep(name=step.name, settings={**step.settings, **one}) for one in options]


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in settings.values()) or "yes"


def _step_words(step: PassStep) -> str:
    """`quantize-int8 (operators: all)`."""
    said = ", ".join(
        f"{key.replace('_', ' ')}: {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in step.settings.items()
    )
    return f"{step.name} ({said})" if said else step.name


__all__ = ["Decision", "Space", "Values", "space", "steps_to_search"]
