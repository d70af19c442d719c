"""`unflatten-gemm`: products between two reshapes, and what keeps them there."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node, outputs, run_twice, weight

from perwatt.drift import drift
from perwatt.passes.unflatten_gemm import UnflattenGemm


def unflattened(artifact, sizes=(3, 1)):
    after, changes = run_twice(UnflattenGemm(), artifact)
    for items in sizes:
        batch = feed(artifact, items=items)
        assert not drift([outputs(artifact, batch)], [outputs(after, batch)], UnflattenGemm.tolerance).reasons
    return after, changes


def left(artifact, *notes):
    after, changes = run_twice(UnflattenGemm(), artifact)
    assert after is artifact and changes == list(notes)


def net(nodes, weights, x="batch,4,6", y="batch,4,5", rows="rows", columns=None, outs=""):
    """x, `nodes` from r:[rows, 6] to s:[rows, 5], y."""
    nodes = [node("Reshape", "x there", "r"), *nodes, node("Reshape", "s back", "y", name="/back")]
    back = [int(n) if n.isdigit() else -1 for n in y.split(",")]
    weights = {"there": np.int64([-1, int(x.split(",")[-1])]), "back": np.int64(back), **weights}
    inner = f"r:float32[{rows},{x.split(',')[-1]}] s:float32[{rows},{columns or y.split(',')[-1]}]"
    return build(nodes, f"x:float32[{x}]", f"y:float32[{y}]{outs}", weights, inner=inner)


def gemm(bias=True, transposed=False, depth=6, width=5, **attributes):
    shape = (width, depth) if transposed else (depth, width)
    nodes = [node("Gemm", "r w" + " c" * bias, "s", transB=int(transposed), **attributes)]
    return net(nodes, {"w": weight(*shape), **({"c": weight(width, seed=1)} if bias else {})})


def test_gpt2(golden_pass):
    before = gemm()
    after, changes = unflattened(before)
    golden_pass("unflatten_gemm", before, after, changes)
    assert after.operator_counts() == {"MatMul": 1, "Add": 1}


@given(
    bias=st.sampled_from([None, (5,), (1, 5), (1,), ()]), transposed=st.booleans(), axes=st.integers(1, 3),
    depth=st.integers(1, 200), symbol=st.booleans(),
)  # fmt: skip
def test_gemm_of_any_shape(bias, transposed, axes, depth, symbol):
    lead = ["batch", "4", "2"][:axes]
    nodes = [node("Gemm", "r w" + " c" * (bias is not None), "s", transB=int(transposed))]
    weights = {"w": weight(*((5, depth) if transposed else (depth, 5)))}
    if bias is not None:
        weights["c"] = np.asarray(weight(*bias, seed=1), np.float32)
    x, y = (",".join([*lead, str(n)]) for n in (depth, 5))
    after, _ = unflattened(net(nodes, weights, x, y, rows="rows" if symbol else "?"))
    assert after.operator_counts() == {"MatMul": 1, **({} if bias is None else {"Add": 1})}


def test_the_form_of_tensorflow():
    nodes = [node("MatMul", "r w", "m"), node("Add", "m c", "s")]
    after, _ = unflattened(net(nodes, {"w": weight(6, 5), "c": weight(5)}))
    assert after.operator_counts() == {"MatMul": 1, "Add": 1}


def test_two_products_between():
    nodes = [node("Gemm", "r w c", "h"), node("Relu", "h", "g"), node("Gemm", "g v", "s")]
    after, _ = unflattened(net(nodes, {"w": weight(6, 7), "c": weight(7), "v": weight(7, 5)}))
    assert after.operator_counts() == {"MatMul": 2, "Add": 1, "Relu": 1}


def test_one_reshape_for_three_products():
    """Projections of queries, keys and values share what they are flattened by."""
    nodes = [node("Gemm", "r w c", "s"), node("Gemm", "r w c", "s2", alpha=1.0), node("Reshape", "s2 back", "z")]
    before = net(nodes, {"w": weight(6, 5), "c": weight(5)}, outs=" z:float32[batch,4,5]")
    after, _ = unflattened(before)
    assert after.operator_counts() == {"MatMul": 2, "Add": 2}


def test_no_product_is_another_pass():
    left(net([node("Relu", "r", "s")], {}, y="batch,4,6"))


@pytest.mark.parametrize("factor", ["alpha", "beta"])
def test_factors_stay(factor):
    left(gemm(**{factor: 0.5}), "1 left: its Gemm has a factor")


def test_a_transposed_input_stays():
    nodes = [node("Gemm", "r w", "s", transA=1)]
    before = net(nodes, {"w": weight(6, 6)}, x="1,6,6", y="1,6,6", rows="6")
    left(before, "1 left: its first factor is transposed")


def test_a_bias_for_every_row_stays():
    nodes = [node("Gemm", "r w c", "s")]
    before = net(nodes, {"w": weight(6, 5), "c": weight(12, 5)}, x="3,4,6", y="3,4,5", rows="12")
    left(before, "1 left: its bias is not one stored row")


def test_a_transposed_weight_that_others_use_stays():
    """An embedding that is the last projection too."""
    nodes = [node("Gather", "w i", "e"), node("Reshape", "e there", "r"), node("Gemm", "r w", "s", transB=1),
             node("Reshape", "s back", "y")]  # fmt: skip
    weights = {"w": weight(9, 5), "there": np.int64([-1, 5]), "back": np.int64([-1, 4, 9])}
    inner = "e:float32[batch,4,5] r:float32[rows,5] s:float32[rows,9]"
    before = build(nodes, "i:int64[batch,4]", "y:float32[batch,4,9]", weights, inner=inner)
    left(before, "1 left: its transposed weight is used elsewhere too, and a second copy would make the model larger")


def test_computed_weights_stay():
    nodes = [node("Sin", "w", "v"), node("Gemm", "r v", "s")]
    left(net(nodes, {"w": weight(6, 5)}))


def test_another_shape_behind_stays():
    left(net([node("Gemm", "r w", "s")], {"w": weight(6, 5)}, x="batch,4,6", y="batch,2,2,5"))


def test_columns_that_become_rows_stay():
    """Of ten columns each row of the input gets two rows of five."""
    left(net([node("Gemm", "r w", "s")], {"w": weight(6, 10)}, y="twice,4,5", columns=10))


def test_operands_along_the_rows_stay():
    nodes = [node("Gemm", "r w", "m"), node("Mul", "m c", "s")]
    left(net(nodes, {"w": weight(6, 5), "c": weight(12, 1)}, x="3,4,6", y="3,4,5", rows="12"))


def test_a_product_used_elsewhere_stays():
    nodes = [node("Gemm", "r w", "s"), node("Neg", "s", "z")]
    left(net(nodes, {"w": weight(6, 5)}, outs=" z:float32[rows,5]"), "1 left: a value inside it is used elsewhere too")


def test_more_operators_than_before_stay():
    nodes = [node("Gemm", "r w c", "h"), node("Gemm", "h v d", "s"), node("Neg", "r", "z")]
    weights = {"w": weight(6, 7), "c": weight(7), "v": weight(7, 5), "d": weight(5)}
    reason = "1 left: others use its reshapes too, so that it would cost more operators than it saves"
    left(net(nodes, weights, outs=" z:float32[rows,6]"), reason)
