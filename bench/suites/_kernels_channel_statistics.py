"""Per-channel statistics beside NumPy's and torch's: four passes of theirs for one of ours.

Theirs is given two liberties: sums in float32, in whatever order is fastest, and no count of what isn't finite, because a
sum of squares that is finite says that all was. What they leave out is faster still; ours does it all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from _kernel_case import Case, Run

from perwatt.kernels import channel_statistics as kernel

SIZES: list[tuple[str, tuple[int, ...], int | None]] = [
    ("BERT-base hidden state, 8 × 128 tokens", (1024, 768), 1),
    ("BERT-base feed-forward, 32 × 128 tokens", (4096, 3072), 1),
    ("ResNet-50 stage 1, batch 8", (8, 256, 56, 56), 1),
    ("ResNet-50 stage 4, batch 8", (8, 2048, 7, 7), 1),
    ("MobileNetV2 first expansion, batch 8", (8, 96, 112, 112), 1),
    ("ResNet-50 3 × 3 weights", (512, 512, 3, 3), 0),
    ("BERT-base feed-forward weights", (3072, 768), 0),
    ("images, NHWC, batch 32", (32, 224, 224, 3), 3),
    ("ViT-B attention, batch 8, per tensor", (8, 12, 197, 197), None),
]


def cases() -> list[Case]:
    """One of each layout, and the sizes that calibration meets most."""
    return [_case(title, shape, axis) for title, shape, axis in SIZES]


def _case(title: str, shape: tuple[int, ...], axis: int | None) -> Case:
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    channels = 1 if axis is None else shape[axis]
    return Case(
        kernel="channel_statistics",
        title=f"statistics: {title}",
        ours=lambda: _figures(kernel.compute(values, axis)),
        others=_numpy(values, axis, channels) | _torch(values, axis, "cpu"),
        same=partial(_same, values.size // channels),
        moved_bytes=values.nbytes,
        cuda=lambda: _cuda(values, axis),
    )


def _figures(found: kernel.Statistics) -> tuple[np.ndarray, ...]:
    return found.minimum, found.maximum, found.total, found.squares


def _same(count: int, ours: object, other: object) -> None:
    """Near enough for either's use; torch's norm is up to 3 · 10⁻⁵ off, ours at most 5 · 10⁻⁶."""
    low, high, total, squares = ours  # type: ignore[misc]
    theirs = [np.asarray(part, np.float64).reshape(-1) for part in other]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(low, theirs[0])
    np.testing.assert_array_equal(high, theirs[1])
    bound = 1e-4
    np.testing.assert_allclose(squares, theirs[3], rtol=bound)
    # √(n Σ x²) is at least Σ |x|, and for values like these about as much.
    assert (np.abs(total - theirs[2]) <= bound * np.sqrt(count * squares)).all(), "sums differ"


def _long_columns(values: np.ndarray, axis: int | None) -> bool:
    """Whether one float32 accumulator, as einsum and torch's norm have where channels come last, is off by 10⁻³."""
    return axis == values.ndim - 1 and values.size // values.shape[-1] > 100_000


def _numpy(values: np.ndarray, axis: int | None, channels: int) -> dict[str, Run]:
    """Best per layout: BLAS where one axis is summed, einsum where several are."""
    rest = None if axis is None else tuple(i for i in range(values.ndim) if i != axis)
    low, high = (np.empty(channels if axis is not None else (), np.float32) for _ in range(2))
    kind = np.float64 if _long_columns(values, axis) else np.float32
    total = np.empty(low.shape, kind)
    letters = "abcd"[: values.ndim]
    rule = f"{letters},{letters}->{'' if axis is None else letters[axis]}"

    def with_einsum() -> tuple[np.ndarray, ...]:
        values.min(axis=rest, out=low), values.max(axis=rest, out=high), values.sum(axis=rest, out=total, dtype=kind)
        return low, high, total, np.einsum(rule, values, values, dtype=kind)

    found: dict[str, Run] = {f"NumPy min, max, sum, einsum in {kind.__name__}": with_einsum}
    if axis is None:
        flat, ones = values.reshape(-1), np.ones(values.size, np.float32)

        def with_dots() -> tuple[np.ndarray, ...]:
            return values.min(), values.max(), flat @ ones, flat @ flat

        found["NumPy min, max, BLAS dots"] = with_dots
    elif axis in (0, values.ndim - 1):
        matrix = values.reshape(channels, -1) if axis == 0 else values.reshape(-1, channels)
        ones = np.ones(matrix.shape[1 if axis == 0 else 0], np.float32)
        along = 1 if axis == 0 else 0
        pair = "ij,ij->i" if axis == 0 else "ij,ij->j"

        def with_product() -> tuple[np.ndarray, ...]:
            matrix.min(axis=along, out=low), matrix.max(axis=along, out=high)
            product = matrix @ ones if axis == 0 else ones @ matrix
            return low, high, product, np.einsum(pair, matrix, matrix, dtype=kind)

        found["NumPy min, max, BLAS product, einsum"] = with_product
    return found


def _torch(values: np.ndarray, axis: int | None, device: str) -> dict[str, Run]:
    import torch

    given = torch.from_numpy(values).to(device)
    rest = tuple(i for i in range(values.ndim) if i != axis)
    flat = given.reshape(-1)

    def settled(run: Callable[[], tuple[torch.Tensor, ...]]) -> Run:
        def call() -> tuple[np.ndarray, ...]:
            with torch.inference_mode():
                return tuple(part.cpu().numpy() for part in run())

        return call

    def single() -> tuple[torch.Tensor, ...]:
        low, high = torch.aminmax(flat)
        return low, high, flat.sum(), torch.dot(flat, flat)

    def narrow() -> tuple[torch.Tensor, ...]:
        norm = torch.linalg.vector_norm(given, dim=rest)
        return torch.amin(given, rest), torch.amax(given, rest), given.sum(rest), norm * norm

    def wide() -> tuple[torch.Tensor, ...]:
        variance, mean = torch.var_mean(given, rest, correction=0)
        count = given.numel() // mean.numel()
        return torch.amin(given, rest), torch.amax(given, rest), mean * count, (variance + mean * mean) * count

    if axis is None:
        return {"torch aminmax, sum, dot": settled(single)}
    found = {"torch amin, amax, var_mean": settled(wide)}
    if not _long_columns(values, axis):
        found["torch amin, amax, sum, norm"] = settled(narrow)
    return found


def _cuda(values: np.ndarray, axis: int | None) -> tuple[Run, dict[str, Run]]:
    from numba import cuda

    given = cuda.to_device(values)
    return lambda: _figures(kernel.compute_cuda(given, axis)), _torch(values, axis, "cuda")
