"""Operators of the interpreter that are losses."""

from __future__ import annotations

from typing import Any

import torch

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import as_tensor


@operator("NegativeLogLikelihoodLoss", since=12)
def negative_log_likelihood(
    log_prob: Any, target: Any, weight: Any = None, *, ignore_index: int | None = None, reduction: str = "mean"
) -> Any:
    """The mean divides by the weights of the classes that the targets name, those of ignored targets being zero."""
    target = as_tensor(target, log_prob).to(torch.int64)
    valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    # What is ignored may be no class at all.
    chosen = torch.where(valid, target, 0)
    loss = -torch.gather(log_prob, 1, chosen.unsqueeze(1)).squeeze(1)
    share = torch.ones_like(loss) if weight is None else weight[chosen].to(loss.dtype)
    share = torch.where(valid, share, 0.0)
    loss = torch.where(valid, loss * share, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / share.sum()


@operator("SoftmaxCrossEntropyLoss", since=12)
def softmax_cross_entropy(
    scores: Any,
    labels: Any,
    weights: Any = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
    outputs: int = 1,
) -> tuple[Any, ...]:
    log_prob = torch.log_softmax(scores, 1)
    loss = negative_log_likelihood(log_prob, labels, weights, ignore_index=ignore_index, reduction=reduction)
    return loss, log_prob
