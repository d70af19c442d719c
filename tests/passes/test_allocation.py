"""Which layers to quantize: the solver against trying every subset, its budget, and what it does with odd figures."""

import math
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from perwatt.passes._allocation import Border, Layer, allocate, gain

SECONDS = st.integers(0, 50).map(lambda count: count * 1e-6)
DAMAGES = st.one_of(st.just(0.0), st.integers(1, 200).map(lambda count: count * 1e-3))


@st.composite
def problems(draw, most=7):
    """(layers, borders, budget): seconds of the order of microseconds, borders between any two."""
    count = draw(st.integers(0, most))
    names = [f"/layer{number}" for number in range(count)]
    layers = [Layer(name, draw(SECONDS), draw(SECONDS), draw(DAMAGES)) for name in names]
    pairs = draw(st.lists(st.tuples(*[st.sampled_from(names)] * 2), max_size=8)) if count else []
    borders = [Border(first, second, draw(SECONDS)) for first, second in pairs]
    # Between two sums of damages, so that no rounding of the solver's decides.
    whole = draw(st.one_of(st.none(), st.integers(0, 700)))
    return layers, borders, math.inf if whole is None else (whole + 0.5) * 1e-3 if whole else 0.0


def damage(layers, chosen):
    return sum(layer.damage for layer in layers if layer.name in chosen)


def best_of_all(layers, borders, budget):
    """The largest gain of any subset within the budget."""
    names = [layer.name for layer in layers]
    subsets = (frozenset(some) for size in range(len(names) + 1) for some in combinations(names, size))
    return max(gain(layers, borders, some) for some in subsets if damage(layers, some) <= budget)


@given(problems())
def test_no_subset_within_the_budget_is_cheaper(problem):
    layers, borders, budget = problem
    chosen = allocate(layers, borders, budget)
    assert damage(layers, chosen) <= budget
    assert math.isclose(
        gain(layers, borders, chosen), best_of_all(layers, borders, budget), rel_tol=2e-4, abs_tol=1e-12
    )
    assert allocate(layers, borders, budget) == chosen


def test_ten_layers_in_a_row_are_cut_where_conversions_pay():
    layers = [Layer(f"/{n}", 10e-6, (2e-6 if n in (2, 3, 4, 7) else 11e-6), 0.0) for n in range(10)]
    cheap = [Border(f"/{n}", f"/{n + 1}", 0.9e-6) for n in range(9)]
    assert allocate(layers, cheap, math.inf) == {"/2", "/3", "/4", "/7"}
    # Two layers in between cost 2 µs more in int8; two borders cost 3.
    dearer = [Border(b.first, b.second, 1.5e-6) for b in cheap]
    assert allocate(layers, dearer, math.inf) == {"/2", "/3", "/4", "/5", "/6", "/7"}
    forbidding = [Border(b.first, b.second, 1e-3) for b in cheap]
    assert allocate(layers, forbidding, math.inf) == {layer.name for layer in layers}


def test_a_budget_of_nothing_keeps_what_does_damage_and_no_more():
    layers = [Layer("/harmless", 2e-6, 1e-6, 0.0), Layer("/harmful", 9e-6, 1e-6, 1e-9)]
    assert allocate(layers, [], 0.0) == {"/harmless"}
    assert allocate(layers, [], math.inf) == {"/harmless", "/harmful"}


def test_a_millionth_of_the_worst_damage_is_too_much_for_a_budget_of_nothing():
    layers = [Layer("/little", 2e-6, 1e-6, 1e-9), Layer("/much", 9e-6, 1e-6, 1e3)]
    assert allocate(layers, [], 0.0) == frozenset()


def test_damage_that_nobody_could_tell_is_taken_only_where_none_counts():
    layers = [Layer("/known", 2e-6, 1e-6, 0.1), *(Layer(f"/{bad}", 2e-6, 1e-6, bad) for bad in (math.nan, math.inf))]
    assert allocate(layers, [], 10.0) == {"/known"}
    assert allocate(layers, [], math.inf) == {"/known", "/nan", "/inf"}


def test_borders_of_layers_that_are_not_asked_about_and_with_oneself_cost_nothing():
    layers = [Layer("/a", 2e-6, 1e-6, 0.0)]
    assert allocate(layers, [Border("/a", "/a", 1.0), Border("/a", "/gone", 1.0)], 0.0) == {"/a"}


def test_no_layers_no_answer():
    assert allocate([], [], math.inf) == frozenset()


def test_seconds_may_be_as_small_or_large_as_they_like():
    for unit in (1e-12, 1.0, 1e9):
        layers = [Layer("/a", 3 * unit, unit, unit), Layer("/b", 2 * unit, unit, unit)]
        assert allocate(layers, [], 1.5 * unit) == {"/a"}, unit


def test_gain_counts_what_is_saved_less_conversions():
    layers = [Layer("/a", 5.0, 2.0, 0.0), Layer("/b", 4.0, 3.0, 0.0)]
    borders = [Border("/a", "/b", 0.5)]
    assert [gain(layers, borders, frozenset(some)) for some in ((), ("/a",), ("/b",), ("/a", "/b"))] == [0, 2.5, 0.5, 4]
