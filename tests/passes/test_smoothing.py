"""Smoothing: the same outputs, even peaks, one division for all who read the value."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node, outputs, weight

from perwatt.artifact import Artifact, Step
from perwatt.fusion import names_in
from perwatt.passes._placement import products
from perwatt.passes._smoothing import smooth


def two_products(spread=100.0, opset=23):
    """x · a and x · b, summed; the channels of x are `spread` apart. With the outputs' exact values."""
    nodes = [node("Mul", "x far", "h"), node("MatMul", "h a", "p"), node("MatMul", "h b", "q"), node("Add", "p q", "y")]
    far = np.geomspace(1, spread, 6).astype(np.float32)
    weights = {"far": far, "a": weight(6, 5), "b": weight(6, 5, seed=1)}
    spec = "float32[batch,3,5]"
    return build(
        nodes,
        "x:float32[batch,3,6]",
        f"y:{spec}",
        weights,
        inner=f"h:float32[batch,3,6] p:{spec} q:{spec}",
        opset=opset,
    )


def smoothed(artifact, peaks, strength=0.5):
    """(result, how many inputs): checked, the input untouched."""
    digest = artifact.digest()
    model = artifact.edit()
    done = smooth(model, products(model.graph), peaks, strength, names_in(model))
    after = artifact.after(model, Step("smooth"))
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    assert Artifact(model=artifact.model).digest() == digest
    return after, done


def peaks_of(artifact, batch, name):
    tapped = artifact.edit()
    value = next(v for n in tapped.graph for v in n.outputs if v.name == name)
    tapped.graph.outputs.append(value)
    made = outputs(artifact.after(tapped, Step("tap")), batch)[name]
    return np.abs(made).reshape(-1, made.shape[-1]).max(axis=0)


@given(
    strength=st.sampled_from([0.0, 0.3, 0.5, 0.85, 1.0]),
    spread=st.sampled_from([1.0, 100.0, 1e6]),
    opset=st.sampled_from([13, 24]),
)
def test_outputs_are_the_same_and_one_division_serves_all(strength, spread, opset):
    before = two_products(spread, opset)
    batch = feed(before, items=8)
    after, done = smoothed(before, {"h": peaks_of(before, batch, "h")}, strength)
    assert done == 1 and after.operator_counts()["Mul"] == 2
    old, new = outputs(before, batch)["y"], outputs(after, batch)["y"]
    # Sums of terms as large as the largest channel's.
    assert np.abs(old - new).max() <= 1e-5 * np.abs(old).max()


def peaks_after(after, batch):
    node_ = next(n for n in after.model.graph if n.op_type == "MatMul")
    held = [n.inputs[1].const_value.numpy() for n in after.model.graph if n.op_type == "MatMul"]
    assert len({id(n.inputs[0]) for n in after.model.graph if n.op_type == "MatMul"}) == 1
    return peaks_of(after, batch, node_.inputs[0].name), np.abs(np.stack(held)).max(axis=(0, 2))


def test_at_half_strength_peaks_of_inputs_and_weights_are_equal_channel_by_channel():
    before = two_products()
    batch = feed(before, items=8)
    inputs, weights = peaks_after(smoothed(before, {"h": peaks_of(before, batch, "h")}, 0.5)[0], batch)
    assert np.allclose(inputs, weights, rtol=1e-4)


def test_at_full_strength_all_channels_of_the_input_are_alike():
    before = two_products()
    batch = feed(before, items=8)
    inputs, _ = peaks_after(smoothed(before, {"h": peaks_of(before, batch, "h")}, 1.0)[0], batch)
    assert np.allclose(inputs, 1, rtol=1e-4)


def test_channels_without_anything_in_them_stay_finite():
    before = two_products()
    for peaks in ([0, 1, 2, 0, 5, 1e4], [0, 0, 0, 0, 0, 1e-30]):
        batch = feed(before, items=8)
        after, done = smoothed(before, {"h": np.float32(peaks)}, 0.85)
        old, new = outputs(before, batch)["y"], outputs(after, batch)["y"]
        assert done == 1 and np.isfinite(new).all() and np.allclose(old, new, rtol=1e-3, atol=1e-3 * np.abs(old).max())


@pytest.mark.parametrize("peaks", [[0] * 6, [np.nan] * 6, [1, 1, np.inf, 1, 1, 1], [1.0], 3.0])
def test_peaks_that_say_nothing_leave_the_model_as_it_was(peaks):
    before = two_products()
    after, done = smoothed(before, {"h": np.array(peaks, np.float32)})
    assert done == 0 and after.digest() == before.digest()


def test_a_graph_input_a_vector_and_a_shared_weight_can_be_smoothed():
    nodes = [node("MatMul", "x w", "p"), node("MatMul", "z w", "q"), node("Add", "p q", "y")]
    before = build(
        nodes, "x:float32[6] z:float32[6]", "y:float32[3]", {"w": weight(6, 3)}, inner="p:float32[3] q:float32[3]"
    )
    batch = {"x": np.float32([100, 1, -2, 3, 1, 1]), "z": np.float32([1, 1, -2, 300, 1, 1])}
    after, done = smoothed(before, {name: np.abs(array) for name, array in batch.items()})
    assert done == 2 and np.allclose(outputs(before, batch)["y"], outputs(after, batch)["y"], rtol=1e-4)


def test_others_who_read_the_value_read_it_as_it_was():
    nodes = [node("Relu", "x", "r"), node("MatMul", "r w", "m"), node("Add", "m r", "y")]
    spec = "float32[batch,6]"
    before = build(nodes, f"x:{spec}", f"y:{spec}", {"w": weight(6, 6)}, inner=f"r:{spec} m:{spec}")
    after, _ = smoothed(before, {"r": np.geomspace(1, 1e3, 6)})
    add = next(n for n in after.model.graph if n.op_type == "Add")
    assert add.inputs[1].name == "r"
    batch = feed(before, items=8)
    assert np.allclose(outputs(before, batch)["y"], outputs(after, batch)["y"], atol=1e-5)


def test_other_products_stay():
    nodes = [node("Gemm", "x w", "h"), node("MatMul", "h h2", "y")]
    before = build(
        nodes,
        "x:float32[batch,6] h2:float32[4,3]",
        "y:float32[batch,3]",
        {"w": weight(6, 4)},
        inner="h:float32[batch,4]",
    )
    model = before.edit()
    chosen = [product for product in products(model.graph) if product.kind == "Gemm"]
    assert smooth(model, chosen, {"x": np.ones(6)}, 0.5, names_in(model)) == 0
