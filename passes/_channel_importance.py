"""How much would be lost without a unit of channels: four ways to say so, each a number for every unit of every group.

- `magnitude`: Σ w² over the weights that make it. Needs no data.
- `activation`: Σ E[x²]·‖w‖² over the products that read it: the power that it brings them.
- `reconstruction`: the part of that which the other channels can't make up for, Σ ‖w‖² / [(E[x xᵀ])⁻¹]cc (Hassibi and Stork,
  "Optimal brain surgeon", 1992).
- `taylor`: what the model's outputs lose, to first order: E[(Σ g·x)²] (see `perwatt.sensitivity`). Compares across layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from perwatt.coupling_places import Group, Product
from perwatt.passes._channel_moments import Moments

Importance = Literal["taylor", "reconstruction", "activation", "magnitude"]
Scores = dict[Group, npt.NDArray[np.float64]]
DAMPING = 1e-3
"""Of E[x xᵀ], relative to the mean of its diagonal."""


def by_magnitude(groups: Sequence[Group], weights: Mapping[str, Any]) -> Scores:
    """`weights`: arrays by name. Relative to what the same product's weights have on average, so that layers compare."""
    scores = {}
    for group in groups:
        total = np.zeros(group.size)
        for product in group.makers:
            power = _power(weights[product.weight], product.made[1])
            total += _by_unit(group, product.made, power / (power.mean() or 1.0))
        scores[group] = total / max(1, len(group.makers))
    return scores


def by_activation(groups: Sequence[Group], weights: Mapping[str, Any], moments: Mapping[str, Moments]) -> Scores:
    """`moments`: of what each product reads."""
    return {group: _read(group, weights, lambda product: moments[product.data[0]].gram.diagonal()) for group in groups}


def by_reconstruction(groups: Sequence[Group], weights: Mapping[str, Any], moments: Mapping[str, Moments]) -> Scores:
    """The same."""

    def left(product: Product) -> Any:
        gram = moments[product.data[0]].gram
        damped = gram + np.eye(len(gram)) * DAMPING * (np.trace(gram) / len(gram) or 1.0)
        return 1.0 / np.linalg.inv(damped).diagonal()

    return {group: _read(group, weights, left) for group in groups}


def by_taylor(groups: Sequence[Group], drawn: Mapping[str, Any]) -> Scores:
    """`drawn`: contributions, [draws, channels], of what each product reads."""
    scores = {}
    for group in groups:
        # Contributions of all that read a unit add up before they are squared: they are lost together.
        total: Any = 0.0
        for data in dict.fromkeys(product.data for product in group.readers):
            at = group.positions(*data)
            if at is not None:
                total = total + drawn[data[0]][:, at].sum(axis=2)
        scores[group] = np.mean(np.square(total), axis=0)
    return scores


def _read(group: Group, weights: Mapping[str, Any], size: Any) -> Any:
    total = np.zeros(group.size)
    for product in group.readers:
        power = _power(weights[product.weight], product.read[1])
        channels = size(product)
        # Grouped convolutions read every channel with the weights of its place in the group.
        total += _by_unit(group, product.data, np.resize(power, len(channels)) * channels)
    return total


def _power(weight: Any, axis: int) -> Any:
    """Σ w² along all axes but one."""
    squares = np.square(weight.astype(np.float64))
    return squares.sum(axis=tuple(other for other in range(weight.ndim) if other != axis))


def _by_unit(group: Group, place: tuple[str, int], channels: Any) -> Any:
    at = group.positions(*place)
    return np.zeros(group.size) if at is None else channels[at].sum(axis=1)
