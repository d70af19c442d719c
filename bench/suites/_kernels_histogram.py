"""Growing histograms beside those of NumPy, torch, torch.ao's observer and ONNX Runtime's calibrator.

All start from a histogram that has seen a batch of the same size and range. torch.histc and NumPy are given the range, which
they would have to look for in a pass of its own; the observer and the calibrator find it, as ours does. Only totals and both
ends can be compared, because each cuts its bins elsewhere: ours at powers of two.
"""

from __future__ import annotations

import numpy as np
from _kernel_case import Case, Run

from perwatt.kernels import histogram as kernel

BINS = 2048

SIZES: list[tuple[str, tuple[int, ...], int | None, bool]] = [
    ("BERT-base feed-forward, 8 × 128 tokens", (1024, 3072), None, False),
    ("ResNet-50 stage 1 after ReLU, batch 8", (8, 256, 56, 56), None, True),
    ("BERT-base hidden state per channel, 32 × 128 tokens", (4096, 768), 1, False),
    ("ResNet-50 stage 1 after ReLU per channel, batch 8", (8, 256, 56, 56), 1, True),
    ("ResNet-50 3 × 3 weights per channel", (512, 512, 3, 3), 0, False),
]


def cases() -> list[Case]:
    """Per tensor, as calibration does it, and per channel in each layout."""
    return [_case(*size) for size in SIZES]


def _case(title: str, shape: tuple[int, ...], axis: int | None, relu: bool) -> Case:
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    if relu:
        values = np.maximum(values, 0)
    channels = 1 if axis is None else shape[axis]
    histogram = kernel.compute(kernel.empty(BINS, channels), values, axis)

    def ours() -> np.ndarray:
        return kernel.compute(histogram, values, axis).counts

    rows = np.ascontiguousarray(
        values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(channels, -1)
    )
    others = _given_the_range(rows, float(histogram.limits.max()))
    if axis is None:
        others |= _observers(values)
    added = values.size // channels
    return Case(
        kernel="histogram",
        title=f"histogram: {title}",
        ours=ours,
        others=others,
        same=lambda mine, theirs: _same(channels, added, mine, theirs),
        cuda=lambda: _cuda(values, axis),
    )


def _same(channels: int, added: int, ours: object, theirs: object) -> None:
    """Each counts every value: as many as the batch has, once more for each batch before."""
    for counts in (np.asarray(ours), np.asarray(theirs)):
        totals = counts.reshape(channels, -1).sum(axis=1)
        assert (totals > 0).all() and (totals % added == 0).all(), "values are missing"


def _given_the_range(rows: np.ndarray, limit: float) -> dict[str, Run]:
    import torch

    given = torch.from_numpy(rows)
    kept_numpy, kept_torch = np.zeros((len(rows), BINS), np.int64), torch.zeros((len(rows), BINS))

    def with_numpy() -> np.ndarray:
        for channel, row in enumerate(rows):
            kept_numpy[channel] += np.histogram(row, BINS, (-limit, limit))[0]
        return kept_numpy

    def with_torch() -> np.ndarray:
        with torch.inference_mode():
            kept_torch.zero_()  # float32 counts are exact for 16 million values only
            for channel, row in enumerate(given):
                kept_torch[channel] += torch.histc(row, BINS, -limit, limit)
        return kept_torch.to(torch.int64).numpy()

    return {"np.histogram": with_numpy, "torch.histc": with_torch}


def _observers(values: np.ndarray) -> dict[str, Run]:
    import torch
    from onnxruntime.quantization.calibrate import HistogramCollector
    from torch.ao.quantization.observer import HistogramObserver

    collector = HistogramCollector("entropy", True, BINS, 128, 99.99, "same")
    collector.collect_value({"x": values})

    def calibrator() -> np.ndarray:
        collector.collect_value({"x": values})
        return np.asarray(collector.histogram_dict["x"][0])

    given = torch.from_numpy(values)

    def observer() -> np.ndarray:
        with torch.inference_mode():
            fresh = HistogramObserver(bins=BINS)
            fresh(given)
        return fresh.histogram.to(torch.int64).numpy()

    return {"ONNX Runtime HistogramCollector": calibrator, "torch.ao HistogramObserver": observer}


def _cuda(values: np.ndarray, axis: int | None) -> tuple[Run, dict[str, Run]]:
    import torch
    from numba import cuda

    channels = 1 if axis is None else values.shape[axis]
    given = cuda.to_device(values)
    histogram = kernel.compute_cuda(kernel.empty(BINS, channels), given, axis)
    limit = float(histogram.limits.max())
    rows = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(channels, -1)
    theirs = torch.from_numpy(np.ascontiguousarray(rows)).cuda()

    def with_torch() -> np.ndarray:
        with torch.inference_mode():
            found = torch.stack([torch.histc(row, BINS, -limit, limit) for row in theirs])
        return found.to(torch.int64).cpu().numpy()

    return lambda: kernel.compute_cuda(histogram, given, axis).counts, {"torch.histc": with_torch}
