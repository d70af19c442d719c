"""Fold scales and shifts by stored numbers into the weights beside them, or into each other.

Exporters write normalized inputs, layer scales and attention's scaling as operators of their own: each reads and writes
the whole tensor to multiply it by what never changes. After a product every scale and shift that runs along its channels
vanishes into weights and bias (as ConvNeXt's layer scale does):

    MatMul(x, W) → Add(b) → Mul(γ)        becomes        MatMul(x, W · γ) → Add(b · γ)

Before products a scale vanishes into the weights of all that use it, and with it a shift, which goes into the bias. Beside
padding a shift has to stay, since nothing was added to the border's zeros, but its scale can go:

    Div(Sub(x, μ), σ) → Conv(·, W, b, pads=…)        becomes        Conv(Add(x, −μ), W / σ, b, pads=…)

Elsewhere several in a row become one scale and one shift, (x + a) · b · c + d = x · bc + (abc + d), where that leaves fewer
operators and no larger constants.

It pays on every backend where the tensor is large: the image a network normalizes first, the residual branches of
ConvNeXt. Backends do parts of it themselves, but none sees a scale that several products share, as the weight of an
RMS normalization is shared by query, key and value. Everything is computed in float64 and rounded once. Left alone: what
runs along other axes than the channels, shared and computed weights, numbers that are not finite or bring the weights out
of the range of their type. Passes that put activations and normalizations together run before: they know them by these
numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from perwatt.artifact import Artifact
from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._weights import (
    FLOATS,
    Product,
    along_axis,
    folded_after,
    folded_before,
    is_plain,
    nodes_of,
    out_of_range,
    product_at,
    products_on,
    put_in,
    unfit,
)
from perwatt.patterns import Match, dims, is_stored, only_user, rank, size, stored

ONE, NOTHING = np.float64(1), np.float64(0)


@dataclass(frozen=True)
class FoldScales(Fusion):
    """No settings."""

    # Weights are rounded anew, as when batch normalizations are folded: it adds up over the layers of a deep net.
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-3)
    after: ClassVar[tuple[str, ...]] = (
        "cancel-casts", "cancel-reshapes", "cancel-transposes", "fold-batchnorm", "fuse-gelu",
        "fuse-group-normalization", "fuse-hardswish", "fuse-instance-normalization", "fuse-layer-normalization",
        "fuse-mish", "fuse-rms-normalization", "fuse-rotary-embedding", "fuse-swish", "unflatten-gemm",
    )  # fmt: skip
    roots: ClassVar[tuple[str, ...]] = ("Mul", "Div", "Add", "Sub")
    what: ClassVar[str] = "scales and shifts folded into the constants beside them"

    def find(self, node: Any) -> Iterator[Match]:
        row = _row(node)
        if not row:
            return
        product = product_at(row[-1].data, node.graph)
        if product is not None and is_plain(product):
            nodes = (*product.nodes, *(link.node for link in row))
            yield Match(node, nodes, (node.outputs[0],), named={"row": row, "product": product})
            rest = _beyond(product, row)
        else:
            rest = row
        if (place := _place_before(row)) is not None:
            outputs = tuple(one.output for one in place.products)
            yield Match(node, place.nodes, outputs, named={"row": place.row, "place": place})
        if len(rest) > 1 and len(rest) > sum(part is not None for part in _merged(rest)):
            yield Match(node, tuple(link.node for link in rest), (node.outputs[0],), named={"row": rest})

    def check(self, match: Match) -> Iterator[str]:
        row = match.named["row"]
        if product := match.named.get("product"):
            yield from _refused_after(product, row)
        elif place := match.named.get("place"):
            yield from _refused_before(place)
        else:
            yield from _refused_merging(row)

    def rewrite(self, match: Match, build: Builder) -> Any:
        row = match.named["row"]
        if product := match.named.get("product"):
            scale, shift = _along(row, product.output_channels, product.rank, product.outs)
            return put_in(build, product, product.data, *folded_after(product, scale, shift))
        name = match.root.outputs[0].name
        if place := match.named.get("place"):
            data = _put(build, place.data, None, place.kept, name)
            return tuple(
                put_in(build, one, data, *folded_before(one, place.scale, place.shift)) for one in place.products
            )
        return _put(build, row[-1].data, *_merged(row), name)

    def ensures(self, before: Artifact, after: Artifact) -> Iterator[str]:
        if after.size_bytes() > before.size_bytes() * 1.01 + 4096:
            yield "folding made the weights larger"
        yield from super().ensures(before, after)


# Scales and shifts in a row -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """One node that computes data · scale + shift from a stored `constant`."""

    node: Any
    data: Any
    constant: Any

    def scale_and_shift(self, constant: Any) -> tuple[Any, Any]:
        """Both, from `constant`, which is this link's in float64 and shaped as the caller needs it."""
        kind = self.node.op_type
        if kind == "Mul":
            return constant, NOTHING
        if kind == "Div":
            return 1 / constant, NOTHING
        if kind == "Add":
            return ONE, constant
        return (ONE, -constant) if self.node.inputs[0] is self.data else (-ONE, constant)


def _row(node: Any) -> tuple[Link, ...]:
    """Scales and shifts that follow each other and end with `node`, the last one first. The bias of a MatMul is none."""
    row: list[Link] = []
    while (link := _link(node)) is not None:
        product = product_at(node.outputs[0], node.graph)
        if product is not None and product.add is node:
            break
        row.append(link)
        before = link.data.producer()
        if before is None or before.graph is not node.graph or only_user(link.data) is not node:
            break
        node = before
    return tuple(row)


def _link(node: Any) -> Link | None:
    if node.domain != "" or node.op_type not in FoldScales.roots:
        return None
    first, second = node.inputs
    if is_stored(first) == is_stored(second) or (node.op_type == "Div" and is_stored(first)):
        return None
    data, constant = (second, stored(first)) if is_stored(first) else (first, stored(second))
    return Link(node, data, constant) if constant is not None and constant.dtype.name in FLOATS else None


def _composed(row: Sequence[Link], constants: Sequence[Any]) -> tuple[Any, Any]:
    """Scale and shift of a whole row, in float64; `constants` are those of its links, as the caller has shaped them."""
    scale, shift = ONE, NOTHING
    with np.errstate(all="ignore"):
        for link, constant in reversed(list(zip(row, constants, strict=True))):
            more, added = link.scale_and_shift(constant)
            # No shift so far stays a single zero: multiplied, it would take over the shape of the scale.
            scale, shift = scale * more, added if shift is NOTHING else shift * more + added
    return scale, shift


def _along(row: Sequence[Link], axis: int, of: int | None, channels: int) -> Any:
    """Scale and shift of a row along the channels on `axis`; None where it runs along other axes too."""
    vectors = [along_axis(link.constant, axis, of, channels) for link in row]
    return None if any(vector is None for vector in vectors) else _composed(row, vectors)


# After a product ------------------------------------------------------------------------------------------------------


def _refused_after(product: Product, row: Sequence[Link]) -> Iterator[str]:
    folded = _along(row, product.output_channels, product.rank, product.outs)
    if folded is None:
        yield "it may run along other axes than the channels of the product before it"
    elif reason := unfit(product, keeps_weight=bool((folded[0] == 1).all())) or out_of_range(product, *folded):
        yield reason


def _beyond(product: Product, row: Sequence[Link]) -> tuple[Link, ...]:
    """The links from the first one on, counted from `product`, that it can't take."""
    for near in range(len(row), 0, -1):
        if along_axis(row[near - 1].constant, product.output_channels, product.rank, product.outs) is None:
            return tuple(row[:near])
    return ()


# Before products ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A row and the products that can take it in: their input times `scale` plus `shift` along their input channels.
    `kept`: what has to be added in front of them still, shaped for that, or None."""

    row: tuple[Link, ...]
    products: tuple[Product, ...]
    scale: Any
    shift: Any
    kept: Any

    @property
    def data(self) -> Any:
        return self.row[-1].data

    @property
    def nodes(self) -> tuple[Any, ...]:
        return (*(link.node for link in self.row), *nodes_of(self.products))

    @property
    def leaves(self) -> int:
        """How many nodes are left of the row, those for its shift among them: a MatMul without bias needs an Add."""
        if self.kept is not None:
            return 1
        return sum(one.kind == "MatMul" and one.add is None for one in self.products) if self.shift.any() else 0


def _place_before(row: Sequence[Link]) -> Place | None:
    """Where the longest part of `row` that ends with its end can go, so that fewer nodes are left."""
    last = row[0].node
    products = products_on(last.outputs[0], last.graph)
    if not all(is_plain(one) for one in products):
        return None
    if len({(one.input_channels, one.ins) for one in products}) != 1:
        return None
    places = (_place(tuple(row[:count]), products) for count in range(len(row), 0, -1))
    # A shift alone in front of padding is an occurrence too: one that is refused, with its reason.
    return next((one for one in places if one and (one.leaves < len(one.row) or one.kept is not None)), None)


def _place(row: tuple[Link, ...], products: Sequence[Product]) -> Place | None:
    first = products[0]
    of = next((axes for axes in (first.rank, rank(row[0].node.outputs[0])) if axes is not None), None)
    folded = _along(row, first.input_channels, of, first.ins)
    if folded is None:
        return None
    scale, shift = folded
    if not shift.any():
        # Whatever is added behind them is none of our business.
        return Place(row, tuple(Product(one.node) for one in products), scale, shift, None)
    if not any(one.padded for one in products):
        return Place(row, tuple(products), scale, shift, None)
    with np.errstate(all="ignore"):
        kept = np.reshape(shift / scale, (-1, *[1] * (-1 - first.input_channels)))
    return Place(row, tuple(Product(one.node) for one in products), scale, NOTHING, kept.astype(row[0].constant.dtype))


def _refused_before(place: Place) -> Iterator[str]:
    first, row = place.products[0], place.row
    if place.kept is not None and (len(row) == 1 or not np.isfinite(place.kept).all()):
        yield "what it adds would be missing in the padding of the convolution after it"
    for one in place.products:
        if reason := unfit(one) or out_of_range(one, place.scale, place.shift):
            yield reason
    if any(link.constant.size > 1 for link in row) and size(place.data, first.input_channels) != first.ins:
        yield "how many channels it scales is not known"
    if any(link.constant.ndim > 1 for link in row) and (first.rank is None or rank(place.data) != first.rank):
        yield "how many axes it scales is not known"


# Into each other ------------------------------------------------------------------------------------------------------


def _merged(row: Sequence[Link]) -> tuple[Any, Any]:
    """Scale and shift of a whole row, rounded to its type; None for one that changes nothing."""
    data, dtype = row[-1].data, row[0].constant.dtype
    with np.errstate(over="ignore"):
        both = [np.asarray(part).astype(dtype) for part in _composed(row, [_wide(link.constant) for link in row])]
    idle = [(part == neutral).all() and _keeps_shape(data, part) for part, neutral in zip(both, (1, 0), strict=True)]
    return None if idle[0] else both[0], None if idle[1] else both[1]


def _refused_merging(row: Sequence[Link]) -> Iterator[str]:
    parts = [part for part in _merged(row) if part is not None]
    if not all(np.isfinite(part).all() for part in parts):
        yield "a scale or shift is not finite"
    elif max((part.size for part in parts), default=0) > max(link.constant.size for link in row):
        yield "merged into one, its constants would be larger"


def _keeps_shape(data: Any, array: Any) -> bool:
    """Whether an operator on `data` and `array` certainly has a result of the shape of `data`."""
    shape = dims(data)
    if shape is None or array.ndim > len(shape):
        return bool(array.ndim == 0)
    return all(n in (1, dim) for n, dim in zip(array.shape[::-1], shape[::-1], strict=False))


def _wide(array: Any) -> Any:
    return array.astype(np.float64)


def _put(build: Builder, data: Any, scale: Any, shift: Any, name: str) -> Any:
    """data · scale + shift, without what is None."""
    for kind, part in (("Mul", scale), ("Add", shift)):
        if part is not None:
            shape = data.shape if _keeps_shape(data, part) else None
            data = build.op(kind, data, build.constant(part, f"{name}_{'scale' if kind == 'Mul' else 'shift'}"))
            data.shape = shape
    return data
