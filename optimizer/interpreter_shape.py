"""Operators of the interpreter that measure, reshape, cut, repeat and pad. What comes of a shape stays a host value as
long as it is one number or a row of them whose length is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn import functional

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import HOST_AT_MOST, all_host, as_tensor, ints, is_host, tensors


def product(sizes: Sequence[Any]) -> Any:
    found: Any = 1
    for size in sizes:
        found = found * size
    return found


def shape_of(data: Any) -> tuple[Any, ...]:
    if isinstance(data, torch.Tensor):
        return tuple(data.shape)
    return (len(data),) if isinstance(data, (tuple, list)) else ()


def positive(axis: Any, rank: int) -> Any:
    return axis + rank if axis < 0 else axis


def repeated(value: Any, sizes: Sequence[Any]) -> Any:
    """A number all over `sizes`, as a host value where that can be; None where it can't."""
    if not sizes:
        return value
    if len(sizes) == 1 and has_static_value(sizes[0]) and sizes[0] <= HOST_AT_MOST:
        return (value,) * sizes[0]
    return None


@operator("Shape", host=True)
def shape(data: Any, *, start: int = 0, end: int | None = None) -> tuple[Any, ...]:
    return shape_of(data)[start:end]


@operator("Size", host=True)
def size(data: Any) -> Any:
    return product(shape_of(data))


@operator("Reshape", since=5, host=True)
def reshape(data: Any, shape: Any, *, allowzero: int = 0, device: torch.device | None = None) -> Any:
    sizes = ints(shape)
    if all_host(data, shape) and len(sizes) <= 1:
        return tuple(ints(data)) if sizes else ints(data)[0]
    data = as_tensor(data, device=device)
    if allowzero:
        return data.reshape(sizes)
    kept = {axis for axis, wanted in enumerate(sizes) if wanted == 0}
    wanted = [data.shape[axis] if axis in kept else one for axis, one in enumerate(sizes)]
    if kept and -1 in sizes:
        # Without the axes that stay, so that a batch of none has an answer and a symbolic one needs no division.
        rest = product([one for axis, one in enumerate(data.shape) if axis not in kept])
        known = product([one for axis, one in enumerate(sizes) if axis not in kept and one != -1])
        wanted = [rest // known if one == -1 else one for one in wanted]
    return data.reshape(wanted)


@operator("Flatten", host=True)
def flatten(data: Any, *, axis: int = 1, device: torch.device | None = None) -> torch.Tensor:
    data = as_tensor(data, device=device)
    axis = positive(axis, data.ndim)
    found: torch.Tensor = data.reshape(product(data.shape[:axis]), product(data.shape[axis:]))
    return found


@operator("Squeeze", since=13, host=True)
def squeeze(data: Any, axes: Any = None) -> Any:
    if is_host(data):
        row = isinstance(data, (tuple, list)) and len(data) == 1 and (axes is None or len(ints(axes)) > 0)
        return data[0] if row else data
    return data.squeeze() if axes is None else data.squeeze(ints(axes))


@operator("Squeeze", host=True)
def squeeze_1(data: Any, *, axes: tuple[int, ...] | None = None) -> Any:
    return squeeze(data, axes)


@operator("Unsqueeze", since=13, host=True)
def unsqueeze(data: Any, axes: Any, *, device: torch.device | None = None) -> Any:
    places = ints(axes)
    if is_host(data) and not isinstance(data, (tuple, list)) and len(places) == 1:
        return (data,)
    data = as_tensor(data, device=device)
    rank = data.ndim + len(places)
    for axis in sorted(positive(axis, rank) for axis in places):
        data = data.unsqueeze(axis)
    return data


@operator("Unsqueeze", host=True)
def unsqueeze_1(data: Any, *, axes: tuple[int, ...], device: torch.device | None = None) -> Any:
    return unsqueeze(data, axes, device=device)


@operator("Transpose", host=True)
def transpose(data: Any, *, perm: tuple[int, ...] | None = None) -> Any:
    if is_host(data):
        return data
    return data.permute(tuple(range(data.ndim))[::-1] if perm is None else perm)


@operator("Concat", since=4, host=True)
def concat(*inputs: Any, axis: int) -> Any:
    if all_host(*inputs):
        return tuple(item for value in inputs for item in value)
    return torch.cat(tensors(*inputs), axis)


@operator("Split", since=18, host=True)
def split(
    data: Any, split: Any = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int = 1
) -> tuple[Any, ...]:
    """Without sizes: equal parts, of which the last is smaller where they don't fit."""
    whole = shape_of(data)[axis]
    if split is None:
        parts = num_outputs or outputs
        each = -(-whole // parts)
        ends = [min(each * number, whole) for number in range(1, parts)]
    else:
        sizes = ints(split)
        ends = [sum(sizes[:number]) for number in range(1, len(sizes))]
    starts, ends = [0, *ends], [*ends, whole]
    if is_host(data):
        return tuple(data[start:end] for start, end in zip(starts, ends, strict=True))
    return tuple(data.narrow(axis, start, end - start) for start, end in zip(starts, ends, strict=True))


@operator("Split", since=13, host=True)
def split_13(data: Any, sizes: Any = None, *, axis: int = 0, outputs: int = 1) -> Any:
    return split(data, sizes, axis=axis, outputs=outputs)


@operator("Split", since=2, host=True)
def split_2(data: Any, *, axis: int = 0, split: tuple[int, ...] | None = None, outputs: int = 1) -> Any:
    return split_13(data, split, axis=axis, outputs=outputs)


@operator("Slice", since=10, host=True)
def slice_(data: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    starts, ends = ints(starts), ints(ends)
    axes = tuple(range(len(starts))) if axes is None else ints(axes)
    steps = (1,) * len(starts) if steps is None else ints(steps)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        data = data[start:end:step] if is_host(data) else _sliced(data, positive(axis, data.ndim), start, end, step)
    return data


@operator("Slice", host=True)
def slice_1(data: Any, *, starts: tuple[int, ...], ends: tuple[int, ...], axes: tuple[int, ...] | None = None) -> Any:
    return slice_(data, starts, ends, axes)


def _sliced(data: torch.Tensor, axis: int, start: Any, end: Any, step: Any) -> torch.Tensor:
    before = (slice(None),) * axis
    if step > 0:
        return data[(*before, slice(start, end, step))]
    # torch has no negative steps: the same stretch, turned round. `last` is where it stops, -1 before the first.
    length = data.shape[axis]
    first = max(start + length, -1) if start < 0 else min(start, length - 1)
    last = max(end + length, -1) if end < 0 else min(end, length - 1)
    turned = data[(*before, slice(last + 1, max(first, last) + 1))].flip(axis)
    return turned if step == -1 else turned[(*before, slice(None, None, -step))]


@operator("Expand", since=8, host=True)
def expand(data: Any, shape: Any, *, device: torch.device | None = None) -> Any:
    """Both broadcast: an axis of 1 in `shape` leaves the data's own."""
    sizes = ints(shape)
    if is_host(data):
        own = shape_of(data)
        row = repeated(0, sizes)
        if row is not None and (not own or own == (1,) or not sizes or len(row) in (1, own[0])):
            items = ints(data)
            return items * len(row) if sizes and len(items) == 1 else data
        data = as_tensor(data, device=device)
    missing = len(sizes) - data.ndim
    kept = [-1 if axis >= missing and one == 1 else one for axis, one in enumerate(sizes)]
    return data.expand([-1] * -missing + kept if missing < 0 else kept)


@operator("Tile", since=6, host=True)
def tile(data: Any, repeats: Any, *, device: torch.device | None = None) -> Any:
    counts = ints(repeats)
    if is_host(data):
        row = repeated(0, counts)
        if row is not None:
            return tuple(data) * len(row) if counts else data
        data = as_tensor(data, device=device)
    return data.repeat(counts)


@operator("ConstantOfShape", since=9, host=True)
def constant_of_shape(shape: Any, *, value: Any = None, device: torch.device | None = None) -> Any:
    sizes = ints(shape)
    if isinstance(value, torch.Tensor):
        return value.reshape(()).expand(sizes).contiguous()
    if value is None:
        return torch.zeros(sizes, dtype=torch.float32, device=device)
    number = ints(value)[0]
    row = repeated(number, sizes)
    return as_tensor(number, device=device).expand(sizes).contiguous() if row is None else row


@operator("Range", since=11, host=True)
def range_(
    start: Any, limit: Any, delta: Any, *, stash_type: int = 1, device: torch.device | None = None
) -> Any:  # fmt: skip
    """A short row of whole numbers is taken for axes and stays a host value; otherwise it is data."""
    if all_host(start, limit, delta) and not any(isinstance(one, float) for one in (start, limit, delta)):
        (start,), (limit,), (delta,) = ints(start), ints(limit), ints(delta)
        count = max(-((start - limit) // delta), 0)
        if has_static_value(count) and has_static_value(start) and count <= 8:
            return tuple(start + number * delta for number in range(count))
        return torch.arange(start, start + count * delta, delta, dtype=torch.int64, device=device)
    like = next((one for one in (start, limit, delta) if isinstance(one, torch.Tensor)), None)
    dtype, device = (torch.float32, device) if like is None else (like.dtype, like.device)
    first, end, step = (one.item() if isinstance(one, torch.Tensor) else one for one in (start, limit, delta))
    exact = dtype.is_floating_point
    count = max(math.ceil((end - first) / step) if exact else -((first - end) // step), 0)
    # As the specification counts, start + i·delta: float16 would lose steps if it added them up.
    numbers = torch.arange(count, dtype=torch.float64 if exact else torch.int64, device=device)
    return (first + numbers * step).to(dtype)


@operator("DepthToSpace", since=1)
def depth_to_space(data: Any, *, blocksize: int, mode: str = "DCR") -> torch.Tensor:
    n, c, h, w = data.shape
    b, depth = blocksize, c // blocksize**2
    if mode == "DCR":
        cells = data.reshape(n, b, b, depth, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        cells = data.reshape(n, depth, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    found: torch.Tensor = cells.reshape(n, depth, h * b, w * b)
    return found


@operator("SpaceToDepth", since=1)
def space_to_depth(data: Any, *, blocksize: int, mode: str = "DCR") -> torch.Tensor:
    n, c, h, w = data.shape
    b = blocksize
    cells = data.reshape(n, c, h // b, b, w // b, b)
    cells = cells.permute(0, 3, 5, 1, 2, 4) if mode == "DCR" else cells.permute(0, 1, 3, 5, 2, 4)
    found: torch.Tensor = cells.reshape(n, c * b * b, h // b, w // b)
    return found


@operator("Pad", since=11, host=(1, 2, 3))
def pad(data: Any, pads: Any, constant_value: Any = None, axes: Any = None, *, mode: str = "constant") -> torch.Tensor:
    """Pads are counts before, for each axis, then counts after; a negative one cuts."""
    data, counts = as_tensor(data), ints(pads)
    named = range(data.ndim) if axes is None else [positive(axis, data.ndim) for axis in ints(axes)]
    borders: list[tuple[Any, Any]] = [(0, 0)] * data.ndim
    for position, axis in enumerate(named):
        borders[axis] = (counts[position], counts[position + len(counts) // 2])
    if mode == "constant":
        return _filled(data, borders, constant_value)
    for axis, (before, after) in enumerate(borders):
        if not (before == 0 and after == 0):
            data = _continued(data, axis, before, after, mode)
    found: torch.Tensor = data
    return found


@operator("Pad", since=2)
def pad_2(data: Any, *, pads: tuple[int, ...], mode: str = "constant", value: float = 0.0) -> torch.Tensor:
    return pad(data, pads, value, mode=mode)


def _filled(data: torch.Tensor, borders: Sequence[tuple[Any, Any]], value: Any) -> torch.Tensor:
    counts = [count for border in reversed(borders) for count in border]  # torch begins with the last axis
    if not isinstance(value, torch.Tensor):
        number = 0 if value is None else ints(value)[0]
        return functional.pad(data, counts, value=number)
    # The value of a tensor, but without reading it: that would end a compiled graph.
    inside = functional.pad(torch.ones_like(data, dtype=torch.bool), counts, value=0)
    return torch.where(inside, functional.pad(data, counts), value.reshape(()))


def _continued(data: torch.Tensor, axis: int, before: Any, after: Any, mode: str) -> torch.Tensor:
    """The axis goes on beyond its ends with values of its own. By index, as torch has this for some ranks only."""
    length = data.shape[axis]
    places = torch.arange(-before, length + after, device=data.device)
    if mode == "edge":
        places = places.clamp(0, length - 1)
    elif mode == "wrap":
        places = places % length
    elif mode == "reflect":
        places = places % max(2 * length - 2, 1)
        places = torch.minimum(places, 2 * length - 2 - places)
    else:
        raise ValueError(f"Pad has no mode {mode}")
    return data.index_select(axis, places)


@operator("CenterCropPad", since=18, host=(1,))
def center_crop_pad(data: Any, shape: Any, *, axes: tuple[int, ...] | None = None) -> torch.Tensor:
    """What is left over from halving is cut or padded at the end."""
    data, sizes = as_tensor(data), ints(shape)
    borders: list[tuple[Any, Any]] = [(0, 0)] * data.ndim
    for axis, wanted in zip(range(data.ndim) if axes is None else axes, sizes, strict=True):
        length = data.shape[axis]
        before = (wanted - length) // 2 if wanted > length else -((length - wanted) // 2)
        borders[axis] = (before, wanted - length - before)
    return _filled(data, borders, None)
