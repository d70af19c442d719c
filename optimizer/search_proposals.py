"""What a round of a search tries: first every alternative by itself; then, step by step, how far each removal may go; then what
is near the best so far, what should lose little enough once taught, what may win back a little too much; and now and then what
Optuna's sampler proposes from everything told.

Not tried: what takes away still more than a choice that lost far too much, and more than one step beyond what was tried.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from perwatt.choices import BACKEND, FLOATING, LEARN, ORDER, PRECISION, ROUNDS, Values
from perwatt.search_alone import by_themselves
from perwatt.search_hopeless import hopeless
from perwatt.search_log import Log, Trial
from perwatt.search_seen import NEAR, SLACK, Seen, cost, key, rounding, same_graph

ROUND = 4
"""Trials in a round: what is proposed sees the rounds before it only, so more of them learn less from each other."""
LEARNING = 1
"""Trials in a round that learn what was not learnt yet: each makes the next better chosen."""
SAMPLED_FIRST = 4
"""Every so many rounds it is the sampler's proposal that comes first."""
SAME = 1.02
"""What costs no more than this times the least is as good to go on from."""
ALIKE = 1.25
"""What costs no more than this times the least will do to find out by what others bring and lose."""
EXPLORED = 4
"""Trials in a row that were taken at random and brought nothing: then it is over."""
TRIES = 8
"""Proposals of the sampler that were tried already before any other is taken."""

ALONE, LADDER, AROUND, TAUGHT, BACK, SAMPLED, ANY = (
    "by itself", "how far it may go", "one step from the best", "to be taught", "to win back what was lost",
    "proposed by the sampler", "not tried yet",
)  # fmt: skip


class Proposals:
    """Of round `number`, knowing what was `seen` before it."""

    def __init__(self, log: Log, seen: Seen, number: int) -> None:
        self.log, self.seen, self.number, self.space = log, seen, number, seen.space

    def taken(self) -> list[tuple[Values, str]]:
        """What the round tries, and why. The same for the same trials before it."""
        known = set(self.seen.known)
        learnt = {(), *(self.space.learning(trial.values) for trial in self.seen.before)}
        # What learns takes minutes, so that one of them is enough to go on from; the rest is found out in seconds.
        slow: list[tuple[Values, str]] = []
        quick: list[tuple[Values, str]] = []
        for proposed, why in itertools.chain(self._in_turn(), self._if_too_few(slow, quick)):
            values = self.seen.step_by_step(proposed)
            several = quick if self.space.learning(values) in learnt else slow
            most = LEARNING if several is slow else ROUND
            if key(values) in known or len(several) == most or hopeless(values, self.seen):
                continue
            known.add(key(values))
            several.append((values, why))
            if len(slow) + len(quick) == LEARNING + ROUND:
                break
        taken = [*slow, *quick][:ROUND]
        if taken or self._explored():
            return taken
        return next(([one] for one in self._anything()), [])

    def _explored(self) -> bool:
        """Whether the last trials were taken for want of anything better, and none of them was: what goes on costs energy."""
        last = sorted(self.seen.before, key=lambda trial: trial.number)[-EXPLORED:]
        best = self.seen.best
        return len(last) == EXPLORED and all(trial.why == ANY and trial is not best for trial in last)

    def _in_turn(self) -> Iterator[tuple[Values, str]]:
        alone = by_themselves(self.seen)
        if alone:
            yield from ((values, ALONE) for values in alone)
            return
        steps = [values for values in self._ladders() if not hopeless(values, self.seen)]
        if steps:
            yield from ((values, LADDER) for values in steps)
            return
        # What is proposed by chance costs minutes to learn: first what one step brings is learnt.
        if self.number % SAMPLED_FIRST == 0 and self._has_learnt():
            yield from self._sampled()
        around = [(values, AROUND) for trial in self._leading() for values in self._around(trial)]
        back = [(values, BACK) for trial in self._near() for values in self._back(trial.values)]
        taught = [(values, TAUGHT) for values in self._taught()]
        proposed = [(values, why) for values, why in (*around, *back, *taught) if self.seen.worth(values)]
        yield from sorted(proposed, key=lambda one: self.seen.promise(one[0]))

    def _if_too_few(self, *taken: Sequence[Any]) -> Iterator[tuple[Values, str]]:
        """What the sampler proposes, where the round has room for it when everything else was looked at."""
        if sum(map(len, taken)) < ROUND and not self._begins():
            yield from self._sampled()

    def _begins(self) -> bool:
        """Whether there are alternatives left, or steps of removals, to be tried by themselves."""
        return bool(by_themselves(self.seen)) or any(not hopeless(one, self.seen) for one in self._ladders())

    def _ladders(self) -> Iterator[dict[str, int]]:
        """Of each removal by itself, and each way to do it, the next step up: what each costs and loses untaught is known in
        seconds, and says which are worth minutes. As long as what a step lost may be taught back."""
        plain = [trial for trial in self.seen.ranking if not self.space.removes(trial.values)]
        near = [trial for trial in plain if self.seen.cost(trial) <= ALIKE * self.seen.cost(plain[0])]
        if not near:
            return
        # What a removal brings and loses is much the same beside each.
        base = min(near, key=lambda trial: trial.outcome.seconds if trial.outcome else 0.0).values
        untuned = self.space.canonical({**base, **dict.fromkeys(rounding(self.space), 0)})
        removals = [one for one in self.space.removals if self.space.ordered(one.step.name)]
        for one in removals:
            for way in range(len(one.ways)):
                values = self._next_step(untuned, one.step.name, {one.how: way}, len(one.options))
                yield from [] if values is None else [values]

    def _next_step(self, base: Values, name: str, how: Values, most: int) -> dict[str, int] | None:
        """One step further than was tried; None where that is no use any more."""
        changed: set[str | None] = set()
        for index in range(1, most + 1):
            values = self.space.canonical({**base, name: index, **how})
            found = [trial for trial in self.seen.before if self._same_removals(trial.values, values)]
            if not found:
                return values
            digests = {trial.outcome.digest for trial in found if trial.outcome is not None}
            # What loses more than teaching gives back, or goes no further than the step before it, has come to its end.
            if all(self.seen.loses(trial.values) > SLACK for trial in found) or digests & changed - {None}:
                return None
            changed = digests if self._changes(found, name) else set()
        return None

    def _changes(self, several: Sequence[Trial], name: str) -> bool:
        """Whether a removal in these made any difference, as far as is known."""
        without = [self.seen.known.get(key(self.space.canonical({**trial.values, name: 0}))) for trial in several]
        pairs = zip(several, without, strict=True)
        return not any(trial.outcome is not None and same_graph(trial.outcome, other) for trial, other in pairs)

    def _same_removals(self, values: Values, other: Values) -> bool:
        """Whether the same is removed on the same backend, and not taught."""
        names = [BACKEND, LEARN, *(name for one in self.space.removals for name in (one.step.name, one.how))]
        return all(values.get(name) == other.get(name) for name in names)

    def _taught(self) -> Iterator[dict[str, int]]:
        """What was only tried untaught, would be cheaper than the best, and should lose little enough once taught: taught, and
        with still more taken away. Where there is none, that which should lose least."""
        if self.space.mending is None:
            return
        untaught = [
            trial for trial in self.seen.before
            if trial.outcome is not None and self.seen.cost(trial) < self.seen.least
            and self.space.removes(trial.values) and self.space.untaught(trial.values) == dict(trial.values)
            and set(trial.outcome.missed) <= {"accuracy"}
        ]  # fmt: skip
        most = len(ROUNDS)
        hopeful = [trial for trial in untaught if self.seen.loses(self._learning(trial, most)) <= SLACK]
        least = min(untaught, key=lambda trial: self.seen.loses(self._learning(trial, most)), default=None)
        for trial in sorted(hopeful or ([least] if least is not None else []), key=self.seen.cost):
            yield from (values for values in self._around(trial) if self._takes_more(values, trial.values))
            yield from (self._learning(trial, rounds) for rounds in range(1, most + 1))

    def _learning(self, trial: Trial, rounds: int) -> dict[str, int]:
        return self.space.canonical({**trial.values, LEARN: rounds})

    def _takes_more(self, values: Values, other: Values) -> bool:
        """Whether more is taken away, and everything else is the same."""
        amounts = [one.step.name for one in self.space.removals]
        hows = [name for one in self.space.removals for name in (one.step.name, one.how, ORDER)]
        same = all(values[name] == other[name] for name in values if name not in hows)
        return same and sum(values[name] for name in amounts) > sum(other[name] for name in amounts)

    def _has_learnt(self) -> bool:
        """Whether what pays of that which has to be learnt is known: a trial that learns is the best, or several were told."""
        best = self.seen.best
        told = [trial for trial in self.seen.before if self.space.learns(trial.values)]
        nothing = self.space.mending is None and self.space.tuning is None
        return nothing or (best is not None and best in told) or len(told) >= SAMPLED_FIRST

    def _leading(self) -> list[Trial]:
        """The best permitted trial, and of those that cost about the same the one that takes least time to make."""
        ranking = self.seen.ranking
        same = [trial for trial in ranking if cost(trial) <= SAME * cost(ranking[0])]
        return sorted(same, key=lambda trial: trial.outcome.seconds if trial.outcome else 0.0)[:1] + ranking[:1]

    def _around(self, trial: Trial) -> Iterator[dict[str, int]]:
        """What differs in one decision, by one step where it is ordered; by more where one step made no difference."""
        ways = {one.step.name: (one.how, len(one.ways)) for one in self.space.removals}
        for decision in self.space.decisions:
            name, now = decision.name, trial.values[decision.name]
            if decision.kind == "categorical":
                for index in range(len(decision.values)):
                    if index != now:
                        yield self.space.canonical({**trial.values, name: index})
                continue
            if now:
                yield self.space.canonical({**trial.values, name: now - 1})
            how, count = ways[name]
            # What begins may begin in any way.
            for way in range(count) if not now else [trial.values.get(how, 0)]:
                for index in range(now + 1, len(decision.values)):
                    values = self.space.canonical({**trial.values, name: index, how: way})
                    yield values
                    found = self.seen.known.get(key(values))
                    if found is None or not same_graph(found, trial.outcome):
                        break

    def _near(self) -> list[Trial]:
        """Cheaper than the best, and only a little too inaccurate: cheapest first."""
        near = [
            t for t in self.seen.before
            if t.outcome is not None and set(t.outcome.missed) == {"accuracy"} and t.outcome.missed["accuracy"] <= NEAR
            and t.outcome.cost < self.seen.least
        ]  # fmt: skip
        return sorted(near, key=cost)

    def _back(self, values: Values) -> Iterator[dict[str, int]]:
        """What may win accuracy back at about the same cost: learning more, other ways of rounding, a little less gone."""
        for decision in self.space.decisions:
            if decision.name not in (BACKEND, FLOATING, ORDER, PRECISION) and decision.kind == "categorical":
                for index in range(values[decision.name] + 1, len(decision.values)):
                    yield self.space.canonical({**values, decision.name: index})
        for decision in self.space.decisions:
            if decision.name == PRECISION:
                for index in range(1, len(decision.values)):
                    yield self.space.canonical({**values, decision.name: index})
            if decision.kind == "ordered" and values[decision.name]:
                yield self.space.canonical({**values, decision.name: values[decision.name] - 1})

    def _sampled(self) -> list[tuple[Values, str]]:
        """What Optuna's sampler proposes, no further than one step beyond what was tried."""
        proposals = self.log.proposals(self.seen.before, str(self.number))
        for proposed in itertools.islice(proposals, TRIES if self.seen.before else 0):
            values = self.seen.step_by_step(self._within_reach(proposed))
            if key(values) not in self.seen.known and not hopeless(values, self.seen) and self.seen.worth(values):
                return [(values, SAMPLED)]
        return []

    def _anything(self) -> Iterator[tuple[Values, str]]:
        """Whatever is left, in random order."""
        draw = random.Random(f"{self.log.seed}:{self.number}")
        left = [values for values in self.space.all() if key(values) not in self.seen.known]
        for values in draw.sample(left, len(left)):
            reached = values == self._within_reach(values) and values == self.seen.step_by_step(values)
            if reached and self.seen.worth(values) and not hopeless(values, self.seen):
                yield values, ANY

    def _within_reach(self, values: Values) -> dict[str, int]:
        """At most one step more of each than any trial took away, and not long learning of what was not learnt before."""
        found = dict(values)
        for decision in self.space.decisions:
            if decision.kind == "ordered":
                tried = max((trial.values[decision.name] for trial in self.seen.before), default=0)
                found[decision.name] = min(found[decision.name], tried + 1)
        if LEARN in found and not any(self.space.learns(trial.values) for trial in self.seen.before):
            found[LEARN] = 0
        return self.space.canonical(found)
