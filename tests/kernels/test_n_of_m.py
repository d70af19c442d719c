"""N:M selection keeps exactly the N best of every M, the first of equal ones, and all versions agree bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from perwatt.kernels import n_of_m

patterns = st.integers(2, 32).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 2.0, np.inf, -np.inf, 1e-45, 3e38]), st.floats(width=32, allow_nan=False)
)


@st.composite
def scored(draw):
    """(scores, n, m) of any size, with many ties."""
    n, m = draw(patterns)
    shape = draw(st.integers(0, 5)), m * draw(st.integers(0, 6))
    return draw(arrays.arrays(np.float32, shape, elements=NUMBERS)), n, m


def kept_by_sorting(scores, n, m):
    """Python's own stable sort, group by group."""
    found = np.zeros(scores.shape, bool)
    for row, target in zip(scores.tolist(), found, strict=True):
        for first in range(0, len(row), m):
            for place in sorted(range(first, first + m), key=lambda at: -row[at])[:n]:
                target[place] = True
    return found


@settings(deadline=None, max_examples=100)
@given(scored())
def test_both_keep_the_n_best_and_the_first_of_equal_ones(case):
    scores, n, m = case
    wanted = kept_by_sorting(scores, n, m)
    for function in (n_of_m.reference, n_of_m.compute):
        found = function(scores, n, m)
        assert found.dtype == bool and found.shape == scores.shape
        np.testing.assert_array_equal(found, wanted)
    weights = np.random.default_rng(0).standard_normal(scores.shape).astype(np.float32)
    for function in (n_of_m.reference_pruned, n_of_m.compute_pruned):
        pruned = function(weights, scores, n, m)
        assert pruned.dtype == np.float32
        np.testing.assert_array_equal(pruned, np.where(wanted, weights, 0))


@pytest.mark.parametrize("n, m", [(2, 4), (1, 2), (3, 5), (4, 8), (31, 32)])
@pytest.mark.parametrize("groups", [1, 63, 64, 65, 200])
def test_any_number_of_groups(n, m, groups):
    scores = np.random.default_rng(m).integers(0, 9, (3, groups * m)).astype(np.float32)
    wanted = n_of_m.reference(scores, n, m)
    assert (wanted.reshape(-1, m).sum(axis=1) == n).all()
    np.testing.assert_array_equal(n_of_m.compute(scores, n, m), wanted)
    np.testing.assert_array_equal(n_of_m.compute_pruned(scores + 1, scores, n, m) != 0, wanted)


@pytest.mark.parametrize("m", [4, 8])
def test_weights_may_be_pruned_in_place_and_layouts_are_any(m):
    chance = np.random.default_rng(1)
    weights, scores = chance.standard_normal((2, 10, 5 * m)).astype(np.float32)
    wanted = n_of_m.reference_pruned(weights, scores, 2, m)
    turned = np.asfortranarray(scores)
    turned.flags.writeable = False
    np.testing.assert_array_equal(n_of_m.compute_pruned(np.asfortranarray(weights), turned, 2, m), wanted)
    assert n_of_m.compute_pruned(weights, scores, 2, m, out=weights) is weights
    np.testing.assert_array_equal(weights, wanted)
    for bad in (np.empty((3, 3), np.float32), np.empty((10, 5 * m)), np.empty((5 * m, 10), np.float32).T):
        with pytest.raises(ValueError, match="out is"):
            n_of_m.compute_pruned(weights, scores, 2, m, out=bad)


def test_zeros_put_in_are_plain_zeros_whatever_stood_there():
    weights = np.array([[-1.0, np.nan, np.inf, -2.0]], np.float32)
    scores = np.array([[3, 1, 0, 2]], np.float32)
    for function in (n_of_m.reference_pruned, n_of_m.compute_pruned):
        found = function(weights, scores, 2, 4)
        assert found.tolist() == [[-1, 0, 0, -2]] and not np.signbit(found[0, 1:3]).any()


@pytest.mark.parametrize("function", [n_of_m.reference, n_of_m.compute])
def test_what_can_not_be_selected_is_an_error(function):
    for n, m in ((0, 4), (4, 4), (5, 4), (1, 33), (-1, 4)):
        with pytest.raises(ValueError, match="1 ≤ N < M"):
            function(np.zeros((2, 8)), n, m)
    with pytest.raises(ValueError, match="9 columns are no multiple of 4"):
        function(np.zeros((2, 9)), 2, 4)
    with pytest.raises(ValueError, match="of shape"):
        function(np.zeros(8), 2, 4)
    for m in (4, 8):
        for place in range(m):
            scores = np.zeros((70, m))
            scores[69, place] = np.nan
            with pytest.raises(ValueError, match="NaN"):
                function(scores, 2, m)
            for pruned in (n_of_m.reference_pruned, n_of_m.compute_pruned):
                with pytest.raises(ValueError, match="NaN"):
                    pruned(np.zeros((70, m)), scores, 2, m)
    for pruned in (n_of_m.reference_pruned, n_of_m.compute_pruned):
        with pytest.raises(ValueError, match="weights of shape"):
            pruned(np.zeros((2, 4)), np.zeros((2, 8)), 2, 4)


def test_the_cuda_kernels_do_the_same(simulated):
    chance = np.random.default_rng(2)
    cases = [
        (chance.integers(0, 4, (rows, m * groups)).astype(np.float32), n, m)
        for rows, groups, n, m in ((3, 25, 2, 4), (1, 7, 1, 2), (5, 2, 20, 32), (0, 3, 2, 4))
    ]
    weights = [chance.standard_normal(scores.shape) for scores, _, _ in cases]
    calls = [("perwatt.kernels.n_of_m", "compute_cuda", case, {}) for case in cases]
    calls += [
        ("perwatt.kernels.n_of_m", "compute_pruned_cuda", (given, *case), {})
        for given, case in zip(weights, cases, strict=True)
    ]
    found = simulated(calls)
    for case, values, mask, pruned in zip(cases, weights, found[:4], found[4:], strict=True):
        np.testing.assert_array_equal(mask, n_of_m.reference(*case))
        assert mask.dtype == bool and pruned.dtype == np.float32
        np.testing.assert_array_equal(pruned, n_of_m.reference_pruned(values, *case))
    with pytest.raises(AssertionError, match="NaN"):
        simulated([("perwatt.kernels.n_of_m", "compute_cuda", (np.full((1, 4), np.nan), 2, 4), {})])
