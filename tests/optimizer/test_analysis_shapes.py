"""The analysis of shapes says only what is so: every shape and element it knows is the one that comes out."""

import itertools
import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, node, outputs, proto, weight
from onnx import helper
from shape_programs import BATCHES, programs

from perwatt.analysis_elements import Affine, as_affine
from perwatt.analysis_expressions import (
    Expression,
    equal,
    least,
    less,
    maximum,
    minimum,
    named,
    product,
    quotient,
    remainder,
    symbol,
    truncated,
)
from perwatt.analysis_shapes import analyse, broadcast
from perwatt.artifact import Artifact

N, M = symbol("n", 1), symbol("m", 0)


def value_of(number, **sizes):
    """What an expression is for given sizes; None where it holds a symbol that isn't among them."""
    if number is None or isinstance(number, int | np.generic):
        return number
    total = 0
    for monomial, factor in number.terms.items():
        for one in monomial:
            if one.name not in sizes:
                return None
            factor *= sizes[one.name]
        total += factor
    return total


# Expressions ----------------------------------------------------------------------------------------------------------

NUMBERS = st.recursive(
    st.integers(-4, 6) | st.sampled_from([N, M]),
    lambda inner: st.tuples(st.sampled_from("+-*"), inner, inner).map(lambda t: _apply(*t)), max_leaves=5,
)  # fmt: skip


def _apply(sign, a, b):
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def holds(number):
    """The numbers that an expression stands for at many sizes."""
    return [value_of(number, n=n, m=m) for n, m in itertools.product((1, 2, 3, 7), (0, 1, 2, 5))]


@given(NUMBERS, NUMBERS)
def test_what_is_said_of_two_numbers_holds_at_all_sizes(a, b):
    pairs = list(zip(holds(a), holds(b), strict=True))
    for said, really in ((equal(a, b), lambda x, y: x == y), (less(a, b), lambda x, y: x < y)):
        assert said is None or all(really(x, y) == said for x, y in pairs)
    low = least(a)
    assert low is None or all(x >= low for x, _ in pairs)
    assert (a == b) == all(x == y for x, y in pairs) or isinstance(a, Expression)
    for made, really in ((quotient(a, b), None), (truncated(a, b), lambda x, y: int(x / y)), (remainder(a, b), np.mod),
                         (minimum(a, b), min), (maximum(a, b), max)):  # fmt: skip
        if made is not None and value_of(made, n=1, m=0) is not None:
            for (x, y), found in zip(pairs, holds(made), strict=True):
                assert found * y == x if really is None else y == 0 or found == really(x, y)


def test_one_form_of_each_number():
    assert 16 * N * 4 == 64 * N and N + M == M + N and N * M == M * N and N - N == 0 and N * 0 == 0
    assert str(16 * N + 1) == "16*n + 1" and hash(N + M) == hash(M + N)
    assert product([N, 2, M]) == 2 * N * M and product([]) == 1


def test_what_is_no_polynomial_is_named():
    assert truncated(N, 2) == truncated(N, 2) and str(truncated(N, 2)) == "floor(n / 2)"
    assert truncated(N - 5, 2) is None, "rounding goes the other way below 0"
    assert str(remainder(N, 4)) == "mod(n, 4)" and remainder(8 * N + 3, 4) == 3
    assert minimum(N, 0) == 0 and str(minimum(N, 8)) == "min(8, n)" and maximum(M - 3, 0) == maximum(0, M - 3)
    assert named(3 * N) and not named(symbol("?x:0")) and not named(truncated(N, 2))
    assert not truncated(N, 0) and quotient(N, 0) is None


def test_quotients_of_sums():
    assert quotient(16 * N * M + 16 * N, 4 * N) == 4 * M + 4
    assert quotient((N + 1) * 12, (N + 1) * 4) == 3 and quotient((N + 1) * N, N + 1) == N
    assert quotient(N + 1, N) is None and quotient(6 * N, 4) is None


# Shapes ---------------------------------------------------------------------------------------------------------------


def test_broadcasting():
    assert broadcast([(N, 1), (1, 5)]) == (N, 5) and broadcast([(N, 5), (5,)]) == (N, 5) and broadcast([(), ()]) == ()
    assert broadcast([(N,), (16,)]) == (16,), "a valid program has 1 or 16 there"
    assert broadcast([(M,), (minimum(M, 64),)]) == (M,), "beyond 64 only 1 would fit, and that is no longer"
    assert broadcast([(M,), (minimum(M, N - 1),)]) is None
    assert broadcast([(N,), (M,)]) is None and broadcast([(3,), (4,)]) is None


def checked(artifact, batch, real):
    """Compare what is known of every value with what it really is; how many sizes and elements were known."""
    facts = analyse(artifact)
    sizes = {dim: batch[spec.name].shape[axis] for spec in artifact.signature.inputs
             for axis, dim in enumerate(spec.shape or ()) if isinstance(dim, str)}  # fmt: skip
    known = 0
    for value in (value for each in artifact.model.graph for value in each.outputs if value.name in real):
        array, shape = real[value.name], facts.shape(value)
        if shape is None:
            continue
        assert len(shape) == array.ndim, value.name
        found = [value_of(size, **sizes) for size in shape]
        assert all(size in (None, got) for size, got in zip(found, array.shape, strict=True)), (
            value,
            shape,
            array.shape,
        )
        known += sum(size is not None for size in found)
        known += _same_elements(value, facts.content(value), array, sizes)
    return known


def _same_elements(value, content, array, sizes):
    if isinstance(content, Affine):
        numbers = [value_of(number, **sizes) for number in (content.base, *content.strides)]
        if None in numbers:
            return 0
        places = np.indices(array.shape).reshape(array.ndim, -1)
        np.testing.assert_array_equal(numbers[0] + np.array(numbers[1:]) @ places, array.reshape(-1).astype(int))
        return array.size
    if content is None:
        return 0
    assert content.shape == array.shape, value
    pairs = [(value_of(one, **sizes), got) for one, got in zip(content.flat, array.flat, strict=True)]
    assert all(one is None or one == got for one, got in pairs), (value, content, array)
    assert content.dtype == object or content.dtype == array.dtype
    return sum(one is not None for one, _ in pairs)


@given(programs())
def test_random_programs(program):
    artifact = program.artifact(everything=True)
    for turn, batch in enumerate(program.batches()):
        assert BATCHES[turn] == len(batch["x"])
        checked(artifact, batch, outputs(artifact, batch))


def _filled(sizes, name, truth):
    return node("ConstantOfShape", sizes, name, value=helper.make_tensor("v", onnx.TensorProto.BOOL, [1], [truth]))


ONE = {"i": np.int64([2]), "zero": np.int64(0), "two": np.int64(2)}


@pytest.mark.parametrize(
    "nodes, weights",
    [
        ([node("Shape", "x", "s", start=-2), node("Size", "x", "n"), node("Abs", "n", "a")], {}),
        ([node("Shape", "x", "s"), node("Split", "s k", "p q", axis=0), node("ReduceMax", "q", "m"), node("Neg", "m", "o")],
         {"k": np.int64([1, 2])}),
        ([node("Shape", "x", "s"), node("ReduceSum", "s", "a", keepdims=0), node("ReduceProd", "s", "b")], {}),
        ([node("Shape", "x", "s"), node("Trilu", "t", "l", upper=0), node("Trilu", "t two", "u")], {"t": np.ones((4, 4))}),
        ([node("ConstantOfShape", "i", "c"), node("Shape", "x", "s"), node("ConstantOfShape", "s", "d")], {}),
        ([node("Shape", "x", "s"), node("Tile", "s i", "t"), node("Greater", "s zero", "g"), node("Not", "g", "h"),
          node("Xor", "g h", "o"), node("And", "g o", "e"), node("Cast", "e", "f", to=6)], {}),
        ([node("Shape", "x", "s"), node("Cast", "s", "f", to=1), node("Mul", "f half", "h"), node("Floor", "h", "l"),
          node("Cast", "l", "o", to=7)], {"half": np.float32(0.5)}),
        ([node("NonZero", "t", "a"), node("GatherND", "t k", "b"), node("GatherElements", "t l", "c", axis=1)],
         {"t": np.arange(6).reshape(2, 3), "k": np.int64([[0, 1], [1, -1]]), "l": np.int64([[0, -1], [2, 2]])}),
        ([node("Div", "a b", "q"), node("Mod", "a b", "r"), node("Div", "f b2", "h")],
         {"a": np.int64([-7, 7, -8]), "b": np.int64([2, -2, 3]), "f": np.float32([1, 2]), "b2": np.float32([3, 0])}),
        ([node("Cast", "f", "a", to=6), node("Cast", "g", "b", to=9), node("Cast", "g", "c", to=7)],
         {"f": np.float32([-1.5, 2.7]), "g": np.float32([0.0, 0.5])}),
        ([node("Flatten", "x", "f", axis=-1), node("Flatten", "x", "g", axis=0), node("Concat", "x x", "c", axis=-1)], {}),
        ([node("Pad", "x p - k", "o"), node("Tile", "x r", "t")],
         {"p": np.int64([1, 2]), "k": np.int64([1]), "r": np.int64([2, 1, 3])}),
        ([node("Shape", "x", "n", start=0, end=1), _filled("n", "t", 1), _filled("n", "f", 0), node("And", "t f", "a"),
          node("And", "t t", "b"), node("Or", "f t", "c"), node("Or", "f f", "d")], {}),
        ([node("Shape", "x", "n", start=0, end=1), node("Squeeze", "n", "s"), node("Range", "zero s one", "r"),
          node("GreaterOrEqual", "r zero", "a"), node("Less", "r s", "b"), node("Less", "r two", "c"),
          node("Equal", "r s", "d"), node("Mul", "r two", "e"), node("Sub", "two r", "g")], {"one": np.int64(1)}),
        ([node("Slice", "x m big zero1", "a"), node("Slice", "x zero1 m zero1", "b"), node("Slice", "x low k zero1", "c")],
         {"m": np.int64([-2]), "big": np.int64([2**63 - 1]), "zero1": np.int64([0]), "low": np.int64([-(2**31)]),
          "k": np.int64([3])}),
        ([node("Slice", "x i i2", "a"), node("Slice", "x i b k i", "c"), node("Slice", "x e b k e", "d")],
         {"i2": np.int64([5]), "b": np.int64([-(2**63)]), "k": np.int64([1]), "e": np.int64([-1])}),
    ],
)  # fmt: skip
def test_single_operators(nodes, weights):
    artifact = all_values(nodes, {name: array for name, array in {**ONE, **weights}.items() if _used(name, nodes)})
    for items in (1, 2, 7):
        batch = {"x": weight(items, 4, 3)}
        assert checked(artifact, batch, outputs(artifact, batch))


def _used(name, nodes):
    return any(name in n.input for n in nodes)


def all_values(nodes, weights):
    """A model of x[batch, 4, 3], and of weights where nothing takes x, whose outputs are all its values."""
    made = proto(nodes, "x:float32[batch,4,3]", "", weights)
    found = onnx.shape_inference.infer_shapes(made).graph.value_info
    made.graph.output.extend(helper.make_tensor_value_info(v.name, v.type.tensor_type.elem_type, None) for v in found)
    return Artifact(model=ir.from_proto(made))


def test_affine_arrays():
    found = as_affine(np.arange(6).reshape(1, 2, 3) * 2 + 5, (1, 2, 3))
    assert found.base == 5 and found.strides == (0, 6, 2)
    assert as_affine(np.array([0, 1, 3]), (3,)) is None and as_affine(np.zeros(0, int), (0,)) is None


def test_symbols_have_the_batch_for_a_bound():
    made = build([node("Relu", "x", "y")], "x:float32[batch,words,?]", "y:float32[batch,words,?]")
    batch, words, other = analyse(made).shape(made.model.graph.inputs[0])
    assert (least(batch), least(words), least(other)) == (1, 0, 0)
    assert re.fullmatch(r"\?x:2", str(other)) and not named(other)


@pytest.mark.parametrize("length, known", [("5", True), ("words", False)])
def test_the_rest_of_a_reshape_beside_nothing(length, known):
    """A size that is fed can be worked out from all the others, but not where they may come to 0: then anything fits."""
    nodes = [
        node("Shape", "x", "w", start=1, end=2), node("Concat", "w k", "t", axis=0),
        node("Reshape", "x t", "y", allowzero=1),
    ]  # fmt: skip
    made = build(nodes, f"x:float32[2,{length},6] k:int64[1]", "y:float32[?,?]")
    assert (analyse(made).shape(made.model.graph.outputs[0])[1] == 12) == known
