"""Signatures: where the batch axis is, what can be fed, how calls are cut to size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.signature import Signature, TensorSpec, inferences, rows, split


def specs(*texts):
    """`name[batch,3]` (float32), `name` for an unknown rank."""
    made = []
    for text in texts:
        name, _, dims = text.partition("[")
        shape = tuple(int(d) if d.isdigit() else d for d in dims.rstrip("]").split(",") if d) if dims else None
        made.append(TensorSpec(name, "float32", shape))
    return tuple(made)


def signature(inputs, outputs):
    return Signature(specs(*inputs), specs(*outputs))


@pytest.mark.parametrize(
    ("inputs", "outputs", "batch"),
    [
        (["x[n,3]"], ["y[n,5]"], "n"),
        (["x[1,3]"], ["y[1,5]"], 1),
        (["x[n,3]", "m[n,3]"], ["y[n,5]", "z[n]"], "n"),
        (["x[n,3]", "m[k,3]"], ["y[n,5]"], None),
        (["x[n,3]", "table[7,3]"], ["y[n,5]"], None),
        (["x[n,3]"], ["y[1,5]"], None),
        (["x[4,3]"], ["y[2,6]"], None),
        (["x[n,3]", "scale[]"], ["y[n,5]"], None),
        (["x[n,3]", "any"], ["y[n,5]"], None),
        (["x[n,3]"], ["y"], "n"),
        (["x[n,s]"], ["y[s,n]"], None),
        (["x[n,3]"], ["y[unk_3,5]"], "n"),
        (["x[n,3]"], ["loss[]"], None),
        (["x[6]"], ["y[3]"], None),
    ],
)
def test_the_batch_axis_is_the_first_where_all_agree(inputs, outputs, batch):
    assert signature(inputs, outputs).batch == batch


def test_other_dynamic_axes_are_named():
    assert signature(["ids[n,words]", "mask[n,words]"], ["y[n,4]"]).other_dynamic == {"words"}
    assert signature(["x[a,b]", "z[c]"], ["y[a]"]).other_dynamic == {"a", "b", "c"}
    assert signature(["x[2,3]"], ["y[2]"]).other_dynamic == frozenset()


def test_specs_print_as_they_are_written_on_the_command_line():
    assert [str(spec) for spec in specs("x[n,3]", "any", "one[]")] == [
        "x:float32[n,3]",
        "any:float32[…]",
        "one:float32[]",
    ]


def test_what_fits_has_no_problems():
    found = signature(["x[n,3,s]", "z[n]"], ["y[n,5]"])
    for items in (1, 7):
        assert found.problems({"x": np.zeros((items, 3, 9), np.float32), "z": np.zeros(items, np.float32)}) == []
    fixed = signature(["x[4,3]"], ["y[4,5]"])
    assert fixed.problems({"x": np.zeros((9, 3), np.float32)}) == []


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        ({}, "the model's inputs are ['x'], the data has []"),
        (
            {"x": np.zeros((2, 3), np.float32), "z": np.zeros(2)},
            "the model's inputs are ['x'], the data has ['x', 'z']",
        ),
        ({"x": np.zeros((2, 3))}, "input x:float32[n,3] was given float64"),
        ({"x": np.zeros((2, 4), np.float32)}, "input x:float32[n,3] was given shape [2, 4]"),
        ({"x": np.zeros(3, np.float32)}, "input x:float32[n,3] was given shape [3]"),
    ],
)
def test_what_does_not_fit_is_told_in_words(batch, problem):
    assert signature(["x[n,3]"], ["y[n,5]"]).problems(batch) == [problem]


def test_without_a_batch_axis_every_fixed_size_counts():
    found = signature(["x[6]"], ["y[3]"])
    assert found.problems({"x": np.zeros(6, np.float32)}) == []
    assert found.problems({"x": np.zeros(5, np.float32)}) == ["input x:float32[6] was given shape [5]"]


def test_an_inference_is_an_item_on_the_batch_axis_else_a_call():
    batch = {"x": np.zeros((7, 3), np.float32)}
    assert rows(batch) == 7
    assert inferences(signature(["x[n,3]"], ["y[n]"]), batch) == 7
    assert inferences(signature(["x[7,3]"], ["y[2]"]), batch) == 1


@given(items=st.integers(1, 40), size=st.integers(1, 12))
def test_pieces_have_exactly_the_size_and_their_real_items_are_the_batch(items, size):
    batch = {"x": np.arange(items * 2).reshape(items, 2), "z": np.arange(items)}
    pieces = split(batch, size)
    assert all(rows(piece) == len(piece["z"]) == size for piece, _ in pieces)
    assert all(1 <= real <= size for _, real in pieces) and sum(real for _, real in pieces) == items
    for name, array in batch.items():
        assert np.array_equal(np.concatenate([piece[name][:real] for piece, real in pieces]), array)


def test_the_remainder_is_filled_with_its_last_item():
    ((piece, real),) = split({"x": np.array([1, 2])}, 4)
    assert piece["x"].tolist() == [1, 2, 2, 2] and real == 2


def test_inputs_with_no_items_or_different_numbers_of_them_are_problems():
    specs = (TensorSpec("a", "float32", ("n", 2)), TensorSpec("b", "float32", ("n", 2)))
    signature = Signature(specs, ())
    array = np.zeros((3, 2), np.float32)
    assert signature.problems({"a": array, "b": array[:2]}) == ["the inputs have different numbers of items: 2, 3"]
    assert signature.problems({"a": array[:0], "b": array[:0]}) == ["there are no items on the batch axis"]


def test_a_model_without_inputs_has_no_batch_axis():
    assert Signature((), (TensorSpec("y", "float32", (3,)),)).batch is None
