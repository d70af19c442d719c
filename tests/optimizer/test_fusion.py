"""What all fusions have in common: names, types and shapes after a rewrite, several outputs, and who may use what."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from fusions import GAP, TWICE_NEGATED, One, X, Y, by_name, done, fusion, net
from models import context, feed, node, outputs, run_twice, value, weight
from onnx import helper

from perwatt.artifact import Artifact
from perwatt.drift import drift
from perwatt.fusion import Fusion
from perwatt.patterns import Match, Number, Op, Var, dims, maybe

# What is put in -------------------------------------------------------------------------------------------------------


def test_a_new_value_takes_over_name_type_and_shape():
    before = net(
        node("Neg", "b", "m"), node("Add", "a m", "s"), node("Exp", "s", "y"), inner="s:float32[n,4] m:float32[n,4]"
    )
    after, changes = done(GAP, before)
    assert changes == ["1 patterns replaced"]
    total = by_name(after)["s"]
    assert total.producer().op_type == "Sub" and total.dtype.name == "FLOAT" and str(total.shape) == "[n,4]"
    assert after.steps[-1].changes == ("1 patterns replaced",)


def test_what_is_known_of_the_new_value_fills_what_was_unknown():
    def told(match, build):
        gap = build.op("Sub", match["x"], match["y"])
        gap.shape = ir.Shape(["n", 4])
        return gap

    before = net(node("Neg", "b", "m"), node("Add", "a m", "s"), node("Exp", "s", "y"))
    after, _ = done(fusion(GAP.pattern, told), before)
    total = by_name(after)["s"]
    assert str(total.shape) == "[n,4]" and total.dtype.name == "FLOAT"


def test_an_output_keeps_its_name_and_what_is_declared_of_it():
    def told(match, build):
        gap = build.op("Sub", match["x"], match["y"])
        gap.shape = ir.Shape(["n", 4])
        return gap

    before = net(node("Neg", "b", "m"), node("Add", "a m", "y"), outputs="y:float32[?,?]")
    after, _ = done(fusion(GAP.pattern, told), before)
    assert [(v.name, dims(v)) for v in after.model.graph.outputs] == [("y", [None, None])]


def test_a_scalar_stays_one():
    nodes = (node("Neg", "b", "m"), node("Add", "a m", "s"), node("Exp", "s", "y"))
    after, _ = done(GAP, net(*nodes, inputs="a:float32[] b:float32[]", outputs="y:float32[]", inner="s:float32[]"))
    assert by_name(after)["s"].shape is not None and len(by_name(after)["s"].shape) == 0
    after, _ = done(GAP, net(*nodes[:2], inputs="a:float32[] b:float32[]", outputs="s:float32[]"))
    assert after.signature.outputs[0].shape == ()


def test_a_value_that_is_there_already_keeps_what_it_is_called():
    after, _ = done(
        TWICE_NEGATED, net(node("Abs", "a", "p"), node("Neg", "p", "m"), node("Neg", "m", "q"), node("Exp", "q", "y"))
    )
    assert after.operator_counts() == {"Abs": 1, "Exp": 1} and by_name(after)["y"].producer().inputs[0].name == "p"


def test_an_input_as_a_result_keeps_its_declaration():
    before = net(node("Neg", "a", "m"), node("Neg", "m", "q"), node("Exp", "q", "y"), inner="q:float32[n,4]",
                 inputs="a:float32[?,4] b:float32[n,4]", outputs="y:float32[n,4]")  # fmt: skip
    after, _ = run_twice(TWICE_NEGATED, before)
    assert after.signature == before.signature and dims(after.model.graph.inputs[0]) == [None, 4]
    model = before.edit()
    model.graph.inputs[0].shape = None
    after, _ = TWICE_NEGATED.run(Artifact(model=model), context())
    assert after.operator_counts() == {"Exp": 1} and dims(after.model.graph.inputs[0]) is None


def test_an_output_that_an_input_replaces_keeps_its_name():
    after, _ = done(TWICE_NEGATED, net(node("Neg", "a", "m"), node("Neg", "m", "y")))
    assert after.operator_counts() == {"Identity": 1}


def test_an_output_that_another_output_replaces_keeps_its_name():
    before = net(
        node("Abs", "a", "y"), node("Neg", "y", "m"), node("Neg", "m", "z"), outputs="y:float32[n,4] z:float32[n,4]"
    )
    after, _ = done(TWICE_NEGATED, before)
    assert after.operator_counts() == {"Abs": 1, "Identity": 1}


def test_an_output_that_a_weight_replaces_keeps_its_name():
    before = net(node("Neg", "w", "m"), node("Neg", "m", "y"), weights={"w": weight(4)}, outputs="y:float32[4]")
    after, _ = done(TWICE_NEGATED, before)
    assert after.operator_counts() == {"Identity": 1} and set(after.model.graph.initializers) == {"w"}


def test_intermediate_values_have_the_type_that_the_operator_gives_them():
    seen = {}

    def built(match, build):
        x = match["x"]
        whole = build.op("Cast", x, to=ir.DataType.INT64)
        positive = build.op("Greater", x, build.constant(np.float32(0), "zero"))
        best, where = build.op("TopK", x, build.constant(np.int64([4]), "k"), outputs=2)
        some = build.op("Where", positive, x, best)
        half = build.op("Split", x, build.constant(np.int64([2, 2]), "halves"), outputs=2, axis=1)
        shape = build.op("Shape", x)
        unknown = build.op("Odd", x, domain="elsewhere")
        made = dict(whole=whole, positive=positive, best=best, where=where, some=some, half=half[1], shape=shape)
        seen.update({name: v.dtype.name for name, v in (made | {"unknown": unknown}).items()})
        seen["own"] = some.type is not x.type
        return build.op("Abs", x)

    run_twice(fusion(Op("Relu", X), built), net(node("Relu", "a", "y")))
    assert seen == {
        "whole": "INT64", "positive": "BOOL", "best": "FLOAT", "where": "INT64", "some": "FLOAT", "half": "FLOAT",
        "shape": "INT64", "unknown": "FLOAT", "own": True,
    }  # fmt: skip


def test_attributes_that_are_none_are_left_out_and_inputs_that_are_none_are_empty():
    def clipped(match, build):
        return build.op("Clip", match["x"], None, build.constant(np.float32(6), "six"), nothing=None)

    after, _ = run_twice(fusion(Op("Relu", X), clipped), net(node("Relu", "a", "y")))
    made = by_name(after)["y"].producer()
    assert made.inputs[1] is None and not made.attributes and by_name(after)["six"].const_value.numpy() == 6


@pytest.mark.parametrize("array", [np.float32(2), np.float16([1, 2]), np.arange(6).reshape(2, 3).T])
def test_constants_are_what_they_were_given(array):
    seen = []

    def built(match, build):
        seen.append(build.constant(array, "c"))
        return build.op("Mul", match["x"], build.op("Cast", build.constant(array[..., :1], "d"), to=1)) \
            if np.ndim(array) else build.op("Mul", match["x"], seen[0])  # fmt: skip

    run_twice(fusion(Op("Relu", X), built), net(node("Relu", "a", "y"), outputs="y:float32[?,?]"))
    made = seen[0].const_value
    assert made.numpy().dtype == array.dtype and np.array_equal(made.numpy(), array) and made.name == seen[0].name


def test_names_are_taken_once_in_subgraphs_too():
    inner = [
        helper.make_graph(
            [node("Neg", "b", "y_sub"), node("Add", "a y_sub", f"out_{name}", name="/add_1")], name, [],
            [value(f"out_{name}:float32[n,4]")],
        )
        for name in ("yes", "no")
    ]  # fmt: skip
    before = net(
        node("Neg", "b", "m"), node("Add", "a m", "y", name="/add"),
        node("If", "c", "z", then_branch=inner[0], else_branch=inner[1]),
        inputs="a:float32[n,4] b:float32[n,4] c:bool[]", outputs="y:float32[n,4] z:float32[n,4]",
    )  # fmt: skip
    after, changes = run_twice(GAP, before)
    assert changes == ["3 patterns replaced"] and after.operator_counts() == {"Sub": 3, "If": 1}
    for truth in (True, False):
        batch = {"a": weight(2, 4), "b": weight(2, 4, seed=1), "c": np.array(truth)}
        assert not drift([outputs(before, batch)], [outputs(after, batch)], Fusion.tolerance).reasons
    names = [n.name for n in after.model.graph.all_nodes()]
    assert len(set(names)) == len(names)


# Several outputs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Twins(Fusion):
    """Two Relus of one value, as the outputs of one Split."""

    what: ClassVar[str] = "pairs merged"
    roots: ClassVar[tuple[str, ...]] = ("Relu",)

    def find(self, node):
        pair = [use.node for use in node.inputs[0].uses() if use.node.op_type == "Relu"]
        if len(pair) == 2 and pair[0] is node:
            yield Match(node, tuple(pair), tuple(n.outputs[0] for n in pair), {"x": node.inputs[0]})

    def rewrite(self, match, build):
        one = build.op("Abs", match["x"])
        whole = build.op("Concat", one, one, axis=1)
        return build.op("Split", whole, build.constant(np.int64([4, 4]), "sizes"), outputs=2, axis=1)


@pytest.mark.parametrize("named", ["", "y", "z", "y z"])
def test_several_outputs_each_take_over_one_name_whether_they_are_outputs_or_not(named):
    nodes = [node("Abs", "a", "p"), node("Relu", "p", "y"), node("Relu", "p", "z"), node("Add", "y z", "s")]
    before = net(*nodes, outputs=" ".join(f"{name}:float32[n,4]" for name in [*named.split(), "s"]))
    twins = Twins()
    after, changes = run_twice(twins, before)
    assert changes == ["1 pairs merged"] and after.signature == before.signature
    batch = feed(before)
    assert not drift([outputs(before, batch)], [outputs(after, batch)], twins.tolerance).reasons
    assert [v.name for v in by_name(after)["y"].producer().outputs] == ["y", "z"]


@dataclass(frozen=True)
class Doubled(Twins):
    """Two Relus of one value, as one Abs twice."""

    def rewrite(self, match, build):
        one = build.op("Abs", match["x"])
        return one, one


@pytest.mark.parametrize("named", ["", "y", "z", "y z"])
def test_one_new_value_may_take_several_places(named):
    nodes = [node("Abs", "a", "p"), node("Relu", "p", "y"), node("Relu", "p", "z"), node("Add", "y z", "s")]
    before = net(*nodes, outputs=" ".join(f"{name}:float32[n,4]" for name in [*named.split(), "s"]))
    after, _ = done(Doubled(), before)
    assert after.operator_counts().get("Identity", 0) == ("z" in named)
    assert [v.name for v in after.model.graph.outputs] == [*named.split(), "s"]


def test_users_that_come_before_the_root_are_sorted_behind_what_is_put_in():
    # The Relu named last is the root that new nodes are put behind; a user of the first stands before it.
    nodes = [
        node("Abs", "a", "p"), node("Relu", "p", "y"), node("Exp", "y", "e"), node("Relu", "p", "z"), node("Add", "e z", "s")
    ]  # fmt: skip
    done(Doubled(), net(*nodes, outputs="s:float32[n,4]"))


# Who uses what --------------------------------------------------------------------------------------------------------


def test_a_value_inside_that_others_use_is_a_refusal_with_its_reason():
    nodes = [node("Neg", "b", "m"), node("Add", "a m", "y"), node("Exp", "m", "z")]
    after, changes = run_twice(GAP, before := net(*nodes, outputs="y:float32[n,4] z:float32[n,4]"))
    assert after is before and changes == ["1 left: a value inside it is used elsewhere too"]
    after, changes = run_twice(GAP, before := net(*nodes[:2], outputs="y:float32[n,4] m:float32[n,4]"))
    assert after is before and changes == ["1 left: a value inside it is an output"]


def test_what_is_left_is_counted_by_reason_beside_what_was_done():
    def picky(match):
        if match["x"].name != "a":
            yield "it isn't the first"
            yield "and more that nobody hears"

    nodes = [node("Neg", "b", f"m{i}") for i in range(4)]
    nodes += [node("Add", f"{'a' if i == 0 else 'b'} m{i}", f"y{i}") for i in range(4)]
    outs = " ".join(f"y{i}:float32[n,4]" for i in range(4))
    after, changes = done(fusion(GAP.pattern, GAP.rewritten, reasons=picky), net(*nodes, outputs=outs))
    assert changes == ["1 patterns replaced", "3 left: it isn't the first"] and after.operator_counts()["Sub"] == 1


def test_another_occurrence_that_passes_is_taken_and_nothing_is_told_of_the_first():
    either = fusion(
        Op("Add", X, Y), lambda match, build: build.op("Sub", match["x"], match["y"]),
        reasons=lambda match: [] if match["x"].name == "b" else ["it begins with a"],
    )  # fmt: skip
    after, changes = run_twice(either, net(node("Add", "a b", "y")))
    assert changes == ["1 patterns replaced"] and [v.name for v in by_name(after)["y"].producer().inputs] == ["b", "a"]


def test_shared_nodes_stay_for_their_other_users_and_go_with_the_last():
    apart = fusion(Op("Abs", Op("Neg", X, shared=True)), lambda match, build: build.op("Abs", match["x"]))
    one = net(node("Neg", "a", "m"), node("Abs", "m", "y"))
    assert done(apart, one)[0].operator_counts() == {"Abs": 1}
    outs = "y:float32[n,4] z:float32[n,4]"
    two = net(node("Neg", "a", "m"), node("Abs", "m", "y"), node("Exp", "m", "z"), outputs=outs)
    assert done(apart, two)[0].operator_counts() == {"Abs": 1, "Neg": 1, "Exp": 1}


def test_what_a_shared_node_leans_on_stays_with_it():
    deep = fusion(Op("Abs", Op("Neg", Op("Relu", X), shared=True)), lambda match, build: build.op("Relu", match["x"]))
    outs = "y:float32[n,4] z:float32[n,4]"
    kept = net(
        node("Relu", "a", "r"), node("Neg", "r", "m"), node("Abs", "m", "y"), node("Exp", "m", "z"), outputs=outs
    )
    assert done(deep, kept)[0].operator_counts() == {"Relu": 2, "Neg": 1, "Exp": 1}
    assert done(deep, net(node("Relu", "a", "r"), node("Neg", "r", "m"), node("Abs", "m", "y")))[
        0
    ].operator_counts() == {"Relu": 1}


def test_what_a_rewrite_leaves_without_users_is_no_user_any_more():
    # Once the first is replaced, nobody but the second one's own nodes uses m.
    first = fusion(
        Op("Mul", X, Op("Add", Y, maybe("Exp", Op("Neg", Var("z"), shared=True), shared=True), shared=True)),
        lambda match, build: build.op("Relu", match["x"]),
    )
    both = [first, GAP]

    class Either(One):
        def find(self, node):
            for one in both:
                yield from one.find(node)

        def rewrite(self, match, build):
            return build.op("Relu", match["x"]) if match.root.op_type == "Mul" else GAP.rewrite(match, build)

    nodes = [
        node("Neg", "b", "m"), node("Exp", "m", "e"), node("Add", "a e", "s"), node("Mul", "a s", "y"),
        node("Add", "a m", "z"),
    ]  # fmt: skip
    before = net(*nodes, outputs="y:float32[n,4] z:float32[n,4]")
    after, changes = run_twice(Either(roots=("Mul", "Add")), before)
    assert changes == ["2 patterns replaced"] and after.operator_counts() == {"Relu": 1, "Sub": 1}


def test_a_chain_is_followed_to_its_end():
    nodes = [node("Neg", "a" if i == 0 else f"m{i}", f"m{i + 1}") for i in range(9)]
    after, changes = done(TWICE_NEGATED, net(*nodes, node("Exp", "m9", "y")))
    assert after.operator_counts() == {"Neg": 1, "Exp": 1} and changes == ["4 patterns replaced"]


def test_unused_weights_go_with_their_nodes():
    half = fusion(Op("Mul", X, Number(0.5)), lambda match, build: build.op("Abs", match["x"]))
    before = net(node("Mul", "a h", "y"), weights={"h": np.float32(0.5)})
    after, _ = run_twice(half, before)
    assert not after.model.graph.initializers
