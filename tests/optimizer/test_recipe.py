"""Recipes: what a file may say, what is told when it says something else, and that it comes back as it was written."""

import math

import pytest
import yaml

from perwatt.errors import InputError
from perwatt.recipe import OneOf, PassStep, Recipe, dump, load, parse

FULL = {
    "model": {"path": "m.pt", "arch": "net.py:net", "arch_args": {"k": 3}, "input": ["x:float32[3]"], "trust": True},
    "data": {
        "calibrate": "train/", "eval": "val/", "train": "train/", "confirm": "held/", "image": [32, 48], "resize": 40,
        "normalize": "imagenet", "text": ["a", "b"], "label": "c", "metric": "top1", "expect": 91.6, "max_samples": 100,
    },
    "inputs": {"x": {"dtype": "uint8", "layout": "NHWC", "scale": 0.5, "mean": [1.0, 2.0], "std": 3.0}},
    "budget": {"max_drop": 0.5, "p99_ms": 20.0, "min_gain": 0.05, "time": 600.0, "prove_accuracy": True,
               "memory": 500_000_000, "size": 5_000_000},
    "passes": ["fold-batchnorm", {"quantize-int8": {"exclude": ["/a/*"]}},
               {"one-of": ["cast-half", {"quantize-int8": {"subset_size": 8}}]}],
    "target": {"name": "cpu", "threads": 2, "scenario": "offline", "batch": 32, "precision": "f32", "tune": False, "on": "ssh://me@there",
               "allow_power_control": False},
    "search": {"objective": ["latency", "size"], "trials": 40},
    "seed": 7,
}  # fmt: skip
MODEL = {"model": {"path": "m.pt"}}


def refused(**parts):
    """What is told of a recipe with these parts, without the place; one line always."""
    with pytest.raises(InputError) as error:
        parse({**MODEL, **parts}, "r.yaml")
    words = str(error.value)
    assert "\n" not in words and words.startswith("r.yaml: ")
    return words.removeprefix("r.yaml: ")


# Round trips --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [FULL, MODEL, {**MODEL, "passes": []}, {**MODEL, "data": {"all": "samples.npz"}}])
def test_written_loaded_and_parsed_it_is_the_same_recipe(plain, tmp_path):
    recipe = parse(plain)
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    assert parse(load(tmp_path / "recipe.yaml")) == recipe
    assert dump(parse(load(tmp_path / "recipe.yaml"))) == dump(recipe)


def test_the_file_says_what_was_said():
    written = yaml.safe_load(dump(parse(FULL)))
    assert written == FULL | {"data": FULL["data"] | {"all": None}}


def test_a_model_is_all_that_is_needed():
    recipe = parse(MODEL)
    assert recipe.passes == "default" and recipe.target.name == "cpu" and recipe.budget.min_gain == 0.03
    assert recipe.budget.time is None and recipe.target.scenario == "single-stream"


def test_a_recipe_can_not_be_changed():
    with pytest.raises(Exception, match="frozen"):
        parse(MODEL).seed = 3


# Units --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("10min", 600), ("1h", 3600), ("250ms", 0.25), ("1.5 h", 5400), (30, 30), ("30", 30)],
)
def test_times_are_in_seconds_unless_they_say(text, seconds):
    assert parse({**MODEL, "budget": {"time": text}}).budget.time == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "ms"), [("20ms", 20), ("0.1s", 100), (".5s", 500), (20, 20), ("20", 20)])
def test_latencies_are_in_milliseconds_unless_they_say(text, ms):
    assert parse({**MODEL, "budget": {"p99_ms": text}}).budget.p99_ms == pytest.approx(ms)


@pytest.mark.parametrize(
    ("text", "share"), [("3%", 0.03), ("3 %", 0.03), ("0.03", 0.03), (0.03, 0.03), (0, 0), ("12.5%", 0.125)]
)
def test_gains_are_shares(text, share):
    assert parse({**MODEL, "budget": {"min_gain": text}}).budget.min_gain == pytest.approx(share)


def test_columns_may_be_one_text_or_a_list():
    assert (
        parse({**MODEL, "data": {"text": "a, b"}}).data.text == parse({**MODEL, "data": {"text": ["a", "b"]}}).data.text
    )


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"tagret": {}}, "unknown key in the recipe 'tagret': did you mean target"),
        ({"budget": {"tme": 3}}, "unknown key in budget 'tme': did you mean time?"),
        ({"model": {"path": "m", "pat": 1}}, "unknown key in model 'pat': did you mean path"),
        ({"target": {"thread": 1}}, "unknown key in target 'thread': did you mean threads?"),
        ({"inputs": {"x": {"dtyp": "uint8"}}}, "unknown key in inputs.x 'dtyp': did you mean dtype?"),
        ({"data": {"zzz": 1}}, "unknown key in data 'zzz': known are all, calibrate"),
    ],
)
def test_an_unknown_key_is_told_with_its_section_and_the_nearest_known(parts, words):
    assert refused(**parts).startswith(words)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"budget": {"time": "soon"}}, "budget.time: 'soon' is no time: write 90s, 10m or 1h"),
        ({"budget": {"time": "1.2.3"}}, "budget.time: '1.2.3' is no time: write 90s, 10m or 1h"),
        ({"budget": {"time": 0}}, "budget.time: Input should be greater than 0"),
        ({"budget": {"time": math.nan}}, "budget.time: Input should be greater than 0"),
        ({"budget": {"p99_ms": "20 MS"}}, "budget.p99_ms: '20 MS' is no latency: write 20ms or 0.1s"),
        ({"budget": {"min_gain": "-3%"}}, "budget.min_gain: '-3%' is no fraction: write 3% or 0.03"),
        ({"budget": {"min_gain": 3}}, "budget.min_gain: Input should be less than 1"),
        ({"budget": {"max_drop": -1}}, "budget.max_drop: Input should be greater than or equal to 0"),
        ({"budget": {"max_drop": True}}, "budget.max_drop: Input should be a valid number"),
        ({"target": {"threads": 0}}, "target.threads: Input should be greater than 0"),
        ({"target": {"threads": "2"}}, "target.threads: Input should be a valid integer"),
        ({"target": {"scenario": "server"}}, "target.scenario: Input should be 'single-stream' or 'offline'"),
        ({"data": {"image": "224"}}, "data.image: Input should be a valid integer"),
        ({"data": {"all": "a", "eval": "b"}}, "data.all is for one set that serves everything"),
        ({"seed": "x"}, "seed: Input should be a valid integer"),
    ],
)
def test_a_wrong_value_is_told_with_its_key(parts, words):
    assert refused(**parts).startswith(words)


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("fold-batchnorm", "'fold-batchnorm' is no pipeline: write default, or a list"),
        (None, "None is no pipeline"),
        ([3], "3 is no pass"),
        ([{"a": {}, "b": {}}], "{'a': {}, 'b': {}} is no pass"),
        ([{"quantize-int8": 3}], "{'quantize-int8': 3} is no pass"),
        ([{3: {}}], "{3: {}} is no pass"),
        ([{"one-of": None}], "one-of wants a list of passes to choose from, it was given None"),
        ([{"one-of": "abc"}], "one-of wants a list of passes to choose from, it was given 'abc'"),
        ([{"one-of": []}], "one-of wants a list of passes to choose from, it was given []"),
        ([{"one-of": [{"one-of": ["a"]}]}], "one-of wants a list of passes to choose from"),
    ],
)
def test_a_wrong_step_is_told_in_one_line(passes, words):
    assert refused(passes=passes).startswith(f"passes: {words}")


def test_no_model_is_told():
    with pytest.raises(InputError, match=r"recipe: model: Field required"):
        parse({})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no recipe"),
        ("a: [", "is not YAML"),
        ("just text", "is no recipe — start from"),
        ("", "is no recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_in_one_line(content, words, tmp_path):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=words) as error:
        load(path)
    assert "\n" not in str(error.value) and "recipe.yaml" in str(error.value)


def test_steps_have_three_spellings():
    steps = parse({**MODEL, "passes": ["a", {"b": None}, {"c": {"k": 1}}, {"one-of": ["d", {"e": {}}]}]}).passes
    assert steps == [
        PassStep(name="a"), PassStep(name="b"), PassStep(name="c", settings={"k": 1}),
        OneOf(steps=[PassStep(name="d"), PassStep(name="e")]),
    ]  # fmt: skip
    assert isinstance(parse({**MODEL, "passes": steps}), Recipe)


@pytest.mark.parametrize(
    ("written", "read"),
    [("500MB", 500_000_000), ("2GiB", 2 << 30), ("1.5k", 1500), (" 3 MiB", 3 << 20), (12345, 12345), ("64", 64)],
)
def test_memory_is_read_in_the_units_that_people_write(written, read):
    assert parse({**MODEL, "budget": {"memory": written}}).budget.memory == read


@pytest.mark.parametrize("written", ["lots", "5 apples", -1, 0, "MB"])
def test_memory_that_is_none_is_refused(written):
    assert refused(budget={"memory": written}).startswith("budget.memory: ")
