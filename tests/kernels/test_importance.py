"""Importance sums are exact terms added in float64, of any axis and layout; versions differ in the order of adding alone."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perwatt.kernels import importance

ROUNDED = 2.0**-50


@st.composite
def tasks(draw):
    """(weights, axis, named arguments): 1 to 5 axes, any of the three measures."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    if draw(st.booleans()):
        place = draw(st.integers(0, len(shape) - 1))
        shape = (*shape[:place], draw(st.integers(20, 70)), *shape[place + 1 :])
    chance = np.random.default_rng(draw(st.integers(0, 99)))
    weights = chance.standard_normal(shape).astype(np.float32)
    axis, kind = draw(st.integers(-len(shape), len(shape) - 1)), draw(st.integers(0, 2))
    if kind == 0:
        return weights, axis, {}
    if kind == 1:
        return weights, axis, {"gradients": chance.standard_normal(shape).astype(np.float32)}
    along = draw(st.integers(-len(shape), len(shape) - 1))
    return weights, axis, {"norms": chance.random(shape[along]), "norms_axis": along}


def plainly(weights, axis, gradients=None, norms=None, norms_axis=None):
    """One term after the other, in Python, added exactly."""
    terms = [[] for _ in range(weights.shape[axis])]
    for place, weight in np.ndenumerate(weights):
        if gradients is not None:
            term = (float(weight) * float(gradients[place])) ** 2
        elif norms is not None:
            term = abs(float(weight)) * float(norms[place[norms_axis]])
        else:
            term = float(weight) ** 2
        terms[place[axis]].append(term)
    return [math.fsum(each) for each in terms]


@settings(deadline=None, max_examples=150)
@given(tasks())
def test_both_add_up_what_each_unit_holds(task):
    weights, axis, chosen = task
    wanted = plainly(weights, axis, **chosen)
    for function in (importance.reference, importance.compute):
        found = function(weights, axis, **chosen)
        assert found.dtype == np.float64 and found.shape == (weights.shape[axis],)
        np.testing.assert_allclose(found, wanted, rtol=(weights.size + 4) * 2.0**-53)


@pytest.mark.parametrize(
    "shape", [(3, 5000), (5000, 3), (1, 4099), (7, 40, 3, 3), (2, 300, 5, 5), (4, 3, 2, 2050), (9, 1, 3), (9, 7, 520)]
)
@pytest.mark.parametrize("kind", ["squares", "products", "norms"])
def test_tiles_of_columns_and_rests_of_rows(shape, kind):
    chance = np.random.default_rng(len(shape))
    weights, gradients = chance.standard_normal((2, *shape)).astype(np.float32)
    for axis in range(len(shape)):
        chosen = {"squares": {}, "products": {"gradients": gradients}}.get(kind)
        for along in range(len(shape)) if chosen is None else (0,):
            given_by = chosen if chosen is not None else {"norms": chance.random(shape[along]), "norms_axis": along}
            wanted = importance.reference(weights, axis, **given_by)
            np.testing.assert_allclose(importance.compute(weights, axis, **given_by), wanted, rtol=1e-12)


def test_products_neither_overflow_nor_vanish():
    weights = np.array([[3e38, 0, 1e-45, 2.0**-100]] * 30, np.float32).T.copy()
    for function in (importance.reference, importance.compute):
        for turned, axis in ((weights, 0), (weights.T.copy(), 1)):
            found = function(turned, axis, gradients=turned)
            np.testing.assert_allclose(found, 30 * weights[:, 0].astype(float) ** 4, rtol=ROUNDED)
            np.testing.assert_allclose(function(turned, axis), 30 * weights[:, 0].astype(float) ** 2, rtol=ROUNDED)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_stay_with_their_unit(bad):
    weights = np.ones((5, 40, 3), np.float32)
    weights[2, 7, 1] = -bad
    for function in (importance.reference, importance.compute):
        for axis, place in ((0, 2), (1, 7), (2, 1)):
            for chosen in ({}, {"gradients": np.ones_like(weights)}, {"norms": np.ones(40), "norms_axis": 1}):
                found = function(weights, axis, **chosen)
                np.testing.assert_equal(found[place], abs(bad))
                assert np.isfinite(np.delete(found, place)).all()


def test_no_weights_no_score_and_any_layout_will_do():
    for function in (importance.reference, importance.compute):
        assert function(np.zeros((0, 3)), 1).tolist() == [0, 0, 0] and function(np.zeros((0, 3)), 0).shape == (0,)
        weights = np.random.default_rng(0).standard_normal((30, 8, 4)).astype(np.float32)
        weights.flags.writeable = False
        wanted = function(weights, 1, norms=np.arange(4), norms_axis=2)
        for given_as in (np.asfortranarray(weights), weights.tolist(), np.repeat(weights, 2, 1)[:, ::2]):
            np.testing.assert_array_equal(function(given_as, 1, norms=np.arange(4), norms_axis=2), wanted)


@pytest.mark.parametrize("function", [importance.reference, importance.compute])
def test_what_does_not_fit_is_an_error(function):
    weights = np.ones((3, 4))
    for axis in (2, -3):
        with pytest.raises(ValueError, match=f"no axis {axis}"):
            function(weights, axis)
        with pytest.raises(ValueError, match=f"no axis {axis}"):
            function(weights, 0, norms=np.ones(3), norms_axis=axis)
    for shape in ((), (1,) * 6):
        with pytest.raises(ValueError, match="axes; 1 to 5"):
            function(np.ones(shape), 0)
    with pytest.raises(ValueError, match="gradients of shape"):
        function(weights, 0, gradients=np.ones((4, 3)))
    with pytest.raises(ValueError, match="norms of shape"):
        function(weights, 0, norms=np.ones(3), norms_axis=1)
    with pytest.raises(ValueError, match="both gradients and norms"):
        function(weights, 0, gradients=weights, norms=np.ones(3), norms_axis=0)
    for chosen in ({"norms": np.ones(3)}, {"norms_axis": 0}):
        with pytest.raises(ValueError, match="together"):
            function(weights, 0, **chosen)


def test_the_cuda_kernels_do_the_same(simulated):
    chance = np.random.default_rng(3)
    calls = []
    for shape, axis in (
        ((70, 9), 0),
        ((130, 9), 1),
        ((5, 3, 140), 1),
        ((3, 2, 6000), 1),
        ((4, 6, 3, 3), 1),
        ((0, 4), 1),
        ((2, 3, 1, 2, 2), -3),
    ):
        weights, gradients = chance.standard_normal((2, *shape)).astype(np.float32)
        for chosen in (
            {},
            {"gradients": gradients},
            *({"norms": chance.random(shape[a]), "norms_axis": a} for a in (0, 1)),
        ):
            calls.append(("perwatt.kernels.importance", "compute_cuda", (weights, axis), chosen))
    for (_, _, args, chosen), found in zip(calls, simulated(calls), strict=True):
        np.testing.assert_allclose(found, importance.reference(*args, **chosen), rtol=1e-12)
