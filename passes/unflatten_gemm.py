"""Let matrix products run on tensors as they are, where exporters flattened them to two axes first and split them after.

    Reshape(Gemm(Reshape(x: [b, 16, 64] → [16·b, 64]), W, c) → [b, 16, 192])      becomes      MatMul(x, W) + c

Two habits lead to this: torch's addmm (GPT-2's Conv1D) and TensorFlow's tensordot. The arithmetic is the same, but the
reshapes hide that the operators around the product work on the same tensor, so that projections aren't merged, attention
isn't found, and the element-wise operators before and after are not fused into it. Several products and element-wise
operators between two reshapes are taken together. It pays through the passes that come later; by itself it is neutral.

Left alone: products whose weights are computed, Gemm with factors alpha or beta, operands that lie along the flattened
axes, and shapes of which nobody can prove that they are those before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from perwatt.contract import Stage, Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._reshapes import RESHAPES, enclosed, rebuilt
from perwatt.patterns import Match, dims, given, is_stored, made_by


@dataclass(frozen=True)
class UnflattenGemm(Fusion):
    """No settings."""

    # The bias of a Gemm is added before the last block of a long sum, that of an Add after it.
    stage: ClassVar[Stage] = Stage.CLEAN
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    after: ClassVar[tuple[str, ...]] = ("move-transposes",)
    roots: ClassVar[tuple[str, ...]] = tuple(RESHAPES.split("|"))
    what: ClassVar[str] = "matrix products taken out of their reshapes"

    def find(self, node: Any) -> Iterator[Match]:
        match = enclosed(node, products=True)
        if match is not None:
            yield match

    def check(self, match: Match) -> Iterator[str]:
        gemms = [node for node in match.nodes if node.op_type == "Gemm"]
        if any(gemm.attributes.get_int("transA", 0) for gemm in gemms):
            yield "its first factor is transposed"
        if any(gemm.attributes.get_float(name, 1.0) != 1 for gemm in gemms for name in ("alpha", "beta")):
            yield "its Gemm has a factor"
        if any(gemm.attributes.get_int("transB", 0) and len(list(gemm.inputs[1].uses())) > 1 for gemm in gemms):
            yield "its transposed weight is used elsewhere too, and a second copy would make the model larger"
        biased = [gemm for gemm in gemms if len(given(gemm)) > 2]
        if not all(_is_row(gemm.inputs[2]) for gemm in biased):
            yield "its bias is not one stored row"
        if len(biased) > 1 + _reshapes_saved(match):
            yield "others use its reshapes too, so that it would cost more operators than it saves"

    def rewrite(self, match: Match, build: Builder) -> Any:
        return rebuilt(match.named["piece"], build, {})


def _is_row(bias: Any) -> bool:
    return is_stored(bias) and all(length == 1 for length in (dims(bias) or [])[:-1])


def _reshapes_saved(match: Match) -> int:
    """How many of the reshapes that the stretch begins with nobody else needs."""
    begin = {made_by(value, RESHAPES) for node in match.nodes[1:] for value in given(node)} - {None}
    return sum(
        not reshape.outputs[0].is_graph_output() and all(use.node in match.nodes for use in reshape.outputs[0].uses())
        for reshape in begin
    )
