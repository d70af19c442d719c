"""`fuse-attention`: every usual way to write it, heads and batch on all axes, and what only looks like one."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from attentions import (
    HEADS,
    LOWEST,
    MASKS,
    TRIANGLE,
    D,
    E,
    Net,
    S,
    T,
    attention_of,
    fed,
    finished,
    fused,
    left,
    masked,
    repeated,
    scored,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st
from models import ask, build, context, node, outputs, run_twice

from perwatt.contract import Capabilities
from perwatt.passes.fuse_attention import FuseAttention

# Products and factors -------------------------------------------------------------------------------------------------


def test_the_form_of_transformers(golden_pass):
    net = Net()
    scores, v = scored(net)
    mask = net.feed("mask", "batch", 1, S, T, dtype="bool")
    chosen = net.put("Where", f"{mask} {net.keep(np.float32(0))} {net.keep(np.float32(LOWEST))}")
    before = finished(net, net.put("Add", f"{scores} {chosen}"), v)
    after, changes = fused(before)
    golden_pass("fuse_attention", before, after, changes)
    assert after.operator_counts() == {"Transpose": 1, "Where": 1, "Attention": 1}


@given(
    turned=st.sampled_from(["once", "twice", "plain", "already"]),
    scaled=st.sampled_from(["scores", "divided", "query", "key", "both", "nowhere"]),
    guard=st.booleans(), cast=st.booleans(),
)  # fmt: skip
def test_factors_and_transposes_wherever_they_are(turned, scaled, guard, cast):
    net = Net()
    scores, v = scored(net, turned, scaled)
    after, _ = fused(finished(net, scores, v, guard, cast=cast))
    scale = attention_of(after).attributes.get_float("scale", 0.0)
    assert scale == pytest.approx(1.0 if scaled == "nowhere" else 0.3)
    assert after.operator_counts().get("Transpose", 0) == (0 if turned == "plain" else 1)


def test_a_factor_that_is_computed_goes_to_the_queries():
    net = Net()
    scores, v = scored(net, scaled="nowhere")
    temperature = net.feed("temperature", HEADS, 1, 1)
    after, _ = fused(finished(net, net.put("Mul", f"{scores} {temperature}"), v))
    assert after.operator_counts() == {"Transpose": 1, "Mul": 1, "Attention": 1}


def test_a_factor_for_each_key_stays():
    net = Net()
    scores, v = scored(net, scaled="nowhere")
    temperature = net.feed("temperature", HEADS, 1, T)
    left(finished(net, net.put("Mul", f"{scores} {temperature}"), v), "something that queries can't be scaled by")


@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_a_soft_cap(cap):
    net = Net()
    scores, v = scored(net)
    bounded = net.put("Tanh", net.put("Div", f"{scores} {net.keep(np.float32(cap))}"))
    capped = net.put("Mul", f"{bounded} {net.keep(np.float32(cap))}")
    mask = net.feed("mask", "batch", 1, S, T)
    after, _ = fused(finished(net, net.put("Add", f"{capped} {mask}"), v))
    assert attention_of(after).attributes.get_float("softcap", 0.0) == pytest.approx(cap)


def test_a_mask_inside_the_cap_stays():
    net = Net()
    scores, v = scored(net)
    masked = net.put("Add", f"{scores} {net.feed('mask', 'batch', 1, S, T)}")
    bounded = net.put("Tanh", net.put("Div", f"{masked} {net.keep(np.float32(2))}"))
    left(finished(net, net.put("Mul", f"{bounded} {net.keep(np.float32(2))}"), v), "scaled, or bounded")


def test_a_mask_that_is_scaled_with_the_scores_stays():
    net = Net()
    scores, v = scored(net, scaled="nowhere")
    masked = net.put("Add", f"{scores} {net.feed('mask', 'batch', 1, S, T)}")
    left(finished(net, net.put("Mul", f"{masked} {net.keep(np.float32(0.3))}"), v), "scaled, or bounded")


def test_a_negative_factor_stays():
    net = Net()
    scores, v = scored(net, scaled="nowhere")
    left(finished(net, net.put("Mul", f"{scores} {net.keep(np.float32(-0.3))}"), v), "scaled by -0.3")


def test_one_head_of_three_axes():
    net = Net()
    q, k, v = net.feed("q", "batch", S, D), net.feed("k", "batch", T, D), net.feed("v", "batch", T, E)
    scores = net.put("MatMul", f"{q} {net.put('Transpose', k, perm=[0, 2, 1])}")
    masked = net.put("Add", f"{scores} {net.feed('mask', 'batch', 1, T)}")
    weights = net.put("Softmax", masked, axis=2)
    after, _ = fused(net.built(net.put("MatMul", f"{weights} {v}"), ("batch", S, E)))
    assert after.operator_counts() == {"Max": 1, "Unsqueeze": 1, "Expand": 1, "Attention": 1}


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_types(dtype):
    net = Net(dtype)
    scores, v = scored(net)
    masked = net.put("Add", f"{scores} {net.feed('mask', 'batch', 1, S, T)}")
    before = finished(net, masked, v)
    after, _ = run_twice(FuseAttention(), before)
    batch = fed(before)
    got, want = (outputs(each, batch)["y"].astype(np.float64) for each in (after, before))
    assert after.operator_counts()["Attention"] == 1
    np.testing.assert_allclose(got, want, atol=4e-3 if dtype == "float16" else 1e-6)


def test_softmax_in_float32_of_scores_in_float16():
    net = Net("float16")
    scores, v = scored(net)
    weights = net.put("Softmax", net.put("Cast", scores, to=1), axis=-1)
    before = net.built(net.put("MatMul", f"{net.put('Cast', weights, to=10)} {v}"), ("batch", HEADS, S, E))
    after, _ = run_twice(FuseAttention(), before)
    assert attention_of(after).attributes.get_int("softmax_precision", 0) == 1
    batch = fed(before)
    np.testing.assert_allclose(outputs(after, batch)["y"], outputs(before, batch)["y"], atol=4e-3)


# Heads and batch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["expand", "tile", "gather", "heads last"])
def test_repeated_heads_are_grouped_queries(way):
    net = Net()
    q = net.feed("q", "batch", HEADS, S, D)
    k, v = repeated(net, "k", ("batch", 2, T, D), way, D), repeated(net, "v", ("batch", 2, T, E), way, E)
    scores = net.put("MatMul", f"{q} {net.put('Transpose', k, perm=[0, 1, 3, 2])}")
    last = net.put("MatMul", f"{net.put('Softmax', scores, axis=-1)} {v}")
    after, _ = fused(net.built(last, ("batch", HEADS, S, E)))
    assert after.operator_counts() == {"Attention": 1, **({"Transpose": 2} if way == "heads last" else {})}


def test_an_attention_that_is_there_already_loses_copies():
    net = Net()
    q = net.put("Mul", f"{net.feed('q', 'batch', HEADS, S, D)} {net.keep(np.float32(0.5))}")
    k, v = repeated(net, "k", ("batch", 2, T, D), "expand", D), repeated(net, "v", ("batch", 2, T, E), "expand", E)
    mask = net.feed("mask", "batch", 1, S, T, dtype="bool")
    after, _ = fused(net.built(net.put("Attention", f"{q} {k} {v} {mask}", scale=0.6), ("batch", HEADS, S, E)))
    assert after.operator_counts() == {"Attention": 1}
    assert attention_of(after).attributes.get_float("scale", 0.0) == pytest.approx(0.3)


@pytest.mark.parametrize("what", ["order", "keys only"])
def test_copies_in_another_order_stay(what):
    net = Net()
    q = net.feed("q", "batch", HEADS, S, D)
    picks = net.keep(np.int64([0, 1, 0, 1] if what == "order" else [0, 0, 1, 1]))
    k = net.put("Gather", f"{net.feed('k', 'batch', 2, T, D)} {picks}", axis=1)
    v = (
        net.put("Gather", f"{net.feed('v', 'batch', 2, T, E)} {picks}", axis=1)
        if what == "order"
        else net.feed("v", "batch", HEADS, T, E)
    )
    before = net.built(net.put("Attention", f"{q} {k} {v}"), ("batch", HEADS, S, E))
    after, changes = run_twice(FuseAttention(), before)
    assert after is before
    assert changes == []


@pytest.mark.parametrize(("mask", "inputs", "causal"), [("all", 3, 0), ("triangle", 3, 1), ("other", 4, 0)])
def test_the_mask_of_an_attention_that_is_there_already(mask, inputs, causal):
    net = Net()
    q, k, v = (
        net.feed("q", "batch", HEADS, S, D),
        net.feed("k", "batch", HEADS, S, D),
        net.feed("v", "batch", HEADS, S, E),
    )
    keep = {"all": np.ones((S, S), bool), "triangle": TRIANGLE, "other": TRIANGLE.T}[mask]
    before = net.built(net.put("Attention", f"{q} {k} {v} {net.keep(keep)}"), ("batch", HEADS, S, E))
    after, _ = fused(before)
    assert len(attention_of(after).inputs) == inputs
    assert attention_of(after).attributes.get_int("is_causal", 0) == causal
    assert (after is before) == (mask == "other")


def test_one_head_of_keys_for_all_queries():
    net = Net()
    scores, v = scored(net, kv=1)
    after, _ = fused(finished(net, scores, v))
    assert after.operator_counts() == {"Transpose": 1, "Attention": 1}


def windowed(windows, mask_axes=(1, None, 1)):
    """Swin's: [batch·windows, heads, S, S] with a bias for each head, regrouped, with a mask for each window."""
    net = Net()
    q, k, v = (net.feed(name, "all", HEADS, S, D) for name in "qkv")
    scores = net.put("MatMul", f"{q} {net.put('Transpose', k, perm=[0, 1, 3, 2])}")
    random = np.random.default_rng(1)
    scores = net.put("Add", f"{scores} {net.keep(random.standard_normal((1, HEADS, S, S)).astype(np.float32))}")
    apart = net.put("Reshape", f"{scores} {net.keep(np.int64([-1, windows, HEADS, S, S]))}")
    hidden = np.where(random.random((1, windows, 1, S, S)) < 0.4, -100, 0).astype(np.float32)
    apart = net.put("Add", f"{apart} {net.keep(hidden)}")
    together = net.put("Reshape", f"{apart} {net.keep(np.int64([-1, HEADS, S, S]))}")
    return net.built(net.put("MatMul", f"{net.put('Softmax', together, axis=-1)} {v}"), ("all", HEADS, S, D))


@pytest.mark.parametrize("windows", [2, 3])
def test_windows_become_heads(windows):
    before = windowed(windows)
    random = np.random.default_rng(0)
    feeds = [{n: random.standard_normal((windows * b, HEADS, S, D)).astype(np.float32) for n in "qkv"} for b in (1, 3)]
    after, _ = fused(before, feeds=feeds)
    assert after.operator_counts() == {"Reshape": 4, "Attention": 1}


def test_batch_and_heads_in_one_axis():
    net = Net()
    q, k, v = net.feed("q", "all", S, D), net.feed("k", "all", T, D), net.feed("v", "all", T, E)
    scores = net.put("MatMul", f"{q} {net.put('Transpose', k, perm=[0, 2, 1])}")
    apart = net.put("Reshape", f"{scores} {net.keep(np.int64([-1, HEADS, S, T]))}")
    apart = net.put(
        "Add", f"{apart} {net.keep(np.random.default_rng(1).standard_normal((HEADS, 1, T)).astype(np.float32))}"
    )
    together = net.put("Reshape", f"{apart} {net.keep(np.int64([-1, S, T]))}")
    before = net.built(net.put("MatMul", f"{net.put('Softmax', together, axis=-1)} {v}"), ("all", S, E))
    random = np.random.default_rng(0)
    sizes = {"q": (S, D), "k": (T, D), "v": (T, E)}
    feeds = [{n: random.standard_normal((HEADS * b, *s)).astype(np.float32) for n, s in sizes.items()} for b in (1, 3)]
    after, _ = fused(before, feeds=feeds)
    assert after.operator_counts() == {"Reshape": 4, "Attention": 1}


# What stays -----------------------------------------------------------------------------------------------------------


def test_keys_of_another_batch_stay():
    net = Net()
    q, k = net.feed("q", 1, HEADS, S, D), net.feed("k", "batch", HEADS, D, T)
    weights = net.put("Softmax", net.put("MatMul", f"{q} {k}"), axis=-1)
    before = net.built(net.put("MatMul", f"{weights} {net.feed('v', 'batch', HEADS, T, E)}"), ("batch", HEADS, S, E))
    left(before, "may differ in their batch")


def test_scores_that_are_wanted_too_stay():
    net = Net()
    scores, v = scored(net)
    weights = net.put("Softmax", scores, axis=-1)
    twice = net.put("Add", f"{net.put('MatMul', f'{weights} {v}')} {net.put('ReduceSum', weights, keepdims=1)}")
    left(net.built(twice, ("batch", HEADS, S, E)), "used elsewhere")


def test_another_axis_stays():
    net = Net()
    scores, v = scored(net)
    after, changes = run_twice(FuseAttention(), before := net.built(
        net.put("MatMul", f"{net.put('Softmax', scores, axis=1)} {v}"), ("batch", HEADS, S, E)))  # fmt: skip
    assert after is before
    assert changes == []


def test_a_layer_is_no_attention():
    net = Net()
    layer = net.put("MatMul", f"{net.feed('x', 'batch', S, D)} {net.keep(np.ones((D, T), np.float32))}")
    last = net.put("MatMul", f"{net.put('Softmax', layer, axis=-1)} {net.feed('v', 'batch', T, E)}")
    after, changes = run_twice(FuseAttention(), before := net.built(last, ("batch", S, E)))
    assert after is before
    assert changes == []


def test_unknown_shapes_stay():
    nodes = [
        node("Neg", "v", "minus"), node("MatMul", "q k", "scores"), node("Softmax", "scores", "weights"),
        node("MatMul", "weights minus", "y"),
    ]  # fmt: skip
    inputs = "q:float32[batch,4,5,8] k:float32[batch,4,8,7] v:float32[batch,4,7,6]"
    left(build(nodes, inputs, "y:float32[batch,4,5,6]"), "aren't known")


def test_only_for_backends_that_have_it():
    net = Net()
    before = finished(net, *scored(net))
    assert ask(FuseAttention(), before) == ["this backend does not run Attention as one operator"]
    able = replace(context(), capabilities=Capabilities(operators=("Attention",)))
    assert ask(FuseAttention(), before, able) == []


# OpenVINO -------------------------------------------------------------------------------------------------------------


def by_openvino(artifact, batch):
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    model = core.read_model(ir.to_proto(artifact.model).SerializeToString())
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(batch)[0]


@pytest.mark.parametrize("form", ["none", "bool", "float", "causal", "grouped", "one head", "keys", "dead rows"])
def test_openvino_takes_what_is_put_in(form):
    net = Net()
    if form == "grouped":
        q = net.feed("q", "batch", HEADS, S, D)
        k, v = repeated(net, "k", ("batch", 2, T, D), "expand", D), repeated(net, "v", ("batch", 2, T, E), "expand", E)
        scores = net.put("MatMul", f"{q} {net.put('Transpose', k, perm=[0, 1, 3, 2])}")
        before = net.built(net.put("MatMul", f"{net.put('Softmax', scores, axis=-1)} {v}"), ("batch", HEADS, S, E))
    elif form == "one head":
        q, k, v = net.feed("q", "batch", S, D), net.feed("k", "batch", T, D), net.feed("v", "batch", T, E)
        scores = net.put("MatMul", f"{q} {net.put('Transpose', k, perm=[0, 2, 1])}")
        before = net.built(net.put("MatMul", f"{net.put('Softmax', scores, axis=-1)} {v}"), ("batch", S, E))
    else:
        scores, v = scored(net, keys=S if form == "causal" else T)
        if form == "causal":
            scores = net.put("Where", f"{net.keep(TRIANGLE)} {scores} {net.keep(np.float32(-np.inf))}")
        elif form != "none":
            way, shape = ("add", "items") if form == "float" else ("chosen", "keys" if form == "keys" else "items")
            low = LOWEST if form == "dead rows" else -np.inf
            scores = masked(net, scores, way, MASKS[shape], low, False, False)
        before = finished(net, scores, v)
    after, _ = fused(before)
    batch = fed(before)
    if form == "dead rows":
        batch["mask"][0, 0, 2] = False
    np.testing.assert_allclose(by_openvino(after, batch), outputs(before, batch)["y"], atol=2e-5)
