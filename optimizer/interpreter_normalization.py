"""Operators of the interpreter: normalization. Statistics of half floats are taken in float32, as ONNX asks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import DTYPES

EPSILON = 1e-5


@operator("BatchNormalization", since=7)
def batch_normalization_7(
    x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, *,
    epsilon: float = EPSILON, momentum: float = 0.9, spatial: int = 1, outputs: int = 1,
) -> tuple[Any, ...]:  # fmt: skip
    if spatial:
        each: tuple[Any, ...] = batch_normalization_9(x, scale, b, mean, var, epsilon=epsilon, momentum=momentum)
        return each
    # Each activation has its own statistics.
    found = _normalized(x.flatten(1), scale.reshape(-1), b.reshape(-1), mean.reshape(-1), var.reshape(-1), epsilon)
    return (found.reshape(x.shape), mean, var, None, None)


@operator("BatchNormalization", since=9)
def batch_normalization_9(
    x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, *,
    epsilon: float = EPSILON, momentum: float = 0.9, outputs: int = 1,
) -> tuple[Any, ...]:  # fmt: skip
    """More than one output meant training, which no runtime did: here it is inference, as there."""
    return (_normalized(x, scale, b, mean, var, epsilon), mean, var, None, None)


@operator("BatchNormalization", since=14)
def batch_normalization(
    x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, *,
    epsilon: float = EPSILON, momentum: float = 0.9, training_mode: int = 0, outputs: int = 1,
) -> tuple[Any, ...]:  # fmt: skip
    if not training_mode:
        return (_normalized(x, scale, b, mean, var, epsilon), mean, var)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    now_var, now_mean = torch.var_mean(_wide(x), axes, unbiased=False)
    found = _normalized(x, scale, b, now_mean, now_var, epsilon)
    running = [
        (old * momentum + now.to(old.dtype) * (1 - momentum)).to(old.dtype)
        for old, now in ((mean, now_mean), (var, now_var))
    ]
    return (found, *running)


def _normalized(
    x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, epsilon: float
) -> torch.Tensor:
    plain = all(value.dtype == x.dtype for value in (scale, b, mean, var))
    if plain and not (mean.requires_grad or var.requires_grad):
        return F.batch_norm(x, mean, var, scale, b, False, 0.0, epsilon)
    shape = (-1, *(1,) * (x.ndim - 2))
    wide = [_wide(value).reshape(shape) for value in (scale, b, mean, var)]
    found = (_wide(x) - wide[2]) * torch.rsqrt(wide[3] + epsilon) * wide[0] + wide[1]
    return found.to(x.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Half floats as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@operator("InstanceNormalization", since=6)
def instance_normalization(
    x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor, *, epsilon: float = EPSILON
) -> torch.Tensor:
    # Not F.group_norm, which refuses a batch of one with one value a channel.
    return torch.group_norm(x, x.shape[1], scale, b, epsilon)


@operator("GroupNormalization", since=18)
def group_normalization_18(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, *, num_groups: int, epsilon: float = EPSILON
) -> torch.Tensor:
    """Scale and bias are of one number a group, not a channel."""
    each = x.shape[1] // num_groups
    scale, bias = (value[:, None].expand(num_groups, each).reshape(-1) for value in (scale, bias))
    return torch.group_norm(x, num_groups, scale, bias, epsilon)


@operator("GroupNormalization", since=21)
def group_normalization(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, *, num_groups: int, epsilon: float = EPSILON,
    stash_type: int = 1,
) -> torch.Tensor:  # fmt: skip
    # torch takes the statistics of half floats in float32, which is what stash_type 1 says.
    return torch.group_norm(x, num_groups, scale, bias, epsilon)


@operator("LayerNormalization", since=17)
def layer_normalization(
    x: torch.Tensor, scale: torch.Tensor, b: Any = None, *, axis: int = -1, epsilon: float = EPSILON,
    stash_type: int = 1, outputs: int = 1,
) -> tuple[Any, ...]:  # fmt: skip
    shape = x.shape[axis % x.ndim :]
    plain = scale.shape == shape and (b is None or b.shape == shape) and scale.dtype == x.dtype
    if outputs == 1 and plain and DTYPES[stash_type] is torch.float32:
        return (F.layer_norm(x, shape, scale, b, epsilon),)
    wide = x.to(DTYPES[stash_type])
    var, mean = torch.var_mean(wide, list(range(axis % x.ndim, x.ndim)), unbiased=False, keepdim=True)
    inverse = torch.rsqrt(var + epsilon)
    found = ((wide - mean) * inverse).to(x.dtype) * scale
    return (found if b is None else found + b, mean, inverse)


@operator("RMSNormalization", since=23)
def rms_normalization(
    x: torch.Tensor, scale: torch.Tensor, *, axis: int = -1, epsilon: float = EPSILON, stash_type: int = 1
) -> torch.Tensor:
    wide = x.to(DTYPES[stash_type])
    square = (wide * wide).mean(list(range(axis % x.ndim, x.ndim)), keepdim=True)
    # The result has the type of scale, not of x.
    return (wide * torch.rsqrt(square + epsilon)).to(x.dtype).to(scale.dtype) * scale


@operator("LpNormalization", since=1)
def lp_normalization(x: torch.Tensor, *, axis: int = -1, p: int = 2) -> torch.Tensor:
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return x / torch.where(norm == 0, 1.0, norm)


@operator("MeanVarianceNormalization", since=9)
def mean_variance_normalization(x: torch.Tensor, *, axes: Any = (0, 2, 3)) -> torch.Tensor:
    wide = _wide(x)
    var, mean = torch.var_mean(wide, list(axes), unbiased=False, keepdim=True)
    return ((wide - mean) / (var.sqrt() + 1e-9)).to(x.dtype)


@operator("LRN", since=1)
def lrn(x: torch.Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> torch.Tensor:
    # Of an even window the larger half lies after the channel; torch's own puts it before.
    square = F.pad(x * x, [0, 0] * (x.ndim - 2) + [(size - 1) // 2, size // 2])
    total = square.narrow(1, 0, x.shape[1])
    for start in range(1, size):
        total = total + square.narrow(1, start, x.shape[1])
    return x / (bias + alpha / size * total) ** beta
