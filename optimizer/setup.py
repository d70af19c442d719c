"""`Setup`: how the programs of one study are opened and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from perwatt.candidates import Candidate
from perwatt.isolation import Worker
from perwatt.measuring import Conductor
from perwatt.sides import Side


@dataclass
class Setup:
    """`timing` has the samples that load is made of, `folder` takes scratch files; `worker` starts a process where the
    programs run, under the name that it is given."""

    folder: Path
    timing: Path
    conductor: Conductor = field(default_factory=Conductor)
    worker: Callable[[str], Worker] = Worker

    def open(self, label: str, candidate: Candidate, worker: Worker | None = None) -> Side:
        """Lower a candidate in a process of its own, or in `worker`, whose last program makes room for it.

        Raises BackendError where the backend refuses it."""
        artifact, point = candidate.branch.artifact, candidate.point
        return Side.lowered(label, candidate.backend.name, artifact, point, self.folder, worker or self.worker(label))
