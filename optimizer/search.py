"""The search: which choices are tried, in which order, until the time is up or nothing is left.

In rounds of a few trials. What a round tries follows from the rounds before it, the seed and nothing else, so that it is the
same however many machines share its trials and however often it was killed. First every alternative by itself; then, around
the best choice so far, what differs from it in one decision, cheapest promise first; what is removed is tried untaught, in
seconds, more and more of each, and the cheapest that should lose little enough once taught is taught, in minutes; for choices
that would be cheaper and lose a little too much, what may win that back; and now and then what Optuna's sampler proposes from
everything told.

Not tried: what takes away still more than a choice that lost far too much, and more than one step beyond what was tried.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from perwatt.choices import BACKEND, FLOATING, LEARN, ORDER, PRECISION, ROUNDS, Space, Values
from perwatt.search_log import Log, Outcome, Trial
from perwatt.search_model import Model, Prediction, Teaching

ROUND = 4
"""Trials in a round: what is proposed sees the rounds before it only, so more of them learn less from each other."""
NEAR = 1.0
"""A constraint that is missed by at most this share of it may be won back; what misses it by more is given up."""
LEARNING = 1
"""Trials in a round that learn what was not learnt yet: each makes the next better chosen."""
SAMPLED_FIRST = 4
"""Every so many rounds it is the sampler's proposal that comes first."""
SAME = 1.02
"""What costs no more than this times the least is as good to go on from."""
ELSEWHERE, FORESEEN = 1.5, 1.2
"""The same for an alternative on another backend, where it may bring more than on the first; where the plan measured it."""
SLACK = 1.3
"""What is expected to lose up to this times what may be lost may turn out to lose less."""
PROMISING = 1.05
"""What is expected to cost up to this times the best may turn out cheaper."""
EXPLORED = 4
"""Trials in a row that were taken at random and brought nothing: then it is over."""
TRIES = 8
"""Proposals of the sampler that were tried already before any other is taken."""

ALONE, LADDER, AROUND, TAUGHT, BACK, SAMPLED, ANY = (
    "by itself", "how far it may go", "one step from the best", "to be taught", "to win back what was lost",
    "proposed by the sampler", "not tried yet",
)  # fmt: skip

Evaluate = Callable[[Sequence[Trial], Sequence[Trial]], Iterable[tuple[Trial, Outcome]]]


class Search:
    """Rounds over the choices of `space`. `evaluate(trials, before)` gives the outcome of each as it is known; what it leaves
    out stays to be done. `stop()` says why to end, or nothing; `after_round(best)` is told the best permitted trial so far.
    `estimate`: what a choice will cost ÷ the original, where something is known of it. `max_drop`: the accuracy
    that may be lost, in the unit of drops; None where there is none to judge."""

    def __init__(
        self,
        space: Space,
        log: Log,
        evaluate: Evaluate,
        *,
        stop: Callable[[], str | None] = lambda: None,
        after_round: Callable[[Trial | None], None] = lambda best: None,
        estimate: Callable[[Values], float | None] = lambda values: None,
        max_drop: float | None = None,
    ) -> None:
        self.space, self.log, self.evaluate = space, log, evaluate
        self.stop, self.after_round, self.estimate, self.max_drop = stop, after_round, estimate, max_drop
        self.given_up: set[int] = set()
        """Numbers of trials that turned out not to hold when they were measured again."""

    def run(self) -> str:
        """Search until something says stop; returns why it ended. Goes on where the log ends."""
        trials = self.log.trials()
        number = max((trial.round for trial in trials), default=0)
        while True:
            before = [trial for trial in trials if trial.round < number]
            asked = [trial for trial in trials if trial.round == number]
            for values, why in self._proposals(before, number)[len(asked) :]:
                asked.append(self.log.ask(values, why, number))
            if not asked:
                return "nothing that is left promises more"
            left = [trial for trial in asked if trial.outcome is None]
            told = {trial.number: self.log.tell(trial, outcome) for trial, outcome in self.evaluate(left, before)}
            trials = [*before, *(told.get(trial.number, trial) for trial in asked)]
            self.after_round(self.best(trials))
            over = self.stop()
            if over is not None:
                return over
            if any(trial.outcome is None for trial in trials):
                return "there is no time for what is left to try"
            number += 1

    def best(self, trials: Sequence[Trial] | None = None) -> Trial | None:
        """The cheapest trial that misses no constraint, as far as trials tell."""
        return next(iter(self.ranking(self.log.told() if trials is None else trials)), None)

    def ranking(self, trials: Sequence[Trial]) -> list[Trial]:
        """The permitted trials, cheapest first. Of those of one round that came to the same graph the first stands for all: that
        another was measured to cost less is chance."""
        graphs: set[str] = set()
        kept = []
        for trial in sorted(trials, key=lambda trial: trial.number):
            found = trial.outcome
            if found is None or found.digest in graphs:
                continue
            graphs |= {found.digest} if found.digest is not None else set()
            if found.permitted and trial.number not in self.given_up:
                kept.append(trial)
        return sorted(kept, key=_cost)

    # Proposals --------------------------------------------------------------------------------------------------------

    def _proposals(self, before: Sequence[Trial], number: int) -> list[tuple[Values, str]]:
        """What round `number` tries. The same for the same trials before it."""
        seen = Seen(self, before)
        known = set(seen.known)
        learnt = {(), *(self.space.learning(trial.values) for trial in before)}
        # What learns takes minutes, so that one of them is enough to go on from; the rest is found out in seconds.
        slow: list[tuple[Values, str]] = []
        quick: list[tuple[Values, str]] = []
        for proposed, why in self._in_turn(seen, number):
            values = seen.step_by_step(proposed)
            several = quick if self.space.learning(values) in learnt else slow
            most = LEARNING if several is slow else ROUND
            if _key(values) in known or len(several) == most or self._hopeless(values, seen):
                continue
            known.add(_key(values))
            several.append((values, why))
            if len(slow) + len(quick) == LEARNING + ROUND:
                break
        taken = [*slow, *quick][:ROUND]
        if taken or self._explored(before):
            return taken
        return next(([one] for one in self._anything(seen, number)), [])

    def _explored(self, before: Sequence[Trial]) -> bool:
        """Whether the last trials were taken for want of anything better, and none of them was: what goes on costs energy."""
        last = sorted(before, key=lambda trial: trial.number)[-EXPLORED:]
        best = self.best(before)
        return len(last) == EXPLORED and all(trial.why == ANY and trial is not best for trial in last)

    def _in_turn(self, seen: Seen, number: int) -> Iterator[tuple[Values, str]]:
        for several in (self._plain(), self._here(seen), self._elsewhere(seen)):
            alone = [values for values in several if _key(values) not in seen.known]
            if alone:
                yield from ((values, ALONE) for values in alone)
                return
        steps = [values for values in self._ladders(seen) if not self._hopeless(values, seen)]
        if steps:
            yield from ((values, LADDER) for values in steps)
            return
        # What is proposed by chance costs minutes to learn: first what one step brings is learnt.
        if number % SAMPLED_FIRST == 0 and self._has_learnt(seen.before):
            yield from self._sampled(seen, number)
        around = [(values, AROUND) for trial in self._leading(seen.before) for values in self._around(trial, seen)]
        back = [(values, BACK) for trial in self._near(seen) for values in self._back(trial.values)]
        taught = [(values, TAUGHT) for values in self._taught(seen)]
        proposed = [(values, why) for values, why in (*around, *back, *taught) if seen.worth(values)]
        yield from sorted(proposed, key=lambda one: seen.promise(one[0]))
        yield from self._sampled(seen, number)

    def _plain(self) -> list[dict[str, int]]:
        """The lossless passes on every backend in every floating precision, each backend's own first."""
        usual, backends = self.space.usual(), range(self._count(BACKEND))
        own = [self.space.at_home(self._with(usual, BACKEND, backend)) for backend in backends]
        floating = [
            self.space.canonical(self._with(self._with(usual, BACKEND, backend), FLOATING, index))
            for backend in backends for index in range(self._count(FLOATING))
        ]  # fmt: skip
        return [*own, *floating]

    def _here(self, seen: Seen) -> list[dict[str, int]]:
        """Each alternative by itself on the backend that the lossless passes run best on."""
        return self._alternatives(self._home(seen))

    def _elsewhere(self, seen: Seen) -> Iterator[Values]:
        """Of the alternatives on each other backend the one that is best at home; the next where that came near, and so on."""

        def told(values: Values) -> float:
            found = seen.known.get(_key(values))
            return math.inf if found is None else found.cost

        home = self._home(seen)
        for backend in range(self._count(BACKEND)):
            there = sorted(
                filter(seen.elsewhere, self._alternatives(backend) if backend != home else []),
                key=lambda values: told(self.space.at_home(self._with(values, BACKEND, home))),
            )
            for values in there:
                yield values
                if not told(values) < FORESEEN * seen.least:
                    break

    def _home(self, seen: Seen) -> int:
        """The backend that the lossless passes cost least on."""
        costs = {values.get(BACKEND, 0): math.inf for values in self._plain()}
        for values in self._plain():
            found, backend = seen.known.get(_key(values)), values.get(BACKEND, 0)
            if found is not None and found.permitted:
                costs[backend] = min(costs[backend], found.cost)
        return min(costs, key=lambda backend: costs[backend])

    def _alternatives(self, backend: int) -> list[dict[str, int]]:
        """Each by itself there."""
        there = self._with(self.space.usual(), BACKEND, backend)
        return [self.space.at_home({**there, PRECISION: index}) for index in range(1, self._count(PRECISION))]

    def _count(self, name: str) -> int:
        """How many values a decision has; one where there is nothing to decide."""
        return next((len(decision.values) for decision in self.space.decisions if decision.name == name), 1)

    def _with(self, values: Values, name: str, index: int) -> dict[str, int]:
        """Another value of a decision, where it is one."""
        return {**values, name: index} if name in values else dict(values)

    def _ladders(self, seen: Seen) -> Iterator[dict[str, int]]:
        """Of each removal by itself, and each way to do it, the next step up: what each costs and loses untaught is known in
        seconds, and says which are worth minutes. As long as what a step lost may be taught back."""
        best = self.best(seen.before)
        if best is None:
            return
        removals = [one for one in self.space.removals if self.space.ordered(one.step.name)]
        none = dict.fromkeys([*(one.step.name for one in removals), LEARN, *self._tuned()], 0)
        base = {name: value for name, value in {**best.values, **none}.items() if name in best.values}
        for one in removals:
            for way in range(len(one.ways)):
                values = self._next_step(base, one.step.name, {one.how: way}, len(one.options), seen)
                yield from [] if values is None else [values]

    def _next_step(self, base: Values, name: str, how: Values, most: int, seen: Seen) -> dict[str, int] | None:
        """One step further than was tried; None where that is no use any more."""
        changed: set[str | None] = set()
        for index in range(1, most + 1):
            values = self.space.canonical({**base, name: index, **how})
            found = [trial for trial in seen.before if self._same_removals(trial.values, values)]
            if not found:
                return values
            digests = {trial.outcome.digest for trial in found if trial.outcome is not None}
            # What loses more than teaching gives back, or goes no further than the step before it, has come to its end.
            if all(seen.loses(trial.values) > SLACK for trial in found) or digests & changed - {None}:
                return None
            changed = digests if self._changes(found, name, seen) else set()
        return None

    def _changes(self, several: Sequence[Trial], name: str, seen: Seen) -> bool:
        """Whether a removal in these made any difference, as far as is known."""
        without = [seen.known.get(_key(self.space.canonical({**trial.values, name: 0}))) for trial in several]
        pairs = zip(several, without, strict=True)
        return not any(trial.outcome is not None and _same_graph(trial.outcome, other) for trial, other in pairs)

    def _same_removals(self, values: Values, other: Values) -> bool:
        """Whether the same is removed on the same backend, and not taught."""
        names = [BACKEND, LEARN, *(name for one in self.space.removals for name in (one.step.name, one.how))]
        return all(values.get(name) == other.get(name) for name in names)

    def _tuned(self) -> list[str]:
        """The decision whether rounding is taught, where there is one."""
        return [self.space.tuning.name] if self.space.tuning is not None else []

    def _taught(self, seen: Seen) -> Iterator[dict[str, int]]:
        """What was only tried untaught, would be cheaper than the best, and should lose little enough once taught: taught, and
        with still more taken away. Where there is none, that which should lose least."""
        if self.space.mending is None:
            return
        untaught = [
            trial for trial in seen.before
            if trial.outcome is not None and seen.cost(trial) < seen.least and self.space.removes(trial.values)
            and self.space.untaught(trial.values) == dict(trial.values) and set(trial.outcome.missed) <= {"accuracy"}
        ]  # fmt: skip
        most = len(ROUNDS)
        hopeful = [trial for trial in untaught if seen.loses(self._learning(trial, most)) <= SLACK]
        least = min(untaught, key=lambda trial: seen.loses(self._learning(trial, most)), default=None)
        for trial in sorted(hopeful or ([least] if least is not None else []), key=seen.cost):
            yield from (values for values in self._around(trial, seen) if self._takes_more(values, trial.values))
            yield from (self._learning(trial, rounds) for rounds in range(1, most + 1))

    def _learning(self, trial: Trial, rounds: int) -> dict[str, int]:
        return self.space.canonical({**trial.values, LEARN: rounds})

    def _takes_more(self, values: Values, other: Values) -> bool:
        """Whether more is taken away, and everything else is the same."""
        amounts = [one.step.name for one in self.space.removals]
        hows = [name for one in self.space.removals for name in (one.step.name, one.how, ORDER)]
        same = all(values[name] == other[name] for name in values if name not in hows)
        return same and sum(values[name] for name in amounts) > sum(other[name] for name in amounts)

    def _has_learnt(self, before: Sequence[Trial]) -> bool:
        """Whether what pays of that which has to be learnt is known: a trial that learns is the best, or several were told."""
        best = self.best(before)
        told = [trial for trial in before if self.space.learns(trial.values)]
        nothing = self.space.mending is None and self.space.tuning is None
        return nothing or (best is not None and best in told) or len(told) >= SAMPLED_FIRST

    def _leading(self, before: Sequence[Trial]) -> list[Trial]:
        """The best permitted trial, and of those that cost about the same the one that takes least time to make."""
        ranking = self.ranking(before)
        same = [trial for trial in ranking if _cost(trial) <= SAME * _cost(ranking[0])]
        return sorted(same, key=lambda trial: trial.outcome.seconds if trial.outcome else 0.0)[:1] + ranking[:1]

    def _around(self, trial: Trial, seen: Seen) -> Iterator[dict[str, int]]:
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
                    found = seen.known.get(_key(values))
                    if found is None or not _same_graph(found, trial.outcome):
                        break

    def _near(self, seen: Seen) -> list[Trial]:
        """Cheaper than the best, and only a little too inaccurate: cheapest first."""
        near = [
            t for t in seen.before
            if t.outcome is not None and set(t.outcome.missed) == {"accuracy"} and t.outcome.missed["accuracy"] <= NEAR
            and t.outcome.cost < seen.least
        ]  # fmt: skip
        return sorted(near, key=_cost)

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

    def _sampled(self, seen: Seen, number: int) -> list[tuple[Values, str]]:
        """What Optuna's sampler proposes, no further than one step beyond what was tried."""
        for proposed in itertools.islice(self.log.proposals(seen.before, str(number)), TRIES if seen.before else 0):
            values = seen.step_by_step(self._within_reach(proposed, seen.before))
            if _key(values) not in seen.known and not self._hopeless(values, seen) and seen.worth(values):
                return [(values, SAMPLED)]
        return []

    def _anything(self, seen: Seen, number: int) -> Iterator[tuple[Values, str]]:
        """Whatever is left, in random order."""
        draw = random.Random(f"{self.log.seed}:{number}")
        left = [values for values in self.space.all() if _key(values) not in seen.known]
        for values in draw.sample(left, len(left)):
            reached = values == self._within_reach(values, seen.before) and values == seen.step_by_step(values)
            if reached and seen.worth(values) and not self._hopeless(values, seen):
                yield values, ANY

    def _within_reach(self, values: Values, before: Sequence[Trial]) -> dict[str, int]:
        """At most one step more of each than any trial took away, and not long learning of what was not learnt before."""
        found = dict(values)
        for decision in self.space.decisions:
            if decision.kind == "ordered":
                tried = max((trial.values[decision.name] for trial in before), default=0)
                found[decision.name] = min(found[decision.name], tried + 1)
        if LEARN in found and not any(self.space.learns(trial.values) for trial in before):
            found[LEARN] = 0
        return self.space.canonical(found)

    def _hopeless(self, values: Values, seen: Seen) -> bool:
        """Whether a choice that takes away less, and is the same otherwise, lost far too much; or something in it does nothing on
        this backend."""
        if self._idle(values, seen) or self._unproved(values, seen) or self._removes_nothing(values, seen):
            return True
        if self._tunes_what_is_untaught(values) or self._was_taught_enough(values, seen):
            return True
        return any(seen.far(trial) and self.space.lighter(values, trial.values) for trial in seen.before)

    def _tunes_what_is_untaught(self, values: Values) -> bool:
        """Whether rounding is taught where what was removed is not: that is minutes for the smaller part."""
        tuned = self.space.tuning is not None and values[self.space.tuning.name]
        return bool(tuned) and self.space.mending is not None and self.space.removes(values) and not values[LEARN]

    def _was_taught_enough(self, values: Values, seen: Seen) -> bool:
        """Whether the same choice that learns less is permitted, as values of weights cost no time; or has learnt nothing."""
        for name in (LEARN, *self._tuned()):
            fewer = [
                seen.known.get(_key(self.space.canonical({**values, name: rounds})))
                for rounds in reversed(range(values.get(name, 0)))
            ]
            if fewer and fewer[0] is not None and fewer[0].permitted:
                return True
            # Where a round brought nothing, the next one will not.
            if len(fewer) > 1 and fewer[0] is not None and fewer[1] is not None and _same_graph(fewer[0], fewer[1]):
                return True
        return False

    def _removes_nothing(self, values: Values, seen: Seen) -> bool:
        """Whether a removal in it was tried on this backend, and left the graph as it was."""
        for one in self.space.removals:
            alike = [name for name in (BACKEND, one.step.name, one.how) if name in values]
            for trial in seen.before if values[one.step.name] else ():
                if all(trial.values[name] == values[name] for name in alike) and trial.outcome is not None:
                    without = seen.known.get(_key(self.space.canonical({**trial.values, one.step.name: 0})))
                    if without is not None and _same_graph(without, trial.outcome):
                        return True
        return False

    def _unproved(self, values: Values, seen: Seen) -> bool:
        """Whether it has an alternative that by itself was not worth a trial on its backend."""
        if not values.get(PRECISION):
            return False
        only = {name: values[name] for name in (BACKEND, PRECISION) if name in values}
        alone = self.space.at_home({**self.space.usual(), **only})
        return dict(values) != alone and _key(alone) not in seen.known

    def _idle(self, values: Values, seen: Seen) -> bool:
        """Whether the alternative by itself was refused there, or left the graph as it was."""
        if not values.get(PRECISION):
            return False
        there = {**self.space.usual(), **_only(values, {BACKEND: values.get(BACKEND, 0)})}
        plain = self.space.at_home(there)
        alone = self.space.at_home({**there, PRECISION: values[PRECISION]})
        if dict(values) == alone:
            return False
        found, base = seen.known.get(_key(alone)), seen.known.get(_key(plain))
        if found is None:
            return False
        return found.status == "refused" or (
            base is not None and base.digest is not None and found.digest == base.digest
        )


class Seen:
    """The trials before a round, and what they let expect of others."""

    def __init__(self, search: Search, before: Sequence[Trial]) -> None:
        self.before, self.space, self.estimate = before, search.space, search.estimate
        self.most = max(search.max_drop, 0.1) if search.max_drop is not None else None
        self.known = {_key(trial.values): trial.outcome for trial in before if trial.outcome is not None}
        self.least = _least(search.best(before))
        self.model = Model(self.space, before)
        self.costs = {key: outcome.cost for key, outcome in self.known.items()}
        """Of what was tried, with what is chance taken out; infinite where it was not measured."""
        self.costs.update({_key(trial.values): self.model.smoothed(trial) for trial in self.model.known})
        self.teaching = Teaching(self.space, before, self.most or 0.1)

    def step_by_step(self, values: Values) -> dict[str, int]:
        """The choice; or what should be tried before it: what is removed untaught, which takes seconds; taught for less, where
        longer learning goes on; with rounding that was not taught."""
        rounds = values.get(LEARN, 0)
        before = [{**values, LEARN: less} for less in range(rounds)] + [dict(values)]
        if self.space.tuning is not None and rounds:
            before = [{**one, self.space.tuning.name: 0} for one in before]
        unknown = (one for one in map(self.space.canonical, before) if _key(one) not in self.known)
        return next(unknown, dict(values)) if LEARN in values else dict(values)

    def elsewhere(self, values: Values) -> bool:
        """Whether an alternative on another backend may be worth it: by its plan's measurements there, else by what it brings
        here."""
        foreseen = self.estimate(values)
        return self.worth(values, ELSEWHERE) if foreseen is None else foreseen < FORESEEN * self.least

    def worth(self, values: Values, times: float = PROMISING) -> bool:
        """Whether a choice may be cheaper than so many `times` the least and lose little enough, going by what was tried."""
        expected = self.model.predict(values)
        if expected is None or self._cost(values, expected) >= times * self.least:
            return expected is None
        # Of what was never tried nobody knows what it wins back.
        return expected.new or self.loses(values) <= SLACK or self._should_be_tried(values)

    def promise(self, values: Values) -> tuple[bool, float]:
        """What sorts proposals: those that are expected to lose little enough first, the cheapest of them first."""
        expected = self.model.predict(values)
        return self.loses(values) > 1.0, 0.0 if expected is None else self._cost(values, expected)

    def loses(self, values: Values) -> float:
        """The drop, as a share of what may be lost; of what may be taught, once it was."""
        expected = self.model.predict(values)
        drop = None if expected is None else expected.drop
        rounds = values.get(LEARN, 0)
        if self.space.mending is not None and self.space.removes(values):
            untaught = self.known.get(_key(self.space.untaught(values)))
            if _key(values) not in self.known and untaught is not None and untaught.drop is not None:
                drop = untaught.drop * self.teaching.left(rounds)
            elif not rounds and drop is not None:
                drop *= self.teaching.left(len(ROUNDS))
        return 0.0 if drop is None or self.most is None else drop / self.most

    def cost(self, trial: Trial) -> float:
        """Of a trial, with what is chance taken out; infinite where it was not measured."""
        return self.costs[_key(trial.values)]

    def far(self, trial: Trial) -> bool:
        """Whether a trial lost so much too much that taking more away is hopeless."""
        if trial.outcome is None or "accuracy" not in trial.outcome.missed:
            return False
        untaught = (
            not trial.values.get(LEARN, 0) and self.space.mending is not None and self.space.removes(trial.values)
        )
        if untaught and trial.outcome.drop is not None and self.most is not None:
            return trial.outcome.drop * self.teaching.left(len(ROUNDS)) > (1 + NEAR) * self.most
        return trial.outcome.missed["accuracy"] > NEAR

    def _should_be_tried(self, values: Values) -> bool:
        """Whether it is the first to be taught: what teaching wins back was only guessed so far."""
        return bool(values.get(LEARN, 0)) and not any(trial.values.get(LEARN, 0) for trial in self.before)

    def _cost(self, values: Values, expected: Prediction) -> float:
        untaught = self.costs.get(_key(self.space.untaught(values)))
        if untaught is not None and math.isfinite(untaught) and values.get(LEARN, 0):
            # Values of weights cost no time.
            return untaught
        estimate = self.estimate(values) if expected.new else None
        return expected.cost if estimate is None else estimate


def _key(values: Values) -> tuple[Any, ...]:
    return tuple(sorted(values.items()))


def _same_graph(one: Outcome, other: Outcome | None) -> bool:
    """Whether both came to the same program."""
    return other is not None and one.digest is not None and one.digest == other.digest


def _least(best: Trial | None) -> float:
    """What the best so far costs; infinite where there is none."""
    return _cost(best) if best is not None else float("inf")


def _cost(trial: Trial) -> float:
    return trial.outcome.cost if trial.outcome is not None else float("inf")


def _only(known: Any, values: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in values.items() if name in known}
