"""Remove arithmetic that changes nothing: x + 0, x · 1, x − 0, x / 1, x¹, and what undoes itself.

Exporters write down what the program said, and programs are written for the general case: a scale that happens to be 1, a
dropout that is switched off, a mean of one tensor. Every such node reads and writes the whole tensor. Removed are

    x · 1, x + 0, x − 0, x / 1, x ** 1, And(x, true), Or(x, false), Xor(x, false), Clip without bounds
    Neg(Neg(x)), Not(Not(x))                                 becomes        x
    Where(c, x, x), Where(true, x, y), Max(x) alone
    Relu(Relu(x)), Abs(Abs(x)), Floor(Floor(x)), …           becomes        one of them

The constant may have any rank, as long as it doesn't stretch x: zeros that are broadcast to a larger shape stay, and so do
those of which nobody can prove that they are not. Equal up to the sign of a zero (−0 + 0 is 0). What would round stays
too: Reciprocal twice, Sqrt of a square. Where several numbers in a row could become one, see `fold-scales`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from perwatt.contract import Stage, Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._rearranging import all_of, fits_into
from perwatt.patterns import Match, dims, given, made_by, same_dims

NEUTRAL = {"Add": 0, "Mul": 1, "Sub": 0, "Div": 1, "Pow": 1, "And": True, "Or": False, "Xor": False}
"""The operand that changes nothing; of Sub, Div and Pow only as the second."""
ONE_SIDED = ("Sub", "Div", "Pow")
UNDOES_ITSELF = ("Neg", "Not")
ONCE_IS_ENOUGH = ("Relu", "Abs", "Floor", "Ceil", "Round", "Sign")
ANY_NUMBER = ("Max", "Min", "Sum", "Mean")
"""Of operands: of one alone they are that one."""


@dataclass(frozen=True)
class SimplifyArithmetic(Fusion):
    """No settings."""

    stage: ClassVar[Stage] = Stage.CLEAN
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=0.0, rtol=0.0)
    after: ClassVar[tuple[str, ...]] = ("remove-dead",)
    roots: ClassVar[tuple[str, ...]] = (*NEUTRAL, *UNDOES_ITSELF, *ONCE_IS_ENOUGH, *ANY_NUMBER, "Where", "Clip")
    what: ClassVar[str] = "computations that change nothing removed"

    def find(self, node: Any) -> Iterator[Match]:
        for kept, others in _nothings(node):
            yield Match(
                node, (node,), (node.outputs[0],), {"x": kept, **{f"other{i}": v for i, v in enumerate(others)}}
            )

    def check(self, match: Match) -> Iterator[str]:
        if _keeps_its_shape(match):
            return
        known = dims(match["x"]) is not None and all(dims(v) is not None for v in _others(match))
        yield "it may stretch its operand to a larger shape" if known else "the shapes of its operands aren't known"

    def rewrite(self, match: Match, build: Builder) -> Any:
        return match["x"]


def _nothings(node: Any) -> Iterator[tuple[Any, list[Any]]]:
    """What the node may be replaced by, with the operands that could stretch it."""
    inputs = given(node)
    kind = node.op_type
    if kind in NEUTRAL and len(inputs) == 2:
        for x, other in [inputs] if kind in ONE_SIDED else [inputs, inputs[::-1]]:
            if all_of(other, NEUTRAL[kind]):
                yield x, [other]
    elif kind in UNDOES_ITSELF and made_by(inputs[0], kind) is not None:
        yield inputs[0].producer().inputs[0], []
    elif (kind in ONCE_IS_ENOUGH and made_by(inputs[0], kind) is not None) or (
        kind in (*ANY_NUMBER, "Clip") and len(inputs) == 1 and not {"min", "max"} & set(node.attributes)
    ):
        yield inputs[0], []
    elif kind == "Where":
        yield from _choices(*inputs)


def _choices(condition: Any, yes: Any, no: Any) -> Iterator[tuple[Any, list[Any]]]:
    if yes is no:
        yield yes, [condition]
    elif all_of(condition, True):
        yield yes, [condition, no]
    elif all_of(condition, False):
        yield no, [condition, yes]


def _keeps_its_shape(match: Match) -> bool:
    x = dims(match["x"])
    if same_dims(x, dims(match.outputs[0])):
        return True
    return all(fits_into(dims(other), x) for other in _others(match))


def _others(match: Match) -> list[Any]:
    return [value for name, value in match.values.items() if name != "x"]
