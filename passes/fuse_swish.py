"""Put Swish back together: one operator where exporters left two to five.

swish(x) = x · σ(αx) with the logistic function σ (Ramachandran, Zoph and Le 2017, equation 1). With α = 1 it is SiLU, the
activation of EfficientNet and of the gates in Llama's feed-forward layers; with α = 1.702 the quick approximation of Gelu
in CLIP. Unfused, x is read twice and σ(x) is written and read in between: memory traffic, not arithmetic, and right behind
the widest convolutions and products.

    Mul(x, Sigmoid(x))                  becomes        Swish(x)
    Mul(x, Sigmoid(Mul(x, 1.702)))      becomes        Swish(x) {alpha=1.702}
    Div(x, Add(Exp(Neg(x)), 1))         becomes        Swish(x)

Only for targets that take Swish as one operator (it is new in opset 24): elsewhere it would be taken apart again. A gate
with a factor of its own for each channel stays, as do those whose factor is computed.
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
from perwatt.patterns import Either, Match, Number, Op, Var, is_stored, number


@dataclass(frozen=True)
class FuseSwish(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    depends_on_target: ClassVar[bool] = True
    roots: ClassVar[tuple[str, ...]] = ("Mul", "Div")
    what: ClassVar[str] = "Swish put together"
    opset: ClassVar[int] = 24
    operator: ClassVar[str | None] = "Swish"

    def patterns(self) -> Sequence[Op]:
        return _patterns()

    def check(self, match: Match) -> Iterator[str]:
        if not math.isfinite(_alpha(match)):
            yield "its factor is not one finite number"
        yield from refusals(match)

    def rewrite(self, match: Match, build: Builder) -> Any:
        alpha = _alpha(match)
        return build.op("Swish", match["x"], alpha=alpha if alpha != 1 else None)


@cache
def _patterns() -> tuple[Op, ...]:
    x = Var("x")
    times, by, negative = (Var(name, where=is_stored) for name in ("times", "by", "negative"))
    scaled = Either(x, Op("Mul", x, times), Op("Div", x, by))
    minus = Op("Neg", x)
    negated = Either(Op("Neg", scaled), Op("Mul", minus, times), Op("Div", minus, by), Op("Mul", x, negative))
    one_plus_exp = Op("Add", Op("Exp", negated), Number(1))
    gate = Either(Op("Sigmoid", scaled), Op("Reciprocal", one_plus_exp), Op("Div", Number(1), one_plus_exp))
    return Op("Mul", x, gate), Op("Div", x, one_plus_exp)


def _alpha(match: Match) -> float:
    """α, whichever way it is written; NaN where it isn't one number."""
    if "by" in match.values:
        return 1 / (number(match["by"]) or math.nan)
    for name, sign in (("times", 1), ("negative", -1)):
        if name in match.values:
            found = number(match[name])
            return math.nan if found is None else sign * found
    return 1.0
