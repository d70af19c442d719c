"""`Judge.quick_drop`: stops when it is clear, says what all samples would say, runs no sample twice; on real programs."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from runs import CLASSES, put_net

from perwatt import metrics
from perwatt.artifact import Artifact
from perwatt.contract import OperatingPoint
from perwatt.data import Samples
from perwatt.errors import BackendError
from perwatt.evaluation import Evaluation
from perwatt.isolation import Worker
from perwatt.judging import Judge
from perwatt.recipe import Budget
from perwatt.sides import Side
from perwatt.signature import Batch, rows
from perwatt.worker import _store, load_outputs

COUNT = 600


class Watched:
    """A worker of whose questions the samples that were run are counted. Each is known by its first number."""

    def __init__(self, worker: Any) -> None:
        self.worker, self.ran = worker, []

    def call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        if operation == "predict":
            samples = Samples.load(Path(parameters["samples"]))
            self.ran += [
                float(item) for batch in samples for item in next(iter(batch.values())).reshape(rows(batch), -1)[:, 0]
            ]
        return self.worker.call(operation, **parameters)

    def close(self) -> None:
        self.worker.close()


class Made:
    """A worker whose program is a function of a batch."""

    def __init__(self, program: Any) -> None:
        self.program = program

    def call(self, operation: str, samples: str, out: str) -> dict[str, Any]:
        assert operation == "predict"
        return {"batches": _store((self.program(batch) for batch in Samples.load(Path(samples))), Path(out))}


class Bench:
    """A net with samples of which it gets nine in ten right, and one worker for all candidates."""

    def __init__(self, folder: Path, worker: Worker) -> None:
        self.folder, self.worker = folder, worker
        self.model = onnx.load(put_net(folder, COUNT))
        with np.load(folder / "samples.npz") as archive:
            self.samples = Samples([{"x": archive["x"]}], archive["labels"].astype(np.int64))
        self.samples.save(folder / "select")
        side = self.side(self.model)
        side.worker.call("predict", samples=str(folder / "select"), out=str(folder / "fp32"))
        self.reference = load_outputs(folder / "fp32")

    def side(self, model: onnx.ModelProto, batch: int = 1) -> Side:
        """The model opened, its worker watched."""
        point = OperatingPoint(batch=batch, floating_precision="f32")
        artifact = Artifact(model=ir.from_proto(model))
        side = Side.lowered("candidate", "onnxruntime", artifact, point, self.folder, self.worker)
        side.worker = Watched(side.worker)
        return side

    def damaged(self, noise: float) -> onnx.ModelProto:
        """The net with noise on its last weights."""
        changed = onnx.ModelProto()
        changed.CopyFrom(self.model)
        weight = next(w for w in changed.graph.initializer if w.name == "fc.weight")
        values = numpy_helper.to_array(weight)
        values = values + noise * np.random.default_rng(0).standard_normal(values.shape).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(values, "fc.weight"))
        return changed

    def judge(self, max_drop: float = 1.0, metric: str | None = None) -> Judge:
        chosen = metrics.resolve(metric, self.samples, self.reference)
        return judge_on(self.samples, self.folder / "select", self.reference, chosen, max_drop, self.folder)


def judge_on(
    samples: Samples, folder: Path, reference: list[Batch], metric: metrics.Metric, max_drop: float, scratch: Path
) -> Judge:
    original = metric.score(reference, samples, reference)
    evaluation = Evaluation(metric, samples, folder, reference, original)
    return Judge(Budget(), max_drop, evaluation, evaluation, scratch)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with Worker("candidates") as worker:
        yield Bench(tmp_path_factory.mktemp("bench"), worker)


# On real programs -----------------------------------------------------------------------------------------------------


def test_what_clearly_loses_too_much_is_told_from_a_few_samples(bench: Bench) -> None:
    judge, side = bench.judge(), bench.side(bench.damaged(1.0))
    comparison, complete = judge.quick_drop(side)
    assert not complete
    assert judge.too_much(comparison)
    assert comparison.n == len(side.worker.ran) <= 96
    whole = judge.drop_on_select(bench.side(bench.damaged(1.0)))
    assert whole.n == COUNT
    assert judge.too_much(whole)


def test_what_changes_nothing_is_told_before_all_samples_are_seen(bench: Bench) -> None:
    judge, side = bench.judge(), bench.side(bench.model)
    comparison, complete = judge.quick_drop(side)
    assert not complete
    assert not judge.too_much(comparison)
    assert comparison.drop == 0
    assert comparison.flips_lost == comparison.flips_gained == 0
    assert comparison.n == len(side.worker.ran) < COUNT / 2


def test_what_is_doubtful_sees_all_samples_once_and_is_what_the_whole_says(bench: Bench) -> None:
    whole = bench.judge().drop_on_select(bench.side(bench.damaged(0.05)))
    # It loses as much as is allowed.
    judge, side = bench.judge(max_drop=whole.drop), bench.side(bench.damaged(0.05))
    assert judge.quick_drop(side) == (whole, True)
    assert not judge.too_much(whole)
    assert sorted(side.worker.ran) == sorted(float(item) for item in bench.samples.chunks[0]["x"][:, 0, 0, 0])


@pytest.mark.parametrize("metric", ["agreement", "cosine", "top5"])
def test_going_on_to_all_samples_runs_only_those_that_are_left(bench: Bench, metric: str) -> None:
    judge, side = bench.judge(0.01 if metric == "cosine" else 1.0, metric), bench.side(bench.damaged(0.3))
    seen, complete = judge.quick_drop(side)
    assert (seen.n < COUNT) == (not complete)
    whole = judge.drop_on_select(side)
    assert len(side.worker.ran) == len(set(side.worker.ran)) == whole.n == COUNT
    assert whole == judge.drop_on_select(bench.side(bench.damaged(0.3)))
    assert judge.quick_drop(side) is not None, "asked again it needs no program"
    assert len(side.worker.ran) == COUNT


@pytest.mark.parametrize("batch", [7, 64])
def test_a_program_of_a_fixed_batch_says_the_same(bench: Bench, batch: int) -> None:
    judge = bench.judge()
    one, whole = judge.quick_drop(bench.side(bench.damaged(1.0)))
    assert judge.quick_drop(bench.side(bench.damaged(1.0), batch)) == (one, whole)


def test_portions_are_saved_once_for_all_candidates_and_nothing_else_is_left(bench: Bench, tmp_path: Path) -> None:
    judge = bench.judge()
    folder = bench.samples.save(tmp_path / "select")
    judge.select.folder, judge.folder = folder, tmp_path / "scratch"
    judge.folder.mkdir()
    judge.quick_drop(bench.side(bench.damaged(1.0)))
    portions = sorted((tmp_path / "select-portions").iterdir())
    assert portions, "only those that were needed"
    assert len(portions) < len(judge.select.portions)
    before = {path: path.stat().st_mtime_ns for portion in portions for path in portion.iterdir()}
    judge.quick_drop(bench.side(bench.damaged(1.0)))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list(judge.folder.iterdir())


def test_a_program_that_fails_raises_and_can_be_asked_again(bench: Bench) -> None:
    judge, side = bench.judge(), bench.side(bench.damaged(1.0))
    bench.worker.kill()
    with pytest.raises(BackendError):
        judge.quick_drop(side)
    side.load()
    comparison, _ = judge.quick_drop(side)
    assert judge.too_much(comparison)


# On programs that are functions -----------------------------------------------------------------------------------------


def numbered(lengths: list[int], labels: bool = True) -> Samples:
    """Item i, which is in the chunk of its length, begins with the number i."""
    chunks, first = [], 0
    for length, count in enumerate(lengths, 2):
        x = np.random.default_rng(length).standard_normal((count, length)).astype(np.float32)
        x[:, 0] = np.arange(first, first + count)
        chunks.append({"x": x})
        first += count
    return Samples(chunks, np.arange(first) % CLASSES if labels else None, batch_size=5)


def truth(batch: Batch) -> Batch:
    """Right for every item."""
    return {"y": np.eye(CLASSES, dtype=np.float32)[batch["x"][:, 0].astype(int) % CLASSES]}


def wrong_for(items: Any) -> Any:
    """A program that is right but for these items."""

    def run(batch: Batch) -> Batch:
        wrong = np.isin(batch["x"][:, 0], items)
        return {"y": np.where(wrong[:, None], np.roll(truth(batch)["y"], 1, axis=1), truth(batch)["y"])}

    return run


def side_of(program: Any, batch: int | None = None) -> Any:
    facts = {} if batch is None else {"operating_point": {"batch": batch}}
    return SideOf(worker=Watched(Made(program)), facts=facts)


class SideOf(SimpleNamespace):
    """A side of which only the worker and the facts are asked."""

    __hash__ = object.__hash__


def made_judge(
    samples: Samples, folder: Path, metric: str = "top1", max_drop: float = 1.0, program: Any = truth
) -> Judge:
    reference = [program(batch) for batch in samples]
    chosen = metrics.resolve(metric, samples, reference)
    return judge_on(samples, samples.save(folder / "select"), reference, chosen, max_drop, folder)


def test_samples_of_several_shapes_are_judged_by_their_own_labels(tmp_path: Path) -> None:
    judge = made_judge(numbered([100, 150, 250]), tmp_path)
    order = judge.select.order
    wrong = order[[3, 40, 70, 300]]
    comparison, complete = judge.quick_drop(side_of(wrong_for(wrong)))
    assert comparison.flips_lost == np.isin(wrong, order[: comparison.n]).sum()
    assert complete == (comparison.n == 500)
    side = side_of(wrong_for(wrong))
    judge.quick_drop(side)
    assert judge.drop_on_select(side) == judge.drop_on_select(side_of(wrong_for(wrong)))
    assert judge.drop_on_select(side).flips_lost == 4


def test_portions_are_not_used_where_they_take_many_more_calls(tmp_path: Path) -> None:
    judge = made_judge(numbered([12] * 40), tmp_path)
    everything = side_of(wrong_for(np.arange(480)), batch=32)
    comparison, complete = judge.quick_drop(everything)
    assert complete
    assert comparison.n == len(everything.worker.ran) == 480
    assert not (tmp_path / "select-portions").exists()
    one_by_one = side_of(wrong_for(np.arange(480)), batch=1)
    assert judge.quick_drop(one_by_one)[0].n == len(one_by_one.worker.ran) == 32


def test_what_was_clear_on_the_way_but_is_no_more_is_looked_at_further(tmp_path: Path) -> None:
    # Two of the first two are too many beyond doubt, two of 32 are not.
    judge = made_judge(numbered([500]), tmp_path, "agreement", max_drop=6.4)
    side = side_of(wrong_for(judge.select.order[:2]))
    comparison, _ = judge.quick_drop(side)
    assert comparison.n > 32
    assert not judge.too_much(comparison)


def test_the_budget_itself_may_be_lost(tmp_path: Path) -> None:
    judge = made_judge(numbered([500]), tmp_path)
    for lost, too_much in ((5, False), (6, True)):
        side = side_of(wrong_for(judge.select.order[60 + 80 * np.arange(lost)]))
        comparison, _ = judge.quick_drop(side)
        assert comparison.flips_lost == lost
        assert judge.too_much(comparison) == judge.too_much(judge.drop_on_select(side)) == too_much


def test_errors_without_a_bound_are_told_early_only_where_they_are_too_large(tmp_path: Path) -> None:
    samples = Samples([{"x": np.arange(500, dtype=np.float32)[:, None]}], np.zeros((500, 1), np.float32))
    judge = made_judge(samples, tmp_path, "mse", 0.01, lambda batch: {"y": 0.1 * (batch["x"] % 3)})
    assert judge.quick_drop(side_of(lambda batch: {"y": 0.1 * (batch["x"] % 3) + 1}))[0].n < 500
    assert judge.quick_drop(side_of(lambda batch: {"y": np.full_like(batch["x"], np.nan)}))[0].n < 500
    comparison, complete = judge.quick_drop(side_of(lambda batch: {"y": 0.1 * (batch["x"] % 3)}))
    assert complete
    assert comparison.drop == 0


def test_what_is_not_scored_sample_by_sample_is_judged_on_all(tmp_path: Path) -> None:
    (tmp_path / "metric.py").write_text("def right(outputs, labels): return (outputs['y'].argmax(1) == labels) * 1.0\n")
    single = Samples([{"x": np.arange(300, dtype=np.float32)[:, None]}], np.arange(300) % 2)
    own = made_judge(numbered([300]), tmp_path / "own", f"{tmp_path / 'metric.py'}:right")
    calls, shared = (made_judge(numbered([300]), tmp_path / name) for name in ("calls", "shared"))
    calls.select.whole_calls = True
    shared.select.samples.chunks[0]["scale"] = np.ones(7, np.float32)

    def number(batch: Batch) -> Batch:
        return {"y": batch["x"][:, 0] % 2}

    yes_or_no = made_judge(single, tmp_path / "single", "top1", 1.0, number)
    for judge, program in ((own, truth), (calls, truth), (shared, truth), (yes_or_no, number)):
        side = side_of(program)
        comparison, complete = judge.quick_drop(side)
        assert complete
        assert comparison.n == len(side.worker.ran) == 300


def test_without_samples_nothing_is_known(tmp_path: Path) -> None:
    assert Judge(Budget(), 1.0, None, None, tmp_path).quick_drop(side_of(truth)) is None


# Portions -----------------------------------------------------------------------------------------------------------------

METRICS = ("top1", "top5", "agreement", "cosine", "mse")


def noisy(noise: float) -> Any:
    """Class scores, close to right or not."""

    def run(batch: Batch) -> Batch:
        number = batch["x"][:, 0].astype(int)
        draws = np.random.default_rng(0).standard_normal((600, CLASSES + 4)).astype(np.float32)[number]
        return {"y": np.eye(CLASSES + 4, dtype=np.float32)[number % CLASSES] + noise * draws}

    return run


@given(st.lists(st.integers(1, 120), min_size=1, max_size=5), st.sampled_from(METRICS), st.booleans())
def test_scores_of_portions_are_those_of_the_whole(lengths: list[int], name: str, labels: bool) -> None:
    made = numbered(lengths, labels or name.startswith("top"))
    if name == "mse" and labels:
        made = Samples(
            made.chunks, np.random.default_rng(1).standard_normal((len(made), CLASSES + 4)).astype(np.float32)
        )
    with TemporaryDirectory() as folder:
        judge = made_judge(made, Path(folder), name, 1.0, noisy(0.2))
        select = judge.select
        parts = [
            select.portion_scores(
                portion, [noisy(0.6)(batch) for batch in Samples.load(select.portion_folder(portion))]
            )
            for portion in select.portions
        ]
    scores = np.concatenate(parts)
    whole = select.score([noisy(0.6)(batch) for batch in made])
    assert (scores == whole.per_sample[select.order]).all()
    assert select.compare_scores(scores) == metrics.compare(select.metric, select.original, whole)
    losses, (low, high) = select.losses(scores), select.loss_range
    assert ((losses >= low) & (losses <= high)).all()
    assert losses.mean() * (100 if select.metric.unit == "fraction" else 1) == pytest.approx(
        select.compare_scores(scores).drop
    )


@given(st.integers(1, 5000))
def test_portions_are_all_samples_once_and_grow(count: int) -> None:
    evaluation = Evaluation(
        metrics.TopK(1), Samples([{"x": np.zeros((count, 1))}]), Path(), [], metrics.Score(0, None, count)
    )
    found = evaluation.portions
    assert np.concatenate([evaluation.order[portion] for portion in found]).tolist() == evaluation.order.tolist()
    assert sorted(evaluation.order) == list(range(count))
    sizes = [portion.stop - portion.start for portion in found]
    assert all(size % 32 == 0 for size in sizes[:-1])
    assert all(after.stop <= 2 * after.start + 32 for after in found[1:])
    assert len(found) <= 4 + math.log(max(count, 32) / 32, 1.5)


def test_a_portion_whose_saving_was_stopped_is_saved_again(tmp_path: Path) -> None:
    judge = made_judge(numbered([100]), tmp_path)
    portion = judge.select.portions[0]
    folder = judge.select.portion_folder(portion)
    (folder / "index.json").unlink()
    (folder / "0-0.npy").write_bytes(b"half")
    assert len(Samples.load(judge.select.portion_folder(portion))) == portion.stop
