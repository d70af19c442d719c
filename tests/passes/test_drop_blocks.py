"""`drop-blocks`: those blocks go without which outputs move least for what they cost, and as many as was asked for."""

import time
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import ask, build, context, control_flow, executed, feed, node, outputs, weight
from residuals import IMAGE, WIDTH, WORDS, Net, attention, basic, bottleneck, chain, inverted, mlp, squeezed, whole

from perwatt.artifact import Artifact, Step
from perwatt.contract import NodeCost
from perwatt.errors import BackendError, PassError
from perwatt.passes._block_redundancy import SWITCHES, Movement, likeness, switched
from perwatt.passes._naming import with_names
from perwatt.passes._residual_blocks import residual_blocks, without
from perwatt.passes.drop_blocks import DropBlocks


def given_by(artifact, items=12, **asked):
    return context([feed(artifact, items=items)], execute=executed, **({"profile": lambda _: []} | asked))


def dropped(artifact, given=None, **settings):
    """(result, changes) of a run that left the model it was given as it was."""
    digest = artifact.digest()
    after, changes = DropBlocks(**settings).run(artifact, given or given_by(artifact))
    assert Artifact(model=artifact.model).digest() == digest
    assert after is artifact or list(after.steps[-1].changes) == changes
    whole(after, artifact)
    return after, changes


# Which ones go ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choose", ["output", "cosine"])
@pytest.mark.parametrize(
    "kinds, kind", [((basic, basic, basic, inverted), IMAGE), ((attention, mlp, attention, mlp), WORDS)]
)
def test_a_branch_of_zeros_goes_first_and_nothing_changes(kinds, kind, choose):
    for empty in range(len(kinds)):
        net = Net(kind)
        net.at = net.op("Relu", net.at)
        for number, made in enumerate(kinds):
            made(net, f"/block{number}", scale=0 if number == empty else 0.3)
        artifact = net.artifact()
        after, changes = dropped(artifact, blocks=1, choose=choose)
        assert changes[0].startswith(f"1 of {len(kinds)} residual blocks dropped")
        assert changes[1:3] == [f"dropped: /block{empty}", "outputs move by 0.0% on 12 samples"]
        old, new = whole(after, artifact)
        assert np.allclose(old["y"], new["y"], atol=1e-6)


def test_movement_is_relative_to_the_outputs_and_counts_each_alike():
    net = Net(WORDS)
    mlp(net, "/block0")
    mlp(net, "/block1")
    first = net.op("Mul", f"{net.at} {net.stored(np.float32(100))}")
    net.nodes.append(node("ArgMax", net.at, "place", name="/argmax"))
    net.nodes.append(node("Identity", first, "big", name="/big"))
    net.nodes.append(node("Tanh", net.at, "y", name="/tanh"))
    artifact = with_names(
        build(net.nodes, f"x:{WORDS}", f"y:{WORDS} big:{WORDS} place:int64[batch,1,{WIDTH}]", net.weights), Step("test")
    )
    given, blocks = given_by(artifact), residual_blocks(artifact).found
    (moved,) = Movement(artifact, blocks, given.samples(""), given).of([{"/block1"}])
    batch = feed(artifact, items=12)
    old, new = outputs(artifact, batch), outputs(without(artifact, blocks[1:], Step("drop")), batch)
    shares = [np.linalg.norm(new[name] - old[name]) / np.linalg.norm(old[name]) for name in ("y", "big")]
    assert np.isclose(moved, np.mean(shares), rtol=1e-4) and moved > 0.01


@pytest.mark.parametrize("opset", [11, 23])
@pytest.mark.parametrize("kind", [IMAGE, WORDS])
def test_likeness_is_the_cosine_along_the_channels(kind, opset):
    net = Net(kind, opset)
    net.at = net.op("Relu", net.at)
    before = net.at
    net.add(net.conv(net.at) if kind == IMAGE else net.linear(net.at), called="/block")
    after = net.at
    artifact = net.artifact(before, after)
    given = given_by(artifact, items=11)
    got = likeness(artifact, residual_blocks(artifact).found, given.samples(""), given)
    found = outputs(artifact, feed(artifact, items=11))
    a, b, axis = found[before], found[after], 1 if kind == IMAGE else -1
    sizes = np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
    expected = np.mean(np.divide((a * b).sum(axis), sizes, out=np.zeros_like(sizes), where=sizes > 0))
    assert np.isclose(got["/block"], expected, atol=1e-4) and 0.1 < expected < 0.99


def costing(slow):
    """A profile in which only these nodes take time."""
    return lambda made: [NodeCost((n.name,), n.op_type, 1.0 if n.name in slow else 1e-6) for n in made.model.graph]


def test_what_costs_more_goes_first_where_outputs_move_alike():
    artifact = chain(inverted, bottleneck, squeezed)
    plain, _ = dropped(artifact, given_by(artifact, profile=costing(())), blocks=1)
    slow = next(block for block in residual_blocks(artifact).found if block.name in {n.name for n in plain.model.graph})
    after, changes = dropped(artifact, given_by(artifact, profile=costing(slow.nodes)), blocks=1)
    assert changes[1] == f"dropped: {slow.name}" and slow.name not in {n.name for n in after.model.graph}
    assert "100% of what they cost" in changes[0]


def test_blocks_that_do_the_same_cost_the_same_whatever_a_profile_says():
    artifact = chain(inverted, inverted, inverted)
    plain, changes = dropped(artifact, given_by(artifact, profile=costing(())), blocks=1)
    assert "33% of what they cost" in changes[0]
    for block in residual_blocks(artifact).found:
        after, told = dropped(artifact, given_by(artifact, profile=costing(block.nodes)), blocks=1)
        assert after.digest() == plain.digest() and told == changes


def test_a_backend_that_tells_nothing_is_no_obstacle():
    def profile(made):
        raise BackendError("no")

    artifact = chain(inverted, basic)
    assert dropped(artifact, given_by(artifact, profile=profile), blocks=1)[0] is not artifact


@pytest.mark.parametrize("ratio, count", [(0.01, 0), (0.13, 1), (0.3, 1), (0.5, 2), (0.7, 3), (1.0, 4)])
@pytest.mark.parametrize("choose", ["output", "cosine"])
def test_as_many_go_as_come_nearest_to_the_ratio(ratio, count, choose):
    artifact = chain(basic, basic, basic, basic)
    after, changes = dropped(artifact, ratio=ratio, choose=choose)
    assert after.operator_counts()["Relu"] == 9 - 2 * count and after.operator_counts().get("Conv", 0) == 2 * (
        4 - count
    )
    assert (after is artifact) == (count == 0)
    assert changes[0].endswith("4 blocks stay") if not count else changes[0].startswith(f"{count} of 4")
    assert not count or f"{count / 4:.0%} of what they cost" in changes[0]


@pytest.mark.parametrize("units, allowed", [("single", {1, 2}), ("layer", {2}), ("auto", {1, 2})])
def test_layers_go_whole_where_that_is_asked_for(units, allowed):
    artifact = chain(attention, mlp, attention, mlp, kind=WORDS)
    _, changes = dropped(artifact, blocks=2, units=units)
    names = changes[1].removeprefix("dropped: ").split(", ")
    assert len(names) == 2
    if units == "layer":
        assert names in (["/block0", "/block1"], ["/block2", "/block3"])
    one, _ = dropped(artifact, blocks=1, units=units)
    assert (one is artifact) == (1 not in allowed)


def test_nested_blocks_count_once_and_go_together():
    net = Net()
    start = net.at = net.op("Relu", net.at)
    inverted(net, "/inner")
    net.add(net.conv(net.at), start, "/outer")
    inverted(net, "/other")
    artifact = net.artifact()
    after, changes = dropped(artifact, ratio=1.0)
    assert changes[0].startswith("3 of 3 residual blocks dropped, 100%") and len(after.model.graph) == 2
    assert "/outer" not in dropped(artifact, blocks=1)[1][1]


def test_excluded_blocks_stay():
    artifact = chain(basic, basic, basic, basic)
    inside = next(iter(sorted(residual_blocks(artifact).found[2].nodes)))
    after, changes = dropped(artifact, ratio=1.0, exclude=("/block[01]", inside))
    assert changes[1] == "dropped: /block3" and changes[-1] == "3 left: excluded (/block0, /block1, /block2)"
    assert {"/block0", "/block1", "/block2"} <= {n.name for n in after.model.graph}
    with pytest.raises(PassError, match="matches no node"):
        dropped(artifact, exclude=("/nothing",))


def test_progress_counts_and_time_ends_it():
    artifact = chain(basic, basic, basic)
    told = []
    given = replace(given_by(artifact), progress=told.append)
    dropped(artifact, given, blocks=2)
    assert told[0] == "drop-blocks: 0 of 3 blocks dropped, 1 of 3 choices measured"
    assert told[-1] == "drop-blocks: 1 of 3 blocks dropped, 2 of 2 choices measured" and len(told) == 5
    late = replace(given_by(artifact), deadline=time.monotonic() - 1)
    after, changes = dropped(artifact, late, blocks=2)
    assert after is artifact and changes[0] == "out of time after 0 choices were measured; 3 blocks stay"


@pytest.mark.parametrize("settings", [{"blocks": 0}, {"ratio": 0.0}, {"ratio": 1.5}, {"judged_on": 0}])
def test_senseless_settings_are_refused(settings):
    artifact = chain(basic)
    with pytest.raises(PassError) as caught:
        DropBlocks(**settings).run(artifact, given_by(artifact))
    assert caught.value.fix.startswith(next(iter(settings)))


def test_without_samples_nothing_can_be_chosen():
    with pytest.raises(PassError, match="no samples"):
        DropBlocks().run(chain(basic), context([], execute=executed))


def test_half_precision_and_fixed_batches_are_measured_too():
    nodes = [
        node("MatMul", "x w", "h", name="/h"),
        node("Add", "x h", "s", name="/block"),
        node("Tanh", "s", "y", name="/t"),
    ]
    for batch, kind in (("batch", "float16"), (4, "float32"), (40, "float32")):
        artifact = build(nodes, f"x:{kind}[{batch},8]", f"y:{kind}[{batch},8]", {"w": weight(8, 8, dtype=kind)})
        given = context(
            [feed(artifact, items=80)] if batch == "batch" else [{"x": weight(80, 8)}],
            execute=executed,
            profile=lambda _: [],
        )
        after, changes = DropBlocks(blocks=1).run(artifact, given)
        assert len(after.model.graph) == 1 and after.signature == artifact.signature
        off = feed(artifact, items=batch if isinstance(batch, int) else 4)
        found = outputs(switched(artifact, residual_blocks(artifact).found), {**off, SWITCHES: np.float32([[0]])})
        assert np.allclose(found["y"], np.tanh(off["x"]), atol=1e-3)
        assert 0.05 < float(changes[2].split()[3].rstrip("%")) / 100 < 2


# Models that are left -----------------------------------------------------------------------------------------------


def test_models_without_blocks_and_with_graphs_inside_come_back():
    artifact = control_flow()
    after, changes = DropBlocks().run(artifact, given_by(artifact))
    assert after is artifact and changes == ["no residual block to drop"]
    assert any("quantized already" in reason for reason in ask(DropBlocks(), quantized()))
    assert not ask(DropBlocks(), chain(basic))


def quantized():
    nodes = [
        node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d"), node("Conv", "d w", "c", pads=[1] * 4),
        node("Add", "c d", "y"),
    ]  # fmt: skip
    weights = {"s": np.float32(0.1), "z": np.int8(0), "w": weight(WIDTH, WIDTH, 3, 3)}
    return build(nodes, f"x:{IMAGE}", f"y:{IMAGE}", weights)


# Whole architectures ----------------------------------------------------------------------------------------------------


BLOCKS = {
    "bert": 4, "minilm": 6, "vit": 4, "llama": 4, "gpt2": 4, "whisper": 4, "resnet50": 2, "mobilenetv2": 10, "efficientnet": 3,
    "convnext": 4, "swin": 8,
}  # fmt: skip
"""Network → residual blocks, from its configuration."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fused", "form"),
    [
        *((name, fused, "dynamo") for name in BLOCKS for fused in (False, True)),
        *((name, False, "script") for name in ("bert", "llama", "mobilenetv2", "swin")),
    ],
)
def test_architectures_lose_a_third_of_their_blocks_without_a_broken_shape(name, fused, form):
    networks = pytest.importorskip("small_networks")
    make = getattr(networks, name)
    artifact = networks.exported(make, "sdpa", form)
    batch = networks.inputs(make, 2)
    if fused:
        artifact = networks.fused(artifact, networks.allowing(*networks.OPERATORS), batch)
    blocks = residual_blocks(with_names(artifact, Step("test"))).found
    assert len(blocks) == BLOCKS[name]
    given = context([networks.inputs(make, 8)], execute=executed, profile=lambda _: [])
    after, changes = DropBlocks(judged_on=4).run(artifact, given)
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    assert after.signature == artifact.signature and len(after.model.graph) < len(artifact.model.graph)
    old, new = outputs(artifact, batch), outputs(after, batch)
    assert all(new[key].shape == array.shape and np.isfinite(new[key]).all() for key, array in old.items()), changes
