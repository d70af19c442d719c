"""What layers cost, from scripted profiles by every kind of name that backends give, and from two real ones."""

import pytest
from models import build, context, conv_net, executed, feed, mlp, node, transformer, weight

from perwatt.artifact import Artifact, Step
from perwatt.contract import NodeCost, OperatingPoint
from perwatt.passes._allocation import Border
from perwatt.passes._layer_costs import borders_between, by_product, conversions
from perwatt.passes._naming import with_names
from perwatt.passes._placement import products
from perwatt.passes._quantizer import Wish, quantize
from perwatt.targets.onnxruntime import ONNXRuntime
from perwatt.targets.openvino import OpenVINO

NAMES = ["/layer1/conv", "/layer2/conv", "/head"]
TARGETS = {"openvino": OpenVINO(), "onnxruntime": ONNXRuntime()}


def spent(*costs, net=None):
    """Costs of `conv_net`'s products by (kind, names, seconds)."""
    told = [NodeCost(tuple(names.split()), kind, seconds) for kind, names, seconds in costs]
    found = by_product((net or conv_net()).model.graph, NAMES, told)
    return [found[name] for name in NAMES]


def test_an_operation_counts_for_the_product_that_it_names():
    assert spent(("Convolution", "/layer1/conv /n1 /layer1/relu", 3.0), ("Gemm", "/head", 2.0)) == [3.0, 0.0, 2.0]


def test_what_names_several_counts_in_equal_parts():
    assert spent(("Subgraph", "/layer2/conv /head /layer2/conv", 3.0)) == [0.0, 1.5, 1.5]


@pytest.mark.parametrize(
    ("kind", "name", "place"),
    [
        ("Convolution", "/n1", 0),  # called after what was fused into it
        ("Convolution", "Multiply_3775 /n2 /layer2/relu", 1),
        ("FullyConnected", "y", 2),  # after the model's output
        ("FullyConnectedQuantized", "/head/WithoutBiases/DequantizationMultiply y", 2),
        ("Conv", "r2_nchwc", 1),  # after a value, with an ending
        ("FusedGemm", "fused /head", 2),
    ],
)
def test_a_product_may_be_called_after_values_endings_and_what_was_fused_into_it(kind, name, place):
    found = spent((kind, name, 1.0))
    assert found[place] == 1.0 and sum(found) == 1.0


@pytest.mark.parametrize(
    ("kind", "name", "place"),
    [
        ("Reorder", "/layer1/conv/quantize_abcd_acdb_Multiply_9872", 0),
        ("QuantizeLinear", "/layer2/conv/quantize", 1),
        ("DequantizeLinear", "/flatten/dequantize", 2),  # what it stands in front of only moves values to a product
        ("Reorder", "/n1_abcd_acdb", 1),  # between two products
        ("Convert", "/layer2/relu", 2),
    ],
)
def test_a_conversion_counts_for_the_product_behind_it(kind, name, place):
    found = spent((kind, name, 1.0))
    assert found[place] == 1.0 and sum(found) == 1.0


def test_what_costs_the_same_in_either_type_and_what_nobody_knows_counts_for_none():
    odd = [("GlobalAveragePool", "/pool", 1.0), ("Reorder", "Reorder_17", 1.0), ("Convolution", "who", 1.0)]
    assert spent(*odd, ("Softmax", "", 1.0), ("Reorder", "", 1.0)) == [0.0, 0.0, 0.0]


def test_a_name_that_another_begins_with_is_not_that_one():
    nodes = [node("MatMul", "x w", "h", name="/layer1"), node("MatMul", "h w", "y", name="/layer10")]
    net = build(nodes, "x:float32[batch,4]", "y:float32[batch,4]", {"w": weight(4, 4)})
    names = ["/layer1", "/layer10"]
    told = [NodeCost(("/layer10/quantize",), "Reorder", 1.0), NodeCost(("/layer12/quantize",), "Reorder", 4.0)]
    assert by_product(net.model.graph, names, told) == {"/layer1": 0.0, "/layer10": 1.0}


def test_without_a_profile_multiplications_count():
    assert spent() == [8 * 8 * 8 * 27, 8 * 8 * 8 * 72, 5 * 8]
    net = transformer()
    names = [product.node.name for product in products(net.model.graph)]
    found = by_product(net.model.graph, names, [])
    assert set(found) == {"/q", "/scores", "/attended", "/out"} and min(found.values()) >= 1


def test_a_conversion_s_rate_is_the_median_by_elements():
    graph = conv_net().model.graph
    side = 8 * 8 * 8
    told = [
        NodeCost(("/layer1/relu",), "Reorder", 1.0 * side), NodeCost(("/n1_x",), "Convert", 3.0 * side),
        NodeCost(("/n2",), "QuantizeLinear", 2.0 * side), NodeCost(("/layer1/conv",), "Convolution", 9e9),
        NodeCost(("who",), "Reorder", 9e9), NodeCost(("/n2",), "Reorder", 0.0),
    ]  # fmt: skip
    assert conversions(graph, told) == 2.0
    assert conversions(graph, told[3:]) == 0.0


def test_borders_are_between_neighbours_and_cost_by_what_passes():
    found = borders_between(conv_net().model.graph, NAMES, 2.0)
    assert found == [Border("/layer1/conv", "/layer2/conv", 1024.0), Border("/layer2/conv", "/head", 1024.0)]
    assert borders_between(conv_net().model.graph, ["/layer1/conv", "/head"], 1.0) == []  # seven nodes apart


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("made", [conv_net, mlp, transformer], ids=lambda f: f.__name__)
def test_every_product_is_told_by_real_profiles_in_either_type(target, made, tmp_path):
    named, backend = with_names(made(), Step("name")), TARGETS[target]
    batch = feed(named, items=8)
    style = backend.capabilities().quantization_styles[0]
    whole = quantize(named, context([batch], execute=executed), Wish(style))
    graph = whole.base.model.graph
    names = [product.node.name for product in products(graph)]
    for number, each in enumerate((named, whole.artifact)):
        folder = tmp_path / str(number)
        folder.mkdir()
        artifact = Artifact(model=each.model)
        artifact.file(folder)
        told = backend.profile(artifact, OperatingPoint(threads=1, floating_precision="f32"), [batch], 0.02)
        found = by_product(graph, names, told)
        assert all(found[name] > 0 for name in names), (found, told)
        assert sum(found.values()) <= sum(cost.seconds for cost in told) * 1.0001
