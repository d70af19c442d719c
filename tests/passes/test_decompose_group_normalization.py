"""`decompose-group-normalization`: any groups and shapes, for which targets, and what is left."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import ask, build, context, feed, node, outputs, proto, run_twice, weight

from perwatt.artifact import Artifact
from perwatt.contract import Capabilities
from perwatt.drift import drift
from perwatt.passes.decompose_group_normalization import DecomposeGroupNormalization
from perwatt.passes.fuse_group_normalization import FuseGroupNormalization

PIECES = {"Reshape": 2, "InstanceNormalization": 1, "Mul": 1, "Add": 1}


def whole(channels=6, groups=2, spatial="4,5", dtype="float32", opset=23, computed=False, **attributes):
    """One GroupNormalization."""
    of = ",".join(filter(None, ["batch", str(channels), spatial]))
    nodes = [
        *([node("Relu", "γ", "factor")] if computed else []),
        node("GroupNormalization", f"x {'factor' if computed else 'γ'} β", "y", num_groups=groups, **attributes),
    ]
    per = channels if opset >= 21 else groups
    weights = {"γ": 1 + weight(per, dtype=dtype), "β": weight(per, seed=1, dtype=dtype)}
    made = proto(nodes, f"x:{dtype}[{of}]", f"y:{dtype}[{of}]", weights, opset=opset)
    import onnx_ir as ir

    return Artifact(model=ir.from_proto(made))


def apart(artifact, **sizes):
    after, changes = run_twice(DecomposeGroupNormalization(), artifact)
    batch = feed(artifact, **sizes)
    moved = drift([outputs(artifact, batch)], [outputs(after, batch)], DecomposeGroupNormalization.tolerance)
    assert not moved.reasons
    return after, changes


def test_around_an_instance_normalization(golden_pass):
    before = whole(epsilon=1e-3)
    after, changes = apart(before)
    golden_pass("decompose_group_normalization", before, after, changes)
    assert after.operator_counts() == PIECES and changes == ["1 group normalizations written out"]


@given(
    groups=st.integers(1, 4), each=st.integers(1, 3), spatial=st.lists(st.integers(2, 4), min_size=1, max_size=3),
    epsilon=st.sampled_from([1e-5, 1e-2]),
)  # fmt: skip
def test_any_groups_and_shapes_and_back(groups, each, spatial, epsilon):
    before = whole(groups * each, groups, ",".join(map(str, spatial)), epsilon=epsilon)
    after, _ = apart(before)
    assert after.operator_counts() == PIECES
    together = replace(context(), capabilities=Capabilities(operators=("GroupNormalization",)))
    back, _ = run_twice(FuseGroupNormalization(), after, together)
    assert back.operator_counts() == before.operator_counts()


@pytest.mark.parametrize(("spatial", "computed"), [("", 0), ("h", 0), ("h,5", 0), ("h,w", 1)])
def test_open_axes(spatial, computed):
    after, _ = apart(whole(spatial=spatial), h=3, w=4)
    assert after.operator_counts().get("Shape", 0) == computed


def test_shared_weights_are_stored_once():
    nodes = [
        node("GroupNormalization", "x γ β", "a", num_groups=2),
        node("GroupNormalization", "a γ β", "y", num_groups=2),
    ]
    weights = {"γ": 1 + weight(6), "β": weight(6, seed=1)}
    spec = "x:float32[batch,6,4,5]", "y:float32[batch,6,4,5]", weights
    after, changes = apart(build(nodes, *spec, inner="a:float32[batch,6,4,5]"))
    assert changes == ["2 group normalizations written out"]
    # Ones and zeros, factors and summands, two shapes.
    assert len(after.model.graph.initializers) == 6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float16"}, "its type isn't float32, or not known"),
        ({"computed": True}, "its scale or shift is computed"),
    ],
)
def test_what_is_left(options, reason):
    artifact = whole(**options)
    after, changes = run_twice(DecomposeGroupNormalization(), artifact)
    assert after is artifact and changes == [f"1 left: {reason}"]


def test_only_for_targets_that_run_others_whole_and_the_newer_meaning():
    def asked(artifact, *operators):
        capabilities = Capabilities(operators=operators)
        return ask(DecomposeGroupNormalization(), artifact, replace(context(), capabilities=capabilities))

    assert asked(whole()) == ["this backend doesn't say which operators it takes whole"]
    assert asked(whole(), "Attention") == []
    assert asked(whole(), "GroupNormalization") == ["this backend runs GroupNormalization as one operator"]
    assert asked(whole(opset=18), "Attention") == [
        "its GroupNormalization is that of opset 18, with a scale for each group"
    ]


def test_numbers_are_those_of_the_definition():
    artifact = whole(4, 2, "3")
    x = weight(2, 4, 3, seed=9).astype(np.float32)
    γ, β = (artifact.model.graph.initializers[name].const_value.numpy() for name in ("γ", "β"))
    grouped = x.reshape(2, 2, -1)
    normal = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)
    wanted = normal.reshape(x.shape) * γ[:, None] + β[:, None]
    after, _ = run_twice(DecomposeGroupNormalization(), artifact)
    np.testing.assert_allclose(outputs(after, {"x": x})["y"], wanted, rtol=1e-4, atol=1e-5)
