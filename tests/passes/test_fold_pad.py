"""`fold-pad`: into what a padding goes, with which numbers, and when it has to stay."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from models import build, feed, node, outputs, run_twice, weight

from perwatt.drift import drift
from perwatt.passes.fold_pad import FoldPad

LOWEST = float(np.finfo(np.float32).min)


def folded(artifact):
    """The result of the pass and its words, with outputs proved to be within its tolerance."""
    after, changes = run_twice(FoldPad(), artifact)
    assert after.signature == artifact.signature
    batch = feed(artifact)
    assert not drift([outputs(artifact, batch)], [outputs(after, batch)], FoldPad.tolerance).reasons
    return after, changes


def refused(artifact):
    """The reason given for the only padding; nothing was changed."""
    after, changes = folded(artifact)
    assert after is artifact and len(changes) == 1, changes
    return changes[0]


def padded(pads, follower, *, value=None, mode=None, before=(), weights=None, shape="3,6,6", opset=23, axes=None):
    """x, `before` (from x to d), a Pad (to p) and `follower` (to y)."""
    attributes = {} if mode is None else {"mode": mode}
    tensors = dict(weights or {})
    source = "d" if before else "x"
    if opset < 11:
        pad = node("Pad", source, "p", pads=pads, **attributes, **({} if value is None else {"value": value}))
    else:
        tensors |= {"pads": np.int64(pads)} | ({} if value is None else {"v": np.float32(value)})
        inputs = f"{source} pads {'v' if value is not None else '-'}"
        if axes is not None:
            tensors["axes"] = np.int64(axes)
            inputs += " axes"
        pad = node("Pad", inputs, "p", **attributes)
    free = ",".join("?" * (1 + len(shape.split(","))))
    return build([*before, pad, follower], f"x:float32[n,{shape}]", f"y:float32[{free}]", tensors, opset=opset)


def conv(channels=3, out=4, kernel=(3, 3), **attributes):
    """A convolution of p and its weight."""
    return {"follower": node("Conv", "p w", "y", **attributes), "weights": {"w": weight(out, channels, *kernel)}}


def made(artifact, kind):
    """The only node of that kind, as its attributes."""
    (found,) = [n for n in artifact.model.graph if n.op_type == kind]
    return {name: list(a.value) if isinstance(a.value, tuple) else a.value for name, a in found.attributes.items()}


RELU = [node("Relu", "x", "d")]
EDGE = [0, 0, 1, 1, 0, 0, 1, 1]


# Convolutions ---------------------------------------------------------------------------------------------------------


def test_the_form_of_tensorflow(golden_pass):
    before = padded([0, 0, 0, 0, 0, 0, 1, 1], **conv(strides=[2, 2], kernel_shape=[3, 3], auto_pad="VALID"), value=0)
    after, changes = folded(before)
    golden_pass("fold_pad", before, after, changes)
    assert after.operator_counts() == {"Conv": 1}


@st.composite
def convolutions(draw):
    space = draw(st.integers(1, 3))
    kernel = draw(st.lists(st.integers(1, 3), min_size=space, max_size=space))
    dilations = draw(st.lists(st.integers(1, 2), min_size=space, max_size=space))
    strides = draw(st.lists(st.integers(1, 3), min_size=space, max_size=space))
    group, per_group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    border = st.lists(st.integers(0, 3), min_size=2 * space, max_size=2 * space)
    pads, own = draw(border), draw(border)
    auto = draw(st.sampled_from([None, "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        # ONNX Runtime has no such convolutions.
        dilations = [1] * space
    attributes = {"strides": strides, "dilations": dilations, "group": group}
    if draw(st.booleans()):
        attributes["kernel_shape"] = kernel
    if auto in (None, "NOTSET"):
        attributes["pads"] = own
    if auto is not None:
        attributes["auto_pad"] = auto
    axes = draw(st.sampled_from(["all", "behind", "some"]))
    all_pads = [0, 0, *pads[:space], 0, 0, *pads[space:]]
    channels = group * per_group
    chosen = {"all": None, "behind": [a - space for a in range(space)], "some": [space + 1]}[axes]
    if axes == "some":
        pads = [0] * (space - 1) + [pads[space - 1]] + [0] * (space - 1) + [pads[-1]]
    given_pads = {"all": all_pads, "behind": pads, "some": [pads[space - 1], pads[-1]]}[axes]
    sizes = draw(st.lists(st.integers(6, 9), min_size=space, max_size=space))
    artifact = padded(
        given_pads, node("Conv", "p w b", "y", **attributes), axes=chosen, shape=",".join(map(str, [channels, *sizes])),
        weights={"w": weight(2 * group, per_group, *kernel), "b": weight(2 * group)}, value=draw(st.sampled_from([None, 0])),
    )  # fmt: skip
    return artifact, pads, [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]


@given(convolutions())
def test_any_padding_of_any_convolution_is_the_same_or_stays(made):
    artifact, pads, reach = made
    after, changes = folded(artifact)
    left = "Pad" in after.operator_counts()
    assert left == (changes in (["1 left: it pads as much as the kernel is wide"], UNKNOWN)), changes
    follower = next(n for n in artifact.model.graph if n.op_type == "Conv")
    if not any(pads):
        assert not left
    elif not follower.attributes.get_string("auto_pad", "").startswith("SAME"):
        valid = follower.attributes.get_string("auto_pad", "") == "VALID"
        own = [0] * len(pads) if valid else list(follower.attributes.get_ints("pads", [0] * len(pads)))
        assert left == any(a + b >= k for a, b, k in zip(pads, own, [*reach, *reach], strict=True))


UNKNOWN = ["1 left: the padding of what follows depends on a size that isn't known"]


@pytest.mark.parametrize("opset", [10, 11, 13, 18, 23, 25])
def test_every_version_of_the_operator(opset):
    after, _ = folded(padded(EDGE, **conv(), opset=opset, value=0.0))
    assert after.operator_counts() == {"Conv": 1} and made(after, "Conv")["pads"] == [1, 1, 1, 1]


@pytest.mark.parametrize("axes", [[2, 3], [-2, -1], [3, 2], [-1, 2]])
def test_axes_in_any_order(axes):
    order = [axis % 4 for axis in axes]
    pads = [{2: 1, 3: 0}[a] for a in order] + [{2: 2, 3: 1}[a] for a in order]
    after, _ = folded(padded(pads, **conv(), axes=axes))
    assert made(after, "Conv")["pads"] == [1, 0, 2, 1]


def test_what_the_convolution_pads_already_is_added():
    after, _ = folded(padded([0, 0, 0, 0, 0, 0, 1, 1], **conv(pads=[1, 1, 0, 0], strides=[2, 2])))
    assert made(after, "Conv")["pads"] == [1, 1, 1, 1]


@pytest.mark.parametrize(("auto", "expected"), [("SAME_UPPER", [1, 1, 3, 3]), ("SAME_LOWER", [2, 2, 2, 2])])
def test_same_padding_is_written_out_where_the_size_is_known(auto, expected):
    # 6 + 1 entries at stride 2 make 4 windows of 4, which reach over 10: 3 more.
    before = build(
        [node("Pad", "x pads", "p"), node("Conv", "p w", "y", strides=[2, 2], auto_pad=auto)], "x:float32[n,3,6,6]",
        "y:float32[?,?,?,?]", {"pads": np.int64([0, 0, 0, 0, 0, 0, 1, 1]), "w": weight(4, 3, 4, 4)}, inner="p:float32[n,3,7,7]",
    )  # fmt: skip
    after, _ = folded(before)
    assert made(after, "Conv")["pads"] == expected and "auto_pad" not in made(after, "Conv")


def test_same_padding_of_an_unknown_size_stays():
    assert [refused(padded(EDGE, **conv(strides=[2, 2], auto_pad="SAME_UPPER")))] == UNKNOWN
    after, _ = folded(padded([0, 0, 0, 0, 0, 0, 1, 1], **conv(kernel=(5, 5), auto_pad="SAME_UPPER")))
    assert made(after, "Conv")["pads"] == [2, 2, 3, 3]


def test_two_paddings_in_a_row_both_go():
    nodes = [node("Pad", "x pads", "p"), node("Pad", "p pads", "q"), node("Conv", "q w", "y")]
    before = build(nodes, "x:float32[n,3,6,6]", "y:float32[?,?,?,?]", {"pads": np.int64(EDGE), "w": weight(4, 3, 5, 5)})
    after, changes = folded(before)
    assert made(after, "Conv")["pads"] == [2] * 4 and changes == ["2 paddings done by what follows, or of nothing"]


def test_a_padding_that_several_take_over_goes():
    nodes = [
        node("Pad", "x pads", "p"), node("Conv", "p w", "c"), node("Conv", "p w2", "d", kernel_shape=[3, 3]),
        node("Add", "c d", "y"),
    ]  # fmt: skip
    tensors = {"pads": np.int64(EDGE), "w": weight(4, 3, 3, 3), "w2": weight(4, 3, 3, 3, seed=1)}
    after, _ = folded(build(nodes, "x:float32[n,3,6,6]", "y:float32[?,?,?,?]", tensors))
    assert after.operator_counts() == {"Conv": 2, "Add": 1}


def test_a_padding_that_somebody_else_needs_stays_for_all():
    nodes = [node("Pad", "x pads", "p"), node("Conv", "p w", "y"), node("Exp", "p", "z")]
    tensors = {"pads": np.int64(EDGE), "w": weight(4, 3, 3, 3)}
    before = build(nodes, "x:float32[n,3,6,6]", "y:float32[?,?,?,?] z:float32[?,?,?,?]", tensors)
    assert refused(before) == "1 left: the padded tensor is used by something that can't pad"
    before = build(nodes[:2], "x:float32[n,3,6,6]", "y:float32[?,?,?,?] p:float32[?,?,?,?]", tensors)
    assert refused(before) == "1 left: the padded tensor is an output"


def test_a_padded_weight_is_not_a_padded_input():
    nodes = [node("Pad", "w pads", "p"), node("Conv", "x p", "y", kernel_shape=[3, 3])]
    before = build(nodes, "x:float32[n,3,6,6]", "y:float32[?,?,?,?]", {"pads": np.int64(EDGE), "w": weight(4, 3, 1, 1)})
    after, changes = folded(before)
    assert after is before and changes == []


def test_what_is_padded_for_two_inputs_of_one_node_stays():
    nodes = [node("Pad", "x pads", "p"), node("Conv", "p p", "y", kernel_shape=[8, 8])]
    before = build(nodes, "x:float32[3,3,6,6]", "y:float32[?,?,?,?]", {"pads": np.int64(EDGE)})
    assert refused(before) == "1 left: the padded tensor is used by something that can't pad"


@pytest.mark.parametrize(
    ("pads", "options", "reason"),
    [
        (EDGE, {"value": 0.5}, "it pads with something else than zeros"),
        (EDGE, {"mode": "reflect"}, "its mode is reflect"),
        (EDGE, {"mode": "edge"}, "its mode is edge"),
        ([0, 1, 1, 1, 0, 0, 1, 1], {"channels": 4}, "it pads channels or the batch"),
        ([1, 0, 1, 1, 0, 0, 1, 1], {}, "it pads channels or the batch"),
        ([0, 0, -1, 0, 0, 0, 1, 1], {}, "it crops"),
        ([0, 0, 3, 0, 0, 0, 0, 0], {}, "it pads as much as the kernel is wide"),
        ([0, 0, 0, 0, 0, 0, 0, 3], {}, "it pads as much as the kernel is wide"),
        ([0, 0, 2, 0, 0, 0, 0, 0], {"pads": [1, 0, 0, 0]}, "it pads as much as the kernel is wide"),
    ],
)  # fmt: skip
def test_paddings_that_a_convolution_can_t_do(pads, options, reason):
    channels = options.pop("channels", 3)
    own = {name: options.pop(name) for name in ("pads",) if name in options}
    assert refused(padded(pads, **conv(channels, **own), **options)) == f"1 left: {reason}"


def test_computed_parts_stay():
    def computed(*extra, inputs):
        nodes = [*extra, node("Pad", inputs, "p"), node("Conv", "p w", "y")]
        tensors = {"pads": np.int64(EDGE), "v": np.float32(0), "axes": np.int64([0, 1, 2, 3]), "w": weight(4, 3, 3, 3)}
        used = {name for n in nodes for name in n.input}
        return build(nodes, "x:float32[n,3,6,6]", "y:float32[?,?,?,?]", {k: t for k, t in tensors.items() if k in used})

    assert refused(computed(node("Abs", "pads", "q"), inputs="x q")) == "1 left: its pads are computed, not stored"
    assert (
        refused(computed(node("Abs", "v", "q"), inputs="x pads q"))
        == "1 left: the value it pads with is computed, not stored"
    )
    assert (
        refused(computed(node("Abs", "axes", "q"), inputs="x pads v q"))
        == "1 left: the axes it pads are computed, not stored"
    )


def test_a_weight_of_unknown_shape_stays():
    nodes = [node("Pad", "x pads", "p"), node("Conv", "p w", "y")]
    before = build(nodes, "x:float32[n,3,6,6] w:float32[1]", "y:float32[?,?,?,?]", {"pads": np.int64(EDGE)})
    before.model.graph.inputs[1].shape = None
    after, changes = run_twice(FoldPad(), before)
    assert after is before and changes == ["1 left: the rank of what follows isn't known"]


def test_a_transposed_convolution_keeps_what_it_is_fed():
    nodes = [node("Pad", "x pads", "p"), node("ConvTranspose", "p w", "y", pads=[1, 1, 1, 1])]
    before = build(nodes, "x:float32[n,3,6,6]", "y:float32[?,?,?,?]", {"pads": np.int64(EDGE), "w": weight(3, 4, 3, 3)})
    after, changes = folded(before)
    assert after is before and changes == []


# Paddings of nothing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_a_padding_of_nothing_vanishes_whatever_follows(mode):
    nodes = [node("Pad", "x pads", "p", mode=mode), node("Exp", "p", "y")]
    before = build(nodes, "x:float32[n,3]", "y:float32[n,3]", {"pads": np.int64([0] * 4)})
    after, changes = folded(before)
    assert after.operator_counts() == {"Exp": 1} and changes == ["1 paddings done by what follows, or of nothing"]
    alone, _ = folded(
        build([node("Pad", "x pads", "y")], "x:float32[n,3]", "y:float32[n,3]", {"pads": np.int64([0] * 4)})
    )
    assert alone.operator_counts() == {"Identity": 1}


def test_a_padding_of_nothing_along_computed_axes_vanishes_too():
    nodes = [node("Abs", "axes", "a"), node("Pad", "x pads - a", "p"), node("Exp", "p", "y")]
    before = build(nodes, "x:float32[n,3]", "y:float32[n,3]", {"pads": np.int64([0] * 2), "axes": np.int64([1])})
    assert folded(before)[0].operator_counts() == {"Exp": 1}


# Pooling --------------------------------------------------------------------------------------------------------------


def pooling(kind, kernel=(3, 3), **attributes):
    return node(kind, "p", "y", kernel_shape=list(kernel), **attributes)


@given(
    pads=st.lists(st.integers(0, 2), min_size=4, max_size=4), own=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    strides=st.lists(st.integers(1, 3), min_size=2, max_size=2), value=st.sampled_from([None, 0, 0.5, -1, LOWEST, -np.inf]),
    below=st.sampled_from(["nothing", "Relu", "Clip", "Concat", "Exp"]), ceil=st.booleans(), dilated=st.booleans(),
)  # fmt: skip
def test_maximum_pooling_is_the_same_or_stays(pads, own, strides, value, below, ceil, dilated):
    before = {
        "nothing": [], "Relu": RELU, "Exp": [node("Exp", "x", "d")],
        "Clip": [node("Clip", "x low", "d")],
        "Concat": [node("Relu", "x", "r"), node("Sigmoid", "x", "s"), node("Concat", "r s", "d", axis=1)],
    }[below]  # fmt: skip
    artifact = padded(
        [0, 0, *pads[:2], 0, 0, *pads[2:]], pooling("MaxPool", strides=strides, pads=own, ceil_mode=int(ceil),
        dilations=[2, 1] if dilated else [1, 1]), value=value, before=before, weights={"low": np.float32(-0.5)}, shape="3,7,8",
    )  # fmt: skip
    after, _ = folded(artifact)
    least = {"nothing": LOWEST, "Relu": 0, "Exp": 0, "Clip": -0.5, "Concat": 0}[below]
    exact = (value or 0) <= least and not ceil and not dilated
    fits = all(a + b < 3 for a, b in zip(pads, own, strict=True))
    assert ("Pad" not in after.operator_counts()) == (not any(pads) or (exact and fits))


def test_maximum_pooling_after_a_relu_as_keras_has_it():
    after, _ = folded(padded(EDGE, pooling("MaxPool", strides=[2, 2]), before=RELU))
    assert after.operator_counts() == {"Relu": 1, "MaxPool": 1} and made(after, "MaxPool")["pads"] == [1] * 4


@pytest.mark.parametrize("old", [False, True])
def test_a_clip_bounds_from_below_by_input_or_attribute(old):
    low = [node("Clip", "x", "d", min=0.0, max=6.0)] if old else [node("Clip", "x low high", "d")]
    tensors = {} if old else {"low": np.float32(0), "high": np.float32(6)}
    before = padded(EDGE, pooling("MaxPool"), before=low, weights=tensors, opset=10 if old else 23)
    assert folded(before)[0].operator_counts() == {"Clip": 1, "MaxPool": 1}


@pytest.mark.parametrize(
    ("before", "weights"),
    [
        ([], {}), ([node("LeakyRelu", "x", "d")], {}), ([node("Clip", "x - high", "d")], {"high": np.float32(6)}),
        ([node("Clip", "x low high", "d")], {"low": np.float32(0), "high": np.float32(-1)}),
        ([node("Relu", "x", "r"), node("Concat", "r x", "d", axis=1)], {}),
        ([node("Abs", "z", "low"), node("Clip", "x low", "d")], {"z": np.float32(0)}),
    ],
)  # fmt: skip
def test_zeros_around_what_may_be_negative_stay(before, weights):
    artifact = padded(EDGE, pooling("MaxPool"), before=before, weights=weights)
    assert refused(artifact) == "1 left: it pads with what may be larger than the data"


@pytest.mark.parametrize("value", [-np.inf, LOWEST])
def test_padding_with_minus_infinity_is_what_maximum_pooling_does(value):
    after, _ = folded(padded(EDGE, pooling("MaxPool", strides=[2, 2]), value=value))
    assert after.operator_counts() == {"MaxPool": 1}


def test_indices_of_maximum_pooling_would_count_otherwise():
    pool = node("MaxPool", "p", "y i", kernel_shape=[3, 3])
    nodes = [*RELU, node("Pad", "d pads", "p"), pool]
    outs = "y:float32[?,?,?,?] i:int64[?,?,?,?]"
    before = build(nodes, "x:float32[n,3,6,6]", outs, {"pads": np.int64(EDGE)})
    assert refused(before) == "1 left: a value inside it is an output"
    tensors = {"pads": np.int64(EDGE), "w": weight(4, 3, 3, 3)}
    both = build([*nodes, node("Conv", "p w", "z")], "x:float32[n,3,6,6]", f"{outs} z:float32[?,?,?,?]", tensors)
    _, changes = folded(both)
    assert changes == [
        "1 left: the padded tensor is used by something that can't pad", "1 left: a value inside it is an output",
    ]  # fmt: skip
    unused = build(nodes, "x:float32[n,3,6,6]", "y:float32[?,?,?,?]", {"pads": np.int64(EDGE)})
    assert "Pad" not in folded(unused)[0].operator_counts()


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"ceil_mode": 1}, "the pooling's last window may lie beyond the edge"),
        ({"dilations": [2, 2]}, "the pooling is dilated, and a window may lie beyond the edge"),
        ({"kernel": (1, 3)}, "it pads as much as the kernel is wide"),
    ],
)
def test_windows_that_would_be_others_stay(attributes, reason):
    assert refused(padded(EDGE, pooling("MaxPool", **attributes), before=RELU)) == f"1 left: {reason}"


@given(
    pads=st.lists(st.integers(0, 2), min_size=4, max_size=4), own=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    strides=st.lists(st.integers(1, 3), min_size=2, max_size=2), counts=st.sampled_from([None, 0, 1]),
    value=st.sampled_from([None, 0, 1]), auto=st.sampled_from([None, "VALID", "SAME_UPPER"]), ceil=st.booleans(),
)  # fmt: skip
def test_average_pooling_is_the_same_or_stays(pads, own, strides, counts, value, auto, ceil):
    attributes = {"strides": strides, "ceil_mode": int(ceil)}
    attributes |= {"pads": own} if auto is None else {"auto_pad": auto}
    attributes |= {} if counts is None else {"count_include_pad": counts}
    # How a window beyond the edge is averaged is nobody's business here.
    assume(not (ceil and auto))
    artifact = padded(
        [0, 0, *pads[:2], 0, 0, *pads[2:]], pooling("AveragePool", **attributes), value=value, shape="3,7,8"
    )
    after, _ = folded(artifact)
    if "Pad" not in after.operator_counts() and any(pads):
        assert made(after, "AveragePool")["count_include_pad"] == 1
        assert not value and not ceil and (counts or auto or not any(own))
    if not any(pads):
        assert "Pad" not in after.operator_counts()
    if any(pads) and auto is None and not value and not ceil and (counts or not any(own)):
        fits = all(a + b < 3 for a, b in zip(pads, own, strict=True))
        assert ("Pad" not in after.operator_counts()) == fits


def test_average_pooling_counts_the_zeros():
    before = padded(EDGE, pooling("AveragePool", strides=[2, 2]))
    after, _ = folded(before)
    assert made(after, "AveragePool") == {
        "kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4, "count_include_pad": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("attributes", "value", "reason"),
    [
        ({"pads": [1] * 4}, 0, "the average leaves out the pooling's own padding"),
        ({"ceil_mode": 1}, 0, "the pooling's last window may lie beyond the edge"),
        ({}, 1, "it pads with something else than zeros"),
    ],
)
def test_averages_of_something_else_stay(attributes, value, reason):
    assert refused(padded(EDGE, pooling("AveragePool", **attributes), value=value)) == f"1 left: {reason}"


@pytest.mark.parametrize("dtype", ["float16", "float64", "uint8"])
def test_other_types(dtype):
    nodes = [node("Pad", "x pads", "p"), node("MaxPool", "p", "y", kernel_shape=[3, 3])]
    nodes = nodes if dtype == "uint8" else [node("Relu", "x", "d"), node("Pad", "d pads", "p"), nodes[1]]
    before = build(nodes, f"x:{dtype}[n,3,6,6]", f"y:{dtype}[?,?,?,?]", {"pads": np.int64(EDGE)})
    after, _ = run_twice(FoldPad(), before)
    assert "Pad" not in after.operator_counts()
    batch = {"x": (weight(2, 3, 6, 6) * 50 + (100 if dtype == "uint8" else 0)).astype(dtype)}
    old, new = outputs(before, batch), outputs(after, batch)
    np.testing.assert_array_equal(old["y"], new["y"])


def test_zeros_around_signed_integers_stay():
    nodes = [node("Pad", "x pads", "p"), node("MaxPool", "p", "y", kernel_shape=[3, 3])]
    before = build(nodes, "x:int8[n,3,6,6]", "y:int8[?,?,?,?]", {"pads": np.int64(EDGE)})
    after, changes = run_twice(FoldPad(), before)
    assert after is before and changes == ["1 left: it pads with what may be larger than the data"]
