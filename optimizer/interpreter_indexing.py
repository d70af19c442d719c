"""Operators of the interpreter that read, write and order elements by index."""

from __future__ import annotations

from typing import Any

import torch

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import DTYPES, NUMBERS, all_host, as_tensor, ints, is_host, one_int, tensors

SIGNED = {
    torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64,
    torch.float8_e4m3fn: torch.int8, torch.float8_e4m3fnuz: torch.int8,
    torch.float8_e5m2: torch.int8, torch.float8_e5m2fnuz: torch.int8,
}  # fmt: skip
"""Types that torch can't gather or scatter, and those that carry their bits."""
REDUCTIONS = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}


@operator("Gather", host=True)
def gather(data: Any, indices: Any, *, axis: int = 0) -> Any:
    if all_host(data, indices):
        return tuple(data[at] for at in indices) if isinstance(indices, (tuple, list)) else data[indices]
    if isinstance(data, torch.Tensor):
        if isinstance(indices, NUMBERS):
            return data.select(axis, indices)
        if isinstance(indices, (tuple, list)) and len(indices) == 1:
            return data.select(axis, indices[0]).unsqueeze(axis)
    data, indices = tensors(data, indices)
    axis = axis + data.ndim if axis < 0 else axis
    # Indexing counts negative places from the end, as ONNX does. In one row: torch reads a lone index to the host.
    found = data[(*[slice(None)] * axis, indices.reshape(-1).long())]
    return found.reshape((*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]))


@operator("GatherElements", since=11)
def gather_elements(data: Any, indices: Any, *, axis: int = 0) -> torch.Tensor:
    data, indices = tensors(data, indices)
    return _of_type(_bits(data).gather(axis, _wrapped(indices, data.shape[axis])), data.dtype)


@operator("GatherND", since=11)
def gather_nd(data: Any, indices: Any, *, batch_dims: int = 0) -> torch.Tensor:
    data, indices = tensors(data, indices)
    depth, batch = indices.shape[-1], indices.shape[:batch_dims]
    places = list(indices.long().flatten(0, -2).unbind(-1)) if indices.ndim > 1 else [
        row.reshape(1) for row in indices.long().unbind(0)
    ]  # fmt: skip
    for number, length in enumerate(batch):
        # A batch axis is indexed by its own position.
        own = torch.arange(length, device=data.device).reshape(
            [-1 if at == number else 1 for at in range(indices.ndim - 1)]
        )
        places.insert(number, own.expand(indices.shape[:-1]).reshape(-1))
    found: torch.Tensor = data[tuple(places)].reshape((*indices.shape[:-1], *data.shape[batch_dims + depth :]))
    return found


@operator("ScatterElements", since=11)
def scatter_elements(data: Any, indices: Any, updates: Any, *, axis: int = 0, reduction: str = "none") -> torch.Tensor:
    data, indices, updates = tensors(data, indices, updates)
    return _scattered(data, axis, _wrapped(indices, data.shape[axis]), updates, reduction)


@operator("Scatter", since=9)
def scatter(data: Any, indices: Any, updates: Any, *, axis: int = 0) -> torch.Tensor:
    return scatter_elements(data, indices, updates, axis=axis)


@operator("ScatterND", since=11)
def scatter_nd(data: Any, indices: Any, updates: Any, *, reduction: str = "none") -> torch.Tensor:
    """The indexed axes as one, of which rows are written."""
    data, indices, updates = tensors(data, indices, updates)
    depth = indices.shape[-1]
    row: Any = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=data.device)
    count: Any = 1
    for axis in range(depth):
        row = row * data.shape[axis] + _wrapped(indices[..., axis], data.shape[axis])
        count = count * data.shape[axis]
    width: Any = 1
    for length in data.shape[depth:]:
        width = width * length
    places = row.reshape(-1, 1).expand(-1, width)
    found = _scattered(data.reshape(count, width), 0, places, updates.reshape(places.shape), reduction)
    return found.reshape(data.shape)


@operator("TensorScatter", since=24)
def tensor_scatter(
    past_cache: Any, update: Any, write_indices: Any = None, *, axis: int = -2, mode: str = "linear"
) -> torch.Tensor:
    axis = axis + past_cache.ndim if axis < 0 else axis
    batch, length = update.shape[0], update.shape[axis]
    places = torch.arange(length, device=past_cache.device).expand(batch, length)
    if write_indices is not None:
        places = places + as_tensor(write_indices, past_cache).long().reshape(-1, 1)
    if mode == "circular":
        places = places % past_cache.shape[axis]
    ranks = [batch if at == 0 else length if at == axis else 1 for at in range(update.ndim)]
    return _scattered(past_cache, axis, places.reshape(ranks).expand(update.shape), update, "none")


def _bits(data: torch.Tensor) -> torch.Tensor:
    return data.view(SIGNED[data.dtype]) if data.dtype in SIGNED else data


def _of_type(bits: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    return bits.view(kind) if kind in SIGNED else bits  # a view of any type, even its own, passes no gradients


def _wrapped(indices: torch.Tensor, length: Any) -> torch.Tensor:
    """Negative indices count from the end."""
    indices = indices.long()
    return torch.where(indices < 0, indices + length, indices)


def _scattered(data: Any, axis: int, places: Any, updates: Any, reduction: str) -> torch.Tensor:
    kind = data.dtype
    if reduction == "none":
        return _of_type(_bits(data).scatter(axis, places, _bits(updates)), kind)
    if kind in SIGNED:
        data, updates = data.to(torch.int64), updates.to(torch.int64)
    found: torch.Tensor = data.scatter_reduce(axis, places, updates, REDUCTIONS[reduction], include_self=True)
    return found.to(kind)


@operator("OneHot", since=9, host=(1,))
def one_hot(indices: Any, depth: Any, values: Any, *, axis: int = -1) -> torch.Tensor:
    """An index beyond the depth is hot nowhere."""
    indices, values = tensors(indices, values)
    count = one_int(depth)
    axis = axis + indices.ndim + 1 if axis < 0 else axis
    classes = torch.arange(count, device=indices.device).reshape([-1] + [1] * (indices.ndim - axis))
    hot = _wrapped(indices, count).unsqueeze(axis) == classes
    return torch.where(hot, values[1], values[0])


@operator("NonZero", since=9)
def non_zero(x: Any) -> torch.Tensor:
    found: torch.Tensor = (as_tensor(x) != 0).nonzero().T
    return found


@operator("Compress", since=9, host=(1,))
def compress(data: Any, condition: Any, *, axis: int | None = None) -> torch.Tensor:
    """The condition may be shorter than the axis."""
    data = as_tensor(data)
    if axis is None:
        data, axis = data.reshape(-1), 0
    if is_host(condition):
        kept = as_tensor(tuple(at for at, wanted in enumerate(ints(condition)) if wanted), data)
    else:
        kept = condition.reshape(-1).nonzero().reshape(-1)
    found: torch.Tensor = data.index_select(axis, kept)
    return found


@operator("Unique", since=11)
def unique(x: Any, *, axis: int | None = None, sorted: int = 1, outputs: int = 1) -> tuple[torch.Tensor, ...]:
    x = as_tensor(x)
    if axis is None:
        x, axis = x.reshape(-1), 0
    found, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True, dim=axis)
    places = torch.arange(inverse.numel(), device=x.device)
    first = torch.full_like(counts, inverse.numel()).scatter_reduce(0, inverse, places, "amin")
    if not sorted:
        order = first.argsort()
        found, first, counts = found.index_select(axis, order), first[order], counts[order]
        inverse = order.argsort()[inverse]
    return found, first, inverse, counts


@operator("ReverseSequence", since=10)
def reverse_sequence(data: Any, sequence_lens: Any, *, batch_axis: int = 1, time_axis: int = 0) -> torch.Tensor:
    """Only the first so many steps of each sequence turn round."""
    data, lengths = tensors(data, sequence_lens)
    rows = data.movedim((batch_axis, time_axis), (0, 1))
    steps = torch.arange(rows.shape[1], device=data.device)
    lengths = lengths.long().reshape(-1, 1)
    places = torch.where(steps < lengths, lengths - 1 - steps, steps)
    batch = torch.arange(rows.shape[0], device=data.device).reshape(-1, 1)
    found: torch.Tensor = rows[batch, places].movedim((0, 1), (batch_axis, time_axis))
    return found


@operator("Trilu", since=14, host=(1,))
def trilu(data: Any, k: Any = 0, *, upper: int = 1) -> torch.Tensor:
    data = as_tensor(data)
    if isinstance(k, (tuple, list)):
        k = k[0]
    elif isinstance(k, torch.Tensor):
        k = k.reshape(())
    beyond = _diagonal(data)
    return torch.where(
        beyond >= k if upper else beyond <= k, data, torch.zeros((), dtype=data.dtype, device=data.device)
    )


@operator("EyeLike", since=9)
def eye_like(data: Any, *, dtype: int | None = None, k: int = 0) -> torch.Tensor:
    return (_diagonal(data) == k).to(data.dtype if dtype is None else DTYPES[dtype])


def _diagonal(data: torch.Tensor) -> torch.Tensor:
    """For each element of a matrix the number of its diagonal."""
    rows = torch.arange(data.shape[-2], device=data.device).reshape(-1, 1)
    return torch.arange(data.shape[-1], device=data.device) - rows
