"""`remove-redundant-quantization`: every integer stays what it was, and what stays says why."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import feed, node, outputs, proto, run_twice, weight

from perwatt.artifact import Artifact
from perwatt.passes.remove_redundant_quantization import RemoveRedundantQuantization

SCALES = {"s": np.float32(0.1), "z": np.int8(3)}


def removed(artifact, batch=None):
    """The result of the pass and its words, with outputs proved to be the same to the last bit."""
    after, changes = run_twice(RemoveRedundantQuantization(), artifact)
    assert after.signature == artifact.signature
    assert not list(RemoveRedundantQuantization().ensures(artifact, after))
    batch = batch or {name: array * 8 for name, array in feed(artifact).items()}
    before, then = outputs(artifact, batch), outputs(after, batch)
    for name in before:
        np.testing.assert_array_equal(before[name], then[name])
    return after, changes


def refused(artifact):
    """The reason given for the only occurrence; nothing was changed."""
    after, changes = removed(artifact)
    assert after is artifact and len(changes) == 1, changes
    return changes[0]


def q(source, out, scale="s", zero="z", **attributes):
    return node("QuantizeLinear", f"{source} {scale} {zero}".removesuffix(" -"), out, **attributes)


def dq(source, out, scale="s", zero="z", **attributes):
    return node("DequantizeLinear", f"{source} {scale} {zero}".removesuffix(" -"), out, **attributes)


def build(*args, **options):
    """The artifact of that model, with the shapes that follow from those of its inputs."""
    made = onnx.shape_inference.infer_shapes(proto(*args, **options), strict_mode=True)
    onnx.checker.check_model(made)
    return Artifact(model=ir.from_proto(made))


def net(*nodes, outputs="y:float32", weights=None, inputs="x:float32[n,4,6]", **options):
    return build(list(nodes), inputs, outputs, SCALES | (weights or {}), **options)


# Twice in a row -------------------------------------------------------------------------------------------------------


def test_a_quantizer_s_pairs_around_what_only_moves(golden_pass):
    before = net(
        q("x", "q1"), dq("q1", "d1"), node("Transpose", "d1", "t", perm=[0, 2, 1]), q("t", "q2"), dq("q2", "d2"),
        node("Reshape", "d2 shape", "r"), q("r", "q3"), dq("q3", "d3"), node("MatMul", "d3 w", "y"),
        weights={"shape": np.int64([0, 24]), "w": weight(24, 3)},
    )  # fmt: skip
    after, changes = removed(before)
    golden_pass("remove_redundant_quantization", before, after, changes)
    kinds = ["QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "MatMul"]
    assert [n.op_type for n in after.model.graph] == kinds


@given(
    kind=st.sampled_from(["int8", "uint8", "int16", "uint16"]), zero=st.integers(-120, 120), data=st.data(),
    scale=st.floats(2.0**-30, 2.0**30, width=32), rank=st.sampled_from([(), (1,)]), given_zero=st.booleans(),
)  # fmt: skip
def test_a_pair_done_twice_is_done_once(kind, zero, data, scale, rank, given_zero):
    zero = zero % 100 if kind.startswith("u") else zero
    zero = zero if given_zero else 0
    # Without a zero point the type has to be named; opset 21 brought that.
    named = {} if given_zero else {"output_dtype": {"int8": 3, "uint8": 2, "int16": 5, "uint16": 4}[kind]}
    point = "zp" if given_zero else "-"
    tensors = {"sc": np.full(rank, scale, np.float32)} | ({"zp": np.full(rank, zero, kind)} if given_zero else {})
    before = build(
        [q("x", "q1", "sc", point, **named), dq("q1", "d1", "sc", point), q("d1", "q2", "sc", point, **named),
         dq("q2", "y", "sc", point)],
        "x:float32[n,64]", f"y:float32[n,64] q2:{kind}[n,64]", tensors,
    )  # fmt: skip
    values = data.draw(st.integers(0, 99))
    batch = {"x": (np.random.default_rng(values).standard_normal((3, 64)) * scale * 200).astype(np.float32)}
    after, _ = removed(before, batch)
    assert after.operator_counts() == {"QuantizeLinear": 1, "DequantizeLinear": 1, "Identity": 1}


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("scale", [1e-30, 0.0003, 1 / 3, 0.1, 7.77, 1e30])
def test_every_integer_comes_back(kind, scale):
    tensors = {"sc": np.float32(scale), "zp": np.array(5, kind)}
    before = build([dq("i", "d", "sc", "zp"), q("d", "y", "sc", "zp")], f"i:{kind}[n]", f"y:{kind}[n]", tensors)
    info = np.iinfo(kind)
    after, _ = removed(before, {"i": np.arange(info.min, info.max + 1).astype(kind)})
    assert after.operator_counts() == {"Identity": 1}


def test_the_dequantized_value_may_have_other_users():
    before = net(q("x", "q1"), dq("q1", "d1"), q("d1", "q2"), dq("q2", "y"), node("Exp", "d1", "e"),
                 outputs="y:float32 e:float32")  # fmt: skip
    after, _ = removed(before)
    assert after.operator_counts() == {"QuantizeLinear": 1, "DequantizeLinear": 1, "Exp": 1, "Identity": 1}


def test_a_pair_that_stands_alone_rounds_and_stays():
    before = net(q("x", "q1"), dq("q1", "y"))
    after, changes = removed(before)
    assert after is before and changes == []


def test_a_stored_weight_stays_quantized():
    before = net(dq("i", "w"), node("Mul", "x w", "y"), weights={"i": np.arange(6, dtype=np.int8)})
    after, changes = removed(before)
    assert after is before and changes == []


@pytest.mark.parametrize(
    ("other", "weights"),
    [
        (("t", "z"), {"t": np.float32(0.2)}), (("s", "other"), {"other": np.int8(4)}),
        (("s", "other"), {"other": np.uint8(3)}), (("s", "-"), {}),
    ],
)  # fmt: skip
def test_other_parameters_round_anew_and_stay(other, weights):
    before = net(q("x", "q1"), dq("q1", "d1"), q("d1", "q2", *other), dq("q2", "y", *other), weights=weights)
    assert refused(before) == "1 left: it is quantized anew with other parameters"


def test_a_missing_zero_point_is_zero():
    tensors = {"zero": np.uint8(0), "s": np.float32([0.1])}
    before = build(
        [q("x", "q1", zero="-"), dq("q1", "d1", zero="zero"), q("d1", "q2", zero="zero"), dq("q2", "y", zero="-")],
        "x:float32[n,4]", "y:float32[n,4]", tensors, inner="q1:uint8[n,4] q2:uint8[n,4]",
    )  # fmt: skip
    assert removed(before)[0].operator_counts() == {"QuantizeLinear": 1, "DequantizeLinear": 1}


def test_computed_scales_may_be_anything_and_stay():
    before = net(node("Abs", "t", "u"), q("x", "q1", "u"), dq("q1", "d1", "u"), q("d1", "q2", "u"), dq("q2", "y", "u"),
                 weights={"t": np.float32(0.1)})  # fmt: skip
    assert refused(before) == "1 left: its scales are computed, differ, or move to other axes"


@pytest.mark.parametrize(("scale", "exact"), [(1e-37, True), (1e-39, False), (1e36, True), (3e36, False), (0, False)])
def test_scales_at_the_ends_of_their_type(scale, exact):
    tensors = {"sc": np.float32(scale), "zp": np.int8(0)}
    before = build([dq("i", "d", "sc", "zp"), q("d", "y", "sc", "zp")], "i:int8[n]", "y:int8[n]", tensors)
    batch = {"i": np.arange(-128, 128).astype(np.int8)}
    if exact:
        assert removed(before, batch)[0].operator_counts() == {"Identity": 1}
    else:
        after, changes = run_twice(RemoveRedundantQuantization(), before)
        assert after is before
        assert changes == ["1 left: its scale is not positive, or too small or large for its type"]


@pytest.mark.parametrize(
    ("kind", "scale", "reason"),
    [
        ("int8", "float16", None), ("int16", "float16", "its floating type is too coarse for its integers"),
        ("int16", "float32", None),
    ],
)  # fmt: skip
def test_coarse_floating_types(kind, scale, reason):
    tensors = {"sc": np.array(0.1, scale), "zp": np.array(0, kind)}
    before = build([dq("i", "d", "sc", "zp"), q("d", "y", "sc", "zp")], f"i:{kind}[n]", f"y:{kind}[n]", tensors)
    after, changes = run_twice(RemoveRedundantQuantization(), before)
    assert (after is before) == bool(reason)
    assert changes == ([f"1 left: {reason}"] if reason else ["1 quantizations that changed nothing removed"])


def test_a_coarser_type_in_between_counts():
    tensors = {"sc": np.float32(0.1), "zp": np.int16(0)}
    nodes = [dq("i", "d", "sc", "zp", output_dtype=10), q("d", "y", "sc", "zp")]
    before = build(nodes, "i:int16[n]", "y:int16[n]", tensors)
    after, changes = run_twice(RemoveRedundantQuantization(), before)
    assert after is before and changes == ["1 left: its floating type is too coarse for its integers"]


def test_floating_grids_stay():
    zero = onnx.helper.make_tensor("zp", onnx.TensorProto.FLOAT8E4M3FN, [], [0])
    nodes = [
        onnx.helper.make_node("Constant", [], ["zp"], value=zero), q("x", "q1", "s", "zp"), dq("q1", "d1", "s", "zp"),
        q("d1", "q2", "s", "zp"), dq("q2", "y", "s", "zp"),
    ]  # fmt: skip
    before = build(nodes, "x:float32[n,4]", "y:float32", {"s": np.float32(0.1)})
    after, changes = run_twice(RemoveRedundantQuantization(), before)
    assert after is before and changes == ["1 left: float8e4m3fn has no grid of equal steps"]


# One scale a channel --------------------------------------------------------------------------------------------------

CHANNELS = {"cs": np.float32([0.1, 0.2, 0.3, 0.4]), "cz": np.int8([0, 1, -2, 3])}


@pytest.mark.parametrize(("first", "second"), [(1, 1), (-2, 1), (1, -2)])
def test_channels_counted_from_either_end_are_the_same(first, second):
    before = net(
        q("x", "q1", "cs", "cz", axis=first), dq("q1", "d1", "cs", "cz", axis=first),
        q("d1", "q2", "cs", "cz", axis=second), dq("q2", "y", "cs", "cz", axis=second), weights=CHANNELS,
        inner="q1:int8[n,4,6] d1:float32[n,4,6]",
    )  # fmt: skip
    assert removed(before)[0].operator_counts() == {"QuantizeLinear": 1, "DequantizeLinear": 1}


def test_channels_along_another_axis_are_not_the_same():
    square = {"x": weight(2, 4, 4) * 8}
    before = net(
        q("x", "q1", "cs", "cz", axis=1), dq("q1", "d1", "cs", "cz", axis=1), q("d1", "q2", "cs", "cz", axis=2),
        dq("q2", "y", "cs", "cz", axis=2), weights=CHANNELS, inputs="x:float32[n,4,4]",
    )  # fmt: skip
    after, changes = removed(before, square)
    assert after is before and changes == ["1 left: it is quantized anew with other parameters"]


@pytest.mark.parametrize(("axis", "goes"), [(2, True), (-1, True), (1, False), (0, False)])
def test_a_transpose_takes_the_channels_along(axis, goes):
    before = net(
        q("x", "q1", "cs", "cz", axis=1), dq("q1", "d1", "cs", "cz", axis=1), node("Transpose", "d1", "t", perm=[2, 0, 1]),
        q("t", "q2", "cs", "cz", axis=axis), dq("q2", "y", "cs", "cz", axis=axis), weights=CHANNELS,
        inputs="x:float32[n,4,4]", inner="q1:int8[n,4,4] d1:float32[n,4,4]",
    )  # fmt: skip
    after, changes = removed(before, {"x": weight(4, 4, 4) * 8})
    assert (after is not before) == goes
    assert goes or changes == ["1 left: it is quantized anew with other parameters"]


def test_other_movers_of_channels_stay():
    before = net(
        q("x", "q1", "cs", "cz", axis=1), dq("q1", "d1", "cs", "cz", axis=1), node("Squeeze", "d1 last", "t"),
        q("t", "q2", "cs", "cz", axis=1), dq("q2", "y", "cs", "cz", axis=1),
        weights=CHANNELS | {"last": np.int64([2])}, inputs="x:float32[n,4,1]",
    )  # fmt: skip
    assert refused(before) == "1 left: its scales are computed, differ, or move to other axes"


def test_blocks_of_scales():
    tensors = {"bs": np.float32([[0.1, 0.2], [0.3, 0.4]]), "bz": np.int8([[0, 1], [2, 3]])}
    same = {"axis": 1, "block_size": 3}
    before = build(
        [q("x", "q1", "bs", "bz", **same), dq("q1", "d1", "bs", "bz", **same), q("d1", "q2", "bs", "bz", **same),
         dq("q2", "y", "bs", "bz", **same)],
        "x:float32[2,6]", "y:float32[2,6]", tensors,
    )  # fmt: skip
    assert run_twice(RemoveRedundantQuantization(), before)[0].operator_counts()["QuantizeLinear"] == 1


# What only moves ------------------------------------------------------------------------------------------------------

MOVES = {
    "Reshape": (node("Reshape", "d1 shape", "m"), {"shape": np.int64([0, -1])}),
    "Transpose": (node("Transpose", "d1", "m"), {}),
    "Squeeze": (node("Squeeze", "d1 axes", "m"), {"axes": np.int64([1])}),
    "Unsqueeze": (node("Unsqueeze", "d1 axes", "m"), {"axes": np.int64([1])}),
    "Slice": (
        node("Slice", "d1 low high axes", "m"),
        {"low": np.int64([1]), "high": np.int64([3]), "axes": np.int64([3])},
    ),
    "MaxPool": (node("MaxPool", "d1", "m", kernel_shape=[2, 2], pads=[1, 0, 1, 0]), {}),
}


@pytest.mark.parametrize("kind", list(MOVES))
@pytest.mark.parametrize("integers", ["int8", "uint8"])
def test_the_second_pair_around_what_only_moves_goes(kind, integers):
    mover, tensors = MOVES[kind]
    nodes = [
        q("x", "q1", "s", "zp"),
        dq("q1", "d1", "s", "zp"),
        mover,
        q("m", "q2", "s", "zp"),
        dq("q2", "y", "s", "zp"),
    ]
    tensors = tensors | {"s": np.float32(0.1), "zp": np.array(3, integers)}
    after, _ = removed(build(nodes, "x:float32[n,1,4,6]", "y:float32", tensors))
    assert after.operator_counts() == {"QuantizeLinear": 1, "DequantizeLinear": 1, kind: 1, "Identity": 1}


def test_integers_that_others_want_stay():
    nodes = [q("x", "q1"), dq("q1", "d1"), node("Transpose", "d1", "m"), q("m", "q2"), dq("q2", "y")]
    after, _ = removed(net(*nodes, outputs="y:float32 q2:int8"))
    assert after.operator_counts() == {"QuantizeLinear": 2, "DequantizeLinear": 1, "Transpose": 1, "Identity": 1}


def test_a_chain_of_movers_without_pairs_in_between():
    before = net(
        q("x", "q1"), dq("q1", "d1"), node("Transpose", "d1", "t", perm=[0, 2, 1]), node("Reshape", "t shape", "f"),
        q("f", "q2"), dq("q2", "d2"), node("Exp", "d2", "y"), weights={"shape": np.int64([0, -1])},
    )  # fmt: skip
    after, changes = removed(before, {"x": weight(2, 4, 6)})
    assert changes == ["1 quantizations that changed nothing removed"]
    assert [n.op_type for n in after.model.graph] == [
        "QuantizeLinear",
        "DequantizeLinear",
        "Transpose",
        "Reshape",
        "Exp",
    ]


def test_what_is_moved_may_be_used_in_floating_point_too():
    nodes = [
        q("x", "q1"),
        dq("q1", "d1"),
        node("Transpose", "d1", "m"),
        q("m", "q2"),
        dq("q2", "y"),
        node("Abs", "m", "e"),
    ]
    after, _ = removed(net(*nodes, outputs="y:float32 e:float32 m:float32"))
    assert after.operator_counts() == {
        "QuantizeLinear": 1, "DequantizeLinear": 1, "Transpose": 1, "Abs": 1, "Identity": 1,
    }  # fmt: skip


def test_a_second_pair_that_changes_the_type_stays():
    before = net(q("x", "q1"), dq("q1", "d1"), node("Transpose", "d1", "m"), q("m", "q2"), dq("q2", "y", output_dtype=10),
                 outputs="y:float16")  # fmt: skip
    after, changes = run_twice(RemoveRedundantQuantization(), before)
    assert after is before and changes == ["1 left: it changes the floating type"]


def test_a_second_pair_that_is_none_stays():
    before = net(q("x", "q1"), dq("q1", "d1"), node("Transpose", "d1", "m"), q("m", "q2"), dq("q2", "y", "t"),
                 weights={"t": np.float32(0.2)})  # fmt: skip
    assert refused(before) == "1 left: it is quantized anew with other parameters"


def two_concatenated(*other, weights=None):
    return net(
        q("x", "q1"), dq("q1", "d1"), node("Exp", "x", "e"), q("e", "p1", *other), dq("p1", "c1", *other),
        node("Concat", "d1 c1", "m", axis=1), q("m", "q2"), dq("q2", "y"), weights=weights,
    )  # fmt: skip


def test_what_is_concatenated_of_equally_quantized_parts():
    after, _ = removed(two_concatenated(), {"x": weight(2, 4, 6)})
    assert after.operator_counts() == {"QuantizeLinear": 2, "Exp": 1, "Concat": 1, "DequantizeLinear": 1}


def test_what_is_concatenated_of_parts_with_other_scales_stays():
    reason = "1 left: its scales are computed, differ, or move to other axes"
    assert refused(two_concatenated("t", "z", weights={"t": np.float32(0.2)})) == reason


def test_what_is_moved_after_it_was_concatenated_stays():
    # Nobody moves a pair through Concat, so the one behind it is needed.
    before = net(
        q("x", "q1"), dq("q1", "d1"), node("Concat", "d1 d1", "m", axis=1), node("Transpose", "m", "t"), q("t", "q2"),
        dq("q2", "y"),
    )  # fmt: skip
    after, changes = removed(before)
    assert after is before and changes == []


def test_what_is_concatenated_and_used_in_floating_point_too_stays():
    nodes = [q("x", "q1"), dq("q1", "d1"), node("Concat", "d1 d1", "f", axis=1), q("f", "q2"), dq("q2", "y")]
    used = net(*nodes, node("Exp", "f", "e"), outputs="y:float32 e:float32")
    assert refused(used) == "1 left: a value inside it is used elsewhere too"
    assert refused(net(*nodes, outputs="y:float32 f:float32")) == "1 left: a value inside it is an output"


def test_what_is_concatenated_with_a_floating_part_is_no_candidate():
    before = net(q("x", "q1"), dq("q1", "d1"), node("Concat", "d1 x", "m", axis=1), q("m", "q2"), dq("q2", "y"))
    after, changes = removed(before)
    assert after is before and changes == []


@pytest.mark.parametrize("kind", ["Relu", "AveragePool", "GlobalAveragePool", "Neg", "Flatten"])
def test_what_computes_or_stops_pairs_is_no_mover(kind):
    attributes = {"kernel_shape": [2, 2]} if kind == "AveragePool" else {}
    nodes = [q("x", "q1"), dq("q1", "d1"), node(kind, "d1", "m", **attributes), q("m", "q2"), dq("q2", "y")]
    before = net(*nodes, inputs="x:float32[n,1,4,6]")
    after, changes = removed(before)
    assert after is before and changes == []


# Twins ----------------------------------------------------------------------------------------------------------------


def test_equal_quantizations_of_one_value_are_one():
    before = net(
        q("x", "q1"), q("x", "q2"), q("x", "q3", "s2", "z2"), dq("q1", "d1"), dq("q2", "d2"), dq("q3", "d3", "s2", "z2"),
        node("Exp", "d1", "e1"), node("Abs", "d2", "e2"), node("Neg", "d3", "e3"), node("Sum", "e1 e2 e3", "y"),
        weights={"s2": np.float32([0.1]), "z2": np.int8([3])},
    )  # fmt: skip
    after, changes = removed(before, {"x": weight(2, 4, 6)})
    counts = after.operator_counts()
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] == 1 and changes[0].startswith("4 ")


@pytest.mark.parametrize("other", [("t", "z"), ("s", "other")])
def test_different_quantizations_of_one_value_are_two(other):
    before = net(
        q("x", "q1"), q("x", "q2", *other), dq("q1", "d1"), dq("q2", "d2", *other), node("Add", "d1 d2", "y"),
        weights={"t": np.float32(0.2), "other": np.int8(4)},
    )  # fmt: skip
    after, changes = removed(before)
    assert after is before and changes == []


def test_dequantizations_to_different_types_are_two():
    before = net(
        q("x", "q1"), dq("q1", "d1"), dq("q1", "d2", output_dtype=10), node("Cast", "d2", "c", to=1),
        node("Add", "d1 c", "y"),
    )  # fmt: skip
    after, changes = run_twice(RemoveRedundantQuantization(), before)
    assert after is before and changes == []


def test_computed_scales_may_be_shared_where_they_are_the_same_value():
    before = net(
        node("Abs", "t", "u"), q("x", "q1", "u"), q("x", "q2", "u"), dq("q1", "d1", "u"), dq("q2", "d2", "u"),
        node("Exp", "d1", "e1"), node("Neg", "d2", "e2"), node("Add", "e1 e2", "y"), weights={"t": np.float32(0.1)},
    )  # fmt: skip
    after, _ = removed(before, {"x": weight(2, 4, 6)})
    assert after.operator_counts() == {
        "Abs": 1, "QuantizeLinear": 1, "DequantizeLinear": 1, "Exp": 1, "Neg": 1, "Add": 1,
    }  # fmt: skip


def test_a_scale_that_is_quantized_itself_is_no_twin():
    # x stands in different places of the two nodes.
    before = build(
        [node("DequantizeLinear", "i x", "d1"), node("DequantizeLinear", "i s", "d2"), node("QuantizeLinear", "x s", "q"),
         node("DequantizeLinear", "q s", "d3"), node("Sum", "d1 d2 d3", "y")],
        "i:uint8[n,4] x:float32[]", "y:float32", {"s": np.float32(0.1)},
    )  # fmt: skip
    after, changes = run_twice(RemoveRedundantQuantization(), before)
    assert after is before and changes == []


# Random graphs --------------------------------------------------------------------------------------------------------


@st.composite
def quantized_graphs(draw):
    """Random chains of pairs, movers and arithmetic over one value, with a few sets of parameters."""
    tensors = {"s0": np.float32(0.1), "z0": np.int8(3), "s1": np.float32(0.25), "z1": np.int8(0)}
    values, integers, nodes = ["x"], {}, []
    for position in range(draw(st.integers(2, 12))):
        out = f"v{position}"
        kind = draw(st.sampled_from(["pair", "pair", "pair", "Q", "DQ", "Transpose", "Relu", "Concat", "MaxPool"]))
        which = draw(st.sampled_from("001"))
        source = draw(st.sampled_from(values[-3:]))
        if kind == "pair":
            nodes += [q(source, f"{out}i", f"s{which}", f"z{which}"), dq(f"{out}i", out, f"s{which}", f"z{which}")]
            integers[f"{out}i"] = which
        elif kind == "Q":
            nodes.append(q(source, f"{out}i", f"s{which}", f"z{which}"))
            integers[f"{out}i"] = which
            continue
        elif kind == "DQ" and integers:
            name = draw(st.sampled_from(sorted(integers)))
            nodes.append(dq(name, out, f"s{integers[name]}", f"z{integers[name]}"))
        elif kind == "Concat":
            # Cut back to the same length, so that anything fits anything.
            other = draw(st.sampled_from(values[-3:]))
            nodes += [
                node("Concat", f"{source} {other}", f"{out}w", axis=0),
                node("Slice", f"{out}w zero two zero", out),
            ]
            tensors |= {"zero": np.int64([0]), "two": np.int64([2])}
        elif kind == "MaxPool":
            nodes.append(node("MaxPool", source, out, kernel_shape=[3], pads=[1, 1]))
        else:
            turned = {"perm": [0, 2, 1]} if kind == "Transpose" else {}
            nodes.append(node("Relu" if kind == "DQ" else kind, source, out, **turned))
        values.append(out)
    outs = " ".join([f"{v}:float32" for v in values[1:][-2:]] + [f"{i}:int8" for i in sorted(integers)[-2:]])
    used = {name for n in nodes for name in n.input}
    return build(nodes, "x:float32[2,4,4]", outs or "x:float32", {k: t for k, t in tensors.items() if k in used})


@given(quantized_graphs().filter(lambda artifact: artifact.model.graph.outputs[0].producer() is not None))
def test_random_graphs_compute_the_same_integers(before):
    removed(before, {"x": weight(2, 4, 4) * 10})
