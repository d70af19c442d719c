"""Residual blocks of every kind are found and can be taken out in any combination; what is none stays, with its reason."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node, outputs, weight
from residuals import (
    CONVOLUTIONAL,
    IMAGE,
    WIDTH,
    WORDS,
    Net,
    attention,
    basic,
    chain,
    found,
    inverted,
    mlp,
    reasons,
    whole,
)

from perwatt.artifact import Step
from perwatt.passes._block_redundancy import SWITCHES, switched
from perwatt.passes._naming import with_names
from perwatt.passes._residual_blocks import layers, residual_blocks, without

# Which are blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", CONVOLUTIONAL)
def test_convolutional_blocks_go_and_leave_what_they_read(made):
    artifact = chain(made, made)
    assert found(artifact) == ["/block0", "/block1"] and not reasons(artifact)
    after = without(artifact, residual_blocks(artifact).found, Step("drop"))
    assert set(after.operator_counts()) == {"Relu", "Tanh"} and len(after.model.graph) == 2
    assert not after.model.graph.initializers
    _, new = whole(after, artifact)
    assert np.allclose(new["y"], np.tanh(np.maximum(feed(artifact)["x"], 0)), atol=1e-6)


@pytest.mark.parametrize("post", [False, True])
def test_attention_and_mlp_are_blocks_of_one_layer(post):
    artifact = chain(attention, mlp, attention, mlp, kind=WORDS, post=post)
    blocks = residual_blocks(artifact).found
    assert [(block.name, block.attention) for block in blocks] == [
        ("/block0", True), ("/block1", False), ("/block2", True), ("/block3", False),
    ]  # fmt: skip
    assert [[block.name for block in unit] for unit in layers(blocks)] == [
        ["/block0", "/block1"],
        ["/block2", "/block3"],
    ]
    after = without(artifact, blocks, Step("drop"))
    whole(after, artifact)
    # Only those that stand behind a sum stay.
    assert after.operator_counts().get("LayerNormalization", 0) == 4 * post and "MatMul" not in after.operator_counts()


def test_layers_end_where_something_works_between_them_and_where_attention_begins():
    net = Net(WORDS)
    attention(net, "/a0")
    net.at = net.linear(net.at)
    mlp(net, "/m0")
    for number in (1, 2):
        attention(net, f"/a{number}")
    mlp(net, "/m2")
    mlp(net, "/m3")
    attention(net, "/a4")
    units = layers(residual_blocks(net.artifact()).found)
    assert [[block.name for block in unit] for unit in units] == [
        ["/a0"],
        ["/m0"],
        ["/a1", "/a2", "/m2", "/m3"],
        ["/a4"],
    ]


def test_a_second_relu_goes_and_a_first_one_stays():
    artifact = chain(basic, inverted, basic)
    blocks = {block.name: block for block in residual_blocks(artifact).found}
    first = without(artifact, [blocks["/block0"]], Step("drop"))
    last = without(artifact, [blocks["/block2"]], Step("drop"))
    relus = artifact.operator_counts()["Relu"]
    assert first.operator_counts()["Relu"] == relus - 2 and last.operator_counts()["Relu"] == relus - 1
    for after in (first, last):
        whole(after, artifact)


def test_parts_of_a_sum_are_blocks_of_their_own():
    net = Net(WORDS)
    normed = net.layer_norm(net.at)
    left, right = net.linear(normed), net.linear(net.op("Gelu", net.linear(normed)))
    net.add(left, called="/left")
    net.add(right, called="/right")
    artifact = net.artifact()
    assert found(artifact) == ["/left", "/right"]
    expected = {"/left": (left,), "/right": (right,)}
    for block in residual_blocks(artifact).found:
        after = without(artifact, [block], Step("drop"))
        whole(after, artifact)
        kept = {value.name for each in after.model.graph for value in each.outputs}
        assert not kept & set(expected[block.name]) and len(kept & {left, right}) == 1
    both = without(artifact, residual_blocks(artifact).found, Step("drop"))
    assert len(both.model.graph) == 1


def test_nested_blocks_are_each_a_choice():
    net = Net()
    start = net.at = net.op("Relu", net.at)
    inverted(net, "/inner")
    net.add(net.conv(net.at), start, "/outer")
    artifact = net.artifact()
    inner, outer = residual_blocks(artifact).found
    assert (inner.name, outer.name) == ("/inner", "/outer") and outer.contains(inner) and not inner.contains(outer)
    after = without(artifact, [inner], Step("drop"))
    whole(after, artifact)
    assert after.operator_counts()["Conv"] == 1 and found(after) == ["/outer"]
    for blocks in ([outer], [inner, outer], [outer, inner]):
        after = without(artifact, blocks, Step("drop"))
        whole(after, artifact)
        assert "Conv" not in after.operator_counts()


def test_what_only_a_block_needs_goes_with_it():
    net = Net(WORDS)
    side = net.linear(net.op("Relu", net.at))
    shared = net.linear(net.op("Sigmoid", net.at))
    net.at = net.op("Tanh", net.at)
    branch = net.op("Mul", f"{net.linear(net.at)} {net.op('Add', f'{side} {shared}', '/both')}")
    net.add(branch, called="/block")
    net.at = net.op("Mul", f"{net.at} {shared}")
    artifact = net.artifact()
    after = without(
        artifact, [block for block in residual_blocks(artifact).found if block.name == "/block"], Step("drop")
    )
    kept = {value.name for each in after.model.graph for value in each.outputs}
    whole(after, artifact)
    assert side not in kept and shared in kept


def test_a_block_may_stand_on_a_reshaped_input():
    net = Net(WORDS)
    turned = net.op("Transpose", net.at, perm=[0, 2, 1])
    back = net.op("Transpose", net.linear(net.at), perm=[0, 2, 1])
    net.at = net.op("Transpose", net.op("Add", f"{turned} {back}", "/block"), perm=[0, 2, 1])
    artifact = net.artifact()
    assert found(artifact) == ["/block"]
    after = without(artifact, residual_blocks(artifact).found, Step("drop"))
    _, new = whole(after, artifact)
    assert np.allclose(new["y"], np.tanh(feed(artifact)["x"]), atol=1e-6)


def test_an_output_keeps_its_name_and_a_block_at_the_input_goes():
    net = Net()
    net.nodes.append(node("Add", f"x {net.conv('x')}", "y", name="/block"))
    artifact = with_names(build(net.nodes, f"x:{IMAGE}", f"y:{IMAGE}", net.weights), Step("test"))
    after = without(artifact, residual_blocks(artifact).found, Step("drop"))
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    assert after.signature == artifact.signature and np.array_equal(outputs(after, feed(after))["y"], feed(after)["x"])


# What is none -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["a", "b"])
def test_downsampling_blocks_stay_and_say_why(option):
    net = Net()
    net.at = net.op("Relu", net.at)
    main = net.op("Relu", net.conv(net.at, 16, WIDTH, strides=[2, 2]))
    if option == "a":
        ends = [net.stored(np.int64([n])) for n in (0, 8)]
        spread = net.op("Slice", f"{net.at} {' '.join(ends)} {net.stored(np.int64([2]))} {net.stored(np.int64([2]))}")
        spread = net.op("Slice", f"{spread} {' '.join(ends)} {net.stored(np.int64([3]))} {net.stored(np.int64([2]))}")
        shortcut = net.op("Pad", f"{spread} {net.stored(np.int64([0, 4, 0, 0, 0, 4, 0, 0]))}")
    else:
        shortcut = net.normed(net.conv(net.at, 16, WIDTH, 1, strides=[2, 2]), 16)
    net.at = net.op("Relu", net.add(net.conv(main, 16, 16), shortcut, "/down"))
    net.kind = IMAGE.replace("8,8,8", "16,4,4")
    net.nodes.append(node("Tanh", net.at, "y"))
    artifact = with_names(build(net.nodes, f"x:{IMAGE}", f"y:{net.kind}", net.weights), Step("test"))
    assert found(artifact) == []
    operators = {"a": "Pad and a Slice", "b": "BatchNormalization and a Conv"}[option]
    assert (
        reasons(artifact)["/down"]
        == f"its shortcut has a {operators} that changes the shape, [batch, 8, 8, 8] to [batch, 16, 4, 4]"
    )


def test_a_projection_of_the_same_shape_stays():
    net = Net()
    net.add(net.normed(net.conv(net.conv(net.at))), net.conv(net.at, side=1), "/projected")
    assert reasons(net.artifact()) == {"/projected": "its shortcut has a Conv"}


def test_skips_of_a_u_net_stay_and_its_inner_blocks_go():
    net = Net()
    skipped = net.at = net.op("Relu", net.at)
    net.at = net.op("MaxPool", net.at, kernel_shape=[2, 2], strides=[2, 2])
    basic(net, "/inner")
    up = net.op("Resize", f"{net.at} - {net.stored(np.float32([1, 1, 2, 2]))}")
    net.add(net.conv(up), skipped, "/skip")
    artifact = net.artifact()
    assert found(artifact) == ["/inner"]
    assert reasons(artifact) == {"/skip": "its branch changes the resolution (Resize)"}


def test_a_branch_with_other_uses_stays_but_what_its_shape_is_used_for_is_no_use():
    net = Net()
    inner = net.op("Relu", net.conv(net.at))
    net.add(net.conv(inner), called="/used")
    net.at = net.op("Mul", f"{net.at} {inner}")
    net.add(net.conv(net.at), called="/block")
    artifact = net.artifact()
    assert reasons(artifact) == {"/used": "a value inside its branch is used elsewhere"} and found(artifact) == [
        "/block"
    ]
    net = Net()
    net.add(net.conv(net.at), called="/output")
    seen = net.nodes[-2].output[0]
    assert reasons(net.artifact(seen)) == {"/output": "a value inside its branch is used elsewhere"}
    net = Net(WORDS)
    shape = net.op("Shape", net.at)
    for number in range(2):
        net.add(net.op("Reshape", f"{net.linear(net.layer_norm(net.at))} {shape}"), called=f"/block{number}")
    assert found(net.artifact()) == ["/block0", "/block1"]


def test_other_additions_stay():
    net = Net(WORDS)
    cubed = net.op("Mul", f"{net.op('Mul', f'{net.at} {net.at}')} {net.at}")
    net.add(cubed, called="/gelu")
    start = net.at = net.op("Relu", net.at)
    net.add(net.op("ReduceMean", net.linear(net.linear(net.at))), called="/mean")
    net.op("Add", f"{net.at} {net.stored(weight(WIDTH))}", "/bias")
    net.at = net.op("Add", f"{net.linear(net.at)} {net.op('Sigmoid', 'x')}", "/unrelated")
    short = net.op("ReduceMax", start)
    net.at = net.op("Add", f"{short} {net.op('Mul', f'{net.at} {short}')}", "/broadcast")
    shaped = net.op("Expand", f"{net.stored(weight(1, 1, WIDTH))} {net.op('Shape', net.at)}")
    net.add(net.linear(shaped), called="/positions")
    artifact = net.artifact()
    left = reasons(artifact)
    assert left["/gelu"] == "its branch is elementwise, or hardly more"
    assert "/bias" not in left and found(artifact) == ["/mean"]
    assert left["/broadcast"].startswith(
        "its input and output have, or may have, different shapes: [1, 1, 1] and [batch, 5, 8]"
    )
    assert {left["/unrelated"], left["/positions"]} == {"neither of its inputs is calculated from the other"}


# Any of them ------------------------------------------------------------------------------------------------------------


@st.composite
def chains(draw):
    """A net of random blocks, some nested and some behind a downsampling, and which of its blocks go."""
    kind = draw(st.sampled_from([IMAGE, WORDS]))
    net = Net(kind)
    net.at = net.op("Relu", net.at)
    count = draw(st.integers(1, 4))
    for number in range(count):
        made = draw(st.sampled_from(CONVOLUTIONAL if kind == IMAGE else (attention, mlp)))
        post = {"post": draw(st.booleans())} if kind == WORDS else {}
        start = net.at
        made(net, f"/block{number}", **post)
        if draw(st.booleans()):
            branch = net.conv(net.at) if kind == IMAGE else net.linear(net.at)
            net.add(branch, start, f"/around{number}")
    artifact = net.artifact(head=draw(st.booleans()))
    blocks = residual_blocks(artifact).found
    return artifact, blocks, draw(st.permutations(blocks)), draw(st.integers(0, len(blocks)))


@given(chains())
def test_any_blocks_of_any_chain_go(case):
    artifact, blocks, order, count = case
    assert not reasons(artifact) and [b.name for b in blocks if b.name.startswith("/block")]
    gone = order[:count]
    after = without(artifact, gone, Step("drop"))
    _, new = whole(after, artifact)
    names = {n.name for n in after.model.graph}
    assert not names & {name for block in gone for name in (block.name, *block.nodes)}
    kept = {b.name for b in blocks if b not in gone and not any(g.contains(b) for g in gone)}
    assert kept <= names and {block.name for block in residual_blocks(after).found} <= kept
    # A switch says the same as an edit does.
    row = np.float32([[block not in gone for block in blocks]])
    same = outputs(switched(artifact, blocks), {**feed(artifact), SWITCHES: row})
    assert all(np.allclose(same[name], array, atol=1e-5) for name, array in new.items())
