"""What each layer costs, from a backend's profile of the whole graph: every operation counts for the layer it came from.

A backend fuses activations, additions and conversions into products and names what it fused, so most of its operations name one
product; one that names several counts in equal parts for each. A product may also be called after the value that it ends in, or
after the last of what was fused into it: it is looked for in front of that. A conversion put in between is called after a node,
or begins with its name; it counts for the product behind. The rest costs the same in either type and counts for nobody.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from perwatt.contract import NodeCost
from perwatt.passes._allocation import Border
from perwatt.patterns import dims

CONVERTING = ("Reorder", "FakeQuantize", "QuantizeLinear", "DequantizeLinear", "Convert")
"""What conversions are called in profiles."""
PRODUCTS = ("Convolution", "FullyConnected", "Conv", "MatMul", "Gemm")
"""What products are called in profiles, or what that contains."""
THROUGH = 6
"""Nodes between two neighbours at most: a normalization and what stands around it."""


def by_product(graph: Any, names: Sequence[str], costs: Sequence[NodeCost]) -> dict[str, float]:
    """Seconds an inference of each product. Without a profile: its multiplications, in units that compare."""
    if not costs:
        return {name: float(operations) for name, operations in _operations(graph, names).items()}
    nodes = {value.name: node for node in graph for value in node.outputs} | {node.name: node for node in graph}
    spent = dict.fromkeys(names, 0.0)
    for cost in costs:
        owners = list(dict.fromkeys(name for name in cost.nodes if name in spent)) or _nearest(cost, nodes, spent)
        for owner in owners:
            spent[owner] += cost.seconds / len(owners)
    return spent


def _nearest(cost: NodeCost, nodes: Mapping[str, Any], products: Mapping[str, float]) -> list[str]:
    """The product that a conversion stands in front of, or that something was fused into, by what it is called after."""
    if _is_conversion(cost):
        look = _behind
    elif any(word in cost.kind for word in PRODUCTS):
        look = _in_front
    else:
        return []
    for told in cost.nodes:
        stem = _stem(told, nodes)
        if stem is None:
            continue
        found = nodes[stem].name if nodes[stem].name in products else next(look(nodes[stem], products), None)
        if found is not None:
            return [found]
    return []


def _stem(told: str, nodes: Mapping[str, Any]) -> str | None:
    """The longest known name that a backend's name is, or begins with."""
    told = told.removeprefix("fused ")
    begun = (name for name in nodes if told.startswith(name) and not told[len(name) : len(name) + 1].isalnum())
    return max(begun, key=len, default=None)


def _is_conversion(cost: NodeCost) -> bool:
    return any(word in cost.kind for word in CONVERTING)


def conversions(graph: Any, costs: Sequence[NodeCost]) -> float:
    """Seconds that converting one value takes, by the median of the conversions that stand by themselves; 0 without any."""
    nodes = {node.name: node for node in graph}
    rates = []
    for cost in costs:
        if not _is_conversion(cost) or cost.seconds <= 0:
            continue
        stem = next((stem for told in cost.nodes if (stem := _stem(told, nodes)) is not None), None)
        size = 0 if stem is None else _elements(nodes[stem].outputs[0])
        rates += [cost.seconds / size] if size else []
    return statistics.median(rates) if rates else 0.0


def borders_between(graph: Any, names: Sequence[str], rate: float) -> list[Border]:
    """Neighbouring products, and what a conversion of what passes between them costs."""
    wanted = set(names)
    found = []
    for node in graph:
        if node.name not in wanted:
            continue
        for other in _behind(node, wanted):
            found.append(Border(node.name, other, rate * _elements(node.outputs[0])))
    return found


def _behind(node: Any, products: Any) -> Iterator[str]:
    """Products that read what `node` makes, through a few nodes that are none."""
    return _along(node, products, lambda one: [use.node for value in one.outputs for use in value.uses()])


def _in_front(node: Any, products: Any) -> Iterator[str]:
    """Products that make what `node` reads, through a few nodes that are none."""
    return _along(node, products, lambda one: [v.producer() for v in one.inputs if v is not None and v.producer()])


def _along(node: Any, products: Any, step: Callable[[Any], list[Any]]) -> Iterator[str]:
    seen, front = {node.name}, [node]
    for _ in range(THROUGH):
        reached = [other for one in front for other in step(one)]
        front = []
        for other in reached:
            if other.name in seen:
                continue
            seen.add(other.name)
            if other.name in products:
                yield other.name
            else:
                front.append(other)


def _elements(value: Any) -> int:
    """Values of one item, where the shape is known but for the batch."""
    lengths = dims(value) or []
    return math.prod(length for length in lengths if isinstance(length, int)) if lengths else 0


def _operations(graph: Any, names: Sequence[str]) -> dict[str, int]:
    """Multiplications of each product, about: elements of its output times what each is summed over."""
    found = {}
    for node in graph:
        if node.name in set(names):
            weight = dims(node.inputs[1]) or []
            sizes = [length for length in weight if isinstance(length, int)]
            summed = math.prod(sizes[1:]) if node.op_type == "Conv" else (sizes[-2] if len(sizes) > 1 else 1)
            found[node.name] = max(1, _elements(node.outputs[0]) * summed)
    return found
