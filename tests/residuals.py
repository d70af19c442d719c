"""Networks of residual blocks of every kind, small and with weights that depend on nothing else.

artifact = chain(basic, inverted)          # additions are called /block0, /block1
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from models import build, feed, node, norm_node, normalization, outputs, weight

from perwatt.artifact import Step
from perwatt.passes._naming import with_names
from perwatt.passes._residual_blocks import residual_blocks

WIDTH = 8
IMAGE, WORDS = f"float32[batch,{WIDTH},8,8]", f"float32[batch,5,{WIDTH}]"


class Net:
    """Nodes and weights, one behind the other. `at` is the value that the next block reads."""

    def __init__(self, kind=IMAGE, opset=23):
        self.kind, self.opset, self.nodes, self.weights, self.at, self.count = kind, opset, [], {}, "x", 0

    def name(self, word="v"):
        self.count += 1
        return f"{word}{self.count}"

    def op(self, kind, inputs, called=None, **attributes):
        out = self.name()
        self.nodes.append(node(kind, inputs, out, name=called or f"/{kind}{self.count}", **attributes))
        return out

    def stored(self, array):
        name = self.name("w")
        self.weights[name] = np.asarray(array)
        return name

    def conv(self, value, made=WIDTH, read=WIDTH, side=3, scale=0.3, **attributes):
        w = self.stored(weight(made, read // attributes.get("group", 1), side, side, seed=self.count, scale=scale))
        return self.op("Conv", f"{value} {w}", pads=[side // 2] * 4, **attributes)

    def normed(self, value, width=WIDTH):
        name = self.name("bn")
        self.weights |= normalization(name, width, self.count)
        self.nodes.append(norm_node(name, value, f"{name}y"))
        return f"{name}y"

    def linear(self, value, rows=WIDTH, columns=WIDTH, scale=0.3):
        return self.op("MatMul", f"{value} {self.stored(weight(rows, columns, seed=self.count, scale=scale))}")

    def layer_norm(self, value):
        scale, shift = (
            self.stored(1 + weight(WIDTH, seed=self.count, scale=0.1)),
            self.stored(weight(WIDTH, seed=self.count)),
        )
        return self.op("LayerNormalization", f"{value} {scale} {shift}")

    def add(self, branch, stays=None, called=None):
        self.at = self.op("Add", f"{branch} {stays or self.at}", called)
        return self.at

    def artifact(self, *more, head=True):
        """With outputs `y` and `more`, values of the same shape as the input where `head` says so."""
        self.nodes.append(node("Identity" if not head else "Tanh", self.at, "y", name="/out"))
        kinds = " ".join(f"{name}:{self.kind}" for name in ("y", *more))
        return with_names(build(self.nodes, f"x:{self.kind}", kinds, self.weights, opset=self.opset), Step("test"))


# Blocks, each on what `net.at` is; they return the name of their addition -----------------------------------------------


def basic(net, called, scale=0.3):
    """A CIFAR ResNet's, with Relu behind."""
    inner = net.op("Relu", net.normed(net.conv(net.at, scale=scale)))
    net.add(net.conv(inner, scale=scale), called=called)
    net.at = net.op("Relu", net.at)


def bottleneck(net, called, scale=0.3):
    inner = net.op("Relu", net.conv(net.at, 4, WIDTH, 1))
    inner = net.op("Relu", net.conv(inner, 4, 4, 3))
    net.at = net.op("Relu", net.add(net.conv(inner, WIDTH, 4, 1, scale), called=called))


def inverted(net, called, scale=0.3):
    """MobileNetV2's: depthwise in the middle, nothing behind; Clip's bounds are stored."""
    low, high = net.stored(np.float32(0)), net.stored(np.float32(6))
    inner = net.op("Clip", f"{net.conv(net.at, 16, WIDTH, 1)} {low} {high}")
    inner = net.op("Clip", f"{net.conv(inner, 16, 16, 3, group=16)} {low} {high}")
    net.add(net.conv(inner, WIDTH, 16, 1, scale), called=called)


def squeezed(net, called, scale=0.3):
    """EfficientNet's: the branch is multiplied by what is pooled of it."""
    inner = net.conv(net.at)
    gate = net.op("Sigmoid", net.conv(net.op("GlobalAveragePool", inner), side=1))
    net.add(net.conv(net.op("Mul", f"{inner} {gate}"), scale=scale), called=called)


def convnext(net, called, scale=0.3):
    """Channels last inside, scaled by a learnt vector."""
    inner = net.op("Transpose", net.conv(net.at, group=WIDTH), perm=[0, 2, 3, 1])
    inner = net.op("Gelu", net.linear(net.layer_norm(inner), WIDTH, 16))
    inner = net.op("Mul", f"{net.linear(inner, 16, WIDTH)} {net.stored(weight(WIDTH, scale=scale))}")
    net.add(net.op("Transpose", inner, perm=[0, 3, 1, 2]), called=called)


def attention(net, called, scale=0.3, post=False):
    """With a Reshape that goes by the shape of what is read, as exporters write it."""
    read = net.at if post else net.layer_norm(net.at)
    q, k, v = (net.linear(read) for _ in range(3))
    scores = net.op("Softmax", net.op("MatMul", f"{q} {net.op('Transpose', k, perm=[0, 2, 1])}"), axis=-1)
    out = net.linear(net.op("MatMul", f"{scores} {v}"), scale=scale)
    net.add(net.op("Reshape", f"{out} {net.op('Shape', net.at)}"), called=called)
    net.at = net.layer_norm(net.at) if post else net.at


def mlp(net, called, scale=0.3, post=False):
    inner = net.op("Gelu", net.linear(net.at if post else net.layer_norm(net.at), WIDTH, 16))
    net.add(net.linear(inner, 16, WIDTH, scale), called=called)
    net.at = net.layer_norm(net.at) if post else net.at


CONVOLUTIONAL = (basic, bottleneck, inverted, squeezed, convnext)


def chain(*kinds, kind=IMAGE, **options):
    """A net of these blocks, /block0 …"""
    net = Net(kind)
    net.at = net.op("Relu", net.at)
    for number, made in enumerate(kinds):
        made(net, f"/block{number}", **options)
    return net.artifact()


def found(artifact):
    return [block.name for block in residual_blocks(artifact).found]


def reasons(artifact):
    return dict(residual_blocks(artifact).left)


def whole(after, before):
    """The graph is valid, has its interface and names, and runs: its outputs."""
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    assert after.signature == before.signature
    assert {n.name for n in after.model.graph} <= {n.name for n in before.model.graph} | {"/out_1"}
    batch = feed(before)
    old, new = outputs(before, batch), outputs(after, batch)
    assert {name: array.shape for name, array in new.items()} == {name: array.shape for name, array in old.items()}
    return old, new
