"""Store the weights of matrix products in 4 or 8 bits; arithmetic and activations stay in floating point.

A decoder that makes one token after the other reads all of its weights for each, so that memory bandwidth is what it waits
for, and a weight in an eighth of the bytes is read in an eighth of the time. It pays for large matrices and small batches:
with many tokens at once the arithmetic counts, which takes as long as before and unpacking on top. Codes stand in the graph
with a scale (and for `uint4` a zero point) for each group of inputs, as ONNX's blocked quantization (opset 21), which
backends take into the product:

    MatMul(x, W)        becomes        MatMul(x, DequantizeLinear(codes:int4, scales) {axis=0, block_size=64})

Codes lie [in, out] whatever the product was (a Gemm loses its transB), and where a product's inputs are no multiple of the
group size that is halved until they are: what ONNX Runtime doesn't know it dequantizes at every inference.

- `round`: the nearest codes, scales clipped to the least squared error. Needs no data.
- `awq`: input channels with large activations count more, so their weights are multiplied by s = (√mean x²)^α before
  rounding and the input is divided by it, in the scale of the normalization before or a Mul; α by least output error (Lin
  et al., "AWQ: activation-aware weight quantization for LLM compression and acceleration", MLSys 2024; who takes mean |x|).
- `gptq`: column after column is rounded, and those left make up for what it lost, as far as inputs are correlated (Frantar
  et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers", ICLR 2023).

The last two see activations as XᵀX, [in, in], summed inside one graph on the calibration samples, for several layers at
once: at most 256 MB of sums and as much for what a batch adds, or one layer's where that is more. All are taken from the
model as it was, not behind layers already quantized.

Lossy: accuracy decides. Beside codes OpenVINO (in f32) and ONNX Runtime round activations to 8 bits in groups by themselves,
about 1 % of a block's outputs, which the numeric reference doesn't show and the lowered program does. AWQ looks for the least
error of each product's outputs, which need not be that of the model's. Weights in other types than float32, or inside
branches and loops, stay as they are.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, Stage, Tolerance
from perwatt.data import Samples
from perwatt.errors import PassError
from perwatt.fusion import names_in, opset_refusal, raise_opset, remove_unused
from perwatt.passes import _weight_quantizers as quantizers
from perwatt.passes._weight_quantizers import Codes, Layer
from perwatt.patterns import stored

OPSET = 21
"""The first with blocked quantization and 4-bit types."""
IR_VERSION = 10
"""The same of the file format."""
BY = {"round": "rounded", "awq": "by AWQ", "gptq": "by GPTQ"}


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """`type`: of the codes; `uint4` has zero points (search: all).
    `group_size`: inputs that share a scale; 0: all of an output channel's (search: 0, 32, 64, 128).
    `algorithm`: `round`, `awq` or `gptq` (search: all).
    `exclude`: shell patterns of node names that stay in floating point, as `/head`.
    `embeddings`: tables of Gather in int8, too, with a scale for each row. OpenVINO reads only the rows that it needs; ONNX
    Runtime dequantizes the whole table every time, so measure it.
    `subset_size`: calibration samples used at most; `round` needs none (search: 32 … 512).
    `damping`: of GPTQ: what is added to the diagonal of XᵀX, relative to its mean (search: 0.001 … 0.1)."""

    stage: ClassVar[Stage] = Stage.PRECISION
    tolerance: ClassVar[Tolerance | None] = None
    depends_on_target: ClassVar[bool] = True
    isolated: ClassVar[bool] = True

    type: Literal["int4", "uint4", "int8"] = "int4"
    group_size: int = 64
    algorithm: Literal["round", "awq", "gptq"] = "round"
    exclude: tuple[str, ...] = ()
    embeddings: bool = False
    subset_size: int = 128
    damping: float = 0.01

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        styles = context.capabilities.quantization_styles
        if not any(style.activation_type == "float" and style.weight_type == self.type for style in styles):
            yield f"this backend has no products of {self.type} weights and floating-point activations"
        if reason := opset_refusal(artifact.model, OPSET):
            yield reason
        counts = artifact.operator_counts()
        if any(op in counts for op in ("DequantizeLinear", "QLinearConv", "QLinearMatMul")):
            yield "the model is quantized already"
        elif not quantizers.products(artifact.model.graph) and not (self.embeddings and _tables(artifact.model.graph)):
            yield "no matrix product with stored weights"

    def check_settings(self) -> None:
        if self.group_size < 0:
            raise PassError(f"a group size of {self.group_size}: it must be 0 or more", fix="group_size: 128")
        if self.subset_size < 1 or self.damping < 0:
            raise PassError(
                "subset_size must be 1 or more and damping 0 or more", fix="subset_size: 128, damping: 0.01"
            )

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        self.check_settings()
        model = artifact.edit()
        graph, taken = model.graph, names_in(model)
        left_out = _matching(self.exclude, graph)
        found, refused = quantizers.layers(graph, self.type, self.group_size, left_out)
        notes: Counter[str] = Counter()
        for layer, codes in self._coded(artifact, found, context, graph, taken, notes):
            quantizers.put_codes(graph, layer, codes, self.type, taken)
        tables = [node for node in _tables(graph) if node not in left_out] if self.embeddings else []
        for node in tables:
            quantizers.put_table(graph, node, taken)
        left = [f"{times} left: {reason}" for reason, times in refused.most_common()]
        if not found and not tables:
            return artifact, ["nothing was found worth quantizing", *left]
        remove_unused(model)
        raise_opset(model, OPSET)
        model.ir_version = max(model.ir_version, IR_VERSION)
        changes = [*self._words(found, context), *(f"{len(tables)} tables in int8" for _ in tables[:1])]
        changes += [*(f"{times} {note}" for note, times in notes.most_common()), *left]
        return artifact.after(model, self.step(changes)), changes

    def _coded(
        self,
        artifact: Artifact,
        found: Sequence[Layer],
        context: Context,
        graph: Any,
        taken: set[str],
        notes: Counter[str],
    ) -> Iterator[tuple[Layer, Codes]]:
        """Each layer with its codes. AWQ divides inputs in `graph` on the way; `notes`: what is told besides."""
        if self.algorithm == "round" or not found:
            for layer in found:
                yield layer, quantizers.by_rounding(layer.weight, layer.group, self.type)
            return
        samples = self._samples(context)
        done = 0
        for several in quantizers.rounds(found):
            context.progress(f"quantizing weights: {done} of {len(found)} products")
            widths = {inputs: group[0].weight.shape[1] for inputs, group in several.items()}
            moments = quantizers.second_moments(artifact, widths, samples, context)
            for inputs, group in several.items():
                coded = self._by_data(group, moments.pop(inputs), graph, taken, notes)
                yield from zip(group, coded, strict=True)
                done += len(group)

    def _by_data(
        self, group: Sequence[Layer], moments: Any, graph: Any, taken: set[str], notes: Counter[str]
    ) -> list[Codes]:
        """Codes of layers with one input, or with the same several."""
        if self.algorithm == "gptq":
            if (codes := quantizers.by_gptq(group, moments, self.type, self.damping)) is not None:
                return codes
            notes["rounded: their inputs are no good to GPTQ"] += len(group)
        elif len(group[0].inputs) > 1:
            notes["rounded: AWQ can't scale several inputs of shared weights"] += len(group)
        elif (scales := quantizers.awq_scales(group, moments, self.type)) is not None:
            inside = quantizers.divide_input(graph, group, scales, taken)
            notes[f"inputs divided {'by the operator that makes them' if inside else 'by a Mul'}"] += 1
            scaled = (layer.weight * scales for layer in group)
            return [
                quantizers.by_rounding(weight, layer.group, self.type)
                for weight, layer in zip(scaled, group, strict=True)
            ]
        return [quantizers.by_rounding(layer.weight, layer.group, self.type) for layer in group]

    def _samples(self, context: Context) -> Samples:
        samples = context.samples("calibrate").take(self.subset_size, context.seed)
        if not len(samples):
            raise PassError("there are no samples to calibrate on")
        return samples

    def _words(self, found: Sequence[Layer], context: Context) -> Iterator[str]:
        """What was done, for the ledger: products by the groups they got."""
        data = "" if self.algorithm == "round" or not found else f" on {len(self._samples(context))} samples"
        groups: Counter[str] = Counter()
        for layer in found:
            whole = layer.group == layer.weight.shape[1]
            groups["one group a channel" if whole else f"groups of {layer.group}"] += len(layer.nodes)
        for words, times in groups.most_common():
            yield f"weights of {times} products in {self.type} with {words}, {BY[self.algorithm]}{data}"


def _tables(graph: Any) -> list[Any]:
    """Gather nodes that look rows up in a stored float32 matrix."""
    nodes = (node for node in graph if node.op_type == "Gather" and node.domain == "")
    rows = (node for node in nodes if node.attributes.get_int("axis", 0) in (0, -2))
    return [node for node in rows if _is_table(stored(node.inputs[0]))]


def _is_table(array: Any) -> bool:
    return array is not None and array.ndim == 2 and array.dtype == np.float32 and bool(np.isfinite(array).all())


def _matching(exclude: tuple[str, ...], graph: Any) -> set[Any]:
    """The nodes that the patterns name; one without a name is called after its operator and place, as `MatMul_7`."""
    named = [(node.name or f"{node.op_type}_{number}", node) for number, node in enumerate(graph)]
    for pattern in exclude:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in named):
            names = ", ".join(name for name, _ in named[:3])
            raise PassError(f"exclude {pattern!r} matches no node; names look like {names}")
    return {node for name, node in named if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)}
