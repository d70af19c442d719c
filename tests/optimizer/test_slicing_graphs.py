"""Random graphs of many kinds of blocks: what is cut equals what nobody reads, or is left and named."""

import numpy as np
from couplings import Net, proven
from hypothesis import given, settings
from hypothesis import strategies as st


class Growing(Net):
    """A random network over pictures or words: what it ends with is `h`, of `width` channels."""

    def __init__(self, draw):
        super().__init__(opset=24)
        self.draw, self.count = draw, 0

    def some(self, low, high):
        return self.draw(st.integers(low, high))

    def name(self):
        self.count += 1
        return f"p{self.count}"

    def activated(self, h):
        operator = self.draw(st.sampled_from(["Relu", "Sigmoid", "HardSwish", "Neg", "Swish", None]))
        return self.put(operator, h) if operator else h

    # Pictures

    def normed(self, h, width):
        return self.norm(h, width) if self.draw(st.booleans()) else self.put("Add", h, self.noise(width, 1, 1))

    def residual(self, h, width):
        inner = self.some(1, 9)
        y = self.activated(self.normed(self.conv(self.name(), h, width, inner, 3), inner))
        return self.put("Add", h, self.conv(self.name(), y, inner, width)), width

    def option_a(self, h, width):
        before, after = self.some(0, 2), self.some(0, 3)
        every = [self.keep(np.int64(one)) for one in ([0, 0], [2**63 - 1] * 2, [2, 3], [1, 1])]
        short = self.put("Pad", self.put("Slice", h, *every), self.keep(np.int64([0, before, 0, 0, 0, after, 0, 0])))
        more = width + before + after
        return self.put("Add", short, self.conv(self.name(), h, width, more, 3)), more

    def dense(self, h, width):
        grown = self.some(1, 5)
        return self.put("Concat", h, self.activated(self.conv(self.name(), h, width, grown, 3)), axis=1), width + grown

    def parts(self, h, width):
        if width < 2:
            return h, width
        first = self.some(1, width - 1)
        one, two = self.put("Split", h, self.keep(np.int64([first, width - first])), axis=1, outputs=2)
        outs = self.some(1, 6)
        one = self.conv(self.name(), one, first, outs)
        return self.put(
            "Concat", *((one, two) if self.draw(st.booleans()) else (two, one)), axis=1
        ), width - first + outs

    def grouped(self, h, width):
        groups = self.draw(st.sampled_from([n for n in range(1, width + 1) if width % n == 0]))
        outs = groups * self.some(1, 3)
        return self.conv(self.name(), h, width, outs, 3, groups, bias=True), outs

    def shuffled(self, h, width):
        groups = self.draw(st.sampled_from([n for n in range(1, width + 1) if width % n == 0]))
        h = self.put("Reshape", h, self.keep(np.int64([0, groups, width // groups, 4, 4])))
        h = self.put("Transpose", h, perm=[0, 2, 1, 3, 4])
        return self.put("Reshape", h, self.keep(np.int64([0, self.draw(st.sampled_from([-1, width])), 4, 4]))), width

    def excited(self, h, width):
        inner = self.some(1, 4)
        s = self.put("GlobalAveragePool", h)
        s = self.put("Relu", self.conv(self.name(), s, width, inner))
        return self.put("Mul", h, self.put("Sigmoid", self.conv(self.name(), s, inner, width))), width

    def picked(self, h, width):
        indices = self.draw(st.lists(st.integers(-width, width - 1), min_size=1, max_size=width + 2))
        return self.put("Gather", h, self.keep(np.int64(indices)), axis=1), len(indices)

    def sliced(self, h, width):
        start = self.some(-width, width - 1)
        end = self.some(start % width + 1, width)
        return self.put("Slice", h, *(self.keep(np.int64([n])) for n in (start, end, 1))), end - start % width

    def transposed(self, h, width):
        groups = self.draw(st.sampled_from([n for n in range(1, width + 1) if width % n == 0]))
        each = self.some(1, 3)
        return self.put(
            "ConvTranspose", h, self.noise(width, each, 1, 1), group=groups, name=self.name()
        ), groups * each

    def branched(self, h, width):
        sizes = [self.some(1, 4) for _ in range(self.some(2, 3))]
        branches = [self.activated(self.conv(self.name(), h, width, size)) for size in sizes]
        return self.put("Concat", *branches, axis=1), sum(sizes)

    def channels_last(self, h, width):
        """An inverted bottleneck of linear layers, as in ConvNeXt."""
        inner = self.some(1, 8)
        y = self.put("Transpose", h, perm=[0, 2, 3, 1])
        y = self.linear_(self.activated(self.linear_(y, width, inner)), inner, width)
        return self.put(
            "Add", h, self.put("Transpose", self.put("Mul", y, self.noise(width)), perm=[0, 3, 1, 2])
        ), width

    def pooled(self, h, width):
        return self.put("AveragePool", h, kernel_shape=[3, 3], pads=[1, 1, 1, 1]), width

    def classified(self, h, width):
        ways = self.draw(st.sampled_from(["pool", "flatten", "last", "batch"]))
        if ways == "pool":
            h = self.put("Flatten", self.put("GlobalAveragePool", h))
        elif ways == "last":
            h = self.put("Reshape", self.put("Transpose", h, perm=[0, 2, 3, 1]), self.keep(np.int64([-1, 16 * width])))
        elif ways == "flatten":
            h = self.put("Flatten", h)
        else:
            batch = self.put("Shape", "x", end=1)
            h = self.put("Reshape", h, self.put("Concat", batch, self.keep(np.int64([16 * width])), axis=0))
        return self.gemm(self.name(), h, width if ways == "pool" else 16 * width, 3)

    # Words

    def linear_(self, h, ins, outs):
        return self.linear(self.name(), h, ins, outs, bias=self.draw(st.booleans()))

    def mlp(self, h, width):
        inner = self.some(1, 9)
        return self.put("Add", h, self.linear_(self.activated(self.linear_(h, width, inner)), inner, width)), width

    def gated(self, h, width):
        inner = self.some(1, 5)
        if self.draw(st.booleans()):
            both = self.linear_(h, width, 2 * inner)
            gate, up = self.put("Split", both, axis=-1, num_outputs=2, outputs=2)
        else:
            gate, up = (self.linear_(h, width, inner) for _ in range(2))
        y = self.linear_(self.put("Mul", self.put("Swish", gate), up), inner, width)
        return self.put(
            "Add", self.put("RMSNormalization", h, self.noise(width)) if self.draw(st.booleans()) else h, y
        ), width

    def projected(self, h, width):
        outs = self.some(1, 8)
        return self.activated(self.linear_(h, width, outs)), outs

    def attended(self, h, width):
        shared, each, size = self.some(1, 3), self.some(1, 3), self.some(1, 3)
        heads = shared * each
        q, k, v = (self.linear_(h, width, many * size) for many in (heads, shared, shared))
        if self.draw(st.booleans()):
            y = self.put("Attention", q, k, v, q_num_heads=heads, kv_num_heads=shared)
        else:
            y = self.by_hand(q, k, v, heads, shared, size)
        return self.put("Add", h, self.linear_(y, heads * size, width)), width

    def by_hand(self, q, k, v, heads, shared, size):
        def split(one, many):
            return self.put(
                "Transpose", self.put("Reshape", one, self.keep(np.int64([0, 0, many, size]))), perm=[0, 2, 1, 3]
            )

        q, k, v = (split(one, many) for one, many in ((q, heads), (k, shared), (v, shared)))
        if heads > shared:
            k, v = (
                self.put(
                    "Reshape",
                    self.put(
                        "Expand",
                        self.put("Unsqueeze", one, self.keep(np.int64([2]))),
                        self.keep(np.int64([heads // shared, 1, 1])),
                    ),
                    self.keep(np.int64([0, heads, 4, size])),
                )
                for one in (k, v)
            )
        scores = self.put("Softmax", self.put("MatMul", q, self.put("Transpose", k, perm=[0, 1, 3, 2])))
        y = self.put("Transpose", self.put("MatMul", scores, v), perm=[0, 2, 1, 3])
        return self.put("Reshape", y, self.keep(np.int64([0, 0, heads * size])))


@st.composite
def pictures(draw):
    net = Growing(draw)
    width = net.some(1, 10)
    h = net.conv(net.name(), net.feed("x", "batch", 3, 4, 4), 3, width, 3)
    blocks = [
        net.residual, net.option_a, net.dense, net.parts, net.grouped, net.shuffled, net.excited, net.picked, net.sliced,
        net.pooled, net.transposed, net.branched, net.channels_last,
    ]  # fmt: skip
    for _ in range(net.some(1, 6)):
        h, width = draw(st.sampled_from(blocks))(h, width)
    return net.built(net.classified(h, width))


@st.composite
def sentences(draw):
    net = Growing(draw)
    width = net.some(1, 8)
    h = net.linear(net.name(), net.feed("x", "batch", 4, 5), 5, width)
    for _ in range(net.some(1, 5)):
        h, width = draw(st.sampled_from([net.mlp, net.gated, net.projected, net.attended]))(h, width)
    return net.built(net.linear(net.name(), h, width, 3))


@settings(max_examples=40, deadline=None)
@given(st.one_of(pictures(), sentences()), st.floats(0.1, 0.9), st.integers(0, 9))
def test_random_graphs(artifact, share, seed):
    coupling, after = proven(artifact, share, seed, moves=False, tolerance=1e-4)
    for product in coupling.products:
        if product.made in coupling.lengths():
            covered = sum(at.size for group in coupling.groups if (at := group.positions(*product.made)) is not None)
            assert covered == coupling.lengths()[product.made] or coupling.left, "what isn't in a group is named"
    proven(after, share, seed + 1, moves=False, tolerance=1e-4)
