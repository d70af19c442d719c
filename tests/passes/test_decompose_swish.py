"""`decompose-swish`: the two forms, the types, for which targets, and what is left."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import ask, build, context, feed, node, outputs, run_twice

from perwatt.contract import Capabilities
from perwatt.drift import drift
from perwatt.passes.decompose_swish import DecomposeSwish
from perwatt.passes.fuse_swish import FuseSwish


def swish(alpha=None, dtype="float32", of="batch,6", typed=True):
    """Relu, so that the type in between may be unknown, and a Swish."""
    attributes = {} if alpha is None else {"alpha": alpha}
    nodes = [node("Relu", "x", "r"), node("Swish", "r", "y", **attributes)]
    inner = f"r:{dtype}[{of}]" if typed else ""
    return build(nodes, f"x:{dtype}[{of}]", f"y:{dtype}[{of}]", inner=inner, opset=24)


def apart(artifact):
    after, changes = run_twice(DecomposeSwish(), artifact)
    batch = feed(artifact, 3)
    assert not drift([outputs(artifact, batch)], [outputs(after, batch)], DecomposeSwish.tolerance).reasons
    return after, changes


def test_two_operators_without_a_factor(golden_pass):
    before = swish()
    after, changes = apart(before)
    golden_pass("decompose_swish", before, after, changes)
    assert after.operator_counts() == {"Relu": 1, "Sigmoid": 1, "Mul": 1} and changes == ["1 Swish written out"]


@given(alpha=st.floats(-3, 3, width=32), shape=st.sampled_from(["batch,6", "batch", "2,3,4", "batch,?,2"]))
def test_any_factor_and_shape_and_back(alpha, shape):
    before = swish(alpha, of=shape)
    after, _ = apart(before)
    assert "Swish" not in after.operator_counts()
    if abs(alpha) > 1e-3:
        given_all = replace(context(), capabilities=Capabilities(operators=("Swish",)))
        back, _ = run_twice(FuseSwish(), after, given_all)
        assert back.operator_counts() == before.operator_counts()


def test_half_keeps_its_type():
    after, _ = run_twice(DecomposeSwish(), swish(1.702, "float16"))
    stored = [value.dtype.name for value in after.model.graph.initializers.values()]
    assert stored == ["FLOAT16"] and np.float16(1.702) == next(
        value.const_value.numpy() for value in after.model.graph.initializers.values()
    )


def test_a_type_that_is_not_known():
    after, changes = run_twice(DecomposeSwish(), swish(2.0, typed=False))
    assert changes == ["1 left: its type isn't known"] and after.operator_counts()["Swish"] == 1
    assert run_twice(DecomposeSwish(), swish(typed=False))[1] == ["1 Swish written out"]


@pytest.mark.parametrize(
    ("operators", "reasons"),
    [
        ((), ["this backend doesn't say which operators it takes whole"]),
        (("Attention",), []),
        (("Attention", "Swish"), ["this backend runs Swish as one operator"]),
    ],
)
def test_only_for_targets_that_run_others_whole(operators, reasons):
    assert ask(DecomposeSwish(), swish(), replace(context(), capabilities=Capabilities(operators=operators))) == reasons
