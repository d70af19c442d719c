"""`quantize-weights`: blocked codes in front of products, whose errors are what the algorithm and the group allow."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st
from models import (
    SYMMETRIC,
    ask,
    build,
    context,
    control_flow,
    executed,
    feed,
    node,
    outputs,
    printed,
    run_twice,
    weight,
)

from perwatt.artifact import Artifact
from perwatt.contract import QuantizationStyle
from perwatt.data import Samples
from perwatt.errors import PassError
from perwatt.passes import _weight_quantizers as quantizers
from perwatt.passes.quantize_weights import QuantizeWeights

STYLES = tuple(QuantizationStyle(f"{kind}-weights", "float", kind, True, True) for kind in ("int4", "uint4", "int8"))
STEPS = {"int4": 7.5, "uint4": 15, "int8": 127}
"""Steps from 0 to the largest weight, or for uint4 from the least to the largest."""


def block(width=64, wide=128):
    """A decoder's feed-forward: x:float32[batch,words,width] normalized, gated, added; y of the same shape."""
    nodes = [
        node("RMSNormalization", "x scale", "n", name="/norm", axis=-1),
        node("MatMul", "n wg", "g", name="/gate"), node("MatMul", "n wu", "u", name="/up"),
        node("Sigmoid", "g", "s"), node("Mul", "g s", "a"), node("Mul", "a u", "m", name="/gated"),
        node("MatMul", "m wd", "d", name="/down"), node("Add", "x d", "y"),
    ]  # fmt: skip
    weights = {
        "wg": weight(width, wide, seed=1), "wu": weight(width, wide, seed=2), "wd": weight(wide, width, seed=3),
        "scale": 1 + weight(width),
    }  # fmt: skip
    inner = f"n:float32[batch,words,{width}] d:float32[batch,words,{width}] "
    inner += " ".join(f"{name}:float32[batch,words,{wide}]" for name in "gusam")
    return build(nodes, f"x:float32[batch,words,{width}]", f"y:float32[batch,words,{width}]", weights, inner=inner)


def correlated(items, width=64, seed=0, loud=()):
    """Inputs that lie near an eighth of their dimensions; channels `loud` are 30 × as large."""
    basis = np.random.default_rng(99).standard_normal((width // 8, width))
    random = np.random.default_rng(seed)
    inside, noise = random.standard_normal((items, 16, width // 8)), random.standard_normal((items, 16, width))
    found = inside @ basis / np.sqrt(width // 8) + 0.1 * noise
    found[..., list(loud)] *= 30
    return found.astype(np.float32)


def given_by(*batches, **asked):
    return context(Samples(list(batches)), styles=STYLES, execute=executed, **asked)


def product(rows=64, columns=32, op="MatMul", words=5, dtype=np.float32, **attributes):
    """x · w, with x:float32[batch,rows] for a Gemm."""
    shape = (columns, rows) if attributes.get("transB") else (rows, columns)
    data = f"{rows},batch" if attributes.get("transA") else f"batch,{rows}"
    kind = np.dtype(dtype).name
    return build(
        [node(op, "x w", "y", name="/product", **attributes)], f"x:{kind}[{data}]", f"y:{kind}[batch,{columns}]",
        {"w": weight(*shape, dtype=dtype)},
    )  # fmt: skip


def quantized(artifact, given=None, **settings):
    """(result, changes) of a pass that kept its general promises, but for a second run, which it refuses."""
    made_by, given = QuantizeWeights(**settings), given or given_by()
    digest = artifact.digest()
    after, changes = made_by.run(artifact, given)
    assert Artifact(model=artifact.model).digest() == digest, "the pass changed the model it was given"
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    assert after.signature == artifact.signature
    return after, changes


def pairs(artifact):
    return [n for n in artifact.model.graph if n.op_type == "DequantizeLinear"]


def error(before, after, batch):
    """Relative error of all that the model adds to its input."""
    old, new = outputs(before, batch)["y"], outputs(after, batch)["y"]
    return float(np.linalg.norm(new - old) / np.linalg.norm(old - batch["x"]))


# The form in the graph ------------------------------------------------------------------------------------------------


def test_products_read_codes_in_groups_and_scales_move_into_the_normalization(golden_pass):
    before = block()
    after, changes = quantized(before, given_by({"x": correlated(16, loud=(3, 40))}), algorithm="awq", group_size=32)
    golden_pass("quantize_weights", before, after, changes)
    assert "Mul" in after.operator_counts() and after.size_bytes() < before.size_bytes() / 5
    first = pairs(after)[0]
    assert list(first.inputs[0].const_value.shape) == [64, 128] and list(first.inputs[1].const_value.shape) == [2, 128]
    assert first.attributes.get_int("axis", 1) == 0 and first.attributes.get_int("block_size", 0) == 32


@pytest.mark.parametrize("kind", ["int4", "uint4", "int8"])
@pytest.mark.parametrize("group_size", [0, 16, 64])
@pytest.mark.parametrize(
    "op, attributes", [("MatMul", {}), ("Gemm", {}), ("Gemm", {"transB": 1}), ("Gemm", {"transA": 1})]
)
def test_every_product_and_type_is_off_by_half_a_step_at_most(op, attributes, group_size, kind):
    before = product(op=op, **attributes)
    after, _ = quantized(before, type=kind, group_size=group_size, algorithm="round")
    (pair,) = pairs(after)
    assert pair.inputs[0].const_value.dtype.name == kind.upper() and (len(pair.inputs) == 3) == (kind == "uint4")
    (changed,) = [n for n in after.model.graph if n.op_type == op]
    assert list(pair.outputs[0].shape) == [64, 32] and "transB" not in changed.attributes
    identity = {"x": np.eye(64, dtype=np.float32)}
    old, new = outputs(before, identity)["y"], outputs(after, identity)["y"]
    scales = pair.inputs[1].const_value.numpy().reshape(-1, 32)
    limits = np.repeat(np.abs(scales), 64 // len(scales), axis=0)
    # Clipping moves the few largest weights of a group further than half a step.
    near = np.abs(new - old) <= 0.5001 * limits
    assert near.mean() > (0.999 if kind == "int8" else 0.9) and np.abs(new - old).max() <= 0.36 * np.abs(old).max()
    assert scales.max() <= 1.1 * 2 * np.abs(old).max() / STEPS[kind]


def test_a_weight_behind_a_transpose_is_stored_the_other_way_round():
    nodes = [node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x t", "y", name="/product")]
    before = build(nodes, "x:float32[batch,64]", "y:float32[batch,32]", {"w": weight(32, 64)})
    after, _ = quantized(before)
    assert "Transpose" not in after.operator_counts() and len(pairs(after)) == 1
    straight, _ = quantized(product(op="Gemm", transB=1))
    batch = feed(before)
    assert np.allclose(outputs(after, batch)["y"], outputs(straight, batch)["y"], atol=1e-5)


def test_products_of_one_weight_share_its_codes():
    nodes = [node("MatMul", "x w", "h"), node("Tanh", "h", "t"), node("MatMul", "t w", "y")]
    before = build(nodes, "x:float32[batch,32]", "y:float32[batch,32]", {"w": weight(32, 32)})
    batch = {"x": correlated(8, 32)[:, 0]}
    for algorithm in ("round", "awq", "gptq"):
        after, changes = quantized(before, given_by(batch), algorithm=algorithm)
        assert len(pairs(after)) == 1 and "weights of 2 products" in changes[0]
        note = [word for word in changes if "AWQ can't scale several inputs" in word]
        assert bool(note) == (algorithm == "awq")


@pytest.mark.parametrize(
    "width, size, found", [(576, 128, 64), (144, 64, 16), (64, 128, 64), (40, 32, 40), (96, 0, 96)]
)
def test_groups_come_out_even(width, size, found):
    assert quantizers.fitting(size, width) == found
    after, changes = quantized(product(width, 8), group_size=size)
    assert ("block_size" in pairs(after)[0].attributes) == (found != width)
    assert (f"groups of {found}," in changes[0]) == (found != width) == ("one group a channel" not in changes[0])


@drawn(
    st.integers(1, 70), st.integers(1, 9), st.sampled_from([0, 16, 32, 48]), st.sampled_from(["int4", "uint4", "int8"]),
    st.sampled_from(["round", "awq", "gptq"]),
)  # fmt: skip
def test_any_shape_stays_valid_pure_and_near(rows, columns, group_size, kind, algorithm):
    before = product(rows, columns)
    batch = {"x": np.random.default_rng(rows).standard_normal((40, rows)).astype(np.float32)}
    after, changes = quantized(before, given_by(batch), type=kind, group_size=group_size, algorithm=algorithm)
    if after is before:
        assert changes[0] == "nothing was found worth quantizing" and rows < 16
        return
    assert algorithm == "awq" or after.size_bytes() < before.size_bytes()
    off = np.linalg.norm(outputs(after, batch)["y"] - outputs(before, batch)["y"])
    assert off <= (0.01 if kind == "int8" else 0.25) * np.linalg.norm(outputs(before, batch)["y"]) + 1e-6


def test_older_opsets_are_raised_and_the_file_says_so(tmp_path):
    before = build(
        [node("MatMul", "x w", "y")], "x:float32[batch,64]", "y:float32[batch,8]", {"w": weight(64, 8)}, opset=18
    )
    after, _ = quantized(before)
    assert after.model.opset_imports[""] == 21 and after.model.ir_version >= 10
    after.save(tmp_path / "m.onnx")
    assert Artifact(path=tmp_path / "m.onnx").digest() == after.digest()
    # Two codes a byte: 64 · 8 / 2, and a scale for each channel.
    assert after.size_bytes() == 256 + 8 * 4


# What the algorithms are for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int4", "uint4"])
def test_gptq_halves_the_error_of_rounding_where_inputs_are_correlated(kind):
    before = product(128, 48)
    basis = np.random.default_rng(5).standard_normal((16, 128))

    def batch(seed):
        random = np.random.default_rng(seed)
        made = random.standard_normal((512, 16)) @ basis + 0.1 * random.standard_normal((512, 128))
        return {"x": made.astype(np.float32)}

    fresh, off = batch(2), {}
    for algorithm in ("round", "gptq"):
        after, _ = quantized(before, given_by(batch(1)), type=kind, algorithm=algorithm, subset_size=512)
        off[algorithm] = np.linalg.norm(outputs(after, fresh)["y"] - outputs(before, fresh)["y"])
    assert off["gptq"] <= 0.5 * off["round"]


def test_awq_spares_the_loud_channels_and_does_nothing_where_none_is():
    before, loud = product(64, 32), (3, 40)
    seen, fresh = ({"x": correlated(32, seed=seed, loud=loud).reshape(-1, 64)} for seed in (1, 7))
    off = {}
    for algorithm in ("round", "awq"):
        after, _ = quantized(before, given_by(seen), algorithm=algorithm, subset_size=512)
        off[algorithm] = np.linalg.norm(outputs(after, fresh)["y"] - outputs(before, fresh)["y"])
    assert off["awq"] < 0.8 * off["round"]
    even = np.random.default_rng(0).choice([-1.0, 1.0], (64, 64)).astype(np.float32)
    after, changes = quantized(product(64, 16), given_by({"x": even}), algorithm="awq", subset_size=64)
    assert "Mul" not in after.operator_counts() and len(changes) == 1


@pytest.mark.parametrize(
    "nodes, weights, inside",
    [
        ([node("LayerNormalization", "x c b", "n")], {"c": 1 + weight(64), "b": weight(64)}, True),
        ([node("RMSNormalization", "x c", "n", axis=-1)], {"c": 1 + weight(64)}, True),
        ([node("Mul", "c x", "n")], {"c": weight(64) + 1}, True),
        ([node("Mul", "x c", "n")], {"c": np.float32(2)}, True),
        ([node("Tanh", "x", "n")], {}, False),
        ([node("Mul", "x x", "n")], {}, False),
        ([node("RMSNormalization", "x c", "n", axis=-1), node("Neg", "n", "z")], {"c": 1 + weight(64)}, False),
    ],
)
def test_awq_divides_in_constants_only_where_nobody_else_uses_the_value(nodes, weights, inside):
    out = "y:float32[batch,16]" + (" z:float32[batch,64]" if nodes[-1].output[0] == "z" else "")
    before = build([*nodes, node("MatMul", "n w", "y")], "x:float32[batch,64]", out, {"w": weight(64, 16), **weights})
    batch = {"x": correlated(8, loud=(3,)).reshape(-1, 64)}
    after, changes = quantized(before, given_by(batch), algorithm="awq", subset_size=128)
    assert any(("by the operator that makes them" if inside else "by a Mul") in word for word in changes)
    muls = sum(n.op_type == "Mul" for n in before.model.graph)
    assert after.operator_counts().get("Mul", 0) == muls + (not inside)
    old, new = outputs(before, batch), outputs(after, batch)
    assert np.linalg.norm(new["y"] - old["y"]) < 0.15 * np.linalg.norm(old["y"])
    assert "z" not in old or np.array_equal(old["z"], new["z"])


def test_moments_are_those_of_numpy_whatever_the_batches_and_the_rounds(monkeypatch):
    before = block()
    data = correlated(11)
    found, _ = quantizers.layers(before.model.graph, "int4", 64, ())
    whole = list(quantizers.rounds(found))
    assert [[layer.name for layer in group] for group in whole[0].values()] == [["wg", "wu"], ["wd"]]
    given, samples = given_by({"x": data}), Samples([{"x": data}])
    widths = {inputs: group[0].weight.shape[1] for inputs, group in whole[0].items()}
    moments = quantizers.second_moments(before, widths, samples, given)
    normalized = (
        data
        / np.sqrt((data**2).mean(-1, keepdims=True) + 1e-5)
        * before.model.graph.initializers["scale"].const_value.numpy()
    )
    rows = normalized.reshape(-1, 64).astype(np.float64)
    assert np.allclose(moments[found[0].inputs], 2 / 11 * rows.T @ rows, rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(quantizers, "ROUND_BYTES", 4 * 64 * 64)
    assert len(list(quantizers.rounds(found))) == 2
    one, several = (quantized(before, given_by({"x": data}), algorithm="gptq")[0] for _ in range(2))
    monkeypatch.undo()
    assert one.digest() == several.digest() == quantized(before, given, algorithm="gptq")[0].digest()


def test_a_fixed_batch_is_summed_over_whole_calls():
    before = build([node("MatMul", "x w", "y")], "x:float32[48,32]", "y:float32[48,8]", {"w": weight(32, 8)})
    data = np.random.default_rng(0).standard_normal((96, 32)).astype(np.float32)
    found, _ = quantizers.layers(before.model.graph, "int4", 32, ())
    (inputs,) = (layer.inputs for layer in found)
    moments = quantizers.second_moments(before, {inputs: 32}, Samples([{"x": data}]), given_by())
    assert np.allclose(moments[inputs], 2 / 96 * data.T @ data, rtol=1e-4, atol=1e-4)


def test_turned_data_has_the_moments_of_its_columns():
    batch = {"x": np.ascontiguousarray(correlated(4).reshape(-1, 64).T)}
    before = product(op="Gemm", transA=1)
    found, _ = quantizers.layers(before.model.graph, "int4", 64, ())
    # Samples are cut along the first axis, which here is no batch.
    whole = Samples([batch], batch_size=64)
    moments = quantizers.second_moments(before, {found[0].inputs: 64}, whole, given_by(batch))
    assert np.allclose(moments[found[0].inputs] * len(whole), 2 * batch["x"] @ batch["x"].T, rtol=1e-4, atol=1e-3)


def test_inputs_that_are_no_good_are_rounded_and_the_ledger_says_so():
    before = build(
        [node("Log", "x", "l"), node("MatMul", "l w", "y")],
        "x:float32[batch,32]",
        "y:float32[batch,8]",
        {"w": weight(32, 8)},
    )
    given = given_by({"x": np.zeros((4, 32), np.float32)})
    after, changes = quantized(before, given, algorithm="gptq")
    assert changes[1] == "1 rounded: their inputs are no good to GPTQ"
    rounded, _ = quantized(before)
    assert printed(after) == printed(rounded) and np.array_equal(
        *(pairs(a)[0].inputs[1].const_value for a in (after, rounded))
    )
    quantized(before, given, algorithm="awq")


# What stays ------------------------------------------------------------------------------------------------------------


def with_weight(array):
    """x:float32[3,4,64] · w."""
    return build([node("MatMul", "x w", "y")], "x:float32[3,4,64]", "y:float32[3,4,8]", {"w": array})


@pytest.mark.parametrize(
    "before, reason",
    [
        (product(dtype=np.float16), "its weights are not float32"),
        (product(1, 8), "codes and scales would take no less room than its weights"),
        (with_weight(weight(3, 64, 8)), "its weights are no matrix"),
        (
            with_weight(np.full((3, 64, 8), np.nan, np.float32)[0]),
            "its weights hold NaN, infinity, or something near it",
        ),
    ],
)
def test_what_can_not_be_codes_is_left_and_the_reason_told(before, reason):
    after, changes = run_twice(QuantizeWeights(), before, given_by())
    assert after is before and changes == ["nothing was found worth quantizing", f"1 left: {reason}"]


def test_excluded_products_stay_and_an_unknown_name_shows_known_ones():
    after, changes = quantized(block(), exclude=("/do*", "/up"))
    assert len(pairs(after)) == 1 and changes[1] == "2 left: excluded"
    with pytest.raises(PassError) as raised:
        quantized(block(), exclude=("/head",))
    assert str(raised.value) == "exclude '/head' matches no node; names look like /norm, /gate, /up"


def test_tables_are_int8_with_a_scale_for_each_row_where_that_is_asked_for():
    nodes = [node("Gather", "table x", "e", name="/embed"), node("MatMul", "e w", "y")]
    weights = {"table": weight(20, 64), "w": weight(64, 8)}
    before = build(nodes, "x:int64[batch,words]", "y:float32[batch,words,8]", weights)
    assert len(pairs(quantized(before)[0])) == 1
    after, changes = quantized(before, embeddings=True, exclude=("MatMul_1",))
    (pair,) = pairs(after)
    assert changes == ["1 tables in int8", "1 left: excluded"] and list(pair.inputs[1].const_value.shape) == [20]
    assert pair.inputs[0].const_value.dtype.name == "INT8" and pair.attributes.get_int("axis", 1) == 0
    batch = feed(before)
    assert np.allclose(outputs(before, batch)["y"], outputs(after, batch)["y"], atol=0.05)


def test_the_same_seed_gives_the_same_model_and_another_subset_another():
    before, data = block(), {"x": correlated(20)}
    first, second = (quantized(before, given_by(data), algorithm="gptq", subset_size=8) for _ in range(2))
    assert first[0].digest() == second[0].digest() and first[1][0].endswith("by GPTQ on 8 samples")
    assert quantized(before, given_by(data, seed=1), algorithm="gptq", subset_size=8)[0].digest() != first[0].digest()


def test_rounding_needs_no_samples_and_the_others_say_that_they_do():
    assert pairs(quantized(block(), context(styles=STYLES))[0])
    for algorithm in ("awq", "gptq"):
        with pytest.raises(PassError, match="there are no samples to calibrate on"):
            quantized(block(), given_by(), algorithm=algorithm)
    with pytest.raises(PassError, match="a group size of -1: it must be 0 or more"):
        quantized(block(), group_size=-1)


def test_asks_for_a_backend_that_has_the_form_and_for_something_to_quantize():
    made_by, given = QuantizeWeights(), given_by()
    assert ask(made_by, block(), given) == []
    lacks = "this backend has no products of int4 weights and floating-point activations"
    assert ask(made_by, block(), context(styles=(SYMMETRIC,))) == [lacks]
    # Both together, not one of the one style and one of the other.
    mixed = context(styles=(replace(STYLES[0], activation_type="int8"), replace(STYLES[0], weight_type="int8")))
    assert ask(made_by, block(), mixed) == [lacks]
    assert ask(made_by, quantized(block())[0], given) == ["the model is quantized already"]
    assert ask(made_by, control_flow(), given) == ["no matrix product with stored weights"]
    squared = build([node("MatMul", "x x", "y")], "x:float32[4,4]", "y:float32[4,4]")
    assert ask(made_by, squared, given) == ["no matrix product with stored weights"]
    nodes = [node("MatMul", "x w", "h"), node("ReduceMean", "h", "y", axes=[1])]
    old = build(nodes, "x:float32[batch,4,8]", "y:float32[batch,1,8]", {"w": weight(8, 8)}, opset=17)
    means = "ReduceMean means something else there"
    assert ask(made_by, old, given) == [f"this needs opset 21, the model is opset 17, and {means}"]
