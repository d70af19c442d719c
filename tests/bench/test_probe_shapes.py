"""Which channel multiple pays: the rule on scripted costs, the sweep on this machine."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perwatt.bench import probe_shapes
from perwatt.bench.probe_shapes import CHANNELS, MULTIPLES, judge, smallest, sweep


def stepped(multiple, power):
    """Cost of a backend that rounds channels up to `multiple`."""
    return {n: (multiple * math.ceil(n / multiple)) ** power for n in CHANNELS}


@pytest.mark.parametrize("multiple", MULTIPLES)
@pytest.mark.parametrize("power", [1, 2])
def test_the_multiple_that_a_scripted_backend_rounds_up_to_is_found(multiple, power):
    assert judge(stepped(multiple, power))[0] == multiple


@given(st.floats(0.0, 2.0), st.floats(0.0, 1e3))
def test_smooth_cost_has_no_multiple(power, start):
    """Cost that grows evenly or faster; what grows more slowly than the count is a fixed cost and a rest that does."""
    multiple, extra = judge({n: start + n ** max(1.0, power) for n in CHANNELS})
    assert multiple is None and set(extra) == set(MULTIPLES) and all(share <= 1e-9 for share in extra.values())


@given(st.sampled_from(MULTIPLES), st.floats(1e-6, 1e6))
def test_the_unit_of_time_does_not_matter(multiple, unit):
    cost = stepped(multiple, 2)
    assert judge({n: unit * seconds for n, seconds in cost.items()})[0] == judge(cost)[0]


def test_a_multiple_without_counts_between_is_not_judged():
    assert judge({32: 1.0, 64: 2.0}) == (None, {})
    assert set(judge({64: 1.0, 96: 2.0, 128: 2.0})[1]) == {64}


def test_a_pass_that_knows_no_shape_gets_what_pays_in_each():
    found = {
        "convolution": {"int8": {"multiple": 32}, "f32": {"multiple": 16}, "bf16": {"multiple": 16}},
        "matmul": {"int8": {"multiple": 64}, "f32": {"multiple": None}},
    }
    assert smallest(found) == {"int8": 32, "bf16": 16}
    assert smallest({}) == {}


def test_this_machine_is_swept_in_kernels_of_the_type(monkeypatch):
    monkeypatch.setattr(probe_shapes, "CHANNELS", (32, 40, 48))
    said = []
    found = sweep(["f32"], said.append)
    assert said == ["channels: convolution, f32", "channels: matmul, f32"]
    for shape in ("convolution", "matmul"):
        facts = found[shape]["f32"]
        assert set(facts["latency_us"]) == {"32", "40", "48"} and all(us > 0 for us in facts["latency_us"].values())
        assert all(name.endswith("f32") for name in facts["kernels"]) and set(facts["extra"]) == {"16"}


def test_a_type_that_no_kernel_here_runs_in_is_left_out(monkeypatch):
    monkeypatch.setattr(probe_shapes, "CHANNELS", (32,))
    monkeypatch.setattr(probe_shapes, "KERNEL_ENDINGS", {"f32": ("scripted",)})
    assert sweep(["f32"]) == {}
