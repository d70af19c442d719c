"""Write Einsum out: a matrix product between transposes and reshapes, a product by elements, or a sum.

    Einsum(x, W) {abc,cde->abde}        becomes        Reshape(MatMul(x, W as [c, d·e]), [0, 0, d, e])
    Einsum(k, q) {aecd,abcd->acbe}      becomes        MatMul(Transpose(q, [0, 2, 1, 3]), Transpose(k, [0, 2, 3, 1]))
    Einsum(t, f) {i,j->ij}              becomes        Mul(Unsqueeze(t, [1]), Unsqueeze(f, [0]))

Keras writes every projection and both products of attention so, and so do networks that were written by hand. Behind an Einsum
nothing is recognized: attention isn't found, biases aren't folded, and quantization leaves the product in floating point. The
reshapes and transposes that it leaves are those that exporters write, which the passes behind it know.

Left: three operands and more, an ellipsis, a label twice in one operand, types other than floating point, and lengths that
may differ, where Einsum would broadcast, or that nobody knows where axes must be put together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np

from perwatt.artifact import Artifact
from perwatt.contract import Stage, Tolerance
from perwatt.fusion import Builder, Fusion
from perwatt.passes._reusing import kept_once
from perwatt.patterns import Match, dims, equal, given, is_stored, stored

FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
Lengths = dict[str, int | str | None]


@dataclass(frozen=True)
class DecomposeEinsum(Fusion):
    """No settings."""

    # Sums may be taken in another order.
    stage: ClassVar[Stage] = Stage.CLEAN
    tolerance: ClassVar[Tolerance | None] = Tolerance(atol=1e-5, rtol=1e-4)
    after: ClassVar[tuple[str, ...]] = ("remove-dead",)
    roots: ClassVar[tuple[str, ...]] = ("Einsum",)
    what: ClassVar[str] = "Einsum written out"

    def ensures(self, before: Artifact, after: Artifact) -> Iterator[str]:
        yield from ()

    def find(self, node: Any) -> Iterator[Match]:
        yield Match(node, (node,), (node.outputs[0],))

    def check(self, match: Match) -> Iterator[str]:
        yield from _refusals(match.root)

    def rewrite(self, match: Match, build: Builder) -> Any:
        terms, out = _labels(match.root)
        lengths = _lengths(match.root, terms)
        operands = []
        for value, labels, kept in zip(match.root.inputs, terms, _kept(terms, out), strict=True):
            operands.append(_summed(Operand(value, labels), kept, lengths, build))
        if len(operands) == 1:
            return _ordered(operands[0], out, lengths, build)
        if not _contracted(terms, out):
            first, second = (_spread(operand, out, lengths, build) for operand in operands)
            return build.op("Mul", first, second)
        split = _split(operands[0].labels, operands[1].labels, out)
        first, second = reversed(operands) if split.swapped else operands
        factors = (
            _put_together(first, split.first, lengths, build),
            _put_together(second, split.second, lengths, build),
        )
        product = _note(build.op("MatMul", *factors), split.result, lengths)
        return _ordered(_taken_apart(product, split.result, lengths, build), out, lengths, build)


@dataclass(frozen=True)
class Operand:
    """A value and the labels of its axes."""

    value: Any
    labels: str


@dataclass(frozen=True)
class Split:
    """How labels are put together for MatMul: the groups that are the axes of its factors and of its result; whether the
    operands change places, so that the result comes out in the order that is wanted."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    result: tuple[str, ...]
    swapped: bool


# What it says ---------------------------------------------------------------------------------------------------------


def _labels(einsum: Any) -> tuple[list[str], str]:
    """The labels of each operand, and of the result; without an arrow those that stand once, sorted."""
    left, arrow, out = einsum.attributes.get_string("equation", "").replace(" ", "").partition("->")
    once = sorted(label for label in set(left) - {","} if left.count(label) == 1)
    return left.split(","), out if arrow else "".join(once)


def _refusals(einsum: Any) -> Iterator[str]:
    operands, (terms, out) = given(einsum), _labels(einsum)
    if len(operands) not in (1, 2) or len(operands) != len(terms):
        yield f"it has {len(operands)} operands"
        return
    if "." in "".join(terms) + out:
        yield "its equation has an ellipsis"
        return
    if any(len(set(labels)) != len(labels) for labels in (*terms, out)):
        yield "a label stands twice in one operand"
        return
    if any(value.dtype is None or value.dtype.name not in FLOATS for value in operands):
        yield "its type is none of floating point, or not known"
    shapes = [dims(value) for value in operands]
    if any(shape is None or len(shape) != len(labels) for shape, labels in zip(shapes, terms, strict=True)):
        yield "how many axes its operands have isn't known"
        return
    yield from _length_refusals(einsum, terms, out)


def _length_refusals(einsum: Any, terms: Sequence[str], out: str) -> Iterator[str]:
    shared = set(terms[0]) & set(terms[-1]) if len(terms) == 2 else set()
    of = [dict(zip(labels, dims(value) or [], strict=True)) for value, labels in zip(einsum.inputs, terms, strict=True)]
    if not all(equal(of[0][label], of[1][label]) for label in shared):
        yield "the lengths of an axis that both operands have may differ"
    if not _contracted(terms, out):
        return
    lengths = _lengths(einsum, terms)
    first, second = _kept(terms, out)
    split = _split(first, second, out)
    shapes = _shape(split.first, lengths), _shape(split.second, lengths), _shape(split.result, lengths, apart=True)
    if None in shapes:
        yield "the lengths of axes that must be put together aren't known"


def _contracted(terms: Sequence[str], out: str) -> bool:
    """Whether two operands have an axis that is multiplied and summed."""
    return len(terms) == 2 and not set(terms[0]) & set(terms[1]) <= set(out)


def _kept(terms: Sequence[str], out: str) -> list[str]:
    """The labels of each operand without those that nothing else has: they are summed beforehand."""
    kept = []
    for position, labels in enumerate(terms):
        elsewhere = set(out).union(*terms[:position], *terms[position + 1 :])
        kept.append("".join(label for label in labels if label in elsewhere))
    return kept


def _lengths(einsum: Any, terms: Sequence[str]) -> Lengths:
    found: Lengths = {}
    for value, labels in zip(einsum.inputs, terms, strict=True):
        for label, length in zip(labels, dims(value) or [], strict=True):
            found[label] = length if isinstance(length, int) or label not in found else found[label]
    return found


def _split(first: str, second: str, out: str) -> Split:
    """Batch labels in front, one by one; summed ones together; those of one operand together where MatMul wants a matrix."""
    batch = [label for label in out if label in first and label in second]
    alone = {side: "".join(label for label in out if label in side and label not in batch) for side in (first, second)}
    swapped = bool(alone[first] and alone[second]) and out.index(alone[second][0]) < out.index(alone[first][0])
    # A vector and a matrix: the vector comes second, as a column.
    swapped = swapped or bool(not alone[first] and alone[second] and not batch)
    a, b = (second, first) if swapped else (first, second)
    summed = "".join(label for label in a if label in b and label not in out)
    if not batch:
        # The axes in front of a matrix that is multiplied by another may be as many as they like.
        rows, columns = tuple(alone[a]), ((alone[b],) if alone[b] else ())
        return Split((*rows, summed), (summed, *columns), (*rows, *columns), swapped)
    return Split((*batch, alone[a], summed), (*batch, summed, alone[b]), (*batch, alone[a], alone[b]), swapped)


# What is put there ----------------------------------------------------------------------------------------------------


def _summed(operand: Operand, kept: str, lengths: Lengths, build: Builder) -> Operand:
    gone = [axis for axis, label in enumerate(operand.labels) if label not in kept]
    if not gone:
        return operand
    value = build.op("ReduceSum", operand.value, kept_once(build, np.array(gone, np.int64)), keepdims=0)
    return Operand(_note(value, kept, lengths), kept)


def _ordered(operand: Operand, wanted: str, lengths: Lengths, build: Builder) -> Any:
    """Its axes in the order of `wanted`, which has the same labels."""
    if operand.labels == wanted:
        return operand.value
    order = [operand.labels.index(label) for label in wanted]
    return _note(build.op("Transpose", operand.value, perm=order), wanted, lengths)


def _spread(operand: Operand, out: str, lengths: Lengths, build: Builder) -> Any:
    """Its axes in the order of `out`, ones where it has none."""
    value = _ordered(operand, "".join(label for label in out if label in operand.labels), lengths, build)
    missing = [axis for axis, label in enumerate(out) if label not in operand.labels]
    if not missing:
        return value
    value = build.op("Unsqueeze", value, kept_once(build, np.array(missing, np.int64)))
    return _note(value, out, {label: lengths[label] if label in operand.labels else 1 for label in out})


def _put_together(operand: Operand, groups: Sequence[str], lengths: Lengths, build: Builder) -> Any:
    """Its axes in the order of `groups`, those of a group as one. A weight that nobody else uses is stored so."""
    labels = "".join(groups)
    apart = all(len(group) == 1 for group in groups)
    if labels == operand.labels and apart:
        return operand.value
    if is_stored(operand.value) and len(list(operand.value.uses())) == 1:
        array = stored(operand.value).transpose([operand.labels.index(label) for label in labels])
        sizes = dict(zip(labels, array.shape, strict=True))
        array = array.reshape([prod(sizes[label] for label in group) for group in groups])
        return build.constant(np.ascontiguousarray(array), operand.value.name)
    value = _ordered(operand, labels, lengths, build)
    if apart:
        return value
    value = build.op("Reshape", value, kept_once(build, np.array(_shape(groups, lengths), np.int64)))
    return _note(value, groups, lengths)


def _taken_apart(product: Any, groups: Sequence[str], lengths: Lengths, build: Builder) -> Operand:
    """A product whose axes are `groups`, with an axis for each label."""
    labels = "".join(groups)
    if all(len(group) == 1 for group in groups):
        return Operand(product, labels)
    value = build.op("Reshape", product, kept_once(build, np.array(_shape(groups, lengths, apart=True), np.int64)))
    return Operand(_note(value, labels, lengths), labels)


def _shape(groups: Sequence[str], lengths: Lengths, apart: bool = False) -> list[int] | None:
    """What Reshape is told to put the axes of each group together, or to take them `apart` again; None where that can't be
    written down: an axis that is neither known nor where it was before may be there once."""
    found: list[int] = []
    as_before = True
    for group in groups:
        as_before = as_before and len(group) == 1
        for part in group if apart else (group,):
            length = _length(part, lengths)
            found.append(0 if as_before else length if isinstance(length, int) and length > 0 else -1)
    return found if found.count(-1) <= 1 else None


def _length(group: str, lengths: Lengths) -> int | str | None:
    """How long the axes of a group are together; None where that isn't known."""
    if len(group) == 1:
        return lengths[group]
    known = [length for label in group if isinstance(length := lengths[label], int)]
    return prod(known) if len(known) == len(group) else None


def _note(value: Any, axes: Sequence[str], lengths: Lengths) -> Any:
    """The value, its shape noted for the passes that come: its axes are labels, or groups of them."""
    import onnx_ir as ir

    value.shape = ir.Shape([_length(group, lengths) for group in axes])
    return value
