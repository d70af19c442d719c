"""`Pipeline` with a memory: what an earlier run took is not taken again, and what chance or the clock decided is not kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from perwatt import registry
from perwatt.artifact import Artifact, Step
from perwatt.cache_keys import StepKeys
from perwatt.contract import Capabilities, Context, Pass, Stage, Tolerance
from perwatt.data import Samples
from perwatt.errors import BackendError, PassError
from perwatt.isolation import Worker
from perwatt.options import build_recipe
from perwatt.passes._learning import seconds_to_learn
from perwatt.pipeline import Pipeline, Proof, Row
from perwatt.preparation import open_model
from perwatt.proving import open_pipeline
from perwatt.recipe import PassStep
from perwatt.reference import Reference
from perwatt.step_store import KeptSteps, StepStore

sys.path.insert(0, str(Path(__file__).parent))
from runs import conv_net, images, put_net

RAN: list[str] = []
"""Names of the passes below that ran."""


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the last layer's weights; `factor` is written down, so that it is in the key."""

    stage: ClassVar[Stage] = Stage.CLEAN

    factor: float = 1 + 1e-6

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        RAN.append(type(self).__name__)
        model = artifact.edit()
        weight = model.graph.initializers["fc.weight"]
        weight.const_value = ir.tensor((weight.const_value.numpy() * self.factor).astype(np.float32), name="fc.weight")
        return artifact.after(model, self.step(["scaled"])), ["scaled"]


class Loose(Scale):
    """The same, where accuracy decides."""

    tolerance: ClassVar[Tolerance | None] = None


class Depending(Scale):
    """The same, that sees the target's capabilities."""

    depends_on_target: ClassVar[bool] = True


class Measuring(Scale):
    """The same, that asks the backend."""

    measures: ClassVar[bool] = True

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        context.measure([artifact])
        return super().run(artifact, context)


class Refusing(Scale):
    """Can't run here."""

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        RAN.append("Refusing")
        yield "not on this model"


class Idle(Scale):
    """Finds nothing to do."""

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        RAN.append("Idle")
        return artifact, ["nothing here"]


class Raising(Scale):
    """Fails in a way that its message tells."""

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        RAN.append("Raising")
        raise OSError("out of memory today")


class Refused(Scale):
    """Says itself that it can't."""

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        RAN.append("Refused")
        raise PassError("no scale was found")


class Slow(Scale):
    """Is at work until after the deadline."""

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        assert context.deadline is not None
        time.sleep(max(0.0, context.deadline - time.monotonic()) + 0.01)
        return super().run(artifact, context)


@dataclass(frozen=True)
class Learning(Pass):
    """Learns for as long as it is given, as `recover` does."""

    stage: ClassVar[Stage] = Stage.PRUNE
    tolerance: ClassVar[Tolerance | None] = None
    mends: ClassVar[bool] = True

    minutes: float = 5.0

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        RAN.append(f"{seconds_to_learn(self.minutes, context):.0f} s")
        return Scale(1.5).run(artifact, context)


@dataclass(frozen=True)
class Untimed(Learning):
    """Learns, and nobody knows for how long."""

    def settings(self) -> dict[str, Any]:
        return {}


class Bench:
    """One run after another over the tiny network, with one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = StepStore(folder / "steps")
        self.told: list[str] = []
        self.reference: Callable[[Artifact], list[dict[str, np.ndarray]]] = lambda artifact: list(
            Reference(artifact, folder).run([{"x": images(6)}])
        )

    def run(self, deadline_s: float | None = None, store: bool = True, seed: int = 0) -> Pipeline:
        """The pipeline of a new run, that has `deadline_s` left."""
        source = Artifact(model=ir.from_proto(conv_net()))
        context = Context(
            samples=lambda role: pytest.fail("no pass here asks for samples"), capabilities=Capabilities(),
            budget=build_recipe(None, model="net.onnx").budget, seed=seed,
            deadline=None if deadline_s is None else time.monotonic() + deadline_s, progress=self.told.append,
            execute=lambda artifact, batches, taps=(), optimized=False, quick=False: iter(()),
            measure=lambda artifacts: [1.0], profile=lambda artifact: [], judge=lambda artifact: None,
        )  # fmt: skip
        proof = Proof(
            self.check,
            lambda artifact: self.reference(artifact),
            lambda made_by, artifact, _: made_by.run(artifact, context),
            lambda artifact, _: self.reference(artifact),
        )
        recipe = build_recipe(None, model="net.onnx", seed=seed)
        keys = StepKeys(recipe, source, {"check": Samples([{"x": images(6)}])}, {"name": "here"}, False)
        memory = KeptSteps(self.store, keys, self.folder) if store else None
        return Pipeline(source, context, proof, memory=memory)

    def check(self, artifact: Artifact) -> list[str]:
        try:
            onnx.checker.check_model(str(artifact.file(self.folder)), full_check=True)
        except onnx.checker.ValidationError as error:
            return [" ".join(str(error).split())]
        return []

    def twice(self, made_by: Pass, **options: Any) -> tuple[Row, Row, int]:
        """The rows of two runs that take this step, and how often the pass really ran."""
        RAN.clear()
        rows = []
        for _ in range(2):
            pipeline = self.run(**options)
            rows.append(pipeline.step(pipeline.original, made_by)[1])
        return rows[0], rows[1], len(RAN)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# What is not taken again ----------------------------------------------------------------------------------------------


def test_a_second_run_takes_no_step_again_and_comes_to_the_same(bench: Bench) -> None:
    passes = [Scale(), Idle(), Refusing(), Scale(2.0), Loose(1.5), registry.bind(PassStep(name="fold-batchnorm"))]
    RAN.clear()
    first = bench.run()
    after, rows = first.run(first.original, passes)
    assert [row.status for row in rows] == [
        "applied", "unchanged", "refused", "rolled-back", "applied", "applied"
    ]  # fmt: skip
    assert not any(row.cached for row in rows)
    taken, told = len(RAN), list(bench.told)
    bench.reference = lambda artifact: pytest.fail("the reference was asked")
    second = bench.run()
    again, same = second.run(second.original, passes)
    assert len(RAN) == taken
    assert all(row.cached for row in same)
    assert [row.to_json() for row in same] == [row.to_json() for row in rows]
    assert again.digest() == after.digest()
    assert again.steps == after.steps and [step.name for step in again.steps][-1] == "fold-batchnorm"
    assert bench.told == told * 2, "progress is told of steps that are not taken, too"


def test_a_run_that_begins_alike_goes_on_from_what_it_has_in_common(bench: Bench) -> None:
    first = bench.run()
    first.run(first.original, [Scale(), Loose(1.5), Scale(1 + 2e-6)])
    second = bench.run()
    _, rows = second.run(second.original, [Scale(), Loose(1.5), Scale(1 - 2e-6)])
    assert [row.cached for row in rows] == [True, True, False]
    assert rows[-1].status == "applied"
    # It is proved against an artifact that came from the store.
    assert rows[-1].drift["max_abs"] < 1e-3 < rows[-1].drift_from_original["max_abs"]


def test_without_a_store_every_run_takes_every_step(bench: Bench) -> None:
    first, second, ran = bench.twice(Scale(), store=False)
    assert (first.cached, second.cached, ran) == (False, False, 2)


def test_a_row_is_told_in_the_report_as_if_it_had_been_taken_now(bench: Bench) -> None:
    first, second, _ = bench.twice(Scale())
    assert second.cached and "cached" not in second.to_json()
    assert replace(second, cached=False) == first


def test_in_one_run_a_step_that_was_recalled_is_recalled_once(bench: Bench) -> None:
    first = bench.run()
    first.step(first.original, Scale())
    second = bench.run()
    assert second.step(second.original, Scale())[0] is second.step(second.original, Scale())[0]


def test_what_doesnt_depend_on_the_target_serves_all_and_what_does_does_not(bench: Bench) -> None:
    def cached(made_by: Pass, isa: str, target: str) -> bool:
        pipeline = bench.run().for_target(Capabilities(isa=(isa,)), target)
        return pipeline.step(pipeline.original, made_by)[1].cached

    assert [cached(Scale(), isa, target) for isa, target in (("a", "x"), ("b", "y"))] == [False, True]
    assert [cached(Depending(), isa, target) for isa, target in (("a", "x"), ("a", "y"), ("b", "y"))] == [
        False, True, False
    ]  # fmt: skip
    assert [cached(Measuring(), isa, target) for isa, target in (("a", "x"), ("b", "x"), ("a", "y"))] == [
        False, True, False
    ]  # fmt: skip


def test_another_seed_is_another_run(bench: Bench) -> None:
    for seed in (0, 1):
        pipeline = bench.run(seed=seed)
        assert not pipeline.step(pipeline.original, Scale())[1].cached


def test_a_damaged_store_costs_time_only(bench: Bench) -> None:
    first = bench.run()
    after, _ = first.run(first.original, [Scale(), Loose(1.5)])
    for path in bench.store.folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    for cached in (False, True):
        pipeline = bench.run()
        again, rows = pipeline.run(pipeline.original, [Scale(), Loose(1.5)])
        assert [row.cached for row in rows] == [cached] * 2
        assert again.digest() == after.digest()


# What is not kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made_by", [Raising(), Refused()], ids=lambda made_by: type(made_by).__name__)
def test_a_pass_that_raised_is_tried_again(bench: Bench, made_by: Pass) -> None:
    first, second, ran = bench.twice(made_by)
    assert (first.status, second.cached, ran) == ("rolled-back", False, 2)


def test_what_could_not_be_verified_is_tried_again(bench: Bench) -> None:
    """A worker that crashed today may not crash tomorrow."""
    known = bench.run().original.digest()
    usual = bench.reference

    def reference(artifact: Artifact) -> list[dict[str, np.ndarray]]:
        if artifact.digest() != known:
            raise BackendError("checks: the worker was ended by SIGKILL during reference")
        return usual(artifact)

    bench.reference = reference
    for made_by in (Loose(1.5), Scale()):
        first, second, ran = bench.twice(made_by)
        assert "not verified numerically" in str(first.reason)
        assert (second.cached, ran) == (False, 2)


def test_a_checker_that_fails_is_asked_again_and_what_it_finds_is_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(artifact: Artifact) -> list[str]:
        raise BackendError("checks: check did not end within 1800 s and was stopped")

    monkeypatch.setattr(bench, "check", crash)
    assert bench.twice(Scale())[2] == 2
    monkeypatch.setattr(bench, "check", lambda artifact: ["no good"] if artifact.steps else [])
    first, second, ran = bench.twice(Scale())
    assert (first.status, first.reason, second.cached, ran) == ("rolled-back", "no good", True, 1)


def test_a_step_that_there_was_no_time_for_is_not_kept(bench: Bench) -> None:
    pipeline = bench.run(deadline_s=-1.0)
    _, row = pipeline.step(pipeline.original, Scale())
    assert (row.status, row.reason) == ("refused", "out of time")
    pipeline = bench.run()
    assert not pipeline.step(pipeline.original, Scale())[1].cached


def test_a_pass_that_was_at_work_when_time_was_up_is_not_kept(bench: Bench) -> None:
    """It may have stopped early, as `drop-blocks` does."""
    first, second, ran = bench.twice(Slow(), deadline_s=0.3)
    assert (first.status, second.cached, ran) == ("applied", False, 2)


def test_a_pass_that_ended_in_time_is_kept(bench: Bench) -> None:
    assert bench.twice(Scale(), deadline_s=60.0)[1].cached


@pytest.mark.parametrize(
    ("deadline_s", "learnt", "kept"),
    [
        (None, "300 s", True),
        (3600.0, "300 s", True),
        (500.0, "250 s", False),
        (10.0, "5 s", False),
    ],
)
def test_what_was_learnt_in_less_time_than_was_asked_for_is_not_kept(
    bench: Bench, deadline_s: float | None, learnt: str, kept: bool
) -> None:
    _, second, _ = bench.twice(Learning(), deadline_s=deadline_s)
    assert RAN[0] == learnt
    assert second.cached == kept


def test_a_longer_run_does_not_get_what_a_shorter_one_learnt(bench: Bench) -> None:
    for deadline_s, cached in ((10.0, False), (3600.0, False), (10.0, True)):
        pipeline = bench.run(deadline_s=deadline_s)
        assert pipeline.step(pipeline.original, Learning())[1].cached == cached


def test_whoever_learns_without_saying_for_how_long_is_kept_without_a_deadline_only(bench: Bench) -> None:
    assert not bench.twice(Untimed(), deadline_s=3600.0)[1].cached
    assert bench.twice(Untimed())[1].cached


# Real runs ------------------------------------------------------------------------------------------------------------


def test_types_that_a_pass_noted_lie_in_a_file_of_their_own(bench: Bench) -> None:
    """The file that goes by the digest has the model without them, and may be open."""

    class Noting(Scale):
        def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
            model = artifact.edit()
            out = model.graph[0].outputs[0]
            out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 8, 8, 8])
            return Artifact(model=model, steps=artifact.steps), ["noted"]

    first = bench.run()
    plain = first.original.file(bench.folder)
    before = plain.read_bytes()
    first.step(first.original, Noting())
    second = bench.run()
    after, row = second.step(second.original, Noting())
    assert row.cached and row.status == "unchanged"
    assert after.file(bench.folder) != plain and plain.read_bytes() == before
    assert str(Artifact.load(after.file(bench.folder)).model.graph[0].outputs[0].shape) == "[n,8,8,8]"


@pytest.mark.slow
def test_the_default_passes_of_a_real_model_come_from_an_earlier_run(tmp_path: Path) -> None:
    """Those that run in the worker, too; what follows them there gets files."""
    recipe = build_recipe(None, model=str(put_net(tmp_path)), data=str(tmp_path / "samples.npz"), target="null")
    names = [step.name for step in registry.default_steps() if isinstance(step, PassStep)]
    store = StepStore(tmp_path / "steps")

    def run(scratch: Path, *more: str) -> tuple[Artifact, list[Row]]:
        scratch.mkdir()
        with Worker("checks") as checks, ExitStack() as cleanup:
            opened = open_model(recipe, scratch, checks, lambda stage, share: None, cleanup)
            pipeline = open_pipeline(recipe, opened, scratch, checks, lambda text: None, store=store)
            passes = [registry.bind(PassStep(name=name)) for name in (*names, *more)]
            return pipeline.run(opened.source, passes)

    after, rows = run(tmp_path / "first")
    again, same = run(tmp_path / "second", "quantize-weights", "fold-constants")
    assert not any(row.cached for row in rows)
    assert [row.cached for row in same] == [True] * len(rows) + [False] * 2
    assert [row.to_json() for row in same[: len(rows)]] == [row.to_json() for row in rows]
    third, last = run(tmp_path / "third")
    assert third.digest() == after.digest() and all(row.cached for row in last)
    assert again.steps[: len(after.steps)] == third.steps
    assert [step.name for step in third.steps] == ["read", "fold-batchnorm"]
    assert isinstance(third.steps[0], Step)


def test_what_lossy_passes_made_is_read_from_its_file_again_when_it_is_wanted(tmp_path: Path) -> None:
    recipe = build_recipe(None, model=str(put_net(tmp_path)), data=str(tmp_path / "samples.npz"), target="null")
    pruning = PassStep(name="prune-channels", settings={"ratio": 0.5, "multiple": 2, "importance": "magnitude"})
    passes = [registry.bind(step) for step in (PassStep(name="fold-batchnorm"), pruning)]
    with Worker("checks") as checks, ExitStack() as cleanup:
        opened = open_model(recipe, tmp_path, checks, lambda stage, share: None, cleanup)
        pipeline = open_pipeline(recipe, opened, tmp_path, checks, lambda text: None)
        folded, _ = pipeline.step(opened.source, passes[0])
        after, row = pipeline.step(folded, passes[1])
        outputs = pipeline.outputs(after)
        pipeline.release()
        assert row.status == "applied" and after._model is None and folded._model is not None
        assert pipeline.run(opened.source, passes)[0] is after
        again = pipeline.outputs(after)
        assert all(np.array_equal(a[n], b[n]) for a, b in zip(outputs, again, strict=True) for n in a)
