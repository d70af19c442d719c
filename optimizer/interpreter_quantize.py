"""Operators of the interpreter that quantize, dequantize, and compute with quantized integers.

Integer products are computed in float64: they are exact there (8-bit factors, sums below 2**53), run on every device, and
use its fast kernels. Four- and two-bit types have no torch type; they are held one byte an element, so that the type asked
for has to come as `output_dtype` where the zero point doesn't tell it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import DTYPES

UINT8 = 2
RANGES: dict[int, tuple[int, int]] = {
    2: (0, 255), 3: (-128, 127), 4: (0, 65535), 5: (-32768, 32767), 21: (0, 15), 22: (-8, 7), 25: (0, 3), 26: (-2, 1),
}  # fmt: skip
"""What the integer types that one quantizes to can hold, by ONNX's numbers."""
STORED: dict[int, torch.dtype] = {**DTYPES, 21: torch.uint8, 22: torch.int8, 25: torch.uint8, 26: torch.int8}
NUMBERS: dict[torch.dtype, int] = {dtype: number for number, dtype in DTYPES.items()}


@operator("QuantizeLinear", domain="com.microsoft")
@operator("QuantizeLinear", since=10)
def quantize_linear(
    x: torch.Tensor,
    y_scale: torch.Tensor,
    y_zero_point: Any = None,
    *,
    axis: int = 1,
    saturate: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
) -> torch.Tensor:
    kind = _kind(y_zero_point, output_dtype)
    scale = _spread(y_scale, x, axis, block_size)
    zero = None if y_zero_point is None else _spread(_wide(y_zero_point), x, axis, block_size)
    return _stored(_ratio(x, scale, precision), zero, kind, bool(saturate))


@operator("DequantizeLinear", domain="com.microsoft")
@operator("DequantizeLinear", since=10)
def dequantize_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: Any = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> torch.Tensor:
    dtype = DTYPES[output_dtype] if output_dtype else x_scale.dtype
    scale = _spread(x_scale, x, axis, block_size)
    if x_zero_point is not None:
        x = _wide(x) - _spread(_wide(x_zero_point), x, axis, block_size)
    return x.to(dtype) * scale.to(dtype)


@operator("FakeQuantize", since=1, domain="perwatt")
def fake_quantize(
    x: torch.Tensor,
    y_scale: torch.Tensor,
    y_zero_point: Any = None,
    *,
    axis: int = 1,
    saturate: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
) -> torch.Tensor:
    """DequantizeLinear of QuantizeLinear, with gradients. For `x`: 1 inside the range of the type and 0 outside. For the
    scale: those of Learned Step Size Quantization (Esser et al., ICLR 2020, equation 3), without its learning-rate factor.
    """
    kind = _kind(y_zero_point, output_dtype)
    scale = _spread(y_scale, x, axis, block_size)
    zero = None if y_zero_point is None else _spread(_wide(y_zero_point), x, axis, block_size)
    ratio = _ratio(x, scale, precision)
    ratio = ratio if ratio.dtype is torch.float64 else ratio.float()
    low, high = _bounds(kind)
    # Bounds are whole numbers, so clamping before rounding gives what rounding before clamping does, and keeps infinities
    # out of the difference below.
    if zero is None:
        inside = ratio.clamp(low, high)
    else:
        zero = zero.to(ratio.dtype)
        inside = torch.minimum(torch.maximum(ratio, low - zero), high - zero)
    level = inside + (_rounded(inside, zero, kind) - inside).detach()
    return level.to(y_scale.dtype) * scale


@operator("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = functional.pad(x.reshape(-1), (0, 1)).aminmax()  # the range holds 0
    scale = torch.where(high == low, torch.ones_like(high), (high - low) / 255)
    zero = (-low / scale).clamp(0, 255).round()
    return _stored(x / scale, zero, UINT8, True), scale, zero.to(torch.uint8)


@operator("MatMulInteger", since=10)
def matmul_integer(
    a: torch.Tensor, b: torch.Tensor, a_zero_point: Any = None, b_zero_point: Any = None
) -> torch.Tensor:
    return _product(a, b, a_zero_point, b_zero_point).to(torch.int64).to(torch.int32)


@operator("QLinearMatMul", since=10)
def qlinear_matmul(
    a: torch.Tensor, a_scale: torch.Tensor, a_zero_point: torch.Tensor,
    b: torch.Tensor, b_scale: torch.Tensor, b_zero_point: torch.Tensor,
    y_scale: torch.Tensor, y_zero_point: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    factor = _by_row(a_scale).float() * b_scale.float() / _by_row(y_scale).float()
    found = _product(a, b, a_zero_point, b_zero_point).float() * factor
    return _stored(found, _wide(_by_row(y_zero_point)), NUMBERS[y_zero_point.dtype], True)


@operator("ConvInteger", since=10)
def conv_integer(
    x: torch.Tensor,
    w: torch.Tensor,
    x_zero_point: Any = None,
    w_zero_point: Any = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> torch.Tensor:
    x, w = _centred(x, x_zero_point, 0), _centred(w, w_zero_point, w.ndim - 1)
    return _convolved(x, w, auto_pad, dilations, group, pads, strides).to(torch.int64).to(torch.int32)


@operator("QLinearConv", since=10)
def qlinear_conv(
    x: torch.Tensor, x_scale: torch.Tensor, x_zero_point: torch.Tensor,
    w: torch.Tensor, w_scale: torch.Tensor, w_zero_point: torch.Tensor,
    y_scale: torch.Tensor, y_zero_point: torch.Tensor, bias: Any = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> torch.Tensor:  # fmt: skip
    spatial = x.ndim - 2
    x, w = _centred(x, x_zero_point, 0), _centred(w, w_zero_point, w.ndim - 1)
    found = _convolved(x, w, auto_pad, dilations, group, pads, strides)
    if bias is not None:
        found = found + bias.double().reshape(-1, *[1] * spatial)
    factor = _one(x_scale) * _by_channel(w_scale, spatial) / _one(y_scale)
    return _stored(found.float() * factor, _wide(_one(y_zero_point)), NUMBERS[y_zero_point.dtype], True)


def _kind(zero_point: Any, output_dtype: int) -> int:
    kind = output_dtype or (UINT8 if zero_point is None else NUMBERS[zero_point.dtype])
    if kind not in STORED:
        raise TypeError(f"the interpreter can't quantize to ONNX's element type {kind}")
    return kind


def _wide(x: torch.Tensor) -> torch.Tensor:
    """A type that holds differences of what `x` holds."""
    return x.float() if x.is_floating_point() else x.to(torch.int32)


def _one(x: torch.Tensor) -> torch.Tensor:
    """A scalar, also where the model says it as a vector of one element."""
    return x.reshape(()) if x.numel() == 1 else x


def _spread(scale: torch.Tensor, x: torch.Tensor, axis: int, block_size: int) -> torch.Tensor:
    """A scale or zero point in a shape that broadcasts against `x`: per tensor, per axis or per block."""
    if scale.numel() == 1:
        return scale.reshape(())
    axis = axis % x.ndim
    if block_size and scale.ndim == x.ndim:
        repeated = scale.unsqueeze(axis + 1).expand(*scale.shape[: axis + 1], block_size, *scale.shape[axis + 1 :])
        return repeated.flatten(axis, axis + 1).narrow(axis, 0, x.shape[axis])  # the last block may be short
    if scale.ndim == 1:
        return scale.reshape([-1 if one == axis else 1 for one in range(x.ndim)])
    return scale


def _ratio(x: torch.Tensor, scale: torch.Tensor, precision: int) -> torch.Tensor:
    dtype = DTYPES[precision] if precision else scale.dtype
    return x.to(dtype) / scale.to(dtype)


def _bounds(kind: int) -> tuple[float, float]:
    if kind in RANGES:
        return RANGES[kind]
    most = torch.finfo(STORED[kind]).max
    return -most, most


def _stored(ratio: torch.Tensor, zero: Any, kind: int, saturate: bool) -> torch.Tensor:
    """`ratio` rounded, shifted by `zero`, and cut to what the type holds. `saturate` is about float8 alone."""
    ratio = ratio if ratio.dtype is torch.float64 else ratio.float()  # float16 can't hold 16-bit zero points
    ratio = ratio if kind not in RANGES else ratio.round()
    ratio = ratio if zero is None else ratio + zero
    if kind in RANGES:
        return ratio.clamp(*RANGES[kind]).to(torch.int32).to(STORED[kind])
    return (ratio.clamp(*_bounds(kind)) if saturate else ratio).to(STORED[kind])


def _rounded(ratio: torch.Tensor, zero: Any, kind: int) -> torch.Tensor:
    """`ratio` as far as the type can tell it."""
    if kind in RANGES:
        return ratio.round()
    shifted = ratio if zero is None else ratio + zero
    found = shifted.to(STORED[kind]).to(ratio.dtype)
    return found if zero is None else found - zero


def _by_row(x: torch.Tensor) -> torch.Tensor:
    """A vector with an element for each row; scalars and what has the rank of its matrix stay."""
    return x.unsqueeze(-1) if x.ndim == 1 and x.numel() > 1 else x


def _product(a: torch.Tensor, b: torch.Tensor, a_zero_point: Any, b_zero_point: Any) -> torch.Tensor:
    left, right = a.double(), b.double()
    if a_zero_point is not None:
        left = left - _by_row(a_zero_point).double()
    if b_zero_point is not None:
        right = right - b_zero_point.double()
    return torch.matmul(left, right)


def _centred(x: torch.Tensor, zero_point: Any, trailing: int) -> torch.Tensor:
    """`x` less its zero point, which may have an element for each slice of the first axis."""
    if zero_point is None:
        return x.double()
    return x.double() - _by_channel(zero_point.double(), trailing)


def _by_channel(x: torch.Tensor, trailing: int) -> torch.Tensor:
    return x.reshape(()) if x.numel() == 1 else x.reshape(-1, *[1] * trailing)


def _convolved(
    x: torch.Tensor, w: torch.Tensor, auto_pad: str, dilations: Sequence[int], group: int, pads: Sequence[int],
    strides: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    """A convolution of one to three axes. Padding with 0 is right because zero points are off already."""
    axes = x.ndim - 2
    steps, gaps = list(strides) or [1] * axes, list(dilations) or [1] * axes
    around = list(pads) or [0] * (2 * axes)
    if auto_pad.startswith("SAME"):
        around = _same_pads(x.shape[2:], w.shape[2:], steps, gaps, auto_pad == "SAME_UPPER")
    elif auto_pad == "VALID":
        around = [0] * (2 * axes)
    if any(around):
        x = functional.pad(x, [around[axis + end] for axis in reversed(range(axes)) for end in (0, axes)])
    convolve: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
    found: torch.Tensor = convolve(x, w, stride=steps, dilation=gaps, groups=group)
    return found


def _same_pads(
    sizes: Sequence[Any], kernel: Sequence[int], steps: Sequence[int], gaps: Sequence[int], upper: bool
) -> list[Any]:
    begins, ends = [], []
    for size, width, step, gap in zip(sizes, kernel, steps, gaps, strict=True):
        total = max(((size + step - 1) // step - 1) * step + (width - 1) * gap + 1 - size, 0)
        less, more = total // 2, total - total // 2
        begins.append(less if upper else more)
        ends.append(more if upper else less)
    return begins + ends


__all__ = ["fake_quantize"]
