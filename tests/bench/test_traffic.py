"""Traffic: arrivals are a Poisson process, rates and prices are read as written or refused in words."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench.traffic import Price, known_percentile, parse_price, parse_rate, poisson_arrivals
from perwatt.errors import InputError


def gaps(rate, seed, count):
    return np.diff([0.0, *poisson_arrivals(rate, seed, count=count)])


def test_gaps_are_exponential_by_kolmogorov_and_smirnov():
    found = np.sort(gaps(40.0, 1, 20_000))
    expected = 1 - np.exp(-40.0 * found)
    steps = np.arange(len(found) + 1) / len(found)
    distance = max((steps[1:] - expected).max(), (expected - steps[:-1]).max())
    # 1.63/√n is exceeded by chance once in a hundred seeds (asymptotic distribution of the statistic).
    assert distance < 1.63 / math.sqrt(len(found))
    # Even gaps, or gaps of the wrong rate, would not pass.
    assert np.abs(steps[1:] - (1 - np.exp(-44.0 * found))).max() > 1.63 / math.sqrt(len(found))


def test_counts_have_the_mean_and_the_variance_of_a_poisson_process():
    seconds, rate = 4000, 25.0
    counts = np.bincount(np.int64(poisson_arrivals(rate, 2, seconds=seconds)), minlength=seconds)
    # Standard errors: √(λ/n) of the mean, √((λ + 2λ²)/n) of the variance.
    assert counts.mean() == pytest.approx(rate, abs=4 * math.sqrt(rate / seconds))
    assert counts.var() == pytest.approx(rate, abs=4 * math.sqrt((rate + 2 * rate**2) / seconds))


def test_neighbouring_gaps_know_nothing_of_each_other():
    found = gaps(10.0, 3, 20_000)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 4 / math.sqrt(len(found))


@given(st.floats(0.01, 1000), st.integers(0, 1000), st.floats(0, 20))
def test_arrivals_are_in_order_within_the_time_and_fixed_by_the_seed(rate, seed, seconds):
    found = poisson_arrivals(rate, seed, seconds=seconds)
    assert found == sorted(found) and all(0 < due < seconds for due in found)
    more = poisson_arrivals(rate, seed, count=len(found) + 1)
    assert more[:-1] == found and more[-1] >= seconds


def test_the_same_seed_is_the_same_pattern_stretched_and_another_seed_is_another():
    slow, fast = poisson_arrivals(1.0, 5, count=50), poisson_arrivals(8.0, 5, count=50)
    assert slow == pytest.approx([8 * due for due in fast])
    assert poisson_arrivals(1.0, 6, count=50) != slow


def test_no_time_and_no_count_bring_no_arrivals():
    assert poisson_arrivals(5.0, 0, seconds=0.0) == poisson_arrivals(5.0, 0, count=0) == []


def test_arrivals_end_somewhere():
    with pytest.raises(ValueError, match="give seconds, count or both"):
        poisson_arrivals(1.0, 0)


def test_given_their_number_arrivals_are_spread_evenly_at_random():
    """Kolmogorov and Smirnov's distance from the uniform distribution, 1.63/√n at p = 0.01."""
    due = np.array(poisson_arrivals(40.0, 7, seconds=100.0, count=4000))
    assert len(due) == 4000 and (np.diff(due) >= 0).all()
    assert np.abs(due / 100 - (np.arange(4000) + 0.5) / 4000).max() < 1.63 / np.sqrt(4000)
    # Gaps are exponential: as many above their mean as e⁻¹ says, within four standard errors.
    assert abs((np.diff(due) > 1 / 40).mean() - np.exp(-1)) < 4 * np.sqrt(0.37 * 0.63 / 4000)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="positive rate"):
        poisson_arrivals(rate, 0, count=1)


@pytest.mark.parametrize(
    ("text", "per_s"),
    [
        ("40/s", 40),
        ("2400/min", 40),
        ("40", 40),
        (" 90 / h ", 0.025),
        ("0.5/s", 0.5),
        (".5", 0.5),
        (40, 40),
        (2.5, 2.5),
    ],
)
def test_rates_are_requests_a_second(text, per_s):
    assert parse_rate(text) == pytest.approx(per_s)


@pytest.mark.parametrize("text", ["", "fast", "40/fortnight", "-3/s", "40 s", "4,0/s", "1e3/s", "nan"])
def test_what_is_no_rate_is_refused_with_the_form_wanted(text):
    with pytest.raises(InputError, match="is no rate of requests — write 40/s, 2400/min, 90/h or 40"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["0", "0/min"])
def test_no_requests_at_all_are_no_traffic(text):
    with pytest.raises(InputError, match="must be above 0"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("0.20EUR/kWh", Price(0.2, "EUR")), (" 0.2 eur / kwh", Price(0.2, "EUR")), ("0.31€/kWh", Price(0.31, "EUR")),
        ("12$/kWh", Price(12.0, "USD")), (".28£/kWh", Price(0.28, "GBP")), ("0.20/kWh", Price(0.2, "")),
    ],
)  # fmt: skip
def test_prices_are_amounts_for_a_kilowatt_hour(text, price):
    assert parse_price(text) == price


@pytest.mark.parametrize("text", ["", "0.20", "0.20EUR", "12ct/kWh", "0.20EUR/MWh", "0/kWh", "-1EUR/kWh", "EUR/kWh"])
def test_what_is_no_price_is_refused_with_the_form_wanted(text):
    with pytest.raises(InputError, match=r"is no price of energy — write 0\.20EUR/kWh or 0\.20/kWh"):
        parse_price(text)


def test_a_kilowatt_hour_is_three_point_six_million_joules():
    assert Price(0.25, "EUR").of_joules(3.6e6) == pytest.approx(0.25)
    assert Price(0.25).of_joules(0.0) == 0.0


def test_a_percentile_of_too_few_requests_is_not_known():
    hundred = [float(i) for i in range(1, 101)]
    assert known_percentile(hundred, 0.99) == 99 and known_percentile(hundred[:99], 0.99) is None
    assert known_percentile(hundred[:10], 0.5) == 5 and known_percentile(hundred[:9], 0.5) is None
    # Of any other share, as many as leave one beyond it.
    assert known_percentile(hundred[:20], 0.95) == 19 and known_percentile(hundred[:19], 0.95) is None
    assert known_percentile([], 0.5) is None
