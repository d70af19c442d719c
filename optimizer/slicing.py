"""Cuts units out of a graph: weights get smaller, and what says a size says the new one.

`cut(artifact, coupling, {group: units})` takes the positions of those units away along every axis that they lie on. Stored
tensors are sliced; nodes that count positions are told the new counts (groups of a convolution, sizes of a Split, bounds of
a Slice, amounts of a Pad, shapes of a Reshape, heads). Everything else of the graph stays as it is, names included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from perwatt.artifact import Artifact
from perwatt.coupling import padded, sliced
from perwatt.coupling_places import Coupling, Group, Place, virtual_place
from perwatt.errors import PassError
from perwatt.fusion import Builder, names_in, remove_unused
from perwatt.patterns import given, is_stored, stored

Kept = npt.NDArray[np.int64]


def cut(artifact: Artifact, coupling: Coupling, units: Mapping[Group, Sequence[int]]) -> Any:
    """The model without those units, as a new one. `coupling` is that of `artifact`, or of one that differs in weights alone.
    Raises PassError where nothing would be left of an axis."""
    surgery = Surgery(artifact, coupling, units)
    if surgery.nothing():
        return surgery.model
    surgery.nodes()
    surgery.tensors()
    surgery.shapes()
    remove_unused(surgery.model)
    return surgery.model


class Surgery:
    """A model under the knife: what is left of every axis that loses something."""

    def __init__(self, artifact: Artifact, coupling: Coupling, units: Mapping[Group, Sequence[int]]) -> None:
        self.model = artifact.edit()
        self.taken = names_in(self.model)
        self._lengths = coupling.lengths()
        self._class = coupling.same_class
        self._shapes = coupling.shapes()
        self.opset = coupling.facts.opset
        self._axes: dict[str, list[Place]] = {}
        for place in self._lengths:
            if place[1] >= 0:
                self._axes.setdefault(place[0], []).append(place)
        gone: dict[Place, list[Kept]] = {}
        for group, which in units.items():
            for place, positions in group.along().items():
                gone.setdefault(place, []).append(positions[_checked(group, which)].reshape(-1))
        self._kept: dict[Place, Kept] = {}
        for place, several in gone.items():
            lost = np.concatenate(several)
            if lost.size:
                self._kept[place] = np.setdiff1d(np.arange(self._lengths[place]), lost)
                if not self._kept[place].size:
                    names = ", ".join(group.name for group in units if place in group.along())
                    raise PassError(f"nothing would be left of what {names} makes", fix="cut fewer units")

    def nothing(self) -> bool:
        """Whether all stays."""
        return not self._kept

    # What is left -----------------------------------------------------------------------------------------------------

    def kept(self, value: Any, axis: int) -> Kept | None:
        """Positions that stay, in order; None where all do."""
        return self._at((str(value.name), axis))

    def kept_of(self, node: Any, word: str) -> Kept | None:
        """The same of an axis of no value."""
        return self._at(virtual_place(node, word))

    def _at(self, place: Place) -> Kept | None:
        return self._kept.get(self._class(place)) if place in self._lengths else None

    def touched(self, value: Any) -> dict[int, Kept]:
        """What is left, by axis, of a value that loses something."""
        if value is None or value.name is None:
            return {}
        found = {place[1]: self._at(place) for place in self._axes.get(str(value.name), ())}
        return {axis: kept for axis, kept in found.items() if kept is not None}

    # What was there ---------------------------------------------------------------------------------------------------

    def rank(self, value: Any) -> int:
        """How many axes a value has."""
        return len(self._shapes[str(value.name)])

    def length(self, value: Any, axis: int) -> int:
        """How many positions an axis had, which must be known."""
        return int(self._shapes[str(value.name)][axis])

    def new_length(self, value: Any, axis: int) -> int | None:
        """How many positions an axis has now, where that is known."""
        kept, size = self.kept(value, axis), self._shapes[str(value.name)][axis]
        return len(kept) if kept is not None else size if isinstance(size, int) else None

    def length_of(self, node: Any, word: str) -> int:
        """How many positions an axis of no value had."""
        return self._lengths[virtual_place(node, word)]

    def count(self, value: Any, axis: int, start: int, end: int) -> int:
        """How many positions from `start` up to `end` stay."""
        kept = self.kept(value, axis)
        return end - start if kept is None else int(np.count_nonzero((kept >= start) & (kept < end)))

    # What is changed --------------------------------------------------------------------------------------------------

    def nodes(self) -> None:
        """Tell nodes the new counts; before tensors are cut, so that both sides of each can be looked at."""
        for node in list(self.model.graph):
            rewrite = REWRITES.get(node.op_type) if node.domain == "" else None
            # Of what loses something, shapes are known; of others maybe not.
            if rewrite is not None and any(self.touched(value) for value in (*node.inputs, *node.outputs)):
                rewrite(node, self)

    def tensors(self) -> None:
        """Cut stored tensors."""
        import onnx_ir as ir

        values = {value.name: value for value in self.model.graph.initializers.values()}
        for node in self.model.graph:
            values.update((value.name, value) for value in given(node) if is_stored(value))
        for value in values.values():
            touched = self.touched(value)
            if not touched:
                continue
            array = stored(value)
            for axis, kept in touched.items():
                array = np.take(array, kept, axis=axis)
            tensor = ir.tensor(np.ascontiguousarray(array), name=value.name)
            if (producer := value.producer()) is None:
                value.const_value = tensor
            else:
                producer.attributes.clear()
                producer.attributes["value"] = ir.AttrTensor("value", tensor)
                value.const_value = None

    def shapes(self) -> None:
        """Write down how long axes are now."""
        import onnx_ir as ir

        values = [*self.model.graph.initializers.values(), *(out for node in self.model.graph for out in node.outputs)]
        for value in values:
            touched = self.touched(value)
            if touched and value.shape is not None:
                dims = list(value.shape)
                for axis, kept in touched.items():
                    dims[axis] = len(kept)
                value.shape = ir.Shape(dims)

    def listed(self, node: Any, position: int, numbers: Any, word: str, since: int = 0) -> None:
        """Give a node other whole numbers at one of its inputs, or as the attribute that they were before opset `since`."""
        import onnx_ir as ir

        if self.opset < since:
            node.attributes[word] = ir.AttrInt64s(word, [int(number) for number in numbers])
            return
        build = Builder(self.model.graph, node, self.taken)
        if len(node.inputs) <= position:
            node.resize_inputs(position + 1)
        node.replace_input_with(position, build.constant(np.asarray(numbers, np.int64), word))

    def attribute(self, node: Any, name: str, number: int) -> None:
        """Set a whole number among a node's attributes."""
        import onnx_ir as ir

        node.attributes[name] = ir.AttrInt64(name, int(number))


def _checked(group: Group, which: Sequence[int]) -> list[int]:
    """Numbers of units that there are. Raises PassError for others."""
    units = [int(unit) for unit in which]
    if wrong := [unit for unit in units if not 0 <= unit < group.size]:
        raise PassError(f"{group.name} has units 0 to {group.size - 1}, and none of number {wrong[0]}")
    return units


# By operator ----------------------------------------------------------------------------------------------------------


def conv(node: Any, its: Surgery) -> None:
    """Depthwise convolutions have as many groups as channels."""
    group = node.attributes.get_int("group", 1)
    kept = its.kept(node.inputs[0], 1)
    depthwise = group == its.length(node.inputs[0], 1)
    if kept is not None and depthwise:
        its.attribute(node, "group", len(kept))


def reshape(node: Any, its: Surgery) -> None:
    """Lengths that were named. A 0 takes over the input's axis at its place, whose positions may be other ones."""
    out = node.outputs[0]
    if not its.touched(out):
        return
    target = stored(node.inputs[1])
    if target is None:
        _mixed(node, 1, its.touched(out), its)
        return
    new = [int(size) for size in target]
    for axis, size in enumerate(new):
        length = its.new_length(out, axis)
        if size >= 0 and length is not None:
            new[axis] = length
    its.listed(node, 1, new, "shape")


def expand(node: Any, its: Surgery) -> None:
    """The same, counted from the last axis."""
    out, target = node.outputs[0], stored(node.inputs[1])
    touched = {axis - its.rank(out): kept for axis, kept in its.touched(out).items()}
    if not touched:
        return
    if target is None:
        count = its.length(node.inputs[1], 0)
        _mixed(node, 1, {axis + count: kept for axis, kept in touched.items() if axis + count >= 0}, its)
        return
    new = [int(size) for size in target]
    for axis, kept in touched.items():
        if -axis <= len(new):
            new[axis] = len(kept)
    its.listed(node, 1, new, "shape")


def resize(node: Any, its: Surgery) -> None:
    """The same, where sizes are given, of all axes or some."""
    if len(given(node)) <= 3 or node.inputs[3] is None:
        return
    rank, out = its.rank(node.outputs[0]), node.outputs[0]
    axes = (
        [axis % rank for axis in node.attributes["axes"].as_ints()] if "axes" in node.attributes else list(range(rank))
    )
    touched = {axes.index(axis): kept for axis, kept in its.touched(out).items() if axis in axes}
    if not touched:
        return
    sizes = stored(node.inputs[3])
    if sizes is None:
        _mixed(node, 3, touched, its)
        return
    its.listed(node, 3, [len(touched[at]) if at in touched else size for at, size in enumerate(sizes)], "sizes")


def _mixed(node: Any, position: int, touched: Mapping[int, Kept], its: Surgery) -> None:
    """Sizes that are calculated while the model runs keep what is not cut."""
    if not touched:
        return
    source = node.inputs[position]
    lengths = np.ones(its.length(source, 0), np.int64)
    changed = np.zeros(len(lengths), bool)
    for axis, kept in touched.items():
        lengths[axis], changed[axis] = len(kept), True
    build = Builder(its.model.graph, node, its.taken)
    mixed = build.op("Where", build.constant(changed, "changed"), build.constant(lengths, "lengths"), source)
    its.model.graph.insert_before(node, build.nodes)
    node.replace_input_with(position, mixed)


def split(node: Any, its: Surgery) -> None:
    """Sizes of the parts."""
    axis = node.attributes.get_int("axis", 0) % its.rank(node.inputs[0])
    if its.kept(node.inputs[0], axis) is None:
        return
    node.attributes.pop("num_outputs", None)
    its.listed(node, 1, [its.new_length(value, axis) or 0 for value in node.outputs], "split", since=13)


def slice_(node: Any, its: Surgery) -> None:
    """Bounds, counted among what is left."""
    rank = its.rank(node.inputs[0])
    taken = sliced(node, rank)
    touched = its.touched(node.inputs[0])
    if taken is None or not any(axis in touched for axis in taken):
        return
    new: dict[str, list[int]] = {"starts": [], "ends": [], "axes": [], "steps": []}
    for axis, (start, end, step) in taken.items():
        if axis in touched and step == 1:
            at = np.arange(its.length(node.inputs[0], axis))[slice(start, end)]
            low, high = (at[0], at[-1] + 1) if at.size else (0, 0)
            start, end = (int(np.searchsorted(touched[axis], bound)) for bound in (low, high))
        for word, one in (("starts", start), ("ends", end), ("axes", axis), ("steps", step)):
            new[word].append(one)
    for position, (word, numbers) in enumerate(new.items(), 1):
        if word != "steps" or its.opset >= 10:
            its.listed(node, position, numbers, word, since=10)


def gather(node: Any, its: Surgery) -> None:
    """Stored indices, counted among what is left."""
    rank = its.rank(node.inputs[0])
    axis = node.attributes.get_int("axis", 0) % rank
    kept = its.kept(node.inputs[0], axis)
    if kept is None or not is_stored(node.inputs[1]):
        return
    at = stored(node.inputs[1]).astype(np.int64) % its.length(node.inputs[0], axis)
    left = at if (stays := its.kept(node.outputs[0], axis)) is None else at[stays]
    its.listed(node, 1, np.searchsorted(kept, left), "indices")


def pad(node: Any, its: Surgery) -> None:
    """What is put in front and behind, as far as it stays."""
    rank = its.rank(node.inputs[0])
    amounts = padded(node, rank)
    touched = {**its.touched(node.inputs[0]), **its.touched(node.outputs[0])}
    if amounts is None or not any(any(amounts[axis]) for axis in touched):
        return
    new = list(amounts)
    for axis in touched:
        before, after = amounts[axis]
        length = its.length(node.inputs[0], axis)
        new[axis] = (
            its.count(node.outputs[0], axis, 0, before) if before > 0 else -its.count(node.inputs[0], axis, 0, -before),
            its.count(node.outputs[0], axis, length + before, length + before + after)
            if after > 0
            else -its.count(node.inputs[0], axis, length + after, length),
        )
    its.listed(node, 1, [one for one, _ in new] + [other for _, other in new], "pads", since=11)
    if len(given(node)) > 3:
        node.replace_input_with(3, None)


def attention(node: Any, its: Surgery) -> None:
    """Heads are counted where they are joined. One that all share stays one."""
    kept = its.kept_of(node, "heads")
    if kept is None:
        return
    for name in ("q_num_heads", "kv_num_heads", "num_heads"):
        if (before := node.attributes.get_int(name, 1)) > 1:
            its.attribute(node, name, before * len(kept) // its.length_of(node, "heads"))


REWRITES: dict[str, Callable[[Any, Surgery], None]] = {
    "Attention": attention, "Conv": conv, "ConvTranspose": conv, "Expand": expand, "Gather": gather, "Pad": pad,
    "Reshape": reshape, "Resize": resize, "RotaryEmbedding": attention, "Slice": slice_, "Split": split,
}  # fmt: skip
