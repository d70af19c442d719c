"""Warm-up until steady: on costs and clocks that the test scripts."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench.steadiness import RECENT, steady, warm_up


class Scripted:
    """A program whose cost follows a script, and the clock that it moves."""

    def __init__(self, cost):
        self.cost, self.time, self.asked = cost, 100.0, []

    def slice_cost(self, seconds):
        self.asked.append(seconds)
        cost = self.cost(self.time - 100.0)
        self.time += seconds
        return cost

    def now(self):
        return self.time

    def run(self, **times):
        return warm_up(self.slice_cost, now=self.now, **times)


def test_too_few_slices_tell_nothing():
    assert steady([1.0] * (2 * RECENT - 1)) is None
    assert steady([1.0] * (2 * RECENT)) is True


def test_a_falling_cost_is_not_steady_and_a_rising_one_is():
    assert steady([0.95**i for i in range(12)]) is False
    assert steady([1.05**i for i in range(12)]) is True


def test_a_single_cheap_slice_before_does_not_hide_a_fall_of_the_median():
    assert steady([0.5, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]) is False


def test_slices_twice_as_dear_now_and_then_do_not_keep_a_steady_program_waiting():
    assert steady([1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0]) is True


@given(st.lists(st.floats(1e-6, 1e3), min_size=10, max_size=40), st.integers(-8, 8))
def test_units_do_not_matter(costs, power):
    # Powers of two scale exactly.
    assert steady(costs) == steady([cost * 2.0**power for cost in costs])


def test_a_program_with_nothing_to_warm_up_is_done_with_the_first_slices_that_can_tell():
    done = Scripted(lambda t: 1.0).run()
    assert done == {"seconds": pytest.approx(0.5), "slices": 10, "steady": True}


def test_warm_up_lasts_while_the_cost_falls():
    slow = Scripted(lambda t: 1 + 2 * math.exp(-t / 0.3)).run()
    assert slow["steady"] and 1.0 < slow["seconds"] < 2.0


def test_a_program_that_never_settles_is_stopped_and_said_to_be_unsteady():
    done = Scripted(lambda t: math.exp(-t)).run(max_s=2.0)
    assert done["steady"] is False and done["seconds"] == pytest.approx(2.0, abs=0.051)


def test_it_runs_as_long_as_asked_even_when_steady():
    assert Scripted(lambda t: 1.0).run(min_s=1.2)["seconds"] == pytest.approx(1.2, abs=0.051)


def test_without_time_for_enough_slices_it_does_not_claim_to_know():
    done = Scripted(lambda t: 1.0).run(min_s=0.15, max_s=0.15)
    assert done["steady"] is None and done["slices"] <= 4


def test_slices_are_as_long_as_asked():
    script = Scripted(lambda t: 1.0)
    script.run(slice_s=0.02, min_s=0.0)
    assert set(script.asked) == {0.02} and len(script.asked) == 10


@pytest.mark.parametrize("jumps", [0.1, 0.2, math.log(2)])
def test_noise_of_a_shared_machine_is_settled_within_the_time_and_a_real_warm_up_is_mostly_waited_for(jumps):
    draw = random.Random(0)

    def noise():
        return math.exp(draw.choice([0.0, jumps]) + draw.gauss(0, 0.03))

    flat = [Scripted(lambda t: noise()).run() for _ in range(200)]
    assert sum(done["steady"] for done in flat) >= 198
    falling = [Scripted(lambda t: (1 + 5 * math.exp(-t / 0.2)) * noise()).run() for _ in range(200)]
    left = [5 * math.exp(-done["seconds"] / 0.2) for done in falling]
    assert sum(left) / len(left) < 0.2
