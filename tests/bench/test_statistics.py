"""Statistics of paired windows: quantiles against tables, coverage by simulation, what is missing stays missing."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench.statistics import (
    half_width,
    paired_figures,
    paired_ratio,
    percentile,
    percentile_ratio,
    t_quantile,
    trimmed_interval,
)
from perwatt.measurement import Ratio

# 97.5 % quantiles of Student's t, from the tables (NIST/SEMATECH e-Handbook, 1.3.6.7.2).
TABLE = {1: 12.706, 2: 4.303, 5: 2.571, 10: 2.228, 30: 2.042, 31: 2.040, 40: 2.021, 60: 2.000, 100: 1.984}


@pytest.mark.parametrize("degrees", sorted(TABLE))
def test_quantiles_are_those_of_the_tables(degrees):
    assert t_quantile(degrees) == pytest.approx(TABLE[degrees], abs=6e-4)


def test_quantiles_fall_towards_the_normal_and_are_infinite_without_freedom():
    found = [t_quantile(n) for n in range(1, 400)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(1.966, abs=1e-3)
    assert t_quantile(0) == math.inf


def test_quantiles_agree_with_scipy():
    scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is no dependency of perwatt's")
    for degrees in range(1, 300):
        assert t_quantile(degrees) == pytest.approx(scipy_stats.t.ppf(0.975, degrees), abs=1e-3)


@pytest.mark.parametrize("count", [4, 5, 8, 12, 20])
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(count):
    random = np.random.default_rng(count)
    hits, runs, truth = 0, 1500, 0.8
    for _ in range(runs):
        disturbed = np.exp(random.normal(0, 0.3, count))
        original = disturbed * np.exp(random.normal(0, 0.05, count))
        optimized = truth * disturbed * np.exp(random.normal(0, 0.05, count))
        ratio = paired_ratio(list(optimized), list(original))
        hits += ratio.low <= truth <= ratio.high
    # Three standard errors of 1,500 runs are 1.7 points; the trimmed interval is a little narrow for few windows.
    assert 0.925 <= hits / runs <= 0.975


def test_one_wild_window_in_ten_moves_the_ratio_little():
    random = np.random.default_rng(0)
    original = np.exp(random.normal(0, 0.01, 20))
    optimized = 0.5 * np.exp(random.normal(0, 0.01, 20))
    optimized[[3, 12]] *= 100
    assert paired_ratio(list(optimized), list(original)).value == pytest.approx(0.5, rel=0.02)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=2, max_size=30))
def test_a_ratio_and_its_inverse_agree_and_lie_in_their_intervals(pairs):
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    ratio, back = paired_ratio(ours, theirs), paired_ratio(theirs, ours)
    assert ratio.low <= ratio.value <= ratio.high
    assert back.value == pytest.approx(1 / ratio.value)
    turned = ratio.inverse()
    assert (turned.low, turned.high) == pytest.approx((back.low, back.high))


def test_equal_sides_have_ratio_one_and_no_width():
    ratio = paired_ratio([2.0, 3.0, 4.0], [2.0, 3.0, 4.0])
    assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)
    assert half_width(ratio) == 0


@pytest.mark.parametrize("missing", [None, 0.0, -1.0, math.nan])
def test_pairs_with_a_side_that_is_missing_or_not_positive_do_not_count(missing):
    assert paired_ratio([2.0, missing, 2.0, 2.0], [1.0, 1.0, missing, 1.0]) == paired_ratio([2.0, 2.0], [1.0, 1.0])
    assert paired_ratio([missing, missing], [1.0, 1.0]) == Ratio(None)


def test_no_pairs_no_ratio_one_pair_no_interval():
    assert paired_ratio([], []) == Ratio(None)
    assert paired_ratio([2.0], [1.0]) == Ratio(pytest.approx(2.0))
    assert half_width(Ratio(2.0)) == half_width(Ratio(None)) == math.inf


def test_windows_that_do_not_pair_up_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0, 2.0], [1.0])


def test_half_width_is_relative():
    assert half_width(Ratio(10.0, 10 / 1.1, 11.0)) == pytest.approx(math.log(1.1))


def test_the_interval_of_one_value_is_without_bounds():
    assert trimmed_interval([3.0]) == (3.0, -math.inf, math.inf)


def test_trimming_follows_yuen():
    # Twelve values, a fifth cut at each end: two go, eight stay, and the sorted edges are drawn in.
    values = [1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 500]
    mean, low, high = trimmed_interval(values)
    winsorized = np.array([3.0, 3, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10])
    error = math.sqrt(((winsorized - winsorized.mean()) ** 2).sum() / (8 * 7))
    assert mean == pytest.approx(6.5)
    assert (high - mean, mean - low) == pytest.approx((2.365 * error, 2.365 * error))


@given(st.lists(st.floats(0.001, 1e4), min_size=1, max_size=300), st.sampled_from(["0.5", "0.9", "0.95", "0.99", "1"]))
def test_percentiles_are_the_nearest_rank(latencies, share):
    found = percentile(latencies, float(share))
    rank = math.ceil(Fraction(share) * len(latencies))
    assert found == sorted(latencies)[rank - 1]


def test_no_calls_no_percentile_and_small_sets_give_their_largest():
    assert percentile([], 0.99) is None
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_figures_of_the_kept_rounds_divide_to_the_ratio():
    random = np.random.default_rng(3)
    theirs = list(random.lognormal(0, 0.3, 15))
    ours = [b * r for b, r in zip(theirs, random.lognormal(-0.1, 0.05, 15), strict=True)]
    ours[4] *= 20
    a, b = paired_figures(ours, theirs)
    assert a / b == pytest.approx(paired_ratio(ours, theirs).value)


def test_a_ratio_of_percentiles_is_that_of_all_calls_and_lies_in_its_interval():
    random = np.random.default_rng(4)
    ours, theirs = ([list(random.lognormal(m, 0.2, 50)) for _ in range(10)] for m in (0.0, 0.5))
    found = percentile_ratio(ours, theirs, 0.5)
    pooled = [percentile([x for part in parts for x in part], 0.5) for parts in (ours, theirs)]
    assert found.value == pytest.approx(pooled[0] / pooled[1]) and found.low < found.value < found.high < 1
    assert percentile_ratio([[]], [[1.0]], 0.5).value is None
