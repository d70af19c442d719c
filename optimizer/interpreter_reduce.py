"""Operators of the interpreter that work along axes: reductions, running sums, the largest, softmax.

Axes were an attribute at first, and became an input with opset 18 (13 for ReduceSum): each reduction is registered for
both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import (
    UNSIGNED,
    as_tensor,
    ints,
    is_host,
    narrow,
    one_int,
    ordered,
    unordered,
    wide,
)

Axes = tuple[int, ...]
Reduction = Callable[[torch.Tensor, Axes, bool], torch.Tensor]


def _reduced(
    function: Reduction, data: Any, axes: Any, keepdims: int, noop: int = 0, *, host: Callable[..., Any] | None = None
) -> Any:
    """`function` takes a tensor, the axes (none: do only what it does beside reducing) and whether to keep them; `host`
    does the same to a tuple of numbers."""
    dims = () if axes is None else ints(axes)
    if host is not None and is_host(data):
        if not isinstance(data, (tuple, list)) or (noop and not dims):
            return data
        return (host(tuple(data)),) if keepdims else host(tuple(data))
    data = as_tensor(data)
    if not dims and not noop:
        dims = tuple(range(data.ndim))
    return function(data, tuple(dim % data.ndim for dim in dims) if data.ndim else (), bool(keepdims))


def _added(found: tuple[Any, ...]) -> Any:
    return reduce(lambda a, b: a + b, found, 0)


def _multiplied(found: tuple[Any, ...]) -> Any:
    return reduce(lambda a, b: a * b, found, 1)


def _largest(found: tuple[Any, ...]) -> Any:
    return reduce(torch.sym_max, found)


def _smallest(found: tuple[Any, ...]) -> Any:
    return reduce(torch.sym_min, found)


def _sum(x: torch.Tensor, axes: Axes, keep: bool) -> torch.Tensor:
    return narrow(torch.sum(wide(x), axes, keep, dtype=wide(x).dtype), x.dtype) if axes else x


def _mean(x: torch.Tensor, axes: Axes, keep: bool) -> torch.Tensor:
    if not axes:
        return x
    if x.is_floating_point():
        return torch.mean(x, axes, keep)
    count = reduce(lambda made, axis: made * x.shape[axis], axes, 1)
    return narrow(torch.div(torch.sum(wide(x), axes, keep), count, rounding_mode="trunc"), x.dtype)


def _prod(x: torch.Tensor, axes: Axes, keep: bool) -> torch.Tensor:
    found = wide(x)
    for axis in sorted(axes, reverse=True):  # the last first, so that those before keep their numbers
        found = torch.prod(found, axis, keep, dtype=found.dtype)
    return narrow(found, x.dtype)


def _max(x: torch.Tensor, axes: Axes, keep: bool) -> torch.Tensor:
    return _extreme(x, axes, keep, torch.amax, lambda limits: limits.min, -math.inf) if axes else x


def _min(x: torch.Tensor, axes: Axes, keep: bool) -> torch.Tensor:
    return _extreme(x, axes, keep, torch.amin, lambda limits: limits.max, math.inf) if axes else x


def _extreme(
    x: torch.Tensor, axes: Axes, keep: bool, function: Callable[..., Any], limit: Callable[[Any], int], infinity: float
) -> torch.Tensor:
    """An extreme; of nothing, that which every number is beyond."""
    if all(x.shape[axis] != 0 for axis in axes):
        return unordered(function(ordered(x), axes, keep), x.dtype)
    fill: Any = infinity if x.is_floating_point() else None
    if fill is None:
        fill = infinity > 0 if x.dtype is torch.bool else limit(torch.iinfo(x.dtype))
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape) if keep or axis not in axes]
    return torch.full(shape, fill, dtype=x.dtype, device=x.device)


def _in_floats(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_floating_point() else wide(x).to(torch.float64)


def _l1(x: torch.Tensor, axes: Axes, keep: bool) -> torch.Tensor:
    return _sum(x if x.dtype in UNSIGNED else torch.abs(x), axes, keep)


def _l2(x: torch.Tensor, axes: Axes, keep: bool) -> torch.Tensor:
    # vector_norm, not the root of a sum: its gradient at zero is zero, not NaN.
    value = _in_floats(x)
    return narrow(torch.linalg.vector_norm(value, 2, axes, keep) if axes else torch.abs(value), x.dtype)


def _log_sum(x: torch.Tensor, axes: Axes, keep: bool) -> torch.Tensor:
    return torch.log(_sum(_in_floats(x), axes, keep)).to(x.dtype)


def _log_sum_exp(x: torch.Tensor, axes: Axes, keep: bool) -> torch.Tensor:
    return torch.logsumexp(_in_floats(x), axes, keep).to(x.dtype) if axes else x


def _sum_square(x: torch.Tensor, axes: Axes, keep: bool) -> torch.Tensor:
    value = wide(x)
    return narrow(_sum(value * value, axes, keep), x.dtype)


@operator("ReduceSum", since=1, host=True)
def reduce_sum_of_attribute(data: Any, *, axes: Any = None, keepdims: int = 1) -> Any:
    return _reduced(_sum, data, axes, keepdims, host=_added)


@operator("ReduceSum", since=13, host=True)
def reduce_sum(data: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    return _reduced(_sum, data, axes, keepdims, noop_with_empty_axes, host=_added)


@operator("ReduceProd", since=1, host=True)
def reduce_prod_of_attribute(data: Any, *, axes: Any = None, keepdims: int = 1) -> Any:
    return _reduced(_prod, data, axes, keepdims, host=_multiplied)


@operator("ReduceProd", since=18, host=True)
def reduce_prod(data: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    return _reduced(_prod, data, axes, keepdims, noop_with_empty_axes, host=_multiplied)


@operator("ReduceMax", since=1, host=True)
def reduce_max_of_attribute(data: Any, *, axes: Any = None, keepdims: int = 1) -> Any:
    return _reduced(_max, data, axes, keepdims, host=_largest)


@operator("ReduceMax", since=18, host=True)
def reduce_max(data: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    return _reduced(_max, data, axes, keepdims, noop_with_empty_axes, host=_largest)


@operator("ReduceMin", since=1, host=True)
def reduce_min_of_attribute(data: Any, *, axes: Any = None, keepdims: int = 1) -> Any:
    return _reduced(_min, data, axes, keepdims, host=_smallest)


@operator("ReduceMin", since=18, host=True)
def reduce_min(data: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    return _reduced(_min, data, axes, keepdims, noop_with_empty_axes, host=_smallest)


@operator("ReduceMean", since=1)
def reduce_mean_of_attribute(data: Any, *, axes: Any = None, keepdims: int = 1) -> Any:
    return _reduced(_mean, data, axes, keepdims)


@operator("ReduceMean", since=18, host=(1,))
def reduce_mean(data: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    return _reduced(_mean, data, axes, keepdims, noop_with_empty_axes)


@operator("ReduceL1", since=1)
def reduce_l1_of_attribute(data: Any, *, axes: Any = None, keepdims: int = 1) -> Any:
    return _reduced(_l1, data, axes, keepdims)


@operator("ReduceL1", since=18, host=(1,))
def reduce_l1(data: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    return _reduced(_l1, data, axes, keepdims, noop_with_empty_axes)


@operator("ReduceL2", since=1)
def reduce_l2_of_attribute(data: Any, *, axes: Any = None, keepdims: int = 1) -> Any:
    return _reduced(_l2, data, axes, keepdims)


@operator("ReduceL2", since=18, host=(1,))
def reduce_l2(data: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    return _reduced(_l2, data, axes, keepdims, noop_with_empty_axes)


@operator("ReduceLogSum", since=1)
def reduce_log_sum_of_attribute(data: Any, *, axes: Any = None, keepdims: int = 1) -> Any:
    return _reduced(_log_sum, data, axes, keepdims)


@operator("ReduceLogSum", since=18, host=(1,))
def reduce_log_sum(data: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    return _reduced(_log_sum, data, axes, keepdims, noop_with_empty_axes)


@operator("ReduceLogSumExp", since=1)
def reduce_log_sum_exp_of_attribute(data: Any, *, axes: Any = None, keepdims: int = 1) -> Any:
    return _reduced(_log_sum_exp, data, axes, keepdims)


@operator("ReduceLogSumExp", since=18, host=(1,))
def reduce_log_sum_exp(data: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    return _reduced(_log_sum_exp, data, axes, keepdims, noop_with_empty_axes)


@operator("ReduceSumSquare", since=1)
def reduce_sum_square_of_attribute(data: Any, *, axes: Any = None, keepdims: int = 1) -> Any:
    return _reduced(_sum_square, data, axes, keepdims)


@operator("ReduceSumSquare", since=18, host=(1,))
def reduce_sum_square(data: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    return _reduced(_sum_square, data, axes, keepdims, noop_with_empty_axes)


def _arg(
    data: Any, function: Callable[..., torch.Tensor], axis: int, keepdims: int, select_last_index: int
) -> torch.Tensor:
    """The first or the last index of an extreme."""
    x = ordered(as_tensor(data))
    if not select_last_index:
        return function(x, axis, bool(keepdims))
    return x.shape[axis] - 1 - function(torch.flip(x, (axis,)), axis, bool(keepdims))


@operator("ArgMax", since=1)
def arg_max(data: Any, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Any:
    return _arg(data, torch.argmax, axis, keepdims, select_last_index)


@operator("ArgMin", since=1)
def arg_min(data: Any, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Any:
    return _arg(data, torch.argmin, axis, keepdims, select_last_index)


def _running(function: Callable[..., Any], neutral: int, data: Any, axis: Any, exclusive: int, reverse: int) -> Any:
    """`function` along an axis. Exclusive: everything moves by one, as taking off what was put on loses digits."""
    data = as_tensor(data)
    x, dim = wide(data), one_int(axis)
    if reverse:
        x = torch.flip(x, (dim,))
    if exclusive:
        first = torch.full_like(x.narrow(dim, 0, min(1, x.shape[dim])), neutral)
        x = torch.cat((first, x), dim).narrow(dim, 0, x.shape[dim])
    found = function(x, dim, dtype=x.dtype)
    return narrow(torch.flip(found, (dim,)) if reverse else found, data.dtype)


@operator("CumSum", since=11, host=(1,))
def cumulative_sum(x: Any, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Any:
    return _running(torch.cumsum, 0, x, axis, exclusive, reverse)


@operator("CumProd", since=26, host=(1,))
def cumulative_product(x: Any, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Any:
    return _running(torch.cumprod, 1, x, axis, exclusive, reverse)


def _top(data: Any, count: Any, axis: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Not torch.topk, which takes any of several equals: ONNX takes those of the lowest indices, in their order."""
    x = as_tensor(data)
    values, indices = torch.sort(ordered(x), dim=axis, descending=largest, stable=True)
    return unordered(values.narrow(axis, 0, count), x.dtype), indices.narrow(axis, 0, count)


@operator("TopK", since=1)
def top_by_attribute(x: Any, *, k: int, axis: int = -1) -> tuple[Any, ...]:
    return _top(x, k, axis, True)


@operator("TopK", since=10, host=(1,))
def top(x: Any, k: Any, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Any, ...]:
    """Sorted in any case: that is one of the orders that `sorted` = 0 leaves open."""
    return _top(x, one_int(k), axis, bool(largest))


def _one_hot_max(x: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.zeros_like(x).scatter(axis, torch.argmax(x, axis, True), 1.0)


def _log_softmax(x: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.log_softmax(x, axis)


def _softmax(x: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.softmax(x, axis)


def _from_axis_on(function: Callable[[torch.Tensor, int], torch.Tensor], data: Any, axis: int) -> torch.Tensor:
    """Before opset 13: over all axes from `axis` on, as if they were one."""
    x = as_tensor(data)
    if axis % x.ndim == x.ndim - 1:
        return function(x, -1)
    return function(x.flatten(axis), -1).reshape(x.shape)


@operator("Softmax", since=1)
def softmax_from_axis_on(x: Any, *, axis: int = 1) -> Any:
    return _from_axis_on(_softmax, x, axis)


@operator("Softmax", since=13)
def softmax(x: Any, *, axis: int = -1) -> Any:
    return _softmax(as_tensor(x), axis)


@operator("LogSoftmax", since=1)
def log_softmax_from_axis_on(x: Any, *, axis: int = 1) -> Any:
    return _from_axis_on(_log_softmax, x, axis)


@operator("LogSoftmax", since=13)
def log_softmax(x: Any, *, axis: int = -1) -> Any:
    return _log_softmax(as_tensor(x), axis)


@operator("Hardmax", since=1)
def hardmax_from_axis_on(x: Any, *, axis: int = 1) -> Any:
    return _from_axis_on(_one_hot_max, x, axis)


@operator("Hardmax", since=13)
def hardmax(x: Any, *, axis: int = -1) -> Any:
    return _one_hot_max(as_tensor(x), axis)
