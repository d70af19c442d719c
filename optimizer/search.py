"""The search: which choices are tried, in which order, until the time is up or nothing is left.

In rounds of a few trials. What a round tries (`search_proposals`) follows from the rounds before it, the seed and nothing else,
so that it is the same however many machines share its trials and however often it was killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from perwatt.choices import Space, Values
from perwatt.search_log import Log, Outcome, Trial
from perwatt.search_proposals import Proposals
from perwatt.search_seen import Seen, cost

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
        self.given_up = log.given_up()
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

    def give_up(self, trial: Trial) -> None:
        """No answer any more, now or when the search goes on."""
        self.given_up.add(trial.number)
        self.log.give_up(trial)

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
        return sorted(kept, key=cost)

    def _proposals(self, before: Sequence[Trial], number: int) -> list[tuple[Values, str]]:
        seen = Seen(self.space, before, self.ranking(before), self.estimate, self.max_drop)
        return Proposals(self.log, seen, number).taken()
