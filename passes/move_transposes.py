"""Move transposes through the operators around them, where that makes them meet and vanish.

    Transpose(Relu(Transpose(x, [0, 2, 3, 1]) · 2), [0, 3, 1, 2])        becomes        Relu(x · 2)
    Transpose(a, p) + Transpose(b, p)                                    becomes        Transpose(a + b, p)
    ReduceMean(Transpose(x, [0, 2, 3, 1]), axes [1, 2])                  becomes        ReduceMean(x, axes [2, 3])

TensorFlow thinks of images with channels last, ONNX with channels first; ConvNeXt and Swin change their mind twice a block.
Most operators between two transposes don't care: element-wise ones, Softmax, reductions, Concat, Split, Slice, Pad,
quantization, and normalizations and products as long as their own axes stay; stored operands are transposed now.

Which of them should compute in which of two layouts so that fewest transposes are left is a minimum cut: every operator is
on one of two sides, and a tensor that is wanted on both costs one transpose, however many want it. So residual branches
are moved as a whole or not at all, and the number of transposes can only fall. Among equal choices the one that changes
the fewest operators is taken. Each transpose saved is one trip of a tensor through memory; those that stay are as many,
but may stand at larger tensors than before, which the measurement of this pass will tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, Stage, Tolerance
from perwatt.fusion import Builder, names_in, remove_unused
from perwatt.passes._frames import Frame, Layout, between, frames
from perwatt.passes._layouts import turn
from perwatt.passes._minimum_cut import FOREVER, Network

_MOST_LAYOUTS = 4
"""Of a frame are weighed against each other, the most frequent ones."""


@dataclass(frozen=True)
class MoveTransposes(Pass):
    """No settings."""

    stage: ClassVar[Stage] = Stage.CLEAN
    in_default: ClassVar[bool] = True
    # Sums over the same numbers in another order.
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-6, rtol=1e-5)
    after: ClassVar[tuple[str, ...]] = ("cancel-transposes",)

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        model = artifact.edit()
        taken = names_in(model)
        saved = moved = 0
        for graph in (model.graph, *model.graph.subgraphs()):
            # A transpose that hindered others may be gone afterwards; each round saves one at least.
            while (gain := _improve(graph, taken))[0]:
                saved, moved = saved + gain[0], moved + gain[1]
                remove_unused(model)
        if not saved:
            return artifact, []
        through = f" by computing {moved} other operators on axes in another order" if moved else ""
        changes = [f"{saved} transposes saved{through}"]
        return artifact.after(model, self.step(changes)), changes

    def ensures(self, before: Artifact, after: Artifact) -> Iterator[str]:
        old, new = (artifact.operator_counts().get("Transpose", 0) for artifact in (before, after))
        if new >= old:
            yield f"{old} transposes became {new}"


def _improve(graph: Any, taken: set[str]) -> tuple[int, int]:
    """How many transposes of a graph were saved, and how many nodes changed for that."""
    saved = moved = 0
    for frame in list(frames(graph)):
        chosen = best_layouts(frame)
        cost = price(frame, chosen)
        if cost < len(frame.transposes):
            saved += len(frame.transposes) - cost
            moved += sum(layout != frame.layout_of(node) for node, layout in chosen.items())
            _Rewriter(graph, frame, chosen, taken).run()
    return saved, moved


# Choosing -------------------------------------------------------------------------------------------------------------


def price(frame: Frame, chosen: dict[Any, Layout]) -> int:
    """How many transposes a choice of layouts takes."""
    return sum(
        len({chosen.get(user, user) for user in users} - {_given_in(frame, tensor, chosen)})
        for tensor, users in frame.demands().items()
    )


def _given_in(frame: Frame, tensor: Any, chosen: dict[Any, Layout]) -> Layout:
    maker = frame.maker(tensor)
    return frame.layouts[tensor] if maker is None else chosen[maker]


def best_layouts(frame: Frame) -> dict[Any, Layout]:
    """A layout for every flexible node, such that no change between any two layouts saves another transpose."""
    chosen = {node: frame.layout_of(node) for node in frame.how}
    frequent = [layout for layout, _ in Counter(frame.layouts.values()).most_common(_MOST_LAYOUTS)]
    best, better = price(frame, chosen), True
    while better:
        better = False
        for pair in combinations(frequent, 2):
            candidate = _cut(frame, chosen, pair)
            if price(frame, candidate) < best:
                chosen, best, better = candidate, price(frame, candidate), True
    return chosen


def _cut(frame: Frame, chosen: dict[Any, Layout], pair: tuple[Layout, Layout]) -> dict[Any, Layout]:
    """The best choice where only nodes that are in one of two layouts may change to the other."""
    network = Network()
    # One transpose weighs more than changing every node.
    one = len(chosen) + 1
    free = {node for node, layout in chosen.items() if layout in pair and _may_take(frame, node, pair)}
    for node in free:
        stays = frame.layout_of(node)
        if stays in pair:
            start, end = ("first", node) if stays == pair[0] else (node, "second")
            network.edge(start, end, 1)
    for number, (tensor, users) in enumerate(frame.demands().items()):
        maker = frame.maker(tensor)
        source = maker if maker in free else _side(_given_in(frame, tensor, chosen), pair)
        sides = {user if user in free else _side(chosen.get(user, user), pair) for user in users} - {None}
        _tie(network, number, source, sides, one)
    _, first = network.cut("first", "second")
    return {
        node: (pair[0] if node in first else pair[1]) if node in free else layout for node, layout in chosen.items()
    }


def _side(layout: Layout, pair: tuple[Layout, Layout]) -> str | None:
    return "first" if layout == pair[0] else "second" if layout == pair[1] else None


def _tie(network: Network, number: int, source: Any, users: set[Any], cost: int) -> None:
    """A tensor that is given on one side and wanted on the other costs a transpose, once for all who want it there; one
    that is given in a third layout costs one for each side that wants it."""
    early, late = (number, "wanted first"), (number, "wanted second")
    for user in users:
        if user != "second":
            network.edge(user, early, FOREVER)
        if user != "first":
            network.edge(late, user, FOREVER)
    network.edge(early, source or "second", cost)
    network.edge(source or "first", late, cost)


def _may_take(frame: Frame, node: Any, pair: tuple[Layout, Layout]) -> bool:
    now = frame.layout_of(node)
    return all(frame.how[node].allows(between(now, layout)) for layout in pair)


# Rewriting ------------------------------------------------------------------------------------------------------------


class _Rewriter:
    """Makes one frame of a graph compute in the layouts chosen. Nodes are changed in place, in order, so that what a node
    needs is there when its turn comes."""

    def __init__(self, graph: Any, frame: Frame, chosen: dict[Any, Layout], taken: set[str]) -> None:
        self.graph, self.frame, self.chosen, self.taken = graph, frame, chosen, taken
        self.shapes = {output: output.shape for output in graph.outputs}
        self.have: dict[tuple[Any, Layout], Any] = {}
        for transpose in frame.transposes:
            source, target = transpose.inputs[0], transpose.outputs[0]
            if frame.maker(source) is None and frame.tensor(source) is source:
                self.have.setdefault((source, frame.layouts[target]), target)

    def run(self) -> None:
        uses = [(value, use.node, use.idx) for value in self.frame.layouts for use in value.uses()]
        inputs: dict[Any, list[tuple[Any, int]]] = {}
        for value, node, index in uses:
            if node not in self.frame.transposes:
                inputs.setdefault(node, []).append((value, index))
        for node in list(self.graph):
            if node in inputs:
                self._change(node, inputs[node])
        for position, output in enumerate(self.graph.outputs):
            if output in self.frame.layouts:
                self._give(position, output)
        self.graph.sort()

    def _change(self, node: Any, inputs: list[tuple[Any, int]]) -> None:
        """One node: inputs in the layout that it is to have, and itself changed where that is not its own."""
        build = Builder(self.graph, node, self.taken)
        how = self.frame.how.get(node)
        old = self.frame.layout_of(node) if how else ()
        for value, index in inputs:
            follows = how is not None and index in how.follows
            wanted = self.chosen[node] if follows else self.frame.layouts[value]
            node.replace_input_with(index, self._in_layout(value, wanted, build))
        self.graph.insert_before(node, build.nodes)
        if how is not None and self.chosen[node] != old:
            turn(node, between(old, self.chosen[node]), build, how)

    def _in_layout(self, value: Any, wanted: Layout, build: Builder) -> Any:
        """The tensor behind `value` in a layout, transposed where it isn't there yet."""
        import onnx_ir as ir

        tensor = self.frame.tensor(value)
        given = _given_in(self.frame, tensor, self.chosen)
        if wanted == given:
            return tensor
        if (tensor, wanted) not in self.have:
            order = between(given, wanted)
            made = build.op("Transpose", tensor, perm=list(order))
            made.shape = ir.Shape([tensor.shape[axis] for axis in order]) if tensor.shape is not None else None
            self.have[tensor, wanted] = made
        return self.have[tensor, wanted]

    def _give(self, position: int, output: Any) -> None:
        """An output in its own layout, under its own name."""
        build = Builder(self.graph, output.producer() or self.graph[-1], self.taken)
        value = self._in_layout(output, self.frame.layouts[output], build)
        if value is output:
            return
        node = value.producer()
        if value.is_graph_output() or node is None or node.graph not in (self.graph, None):
            value = build.op("Identity", value)
        self.graph.extend(build.nodes)
        name, output.name = output.name, build.unused(f"{output.name}_before")
        value.name, value.type, value.shape = name, output.type, self.shapes[output]
        self.graph.outputs[position] = value
