"""`fuse-gemm`: biases, transposes and factors in every order, and what must stay a MatMul."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import ask, build, feed, node, outputs, run_twice, weight

from perwatt.drift import drift
from perwatt.passes.fuse_gemm import FuseGemm

LARGER = "what is added may be larger than the product"


def fused(artifact, batch=None):
    """The result of the pass, with outputs proved to be within its tolerance."""
    after, changes = run_twice(FuseGemm(), artifact)
    batch = batch or feed(artifact)
    assert not drift([outputs(artifact, batch)], [outputs(after, batch)], FuseGemm.tolerance).reasons
    return after, changes


def left(artifact):
    """The reason given for the only occurrence, or None where there is none; nothing was changed."""
    after, changes = run_twice(FuseGemm(), artifact)
    assert after is artifact and len(changes) <= 1
    return changes[0].removeprefix("1 left: ") if changes else None


def net(nodes, inputs, y, weights=None, **options):
    """`inputs` as `x:4,5 z:5,6`; all float32."""
    specs = " ".join(f"{name}:float32[{shape}]" for name, shape in (spec.split(":") for spec in inputs.split()))
    return build(nodes, specs, f"y:float32[{y}]", weights, **options)


def test_a_dense_layer_and_scaled_scores(golden_pass):
    nodes = [
        node("MatMul", "x w", "a", name="dense"), node("Add", "b a", "h"), node("Transpose", "z", "t", perm=[1, 0]),
        node("MatMul", "h t", "s", name="scores"), node("Mul", "s eighth", "y"),
    ]  # fmt: skip
    weights = {"w": weight(4, 6), "b": weight(6), "eighth": np.float32([0.125])}
    before = net(nodes, "x:batch,4 z:7,6", "batch,7", weights, inner="h:float32[batch,6] s:float32[batch,7]")
    after, changes = fused(before)
    golden_pass("fuse_gemm", before, after, changes)
    assert [each.name for each in after.model.graph] == ["dense", "scores"]


@given(
    start=st.sampled_from(["MatMul", "Gemm", "Gemm with bias"]), alpha=st.sampled_from([1.0, -0.5]),
    beta=st.sampled_from([1.0, 3.0]), shape=st.sampled_from([(), (1,), (6,), (1, 6), (3, 6), (3, 1)]),
    own=st.sampled_from([(), (6,), (1, 6)]), flip=st.booleans(),
)  # fmt: skip
def test_every_bias_that_is_no_larger_than_the_product(start, alpha, beta, shape, own, flip):
    options = {} if start == "MatMul" else {"alpha": alpha, "beta": beta}
    weights = {
        "w": weight(4, 6),
        "c": weight(*shape),
        **({"b": weight(*own, seed=1)} if start == "Gemm with bias" else {}),
    }
    product = node(start.split()[0], "x w b" if "b" in weights else "x w", "p", **options)
    before = net([product, node("Add", "c p" if flip else "p c", "y")], "x:3,4", "3,6", weights)
    grows = "b" in weights and shape == (3, 1) and own != ()
    if grows:
        assert left(before) == "both biases together would be larger than each"
    else:
        assert fused(before)[0].operator_counts() == {"Gemm": 1}


@given(
    kind=st.sampled_from(["MatMul", "Gemm"]), turns=st.tuples(st.booleans(), st.booleans()),
    flags=st.tuples(st.booleans(), st.booleans()), perm=st.booleans(), stored=st.booleans(),
)  # fmt: skip
def test_every_transpose_of_an_operand(kind, turns, flags, perm, stored):
    flags = flags if kind == "Gemm" else (False, False)
    # Each operand is transposed by a node, by the Gemm's flag, by both or by neither.
    shapes = [
        shape[::-1] if turn ^ flag else shape for shape, turn, flag in zip([(3, 4), (4, 6)], turns, flags, strict=True)
    ]
    nodes = [
        node("Transpose", name, f"{name}t", **({"perm": [1, 0]} if perm else {}))
        for name, turn in zip("xz", turns, strict=True)
        if turn
    ]
    operands = " ".join(f"{name}t" if turn else name for name, turn in zip("xz", turns, strict=True))
    options = {name: 1 for name, flag in zip(("transA", "transB"), flags, strict=True) if flag}
    nodes.append(node(kind, operands, "y", **options))
    words = [",".join(map(str, shape)) for shape in shapes]
    inputs = f"x:{words[0]}" if stored else f"x:{words[0]} z:{words[1]}"
    after, _ = fused(net(nodes, inputs, "3,6", {"z": weight(*shapes[1])} if stored else None))
    assert after.operator_counts() == {"Gemm" if any(turns) else kind: 1}


@given(
    operator=st.sampled_from(["Mul", "Div"]), where=st.sampled_from(["first", "second", "after"]),
    kind=st.sampled_from(["MatMul", "Gemm", "Gemm with bias"]), shape=st.sampled_from([(), (1,), (1, 1)]), flip=st.booleans(),
)  # fmt: skip
def test_every_factor_between_computed_operands(operator, where, kind, shape, flip):
    def times(source, out):
        return node(operator, f"k {source}" if flip and operator == "Mul" else f"{source} k", out)

    extra = " b" if kind == "Gemm with bias" else ""
    options = {"alpha": 0.5, "beta": 2.0} if extra else {}
    product = node(kind.split()[0], {"first": "s z", "second": "x s", "after": "x z"}[where] + extra, "p", **options)
    nodes = {
        "first": [times("x", "s"), product], "second": [times("z", "s"), product], "after": [product, times("p", "q")],
    }[where]  # fmt: skip
    nodes.append(node("Relu", nodes[-1].output[0], "y"))
    weights = {"k": np.full(shape, 0.3, np.float32), **({"b": weight(6)} if extra else {})}
    after, _ = fused(net(nodes, "x:batch,4 z:4,6", "batch,6", weights))
    assert after.operator_counts() == {"Gemm": 1, "Relu": 1}


def test_everything_at_once():
    nodes = [
        node("Transpose", "x", "xt"), node("Mul", "z two", "z2"), node("MatMul", "xt z2", "p"), node("Div", "p three", "q"),
        node("Add", "q b", "r"), node("Add", "r c", "y"),
    ]  # fmt: skip
    weights = {"two": np.float32(2), "three": np.float32([3]), "b": weight(6), "c": weight(1, 6)}
    after, changes = fused(net(nodes, "x:4,3 z:4,6", "3,6", weights))
    (gemm,) = after.model.graph
    assert gemm.attributes.get_float("alpha") == pytest.approx(2 / 3) and gemm.attributes.get_int("transA") == 1
    assert changes == ["5 biases, transposes and factors taken into a Gemm"]


def test_products_of_three_axes_are_none_of_it():
    nodes = [node("MatMul", "x w", "p"), node("Add", "p b", "y")]
    assert left(net(nodes, "x:batch,3,4", "batch,3,6", {"w": weight(4, 6), "b": weight(6)})) is None


def test_a_vector_times_a_matrix_is_none_of_it():
    nodes = [node("MatMul", "x w", "p"), node("Add", "p b", "y")]
    assert left(net(nodes, "x:4", "6", {"w": weight(4, 6), "b": weight(6)})) is None


def of_unknown_rank(inner=""):
    """MatMul and Add on an operand whose rank is fed."""
    nodes = [node("Reshape", "x shape", "r"), node("MatMul", "r w", "p"), node("Add", "p b", "y")]
    weights = {"w": weight(4, 6), "b": weight(6)}
    return build(nodes, "x:float32[3,4] shape:int64[axes]", "y:float32[?,6]", weights, inner=inner)


def test_operands_of_unknown_rank_stay():
    assert left(of_unknown_rank()) == "how many axes its operands have is not known"


def test_the_rank_of_the_result_tells_that_of_an_operand():
    after, _ = fused(of_unknown_rank("p:float32[?,6]"), {"x": weight(3, 4), "shape": np.int64([3, 4])})
    assert after.operator_counts() == {"Gemm": 1, "Reshape": 1}


def test_whole_numbers_stay():
    nodes = [node("MatMul", "x w", "p"), node("Add", "p b", "y")]
    weights = {"w": np.arange(24).reshape(4, 6), "b": np.arange(6)}
    assert left(build(nodes, "x:int64[batch,4]", "y:int64[batch,6]", weights)) == "it is not known to be floating point"


@pytest.mark.parametrize(
    ("x", "columns", "bias", "y"),
    [
        ("3,4", 1, (6,), "3,6"),
        ("1,4", 6, (3, 1), "3,6"),
        ("batch,4", 6, (3, 6), "3,6"),
        ("3,4", 6, (1, 1, 1), "1,3,6"),
    ],
)
def test_a_bias_that_may_make_the_product_larger_stays(x, columns, bias, y):
    nodes = [node("MatMul", "x w", "p"), node("Add", "p b", "y")]
    assert left(net(nodes, f"x:{x}", y, {"w": weight(4, columns), "b": weight(*bias)})) == LARGER


def test_a_computed_addend_is_no_bias():
    nodes = [node("MatMul", "x w", "p"), node("Add", "p x", "y")]
    assert left(net(nodes, "x:3,4", "3,4", {"w": weight(4, 4)})) is None


def test_a_gemm_that_adds_something_computed_stays():
    nodes = [node("Gemm", "x w x", "p"), node("Add", "p b", "y")]
    assert left(net(nodes, "x:3,4", "3,4", {"w": weight(4, 4), "b": weight(4)})) == "it adds something computed already"


def test_a_factor_beside_weights_belongs_into_them():
    nodes = [node("MatMul", "x w", "p"), node("Mul", "p k", "y")]
    assert left(net(nodes, "x:3,4", "3,6", {"w": weight(4, 6), "k": np.float32(2)})) is None


@pytest.mark.parametrize(
    ("factor", "operator"), [(0, "Mul"), (0, "Div"), (np.inf, "Mul"), (np.inf, "Div"), (np.nan, "Mul")]
)
def test_factors_of_nothing_stay(factor, operator):
    nodes = [node("MatMul", "x z", "p"), node(operator, "p k", "y")]
    before = net(nodes, "x:3,4 z:4,6", "3,6", {"k": np.float32(factor)})
    assert left(before) == "its factor is zero or not finite"


def test_a_factor_that_needs_64_bits_stays():
    nodes = [node("MatMul", "x z", "p"), node("Mul", "p k", "y")]

    def before(factor):
        return build(nodes, "x:float64[3,4] z:float64[4,6]", "y:float64[3,6]", {"k": np.float64(factor)})

    assert left(before(0.1)) == "alpha has 32 bits, and its factor needs more"
    assert fused(before(0.125))[0].operator_counts() == {"Gemm": 1}


def test_a_factor_that_adds_an_axis_stays():
    nodes = [node("MatMul", "x z", "p"), node("Mul", "p k", "y")]
    before = net(nodes, "x:3,4 z:4,6", "1,3,6", {"k": np.full((1, 1, 1), 2, np.float32)})
    assert left(before) == "its factor adds axes"


def test_a_factor_for_each_column_is_none():
    nodes = [node("MatMul", "x z", "p"), node("Mul", "p k", "y")]
    assert left(net(nodes, "x:3,4 z:4,6", "3,6", {"k": weight(6)})) is None


def test_a_number_divided_by_the_product_stays():
    nodes = [node("MatMul", "x z", "p"), node("Div", "k p", "y")]
    assert left(net(nodes, "x:3,4 z:4,6", "3,6", {"k": np.float32(2)})) is None


def test_a_transpose_that_turns_nothing_stays():
    nodes = [node("Transpose", "x", "t", perm=[0, 1]), node("MatMul", "t z", "y")]
    assert left(net(nodes, "x:3,4 z:4,6", "3,6")) == "its transpose turns nothing"


def test_a_transpose_used_elsewhere_stays():
    nodes = [node("Transpose", "x", "t"), node("MatMul", "t z", "p"), node("Add", "p t", "y")]
    assert left(net(nodes, "x:4,4 z:4,4", "4,4")) == "a value inside it is used elsewhere too"


def test_a_transpose_that_is_both_operands_stays():
    nodes = [node("Transpose", "x", "t"), node("MatMul", "t t", "y")]
    assert left(net(nodes, "x:4,4", "4,4")) == "the same value is an operand twice"


def test_a_product_that_is_an_output_stays():
    nodes = [node("MatMul", "x w", "p"), node("Add", "p b", "y")]
    weights = {"w": weight(4, 6), "b": weight(6)}
    before = build(nodes, "x:float32[3,4]", "y:float32[3,6] p:float32[3,6]", weights)
    assert left(before) == "a value inside it is an output"


def test_old_models_are_raised_to_where_the_bias_may_be_left_out():
    nodes = [node("Transpose", "x", "t"), node("MatMul", "t z", "y")]
    before = net(nodes, "x:4,3 z:4,6", "3,6", opset=9)
    assert ask(FuseGemm(), before) == []
    after, _ = fused(before)
    assert after.model.opset_imports[""] == 11


def test_a_factor_that_makes_a_matrix_of_a_vector_stays():
    nodes = [node("Mul", "x k", "s"), node("MatMul", "s z", "y")]
    assert left(net(nodes, "x:4 z:4,6", "1,6", {"k": np.full((1, 1), 2, np.float32)})) == "its factor adds axes"
