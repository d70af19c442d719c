"""`tune-quantization`: what quantization lost comes back in the same graph; it refuses what is not quantized."""

import sys
import time
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import build, context, conv_net, executed, feed, node, outputs, weight

pytest.importorskip("torch")

from perwatt.artifact import Step
from perwatt.candidates import explore
from perwatt.contract import Stage
from perwatt.data import Samples
from perwatt.errors import PassError
from perwatt.passes.quantize_int8 import QuantizeInt8
from perwatt.passes.tune_quantization import TuneQuantization
from perwatt.pipeline import Row
from perwatt.recipe import PassStep


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def given(artifact, roles=None, **more):
    """A context with samples for each role."""
    roles = roles or {"learn": 256, "calibrate": 64, "select": 64}
    held = {role: Samples([feed(artifact, items=count, seed=i)]) for i, (role, count) in enumerate(roles.items())}

    def samples(role):
        if role not in held:
            raise PassError(f"there are no samples for {role!r}")
        return held[role]

    return replace(context([], execute=executed), samples=samples, original=artifact, **more)


def coarse(artifact):
    """Quantized to int8, weights then to a sixteenth of the codes, as 4 bits would have."""
    after, _ = QuantizeInt8(bias_correction=False).run(artifact, given(artifact))
    model = after.edit()
    for name, value in model.graph.initializers.items():
        codes = value.const_value.numpy()
        if codes.dtype == np.int8 and codes.ndim > 1:
            value.const_value = ir.Tensor((np.rint(codes / 16).clip(-7, 7) * 16).astype(np.int8), name=name)
    return after.after(model, Step("coarse"))


def far(one, other):
    batch = feed(one, items=64, seed=9)
    old, new = outputs(one, batch)["y"], outputs(other, batch)["y"]
    return float(np.linalg.norm(new - old) / np.linalg.norm(old))


def test_what_rounding_lost_is_learnt_back_in_the_same_graph(cache):
    before = conv_net()
    worse = coarse(before)
    digest = worse.digest()
    made = TuneQuantization(steps=150, batch=32, learning_rate=0.2)
    assert list(made.requires(worse, given(before))) == []
    after, changes = made.run(worse, given(before))
    assert far(before, after) < 0.7 * far(before, worse)
    assert worse.digest() == digest and list(made.ensures(worse, after)) == []
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    assert (
        changes[0].startswith("150 steps in ") and "256 samples to learn from: loss against the original" in changes[0]
    )
    assert "3 weights learnt by float copies, 3 scales" in changes
    assert after.steps[-1] == made.step(changes) and after.signature == before.signature
    assert after.size_bytes() == worse.size_bytes()
    assert not any(path.suffix == ".pt" for path in cache.rglob("*"))


def test_a_changed_graph_breaks_its_promise():
    before = conv_net()
    assert list(TuneQuantization().ensures(before, coarse(before)))


def test_it_takes_the_place_of_what_it_mends_and_comes_last():
    assert TuneQuantization.mends and TuneQuantization.stage is Stage.PRECISION and TuneQuantization.tolerance is None
    before = conv_net()
    tuned = []

    class Line:
        """What a pipeline is to `explore`."""

        def step(self, artifact, made_by):
            reasons = list(made_by.requires(artifact, given(before)))
            if not reasons and isinstance(made_by, TuneQuantization):
                tuned.append(artifact)
            made = artifact if reasons else made_by.run(artifact, given(before))[0]
            return made, Row(settings={}, name=made_by.name(), status="refused" if reasons else "applied")

    steps = [PassStep(name="quantize-int8"), PassStep(name="tune-quantization", settings={"steps": 20, "batch": 32})]
    branches = explore(Line(), before, steps)
    assert [branch.applied() for branch in branches] == [[], ["quantize-int8", "tune-quantization"]]
    assert len(tuned) == 1 and tuned[0] is not branches[1].artifact


def test_what_is_not_quantized_is_refused():
    before = conv_net()
    (reason,) = TuneQuantization().requires(before, given(before))
    assert "no weight is stored as codes" in reason
    worse = coarse(before)
    assert list(TuneQuantization().requires(worse, replace(given(before), original=None))) == [
        "the original isn't there to learn from"
    ]


def test_codes_with_scales_in_half_precision_are_refused_with_what_to_do():
    nodes = [node("DequantizeLinear", "q s", "w"), node("MatMul", "x w", "y")]
    weights = {"q": np.ones((6, 6), np.int8), "s": np.float16(0.1)}
    net = build(nodes, "x:float16[batch,6]", "y:float16[batch,6]", weights, opset=21)
    (reason,) = TuneQuantization().requires(net, given(net))
    assert "rest: float32" in reason


def test_without_torch_it_says_how_to_get_it(monkeypatch):
    before = conv_net()
    worse = coarse(before)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert any("pip install" in reason for reason in TuneQuantization().requires(worse, given(before)))


def test_without_samples_to_learn_from_those_to_calibrate_on_serve():
    before = conv_net()
    after, changes = TuneQuantization(steps=40, batch=16).run(coarse(before), given(before, {"calibrate": 200}))
    assert "180 samples to calibrate on, as there are none to learn from" in changes[0]
    assert after.steps[-1].name == "tune-quantization"
    with pytest.raises(PassError, match="12 samples to learn from are too few"):
        TuneQuantization(steps=5).run(coarse(before), given(before, {"calibrate": 12}))


def test_where_nothing_is_gained_it_stays_as_it_was():
    nodes = [node("DequantizeLinear", "q s", "w", axis=1), node("MatMul", "x w", "y")]
    weights = {"q": np.arange(-18, 18, dtype=np.int8).reshape(6, 6), "s": np.abs(weight(6)) + 0.1}
    net = build(nodes, "x:float32[batch,6]", "y:float32[batch,6]", weights, opset=21)
    after, changes = TuneQuantization(steps=10, batch=32).run(net, given(net))
    assert after is net and changes[0].startswith("nothing was gained in 10 steps")


def test_the_deadline_is_kept():
    before = conv_net()
    worse = coarse(before)
    start = time.monotonic()
    TuneQuantization(minutes=10.0, batch=32).run(worse, given(before, deadline=time.monotonic() + 2.0))
    assert time.monotonic() - start < 60
    with pytest.raises(PassError, match="no time left"):
        TuneQuantization().run(worse, given(before, deadline=time.monotonic() - 1.0))


@pytest.mark.parametrize("settings", [{"minutes": 0.0}, {"steps": -1}, {"batch": 1}, {"learning_rate": 0.0}])
def test_settings_that_make_no_sense_are_errors(settings):
    before = conv_net()
    with pytest.raises(PassError):
        TuneQuantization(**settings).run(coarse(before), given(before))
