"""What a quantized model leaves in floating point, carried in half precision where the graph's types are what runs.

On processors the operating point says whether the rest runs in bfloat16; TensorRT and others run what the graph says, and a
float32 rest would cost there what int8 saves. So scales, biases and all arithmetic beside the integers go to half, but for what
doesn't bear it, as `cast-half` finds by measuring.
"""

from __future__ import annotations

from typing import Literal

from perwatt.artifact import Artifact, Step
from perwatt.contract import Capabilities, Context
from perwatt.fusion import opset_refusal, raise_opset
from perwatt.passes.cast_half import CastHalf

Rest = Literal["auto", "float32", "half"]
SHORT = {"bfloat16": "bf16", "float16": "f16"}
OPSET = {"bfloat16": 22, "float16": 19}
"""The first with such scales in QuantizeLinear, and with such arithmetic."""


def graph_decides(capabilities: Capabilities) -> bool:
    """Whether half precision is for the graph to say, and not for the operating point."""
    halves = capabilities.half_types
    return bool(halves) and SHORT.get(halves[0]) not in capabilities.floating_precisions


def with_rest(artifact: Artifact, context: Context, rest: Rest) -> tuple[Artifact, list[str]]:
    """The quantized artifact with its rest in half where `rest` wants that, and what was done about it."""
    halves = context.capabilities.half_types
    if rest == "float32" or (rest == "auto" and not graph_decides(context.capabilities)):
        return artifact, []
    if not halves:
        return artifact, ["the rest stays in float32: this backend has no half-precision arithmetic"]
    half = halves[0]
    if reason := opset_refusal(artifact.model, OPSET[half]):
        return artifact, [f"the rest stays in float32: {reason}"]
    model = artifact.edit()
    raise_opset(model, OPSET[half])

    newer = artifact.after(model, Step("opset"))
    cast = CastHalf()
    if reasons := list(cast.requires(newer, context)):
        return artifact, [f"the rest stays in float32: {'; '.join(reasons)}"]
    made, words = cast.run(newer, context)
    return (made, [f"the rest: {word}" for word in words]) if made is not newer else (artifact, [])
