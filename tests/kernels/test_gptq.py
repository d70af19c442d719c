"""GPTQ's reference equals optimal brain surgery written out, its kernels give the nearest code to what the columns before
leave, and what a layer puts out suffers less than half of what rounding to nearest does to it."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perwatt.kernels import gptq

NO_CODE = 0.02
"""How far, in steps, a value may lie beyond the middle of two codes: what float32 rounds away comes to far less."""


def layer(rows, width, seed=0):
    """Weights, and the Hessian of inputs that are correlated."""
    chance = np.random.default_rng(seed)
    hidden = max(1, width // 4)
    inputs = chance.normal(size=(2 * width + 2, hidden)) @ chance.normal(size=(hidden, width)) / np.sqrt(hidden)
    inputs += 0.3 * chance.normal(size=inputs.shape)
    return (0.02 * chance.normal(size=(rows, width))).astype(np.float32), 2 / len(inputs) * inputs.T @ inputs


def left(weights, hessian, found, group_size=None):
    """The squared error over the layer's outputs."""
    missed = weights.astype(np.float64) - found.dequantized(group_size)
    return np.einsum("ij,jk,ik->", missed, hessian, missed)


def bounds(bits, symmetric):
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def base_scale(values, bits, symmetric, positive):
    """Scale and zero point of one group, in Python."""
    low, high = bounds(bits, symmetric)
    least, most = min(0.0, *values), max(0.0, *values)
    if not symmetric:
        scale = (most - least) / high
    elif positive:
        scale = max(most / high, least / low)
    else:
        scale = (most if most > -least else least) / low
    scale = scale if abs(scale) >= 2.0**-125 else 1.0
    return scale, 0 if symmetric else min(round(-least / scale), high)


def surgery(weights, hessian, bits, group_size, symmetric, positive, damping, ordered):
    """Codes by optimal brain surgery: after each column the inverse of what is left of the Hessian, row by row."""
    low, high = bounds(bits, symmetric)
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    size = group_size or len(hessian)
    order = sorted(range(len(hessian)), key=lambda j: -hessian[j, j]) if ordered else list(range(len(hessian)))
    codes = np.zeros(weights.shape, int)
    for row, target in zip(weights.astype(float), codes, strict=True):
        scales, original = {}, row.copy()
        for i, column in enumerate(order):
            group = column // size
            if group not in scales:
                values = (original if ordered else row)[group * size : (group + 1) * size]
                scale, zero = base_scale(values.tolist(), bits, symmetric, positive)
                scales[group] = np.float64(np.float32(scale)), zero
            scale, zero = scales[group]
            code = min(max(round(row[column] / scale) + zero, low), high)
            rest = order[i:]
            inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
            row[rest] -= (row[column] - (code - zero) * scale) / inverse[0, 0] * inverse[0]
            target[column] = code
    return codes


def assert_right(found, weights, hessian, bits=4, group_size=None, *, symmetric=True, positive=False, search=False,
                 damping=0.01, ordered=False):  # fmt: skip
    """Each code is the nearest one to its weight as moved for all errors made before, each scale that of its group as moved
    when it began: both from the codes before, exactly, so that one code on the other side of a middle counts once."""
    rows, width = weights.shape
    low, high = bounds(bits, symmetric)
    size = min(group_size or width, width)
    diagonal = np.diag(hessian).astype(float)
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else 1.0
    given = np.where(live, weights.astype(float), 0)
    damped = hessian / mean + np.diag(np.where(live, 0.0, 1.0) + damping)
    order = np.argsort(-diagonal, kind="stable") if ordered else np.arange(width)
    factor = np.linalg.cholesky(damped[np.ix_(order, order)][::-1, ::-1])[::-1, ::-1]
    missed = (given - found.dequantized(size))[:, order]
    zeros = np.zeros(found.scales.shape) if found.zero_points is None else found.zero_points.astype(float)
    assert found.codes.dtype == (np.int8 if symmetric else np.uint8) and found.codes.shape == weights.shape
    assert found.scales.dtype == np.float32 and found.scales.shape == (rows, -(-width // size))
    assert (found.zero_points is None) == symmetric
    assert found.codes.min() >= low and found.codes.max() <= high
    for i, column in enumerate(order):
        moved = given[:, column] + missed[:, :i] @ factor[:i, i] / factor[i, i]
        group = column // size
        steps = np.clip(moved / found.scales[:, group] + zeros[:, group], low, high)
        assert np.abs(steps - found.codes[:, column]).max() <= 0.5 + NO_CODE
    for group in range(found.scales.shape[1]):
        columns = slice(group * size, min((group + 1) * size, width))
        moved = given[:, columns]
        if not ordered:
            before = missed[:, : columns.start] @ factor[: columns.start, columns]
            moved = moved + np.linalg.solve(factor[columns, columns].T, before.T).T
        for row in range(rows):
            scale, zero = base_scale(moved[row].tolist(), bits, symmetric, positive)
            assert abs(zero - zeros[row, group]) <= (abs(-min(0, *moved[row]) / scale % 1 - 0.5) < NO_CODE)
            if search:
                half = 2.0 ** (bits - 1)
                factors = (*gptq.FACTORS, *([half / (half - 1)] if symmetric and not positive else []))
                tried = [*(scale * f for f in factors), found.scales[row, group]]
                errors = [
                    weighted(moved[row], t, zeros[row, group], low, high, diagonal[columns] / mean) for t in tried
                ]
                assert min(abs(found.scales[row, group] / t - 1) for t in tried[:-1]) < 1e-3
                assert errors[-1] <= 1.01 * min(errors) + 1e-6 * weighted(
                    moved[row], 1e9, 0, low, high, diagonal[columns] / mean
                )
            else:
                assert found.scales[row, group] == pytest.approx(scale, rel=1e-3, abs=1e-6)


def weighted(values, scale, zero, low, high, weight):
    codes = np.clip(np.rint(values / scale), low - zero, high - zero)
    return float((weight * (values - codes * scale) ** 2).sum())


options = st.fixed_dictionaries(
    {
        "bits": st.sampled_from(gptq.BITS),
        "group_size": st.one_of(st.none(), st.integers(1, 50)),
        "symmetric": st.booleans(),
        "positive": st.booleans(),
        "search": st.booleans(),
        "damping": st.sampled_from([0.01, 0.1, 1.0, 0.0001]),
        "ordered": st.booleans(),
    }
)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 10), st.integers(0, 2**32), options)
def test_the_reference_is_optimal_brain_surgery(rows, width, seed, chosen):
    weights, hessian = layer(rows, width, seed)
    chosen["search"] = False
    found = gptq.reference(weights, hessian, **chosen)
    wanted = surgery(weights, hessian, *(chosen[k] for k in SURGERY))
    np.testing.assert_array_equal(found.codes, wanted)


SURGERY = ("bits", "group_size", "symmetric", "positive", "damping", "ordered")


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 50), st.integers(0, 2**32), options)
def test_both_round_to_the_nearest_code_of_what_earlier_columns_leave(rows, width, seed, chosen):
    weights, hessian = layer(rows, width, seed)
    for function in (gptq.reference, gptq.compute):
        assert_right(function(weights, hessian, **chosen), weights, hessian, **chosen)


@pytest.mark.parametrize("rows, width", [(1, 1), (127, 2), (128, 127), (129, 128), (17, 129), (260, 257), (143, 300)])
@pytest.mark.parametrize("group_size", [None, 1, 16, 100, 128, 129])
@pytest.mark.parametrize("ordered", [False, True])
def test_tiles_of_rows_and_blocks_of_columns_may_end_anywhere(rows, width, group_size, ordered):
    weights, hessian = layer(rows, width, rows)
    wanted = gptq.reference(weights, hessian, 4, group_size, ordered=ordered)
    found = gptq.compute(weights, hessian, 4, group_size, ordered=ordered)
    assert (found.codes == wanted.codes).mean() > 0.999
    assert np.isclose(found.scales, wanted.scales, rtol=1e-4, atol=1e-4 * np.abs(wanted.scales).mean()).mean() > 0.999
    assert left(weights, hessian, found, group_size) == pytest.approx(
        left(weights, hessian, wanted, group_size), rel=0.01
    )


SETTINGS = [
    {},
    {"bits": 2, "group_size": 32, "search": True},
    {"bits": 3, "group_size": 48, "symmetric": False},
    {"bits": 8, "group_size": 64},
    {"bits": 8, "symmetric": False, "ordered": True},
    {"group_size": 128, "positive": True, "search": True},
    {"group_size": 32, "symmetric": False, "search": True},
    {"group_size": 200, "search": True, "ordered": True},
    {"group_size": 150, "damping": 1e-5},
]


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_the_kernel_leaves_the_references_error_by_the_same_codes(chosen):
    weights, hessian = layer(96, 384)
    size = chosen.get("group_size")
    wanted, found = gptq.reference(weights, hessian, **chosen), gptq.compute(weights, hessian, **chosen)
    # The finer the steps, the more values lie within rounding of a boundary; BLAS rounds otherwise with every thread.
    assert (found.codes == wanted.codes).mean() > (0.999 if chosen.get("bits", 4) < 8 else 0.99)
    assert left(weights, hessian, found, size) == pytest.approx(left(weights, hessian, wanted, size), rel=0.01)
    assert_right(found, weights, hessian, **chosen)


@pytest.mark.parametrize(
    "bits, group_size, symmetric", [(4, None, True), (4, 128, True), (4, 32, False), (3, 64, True)]
)
def test_outputs_suffer_less_than_half_of_what_rounding_to_nearest_does(bits, group_size, symmetric):
    weights, hessian = layer(64, 256)
    # Inputs without any correlation: nothing makes up for anything, which is rounding to nearest.
    nearest = gptq.reference(weights, np.eye(256), bits, group_size, symmetric=symmetric)
    scaled = nearest.scales[:, np.arange(256) // (group_size or 256)]
    assert np.abs(weights - nearest.dequantized(group_size)).max() <= 1.02 * np.abs(scaled).max()
    plain = left(weights, hessian, nearest, group_size)
    for function in (gptq.reference, gptq.compute):
        found = function(weights, hessian, bits, group_size, symmetric=symmetric)
        assert left(weights, hessian, found, group_size) < plain / 2


def test_without_correlation_it_is_rounding_to_nearest_half_to_even():
    weights = np.array([[-8.0, 0.5, 1.5, 2.5, -0.5, -1.5, 7.4, 9.0]], np.float32)
    for function in (gptq.reference, gptq.compute):
        found = function(weights[:, :7], np.eye(7))
        assert found.codes.tolist() == [[-8, 0, 2, 2, 0, -2, 7]] and found.scales.tolist() == [[1.0]]
        # The value farthest from 0 gets the code that has no mirror image.
        assert function(weights[:, 7:], np.eye(1)).codes.tolist() == [[-8]]
        assert function(weights[:, 7:], np.eye(1)).scales.tolist() == [[-1.125]]
        assert function(weights[:, 7:], np.eye(1), positive=True).codes.tolist() == [[7]]
        uneven = function(np.array([[-5.0, 10.0, 2.5, 3.5]]), np.eye(4), symmetric=False)
        assert uneven.codes.tolist() == [[0, 15, 7, 9]] and uneven.zero_points.tolist() == [[5]]


def test_a_search_clips_what_the_inputs_make_little_of():
    # The outlier's input is small, so that giving it up serves the others.
    weights = np.array([[-2.0, *np.linspace(-1, 1, 15)]], np.float32)
    hessian = np.diag([1e-4, *np.ones(15)])
    for function in (gptq.reference, gptq.compute):
        plain, searched = function(weights, hessian), function(weights, hessian, search=True)
        assert abs(searched.scales[0, 0]) < 0.9 * abs(plain.scales[0, 0])
        assert left(weights, hessian, searched) < 0.8 * left(weights, hessian, plain)


def test_dead_inputs_get_no_weight_and_change_nothing_else():
    weights, hessian = layer(9, 40)
    alive = np.setdiff1d(np.arange(43), [0, 20, 42])
    wide, holed = np.full((9, 43), 5, np.float32), np.zeros((43, 43))
    wide[:, alive], holed[np.ix_(alive, alive)] = weights, hessian
    for function in (gptq.reference, gptq.compute):
        for symmetric in (True, False):
            for ordered in (True, False):
                wanted = function(weights, hessian, symmetric=symmetric, ordered=ordered)
                found = function(wide, holed, symmetric=symmetric, ordered=ordered)
                np.testing.assert_array_equal(found.codes[:, alive], wanted.codes)
                np.testing.assert_array_equal(found.scales, wanted.scales)
                assert not found.dequantized()[:, [0, 20, 42]].any()
        assert not function(wide, np.zeros((43, 43)), 4, 5).codes.any()


def test_where_columns_stand_does_not_matter_if_they_are_ordered():
    weights, hessian = layer(20, 60)
    moved = np.random.default_rng(1).permutation(60)
    for function in (gptq.reference, gptq.compute):
        plain = function(weights, hessian, ordered=True)
        shuffled = function(weights[:, moved], hessian[np.ix_(moved, moved)], ordered=True)
        np.testing.assert_array_equal(shuffled.codes, plain.codes[:, moved])
        assert (plain.codes != function(weights, hessian).codes).any()


@pytest.mark.parametrize("unit", [2.0**-900, 2.0**-140, 2.0**140, 2.0**900])
def test_the_inputs_unit_does_not_matter(unit):
    weights, hessian = layer(20, 60)
    for function in (gptq.reference, gptq.compute):
        wanted, found = function(weights, hessian, 4, 16), function(weights, unit * hessian, 4, 16)
        np.testing.assert_array_equal(found.codes, wanted.codes)


@pytest.mark.parametrize("size", [1e30, 1e-30, 1e-37, 1e-42, 0.0])
@pytest.mark.parametrize("chosen", [{}, {"symmetric": False}, {"positive": True, "search": True}], ids=str)
def test_large_small_subnormal_and_zero_weights(size, chosen):
    weights, hessian = layer(20, 60)
    weights = (weights / np.abs(weights).max() * np.float32(size)).astype(np.float32)
    found = [function(weights, hessian, 4, 16, **chosen) for function in (gptq.reference, gptq.compute)]
    for one in found:
        assert np.isfinite(one.scales).all() and np.abs(one.scales).min() > 2.0**-126
        if size < 1e-38:
            assert (one.scales == 1).all() and not one.dequantized(16).any()
        else:
            assert np.abs(one.dequantized(16) - weights).max() < 3 * size
    assert (found[0].codes == found[1].codes).mean() > 0.99


def test_constant_weights_and_no_rows():
    hessian = layer(1, 30)[1]
    for function in (gptq.reference, gptq.compute):
        found = function(np.full((3, 30), -2, np.float32), np.eye(30))
        assert (found.codes == -8).all() and (found.scales == 0.25).all()
        empty = function(np.zeros((0, 30)), hessian, 4, 7, symmetric=False)
        assert [part.shape for part in empty] == [(0, 30), (0, 5), (0, 5)]


def test_layers_may_share_a_factor():
    weights, hessian = layer(40, 60)
    for ordered in (False, True):
        factor = gptq.factorize(hessian, ordered=ordered)
        for rows in (slice(0, 25), slice(25, 40)):
            wanted = gptq.compute(weights[rows], hessian, 4, 16, ordered=ordered)
            found = gptq.compute_columns(weights[rows], factor, 4, 16)
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(one, other)
        damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(60)
        upper = np.triu(factor.triangle).astype(float) * np.sqrt(np.diag(hessian).mean())
        np.testing.assert_allclose(upper.T @ upper, damped[np.ix_(factor.order, factor.order)], atol=1e-5)


def test_a_hessian_that_float32_can_not_bear_is_factorized_in_float64():
    weights, _ = layer(20, 60)
    inputs = np.random.default_rng(2).normal(size=(60, 4)) @ np.random.default_rng(3).normal(size=(4, 60))
    thin = inputs.T @ inputs
    found = gptq.compute(weights, thin, damping=1e-7)
    assert_right(found, weights, thin, damping=1e-7)
    assert gptq.EASY * 60 > 1e-7
    for function in (gptq.reference, gptq.compute):
        with pytest.raises(ValueError, match="more damping"):
            function(weights, thin - 0.1 * np.eye(60) * np.diag(thin).mean(), damping=0)


@pytest.mark.parametrize(
    "convert", [np.asfortranarray, lambda a: np.repeat(np.repeat(a, 2, 0), 2, 1)[::2, ::2], np.ndarray.tolist]
)
def test_any_layout_will_do_and_nothing_is_written_to(convert):
    weights, hessian = layer(11, 30)
    weights.flags.writeable = hessian.flags.writeable = False
    for function in (gptq.reference, gptq.compute):
        for ordered in (False, True):
            wanted = function(weights, hessian, 4, 8, ordered=ordered)
            found = function(convert(weights), convert(hessian), 4, 8, ordered=ordered)
            np.testing.assert_array_equal(found.codes, wanted.codes)
    halves = gptq.compute(weights.astype(np.float16), hessian.astype(np.float32))
    np.testing.assert_array_equal(halves.codes, gptq.compute(weights.astype(np.float16).astype(float), hessian).codes)


@pytest.mark.parametrize("function", [gptq.reference, gptq.compute])
def test_what_can_not_be_quantized_is_an_error(function):
    weights, hessian = layer(4, 6)
    for bad in (np.nan, np.inf, -np.inf, 2e30):
        broken = weights.copy()
        broken[1, 2] = bad
        with pytest.raises(ValueError, match="weights hold"):
            function(broken, hessian)
    for bad in (np.nan, np.inf):
        for place in ((2, 2), (2, 3)):
            broken = hessian.copy()
            broken[place] = broken[place[::-1]] = bad
            with pytest.raises(ValueError, match=r"NaN( or|,) infinity"):
                function(weights, broken)
    with pytest.raises(ValueError, match="something negative"):
        function(weights, -hessian)
    for shape in ((6,), (4, 0), (2, 3, 4)):
        with pytest.raises(ValueError, match="weights of shape"):
            function(np.zeros(shape), hessian)
    for shape in ((6, 5), (5, 5), (6,), (0, 0)):
        with pytest.raises(ValueError, match="Hessian of shape"):
            function(weights, np.ones(shape))
    for bits in (1, 5, 16):
        with pytest.raises(ValueError, match="bits"):
            function(weights, hessian, bits)
    with pytest.raises(ValueError, match="group size"):
        function(weights, hessian, 4, 0)
    for damping in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="damping"):
            function(weights, hessian, damping=damping)
    if function is gptq.compute:
        with pytest.raises(ValueError, match="a factor of 6"):
            gptq.compute_columns(weights[:, :5], gptq.factorize(hessian))


@pytest.mark.parametrize("symmetric", [True, False])
def test_onnx_reads_the_codes_as_we_do(symmetric):
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    weights, hessian = layer(5, 32)
    found = gptq.compute(weights, hessian, 4, 8, symmetric=symmetric)
    inputs = {name: part for name, part in zip("xsz", found, strict=True) if part is not None}
    kinds = {"x": helper.np_dtype_to_tensor_dtype(found.codes.dtype), "s": TensorProto.FLOAT, "z": TensorProto.UINT8}
    node = helper.make_node("DequantizeLinear", list(inputs), ["y"], axis=1, block_size=8)
    declared = [helper.make_tensor_value_info(name, kinds[name], part.shape) for name, part in inputs.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, weights.shape)
    model = helper.make_model(
        helper.make_graph([node], "g", declared, [output]), opset_imports=[helper.make_opsetid("", 21)]
    )
    np.testing.assert_array_equal(ReferenceEvaluator(model).run(None, inputs)[0], found.dequantized(8))


def test_the_cuda_kernels_do_the_same(simulated):
    pytest.importorskip("torch")
    cases = [
        ((5, 12), {}),
        ((3, 11), {"group_size": 4}),
        ((35, 7), {"group_size": 3, "symmetric": False}),
        ((4, 12), {"group_size": 5, "search": True}),
        ((4, 12), {"group_size": 5, "search": True, "symmetric": False, "bits": 2}),
        ((4, 13), {"group_size": 4, "ordered": True, "positive": True}),
        ((4, 13), {"ordered": True, "symmetric": False, "bits": 8}),
        ((4, 12), {"group_size": 4, "bits": 3, "damping": 1e-7}),
        ((2, 131), {"group_size": 64}),
        ((2, 131), {"bits": 8}),
        ((1, 1), {}),
    ]
    layers = [layer(*shape, seed) for seed, (shape, _) in enumerate(cases)]
    layers[1][1][3] = layers[1][1][:, 3] = 0
    calls = [
        ("perwatt.kernels.gptq", "compute_cuda", pair, chosen) for pair, (_, chosen) in zip(layers, cases, strict=True)
    ]
    empty = ("perwatt.kernels.gptq", "compute_cuda", (np.zeros((0, 3)), np.eye(3)), {"symmetric": False})
    *results, nothing = simulated([*calls, empty])
    assert [part.shape for part in nothing] == [(0, 3), (0, 1), (0, 1)]
    for (weights, hessian), (_, chosen), found in zip(layers, cases, results, strict=True):
        assert_right(found, weights, hessian, **chosen)
        wanted = gptq.compute(weights, hessian, **chosen)
        assert left(weights, hessian, found, chosen.get("group_size")) == pytest.approx(
            left(weights, hessian, wanted, chosen.get("group_size")), rel=0.01
        )
    assert not results[1].codes[:, 3].any()


def test_what_the_gpu_refuses():
    pytest.importorskip("torch")
    weights, hessian = layer(4, 6)
    with pytest.raises(ValueError, match="more damping"):
        gptq.compute_cuda(weights, np.ones((6, 6)) - 0.1 * np.eye(6), damping=0)
    with pytest.raises(ValueError, match="weights hold"):
        gptq.compute_cuda(weights * np.nan, hessian)


def test_numba_scipy_and_torch_are_imported_only_by_what_needs_them():
    script = """
import sys
import numpy as np
from perwatt.kernels import gptq
gptq.reference(np.ones((2, 3)), np.eye(3))
print(*(name in sys.modules for name in ("numba", "scipy", "torch")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 3


def test_it_works_where_nothing_can_be_cached(monkeypatch):
    from numba.core import caching

    hessian = layer(5, 9)[1]
    wanted = gptq.factorize(hessian)
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    gptq.cpu.compiled.cache_clear()
    try:
        np.testing.assert_array_equal(np.triu(gptq.factorize(hessian).triangle), np.triu(wanted.triangle))
        assert type(gptq.cpu.compiled(gptq.cpu._gather)._cache).__name__ == "NullCache"
    finally:
        gptq.cpu.compiled.cache_clear()
