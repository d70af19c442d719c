"""Remove what guards a softmax against rows that are masked entirely, where there can't be any.

Over a row of −∞ alone a softmax is 0/0. For rows that have nothing to attend to torch therefore puts zeros in the place of
NaN behind every softmax with a mask of truth values; on scores that is two more passes over the largest tensors of a
transformer, and backends don't recognise attention any more.

    s = Softmax(x); Where(IsNaN(s), 0, s)                                 becomes        Softmax(x)
    Where(all elements of a row of x equal −∞, 0, Softmax(x))             becomes        Softmax(x)

This is done where every row is sure to have an element that isn't masked: without a mask, with one that is stored and
leaves something in each row, one that is causal, or one made of large negative numbers instead of −∞. These add up: twice
the lowest number of a type is −∞, and in float16 so is the lowest number and a score of −20. Everything else stays, above
all a mask that is made of what the caller says is padding: he may say that everything is. A guard would also hide NaN
which come from products that overflow or from broken weights; that a model leans on this is taken to be out of the
question, and shows as drift on samples where it isn't.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._masks import Rows
from perwatt.passes._rearranging import fits_into
from perwatt.patterns import (
    Either,
    Match,
    Number,
    Op,
    Pattern,
    Var,
    axes_of,
    dims,
    from_the_end,
    made_by,
    maybe,
    number,
    rank,
    same_dims,
    stored,
)


@dataclass(frozen=True)
class RemoveSoftmaxGuards(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=0.0, rtol=0.0)
    roots: ClassVar[tuple[str, ...]] = ("Where",)
    what: ClassVar[str] = "softmax guards that can't fire removed"

    def patterns(self) -> Sequence[Op]:
        return _patterns()

    def check(self, match: Match) -> Iterator[str]:
        axis = _axis(match)
        if "all" in match.named and from_the_end(axes_of(match.named["all"]), _rank(match)) != [axis]:
            yield "the guard looks along another axis than the softmax"
        if not _fits(match["instead"], match):
            yield "what the guard puts in may have another shape"
        rows = Rows()
        known = rows.of(match["scores"])
        if isinstance(known, str):
            yield known
        elif known.low == -math.inf and axis != -1:
            yield "its mask may be −∞, and the softmax is not along the last axis"
        elif rows.peak(match["scores"]) == -math.inf:
            yield "its mask may be −∞ in a whole row"

    def rewrite(self, match: Match, build: Builder) -> Any:
        return _guarded(match)


@cache
def _patterns() -> tuple[Op, ...]:
    scores, instead = Var("scores"), Var("instead")
    softmax = Op("Softmax", scores, name="softmax", shared=True)
    guarded = Either(softmax, Op("Cast", softmax, name="cast", shared=True))
    fires = Either(Op("IsNaN", guarded), *_all_masked(scores))
    return (
        Op("Where", fires, instead, guarded),
        Op("Where", Op("Not", fires), guarded, instead),
    )


def _all_masked(scores: Pattern) -> tuple[Pattern, ...]:
    """Whether all elements of a row are −∞; of truth values not every operator takes the smallest."""
    masked = Either(Op("Equal", scores, Number(-math.inf)), Op("IsInf", scores, where=_only_negative))
    numbers = maybe("Cast", maybe("Cast", masked))
    smallest = Op("ReduceMin", numbers, ..., name="all", where=lambda node: node.attributes.get_int("keepdims", 1) == 1)
    return Op("Cast", smallest), smallest


def _only_negative(node: Any) -> bool:
    return not node.attributes.get_int("detect_positive", 1) and bool(node.attributes.get_int("detect_negative", 1))


def _guarded(match: Match) -> Any:
    return match.named.get("cast", match.named["softmax"]).outputs[0]


def _axis(match: Match) -> int | None:
    """The axis of the softmax, counted from the end; None where that takes a rank that isn't known."""
    axis = match.named["softmax"].attributes.get_int("axis", -1)
    found = from_the_end([axis], _rank(match))
    return found[0] if found else None


def _rank(match: Match) -> int | None:
    """How many axes scores, softmax and what is guarded have."""
    alike = (match["scores"], match.named["softmax"].outputs[0], match.outputs[0])
    return next((rank(value) for value in alike if rank(value) is not None), None)


def _fits(instead: Any, match: Match) -> bool:
    """Whether what is put in has the shape of what it stands for, or is stretched to it."""
    if number(instead) is not None:
        # A softmax has at least one axis.
        return stored(instead).ndim <= 1 or fits_into(stored(instead).shape, dims(_guarded(match)))
    if same_dims(dims(instead), dims(_guarded(match))):
        return True
    made = made_by(instead, "Expand|ConstantOfShape")
    shape = made_by(made.inputs[-1], "Shape") if made is not None else None
    if shape is None or shape.attributes.get_int("start", 0) or "end" in shape.attributes:
        return False
    like = (match["scores"], _guarded(match), match.named["softmax"].outputs[0])
    return any(shape.inputs[0] is value for value in like)
