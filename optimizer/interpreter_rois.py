"""Operators of the interpreter: regions of interest: pooling them, and choosing among boxes that overlap.

Limits: how many boxes NonMaxSuppression keeps depends on the data, which ends a compiled graph. Where RoiAlign's
sampling_ratio is 0, the count of samples depends on the data, too. It is right for regions up to twice as large as the
image; of larger ones as many samples are taken as for those."""

from __future__ import annotations

from typing import Any

import torch

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import one_int


@operator("RoiAlign", since=10)
def roi_align_10(
    x: torch.Tensor, rois: torch.Tensor, batch_indices: torch.Tensor, *, mode: str = "avg", output_height: int = 1,
    output_width: int = 1, sampling_ratio: int = 0, spatial_scale: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    return roi_align(
        x, rois, batch_indices, coordinate_transformation_mode="output_half_pixel", mode=mode,
        output_height=output_height, output_width=output_width, sampling_ratio=sampling_ratio,
        spatial_scale=spatial_scale,
    )  # fmt: skip


@operator("RoiAlign", since=16)
def roi_align(
    x: torch.Tensor, rois: torch.Tensor, batch_indices: torch.Tensor, *,
    coordinate_transformation_mode: str = "half_pixel", mode: str = "avg", output_height: int = 1,
    output_width: int = 1, sampling_ratio: int = 0, spatial_scale: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    wide = x if x.dtype is torch.float64 else x.float()
    half = coordinate_transformation_mode.lower() == "half_pixel"
    corners = rois.to(wide.dtype) * spatial_scale - (0.5 if half else 0.0)
    batch = batch_indices.to(torch.int64)
    rows = _samples(corners[:, 1], corners[:, 3], output_height, x.shape[2], sampling_ratio, half)
    columns = _samples(corners[:, 0], corners[:, 2], output_width, x.shape[3], sampling_ratio, half)
    run = _maxima if mode.lower() == "max" else _averages
    return run(wide, batch, rows, columns).to(x.dtype)


def _samples(
    start: torch.Tensor, end: torch.Tensor, bins: int, size: Any, sampling_ratio: int, half: bool
) -> tuple[Any, ...]:
    """Of one axis, each in the shape (regions, bins, samples): the two neighbours of every sample, their weights,
    whether the sample counts, and how many there are of a bin."""
    length = end - start if half else (end - start).clamp(min=1)
    width = (length / bins)[:, None, None]
    most = sampling_ratio if sampling_ratio > 0 else -(-2 * size // bins)
    count = torch.ceil(width).clamp(0, most) if sampling_ratio == 0 else torch.full_like(width, sampling_ratio)
    sample = torch.arange(most, device=start.device, dtype=start.dtype)
    place = torch.arange(bins, device=start.device, dtype=start.dtype)[:, None]
    at = start[:, None, None] + place * width + (sample + 0.5) * width / count.clamp(min=1)
    counts = (sample < count) & (at >= -1) & (at <= size)
    at = at.clamp(0, size - 1)
    low = at.floor()
    above = at - low
    low = low.to(torch.int64)
    return low, (low + 1).clamp(max=size - 1), 1 - above, above, counts, count


def _averages(x: torch.Tensor, batch: torch.Tensor, rows: tuple[Any, ...], columns: tuple[Any, ...]) -> torch.Tensor:
    """Sampling and averaging are linear along each axis: two matrices for each region. The rows of all images stand in
    one axis, so no region needs a copy of its image."""
    images, channels, height, width = x.shape
    by_row = _matrix(rows, images * height, batch[:, None, None] * height)
    by_column = _matrix(columns, width, 0)
    regions, bins = by_row.shape[:2]
    flat = x.permute(0, 2, 1, 3).reshape(images * height, channels * width)
    found = (by_row.reshape(regions * bins, -1) @ flat).reshape(regions, bins * channels, width)
    found = (found @ by_column.transpose(1, 2)).reshape(regions, bins, channels, by_column.shape[1])
    samples = (rows[5] * columns[5]).clamp(min=1)
    return found.transpose(1, 2) / samples[..., None]


def _matrix(samples: tuple[Any, ...], size: Any, first: Any) -> torch.Tensor:
    """The sum of a bin's samples as a matrix: (regions, bins, size)."""
    low, high, below, above, counts, _ = samples
    found = torch.zeros((*low.shape[:2], size), dtype=below.dtype, device=below.device)
    found = found.scatter_add(2, low + first, below * counts)
    return found.scatter_add(2, high + first, above * counts)


def _maxima(x: torch.Tensor, batch: torch.Tensor, rows: tuple[Any, ...], columns: tuple[Any, ...]) -> torch.Tensor:
    """By ONNX's reference and ONNX Runtime: the largest of the weighted neighbours, not of their sums."""
    images, channels, height, width = x.shape
    flat = x.permute(0, 2, 3, 1).reshape(images * height * width, channels)

    def grid(row: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return row[:, :, :, None, None], column[:, None, None, :, :]

    in_rows, in_columns = grid(rows[4], columns[4])
    valid = in_rows & in_columns
    found: Any = None
    for y in (0, 1):
        for along in (0, 1):
            row, column = grid(rows[y], columns[along])
            weight_y, weight_x = grid(rows[y + 2], columns[along + 2])
            index = (batch[:, None, None, None, None] * height + row) * width + column
            value = flat[index] * (weight_y * weight_x)[..., None]
            found = value if found is None else torch.maximum(found, value)
    # A sample outside the image is 0; one beyond the count is none.
    found = torch.where(valid[..., None], found, 0.0)
    there_rows, there_columns = grid(_there(rows), _there(columns))
    there = there_rows & there_columns
    best = torch.where(there[..., None], found, -torch.inf).amax((2, 4))
    none = ~there.any(4).any(2)
    return torch.where(none[..., None], 0.0, best).permute(0, 3, 1, 2)


def _there(samples: tuple[Any, ...]) -> torch.Tensor:
    low, count = samples[0], samples[5]
    numbers = torch.arange(low.shape[2], device=low.device)
    return (numbers < count).expand(low.shape)


@operator("MaxRoiPool", since=1)
def max_roi_pool(x: torch.Tensor, rois: torch.Tensor, *, pooled_shape: Any, spatial_scale: float = 1.0) -> torch.Tensor:
    """Bins of whole pixels, as in Fast R-CNN; an empty one is 0."""
    batch = rois[:, 0].to(torch.int64)
    # Half away from zero, where torch.round takes the even one.
    scaled = rois[:, 1:] * spatial_scale
    corners = torch.sign(scaled) * torch.floor(scaled.abs() + 0.5)
    rows = _inside(corners[:, 1], corners[:, 3], pooled_shape[0], x.shape[2])
    columns = _inside(corners[:, 0], corners[:, 2], pooled_shape[1], x.shape[3])
    found = x[batch]
    by_column = [
        torch.where(columns[:, None, None, place], found, -torch.inf).amax(3) for place in range(pooled_shape[1])
    ]
    across = torch.stack(by_column, 3)
    by_row = [
        torch.where(rows[:, None, place, :, None], across, -torch.inf).amax(2) for place in range(pooled_shape[0])
    ]
    down = torch.stack(by_row, 2)
    empty = ~(rows.any(2)[:, None, :, None] & columns.any(2)[:, None, None, :])
    return torch.where(empty, 0.0, down).to(x.dtype)


def _inside(start: torch.Tensor, end: torch.Tensor, bins: int, size: Any) -> torch.Tensor:
    """Which numbers of an axis lie in which bin: (regions, bins, size)."""
    width = ((end - start + 1).clamp(min=1) / bins)[:, None]
    place = torch.arange(bins, device=start.device, dtype=start.dtype)
    first = torch.floor(place * width) + start[:, None]
    last = torch.ceil((place + 1) * width) + start[:, None]
    number = torch.arange(size, device=start.device)
    return (number >= first[..., None]) & (number < last[..., None])


@operator("NonMaxSuppression", since=10, host=(2, 3, 4))
def non_max_suppression(
    boxes: torch.Tensor, scores: torch.Tensor, max_output_boxes_per_class: Any = 0, iou_threshold: Any = 0.0,
    score_threshold: Any = None, *, center_point_box: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Rows of batch, class and box: for each class of each image the best first, without what overlaps a better one."""
    most = 0 if max_output_boxes_per_class is None else one_int(max_output_boxes_per_class)
    overlap = 0.0 if iou_threshold is None else _number(iou_threshold)
    least = None if score_threshold is None else _number(score_threshold)
    corners = _corners(boxes, bool(center_point_box))
    found = []
    for image in range(scores.shape[0] if most > 0 else 0):
        for label in range(scores.shape[1]):
            kept = _kept(corners[image], scores[image, label], most, overlap, least)
            place = torch.tensor([[image, label]], device=scores.device).expand(len(kept), 2)
            found.append(torch.cat([place, kept[:, None]], 1))
    return torch.cat(found) if found else torch.zeros((0, 3), dtype=torch.int64, device=scores.device)


def _number(value: Any) -> float:
    found = value.reshape(-1).tolist() if isinstance(value, torch.Tensor) else value
    return float(found[0] if isinstance(found, (list, tuple)) else found)


def _corners(boxes: torch.Tensor, by_center: bool) -> torch.Tensor:
    """Low and high corners, whichever way round the model gives them."""
    first, second = boxes[..., :2], boxes[..., 2:]
    if by_center:
        return torch.cat([first - second / 2, first + second / 2], -1)
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)


def _kept(corners: torch.Tensor, scores: torch.Tensor, most: int, overlap: float, least: float | None) -> torch.Tensor:
    """Indices of the boxes that stay, the best score first; of equals the first."""
    left = torch.argsort(scores, descending=True, stable=True)
    if least is not None:
        left = left[scores[left] > least]
    kept: list[torch.Tensor] = []
    while len(left) > 0 and len(kept) < most:
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[_overlaps(corners[best], corners[left]) <= overlap]
    return torch.stack(kept) if kept else left[:0]


def _overlaps(box: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union; 0 where there is no area."""
    low, high = torch.maximum(box[:2], others[:, :2]), torch.minimum(box[2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(-1) - shared
    return torch.where(union > 0, shared / torch.where(union > 0, union, 1.0), 0.0)
