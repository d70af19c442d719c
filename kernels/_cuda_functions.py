"""What kernels for GPUs call in place of `min` and `max`, which Numba 0.66 to 0.68 compile for CPUs only (issue 10753 there)."""

from __future__ import annotations

from typing import Any

from numba import cuda


@cuda.jit(device=True)  # type: ignore[untyped-decorator]
def smaller(a: Any, b: Any) -> Any:
    """`min` of two numbers."""
    return a if a < b else b


@cuda.jit(device=True)  # type: ignore[untyped-decorator]
def larger(a: Any, b: Any) -> Any:
    """`max` of two numbers."""
    return a if a > b else b
