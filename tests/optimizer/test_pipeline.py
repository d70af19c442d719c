"""`Pipeline`: passes that lie, break, mutate or crash are rolled back and named, and the run goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from perwatt.artifact import Artifact, model_digest
from perwatt.contract import Capabilities, Context, Pass, Stage, Tolerance
from perwatt.errors import BackendError, PassError
from perwatt.pipeline import Pipeline, Proof
from perwatt.recipe import Budget
from perwatt.reference import Reference

sys.path.insert(0, str(Path(__file__).parent))
from runs import conv_net, images


@dataclass(frozen=True)
class Scripted(Pass):
    """A pass that does to the graph what the test says. `act` gets the artifact and gives what `run` returns."""

    stage: ClassVar[Stage] = Stage.CLEAN

    act: Callable[[Artifact], tuple[Artifact, list[str]]]
    strength: float = 1.0

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        return self.act(artifact)

    def settings(self) -> dict[str, object]:
        return {"strength": self.strength}

    def changing(self, artifact: Artifact, change: Callable[[ir.Model], None]) -> Artifact:
        model = artifact.edit()
        change(model)
        return artifact.after(model, self.step(["scripted"]))


class Loose(Scripted):
    """The same, where accuracy decides."""

    tolerance: ClassVar[Tolerance | None] = None


class Isolated(Scripted):
    """The same, in the worker."""

    isolated: ClassVar[bool] = True


def edited(change: Callable[[ir.Model], None]) -> Callable[[Artifact], tuple[Artifact, list[str]]]:
    def act(artifact: Artifact) -> tuple[Artifact, list[str]]:
        model = artifact.edit()
        change(model)
        return artifact.after(model, Scripted(lambda a: (a, [])).step(["scripted"])), ["scripted"]

    return act


def scale(factor: float, name: str = "fc.weight") -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        value.const_value = ir.tensor((value.const_value.numpy() * factor).astype(np.float32), name=name)

    return change


def rename_nodes_value(model: ir.Model) -> None:
    """A change of structure that moves no number."""
    model.graph[0].outputs[0].name = "renamed"


class Bench:
    """A pipeline over the tiny network, whose proof counts what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.references: list[str] = []
        self.source = Artifact(model=ir.from_proto(conv_net()))
        self.batches = [{"x": images(6)}]
        self.run_isolated: Callable[[Pass, Artifact], tuple[Artifact, list[str]]] = lambda made_by, a: made_by.run(
            a, self.context
        )
        self.context = Context(
            samples=lambda role: pytest.fail("no pass here asks for samples"),
            capabilities=Capabilities(),
            budget=Budget(),
            seed=0,
            deadline=None,
            progress=lambda text: None,
            execute=lambda artifact, batches, taps=(), optimized=False, quick=False: iter(()),
            measure=lambda artifacts: [],
            profile=lambda artifact: [],
            judge=lambda artifact: None,
        )
        proof = Proof(
            self.check,
            self.reference,
            lambda made_by, artifact, _: self.run_isolated(made_by, artifact),
            lambda artifact, _: self.reference(artifact),
        )
        self.pipeline = Pipeline(self.source, self.context, proof)

    def check(self, artifact: Artifact) -> list[str]:
        try:
            onnx.checker.check_model(str(artifact.file(self.folder)), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            return [" ".join(str(error).split())]
        return []

    def reference(self, artifact: Artifact) -> list[dict[str, np.ndarray]]:
        self.references.append(artifact.digest())
        return list(Reference(artifact, self.folder).run(self.batches))

    def step(self, act: Callable[[Artifact], tuple[Artifact, list[str]]], kind: type[Scripted] = Scripted):
        return self.pipeline.step(self.source, kind(act))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def assert_rolled_back(bench: Bench, after: Artifact, row, *words: str) -> None:
    assert row.status == "rolled-back"
    for word in words:
        assert word in row.reason
    assert "\n" not in row.reason
    assert after is bench.source
    assert model_digest(after.model) == after.digest()


def test_a_pass_that_keeps_its_promise_is_applied_and_its_row_says_what_it_did(bench: Bench) -> None:
    after, row = bench.step(edited(scale(1 + 1e-6)))
    assert row.status == "applied"
    assert after.digest() != bench.source.digest()
    plain = row.to_json()
    assert (plain["name"], plain["settings"], plain["changes"]) == ("test-pipeline", {"strength": 1.0}, ["scripted"])
    assert plain["reason"] is None and plain["seconds"] >= 0
    assert 0 < plain["drift"]["max_abs"] < 1e-4 and 0 < plain["drift"]["relative"] < 1e-4
    assert plain["drift_from_original"] == plain["drift"]
    assert plain["size_bytes"]["before"] == plain["size_bytes"]["after"] > 0
    assert plain["operators"]["before"] == plain["operators"]["after"]
    assert plain["operators"]["before"]["BatchNormalization"] == 1


def test_a_pass_that_moves_outputs_beyond_its_tolerance_is_rolled_back_with_the_figures(bench: Bench) -> None:
    after, row = bench.step(edited(scale(1.01)))
    assert_rolled_back(bench, after, row, "output y moved by", "is allowed")
    assert row.drift["max_abs"] > 1e-3


def test_the_run_goes_on_after_a_rollback_from_the_artifact_before_it(bench: Bench) -> None:
    good, bad = edited(scale(1 + 1e-6)), edited(scale(2.0))
    after, rows = bench.pipeline.run(bench.source, [Scripted(bad), Scripted(good), Scripted(bad)])
    assert [row.status for row in rows] == ["rolled-back", "applied", "rolled-back"]
    assert [step.name for step in after.steps] == ["test-pipeline"]


def test_a_pass_without_tolerance_may_move_outputs_and_its_drift_is_recorded(bench: Bench) -> None:
    after, row = bench.step(edited(scale(1.5)), Loose)
    assert row.status == "applied"
    assert row.drift["relative"] > 0.1
    assert after is not bench.source


def test_drift_from_the_original_adds_up_over_passes_and_rolls_nothing_back(bench: Bench) -> None:
    step = edited(scale(1 + 2e-5))
    _, rows = bench.pipeline.run(bench.source, [Scripted(step)] * 4)
    assert [row.status for row in rows] == ["applied"] * 4
    assert rows[-1].drift_from_original["max_abs"] > 2 * rows[-1].drift["max_abs"]


def test_a_pass_that_changes_its_input_is_rolled_back_and_what_it_broke_does_not_go_on(bench: Bench) -> None:
    def act(artifact: Artifact) -> tuple[Artifact, list[str]]:
        scale(3.0)(artifact.model)
        return artifact, ["nothing, it says"]

    after, row = bench.step(act)
    assert_rolled_back(bench, after, row, "changed the model it was given", "artifact.edit()")


def test_a_pass_that_breaks_its_input_on_the_way_to_an_error_does_no_harm(bench: Bench) -> None:
    def act(artifact: Artifact) -> tuple[Artifact, list[str]]:
        artifact.model.graph.remove(artifact.model.graph[2], safe=False)
        raise KeyError("lost\nmy way")

    after, row = bench.step(act)
    assert_rolled_back(bench, after, row, "KeyError", "my way")
    assert len(list(bench.source.model.graph)) == 6


def test_weights_are_read_only_so_that_a_pass_cannot_change_them_in_place(bench: Bench) -> None:
    first, _ = bench.step(edited(scale(1 + 1e-6)))

    def act(artifact: Artifact) -> tuple[Artifact, list[str]]:
        artifact.model.graph.initializers["fc.weight"].const_value.numpy()[:] = 0
        return artifact, []

    after, row = bench.pipeline.step(first, Scripted(act))
    assert row.status == "rolled-back" and "read-only" in row.reason
    assert after is first


def test_a_pass_error_is_told_in_its_own_words(bench: Bench) -> None:
    def act(artifact: Artifact) -> tuple[Artifact, list[str]]:
        raise PassError("no scale was found for /conv", fix="give more samples")

    after, row = bench.step(act)
    assert_rolled_back(bench, after, row)
    assert row.reason == "no scale was found for /conv — give more samples"


def test_a_pass_whose_ensures_speaks_is_rolled_back_with_its_reasons(bench: Bench) -> None:
    class Strict(Scripted):
        def ensures(self, before: Artifact, after: Artifact) -> Iterator[str]:
            yield f"{len(list(after.model.graph))} nodes left"
            yield "one too many"

    after, row = bench.step(edited(scale(1 + 1e-6)), Strict)
    assert_rolled_back(bench, after, row, "6 nodes left; one too many")


def test_a_pass_refused_by_requires_does_not_run_and_says_why(bench: Bench) -> None:
    class Picky(Scripted):
        def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
            yield "no int8 here"
            yield "no half either"

    after, row = bench.step(lambda artifact: pytest.fail("it ran"), Picky)
    assert (after, row.status, row.reason) == (bench.source, "refused", "no int8 here; no half either")
    assert bench.references == []


def test_a_pass_whose_requires_raises_costs_itself_and_not_the_run(bench: Bench) -> None:
    class Clumsy(Scripted):
        def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
            raise ZeroDivisionError("no channels")
            yield ""

    after, row = bench.step(lambda artifact: pytest.fail("it ran"), Clumsy)
    assert_rolled_back(bench, after, row, "ZeroDivisionError: no channels")


def test_an_invalid_graph_is_caught_by_the_checker_before_it_is_run(bench: Bench) -> None:
    def change(model: ir.Model) -> None:
        model.graph[2].op_type = "NoSuchOperator"

    after, row = bench.step(edited(change))
    assert_rolled_back(bench, after, row, "NoSuchOperator")
    assert bench.references == []


def test_what_the_checker_says_of_the_input_already_is_not_held_against_a_pass(bench: Bench) -> None:
    check = bench.check
    bench.pipeline.proof.check = lambda artifact: ["No Op registered for Mine", *check(artifact)]
    _, row = bench.step(edited(scale(1 + 1e-6)))
    assert row.status == "applied"
    _, row = bench.step(edited(lambda model: setattr(model.graph[2], "op_type", "NoSuchOperator")))
    assert row.status == "rolled-back" and "NoSuchOperator" in row.reason and "Mine" not in row.reason


def rename_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "logits"


def retype_output(model: ir.Model) -> None:
    node = ir.node("Cast", [model.graph.outputs[0]], {"to": ir.DataType.DOUBLE.value})
    old = model.graph.outputs[0]
    old.name, node.outputs[0].name = "y_single", "y"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.DOUBLE), old.shape
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]


def fix_batch(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape([6, 1, 8, 8])


def rename_input(model: ir.Model) -> None:
    model.graph.inputs[0].name = "picture"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename_output, ("outputs changed", "logits")),
        (retype_output, ("outputs changed", "y:float64")),
        (rename_input, ("inputs changed", "picture")),
        (fix_batch, ("inputs changed", "x:float32[6,1,8,8]")),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_what_the_caller_feeds_and_gets_stays_as_it_was(bench: Bench, change, words: tuple[str, ...]) -> None:
    after, row = bench.step(edited(change), Loose)
    assert_rolled_back(bench, after, row, *words)


def test_a_changed_shape_of_an_output_is_caught_on_real_samples(bench: Bench) -> None:
    def change(model: ir.Model) -> None:
        model.graph[4].attributes["axis"] = ir.AttrInt64("axis", 1)
        model.graph[5].attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)
        wide = np.zeros((5, 8), np.float32)
        model.graph.initializers["fc.weight"].const_value = ir.tensor(wide, name="fc.weight")
        model.graph.initializers["fc.bias"].const_value = ir.tensor(wide[:, 0].copy(), name="fc.bias")
        for value in (model.graph.initializers["fc.weight"], model.graph.initializers["fc.bias"]):
            value.shape = value.const_value.shape
        model.graph.outputs[0].shape = ir.Shape(["n", "classes"])

    after, row = bench.step(edited(change), Loose)
    assert_rolled_back(bench, after, row, "output y changed its shape")


def test_nan_in_other_places_is_caught_however_wide_the_tolerance(bench: Bench) -> None:
    class Wide(Scripted):
        tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e9, rtol=1e9)

    after, row = bench.step(edited(scale(np.nan, "fc.bias")), Wide)
    assert_rolled_back(bench, after, row, "NaN or infinity in other places")


def test_an_unchanged_digest_is_unchanged_and_asks_for_no_reference(bench: Bench) -> None:
    for act in (lambda artifact: (artifact, []), lambda artifact: (Artifact(model=artifact.edit()), ["looked around"])):
        after, row = bench.step(act)
        assert after.digest() == bench.source.digest()
        assert row.status == "unchanged"
    assert row.reason == "looked around"
    assert bench.references == []


def test_each_model_is_run_by_the_reference_once(bench: Bench) -> None:
    step = Scripted(edited(scale(1 + 1e-6)))
    after, _ = bench.pipeline.run(bench.source, [step, Scripted(lambda a: (a, [])), step])
    assert len(bench.references) == len(set(bench.references)) == 3
    assert after.digest() in bench.references


@pytest.mark.parametrize(("kind", "status"), [(Loose, "applied"), (Scripted, "rolled-back")])
def test_what_the_reference_cannot_run_is_not_verified_and_only_accuracy_may_decide(bench: Bench, kind, status) -> None:
    """ONNX Runtime has no bfloat16 products: a lossy pass goes on unverified, one with a tolerance can't hold it."""

    def reference(artifact: Artifact):
        if artifact is not bench.source:
            raise BackendError("ONNX Runtime has no MatMul in bfloat16")
        return Reference(artifact, bench.folder).run(bench.batches)

    bench.pipeline.proof.reference = lambda artifact: list(reference(artifact))
    _, row = bench.step(edited(scale(1.5)), kind)
    assert row.status == status
    assert "not verified numerically, accuracy decides" in row.reason and "bfloat16" in row.reason
    assert row.drift is None


def test_where_the_original_has_no_reference_passes_are_applied_and_said_to_be_unverified(bench: Bench) -> None:
    def reference(artifact: Artifact):
        raise BackendError("a custom operator")

    bench.pipeline.proof.reference = reference
    _, row = bench.step(edited(scale(1 + 1e-6)))
    assert row.status == "applied"
    assert "not verified numerically" in row.reason and "a custom operator" in row.reason


def test_a_crash_in_the_worker_costs_the_isolated_pass_and_not_the_run(bench: Bench) -> None:
    def crash(made_by: Pass, artifact: Artifact):
        raise BackendError("checks: the worker was ended by SIGSEGV during run_pass")

    bench.run_isolated = crash
    after, row = bench.step(edited(scale(1.0)), Isolated)
    assert_rolled_back(bench, after, row, "SIGSEGV")


def test_an_isolated_pass_may_hand_back_a_model_on_disk(bench: Bench) -> None:
    def elsewhere(made_by: Pass, artifact: Artifact):
        made, changes = edited(rename_nodes_value)(artifact)
        return Artifact.load(made.file(bench.folder)), changes

    bench.run_isolated = elsewhere
    after, row = bench.step(lambda artifact: pytest.fail("it ran here"), Isolated)
    assert row.status == "applied" and row.drift["max_abs"] == 0
    again, row = bench.pipeline.step(after, Scripted(lambda artifact: (artifact, [])))
    assert again is after and row.status == "unchanged"
