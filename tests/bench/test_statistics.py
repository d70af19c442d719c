"""Statistics of paired windows: coverage by simulation, what is missing stays missing."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench.statistics import (
    _resampled_percentiles,
    _resampled_windows,
    bootstrap_interval,
    costs_by_round,
    figure_interval,
    half_width,
    paired_figures,
    paired_ratio,
    percentile,
    percentile_ratio,
    quantile_interval,
)
from perwatt.measurement import Ratio

DISTRIBUTIONS = {
    "normal": lambda random, size: random.normal(size=size),
    "heavy tails": lambda random, size: random.standard_t(3, size),
    "lopsided, with outliers": lambda random, size: (
        random.lognormal(0, 1, size) * np.where(random.random(size) < 0.1, 10, 1)
    ),
}


def middle(values, trim=0.2):
    cut = int(trim * len(values))
    return float(np.sort(values)[cut : len(values) - cut].mean())


@pytest.mark.parametrize(("name", "count"), [("normal", 3), *itertools.product(DISTRIBUTIONS, [6, 8, 12, 20, 40])])
def test_the_interval_covers_the_trimmed_mean_as_often_as_it_says(name, count):
    draw = DISTRIBUTIONS[name]
    truth = middle(draw(np.random.default_rng(1), 1_000_000))
    random, runs = np.random.default_rng(count), 800
    hits = 0
    for _ in range(runs):
        _, low, high = bootstrap_interval(draw(random, count), resamples=500)
        hits += low <= truth <= high
    # 93 to 97 % are promised to normal values and 92 % to the others; three standard errors of 800 runs are 2.3 points.
    least, most = (0.93, 0.97) if name == "normal" else (0.92, 1.0)
    assert least - 0.01 <= hits / runs <= most + 0.01


@pytest.mark.parametrize("count", [4, 5, 8, 12, 20])
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(count):
    random = np.random.default_rng(count)
    hits, runs, truth = 0, 1500, 0.8
    for _ in range(runs):
        disturbed = np.exp(random.normal(0, 0.3, count))
        original = disturbed * np.exp(random.normal(0, 0.05, count))
        optimized = truth * disturbed * np.exp(random.normal(0, 0.05, count))
        ratio = paired_ratio(list(optimized), list(original), resamples=500)
        hits += ratio.low <= truth <= ratio.high
    # Three standard errors of 1,500 runs are 1.7 points.
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


def test_costs_of_sides_measured_round_by_round_do_not_show_what_disturbed_a_round():
    random = np.random.default_rng(0)
    disturbed = np.exp(random.normal(0, 0.5, 15))
    sides = [list(truth * disturbed * np.exp(random.normal(0, 0.005, 15))) for truth in (2.0, 1.0, 2.2)]
    first, second, third = costs_by_round(sides)
    assert first == pytest.approx(np.median(sides[0]))
    assert (second / first, third / first) == pytest.approx((0.5, 1.1), rel=0.01)


def test_equal_sides_have_ratio_one_and_no_width():
    ratio = paired_ratio([2.0, 3.0, 4.0], [2.0, 3.0, 4.0])
    assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)
    assert half_width(ratio) == 0


@pytest.mark.parametrize("missing", [None, 0.0, -1.0, math.nan, math.inf])
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


def test_the_interval_of_one_value_is_without_bounds_and_of_none_an_error():
    assert bootstrap_interval([3.0]) == (3.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40), st.sampled_from([0.0, 0.1, 0.2, 0.4]))
def test_intervals_hold_the_trimmed_mean_and_move_with_the_values(values, trim):
    centre, low, high = bootstrap_interval(values, trim=trim, resamples=200)
    assert centre == pytest.approx(middle(values, trim), rel=1e-9, abs=1e-9)
    assert low <= centre <= high
    moved = bootstrap_interval([5 - 2 * value for value in values], trim=trim, resamples=200)
    assert moved == pytest.approx((5 - 2 * centre, 5 - 2 * high, 5 - 2 * low), rel=1e-6, abs=1e-6)


def test_the_same_values_give_the_same_interval_and_another_seed_nearly_so():
    values = list(np.random.default_rng(8).normal(size=30))
    found = bootstrap_interval(values)
    assert bootstrap_interval(values) == found != bootstrap_interval(values, seed=1)
    width = found[2] - found[1]
    assert bootstrap_interval(values, seed=1) == pytest.approx(found, abs=0.06 * width)
    assert bootstrap_interval(values, resamples=1000) == pytest.approx(found, abs=0.2 * width)


def test_equal_values_have_no_width():
    assert bootstrap_interval([0.1] * 7) == pytest.approx((0.1, 0.1, 0.1), rel=1e-15)
    low, high = bootstrap_interval([0.1] * 7)[1:]
    assert low == high


def test_many_values_have_the_interval_of_the_normal_distribution_and_few_that_of_student():
    values = np.random.default_rng(9).normal(size=400)
    values = (values - values.mean()) / values.std(ddof=1)
    for confidence, z in [(0.9, 1.6449), (0.95, 1.96), (0.99, 2.5758)]:
        centre, low, high = bootstrap_interval(values, trim=0, confidence=confidence)
        assert centre == pytest.approx(0, abs=1e-12)
        assert (-low * 20, high * 20) == pytest.approx((z, z), rel=0.06)
    # Four values ±1: t(3) = 3.182, and the standard error is √(4/3) / √4. Resamples of so few values are lumpy.
    _, low, high = bootstrap_interval([-1.0, -1.0, 1.0, 1.0], trim=0)
    assert (-low, high) == pytest.approx((3.182 * math.sqrt(1 / 3),) * 2, rel=0.1)


def test_figures_are_geometric_means_with_an_interval_and_divide_to_the_ratio():
    random = np.random.default_rng(10)
    values = list(random.lognormal(1, 0.2, 9))
    value, low, high = figure_interval([*values, None, 0.0, -3.0, math.nan, math.inf])
    assert value == pytest.approx(math.exp(middle(np.log(values))))
    assert low < value < high
    assert figure_interval([1000 * v for v in values]) == pytest.approx((1000 * value, 1000 * low, 1000 * high))
    assert figure_interval([None, 0.0]) == (None, None, None)
    assert figure_interval([2.0, None]) == (pytest.approx(2.0), None, None)


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


windows = st.lists(
    st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 9.0]), min_size=1, max_size=12), min_size=1, max_size=9
)


@given(windows, st.sampled_from([0.01, 0.5, 0.9, 0.95, 0.99, 1.0]), st.integers(0, 5))
def test_resampled_percentiles_are_those_of_the_calls_pooled_anew(parts, share, seed):
    counts = _resampled_windows(len(parts), 20, seed)
    assert (counts.sum(axis=1) == len(parts)).all()
    for row, found in zip(counts, _resampled_percentiles(parts, share, counts), strict=True):
        pooled = [call for part, times in zip(parts, row, strict=True) for call in part * int(times)]
        assert found == percentile(pooled, share)


@given(windows, st.sampled_from([0.5, 0.99]))
def test_a_percentile_lies_in_its_interval_and_empty_windows_say_nothing(parts, share):
    value, low, high = quantile_interval(parts, share)
    assert value == percentile([call for part in parts for call in part], share)
    if len(parts) < 2:
        assert (low, high) == (None, None)
    else:
        assert low <= value <= high
    assert quantile_interval([[], *parts, []], share) == (value, low, high)


def test_no_calls_no_percentile_interval():
    assert quantile_interval([], 0.5) == quantile_interval([[], []], 0.5) == (None, None, None)
    assert quantile_interval([[], [3.0, 1.0]], 0.5) == (1.0, None, None)


def test_windows_that_differ_as_a_whole_widen_a_percentiles_interval():
    random = np.random.default_rng(11)
    calm = [list(random.lognormal(0, 0.1, 100)) for _ in range(12)]
    moody = [[call * factor for call in part] for part, factor in zip(calm, random.lognormal(0, 0.1, 12), strict=True)]
    widths = [math.log(high / low) for _, low, high in (quantile_interval(parts, 0.5) for parts in (calm, moody))]
    assert widths[1] > 3 * widths[0]


def test_medians_of_windows_are_covered_as_often_as_the_interval_says():
    random, runs, hits = np.random.default_rng(12), 600, 0
    for _ in range(runs):
        luck = random.lognormal(0, 0.1, (8, 1))
        _, low, high = quantile_interval(list(map(list, luck * random.lognormal(0, 0.15, (8, 40)))), 0.5, resamples=300)
        hits += low <= 1 <= high
    assert 0.92 <= hits / runs <= 0.985


def test_rounds_without_calls_on_a_side_bound_no_ratio_of_percentiles():
    assert percentile_ratio([[1.0], []], [[2.0], [2.0]], 0.5) == Ratio(0.5)
    found = percentile_ratio([[1.0], [], [1.1]], [[2.0], [2.0], [2.1]], 0.5)
    assert found.low <= found.value <= found.high
