"""Softmax behind masks of all kinds, with the guard that torch puts behind it, and what becomes of it.

net = Net()
removed(net.guarded(net("Add", net.scores(), net.hold(mask))))
"""

import numpy as np
from models import build, node, outputs, run_twice
from onnx import TensorProto, helper

from perwatt.passes.remove_softmax_guards import RemoveSoftmaxGuards

ROWS, KEYS = 3, 4
LOWEST = float(np.finfo(np.float32).min)
INFINITE = float("-inf")
GONE = ["1 softmax guards that can't fire removed"]
MAY_FIRE = ["1 left: its mask may be −∞ in a whole row"]
UNKNOWN = ["1 left: an input reaches it that may hold −∞ or NaN"]
CAUSAL = np.tril(np.ones((ROWS, KEYS), bool))


class Net:
    """Nodes that are given names as they come, and constants."""

    def __init__(self, dtype="float32"):
        self.nodes, self.weights, self.dtype = [], {}, dtype

    def __call__(self, kind, *inputs, **attributes):
        name = f"n{len(self.nodes)}"
        self.nodes.append(node(kind, " ".join(inputs), name, **attributes))
        return name

    def hold(self, array, dtype=None):
        name = f"w{len(self.weights)}"
        self.weights[name] = np.array(array, dtype or self.dtype)
        return name

    def scores(self):
        return self("MatMul", "q", "k")

    def chosen(self, mask, low=INFINITE, high=0.0):
        """A mask of truth values as one to be added, as torch writes it."""
        return self("Where", mask, self.hold([high]), self.hold([low]))

    def positions(self, count, axis):
        """0, 1, … along `axis` of four."""
        counted = self("Range", self.hold(0, "int64"), self.hold(count, "int64"), self.hold(1, "int64"))
        return self("Unsqueeze", counted, self.hold([other for other in range(4) if other != axis], "int64"))

    def causal(self, kind="LessOrEqual", first="keys"):
        keys, rows = self.positions(KEYS, 3), self.positions(ROWS, 2)
        return self(kind, *((keys, rows) if first == "keys" else (rows, keys)))

    def guarded(self, scores, axis=-1, inputs="", ends=""):
        """Softmax and the guard behind it, of all that `scores` is made of."""
        soft = self("Softmax", scores, axis=axis)
        fires = self("IsNaN", soft)
        self.nodes.append(node("Where", f"{fires} {self.hold([0])} {soft}", "y"))
        return self.built(inputs, ends)

    def built(self, inputs="", ends="", inner=""):
        square = f"{self.dtype}[batch,2,{ROWS},{KEYS}]"
        given = f"q:{self.dtype}[batch,2,{ROWS},5] k:{self.dtype}[batch,2,5,{KEYS}] {inputs}"
        used = " ".join(s for s in given.split() if any(s.split(":")[0] in n.input for n in self.nodes))
        return build(self.nodes, used, f"y:{square} {ends}", self.weights, inner=inner)


def batch_for(artifact, seed=0, truth=None):
    """Random inputs; truth values are all `truth` where that is given."""
    random = np.random.default_rng(seed)
    batch = {}
    for spec in artifact.signature.inputs:
        shape = [2 if isinstance(dim, str) else dim for dim in spec.shape]
        values = random.standard_normal(shape) * 3
        batch[spec.name] = (values > 0 if truth is None else np.full(shape, truth)) if spec.dtype == "bool" else values
        batch[spec.name] = batch[spec.name].astype(spec.dtype)
    return batch


def ran(artifact):
    """(operators, changes), with outputs that didn't move at all, whatever is masked."""
    after, changes = run_twice(RemoveSoftmaxGuards(), artifact)
    for truth in (None, True, False):
        batch = batch_for(artifact, truth=truth)
        before, now = outputs(artifact, batch), outputs(after, batch)
        for name, array in before.items():
            np.testing.assert_array_equal(now[name], array)
    return after.operator_counts(), changes


def removed(artifact):
    counts, changes = ran(artifact)
    assert changes == GONE and "IsNaN" not in counts and counts["Softmax"] == 1


def left(artifact, changes):
    after, said = run_twice(RemoveSoftmaxGuards(), artifact)
    assert after is artifact and said == changes


def onnx_bool(truth):
    return helper.make_tensor("value", TensorProto.BOOL, [1], [truth])
