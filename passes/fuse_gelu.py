"""Put the Gaussian error linear unit back together: one Gelu where exporters left five to eight nodes.

gelu(x) = x · Φ(x) with the normal distribution's Φ (Hendrycks and Gimpel 2016); exactly x/2 · (1 + erf(x/√2)), and as an
approximation x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))). Each piece reads and writes the whole tensor, so an unfused one
costs memory bandwidth, not arithmetic: most of all in transformers, where it stands between the two widest products.

    Mul(x, 0.5) · Add(Erf(Div(x, 1.4142)), 1)        becomes        Gelu(x)

Both forms are found however their factors are grouped, with x³ as a power or as products, and the second with the logistic
function in the place of tanh too. It pays on backends that don't find it themselves, and on all of them it gives
quantization one operator to place scales around instead of eight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._activations import refusals
from perwatt.patterns import Either, Match, Number, Op, Pattern, Var

CUBIC = 0.044715
"""Of the approximation by tanh (Hendrycks and Gimpel 2016, section 2)."""
SCALE = math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class FuseGelu(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    roots: ClassVar[tuple[str, ...]] = ("Mul", "Div")
    what: ClassVar[str] = "Gelu put together"
    opset: ClassVar[int] = 20

    def patterns(self) -> Sequence[Op]:
        return _patterns()

    def check(self, match: Match) -> Iterator[str]:
        yield from refusals(match)

    def rewrite(self, match: Match, build: Builder) -> Any:
        approximate = "tanh" if "approximate" in match.named else "none"
        return build.op("Gelu", match["x"], approximate=approximate)


@cache
def _patterns() -> tuple[Op, ...]:
    x = Var("x")
    exact = Op("Erf", _times(x, 1 / math.sqrt(2)))
    tanh = Op("Tanh", _cubic(x, SCALE), name="approximate")
    # (1 + tanh z) / 2 is the logistic function of 2z.
    logistic = Op("Mul", x, Op("Sigmoid", _cubic(x, 2 * SCALE), name="approximate"))
    return *_halved(x, exact), *_halved(x, tanh), logistic


def _halved(x: Pattern, curve: Pattern) -> tuple[Op, ...]:
    """x · (1 + curve) / 2, however it is grouped."""
    gate = Op("Add", curve, Number(1))
    half_gate = Op("Add", _times(curve, 0.5), Number(0.5))
    return (
        Op("Mul", Op("Mul", x, gate), Number(0.5)),
        Op("Div", Op("Mul", x, gate), Number(2)),
        Op("Mul", x, Either(_times(gate, 0.5), half_gate)),
        Op("Mul", _times(x, 0.5), gate),
    )


def _times(inner: Pattern, factor: float) -> Pattern:
    return Either(Op("Mul", inner, Number(factor)), Op("Div", inner, Number(1 / factor)))


def _cubic(x: Pattern, scale: float) -> Pattern:
    """scale · (x + 0.044715 x³), with the factors x and scale taken out or not."""
    square, sum_of_powers = _square(x, CUBIC), Op("Add", x, _cube(x, CUBIC))
    one_more = Op("Add", square, Number(1))
    return Either(
        _times(Either(sum_of_powers, Op("Mul", x, one_more)), scale),
        Op("Mul", _times(x, scale), one_more),
        Op("Mul", x, _times(one_more, scale)),
        Op("Mul", x, Op("Add", _square(x, scale * CUBIC), Number(scale))),
        Op("Add", _times(x, scale), _cube(x, scale * CUBIC)),
    )


def _square(x: Pattern, factor: float) -> Pattern:
    """factor · x²"""
    return Either(Op("Mul", _plain_square(x), Number(factor)), Op("Mul", Op("Mul", x, Number(factor)), x))


def _cube(x: Pattern, factor: float) -> Pattern:
    """factor · x³"""
    power = Either(Op("Pow", x, Number(3)), Op("Mul", _plain_square(x), x))
    return Either(
        Op("Mul", power, Number(factor)),
        Op("Mul", Op("Mul", x, Number(factor)), _plain_square(x)),
        Op("Mul", _square(x, factor), x),
    )


def _plain_square(x: Pattern) -> Pattern:
    return Either(Op("Mul", x, x), Op("Pow", x, Number(2)))
