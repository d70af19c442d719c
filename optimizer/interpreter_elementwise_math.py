"""Operators of the interpreter that work on each element of one tensor: mathematical functions and activations."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import UNSIGNED, as_tensor, narrow, wide


@operator("Exp", since=6)
def exp(x: Any) -> Any:
    return torch.exp(as_tensor(x))


@operator("Log", since=6)
def log(x: Any) -> Any:
    return torch.log(as_tensor(x))


@operator("Sin", since=7)
def sin(x: Any) -> Any:
    return torch.sin(as_tensor(x))


@operator("Cos", since=7)
def cos(x: Any) -> Any:
    return torch.cos(as_tensor(x))


@operator("Tan", since=7)
def tan(x: Any) -> Any:
    return torch.tan(as_tensor(x))


@operator("Asin", since=7)
def asin(x: Any) -> Any:
    return torch.asin(as_tensor(x))


@operator("Acos", since=7)
def acos(x: Any) -> Any:
    return torch.acos(as_tensor(x))


@operator("Atan", since=7)
def atan(x: Any) -> Any:
    return torch.atan(as_tensor(x))


@operator("Sinh", since=9)
def sinh(x: Any) -> Any:
    return torch.sinh(as_tensor(x))


@operator("Cosh", since=9)
def cosh(x: Any) -> Any:
    return torch.cosh(as_tensor(x))


@operator("Tanh", since=6)
def tanh(x: Any) -> Any:
    return torch.tanh(as_tensor(x))


@operator("Asinh", since=9)
def asinh(x: Any) -> Any:
    return torch.asinh(as_tensor(x))


@operator("Acosh", since=9)
def acosh(x: Any) -> Any:
    return torch.acosh(as_tensor(x))


@operator("Atanh", since=9)
def atanh(x: Any) -> Any:
    return torch.atanh(as_tensor(x))


@operator("Erf", since=9)
def erf(x: Any) -> Any:
    x = as_tensor(x)
    return torch.erf(x) if x.is_floating_point() else narrow(torch.erf(wide(x).to(torch.float64)), x.dtype)


@operator("Sigmoid", since=6)
def sigmoid(x: Any) -> Any:
    return torch.sigmoid(as_tensor(x))


@operator("HardSigmoid", since=6)
def hard_sigmoid(x: Any, *, alpha: float = 0.2, beta: float = 0.5) -> Any:
    return torch.clamp(alpha * as_tensor(x) + beta, 0.0, 1.0)


@operator("Relu", since=6)
def relu(x: Any) -> Any:
    return torch.relu(as_tensor(x))


@operator("LeakyRelu", since=6)
def leaky_relu(x: Any, *, alpha: float = 0.01) -> Any:
    return functional.leaky_relu(as_tensor(x), alpha)


@operator("PRelu", since=7)
def parametric_relu(x: Any, slope: Any) -> Any:
    # Not functional.prelu: the slope broadcasts like NumPy's, so its channels may be any axis.
    return x if x.dtype in UNSIGNED else torch.where(x < 0, slope * x, x)


@operator("Elu", since=6)
def elu(x: Any, *, alpha: float = 1.0) -> Any:
    return functional.elu(as_tensor(x), alpha)


@operator("Selu", since=6)
def selu(x: Any, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Any:
    # Not functional.selu, whose constants are fixed.
    return gamma * functional.elu(as_tensor(x), alpha)


@operator("Celu", since=12)
def celu(x: Any, *, alpha: float = 1.0) -> Any:
    return functional.celu(as_tensor(x), alpha)


@operator("ThresholdedRelu", since=10)
def thresholded_relu(x: Any, *, alpha: float = 1.0) -> Any:
    return functional.threshold(as_tensor(x), alpha, 0.0)


@operator("Softplus", since=1)
def softplus(x: Any) -> Any:
    # Beyond torch's own threshold of 20, log(1 + exp(x)) is not yet x in double precision.
    return functional.softplus(as_tensor(x), threshold=40.0)


@operator("Softsign", since=1)
def softsign(x: Any) -> Any:
    return functional.softsign(as_tensor(x))


@operator("Gelu", since=20)
def gelu(x: Any, *, approximate: str = "none") -> Any:
    return functional.gelu(as_tensor(x), approximate=approximate)


@operator("Swish", since=24)
def swish(x: Any, *, alpha: float = 1.0) -> Any:
    x = as_tensor(x)
    return functional.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("SwiGLU", since=28)
def swish_gated(a: Any, b: Any, *, alpha: float = 1.0) -> Any:
    return swish(a, alpha=alpha) * b


@operator("Mish", since=18)
def mish(x: Any) -> Any:
    return functional.mish(as_tensor(x))


@operator("HardSwish", since=14)
def hard_swish(x: Any) -> Any:
    return functional.hardswish(as_tensor(x))


@operator("Shrink", since=9)
def shrink(x: Any, *, bias: float = 0.0, lambd: float = 0.5) -> Any:
    x = as_tensor(x)
    value = wide(x)
    found = torch.where(value < -lambd, value + bias, torch.where(value > lambd, value - bias, 0))
    return narrow(found, x.dtype)


@operator("IsNaN", since=9)
def is_nan(x: Any) -> Any:
    return torch.isnan(_comparable(x))


@operator("IsInf", since=10)
def is_inf(x: Any, *, detect_negative: int = 1, detect_positive: int = 1) -> Any:
    x = _comparable(x)
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if not detect_negative and not detect_positive:
        return torch.zeros_like(x, dtype=torch.bool)
    return torch.isneginf(x) if detect_negative else torch.isposinf(x)


def _comparable(x: Any) -> torch.Tensor:
    """torch compares no floats of eight bits."""
    found: torch.Tensor = as_tensor(x)
    return found.to(torch.float32) if found.is_floating_point() and found.dtype.itemsize == 1 else found
