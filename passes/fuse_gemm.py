"""Take bias, transposes and scalar factors into the matrix product that they belong to: one Gemm.

Gemm computes alpha · A · B + beta · C for matrices, A and B transposed if it is told to (ONNX operators, Gemm; the level-3
BLAS of Dongarra, Du Croz, Hammarling and Duff 1990). Converters from TensorFlow, old exporters and people write the pieces:

    MatMul(x, W) → Add(b)        becomes        Gemm(x, W, b)
    MatMul(x, Transpose(W))        becomes        Gemm(x, W, transB=1)
    Mul(MatMul(x, y), 0.125)        becomes        Gemm(x, y, alpha=0.125)

It pays where a backend runs MatMul and Add one after the other and would read and write the result once more, and where a
transpose is copied before the product that could have read it as it lies. Only stored biases become C: a computed one, as
of a residual branch, would be taken for a bias by whoever quantizes Gemm. A factor becomes alpha only where no operand is
stored (else it belongs into the weights), and where 32 bits hold it.

For matrices only. With three axes and more the same product is a MatMul: Gemm would need a Reshape before and after it,
backends take MatMul and Add on three axes as one operator anyway, and both see the batch where Gemm sees rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np

from perwatt.contract import Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.patterns import Either, Match, Number, Op, Var, given, is_stored, made_by, number, rank, size, stored


@dataclass(frozen=True)
class FuseGemm(Fusion):
    """No settings."""

    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    after: ClassVar[tuple[str, ...]] = ("fold-batchnorm", "fold-scales", "fuse-attention", "merge-projections")
    roots: ClassVar[tuple[str, ...]] = ("Add", "Mul", "Div", "MatMul", "Gemm")
    what: ClassVar[str] = "biases, transposes and factors taken into a Gemm"
    # From there on its C may be left out.
    opset: ClassVar[int] = 11

    def patterns(self) -> Sequence[Op]:
        return _patterns()

    def find(self, node: Any) -> Iterator[Match]:
        for match in super().find(node):
            product = match.named["product"]
            # A product of more axes is none of this pattern, and a factor beside weights belongs into them.
            weights = [value for value in (*product.inputs[:2], match.get("matrix")) if is_stored(value)]
            if _axes(product) in (2, None) and not (weights and _factor(match) is not None):
                yield match

    def check(self, match: Match) -> Iterator[str]:
        product, inner = match.named["product"], match.named.get("inner")
        if _axes(product) is None:
            yield "how many axes its operands have is not known"
        elif not _is_floating(match):
            yield "it is not known to be floating point"
        elif inner is not None and sum(value is inner.outputs[0] for value in product.inputs) > 1:
            yield "the same value is an operand twice"
        elif (bias := match.get("bias")) is not None:
            yield from _refused_bias(product, stored(bias))
        elif _factor(match) is not None:
            yield from _refused_factor(match)
        elif inner is not None and tuple(_perm(inner)) != (1, 0):
            yield "its transpose turns nothing"

    def rewrite(self, match: Match, build: Builder) -> Any:
        product, inner, factor = match.named["product"], match.named.get("inner"), _factor(match)
        attributes = product.attributes
        alpha, beta = (float(attributes.get_float(name, 1.0)) for name in ("alpha", "beta"))
        turned = [bool(attributes.get_int(name, 0)) for name in ("transA", "transB")]
        operands = [*given(product), None][:3]
        if inner is not None:
            place = next(i for i, value in enumerate(operands) if value is inner.outputs[0])
            operands[place] = match["matrix"]
            turned[place] ^= factor is None
        if factor is not None:
            alpha, beta = alpha * factor, beta if inner is not None else beta * factor
        if (bias := match.get("bias")) is not None:
            operands[2], beta = _total(product, bias, build), 1.0
        if operands[2] is None:
            operands, beta = operands[:2], 1.0
        a, b = (1 if turn else None for turn in turned)
        made = build.op("Gemm", *operands, alpha=_if_any(alpha), beta=_if_any(beta), transA=a, transB=b)
        made.producer().name = product.name
        return made


@cache
def _patterns() -> tuple[Op, ...]:
    product, matrix = Op("MatMul|Gemm", ..., name="product"), Var("matrix")
    inner = Either(
        Op("Transpose", matrix, name="inner"),
        Op("Mul", matrix, Number(name="factor"), name="inner"),
        Op("Div", matrix, Number(name="divisor"), name="inner"),
    )
    return (
        Op("Add", product, Var("bias", where=is_stored)),
        Op("Mul", product, Number(name="factor")),
        Op("Div", product, Number(name="divisor")),
        Op("MatMul|Gemm", inner, ..., name="product"),
        Op("MatMul|Gemm", Var("other"), inner, ..., name="product"),
    )


def _axes(product: Any) -> int | None:
    """2 where both operands surely are matrices, 0 where one surely is none, None where that isn't known."""
    if product.op_type == "Gemm":
        return 2
    operands, result = [_rank(value) for value in product.inputs], rank(product.outputs[0])
    if any(axes not in (2, None) for axes in (*operands, result)):
        return 0
    # A vector times a matrix, or the other way round, would have one axis.
    sure = operands.count(2) + (result == 2)
    return 2 if sure >= 2 else None


def _rank(value: Any) -> int | None:
    """The rank of `value`, where need be from what it was scaled or transposed from."""
    if rank(value) is not None or (node := made_by(value, "Transpose|Mul|Div")) is None:
        return rank(value)
    ranks = [_rank(operand) for operand in node.inputs]
    return None if None in ranks else max(axes for axes in ranks if axes is not None)


def _is_floating(match: Match) -> bool:
    """All that take part have one type; any of them tells it."""
    product = match.named["product"]
    dtypes = [value.dtype for value in (*match.values.values(), *product.inputs, *product.outputs) if value is not None]
    known = [dtype.name for dtype in dtypes if dtype is not None]
    return bool(known) and known[0] in ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")


def _perm(transpose: Any) -> Sequence[int]:
    """How its axes change places: the last comes first where nothing is said."""
    attribute = transpose.attributes.get("perm")
    return (1, 0) if attribute is None else attribute.as_ints()


def _if_any(factor: float) -> float | None:
    return None if factor == 1 else factor


# Bias -----------------------------------------------------------------------------------------------------------------


def _refused_bias(product: Any, bias: Any) -> Iterator[str]:
    there = given(product)[2] if len(given(product)) > 2 else None
    if there is not None and not is_stored(there):
        yield "it adds something computed already"
        return
    rows, columns = _sizes(product)
    height, width = (1, 1, *bias.shape)[-2:]
    if bias.ndim > 2 or width not in (1, columns) or height not in (1, rows):
        yield "what is added may be larger than the product"
    elif there is not None and np.broadcast(bias, stored(there)).size > max(bias.size, stored(there).size):
        yield "both biases together would be larger than each"


def _sizes(product: Any) -> tuple[int | None, int | None]:
    """Rows and columns of the result, where they are known."""
    turned = [bool(product.attributes.get_int(name, 0)) for name in ("transA", "transB")]
    found = size(product.inputs[0], int(turned[0])), size(product.inputs[1], int(not turned[1]))
    told = size(product.outputs[0], 0), size(product.outputs[0], 1)
    return (found[0] if found[0] is not None else told[0]), (found[1] if found[1] is not None else told[1])


def _total(product: Any, bias: Any, build: Builder) -> Any:
    """What `product` adds already and `bias`, as one stored value."""
    if len(given(product)) < 3:
        return bias
    there, beta = stored(product.inputs[2]), product.attributes.get_float("beta", 1.0)
    total = there.astype(np.float64) * beta + stored(bias).astype(np.float64)
    return build.constant(total.astype(there.dtype), f"{product.outputs[0].name}_bias")


# Factor ---------------------------------------------------------------------------------------------------------------


def _factor(match: Match) -> float | None:
    """The number that operand or result is multiplied by; None where the match is about something else."""
    factor, divisor = number(match.get("factor")), number(match.get("divisor"))
    return factor if divisor is None else 1 / divisor if divisor else float("inf")


def _refused_factor(match: Match) -> Iterator[str]:
    factor, before = _factor(match), "inner" in match.named
    constant = stored(match.get("factor") if match.get("factor") is not None else match["divisor"])
    narrow = np.float32(factor)
    if not np.isfinite(narrow) or not narrow:
        yield "its factor is zero or not finite"
    elif constant.dtype.name == "float64" and float(narrow) != factor:
        yield "alpha has 32 bits, and its factor needs more"
    elif constant.ndim > 2 or (before and constant.ndim == 2 and rank(match["matrix"]) != 2):
        yield "its factor adds axes"
