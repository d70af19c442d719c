"""Operators of the interpreter: products of matrices. Those of quantized integers stand in `interpreter_quantize`."""

from __future__ import annotations

from typing import Any

import torch

from perwatt.interpreter_operators import operator

UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""torch stores these and hardly computes with them."""


@operator("MatMul", since=1)
def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.is_floating_point() or a.is_complex():
        return torch.matmul(a, b)
    return _integer_product(a, b)


def _integer_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.device.type == "cpu":
        wide = torch.int64 if a.dtype in UNSIGNED else a.dtype
        return torch.matmul(a.to(wide), b.to(wide)).to(a.dtype)
    # Accelerators multiply matrices of floats only; float64 is exact up to 2**53.
    return torch.matmul(a.double(), b.double()).to(torch.int64).to(a.dtype)


@operator("FusedMatMul", since=1, domain="com.microsoft")
def fused_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> torch.Tensor:
    product = torch.matmul(_turned(a, transA, transBatchA), _turned(b, transB, transBatchB))
    return product if alpha == 1.0 else product * alpha


def _turned(x: torch.Tensor, last_two: int, batch: int) -> torch.Tensor:
    """`batch` moves the first axis to the place before the last; `last_two` swaps the last two after that."""
    if batch and x.ndim > 2:
        x = x.movedim(0, -2)
    return x.transpose(-1, -2) if last_two and x.ndim > 1 else x


@operator("Gemm", since=7)
def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    c: Any = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> torch.Tensor:
    a = a.transpose(0, 1) if transA else a
    b = b.transpose(0, 1) if transB else b
    if not a.is_floating_point():
        return _integer_gemm(a, b, c, alpha, beta)
    if c is not None:
        return torch.addmm(c, a, b, alpha=alpha, beta=beta)
    product = torch.matmul(a, b)
    return product if alpha == 1.0 else product * alpha


def _integer_gemm(a: torch.Tensor, b: torch.Tensor, c: Any, alpha: float, beta: float) -> torch.Tensor:
    """Whole factors stay in integers; others go through float64."""
    product = _integer_product(a, b)
    wide = torch.int64 if float(alpha).is_integer() and float(beta).is_integer() else torch.float64
    number = int if wide is torch.int64 else float
    found = product.to(wide) * number(alpha)
    if c is not None:
        found = found + c.to(wide) * number(beta)
    return found.to(torch.int64).to(a.dtype)


@operator("Einsum", since=12)
def einsum(*inputs: torch.Tensor, equation: str) -> torch.Tensor:
    first = inputs[0]
    if first.is_floating_point() or first.is_complex():
        return torch.einsum(equation, *inputs)
    wide = torch.int64 if first.device.type == "cpu" else torch.float64  # as in _integer_product
    return torch.einsum(equation, *[one.to(wide) for one in inputs]).to(torch.int64).to(first.dtype)


@operator("Det", since=11)
def det(x: torch.Tensor) -> torch.Tensor:
    if x.dtype in (torch.float16, torch.bfloat16):
        return torch.linalg.det(x.float()).to(x.dtype)
    return torch.linalg.det(x)
