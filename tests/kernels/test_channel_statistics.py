"""Statistics of channels: exact against Python's own arithmetic, the same in all three versions, mergeable in any parts."""

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.kernels import channel_statistics as kernel

EXACT = ("minimum", "maximum", "finite", "nan", "infinite")
WIDE, NARROW = 2.0**-53, 2.0**-24
SPECIAL = [0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-45, 3e-41, -1e-30, 1e-12, 1e19, -3e38, 3.4e38]


def plain(values, axis):
    """The definition, value by value, in exact sums: [(minimum, maximum, Σ x, Σ x², Σ |x|, finite, NaN, infinite), …]."""
    values = np.asarray(values, np.float64)
    rows = [values.ravel()] if axis is None else [values.take(c, axis).ravel() for c in range(values.shape[axis])]
    found = []
    for row in rows:
        x = [value for value in row.tolist() if math.isfinite(value)]
        sums = math.fsum(x), math.fsum(value * value for value in x), math.fsum(map(abs, x))
        nan, infinite = sum(map(math.isnan, row.tolist())), sum(map(math.isinf, row.tolist()))
        found.append((min(x, default=math.inf), max(x, default=-math.inf), *sums, len(x), nan, infinite))
    return [np.array(column) for column in zip(*found, strict=True)] if found else [np.zeros(0)] * 8


def assert_right(found, values, axis, unit=WIDE):
    """Exact where it must be; sums within the stated bound, where `unit` is the rounding of the eight first added."""
    low, high, total, squares, absolute, finite, nan, infinite = plain(values, axis)
    for name, wanted in zip(EXACT, (low, high, finite, nan, infinite), strict=True):
        np.testing.assert_array_equal(getattr(found, name), wanted, err_msg=name)
    for name in ("minimum", "maximum", "total", "squares"):
        assert getattr(found, name).dtype == np.float64 and getattr(found, name).shape == low.shape
    for name in ("finite", "nan", "infinite"):
        assert getattr(found, name).dtype == np.int64
    own = 0.0 if unit == WIDE else kernel.OWN_ROUNDINGS * unit
    bound = own + (finite + 2) * WIDE
    assert (abs(found.total - total) <= bound * absolute).all(), (found.total, total)
    assert (abs(found.squares - squares) <= bound * squares + 1e-323).all(), (found.squares, squares)


def unit(values):
    return WIDE if values.dtype == np.float64 else NARROW


@st.composite
def arrays(draw, largest=9):
    shape = tuple(draw(st.lists(st.integers(0, largest), min_size=1, max_size=4)))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = random.normal(size=shape) * 10.0 ** draw(st.integers(-3, 3))
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
        if values.size:
            values.flat[random.integers(values.size)] = value
    with np.errstate(over="ignore", under="ignore"):
        values = values.astype(dtype)
    return values, draw(st.one_of(st.none(), st.integers(-len(shape), len(shape) - 1)))


@given(arrays())
def test_reference_and_kernel_equal_the_plain_definition(case):
    values, axis = case
    assert_right(kernel.reference(values, axis), values, axis)
    assert_right(kernel.compute(values, axis), values, axis, unit(values))


# Around the eight rows that are added at once, the tile's columns and rows, the stretch and the run's threshold.
LAYOUTS = [
    *[((n,), None) for n in (1, 7, 95, 96, 97, 1023, 1024, 1025, 8191, 8192, 8193, 140_000)],
    *[((rows, 5), 1) for rows in (1, 7, 8, 9, 15, 16, 63, 808, 815, 816, 817, 27_000)],
    *[((rows, 600), 1) for rows in (1, 8, 255, 256, 257)],
    *[((3, 4, inner), 1) for inner in (1, 2, 49, 95, 96, 97, 128, 16_500)],
    *[
        ((70, 37, 9), 1),
        ((17, 2, 3, 5), 1),
        ((9, 3, 4, 5), 3),
        ((1, 257), 1),
        ((2, 511), 0),
        ((64, 256), 1),
        ((64, 128), 1),
    ],
]


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_layout_with_and_without_what_is_left_out(shape, axis, dtype):
    random = np.random.default_rng(sum(shape))
    values = (random.normal(size=shape) * random.uniform(0.1, 10, shape[-1]) + 3).astype(dtype)
    assert_right(kernel.compute(values, axis), values, axis, unit(values))
    # Zero as the largest and as the smallest, with either sign.
    ramps = np.minimum(values, 0), np.maximum(values, 0), np.minimum(values, -0.0), -np.abs(values) - 1
    for ramp in ramps if values.size < 20_000 else ():
        assert_right(kernel.compute(ramp, axis), ramp, axis, unit(values))
    for special in (math.nan, math.inf, -math.inf):
        values.flat[random.integers(values.size)] = special
    values.flat[values.size - 1] = -7e18
    assert_right(kernel.compute(values, axis), values, axis, unit(values))


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-20, 2.0**-50, 1e10, 1e19, 3e38 / 20])
@pytest.mark.parametrize(
    ("shape", "axis"), [((20_000,), None), ((70, 300), 1), ((40, 5), 1), ((3, 500), 0), ((9, 4, 49), 1)]
)
def test_squares_neither_overflow_nor_vanish_in_float32(scale, shape, axis):
    values = (np.random.default_rng(1).uniform(-1, 1, shape) * scale).astype(np.float32)
    assert_right(kernel.compute(values, axis), values, axis, NARROW)


@pytest.mark.parametrize("function", [kernel.reference, kernel.compute])
def test_nothing_a_constant_and_zeros(function):
    empty = function(np.zeros((0, 3), np.float32), 1)
    assert empty.minimum.tolist() == [math.inf] * 3 and empty.maximum.tolist() == [-math.inf] * 3
    assert empty.total.tolist() == empty.squares.tolist() == empty.finite.tolist() == [0] * 3
    assert function(np.zeros((3, 0), np.float32), 1).minimum.shape == (0,)
    lost = function(np.array([math.nan, math.inf, -math.inf, -math.nan], np.float16))
    assert (lost.nan[0], lost.infinite[0], lost.finite[0], lost.total[0]) == (2, 2, 0, 0)
    negative_zero = function(np.full(100, -0.0, np.float32))
    assert math.copysign(1, negative_zero.minimum[0]) == math.copysign(1, negative_zero.maximum[0]) == 1
    two = function(np.full((10_000, 3), 2.0, np.float16), 1)
    assert two.minimum.tolist() == two.maximum.tolist() == [2] * 3
    assert two.total.tolist() == [20_000] * 3 and two.squares.tolist() == [40_000] * 3
    assert function(np.float32(5)).total.tolist() == [5]


def test_arrays_that_are_not_contiguous_are_left_as_they_are():
    values = np.arange(4000, dtype=np.float32).reshape(10, 20, 20)[::2, ::-1, ::3].transpose(2, 0, 1)
    before = values.copy()
    values.flags.writeable = False
    for axis in (None, 0, 1, 2):
        assert_right(kernel.compute(values, axis), values, axis, NARROW)
        assert_right(kernel.reference(values, axis), values, axis)
    np.testing.assert_array_equal(values, before)


@given(st.integers(0, 2**32), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_batches_merge_into_the_whole(seed, sizes):
    values = np.random.default_rng(seed).normal(size=(sum(sizes), 7)).astype(np.float32)
    values[::5, 2], values[::7, 3] = math.nan, math.inf
    parts = [kernel.compute(part, 1) for part in np.split(values, np.cumsum(sizes)[:-1])]
    found = parts[0]
    for part in parts[1:]:
        found = kernel.merged(found, part)
    assert_right(found, values, 1, NARROW)


def test_what_can_not_be_summed_or_merged_is_an_error():
    for function in (kernel.reference, kernel.compute):
        for dtype in (np.int32, np.complex64, bool):
            with pytest.raises(ValueError, match="float16, float32 and float64"):
                function(np.zeros(3, dtype))
        for axis in (2, -3):
            with pytest.raises(ValueError, match=f"no axis {axis} in an array of 2 axes"):
                function(np.zeros((3, 3), np.float32), axis)
    with pytest.raises(ValueError, match="of 1 and of 3 channels"):
        kernel.merged(kernel.compute(np.zeros((2, 3))), kernel.compute(np.zeros((2, 3)), 1))


def test_the_gpu_version_equals_the_definition(simulated):
    random = np.random.default_rng(3)
    cases = []
    shapes = [
        ((5, 3), 1),
        ((130, 3), 1),
        ((3, 4, 5), 1),
        ((2, 2, 130), 1),
        ((300,), None),
        ((8300,), None),
        ((2, 200), 0),
    ]
    for number, (shape, axis) in enumerate([*shapes, ((0, 3), 1), ((1, 150, 1), 1)]):
        values = random.normal(size=shape).astype([np.float32, np.float64, np.float16][number % 3])
        if values.size:
            values.flat[random.integers(values.size, size=3)] = [math.nan, math.inf, -math.inf]
        cases.append((values, axis))
    calls = [("perwatt.kernels.channel_statistics", "compute_cuda", case, {}) for case in cases]
    for (values, axis), found in zip(cases, simulated(calls), strict=True):
        assert_right(found, values, axis)


def test_numba_is_imported_by_the_kernel_alone_and_its_code_is_kept():
    script = """
import sys, pickle
import numpy as np
from perwatt.kernels import _channel_statistics_cpu as on_cpu, channel_statistics as kernel
kernel.reference(np.ones(3)), kernel.merged(kernel.reference(np.ones(3)), kernel.reference(np.ones(3)))
light = "numba" not in sys.modules
kernel.compute(np.ones(3, np.float32))
stats = on_cpu.compiled().stats
sys.stdout.buffer.write(pickle.dumps((light, sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))))
"""
    kernel.compute(np.ones(3, np.float32))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert pickle.loads(done.stdout) == (True, 1, 0)
