"""Attentions in pieces for the tests of `fuse-attention`: products, factors, masks and repeated heads in all their forms."""

import numpy as np
import onnx
import onnx_ir as ir
from models import build, node, outputs, run_twice

from perwatt.artifact import Artifact
from perwatt.drift import drift
from perwatt.passes.fuse_attention import FuseAttention

S, T, D, E, HEADS = 5, 7, 8, 6, 4
LOWEST = float(np.finfo(np.float32).min)


class Net:
    """An attention of pieces, put together step by step; `scores` and `weights` are the names that grow."""

    def __init__(self, dtype="float32"):
        self.nodes, self.weights, self.inputs, self.count, self.dtype = [], {}, [], 0, dtype

    def put(self, operator, inputs, **attributes):
        self.count += 1
        self.nodes.append(node(operator, inputs, f"t{self.count}", **attributes))
        return f"t{self.count}"

    def keep(self, array):
        self.count += 1
        array = np.asarray(array)
        self.weights[f"w{self.count}"] = array.astype(self.dtype) if array.dtype.kind == "f" else array
        return f"w{self.count}"

    def feed(self, name, *shape, dtype=None):
        self.inputs.append(f"{name}:{dtype or self.dtype}[{','.join(map(str, shape))}]")
        return name

    def built(self, last, shape, opset=23):
        assert last == f"t{self.count}" or not self.nodes, "the last node makes the output"
        return inferred(self.plain(shape, opset))

    def plain(self, shape, opset=23):
        """As it is, without types and shapes inside; the last node makes y."""
        self.nodes[-1].output[0] = "y"
        spec = f"y:{self.dtype}[{','.join(map(str, shape))}]"
        return build(self.nodes, " ".join(self.inputs), spec, self.weights, opset=opset)


def inferred(artifact):
    """With the types and shapes that the passes before have found."""
    return Artifact(model=ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(artifact.model), data_prop=True)))


def scored(net, turned="twice", scaled="scores", kv=HEADS, queries=S, keys=T, heads=HEADS):
    """Q·Kᵀ with a factor 0.3 somewhere; returns (scores, v)."""
    q, v = net.feed("q", "batch", heads, queries, D), net.feed("v", "batch", kv, keys, E)
    if turned == "once":
        kt = net.put("Transpose", net.feed("k", "batch", keys, kv, D), perm=[0, 2, 3, 1])
    elif turned == "twice":
        heads_first = net.put("Transpose", net.feed("k", "batch", keys, kv, D), perm=[0, 2, 1, 3])
        kt = net.put("Transpose", heads_first, perm=[0, 1, 3, 2])
    elif turned == "plain":
        kt = net.put("Transpose", net.feed("k", "batch", kv, keys, D), perm=[0, 1, 3, 2])
    else:
        kt = net.feed("k", "batch", kv, D, keys)
    if scaled == "query":
        q = net.put("Mul", f"{net.keep(np.float32(0.3))} {q}")
    if scaled == "key":
        kt = net.put("Div", f"{kt} {net.keep(np.float32([1 / 0.3]))}")
    if scaled == "both":
        root = net.keep(np.float32(0.3**0.5))
        q, kt = net.put("Mul", f"{q} {root}"), net.put("Mul", f"{kt} {root}")
    scores = net.put("MatMul", f"{q} {kt}")
    if scaled == "scores":
        scores = net.put("Mul", f"{scores} {net.keep(np.float32(0.3))}")
    if scaled == "divided":
        scores = net.put("Div", f"{scores} {net.keep(np.float32([[1 / 0.3]]))}")
    return scores, v


def finished(net, scores, v, guard=False, queries=S, heads=HEADS, cast=False):
    """Softmax and the product with v."""
    weights = net.put("Softmax", scores, axis=-1)
    if guard:
        weights = net.put("Where", f"{net.put('IsNaN', weights)} {net.keep(np.float32(0))} {weights}")
    if cast:
        weights = net.put("Cast", weights, to=1)
    return net.built(net.put("MatMul", f"{weights} {v}"), ("batch", heads, queries, E))


def fed(artifact, batch=2, seed=0):
    """Random inputs; conditions hold for the first key of each row at least."""
    random, values = np.random.default_rng(seed), {}
    for spec in artifact.signature.inputs:
        shape = [d if isinstance(d, int) else batch if d == "batch" else 6 for d in spec.shape]
        values[spec.name] = random.standard_normal(shape).astype(spec.dtype)
        if np.dtype(spec.dtype) == bool:
            values[spec.name] = random.random(shape) < 0.6
            values[spec.name][..., 0] = True
    return values


def fused(artifact, times=1, feeds=None):
    """After the pass, with that many Attention and no softmax, and the same outputs for several batches."""
    after, changes = run_twice(FuseAttention(), artifact)
    counts = after.operator_counts()
    assert counts.get("Attention") == times and "Softmax" not in counts, changes
    for batch in feeds or (fed(artifact), fed(artifact, 1, 1), fed(artifact, 3, 2)):
        told = drift([outputs(artifact, batch)], [outputs(after, batch)], FuseAttention.tolerance)
        assert not told.reasons, told.reasons
    return after, changes


def left(artifact, reason):
    after, changes = run_twice(FuseAttention(), artifact)
    assert after is artifact
    assert [change for change in changes if reason in change], changes


def attention_of(artifact):
    return next(each for each in artifact.model.graph if each.op_type == "Attention")


TRIANGLE = np.tril(np.ones((S, S), bool))


MASKS = {
    "items": ("batch", 1, S, T), "heads": (HEADS, S, T), "both": ("batch", HEADS, S, T), "keys": ("batch", 1, 1, T),
    "plain": (S, T), "row": (T,), "queries": ("batch", 1, S, 1), "one": (1, 1, 1, 1), "head rows": (HEADS, 1, T),
}  # fmt: skip


def masked(net, scores, way, shape, low, flipped, stored):
    """Scores under a mask of that shape, put on in one of four ways."""
    if way in ("add", "subtract"):
        value = fixed(net, shape) if stored else net.feed("mask", *shape)
        return net.put(
            "Add" if way == "add" else "Sub",
            f"{scores} {value}" if not flipped or way == "subtract" else f"{value} {scores}",
        )
    keep = fixed(net, shape, True) if stored else net.feed("mask", *shape, dtype="bool")
    if way == "where":
        hidden = net.keep(np.float32(low))
        if flipped:
            return net.put("Where", f"{net.put('Not', keep)} {hidden} {scores}")
        return net.put("Where", f"{keep} {scores} {hidden}")
    first, second = net.keep(np.float32(0)), net.keep(np.float32([low]))
    chosen = net.put("Where", f"{net.put('Not', keep)} {second} {first}" if flipped else f"{keep} {first} {second}")
    return net.put("Add", f"{chosen} {scores}")


def fixed(net, shape, condition=False):
    sizes = [1 if n == "batch" else n for n in shape]
    random = np.random.default_rng(3)
    if not condition:
        return net.keep(random.standard_normal(sizes).astype(np.float32))
    keep = random.random(sizes) < 0.5
    keep[..., 0] = True
    return net.keep(keep)


def repeated(net, name, shape, way, depth):
    """[batch, 2, T, depth] with each head twice."""
    if way == "gather":
        return net.put("Gather", f"{net.feed(name, *shape)} {net.keep(np.int64([0, 0, 1, 1]))}", axis=1)
    if way == "heads last":
        value = net.feed(name, shape[0], shape[2], shape[1], shape[3])
        wide = net.put("Unsqueeze", f"{value} {net.keep(np.int64([3]))}")
        wide = net.put("Expand", f"{wide} {net.keep(np.int64([1, 1, 1, 2, 1]))}")
        merged = net.put("Reshape", f"{wide} {net.keep(np.int64([0, 0, HEADS, depth]))}")
        return net.put("Transpose", merged, perm=[0, 2, 1, 3])
    wide = net.put("Unsqueeze", f"{net.feed(name, *shape)} {net.keep(np.int64([2]))}")
    many = net.keep(np.int64([1, 1, 2, 1, 1]))
    wide = net.put("Expand" if way == "expand" else "Tile", f"{wide} {many}")
    return net.put("Reshape", f"{wide} {net.keep(np.int64([0, HEADS, T, depth]))}")
