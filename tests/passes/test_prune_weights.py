"""`prune-weights`: as many zeros as asked for, where they cost least; the rest makes up for it; refused where it wouldn't pay."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from models import ask, build, control_flow, conv_net, feed, node, run_twice, weight
from pruned import ALGORITHMS, correlated, given_by, kernel_of, off, product

from perwatt.errors import PassError
from perwatt.passes import _sparsity as sparsity
from perwatt.passes.prune_weights import PruneWeights

WOULD = "would not pay (anyway: true does it all the same)"


def two_products(width=32):
    """y = relu(x · w1) · w2, and x:float32[batch,8,width]."""
    nodes = [
        node("MatMul", "x w1", "h", name="/first"), node("Relu", "h", "r"), node("MatMul", "r w2", "y", name="/second"),
    ]  # fmt: skip
    weights = {"w1": weight(width, 48), "w2": 3 * weight(48, 16, seed=1)}
    shapes = "h:float32[batch,8,48] r:float32[batch,8,48]"
    return build(nodes, f"x:float32[batch,8,{width}]", "y:float32[batch,8,16]", weights, inner=shapes)


def zeros(array, axis=None):
    return (array == 0).mean(axis=axis)


# What goes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "op, attributes", [("MatMul", {}), ("Gemm", {}), ("Gemm", {"transB": 1}), ("Gemm", {"transA": 1, "alpha": 2.0})]
)
def test_every_product_gets_its_share_of_zeros(op, attributes, algorithm):
    before = product(op=op, **attributes)
    x = correlated(32)
    x = x if op == "MatMul" else x[:, 0].T.copy() if attributes.get("transA") else x[:, 0].copy()
    after, changes = run_twice(PruneWeights(ratio=0.5, algorithm=algorithm), before, given_by({"x": x}))
    new, old = kernel_of(after), kernel_of(before)
    assert new.shape == old.shape and new.dtype == np.float32 and zeros(new) == 0.5
    if algorithm != "sparsegpt":
        np.testing.assert_array_equal(new[new != 0], old[new != 0])
        per_row = zeros(new, axis=1 if attributes.get("transB") else 0)
        assert (per_row == 0.5).all()
    assert "unstructured zeros in the weights of 1 products" in changes[0] and "50.0%" in changes[0]
    assert after.steps[-1].name == "prune-weights" and after.signature == before.signature


def test_each_algorithm_is_better_than_the_one_before_on_correlated_inputs_of_uneven_size():
    before, loud = product(), (3, 17)
    given = given_by({"x": correlated(64, loud=loud)})
    fresh = {"x": correlated(16, seed=1, loud=loud)}
    errors = [off(before, PruneWeights(algorithm=each).run(before, given)[0], fresh) for each in ALGORITHMS]
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.7 * errors[1]


@pytest.mark.parametrize("turned", [False, True])
def test_wanda_weighs_by_the_size_of_inputs(turned):
    before, x = product(op="Gemm", transA=1) if turned else product(), correlated(32, loud=(5,))
    given = given_by({"x": x[:, 0].T.copy() if turned else x})
    after, changes = PruneWeights(algorithm="wanda").run(before, given)
    assert (kernel_of(after)[5] != 0).mean() > 0.9 and (kernel_of(after)[6] != 0).mean() < 0.9 and len(changes) == 1


@pytest.mark.parametrize("algorithm", ["magnitude", "wanda"])
def test_the_share_is_taken_of_rows_of_layers_or_of_all(algorithm):
    before = two_products()
    given = given_by({"x": correlated(16)})
    found = {}
    for per in ("row", "layer", "all"):
        after, _ = run_twice(PruneWeights(algorithm=algorithm, per=per), before, given)
        found[per] = [kernel_of(after, name) for name in ("/first", "/second")]
        assert sum((each == 0).sum() for each in found[per]) == sum(each.size for each in found[per]) / 2
    assert all((zeros(each, axis=0) == 0.5).all() for each in found["row"])
    assert all(zeros(each) == 0.5 for each in found["layer"])
    assert any((zeros(each, axis=0) != 0.5).any() for each in found["layer"])
    # The second layer's weights are three times as large.
    assert zeros(found["all"][0]) > 0.6


@settings(deadline=None, max_examples=50)
@drawn(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=3),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_the_lowest_are_as_many_as_asked_for(shapes, ratio, seed):
    chance = np.random.default_rng(seed)
    scores = [chance.integers(0, 4, shape).astype(np.float32) for shape in shapes]
    rows = sparsity.lowest(scores, ratio, "row")
    for goes, each in zip(rows, scores, strict=True):
        assert goes.shape == each.shape and (goes.sum(axis=1) == round(ratio * each.shape[1])).all()
    for goes, each in zip(sparsity.lowest(scores, ratio, "layer"), scores, strict=True):
        assert goes.sum() == round(ratio * each.size)
    goes = np.concatenate([each.reshape(-1) for each in sparsity.lowest(scores, ratio, "all")])
    flat = np.concatenate([each.reshape(-1) for each in scores])
    first = np.argsort(flat, kind="stable")[: round(ratio * flat.size)]
    assert sorted(first) == np.flatnonzero(goes).tolist()


# Convolutions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_convolutions_are_pruned_by_output_channel(algorithm):
    before = conv_net()
    after, changes = run_twice(PruneWeights(algorithm=algorithm), before, given_by(feed(before, items=16)))
    for name in ("/layer1/conv", "/layer2/conv"):
        new, old = kernel_of(after, name), kernel_of(before, name)
        share = zeros(new.reshape(len(new), -1), axis=1)
        assert new.shape == old.shape and np.abs(share - 0.5).max() <= 0.5 / new[0].size + 1e-6
        np.testing.assert_array_equal(new[new != 0], old[new != 0])
    assert any("2 by Wanda: SparseGPT is for" in line for line in changes) == (algorithm == "sparsegpt")


def test_a_kernel_of_one_place_is_a_matrix_to_sparsegpt():
    nodes = [node("Conv", "x w", "y", name="/product", strides=[1, 1])]
    before = build(nodes, "x:float32[batch,32,4,2]", "y:float32[batch,24,4,2]", {"w": weight(24, 32, 1, 1)})
    x = np.ascontiguousarray(correlated(32).transpose(0, 2, 1)).reshape(32, 32, 4, 2)
    found = {}
    for algorithm in ALGORITHMS:
        after, changes = run_twice(PruneWeights(algorithm=algorithm), before, given_by({"x": x}))
        found[algorithm] = off(before, after, {"x": x[:8]})
        assert len(changes) == 1 and zeros(kernel_of(after)) == 0.5
    assert found["sparsegpt"] < 0.7 * found["wanda"]
    # The same as the matrix product of what has its channels last.
    same, _ = PruneWeights().run(
        build([node("MatMul", "x w", "y", name="/product")], "x:float32[batch,8,32]", "y:float32[batch,8,24]",
              {"w": kernel_of(before)[:, :, 0, 0].T.copy()}), given_by({"x": correlated(32)}),
    )  # fmt: skip
    after, _ = PruneWeights().run(before, given_by({"x": x}))
    np.testing.assert_allclose(kernel_of(after)[:, :, 0, 0].T, kernel_of(same), atol=1e-4)


# What stays -----------------------------------------------------------------------------------------------------------


def test_what_is_excluded_grouped_shared_or_unfit_stays_and_is_told():
    nodes = [
        node("MatMul", "x w1", "a", name="/keep"), node("MatMul", "x w2", "b", name="/tied"), node("Add", "a b", "c"),
        node("Gather", "w2 one", "row", name="/table"), node("Add", "c row", "d"),
        node("MatMul", "d w3", "y", name="/product"), node("Conv", "p k", "q", name="/grouped", group=2),
        node("MatMul", "x w4", "z", name="/broken"),
    ]  # fmt: skip
    weights = {f"w{i}": weight(8, 8, seed=i) for i in range(1, 5)} | {"one": np.int64(1), "k": weight(4, 2, 3, 3)}
    weights["w4"][2, 3] = np.nan
    before = build(
        nodes, "x:float32[batch,8] p:float32[batch,4,5,5]", "y:float32[batch,8] z:float32[batch,8] q:float32[batch,4,3,3]",
        weights,
    )  # fmt: skip
    after, changes = run_twice(PruneWeights(algorithm="magnitude", exclude=("/kee*",)), before, given_by())
    for name in ("/keep", "/tied", "/grouped", "/broken"):
        np.testing.assert_array_equal(kernel_of(after, name), kernel_of(before, name))
    assert zeros(kernel_of(after)) == 0.5
    assert set(changes[1:]) == {
        "1 left: excluded", "1 left: others read its weights, too", "1 left: a convolution in groups",
        "1 left: its weights hold NaN, infinity, or something near it",
    }  # fmt: skip
    with pytest.raises(PassError, match="matches no node"):
        PruneWeights(exclude=("/nowhere",)).run(before, given_by())


def test_weights_behind_a_transpose_and_of_two_products_are_pruned_once():
    nodes = [
        node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x t", "a", name="/product"), node("MatMul", "u t", "b"),
        node("Add", "a b", "y"),
    ]  # fmt: skip
    before = build(nodes, "x:float32[batch,8,32] u:float32[batch,8,32]", "y:float32[batch,8,24]", {"w": weight(24, 32)})
    batch = {"x": correlated(16), "u": correlated(16, seed=3)}
    for algorithm in ALGORITHMS:
        after, changes = run_twice(PruneWeights(algorithm=algorithm), before, given_by(batch))
        assert zeros(kernel_of(after)) == 0.5 and "of 2 products" in changes[0]
        assert len(after.model.graph.initializers) == 1
    # Moments are those of both inputs: with one of them silent only the other counts.
    alone, _ = PruneWeights().run(before, given_by(batch | {"u": 0 * batch["u"]}))
    assert not np.array_equal(kernel_of(alone), kernel_of(after))


def test_dead_and_broken_inputs():
    nodes = [node("Mul", "x gate", "m"), node("MatMul", "m w", "y", name="/product")]
    gate = np.ones(32, np.float32)
    before = build(
        nodes, "x:float32[batch,8,32]", "y:float32[batch,8,24]", {"w": weight(32, 24), "gate": np.zeros_like(gate)},
        inner="m:float32[batch,8,32]",
    )  # fmt: skip
    given = given_by({"x": correlated(8)})
    after, _ = PruneWeights().run(before, given)
    assert zeros(kernel_of(after)) == 1, "nothing comes in, nothing is needed"
    infinite = build(
        nodes, "x:float32[batch,8,32]", "y:float32[batch,8,24]", {"w": weight(32, 24), "gate": gate * np.inf},
        inner="m:float32[batch,8,32]",
    )  # fmt: skip
    after, changes = PruneWeights().run(infinite, given)
    assert zeros(kernel_of(after)) == 0.5
    assert any("no good to SparseGPT" in line for line in changes) and any("by magnitude" in line for line in changes)


def test_without_data_only_magnitude_works_and_settings_are_checked():
    before = product()
    assert zeros(kernel_of(PruneWeights(algorithm="magnitude").run(before, given_by())[0])) == 0.5
    for algorithm in ("wanda", "sparsegpt"):
        with pytest.raises(PassError, match="no samples") as caught:
            PruneWeights(algorithm=algorithm).run(before, given_by())
        assert "magnitude" in caught.value.fix
    for ratio in (0, 1, -0.5, float("nan")):
        with pytest.raises(PassError, match="between 0 and 1"):
            PruneWeights(ratio=ratio).run(before, given_by())


def test_weights_with_as_many_zeros_already_come_back_as_they_are():
    once, _ = PruneWeights(algorithm="magnitude").run(product(), given_by())
    again, changes = PruneWeights(ratio=0.25, algorithm="magnitude").run(once, given_by())
    assert again is once and changes == ["the weights have unstructured zeros already"]


# Whether it pays ------------------------------------------------------------------------------------------------------


def test_it_refuses_where_zeros_are_not_rewarded_unless_asked():
    before = product()
    assert ask(PruneWeights(), before, given_by(patterns=("unstructured",))) == []
    (reason,) = ask(PruneWeights(), before, given_by())
    assert reason == f"this backend runs zeros as fast as anything else: unstructured sparsity {WOULD}"
    (reason,) = ask(PruneWeights(), before, given_by(patterns=("2:4",)))
    assert reason == f"this backend gains from 2:4 zeros alone: unstructured sparsity {WOULD}"
    assert len(ask(PruneWeights(), before, given_by(patterns=("unstructured",), types=()))) == 1
    assert ask(PruneWeights(anyway=True), before, given_by()) == []


def test_it_refuses_models_without_products_and_quantized_ones():
    given = given_by(patterns=("unstructured",))
    assert ask(PruneWeights(), control_flow(), given) == ["no product with stored weights"]
    codes = {"q": np.ones((8, 8), np.int8), "s": np.float32(0.1)}
    nodes = [node("DequantizeLinear", "q s", "w"), node("MatMul", "x w", "y")]
    quantized = build(nodes, "x:float32[batch,8]", "y:float32[batch,8]", codes)
    (reason,) = ask(PruneWeights(), quantized, given)
    assert "quantized" in reason
    onnx.checker.check_model(ir.to_proto(PruneWeights(algorithm="magnitude").run(conv_net(), given)[0].model))
