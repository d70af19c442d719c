"""Which choices of a search are not worth a trial, whatever they promise: what was tried says how they end."""

from __future__ import annotations

from collections.abc import Sequence

from perwatt.choices import BACKEND, LEARN, PRECISION, Values
from perwatt.search_log import Outcome
from perwatt.search_seen import Seen, key, rounding, same_graph


def hopeless(values: Values, seen: Seen) -> bool:
    """Whether a choice that takes away less, and is the same otherwise, lost far too much; or something in it does nothing on
    this backend."""
    if _idle(values, seen) or _unproved(values, seen) or _removes_nothing(values, seen):
        return True
    if _tunes_what_is_untaught(values, seen) or _was_taught_enough(values, seen):
        return True
    return any(seen.far(trial) and seen.space.lighter(values, trial.values) for trial in seen.before)


def _tunes_what_is_untaught(values: Values, seen: Seen) -> bool:
    """Whether rounding is taught where what was removed is not: that is minutes for the smaller part."""
    tuned = any(values[name] for name in rounding(seen.space))
    return tuned and seen.space.mending is not None and seen.space.removes(values) and not values[LEARN]


def _was_taught_enough(values: Values, seen: Seen) -> bool:
    """Whether the same choice that learns less is permitted, as values of weights cost no time; or has learnt nothing."""
    for name in (LEARN, *rounding(seen.space)):
        less = _less(values, seen, name) if values.get(name, 0) else None
        if less is not None and less.permitted:
            return True
    # Where a round brought nothing, the next one will not, in whatever precision.
    before = seen.removal(seen.space.canonical({**values, LEARN: values.get(LEARN, 0) - 1}))
    last = (t for t in seen.before if values.get(LEARN, 0) > 1 and seen.removal(t.values) == before)
    return any(t.outcome is not None and same_graph(t.outcome, _less(t.values, seen, LEARN)) for t in last)


def _less(values: Values, seen: Seen, name: str) -> Outcome | None:
    """What is known of the same with one round less."""
    return seen.known.get(key(seen.space.canonical({**values, name: values[name] - 1})))


def _removes_nothing(values: Values, seen: Seen) -> bool:
    """Whether a removal in it was tried on this backend, and left the graph as it was."""
    for one in seen.space.removals:
        alike = [name for name in (BACKEND, one.step.name, one.how) if name in values]
        for trial in seen.before if values[one.step.name] else ():
            if all(trial.values[name] == values[name] for name in alike) and trial.outcome is not None:
                without = seen.known.get(key(seen.space.canonical({**trial.values, one.step.name: 0})))
                if without is not None and same_graph(without, trial.outcome):
                    return True
    return False


def _unproved(values: Values, seen: Seen) -> bool:
    """Whether it has an alternative that by itself was not worth a trial on its backend."""
    if not values.get(PRECISION):
        return False
    alone = _alone(values, seen, (BACKEND, PRECISION))
    return dict(values) != alone and key(alone) not in seen.known


def _idle(values: Values, seen: Seen) -> bool:
    """Whether the alternative by itself was refused there, or left the graph as it was."""
    if not values.get(PRECISION):
        return False
    alone = _alone(values, seen, (BACKEND, PRECISION))
    found = seen.known.get(key(alone))
    if dict(values) == alone or found is None:
        return False
    return found.status == "refused" or same_graph(found, seen.known.get(key(_alone(values, seen, (BACKEND,)))))


def _alone(values: Values, seen: Seen, names: Sequence[str]) -> dict[str, int]:
    """Nothing but these decisions, in the backend's own floating precision."""
    return seen.space.at_home({**seen.space.usual(), **{name: values[name] for name in names if name in values}})
