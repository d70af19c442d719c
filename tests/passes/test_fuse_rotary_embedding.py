"""`fuse-rotary-embedding`: halves and pairs, angles from everywhere, and what only looks like one."""

from dataclasses import replace

import attentions
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import ask, context, node, outputs, run_twice

from perwatt.contract import Capabilities
from perwatt.drift import drift
from perwatt.passes.fuse_rotary_embedding import FuseRotaryEmbedding

HEADS, S = 3, 5


class Net(attentions.Net):
    """With operators of several outputs, and heads of `depth` that come first or `last`."""

    def __init__(self, depth=8, last=False, dtype="float32"):
        super().__init__(dtype)
        self.depth, self.last = depth, last
        self.shape = ("batch", S, HEADS, depth) if last else ("batch", HEADS, S, depth)

    def put(self, operator, inputs, outs=1, **attributes):
        if outs == 1:
            return super().put(operator, inputs, **attributes)
        names = [f"t{self.count + place}" for place in range(1, outs + 1)]
        self.count += outs
        self.nodes.append(node(operator, inputs, " ".join(names), **attributes))
        return names

    def cut(self, x, start, end, step=1):
        bounds = (self.keep(np.int64([n])) for n in (start, end, -1, step))
        return self.put("Slice", f"{x} {' '.join(bounds)}")

    def built(self, shape=None, opset=23, infer=True):
        made = self.plain(shape or self.shape, opset)
        return attentions.inferred(made) if infer else made


def pieces(net, x, interleaved, way="slice"):
    """Both numbers of each pair of x."""
    depth, half = net.depth, net.depth // 2
    if way == "picked":
        pairs = net.put("Reshape", f"{x} {net.keep(np.int64([0, 0, 0, half, 2]))}")
        return [net.put("Gather", f"{pairs} {net.keep(np.int64(place))}", axis=-1) for place in (0, 1)]
    if interleaved:
        return net.cut(x, 0, depth, 2), net.cut(x, 1, depth if way == "slice" else 1 << 62, 2)
    if way == "split":
        return net.put("Split", x, outs=2, axis=-1, num_outputs=2)
    return net.cut(x, 0, half), net.cut(x, half, depth if way == "slice" else (1 << 63) - 1)


def stacked(net, first, second, interleaved):
    """Two halves side by side, or in turn."""
    if not interleaved:
        return net.put("Concat", f"{first} {second}", axis=-1)
    last = net.keep(np.int64([-1]))
    both = net.put(
        "Concat", f"{net.put('Unsqueeze', f'{first} {last}')} {net.put('Unsqueeze', f'{second} {last}')}", axis=-1
    )
    return net.put("Reshape", f"{both} {net.keep(np.int64([0, 0, 0, net.depth]))}")


def table(net, kind, interleaved, full=True, rows=S, agree=True):
    """Cosines or sines for each row: [rows, depth] where both numbers of a pair have theirs."""
    angles = np.random.default_rng(4).uniform(0, 6, (rows, net.depth // 2))
    if full:
        angles = np.repeat(angles, 2, -1) if interleaved else np.concatenate([angles, angles], -1)
        angles[-1, -1] += 0 if agree else 0.01
    return {"cos": np.cos, "sin": np.sin}[kind](angles).astype(np.float32)


def stored(net, kind, interleaved, rank=4, **options):
    found = table(net, kind, interleaved, **options)
    if net.last:
        return net.keep(found[None, :, None])
    return net.keep(found.reshape((1,) * (rank - 2) + found.shape))


def turned(net, x, cos, sin, interleaved, way="slice", flip=False, minus="Neg"):
    """x · cos + rotated · sin."""
    first, second = pieces(net, x, interleaved, way)
    negated = net.put("Neg", second) if minus == "Neg" else net.put("Mul", f"{second} {net.keep(np.float32([-1]))}")
    rotated = stacked(net, negated, first, interleaved)
    parts = [net.put("Mul", f"{x} {cos}"), net.put("Mul", f"{sin} {rotated}" if flip else f"{rotated} {sin}")]
    return net.put("Add", " ".join(parts[::-1] if flip else parts))


def explicit(net, x, cos, sin, interleaved, way="slice", flip=False):
    """Both numbers by themselves: a·cos − b·sin, b·cos + a·sin."""
    first, second = pieces(net, x, interleaved, way)

    def times(one, other):
        return net.put("Mul", f"{other} {one}" if flip else f"{one} {other}")

    real = net.put("Sub", f"{times(first, cos)} {times(second, sin)}")
    parts = [times(second, cos), times(first, sin)]
    return stacked(net, real, net.put("Add", " ".join(parts[::-1] if flip else parts)), interleaved)


def fed(artifact, batch=2, seed=0):
    random, values = np.random.default_rng(seed), {}
    for spec in artifact.signature.inputs:
        shape = [d if isinstance(d, int) else batch for d in spec.shape]
        whole = np.issubdtype(np.dtype(spec.dtype), np.integer)
        values[spec.name] = random.integers(0, 9, shape) if whole else random.standard_normal(shape).astype(spec.dtype)
    return values


def fused(artifact, times=1):
    after, changes = run_twice(FuseRotaryEmbedding(), artifact)
    assert after.operator_counts().get("RotaryEmbedding") == times, changes
    for batch in (1, 2, 3):
        values = fed(artifact, batch, batch)
        told = drift([outputs(artifact, values)], [outputs(after, values)], FuseRotaryEmbedding.tolerance)
        assert not told.reasons, told.reasons
    return after, changes


def left(artifact, reason):
    after, changes = run_twice(FuseRotaryEmbedding(), artifact)
    assert after is artifact
    assert [change for change in changes if reason in change] if reason else changes == []


def simple(interleaved=False, **options):
    net = Net(**{key: options.pop(key) for key in ("depth", "last", "dtype") if key in options})
    x = net.feed("x", *net.shape)
    cos, sin = (stored(net, kind, interleaved, **options) for kind in ("cos", "sin"))
    turned(net, x, cos, sin, interleaved)
    return net.built()


def test_the_form_of_transformers(golden_pass):
    before = simple()
    after, changes = fused(before)
    golden_pass("fuse_rotary_embedding", before, after, changes)
    assert after.operator_counts() == {"Shape": 1, "Concat": 1, "Expand": 2, "RotaryEmbedding": 1}


@given(
    interleaved=st.booleans(), last=st.booleans(), whole=st.booleans(), flip=st.booleans(),
    way=st.sampled_from(["slice", "far end", "split", "picked"]), minus=st.sampled_from(["Neg", "Mul"]),
    depth=st.sampled_from([2, 4, 6, 10]),
)  # fmt: skip
def test_every_form_with_stored_angles(interleaved, last, whole, flip, way, minus, depth):
    if (way == "split" and interleaved) or (way == "picked" and not interleaved):
        way = "slice"
    net = Net(depth, last)
    x = net.feed("x", *net.shape)
    cos, sin = (stored(net, kind, interleaved, full=whole) for kind in ("cos", "sin"))
    if whole:
        turned(net, x, cos, sin, interleaved, way, flip, minus)
    else:
        explicit(net, x, cos, sin, interleaved, way, flip)
    before = net.built()
    after, _ = fused(before)
    assert sum(after.operator_counts().values()) <= sum(before.operator_counts().values())


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_stored_angles_of_any_rank(rank):
    fused(simple(rank=rank))


def computed(net, kind, interleaved, frequencies, positions):
    """Angles from position ids, as Llama computes them: [items, 1, positions, depth]."""
    each = net.put("Mul", f"{positions} {frequencies}")
    if interleaved:
        last = net.put("Unsqueeze", f"{each} {net.keep(np.int64([-1]))}")
        twice = net.put("Expand", f"{last} {net.keep(np.int64([1, 1, 1, 2]))}")
        both = net.put("Reshape", f"{twice} {net.keep(np.int64([0, 0, net.depth]))}")
    else:
        both = net.put("Concat", f"{each} {each}", axis=-1)
    angle = net.put("Mul", f"{net.put('Cos' if kind == 'cos' else 'Sin', both)} {net.keep(np.float32(1))}")
    return net.put("Unsqueeze", f"{angle} {net.keep(np.int64([2 if net.last else 1]))}")


@pytest.mark.parametrize("items", ["batch", 1])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_computed_angles_are_halved_where_both_numbers_share_them(interleaved, last, items):
    net = Net(8, last)
    x = net.feed("x", *net.shape)
    ids = net.feed("ids", items, S, 1)
    frequencies = net.keep(np.float32([1, 0.3, 0.1, 0.03]))
    cos, sin = (computed(net, kind, interleaved, frequencies, ids) for kind in ("cos", "sin"))
    turned(net, x, cos, sin, interleaved)
    after, _ = fused(net.built())
    assert after.operator_counts()["Slice"] == 2


@pytest.mark.parametrize("interleaved", [False, True])
def test_position_ids_look_up_a_table(interleaved):
    net = Net()
    x, ids = net.feed("x", *net.shape), net.feed("ids", "batch", S, dtype="int64")
    one = net.keep(np.int64([1]))
    cos, sin = (
        net.put("Unsqueeze", f"{net.put('Gather', f'{net.keep(table(net, kind, interleaved, rows=9))} {ids}')} {one}")
        for kind in ("cos", "sin")
    )
    turned(net, x, cos, sin, interleaved)
    after, _ = fused(net.built())
    assert after.operator_counts() == {"RotaryEmbedding": 1}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("part", [2, 4])
def test_a_part_of_each_head(part, interleaved):
    net = Net(part)
    whole = net.feed("x", "batch", HEADS, S, 8)
    x, rest = net.cut(whole, 0, part), net.cut(whole, part, 8)
    cos, sin = (stored(net, kind, interleaved) for kind in ("cos", "sin"))
    net.put("Concat", f"{turned(net, x, cos, sin, interleaved)} {rest}", axis=-1)
    after, _ = fused(net.built(("batch", HEADS, S, 8)))
    counts = after.operator_counts()
    assert "Slice" not in counts
    turn = next(each for each in after.model.graph if each.op_type == "RotaryEmbedding")
    assert turn.attributes.get_int("rotary_embedding_dim", 0) == part


@pytest.mark.parametrize("wrong", ["overlap", "other source", "turned at the end"])
def test_other_ends_are_put_behind(wrong):
    net = Net(4)
    whole = net.feed("x", "batch", HEADS, S, 8)
    x = net.cut(whole, 4, 8) if wrong == "turned at the end" else net.cut(whole, 0, 4)
    other = net.feed("z", "batch", HEADS, S, 8) if wrong == "other source" else whole
    start = {"overlap": 3, "turned at the end": 0}.get(wrong, 4)
    rest = net.cut(other, start, start + 4)
    cos, sin = (stored(net, kind, False) for kind in ("cos", "sin"))
    net.put("Concat", f"{turned(net, x, cos, sin, False)} {rest}", axis=-1)
    after, _ = fused(net.built(("batch", HEADS, S, 8)))
    assert after.operator_counts()["Concat"] == 2


def test_tables_are_made_once_for_all_layers():
    net = Net()
    x = net.feed("x", *net.shape)
    cos, sin = (stored(net, kind, False) for kind in ("cos", "sin"))
    for _ in range(3):
        x = turned(net, x, cos, sin, False)
    after, _ = fused(net.built(), 3)
    assert after.operator_counts() == {"Shape": 1, "Concat": 1, "Expand": 2, "RotaryEmbedding": 3}


def test_a_fixed_batch_needs_no_shape():
    net = Net()
    net.shape = (2, HEADS, S, 8)
    x = net.feed("x", *net.shape)
    cos, sin = (stored(net, kind, False) for kind in ("cos", "sin"))
    turned(net, x, cos, sin, False)
    after, _ = run_twice(FuseRotaryEmbedding(), before := net.built())
    assert after.operator_counts() == {"Expand": 2, "RotaryEmbedding": 1}
    np.testing.assert_allclose(outputs(after, fed(before))["y"], outputs(before, fed(before))["y"], atol=1e-5)


def test_angles_that_differ_within_a_pair_stay():
    left(simple(agree=False), "different angles")
    left(simple(interleaved=True, agree=False), "different angles")


def test_pairs_of_one_kind_with_angles_of_the_other_stay():
    net = Net()
    x = net.feed("x", *net.shape)
    cos, sin = (stored(net, kind, True) for kind in ("cos", "sin"))
    turned(net, x, cos, sin, False)
    left(net.built(), "different angles")


@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_that_are_fed_stay(interleaved):
    net = Net()
    x = net.feed("x", *net.shape)
    cos, sin = (net.feed(kind, "batch", 1, S, 8) for kind in ("cos", "sin"))
    turned(net, x, cos, sin, interleaved)
    left(net.built(), "aren't known to be turned by the same angle")


def test_explicit_angles_may_be_fed():
    net = Net()
    x = net.feed("x", *net.shape)
    cos, sin = (net.feed(kind, "batch", 1, S, 4) for kind in ("cos", "sin"))
    explicit(net, x, cos, sin, False)
    after, _ = fused(net.built())
    assert after.operator_counts() == {"Squeeze": 2, "RotaryEmbedding": 1}


def test_an_angle_for_each_head_stays():
    net = Net()
    x = net.feed("x", *net.shape)
    cos, sin = (net.keep(np.repeat(table(net, kind, False)[None, None], HEADS, 1)) for kind in ("cos", "sin"))
    turned(net, x, cos, sin, False)
    left(net.built(), "one angle for each position")


@pytest.mark.parametrize("wrong", ["not negated", "swapped", "uneven", "another x", "subtracted"])
def test_near_misses_stay(wrong):
    net = Net()
    x = net.feed("x", *net.shape)
    cos, sin = (stored(net, kind, False) for kind in ("cos", "sin"))
    first, second = (net.cut(x, 0, 3), net.cut(x, 3, 8)) if wrong == "uneven" else pieces(net, x, False)
    if wrong == "swapped":
        rotated = net.put("Concat", f"{net.put('Neg', first)} {second}", axis=-1)
    elif wrong == "not negated":
        rotated = net.put("Concat", f"{net.put('Abs', second)} {first}", axis=-1)
    else:
        rotated = net.put("Concat", f"{net.put('Neg', second)} {first}", axis=-1)
    other = net.feed("z", *net.shape) if wrong == "another x" else x
    parts = f"{net.put('Mul', f'{other} {cos}')} {net.put('Mul', f'{rotated} {sin}')}"
    net.put("Sub" if wrong == "subtracted" else "Add", parts)
    left(net.built(), None)


def test_float64_stays():
    left(simple(dtype="float64"), "does not take double")


def test_unknown_shapes_stay():
    net = Net()
    x = net.put("Neg", net.feed("x", *net.shape))
    cos, sin = (stored(net, kind, False) for kind in ("cos", "sin"))
    turned(net, x, cos, sin, False)
    left(net.built(infer=False), None)


def test_a_value_inside_that_is_used_elsewhere():
    net = Net()
    x = net.feed("x", *net.shape)
    cos, sin = (stored(net, kind, False) for kind in ("cos", "sin"))
    turned(net, x, cos, sin, False)
    inner = next(each for each in net.nodes if each.op_type == "Concat").output[0]
    net.put("Add", f"{net.nodes[-1].output[0]} {inner}")
    left(net.built(), "used elsewhere")


def test_only_for_backends_that_have_it():
    before = simple()
    assert ask(FuseRotaryEmbedding(), before) == ["this backend does not run RotaryEmbedding as one operator"]
    able = replace(context(), capabilities=Capabilities(operators=("RotaryEmbedding",)))
    assert ask(FuseRotaryEmbedding(), before, able) == []


def test_float16():
    after, _ = run_twice(FuseRotaryEmbedding(), before := simple(dtype="float16"))
    assert after.operator_counts()["RotaryEmbedding"] == 1
    batch = fed(before)
    np.testing.assert_allclose(outputs(after, batch)["y"], outputs(before, batch)["y"], atol=6e-3)


@pytest.mark.parametrize("order", ["halves that differ", "halves of pairs", "no halves"])
def test_computed_angles_that_may_differ_within_a_pair_stay(order):
    net = Net()
    x, ids = net.feed("x", *net.shape), net.feed("ids", "batch", S, 1)
    one = net.put("Mul", f"{ids} {net.keep(np.float32([1, 0.3, 0.1, 0.03]))}")
    other = (
        net.put("Mul", f"{ids} {net.keep(np.float32([1, 0.3, 0.1, 0.02]))}") if order == "halves that differ" else one
    )
    if order == "no halves":
        wide = net.put("Mul", f"{ids} {net.keep(np.linspace(0, 1, 8, dtype=np.float32))}")
        both = net.put("Identity", wide)
    else:
        both = net.put("Concat", f"{one} {other}", axis=-1)
    added = net.keep(np.int64([1]))
    cos, sin = (net.put("Unsqueeze", f"{net.put(kind, both)} {added}") for kind in ("Cos", "Sin"))
    turned(net, x, cos, sin, interleaved=order == "halves of pairs")
    left(net.built(), "aren't known to be turned by the same angle")
