"""The bootstrap kernel equals its reference bit for bit, both equal a plain definition, and the generator is SplitMix64."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.kernels import bootstrap

MASK = 2**64 - 1


def splitmix(state):
    """SplitMix64 in Python's own integers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def plain(values, resamples, seed, trim):
    """The definition: draw, sort, cut, average exactly."""
    n, found = len(values), []
    keys = splitmix(seed & MASK)
    for _ in range(resamples):
        stream = splitmix(next(keys))
        words = [next(stream) for _ in range((n + 1) // 2)]
        halves = [word & 0xFFFFFFFF for word in words] + [word >> 32 for word in words]
        drawn = sorted(values[half * n >> 32] for half in halves[:n])
        cut = int(trim * n)
        kept = drawn[cut : n - cut]
        found.append(math.fsum(kept) / len(kept))
    return found


trims = st.sampled_from([0.0, 0.05, 0.2, 0.25, 0.4, 0.49])
seeds = st.integers(-(2**70), 2**70)
ordinary = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@given(st.lists(st.floats(), max_size=70), st.integers(0, 40), seeds, trims, st.integers(1, 5))
def test_the_kernel_equals_its_reference_bit_for_bit_on_any_number_of_threads(values, resamples, seed, trim, threads):
    wanted = bootstrap.reference(values, resamples, seed, trim)
    assert wanted.shape == (resamples,) and wanted.dtype == np.float64
    np.testing.assert_array_equal(bootstrap.compute(values, resamples, seed, trim, threads=threads), wanted)
    np.testing.assert_array_equal(bootstrap.compute(values, resamples, seed, trim), wanted)


@pytest.mark.parametrize("n", [*range(1, 35), 127, 128, 129, 1000, 4099])
@pytest.mark.parametrize("trim", [0.0, 0.2])
def test_they_are_equal_around_whole_lanes_and_words(n, trim):
    values = np.random.default_rng(n).standard_cauchy(n)
    np.testing.assert_array_equal(
        bootstrap.compute(values, 50, n, trim, threads=2), bootstrap.reference(values, 50, n, trim)
    )


@given(ordinary, st.integers(1, 10), seeds, trims)
def test_both_equal_the_plain_definition(values, resamples, seed, trim):
    largest = max(abs(value) for value in values)
    wanted = pytest.approx(plain(values, resamples, seed, trim), rel=1e-12, abs=1e-12 * largest)
    assert list(bootstrap.reference(values, resamples, seed, trim)) == wanted
    assert list(bootstrap.compute(values, resamples, seed, trim)) == wanted


def test_the_words_are_those_of_splitmix64():
    # The published sequence of the seed 1234567.
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert bootstrap._words(np.uint64(1234567), 5).tolist() == wanted


@pytest.mark.parametrize("n", [2, 7, 12, 1000])
def test_every_position_is_drawn_as_often_as_any_other(n):
    # Means of unit vectors are shares of draws; their chi-square has n − 1 degrees of freedom.
    resamples = 20_000 // n + 50
    shares = np.array([bootstrap.compute(unit, resamples, 3).mean() for unit in np.eye(n)])
    assert shares.sum() == pytest.approx(1)
    square = n * resamples * ((shares - 1 / n) ** 2 * n).sum()
    assert abs(square - (n - 1)) < 4 * math.sqrt(2 * (n - 1))


def test_resamples_and_seeds_are_independent():
    values = np.random.default_rng(0).normal(size=30)
    one, other = bootstrap.compute(values, 20_000, 0), bootstrap.compute(values, 20_000, 1)
    for a, b in [(one, other), (one[1:], one[:-1]), (one[2:], one[:-2]), (one[1:], other[:-1])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(20_000)
    assert len(np.unique(one)) == len(one)


def test_a_mean_spreads_by_the_values_deviation_over_root_n():
    values = np.random.default_rng(5).normal(3, 2, 400)
    found = bootstrap.compute(values, 20_000, 0)
    assert found.mean() == pytest.approx(values.mean(), abs=4 * 0.1 / math.sqrt(20_000))
    assert found.std() == pytest.approx(values.std() / 20, rel=0.03)


@pytest.mark.parametrize("trim", [0.0, 0.2])
def test_percentiles_agree_with_scipy(trim):
    stats = pytest.importorskip("scipy.stats", reason="scipy is no dependency of perwatt's")
    values = np.random.default_rng(6).standard_t(3, 50)
    theirs = stats.bootstrap(
        (values,), lambda x, axis: stats.trim_mean(x, trim, axis=axis), method="percentile", n_resamples=20_000, rng=1
    ).bootstrap_distribution
    ours = bootstrap.compute(values, 20_000, 1, trim)
    # The Kolmogorov-Smirnov distance of two samples of 20,000 exceeds 0.0195 once in a thousand times.
    assert stats.ks_2samp(ours, theirs).statistic < 0.0195


@given(ordinary, st.integers(1, 20), seeds, trims)
def test_negated_values_give_the_negated_distribution(values, resamples, seed, trim):
    found = bootstrap.compute(values, resamples, seed, trim)
    mirrored = bootstrap.compute([-value for value in values], resamples, seed, trim)
    largest = max(abs(value) for value in values)
    np.testing.assert_allclose(mirrored, -found, rtol=1e-12, atol=1e-12 * largest)


def test_no_values_or_a_nan_give_nan_and_one_value_itself():
    for function in (bootstrap.reference, bootstrap.compute, bootstrap.best):
        assert np.isnan(function([], 3, 0)).tolist() == [True] * 3
        # Cut off, the NaN would have gone unnoticed.
        assert np.isnan(function([1.0, 2.0, 3.0, 4.0, math.nan], 20, 0, 0.2)).all()
        assert function([0.1], 3, 0, 0.4).tolist() == [0.1] * 3
        assert function([1.0, 2.0], 0, 0).shape == (0,)


def test_infinite_values_can_be_cut_off():
    values = [math.inf, *range(9)]
    found = bootstrap.compute(values, 2000, 0, 0.2)
    # Infinite only where more than the two that are cut were drawn.
    share = 1 - sum(math.comb(10, k) * 0.1**k * 0.9 ** (10 - k) for k in range(3))
    assert np.isinf(found).mean() == pytest.approx(share, abs=4 * math.sqrt(share / 2000))
    assert not np.isnan(found).any() and np.isinf(bootstrap.compute(values, 2000, 0)).mean() > 0.5


def test_how_the_reference_is_cut_into_chunks_changes_nothing(monkeypatch):
    values = np.random.default_rng(7).normal(size=13)
    whole = bootstrap.reference(values, 100, 0, 0.2)
    for draws in (1, 13, 40, 1299):
        monkeypatch.setattr(bootstrap, "CHUNK_DRAWS", draws)
        np.testing.assert_array_equal(bootstrap.reference(values, 100, 0, 0.2), whole)


@pytest.mark.parametrize("function", [bootstrap.reference, bootstrap.compute, bootstrap.best])
def test_what_can_not_be_resampled_is_an_error(function):
    with pytest.raises(ValueError, match="2 axes"):
        function(np.zeros((3, 3)), 10, 0)
    with pytest.raises(ValueError, match="-1 resamples"):
        function([1.0], -1, 0)
    for trim in (-0.1, 0.5, math.nan):
        with pytest.raises(ValueError, match="trim"):
            function([1.0, 2.0], 10, 0, trim)


def test_arrays_are_left_as_they_are_and_may_be_read_only_or_of_other_types():
    values = np.arange(20, dtype=np.float32)[::-1]
    values.flags.writeable = False
    np.testing.assert_array_equal(
        bootstrap.compute(values, 10, 0, 0.2), bootstrap.compute(values.astype(float).tolist(), 10, 0, 0.2)
    )
    assert values.tolist() == list(range(19, -1, -1))


def test_numba_is_imported_by_the_kernel_alone_and_only_when_it_pays():
    script = """
import sys
import numpy as np
from perwatt.kernels import bootstrap
values = np.arange(12.0)
bootstrap.best(values, 1000, 0)
small = "numba" in sys.modules
bootstrap.LOAD_DRAWS = 12_000 * 3
rows = [bootstrap.best(values, 1000, 0, 0.2) for _ in range(4)]
print(small, "numba" in sys.modules, all((row == rows[0]).all() for row in rows))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_it_works_where_nothing_can_be_cached(monkeypatch):
    from numba.core import caching

    values = np.arange(9.0)
    wanted = bootstrap.reference(values, 20, 0)
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    bootstrap._compiled.cache_clear()
    try:
        np.testing.assert_array_equal(bootstrap.compute(values, 20, 0), wanted)
        assert type(bootstrap._compiled()._cache).__name__ == "NullCache"
    finally:
        bootstrap._compiled.cache_clear()
