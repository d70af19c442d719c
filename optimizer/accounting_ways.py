"""The pipeline of a winner, run with and without some of its steps.

Steps that the pipeline took before are not taken again, and none that learns ever is: where something that stands before
such a pass is left out, learning is left out too, and what it is compared with is the whole pipeline without learning.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

from perwatt import registry
from perwatt.accounting_sides import Graph
from perwatt.artifact import Artifact, graphs_of
from perwatt.candidates import Branch, Candidate, fitted
from perwatt.pipeline import OUT_OF_TIME, Pipeline, Row
from perwatt.recipe import PassStep

NOTHING: AbstractSet[int] = frozenset()


@dataclass(frozen=True)
class Way:
    """A pipeline that was run: the graph that it led to, the artifact after each step, and the rows (None: left out)."""

    graph: Graph
    artifacts: tuple[Artifact, ...]
    rows: tuple[Row | None, ...]

    def applied(self) -> list[str]:
        """Names of the passes that changed something, each once."""
        return list(dict.fromkeys(row.name for row in self.rows if row is not None and did(row)))

    def branch(self, judged: bool) -> Branch:
        """What a candidate is made of."""
        rows = tuple(row for row in self.rows if row is not None)
        lossy = [row for row in rows if registry.pass_class(row.name).tolerance is None]
        for row in lossy:
            # The ledger fills in what was measured of it.
            row.measured = {} if row.measured is None else row.measured
        return Branch(self.graph.artifact, rows, any(did(row) for row in lossy), judged)


@dataclass(frozen=True)
class AloneOut:
    """A pipeline without some passes, and what it is compared with: the same pipeline with them. `learnt`: both with what
    was learnt."""

    names: Sequence[str]
    way: Way
    base: Way
    learnt: bool = True

    @property
    def same(self) -> bool:
        """Whether the model is the same without them."""
        return self.way.graph.key == self.base.graph.key

    def lost(self) -> dict[str, str]:
        """Other passes that change something with them and nothing without them; why not."""
        gone = set(self.base.applied()) - set(self.way.applied()) - set(self.names)
        rows = [row for row in self.way.rows if row is not None and row.name in gone]
        return {row.name: row.reason or row.status for row in rows}


class Ways:
    """All ways that an account asks for. `pipeline` is the one that made `candidate` of `source` by `steps`, one for each of
    its rows; `deadline`: when no further step is begun."""

    def __init__(
        self,
        candidate: Candidate,
        pipeline: Pipeline,
        source: Artifact,
        steps: Sequence[PassStep],
        deadline: float | None,
    ) -> None:
        self.candidate, self.source = candidate, source
        rows = zip(steps, candidate.branch.rows, strict=True)
        # What had no effect needs no account; what had no time is not to be run now.
        self.steps = [step for step, row in rows if row.reason != OUT_OF_TIME and (did(row) or not learns(step.name))]
        self.learning = frozenset(index for index, step in enumerate(self.steps) if learns(step.name))
        self.original = self._graph("the original", source)
        self._pipeline = _ending(pipeline, deadline)
        self._untaught: Way | str | None = None
        # Every step of it is known.
        self.winner = self._run("the winner", NOTHING, True, _ending(pipeline, None))
        self.points = self._points()
        if self.points:
            self.winner = replace(self.winner, graph=self.points[-1][1])

    @property
    def reproduced(self) -> bool:
        """Whether the steps led to the same graph again."""
        return self.winner.graph.artifact.digest() == self.candidate.branch.artifact.digest()

    def _points(self) -> list[tuple[str, Graph]]:
        """The name of each pass that changed something, with the graph after it."""
        points: list[tuple[str, Graph]] = []
        before = self.original
        for artifact, row in zip(self.winner.artifacts, self.winner.rows, strict=True):
            if row is not None and did(row):
                twin = before if learns(row.name) and alike(artifact, before.artifact) else None
                before = replace(self._graph(f"after {row.name}", artifact), twin=twin)
                points.append((row.name, before))
        return points

    # Without some ---------------------------------------------------------------------------------------------------------

    def without(self, name: str, left_s: float | None) -> AloneOut | str:
        """The pipeline without a pass, or why there is none; `left_s` seconds may be spent on it."""
        gone = self._rows_of(name)
        learnt = not self._teaches_behind(gone)
        base = self.winner if learnt else self._whole_untaught(left_s)
        if isinstance(base, str):
            return base
        way = self._in_time(f"without {name}", gone if learnt else gone | self.learning, learnt, left_s)
        if isinstance(way, str):
            return way
        if gone <= self.learning and alike(way.graph.artifact, base.graph.artifact):
            way = replace(way, graph=replace(way.graph, twin=base.graph))
        return AloneOut([name], way, base, learnt)

    def without_all(self, names: Sequence[str], left_s: float | None) -> AloneOut | str:
        """The pipeline without several passes that nothing is learnt behind."""
        gone = frozenset().union(*(self._rows_of(name) for name in names))
        way = self._in_time("without what brings nothing", gone, True, left_s)
        return way if isinstance(way, str) else AloneOut(names, way, self.winner)

    def seconds_without(self, name: str) -> float:
        """About how long the rest of the pipeline takes without a pass: as long as it took with it."""
        gone = self._rows_of(name)
        return self._seconds(gone | self.learning if self._teaches_behind(gone) else gone)

    def _whole_untaught(self, left_s: float | None) -> Way | str:
        """The whole pipeline but for what learns."""
        if self._untaught is None or isinstance(self._untaught, str):
            self._untaught = self._in_time("without learning", self.learning, False, left_s)
        return self._untaught

    def _rows_of(self, name: str) -> frozenset[int]:
        """The steps of a pass from the first on that changed something: those before it are not missed."""
        rows = [index for index, step in enumerate(self.steps) if step.name == name]
        first = next(index for index in rows if (row := self.winner.rows[index]) is not None and did(row))
        return frozenset(index for index in rows if index >= first)

    def _teaches_behind(self, gone: AbstractSet[int]) -> bool:
        """Whether another step learns from what these made."""
        return any(index > min(gone) for index in self.learning - gone)

    def _seconds(self, gone: AbstractSet[int]) -> float:
        rows = enumerate(self.winner.rows)
        return sum(row.seconds for index, row in rows if row is not None and index > min(gone) and index not in gone)

    def _in_time(self, label: str, gone: AbstractSet[int], judged: bool, left_s: float | None) -> Way | str:
        seconds = self._seconds(gone)
        if left_s is not None and seconds > left_s:
            return f"the passes behind it would take {seconds:.0f} s again, which there was no time for"
        way = self._run(label, gone, judged, self._pipeline)
        late = any(row is not None and row.reason == OUT_OF_TIME for row in way.rows)
        return "there was no time to run the passes behind it again" if late else way

    def _run(self, label: str, gone: AbstractSet[int], judged: bool, pipeline: Pipeline) -> Way:
        artifact = self.source
        artifacts, rows = list[Artifact](), list[Row | None]()
        for index, step in enumerate(self.steps):
            row = None
            if index not in gone:
                artifact, row = pipeline.step(artifact, registry.bind(step))
            artifacts.append(artifact)
            rows.append(row)
        return Way(self._graph(label, artifact, judged), tuple(artifacts), tuple(rows))

    def _graph(self, label: str, artifact: Artifact, judged: bool = True) -> Graph:
        """A graph as the winner runs."""
        point = fitted(self.candidate.point, artifact)
        return Graph(label, Candidate(Branch(artifact), point, self.candidate.backend), judged)


def did(row: Row) -> bool:
    """Whether a pass changed something."""
    return row.status == "applied"


def learns(name: str) -> bool:
    """Whether a pass learns."""
    return registry.pass_class(name).mends


def alike(a: Artifact, b: Artifact) -> bool:
    """Whether two models differ in the values of weights only: the same operators in order, on weights of the same shapes."""
    return list(_operators(a)) == list(_operators(b))


def _operators(artifact: Artifact) -> Iterator[Any]:
    for graph in graphs_of(artifact.model):
        for node in graph:
            stored = [v.const_value for v in node.inputs if v is not None and v.const_value is not None]
            yield node.op_type, [(str(tensor.dtype), str(tensor.shape)) for tensor in stored]


def _ending(pipeline: Pipeline, deadline: float | None) -> Pipeline:
    """The same pipeline, with all that it knows, with another deadline."""
    twin = copy.copy(pipeline)
    twin.context = replace(pipeline.context, deadline=deadline)
    return twin
