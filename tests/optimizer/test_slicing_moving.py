"""Cutting through operators that move channels: joined, split, shifted, picked, regrouped, repeated."""

import numpy as np
import pytest
from couplings import WIDTH, Net, between, described, in_sequence, left_whole, proven
from models import feed


def test_a_shortcut_without_weights():
    """Option A: every second pixel, and zeros for channels that weren't there."""

    def put(net, h):
        ends = [net.keep(np.int64(one)) for one in ([0, 0], [2**63 - 1, 2**63 - 1], [2, 3], [2, 2])]
        short = net.put("Pad", net.put("Slice", h, *ends), net.keep(np.int64([0, 2, 0, 0, 0, 3, 0, 0])))
        return net.put("Add", short, net.conv("m", h, WIDTH, WIDTH + 5, 3, strides=[2, 2]))

    coupling, _ = between(put, WIDTH + 5)
    assert described(coupling) == {"a": (WIDTH, "a m", "b m"), "m": (5, "m", "b")}


@pytest.mark.parametrize(
    ("amounts", "axes"),
    [([0, 2, 0, 0, 0, -1, 0, 0], None), ([0, -2, 1, 1, 0, 3, 0, 0], None), ([-1, 2], [1]), ([1, -2, 0, -1], [-3, 3])],
)
def test_padded_and_cropped_channels(amounts, axes):
    given = np.zeros((2, 4), np.int64)
    given[:, [axis % 4 for axis in axes or range(4)]] = np.reshape(amounts, (2, -1))

    def put(net, h):
        extra = [] if axes is None else [None, net.keep(np.int64(axes))]
        return net.put("Pad", h, net.keep(np.int64(amounts)), *extra)

    outs = WIDTH + int(given[:, 1].sum())
    coupling, _ = between(put, outs)
    assert sum(group.size for group in coupling.groups) == WIDTH + min(0, int(given[0, 1])) + min(0, int(given[1, 1]))


def test_cropped_channels_that_another_product_reads():
    """What is cropped shrinks with them."""

    def put(net, h):
        cropped = net.put("Pad", h, net.keep(np.int64([0, -3, 0, 0, 0, -2, 0, 0])))
        return net.put("Concat", net.conv("c", h, WIDTH, 2), cropped, axis=1)

    coupling, _ = between(
        put, 2 + WIDTH - 5, units=lambda coupling: {group: [0, 2] for group in coupling.groups if group.size > 2}
    )
    assert described(coupling) == {"a": (5, "a", "c"), "a'": (3, "a", "b c"), "c": (2, "c", "b")}


def test_padding_with_another_number_than_zero():
    def put(net, h):
        return net.put("Pad", h, net.keep(np.int64([0, 1, 0, 0, 0, 1, 0, 0])), net.keep(np.float32(5)))

    assert described(between(put, WIDTH + 2)[0]) == {"a": (WIDTH, "a", "b")}


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_padding_by_what_is_there(mode):
    def put(net, h, amounts):
        return net.put("Pad", h, net.keep(np.int64(amounts)), mode=mode)

    assert described(between(lambda net, h: put(net, h, [0, 0, 1, 1, 0, 0, 1, 1]))[0]) == {"a": (WIDTH, "a", "b")}
    net = Net()
    h = net.conv("a", net.feed("x", "batch", 3, 6, 6), 3, WIDTH)
    left_whole(
        net.built(net.conv("b", put(net, h, [0, 1, 0, 0, 0, 0, 0, 0]), WIDTH + 1, 4)), "pads it by what lies in it"
    )


def test_concatenation_of_computed_and_stored_channels():
    def put(net, h):
        other = net.conv("c", "x", 3, 5)
        pixels = net.put(
            "Expand",
            net.noise(1, 3, 6, 6),
            net.put("Concat", net.put("Shape", "x", end=1), net.keep(np.int64([3, 6, 6])), axis=0),
        )
        return net.put("Concat", h, pixels, other, h, axis=1)

    coupling, _ = between(put, 2 * WIDTH + 8)
    assert described(coupling) == {"a": (WIDTH, "a", "b"), "c": (5, "c", "b")}
    assert coupling.groups[0].positions(*coupling.groups[0].readers[0].read).shape == (WIDTH, 2)


@pytest.mark.parametrize(("sizes", "count"), [([3, 5], None), ([4, 4], None), (None, 2), (None, 3), ([1, 2, 5], None)])
def test_splits(sizes, count):
    """The parts are joined in another order, through a convolution each."""

    def put(net, h):
        more = {"num_outputs": count} if count else {}
        parts = net.put(
            "Split", h, *([net.keep(np.int64(sizes))] if sizes else []), axis=1, outputs=count or len(sizes), **more
        )
        lengths = sizes or [len(part) for part in np.array_split(np.arange(WIDTH), count)]
        made = [net.conv(f"p{n}", part, length, 3) for n, (part, length) in enumerate(zip(parts, lengths, strict=True))]
        return net.put("Concat", *made[::-1], axis=1)

    coupling, after = between(put, 3 * (count or len(sizes)))
    lengths = sizes or [len(part) for part in np.array_split(np.arange(WIDTH), count)]
    found = [(group.size, group.readers[0].node) for group in coupling.groups if group.name == "a"]
    assert found == [(length, f"p{n}") for n, length in enumerate(lengths) if length > 1]
    assert "num_outputs" not in next(n for n in after.model.graph if n.op_type == "Split").attributes


def test_a_gated_unit():
    """SwiGLU: the two halves of one product go in pairs."""

    def put(net, h):
        gate, up = net.put("Split", h, axis=-1, num_outputs=2, outputs=2)
        return net.put("Mul", net.put("Swish", gate), up)

    coupling, _ = in_sequence(put, WIDTH // 2, opset=24)
    assert described(coupling) == {"a": (WIDTH // 2, "a", "b")}
    assert coupling.groups[0].positions(*coupling.groups[0].makers[0].made).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(
    ("start", "end", "size"), [(0, 4, 4), (3, 2**63 - 1, 5), (-3, -1, 2), (-100, 6, 6), (0, 100, 8), (2, -2, 4)]
)
def test_slices_of_channels(start, end, size):
    def put(net, h):
        return net.put("Slice", h, *(net.keep(np.int64([one])) for one in (start, end, -3)))

    coupling, _ = between(put, size)
    assert described(coupling) == {"a": (size, "a", "b")}


@pytest.mark.parametrize(("start", "end", "step"), [(0, 8, 2), (7, -100, -1), (-1, -9, -2)])
def test_slices_of_channels_in_steps_keep_them(start, end, step):
    net = Net()
    h = net.conv("a", net.feed("x", "batch", 3, 6, 6), 3, WIDTH)
    y = net.put("Slice", h, *(net.keep(np.int64([one])) for one in (start, end, 1, step)))
    size = len(range(WIDTH)[start if start >= -8 else None : end if end >= -8 else None : step])
    left_whole(net.built(net.conv("b", y, size, 4)), "in steps")


def test_bounds_that_are_calculated_keep_everything():
    net = Net()
    h = net.conv("a", net.feed("x", "batch", 3, 6, 6), 3, WIDTH)
    ends = net.put("Add", net.feed("n", 1, dtype="int64"), net.keep(np.int64([0])))
    y = net.put("Slice", h, net.keep(np.int64([0])), ends, net.keep(np.int64([2])))
    built = net.built(net.conv("b", y, WIDTH, 4))
    left_whole(built, "can't be told", fed={**feed(built, items=2), "n": np.int64([3])})


@pytest.mark.parametrize(
    ("indices", "sizes"),
    [([5, 0, 2], [3]), ([-1, -8, 3, 3], [2, 1]), ([7, 6, 5, 4, 3, 2, 1, 0], [8]), ([1, 1, 1], []), ([4], [])],
)
def test_gathered_channels(indices, sizes):
    def put(net, h):
        return net.put("Gather", h, net.keep(np.int64(indices)), axis=1)

    coupling, _ = between(put, len(indices), moves=bool(sizes))
    assert [group.size for group in coupling.groups] == sizes
    if len(sizes) > 1:
        _, after = between(put, len(indices), units=lambda coupling: {group: [0] for group in coupling.groups})
        assert after.model.graph.initializers["w1"].const_value.shape == [WIDTH - 2, 3, 1, 1]


def test_a_channel_shuffle():
    def put(net, h):
        h = net.put("Reshape", h, net.keep(np.int64([0, 2, 4, 6, 6])))
        return net.put("Reshape", net.put("Transpose", h, perm=[0, 2, 1, 3, 4]), net.keep(np.int64([0, -1, 6, 6])))

    coupling, after = between(put)
    assert described(coupling) == {"a": (4, "a", "b")}
    assert after.operator_counts()["Reshape"] == 2


@pytest.mark.parametrize("how", ["Flatten", "stored", "calculated"])
def test_flattened_before_a_classifier(how):
    net = Net()
    h = net.conv("a", net.feed("x", "batch", 3, 4, 4), 3, WIDTH)
    if how == "Flatten":
        h = net.put("Flatten", h)
    else:
        shape = net.keep(np.int64([0, -1]))
        if how == "calculated":
            batch = net.put("Gather", net.put("Shape", "x"), net.keep(np.int64([0])))
            shape = net.put("Concat", batch, net.keep(np.int64([WIDTH * 16])), axis=0)
        h = net.put("Reshape", h, shape)
    coupling, after = proven(net.built(net.gemm("b", h, WIDTH * 16, 4)))
    assert described(coupling) == {"a": (WIDTH, "a", "b")}
    read = coupling.groups[0].readers[0].weight
    assert after.model.graph.initializers[read].const_value.shape == [4, 5 * 16]


def test_a_zero_that_takes_over_an_axis_which_becomes_another():
    """[12, 2] → [6, 2, 2]: the 0 copies the length of the channels to an axis that isn't theirs."""
    net = Net()
    h = net.put("Reshape", net.linear("a", net.feed("x", 12, 6), 6, 2), net.keep(np.int64([6, 0, 2])))
    coupling, _ = proven(net.built(net.linear("b", h, 2, 4)))
    assert described(coupling) == {"a": (2, "a", "b")}


def test_flattened_with_channels_last():
    net = Net()
    h = net.put("Transpose", net.conv("a", net.feed("x", "batch", 3, 4, 4), 3, WIDTH), perm=[0, 2, 3, 1])
    h = net.put("Reshape", h, net.keep(np.int64([-1, 16 * WIDTH])))
    coupling, _ = proven(net.built(net.gemm("b", h, WIDTH * 16, 4)))
    assert described(coupling) == {"a": (WIDTH, "a", "b")}
    assert coupling.groups[0].readers[0].read[1] == 1
    assert coupling.groups[0].positions(*coupling.groups[0].readers[0].read)[1].tolist() == [
        8 * n + 1 for n in range(16)
    ]


@pytest.mark.parametrize("opset", [11, 13, 23])
def test_axes_of_length_one_put_in_and_taken_out(opset):
    def put(net, h):
        one = {"axes": [2]} if opset < 13 else {}
        extra = [] if opset < 13 else [net.keep(np.int64([2]))]
        h = net.put("Unsqueeze", h, *extra, **one)
        return net.put("Squeeze", net.put("Relu", h), *extra, **one)

    assert described(in_sequence(put, opset=opset)[0]) == {"a": (WIDTH, "a", "b")}


def test_expanded():
    """A stored row of one is repeated along what is cut, and the shape says so."""

    def put(net, h):
        shape = net.keep(np.int64([2, 5, WIDTH]))
        many = net.put("Expand", net.noise(1, 5, 1), shape)
        return net.put("Mul", h, net.put("Expand", net.put("Add", many, net.noise(WIDTH)), net.keep(np.int64([1, 1]))))

    assert described(in_sequence(put)[0]) == {"a": (WIDTH, "a", "b")}


def test_expanded_to_a_shape_that_is_calculated():
    def put(net, h):
        batch = net.put("Gather", net.put("Shape", "x"), net.keep(np.int64([0])))
        shape = net.put("Concat", batch, net.keep(np.int64([5, WIDTH])), axis=0)
        return net.put("Mul", h, net.put("Expand", net.noise(1), shape))

    assert described(in_sequence(put)[0]) == {"a": (WIDTH, "a", "b")}


def test_expanded_to_a_shape_of_fewer_axes():
    def put(net, h):
        return net.put("Expand", h, net.put("Shape", "x", start=3))

    assert described(between(put)[0]) == {"a": (WIDTH, "a", "b")}


def test_tiled():
    def put(net, h, times):
        return net.put("Tile", h, net.keep(np.int64(times)))

    assert described(in_sequence(lambda net, h: put(net, h, [1, 2, 1]))[0]) == {"a": (WIDTH, "a", "b")}
    net = Net()
    h = net.linear("a", net.feed("x", "batch", 5, 6), 6, WIDTH)
    left_whole(net.built(net.linear("b", put(net, h, [1, 1, 2]), 2 * WIDTH, 4)), "repeats it")


@pytest.mark.parametrize("how", ["scales", "sizes", "axes"])
def test_resized(how):
    def put(net, h):
        if how == "scales":
            return net.put("Resize", h, None, net.keep(np.float32([1, 1, 2, 2])), mode="nearest")
        if how == "axes":
            return net.put("Resize", h, None, None, net.keep(np.int64([WIDTH, 12])), axes=[1, 3], mode="nearest")
        return net.put("Resize", h, None, None, net.keep(np.int64([2, WIDTH, 12, 9])), mode="linear")

    assert described(between(put)[0]) == {"a": (WIDTH, "a", "b")}


def test_cut_out_by_a_region_keeps_everything():
    net = Net()
    h = net.conv("a", net.feed("x", "batch", 3, 6, 6), 3, WIDTH)
    roi = net.keep(np.float32([0, 0, 0, 0, 1, 1, 0.5, 0.5]))
    y = net.put(
        "Resize",
        h,
        roi,
        None,
        net.keep(np.int64([2, WIDTH, 3, 3])),
        mode="linear",
        coordinate_transformation_mode="tf_crop_and_resize",
    )
    left_whole(net.built(net.conv("b", y, WIDTH, 4)), "cuts a part out of every axis")
