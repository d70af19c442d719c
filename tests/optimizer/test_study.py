"""The study's choices, on scripted sides: nothing here is run or measured, every cost and every answer is made up."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perwatt import screening, study
from perwatt.artifact import Artifact
from perwatt.candidates import Candidate, explore, ledger
from perwatt.contract import OperatingPoint
from perwatt.errors import BackendError
from perwatt.measurement import Ratio
from perwatt.pipeline import Row
from perwatt.recipe import Budget, OneOf, PassStep
from perwatt.study import Result
from perwatt.tune import Front, Trial
from perwatt.tuning import TunePlan

sys.path.insert(0, str(Path(__file__).parent))
from scripted import CLEAN, GRAPHS, JUDGED_ON, NAMES, SOURCE, Play, Stage, lossy


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


def graph(candidate: Candidate) -> str:
    return NAMES[candidate.branch.artifact.digest()]


def found(result: Result, name: str, precision: str = "f32") -> Candidate:
    return next(c for c in result.candidates if (graph(c), c.point.floating_precision) == (name, precision))


# What is shipped ------------------------------------------------------------------------------------------------


def test_the_fastest_within_the_budget_is_shipped(stage: Stage) -> None:
    stage.script = {("clean", "f32"): Play(0.8), ("int8", "f32"): Play(0.5), ("half", "f32"): Play(0.6)}
    result = stage.run(CLEAN, lossy("half"), lossy("int8"))
    assert (result.outcome, graph(result.winner)) == ("optimized", "int8")
    assert "2.00×" in result.reason
    assert list(result.sides) == ["original", "optimized"]
    assert result.comparison is not None and result.comparison.drop == 0 and result.comparison.n == JUDGED_ON
    assert found(result, "half").verdict == "runner-up"


def test_where_nothing_is_better_the_original_is_the_answer(stage: Stage) -> None:
    stage.script = {("clean", "f32"): Play(1.001), ("int8", "f32"): Play(1.4)}
    result = stage.run(CLEAN, lossy("int8"))
    assert (result.outcome, graph(result.winner)) == ("unchanged", "source")
    assert result.winner is result.baseline and list(result.sides) == ["original"]
    assert found(result, "int8").verdict == "rejected" and "no gain: 0.71×" in found(result, "int8").reason
    assert result.reason.startswith("nothing is faster: the best other answer (cleaned graph")


def test_a_gain_below_the_least_worth_keeping_is_not_shipped(stage: Stage) -> None:
    stage.script = {("clean", "f32"): Play(0.95)}
    assert stage.run(CLEAN).outcome == "optimized"
    stage.budget = Budget(min_gain=0.1, max_drop=1)
    result = stage.run(CLEAN)
    assert result.outcome == "unchanged" and "10% is the least worth keeping" in result.reason


def test_a_gain_that_does_not_come_again_in_fresh_processes_is_not_shipped(stage: Stage) -> None:
    stage.script = {("clean", "f32"): Play(0.5, final_ms=1.2)}
    result = stage.run(CLEAN)
    assert result.outcome == "unchanged"
    assert found(result, "clean").reason.startswith("no gain")


def test_the_next_best_is_tried_where_the_best_does_not_hold(stage: Stage) -> None:
    stage.script = {("int8", "f32"): Play(0.4, lost=(0.0, 0.05)), ("clean", "f32"): Play(0.8)}
    result = stage.run(CLEAN, lossy("int8"))
    assert (result.outcome, graph(result.winner)) == ("optimized", "clean")
    assert found(result, "int8").reason == "loses 5.00 points of 1 allowed (n = 400)"


def test_fewer_cpu_seconds_bought_with_a_longer_wait_are_not_shipped(stage: Stage) -> None:
    stage.script = {("source", "f32"): Play(1.0, wall_ms=0.5), ("clean", "f32"): Play(0.7, wall_ms=0.69)}
    result = stage.run(CLEAN)
    assert result.outcome == "unchanged"
    assert "fewer CPU seconds, but slower: 0.72×" in found(result, "clean").reason


def test_accuracy_lost_on_the_samples_chosen_on_rejects_whatever_the_speed(stage: Stage) -> None:
    stage.script = {("int8", "f32"): Play(0.1, lost=(0.02, 0.0))}
    result = stage.run(lossy("int8"))
    assert result.outcome == "unchanged"
    rejected = found(result, "int8")
    assert rejected.reason == "loses 2.00 points of 1 allowed (n = 200)"
    assert rejected.ratios["cpu_s_per_inference"].value == pytest.approx(0.1, rel=0.01), (
        "its speed is told all the same"
    )


def test_a_drop_of_exactly_the_budget_is_within_it(stage: Stage) -> None:
    stage.script = {("int8", "f32"): Play(0.5, lost=(0.01, 0.01))}
    assert stage.run(lossy("int8")).outcome == "optimized"


def test_proving_accuracy_asks_the_bound_to_hold_and_not_the_estimate(stage: Stage) -> None:
    stage.script = {("int8", "f32"): Play(0.5, lost=(0.0, 0.0075))}
    assert stage.run(lossy("int8")).outcome == "optimized"
    stage.budget = Budget(max_drop=1.0, prove_accuracy=True)
    result = stage.run(lossy("int8"))
    assert (result.outcome, graph(result.winner)) == ("unchanged", "source")
    assert "at the bound" in found(result, "int8").reason


def test_the_proof_is_asked_on_all_samples_and_not_on_the_few_of_screening(stage: Stage) -> None:
    stage.budget = Budget(max_drop=1.0, prove_accuracy=True)
    stage.script = {("int8", "f32"): Play(0.5)}
    result = stage.run(lossy("int8"))
    assert (result.outcome, graph(result.winner)) == ("optimized", "int8")


def test_the_original_as_it_is_needs_no_proof_of_its_own_accuracy(stage: Stage) -> None:
    stage.budget = Budget(max_drop=0.1, prove_accuracy=True)
    assert stage.run().outcome == "unchanged"


def test_without_samples_to_judge_on_nothing_lossy_is_shipped_but_its_speed_is_known(stage: Stage) -> None:
    stage.labelled = False
    stage.script = {("int8", "f32"): Play(0.1), ("clean", "f32"): Play(0.9)}
    result = stage.run(CLEAN, lossy("int8"))
    assert graph(result.winner) == "clean"
    assert "accuracy unknown" in found(result, "int8").reason and found(result, "int8").ratios
    assert result.comparison is None


@pytest.mark.parametrize("crash", ["opening", "measuring"])
def test_a_candidate_that_crashes_is_rejected_and_keeps_its_name(stage: Stage, crash: str) -> None:
    stage.script = {("int8", "f32"): Play(0.1, crash=crash), ("clean", "f32"): Play(0.8)}
    result = stage.run(CLEAN, lossy("int8"))
    assert graph(result.winner) == "clean"
    assert found(result, "int8").verdict == "rejected" and found(result, "int8").reason
    assert found(result, "int8").name == "quantize-int8, floating point in f32"


def test_a_candidate_that_crashes_when_measured_again_makes_room_for_the_next(stage: Stage) -> None:
    stage.script = {("int8", "f32"): Play(0.1, crash="final"), ("clean", "f32"): Play(0.8)}
    result = stage.run(CLEAN, lossy("int8"))
    assert graph(result.winner) == "clean"
    assert "SIGKILL" in found(result, "int8").reason


def test_a_candidate_beyond_the_latency_allowed_is_rejected(stage: Stage) -> None:
    stage.budget = Budget(p99_ms=2.0, max_drop=1)
    stage.script = {("int8", "f32"): Play(0.3, p99_ms=2.5), ("clean", "f32"): Play(0.8)}
    result = stage.run(CLEAN, lossy("int8"))
    assert (result.outcome, graph(result.winner)) == ("optimized", "clean")
    assert found(result, "int8").reason == "p99 latency is 2.50 ms, 0.50 ms over the 2 ms allowed"


def test_where_nothing_meets_the_latency_the_budget_is_not_met_and_the_best_is_kept(stage: Stage) -> None:
    stage.budget = Budget(p99_ms=0.1, max_drop=1)
    result = stage.run(CLEAN)
    assert (result.outcome, graph(result.winner)) == ("budget_not_met", "source")
    assert "0.90 ms over the 0.1 ms allowed" in result.reason


def test_a_candidate_that_takes_more_memory_than_allowed_is_not_shipped(stage: Stage) -> None:
    stage.budget = Budget(memory=1_000_000, max_drop=1)
    stage.script = {("clean", "f32"): Play(0.5, memory_bytes=2_000_000)}
    result = stage.run(CLEAN)
    assert result.outcome == "unchanged"
    assert found(result, "clean").reason == "takes 2 MB of memory, 1 MB are allowed"
    stage.script = {("source", "f32"): Play(1.0, memory_bytes=3_000_000)}
    result = stage.run()
    assert (result.outcome, result.reason) == ("budget_not_met", "takes 3 MB of memory, 1 MB are allowed")


def test_a_last_comparison_beside_a_busy_process_is_marked_as_disturbed(stage: Stage) -> None:
    stage.script = {("clean", "f32"): Play(0.5, other_share=0.6)}
    notes = [note for note in stage.run(CLEAN).notes if "disturbed" in note]
    assert len(notes) == 1 and notes[0].startswith("warning: this run was disturbed") and "other processes" in notes[0]
    stage.script = {("clean", "f32"): Play(0.5, other_share=0.0)}
    assert not [note for note in stage.run(CLEAN).notes if "disturbed" in note]


# The original -----------------------------------------------------------------------------------------------------


def test_the_original_runs_at_the_backends_default_unless_another_precision_is_clearly_better(stage: Stage) -> None:
    stage.precisions = ("bf16", "f32")
    stage.script = {("source", "f32"): Play(0.99)}
    result = stage.run()
    assert (result.outcome, result.baseline.point.floating_precision) == ("unchanged", "bf16")
    stage.script = {("source", "f32"): Play(0.8)}
    result = stage.run()
    assert result.baseline.point.floating_precision == "f32"
    assert any("it costs less than the backend's default" in note for note in result.notes)


def test_a_default_precision_that_loses_too_much_is_not_what_others_are_compared_with(stage: Stage) -> None:
    stage.precisions = ("bf16", "f32")
    stage.script = {
        ("source", "bf16"): Play(0.5, lost=(0.1, 0.1)),
        ("clean", "f32"): Play(0.8),
        ("clean", "bf16"): Play(0.3, lost=(0.1, 0.1)),
    }
    result = stage.run(CLEAN)
    assert result.baseline.point.floating_precision == "f32"
    assert (graph(result.winner), result.winner.point.floating_precision) == ("clean", "f32")
    assert any("loses too much accuracy" in note for note in result.notes)
    assert result.original_as_run == 1.0


def test_a_winner_at_another_precision_alone_is_not_compared_with_the_original_forced_into_it(stage: Stage) -> None:
    stage.precisions = ("bf16", "f32")
    stage.script = {("int8", "f32"): Play(0.4), ("int8", "bf16"): Play(0.6)}
    result = stage.run(lossy("int8"))
    assert result.winner.point.floating_precision == "f32" and result.baseline.point.floating_precision == "bf16"
    assert list(result.sides) == ["original", "optimized"]


def test_torch_eager_is_measured_beside_them_and_may_fail_without_harm(stage: Stage) -> None:
    stage.eager, stage.script = Play(5.0), {("clean", "f32"): Play(0.8)}
    result = stage.run(CLEAN)
    assert list(result.sides) == ["original", "torch eager", "optimized"]
    stage.eager = Play(crash="measuring")
    result = stage.run(CLEAN)
    assert result.outcome == "optimized" and list(result.sides) == ["original", "optimized"]
    assert any("torch eager could not be measured" in note for note in result.notes)


# Which candidates -------------------------------------------------------------------------------------------------


def pairs(candidates: Sequence[Candidate]) -> list[tuple[str, str | None]]:
    return [(graph(c), c.point.floating_precision) for c in candidates]


def originals(stage: Stage, slow: str | None = None) -> list[Candidate]:
    backend = stage.backend("null")
    made = [Candidate(SOURCE, OperatingPoint(floating_precision=p), backend) for p in stage.precisions]
    for candidate in made[1:]:
        candidate.ratios = {"cpu_s_per_inference": Ratio(2.0 if candidate.point.floating_precision == slow else 1.0)}
    return made


def test_each_graph_is_tried_once_at_each_precision_and_the_original_not_again(stage: Stage) -> None:
    stage.precisions = ("bf16", "f32")
    made = originals(stage)
    candidates = stage.screening().candidates({"null": [SOURCE, CLEAN, replace(CLEAN), lossy("int8")]}, made[0], made)
    assert pairs(candidates) == [("clean", "bf16"), ("clean", "f32"), ("int8", "bf16"), ("int8", "f32")]


def test_a_precision_that_is_slow_for_the_original_is_tried_on_lossy_graphs_only(stage: Stage) -> None:
    stage.precisions = ("bf16", "f32")
    made = originals(stage, slow="f32")
    candidates = stage.screening().candidates({"null": [SOURCE, CLEAN, lossy("int8")]}, made[0], made)
    assert pairs(candidates) == [("clean", "bf16"), ("int8", "bf16"), ("int8", "f32")]


def test_a_graph_without_float32_is_tried_at_the_default_precision_only(stage: Stage, monkeypatch) -> None:
    stage.precisions = ("bf16", "f32")
    monkeypatch.setattr(screening, "leaves_float32", lambda artifact: artifact is not GRAPHS["half"])
    made = originals(stage)
    branches = {"null": [SOURCE, lossy("half")]}
    assert pairs(stage.screening().candidates(branches, made[0], made)) == [("half", "bf16")]


# Which graphs -----------------------------------------------------------------------------------------------------


class ScriptedPipeline:
    """Each pass leads to the next graph of its own, or is refused."""

    def __init__(self, **leads: str) -> None:
        self.leads, self.asked = {name.replace("_", "-"): graph for name, graph in leads.items()}, []

    def step(self, artifact: Artifact, made_by: Any) -> tuple[Artifact, Row]:
        name = made_by.name()
        self.asked.append((NAMES[artifact.digest()], name))
        if name not in self.leads:
            return artifact, Row(name, {}, "refused", "not here")
        return GRAPHS[self.leads[name]], Row(name, {}, "applied")


def steps(*names: str) -> list[PassStep | OneOf]:
    return [
        OneOf(steps=[PassStep(name=n) for n in name.split("|")]) if "|" in name else PassStep(name=name)
        for name in names
    ]


def test_lossless_passes_make_one_branch_and_lossy_ones_never_replace_what_they_started_from() -> None:
    pipeline = ScriptedPipeline(fold_batchnorm="clean", cast_half="half", quantize_int8="int8")
    branches = explore(pipeline, GRAPHS["source"], steps("fold-batchnorm", "cast-half|quantize-int8"))
    assert [(NAMES[b.artifact.digest()], b.lossy) for b in branches] == [
        ("clean", False),
        ("half", True),
        ("int8", True),
    ]
    assert [b.applied() for b in branches] == [
        ["fold-batchnorm"],
        ["fold-batchnorm", "cast-half"],
        ["fold-batchnorm", "quantize-int8"],
    ]
    assert pipeline.asked == [("source", "fold-batchnorm"), ("clean", "cast-half"), ("clean", "quantize-int8")]


def test_a_lossy_pass_that_is_refused_makes_no_lossy_branch() -> None:
    branches = explore(ScriptedPipeline(), GRAPHS["source"], steps("quantize-int8"))
    assert [(NAMES[b.artifact.digest()], b.lossy) for b in branches] == [("source", False), ("source", False)]
    assert [row.status for row in branches[1].rows] == ["refused"]


def test_a_pass_that_mends_takes_the_place_of_what_it_mended() -> None:
    pipeline = ScriptedPipeline(drop_blocks="half", recover="int8")
    branches = explore(pipeline, GRAPHS["source"], steps("drop-blocks", "recover"))
    assert [(NAMES[b.artifact.digest()], b.lossy) for b in branches] == [("source", False), ("int8", True)]
    assert [b.applied() for b in branches] == [[], ["drop-blocks", "recover"]]
    assert pipeline.asked == [("source", "drop-blocks"), ("half", "recover")]


def test_where_nothing_was_lost_what_would_mend_it_says_so_once() -> None:
    pipeline = ScriptedPipeline()
    branches = explore(pipeline, GRAPHS["source"], steps("drop-blocks", "recover"))
    assert [[(row.name, row.status) for row in b.rows] for b in branches] == [
        [("recover", "refused")],
        [("drop-blocks", "refused")],
    ]


def test_a_lossless_pass_after_a_lossy_one_is_run_on_every_branch() -> None:
    pipeline = ScriptedPipeline(quantize_int8="int8")
    explore(pipeline, GRAPHS["source"], steps("quantize-int8", "fold-batchnorm"))
    assert pipeline.asked == [("source", "quantize-int8"), ("source", "fold-batchnorm"), ("int8", "fold-batchnorm")]


# The ledger -------------------------------------------------------------------------------------------------------


def test_the_ledger_tells_every_pass_once_the_winners_first_and_why_others_were_not_chosen(stage: Stage) -> None:
    stage.script = {
        ("int8", "f32"): Play(0.5),
        ("half", "f32"): Play(0.7, lost=(0.03, 0.03)),
        ("clean", "f32"): Play(0.8),
    }
    rows = {row.name: row for row in stage.run(CLEAN, lossy("half"), lossy("int8")).rows}
    assert list(rows) == ["fold-batchnorm", "quantize-int8", "cast-half"]
    assert rows["fold-batchnorm"].status == rows["quantize-int8"].status == "applied"
    assert rows["quantize-int8"].measured["inferences_per_cpu_s_ratio"]["value"] == pytest.approx(2, rel=0.01)
    assert rows["cast-half"].status == "not-chosen" and "loses 3.00 points" in rows["cast-half"].reason
    assert rows["cast-half"].measured["accuracy_drop"] == pytest.approx(3)


def test_in_the_ledger_of_an_unchanged_run_no_pass_counts_as_applied(stage: Stage) -> None:
    stage.script = {("clean", "f32"): Play(1.2), ("int8", "f32"): Play(0.5, lost=(0.5, 0.5))}
    rows = {row.name: row for row in stage.run(CLEAN, lossy("int8")).rows}
    assert {row.status for row in rows.values()} == {"not-chosen"}
    assert rows["fold-batchnorm"].reason == "the original graph ships" and "points" in rows["quantize-int8"].reason


def test_the_ledger_says_what_a_pass_stood_behind_and_whose_share_is_in_its_figures() -> None:
    pipeline = ScriptedPipeline(drop_blocks="half", recover="clean", quantize_int8="int8")
    branches = explore(pipeline, GRAPHS["source"], steps("drop-blocks", "recover", "quantize-int8"))
    backend: Any = SimpleNamespace(name="here", alone=True, decides="cpu_s_per_inference")
    winner = Candidate(branches[0], OperatingPoint(), backend)
    told = [(row.name, row.behind) for row in ledger(branches, winner, [])]
    assert told == [
        ("drop-blocks", []),
        ("recover", ["drop-blocks"]),
        ("quantize-int8", []),
        ("quantize-int8", ["drop-blocks", "recover"]),
    ]


# Several backends -------------------------------------------------------------------------------------------------


def test_an_alias_takes_the_backend_that_is_best_with_the_original_as_what_others_are_compared_with(
    stage: Stage,
) -> None:
    stage.backends = ("first", "second")
    stage.script = {("source", "second f32"): Play(0.5), ("clean", "second f32"): Play(0.49)}
    result = stage.run(CLEAN)
    assert (result.outcome, result.winner.backend.name) == ("unchanged", "second")
    assert any(note == "the original runs in second, f32: it costs less than first" for note in result.notes)
    assert result.winner.name == "original graph, floating point in f32 on second"


def test_an_alias_stays_with_its_first_backend_where_another_is_no_better_beyond_the_noise(stage: Stage) -> None:
    stage.backends = ("first", "second")
    stage.script = {("source", "second f32"): Play(0.999)}
    assert stage.run().winner.backend.name == "first"


def test_what_is_shipped_may_run_on_another_backend_than_the_original_does_best_on(stage: Stage) -> None:
    stage.backends = ("first", "second")
    stage.script = {
        ("source", "second f32"): Play(1.5),
        ("int8", "second f32"): Play(0.4),
        ("int8", "first f32"): Play(0.8),
    }
    result = stage.run(CLEAN, lossy("int8"))
    assert (graph(result.winner), result.winner.backend.name) == ("int8", "second")
    assert result.baseline.backend.name == "first"
    assert list(result.sides) == ["original", "original at the same point", "optimized"]


def test_passes_are_not_run_for_a_backend_that_is_far_behind(stage: Stage) -> None:
    stage.backends = ("first", "second")
    stage.script = {("source", "second f32"): Play(4.0)}
    asked: list[str] = []
    made = stage.study()
    made.explore = lambda backend: (asked.append(backend.name), [SOURCE])[1]
    made.run()
    assert asked == ["first"]


def test_a_backend_that_refuses_the_model_makes_room_for_the_next_and_is_told(stage: Stage) -> None:
    stage.backends = ("first", "second")
    stage.script = {("source", "first f32"): Play(crash="opening"), ("clean", "second f32"): Play(0.8)}
    result = stage.run(CLEAN)
    assert (graph(result.winner), result.winner.backend.name) == ("clean", "second")
    assert "warning: first does not take this model: original: the backend refused the model" in result.notes


def test_a_model_that_every_backend_refuses_is_an_error_with_all_their_words(stage: Stage) -> None:
    stage.backends = ("first", "second")
    stage.script = {("source", "f32"): Play(crash="opening")}
    with pytest.raises(BackendError, match="first: original: the backend refused the model; original: the backend ref"):
        stage.run()


# Operating points -------------------------------------------------------------------------------------------------


def tuned_to(point: OperatingPoint, cost: float) -> Any:
    """A search that ends at `point`, whose cost is that share of the start's."""

    def search(plan: Any, setup: Any, candidate: Candidate, budget: Any, progress: Any) -> Front:
        start = Trial(candidate.point, figures={"cpu_s_per_inference": 1.0})
        best = Trial(replace(point, floating_precision="f32"), ratios={"cpu_s_per_inference": Ratio(cost)})
        return Front(best, [start, best], cost=cost)

    return search


EIGHT = OperatingPoint(batch=8)


def test_a_graph_is_shipped_at_its_tuned_point_and_the_two_shares_are_told(stage: Stage, monkeypatch) -> None:
    monkeypatch.setattr(study, "tuned", tuned_to(EIGHT, 0.5))
    stage.script = {("int8", "f32"): Play(0.8), ("int8", "8 f32"): Play(0.4), ("source", "8 f32"): Play(0.5)}
    result = stage.run(lossy("int8"), plan=TunePlan())
    assert (graph(result.winner), result.winner.point.batch, result.outcome) == ("int8", 8, "optimized")
    assert list(result.sides) == ["original", "original at the same point", "optimized"]
    words = "2.50× the original's inferences per CPU second: 1.25× by the graph, 2.00× by the operating point"
    assert result.reason == words
    assert result.front is not None and result.front.best.point.batch == 8


def test_a_graph_that_brings_nothing_at_the_tuned_point_gives_way_to_the_originals_own(
    stage: Stage, monkeypatch
) -> None:
    monkeypatch.setattr(study, "tuned", tuned_to(EIGHT, 0.5))
    stage.script = {("int8", "f32"): Play(0.8), ("int8", "8 f32"): Play(0.4), ("source", "8 f32"): Play(0.4)}
    result = stage.run(lossy("int8"), plan=TunePlan())
    assert (graph(result.winner), result.winner.point.batch, result.outcome) == ("source", 8, "optimized")
    assert result.reason == "2.50× the original's inferences per CPU second, by the operating point alone"
    rejected = next(c for c in result.candidates if c.tuned and graph(c) == "int8")
    assert rejected.reason.startswith("the operating point is what brings it: its graph does 1.00×")


def test_where_no_graph_is_better_the_originals_own_operating_point_is_tuned(stage: Stage, monkeypatch) -> None:
    monkeypatch.setattr(study, "tuned", tuned_to(EIGHT, 0.5))
    stage.script = {("clean", "f32"): Play(1.1), ("source", "8 f32"): Play(0.5)}
    result = stage.run(CLEAN, plan=TunePlan())
    assert (graph(result.winner), result.winner.point.batch, result.outcome) == ("source", 8, "optimized")
    assert all(row.status != "applied" for row in result.rows)


def test_a_tuned_point_that_does_not_hold_when_measured_again_is_not_shipped(stage: Stage, monkeypatch) -> None:
    monkeypatch.setattr(study, "tuned", tuned_to(EIGHT, 0.5))
    stage.script = {("source", "8 f32"): Play(1.0)}
    result = stage.run(plan=TunePlan())
    assert (result.outcome, result.winner.point.batch) == ("unchanged", 1)


def test_where_tuning_has_a_time_of_its_own_it_is_kept_to(stage: Stage, monkeypatch) -> None:
    given: list[float] = []
    real = tuned_to(EIGHT, 0.5)

    def noted(plan: TunePlan, setup: Any, candidate: Candidate, *rest: Any) -> Front:
        given.append(plan.max_s)
        return real(plan, setup, candidate, *rest)

    monkeypatch.setattr(study, "tuned", noted)
    stage.script = {("int8", "f32"): Play(0.8), ("int8", "8 f32"): Play(0.4), ("source", "8 f32"): Play(0.5)}
    # As after a search whose time is up.
    for tune_by, batch in ((None, 1), (time.monotonic() + 30.0, 8), (time.monotonic() - 1.0, 1)):
        made = stage.study(plan=TunePlan(max_s=60.0))
        baseline, side, _ = made.screening.choose_baseline()
        candidate = Candidate(lossy("int8"), baseline.point, baseline.backend)
        made.screening.screen(candidate, side)
        side.close()
        made.deadline, made.tune_by = time.monotonic() - 1.0, tune_by
        chosen = made.tuned(baseline, [candidate])
        assert chosen[0].point.batch == batch
    assert len(given) == 1 and 25.0 < given[0] <= 30.0


def test_a_search_that_fails_costs_its_point_and_not_the_run(stage: Stage, monkeypatch) -> None:
    def fails(*given: Any) -> Front:
        raise BackendError("tuning: the worker was ended by SIGSEGV during open")

    monkeypatch.setattr(study, "tuned", fails)
    stage.script = {("clean", "f32"): Play(0.8)}
    result = stage.run(CLEAN, plan=TunePlan())
    assert (graph(result.winner), result.outcome) == ("clean", "optimized")
    assert any("could not be tuned: tuning: the worker was ended by SIGSEGV" in note for note in result.notes)


# What a reading of this code once found ---------------------------------------------------------------------------


def test_a_first_backend_that_compiles_and_does_not_run_makes_room_for_the_next(stage: Stage) -> None:
    stage.backends = ("first", "second")
    stage.script = {("source", "first f32"): Play(crash="measuring")}
    result = stage.run()
    assert result.winner.backend.name == "second"
    assert any(
        note.startswith("warning: first does not take this model: original: the worker was") for note in result.notes
    )


def test_a_backend_that_takes_too_much_memory_gives_way_to_one_that_fits(stage: Stage) -> None:
    stage.backends, stage.budget = ("first", "second"), Budget(memory=1_000_000, max_drop=1)
    stage.script = {
        ("source", "first f32"): Play(1.0, memory_bytes=2_000_000),
        ("source", "second f32"): Play(1.5, memory_bytes=900_000),
    }
    result = stage.run()
    assert (result.outcome, result.winner.backend.name) == ("unchanged", "second")
    assert "the original runs in second, f32: first takes more memory than allowed" in result.notes
    stage.script[("source", "second f32")] = Play(1.5, memory_bytes=1_900_000)
    result = stage.run()
    assert (result.outcome, result.winner.backend.name) == ("budget_not_met", "first")


def test_without_samples_no_lower_precision_than_the_backends_own_is_tried(stage: Stage) -> None:
    stage.precisions, stage.labelled = ("f32", "bf16"), False
    stage.script = {("source", "bf16"): Play(0.4), ("clean", "bf16"): Play(0.3)}
    result = stage.run(CLEAN)
    assert {c.point.floating_precision for c in result.candidates} == {"f32"}
    stage.precisions = ("bf16", "f32")
    assert {c.point.floating_precision for c in stage.run(CLEAN).candidates} == {"bf16", "f32"}


def test_a_backend_that_costs_less_and_is_slower_is_not_what_others_are_compared_with(stage: Stage) -> None:
    stage.backends = ("first", "second")
    stage.script = {("source", "first f32"): Play(1.0, wall_ms=0.5), ("source", "second f32"): Play(0.9, wall_ms=0.9)}
    assert stage.run().winner.backend.name == "first"


def test_a_backend_that_is_in_time_replaces_one_that_is_late_whatever_it_costs(stage: Stage) -> None:
    stage.backends, stage.budget = ("first", "second"), Budget(p99_ms=5.0, max_drop=1)
    stage.script = {("source", "first f32"): Play(1.0, p99_ms=9.0), ("source", "second f32"): Play(2.0, p99_ms=3.0)}
    result = stage.run()
    assert (result.outcome, result.winner.backend.name) == ("unchanged", "second")
    assert any("first is too slow for the latency allowed" in note for note in result.notes)


def test_a_spare_backend_is_opened_only_where_all_others_refuse(stage: Stage) -> None:
    stage.backends, stage.spare = ("first", "second"), ("second",)
    stage.run()
    assert not any("second" in side.label for side in stage.opened)
    stage.script = {("source", "first f32"): Play(crash="opening")}
    assert stage.run().winner.backend.name == "second"


def test_a_search_at_another_precision_is_not_the_front_of_what_is_shipped(stage: Stage, monkeypatch) -> None:
    stage.precisions = ("bf16", "f32")

    def search(plan: Any, setup: Any, candidate: Candidate, budget: Any, progress: Any) -> Front:
        start = Trial(candidate.point, figures={"cpu_s_per_inference": 1.0})
        best = Trial(replace(candidate.point, batch=8))
        return Front(best, [start, best], cost=0.5)

    monkeypatch.setattr(study, "tuned", search)
    stage.script = {
        ("int8", "bf16"): Play(0.5), ("int8", "8 bf16"): Play(0.2, lost=(0.0, 0.2)),
        ("int8", "f32"): Play(0.52), ("int8", "8 f32"): Play(0.25), ("source", "8 bf16"): Play(0.6),
        ("source", "8 f32"): Play(0.6),
    }  # fmt: skip
    result = stage.run(lossy("int8"), plan=TunePlan())
    assert (result.winner.point.floating_precision, result.winner.point.batch) == ("f32", 8)
    assert result.front is not None and result.front.trials[0].point.floating_precision == "f32"


def test_the_original_at_the_same_point_may_fail_without_harm(stage: Stage, monkeypatch) -> None:
    monkeypatch.setattr(study, "tuned", tuned_to(EIGHT, 0.5))
    stage.script = {
        ("int8", "f32"): Play(0.8),
        ("int8", "8 f32"): Play(0.4),
        ("source", "8 f32"): Play(crash="opening"),
    }
    result = stage.run(lossy("int8"), plan=TunePlan())
    assert (graph(result.winner), result.winner.point.batch) == ("int8", 8)
    assert list(result.sides) == ["original", "optimized"]
    assert any(note.startswith("original at the same point could not be measured") for note in result.notes)


def test_tuned_twins_that_lose_accuracy_don_t_use_up_the_tries_of_a_lossless_graph(stage: Stage, monkeypatch) -> None:
    monkeypatch.setattr(study, "tuned", tuned_to(EIGHT, 0.5))
    stage.script = {
        ("int8", "f32"): Play(0.4, lost=(0.0, 0.2)), ("int8", "8 f32"): Play(0.2, lost=(0.0, 0.2)),
        ("half", "f32"): Play(0.42, lost=(0.0, 0.2)), ("half", "8 f32"): Play(0.21, lost=(0.0, 0.2)),
        ("source", "8 f32"): Play(1.5), ("clean", "f32"): Play(0.8),
    }  # fmt: skip
    result = stage.run(CLEAN, lossy("half"), lossy("int8"), plan=TunePlan())
    assert (result.outcome, graph(result.winner)) == ("optimized", "clean")


def test_what_was_not_tried_for_lack_of_time_is_told(stage: Stage) -> None:
    made = stage.study(CLEAN)
    made.deadline = 0.0
    assert made.run().reason.endswith("no other answer was tried, of 1: out of time (--time)")
