"""The nodes of an attention's mask, each made once for all the layers that use it."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np

from perwatt.passes._attention_masks import Frame, Keep, Plan, lowest
from perwatt.passes._reusing import kept_once, once, sizes


def mask_of(plan: Plan, frame: Frame, build: Any) -> Any:
    """The mask that `plan` tells of; None where there is none."""
    conditions = [_condition(keep, build) for keep in plan.keeps]
    if plan.kept is not None:
        conditions.append(kept_once(build, plan.kept))
    condition = reduce(lambda a, b: once(build, "And", a, b), conditions) if conditions else None
    if plan.low is None:
        return _spread(condition, plan, build)
    parts = []
    if condition is not None:
        nothing, low = (kept_once(build, _floats(number, frame)) for number in (0.0, plan.low))
        parts.append(_typed(once(build, "Where", condition, nothing, low), nothing))
    for addend in plan.addends:
        value = once(build, "Neg", addend.value) if addend.negated else addend.value
        if addend.floored:
            value = once(build, "Max", value, kept_once(build, _floats(lowest(frame.dtype) / 8, frame)))
        parts.append(_with_heads(value, addend.unsqueezed, build))
    if plan.total is not None:
        parts.append(kept_once(build, _floats(plan.total, frame)))
    whole = reduce(lambda a, b: once(build, "Add", a, b), parts) if parts else None
    return _spread(whole, plan, build)


def _condition(keep: Keep, build: Any) -> Any:
    value = once(build, "Not", keep.value) if keep.negated else keep.value
    return _with_heads(value, keep.unsqueezed, build)


def _with_heads(value: Any, lacking: bool, build: Any) -> Any:
    return once(build, "Unsqueeze", value, kept_once(build, np.array([1], np.int64))) if lacking else value


def _spread(value: Any, plan: Plan, build: Any) -> Any:
    if value is None or plan.spread is None:
        return value
    return once(build, "Expand", value, sizes(build, (1, 1, *plan.spread)))


def _floats(array: Any, frame: Frame) -> Any:
    import onnx_ir as ir

    return np.asarray(array, dtype=np.float64).astype(ir.DataType[frame.dtype].numpy())


def _typed(value: Any, like: Any) -> Any:
    value.type = like.type
    return value
