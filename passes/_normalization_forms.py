"""How exporters write (x − μ) / √(σ² + ε) and x / √(mean(x²) + ε).

Names in a match: the values `x`, `epsilon`, `scale` and `shift` (stored, where there are any); the nodes `mean` and
`variance` (the mean of squares), `inner mean` (the one within the variance, where it isn't the same node), `restored` (what
gives a variance its axes back), `up` and `down` (casts to float32 and back), `whole` (an operator that is put together
already, and is given the scale and shift behind it), `instance` (the same inside of a group normalization, between the
Reshapes `group` and `back`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from perwatt.patterns import Either, Number, Op, Pattern, Var, is_stored, maybe

SCALE, SHIFT = Var("scale", is_stored), Var("shift", is_stored)


@dataclass(frozen=True)
class Forms:
    """Ways to write one normalization: `plain`, with its scale worked in, and with scale or shift worked in for good."""

    plain: tuple[Op, ...]
    scaled: tuple[Op, ...] = ()
    shifted: tuple[Op, ...] = ()


def just_x() -> Pattern:
    return Var("x")


def x_or_cast() -> Pattern:
    """x, behind a cast or not. The cast may serve others too."""
    return maybe("Cast", Var("x"), name="up", shared=True)


def standardized(source: Callable[[], Pattern] = just_x, means: str = "ReduceMean") -> Forms:
    """(x − μ) / √(σ² + ε); `source` makes what stands for x, `means` are the operators that may take μ and σ²."""
    mean = Op(means, source(), ..., name="mean", where=keeps_axes)
    centered = Op("Sub", source(), mean)
    # Exporters that take x.var() apart compute the mean for it once more.
    within = Op("Sub", source(), Op(means, source(), ..., name="inner mean", where=keeps_axes))
    around_zero = Op("Sub", _mean_of(_square(source()), means), _square(mean))
    # In float32 that difference may come out below zero, and some guard against it.
    guarded = Either(Op("Max", around_zero, Number(0)), Op("Relu", around_zero), around_zero)
    deviation, inverse = _roots(Either(_mean_of(_square(within), means), guarded))
    shifted = (
        form
        for factor in (Op("Mul", SCALE, inverse), Op("Div", SCALE, deviation), inverse)
        for form in _taken_apart(source(), mean, factor)
    )
    return Forms(*_divided(centered, deviation, inverse), tuple(shifted))


def by_root_mean_square(source: Callable[[], Pattern] = just_x) -> Forms:
    """x / √(mean(x²) + ε)."""
    deviation, inverse = _roots(_mean_of(_square(source()), "ReduceMean"))
    return Forms(*_divided(source(), deviation, inverse))


def whole(kind: str) -> Forms:
    """An operator of that kind which is there already."""
    return Forms((Op(kind, Var("x"), ..., name="whole"),))


def behind(forms: Forms, *, scale: Pattern = SCALE, shift: bool = True, casts: bool = False) -> tuple[Op, ...]:
    """`forms` with the scale and the shift that follow, and with a cast back between where `casts` is set."""
    plain: Pattern = Either(*forms.plain)
    plain = maybe("Cast", plain, name="down") if casts else plain
    scaled = (Op("Mul", scale, plain), *forms.scaled)
    shifted = (Op("Add", SHIFT, Either(*scaled)), Op("Add", SHIFT, plain), *forms.shifted)
    return (*shifted, *scaled) if shift else scaled


def bare(forms: Forms, *, casts: bool = False) -> tuple[Op, ...]:
    """`forms` without scale and shift."""
    back = (Op("Cast", Either(*forms.plain), name="down"),) if casts else ()
    return (*back, *forms.plain)


def _mean_of(inner: Pattern, means: str) -> Pattern:
    """With the axes kept as ones, or given back behind it."""
    dropped = Op(means, inner, ..., name="variance", where=lambda node: not keeps_axes(node))
    return Either(
        Op(means, inner, ..., name="variance", where=keeps_axes),
        Op("Reshape|Unsqueeze", dropped, ..., name="restored"),
        Op("Expand", Op("Reshape|Unsqueeze", dropped, ...), ..., name="restored"),
    )


def _square(inner: Pattern) -> Pattern:
    return Either(Op("Mul", inner, inner), Op("Pow", inner, Number(2)))


def _roots(variance: Pattern) -> tuple[Pattern, Pattern]:
    """√(σ² + ε) and its reciprocal."""
    guarded = Op("Add", variance, Number(name="epsilon"))
    deviation = Either(Op("Sqrt", guarded), Op("Pow", guarded, Number(0.5)))
    turned = (Op("Reciprocal", guarded), Op("Div", Number(1), guarded))
    inverse = Either(
        Op("Reciprocal", deviation),
        Op("Div", Number(1), deviation),
        Op("Pow", guarded, Number(-0.5)),
        Op("Sqrt", Either(*turned)),
    )
    return deviation, inverse


def _divided(centered: Pattern, deviation: Pattern, inverse: Pattern) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """Without scale, and with a scale that is multiplied in before the end."""
    plain = (Op("Mul", centered, inverse), Op("Div", centered, deviation))
    scaled_first = Op("Mul", SCALE, centered)
    scaled = (
        Op("Mul", centered, Op("Mul", SCALE, inverse)),
        Op("Mul", centered, Op("Div", SCALE, deviation)),
        Op("Mul", scaled_first, inverse),
        Op("Div", scaled_first, deviation),
    )
    return plain, scaled


def _taken_apart(x: Pattern, mean: Pattern, factor: Pattern) -> tuple[Op, ...]:
    """x·f + (β − μ·f), as TensorFlow's and Keras' batch_normalization compute it for all their normalizations."""
    product, moved = Op("Mul", x, factor), Op("Mul", mean, factor)
    negative = Either(Op("Mul", Op("Neg", mean), factor), Op("Neg", moved))
    return (
        Op("Add", product, Op("Sub", SHIFT, moved)),
        Op("Add", product, Op("Add", SHIFT, negative)),
        Op("Add", product, negative),
        Op("Sub", product, moved),
    )


def keeps_axes(node: Any) -> bool:
    """Whether a reduction leaves the axes that it takes as ones."""
    return bool(node.attributes.get_int("keepdims", 1) == 1)


def cast_target(cast: Any) -> str:
    """ONNX's name of the type that a Cast makes."""
    import onnx_ir as ir

    return ir.DataType(cast.attributes.get_int("to", 0)).name
