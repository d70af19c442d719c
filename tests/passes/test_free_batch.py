"""`free-batch`: graphs for calls of one size take any, those that mix items stay, and what was noted is forgotten."""

import numpy as np
import onnx_ir as ir
import pytest
from models import ask, build, context, executed, feed, node, proto, run_twice, weight

from perwatt.artifact import Artifact
from perwatt.passes.free_batch import FreeBatch

WEIGHTS = {"w": weight(4, 3, 3, 3), "m": weight(144, 5), "flat": np.array([1, 144])}
NODES = [node("Conv", "x w", "a"), node("Relu", "a", "b"), node("Reshape", "b flat", "c"), node("MatMul", "c m", "y")]


def freed(artifact, **given):
    """The pass on samples that fit."""
    size = artifact.signature.batch
    calls = feed(artifact, items=size if isinstance(size, int) else 2)
    many = {name: np.concatenate([array, array + 1]) for name, array in calls.items()}
    return run_twice(FreeBatch(), artifact, context([many], execute=executed, **given))


def answers(artifact, batch):
    return next(iter(executed(artifact, [batch])))


def test_a_network_for_one_picture_takes_any_number(golden_pass):
    before = build(NODES, "x:float32[1,3,8,8]", "y:float32[1,5]", WEIGHTS, inner="b:float32[1,4,6,6]")
    after, changes = freed(before)
    golden_pass("free-batch", before, after, changes)
    assert after.signature.batch == "batch"
    many = feed(after, items=7)
    np.testing.assert_allclose(answers(after, many)["y"], answers(before, many)["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_calls_of_several_are_freed_too(size):
    parts = {**WEIGHTS, "flat": np.array([size, 144])}
    before = build(NODES, f"x:float32[{size},3,8,8]", f"y:float32[{size},5]", parts)
    after, _ = freed(before)
    many = feed(after, items=3 * size)
    np.testing.assert_allclose(answers(after, many)["y"], answers(before, many)["y"], rtol=1e-4, atol=1e-5)


def test_weights_that_can_be_fed_keep_their_shape():
    nodes = [node("MatMul", "x p", "a"), node("Add", "a b", "y")]
    made = proto(nodes, "x:float32[1,4] b:float32[1,5]", "y:float32[1,5]", {"p": weight(4, 5), "b": weight(1, 5)})
    after, _ = freed(Artifact(model=ir.from_proto(made)))
    assert [list(value.shape) for value in after.model.graph.inputs if value.name == "b"] == [[1, 5]]
    assert after.signature.batch == "batch"


MIXING = [node("ReduceMean", "x axes", "mean", keepdims=1), node("Sub", "x mean", "y")]
TOKEN = [node("Concat", "token x", "a", axis=1), node("Relu", "a", "y")]


@pytest.mark.parametrize(
    ("nodes", "shapes", "weights"),
    [
        (MIXING, ("x:float32[2,5]", "y:float32[2,5]"), {"axes": np.array([0])}),
        ([node("Softmax", "x", "y", axis=0)], ("x:float32[2,5]", "y:float32[2,5]"), {}),
        (TOKEN, ("x:float32[1,3,5]", "y:float32[1,4,5]"), {"token": weight(1, 1, 5)}),
    ],
    ids=["a mean over the batch", "a softmax over the batch", "a token for one item"],
)
def test_what_does_not_treat_items_apart_stays(nodes, shapes, weights):
    before = build(nodes, *shapes, weights)
    after, changes = freed(before)
    assert after is before and changes == ["its items are not treated apart, or their number is written down in it"]


def test_what_is_free_or_has_no_batch_is_refused():
    free = build([node("Relu", "x", "y")], "x:float32[batch,3]", "y:float32[batch,3]")
    assert ask(FreeBatch(), free) == ["the model takes calls of any size already"]
    none = build([node("ReduceMean", "x", "y", keepdims=0)], "x:float32[2,3]", "y:float32[]")
    assert ask(FreeBatch(), none) == ["the model has no batch axis"]


def test_one_sample_is_enough():
    before = build(NODES, "x:float32[1,3,8,8]", "y:float32[1,5]", WEIGHTS)
    after, _ = run_twice(FreeBatch(), before, context([feed(before)], execute=executed))
    assert after.signature.batch == "batch"


def test_indices_that_are_fed():
    before = build([node("Gather", "table ids", "y")], "ids:int64[1,6]", "y:float32[1,6,3]", {"table": weight(9, 3)})
    ids = {"ids": np.arange(12).reshape(2, 6) % 9}
    after, _ = run_twice(FreeBatch(), before, context([ids], execute=executed))
    assert after.signature.batch == "batch"
