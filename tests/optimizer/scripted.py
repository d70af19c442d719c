"""A study on scripted sides: nothing is run or measured, every cost and every answer is made up by a test."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from perwatt import metrics, setup
from perwatt.artifact import Artifact
from perwatt.backends import Backend
from perwatt.candidates import Branch
from perwatt.contract import Capabilities, OperatingPoint
from perwatt.data import Samples
from perwatt.errors import BackendError
from perwatt.evaluation import Evaluation
from perwatt.isolation import Worker
from perwatt.judging import Judge
from perwatt.measurement import Window
from perwatt.measuring import Effort
from perwatt.pipeline import Row
from perwatt.recipe import Budget
from perwatt.screening import Screening
from perwatt.setup import Setup
from perwatt.study import Result, Study
from perwatt.tuning import TunePlan

sys.path.insert(0, str(Path(__file__).parent))
from runs import conv_net

CHOSEN_ON, JUDGED_ON = 200, 400
SINGLE = ("original", "original at the same point", "optimized", "tuning")
"""Labels of the sides that have a process of their own."""
NOISE = (1.0, 1.002, 0.999, 1.001, 0.998, 1.0005)


@dataclass(frozen=True)
class Play:
    """What a program is scripted to do. `final_ms` is its cost when it is measured again; `lost` are shares of samples
    that it gets wrong and the original right, on those it is chosen on and on all; `other_share` of the machine is used
    by other processes meanwhile."""

    cost_ms: float = 1.0
    final_ms: float | None = None
    wall_ms: float | None = None
    p99_ms: float | None = None
    lost: tuple[float, float] = (0.0, 0.0)
    memory_bytes: int | None = None
    other_share: float | None = None
    crash: str = ""


class ScriptedWorker:
    """Answers `predict` with the script's classes."""

    running = True

    def __init__(self, side: ScriptedSide) -> None:
        self.side = side

    def call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        assert operation == "predict"
        chosen = Path(parameters["samples"]).name == "select"
        count = CHOSEN_ON if chosen else JUDGED_ON
        wrong = round(count * self.side.play.lost[0 if chosen else 1])
        Path(parameters["out"]).mkdir()
        np.savez(Path(parameters["out"]) / "000001.npz", y=scores(count, wrong))
        return {"batches": 1}


class ScriptedSide:
    """A side whose windows come from the script."""

    def __init__(self, label: str, play: Play, shared: bool) -> None:
        self.label, self.play, self.shared = label, play, shared
        self.worker = ScriptedWorker(self)
        self.windows: list[Window] = []
        self.energy_windows: list[Window] = []
        self.facts: dict[str, Any] = {}
        self.closed, self.peak_memory_bytes = False, None

    def prepare(self, samples: Path, warm_up_s: float, most_s: float | None = None) -> None:
        if self.play.crash == "measuring":
            raise BackendError(f"{self.label}: the worker was ended by SIGSEGV during prepare")

    def window(self, seconds: float) -> Window:
        final = self.play.final_ms if self.label in ("optimized", "torch eager") else None
        cpu_s = (final or self.play.cost_ms) / 1e3 * NOISE[(len(self.windows) + len(self.label)) % len(NOISE)]
        wall_s = self.play.wall_ms / 1e3 if self.play.wall_ms else cpu_s
        latency = self.play.p99_ms or wall_s * 1e3
        window = Window(100, 100 * wall_s, 100 * cpu_s, [latency] * 100)
        if self.play.other_share is not None:
            window.other_cpu_s = self.play.other_share * (os.cpu_count() or 1) * window.wall_s
        return window

    def settle(self) -> None:
        """Nothing runs."""

    def load(self) -> None:
        """A program that is scripted needs no loading."""

    def note_memory(self) -> int | None:
        self.peak_memory_bytes = self.play.memory_bytes
        return self.peak_memory_bytes

    def close(self) -> None:
        self.closed = True


def scores(count: int, wrong: int) -> np.ndarray:
    """Class scores that are right but for the first `wrong` of `count`; the truth is class 0, 1, 2, 3, 0, …"""
    predicted = np.arange(count) % 4
    predicted[:wrong] = (predicted[:wrong] + 1) % 4
    return np.eye(4, dtype=np.float32)[predicted]


GRAPHS = {
    name: Artifact(model=ir.from_proto(conv_net(seed))) for seed, name in enumerate(("source", "clean", "half", "int8"))
}
NAMES = {artifact.digest(): name for name, artifact in GRAPHS.items()}


def applied(name: str, lossy: bool = False) -> Row:
    return Row(name, {}, "applied", measured={} if lossy else None)


CLEANED = applied("fold-batchnorm")
SOURCE = Branch(GRAPHS["source"])
CLEAN = Branch(GRAPHS["clean"], (CLEANED,))


def lossy(graph: str) -> Branch:
    name = {"half": "cast-half", "int8": "quantize-int8"}[graph]
    return Branch(GRAPHS[graph], (CLEANED, applied(name, lossy=True)), lossy=True)


class Stage:
    """A study over the script {(graph, precision): Play}; what is not in it costs 1 ms and gets all right."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.opened = folder, []
        self.script: dict[tuple[str, str | None], Play] = {}
        self.precisions: tuple[str, ...] = ("f32",)
        self.budget = Budget(max_drop=1.0)
        self.labelled = True
        self.eager: Play | None = None
        self.backends: tuple[str, ...] = ("null",)
        self.spare: tuple[str, ...] = ()
        monkeypatch.setattr(setup.Side, "lowered", staticmethod(self.lowered))

    def lowered(
        self, label: str, target: str, artifact: Artifact, point: OperatingPoint, folder: Path, worker: Any = None
    ) -> ScriptedSide:
        graph, precision = NAMES[artifact.digest()], point.floating_precision
        at_point = f"{point.batch} {precision}" if point.batch != 1 else f"{target} {precision}"
        play = self.script.get((graph, at_point)) or self.script.get((graph, precision), Play())
        if play.crash == "opening":
            raise BackendError(f"{label}: the backend refused the model")
        if play.crash == "final" and label == "optimized":
            raise BackendError("optimized: the worker was ended by SIGKILL during open")
        # A screening worker serves all candidates of its backend.
        side = ScriptedSide(label, play, label not in SINGLE)
        self.opened.append(side)
        return side

    def evaluation(self, role: str, count: int) -> Evaluation:
        samples = Samples([{"x": np.zeros((count, 1), np.float32)}], np.arange(count) % 4)
        metric = metrics.resolve("top1", samples, [{"y": scores(count, 0)}])
        (self.folder / role).mkdir(exist_ok=True)
        return Evaluation(
            metric, samples, self.folder / role, [], metric.score([{"y": scores(count, 0)}], samples, None)
        )

    def backend(self, name: str) -> Backend:
        return Backend(
            name,
            capabilities=Capabilities(floating_precisions=self.precisions),
            alone=len(self.backends) == 1,
            spare=name in self.spare,
        )

    def screening(self) -> Screening:
        select = self.evaluation("select", CHOSEN_ON) if self.labelled else None
        whole = self.evaluation("all", JUDGED_ON) if self.labelled else None
        judge = Judge(self.budget, self.budget.max_drop or 0.0, select, whole, self.folder)
        # Programs are opened in the script, not in this process.
        place = Setup(self.folder, self.folder, worker=lambda label: Worker(label))
        return Screening(place, judge, GRAPHS["source"], OperatingPoint(), [self.backend(n) for n in self.backends])

    def study(self, *branches: Branch, plan: TunePlan | None = None) -> Study:
        screening = self.screening()
        return Study(
            screening.setup,
            screening.judge,
            screening,
            lambda backend: [SOURCE, *branches],
            plan=plan,
            eager=ScriptedSide("torch eager", self.eager, shared=True) if self.eager else None,
            effort=Effort(min_blocks=2, max_s=5),
        )

    def run(self, *branches: Branch, plan: TunePlan | None = None) -> Result:
        self.opened.clear()
        result = self.study(*branches, plan=plan).run()
        kept = list(result.sides.values())
        assert all(side.closed for side in self.opened if not side.shared and side not in kept)
        assert not any(side.closed for side in kept)
        assert [c.verdict for c in result.candidates].count("shipped") == 1
        return result
