"""Cancel transposes: two in a row become one or none, those that change nothing go, those of weights are done now.

    Transpose(Transpose(x, [0, 2, 1, 3]), [0, 1, 3, 2])        becomes        Transpose(x, [0, 2, 3, 1])
    Transpose(Transpose(x, [0, 2, 3, 1]), [0, 3, 1, 2])        becomes        x
    Transpose(weight)                                          becomes        the weight, transposed
    Flatten(Transpose(x: [b, 64, 1, 1], [0, 2, 3, 1]))         becomes        Flatten(Reshape(x))

A transpose reads and writes the whole tensor in strides, and computes nothing. One that only moves axes of length 1 moves no
element: next to a reshape it becomes one, and `cancel-reshapes` makes one of the two. Transposes that have operators
between them are the business of `move-transposes`, those of the factors of a product that of `fuse-gemm`.

A weight that others use as it is stays as it is: a second copy would make the model larger (embeddings that are the last
projection too).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from perwatt.contract import Stage, Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._rearranging import target_for
from perwatt.patterns import Match, dims, is_stored, made_by, rank, stored

RESHAPES = "Reshape|Flatten|Squeeze|Unsqueeze"


@dataclass(frozen=True)
class CancelTransposes(Fusion):
    """No settings."""

    # Nothing is computed otherwise, but a product with a stored factor may add up in another order than one with a
    # factor that is transposed at run time.
    stage: ClassVar[Stage] = Stage.CLEAN
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-6, rtol=1e-5)
    after: ClassVar[tuple[str, ...]] = ("cancel-casts",)
    roots: ClassVar[tuple[str, ...]] = ("Transpose",)
    what: ClassVar[str] = "transposes cancelled"

    def find(self, node: Any) -> Iterator[Match]:
        x, order = node.inputs[0], permutation(node)
        first = made_by(x, "Transpose")
        if order is not None and order == sorted(order):
            yield Match(node, (node,), (node.outputs[0],), {"same": x})
        elif first is not None:
            yield Match(node, (node,), (node.outputs[0],), {"x": first.inputs[0]}, {"first": first})
        elif is_stored(x):
            yield Match(node, (node,), (node.outputs[0],), {"weight": x})
        elif order is not None and _moves_nothing(x, order) and _beside_a_reshape(node):
            yield Match(node, (node,), (node.outputs[0],), {"reshaped": x})

    def check(self, match: Match) -> Iterator[str]:
        if "first" in match.named and _composed(match) is None:
            yield "the rank of what it transposes isn't known"
        if match.get("weight") is not None and _has_other_users(match["weight"]):
            yield "its weight is used elsewhere too, and a second copy would make the model larger"
        if match.get("reshaped") is not None and _target(match) is None:
            yield "more than one axis of what it transposes has no known length"

    def rewrite(self, match: Match, build: Builder) -> Any:
        if match.get("same") is not None:
            return match["same"]
        if match.get("weight") is not None:
            array, order = stored(match["weight"]), permutation(match.root)
            return build.constant(np.ascontiguousarray(array.transpose(order)), match.outputs[0].name)
        if match.get("reshaped") is not None:
            shape = build.constant(np.array(_target(match), np.int64), f"{match.outputs[0].name}_shape")
            return build.op("Reshape", match["reshaped"], shape)
        order = _composed(match) or []
        return match["x"] if order == sorted(order) else build.op("Transpose", match["x"], perm=order)


def permutation(node: Any) -> list[int] | None:
    """Where each axis of the output of a Transpose comes from; None where that takes a rank that isn't known."""
    if "perm" in node.attributes:
        return list(node.attributes["perm"].as_ints())
    axes = rank(node.inputs[0]) if rank(node.inputs[0]) is not None else rank(node.outputs[0])
    return None if axes is None else list(range(axes))[::-1]


def _composed(match: Match) -> list[int] | None:
    first, second = permutation(match.named["first"]), permutation(match.root)
    if first is None and second is None:
        return None
    # Without a permutation a Transpose turns all axes round, so that either says how many there are.
    first, second = (order or list(range(len(first or second or ())))[::-1] for order in (first, second))
    return [first[axis] for axis in second]


def _has_other_users(weight: Any) -> bool:
    return weight.is_graph_output() or any(use.node.op_type != "Transpose" for use in weight.uses())


def _moves_nothing(x: Any, order: list[int]) -> bool:
    shape = dims(x)
    if shape is None:
        return False
    long = [axis for axis in order if shape[axis] != 1]
    return long == sorted(long)


def _beside_a_reshape(node: Any) -> bool:
    users = {use.node.op_type for use in node.outputs[0].uses()}
    return made_by(node.inputs[0], RESHAPES) is not None or bool(users & set(RESHAPES.split("|")))


def _target(match: Match) -> list[int] | None:
    shape = dims(match["reshaped"]) or []
    return target_for([shape[axis] for axis in permutation(match.root) or []], shape)
