"""The arithmetic of samples: straight lines between them, nothing known outside; and a thread that tells what it cost."""

import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench.sampling import Sampler, changes, integrate, refresh_period, value_at

SERIES = [(0.0, 10.0), (1.0, 30.0), (3.0, 30.0)]


def test_between_samples_lies_the_straight_line_and_outside_nothing():
    assert value_at(SERIES, 0.5) == 20
    assert value_at(SERIES, 1.0) == 30
    assert value_at(SERIES, -0.1) is None and value_at(SERIES, 3.1) is None and value_at([], 0.0) is None


def test_watts_become_joules_by_trapezoids_between_the_edges():
    assert integrate(SERIES, 0.0, 1.0) == pytest.approx(20)
    assert integrate(SERIES, 0.5, 2.0) == pytest.approx(12.5 + 30)
    assert integrate(SERIES, 0.2, 0.4) == pytest.approx(0.2 * 16)
    assert integrate(SERIES, 1.0, 4.0) is None and integrate(SERIES, 2.0, 1.0) is None


def test_two_samples_at_one_moment_are_a_step():
    series = [(0.0, 10.0), (1.0, 10.0), (1.0, 50.0), (2.0, 50.0)]
    assert integrate(series, 0.0, 2.0) == pytest.approx(10 + 50)
    assert integrate(series, 0.5, 1.5) == pytest.approx(5 + 25)


gaps = st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 1000)), min_size=3, max_size=30)


@given(gaps, st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_pieces_of_any_series_add_up_and_a_constant_is_power_times_time(steps, shares):
    moments = list(itertools.accumulate(gap for gap, _ in steps))
    first, last = moments[0], moments[-1]
    a, b, c = sorted(min(last, first + share * (last - first)) for share in shares)
    series = list(zip(moments, (watts for _, watts in steps), strict=True))
    whole = integrate(series, a, c)
    assert integrate(series, a, b) + integrate(series, b, c) == pytest.approx(whole, rel=1e-9, abs=1e-6)
    low, high = min(watts for _, watts in steps), max(watts for _, watts in steps)
    assert low * (c - a) - 1e-6 <= whole <= high * (c - a) + 1e-6
    assert integrate([(moment, 7.0) for moment in moments], a, c) == pytest.approx(7 * (c - a))


def test_changes_count_moves_after_the_start_and_until_the_end():
    series = [(0.0, 1.0), (1.0, 2.0), (2.0, 2.0), (3.0, 4.0), (4.0, 5.0)]
    assert changes(series, 0.0, 3.0) == 2
    assert changes(series, 1.0, 4.0) == 2
    assert changes(series, 1.0, 2.0) == 0


def test_a_counter_that_stands_still_has_no_refresh_period():
    assert refresh_period(lambda: 7, limit_s=0.01, ticks=3) is None


def test_a_counter_that_moves_has_a_period_shorter_than_the_limit():
    count = itertools.count()
    assert 0 < refresh_period(lambda: next(count), limit_s=5.0, ticks=3) < 5.0


def test_one_move_says_no_more_than_the_limit():
    values = itertools.chain([1], itertools.repeat(2))
    assert refresh_period(lambda: next(values), limit_s=0.01, ticks=3) == 0.01


def test_the_sampler_samples_until_it_is_stopped_and_knows_its_cpu_time():
    often = threading.Event()
    count = itertools.count()

    def sample():
        sum(range(1000))
        if next(count) > 5:
            often.set()

    sampler = Sampler(sample, interval_s=0.001)
    assert often.wait(30)
    assert sampler.stop() > 0
    before = next(count)
    assert next(count) == before + 1
