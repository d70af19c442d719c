"""Shares that go in rounds: what a round left undone falls to the next one."""

import pytest
from models import mlp

from perwatt.artifact import Step
from perwatt.passes._gradual import share_left


def after(*ratios):
    return mlp().with_steps(tuple(Step("cut", {"ratio": ratio, "cumulative": True}) for ratio in ratios))


def test_a_share_of_the_whole_is_more_of_what_is_left():
    assert share_left(0.2, True, after(), "cut") == pytest.approx(0.2)
    assert share_left(0.2, True, after(0.1), "cut") == pytest.approx(0.1 / 0.9)
    assert share_left(0.5, True, after(0.1, 0.2), "cut") == pytest.approx(0.3 / 0.8)


def test_nothing_goes_where_so_much_is_gone_already():
    assert share_left(0.2, True, after(0.3), "cut") == 0.0
    assert share_left(1.0, True, after(1.0), "cut") == 0.0


def test_other_passes_and_steps_that_stand_alone_do_not_count():
    assert share_left(0.2, True, after(0.1), "drop") == pytest.approx(0.2)
    assert share_left(0.2, False, after(0.1), "cut") == 0.2
