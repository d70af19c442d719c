"""`Fusion`: what passes that replace one pattern by something better have in common.

Such a pass says three things apart from each other: where the pattern is (`patterns`, or `find` where no fixed picture will
do), why an occurrence may still not be replaced (`check`), and by what it is replaced (`rewrite`). Everything else is
here: the search, in order, until nothing more is found; the rule that no value inside may have users outside; names, types
and shapes of what is put in; and the words for the ledger, refusals with their reasons and counts.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import chain, count, repeat
from typing import Any, ClassVar

from perwatt.artifact import Artifact, graphs_of
from perwatt.contract import Context, Pass, Stage
from perwatt.patterns import Match, Op, given, occurrences

_MOST_SWEEPS = 64
NEW_MEANING = {"RoiAlign": 16, "GroupNormalization": 21}
"""Versions since which the same inputs and attributes give something else, where the schema alone doesn't tell: RoiAlign
took corners for centres of pixels by default until then, GroupNormalization one scale for each group."""


class Fusion(Pass):
    """Replaces every occurrence of a pattern that its `check` lets pass.

    `roots`: the operators that an occurrence ends with. `what`: what is replaced, in the plural, for the ledger.
    `opset`: the oldest version of ONNX's operators that has what is put in. `operator`: what is put in, where not every
    backend runs it: it is only done for targets whose `Capabilities.operators` name it. `takes_apart`: an operator that is
    written out, for targets that name others there and not this one. With either the pass must say that it
    `depends_on_target`."""

    stage: ClassVar[Stage] = Stage.FUSE
    in_default: ClassVar[bool] = True
    roots: ClassVar[tuple[str, ...]]
    what: ClassVar[str]
    opset: ClassVar[int] = 0
    operator: ClassVar[str | None] = None
    takes_apart: ClassVar[str | None] = None

    def requires(self, artifact: Artifact, context: Context) -> Iterator[str]:
        whole = context.capabilities.operators
        if self.operator and self.operator not in whole:
            yield f"this backend does not run {self.operator} as one operator"
        if self.takes_apart and not whole:
            yield "this backend doesn't say which operators it takes whole"
        if self.takes_apart and self.takes_apart in whole:
            yield f"this backend runs {self.takes_apart} as one operator"
        if reason := opset_refusal(artifact.model, self.opset):
            yield reason

    def patterns(self) -> Sequence[Op]:
        """Pictures of what is looked for, the likeliest first."""
        return ()

    def find(self, node: Any) -> Iterator[Match]:
        """Occurrences that end with `node`, likeliest first; the first that passes `check` is taken."""
        for pattern in self.patterns():
            yield from occurrences(pattern, node)

    def check(self, match: Match) -> Iterator[str]:
        """Reasons why this occurrence stays as it is; silence means that it may go."""
        yield from ()

    @abstractmethod
    def rewrite(self, match: Match, build: Builder) -> Any:
        """The values that take the place of `match.outputs`: one, or several in a tuple. May be values that are there
        already. New nodes and constants come from `build`."""

    def run(self, artifact: Artifact, context: Context) -> tuple[Artifact, list[str]]:
        model = artifact.edit()
        taken = names_in(model)
        done, refused = 0, Counter[str]()
        for _ in range(_MOST_SWEEPS):
            here, refused = self._swept(model, taken)
            if not here:
                break
            done += here
            model.graph.sort()
            # What nobody uses any more must not count as a user of anything in the next sweep.
            remove_unused(model)
        notes = [f"{times} left: {reason}" for reason, times in refused.most_common()]
        if not done:
            return artifact, notes
        raise_opset(model, self.opset)
        changes = [f"{done} {self.what}", *notes]
        return artifact.after(model, self.step(changes)), changes

    def ensures(self, before: Artifact, after: Artifact) -> Iterator[str]:
        old, new = sum(before.operator_counts().values()), sum(after.operator_counts().values())
        if new > old and not self.takes_apart:
            yield f"{old} nodes became {new}"

    def _swept(self, model: Any, taken: set[str]) -> tuple[int, Counter[str]]:
        """How many were replaced on one way through all graphs, and what was left, counted by reason."""
        done, refused = 0, Counter[str]()
        for graph in (model.graph, *model.graph.subgraphs()):
            # From the end: what ends later is larger, as a normalization with its scale and shift is.
            for node in reversed(list(graph)):
                # A rewrite takes nodes away that this sweep has not come to yet.
                if node.graph is graph and node.domain == "" and node.op_type in self.roots:
                    replaced, reason = self._tried(graph, node, taken)
                    done += replaced
                    refused.update([reason] if reason else [])
        return done, refused

    def _tried(self, graph: Any, node: Any, taken: set[str]) -> tuple[bool, str | None]:
        first: str | None = None
        for match in self.find(node):
            reason = refusal(match) or next(iter(self.check(match)), None)
            if reason is None:
                build = Builder(graph, match.root, taken)
                values = self.rewrite(match, build)
                replace(graph, match, build, values if isinstance(values, tuple) else (values,))
                return True, None
            first = first or reason
        return False, first


def refusal(match: Match) -> str | None:
    """Why no pass may replace this occurrence: it crosses the border of a graph, or a value inside has users outside."""
    if any(node.graph is not match.root.graph for node in match.nodes):
        # What is done once before a loop would be done every time in its body.
        return "a part of it lies in the graph around it"
    value = match.used_elsewhere()
    if value is None:
        return None
    return "a value inside it is an output" if value.is_graph_output() else "a value inside it is used elsewhere too"


class Builder:
    """Makes the nodes and constants of a rewrite. `taken`: the names of all values and nodes of the model so far, to which
    its own are added."""

    def __init__(self, graph: Any, root: Any, taken: set[str]) -> None:
        self.graph, self.root, self._taken = graph, root, taken
        self.nodes: list[Any] = []

    def op(
        self, kind: str, *inputs: Any, domain: str = "", outputs: int = 1, version: int | None = None, **attributes: Any
    ) -> Any:
        """A node's output, or a tuple of several. Attributes that are None are left out, inputs that are None are empty."""
        import onnx_ir as ir

        kept = {name: value for name, value in attributes.items() if value is not None}
        node = ir.node(kind, list(inputs), kept, domain=domain, num_outputs=outputs, version=version)
        node.name = self.unused(self.root.name) if self.root.name else None
        for value in node.outputs:
            value.name = self.unused(f"{self.root.outputs[0].name}_{kind.lower()}")
        for position, value in enumerate(node.outputs):
            value.type = _type_of_output(node, position)
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def constant(self, array: Any, name: str) -> Any:
        """A weight that holds `array` (its dtype counts), called after `name`."""
        import onnx_ir as ir

        tensor: Any = ir.tensor(array)
        tensor.name = self.unused(name)
        value = ir.Value(name=tensor.name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value

    def unused(self, wanted: str) -> str:
        """`wanted`, with a number behind it where somebody has that name."""
        free = (f"{wanted}_{number}" for number in count(1))
        name = wanted if wanted not in self._taken else next(name for name in free if name not in self._taken)
        self._taken.add(name)
        return name


def names_in(model: Any) -> set[str]:
    """Names of all values and nodes of `model`, subgraphs included."""
    found: set[str] = set()
    for graph in graphs_of(model):
        found.update(graph.initializers, (value.name for value in graph.inputs))
        found.update(name for node in graph for name in (node.name, *(value.name for value in node.outputs)) if name)
    return found


def replace(graph: Any, match: Match, build: Builder, values: Sequence[Any]) -> None:
    """Put the new nodes in, let everybody use `values` in the place of `match.outputs`, and take the match's nodes out.
    New values take over name, type and shape of the old ones; what was there already keeps its own."""
    import onnx_ir as ir

    fresh = {id(value) for node in build.nodes for value in node.outputs}
    for position, (old, new) in enumerate(zip(match.outputs, values, strict=True)):
        takes_over = id(new) in fresh and not any(new is other for other in values[:position])
        if old.is_graph_output() and not takes_over:
            # An output keeps its name, and what lies elsewhere keeps the name it has.
            new, takes_over = build.op("Identity", new), True
        if takes_over:
            name, old.name = old.name, build.unused(f"{old.name}_before")
            new.name, new.type = name, old.type or new.type
        # The declared type and shape of an input or output are the model's signature, and stay as they are.
        if old.is_graph_output():
            new.shape = old.shape
        elif takes_over:
            new.shape = new.shape if old.shape is None else old.shape
        elif not new.is_graph_input() and not new.is_graph_output():
            new.type, new.shape = new.type or old.type, old.shape if new.shape is None else new.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.insert_after(match.root, build.nodes)
    left = list(match.nodes)
    # One that a shared node leans on stays with it.
    while gone := [node for node in left if not any(v.uses() or v.is_graph_output() for v in node.outputs)]:
        graph.remove(gone, safe=True)
        left = [node for node in left if node not in gone]


def remove_unused(model: Any) -> None:
    """Take out nodes and weights that no output depends on any more."""
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(model)
    for graph in model.graph.subgraphs():
        for weight in list(graph.initializers.values()):
            if not (weight.uses() or weight.is_graph_output() or weight.is_graph_input()):
                del graph.initializers[weight.name]


def _type_of_output(node: Any, position: int) -> Any:
    """What the operator's schema says of an output's type: one of its own, or that of an input; None where neither is
    known."""
    import onnx
    import onnx_ir as ir

    if node.op_type == "Cast" and node.domain == "":
        return ir.TensorType(ir.DataType(node.attributes["to"].as_int()))
    try:
        schema = onnx.defs.get_schema(node.op_type, domain=node.domain)
    except onnx.defs.SchemaError:
        # Operators of other domains have no schema here; most of theirs give what they take.
        return copy(node.inputs[0].type) if position == 0 and node.inputs and node.inputs[0] is not None else None
    output = schema.outputs[min(position, len(schema.outputs) - 1)]
    if len(output.types) == 1 and (plain := re.fullmatch(r"tensor\((\w+)\)", *output.types)):
        return ir.TensorType(ir.DataType[plain[1].upper()])
    ports = zip(node.inputs, chain(schema.inputs, repeat(schema.inputs[-1] if schema.inputs else None)), strict=False)
    alike = (
        value.type for value, port in ports if value is not None and value.type and port.type_str == output.type_str
    )
    # A copy: types can be changed in place.
    return copy(next(alike, None))


# Opsets ---------------------------------------------------------------------------------------------------------------


def opset_refusal(model: Any, wanted: int) -> str | None:
    """Why `model` can't hold operators of opset `wanted`; None where it can, or can be raised to it."""
    opset = model.opset_imports.get("", 0)
    if opset >= wanted:
        return None
    if others := _changed_between(model, opset, wanted):
        return f"this needs opset {wanted}, the model is opset {opset}, and {others[0]} means something else there"
    return None


def raise_opset(model: Any, wanted: int) -> None:
    """Declare opset `wanted` where the model's is older and `opset_refusal` has no objection."""
    import onnx_ir as ir

    opset = model.opset_imports.get("", 0)
    if opset >= wanted:
        return
    for node in model.graph.all_nodes() if opset < 18 <= wanted else ():
        # Until then a Split without sizes meant equal parts, as many as it has outputs.
        if node.op_identifier() == ("", "Split", "") and len(given(node)) < 2:
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
    model.graph.opset_imports[""] = wanted


def _changed_between(model: Any, old: int, new: int) -> list[str]:
    """Operators in use that are more than widened from opset `old` to `new`: inputs, outputs, attributes or what they
    mean differ. In functions, which keep the opset they have, the checker wants the very same version."""
    main = {(node.op_type, old, False) for node in model.graph.all_nodes() if node.domain == ""}
    inner = {
        (node.op_type, function.opset_imports.get("", old), True)
        for function in model.functions.values() for node in function.all_nodes() if node.domain == ""
    }  # fmt: skip
    return [kind for kind, opset, same in sorted(main | inner) if _changed(kind, opset, new, same)]


def _changed(kind: str, old: int, new: int, same: bool) -> bool:
    """Whether the operator can't be taken for its later version; `same`: whether any later version is too much."""
    import onnx

    try:
        before, after = (onnx.defs.get_schema(kind, opset) for opset in (old, new))
    except onnx.defs.SchemaError:
        return True
    if before.since_version == after.since_version:
        return False
    new_meaning = before.since_version < NEW_MEANING.get(kind, 0) <= after.since_version
    return same or new_meaning or before.deprecated or after.deprecated or not _widened(before, after)


def _widened(before: Any, after: Any) -> bool:
    """Whether `after` takes all that `before` does, in the same way: more types, and options at the end."""
    for name in ("inputs", "outputs"):
        old, new = getattr(before, name), getattr(after, name)
        if [port.name for port in old] != [port.name for port in new][: len(old)]:
            return False
        if any(port.option.name == "Single" for port in new[len(old) :]):
            return False
        if any(not set(a.types) <= set(b.types) for a, b in zip(old, new, strict=False)):
            return False
    if any(attribute.required for name, attribute in after.attributes.items() if name not in before.attributes):
        return False
    return all(
        name in after.attributes and attribute.default_value == after.attributes[name].default_value
        for name, attribute in before.attributes.items()
    )
