"""Samples to learn from: in batches of one shape, in another order each time, pictures shifted, mirrored and mixed.

Two pictures laid over one another show nothing that has a name, but the teacher answers them, and in answers to what it has
never seen it tells more than in those to what it was trained on, which it knows by heart. Student and teacher see the very same
mixture (Beyer et al., "Knowledge distillation: a good teacher is patient and consistent", 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from perwatt.data import Samples
from perwatt.signature import Batch, rows

SHIFT = 8
"""Pictures are moved by up to an eighth of their side."""
SMALLEST = 16
AGREEMENT = 0.98
"""How often the teacher has to answer mirrored pictures as it does the others, for them to be mirrored."""
LOOKED_AT = 256
UNLABELLED = -100
"""The label of an item that has none."""

Augment = Callable[[Batch, Any, np.random.Generator], tuple[Batch, Any]]
"""Batch and labels (int64 [n], other targets, or None) to others."""


class Drawn:
    """Batches of samples in random order: `epoch()` gives every item once, but for what fills no batch of its shape."""

    def __init__(self, samples: Samples, size: int, generator: np.random.Generator) -> None:
        self.samples, self.size, self.generator = samples, size, generator

    def epoch(self) -> Iterator[tuple[Batch, Any]]:
        """(batch, labels or None)."""
        places, first = [], 0
        for number, chunk in enumerate(self.samples.chunks):
            order = self.generator.permutation(rows(chunk))
            size = min(self.size, len(order))
            places += [(number, first, order[at : at + size]) for at in range(0, len(order) - size + 1, size)]
            first += rows(chunk)
        for turn in self.generator.permutation(len(places)):
            number, first, at = places[turn]
            batch = {name: array[at] for name, array in self.samples.chunks[number].items()}
            labels = None if self.samples.labels is None else self.samples.labels[first + at]
            yield batch, labels


def augmentation(wanted: str, mix: float, teacher: Any, samples: Samples) -> tuple[Augment, list[str]]:
    """What is done to a batch before it is learnt from, and words for it. `wanted`: `auto`, `none` or `flip-shift`; `mix`: the
    share of pictures that are mixed with others, which leaves them without a label."""
    pictures = [name for name in teacher.inputs if _is_picture(samples, name)]
    if wanted == "none" or not pictures:
        return (lambda batch, labels, generator: (batch, labels)), []
    mirrored = wanted == "flip-shift" or _agrees(teacher, samples, pictures)

    def augmented(batch: Batch, labels: Any, generator: np.random.Generator) -> tuple[Batch, Any]:
        count = rows(batch)
        flips = generator.random(count) < 0.5 if mirrored else np.zeros(count, bool)
        moves = generator.random((count, 2))
        made = {name: _moved(array, flips, moves) if name in pictures else array for name, array in batch.items()}
        if not mix or len(made) > len(pictures):
            return made, labels
        chosen, order = generator.random(count) < mix, generator.permutation(count)
        share = (generator.random(count) * chosen).astype(np.float32)[:, None, None, None]
        made = {name: _mixed(array, order, share) for name, array in made.items()}
        if labels is None or labels.dtype != np.int64:
            return made, None
        return made, np.where(chosen, UNLABELLED, labels)

    words = ["shifted", *(["mirrored"] if mirrored else []), *(["mixed"] if mix else [])]
    return augmented, [f"pictures {' and '.join([', '.join(words[:-1]), words[-1]][len(words) < 2 :])}"]


def _is_picture(samples: Samples, name: str) -> bool:
    arrays = [chunk[name] for chunk in samples.chunks]
    return bool(arrays) and all(array.dtype.kind in "fu" and _sides(array) is not None for array in arrays)


def _sides(array: Any) -> tuple[int, int] | None:
    """The axes of height and width of pictures, [N, C, H, W] or [N, H, W, C]; None where it holds none."""
    if array.ndim != 4:
        return None
    for channels, sides in ((1, (2, 3)), (3, (1, 2))):
        if array.shape[channels] in (1, 3) and min(array.shape[axis] for axis in sides) >= SMALLEST:
            return sides
    return None


def _agrees(teacher: Any, samples: Samples, pictures: list[str]) -> bool:
    """Whether the teacher answers mirrored pictures as it does the others: a digit's mirror image is no digit."""
    same = count = 0
    with torch.no_grad():
        for batch in samples.take(LOOKED_AT).batches(64):
            other = {
                name: np.flip(array, _width(array)) if name in pictures else array for name, array in batch.items()
            }
            answers = [
                teacher(*[torch.from_numpy(np.array(one[name])) for name in teacher.inputs])[0]
                for one in (batch, other)
            ]
            if answers[0].ndim != 2 or answers[0].shape[1] < 2:
                return False
            same += int((answers[0].argmax(1) == answers[1].argmax(1)).sum())
            count += rows(batch)
    return same >= AGREEMENT * count


def _width(pictures: Any) -> int:
    return (_sides(pictures) or (2, 3))[1]


def _mixed(pictures: Any, order: Any, share: Any) -> Any:
    """Each picture with a share of another one laid over it; bytes are rounded."""
    wide = pictures.astype(np.float32, copy=False)
    made = wide + (wide[order] - wide) * share
    return (np.rint(made) if pictures.dtype.kind == "u" else made).astype(pictures.dtype)


def _moved(pictures: Any, flips: Any, moves: Any) -> Any:
    """Each picture mirrored or not, and shifted by its own share of the border, which is a mirror image as well."""
    if _sides(pictures) == (1, 2):
        return np.ascontiguousarray(_moved(pictures.transpose(0, 3, 1, 2), flips, moves).transpose(0, 2, 3, 1))
    height, width = pictures.shape[2:]
    up, left = max(1, height // SHIFT), max(1, width // SHIFT)
    wide = np.pad(pictures, ((0, 0), (0, 0), (up, up), (left, left)), mode="reflect")
    found = np.empty_like(pictures)
    for number, (flip, (y, x)) in enumerate(zip(flips, moves, strict=True)):
        top, side = int(y * (2 * up + 1)), int(x * (2 * left + 1))
        piece = wide[number, :, top : top + height, side : side + width]
        found[number] = piece[:, :, ::-1] if flip else piece
    return found
