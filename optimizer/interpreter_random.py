"""Operators of the interpreter that draw numbers. Without a seed they follow torch's own generator. With one a run draws
the same numbers each time, from a generator of its own, which ends a compiled graph. No two implementations of ONNX draw
the same."""

from __future__ import annotations

from typing import Any

import torch

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import DTYPES, as_tensor


def _seeded(seed: float | None, device: torch.device | None) -> dict[str, Any]:
    """As an argument that is left out without a seed: torch refuses symbolic sizes beside it."""
    if seed is None:
        return {}
    return {"generator": torch.Generator(device or torch.get_default_device()).manual_seed(int(seed))}


def _uniform(sizes: Any, seed: float | None, device: torch.device | None) -> torch.Tensor:
    return torch.rand(sizes, device=device, **_seeded(seed, device))


def _normal(sizes: Any, seed: float | None, device: torch.device | None) -> torch.Tensor:
    return torch.randn(sizes, device=device, **_seeded(seed, device))


@operator("RandomUniform")
def random_uniform(
    *, shape: tuple[int, ...], dtype: int = 1, high: float = 1.0, low: float = 0.0, seed: float | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:  # fmt: skip
    return (low + (high - low) * _uniform(shape, seed, device)).to(DTYPES[dtype])


@operator("RandomNormal")
def random_normal(
    *, shape: tuple[int, ...], dtype: int = 1, mean: float = 0.0, scale: float = 1.0, seed: float | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:  # fmt: skip
    return (mean + scale * _normal(shape, seed, device)).to(DTYPES[dtype])


@operator("RandomUniformLike")
def random_uniform_like(
    data: Any, *, dtype: int | None = None, high: float = 1.0, low: float = 0.0, seed: float | None = None
) -> torch.Tensor:
    data = as_tensor(data)
    return (low + (high - low) * _uniform(data.shape, seed, data.device)).to(DTYPES[dtype] if dtype else data.dtype)


@operator("RandomNormalLike")
def random_normal_like(
    data: Any, *, dtype: int | None = None, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> torch.Tensor:
    data = as_tensor(data)
    return (mean + scale * _normal(data.shape, seed, data.device)).to(DTYPES[dtype] if dtype else data.dtype)


@operator("Bernoulli", since=15)
def bernoulli(data: Any, *, dtype: int | None = None, seed: float | None = None) -> torch.Tensor:
    return (_uniform(data.shape, seed, data.device) < data).to(DTYPES[dtype] if dtype else data.dtype)


@operator("Multinomial", since=7)
def multinomial(data: Any, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> torch.Tensor:
    """From logarithms of probabilities that need not add up to one."""
    chances = data.float().softmax(-1)
    drawn = torch.multinomial(chances, sample_size, replacement=True, **_seeded(seed, data.device))
    return drawn.to(DTYPES[dtype])
