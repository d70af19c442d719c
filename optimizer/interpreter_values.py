"""Values inside the interpreter: tensors, and host values, which are shapes and counts as plain Python.

A host value stands for an int64 tensor: an int or SymInt for one of no axes, a tuple of them for one of one axis (bools
and floats occur where shapes are compared or scaled). Operators compute with host values as long as all that they are
given are host values; where a tensor comes in, `as_tensor` makes tensors of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import has_static_value

HOST_AT_MOST = 64
"""A constant of more integers than this is data, not a shape."""
NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
HOST = (tuple, list, *NUMBERS)

DTYPES: dict[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 14: torch.complex64,
    15: torch.complex128, 16: torch.bfloat16, 17: torch.float8_e4m3fn, 18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2, 20: torch.float8_e5m2fnuz,
}  # fmt: skip
"""ONNX's numbers of element types."""

FEW_BITS = (21, 22, 25, 26)
"""Those of integers of four and two bits, for which torch has no type: their numbers are held in bytes."""


def is_host(value: Any) -> bool:
    """Whether `value` is plain Python: a number or a tuple of numbers."""
    return isinstance(value, HOST)


def all_host(*found: Any) -> bool:
    """Whether every value that is there is plain Python."""
    for value in found:  # Nearly always the answer, and what an eager run spends beside torch.
        if isinstance(value, torch.Tensor):
            return False
    return all(value is None or isinstance(value, HOST) for value in found)


def device_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is."""
    return tensor.device


def as_tensor(value: Any, like: torch.Tensor | None = None, device: torch.device | None = None) -> Any:
    """`value` as a tensor, int64 (bool, float32) where it is a host value; on the device of `like`, else on `device`."""
    if value is None or isinstance(value, torch.Tensor):
        return value
    device = like.device if like is not None else device
    items = list(value) if isinstance(value, (tuple, list)) else [value]
    dtype = torch.int64
    if items and isinstance(items[0], (bool, torch.SymBool)):
        dtype = torch.bool
    elif items and isinstance(items[0], (float, torch.SymFloat)):
        dtype = torch.float32
    return _row(items, dtype, device) if isinstance(value, (tuple, list)) else _number(value, dtype, device)


def _row(items: Sequence[Any], dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    if all(has_static_value(one) for one in items):
        return torch.tensor(items, dtype=dtype, device=device)
    # torch.tensor would read sizes that are still open.
    return torch.stack([_number(one, dtype, device) for one in items])


def _number(value: Any, dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    # Not torch.tensor: this one copies nothing from the host.
    return torch.full((), value, dtype=dtype, device=device)


def tensors(*found: Any) -> tuple[Any, ...]:
    """All of them as tensors on one device: that of the first which is one."""
    like = next((value for value in found if isinstance(value, torch.Tensor)), None)
    return tuple(as_tensor(value, like) for value in found)


def alike(*found: Any) -> tuple[Any, ...]:
    """Values of one ONNX type as tensors of one type on one device: those of the first that is a tensor, as a host value
    does not know whether it was int32, int64 or half a float. All host: as `tensors`."""
    like, mixed = None, False
    for value in found:
        if not isinstance(value, torch.Tensor):
            mixed = True
        elif like is None:
            like = value
    if not mixed:
        return found
    if like is None:
        return tensors(*found)
    return tuple(_typed(value, like) if is_host(value) else value for value in found)


def _typed(value: Any, like: torch.Tensor) -> torch.Tensor:
    make = _row if isinstance(value, (tuple, list)) else _number
    return make(value, like.dtype, like.device)


def mapped(function: Callable[..., Any], *found: Any) -> Any:
    """`function` of host values, element by element; numbers and tuples of one broadcast."""
    sizes = {len(value) for value in found if isinstance(value, (tuple, list))}
    if not sizes:
        return function(*found)
    if len(sizes - {1}) > 1:
        raise ValueError(f"shapes of {sorted(sizes)} elements don't broadcast")
    size = next(iter(sizes - {1}), 1)
    spread = [tuple(value) if isinstance(value, (tuple, list)) else (value,) for value in found]
    return tuple(function(*(one[index if len(one) > 1 else 0] for one in spread)) for index in range(size))


UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""Types for which torch has little arithmetic; uint8 has all of it."""


def wide(x: torch.Tensor) -> torch.Tensor:
    """An unsigned tensor as int64: uint64 bit by bit, the others number by number. Every other tensor as it is."""
    if x.dtype is torch.uint64:
        return x.view(torch.int64)
    return x.to(torch.int64) if x.dtype in UNSIGNED else x


def ordered(x: torch.Tensor) -> torch.Tensor:
    """Like `wide`, but for comparisons: in the same order (uint64 minus 2**63)."""
    return wide(x) ^ torch.iinfo(torch.int64).min if x.dtype is torch.uint64 else wide(x)


def narrow(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Back from `wide`; higher bits are dropped."""
    return x.view(dtype) if dtype is torch.uint64 and x.dtype is torch.int64 else x.to(dtype)


def unordered(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Back from `ordered`."""
    return narrow(x ^ torch.iinfo(torch.int64).min if dtype is torch.uint64 else x, dtype)


def ints(value: Any) -> tuple[Any, ...]:
    """The numbers of a shape-like value, whether host or tensor (reading a tensor ends a compiled graph)."""
    if isinstance(value, torch.Tensor):
        return tuple(int(item) for item in value.reshape(-1).tolist())
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def one_int(value: Any) -> Any:
    """A single count, whether host or tensor."""
    return ints(value)[0]


def plain(value: Any) -> Any:
    """An attribute's value as plain Python: sequences as tuples, bytes as text."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value
    return tuple(plain(item) for item in value)


def array_of(tensor: Any) -> Any:
    """A NumPy array of whatever holds a constant: an onnx_ir tensor, an attribute of numbers, a sequence."""
    if hasattr(tensor, "numpy"):
        return tensor.numpy()
    held = getattr(tensor, "value", tensor)
    kind = str(tensor.type.name) if hasattr(tensor, "type") else ""
    dtype = np.float32 if kind.startswith("FLOAT") else np.int64 if kind.startswith("INT") else None
    return np.array(held, dtype=dtype)


def host_of(array: torch.Tensor) -> Any:
    """A constant as a host value; None where it is none: not int64 or bool, of more than one axis, or long."""
    if array.dtype not in (torch.int64, torch.bool) or array.ndim > 1 or array.numel() > HOST_AT_MOST:
        return None
    return tuple(array.tolist()) if array.ndim else array.item()


def numbers_of(array: torch.Tensor) -> Any:
    """A constant as plain numbers for whoever only reads them, whatever its type; None where it is long or has several
    axes, or is float64, whose digits would be lost should it become a tensor again."""
    if array.dtype in (torch.float64, torch.complex64, torch.complex128):
        return None
    if array.ndim > 1 or array.numel() > HOST_AT_MOST:
        return None
    return tuple(array.tolist()) if array.ndim else array.item()


def from_numpy(array: Any, device: torch.device) -> torch.Tensor:
    """NumPy to torch, ml_dtypes included; the tensor owns its memory."""
    found = np.asarray(array)
    name = found.dtype.name
    if name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"):
        bits = torch.from_numpy(found.view(np.uint16 if name == "bfloat16" else np.uint8).copy())
        return bits.view(getattr(torch, name)).to(device)
    if name in ("int4", "uint4", "int2", "uint2"):
        # torch has no such type: one byte an element, which holds the same numbers.
        found = found.astype(np.int8 if name.startswith("int") else np.uint8)
    return torch.from_numpy(np.array(found, order="C", copy=True)).to(device)


def to_numpy(value: torch.Tensor) -> Any:
    """Torch to NumPy, ml_dtypes included."""
    value = value.detach().cpu()
    if value.dtype is torch.bfloat16:
        import ml_dtypes

        return value.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    if value.dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz):
        import ml_dtypes

        return (
            value.contiguous()
            .view(torch.uint8)
            .numpy()
            .view(getattr(ml_dtypes, str(value.dtype).removeprefix("torch.")))
        )
    return value.numpy()
