"""Group-wise quantization of weights to 4 or 8 bits, as ONNX's blocked QuantizeLinear and DequantizeLinear store it.

Weights of any shape are cut along one axis into groups of `group_size`; the last group of an axis of length D may be short,
so that there are ceil(D / group_size) of them (ONNX operator QuantizeLinear, opset 21, "blocked quantization"). A MatMul's
second input, [in, out], has its groups along axis 0, the weight of a Gemm with transB, [out, in], along axis 1. Each
group has a scale s and a zero point z, and a weight w becomes the code

    q = clip(round_half_to_even(w / s) + z, low, high)        and is read again as        (q − z) · s

in float32, as QuantizeLinear and DequantizeLinear say, so that a backend that quantizes with the same s and z gets the same
codes. A `Scheme` says the rest: `kind` is "int4" (low −8, high 7), "uint4" (0, 15), "int8" or "uint8"; with
half = (high − low + 1) / 2, s and z are

- symmetric: z = low + half, the middle, which is 0 and is not stored (None) where codes are signed. s = m / −half, where m
  is the group's value farthest from 0 (the negative one of two), so that m gets the code that has no mirror image. s is
  negative where m is positive, which ONNX allows, and a value opposite to m may be clipped by half a step. On normal,
  Laplace and t distributed groups of 16 to 128 this has 0.77 to 0.79 × the squared error of max|w| / (half − 1) with 4 bits.
- symmetric and `positive`, for backends that refuse a negative scale: s = max(max w / (half − 1), −min w / half), the least
  that clips nothing; 1.13 to 1.17 × the squared error of signed scales.
- asymmetric: s = (h − l) / (high − low) in float64, rounded, with l = min(w, 0), h = max(w, 0), and
  z = clip(round_half_to_even(−l / s) + low, low, high), so that 0 is exactly representable.

`search` shrinks s by the factor that leaves the least squared error (as AWQ clips: Lin et al., "AWQ: Activation-aware weight
quantization", MLSys 2024; z stays), one of `FACTORS`, or half / (half − 1) where scales are signed: it clips nothing.
The error of factor f is f² · Σ (u/f − clip(round(u/f)))² with u = w / s in float32, added in float64 in the group's order; the
first of equal factors wins. Squares of float32 values are exact in float64, so a fused multiply-add changes nothing. It
leaves 0.87 to 0.93 × the error of 4-bit signed scales.

4-bit codes are packed two to a byte in C order, the first in the low half, the last half 0 where their number is odd, which
is the raw data of ONNX's INT4 and UINT4 tensors.

Each operation has a `reference_…` in NumPy, a `compute_…` in Numba and a `compute_cuda_…` for a GPU: equal bit for bit.

Limits: NaN or infinity among the weights is a ValueError, since no code stands for them. An empty array gives empty arrays.
A group whose |s| would be below `LEAST_SCALE` (zeros, or nearly) gets s = 1, which a search may shrink, hence the code z:
backends that flush subnormal numbers would else divide by 0. Weights within half a step of the largest float32 may be read
again as infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from perwatt.kernels._group_quantize_cpu import ASYMMETRIC, LEAST_SCALE, POSITIVE, SIGNED, compiled

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Quantized = tuple[Codes, Floats, Codes | None]

FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
KINDS = {"int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127), "uint8": (0, 255)}
NOT_FINITE = "weights hold NaN or infinity, which no code stands for"


@dataclass(frozen=True)
class Scheme:
    """What codes are and how scales and zero points are found, as the module says; an unknown kind is a ValueError."""

    kind: str = "int4"
    symmetric: bool = True
    positive: bool = False
    search: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r}; there are {', '.join(KINDS)}")

    @property
    def bounds(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return KINDS[self.kind]

    @property
    def dtype(self) -> npt.DTypeLike:
        """What codes and zero points are stored as."""
        return np.int8 if self.bounds[0] < 0 else np.uint8

    @property
    def mode(self) -> int:
        """How kernels find a scale."""
        return (POSITIVE if self.positive else SIGNED) if self.symmetric else ASYMMETRIC

    @property
    def factors(self) -> Floats:
        """What scales are multiplied by in a search; none without one."""
        low, high = self.bounds
        half = (high - low + 1) / 2
        last = [half / (half - 1)] if self.mode == SIGNED else []
        return np.array([*FACTORS, *last] if self.search else [], np.float32)


INT4 = Scheme()


def reference_quantize(weights: npt.ArrayLike, group_size: int, axis: int = 0, scheme: Scheme = INT4) -> Quantized:
    """Codes (int8 or uint8, the weights' shape), scales (float32) and zero points (the codes' type; None: all are 0).

    Scales and zero points have the weights' shape but for `axis`, where they have ceil(length / group_size). Weights that
    aren't float32 are rounded to it first. `positive` matters where `symmetric`.

    Raises ValueError for weights without an axis, NaN or infinity, an axis that they lack, a group_size below 1, or an
    unknown kind."""
    given, axis = _checked(weights, group_size, axis)
    low, high = (np.float32(bound) for bound in scheme.bounds)
    if not np.isfinite(given).all():
        raise ValueError(NOT_FINITE)
    codes, scales, zeros = _results(given.shape, axis, group_size, scheme)
    blocks, coded, scaled, zeroed = (_blocked(array, axis) for array in (given, codes, scales, zeros))
    for group in range(scaled.shape[1]):
        part = slice(group * group_size, (group + 1) * group_size)
        block = blocks[:, part]
        scale, zero = _reference_scale(block.min(axis=1), block.max(axis=1), low, high, scheme.mode)
        if scheme.search:
            scale = _reference_search(block, scale, zero, low, high, scheme.factors)
        coded[:, part] = np.clip(np.rint(block / scale[:, None]) + zero[:, None], low, high)
        scaled[:, group], zeroed[:, group] = scale, zero
    return codes, scales, _stored(zeros, scheme)


def _reference_scale(lows: Floats, highs: Floats, low: Any, high: Any, mode: int) -> tuple[Floats, Floats]:
    half = (high - low + np.float32(1)) / np.float32(2)
    if mode == ASYMMETRIC:
        lows, highs = np.minimum(lows, np.float32(0)), np.maximum(highs, np.float32(0))
        scale = ((highs.astype(np.float64) - lows) / np.float64(high - low)).astype(np.float32)
    elif mode == SIGNED:
        scale = np.where(highs > -lows, highs, lows) / -half
    else:
        scale = np.maximum(highs / (half - np.float32(1)), lows / -half)
    scale = np.where(np.abs(scale) < LEAST_SCALE, np.float32(1), scale)
    zero = np.rint(-lows / scale) + low if mode == ASYMMETRIC else np.full_like(scale, low + half)
    return scale, np.clip(zero, low, high)


def _reference_search(block: Floats, scale: Floats, zero: Floats, low: Any, high: Any, factors: Floats) -> Floats:
    steps = block / scale[:, None]
    best, least = scale, np.full(scale.shape, np.inf)
    for factor in factors:
        error = np.zeros(scale.shape)
        for i in range(steps.shape[1]):
            step = steps[:, i] / factor
            missed = (step - np.clip(np.rint(step), low - zero, high - zero)).astype(np.float64)
            error += missed * missed
        error *= np.float64(factor) * np.float64(factor)
        best = np.where(error < least, scale * factor, best)
        least = np.minimum(error, least)
    return best


def compute_quantize(weights: npt.ArrayLike, group_size: int, axis: int = 0, scheme: Scheme = INT4) -> Quantized:
    """What `reference_quantize` returns, compiled by Numba."""
    given, axis = _checked(weights, group_size, axis)
    codes, scales, zeros = _results(given.shape, axis, group_size, scheme)
    _run(given, axis, group_size, scheme, codes.view(np.uint8), None, scales, zeros)
    return codes, scales, _stored(zeros, scheme)


def compute_cuda_quantize(weights: Any, group_size: int, axis: int = 0, scheme: Scheme = INT4) -> Any:
    """What `reference_quantize` returns, found on a GPU; weights that lie there (float32, C order) give arrays there."""
    given, axis = _checked_cuda(weights, group_size, axis)
    found = _quantize_cuda(given, group_size, axis, scheme)
    return tuple(_home(array, weights) for array in found)


def _quantize_cuda(given: Any, group_size: int, axis: int, scheme: Scheme) -> tuple[Any, Any, Any]:
    from perwatt.kernels import _group_quantize_cuda as gpu

    codes, scales, zeros = _results(given.shape, axis, group_size, scheme)
    if codes.size:
        blocks = _blocks(given.shape, axis)
        *made, finite = gpu.quantize(
            given.reshape(codes.size), blocks, group_size, scheme.bounds, scheme.mode, scheme.factors, codes.dtype
        )
        if not finite:
            raise ValueError(NOT_FINITE)
        codes, scales, zeros = (m.reshape(array.shape) for m, array in zip(made, (codes, scales, zeros), strict=True))
    return codes, scales, _stored(zeros, scheme)


def reference_quantize_packed(
    weights: npt.ArrayLike, group_size: int, axis: int = 0, scheme: Scheme = INT4
) -> Quantized:
    """`reference_quantize`, its codes through `reference_pack`; zero points are one a byte. ValueError for 8 bits, too."""
    _checked_4_bits(scheme.kind)
    codes, scales, zeros = reference_quantize(weights, group_size, axis, scheme)
    return reference_pack(codes), scales, zeros


def compute_quantize_packed(weights: npt.ArrayLike, group_size: int, axis: int = 0, scheme: Scheme = INT4) -> Quantized:
    """What `reference_quantize_packed` returns, in one pass over memory where rows hold whole bytes."""
    _checked_4_bits(scheme.kind)
    given, axis = _checked(weights, group_size, axis)
    if given.size == 0 or _laid(given, axis).shape[-1] % 2:
        codes, scales, stored = compute_quantize(given, group_size, axis, scheme)
        return compute_pack(codes), scales, stored
    scales, zeros = _results(given.shape, axis, group_size, scheme)[1:]
    packed = np.empty(given.size // 2, np.uint8)
    _run(given, axis, group_size, scheme, None, packed, scales, zeros)
    return packed, scales, _stored(zeros, scheme)


def compute_cuda_quantize_packed(weights: Any, group_size: int, axis: int = 0, scheme: Scheme = INT4) -> Any:
    """What `reference_quantize_packed` returns, found on a GPU; codes are packed there, by a second kernel."""
    from perwatt.kernels import _group_quantize_cuda as gpu

    _checked_4_bits(scheme.kind)
    given, axis = _checked_cuda(weights, group_size, axis)
    codes, scales, zeros = _quantize_cuda(given, group_size, axis, scheme)
    packed = gpu.pack(codes.reshape(codes.size)) if codes.size else np.empty(0, np.uint8)
    return tuple(_home(array, weights) for array in (packed, scales, zeros))


def reference_dequantize(
    codes: Codes, scales: npt.ArrayLike, zero_points: Codes | None, group_size: int, axis: int = 0
) -> Floats:
    """(code − zero point) · scale in float32, in the codes' shape; codes and zero points are int8 or uint8.

    Raises ValueError for another type of code, or scales or zero points whose shape is not that of the groups."""
    given, scaled, zeros, axis = _checked_codes(codes, scales, zero_points, group_size, axis)
    repeated = np.repeat(scaled, group_size, axis).take(range(given.shape[axis]), axis)
    steps = given.astype(np.float32)
    if zeros is not None:
        steps -= np.repeat(zeros, group_size, axis).take(range(given.shape[axis]), axis)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(steps * repeated)


def compute_dequantize(
    codes: Codes,
    scales: npt.ArrayLike,
    zero_points: Codes | None,
    group_size: int,
    axis: int = 0,
    *,
    out: Floats | None = None,
) -> Floats:
    """What `reference_dequantize` returns, compiled by Numba; written to `out` where it is given (float32, C order)."""
    given, scaled, zeros, axis = _checked_codes(codes, scales, zero_points, group_size, axis)
    found = np.empty(given.shape, np.float32) if out is None else out
    if found.shape != given.shape or found.dtype != np.float32 or not found.flags.c_contiguous:
        raise ValueError(f"out is {found.dtype}{found.shape}; it must be float32{given.shape} in C order")
    if given.size:
        stored = [_laid(array, axis) for array in (given.view(np.uint8), scaled, found)]
        zeroed = _none(stored[0].ndim) if zeros is None else _laid(zeros.view(np.uint8), axis)
        kernel = compiled("dequantize_last" if stored[0].ndim == 2 else "dequantize_inner")
        kernel(stored[0], stored[1], zeroed, given.dtype == np.int8, group_size, stored[2])
    return found


def compute_cuda_dequantize(codes: Any, scales: Any, zero_points: Any, group_size: int, axis: int = 0) -> Any:
    """What `reference_dequantize` returns, found on a GPU; codes that lie there, with all the rest, give an array there."""
    from perwatt.kernels import _group_quantize_cuda as gpu

    given, scaled, zeros, axis = _checked_codes(codes, scales, zero_points, group_size, axis)
    if not given.size:
        return np.empty(given.shape, np.float32)
    zeroed = None if zeros is None else _on_gpu(zeros)
    found = gpu.dequantize(_on_gpu(given), _on_gpu(scaled), zeroed, _blocks(given.shape, axis), group_size)
    return _home(found.reshape(given.shape), codes)


def reference_pack(codes: Codes) -> Bytes:
    """Two codes a byte, one axis, the first in the low half; codes are int8 or uint8, of which the low 4 bits are kept.

    Raises ValueError for another type of code."""
    flat = _checked_bytes(codes).ravel().view(np.uint8) & 0xF
    pairs = np.zeros(-(-len(flat) // 2) * 2, np.uint8)
    pairs[: len(flat)] = flat
    return np.asarray(pairs[0::2] | pairs[1::2] << 4)


def compute_pack(codes: Codes) -> Bytes:
    """What `reference_pack` returns, compiled by Numba."""
    flat = np.require(_checked_bytes(codes), None, ["C", "A"]).reshape(-1).view(np.uint8)
    packed = np.empty(-(-len(flat) // 2), np.uint8)
    whole = len(flat) // 2 * 2
    if whole:
        compiled("pack")(np.require(flat[:whole].view(np.uint16), None, ["A"]), packed[: whole // 2])
    if whole < len(flat):
        packed[-1] = flat[-1] & 0xF
    return packed


def compute_cuda_pack(codes: Any) -> Any:
    """What `reference_pack` returns, found on a GPU; codes that lie there (C order) give an array there."""
    from perwatt.kernels import _group_quantize_cuda as gpu

    given = _checked_bytes(codes)
    return _home(gpu.pack(_on_gpu(given)), codes) if given.size else np.empty(0, np.uint8)


def reference_unpack(packed: Bytes, shape: tuple[int, ...], kind: str = "int4") -> Codes:
    """The codes that were packed, int8 or uint8, in this shape.

    Raises ValueError for an 8-bit kind, or bytes that are not as many as that shape needs, or not uint8."""
    given = _checked_packed(packed, shape, kind)
    codes = np.stack([given & 0xF, given >> 4], axis=1).ravel()[: math.prod(shape)]
    return codes.reshape(shape) if kind == "uint4" else ((codes ^ 8) - 8).view(np.int8).reshape(shape)


def compute_unpack(packed: Bytes, shape: tuple[int, ...], kind: str = "int4") -> Codes:
    """What `reference_unpack` returns, compiled by Numba."""
    given = np.require(_checked_packed(packed, shape, kind), None, ["C", "A"])
    codes = np.empty(2 * len(given), np.uint8)
    if len(given):
        compiled("unpack")(given, kind == "int4", codes.view(np.uint16))
    return codes.view(np.int8 if kind == "int4" else np.uint8)[: math.prod(shape)].reshape(shape)


def compute_cuda_unpack(packed: Any, shape: tuple[int, ...], kind: str = "int4") -> Any:
    """What `reference_unpack` returns, found on a GPU; bytes that lie there give an array there."""
    from perwatt.kernels import _group_quantize_cuda as gpu

    given, dtype = _checked_packed(packed, shape, kind), np.dtype(Scheme(kind).dtype)
    if not given.size:
        return np.empty(shape, dtype)
    return _home(gpu.unpack(_on_gpu(given), math.prod(shape), dtype).reshape(shape), packed)


def _on_device(array: Any) -> bool:
    return hasattr(array, "copy_to_host")


def _on_gpu(array: Any) -> Any:
    """On the GPU, with one axis."""
    from numba import cuda

    given = array if _on_device(array) else cuda.to_device(np.require(array, None, ["C", "A"]))
    return given.reshape(math.prod(given.shape))


def _home(array: Any, given: Any) -> Any:
    """Back from the GPU, unless what was given lies there."""
    return array.copy_to_host() if _on_device(array) and not _on_device(given) else array


def _checked_cuda(weights: Any, group_size: int, axis: int) -> tuple[Any, int]:
    if not _on_device(weights):
        given, axis = _checked(weights, group_size, axis)
        return (_on_gpu(given).reshape(given.shape) if given.size else given), axis
    if weights.dtype != np.float32:
        raise ValueError(f"weights on the GPU are {weights.dtype}; they must be float32")
    return weights, _checked_axis(weights, group_size, axis)


def _checked(weights: npt.ArrayLike, group_size: int, axis: int) -> tuple[Floats, int]:
    with np.errstate(over="ignore"):
        given = np.require(weights, np.float32, ["C", "A"])
    return given, _checked_axis(given, group_size, axis)


def _checked_axis(given: npt.NDArray[Any], group_size: int, axis: int) -> int:
    if given.ndim == 0:
        raise ValueError("a scalar has no axis to group along")
    if not -given.ndim <= axis < given.ndim:
        raise ValueError(f"axis {axis} of an array of {given.ndim} axes")
    if group_size < 1:
        raise ValueError(f"a group size of {group_size}; it must be at least 1")
    return axis % given.ndim


def _in_order(array: Any, dtype: Any = None) -> Any:
    return array if _on_device(array) else np.require(array, dtype, ["C", "A"])


def _checked_4_bits(kind: str) -> None:
    if kind not in ("int4", "uint4"):
        raise ValueError(f"kind {kind!r} is not packed; int4 and uint4 are")


def _checked_bytes(codes: Codes) -> Codes:
    given = codes if _on_device(codes) else np.asarray(codes)
    if given.dtype not in (np.int8, np.uint8):
        raise ValueError(f"codes of type {given.dtype}; they must be int8 or uint8")
    return given


def _checked_packed(packed: Bytes, shape: tuple[int, ...], kind: str) -> Bytes:
    _checked_4_bits(kind)
    given, wanted = packed if _on_device(packed) else np.asarray(packed), -(-math.prod(shape) // 2)
    if given.dtype != np.uint8 or given.shape != (wanted,):
        raise ValueError(f"{given.dtype}{given.shape} packed; {shape} needs uint8({wanted},)")
    return given


def _checked_codes(
    codes: Codes, scales: npt.ArrayLike, zero_points: Codes | None, group_size: int, axis: int
) -> tuple[Codes, Floats, Codes | None, int]:
    given = _in_order(_checked_bytes(codes))
    axis = _checked_axis(given, group_size, axis)
    wanted = _group_shape(given.shape, group_size, axis)
    scaled = _in_order(scales, np.float32)
    if scaled.shape != wanted:
        raise ValueError(f"scales of shape {scaled.shape}; groups of {group_size} along axis {axis} make {wanted}")
    if zero_points is None:
        return given, scaled, None, axis
    zeros = _in_order(zero_points)
    if zeros.shape != wanted or zeros.dtype != given.dtype:
        raise ValueError(f"zero points are {zeros.dtype}{zeros.shape}; they must be {given.dtype}{wanted}")
    return given, scaled, zeros, axis


def _group_shape(shape: tuple[int, ...], group_size: int, axis: int) -> tuple[int, ...]:
    return (*shape[:axis], -(-shape[axis] // group_size), *shape[axis + 1 :])


def _results(shape: tuple[int, ...], axis: int, group_size: int, scheme: Scheme) -> tuple[Codes, Floats, Codes]:
    groups = _group_shape(shape, group_size, axis)
    return np.empty(shape, scheme.dtype), np.empty(groups, np.float32), np.empty(groups, scheme.dtype)


def _stored(zeros: Codes, scheme: Scheme) -> Codes | None:
    return None if scheme.symmetric and scheme.bounds[0] < 0 else zeros


def _blocks(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """How much lies before the axis, on it, and behind it."""
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def _blocked(array: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """The same with three axes: a view, as the array is in C order."""
    return array.reshape(_blocks(array.shape, axis))


def _laid(array: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """`_blocked`, without the last axis where nothing lies behind."""
    blocks = _blocked(array, axis)
    return blocks.reshape(blocks.shape[:2]) if blocks.shape[2] == 1 else blocks


def _none(dims: int) -> Bytes:
    return np.empty((0,) * dims, np.uint8)


def _run(
    given: Floats,
    axis: int,
    group_size: int,
    scheme: Scheme,
    codes: Bytes | None,
    packed: Bytes | None,
    scales: Floats,
    zeros: Codes,
) -> None:
    """The kernel for this layout, which writes either codes or packed codes, scales and zero points."""
    if given.size == 0:
        return
    weights = _laid(given, axis)
    low, high = (np.float32(bound) for bound in scheme.bounds)
    room = np.empty((1,) * (weights.ndim - 1) + weights.shape[-1:], np.uint8)
    kernel = compiled("quantize_last" if weights.ndim == 2 else "quantize_inner")
    finite = kernel(
        weights,
        group_size,
        low,
        high,
        scheme.mode,
        scheme.factors,
        room if codes is None else _laid(codes, axis),
        _none(weights.ndim) if packed is None else packed.reshape(*weights.shape[:-1], -1),
        _laid(scales, axis),
        _laid(zeros.view(np.uint8), axis),
    )
    if not finite:
        raise ValueError(NOT_FINITE)
