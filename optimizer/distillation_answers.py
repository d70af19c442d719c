"""How far a student's answers are from its teacher's.

Rows of class scores by the Kullback-Leibler divergence at a temperature; everything else by the squared error, relative to how
much the teacher's answers vary: by how much all of them do, as a batch of few items says little of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from perwatt import metrics
from perwatt.distillation_inputs import UNLABELLED
from perwatt.errors import BackendError
from perwatt.interpreter_values import to_numpy

LEAST_SHARE = 1e-7
"""What a softmax in float32 makes of what it makes next to nothing of."""
WIDE = 8.0
"""Standard deviation of the scores of a row that the temperature is meant for, at most."""
LEAST_SPREAD = 1e-6
"""Of the mean square, what counts as the variance at least."""


class Answers:
    """What is known of a teacher's answers. `scores`: which output holds rows of class scores, None for none."""

    def __init__(
        self, names: Sequence[str], targets: Sequence[Sequence[Any]], temperature: float, labels: float
    ) -> None:
        """`targets`: its outputs, called `names`, for each batch. `labels`: how much the cross entropy with labels counts.
        Raises BackendError where no output is of floats, or one is not finite."""
        self.temperature, self.labels = temperature, labels
        self.floats = [i for i in range(len(names)) if targets[0][i].is_floating_point()]
        if not self.floats:
            raise BackendError("its outputs are whole numbers, which nothing can be learnt from")
        self.spreads = {i: spread([one[i] for one in targets]) for i in self.floats}
        if not all(map(math.isfinite, self.spreads.values())):
            raise BackendError("the original answers with NaN or infinity on the samples to select by")
        batches = [{name: to_numpy(one[i]) for i, name in enumerate(names)} for one in targets]
        found = metrics.class_output(batches, sure=True)
        self.scores = names.index(found) if found is not None and targets[0][names.index(found)].ndim == 2 else None
        rows = [] if self.scores is None else [one[self.scores].float() for one in targets]
        self.shares = bool(rows) and _are_shares(rows)
        self.heat = temperature * (1.0 if self.shares or not rows else _too_wide(rows))

    def distance(self, found: Sequence[Any], wanted: Sequence[Any], labels: Any = None) -> Any:
        """Mean over outputs and items. `labels`: int64 [n], or None."""
        total: Any = 0.0
        for i in self.floats:
            mine, theirs = found[i].float(), wanted[i].float()
            if i != self.scores:
                total = total + error(mine, theirs, self.spreads[i])
                continue
            if self.shares:
                mine, theirs = _logarithm(mine), _logarithm(theirs)
            total = total + self._divergence(mine, theirs)
            if labels is not None and labels.dtype == torch.int64 and self.labels:
                total = total + self.labels * cross_entropy(mine, labels)
        return total / len(self.floats)

    def alike(self, found: Sequence[Any], wanted: Sequence[Any]) -> int:
        """How many items both put into the same class; 0 where there are no classes."""
        if self.scores is None:
            return 0
        return int((found[self.scores].argmax(1) == wanted[self.scores].argmax(1)).sum())

    def _divergence(self, mine: Any, theirs: Any) -> Any:
        wanted = F.log_softmax(theirs / self.heat, dim=1)
        found = F.kl_div(F.log_softmax(mine / self.heat, dim=1), wanted, reduction="batchmean", log_target=True)
        return found * self.temperature**2


def spread(several: Sequence[Any]) -> float:
    """The variance of all that these hold; what stands for it where nothing varies."""
    flat = torch.cat([one.detach().reshape(-1).double() for one in several])
    return float(flat.var(correction=0) + LEAST_SPREAD * flat.square().mean()) or 1.0


def error(mine: Any, theirs: Any, variance: float) -> Any:
    """Mean square of the difference, relative to a variance."""
    return (mine - theirs).square().mean() / variance


def cross_entropy(scores: Any, labels: Any) -> Any:
    """Mean over all items, with nothing for those without a label."""
    return F.cross_entropy(scores, labels, ignore_index=UNLABELLED, reduction="sum") / len(labels)


def _are_shares(rows: Sequence[Any]) -> bool:
    """Whether scores have been through a softmax: rows of what is not negative, and adds up to one."""
    return all(float(row.min()) >= 0 and bool((row.sum(1) - 1).abs().max() < 1e-3) for row in rows)


def _logarithm(shares: Any) -> Any:
    """The scores that a softmax made these shares of, but for a constant."""
    return shares.clamp(min=LEAST_SHARE).log()


def _too_wide(rows: Sequence[Any]) -> float:
    """By how much the scores of a row spread further than the temperature is meant for: all that a teacher tells of the other
    classes would be zero then."""
    return max(1.0, float(torch.cat([row.std(dim=1) for row in rows]).mean()) / WIDE)
