"""Samples to learn from: in batches of one shape, in another order each time, pictures shifted and mirrored."""

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

Augment = Callable[[Batch, np.random.Generator], Batch]


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


def augmentation(wanted: str, teacher: Any, samples: Samples) -> tuple[Augment, list[str]]:
    """What is done to a batch before it is learnt from, and words for it. `wanted`: `auto`, `none` or `flip-shift`."""
    pictures = [name for name in teacher.inputs if _is_picture(samples, name)]
    if wanted == "none" or not pictures:
        return (lambda batch, generator: batch), []
    mirrored = wanted == "flip-shift" or _agrees(teacher, samples, pictures)

    def augmented(batch: Batch, generator: np.random.Generator) -> Batch:
        count = rows(batch)
        flips = generator.random(count) < 0.5 if mirrored else np.zeros(count, bool)
        moves = generator.random((count, 2))
        return {name: _moved(array, flips, moves) if name in pictures else array for name, array in batch.items()}

    return augmented, ["pictures shifted and mirrored" if mirrored else "pictures shifted"]


def _is_picture(samples: Samples, name: str) -> bool:
    arrays = [chunk[name] for chunk in samples.chunks]
    return bool(arrays) and all(
        array.ndim == 4 and array.dtype.kind == "f" and array.shape[1] in (1, 3) and min(array.shape[2:]) >= SMALLEST
        for array in arrays
    )


def _agrees(teacher: Any, samples: Samples, pictures: list[str]) -> bool:
    """Whether the teacher answers mirrored pictures as it does the others: a digit's mirror image is no digit."""
    same = count = 0
    with torch.no_grad():
        for batch in samples.take(LOOKED_AT).batches(64):
            other = {name: np.flip(array, -1) if name in pictures else array for name, array in batch.items()}
            answers = [
                teacher(*[torch.from_numpy(np.array(one[name])) for name in teacher.inputs])[0]
                for one in (batch, other)
            ]
            if answers[0].ndim != 2 or answers[0].shape[1] < 2:
                return False
            same += int((answers[0].argmax(1) == answers[1].argmax(1)).sum())
            count += rows(batch)
    return same >= AGREEMENT * count


def _moved(pictures: Any, flips: Any, moves: Any) -> Any:
    """Each picture mirrored or not, and shifted by its own share of the border, which is a mirror image as well."""
    height, width = pictures.shape[2:]
    up, left = max(1, height // SHIFT), max(1, width // SHIFT)
    wide = np.pad(pictures, ((0, 0), (0, 0), (up, up), (left, left)), mode="reflect")
    found = np.empty_like(pictures)
    for number, (flip, (y, x)) in enumerate(zip(flips, moves, strict=True)):
        top, side = int(y * (2 * up + 1)), int(x * (2 * left + 1))
        piece = wide[number, :, top : top + height, side : side + width]
        found[number] = piece[:, :, ::-1] if flip else piece
    return found
