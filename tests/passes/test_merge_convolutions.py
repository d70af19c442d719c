"""`merge-convolutions`: which convolutions become one, what is done once after them, and which stay apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node, outputs, run_twice, value, weight
from onnx import helper

from perwatt.drift import drift
from perwatt.passes.merge_convolutions import MergeConvolutions


def merged(artifact, **settings):
    """The result of the pass and its words, with outputs proved to be within its tolerance."""
    made_by = MergeConvolutions(**settings)
    after, changes = run_twice(made_by, artifact)
    assert after.signature == artifact.signature and not list(made_by.ensures(artifact, after))
    batch = feed(artifact)
    assert not drift([outputs(artifact, batch)], [outputs(after, batch)], MergeConvolutions.tolerance).reasons
    return after, changes


def refused(artifact, **settings):
    """The reason given for the only group; nothing was changed."""
    after, changes = merged(artifact, **settings)
    assert after is artifact and len(changes) == 1, changes
    return changes[0]


def branches(widths, *, kernel=1, bias=(True,), each=(), dtype="float32", space=2, attributes=None, **options):
    """Convolutions of x with so many output channels (c0, c1, …), each followed by what `each` makes of (from, to), and
    all concatenated to y."""
    nodes, tensors, ends = [], {}, []
    for i, width in enumerate(widths):
        own = attributes[i % len(attributes)] if attributes else {}
        has_bias = bias[i % len(bias)]
        tensors[f"w{i}"] = weight(width, 3, *[kernel] * space, seed=i, dtype=dtype)
        if has_bias:
            tensors[f"b{i}"] = weight(width, seed=i, dtype=dtype)
        nodes.append(node("Conv", f"x w{i} b{i}" if has_bias else f"x w{i}", f"c{i}", name=f"/branch{i}/conv", **own))
        follower = each[i % len(each)] if each else None
        if follower:
            nodes += follower(f"c{i}", f"r{i}")
        ends.append(f"r{i}" if follower else f"c{i}")
    nodes.append(node("Concat", " ".join(ends), "y", axis=1, name="/concat"))
    tensors |= options.pop("more", {})
    sizes = ",".join(["5"] * space)
    free = ",".join("?" * (2 + space))
    return build(nodes, f"x:{dtype}[n,3,{sizes}]", f"y:{dtype}[{free}]", tensors, **options)


def relu(source, out):
    return [node("Relu", source, out)]


def clip(low="zero", high="six"):
    return lambda source, out: [node("Clip", f"{source} {low} {high}", out)]


def silu(source, out):
    return [node("Sigmoid", source, f"{out}_gate"), node("Mul", f"{source} {out}_gate", out)]


def silu_turned(source, out):
    return [node("Sigmoid", source, f"{out}_gate"), node("Mul", f"{out}_gate {source}", out)]


def leaky(alpha):
    return lambda source, out: [node("LeakyRelu", source, out, alpha=alpha)]


BOUNDS = {"zero": np.float32(0), "six": np.float32(6), "seven": np.float32([7])}


def test_the_beginning_of_an_inception_block(golden_pass):
    before = branches([4, 2, 3], each=[relu])
    after, changes = merged(before)
    golden_pass("merge_convolutions", before, after, changes)
    assert after.operator_counts() == {"Conv": 1, "Relu": 1, "Split": 1, "Concat": 1}
    assert changes == ["1 groups of parallel convolutions merged"]


def test_a_residual_block_whose_shortcut_has_the_stride_of_the_main_path():
    strides = {"strides": [2, 2]}
    nodes = [
        node("Conv", "x w1 b1", "c1", **strides), node("Relu", "c1", "r1"), node("Conv", "r1 w2", "c2", pads=[1] * 4),
        node("Conv", "x w3 b3", "s", kernel_shape=[1, 1], **strides), node("Add", "c2 s", "y"),
    ]  # fmt: skip
    tensors = {
        "w1": weight(2, 3, 1, 1), "b1": weight(2), "w2": weight(4, 2, 3, 3), "w3": weight(4, 3, 1, 1, seed=1),
        "b3": weight(4),
    }  # fmt: skip
    before = build(nodes, "x:float32[n,3,5,5]", "y:float32[?,?,?,?]", tensors)
    after, _ = merged(before, across_activations=True)
    assert after.operator_counts() == {"Conv": 2, "Split": 1, "Relu": 1, "Add": 1}
    assert refused(before, across_activations=False) == "1 left: different activations follow them"


@given(
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=4), bias=st.lists(st.booleans(), min_size=1, max_size=3),
    space=st.integers(1, 3), strides=st.integers(1, 2), dilations=st.integers(1, 2), pads=st.integers(0, 1),
    kernel=st.integers(1, 2), each=st.lists(st.sampled_from([None, relu, clip(), silu, leaky(0.1)]), min_size=1, max_size=2),
    across=st.booleans(),
)  # fmt: skip
def test_any_group_is_the_same(widths, bias, space, strides, dilations, pads, kernel, each, across):
    own = {"strides": [strides] * space, "dilations": [dilations] * space, "pads": [pads] * 2 * space}
    more = BOUNDS if any(one not in (None, relu, silu) for one in each) else {}
    before = branches(widths, bias=bias, space=space, kernel=kernel, each=each, attributes=[own], more=more)
    after, changes = merged(before, kernel_sizes=(1, 2), across_activations=across)
    alike = len({id(each[i % len(each)]) for i in range(len(widths))}) == 1
    assert (after.operator_counts()["Conv"] == 1) == (alike or across), changes
    if alike and each[0]:
        counts = after.operator_counts()
        assert all(counts[kind] == 1 for kind in ("Relu", "Clip", "Sigmoid", "Mul", "LeakyRelu") if kind in counts)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_weights_keep_their_type(dtype):
    before = branches([2, 3], bias=(True, False), dtype=dtype)
    after, _ = run_twice(MergeConvolutions(), before)
    kinds = {v.const_value.dtype.name for v in after.model.graph.initializers.values()}
    assert kinds == {"FLOAT16" if dtype == "float16" else "DOUBLE", "INT64"}


def test_outputs_keep_their_names_and_shapes_are_known():
    nodes = [node("Conv", f"x w{i}", f"c{i}") for i in range(2)]
    tensors = {f"w{i}": weight(2 + i, 3, 1, 1) for i in range(2)}
    outs = "c0:float32[n,2,5,5] c1:float32[n,3,5,5]"
    after, _ = merged(build(nodes, "x:float32[n,3,5,5]", outs, tensors))
    (conv,) = [n for n in after.model.graph if n.op_type == "Conv"]
    assert after.operator_counts() == {"Conv": 1, "Split": 1} and str(conv.outputs[0].shape) == "[n,5,5,5]"


@pytest.mark.parametrize("opset", [11, 13, 17, 23])
def test_every_version(opset):
    nodes = [node("Conv", f"x w{i}", f"c{i}") for i in range(2)]
    tensors = {f"w{i}": weight(2, 3, 1, 1, seed=i) for i in range(2)}
    before = build(nodes, "x:float32[n,3,5,5]", "c0:float32[n,2,5,5] c1:float32[n,2,5,5]", tensors, opset=opset)
    assert merged(before)[0].operator_counts() == {"Conv": 1, "Split": 1}


def test_the_same_manner_in_other_words():
    ways = [{}, {"kernel_shape": [1, 1]}, {"pads": [0] * 4}, {"auto_pad": "VALID"}, {"strides": [1, 1], "group": 1}]
    before = branches([1, 2, 1, 2, 1], attributes=ways)
    assert merged(before)[0].operator_counts() == {"Conv": 1, "Split": 1, "Concat": 1}


def test_two_groups_on_one_tensor_are_two():
    ways = [{}, {"pads": [1] * 4}, {"pads": [1] * 4}, {}]
    nodes = [node("Conv", f"x w{i}", f"c{i}", **way) for i, way in enumerate(ways)]
    tensors = {f"w{i}": weight(2, 3, 1, 1, seed=i) for i in range(4)}
    outs = " ".join(f"c{i}:float32[?,?,?,?]" for i in range(4))
    after, changes = merged(build(nodes, "x:float32[n,3,5,5]", outs, tensors))
    assert changes[0] == "2 groups of parallel convolutions merged"
    assert after.operator_counts() == {"Conv": 2, "Split": 2}


def test_those_that_the_same_activation_follows_may_be_merged_without_the_others():
    before = branches([2, 3, 1], each=[relu, relu, None])
    after, changes = merged(before, across_activations=False)
    assert after.operator_counts() == {"Conv": 2, "Relu": 1, "Split": 1, "Concat": 1}
    assert changes[1:] == ["1 left: different activations follow them"]


@pytest.mark.parametrize(
    ("each", "counts"),
    [
        ([silu, silu_turned], {"Conv": 1, "Sigmoid": 1, "Mul": 1, "Split": 1, "Concat": 1}),
        ([clip("zero", "six")], {"Conv": 1, "Clip": 1, "Split": 1, "Concat": 1}),
        ([clip("zero", "six"), clip("zero", "seven")], {"Conv": 1, "Clip": 2, "Split": 1, "Concat": 1}),
        ([clip("-", "six"), clip("zero", "six")], {"Conv": 1, "Clip": 2, "Split": 1, "Concat": 1}),
        ([leaky(0.1), leaky(0.2)], {"Conv": 1, "LeakyRelu": 2, "Split": 1, "Concat": 1}),
        ([leaky(0.1), leaky(0.1)], {"Conv": 1, "LeakyRelu": 1, "Split": 1, "Concat": 1}),
        ([relu, silu], {"Conv": 1, "Relu": 1, "Sigmoid": 1, "Mul": 1, "Split": 1, "Concat": 1}),
    ],
)
def test_equal_activations_are_done_once_and_others_each(each, counts):
    more = BOUNDS if any(one not in (relu, silu, silu_turned) for one in each) else {}
    after, _ = merged(branches([2, 3], each=each, more=more), across_activations=True)
    assert after.operator_counts() == counts


def test_a_clip_whose_bounds_are_computed_stays_behind_the_split():
    nodes = [node("Exp", "six", "high")]
    for i in range(2):
        nodes += [node("Conv", f"x w{i}", f"c{i}"), node("Clip", f"c{i} - high", f"y{i}")]
    tensors = {"six": np.float32(0.1), **{f"w{i}": weight(2, 3, 1, 1, seed=i) for i in range(2)}}
    before = build(nodes, "x:float32[n,3,5,5]", "y0:float32[?,?,?,?] y1:float32[?,?,?,?]", tensors)
    assert merged(before, across_activations=True)[0].operator_counts()["Clip"] == 2


def test_an_activation_that_is_not_the_only_user_stays_behind_the_split():
    def also_used(source, out):
        return [node("Relu", source, f"{out}_r"), node("Add", f"{out}_r {source}", out)]

    after, _ = merged(branches([2, 3], each=[also_used]), across_activations=True)
    assert after.operator_counts() == {"Conv": 1, "Split": 1, "Relu": 2, "Add": 2, "Concat": 1}


def test_a_gate_beside_another_user_is_no_activation():
    def gated(source, out):
        return [*silu(source, f"{out}_s"), node("Add", f"{out}_s {source}", out)]

    after, _ = merged(branches([2, 3], each=[gated]))
    assert after.operator_counts() == {"Conv": 1, "Split": 1, "Sigmoid": 2, "Mul": 2, "Add": 2, "Concat": 1}


def test_a_clip_between_bounds_that_the_convolution_gives_stays():
    nodes = [node("GlobalMaxPool", "x", "g")]
    for i in range(2):
        nodes += [node("Conv", f"g w{i}", f"c{i}"), node("Clip", f"x c{i} six", f"y{i}")]
    tensors = {"six": np.float32(6), **{f"w{i}": weight(1, 1, 1, 1, seed=i) for i in range(2)}}
    before = build(nodes, "x:float32[1,1,5,5]", "y0:float32[?,?,?,?] y1:float32[?,?,?,?]", tensors)
    after, _ = run_twice(MergeConvolutions(), before)
    assert after.operator_counts() == {"GlobalMaxPool": 1, "Conv": 1, "Split": 1, "Clip": 2}


def test_a_gate_that_others_use_is_no_activation():
    def gated(source, out):
        return [*silu(source, f"{out}_s"), node("Add", f"{out}_s {out}_s_gate", out)]

    after, _ = merged(branches([2, 3], each=[gated]), across_activations=True)
    assert after.operator_counts()["Sigmoid"] == 2


# What stays apart -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ways",
    [
        [{}, {"strides": [2, 2], "pads": [2, 2, 2, 2]}], [{}, {"pads": [1] * 4}], [{}, {"auto_pad": "SAME_UPPER"}],
        [{"auto_pad": "SAME_LOWER"}, {"auto_pad": "SAME_UPPER"}],
    ],
)  # fmt: skip
def test_different_manners_stay_apart(ways):
    nodes = [node("Conv", f"x w{i}", f"c{i}", **way) for i, way in enumerate(ways)]
    tensors = {f"w{i}": weight(2, 3, 1, 1, seed=i) for i in range(2)}
    before = build(nodes, "x:float32[n,3,5,5]", "c0:float32[?,?,?,?] c1:float32[?,?,?,?]", tensors)
    assert refused(before) == "1 left: they differ in kernel, stride, dilation or padding"


def test_different_kernels_and_dilations_stay_apart():
    def pair(one, other, **ways):
        nodes = [node("Conv", "x w", "c"), node("Conv", "x v", "d", **ways)]
        return build(nodes, "x:float32[n,3,5,5]", "c:float32[?,?,?,?] d:float32[?,?,?,?]", {"w": one, "v": other})

    reason = "1 left: they differ in kernel, stride, dilation or padding"
    assert refused(pair(weight(2, 3, 1, 1), weight(2, 3, 3, 3)), kernel_sizes=(1, 3)) == reason
    assert refused(pair(weight(2, 3, 3, 3), weight(2, 3, 3, 3), dilations=[2, 2]), kernel_sizes=(3,)) == reason


def test_larger_kernels_are_merged_where_the_setting_says_so():
    before = branches([2, 3], kernel=3)
    assert refused(before) == "1 left: their kernels are larger than 1"
    assert merged(before, kernel_sizes=(1, 3))[0].operator_counts()["Conv"] == 1


def test_fewer_than_the_setting_says_stay():
    before = branches([2, 3])
    after, changes = merged(before, least=3)
    assert after is before and changes == []
    assert merged(branches([2, 3, 1]), least=3)[0].operator_counts()["Conv"] == 1


def test_grouped_convolutions_stay_apart():
    nodes = [node("Conv", f"x w{i}", f"c{i}", group=3) for i in range(2)]
    tensors = {f"w{i}": weight(3, 1, 1, 1, seed=i) for i in range(2)}
    before = build(nodes, "x:float32[n,3,5,5]", "c0:float32[?,?,?,?] c1:float32[?,?,?,?]", tensors)
    assert refused(before) == "1 left: they are grouped"


def test_quantized_convolutions_stay_apart():
    nodes, tensors = [], {"s": np.float32(0.1)}
    for i in range(2):
        nodes += [node("DequantizeLinear", f"q{i} s", f"w{i}"), node("Conv", f"x w{i}", f"c{i}")]
        tensors[f"q{i}"] = np.full((2, 3, 1, 1), i + 1, np.int8)
    before = build(nodes, "x:float32[n,3,5,5]", "c0:float32[?,?,?,?] c1:float32[?,?,?,?]", tensors)
    assert refused(before) == "1 left: they are quantized"


@pytest.mark.parametrize("which", ["w0", "b1"])
def test_computed_weights_stay_apart(which):
    nodes = [node("Exp", "e", which)] + [node("Conv", f"x w{i} b{i}", f"c{i}") for i in range(2)]
    tensors = {f"w{i}": weight(2, 3, 1, 1, seed=i) for i in range(2)} | {f"b{i}": weight(2, seed=i) for i in range(2)}
    tensors["e"] = tensors.pop(which)
    before = build(nodes, "x:float32[n,3,5,5]", "c0:float32[?,?,?,?] c1:float32[?,?,?,?]", tensors)
    assert refused(before) == "1 left: their weights are computed, not stored"


def test_weights_that_can_be_fed_stay_apart():
    nodes = [node("Conv", f"x w{i}", f"c{i}") for i in range(2)]
    tensors = {f"w{i}": weight(2, 3, 1, 1, seed=i) for i in range(2)}
    before = build(nodes, "x:float32[n,3,5,5] w0:float32[2,3,1,1]", "c0:float32[?,?,?,?] c1:float32[?,?,?,?]", tensors)
    assert refused(before) == "1 left: their weights are computed, not stored"


def test_shared_weights_stay_apart_and_shared_biases_don_t_matter():
    nodes = [node("Conv", "x w0 b", "c0"), node("Conv", "x w1 b", "c1"), node("Conv", "z w1 b", "c2")]
    tensors = {"w0": weight(2, 3, 1, 1), "w1": weight(2, 3, 1, 1, seed=1), "b": weight(2)}
    spec = "x:float32[n,3,5,5] z:float32[n,3,5,5]", "c0:float32[?,?,?,?] c1:float32[?,?,?,?] c2:float32[?,?,?,?]"
    assert refused(build(nodes, *spec, tensors)) == "1 left: their weights are used elsewhere too"
    nodes[2] = node("Conv", "z w2 b", "c2")
    after, _ = merged(build(nodes, *spec, tensors | {"w2": weight(2, 3, 1, 1, seed=2)}))
    assert after.operator_counts() == {"Conv": 2, "Split": 1}


def test_an_activation_in_a_branch_is_left_there():
    yes = helper.make_graph([node("Relu", "c0", "out")], "yes", [], [value("out:float32[?,?,?,?]")])
    no = helper.make_graph([node("Neg", "c1", "other")], "no", [], [value("other:float32[?,?,?,?]")])
    nodes = [node("Conv", f"x w{i}", f"c{i}") for i in range(2)]
    nodes.append(node("If", "t", "y", then_branch=yes, else_branch=no))
    tensors = {f"w{i}": weight(2, 3, 1, 1, seed=i) for i in range(2)}
    before = build(nodes, "x:float32[n,3,5,5] t:bool[]", "y:float32[?,?,?,?]", tensors)
    after, _ = run_twice(MergeConvolutions(), before)
    assert after.operator_counts() == {"Conv": 1, "Split": 1, "If": 1, "Relu": 1, "Neg": 1}
    for truth in (True, False):
        batch = {"x": weight(2, 3, 5, 5), "t": np.array(truth)}
        assert not drift([outputs(before, batch)], [outputs(after, batch)], MergeConvolutions.tolerance).reasons


def test_convolutions_in_different_branches_are_not_parallel():
    graphs = [
        helper.make_graph([node("Conv", f"x w{i}", f"out{i}")], name, [], [value(f"out{i}:float32[?,?,?,?]")])
        for i, name in enumerate(("yes", "no"))
    ]
    choice = node("If", "t", "y", then_branch=graphs[0], else_branch=graphs[1])
    tensors = {f"w{i}": weight(2, 3, 1, 1, seed=i) for i in range(2)}
    before = build([choice], "x:float32[n,3,5,5] t:bool[]", "y:float32[?,?,?,?]", tensors)
    after, changes = run_twice(MergeConvolutions(), before)
    assert after is before and changes == []


def test_one_that_reads_the_tensor_as_its_weight_is_not_parallel():
    nodes = [node("Conv", "x x", "c0"), node("Conv", "x w", "c1")]
    before = build(nodes, "x:float32[3,3,1,1]", "c0:float32[?,?,?,?] c1:float32[?,?,?,?]", {"w": weight(3, 3, 1, 1)})
    assert refused(before) == "1 left: their weights are computed, not stored"
