"""`fuse-attention`: masks of every shape, put on in every way; triangles, rows in which everything is masked."""

import numpy as np
import pytest
from attentions import (
    HEADS,
    LOWEST,
    MASKS,
    TRIANGLE,
    D,
    Net,
    S,
    T,
    attention_of,
    fed,
    finished,
    fused,
    left,
    masked,
    scored,
)
from hypothesis import given
from hypothesis import strategies as st
from models import outputs


@given(
    way=st.sampled_from(["add", "subtract", "where", "chosen"]), shape=st.sampled_from(sorted(MASKS)),
    low=st.sampled_from([-np.inf, LOWEST, -1e9, -1e4]), flipped=st.booleans(), stored=st.booleans(), guard=st.booleans(),
)  # fmt: skip
def test_masks_of_every_shape_put_on_in_every_way(way, shape, low, flipped, stored, guard):
    net = Net()
    scores, v = scored(net)
    before = finished(net, masked(net, scores, way, MASKS[shape], low, flipped, stored), v, guard)
    after, _ = fused(before)
    assert sum(after.operator_counts().values()) <= sum(before.operator_counts().values())


@given(
    data=st.data(),
    first=st.sampled_from(["add", "where", "chosen"]),
    second=st.sampled_from(["add", "where", "chosen"]),
)
def test_two_masks(data, first, second):
    net = Net()
    scores, v = scored(net)
    low = st.sampled_from([-np.inf, LOWEST])
    shapes = st.sampled_from(sorted(MASKS))
    scores = masked(net, scores, first, MASKS[data.draw(shapes)], data.draw(low), False, True)
    scores = masked(
        net,
        scores,
        second,
        MASKS[data.draw(shapes)],
        data.draw(low),
        data.draw(st.booleans()),
        data.draw(st.booleans()),
    )
    fused(finished(net, scores, v))


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("way", ["where", "chosen"])
@pytest.mark.parametrize("low", [-np.inf, LOWEST])
def test_rows_in_which_everything_is_masked(way, low, guard):
    net = Net()
    scores, v = scored(net)
    before = finished(net, masked(net, scores, way, ("batch", 1, S, T), low, False, False), v, guard)
    batch = fed(before)
    batch["mask"][0, 0, 2] = False
    after, _ = fused(before)
    was, now = outputs(before, batch)["y"], outputs(after, batch)["y"]
    if np.isinf(low) and not guard:
        assert np.isnan(was[0, :, 2]).all()
        assert (now[0, :, 2] == 0).all()
        was[0, :, 2] = 0
    np.testing.assert_allclose(now, was, atol=1e-5)


@pytest.mark.parametrize("kind", ["(1 - m) · lowest", "fed"])
def test_additive_masks_that_may_hold_the_lowest_number(kind):
    net = Net()
    scores, v = scored(net)
    mask = net.feed("mask", "batch", 1, S, T)
    if kind != "fed":
        mask = net.put("Mul", f"{net.put('Sub', f'{net.keep(np.float32(1))} {mask}')} {net.keep(np.float32(LOWEST))}")
    before = finished(net, net.put("Add", f"{scores} {mask}"), v)
    batch = fed(before)
    batch["mask"][:] = 0 if kind == "fed" else 1
    batch["mask"][0, 0, 2] = LOWEST if kind == "fed" else 0
    batch["mask"][:, :, 1, 3:] = LOWEST if kind == "fed" else 0
    after, _ = fused(before, feeds=[batch])
    assert after.operator_counts()["Max"] == 1


def test_a_mask_of_what_is_stored_or_small_needs_no_floor():
    net = Net()
    scores, v = scored(net)
    mask = net.put(
        "Mul", f"{net.put('Cast', net.feed('ids', 'batch', 1, 1, T, dtype='bool'), to=1)} {net.keep(np.float32(-1e4))}"
    )
    after, _ = fused(finished(net, net.put("Add", f"{scores} {mask}"), v))
    assert "Max" not in after.operator_counts()


@pytest.mark.parametrize(
    ("way", "low"),
    [(way, low) for way in ("where", "chosen", "added") for low in (-np.inf, LOWEST)]
    + [("where", -1e9), ("where", -1e4)],
)
def test_a_stored_triangle_is_causal(way, low):
    net = Net()
    scores, v = scored(net, keys=S)
    keep = net.keep(TRIANGLE[None, None])
    if way == "where":
        scores = net.put("Where", f"{keep} {scores} {net.keep(np.float32(low))}")
    elif way == "chosen":
        mask = net.put("Where", f"{keep} {net.keep(np.float32(0))} {net.keep(np.float32(low))}")
        scores = net.put("Add", f"{scores} {mask}")
    else:
        scores = net.put("Add", f"{scores} {net.keep(np.where(TRIANGLE, 0, low).astype(np.float32))}")
    after, _ = fused(finished(net, scores, v))
    assert after.operator_counts() == {"Transpose": 1, "Attention": 1}
    assert attention_of(after).attributes.get_int("is_causal", 0) == 1
    assert len(attention_of(after).inputs) == 3


@pytest.mark.parametrize("wrong", ["ahead", "behind", "upper", "longer keys", "one more"])
def test_what_is_nearly_a_triangle_is_a_mask(wrong):
    net = Net()
    keys = T if wrong == "longer keys" else S
    scores, v = scored(net, keys=keys)
    keep = {
        "ahead": np.tril(np.ones((S, S), bool), 1), "behind": np.tril(np.ones((S, S), bool), -1),
        "upper": TRIANGLE.T, "longer keys": np.tril(np.ones((S, T), bool)),
        "one more": TRIANGLE | (np.arange(S * S).reshape(S, S) == S - 1),
    }[wrong]  # fmt: skip
    keep[:, 0] |= ~keep.any(-1)
    scores = net.put("Where", f"{net.keep(keep)} {scores} {net.keep(np.float32(-np.inf))}")
    after, _ = fused(finished(net, scores, v))
    assert attention_of(after).attributes.get_int("is_causal", 0) == 0
    assert len(attention_of(after).inputs) == 4


def test_masks_that_mask_nothing_go():
    net = Net()
    scores, v = scored(net)
    everything = net.put("Expand", f"{net.keep(np.ones((1, 1, 1, 1), bool))} {net.keep(np.int64([1, 1, S, T]))}")
    mask = net.put("Where", f"{everything} {net.keep(np.float32(0))} {net.keep(np.float32(LOWEST))}")
    scores = net.put("Add", f"{scores} {mask}")
    scores = net.put("Add", f"{scores} {net.keep(np.zeros((S, T), np.float32))}")
    after, _ = fused(finished(net, scores, v))
    assert after.operator_counts() == {"Transpose": 1, "Attention": 1}


def test_masks_are_made_once_for_all_layers():
    net = Net()
    mask = net.feed("mask", "batch", 1, 1, S, dtype="bool")
    q = net.feed("q", "batch", HEADS, S, D)
    for _ in range(3):
        scores = net.put("MatMul", f"{q} {net.put('Transpose', q, perm=[0, 1, 3, 2])}")
        chosen = net.put("Where", f"{mask} {net.keep(np.float32(0))} {net.keep(np.float32(LOWEST))}")
        weights = net.put("Softmax", net.put("Add", f"{scores} {chosen}"), axis=-1)
        q = net.put("MatMul", f"{weights} {q}")
    after, _ = fused(net.built(q, ("batch", HEADS, S, D)), times=3)
    assert after.operator_counts() == {"Where": 1, "Expand": 1, "Attention": 3}


def test_a_length_that_only_an_input_knows():
    net = Net()
    q, k = net.feed("q", "batch", HEADS, "words", D), net.feed("k", "batch", HEADS, "words", D)
    scores = net.put("MatMul", f"{q} {net.put('Transpose', k, perm=[0, 1, 3, 2])}")
    scores = net.put("Add", f"{scores} {net.feed('mask', 'batch', 1, 1, 'words')}")
    last = net.put("MatMul", f"{net.put('Softmax', scores, axis=-1)} {k}")
    after, _ = fused(net.built(last, ("batch", HEADS, "words", D)))
    counts = after.operator_counts()
    assert counts["Shape"] == counts["Concat"] == counts["Expand"] == 1


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (("other", 1, S, T), "does not fit its scores"), ((3, 1, S, T), "does not fit its scores"),
        ((1, "batch", HEADS, S, T), "5"), (("?", 1, S, T), "does not fit its scores"),
    ],
)  # fmt: skip
def test_masks_that_may_enlarge_the_scores_stay(shape, reason):
    net = Net()
    scores, v = scored(net)
    masked_scores = net.put("Add", f"{scores} {net.feed('mask', *shape)}")
    weights = net.put("Softmax", masked_scores, axis=-1)
    last = net.put("MatMul", f"{weights} {v}")
    left(net.built(last, ("?",) * max(4, len(shape))), reason)


def test_what_stands_for_hidden_scores_may_count():
    net = Net()
    scores, v = scored(net)
    keep = net.feed("mask", "batch", 1, S, T, dtype="bool")
    left(
        finished(net, net.put("Where", f"{keep} {scores} {net.keep(np.float32(-100))}"), v),
        "become -100, which still counts",
    )


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("low", [-np.inf, LOWEST])
def test_a_condition_of_what_is_hidden(low, stored):
    net = Net()
    scores, v = scored(net)
    hidden = np.triu(np.ones((S, T), bool), 2)
    condition = net.keep(hidden) if stored else net.feed("hidden", S, T, dtype="bool")
    scores = net.put("Where", f"{condition} {net.keep(np.float32(low))} {scores}")
    before = finished(net, scores, v)
    batch = fed(before)
    if not stored:
        batch["hidden"] = hidden
    after, _ = fused(before, feeds=[batch])
    assert after.operator_counts().get("Not", 0) == int(not stored)


def test_a_stored_mask_for_each_item_of_a_fixed_batch():
    net = Net()
    q, k, v = net.feed("q", 2, S, D), net.feed("k", 2, T, D), net.feed("v", 2, T, D)
    scores = net.put("MatMul", f"{q} {net.put('Transpose', k, perm=[0, 2, 1])}")
    bias = np.random.default_rng(5).standard_normal((2, S, T)).astype(np.float32)
    weights = net.put("Softmax", net.put("Add", f"{scores} {net.keep(bias)}"), axis=-1)
    before = net.built(net.put("MatMul", f"{weights} {v}"), (2, S, D))
    after, _ = fused(before, feeds=[fed(before)])
    assert after.operator_counts() == {"Attention": 1}
