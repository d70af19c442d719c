"""A measured figure in words, for every written form of a gate and of a benchmark: its name, its value in a unit for
people, how sure it is, and what a change of it says.

Nothing here knows colours, columns or tags. Missing figures read "–", never 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from perwatt.figures import FIGURES
from perwatt.report_table import judged
from perwatt.report_units import (
    JOULES,
    MISSING,
    PLAIN,
    POWERS,
    RATES,
    SIZES,
    TIMES,
    Units,
    compact,
    in_units,
    known,
    percent_or_number,
    plain,
)

if TYPE_CHECKING:
    from perwatt.report import RatioFigure

Change = Literal["better", "worse", "same", "≈ same", "noise", ""]
UNITS: dict[str, tuple[float, Units]] = {
    "s": (1.0, TIMES), "ms": (1e-3, TIMES), "J": (1.0, JOULES), "W": (1.0, POWERS), "1/s": (1.0, RATES),
    "1/J": (1.0, PLAIN), "B": (1.0, SIZES), "": (1.0, PLAIN), "metric": (1.0, PLAIN),
}  # fmt: skip
DIGITS, MODELLED_DIGITS = 3, 2
"""Significant digits that are shown; a model of the machine's power knows no more than its own."""
UNLIKE = 1000
"""Sizes so many times apart have each its own unit."""
LOPSIDED = 1.5
"""An interval with one arm so many times longer than the other is written with both."""


def title(name: str) -> str:
    """The figure's name for people."""
    return FIGURES[name].title if name in FIGURES else plain(name).replace("_", " ")


def in_order(names: Sequence[str]) -> list[str]:
    """The figures in the order in which they are shown; those that we don't know come last."""
    return [name for name in FIGURES if name in names] + [name for name in names if name not in FIGURES]


def values(unit: str, found: Sequence[float | None], digits: int = DIGITS) -> list[str]:
    """What is compared, in one unit: `unit` is that of the report ("s", "1/J", "fraction", …). With fewer than three
    `digits`, large numbers are rounded as well. Sizes far apart have each its own."""
    if digits < DIGITS:
        found = [None if known(value) is None else float(f"{value:.{digits}g}") for value in found]
    if unit == "fraction":
        return [percent_or_number(value, unit) for value in found]
    if unit not in UNITS:
        shown = in_units(found, PLAIN, digits)
        return [text if text == MISSING else f"{text} {plain(unit)}" for text in shown]
    scale, units = UNITS[unit]
    scaled = [None if value is None else value * scale for value in found]
    sizes = [abs(value) for value in map(known, scaled) if value]
    if unit == "B" and sizes and max(sizes) >= UNLIKE * min(sizes):
        return [in_units([value], units, digits)[0] for value in scaled]
    return in_units(scaled, units, digits)


def by_method(unit: str, found: Sequence[tuple[float | None, str | None]]) -> list[str]:
    """Values with their methods, in one unit: modelled ones with the two digits that are known."""
    fine, rough = (values(unit, [value for value, _ in found], digits) for digits in (DIGITS, MODELLED_DIGITS))
    methods = [method for _, method in found]
    return [b if method == "modelled" else a for a, b, method in zip(fine, rough, methods, strict=True)]


def rate_words(rate_per_s: float | None) -> str:
    """A rate as a person would say it: 40 /s, 5 /min, 2 /h."""
    rate = known(rate_per_s)
    if rate is None:
        return MISSING
    name, in_a_second = next(
        (unit for unit in (("s", 1.0), ("min", 1 / 60)) if rate >= 0.9999 * unit[1]), ("h", 1 / 3600)
    )
    return f"{compact(rate / in_a_second)} /{name}"


def percent(share: float | None) -> str:
    """A share as percent with two significant digits: 1.2 %."""
    share = known(share)
    return MISSING if share is None else f"{compact(100 * share, 2)} %"


def spread(value: float | None, low: float | None, high: float | None) -> str:
    """The 95 % interval relative to the value: "±1.2 %", "−3 % +12 %" where it is lopsided; empty without one."""
    value, low, high = known(value), known(low), known(high)
    if not value or low is None or high is None or low == high:
        return ""
    below, above = (max(0.0, arm / abs(value)) for arm in (value - low, high - value))
    if max(below, above) > LOPSIDED * min(below, above):
        return f"−{percent(below)} +{percent(above)}"
    return f"±{percent((below + above) / 2)}"


def with_bounds(unit: str, value: float | None, bounds: tuple[float, float] | None) -> str:
    """A value with its interval in its own unit: "22.1 ms [21.0, 23.4]"."""
    if bounds is None or known(bounds[0]) is None or known(bounds[1]) is None:
        return values(unit, [value])[0]
    shown, low, high = values(unit, [value, *bounds])
    number, _, name = shown.partition(" ")
    bare = [bound.removesuffix(f" {name}") if name else bound for bound in (low, high)]
    return f"{shown} [{bare[0]}, {bare[1]}]" if number != MISSING else MISSING


def change(name: str, ratio: RatioFigure, floor: float | None) -> Change:
    """What a ratio says. "noise" where its interval includes 1, or where two processes of the same model were as far
    apart (`floor`, as a fraction). A measured figure that has neither an interval nor a floor says nothing."""
    kind = FIGURES.get(name)
    value, low, high = known(ratio.value), known(ratio.low), known(ratio.high)
    if kind is None or not value or value < 0:
        return ""
    # As far apart in either direction: a factor of 1.05 and one of 1/1.05 are the same effect.
    if floor is not None and value != 1 and max(value, 1 / value) - 1 <= floor:
        return "noise"
    if kind.exact:
        verdict = judged(ratio, kind.better == "higher")
        return "" if verdict == "over budget" else verdict
    if low is None or high is None:
        return "" if floor is None else _direction(value, kind.better)
    return "noise" if low <= 1 <= high and low < high else _direction(value, kind.better)


def _direction(value: float, better: str) -> Change:
    return "same" if value == 1 else "better" if (value > 1) == (better == "higher") else "worse"


def n_words(counts: Mapping[str, int]) -> str:
    """How many windows stand behind the figures: the usual number, and the figures that have another."""
    some = {name: n for name, n in counts.items() if n}
    if not some:
        return ""
    usual = Counter(some.values()).most_common(1)[0][0]
    others: dict[int, list[str]] = {}
    for name, n in some.items():
        if n != usual:
            others.setdefault(n, []).append(title(name))
    return "; ".join([f"n = {usual:,}", *(f"n = {n:,} for {', '.join(names)}" for n, names in others.items())])


def meaning_words(names: Sequence[str]) -> list[tuple[str, str]]:
    """What each figure means in a sentence."""
    return [(FIGURES[name].title, FIGURES[name].meaning) for name in in_order(names) if name in FIGURES]
