"""The gate's decision: fails only beyond the limit and above the noise, passes only within, else says that it doesn't know."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench.decision import decide, decide_accuracy, log_ratio
from perwatt.measurement import Ratio

NO_FLOOR = 0.0


def judged(value, low, high, bound=1.05, side="at most", floor=NO_FLOOR):
    decision = decide(Ratio(value, low, high), bound, side, floor, log_ratio(value))
    return decision.verdict, decision.ground


def test_an_interval_within_the_limit_passes():
    assert judged(1.0, 0.97, 1.03) == ("pass", "within")
    assert judged(1.02, 1.0, 1.05) == ("pass", "within")


def test_an_interval_beyond_the_limit_fails():
    assert judged(1.10, 1.06, 1.14) == ("fail", "beyond")


def test_an_interval_that_holds_the_limit_is_inconclusive():
    assert judged(1.10, 1.04, 1.16) == ("inconclusive", "unsure")
    assert judged(1.00, 0.90, 1.10) == ("inconclusive", "unsure")


def test_an_effect_within_the_noise_floor_is_inconclusive_however_sure_its_interval():
    assert judged(1.10, 1.09, 1.11, floor=math.log(1.12)) == ("inconclusive", "noise")
    assert judged(1.10, 1.09, 1.11, floor=math.log(1.09)) == ("fail", "beyond")


def test_at_least_is_at_most_upside_down():
    assert judged(0.90, 0.88, 0.94, 0.95, "at least") == ("fail", "beyond")
    assert judged(0.99, 0.96, 1.02, 0.95, "at least") == ("pass", "within")
    assert judged(0.96, 0.93, 0.99, 0.95, "at least") == ("inconclusive", "unsure")


def test_what_was_not_measured_is_inconclusive_and_what_is_exact_needs_no_interval():
    assert judged(None, None, None) == ("inconclusive", "unknown")
    assert judged(0.0, None, None) == ("inconclusive", "unknown")
    assert judged(math.nan, None, None) == ("inconclusive", "unknown")
    assert judged(1.2, None, None) == ("inconclusive", "alone"), "one observation tells nothing of its spread"
    assert judged(1.2, 1.1, None) == ("inconclusive", "alone")
    for value, verdict in ((1.2, "fail"), (1.01, "pass")):
        assert decide(Ratio(value), 1.05, "at most", 0.0, log_ratio(value), exact=True).verdict == verdict


@given(st.floats(0.2, 5), st.floats(1.001, 2), st.floats(1.01, 1.5), st.floats(0, 0.5))
def test_a_ratio_and_its_inverse_are_judged_alike(value, spread, bound, floor):
    ratio = Ratio(value, value / spread, value * spread)
    up = decide(ratio, bound, "at most", floor, log_ratio(value))
    down = decide(ratio.inverse(), 1 / bound, "at least", floor, log_ratio(1 / value))
    assert up == down


@given(st.floats(0.5, 2), st.floats(1.001, 1.5), st.floats(0, 0.3))
def test_nothing_fails_that_is_no_more_than_the_floor(value, spread, floor):
    found = decide(Ratio(value, value / spread, value * spread), 1.05, "at most", floor, log_ratio(value))
    assert found.verdict != "fail" or abs(math.log(value)) > floor


@pytest.mark.parametrize(
    ("drop", "p_value", "low", "verdict"),
    [
        (0.5, 0.001, 0.1, "pass"),  # within the budget, however real
        (-0.3, 0.5, -1.0, "pass"),
        (0.8, 0.01, 0.2, "fail"),
        (0.8, 0.30, -0.6, "inconclusive"),  # over the budget, but so many flips are chance
        (0.8, None, 0.1, "fail"),  # a metric without flips: its interval decides
        (0.8, None, -0.1, "inconclusive"),
        (0.8, None, None, "inconclusive"),
    ],
)
def test_accuracy_is_judged_on_the_budget_and_on_the_flips(drop, p_value, low, verdict):
    assert decide_accuracy(drop, 0.5, p_value, low).verdict == verdict
