"""Operators of the interpreter that change the type of each element, or its bits.

Numbers of four and of two bits are held one to a byte, as torch has no such types; floats of four bits, and floats of
eight that are only exponents (float8e8m0), are not there.
"""

from __future__ import annotations

from typing import Any

import torch

from perwatt.errors import TargetError
from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import DTYPES, alike, all_host, as_tensor, is_host, mapped, narrow, wide

FLOAT, INT32, INT64, BOOL = 1, 6, 7, 9
NARROW = {21: (4, False), 22: (4, True), 25: (2, False), 26: (2, True)}
"""ONNX's numbers of integer types smaller than a byte: their bits, and whether one is a sign."""


@operator("Cast", since=6, host=True, numbers=(0,))
def cast(
    x: Any, *, to: int, saturate: int = 1, round_mode: str = "up", device: torch.device | None = None
) -> Any:  # fmt: skip
    """`round_mode` says how to get float8e8m0, which is not there."""
    if all_host(x):
        # int32 stays a plain number: where it meets a tensor, it takes that one's type (`alike`).
        if to in (INT32, INT64):
            return mapped(torch.sym_int, x)
        if to == FLOAT:
            return mapped(torch.sym_float, x)
        if to == BOOL:
            return mapped(bool, x)
    x = as_tensor(x, device=device)
    if to in NARROW:
        return _of_few_bits(x, *NARROW[to])
    return _converted(x, _type(to), saturate)


@operator("CastLike", since=15, host=True, numbers=(0,))
def cast_like(
    x: Any, target_type: Any, *, saturate: int = 1, round_mode: str = "up", implied_type: int | None = None,
    device: torch.device | None = None,
) -> Any:  # fmt: skip
    """`implied_type` is the target's where a tensor can't tell it: numbers of four bits are held in bytes."""
    if implied_type in NARROW:
        return cast(x, to=implied_type, device=device)
    if is_host(target_type):
        one = target_type[0] if isinstance(target_type, (tuple, list)) and target_type else target_type
        kind = BOOL if isinstance(one, bool) else FLOAT if isinstance(one, (float, torch.SymFloat)) else INT64
        return cast(x, to=kind, device=device)
    return _converted(as_tensor(x, target_type), target_type.dtype, saturate)


def _type(to: int) -> torch.dtype:
    if to not in DTYPES:
        raise TargetError(f"the interpreter has no tensors of ONNX's element type {to}")
    return DTYPES[to]


def _converted(x: torch.Tensor, dtype: torch.dtype, saturate: int) -> torch.Tensor:
    if not dtype.is_floating_point or dtype.itemsize > 1:
        return x.to(dtype)
    if saturate:
        # torch alone makes infinity or NaN of what is too large, for some of these types and in some versions.
        largest = torch.finfo(dtype).max
        return torch.clamp(x.to(torch.float32), -largest, largest).to(dtype)
    if dtype is torch.float8_e4m3fn:
        # 464 is half way to 480, which would be the next number: all beyond is none.
        wider = x.to(torch.float32)
        x = torch.where(torch.abs(wider) > 464.0, torch.nan, wider)
    return x.to(dtype)


def _of_few_bits(x: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    """The lowest bits, which torch keeps in a byte."""
    kept = wide(x).to(torch.int64) & (2**bits - 1)
    if not signed:
        return kept.to(torch.uint8)
    half = 2 ** (bits - 1)
    return ((kept ^ half) - half).to(torch.int8)


@operator("BitCast", since=26)
def bit_cast(x: Any, *, to: int) -> Any:
    return as_tensor(x).view(_type(to))


@operator("BitShift", since=11)
def bit_shift(x: Any, y: Any, *, direction: str) -> Any:
    """Shifts of negative length or beyond the type leave nothing but the sign (opset 28 says so; before, they were
    undefined)."""
    x, y = alike(x, y)
    bits, length = 8 * x.dtype.itemsize, wide(y).to(torch.int64)
    inside = (length >= 0) & (length < bits)
    length = torch.where(inside, length, 0)
    value = wide(x).to(torch.int64)
    if direction == "LEFT":
        return narrow(torch.where(inside, value << length, 0), x.dtype)
    found = value >> length
    if x.dtype is torch.uint64:
        # int64 shifts copies of its sign in: keep what was there.
        lowest = torch.where(length == 0, -1, (1 << (64 - length)) - 1)
        return narrow(torch.where(inside, found & lowest, 0), x.dtype)
    return narrow(torch.where(inside, found, torch.where(value < 0, -1, 0)), x.dtype)


@operator("BitwiseAnd", since=18)
def bitwise_and(a: Any, b: Any) -> Any:
    a, b = alike(a, b)
    return narrow(torch.bitwise_and(wide(a), wide(b)), a.dtype)


@operator("BitwiseOr", since=18)
def bitwise_or(a: Any, b: Any) -> Any:
    a, b = alike(a, b)
    return narrow(torch.bitwise_or(wide(a), wide(b)), a.dtype)


@operator("BitwiseXor", since=18)
def bitwise_xor(a: Any, b: Any) -> Any:
    a, b = alike(a, b)
    return narrow(torch.bitwise_xor(wide(a), wide(b)), a.dtype)


@operator("BitwiseNot", since=18)
def bitwise_not(x: Any) -> Any:
    x = as_tensor(x)
    return narrow(torch.bitwise_not(wide(x)), x.dtype)
