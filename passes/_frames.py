"""Which values of a graph are one tensor in different orders of axes, and how operators are tied to each other by them.

A frame is a set of values that hang together through transposes and operators that keep the order of axes. Within it every
value has a layout: a permutation against the first value of the frame, so that two values with equal layouts have their
axes in the same order. A transpose is then no operator any more but the difference between two layouts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from perwatt.passes._layouts import Flexible, flexible
from perwatt.patterns import rank

Layout = tuple[int, ...]


@dataclass
class Frame:
    """`layouts`: of every value. `transposes`: those that are only differences between layouts. `how`: what can compute in
    another layout, by node. The others are rigid: they want what they have."""

    layouts: dict[Any, Layout] = field(default_factory=dict)
    transposes: dict[Any, None] = field(default_factory=dict)
    how: dict[Any, Flexible] = field(default_factory=dict)

    def tensor(self, value: Any) -> Any:
        """The value from which `value` comes by transposes alone."""
        while value.producer() in self.transposes:
            value = value.producer().inputs[0]
        return value

    def layout_of(self, node: Any) -> Layout:
        """The layout that a flexible node computes in now."""
        return self.layouts[node.inputs[self.how[node].follows[0]]]

    def maker(self, tensor: Any) -> Any:
        """The flexible node that gives `tensor` in its own layout; None where that is fixed."""
        node = tensor.producer()
        return node if node in self.how and self.how[node].gives else None

    def demands(self) -> dict[Any, list[Any]]:
        """By tensor, who uses it: a flexible node, or the layout in which something rigid wants it."""
        found: dict[Any, list[Any]] = defaultdict(list)
        for value, layout in self.layouts.items():
            for use in value.uses():
                if use.node not in self.transposes:
                    follows = use.node in self.how and use.idx in self.how[use.node].follows
                    found[self.tensor(value)].append(use.node if follows else layout)
            if value.is_graph_output():
                found[self.tensor(value)].append(layout)
        return found


def frames(graph: Any) -> Iterator[Frame]:
    """All frames of one graph that have a transpose in them."""
    links, how = _links(graph)
    seen: set[Any] = set()
    for node in graph:
        first = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
        if first is not None and first not in seen and (axes := _axes(node)):
            frame = _spread(first, tuple(range(axes)), links)
            seen.update(frame.layouts)
            _settle(frame, links, how)
            if frame.transposes:
                yield frame


def compose(first: Layout, second: Any) -> Layout:
    """The order that transposing by `first` and then by `second` gives."""
    return tuple(first[axis] for axis in second)


def between(old: Layout, new: Layout) -> Layout:
    """The permutation that leads from one layout to another."""
    return tuple(old.index(axis) for axis in new)


def _axes(transpose: Any) -> int | None:
    if "perm" in transpose.attributes:
        return len(transpose.attributes["perm"].as_ints())
    return rank(transpose.inputs[0])


def _order(transpose: Any) -> Layout:
    if "perm" in transpose.attributes:
        return tuple(transpose.attributes["perm"].as_ints())
    return tuple(range(rank(transpose.inputs[0]) or 0))[::-1]


_Link = tuple[Any, Any, Layout | None]
"""Two values and the permutation that leads from the first to the second; None where they have one layout."""


def _links(graph: Any) -> tuple[dict[Any, list[tuple[Any, _Link]]], dict[Any, Flexible]]:
    """By value, its links with the node that makes each; and what is flexible."""
    links: dict[Any, list[tuple[Any, _Link]]] = defaultdict(list)
    how: dict[Any, Flexible] = {}
    for node in graph:
        for link in _links_of(node, graph, how):
            links[link[0]].append((node, link))
            links[link[1]].append((node, link))
    return links, how


def _links_of(node: Any, graph: Any, how: dict[Any, Flexible]) -> Iterator[_Link]:
    if node.op_type == "Transpose" and node.domain == "":
        if _axes(node) and not _used_deeper(node.outputs[0], graph):
            yield node.inputs[0], node.outputs[0], _order(node)
        return
    found = flexible(node)
    if found is None or (found.gives and any(_used_deeper(output, graph) for output in node.outputs)):
        return
    how[node] = found
    first, *others = [node.inputs[index] for index in found.follows]
    yield first, first, None
    yield from ((first, other, None) for other in (*others, *(node.outputs if found.gives else ())))


def _used_deeper(value: Any, graph: Any) -> bool:
    """Whether a subgraph uses `value`: it stays as it is then."""
    return any(use.node.graph is not graph for use in value.uses())


def _spread(first: Any, layout: Layout, links: dict[Any, list[tuple[Any, _Link]]]) -> Frame:
    """The frame of `first`: everything that links lead to, each with the layout that it is reached in first."""
    frame = Frame({first: layout})
    waiting = [first]
    while waiting:
        value = waiting.pop()
        for _, (start, end, order) in links[value]:
            here = frame.layouts[value]
            if order is None:
                there = here
            else:
                there = compose(here, order if value is start else between(order, tuple(range(len(order)))))
            for other in (start, end):
                if other not in frame.layouts:
                    frame.layouts[other] = there
                    waiting.append(other)
    return frame


def _settle(frame: Frame, links: dict[Any, list[tuple[Any, _Link]]], how: dict[Any, Flexible]) -> None:
    """Sort the nodes of a frame: a link that layouts contradict (a tensor added to its own transpose) binds nothing."""
    broken = set()
    for value in frame.layouts:
        for node, (start, end, order) in links[value]:
            expected = frame.layouts[start] if order is None else compose(frame.layouts[start], order)
            if frame.layouts[end] != expected:
                broken.add(node)
    for node in {node: None for value in frame.layouts for node, _ in links[value] if node not in broken}:
        if node in how:
            frame.how[node] = how[node]
        else:
            frame.transposes[node] = None
