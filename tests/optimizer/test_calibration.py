"""Calibration: ranges, means and peaks against NumPy's on the same data, on models of every form, in little memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, context, conv_net, executed, feed, no_batch, node, outputs, transformer, two_and_two, weight

from perwatt import calibration
from perwatt.calibration import PREFIX, Wanted, calibrate, instrumented
from perwatt.data import Samples

METHODS = ("minmax", "percentile", "mse", "entropy")
LEVELS = 255


def passed_on(spec="float32[batch,4]"):
    """x comes out as it went in; `x` is what is looked at."""
    return build([node("Identity", "x", "y")], f"x:{spec}", f"y:{spec}")


def found(artifact, batches, wanted=("x",), how=None, method="mse", channels=None, seed=0):
    held = batches if isinstance(batches, Samples) else Samples(batches)
    how = how or Wanted()
    return calibrate(artifact, dict.fromkeys(wanted, how), held, context(execute=executed, seed=seed), method, channels)


def range_of(values, method, how=None):
    # In few samples, so that all are seen.
    artifact = passed_on(f"float32[batch,{values.size // 4}]")
    return found(artifact, [{"x": values.reshape(4, -1)}], how=how, method=method).ranges["x"]


def error(values, low, high, symmetric):
    """The mean squared error of 8-bit quantization with this range, as ONNX defines it."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = 2 * max(-low, high) / 254 if symmetric and low < 0 else (high - low) / 255
    zero = 0 if symmetric and low < 0 else round(-low / step)
    first, last = (-127, 127) if symmetric and low < 0 else (0, 255)
    codes = np.clip(np.rint(values / step) + zero, first, last)
    return float(np.mean(((codes - zero) * step - values) ** 2))


@given(
    rows=st.integers(1, 40), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6, 1e30]), shift=st.sampled_from([-3.0, 0.0, 3.0]),
    seed=st.integers(0, 99), method=st.sampled_from(METHODS), symmetric=st.booleans(), unsigned=st.booleans(),
)  # fmt: skip
def test_no_range_goes_beyond_the_extremes_and_minmax_gives_them(rows, scale, shift, seed, method, symmetric, unsigned):
    random = np.random.default_rng(seed)
    values = ((random.standard_normal((rows, 4)) + shift) * scale).astype(np.float32)
    low, high = range_of(values, method, Wanted(symmetric, unsigned))
    assert values.min() <= low <= high <= values.max()
    if method == "minmax":
        assert (low, high) == (values.min(), values.max())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", ["normal", "relu", "outlier", "skewed"])
def test_mse_has_the_least_error_that_numpy_finds_by_trying(shape, symmetric):
    random = np.random.default_rng(3)
    values = random.standard_normal(4000).astype(np.float32)
    values = {
        "normal": values, "relu": np.maximum(values, 0), "outlier": np.append(values[4:], np.float32([40, 0, 0, 0])),
        "skewed": np.exp(values) - 0.3,
    }[shape]  # fmt: skip
    chosen = error(values, *range_of(values, "mse", Wanted(symmetric)), symmetric)
    shares = np.linspace(0.05, 1, 60)
    tried = [(values.min() * a, values.max() * b) for a in shares for b in ([a] if symmetric else shares)]
    # The largest magnitude rules a symmetric range, whichever side it lies on.
    peak = np.abs(values).max()
    tried = [(-peak * a, peak * a) for a in shares] if symmetric and values.min() < 0 else tried
    best = min(error(values, *each, symmetric) for each in tried)
    assert chosen <= 1.1 * best
    assert chosen <= 1.01 * error(values, values.min(), values.max(), symmetric)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.2])
def test_percentiles_are_numpy_s_to_one_bin(monkeypatch, share):
    monkeypatch.setattr(calibration, "BEYOND", share)
    values = np.random.default_rng(0).gamma(2.0, size=4000).astype(np.float32) - 1
    width = 2 * 2.0 ** np.ceil(np.log2(np.abs(values).max())) / calibration.BINS
    wanted = np.quantile(values, [share, 1 - share], method="inverted_cdf")
    assert np.abs(np.array(range_of(values, "percentile")) - wanted).max() <= width


def test_entropy_clips_one_far_value_and_keeps_what_is_evenly_spread():
    normal = np.append(np.random.default_rng(0).standard_normal(4000), [80, 0, 0, 0]).astype(np.float32)
    low, high = range_of(normal, "entropy")
    assert 2 < high < 20 and -20 < low < -2
    even = np.linspace(-1, 1, 4000, dtype=np.float32)
    low, high = range_of(even, "entropy")
    assert high > 0.95 and low < -0.95


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-42])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_constant_is_within_its_range(method, value, symmetric):
    low, high = range_of(np.full(64, value, np.float32), method, Wanted(symmetric))
    assert low == high == np.float32(value)


@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_always_finite_have_no_range_and_leave_others_theirs(method):
    artifact = build(
        [node("Add", "x mask", "a"), node("Add", "x other", "b"), node("Add", "a b", "y")],
        "x:float32[batch,4] mask:float32[batch,4] other:float32[batch,4]", "y:float32[batch,4]",
    )  # fmt: skip
    batch = feed(artifact, items=24)
    batch["mask"] = np.zeros((24, 4), np.float32)
    batch["mask"][17, 2] = -np.inf
    batch["other"][3, 1] = np.nan
    ranges = found(artifact, [batch], ("x", "a", "b", "y", "mask"), method=method).ranges
    assert [name for name, ends in ranges.items() if np.isnan(ends).all()] == ["a", "b", "y", "mask"]
    assert ranges["x"] == found(artifact, [batch], ("x",), method=method).ranges["x"]
    assert batch["x"].min() <= ranges["x"][0] < ranges["x"][1] <= batch["x"].max()


def test_other_methods_from_what_was_seen_are_what_they_give_by_themselves():
    held = Samples([feed(conv_net(), items=24)])
    seen = found(conv_net(), held, ("x", "r1", "c2"), method="minmax")
    for method in METHODS:
        assert seen.by(method) == found(conv_net(), held, ("x", "r1", "c2"), method=method).ranges


# Means and peaks by channel -------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), place=st.integers(0, 2), opset=st.sampled_from([13, 17, 18, 23]),
    items=st.integers(1, 21),
)  # fmt: skip
def test_means_and_peaks_by_channel_are_numpy_s(shape, place, opset, items):
    axis = 1 + place % len(shape)
    spec = f"float32[{','.join(map(str, ['batch', *shape]))}]"
    artifact = build([node("Relu", "x", "y")], f"x:{spec}", f"y:{spec}", opset=opset)
    x = np.random.default_rng(items).standard_normal((items, *shape)).astype(np.float32)
    seen = found(artifact, [{"x": x}], (), channels={"x": axis, "y": axis - len(shape) - 1})
    others = tuple(place for place in range(x.ndim) if place != axis)
    for name, values in (("x", x), ("y", np.maximum(x, 0))):
        assert np.allclose(seen.means[name], values.mean(axis=others), atol=1e-6)
        assert np.array_equal(seen.peaks[name], np.abs(values).max(axis=others))
    assert seen.samples == items and not seen.converged


def test_a_vector_has_its_own_channels():
    seen = found(no_batch(), [{"x": np.arange(-2, 4, dtype=np.float32)}], channels={"x": -1})
    assert seen.means["x"].tolist() == [-2, -1, 0, 1, 2, 3] and seen.peaks["x"].tolist() == [2, 1, 0, 1, 2, 3]
    assert seen.samples == 1


# Models of every form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["batch", "1", "4", "40"])
def test_fixed_batches_are_called_with_their_size_and_count_the_samples_that_there_are(batch):
    batches = feed(conv_net(), items=10)
    seen = found(conv_net(batch=batch), [batches], ("x", "r1"), method="minmax")
    assert seen.samples == 10
    assert seen.ranges == found(conv_net(), [batches], ("x", "r1"), method="minmax").ranges


def test_models_without_a_batch_axis_are_called_as_the_samples_come():
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    seen = found(no_batch(), [{"x": row} for row in x], ("x", "y"), method="minmax")
    assert seen.samples == 5
    y = x @ weight(6, 3)
    assert np.allclose([seen.ranges["x"], seen.ranges["y"]], [(x.min(), x.max()), (y.min(), y.max())], atol=1e-6)


def test_several_inputs_integers_and_sentences_of_several_lengths():
    artifact = two_and_two()
    names = [spec.name for spec in artifact.signature.inputs]
    batch = feed(artifact, items=9)
    floats = [name for name in names if batch[name].dtype == np.float32]
    seen = found(artifact, [batch], floats, method="minmax")
    assert seen.ranges == {name: (batch[name].min(), batch[name].max()) for name in floats} and floats

    artifact = transformer()
    held = Samples([feed(artifact, items=5, words=words, seed=words) for words in (3, 7, 11)])
    seen = found(artifact, held, ("l", "a"), method="minmax", channels={"l": -1})
    alone = [found(artifact, [chunk], ("l", "a"), method="minmax").ranges for chunk in held.chunks]
    for name in ("l", "a"):
        ends = np.array([each[name] for each in alone])
        assert np.allclose(seen.ranges[name], (ends[:, 0].min(), ends[:, 1].max()), atol=1e-5)
    assert seen.samples == 15 and seen.means["l"].shape == (8,)


def test_names_that_the_model_has_already_are_no_trouble():
    nodes = [node("Relu", "low_0", "some_0"), node("Abs", "some_0", "mean_0"), node("Neg", "mean_0", "calibration")]
    artifact = build(nodes, "low_0:float32[batch,4]", "calibration:float32[batch,4]", inner="mean_0:float32[batch,4]")
    x = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    seen = found(artifact, [{"low_0": x}], ("some_0", "calibration"), method="minmax", channels={"mean_0": 1})
    top = np.maximum(x, 0)
    assert seen.ranges == {"some_0": (0, top.max()), "calibration": (-top.max(), 0)}
    assert np.allclose(seen.means["mean_0"], top.mean(axis=0))


# When it stops --------------------------------------------------------------------------------------------------------


def in_order_of_calls(values):
    """Rows arranged so that calibration comes to them in this order."""
    rows = np.arange(len(values))
    calls = [rows[start : start + calibration.BATCH] for start in range(0, len(values), calibration.BATCH)]
    arranged = np.empty_like(values)
    arranged[np.concatenate(calibration.in_random_order(calls, 0))] = values
    return arranged


def test_it_stops_when_ranges_have_converged_and_says_so():
    values = np.random.default_rng(0).standard_normal((400, 4)).astype(np.float32)
    seen = found(passed_on(), [{"x": values}])
    assert seen.converged and calibration.FIRST_LOOK < seen.samples < 200
    growing = in_order_of_calls(values * np.linspace(1, 9, 400, dtype=np.float32)[:, None])
    late = found(passed_on(), [{"x": growing}])
    assert not late.converged and late.samples == 400


def test_one_value_that_still_moves_is_enough_to_go_on():
    artifact = build(
        [node("Relu", "x", "r"), node("Add", "r z", "y")], "x:float32[batch,4] z:float32[batch,4]", "y:float32[batch,4]"
    )
    values = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    moving = in_order_of_calls(np.repeat(2.0 ** (np.arange(300) / 30), 4).reshape(300, 4).astype(np.float32))
    assert found(artifact, [{"x": values, "z": moving}], ("x", "r")).converged
    seen = found(artifact, [{"x": values, "z": moving}], ("x", "r", "z"), method="minmax")
    assert not seen.converged and seen.ranges["z"] == (1, moving.max())


def test_the_same_seed_gives_the_same_and_another_order_nearly_the_same():
    batch = feed(conv_net(), items=200)
    wanted = ("x", "r1", "c2", "r2")
    first, second = (found(conv_net(), [batch], wanted) for _ in range(2))
    assert first.ranges == second.ranges and first.samples == second.samples
    turned = {name: array[::-1] for name, array in batch.items()}
    for other in (found(conv_net(), [turned], wanted), found(conv_net(), [batch], wanted, seed=7)):
        assert other.ranges != first.ranges
        for name in wanted:
            assert np.allclose(other.ranges[name], first.ranges[name], atol=0.25 * np.ptp(first.ranges[name]))


# How much comes out ---------------------------------------------------------------------------------------------------


def large(channels=96, side=28):
    spec = f"float32[batch,{channels},{side},{side}]"
    return build([node("Relu", "x", "r"), node("Neg", "r", "y")], f"x:{spec}", f"y:{spec}", inner=f"r:{spec}")


def test_little_comes_out_of_large_values_and_all_channels_and_places_have_their_turn():
    artifact = large()
    places = np.arange(96 * 28 * 28, dtype=np.float32).reshape(1, 96, 28, 28)
    given_out = outputs(instrumented(artifact, ["x", "r"], {"r": 1}), {"x": np.repeat(places, 8, axis=0)})
    assert sum(array.size for array in given_out.values()) <= 8 * 2 * 2 * calibration.SELECTED
    some = given_out[f"{PREFIX}some_1"].astype(int)
    # Enough of them: the selection says what the value looks like.
    assert some.size >= 8 * calibration.SELECTED / 2
    assert (
        set(some // 784) == set(range(96))
        and set(some % 28) == set(range(28))
        and set(some // 28 % 28) == set(range(28))
    )
    assert given_out[f"{PREFIX}low_1"] == 0 and given_out[f"{PREFIX}high_1"] == places.max()


@pytest.mark.parametrize("shape", ["[batch,words,96]", "[batch,?,?,?]", "[batch,8,words,words]", None])
@pytest.mark.parametrize("opset", [13, 23])
def test_little_comes_out_where_sizes_show_only_when_they_are_there(shape, opset):
    inner, outer = f"r:float32{shape}" if shape else "", shape or "[batch,?,?]"
    nodes = [node("Relu", "x", "r"), node("Neg", "r", "y")]
    artifact = build(nodes, f"x:float32{outer}", f"y:float32{outer}", inner=inner, opset=opset)
    sizes = {
        "[batch,words,96]": (8, 512, 96),
        "[batch,?,?,?]": (8, 96, 28, 28),
        "[batch,8,words,words]": (8, 8, 99, 99),
    }
    x = np.random.default_rng(0).standard_normal(sizes.get(shape, (64, 96, 96))).astype(np.float32)
    given_out = outputs(instrumented(artifact, ["r"], {}), {"x": x})
    some = given_out[f"{PREFIX}some_0"]
    assert 8 * calibration.SELECTED / 3 <= some.size <= 8 * 3 * calibration.SELECTED
    assert set(some.tolist()) <= set(np.maximum(x, 0).ravel().tolist())
    few = outputs(instrumented(artifact, ["r"], {}), {"x": x[:1]})[f"{PREFIX}some_0"]
    assert few.size == x[:1].size


def test_nothing_is_run_that_nobody_looks_at_and_the_model_stays_as_it_was():
    before = conv_net()
    digest = before.digest()
    early = instrumented(before, ["r1"], {})
    assert early.operator_counts().get("Conv") == 1 and "Gemm" not in early.operator_counts()
    assert before.digest() == digest
    names = [output.name for output in early.model.graph.outputs]
    assert names == [f"{PREFIX}{word}_0" for word in ("low", "high", "some")]
