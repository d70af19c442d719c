"""Cutting what products make and read, and whole heads of attention."""

import numpy as np
import pytest
from couplings import WIDTH, Net, between, described, in_sequence, left_whole, proven
from models import weight

# Products -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attributes", [{}, {"kernel": 3}, {"strides": [2, 2]}, {"kernel": 3, "dilations": [2, 2]}])
def test_convolutions(attributes):
    coupling, _ = between(lambda net, h: net.conv("m", h, WIDTH, 6, bias=True, **attributes), 6)
    assert described(coupling) == {"a": (WIDTH, "a", "m"), "m": (6, "m", "b")}


def test_convolutions_in_one_and_three_dimensions():
    for rank in (1, 3):
        net = Net()
        x = net.feed("x", "batch", 3, *[5] * rank)
        h = net.put("Conv", x, net.noise(WIDTH, 3, *[3] * rank), net.noise(WIDTH), name="a")
        coupling, _ = proven(net.built(net.put("Conv", h, net.noise(4, WIDTH, *[2] * rank), name="b")))
        assert described(coupling) == {"a": (WIDTH, "a", "b")}


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_depthwise_convolutions(multiplier):
    coupling, after = between(
        lambda net, h: net.conv("d", h, WIDTH, WIDTH * multiplier, 3, WIDTH, bias=True), WIDTH * multiplier
    )
    assert described(coupling) == {"a": (WIDTH, "a", "b")}
    depthwise = next(n for n in after.model.graph if n.name == "d")
    assert depthwise.attributes.get_int("group") == 5 and depthwise.inputs[1].const_value.shape[0] == 5 * multiplier


@pytest.mark.parametrize(("group", "outs"), [(2, 8), (4, 8), (2, 12), (4, 4)])
def test_grouped_convolutions_lose_the_same_channel_of_each(group, outs):
    coupling, after = between(lambda net, h: net.conv("g", h, WIDTH, outs, 3, group, bias=True), outs)
    wanted = {"a": (WIDTH // group, "a", "g"), "g": (outs // group, "g", "b")}
    assert described(coupling) == {name: one for name, one in wanted.items() if one[0] > 1}
    assert next(n for n in after.model.graph if n.name == "g").attributes.get_int("group") == group


@pytest.mark.parametrize(("group", "each"), [(1, 6), (2, 3), (2, 4), (8, 1), (8, 2)])
def test_transposed_convolutions(group, each):
    def put(net, h):
        w, bias = net.noise(WIDTH, each, 3, 3), net.noise(each * group)
        return net.put("ConvTranspose", h, w, bias, group=group, strides=[2, 2], name="t")

    coupling, _ = between(put, group * each)
    inner = {"a": (WIDTH // group, "a", "t"), "t": (each, "t", "b")}
    assert described(coupling) == (inner if group < WIDTH else {"a": (WIDTH, "a", "b")})


def test_weights_that_are_calculated_keep_what_they_are_multiplied_with():
    net = Net()
    x = net.feed("x", 2, 6)
    a = net.linear("a", x, 6, WIDTH)
    both = net.put("MatMul", a, net.put("Transpose", net.linear("a2", x, 6, WIDTH)))
    left_whole(net.built(net.put("Relu", both)), "isn't multiplied by a plain weight")
    net = Net()
    h = net.conv("a", net.feed("x", "batch", 3, 6, 6), 3, WIDTH)
    left_whole(
        net.built(net.put("Conv", h, net.put("Relu", net.noise(4, WIDTH, 1, 1)), name="b")),
        "isn't multiplied by a plain weight",
    )


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("shape", [None, (6,), (1, 6), (1,), (), (2, 1), (2, 6)])
def test_gemm(turned, shape):
    net = Net()
    h = net.gemm("a", net.feed("x", 2, 5), 5, WIDTH)
    w = net.noise(6, WIDTH) if turned else net.noise(WIDTH, 6)
    extra = [] if shape is None else [net.noise(*shape)]
    h = net.put("Gemm", h, w, *extra, transB=turned, alpha=0.7, beta=0.3, name="m")
    coupling, _ = proven(net.built(net.gemm("b", h, 6, 4)))
    assert described(coupling) == {"a": (WIDTH, "a", "m"), "m": (6, "m", "b")}


def test_gemm_with_its_data_turned():
    net = Net()
    h = net.put("Transpose", net.gemm("a", net.feed("x", 2, 5), 5, WIDTH))
    h = net.put("Gemm", h, net.noise(WIDTH, 6), transA=1, name="m")
    coupling, _ = proven(net.built(net.gemm("b", h, 6, 4)))
    assert described(coupling) == {"a": (WIDTH, "a", "m"), "m": (6, "m", "b")}
    assert coupling.groups[0].readers[0].data == ("t2", 0)


@pytest.mark.parametrize(
    "steps", [["Transpose"], ["Transpose", "Cast"], ["Identity"], ["Cast", "Transpose", "Identity"]]
)
def test_weights_behind_a_transposition_or_a_cast(steps):
    def put(net, h):
        turned = "Transpose" in steps
        array = weight(6, WIDTH, seed=3) if turned else weight(WIDTH, 6, seed=3)
        w = net.keep(array.astype(np.float16) if "Cast" in steps else array)
        for step in steps:
            w = net.put(step, w, **({"to": 1} if step == "Cast" else {}))
        return net.put("MatMul", h, w, name="m")

    coupling, _ = in_sequence(put, 6)
    assert described(coupling) == {"a": (WIDTH, "a", "m"), "m": (6, "m", "b")}


@pytest.mark.parametrize(
    ("a", "b"), [((8,), (3, 8, 2)), ((3, 5, 8), (8,)), ((8,), (8, 2)), ((5, 8), (8,)), ((4, 1, 5, 8), (3, 8, 2))]
)
def test_matrix_products_of_vectors_and_batches_say_which_axes_are_the_same(a, b):
    """All is calculated from what a makes, of one axis of length 4 in front of others, which the product must not lose."""
    net = Net()
    h = net.linear("a", net.feed("x", 1, 6), 6, int(np.prod(a)))
    left = net.put("Reshape", h, net.keep(np.int64(a)))
    y = net.put("MatMul", left, net.noise(*b))
    y = net.put("Reshape", y, net.keep(np.int64([1, -1])))
    width = int(np.matmul(np.zeros(a), np.zeros(b)).size)
    proven(net.built(net.linear("b", y, width, 4)), moves=False)


def test_experts_in_one_batched_product():
    """[experts, batch, 6] · [experts, 6, 8]: experts go whole, the width inside stays."""
    net = Net()
    x = net.put("Unsqueeze", net.feed("x", 2, 6), net.keep(np.int64([0])))
    h = net.put("Relu", net.put("MatMul", x, net.noise(4, 6, 8), name="up"))
    h = net.put("Transpose", net.put("MatMul", h, net.noise(4, 8, 3), name="down"), perm=[1, 0, 2])
    h = net.put("Reshape", h, net.keep(np.int64([0, -1])))
    left_whole(net.built(net.linear("b", h, 12, 4)))


# Attention ------------------------------------------------------------------------------------------------------------


def projections(net, heads, shared, size, width=6, words=5):
    """x and its queries, keys and values as [batch, words, heads · size]."""
    x = net.feed("x", "batch", words, width)
    return [
        net.linear(name, x, width, many * size, bias=True)
        for name, many in (("q", heads), ("k", shared), ("v", shared))
    ]


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("rank", [3, 4])
def test_attention_as_one_operator(heads, shared, rank):
    net = Net()
    size = 4
    q, k, v = projections(net, heads, shared, size)
    if rank == 3:
        y = net.put("Attention", q, k, v, q_num_heads=heads, kv_num_heads=shared)
    else:
        split = [
            net.put("Reshape", one, net.keep(np.int64([0, 0, many, size])))
            for one, many in ((q, heads), (k, shared), (v, shared))
        ]
        y = net.put("Attention", *(net.put("Transpose", one, perm=[0, 2, 1, 3]) for one in split))
        y = net.put("Reshape", net.put("Transpose", y, perm=[0, 2, 1, 3]), net.keep(np.int64([0, 0, heads * size])))
    coupling, after = proven(net.built(net.linear("o", y, heads * size, 4)))
    many = shared if shared > 1 else heads
    assert described(coupling) == {"q": (many, "k q v" if shared > 1 else "q", "o")}
    attention = next(n for n in after.model.graph if n.op_type == "Attention")
    left = many - max(1, round(many * 0.4))
    if rank == 3:
        wanted = (heads // shared * left, left) if shared > 1 else (left, 1)
        assert tuple(attention.attributes.get_int(f"{side}_num_heads") for side in ("q", "kv")) == wanted


def test_attention_with_a_mask_of_its_own_for_every_head():
    net = Net()
    q, k, v = projections(net, 4, 4, 3)
    y = net.put("Attention", q, k, v, net.noise(1, 4, 5, 5), q_num_heads=4, kv_num_heads=4, is_causal=0)
    coupling, after = proven(net.built(net.linear("o", y, 12, 4)))
    assert described(coupling) == {"q": (4, "k q v", "o")}
    assert next(n for n in after.model.graph if n.op_type == "Attention").inputs[3].const_value.shape == [1, 2, 5, 5]


def test_attention_with_a_cache_keeps_its_heads():
    net = Net()
    q, k, v = projections(net, 4, 4, 3)
    past = [net.feed(name, "batch", 4, 2, 3) for name in ("pk", "pv")]
    y, *_ = net.put("Attention", q, k, v, None, *past, q_num_heads=4, kv_num_heads=4, outputs=3)
    left_whole(net.built(net.linear("o", y, 12, 4)), "has heads that can't be told")


@pytest.mark.parametrize("rank", [3, 4])
def test_rotary_embedding(rank):
    net = Net()
    heads, size, words = 4, 4, 5
    q, k, v = projections(net, heads, heads, size)
    tables = [net.noise(words, size // 2) for _ in range(2)]
    at = net.keep(np.tile(np.arange(words), (2, 1)))
    turned = []
    for one in (q, k):
        if rank == 4:
            one = net.put(
                "Transpose", net.put("Reshape", one, net.keep(np.int64([0, 0, heads, size]))), perm=[0, 2, 1, 3]
            )
        one = net.put("RotaryEmbedding", one, *tables, at, num_heads=heads)
        if rank == 4:
            one = net.put(
                "Reshape", net.put("Transpose", one, perm=[0, 2, 1, 3]), net.keep(np.int64([0, 0, heads * size]))
            )
        turned.append(one)
    y = net.put("Attention", *turned, v, q_num_heads=heads, kv_num_heads=heads)
    coupling, after = proven(net.built(net.linear("o", y, heads * size, 4)))
    assert described(coupling) == {"q": (heads, "k q v", "o")}
    assert [n.attributes.get_int("num_heads") for n in after.model.graph if n.op_type == "RotaryEmbedding"] == [2, 2]


def in_pieces(net, heads, shared, size, words=5):
    """Attention of products and a softmax; keys and values repeated as exporters do it."""
    q, k, v = projections(net, heads, shared, size, words=words)

    def split(one, many):
        return net.put("Transpose", net.put("Reshape", one, net.keep(np.int64([0, 0, many, size]))), perm=[0, 2, 1, 3])

    def repeated(one):
        if heads == shared:
            return one
        one = net.put("Unsqueeze", one, net.keep(np.int64([2])))
        one = net.put("Expand", one, net.keep(np.int64([1, 1, heads // shared, 1, 1])))
        return net.put("Reshape", one, net.keep(np.int64([0, heads, words, size])))

    q, k, v = split(q, heads), repeated(split(k, shared)), repeated(split(v, shared))
    scores = net.put("MatMul", q, net.put("Transpose", k, perm=[0, 1, 3, 2]))
    y = net.put("MatMul", net.put("Softmax", scores, axis=-1), v)
    return net.put("Reshape", net.put("Transpose", y, perm=[0, 2, 1, 3]), net.keep(np.int64([0, 0, -1])))


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (6, 3)])
def test_attention_in_pieces(heads, shared):
    net = Net()
    y = in_pieces(net, heads, shared, 4)
    coupling, _ = proven(net.built(net.linear("o", y, heads * 4, 4)))
    assert described(coupling) == {"q": (shared, "k q v", "o")}


@pytest.mark.parametrize("apart", ["Gather", "Split"])
def test_queries_keys_and_values_of_one_product(apart):
    net = Net()
    h = net.linear("qkv", net.feed("x", "batch", 5, 6), 6, 3 * 4 * 3, bias=True)
    h = net.put("Transpose", net.put("Reshape", h, net.keep(np.int64([0, 0, 3, 4, 3]))), perm=[2, 0, 3, 1, 4])
    if apart == "Gather":
        q, k, v = (net.put("Gather", h, net.keep(np.int64(n))) for n in range(3))
    else:
        q, k, v = (
            net.put("Squeeze", one, net.keep(np.int64([0]))) for one in net.put("Split", h, num_outputs=3, outputs=3)
        )
    scores = net.put("Softmax", net.put("MatMul", q, net.put("Transpose", k, perm=[0, 1, 3, 2])))
    y = net.put("Transpose", net.put("MatMul", scores, v), perm=[0, 2, 1, 3])
    coupling, _ = proven(net.built(net.linear("o", net.put("Reshape", y, net.keep(np.int64([0, 0, 12]))), 12, 4)))
    assert described(coupling) == {"qkv": (4, "qkv", "o")}
    assert coupling.groups[0].positions("w0", 1)[1].tolist() == [12 * n + 3 + d for n in range(3) for d in range(3)]


def test_einsum():
    net = Net()
    q, k, v = (net.put("Reshape", one, net.keep(np.int64([0, 0, 4, 3]))) for one in projections(net, 4, 4, 3))
    scores = net.put("Softmax", net.put("Einsum", q, k, equation="b q h d, b k h d -> b h q k"))
    y = net.put("Reshape", net.put("Einsum", scores, v, equation="bhqk,bkhd->bqhd"), net.keep(np.int64([0, 0, 12])))
    coupling, _ = proven(net.built(net.linear("o", y, 12, 4)))
    assert described(coupling) == {"q": (4, "k q v", "o")}


@pytest.mark.parametrize("equation", ["...d,de->...e", "bsd,de", "bsd,de->bse"])
def test_einsum_with_a_weight_or_letters_left_out(equation):
    net = Net()
    h = net.linear("a", net.feed("x", "batch", 5, 6), 6, WIDTH)
    left_whole(net.built(net.put("Einsum", h, net.noise(WIDTH, 4), equation=equation)), "Einsum")
