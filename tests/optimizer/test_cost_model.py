"""The cost model: nodes' work is counted right, a fit finds what made the costs, and what it can't know it doesn't say."""

import numpy as np
import pytest
from models import build, conv_net, node, weight

from perwatt.artifact import Artifact
from perwatt.contract import NodeCost
from perwatt.cost_model import CostModel, Sample, graph_of, owned, typical_shapes

A_MULTIPLICATION, A_BYTE = 2e-11, 5e-10
SHAPES = {"x": (4, 8, 16, 16)}


def convolutions(*widths: int, quantized: bool = False) -> Artifact:
    """Convolutions of 3 × 3 one after the other, each of another width, with a Relu behind each."""
    nodes, weights, before, read = [], {}, "x", 8
    for number, width in enumerate(widths):
        weights[f"w{number}"] = weight(width, read, 3, 3)
        data = before
        if quantized:
            weights |= {f"s{number}": np.float32(0.1), f"z{number}": np.int8(0)}
            nodes += [
                node("QuantizeLinear", f"{data} s{number} z{number}", f"q{number}", name=f"q{number}"),
                node("DequantizeLinear", f"q{number} s{number} z{number}", f"d{number}", name=f"dq{number}"),
            ]
            data = f"d{number}"
            weights |= {f"w{number}": np.ones((width, read, 3, 3), np.int8)}
            nodes.append(node("DequantizeLinear", f"w{number} s{number} z{number}", f"dw{number}", name=f"dw{number}"))
        factor = f"dw{number}" if quantized else f"w{number}"
        nodes.append(node("Conv", f"{data} {factor}", f"c{number}", name=f"conv{number}", pads=[1] * 4))
        out = "y" if number == len(widths) - 1 else f"r{number}"
        nodes.append(node("Relu", f"c{number}", out, name=f"relu{number}"))
        before, read = out, width
    return build(nodes, "x:float32[batch,8,16,16]", f"y:float32[batch,{read},16,16]", weights)


def measured(artifact: Artifact) -> list[NodeCost]:
    """What a backend would tell whose operations cost what they multiply and move."""
    graph = graph_of(artifact, SHAPES)
    return [
        NodeCost((name,), work.kind, A_MULTIPLICATION * work.multiplications + A_BYTE * work.bytes)
        for name, work in graph.works.items()
    ]


def seconds(artifact: Artifact) -> float:
    return sum(cost.seconds for cost in measured(artifact))


def test_multiplications_and_bytes_are_those_of_one_item():
    works = graph_of(convolutions(16), SHAPES).works
    assert works["conv0"].multiplications == 16 * 16 * 16 * 8 * 9
    assert works["conv0"].family == "convolution"
    read, written, weights = 8 * 256 * 4, 16 * 256 * 4, 16 * 8 * 9 * 4
    assert works["conv0"].bytes == read + written + weights / 4
    assert works["relu0"].multiplications == 0 and works["relu0"].bytes == 2 * written


def test_arithmetic_is_what_a_product_reads_and_what_stands_behind_it_shares_it():
    works = graph_of(convolutions(16, quantized=True), SHAPES).works
    assert works["conv0"].arithmetic == works["relu0"].arithmetic == "int8"
    assert graph_of(convolutions(16), SHAPES).works["conv0"].arithmetic == "float32"


def test_matrix_products_depthwise_convolutions_and_free_operators():
    nodes = [
        node("Conv", "x w", "c", name="depthwise", group=8, pads=[1] * 4), node("GlobalAveragePool", "c", "p"),
        node("Flatten", "p", "f", name="flat"), node("Gemm", "f m", "y", name="head", transB=1),
    ]  # fmt: skip
    artifact = build(
        nodes, "x:float32[batch,8,16,16]", "y:float32[batch,5]", {"w": weight(8, 1, 3, 3), "m": weight(5, 8)}
    )
    works = graph_of(artifact, SHAPES).works
    assert works["depthwise"].family == "grouped convolution" and works["depthwise"].multiplications == 8 * 256 * 9
    assert works["head"].family == "matrix product" and works["head"].multiplications == 40
    assert works["flat"].bytes == 0


def test_a_fit_finds_what_made_the_costs_and_foresees_another_graph():
    known = convolutions(16, 32, 24, 48, 16, 64)
    model = CostModel.fit([Sample(known, measured(known))], SHAPES)
    assert model is not None and model.basis == "profile" and model.operations == 12
    found = model.seconds(known)
    assert found is not None and found.value == pytest.approx(seconds(known), rel=1e-6)
    other = convolutions(24, 40, 80)
    foreseen = model.seconds(other)
    assert foreseen is not None and foreseen.value == pytest.approx(seconds(other), rel=0.05)
    assert model.error is not None and model.error < 0.1


def test_the_profile_is_scaled_to_what_the_whole_was_measured_to_take():
    known = convolutions(16, 32)
    model = CostModel.fit([Sample(known, measured(known), 2 * seconds(known))], SHAPES)
    assert model is not None
    found = model.seconds(known)
    assert found is not None and found.value == pytest.approx(2 * seconds(known), rel=1e-6)


def test_an_arithmetic_that_was_never_measured_is_not_known():
    known = convolutions(16, 32)
    model = CostModel.fit([Sample(known, measured(known))], SHAPES)
    assert model is not None and model.seconds(convolutions(16, quantized=True)) is None


def test_without_a_profile_multiplications_share_out_what_the_whole_takes():
    known = convolutions(16, 32)
    model = CostModel.fit([Sample(known, (), 3.0)], SHAPES)
    assert model is not None and model.basis == "multiplications" and model.error is None
    per_node = model.per_node(known)
    assert per_node is not None and sum(per_node.values()) == pytest.approx(3.0)
    assert per_node["conv1"] / per_node["conv0"] == pytest.approx(4.0)
    assert CostModel.fit([Sample(known, (), None)], SHAPES) is None


def test_nodes_that_a_profile_does_not_name_belong_to_a_neighbour():
    artifact = conv_net()
    graph = graph_of(artifact, {"x": (2, 3, 8, 8)})
    costs = [
        NodeCost(("/layer1/conv",), "Convolution", 3.0),
        NodeCost(("n2",), "Convolution", 2.0),
        NodeCost((), "Reorder", 1.0),
    ]
    found = owned(graph, costs)
    assert [seconds for seconds, _ in found] == [3.0, 3.0]
    assert "/layer1/relu" in found[0][1] and "/layer2/conv" in found[1][1]
    assert sorted(name for _, names in found for name in names) == sorted(graph.works)


def test_shapes_of_a_call_are_those_of_the_samples_on_average():
    artifact = build([node("Relu", "x", "y")], "x:float32[batch,length]", "y:float32[batch,length]")
    batches = [{"x": np.zeros((1, 10), np.float32)}, {"x": np.zeros((3, 30), np.float32)}]
    assert typical_shapes(artifact.signature, batches, 8) == {"x": (8, 25)}
