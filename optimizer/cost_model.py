"""What a graph will cost on a backend, fitted from operations that were measured there.

A backend's profile says what each operation of a compiled graph takes: a node, or several that were fused. Their seconds are
fitted by non-negative least squares as

    Σ multiplications · a[family, arithmetic] + Σ bytes · b[role, arithmetic] + Σ c[operator, arithmetic]

over the nodes of an operation. `arithmetic` is float32, half, int8 or float8; `family` the kind of product; `role` whether a
product moves the bytes; c the constant of an operator. A node just like measured ones counts what those took, so that a graph
which lacks some nodes of a measured one costs what was measured of the others; the fit is for what is new. A backend
that tells no profile leaves multiplications alone: they share out what the whole graph was measured to take.

    model = CostModel.fit([Sample(artifact, costs)], typical_shapes(artifact.signature, batches, 32))
    model.seconds(other)          # Estimate(value, spread), of one inference; None where its arithmetic was never measured
    model.error                   # how far operations are off that the fit has not seen

Errors are weighted relative to what is predicted: relative to what was measured, those would count most that came out too quick
by chance. Another fusion, caches, and layers too small to fill the machine cost what no such sum tells, so `error` goes with
every figure.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from perwatt.analysis_facts import Facts
from perwatt.analysis_shapes import analyse
from perwatt.artifact import Artifact
from perwatt.contract import NodeCost
from perwatt.patterns import given
from perwatt.signature import Array, Batch, Signature, rows

Arithmetic = Literal["float32", "half", "int8", "float8"]
Shapes = Mapping[str, tuple[int, ...]]
"""Input → its shape in a call."""
Key = tuple[str, str, str]
"""Of a coefficient: (multiplications, family, arithmetic), (bytes, role, arithmetic) or (constant, operator, arithmetic)."""

FREE = frozenset({"Flatten", "Identity", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze"})
"""Operators that move nothing."""
PICKING = frozenset({"Gather", "GatherElements", "GatherND", "Slice", "Split"})
"""Operators that read no more than they write."""
MOVING = FREE | PICKING | {"DepthToSpace", "Expand", "MaxPool", "Pad", "SpaceToDepth", "Tile", "Transpose"}
"""Operators whose first input's values come out as they are: what was quantized before them still is."""
HALVES = ("FLOAT16", "BFLOAT16")
ROUNDS = 4
"""Of weighing by what the round before predicted."""
SMALL = 0.05
"""Of the mean operation: what takes less counts as if it took that much, as its own figure is noise."""
FOLDS = 10
"""How often some operations are left out."""
MEDIAN_TO_DEVIATION, MAGNITUDE_TO_DEVIATION = 1.4826, 1.2533
"""The standard deviation of what is normal ÷ the median, and the mean, of its magnitudes."""


@dataclass(frozen=True)
class Estimate:
    """A value, and one standard deviation of what it may be off by, in the same unit."""

    value: float
    spread: float


@dataclass(frozen=True)
class Work:
    """What a node does for one inference: multiplications, and bytes that it reads and writes, weights shared by the items of a
    call. `family` is empty for what is no product."""

    kind: str
    family: str
    arithmetic: Arithmetic
    multiplications: float
    bytes: float

    def features(self) -> dict[Key, float]:
        """What coefficients are multiplied with."""
        found: dict[Key, float] = {("constant", self.kind, self.arithmetic): 1.0}
        if self.multiplications:
            found["multiplications", self.family, self.arithmetic] = self.multiplications
        if self.bytes:
            found["bytes", "product" if self.family else "other", self.arithmetic] = self.bytes
        return found


@dataclass(frozen=True)
class Sample:
    """A graph that was measured: what its operations cost (`Target.profile`; empty where the backend doesn't tell), and `seconds`
    of an inference as a whole, where that is known: the profile is scaled to it."""

    artifact: Artifact
    costs: Sequence[NodeCost]
    seconds: float | None = None


def typical_shapes(signature: Signature, batches: Iterable[Batch], batch: int = 1) -> dict[str, tuple[int, ...]]:
    """The shape of each input in a call of `batch` items; axes that are dynamic besides are as long as the samples are on
    average."""
    seen: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for one in batches:
        for name, array in one.items():
            seen.setdefault(name, []).append((rows(one) if signature.batch is not None else 1, array.shape))
    shapes = {}
    for name, several in seen.items():
        total = sum(count for count, _ in several)
        lengths = np.sum([np.multiply(count, shape) for count, shape in several], axis=0) / total
        shape = [max(1, round(length)) for length in lengths.tolist()]
        if signature.batch is not None:
            shape[0] = signature.batch if isinstance(signature.batch, int) else batch
        shapes[name] = tuple(shape)
    return shapes


# What nodes do ----------------------------------------------------------------------------------------------------------


@dataclass
class Graph:
    """A graph with what its nodes do, by their names; those that the input makes no difference to are left out."""

    nodes: list[Any]
    works: dict[str, Work]


def graph_of(artifact: Artifact, shapes: Shapes) -> Graph:
    """What the nodes of a model do where it is fed with these shapes. What has a shape that nobody knows counts as its operator's
    constant."""
    import onnx_ir as ir

    model = artifact.edit()
    for value in model.graph.inputs:
        if str(value.name) in shapes:
            value.shape = ir.Shape(shapes[str(value.name)])
    first = next(iter(shapes.values()), ())
    items = first[0] if artifact.signature.batch is not None and first else 1
    return _Counting(analyse(artifact, model), items).graph(model.graph)


def name_of(node: Any) -> str:
    """The node's name, or what its first output is called."""
    return str(node.name or node.outputs[0].name)


class _Counting:
    """Counts work, node by node from the inputs on."""

    def __init__(self, facts: Facts, items: int) -> None:
        self.facts, self.items = facts, items
        self.tags: dict[Any, Arithmetic] = {}
        """In which arithmetic values came about that depend on the input."""

    def graph(self, graph: Any) -> Graph:
        """Everything that depends on the input."""
        self.tags = {value: self._by_type(value) for value in graph.inputs}
        found = {}
        for node in graph:
            if any(value in self.tags for value in node.inputs if value is not None):
                work = self._work(node)
                found[name_of(node)] = work
                self.tags.update(dict.fromkeys(node.outputs, work.arithmetic))
        return Graph(list(graph), found)

    def shape(self, value: Any) -> tuple[int, ...] | None:
        """The shape, where all of it is known."""
        shape = self.facts.shape(value)
        known = [size for size in shape or () if isinstance(size, int)]
        return tuple(known) if shape is not None and len(known) == len(shape) else None

    def elements(self, value: Any) -> int:
        """0 where the shape is not known."""
        shape = self.shape(value)
        return 0 if shape is None else math.prod(shape)

    def _work(self, node: Any) -> Work:
        count = PRODUCTS.get(node.op_type) if node.domain == "" else None
        family = self._family(node) if count else ""
        multiplications = count(node, self) if count else 0.0
        kind = node.op_type if node.domain == "" else f"{node.domain}:{node.op_type}"
        arithmetic = self._arithmetic(node, bool(count))
        return Work(kind, family, arithmetic, multiplications / self.items, self._bytes(node) / self.items)

    def _family(self, node: Any) -> str:
        if "Conv" in node.op_type:
            return "grouped convolution" if node.attributes.get_int("group", 1) > 1 else "convolution"
        if node.op_type in ("LSTM", "GRU", "RNN"):
            return "recurrent"
        weight = node.inputs[_WEIGHT.get(node.op_type, 1)]
        return "product of computed values" if weight in self.tags else "matrix product"

    def _arithmetic(self, node: Any, product: bool) -> Arithmetic:
        if "Integer" in node.op_type or "QLinear" in node.op_type:
            return "int8"
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return _eighths(node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0])
        if product:
            rounded = [_quantized(value) for value in node.inputs[:2]]
            return _eighths(rounded[0]) if None not in rounded else self._by_type(node.outputs[0])
        # What stands behind a product is fused into it or not as the product's arithmetic has it.
        tags = [self.tags[value] for value in node.inputs if value in self.tags]
        eighth = next((tag for tag in tags if tag in ("int8", "float8")), None)
        return eighth or self._by_type(node.outputs[0])

    def _by_type(self, value: Any) -> Arithmetic:
        import onnx_ir as ir

        dtype = self.facts.dtype(value)
        return "half" if dtype is not None and ir.DataType(dtype).name in HALVES else "float32"

    def _bytes(self, node: Any) -> float:
        if node.op_type in FREE:
            return 0.0
        written = sum(
            self._size(_stored_as(value)) for value in node.outputs if value.uses() or value.is_graph_output()
        )
        if node.op_type in PICKING:
            return 2.0 * written
        return written + sum(self._size(_source(value)) for value in given(node) if value is not None)

    def _size(self, value: Any) -> float:
        """Bytes; the type of shapes, and of values that nobody knows the type of, counts as 4."""
        import onnx_ir as ir

        dtype = self.facts.dtype(value)
        each = 4.0 if dtype is None or ir.DataType(dtype).name == "STRING" else float(ir.DataType(dtype).itemsize)
        return self.elements(value) * each


def _source(value: Any) -> Any:
    """What is really read where a value is dequantized on the way."""
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else value


def _stored_as(value: Any) -> Any:
    """What is really written where nobody reads a value but to quantize it."""
    users = [use.node for use in value.uses()]
    quantizers = [user for user in users if user.op_type == "QuantizeLinear"]
    return quantizers[0].outputs[0] if users and len(quantizers) == len(users) else value


def _quantized(value: Any) -> Any:
    """The integers (or eighths) that a value was dequantized from, perhaps moved about since; None where it wasn't."""
    while value is not None and (node := value.producer()) is not None and node.domain == "":
        if node.op_type == "DequantizeLinear":
            return node.inputs[0]
        if node.op_type not in MOVING:
            return None
        value = node.inputs[0]
    return None


def _eighths(value: Any) -> Arithmetic:
    return "float8" if value.dtype is not None and value.dtype.name.startswith("FLOAT8") else "int8"


_WEIGHT = {"QLinearConv": 3, "QLinearMatMul": 3}
"""Where the second factor stands, if not second."""


def _convolution(node: Any, count: _Counting) -> float:
    weight = count.shape(node.inputs[_WEIGHT.get(node.op_type, 1)]) or (0, 0)
    turned = node.op_type == "ConvTranspose"
    return float(count.elements(node.inputs[0] if turned else node.outputs[0]) * math.prod(weight[1:]))


def _matrix(node: Any, count: _Counting) -> float:
    data = count.shape(node.inputs[0]) or (0,)
    across = node.op_type == "Gemm" and node.attributes.get_int("transA", 0)
    return float(count.elements(node.outputs[0]) * data[0 if across else -1])


def _attention(node: Any, count: _Counting) -> float:
    """Queries times keys, and that times values."""
    keys = count.shape(node.inputs[1]) or (0, 0)
    return float((count.elements(node.inputs[0]) + count.elements(node.outputs[0])) * keys[-2])


def _recurrent(node: Any, count: _Counting) -> float:
    """Both weights once for every step of every item."""
    data = count.shape(node.inputs[0]) or (0,)
    return float(sum(count.elements(value) for value in node.inputs[1:3]) * math.prod(data[:-1]))


PRODUCTS: Mapping[str, Callable[[Any, _Counting], float]] = {
    **dict.fromkeys(("Conv", "ConvInteger", "ConvTranspose", "QLinearConv"), _convolution),
    **dict.fromkeys(("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul"), _matrix),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
    "Attention": _attention,
}
"""Operator → multiplications of a call."""


# Whose an operation is ------------------------------------------------------------------------------------------------------


def owned(graph: Graph, costs: Sequence[NodeCost]) -> list[tuple[float, list[str]]]:
    """Seconds of each operation, and the nodes that it does. Nodes that a profile doesn't name were fused: products, and what
    quantizes, into what reads them, others into what they read. Operations that name no node (a change of layout, a piece of a
    normalization) count for the next one that does."""
    whose: dict[str, int] = {}
    names = {str(value.name): name_of(node) for node in graph.nodes for value in node.outputs}
    names |= {name_of(node): name_of(node) for node in graph.nodes}
    for number, cost in enumerate(costs):
        told = [node for name in cost.nodes if (node := _stem(name, names)) in graph.works] or _by_kind(
            graph, whose, cost
        )
        for node in told:
            whose.setdefault(str(node), number)
    _fused(graph, whose)
    nodes: dict[int, list[str]] = {}
    for node, number in whose.items():
        nodes.setdefault(number, []).append(node)
    found: list[tuple[float, list[str]]] = []
    waiting = 0.0
    for number, cost in enumerate(costs):
        waiting += cost.seconds
        if number in nodes:
            found.append((waiting, nodes[number]))
            waiting = 0.0
    if waiting and found:
        found[-1] = (found[-1][0] + waiting, found[-1][1])
    return found


def _stem(told: str, names: Mapping[str, str]) -> str | None:
    """The node whose name, or whose output's, a backend's name is or begins with: the longest."""
    for end in range(len(told), 0, -1):
        if told[:end] in names and not told[end : end + 1].isalnum():
            return names[told[:end]]
    return None


def _by_kind(graph: Graph, whose: Mapping[str, int], cost: NodeCost) -> list[str]:
    """For an operation that a backend gave a name of its own (BiasGelu): the first node of such an operator that is left."""
    left = (name for name, work in graph.works.items() if name not in whose and work.kind in cost.kind)
    return list(left)[:1]


def _fused(graph: Graph, whose: dict[str, int]) -> None:
    """Nodes without an operation of their own get that of a neighbour."""
    ordered = [node for node in graph.nodes if name_of(node) in graph.works]
    for node in reversed(ordered):
        if graph.works[name_of(node)].family or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _join(node, [use.node for value in node.outputs for use in value.uses()], whose)
    for node in ordered:
        _join(node, [value.producer() for value in node.inputs if value is not None and value.producer()], whose)
    for node in reversed(ordered):
        _join(node, [use.node for value in node.outputs for use in value.uses()], whose)


def _join(node: Any, neighbours: Sequence[Any], whose: dict[str, int]) -> None:
    near = next((whose[name_of(one)] for one in neighbours if name_of(one) in whose), None)
    if near is not None:
        whose.setdefault(name_of(node), near)


# The fit --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Alike:
    """Operations that do the same: what their nodes do, and the seconds that each was measured to take."""

    works: tuple[Work, ...]
    measured: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median: one that was disturbed says nothing of the others."""
        return statistics.median(self.measured)

    def features(self) -> dict[Key, float]:
        """Of all nodes together."""
        found: dict[Key, float] = {}
        for work in self.works:
            for key, times in work.features().items():
                found[key] = found.get(key, 0.0) + times
        return found

    def predicted(self, coefficients: Mapping[Key, float]) -> float:
        """What a fit says."""
        return _sum(self.features(), coefficients)


@dataclass(frozen=True)
class CostModel:
    """What operations cost on one backend at one operating point, in seconds of an inference. `basis`: a profile, or nothing but
    multiplications. `known`: nodes that were measured, what they took and how many they were.

    `error`: median of |predicted − measured| ÷ measured, each operation by what it takes, the fit being made without it; None
    where there were too few to leave any out. `spread`: the same as a standard deviation. `scatter`: that of nodes just alike."""

    shapes: Shapes
    basis: Literal["profile", "multiplications"]
    coefficients: Mapping[Key, float]
    known: Mapping[Work, tuple[float, int]]
    operations: int = 0
    error: float | None = None
    spread: float = 1.0
    scatter: float = 0.0

    @classmethod
    def fit(cls, samples: Sequence[Sample], shapes: Shapes) -> CostModel | None:
        """From graphs that were measured with inputs of these shapes; None where nothing was."""
        found = _grouped(samples, shapes)
        if not found:
            return _by_multiplications(samples, shapes)
        coefficients = _fitted(found)
        known, scatter = _nodes(found, coefficients)
        middle = _left_out(found)
        spread = 1.0 if middle is None else MEDIAN_TO_DEVIATION * middle
        count = sum(len(alike.measured) for alike in found)
        return cls(shapes, "profile", coefficients, known, count, middle, spread, scatter)

    def per_node(self, artifact: Artifact) -> dict[str, float] | None:
        """Seconds by node; None where an arithmetic of one was never measured."""
        found = {name: self._value(work) for name, work in graph_of(artifact, self.shapes).works.items()}
        return None if None in found.values() else {name: value or 0.0 for name, value in found.items()}

    def seconds(self, artifact: Artifact) -> Estimate | None:
        """Of one inference with a graph; None where an arithmetic of it was never measured. Nodes just alike are off together."""
        alike: dict[Work, float] = {}
        for work in graph_of(artifact, self.shapes).works.values():
            value = self._value(work)
            if value is None:
                return None
            alike[work] = alike.get(work, 0.0) + value
        variance = sum((value * self._off(work)) ** 2 for work, value in alike.items())
        return Estimate(sum(alike.values()), math.sqrt(variance))

    def _value(self, work: Work) -> float | None:
        if work in self.known:
            return self.known[work][0]
        if work.multiplications and ("multiplications", work.family, work.arithmetic) not in self.coefficients:
            return None
        return _sum(work.features(), self.coefficients)

    def _off(self, work: Work) -> float:
        """The relative standard deviation of what a node was said to take."""
        return self.scatter / math.sqrt(self.known[work][1]) if work in self.known else self.spread

    def to_json(self) -> dict[str, object]:
        """What it rests on, as plain data."""
        return {"basis": self.basis, "operations": self.operations, "error": self.error}


def _sum(features: Mapping[Key, float], coefficients: Mapping[Key, float]) -> float:
    return sum(times * coefficients.get(key, 0.0) for key, times in features.items())


def _grouped(samples: Sequence[Sample], shapes: Shapes) -> list[_Alike]:
    groups: dict[tuple[Work, ...], list[float]] = {}
    for sample in samples:
        graph = graph_of(sample.artifact, shapes)
        found = owned(graph, sample.costs)
        total = sum(seconds for seconds, _ in found)
        scale = sample.seconds / total if sample.seconds is not None and total else 1.0
        for seconds, nodes in found:
            groups.setdefault(tuple(graph.works[node] for node in nodes), []).append(seconds * scale)
    return [_Alike(works, tuple(measured)) for works, measured in groups.items()]


def _by_multiplications(samples: Sequence[Sample], shapes: Shapes) -> CostModel | None:
    """What whole graphs take, in proportion to their multiplications."""
    coefficients: dict[Key, float] = {}
    for sample in samples:
        works = [work for work in graph_of(sample.artifact, shapes).works.values() if work.multiplications]
        total = sum(work.multiplications for work in works)
        if sample.seconds is None or not total:
            continue
        for work in works:
            coefficients.setdefault(("multiplications", work.family, work.arithmetic), sample.seconds / total)
    return CostModel(shapes, "multiplications", coefficients, {}) if coefficients else None


def _fitted(found: Sequence[_Alike]) -> dict[Key, float]:
    from scipy.optimize import nnls

    features = [alike.features() for alike in found]
    keys = sorted({key for one in features for key in one})
    table: Array = np.array([[one.get(key, 0.0) for key in keys] for one in features])
    table, size = table / table.max(axis=0), table.max(axis=0)
    seconds, counts = np.array([a.seconds for a in found]), np.array([len(a.measured) for a in found])
    least = SMALL * float(np.average(seconds, weights=counts)) or 1.0
    predicted, solution = seconds, np.zeros(len(keys))
    for _ in range(ROUNDS):
        weights = np.sqrt(counts) / np.maximum(predicted, least)
        solution = nnls(table * weights[:, None], seconds * weights)[0]
        predicted = table @ solution
    return dict(zip(keys, (solution / size).tolist(), strict=True))


def _nodes(found: Sequence[_Alike], coefficients: Mapping[Key, float]) -> tuple[dict[Work, tuple[float, int]], float]:
    """Seconds of nodes just alike, with how many there were, and how far they scatter, relatively. What an operation takes
    goes to its nodes in the proportion that is predicted."""
    several: dict[Work, list[float]] = {}
    for alike in found:
        parts = [_sum(work.features(), coefficients) for work in alike.works]
        whole = sum(parts)
        for work, part in zip(alike.works, parts, strict=True):
            share = part / whole if whole else 1 / len(parts)
            several.setdefault(work, []).extend(share * seconds for seconds in alike.measured)
    middles = {work: statistics.median(values) for work, values in several.items()}
    known: dict[Work, tuple[float, int]] = {}
    for arithmetic in {work.arithmetic for work in several}:
        mine = {work: values for work, values in several.items() if work.arithmetic == arithmetic}
        total = sum(middles[work] * len(values) for work, values in mine.items())
        # Medians leave out what disturbed some of them; what all took together is as it was measured.
        scale = sum(map(sum, mine.values())) / total if total else 1.0
        known |= {work: (scale * middles[work], len(values)) for work, values in mine.items()}
    repeated = {work: values for work, values in several.items() if len(values) > 1}
    off = sum(abs(value - middles[work]) for work, values in repeated.items() for value in values)
    size = sum(map(sum, repeated.values()))
    return known, off / size * MAGNITUDE_TO_DEVIATION if size else 0.0


def _left_out(found: Sequence[_Alike]) -> float | None:
    """The median of the relative errors of operations that the fit was made without, and without all like them, each by what it
    takes; None where nothing can be left out."""
    if len(found) < 2:
        return None
    ordered = sorted(found, key=lambda alike: -alike.seconds)
    errors: list[tuple[float, float]] = []
    for first in range(min(FOLDS, len(ordered))):
        part = ordered[first::FOLDS]
        coefficients = _fitted([alike for alike in ordered if alike not in part])
        for alike in part:
            predicted = alike.predicted(coefficients)
            errors += [(abs(predicted / seconds - 1), seconds) for seconds in alike.measured if seconds]
    errors.sort()
    half, sums = sum(seconds for _, seconds in errors) / 2, itertools.accumulate(seconds for _, seconds in errors)
    return next((error for (error, _), total in zip(errors, sums, strict=True) if total >= half), None)
