"""Choices of a search: which decisions a recipe's passes make, and which steps a choice stands for."""

from __future__ import annotations

import pytest

from perwatt import choices, registry
from perwatt.choices import Space
from perwatt.recipe import OneOf, PassStep

PLACES = {"openvino": ("bf16", "f32"), "onnxruntime": ("f32",)}


def step(name: str, **settings: object) -> PassStep:
    return PassStep(name=name, settings=settings)


def pruning(*extra: PassStep | OneOf) -> Space:
    steps = [step("fold-constants"), step("drop-blocks"), step("recover"), step("remove-dead"), *extra]
    return choices.space(steps, PLACES)


def names(space: Space, values: dict[str, int], minutes: float | None = None) -> list[str]:
    return [one.name for one in space.steps(values, minutes)]


def test_every_lossy_pass_and_every_alternative_is_a_decision() -> None:
    space = pruning(step("prune-channels"), OneOf(steps=[step("cast-half"), step("quantize-int8")]))
    assert [decision.name for decision in space.decisions] == [
        "backend", "floating precision", "drop-blocks", "prune-channels", "prune-channels multiple", "order", "learn",
        "precision",
    ]  # fmt: skip
    blocks = next(d for d in space.decisions if d.name == "drop-blocks")
    assert blocks.kind == "ordered" and blocks.values[:3] == ("none", "0.1", "0.2")
    assert next(d for d in space.decisions if d.name == "precision").values == ("none", "cast-half", "quantize-int8")


def test_without_a_choice_of_backend_and_precision_there_is_no_such_decision() -> None:
    space = choices.space([step("drop-blocks", ratio=0.3)], {"openvino": ("f32",)})
    assert [(d.name, d.values) for d in space.decisions] == [("drop-blocks", ("none", "yes"))]
    assert space.where({}) == ("openvino", "f32")


def test_the_usual_choice_is_the_lossless_passes() -> None:
    space = pruning()
    assert names(space, space.usual()) == ["fold-constants", "remove-dead"]


def test_what_is_removed_is_taught_back_as_long_as_was_decided() -> None:
    space = pruning()
    removed = {**space.usual(), "drop-blocks": 3}
    assert names(space, removed) == ["fold-constants", "drop-blocks", "remove-dead"]
    usual = space.steps({**removed, "learn": 1}, 2.0)
    assert [one.name for one in usual] == ["fold-constants", "drop-blocks", "recover", "remove-dead"]
    assert [one.settings for one in usual[1:3]] == [{"ratio": 0.3}, {"minutes": 2.0}]
    longer = space.steps({**removed, "learn": 2}, 2.0)
    # It goes on where the usual one ends, so that what that one learnt is not learnt again.
    assert longer[:3] == usual[:3] and longer[3].settings == {"minutes": 4.0}


def test_the_same_choice_untaught() -> None:
    space = pruning(step("tune-quantization"), OneOf(steps=[step("quantize-int8")]))
    taught = {**space.usual(), "drop-blocks": 2, "learn": 2, "precision": 1}
    assert space.untaught(taught) == {**taught, "learn": 0}
    assert space.removes(taught) and not space.removes(space.usual())


def test_ways_to_remove_are_a_decision_of_their_own_that_counts_where_something_is_removed() -> None:
    space = choices.space([step("prune-channels"), step("recover")], PLACES)
    usual = space.usual()
    assert [d.values for d in space.decisions if d.name == "prune-channels multiple"] == [("auto", "finer")]
    assert space.canonical({**usual, "prune-channels multiple": 1}) == usual
    finer = {**usual, "prune-channels": 1, "prune-channels multiple": 1}
    assert space.words(finer).startswith("prune-channels 0.07, prune-channels multiple finer")
    (made,) = [one for one in space.steps(finer) if one.name == "prune-channels"]
    assert made.settings == {"ratio": 0.07, "multiple": "finer"}
    taught = {**finer, "learn": 1}
    assert space.learning(taught) != space.learning({**usual, "prune-channels": 1, "learn": 1})
    fixed = choices.space([step("prune-channels", multiple=8), step("recover")], PLACES)
    assert all(d.name != "prune-channels multiple" for d in fixed.decisions)


def test_without_anything_that_mends_it_goes_at_once() -> None:
    space = choices.space([step("drop-blocks"), step("prune-channels")], PLACES)
    found = space.steps({**space.usual(), "drop-blocks": 2, "prune-channels": 1, "order": 1})
    assert [(one.name, one.settings["ratio"]) for one in found] == [("prune-channels", 0.07), ("drop-blocks", 0.2)]


def test_settings_of_the_recipe_are_not_searched() -> None:
    space = choices.space([step("drop-blocks", blocks=4), step("recover", steps=10)], {"null": ("f32",)})
    assert [d.values for d in space.decisions if d.name == "learn"] == [("none", "yes")]
    found = space.steps({**space.usual(), "drop-blocks": 1, "learn": 1}, 3.0)
    assert found[0].settings["blocks"] == 4 and found[-1].settings == {"steps": 10}


def test_what_makes_no_difference_is_said_in_one_way() -> None:
    space = pruning(step("prune-channels"), OneOf(steps=[step("quantize-int8")]), step("tune-quantization"))
    plain = space.usual()
    assert space.canonical({**plain, "order": 1, "learn": 1, "tune-quantization": 1}) == plain
    there = space.canonical({**plain, "backend": 1, "floating precision": 0})
    assert space.where(there) == ("onnxruntime", "f32") and there["floating precision"] == 1
    assert space.canonical({**plain, "drop-blocks": 99})["drop-blocks"] == 6
    every = list(space.all())
    assert len(every) == len({tuple(one.values()) for one in every}) and all(
        one == space.canonical(one) for one in every
    )


def test_which_choice_takes_more_of_the_same_away() -> None:
    space = pruning(step("prune-channels"))
    some = {**space.usual(), "drop-blocks": 2}
    assert space.lighter({**some, "drop-blocks": 3}, some)
    assert not space.lighter(some, some)
    assert not space.lighter(some, {**some, "drop-blocks": 3})
    assert not space.lighter({**some, "drop-blocks": 3, "learn": 1}, some)
    assert not space.lighter({**some, "prune-channels": 1}, some), "other channels gone is another network"


def test_how_often_a_choice_learns() -> None:
    space = pruning(OneOf(steps=[step("quantize-int8")]), step("tune-quantization"))
    assert space.learns(space.usual()) == 0
    assert space.learns({**space.usual(), "drop-blocks": 2, "learn": 2, "precision": 1, "tune-quantization": 1}) == 3


def test_words_name_what_was_decided() -> None:
    space = pruning(OneOf(steps=[step("quantize-int8", operators="all")]))
    assert space.words(space.usual()) == "lossless passes on openvino in bf16"
    values = {**space.usual(), "drop-blocks": 2, "learn": 2, "precision": 1, "floating precision": 1}
    assert space.words(values) == "drop-blocks 0.2, learn long, quantize-int8 (operators: all) on openvino in f32"


def test_the_default_of_a_search_has_what_wants_to_be_searched() -> None:
    everything = registry.names_in(choices.steps_to_search(learning=True, judged=True))
    assert {"drop-blocks", "prune-channels", "recover", "tune-quantization", "quantize-int8"} <= set(everything)
    assert everything.index("drop-blocks") < everything.index("prune-channels") < everything.index("recover")
    unlearnt = registry.names_in(choices.steps_to_search(learning=False, judged=True))
    assert "recover" not in unlearnt and "drop-blocks" in unlearnt
    unjudged = registry.names_in(choices.steps_to_search(learning=True, judged=False))
    assert "drop-blocks" not in unjudged


@pytest.mark.parametrize("name", [n for n, cls in registry.loadable_passes().items() if cls.searched])
def test_every_value_that_may_be_searched_is_a_setting_of_its_pass(name: str) -> None:
    cls = registry.pass_class(name)
    for setting, values in cls.searched.items():
        for value in values:
            assert getattr(registry.bind(PassStep(name=name, settings={setting: value})), setting) == value
