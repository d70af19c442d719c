"""What a search for an operating point may vary, and what is remembered of it, on scripted sides."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perwatt.backends import Backend
from perwatt.candidates import Branch, Candidate
from perwatt.contract import OperatingPoint
from perwatt.measuring import Conductor
from perwatt.recipe import Budget
from perwatt.setup import Setup
from perwatt.tune import Front
from perwatt.tuning import TunePlan, tuned

sys.path.insert(0, str(Path(__file__).parent))
from models import build, node
from scripted import SOURCE
from test_tune import KNOBS, ScriptedSide, plain

START = OperatingPoint("offline", batch=32)
BACKEND = Backend("scripted", knobs=KNOBS, versions={"scripted": "1.0"})


class ScriptedSetup(Setup):
    """Opens scripted sides."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder, Conductor())
        self.points: list[OperatingPoint] = []

    def open(self, label: str, candidate: Candidate, worker: Any = None) -> Any:
        self.points.append(candidate.point)
        side = ScriptedSide(candidate.point, plain, len(self.points))
        side.prepare = lambda samples, warm_up_s, most_s=None: None  # type: ignore[attr-defined]
        return side


@pytest.fixture
def plan(tmp_path: Path) -> TunePlan:
    return TunePlan(cache=tmp_path / "cache" / "tune", machine={"name": "scripted"})


def search(
    plan: TunePlan, folder: Path, backend: Backend = BACKEND, start: OperatingPoint = START, source: Branch = SOURCE
) -> tuple[Front | None, list]:
    setup = ScriptedSetup(folder)
    front = tuned(plan, setup, Candidate(source, start, backend), Budget(), lambda share, text: None)
    return front, setup.points


def test_fields_that_the_recipe_sets_stay_as_they_are(plan: TunePlan, tmp_path: Path) -> None:
    _, points = search(replace(plan, fixed=frozenset({"threads", "batch"})), tmp_path, start=replace(START, threads=2))
    assert {p.threads for p in points} == {2} and {p.batch for p in points} == {32}
    assert len({p.streams for p in points}) > 1


def test_a_batch_that_the_model_fixes_is_not_varied(plan: TunePlan, tmp_path: Path) -> None:
    model = build([node("Relu", "x", "y")], "x:float32[32,3]", "y:float32[32,3]")
    _, points = search(plan, tmp_path, source=Branch(model))
    assert {p.batch for p in points} == {32} and len(points) > 1


def test_where_nothing_may_vary_nothing_is_opened(plan: TunePlan, tmp_path: Path) -> None:
    assert search(plan, tmp_path, replace(BACKEND, knobs={})) == (None, [])
    assert search(replace(plan, fixed=frozenset(KNOBS)), tmp_path) == (None, [])
    assert search(plan, tmp_path, replace(BACKEND, knobs={"threads": [2]})) == (None, [])


def test_the_next_search_begins_where_the_last_one_ended(plan: TunePlan, tmp_path: Path) -> None:
    first, many = search(plan, tmp_path)
    again, few = search(plan, tmp_path)
    assert first is not None and again is not None and again.best.point == first.best.point
    assert few == [START, first.best.point] and len(many) > len(few)
    assert {t.point for t in again.trials} == {t.point for t in first.trials}, "the front is as rich as it was"
    assert [t.point for t in again.undominated()] == [t.point for t in first.undominated()]


@pytest.mark.parametrize("change", ["versions", "machine", "name", "fixed"])
def test_what_was_found_elsewhere_does_not_count(plan: TunePlan, tmp_path: Path, change: str) -> None:
    search(plan, tmp_path)
    backend = {
        "versions": replace(BACKEND, versions={"scripted": "1.1"}), "name": replace(BACKEND, name="scripted:other"),
    }.get(change, BACKEND)  # fmt: skip
    other = {"machine": {"machine": {"name": "other"}}, "fixed": {"fixed": frozenset({"pinned"})}}.get(change, {})
    _, points = search(replace(plan, **other), tmp_path, backend)
    assert len(points) > 4


def test_a_cache_that_is_damaged_or_can_t_be_written_costs_nothing_but_the_head_start(
    plan: TunePlan, tmp_path: Path
) -> None:
    assert plan.cache is not None
    search(plan, tmp_path)
    (kept,) = plan.cache.iterdir()
    for text in ("{", "[]", '{"best": {"nonsense": 1}}', json.dumps({"best": None})):
        kept.write_text(text)
        front, points = search(plan, tmp_path)
        assert front is not None and len(points) > 4
    (tmp_path / "file").write_text("")
    front, _ = search(replace(plan, cache=tmp_path / "file" / "tune"), tmp_path)
    assert front is not None and front.best.point.batch == 8


def test_a_search_that_was_cut_short_is_not_remembered(plan: TunePlan, tmp_path: Path) -> None:
    front, _ = search(replace(plan, max_s=0.0), tmp_path)
    assert front is not None and not front.complete
    assert plan.cache is not None and not list(plan.cache.glob("*.json"))
