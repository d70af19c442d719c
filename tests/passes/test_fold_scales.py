"""`fold-scales`: after and before every kind of product, in a row without one, and what only looks foldable."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node, outputs, run_twice, weight

from perwatt.drift import drift
from perwatt.passes.fold_scales import FoldScales

KINDS = ("conv", "padded", "transposed", "gemm", "turned", "matmul")
SHIFTS = ("Add", "Sub", "from")
OTHER_AXES = "it may run along other axes than the channels of the product before it"
PADDING = "what it adds would be missing in the padding of the convolution after it"


def folded(artifact, batch=None):
    """The result of the pass, with outputs proved to be within its tolerance."""
    after, changes = run_twice(FoldScales(), artifact)
    batch = batch or feed(artifact)
    assert not drift([outputs(artifact, batch)], [outputs(after, batch)], FoldScales.tolerance).reasons
    return after, changes


def left(artifact):
    """The reason given for the only occurrence, or None where there is none; nothing was changed."""
    after, changes = run_twice(FoldScales(), artifact)
    assert after is artifact and len(changes) <= 1
    return changes[0].removeprefix("1 left: ") if changes else None


def layer(kind, source, out, bias=True):
    """Nodes and weights of a product from 4 channels to 6, and the shapes of its data and its output."""
    if kind in ("conv", "padded"):
        made = node("Conv", f"{source} w b" if bias else f"{source} w", out, group=2, pads=[int(kind == "padded")] * 4)
        side = 5 if kind == "padded" else 3
        return [made], {"w": weight(6, 2, 3, 3), "b": weight(6)}, "batch,4,5,5", f"batch,6,{side},{side}"
    if kind == "transposed":
        made = node("ConvTranspose", f"{source} w b" if bias else f"{source} w", out, group=2)
        return [made], {"w": weight(4, 3, 2, 2), "b": weight(6)}, "batch,4,5,5", "batch,6,6,6"
    if kind == "matmul":
        made = [node("MatMul", f"{source} w", "mm" if bias else out)] + [node("Add", "b mm", out)] * bias
        return made, {"w": weight(4, 6), "b": weight(6)}, "batch,3,4", "batch,3,6"
    options = {"transB": 1, "alpha": 0.5, "beta": 2.0} if kind == "turned" else {}
    made = node("Gemm", f"{source} w b" if bias else f"{source} w", out, **options)
    return [made], {"w": weight(6, 4) if kind == "turned" else weight(4, 6), "b": weight(6)}, "batch,4", "batch,6"


def row(links, source, out, channels, rank):
    """Nodes and weights that apply `links`, pairs of an operator (`from` is a Sub from the constant) and a shape."""
    trailing = 0 if rank < 4 else rank - 2
    shapes = {
        "number": (), "one": (1,), "ones": (1,) * rank, "short": (channels, *[1] * trailing),
        "whole": (*[1] * (rank - 1 - trailing), channels, *[1] * trailing),
    }  # fmt: skip
    nodes, weights = [], {}
    for place, (operator, shape) in enumerate(links):
        target = out if place == len(links) - 1 else f"r{place}"
        weights[f"k{place}"] = np.abs(weight(*shapes[shape], seed=place)) + np.float32(0.5)
        first = f"k{place} {source}" if operator in ("from", "Mul flipped") else f"{source} k{place}"
        nodes.append(node({"from": "Sub", "Mul flipped": "Mul"}.get(operator, operator), first, target))
        source = target
    return nodes, weights


def used(nodes, weights):
    return {name: array for name, array in weights.items() if any(name in each.input for each in nodes)}


def net(nodes, weights, x, y, **options):
    return build(nodes, f"x:float32[{x}]", f"y:float32[{y}]", used(nodes, weights), **options)


a_row = st.lists(
    st.tuples(
        st.sampled_from(["Mul", "Mul flipped", "Div", "Add", "Sub", "from"]),
        st.sampled_from(["number", "one", "ones", "short", "whole"]),
    ), min_size=1, max_size=3,
)  # fmt: skip


def test_an_image_is_normalized_and_a_branch_scaled(golden_pass):
    nodes = [
        node("Sub", "x mean", "c"), node("Div", "c deviation", "d"), node("Conv", "d w1", "e", pads=[1] * 4),
        node("Transpose", "e", "f", perm=[0, 2, 3, 1]), node("MatMul", "f w2", "g"), node("Add", "g b2", "h"),
        node("Mul", "gamma h", "y"),
    ]  # fmt: skip
    weights = {
        "mean": weight(3, 1, 1), "deviation": np.abs(weight(1, 3, 1, 1)) + np.float32(0.1), "w1": weight(4, 3, 3, 3),
        "w2": weight(4, 6), "b2": weight(6), "gamma": weight(6),
    }  # fmt: skip
    before = net(nodes, weights, "batch,3,5,5", "batch,5,5,6")
    after, changes = folded(before)
    golden_pass("fold_scales", before, after, changes)
    assert after.operator_counts() == {"Add": 2, "Conv": 1, "Transpose": 1, "MatMul": 1}


@given(kind=st.sampled_from(KINDS), bias=st.booleans(), links=a_row)
def test_after_a_product_every_row_along_channels_vanishes(kind, bias, links):
    made, weights, x, y = layer(kind, "x", "p", bias)
    behind, more = row(links, "p", "y", 6, y.count(",") + 1)
    after, changes = folded(net(made + behind, weights | more, x, y))
    shifted = bias or any(operator in SHIFTS for operator, _ in links)
    # What is right behind a MatMul and only adds is its bias already.
    nothing_to_do = kind == "matmul" and not bias and [operator for operator, _ in links] == ["Add"]
    assert bool(changes) is not nothing_to_do
    assert sum(after.operator_counts().values()) == 1 + (kind == "matmul" and shifted)


@given(kind=st.sampled_from(KINDS), bias=st.booleans(), links=a_row)
def test_before_a_product_scales_vanish_and_shifts_where_nothing_is_padded(kind, bias, links):
    made, weights, x, y = layer(kind, "r", "y", bias)
    front, more = row(links, "x", "r", 4, x.count(",") + 1)
    after, _ = folded(net(front + made, weights | more, x, y))
    shifted = any(operator in SHIFTS for operator, _ in links)
    padded = kind in ("padded", "transposed")
    kept = shifted and (padded or (kind == "matmul" and not bias))
    assert sum(after.operator_counts().values()) == len(made) + kept


@given(links=a_row, x=st.sampled_from(["batch,4", "batch,3,4", "batch,1", "?,?"]))
def test_rows_without_a_product_become_one_scale_and_one_shift(links, x):
    nodes, weights = row(links, "x", "y", 4, x.count(",") + 1)
    before = net(nodes, weights, x, "?,?,?" if x == "batch,3,4" else "?,?")
    after, _ = folded(
        before, {"x": weight(*[d for d in (3, *(int(n) if n.isdigit() else 4 for n in x.split(",")[1:]))])}
    )
    shifted = any(operator in SHIFTS for operator, _ in links)
    kinds = [operator for operator, _ in links]
    # Subtracted from a number twice, the sign is what it was.
    scaled = any(kind not in SHIFTS for kind in kinds) or kinds.count("from") % 2 == 1
    assert sum(after.operator_counts().values()) == min(len(links), shifted + scaled)


def test_a_scale_that_several_products_share_goes_into_each():
    nodes = [
        node("Mul", "gamma x", "s"), node("MatMul", "s wq", "q"), node("MatMul", "s wk", "k"), node("Add", "k b", "kb"),
        node("Add", "q kb", "y"),
    ]  # fmt: skip
    weights = {"gamma": weight(4), "wq": weight(4, 6), "wk": weight(4, 6, seed=1), "b": weight(6)}
    after, changes = folded(net(nodes, weights, "batch,3,4", "batch,3,6"))
    assert after.operator_counts() == {"MatMul": 2, "Add": 2}
    assert changes == ["1 scales and shifts folded into the constants beside them"]


def test_between_two_products_the_first_takes_it():
    nodes = [node("Conv", "x w1", "a"), node("Add", "a t", "s"), node("Conv", "s w2", "y", pads=[1] * 4)]
    weights = {"w1": weight(4, 3, 1, 1), "t": weight(4, 1, 1), "w2": weight(2, 4, 3, 3)}
    after, _ = folded(net(nodes, weights, "batch,3,5,5", "batch,2,5,5"))
    assert after.operator_counts() == {"Conv": 2}


def test_numbers_that_undo_each_other_leave_nothing():
    nodes = [node("Mul", "x two", "a"), node("Div", "a two", "b"), node("Relu", "b", "y")]
    after, _ = folded(net(nodes, {"two": np.float32(2)}, "batch,4", "batch,4"))
    assert after.operator_counts() == {"Relu": 1}


def test_what_makes_the_shape_stays_even_where_it_changes_no_number():
    nodes = [node("Mul", "x twos", "a"), node("Div", "a twos", "y")]
    before = net(nodes, {"twos": np.full(4, 2, np.float32)}, "batch,1", "batch,4")
    after, _ = folded(before)
    assert after.operator_counts() == {"Mul": 1}


def test_the_weight_stays_the_same_tensor_where_only_the_bias_changes():
    nodes = [
        node("Conv", "x w", "a"), node("Add", "a t", "b"), node("Relu", "b", "c"), node("Conv", "c w", "y"),
    ]  # fmt: skip
    after, _ = folded(net(nodes, {"w": weight(4, 4, 1, 1), "t": weight(4, 1, 1)}, "batch,4,3,3", "batch,4,3,3"))
    assert after.operator_counts() == {"Conv": 2, "Relu": 1}
    assert "w" in after.model.graph.initializers and len(after.model.graph.initializers) == 2


def after_conv(constant, operator="Mul", first="p k", **more):
    """Conv from x to p with 4 channels and 5 × 5 pixels, then `operator` with the stored k to y."""
    nodes = [node("Conv", "x w", "p"), node(operator, first, "y")]
    return build(
        nodes, "x:float32[batch,3,5,5]", "y:float32[batch,4,5,5]", {"w": weight(4, 3, 1, 1), "k": constant} | more
    )


@pytest.mark.parametrize("shape", [(5,), (5, 5), (4, 5, 5), (4, 1, 5), (1, 4, 5, 1)])
def test_scales_along_other_axes_stay(shape):
    assert left(after_conv(weight(*shape))) == OTHER_AXES


def test_a_scale_that_adds_channels_stays():
    nodes = [node("Conv", "x w", "p"), node("Mul", "p k", "y")]
    before = net(nodes, {"w": weight(1, 3, 1, 1), "k": weight(4, 1, 1)}, "batch,3,5,5", "batch,4,5,5")
    assert left(before) == OTHER_AXES


def test_a_scale_that_adds_an_axis_stays():
    nodes = [node("MatMul", "x w", "p"), node("Mul", "p k", "y")]
    assert left(net(nodes, {"w": weight(4, 6), "k": weight(1, 1, 6)}, "batch,4", "1,batch,6")) == OTHER_AXES


def test_dividing_by_the_product_is_no_scale():
    assert left(after_conv(weight(4, 1, 1), "Div", "k p")) is None


def test_numbers_that_are_not_finite_stay():
    assert left(after_conv(np.float32(0), "Div")) == "a scale or shift is not finite"
    assert left(after_conv(np.float32(np.inf))) == "a scale or shift is not finite"


@pytest.mark.parametrize("scale", [1e-6, 6e4])
def test_weights_stay_in_the_range_of_their_type(scale):
    nodes = [node("Conv", "x w", "p"), node("Mul", "p k", "y")]
    weights = {"w": weight(4, 3, 1, 1, scale=2, dtype=np.float16), "k": np.float16(scale)}
    before = build(nodes, "x:float16[batch,3,5,5]", "y:float16[batch,4,5,5]", weights)
    assert left(before) == "scaled weights would leave the range of float16"


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_weights_keep_their_type(dtype):
    name = np.dtype(dtype).name
    nodes = [node("Conv", "x w", "p"), node("Mul", "p k", "y")]
    weights = {"w": weight(4, 3, 1, 1, dtype=dtype), "k": weight(4, 1, 1, dtype=dtype)}
    before = build(nodes, f"x:{name}[batch,3,5,5]", f"y:{name}[batch,4,5,5]", weights)
    after, _ = run_twice(FoldScales(), before)
    kinds = {value.const_value.dtype for value in after.model.graph.initializers.values()}
    assert kinds == {ir.DataType.from_numpy(np.dtype(dtype))} and after.operator_counts() == {"Conv": 1}


def test_what_is_rounded_once_is_closer_than_what_was_rounded_twice():
    exact = weight(4, 3, 1, 1).astype(np.float64) * np.float64(np.float32(0.1))
    after, _ = folded(after_conv(np.float32(0.1)))
    (new,) = (value.const_value.numpy() for value in after.model.graph.initializers.values())
    assert np.array_equal(new, exact.astype(np.float32))


def test_whole_numbers_are_none_of_it():
    nodes = [node("Mul", "x two", "a"), node("Add", "a two", "b"), node("Mul", "b two", "y")]
    assert left(build(nodes, "x:int64[batch,4]", "y:int64[batch,4]", {"two": np.int64(2)})) is None


def test_a_product_used_elsewhere_stays():
    nodes = [node("Conv", "x w", "p"), node("Mul", "p k", "q"), node("Add", "p q", "y")]
    before = net(nodes, {"w": weight(4, 3, 1, 1), "k": weight(4, 1, 1)}, "batch,3,5,5", "batch,4,5,5")
    assert left(before) == "a value inside it is used elsewhere too"


def test_a_product_that_is_an_output_stays():
    nodes = [node("Conv", "x w", "p"), node("Mul", "p k", "y")]
    before = build(
        nodes, "x:float32[batch,3,5,5]", "y:float32[batch,4,5,5] p:float32[batch,4,5,5]",
        {"w": weight(4, 3, 1, 1), "k": weight(4, 1, 1)},
    )  # fmt: skip
    assert left(before) == "a value inside it is an output"


def test_shared_weights_stay():
    nodes = [node("Conv", "x w", "a"), node("Relu", "a", "r"), node("Conv", "r w", "b"), node("Mul", "b k", "y")]
    before = net(nodes, {"w": weight(4, 4, 1, 1), "k": weight(4, 1, 1)}, "batch,4,5,5", "batch,4,5,5")
    assert left(before) == "its product shares weights with another one"


def test_computed_weights_are_no_place():
    nodes = [node("Exp", "x", "e"), node("MatMul", "x e", "p"), node("Mul", "p k", "y")]
    assert left(net(nodes, {"k": weight(4)}, "4,4", "4,4")) is None


def test_a_bias_of_more_than_a_row_stays():
    nodes = [node("Gemm", "x w b", "p"), node("Mul", "p k", "y")]
    before = net(nodes, {"w": weight(4, 6), "b": weight(3, 6), "k": weight(6)}, "3,4", "3,6")
    assert left(before) == "its bias is not one number for each channel"


def test_computed_biases_stay():
    nodes = [node("Exp", "x", "e"), node("Gemm", "x w e", "p"), node("Mul", "p k", "y")]
    assert left(net(nodes, {"w": weight(4, 4), "k": weight(4)}, "3,4", "3,4")) == "weights are computed, not stored"


@pytest.mark.parametrize("options", [{"pads": [0, 0, 1, 0]}, {"auto_pad": "SAME_UPPER"}])
def test_a_shift_before_padding_stays(options):
    nodes = [node("Add", "x t", "s"), node("Conv", "s w", "y", **options)]
    before = net(nodes, {"t": weight(3, 1, 1), "w": weight(4, 3, 3, 3)}, "batch,3,5,5", "batch,4,?,?")
    assert left(before) == PADDING


def test_a_shift_before_padding_stays_where_a_scale_is_zero():
    nodes = [node("Mul", "x k", "a"), node("Add", "a t", "s"), node("Conv", "s w", "y", pads=[1] * 4)]
    weights = {"k": np.float32([1, 0, 2]).reshape(3, 1, 1), "t": weight(3, 1, 1), "w": weight(4, 3, 3, 3)}
    assert left(net(nodes, weights, "batch,3,5,5", "batch,4,5,5")) == PADDING


def test_a_scale_of_who_knows_how_many_channels_stays():
    nodes = [node("Mul", "x k", "s"), node("Conv", "s w", "y")]
    before = net(nodes, {"k": weight(3, 1, 1), "w": weight(4, 3, 1, 1)}, "batch,?,5,5", "batch,4,5,5")
    assert left(before) == "how many channels it scales is not known"


def test_a_scale_that_multiplies_channels_into_being_stays():
    nodes = [node("Mul", "x k", "s"), node("Conv", "s w", "y")]
    before = net(nodes, {"k": weight(3, 1, 1), "w": weight(4, 3, 1, 1)}, "batch,1,5,5", "batch,4,5,5")
    assert left(before) == "how many channels it scales is not known"


def test_a_scale_that_gives_the_data_its_axes_stays():
    nodes = [node("Mul", "x k", "s"), node("MatMul", "s w", "y")]
    before = net(nodes, {"k": weight(1, 1, 4), "w": weight(4, 6)}, "batch,4", "1,batch,6")
    assert left(before) == "how many axes it scales is not known"


def test_a_scale_that_somebody_else_reads_stays():
    nodes = [node("Mul", "x k", "s"), node("MatMul", "s w", "p"), node("Add", "p s", "y")]
    assert left(net(nodes, {"k": weight(4), "w": weight(4, 4)}, "batch,4", "batch,4")) is None


def test_a_scale_on_the_rows_of_a_turned_gemm_is_its_channels():
    nodes = [node("Mul", "x k", "s"), node("Gemm", "s w", "y", transA=1)]
    after, _ = folded(net(nodes, {"k": weight(4, 1), "w": weight(4, 6)}, "4,3", "3,6"))
    assert after.operator_counts() == {"Gemm": 1}
    other = net(nodes, {"k": weight(3), "w": weight(4, 6)}, "4,3", "3,6")
    assert left(other) is None


def test_constants_do_not_grow():
    nodes = [node("Mul", "x a", "p"), node("Mul", "p b", "y")]
    before = net(nodes, {"a": weight(4, 1), "b": weight(5)}, "batch,4,5", "batch,4,5")
    assert left(before) == "merged into one, its constants would be larger"


def test_a_row_that_overflows_stays():
    nodes = [node("Mul", "x a", "p"), node("Mul", "p a", "y")]
    assert left(net(nodes, {"a": np.float32(1e30)}, "batch,4", "batch,4")) == "a scale or shift is not finite"


def test_the_size_does_not_grow():
    large, small = after_conv(weight(4, 1, 1)), after_conv(weight(4, 1, 1), more=weight(5000))
    assert list(FoldScales().ensures(small, large)) == []
    assert list(FoldScales().ensures(large, small)) == ["folding made the weights larger"]


def test_what_a_product_adds_is_not_its_data():
    nodes = [node("Mul", "x k", "s"), node("Gemm", "z w s", "y")]
    weights = {"k": weight(4), "w": weight(4, 4)}
    assert left(build(nodes, "x:float32[3,4] z:float32[3,4]", "y:float32[3,4]", weights)) is None


def test_scaled_data_that_is_an_output_stays():
    nodes = [node("Mul", "x k", "s"), node("MatMul", "s w", "y")]
    before = build(
        nodes, "x:float32[3,4]", "y:float32[3,6] s:float32[3,4]", {"k": weight(4), "w": weight(4, 6)}
    )  # fmt: skip
    assert left(before) is None


def test_the_part_of_a_row_that_nobody_else_reads_goes():
    nodes = [node("Mul", "x a", "p"), node("Mul", "p b", "s"), node("MatMul", "s w", "q"), node("Add", "p q", "y")]
    weights = {"a": weight(4), "b": weight(4, seed=1), "w": weight(4, 4)}
    after, _ = folded(net(nodes, weights, "batch,4", "batch,4", inner="p:float32[batch,4]"))
    assert after.operator_counts() == {"Mul": 1, "MatMul": 1, "Add": 1}


def test_products_that_read_different_axes_as_channels_agree_on_none():
    nodes = [
        node("Mul", "x k", "s"),
        node("Gemm", "s w", "p"),
        node("Gemm", "s v", "q", transA=1),
        node("Add", "p q", "y"),
    ]
    weights = {"k": weight(4), "w": weight(4, 6), "v": weight(4, 6, seed=1)}
    assert left(net(nodes, weights, "4,4", "4,6")) is None


def test_a_shift_that_would_need_an_operator_elsewhere_stays():
    nodes = [node("Sub", "x t", "s"), node("MatMul", "s w", "y")]
    assert left(net(nodes, {"t": weight(4), "w": weight(4, 6)}, "batch,4", "batch,6")) is None


def test_a_bias_goes_to_its_convolution_and_not_to_what_is_added_behind_it():
    nodes = [node("Conv", "x w", "p"), node("Add", "p b", "q"), node("Add", "q m", "y")]
    weights = {"w": weight(4, 3, 1, 1), "b": weight(4, 1, 1), "m": weight(4, 5, 5)}
    after, _ = folded(net(nodes, weights, "batch,3,5,5", "batch,4,5,5"))
    assert [len(each.inputs) for each in after.model.graph] == [3, 2]


def test_shared_weights_after_a_scale_stay():
    nodes = [node("Mul", "x k", "s"), node("MatMul", "s w", "p"), node("MatMul", "p w", "y")]
    before = net(nodes, {"k": weight(4), "w": weight(4, 4)}, "batch,4", "batch,4")
    assert left(before) == "its product shares weights with another one"
