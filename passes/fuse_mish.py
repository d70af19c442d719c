"""Put Mish back together: one operator where exporters left three to nine.

mish(x) = x · tanh(softplus(x)) with softplus(x) = ln(1 + eˣ) (Misra 2019, equation 1): the activation of YOLOv4 and of its
descendants, behind nearly every convolution there. Each piece reads and writes the whole tensor.

    Mul(x, Tanh(Softplus(x)))                                        becomes        Mish(x)
    Mul(x, Tanh(Log(Add(Exp(x), 1))))                                becomes        Mish(x)
    Mul(x, Tanh(Where(Greater(x, 20), x, Softplus(x))))              becomes        Mish(x)

Softplus may also be written as max(x, 0) + ln(1 + e^−|x|), which doesn't overflow. From some threshold on frameworks take
x for softplus(x): from 10 on that makes no difference, as both have a tanh of 1 in any type; with a lower threshold it
stays as it is. It pays on backends that run Mish as one operator; elsewhere it is taken apart again, and no worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._activations import refusals
from perwatt.patterns import Either, Match, Number, Op, Pattern, Var, number

HARMLESS = 10.0
"""Beyond this x and softplus(x) are 5e-5 apart and their tanh 2e-13."""
LARGER = "Greater|GreaterOrEqual"
SMALLER = "Less|LessOrEqual"


@dataclass(frozen=True)
class FuseMish(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    roots: ClassVar[tuple[str, ...]] = ("Mul",)
    what: ClassVar[str] = "Mish put together"
    opset: ClassVar[int] = 18

    def patterns(self) -> Sequence[Op]:
        return _patterns()

    def check(self, match: Match) -> Iterator[str]:
        if "threshold" in match.values and not (number(match["threshold"]) or 0) >= HARMLESS:
            yield f"the threshold of its softplus is below {HARMLESS:g}"
        yield from refusals(match, bfloat16_since=22)

    def rewrite(self, match: Match, build: Builder) -> Any:
        return build.op("Mish", match["x"])


@cache
def _patterns() -> tuple[Op, ...]:
    x = Var("x")
    # torch writes β = 1 out.
    same = Either(x, Op("Mul", x, Number(1)))
    softplus = Op("Softplus", same)
    overflowing = Op("Log", Op("Add", Op("Exp", x), Number(1)))
    below = Op("Exp", Op("Neg", Op("Abs", x)))
    above = Either(Op("Relu", x), Op("Max", x, Number(0)))
    careful = Op("Add", above, Op("Log", Op("Add", below, Number(1))))
    plain = Either(softplus, Op("Div", softplus, Number(1)), overflowing, careful)
    return (Op("Mul", x, Op("Tanh", Either(plain, *_beyond_a_threshold(x, same, plain)))),)


def _beyond_a_threshold(x: Pattern, compared: Pattern, softplus: Pattern) -> tuple[Op, ...]:
    """x itself where it is larger than a stored number, however that is written."""
    threshold = Number(name="threshold")
    above = Either(Op(LARGER, compared, threshold), Op(SMALLER, threshold, compared))
    below = Either(Op(SMALLER, compared, threshold), Op(LARGER, threshold, compared))
    return Op("Where", above, x, softplus), Op("Where", below, softplus, x)
