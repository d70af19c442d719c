"""Reshapes that enclose a stretch of the graph: whether everything between them could run in the shape outside of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from perwatt.fusion import Builder
from perwatt.passes._rearranging import (
    BROADCASTING,
    UNARY,
    Dims,
    dims_after,
    same_dims_by_volume,
)
from perwatt.patterns import Match, dims, equal, given, is_stored, made_by, rank, same_dims, size, stored

RESHAPES = "Reshape|Flatten|Squeeze|Unsqueeze"
"""Operators that keep the elements in their order, so that the shape of the output says all."""

_MOST_NODES = 64


@dataclass(frozen=True)
class Piece:
    """A value in the shape outside: `value` has it already where there is no `node`, else `node` computes it from `inputs`.
    `stripped`: a stored operand that has to lose leading axes of 1."""

    value: Any
    wanted: tuple[int | str | None, ...] = ()
    node: Any = None
    inputs: tuple[Piece | None, ...] = ()
    stripped: bool = False


@dataclass
class _Search:
    """What was found so far, by value, and how much is left to look at."""

    products: bool
    found: dict[Any, Piece | None] = field(default_factory=dict)
    leaves: int = 0
    open_axes: bool = False


def enclosed(root: Any, products: bool) -> Match | None:
    """The stretch that ends at the reshape `root` and begins with reshapes that come from the same shape; None where there is
    no such stretch. `products`: whether it may contain matrix products with stored weights; it must then."""
    wanted = dims_after(root)
    if not wanted or made_by(root.inputs[0], RESHAPES) is not None:
        return None
    search = _Search(products)
    piece = _pulled(root.inputs[0], tuple(wanted), dims(root.inputs[0]), search)
    if piece is None or (search.open_axes and search.leaves > 1) or not search.leaves:
        return None
    nodes = tuple(found.node for found in search.found.values() if found is not None and found.node is not None)
    if products != any(node.op_type in ("MatMul", "Gemm") for node in nodes):
        return None
    return Match(root, (root, *nodes), (root.outputs[0],), {}, {"piece": piece})


def _pulled(value: Any, wanted: tuple[int | str | None, ...], inside: Dims | None, search: _Search) -> Piece | None:
    """`value`, which has the shape `inside` where that is known, in the shape `wanted`; None where it can't be had."""
    if value in search.found:
        known = search.found[value]
        return known if known is not None and known.wanted == wanted else None
    if len(search.found) >= _MOST_NODES:
        return None
    search.found[value] = None
    search.found[value] = found = _leaf(value, wanted, search) or _computed(value, wanted, inside, search)
    return found


def _leaf(value: Any, wanted: tuple[int | str | None, ...], search: _Search) -> Piece | None:
    reshape = made_by(value, RESHAPES)
    if reshape is None:
        return None
    before = dims(reshape.inputs[0])
    if not same_dims(before, wanted):
        if not same_dims_by_volume(before, wanted):
            return None
        search.open_axes = True
    search.leaves += 1
    return Piece(reshape.inputs[0], wanted)


def _computed(value: Any, wanted: tuple[int | str | None, ...], inside: Dims | None, search: _Search) -> Piece | None:
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or value is not node.outputs[0]:
        return None
    inputs: list[Piece | None] | None = None
    inside = dims(value) or inside
    if node.op_type in UNARY:
        first = _pulled(node.inputs[0], wanted, inside, search)
        inputs = [first, *(other and Piece(other) for other in node.inputs[1:])] if first is not None else None
    elif node.op_type in BROADCASTING:
        inputs = _operands(given(node), wanted, inside, search)
    elif node.op_type in ("MatMul", "Gemm") and search.products:
        inputs = _factors(node, wanted, search)
    return Piece(value, wanted, node, tuple(inputs)) if inputs is not None else None


def _operands(
    values: list[Any], wanted: tuple[int | str | None, ...], inside: Dims | None, search: _Search
) -> list[Piece | None] | None:
    suffix = _common_suffix(inside, wanted, search.products)
    found: list[Piece | None] = []
    for value in values:
        stays = is_stored(value)
        piece = _alongside(value, suffix, len(wanted)) if stays else _pulled(value, wanted, inside, search)
        if piece is None:
            return None
        found.append(piece)
    return found


def _alongside(value: Any, suffix: int, most: int) -> Piece | None:
    """A stored operand that lies along axes at the end that both shapes share."""
    shape = dims(value) or []
    stripped = list(shape)
    while stripped and stripped[0] == 1:
        stripped.pop(0)
    return Piece(value, stripped=len(shape) > most) if len(stripped) <= suffix else None


def _common_suffix(one: Dims | None, other: Dims, products: bool) -> int:
    """How many axes at the end two shapes have in common; around a product the last one always."""
    pairs = list(zip(reversed(one or ()), reversed(other), strict=False))
    same = next((count for count, (a, b) in enumerate(pairs) if not equal(a, b)), len(pairs))
    return max(same, 1) if products else same


def _factors(node: Any, wanted: tuple[int | str | None, ...], search: _Search) -> list[Piece | None] | None:
    """Inputs of a product, the first with the shape that it needs outside."""
    weight = node.inputs[1]
    if not is_stored(weight) or rank(weight) != 2:
        return None
    depth, width = (size(weight, 0), size(weight, 1))
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0):
        depth, width = width, depth
    first = _pulled(node.inputs[0], (*wanted[:-1], depth), None, search) if equal(wanted[-1], width) else None
    return [first, *(other and Piece(other) for other in node.inputs[1:])] if first is not None else None


def rebuilt(piece: Piece | None, build: Builder, made: dict[Any, Any]) -> Any:
    """The value of a piece, made of new nodes; `made` remembers by the old value what is there already."""
    if piece is None:
        return None
    if piece.node is None:
        return _operand(piece, build)
    if piece.value not in made:
        inputs = [rebuilt(each, build, made) for each in piece.inputs]
        new = _product(piece.node, inputs, build) if piece.node.op_type == "Gemm" else _same(piece.node, inputs, build)
        _describe(new, piece)
        made[piece.value] = new
    return made[piece.value]


def _operand(piece: Piece, build: Builder) -> Any:
    if not piece.stripped:
        return piece.value
    array = stored(piece.value)
    while array.shape[:1] == (1,):
        array = array[0]
    return build.constant(np.asarray(array), piece.value.name)


def _same(node: Any, inputs: list[Any], build: Builder) -> Any:
    return build.op(node.op_type, *inputs, **{name: attribute.value for name, attribute in node.attributes.items()})


def _product(gemm: Any, inputs: list[Any], build: Builder) -> Any:
    first, weight, *bias = inputs
    if gemm.attributes.get_int("transB", 0):
        weight = build.constant(stored(weight).T.copy(), weight.name)
    product = build.op("MatMul", first, weight)
    if not bias or bias[0] is None:
        return product
    import onnx_ir as ir

    product.shape = ir.Shape([*list(first.shape)[:-1], weight.shape[1]]) if first.shape is not None else None
    return build.op("Add", product, bias[0])


def _describe(value: Any, piece: Piece) -> None:
    """Type and shape of what a piece was made to."""
    import onnx_ir as ir

    value.type = piece.value.type or value.type
    value.shape = ir.Shape(list(piece.wanted))
