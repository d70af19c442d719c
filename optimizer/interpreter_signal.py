"""Operators of the interpreter: Fourier transforms, windows and mel filters.

In ONNX a complex tensor is one of floats whose last axis holds the real and the imaginary part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import DTYPES, one_int


@operator("DFT", since=17, host=(1,))
def dft_17(
    x: torch.Tensor, dft_length: Any = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0
) -> torch.Tensor:
    return dft(x, dft_length, axis, inverse=inverse, onesided=onesided)


@operator("DFT", since=20, host=(1, 2))
def dft(
    x: torch.Tensor, dft_length: Any = None, axis: Any = None, *, inverse: int = 0, onesided: int = 0
) -> torch.Tensor:
    # The axis counts the last one too, which a complex tensor of torch doesn't have.
    along = (-2 if axis is None else one_int(axis)) % x.ndim
    length = None if dft_length is None else one_int(dft_length)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if onesided and inverse:
        found = torch.fft.irfft(_complex(wide), length, along).unsqueeze(-1)
    elif onesided:
        found = torch.view_as_real(torch.fft.rfft(wide[..., 0], length, along))
    else:
        transform = torch.fft.ifft if inverse else torch.fft.fft
        found = torch.view_as_real(transform(_complex(wide), length, along))
    return found.to(x.dtype)


def _complex(x: torch.Tensor) -> torch.Tensor:
    real = x[..., 0]
    return torch.complex(real, x[..., 1] if x.shape[-1] == 2 else torch.zeros_like(real))


@operator("STFT", since=17, host=(1, 3))
def stft(
    signal: torch.Tensor, frame_step: Any, window: Any = None, frame_length: Any = None, *, onesided: int = 1
) -> torch.Tensor:
    length = (
        one_int(frame_length) if frame_length is not None else signal.shape[1] if window is None else window.shape[0]
    )
    signal = signal if signal.ndim == 3 else signal.unsqueeze(-1)
    wide = signal.float() if signal.dtype in (torch.float16, torch.bfloat16) else signal
    frames = wide.unfold(1, length, one_int(frame_step))
    if window is not None:
        frames = frames * window.to(wide.dtype)
    if wide.shape[-1] == 1:
        parts = torch.fft.rfft(frames[:, :, 0]) if onesided else torch.fft.fft(frames[:, :, 0])
    else:
        parts = torch.fft.fft(torch.complex(frames[:, :, 0], frames[:, :, 1]))
        parts = parts[..., : length // 2 + 1] if onesided else parts
    return torch.view_as_real(parts).to(signal.dtype)


@operator("HannWindow", since=17, host=(0,))
def hann_window(
    size: Any, *, output_datatype: int = 1, periodic: int = 1, device: torch.device | None = None
) -> torch.Tensor:  # fmt: skip
    return _window(size, (0.5, -0.5), periodic, output_datatype, device)


@operator("HammingWindow", since=17, host=(0,))
def hamming_window(
    size: Any, *, output_datatype: int = 1, periodic: int = 1, device: torch.device | None = None
) -> torch.Tensor:  # fmt: skip
    # 25/46, where torch and SciPy take 0.54.
    return _window(size, (25 / 46, -21 / 46), periodic, output_datatype, device)


@operator("BlackmanWindow", since=17, host=(0,))
def blackman_window(
    size: Any, *, output_datatype: int = 1, periodic: int = 1, device: torch.device | None = None
) -> torch.Tensor:  # fmt: skip
    return _window(size, (0.42, -0.5, 0.08), periodic, output_datatype, device)


def _window(
    size: Any, weights: Sequence[float], periodic: int, output_datatype: int, device: torch.device | None
) -> torch.Tensor:
    """A sum of cosines of one, two… periods."""
    device = size.device if isinstance(size, torch.Tensor) else device
    count = one_int(size)
    step = torch.arange(count, device=device, dtype=torch.float64) * (2 * math.pi)
    # A symmetric window of one element is one, where the formula divides by zero.
    angle = step / (count if periodic or count == 1 else count - 1)
    found = torch.zeros_like(angle)
    for times, weight in enumerate(weights):
        found = found + weight * torch.cos(times * angle)
    return found.to(DTYPES[output_datatype])


@operator("MelWeightMatrix", since=17, host=(0, 1, 2))
def mel_weight_matrix(
    num_mel_bins: Any, dft_length: Any, sample_rate: Any, lower_edge_hertz: Any, upper_edge_hertz: Any, *,
    output_datatype: int = 1, device: torch.device | None = None,
) -> torch.Tensor:  # fmt: skip
    """Triangles whose corners lie on whole bins of the spectrum."""
    bins, length = one_int(num_mel_bins), one_int(dft_length)
    low, high = (
        _mel(torch.as_tensor(edge, device=device).double().reshape(())) for edge in (lower_edge_hertz, upper_edge_hertz)
    )
    # By the specification the last corner lies a step below the upper edge.
    mels = torch.arange(bins + 2, device=low.device) * ((high - low) / (bins + 2)) + low
    hertz = 700 * torch.expm1(mels / 2595 * math.log(10))
    corners = torch.floor((length + 1) * hertz / one_int(sample_rate))
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    at = torch.arange(length // 2 + 1, device=low.device)[:, None].double()
    rising = ((at - left) / (centre - left).clamp(min=1)).clamp(min=0)
    falling = ((right - at) / (right - centre).clamp(min=1)).clamp(min=0)
    found = torch.where(at < centre, rising, torch.where(at > centre, falling, 1.0))
    return found.to(DTYPES[output_datatype])


def _mel(hertz: torch.Tensor) -> torch.Tensor:
    return 2595 * torch.log1p(hertz / 700) / math.log(10)
