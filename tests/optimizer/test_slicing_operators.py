"""Cutting through operators that leave channels where they are, or keep them: each between two products."""

import numpy as np
import pytest
from couplings import WIDTH, Net, between, described, in_sequence, left_whole, proven
from models import feed, weight

# Elementwise ----------------------------------------------------------------------------------------------------------

UNARY = (
    "Abs", "Acos", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu",
    "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Tan", "Tanh", "Swish",
)  # fmt: skip


@pytest.mark.parametrize("operator", UNARY)
def test_one_input(operator):
    coupling, _ = between(
        lambda net, h: net.put(operator, net.put("Sigmoid", h)),
        opset=24,
        moves=operator not in ("Ceil", "Floor", "Sign"),
    )
    assert described(coupling) == {"a": (WIDTH, "a", "b")}


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("Acosh", {}),
        ("Shrink", {"lambd": 0.1}),
        ("ThresholdedRelu", {"alpha": 0.2}),
        ("Cast", {"to": 11}),
        ("Dropout", {}),
    ],
)
def test_one_input_with_more_to_say(operator, attributes):
    def put(net, h):
        one = net.put(operator, net.put("Exp", h), **attributes)
        return net.put("Cast", one, to=1) if operator == "Cast" else one

    coupling, _ = between(put)
    assert described(coupling) == {"a": (WIDTH, "a", "b")}


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum", "Pow", "PRelu"])
@pytest.mark.parametrize("shape", [(WIDTH, 1, 1), (1, WIDTH, 1, 1), (1,), (), (WIDTH, 6, 6), (6,), (1, 6, 1)])
def test_two_inputs_one_of_them_stored(operator, shape):
    def put(net, h):
        return net.put(operator, net.put("Exp", h), net.noise(*shape, positive=True))

    coupling, after = between(put)
    assert described(coupling) == {"a": (WIDTH, "a", "b")}
    constant = next(n for n in after.model.graph if n.op_type == operator).inputs[1].const_value
    assert (5 in constant.shape) == (WIDTH in shape), (
        "a stored tensor is cut where it lies along channels, and only there"
    )


@pytest.mark.parametrize("operator", ["And", "Or", "Xor"])
@pytest.mark.parametrize("compared", ["Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"])
def test_truth(operator, compared):
    def put(net, h):
        truth = net.put(compared, h, net.noise(WIDTH, 1, 1))
        both = net.put(operator, net.put("Not", truth), net.put("Less", h, net.keep(np.float32(0.1))))
        return net.put("Where", both, h, net.noise(WIDTH, 1, 1))

    assert described(between(put)[0]) == {"a": (WIDTH, "a", "b")}


@pytest.mark.parametrize("operator", ["BitwiseAnd", "BitwiseOr", "BitwiseXor", "Mod"])
def test_whole_numbers(operator):
    def put(net, h):
        whole = net.put("Cast", net.put("Mul", h, net.keep(np.float32(9))), to=6)
        other = net.keep(np.arange(1, WIDTH + 1, dtype=np.int32).reshape(-1, 1, 1))
        return net.put("Cast", net.put(operator, whole, other), to=1)

    assert described(between(put)[0]) == {"a": (WIDTH, "a", "b")}


def test_what_is_infinite_or_no_number():
    def put(net, h):
        odd = net.put("Or", net.put("IsNaN", h), net.put("IsInf", net.put("Exp", net.put("Exp", net.put("Exp", h)))))
        return net.put(
            "Where",
            odd,
            net.put("BitwiseNot", net.keep(np.int32([1] * WIDTH).reshape(-1, 1, 1))),
            net.put("Cast", h, to=6),
        )

    coupling, _ = between(lambda net, h: net.put("Cast", put(net, h), to=1), moves=False)
    assert described(coupling) == {"a": (WIDTH, "a", "b")}


def test_bounds_of_a_clip_are_single_numbers():
    coupling, _ = between(lambda net, h: net.put("Clip", h, None, net.keep(np.float32(0.3))))
    assert described(coupling) == {"a": (WIDTH, "a", "b")}


def test_of_the_second_input_of_castlike_only_the_type_counts():
    coupling, _ = between(lambda net, h: net.put("CastLike", h, net.keep(weight(5))))
    assert described(coupling) == {"a": (WIDTH, "a", "b")}


def test_a_mask_of_dropout_goes_the_same_way():
    def put(net, h):
        y, mask = net.put("Dropout", h, outputs=2)
        return net.put("Where", mask, y, net.put("Neg", y))

    assert described(between(put)[0]) == {"a": (WIDTH, "a", "b")}


# Normalization, pooling, reductions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("AveragePool", {"kernel_shape": [3, 3]}), ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("LpPool", {"kernel_shape": [3, 3]}), ("GlobalAveragePool", {}), ("GlobalMaxPool", {}), ("GlobalLpPool", {}),
    ],
)  # fmt: skip
def test_pooling(operator, attributes):
    coupling, _ = between(lambda net, h: net.put(operator, h, **attributes), opset=17)
    assert described(coupling) == {"a": (WIDTH, "a", "b")}


def test_batch_normalization():
    assert described(between(lambda net, h: net.norm(h, WIDTH))[0]) == {"a": (WIDTH, "a", "b")}


def test_batch_normalization_in_training_is_cut_while_nobody_asks_for_its_statistics():
    def put(net, h, outs):
        parameters = [net.noise(WIDTH, positive=True) for _ in range(4)]
        return net.put("BatchNormalization", h, *parameters, training_mode=1, outputs=outs)

    assert described(between(lambda net, h: put(net, h, 3)[0])[0]) == {"a": (WIDTH, "a", "b")}
    net = Net()
    y, mean, var = put(net, net.conv("a", net.feed("x", "batch", 3, 6, 6), 3, WIDTH), 3)
    left_whole(net.built(net.conv("b", y, WIDTH, 4), mean, var), "it is an output of the model")


def test_instance_normalization():
    coupling, _ = between(lambda net, h: net.put("InstanceNormalization", h, net.noise(WIDTH), net.noise(WIDTH)))
    assert described(coupling) == {"a": (WIDTH, "a", "b")}


@pytest.mark.parametrize(
    ("operator", "attributes", "parameters"),
    [("LRN", {"size": 3}, 0), ("GroupNormalization", {"num_groups": 4}, 2)],
)
def test_what_normalizes_over_channels_keeps_them(operator, attributes, parameters):
    net = Net()
    h = net.conv("a", net.feed("x", 2, 3, 6, 6), 3, WIDTH)
    h = net.put(operator, h, *(net.noise(WIDTH) for _ in range(parameters)), **attributes)
    left_whole(net.built(f"{net.conv('b', h, WIDTH, 4)}:float32[2,4,6,6]"), operator)


@pytest.mark.parametrize(
    ("operator", "inputs"),
    [
        ("LayerNormalization", 2),
        ("RMSNormalization", 1),
        ("Softmax", 0),
        ("LogSoftmax", 0),
        ("Hardmax", 0),
        ("LpNormalization", 0),
    ],
)
def test_what_mixes_the_last_axis_keeps_it(operator, inputs):
    net = Net()
    h = net.linear("a", net.feed("x", "batch", 5, 6), 6, WIDTH)
    h = net.put(operator, h, *(net.noise(WIDTH) for _ in range(inputs)))
    left_whole(net.built(net.linear("b", h, WIDTH, 4)), operator)


@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax", "Hardmax", "LpNormalization"])
def test_what_mixes_another_axis_lets_it_be_cut(operator):
    coupling, _ = in_sequence(lambda net, h: net.put(operator, h, axis=1))
    assert described(coupling) == {"a": (WIDTH, "a", "b")}


@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax", "Hardmax"])
def test_before_opset_13_softmaxes_mix_all_axes_from_one_on(operator):
    def built(**attributes):
        net = Net(opset=11)
        h = net.linear("a", net.feed("x", "batch", 5, 6), 6, WIDTH)
        return net.built(net.linear("b", net.put(operator, h, **attributes), WIDTH, 4))

    left_whole(built(), operator)
    left_whole(built(axis=1), operator)
    left_whole(built(axis=2), operator)


@pytest.mark.parametrize("reverse", [0, 1])
def test_sums_along_an_axis(reverse):
    def put(net, h, axis):
        return net.put("CumSum", h, net.keep(np.int64(axis)), reverse=reverse)

    assert described(in_sequence(lambda net, h: put(net, h, -2))[0]) == {"a": (WIDTH, "a", "b")}
    net = Net()
    h = net.linear("a", net.feed("x", "batch", 5, 6), 6, WIDTH)
    left_whole(net.built(net.linear("b", put(net, h, 2), WIDTH, 4)), "CumSum")


def test_the_largest_of_an_axis():
    def put(net, h):
        return net.put("TopK", h, net.keep(np.int64([2])), axis=1, outputs=2)[0]

    assert described(in_sequence(put)[0]) == {"a": (WIDTH, "a", "b")}


REDUCING = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip


@pytest.mark.parametrize("operator", REDUCING)
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reductions_over_space(operator, keepdims):
    net = Net()
    h = net.put("Sigmoid", net.conv("a", net.feed("x", "batch", 3, 2, 2), 3, WIDTH))
    h = net.put(operator, h, net.keep(np.int64([2, -1])), keepdims=keepdims)
    h = net.put("Flatten", h) if keepdims else h
    coupling, _ = proven(net.built(net.gemm("b", h, WIDTH, 4)))
    assert described(coupling) == {"a": (WIDTH, "a", "b")}


@pytest.mark.parametrize("operator", REDUCING)
def test_reductions_with_axes_as_an_attribute(operator):
    net = Net(opset=11)
    h = net.put("Sigmoid", net.conv("a", net.feed("x", "batch", 3, 2, 2), 3, WIDTH))
    coupling, _ = proven(net.built(net.gemm("b", net.put(operator, h, axes=[-2, 3], keepdims=0), WIDTH, 4)))
    assert described(coupling) == {"a": (WIDTH, "a", "b")}


@pytest.mark.parametrize(("axes", "empty"), [([1], 0), ([], 0), (None, 0)])
def test_reductions_over_channels_keep_them(axes, empty):
    net = Net()
    h = net.conv("a", net.feed("x", "batch", 3, 4, 4), 3, WIDTH)
    given = [] if axes is None else [net.keep(np.int64(axes))]
    h = net.put("ReduceMean", h, *given, noop_with_empty_axes=empty)
    left_whole(net.built(h), "ReduceMean")


def test_a_reduction_that_does_nothing_without_axes():
    coupling, _ = between(lambda net, h: net.put("ReduceMean", h, noop_with_empty_axes=1))
    assert described(coupling) == {"a": (WIDTH, "a", "b")}


def test_axes_that_are_calculated_keep_everything():
    net = Net()
    h = net.conv("a", net.feed("x", "batch", 3, 4, 4), 3, WIDTH)
    axes = net.put("Mul", net.feed("axes", 1, dtype="int64"), net.keep(np.int64([1])))
    h = net.put("ReduceMean", h, axes)
    built = net.built(f"{net.conv('b', h, WIDTH, 4)}:float32[batch,4,1,4]")
    left_whole(built, "can't be told", fed={**feed(built, items=2), "axes": np.int64([2])})


def test_where_the_largest_is():
    def put(net, h):
        return net.put("Cast", net.put("ArgMax", h, axis=2), to=1)

    assert described(between(put, moves=False)[0]) == {"a": (WIDTH, "a", "b")}


def test_indices_of_a_pooling_count_channels():
    net = Net()
    h = net.conv("a", net.feed("x", "batch", 3, 6, 6), 3, WIDTH)
    y, at = net.put("MaxPool", h, kernel_shape=[2, 2], outputs=2)
    left_whole(net.built(net.conv("b", net.put("Add", y, net.put("Cast", at, to=1)), WIDTH, 4)), "counts positions")
