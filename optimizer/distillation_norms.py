"""Batch normalization put back where it was folded away, for as long as a network learns.

A convolution whose normalization was folded into it learns badly: a small step of one layer changes the scale of all that
follow. So each gets one again, with the statistics that its output has, and with the scale and shift that make it do nothing:

    γ = √(σ² + ε),  β = μ              BN(y) = γ (y − μ) / √(σ² + ε) + β = y

It then learns as any network does, by the statistics of each batch. At the end these are found anew over all samples, and
folded into the convolution's weight and bias, so that the graph is what it was, with other numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from perwatt.artifact import Artifact, Step
from perwatt.interpreter_convolution import conv

EPSILON = 1e-5


@dataclass(frozen=True)
class Norm:
    """A normalization behind a convolution, whose weight and bias these are."""

    module: Any
    weight: Any
    bias: Any


class Normalization(nn.BatchNorm2d):  # type: ignore[misc]
    """Batch normalization of any number of axes, which can also look on: `observing`, it adds up what passes."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPSILON)
        self.observing = False
        self.items = 0
        self.seen: list[Any] = [
            torch.zeros(channels, dtype=torch.float64),
            torch.zeros(channels, dtype=torch.float64),
            0,
        ]

    def _check_input_dim(self, input: Any) -> None:
        """Any number of axes will do."""

    def forward(self, input: Any) -> Any:
        """[N, C, …] as it came in."""
        if not self.observing:
            return super().forward(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        spread, mean = torch.var_mean(input.detach().float(), dim=axes, correction=0)
        spread, mean, count = spread.double(), mean.double(), input.numel() // input.shape[1]
        self.seen[0] = self.seen[0] + count * mean
        self.seen[1] = self.seen[1] + count * (spread + mean.square())
        self.seen[2] += count
        self.items += input.shape[0]
        return input

    def settle(self) -> None:
        """Do nothing to what was seen."""
        mean = self.seen[0] / self.seen[2]
        spread = (self.seen[1] / self.seen[2] - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.running_mean.copy_(mean)
            self.running_var.copy_(spread)
            self.weight.copy_((spread + self.eps).sqrt())
            self.bias.copy_(mean)
        self.observing = False


def with_biases(artifact: Artifact) -> Artifact:
    """The artifact with a bias for every convolution that has none: normalization is folded into one."""
    import onnx_ir as ir

    model = artifact.edit()
    graph = model.graph
    taken = {value.name for node in graph for value in (*node.inputs, *node.outputs) if value is not None}
    for number, node in enumerate(graph):
        if node.op_type != "Conv" or node.domain or (len(node.inputs) > 2 and node.inputs[2] is not None):
            continue
        weight = node.inputs[1]
        if weight is None or weight.const_value is None or weight.dtype != ir.DataType.FLOAT:
            continue
        name = next(n for n in (f"{node.name or 'conv'}_{number}_bias{'_' * i}" for i in range(99)) if n not in taken)
        taken.add(name)
        tensor = ir.Tensor(np.zeros(len(weight.const_value.numpy()), np.float32), name=name)
        value = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(tensor.shape)
        )
        graph.register_initializer(value)
        node.resize_inputs(3)
        node.replace_input_with(2, value)
    return artifact.after(model, Step("biases"))


def put_norms(network: Any, feeds: Iterable[Sequence[Any]], answers: int | None = None) -> list[Norm]:
    """A normalization behind every convolution of an `Interpreter` whose weight and bias are its own, but for those that make
    one number an item (gates), or one of the first `answers` outputs: they never had one. `feeds`: calls by which statistics
    are found."""
    program = network.program
    graph = program.graph
    (outputs,) = graph.output_node().args
    ends = set(outputs[:answers])
    convolutions = [node for node in graph.nodes if node.op == "call_function" and node.target is conv]
    uses = Counter(arg for node in graph.nodes for arg in node.all_input_nodes)
    found, places = [], []
    for number, node in enumerate(convolutions):
        weight: Any = node.args[1]
        bias: Any = node.args[2] if len(node.args) > 2 else None
        if any(one is None or one.op != "get_attr" or uses[one] != 1 for one in (weight, bias)):
            continue
        if node in ends:
            continue
        tensors = [program.get_parameter(one.target) for one in (weight, bias)]
        if tensors[0].dtype != torch.float32:
            continue
        module = Normalization(tensors[0].shape[0])
        program.add_submodule(f"normalization_{number}", module)
        with graph.inserting_after(node):
            put = graph.call_module(f"normalization_{number}", (node,))
        node.replace_all_uses_with(put)
        put.args = (node,)
        found.append(Norm(module, *tensors))
        places.append(put)
    program.recompile()
    for norm in found:
        norm.module.observing = True
    with torch.no_grad():
        for call in feeds:
            network(*call)
    kept = []
    for norm, put in zip(found, places, strict=True):
        if norm.module.seen[2] <= norm.module.items:
            put.replace_all_uses_with(put.args[0])
            graph.erase_node(put)
            continue
        norm.module.settle()
        # A shift in front of a normalization is taken out by it.
        norm.bias.requires_grad_(False)
        kept.append(norm)
    program.recompile()
    return kept


def reestimate(network: Any, norms: Sequence[Norm], feeds: Iterable[Sequence[Any]]) -> None:
    """Statistics over the samples, as averages over batches, with the weights as they are now."""
    for norm in norms:
        norm.module.reset_running_stats()
    network.train()
    seen = 0
    with torch.no_grad():
        for call in feeds:
            seen += len(call[0])
            for norm in norms:
                norm.module.momentum = len(call[0]) / seen
            network(*call)
    network.eval()
    for norm in norms:
        norm.module.momentum = 0.1


def fold_norms(network: Any, norms: Sequence[Norm]) -> None:
    """Scale and shift of each normalization into the weight and the bias in front of it."""
    with torch.no_grad():
        for norm in norms:
            module = norm.module
            scale = module.weight.double() / (module.running_var.double() + module.eps).sqrt()
            shape = [-1] + [1] * (norm.weight.ndim - 1)
            norm.weight.copy_(norm.weight.double() * scale.reshape(shape))
            norm.bias.copy_((norm.bias.double() - module.running_mean.double()) * scale + module.bias.double())
            module.weight.fill_(1.0)
            module.bias.zero_()
            module.running_mean.zero_()
            module.running_var.fill_(1.0 - module.eps)
