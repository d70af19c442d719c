"""Couplings: groups as coarse as needed and no coarser, on graphs like well-known ones; weights that are shared; names."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from couplings import Net, consistent, cut_of, described, left_whole, proven, reasons
from models import build, conv_net, node, proto, transformer, weight

from perwatt.artifact import Artifact
from perwatt.coupling import couple
from perwatt.errors import PassError

# Architectures --------------------------------------------------------------------------------------------------------


def resnet():
    """A stem, two blocks at 8 channels, one with a convolution in its shortcut that goes to 12, pooling, a classifier."""
    net = Net()

    def block(name, h, ins, inner, outs):
        y = net.put("Relu", net.norm(net.conv(f"{name}/1", h, ins, inner, 3), inner))
        y = net.norm(net.conv(f"{name}/2", y, inner, outs, 3), outs)
        short = h if ins == outs else net.norm(net.conv(f"{name}/short", h, ins, outs), outs)
        return net.put("Relu", net.put("Add", y, short))

    h = net.put("Relu", net.norm(net.conv("stem", net.feed("x", "batch", 3, 8, 8), 3, 8, 3), 8))
    h = block("c", block("b", block("a", h, 8, 4, 8), 8, 5, 8), 8, 6, 12)
    return net.built(net.gemm("head", net.put("Flatten", net.put("GlobalAveragePool", h)), 12, 5))


def test_residual_stages_are_one_group_each_and_the_insides_of_blocks_their_own():
    coupling, _ = proven(resnet())
    assert described(coupling) == {
        "stem": (8, "a/2 b/2 stem", "a/1 b/1 c/1 c/short"),
        "a/1": (4, "a/1", "a/2"),
        "b/1": (5, "b/1", "b/2"),
        "c/1": (6, "c/1", "c/2"),
        "c/2": (12, "c/2 c/short", "head"),
    }
    assert reasons(coupling) == {"head": "it is an output of the model"}


def bert(heads=4, size=3, inner=20, vocabulary=9):
    """Two layers on token ids, as exporters write them, with a mask, shapes that are calculated and a tied head."""
    width = heads * size
    net = Net()
    ids, mask = net.feed("ids", "batch", "words", dtype="int64"), net.feed("mask", "batch", 1, 1, "words")
    table = net.noise(vocabulary, width)
    h = net.put("Gather", table, ids)
    h = net.put("LayerNormalization", h, net.noise(width), net.noise(width))
    batch, words = (net.put("Shape", ids, start=n, end=n + 1) for n in (0, 1))
    apart = net.put("Concat", batch, words, net.keep(np.int64([heads, size])), axis=0)
    joined = net.put("Concat", batch, words, net.keep(np.int64([width])), axis=0)
    for layer in "01":
        q, k, v = (
            net.put(
                "Transpose", net.put("Reshape", net.linear(f"{layer}/{name}", h, width, width, True), apart), perm=perm
            )
            for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3]))
        )
        scores = net.put("Softmax", net.put("Add", net.put("MatMul", q, k, name=f"{layer}/scores"), mask))
        y = net.put("Reshape", net.put("Transpose", net.put("MatMul", scores, v), perm=[0, 2, 1, 3]), joined)
        h = net.put("Add", h, net.linear(f"{layer}/o", y, width, width, True))
        h = net.put("LayerNormalization", h, net.noise(width), net.noise(width))
        y = net.put("Gelu", net.linear(f"{layer}/up", h, width, inner, True))
        h = net.put("Add", h, net.linear(f"{layer}/down", y, inner, width, True))
        h = net.put("LayerNormalization", h, net.noise(width), net.noise(width))
    return net.built(net.put("MatMul", h, net.put("Transpose", table, perm=[1, 0]), name="head"))


def test_heads_and_neurons_of_a_transformer():
    artifact = bert()
    fed = {"ids": np.int64([[1, 3, 5, 8], [0, 2, 8, 7]]), "mask": np.zeros((2, 1, 1, 4), np.float32)}
    coupling, _ = proven(artifact, fed=fed)
    assert described(coupling) == {
        "0/q": (4, "0/k 0/q 0/v", "0/o"), "0/up": (20, "0/up", "0/down"),
        "1/q": (4, "1/k 1/q 1/v", "1/o"), "1/up": (20, "1/up", "1/down"),
    }  # fmt: skip
    assert (
        coupling.groups[0].positions(*coupling.groups[0].makers[0].made).tolist()
        == np.arange(12).reshape(4, 3).tolist()
    )
    told = reasons(coupling)
    assert "LayerNormalization) normalises over it" in told["0/o"] and told["head"].endswith("looks positions up")


def llama(heads=6, shared=2, size=4, inner=10):
    """A decoder layer: RMS norms, rotary positions, shared heads repeated by hand, a gated MLP."""
    net = Net(opset=24)
    width, words = heads * size, 5
    x = net.feed("x", "batch", words, width)
    h = net.put("RMSNormalization", x, net.noise(width))

    def split(one, many):
        return net.put("Transpose", net.put("Reshape", one, net.keep(np.int64([0, 0, many, size]))), perm=[0, 2, 1, 3])

    def turned(one):
        """Rotary positions in pieces: halves swapped, one of them negated."""
        low, high = net.put("Split", one, axis=3, num_outputs=2, outputs=2)
        other = net.put("Concat", net.put("Neg", high), low, axis=3)
        return net.put(
            "Add", net.put("Mul", one, net.noise(words, size)), net.put("Mul", other, net.noise(words, size))
        )

    def repeated(one):
        one = net.put(
            "Expand",
            net.put("Unsqueeze", one, net.keep(np.int64([2]))),
            net.keep(np.int64([2, shared, heads // shared, words, size])),
        )
        return net.put("Reshape", one, net.keep(np.int64([-1, heads, words, size])))

    q, k, v = (
        split(net.linear(name, h, width, many * size), many)
        for name, many in (("q", heads), ("k", shared), ("v", shared))
    )
    scores = net.put("MatMul", turned(q), net.put("Transpose", repeated(turned(k)), perm=[0, 1, 3, 2]))
    y = net.put("Transpose", net.put("MatMul", net.put("Softmax", scores), repeated(v)), perm=[0, 2, 1, 3])
    h = net.put("Add", x, net.linear("o", net.put("Reshape", y, net.keep(np.int64([0, 0, -1]))), width, width))
    n = net.put("RMSNormalization", h, net.noise(width))
    y = net.put("Mul", net.put("Swish", net.linear("gate", n, width, inner)), net.linear("up", n, width, inner))
    return net.built(net.put("Add", h, net.linear("down", y, inner, width)))


def test_shared_heads_go_with_all_that_share_them():
    coupling, after = proven(llama())
    assert described(coupling) == {"q": (2, "k q v", "o"), "gate": (10, "gate up", "down")}
    group = coupling.groups[0]
    made = {product.node: group.positions(*product.made)[1].tolist() for product in group.makers}
    assert made == {"q": list(range(12, 24)), "k": [4, 5, 6, 7], "v": [4, 5, 6, 7]}
    assert after.operator_counts()["Expand"] == 2


def test_every_layer_of_a_dense_block_is_a_group_read_by_all_behind():
    net = Net()
    h, width = net.conv("stem", net.feed("x", "batch", 3, 6, 6), 3, 6), 6
    for layer in "012":
        y = net.conv(layer, net.put("Relu", net.norm(h, width)), width, 4, 3)
        h, width = net.put("Concat", h, y, axis=1), width + 4
    coupling, _ = proven(net.built(net.conv("out", h, width, 5)))
    assert described(coupling) == {
        "stem": (6, "stem", "0 1 2 out"), "0": (4, "0", "1 2 out"), "1": (4, "1", "2 out"), "2": (4, "2", "out"),
    }  # fmt: skip


def test_shuffled_halves():
    """A ShuffleNet unit: half of the channels go by, the others through a depthwise convolution, then all are shuffled."""
    net = Net()
    h = net.conv("stem", net.feed("x", "batch", 3, 6, 6), 3, 8)
    by, h = net.put("Split", h, axis=1, num_outputs=2, outputs=2)
    h = net.conv("out", net.conv("deep", net.conv("in", h, 4, 6), 6, 6, 3, 6), 6, 4)
    h = net.put("Reshape", net.put("Concat", by, h, axis=1), net.keep(np.int64([0, 2, 4, 6, 6])))
    h = net.put("Reshape", net.put("Transpose", h, perm=[0, 2, 1, 3, 4]), net.keep(np.int64([0, 8, 6, 6])))
    coupling, _ = proven(net.built(net.conv("last", h, 8, 5)))
    # Both branches keep as many, channel by channel, so that the shuffle stays one.
    assert described(coupling) == {"stem": (4, "out stem", "last"), "in": (6, "in", "out"), "stem'": (4, "stem", "in")}
    first = coupling.groups[0]
    assert first.positions(*first.readers[0].read).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_shuffled_groups():
    """A ShuffleNet unit of the first kind: grouped convolutions with a shuffle between, which mustn't tie all to all."""
    net = Net()
    h = net.conv("a", net.feed("x", "batch", 3, 6, 6), 3, 12)
    h = net.put("Relu", net.conv("g1", h, 12, 12, 1, 3))
    h = net.put("Reshape", h, net.keep(np.int64([-1, 3, 4, 6, 6])))
    h = net.put("Reshape", net.put("Transpose", h, perm=[0, 2, 1, 3, 4]), net.keep(np.int64([-1, 12, 6, 6])))
    h = net.conv("d", h, 12, 12, 3, 12)
    coupling, _ = proven(net.built(net.conv("b", h, 12, 5)))
    assert described(coupling) == {"a": (4, "a", "g1"), "g1": (4, "g1", "b")}


def test_squeeze_and_excitation():
    net = Net()
    h = net.conv("a", net.feed("x", "batch", 3, 6, 6), 3, 8)
    s = net.conv("squeeze", net.put("ReduceMean", h, net.keep(np.int64([2, 3]))), 8, 3)
    s = net.put("Sigmoid", net.conv("excite", net.put("Relu", s), 3, 8))
    coupling, _ = proven(net.built(net.conv("b", net.put("Mul", h, s), 8, 4)))
    assert described(coupling) == {"a": (8, "a excite", "b squeeze"), "squeeze": (3, "squeeze", "excite")}


def test_a_class_token_and_positions():
    net = Net()
    h = net.conv("patches", net.feed("x", "batch", 3, 4, 4), 3, 8)
    h = net.put("Transpose", net.put("Reshape", h, net.keep(np.int64([0, 8, 16]))), perm=[0, 2, 1])
    batch = net.put("Shape", "x", end=1)
    token = net.put("Expand", net.noise(1, 1, 8), net.put("Concat", batch, net.keep(np.int64([1, 8])), axis=0))
    h = net.put("Add", net.put("Concat", token, h, axis=1), net.noise(1, 17, 8))
    h = net.linear("b", net.put("Gather", h, net.keep(np.int64(0)), axis=1), 8, 4)
    coupling, after = proven(net.built(h))
    assert described(coupling) == {"patches": (8, "patches", "b")}
    assert sorted(
        tuple(v.const_value.shape) for v in after.model.graph.initializers.values() if v.const_value.size > 70
    ) == [(1, 17, 5)]


def test_real_layers_between_normalizations():
    assert described(proven(conv_net())[0]) == {
        "/layer1/conv": (8, "/layer1/conv", "/layer2/conv"), "/layer2/conv": (8, "/layer2/conv", "/head"),
    }  # fmt: skip
    coupling = left_whole(transformer())
    assert reasons(coupling)["/q"] == "/norm (LayerNormalization) normalises over it"


def test_consistency_of_a_large_graph():
    """What holds for small ones: nothing in two groups, all names there."""
    net = Net()
    h = net.conv("stem", net.feed("x", "batch", 3, 4, 4), 3, 8)
    for layer in range(40):
        y = net.conv(f"{layer}/1", h, 8, 6, 3)
        h = net.put("Add", h, net.conv(f"{layer}/2", net.put("Relu", net.norm(y, 6)), 6, 8))
    artifact = net.built(net.conv("b", h, 8, 4))
    coupling = couple(artifact)
    consistent(artifact, coupling)
    assert len(coupling.groups) == 41 and len(coupling.groups[0].makers) == 41
    onnx.checker.check_model(ir.to_proto(cut_of(artifact, coupling, {coupling.groups[0]: [2]}).model), full_check=True)


# Weights --------------------------------------------------------------------------------------------------------------


def test_one_weight_of_two_products_ties_them():
    net = Net()
    w = net.noise(8, 8)
    h = net.put("Relu", net.linear("a", net.feed("x", "batch", 5), 5, 8))
    h = net.put("Relu", net.put("MatMul", h, w, name="m1"))
    coupling, after = proven(net.built(net.linear("b", net.put("MatMul", h, w, name="m2"), 8, 4)))
    assert described(coupling) == {"a": (8, "a m1 m2", "b m1 m2")}
    assert after.model.graph.initializers[w].const_value.shape == [5, 5]


def test_a_table_that_is_the_head_as_well():
    """Without a normalization behind it, the width of an embedding can be cut in both places at once."""
    net = Net()
    table = net.noise(9, 8)
    h = net.put("Gather", table, net.feed("ids", "batch", "words", dtype="int64"))
    h = net.put("Add", h, net.linear("down", net.put("Relu", net.linear("up", h, 8, 6)), 6, 8))
    coupling, after = proven(net.built(net.put("MatMul", h, net.put("Transpose", table, perm=[1, 0]), name="head")))
    assert described(coupling) == {"up": (6, "up", "down"), "down": (8, "down", "head up")}
    assert after.model.graph.initializers[table].const_value.shape == [9, 5]


def test_a_weight_that_is_added_somewhere_as_well():
    net = Net()
    w = net.noise(8, 6)
    h = net.put("Relu", net.linear("a", net.feed("x", 8, 5), 5, 8))
    h = net.put("Add", net.put("MatMul", h, w, name="m"), w)
    coupling, _ = proven(net.built(net.linear("b", h, 6, 4)))
    # The rows of what is added are the items of the batch, which the input has given.
    assert described(coupling) == {"m": (6, "m", "b")} and "it is an input" in reasons(coupling)["a"]


def fed_weights(**extra):
    """Two layers; `w` is an input of the model besides, with its stored value to fall back on."""
    nodes = [node("MatMul", "x w", "h", name="a"), node("Relu", "h", "r"), node("MatMul", "r v", "y", name="b")]
    return proto(
        nodes,
        extra.get("inputs", "x:float32[batch,6]"),
        extra.get("outputs", "y:float32[batch,4]"),
        {"w": weight(6, 8), "v": weight(8, 4)},
    )


def test_a_weight_that_may_be_fed_stays():
    """What multiplies by it is no product with a weight of its own, so that only the other product can be left."""
    found = {}
    for name, shape in (("w", "6,8"), ("v", "8,4")):
        made = fed_weights(inputs=f"x:float32[batch,6] {name}:float32[{shape}]")
        found[name] = couple(Artifact(model=ir.from_proto(made)))
    assert found["w"].groups == found["v"].groups == []
    assert reasons(found["w"]) == {"b": "it is an output of the model"}
    assert reasons(found["v"]) == {"a": "it is a weight that may be fed as an input of the model"}


def test_a_weight_that_is_an_output_stays():
    artifact = Artifact(model=ir.from_proto(fed_weights(outputs="y:float32[batch,4] v:float32[8,4]")))
    left_whole(artifact, "it is an output of the model")


def test_rows_of_a_table_stay():
    net = Net()
    table = net.put("Relu", net.linear("a", net.keep(weight(7, 5)), 5, 8))
    h = net.put("Gather", table, net.feed("ids", "batch", dtype="int64"))
    coupling, _ = proven(net.built(net.linear("b", h, 8, 4)))
    assert described(coupling) == {"a": (8, "a", "b")}


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("", "b"), ("a", "a"), ("", "")])
def test_products_need_names_of_their_own(names):
    nodes = [
        node("MatMul", "x w", "h", name=names[0]),
        node("Relu", "h", "r"),
        node("MatMul", "r v", "y", name=names[1]),
    ]
    artifact = build(nodes, "x:float32[batch,6]", "y:float32[batch,4]", {"w": weight(6, 8), "v": weight(8, 4)})
    with pytest.raises(PassError, match="told apart by their nodes' names"):
        couple(artifact)


def test_names_that_look_like_those_of_axes_inside():
    """Two attentions without names, and values called as what stands for their heads."""
    net = Net()
    x = net.feed("x", "batch", 5, 6)
    for layer in "01":
        q, k, v = (net.linear(f"{layer}{name}", x, 6, 12) for name in "qkv")
        y = net.put("Attention", q, k, v, q_num_heads=4, kv_num_heads=4)
        x = net.linear(f"{layer}o", y, 12, 6)
    for each in net.nodes:
        if each.op_type == "Attention":
            each.name = ""
    made = {each.op_type: each for each in net.nodes}
    clash = f"{made['Attention'].output[0]}#heads"
    last = net.put("Relu", x)
    for each in net.nodes:
        each.input[:] = [clash if name == x else name for name in each.input]
        each.output[:] = [clash if name == x else name for name in each.output]
    coupling, _ = proven(net.built(last))
    assert described(coupling) == {
        "0q": (4, "0k 0q 0v", "0o"),
        "1q": (4, "1k 1q 1v", "1o"),
        "0o": (6, "0o", "1k 1q 1v"),
    }


def test_outputs_that_are_left_out_are_not_one_value():
    nodes = [
        node("MatMul", "x w", "h", name="a"), node("Dropout", "h", "d "), node("MatMul", "x u", "g", name="c"),
        node("LayerNormalization", "g s", "n - i"), node("Mul", "n i", "m"), node("MatMul", "d v", "y", name="b"),
        node("MatMul", "m t", "z", name="d"),
    ]  # fmt: skip
    nodes[1].output.append("")
    nodes[3].output[1] = ""
    weights = {"w": weight(6, 8), "u": weight(6, 8), "s": weight(8), "v": weight(8, 4), "t": weight(8, 4)}
    coupling, _ = proven(build(nodes, "x:float32[batch,6]", "y:float32[batch,4] z:float32[batch,4]", weights))
    assert described(coupling) == {"a": (8, "a", "b")}


def test_parts_of_a_split_that_are_left_out():
    """They have no name, and so no length. ONNX Runtime doesn't take such a Split, so that nothing is run here."""
    net = Net()
    h = net.conv("a", net.feed("x", "batch", 3, 6, 6), 3, 9)
    parts = net.put("Split", h, net.keep(np.int64([2, 4, 3])), axis=1, outputs=3)
    net.nodes[-1].output[0] = net.nodes[-1].output[1] = ""
    coupling = couple(net.built(net.conv("b", parts[2], 3, 5)))
    assert coupling.groups == [] and reasons(coupling)["a"].endswith("(Split) leaves parts out")
