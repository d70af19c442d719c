"""Operators of the interpreter: pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import ints

MAXIMA = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
MEANS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@dataclass(frozen=True)
class _Windows:
    """Where windows lie, a number for each spatial axis. `needed`: what must be added after so that all windows are
    whole, less than `after` where the last numbers are in no window, more where the last window reaches beyond."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    needed: tuple[Any, ...]
    counts: tuple[Any, ...]
    ceil: bool

    def torch_can(self) -> bool:
        """Whether torch pads so: alike on both sides, and at most half of a window."""
        reach = [(width - 1) * gap + 1 for width, gap in zip(self.kernel, self.dilations, strict=True)]
        return self.before == self.after and all(0 <= 2 * a <= b for a, b in zip(self.before, reach, strict=True))

    def pads(self, after: Sequence[Any]) -> list[Any]:
        """As F.pad takes them: from the last axis, both sides of each."""
        return [pad for pair in zip(reversed(self.before), reversed(after), strict=True) for pad in pair]


def _windows(
    x: torch.Tensor, kernel: Any, strides: Any, dilations: Any, pads: Any, auto_pad: str, ceil_mode: int
) -> _Windows:
    axes = x.ndim - 2
    kernel, strides, dilations = tuple(kernel), tuple(strides or (1,) * axes), tuple(dilations or (1,) * axes)
    explicit = auto_pad in ("NOTSET", "")
    pads = tuple(pads or ()) if explicit else ()
    before, after = (pads[:axes], pads[axes:]) if pads else ((0,) * axes, (0,) * axes)
    starts, ends, needed, counts = [], [], [], []
    for axis, size in enumerate(x.shape[2:]):
        start, end, stride = before[axis], after[axis], strides[axis]
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        if auto_pad.startswith("SAME"):
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            start = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
            end = total - start
        room = size + start + end - reach
        count = room // stride + 1
        if ceil_mode and explicit:
            count = -(-room // stride) + 1
            # A window that would begin in the padding at the end is none.
            if (count - 1) * stride >= size + start:
                count = count - 1
        starts.append(start)
        ends.append(end)
        needed.append((count - 1) * stride + reach - size - start)
        counts.append(count)
    found = (tuple(starts), tuple(ends), tuple(needed), tuple(counts))
    return _Windows(kernel, strides, dilations, *found, bool(ceil_mode and explicit))


@operator("MaxPool", since=1)
def max_pool(
    x: torch.Tensor, *, kernel_shape: Any, auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: Any = None,
    pads: Any = None, storage_order: int = 0, strides: Any = None, outputs: int = 1,
) -> tuple[Any, ...]:  # fmt: skip
    w = _windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    dtype = x.dtype
    # The integers that ONNX allows have eight bits, which float32 holds.
    wide = x if x.is_floating_point() else x.float()
    before, ceil, width = w.before, w.ceil, x.shape[2:]
    if not w.torch_can():
        wide = F.pad(wide, w.pads(w.needed), value=-math.inf)
        before, ceil = (0,) * len(w.kernel), False
    run: Any = MAXIMA[len(w.kernel)]
    found = run(wide, w.kernel, w.strides, before, w.dilations, ceil, outputs > 1)
    if outputs == 1:
        return (found.to(dtype),)
    shift = [a - b for a, b in zip(w.before, before, strict=True)]
    return found[0].to(dtype), _onnx_indices(found[1], wide.shape[2:], width, shift, storage_order)


def _onnx_indices(
    places: torch.Tensor, padded: Sequence[Any], sizes: Sequence[Any], shift: Sequence[Any], storage_order: int
) -> torch.Tensor:
    """torch counts within a channel of what it was given; ONNX over the whole tensor without padding."""
    along = []
    for size, off in zip(reversed(padded), reversed(shift), strict=True):
        along.append(places % size - off)
        places = places // size
    pairs = list(zip(along, reversed(sizes), strict=True))
    found: Any = 0
    step: Any = 1
    # The innermost axis is the last one, or the first one in column major order.
    for place, size in reversed(pairs) if storage_order else pairs:
        found = found + place * step
        step = step * size
    samples, channels = found.shape[:2]
    planes = torch.arange(samples * channels, device=found.device).reshape(samples, channels, *(1,) * len(sizes))
    return found + planes * step


@operator("AveragePool", since=1)
def average_pool(
    x: torch.Tensor, *, kernel_shape: Any, auto_pad: str = "NOTSET", ceil_mode: int = 0, count_include_pad: int = 0,
    dilations: Any = None, pads: Any = None, strides: Any = None,
) -> torch.Tensor:  # fmt: skip
    w = _windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    if w.torch_can() and all(gap == 1 for gap in w.dilations):
        run: Any = MEANS[len(w.kernel)]
        found: torch.Tensor = run(x, w.kernel, w.strides, w.before, w.ceil, bool(count_include_pad))
        return found
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    total = _sums(F.pad(wide, w.pads(w.needed)), w)
    for axis, size in enumerate(x.shape[2:]):
        # How many numbers of this axis each window holds: what lies beyond the padding is never one.
        start, end = w.before[axis], w.after[axis]
        ones = torch.ones(size, dtype=wide.dtype, device=x.device)
        ones = F.pad(F.pad(ones, [start, end], value=float(bool(count_include_pad))), [0, w.needed[axis] - end])
        held = _sum_along(ones, 0, axis, w)
        total = total / held.reshape(-1, *(1,) * (x.ndim - 3 - axis))
    return total.to(x.dtype)


def _sums(x: torch.Tensor, w: _Windows) -> torch.Tensor:
    for axis in range(len(w.kernel)):
        x = _sum_along(x, axis + 2, axis, w)
    return x


def _sum_along(x: torch.Tensor, dim: int, axis: int, w: _Windows) -> torch.Tensor:
    """Sums of windows of `axis` along the dimension `dim` of a padded tensor."""
    stride, count = w.strides[axis], w.counts[axis]
    found: Any = None
    for step in range(w.kernel[axis]):
        start = step * w.dilations[axis]
        part = torch.narrow(x, dim, start, (count - 1) * stride + 1)
        part = part[(slice(None),) * dim + (slice(None, None, stride),)]
        found = part if found is None else found + part
    return found


@operator("LpPool", since=2)
def lp_pool(
    x: torch.Tensor, *, kernel_shape: Any, auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: Any = None,
    p: int = 2, pads: Any = None, strides: Any = None,
) -> torch.Tensor:  # fmt: skip
    w = _windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    return _sums(F.pad(x.abs() ** p, w.pads(w.needed)), w) ** (1 / p)


@operator("GlobalAveragePool", since=1)
def global_average_pool(x: torch.Tensor) -> torch.Tensor:
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool", since=1)
def global_max_pool(x: torch.Tensor) -> torch.Tensor:
    return x.amax(list(range(2, x.ndim)), keepdim=True)


@operator("GlobalLpPool", since=2)
def global_lp_pool(x: torch.Tensor, *, p: int = 2) -> torch.Tensor:
    return torch.linalg.vector_norm(x, p, list(range(2, x.ndim)), keepdim=True)


@operator("MaxUnpool", since=9, host=(2,))
def max_unpool(
    x: torch.Tensor, i: torch.Tensor, output_shape: Any = None, *, kernel_shape: Any, pads: Any = None,
    strides: Any = None,
) -> torch.Tensor:  # fmt: skip
    axes = x.ndim - 2
    pads, strides = pads or (0,) * (2 * axes), strides or (1,) * axes
    shape = list(x.shape[:2])
    for axis, width in enumerate(kernel_shape):
        shape.append((x.shape[axis + 2] - 1) * strides[axis] + width - pads[axis] - pads[axes + axis])
    found = x.new_zeros(math.prod(shape)).scatter(0, i.reshape(-1), x.reshape(-1)).reshape(shape)
    if output_shape is None:
        return found
    # Indices count in the shape above: what was asked for only adds to its ends.
    ends = [wanted - size for wanted, size in zip(ints(output_shape), shape, strict=True)]
    return F.pad(found, [pad for end in reversed(ends) for pad in (0, end)])
