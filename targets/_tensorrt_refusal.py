"""What TensorRT's ONNX parser says of a model that it refuses, in words, and the rewrite that would help.

The parser's own description comes first and whole: it names the node and the assertion that failed. The advice is a
table of patterns over operator and description, the first that fits wins; where none does, another backend is named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perwatt.errors import BackendError

if TYPE_CHECKING:
    import tensorrt as trt  # type: ignore[import-not-found, unused-ignore]

MOST_SHOWN = 5
"""Errors in a message; the parser goes on after the first and may find hundreds."""

ELSEWHERE = "other backends may take it as it is: --target onnxruntime:cuda or --target inductor:cuda"


@dataclass(frozen=True)
class Refusal:
    """One error of the parser. `code` is its name for the kind, `node` the node's place in the graph, -1 for none."""

    code: str
    node: int
    name: str
    operator: str
    description: str

    def words(self) -> str:
        place = f"node {self.node}" if self.node >= 0 else "the model"
        place += f" {self.name!r}" if self.name else ""
        place += f" ({self.operator})" if self.operator else ""
        return f"{place}: {self.code}: {self.description}"

    def rewrite(self) -> str | None:
        """What to change so that TensorRT takes it; None where nothing is known."""
        text = f"{self.code} {self.description}"
        for operators, pattern, advice in REWRITES:
            if (not operators or self.operator in operators) and re.search(pattern, text, re.IGNORECASE):
                return advice
        return None


def parser_refusals(parser: trt.OnnxParser) -> list[Refusal]:
    """All that the parser found wrong, in order."""
    found = []
    for position in range(parser.num_errors):
        error: trt.ParserError = parser.get_error(position)
        description = re.sub(r"\s+", " ", error.desc()).strip()
        found.append(Refusal(error.code().name, error.node(), error.node_name(), error.node_operator(), description))
    return found


def refused(refusals: list[Refusal], logged: str) -> BackendError:
    """The error to raise for them; `logged` is what stands in the log, for where the parser itself lists nothing."""
    if not refusals:
        return BackendError(f"TensorRT's parser refused the model: {logged}", fix=ELSEWHERE)
    shown = list(dict.fromkeys(refusal.words() for refusal in refusals))
    words = "; ".join(shown[:MOST_SHOWN])
    words += f"; and {len(shown) - MOST_SHOWN} more" if len(shown) > MOST_SHOWN else ""
    advice = list(dict.fromkeys(found for refusal in refusals if (found := refusal.rewrite())))
    return BackendError(f"TensorRT's parser refused the model: {words}", fix="; ".join(advice[:3]) or ELSEWHERE)


_QDQ = ("QuantizeLinear", "DequantizeLinear")
_INTEGER = ("DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")
_SEQUENCES = (
    "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
    "SequenceMap", "SplitToSequence", "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement",
)  # fmt: skip
_STRINGS = ("StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch", "TfIdfVectorizer")
_BITS = ("BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor")
_SPECTRA = ("DFT", "STFT", "MelWeightMatrix", "HannWindow", "HammingWindow", "BlackmanWindow")

REWRITES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (_QDQ, r"zero.?p(oin)?t|shiftIsAllZeros|asymmetric|uint8",
     "TensorRT's quantization is symmetric: quantize with symmetric activations (quantize-int8 with activations: symmetric)"),
    (_QDQ, r"axis|scale",
     "weights want one scale for each output channel and activations one scale: quantize anew with quantize-int8"),
    (_INTEGER, "",
     "TensorRT wants quantization as QuantizeLinear and DequantizeLinear pairs: start from the floating-point model, "
     "quantize-int8 writes them"),
    ((), r"\bdouble\b|float64|FLOAT64", "TensorRT has no float64: call .float() on the module before it is exported"),
    ((), r"opset", "the file's opset is newer than this TensorRT knows: export with opset_version=20, or take a newer TensorRT"),
    ((), r"uint8.*intermediate|intermediate.*uint8",
     "TensorRT takes uint8 at inputs and outputs only: cast to float right behind the input"),
    (("NonZero", "Compress", "Unique"), "",
     "its output's size depends on the data: end the model before it, or use a mask (Where) or TopK of a fixed size"),
    (("Loop", "Scan"), "", "unroll the loop when exporting (a fixed number of rounds), or keep the shapes it carries fixed"),
    (("If",), "", "export only the branch that is taken: fix what the condition depends on, then fold-constants removes it"),
    (_SEQUENCES, "", "lists of tensors and optional values have to go: export the module with plain tensors in and out"),
    (_STRINGS, "", "text has to be handled before the model: export from the token ids on"),
    (_BITS, "", "write bit operations as arithmetic (a shift is a product with a power of two)"),
    (_SPECTRA, "", "write the transform as a convolution or matrix product with fixed weights, or do it before the model"),
    (("MaxPool",), r"indices", "its Indices output is not there in TensorRT: leave return_indices out"),
    (("TopK",), "", "K has to be below 3840 and the result sorted"),
    (("Reshape", "Squeeze", "Unsqueeze", "Slice", "Pad", "Tile", "Expand"), r"initializer|constant|static",
     "its sizes have to be constants: give the inputs fixed shapes, then fold-constants makes them so"),
    (("Resize", "Upsample"), "", "nearest or linear without antialias are there: change the mode in the module"),
    ((), r"plugin|no importer|creator", "the operator is none of ONNX's own: export with standard ones, or register a plugin"),
)  # fmt: skip
"""(operators or none for any, pattern in the error, what to do)."""
