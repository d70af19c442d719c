"""Damages: against errors measured by quantizing for real, on nets of every form; what torch can't run is said."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from models import (
    SYMMETRIC,
    build,
    context,
    conv_net,
    executed,
    feed,
    mlp,
    no_batch,
    node,
    outputs,
    transformer,
    weight,
)
from scipy.stats import spearmanr

from perwatt import sensitivity
from perwatt.artifact import Step
from perwatt.errors import BackendError
from perwatt.passes._naming import with_names
from perwatt.passes._quantizer import Wish, layers_twice, output_error, quantize

WISH = Wish(SYMMETRIC, ranges="minmax", strength=0.0, bias_correction=False)


def whole_of(artifact, batch, wish=WISH):
    return quantize(with_names(artifact, Step("name")), context([batch], execute=executed), wish)


def damages_of(whole, batches, seed=0, wish=WISH):
    twice, pairs = layers_twice(whole, wish)
    names = [value.name for value in whole.base.model.graph.outputs]
    return sensitivity.damages(twice, pairs, names, batches, seed)


def measured(whole, batch, names, wish=WISH):
    """The squared relative error of the outputs with these layers quantized."""
    return output_error([outputs(whole.base, batch)], [outputs(whole.only(wish, names), batch)]) ** 2


COARSE = replace(WISH, style=replace(SYMMETRIC, weight_per_channel=False))


def chain(layers=6, width=12, seed=0):
    """Matrix products, each with an outlier of its own size among its weights: one scale for all rounds them differently."""
    random, nodes, weights, at = np.random.default_rng(seed), [], {}, "x"
    for number in range(layers):
        array = weight(width, width, seed=seed + number, scale=0.5)
        array[number, 0] = 10 ** random.uniform(0, 1.5)
        weights[f"w{number}"] = array
        last = number == layers - 1
        nodes.append(node("MatMul", f"{at} w{number}", "y" if last else f"m{number}", name=f"/layer{number}"))
        if not last:
            nodes.append(node("LeakyRelu", f"m{number}", f"t{number}", alpha=0.3))
        at = f"t{number}"
    return build(nodes, f"x:float32[batch,{width}]", f"y:float32[batch,{width}]", weights)


NETS = {"conv_net": conv_net, "mlp": mlp, "transformer": transformer, "chain": chain}


@pytest.mark.parametrize("made", NETS)
def test_damages_add_up_to_what_quantizing_everything_does(made):
    artifact = NETS[made]()
    batch = feed(artifact, items=32)
    whole = whole_of(artifact, batch, COARSE)
    damages = damages_of(whole, [batch], wish=COARSE)
    exact = measured(whole, batch, damages, COARSE)
    assert exact / 2 < sum(damages.values()) < exact * 2, (damages, exact)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_layers_are_ranked_as_quantizing_one_at_a_time_does(seed):
    artifact = chain(seed=seed)
    batch = feed(artifact, items=64, seed=seed)
    whole = whole_of(artifact, batch, COARSE)
    damages = damages_of(whole, [batch], wish=COARSE)
    exact = {name: measured(whole, batch, [name], COARSE) for name in damages}
    assert spearmanr(list(damages.values()), list(exact.values())).statistic > 0.8, (damages, exact)
    assert all(exact[name] / 3 < damages[name] < exact[name] * 3 for name in damages), (damages, exact)


def test_equal_seeds_give_equal_damages_and_others_near_ones():
    artifact = conv_net()
    batch = feed(artifact, items=32)
    whole = whole_of(artifact, batch)
    one, again, other = (damages_of(whole, [batch], seed) for seed in (3, 3, 4))
    assert one == again != other
    assert all(0.5 < one[name] / other[name] < 2 for name in one)


def test_several_batches_count_alike_and_may_differ_in_shape():
    artifact = transformer()
    batches = [feed(artifact, items=8, words=length, seed=length) for length in (3, 7)]
    whole = whole_of(artifact, batches[0])
    both = damages_of(whole, batches)
    alone = [damages_of(whole, [batch]) for batch in batches]
    assert all(min(a[n] for a in alone) / 2 < both[n] < 2 * max(a[n] for a in alone) for n in both)


def test_an_output_that_is_a_layer_s_own_counts():
    """Both layers end in outputs; of the second, nobody reads on."""
    nodes = [node("MatMul", "x w", "a", name="/first"), node("MatMul", "a v", "b", name="/second")]
    weights = {"w": weight(6, 6), "v": weight(6, 6, seed=1)}
    net = build(nodes, "x:float32[batch,6]", "a:float32[batch,6] b:float32[batch,6]", weights)
    batch = feed(net, items=32)
    whole = whole_of(net, batch)
    damages = damages_of(whole, [batch])
    for name in ("/first", "/second"):
        exact = measured(whole, batch, [name])
        assert exact / 2 < damages[name] < exact * 2


def test_every_output_weighs_the_same_however_large():
    nodes = [node("MatMul", "x w", "a", name="/small"), node("MatMul", "x v", "b", name="/large")]
    base = weight(6, 6)
    net = build(nodes, "x:float32[batch,6]", "a:float32[batch,6] b:float32[batch,6]", {"w": base, "v": base * 1e4})
    batch = feed(net, items=64)
    damages = damages_of(whole_of(net, batch), [batch])
    assert 0.6 < damages["/small"] / damages["/large"] < 1.6


def test_a_layer_that_no_float_output_hangs_on_does_nothing():
    nodes = [
        node("MatMul", "x w", "a", name="/told"), node("MatMul", "x v", "h", name="/counted"),
        node("ArgMax", "h", "b", axis=-1, keepdims=0),
    ]  # fmt: skip
    net = build(
        nodes, "x:float32[batch,6]", "a:float32[batch,6] b:int64[batch]", {"w": weight(6, 6), "v": weight(6, 5)}
    )
    batch = feed(net, items=16)
    damages = damages_of(whole_of(net, batch), [batch])
    assert damages["/counted"] == 0.0 < damages["/told"]


def test_a_net_without_any_float_output_does_no_damage_and_raises_nothing():
    nodes = [node("MatMul", "x w", "h", name="/layer"), node("ArgMax", "h", "y", axis=-1, keepdims=0)]
    net = build(nodes, "x:float32[batch,6]", "y:int64[batch]", {"w": weight(6, 6)})
    batch = feed(net, items=4)
    assert damages_of(whole_of(net, batch), [batch]) == {"/layer": 0.0}


def test_a_product_of_inputs_alone_has_its_damage():
    """No weight goes into it."""
    nodes = [node("MatMul", "a b", "s", name="/scores"), node("Softmax", "s", "y")]
    net = build(nodes, "a:float32[batch,4,6] b:float32[batch,6,4]", "y:float32[batch,4,4]")
    batch = feed(net, items=32)
    whole = whole_of(net, batch)
    exact = measured(whole, batch, ["/scores"])
    assert exact / 2 < damages_of(whole, [batch])["/scores"] < exact * 2


@pytest.mark.parametrize("made", [lambda: conv_net(batch="4"), no_batch], ids=["fixed", "none"])
def test_a_fixed_batch_and_none_at_all(made):
    artifact = made()
    batch = feed(artifact, items=4)
    damages = damages_of(whole_of(artifact, batch), [batch] * 4)
    assert damages and all(np.isfinite(value) and value > 0 for value in damages.values())


def test_without_batches_nothing_is_known_of_any_layer():
    artifact = mlp()
    batch = feed(artifact)
    assert damages_of(whole_of(artifact, batch), []) == {"Gemm_0": 0.0, "Gemm_2": 0.0}


def test_twins_leave_outputs_as_they_were_and_differ_from_their_layers():
    artifact = transformer()
    batch = feed(artifact, items=8)
    whole = whole_of(artifact, batch)
    twice, pairs = layers_twice(whole, WISH)
    found = outputs(twice, batch)
    np.testing.assert_array_equal(found["y"], outputs(whole.base, batch)["y"])
    assert set(pairs) == {"/q", "/scores", "/attended", "/out"}
    for plain, rounded in pairs.values():
        gap = np.sqrt(np.mean((found[rounded] - found[plain]) ** 2) / np.mean(found[plain] ** 2))
        assert 0 < gap < 0.1


def test_a_twin_makes_what_its_layer_alone_quantized_makes():
    artifact = conv_net()
    batch = feed(artifact, items=8)
    whole = whole_of(artifact, batch)
    twice, pairs = layers_twice(whole, WISH)
    # The last layer alone: its outputs are the model's.
    np.testing.assert_allclose(
        outputs(twice, batch)[pairs["/head"][1]], outputs(whole.only(WISH, ["/head"]), batch)["y"], rtol=1e-5, atol=1e-6
    )


def test_without_torch_that_is_said(monkeypatch):
    artifact = mlp()
    batch = feed(artifact)
    whole = whole_of(artifact, batch)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendError, match="sensitivities need torch"):
        damages_of(whole, [batch])


def test_an_operator_that_the_interpreter_lacks_is_said(monkeypatch):
    from perwatt import interpreter

    artifact = mlp()
    batch = feed(artifact)
    whole = whole_of(artifact, batch)
    monkeypatch.setattr(interpreter, "missing_operators", lambda model: ["Relu (opset 23)"])
    with pytest.raises(BackendError, match=r"the interpreter has no Relu \(opset 23\)"):
        damages_of(whole, [batch])
