"""The sequential test: how often it is wrong at any moment, by simulation, and how few samples it takes.

Wrong answers at any moment, 5 % promised, in thousands of random orders of each of the worst populations (the total exactly at
the limit for `above`, one sample beyond it for `below`; few flips, nothing but flips, none but lost ones, lopsided values of
any size): 0 to 3.2 % at N = 500, 0 to 3.7 % at N = 2,000.

Samples that it takes on average, looking after every one, 1 point of top-1 allowed:

    loses  flips     N = 500   N = 2,000
    10 p.   12 %          88         101    clearly too much: 82 to 95 % of the samples are saved
     5 p.    7 %         188         271
     2 p.    4 %         418       1,158    doubtful: it takes most of them
     0 p.    0 %         230         323    nothing at all has changed
     0 p.    2 %         383         856    within the limit, with flips to and fro: 23 to 57 % are saved
"""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench.sequential import MONEY, SHARES, Sequential, capital


def flips(size, lost, gained=0):
    """Differences of which so many are 1 and -1."""
    values = np.zeros(size)
    values[:lost], values[lost : lost + gained] = 1, -1
    return values


def summing_up(size, total, seed, shape):
    """Values from 0 to 2, lopsided, with this total."""
    values = np.random.default_rng(seed).gamma(shape, 1.0, size)
    values *= total / values.sum()
    assert values.max() <= 2
    return values


def answers(values, limit, low, high, step, looks):
    """What is answered first when looking after so many of the values, in this order, and after how many."""
    test = Sequential(len(values), limit, low, high, step=step)
    for start, stop in itertools.pairwise([0, *looks]):
        if (answer := test.update(values[start:stop])) is not None:
            return answer, stop
    return None, len(values)


WORST = {
    # N = 500, of which 5 may be lost: these are at the limit, or one beyond it.
    "lost only": (lambda lost: flips(500, lost), 0, 1, 1.0),
    "some flips": (lambda lost: flips(500, lost + 3, 3), -1, 1, 1.0),
    "nothing but flips": (lambda lost: flips(500, 247 + lost, 247), -1, 1, 1.0),
    "few large values": (lambda lost: summing_up(500, lost, 1, 0.1), 0, 2, 0.0),
    "many small ones": (lambda lost: summing_up(500, lost, 2, 2.0), 0, 2, 0.0),
}


@pytest.mark.parametrize("name", WORST)
def test_bets_on_what_is_not_so_are_seldom_won_even_where_the_mean_is_at_the_limit(name):
    draw, low, high, step = WORST[name]
    for total, mirrored in ((5, False), (5 + int(step), True)):
        values, random = draw(total), np.random.default_rng(1)
        excess, supposed = (high - values, 500 * high - total) if mirrored else (values - low, total - 500 * low)
        runs = [(capital(random.permutation(excess), supposed, 500) >= 20).any() for _ in range(2000)]
        assert np.mean(runs) <= 0.05


@pytest.mark.parametrize("lost", [2, 3])
def test_the_answer_is_seldom_wrong_when_looking_after_every_value(lost):
    # 2 of 40 may be lost.
    wrong, values = "above" if lost == 2 else "below", flips(40, lost + 4, 4)
    random = np.random.default_rng(1)
    found = [answers(random.permutation(values), 0.05, -1, 1, 1.0, range(1, 41))[0] for _ in range(500)]
    assert found.count(wrong) / 500 <= 0.05


def test_the_answer_is_seldom_wrong_for_any_population():
    random, wrong, runs = np.random.default_rng(2), 0, 2000
    for _ in range(runs):
        size = int(random.integers(20, 120))
        values = random.choice([-1.0, 0.0, 1.0], size, p=random.dirichlet([0.3, 2, 0.3]))
        # The limit is as near to the mean as it can be.
        at_most = values.sum() - random.integers(0, 2)
        truth = "below" if values.sum() <= at_most else "above"
        looks = [*range(5, size, 5), size]
        answer, _ = answers(random.permutation(values), at_most / size, -1, 1, 1.0, looks)
        wrong += answer != truth
    assert wrong / runs <= 0.05


@pytest.mark.parametrize(
    ("size", "lost", "gained", "answer", "most"),
    [
        (500, 55, 5, "above", 105),
        (2000, 220, 20, "above", 120),
        (500, 30, 5, "above", 220),
        (500, 0, 0, "below", 245),
        (500, 5, 5, "below", 405),
        (2000, 20, 20, "below", 950),
    ],
)
def test_clear_cases_take_few_samples(size, lost, gained, answer, most):
    random, taken, right, runs = np.random.default_rng(0), 0, 0, 100
    for _ in range(runs):
        order = random.permutation(flips(size, lost, gained))
        found, after = answers(order, 0.01, -1, 1, 1.0, range(10, size + 1, 10))
        taken, right = taken + after, right + (found == answer)
    assert taken / runs <= most
    assert right / runs >= 0.95


def test_betting_it_all_is_the_exact_hypergeometric_test_where_nothing_changes():
    # 6 lost of 500 are too many: how likely would none of them be among the first n?
    for n in (10, 100, 300):
        never = math.comb(494, n) / math.comb(500, n)
        own = capital(np.ones(n), 494.0, 500)[-1]
        assert own >= MONEY[0] / never
    assert SHARES[0] == 1 and MONEY.sum() == pytest.approx(1)


def test_money_is_neither_made_nor_lost_on_average_where_the_total_is_as_supposed():
    for values in itertools.product([0.0, 1.0, 2.0], repeat=4):
        orders = list(itertools.permutations(values))
        ends = np.mean([capital(np.array(order), sum(values), 4) for order in orders], axis=0)
        assert ends == pytest.approx(np.ones(4))


populations = st.integers(0, 10_000).map(
    lambda seed: (lambda r: r.choice([-1.0, 0.0, 1.0], r.integers(2, 80), p=r.dirichlet([1, 3, 1])))(
        np.random.default_rng(seed)
    )
)


@given(populations, st.integers(-20, 20), st.data())
def test_the_answer_does_not_depend_on_how_values_are_cut(values, total, data):
    looks = sorted({*data.draw(st.lists(st.integers(1, len(values)))), len(values) - 1} - {0})
    cut, whole = (Sequential(len(values), total / len(values), step=1.0) for _ in range(2))
    for start, stop in itertools.pairwise([0, *looks]):
        cut.update(values[start:stop])
    whole.update(values[: looks[-1]])
    assert cut.answer == whole.answer
    assert cut.interval() == whole.interval()


@given(populations, st.integers(-20, 20))
def test_once_all_are_seen_the_answer_is_exact(values, total):
    test = Sequential(len(values), total / len(values), step=1.0)
    test.update(values[:-1])
    assert test.update(values[-1:]) == ("below" if values.sum() <= total else "above")
    assert test.interval() == (values.mean(), values.mean())


@given(populations, st.integers(1, 80), st.integers(-20, 20))
def test_what_is_sure_is_told(values, count, total):
    seen, left = values[:count], max(0, len(values) - count)
    answer = Sequential(len(values), total / len(values), step=1.0).update(seen)
    if seen.sum() + left <= total:
        assert answer == "below"
    if seen.sum() - left > total:
        assert answer == "above"


@given(st.integers(0, 10_000), st.floats(-0.5, 1.5))
def test_mirrored_values_have_the_mirrored_answer_and_interval(seed, limit):
    values = np.random.default_rng(seed).uniform(-0.5, 1.5, 60)
    one, other = Sequential(80, limit, -0.5, 1.5), Sequential(80, -limit, -1.5, 0.5)
    mirrored = {"below": "above", "above": "below", None: None}
    assert mirrored[one.update(values)] == other.update(-values)
    assert one.interval() == pytest.approx([-bound for bound in reversed(other.interval())], abs=1e-9)


@given(populations, st.integers(-20, 20), st.integers(1, 80))
def test_the_answer_is_given_when_the_interval_leaves_the_limit(values, total, count):
    test = Sequential(len(values), total / len(values), step=1.0)
    answer = test.update(values[:count])
    low, high = test.interval()
    assert (answer == "above") == (low > total / len(values) + 1e-9)
    assert (answer == "below") == (high <= total / len(values) + 1e-9)


@pytest.mark.parametrize("draw", [lambda random: flips(200, 14, 6), lambda random: random.beta(0.5, 4, 200)])
def test_each_bound_of_the_interval_is_seldom_wrong(draw):
    random, missed, runs = np.random.default_rng(3), np.zeros(2), 250
    for _ in range(runs):
        values = random.permutation(draw(random))
        test = Sequential(200, 0.0, step=float(np.all(values % 1 == 0)))
        bounds = []
        for start in range(0, 180, 30):
            test.update(values[start : start + 30])
            bounds.append(test.interval())
        # Bounds only ever come closer: the last ones are the best, and as sure as all before them together. Where one is
        # wrong the other may reach it.
        assert all(a[0] <= b[0] + 1e-4 for a, b in itertools.pairwise(bounds))
        assert all(b[1] <= a[1] + 1e-4 or b[0] == b[1] for a, b in itertools.pairwise(bounds))
        missed += [values.mean() < bounds[-1][0] - 1e-9, values.mean() > bounds[-1][1] + 1e-9]
    assert (missed / runs <= 0.05).all()


def test_where_a_value_may_be_of_any_size_only_too_much_is_told_early():
    test = Sequential(1000, 0.01, 0.0, math.inf)
    assert test.update(np.zeros(900)) is None
    assert test.interval() == (0.0, math.inf)
    assert test.update(np.zeros(100)) == "below"
    much = Sequential(1000, 0.01, 0.0, math.inf)
    assert much.update(np.full(10, 0.2)) == "above"
    assert much.interval()[0] > 0.01
    assert Sequential(1000, 0.01, 0.0, math.inf).update([0.0, math.inf]) == "above"


def test_nothing_is_known_before_the_first_value():
    test = Sequential(100, 0.01)
    assert test.update([]) is None
    assert test.interval() == (-1, 1)
    assert Sequential(100, 1.0).update([]) == "below"
    assert Sequential(100, -1.1).update([]) == "above"


def test_a_limit_that_is_a_whole_number_of_samples_is_not_lost_to_rounding():
    for size, points in itertools.product((100, 300, 700, 1100), (1, 7, 29)):
        lost = size * points // 100
        for more, answer in ((0, "below"), (1, "above")):
            assert Sequential(size, points / 100, step=1.0).update(flips(size, lost + more)) == answer


@pytest.mark.parametrize("values", [[1.5], [-1.5], [math.nan]])
def test_values_out_of_bounds_are_refused(values):
    with pytest.raises(ValueError, match="values must lie within -1 and 1"):
        Sequential(10, 0.0).update(values)


def test_more_values_than_there_are_are_refused():
    with pytest.raises(ValueError, match="11 values of 10"):
        Sequential(10, 0.0).update([0.0] * 11)


def test_a_look_takes_less_than_10_ms_with_10_000_samples():
    values = np.random.default_rng(0).permutation(flips(10_000, 150, 50))
    seconds = []
    for _ in range(5):
        test = Sequential(10_000, 0.0101, step=1.0)
        test.update(values[:5000])
        start = time.perf_counter()
        test.update(values[5000:9999])
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01
