"""Quantize convolutions and matrix products to 8-bit integers, with scales found on calibration samples.

Weights get one symmetric scale a channel, activations one a tensor; both stand in the graph as QuantizeLinear and
DequantizeLinear pairs, so what the file says is what runs. A quarter of the weight bytes, and integer matrix units
where the hardware has them. It doesn't pay on small layers, where the conversions at the borders cost more than the
product saves: that is why it is measured before it is shipped.

    Conv(x, W)        becomes        Conv(DQ(Q(x)), DQ(W:int8))

What is quantized beside the products decides the speed, and each backend likes something else: additions and poolings in
integers keep a residual network in one type, and cost a transformer its accuracy. So there are several candidates, of which
the measured best is shipped: ours with the products alone, ours with the operators that the backend's style names too, and
NNCF's.

Ours: ranges of activations are extremes, or have the least mean squared error over a histogram of the calibration samples
(Sung, Shin and Hwang, "Resiliency of deep neural networks under quantization", 2015), which are read until ranges have
converged; outliers of a transformer's activations go into the weights (Xiao et al., "SmoothQuant", ICML 2023). Of these
choices, the one that moves outputs least is taken. What rounded weights shift on average is taken back in the bias (Nagel et
al., "Data-free quantization through weight equalization and bias correction", ICCV 2019).

Lossy: accuracy decides. Needs calibration samples; synthetic ones serve to learn the speed, and the result is not shipped
then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from perwatt import calibration
from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, QuantizationStyle, Stage, Tolerance
from perwatt.errors import PassError
from perwatt.passes import _nncf
from perwatt.passes._half_rest import Rest, with_rest
from perwatt.passes._naming import matching, with_names
from perwatt.passes._placement import PRODUCTS
from perwatt.passes._quantized import quantized_already
from perwatt.passes._quantizer import Ranges, Wish, integer_styles, quantize

OLDEST = 13
"""The opset since which DequantizeLinear has an axis."""


@dataclass(frozen=True)
class QuantizeInt8(Pass):
    """`exclude`: shell patterns of node names that stay in floating point, as `/layer1/*`.
    `subset_size`: calibration samples used at most (search: 64 … 1000).
    `quantizer`: ours or NNCF's (search: both).
    `operators`: `products` alone, or `all` that the backend's style names (search: both). Ours only.
    `ranges`: how activations' ranges are chosen: `mse`, `entropy`, `percentile`, the extremes (`minmax`), or `auto`: whichever
    of mse and minmax moves outputs less on calibration samples. Ours only.
    `activations`: `symmetric`, `asymmetric`, or `auto`, what the backend's first style asks for (search: both).
    `smooth`: how much of the outliers of matrix products' inputs goes into their weights, 0 to 1; without it, 0 or 0.85,
    whichever moves outputs less (search: 0, 0.5, 0.85). Ours only.
    `bias_correction`: take back in the bias what rounded weights shift. NNCF's always does.
    `model_type`: NNCF's scheme; `auto` looks for attention and layer normalization, and applies the transformer's there.
    `rest`: what stays in floating point is carried in `float32` or `half`; `auto`: in half on backends that run the types that
    the graph says, where no operating point could ask for it."""

    stage: ClassVar[Stage] = Stage.PRECISION
    in_default: ClassVar[bool] = True
    imports: ClassVar[tuple[str, ...]] = ("nncf",)
    variants: ClassVar = ({}, {"operators": "all"}, {"quantizer": "nncf"})
    tolerance: ClassVar[Tolerance | None] = None
    depends_on_target: ClassVar[bool] = True
    isolated: ClassVar[bool] = True

    exclude: tuple[str, ...] = ()
    subset_size: int = 300
    quantizer: Literal["own", "nncf"] = "own"
    operators: Literal["products", "all"] = "products"
    ranges: Ranges = "auto"
    activations: Literal["auto", "symmetric", "asymmetric"] = "auto"
    smooth: float | None = None
    bias_correction: bool = True
    model_type: Literal["auto", "plain", "transformer"] = "auto"
    rest: Rest = "auto"

    def check_settings(self) -> None:
        if self.subset_size < 1:
            raise PassError(f"{self.subset_size} calibration samples: at least 1", fix="subset_size: 300")
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise PassError(f"smooth is {self.smooth:g}: it must lie between 0 and 1", fix="smooth: 0.5")

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        if not integer_styles(context.capabilities):
            yield "this backend has no int8 arithmetic"
        if (opset := artifact.model.opset_imports.get("", 0)) < OLDEST:
            yield f"scales for each channel need opset {OLDEST}, this model is opset {opset}"
        if reason := quantized_already(artifact):
            yield reason
        if not any(op in artifact.operator_counts() for op in PRODUCTS):
            yield "no convolution or matrix product to quantize"

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        named = with_names(artifact, self.step([]))
        excluded = matching(self.exclude, named.model.graph)
        if not len(context.samples("calibrate")):
            raise PassError("there are no samples to calibrate on")
        style = self._style(context)
        found = (
            self._nncf(named, context, excluded, style)
            if self.quantizer == "nncf"
            else self._own(named, context, excluded, style)
        )
        if found is None:
            return artifact, ["nothing was found worth quantizing"]
        model, how = found
        pairs = sum(1 for node in model.graph if node.op_type == "DequantizeLinear")
        changes = [f"{pairs} tensors quantized to int8 {how}"]
        made, words = with_rest(artifact.after(model, self.step(changes)), context, self.rest)
        return artifact.after(made.edit(), self.step([*changes, *words])), [*changes, *words]

    def _style(self, context: Context) -> QuantizationStyle:
        """The first style of the backend with int8 weights and the wanted activations."""
        styles = integer_styles(context.capabilities)
        wanted = {"auto": styles[0].activation_symmetric, "symmetric": True, "asymmetric": False}[self.activations]
        found = next((style for style in styles if style.activation_symmetric is wanted), None)
        if found is None:
            raise PassError(f"this backend takes no {self.activations} activations")
        return found

    def _own(self, artifact: Artifact, context: Context, excluded: Sequence[str], style: QuantizationStyle) -> Any:
        operators = style.operators if self.operators == "all" else ()
        wish = Wish(style, excluded, operators, self.ranges, self.smooth, self.bias_correction, self.subset_size)
        found = quantize(artifact, context, wish)
        return None if found is None else (found.artifact.edit(), found.words())

    def _nncf(self, artifact: Artifact, context: Context, excluded: Sequence[str], style: QuantizationStyle) -> Any:
        samples = calibration.some(artifact, context.samples("calibrate"), self.subset_size, context.seed)
        calls = calibration.calls(artifact, samples, 1)
        transformer = _nncf.is_transformer(artifact) if self.model_type == "auto" else self.model_type == "transformer"
        symmetric = style.activation_symmetric
        model = _nncf.quantize(artifact, calls, excluded, symmetric, transformer, not style.unsigned_activations)
        if not any(node.op_type == "DequantizeLinear" for node in model.graph):
            return None
        scheme, preset = "transformer" if transformer else "plain", "performance" if symmetric else "mixed"
        return model, f"on {len(samples)} samples (NNCF, {scheme} scheme, {preset} preset)"
