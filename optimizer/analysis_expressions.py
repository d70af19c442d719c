"""Whole numbers that are only known once a model is fed: polynomials over symbols, such as 16·batch + 1.

    batch = symbol("batch", least=1)
    16 * batch * 4 == 64 * batch          # a canonical form: equal expressions are equal objects
    equal(16 * batch, 0)                  # False, because there is at least one item; None where nobody can know

A `Number` is an int wherever it is known, an `Expression` otherwise. What is no polynomial (a quotient that isn't whole, a
remainder, the smaller of two) becomes a symbol of its own, named after what it is, so that the same computation met twice
is the same number. Nothing here overflows: sizes near 2⁶³ are not told from those beyond.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

Monomial = tuple["Symbol", ...]
UNNAMED = "?"
"""What the name of a symbol begins with that no file has named."""


@dataclass(frozen=True)
class Symbol:
    """A whole number that isn't known yet. `least`: it is never smaller than that, None where it may be anything.
    `smallest_of`: the numbers that it is the smallest of, where it is known to be that."""

    name: str
    least: int | None = 0
    smallest_of: tuple[Number, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, eq=False)
class Expression:
    """A polynomial that isn't constant: coefficients by monomial, none of them 0."""

    terms: Mapping[Monomial, int]

    @cached_property
    def _key(self) -> frozenset[tuple[Monomial, int]]:
        return frozenset(self.terms.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __add__(self, other: Number) -> Number:
        total = dict(self.terms)
        for monomial, factor in _terms(other).items():
            total[monomial] = total.get(monomial, 0) + factor
        return _number(total)

    def __mul__(self, other: Number) -> Number:
        total: dict[Monomial, int] = {}
        for left, a in self.terms.items():
            for right, b in _terms(other).items():
                monomial = tuple(sorted((*left, *right), key=lambda one: one.name))
                total[monomial] = total.get(monomial, 0) + a * b
        return _number(total)

    def __neg__(self) -> Number:
        return self * -1

    def __sub__(self, other: Number) -> Number:
        return self + -other

    def __rsub__(self, other: Number) -> Number:
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__

    def __str__(self) -> str:
        ordered = sorted(self.terms.items(), key=lambda term: (-len(term[0]), [one.name for one in term[0]]))
        return " + ".join(_written(monomial, factor) for monomial, factor in ordered)

    __repr__ = __str__


Number = int | Expression


def symbol(name: str, least: int | None = 0) -> Expression:
    """The number of that name."""
    return Expression({(Symbol(name, least),): 1})


def symbols(number: Number) -> set[Symbol]:
    """All symbols in `number`."""
    return set() if isinstance(number, int) else {one for monomial in number.terms for one in monomial}


def named(number: Number) -> bool:
    """Whether every symbol in `number` has a name that a file gave it, and nothing else is in there."""
    return all(UNNAMED not in one.name and "(" not in one.name for one in symbols(number))


def product(numbers: Iterable[Number]) -> Number:
    """All of them multiplied."""
    total: Number = 1
    for number in numbers:
        total = total * number
    return total


def least(number: Number) -> int | None:
    """A bound that `number` never goes below; None where none is known."""
    if isinstance(number, int):
        return number
    bound = 0
    for monomial, factor in number.terms.items():
        if not monomial:
            bound += factor
            continue
        lowest = [one.least for one in monomial if one.least is not None and one.least >= 0]
        if factor < 0 or len(lowest) < len(monomial):
            return None
        bound += factor * prod(lowest)
    return bound


def at_least(number: Number, bound: int) -> bool:
    """Whether `number` is provably no smaller than `bound`."""
    low = least(number)
    return low is not None and low >= bound


def equal(a: Number, b: Number) -> bool | None:
    """Whether two numbers are the same; None where that depends."""
    gap = a - b
    if isinstance(gap, int):
        return gap == 0
    return False if at_least(gap, 1) or at_least(-gap, 1) else None


def less(a: Number, b: Number) -> bool | None:
    """Whether a < b; None where that depends."""
    if at_least(b - a, 1):
        return True
    return False if at_least(a - b, 0) else None


def minimum(a: Number, b: Number) -> Number:
    """The smaller one."""
    if at_least(b - a, 0):
        return a
    if at_least(a - b, 0):
        return b
    bounds = [least(a), least(b)]
    low = None if None in bounds else min(low for low in bounds if low is not None)
    return Expression({(Symbol(_called("min", a, b), low, (a, b)),): 1})


def capped(number: Number) -> tuple[Number, ...]:
    """The numbers that `number` is the smallest of, where it is known to be that."""
    if isinstance(number, int) or list(number.terms.values()) != [1]:
        return ()
    (monomial,) = number.terms
    return monomial[0].smallest_of if len(monomial) == 1 else ()


def maximum(a: Number, b: Number) -> Number:
    """The larger one."""
    if at_least(a - b, 0):
        return a
    if at_least(b - a, 0):
        return b
    bounds = [low for low in (least(a), least(b)) if low is not None]
    return symbol(_called("max", a, b), max(bounds, default=None))


def quotient(a: Number, b: Number) -> Number | None:
    """The number that gives `a` when multiplied by `b`; None where there is none for all values of the symbols. Where `b`
    may be 0, it is one of many then."""
    if b == 0:
        return None
    if isinstance(b, int) or len(b.terms) == 1:
        ((divisor, factor),) = _terms(b).items()
        parts = {}
        for monomial, coefficient in _terms(a).items():
            rest = _without(monomial, divisor)
            if rest is None or coefficient % factor:
                return None
            parts[rest] = coefficient // factor
        return _number(parts)
    # A sum divides a sum here only where what it takes is one term.
    first = min(b.terms, key=lambda monomial: (-len(monomial), [one.name for one in monomial]))
    for monomial, coefficient in _terms(a).items():
        rest = _without(monomial, first)
        if rest is not None and coefficient % b.terms[first] == 0:
            guess = _number({rest: coefficient // b.terms[first]})
            if guess * b == a:
                return guess
    return None


def truncated(a: Number, b: Number) -> Number | None:
    """a / b rounded towards 0, as integers are divided in ONNX; None where that can't be said."""
    if isinstance(a, int) and isinstance(b, int):
        return None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    if not (at_least(b, 1) or at_least(-b, 1)):
        return None
    exact = quotient(a, b)
    if exact is not None:
        return exact
    return symbol(f"floor({a} / {b})") if at_least(a, 0) and at_least(b, 1) else None


def remainder(a: Number, b: Number) -> Number | None:
    """a mod b with the sign of b; None where that can't be said."""
    if not isinstance(b, int) or b <= 0:
        return a % b if isinstance(a, int) and isinstance(b, int) and b else None
    left = _number({monomial: factor % b for monomial, factor in _terms(a).items()})
    return left if isinstance(left, int) else symbol(f"mod({left}, {b})")


def _terms(number: Number) -> Mapping[Monomial, int]:
    return number.terms if isinstance(number, Expression) else {(): int(number)}


def _number(terms: Mapping[Monomial, int]) -> Number:
    kept = {monomial: factor for monomial, factor in terms.items() if factor}
    return Expression(kept) if any(kept) else kept.get((), 0)


def _without(monomial: Monomial, divisor: Monomial) -> Monomial | None:
    rest = list(monomial)
    for one in divisor:
        if one not in rest:
            return None
        rest.remove(one)
    return tuple(rest)


def _written(monomial: Monomial, factor: int) -> str:
    names = [one.name for one in monomial]
    return "*".join([str(factor), *names] if factor != 1 or not names else names)


def _called(what: str, *numbers: Number) -> str:
    return f"{what}({', '.join(sorted(map(str, numbers)))})"
