"""Operators of the interpreter: values of an image at places that are computed: grids and deformable convolution."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import ints

MODES = {"bilinear": "linear", "bicubic": "cubic"}
"""Names of opset 16, which are torch's, too."""


@operator("AffineGrid", since=20, host=(1,))
def affine_grid(theta: torch.Tensor, size: Any, *, align_corners: int = 0) -> torch.Tensor:
    return F.affine_grid(theta, list(ints(size)), bool(align_corners))


@operator("GridSample", since=16)
def grid_sample(
    x: torch.Tensor, grid: torch.Tensor, *, align_corners: int = 0, mode: str = "bilinear", padding_mode: str = "zeros"
) -> torch.Tensor:
    mode = MODES.get(mode, mode)
    exact = x.dtype in (torch.float64, torch.int32, torch.int64)
    wide = x.to(torch.float64 if exact else torch.float32)
    places = grid.to(wide.dtype)
    if x.ndim == 4 or (x.ndim == 5 and mode != "cubic"):
        named = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
        return F.grid_sample(wide, places, named, padding_mode, bool(align_corners)).to(x.dtype)
    where = []
    for axis, size in enumerate(reversed(x.shape[2:])):
        # -1 and 1 are the middles of the outermost pixels, or their outer borders.
        place = places[..., axis].flatten(1)
        where.append((place + 1) / 2 * (size - 1) if align_corners else ((place + 1) * size - 1) / 2)
    found = _sampled(wide, where[::-1], mode, padding_mode, bool(align_corners))
    return found.reshape(*x.shape[:2], *grid.shape[1:-1]).to(x.dtype)


def _sampled(
    x: torch.Tensor, where: Sequence[torch.Tensor], mode: str, padding: str, align_corners: bool
) -> torch.Tensor:
    """Values of `x` (N, C, axes…) at `where`, a tensor (N, places) in pixels for each axis: (N, C, places)."""
    taps = [_taps(place, size, mode, padding, align_corners) for place, size in zip(where, x.shape[2:], strict=True)]
    flat = x.flatten(2)
    found: Any = None
    for corner in product(*taps):
        index: Any = 0
        weight: Any = 1.0
        for (place, share), size in zip(corner, x.shape[2:], strict=True):
            index = index * size + place
            weight = weight * share
        part = flat.gather(2, index[:, None].expand(-1, x.shape[1], -1)) * weight[:, None]
        found = part if found is None else found + part
    return found


def _taps(
    at: torch.Tensor, size: Any, mode: str, padding: str, align_corners: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The neighbours along one axis and their weights."""
    if mode == "nearest":
        # Halves to the even one, as ONNX asks.
        steps: tuple[int, ...] = (0,)
        low = torch.round(at)
        weights = [torch.ones_like(at)]
    else:
        low = torch.floor(at)
        steps = (0, 1) if mode == "linear" else (-1, 0, 1, 2)
        ratio = at - low
        weights = [1 - ratio, ratio] if mode == "linear" else [_cubic((step - ratio).abs()) for step in steps]
    found = []
    for step, weight in zip(steps, weights, strict=True):
        place = low.to(torch.int64) + step
        if padding == "zeros":
            weight = weight * ((place >= 0) & (place < size))
        elif padding == "reflection":
            place = _reflected(place, size, align_corners)
        found.append((place.clamp(0, size - 1), weight))
    return found


def _cubic(distance: torch.Tensor, a: float = -0.75) -> torch.Tensor:
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))


def _reflected(place: torch.Tensor, size: Any, align_corners: bool) -> torch.Tensor:
    """Mirrored at the middle of the outermost pixels, or at their outer borders."""
    if align_corners:
        period = max(2 * (size - 1), 1)
        place = torch.remainder(place, period)
        return torch.minimum(place, period - place)
    place = torch.remainder(place, 2 * size)
    return torch.minimum(place, 2 * size - 1 - place)


@operator("DeformConv", since=19)
def deform_conv(
    x: torch.Tensor, w: torch.Tensor, offset: torch.Tensor, b: Any = None, mask: Any = None, *, dilations: Any = None,
    group: int = 1, kernel_shape: Any = None, offset_group: int = 1, pads: Any = None, strides: Any = None,
) -> torch.Tensor:  # fmt: skip
    axes = x.ndim - 2
    strides, dilations, pads = strides or (1,) * axes, dilations or (1,) * axes, pads or (0,) * (2 * axes)
    kernel, out = tuple(w.shape[2:]), tuple(offset.shape[2:])
    samples, channels = x.shape[:2]
    wide = x if x.dtype is torch.float64 else x.float()
    # An offset group is as good as a sample of its own: all its channels are read at the same places.
    moved = offset.to(wide.dtype).reshape(samples * offset_group, -1, axes, *out)
    where = []
    for axis, size in enumerate(kernel):
        tap = torch.arange(size, device=x.device).reshape(-1, *(1,) * (axes - 1 - axis))
        tap = (tap * dilations[axis]).expand(kernel).reshape(-1, *(1,) * axes)
        first = torch.arange(out[axis], device=x.device) * strides[axis] - pads[axis]
        first = first.reshape(-1, *(1,) * (axes - 1 - axis))
        where.append((moved[:, :, axis] + tap + first).flatten(1))
    grouped = wide.reshape(samples * offset_group, channels // offset_group, *x.shape[2:])
    read = _sampled(grouped, where, "linear", "zeros", True)
    read = read.reshape(samples, offset_group, channels // offset_group, moved.shape[1], -1)
    if mask is not None:
        read = read * mask.to(wide.dtype).reshape(samples, offset_group, 1, moved.shape[1], -1)
    columns = read.reshape(samples, group, channels // group * moved.shape[1], -1)
    weights = w.to(wide.dtype).reshape(group, w.shape[0] // group, -1)
    found = (weights @ columns).reshape(samples, w.shape[0], *out).to(x.dtype)
    return found if b is None else found + b.reshape(-1, *(1,) * axes)
