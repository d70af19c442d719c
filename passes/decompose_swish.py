"""Write Swish out as a product with a logistic function, for backends that have no kernel for it.

swish(x) = x · σ(αx). The operator is new in opset 24, and a backend that doesn't know it runs the function that stands for it
in the standard: three operators, none of which it recognizes. Two in a form that is older it does.

    Swish(x)                  becomes        Mul(x, Sigmoid(x))
    Swish(x) {alpha=1.702}    becomes        Mul(x, Sigmoid(Mul(x, 1.702)))

Behind a convolution 0.5 times the CPU time in ONNX Runtime (docs/fusion.md). Only for backends that say which operators they
take whole, and not Swish. A Swish with another α than 1 whose type isn't noted stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._reusing import kept_once
from perwatt.patterns import Match


@dataclass(frozen=True)
class DecomposeSwish(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    roots: ClassVar[tuple[str, ...]] = ("Swish",)
    what: ClassVar[str] = "Swish written out"
    takes_apart: ClassVar[str | None] = "Swish"
    depends_on_target: ClassVar[bool] = True

    def find(self, node: Any) -> Iterator[Match]:
        yield Match(node, (node,), (node.outputs[0],))

    def check(self, match: Match) -> Iterator[str]:
        if _alpha(match.root) != 1 and match.root.inputs[0].dtype is None:
            yield "its type isn't known"

    def rewrite(self, match: Match, build: Builder) -> Any:
        x, alpha = match.root.inputs[0], _alpha(match.root)
        gate = x if alpha == 1 else build.op("Mul", x, kept_once(build, np.asarray(alpha).astype(x.dtype.numpy())))
        return build.op("Mul", x, build.op("Sigmoid", gate))


def _alpha(swish: Any) -> float:
    return float(swish.attributes.get_float("alpha", 1.0))
