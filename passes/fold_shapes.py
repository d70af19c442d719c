"""Fold arithmetic on shapes once the shapes of the inputs are known, down to almost nothing where the batch alone is not.

Exporters write into the graph how a shape was computed: Shape, Gather, Unsqueeze and Concat before each Reshape, Range and
Expand around each mask. None of it depends on what is fed but for its size, and mostly not even on that:

    s = Shape(x); b = Gather(s, 0); t = Concat(Unsqueeze(b), [16, 4, 16]); y = Reshape(x, t)
                becomes        y = Reshape(x, [0, 16, 4, 16])

Every value's shape, and the elements of small tensors, are worked out as expressions over the symbols in the inputs'
declared shapes (`perwatt.analysis_shapes`). With that, whatever has known elements is stored; the shape that Reshape and
Expand are given is stored where a size is either known, or the one that the axis has already (0 and 1), or the only one
that is left (-1); Reshape, Expand, Slice, Tile, Pad, Squeeze, Transpose and Gather that change nothing vanish; Gather and
GatherND whose indices count through a whole tensor, as exported masks do, become the Unsqueeze or Reshape that they are;
an Expand goes where those who use it repeat their inputs themselves; and what remains is computed in the fewest steps.

It saves little time by itself: what it removes is small. But it takes dynamic shapes away where there are none, which
backends plan memory and choose kernels by, and it makes constants of masks and tables of positions, which other passes
look for. Exact: nothing but what has the same bits at every size. Operators that may round differently elsewhere (Cos,
MatMul) are left for `fold-constants`, also where their inputs are constant now. Not done: sizes computed in subgraphs and
functions, what depends on elements of the input, and constants above `size_limit` elements, which a file would rather not
hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from perwatt.analysis_content import Affine
from perwatt.analysis_expressions import Expression, Number, named
from perwatt.analysis_shapes import LIMIT, Fact, Facts, analyse, same
from perwatt.artifact import Artifact
from perwatt.contract import Context, Pass, Stage, Tolerance
from perwatt.fusion import Builder, names_in, remove_unused, replace
from perwatt.passes._changes import count_changes
from perwatt.passes._expansions import unrepeated
from perwatt.passes._views import VIEWS, inserted_axes, reordered, shape_input, unchanged, views
from perwatt.patterns import Match, is_stored, made_by

_MOST_SWEEPS = 16
_INT64 = 7
"""ONNX's number for the type."""


@dataclass(frozen=True)
class FoldShapes(Pass):
    """Settings: results above `size_limit` elements stay computed (search: 2**12 … 2**24)."""

    stage: ClassVar[Stage] = Stage.CLEAN
    in_default: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("free-batch",)
    # Nothing here rounds, but ONNX Runtime sums a product in another order once a factor is stored.
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-6, rtol=1e-5)
    # ONNX's shape inference is C++, which has crashed on odd files.
    isolated: ClassVar[bool] = True

    size_limit: int = LIMIT

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        model = artifact.edit()
        done: Counter[str] = Counter()
        taken = names_in(model)
        for _ in range(_MOST_SWEEPS):
            facts = analyse(artifact, model, self.size_limit)
            sweep = _Sweep(model, facts, taken)
            if not (changes := sweep.run()):
                break
            done += changes
            remove_unused(model)
            model.graph.sort()
        _annotate(model.graph, facts)
        extra = [f"{times} {what}".format(s="s" * (times != 1)) for what, times in done.most_common()]
        after, changed = count_changes(self, artifact, model, extra)
        left = [f"{times} left: {reason}" for reason, times in Counter(_left(model.graph, facts)).most_common()]
        if after is artifact:
            noted = _noted(model.graph) > _noted(artifact.model.graph)
            return Artifact(model=model, steps=artifact.steps) if noted else artifact, left
        changed += left
        return artifact.after(model, self.step(changed)), changed


@dataclass
class _Sweep:
    """One walk through a graph, forwards for what can be replaced by something simpler, backwards for what can be stored."""

    model: Any
    facts: Facts
    taken: set[str]
    done: Counter[str] = field(default_factory=Counter)
    stored: dict[Any, Any] = field(default_factory=dict)
    read: dict[Any, Any] = field(default_factory=dict)
    kept: set[Any] = field(default_factory=set)

    @property
    def graph(self) -> Any:
        return self.model.graph

    def run(self) -> Counter[str]:
        for node in list(self.graph):
            if node.domain == "" and node.graph is self.graph:
                self._simplify(node)
        self._read_already()
        for node in reversed(list(self.graph)):
            if node.graph is self.graph and any(self._needed(value) for value in node.outputs):
                self.kept.add(node)
                self._store(node)
        return self.done

    # Forwards ---------------------------------------------------------------------------------------------------------

    def _simplify(self, node: Any) -> None:
        value = node.outputs[0]
        if not self._used(value) or self._known(value):
            return
        if (source := unchanged(self.facts, node)) is not None:
            self._replace(node, source, f"{node.op_type} removed: nothing changed")
        elif made_by(value, VIEWS) and (origin := self._unsqueezed(node)) is not None:
            self._reshape(node, origin, "view{s} of views turned into one Unsqueeze")
        elif node.op_type in ("Gather", "GatherND") and (source := reordered(self.facts, node)) is not None:
            self._reshape(node, source, f"{node.op_type} turned into a view: all is taken in order")
        elif node.op_type in ("Expand", "And", "Or") and (found := unrepeated(self.facts, node)) is not None:
            self._repeat_less(node, *found)

    def _repeat_less(self, node: Any, source: Any, enough: Any, shapes: Any) -> None:
        for changed, shape in shapes.items():
            changed.shape = None
            self.facts.known[changed] = Fact(self.facts.dtype(changed), shape)
        build = Builder(self.graph, node, self.taken)
        if not same(self.facts.shape(source), enough):
            target = _expanded(self.facts.shape(source), enough)
            sizes = self._constant(np.array(target, np.int64), f"{node.outputs[0].name}_shape")
            source = build.op("Expand", source, sizes)
        self._put(node, build, source, f"{node.op_type} cut short: others repeat anyway")

    def _used(self, value: Any) -> bool:
        return value.is_graph_output() or bool(value.uses())

    def _known(self, value: Any) -> bool:
        return self.facts.array(value) is not None and not value.is_graph_output()

    def _replace(self, node: Any, source: Any, what: str) -> None:
        build = Builder(self.graph, node, self.taken)
        self._put(node, build, source, what)

    def _put(self, node: Any, build: Builder, source: Any, what: str) -> None:
        old = node.outputs[0]
        fact = self.facts.known[old]
        replace(self.graph, Match(node, (node,), (old,)), build, (source,))
        self.facts.known.update((value, fact) for made in build.nodes for value in made.outputs)
        self.done[what] += 1

    def _unsqueezed(self, node: Any) -> Any:
        """What a view of a view only inserts axes into; None where it does more, or is one step already."""
        if self.facts.opset < 13:
            return None
        shape = self.facts.shape(node.outputs[0])
        origins = views(node.inputs[0])
        return next((one for one in origins if inserted_axes(self.facts.shape(one), shape) is not None), None)

    def _reshape(self, node: Any, source: Any, what: str) -> None:
        """Let a view of `source` take the place of `node`."""
        shape = self.facts.shape(node.outputs[0])
        build = Builder(self.graph, node, self.taken)
        for origin in (source, *views(source)):
            if same(self.facts.shape(origin), shape):
                return self._put(node, build, origin, what)
            axes = inserted_axes(self.facts.shape(origin), shape)
            if axes is not None and self.facts.opset >= 13:
                constant = self._constant(np.array(axes, np.int64), f"{origin.name}_axes")
                return self._put(node, build, build.op("Unsqueeze", origin, constant), what)
        target = shape_input(self.facts.shape(source), shape)
        if target is not None:
            constant = self._constant(np.array(target, np.int64), f"{source.name}_shape")
            self._put(node, build, build.op("Reshape", source, constant), what)
        return None

    # Backwards --------------------------------------------------------------------------------------------------------

    def _needed(self, value: Any) -> bool:
        """Whether somebody uses `value` who stays."""
        outside = any(use.node in self.kept or use.node.graph is not self.graph for use in value.uses())
        return outside or value.is_graph_output()

    def _store(self, node: Any) -> None:
        """Store what a node makes, or the shape that it is given."""
        if node.domain != "" or node.op_type == "Constant":
            return
        if not any(value.is_graph_output() for value in node.outputs) and self._store_outputs(node):
            self.kept.discard(node)
        elif node.op_type in ("Reshape", "Expand") and not is_stored(node.inputs[1]):
            self._store_shape(node)

    def _store_outputs(self, node: Any) -> bool:
        arrays = {value: self.facts.array(value) for value in node.outputs if self._needed(value)}
        if all(array is not None and array.size <= self.facts.limit for array in arrays.values()):
            for value, array in arrays.items():
                self._give(value, self._constant(array, value.name))
            self.done["value{s} stored"] += 1
            return True
        return len(node.outputs) == 1 and self._compute(node)

    def _store_shape(self, node: Any) -> None:
        before, after = self.facts.shape(node.inputs[0]), self.facts.shape(node.outputs[0])
        if node.op_type == "Reshape":
            target = shape_input(before, after, self.facts.content(node.inputs[1]))
        else:
            target = _expanded(before, after)
        if target is not None:
            node.replace_input_with(1, self._constant(np.array(target, np.int64), f"{node.outputs[0].name}_shape"))
            node.attributes.pop("allowzero", None)
            self.done[f"shape{{s}} of {node.op_type} stored"] += 1

    def _compute(self, node: Any) -> bool:
        """Compute sizes in the fewest steps from the shapes of inputs; no if that is how it is done, or can't be."""
        value = node.outputs[0]
        content, shape = self.facts.content(value), self.facts.shape(value)
        fits = self.facts.opset >= 15 and self.facts.dtype(value) == _INT64
        if not fits or content is None or shape is None or len(shape) > 1:
            return False
        items = [content.base] if isinstance(content, Affine) and shape == () else None
        if isinstance(content, np.ndarray) and content.dtype == object:
            items = list(content.flat)
        if not items or not all(self._readable(item) for item in items) or self._shortest(node):
            return False
        build = Builder(self.graph, node, self.taken)
        parts = [self._read(build, item) for item in _runs(items, self.facts)]
        made = parts[0] if len(parts) == 1 else build.op("Concat", *parts, axis=0)
        made = build.op("Squeeze", made) if shape == () else made
        self._keep(build)
        self._give(value, made)
        self.done["size{s} computed in fewer steps"] += 1
        return True

    def _readable(self, item: Any) -> bool:
        """Whether a size is known, or a multiple of one that an input has."""
        if isinstance(item, int):
            return True
        return item is not None and len(item.terms) == 1 and _unit(item) in self.facts.origins

    def _shortest(self, node: Any) -> bool:
        """Whether a node is one of those that `_compute` makes."""
        inputs = [value for value in node.inputs if not is_stored(value)]
        if node.op_type == "Shape":
            return bool(node.inputs[0].is_graph_input())
        if node.op_type not in ("Concat", "Squeeze", "Mul"):
            return False
        makers = [value.producer() for value in inputs]
        deeper = {"Concat": ("Shape", "Mul"), "Squeeze": ("Shape", "Mul"), "Mul": ("Shape",)}[node.op_type]
        return all(maker is not None and maker.op_type in deeper and self._shortest(maker) for maker in makers)

    def _read(self, build: Builder, item: tuple[Any, ...]) -> Any:
        """A list of sizes: stored, a stretch of an input's shape, or a multiple of one size."""
        if item in self.read:
            return self.read[item]
        if all(isinstance(size, int) for size in item):
            return self._constant(np.array(item, np.int64), f"{build.root.outputs[0].name}_sizes")
        unit = tuple(_unit(size) for size in item)
        value, axis = self.facts.origins[unit[0]]
        if unit == item:
            made = build.op("Shape", value, start=axis, end=axis + len(item))
        else:
            factor = self._constant(np.array([next(iter(item[0].terms.values()))], np.int64), "factor")
            made = build.op("Mul", self._read(build, unit), factor)
        made.type, made.shape = _int64(), _shape([len(item)])
        self.read[item] = made
        return made

    def _read_already(self) -> None:
        """Note which sizes the graph reads off its inputs as it is."""
        for node in self.graph:
            if node.domain == "" and node.op_type == "Shape" and node.inputs[0].is_graph_input():
                content = self.facts.content(node.outputs[0])
                if isinstance(content, np.ndarray) and content.dtype == object:
                    self.read.setdefault(tuple(content.flat), node.outputs[0])

    def _keep(self, build: Builder) -> None:
        """Put the nodes of `build` to the front, so that others can use them too."""
        first = next(iter(self.graph))
        self.graph.insert_before(first, build.nodes)
        self.kept.update(build.nodes)

    def _give(self, old: Any, new: Any) -> None:
        import onnx_ir as ir

        new.type, new.shape = new.type or old.type, new.shape or old.shape
        ir.convenience.replace_all_uses_with(old, new)

    def _constant(self, array: Any, name: str) -> Any:
        """A weight that holds `array`; the same one for the same array."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.stored:
            build = Builder(self.graph, next(iter(self.graph)), self.taken)
            self.stored[key] = build.constant(np.array(array, order="C"), name)
        return self.stored[key]


def _expanded(before: Any, after: Any) -> list[int] | None:
    """What Expand has to be given; None where a size isn't known. 1 leaves an axis as it is."""
    if before is None or after is None:
        return None
    old = (1,) * (len(after) - len(before)) + tuple(before)
    sizes = [1 if one == two else two for one, two in zip(old, after, strict=True)]
    return [int(size) for size in sizes if isinstance(size, int)] if all(isinstance(n, int) for n in sizes) else None


def _unit(size: Any) -> Any:
    """A multiple of a symbol without its factor."""
    return Expression(dict.fromkeys(size.terms, 1)) if isinstance(size, Expression) else size


def _runs(items: list[Any], facts: Facts) -> Iterator[tuple[Any, ...]]:
    """The items, those together that are stored or lie together in the shape of an input."""
    run: list[Any] = []
    for item in items:
        if run and not _goes_on(run[-1], item, facts):
            yield tuple(run)
            run = []
        run.append(item)
    yield tuple(run)


def _goes_on(last: Number, item: Number, facts: Facts) -> bool:
    if isinstance(last, int) or isinstance(item, int):
        return isinstance(last, int) and isinstance(item, int)
    if last not in facts.origins or item not in facts.origins:
        return False
    (value, axis), (other, next_axis) = facts.origins[last], facts.origins[item]
    return value is other and next_axis == axis + 1


def _annotate(graph: Any, facts: Facts) -> None:
    """Write down types and shapes that are known now, for those who come after."""
    import onnx_ir as ir

    for value in (value for node in graph for value in node.outputs if not value.is_graph_output()):
        shape, dtype = facts.shape(value), facts.dtype(value)
        if dtype is not None and value.type is None:
            value.type = ir.TensorType(ir.DataType(dtype))
        if shape is not None and isinstance(value.type, ir.TensorType):
            written = value.shape if value.shape is not None and len(value.shape) == len(shape) else [None] * len(shape)
            old = list(written)
            value.shape = _shape([_dim(new, dim) for new, dim in zip(shape, old, strict=True)])


def _noted(graph: Any) -> int:
    """How many types and sizes are noted on the values inside `graph`."""
    values = [value for node in graph for value in node.outputs]
    sizes = sum(dim is not None and getattr(dim, "value", dim) is not None for v in values for dim in v.shape or ())
    return sizes + sum((v.type is not None) + (v.shape is not None) for v in values)


def _dim(size: Number, before: Any) -> Any:
    """A size as it is written; what the file said already where that is more."""
    if isinstance(size, int) or isinstance(before, int):
        return size if isinstance(size, int) else before
    return str(size) if named(size) else before


def _shape(dims: list[Any]) -> Any:
    import onnx_ir as ir

    return ir.Shape(dims)


def _int64() -> Any:
    import onnx_ir as ir

    return ir.TensorType(ir.DataType.INT64)


def _left(graph: Any, facts: Facts) -> Iterator[str]:
    """Why sizes are still computed."""
    for node in graph:
        if node.domain != "":
            continue
        computed = node.op_type in ("Reshape", "Expand") and not is_stored(node.inputs[1])
        if computed and facts.shape(node.inputs[0]) is None:
            yield f"nobody knows the shape of what {node.op_type} is given"
        elif computed and node.op_type == "Reshape":
            yield "Reshape to more than one size that only the input knows"
        elif computed:
            yield "Expand to a size that only the input knows"
        elif node.op_type in ("Range", "ConstantOfShape") and facts.content(node.outputs[0]) is None:
            size = facts.size(node.outputs[0])
            if isinstance(size, int) and size > facts.limit:
                yield f"{node.op_type} makes more than {facts.limit} elements"
