"""The clip search finds what trying everything by the definitions finds, compiled and on a (simulated) GPU alike."""

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perwatt.kernels import clip_search
from perwatt.kernels._clip_search_cpu import compiled

MODULE = "perwatt.kernels.clip_search"
LARGEST = 1.7e308


def squared(a, b, level):
    """∫ (x − level)² from a to b."""
    return ((b - level) ** 3 - (a - level) ** 3) / 3


def exact_error(counts, low, high, step, below, levels):
    """The mean squared error, in fractions: every bin is cut where the nearest level changes."""
    low, width = Fraction(low), (Fraction(high) - Fraction(low)) / len(counts)
    total = Fraction(0)
    for j, count in enumerate(counts):
        a, b = low + j * width, low + (j + 1) * width
        cuts = [(k + Fraction(1, 2)) * step for k in range(-below, levels - 1 - below)]
        edges = [a, *[cut for cut in cuts if a < cut < b], b]
        for start, stop in itertools.pairwise(edges):
            nearest = sum(cut <= start for cut in cuts) - below
            total += count * squared(start, stop, nearest * step) / width
    return total / sum(counts)


def plain_mse(counts, low, high, levels, symmetric, candidates):
    """The least exact error of all candidates and, where not symmetric, all levels for zero."""
    below, above = max(0, -Fraction(low)), max(0, Fraction(high))
    z = levels // 2
    whole = max(below / z, above / (levels - 1 - z)) if symmetric else (below + above) / (levels - 1)
    return min(
        exact_error(counts, low, high, whole * Fraction(fraction), it, levels)
        for fraction in candidates
        for it in ([z] if symmetric else range(levels))
    )


def plain_entropy(counts, zero, parts):
    """Migacz's search, bin by bin: the divergence of each number of bins."""
    size = max(zero, len(counts) - zero)
    at = dict(enumerate(counts, -zero))
    folded = [at.get(j, 0) + at.get(-1 - j, 0) for j in range(size)]
    found = {}
    for bins in range(min(parts, size), size + 1):
        p = folded[:bins]
        p[-1] += sum(folded[bins:])
        merged, occupied = [0] * parts, [0] * parts
        for j in range(bins):
            merged[j * parts // bins] += folded[j]
            occupied[j * parts // bins] += p[j] > 0
        q = [merged[j * parts // bins] / max(1, occupied[j * parts // bins]) if p[j] else 0.0 for j in range(bins)]
        p, q = [a / sum(p) for a in p], [b / max(1, sum(q)) if b else 1e-4 / max(1, sum(q)) for b in q]
        terms = [a * math.log(a / b) for a, b in zip(p, q, strict=True) if a]
        found[bins] = math.fsum(terms) if sum(folded[:bins]) else math.inf
    return found


def moment(counts, low, high):
    """Σ x² over the number of values: what errors are rounded relative to."""
    width = (high - low) / len(counts)
    centres = low + (np.arange(len(counts)) + 0.5) * width
    return np.average(centres**2, weights=counts) + width**2


many = settings(max_examples=60)
few = st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any)
fractions = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5)
ends = st.one_of(st.floats(-5, 5), st.sampled_from([-3.0, 0.0, 1.0, 4.0])).map(lambda x: round(x, 3))


@many
@given(few, ends, ends, st.integers(3, 9), st.booleans(), fractions)
def test_the_reference_finds_the_least_error_there_is(counts, one, other, levels, symmetric, candidates):
    low, high = min(one, other), max(one, other)
    if high - low < 1e-2:
        high += 1.0
    found = clip_search.reference_mse([counts], [low], [high], levels, symmetric, candidates)
    slack = 1e-11 * moment(counts, low, high)
    wanted = float(plain_mse(counts, low, high, levels, symmetric, candidates))
    assert abs(found.loss[0] - wanted) <= slack
    step = (Fraction(found.high[0]) - Fraction(found.low[0])) / (levels - 1)
    below = round(-Fraction(found.low[0]) / step)
    assert abs(found.low[0] + below * float(step)) <= 1e-14 * float(step) * levels
    assert abs(float(exact_error(counts, low, high, step, below, levels)) - wanted) <= slack


@many
@given(
    st.lists(st.sampled_from([0, 0, 1, 2, 7, 1000]), min_size=1, max_size=30).filter(any),
    st.integers(0, 30),
    st.integers(3, 20),
)
@example([0, 0, 0, 0, 5, 1], 0, 3)
def test_the_reference_finds_the_least_divergence_there_is(counts, zero, levels):
    zero = min(zero, len(counts))
    for symmetric in (True, False):
        if not symmetric:
            zero = 0
        found = clip_search.reference_entropy([counts], [-0.5 * zero], [0.5 * (len(counts) - zero)], levels, symmetric)
        wanted = plain_entropy(counts, zero, -(-levels // 2) if symmetric else levels)
        assert found.loss[0] == pytest.approx(min(wanted.values()), abs=1e-12)
        assert wanted[round(found.high[0] / 0.5)] == pytest.approx(found.loss[0], abs=1e-12)
        assert found.low[0] == (-found.high[0] if symmetric else 0)
        # Each of the candidates, too: one that counts wrongly may not show in the best.
        sums = clip_search._sums(clip_search._folded(np.array(counts), zero))
        parts, trials = -(-levels // 2) if symmetric else levels, np.array(list(wanted))
        merged = np.array([clip_search._merged(sums, parts, int(bins)) for bins in trials])
        assert clip_search._divergence(sums, trials, merged) == pytest.approx(list(wanted.values()), abs=1e-12)


def histograms(draw, least, most, dtype):
    """Rows of counts that fit the type, some of them empty, without a view's contiguity."""
    rows, bins = draw(st.integers(least, 4)), draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    top = min(np.iinfo(dtype).max, draw(st.sampled_from([1, 5, 1000, 2**40 // (bins * bins)])))
    counts = rng.integers(0, top + 1, (2 * rows, bins)) * (
        rng.random((2 * rows, bins)) < draw(st.sampled_from([0.1, 1]))
    )
    counts[rng.random(2 * rows) < 0.1] = 0
    return counts.astype(dtype)[::2, :: draw(st.sampled_from([1, -1]))]


types = st.sampled_from([np.int8, np.uint8, np.int32, np.int64, np.uint64])
sizes = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(-10, 10),
    st.sampled_from([0.0, -0.0, 1.0, 5e-324, -5e-324, 2e-310, LARGEST, -LARGEST]),
)


@st.composite
def rows_of_bins(draw):
    counts = histograms(draw, 0, 70, draw(types))
    pairs = [sorted((draw(sizes), draw(sizes))) for _ in counts]
    low, high = (np.array([pair[side] for pair in pairs], np.float64) for side in (0, 1))
    return counts, low, high


@st.composite
def rows_around_zero(draw):
    counts, low, high = draw(rows_of_bins())
    if draw(st.booleans()):
        return counts, np.zeros(len(counts)), np.maximum(np.abs(low), np.abs(high)), False
    return counts, -np.abs(low), np.abs(high), True


def assert_same(found, wanted):
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == np.float64
        np.testing.assert_array_equal(mine, theirs, strict=True)


@many
@given(rows_of_bins(), st.one_of(st.integers(3, 80), st.just(255), st.just(256)), st.booleans(), fractions)
def test_compiled_the_error_search_equals_its_reference_bit_for_bit(rows, levels, symmetric, candidates):
    wanted = clip_search.reference_mse(*rows, levels, symmetric, candidates)
    assert_same(clip_search.compute_mse(*rows, levels, symmetric, candidates), wanted)
    used = rows[0].sum(axis=1, dtype=float) > 0
    for it in wanted:
        assert it.shape == (len(rows[0]),)
        np.testing.assert_array_equal(np.isnan(it), ~used)
    assert (wanted.low[used] <= 0).all() and (wanted.high[used] >= 0).all() and (wanted.loss[used] >= 0).all()


@many
@given(rows_around_zero(), st.integers(3, 80))
def test_compiled_the_entropy_search_equals_its_reference_bit_for_bit(rows, levels):
    *rows, symmetric = rows
    wanted = clip_search.reference_entropy(*rows, levels, symmetric)
    assert_same(clip_search.compute_entropy(*rows, levels, symmetric), wanted)
    used = rows[0].sum(axis=1, dtype=float) > 0
    assert (np.isnan(wanted.high) == ~used).all() and (wanted.loss[used] < np.inf).all()


def samples():
    """Values as tensors have them: title, values."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=20_000)
    return {
        "normal": normal,
        "student": rng.standard_t(3, 20_000),
        "laplace with an offset": rng.laplace(0.7, 1, 20_000),
        "relu": np.maximum(normal, 0),
        "gelu": normal * (0.5 + 0.5 * np.tanh(0.8 * normal)),
        "outlier": np.append(normal, 300.0),
        "uniform": rng.random(20_000),
        "far from zero": normal + 1000,
        "two values": np.repeat([-1.0, 3.0], 10_000),
    }


def histogram(values, bins=2048, symmetric=False, from_zero=False):
    low, high = (0.0 if from_zero else values.min()), values.max()
    if symmetric:
        low, high = -np.abs(values).max(), np.abs(values).max()
    return np.histogram(values, bins, (low, high))[0], low, high


@pytest.mark.parametrize("levels", [3, 16, 255, 256, 1000])
@pytest.mark.parametrize("symmetric", [True, False])
def test_candidates_passed_over_would_not_have_been_best(levels, symmetric):
    rows = [np.array(column) for column in zip(*[histogram(values) for values in samples().values()], strict=True)]
    assert_same(clip_search.compute_mse(*rows, levels, symmetric), clip_search.reference_mse(*rows, levels, symmetric))


@pytest.mark.parametrize("bins", [100, 127, 2048])
def test_entropy_of_large_histograms_is_the_same_compiled(bins):
    both = [histogram(values, bins, symmetric=True) for values in samples().values()]
    rows = [np.array(column) for column in zip(*both, strict=True)]
    assert_same(clip_search.compute_entropy(*rows, 255), clip_search.reference_entropy(*rows, 255))
    one = [histogram(np.abs(values), bins, from_zero=True) for values in samples().values()]
    rows = [np.array(column) for column in zip(*one, strict=True)]
    for levels in (16, 256):
        assert_same(
            clip_search.compute_entropy(*rows, levels, False), clip_search.reference_entropy(*rows, levels, False)
        )


@pytest.mark.parametrize("name", ["normal", "student", "laplace with an offset", "gelu", "outlier", "uniform"])
@pytest.mark.parametrize("levels", [16, 255, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_quantizing_the_values_costs_is_the_loss(name, levels, symmetric):
    torch = pytest.importorskip("torch")
    values = samples()[name]
    counts, low, high = histogram(values)
    found = clip_search.compute_mse([counts], [low], [high], levels, symmetric)
    step = (found.high[0] - found.low[0]) / (levels - 1)
    below = round(-found.low[0] / step)
    # Its zero point may lie anywhere between the two limits: so may ours.
    quantized = torch.fake_quantize_per_tensor_affine(
        torch.tensor(values, dtype=torch.float32), step, below, 0, levels - 1
    )
    cost = np.mean((quantized.double().numpy() - values) ** 2)
    assert found.loss[0] == pytest.approx(cost, rel=0.1)
    whole = clip_search.compute_mse([counts], [low], [high], levels, symmetric, [1.0])
    assert found.loss[0] <= whole.loss[0]
    # The default's steps of 4.4 % lose little beside twenty times as many.
    dense = clip_search.compute_mse([counts], [low], [high], levels, symmetric, 2.0 ** (-np.arange(2560) / 320))
    assert found.loss[0] <= 1.03 * dense.loss[0]


def test_heavy_tails_are_clipped_and_light_ones_are_not():
    outlier = np.append(np.random.default_rng(1).normal(size=100_000), 40.0)
    counts, low, high = histogram(outlier, symmetric=True)
    assert clip_search.compute_mse([counts], [low], [high], 16).high[0] < 6
    assert clip_search.compute_entropy([counts], [low], [high], 255).high[0] < 8
    flat = np.full((1, 2048), 100)
    assert clip_search.compute_mse(flat, [-1.0], [1.0], 255).high[0] == 1
    assert clip_search.compute_mse(flat, [0.0], [1.0], 255, False).high[0] == 1
    assert clip_search.compute_entropy(flat, [-1.0], [1.0], 255).loss[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("function", [clip_search.reference_mse, clip_search.compute_mse])
def test_of_equally_good_candidates_the_first_is_taken(function):
    # All values are rounded to zero, whichever it is.
    rows = ([[0, 0, 0, 5, 5, 0, 0, 0]], [-1.0], [1.0])
    assert function(*rows, 3, True, [1.0, 0.9]).high[0] == 1
    assert function(*rows, 3, True, [0.9, 1.0]).high[0] == 0.9


@pytest.mark.parametrize("name", ["reference", "compute"])
def test_no_values_give_nan_and_one_point_itself(name):
    mse, entropy = getattr(clip_search, f"{name}_mse"), getattr(clip_search, f"{name}_entropy")
    counts = np.array([[0, 0], [3, 0], [0, 2], [1, 1], [0, 0]])
    low, high = [np.nan, -2.0, 3.0, 0.0, np.inf], [np.nan, -2.0, 3.0, 0.0, -np.inf]
    nan = np.nan
    assert_same(
        mse(counts, low, high, 255), np.array([[nan, -2, -3, 0, nan], [nan, 2, 3, 0, nan], [nan, 0, 0, 0, nan]])
    )
    assert mse(counts, low, high, 16).low[1] == pytest.approx(-2 * 8 / 7)
    assert_same(
        mse(counts, low, high, 16, False), np.array([[nan, -2, 0, 0, nan], [nan, 0, 3, 0, nan], [nan, 0, 0, 0, nan]])
    )
    assert_same(
        entropy(counts, low, high, 16), np.array([[nan, -2, -3, 0, nan], [nan, 2, 3, 0, nan], [nan, 0, 0, 0, nan]])
    )
    assert (
        mse(np.zeros((0, 5), int), [], [], 16).low.shape
        == entropy(np.zeros((0, 5), int), [], [], 16).high.shape
        == (0,)
    )


def test_ranges_scale_with_the_values_and_mirror_them():
    values = samples()["student"]
    counts, low, high = histogram(values, 501)
    for symmetric in (True, False):
        found = clip_search.compute_mse([counts], [low], [high], 255, symmetric)
        # Down to where squares vanish, up to where they overflow.
        for scale in (2.0**-1000, 2.0**-3, 2.0**1000):
            scaled = clip_search.compute_mse([counts], [low * scale], [high * scale], 255, symmetric)
            assert scaled.low[0] == found.low[0] * scale and scaled.high[0] == found.high[0] * scale
            assert scaled.loss[0] == float(found.loss[0]) * scale * scale
        mirrored = clip_search.compute_mse([counts[::-1]], [-high], [-low], 255, symmetric)
        assert (mirrored.low[0], mirrored.high[0]) == pytest.approx((-found.high[0], -found.low[0]))
        assert mirrored.loss[0] == pytest.approx(found.loss[0])


def test_on_a_gpu_the_losses_are_the_best(simulated):
    rng = np.random.default_rng(3)
    counts = rng.poisson(np.array([[0.3], [50], [0], [9]]) * np.exp(-0.1 * np.abs(np.arange(37) - 15.3)))
    low, high = np.array([0.5, -2.5, np.nan, -1e-312]), np.array([3.0, 1.0, np.nan, 2e-312])
    short = counts[:, :9] * [1, 1, 1, 1, 0, 0, 0, 1, 1]
    zero = (short[:, ::-1], np.array([-4.0, -1.5, np.nan, 0.0]), np.array([5.0, 7.5, np.nan, 9.0]))
    # The best of the first two depends on whether the last bin, empty but for what lies beyond, counts as one with values.
    sparse = np.array([[3, 1, 100, 0, 100, 0, 3, 3], [100, 20, 0, 0, 0, 20, 0, 3], [0, 0, 0, 0, 0, 9, 0, 1]], np.uint8)
    one = (sparse, np.zeros(3), np.array([8.0, 1.0, 4.0]))
    calls = [
        (MODULE, "compute_mse_cuda", (counts, low, high, 16, True, [1.0, 0.3]), {}),
        (MODULE, "compute_mse_cuda", (counts[:, ::2], low, high, 9, False, [0.3, 0.2]), {}),
        (MODULE, "compute_entropy_cuda", (*zero, 7), {}),
        (MODULE, "compute_entropy_cuda", (*one, 3, False), {}),
        (MODULE, "compute_mse_cuda", (counts[:0], [], [], 16), {}),
        (MODULE, "compute_entropy_cuda", (counts[:0], [], [], 16), {}),
    ]
    for (_, name, arguments, _), found in zip(calls, simulated(calls), strict=True):
        wanted = getattr(clip_search, name.replace("compute", "reference").removesuffix("_cuda"))(*arguments)
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["reference_mse", "compute_mse", "reference_entropy", "compute_entropy"])
def test_what_can_not_be_searched_is_an_error(name):
    function = getattr(clip_search, name)
    counts, low, high = [[1, 2]], [-1.0], [1.0]
    for wrong in ([1, 2], [[1.0, 2.0]], [[]], [[True, False]], [[[1]]]):
        with pytest.raises(ValueError, match="integers"):
            function(wrong, low, high, 16)
    with pytest.raises(ValueError, match="a count is -1"):
        function([[1, -1]], low, high, 16)
    for edges in (([-1.0, 1.0], high), (-1.0, 1.0), ([], [])):
        with pytest.raises(ValueError, match="edges have the shapes"):
            function(counts, *edges, 16)
    for edges in ((1.0, -1.0), (np.nan, 1.0), (-1.0, np.inf)):
        with pytest.raises(ValueError, match="row 1 reaches"):
            function([[0, 1], [1, 0]], *np.array([[-1.0, 1.0], edges]).T, 16)
    with pytest.raises(ValueError, match="at most 2"):
        function([[2**51, 1]], low, high, 16)
    for levels, symmetric in ((2, True), (1, False), (65537, True)):
        with pytest.raises(ValueError, match=f"{levels} levels"):
            function(counts, [0.0], high, levels, symmetric)
    if name.endswith("mse"):
        for candidates in ([], [0.0], [1.5], [np.nan], [[1.0]], 0.5):
            with pytest.raises(ValueError, match="candidates"):
                function(counts, low, high, 16, True, candidates)
    else:
        with pytest.raises(ValueError, match="row 1 doesn't hold zero"):
            function([[1, 2], [1, 2]], [-1.0, 0.5], [1.0, 1.0], 16)
        with pytest.raises(ValueError, match="row 0 doesn't begin at zero"):
            function(counts, low, high, 16, False)
        with pytest.raises(ValueError, match="row 0 doesn't begin at zero"):
            function(counts, [-1.0], [-1.0], 16, False)


def test_arrays_are_left_as_they_are_and_numba_is_imported_only_when_it_is_used():
    counts, low, high = np.array([[0, 3, 5, 1]]), np.array([-1.0]), np.array([1.0])
    for array in (counts, low, high):
        array.flags.writeable = False
    for name in ("mse", "entropy"):
        getattr(clip_search, f"compute_{name}")(counts, low, high, 16)
    script = """
import sys
from perwatt.kernels import clip_search
clip_search.reference_mse([[1]], [0], [1], 9), clip_search.reference_entropy([[1]], [0], [1], 9)
print("numba" in sys.modules)
"""
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )


def test_it_works_where_nothing_can_be_cached(monkeypatch):
    from numba.core import caching

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    compiled.cache_clear()
    try:
        rows = ([[1, 0, 2, 9, 4, 4]], [-1.0], [2.0])
        assert_same(clip_search.compute_entropy(*rows, 4), clip_search.reference_entropy(*rows, 4))
    finally:
        compiled.cache_clear()
