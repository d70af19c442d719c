"""What operations cost by the backends' own counters: names of the graph's nodes, seconds that add up to a call's."""

import time
from itertools import pairwise

import pytest
from models import build, conv_net, feed, node, transformer, weight

from perwatt.contract import NodeCost, OperatingPoint
from perwatt.targets.null import Null
from perwatt.targets.onnxruntime import ONNXRuntime
from perwatt.targets.openvino import OpenVINO

TARGETS = {"openvino": OpenVINO(), "onnxruntime": ONNXRuntime()}


def products(width=256, layers=3):
    """Matrix products, large enough to be worth timing."""
    names = ["x", *(f"h{i}" for i in range(1, layers)), "y"]
    nodes = [node("MatMul", f"{a} w{i}", b, name=f"/layer{i}") for i, (a, b) in enumerate(pairwise(names))]
    spec = f"float32[batch,{width}]"
    return build(nodes, f"x:{spec}", f"y:{spec}", {f"w{i}": weight(width, width) for i in range(layers)})


def profiled(target, artifact, folder, items=4, seconds=0.05, **point):
    artifact.file(folder)
    point = OperatingPoint(**{"threads": 1, "floating_precision": "f32", **point})
    return TARGETS[target].profile(artifact, point, [feed(artifact, items=items)], seconds)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("made", [conv_net, transformer, products], ids=lambda f: f.__name__)
def test_costs_are_positive_and_bear_names_of_the_graph_s_nodes(target, made, tmp_path):
    artifact = made()
    costs = profiled(target, artifact, tmp_path)
    known = {n.name for n in artifact.model.graph}
    known |= {value.name for n in artifact.model.graph for value in n.outputs}
    assert costs and all(isinstance(cost, NodeCost) and cost.seconds > 0 and cost.kind for cost in costs)
    telling = [cost for cost in costs if any(name.startswith(tuple(known)) for name in cost.nodes)]
    assert sum(cost.seconds for cost in telling) > 0.5 * sum(cost.seconds for cost in costs)


@pytest.mark.parametrize("target", TARGETS)
def test_each_product_is_found_by_its_name(target, tmp_path):
    costs = profiled(target, products(), tmp_path)
    for number in range(3):
        # OpenVINO calls what makes an output after the output.
        assert any({f"/layer{number}", *(["y"] if number == 2 else [])} & set(cost.nodes) for cost in costs)


@pytest.mark.parametrize("target", TARGETS)
def test_costs_add_up_to_about_what_an_inference_takes(target, tmp_path):
    artifact = products(width=1024)
    costs = profiled(target, artifact, tmp_path, items=16, seconds=0.2, batch=16)
    program = TARGETS[target].lower(artifact, OperatingPoint(threads=1, floating_precision="f32", batch=16))
    batch = feed(artifact, items=16)
    program.run(batch)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        program.run(batch)
        times.append((time.perf_counter() - start) / 16)
    # Anybody may hold the machine up in either measurement; a sum by calls or by items would be 16 times off, and
    # microseconds taken for milliseconds a thousand.
    assert min(times) / 6 < sum(cost.seconds for cost in costs) < max(times) * 6


@pytest.mark.parametrize("target", TARGETS)
def test_every_product_is_told_with_a_cost_of_its_own(target, tmp_path):
    weights = {"w": weight(64, 64), "v": weight(64, 8192)}
    nodes = [
        node("MatMul", "x w", "h", name="/small"), node("MatMul", "h v", "g", name="/large"), node("Softmax", "g", "y"),
    ]  # fmt: skip
    artifact = build(nodes, "x:float32[batch,64]", "y:float32[batch,8192]", weights)
    costs = profiled(target, artifact, tmp_path, items=8, batch=8)
    by_name = {name: sum(c.seconds for c in costs if name in c.nodes) for name in ("/small", "/large")}
    assert by_name["/large"] > 0 and by_name["/small"] > 0
    assert not any({"/large", "/small"} <= set(cost.nodes) for cost in costs)


def test_a_backend_that_does_not_tell_gives_nothing(tmp_path):
    artifact = conv_net()
    artifact.file(tmp_path)
    assert Null().profile(artifact, OperatingPoint(), [feed(artifact)], 0.01) == []


def test_a_profile_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    profiled("onnxruntime", conv_net(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
