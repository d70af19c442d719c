"""Graphs that fix their batch take any once what was written down comes from the input; those that can't are found out."""

import numpy as np
import pytest
from models import build, feed, node, outputs, weight

from perwatt.batching import apart, free_batch
from perwatt.interpreter import Interpreter

PARTS = {"w": weight(4, 3, 3, 3), "m": weight(144, 5)}


def fixed(shape=(2, 144)):
    """A network for calls of two."""
    nodes = [
        node("Conv", "x w", "a"),
        node("Relu", "a", "b"),
        node("Reshape", "b flat", "c"),
        node("MatMul", "c m", "y"),
    ]
    return build(nodes, "x:float32[2,3,8,8]", "y:float32[2,5]", {**PARTS, "flat": np.array(shape)})


def calls(artifact, count):
    """Two items in each, as the graph wants them."""
    return [feed(artifact, items=2, seed=seed) for seed in range(count)]


def together(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def freed(artifact):
    model = artifact.edit()
    free_batch(artifact, model)
    return Interpreter(model)


@pytest.mark.parametrize("shape", [(2, 144), (2, -1), (-1, 144), (0, 144)])
def test_a_call_with_more_items_answers_as_several_calls_do(shape):
    artifact = fixed(shape)
    batches = calls(artifact, 3)
    found = freed(artifact).run(together(batches))["y"]
    wanted = np.concatenate([outputs(artifact, batch)["y"] for batch in batches])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_batch_that_was_merged_with_another_axis_is_free_too():
    shapes = {"flat": np.array([4, 8]), "back": np.array([2, 2, 5]), "m": weight(8, 5)}
    nodes = [node("Reshape", "x flat", "a"), node("MatMul", "a m", "b"), node("Reshape", "b back", "y")]
    artifact = build(nodes, "x:float32[2,2,8]", "y:float32[2,2,5]", shapes)
    assert freed(artifact).run(together(calls(artifact, 3)))["y"].shape == (6, 2, 5)


def test_weights_keep_their_shapes_and_the_artifact_its_graph():
    nodes = [node("Reshape", "p flat", "m"), node("MatMul", "x m", "y")]
    parts = {"p": weight(2, 4, 5), "flat": np.array([8, 5])}
    artifact = build(nodes, "x:float32[2,8]", "y:float32[2,5]", parts)
    before = artifact.digest()
    assert freed(artifact).run(together(calls(artifact, 3)))["y"].shape == (6, 5)
    assert artifact.digest() == before


def test_items_that_are_not_treated_apart_are_found_out():
    mixing = build(
        [node("ReduceMean", "x axes", "mean", keepdims=1), node("Sub", "x mean", "y")],
        "x:float32[2,5]", "y:float32[2,5]", {"axes": np.array([0])},
    )  # fmt: skip
    assert not apart(freed(mixing).run, *calls(mixing, 2))
    fine = fixed()
    assert apart(freed(fine).run, *calls(fine, 2))
    assert not apart(Interpreter(fine.edit()).run, *calls(fine, 2))
