"""A worker of a search on many machines: tries choices as the search itself would, and tells what came of them as plain data.

It reads the same recipe and files as the driver (`cluster`) and opens them in the same way, takes over what the driver found out
already (which backends are worth it, and where the original runs best), and measures its own copy of the original beside every
candidate: ratios are within one machine. Ray needs no part in it: `TrialWorker` is a plain class.

Several may be on one machine: they make graphs side by side, and measure one at a time while nothing is made (`machine_lock`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from perwatt import choices
from perwatt.candidates import Candidate
from perwatt.choices import Space, Values
from perwatt.cluster import facts, from_plain, open_shared_steps
from perwatt.compilation import Work, open_work, resolve_steps
from perwatt.errors import InputError, PerwattError, TargetError
from perwatt.machine_lock import MachineLock
from perwatt.preparation import Prepared
from perwatt.recipe import parse
from perwatt.run_cost import tree_cpu_s
from perwatt.screening import Screening
from perwatt.sides import Side
from perwatt.trials import Trials


class TrialWorker:
    """Tries choices of one search. `order` is what `cluster.Cluster` says of it, as plain data."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        self._order = order
        self._started = time.perf_counter() - order["elapsed_s"]
        self._cpu_s = tree_cpu_s()
        self._cleanup = ExitStack()
        self._trials: Trials | None = None
        # What starts processes on a cluster decides some of these for them.
        for name, value in order["variables"].items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})

    def hello(self) -> dict[str, Any]:
        """Who this is: `cluster.facts`."""
        return facts()

    def outcome(self, values: Values, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Try a choice, knowing the trials of the rounds before: {"outcome"}, with the "files" of the store of steps that hold
        the graphs on the way there, and the "cpu_s" that this worker took so far. {"refused": why} where it can try none."""
        try:
            trials = self._opened()
        except PerwattError as error:
            return {"refused": str(error)}
        with self._lock.shared():
            found = trials.outcome(values, [from_plain(told) for told in before])
        return {"outcome": found.to_json(), "files": self._store.used(), "cpu_s": tree_cpu_s() - self._cpu_s}

    def file(self, name: str) -> bytes | None:
        """The content of a file of the store of steps; None where it is not there any more."""
        return self._store.content(name)

    def close(self) -> None:
        """End what was started."""
        self._cleanup.close()
        self._trials = None

    # The same search as the driver's ------------------------------------------------------------------------------------

    def _opened(self) -> Trials:
        """The model read and the original running; once. Raises PerwattError where that differs from what the driver has."""
        if self._trials is None:
            try:
                # Files that are named lie where they lie from there.
                os.chdir(self._order["folder"])
                self._lock = MachineLock()
            except OSError as error:
                raise InputError(f"{error.filename}: {error.strerror}", fix="share it with every machine") from None
            self._cleanup.callback(self._lock.close)
            with self._lock.shared():
                self._trials = self._made()
        return self._trials

    def _made(self) -> Trials:
        recipe = parse(self._order["recipe"])
        work = self._cleanup.enter_context(
            open_work(recipe, resolve_steps(recipe), Path(), lambda stage, share: None, self._started)
        )
        self._compare(work.prepared)
        self._store = work.store = open_shared_steps(work.folder)
        work.alone = self._lock.alone
        study = work.begun()
        if work.prepared.eager is not None:
            # It has shown that the model is the one that was given, and is in the way from here on.
            work.prepared.eager.close()
        screening = _ScreeningAlone(study.screening, self._lock)
        self._cleanup.callback(screening.close)
        return self._trying(work, screening)

    def _trying(self, work: Work, screening: Screening) -> Trials:
        order, source = self._order, work.prepared.source
        backends = {backend.name: backend for backend in work.prepared.backends}
        missing = [name for name, _ in order["places"] if name not in backends]
        if missing:
            raise TargetError(f"{missing[0]} can't be used there")
        space = self._space(work)
        name, floating = order["baseline"]
        baseline = screening.original(backends[name], floating)
        side = work.setup.open("original", baseline)
        self._cleanup.callback(side.close)
        pipelines = {name: work.pipeline_for(backends[name]) for name in space.places}
        return Trials(
            space, pipelines, backends, source, screening, baseline, side, work.point(), work.recipe.search.objective,
            order["minutes"],
        )  # fmt: skip

    def _space(self, work: Work) -> Space:
        space = choices.space(work.steps, {name: tuple(offered) for name, offered in self._order["places"]})
        if repr(space) != self._order["space"]:
            raise InputError("there is something else to choose from there", fix="the same perwatt on every machine")
        return space

    def _compare(self, prepared: Prepared) -> None:
        """Whether the files are those of the driver. Raises InputError that names the one that is not."""
        if prepared.source.digest() != self._order["model"]:
            raise InputError("the model is another one there", fix="share one copy with every machine")
        for where, digest in self._order["data"].items():
            if prepared.roles.sources.get(where) != digest:
                raise InputError(f"{where} is another one there", fix="share one copy with every machine")


class _ScreeningAlone(Screening):
    """Races with the machine to itself: from when a candidate was judged until it was measured."""

    def __init__(self, other: Screening, lock: MachineLock) -> None:
        super().__init__(other.setup, other.judge, other.source, other.point, other.backends)
        self.quick = True
        self._lock = lock

    def screen(self, candidate: Candidate, baseline: Side) -> None:
        try:
            super().screen(candidate, baseline)
        finally:
            self._lock.end_alone()

    def _judge(self, candidate: Candidate, side: Side) -> None:
        super()._judge(candidate, side)
        # Accuracy is the same whoever else is there; what comes now is not.
        self._lock.take_alone()
