"""What the channels that stay can make up for: the weights that read them, by least squares on calibration activations.

A product reads channels K that stay and R that go. Of all linear guesses x_R ≈ B x_K + c, the best on the samples has
B = E[x_R x_Kᵀ] (E[x_K x_Kᵀ] + λ)⁻¹, with the products centred where there is a bias for c; so

    W_K  becomes  W_K + W_R B,        b  becomes  b + W_R c

(He, Zhang and Sun, "Channel pruning for accelerating very deep neural networks", ICCV 2017, with one solution for all the
taps of a kernel.) c isn't added where padding has zeros instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perwatt.coupling_places import Product
from perwatt.passes._channel_moments import Moments

DAMPING = 1e-3
"""Of E[x_K x_Kᵀ], relative to the mean of its diagonal: samples are few, and what one shows by chance others don't."""


def compensated(
    product: Product, weight: Any, moments: Moments, gone: Sequence[int], centred: bool
) -> tuple[Any, Any] | None:
    """(the weight, with what goes still in it; what its bias gains, [out]): None where nothing can be made up for. The
    product must read each channel with weights of its own."""
    axis, width = product.read[1], len(moments.mean)
    lost = np.asarray(gone, np.int64)
    kept = np.setdiff1d(np.arange(width), lost)
    mean = moments.mean if centred else np.zeros(width)
    spread = moments.gram - np.outer(mean, mean)
    inner = spread[np.ix_(kept, kept)]
    size = np.trace(inner) / len(kept)
    if not np.isfinite(spread).all() or size <= 0:
        return None
    damped = inner + np.eye(len(kept)) * DAMPING * size
    guess = np.linalg.solve(damped, spread[np.ix_(kept, lost)])
    rest = mean[lost] - mean[kept] @ guess
    whole = np.moveaxis(weight.astype(np.float64), axis, 0)
    new = whole.copy()
    new[kept] += np.tensordot(guess, whole[lost], axes=1)
    shift = np.tensordot(rest, whole[lost], axes=1)
    # Sum over the taps; what is left is the axis of outputs.
    made = product.made[1] - (product.made[1] > axis)
    shift = shift.sum(axis=tuple(other for other in range(shift.ndim) if other != made))
    return np.moveaxis(new, 0, axis).astype(weight.dtype), shift


def biased(bias: Any, shift: Any) -> Any:
    """The bias with what it gains, in its own shape and type."""
    return (bias.astype(np.float64) + shift.reshape(bias.shape)).astype(bias.dtype)


def lost_positions(product: Product, units: Mapping[Any, Sequence[int]]) -> list[int]:
    """Channels of what a product reads that go with those units, by group."""
    found: set[int] = set()
    for group, which in units.items():
        at = group.positions(*product.data)
        if at is not None:
            found.update(at[list(which)].reshape(-1).tolist())
    return sorted(found)
