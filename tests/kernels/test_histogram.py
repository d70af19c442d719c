"""Growing histograms: the plain definition, whatever the batches, their order and the version that counts."""

import math
import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.kernels import _histogram_cpu as on_cpu
from perwatt.kernels import histogram as kernel

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    2.0,
    0.5,
    math.nan,
    math.inf,
    -math.inf,
    1e-45,
    -1e-45,
    -3e-41,
    2.0**-100,
    3e38,
    -3.4e38,
]
LARGEST = float(np.finfo(np.float32).max)


def plain(rows, bins):
    """The definition in fractions, over all values at once: (counts, exponents, NaN, infinite), channel by channel."""
    counts, exponents, nan, infinite = [], [], [], []
    for row in rows:
        row = [float(value) for value in row]
        x = [Fraction(value) for value in row if math.isfinite(value)]
        exponent = -100
        while any(abs(value) > Fraction(2) ** exponent for value in x):
            exponent += 1
        width, found = Fraction(2) ** (exponent + 1) / bins, [0] * bins
        for value in x:
            place = max(math.ceil(abs(value) / width) - 1, 0)
            found[bins // 2 - 1 - place if value < 0 else bins // 2 + place] += 1
        counts.append(found)
        exponents.append(exponent)
        nan.append(sum(map(math.isnan, row)))
        infinite.append(sum(map(math.isinf, row)))
    return np.array(counts).reshape(-1, bins), exponents, nan, infinite


def channels_of(values, axis):
    if axis is None:
        return values.reshape(1, -1)
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], values.size // max(values.shape[axis], 1))


def assert_equal(found, wanted):
    for name, part in zip(("counts", "exponents", "nan", "infinite"), wanted, strict=True):
        np.testing.assert_array_equal(getattr(found, name), part, err_msg=name)


def state(histogram):
    return histogram.counts, histogram.exponents, histogram.nan, histogram.infinite


def with_specials(random, values, specials):
    for value in specials:
        if values.size:
            values.flat[random.integers(values.size)] = value
    return values


@st.composite
def streams(draw):
    """Batches that differ in their first axis' length, of one type; the channel axis; bins."""
    shape, dtype = (
        draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)),
        draw(st.sampled_from([np.float16, np.float32])),
    )
    random, batches = np.random.default_rng(draw(st.integers(0, 2**32))), []
    for _ in range(draw(st.integers(1, 4))):
        values = random.normal(size=(draw(st.integers(0, 9)), *shape)) * 10.0 ** draw(st.integers(-4, 4))
        with np.errstate(over="ignore", under="ignore"):
            batches.append(
                with_specials(random, values, draw(st.lists(st.sampled_from(SPECIAL), max_size=4))).astype(dtype)
            )
    return batches, draw(st.one_of(st.none(), st.integers(1, len(shape)), st.just(-1))), 2 ** draw(st.integers(2, 7))


@given(streams())
def test_every_version_and_order_counts_what_the_definition_counts(stream):
    batches, axis, bins = stream
    rows = channels_of(np.concatenate(batches), axis)
    wanted = plain(rows, bins)
    for function in (kernel.reference, kernel.compute):
        for order in (batches, batches[::-1]):
            found = kernel.empty(bins, len(rows))
            for batch in order:
                assert function(found, batch, axis) is found
            assert_equal(found, wanted)
    parts = [kernel.compute(kernel.empty(bins, len(rows)), batch, axis) for batch in batches]
    found = parts[0]
    for part in parts[1:]:
        found = kernel.merged(found, part)
    assert_equal(found, wanted)


# Around the chunk, the private tables, the run's threshold, and the tile's columns and rows.
LAYOUTS = [
    *[((n,), None, bins) for n in (1, 31, 32, 33, 2047, 2048, 2049, 8195) for bins in (4, 256, 2048)],
    *[((rows, 5), 1, 64) for rows in (1, 24, 25, 26, 130, 3300)],
    *[((rows, width), 1, 64) for rows in (1, 127, 128, 129) for width in (127, 128, 129, 300)],
    *[((3, 7, inner), 1, 32) for inner in (1, 2, 31, 32, 33, 100, 2500)],
    *[((4, 300), 0, 16), ((2, 3, 4, 5), 3, 8192), ((1, 1, 1), 1, 4)],
]


@pytest.mark.parametrize(("shape", "axis", "bins"), LAYOUTS)
def test_kernel_and_reference_agree_on_every_layout(shape, axis, bins):
    random = np.random.default_rng(sum(shape))
    values = (random.standard_cauchy(shape) * random.uniform(0.1, 10, shape[-1])).astype(np.float32)
    relu = np.maximum(values, 0) * 1024
    channels = 1 if axis is None else shape[axis]
    found, wanted = kernel.empty(bins, channels), kernel.empty(bins, channels)
    for batch in (values, relu, with_specials(random, values.copy(), SPECIAL[4:9]), -values):
        kernel.compute(found, batch, axis)
        kernel.reference(wanted, batch, axis)
        assert_equal(found, state(wanted))
    assert found.counts.sum() + found.nan.sum() + found.infinite.sum() == 4 * values.size


@pytest.mark.parametrize("function", [kernel.reference, kernel.compute])
def test_bins_are_closed_where_they_are_farther_from_zero(function):
    steps = np.arange(1, 5, dtype=np.float32)
    found = function(kernel.empty(8), np.concatenate([steps, -steps, np.nextafter(steps, np.float32(0))]))
    assert found.counts.tolist() == [[1, 1, 1, 1, 2, 2, 2, 2]]
    assert found.edges.tolist() == [[-4, -3, -2, -1, 0, 1, 2, 3, 4]] and found.limits.tolist() == [4]
    function(found, np.nextafter(np.float32([4, -0.0]), np.float32(9)))
    assert found.limits.tolist() == [8]
    assert found.counts.tolist() == [[0, 0, 2, 2, 5, 4, 1, 0]]


@pytest.mark.parametrize("function", [kernel.reference, kernel.compute])
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("power", [-100, -1, 0, 3, 127])
def test_a_power_of_two_is_a_range_of_its_own(function, count, power):
    values = np.full(count, 2.0**power, np.float32)
    assert_equal(function(kernel.empty(4), values), ([[0, 0, 0, count]], [power], [0], [0]))
    beyond = function(function(kernel.empty(4), values), np.nextafter(-values, np.float32(-np.inf)))
    assert_equal(beyond, ([[count, 0, count, 0]], [power + 1], [0], [0]))


@pytest.mark.parametrize("function", [kernel.reference, kernel.compute])
def test_the_sign_stays_known_and_extremes_find_a_place(function):
    found = function(kernel.empty(4), np.array([0.0, -0.0, 1e-45, -1e-45], np.float32))
    assert found.counts.tolist() == [[0, 1, 3, 0]] and found.exponents.tolist() == [-100]
    function(found, np.array([LARGEST, -LARGEST], np.float32))
    assert found.counts.tolist() == [[1, 1, 3, 1]] and found.limits.tolist() == [2.0**128]
    function(found, np.array([-1e-45], np.float32))
    assert found.counts.tolist() == [[1, 2, 3, 1]]
    tiny = function(kernel.empty(4), np.array([2.0**-100, -(2.0**-101)], np.float32))
    assert tiny.counts.tolist() == [[0, 1, 0, 1]]
    nothing = function(kernel.empty(16, 3), np.zeros((0, 3), np.float32), 1)
    assert not nothing.counts.any() and function(kernel.empty(4, 0), np.zeros((3, 0), np.float32), 1).counts.shape == (
        0,
        4,
    )


@given(st.integers(0, 2**32), st.integers(2, 9))
def test_negated_values_give_the_mirrored_histogram_and_numpy_agrees(seed, power):
    values = np.random.default_rng(seed).laplace(size=500).astype(np.float32)
    found = kernel.compute(kernel.empty(2**power), values)
    np.testing.assert_array_equal(kernel.compute(kernel.empty(2**power), -values).counts, found.counts[:, ::-1])
    # No value lies on an edge, so that NumPy's half-open bins are the same.
    np.testing.assert_array_equal(np.histogram(values, found.edges[0])[0], found.counts[0])
    assert found.limits[0] / 2 < np.abs(values).max() <= found.limits[0]


def test_private_tables_are_added_up_before_they_overflow(monkeypatch):
    values = np.random.default_rng(0).normal(size=(3, 1500)).astype(np.float32)
    monkeypatch.setattr(on_cpu, "UNCOUNTED", 64)
    monkeypatch.setattr(on_cpu, "CHUNK", 32)
    added = []
    monkeypatch.setattr(
        on_cpu, "_flush", lambda tables, row, flush=on_cpu._flush: (added.append(tables.sum()), flush(tables, row))
    )
    found, wanted = kernel.empty(16, 3), kernel.reference(kernel.empty(16, 3), values, 0)
    # What Numba compiles, run by Python itself.
    on_cpu._update(values.ravel(), values.view(np.int32).ravel(), 1, 3, 1500, *state(found))
    assert_equal(found, state(wanted))
    assert max(added) == 64 and sum(added) == values.size


def test_arrays_that_are_not_contiguous_are_left_as_they_are():
    values = np.arange(-2000, 2000, dtype=np.float32).reshape(10, 20, 20)[::2, ::-1, ::3].transpose(2, 0, 1)
    before = values.copy()
    values.flags.writeable = False
    for axis in (None, 0, 1, 2):
        channels = 1 if axis is None else values.shape[axis]
        assert_equal(kernel.compute(kernel.empty(32, channels), values, axis), plain(channels_of(values, axis), 32))
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("function", [kernel.reference, kernel.compute])
def test_what_can_not_be_counted_is_an_error_and_changes_nothing(function):
    found = kernel.empty(8, 3)
    for dtype in (np.float64, np.int8, bool):
        with pytest.raises(ValueError, match="float16 and float32"):
            function(found, np.zeros((2, 3), dtype), 1)
    for axis in (2, -3):
        with pytest.raises(ValueError, match=f"no axis {axis} in an array of 2 axes"):
            function(found, np.zeros((3, 3), np.float32), axis)
    with pytest.raises(ValueError, match="values of 2 channels for a histogram of 3"):
        function(found, np.zeros((2, 3), np.float32), 0)
    assert not found.counts.any()


def test_histograms_that_can_not_be_are_errors():
    for bins in (0, 2, 3, 100, 16384, -8):
        with pytest.raises(ValueError, match=f"{bins} bins; powers of two from 4 to 8192"):
            kernel.empty(bins)
    for channels in (-1, 2**20):
        with pytest.raises(ValueError, match=f"{channels} channels"):
            kernel.empty(2048, channels)
    with pytest.raises(ValueError, match="don't merge"):
        kernel.merged(kernel.empty(8), kernel.empty(16))


def test_the_gpu_version_counts_the_same(simulated):
    random = np.random.default_rng(3)
    layouts = [
        ((5, 3), 1),
        ((130, 3), 1),
        ((3, 4, 5), 1),
        ((2, 2, 70), 1),
        ((300,), None),
        ((8300,), None),
        ((0, 3), 1),
    ]
    calls, wanted = [], []
    for number, (shape, axis) in enumerate([*layouts, ((1, 300, 1), 1)]):
        scale = 10.0 ** random.integers(-3, 3)
        values = with_specials(random, random.normal(size=shape) * scale, SPECIAL[:-2]).astype(
            [np.float32, np.float16][number % 2]
        )
        start = kernel.compute(kernel.empty(64, 1 if axis is None else shape[axis]), np.float32(values / 3), axis)
        calls.append(
            ("perwatt.kernels.histogram", "compute_cuda", (pickle.loads(pickle.dumps(start)), values, axis), {})
        )
        wanted.append(kernel.reference(start, values, axis))
    for found, its in zip(simulated(calls), wanted, strict=True):
        assert_equal(found, state(its))


def test_numba_is_imported_by_the_kernel_alone_and_its_code_is_kept():
    script = """
import sys, pickle
import numpy as np
from perwatt.kernels import _histogram_cpu as on_cpu
from perwatt.kernels import _histogram_cpu as on_cpu, histogram as kernel
kernel.reference(kernel.empty(8), np.ones(3, np.float32))
light = "numba" not in sys.modules
kernel.compute(kernel.empty(8), np.ones(3, np.float32))
stats = on_cpu.compiled().stats
sys.stdout.buffer.write(pickle.dumps((light, sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))))
"""
    kernel.compute(kernel.empty(8), np.ones(3, np.float32))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert pickle.loads(done.stdout) == (True, 1, 0)
