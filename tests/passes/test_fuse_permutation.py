"""`fuse-permutation`: Swin's shifts, windows and patch merging, any chain that moves vectors, and what is none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node, outputs, run_twice

from perwatt.passes.fuse_permutation import FusePermutation

B, H, W, C, CUT = "batch", 6, 4, 16, 2


class Chain:
    """Nodes one after the other, between two that move nothing; `now` is the shape behind the first axis."""

    def __init__(self, *inner, batch=B):
        self.nodes, self.weights, self.batch = [node("Relu", "x", "v0")], {}, batch
        self.given = self.now = list(inner)

    @property
    def value(self):
        return self.nodes[-1].output[0]

    def add(self, kind, inputs, now, weights=None, **attributes):
        self.weights |= {name: np.int64(array) for name, array in (weights or {}).items()}
        self.nodes.append(node(kind, inputs, f"v{len(self.nodes)}", **attributes))
        self.now = list(now)
        return self

    def named(self, what):
        return f"{what}{len(self.nodes)}"

    def reshape(self, *inner, first=-1):
        return self.add("Reshape", f"{self.value} {self.named('s')}", inner, {self.named("s"): [first, *inner]})

    def transpose(self, *perm):
        now = [self.batch, *self.now]
        return self.add("Transpose", self.value, [now[axis] for axis in perm[1:]], perm=list(perm))

    def roll(self, axis, by):
        """As torch exports it: the rest first, then the beginning."""
        source, now, length = self.value, self.now, self.now[axis - 1]
        for begin, end in ((by, length), (0, by)):
            names = [self.named(what) for what in "bea"]
            weights = dict(zip(names, ([begin], [end], [axis]), strict=True))
            self.add("Slice", f"{source} {' '.join(names)}", now, weights)
        late = self.nodes[-2].output[0]
        return self.add("Concat", f"{late} {self.value}", now, axis=axis)

    def artifact(self, extra=()):
        given = f"float32[{','.join(map(str, [self.batch, *self.given]))}]"
        inner = [f"{name}:{given}" for name in ("v0", *(each.input[0] for each in extra))]
        nodes = [*self.nodes, node("Relu", self.value, "y"), *extra]
        # What comes of the chain has a batch of its own where windows were put into it.
        specs = f"x:{given}"
        inner.append(f"{self.value}:float32[{','.join(map(str, ['?', *self.now]))}]")
        outs = [f"y:float32[{','.join(map(str, ['?', *self.now]))}]", *(f"{each.output[0]}:{given}" for each in extra)]
        return build(nodes, specs, " ".join(outs), self.weights, inner=" ".join(inner))


def fused(artifact, gathers=1, **sizes):
    after, changes = run_twice(FusePermutation(), artifact)
    batch = feed(artifact, **sizes)
    np.testing.assert_array_equal(outputs(after, batch)["y"], outputs(artifact, batch)["y"])
    counts = after.operator_counts()
    assert counts.get("Gather", 0) == gathers and not {"Transpose", "Concat", "Slice"} & set(counts)
    assert changes == ["1 permutations put into one Gather"]
    return after


def left(artifact):
    after, changes = run_twice(FusePermutation(), artifact)
    assert after is artifact and changes == []


def windows(chain):
    """[B, H, W, C] to [B · windows, tokens, C]."""
    return chain.reshape(H // CUT, CUT, W // CUT, CUT, C).transpose(0, 1, 3, 2, 4, 5).reshape(CUT * CUT, C)


def test_shift_and_windows(golden_pass):
    before = windows(Chain(H * W, C).reshape(H, W, C).roll(1, 1).roll(2, 1)).artifact()
    after, changes = run_twice(FusePermutation(), before)
    golden_pass("fuse_permutation", before, after, changes)
    assert fused(before).operator_counts() == {"Relu": 2, "Gather": 1, "Reshape": 1}


@pytest.mark.parametrize("batch", [B, 6, 12])
def test_windows_back_and_shift_back(batch):
    """The first axis has the windows: how many belong to a picture, only the other side says."""
    chain = Chain(CUT * CUT, C, batch=batch).reshape(H // CUT, W // CUT, CUT, CUT, C).transpose(0, 1, 3, 2, 4, 5)
    before = chain.reshape(H, W, C).roll(1, H - 1).roll(2, W - 1).reshape(H * W, C).artifact()
    fused(before, batch=12)


def test_patch_merging():
    chain = Chain(H, W, C)
    source, parts = chain.value, []
    for row, column in ((0, 0), (1, 0), (0, 1), (1, 1)):
        for axis, begin in ((1, row), (2, column)):
            names = [chain.named(what) for what in "beat"]
            weights = dict(zip(names, ([begin], [2**63 - 1], [axis], [2]), strict=True))
            taken = source if axis == 1 else chain.value
            chain.add("Slice", f"{taken} {' '.join(names)}", chain.now, weights)
        parts.append(chain.value)
    chain.add("Concat", " ".join(parts), (H // 2, W // 2, 4 * C), axis=-1)
    after = fused(chain.reshape(H * W // 4, 4 * C).artifact())
    assert after.operator_counts()["Reshape"] == 2


def test_two_transposes_that_undo_each_other_take_no_gather():
    chain = Chain(H, W, C).transpose(0, 2, 1, 3).reshape(W, H, C).transpose(0, 2, 1, 3)
    after = fused(chain.artifact(), gathers=0)
    assert after.operator_counts() == {"Relu": 2}


@given(data=st.data())
def test_any_chain_that_moves_whole_vectors(data):
    chain = Chain(2, 3, 4, C)
    for _ in range(data.draw(st.integers(2, 4))):
        rank = len(chain.now) + 1
        if data.draw(st.booleans()):
            chain.transpose(0, *data.draw(st.permutations(range(1, rank - 1))), rank - 1)
        else:
            axis = data.draw(st.sampled_from([axis for axis in range(1, rank - 1)]))
            length = chain.now[axis - 1]
            chain.roll(axis, data.draw(st.integers(1, length - 1)))
        if data.draw(st.booleans()):
            chain.reshape(*data.draw(st.sampled_from([(24, C), (4, 6, C), (2, 3, 4, C), (3, 2, 2, 2, C)])))
    artifact = chain.artifact()
    after, changes = run_twice(FusePermutation(), artifact)
    assert changes == ["1 permutations put into one Gather"]
    batch = feed(artifact)
    np.testing.assert_array_equal(outputs(after, batch)["y"], outputs(artifact, batch)["y"])


def test_a_value_that_others_use_is_where_a_chain_begins():
    """The shortcut around a block starts from what is shifted behind it."""
    chain = Chain(H * W, C).transpose(0, 2, 1).transpose(0, 2, 1)
    used = chain.value
    before = windows(chain.reshape(H, W, C).roll(1, 1)).artifact([node("Neg", used, "z")])
    after, changes = run_twice(FusePermutation(), before)
    assert changes == ["2 permutations put into one Gather"]
    batch = feed(before)
    for name in ("y", "z"):
        np.testing.assert_array_equal(outputs(after, batch)[name], outputs(before, batch)[name])


@pytest.mark.parametrize(
    "chain",
    [
        Chain(H, W, C).transpose(0, 2, 1, 3).reshape(W * H, C),
        Chain(H, W, C).transpose(0, 1, 3, 2).transpose(0, 2, 1, 3),
        Chain(H, W, 8).transpose(0, 2, 1, 3).roll(1, 1),
        Chain(H, W, C, batch=5).transpose(1, 0, 2, 3).transpose(0, 2, 1, 3),
        Chain("h", W, C).roll(2, 1).transpose(0, 2, 1, 3),
    ],
    ids=["one transpose", "vectors taken apart", "short vectors", "the batch mixed", "an open length"],
)
def test_what_is_left(chain):
    left(chain.artifact())


def test_what_is_repeated_or_left_out_is_no_permutation():
    chain = Chain(H, W, C)
    source = chain.value
    chain.add("Concat", f"{source} {source}", (2 * H, W, C), axis=1).transpose(0, 2, 1, 3)
    left(chain.artifact())
    chain = Chain(H, W, C).transpose(0, 2, 1, 3)
    names = [chain.named(what) for what in "bea"]
    chain.add(
        "Slice", f"{chain.value} {' '.join(names)}", (W - 1, H, C), dict(zip(names, ([1], [W], [1]), strict=True))
    )
    left(chain.transpose(0, 2, 1, 3).artifact())
