"""Operators of the interpreter: Resize and Upsample.

Resizing is separable: each axis is a weighted sum of some neighbours. What the usual models have, whole factors of
nearest and half-pixel linear and cubic, goes to one torch call instead.

Sizes and scales are needed as plain numbers: given as tensors, they end a compiled graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import ints

SMOOTH = {("linear", 3): "linear", ("linear", 4): "bilinear", ("linear", 5): "trilinear", ("cubic", 4): "bicubic"}
"""torch's names of modes, by ONNX's and the number of axes."""


@dataclass(frozen=True)
class _How:
    """Resize's attributes but those that say how large."""

    mode: str = "nearest"
    transformation: str = "half_pixel"
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    exclude_outside: bool = False
    extrapolation: float = 0.0
    antialias: bool = False


@dataclass(frozen=True)
class _Axis:
    """One axis that changes. `scale` is what was asked for, `count` the whole number of elements that come out."""

    axis: int
    size: Any
    count: Any
    scale: Any
    start: Any = 0.0
    end: Any = 1.0


@operator("Upsample", since=7)
def upsample_7(x: torch.Tensor, *, scales: Any, mode: str = "nearest") -> torch.Tensor:
    return resize_10(x, scales, mode=mode)


@operator("Upsample", since=9, host=(1,))
def upsample(x: torch.Tensor, scales: Any, *, mode: str = "nearest") -> torch.Tensor:
    return resize_10(x, scales, mode=mode)


@operator("Resize", since=10, host=(1,))
def resize_10(x: torch.Tensor, scales: Any, *, mode: str = "nearest") -> torch.Tensor:
    """The specification leaves open where samples lie. ONNX Runtime: at multiples of 1 / scale; the nearest is the one
    before, or the one after on an axis that gets shorter."""
    mode = "linear" if mode.endswith("linear") else mode
    axes = _by_scales(x, _floats(scales), range(x.ndim))
    x = _resized(x, [axis for axis in axes if axis.scale > 1], _How(mode, "asymmetric", "floor"))
    return _resized(x, [axis for axis in axes if axis.scale < 1], _How(mode, "asymmetric", "ceil"))


@operator("Resize", since=11, host=(1, 2, 3))
def resize(
    x: torch.Tensor, roi: Any = None, scales: Any = None, sizes: Any = None, *, antialias: int = 0, axes: Any = None,
    coordinate_transformation_mode: str = "half_pixel", cubic_coeff_a: float = -0.75, exclude_outside: int = 0,
    extrapolation_value: float = 0.0, keep_aspect_ratio_policy: str = "stretch", mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> torch.Tensor:  # fmt: skip
    how = _How(
        mode, coordinate_transformation_mode, nearest_mode, cubic_coeff_a, bool(exclude_outside), extrapolation_value,
        bool(antialias),
    )  # fmt: skip
    chosen = [axis % x.ndim for axis in (range(x.ndim) if axes is None else axes)]
    # Models of opset 11 leave an input out by an empty tensor.
    cropped = how.transformation == "tf_crop_and_resize" and not _absent(roi)
    region = _floats(roi) if cropped else (0.0,) * len(chosen) + (1.0,) * len(chosen)
    if _absent(sizes):
        found = _by_scales(x, _floats(scales), chosen, region, always=cropped)
    else:
        found = _by_sizes(x, ints(sizes), chosen, region, keep_aspect_ratio_policy, always=cropped)
    return _resized(x, found, how)


def _absent(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, torch.Tensor):
        return bool(value.numel() == 0)
    return isinstance(value, (tuple, list)) and not value


def _floats(value: Any) -> tuple[Any, ...]:
    """Numbers that are no whole ones, from host or tensor (reading a tensor ends a compiled graph)."""
    if isinstance(value, torch.Tensor):
        return tuple(float(item) for item in value.reshape(-1).tolist())
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _by_scales(
    x: torch.Tensor, scales: Sequence[Any], axes: Sequence[int], region: Sequence[Any] = (), *, always: bool = False
) -> list[_Axis]:
    found = []
    for place, (axis, scale) in enumerate(zip(axes, scales, strict=True)):
        start, end = (region[place], region[len(axes) + place]) if region else (0.0, 1.0)
        if scale == 1 and not always:
            continue
        size = x.shape[axis]
        # Shape inference and ONNX Runtime multiply in float32, where 10 times 0.7 is 7.
        length = size * scale * (end - start)
        found.append(_Axis(axis, size, math.floor(length * (1 + 2.0**-24)), scale, start, end))
    return found


def _by_sizes(
    x: torch.Tensor, sizes: Sequence[Any], axes: Sequence[int], region: Sequence[Any], policy: str, *, always: bool
) -> list[_Axis]:
    ratios = [wanted / x.shape[axis] for wanted, axis in zip(sizes, axes, strict=True)]
    counts = list(sizes)
    if policy != "stretch":
        ratio = min(ratios) if policy == "not_larger" else max(ratios)
        ratios = [ratio] * len(axes)
        counts = [math.floor(ratio * x.shape[axis] + 0.5) for axis in axes]
    found = []
    for place, axis in enumerate(axes):
        size = x.shape[axis]
        if counts[place] == size and policy == "stretch" and not always:
            continue
        found.append(_Axis(axis, size, counts[place], ratios[place], region[place], region[len(axes) + place]))
    return found


def _resized(x: torch.Tensor, axes: Sequence[_Axis], how: _How) -> torch.Tensor:
    if not axes:
        return x
    if how.mode == "nearest" and all(_repeats(axis, how) for axis in axes):
        return _repeated(x, axes)
    smooth = _torch_mode(x, axes, how)
    if smooth is not None:
        # Factors, not sizes: 1 / scale is then exactly what ONNX divides by.
        factors = {axis.axis: float(axis.scale) for axis in axes}
        both = tuple(factors.get(axis, 1.0) for axis in range(2, x.ndim))
        return F.interpolate(x, scale_factor=both, mode=smooth, align_corners=False, recompute_scale_factor=False)
    if how.mode == "nearest":
        for axis in axes:
            x = _nearest(x, axis, how)
        return x
    exact = x.dtype in (torch.float64, torch.int32, torch.int64)
    found = x.to(torch.float64 if exact else torch.float32)
    for axis in axes:
        found = _weighted(found, axis, how)
    if x.is_floating_point():
        return found.to(x.dtype)
    limits = torch.iinfo(x.dtype)
    return found.round().clamp(limits.min, limits.max).to(x.dtype)


def _repeats(axis: _Axis, how: _How) -> bool:
    """Whether each element simply comes several times."""
    if not all(isinstance(number, (int, float)) for number in (axis.scale, axis.size, axis.count)):
        return False
    factor = axis.scale
    if factor < 1 or factor != int(factor) or axis.count != axis.size * int(factor):
        return False
    if how.transformation == "asymmetric":
        return how.nearest == "floor" or (how.nearest == "round_prefer_floor" and factor == 2)
    # Samples at least 1 / (2 factor) from the border between two pixels: rounding up or down never matters.
    half = how.transformation == "half_pixel" or (how.transformation == "pytorch_half_pixel" and axis.count > 1)
    return half and how.nearest.startswith("round")


def _repeated(x: torch.Tensor, axes: Sequence[_Axis]) -> torch.Tensor:
    factors = {axis.axis: int(axis.scale) for axis in axes}
    split, spread, joined = [], [], []
    for axis, size in enumerate(x.shape):
        factor = factors.get(axis, 1)
        split += [size, 1]
        spread += [size, factor]
        joined.append(size * factor)
    return x.reshape(split).expand(spread).reshape(joined)


def _torch_mode(x: torch.Tensor, axes: Sequence[_Axis], how: _How) -> str | None:
    """torch's mode that does the same, if there is one."""
    half = how.transformation == "half_pixel" or (
        how.transformation == "pytorch_half_pixel" and all(axis.count > 1 for axis in axes)
    )
    plain = not how.antialias and not how.exclude_outside and (how.mode == "linear" or how.cubic == -0.75)
    if not (half and plain and x.is_floating_point() and all(axis.axis >= 2 for axis in axes)):
        return None
    # torch floors size times factor: a factor made from sizes must come back to the size.
    known = all(isinstance(number, (int, float)) for axis in axes for number in (axis.size, axis.count, axis.scale))
    if not known or any(math.floor(axis.size * float(axis.scale)) != axis.count for axis in axes):
        return None
    return SMOOTH.get((how.mode, x.ndim))


def _coordinates(axis: _Axis, how: _How, device: torch.device) -> torch.Tensor:
    """Where in the input each output element lies, in pixels, float64."""
    at = torch.arange(axis.count, device=device, dtype=torch.float64)
    size, count, scale = axis.size, axis.count, axis.scale
    # What was asked for, which need not be whole: ONNX's tests take it where the text says the whole number.
    width = scale * size
    kind = how.transformation
    if kind == "align_corners":
        return at * 0 if width == 1 else at * ((size - 1) / (width - 1))
    if kind == "asymmetric":
        return at / scale
    if kind == "tf_crop_and_resize":
        if count == 1:
            return at * 0 + 0.5 * (axis.start + axis.end) * (size - 1)
        return at * ((axis.end - axis.start) * (size - 1) / (count - 1)) + axis.start * (size - 1)
    if kind == "pytorch_half_pixel" and count == 1:
        return at * 0
    if kind == "tf_half_pixel_for_nn":  # of opset 11 only
        return (at + 0.5) / scale
    middle = (at + 0.5) / scale - 0.5
    if kind == "half_pixel_symmetric":
        return middle + (size / 2) * (1 - count / width)
    return middle


def _nearest(x: torch.Tensor, axis: _Axis, how: _How) -> torch.Tensor:
    at = _coordinates(axis, how, x.device)
    if how.nearest == "floor":
        place = torch.floor(at)
    elif how.nearest == "ceil":
        place = torch.ceil(at)
    else:
        place = torch.floor(at + 0.5) if how.nearest == "round_prefer_ceil" else torch.ceil(at - 0.5)
    found = x.index_select(axis.axis, place.clamp(0, axis.size - 1).to(torch.int64))
    return _extrapolated(found, at, axis, how)


def _extrapolated(x: torch.Tensor, at: torch.Tensor, axis: _Axis, how: _How) -> torch.Tensor:
    if how.transformation != "tf_crop_and_resize":
        return x
    outside = (at < 0) | (at > axis.size - 1)
    shaped = outside.reshape(-1, *(1,) * (x.ndim - 1 - axis.axis))
    return torch.where(shaped, torch.full((), how.extrapolation, dtype=x.dtype, device=x.device), x)


def _weighted(x: torch.Tensor, axis: _Axis, how: _How) -> torch.Tensor:
    """Linear and cubic along one axis: neighbours beyond the ends repeat the last pixel."""
    at = _coordinates(axis, how, x.device)
    # Antialiasing stretches the filter so that it covers all pixels between two samples.
    stretch = min(axis.scale, 1.0) if how.antialias else 1.0
    reach = 1 if how.mode == "linear" else 2
    first = math.floor(-reach / stretch) + 1
    steps = torch.arange(first, 2 - first, device=x.device)
    low = torch.floor(at)
    distance = ((steps - (at - low)[:, None]) * stretch).abs()
    weights = (1 - distance).clamp(min=0) if how.mode == "linear" else _cubic(distance, how.cubic)
    if how.antialias:
        weights = weights / weights.sum(1, keepdim=True)
    places = low.to(torch.int64)[:, None] + steps
    if how.exclude_outside:
        weights = weights * ((places >= 0) & (places < axis.size))
        total = weights.sum(1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
    places, weights = places.clamp(0, axis.size - 1), weights.to(x.dtype)
    shape = (-1, *(1,) * (x.ndim - 1 - axis.axis))
    found: Any = None
    for step in range(2 - 2 * first):
        part = x.index_select(axis.axis, places[:, step]) * weights[:, step].reshape(shape)
        found = part if found is None else found + part
    return _extrapolated(found, at, axis, how)


def _cubic(distance: torch.Tensor, a: float) -> torch.Tensor:
    """Keys' filter, equation (4) of https://ieeexplore.ieee.org/document/1163711."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
