"""What all fusions have in common: subgraphs, opsets, targets, and random graphs."""

import numpy as np
import onnx_ir as ir
import pytest
from fusions import GAP, LOGISTIC, TWICE_NEGATED, One, X, Y, both_ways, chosen, done, fusion, net
from hypothesis import given
from hypothesis import strategies as st
from models import ask, build, context, feed, node, outputs, proto, run_twice, value, weight
from onnx import helper

from perwatt.artifact import Artifact
from perwatt.contract import Capabilities
from perwatt.drift import drift
from perwatt.fusion import Builder, Fusion, names_in, opset_refusal, raise_opset, replace
from perwatt.patterns import Match, Number, Op, made_by

# Subgraphs ------------------------------------------------------------------------------------------------------------


def test_the_inside_of_an_if_is_rewritten_with_outer_values():
    before = chosen(node("Neg", "b", "m"), node("Add", "a m", "out"))
    after, changes = run_twice(GAP, before)
    assert changes == ["1 patterns replaced"] and after.operator_counts() == {"If": 1, "Sub": 1, "Identity": 1}
    both_ways(before, after)


def test_constants_of_a_rewrite_in_a_subgraph_lie_there_and_old_ones_go():
    def tripled(match, build):
        return build.op("Mul", match["x"], build.constant(np.float32(2), "two"))

    before = chosen(node("Add", "b zero", "out"), zero=np.float32(0))
    after, _ = run_twice(fusion(Op("Add", X, Number(0)), tripled), before)
    branch = next(n for n in after.model.graph if n.op_type == "If").attributes["then_branch"].as_graph()
    assert set(branch.initializers) == {"two"} and not after.model.graph.initializers


def test_a_branch_whose_result_comes_from_outside_copies_it():
    before = chosen(node("Neg", "b", "m"), node("Neg", "m", "out"))
    after, _ = run_twice(TWICE_NEGATED, before)
    assert after.operator_counts() == {"If": 1, "Identity": 2}
    both_ways(before, after)


def test_what_reaches_from_a_subgraph_into_the_graph_around_it_is_left():
    before = chosen(node("Add", "a m", "out"), outer=[node("Neg", "b", "m")])
    after, changes = run_twice(GAP, before)
    assert after is before and changes == ["1 left: a part of it lies in the graph around it"]


def test_a_value_inside_that_a_subgraph_uses_is_left():
    outer = [node("Neg", "b", "m"), node("Add", "a m", "s"), node("Exp", "s", "e")]
    before = chosen(node("Add", "e m", "out"), outer=outer)
    _, changes = run_twice(GAP, before)
    assert "1 left: a value inside it is used elsewhere too" in changes


def test_what_a_subgraph_stops_using_is_free_for_the_graph_around_it():
    absorbed = fusion(Op("Max", X, Op("Min", X, Y)), lambda match, build: match["x"])

    class Either(One):
        def find(self, node):
            yield from (absorbed if node.op_type == "Max" else GAP).find(node)

        def rewrite(self, match, build):
            return (absorbed if match.root.op_type == "Max" else GAP).rewrite(match, build)

    outer = [node("Neg", "b", "m"), node("Add", "a m", "s")]
    before = chosen(node("Min", "s m", "k"), node("Max", "s k", "l"), node("Abs", "l", "out"), outer=outer)
    after, changes = run_twice(Either(roots=("Max", "Add")), before)
    assert changes == ["2 patterns replaced"]
    assert after.operator_counts() == {"Sub": 1, "If": 1, "Abs": 1, "Identity": 1}
    both_ways(before, after)


# Opsets and targets ---------------------------------------------------------------------------------------------------


def test_an_operator_of_a_later_opset_raises_the_model_s():
    gelu = fusion(Op("Relu", X), lambda match, build: build.op("Gelu", match["x"]), opset=20)
    after, _ = run_twice(gelu, net(node("Relu", "a", "y"), opset=17))
    assert after.model.opset_imports[""] == 20
    outputs(after, feed(after))
    newer, _ = run_twice(gelu, net(node("Relu", "a", "y"), opset=23))
    assert newer.model.opset_imports[""] == 23
    nothing, _ = run_twice(gelu, before := net(node("Neg", "a", "y"), opset=17))
    assert nothing is before


def test_an_operator_that_changed_in_between_is_a_refusal_that_names_it():
    gelu = fusion(Op("Relu", X), lambda match, build: build.op("Gelu", match["x"]), opset=20)
    before = net(node("ReduceMean", "a", "m", axes=[-1]), node("Relu", "m", "y"), outputs="y:float32[n,1]", opset=17)
    assert ask(gelu, before) == [
        "this needs opset 20, the model is opset 17, and ReduceMean means something else there"
    ]
    assert ask(gelu, net(node("Relu", "a", "y"), opset=17)) == []


@pytest.mark.parametrize(
    ("nodes", "weights", "opset", "changed"),
    [
        ([node("Upsample", "a s", "y")], {"s": np.float32([1, 1])}, 9, "Upsample"),
        ([node("Softmax", "a", "y", axis=1)], {}, 11, "Softmax"),
        ([node("Squeeze", "a", "y", axes=[1])], {}, 12, "Squeeze"),
        ([node("Pad", "a", "y", pads=[0, 0, 0, 0])], {}, 10, "Pad"),
        ([node("GridSample", "x4 g", "y4")], {"x4": weight(1, 1, 2, 2), "g": weight(1, 2, 2, 2)}, 16, "GridSample"),
        ([node("RoiAlign", "x4 r i", "y4")],
         {"x4": weight(1, 1, 2, 2), "r": weight(1, 4), "i": np.int64([0])}, 10, "RoiAlign"),
        ([node("GroupNormalization", "x4 s s", "y4", num_groups=1)],
         {"x4": weight(1, 1, 2, 2), "s": weight(1)}, 18, "GroupNormalization"),
    ],
)  # fmt: skip
def test_operators_that_mean_something_else_later(nodes, weights, opset, changed):
    out = nodes[0].output[0]
    model = ir.from_proto(proto([*nodes, node("Relu", "a", "z")], "a:float32[n,1] b:float32[n,4]",
                                f"{out}:float32 z:float32[n,1]", weights, opset=opset))  # fmt: skip
    assert changed in opset_refusal(model, 21)
    assert opset_refusal(model, opset) is None


@pytest.mark.parametrize(
    "made",
    [
        node("Clip", "a - six", "y"), node("Cast", "a", "y", to=1), node("Equal", "a b", "y"), node("Pow", "a b", "y"),
        node("LayerNormalization", "a s", "y"), node("Reshape", "a shape", "y"), node("Gather", "a i", "y"),
        node("Resize", "a - sc", "y"), node("Pad", "a pads", "y"), node("TopK", "a k", "y i"),
        node("MaxPool", "a", "y", kernel_shape=[2]), node("BatchNormalization", "a s s s s", "y"),
        node("DequantizeLinear", "q s", "y"), node("QuantizeLinear", "a s z", "y"),
    ],
)  # fmt: skip
def test_operators_that_only_got_wider(made):
    graph = helper.make_graph([made], "net", [], [])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    assert opset_refusal(model, 22) is None


def test_a_split_without_sizes_says_how_many_parts_once_it_has_to():
    nodes = [node("Split", "a", "p q", axis=1), node("Neg", "q", "m"), node("Add", "p m", "y")]
    raised = fusion(GAP.pattern, GAP.rewritten, opset=20)
    before = net(*nodes, outputs="y:float32[n,2]", opset=17)
    after, _ = done(raised, before)
    split = next(n for n in after.model.graph if n.op_type == "Split")
    assert split.attributes.get_int("num_outputs", 0) == 2


def test_raising_never_lowers():
    model = net(node("Relu", "a", "y"), opset=23).edit()
    raise_opset(model, 17)
    assert model.opset_imports[""] == 23 and opset_refusal(model, 17) is None


@pytest.mark.parametrize(("kind", "refused"), [("Relu", True), ("Neg", True), ("Sin", False)])
def test_functions_keep_their_opset_so_none_of_their_operators_may_have_a_later_version(kind, refused):
    function = helper.make_function(
        "mine", "F", ["x"], ["out"], [node(kind, "x", "out")], [helper.make_opsetid("", 12)]
    )
    graph = helper.make_graph(
        [helper.make_node("F", ["a"], ["f"], domain="mine"), node("Relu", "f", "y")], "net",
        [value("a:float32[n,4]")], [value("y:float32[n,4]")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 12), helper.make_opsetid("mine", 1)]
    proto = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    artifact = Artifact(model=ir.from_proto(proto))
    gelu = fusion(Op("Relu", X), lambda match, build: build.op("Gelu", match["x"]), opset=20)
    assert bool(ask(gelu, artifact)) == refused
    if not refused:
        run_twice(gelu, artifact)


def test_what_a_backend_does_not_run_is_not_put_in():
    swish = fusion(Op("Relu", X), lambda match, build: build.op("Swish", match["x"]), operator="Swish")
    before = net(node("Relu", "a", "y"))
    assert ask(swish, before) == ["this backend does not run Swish as one operator"]
    able = context()
    able = type(able)(**{**vars(able), "capabilities": Capabilities(operators=("Swish",))})
    assert ask(swish, before, able) == []


def test_more_nodes_than_before_break_the_promise():
    longer = fusion(Op("Relu", X), lambda match, build: build.op("Abs", build.op("Neg", match["x"])))
    before = net(node("Relu", "a", "y"))
    after, _ = run_twice(longer, before)
    assert list(longer.ensures(before, after)) == ["1 nodes became 2"] and list(longer.ensures(after, before)) == []


def test_other_domains_are_no_roots():
    model = net(node("Neg", "a", "m"), node("Neg", "m", "y")).edit()
    for each in model.graph:
        each.domain = "elsewhere"
    model.graph.opset_imports["elsewhere"] = 1
    before = Artifact(model=model)
    after, changes = TWICE_NEGATED.run(before, context())
    assert after is before and changes == []


# Random graphs --------------------------------------------------------------------------------------------------------


@st.composite
def graphs(draw):
    """Random graphs full of double negations, negated summands and logistic functions, with any values as outputs."""
    values, nodes = ["a", "b"], []
    for position in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(["Neg", "Neg", "Neg", "Add", "Add", "Mul", "Exp", "one more", "one by"]))
        arity = 2 if kind in ("Add", "Mul") else 1
        names = [draw(st.sampled_from(values[-4:])) for _ in range(arity)]
        if kind == "one more":
            kind, names = "Add", draw(st.permutations([names[0], "one"]))
        elif kind == "one by":
            kind, names = "Div", ["one", names[0]]
        nodes.append(node(kind, " ".join(names), f"v{position}"))
        values.append(f"v{position}")
    made = values[2:]
    outs = {made[-1], *draw(st.lists(st.sampled_from(made), max_size=3))}
    known = draw(st.lists(st.sampled_from(made), max_size=5, unique=True))
    return build(
        nodes, "a:float32[n,4] b:float32[n,4]", " ".join(f"{name}:float32[n,4]" for name in sorted(outs)),
        {"one": np.float32(1)}, inner=" ".join(f"{name}:float32[n,4]" for name in sorted(set(known) - outs)),
    )  # fmt: skip


@given(graphs(), st.sampled_from(["twice negated", "gap", "logistic", "all"]))
def test_random_graphs_compute_what_they_did(before, which):
    chosen = {"twice negated": [TWICE_NEGATED], "gap": [GAP], "logistic": [LOGISTIC]}.get(
        which, [TWICE_NEGATED, GAP, LOGISTIC]
    )
    after = before
    for one in chosen:
        after, _ = run_twice(one, after)
    assert after.signature == before.signature
    batch = {name: np.clip(array, -1, 1) for name, array in feed(before).items()}
    with np.errstate(all="ignore"):
        assert not drift([outputs(before, batch)], [outputs(after, batch)], Fusion.tolerance).reasons
    left = [n for n in after.model.graph if n.op_type == "Neg" and made_by(n.inputs[0], "Neg")]
    if which == "twice negated":
        inner = [n.inputs[0] for n in left]
        assert all(len(v.uses()) > 1 or v.is_graph_output() for v in inner), "one more could have been replaced"


def test_names_in_a_model():
    model = chosen(node("Neg", "b", "m", name="/neg"), node("Add", "m w", "out"), w=np.float32([1])).model
    assert names_in(model) >= {"a", "b", "c", "y", "m", "out", "w", "/neg", "other"}


def test_the_builder_never_gives_a_name_twice():
    model = net(node("Relu", "a", "y", name="/relu")).edit()
    root = model.graph[0]
    build = Builder(model.graph, root, names_in(model))
    names = [build.unused(wanted) for wanted in ("y", "y", "new", "new", "/relu")]
    assert len({*names, "y", "/relu"}) == 7 and names[2] == "new"
    new = build.op("Abs", model.graph.inputs[0])
    replace(model.graph, Match(root, (root,), (root.outputs[0],)), build, [new])
    assert [n.op_type for n in model.graph] == ["Abs"] and model.graph.outputs[0].name == "y"
