"""`prune-n-of-m`: N of every M neighbours along the inputs, the layout that TensorRT looks for; refused where it wouldn't pay."""

import numpy as np
import pytest
from models import ask, build, conv_net, feed, node, run_twice, weight
from pruned import ALGORITHMS, correlated, given_by, kernel_of, off, product

from perwatt.artifact import Artifact
from perwatt.errors import PassError
from perwatt.passes.prune_n_of_m import PruneNOfM
from perwatt.targets._tensorrt_sparsity import sparse_weights

WOULD = "would not pay (anyway: true does it all the same)"


def groups(kernel, axis, m=4):
    """Weights in groups of m neighbours along the axis of the inputs."""
    return np.moveaxis(kernel, axis, -1).reshape(-1, m)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("op, attributes", [("MatMul", {}), ("Gemm", {"transB": 1})])
def test_n_of_every_m_inputs_stay(op, attributes, n, m, algorithm):
    before = product(op=op, **attributes)
    x = correlated(32) if op == "MatMul" else correlated(32)[:, 0].copy()
    after, changes = run_twice(PruneNOfM(n=n, m=m, algorithm=algorithm), before, given_by({"x": x}))
    new, axis = kernel_of(after), 1 if attributes else 0
    assert ((groups(new, axis, m) != 0).sum(axis=1) == n).all()
    if algorithm == "magnitude":
        old = groups(kernel_of(before), axis, m)
        wanted = np.sort(np.abs(old), axis=1)[:, m - n :].sum(axis=1)
        np.testing.assert_allclose(np.abs(groups(new, axis, m)).sum(axis=1), wanted, rtol=1e-6)
    assert changes[0].startswith(f"{n}:{m} zeros in the weights of 1 products")


def test_sparsegpt_leaves_less_than_half_of_magnitudes_error():
    before = product()
    given, fresh = given_by({"x": correlated(64)}), {"x": correlated(16, seed=1)}
    errors = [off(before, PruneNOfM(algorithm=each).run(before, given)[0], fresh) for each in ALGORITHMS]
    assert errors[2] < 0.5 * errors[0] and errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_convolutions_have_groups_of_input_channels_at_each_place(algorithm):
    before = conv_net()
    after, changes = run_twice(PruneNOfM(algorithm=algorithm), before, given_by(feed(before, items=16)))
    new = kernel_of(after, "/layer2/conv")
    assert ((groups(new, 1) != 0).sum(axis=1) == 2).all()
    assert ((new.reshape(len(new), -1, 4)[:, :, :] != 0).sum(axis=2) != 2).any(), "not along the kernel's places"
    # Three channels of a picture are no fours.
    np.testing.assert_array_equal(kernel_of(after, "/layer1/conv"), kernel_of(before, "/layer1/conv"))
    assert "1 left: its input channels are no multiple of 4" in changes
    assert len(sparse_weights(after)) == 2 and not sparse_weights(before)


def test_tensorrt_finds_the_pattern_in_every_product():
    nodes = [
        node("Conv", "x k", "c", name="/conv"), node("Conv", "c p", "d", name="/pointwise", strides=[2, 2]),
        node("Flatten", "d", "f"), node("Gemm", "f g", "h", transB=1, name="/gemm"), node("MatMul", "h m", "y", name="/matmul"),
    ]  # fmt: skip
    weights = {"k": weight(8, 4, 3, 3), "p": weight(8, 8, 1, 1), "g": weight(12, 32), "m": weight(12, 5)}
    inner = "c:float32[batch,8,4,4] d:float32[batch,8,2,2] f:float32[batch,32] h:float32[batch,12]"
    before = build(nodes, "x:float32[batch,4,6,6]", "y:float32[batch,5]", weights, inner=inner)
    after, changes = run_twice(PruneNOfM(), before, given_by(feed(before, items=32)))
    assert len(sparse_weights(Artifact(model=after.model))) == 4
    assert changes[1:] == ["1 by Wanda: SparseGPT is for matrix products and 1 × 1 convolutions"]


def test_wanda_knows_the_input_channels_of_a_convolution():
    before = build(
        [node("Conv", "x w", "y", name="/product")], "x:float32[batch,4,5,5]", "y:float32[batch,6,3,3]",
        {"w": weight(6, 4, 3, 3)},
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((32, 4, 5, 5)).astype(np.float32)
    x[:, [1, 2]] *= 1000
    after, _ = PruneNOfM(algorithm="wanda").run(before, given_by({"x": x}))
    kept = kernel_of(after) != 0
    assert kept[:, [1, 2]].mean() > 0.95 and kept[:, [0, 3]].mean() < 0.05


def test_it_refuses_where_its_pattern_is_not_rewarded_unless_asked():
    before = product()
    assert ask(PruneNOfM(), before, given_by(patterns=("2:4",))) == []
    (reason,) = ask(PruneNOfM(), before, given_by())
    assert reason == f"this backend runs zeros as fast as anything else: 2:4 sparsity {WOULD}"
    (reason,) = ask(PruneNOfM(n=1), before, given_by(patterns=("2:4",)))
    assert reason == f"this backend gains from 2:4 zeros alone: 1:4 sparsity {WOULD}"
    assert ask(PruneNOfM(n=1, anyway=True), before, given_by()) == []


def test_settings_are_checked():
    for n, m in ((0, 4), (4, 4), (5, 4), (2, 64)):
        with pytest.raises(PassError, match="n must be at least 1"):
            PruneNOfM(n=n, m=m).run(product(), given_by())
    _, changes = PruneNOfM(n=1, m=5).run(product(), given_by({"x": correlated(4)}))
    assert changes == ["nothing was found that can have zeros", "1 left: its input channels are no multiple of 5"]
