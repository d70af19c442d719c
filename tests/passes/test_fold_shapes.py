"""`fold-shapes`: what exporters write about shapes goes, and nothing else changes, at any batch size, to the last bit."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, control_flow, feed, mlp, node, outputs, printed, run_twice, transformer, weight
from onnx import TensorProto, helper
from shape_programs import programs

from perwatt.passes.fold_shapes import FoldShapes

INT64, BOOL, FLOAT = TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT


def folded(artifact, sizes=(1, 2, 7), settings=None, **symbols):
    """(operators left, changes, artifact), having compared the outputs at several batch sizes."""
    after, changes = run_twice(settings or FoldShapes(), artifact)
    for items in sizes:
        batch = feed(artifact, items, **symbols)
        before, now = outputs(artifact, batch), outputs(after, batch)
        for name in before:
            assert before[name].dtype == now[name].dtype and before[name].shape == now[name].shape
            np.testing.assert_array_equal(before[name], now[name])
    return after.operator_counts(), changes, after


def ints(*values):
    return np.array(values, dtype=np.int64)


def stored(artifact):
    """Weights by name, as lists."""
    return {name: value.const_value.numpy().tolist() for name, value in artifact.model.graph.initializers.items()}


def shape_of(artifact, operator, which=0):
    """What one Reshape or Expand is given."""
    found = [n for n in artifact.model.graph if n.op_type == operator][which]
    return stored(artifact)[found.inputs[1].name]


# What exporters write -------------------------------------------------------------------------------------------------


def size_of(source, axis, name):
    """TorchScript's x.size(axis) as a list of one."""
    return [
        node("Shape", source, f"{name}_shape"), node("Gather", f"{name}_shape axis{axis}", f"{name}_size"),
        node("Unsqueeze", f"{name}_size zero", name),
    ]  # fmt: skip


AXES = {
    "axis0": np.int64(0),
    "axis1": np.int64(1),
    "axis2": np.int64(2),
    "zero": ints(0),
    "one": ints(1),
    "rest": ints(-1),
}


def used(nodes, weights):
    return {name: array for name, array in weights.items() if any(name in n.input for n in nodes)}


def net(nodes, inputs, outs, weights=None, **options):
    return build(nodes, inputs, outs, used(nodes, {**AXES, **(weights or {})}), **options)


def heads():
    """Split into heads, transpose, and back, as TorchScript does it."""
    nodes = [
        *size_of("x", 0, "batch_"), *size_of("x", 1, "words"),
        node("Concat", "batch_ words rest four", "split", axis=0), node("Reshape", "x split", "s"),
        node("Transpose", "s", "t", perm=[0, 2, 1, 3]), node("Relu", "t", "r"),
        node("Transpose", "r", "u", perm=[0, 2, 1, 3]), *size_of("u", 0, "items"), *size_of("u", 1, "length"),
        node("Concat", "items length rest", "joined", axis=0), node("Reshape", "u joined", "y"),
    ]  # fmt: skip
    return net(nodes, "x:float32[batch,6,8]", "y:float32[batch,6,8]", {"four": ints(4)}, opset=17)


def test_reshapes_of_torchscript(golden_pass):
    before = heads()
    counts, changes, after = folded(before)
    golden_pass("fold_shapes", before, after, changes)
    assert counts == {"Reshape": 2, "Transpose": 2, "Relu": 1}
    assert shape_of(after, "Reshape", 0) == [0, 6, 2, 4] and shape_of(after, "Reshape", 1) == [0, 6, 8]


def torchscript_expand(source, asked, out):
    """x.expand(…): sizes of -1 stay, which TorchScript computes."""
    return [
        node("Reshape", f"{asked} rest", f"{out}_flat"), node("Shape", f"{out}_flat", f"{out}_rank"),
        node("ConstantOfShape", f"{out}_rank", f"{out}_ones", value=helper.make_tensor("v", INT64, [1], [1])),
        node("Mul", f"{out}_ones minus", f"{out}_minus"), node("Equal", f"{out}_flat {out}_minus", f"{out}_stays"),
        node("Where", f"{out}_stays {out}_ones {out}_flat", f"{out}_sizes"), node("Expand", f"{source} {out}_sizes", out),
    ]  # fmt: skip


def test_the_class_token_of_a_vision_transformer():
    nodes = [
        *size_of("x", 0, "batch_"), node("Concat", "batch_ rest rest", "asked", axis=0),
        *torchscript_expand("token", "asked", "tokens"), node("Concat", "tokens x", "y", axis=1),
    ]  # fmt: skip
    before = net(
        nodes, "x:float32[batch,5,4]", "y:float32[batch,6,4]", {"token": weight(1, 1, 4), "minus": np.int64(-1)}
    )
    counts, changes, after = folded(before)
    assert counts == {"Shape": 1, "Concat": 2, "Expand": 1}
    assert "1 left: Expand to a size that only the input knows" in changes
    assert "token" in stored(after)


def test_repeated_heads_of_grouped_queries():
    nodes = [
        node("Unsqueeze", "x two", "u"), *size_of("x", 0, "batch_"),
        node("Concat", "batch_ heads", "asked", axis=0), node("Expand", "u asked", "e"),
        node("Concat", "batch_ flat", "joined", axis=0), node("Reshape", "e joined", "y", allowzero=1),
    ]  # fmt: skip
    weights = {"two": ints(2), "heads": ints(2, 3, 5, 4), "flat": ints(6, 5, 4)}
    counts, _, after = folded(net(nodes, "x:float32[batch,2,5,4]", "y:float32[batch,6,5,4]", weights))
    assert counts == {"Unsqueeze": 1, "Expand": 1, "Reshape": 1}
    assert shape_of(after, "Expand") == [1, 1, 3, 1, 1]
    assert shape_of(after, "Reshape") == [0, 6, 5, 4]


def counted(name, size, axes):
    """0 … size - 1 along one axis of four."""
    nodes, last = [node("Range", f"axis0 {size} axis1", f"{name}_0")], f"{name}_0"
    for step, axis in enumerate(axes, 1):
        nodes.append(node("Unsqueeze", f"{last} a{axis}", f"{name}_{step}" if step < len(axes) else name))
        last = f"{name}_{step}"
    return nodes


def dynamo_mask(start=0, spread="e0 e1", words=5, perm=(0, 1)):
    """mask[batch, 1, 1, words] as vmap indexes it: GatherND by coordinates that are counted."""
    nodes = [
        node("Cast", "mask", "b", to=BOOL), node("Transpose", "b", "bt", perm=list(perm)),
        node("Shape", "mask", "n_", start=0, end=1), node("Squeeze", "n_", "n"),
        *counted("rows", "n", (1, 2, 3)), node("Max", "rows columns", "both"), node("Shape", "both", "wide"),
        node("Expand", "rows wide", "r"), node("Unsqueeze", "r last", "e0"),
        node("Expand", "columns wide", "c"), node("Unsqueeze", "c last", "e1"),
        node("Concat", spread, "where", axis=-1), node("GatherND", "bt where", "m"),
        node("Cast", "m", "f", to=FLOAT), node("Add", "f x", "y"),
    ]  # fmt: skip
    columns = np.arange(start, start + words, dtype=np.int64).reshape(1, 1, 1, words)
    weights = {"columns": columns, "last": ints(-1), **{f"a{i}": ints(i) for i in range(4)}}
    return net(nodes, "mask:int64[batch,5] x:float32[batch,2,5,5]", f"y:float32[batch,2,5,{'5' if words == 5 else '?'}]",
               weights)  # fmt: skip


def test_the_mask_of_dynamo():
    counts, changes, _ = folded(dynamo_mask())
    assert counts == {"Cast": 2, "Unsqueeze": 1, "Add": 1}
    assert "1 GatherND turned into a view: all is taken in order" in changes


def test_a_mask_in_another_order_stays():
    # One word for one item: both coordinates count, but the wrong ones.
    counts, _, _ = folded(dynamo_mask(spread="e1 e0", perm=(1, 0)))
    assert counts["GatherND"] == 1


def test_a_part_of_a_mask_stays():
    # Columns 1 … 4 as 4 words; 0 … 3 as 4 of 5.
    for start, words in ((1, 1), (0, 1)):
        counts, _, _ = folded(dynamo_mask(start=start, words=words))
        assert counts["GatherND"] == 1


def script_mask(factor="width", offset=0, reverse=False):
    """The same as TorchScript has it: one Gather from the flattened mask."""
    nodes = [
        node("Cast", "mask", "b", to=BOOL), node("Shape", "b", "s"), node("Gather", "s axis0", "n"),
        node("Gather", "s axis1", "w"), node("Cast", "n", "n64", to=INT64), node("Cast", "w", "w64", to=INT64),
        *counted("rows", "n64", (1, 2, 3)), *counted("columns", "w64", (0, 1, 2)),
        node("Gather", "s one", "width"), node("Mul", f"rows {factor}", "skip"), node("Add", "columns skip", "there"),
        node("Sub" if reverse else "Add", "last there" if reverse else "there offset", "place"),
        node("Flatten", "b", "flat", axis=2), node("Gather", "flat place", "g", axis=0), node("Shape", "place", "as"),
        node("Reshape", "g rest", "gf"), node("Reshape", "gf as", "m"), node("Cast", "m", "f", to=FLOAT),
        node("Add", "f x", "y"),
    ]  # fmt: skip
    weights = {
        "offset": np.int64(offset),
        "last": np.int64(4),
        "four": np.int64(4),
        **{f"a{i}": ints(i) for i in range(4)},
    }
    return net(nodes, "mask:int64[batch,5] x:float32[batch,2,5,5]", "y:float32[batch,2,5,5]", weights, opset=17)


def test_the_mask_of_torchscript():
    counts, changes, _ = folded(script_mask())
    assert counts == {"Cast": 2, "Unsqueeze": 1, "Add": 1}
    assert "1 Gather turned into a view: all is taken in order" in changes


@pytest.mark.parametrize("wrong", [{"factor": "four"}, {"offset": -1}])
def test_other_places_of_a_mask_stay(wrong):
    counts, _, _ = folded(script_mask(**wrong))
    assert counts["Gather"] == 1 and counts["Range"] == 1


def test_a_mask_that_is_read_backwards_stays():
    counts, _, _ = folded(script_mask(reverse=True), sizes=(1,))
    assert counts["Gather"] == 1


def test_token_types_that_are_all_the_same():
    """BERT's buffer of zeros, expanded to the batch only to be looked up and added."""
    nodes = [
        *size_of("ids", 0, "batch_"), node("Concat", "batch_ five", "asked", axis=0),
        *torchscript_expand("zeros", "asked", "types"), node("Gather", "table types", "t"),
        node("Gather", "words ids", "w"), node("Add", "w t", "y"),
    ]  # fmt: skip
    weights = {"five": ints(5), "zeros": np.zeros((1, 5), np.int64), "table": weight(2, 4), "words": weight(9, 4),
               "minus": np.int64(-1)}  # fmt: skip
    counts, _, after = folded(net(nodes, "ids:int64[batch,5]", "y:float32[batch,5,4]", weights))
    assert counts == {"Gather": 1, "Add": 1}
    assert [1, 5, 4] in [list(v.shape) for v in after.model.graph.initializers.values()]


def padded_windows():
    """Swin's windows of 4 by 4, with its arithmetic for a side that isn't a multiple."""
    nodes = [
        node("Shape", "x", "s"), node("Gather", "s axis1", "side"), node("Gather", "s axis0", "n"),
        node("Mod", "side four", "over"), node("Sub", "four over", "lack"), node("Mod", "lack four", "pad"),
        node("Unsqueeze", "pad zero", "pad1"),
        node("Concat", "zero zero zero zero zero pad1 pad1 zero", "pads", axis=0), node("Pad", "x pads", "p"),
        node("Shape", "p", "ps"), node("Gather", "ps axis1", "pside"), node("Div", "pside four", "windows"),
        node("Unsqueeze", "n zero", "n1"), node("Unsqueeze", "windows zero", "w1"),
        node("Concat", "n1 w1 f1 w1 f1 three", "split", axis=0), node("Reshape", "p split", "r"),
        node("Transpose", "r", "t", perm=[0, 1, 3, 2, 4, 5]), node("Reshape", "t flat", "f"), node("Relu", "f", "a"),
        node("Concat", "rest w1 w1 f1 f1 three", "back", axis=0), node("Reshape", "a back", "b"),
        node("Transpose", "b", "c", perm=[0, 1, 3, 2, 4, 5]), node("Unsqueeze", "pside zero", "p1"),
        node("Concat", "n1 p1 p1 three", "whole", axis=0), node("Reshape", "c whole", "y"),
    ]  # fmt: skip
    weights = {"four": np.int64(4), "f1": ints(4), "three": ints(3), "flat": ints(-1, 16, 3)}
    return net(nodes, "x:float32[batch,6,6,3]", "y:float32[batch,8,8,3]", weights, opset=17)


def test_windows_of_swin():
    counts, _, after = folded(padded_windows())
    assert counts == {"Pad": 1, "Reshape": 4, "Transpose": 2, "Relu": 1}
    assert shape_of(after, "Reshape", 2) == [-1, 2, 2, 4, 4, 3]


def test_a_mask_that_is_computed_from_sizes_alone():
    nodes = [
        node("Shape", "x", "s"), node("Gather", "s axis1", "n"), node("Range", "axis0 n axis1", "r"),
        node("Unsqueeze", "r one", "rows"), node("Unsqueeze", "r zero", "columns"),
        node("LessOrEqual", "columns rows", "seen"), node("Where", "seen nothing lowest", "m"), node("Add", "x m", "y"),
    ]  # fmt: skip
    weights = {"nothing": np.float32(0), "lowest": np.float32(-1e9)}
    before = net(nodes, "x:float32[batch,6,6]", "y:float32[batch,6,6]", weights)
    assert folded(before)[0] == {"Add": 1}
    counts, changes, _ = folded(before, settings=FoldShapes(size_limit=20))
    assert counts == {"LessOrEqual": 1, "Where": 1, "Add": 1}, "the triangle has 36 elements"
    counts, changes, _ = folded(before, settings=FoldShapes(size_limit=5))
    assert counts["Range"] == 1 and "1 left: Range makes more than 5 elements" in changes


def test_shapes_of_keras():
    """tf2onnx computes shapes in 32 bits."""
    nodes = [
        node("Shape", "x", "s"), node("Cast", "s", "s32", to=TensorProto.INT32),
        node("Slice", "s32 zero one zero", "n"), node("Concat", "n tail", "t32", axis=0),
        node("Cast", "t32", "t", to=INT64), node("Reshape", "x t", "y"),
    ]  # fmt: skip
    before = net(nodes, "x:float32[unk__7,4,6]", "y:float32[unk__8,24]", {"tail": np.array([24], np.int32)}, opset=17)
    counts, _, after = folded(before)
    assert counts == {"Reshape": 1} and shape_of(after, "Reshape") == [0, 24]


def test_flattened_by_hand():
    """x.view(x.size(0), x.size(1) · x.size(2)) and ReduceProd of a stretch of the shape."""
    nodes = [
        *size_of("x", 0, "n"), *size_of("x", 1, "a"), *size_of("x", 2, "b"), node("Mul", "a b", "ab"),
        node("Concat", "n ab", "t", axis=0), node("Reshape", "x t", "y"),
        node("Shape", "x", "tail", start=1), node("ReduceProd", "tail", "all", keepdims=1),
        node("Concat", "n all", "u", axis=0), node("Reshape", "x u", "z"),
    ]  # fmt: skip
    outs = "y:float32[batch,24] z:float32[batch,24]"
    counts, _, after = folded(net(nodes, "x:float32[batch,4,6]", outs, opset=17))
    assert counts == {"Reshape": 2} and len(after.model.graph.initializers) == 1


# More than one symbol, and sizes of 0 ---------------------------------------------------------------------------------


def test_a_length_that_is_open_too():
    before = net(
        [*size_of("x", 0, "n"), *size_of("x", 1, "w"), node("Concat", "n w two four", "t", axis=0),
         node("Reshape", "x t", "r"), node("Concat", "n w rest", "u", axis=0), node("Reshape", "r u", "y")],
        "x:float32[batch,words,8]", "y:float32[batch,words,8]", {"two": ints(2), "four": ints(4)},
    )  # fmt: skip
    counts, _, _ = folded(before, words=3)
    assert counts == {"Identity": 1}, "to heads and back is where it began"


def test_two_open_sizes_in_new_places_stay_computed():
    nodes = [*size_of("x", 0, "n"), *size_of("x", 1, "w"), node("Concat", "w n three", "t", axis=0),
             node("Reshape", "x t", "y")]  # fmt: skip
    before = net(nodes, "x:float32[batch,words,3]", "y:float32[k,l,3]", {"three": ints(3)})
    counts, changes, _ = folded(before, words=4)
    assert counts == {"Shape": 2, "Concat": 1, "Reshape": 1} or counts == {"Shape": 1, "Concat": 1, "Reshape": 1}
    assert "1 left: Reshape to more than one size that only the input knows" in changes


def test_a_rest_beside_what_may_be_nothing():
    """[0, -1] is no shape where the first axis is 0; the batch never is, any other symbol may be."""
    nodes = [*size_of("x", 0, "n"), *size_of("x", 1, "w"), node("Mul", "n w", "nw"),
             node("Concat", "nw three", "t", axis=0), node("Reshape", "x t", "y", allowzero=1)]  # fmt: skip
    counts, _, after = folded(net(nodes, "x:float32[batch,words,3]", "y:float32[?,3]", {"three": ints(3)}), words=0)
    assert counts == {"Reshape": 1} and shape_of(after, "Reshape") == [-1, 3]
    nodes = [*size_of("x", 0, "n"), *size_of("x", 2, "w"), node("Mul", "w five", "w5"),
             node("Concat", "n w5", "t", axis=0), node("Reshape", "x t", "y", allowzero=1)]  # fmt: skip
    counts, _, after = folded(net(nodes, "x:float32[batch,5,words]", "y:float32[batch,?]", {"five": ints(5)}), words=0)
    assert counts == {"Reshape": 1} and shape_of(after, "Reshape") == [0, -1]
    nodes = [*size_of("x", 0, "n"), *size_of("x", 1, "w"), node("Mul", "n five", "n5"),
             node("Concat", "n5 w", "t", axis=0), node("Reshape", "x t", "y", allowzero=1)]  # fmt: skip
    counts, _, after = folded(net(nodes, "x:float32[batch,words,5]", "y:float32[k,words]", {"five": ints(5)}), words=0)
    assert counts["Concat"] == 1, "-1 beside words would divide 0 by 0"


def test_a_size_of_0_with_and_without_allowzero():
    """A stored 0 is a size with allowzero, and takes over the axis without."""
    nodes = [*size_of("x", 0, "n"), node("Concat", "n tail", "t", axis=0), node("Reshape", "x t", "y", allowzero=1)]
    before = net(nodes, "x:float32[batch,0,4]", "y:float32[batch,4,0]", {"tail": ints(4, 0)})
    counts, _, _ = folded(before)
    assert counts["Concat"] == 1, "axis 2 has 4 before and 0 after, and no list without allowzero can say so"
    before = net(nodes, "x:float32[batch,0,4]", "y:float32[batch,0,2]", {"tail": ints(0, 2)})
    counts, _, after = folded(before)
    assert counts == {"Reshape": 1} and shape_of(after, "Reshape") == [0, 0, 2]
    nodes[-1] = node("Reshape", "x t", "y")
    before = net(nodes, "x:float32[batch,3,4]", "y:float32[batch,3,4]", {"tail": ints(0, 4)})
    assert folded(before)[0] == {"Identity": 1}


def test_a_size_that_may_be_0_does_not_take_over_another_axis():
    """Reshape(x[6, words] to [words, -1]) is [6, 0] where there are no words: 0 takes over what the axis had."""
    nodes = [*size_of("x", 1, "w"), node("Concat", "w rest", "t", axis=0), node("Reshape", "x t", "r"),
             node("Shape", "r", "y")]  # fmt: skip
    before = net(nodes, "x:float32[6,words]", "y:int64[2]")
    folded(before, words=0)
    folded(before, words=4)


def test_symbols_are_equal_only_to_themselves():
    """Two inputs of two lengths: which one is longer, or 1, is nobody's guess."""
    nodes = [node("Shape", "b", "s"), node("Expand", "a s", "y")]
    before = net(nodes, "a:float32[m,4] b:float32[n,4]", "y:float32[?,4]")
    for m, n in ((1, 6), (6, 1), (3, 3)):
        assert folded(before, sizes=(1,), m=m, n=n)[0] == {"Shape": 1, "Expand": 1}
    before = net(nodes, "a:float32[m,4] b:float32[m,4]", "y:float32[m,4]")
    assert folded(before, sizes=(1,), m=3)[0] == {"Identity": 1}
    before = net(nodes, "a:float32[m,4] b:float32[6,4]", "y:float32[6,4]")
    for m in (1, 6):
        assert folded(before, sizes=(1,), m=m)[0] == {"Expand": 1}


# What only looks as if it did nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operator, inputs, weights, gone",
    [
        ("Slice", "x start end axes", {"start": ints(0), "end": ints(6), "axes": ints(1)}, True),
        ("Slice", "x start end axes", {"start": ints(0), "end": ints(2**63 - 1), "axes": ints(0)}, True),
        ("Slice", "x start end axes", {"start": ints(1), "end": ints(2**63 - 1), "axes": ints(0)}, False),
        ("Slice", "x start end axes step",
         {"start": ints(-1), "end": ints(-(2**63) + 1), "axes": ints(1), "step": ints(-1)}, False),
        ("Tile", "x times", {"times": ints(1, 1)}, True),
        ("Tile", "x times", {"times": ints(2, 1)}, False),
        ("Pad", "x pads", {"pads": ints(0, 0, 0, 0)}, True),
        ("Pad", "x pads", {"pads": ints(0, 1, 0, -1)}, False),
        ("Gather", "x all", {"all": np.arange(6)}, True),
        ("Gather", "x all", {"all": np.arange(6)[::-1].copy()}, False),
        ("Gather", "x all", {"all": ints(0, 1, 2, 3, 4, 4)}, False),
    ],
)  # fmt: skip
def test_operators_that_change_nothing(operator, inputs, weights, gone):
    attributes = {"axis": 1} if operator == "Gather" else {}
    nodes = [
        node("Relu", "x", "r"),
        node(operator, inputs.replace("x", "r", 1), "o", **attributes),
        node("Neg", "o", "y"),
    ]
    counts, _, _ = folded(net(nodes, "x:float32[batch,6]", "y:float32[?,6]", weights), sizes=(2, 7))
    assert counts == ({"Relu": 1, "Neg": 1} if gone else {"Relu": 1, operator: 1, "Neg": 1})


def test_transposes_of_square_tensors_stay():
    nodes = [
        node("Transpose", "x", "t", perm=[0, 2, 1]),
        node("Transpose", "t", "u", perm=[0, 1, 2]),
        node("Relu", "u", "y"),
    ]
    assert folded(net(nodes, "x:float32[batch,6,6]", "y:float32[batch,6,6]"))[0] == {"Transpose": 1, "Relu": 1}


def test_a_tensor_of_unknown_rank_stays():
    nodes = [node("Reshape", "x t", "r"), *size_of("z", 0, "n"), node("Concat", "n rest", "u", axis=0),
             node("Reshape", "r u", "y")]  # fmt: skip
    made = net(nodes, "x:float32[batch,6] z:float32[batch,2] t:int64[k]", "y:float32[?,?]")
    after, changes = run_twice(FoldShapes(), made)
    assert "1 left: nobody knows the shape of what Reshape is given" in changes
    batch = {"x": weight(2, 6), "z": weight(2, 2), "t": ints(3, 2, 2)}
    np.testing.assert_array_equal(outputs(made, batch)["y"], outputs(after, batch)["y"])


def test_squeeze_after_unsqueeze():
    nodes = [node("Unsqueeze", "x one", "u"), node("Squeeze", "u one", "s"), node("Neg", "s", "y")]
    assert folded(net(nodes, "x:float32[batch,6]", "y:float32[batch,6]"))[0] == {"Neg": 1}
    # The same size, but an element for another where the first axis isn't 1.
    nodes = [node("Transpose", "x", "t", perm=[1, 0]), node("Reshape", "t six", "s"), node("Neg", "s", "y")]
    assert folded(net(nodes, "x:float32[batch,6]", "y:float32[?,6]", {"six": ints(-1, 6)}))[0]["Transpose"] == 1


def expanded(after_it, shape="batch,6,6", seen="m"):
    """x + Where(Expand(mask), …), or something else `after_it`."""
    nodes = [
        *size_of("x", 0, "n"), node("Concat", "n six six", "t", axis=0), node("Greater", "m nothing", "g"),
        node("Expand", "g t", "e"), *after_it,
    ]  # fmt: skip
    weights = {"six": ints(6), "nothing": np.float32(0), "low": np.float32(-9)}
    return net(nodes, "x:float32[batch,6,6] m:float32[batch,1,6]", f"y:float32[{shape}]", weights)


def test_an_expand_goes_where_others_repeat():
    counts, _, _ = folded(expanded([node("Where", "e nothing low", "w"), node("Add", "x w", "y")]))
    assert counts == {"Greater": 1, "Where": 1, "Add": 1}


@pytest.mark.parametrize(
    "after_it",
    [
        [node("Where", "e nothing low", "w"), node("ReduceSum", "w", "q", keepdims=1), node("Add", "x q", "y")],
        [node("Where", "e nothing low", "w"), node("MatMul", "x w", "y")],
        [node("Where", "e nothing low", "y")],
        [node("Where", "e nothing low", "w"), node("Softmax", "w", "q", axis=1), node("Add", "x q", "y")],
        [node("Where", "e nothing low", "w"), node("Relu", "w", "v"), node("Add", "x w", "s"), node("CumSum", "v axis1", "c"),
         node("Add", "s c", "y")],
    ],
)  # fmt: skip
def test_an_expand_that_somebody_needs_stays(after_it):
    counts, _, _ = folded(expanded(after_it))
    assert counts["Expand"] == 1


def attention_mask(rows, columns):
    """m[1, 1, rows, columns] > … expanded to [batch, 1, 6, 6] for Attention."""
    nodes = [
        *size_of("q", 0, "n"), node("Concat", "n sizes", "t", axis=0), node("Greater", "m nothing", "g"),
        node("Expand", "g t", "e"), node("Attention", "q q q e", "y"),
    ]  # fmt: skip
    spec = f"q:float32[batch,2,6,4] m:float32[1,1,{rows},{columns}]"
    return net(nodes, spec, "y:float32[batch,2,6,4]", {"sizes": ints(1, 6, 6), "nothing": np.float32(-9)})


def test_an_expand_goes_where_attention_repeats():
    assert folded(attention_mask(6, 6))[0] == {"Greater": 1, "Attention": 1}


@pytest.mark.parametrize("rows, columns, sizes", [(1, 6, [1, 1, 6, 1]), (6, 1, [1, 1, 1, 6])])
def test_an_expand_goes_in_part(rows, columns, sizes):
    """ONNX Runtime repeats a mask for items and heads, not for the rows or columns: what is left has known sizes."""
    counts, _, after = folded(attention_mask(rows, columns))
    assert counts == {"Greater": 1, "Expand": 1, "Attention": 1} and shape_of(after, "Expand") == sizes


def test_a_table_of_positions_cut_to_an_open_length():
    """The stretch of a table that is as long as the input is cut off at the table's end; beside the input it isn't."""
    nodes = [
        *size_of("x", 1, "w"), node("Slice", "table zero w one", "p"), node("Add", "x p", "a"),
        *size_of("a", 0, "n"), *size_of("a", 1, "m"), node("Concat", "n m two rest", "t", axis=0), node("Reshape", "a t", "y"),
    ]  # fmt: skip
    weights = {"table": weight(1, 9, 4), "two": ints(2)}
    counts, _, after = folded(net(nodes, "x:float32[batch,words,4]", "y:float32[batch,words,2,2]", weights), words=5)
    assert counts == {"Shape": 1, "Slice": 1, "Add": 1, "Reshape": 1}
    assert shape_of(after, "Reshape") == [0, 0, 2, 2]


def test_truth_that_only_repeats():
    """And with all true, Or with all false."""
    nodes = [node("Greater", "m nothing", "g"), node("And", "yes g", "a"), node("Or", "a no", "o"),
             node("Where", "o nothing low", "w"), node("Add", "x w", "y")]  # fmt: skip
    weights = {
        "nothing": np.float32(0),
        "low": np.float32(-9),
        "yes": np.ones((1, 6, 1), bool),
        "no": np.zeros((1, 1, 1), bool),
    }
    spec = "x:float32[batch,6,6] m:float32[batch,1,6]", "y:float32[batch,6,6]"
    assert folded(net(nodes, *spec, weights))[0] == {"Greater": 1, "Where": 1, "Add": 1}
    weights["yes"] = np.array([True] * 5 + [False]).reshape(1, 6, 1)
    weights["no"] = np.ones((1, 1, 1), bool)
    counts = folded(net(nodes, *spec, weights))[0]
    assert counts["And"] == 1 and counts["Or"] == 1


# What is kept ---------------------------------------------------------------------------------------------------------


def test_sizes_that_are_outputs():
    nodes = [
        *size_of("x", 0, "n"),
        *size_of("x", 1, "w"),
        node("Concat", "n w", "s", axis=0),
        node("Reshape", "x s", "y"),
    ]
    after = folded(net(nodes, "x:float32[batch,6]", "y:float32[batch,6] s:int64[2] w_size:int64[]"))[2]
    assert [value.name for value in after.model.graph.outputs] == ["y", "s", "w_size"]


def test_a_weight_that_can_be_fed_is_not_believed():
    made = build([node("Reshape", "x t", "y")], "x:float32[batch,6] t:int64[2]", "y:float32[?,?]", {"t": ints(-1, 3)})
    after, _ = run_twice(FoldShapes(), made)
    batch = {"x": weight(2, 6), "t": ints(3, 4)}
    assert outputs(after, batch)["y"].shape == (3, 4)


def test_shapes_inside_a_file_are_not_believed():
    """A wrong value_info says [batch, 5]; the Reshape to what the tensor really has stays right."""
    nodes = [node("NonZero", "x", "z"), node("Shape", "z", "s"), node("Reshape", "z s", "r"),
             node("ConstantOfShape", "s", "c"), node("Cast", "r", "f", to=FLOAT), node("Add", "f c", "y")]  # fmt: skip
    made = net(nodes, "x:float32[batch,6]", "y:float32[2,?]", inner="z:int64[2,n]")
    after, _ = run_twice(FoldShapes(), made)
    for rows in (1, 4):
        batch = {"x": (weight(rows, 6) > 0).astype(np.float32)}
        np.testing.assert_array_equal(outputs(made, batch)["y"], outputs(after, batch)["y"])


@pytest.mark.parametrize("make", [mlp, transformer, control_flow])
def test_models_without_arithmetic_on_shapes_stay(make):
    after, changes = run_twice(FoldShapes(), before := make())
    assert after is before and changes == []


def test_sizes_that_a_branch_uses():
    """A value that only a subgraph uses is needed as well."""
    branch = helper.make_graph(
        [node("Reshape", "x t", "o")], "b", [], [helper.make_tensor_value_info("o", FLOAT, [None] * 2)]
    )
    other = helper.make_graph(
        [node("Flatten", "x", "p")], "c", [], [helper.make_tensor_value_info("p", FLOAT, [None] * 2)]
    )
    nodes = [
        *size_of("x", 0, "n"), node("Concat", "n six", "t", axis=0), node("ReduceSum", "x", "sum", keepdims=0),
        node("Greater", "sum nothing", "c"), node("If", "c", "y", then_branch=branch, else_branch=other),
    ]  # fmt: skip
    made = build(nodes, "x:float32[batch,2,3]", "y:float32[?,?]",
                 used(nodes, {**AXES, "six": ints(6), "nothing": np.float32(0)}))  # fmt: skip
    counts, _, _ = folded(made)
    assert counts["Shape"] == 1 and counts["Concat"] == 1 and "Gather" not in counts


def test_types_and_shapes_are_written_down():
    _, _, after = folded(heads())
    text = printed(after)
    assert "t:float[batch,2,6,4] = Transpose" in text and "u:float[batch,6,2,4] = Transpose" in text


def test_sizes_are_read_once():
    """Two computed shapes share what they read off the input."""
    nodes = [
        *size_of("x", 0, "n"), node("Concat", "n one six", "s", axis=0), node("Expand", "a s", "e"),
        *size_of("e", 0, "m"), node("Mul", "m two", "m2"), node("Concat", "m2 six", "t", axis=0), node("Expand", "b t", "f"),
        node("ReduceSum", "e", "y", keepdims=0), node("ReduceSum", "f", "z", keepdims=0),
    ]  # fmt: skip
    weights = {"a": weight(1, 1, 6), "b": weight(1, 6), "six": ints(6), "two": ints(2)}
    counts, _, _ = folded(net(nodes, "x:float32[batch,3]", "y:float32[] z:float32[]", weights))
    assert counts == {"Shape": 1, "Mul": 1, "Concat": 2, "Expand": 2, "ReduceSum": 2}


# Random programs ------------------------------------------------------------------------------------------------------


@given(programs())
def test_random_programs(program):
    """Whatever is folded of a random program on shapes, its outputs are the same at batch sizes 1, 2 and 7."""
    before = program.artifact()
    after, _ = run_twice(FoldShapes(), before)
    assert sum(after.operator_counts().values()) <= sum(before.operator_counts().values())
    for batch in program.batches():
        for (name, old), new in zip(outputs(before, batch).items(), outputs(after, batch).values(), strict=True):
            np.testing.assert_array_equal(old, new, err_msg=f"{name}\n{printed(before)}\n{printed(after)}")


@given(st.integers(1, 3), st.sampled_from([(6,), (2, 3), (1, 6), (3, 1, 2)]), st.booleans())
def test_reshape_and_back_in_random_factors(rank, tail, rest):
    """x[batch, …] to [batch · a, b] and back, the batch read off in between."""
    nodes = [
        *size_of("x", 0, "n"), node("Mul", "n two", "n2"), node("Concat", "n2 rest" if rest else "n2 three", "t", axis=0),
        node("Reshape", "x t", "r"), node("Relu", "r", "a"), *size_of("a", 0, "m"), node("Div", "m two", "half"),
        node("Concat", "half tail", "u", axis=0), node("Reshape", "a u", "y"),
    ]  # fmt: skip
    dims = ",".join(map(str, tail))
    weights = {"two": ints(2), "three": ints(3), "tail": ints(*tail)}
    counts, _, _ = folded(net(nodes, f"x:float32[batch,{dims}]", f"y:float32[batch,{dims}]", weights))
    assert counts == {"Reshape": 2, "Relu": 1}


def test_the_result_is_a_model_that_saves(tmp_path):
    after = folded(heads())[2]
    ir.save(after.model, tmp_path / "m.onnx")
    assert ir.load(tmp_path / "m.onnx").graph.num_nodes() == 5
