"""Learning on scikit-learn's digits: a network with half its channels gone and quantized ones in several dialects learn back
what they lost; codes are those that were learnt through; scales that belong together stay together; no run makes it worse."""

from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import build, node, outputs, transformer, weight

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("sklearn.datasets")

from perwatt import distillation  # noqa: E402
from perwatt.artifact import Artifact, Step  # noqa: E402
from perwatt.data import Samples  # noqa: E402
from perwatt.distillation import Plan, distil  # noqa: E402
from perwatt.errors import BackendError  # noqa: E402
from perwatt.interpreter import Interpreter  # noqa: E402
from perwatt.learning_codes import learnable  # noqa: E402
from perwatt.learning_quantized import Tuning, TuningPlan, tune  # noqa: E402

STEP = Step("learn")
LAYERS = {"w1": (12, 1, 3, 3), "w2": (24, 12, 3, 3), "w3": (24, 24, 3, 3), "w4": (24, 10)}


@cache
def digits():
    """(pictures float32 [1797, 1, 8, 8], labels), shuffled."""
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    pictures = (images[order].reshape(-1, 1, 8, 8).astype(np.float32) - 4.9) / 6.0
    return pictures, labels[order].astype(np.int64)


def network(weights, through=None):
    """Three convolutions and a Gemm: x:float32[batch,1,8,8] to y:float32[batch,10]. `through`: nodes in front of each layer,
    and what its two inputs are called then."""
    through = through or {}
    data = {
        name: through.get(name, ([], (into, name))) for name, into in zip(LAYERS, ("x", "r1", "r2", "f"), strict=True)
    }
    nodes = []
    for number, stride in ((1, 1), (2, 2), (3, 2)):
        before, inputs = data[f"w{number}"]
        nodes += [
            *before,
            node("Conv", f"{' '.join(inputs)} b{number}", f"c{number}", pads=[1] * 4, strides=[stride] * 2),
            node("Relu", f"c{number}", f"r{number}"),
        ]
    before, inputs = data["w4"]
    nodes += [node("GlobalAveragePool", "r3", "p"), node("Flatten", "p", "f"), *before]
    nodes += [node("Gemm", f"{' '.join(inputs)} b4", "y")]
    return build(nodes, "x:float32[batch,1,8,8]", "y:float32[batch,10]", weights, opset=21)


@cache
def trained():
    """The network after some epochs on 1,000 digits."""
    widths = {name: shape[1] if name == "w4" else shape[0] for name, shape in LAYERS.items()}
    fans = {name: shape[0] if name == "w4" else shape[1] * 9 for name, shape in LAYERS.items()}
    start = {
        name: weight(*shape, scale=(2 / fans[name]) ** 0.5, seed=i) for i, (name, shape) in enumerate(LAYERS.items())
    }
    start |= {f"b{i}": np.zeros(width, np.float32) for i, width in enumerate(widths.values(), start=1)}
    artifact = network(start)
    net = Interpreter(artifact.model)
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    x, y = (torch.from_numpy(array[:1000]) for array in digits())
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    torch.manual_seed(0)
    for _ in range(12):
        for at in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[at])[0], y[at]).backward()
            optimizer.step()
    made = net.write_back(artifact, Step("train"))
    assert accuracy(made) > 0.95
    return made


def accuracy(artifact):
    """On the 500 digits that nothing learns from."""
    pictures, labels = digits()
    return float((outputs(artifact, {"x": pictures[1297:]})["y"].argmax(1) == labels[1297:]).mean())


def given(labels=False):
    """(samples to learn from, samples to select by)."""
    pictures, names = digits()
    return Samples([{"x": pictures[:1000]}], names[:1000] if labels else None), Samples([{"x": pictures[1000:1297]}])


def array(artifact, name):
    return artifact.model.graph.initializers[name].const_value.numpy()


def weights_of(artifact):
    return {name: value.const_value.numpy() for name, value in artifact.model.graph.initializers.items()}


# Pruned -----------------------------------------------------------------------------------------------------------------


@cache
def halved():
    """Half the channels of the second and the third convolution are zeros."""
    weights = weights_of(trained())
    for name in ("2", "3"):
        for kind in "wb":
            weights[kind + name] = weights[kind + name].copy()
            weights[kind + name][::2] = 0
    return network(weights)


@pytest.mark.parametrize("labels", [False, True])
def test_half_the_channels_gone_is_learnt_back(labels):
    lost = accuracy(trained()) - accuracy(halved())
    assert lost > 0.2
    learnt = distil(halved(), trained(), *given(labels), Plan(steps=240, batch=50), print, None, STEP)
    assert accuracy(trained()) - accuracy(learnt.artifact) < 0.15 * lost
    assert (array(learnt.artifact, "w2")[::2] == 0).all()


# Quantized --------------------------------------------------------------------------------------------------------------

INT4 = ir.DataType.INT4.numpy()
UINT4 = ir.DataType.UINT4.numpy()


def stored(weight, kind, axis, block=0):
    """(codes, scale, zero point) of a weight, coarse: its peak is the greatest code."""
    limits = {np.dtype(np.int8): (-127, 127, 0), np.dtype(np.uint8): (0, 255, 128), INT4: (-8, 7, 0), UINT4: (0, 15, 8)}
    low, high, zero = limits[np.dtype(kind)]
    shape = [-1 if one == axis else 1 for one in range(weight.ndim)]
    if block:
        folded = np.abs(weight).reshape(*weight.shape[:axis], -1, block, *weight.shape[axis + 1 :]).max(axis + 1)
        scale = (folded / (high - zero)).astype(np.float32)
        wide = scale.repeat(block, axis)
    else:
        over = tuple(one for one in range(weight.ndim) if one != axis)
        scale = (np.abs(weight).max(axis=None if axis is None else over) / (high - zero)).astype(np.float32)
        wide = scale if axis is None else scale.reshape(shape)
    codes = np.clip(np.rint(weight / wide) + zero, low, high).astype(kind)
    return codes, scale, np.full(scale.shape, zero, kind)


def quantized(kind=np.int8, per_channel=True, zero=True, twice=False, wrong=1.0, block=0):
    """The trained network with codes for weights, and pairs on activations whose scales are `wrong` by that factor; with
    `twice` the scales of Q and DQ are written down separately."""
    weights, through = weights_of(trained()), {}
    net = Interpreter(trained().model)
    seen = torch.fx.Interpreter(net.program)
    values = {}
    run = seen.run_node
    seen.run_node = lambda n: values.setdefault(n.name, run(n))
    with torch.no_grad():
        seen.run(torch.from_numpy(digits()[0][:200]))
    peaks = {"x": 3.0} | {
        f"r{i}": float(found.max())
        for i, found in enumerate((v for n, v in values.items() if "Relu" in n or "relu" in n), start=1)
    }
    peaks["f"] = float(next(v for n, v in values.items() if "Flatten" in n).max())
    for name, into in zip(LAYERS, ("x", "r1", "r2", "f"), strict=True):
        axis = (1 if name == "w4" else 0) if per_channel else None
        blocked = block if name == "w4" else 0
        axis = 0 if blocked else axis
        codes, scale, point = stored(weights.pop(name), kind, axis, blocked)
        weights |= {f"{name}_q": codes, f"{name}_s": scale, **({f"{name}_z": point} if zero else {})}
        weights |= {f"{into}_s": np.float32(wrong * peaks[into] / 127), f"{into}_z": np.int8(0)}
        if twice:
            weights |= {f"{into}_s2": weights[f"{into}_s"].reshape(1), f"{into}_z2": np.int8([0])}
        other = "2" if twice else ""
        settings = {} if axis is None else {"axis": axis}
        settings |= {"block_size": blocked} if blocked else {}
        pair = [
            node("QuantizeLinear", f"{into} {into}_s {into}_z", f"{into}_q"),
            node("DequantizeLinear", f"{into}_q {into}_s{other} {into}_z{other}", f"{into}_d"),
            node("DequantizeLinear", f"{name}_q {name}_s" + (f" {name}_z" if zero else ""), f"{name}_d", **settings),
        ]
        through[name] = pair, (f"{into}_d", f"{name}_d")
    return network(weights, through)


def learn(student, folder=None, said=None, samples=None, **plan):
    plan = TuningPlan(**{"steps": 120, "batch": 50, "learning_rate": 0.1, **plan})
    return tune(
        student, trained(), *(samples or given()), plan, (said if said is not None else []).append, folder, STEP
    )


DIALECTS = {
    "int8, poor scales": {"wrong": 6.0},
    "int8, scales written twice": {"wrong": 6.0, "twice": True},
    "int8 without zero points": {"wrong": 6.0, "zero": False, "per_channel": False},
    "uint8": {"kind": np.uint8, "wrong": 6.0},
    "int4": {"kind": INT4},
    "uint4, in blocks": {"kind": UINT4, "block": 8},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_quantized_networks_learn_back_and_the_file_computes_what_was_learnt(dialect):
    student = quantized(**DIALECTS[dialect])
    learnt = learn(student, learning_rate=0.2)
    after = learnt.artifact
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    assert learnt.after < 0.5 * learnt.before and learnt.step > 0
    assert accuracy(after) >= accuracy(trained()) - 0.02
    assert (
        after.signature == student.signature and after.steps[-1] == STEP and len(after.steps) == len(student.steps) + 1
    )
    types = {name: value.dtype for name, value in student.model.graph.initializers.items()}
    assert {name: value.dtype for name, value in after.model.graph.initializers.items()} == types
    # Codes moved, and the same graph computes with them.
    assert not np.array_equal(array(student, "w2_q"), array(after, "w2_q"))
    assert [n.op_type for n in after.model.graph] == [n.op_type for n in student.model.graph]
    batch = {"x": digits()[0][:64]}
    np.testing.assert_allclose(
        outputs(after, batch)["y"], Interpreter(after.model).run(batch)["y"], rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_written_is_bit_for_bit_what_was_learnt(dialect):
    student = quantized(**DIALECTS[dialect])
    work = Tuning(student, trained(), *given(), TuningPlan(steps=6, batch=50, learning_rate=0.5))
    batch = {"x": digits()[0][:64]}
    start = Interpreter(student.model).run(batch)["y"]
    np.testing.assert_array_equal(work.network.run(batch)["y"], start)
    while not work.over():
        work.learn()
    work.kept, work.best_step = work._state(), work.done
    found = work.network.eval().run(batch)["y"]
    assert np.abs(found - start).max() > 1e-3
    written = work.finished(STEP).artifact
    np.testing.assert_array_equal(Interpreter(written.model).run(batch)["y"], found)


def test_the_lowest_code_stays_out_where_it_was_out():
    student = quantized()
    assert all(array(student, f"{name}_q").min() == -127 for name in LAYERS)
    learnt = learn(student, steps=30, learning_rate=3.0, samples=given())
    work = Tuning(student, trained(), *given(), TuningPlan(steps=20, batch=50, learning_rate=5.0))
    while not work.over():
        work.learn()
    work.kept, work.best_step = work._state(), work.done
    for made in (learnt.artifact, work.finished(STEP).artifact):
        assert all(array(made, f"{name}_q").min() >= -127 for name in LAYERS)


def test_scales_are_learnt_on_request_and_those_written_twice_stay_equal():
    student = quantized(wrong=6.0, twice=True)
    after = learn(student, steps=60).artifact
    assert array(after, "r1_s") < 0.9 * array(student, "r1_s")
    for name in ("x", "r1", "r2", "f"):
        assert array(after, f"{name}_s2").shape == (1,) and array(after, f"{name}_s2")[0] == array(after, f"{name}_s")
    kept = learn(student, steps=60, scales=False).artifact
    assert all((array(kept, f"{n}_s") == array(student, f"{n}_s")).all() for n in ("x", "r1", "r2", "f", "w1"))
    # Scales of weights never move.
    assert np.array_equal(array(after, "w2_s"), array(student, "w2_s"))


def test_the_same_steps_twice_are_the_same_network():
    student = quantized(wrong=4.0)
    one, two, other = (learn(student, steps=20, seed=seed) for seed in (0, 0, 1))
    assert one.artifact.digest() == two.artifact.digest() != other.artifact.digest()


def test_what_only_gets_worse_is_given_back_as_it_was():
    student = quantized()
    learnt = learn(student, steps=8, learning_rate=100.0)
    assert learnt.artifact is student and learnt.step == 0 and learnt.after == learnt.before


def test_zeros_of_a_pruned_network_stay():
    student = quantized(wrong=4.0)
    model = student.edit()
    codes = array(student, "w2_q").copy()
    codes.reshape(-1)[::2] = 0
    model.graph.initializers["w2_q"].const_value = ir.Tensor(codes, name="w2_q")
    pruned = student.after(model, Step("prune-weights"))
    after = array(learn(pruned, steps=40).artifact, "w2_q")
    assert (after[codes == 0] == 0).all() and (after != codes).any()
    free = array(learn(student.after(model, Step("other")), steps=40).artifact, "w2_q")
    assert (free[codes == 0] != 0).any()


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "CHECKPOINT_S", 0.0)
    student = quantized(wrong=6.0)

    class Killed(BaseException):
        pass

    class Ear(list):
        def append(self, text):
            super().append(text)
            if len(self) == 8:
                raise Killed

    with pytest.raises(Killed):
        learn(student, tmp_path, Ear(), steps=64)
    said = []
    # How much time is left now is another number than it was then.
    learnt = learn(student, tmp_path, said, steps=64, seconds=77.0)
    assert said[0].startswith("tune-quantization: ") and " left, step " in said[0]
    assert 28 <= int(said[0].split("step ")[1].split(",")[0]) <= 36
    assert learnt.steps == 64 and learnt.after < learnt.before and not list(tmp_path.iterdir())


# What is left alone -----------------------------------------------------------------------------------------------------


def plain_pair(**more):
    """x quantized, times a matrix of codes, plus what `more` says: (nodes, weights)."""
    nodes = [
        node("QuantizeLinear", "x xs xz", "xq"),
        node("DequantizeLinear", "xq xs xz", "xd"),
        node("DequantizeLinear", "w ws", "wd", axis=1),
    ]
    codes = np.arange(-18, 18, dtype=np.int8).reshape(6, 6)
    weights = {"xs": np.float32(0.05), "xz": np.int8(0), "w": codes, "ws": np.full(6, 0.02, np.float32), **more}
    return nodes, weights


def test_biases_in_integers_keep_themselves_and_all_scales():
    nodes, weights = plain_pair(b=np.arange(6, dtype=np.int32), bs=np.full(6, 0.001, np.float32))
    nodes += [node("DequantizeLinear", "b bs", "bd", axis=0), node("Gemm", "xd wd bd", "y")]
    found = learnable(build(nodes, "x:float32[batch,6]", "y:float32[batch,6]", weights, opset=21))
    assert [one.name for one in found.codes] == ["w"] and found.fixed
    teacher = build([node("MatMul", "x w", "y")], "x:float32[batch,6]", "y:float32[batch,6]", {"w": weight(6, 6)})
    data = Samples([{"x": weight(128, 6, scale=1.0)}])
    student = build(nodes, "x:float32[batch,6]", "y:float32[batch,6]", weights, opset=21)
    learnt = tune(student, teacher, data, data, TuningPlan(steps=20, batch=32, learning_rate=0.5), lambda text: None)
    assert learnt.step > 0
    changed = {n for n, a in weights_of(student).items() if not np.array_equal(a, array(learnt.artifact, n))}
    assert changed == {"w"}


def test_codes_that_are_read_in_two_ways_or_as_such_are_no_weights_to_learn():
    nodes, weights = plain_pair(other=np.full(6, 0.5, np.float32))
    nodes += [
        node("DequantizeLinear", "w other", "wo", axis=1),
        node("MatMul", "xd wd", "a"),
        node("MatMul", "x wo", "b"),
    ]
    nodes += [node("Add", "a b", "y")]
    twice = build(nodes, "x:float32[batch,6]", "y:float32[batch,6]", weights, opset=21)
    assert learnable(twice).codes == ()
    with pytest.raises(BackendError, match="nothing is stored as codes"):
        Tuning(twice, twice, Samples([]), Samples([]), TuningPlan(steps=1))


def test_codes_that_two_nodes_read_alike_are_learnt_once():
    nodes, weights = plain_pair()
    nodes += [node("DequantizeLinear", "w ws", "wo", axis=1), node("MatMul", "xd wd", "a"), node("MatMul", "a wo", "y")]
    shared = build(nodes, "x:float32[batch,6]", "y:float32[batch,6]", weights, opset=21)
    found = learnable(shared)
    assert [one.name for one in found.codes] == ["w"]
    batch = {"x": weight(4, 6)}
    np.testing.assert_array_equal(
        Interpreter(found.artifact.model, straight_through=True).run(batch)["y"],
        Interpreter(shared.model).run(batch)["y"],
    )
    assert Artifact(model=shared.model).digest() == shared.digest()


def test_a_scale_that_serves_a_weight_and_an_activation_stays():
    nodes, weights = plain_pair()
    nodes[2] = node("DequantizeLinear", "w xs", "wd")
    nodes += [node("MatMul", "xd wd", "y")]
    found = learnable(build(nodes, "x:float32[batch,6]", "y:float32[batch,6]", weights, opset=21))
    assert found.activations == () and len(found.codes) == 1


def test_a_network_without_quantization_has_nothing_to_tune():
    net = transformer()
    with pytest.raises(BackendError, match="nothing is stored as codes"):
        tune(net, net, Samples([]), Samples([]), TuningPlan(steps=1), lambda text: None)
