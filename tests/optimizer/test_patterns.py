"""The language of patterns: what matches and what does not, orders, alternatives, and questions about values."""

from itertools import permutations, product

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from models import build, control_flow, node, value, weight
from onnx import helper, numpy_helper

from perwatt.patterns import (
    Either,
    Match,
    Number,
    Op,
    Var,
    axes_of,
    dims,
    from_the_end,
    given,
    is_number,
    is_stored,
    made_by,
    maybe,
    number,
    numbers,
    occurrences,
    only_user,
    rank,
    size,
    stored,
)  # fmt: skip

X, Y = Var("x"), Var("y")


def graph_of(*nodes, weights=None, inputs="a:float32[n,4] b:float32[n,4]", outputs="y:float32[n,4]", opset=23):
    """{name: value} of a graph with these nodes."""
    graph = build(list(nodes), inputs, outputs, weights, opset=opset).model.graph
    found = {v.name: v for n in graph for v in n.outputs}
    return found | {v.name: v for v in (*graph.inputs, *graph.initializers.values())}


def found(pattern, values, root="y"):
    """What the names are bound to, by name, for every occurrence."""
    matches = occurrences(pattern, values[root].producer())
    return [{name: v.name for name, v in match.values.items()} for match in matches]


# What matches ---------------------------------------------------------------------------------------------------------


def test_a_commutative_operator_matches_in_both_orders_and_others_in_one():
    total = graph_of(node("Neg", "a", "m"), node("Add", "m b", "y"))
    assert found(Op("Add", Op("Neg", X), Y), total) == [{"x": "a", "y": "b"}]
    assert found(Op("Add", Y, Op("Neg", X)), total) == [{"x": "a", "y": "b"}]
    gap = graph_of(node("Neg", "a", "m"), node("Sub", "m b", "y"))
    assert found(Op("Sub", Op("Neg", X), Y), gap) == [{"x": "a", "y": "b"}]
    assert found(Op("Sub", Y, Op("Neg", X)), gap) == []


def test_a_name_stands_for_one_value():
    assert found(Op("Mul", X, X), graph_of(node("Mul", "a b", "y"))) == []
    assert found(Op("Mul", X, X), graph_of(node("Mul", "a a", "y")))[0] == {"x": "a"}
    # Two names may stand for one value.
    assert {"x": "a", "y": "a"} in found(Op("Mul", X, Y), graph_of(node("Mul", "a a", "y")))


def test_an_order_that_goes_wrong_later_is_taken_back():
    values = graph_of(node("Neg", "a", "m"), node("Add", "m a", "y"))
    assert found(Op("Add", X, Op("Neg", X)), values) == [{"x": "a"}]


def test_an_alternative_that_goes_wrong_later_is_taken_back():
    gate = Either(Op("Relu", X), Op("Relu", Op("Neg", X)), X)
    values = graph_of(node("Neg", "a", "m"), node("Relu", "m", "r"), node("Sub", "r a", "y"))
    assert found(Op("Sub", gate, X), values) == [{"x": "a"}]
    # Both lead to a match: the first comes first, and the others after it.
    either = found(Op("Relu", Either(Op("Neg", X), X)), graph_of(node("Neg", "a", "m"), node("Relu", "m", "y")))
    assert either == [{"x": "a"}, {"x": "m"}]


def test_maybe_takes_the_operator_where_it_is():
    pattern = Op("Relu", maybe("Neg|Abs", X))
    assert found(pattern, graph_of(node("Relu", "a", "y"))) == [{"x": "a"}]
    assert found(pattern, graph_of(node("Abs", "a", "m"), node("Relu", "m", "y")))[0] == {"x": "a"}


def test_one_op_object_is_one_node_and_two_equal_ones_may_be_two():
    one, other = Op("Exp", X), Op("Exp", X)
    shared = graph_of(node("Exp", "a", "e"), node("Neg", "e", "m"), node("Add", "e m", "y"))
    twice = graph_of(node("Exp", "a", "e"), node("Exp", "a", "f"), node("Neg", "f", "m"), node("Add", "e m", "y"))
    assert found(Op("Add", one, Op("Neg", one)), shared) and not found(Op("Add", one, Op("Neg", one)), twice)
    assert found(Op("Add", one, Op("Neg", other)), shared) and found(Op("Add", one, Op("Neg", other)), twice)
    match = next(occurrences(Op("Add", one, Op("Neg", other)), shared["y"].producer()))
    assert [n.op_type for n in match.nodes] == ["Add", "Exp", "Neg"], "a node that two patterns stand for is there once"


def test_inputs_left_over_don_t_match_unless_dots_allow_them():
    clip = graph_of(node("Clip", "a low high", "y"), weights={"low": np.float32(0), "high": np.float32(6)})
    assert not found(Op("Clip", X), clip) and not found(Op("Clip", X, Number(0)), clip)
    assert found(Op("Clip", X, ...), clip) == found(Op("Clip", X, Number(0), ...), clip) == [{"x": "a"}]
    assert found(Op("Clip", X, Number(0), Number(6), ...), clip) == [{"x": "a"}]
    assert not found(Op("Clip", X, Number(0), Number(6), Y, ...), clip)


def test_dots_leave_a_commutative_operator_both_orders():
    values = graph_of(node("Neg", "a", "m"), node("Add", "b m", "y"))
    assert found(Op("Add", Op("Neg", X), ...), values) == [{"x": "a"}]


def test_none_stands_for_an_input_that_is_left_out():
    open_below = graph_of(node("Clip", "a - high", "y"), weights={"high": np.float32(6)})
    both = graph_of(node("Clip", "a low high", "y"), weights={"low": np.float32(0), "high": np.float32(6)})
    assert found(Op("Clip", X, None, Number(6)), open_below) == [{"x": "a"}]
    assert not found(Op("Clip", X, None, Number(6)), both) and not found(Op("Clip", X, Y, Number(6)), open_below)


def test_conditions_on_values_and_nodes():
    values = graph_of(node("Softmax", "a", "y", axis=1))
    assert found(Op("Softmax", Var("x", where=lambda v: v.is_graph_input())), values)
    assert not found(Op("Softmax", Var("x", where=lambda v: v.is_initializer())), values)
    assert found(Op("Softmax", X, where=lambda n: n.attributes.get_int("axis", -1) == 1), values)
    assert not found(Op("Softmax", X, where=lambda n: n.attributes.get_int("axis", -1) == 0), values)


def test_only_the_first_output_and_only_onnx_s_own_domain():
    values = graph_of(
        node("TopK", "a k", "best where"), node("Neg", "best", "m"), node("Abs", "where", "i"),
        weights={"k": np.int64([2])}, outputs="m:float32[n,2] i:int64[n,2]",
    )  # fmt: skip
    assert found(Op("Neg", Op("TopK", X, ...)), values, "m") and not found(Op("Abs", Op("TopK", X, ...)), values, "i")
    values["m"].producer().domain = "elsewhere"
    assert not found(Op("Neg", X), values, "m")


def test_nodes_and_values_by_name():
    values = graph_of(node("Exp", "a", "e"), node("Add", "e one", "y"), weights={"one": np.float32([[1]])})
    match = next(occurrences(Op("Add", Op("Exp", X, name="exp"), Number(1, name="one")), values["y"].producer()))
    assert match.named["exp"] is values["e"].producer() and match["one"] is values["one"] and match.get("none") is None


# Random trees against an independent oracle ---------------------------------------------------------------------------

LEAVES = ["a", "b", "c"]
UNARY, COMMUTING, ORDERED = ["Neg", "Exp"], ["Add", "Mul"], ["Sub", "Div"]


def trees():
    leaf = st.sampled_from(LEAVES)
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.tuples(st.sampled_from(UNARY), inner), st.tuples(st.sampled_from(COMMUTING + ORDERED), inner, inner)
        ),
        max_leaves=6,
    ).filter(lambda tree: isinstance(tree, tuple))


def canonical(tree, names):
    """Text that is equal for trees that differ in nothing but the order of commuting operands."""
    if isinstance(tree, str):
        return names[tree]
    parts = [canonical(part, names) for part in tree[1:]]
    return f"{tree[0]}({','.join(sorted(parts) if tree[0] in COMMUTING else parts)})"


def leaves(tree):
    return {tree} if isinstance(tree, str) else set().union(*(leaves(part) for part in tree[1:]))


def pattern_of(tree):
    return Var(tree) if isinstance(tree, str) else Op(tree[0], *(pattern_of(part) for part in tree[1:]))


def nodes_of(tree, out, made):
    """Nodes that compute `tree` into `out`, appended to `made`."""
    names = []
    for number_of_part, part in enumerate(tree[1:]):
        name = part if isinstance(part, str) else f"{out}{number_of_part}"
        names.append(name)
        if not isinstance(part, str):
            nodes_of(part, name, made)
    made.append(node(tree[0], " ".join(names), out))
    return made


@for_all(wanted=trees(), there=trees(), same=st.booleans(), flips=st.randoms(use_true_random=False))
def test_trees_match_exactly_where_they_are_equal_but_for_the_order_of_commuting_operands(wanted, there, same, flips):
    def flipped(tree):
        if isinstance(tree, str):
            return tree
        parts = [flipped(part) for part in tree[1:]]
        return (tree[0], *(parts[::-1] if tree[0] in COMMUTING and flips.random() < 0.5 else parts))

    there = flipped(wanted) if same else there
    inputs = " ".join(f"{name}:float32[n,4]" for name in LEAVES)
    values = graph_of(*nodes_of(there, "y", []), inputs=inputs)
    # A name of the pattern may stand for any subtree of the graph.
    inside = {canonical(tree, dict(zip(LEAVES, LEAVES, strict=True))) for tree in subtrees(there)}
    free = sorted(leaves(wanted))
    stands_for = (dict(zip(free, texts, strict=True)) for texts in product(sorted(inside), repeat=len(free)))
    goal = canonical(there, dict(zip(LEAVES, LEAVES, strict=True)))
    expected = any(canonical(wanted, names) == goal for names in stands_for)
    # Two equal subtrees are two values: a name that is there twice wants one.
    if expected and len(set(texts_of(there))) < len(texts_of(there)):
        return
    assert bool(found(pattern_of(wanted), values)) == expected


def subtrees(tree):
    return [tree] if isinstance(tree, str) else [tree, *(s for part in tree[1:] for s in subtrees(part))]


def texts_of(tree):
    """The text of every computed subtree."""
    plain = dict(zip(LEAVES, LEAVES, strict=True))
    return [canonical(one, plain) for one in subtrees(tree) if not isinstance(one, str)]


@for_all(order=st.sampled_from(list(permutations("xyz"))), flip=st.booleans())
def test_the_binding_is_right_in_every_order_of_a_product_of_sums(order, flip):
    first, second, third = order
    inner = f"{third} {second}" if flip else f"{second} {third}"
    values = graph_of(
        node("Exp", "z", "e"), node("Neg", "y", "m"),
        node("Mul", inner.replace("y", "m").replace("z", "e"), "p"),
        node("Add", f"{first.replace('y', 'm').replace('z', 'e')} p", "r"),
        inputs="x:float32[n,4] y:float32[n,4] z:float32[n,4]", outputs="r:float32[n,4]",
    )  # fmt: skip
    parts = {"x": Var("x"), "y": Op("Neg", Var("y")), "z": Op("Exp", Var("z"))}
    pattern = Op("Add", Op("Mul", parts[second], parts[third]), parts[first])
    assert {"x": "x", "y": "y", "z": "z"} in found(pattern, values, "r")


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_number_matches_whatever_its_rank_as_near_as_its_type_can_tell(shape, dtype):
    def holds(wanted, stored_one):
        values = graph_of(
            node("Mul", "a c", "y"), weights={"c": np.full(shape, stored_one, dtype)},
            inputs=f"a:{dtype}[n,4]", outputs=f"y:{dtype}[n,4]",
        )  # fmt: skip
        return bool(found(Op("Mul", X, Number(wanted)), values))

    assert holds(np.sqrt(2), np.sqrt(2)) and holds(1.4142135, np.sqrt(2))
    assert not holds(1.42, np.sqrt(2)) and not holds(0, 1e-4) and holds(0, 0.0)


@pytest.mark.parametrize("attribute", ["value", "value_float", "untyped"])
def test_a_constant_node_counts_by_its_own_type_where_the_graph_names_none(attribute):
    half = numpy_helper.from_array(np.float16(np.sqrt(2)))
    constant = (
        node("Constant", "", "c", value_float=float(np.sqrt(2)))
        if attribute == "value_float"
        else node("Constant", "", "c", value=half)
    )
    dtype = "float32" if attribute == "value_float" else "float16"
    values = graph_of(constant, node("Mul", "a c", "y"), inputs=f"a:{dtype}[n,4]", outputs=f"y:{dtype}[n,4]")
    if attribute == "untyped":
        values["c"].type = None
    assert found(Op("Mul", X, Number(np.sqrt(2))), values) == [{"x": "a"}]
    assert found(Op("Mul", X, Number(name="c")), values) == [{"x": "a", "c": "c"}]


def test_bfloat16_numbers_are_as_near_as_they_can_be():
    one = ir.Value(name="c", const_value=ir.tensor(np.array(np.sqrt(2), bfloat16)))
    assert is_number(one, np.sqrt(2)) and not is_number(one, 1.45) and number(one) == float(bfloat16(np.sqrt(2)))


def test_what_can_be_fed_is_no_number():
    weights = {"c": np.float32(2)}
    listed = graph_of(node("Mul", "a c", "y"), weights=weights, inputs="a:float32[n,4] c:float32[]")
    assert not found(Op("Mul", X, Number(2)), listed) and not is_stored(listed["c"]) and stored(listed["c"]) is None
    assert found(Op("Mul", X, Number(2)), graph_of(node("Mul", "a c", "y"), weights=weights, inputs="a:float32[n,4]"))


def test_computed_and_larger_tensors_are_no_numbers():
    values = graph_of(node("Exp", "c", "e"), node("Mul", "a e", "y"), weights={"c": np.float32(0), "w": weight(4)})
    assert number(values["e"]) is None and number(values["a"]) is None and number(None) is None
    wide = graph_of(node("Mul", "a w", "y"), weights={"w": weight(4)})
    assert number(wide["w"]) is None and is_stored(wide["w"]) and stored(wide["w"]).shape == (4,)


def test_text_is_no_number():
    constant = helper.make_node("Constant", [], ["s"], value_string="2")
    values = graph_of(constant, node("Equal", "s s", "y"), inputs="a:float32[n,4]", outputs="y:bool[]")
    assert stored(values["s"]) is None and number(values["s"]) is None and not is_number(values["s"])


# Questions ------------------------------------------------------------------------------------------------------------


def test_given_drops_what_is_left_out_at_the_end_only():
    values = graph_of(node("Clip", "a - high", "y"), weights={"high": np.float32(6)})
    assert [v and v.name for v in given(values["y"].producer())] == ["a", None, "high"]
    bare = graph_of(node("Clip", "a - -", "y"))
    assert [v.name for v in given(bare["y"].producer())] == ["a"]


def test_made_by_asks_for_the_first_output_of_one_of_several_operators():
    values = graph_of(
        node("TopK", "a k", "best where"), weights={"k": np.int64([2])}, outputs="best:float32[n,2] where:int64[n,2]"
    )
    assert made_by(values["best"], "Relu|TopK").op_type == "TopK"
    assert made_by(values["where"], "TopK") is made_by(values["best"], "Relu") is made_by(values["a"], "TopK") is None
    assert made_by(None, "TopK") is None


def test_sizes_that_are_known():
    values = graph_of(node("Relu", "a", "y"), inputs="a:float32[n,4,?]", outputs="y:float32[?,4,?]", weights={})
    assert dims(values["a"]) == ["n", 4, None] and rank(values["a"]) == 3
    assert [size(values["a"], axis) for axis in (0, 1, 2, -2, 3, -4)] == [None, 4, None, 4, None, None]
    values["y"].shape = None
    assert dims(values["y"]) is rank(values["y"]) is size(values["y"], 0) is dims(None) is None


def test_axes_of_reductions_in_both_forms():
    old = graph_of(node("ReduceMean", "a", "y", axes=[-1]), opset=17)
    assert axes_of(old["y"].producer()) == [-1]
    new = graph_of(node("ReduceMean", "a axes", "y"), weights={"axes": np.int64([1])})
    assert axes_of(new["y"].producer()) == [1]
    everything = graph_of(node("ReduceMean", "a", "y"))
    assert axes_of(everything["y"].producer()) == []
    fed = graph_of(node("ReduceMean", "a axes", "y"), inputs="a:float32[n,4] axes:int64[1]")
    assert axes_of(fed["y"].producer()) is None


def test_axes_counted_from_the_end():
    assert from_the_end([1, -1], 3) == [-2, -1] and from_the_end([-1], None) == [-1]
    assert from_the_end([1], None) is None and from_the_end(None, 3) is None


def test_numbers_are_lists_of_integers():
    values = graph_of(node("Reshape", "a shape", "y"), weights={"shape": np.int64([0, 4])})
    assert numbers(values["shape"]) == [0, 4] and numbers(values["a"]) is None
    assert numbers(graph_of(node("Mul", "a w", "y"), weights={"w": weight(4)})["w"]) is None


def test_the_only_user():
    values = graph_of(node("Neg", "a", "m"), node("Mul", "m m", "s"), node("Abs", "s", "y"))
    assert only_user(values["s"]).op_type == "Abs"
    assert only_user(values["m"]) is None and only_user(values["y"]) is None


# Users outside --------------------------------------------------------------------------------------------------------


def first(pattern, values, root="y"):
    return next(occurrences(pattern, values[root].producer()))


def test_a_value_inside_that_is_used_outside_or_an_output():
    pattern = Op("Exp", Op("Neg", X))
    assert first(pattern, graph_of(node("Neg", "a", "m"), node("Exp", "m", "y"))).used_elsewhere() is None
    also = "y:float32[n,4] z:float32[n,4]"
    used = graph_of(node("Neg", "a", "m"), node("Exp", "m", "y"), node("Abs", "m", "z"), outputs=also)
    assert first(pattern, used).used_elsewhere() is used["m"]
    output = graph_of(node("Neg", "a", "m"), node("Exp", "m", "y"), outputs=also.replace("z", "m"))
    assert first(pattern, output).used_elsewhere() is output["m"]


def test_a_second_output_that_is_used_counts():
    values = graph_of(
        node("TopK", "a k", "best where"), node("Neg", "best", "y"), node("Abs", "where", "i"),
        weights={"k": np.int64([2])}, outputs="y:float32[n,2] i:int64[n,2]",
    )  # fmt: skip
    assert first(Op("Neg", Op("TopK", X, ...)), values).used_elsewhere() is values["where"]


def test_what_a_subgraph_uses_counts():
    branch = [
        helper.make_graph([node("Relu", "m", "out")], name, [], [value("out:float32[n,4]")]) for name in ("yes", "no")
    ]
    values = graph_of(
        node("Neg", "a", "m"), node("Exp", "m", "y"), node("If", "c", "z", then_branch=branch[0], else_branch=branch[1]),
        inputs="a:float32[n,4] c:bool[]", outputs="y:float32[n,4] z:float32[n,4]",
    )  # fmt: skip
    assert first(Op("Exp", Op("Neg", X)), values).used_elsewhere() is values["m"]


def test_what_is_given_anew_and_what_is_shared_may_be_used():
    used = graph_of(
        node("Neg", "a", "m"), node("Exp", "m", "y"), node("Abs", "m", "z"), outputs="y:float32[n,4] z:float32[n,4]"
    )
    match = first(Op("Exp", Op("Neg", X)), used)
    assert Match(match.root, match.nodes, (used["y"], used["m"])).used_elsewhere() is None
    shared = first(Op("Exp", Op("Neg", X, shared=True)), used)
    assert shared.used_elsewhere() is None and [n.op_type for n in shared.shared] == ["Neg"]
    assert [n.op_type for n in shared.nodes] == ["Exp"]


def test_the_branches_of_an_if_are_matched_by_themselves():
    graph = control_flow().model.graph
    branch = next(n for n in graph if n.op_type == "If").attributes["then_branch"].as_graph()
    match = next(occurrences(Op("Add", X, Number(1)), branch[0]))
    assert match["x"] is graph.inputs[0]
