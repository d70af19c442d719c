"""Merge convolutions that read the same tensor in the same way into one with all their output channels.

    Conv(x, W₁), Conv(x, W₂)        becomes        Split(Conv(x, [W₁; W₂]))

The branches of an Inception block begin with 1×1 convolutions on one input (Szegedy et al. 2015), a residual block that
changes its width has one on the main path and one on the shortcut (He et al. 2016). Merged, the input is read once
instead of once for each, and a product with few output channels becomes one that fills the machine's vectors.

Equal activations that follow all of them are done once too, on the whole. Where they differ, merging would tear each from
the convolution that backends compute it with, so such ones stay apart unless `across_activations` says otherwise.

It is not in the default pipeline, because Split has to copy wherever channels lie innermost in memory, and that costs
more than it saves on every CPU backend tried: with one thread, OpenVINO and ONNX Runtime needed 0.97 to 1.24 times the CPU
time for Inception's blocks, 1.1 to 1.2 times for a YOLO block with x·sigmoid(x), and 1.1 to 1.7 times for a residual block
across its activations. It is for hardware that narrow products leave idle.

What is left and told: convolutions that differ in kernel, stride, dilation or padding, grouped and quantized ones, weights
that are computed or that other convolutions use too (they would be stored twice), and kernels larger than `kernel_sizes`
allows, whose arithmetic outweighs what merging saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from perwatt.fusion import Builder, Fusion
from perwatt.patterns import Match, dims, given, is_stored, made_by, number, only_user, stored

ACTIVATIONS = "Relu|LeakyRelu|Elu|Selu|Sigmoid|HardSigmoid|HardSwish|Swish|Tanh|Gelu|Mish|Softplus"


@dataclass(frozen=True)
class MergeConvolutions(Fusion):
    """Settings: `kernel_sizes` that are merged, along every axis (search: (1,), (1, 3)); the `least` number of
    convolutions worth a Split (search: 2, 3); `across_activations`: also those that different activations follow
    (search: both)."""

    in_default: ClassVar[bool] = False
    after: ClassVar[tuple[str, ...]] = ("fold-batchnorm", "fold-pad", "fold-scales", "fuse-swish", "fuse-hardswish")
    roots: ClassVar[tuple[str, ...]] = ("Conv",)
    what: ClassVar[str] = "groups of parallel convolutions merged"
    # From there on Split takes its sizes as an input.
    opset: ClassVar[int] = 13

    kernel_sizes: tuple[int, ...] = (1,)
    least: int = 2
    across_activations: bool = False

    def find(self, node: Any) -> Iterator[Match]:
        siblings = parallel_to(node)
        alike = [one for one in siblings if _manner(one) == _manner(node)]
        same_end = [one for one in alike if _words(activation(one)) == _words(activation(node))]
        choices = (alike, siblings) if self.across_activations else (same_end, alike, siblings)
        groups = [group for group in choices if len(group) >= max(self.least, 2)]
        # Each group is named once, by its first.
        if groups and groups[0][0] is node:
            yield _match(groups[0])

    def check(self, match: Match) -> Iterator[str]:
        group = [node for node in match.nodes if node.op_type == "Conv"]
        weights = [node.inputs[1] for node in group]
        if any(made_by(weight, "DequantizeLinear") for weight in weights):
            yield "they are quantized"
        elif not all(is_stored(value) for node in group for value in given(node)[1:] if value is not None):
            yield "their weights are computed, not stored"
        elif len({_manner(node) for node in group}) > 1:
            yield "they differ in kernel, stride, dilation or padding"
        elif not set(_kernel(group[0])) <= set(self.kernel_sizes):
            yield f"their kernels are larger than {' or '.join(map(str, self.kernel_sizes))}"
        elif any(node.attributes.get_int("group", 1) != 1 for node in group):
            yield "they are grouped"
        elif any(len(weight.uses()) > 1 for weight in weights):
            yield "their weights are used elsewhere too"
        elif not self.across_activations and any(_words(activation(n)) != _words(activation(group[0])) for n in group):
            yield "different activations follow them"

    def rewrite(self, match: Match, build: Builder) -> Any:
        group = [node for node in match.nodes if node.op_type == "Conv"]
        weights = [stored(node.inputs[1]) for node in group]
        inputs = [group[0].inputs[0], build.constant(np.concatenate(weights), f"{group[0].inputs[1].name}_merged")]
        if any(len(given(node)) > 2 for node in group):
            biases = [_bias(node, weight) for node, weight in zip(group, weights, strict=True)]
            inputs.append(build.constant(np.concatenate(biases), f"{inputs[1].name}_bias"))
        whole = build.op("Conv", *inputs, **_attributes(group[0]))
        channels = [len(weight) for weight in weights]
        whole.shape = _with_channels(group[0].outputs[0].shape, sum(channels))
        if match.outputs[0] is not group[0].outputs[0]:
            whole = _again(activation(group[0]), whole, build)
        sizes = build.constant(np.array(channels, np.int64), f"{whole.name}_channels")
        return build.op("Split", whole, sizes, outputs=len(group), axis=1)


def parallel_to(node: Any) -> list[Any]:
    """The convolutions in the graph of `node` that read the same tensor, itself among them."""
    uses = node.inputs[0].uses() if node.inputs[0] is not None else ()
    found = (use.node for use in uses if use.idx == 0 and use.node.op_identifier() == ("", "Conv", ""))
    return [one for one in found if one.graph is node.graph]


def _match(group: Sequence[Any]) -> Match:
    ends = [activation(node) for node in group]
    if not ends[0] or any(_words(end) != _words(ends[0]) for end in ends):
        ends = [[] for _ in group]
    outputs = tuple((end or [node])[-1].outputs[0] for node, end in zip(group, ends, strict=True))
    return Match(group[0], (*group, *(node for end in ends for node in end)), outputs)


def _manner(node: Any) -> tuple[Any, ...]:
    """All that convolutions must have in common besides their input."""
    space = len(_kernel(node))
    ones, zeros = (1,) * space, (0,) * 2 * space
    padding = node.attributes.get_string("auto_pad", "NOTSET")
    pads = tuple(node.attributes.get_ints("pads", zeros)) if padding == "NOTSET" else zeros
    return (
        _kernel(node),
        tuple(node.attributes.get_ints("strides", ones)),
        tuple(node.attributes.get_ints("dilations", ones)),
        "NOTSET" if padding == "VALID" else padding,
        pads,
        node.attributes.get_int("group", 1),
    )


def _kernel(node: Any) -> tuple[Any, ...]:
    """Its size along each spatial axis; empty where nobody knows it."""
    shape = dims(node.inputs[1])
    return tuple(node.attributes.get_ints("kernel_shape", shape[2:] if shape else ()))


def _attributes(node: Any) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _bias(node: Any, weight: Any) -> Any:
    return stored(node.inputs[2]) if len(given(node)) > 2 else np.zeros(len(weight), weight.dtype)


def _with_channels(shape: Any, channels: int) -> Any:
    import onnx_ir as ir

    return None if shape is None else ir.Shape([shape[0], channels, *shape[2:]])


# Activations ----------------------------------------------------------------------------------------------------------


def activation(node: Any) -> list[Any]:
    """The nodes of the activation that alone uses the result of `node`: one, or x · sigmoid(x) in two; else none."""
    out = node.outputs[0]
    users = [use.node for use in out.uses()]
    if any(user.graph is not node.graph for user in users):
        return []
    after = only_user(out)
    if after is not None and after.domain == "" and after.op_type in ACTIVATIONS.split("|"):
        return [after]
    if after is not None and after.op_identifier() == ("", "Clip", ""):
        return [after] if all(value is None or number(value) is not None for value in after.inputs[1:]) else []
    gates = [user for user in users if user.op_identifier() == ("", "Sigmoid", "")]
    if len(users) != 2 or len(gates) != 1 or out.is_graph_output():
        return []
    product = only_user(gates[0].outputs[0])
    swish = product is not None and product in users and product.op_identifier() == ("", "Mul", "")
    return [gates[0], product] if swish else []


def _words(end: Sequence[Any]) -> list[Any]:
    """What activations must have in common to be one."""
    return [
        (
            node.op_type,
            sorted(_attributes(node).items()),
            [number(v) if v is not None else None for v in node.inputs[1:]],
        )
        for node in end
    ]


def _again(end: Sequence[Any], x: Any, build: Builder) -> Any:
    """The same activation on another value."""
    shape = x.shape
    if len(end) == 1:
        result = build.op(end[0].op_type, x, *end[0].inputs[1:], **_attributes(end[0]))
    else:
        gate = build.op("Sigmoid", x)
        gate.shape = shape
        result = build.op("Mul", x, gate)
    result.shape = shape
    return result
