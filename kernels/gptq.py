"""GPTQ: codes of a layer's weights of which each makes up for the errors of those before it.

A layer gives X·Wᵀ with weights W, [out, in], for inputs X, [n, in]. Codes Q (times their scales) change that by a squared
error of ½·n·trace((W − Q) H (W − Q)ᵀ), H = 2·XᵀX/n. Rounding each weight to the nearest code ignores that inputs are correlated.
GPTQ (Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate post-training quantization for generative pre-trained
transformers", ICLR 2023, algorithm 1) quantizes column after column and moves the columns that are left to where they
make up best for what was rounded away. With H⁻¹ = UᵀU, U upper triangular, and w the column i as it has been moved:

    q = clip(round_half_to_even(w / s) + z, low, high)        e = (w − (q − z)·s) / U[i, i]        W[:, j] −= e·U[i, j], j > i

`reference` says just that, in float64. `compute` gets the same from one Cholesky factorization, of H with its rows and columns
reversed: H = R·Rᵀ with R = U⁻¹, also upper triangular. With D the weights as they were given minus what their codes stand
for, the columns B of a block (128, or whole groups) are moved by all columns before it to

    W[:, B] + D[:, :b] @ (R[:b, B] · U[B, B]),        U[B, B] = R[B, B]⁻¹

so that D, not a copy of the weights, is carried on, by one matrix product a block (that GPTQ is such a feedback of D: Chee, Cai,
Kuleshov, De Sa: "QuIP", NeurIPS 2023, theorem 6), and nothing larger than a block is inverted. Within the block the columns go
by U[B, B] as above. All this is in float32.

H is used with `damping` × the mean of its diagonal added to the diagonal, where the mean is over the live inputs; an input
that was always 0 (diagonal 0) is dead, its weights become 0 and its diagonal the mean. H is taken to be symmetric; `compute`
reads one half of it. It is factorized in float32 where the damping covers what that rounds away, else in float64.

`group_size` neighbouring columns share a scale s and a zero point z, the last group may be short (None: a whole row is one
group). `bits` is 2, 3, 4 or 8. Symmetric codes are int8, from −half to half − 1 with half = 2^(bits − 1), z = 0 (None):
s = m / −half, where m is the group's value farthest from 0 (the negative one of two), so it may be negative, as ONNX
allows; `positive`, for backends that don't: s = max(max w / (half − 1), −min w / half). Asymmetric codes are uint8, from 0 to
2^bits − 1: s = (h − l) / (2^bits − 1), z = round_half_to_even(−l / s), with l = min(w, 0), h = max(w, 0). A group whose |s|
would be below 2⁻¹²⁵ gets s = 1. `search` shrinks s by the one of `FACTORS` (signed: also half / (half − 1), which clips
nothing) that leaves the least Σ H[j, j]·(w_j − (q_j − z)·s)² over the group's columns j, z kept.

The columns are taken from first to last, and a group's scales are found when its first column is reached. `ordered` takes
those with the largest diagonal of H first (the first of equal ones) and finds all scales beforehand, from the given weights,
since groups stay those of neighbouring columns; codes come back in the original order.

`compute` and `compute_cuda` agree with `reference` up to rounding: each code is the nearest one to a w that differs from
the exact one by about n·2⁻²⁴ of the weights' size. Where that moves a code across the middle of two, later codes of its row
move as well, to an equally good solution: the error over the outputs stays within 1 % of the reference's.

Limits: NaN, infinity and weights beyond ±1e30 are ValueErrors, since float32 has to hold what they are moved to; so is a
Hessian that isn't positive definite with its damping, or has no rows. No rows of weights: no codes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from perwatt.kernels import _gptq_cpu as cpu

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Codes = npt.NDArray[Any]

FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
BITS = (2, 3, 4, 8)
BLOCK = 128
LARGEST = 1e30
EASY = 16 * 2.0**-24
"""Damping above EASY × columns bears float32: a factorization is exact for an H moved by about columns · 2⁻²⁴ of its largest
eigenvalue, which is at most columns × the mean of the diagonal, and near that only where all inputs are alike."""


class Quantized(NamedTuple):
    """codes: int8 or uint8 [out, in]; scales: float32 [out, groups]; zero_points: uint8 [out, groups], or None: all are 0."""

    codes: Codes
    scales: Floats
    zero_points: Codes | None

    def dequantized(self, group_size: int | None = None) -> Floats:
        """(code − zero point) · scale, float32 [out, in]."""
        width = self.codes.shape[1]
        group = np.arange(width) // (group_size or width)
        codes = self.codes.astype(np.float32)
        if self.zero_points is not None:
            codes -= self.zero_points[:, group]
        return np.asarray(codes * self.scales[:, group])


class Factor(NamedTuple):
    """What columns need to know of a layer's inputs; layers with the same inputs (query, key, value) share it.

    order: columns, the first to be quantized last; triangle: float32 [in, in], its upper half T with TᵀT = damped H over the
    mean of its diagonal, in that order; importance: H's diagonal over its mean, 0 where an input is dead; ordered: whether
    that decides the order."""

    triangle: Floats
    order: npt.NDArray[np.int64]
    importance: Floats
    ordered: bool


def reference(
    weights: npt.ArrayLike,
    hessian: npt.ArrayLike,
    bits: int = 4,
    group_size: int | None = None,
    *,
    symmetric: bool = True,
    positive: bool = False,
    search: bool = False,
    damping: float = 0.01,
    ordered: bool = False,
) -> Quantized:
    """Codes, scales and zero points of `weights` [out, in] for inputs with `hessian` [in, in]: column by column, float64.

    Raises ValueError for shapes, numbers and settings that the module's limits exclude."""
    given, size, mode = _checked(weights, bits, group_size, symmetric, positive)
    whole, diagonal, damped = _checked_hessian(hessian, damping, given.shape[1])
    if not np.isfinite(whole).all():
        raise ValueError(_refusal(whole))
    dead = diagonal == 0
    moved = np.where(dead, 0.0, given.astype(np.float64))
    damp = np.full(len(diagonal), damped) + np.where(dead, _live_mean(diagonal), 0.0)
    order = np.argsort(-diagonal, kind="stable") if ordered else np.arange(len(diagonal))
    try:
        inverse = np.linalg.inv((whole.astype(np.float64) + np.diag(damp))[np.ix_(order, order)])
        upper = np.linalg.cholesky(inverse, upper=True)
    except np.linalg.LinAlgError:
        raise ValueError(INDEFINITE) from None
    low, high = _range(bits, mode)
    groups = [np.arange(first, min(first + size, len(order))) for first in range(0, len(order), size)]
    scales, zeros = np.empty((len(given), len(groups)), np.float32), np.zeros((len(given), len(groups)))
    codes = np.empty(given.shape, np.uint8 if mode == cpu.ASYMMETRIC else np.int8)
    factors = _factors(bits, mode, search)
    original = moved.copy()
    for i, column in enumerate(order):
        group = column // size
        if i == 0 and ordered:
            for g, columns in enumerate(groups):
                scales[:, g], zeros[:, g] = _scale(original[:, columns], diagonal[columns], low, high, mode, factors)
        elif column % size == 0 and not ordered:
            columns = groups[group]
            scales[:, group], zeros[:, group] = _scale(moved[:, columns], diagonal[columns], low, high, mode, factors)
        scale, zero = scales[:, group].astype(np.float64), zeros[:, group]
        code = np.clip(np.rint(moved[:, column] / scale) + zero, low, high)
        error = (moved[:, column] - (code - zero) * scale) / upper[i, i]
        codes[:, column] = code
        moved[:, order[i + 1 :]] -= error[:, None] * upper[i, i + 1 :]
    return Quantized(codes, scales, zeros.astype(np.uint8) if mode == cpu.ASYMMETRIC else None)


def _scale(group: Doubles, weight: Doubles, low: int, high: int, mode: int, factors: Floats) -> tuple[Floats, Doubles]:
    half = (high - low + 1) / 2
    least, most = np.minimum(group.min(axis=1), 0), np.maximum(group.max(axis=1), 0)
    if mode == cpu.ASYMMETRIC:
        scale = (most - least) / high
    elif mode == cpu.SIGNED:
        scale = np.where(most > -least, most, least) / -half
    else:
        scale = np.maximum(most / (half - 1), least / -half)
    scale = np.where(np.abs(scale) < cpu.LEAST_SCALE, 1.0, scale)
    zero = np.minimum(np.rint(-least / scale), high) if mode == cpu.ASYMMETRIC else np.zeros_like(scale)
    best, fewest = scale, np.full(scale.shape, np.inf)
    for factor in factors.astype(np.float64):
        tried = (scale * factor)[:, None]
        error = (
            group - np.clip(np.rint(group / tried), low - zero[:, None], high - zero[:, None]) * tried
        ) ** 2 @ weight
        best = np.where(error < fewest, scale * factor, best)
        fewest = np.minimum(error, fewest)
    return best.astype(np.float32), zero


def compute(
    weights: npt.ArrayLike,
    hessian: npt.ArrayLike,
    bits: int = 4,
    group_size: int | None = None,
    *,
    symmetric: bool = True,
    positive: bool = False,
    search: bool = False,
    damping: float = 0.01,
    ordered: bool = False,
) -> Quantized:
    """What `reference` returns, up to rounding: blocks of columns by Numba, the products between blocks by BLAS."""
    given, _, _ = _checked(weights, bits, group_size, symmetric, positive)
    factor = factorize(hessian, damping=damping, ordered=ordered, width=given.shape[1])
    return compute_columns(given, factor, bits, group_size, symmetric=symmetric, positive=positive, search=search)


def factorize(
    hessian: npt.ArrayLike, *, damping: float = 0.01, ordered: bool = False, width: int | None = None
) -> Factor:
    """The part of `compute` that only the inputs decide. Raises ValueError as `compute` does; `width`: columns expected."""
    # Not NumPy's: LAPACK in place is 5 × faster, and NNCF, which perwatt needs, needs SciPy.
    from scipy.linalg.lapack import dpotrf, spotrf

    inputs = _inputs(hessian, damping, ordered, width)
    order = inputs.order[::-1].copy()
    kinds = [(np.float32, spotrf), (np.float64, dpotrf)]
    for kind, potrf in kinds if damping >= EASY * len(order) else kinds[1:]:
        triangle = np.empty(inputs.hessian.shape, kind)
        cpu.compiled(cpu._gather)(inputs.hessian, order, 1 / inputs.mean, triangle)
        np.fill_diagonal(triangle, inputs.ridge[order])
        found, failed = potrf(triangle.T, lower=1, clean=0, overwrite_a=1)
        if not failed and np.isfinite(found.diagonal()).all():
            return Factor(found.T.astype(np.float32, copy=False), order, inputs.importance, ordered)
    raise ValueError(_refusal(inputs.hessian))


def compute_columns(
    weights: npt.ArrayLike,
    factor: Factor,
    bits: int = 4,
    group_size: int | None = None,
    *,
    symmetric: bool = True,
    positive: bool = False,
    search: bool = False,
) -> Quantized:
    """The rest of `compute`, with what `factorize` returned."""
    given, size, mode = _checked(weights, bits, group_size, symmetric, positive)
    rows, width = given.shape
    if len(factor.order) != width:
        raise ValueError(f"{width} columns of weights, a factor of {len(factor.order)}")
    factors = _factors(bits, mode, search)
    scales, zeros = np.zeros((2, -(-width // size), rows), np.float32)
    static = factor.ordered or size >= width
    settings = (size, static, bits, mode, factors, scales, zeros)
    if static:
        cpu.compiled(cpu._scales)(given, factor.importance, size, bits, mode, factors, scales, zeros)
    codes = np.empty(given.shape, np.uint8)
    ranges = [(width - high, width - low) for low, high in _blocks(width, size, static)]
    blocks = [(low, high, *_within(factor.triangle, low, high)) for low, high in ranges]
    # Row tiles outside, blocks inside: the errors of a tile stay in the second level cache, whatever the layer's size.
    errors = np.empty((width, cpu.TILE), np.float32)
    work = np.zeros((4, _block_size(size, static), cpu.TILE), np.float32)
    kernel = cpu.compiled(cpu._block)
    for row in range(0, rows, cpu.TILE):
        for low, high, coefficients, before in blocks:
            shift = work[1, : high - low]
            if high < width:
                np.matmul(before, errors[high:], out=shift)
            else:
                shift.fill(0)
            columns = factor.order[low:high]
            kernel(given, row, factor.importance, columns, coefficients, errors[low:high], *settings, codes, work)
    return _result(codes, scales, zeros, mode)


def _within(triangle: Floats, low: int, high: int) -> tuple[Floats, Floats]:
    """What a block's columns, in the order of doing, take of what earlier ones of the block miss (U[k, i] / U[k, k], in row i
    and column k), and of the errors of all columns before the block."""
    from scipy.linalg.lapack import strtri

    inverse = np.triu(triangle[low:high, low:high])
    strtri(inverse.T, lower=1, overwrite_c=1)
    before = np.matmul(-inverse[::-1], triangle[low:high, high:])
    inverse /= inverse.diagonal()
    return np.ascontiguousarray(inverse[::-1, ::-1]), before


def _result(codes: Codes, scales: Floats, zeros: Floats, mode: int) -> Quantized:
    """codes: bytes of either type [out, in]; scales, zeros: [groups, out]."""
    if mode == cpu.ASYMMETRIC:
        return Quantized(codes, np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T).astype(np.uint8))
    return Quantized(codes.view(np.int8), np.ascontiguousarray(scales.T), None)


def compute_cuda(
    weights: npt.ArrayLike,
    hessian: npt.ArrayLike,
    bits: int = 4,
    group_size: int | None = None,
    *,
    symmetric: bool = True,
    positive: bool = False,
    search: bool = False,
    damping: float = 0.01,
    ordered: bool = False,
) -> Quantized:
    """What `compute` returns, up to rounding, by a GPU with CUDA: needs torch, which factorizes and multiplies there."""
    import torch

    from perwatt.kernels import _gptq_cuda as gpu

    given, size, mode = _checked(weights, bits, group_size, symmetric, positive)
    inputs = _inputs(hessian, damping, ordered, given.shape[1])
    # Numba's simulator, which runs the kernels where there is no GPU, takes what lies in the host's memory.
    place = "cuda" if torch.cuda.is_available() else "cpu"
    order = torch.from_numpy(inputs.order).to(place)
    ridge = torch.from_numpy(inputs.ridge).to(place)
    whole = torch.tensor(inputs.hessian).to(place)
    triangle = gpu.factorize(whole, order, ridge, 1 / inputs.mean, damping >= EASY * len(order))
    if triangle is None:
        raise ValueError(_refusal(inputs.hessian))
    width, static = given.shape[1], ordered or size >= given.shape[1]
    codes, scales, zeros = gpu.compute_columns(
        torch.tensor(given).to(place), triangle, order, torch.from_numpy(inputs.importance).to(place), bits, size,
        static, mode, torch.from_numpy(_factors(bits, mode, search)).to(place), _blocks(width, size, static),
    )  # fmt: skip
    found = codes.cpu().numpy().astype(np.uint8)
    return _result(np.ascontiguousarray(found), scales.T.cpu().numpy(), zeros.T.cpu().numpy(), mode)


def _block_size(size: int, static: bool) -> int:
    """Columns done between two matrix products: whole groups, where their scales are found on the way."""
    return BLOCK if static else max(BLOCK // size, 1) * size


def _blocks(width: int, size: int, static: bool) -> list[tuple[int, int]]:
    """Ranges of columns, in the order of doing."""
    step = _block_size(size, static)
    return [(first, min(first + step, width)) for first in range(0, width, step)]


class _Inputs(NamedTuple):
    """A checked Hessian, the mean of its diagonal, its diagonal over that with damping and without, and the order of doing."""

    hessian: npt.NDArray[Any]
    mean: float
    ridge: Doubles
    importance: Floats
    order: npt.NDArray[np.int64]


def _inputs(hessian: npt.ArrayLike, damping: float, ordered: bool, width: int | None) -> _Inputs:
    whole, diagonal, damped = _checked_hessian(hessian, damping, width)
    mean = _live_mean(diagonal)
    # H over its mean diagonal: float32 then holds it, whatever the inputs' unit.
    share = diagonal / mean
    ridge = np.where(diagonal == 0, 1.0, share) + damped / mean
    order = np.argsort(-diagonal, kind="stable") if ordered else np.arange(len(diagonal))
    return _Inputs(whole, mean, ridge, share.astype(np.float32), order)


def _refusal(hessian: npt.NDArray[Any]) -> str:
    return INDEFINITE if np.isfinite(hessian).all() else "the Hessian holds NaN or infinity"


INDEFINITE = "the Hessian isn't positive definite: more damping, or more samples, make it so"


def _checked(
    weights: npt.ArrayLike, bits: int, group_size: int | None, symmetric: bool, positive: bool
) -> tuple[Floats, int, int]:
    given = np.ascontiguousarray(weights, np.float32)
    if given.ndim != 2 or not given.shape[1]:
        raise ValueError(f"weights of shape {np.shape(weights)}; [out, in] is needed, with at least one column")
    if bits not in BITS:
        raise ValueError(f"{bits} bits; {', '.join(map(str, BITS))} are possible")
    if group_size is not None and group_size < 1:
        raise ValueError(f"a group size of {group_size}; it must be at least 1, or None for one group a row")
    if len(given) and not max(-given.min(), given.max()) <= LARGEST:
        raise ValueError(f"weights hold NaN, infinity, or something beyond ±{LARGEST:g}")
    mode = (cpu.POSITIVE if positive else cpu.SIGNED) if symmetric else cpu.ASYMMETRIC
    return given, min(group_size or given.shape[1], given.shape[1]), mode


def _checked_hessian(hessian: npt.ArrayLike, damping: float, width: int | None) -> tuple[Codes, Doubles, float]:
    """The Hessian, its diagonal, and what is added to that."""
    whole = np.asarray(hessian)
    whole = np.ascontiguousarray(whole, np.float32 if whole.dtype == np.float32 else np.float64)
    if whole.ndim != 2 or whole.shape != (len(whole),) * 2 or not len(whole) or width not in (None, len(whole)):
        raise ValueError(f"a Hessian of shape {whole.shape} for {'any' if width is None else width} columns")
    if not 0 <= damping < np.inf:
        raise ValueError(f"a damping of {damping}; it must be finite and at least 0")
    diagonal = np.diagonal(whole).astype(np.float64)
    if not np.isfinite(diagonal).all() or (diagonal < 0).any():
        raise ValueError("the Hessian's diagonal holds NaN, infinity, or something negative")
    return whole, diagonal, damping * _live_mean(diagonal)


def _live_mean(diagonal: Doubles) -> float:
    live = diagonal[diagonal > 0]
    return float((live / live.max()).mean() * live.max()) if len(live) else 1.0


def _range(bits: int, mode: int) -> tuple[int, int]:
    return (0, 2**bits - 1) if mode == cpu.ASYMMETRIC else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _factors(bits: int, mode: int, search: bool) -> Floats:
    """What scales are tried times; nothing where nothing is tried."""
    half = 2.0 ** (bits - 1)
    unclipped = (half / (half - 1),) if mode == cpu.SIGNED else ()
    return np.array((*FACTORS, *unclipped) if search else (), np.float32)
