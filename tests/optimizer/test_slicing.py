"""Cutting: what may be asked, old opsets, other types, and weights in other places."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from couplings import WIDTH, Net, chosen, cut_of, described, proven, reasons
from ml_dtypes import bfloat16
from models import conv_net, executed, feed, weight

from perwatt.artifact import Artifact, Step
from perwatt.coupling import couple
from perwatt.errors import PassError
from perwatt.slicing import cut

# What is asked --------------------------------------------------------------------------------------------------------


def two_layers():
    net = Net()
    h = net.put("Relu", net.gemm("a", net.feed("x", "batch", 6), 6, WIDTH))
    return net.built(net.gemm("b", h, WIDTH, 4))


def test_cutting_nothing_gives_the_same_model():
    for artifact in (two_layers(), conv_net(), old_net(9)):
        coupling = couple(artifact)
        for units in ({}, {group: [] for group in coupling.groups}):
            assert cut_of(artifact, coupling, units).digest() == artifact.digest()


def test_cutting_all_is_refused():
    artifact = two_layers()
    coupling = couple(artifact)
    with pytest.raises(PassError, match="nothing would be left of what a makes"):
        cut(artifact, coupling, {coupling.groups[0]: range(WIDTH)})


def test_cutting_all_of_a_part_is_refused_too():
    net = Net()
    x = net.feed("x", "batch", 3, 4, 4)
    h = net.put("Concat", net.conv("a", x, 3, 4), net.conv("c", x, 3, 5), axis=1)
    artifact = net.built(net.conv("b", h, 9, 4))
    coupling = couple(artifact)
    with pytest.raises(PassError, match="what c makes"):
        cut(artifact, coupling, {coupling.groups[0]: [1], coupling.groups[1]: range(5)})


@pytest.mark.parametrize("unit", [-1, WIDTH, 100])
def test_units_that_are_not_there_are_refused(unit):
    artifact = two_layers()
    coupling = couple(artifact)
    with pytest.raises(PassError, match=f"units 0 to 7, and none of number {unit}"):
        cut(artifact, coupling, {coupling.groups[0]: [0, unit]})


def test_the_same_unit_twice_goes_once():
    artifact = two_layers()
    coupling = couple(artifact)
    once, twice = (cut_of(artifact, coupling, {coupling.groups[0]: units}) for units in ([3], [3, 3]))
    assert once.digest() == twice.digest()


def test_what_is_cut_can_be_cut_again():
    first, after = proven(old_net(13))
    second, last = proven(after, seed=1)
    assert sum(group.size for group in second.groups) == sum(group.size for group in first.groups) - sum(
        len(units) for units in chosen(first).values()
    )
    assert last.size_bytes() < after.size_bytes()


def test_a_coupling_holds_for_other_weights_of_the_same_graph():
    artifact = two_layers()
    coupling = couple(artifact)
    model = artifact.edit()
    doubled = model.graph.initializers["w0"]
    doubled.const_value = ir.tensor(doubled.const_value.numpy() * 2, name="w0")
    after = cut_of(artifact.after(model, Step("doubled")), coupling, {coupling.groups[0]: [0, 7]})
    plain = artifact.model.graph.initializers["w0"].const_value.numpy()
    np.testing.assert_array_equal(after.model.graph.initializers["w0"].const_value.numpy(), 2 * plain[1:7])


def test_declared_shapes_inside_are_the_new_ones():
    _, after = proven(conv_net())
    assert {v.name: v.shape[1] for n in after.model.graph for v in n.outputs if v.name in ("c1", "r1", "c2", "p", "f")} == {
        "c1": 5, "r1": 5, "c2": 5, "p": 5, "f": 5
    }  # fmt: skip
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)


# Old opsets, other types, other places -------------------------------------------------------------------------------


def old_net(opset):
    """Slices, pads, splits, reductions, axes put in: as attributes where that is how the opset has them."""

    def listed(net, operator, h, since, outputs=1, axis=None, **lists):
        own = {} if axis is None else {"axis": axis}
        if opset < since:
            return net.put(operator, h, outputs=outputs, **own, **lists)
        extra = [net.keep(np.int64(one)) for one in lists.values()]
        return net.put(operator, h, *extra, outputs=outputs, **own)

    net = Net(opset)
    h = net.put("Relu", net.conv("a", net.feed("x", "batch", 3, 6, 6), 3, 12, bias=True))
    h = listed(net, "Slice", h, 10, starts=[2, 0], ends=[2**31 - 1, 6], axes=[1, 2])
    h = listed(net, "Pad", h, 11, pads=[0, 1, 0, 0, 0, 2, 0, 0])
    one, two = listed(net, "Split", h, 13, outputs=2, axis=1, split=[5, 8])
    h = net.put("Concat", two, one, axis=1)
    h = listed(net, "Squeeze", listed(net, "Unsqueeze", h, 13, axes=[2]), 13, axes=[2])
    h = net.conv("b", h, 13, 8, 3)
    h = net.put("Dropout", net.put("Clip", h, min=-1.0, max=1.0) if opset < 11 else net.put("Tanh", h))
    if opset < 9:
        h = net.put("Upsample", h, scales=[1.0, 1.0, 2.0, 2.0], mode="nearest")
    else:
        region = [net.keep(np.zeros(0, np.float32))] if opset > 10 else []
        h = net.put(
            "Upsample" if opset < 10 else "Resize", h, *region, net.keep(np.float32([1, 1, 2, 2])), mode="nearest"
        )
    h = net.norm(h, 8)
    h = (
        net.put("ReduceMean", h, axes=[2, 3], keepdims=0)
        if opset < 18
        else net.put("ReduceMean", h, net.keep(np.int64([2, 3])), keepdims=0)
    )
    return net.built(net.gemm("c", h, 8, 4))


@pytest.mark.parametrize("opset", range(7, 26))
def test_every_opset(opset):
    coupling, after = proven(old_net(opset))
    assert described(coupling) == {"a": (4, "a", "b"), "a'": (6, "a", "b"), "b": (8, "b", "c")}
    assert after.model.opset_imports[""] == opset


def test_repeating_in_the_way_of_opset_6_keeps_everything():
    net = Net(opset=6)
    h = net.conv("a", net.feed("x", 2, 3, 6, 6), 3, WIDTH)
    h = net.put("Add", h, net.noise(WIDTH), broadcast=1, axis=1)
    coupling = couple(net.built(f"{net.conv('b', h, WIDTH, 4)}:float32[2,4,6,6]"))
    assert coupling.groups == [] and "opset 7" in reasons(coupling)["a"]


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_types(dtype):
    net = Net(dtype=dtype)
    h = net.put("Relu", net.gemm("a", net.feed("x", "batch", 6), 6, WIDTH))
    coupling, after = proven(net.built(net.gemm("b", h, WIDTH, 4)), tolerance=1e-2 if dtype == "float16" else 1e-12)
    assert described(coupling) == {"a": (WIDTH, "a", "b")}
    assert {v.const_value.dtype.name for v in after.model.graph.initializers.values()} == {
        {"float16": "FLOAT16", "float64": "DOUBLE"}[dtype]
    }


def test_weights_in_bfloat16():
    net = Net()
    h = net.feed("x", "batch", 6)
    for name, ins, outs in (("a", 6, WIDTH), ("b", WIDTH, 4)):
        h = net.put("MatMul", h, net.put("Cast", net.keep(weight(ins, outs)), to=1), name=name)
    built = net.built(h)
    model = built.edit()
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy().astype(bfloat16), name=value.name)
        value.type = ir.TensorType(ir.DataType.BFLOAT16)
    coupling, after = proven(built.after(model, Step("short")))
    assert described(coupling) == {"a": (WIDTH, "a", "b")}
    assert {v.const_value.dtype.name for v in after.model.graph.initializers.values()} == {"BFLOAT16"}


def test_weights_in_constant_nodes():
    net = Net()
    constants = {}

    def constant(*shape):
        net.seed += 1
        made = net.put("Constant", value=onnx.numpy_helper.from_array(weight(*shape, seed=net.seed)))
        constants[made] = shape
        return made

    h = net.put("MatMul", net.feed("x", "batch", 6), constant(6, WIDTH), name="a")
    h = net.put("Add", h, constant(WIDTH))
    h = net.put("Mul", h, net.put("Constant", value_floats=[0.5 + n for n in range(WIDTH)]))
    coupling, after = proven(net.built(net.put("MatMul", h, constant(WIDTH, 4), name="b")))
    assert described(coupling) == {"a": (WIDTH, "a", "b")}
    assert after.operator_counts() == {"MatMul": 2, "Add": 1, "Mul": 1}


def test_weights_beside_the_file(tmp_path):
    net = Net()
    h = net.put("Relu", net.gemm("a", net.feed("x", "batch", 60), 60, 40))
    h = net.gemm("b", h, 40, 30)
    built = net.built(h)
    file = tmp_path / "net.onnx"
    onnx.save(ir.to_proto(built.model), file, save_as_external_data=True, location="net.data", size_threshold=16)
    beside = Artifact.load(file)
    assert any(isinstance(v.const_value, ir.ExternalTensor) for v in beside.model.graph.initializers.values())
    found, wanted = (cut_of(one, coupling, chosen(coupling)) for one in (beside, built) for coupling in [couple(one)])
    assert found.size_bytes() == wanted.size_bytes() < built.size_bytes()
    ours, theirs = (next(iter(executed(one, [feed(built)]))) for one in (found, wanted))
    np.testing.assert_array_equal(ours[h], theirs[h])
