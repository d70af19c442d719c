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
    assert changes == ["2 batch normalizations folded into the weights before them"]


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
        "1 batch normalizations folded into the weights before them",
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
