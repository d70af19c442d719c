"""What each pass of a winner brings: on scripted costs exactly, on a real backend with its noise."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from perwatt import accounting_sides, metrics, registry
from perwatt.accounting import Account, account
from perwatt.accounting_shares import Change, Share, together, verdict
from perwatt.accounting_sides import LATE, NO_BASE, moved_to, product
from perwatt.artifact import Artifact
from perwatt.backends import Backend
from perwatt.bench.scripted import Scripted
from perwatt.candidates import Branch, Candidate
from perwatt.contract import Capabilities, Context, OperatingPoint, Pass, Stage, Tolerance
from perwatt.data import Samples
from perwatt.errors import BackendError
from perwatt.evaluation import Evaluation
from perwatt.judging import Judge
from perwatt.measurement import Ratio
from perwatt.measuring import Conductor, Effort
from perwatt.pipeline import OUT_OF_TIME, Pipeline, Proof
from perwatt.recipe import Budget, PassStep
from perwatt.reference import Reference
from perwatt.report import AccountReport
from perwatt.setup import Setup
from perwatt.trials import walk
from perwatt.worker import Session

CLASSES = 4
SWAP = np.eye(CLASSES, dtype=np.float32)[[1, 0, 2, 3]]
QUICK = Effort(window_s=0.01, warm_up_s=0.0, min_blocks=4, max_s=2.0, tight=0.01)
RUNS: list[str] = []
"""Names of the passes that were run, in order."""


# A model in a chain, and passes that take links out of it -----------------------------------------------------------------


def chain() -> Artifact:
    """Conv first, Conv swap, two BatchNormalizations that do nothing, Relu, Flatten: 1 + 1 + 0.25 + 0.25 + 0.05 + 0.05 ms on the
    null target. x:float32[n,4,1,1] is positive and what the classes are told by; `swap` exchanges the first two."""
    ones, zeros = np.ones(CLASSES, np.float32), np.zeros(CLASSES, np.float32)
    weights = {
        "first.weight": np.eye(CLASSES, dtype=np.float32)[:, :, None, None], "swap.weight": SWAP[:, :, None, None],
        "scale": ones, "shift": zeros, "mean": zeros, "var": ones - np.float32(1e-5), "spare": np.zeros(1000, np.float32),
    }  # fmt: skip
    norm = ["scale", "shift", "mean", "var"]
    nodes = [
        helper.make_node("Conv", ["x", "first.weight"], ["a"], name="first"),
        helper.make_node("Conv", ["a", "swap.weight"], ["b"], name="swap"),
        helper.make_node("BatchNormalization", ["b", *norm], ["c"], name="norm"),
        helper.make_node("BatchNormalization", ["c", *norm], ["d"], name="again"),
        helper.make_node("Relu", ["d"], ["e"], name="relu"),
        helper.make_node("Flatten", ["e"], ["y"], name="flat"),
    ]
    graph = helper.make_graph(
        nodes, "chain", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", CLASSES, 1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(made)
    return Artifact(model=ir.from_proto(made))


def node(model: ir.Model, name: str) -> Any:
    return next((one for one in model.graph if one.name == name), None)


def without(model: ir.Model, name: str) -> None:
    """Take a link out of the chain."""
    gone = node(model, name)
    for user, place in list(gone.outputs[0].uses()):
        user.replace_input_with(place, gone.inputs[0])
    model.graph.remove(gone, safe=True)


@dataclass(frozen=True)
class Take(Pass):
    """Takes the link `link` out."""

    stage: ClassVar[Stage] = Stage.CLEAN
    link: str = ""

    def act(self, model: ir.Model) -> bool:
        if node(model, self.link) is None:
            return False
        without(model, self.link)
        return True

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        RUNS.append(self.name())
        model = artifact.edit()
        return (artifact.after(model, self.step(["did it"])), ["did it"]) if self.act(model) else (artifact, [])

    @classmethod
    def name(cls) -> str:
        return "".join(f"-{c.lower()}" if c.isupper() else c for c in cls.__name__).strip("-")


@dataclass(frozen=True)
class TakeNorm(Take):
    """The first normalization: 0.25 ms."""

    link: str = "norm"


@dataclass(frozen=True)
class TakeAgain(Take):
    """The second: 0.25 ms."""

    link: str = "again"


@dataclass(frozen=True)
class TakeRelu(Take):
    """0.05 ms."""

    link: str = "relu"


@dataclass(frozen=True)
class DropSwap(Take):
    """Lossy: takes `swap` out for 1 ms, and mistakes the first two classes for each other."""

    tolerance: ClassVar[Tolerance | None] = None
    link: str = "swap"


@dataclass(frozen=True)
class Teach(Take):
    """Learns: puts into the weights of the first Conv what `swap` did."""

    tolerance: ClassVar[Tolerance | None] = None
    mends: ClassVar[bool] = True
    rounds: int = 1

    def requires(self, artifact: Artifact, context: Context) -> Any:
        if node(artifact.model, "swap") is not None:
            yield "there is nothing to learn back"

    def act(self, model: ir.Model) -> bool:
        put(model, "first.weight", SWAP[:, :, None, None] * np.float32(self.rounds))
        return True


@dataclass(frozen=True)
class Rename(Take):
    """Changes the graph and nothing that takes time."""

    def act(self, model: ir.Model) -> bool:
        names = [f"{one.name}" for one in model.graph]
        model.graph[0].outputs[0].name = "renamed"
        return bool(names)


@dataclass(frozen=True)
class TakeSpare(Take):
    """Takes a weight out that nothing reads."""

    def act(self, model: ir.Model) -> bool:
        return model.graph.initializers.pop("spare", None) is not None


@dataclass(frozen=True)
class NeedsRename(Take):
    """Takes Relu out, but only of what was renamed."""

    link: str = "relu"

    def requires(self, artifact: Artifact, context: Context) -> Any:
        if not any(step.name == "rename" for step in artifact.steps):
            yield "nothing was renamed"


@dataclass(frozen=True)
class Add(Take):
    """Puts two Relus in that are in the way: 0.1 ms."""

    def act(self, model: ir.Model) -> bool:
        last = node(model, "flat")
        for number in range(2):
            more = ir.node("Relu", [last.inputs[0]], name=f"more{number}")
            model.graph.insert_before(last, more)
            more.outputs[0].name = f"more{number}"
            last.replace_input_with(0, more.outputs[0])
        return True


@dataclass(frozen=True)
class Odd(Take):
    """Lossy as nobody can run it: puts an operator in that no backend knows."""

    tolerance: ClassVar[Tolerance | None] = None

    def act(self, model: ir.Model) -> bool:
        node(model, "relu").op_type = "Odd"
        return True


@dataclass(frozen=True)
class Even(Take):
    """Puts it back."""

    tolerance: ClassVar[Tolerance | None] = None

    def act(self, model: ir.Model) -> bool:
        one = node(model, "relu")
        if one is None or one.op_type != "Odd":
            return False
        one.op_type = "Relu"
        without(model, "norm")
        return True


@dataclass(frozen=True)
class TakeOneLeft(Take):
    """Takes out the normalization that is left, where it is one."""

    def act(self, model: ir.Model) -> bool:
        left = [name for name in ("norm", "again") if node(model, name) is not None]
        if len(left) != 1:
            return False
        without(model, left[0])
        return True


def put(model: ir.Model, name: str, array: np.ndarray) -> None:
    model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)


PASSES: tuple[type[Take], ...] = (
    TakeNorm, TakeAgain, TakeRelu, DropSwap, Teach, Rename, TakeSpare, NeedsRename, Add, Odd, Even, TakeOneLeft,
)  # fmt: skip


# Where it is measured -------------------------------------------------------------------------------------------------------


class Here:
    """A worker in this process: what it is asked is done by the real thing."""

    def __init__(self, name: str) -> None:
        self.name, self.running, self.session = name, True, Session(lambda message: None)

    def start(self) -> None:
        """It is here."""

    def call(self, operation: str, timeout_s: float = 0.0, **parameters: Any) -> Any:
        return getattr(self.session, operation)(**parameters)

    def close(self) -> None:
        self.running = False


class Bench:
    """A pipeline over the chain, on the null target, with samples to choose by."""

    def __init__(self, folder: Path, worker: Callable[[str], Any] = Here, backend: str = "null") -> None:
        RUNS.clear()
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.source = chain()
        self.samples = self._samples()
        self.samples.save(folder / "timing")
        self.opened: list[str] = []
        self.setup = Setup(
            folder, folder / "timing", worker=lambda label: (self.opened.append(label), worker(label))[1]
        )
        self.backend = Backend(backend, capabilities=Capabilities())
        self.point = OperatingPoint(floating_precision="f32")
        self.pipeline = Pipeline(self.source, self._context(), self._proof())
        self.judge = self._judge()

    def _samples(self) -> Samples:
        x = np.random.default_rng(0).uniform(0.1, 1.0, (200, CLASSES, 1, 1)).astype(np.float32)
        [told] = Reference(self.source, self.folder).run([{"x": x}])
        return Samples([{"x": x}], told["y"].argmax(axis=1))

    def _context(self) -> Context:
        return Context(
            samples=lambda role: self.samples, capabilities=Capabilities(), budget=Budget(), seed=0, deadline=None,
            progress=lambda text: None, execute=lambda *args, **options: iter(()), measure=lambda artifacts: [],
            profile=lambda artifact: [], judge=lambda artifact: None,
        )  # fmt: skip

    def _proof(self) -> Proof:
        def reference(artifact: Artifact, *_: Any) -> list[dict[str, np.ndarray]]:
            return list(Reference(artifact, self.folder).run(list(self.samples.take(8))))

        return Proof(
            lambda artifact: [], reference, lambda made_by, artifact, _: made_by.run(artifact, None), reference
        )

    def _judge(self) -> Judge:
        self.samples.save(self.folder / "select")
        outputs = list(Reference(self.source, self.folder).run(list(self.samples)))
        metric = metrics.resolve("top1", self.samples, outputs)
        original = metric.score(outputs, self.samples, None)
        select = Evaluation(metric, self.samples, self.folder / "select", outputs, original)
        return Judge(Budget(max_drop=1.0), 1.0, select, None, self.folder)

    def candidate(self, steps: Sequence[PassStep], **changes: Any) -> Candidate:
        return replace(Candidate(walk(self.pipeline, self.source, steps), self.point, self.backend), **changes)

    def baseline(self) -> Candidate:
        return Candidate(Branch(self.source), self.point, self.backend)

    def account(self, *names: str, **options: Any) -> Account:
        """The account of the winner that these passes make; `teach:2` is `teach` with two rounds."""
        steps = [step(name) for name in names]
        candidate = options.pop("candidate", None) or self.candidate(steps)
        baseline = options.pop("baseline", None) or self.baseline()
        options = {"effort": QUICK, **options}
        return account(candidate, baseline, self.pipeline, self.source, steps, self.setup, self.judge, **options)


def step(name: str) -> PassStep:
    plain, _, rounds = name.partition(":")
    return PassStep(name=plain, settings={"rounds": int(rounds)} if rounds else {})


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    known = {cls.name(): cls for cls in PASSES}
    usual = registry._class
    monkeypatch.setattr(registry, "_class", lambda kind, name, base: known.get(name) or usual(kind, name, base))
    return Bench(tmp_path)


def of(told: Account, name: str) -> Share:
    return next(share for share in told.shares if share.name == name)


def values(told: Account) -> dict[str, float | None]:
    return {share.name: share.prefix.cost.value for share in told.shares}


def assert_it_adds_up(told: Account) -> None:
    """Shares multiply to the whole, and drops add up to it."""
    assert math.prod(share.prefix.cost.value or 1.0 for share in told.shares) == pytest.approx(told.whole.cost.value)
    sizes = math.prod(share.prefix.size or 1.0 for share in told.shares)
    assert sizes == pytest.approx(told.whole.size)
    drops = [share.prefix.drop.drop for share in told.shares if share.prefix.drop is not None]
    assert told.whole.drop is not None and math.fsum(drops) == pytest.approx(told.whole.drop.drop)
    AccountReport.model_validate(told.to_json())


# Shares -------------------------------------------------------------------------------------------------------------------


def test_shares_are_what_the_script_says_and_multiply_to_the_whole(bench: Bench) -> None:
    told = bench.account("take-norm", "drop-swap", "take-relu")
    assert values(told) == {
        "take-norm": pytest.approx(2.35 / 2.6), "drop-swap": pytest.approx(1.35 / 2.35), "take-relu": pytest.approx(1.3 / 1.35)
    }  # fmt: skip
    assert told.whole.cost.value == pytest.approx(1.3 / 2.6)
    assert_it_adds_up(told)
    assert told.cost_is == "CPU seconds per inference" and told.point is None and not told.notes
    assert [share.verdict for share in told.shares] == ["earns its keep"] * 3
    assert of(told, "take-norm").why == "with it an inference takes 0.84× [0.84, 0.84] the CPU seconds"
    assert of(told, "take-norm").settings == [{"link": "norm"}]


def test_alone_out_is_the_winner_against_the_pipeline_without_the_pass(bench: Bench) -> None:
    told = bench.account("take-norm", "drop-swap", "take-relu")
    found = {share.name: share.alone_out.cost.value for share in told.shares}
    assert found == {
        "take-norm": pytest.approx(1.3 / 1.55), "drop-swap": pytest.approx(1.3 / 2.3), "take-relu": pytest.approx(1.3 / 1.35)
    }  # fmt: skip
    assert of(told, "take-norm").alone_out.latency.value == pytest.approx(1.3 / 1.55)


def test_accuracy_is_that_of_the_same_samples_with_and_without(bench: Bench) -> None:
    told = bench.account("take-norm", "drop-swap")
    lost = of(told, "drop-swap").prefix.drop
    labels = bench.samples.labels
    assert lost is not None and lost.n == 200
    assert lost.drop == pytest.approx(100 * float((labels < 2).mean())) and lost.low < lost.drop < lost.high
    kept = of(told, "take-norm").prefix.drop
    assert kept is not None and kept.drop == 0 and kept.low < 0 < kept.high
    assert of(told, "drop-swap").alone_out.drop == lost
    assert_it_adds_up(told)


def test_sizes_are_those_of_the_weights(bench: Bench) -> None:
    told = bench.account("take-spare", "drop-swap")
    assert of(told, "take-spare").prefix.size == pytest.approx(
        (bench.source.size_bytes() - 4000) / bench.source.size_bytes()
    )
    share = of(told, "take-spare")
    assert (share.verdict, share.prefix.cost) == ("earns its keep", Ratio(1.0, 1.0, 1.0))
    assert share.why.startswith("weights take 0.05× the bytes; with it") and share.name not in told.droppable


def test_each_graph_is_measured_once_and_six_at_a_time_at_most(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []
    usual = accounting_sides.run_blocks
    monkeypatch.setattr(
        accounting_sides, "run_blocks", lambda subjects, *rest: (groups.append(len(subjects)), usual(subjects, *rest))
    )
    told = bench.account("take-norm", "rename", "drop-swap", "take-again", "add", "take-relu")
    assert groups[:2] == [6, 2] and max(groups) <= 6
    winner = "after take-relu"
    others = [label for label in bench.opened if label != winner]
    assert len(others) == len(set(others)) and bench.opened.count(winner) == len(groups), "it is in every group"
    assert "without add" in others and bench.opened[0] == winner
    assert_it_adds_up(told)
    assert told.whole.cost.value == pytest.approx(1.15 / 2.6)


def test_the_share_of_the_operating_point_is_told_apart(bench: Bench) -> None:
    baseline = replace(bench.baseline(), point=replace(bench.point, batch=8))
    told = bench.account("take-norm", "take-relu", baseline=baseline)
    assert told.point is not None and told.point.cost.value == pytest.approx(1.0)
    assert told.point.size == 1.0 and "the original as it runs best" in bench.opened
    assert "without take-relu" not in bench.opened, "it is the graph after take-norm, which was beside the winner"


@pytest.mark.parametrize(("counted", "words"), [(True, "joules per inference"), (False, "seconds per inference")])
def test_on_a_gpu_a_cost_is_joules_where_its_own_are_counted(bench: Bench, counted: bool, words: str) -> None:
    bench.backend = Backend("null", device="gpu", joules_count=counted)
    bench.setup.conductor = Conductor(Scripted(watts=10.0), device="gpu")
    told = bench.account("take-norm", "take-relu")
    assert told.cost_is == words
    assert told.whole.cost.value == pytest.approx(2.3 / 2.6)
    assert of(told, "take-norm").why == f"with it an inference takes 0.90× [0.90, 0.90] the {words.split()[0]}"


def test_a_winner_without_passes_has_an_account_without_shares(bench: Bench) -> None:
    told = bench.account()
    assert told.shares == [] and told.whole.cost.value == 1.0 and told.reduced is None
    AccountReport.model_validate(told.to_json())


def test_a_pass_that_costs_is_called_so_and_left_out(bench: Bench) -> None:
    told = bench.account("take-norm", "add")
    assert of(told, "add").verdict == "costs"
    assert told.droppable == ["add"]
    assert told.reduced is not None and told.reduced.applied() == ["take-norm"]


# Learning -----------------------------------------------------------------------------------------------------------------


def test_what_learns_is_paid_in_accuracy_and_is_never_run_again(bench: Bench) -> None:
    told = bench.account("take-norm", "drop-swap", "teach", "take-relu")
    assert RUNS.count("teach") == 1
    taught = of(told, "teach")
    assert taught.prefix.cost == Ratio(1.0, 1.0, 1.0) and taught.alone_out.cost == Ratio(1.0, 1.0, 1.0)
    assert taught.verdict == "for accuracy" and "points more accurate with it" in taught.why
    assert taught.alone_out.drop is not None and taught.alone_out.drop.drop < -30
    assert told.whole.drop is not None and told.whole.drop.drop == 0
    assert_it_adds_up(told)


def test_before_learning_the_cost_is_that_of_the_pipelines_without_learning(bench: Bench) -> None:
    told = bench.account("take-norm", "drop-swap", "teach", "take-relu")
    before = of(told, "take-norm").alone_out
    assert before.cost.value == pytest.approx(1.3 / 1.55)
    assert before.drop is None and before.reason == "accuracy: it would have to be learnt again"
    assert of(told, "take-norm").why.endswith("both measured without what was learnt")
    after = of(told, "take-relu").alone_out
    assert after.drop is not None and after.reason is None
    assert of(told, "drop-swap").alone_out.cost.value == pytest.approx(1.3 / 2.3)


def test_rows_of_one_name_share(bench: Bench) -> None:
    told = bench.account("take-norm", "drop-swap", "teach", "take-again", "teach:2", "take-relu")
    assert RUNS.count("teach") == 2
    assert of(told, "teach").settings == [{"link": "", "rounds": 1}, {"link": "", "rounds": 2}]
    assert of(told, "teach").prefix.cost == Ratio(1.0, 1.0, 1.0)
    assert [share.name for share in told.shares] == ["take-norm", "drop-swap", "teach", "take-again", "take-relu"]
    assert of(told, "teach").alone_out.drop is not None, "without any learning nothing has to be learnt again"
    assert_it_adds_up(told)


def test_nothing_that_was_learnt_behind_is_dropped(bench: Bench) -> None:
    told = bench.account("rename", "drop-swap", "teach", "take-relu")
    assert of(told, "rename").verdict == "brings nothing" and told.droppable == []
    assert bench.account("drop-swap", "teach", "rename", "take-relu").droppable == ["rename"]


def test_a_learning_pass_without_effect_is_no_part_of_the_account(bench: Bench) -> None:
    told = bench.account("rename", "teach", "take-relu")
    assert [share.name for share in told.shares] == ["rename", "take-relu"]
    assert told.droppable == ["rename"] and RUNS.count("teach") == 0


# What can go ----------------------------------------------------------------------------------------------------------------


def test_what_brings_nothing_is_left_out_and_what_is_left_is_measured(bench: Bench) -> None:
    bench.judge.max_drop = 60.0
    told = bench.account("rename", "take-norm", "drop-swap")
    assert of(told, "rename").verdict == "brings nothing"
    assert told.droppable == ["rename"] and told.reduced is not None
    assert told.without_them is not None and told.without_them.cost.value == pytest.approx(1.0)
    assert told.reduced.applied() == ["take-norm", "drop-swap"] and told.reduced.lossy
    assert (
        told.reduced.artifact.digest()
        == bench.candidate([step("take-norm"), step("drop-swap")]).branch.artifact.digest()
    )
    assert told.decision.startswith("left out: without all of that an inference takes 1.00×")
    assert told.to_json()["dropped"] is True


def test_what_another_pass_needs_stays(bench: Bench) -> None:
    told = bench.account("rename", "needs-rename")
    share = of(told, "rename")
    assert share.needed_by == ["needs-rename"] and told.droppable == []
    assert share.why.endswith("without it nothing comes of needs-rename (nothing was renamed)")
    assert share.alone_out.cost.value == pytest.approx(2.55 / 2.6), "what others do thanks to it is its own"


def test_a_pass_whose_work_another_does_can_go(bench: Bench) -> None:
    told = bench.account("take-norm", "take-again", "take-one-left")
    both = {name: of(told, name) for name in ("take-norm", "take-again")}
    assert all(share.alone_out.cost == Ratio(1.0, 1.0, 1.0) for share in both.values())
    assert "the model is the same without it" in both["take-norm"].why
    assert told.droppable == ["take-norm", "take-again"]
    assert told.reduced is None and "together they save" in told.decision, "without both it is slower"
    assert told.without_them is not None and told.without_them.cost.value == pytest.approx(2.6 / 2.1)
    assert told.to_json()["dropped"] is False


def test_a_caller_may_keep_the_winner_after_all(bench: Bench) -> None:
    told = bench.account("rename", "take-norm")
    told.keep("it was slower in fresh processes")
    assert told.reduced is None and told.decision == "kept: it was slower in fresh processes"


def test_what_is_left_must_be_allowed(bench: Bench) -> None:
    bench.judge.budget = Budget(max_drop=1.0, p99_ms=0.1)
    told = bench.account("rename", "take-norm")
    assert told.droppable == ["rename"] and told.reduced is None and "too late" in told.decision


def test_the_ledgers_figures_of_the_winner_are_left_alone(bench: Bench) -> None:
    steps = [step("rename"), step("drop-swap")]
    candidate = bench.candidate(steps)
    candidate.branch.rows[1].measured = {"accuracy_drop": 1.0}
    bench.judge.max_drop = 60.0
    told = bench.account("rename", "drop-swap", candidate=candidate)
    assert candidate.branch.rows[1].measured == {"accuracy_drop": 1.0}
    assert told.reduced is not None and told.reduced.rows[0].measured == {}, "for the ledger to fill in"


# What goes wrong ------------------------------------------------------------------------------------------------------------


def test_a_graph_that_no_backend_runs_is_part_of_the_next(bench: Bench) -> None:
    told = bench.account("odd", "even", "take-relu")
    assert of(told, "odd").prefix.cost.value is None and "refused the model" in (of(told, "odd").prefix.reason or "")
    assert of(told, "even").prefix.reason == "together with odd"
    assert_it_adds_up(told)


def test_without_samples_there_is_a_cost_and_no_accuracy(bench: Bench) -> None:
    bench.judge.select = None
    told = bench.account("rename", "drop-swap", "teach", "take-relu")
    assert told.whole.cost.value == pytest.approx(1.55 / 2.6) and told.whole.drop is None
    assert of(told, "teach").verdict == "not known" and of(told, "teach").why == "its accuracy was not judged"
    AccountReport.model_validate(told.to_json())


def test_when_the_time_is_up_nothing_is_measured_and_the_reasons_are_told(bench: Bench) -> None:
    told = bench.account("take-norm", "take-relu", deadline=time.monotonic() - 1)
    assert bench.opened == []
    assert told.whole.cost.value is None and told.whole.reason == LATE
    assert all(share.verdict == "not known" and share.prefix.cost.value is None for share in told.shares)
    assert all(share.alone_out.reason == "there was no time left to leave it out" for share in told.shares)
    assert told.droppable == [] and told.reduced is None
    AccountReport.model_validate(told.to_json())


def test_what_would_take_too_long_to_run_again_is_not_run(bench: Bench) -> None:
    steps = [step("take-norm"), step("take-relu")]
    candidate = bench.candidate(steps)
    candidate.branch.rows[1].seconds = 500.0
    told = bench.account("take-norm", "take-relu", candidate=candidate, deadline=time.monotonic() + 60)
    assert of(told, "take-norm").alone_out.reason == (
        "the passes behind it would take 500 s again, which there was no time for"
    )
    assert of(told, "take-norm").verdict == "earns its keep"
    assert of(told, "take-norm").why.startswith("in its turn an inference takes 0.90×"), "by its place in the order"
    assert of(told, "take-relu").alone_out.cost.value == pytest.approx(2.3 / 2.35)


def test_a_step_that_had_no_time_is_not_run_now(bench: Bench) -> None:
    steps = [step("take-norm"), step("take-relu")]
    candidate = bench.candidate(steps[:1])
    late = replace(candidate.branch.rows[0], name="take-relu", status="refused", reason=OUT_OF_TIME)
    candidate.branch = replace(candidate.branch, rows=(*candidate.branch.rows, late))
    told = bench.account("take-norm", "take-relu", candidate=candidate)
    assert [share.name for share in told.shares] == ["take-norm"] and RUNS == ["take-norm"]


def test_the_searchs_own_deadline_is_not_the_accounts(bench: Bench) -> None:
    candidate = bench.candidate([step("take-norm"), step("take-relu")])
    bench.pipeline.context = replace(bench.pipeline.context, deadline=time.monotonic() - 1)
    told = bench.account("take-norm", "take-relu", candidate=candidate)
    assert of(told, "take-norm").alone_out.cost.value == pytest.approx(2.3 / 2.55)
    assert bench.pipeline.context.deadline is not None


def test_passes_that_lead_elsewhere_have_no_account(bench: Bench) -> None:
    candidate = bench.candidate([step("take-norm"), step("take-relu")])
    candidate.branch = replace(candidate.branch, artifact=bench.source)
    told = bench.account("take-norm", "take-relu", candidate=candidate)
    assert told.shares == [] and told.notes == ["no account: the passes did not lead to the same graph again"]


def test_a_process_that_dies_costs_its_graph_and_nothing_else(bench: Bench) -> None:
    class Mortal(Here):
        def call(self, operation: str, timeout_s: float = 0.0, **parameters: Any) -> Any:
            if operation == "drive" and self.name == "without take-norm":
                self.running = False
                raise BackendError("without take-norm: the worker was ended by SIGSEGV during drive")
            return super().call(operation, timeout_s, **parameters)

    mortal = Bench(bench.folder / "mortal", Mortal)
    told = mortal.account("take-norm", "rename", "take-relu")
    assert "SIGSEGV" in (of(told, "take-norm").alone_out.reason or "")
    assert of(told, "rename").alone_out.cost.value == pytest.approx(1.0)
    assert_it_adds_up(told)


def test_a_winner_that_can_t_be_run_any_more_is_a_reason_and_no_error(bench: Bench) -> None:
    class Broken(Here):
        def call(self, operation: str, timeout_s: float = 0.0, **parameters: Any) -> Any:
            if operation == "open":
                raise BackendError(f"{self.name}: no")
            return super().call(operation, timeout_s, **parameters)

    told = Bench(bench.folder / "broken", Broken).account("take-norm", "take-relu")
    assert told.whole.cost.value is None and told.whole.reason
    assert of(told, "take-norm").prefix.reason in (NO_BASE, f"{NO_BASE}; after take-relu: no", "after take-relu: no")
    assert told.reduced is None


def test_all_processes_are_closed(bench: Bench) -> None:
    made: list[Here] = []

    def worker(name: str) -> Here:
        made.append(Here(name))
        return made[-1]

    Bench(bench.folder / "counted", worker).account("take-norm", "drop-swap", "teach", "take-relu")
    assert len(made) > 4 and not [one.name for one in made if one.running]


# Ratios -------------------------------------------------------------------------------------------------------------------


def test_widths_of_intervals_add_up_in_squares() -> None:
    found = product(
        Ratio(0.5, 0.5 / math.e**0.03, 0.5 * math.e**0.03), Ratio(0.8, 0.8 / math.e**0.04, 0.8 * math.e**0.04)
    )
    assert found.value == pytest.approx(0.4)
    assert math.log(found.high / found.value) == pytest.approx(0.05) == math.log(found.value / found.low)
    assert product(Ratio(0.5), Ratio(None)) == Ratio(None) == product()
    assert product(Ratio(0.5), Ratio(0.5, 0.4, 0.6)) == Ratio(0.25)


def test_an_interval_moves_with_its_value() -> None:
    assert moved_to(Ratio(1.0, 0.9, 1.2), 0.5) == Ratio(0.5, 0.45, 0.6)
    assert moved_to(Ratio(None), 0.5) == Ratio(0.5) and moved_to(Ratio(1.0, 0.9, 1.2), None) == Ratio(None)


def drop(value: float, half: float = 0.2) -> metrics.Comparison:
    return metrics.Comparison(value, value - half, value + half, None, None, 200)


def test_changes_one_after_another() -> None:
    a = Change(Ratio(0.5, 0.49, 0.51), Ratio(0.6, 0.5, 0.7), 0.5, drop(1.0, 0.3))
    b = Change(Ratio(0.5, 0.49, 0.51), Ratio(0.6, 0.5, 0.7), 0.5, drop(-0.5, 0.4), "together with odd")
    both = together([a, Change(reason="it was refused", size=1.0), b])
    assert both.cost.value == 0.25 and both.size == 0.25 and both.drop is not None
    assert (both.drop.drop, both.drop.low, both.drop.high) == pytest.approx((0.5, 0.0, 1.0))
    assert both.reason == "it was refused; together with odd"
    unbounded = metrics.Comparison(1.0, -math.inf, math.inf, None, None, 200)
    found = together([replace(a, drop=unbounded), b]).to_json()["drop"]
    assert (found["value"], found["low"], found["high"]) == (0.5, None, None)


@pytest.mark.parametrize(
    ("change", "mends", "expected", "words"),
    [
        (Change(Ratio(0.9, 0.88, 0.92)), False, "earns its keep", "0.90× [0.88, 0.92] the CPU seconds"),
        (Change(Ratio(1.0, 0.99, 1.01), size=1.0), False, "brings nothing", "no difference beyond the noise"),
        (Change(Ratio(1.0, 0.99, 1.01), size=0.25), False, "earns its keep", "weights take 0.25×"),
        (Change(Ratio(1.0, 0.99, 1.01), Ratio(0.9, 0.8, 0.95)), False, "earns its keep", "a call takes 0.90×"),
        (Change(Ratio(1.1, 1.05, 1.15)), False, "costs", "1.10×"),
        (Change(Ratio(1.1, 1.05, 1.15), drop=drop(-1.0)), False, "for accuracy", "1 points more accurate; in its turn"),
        (Change(Ratio(1.0)), False, "not known", "too few windows"),
        (Change(reason="it was refused"), False, "not known", "it was refused"),
        (Change(Ratio(1.0, 1.0, 1.0), drop=drop(-1.0)), True, "for accuracy", "1 points more accurate with it"),
        (Change(Ratio(1.0, 1.0, 1.0), drop=drop(-0.1)), True, "for accuracy", "do not tell from chance"),
        (Change(Ratio(1.0, 1.0, 1.0), drop=drop(0.0)), True, "brings nothing", "no more accurate with it, on 200"),
    ],
)  # fmt: skip
def test_verdicts(change: Change, mends: bool, expected: str, words: str) -> None:
    share = Share("some-pass", [{}], change)
    found, why = verdict(share, mends, "CPU seconds per inference", " points")
    assert found == expected and words in why
    assert "with it" not in why or mends, "it was not left out"
    # The winner without it says more than its place in the order.
    other = replace(share, prefix=Change(Ratio(0.5, 0.4, 0.6)), alone_out=change)
    if change.cost.value is not None:
        assert verdict(other, mends, "CPU seconds per inference", " points")[0] == expected


# A real backend -------------------------------------------------------------------------------------------------------------


def test_on_a_real_backend_with_real_processes(tmp_path: Path, bench: Bench) -> None:
    from perwatt.isolation import Worker

    real = Bench(tmp_path / "real", Worker, backend="onnxruntime")
    told = real.account("take-norm", "drop-swap", effort=Effort(min_blocks=6, max_s=2.0))
    assert_it_adds_up(told)
    assert told.cost_is == "CPU seconds per inference" and told.seconds > 0
    for share in told.shares:
        for change in (share.prefix, share.alone_out):
            cost, latency = change.cost, change.latency
            assert cost.value and cost.low and cost.high and cost.low <= cost.value <= cost.high
            assert latency.value and 0.1 < latency.value < 10
    assert of(told, "drop-swap").prefix.drop is not None and of(told, "drop-swap").prefix.drop.drop > 30
