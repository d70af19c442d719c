"""Where quantization stands in a graph: which values carry a QuantizeLinear and DequantizeLinear, and who reads them.

A style names operators that calculate in integers. What they read is quantized where it is made: from their inputs the search
walks up through operators that only move values about (a reshape, a transpose, a maximum pooling), so that these move
integers too; not where somebody else reads what was moved, who asked for no rounding. Values that meet in an operator that
moves several about (Concat) are quantized alike.

    conv ─→ Relu ─→ MaxPool ─→ Conv         becomes         Relu ─→ Q ─→ DQ ─→ MaxPool ─→ Conv
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from perwatt.passes._weights import CONVOLUTIONS, Product, is_plain
from perwatt.patterns import given, is_number, is_stored

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOVING = (
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "MaxPool", "Slice", "Split", "Expand", "Tile",
    "DepthToSpace", "SpaceToDepth", "Gather",
)  # fmt: skip
"""Their first input's values come out as they are, at other places."""
JOINING = ("Concat",)
ACTIVATIONS = (
    "Relu",
    "Clip",
    "LeakyRelu",
    "Elu",
    "HardSwish",
    "HardSigmoid",
    "Sigmoid",
    "Swish",
    "Gelu",
    "Mish",
    "BatchNormalization",
)


@dataclass
class Site:
    """A value to be quantized, with those uses (node, position) that read it quantized. `alike`: sites of the same group
    get one scale."""

    value: Any
    uses: list[tuple[Any, int]] = field(default_factory=list)
    group: int = 0

    def add(self, node: Any, position: int) -> None:
        if (node, position) not in self.uses:
            self.uses.append((node, position))


@dataclass
class Placement:
    """Values and weights to be quantized, by the value's name. `weights`: products whose stored weight is. `read_from`: the
    site whose values arrive at a node's input."""

    sites: dict[str, Site]
    weights: list[Product]
    read_from: dict[tuple[str, int], str]

    def groups(self) -> list[list[Site]]:
        """Sites that share a scale."""
        found: dict[int, list[Site]] = {}
        for site in self.sites.values():
            found.setdefault(site.group, []).append(site)
        return list(found.values())


def products(graph: Any) -> list[Product]:
    """Products of `graph` that can be quantized: with a stored kernel or matrix, or of two values that are computed."""
    return [Product(node) for node in graph if node.op_type in PRODUCTS and node.domain == "" and _fit(Product(node))]


def _fit(product: Product) -> bool:
    if is_stored(product.data) or not _is_float32(product.data):
        return False
    return is_plain(product) if is_stored(product.weight) else product.kind == "MatMul" and _is_float32(product.weight)


def _is_float32(value: Any) -> bool:
    return value is not None and value.dtype is not None and value.dtype.name == "FLOAT"


def place(graph: Any, chosen: Sequence[Product], others: Collection[str], excluded: Collection[str] = ()) -> Placement:
    """What `chosen` products and all nodes of `others` (operators) read, quantized where it is made. `excluded`: names of
    nodes that stay as they are."""
    sites: dict[str, Site] = {}
    groups = iter(range(1, 1 << 30))
    reads = [(product.node, 0) for product in chosen]
    reads += [(product.node, 1) for product in chosen if not is_stored(product.weight)]
    for node in _whole(graph, chosen, others):
        if node.name not in excluded:
            reads += [(node, position) for position in range(len(given(node)))]
    reading = set(reads)

    def read(node: Any, position: int) -> str:
        found = list(_sources(node.inputs[position], node, position, reading))
        # What meets on the way has to be alike, and so has everything that one of them was alike to before.
        group = next(groups)
        known = {sites[value.name].group for value, _, _ in found if value.name in sites}
        for site in sites.values():
            site.group = group if site.group in known else site.group
        for value, reader, place_there in found:
            site = sites.setdefault(value.name, Site(value, group=group))
            site.add(reader, place_there)
        return str(found[0][0].name)

    read_from: dict[tuple[str, int], str] = {}
    for node, position in reads:
        read_from[node.name, position] = read(node, position)
    return Placement(sites, [product for product in chosen if is_stored(product.weight)], read_from)


def _whole(graph: Any, chosen: Sequence[Product], others: Collection[str]) -> Iterator[Any]:
    """Nodes of `others` among the chosen products: all that they read is made by these, or read by them too, with nothing
    in between but activations and moving."""
    near = {id(value) for product in chosen for value in (*product.node.inputs[:2], *product.node.outputs)}
    for node in graph:
        floats = [value for value in given(node) if _is_float32(value) and not is_stored(value)]
        if node.domain != "" or not floats or not all(id(value) in near for value in floats):
            continue
        if node.op_type in others and _computed(node):
            yield node
        if node.op_type in (*others, *MOVING, *JOINING, *ACTIVATIONS, "Pad"):
            near.update(id(value) for value in node.outputs)


def _computed(node: Any) -> bool:
    """Whether every input is a computed float."""
    return all(value is not None and not is_stored(value) and _is_float32(value) for value in given(node))


def _sources(value: Any, reader: Any, position: int, reading: Collection[Any]) -> Iterator[tuple[Any, Any, int]]:
    """Where the values that arrive at an input are made, each with the first use on the way there."""
    node = value.producer()
    passed = [] if node is None or node.graph is not reader.graph else _passed(node)
    if passed and all(_read_alone(moved, reading) for moved in node.outputs):
        for place_there in passed:
            yield from _sources(node.inputs[place_there], node, place_there, reading)
    else:
        yield value, reader, position


def _passed(node: Any) -> list[int]:
    """The places of those inputs whose values come out of a node as they are."""
    if node.domain != "":
        return []
    if node.op_type in JOINING:
        return list(range(len(node.inputs))) if _computed(node) else []
    return [0] if _moves(node) and _is_float32(node.inputs[0]) and not is_stored(node.inputs[0]) else []


def _read_alone(value: Any, reading: Collection[Any]) -> bool:
    """Whether all who read a value, once it was moved on, are among those that read it quantized."""
    return not value.is_graph_output() and all(
        (use.node, use.idx) in reading
        or (use.idx in _passed(use.node) and all(_read_alone(moved, reading) for moved in use.node.outputs))
        for use in value.uses()
    )


def _moves(node: Any) -> bool:
    """Whether a node only moves its first input's values; a Pad may add zeros, which every type has."""
    if node.op_type != "Pad":
        return node.op_type in MOVING
    filling = given(node)[2] if len(given(node)) > 2 else None
    return filling is None or is_number(filling, 0.0)


def out_axis(product: Product) -> int | None:
    """The axis of the weight that has a scale for each channel; None for one scale. Grouped transposed convolutions count
    their output channels on two axes."""
    if product.kind == "ConvTranspose" and product.group > 1:
        return None
    return product.out_axis if product.kind in CONVOLUTIONS or product.kind == "Gemm" else -1
