"""Matrix products' weights as codes in groups: which products, what their inputs look like, and by which codes.

Whatever finds the codes, what counts is what a product Y = X·Wᵀ becomes. Weights that are off by D move it by a squared error of
trace(D·H·Dᵀ) with H = XᵀX over the calibration samples, so that H, [in, in], is all that is kept of the activations: it
is summed batch by batch inside one instrumented graph, whose memory doesn't depend on the number of samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from perwatt import calibration
from perwatt.artifact import Artifact, Step
from perwatt.contract import Context
from perwatt.data import Samples
from perwatt.fusion import Builder, names_in, remove_unused
from perwatt.kernels import gptq, group_quantize
from perwatt.patterns import is_stored, made_by, stored
from perwatt.signature import rows

ROUND_BYTES = 1 << 28
"""H that are summed at once; as much again is what one batch adds. A single larger one is summed alone."""
LEAST_GROUP = 16
STRENGTHS = np.linspace(0.0, 1.0, 11)
"""α of AWQ's scales; 0 leaves the weights alone."""
LEAST_SCALE = 1e-4
"""The least of AWQ's scales before they are centred, relative to the largest."""
SCHEMES = {
    "int4": group_quantize.Scheme("int4", search=True),
    "uint4": group_quantize.Scheme("uint4", symmetric=False, search=True),
    "int8": group_quantize.Scheme("int8", positive=True),
}
STORED_BYTES = {"int4": 0.5, "uint4": 0.5, "int8": 1.0}


class Input(NamedTuple):
    """The value that a product takes; `turned`: channels lie on its first axis."""

    name: str
    turned: bool


class Codes(NamedTuple):
    """codes [out, in], scales [out, groups], zero points as scales or None."""

    codes: Any
    scales: Any
    zeros: Any


@dataclass
class Layer:
    """A stored matrix and the products of it, in order. `weight`: float32 [out, in]; `group`: inputs that share a scale."""

    name: str
    weight: Any
    group: int
    nodes: list[Any] = field(default_factory=list)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What the products take, each once, sorted: layers with the same share their H."""
        found = {Input(node.inputs[0].name, _flag(node, "transA")) for node in self.nodes}
        return tuple(sorted(found))


# Finding them ---------------------------------------------------------------------------------------------------------


def layers(graph: Any, kind: str, group_size: int, left_out: Collection[Any]) -> tuple[list[Layer], Counter[str]]:
    """Layers of `graph` whose weights can be codes, and why others can't, counted by reason."""
    found: dict[tuple[int, bool], Layer] = {}
    refused: Counter[str] = Counter()
    for node in products(graph):
        value, turned = _source(node)
        if node in left_out:
            refused["excluded"] += 1
        elif (id(value), turned) in found:
            found[id(value), turned].nodes.append(node)
        elif reason := _unfit(value, turned, kind, group_size):
            refused[reason] += 1
        else:
            matrix = stored(value)
            weight = np.ascontiguousarray(matrix if turned else matrix.T)
            found[id(value), turned] = Layer(value.name, weight, fitting(group_size, weight.shape[1]), [node])
    return list(found.values()), refused


def products(graph: Any) -> list[Any]:
    """MatMul and Gemm of `graph` itself whose second input is stored, and the first is not."""
    nodes = [node for node in graph if node.op_type in ("MatMul", "Gemm") and node.domain == ""]
    return [node for node in nodes if is_stored(_source(node)[0]) and not is_stored(node.inputs[0])]


def _source(node: Any) -> tuple[Any, bool]:
    """The stored value behind a product's second input, and whether it counts outputs on its first axis."""
    value, turned = node.inputs[1], _flag(node, "transB")
    turner = made_by(value, "Transpose")
    if turner is None or not is_stored(turner.inputs[0]):
        return value, turned
    order = turner.attributes["perm"].as_ints() if "perm" in turner.attributes else (1, 0)
    return (turner.inputs[0], not turned) if tuple(order) == (1, 0) else (value, turned)


def _flag(node: Any, name: str) -> bool:
    return node.op_type == "Gemm" and bool(node.attributes.get_int(name, 0))


def _unfit(value: Any, turned: bool, kind: str, group_size: int) -> str | None:
    weight = stored(value)
    if weight is None or weight.ndim != 2 or not weight.size:
        return "its weights are no matrix"
    if weight.dtype != np.float32:
        return "its weights are not float32"
    # A comparison with NaN is false.
    if not np.abs(weight).max() <= gptq.LARGEST:
        return "its weights hold NaN, infinity, or something near it"
    width = weight.shape[1 if turned else 0]
    scales = weight.size // fitting(group_size, width)
    if weight.size * STORED_BYTES[kind] + scales * (4 + (kind == "uint4")) >= weight.nbytes:
        return "codes and scales would take no less room than its weights"
    return None


def fitting(group_size: int, width: int) -> int:
    """The group size halved until `width` is a multiple: backends refuse groups that don't come out even, or run them slowly.
    A whole row where it would take groups below 16, or where `group_size` is 0."""
    size = group_size or width
    while size > LEAST_GROUP and width % size:
        size //= 2
    return size if width % size == 0 else width


# What their inputs look like ------------------------------------------------------------------------------------------


def rounds(found: Sequence[Layer]) -> Iterator[dict[tuple[Input, ...], list[Layer]]]:
    """Layers by their inputs, in order, as many at once as `ROUND_BYTES` of H hold."""
    together: dict[tuple[Input, ...], list[Layer]] = {}
    for layer in found:
        together.setdefault(layer.inputs, []).append(layer)
    batch: dict[tuple[Input, ...], list[Layer]] = {}
    total = 0
    for inputs, group in together.items():
        size = 4 * group[0].weight.shape[1] ** 2 * len(inputs)
        if batch and total + size > ROUND_BYTES:
            yield batch
            batch, total = {}, 0
        batch[inputs], total = group, total + size
    if batch:
        yield batch


def second_moments(
    artifact: Artifact, wanted: Mapping[tuple[Input, ...], int], samples: Samples, context: Context
) -> dict[tuple[Input, ...], Any]:
    """H = 2·XᵀX/n of these inputs (several of one layer: of all together), whose channels are counted beside them, over n
    samples: float32 [in, in].

    Raises BackendError where the model can't be run."""
    inputs = list(dict.fromkeys(each for several in wanted for each in several))
    widths = {each: width for several, width in wanted.items() for each in several}
    sums: dict[Input, Any] = {each: np.zeros((widths[each],) * 2, np.float32) for each in inputs}
    calls = calibration.calls(artifact, samples)
    # Calls stay whole: sums of pieces would come back side by side where the batch is fixed.
    batches = Samples(calls, batch_size=max(map(rows, calls)))
    for batch in context.execute(_instrumented(artifact, widths), batches, (), True):
        for number, each in enumerate(inputs):
            sums[each] += batch[f"moments_{number}"]
    factor = np.float32(2 / len(samples))
    return {several: factor * sum(sums[each] for each in several) for several in wanted}


def _instrumented(artifact: Artifact, widths: Mapping[Input, int]) -> Artifact:
    """The model that gives `moments_i`, XᵀX of the i-th input over a batch, and nothing else."""
    model = artifact.edit()
    graph, taken = model.graph, names_in(model)
    values = {value.name: value for value in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    outputs = []
    for number, (each, width) in enumerate(widths.items()):
        value = values[each.name]
        build = Builder(graph, value.producer() or graph[0], taken)
        flat = value
        if not each.turned:
            flat = build.op("Reshape", value, build.constant(np.array([-1, width], np.int64), "flat"))
        columns = build.op("Transpose", flat, perm=[1, 0])
        made = build.op("MatMul", *((flat, columns) if each.turned else (columns, flat)))
        made.name = f"moments_{number}"
        outputs.append(made)
        producer = value.producer()
        if producer is None:
            graph.insert_before(graph[0], build.nodes)
        else:
            graph.insert_after(producer, build.nodes)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    remove_unused(model)
    return artifact.after(model, Step("instrument"))


# Codes ----------------------------------------------------------------------------------------------------------------


def by_rounding(weight: Any, group: int, kind: str) -> Codes:
    """The nearest codes, with scales shrunk where that leaves less error (4 bits)."""
    return Codes(*group_quantize.compute_quantize(weight, group, 1, SCHEMES[kind]))


def by_gptq(group: Sequence[Layer], moments: Any, kind: str, damping: float) -> list[Codes] | None:
    """Codes of layers with one input, each of which makes up for the errors of those before it; None where the moments
    are no good for that: not finite, or all dead."""
    try:
        factor = gptq.factorize(moments, damping=damping, ordered=True)
    except ValueError:
        return None
    scheme, bits = SCHEMES[kind], 8 if kind == "int8" else 4
    how = {"symmetric": scheme.symmetric, "positive": scheme.positive, "search": scheme.search}
    found = (gptq.compute_columns(layer.weight, factor, bits, layer.group, **how) for layer in group)
    return [Codes(*each) for each in found]


def awq_scales(group: Sequence[Layer], moments: Any, kind: str) -> Any:
    """Factors s of the layers' common input channels, of which W·s with X/s has the least output error; None where that is
    s = 1."""
    if not np.isfinite(moments).all():
        return None
    size = np.sqrt(moments.diagonal().astype(np.float64))
    best, least = None, np.inf
    for strength in STRENGTHS if size.max(initial=0) > 0 else ():
        scales = np.maximum(size / size.max(), LEAST_SCALE) ** strength
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        error = sum(_scaled_error(layer, moments, scales, kind) for layer in group)
        if error < least:
            best, least = (scales if strength else None), error
    return best


def _scaled_error(layer: Layer, moments: Any, scales: Any, kind: str) -> float:
    """trace(D·H·Dᵀ) of a layer whose weights are quantized times `scales`."""
    codes = by_rounding(layer.weight * scales, layer.group, kind)
    off = group_quantize.compute_dequantize(*codes, layer.group, 1)
    off /= scales
    off -= layer.weight
    return float(np.vdot(off @ moments, off))


# Into the graph -------------------------------------------------------------------------------------------------------


def divide_input(graph: Any, group: Sequence[Layer], scales: Any, taken: set[str]) -> bool:
    """Divide the layers' common input by `scales`, for these products alone: in the constants of the normalization or Mul
    that makes it (True) where nobody else uses it, else by a Mul in front (False)."""
    (each,) = group[0].inputs
    nodes = [node for layer in group for node in layer.nodes]
    value = nodes[0].inputs[0]
    ours = all(use.idx == 0 and use.node in nodes for use in value.uses()) and not value.is_graph_output()
    if ours and not each.turned and _divide_constants(graph, value, scales, taken):
        return True
    build = Builder(graph, nodes[0], taken)
    factors = (1 / scales).reshape((-1, 1) if each.turned else -1)
    even = build.op("Mul", value, build.constant(factors, f"{value.name}_evened"))
    even.shape, even.type = value.shape, value.type
    graph.insert_before(nodes[0], build.nodes)
    for node in nodes:
        node.replace_input_with(0, even)
    return False


def _divide_constants(graph: Any, value: Any, scales: Any, taken: set[str]) -> bool:
    """Whether the constants that make `value` could take the division in; then they have."""
    node = made_by(value, "LayerNormalization|RMSNormalization|Mul")
    if node is None:
        return False
    places = [place for place, each in enumerate(node.inputs) if is_stored(each)]
    wanted = [0] if node.op_type == "Mul" and places == [0] else list(range(1, len(node.inputs)))
    fits = all(stored(node.inputs[place]).shape[-1:] in ((len(scales),), (1,), ()) for place in places)
    # Another axis than the last would have one constant for several channels, of which each is divided otherwise.
    last = node.op_type == "Mul" or node.attributes.get_int("axis", -1) == -1
    if places != wanted or not fits or not last:
        return False
    for place in places:
        old = node.inputs[place]
        numbers = (stored(old).astype(np.float64) / scales).astype(np.float32)
        node.replace_input_with(place, Builder(graph, node, taken).constant(numbers, f"{old.name}_evened"))
    return True


def put_codes(graph: Any, layer: Layer, found: Codes, kind: str, taken: set[str]) -> None:
    """Let the layer's products read a DequantizeLinear of its codes, [in, out] whatever the weight was: ONNX Runtime
    takes in no other, and would dequantize the weight at every inference."""
    build = Builder(graph, layer.nodes[0], taken)
    whole = found.scales.shape[1] == 1
    arrays = [found.codes.T, *(each.reshape(-1) if whole else each.T for each in found[1:] if each is not None)]
    dtypes = (numpy_type(kind), np.float32, numpy_type(kind))
    values = [
        build.constant(np.ascontiguousarray(array).astype(dtype), f"{layer.name}_{word}")
        for array, dtype, word in zip(arrays, dtypes, (kind, "scale", "zero_point"), strict=False)
    ]
    where: dict[str, Any] = {"axis": 1} if whole else {"axis": 0, "block_size": layer.group}
    back = build.op("DequantizeLinear", *values, **where)
    back.shape, back.type = values[0].shape, values[1].type
    graph.insert_before(layer.nodes[0], build.nodes)
    for node in layer.nodes:
        node.replace_input_with(1, back)
        node.attributes.pop("transB", None)


def numpy_type(kind: str) -> Any:
    """The NumPy type whose arrays ONNX stores as this type, two codes a byte where they have 4 bits."""
    import ml_dtypes

    return np.int8 if kind == "int8" else getattr(ml_dtypes, kind)


def put_table(graph: Any, node: Any, taken: set[str]) -> None:
    """Let a Gather read a DequantizeLinear of its table, int8 with a scale for each row."""
    table = node.inputs[0]
    codes, scales, _ = group_quantize.compute_quantize(stored(table), table.const_value.shape[1], 1, SCHEMES["int8"])
    build = Builder(graph, node, taken)
    values = [build.constant(codes, f"{table.name}_int8"), build.constant(scales.reshape(-1), f"{table.name}_scale")]
    back = build.op("DequantizeLinear", *values, axis=0)
    back.shape, back.type = values[0].shape, values[1].type
    graph.insert_before(node, build.nodes)
    node.replace_input_with(0, back)
