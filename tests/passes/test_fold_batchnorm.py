"""`fold-batchnorm`: what is folded, what is refused and why, and that outputs stay where they were."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, conv_net, feed, node, norm_node, normalization, outputs, run_twice, shared_weights, weight

from perwatt.drift import drift
from perwatt.passes.fold_batchnorm import FoldBatchnorm


def folded(artifact, batch=None):
    """The result of the pass, with outputs proved to be within its tolerance."""
    after, changes = run_twice(FoldBatchnorm(), artifact)
    batch = batch or feed(artifact)
    moved = drift([outputs(artifact, batch)], [outputs(after, batch)], FoldBatchnorm.tolerance)
    assert not moved.reasons
    return after, changes


def after_product(product, weights, inputs, out, channels, **attributes):
    """`product` (from x to c), then a batch normalization to y."""
    return build(
        [product, norm_node("bn", "c", "y", **attributes)], inputs, out, {**weights, **normalization("bn", channels)}
    )


def refused(artifact):
    """The reason given for the only batch normalization; nothing was changed."""
    after, changes = run_twice(FoldBatchnorm(), artifact)
    assert after is artifact and len(changes) == 1
    return changes[0]


def test_folds_every_normalization_after_a_convolution(golden_pass):
    before = conv_net()
    after, changes = folded(before)
    golden_pass("fold_batchnorm", before, after, changes)
    assert "BatchNormalization" not in after.operator_counts()
    assert after.signature == before.signature


@given(
    dims=st.integers(1, 3), groups=st.integers(1, 3), per_group=st.integers(1, 3), ins=st.integers(1, 3),
    bias=st.booleans(), transpose=st.booleans(), epsilon=st.sampled_from([1e-5, 1e-3, 0.1]), seed=st.integers(0, 99),
)  # fmt: skip
def test_outputs_stay_for_convolutions_of_any_rank_grouped_or_transposed(
    dims, groups, per_group, ins, bias, transpose, epsilon, seed
):
    channels, kernel = groups * per_group, [2] * dims
    shape = (groups * ins, per_group, *kernel) if transpose else (channels, ins, *kernel)
    weights = {"w": weight(*shape, seed=seed), **({"b": weight(channels, seed=seed)} if bias else {})}
    operator = "ConvTranspose" if transpose else "Conv"
    product = node(operator, "x w b" if bias else "x w", "c", group=groups)
    sizes = ",".join(["4"] * dims)
    out = ",".join(["5" if transpose else "3"] * dims)
    artifact = after_product(
        product, weights, f"x:float32[batch,{groups * ins},{sizes}]", f"y:float32[batch,{channels},{out}]", channels,
        epsilon=epsilon,
    )  # fmt: skip
    after, _ = folded(artifact)
    assert after.operator_counts() == {operator: 1}


@given(
    rows=st.integers(1, 4), columns=st.integers(1, 5), turned=st.booleans(), alpha=st.sampled_from([1.0, -0.5, 2.0]),
    beta=st.sampled_from([1.0, 0.5, 0.0]), bias=st.sampled_from(["none", "scalar", "one", "row", "vector"]),
)  # fmt: skip
def test_outputs_stay_for_gemm_with_any_bias_alpha_and_beta(rows, columns, turned, alpha, beta, bias):
    shapes = {"scalar": (), "one": (1,), "row": (1, columns), "vector": (columns,)}
    weights = {"w": weight(columns, rows) if turned else weight(rows, columns)}
    if bias != "none":
        weights["b"] = weight(*shapes[bias])
    product = node("Gemm", "x w" if bias == "none" else "x w b", "c", transB=int(turned), alpha=alpha, beta=beta)
    artifact = after_product(product, weights, f"x:float32[batch,{rows}]", f"y:float32[batch,{columns}]", columns)
    after, _ = folded(artifact)
    assert after.operator_counts() == {"Gemm": 1}


def test_outputs_stay_for_a_depthwise_convolution():
    product = node("Conv", "x w", "c", group=6, pads=[1] * 4)
    folded(after_product(product, {"w": weight(6, 1, 3, 3)}, "x:float32[b,6,5,5]", "y:float32[b,6,5,5]", 6))


def test_a_bias_left_out_by_an_empty_name_counts_as_none():
    product = node("Conv", "x w -", "c")
    after, _ = folded(after_product(product, {"w": weight(4, 3, 2, 2)}, "x:float32[b,3,4,4]", "y:float32[b,4,3,3]", 4))
    assert after.operator_counts() == {"Conv": 1}


@pytest.mark.parametrize("opset", [9, 13, 14, 15, 23])
def test_folds_in_every_version_of_the_operator(opset):
    nodes = [node("Conv", "x w", "c"), norm_node("bn", "c", "y")]
    weights = {"w": weight(4, 3, 2, 2), **normalization("bn", 4)}
    before = build(nodes, "x:float32[b,3,4,4]", "y:float32[b,4,3,3]", weights, opset=opset)
    after, _ = folded(before)
    assert after.operator_counts() == {"Conv": 1}


def test_names_that_are_taken_are_not_taken_twice():
    nodes = [node("Conv", "x c_weight", "c"), norm_node("bn", "c", "n"), node("Add", "n c_bias", "y")]
    weights = {"c_weight": weight(4, 3, 2, 2), "c_bias": weight(1), **normalization("bn", 4)}
    after, _ = folded(build(nodes, "x:float32[b,3,4,4]", "y:float32[b,4,3,3]", weights))
    assert "c_bias" in after.model.graph.initializers


def test_a_normalization_that_two_products_share_stays_for_the_other():
    nodes = [
        node("Conv", "x w1", "c1"), norm_node("bn", "c1", "n1"), node("Relu", "n1", "r"),
        node("Conv", "r w2", "c2"), norm_node("bn", "c2", "y"),
    ]  # fmt: skip
    weights = {"w1": weight(4, 4, 1, 1), "w2": weight(4, 4, 1, 1, seed=1), **normalization("bn", 4)}
    after, _ = folded(build(nodes, "x:float32[b,4,3,3]", "y:float32[b,4,3,3]", weights))
    assert after.operator_counts() == {"Conv": 2, "Relu": 1}
    assert not [name for name in after.model.graph.initializers if name.startswith("bn")]


def test_two_normalizations_in_a_row_fold_into_one_product():
    nodes = [node("Conv", "x w", "c"), norm_node("one", "c", "n"), norm_node("two", "n", "y")]
    weights = {"w": weight(4, 3, 2, 2), **normalization("one", 4), **normalization("two", 4, 9)}
    after, changes = folded(build(nodes, "x:float32[b,3,4,4]", "y:float32[b,4,3,3]", weights))
    assert after.operator_counts() == {"Conv": 1}
    assert changes == ["2 batch normalizations folded into weights"]


def test_weights_listed_as_inputs_stay_so_that_nobody_has_to_feed_them():
    weights = {"w": weight(4, 3, 2, 2), **normalization("bn", 4)}
    nodes = [node("Conv", "x w", "c"), norm_node("bn", "c", "y")]
    before = build(nodes, "x:float32[b,3,4,4] w:float32[4,3,2,2]", "y:float32[b,4,3,3]", weights)
    after, _ = folded(before, feed(before))
    assert [spec.name for spec in after.signature.inputs] == ["x"]


def test_the_size_does_not_grow():
    before = conv_net()
    after, _ = FoldBatchnorm().run(before, None)
    assert after.size_bytes() < before.size_bytes()
    assert list(FoldBatchnorm().ensures(before, after)) == []
    assert list(FoldBatchnorm().ensures(after, conv_net(width=64))) == ["folding made the weights larger"]


def test_products_that_share_weights_are_left_and_the_rest_is_folded():
    assert refused(shared_weights()) == "2 left: its product shares weights with another one"


def test_a_product_used_elsewhere_is_left():
    nodes = [node("Conv", "x w", "c"), norm_node("bn", "c", "n"), node("Add", "n c", "y")]
    weights = {"w": weight(4, 3, 2, 2), **normalization("bn", 4)}
    artifact = build(nodes, "x:float32[b,3,4,4]", "y:float32[b,4,3,3]", weights)
    assert refused(artifact) == "1 left: what it normalizes is used elsewhere too"


def test_a_product_that_is_an_output_is_left():
    nodes = [node("Conv", "x w", "c"), norm_node("bn", "c", "y")]
    weights = {"w": weight(4, 3, 2, 2), **normalization("bn", 4)}
    artifact = build(nodes, "x:float32[b,3,4,4]", "y:float32[b,4,3,3] c:float32[b,4,3,3]", weights)
    assert refused(artifact) == "1 left: what it normalizes is used elsewhere too"


def test_computed_weights_are_left():
    nodes = [node("Exp", "w", "e"), node("Conv", "x e", "c"), norm_node("bn", "c", "y")]
    weights = {"w": weight(4, 3, 2, 2), **normalization("bn", 4)}
    assert (
        refused(build(nodes, "x:float32[b,3,4,4]", "y:float32[b,4,3,3]", weights))
        == "1 left: weights are computed, not stored"
    )


def test_training_mode_is_left():
    artifact = build(
        [node("Conv", "x w", "c"), norm_node("bn", "c", "y mean var", training_mode=1)], "x:float32[b,3,4,4]",
        "y:float32[b,4,3,3] mean:float32[4] var:float32[4]", {"w": weight(4, 3, 2, 2), **normalization("bn", 4)},
    )  # fmt: skip
    assert refused(artifact) == "1 left: it is in training mode"


def test_a_normalization_without_a_product_before_it_is_left():
    artifact = build([norm_node("bn", "x", "y")], "x:float32[b,4,3,3]", "y:float32[b,4,3,3]", normalization("bn", 4))
    assert refused(artifact) == "1 left: no convolution or matrix product right before it"


def test_what_is_folded_and_what_is_left_are_both_told():
    nodes = [node("Conv", "x w", "c"), norm_node("one", "c", "n"), node("Relu", "n", "r"), norm_node("two", "r", "y")]
    weights = {"w": weight(4, 3, 2, 2), **normalization("one", 4), **normalization("two", 4, 9)}
    _, changes = folded(build(nodes, "x:float32[b,3,4,4]", "y:float32[b,4,3,3]", weights))
    assert changes == [
        "1 batch normalizations folded into weights",
        "1 left: no convolution or matrix product right before it",
    ]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_weights_keep_their_type(dtype):
    name = np.dtype(dtype).name
    parts = {key: array.astype(dtype) for key, array in {"w": weight(4, 3, 2, 2), **normalization("bn", 4)}.items()}
    before = build(
        [node("Conv", "x w", "c"), norm_node("bn", "c", "y")], f"x:{name}[b,3,4,4]", f"y:{name}[b,4,3,3]", parts
    )
    after, _ = run_twice(FoldBatchnorm(), before)
    kinds = {value.const_value.dtype for value in after.model.graph.initializers.values()}
    assert kinds == {ir.DataType.from_numpy(np.dtype(dtype))}


# After a MatMul, and before products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, (4,), (1, 4), (1,)])
def test_folds_into_a_matrix_product_and_the_bias_behind_it(bias):
    nodes = [node("MatMul", "x w", "m")] + ([node("Add", "b m", "c")] if bias else [])
    nodes[-1].output[0] = "c"
    nodes[0].output[0] = "m" if bias else "c"
    weights = {"w": weight(3, 4), **({"b": weight(*bias)} if bias else {}), **normalization("bn", 4)}
    after, _ = folded(build([*nodes, norm_node("bn", "c", "y")], "x:float32[batch,3]", "y:float32[batch,4]", weights))
    assert after.operator_counts() == {"MatMul": 1, "Add": 1}


def test_channels_of_a_matrix_product_on_three_axes_are_not_those_that_are_normalized():
    nodes = [node("MatMul", "x w", "c"), norm_node("bn", "c", "y")]
    before = build(nodes, "x:float32[batch,4,3]", "y:float32[batch,4,4]", {"w": weight(3, 4), **normalization("bn", 4)})
    assert refused(before) == "1 left: it normalizes another axis than the channels of the product before it"
    nodes = [norm_node("bn", "x", "n"), node("MatMul", "n w", "y")]
    before = build(nodes, "x:float32[batch,3,3]", "y:float32[batch,3,4]", {"w": weight(3, 4), **normalization("bn", 3)})
    assert refused(before) == "1 left: it normalizes another axis than the channels of the product after it"


def test_the_rows_of_a_turned_gemm_are_not_its_channels():
    nodes = [norm_node("bn", "x", "n"), node("Gemm", "n w", "y", transA=1)]
    before = build(nodes, "x:float32[4,4]", "y:float32[4,5]", {"w": weight(4, 5), **normalization("bn", 4)})
    assert refused(before) == "1 left: it normalizes another axis than the channels of the product after it"


@given(
    dims=st.integers(1, 3), groups=st.integers(1, 3), per_group=st.integers(1, 2), ins=st.integers(1, 3),
    bias=st.booleans(), stride=st.integers(1, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_folds_into_a_convolution_after_it_that_pads_nothing(dims, groups, per_group, ins, bias, stride, seed):
    channels, out = groups * ins, groups * per_group
    weights = {"w": weight(out, ins, *[2] * dims, seed=seed), "b": weight(out), **normalization("bn", channels, seed)}
    product = node("Conv", "n w b" if bias else "n w", "y", group=groups, strides=[stride] * dims)
    side = ",".join(["4"] * dims)
    after, _ = folded(build(
        [norm_node("bn", "x", "n"), product], f"x:float32[batch,{channels},{side}]",
        f"y:float32[batch,{out},{','.join(['?'] * dims)}]", {k: v for k, v in weights.items() if bias or k != "b"},
    ))  # fmt: skip
    assert after.operator_counts() == {"Conv": 1}


@given(
    turned=st.booleans(), alpha=st.sampled_from([1.0, -0.5]), beta=st.sampled_from([1.0, 2.0, 0.0]),
    kind=st.sampled_from(["Gemm", "Gemm with bias", "MatMul", "MatMul with bias"]),
)  # fmt: skip
def test_folds_into_matrix_products_after_it(turned, alpha, beta, kind):
    gemm, bias = kind.startswith("Gemm"), kind.endswith("bias")
    weights = {"w": weight(4, 3) if gemm and turned else weight(3, 4), **normalization("bn", 3)}
    if bias:
        weights["b"] = weight(4)
    options = {"transB": int(turned), "alpha": alpha, "beta": beta} if gemm else {}
    nodes = [norm_node("bn", "x", "n"), node(kind.split()[0], "n w b" if gemm and bias else "n w", "y", **options)]
    if bias and not gemm:
        nodes[1].output[0] = "p"
        nodes.append(node("Add", "p b", "y"))
    after, _ = folded(build(nodes, "x:float32[batch,3]", "y:float32[batch,4]", weights))
    assert after.operator_counts() == ({"Gemm": 1} if gemm else {"MatMul": 1, "Add": 1})


@pytest.mark.parametrize("options", [{"pads": [1] * 4}, {"auto_pad": "SAME_LOWER"}])
def test_a_convolution_that_pads_takes_a_scale_and_no_shift(options):
    nodes = [norm_node("bn", "x", "n"), node("Conv", "n w", "y", **options)]
    weights = {"w": weight(4, 3, 3, 3), **normalization("bn", 3)}
    before = build(nodes, "x:float32[b,3,4,4]", "y:float32[b,4,4,4]", weights)
    assert refused(before) == "1 left: what it adds would be missing in the padding of the convolution after it"
    weights |= {"bn_beta": np.zeros(3, np.float32), "bn_mean": np.zeros(3, np.float32)}
    after, _ = folded(build(nodes, "x:float32[b,3,4,4]", "y:float32[b,4,4,4]", weights))
    assert after.operator_counts() == {"Conv": 1}


def test_a_transposed_convolution_after_it_takes_a_scale_along_its_groups():
    nodes = [norm_node("bn", "x", "n"), node("ConvTranspose", "n w", "y", group=2)]
    weights = {"w": weight(4, 3, 2, 2), **normalization("bn", 4)}
    before = build(nodes, "x:float32[b,4,4,4]", "y:float32[b,6,5,5]", weights)
    assert refused(before) == "1 left: what it adds would be missing in the padding of the convolution after it"
    weights |= {"bn_beta": np.zeros(4, np.float32), "bn_mean": np.zeros(4, np.float32)}
    after, _ = folded(build(nodes, "x:float32[b,4,4,4]", "y:float32[b,6,5,5]", weights))
    assert after.operator_counts() == {"ConvTranspose": 1}


def test_what_stands_before_is_preferred_to_what_comes_after():
    nodes = [node("Conv", "x w1", "c"), norm_node("bn", "c", "n"), node("Conv", "n w2", "y", pads=[1] * 4)]
    weights = {"w1": weight(4, 3, 1, 1), "w2": weight(5, 4, 3, 3), **normalization("bn", 4)}
    after, _ = folded(build(nodes, "x:float32[b,3,4,4]", "y:float32[b,5,4,4]", weights))
    assert after.operator_counts() == {"Conv": 2}


def test_what_the_product_before_can_not_take_the_one_after_does():
    nodes = [
        node("Conv", "x w1", "c"),
        norm_node("bn", "c", "n"),
        node("Conv", "n w2", "d"),
        node("Concat", "c d", "y", axis=1),
    ]
    weights = {"w1": weight(4, 3, 1, 1), "w2": weight(5, 4, 1, 1), **normalization("bn", 4)}
    after, changes = folded(build(nodes, "x:float32[b,3,4,4]", "y:float32[b,9,4,4]", weights))
    assert after.operator_counts() == {"Conv": 2, "Concat": 1}
    assert changes == ["1 batch normalizations folded into weights"]


def test_folds_into_all_products_that_it_feeds():
    nodes = [
        norm_node("bn", "x", "n"), node("Conv", "n w1 b", "c"), node("Conv", "n w2", "d"), node("Concat", "c d", "y", axis=1)
    ]  # fmt: skip
    weights = {"w1": weight(2, 3, 1, 1), "b": weight(2), "w2": weight(4, 3, 1, 1), **normalization("bn", 3)}
    after, _ = folded(build(nodes, "x:float32[b,3,4,4]", "y:float32[b,6,4,4]", weights))
    assert after.operator_counts() == {"Conv": 2, "Concat": 1}


def test_one_reader_that_is_no_product_keeps_it():
    nodes = [norm_node("bn", "x", "n"), node("Conv", "n w", "c"), node("Add", "n c", "y")]
    weights = {"w": weight(3, 3, 1, 1), **normalization("bn", 3)}
    before = build(nodes, "x:float32[b,3,4,4]", "y:float32[b,3,4,4]", weights)
    assert refused(before) == "1 left: no convolution or matrix product right before it"


def test_a_variance_that_makes_no_scale_is_left():
    weights = {"w": weight(4, 3, 2, 2), **normalization("bn", 4)}
    weights["bn_var"][1] = -1
    before = build(
        [node("Conv", "x w", "c"), norm_node("bn", "c", "y")], "x:float32[b,3,4,4]", "y:float32[b,4,3,3]", weights
    )
    assert refused(before) == "1 left: a scale or shift is not finite"


def test_nodes_keep_the_names_that_recipes_know_them_by():
    before = conv_net()
    after, _ = folded(before)
    assert [each.name for each in after.model.graph if each.op_type == "Conv"] == ["/layer1/conv", "/layer2/conv"]
