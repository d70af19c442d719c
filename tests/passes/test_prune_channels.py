"""`prune-channels`: what matters least goes, in sizes that pay; the rest makes up for it; what isn't faster isn't cut."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, context, executed, feed, node, outputs, weight

from perwatt.artifact import Artifact
from perwatt.contract import NodeCost
from perwatt.errors import BackendError, PassError
from perwatt.passes.prune_channels import PruneChannels

WIDTH = 24


def not_here(*_):
    raise BackendError("nothing can be measured here")


def unmeasured(artifact, items=64, **asked):
    """A context with samples where nothing can be measured."""
    asked = {"execute": executed, "measure": not_here, "profile": not_here} | asked
    return context([feed(artifact, items=items)], **asked)


def pruned(artifact, given=None, **settings):
    """(result, changes): valid, the input untouched, interface kept."""
    digest = artifact.digest()
    after, changes = PruneChannels(**{"multiple": 1, **settings}).run(artifact, given or unmeasured(artifact))
    assert Artifact(model=artifact.model).digest() == digest and after.signature == artifact.signature
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    assert after is artifact or list(after.steps[-1].changes) == changes
    return after, changes


def weights_of(artifact):
    return {name: value.const_value.numpy() for name, value in artifact.model.graph.initializers.items()}


def two_layers(width=WIDTH, seed=0, change=lambda weights: None, bias=True):
    """x → product → LeakyRelu → product → y, 5 in and 4 out."""
    weights = {
        "w1": weight(5, width, seed=seed),
        "b1": weight(width, seed=seed + 1),
        "w2": weight(width, 4, seed=seed + 2),
    }
    change(weights)
    nodes = [
        node("Gemm", "x w1 b1", "h", name="/first"),
        node("LeakyRelu", "h", "t", alpha=0.2, name="/act"),
        node("Gemm", "t w2 b2" if bias else "t w2", "y", name="/second"),
    ]
    if bias:
        weights["b2"] = weight(4, seed=seed + 3)
    return build(nodes, "x:float32[batch,5]", "y:float32[batch,4]", weights)


def convolutions(channels=16, seed=0):
    """Two residual stages with a depthwise convolution and a classifier."""
    nodes = [
        node("Conv", "x w0 b0", "c0", name="/stem", pads=[1, 1, 1, 1]),
        node("Relu", "c0", "r0"),
        node("Conv", "r0 w1 b1", "c1", name="/inside", pads=[1, 1, 1, 1]),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 wd", "cd", name="/depthwise", pads=[1, 1, 1, 1], group=2 * channels),
        node("Conv", "cd w2 b2", "c2", name="/outside"),
        node("Add", "r0 c2", "a"),
        node("GlobalAveragePool", "a", "g"),
        node("Flatten", "g", "f"),
        node("Gemm", "f wc bc", "y", name="/head"),
    ]
    weights = {
        "w0": weight(channels, 3, 3, 3, seed=seed), "b0": weight(channels, seed=seed + 1),
        "w1": weight(2 * channels, channels, 3, 3, seed=seed + 2), "b1": weight(2 * channels, seed=seed + 3),
        "wd": weight(2 * channels, 1, 3, 3, seed=seed + 4),
        "w2": weight(channels, 2 * channels, 1, 1, seed=seed + 5), "b2": weight(channels, seed=seed + 6),
        "wc": weight(channels, 10, seed=seed + 7), "bc": weight(10, seed=seed + 8),
    }  # fmt: skip
    return build(nodes, "x:float32[batch,3,8,8]", "y:float32[batch,10]", weights)


def moved(before, after, items=200, seed=9):
    """How far outputs moved, relative to their size."""
    batch = feed(before, items=items, seed=seed)
    old, new = outputs(before, batch), outputs(after, batch)
    return max(float(np.linalg.norm(new[n] - old[n]) / np.linalg.norm(old[n])) for n in old)


# What goes ------------------------------------------------------------------------------------------------------------


def test_channels_are_taken_out_everywhere_at_once(golden_pass):
    before = convolutions()
    after, changes = pruned(before, ratio=0.25, allocation="uniform")
    golden_pass("prune_channels", before, after, changes)
    found = {name: array.shape for name, array in weights_of(after).items()}
    assert found["w0"] == (12, 3, 3, 3) and found["w1"] == (24, 12, 3, 3) and found["wd"] == (24, 1, 3, 3)
    assert found["w2"] == (12, 24, 1, 1) and found["wc"] == (12, 10) and found["bc"] == (10,)
    depthwise = next(one for one in after.model.graph if one.name == "/depthwise")
    assert depthwise.attributes["group"].value == 24
    assert outputs(after, feed(after))["y"].shape == (3, 10)


@pytest.mark.parametrize("importance", ["taylor", "reconstruction", "activation"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_what_nobody_reads_goes_first(importance, allocation):
    dead = [1, 5, 6, 11, 17, 20]

    def change(weights):
        weights["w2"][dead] = 0

    before = two_layers(change=change)
    after, changes = pruned(before, ratio=0.25, importance=importance, allocation=allocation, compensate=False)
    kept = [at for at in range(WIDTH) if at not in dead]
    assert np.array_equal(weights_of(after)["w1"], weights_of(before)["w1"][:, kept])
    assert moved(before, after) < 1e-5
    assert changes[0].startswith("6 of 24 channels")


def test_small_weights_go_first_by_magnitude_without_reading_data():
    def change(weights):
        weights["w1"][:, ::4] *= 0.01

    before = two_layers(change=change)
    after, _ = pruned(before, ratio=0.25, importance="magnitude", compensate=False)
    assert np.array_equal(weights_of(after)["w1"], weights_of(before)["w1"][:, [c for c in range(WIDTH) if c % 4]])


def test_taylor_ranks_channels_as_taking_each_out_does():
    before = two_layers(seed=4)
    batch = feed(before, items=256)
    loss = []
    for channel in range(WIDTH):
        model = before.edit()
        array = model.graph.initializers["w2"].const_value.numpy().copy()
        array[channel] = 0
        model.graph.initializers["w2"].const_value = ir.Tensor(array, name="w2")
        loss.append(np.linalg.norm(outputs(Artifact(model=model), batch)["y"] - outputs(before, batch)["y"]))
    after, _ = pruned(before, unmeasured(before, items=256), ratio=0.5, compensate=False, judged_on=256)
    kept = {
        int(np.flatnonzero((row == weights_of(before)["w1"].T).all(axis=1))[0]) for row in weights_of(after)["w1"].T
    }
    # The second product is linear, so first order is exact but for the draws of the probes.
    worst = set(np.argsort(loss)[WIDTH // 2 :].tolist())
    assert len(kept & worst) >= WIDTH // 2 - 2


# Making up for it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_what_others_can_say_as_well_is_made_up_for(bias):
    """Half the channels are copies of others, twice as large."""

    def change(weights):
        half = WIDTH // 2
        weights["w1"][:, half:] = 2 * weights["w1"][:, :half]
        weights["b1"][half:] = 2 * weights["b1"][:half]

    before = two_layers(change=change, bias=bias)
    settings = {"ratio": 0.5, "importance": "magnitude", "allocation": "uniform"}
    left, _ = pruned(before, compensate=False, **settings)
    made_up, _ = pruned(before, **settings)
    assert moved(before, made_up) < 0.06 < 0.15 < moved(before, left)


def test_compensation_helps_convolutions_too():
    before = convolutions(seed=3)
    errors = {
        flag: moved(before, pruned(before, ratio=0.2, compensate=flag, allocation="uniform")[0], items=40)
        for flag in (True, False)
    }
    assert errors[True] < 0.75 * errors[False]


def test_a_constant_channel_goes_into_the_bias():
    """A channel that always gives the same has nothing that a weight could carry."""

    def change(weights):
        weights["w1"][:, 3] = 0
        weights["b1"][3] = 5.0

    before = two_layers(change=change)
    after, _ = pruned(before, ratio=1 / WIDTH, importance="reconstruction", allocation="uniform")
    # Its power is the largest of all; that it can be done without shows only in what is left once the mean is taken out.
    assert moved(before, after) < 0.2


# Sizes ----------------------------------------------------------------------------------------------------------------


@given(
    ratio=st.floats(0.02, 0.97),
    multiple=st.sampled_from([1, 2, 3, 4, 8]),
    allocation=st.sampled_from(["uniform", "global"]),
)
@settings(max_examples=15)
def test_sizes_are_multiples_of_what_pays(ratio, multiple, allocation):
    before = convolutions()
    after, _ = pruned(before, ratio=ratio, multiple=multiple, allocation=allocation, importance="magnitude")
    shapes = {name: array.shape for name, array in weights_of(after).items()}
    for name, size in (("w0", 16), ("w1", 32)):
        assert 0 < shapes[name][0] <= size and (shapes[name][0] == size or shapes[name][0] % multiple == 0)
    assert (after is before) == (shapes["w0"][0] == 16 and shapes["w1"][0] == 32)


def test_layers_too_narrow_for_the_hardware_stay_and_are_counted():
    before = convolutions()
    after, changes = pruned(before, multiple=32)
    assert after is before
    assert "2 left: too narrow to be cut to a multiple of 32 channels" in changes


def test_the_backends_multiple_is_that_of_its_narrowest_type():
    made = PruneChannels()
    given = unmeasured(convolutions())
    from dataclasses import replace

    known = {"int8": 64, "bfloat16": 32, "float32": 16}
    with_all = replace(given, capabilities=replace(given.capabilities, channel_multiples=known))
    assert made._multiple(with_all) == 64
    without_int8 = replace(with_all, capabilities=replace(with_all.capabilities, quantization_styles=()))
    assert made._multiple(without_int8) == 32
    plain = replace(without_int8, capabilities=replace(without_int8.capabilities, half_types=()))
    assert made._multiple(plain) == 16


def test_more_goes_where_it_costs_more_and_matters_less():
    """Two layers that matter alike, one of which costs a hundred times the other's time."""
    nodes = [
        node("MatMul", "x w0", "h0", name="/dear"),
        node("Relu", "h0", "t0"),
        node("MatMul", "t0 w1", "m", name="/middle"),
        node("MatMul", "m w2", "h1", name="/cheap"),
        node("Relu", "h1", "t1"),
        node("MatMul", "t1 w3", "y", name="/last"),
    ]
    weights = {f"w{i}": weight(32, 32, seed=i) for i in range(4)}
    before = build(nodes, "x:float32[batch,32]", "y:float32[batch,32]", weights)
    seconds = {"/dear": 1.0, "/middle": 1.0, "/cheap": 0.01, "/last": 0.01}

    def profile(artifact):
        return [NodeCost((name,), "MatMul", cost) for name, cost in seconds.items()]

    after, _ = pruned(before, unmeasured(before, profile=profile), ratio=0.3, multiple=4)
    shapes = {name: array.shape for name, array in weights_of(after).items()}
    assert shapes["w0"][1] < 24 and shapes["w2"][1] > 24


def attention(heads=4, each=3, silent=()):
    """Self-attention over 6 places; heads in `silent` are read by nobody."""
    width, split = heads * each, np.int64([0, 0, heads, each])
    nodes = [
        *(node("MatMul", f"x w{side}", f"{side}0", name=f"/{side}") for side in "qkv"),
        *(node("Reshape", f"{side}0 split", f"{side}1") for side in "qkv"),
        *(
            node("Transpose", f"{side}1", f"{side}2", perm=[0, 2, 3, 1] if side == "k" else [0, 2, 1, 3])
            for side in "qkv"
        ),
        node("MatMul", "q2 k2", "s", name="/scores"),
        node("Softmax", "s", "p", axis=-1),
        node("MatMul", "p v2", "o2", name="/attended"),
        node("Transpose", "o2", "o1", perm=[0, 2, 1, 3]),
        node("Reshape", "o1 join", "o"),
        node("MatMul", "o wo", "y", name="/out"),
    ]
    out = weight(width, width, seed=3)
    for head in silent:
        out[head * each : (head + 1) * each] = 0
    weights = {f"w{side}": weight(width, width, seed=i) for i, side in enumerate("qkv")}
    weights |= {"wo": out, "split": split, "join": np.int64([0, 0, width])}
    return build(nodes, f"x:float32[batch,6,{width}]", f"y:float32[batch,6,{width}]", weights)


def test_heads_go_whole():
    before = attention(silent=(0, 2))
    after, changes = pruned(before, ratio=0.5, allocation="uniform", compensate=False)
    assert {weights_of(after)[f"w{side}"].shape for side in "qkv"} == {(12, 6)}
    assert weights_of(after)["wo"].shape == (6, 12)
    assert changes[0].startswith("2 of 4 channels and heads in 1 groups")
    assert moved(before, after, items=4) < 1e-5


# What isn't cut -------------------------------------------------------------------------------------------------------


def test_what_is_not_faster_is_not_cut():
    before = two_layers()
    costs = iter([[1.0, 1.02], [1.0, 0.5]])
    given = unmeasured(before, measure=lambda graphs: next(costs))
    after, changes = pruned(before, given)
    assert after is before and changes[0] == "not cut: measured 1.02 × the cost of the model as it is"
    after, changes = pruned(before, given)
    assert after is not before and "measured 0.50 × the cost" in changes


def test_excluded_products_keep_what_they_make():
    before = convolutions()
    after, changes = pruned(before, exclude=("/stem",), ratio=0.5)
    shapes = {name: array.shape for name, array in weights_of(after).items()}
    assert shapes["w0"] == (16, 3, 3, 3) and shapes["w1"][0] < 32
    assert "1 left: excluded" in changes
    with pytest.raises(PassError, match="matches no node"):
        pruned(before, exclude=("/nowhere",))


@pytest.mark.parametrize("settings", [{"ratio": 0.0}, {"ratio": 1.0}, {"ratio": float("nan")}, {"multiple": 0}])
def test_settings_that_make_no_sense_are_errors(settings):
    with pytest.raises(PassError):
        pruned(two_layers(), **settings)


def test_without_samples_it_says_so():
    with pytest.raises(PassError, match="no samples"):
        PruneChannels(multiple=1).run(two_layers(), context([], execute=executed, measure=not_here, profile=not_here))


def test_without_torch_importance_is_found_otherwise(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "perwatt.interpreter", None)
    _, changes = pruned(two_layers())
    assert "by reconstruction, as sensitivities need torch" in changes[0]


def test_the_same_twice_is_the_same_model():
    one, two = (pruned(convolutions())[0] for _ in range(2))
    assert one.digest() == two.digest()


def test_it_can_be_pruned_again():
    once, _ = pruned(convolutions(), ratio=0.25, allocation="uniform")
    twice, _ = pruned(once, ratio=0.25, allocation="uniform")
    assert weights_of(twice)["w0"].shape == (9, 3, 3, 3)


def test_no_layer_loses_nearly_all_it_has():
    """One layer costs all the time and matters to nobody: a quarter of it stays all the same."""
    before = two_layers(width=32, change=lambda weights: weights["w2"].__imul__(1e-6))
    after, _ = pruned(before, ratio=0.7, multiple=2)
    assert weights_of(after)["w1"].shape[1] == 10
    nodes = [
        node("MatMul", "x w0", "h0", name="/dear"),
        node("MatMul", "h0 w1", "h1", name="/middle"),
        node("MatMul", "h1 w2", "y", name="/last"),
    ]
    weights = {"w0": weight(8, 32), "w1": weight(32, 32, seed=1), "w2": weight(32, 8, seed=2, scale=30.0)}
    net = build(nodes, "x:float32[batch,8]", "y:float32[batch,8]", weights)
    seconds = {"/dear": 1.0, "/middle": 1e-3, "/last": 1e-3}
    given = unmeasured(net, profile=lambda artifact: [NodeCost((n,), "MatMul", s) for n, s in seconds.items()])
    after, _ = pruned(net, given, ratio=0.5, multiple=2, importance="magnitude")
    assert weights_of(after)["w0"].shape[1] >= 8
