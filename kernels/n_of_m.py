"""N:M selection: of every M neighbours in a row the N with the largest scores are kept.

    scores  3  9  1  7 | 5  5  2  5        with N = 2, M = 4 gives        mask  0  1  0  1 | 1  1  0  0

2:4 is the pattern that NVIDIA's sparse tensor cores calculate in half the time. An element is kept where fewer than N of its
group beat it: with a larger score, or with an equal one that stands before it. So ties go to the first, exactly N of each
group are kept, and −0 and 0 are equal. All versions give the same mask, bit for bit.

`compute` gives the mask, `compute_pruned` weights with zeros where the mask has them, without making a mask in between: each
reads and writes everything once.

Limits: 1 ≤ N < M ≤ 32; scores and weights are float32 [rows, columns], of as many columns as M divides. NaN among the scores is a
ValueError, infinity is a score like any other; weights may be anything, and zeros put in are +0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from perwatt.kernels import _n_of_m_cpu as on_cpu

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

LARGEST_M = 32


def reference(scores: npt.ArrayLike, n: int, m: int) -> Mask:
    """Which of `scores` [rows, columns] are kept: bool [rows, columns].

    Raises ValueError for NaN, for shapes and for patterns that the module's limits exclude."""
    given = _checked(scores, n, m)
    if np.isnan(given).any():
        raise ValueError(NAN)
    groups = given.reshape(-1, m)
    order = np.argsort(-groups, axis=1, kind="stable")
    kept = np.zeros(groups.shape, np.bool_)
    np.put_along_axis(kept, order[:, :n], True, axis=1)
    return kept.reshape(given.shape)


def reference_pruned(weights: npt.ArrayLike, scores: npt.ArrayLike, n: int, m: int) -> Floats:
    """`weights` [rows, columns], zero where `reference` keeps nothing: float32. Raises ValueError as that does."""
    kept = reference(scores, n, m)
    return np.where(kept, _weights(weights, kept.shape), np.float32(0))


def compute(scores: npt.ArrayLike, n: int, m: int) -> Mask:
    """What `reference` returns, compiled by Numba, on one thread."""
    given = _checked(scores, n, m)
    kept = np.empty(given.shape, np.uint8)
    flat = given.reshape(-1), kept.reshape(-1)
    if m == 4:
        whole = on_cpu.compiled(on_cpu._mask_of_four)(flat[0], n, flat[1])
    else:
        whole = on_cpu.compiled(on_cpu._mask)(flat[0], n, m, on_cpu.network(n, m), flat[1])
    if not whole:
        raise ValueError(NAN)
    return kept.view(np.bool_)


def compute_pruned(weights: npt.ArrayLike, scores: npt.ArrayLike, n: int, m: int, out: Floats | None = None) -> Floats:
    """What `reference_pruned` returns, compiled by Numba, on one thread; in `out` where that is given (float32, contiguous;
    it may be `weights` itself, and holds nothing of use after a ValueError for NaN)."""
    given = _checked(scores, n, m)
    values = _weights(weights, given.shape)
    found = np.empty_like(values) if out is None else out
    if found.shape != given.shape or found.dtype != np.float32 or not found.flags.c_contiguous:
        raise ValueError(f"out is {found.dtype} {found.shape}; contiguous float32 {given.shape} is needed")
    flat = values.reshape(-1), given.reshape(-1), found.reshape(-1)
    if m == 4:
        whole = on_cpu.compiled(on_cpu._prune_four)(flat[0], flat[1], n, flat[2])
    else:
        whole = on_cpu.compiled(on_cpu._prune)(flat[0], flat[1], n, m, on_cpu.network(n, m), flat[2])
    if not whole:
        raise ValueError(NAN)
    return found


def compute_cuda(scores: Any, n: int, m: int) -> Mask:
    """What `reference` returns, found on a GPU; `scores` may lie there already (float32, contiguous)."""
    kept, shape = _on_gpu(None, scores, n, m)
    return np.asarray(kept.copy_to_host()).reshape(shape).view(np.bool_)


def compute_pruned_cuda(weights: Any, scores: Any, n: int, m: int) -> Floats:
    """What `reference_pruned` returns, found on a GPU; both may lie there already (float32, contiguous)."""
    found, shape = _on_gpu(weights, scores, n, m)
    return np.asarray(found.copy_to_host()).reshape(shape)


def _on_gpu(weights: Any, scores: Any, n: int, m: int) -> tuple[Any, tuple[int, ...]]:
    """The result as a flat array on the GPU, and its shape."""
    from perwatt.kernels import _n_of_m_cuda as on_gpu

    there = hasattr(scores, "__cuda_array_interface__")
    given = scores if there else _checked(scores, n, m)
    if there:
        _check_pattern(tuple(given.shape), n, m)
    values = weights
    if weights is not None and not hasattr(weights, "__cuda_array_interface__"):
        values = _weights(weights, tuple(given.shape))
    found = on_gpu.run(values, given, n, m)
    if found is None:
        raise ValueError(NAN)
    return found, tuple(given.shape)


NAN = "the scores hold NaN"


def _checked(scores: npt.ArrayLike, n: int, m: int) -> Floats:
    given = np.ascontiguousarray(scores, np.float32)
    _check_pattern(np.shape(scores), n, m)
    return given


def _check_pattern(shape: tuple[int, ...], n: int, m: int) -> None:
    if not 1 <= n < m <= LARGEST_M:
        raise ValueError(f"{n} of every {m}: 1 ≤ N < M ≤ {LARGEST_M} is needed")
    if len(shape) != 2:
        raise ValueError(f"scores of shape {shape}; [rows, columns] is needed")
    if shape[1] % m:
        raise ValueError(f"{shape[1]} columns are no multiple of {m}")


def _weights(weights: npt.ArrayLike, shape: tuple[int, ...]) -> Floats:
    given = np.ascontiguousarray(weights, np.float32)
    if given.shape != shape:
        raise ValueError(f"weights of shape {given.shape} with scores of {shape}")
    return given
