"""Quantize convolutions and matrix products to 8-bit floating point: E4M3, four bits of exponent and three of mantissa.

As int8 it takes a quarter of the bytes, and runs at twice the rate of float16 on matrix units that have it. Its steps grow
with the numbers, so that one scale for a tensor with outliers costs the small values little, where int8 needs SmoothQuant
or a scale for each channel: it is the safer choice for transformers. It doesn't pay where the hardware has none
(`Capabilities.quantization_styles` then names no such type), nor on small layers, where the conversions cost more than the
product saves.

    Conv(x, W)        becomes        Conv(DQ(Q(x)), DQ(W:float8))

Q/DQ pairs stand on what products read and on their weights, saturating, with a zero point of 0. The scale is the peak ÷ 448,
the largest finite number of the type (Micikevicius et al., "FP8 formats for deep learning", 2022, section 3). Ranges are
extremes, not searched for: of a floating-point grid all steps but the smallest are relative, so a narrower range cuts off the
largest values and resolves no other better, down to 1/28672 of the peak; what is smaller vanishes beside it anyway.

Lossy: accuracy decides. Needs calibration samples; synthetic ones serve to learn the speed, and the result is not shipped
then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, QuantizationStyle, Stage, Tolerance
from perwatt.errors import PassError
from perwatt.fusion import opset_refusal, raise_opset
from perwatt.passes._naming import matching, with_names
from perwatt.passes._placement import PRODUCTS
from perwatt.passes._quantized import quantized_already
from perwatt.passes._quantizer import Wish, quantize
from perwatt.passes._quantizing import FLOAT8

OPSET = 19
"""The first with float8 in QuantizeLinear."""


@dataclass(frozen=True)
class QuantizeFp8(Pass):
    """`exclude`: shell patterns of node names that stay in floating point, as `/layer1/*`.
    `subset_size`: calibration samples used at most (search: 64 … 1000)."""

    stage: ClassVar[Stage] = Stage.PRECISION
    in_default: ClassVar[bool] = True
    tolerance: ClassVar[Tolerance | None] = None
    depends_on_target: ClassVar[bool] = True
    isolated: ClassVar[bool] = True

    exclude: tuple[str, ...] = ()
    subset_size: int = 300

    def check_settings(self) -> None:
        if self.subset_size < 1:
            raise PassError(f"{self.subset_size} calibration samples: at least 1", fix="subset_size: 300")

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        if self._style(context) is None:
            yield "this backend has no float8 arithmetic here"
        if reason := quantized_already(artifact):
            yield reason
        if reason := opset_refusal(artifact.model, OPSET):
            yield reason
        if not any(op in artifact.operator_counts() for op in PRODUCTS):
            yield "no convolution or matrix product to quantize"

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        style = self._style(context)
        assert style is not None, "`requires` asks for one"
        if not len(context.samples("calibrate")):
            raise PassError("there are no samples to calibrate on")
        named = with_names(artifact, self.step([]))
        excluded = matching(self.exclude, named.model.graph)
        wish = Wish(
            style, excluded, style.operators, "minmax", 0.0, bias_correction=False, subset_size=self.subset_size
        )
        found = quantize(named, context, wish)
        if found is None:
            return artifact, ["nothing was found worth quantizing"]
        model = found.artifact.edit()
        raise_opset(model, OPSET)
        pairs = sum(node.op_type == "DequantizeLinear" for node in model.graph)
        changes = [f"{pairs} tensors quantized to float8 (E4M3) {found.words()}"]
        return artifact.after(model, self.step(changes)), changes

    def _style(self, context: Context) -> QuantizationStyle | None:
        """The backend's first style in this type."""
        return next((s for s in context.capabilities.quantization_styles if s.weight_type == FLOAT8), None)
