"""Placement: which values are quantized, who reads them so, who shares a scale; and what is left alone."""

import numpy as np
import pytest
from models import build, control_flow, node, transformer, weight
from onnx import helper

from perwatt.passes._placement import out_axis, place, products

IMAGE = "x:float32[batch,4,8,8]"
INTEGER = ("Add", "AveragePool", "GlobalAveragePool", "Concat")


def conv(source, out, kernel="w", **attributes):
    return node("Conv", f"{source} {kernel}", out, name=out, pads=[1] * 4, **attributes)


def net(
    *nodes, out="float32[batch,?,?,?]", inner="", given=IMAGE, weights=None, shapes="float32[batch,4,8,8]", opset=23
):
    """A checked model; every value that no `inner` names has `shapes`, y has `out`."""
    named = {part.split(":")[0] for part in inner.split()}
    names = [name for each in nodes for name in each.output if name and name != "y" and name not in named]
    known = " ".join([inner, *(f"{name}:{shapes}" for name in names)])
    held = {"w": weight(4, 4, 3, 3), "v": weight(4, 4, 3, 3, seed=1), **(weights or {})}
    used = {name for each in nodes for name in each.input}
    held = {name: array for name, array in held.items() if name in used}
    return build(nodes, given, f"y:{out}", held, inner=known, opset=opset)


def placed(artifact, others=(), excluded=()):
    """({value: its readers as `Operator` or `Operator:position`}, groups of more than one, number of weights)."""
    graph = artifact.model.graph
    chosen = [product for product in products(graph) if product.node.name not in excluded]
    found = place(graph, chosen, others, excluded)
    readers = {
        name: sorted(n.op_type + (f":{i}" if i else "") for n, i in site.uses) for name, site in found.sites.items()
    }
    shared = [sorted(site.value.name for site in group) for group in found.groups() if len(group) > 1]
    return readers, sorted(shared), len(found.weights)


def test_one_value_with_several_readers_is_quantized_once():
    made = net(conv("x", "a"), conv("x", "b", "v"), node("Add", "a b", "y"))
    assert placed(made) == ({"x": ["Conv", "Conv"]}, [], 2)
    assert placed(made, INTEGER) == ({"x": ["Conv", "Conv"], "a": ["Add"], "b": ["Add:1"]}, [], 2)


def test_a_residual_block_reads_its_shortcut_in_integers_where_additions_are_wanted():
    made = net(
        conv("x", "a"), node("Relu", "a", "r"), conv("r", "b", "v"), node("Add", "b r", "s"), node("Relu", "s", "y")
    )
    assert placed(made)[0] == {"x": ["Conv"], "r": ["Conv"]}
    assert placed(made, INTEGER)[0] == {"x": ["Conv"], "r": ["Add:1", "Conv"], "b": ["Add"]}


def test_the_same_value_twice_is_one_site():
    made = net(conv("x", "a"), node("Add", "a a", "s"), conv("s", "y", "v"))
    assert placed(made, INTEGER)[0] == {"x": ["Conv"], "a": ["Add", "Add:1"], "s": ["Conv"]}


def test_operators_far_from_all_products_stay():
    made = net(node("Sigmoid", "x", "g"), node("Add", "g g", "s"), node("Sin", "s", "t"), conv("t", "y"))
    assert placed(made, INTEGER)[0] == {"t": ["Conv"]}


@pytest.mark.parametrize(
    "moving",
    [
        node("MaxPool", "x", "m", kernel_shape=[2, 2]), node("Transpose", "x", "m", perm=[0, 1, 3, 2]),
        node("Reshape", "x shape", "m"), node("Pad", "x pads", "m"), node("Pad", "x pads zero", "m"),
        node("Pad", "x pads", "m", mode="reflect"), node("Slice", "x first last", "m"), node("Gather", "x picked", "m", axis=1),
        node("Tile", "x repeats", "m"), node("Expand", "x shape", "m"), node("Identity", "x", "m"),
        node("SpaceToDepth", "x", "m", blocksize=1),
    ],
    ids=lambda n: n.op_type,
)  # fmt: skip
def test_what_only_moves_values_moves_integers(moving):
    weights = {
        "shape": np.array([-1, 4, 8, 8]), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "zero": np.float32(0),
        "first": np.array([0, 0, 0, 0]), "last": np.array([9, 9, 7, 7]), "picked": np.array([0, 1, 2, 3]),
        "repeats": np.array([1, 1, 2, 2]),
    }  # fmt: skip
    if moving.op_type == "Expand":
        weights["shape"] = np.array([1, 4, 8, 8])
    made = net(moving, conv("m", "y"), weights=weights, shapes="float32[batch,4,?,?]")
    assert placed(made)[0] == {"x": [moving.op_type]}


def test_a_chain_of_moves_is_gone_up_to_its_beginning():
    made = net(
        node("Relu", "x", "r"),
        node("MaxPool", "r", "m", kernel_shape=[1, 1]),
        node("Identity", "m", "i"),
        conv("i", "y"),
    )
    assert placed(made)[0] == {"r": ["MaxPool"]}


@pytest.mark.parametrize(
    "other",
    [
        node("Pad", "x pads one", "m"), node("AveragePool", "x", "m", kernel_shape=[1, 1]), node("Relu", "x", "m"),
        node("Resize", "x - scales", "m"), node("MatMul", "x x", "m"), node("GatherND", "x where", "m", batch_dims=1),
    ],
    ids=lambda n: n.op_type,
)  # fmt: skip
def test_what_calculates_is_not_gone_through(other):
    weights = {
        "pads": np.array([0] * 8), "one": np.float32(1), "scales": np.float32([1, 1, 1, 1]), "where": np.array([[[[0]]]]),
    }  # fmt: skip
    made = net(other, conv("m", "y"), weights=weights)
    assert placed(made)[0].get("m") == ["Conv"]


def test_what_others_read_too_is_quantized_behind_the_move():
    pool = node("MaxPool", "x", "m", kernel_shape=[1, 1])
    assert placed(net(pool, conv("m", "a"), node("Add", "a m", "y")))[0] == {"m": ["Conv"]}
    # Additions in integers read it too: then nobody is left that doesn't.
    assert placed(net(pool, conv("m", "a"), node("Add", "a m", "y")), INTEGER)[0] == {"x": ["MaxPool"], "a": ["Add"]}
    both = net(pool, conv("m", "a"), conv("m", "b", "v"), node("Add", "a b", "y"))
    assert placed(both)[0] == {"x": ["MaxPool"]}
    assert placed(both, excluded=("b",))[0] == {"m": ["Conv"]}


def test_an_output_of_the_model_is_nobody_s_to_round():
    nodes = [node("MaxPool", "x", "m", kernel_shape=[1, 1]), conv("m", "y")]
    made = build(nodes, IMAGE, "y:float32[batch,4,8,8] m:float32[batch,4,8,8]", {"w": weight(4, 4, 3, 3)})
    assert placed(made)[0] == {"m": ["Conv"]}


def test_indices_of_a_pooling_would_be_others_after_rounding():
    nodes = [node("MaxPool", "x", "m places", kernel_shape=[2, 2]), conv("m", "y")]
    spec = "y:float32[batch,4,7,7] places:int64[batch,4,7,7]"
    made = build(nodes, IMAGE, spec, {"w": weight(4, 4, 3, 3)}, inner="m:float32[batch,4,7,7]")
    assert placed(made)[0] == {"m": ["Conv"]}


def test_what_a_concatenation_joins_is_quantized_alike():
    made = net(
        conv("x", "a"), node("Relu", "a", "r"), node("Concat", "r x", "c", axis=1), conv("c", "y", "k"),
        weights={"k": weight(4, 8, 3, 3)}, inner="c:float32[batch,8,8,8]",
    )  # fmt: skip
    readers, shared, _ = placed(made)
    # x has one scale for all its readers, and r the same.
    assert readers == {"x": ["Concat:1", "Conv"], "r": ["Concat"]} and shared == [["r", "x"]]


def test_what_meets_in_two_concatenations_is_one_group():
    made = net(
        node("Relu", "x", "a"), node("Neg", "x", "b"), node("Abs", "x", "c"),
        node("Concat", "a b", "ab", axis=1), node("Concat", "b c", "bc", axis=1),
        conv("ab", "p", "k"), conv("bc", "q", "k"), node("Add", "p q", "y"),
        weights={"k": weight(4, 8, 3, 3)}, inner="ab:float32[batch,8,8,8] bc:float32[batch,8,8,8]",
    )  # fmt: skip
    readers, shared, count = placed(made)
    assert shared == [["a", "b", "c"]] and count == 2
    assert readers == {"a": ["Concat"], "b": ["Concat", "Concat:1"], "c": ["Concat:1"]}


def test_a_concatenation_with_a_stored_part_is_quantized_as_a_whole():
    made = net(
        node("Relu", "x", "r"), node("Concat", "r kept", "c", axis=0), conv("c", "y"),
        weights={"kept": weight(1, 4, 8, 8)}, inner="c:float32[?,4,8,8]",
    )  # fmt: skip
    assert placed(made)[0] == {"c": ["Conv"]}


def split(*readers):
    nodes = [node("Split", "x halves", "a b", axis=1), conv("a", "p", "k"), *readers]
    return net(
        *nodes, weights={"halves": np.array([2, 2]), "k": weight(2, 2, 3, 3)}, shapes="float32[batch,2,8,8]",
        out="float32[batch,2,8,8]",
    )  # fmt: skip


def test_a_split_is_gone_through_where_all_its_parts_are_read_quantized():
    assert placed(split(conv("b", "q", "k"), node("Add", "p q", "y")))[0] == {"x": ["Split"]}
    assert placed(split(node("Add", "p b", "y")))[0] == {"a": ["Conv"]}


def test_attention_quantizes_both_sides_of_its_products():
    readers, _, count = placed(transformer())
    # What goes into the first projection is turned into keys and is values as well: one pair for all.
    assert readers == {"l": ["MatMul", "MatMul:1", "Transpose"], "q": ["MatMul"], "a": ["MatMul"], "o": ["MatMul"]}
    assert count == 2


def test_products_of_two_inputs_and_products_of_every_rank():
    for left, right, out in (
        ("[batch,2,3,4]", "[batch,2,4,5]", "[batch,2,3,5]"),
        ("[4]", "[4]", "[]"),
        ("[4]", "[4,5]", "[5]"),
    ):
        made = build([node("MatMul", "a b", "y")], f"a:float32{left} b:float32{right}", f"y:float32{out}")
        assert placed(made) == ({"a": ["MatMul"], "b": ["MatMul:1"]}, [], 0)


@pytest.mark.parametrize(
    "made",
    [
        # A stored left side, a stored vector or batch of matrices, weights or data of other types, of another domain.
        build([node("MatMul", "w x", "y")], "x:float32[4,5]", "y:float32[3,5]", {"w": weight(3, 4)}),
        build([node("MatMul", "x w", "y")], "x:float32[batch,4]", "y:float32[batch]", {"w": weight(4)}),
        build([node("MatMul", "x w", "y")], "x:float32[2,3,4]", "y:float32[2,3,5]", {"w": weight(2, 4, 5)}),
        build([node("MatMul", "x w", "y")], "x:float64[batch,4]", "y:float64[batch,5]", {"w": weight(4, 5, dtype=np.float64)}),
        build([node("MatMul", "x w", "y")], "x:float16[batch,4]", "y:float16[batch,5]", {"w": weight(4, 5, dtype=np.float16)}),
        build([node("MatMul", "x w", "y")], "x:int32[batch,4]", "y:int32[batch,5]", {"w": np.ones((4, 5), np.int32)}),
        build([node("Conv", "x w", "y")], "x:float32[batch,4,8,8] w:float32[4,4,3,3]", "y:float32[batch,4,6,6]"),
        build([node("Gemm", "x w", "y")], "x:float32[batch,4] w:float32[4,3]", "y:float32[batch,3]"),
    ],
)  # fmt: skip
def test_what_is_left_alone(made):
    assert products(made.model.graph) == []


def test_products_in_branches_are_left_alone():
    def branch(name, *nodes):
        return helper.make_graph(list(nodes), name, [], [helper.make_tensor_value_info("o", 1, ["batch", 4])])

    yes, no = branch("t", node("MatMul", "p w", "o")), branch("e", node("Relu", "p", "o"))
    nodes = [
        node("ReduceSum", "x", "sum", keepdims=0), node("Cast", "sum", "yes", to=9), node("MatMul", "x w", "p"),
        node("If", "yes", "y", then_branch=yes, else_branch=no),
    ]  # fmt: skip
    made = build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", {"w": weight(4, 4)})
    assert placed(made) == ({"x": ["MatMul"]}, [], 1)
    assert placed(control_flow()) == ({}, [], 0)


def test_a_moved_value_that_a_branch_reads_is_quantized_behind_the_move():
    branch = [
        helper.make_graph([node("Relu", "m", "o")], name, [], [helper.make_tensor_value_info("o", 1, ["batch", 4])])
        for name in ("t", "e")
    ]
    nodes = [
        node("Identity", "x", "m"), node("MatMul", "m w", "p"), node("ReduceSum", "p", "sum", keepdims=0),
        node("Cast", "sum", "yes", to=9), node("If", "yes", "q", then_branch=branch[0], else_branch=branch[1]),
        node("Add", "p q", "y"),
    ]  # fmt: skip
    made = build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", {"w": weight(4, 4)}, inner="m:float32[batch,4]")
    assert placed(made)[0] == {"m": ["MatMul"]}


def test_operators_read_only_what_is_computed_and_float():
    made = net(node("Add", "x b", "s"), conv("s", "y"), weights={"b": weight(4, 1, 1)})
    assert placed(made, INTEGER)[0] == {"s": ["Conv"]}
    nodes = [
        node("Add", "n n", "m"), node("Cast", "m", "f", to=1), node("MatMul", "f w", "p"), node("Add", "p f", "y"),
    ]  # fmt: skip
    inner = "m:int64[batch,4] f:float32[batch,4] p:float32[batch,4]"
    made = build(nodes, "n:int64[batch,4]", "y:float32[batch,4]", {"w": weight(4, 4)}, inner=inner)
    assert placed(made, INTEGER)[0] == {"f": ["Add:1", "MatMul"], "p": ["Add"]}


def test_excluded_operators_stay():
    made = net(conv("x", "a"), node("Add", "a x", "s", name="sum"), conv("s", "y", "v"))
    assert placed(made, INTEGER)[0] == {"x": ["Add:1", "Conv"], "a": ["Add"], "s": ["Conv"]}
    assert placed(made, INTEGER, ("sum",))[0] == {"x": ["Conv"], "s": ["Conv"]}
    assert placed(made, INTEGER, ("sum", "y", "a"))[0] == {}


@pytest.mark.parametrize(
    ("operator", "shape", "attributes", "axis"),
    [
        ("Conv", (6, 4, 3, 3), {}, 0), ("Conv", (4, 1, 3, 3), {"group": 4}, 0), ("ConvTranspose", (4, 6, 3, 3), {}, 1),
        ("ConvTranspose", (4, 3, 3, 3), {"group": 2}, None), ("Gemm", (8, 5), {}, 1), ("Gemm", (5, 8), {"transB": 1}, 0),
        ("MatMul", (8, 5), {}, 1),
    ],
)  # fmt: skip
def test_scales_run_along_output_channels(operator, shape, attributes, axis):
    spec = IMAGE if len(shape) == 4 else "x:float32[batch,8]"
    out = "y:float32[batch,?,?,?]" if len(shape) == 4 else "y:float32[batch,5]"
    made = build([node(operator, "x w", "y", **attributes)], spec, out, {"w": weight(*shape)})
    (product,) = products(made.model.graph)
    found = out_axis(product)
    assert found == axis or (found is not None and found % len(shape) == axis)
