"""Plans: estimates are products of what was found of each part, what isn't known is said to be so, a kept plan is the same."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import yaml

from perwatt import choices, plan_words
from perwatt.choices import Space
from perwatt.cost_model import Estimate
from perwatt.errors import BackendError
from perwatt.plan import Factors, Foreseen, Layer, Part, Plan, product
from perwatt.planning_backend import Steps
from perwatt.recipe import OneOf, PassStep

sys.path.insert(0, str(Path(__file__).parent))
from runs import optimize, put_net

FLAGS = ("--target", "null", "--max-drop", "100", "--no-tune", "--data", "samples.npz", "--trials", "8")


def a_space() -> Space:
    alternatives = OneOf(steps=[PassStep(name="quantize-int8"), PassStep(name="assign-precision")])
    steps = [PassStep(name="drop-blocks"), PassStep(name="recover"), alternatives]
    return choices.space(steps, {"openvino": ("f32",), "onnxruntime": ("f32",)})


def some_factors(space: Space) -> Factors:
    return Factors(
        space,
        places={("openvino", "f32"): Estimate(1.0, 0.03)},
        alternatives={("openvino", 1): Estimate(0.5, 0.02), ("openvino", 2): "int8 was not measured"},
        removals={("openvino", "drop-blocks", 2): Estimate(0.8, 0.1)},
        rounded={("openvino", 1)},
    )


def test_an_estimate_is_the_product_of_its_parts_and_their_spreads_add_up() -> None:
    factors = some_factors(a_space())
    values = {"drop-blocks": 2, "precision": 1}
    found = factors.of(values)
    assert isinstance(found, Estimate) and found.value == pytest.approx(0.4)
    assert found.spread == pytest.approx(0.4 * math.hypot(0.03, 0.02 / 0.5, 0.1 / 0.8))
    assert Plan(factors).estimate(values) == pytest.approx(0.4)


def test_what_is_not_known_of_a_part_is_not_known_of_the_whole() -> None:
    factors = some_factors(a_space())
    assert factors.of({"precision": 2}) == "int8 was not measured"
    assert factors.of({"backend": 1}) == "the original was not measured on onnxruntime in f32"
    assert factors.of({"drop-blocks": 1, "precision": 2}) == "int8 was not measured; drop-blocks was not looked at"
    assert Plan(factors).estimate({"backend": 1}) is None


def test_a_product_of_nothing_is_one() -> None:
    assert product() == Estimate(1.0, 0.0)


def test_a_plan_that_was_kept_is_the_same_plan() -> None:
    space = a_space()
    values = space.canonical({"precision": 1})
    plan = Plan(
        some_factors(space), [Layer("/conv", "Conv", 0.1, None)], "", [Foreseen(values, "int8", Estimate(0.5, 0.1), 3.0)],
        "int8", [Part("planning", 1.0), Part("around the best", None)], 7, ["no samples"], ["profiling: no time"],
        {"openvino": {"basis": "profile", "operations": 9, "error": 0.1}}, 1.0,
    )  # fmt: skip
    again = Plan.from_json(space, json.loads(json.dumps(plan.to_json(), allow_nan=False)))
    assert again == plan and again.words() == plan.words()
    assert again.estimate({"drop-blocks": 2, "precision": 1}) == plan.estimate({"drop-blocks": 2, "precision": 1})


def test_words_tell_what_costs_least_first_and_count_the_rest() -> None:
    values = a_space().usual()
    one = [Foreseen(values, f"choice {i}", Estimate(0.1 * i, 0.01), 3.0) for i in range(1, 12)]
    unknown = [Foreseen(values, f"other {i}", None, 3.0, "nobody measured it") for i in range(2)]
    plan = Plan(Factors(a_space()), estimates=[*one, *unknown], parts=[Part("planning", 30.0)], trials=12)
    said = plan.words()
    assert said[1] == "  0.10× ± 0.01  choice 1, about 3.0 s to try"
    assert f"  and {11 - plan_words.ESTIMATES} more, up to 1.10×" in said
    assert "  not estimated: other 0 and 1 more: nobody measured it" in said
    assert "time: about 30 s, 12 trials or so" in said


def test_a_step_that_there_is_no_time_for_is_left_out_and_named() -> None:
    now = [0.0]
    steps = Steps(10.0, lambda text: None, lambda: now[0])

    def work() -> str:
        now[0] += 6.0
        return "done"

    assert steps.take("one", "kind", 3.0, work) == "done"
    assert steps.take("two", "kind", 3.0, work) is None
    assert steps.left_out == ["two: about 6 s, and 4 s of 10 s are left for it"]
    assert steps.take("three", "other", 3.0, work) == "done"


@pytest.mark.parametrize("error", [BackendError("it crashed"), ValueError("it crashed")])
def test_a_step_that_fails_costs_itself_and_not_the_search(error: Exception) -> None:
    steps = Steps(10.0, lambda text: None, lambda: 0.0)

    def work() -> None:
        raise error

    assert steps.take("profiling", "kind", 1.0, work) is None
    assert len(steps.left_out) == 1 and steps.left_out[0].endswith("it crashed")


# Whole plans ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    put_net(folder)
    return folder


def test_a_dry_run_of_a_search_ends_with_its_plan_and_writes_nothing(here: Path, tmp_path: Path) -> None:
    done = optimize("net.onnx", *FLAGS, "--out", tmp_path / "out", "--dry-run", cwd=here)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    # What is printed is a recipe, and leaves the choice of passes to the search.
    assert yaml.safe_load(done.stdout)["passes"] == "default"
    assert "# the plan:" in done.stdout and "#   time: about " in done.stdout


def test_the_plan_is_there_for_programs_too(here: Path, tmp_path: Path) -> None:
    done = optimize("net.onnx", *FLAGS, "--out", tmp_path / "out", "--dry-run", "--json", cwd=here)
    plan = json.loads(done.stdout)["plan"]
    assert any(one["choice"].startswith("lossless passes") for one in plan["estimates"])
    assert all(one["seconds"] > 0 for one in plan["estimates"])
    assert sum(part["seconds"] for part in plan["parts"] if part["seconds"] is not None) > 0
    assert {layer["kind"] for layer in plan["layers"]} == {"Conv", "Gemm"}


def test_without_a_search_there_is_no_plan(here: Path, tmp_path: Path) -> None:
    done = optimize("net.onnx", *FLAGS[:-1], "0", "--out", tmp_path / "out", "--dry-run", "--json", cwd=here)
    assert json.loads(done.stdout)["plan"] is None
