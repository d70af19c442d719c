"""Operators of the interpreter: convolution, transposed convolution, and columns back to an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import ints

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@operator("Conv", since=1)
def conv(
    x: torch.Tensor, w: torch.Tensor, b: Any = None, *, auto_pad: str = "NOTSET", dilations: Any = None, group: int = 1,
    kernel_shape: Any = None, pads: Any = None, strides: Any = None,
) -> torch.Tensor:  # fmt: skip
    axes = w.ndim - 2
    strides, dilations = strides or (1,) * axes, dilations or (1,) * axes
    before, after = _pads(auto_pad, pads, x.shape[2:], w.shape[2:], strides, dilations)
    if before != after or any(pad < 0 for pad in before):
        x = F.pad(x, _torch_pads(before, after))
        before = (0,) * axes
    found: torch.Tensor = CONVOLUTIONS[axes](x, w, b, strides, before, dilations, group)
    return found


def _pads(
    auto_pad: str, pads: Any, sizes: Sequence[Any], kernel: Sequence[Any], strides: Any, dilations: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What is added before and after each spatial axis."""
    axes = len(sizes)
    if auto_pad in ("NOTSET", ""):
        pads = tuple(pads or (0,) * (2 * axes))
        return pads[:axes], pads[axes:]
    if auto_pad == "VALID":
        return (0,) * axes, (0,) * axes
    totals = [
        max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    return _halves(totals, auto_pad == "SAME_UPPER")


def _halves(totals: Sequence[Any], upper: bool) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Totals of padding split between both sides, the odd one at the end where `upper`."""
    less, more = tuple(total // 2 for total in totals), tuple(total - total // 2 for total in totals)
    return (less, more) if upper else (more, less)


def _torch_pads(before: Sequence[Any], after: Sequence[Any]) -> list[Any]:
    """As F.pad takes them: from the last axis, both sides of each."""
    return [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair]


@operator("ConvTranspose", since=1)
def conv_transpose(
    x: torch.Tensor, w: torch.Tensor, b: Any = None, *, auto_pad: str = "NOTSET", dilations: Any = None, group: int = 1,
    kernel_shape: Any = None, output_padding: Any = None, output_shape: Any = None, pads: Any = None,
    strides: Any = None,
) -> torch.Tensor:  # fmt: skip
    axes = w.ndim - 2
    strides, dilations = strides or (1,) * axes, dilations or (1,) * axes
    extra = output_padding or (0,) * axes
    full = [
        (size - 1) * stride + (width - 1) * dilation + 1
        for size, width, stride, dilation in zip(x.shape[2:], w.shape[2:], strides, dilations, strict=True)
    ]
    before, after = _transposed_pads(auto_pad, pads, output_shape, x.shape[2:], strides, full, extra)
    run = TRANSPOSED[axes]
    # torch cuts one number off both ends and adds output_padding at the end: less than a stride or a dilation.
    adjust = [e - end + start for e, start, end in zip(extra, before, after, strict=True)]
    fits = all(0 <= a < max(s, d) for a, s, d in zip(adjust, strides, dilations, strict=True))
    if fits and all(pad >= 0 for pad in before):
        found: torch.Tensor = run(x, w, b, strides, before, adjust, group, dilations)
        return found
    found = run(x, w, None, strides, 0, 0, group, dilations)
    ends = [e - end for e, end in zip(extra, after, strict=True)]
    found = F.pad(found, _torch_pads([-start for start in before], ends))
    return found if b is None else found + b.reshape(-1, *(1,) * axes)


def _transposed_pads(
    auto_pad: str, pads: Any, output_shape: Any, sizes: Sequence[Any], strides: Any, full: Sequence[Any], extra: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What is cut off before and after each spatial axis. Where the output is to be longer than what was computed, it
    is filled up at the end, as ONNX Runtime does."""
    axes = len(full)
    same = auto_pad in ("SAME_UPPER", "SAME_LOWER")
    if not output_shape and not same:
        pads = tuple(pads or (0,) * (2 * axes)) if auto_pad != "VALID" else (0,) * (2 * axes)
        return pads[:axes], pads[axes:]
    wanted = tuple(output_shape or [size * stride for size, stride in zip(sizes, strides, strict=True)])[-axes:]
    totals = [f + e - w for f, e, w in zip(full, extra, wanted, strict=True)]
    before, after = _halves([max(total, 0) for total in totals], auto_pad == "SAME_UPPER")
    return before, tuple(end + min(total, 0) for end, total in zip(after, totals, strict=True))


@operator("Col2Im", since=18, host=(1, 2))
def col2im(
    x: torch.Tensor, image_shape: Any, block_shape: Any, *, dilations: Any = None, pads: Any = None, strides: Any = None
) -> torch.Tensor:
    image, block = ints(image_shape), ints(block_shape)
    axes = len(image)
    strides, dilations, pads = strides or (1,) * axes, dilations or (1,) * axes, pads or (0,) * (2 * axes)
    padded = [size + start + end for size, start, end in zip(image, pads[:axes], pads[axes:], strict=True)]
    # Where in the padded image each element of each block goes: (elements of a block, blocks).
    place = torch.zeros(1, 1, dtype=torch.int64, device=x.device)
    total: Any = 1
    for size, width, stride, dilation in zip(padded, block, strides, dilations, strict=True):
        blocks = (size - (width - 1) * dilation - 1) // stride + 1
        inside = torch.arange(width, device=x.device) * dilation
        along = inside[:, None] + torch.arange(blocks, device=x.device) * stride
        joined = place[:, None, :, None] * size + along[None, :, None, :]
        place = joined.reshape(joined.shape[0] * width, joined.shape[2] * blocks)
        total = total * size
    columns = x.reshape(x.shape[0], -1, place.numel())
    found = columns.new_zeros(columns.shape[0], columns.shape[1], total).index_add(2, place.reshape(-1), columns)
    cut = _torch_pads([-pad for pad in pads[:axes]], [-pad for pad in pads[axes:]])
    return F.pad(found.reshape(*found.shape[:2], *padded), cut)
