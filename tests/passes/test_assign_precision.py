"""`assign-precision`: what is measured fastest, mended until the budget holds, on scripted backends and a net that int8 ruins."""

import sys
import time
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SYMMETRIC, ask, build, context, conv_net, executed, feed, mlp, node, outputs, transformer, weight

from perwatt import sensitivity
from perwatt.artifact import Artifact, Step
from perwatt.contract import Loss, NodeCost
from perwatt.data import Samples
from perwatt.errors import BackendError
from perwatt.passes._naming import with_names
from perwatt.passes._placement import PRODUCTS, products
from perwatt.passes._quantizer import Wish, quantize
from perwatt.passes.assign_precision import AssignPrecision

PER_TENSOR = replace(SYMMETRIC, weight_per_channel=False)


def int8_layers(artifact):
    """Names of products that read integers."""
    weights = {n.name: n.inputs[1].producer() for n in artifact.model.graph if n.op_type in PRODUCTS}
    return {name for name, maker in weights.items() if maker is not None and maker.op_type == "DequantizeLinear"}


def chain(layers=5, width=8):
    """/layer0 … of matrix products."""
    names = ["x", *(f"h{i}" for i in range(1, layers)), "y"]
    nodes = [node("MatMul", f"{names[i]} w{i}", names[i + 1], name=f"/layer{i}") for i in range(layers)]
    inner = " ".join(f"{name}:float32[batch,{width}]" for name in names[1:-1])
    weights = {f"w{i}": weight(width, width, seed=i) for i in range(layers)}
    return build(nodes, f"x:float32[batch,{width}]", f"y:float32[batch,{width}]", weights, inner=inner)


ALL = {f"/layer{number}" for number in range(5)}


class ScriptedBackend:
    """Seconds of each layer as it is and in int8; what it loses by which layers are int8. Remembers what it was asked."""

    def __init__(self, plain, quantized, loses=lambda layers: None, conversion=0.0):
        self.plain, self.quantized, self.loses, self.conversion = plain, quantized, loses, conversion
        self.measured, self.judged, self.told = [], [], []

    def profile(self, artifact):
        inside = int8_layers(artifact)
        return [
            NodeCost((name,), "MatMul", self.quantized[name] if name in inside else self.plain[name])
            for name in self.plain
        ]

    def measure(self, artifacts):
        measured = [int8_layers(artifact) for artifact in artifacts]
        self.measured += measured
        names = list(self.plain)
        return [
            sum(self.quantized[n] if n in inside else self.plain[n] for n in names)
            + self.conversion * sum((a in inside) != (b in inside) for a, b in pairwise(names))
            for inside in measured
        ]

    def judge(self, artifact):
        self.judged.append(int8_layers(artifact))
        return self.loses(self.judged[-1])

    def context(self, artifact, **given):
        asked = {
            "execute": executed, "measure": self.measure, "profile": self.profile, "judge": self.judge,
        }  # fmt: skip
        return replace(context([feed(artifact, items=24)], **asked), progress=self.told.append, **given)


def assigned(backend, artifact=None, given=None, **settings):
    """(result, changes): valid, the input untouched, names and types kept."""
    artifact = artifact or chain()
    digest = artifact.digest()
    after, changes = AssignPrecision(**settings).run(artifact, given or backend.context(artifact))
    assert Artifact(model=artifact.model).digest() == digest and after.signature == artifact.signature
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    assert after is artifact or list(after.steps[-1].changes) == changes
    return after, changes


def costs(**changed):
    """Seconds of the chain's layers in int8, half of those in floating point unless said otherwise."""
    plain = dict.fromkeys(sorted(ALL), 10e-6)
    return plain, {name: changed.get(name[1:], 5e-6) for name in plain}


def losing(*bad, drop=0.2):
    """A judge's answer: too much is lost wherever one of these layers is int8."""
    return lambda layers: Loss(drop, False) if layers & set(bad) else Loss(0.0, True)


# What is fastest ------------------------------------------------------------------------------------------------------


def test_mixed_answers_mix(golden_pass):
    before = chain()
    backend = ScriptedBackend(*costs(layer1=12e-6, layer2=30e-6))
    after, changes = assigned(backend, before)
    golden_pass("assign_precision", before, after, changes)
    assert int8_layers(after) == {"/layer0", "/layer3", "/layer4"}
    assert changes[0].startswith("3 of 5 layers in int8") and changes[1].startswith("2 of 5 layers stay")
    batch = feed(before, items=8)
    old, new = outputs(before, batch)["y"], outputs(after, batch)["y"]
    assert 0 < np.abs(old - new).max() < 0.1 * np.abs(old).max()


def test_a_model_that_is_fastest_as_it_is_stays():
    before = chain()
    backend = ScriptedBackend(*costs(**{f"layer{i}": 11e-6 for i in range(5)}))
    after, changes = assigned(backend, before)
    assert after is before
    assert changes == ["left in floating point: measured fastest, int8 takes 1.10 ×"]
    assert not backend.judged


def test_what_the_whole_costs_decides_not_what_profiles_add_up_to():
    """Profiles tell that three layers pay; the measurement, with conversions, that only all of them do."""
    backend = ScriptedBackend(*costs(layer1=11e-6, layer3=11e-6), conversion=8e-6)
    assert int8_layers(assigned(backend)[0]) == ALL
    assert {frozenset(some) for some in backend.measured} > {frozenset(), frozenset(ALL)}
    backend = ScriptedBackend(*costs(layer1=11e-6, layer3=11e-6), conversion=90e-6)
    backend.quantized = {name: 20e-6 for name in ALL} | {"/layer0": 1e-6}
    before = chain()
    assert assigned(backend, before)[0] is before


def test_the_rest_is_in_half_where_the_graph_says_what_runs():
    """Int8 where it pays, float16 elsewhere; where the operating point can say it, the graph stays in float32."""
    before = chain()
    backend = ScriptedBackend(*costs(layer2=30e-6))
    given = backend.context(before)
    typed = replace(given.capabilities, half_types=("float16",), floating_precisions=("tf32", "f32"))
    after, _ = assigned(backend, before, replace(given, capabilities=typed))
    assert int8_layers(after) == ALL - {"/layer2"}
    kinds = {node.name: node.inputs[0].dtype.name for node in after.model.graph if node.op_type == "MatMul"}
    assert kinds == dict.fromkeys(ALL, "FLOAT16")
    batch = feed(before, items=8)
    old, new = outputs(before, batch)["y"], outputs(after, batch)["y"]
    assert 0 < np.abs(old - new).max() < 0.1 * np.abs(old).max()
    plain, _ = assigned(
        backend, before, replace(given, capabilities=replace(typed, floating_precisions=("f16", "f32")))
    )
    assert {node.inputs[0].dtype.name for node in plain.model.graph if node.op_type == "MatMul"} == {"FLOAT"}


def test_a_figure_that_was_low_by_chance_is_measured_again():
    """A mixture that costs 3 % more than all in int8, for its conversions, was measured 3 % cheaper, once."""
    backend = ScriptedBackend(*costs(layer2=11e-6), conversion=1e-6)
    honest, times = backend.measure, []

    def lucky(artifacts):
        found = honest(artifacts)
        times.append(len(artifacts))
        mixture = next(i for i, artifact in enumerate(artifacts) if int8_layers(artifact) == ALL - {"/layer2"})
        found[mixture] *= 0.94 if len(times) == 1 else 1.0
        return found

    backend.measure = lucky
    assert int8_layers(assigned(backend)[0]) == ALL
    assert len(times) == 2 and times[1] < times[0]


def test_of_equals_the_whole_is_taken():
    """A mixture that saves less than can be told apart is none."""
    assert int8_layers(assigned(ScriptedBackend(*costs(layer2=10.1e-6)))[0]) == ALL


def test_the_same_twice_is_the_same_model():
    given = [ScriptedBackend(*costs(layer2=30e-6), losing("/layer4")) for _ in range(2)]
    one, two = (assigned(backend)[0] for backend in given)
    assert one.digest() == two.digest()


@settings(max_examples=8)
@given(st.lists(st.sampled_from([2e-6, 30e-6]), min_size=5, max_size=5))
def test_the_measured_fastest_is_what_comes_out(seconds):
    plain, quantized = costs(**{f"layer{i}": each for i, each in enumerate(seconds)})
    backend = ScriptedBackend(plain, quantized)
    after, _ = assigned(backend)
    assert int8_layers(after) == {name for name in ALL if quantized[name] < plain[name]}


def test_a_backend_that_tells_no_costs_is_asked_by_the_whole_and_mended_by_multiplications():
    backend = ScriptedBackend(*costs(), losing("/layer1"))
    backend.profile = lambda artifact: []
    assert int8_layers(assigned(backend)[0]) == ALL - {"/layer1"}


# The budget -----------------------------------------------------------------------------------------------------------


def test_without_anything_to_judge_by_the_fastest_stays_whole():
    backend = ScriptedBackend(*costs())
    after, changes = assigned(backend)
    assert int8_layers(after) == ALL and len(backend.judged) == 1 and len(changes) == 2


def scripted_damages(monkeypatch, bad):
    """Sensitivities by which one layer does a thousand times the others' damage."""

    def damages(twice, pairs, *others):
        return {name: 1.0 if name == f"/layer{bad}" else 1e-3 for name in pairs}

    monkeypatch.setattr(sensitivity, "damages", damages)


@pytest.mark.parametrize("bad", [0, 2, 4])
@pytest.mark.parametrize("steps", [4, 6, 8])
def test_exactly_the_bad_layer_returns_in_as_many_steps_as_said(bad, steps, monkeypatch):
    scripted_damages(monkeypatch, bad)
    backend = ScriptedBackend(*costs(), losing(f"/layer{bad}"))
    after, changes = assigned(backend, steps=steps)
    assert int8_layers(after) == ALL - {f"/layer{bad}"}
    assert 1 <= len(backend.judged) <= 1 + steps and backend.judged[0] == ALL
    assert backend.told == [f"assign-precision: judging, step {n} of {steps}" for n in range(1, steps + 1)]
    assert changes[-1] == f"1 more stay for accuracy: all together lose 0.20; found in {steps} steps"


def test_where_nothing_holds_the_model_stays_as_it_is():
    before = chain()
    backend = ScriptedBackend(*costs(), losing(*ALL))
    after, changes = assigned(backend, before)
    assert after is before and changes[0].startswith("left in floating point: 5 more stay for accuracy")


def test_a_judge_that_fails_leaves_the_best_so_far(monkeypatch):
    scripted_damages(monkeypatch, 2)

    def loses(layers):
        if len(backend.judged) == 4:
            raise BackendError("out of memory")
        return losing("/layer2")(layers)

    backend = ScriptedBackend(*costs(), loses)
    after, changes = assigned(backend)
    assert len(backend.judged) == 4 and int8_layers(after) == ALL - {"/layer2"}
    assert "out of memory" in changes[-1]


def test_out_of_time_stops_with_what_there_is():
    before = chain()
    backend = ScriptedBackend(*costs(), losing("/layer2"))
    given = backend.context(before, deadline=time.monotonic() - 1)
    after, changes = assigned(backend, before, given)
    assert after is before and len(backend.judged) == 1 and "out of time after 0 of 6 steps" in changes[0]
    fine = ScriptedBackend(*costs(), lambda layers: Loss(0.0, True))
    kept, _ = assigned(fine, before, fine.context(before, deadline=time.monotonic() - 1))
    assert int8_layers(kept) == ALL


def test_without_torch_layers_count_alike(monkeypatch):
    backend = ScriptedBackend(*costs(), lambda layers: Loss(0.1, len(layers) <= 3))
    before = chain()
    given = backend.context(before)
    monkeypatch.setitem(sys.modules, "torch", None)
    after, _ = assigned(backend, before, given)
    assert len(int8_layers(after)) == 3


# What it is asked of --------------------------------------------------------------------------------------------------


def test_asks_for_int8_for_something_to_quantize_and_for_a_model_that_is_not_quantized_yet():
    made_by, before = AssignPrecision(), chain()
    assert ask(made_by, before) == []
    assert ask(made_by, before, context(styles=())) == ["this backend has no int8 arithmetic"]
    weights_only = replace(SYMMETRIC, activation_type="float")
    assert ask(made_by, before, context(styles=(weights_only,))) == ["this backend has no int8 arithmetic"]
    (reason,) = ask(made_by, assigned(ScriptedBackend(*costs()))[0])
    assert reason.startswith("the model is quantized already: 10 DequantizeLinear")
    plain = build([node("Relu", "x", "y")], "x:float32[batch,4]", "y:float32[batch,4]")
    assert ask(made_by, plain) == ["no convolution or matrix product to quantize"]


@pytest.mark.parametrize("made", [conv_net, mlp, transformer], ids=lambda f: f.__name__)
def test_nets_of_every_form_are_mended(made):
    artifact = with_names(made(), Step("name"))
    names = [product.node.name for product in products(artifact.model.graph)]
    plain = dict.fromkeys(names, 10e-6)
    bad = names[-1]
    backend = ScriptedBackend(plain, dict.fromkeys(names, 5e-6), losing(bad))
    after, _ = assigned(backend, artifact)
    assert bad not in int8_layers(after)
    assert np.isfinite(outputs(after, feed(artifact))["y"]).all()


def test_fewer_layers_may_read_what_all_read_through_a_pooling():
    """Quantized, both read the pooling's input; one alone reads what it gives, whose range nobody looked at."""
    nodes = [
        node("Relu", "x", "r", name="/relu"),
        node("MaxPool", "r", "p", name="/pool", kernel_shape=[2, 2]),
        node("Conv", "p w", "a", name="/one"), node("Conv", "p v", "b", name="/two"),
    ]  # fmt: skip
    weights = {"w": weight(4, 3, 1, 1), "v": weight(4, 3, 1, 1, seed=1)}
    spec = "float32[batch,4,7,7]"
    inner = "r:float32[batch,3,8,8] p:float32[batch,3,7,7]"
    net = build(nodes, "x:float32[batch,3,8,8]", f"a:{spec} b:{spec}", weights, inner=inner)
    batch = feed(net, items=8)
    wish = Wish(SYMMETRIC, ranges="minmax")
    whole = quantize(net, context([batch], execute=executed), wish)
    one = whole.only(wish, ["/one"])
    assert int8_layers(one) == {"/one"}
    found, wanted, all_found = (outputs(each, batch) for each in (one, net, whole.artifact))
    np.testing.assert_array_equal(found["b"], wanted["b"])
    np.testing.assert_allclose(found["a"], all_found["a"], atol=1e-6)


# A net that int8 ruins ------------------------------------------------------------------------------------------------


@cache
def digits():
    """A depthwise-separable net trained on scikit-learn's digits whose channels differ by 1,000×; samples to calibrate on;
    images and labels that it has not seen."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1)]
    for channels in (16, 24):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.Conv2d(channels, 24, 1)]
    head = nn.Linear(24 * 4, 10)
    steps = [step for layer in layers for step in (layer, nn.ReLU())]
    net = nn.Sequential(*steps, nn.MaxPool2d(4), nn.Flatten(), head)
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    x, y = torch.from_numpy(images[:1200]), torch.from_numpy(labels[:1200])
    for epoch in range(10):
        for rows in torch.randperm(1200, generator=torch.Generator().manual_seed(epoch)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    # What a ReLU passes on may be scaled channel by channel, and the next layer scale it back: the same net.
    random = np.random.default_rng(1)
    with torch.no_grad():
        for depthwise, pointwise in zip(layers[1::2], layers[2::2], strict=True):
            scales = torch.from_numpy(np.float32(10 ** random.uniform(-3, 0, depthwise.out_channels)))
            depthwise.weight *= scales.reshape(-1, 1, 1, 1)
            depthwise.bias *= scales
            pointwise.weight /= scales.reshape(1, -1, 1, 1)
    nodes, weights, inner, at = [], {}, [], "x"
    for number, layer in enumerate(layers):
        weights |= {f"w{number}": layer.weight.detach().numpy(), f"b{number}": layer.bias.detach().numpy()}
        pads = [layer.padding[0]] * 4
        inputs = f"{at} w{number} b{number}"
        nodes.append(node("Conv", inputs, f"c{number}", name=f"/conv{number}", pads=pads, group=layer.groups))
        nodes.append(node("Relu", f"c{number}", f"r{number}", name=f"/relu{number}"))
        inner += [f"{v}{number}:float32[batch,{layer.out_channels},8,8]" for v in "cr"]
        at = f"r{number}"
    weights |= {"w": head.weight.detach().numpy(), "b": head.bias.detach().numpy()}
    nodes += [
        node("MaxPool", at, "p", name="/pool", kernel_shape=[4, 4], strides=[4, 4]),
        node("Flatten", "p", "f", name="/flatten"), node("Gemm", "f w b", "y", name="/head", transB=1),
    ]  # fmt: skip
    inner += ["p:float32[batch,24,2,2]", "f:float32[batch,96]"]
    made = build(nodes, "x:float32[batch,1,8,8]", "y:float32[batch,10]", weights, inner=" ".join(inner))
    return made, Samples([{"x": images[:300]}]), images[1200:], labels[1200:]


def accuracy(artifact):
    _, _, images, labels = digits()
    return float(np.mean(outputs(artifact, {"x": images})["y"].argmax(axis=1) == labels))


def reference_judged_backend(net, style):
    """Accuracy is real, one point may be lost; a layer in int8 costs half, by count of layers."""
    names = [product.node.name for product in products(net.model.graph)]
    exact = accuracy(net)

    def judge(artifact):
        drop = exact - accuracy(artifact)
        return Loss(drop, drop <= 0.01)

    return context(
        digits()[1], styles=(style,), execute=executed, judge=judge, profile=lambda artifact: [],
        measure=lambda artifacts: [len(names) - len(int8_layers(one)) / 2 for one in artifacts],
    )  # fmt: skip


def test_naive_int8_ruins_the_digits():
    net, samples, _, _ = digits()
    assert accuracy(net) > 0.9
    naive = Wish(PER_TENSOR, ranges="minmax", strength=0.0, bias_correction=False)
    made = quantize(net, context(samples, styles=(PER_TENSOR,), execute=executed), naive)
    assert accuracy(made.artifact) < accuracy(net) - 0.1


@pytest.mark.parametrize("style", [PER_TENSOR, SYMMETRIC], ids=["tensor", "channel"])
def test_the_digits_are_repaired_within_one_point(style):
    net = digits()[0]
    after, _ = AssignPrecision().run(net, reference_judged_backend(net, style))
    assert accuracy(after) >= accuracy(net) - 0.01
    assert len(int8_layers(after)) > 0
