"""SparseGPT's reference equals optimal brain surgery written out, its kernels choose by what the columns before leave, and a
layer's outputs suffer less than half of what cutting the smallest weights does to them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perwatt.kernels import gptq, sparse_gpt
from perwatt.kernels.sparse_gpt import Pattern

BOTH = (sparse_gpt.reference, sparse_gpt.compute)
NEAR = 1e-3
"""How far, relatively, a cost may lie on the wrong side: what float32 rounds away comes to far less."""


def layer(rows, width, seed=0):
    """Weights, and the Hessian of inputs that are correlated."""
    chance = np.random.default_rng(seed)
    hidden = max(1, width // 4)
    inputs = chance.normal(size=(2 * width + 2, hidden)) @ chance.normal(size=(hidden, width)) / np.sqrt(hidden)
    inputs += 0.3 * chance.normal(size=inputs.shape)
    return (0.02 * chance.normal(size=(rows, width))).astype(np.float32), 2 / len(inputs) * inputs.T @ inputs


def left(weights, hessian, found):
    """The squared error over the layer's outputs."""
    missed = weights.astype(np.float64) - found
    return np.einsum("ij,jk,ik->", missed, hessian, missed)


def surgery(weights, hessian, pattern, damping):
    """Optimal brain surgery: after each column the inverse of what is left of the Hessian. Blocks are one: widths below 128."""
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    moved, goes = weights.astype(float), np.zeros(weights.shape, bool)
    price = [1 / np.linalg.inv(damped[i:, i:])[0, 0] for i in range(len(hessian))]
    cost = moved**2 * price
    if pattern.ratio is not None:
        for place in sorted(np.ndindex(cost.shape), key=lambda at: cost[at])[: round(pattern.ratio * cost.size)]:
            goes[place] = True
    for i in range(len(hessian)):
        if pattern.m and i % pattern.m == 0:
            for row in range(len(moved)):
                columns = sorted(range(i, i + pattern.m), key=lambda j: -(moved[row, j] ** 2) * price[j])
                goes[row, columns[pattern.n :]] = True
        inverse = np.linalg.inv(damped[i:, i:])
        for row in np.flatnonzero(goes[:, i]):
            moved[row, i:] -= moved[row, i] / inverse[0, 0] * inverse[0]
            moved[row, i] = 0
    return moved


def assert_right(found, weights, hessian, pattern, damping=0.01):
    """Each weight is 0 or what all errors before it make of it, and those that are 0 cost no more than those that aren't: both
    from the weights before, exactly, so that one choice by a hair counts once."""
    width = weights.shape[1]
    diagonal = np.diag(hessian).astype(float)
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else 1.0
    original = np.where(live, weights.astype(float), 0)
    damped = hessian / mean + np.diag(np.where(live, 0.0, 1.0) + damping)
    factor = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    off = original - found
    assert found.shape == weights.shape and not found[:, ~live].any()
    size = np.abs(original).max(initial=0) + np.abs(found).max(initial=0)

    def moved_by(first, columns):
        """Columns as moved by those before `first`."""
        before = off[:, :first] @ factor[:first, columns]
        inner = factor[columns, columns]
        return original[:, columns] + np.linalg.solve(inner.T, before.T).T

    for i in range(width):
        kept = found[:, i] != 0
        now = original[:, i] + off[:, :i] @ factor[:i, i] / factor[i, i]
        assert np.abs(found[kept, i] - now[kept]).max(initial=0) <= NEAR * size
    step = pattern.m or 128
    for first in range(0, width, step):
        group = slice(first, min(first + step, width))
        cost = np.abs(moved_by(first, group)) * factor.diagonal()[group]
        zero, slack = found[:, group] == 0, NEAR * size * factor.diagonal().max()
        if pattern.m:
            assert (zero.sum(axis=1) >= pattern.m - pattern.n).all()
            worst, best = np.where(zero, cost, 0).max(axis=1), np.where(zero, np.inf, cost).min(axis=1)
            assert (worst <= best + slack).all()
        else:
            assert zero.sum() >= round(pattern.ratio * zero.size)
            if zero.any() and not zero.all():
                assert cost[zero].max() <= cost[~zero].min() + slack


@st.composite
def patterns(draw, most=12):
    """(width, pattern)."""
    if draw(st.booleans()):
        return draw(st.integers(1, most)), Pattern(ratio=draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.99])))
    m = draw(st.integers(2, 9))
    return m * draw(st.integers(1, max(1, most // m))), Pattern(n=draw(st.integers(1, m - 1)), m=m)


@settings(deadline=None, max_examples=50)
@given(patterns(), st.integers(1, 4), st.integers(0, 2**32), st.sampled_from([0.01, 0.1, 1.0]))
def test_the_reference_is_optimal_brain_surgery(chosen, rows, seed, damping):
    width, pattern = chosen
    weights, hessian = layer(rows, width, seed)
    found = sparse_gpt.reference(weights, hessian, pattern, damping=damping)
    np.testing.assert_allclose(found, surgery(weights, hessian, pattern, damping), atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(patterns(60), st.integers(1, 9), st.integers(0, 2**32))
def test_both_choose_by_what_earlier_columns_leave(chosen, rows, seed):
    width, pattern = chosen
    weights, hessian = layer(rows, width, seed)
    for function in BOTH:
        assert_right(function(weights, hessian, pattern), weights, hessian, pattern)


@pytest.mark.parametrize("rows, width", [(1, 128), (127, 144), (128, 256), (129, 130), (260, 272), (143, 396)])
@pytest.mark.parametrize(
    "pattern", [Pattern(ratio=0.5), Pattern(n=1, m=2), Pattern(n=2, m=4), Pattern(n=3, m=11)], ids=str
)
def test_tiles_of_rows_and_blocks_of_columns_may_end_anywhere(rows, width, pattern):
    width -= width % (pattern.m or 1)
    weights, hessian = layer(rows, width, rows)
    wanted, found = (function(weights, hessian, pattern) for function in BOTH)
    assert found.dtype == np.float32
    assert ((found == 0) == (wanted == 0)).mean() > 0.999
    assert left(weights, hessian, found) == pytest.approx(left(weights, hessian, wanted), rel=0.01)
    assert_right(found, weights, hessian, pattern)
    assert_right(wanted, weights, hessian, pattern)


@pytest.mark.parametrize("pattern", [Pattern(ratio=0.5), Pattern(ratio=0.3), Pattern(n=2, m=4)], ids=str)
def test_outputs_suffer_less_than_half_of_what_cutting_the_smallest_weights_does(pattern):
    weights, hessian = layer(64, 256)
    # Inputs without any correlation: nothing makes up for anything, and a weight costs its square.
    smallest = sparse_gpt.reference(weights, np.eye(256), pattern)
    np.testing.assert_allclose(smallest[smallest != 0], weights[smallest != 0], atol=1e-12)
    for function in BOTH:
        found = function(weights, hessian, pattern)
        assert (found == 0).mean() == pytest.approx((smallest == 0).mean(), abs=1e-3)
        assert left(weights, hessian, found) < left(weights, hessian, smallest) / 2


def test_without_correlation_the_smallest_go_and_the_first_of_equal_ones_stay():
    weights = np.array([[3, -1, 2, -4, 1, 1, 1, 1], [0, 0, 0, 0, 5, -5, 6, 1]], np.float32)
    for function in BOTH:
        assert function(weights, np.eye(8), Pattern(n=2, m=4)).tolist() == [
            [3, 0, 0, -4, 1, 1, 0, 0], [0, 0, 0, 0, 5, 0, 6, 0]
        ]  # fmt: skip
        # By ratio the first of equal ones go: eight of sixteen are four zeros and four of the six ones.
        assert function(weights, np.eye(8), Pattern(ratio=0.5)).tolist() == [
            [3, 0, 2, -4, 0, 0, 0, 1], [0, 0, 0, 0, 5, -5, 6, 1]
        ]  # fmt: skip


def test_dead_inputs_get_no_weight_and_change_nothing_else():
    weights, hessian = layer(9, 40)
    dead = np.arange(40, 44)
    wide, holed = np.full((9, 44), 5, np.float32), np.zeros((44, 44))
    wide[:, :40], holed[:40, :40] = weights, hessian
    for function in BOTH:
        found = function(wide, holed, Pattern(n=2, m=4))
        np.testing.assert_allclose(found[:, :40], function(weights, hessian, Pattern(n=2, m=4)), atol=1e-7)
        assert not found[:, dead].any()
        assert not function(wide, holed, Pattern(ratio=0.0))[:, dead].any()
        assert not function(wide, np.zeros((44, 44)), Pattern(n=2, m=4)).any()
        # Their zeros count among those that go.
        shared = function(wide, holed, Pattern(ratio=4 / 44))
        np.testing.assert_allclose(shared[:, :40], weights, rtol=1e-6)


@pytest.mark.parametrize("unit", [2.0**-900, 2.0**-140, 2.0**140, 2.0**900])
@pytest.mark.parametrize("pattern", [Pattern(ratio=0.5), Pattern(n=2, m=4)], ids=str)
def test_the_inputs_unit_does_not_matter(unit, pattern):
    weights, hessian = layer(20, 60)
    for function in BOTH:
        np.testing.assert_allclose(
            function(weights, unit * hessian, pattern), function(weights, hessian, pattern), atol=1e-6
        )


@pytest.mark.parametrize("size", [1e30, 1e-30, 0.0])
def test_large_small_and_zero_weights(size):
    weights, hessian = layer(20, 60)
    weights = (weights / np.abs(weights).max() * np.float32(size)).astype(np.float32)
    for pattern in (Pattern(ratio=0.5), Pattern(n=2, m=4)):
        for function in BOTH:
            found = function(weights, hessian, pattern)
            assert np.isfinite(found).all() and (found == 0).mean() >= 0.5 and np.abs(found - weights).max() <= 3 * size


def test_layers_may_share_a_factor_and_nothing_is_written_to():
    weights, hessian = layer(40, 60)
    weights.flags.writeable = hessian.flags.writeable = False
    factor = gptq.factorize(hessian)
    for rows in (slice(0, 25), slice(25, 40)):
        for pattern in (Pattern(ratio=0.5), Pattern(n=2, m=4)):
            wanted = sparse_gpt.compute(weights[rows], hessian, pattern)
            np.testing.assert_array_equal(sparse_gpt.compute_columns(weights[rows], factor, pattern), wanted)
            np.testing.assert_array_equal(
                sparse_gpt.compute(weights[rows].tolist(), np.asfortranarray(hessian), pattern), wanted
            )
    assert sparse_gpt.compute(weights[:0], hessian, Pattern(ratio=0.5)).shape == (0, 60)
    with pytest.raises(ValueError, match="ordered: True"):
        sparse_gpt.compute_columns(weights, gptq.factorize(hessian, ordered=True), Pattern(ratio=0.5))


@pytest.mark.parametrize("function", BOTH)
def test_what_can_not_be_pruned_is_an_error(function):
    weights, hessian = layer(4, 6)
    half = Pattern(ratio=0.5)
    for bad in (np.nan, np.inf, 2e30):
        broken = weights.copy()
        broken[1, 2] = bad
        with pytest.raises(ValueError, match="weights hold"):
            function(broken, hessian, half)
        broken = hessian.copy()
        broken[2, 3] = broken[3, 2] = bad
        with pytest.raises(ValueError, match=r"NaN or infinity|more damping"):
            function(weights, broken, half)
    for shape in ((6,), (4, 0), (2, 3, 4)):
        with pytest.raises(ValueError, match="weights of shape"):
            function(np.zeros(shape), hessian, half)
    with pytest.raises(ValueError, match="Hessian of shape"):
        function(weights, np.eye(5), half)
    for pattern in (
        Pattern(),
        Pattern(ratio=0.5, n=2, m=4),
        Pattern(ratio=1.0),
        Pattern(ratio=-0.1),
        Pattern(ratio=np.nan),
    ):
        with pytest.raises(ValueError, match="ratio"):
            function(weights, hessian, pattern)
    for pattern in (Pattern(n=3, m=3), Pattern(n=0, m=3), Pattern(n=1, m=33)):
        with pytest.raises(ValueError, match="1 ≤ N < M"):
            function(weights, hessian, pattern)
    with pytest.raises(ValueError, match="no multiple of 4"):
        function(weights, hessian, Pattern(n=2, m=4))
    with pytest.raises(ValueError, match="damping"):
        function(weights, hessian, half, damping=-1)


def test_the_cuda_kernel_does_the_same(simulated):
    pytest.importorskip("torch")
    cases = [
        ((5, 12), Pattern(ratio=0.5)), ((35, 8), Pattern(n=2, m=4)), ((3, 9), Pattern(n=1, m=3)),
        ((2, 131), Pattern(ratio=0.7)), ((2, 132), Pattern(n=2, m=4)), ((1, 1), Pattern(ratio=0.0)),
    ]  # fmt: skip
    layers = [layer(*shape, seed) for seed, (shape, _) in enumerate(cases)]
    layers[0][1][3] = layers[0][1][:, 3] = 0
    calls = [
        ("perwatt.kernels.sparse_gpt", "compute_cuda", (*pair, pattern), {})
        for pair, (_, pattern) in zip(layers, cases, strict=True)
    ]
    empty = ("perwatt.kernels.sparse_gpt", "compute_cuda", (np.zeros((0, 4)), np.eye(4), Pattern(n=2, m=4)), {})
    *results, nothing = simulated([*calls, empty])
    assert nothing.shape == (0, 4)
    for (weights, hessian), (_, pattern), found in zip(layers, cases, results, strict=True):
        assert found.dtype == np.float32
        assert_right(found, weights, hessian, pattern)
        wanted = sparse_gpt.compute(weights, hessian, pattern)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
