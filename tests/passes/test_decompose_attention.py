"""`decompose-attention`: one operator taken apart, pieces put in the order that compilers know, and what is left."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import ask, build, context, feed, node, outputs, run_twice

from perwatt.contract import Capabilities
from perwatt.drift import drift
from perwatt.passes.decompose_attention import DecomposeAttention

S, T, D, HEADS = 5, 7, 8, 4
SPECS = "q:float32[batch,4,5,8] k:float32[batch,4,{t},8] v:float32[batch,4,{t},6]"


def whole(mask="", causal=0, keys=T, **attributes):
    """One Attention; `mask`: the spec of its fourth input."""
    inputs = "q k v mask" if mask else "q k v"
    attributes |= {"is_causal": 1} if causal else {}
    specs = f"{SPECS.format(t=keys)} {mask}"
    return build([node("Attention", inputs, "y", **attributes)], specs, "y:float32[batch,4,5,6]")


def pieces(scaled="both", perm=(0, 2, 3, 1), twice=False, softmax=True):
    """Scores from keys as [batch, keys, heads, depth], then the softmax and the values."""
    nodes, left, right = [], "q", "kt"
    if twice:
        nodes += [node("Transpose", "k", "k4", perm=[0, 2, 1, 3]), node("Transpose", "k4", "kt", perm=[0, 1, 3, 2])]
    else:
        nodes.append(node("Transpose", "k", "kt", perm=list(perm)))
    if scaled in ("both", "query"):
        nodes.append(node("Mul", "q root", "qs"))
        left = "qs"
    if scaled in ("both", "key"):
        nodes.append(node("Div", "kt inverse", "ks"))
        right = "ks"
    nodes += [
        node("MatMul", f"{left} {right}", "s"),
        node("Softmax" if softmax else "Relu", "s", "p"),
        node("MatMul", "p v", "y"),
    ]
    weights = {"root": np.float32(0.6), "inverse": np.float32(1 / 0.6)}
    used = {name: array for name, array in weights.items() if any(name in each.input for each in nodes)}
    specs = "q:float32[batch,4,5,8] k:float32[batch,7,4,8] v:float32[batch,4,7,6]"
    inner = "kt:float32[batch,4,8,7]" + (" k4:float32[batch,4,7,8]" if twice else "")
    return build(nodes, specs, "y:float32[batch,4,5,6]", used, inner=inner)


def fed(artifact, items):
    batch = feed(artifact, items)
    if "mask" in batch:
        shape = batch["mask"].shape
        random = np.random.default_rng(items)
        batch["mask"] = (
            random.random(shape) < 0.5
            if batch["mask"].dtype == bool
            else random.standard_normal(shape).astype(np.float32)
        )
        if batch["mask"].dtype == bool:
            batch["mask"][..., 0] = True
    return batch


def apart(artifact):
    after, changes = run_twice(DecomposeAttention(), artifact)
    assert changes == ["1 attentions written out"], changes
    for items in (1, 3):
        batch = fed(artifact, items)
        told = drift([outputs(artifact, batch)], [outputs(after, batch)], DecomposeAttention.tolerance)
        assert not told.reasons, told.reasons
    return after, changes


def left(artifact, reason):
    after, changes = run_twice(DecomposeAttention(), artifact)
    assert after is artifact
    assert changes == ([f"1 left: {reason}"] if reason else [])


def test_an_attention_of_torch(golden_pass):
    before = whole("mask:bool[batch,1,5,7]", scale=0.25)
    after, changes = apart(before)
    golden_pass("decompose_attention", before, after, changes)


@given(
    mask=st.sampled_from(["", "bool[batch,1,5,7]", "bool[1,4,5,7]", "float32[batch,1,5,7]", "float32[5,7]"]),
    scale=st.sampled_from([None, 0.3, 1.0]),
)  # fmt: skip
def test_masks_and_factors(mask, scale):
    after, _ = apart(whole(f"mask:{mask}" if mask else "", **({"scale": scale} if scale else {})))
    counts = after.operator_counts()
    assert (counts["MatMul"], counts["Softmax"], counts["Transpose"], counts.get("Mul", 0)) == (
        2,
        1,
        1,
        int(scale != 1.0),
    )


@pytest.mark.parametrize("mask", ["", "mask:bool[batch,1,5,5]", "mask:float32[batch,1,5,5]"])
def test_a_triangle(mask):
    after, _ = apart(whole(mask, causal=1, keys=S))
    assert after.operator_counts()["Add"] == (2 if mask else 1)


def test_rows_in_which_everything_is_masked_become_the_mean():
    before = whole("mask:bool[batch,1,5,7]")
    after, _ = apart(before)
    batch = fed(before, 2)
    batch["mask"][0, 0, 2] = False
    now, was = outputs(after, batch)["y"], outputs(before, batch)["y"]
    np.testing.assert_allclose(now[0, :, 2], batch["v"][0].mean(1), atol=1e-5)
    assert (was[0, :, 2] == 0).all()
    was[0, :, 2] = now[0, :, 2]
    np.testing.assert_allclose(now, was, atol=1e-5)


def test_a_fed_mask_of_infinities_makes_no_nan():
    before = whole("mask:float32[batch,1,5,7]")
    after, _ = apart(before)
    batch = fed(before, 2)
    batch["mask"][0, 0, 2] = -np.inf
    batch["mask"][1, 0, :, 3:] = -np.inf
    now, was = outputs(after, batch)["y"], outputs(before, batch)["y"]
    assert np.isfinite(now).all()
    np.testing.assert_allclose(now[1], was[1], atol=1e-5)


@pytest.mark.parametrize("scaled", ["both", "query", "key", "nowhere"])
def test_pieces_in_another_order(scaled):
    after, _ = apart(pieces(scaled))
    counts = after.operator_counts()
    assert counts["Transpose"] == 2
    assert counts.get("Mul", 0) == (0 if scaled == "nowhere" else 1)
    assert "Div" not in counts
    last = next(each for each in after.model.graph if each.op_type == "MatMul").inputs[1].producer()
    assert last.attributes.get_ints("perm") == (0, 1, 3, 2)


def test_pieces_in_order_but_scaled_before():
    after, _ = apart(pieces("query", twice=True))
    assert after.operator_counts() == {"Transpose": 2, "MatMul": 2, "Mul": 1, "Softmax": 1}


def test_pieces_in_order_stay():
    left(pieces("nowhere", twice=True), None)


def test_a_product_without_softmax_stays():
    left(pieces(softmax=False), None)


@pytest.mark.parametrize(
    ("specs", "attributes", "reason"),
    [
        ("q:float32[batch,4,5,8] k:float32[batch,2,7,8] v:float32[batch,2,7,6]", {},
         "its keys and values are shared by groups of queries"),
        (SPECS.format(t=T), {"softcap": 2.0}, "it has a soft cap, a cache, or another result"),
        (SPECS.format(t=T), {"is_causal": 1}, "its triangle would be of unknown size, or too large to store"),
        ("q:float32[batch,4,words,8] k:float32[batch,4,words,8] v:float32[batch,4,words,6]", {"is_causal": 1},
         "its triangle would be of unknown size, or too large to store"),
        ("q:float32[batch,5,32] k:float32[batch,7,32] v:float32[batch,7,32]", {"q_num_heads": 4, "kv_num_heads": 4},
         "the shapes of its queries, keys or values aren't known, or have other than four axes"),
    ],
)  # fmt: skip
def test_what_is_left(specs, attributes, reason):
    axes = specs.split()[0].count(",") + 1
    shape = "?,?,?,?" if axes == 4 else "?,?,?"
    left(build([node("Attention", "q k v", "y", **attributes)], specs, f"y:float32[{shape}]"), reason)


def test_only_for_backends_that_take_others_whole():
    def told(*operators):
        able = replace(context(), capabilities=Capabilities(operators=operators))
        return ask(DecomposeAttention(), whole(), able)

    assert told() == ["this backend doesn't say which operators it takes whole"]
    assert told("Attention", "Swish") == ["this backend runs Attention as one operator"]
    assert told("Swish") == []


@pytest.mark.parametrize("mask", ["", "mask:bool[batch,1,5,7]", "mask:float32[batch,1,5,7]"])
def test_openvino_sees_the_same(mask):
    openvino = pytest.importorskip("openvino")
    before = whole(mask)
    after, _ = apart(before)
    core = openvino.Core()
    batch = fed(before, 2)
    model = core.read_model(ir.to_proto(after.model).SerializeToString())
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled(batch)[0], outputs(before, batch)["y"], atol=2e-5)
