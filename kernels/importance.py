"""What each unit of a weight is worth: weighted sums over all axes but one, in one pass over memory.

A unit is one position along `axis`: an output channel, an input channel, a head's slice. Of its weights w:

    no more given       Σ w²            their energy (magnitude pruning)
    gradients g         Σ (w · g)²      what the loss moves by without them, to first order (Molchanov et al., "Importance
                                        estimation for neural network pruning", CVPR 2019)
    norms a             Σ |w| · a       what they make of inputs of that size (Sun et al., "A simple and effective pruning
                                        approach for large language models", ICLR 2024: Wanda), with one norm for each
                                        position along `norms_axis`, which may be `axis` itself

Weights and gradients are float32 of 1 to 5 axes, results float64 [units]. Every term is calculated and added in float64, where
products of float32 are exact and can't overflow; the versions differ in the order of adding alone, by at most n · 2⁻⁵³ of
the sum of n terms (which are never negative). NaN and infinity go through to their unit's score, no other's. A unit without
weights has score 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from perwatt.kernels import _importance_cpu as on_cpu

Doubles = npt.NDArray[np.float64]

MOST_AXES = 5


class _Task(NamedTuple):
    """What is to be added: the kind of term, weights and gradients as [outer · units · inner] (gradients are the weights where
    there are none), the shape, and factors of the outer and the inner positions and of the units."""

    kind: int
    weights: Any
    gradients: Any
    shape: tuple[int, int, int]
    outer: Doubles
    inner: Doubles
    units: Doubles


def reference(
    weights: npt.ArrayLike,
    axis: int,
    *,
    gradients: npt.ArrayLike | None = None,
    norms: npt.ArrayLike | None = None,
    norms_axis: int | None = None,
) -> Doubles:
    """Scores of the units along `axis`, float64 [units].

    Raises ValueError for shapes, axes and numbers of norms that don't fit, and for both gradients and norms."""
    task = _task(weights, axis, gradients, norms, norms_axis)
    given = task.weights.reshape(task.shape).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        if task.kind == on_cpu.SQUARES:
            terms = given * given
        elif task.kind == on_cpu.PRODUCTS:
            terms = (given * task.gradients.reshape(task.shape)) ** 2
        else:
            terms = np.abs(given) * task.outer[:, None, None] * task.inner
        return np.asarray(terms.sum(axis=(0, 2)) * task.units)


def compute(
    weights: npt.ArrayLike,
    axis: int,
    *,
    gradients: npt.ArrayLike | None = None,
    norms: npt.ArrayLike | None = None,
    norms_axis: int | None = None,
) -> Doubles:
    """What `reference` returns, up to the order of adding, compiled by Numba, on one thread."""
    task = _task(weights, axis, gradients, norms, norms_axis)
    outer, units, inner = task.shape
    found = np.zeros(units)
    if task.weights.size:
        arrays = (task.weights, task.gradients, task.kind, task.outer, task.inner)
        if inner > 1 and (inner >= on_cpu.RUN_AT_LEAST or outer < on_cpu.FEW_ROWS):
            on_cpu.compiled(on_cpu._runs)(*arrays, units, found)
        else:
            wide = np.zeros(units * inner) if inner > 1 else found
            on_cpu.compiled(on_cpu._columns)(*arrays[:4], wide)
            if inner > 1:
                found = (wide.reshape(units, inner) * task.inner).sum(axis=1)
    return found * task.units


def compute_cuda(
    weights: Any,
    axis: int,
    *,
    gradients: Any = None,
    norms: npt.ArrayLike | None = None,
    norms_axis: int | None = None,
) -> Doubles:
    """What `reference` returns, up to the order of adding, calculated on a GPU, where weights and gradients may lie already
    (float32, contiguous)."""
    from perwatt.kernels import _importance_cuda as on_gpu

    task = _task(weights, axis, gradients, norms, norms_axis)
    if not all(task.shape):
        return np.zeros(task.shape[1])
    return np.asarray(on_gpu.run(*task[:6]) * task.units)


def _task(weights: Any, axis: int, gradients: Any, norms: Any, norms_axis: int | None) -> _Task:
    if gradients is not None and norms is not None:
        raise ValueError("both gradients and norms are given; one of them decides")
    if (norms is None) != (norms_axis is None):
        raise ValueError("norms and norms_axis are given together, or neither")
    given = _array(weights)
    sizes = tuple(int(length) for length in given.shape)
    if not 1 <= len(sizes) <= MOST_AXES:
        raise ValueError(f"weights of {len(sizes)} axes; 1 to {MOST_AXES} are possible")
    axis = _place(axis, sizes)
    beside = given if gradients is None else _array(gradients)
    if tuple(beside.shape) != sizes:
        raise ValueError(f"gradients of shape {tuple(beside.shape)} for weights of {sizes}")
    before, behind = sizes[:axis], sizes[axis + 1 :]
    shape = int(np.prod(before, dtype=np.int64)), sizes[axis], int(np.prod(behind, dtype=np.int64))
    outer, units, inner = np.ones(shape[0]), np.ones(shape[1]), np.ones(shape[2])
    kind = on_cpu.SQUARES if gradients is None else on_cpu.PRODUCTS
    if norms is not None and norms_axis is not None:
        kind, place = on_cpu.NORMS, _place(norms_axis, sizes)
        sized = np.asarray(norms, np.float64)
        if sized.shape != (sizes[place],):
            raise ValueError(f"norms of shape {sized.shape} for an axis of {sizes[place]}")
        if place < axis:
            outer = _spread(sized, place, before)
        elif place > axis:
            inner = _spread(sized, place - axis - 1, behind)
        else:
            units = sized
    flat = given.reshape(-1)
    return _Task(kind, flat, flat if gradients is None else beside.reshape(-1), shape, outer, inner, units)


def _array(values: Any) -> Any:
    """float32 and contiguous; where it lies on a GPU, as it is."""
    if not hasattr(values, "__cuda_array_interface__"):
        return np.ascontiguousarray(values, np.float32).reshape(np.shape(values))
    from perwatt.kernels import _importance_cuda as on_gpu

    return on_gpu.checked(values)


def _place(axis: int, sizes: tuple[int, ...]) -> int:
    if not -len(sizes) <= axis < len(sizes):
        raise ValueError(f"no axis {axis} in weights of {len(sizes)} axes")
    return axis % len(sizes)


def _spread(norms: Doubles, place: int, sizes: tuple[int, ...]) -> Doubles:
    """One norm for each position of several axes, of which `place` decides."""
    shape = [1] * len(sizes)
    shape[place] = -1
    return np.ascontiguousarray(np.broadcast_to(norms.reshape(shape), sizes)).reshape(-1)
