"""Carry floating point in half the bits: weights are stored and arithmetic is done in bfloat16 or float16.

bfloat16 keeps the exponent of float32 and 8 bits of the mantissa, so its range is the same (the last 0.4 % below the
largest float32 is cut off, where masks like to live); what it loses is precision, two to three decimal digits remain.
float16 keeps 11 bits and ends at 65504, and at 6e-8 below. Either pays where the hardware has matrix units for it
(`Capabilities.half_types`, the best first), and halves the file everywhere. It doesn't pay where the backend converts back.

    x:f32 → Conv(W:f32) → y:f32      becomes      x:f32 → Cast(bf16) → Conv(W:bf16) → Cast(f32) → y:f32

Some operators don't bear it: values grow beyond 65504, squares are summed up, positions beyond 256 are told apart no more. These
are no list of names: the model is run once, in float32, on calibration samples (synthetic ones tell as much as they
resemble real ones), with a twin beside every operator that reads the same inputs rounded. What would overflow, vanish or move
too far stays in float32, between casts:

    Cast(bf16) → Mul(positions) → Sin      becomes      Mul(positions:f32):f32 → Sin → Cast(bf16)

So do operators that ONNX has no such type for. The ledger says which, and why.

Inputs and outputs keep their types. Lossy: accuracy on the lowered program decides, not a tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from perwatt.artifact import Artifact, Step, graphs_of
from perwatt.contract import Context, Pass, Stage, Tolerance
from perwatt.errors import BackendError
from perwatt.fusion import names_in
from perwatt.passes._half_casting import carry_in_half
from perwatt.passes._half_deciding import decide
from perwatt.passes._half_measuring import TYPES, HalfType, Measured, floats_stored, is_float, measure
from perwatt.passes._quantized import quantized_already

QUANTIZING = ("quantize-int8", "assign-precision", "quantize-fp8")
OLDEST = {"bfloat16": 22, "float16": 13}
"""The opsets that define convolutions in bfloat16, and in whose form float16 graphs are measured."""


@dataclass(frozen=True)
class CastHalf(Pass):
    """`type`: `bfloat16`, `float16`, or `auto`, the first that the backend names (search: both).
    `margin`: how much less than the largest half is trusted, since samples don't show all (search: 1 … 8).
    `bearable`: the share that rounding its inputs may move an operator's output by, mean |Δ| ÷ mean |output|
    (search: 0.02 … 0.2).
    `subset_size`: samples that are looked at, at most."""

    stage: ClassVar[Stage] = Stage.PRECISION
    in_default: ClassVar[bool] = True
    tolerance: ClassVar[Tolerance | None] = None
    depends_on_target: ClassVar[bool] = True

    type: Literal["auto", "bfloat16", "float16"] = "auto"
    margin: float = 2.0
    bearable: float = 0.05
    subset_size: int = 32

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        half, opset = self._half(context), artifact.model.opset_imports.get("", 0)
        if half is None:
            wanted = "half-precision" if self.type == "auto" else self.type
            yield f"this backend has no {wanted} arithmetic here"
        elif opset < OLDEST[half.name]:
            what = "bfloat16 convolutions need" if half.name == "bfloat16" else "float16 needs"
            yield f"{what} opset {OLDEST[half.name]}, this model is opset {opset}"
        # What passes have quantized before has a rest in floating point, and nothing is rounded twice.
        ours = any(step.name in QUANTIZING for step in artifact.steps)
        if not ours and (reason := quantized_already(artifact)):
            yield reason
        if ours and opset < 19:
            yield f"scales in half need opset 19, this model is opset {opset}"
        if artifact.model.functions:
            yield "the model has functions of its own, whose types can't be changed"
        if len(list(graphs_of(artifact.model))) > 1 + len(artifact.model.functions):
            yield "the model has control flow, whose branches would need casts of their own"
        foreign = sorted({node.domain for node in artifact.model.graph} - {""})
        if foreign:
            yield f"operators of the domain {foreign[0]} can't be told to give half"

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        if any(step.name == self.name() for step in artifact.steps):
            return artifact, ["carried in half already"]
        half = self._half(context)
        assert half is not None, "`requires` asks for one"
        typed = _with_types(artifact)
        model = typed.edit()
        if not any(True for _ in floats_stored(model.graph)):
            return artifact, ["no float32 weights to store in half"]
        measured, notes = self._measured(typed, half, context)
        decided = decide(model.graph, half, measured, lambda node: _without(node, half), self.margin, self.bearable)
        notes = [*decided.words(half), *notes]
        weights = carry_in_half(model.graph, half, decided.kept, decided.masks, names_in(model))
        if not weights:
            return artifact, ["no float32 weights to store in half", *notes]
        rest = "all arithmetic" if not decided.kept else "other arithmetic"
        changes = [f"{weights} weights and {rest} between inputs and outputs in {half.name}", *notes]
        return artifact.after(model, self.step(changes)), changes

    def _half(self, context: Context) -> HalfType | None:
        """The type that is wanted and there."""
        offered = [name for name in context.capabilities.half_types if name in TYPES]
        found = next((name for name in offered if self.type in ("auto", name)), None)
        return TYPES[found] if found else None

    def _measured(self, artifact: Artifact, half: HalfType, context: Context) -> tuple[Measured, list[str]]:
        """What the samples show, and what there is to say where they show nothing."""
        samples = context.samples("calibrate")
        if not len(samples):
            return Measured(), ["there were no samples to look for overflow on"]
        try:
            return measure(artifact, half, samples, context, self.subset_size), []
        except BackendError as error:
            return Measured(), [f"not looked at for overflow: {error}"]


def _with_types(artifact: Artifact) -> Artifact:
    """The artifact with types noted, where some are not: what is no float32 can't be cast."""
    import onnx_ir.passes.common as common

    if all(value.dtype is not None for node in artifact.model.graph for value in node.outputs):
        return artifact
    model = artifact.edit()
    common.ShapeInferencePass()(model)
    return artifact.after(model, Step("infer-shapes"))


def _without(node: Any, half: HalfType) -> bool:
    """Whether ONNX defines `node` for float32, which flows through it here, and not for the half type."""
    import onnx

    version = node.graph.opset_imports[""] if node.version is None else node.version
    try:
        schema = onnx.defs.get_schema(node.op_type, version)
    except onnx.defs.SchemaError:
        return False
    return any(
        is_float(value) and "tensor(float)" in port.types and f"tensor({half.name})" not in port.types
        for values, ports in ((node.inputs, schema.inputs), (node.outputs, schema.outputs))
        for value, port in zip(values, _repeated(ports, len(values)), strict=False)
        if value is not None
    )


def _repeated(ports: Any, count: int) -> list[Any]:
    """A variadic last port stands for all that follow."""
    return [*ports, *[ports[-1]] * (count - len(ports))] if ports else []
