"""Put HardSwish and HardSigmoid back together: one operator where exporters left two to five.

hardswish(x) = x · hardsigmoid(x) with hardsigmoid(x) = max(0, min(1, x/6 + 1/2)), a piecewise linear stand-in for x · σ(x)
(Howard et al. 2019, section 5.2): the activation of MobileNetV3, cheap to compute, and so bound by memory all the more.

    Div(Mul(x, Clip(Add(x, 3), 0, 6)), 6)               becomes        HardSwish(x)
    Mul(x, HardSigmoid(x) {alpha=1/6, beta=1/2})        becomes        HardSwish(x)
    Clip(Add(Mul(x, 0.2), 0.5), 0, 1)                   becomes        HardSigmoid(x) {alpha=0.2, beta=0.5}

The clipping may be a Clip, a Relu with a Min, or Min and Max; the division may stand anywhere. A hard sigmoid by itself,
as it is in squeeze-and-excitation, may have any slope (Keras takes 1/5); what isn't one half at 0 is not taken for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._activations import refusals
from perwatt.patterns import Either, Match, Number, Op, Pattern, Var, given, is_number, maybe, number

SIXTH = 1 / 6


@dataclass(frozen=True)
class FuseHardswish(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    roots: ClassVar[tuple[str, ...]] = ("Mul", "Div", "Clip", "Min", "Max", "Relu")
    what: ClassVar[str] = "HardSwish and HardSigmoid put together"
    opset: ClassVar[int] = 14

    def patterns(self) -> Sequence[Op]:
        return _patterns()

    def check(self, match: Match) -> Iterator[str]:
        if not math.isfinite(_slope(match)):
            yield "its slope is not finite"
        yield from refusals(match, bfloat16_since=22)

    def rewrite(self, match: Match, build: Builder) -> Any:
        if "swish" in match.named:
            return build.op("HardSwish", match["x"])
        return build.op("HardSigmoid", match["x"], alpha=_slope(match), beta=0.5)


@cache
def _patterns() -> tuple[Op, ...]:
    x = Var("x")
    ramp = _between(Op("Add", x, Number(3)), 6)
    unit = _between(Op("Add", _times(x, SIXTH), Number(0.5)), 1)
    whole = Op("HardSigmoid", x, where=_is_a_sixth)
    swishes = (
        *_products(x, Either(*ramp), SIXTH),
        Op("Mul", x, Either(*unit, whole), name="swish"),
    )
    slope, width = Number(name="slope"), Number(name="width")
    sigmoids = (
        Op("Mul", Either(*ramp), Number(SIXTH)),
        Op("Div", Either(*ramp), Number(6)),
        *_between(Op("Add", Either(Op("Mul", x, slope), Op("Div", x, width)), Number(0.5)), 1),
    )
    return *swishes, *sigmoids


def _products(x: Pattern, gate: Pattern, factor: float) -> tuple[Op, ...]:
    """x · gate · factor, however it is grouped."""
    both = Op("Mul", x, gate, name="swish")
    return (
        Op("Mul", both, Number(factor)),
        Op("Div", both, Number(1 / factor)),
        Op("Mul", x, _times(gate, factor), name="swish"),
        Op("Mul", _times(x, factor), gate, name="swish"),
    )


def _times(inner: Pattern, factor: float) -> Pattern:
    return Either(Op("Mul", inner, Number(factor)), Op("Div", inner, Number(1 / factor)))


def _between(inner: Pattern, high: float) -> tuple[Op, ...]:
    """`inner`, but 0 below 0 and `high` above that."""
    zero, top = Number(0), Number(high)
    positive = Either(Op("Relu", inner), Op("Max", inner, zero))
    lowered = Op("Min", inner, top)
    return (
        Op("Clip", maybe("Relu", inner), zero, top),
        Op("Clip", positive, ..., where=_clips_above(high)),
        Op("Min", positive, top),
        Op("Relu", lowered),
        Op("Max", lowered, zero),
    )


def _clips_above(high: float) -> Callable[[Any], bool]:
    """Whether a Clip has no lower bound, and this upper one."""

    def clips(node: Any) -> bool:
        inputs = given(node)
        return len(inputs) == 3 and inputs[1] is None and is_number(inputs[2], high)

    return clips


def _is_a_sixth(node: Any) -> bool:
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    return math.isclose(alpha, SIXTH, rel_tol=1e-4) and math.isclose(beta, 0.5, rel_tol=1e-6)


def _slope(match: Match) -> float:
    """Of the hard sigmoid, however it is written."""
    if "slope" in match.values:
        return number(match["slope"]) or 0.0
    if "width" in match.values:
        return 1 / (number(match["width"]) or math.nan)
    return SIXTH
