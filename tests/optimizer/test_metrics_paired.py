"""McNemar's test against enumeration and scipy, Student's t against tables, closed forms and scipy."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.metrics_paired import mcnemar, t_quantile

# 97.5 % quantiles of Student's t, from the tables (NIST/SEMATECH e-Handbook, 1.3.6.7.2).
TABLE = {1: 12.706, 2: 4.303, 5: 2.571, 10: 2.228, 30: 2.042, 31: 2.040, 40: 2.021, 60: 2.000, 100: 1.984}


@pytest.mark.parametrize("freedom", sorted(TABLE))
def test_quantiles_are_those_of_the_tables(freedom):
    assert t_quantile(freedom) == pytest.approx(TABLE[freedom], abs=6e-4)


@pytest.mark.parametrize("share", [0.6, 0.95, 0.975, 0.9995])
def test_quantiles_are_the_closed_forms_of_one_and_two_degrees(share):
    assert t_quantile(1, share) == pytest.approx(math.tan(math.pi * (share - 0.5)), rel=1e-9)
    assert t_quantile(2, share) == pytest.approx((2 * share - 1) / math.sqrt(2 * share * (1 - share)), rel=1e-9)


def test_quantiles_fall_towards_the_normal_and_are_infinite_without_freedom():
    found = [t_quantile(n) for n in [*range(1, 400), 5000, 10**9]]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(1.959963984540054, abs=1e-8)
    assert t_quantile(0) == math.inf


def test_quantiles_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is no dependency of perwatt's")
    for freedom in [*range(1, 260), 1000, 10_000]:
        for share in (0.55, 0.9, 0.975, 0.995):
            assert t_quantile(freedom, share) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-8)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_counts_the_ways_coins_can_fall(lost, gained):
    flips = lost + gained
    ways = sum(math.comb(flips, k) for k in range(flips + 1) if abs(2 * k - flips) >= abs(lost - gained))
    assert mcnemar(lost, gained) == pytest.approx(ways / 2**flips, rel=1e-9)
    assert mcnemar(lost, gained) == mcnemar(gained, lost) <= 1


def test_mcnemar_of_no_flips_is_one_and_five_one_sided_flips_may_be_chance():
    assert mcnemar(0, 0) == 1
    assert mcnemar(7, 7) == 1
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(6, 0) < 0.05 < mcnemar(5, 0)


def test_mcnemar_agrees_with_scipy_for_many_flips():
    stats = pytest.importorskip("scipy.stats", reason="scipy is no dependency of perwatt's")
    for lost, gained in [(12, 2), (100, 140), (900, 1000), (10_000, 10_300), (80, 0)]:
        assert mcnemar(lost, gained) == pytest.approx(stats.binomtest(lost, lost + gained).pvalue, rel=1e-7)
