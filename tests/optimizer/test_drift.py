"""Drift: how far outputs moved, what is allowed, and what can't be compared at all."""

import math

import ml_dtypes
import numpy as np
import pytest

from perwatt.contract import Tolerance
from perwatt.drift import Drift, drift

TIGHT = Tolerance(atol=0.0, rtol=0.01)
NAN, INF = float("nan"), float("inf")


def of(before, after, tolerance=TIGHT, dtype=np.float32):
    """The drift of one output, one batch."""
    return drift([{"y": np.asarray(before, dtype)}], [{"y": np.asarray(after, dtype)}], tolerance)


def test_equal_outputs_do_not_drift():
    assert of([1, 2, 3], [1, 2, 3]) == Drift(0.0, 0.0)


def test_drift_is_the_largest_change_and_its_share_of_the_rms():
    found = of([3, 4, 0, 0], [3, 4, 0, 0.5], None)
    assert found.max_abs == pytest.approx(0.5)
    assert found.relative == pytest.approx(0.5 / 2.5)


def test_what_is_allowed_is_atol_and_a_share_of_the_rms():
    assert not of([10, 10], [10, 10.09]).reasons
    assert of([10, 10], [10, 10.2]).reasons == ("output y moved by 0.2, 0.1 is allowed",)
    assert not of([10, 10], [10, 10.2], Tolerance(atol=0.11, rtol=0.01)).reasons
    assert not of([10, 10], [10, 1e9], None).reasons


def test_the_rms_is_that_of_all_batches_and_each_output_has_its_own():
    before = [
        {"big": np.float32([100]), "small": np.float32([0.1])},
        {"big": np.float32([0]), "small": np.float32([0.1])},
    ]
    after = [
        {"big": np.float32([100]), "small": np.float32([0.1])},
        {"big": np.float32([0.5]), "small": np.float32([0.2])},
    ]
    assert drift(before, after, TIGHT).reasons == ("output small moved by 0.1, 0.001 is allowed",)


def test_batches_may_have_other_shapes():
    before = [{"y": np.ones((2, 3), np.float32)}, {"y": np.ones((2, 5), np.float32)}]
    assert drift(before, before, TIGHT) == Drift(0.0, 0.0)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_])
def test_whole_numbers_and_truth_values_must_be_equal(dtype):
    found = of([0, 1, 1], [0, 1, 0], Tolerance(atol=5, rtol=5), dtype)
    assert found.reasons == ("output y: 1 of 3 entries differ",)
    assert not of([0, 1, 1], [0, 1, 1], TIGHT, dtype).reasons


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_every_floating_type_is_measured(dtype):
    found = of([1, 2], [1, 2.5], Tolerance(atol=1, rtol=0), dtype)
    assert found.max_abs == 0.5 and not found.reasons


def test_nan_and_infinity_in_the_same_places_are_equal():
    assert of([1, NAN, INF, -INF], [1, NAN, INF, -INF]) == Drift(0.0, 0.0)
    assert not of([100, NAN], [100.5, NAN]).reasons


@pytest.mark.parametrize("after", [[1, NAN], [1, INF], [NAN, 2], [INF, 2]])
def test_nan_or_infinity_in_other_places_is_infinitely_far(after):
    found = of([1, 2], after)
    assert found.reasons == ("output y: NaN or infinity in other places",)
    assert found.max_abs == found.relative == math.inf
    assert of([1, 2], after, None) == Drift(math.inf, math.inf)
    assert of(after, [1, 2]).reasons == found.reasons


def test_the_sign_of_infinity_counts():
    assert of([INF], [-INF]).reasons


def test_a_move_away_from_all_zeros_is_infinitely_far_in_relation():
    found = of([0, 0], [0, 0.5], Tolerance(atol=1, rtol=0))
    assert found.relative == math.inf and not found.reasons


@pytest.mark.parametrize("after", [np.ones((3, 1), np.float32), np.ones(3, np.float64), np.ones(2, np.float32)])
def test_other_shapes_and_types_break_any_tolerance(after):
    for tolerance in (None, Tolerance(1e9, 1e9)):
        found = drift([{"y": np.ones(3, np.float32)}], [{"y": after}], tolerance)
        assert found == Drift(math.inf, math.inf, ("output y changed its shape or type",))


def test_other_names_break_any_tolerance():
    found = drift([{"y": np.ones(3)}], [{"z": np.ones(3)}], None)
    assert found == Drift(math.inf, math.inf, ("the outputs have other names",))


def test_empty_outputs_and_no_batches_do_not_drift():
    assert of([], []) == Drift(0.0, 0.0)
    assert drift([], [], TIGHT) == Drift(0.0, 0.0)


def test_another_number_of_batches_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        drift([{"y": np.ones(1)}], [], TIGHT)
