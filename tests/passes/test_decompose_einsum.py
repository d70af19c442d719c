"""`decompose-einsum`: every equation of one or two operands against NumPy, Keras' attention, and what is left."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import ask, build, context, feed, node, outputs, run_twice, weight

from perwatt import registry
from perwatt.contract import Capabilities, Stage
from perwatt.drift import drift
from perwatt.passes.decompose_einsum import DecomposeEinsum
from perwatt.recipe import PassStep

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 6}
UNKNOWN = "the lengths of axes that must be put together aren't known"


def einsum(equation, *axes, stored=None, dtype="float32", inner="", shapes=None):
    """One Einsum; `axes` are the axes of its inputs, sizes or symbols; `stored` is a weight as the last operand."""
    names = [f"i{number}" for number in range(len(axes))]
    inputs = [f"{name}:{dtype}[{','.join(map(str, given))}]" for name, given in zip(names, axes, strict=True)]
    weights = {} if stored is None else {"w": stored}
    shape = ",".join("?" for _ in equation.partition("->")[2]) if shapes is None else shapes
    return build(
        [node("Einsum", " ".join([*names, *weights]), "y", equation=equation)], " ".join(inputs), f"y:{dtype}[{shape}]",
        weights, inner=inner,
    )  # fmt: skip


def apart(artifact, **sizes):
    assert ask(DecomposeEinsum(), artifact) == []
    after, changes = run_twice(DecomposeEinsum(), artifact)
    assert changes == ["1 Einsum written out"]
    assert "Einsum" not in after.operator_counts()
    batch = feed(artifact, **sizes)
    assert not drift([outputs(artifact, batch)], [outputs(after, batch)], DecomposeEinsum.tolerance).reasons
    return after


def test_a_projection_with_a_stored_weight(golden_pass):
    before = einsum("abc,cde->abde", ("batch", "length", 4), stored=weight(4, 5, 6))
    after, changes = run_twice(DecomposeEinsum(), before)
    golden_pass("decompose_einsum", before, after, changes)
    assert apart(before).operator_counts() == {"MatMul": 1, "Reshape": 1}


@st.composite
def equations(draw):
    """Two operands with labels in any order, and a result of any of them, with at least one left."""
    labels = draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=5, unique=True))
    where = {label: draw(st.sampled_from(["first", "second", "both"])) for label in labels}
    first = [label for label in labels if where[label] != "second"]
    second = [label for label in labels if where[label] != "first"]
    assume(first and second)
    out = draw(st.lists(st.sampled_from(labels), unique=True, max_size=len(labels)))
    return *("".join(draw(st.permutations(part))) for part in (first, second)), "".join(out)


@settings(max_examples=60)
@given(equation=equations(), stored=st.booleans())
def test_any_two_operands(equation, stored):
    first, second, out = equation
    axes = [[SIZES[label] for label in first]]
    text = f"{first},{second}->{out}"
    if stored:
        before = einsum(text, *axes, stored=weight(*(SIZES[label] for label in second)))
    else:
        before = einsum(text, *axes, [SIZES[label] for label in second])
    after = apart(before)
    fed = feed(before)
    operands = [*fed.values(), *([weight(*(SIZES[label] for label in second))] if stored else [])]
    np.testing.assert_allclose(outputs(after, fed)["y"], np.einsum(text, *operands), rtol=1e-4, atol=1e-4)


@given(labels=st.permutations("abcd"), many=st.integers(0, 4))
def test_any_single_operand(labels, many):
    apart(einsum(f"abcd->{''.join(labels[:many])}", [SIZES[label] for label in "abcd"]))


def test_without_an_arrow_labels_that_stand_once_are_kept_in_order():
    apart(einsum("cb,ca", (4, 3), (4, 2), shapes="2,3"))


def test_a_result_in_its_natural_order_takes_no_transpose_behind():
    """Keras' scores: the operands change places."""
    after = apart(einsum("aecd,abcd->acbe", ("batch", "length", 4, 5), ("batch", "length", 4, 5)), batch=2, length=3)
    assert after.operator_counts() == {"Transpose": 2, "MatMul": 1}
    assert after.model.graph[-1].op_type == "MatMul"


def test_open_lengths_that_stay_in_their_places_need_not_be_known():
    after = apart(einsum("abcd,cde->abe", ("batch", "length", 4, 5), stored=weight(4, 5, 6)), batch=2, length=3)
    assert after.operator_counts() == {"Reshape": 1, "MatMul": 1}


def test_a_weight_that_others_use_stays_as_it_is():
    nodes = [node("Einsum", "x w", "p", equation="ab,cb->ac"), node("Einsum", "p w", "y", equation="ac,cb->ab")]
    before = build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", {"w": weight(5, 4)}, inner="p:float32[batch,5]")
    after, _ = run_twice(DecomposeEinsum(), before)
    assert after.operator_counts() == {"Transpose": 1, "MatMul": 2}
    assert after.size_bytes() == before.size_bytes()


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (einsum("a,a,a->a", (3,), (3,), (3,)), "it has 3 operands"),
        (einsum("...a,ab->...b", (2, 3), (3, 4), shapes="?,?"), "its equation has an ellipsis"),
        (einsum("aa->a", (3, 3)), "a label stands twice in one operand"),
        (einsum("ab,bc->ac", (2, 3), (3, 4), dtype="int32"), "its type is none of floating point, or not known"),
        (einsum("ab,bc->ac", (2, "n"), ("m", 4)), "the lengths of an axis that both operands have may differ"),
        (einsum("ab,bc->ac", (2, 1), (3, 4)), "the lengths of an axis that both operands have may differ"),
        (einsum("bhij,bkij->bhk", ("b", "h", "i", "j"), ("b", "k", "i", "j")), UNKNOWN),
        (einsum("bghi,bkli->bghkl", ("b", "g", "h", 4), ("b", "k", "l", 4)), UNKNOWN),
    ],
)  # fmt: skip
def test_what_is_left(before, reason):
    after, changes = run_twice(DecomposeEinsum(), before)
    assert after is before and changes == [f"1 left: {reason}"]


@pytest.mark.parametrize(
    "before",
    [
        einsum("abcd,abce->abde", ("n", "m", "k", 4), ("n", "m", "k", 5)),
        einsum("nhwc,hwcd->nd", ("n", "h", "w", 4), ("h", "w", 4, 5)),
    ],
)
def test_open_lengths_that_can_be_written_down(before):
    apart(before, n=2, m=3, k=4, h=3, w=4)


def keras_attention(batch="batch", length=7, width=12, heads=3, depth=4):
    """Keras' MultiHeadAttention as its converters write it: a projection with a bias each, scores, softmax, values, output."""
    nodes, weights = [], {"root": np.float32(depth**-0.5)}
    for name, seed in (("q", 1), ("k", 2), ("v", 3)):
        nodes += [
            node("Einsum", f"x w{name}", f"{name}0", equation="abc,cde->abde"),
            node("Add", f"{name}0 b{name}", name),
        ]
        weights |= {f"w{name}": weight(width, heads, depth, seed=seed), f"b{name}": weight(heads, depth, seed=seed)}
    nodes += [
        node("Mul", "q root", "qs"),
        node("Einsum", "k qs", "s", equation="aecd,abcd->acbe"),
        node("Softmax", "s", "p", axis=-1),
        node("Einsum", "p v", "o", equation="acbe,aecd->abcd"),
        node("Einsum", "o wo", "out", equation="abcd,cde->abe"),
        node("Add", "out bo", "y"),
    ]
    weights |= {"wo": weight(heads, depth, width, seed=4), "bo": weight(width, seed=5)}
    heads_of = " ".join(
        f"{name}:float32[{batch},{length},{heads},{depth}]" for name in ("q0", "k0", "v0", "q", "k", "v", "qs", "o")
    )
    scores = " ".join(f"{name}:float32[{batch},{heads},{length},{length}]" for name in ("s", "p"))
    spec = f"float32[{batch},{length},{width}]"
    return build(nodes, f"x:{spec}", f"y:{spec}", weights, inner=f"{heads_of} {scores} out:{spec}")


@pytest.mark.parametrize("length", [7, "length"])
def test_what_keras_writes_becomes_one_attention(length):
    artifact = keras_attention(length=length)
    batch = feed(artifact, 2) if length == 7 else feed(artifact, 2, length=5)
    before = outputs(artifact, batch)
    given_attention = replace(context(), capabilities=Capabilities(operators=("Attention",)))
    for step in registry.default_steps():
        if isinstance(step, PassStep) and registry.pass_class(step.name).stage <= Stage.FUSE:
            made_by = registry.bind(step)
            if not ask(made_by, artifact, given_attention):
                artifact, _ = made_by.run(artifact, given_attention)
    counts = artifact.operator_counts()
    assert counts["Attention"] == 1 and "Einsum" not in counts and "Softmax" not in counts
    assert counts.get("MatMul", 0) + counts.get("Gemm", 0) == 4
    assert not drift([before], [outputs(artifact, batch)], DecomposeEinsum.tolerance).reasons


def test_all_orders_of_a_batched_product():
    for out in permutations("abcd"):
        apart(einsum(f"aebc,aedc->{''.join(out)}", (2, 6, 3, 4), (2, 6, 5, 4)))
