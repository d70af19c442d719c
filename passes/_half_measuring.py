"""What half precision would do to a model's values, measured on samples by one graph run once in float32.

The graph is the model with a few reductions behind every floating-point value, and a twin of every operator that
calculates, which reads the same inputs rounded to the half type. What comes out, for each value:

- its finite extremes;
- how much of it rounding takes away (all of it where it is smaller than the type can hold);
- how far its operator's output moves when inputs and weights are rounded, and when inputs alone are;
- for sums, averages, normalizations and softmax, the largest that partial sums may become.

Shares are mean |Δ| ÷ mean |value|, over what lies within the type's range. Products (convolutions, matrix products) count no
partial sums: matrix units add up in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from perwatt import calibration
from perwatt.artifact import Artifact, Step
from perwatt.contract import Context
from perwatt.data import Samples
from perwatt.fusion import Builder, names_in, remove_unused
from perwatt.patterns import axes_of, dims, is_stored, rank, stored
from perwatt.signature import rows

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOVING = (
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Slice", "Split", "Expand", "Tile", "Concat",
    "DepthToSpace", "SpaceToDepth", "Gather", "GatherElements", "GatherND", "Trilu",
)  # fmt: skip
"""Values come out as they are, at other places: what holds of their inputs holds of them."""
EXACT = (*MOVING, "Relu", "MaxPool", "GlobalMaxPool", "Min", "Max", "Abs", "Neg", "Where", "Dropout")
"""Rounding their inputs rounds their output, and no more."""
RANDOM = ("RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
SUMS = ("ReduceSum", "ReduceMean", "ReduceL1", "GlobalAveragePool")
SQUARES = (
    "ReduceSumSquare", "ReduceL2", "LayerNormalization", "RMSNormalization", "InstanceNormalization",
    "GroupNormalization",
)  # fmt: skip
INTEGERS = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
BATCHES = 8
"""As many calls as the worker runs with one compilation."""


@dataclass(frozen=True)
class HalfType:
    """A half type: `largest` finite value, `rounding` (half a step, relative), and what a value is cut to that only says
    "never": so far from the end of float16 that a score or a second such value may still be added."""

    name: str
    largest: float
    rounding: float
    lowest: float

    @property
    def ir(self) -> Any:
        """As onnx_ir names it."""
        import onnx_ir as ir

        return ir.DataType[self.name.upper()]


TYPES = {
    "bfloat16": HalfType("bfloat16", (2 - 2**-7) * 2.0**127, 2.0**-9, -(2 - 2**-7) * 2.0**127),
    "float16": HalfType("float16", 65504.0, 2.0**-12, -32752.0),
}


@dataclass
class Measured:
    """By the name of a value: finite extremes, the share that rounding takes, how far rounded inputs move it (with rounded
    weights, and with exact ones), and bounds on partial sums."""

    extremes: dict[str, tuple[float, float]] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    moved_by_inputs: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    samples: int = 0


def is_float(value: Any) -> bool:
    """Whether a value is known to be float32."""
    return value is not None and value.dtype is not None and value.dtype.name == "FLOAT"


def measure(artifact: Artifact, half: HalfType, samples: Samples, context: Context, most: int) -> Measured:
    """`most`: samples. Raises BackendError where the model can't be run."""
    made, asked = _instrumented(artifact, half)
    calls = calibration.in_random_order(
        calibration.calls(artifact, calibration.some(artifact, samples, most, context.seed)), context.seed
    )
    calls = calls[:BATCHES]
    found = Measured()
    totals: dict[str, float] = {}
    for call, batch in zip(calls, context.execute(made, Samples(calls), (), True), strict=False):
        found.samples += rows(call)
        for key, found_here in batch.items():
            totals[key] = _joined(key, totals.get(key), float(found_here))
    for number, name in enumerate(asked):
        found.extremes[name] = totals[f"low_{number}"], totals[f"high_{number}"]
        size = totals[f"size_{number}"]
        for part, into in (("lost", found.lost), ("moved", found.moved), ("inputs", found.moved_by_inputs)):
            if f"{part}_{number}" in totals:
                into[name] = _share(totals[f"{part}_{number}"], size)
        if f"sum_{number}" in totals:
            found.sums[name] = totals[f"sum_{number}"]
    return found


def _joined(key: str, before: float | None, now: float) -> float:
    """What was measured on all calls so far."""
    if before is None:
        return now
    kind = key.split("_")[0]
    return min(before, now) if kind == "low" else max(before, now) if kind in ("high", "sum") else before + now


def _share(moved: float, size: float) -> float:
    """Relative to the size; a size beyond float32 tells nothing."""
    if math.isinf(size):
        return 0.0
    if math.isnan(moved):
        return math.inf
    return moved / size if size else (0.0 if moved == 0 else math.inf)


# The graph ------------------------------------------------------------------------------------------------------------


def _instrumented(artifact: Artifact, half: HalfType) -> tuple[Artifact, list[str]]:
    """The model that gives what is measured of the i-th of the values named, as `low_i` and so on, and nothing else."""
    model = artifact.edit()
    graph = model.graph
    looking = _Looking(graph, half, names_in(model))
    for node in list(graph):
        looking.at_node(node)
    # What nobody calculates with is still held by somebody, and has to fit.
    for value in graph.inputs:
        if is_float(value):
            looking.rounded(value)
    graph.outputs.clear()
    graph.outputs.extend(looking.outputs)
    remove_unused(model)
    graph.sort()
    for number, node in enumerate(graph):
        # Nodes that came without a name were given ones that two may share.
        node.name = f"node_{number}"
    return artifact.after(model, Step("instrument")), looking.asked


class _Looking:
    """Puts the reductions and twins in."""

    def __init__(self, graph: Any, half: HalfType, taken: set[str]) -> None:
        self.graph, self.half, self.taken = graph, half, taken
        self.asked: list[str] = []
        self.outputs: list[Any] = []
        self._rounded: dict[str, Any] = {}
        self._inside: dict[str, Any] = {}
        start = Builder(graph, graph[0], taken)
        self.largest, self.negative, self.zero = (
            start.constant(np.float32(number), word)
            for number, word in ((half.largest, "largest"), (-half.largest, "negative"), (0.0, "zero"))
        )

    def at_node(self, node: Any) -> None:
        """Everything about what `node` gives."""
        whole = node.op_type == "Cast" and is_float(node.inputs[0]) and node.outputs[0].dtype.name in INTEGERS
        if whole:
            self._at_whole_numbers(node)
        if not is_float(node.outputs[0]) or node.op_type in (*MOVING, "Constant", "ConstantOfShape"):
            return
        output = node.outputs[0]
        number = self._number(output)
        build = Builder(self.graph, node, self.taken)
        if node.op_type not in (*EXACT, *RANDOM) and any(map(is_float, node.inputs)):
            self._compare(build, node, output, f"moved_{number}", self.rounded)
            weights = [value for value in node.inputs if is_float(value) and is_stored(value)]
            if weights and node.op_type not in PRODUCTS:
                self._compare(build, node, output, f"inputs_{number}", self._rounded_unless_stored)
        if (bound := _bound_on_sums(build, node)) is not None:
            self._give(f"sum_{number}", bound)
        self._put(build, node)

    def _at_whole_numbers(self, node: Any) -> None:
        """A cast to whole numbers is moved by rounding where any of them differs."""
        import onnx_ir as ir

        number = self._asked_for(node.outputs[0])
        build = Builder(self.graph, node, self.taken)
        float32 = ir.DataType.FLOAT.value
        before = build.op("Cast", node.outputs[0], to=float32)
        twin = build.op("Cast", self.rounded(node.inputs[0]), to=node.attributes["to"].as_int())
        apart = build.op("Abs", build.op("Sub", build.op("Cast", twin, to=float32), before))
        self._give(f"low_{number}", build.op("ReduceMin", before, keepdims=0))
        self._give(f"high_{number}", build.op("ReduceMax", before, keepdims=0))
        self._give(f"size_{number}", build.op("ReduceL1", before, keepdims=0))
        self._give(f"moved_{number}", build.op("ReduceMax", apart, keepdims=0))
        self._put(build, node)

    def rounded(self, value: Any) -> Any:
        """`value` as the half type would hold it, in float32."""
        if value is None or not is_float(value):
            return value
        if value.name not in self._rounded:
            if is_stored(value):
                build = Builder(self.graph, self.graph[0] if value.producer() is None else value.producer(), self.taken)
                self._rounded[value.name] = self._round(build, value)
                self._put(build, value.producer())
            else:
                self._number(value)
        return self._rounded[value.name]

    def _rounded_unless_stored(self, value: Any) -> Any:
        return value if value is not None and is_stored(value) else self.rounded(value)

    def _number(self, value: Any) -> int:
        """Extremes and losses of a value, looked at once; the number it goes by."""
        if value.name in self._inside:
            return self.asked.index(value.name)
        number = self._asked_for(value)
        producer = value.producer()
        build = Builder(self.graph, producer or self.graph[0], self.taken)
        inside = self._inside[value.name] = build.op("Less", build.op("Abs", value), self.largest)
        rounded = self._rounded[value.name] = self._round(build, value)
        finite = build.op("Where", build.op("IsInf", value), self.zero, value)
        lost = build.op("Where", inside, build.op("Sub", rounded, value), self.zero)
        self._give(f"low_{number}", build.op("ReduceMin", finite, keepdims=0))
        self._give(f"high_{number}", build.op("ReduceMax", finite, keepdims=0))
        size = build.op("ReduceL1", build.op("Where", inside, value, self.zero), keepdims=0)
        self._give(f"size_{number}", size)
        self._give(f"lost_{number}", build.op("ReduceL1", lost, keepdims=0))
        self._put(build, producer)
        return number

    def _asked_for(self, value: Any) -> int:
        self.asked.append(value.name)
        return len(self.asked) - 1

    def _round(self, build: Builder, value: Any) -> Any:
        within = build.op("Max", build.op("Min", value, self.largest), self.negative)
        return build.op("Cast", build.op("Cast", within, to=self.half.ir.value), to=1)

    def _compare(self, build: Builder, node: Any, output: Any, word: str, rounded: Any) -> None:
        """A twin of `node` on rounded inputs, and how far its output is from the other's."""
        inputs = [rounded(value) for value in node.inputs]
        given = dict(node.attributes)
        twin = build.op(node.op_type, *inputs, outputs=len(node.outputs), version=node.version, **given)
        twin = twin if len(node.outputs) == 1 else twin[0]
        apart = build.op("Where", self._inside[output.name], build.op("Sub", twin, output), self.zero)
        self._give(word, build.op("ReduceL1", apart, keepdims=0))

    def _give(self, word: str, value: Any) -> None:
        value.name = word
        self.outputs.append(value)

    def _put(self, build: Builder, producer: Any) -> None:
        if producer is None:
            self.graph.insert_before(self.graph[0], build.nodes)
        else:
            self.graph.insert_after(producer, build.nodes)


def _bound_on_sums(build: Builder, node: Any) -> Any:
    """The largest that a partial sum inside `node` can become, on the values that it reads; None for what adds up
    nothing."""
    value, kind = node.inputs[0] if node.inputs else None, node.op_type
    if kind == "Softmax":
        # Of all exponentials below one, the sum is one over the largest share.
        peak = _reduced(build, "ReduceMax", node.outputs[0], [node.attributes.get_int("axis", -1)])
        return build.op("Reciprocal", build.op("ReduceMin", peak, keepdims=0))
    if kind not in (*SUMS, *SQUARES) or (axes := _summed_axes(node)) is None:
        return None
    summed = _reduced(build, "ReduceL1" if kind in SUMS else "ReduceSumSquare", value, axes)
    most = build.op("ReduceMax", summed, keepdims=0)
    times = _channels_in_a_group(node)
    return most if times == 1 else build.op("Mul", most, build.constant(np.float32(times), "times"))


def _reduced(build: Builder, kind: str, value: Any, axes: list[int]) -> Any:
    """A reduction along `axes`, all of them where there are none; before opset 18 most have them as an attribute."""
    if not axes:
        return build.op(kind, value, keepdims=0)
    if build.graph.opset_imports.get("", 0) < calibration.AXES_AS_INPUT:
        return build.op(kind, value, axes=axes, keepdims=0)
    return build.op(kind, value, build.constant(np.array(axes, np.int64), "axes"), keepdims=0)


def _summed_axes(node: Any) -> list[int] | None:
    """The axes that a node adds up along; none for all of them, None where that isn't known."""
    kind, axes = node.op_type, rank(node.inputs[0])
    if kind.startswith("Reduce"):
        return axes_of(node) or []
    if axes is None:
        return None
    if kind in ("LayerNormalization", "RMSNormalization"):
        first = node.attributes.get_int("axis", -1)
        return list(range(first if first < 0 else first - axes, 0))
    return list(range(2 - axes, 0))


def _channels_in_a_group(node: Any) -> int:
    """How many channels of a GroupNormalization are added up together; those of other operators are not."""
    channels = dims(node.inputs[0])[1] if node.op_type == "GroupNormalization" else 1  # type: ignore[index]
    return channels // int(node.attributes["num_groups"].as_int()) if isinstance(channels, int) and channels > 1 else 1


def stored_extremes(value: Any) -> tuple[float, float]:
    """The finite extremes of a stored tensor."""
    array = np.asarray(stored(value), np.float64)
    finite = array[np.isfinite(array)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def floats_stored(graph: Any) -> Iterator[Any]:
    """Stored float32 values of `graph`."""
    yield from (value for value in graph.initializers.values() if is_float(value))
    yield from (node.outputs[0] for node in graph if node.op_type == "Constant" and is_float(node.outputs[0]))
