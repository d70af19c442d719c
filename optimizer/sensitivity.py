"""How much each layer's rounding moves the model's outputs, for all layers from one pass forward and a few back.

A layer l whose output is off by e moves the outputs f by about J e, J the derivative of f by that layer's output. With random
numbers v of unit variance, vᵀ J e has the mean square |J e|² (Hutchinson 1989), and vᵀ J is what one backward pass from v gives,
for every layer at once. e is what the layer itself makes otherwise of the float inputs that it has: so one graph holds each
layer twice, as it is and as it would be, and the second is led nowhere.

    damage of l = E[(vᵀ J e)²] / |f|²

to first order and as if layers erred independently, damages of several layers add up to the square of the outputs' relative
error. Runs in torch, on the interpreter; without torch there is no answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from perwatt.artifact import Artifact
from perwatt.errors import BackendError
from perwatt.signature import Batch, rows

PROBES = 4
"""Backward passes a batch. Each sample of each is a draw of its own: 16 samples and 4 probes tell a damage to a fifth of it."""


def damages(
    twice: Artifact, pairs: Mapping[str, tuple[str, str]], outputs: Sequence[str], batches: Sequence[Batch], seed: int
) -> dict[str, float]:
    """The damage of each layer. `twice`: the model with both values of each layer among its outputs; `pairs`: layer → names
    of those, as it is and as it would be; `outputs`: names of the model's own outputs, of which a layer's may be one.

    Raises BackendError where torch or one of its operators is missing."""
    network, torch = _learnable(twice.model)
    generator = torch.Generator().manual_seed(seed)
    total, size = dict.fromkeys(pairs, 0.0), 0.0
    for batch in batches:
        found = _run(network, batch)
        wanted = [found[name] for name in outputs if found[name].requires_grad]
        layers = {name: pair for name, pair in pairs.items() if found[pair[0]].requires_grad}
        errors = {name: (found[b] - found[a]).detach() for name, (a, b) in layers.items()}
        if not wanted or not layers:
            continue
        for probe in _probes(wanted, generator):
            grads = torch.autograd.grad(
                probe, [found[layers[name][0]] for name in layers], retain_graph=True, allow_unused=True
            )
            for name, grad in zip(layers, grads, strict=True):
                if grad is not None:
                    total[name] += _mean_square(grad * errors[name], rows(batch)) / (PROBES * len(wanted))
        size += 1
    return {name: value / size for name, value in total.items()} if size else total


def contributions(artifact: Artifact, places: Mapping[str, int], batches: Sequence[Batch], seed: int) -> dict[str, Any]:
    """What the positions along an axis of each value contribute to the outputs: Σ g · x over all other axes, g the gradient of
    vᵀ f / |f|. `places`: value → axis. float64 [draws, positions] each, as many draws for all values; the square of a sum over
    places, averaged over draws, is to first order what the outputs lose, squared and relative, without those positions.

    After Molchanov et al., "Importance estimation for neural network pruning" (CVPR 2019), with the outputs themselves in place
    of a loss, so that it takes no labels. Raises BackendError where torch or one of its operators is missing."""
    model = artifact.edit()
    outputs = [str(value.name) for value in model.graph.outputs]
    values = {value.name: value for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))}
    model.graph.outputs.extend(values[name] for name in places if name not in outputs)
    network, torch = _learnable(model)
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, list[Any]] = {name: [] for name in places}
    for batch in batches:
        found = _run(network, batch)
        wanted = [found[name] for name in outputs if found[name].requires_grad]
        for probe in _probes(wanted, generator) if wanted else ():
            inner = [name for name in places if found[name].requires_grad]
            grads = torch.autograd.grad(probe, [found[name] for name in inner], retain_graph=True, allow_unused=True)
            known = {name: grad for name, grad in zip(inner, grads, strict=True) if grad is not None}
            for name, axis in places.items():
                value = found[name].detach()
                product = known[name] * value if name in known else torch.zeros_like(value)
                drawn[name].append(_by_position(product, axis, rows(batch)))
    return {name: np.concatenate(several) for name, several in drawn.items() if several}


def _learnable(model: Any) -> tuple[Any, Any]:
    """The network with gradients, and torch."""
    try:
        import torch

        from perwatt.interpreter import Interpreter, Unsupported
    except ImportError as error:
        raise BackendError(f"sensitivities need torch ({error})", fix="pip install 'perwatt[torch]'") from error
    try:
        network = Interpreter(model)
    except Unsupported as error:
        raise BackendError(f"no sensitivities: {error}") from error
    for weight in network.weights.values():
        weight.requires_grad_(weight.is_floating_point())
    return network, torch


def _run(network: Any, batch: Batch) -> dict[str, Any]:
    """All outputs by name, with their gradients to come."""
    import torch

    feeds = [torch.from_numpy(np.ascontiguousarray(batch[name])) for name in network.inputs]
    # A product of what no weight went into has a gradient only so.
    feeds = [feed.requires_grad_(feed.is_floating_point()) for feed in feeds]
    return dict(zip(network.outputs, network(*feeds), strict=True))


def _probes(wanted: Sequence[Any], generator: Any) -> Iterator[Any]:
    """Outputs times random numbers, each output counted alike."""
    import torch

    scales = [float(value.detach().square().sum()) or 1.0 for value in wanted]
    for _ in range(PROBES):
        yield sum(
            (value * torch.randn(value.shape, generator=generator)).sum() / scale**0.5
            for value, scale in zip(wanted, scales, strict=True)
        )


def _by_position(product: Any, axis: int, items: int) -> Any:
    """Summed up over all but an axis; sample by sample, a draw each, where axis 0 tells them apart."""
    last = product.movedim(axis, -1)
    width = last.shape[-1]
    apart = last.ndim > 1 and axis % product.ndim != 0 and last.shape[0] % items == 0
    return last.reshape(items if apart else 1, -1, width).sum(dim=1).double().numpy()


def _mean_square(product: Any, items: int) -> float:
    """Of Σ g · e: the squares of its samples added up where axis 0 tells them apart, which is one draw each; of the whole
    else."""
    if product.ndim and product.shape[0] % items == 0:
        return float(product.reshape(items, -1).sum(dim=1).square().sum())
    return float(product.sum().square())
