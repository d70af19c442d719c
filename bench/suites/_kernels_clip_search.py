"""Where to clip before quantizing: as many histograms as BERT-base's activations, one of its layers' channels or ResNet-50's
ReLUs make, of values drawn with normal to heavy tails.

A grid search in torch rounds bins' centres to each candidate's levels, in place and in float32, in blocks that fit the cache;
ours takes the same candidates. PyTorch's HistogramObserver and ONNX Runtime's entropy calibration are called as they are: they
search by other rules, so what is compared is that their ranges aren't better by more than rounding, nor absurd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from _kernel_case import Case

from perwatt.kernels import clip_search

BLOCK = 1 << 18
"""Elements that torch's grid search holds at once: 1 MB."""


def histograms(rows: int, bins: int, symmetric: bool, positive: bool = False, values: int = 50_000) -> Any:
    """Counts and edges of normal to heavy-tailed values, one tensor or channel in four with an outlier."""
    rng = np.random.default_rng(0)
    counts, low, high = np.zeros((rows, bins), np.int64), np.zeros(rows), np.zeros(rows)
    for row in range(rows):
        drawn = rng.standard_t(3 + row % 20, values) * rng.uniform(0.1, 10)
        if row % 4 == 0:
            drawn[0] = 20 * drawn.std()
        drawn = np.maximum(drawn, 0) if positive else drawn
        low[row], high[row] = drawn.min(), drawn.max()
        if symmetric:
            high[row] = max(-low[row], high[row])
            low[row] = -high[row]
        counts[row] = np.histogram(drawn, bins, (low[row], high[row]))[0]
    return counts, low, high


def cost(counts: Any, low: Any, high: Any, found: Any, levels: int) -> Any:
    """Mean squared error of rounding each bin's centre and both its thirds' ends to the range's levels."""
    lows, highs = np.asarray(found[0])[:, None], np.asarray(found[1])[:, None]
    step = (highs - lows) / (levels - 1)
    below = np.round(-lows / step)
    total = 0.0
    for place in (1 / 6, 1 / 2, 5 / 6):
        x = low[:, None] + (np.arange(counts.shape[1]) + place) * ((high - low) / counts.shape[1])[:, None]
        code = np.clip(np.round(x / step), -below, levels - 1 - below)
        total = total + (counts * (x - code * step) ** 2).sum(axis=1)
    return total / (3 * counts.sum(axis=1))


def torch_grid(counts: Any, low: Any, high: Any, levels: int, device: str = "cpu") -> Callable[[], Any]:
    """The symmetric search over the same candidates: every bin's centre is rounded for every one of them."""
    import torch

    rows, bins = counts.shape
    below = levels // 2
    whole = np.maximum(-low / below, high / (levels - 1 - below))
    fractions = np.array(clip_search.CANDIDATES)
    centres = low[:, None] + (np.arange(bins) + 0.5) * ((high - low) / bins)[:, None]
    x, weight, steps = (
        torch.tensor(it, dtype=torch.float32, device=device) for it in (centres, counts, whole[:, None] * fractions)
    )
    inverse = 1 / steps
    at_once = max(1, (BLOCK if device == "cpu" else BLOCK << 8) // (bins * len(fractions)))
    buffer = torch.empty((at_once, len(fractions), bins), device=device)

    def run() -> Any:
        with torch.inference_mode():
            errors = torch.empty(steps.shape, device=device)
            for first in range(0, rows, at_once):
                part = slice(first, min(first + at_once, rows))
                room = buffer[: part.stop - first]
                torch.mul(x[part, None], inverse[part, :, None], out=room)
                room.round_().clamp_(-below, levels - 1 - below).mul_(steps[part, :, None]).sub_(
                    x[part, None]
                ).square_()
                torch.bmm(room, weight[part, :, None], out=errors[part, :, None])
            best = steps.gather(1, errors.argmin(dim=1, keepdim=True))[:, 0].cpu().numpy().astype(float)
            return -below * best, (levels - 1 - below) * best

    return run


def observers(counts: Any, low: Any, high: Any, symmetric: bool) -> Callable[[], Any]:
    """PyTorch's own search, one observer a tensor; its errors are for 256 levels."""
    import torch

    made = []
    for row in range(len(counts)):
        scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
        observer = torch.ao.quantization.HistogramObserver(bins=counts.shape[1], qscheme=scheme)
        observer.histogram = torch.tensor(counts[row], dtype=torch.float32)
        observer.min_val, observer.max_val = (torch.tensor(float(it[row])) for it in (low, high))
        made.append(observer)

    def run() -> Any:
        with torch.inference_mode():
            found = [observer._non_linear_param_search() for observer in made]
        lows, highs = np.array([[float(end) for end in pair] for pair in found]).T
        if not symmetric:
            return lows, highs
        # As it makes a scale of them: the farther end, over half the levels.
        return -128 / 127.5 * np.maximum(-lows, highs), 127 / 127.5 * np.maximum(-lows, highs)

    return run


def torch_ends(counts: Any, low: Any, high: Any, levels: int, tried: int = 24) -> Callable[[], Any]:
    """The asymmetric search as a grid of both ends, `tried` of each, zero rounded to a level."""
    import torch

    fractions = torch.arange(1, tried + 1) / tried
    bins = counts.shape[1]
    centres = torch.tensor(low[:, None] + (np.arange(bins) + 0.5) * ((high - low) / bins)[:, None]).float()
    weight = torch.tensor(counts).float()
    at_once = max(1, BLOCK // bins)
    buffer = torch.empty((at_once, bins))

    def run() -> Any:
        found = []
        with torch.inference_mode():
            for row in range(len(counts)):
                lows, highs = torch.cartesian_prod(float(low[row]) * fractions, float(high[row]) * fractions).T
                step = (highs - lows) / (levels - 1)
                below = (-lows / step).round()
                errors = torch.empty(len(step))
                for first in range(0, len(step), at_once):
                    part = slice(first, min(first + at_once, len(step)))
                    room, its, z = buffer[: part.stop - first], step[part, None], below[part, None]
                    torch.mul(centres[row], 1 / its, out=room)
                    room.round_().clamp_(-z, levels - 1 - z).mul_(its).sub_(centres[row]).square_()
                    torch.mv(room, weight[row], out=errors[part])
                best = errors.argmin()
                found.append((float(-below[best] * step[best]), float((levels - 1 - below[best]) * step[best])))
        return np.array(found).T

    return run


def onnxruntime_entropy(counts: Any, low: Any, high: Any) -> Callable[[], Any]:
    """ONNX Runtime's own, with as many parts on both sides of zero as it has by default."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector("entropy", True, counts.shape[1], 128, 99.999, "same")
    bins = counts.shape[1]
    edges = [np.linspace(*pair, bins + 1) for pair in zip(low, high, strict=True)]
    given = [(row, edge, edge[0], edge[-1]) for row, edge in zip(counts, edges, strict=True)]
    return lambda: np.array([collector.get_entropy_threshold(it, 128) for it in given]).T


def numpy_entropy(counts: Any, low: Any, levels: int, high: Any, symmetric: bool) -> Callable[[], Any]:
    """Migacz's search as vectors of NumPy and SciPy, a candidate at a time, with our rules for what is merged and missing."""
    from scipy.special import rel_entr

    bins = counts.shape[1]
    width = (high - low) / bins
    parts = -(-levels // 2) if symmetric else levels
    folded = counts[:, bins // 2 :] + counts[:, : bins // 2][:, ::-1] if symmetric else counts
    size = folded.shape[1]

    def run() -> Any:
        found = []
        for row in folded:
            within = np.cumsum(row)
            divergence = np.full(size + 1, np.inf)
            for i in range(parts, size + 1):
                p = row[:i].astype(float)
                p[-1] += within[-1] - within[i - 1]
                starts = -(-np.arange(parts) * i // parts)
                filled = p != 0
                mean = np.add.reduceat(row[:i], starts) / np.maximum(np.add.reduceat(filled, starts, dtype=np.int64), 1)
                q = np.repeat(mean, np.diff(starts, append=i))
                q[q == 0] = clip_search.MISSING
                q *= filled
                divergence[i] = rel_entr(p / within[-1], q / within[i - 1]).sum()
            found.append(divergence.argmin())
        high = np.array(found) * width
        return (-high if symmetric else 0 * high), high

    return run


def torch_entropy(counts: Any, low: Any, high: Any, levels: int, symmetric: bool, device: str) -> Callable[[], Any]:
    """The same by prefix sums in torch, all candidates of a row at once."""
    import torch

    bins = counts.shape[1]
    width = (high - low) / bins
    parts = -(-levels // 2) if symmetric else levels
    given = torch.tensor(counts, device=device)
    size = bins // 2 if symmetric else bins
    trials = torch.arange(parts, size + 1, device=device)
    edges = (torch.arange(parts + 1, device=device) * trials[:, None] + parts - 1).div(parts, rounding_mode="floor")

    def run() -> Any:
        found = []
        with torch.inference_mode():
            folded = given[:, bins // 2 :] + given[:, : bins // 2].flip(1) if symmetric else given
            for row in folded:
                values, filled = (torch.nn.functional.pad(it.cumsum(0), (1, 0)) for it in (row, row > 0))
                logs = torch.nn.functional.pad(torch.xlogy(row.double(), row.double()).cumsum(0), (1, 0))
                mass, occupied = values[edges].diff(dim=1).double(), filled[edges].diff(dim=1).double()
                within, total = values[trials].double(), values[-1].double()
                beyond = total - within
                occupied[:, -1] += (beyond > 0) & (row[trials - 1] == 0)
                mean = torch.where(mass > 0, mass / occupied, clip_search.MISSING)
                mass[:, -1] += beyond
                last = row[trials - 1] + beyond
                own = logs[trials - 1] + torch.xlogy(last, last)
                divergence = (own - mass.mul_(mean.log_()).sum(1)) / total + within.log() - total.log()
                found.append(divergence.argmin())
            return torch.stack(found).cpu().numpy()

    def ranges() -> Any:
        high = (run() + parts) * width
        return (-high if symmetric else 0 * high), high

    return ranges


def error_case(title: str, rows: Any, levels: int, symmetric: bool, others: dict[str, Any], on_gpu: bool) -> Case:
    def same(mine: Any, other: Any) -> None:
        ours, theirs = (cost(*rows, found, levels) for found in (mine, other))
        assert (theirs >= 0.98 * ours).all(), (theirs / ours).min()
        assert np.median(theirs / ours) < 2, np.median(theirs / ours)

    def cuda() -> Any:
        import torch

        counts = torch.tensor(rows[0], device="cuda")
        return lambda: clip_search.compute_mse_cuda(counts, *rows[1:], levels, symmetric), {
            "torch, grid of the same candidates": torch_grid(*rows, levels, "cuda")
        }

    ours = lambda: clip_search.compute_mse(*rows, levels, symmetric)  # noqa: E731
    return Case("clip_search", title, ours, others, same, cuda=cuda if on_gpu else None)


def entropy_case(title: str, rows: Any, levels: int, symmetric: bool, others: dict[str, Any]) -> Case:
    counts, low, high = rows

    def same(mine: Any, other: Any) -> None:
        # ONNX Runtime cuts its parts otherwise: more of them below 256 bins, and a rest at the end.
        np.testing.assert_allclose(np.asarray(other[1], float), mine.high, rtol=0.6)

    def cuda() -> Any:
        import torch

        device = torch.tensor(counts, device="cuda")
        return lambda: clip_search.compute_entropy_cuda(device, low, high, levels, symmetric), {
            "torch, prefix sums": torch_entropy(counts, low, high, levels, symmetric, "cuda")
        }

    ours = lambda: clip_search.compute_entropy(*rows, levels, symmetric)  # noqa: E731
    others |= {
        "NumPy and SciPy, a candidate at a time": numpy_entropy(counts, low, levels, high, symmetric),
        "torch, prefix sums": torch_entropy(counts, low, high, levels, symmetric, "cpu"),
    }
    return Case("clip_search", title, ours, others, same, cuda=cuda)


def cases() -> list[Case]:
    """73 matrix products of BERT-base; one of its layers of 768 channels; 16 of ResNet-50's ReLUs."""
    activations = histograms(73, 2048, symmetric=True)
    ranged = histograms(12, 2048, symmetric=False)
    channels = histograms(768, 512, symmetric=True, values=3072)
    symmetric, positive = histograms(4, 2048, symmetric=True), histograms(16, 2048, symmetric=False, positive=True)
    grid = "torch, grid of the same candidates"
    return [
        error_case(
            "clip by error, symmetric, 256 levels, 73 tensors of BERT-base",
            activations,
            256,
            True,
            {grid: torch_grid(*activations, 256), "torch.ao HistogramObserver": observers(*activations, True)},
            True,
        ),
        error_case(
            "clip by error, symmetric, 16 levels, 768 channels of BERT-base",
            channels,
            16,
            True,
            {grid: torch_grid(*channels, 16)},
            True,
        ),
        error_case(
            "clip by error, asymmetric, 256 levels, 12 tensors",
            ranged,
            256,
            False,
            {
                "torch, grid of 24 × 24 ends": torch_ends(*ranged, 256),
                "torch.ao HistogramObserver": observers(*ranged, False),
            },
            False,
        ),
        entropy_case(
            "clip by entropy, symmetric, 255 levels, 4 tensors",
            symmetric,
            255,
            True,
            {"ONNX Runtime get_entropy_threshold": onnxruntime_entropy(*symmetric)},
        ),
        entropy_case("clip by entropy, from zero, 256 levels, 16 ReLUs of ResNet-50", positive, 256, False, {}),
    ]
