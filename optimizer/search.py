"""The search: which choices are tried, in which order, until the time is up or nothing is left.

In rounds of a few trials. What a round tries follows from the rounds before it, the seed and nothing else, so that it is the
same however many machines share its trials and however often it was killed. First every alternative by itself; then, around
the best choice so far, what differs from it in one decision, cheapest promise first; for choices that would be cheaper and
lose a little too much, what may win that back; and one in each round that Optuna's sampler proposes from everything told.

Not tried: what takes away still more than a choice that lost far too much, and more than one step beyond what was tried.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from perwatt.choices import BACKEND, FLOATING, LEARN, ORDER, PRECISION, Space, Values
from perwatt.search_log import Log, Outcome, Trial
from perwatt.search_model import CostModel

ROUND = 4
"""Trials in a round: what is proposed sees the rounds before it only, so more of them learn less from each other."""
NEAR = 1.0
"""A constraint that is missed by at most this share of it may be won back; what misses it by more is given up."""
LEARNING = 1
"""Trials in a round that learn what was not learnt yet: they take minutes, and each makes the next better chosen."""
SAMPLED_FIRST = 4
"""Every so many rounds it is the sampler's proposal that comes first."""
SAME = 1.02
"""What costs no more than this times the least is as good to go on from."""
PROMISING = 1.05
"""What is expected to cost up to this times the best may turn out cheaper."""
TRIES = 8
"""Proposals of the sampler that were tried already before any other is taken."""

ALONE, AROUND, BACK, SAMPLED, ANY = (
    "by itself", "one step from the best", "to win back what was lost", "proposed by the sampler", "not tried yet",
)  # fmt: skip

Evaluate = Callable[[Sequence[Trial], Sequence[Trial]], Iterable[tuple[Trial, Outcome]]]


class Search:
    """Rounds over the choices of `space`. `evaluate(trials, before)` gives the outcome of each as it is known; what it leaves
    out stays to be done. `stop()` says why to end, or nothing; `after_round(best)` is told the best permitted trial so far.
    `estimate`: what a choice will cost ÷ the original, where something is known of it."""

    def __init__(
        self,
        space: Space,
        log: Log,
        evaluate: Evaluate,
        *,
        stop: Callable[[], str | None] = lambda: None,
        after_round: Callable[[Trial | None], None] = lambda best: None,
        estimate: Callable[[Values], float | None] = lambda values: None,
    ) -> None:
        self.space, self.log, self.evaluate = space, log, evaluate
        self.stop, self.after_round, self.estimate = stop, after_round, estimate
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
                return "nothing is left to try"
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
        """The permitted trials, cheapest first."""
        kept = [t for t in trials if t.outcome is not None and t.outcome.permitted and t.number not in self.given_up]
        return sorted(kept, key=_cost)

    # Proposals --------------------------------------------------------------------------------------------------------

    def _proposals(self, before: Sequence[Trial], number: int) -> list[tuple[Values, str]]:
        """What round `number` tries. The same for the same trials before it."""
        known = {_key(trial.values) for trial in before}
        learnt = {(), *(self.space.learning(trial.values) for trial in before)}
        taken: list[tuple[Values, str]] = []
        learning = 0
        for values, why in self._in_turn(before, number):
            key, learns = _key(values), self.space.learning(values)
            if key in known or self._hopeless(values, before) or (learning == LEARNING and learns not in learnt):
                continue
            known.add(key)
            taken.append((values, why))
            learning += learns not in learnt
            learnt.add(learns)
            if len(taken) == ROUND:
                break
        return taken or next(([one] for one in self._anything(before, number)), [])

    def _in_turn(self, before: Sequence[Trial], number: int) -> Iterator[tuple[Values, str]]:
        known = {_key(trial.values) for trial in before}
        alone = [values for values in self._alone() if _key(values) not in known]
        if alone:
            yield from ((values, ALONE) for values in alone)
            return
        worth = self._worth(before)
        around = [(values, AROUND) for trial in self._leading(before) for values in self._around(trial.values, before)]
        back = [(values, BACK) for trial in self._near(before) for values in self._back(trial.values)]
        if number % SAMPLED_FIRST == 0:
            yield from self._sampled(before, number)
        for both in itertools.zip_longest(around, back):
            yield from (one for one in both if one is not None and worth(one[0]))
        yield from self._sampled(before, number)

    def _worth(self, before: Sequence[Trial]) -> Callable[[Values], bool]:
        """Tells whether a choice may be cheaper than the best, going by all that were tried."""
        best, model = self.best(before), CostModel(self.space, before)
        least = _cost(best) if best is not None else float("inf")
        return lambda values: (model.cost(values) or 0.0) < PROMISING * least

    def _leading(self, before: Sequence[Trial]) -> list[Trial]:
        """The best permitted trial, and of those that cost about the same the one that takes least time to make."""
        ranking = self.ranking(before)
        same = [trial for trial in ranking if _cost(trial) <= SAME * _cost(ranking[0])]
        return sorted(same, key=lambda trial: trial.outcome.seconds if trial.outcome else 0.0)[:1] + ranking[:1]

    def _alone(self) -> Iterator[dict[str, int]]:
        """Each backend with each alternative and nothing else, in its own floating precision; then the other precisions."""
        usual = self.space.usual()
        counts = {decision.name: len(decision.values) for decision in self.space.decisions}
        for precision in range(counts.get(PRECISION, 1)):
            for backend in range(counts.get(BACKEND, 1)):
                yield self.space.at_home({**usual, **_only(counts, {BACKEND: backend, PRECISION: precision})})
        for floating in range(counts.get(FLOATING, 1)):
            for backend in range(counts.get(BACKEND, 1)):
                yield self.space.canonical({**usual, **_only(counts, {BACKEND: backend, FLOATING: floating})})

    def _around(self, values: Values, before: Sequence[Trial]) -> list[dict[str, int]]:
        """What differs in one decision: first what takes more away, then other alternatives, then what takes less."""
        more, other, less = [], [], []
        for decision in self.space.decisions:
            now = values[decision.name]
            if decision.kind == "ordered":
                if now + 1 < len(decision.values):
                    more.append({**values, decision.name: now + 1})
                if now:
                    less.append({**values, decision.name: now - 1})
            else:
                other += [{**values, decision.name: i} for i in range(len(decision.values)) if i != now]
        more.sort(key=lambda one: self.estimate(one) or 0.0)
        # Whose other alternatives did well by themselves do well here.
        other.sort(key=lambda one: self._expected(one, before))
        return [self.space.canonical(one) for one in (*more, *other, *less)]

    def _expected(self, values: Values, before: Sequence[Trial]) -> float:
        """The least that a choice with the same alternative, on the same backend, has cost."""
        same = [
            t
            for t in before
            if all(t.values.get(name, 0) == values.get(name, 0) for name in (BACKEND, FLOATING, PRECISION))
        ]
        return min((_cost(t) for t in same), default=0.0)

    def _near(self, before: Sequence[Trial]) -> list[Trial]:
        """Cheaper than the best, and only a little too inaccurate: cheapest first."""
        best = self.best(before)
        least = _cost(best) if best is not None else float("inf")
        near = [
            t for t in before
            if t.outcome is not None and set(t.outcome.missed) == {"accuracy"} and t.outcome.missed["accuracy"] <= NEAR
            and t.outcome.cost < least
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

    def _sampled(self, before: Sequence[Trial], number: int) -> list[tuple[Values, str]]:
        """What Optuna's sampler proposes, no further than one step beyond what was tried."""
        known, worth = {_key(trial.values) for trial in before}, self._worth(before)
        for proposed in itertools.islice(self.log.proposals(before, str(number)), TRIES if before else 0):
            values = self._within_reach(proposed, before)
            if _key(values) not in known and worth(values) and not self._hopeless(values, before):
                return [(values, SAMPLED)]
        return []

    def _anything(self, before: Sequence[Trial], number: int) -> Iterator[tuple[Values, str]]:
        """Whatever is left, in random order."""
        draw = random.Random(f"{self.log.seed}:{number}")
        known = {_key(trial.values) for trial in before}
        left = [values for values in self.space.all() if _key(values) not in known]
        for values in draw.sample(left, len(left)):
            if values == self._within_reach(values, before) and not self._hopeless(values, before):
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

    def _hopeless(self, values: Values, before: Sequence[Trial]) -> bool:
        """Whether a choice that takes away less, and is the same otherwise, lost far too much; or the alternative in it does
        nothing on this backend."""
        if self._idle(values, before):
            return True
        return any(
            trial.outcome is not None
            and trial.outcome.missed.get("accuracy", 0.0) > NEAR
            and self.space.lighter(values, trial.values)
            for trial in before
        )

    def _idle(self, values: Values, before: Sequence[Trial]) -> bool:
        """Whether the alternative by itself was refused there, or left the graph as it was."""
        if not values.get(PRECISION):
            return False
        there = {**self.space.usual(), **_only(values, {BACKEND: values.get(BACKEND, 0)})}
        plain = self.space.at_home(there)
        alone = self.space.at_home({**there, PRECISION: values[PRECISION]})
        if dict(values) == alone:
            return False
        known = {_key(trial.values): trial.outcome for trial in before}
        found, base = known.get(_key(alone)), known.get(_key(plain))
        if found is None:
            return False
        return found.status == "refused" or (
            base is not None and base.digest is not None and found.digest == base.digest
        )


def _key(values: Values) -> tuple[Any, ...]:
    return tuple(sorted(values.items()))


def _cost(trial: Trial) -> float:
    return trial.outcome.cost if trial.outcome is not None else float("inf")


def _only(known: Any, values: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in values.items() if name in known}
