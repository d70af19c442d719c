"""The account of a winner: what each of its passes brings, by measurement, and which of them it can do without.

Two questions for each pass, at the winner's operating point on its backend:

    prefix       what the graph costs after it ÷ before it: from the original on, the shares multiply to the whole gain
    alone out    what the winner costs ÷ the pipeline without this one pass, all others run anew on what is then there

Speed does not depend on the values of weights, so nothing is learnt anew: what stands before a pass that learns is left
out of the pipeline without learning, and compared with the whole of that. What it does to accuracy is then not known.

Passes whose gain can't be told from none, that no other pass needs and that nothing was learnt behind are left out
together. If the model without them is as good, it is what should ship.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from perwatt.accounting_shares import LARGER, SMALLER, Account, Change, Share, less, short, together, verdict
from perwatt.accounting_sides import Graph, Measurements, moved_to
from perwatt.accounting_ways import AloneOut, Way, Ways, learns
from perwatt.artifact import Artifact
from perwatt.bench.statistics import percentile
from perwatt.candidates import Candidate, ratio_text
from perwatt.errors import PerwattError
from perwatt.judging import Judge
from perwatt.measurement import Ratio
from perwatt.measuring import Effort
from perwatt.pipeline import Pipeline
from perwatt.recipe import PassStep
from perwatt.setup import Setup

EFFORT = Effort(min_blocks=12, tight=0.01)
"""For each group of processes."""
PREFIX_UNTIL, ALONE_OUT_UNTIL = 0.4, 0.85
"""Of the time there is: when nothing more is begun of the first question, and of the second."""
CHUNK = 5
"""Pipelines without a pass that are run before they are measured: what there is no time for has cost none."""
LEARNT_AGAIN = "accuracy: it would have to be learnt again"
LATE = "there was no time left to leave it out"


def account(
    candidate: Candidate,
    baseline: Candidate,
    pipeline: Pipeline,
    source: Artifact,
    steps: Sequence[PassStep],
    setup: Setup,
    judge: Judge,
    *,
    effort: Effort = EFFORT,
    deadline: float | None = None,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Account:
    """Account for `candidate`, which `pipeline` made of `source` by `steps`, one for each of its rows; `baseline` is the
    original as it runs best. `deadline`: when nothing more is begun, in `time.monotonic()` seconds.

    The pipeline must be the one that made it, which knows the steps that it took: they are not taken again. What can't be
    run or measured is told, not raised."""
    started = time.monotonic()
    told = Account()
    try:
        ways = Ways(candidate, pipeline, source, steps, deadline)
        if ways.reproduced:
            _Accountant(told, ways, baseline, setup, judge, effort, deadline, progress).measure()
        else:
            told.notes.append("no account: the passes did not lead to the same graph again")
    except PerwattError as error:
        told.notes.append(f"the account is not complete: {error}")
    told.seconds = time.monotonic() - started
    return told


class _Accountant:
    """Measures, and fills in an account."""

    def __init__(
        self, told: Account, ways: Ways, baseline: Candidate, setup: Setup, judge: Judge, effort: Effort,
        deadline: float | None, progress: Callable[[float, str], None],
    ) -> None:  # fmt: skip
        self.told, self.ways, self.judge, self.deadline, self.progress = told, ways, judge, deadline, progress
        self.best = Graph("the original as it runs best", baseline)
        self.winner, self.original = ways.winner.graph, ways.original
        self.started, self.share = time.monotonic(), 0.0
        self.measured = Measurements(setup, judge, effort, deadline, lambda text: progress(self.share, text))
        self.alone_out: dict[str, AloneOut | str] = {}

    def measure(self) -> None:
        """Both questions, then what follows from them."""
        try:
            graphs = [self.best, self.original, *(graph for _, graph in self.ways.points)]
            self.measured.measure(self.winner, graphs, self._until(PREFIX_UNTIL))
            self._leave_out_each(self._until(ALONE_OUT_UNTIL))
        finally:
            # What was measured before something failed is told.
            self._tell()
        self._leave_out_all()

    def _until(self, share: float) -> float | None:
        return None if self.deadline is None else self.started + share * (self.deadline - self.started)

    def _leave_out_each(self, until: float | None) -> None:
        """Run the pipeline without each pass, the quickest first, and measure what comes of it."""
        waiting = sorted(self.ways.winner.applied(), key=self.ways.seconds_without)
        for start in range(0, len(waiting), CHUNK):
            self.share = PREFIX_UNTIL + (ALONE_OUT_UNTIL - PREFIX_UNTIL) * start / len(waiting)
            found = []
            for name in waiting[start : start + CHUNK]:
                self.progress(self.share, f"the winner without {name}")
                left_s = self.measured.seconds_left(until)
                one = LATE if left_s is not None and left_s <= 0 else self.ways.without(name, left_s)
                self.alone_out[name] = one
                found += [] if isinstance(one, str) else [one]
            for base in _bases(found):
                graphs = [one.way.graph for one in found if one.base is base]
                self.measured.measure(base.graph, graphs, until)

    # Telling ----------------------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        """What was measured, as a whole and pass by pass, with a verdict on each."""
        self.told.cost_is = self.measured.basis(self.winner)
        self.told.whole = self._change(self.winner, self.original)
        if self.best.key != self.original.key:
            self.told.point = self._change(self.original, self.best)
        self.told.shares = self._shares()
        for share in self.told.shares:
            found = self.alone_out.get(share.name, LATE)
            if isinstance(found, str):
                share.alone_out = Change(reason=found)
            else:
                share.alone_out = self._with_and_without(found)
                share.needed_by = list(found.lost())
            share.verdict, share.why = verdict(share, learns(share.name), self.told.cost_is, self._unit)
            if not isinstance(found, str) and share.alone_out.cost.value:
                share.droppable = self._may_go(share, found)
                share.why += _besides(found)

    @property
    def _unit(self) -> str:
        return " points" if self.judge.select is not None and self.judge.select.metric.unit == "fraction" else ""

    def _shares(self) -> list[Share]:
        """The change at each point in the order, those of one name together."""
        found: dict[str, list[Change]] = {}
        timed = judged = before = self.original
        skipped: list[str] = []
        for name, graph in self.ways.points:
            # Against the last one that is known, so that the shares multiply to the whole and drops add up to it.
            change = replace(
                self._in_turn(graph, timed), size=_size(graph, before), drop=self.measured.drop(graph, judged)
            )
            if change.cost.value is None:
                skipped.append(name)
            else:
                change = replace(change, reason=f"together with {', '.join(skipped)}") if skipped else change
                timed, skipped = graph, []
            judged = graph if change.drop is not None else judged
            found.setdefault(name, []).append(change)
            before = graph
        rows = [row for row in self.ways.winner.rows if row is not None]
        return [
            Share(
                name, [row.settings for row in rows if row.name == name and row.status == "applied"], together(changes)
            )
            for name, changes in found.items()
        ]

    def _in_turn(self, graph: Graph, before: Graph) -> Change:
        """The cost of a graph ÷ that of one before it, each by way of the winner: quotients of such multiply exactly."""
        ours, theirs = (self.measured.compared(one, self.winner) for one in (graph, before))
        direct = self.measured.compared(graph, before)
        cost = moved_to(direct.cost, _quotient(ours.cost, theirs.cost))
        latency = moved_to(direct.latency, _quotient(ours.latency, theirs.latency))
        return Change(cost, latency, reason=self._missing(graph, before))

    def _with_and_without(self, found: AloneOut) -> Change:
        change = self._change(found.base.graph, found.way.graph)
        if found.learnt or self.judge.select is None:
            return change
        return replace(change, reason="; ".join(filter(None, [change.reason, LEARNT_AGAIN])))

    def _may_go(self, share: Share, found: AloneOut) -> bool:
        """Whether the winner may do without it: it brings nothing, nobody needs it, and nothing has to be learnt again."""
        change = share.alone_out
        if not found.learnt or learns(share.name) or change.cost.low is None:
            return False
        helps = (change.size is not None and change.size < SMALLER) or less(change.latency)
        free = found.same or not share.needed_by
        return share.verdict in ("brings nothing", "costs") and not helps and free

    def _change(self, after: Graph, before: Graph) -> Change:
        two = self.measured.compared(after, before)
        drop, reason = self.measured.drop(after, before), self._missing(after, before)
        return Change(two.cost, two.latency, _size(after, before), drop, reason)

    def _missing(self, *graphs: Graph) -> str | None:
        """Why something of these is not known."""
        found = [self.measured.missing.get(key) for graph in graphs for key in (graph.timed.key, graph.key)]
        return "; ".join(dict.fromkeys(filter(None, found))) or None

    # Without all that brings nothing ------------------------------------------------------------------------------------

    def _leave_out_all(self) -> None:
        """Leave out at once what can go, and decide by measurement whether that is what should ship."""
        told = self.told
        told.droppable = [share.name for share in told.shares if share.droppable]
        if not told.droppable:
            return
        self.share = ALONE_OUT_UNTIL
        self.progress(self.share, "the winner without what brings nothing")
        found = self.ways.without_all(told.droppable, self.measured.seconds_left())
        if isinstance(found, str):
            told.keep(found)
            return
        if not found.same:
            self.measured.measure(self.winner, [found.way.graph])
        told.without_them = self._change(found.way.graph, self.winner)
        problem = None if found.same else self._why_not(found, told.without_them)
        if problem is not None:
            told.keep(problem)
            return
        told.reduced = found.way.branch(self.ways.candidate.branch.judged)
        cost = f"without all of that an inference takes {ratio_text(told.without_them.cost)} the {short(told.cost_is)}"
        told.decision = f"left out: {'the model is the same without it' if found.same else cost}"

    def _why_not(self, found: AloneOut, change: Change) -> str | None:
        """Why the winner is better than what is left without them, or might be; None where it is not."""
        judge, least, cost, graph = self.judge, self.judge.budget.min_gain, change.cost, found.way.graph
        if lost := [f"{name} ({why})" for name, why in found.lost().items()]:
            return f"without all of that nothing comes of {', '.join(lost)}"
        if cost.low is None or cost.high is None:
            return f"the model without all of that was not measured: {change.reason or 'too few windows'}"
        if cost.low > 1 or cost.high > 1 + least:
            might = "save something" if cost.low > 1 else f"may save {least:.0%}"
            takes = f"an inference takes {ratio_text(cost)} the {short(self.told.cost_is)}"
            return f"together they {might}: without all of that {takes}"
        if change.size is not None and change.size > LARGER:
            return f"without all of that weights take {change.size:.2f}× the bytes"
        loss = self.measured.loss(graph)
        if loss is not None and judge.too_much(loss):
            return f"the model without all of that {judge.drop_words(loss)}"
        if change.drop is not None and change.drop.low > 0:
            return f"the model without all of that is {change.drop.drop:.3g}{self._unit} less accurate"
        if judge.budget.size is not None and graph.artifact.size_bytes() > judge.budget.size:
            return "the model without all of that is larger than allowed"
        late = percentile(self.measured.latencies_ms(graph), 0.99)
        return f"the model without all of that is too late: {judge.late_words(late)}" if judge.too_late(late) else None


def _bases(found: Sequence[AloneOut]) -> list[Way]:
    """What pipelines without a pass are compared with, each once."""
    return list({id(one.base): one.base for one in found}.values())


def _size(after: Graph, before: Graph) -> float | None:
    old = before.artifact.size_bytes()
    return after.artifact.size_bytes() / old if old else None


def _quotient(a: Ratio, b: Ratio) -> float | None:
    return a.value / b.value if a.value and b.value else None


def _besides(found: AloneOut) -> str:
    """What else is to be known of a pipeline without a pass."""
    said = "" if found.learnt else "; both measured without what was learnt"
    if found.same:
        return f"{said}; the model is the same without it"
    lost = [f"{name} ({why})" for name, why in found.lost().items()]
    return f"{said}; without it nothing comes of {', '.join(lost)}" if lost else said


__all__ = ["EFFORT", "Account", "Change", "Share", "account"]
