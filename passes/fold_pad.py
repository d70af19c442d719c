"""Let convolutions and pooling do the padding that a Pad before them does.

A Pad copies the whole tensor to put a border around it, while a convolution adds zeros at its edges for nothing:
TensorFlow's models pad explicitly before strided convolutions, because "same" padding at stride 2 has more on one side.

    Pad(x, [0,0,0,0, 0,0,1,1]) → Conv(W, strides=[2,2])        becomes        Conv(x, W, pads=[0,0,1,1])

What each operator assumes beyond the edge (ONNX's operator specification) decides what may go into it:

- Conv: zeros, so a Pad with zeros.
- AveragePool: zeros that count, if `count_include_pad` says so, which is then set; it must not have had padding of its own
  that doesn't count.
- MaxPool: minus infinity, so a Pad with that or the type's lowest number; and one with any number that the data provably
  never falls below, as zeros are after a Relu, because every window then holds something at least as large.

Only constants in the spatial axes go; cropping (negative pads), reflected edges and pads of as much as the kernel is wide,
which backends refuse or run slowly, stay. Where the padding is derived from the size of the input (`auto_pad`) it is
written out first, as far as that size is known. ConvTranspose is no candidate: its `pads` cut the result, so padding its
input would make them negative. A Pad that pads nothing vanishes whatever follows.

OpenVINO and ONNX Runtime find those before convolutions and averages themselves, so there it makes the graph smaller, and
gives quantization an operator that begins with its own input; before maximum pooling it saves OpenVINO a quarter of the
pooling's time. It pays on every backend that takes graphs as they are, by the traffic of one tensor a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from perwatt.fusion import Builder, Fusion
from perwatt.patterns import Match, given, made_by, number, numbers, rank, size

TAKERS = "Conv|MaxPool|AveragePool"
NONNEGATIVE = "Relu|Sigmoid|HardSigmoid|Softmax|Softplus|Exp|Abs|Sqrt"
ONLY_MOVES = "Concat|Reshape|Transpose|Identity"
_DEEPEST = 8


@dataclass(frozen=True)
class FoldPad(Fusion):
    """No settings."""

    after: ClassVar[tuple[str, ...]] = ("fold-shapes",)
    roots: ClassVar[tuple[str, ...]] = (*TAKERS.split("|"), "Pad")
    what: ClassVar[str] = "paddings done by what follows, or of nothing"
    # From there on AveragePool can count what it pads.
    opset: ClassVar[int] = 7

    def find(self, node: Any) -> Iterator[Match]:
        pad = node if node.op_type == "Pad" else made_by(node.inputs[0], "Pad")
        if pad is None:
            return
        pads = stored_pads(pad)
        nothing = pads is not None and not any(pads)
        if pad is node and nothing:
            yield Match(node, (node,), (node.outputs[0],))
        elif pad is not node and not nothing:
            yield Match(node, (node,), (node.outputs[0],), named={"pad": pad}, shared=(pad,))

    def check(self, match: Match) -> Iterator[str]:
        pad = match.named.get("pad")
        if pad is None:
            return
        if reason := obstacle(pad, match.root):
            yield reason
        elif pad.outputs[0].is_graph_output():
            yield "the padded tensor is an output"
        elif any(use.idx != 0 or not takes(pad, use.node) for use in pad.outputs[0].uses()):
            yield "the padded tensor is used by something that can't pad"

    def rewrite(self, match: Match, build: Builder) -> Any:
        pad, root = match.named.get("pad"), match.root
        if pad is None:
            return root.inputs[0]
        kept = {name: attribute.value for name, attribute in root.attributes.items() if name != "auto_pad"}
        begin, end = border(pad, len(kernel_shape(root)))
        own_begin, own_end = own_padding(root) or ([], [])
        kept["pads"] = [*np.add(begin, own_begin).tolist(), *np.add(end, own_end).tolist()]
        if root.op_type == "AveragePool":
            kept["count_include_pad"] = 1
        return build.op(root.op_type, pad.inputs[0], *root.inputs[1:], **kept)


# Why not --------------------------------------------------------------------------------------------------------------


def takes(pad: Any, node: Any) -> bool:
    """Whether `node` can do what `pad` does for it."""
    return node.domain == "" and node.op_type in TAKERS.split("|") and obstacle(pad, node) is None


def obstacle(pad: Any, node: Any) -> str | None:
    """Why `node` can't do what `pad` does; None where it can."""
    kernel = kernel_shape(node)
    if reason := _unusual(pad) or _beyond_space(pad, len(kernel)):
        return reason
    begin, end = border(pad, len(kernel))
    if min(*begin, *end) < 0:
        return "it crops"
    own = own_padding(node)
    if own is None:
        return "the padding of what follows depends on a size that isn't known"
    widest = [step * (length - 1) + 1 for length, step in zip(kernel, _dilations(node), strict=True)]
    # Pooling counts the kernel's own entries: a window must not lie beyond the edge altogether.
    reach = kernel if node.op_type != "Conv" else widest
    if any(a + b >= k for a, b, k in zip((*begin, *end), (*own[0], *own[1]), (*reach, *reach), strict=True)):
        return "it pads as much as the kernel is wide"
    return {"Conv": _not_for_conv, "AveragePool": _not_for_average, "MaxPool": _not_for_max}[node.op_type](pad, node)


def _unusual(pad: Any) -> str | None:
    mode = pad.attributes.get_string("mode", "constant")
    if mode != "constant":
        return f"its mode is {mode}"
    if stored_pads(pad) is None:
        return "its pads are computed, not stored"
    if pad_value(pad) is None:
        return "the value it pads with is computed, not stored"
    return None


def _beyond_space(pad: Any, space: int) -> str | None:
    if not space:
        return "the rank of what follows isn't known"
    pads, axes = stored_pads(pad) or [], padded_axes(pad, space + 2)
    if axes is None:
        return "the axes it pads are computed, not stored"
    outside = [p for axis, p in zip((*axes, *axes), pads, strict=True) if axis < 2]
    return "it pads channels or the batch" if any(outside) else None


def _not_for_conv(pad: Any, node: Any) -> str | None:
    return None if pad_value(pad) == 0 else "it pads with something else than zeros"


def _not_for_average(pad: Any, node: Any) -> str | None:
    if pad_value(pad) != 0:
        return "it pads with something else than zeros"
    if node.attributes.get_int("ceil_mode", 0):
        return "the pooling's last window may lie beyond the edge"
    own = own_padding(node)
    if own and any((*own[0], *own[1])) and not node.attributes.get_int("count_include_pad", 0):
        return "the average leaves out the pooling's own padding"
    return None


def _not_for_max(pad: Any, node: Any) -> str | None:
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return "the pooling's indices are used"
    if node.attributes.get_int("ceil_mode", 0):
        return "the pooling's last window may lie beyond the edge"
    if any(step != 1 for step in _dilations(node)):
        return "the pooling is dilated, and a window may lie beyond the edge"
    value = pad_value(pad)
    below = value is not None and value <= lower_bound(pad.inputs[0])
    return None if below else "it pads with what may be larger than the data"


def lower_bound(value: Any, depth: int = _DEEPEST) -> float:
    """A number that `value` provably never falls below (NaN apart); where nothing is known, its type's lowest number:
    who pads with that means minus infinity."""
    kind = np.dtype(value.dtype.numpy()) if value.dtype is not None else np.dtype(np.float32)
    lowest = float(np.iinfo(kind).min if kind.kind in "iu" else np.finfo(kind).min) if kind.kind in "iuf" else -np.inf
    node = value.producer()
    if node is None or node.domain != "" or depth == 0:
        return lowest
    if node.op_type in NONNEGATIVE.split("|"):
        return 0.0
    if node.op_type == "Clip":
        bounds = [node.attributes.get_float("min", lowest), node.attributes.get_float("max", np.inf)]
        bounds = [number(bound) for bound in given(node)[1:]] or bounds
        # Where its bounds cross, the upper one wins.
        return lowest if None in bounds else min(bounds)
    if node.op_type in ONLY_MOVES.split("|"):
        data = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        return min(lower_bound(one, depth - 1) for one in data)
    return lowest


# What a Pad says ------------------------------------------------------------------------------------------------------


def stored_pads(pad: Any) -> list[int] | None:
    """Begins of all padded axes, then their ends; None where they are computed."""
    if "pads" in pad.attributes:
        return list(pad.attributes["pads"].as_ints())
    return numbers(pad.inputs[1]) if len(pad.inputs) > 1 else None


def pad_value(pad: Any) -> float | None:
    """The number it pads with; None where that is computed."""
    inputs = given(pad)
    if len(inputs) > 2 and inputs[2] is not None:
        return number(inputs[2])
    return float(pad.attributes.get_float("value", 0.0))


def padded_axes(pad: Any, of: int) -> list[int] | None:
    """The axes that its pads belong to, counted from the start of `of` axes; None where they are computed."""
    inputs = given(pad)
    if len(inputs) < 4:
        return list(range(of))
    axes = numbers(inputs[3])
    return None if axes is None else [axis % of for axis in axes]


def border(pad: Any, space: int) -> tuple[list[int], list[int]]:
    """(before, behind) of each spatial axis."""
    pads, axes = stored_pads(pad) or [], padded_axes(pad, space + 2) or []
    begin = dict(zip(axes, pads[: len(axes)], strict=True))
    end = dict(zip(axes, pads[len(axes) :], strict=True))
    return [begin.get(axis + 2, 0) for axis in range(space)], [end.get(axis + 2, 0) for axis in range(space)]


# What a convolution or pooling says -----------------------------------------------------------------------------------


def kernel_shape(node: Any) -> list[int]:
    """The kernel's size along each spatial axis; empty where a convolution's weight has no known shape."""
    if "kernel_shape" in node.attributes:
        return list(node.attributes["kernel_shape"].as_ints())
    weight = node.inputs[1]
    sizes = [size(weight, axis) for axis in range(2, rank(weight) or 0)]
    known = [length for length in sizes if length is not None]
    return known if len(known) == len(sizes) else []


def _dilations(node: Any) -> list[int]:
    return _ints(node, "dilations", 1)


def _ints(node: Any, name: str, default: int) -> list[int]:
    return list(node.attributes.get_ints(name, [default] * len(kernel_shape(node))))


def own_padding(node: Any) -> tuple[list[int], list[int]] | None:
    """(before, behind) of each spatial axis that the node pads by itself; None where that depends on a size of its input
    that isn't known."""
    space = len(kernel_shape(node))
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode == "VALID":
        return [0] * space, [0] * space
    if mode == "NOTSET":
        pads = list(node.attributes.get_ints("pads", [0] * 2 * space))
        return pads[:space], pads[space:]
    totals = [_same_padding(node, axis) for axis in range(space)]
    known = [total for total in totals if total is not None]
    if len(known) < space:
        return None
    less, more = [total // 2 for total in known], [total - total // 2 for total in known]
    return (less, more) if mode == "SAME_UPPER" else (more, less)


def _same_padding(node: Any, axis: int) -> int | None:
    """How much "same" padding adds along one spatial axis (ONNX's Conv and pooling, attribute `auto_pad`)."""
    stride = _ints(node, "strides", 1)[axis]
    reach = _dilations(node)[axis] * (kernel_shape(node)[axis] - 1) + 1
    if stride == 1:
        return reach - 1
    length = size(node.inputs[0], axis + 2)
    return None if length is None else max((-(-length // stride) - 1) * stride + reach - length, 0)
