"""`cancel-casts`: pairs that lose nothing, through what only moves elements, and those that round or overflow."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node, outputs, proto, run_twice
from onnx import TensorProto, helper

from perwatt.artifact import Artifact
from perwatt.drift import drift
from perwatt.passes.cancel_casts import CancelCasts, lossless, may_skip

TYPES = {
    "bool": TensorProto.BOOL, "int8": TensorProto.INT8, "uint8": TensorProto.UINT8, "int16": TensorProto.INT16,
    "uint16": TensorProto.UINT16, "int32": TensorProto.INT32, "uint32": TensorProto.UINT32, "int64": TensorProto.INT64,
    "uint64": TensorProto.UINT64, "float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
}  # fmt: skip
NAMES = {name: TensorProto.DataType.Name(number) for name, number in TYPES.items()}


def extremes(dtype):
    """Numbers of a type in which a conversion that loses something shows."""
    if dtype == "bool":
        return np.array([True, False, True, True, False])
    if dtype.startswith("float"):
        low = np.finfo(dtype)
        return np.array([low.max, -low.max, 1 / 3, -2.75, low.tiny], dtype)
    limits = np.iinfo(dtype)
    return np.array([limits.max, limits.min, 77, 100, limits.max // 3 * 2 + 1], dtype)


def cancelled(artifact, batch=None):
    after, changes = run_twice(CancelCasts(), artifact)
    batch = batch or feed(artifact)
    assert not drift([outputs(artifact, batch)], [outputs(after, batch)], CancelCasts.tolerance).reasons
    return after, changes


def chain(*types, movers=(), weights=None, shape="batch,5", out=None):
    """x of the first type, cast to each of the others in turn, with `movers` (from m to n) before the last cast."""
    steps = [node("Cast", f"c{i}", f"c{i + 1}", to=TYPES[to]) for i, to in enumerate(types[1:])]
    steps[-1].input[0] = "n" if movers else steps[-1].input[0]
    nodes = [node("Identity", "x", "c0"), *steps[:-1], *movers, steps[-1], node("Identity", f"c{len(types) - 1}", "y")]
    return build(nodes, f"x:{types[0]}[{shape}]", f"y:{types[-1]}[{out or shape}]", weights or {})


def test_a_mask(golden_pass):
    nodes = [
        node("Cast", "x", "m", to=TYPES["bool"], name="/mask"), node("Cast", "m", "i", to=TYPES["int64"]),
        node("Unsqueeze", "i axis", "u"), node("Cast", "u", "b", to=TYPES["bool"]),
        node("Cast", "b", "f", to=TYPES["float32"]), node("Cast", "f", "g", to=TYPES["float32"]), node("Exp", "g", "y"),
    ]  # fmt: skip
    before = build(nodes, "x:int64[batch,5]", "y:float32[batch,1,5]", {"axis": np.int64([1])})
    after, changes = cancelled(before)
    golden_pass("cancel_casts", before, after, changes)
    assert after.operator_counts() == {"Cast": 2, "Unsqueeze": 1, "Exp": 1}


def test_to_the_same_type():
    after, changes = cancelled(chain("float32", "float32"))
    assert after.operator_counts() == {"Identity": 2} and changes == ["1 casts cancelled"]


def test_there_and_back():
    after, _ = cancelled(chain("bool", "int64", "bool"))
    assert after.operator_counts() == {"Identity": 2}


@given(types=st.lists(st.sampled_from(sorted(TYPES)), min_size=3, max_size=3))
def test_pairs_give_the_same_to_the_last_bit(types):
    before = chain(*types)
    batch = {"x": np.stack([extremes(types[0])] * 2)}
    after, changes = run_twice(CancelCasts(), before)
    went = after.operator_counts().get("Cast", 0) < 2
    source, through, last = (NAMES[name] for name in types)
    assert went == (through in (source, last) or may_skip(source, through, last))
    if not went:
        assert changes == ["1 left: the first of two casts loses something"]
    a, b = outputs(before, batch)["y"], outputs(after, batch)["y"]
    np.testing.assert_array_equal(a, b)


@given(source=st.sampled_from(sorted(TYPES)), to=st.sampled_from(sorted(TYPES)))
def test_lossless_is_what_comes_back_whole(source, to):
    numbers = extremes(source)
    if lossless(NAMES[source], NAMES[to]):
        np.testing.assert_array_equal(numbers.astype(to).astype(source), numbers)


@pytest.mark.parametrize("types", [
    ("float32", "float16", "float32"), ("float32", "int32", "float32"), ("int64", "int32", "int64"),
    ("int64", "bool", "int64"), ("int64", "float32", "int64"), ("int32", "uint32", "int64"),
    ("float32", "float64", "int32"), ("int8", "float32", "uint8"),
])  # fmt: skip
def test_what_loses_something_stays(types):
    before = chain(*types)
    after, changes = run_twice(CancelCasts(), before)
    assert after is before and changes == ["1 left: the first of two casts loses something"]


@pytest.mark.parametrize(("types", "casts"), [(("bool", "float32", "bool"), 0), (("float16", "float32", "float64"), 1)])
@pytest.mark.parametrize(("kind", "extra", "out", "attributes"), [
    ("Transpose", "", "5,batch", {"perm": [1, 0]}), ("Reshape", "target", "batch,5,1", {}), ("Unsqueeze", "one", "batch,1,5", {}),
    ("Gather", "index", "batch,2", {"axis": 1}), ("Slice", "zero two one", "batch,2", {}), ("Expand", "wide", "3,batch,5", {}),
    ("Tile", "twice", "batch,10", {}), ("Flatten", "", "batch,5", {"axis": 1}),
])  # fmt: skip
def test_through_what_moves_elements(types, casts, kind, extra, out, attributes):
    weights = {
        "target": np.int64([0, -1, 1]), "one": np.int64([1]), "index": np.int64([3, 1]), "zero": np.int64([0]),
        "two": np.int64([2]), "wide": np.int64([3, 1, 1]), "twice": np.int64([1, 2]),
    }  # fmt: skip
    movers = [node(kind, f"c1 {extra}", "n", **attributes)]
    before = chain(*types, movers=movers, weights={name: weights[name] for name in extra.split()}, out=out)
    after, _ = cancelled(before, {"x": np.random.default_rng(0).integers(0, 2, (4, 5)).astype(types[0])})
    assert after.operator_counts().get("Cast", 0) == casts and after.operator_counts()[kind] == 1


def test_two_movers_between():
    movers = [node("Transpose", "c1", "t", perm=[1, 0]), node("Unsqueeze", "t one", "n")]
    after, _ = cancelled(chain("bool", "int64", "bool", movers=movers, weights={"one": np.int64([1])}, out="5,1,batch"))
    assert after.operator_counts() == {"Identity": 2, "Transpose": 1, "Unsqueeze": 1}


def test_a_mover_that_others_use_stays():
    nodes = [
        node("Less", "x x", "m"), node("Cast", "m", "i", to=TYPES["int64"]), node("Transpose", "i", "t", perm=[1, 0]),
        node("Cast", "t", "b", to=TYPES["bool"]), node("Cast", "b", "y", to=TYPES["float32"]), node("Neg", "t", "z"),
    ]  # fmt: skip
    before = build(nodes, "x:float32[batch,5]", "y:float32[5,batch] z:int64[5,batch]")
    after, changes = cancelled(before)
    assert after.operator_counts()["Cast"] == 3 and changes == ["1 left: the first of two casts loses something"]


def test_a_cast_that_others_use_stays_for_them():
    nodes = [
        node("Less", "x half", "m"), node("Cast", "m", "i", to=TYPES["int64"]), node("Cast", "i", "b", to=TYPES["bool"]),
        node("Cast", "b", "y", to=TYPES["float32"]), node("Neg", "i", "z"),
    ]  # fmt: skip
    before = build(nodes, "x:float32[batch,5]", "y:float32[batch,5] z:int64[batch,5]", {"half": np.float32(0.5)})
    after, _ = cancelled(before)
    assert after.operator_counts() == {"Less": 1, "Cast": 2, "Neg": 1}


def test_arithmetic_between_stays():
    nodes = [
        node("Cast", "x", "i", to=TYPES["int64"]),
        node("Neg", "i", "n"),
        node("Cast", "n", "y", to=TYPES["int32"]),
    ]
    before = build(nodes, "x:int32[batch,5]", "y:int32[batch,5]")
    assert run_twice(CancelCasts(), before) == (before, [])


def test_cast_like():
    nodes = [node("Exp", "x", "e"), node("CastLike", "e other", "c"), node("Neg", "c", "y")]
    after, _ = cancelled(build(nodes, "x:float32[batch,5]", "y:float32[batch,5]", {"other": np.float32(1)}))
    assert after.operator_counts() == {"Exp": 1, "Neg": 1}


def test_unknown_types_stay():
    """The operator that makes the value is not ONNX's own, and the file doesn't say."""
    nodes = [
        node("Gelu", "x", "a", domain="com.microsoft"),
        node("Cast", "a", "b", to=1),
        node("Cast", "b", "y", to=11),
    ]
    made = proto(nodes, "x:float32[batch,5]", "y:float64[batch,5]")
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    before = Artifact(model=ir.from_proto(made))
    after, changes = run_twice(CancelCasts(), before)
    assert after is before and changes == ["1 left: the types of its values aren't known"]


def test_types_that_follow_from_operators():
    """No value inside has a type in the file; Shape gives int64, and what comes after Exp is what x is."""
    nodes = [
        node("Shape", "x", "s"), node("Cast", "s", "s1", to=TYPES["int64"]), node("Gather", "s1 one", "s2", axis=0),
        node("Exp", "x", "e"), node("LayerNormalization", "e scale", "l"), node("Cast", "l", "c", to=1),
        node("Split", "c", "p q", axis=1, num_outputs=2), node("Cast", "q", "q1", to=1), node("Add", "p q1", "y"),
        node("Neg", "s2", "z"),
    ]  # fmt: skip
    weights = {"scale": np.ones(6, np.float32), "one": np.int64(1)}
    after, _ = cancelled(build(nodes, "x:float32[batch,6]", "y:float32[batch,3] z:int64[]", weights))
    assert "Cast" not in after.operator_counts()
